"""How the next token is drawn from logits."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llmjax.config import ConfigError


@struct.dataclass
class Sampling:
  """How the next token is drawn from logits. Numbers are traced, so that changing them compiles nothing."""

  temperature: Any  # Float[], > 0
  top_p: Any  # Float[], 1 = off
  min_p: Any  # Float[], 0 = off
  repetition_penalty: Any  # Float[], 1 = off
  greedy: bool = struct.field(pytree_node=False)
  top_k: int | None = struct.field(pytree_node=False)
  nucleus: bool = struct.field(pytree_node=False)
  penalise: bool = struct.field(pytree_node=False)


def make_sampling(
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  repetition_penalty: float = 1.0,
  min_p: float = 0.0,
) -> Sampling:
  """Checked sampling settings; temperature 0 is greedy.

  Raises:
    ConfigError: a value out of range.
  """
  if not 0 <= temperature < math.inf:
    raise ConfigError(f"temperature={temperature} must be a number that is not negative; 0 is greedy")
  if top_k is not None and top_k < 1:
    raise ConfigError(f"top_k={top_k} must be at least 1")
  if top_p is not None and not 0 < top_p <= 1:
    raise ConfigError(f"top_p={top_p} must be in (0, 1]")
  if not 0 <= min_p <= 1:
    raise ConfigError(f"min_p={min_p} must be in [0, 1]; 0 is none")
  if not 0 < repetition_penalty < math.inf:
    raise ConfigError(f"repetition_penalty={repetition_penalty} must be positive; 1 is none")
  return Sampling(
    temperature=np.float32(temperature or 1.0),
    top_p=np.float32(1.0 if top_p is None else top_p),
    min_p=np.float32(min_p),
    repetition_penalty=np.float32(repetition_penalty),
    greedy=temperature == 0,
    top_k=top_k,
    nucleus=top_p is not None and top_p < 1,
    penalise=repetition_penalty != 1.0,
  )


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"] | None) -> Array:
  """Logits after repetition penalty, temperature, top-k, top-p and min-p, in this order; what is ruled out is -inf.

  The penalty divides positive logits of seen tokens and multiplies negative ones (Keskar et al. 2019); top-p keeps
  the smallest set of tokens whose probability reaches p (Holtzman et al. 2020), min-p those with at least the fraction
  p of the likeliest one's probability (Nguyen et al. 2024).
  """
  if seen is not None:
    penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = jnp.where(seen, penalised, logits)
  if sampling.greedy:
    return logits
  logits = logits / sampling.temperature
  if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.nucleus:
    order = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the mass of all likelier tokens
    least = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
  return jnp.where(logits < least, -jnp.inf, logits)


def sample_token(
  logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"], seen: Bool[Array, "B V"] | None
) -> Int[Array, " B"]:
  """The next token of every row, each with a key of its own."""
  logits = filter_logits(logits, sampling, seen)
  if sampling.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
