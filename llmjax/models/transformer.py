"""The Transformer: an encoder, a decoder, or both. `llmjax.config.model` documents every choice.

Parameters, with dimension letters as in `llmjax.types` and N the layers of a stack:

  embedding/table [V D]      positions/table [P D] (learned)      token_types/table [Y D]      embedding_norm
  project_in, project_out (if embedding tables have a width of their own)
  {encoder,decoder}/layers/{attention_norm, attention/{query,key,value,out}, cross_norm, cross_attention/..., mlp_norm,
                            mlp/{gate,up,down}} [N ...]; attention_post_norm, mlp_post_norm (sandwich);
    experts: mlp/{router/kernel [D E], gate, up [E D F], down [E F D], shared, shared_gate}
  {encoder,decoder}/{final_norm, relative/table [R H]}
  head_transform, head_norm, head/kernel [D V] (untied) or [D C], head_bias [V]      pooler, sentence_head
  crf/{start [C], matrix [C C], end [C]}
  lora_a [I r], lora_b [r O] beside the kernel [I O] of each projection with an adapter

The config decides which of them a model has. If a pattern of n layers repeats, `layers` holds one group of layers,
`sublayer_0` to `sublayer_{n-1}`, each stacked [N / n ...]. Layers outside of the groups are `first`, `last_0`,
`last_1`, ... Unrolled stacks (`scan=False`) have `layers_0`, `layers_1`, ... without a leading N.
`models/layer_stacks.py` converts between the two layouts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from llmjax.config import ConfigError, suggest_name
from llmjax.config.model import TransformerConfig
from llmjax.config.rotary_scaling import make_rotary_scaling
from llmjax.distributed.sharding import constrain
from llmjax.models import layers
from llmjax.models.attention.cache import CachedMemory, CachedTokens
from llmjax.models.attention.masks import attention_mask
from llmjax.models.attention.module import AttentionContext
from llmjax.models.attention.select import MASK_KERNELS, choose_kernel
from llmjax.models.mup import kernel_input_multiplier
from llmjax.models.rotary import rotary_angles, rotary_frequencies
from llmjax.models.stack import LayerOutputs, LayerStack
from llmjax.types import Batch, Outputs, Tokens


class CrfTransitions(nn.Module):
  """The transition scores of a linear-chain CRF (Lafferty et al. 2001).

  Attributes:
    cfg: the model's config.
  """

  cfg: TransformerConfig

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    """Return {"start": Float[C], "matrix": Float[C C] (from, to), "end": Float[C]}."""
    classes = self.cfg.num_classes

    def declare(name: str, shape: tuple[int, ...]) -> Array:
      axes = ("classes", "classes")[: len(shape)]
      return layers.declare_parameter(self, name, nn.initializers.zeros, axes, shape, self.cfg.param_dtype)

    shapes = {"start": (classes,), "matrix": (classes, classes), "end": (classes,)}
    return {name: declare(name, shape) for name, shape in shapes.items()}


class Transformer(nn.Module):
  """An encoder, a decoder or both: `model.apply({"params": params}, batch) -> Outputs`.

  Dropout runs if and only if `rngs={"dropout": key}` is given.

  For decoding, call it with `cache_length=S, mutable=["cache"]`. The first call creates the cache and reads the prompt.
  Each further call appends its tokens. The encoder of an encoder-decoder runs in the first call only, and further
  batches have no `inputs`.

  Attributes:
    cfg: the model's config.
  """

  cfg: TransformerConfig

  def setup(self) -> None:
    """Create the submodules that the config asks for; their attributes name the parameters."""
    c = self.cfg
    table = functools.partial(layers.Embedding, stddev=c.table_stddev, dtype=c.dtype, param_dtype=c.param_dtype)
    self.embedding = table(c.vocab_size, c.table_width, ("vocab", "embed"))
    if c.embedding_width is not None:
      self.project_in = layers.make_projection(c, None, (c.d_model,), ("head", "embed"), False)
      if c.head == "lm":
        self.project_out = layers.make_projection(c, None, (c.table_width,), ("embed", "head"), False)
    if c.positions == "learned":
      self.positions = table(c.max_len, c.d_model, ("positions", "embed"))
    if c.token_types:
      self.token_types = table(c.token_types, c.d_model, ("token_types", "embed"))
    if c.embedding_norm:
      self.embedding_norm = layers.make_norm(c, None)
    if c.encoder_layers:
      self.encoder = LayerStack(c, c.encoder_layers)
    if c.decoder_layers:
      self.decoder = LayerStack(c, c.decoder_layers, cross=bool(c.encoder_layers))
    self.cached_tokens, self.cached_memory = CachedTokens(), CachedMemory()
    if c.head_transform:
      self.head_transform = layers.make_projection(c, None, (c.d_model,), ("embed", "head"), c.mlp_bias)
      self.head_norm = layers.make_norm(c, None)
    if c.head != "lm":
      self.head = layers.make_projection(c, None, (c.num_classes,), ("embed", "classes"), c.head_bias)
    else:
      if not c.tie_embeddings:
        self.head = layers.make_projection(c, None, (c.vocab_size,), ("embed", "vocab"), False)
      if c.head_bias:
        self.head_bias = layers.Bias(c.vocab_size, "vocab", c.param_dtype)
    if c.pooler:
      self.pooler = layers.make_projection(c, None, (c.d_model,), ("embed", "head"), True)
    if c.crf:
      self.crf = CrfTransitions(c)
    if c.sentence_classes:
      self.sentence_head = layers.make_projection(c, None, (c.sentence_classes,), ("embed", "classes"), True)

  def __call__(
    self, batch: Batch, *, cache_length: int | None = None, logits: bool = True, all_hidden: bool = False
  ) -> Outputs:
    """Return the model's outputs for a batch.

    Args:
      batch: input of the step.
      cache_length: S, number of tokens that the decoding cache can hold; None: no cache.
      logits: whether to return logits, whose shape `cfg.head` decides.
      all_hidden: whether to return the embeddings and the output of each layer.

    Raises:
      ValueError: the batch of an encoder-decoder has no `targets`.
    """
    c, batch = self.cfg, jax.tree.map(jnp.asarray, batch)
    keys = layers.row_keys(self.make_rng("dropout"), batch.rows) if self.has_rng("dropout") else None
    memory = memory_outputs = hidden = outputs = None
    if (
      c.encoder_layers and batch.inputs is not None
    ):  # decoding steps have no inputs: the cache has the encoder's output
      hidden, outputs = self._apply_stack(self.encoder, batch.inputs, layers.fold_in_rows(keys, 2))
    if c.decoder_layers:
      memory, memory_outputs = hidden, outputs
      tokens = batch.inputs if c.stacks == "decoder" else batch.targets
      if tokens is None:
        raise ValueError("batch.targets: an encoder-decoder needs them, got None. Pass the decoder's input tokens.")
      memory_tokens = batch.inputs if c.encoder_layers else None
      hidden, outputs = self._apply_stack(self.decoder, tokens, keys, memory, memory_tokens, cache_length)
    assert hidden is not None and outputs is not None
    if self.is_initializing() and c.sentence_classes:
      self.sentence_logits(hidden)  # declares its parameters
    if c.head == "lm":
      scores = self.unembed(hidden)
    else:
      scores = self._classify(hidden, batch.inputs, layers.fold_in_rows(keys, 3))
    stacks = [stack for stack in (memory_outputs, outputs) if stack is not None]
    return Outputs(
      logits=scores if logits else None,
      hidden=hidden,
      pooled=self._pool(batch.inputs.select(hidden, "first")) if c.pooler else None,
      transitions=self.crf() if c.crf else None,
      all_hidden=outputs.hidden if all_hidden else None,
      encoder_hidden=memory,
      encoder_all_hidden=memory_outputs.hidden if all_hidden and memory_outputs is not None else None,
      routing=[stack.routing for stack in stacks if stack.routing is not None],
    )

  def _apply_stack(
    self,
    stack: LayerStack,
    tokens: Tokens,
    dropout_keys: Key[Array, " B"] | None,
    memory: Float[Array, "B S D"] | None = None,
    memory_tokens: Tokens | None = None,
    cache_length: int | None = None,
  ) -> tuple[Float[Array, "B L D"], LayerOutputs]:
    """Embed tokens and apply a stack to them.

    Args:
      stack: the encoder or the decoder.
      tokens: its input, [B L].
      dropout_keys: random key of each row; None: no dropout.
      memory: output of the encoder; None in decoding steps, or without an encoder.
      memory_tokens: tokens of the encoder, [B S]; None as `memory`.
      cache_length: number of tokens that the decoding cache can hold; None: no cache.

    Returns:
      Hidden states after the final norm, and the outputs of all layers, with the embeddings as first hidden state.
    """
    c, causal = self.cfg, stack.cross or self.cfg.stacks == "decoder"
    key_tokens, cache_index = (tokens, None) if cache_length is None else self.cached_tokens(tokens, cache_length)
    if stack.cross and cache_length is not None:
      memory_tokens = self.cached_memory(memory_tokens)
    kinds = sorted({c.kind(i) for i in range(stack.depth)})
    kernel = cross_kernel = "xla"
    if cache_length is None and not self.is_initializing():
      choose = functools.partial(choose_kernel, c, tokens, training=dropout_keys is not None)
      kernel = choose(key_tokens, causal=causal)
      cross_kernel = kernel if memory_tokens is None else choose(memory_tokens, cross=True)
    masks = {}
    if kernel in MASK_KERNELS:
      windows = {kind: c.window if kind == "local" else None for kind in kinds}
      masks = {kind: attention_mask(tokens, key_tokens, causal=causal, window=windows[kind]) for kind in kinds}
    if memory_tokens is not None and cross_kernel in MASK_KERNELS:
      masks["cross"] = attention_mask(tokens, memory_tokens, causal=False)
    ctx = AttentionContext(
      query=tokens,
      key=key_tokens,
      masks=masks,
      rotary={kind: self._rotary(tokens, kind) for kind in kinds} if c.positions == "rotary" else {},
      dropout_keys=layers.fold_in_rows(dropout_keys, 0),
      memory=memory,
      memory_tokens=memory_tokens,
      cache_index=cache_index,
      cache_length=cache_length,
      causal=causal,
      kernel=kernel,
      cross_kernel=cross_kernel,
    )
    embeddings = self._embed(tokens, layers.fold_in_rows(dropout_keys, 1))
    hidden, outputs = stack(embeddings, ctx)
    return hidden, dataclasses.replace(outputs, hidden=jnp.concatenate([embeddings[None], outputs.hidden]))

  def _rotary(self, tokens: Tokens, kind: str) -> tuple[Array, Array]:
    """Return sin and cos of the rotary angles in layers of a kind, each Float[B L half]."""
    c = self.cfg
    base, scaling = c.rotary_base, c.rotary_scaling
    if kind == "local" and c.local_rotary_base is not None:
      base, scaling = c.local_rotary_base, None
    frequencies = rotary_frequencies(c.rotary_width, base, c.max_len, scaling)
    return rotary_angles(tokens.positions, frequencies, 1.0 if scaling is None else scaling.amplitude)

  def _embed(self, tokens: Tokens, dropout_keys: Key[Array, " B"] | None) -> Float[Array, "B L D"]:
    """Return the sum of the embeddings of each token: of its id, its position and its type."""
    c = self.cfg
    x = self.embedding(tokens.ids)
    if c.embedding_width is not None:
      x = self.project_in(x)
    if c.scale_embeddings:
      x = x * jnp.asarray(c.base_d_model**0.5, x.dtype)
    if c.positions == "learned":
      x = x + self.positions(tokens.positions)
    if c.token_types:
      types = jnp.zeros_like(tokens.ids) if tokens.token_types is None else tokens.token_types
      x = x + self.token_types(jnp.minimum(types, c.token_types - 1))  # RoBERTa has a single type
    if c.embedding_norm:
      x = self.embedding_norm(x)
    return layers.dropout(x, c.dropout, dropout_keys)

  def unembed(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Return the logits of hidden states over the vocabulary, float32."""
    c = self.cfg
    hidden = self._transform(hidden)
    if c.scale_tied_logits:
      hidden = hidden * c.base_d_model**-0.5
    if c.embedding_width is not None:
      hidden = self.project_out(hidden)
    if c.tie_embeddings:
      logits = self.embedding.attend(layers.scale(hidden, kernel_input_multiplier(c, ("embed", "vocab"))))
    else:
      logits = self.head(hidden)
    logits = constrain(logits.astype(jnp.float32), "act_batch", "act_len", "act_vocab")
    logits = self.head_bias(logits) if c.head_bias else logits
    return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

  def _classify(self, hidden: Float[Array, "B L D"], tokens: Tokens, dropout_keys: Key[Array, " B"] | None) -> Array:
    """Return the logits of a head on sequences, Float[B C], on tokens, Float[B L C], or on spans, Float[B L 2]."""
    c = self.cfg
    if c.head == "sequence":
      hidden = tokens.select(hidden, c.pooling).astype(hidden.dtype)
      hidden = self._pool(hidden) if c.pooler else hidden
    hidden = layers.dropout(hidden, c.dropout, dropout_keys)
    return self.head(self._transform(hidden)).astype(jnp.float32)

  def _transform(self, hidden: Float[Array, ...]) -> Float[Array, ...]:
    """Apply the projection, activation and norm before the output projection, if the model has them."""
    c = self.cfg
    return self.head_norm(layers.ACTIVATIONS[c.activation](self.head_transform(hidden))) if c.head_transform else hidden

  def _pool(self, hidden: Float[Array, ...]) -> Float[Array, ...]:
    """Apply the pooler, which is trained on the first token of each row only."""
    name = self.cfg.pooler_activation
    return (jnp.tanh if name == "tanh" else layers.ACTIVATIONS[name])(self.pooler(hidden))

  def sentence_logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
    """Return the logits of the sentence head at every position, float32; it is trained on first tokens only."""
    return self.sentence_head(self._pool(hidden)).astype(jnp.float32)


# {name in model.name: function that makes the model}
MODELS = {"transformer": "llmjax.models.transformer:make_transformer"}


def make_transformer(*, vocab_size: int, **fields: Any) -> Transformer:
  """Return a Transformer from config keys.

  Args:
    vocab_size: V.
    fields: other fields of `TransformerConfig`; `rotary_scaling` may be a dict, {} for no scaling.

  Raises:
    ConfigError: an unknown key, or values that `TransformerConfig` rejects.
  """
  known = {f.name for f in dataclasses.fields(TransformerConfig)}
  for key in fields:
    if key not in known:
      raise ConfigError(f"model.{key} does not exist; {suggest_name(key, known)}")
  scaling = fields.get("rotary_scaling")
  if isinstance(scaling, Mapping):
    fields["rotary_scaling"] = make_rotary_scaling(scaling) if scaling else None
  return Transformer(TransformerConfig(vocab_size=vocab_size, **fields))
