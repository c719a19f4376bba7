"""Render HTML pages that need no network and no scripts, in light and dark, from the templates beside the modules."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
  from jinja2 import Environment


class ThemedImage(NamedTuple):
  """An SVG image for each theme of the reader, as base64."""

  title: str
  light: str
  dark: str


def themed_image(title: str, draw: Callable[[str], bytes]) -> ThemedImage:
  """Return an image from a function that draws it as SVG in the theme "light" or "dark"."""
  light, dark = (base64.b64encode(draw(theme)).decode() for theme in ("light", "dark"))
  return ThemedImage(title, light, dark)


@functools.cache
def template_environment() -> Environment:
  from jinja2 import Environment, PackageLoader, StrictUndefined

  loader = PackageLoader("llmjax", "")
  return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render_page(template: str, **values: object) -> bytes:
  """Return a page in UTF-8.

  Args:
    template: path below llmjax/, such as "reporting/run.html".
    values: variables of the template.
  """
  return template_environment().get_template(template).render(values).encode("utf-8", "replace")
