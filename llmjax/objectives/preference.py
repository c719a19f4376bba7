"""Learning from preferences without a reward model: of two answers the better one becomes likelier than the other one,
measured against a frozen reference (Rafailov et al. 2023, DPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmjax.config import ConfigError, suggest_name
from llmjax.data.tokenizers import chat
from llmjax.objectives.losses import cross_entropy
from llmjax.objectives.seq2seq import next_tokens
from llmjax.objectives.sft import Messages, check_messages, common_length, cut_left, read_chat
from llmjax.objectives.task import Record, text_field
from llmjax.types import Batch, Features, Forward, Metrics, Objective, Sums

VARIANTS = ("sigmoid", "ipo", "hinge")
VIEWS = ("chosen", "rejected")


def pair_loss(
  advantage: Float[Array, " B"], variant: str, beta: float, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
  """The loss of pairs by h = log(p(chosen) / p_ref(chosen)) - log(p(rejected) / p_ref(rejected)), of whole answers.

  - "sigmoid": -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), where a share e of the pairs is taken to be the
    wrong way round (Rafailov et al. 2023, eq. 7; with e, conservative DPO, Mitchell 2023).
  - "ipo": (h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17).
  - "hinge": max(0, 1 - beta h) (Zhao et al. 2023, SLiC-HF, with the reference as in Liu et al. 2023, RSO).

  Args:
    label_smoothing: e.
  """
  if variant == "ipo":
    return jnp.square(advantage - 1 / (2 * beta))
  if variant == "hinge":
    return jax.nn.relu(1 - beta * advantage)
  right, wrong = jax.nn.log_sigmoid(beta * advantage), jax.nn.log_sigmoid(-beta * advantage)
  return -(1 - label_smoothing) * right - label_smoothing * wrong


@dataclasses.dataclass(frozen=True, eq=False)
class Preference(Objective):
  """A pair's `pair_loss`, and where asked for the negative log-likelihood of the better answer's tokens.

  Records are of one of these forms:
  - three texts: a prompt and two answers, each of which goes on from it and ends with eos; with `template` they are
    messages of the user and of the assistant instead.
  - the answers are lists of messages, which together with those of the prompt (a list, a text of the user's, or a field
    that is not there) are chats that differ in their last message, the assistant's. The prompt may stand in them again.

  Both answers have the same prompt. What is too long loses the prompt's beginning, then, where one is left with half of
  a row at most, the answers' ends.

  Attributes:
    prompt, chosen, rejected: the fields; the chosen answer is the better one.
    template: see `InstructionTuning`; None leaves texts as they are.
    beta: how dear it is to leave the reference.
    variant, label_smoothing: see `pair_loss`.
    sft_weight: coefficient of the chosen answers' negative log-likelihood, a mean over tokens (Dubey et al. 2024,
      Llama 3, section 4.1.4).
  """

  tokenizer: Any
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
      raise ConfigError(f"objective.variant={self.variant!r}; {suggest_name(self.variant, VARIANTS)}")
    if not self.beta > 0:
      raise ConfigError(f"objective.beta={self.beta} must be positive")
    if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.variant != "sigmoid"):
      raise ConfigError(
        f"objective.label_smoothing={self.label_smoothing} must be in [0, 0.5), and 0 but for variant='sigmoid'"
      )
    if self.sft_weight < 0:
      raise ConfigError(f"objective.sft_weight={self.sft_weight} must not be negative")
    if self.seq_len < 2:
      raise ConfigError(f"seq_len={self.seq_len} leaves no room for a prompt and an answer; raise it")
    if self.template is not None:
      _ = self.source  # checks

  @property
  def source(self) -> str:
    """The Jinja source of the template."""
    return chat.template_or_default(self.tokenizer.chat_templates, self.template)

  @property
  def required_model_config(self) -> dict[str, Any]:
    return {"bidirectional_prompt": False}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"preference": 1.0, "sft": self.sft_weight} if self.sft_weight else {"preference": 1.0}

  # host

  def row_lengths(self, seq_len: int) -> dict[str, int]:
    return {f"extras/{view}/inputs": seq_len for view in VIEWS}

  @property
  def fields(self) -> tuple[str, ...]:
    return (self.prompt, self.chosen, self.rejected)

  def check(self, record: Record, *, labelled: bool = True) -> None:
    """Raises ConfigError where a record cannot be learned from; see `Task.check`."""
    answers = (self.chosen, self.rejected)
    for field in answers:
      if field not in record:
        raise ConfigError(f"there is no field {field!r}, which the objective reads; {suggest_name(field, record)}")
    if all(isinstance(record[field], str) for field in answers):
      if self.prompt not in record:
        raise ConfigError(
          f"there is no field {self.prompt!r}, which texts go on from; {suggest_name(self.prompt, record)}"
        )
      for field in (self.prompt, *answers):
        text_field(record, field)
      return
    for field in answers:
      check_messages(record[field], field)
    if isinstance(record.get(self.prompt), (list, tuple)):
      check_messages(record[self.prompt], self.prompt)
    chats = self.chats(record)
    for field, messages in zip(answers, chats):
      if messages[-1]["role"] != "assistant":
        raise ConfigError(f"{field!r}: the last message is the {messages[-1]['role']}'s; it must be the assistant's")
      if len(messages) < 2:
        raise ConfigError(
          f"{field!r} is the assistant's message alone; name what it answers as objective.prompt={self.prompt!r}"
        )
    if list(chats[0][:-1]) != list(chats[1][:-1]):
      raise ConfigError(
        f"{self.chosen!r} and {self.rejected!r} are answers to different messages; they must share them"
      )

  def chats(self, record: Record) -> tuple[Messages, Messages]:
    """The chats that end with the chosen answer, and with the rejected one."""
    said = record.get(self.prompt)
    prompt = [{"role": "user", "content": said}] if isinstance(said, str) else list(said or ())

    def one(answer: Any) -> Messages:
      if isinstance(answer, str):
        return [*prompt, {"role": "assistant", "content": answer}]
      return list(answer) if len(answer) > 1 else [*prompt, *answer]

    return one(record[self.chosen]), one(record[self.rejected])

  def examples(self, record: Record, tokenizer: Any, length: int, whole: bool) -> Iterator[dict[str, Any]]:
    self.check(record)
    yield {"features": self.encode(record)}

  def features(self, example: Record, rng: np.random.Generator, corpus: Any) -> Features | None:
    return example["features"]

  def encode(self, record: Record) -> Features:
    """Features of a pair: each answer behind the prompt, and the pair's weight."""
    prompt, *answers = self.read(record)
    room = self.seq_len + 1  # a row reads all tokens but the last
    longest = max(map(len, answers))
    prompt = cut_left(prompt, max(room - longest, room // 2), self.tokenizer.bos_id)
    views = {}
    for view, answer in zip(VIEWS, answers):
      ids = np.concatenate([prompt, answer[: room - len(prompt)]])
      views[view] = next_tokens(ids, np.arange(len(ids)) >= len(prompt))
    return {"extras": views, "row": {"weights": {"preference": np.ones((), np.float32)}}}

  def read(self, record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Int32[n] of the prompt, the chosen and the rejected answer."""
    if isinstance(record[self.chosen], str) and self.template is None:
      end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
      chosen, rejected = (
        np.append(self.tokenizer.encode(record[field]), end).astype(np.int32) for field in (self.chosen, self.rejected)
      )
      return self.tokenizer.prompt(record[self.prompt]), chosen, rejected
    found = [read_chat(self.tokenizer, messages, self.source, last_only=True) for messages in self.chats(record)]
    (chosen, _), (rejected, _) = found
    # Where a token reaches across the beginning of one answer alone, the other's begins as early.
    start = min(*(spans[0][0] for _, spans in found), common_length(chosen, rejected))
    return chosen[:start], chosen[start:], rejected[start:]

  # device

  def weights(self, batch: Batch) -> Sums:
    sums = {"preference": jnp.sum(batch.weights["preference"])}
    return sums | ({"sft": jnp.sum(batch.extras["chosen"].weights["nll"])} if self.sft_weight else {})

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    chosen, rejected = answer_log_probs(forward, batch, rngs)
    reference = jax.lax.stop_gradient(answer_log_probs(forward.auxiliary["reference"], batch, {}))
    rewards = self.beta * (chosen - reference[0]), self.beta * (rejected - reference[1])
    margin = rewards[0] - rewards[1]
    weight = batch.weights["preference"]
    count = jnp.sum(weight)
    each = pair_loss(margin / self.beta, self.variant, self.beta, self.label_smoothing)
    sums = {"preference": jnp.sum(each * weight)}
    measured = {
      "loss": each,
      "accuracy": (margin > 0).astype(jnp.float32),
      "margin": margin,
      "chosen_reward": rewards[0],
      "rejected_reward": rewards[1],
    }
    metrics = {name: (jnp.sum(value * weight), count) for name, value in measured.items()}
    if self.sft_weight:
      sums["sft"] = -jnp.sum(chosen)
      metrics["sft_loss"] = (sums["sft"], jnp.sum(batch.extras["chosen"].weights["nll"]))
    return sums, metrics


def answer_log_probs(forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> Float[Array, "2 B"]:
  """The log-probabilities of the chosen and the rejected answers, float32, by one pass over both.

  Each row of each of them has dropout of its own.
  """
  views = [batch.extras[view] for view in VIEWS]

  def interleave(*xs: Array) -> Array:  # the answers of a pair side by side, so that no row leaves its device
    return jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:])

  together = jax.tree.map(interleave, *views)
  together = dataclasses.replace(
    together, rows=interleave(*(view.rows * len(views) + i for i, view in enumerate(views)))
  )
  _, nll, _ = forward.per_token(cross_entropy, forward(together, rngs=rngs), together.labels["nll"])
  sums = -jnp.sum(nll * together.weights["nll"], axis=1)
  return sums.reshape(-1, len(views)).T
