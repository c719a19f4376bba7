"""Parts of an HTML page that stands alone: no network, no script, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --muted: #6e7781; --line: #e8ebee; --mine: #2f6fde }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e6e9ec; --muted: #8b949e; --line: #272d34; --mine: #6ea3ff } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: auto; padding: 32px 24px 64px }
header p { color: var(--muted); margin: 0 0 20px }
h1 { font-size: 28px; margin: 0 }
h2 { font-size: 18px; margin: 40px 0 10px }
img { width: 100%; display: block }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; margin-top: 16px }
.wide { overflow-x: auto } .lead img { min-width: 640px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 4px 0 4px 28px; border-bottom: 1px solid var(--line); font-weight: normal }
th { color: var(--muted) }
td:first-child { text-align: left; padding-left: 0 }
.bars td:last-child { width: 360px } .bars i { display: block; height: 10px; background: var(--muted); opacity: .45 }
.bars .mine { font-weight: bold; color: var(--mine) } .bars .mine i { background: var(--mine); opacity: 1 }
.sample { margin: 16px 0; border-left: 3px solid var(--line); padding-left: 14px } .sample b { color: var(--mine) }
.sample span { color: var(--muted); font-size: 13px }
pre { margin: 4px 0; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
details { margin-top: 28px } summary { cursor: pointer; color: var(--muted) }
details td { text-align: left; font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
"""


def section(heading: str, content: str) -> str:
  return f"<section><h2>{heading}</h2>{content}</section>"


def fold(heading: str, content: Iterable[str]) -> str:
  return f"<details><summary>{heading}</summary>{''.join(content)}</details>"


def _row(cells: list[str], tag: str) -> str:
  return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def table(head: list[str], rows: list[list[str]]) -> str:
  lines = ([_row(head, "th")] if any(head) else []) + [_row(row, "td") for row in rows]
  return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def picture(svg: Callable[[str], str], title: str) -> str:
  """A picture in the theme of the reader; `svg` draws it in "light" or "dark"."""
  light, dark = (base64.b64encode(svg(theme).encode()).decode() for theme in ("light", "dark"))
  source = f'<source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark}">'
  return f'<picture>{source}<img src="data:image/svg+xml;base64,{light}" alt="{html.escape(title)}"></picture>'


def whole(title: str, subtitle: str, parts: Iterable[str]) -> str:
  """The page."""
  head = f"<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>"
  meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
  body = f"<style>{CSS}</style><main>{head}{''.join(parts)}</main>"
  return f"<!doctype html><html lang=en>{meta}<title>{html.escape(title)}</title>{body}\n"
