"""`Tokenizer`, the class of all kinds of tokenizers: text to token ids and back."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llmjax.config import ConfigError
from llmjax.data.tokenizers.chat import Message, render_chat
from llmjax.data.tokenizers.streams import ByteStream, NamedTokenStream, TextStream, WindowStream

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A vocabulary, functions between text and ids, and the roles of special tokens.

  Attributes:
    name: key of `registry.LOADERS`, or "module:function" of a loader outside llmjax.
    pieces: UTF-8 bytes of each token; empty for special tokens.
    to_ids: text -> Int[n], without special tokens.
    files: {file name: content} from which the loader rebuilds the tokenizer.
    bos_id, eos_id: tokens at the start and the end of a document; None: the vocabulary has none.
    pad_id: 0 if the vocabulary has no padding token; masks, not this id, mark padding.
    unk_id: token for text that is not in the vocabulary.
    mask_id: token that replaces masked tokens (Devlin et al. 2019).
    sentinels: tokens that replace masked spans, in the order of the spans (Raffel et al. 2020: <extra_id_0>, ...).
    names: {id: name} of special tokens.
    continuation_ids: tokens that continue a word although their pieces do not show it (WordPiece's "##").
    single_template: tokens before and after a single text, such as BERT's [CLS] and [SEP]; None: bos before it.
    pair_template: tokens before, between and after a pair of texts, and the token type of the second; None: bos, eos
      (without one, a line end), eos and 1.
    to_text: decodes known ids; None: the text is the concatenation of the pieces.
    chat_templates: {name: Jinja source}, see `chat.render_chat`.
    token_names: names that chat templates may use, {"bos_token": "<s>", ...}; empty: those of `names`.
    to_special_ids: text -> Int[n], in which names of special tokens become those tokens.
    to_offsets: text -> (Int[n], Int[n, 2]), see `encode_with_offsets`.
  """

  name: str
  pieces: tuple[bytes, ...]
  to_ids: Callable[[str], ArrayLike]
  files: Mapping[str, bytes]
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int = 0
  unk_id: int | None = None
  mask_id: int | None = None
  sentinels: Ids = ()
  names: Mapping[int, str] = dataclasses.field(default_factory=dict)
  continuation_ids: frozenset[int] = frozenset()
  single_template: tuple[Ids, Ids] | None = None
  pair_template: tuple[Ids, Ids, Ids, int] | None = None
  to_text: Callable[[list[int]], str] | None = None
  chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  token_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  to_special_ids: Callable[[str], ArrayLike] | None = None
  to_offsets: Callable[[str], tuple[ArrayLike, ArrayLike]] | None = None

  # Vocabulary

  @property
  def vocab_size(self) -> int:
    return len(self.pieces)

  @functools.cached_property
  def special(self) -> np.ndarray:
    """Bool[V], whether a token is special: it stands for no text, such as bos, a padding token, mask, sentinels."""
    roles = {self.bos_id, self.eos_id, self.unk_id, self.mask_id, *self.sentinels, *self.names}
    return np.array([not piece or i in roles for i, piece in enumerate(self.pieces)], bool)

  def special_token_names(self) -> dict[str, str]:
    """Return the special tokens by the names of Transformers: {"bos_token": "<s>", ...}."""
    roles = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "mask": self.mask_id}
    own = {f"{role}_token": self.names[i] for role, i in roles.items() if i is not None and i in self.names}
    return dict(self.token_names or own)

  def byte_lengths(self) -> np.ndarray:
    """Return Int32[V], UTF-8 bytes of each token, 0 for special tokens.

    Over `encode(text)` they sum to `len(text.encode())`, unless a tokenizer of a Hugging Face folder changes the text
    (lower case, Unicode normalisation, a space before the first word).
    """
    return np.array([len(piece) for piece in self.pieces], np.int32)

  def word_begins(self, ids: np.ndarray) -> np.ndarray:
    """Return Bool[n], whether a token begins a word: a run of letters, digits and underscores, or any other token."""
    if self.continuation_ids:
      return ~np.isin(ids, list(self.continuation_ids))
    first, last = self._word_edges
    return np.append(True, ~(last[ids[:-1]] & first[ids[1:]])) if len(ids) else np.zeros(0, bool)

  @functools.cached_property
  def _word_edges(self) -> tuple[np.ndarray, np.ndarray]:
    """Bool[V] each, whether the first and the last byte of a token belong to a word; all bytes beyond ASCII do."""

    def is_of_word(byte: bytes) -> bool:
      return byte.isalnum() or byte == b"_" or byte >= b"\x80"

    first = np.array([is_of_word(piece[:1]) for piece in self.pieces])
    return first, np.array([is_of_word(piece[-1:]) for piece in self.pieces])

  # Text to ids

  def encode(self, text: str) -> np.ndarray:
    """Return Int32[n] without special tokens. Names of special tokens in the text are encoded as text."""
    return np.asarray(self.to_ids(text), np.int32)

  def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode a text and locate its tokens.

    Returns:
      Int32[n], the ids of `encode`, and Int32[n, 2], the characters [start, stop) of each token. Tokens that share a
      character, such as its bytes, all have it. A token without characters, such as the space that some vocabularies
      insert before a text, has those of the next token. Some kinds of tokenizers exclude the spaces before a word.

    Raises:
      ConfigError: this kind of tokenizer has no offsets.
    """
    if self.to_offsets is None:
      raise ConfigError(
        f"data.tokenizer.name: has no character offsets, got kind {self.name!r}. Set `to_offsets`, or choose one of "
        "sentencepiece, hf, bytes, characters"
      )
    ids, offsets = self.to_offsets(text)
    return np.asarray(ids, np.int32), np.asarray(offsets, np.int32).reshape(-1, 2)

  def parse(self, text: str) -> np.ndarray:
    """Return Int32[n], the inverse of `show` for sentinels and mask: their names become tokens. Not for data."""
    tokens = {i for i in (*self.sentinels, self.mask_id) if i is not None and i in self.names}
    return self._encode_with_names(text, tokens)

  def _encode_with_names(self, text: str, tokens: Iterable[int]) -> np.ndarray:
    """Return Int32[n], in which the names of `tokens` become those tokens."""
    named = {self.names[i]: i for i in tokens}
    if not named:
      return self.encode(text)
    longest_first = sorted(named, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids = [[named[part]] if part in named else self.encode(part) for part in parts if part]
    return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)

  # Special tokens around texts

  @property
  def _bos(self) -> Ids:
    return () if self.bos_id is None else (self.bos_id,)

  @property
  def _eos(self) -> Ids:
    return () if self.eos_id is None else (self.eos_id,)

  @property
  def single(self) -> tuple[np.ndarray, np.ndarray]:
    """(Int32[n], Int32[m]), the tokens before and after a single text."""
    before, after = self.single_template or (self._bos, ())
    return np.array(before, np.int32), np.array(after, np.int32)

  def frame(self, ids: np.ndarray) -> np.ndarray:
    """Return Int32[n], ids between bos and eos, if the vocabulary has them."""
    return np.concatenate([np.array(self._bos, np.int32), ids, np.array(self._eos, np.int32)]).astype(np.int32)

  def unframe(self, ids: np.ndarray) -> np.ndarray:
    """Return ids without the bos and eos of `frame`."""
    start = int(len(ids) > 0 and ids[0] == self.bos_id)
    return ids[start : len(ids) - int(len(ids) > start and ids[-1] == self.eos_id)]

  def document(self, text: str) -> np.ndarray:
    """Return Int32[n], the ids of a text between bos and eos, if the vocabulary has them."""
    return self.frame(self.encode(text))

  def prompt(self, text: str) -> np.ndarray:
    """Return Int32[n], the start of a text that a model continues."""
    return np.concatenate([self.single[0], self.encode(text)])

  def assemble(
    self, first: np.ndarray, second: np.ndarray | None, length: int
  ) -> tuple[np.ndarray, np.ndarray, tuple[int, int | None]]:
    """Join one or two texts and special tokens, as the input of a classifier.

    Args:
      first, second: ids as of `encode`; the longer text is truncated at its end.
      length: maximum number of tokens.

    Returns:
      ids Int32[n], token types Int32[n], and the positions at which the first and the second text start.

    Raises:
      ConfigError: `length` leaves no room for text.
    """
    between: Ids = ()
    if second is None:
      before, after = (self._bos, self._eos) if self.single_template is None else self.single_template
      second_type = 0
    else:
      line_end = tuple(self.encode("\n").tolist())
      default = (self._bos, self._eos or line_end, self._eos, 1)
      before, between, after, second_type = self.pair_template or default
    room = length - len(before) - len(between) - len(after)
    if room < 1 + (second is not None):
      raise ConfigError(f"seq_len: leaves no room for text between special tokens, got {length}. Increase it")
    second_start = None
    if second is None:
      first, second = first[:room], first[:0]
    else:
      first_room = min(len(first), max(room - len(second), room - room // 2))
      first, second = first[:first_room], second[: room - first_room]
      second_start = len(before) + len(first) + len(between)
    parts = [np.array(before), first, np.array(between), second, np.array(after)]
    ids = np.concatenate(parts).astype(np.int32)
    types = (np.arange(len(ids)) >= len(ids) - len(second) - len(after)) * second_type
    return ids, types.astype(np.int32), (len(before), second_start)

  def pad(self, texts: Sequence[str], side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """Encode several texts, each with the tokens of `single`, and pad them to one length.

    For a Hugging Face folder the result is that of `AutoTokenizer(texts, padding=True)`.

    Args:
      texts: B texts.
      side: side of the padding, "right" or "left".

    Returns:
      ids Int32[B L] and mask Int32[B L], 1 for tokens.
    """
    if side not in ("right", "left"):
      raise ConfigError(f"side: must be 'right' or 'left', got {side!r}")
    before, after = self.single
    rows = [np.concatenate([before, self.encode(text), after]) for text in texts]
    length = max(map(len, rows), default=0)
    ids, mask = np.full((len(rows), length), self.pad_id, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
      positions = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
      ids[i, positions], mask[i, positions] = row, 1
    return ids, mask

  def chat(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    **variables: object,
  ) -> np.ndarray:
    """Return Int32[n], a chat formatted by its chat template; arguments are those of `chat.render_chat`.

    Special tokens that the template writes become those tokens. As in Transformers, the same happens to their names in
    the messages: remove the names of special tokens (`names`) from messages of untrusted users.
    """
    text = render_chat(
      self.chat_templates,
      messages,
      template=template,
      add_generation_prompt=add_generation_prompt,
      tools=tools,
      **{**self.special_token_names(), **variables},
    )
    if self.to_special_ids is None:
      return self._encode_with_names(text, self.names)
    return np.asarray(self.to_special_ids(text), np.int32)

  # Ids to text

  def decode(self, ids: Iterable[int] | np.ndarray) -> str:
    """Return the text. Special tokens and ids beyond the vocabulary are skipped; broken UTF-8 becomes U+FFFD."""
    known = [i for i in np.asarray(ids, np.int64).reshape(-1).tolist() if 0 <= i < len(self.pieces)]
    if self.to_text is not None:
      return self.to_text(known)
    return b"".join(self.pieces[i] for i in known).decode("utf-8", errors="replace")

  def show(self, ids: Iterable[int] | np.ndarray) -> str:
    """Return the text with the names of special tokens in it, such as "Thank you<extra_id_0> me</s>"; for display."""
    stream = self.stream(special=True)
    return "".join([*map(stream.push, np.asarray(ids, np.int64).reshape(-1).tolist()), stream.finish()])

  def stream(self, special: bool = False) -> TextStream:
    """Return a decoder of tokens that arrive one by one; with `special`, special tokens are shown as by `show`."""
    text = ByteStream(self.pieces) if self.to_text is None else WindowStream(self.decode)
    return NamedTokenStream(text, self.special, self.names) if special else text

  # Checkpoints

  def spec(self) -> dict[str, str]:
    """Return the arguments with which `registry.tokenizer_from_files` rebuilds the tokenizer."""
    return {"name": self.name}

  def to_files(self) -> dict[str, bytes]:
    """Return {file name: content} from which `registry.tokenizer_from_files` rebuilds the tokenizer."""
    return dict(self.files)
