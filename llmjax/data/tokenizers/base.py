"""Text to token ids and back: SentencePiece, Hugging Face folders, bytes, characters.

`make` builds one from `data.tokenizer` (training it where it asks for that); `spec` and `to_files` go into checkpoints,
and `from_files` builds the same tokenizer from them. Any kind can be given the tokens of pretraining objectives beside
its own: a mask, and sentinels.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmjax.config import ConfigError, build, resolve_callable
from llmjax.data.sources.base import Source, subsample_bytes, text_of
from llmjax.data.tokenizers import chat
from llmjax.data.tokenizers.chat import render_chat
from llmjax.storage.cache import cache_dir

TOKENIZERS = {
  "sentencepiece": "llmjax.data.tokenizers.sentencepiece:sentencepiece",
  "hf": "llmjax.data.tokenizers.huggingface:hf",
  "bytes": "llmjax.data.tokenizers.characters:bytes_",
  "characters": "llmjax.data.tokenizers.characters:characters",
}

# How a tokenizer is rebuilt from what `to_files` gave.
LOADERS = {
  "sentencepiece": "llmjax.data.tokenizers.sentencepiece:sentencepiece_from_files",
  "hf": "llmjax.data.tokenizers.huggingface:hf_from_files",
  "bytes": "llmjax.data.tokenizers.characters:bytes_from_files",
  "characters": "llmjax.data.tokenizers.characters:characters_from_files",
}

# Tokens that `extend` adds, and the file of a checkpoint that says which.
MASK, SENTINEL = "<mask>", "<extra_id_{}>"
EXTRA_FILE = "extra_tokens.json"

TRAINING_BYTES = 1 << 24  # of text that a vocabulary is trained on at most, evenly spread over the source


class TextStream(Protocol):
  """Text from tokens as they come, never half a character; pushed and finished pieces together are `decode`'s."""

  def push(self, token: int) -> str: ...

  def finish(self) -> str: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """What every kind of tokenizer is.

  Attributes:
    name: its entry in `LOADERS` (or "module:function" of a loader of one's own).
    pieces: the UTF-8 bytes that each token stands for; empty for special tokens.
    to_ids: text -> Int[n], without special tokens.
    files: what it can be rebuilt from.
    bos_id, eos_id: what begins and ends a document, None where the vocabulary has no such token.
    pad_id: 0 where the vocabulary has no padding; masks, not this id, say what is padding.
    unk_id: what stands for text that the vocabulary lacks.
    mask_id: what stands in the place of a hidden token (Devlin et al. 2019).
    sentinels: what stands in the places of hidden spans, in their order in a text (Raffel et al. 2020: <extra_id_0>,
      <extra_id_1>, ...).
    names: what special tokens are called, for `show`.
    continuing: tokens that continue a word where their pieces do not show it (WordPiece's "##").
    around: what stands before and behind a single text that a model reads, such as BERT's [CLS] and [SEP]; None is bos
      before it, where there is one.
    around_pair: what stands before, between and behind two texts that a model reads together, and the token type of the
      second; None is bos, eos (or a line's end, where there is none), eos and 1.
    to_text: decodes where text is not the concatenation of the pieces.
    chat_templates: {name: Jinja source}, see `chat.render`.
    token_names: what chat templates call special tokens: {"bos_token": "<s>", ...}; those of ours where it is empty.
    to_special_ids: text -> Int[n], where special tokens by their names become those tokens.
    to_offsets: text -> (Int[n], Int[n, 2]), see `encode_with_offsets`.
  """

  name: str
  pieces: tuple[bytes, ...]
  to_ids: Callable[[str], Any]
  files: Mapping[str, bytes]
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int = 0
  unk_id: int | None = None
  mask_id: int | None = None
  sentinels: tuple[int, ...] = ()
  names: Mapping[int, str] = dataclasses.field(default_factory=dict)
  continuing: frozenset[int] = frozenset()
  around: tuple[tuple[int, ...], tuple[int, ...]] | None = None
  around_pair: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None = None
  to_text: Callable[[list[int]], str] | None = None
  chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  token_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  to_special_ids: Callable[[str], Any] | None = None
  to_offsets: Callable[[str], tuple[Any, Any]] | None = None

  @property
  def vocab_size(self) -> int:
    return len(self.pieces)

  @functools.cached_property
  def special(self) -> np.ndarray:
    """Bool[V]: tokens that stand for no text, such as bos, padding where it is a token of its own, mask, sentinels."""
    roles = {self.bos_id, self.eos_id, self.unk_id, self.mask_id, *self.sentinels, *self.names}
    return np.array([not piece or i in roles for i, piece in enumerate(self.pieces)], bool)

  def encode(self, text: str) -> np.ndarray:
    """Int32[n], without special tokens; what looks like one in the text stays text."""
    return _int32(self.to_ids(text))

  def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(Int32[n], Int32[n, 2]): the ids of `encode`, and the characters [start, stop) of the text that each stands for.

    Tokens that share a character, such as its bytes, all have it. One that stands for none, such as the space that some
    vocabularies put before a text, has the next token's. Some kinds leave out the spaces before a word, others do not.

    Raises:
      ConfigError: the kind of tokenizer cannot tell.
    """
    if self.to_offsets is None:
      raise ConfigError(
        f"a tokenizer of kind {self.name!r} does not say where its tokens stand in a text; give it `to_offsets`, or "
        f"set data.tokenizer.name to one of {', '.join(TOKENIZERS)}"
      )
    ids, offsets = self.to_offsets(text)
    return _int32(ids), _int32(offsets).reshape(-1, 2)

  def document(self, text: str) -> np.ndarray:
    """Int32[n]: the text between bos and eos, where the vocabulary has them."""
    return self.frame(self.encode(text))

  @property
  def single(self) -> tuple[np.ndarray, np.ndarray]:
    """(Int32[before], Int32[behind]): what stands around a single text."""
    bos: tuple[int, ...] = () if self.bos_id is None else (self.bos_id,)
    before, behind = self.around or (bos, ())
    return np.array(before, np.int32), np.array(behind, np.int32)

  def assemble(
    self, first: np.ndarray, second: np.ndarray | None, length: int
  ) -> tuple[np.ndarray, np.ndarray, tuple[int, int | None]]:
    """One text or two, for a model that reads them to say something about them.

    Args:
      first, second: ids as `encode` gives them; the longer of the two loses its end until all fits.
      length: tokens in all, at most.
    Returns:
      ids Int32[n], token types Int32[n], and where the first and the second text begin.
    Raises:
      ConfigError: `length` leaves no room for text.
    """
    bos: tuple[int, ...] = () if self.bos_id is None else (self.bos_id,)
    eos: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)
    kind = 0
    if second is None:
      before, behind = (bos, eos) if self.around is None else self.around
      between: tuple[int, ...] = ()
    else:
      line_end = tuple(self.encode("\n").tolist())
      before, between, behind, kind = self.around_pair or (bos, eos or line_end, eos, 1)
    room = length - len(before) - len(between) - len(behind)
    if room < 1 + (second is not None):
      raise ConfigError(f"seq_len={length} leaves no room for text between special tokens; raise it")
    if second is None:
      first, second = first[:room], first[:0]
      start = None
    else:
      keep = min(len(first), max(room - len(second), room - room // 2))
      first, second = first[:keep], second[: room - keep]
      start = len(before) + len(first) + len(between)
    parts = [np.array(before), first, np.array(between), second, np.array(behind)]
    ids = np.concatenate(parts).astype(np.int32)
    types = (np.arange(len(ids)) >= len(ids) - len(second) - len(behind)) * kind
    return ids, types.astype(np.int32), (len(before), start)

  def prompt(self, text: str) -> np.ndarray:
    """Int32[n]: the beginning of a text, to be continued."""
    return np.concatenate([self.single[0], self.encode(text)])

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    **variables: Any,
  ) -> np.ndarray:
    """Int32[n]: a chat as the model has learned to read it, by its chat template; see `chat.render`.

    Special tokens that the template writes become those tokens. So do those that a message spells out, as in
    Transformers: who passes on messages of strangers must keep the names of special tokens (`names`) out of them.
    """
    text = render_chat(
      self.chat_templates,
      messages,
      template=template,
      add_generation_prompt=add_generation_prompt,
      tools=tools,
      **{**chat.token_names(self), **variables},
    )
    return self._with_named(text, self.names) if self.to_special_ids is None else _int32(self.to_special_ids(text))

  def frame(self, ids: np.ndarray) -> np.ndarray:
    """Int32[n]: ids between bos and eos, where the vocabulary has them."""
    begin, end = ([] if token is None else [token] for token in (self.bos_id, self.eos_id))
    return np.concatenate([np.array(begin, np.int32), ids, np.array(end, np.int32)]).astype(np.int32)

  def unframe(self, ids: np.ndarray) -> np.ndarray:
    """What `frame` was given."""
    start = int(len(ids) > 0 and ids[0] == self.bos_id)
    return ids[start : len(ids) - int(len(ids) > start and ids[-1] == self.eos_id)]

  def word_begins(self, ids: np.ndarray) -> np.ndarray:
    """Bool[n]: whether a token begins a word: a run of letters, digits and underscores, or any other token."""
    if self.continuing:
      return ~np.isin(ids, list(self.continuing))
    first, last = self._word_ends
    return np.append(True, ~(last[ids[:-1]] & first[ids[1:]])) if len(ids) else np.zeros(0, bool)

  @functools.cached_property
  def _word_ends(self) -> tuple[np.ndarray, np.ndarray]:
    """Whether the first and the last byte of each token are of a word; beyond ASCII all are."""

    def of_word(byte: bytes) -> bool:
      return byte.isalnum() or byte == b"_" or byte >= b"\x80"

    return tuple(np.array([of_word(piece[end]) for piece in self.pieces]) for end in (slice(0, 1), slice(-1, None)))  # type: ignore[return-value]

  def decode(self, ids: Iterable[int]) -> str:
    """The text; special tokens, and ids beyond the vocabulary, stand for nothing; broken UTF-8 becomes U+FFFD."""
    known = [i for i in np.asarray(ids, np.int64).reshape(-1).tolist() if 0 <= i < len(self.pieces)]
    if self.to_text is not None:
      return self.to_text(known)
    return b"".join(self.pieces[i] for i in known).decode("utf-8", errors="replace")

  def show(self, ids: Iterable[int]) -> str:
    """The text with special tokens in it by name, such as "Thank you<extra_id_0> me</s>"; for reading only."""
    stream = self.stream(special=True)
    return "".join([*map(stream.push, np.asarray(ids, np.int64).reshape(-1).tolist()), stream.finish()])

  def parse(self, text: str) -> np.ndarray:
    """Int32[n]: the inverse of `show`: sentinels and mask by their names; for prompts, never for data."""
    return self._with_named(text, {i for i in (*self.sentinels, self.mask_id) if i in self.names})  # type: ignore[misc]

  def _with_named(self, text: str, tokens: Iterable[int]) -> np.ndarray:
    """Int32[n]: the text with some special tokens by their names."""
    named = {self.names[i]: i for i in tokens}
    if not named:
      return self.encode(text)
    longest_first = sorted(named, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids = [[named[part]] if part in named else self.encode(part) for part in parts if part]
    return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)

  def byte_lengths(self) -> np.ndarray:
    """Int32[V]: UTF-8 bytes that each token stands for, 0 for special ones.

    Over `encode(text)` they sum to `len(text.encode())`, except where a foreign tokenizer changes the text itself
    (lower case, Unicode normalisation, a space before the first word).
    """
    return np.array([len(piece) for piece in self.pieces], np.int32)

  def pad(self, texts: Sequence[str], side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """Several texts, each with what stands around a single one, as (ids Int32[B L], mask Int32[B L]).

    For a tokenizer from a Hugging Face folder as `AutoTokenizer(texts, padding=True)` gives them; for our own, prompts.
    `side` is where the padding goes: "right" or "left".
    """
    if side not in ("right", "left"):
      raise ConfigError(f"side={side!r} must be 'right' or 'left'")
    before, behind = self.single
    rows = [np.concatenate([before, self.encode(text), behind]) for text in texts]
    length = max(map(len, rows), default=0)
    ids, mask = np.full((len(rows), length), self.pad_id, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
      where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
      ids[i, where], mask[i, where] = row, 1
    return ids, mask

  def stream(self, special: bool = False) -> TextStream:
    """A decoder of tokens that come one by one; with `special`, special tokens come by name as in `show`."""
    if special:
      return _NamingStream(self)
    return _ByteStream(self) if self.to_text is None else _WindowStream(self)

  def spec(self) -> dict[str, Any]:
    return {"name": self.name}

  def to_files(self) -> dict[str, bytes]:
    return dict(self.files)


def _int32(ids: Any) -> np.ndarray:
  return np.asarray(ids, np.int32)


class _ByteStream:
  """Bytes of the tokens through an incremental UTF-8 decoder."""

  def __init__(self, tokenizer: Tokenizer):
    self.pieces = tokenizer.pieces
    self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, token: int) -> str:
    return self.decoder.decode(self.pieces[token] if 0 <= token < len(self.pieces) else b"")

  def finish(self) -> str:
    return self.decoder.decode(b"", final=True)


class _NamingStream:
  """Special tokens by their names between the text of the others."""

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self.text = tokenizer.stream()

  def push(self, token: int) -> str:
    if 0 <= token < self.tokenizer.vocab_size and not self.tokenizer.special[token]:
      return self.text.push(token)
    return self.text.finish() + self.tokenizer.names.get(token, f"<{token}>")

  def finish(self) -> str:
    return self.text.finish()


class _WindowStream:
  """The difference that a token makes to the decoded text of a window that begins a token group earlier."""

  def __init__(self, tokenizer: Tokenizer):
    self.decode = tokenizer.decode
    self.ids: list[int] = []  # the group that was last given out, then those that are held back
    self.shown = 0  # how many of them are given out

  def push(self, token: int) -> str:
    self.ids.append(token)
    return "" if self.decode(self.ids).endswith("\ufffd") else self.finish()

  def finish(self) -> str:
    old, new = self.decode(self.ids[: self.shown]), self.decode(self.ids)
    if len(new) <= len(old):  # nothing to see yet; the window keeps what it needs to see the next token rightly
      return ""
    self.ids, self.shown = self.ids[self.shown :], len(self.ids) - self.shown
    return new[len(old) :]


def make_tokenizer(spec: Mapping[str, Any], source: Source | None = None, cache: Path | None = None) -> Tokenizer:
  """The tokenizer of `data.tokenizer`.

  Args:
    spec: {"name": key of TOKENIZERS, ...}; whatever the kind, also "mask" (False) and "sentinels" (0), see `extend`.
    source: training text, for the kinds that learn from it.
    cache: where trained vocabularies are kept, by content of the text and settings; None is the user's cache.
  Raises:
    ConfigError: a setting that cannot work; `source` is missing; fewer sentinels in a vocabulary than asked for.
  """
  spec = dict(spec)
  mask, sentinels = spec.pop("mask", False), spec.pop("sentinels", 0)
  if not isinstance(mask, bool):
    raise ConfigError(f"data.tokenizer.mask={mask!r} must be True or False")
  if isinstance(sentinels, bool) or not isinstance(sentinels, int) or sentinels < 0:
    raise ConfigError(f"data.tokenizer.sentinels={sentinels!r} must be a number of tokens, 0 or more")
  cache = cache or cache_dir() / "tokenizers"
  own = build(spec, TOKENIZERS, "data.tokenizer", source=source, cache=cache, extra=mask + sentinels)
  return extend_vocabulary(own, mask, sentinels)


def from_files(spec: Mapping[str, Any], files: Mapping[str, bytes], *, trust: bool = False) -> Tokenizer:
  """The tokenizer that gave `spec()` and `to_files()`; one from outside llmjax needs `trust`."""
  own = {name: content for name, content in files.items() if name != EXTRA_FILE}
  tokenizer = resolve_callable(spec["name"], LOADERS, "tokenizer", trust=trust)(own)
  extra = json.loads(files.get(EXTRA_FILE, b"{}"))
  return extend_vocabulary(tokenizer, extra.get("mask", False), extra.get("sentinels", 0))


def extend_vocabulary(tokenizer: Tokenizer, mask: bool = False, sentinels: int = 0) -> Tokenizer:
  """The tokenizer with a mask token and sentinels; those that the vocabulary has are taken as they are.

  New tokens follow the vocabulary, first the mask. In a vocabulary of V with them, sentinel k is V - 1 - k, as in T5:
  100 beside the 32,000 pieces of its model make <extra_id_0> 32099. No text gives any of them, and they decode to none.
  """
  if 0 < len(tokenizer.sentinels) < sentinels:
    raise ConfigError(
      f"data.tokenizer.sentinels={sentinels}: the vocabulary has {len(tokenizer.sentinels)} of its own; set it to "
      "at most those, or take another tokenizer"
    )
  mask = mask and tokenizer.mask_id is None
  sentinels = 0 if tokenizer.sentinels else sentinels
  if not mask and not sentinels:
    return tokenizer
  old, new = tokenizer.vocab_size, tokenizer.vocab_size + mask + sentinels
  ids = tuple(new - 1 - k for k in range(sentinels))
  names = {old: MASK} if mask else {}
  to_text = tokenizer.to_text
  return dataclasses.replace(
    tokenizer,
    pieces=tokenizer.pieces + (b"",) * (new - old),
    files={**tokenizer.files, EXTRA_FILE: json.dumps({"mask": mask, "sentinels": sentinels}).encode()},
    mask_id=old if mask else tokenizer.mask_id,
    sentinels=ids or tokenizer.sentinels,
    names={**tokenizer.names, **names, **{token: SENTINEL.format(k) for k, token in enumerate(ids)}},
    to_text=None if to_text is None else lambda tokens: to_text([token for token in tokens if token < old]),
  )


def sample_text_lines(source: Source, max_bytes: int = TRAINING_BYTES) -> Iterator[str]:
  """Texts of evenly spaced records, about `max_bytes` together; all of them where the source is not larger."""
  return map(text_of, subsample_bytes(source, max_bytes))


def training_text(source: Source | None, kind: str) -> Source:
  if source is None:
    raise ConfigError(
      f"data.tokenizer.name={kind!r} learns from the training text, and there is none here; give a path"
    )
  return source
