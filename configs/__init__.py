"""Configs that ship. A folder `configs` of one's own may add to them: `from configs import base, mine`."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
