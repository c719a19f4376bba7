"""Instruction tuning: a decoder is trained on what the assistant writes in chats (Wei et al. 2022; Ouyang et al. 2022).

Chats are tokenized by `Tokenizer.chat`, so that answers follow exactly the tokens of an inference prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.data.tokenizers import chat
from llmjax.data.tokenizers.chat import Message
from llmjax.examples import Example, Record, TextTokenizer, TokenSequence
from llmjax.metrics.texts import summary_metrics
from llmjax.objectives.losses import TokenLoss
from llmjax.objectives.seq2seq import decode_until_end, next_token_example
from llmjax.objectives.task import Result, Task, require_text
from llmjax.types import Batch, Forward, Metrics, Sums

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")

Messages: TypeAlias = Sequence[Message]


@dataclasses.dataclass(frozen=True, eq=False)
class InstructionTuning(Task):
  """Negative log-likelihood of the assistant's messages, with what the template writes after each to end the turn.

  Messages after the assistant's last one are dropped. An assistant's message without a message before it has no loss.
  Chats that are too long lose their first turns after the system's message, as many as necessary. If the last turn is
  too long by itself, its end is dropped. Chats that then have no answer left are skipped.

  Attributes:
    tokenizer: tokenizer of the run.
    seq_len: input tokens of a row.
    messages: field of the chat, [{"role": ..., "content": ...}, ...].
    prompt: field of the user's text, for records of one turn; together with `response`, instead of `messages`.
    response: field of the assistant's text.
    system: system message for chats without one.
    template: name of one of the tokenizer's chat templates, or a Jinja source; None: the tokenizer's default, or
      `chat.DEFAULT_TEMPLATE` if it has none.
    last_only: train on the last answer of a chat only.
    response_len: tokens reserved for the answer in prediction; None: a quarter of `seq_len`.
  """

  tokenizer: TextTokenizer
  seq_len: int
  messages: str = "messages"
  prompt: str | None = None
  response: str | None = None
  system: str | None = None
  template: str | None = None
  last_only: bool = False
  response_len: int | None = None

  packing = "whole"
  stacks = ("decoder",)
  generates = True

  def __post_init__(self) -> None:
    if (self.prompt is None) != (self.response is None):
      raise ConfigError(
        f"objective.prompt, objective.response: must be set together, got {self.prompt!r} and {self.response!r}. Set "
        "both, or neither to read objective.messages"
      )
    if not 1 <= self.max_new_tokens < self.seq_len:
      raise ConfigError(
        f"objective.response_len: must be at least 1 and less than seq_len={self.seq_len}, got {self.max_new_tokens}"
      )
    _ = self.template_source  # checks the template

  @property
  def template_source(self) -> str:
    """The Jinja source of the chat template."""
    return chat.template_or_default(self.tokenizer.chat_templates, self.template)

  @property
  def max_new_tokens(self) -> int:
    return self.seq_len // 4 if self.response_len is None else self.response_len

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """Eos, and the token with which the template ends an answer."""
    return answer_end_ids(self.tokenizer, self.template_source)

  @property
  def required_model_config(self) -> dict[str, Json]:
    return {"bidirectional_prompt": False}

  @property
  def token_loss(self) -> TokenLoss:
    """The loss of the answers' tokens."""
    return TokenLoss("nll")

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients

  @property
  def input_fields(self) -> tuple[str, ...]:
    return (self.messages,) if self.prompt is None else (self.prompt,)

  @property
  def label_fields(self) -> tuple[str, ...]:
    return () if self.response is None else (self.response,)

  @property
  def metric_packages(self) -> tuple[str, ...]:
    return ("rouge_score", "regex")

  # Host.

  @property
  def skip_reason(self) -> str:
    return (
      f"they are too long: no answer begins within the seq_len={self.seq_len} tokens of a row. Increase "
      "--config.seq_len, or shorten the messages before the answers"
    )

  def check_record(self, record: Record, *, labelled: bool) -> None:
    super().check_record(record, labelled=labelled)
    if self.prompt is not None and self.response is not None:
      require_text(record, self.prompt)
      if labelled:
        require_text(record, self.response)
      return
    check_chat_messages(record[self.messages], self.messages)
    if labelled and last_answer_index(record[self.messages]) is None:
      raise ConfigError(f"{self.messages!r}: must have an assistant's message after another message, got no answer")

  def read_messages(self, record: Record, *, labelled: bool) -> list[Message]:
    """Return the chat up to its last answer; without labels, up to the message to be answered."""
    messages: list[Message]
    if self.prompt is not None and self.response is not None:
      messages = [{"role": "user", "content": record[self.prompt]}]
      if labelled:
        messages.append({"role": "assistant", "content": record[self.response]})
    else:
      messages = list(record[self.messages])
      last = last_answer_index(messages)
      if labelled and last is not None:
        messages = messages[: last + 1]
      elif last == len(messages) - 1:
        messages.pop()
    if self.system is not None and messages[0]["role"] not in SYSTEM_ROLES:
      messages.insert(0, {"role": "system", "content": self.system})
    return messages

  def encode_record(self, record: Record, *, labelled: bool) -> list[Example]:
    messages = self.read_messages(record, labelled=labelled)
    if not labelled:
      room = self.seq_len - self.max_new_tokens
      _, ids = self.drop_turns(messages, room, add_generation_prompt=True)
      return [Example(TokenSequence(truncate_left(ids, room, self.tokenizer.bos_id)))]
    retained, _ = self.drop_turns(messages, self.seq_len + 1)
    ids, spans = encode_chat(self.tokenizer, retained, self.template_source, self.last_only)
    has_loss = np.zeros(len(ids), bool)
    for start, stop in spans:
      has_loss[start:stop] = True
    ids, has_loss = ids[: self.seq_len + 1], has_loss[: self.seq_len + 1]
    return [next_token_example(ids, has_loss)] if has_loss[1:].any() else []

  def drop_turns(
    self, messages: Messages, room: int, add_generation_prompt: bool = False
  ) -> tuple[Messages, np.ndarray]:
    """Drop first turns until a chat has at most `room` tokens or one turn; return it and its tokens Int32[n]."""
    for retained in drop_first_turns(messages):
      ids = self.tokenizer.chat(retained, template=self.template_source, add_generation_prompt=add_generation_prompt)
      if len(ids) <= room:
        break
    return retained, ids

  # Device.

  def weights(self, batch: Batch) -> Sums:
    return self.token_loss.weights(batch)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    return self.token_loss(forward, forward(batch, rngs=rngs), batch)

  # Host.

  def make_result(
    self, record: Record, examples: Sequence[Example], decoded: Sequence[Mapping[str, np.ndarray]]
  ) -> Result:
    """Return the answer in the field `response`, or in "response"."""
    return {self.response or "response": decode_until_end(self.tokenizer, decoded[0]["tokens"], self.end_ids)}

  def compute_metrics(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    """Return ROUGE and the share of exact matches, without surrounding spaces.

    Chats whose last message is not the assistant's have no answer to compare with, and are ignored.
    """
    truths, answers = [], []
    for record, result in zip(records, results, strict=True):
      truth = self._true_answer(record)
      if truth is not None:
        truths.append(truth.strip())
        answers.append(result[self.response or "response"].strip())
    exact = sum(map(str.__eq__, truths, answers)) / max(len(truths), 1)
    return {**summary_metrics(truths, answers), "exact_match": exact}

  def _true_answer(self, record: Record) -> str | None:
    answer: str | None = None
    if self.response is not None:
      answer = record[self.response]
    elif record[self.messages][-1]["role"] == "assistant":
      answer = record[self.messages][-1].get("content")
    return answer


def check_chat_messages(messages: Json, field: str) -> None:
  """Raise ConfigError if the value of a field is not a chat that a template can read."""
  if not isinstance(messages, (list, tuple)) or not messages:
    raise ConfigError(f"{field!r}: must be a list of messages, {{'role': ..., 'content': ...}} each, got {messages!r}")
  for number, message in enumerate(messages):
    where = f"{field!r}, message {number} (from 0)"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
      raise ConfigError(f"{where}: must be {{'role': ..., 'content': ...}}, got {message!r}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
      raise ConfigError(f"{where}: the role {role!r} is unknown; {suggest_name(role, ROLES)}")
    if content is None and message.get("tool_calls"):
      continue
    if not isinstance(content, str):
      raise ConfigError(f"{where}: 'content' must be text, got {content!r}")
    if role == "assistant" and not content.strip():
      raise ConfigError(f"{where}: the assistant's 'content' is empty. Fill it, or remove the message")


def last_answer_index(messages: Messages) -> int | None:
  """Return the index of the assistant's last message that has a message before it, None if there is none."""
  return max((i for i, message in enumerate(messages) if i and message["role"] == "assistant"), default=None)


def drop_first_turns(messages: Messages) -> Iterator[Messages]:
  """Yield a chat, then the chat without its first turn, without its first two turns, ...; system messages remain."""
  num_system = len(list(itertools.takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages)))
  yield messages
  for i, message in enumerate(messages):
    if i > num_system and message["role"] == "user":
      yield [*messages[:num_system], *messages[i:]]


def truncate_left(ids: np.ndarray, room: int, bos_id: int | None) -> np.ndarray:
  """Return the last `room` tokens of ids Int[n]; a bos remains in front, because models depend on it."""
  if len(ids) <= room or room < 1:
    return ids[: max(room, 0)]
  bos = ids[: int(room > 1 and ids[0] == bos_id)]
  return np.concatenate([bos, ids[len(ids) - room + len(bos) :]])


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
  """Return the number of equal tokens at the beginning of two texts Int[n], Int[m]."""
  shorter = min(len(a), len(b))
  return int(np.argmin(np.append(a[:shorter] == b[:shorter], False)))


def encode_chat(
  tokenizer: TextTokenizer, messages: Messages, template: str, last_only: bool = False
) -> tuple[np.ndarray, list[tuple[int, int]]]:
  """Tokenize a chat and locate the assistant's answers.

  An answer is what the template writes for a message after the generation prompt. A token that contains both the end of
  the prompt and the beginning of an answer belongs to the answer; one that contains the end of an answer and what
  follows does not.

  Args:
    tokenizer: tokenizer of the run.
    messages: the chat.
    template: a Jinja source.
    last_only: locate the last answer only.

  Returns:
    The tokens Int32[n], and [start, stop) of each answer that has a message before it.

  Raises:
    ConfigError: the template does not write an answer after its generation prompt, or writes it differently if further
      messages follow.
  """
  names: dict[str, Json] = dict(tokenizer.special_token_names())

  def encode(count: int, prompt: bool) -> tuple[str, np.ndarray]:
    """Return the text and the tokens of the first messages, with or without a generation prompt."""
    first = messages[:count]
    text = chat.render_chat(tokenizer.chat_templates, first, template=template, add_generation_prompt=prompt, **names)
    return text, tokenizer.chat(first, template=template, add_generation_prompt=prompt)

  whole, ids = encode(len(messages), False)
  answers = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
  spans = []
  for i in answers[-1:] if last_only else answers:
    (before, prompt), (through, answered) = encode(i, True), encode(i + 1, False)
    if not through.startswith(before):
      raise ConfigError(
        f"objective.template: the chat template does not write message {i} (from 0) after its generation prompt, so "
        "training would differ from inference. Choose another template"
      )
    if not whole.startswith(through):
      raise ConfigError(
        f"objective.template: the chat template writes message {i} (from 0) differently if others follow. Set "
        "objective.last_only=True, or choose another template"
      )
    spans.append((common_prefix_length(prompt, ids), common_prefix_length(answered, ids)))
  return ids, spans


def answer_end_ids(tokenizer: TextTokenizer, template: str) -> tuple[int, ...]:
  """Return eos, and the first special token that a template writes after any answer."""
  one, other = (
    tokenizer.chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], template=template)
    for text in ("a", "b")
  )
  after = one[len(one) - common_prefix_length(one[::-1], other[::-1]) :]
  template_end = after[tokenizer.special[after]][:1].tolist()
  eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  return tuple(dict.fromkeys([*eos, *template_end]))
