"""Python tokens of the library with tags for what they are part of."""

from __future__ import annotations

import keyword
import tokenize
from collections.abc import Iterator
from typing import TypeAlias

from llmjax.datasets.python_stdlib.library import Documents

MAX_TOKENS = 60  # of an excerpt
MAX_EXCERPTS = 12  # of a file

TaggedTokens: TypeAlias = list[tuple[str, str]]  # (token, tag)
Token: TypeAlias = tuple[str, str]  # (NAME, NUMBER, STRING, COMMENT or OP; text)


def tagged_tokens(documents: Documents) -> Iterator[dict[str, object]]:
  """Token classification: excerpts of files as tokens, tagged in the scheme IOB2.

  An excerpt is a sequence of whole logical lines (simple statements and heads of compound statements) with at most 60
  tokens. A file gives at most 12 excerpts, evenly spaced. Tokens are Python's, but strings and comments are split at
  white space, so that no token contains any. Tags:

    IMPORT     the dotted name of an imported module: "os . path", ". util"
    CALL       the dotted name that is called: "self . assertEqual"
    FUNCTION, CLASS, PARAMETER   a name where it is defined
    STRING, NUMBER, COMMENT
    O          all other tokens
  """
  for path, source in documents:
    if "#" in path:
      continue
    excerpts = list(_excerpts(source))
    for i in sorted({i * len(excerpts) // MAX_EXCERPTS for i in range(MAX_EXCERPTS)} if excerpts else ()):
      words, tags = zip(*excerpts[i])
      yield {"tokens": list(words), "tags": list(tags), "text": " ".join(words), "path": path}


def _excerpts(source: str) -> Iterator[TaggedTokens]:
  excerpt: TaggedTokens = []
  for line in _logical_lines(source):
    tagged = _tag_line(line)
    if excerpt and len(excerpt) + len(tagged) > MAX_TOKENS:  # a line that is too long also ends it: no gaps
      yield excerpt
      excerpt = []
    if len(tagged) <= MAX_TOKENS:
      excerpt += tagged
  if excerpt:
    yield excerpt


def _logical_lines(source: str) -> Iterator[list[Token]]:
  """Yield the tokens of each logical line, with the comments in and before it, up to the first syntax error.

  Python 3.12 and later split an f-string into tokens; here it is one token in all versions.
  """
  lines = [line + "\n" for line in source.split("\n")]
  line: list[Token] = []
  fstring_starts: list[tuple[int, int]] = []  # of the nested f-strings that are open
  try:
    for token in tokenize.generate_tokens(iter(lines).__next__):
      kind = tokenize.tok_name[token.type]
      if kind.endswith("STRING_START"):
        fstring_starts.append(token.start)
      elif kind.endswith("STRING_END"):
        start = fstring_starts.pop()
        if not fstring_starts:
          line.append(("STRING", _text_between(lines, start, token.end)))
      elif fstring_starts:
        continue
      elif kind == "NEWLINE":
        yield line
        line = []
      elif kind in ("NAME", "NUMBER", "STRING", "COMMENT", "OP"):
        line.append((kind, token.string))
  except (SyntaxError, tokenize.TokenError):
    return
  if line:
    yield line


def _text_between(lines: list[str], start: tuple[int, int], stop: tuple[int, int]) -> str:
  """Return the text between two positions (line from 1, column from 0)."""
  (first, begin), (last, end) = start, stop
  if first == last:
    return lines[first - 1][begin:end]
  return "".join([lines[first - 1][begin:], *lines[first : last - 1], lines[last - 1][:end]])


def _tag_line(line: list[Token]) -> TaggedTokens:
  """Return the tokens of a logical line, split at white space, with their tags."""
  labels = _label_code([token for token in line if token[0] != "COMMENT"])
  tagged: TaggedTokens = []
  for kind, text in line:
    label, is_begin = ("COMMENT", True) if kind == "COMMENT" else next(labels)
    is_begin = is_begin or not tagged or tagged[-1][1][2:] != label  # a comment may be inside a dotted name
    for word in text.split():
      tagged.append((word, "O" if label is None else f"{'B' if is_begin else 'I'}-{label}"))
      is_begin = False
  return tagged


def _label_code(code: list[Token]) -> Iterator[tuple[str | None, bool]]:
  """Yield (label, whether a span with that label begins here) for the tokens of a logical line without comments."""
  is_name = [kind == "NAME" and not keyword.iskeyword(text) for kind, text in code]
  texts = [text for _, text in code]
  parameters = _parameter_positions(texts, is_name)
  is_import = texts[:1] in (["import"], ["from"])
  i = 0
  while i < len(code):
    before = texts[i - 1] if i else ""
    # `stop` is the end of the dotted name that starts at i, if there is one.
    stop = i
    while is_import and before == "from" and stop < len(code) and texts[stop] in (".", "..."):
      stop += 1
    while stop < len(code) and is_name[stop]:
      stop += 1
      if texts[stop : stop + 1] != ["."] or not any(is_name[stop + 1 : stop + 2]):
        break
      stop += 1
    label = None
    if is_import and stop > i and (before == "from" or (texts[0] == "import" and before in ("import", ","))):
      label = "IMPORT"
    elif code[i][0] in ("STRING", "NUMBER"):
      label, stop = code[i][0], i + 1
    elif is_name[i] and before in ("def", "class"):
      label, stop = "FUNCTION" if before == "def" else "CLASS", i + 1
    elif i in parameters:
      label, stop = "PARAMETER", i + 1
    elif is_name[i] and texts[stop : stop + 1] == ["("]:
      label = "CALL"
    stop = max(stop, i + 1)
    yield from ((label, position == i) for position in range(i, stop))
    i = stop


def _parameter_positions(texts: list[str], is_name: list[bool]) -> set[int]:
  """Return the positions of parameter names, if the line is the head of a function."""
  if "def" not in texts[:2] or "(" not in texts:
    return set()
  positions, depth, is_expected = set(), 0, False
  for i in range(texts.index("("), len(texts)):
    depth += (texts[i] in ("(", "[", "{")) - (texts[i] in (")", "]", "}"))
    if depth == 0:
      break
    if is_expected and is_name[i]:
      positions.add(i)
    is_expected = depth == 1 and (texts[i] in ("(", ",") or (is_expected and texts[i] in ("*", "**")))
  return positions
