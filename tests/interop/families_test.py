"""Models of every family against Transformers: outputs, losses, gradients, generation, routing."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from llmjax.checkpoints.sources.base import abstract_params
from llmjax.distributed import sharding
from llmjax.inference.generation import beam_search, generate
from llmjax.interop.config_json import read_model_config
from llmjax.interop.families.registry import FAMILIES, find_family
from llmjax.interop.folder_reader import read_folder_params
from llmjax.interop.tensor_map import list_tensors, unrolled_parameters
from llmjax.interop.tensors import merge_parameters
from llmjax.models.transformer import Transformer
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.losses import balance_loss
from llmjax.objectives.masked_lm import MaskedLM
from llmjax.objectives.span_corruption import SpanCorruption
from llmjax.training import optimizers, step
from llmjax.trees import flatten_tree
from llmjax.types import Batch
from tests.support import cases
from tests.support.huggingface_folders import (
  DATA,
  DEFAULT,
  FAST,
  NAMES,
  SLOW,
  TOLERANCE,
  assert_close,
  expected_outputs,
  reference_batch,
  reference_folder,
  reference_model,
  reference_outputs,
)
from tests.support.tiers import by_tier

LANGUAGE_MODELS = [name for name in NAMES if reference_folder(name).cfg.head == "lm"]
# Their training differs from that of "llama" in the rotary frequencies only.
ROTARY_OPTIONS = ("llama_linear", "llama_dynamic", "llama_yarn")


def test_references_cover_every_family():
  assert {reference_folder(name).family.model_type for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", by_tier(NAMES, fast=(*FAST, *SLOW), slow=[n for n in DEFAULT if n not in SLOW]))
def test_forward_of_each_family_equals_transformers(name):
  e, out = expected_outputs(name), reference_outputs(name)
  mask = e.get("attention_mask")
  logits = e["logits"] if "logits" in e else np.stack([e["start_logits"], e["end_logits"]], axis=-1)
  has_padded_tokens = logits.ndim == 3 and "decoder_input_ids" not in e
  assert_close(out.logits, logits, mask if has_padded_tokens else None)
  streams = [
    ("encoder_all_hidden", out.encoder_all_hidden, out.encoder_hidden, mask),
    ("decoder_all_hidden", out.all_hidden, out.hidden, None),
    ("all_hidden", out.all_hidden, out.hidden, mask),
  ]
  for key, all_hidden, final, stream_mask in streams:
    if key in e:
      hidden = [*all_hidden[:-1], final]  # Transformers applies the final norm to the last layer's states
      for layer, expected in enumerate(e[key]):  # OPT with narrow tables lacks the last one
        assert_close(hidden[layer], expected, stream_mask)
  if "pooler_output" in e:
    assert_close(out.pooled, e["pooler_output"])
  if "nsp_logits" in e:
    model, params = reference_model(name)
    sentence = jax.jit(functools.partial(model.apply, method="sentence_logits"))({"params": params}, out.hidden)
    assert_close(np.asarray(sentence)[:, 0], e["nsp_logits"])


def training_example(name):
  """Return (objective, batch) of the loss that Transformers computes."""
  e = expected_outputs(name)
  batch = reference_batch(name)
  labels, rows = e["labels"], len(e["input_ids"])
  is_causal = "decoder_input_ids" not in e and "attention_mask" not in e
  if is_causal:  # Transformers shifts the labels of causal models itself
    labels = np.concatenate([labels[:, 1:], np.full((rows, 1), -100)], axis=1)
  weights = (labels != -100).astype(np.float32)
  labels = np.where(labels == -100, 0, labels)
  if is_causal:
    return CausalLM(), dataclasses.replace(batch, labels={"nll": labels}, weights={"nll": weights})
  if "decoder_input_ids" in e:
    objective = SpanCorruption(cases.TOKENIZER)
    return objective, dataclasses.replace(batch, labels={"nll": labels}, weights={"nll": weights})
  if "next_sentence_label" not in e:
    return MaskedLM(cases.TOKENIZER), dataclasses.replace(batch, labels={"mlm": labels}, weights={"mlm": weights})
  first = np.zeros_like(weights)
  first[:, 0] = 1
  sentence = np.broadcast_to(e["next_sentence_label"][:, None], labels.shape)
  return MaskedLM(cases.TOKENIZER, sentence_pairs="next"), dataclasses.replace(
    batch, labels={"mlm": labels, "sentence": sentence}, weights={"mlm": weights, "sentence": first}
  )


def tensor_norms(name, cfg, grads):
  """Return {tensor of the folder: L2 norm of its gradient}."""
  leaves, parameters = flatten_tree(grads), unrolled_parameters(cfg, grads)

  def get_array(path, expert):
    leaf, layer = leaves[parameters[path].leaf], parameters[path].layer
    leaf = leaf if layer is None else leaf[layer]
    return np.asarray(leaf if expert is None else leaf[expert])

  folder = reference_folder(name)
  norms = {}
  for entry in list_tensors(folder.family, folder.architecture, cfg, parameters):
    arrays = [get_array(path, entry.expert) for path in entry.paths]
    norms[entry.name] = float(np.linalg.norm(merge_parameters(arrays, entry.patterns)))
  return norms


@pytest.mark.parametrize(
  "name", by_tier([n for n in LANGUAGE_MODELS if n not in ROTARY_OPTIONS], fast=("bert", "llama", "t5"), slow=SLOW)
)
def test_loss_gradients_and_adamw_steps_equal_transformers(name):
  e = expected_outputs(name)
  # The references are without dropout, which our gradient applies if the rate is not 0.
  model, params = reference_model(name, dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0)
  objective, batch = training_example(name)
  _, axes = sharding.abstract_parameters(model)
  spec = {"name": "adamw", "lr": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
  spec |= {"decay_mask": ((".*", True),), "clip_norm": None}
  spec |= {"lr_scale": ((".*", 1.0),), "layer_decay": None}
  tx = optimizers.make_optimizer(spec, params, axes)

  @jax.jit
  def advance(params, state, batch):
    grads, metrics = step.compute_gradients(params, batch, jax.random.key(0), model=model, objective=objective, accum=1)
    direction, state = tx.update(grads, state, params)
    total, weight = metrics.get("objective", metrics["loss"])
    return jax.tree.map(lambda p, d: p - 1e-3 * d, params, direction), state, total / weight, grads

  losses, state, first_grads = [], jax.jit(tx.init)(params), None
  for _ in range(6):
    params, state, loss, grads = advance(params, state, batch)
    losses.append(float(loss))
    first_grads = jax.device_get(grads) if first_grads is None else first_grads
  assert losses[0] == pytest.approx(float(e["loss"]), abs=TOLERANCE)
  np.testing.assert_allclose(losses, e["adamw_losses"], atol=TOLERANCE)
  norms = tensor_norms(name, model.cfg, first_grads)
  expected_norms = dict(zip(e["grad_names"].tolist(), e["grad_norms"].tolist(), strict=True))
  assert set(norms) == set(expected_norms)
  global_norm = math.sqrt(sum(x**2 for x in expected_norms.values()))
  for tensor, expected in expected_norms.items():
    assert norms[tensor] == pytest.approx(expected, abs=1e-5 * global_norm), tensor


GENERATED = [n for n in LANGUAGE_MODELS if "gen_sequences" in expected_outputs(n)]


@pytest.mark.parametrize("name", by_tier(GENERATED, fast=("gpt2", "t5"), slow=("gemma3", "llama", "mixtral", "opt")))
def test_greedy_tokens_of_left_padded_prompts_equal_transformers(name):
  e = expected_outputs(name)
  model, params = reference_model(name)
  if "gen_mask" in e:
    tokens = generate(model, params, e["gen_ids"], e["gen_mask"], max_new_tokens=e["gen_sequences"].shape[1] - 1)
    np.testing.assert_array_equal(tokens, e["gen_sequences"])
    return
  padding = e["left_ids"].shape[1] - e["gen_prompt"].shape[1]
  ids = np.concatenate([e["left_ids"], np.pad(e["gen_prompt"], ((0, 0), (padding, 0)))])
  mask = np.concatenate([e["left_mask"], np.pad(np.ones_like(e["gen_prompt"]), ((0, 0), (padding, 0)))])
  count = min(e["gen_sequences"].shape[1] - e["gen_prompt"].shape[1], model.cfg.max_len - ids.shape[1])
  new = np.asarray(generate(model, params, ids, mask, max_new_tokens=count))[:, ids.shape[1] :]
  left = e["left_sequences"][:, ids.shape[1] :]
  np.testing.assert_array_equal(new[: len(left), : left.shape[1]], left)
  np.testing.assert_array_equal(new[-1], e["gen_sequences"][0, e["gen_prompt"].shape[1] :][:count])


BEAM_SEARCHED = [n for n in LANGUAGE_MODELS if "beam_settings" in expected_outputs(n)]


@pytest.mark.parametrize("name", by_tier(BEAM_SEARCHED, slow=("llama", "t5")))
def test_beam_search_over_a_cache_equals_transformers(name):
  """After the end of a row, Transformers writes eos if token 0 is the padding, so rows are compared up to it."""
  e = expected_outputs(name)
  model, params = reference_model(name)
  for i, settings in enumerate(json.loads(str(e["beam_settings"]))):
    if i not in (0, 4, 8, 9):
      continue  # each penalty and each stopping rule once, and several sequences; all ten are equal
    names = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")
    sequences, scores = beam_search(
      *(model, params, e["beam_ids"], e["beam_mask"]),
      **{key: settings[key] for key in names if key in settings},
      eos_id=settings["eos_token_id"],
      max_new_tokens=settings["max_new_tokens"],
    )
    start = 1 if model.cfg.stacks == "both" else e["beam_ids"].shape[1]
    np.testing.assert_allclose(np.asarray(scores).reshape(-1), e[f"beam_{i}_scores"], atol=TOLERANCE)
    sequences = np.asarray(sequences).reshape(-1, sequences.shape[-1])
    for actual, desired in zip(sequences, e[f"beam_{i}_sequences"]):
      ends = np.flatnonzero(desired[start:] == settings["eos_token_id"])
      stop = start + (ends[0] + 1 if len(ends) else len(desired) - start)
      np.testing.assert_array_equal(actual[:stop], desired[:stop])


PADDED = [n for n in LANGUAGE_MODELS if "padded_ids" in expected_outputs(n)]


@pytest.mark.parametrize("name", by_tier(PADDED, fast=("mixtral",), slow=("gemma3",)))
def test_forward_with_right_padding_equals_transformers(name):
  e = expected_outputs(name)
  model, params = reference_model(name)
  out = jax.jit(model.apply)({"params": params}, Batch.from_tokens(e["padded_ids"], e["padded_mask"]))
  assert_close(out.logits, e["padded_logits"], e["padded_mask"])


LONG = [n for n in NAMES if "input_ids_long" in expected_outputs(n)]


@pytest.mark.parametrize("name", by_tier(LONG, fast=("phi3",), slow=("llama_dynamic",)))
def test_rotary_scaling_by_length_takes_the_declared_length(name):
  """Transformers chooses frequencies by the length of the text; ours depend on `max_len` only, so that the keys of a
  token do not depend on what follows."""
  e, cfg = expected_outputs(name), reference_folder(name).cfg
  original_len, long_len = cfg.rotary_scaling.original_max_len, e["input_ids_long"].shape[1]
  for max_len, suffix, other in ((original_len, "", "_long"), (long_len, "_long", "")):
    changed = dataclasses.replace(cfg, max_len=max_len)
    model = Transformer(changed)
    params = read_folder_params(reference_folder(name), changed, abstract_params(model))
    apply = jax.jit(lambda p, ids, model=model: model.apply({"params": p}, Batch.from_tokens(ids)).logits)
    assert_close(apply(params, e[f"input_ids{suffix}"]), e[f"logits{suffix}"])
    assert np.abs(np.asarray(apply(params, e[f"input_ids{other}"])) - e[f"logits{other}"]).max() > 0.1


WITH_EXPERTS = [n for n in NAMES if reference_folder(n).cfg.num_experts]


@pytest.mark.parametrize("name", by_tier(WITH_EXPERTS, fast=("mixtral",)))
def test_routing_and_balance_loss_equal_transformers(name):
  """Transformers averages shares and probabilities over all layers before it multiplies them, we layer by layer."""
  e, [routing] = expected_outputs(name), reference_outputs(name).routing
  counts, sums = np.asarray(routing.counts), np.asarray(routing.probabilities)
  tokens = float(np.asarray(routing.tokens).sum())
  products = counts.sum(axis=0) / tokens * sums.sum(axis=0) / tokens
  assert counts.shape[1] * float(products.sum()) == pytest.approx(float(e["aux_loss"]), abs=TOLERANCE)
  probabilities = np.exp(e["router_logits"]) / np.exp(e["router_logits"]).sum(axis=-1, keepdims=True)
  k, num_experts = reference_folder(name).cfg.experts_per_token, probabilities.shape[-1]
  chosen = np.argsort(-probabilities, axis=-1)[..., :k]
  shares = np.stack([np.bincount(layer.reshape(-1), minlength=num_experts) / len(layer) for layer in chosen])
  expected = num_experts * (shares * probabilities.mean(axis=1)).sum(axis=-1).mean()
  assert float(jax.jit(balance_loss)(routing)) == pytest.approx(float(expected), abs=TOLERANCE)


def test_routing_with_padding_counts_real_tokens_only():
  e = expected_outputs("mixtral")
  model, params = reference_model("mixtral")
  batch = Batch.from_tokens(e["padded_ids"], e["padded_mask"])
  [routing] = jax.jit(model.apply)({"params": params}, batch).routing
  assert (np.asarray(routing.tokens) == e["padded_mask"].sum()).all()
  np.testing.assert_allclose(np.asarray(routing.counts).sum(axis=1), 2 * e["padded_mask"].sum())


@pytest.mark.slow
def test_hub_configs_have_the_published_parameter_counts():
  """The hub shows the expected counts for the files."""
  for name, entry in json.loads((DATA.parent / "hub_configs.json").read_text()).items():
    cfg = read_model_config(*find_family(entry["config"], name), entry["config"], name)
    shapes, _ = sharding.abstract_parameters(Transformer(cfg))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == entry["parameters"], name
