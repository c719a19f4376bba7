"""Direct preference optimisation: the preferred of two answers becomes more likely than the other.

Likelihoods are relative to those of a frozen reference model, and no reward model is needed (Rafailov et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.data.tokenizers import chat
from llmjax.examples import Example, Record, RecordSource, RowLengths, TextTokenizer, Window
from llmjax.objectives.contrastive import interleave_views
from llmjax.objectives.losses import cross_entropy
from llmjax.objectives.seq2seq import next_token_example
from llmjax.objectives.sft import Messages, check_chat_messages, common_prefix_length, encode_chat, truncate_left
from llmjax.objectives.task import require_text
from llmjax.types import Batch, Forward, Metrics, Objective, Sums

VARIANTS = ("sigmoid", "ipo", "hinge")
VIEWS = ("chosen", "rejected")


class EncodedPair(NamedTuple):
  """Tokens of a prompt and its two answers, Int32[n] each."""

  prompt: np.ndarray
  chosen: np.ndarray
  rejected: np.ndarray


def preference_loss(
  advantage: Float[Array, " B"], variant: str, beta: float, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
  """Loss of pairs.

  With the advantage h:
  - "sigmoid": -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (Rafailov et al. 2023, eq. 7; with e > 0
    conservative DPO, Mitchell 2023).
  - "ipo": (h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17).
  - "hinge": max(0, 1 - beta h) (Zhao et al. 2023, SLiC-HF, with the reference as in Liu et al. 2023, RSO).

  Args:
    advantage: log(p(chosen) / p_ref(chosen)) - log(p(rejected) / p_ref(rejected)), of whole answers.
    variant: see above.
    beta: strength of the pull towards the reference.
    label_smoothing: e, the assumed share of pairs with swapped answers; for "sigmoid" only.
  """
  if variant == "ipo":
    return jnp.square(advantage - 1 / (2 * beta))
  if variant == "hinge":
    return jax.nn.relu(1 - beta * advantage)
  right, wrong = jax.nn.log_sigmoid(beta * advantage), jax.nn.log_sigmoid(-beta * advantage)
  return -(1 - label_smoothing) * right - label_smoothing * wrong


@dataclasses.dataclass(frozen=True, eq=False)
class Preference(Objective):
  """The `preference_loss` of pairs, optionally with the negative log-likelihood of the chosen answers.

  Records have one of these forms:
  - three texts: a prompt, and two answers that continue it and end with eos. With `template` they are messages of the
    user and the assistant instead.
  - the answers are lists of messages. Together with the prompt (a list of messages, the user's text, or no such field)
    they are chats that differ in their last message, the assistant's. Both may repeat the prompt.

  Both answers follow the same prompt. If a pair is too long, the prompt loses its beginning; if half a row is left for
  the prompt at most, the answers lose their ends.

  Attributes:
    tokenizer: tokenizer of the run.
    seq_len: input tokens of a row.
    prompt: field of the prompt.
    chosen: field of the preferred answer.
    rejected: field of the other answer.
    template: see `InstructionTuning`; None: texts are not chats.
    beta: see `preference_loss`.
    variant: see `preference_loss`.
    label_smoothing: see `preference_loss`.
    sft_weight: coefficient of the chosen answers' negative log-likelihood, a mean over tokens (Dubey et al. 2024,
      Llama 3, section 4.1.4).
  """

  tokenizer: TextTokenizer
  seq_len: int
  prompt: str = "prompt"
  chosen: str = "chosen"
  rejected: str = "rejected"
  template: str | None = None
  beta: float = 0.1
  variant: str = "sigmoid"
  label_smoothing: float = 0.0
  sft_weight: float = 0.0

  packing = "never"
  stacks = ("decoder",)
  auxiliary = ("reference",)

  def __post_init__(self) -> None:
    if self.variant not in VARIANTS:
      raise ConfigError(
        f"objective.variant: is not a known value, got {self.variant!r}; {suggest_name(self.variant, VARIANTS)}"
      )
    if not self.beta > 0:
      raise ConfigError(f"objective.beta: must be positive, got {self.beta}")
    if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.variant != "sigmoid"):
      raise ConfigError(
        "objective.label_smoothing: must be in [0, 0.5), and 0 unless objective.variant='sigmoid', got "
        f"{self.label_smoothing}"
      )
    if self.sft_weight < 0:
      raise ConfigError(f"objective.sft_weight: must not be negative, got {self.sft_weight}")
    if self.seq_len < 2:
      raise ConfigError(f"seq_len: leaves no room for a prompt and an answer, got {self.seq_len}. Increase it")
    if self.template is not None:
      _ = self.template_source  # checks the template

  @property
  def template_source(self) -> str:
    """The Jinja source of the chat template."""
    return chat.template_or_default(self.tokenizer.chat_templates, self.template)

  @property
  def required_model_config(self) -> dict[str, Json]:
    return {"bidirectional_prompt": False}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"preference": 1.0, "sft": self.sft_weight} if self.sft_weight else {"preference": 1.0}

  # Host.

  def row_lengths(self, seq_len: int) -> RowLengths:
    return RowLengths(extras={view: RowLengths(seq_len) for view in VIEWS})

  @property
  def fields(self) -> tuple[str, ...]:
    return (self.prompt, self.chosen, self.rejected)

  def check_record(self, record: Record) -> None:
    """Raise ConfigError for a record that is not a pair of answers to one prompt."""
    answers = (self.chosen, self.rejected)
    for field in answers:
      if field not in record:
        raise ConfigError(f"there is no field {field!r}, which the objective reads; {suggest_name(field, record)}")
    if all(isinstance(record[field], str) for field in answers):
      if self.prompt not in record:
        raise ConfigError(
          f"there is no field {self.prompt!r}, which the answers continue; {suggest_name(self.prompt, record)}"
        )
      for field in (self.prompt, *answers):
        require_text(record, field)
      return
    for field in answers:
      check_chat_messages(record[field], field)
    if isinstance(record.get(self.prompt), (list, tuple)):
      check_chat_messages(record[self.prompt], self.prompt)
    self._check_chats(*self.read_chats(record))

  def _check_chats(self, chosen: Messages, rejected: Messages) -> None:
    """Raise ConfigError unless two chats differ in their last message only, the assistant's."""
    for field, messages in ((self.chosen, chosen), (self.rejected, rejected)):
      if messages[-1]["role"] != "assistant":
        raise ConfigError(f"{field!r}: the last message must be the assistant's, got the {messages[-1]['role']}'s")
      if len(messages) < 2:
        raise ConfigError(
          f"{field!r}: must have a message before the assistant's, got that one alone. Set objective.prompt to the "
          f"field of the message that it answers; the records have no {self.prompt!r}"
        )
    if list(chosen[:-1]) != list(rejected[:-1]):
      raise ConfigError(f"{self.chosen!r}, {self.rejected!r}: must answer the same messages, got different ones")

  def read_chats(self, record: Record) -> tuple[Messages, Messages]:
    """Return the chats that end with the chosen and with the rejected answer."""
    value = record.get(self.prompt)
    prompt = [{"role": "user", "content": value}] if isinstance(value, str) else list(value or ())

    def read_chat(answer: Json) -> Messages:
      if isinstance(answer, str):
        return [*prompt, {"role": "assistant", "content": answer}]
      return list(answer) if len(answer) > 1 else [*prompt, *answer]

    return read_chat(record[self.chosen]), read_chat(record[self.rejected])

  def split_record(self, record: Record, tokenizer: TextTokenizer, seq_len: int, whole: bool) -> Iterator[Window]:
    self.check_record(record)
    yield Window(record, np.zeros(0, np.int32), self.encode_record(record))

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    return window.example

  def encode_record(self, record: Record) -> Example:
    """Return the example of a pair, with a view for the prompt and each answer."""
    prompt, *answers = self.encode_pair(record)
    room = self.seq_len + 1  # a row has all tokens but the last as inputs
    longest = max(map(len, answers))
    prompt = truncate_left(prompt, max(room - longest, room // 2), self.tokenizer.bos_id)
    views = {}
    for view, answer in zip(VIEWS, answers, strict=True):
      ids = np.concatenate([prompt, answer[: room - len(prompt)]])
      views[view] = next_token_example(ids, np.arange(len(ids)) >= len(prompt))
    return Example(None, row_weights={"preference": np.ones((), np.float32)}, extras=views)

  def encode_pair(self, record: Record) -> EncodedPair:
    """Tokenize a record, without truncation."""
    if isinstance(record[self.chosen], str) and self.template is None:
      eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
      chosen, rejected = (
        np.append(self.tokenizer.encode(record[field]), eos).astype(np.int32) for field in (self.chosen, self.rejected)
      )
      return EncodedPair(self.tokenizer.prompt(record[self.prompt]), chosen, rejected)
    (chosen, chosen_spans), (rejected, rejected_spans) = (
      encode_chat(self.tokenizer, messages, self.template_source, last_only=True)
      for messages in self.read_chats(record)
    )
    # If a token contains the end of the prompt and the beginning of one answer, the other answer begins there too.
    start = min(chosen_spans[0][0], rejected_spans[0][0], common_prefix_length(chosen, rejected))
    return EncodedPair(chosen[:start], chosen[start:], rejected[start:])

  # Device.

  def weights(self, batch: Batch) -> Sums:
    weights = {"preference": jnp.sum(batch.weights["preference"])}
    return weights | ({"sft": jnp.sum(batch.extras["chosen"].weights["nll"])} if self.sft_weight else {})

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    chosen, rejected = answer_log_probs(forward, batch, rngs)
    reference = jax.lax.stop_gradient(answer_log_probs(forward.auxiliary["reference"], batch, {}))
    rewards = self.beta * (chosen - reference[0]), self.beta * (rejected - reference[1])
    margin = rewards[0] - rewards[1]
    weight = batch.weights["preference"]
    count = jnp.sum(weight)
    losses = preference_loss(margin / self.beta, self.variant, self.beta, self.label_smoothing)
    sums = {"preference": jnp.sum(losses * weight)}
    values = {
      "loss": losses,
      "accuracy": (margin > 0).astype(jnp.float32),
      "margin": margin,
      "chosen_reward": rewards[0],
      "rejected_reward": rewards[1],
    }
    metrics = {name: (jnp.sum(value * weight), count) for name, value in values.items()}
    if self.sft_weight:
      sums["sft"] = -jnp.sum(chosen)
      metrics["sft_loss"] = (sums["sft"], jnp.sum(batch.extras["chosen"].weights["nll"]))
    return sums, metrics


def answer_log_probs(forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> Float[Array, "2 B"]:
  """Return the log-probabilities of the chosen and the rejected answers in float32, by one pass over both.

  Each row of each view has its own dropout.
  """
  views = [batch.extras[view] for view in VIEWS]
  together: Batch = jax.tree.map(interleave_views, *views)
  rows = interleave_views(*(view.rows * len(views) + i for i, view in enumerate(views)))
  together = dataclasses.replace(together, rows=rows)
  _, nll, _ = forward.per_token(cross_entropy, forward(together, rngs=rngs), together.labels["nll"])
  sums = -jnp.sum(nll * together.weights["nll"], axis=1)
  return sums.reshape(-1, len(views)).T
