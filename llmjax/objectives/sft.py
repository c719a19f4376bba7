"""Instruction tuning: a decoder learns what the assistant says in chats (Wei et al. 2022; Ouyang et al. 2022).

Chats are read as `Tokenizer.chat` gives them, so that what is learned stands behind the very tokens that a prompt has.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, suggest_name
from llmjax.data.tokenizers import chat
from llmjax.metrics.texts import summary_metrics
from llmjax.objectives.losses import TokenLoss
from llmjax.objectives.seq2seq import next_tokens, written
from llmjax.objectives.task import Record, Result, Task, text_field
from llmjax.types import Batch, Features, Forward, Metrics, Sums

SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")

Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class InstructionTuning(Task):
  """Negative log-likelihood of the assistant's messages, each with what the template writes behind it to end the turn.

  What follows the assistant's last message is left out, and one that nothing stands before bears no loss. A chat that
  is too long loses its first turns behind the system's message, as many as it must; if the last is too long by itself
  it loses its end. A chat of whose answers nothing is left then is left out.

  Attributes:
    messages: the field of a chat, [{"role": ..., "content": ...}, ...].
    prompt, response: two fields of text instead, what the user says and what the assistant answers.
    system: the system's message for all chats that have none.
    template: the name of one of the tokenizer's chat templates, or a Jinja source; None is the tokenizer's own, and
      `chat.DEFAULT_TEMPLATE` where it has none.
    last_only: of a chat's answers the last alone is learned.
    response_len: tokens that are kept for an answer when it is predicted; None is a quarter of `seq_len`.
  """

  tokenizer: Any
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
        f"objective.prompt={self.prompt!r} and objective.response={self.response!r} are a pair of fields; name both, "
        "or neither, to read objective.messages"
      )
    if not 1 <= self.max_new_tokens < self.seq_len:
      raise ConfigError(
        f"objective.response_len={self.max_new_tokens} must be from 1 to less than seq_len={self.seq_len}"
      )
    _ = self.source  # checks

  @property
  def source(self) -> str:
    """The Jinja source of the template."""
    return chat.template_or_default(self.tokenizer.chat_templates, self.template)

  @property
  def max_new_tokens(self) -> int:
    """Tokens of an answer at most."""
    return self.seq_len // 4 if self.response_len is None else self.response_len

  @functools.cached_property
  def ends(self) -> tuple[int, ...]:
    """The tokens behind which an answer is complete: eos, and what the template ends an answer with."""
    return end_tokens(self.tokenizer, self.source)

  @property
  def required_model_config(self) -> dict[str, Any]:
    return {"bidirectional_prompt": False}

  @property
  def token_loss(self) -> TokenLoss:
    return TokenLoss("nll")

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients

  @property
  def inputs(self) -> tuple[str, ...]:
    return (self.messages,) if self.prompt is None else (self.prompt,)

  @property
  def answers(self) -> tuple[str, ...]:
    return () if self.response is None else (self.response,)

  @property
  def libraries(self) -> tuple[str, ...]:
    return ("rouge_score", "regex")

  # host

  @property
  def skip_reason(self) -> str:
    return (
      f"they are too long, as no answer begins within the seq_len={self.seq_len} tokens of a row; raise "
      "--config.seq_len, or shorten what stands before the answers"
    )

  def check(self, record: Record, *, labelled: bool) -> None:
    super().check(record, labelled=labelled)
    if self.prompt is not None and self.response is not None:
      text_field(record, self.prompt)
      if labelled:
        text_field(record, self.response)
      return
    check_messages(record[self.messages], self.messages)
    if labelled and last_answer(record[self.messages]) is None:
      raise ConfigError(f"{self.messages!r}: the assistant says nothing behind another message; there is no answer")

  def messages_of(self, record: Record, *, labelled: bool) -> list[Mapping[str, Any]]:
    """The chat up to its last answer, or, without labels, up to where an answer is wanted."""
    if self.prompt is not None and self.response is not None:
      messages: list[Mapping[str, Any]] = [{"role": "user", "content": record[self.prompt]}]
      messages += [{"role": "assistant", "content": record[self.response]}] if labelled else []
    else:
      messages = list(record[self.messages])
      last = last_answer(messages)
      if labelled and last is not None:
        messages = messages[: last + 1]
      elif last == len(messages) - 1:
        messages.pop()
    if self.system is not None and messages[0]["role"] not in SYSTEM:
      messages.insert(0, {"role": "system", "content": self.system})
    return messages

  def encode(self, record: Record, *, labelled: bool) -> list[Features]:
    messages = self.messages_of(record, labelled=labelled)
    if not labelled:
      room = self.seq_len - self.max_new_tokens
      _, ids = self.shorten(messages, room, add_generation_prompt=True)
      return [{"inputs": {"ids": cut_left(ids, room, self.tokenizer.bos_id)}}]
    kept, _ = self.shorten(messages, self.seq_len + 1)
    ids, spans = read_chat(self.tokenizer, kept, self.source, self.last_only)
    learned = np.zeros(len(ids), bool)
    for start, stop in spans:
      learned[start:stop] = True
    ids, learned = ids[: self.seq_len + 1], learned[: self.seq_len + 1]
    return [next_tokens(ids, learned)] if learned[1:].any() else []

  def shorten(self, messages: Messages, room: int, **settings: Any) -> tuple[Messages, np.ndarray]:
    """A chat without the turns that it must lose, and its ids, which may be too many still."""
    for kept in later_turns(messages):
      ids = self.tokenizer.chat(kept, template=self.source, **settings)
      if len(ids) <= room:
        break
    return kept, ids

  # device

  def weights(self, batch: Batch) -> Sums:
    return self.token_loss.weights(batch)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    return self.token_loss(forward, forward(batch, rngs=rngs), batch)

  # host

  def result(self, record: Record, features: Sequence[Features], decoded: Sequence[Mapping[str, np.ndarray]]) -> Result:
    """The answer in the field `response`, or in "response"."""
    return {self.response or "response": written(self.tokenizer, decoded[0]["tokens"], self.ends)}

  def measure(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    """ROUGE, and the share of answers that are the assistant's own but for spaces around; chats that end with another's
    message have no answer to compare with."""
    truths, answers = [], []
    for record, result in zip(records, results, strict=True):
      truth = self._truth(record)
      if truth is not None:
        truths.append(truth.strip())
        answers.append(result[self.response or "response"].strip())
    exact = sum(map(str.__eq__, truths, answers)) / max(len(truths), 1)
    return {**summary_metrics(truths, answers), "exact_match": exact}

  def _truth(self, record: Record) -> str | None:
    if self.response is not None:
      return record[self.response]
    last = record[self.messages][-1]
    return last.get("content") if last["role"] == "assistant" else None


def check_messages(messages: Any, field: str) -> None:
  """Raises ConfigError where a field is no chat that a template could read."""
  if not isinstance(messages, (list, tuple)) or not messages:
    raise ConfigError(f"{field!r} is {messages!r}; it must be a list of messages, {{'role': ..., 'content': ...}} each")
  for number, message in enumerate(messages):
    where = f"{field!r}, message {number} (from 0)"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
      raise ConfigError(f"{where} must be {{'role': ..., 'content': ...}}, not {message!r}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
      raise ConfigError(f"{where}: the role {role!r} is unknown; {suggest_name(role, ROLES)}")
    if content is None and message.get("tool_calls"):
      continue
    if not isinstance(content, str):
      raise ConfigError(f"{where}: 'content' is {content!r}, which is no text")
    if role == "assistant" and not content.strip():
      raise ConfigError(f"{where}: the assistant's 'content' is empty; fill it, or take the message out")


def last_answer(messages: Messages) -> int | None:
  """The place of the assistant's last message, if another message stands before it."""
  return max((i for i, message in enumerate(messages) if i and message["role"] == "assistant"), default=None)


def later_turns(messages: Messages) -> Iterator[Messages]:
  """The chat, then what is left without its first turn, without its first two, ...; the system's message stays."""
  head = len(list(itertools.takewhile(lambda message: message["role"] in SYSTEM, messages)))
  yield messages
  for i, message in enumerate(messages):
    if i > head and message["role"] == "user":
      yield [*messages[:head], *messages[i:]]


def cut_left(ids: np.ndarray, room: int, bos_id: int | None) -> np.ndarray:
  """The last `room` tokens; bos stays in front, as models lean on it."""
  if len(ids) <= room or room < 1:
    return ids[: max(room, 0)]
  first = ids[: int(room > 1 and ids[0] == bos_id)]
  return np.concatenate([first, ids[len(ids) - room + len(first) :]])


def common_length(a: np.ndarray, b: np.ndarray) -> int:
  """How many tokens two texts begin with together."""
  shorter = min(len(a), len(b))
  return int(np.argmin(np.append(a[:shorter] == b[:shorter], False)))


def read_chat(
  tokenizer: Any, messages: Messages, template: str, last_only: bool = False
) -> tuple[np.ndarray, list[tuple[int, int]]]:
  """A chat, and where in it the assistant's answers are.

  An answer is what the template writes for the message behind the generation prompt. Where a vocabulary has a token
  across its beginning, that token is the answer's; one across its end is not.

  Args:
    last_only: of the last answer alone.
  Returns:
    Int32[n] of `Tokenizer.chat`, and [start, stop) of each answer that has a message before it.
  Raises:
    ConfigError: the template writes an answer otherwise than behind its generation prompt, or otherwise again when
      more messages follow.
  """
  names: dict[str, Any] = tokenizer.special_token_names()

  def read(count: int, prompt: bool) -> tuple[str, np.ndarray]:
    settings: dict[str, Any] = {"template": template, "add_generation_prompt": prompt}
    text = chat.render_chat(tokenizer.chat_templates, messages[:count], **names, **settings)
    return text, tokenizer.chat(messages[:count], **settings)

  whole, ids = read(len(messages), False)
  answers = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
  spans = []
  for i in answers[-1:] if last_only else answers:
    (before, prompt), (through, answered) = read(i, True), read(i + 1, False)
    if not through.startswith(before):
      raise ConfigError(
        f"the chat template does not write message {i} (from 0) behind its generation prompt, so that no answer could "
        "be learned as it will be asked for; give another as objective.template"
      )
    if not whole.startswith(through):
      raise ConfigError(
        f"the chat template writes message {i} (from 0) otherwise when others follow it; set objective.last_only=True, "
        "or give another as objective.template"
      )
    spans.append((common_length(prompt, ids), common_length(answered, ids)))
  return ids, spans


def end_tokens(tokenizer: Any, template: str) -> tuple[int, ...]:
  """Eos, and the first special token that a template writes behind whatever the assistant says."""
  one, other = (
    tokenizer.chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}], template=template)
    for said in ("a", "b")
  )
  behind = one[len(one) - common_length(one[::-1], other[::-1]) :]
  found = behind[tokenizer.special[behind]][:1].tolist()
  return tuple(dict.fromkeys([*([] if tokenizer.eos_id is None else [tokenizer.eos_id]), *found]))
