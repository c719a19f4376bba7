"""Configs that ship with llmjax. A folder `configs` of your own extends them: `from configs import base, mine`."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
