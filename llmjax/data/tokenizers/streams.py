"""Decoders of tokens that arrive one by one."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np


class TextStream(Protocol):
  """Text of tokens that arrive one by one. All returned strings together are the decoding of all tokens."""

  def push(self, token: int) -> str:
    """Return the text that is complete with this token; never a part of a character."""

  def finish(self) -> str:
    """Return the remaining text."""


class ByteStream:
  """Decodes the bytes of tokens by an incremental UTF-8 decoder."""

  def __init__(self, pieces: Sequence[bytes]):
    self.pieces = pieces
    self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, token: int) -> str:
    return self.decoder.decode(self.pieces[token] if 0 <= token < len(self.pieces) else b"")

  def finish(self) -> str:
    return self.decoder.decode(b"", final=True)


class WindowStream:
  """Decodes by a function of several tokens: a token's text is what it adds to the text of the group before it."""

  def __init__(self, decode: Callable[[list[int]], str]):
    self.decode = decode
    self.ids: list[int] = []  # the last group whose text was returned, then pending tokens
    self.num_returned = 0  # tokens of that group

  def push(self, token: int) -> str:
    self.ids.append(token)
    return "" if self.decode(self.ids).endswith("\ufffd") else self.finish()

  def finish(self) -> str:
    old, new = self.decode(self.ids[: self.num_returned]), self.decode(self.ids)
    if len(new) <= len(old):  # no new text; the group is needed to decode the next token
      return ""
    self.ids, self.num_returned = self.ids[self.num_returned :], len(self.ids) - self.num_returned
    return new[len(old) :]


class NamedTokenStream:
  """Shows special tokens by name between the text of other tokens.

  Args:
    text: decoder of the other tokens.
    special: Bool[V].
    names: {id: name} of special tokens; others are shown as "<id>".
  """

  def __init__(self, text: TextStream, special: np.ndarray, names: Mapping[int, str]):
    self.text, self.special, self.names = text, special, names

  def push(self, token: int) -> str:
    if 0 <= token < len(self.special) and not self.special[token]:
      return self.text.push(token)
    return self.text.finish() + self.names.get(token, f"<{token}>")

  def finish(self) -> str:
    return self.text.finish()
