"""Test cases: one tiny model for every kind of attention, with an objective that uses it.

Batches hold short texts, several per row if the objective allows packing.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.config.model import TransformerConfig
from llmjax.data import packing
from llmjax.data.pipeline import TrainStream
from llmjax.data.randomness import EVAL, counter_rng
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.distributed import sharding
from llmjax.examples import RowLengths, Window
from llmjax.models.transformer import Transformer
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.contrastive import Contrastive
from llmjax.objectives.masked_lm import MaskedLM
from llmjax.objectives.prefix_lm import PrefixLM
from llmjax.objectives.span_corruption import SpanCorruption
from llmjax.objectives.weighted_sum import WeightedSum
from llmjax.training import step
from llmjax.types import dummy_batch

TOKENIZER = make_tokenizer({"name": "bytes", "mask": True, "sentinels": 9})
VOCAB, LENGTH, ROWS = TOKENIZER.vocab_size, 32, 8

PLAIN = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False, "norm_bias": False}
SHAPE = {"init_stddev": 0.15, "d_ff": 48}

GPT = TransformerConfig(VOCAB, 32, 2, 4, 64, **SHAPE)
LLAMA = dataclasses.replace(
  GPT,
  **PLAIN,
  num_kv_heads=2,
  norm="rmsnorm",
  positions="rotary",
  activation="silu",
  gated=True,
  qk_norm=True,
  tie_embeddings=False,
)
MIXTRAL = dataclasses.replace(LLAMA, qk_norm=False, num_experts=4, experts_per_token=2, shared_expert_d_ff=24)
GEMMA = dataclasses.replace(
  LLAMA,
  norm_placement="sandwich",
  norm_zero_centered=True,
  scale_embeddings=True,
  tie_embeddings=True,
  attention_softcap=5.0,
  logit_softcap=6.0,
  attention_pattern=("local", "global"),
  window=5,
)
MISTRAL = dataclasses.replace(LLAMA, qk_norm=False, attention_pattern=("local",), window=5)
BERT = dataclasses.replace(
  GPT,
  decoder_layers=0,
  encoder_layers=2,
  norm_placement="post",
  embedding_norm=True,
  token_types=2,
  activation="gelu_exact",
  head_transform=True,
  head_bias=True,
  pooler=True,
  sentence_classes=2,
)
MODERNBERT = dataclasses.replace(
  GPT,
  **PLAIN,
  decoder_layers=0,
  encoder_layers=4,
  embedding_norm=True,
  first_attention_norm=False,
  positions="rotary",
  local_rotary_base=100.0,
  attention_pattern=("global", "local"),
  window=8,
  gated=True,
  head_transform=True,
  head_bias=True,
)
T5 = dataclasses.replace(
  GPT,
  **PLAIN,
  encoder_layers=2,
  norm="rmsnorm",
  positions="relative",
  relative_buckets=8,
  relative_max_distance=16,
  attention_scale=1.0,
  activation="relu",
  scale_tied_logits=True,
  init_stddev=None,
  embedding_stddev=1.0,
)


@dataclasses.dataclass(frozen=True)
class Case:
  cfg: TransformerConfig
  objective: object

  @property
  def shared(self):
    """Whether examples share rows."""
    return self.objective.packing != "never"


def _sum():
  views = Contrastive(TOKENIZER, LENGTH, temperature=0.2)
  return WeightedSum({"mlm": MaskedLM(TOKENIZER), "views": views}, {"mlm": 1.0, "views": 0.3}, LENGTH)


CASES = {
  "gpt causal_lm": Case(GPT, CausalLM(z_loss=1e-3, label_smoothing=0.1)),
  "llama causal_lm": Case(LLAMA, CausalLM(TOKENIZER)),
  "mistral causal_lm": Case(MISTRAL, CausalLM()),
  "mixtral causal_lm": Case(MIXTRAL, CausalLM()),
  "gemma causal_lm": Case(GEMMA, CausalLM()),
  "llama prefix_lm": Case(dataclasses.replace(LLAMA, bidirectional_prompt=True), PrefixLM(TOKENIZER)),
  "bert masked_lm": Case(BERT, MaskedLM(TOKENIZER, sentence_pairs="next", sentence_weight=0.7)),
  "modernbert masked_lm": Case(MODERNBERT, MaskedLM(TOKENIZER, whole_words=True)),
  "t5 span_corruption": Case(T5, SpanCorruption(TOKENIZER, noise_density=0.3, mean_span=2.0, z_loss=1e-3)),
  # Without biases of keys: their true gradient is zero, and its rounding noise is large beside this small loss.
  "bert contrastive": Case(
    dataclasses.replace(BERT, qkv_bias=False),
    Contrastive(TOKENIZER, LENGTH, "text", "title", "other", symmetric=True, temperature=0.2, pooling="cls"),
  ),
  "bert weighted_sum": Case(BERT, _sum()),
}


def texts(seed=0):
  """Short texts of several lines, each with a title and another one's title."""
  rng = np.random.default_rng(seed)

  def words(count):
    return " ".join("".join(map(chr, rng.integers(97, 123, rng.integers(1, 5)))) for _ in range(count))

  records = [{"text": words(2) + ".\n" + words(2), "title": words(2), "other": words(2)} for _ in range(40)]
  return Source(len(records), records.__getitem__, f"texts{seed}")


def make_examples(case, count, seed=0):
  """Return the first examples of `count` records."""
  source = texts(seed)
  examples = []
  for i, record in enumerate(itertools.islice(source, count)):
    [ids] = case.objective.split_ids(TOKENIZER.document(record["text"]), LENGTH)[:1]
    examples.append(case.objective.make_example(Window(record, ids), counter_rng(seed, EVAL, i), source))
  return examples


def record_examples(objective, records):
  """Return all examples of records."""
  windows = [w for record in records for w in objective.split_record(record, TOKENIZER, objective.seq_len, whole=False)]
  return [objective.make_example(window, np.random.default_rng(0), records) for window in windows]


def pack_batch(examples, row_lengths, rows, shared=False):
  """Return a batch whose examples share rows, or have one row each; the rest of the rows is padding."""
  bins = packing.best_fit(examples, row_lengths) if shared else [[example] for example in examples]
  assert not shared or len(bins) < len(examples)
  bins += [[]] * (rows - len(bins))
  return packing.stack_rows([packing.pack_row(each, examples[0], row_lengths) for each in bins], range(rows))


def widen_rows(row_lengths, extra):
  """Return row lengths with `extra` tokens more in each stream."""
  inputs, targets = (None if n is None else n + extra for n in (row_lengths.inputs, row_lengths.targets))
  return RowLengths(inputs, targets, {view: widen_rows(inner, extra) for view, inner in row_lengths.extras.items()})


@functools.cache
def make_batch(case, seed=0, rows=ROWS):
  """Return a batch of the pipeline with uneven weights: some rows have much loss, some little."""
  source = texts(seed)
  settings = {"batch_size": rows, "seq_len": LENGTH, "seed": seed, "workers": 1, "prefetch": 0}
  stream = TrainStream(source, TOKENIZER, case.objective, **settings)
  batch = next(stream)
  stream.close()
  return with_uneven_weights(batch)


def with_uneven_weights(batch):
  scale = np.linspace(0.05, 1, len(batch.rows), dtype=np.float32)[:, None]
  return dataclasses.replace(
    batch,
    weights={term: w * scale for term, w in batch.weights.items()},
    extras={name: with_uneven_weights(inner) for name, inner in batch.extras.items()},
  )


def predicted_tokens(batch):
  """The stream that labels are aligned with."""
  return batch.inputs if batch.targets is None else batch.targets


@functools.cache
def parameters(cfg, seed=0):
  """Return (parameters, their logical axes); `init` is only traced, and NumPy draws the values.

  No bias or norm is at its neutral initial value, so that a model that ignores one differs. Adapters are: their second
  factor is zero.
  """
  boxed = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), dummy_batch())["params"]
  is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
  stddev = cfg.init_stddev or cfg.d_model**-0.5

  def draw(path, box):
    name, shape = path[-1].key, box.value.shape
    rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
    noise = rng.normal(size=shape).astype(np.float32)
    if name == "lora_b":
      return np.zeros(shape, np.float32)
    if name == "scale":
      return (0.0 if cfg.norm_zero_centered else 1.0) + 0.05 * noise
    if name == "bias":
      return 0.05 * noise
    if name == "table":
      return (cfg.embedding_stddev or stddev) * noise
    return stddev * noise

  values = jax.tree_util.tree_map_with_path(draw, boxed, is_leaf=is_box)
  values = jax.tree.map(jnp.asarray, values)
  return values, jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)


@functools.cache
def gradient_function(case, accum=1):
  return jax.jit(
    functools.partial(step.compute_gradients, model=Transformer(case.cfg), objective=case.objective, accum=accum)
  )


def gradients(case, params, batch, accum=1, key=0):
  """(gradients, metrics) of `step.gradients`."""
  return gradient_function(case, accum)(params, batch, jax.random.key(key))


def with_dropout(case):
  return dataclasses.replace(
    case, cfg=dataclasses.replace(case.cfg, dropout=0.2, attention_dropout=0.1, mlp_dropout=0.1)
  )


@contextlib.contextmanager
def mesh_shardings(cfg, sizes):
  """Use a mesh with `sizes`; yield the shardings of (parameters, rows of a batch).

  The vocabulary is not sharded, because the tokenizer's number of tokens is odd.
  """
  rules = {**sharding.RULES, "vocab": None, "act_vocab": None}
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  with sharding.use_mesh(mesh, rules):
    param_shardings = sharding.param_shardings(*parameters(cfg), mesh, rules)
    yield param_shardings, sharding.named_sharding(mesh, "act_batch", rules=rules)


def gradients_on_mesh(case, params, batch, sizes, accum=1, key=0):
  """(gradients, metrics) of `step.gradients` as NumPy arrays, computed on a mesh with `sizes`."""
  function = functools.partial(
    step.compute_gradients, model=Transformer(case.cfg), objective=case.objective, accum=accum
  )
  with mesh_shardings(case.cfg, sizes) as (param_shardings, row_sharding):
    function = jax.jit(function, in_shardings=(param_shardings, row_sharding, None))
    return jax.device_get(function(params, batch, jax.random.key(key)))
