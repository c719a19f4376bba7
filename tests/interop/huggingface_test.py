"""Every family against Hugging Face (references: tests/support/make_huggingface.py); folders written and read again.

Float32 noise between two implementations is a few 1e-6 here; the smallest misreading tried, a wrong norm epsilon, moves
logits by 3e-4.
"""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.checkpoints.sources import abstract_params
from llmjax.config import ConfigError
from llmjax.distributed import sharding
from llmjax.inference.generation import beam_search, generate
from llmjax.interop import family, huggingface, tensors
from llmjax.interop.families import FAMILIES, find
from llmjax.models.transformer import Transformer
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.losses import balance_loss
from llmjax.objectives.masked_lm import MaskedLM
from llmjax.objectives.span_corruption import SpanCorruption
from llmjax.training import optimizers, step
from llmjax.types import Batch
from tests.support import cases
from tests.support.tiers import by_tier

DATA = Path(__file__).parents[1] / "testdata" / "huggingface"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
TOLERANCE = 1e-4

# One folder per family and head is in the tier default; the others have a further option of their family.
OPTIONS = (
  *("gpt_neox_sequential", "llama3", "llama_dynamic", "llama_linear", "llama_yarn", "modernbert_sequence_mean"),
  *("opt_350m_like", "phi3_partial"),
)
DEFAULT = [name for name in NAMES if name not in OPTIONS]
FAST = ("bert", "gpt2", "llama", "mixtral", "t5")
SLOW = ("gemma3", "modernbert")  # with FAST: every kind of layer


@functools.cache
def folder(name):
  return huggingface.open_folder(DATA / name)


@functools.cache
def expected(name):
  return dict(np.load(DATA / name / "expected.npz"))


def length_dependent(name):
  """Hugging Face reads short texts with other frequencies; ours are those of the declared maximum length."""
  return folder(name).cfg.rotary_scaling is not None and folder(name).cfg.rotary_scaling.name == "longrope"


def config(name):
  """The model's config; of a length-dependent one, for texts within the original context."""
  cfg = folder(name).cfg
  return dataclasses.replace(cfg, max_len=cfg.rotary_scaling.original_max_len) if length_dependent(name) else cfg


@functools.cache
def loaded(name, **changes):
  """(model, parameters) with some of its config changed."""
  cfg = dataclasses.replace(config(name), **changes)
  model = Transformer(cfg)
  return model, huggingface.read_params(folder(name), cfg, abstract_params(model))


def batch_of(name):
  e = expected(name)
  return Batch.from_tokens(
    e["input_ids"], e.get("attention_mask"), target_ids=e.get("decoder_input_ids"), token_types=e.get("token_type_ids")
  )


@functools.cache
def outputs(name):
  model, params = loaded(name)
  return jax.jit(functools.partial(model.apply, all_hidden=True))({"params": params}, batch_of(name))


def close(got, want, mask=None):
  got, want = np.asarray(got), np.asarray(want)
  where = slice(None) if mask is None else np.asarray(mask) > 0
  np.testing.assert_allclose(got[where], want[where], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", by_tier(NAMES, fast=(*FAST, *SLOW), slow=[n for n in DEFAULT if n not in SLOW]))
def test_forward_of_each_family_equals_transformers(name):
  e, out = expected(name), outputs(name)
  mask = e.get("attention_mask")
  want = e["logits"] if "logits" in e else np.stack([e["start_logits"], e["end_logits"]], axis=-1)
  by_token = want.ndim == 3 and "decoder_input_ids" not in e
  close(out.logits, want, mask if by_token else None)
  streams = [("encoder_all_hidden", out.encoder_all_hidden, out.encoder_hidden, mask)]
  streams += [
    ("decoder_all_hidden", out.all_hidden, out.hidden, None),
    ("all_hidden", out.all_hidden, out.hidden, mask),
  ]
  for key, each, last, real in streams:
    if key in e:
      found = [*each[:-1], last]  # theirs has the last layer's behind the final norm
      for layer, states in enumerate(e[key]):  # of OPT with narrow tables all but the last, which they project
        close(found[layer], states, real)
  if "pooler_output" in e:
    close(out.pooled, e["pooler_output"])
  if "nsp_logits" in e:
    model, params = loaded(name)
    sentence = jax.jit(functools.partial(model.apply, method="sentence_logits"))({"params": params}, out.hidden)
    close(np.asarray(sentence)[:, 0], e["nsp_logits"])


def learned(name):
  """(objective, batch) that Hugging Face's loss is of."""
  e = expected(name)
  batch = batch_of(name)
  labels, rows = e["labels"], len(e["input_ids"])
  causal = "decoder_input_ids" not in e and "attention_mask" not in e
  if causal:  # they predict the next token, from labels that are not shifted
    labels = np.concatenate([labels[:, 1:], np.full((rows, 1), -100)], axis=1)
  weights = (labels != -100).astype(np.float32)
  labels = np.where(labels == -100, 0, labels)
  if causal:
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


TRAINED = [name for name in NAMES if folder(name).cfg.head == "lm"]


LINEAR = ("llama_linear", "llama_dynamic", "llama_yarn")


@pytest.mark.parametrize(
  "name", by_tier([n for n in TRAINED if n not in LINEAR], fast=("bert", "llama", "t5"), slow=SLOW)
)
def test_loss_gradients_and_adamw_steps_equal_transformers(name):
  e = expected(name)
  # Hugging Face's numbers are without dropout; a gradient of ours has a key for it.
  model, params = loaded(name, dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0)
  objective, batch = learned(name)
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

  losses, state, first = [], jax.jit(tx.init)(params), None
  for _ in range(6):
    params, state, loss, grads = advance(params, state, batch)
    losses.append(float(loss))
    first = jax.device_get(grads) if first is None else first
  assert losses[0] == pytest.approx(float(e["loss"]), abs=TOLERANCE)
  np.testing.assert_allclose(losses, e["adamw_losses"], atol=TOLERANCE)
  found = norms(name, model.cfg, first)
  want = dict(zip(e["grad_names"].tolist(), e["grad_norms"].tolist(), strict=True))
  assert set(found) == set(want)
  whole = math.sqrt(sum(x**2 for x in want.values()))
  for tensor, value in want.items():
    assert found[tensor] == pytest.approx(value, abs=1e-5 * whole), tensor


def norms(name, cfg, grads):
  """{their tensor: L2 norm of its gradient}."""
  flat = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(grads)}
  ours = huggingface.parameters(cfg, grads)

  def get(path, expert):
    leaf = flat[ours[path].leaf]
    leaf = leaf if ours[path].layer is None else leaf[ours[path].layer]
    return np.asarray(leaf if expert is None else leaf[expert])

  f = folder(name)
  return {
    entry.name: float(np.linalg.norm(tensors.join([get(p, entry.expert) for p in entry.paths], entry.layouts)))
    for entry in huggingface.entries(f.family, f.architecture, cfg, ours)
  }


GENERATED = [n for n in TRAINED if "gen_sequences" in expected(n)]


@pytest.mark.parametrize("name", by_tier(GENERATED, fast=("gpt2", "t5"), slow=("gemma3", "llama", "mixtral", "opt")))
def test_greedy_tokens_of_left_padded_prompts_equal_transformers(name):
  e = expected(name)
  model, params = loaded(name)
  if "gen_mask" in e:
    got = generate(model, params, e["gen_ids"], e["gen_mask"], max_new_tokens=e["gen_sequences"].shape[1] - 1)
    np.testing.assert_array_equal(got, e["gen_sequences"])
    return
  extra = e["left_ids"].shape[1] - e["gen_prompt"].shape[1]
  ids = np.concatenate([e["left_ids"], np.pad(e["gen_prompt"], ((0, 0), (extra, 0)))])
  mask = np.concatenate([e["left_mask"], np.pad(np.ones_like(e["gen_prompt"]), ((0, 0), (extra, 0)))])
  count = min(e["gen_sequences"].shape[1] - e["gen_prompt"].shape[1], model.cfg.max_len - ids.shape[1])
  new = np.asarray(generate(model, params, ids, mask, max_new_tokens=count))[:, ids.shape[1] :]
  left = e["left_sequences"][:, ids.shape[1] :]
  np.testing.assert_array_equal(new[: len(left), : left.shape[1]], left)
  np.testing.assert_array_equal(new[-1], e["gen_sequences"][0, e["gen_prompt"].shape[1] :][:count])


@pytest.mark.parametrize("name", by_tier([n for n in TRAINED if "beam_settings" in expected(n)], slow=("llama", "t5")))
def test_beam_search_over_a_cache_equals_transformers(name):
  """Behind a row's end they write eos where padding is token 0, we padding; so rows are compared up to their end."""
  e = expected(name)
  model, params = loaded(name)
  for i, settings in enumerate(json.loads(str(e["beam_settings"]))):
    if i not in (0, 4, 8, 9):
      continue  # each penalty and each way to stop once, and several sequences; all ten passed
    names = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")
    how = {k: settings[k] for k in names if k in settings}
    start = e[f"beam_{i}_sequences"]
    found, scores = beam_search(
      *(model, params, e["beam_ids"], e["beam_mask"]),
      **how,
      eos_id=settings["eos_token_id"],
      max_new_tokens=settings["max_new_tokens"],
    )
    before = 1 if model.cfg.stacks == "both" else e["beam_ids"].shape[1]
    np.testing.assert_allclose(np.asarray(scores).reshape(-1), e[f"beam_{i}_scores"], atol=TOLERANCE)
    for got, want in zip(np.asarray(found).reshape(-1, found.shape[-1]), start):
      ends = np.flatnonzero(want[before:] == settings["eos_token_id"])
      stop = before + (ends[0] + 1 if len(ends) else len(want) - before)
      np.testing.assert_array_equal(got[:stop], want[:stop])


PADDED = [n for n in TRAINED if "padded_ids" in expected(n)]


@pytest.mark.parametrize("name", by_tier(PADDED, fast=("mixtral",), slow=("gemma3",)))
def test_forward_with_right_padding_equals_transformers(name):
  e = expected(name)
  model, params = loaded(name)
  out = jax.jit(model.apply)({"params": params}, Batch.from_tokens(e["padded_ids"], e["padded_mask"]))
  close(out.logits, e["padded_logits"], e["padded_mask"])


LONG = [n for n in NAMES if "input_ids_long" in expected(n)]


@pytest.mark.parametrize("name", by_tier(LONG, fast=("phi3",), slow=("llama_dynamic",)))
def test_rotary_scaling_by_length_takes_the_declared_length(name):
  """Hugging Face reads a text beyond the original context otherwise than a part of it within; we read both as declared
  by max_len, so that a token's keys do not depend on what follows it."""
  e, cfg = expected(name), folder(name).cfg
  original, long = cfg.rotary_scaling.original_max_len, e["input_ids_long"].shape[1]
  for max_len, same, other in ((original, "", "_long"), (long, "_long", "")):
    changed = dataclasses.replace(cfg, max_len=max_len)
    model = Transformer(changed)
    params = huggingface.read_params(folder(name), changed, abstract_params(model))
    apply = jax.jit(lambda p, ids, model=model: model.apply({"params": p}, Batch.from_tokens(ids)).logits)
    close(apply(params, e[f"input_ids{same}"]), e[f"logits{same}"])
    assert np.abs(np.asarray(apply(params, e[f"input_ids{other}"])) - e[f"logits{other}"]).max() > 0.1


EXPERTS = [n for n in NAMES if folder(n).cfg.num_experts]


@pytest.mark.parametrize("name", by_tier(EXPERTS, fast=("mixtral",)))
def test_routing_and_balance_loss_equal_transformers(name):
  """Hugging Face takes the shares and probabilities over all layers at once, we layer by layer."""
  e, [routing] = expected(name), outputs(name).routing
  counts, sums = np.asarray(routing.counts), np.asarray(routing.probabilities)
  tokens = float(np.asarray(routing.tokens).sum())
  whole = counts.sum(axis=0) / tokens * sums.sum(axis=0) / tokens
  assert counts.shape[1] * float(whole.sum()) == pytest.approx(float(e["aux_loss"]), abs=TOLERANCE)
  probabilities = np.exp(e["router_logits"]) / np.exp(e["router_logits"]).sum(axis=-1, keepdims=True)
  k, experts = folder(name).cfg.experts_per_token, probabilities.shape[-1]
  chosen = np.argsort(-probabilities, axis=-1)[..., :k]
  shares = np.stack([np.bincount(c.reshape(-1), minlength=experts) / len(c) for c in chosen])
  want = experts * (shares * probabilities.mean(axis=1)).sum(axis=-1).mean()
  assert float(jax.jit(balance_loss)(routing)) == pytest.approx(float(want), abs=TOLERANCE)


def test_routing_with_padding_counts_real_tokens_only():
  e = expected("mixtral")
  model, params = loaded("mixtral")
  batch = Batch.from_tokens(e["padded_ids"], e["padded_mask"])
  [routing] = jax.jit(model.apply)({"params": params}, batch).routing
  assert (np.asarray(routing.tokens) == e["padded_mask"].sum()).all()
  np.testing.assert_allclose(np.asarray(routing.counts).sum(axis=1), 2 * e["padded_mask"].sum())


# Folders.


@pytest.mark.parametrize("name", [n for n in NAMES if (DATA / n / "config_hub.json").is_file()])
def test_config_of_either_generation_of_transformers_is_read_alike(name, tmp_path):
  for file in ("model.safetensors",):
    shutil.copy(DATA / name / file, tmp_path / file)
  shutil.copy(DATA / name / "config_hub.json", tmp_path / "config.json")
  again = huggingface.open_folder(tmp_path)
  assert not family.differences(again.cfg, folder(name).cfg)
  assert again.architecture == folder(name).architecture


@pytest.mark.parametrize("name", by_tier(NAMES, fast=(*FAST, *SLOW)))
def test_folder_read_and_written_again_is_bitwise_equal(name, tmp_path):
  f = folder(name)
  scanned = huggingface.read_params(f, f.cfg, abstract_params(Transformer(f.cfg)))
  labels = family.labels(f.config) if f.cfg.head in ("sequence", "token") else None
  written = huggingface.write_folder(tmp_path / "a", f.cfg, scanned, prefer=f.family.model_type, labels=labels)
  assert written == f.architecture
  theirs, ours = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
  missing = set(theirs) - set(ours)
  assert all(n.removeprefix(f.family.prefix) in f.family.tied or n in f.family.tied for n in missing), missing
  skipped = 2 if f.family.model_type in ("roberta", "opt") else 0  # rows of the position table that nothing reads
  for key, value in ours.items():
    start = skipped if "position" in key and "embed" in key else 0
    np.testing.assert_array_equal(value[start:], theirs[key][start:], err_msg=key)
  again = huggingface.open_folder(tmp_path / "a")
  assert not family.differences(again.cfg, f.cfg)

  unrolled = dataclasses.replace(f.cfg, scan=False)
  params = huggingface.read_params(f, unrolled, abstract_params(Transformer(unrolled)))
  huggingface.write_folder(tmp_path / "b", unrolled, params, prefer=f.family.model_type, labels=labels)
  for file in ("config.json", "model.safetensors"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", by_tier(["llama", "mixtral", "t5_v1_1", "modernbert"], fast=("mixtral",)))
def test_folder_read_onto_a_mesh_is_sharded_and_written_alike(name, tmp_path):
  f = folder(name)
  model = Transformer(f.cfg)
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
  rules = {**sharding.RULES, "kv_heads": None} if f.cfg.kv_heads % 2 else sharding.RULES
  params = huggingface.read_params(f, f.cfg, abstract_params(model, mesh, rules))
  assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(params))
  _, whole = loaded(name)
  jax.tree.map(np.testing.assert_array_equal, params, whole)
  huggingface.write_folder(tmp_path / "eight", f.cfg, params, prefer=f.family.model_type)
  huggingface.write_folder(tmp_path / "one", f.cfg, whole, prefer=f.family.model_type)
  same = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "eight")]
  assert same[0] == same[1]


def test_folder_of_several_files_in_bfloat16_is_read_again(tmp_path):
  f = folder("llama")
  _, params = loaded("llama")
  huggingface.write_folder(tmp_path / "a", f.cfg, params, max_shard_bytes=5_000, dtype="bfloat16")
  assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
  cfg = dataclasses.replace(f.cfg, param_dtype="bfloat16")
  again = huggingface.open_folder(tmp_path / "a")
  found = huggingface.read_params(again, cfg, abstract_params(Transformer(cfg)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found, params)
  wide = huggingface.read_params(again, f.cfg, abstract_params(Transformer(f.cfg)))
  assert jax.tree.leaves(wide)[0].dtype == jnp.float32


def test_read_params_on_a_mesh_places_one_shard_at_a_time(monkeypatch):
  f = folder("llama")
  mesh = sharding.make_mesh({"fsdp": 8, "tensor": 1, "data": 1})
  placed, put = [], jax.device_put
  monkeypatch.setattr(huggingface.jax, "device_put", lambda x, device: placed.append(x.size) or put(x, device))
  abstract = abstract_params(Transformer(f.cfg), mesh)
  huggingface.read_params(f, f.cfg, abstract)
  assert max(placed) <= max(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(abstract))


def test_choose_with_a_named_family_tries_no_other():
  cfg = folder("llama").cfg
  assert huggingface.choose(cfg, only="mistral")[1] == "MistralForCausalLM"
  for only, words in (("qwen3_moe", "no architecture of the family qwen3_moe"), ("lama", "`llama`")):
    with pytest.raises(ConfigError, match=words):
      huggingface.choose(cfg, only=only)


def test_read_params_with_unequal_tied_tables_is_refused(tmp_path):
  path = copied("llama", tmp_path, {"tie_word_embeddings": True})
  with pytest.raises(ConfigError, match=r"lm_head\.weight is model\.embed_tokens\.weight, and it is another"):
    read(path)
  tied = copied(
    "llama", tmp_path, {"tie_word_embeddings": True}, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}
  )
  assert "head" not in read(tied)
  copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
  for name, count in (("t5", 3), ("t5_v1_1", 2)):  # v1.0 is tied whatever the file holds
    read(copied(name, tmp_path, None, lambda t, n=count: t | dict.fromkeys(copies[:n], t["shared.weight"])))


def test_choose_without_a_fitting_family_names_the_difference():
  cfg = dataclasses.replace(folder("llama").cfg, norm="layernorm", norm_bias=True)
  with pytest.raises(ConfigError, match=r"the nearest is \w+, but for model\.norm"):
    huggingface.choose(cfg)


def test_references_cover_every_family():
  assert {folder(name).family.model_type for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_read_params_of_a_multimodal_folder_takes_its_text_part(prefix, tmp_path):
  said = json.loads((DATA / "gemma3" / "config.json").read_text())
  wrapped = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": said}
  (tmp_path / "config.json").write_text(json.dumps(wrapped))
  found = load_file(DATA / "gemma3" / "model.safetensors")
  found = {prefix + name.removeprefix("model."): x for name, x in found.items()}
  vision = prefix.removesuffix("language_model.").replace("language_model.model.", "") + "vision_tower.x"
  save_file({**found, vision: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, read(tmp_path), loaded("gemma3")[1])


@pytest.mark.slow
def test_hub_configs_have_the_published_parameter_counts():
  """The expected counts are those that the hub shows for the files."""
  for name, entry in json.loads((DATA.parent / "hub_configs.json").read_text()).items():
    cfg = family.read_config(*find(entry["config"], name), entry["config"], name)
    shapes, _ = sharding.abstract_parameters(Transformer(cfg))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == entry["parameters"], name


# Bad input.


def copied(name, tmp_path, config=None, change=None):
  """A folder with changes to its config and tensors."""
  said = json.loads((DATA / name / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**said, **(config or {})}))
  found = load_file(DATA / name / "model.safetensors")
  save_file(change(found) if change else found, tmp_path / "model.safetensors")
  return tmp_path


def read(path):
  f = huggingface.open_folder(path)
  return huggingface.read_params(f, f.cfg, abstract_params(Transformer(f.cfg)))


@pytest.mark.parametrize(
  "name, change, words",
  [
    ("gpt2", {"model_type": "gpt3"}, ["model_type='gpt3'", "`gpt2`"]),
    ("gpt2", {"architectures": ["GPT2ForCausalLM"]}, ["'GPT2ForCausalLM'", "GPT2"]),
    (
      "gpt2",
      {"scale_attn_by_inverse_layer_idx": True},
      ["config.json", "scale_attn_by_inverse_layer_idx=True", "False"],
    ),
    ("gpt2", {"activation_function": "mish"}, ["activation_function='mish'", "gelu_new"]),
    ("llama", {"rope_parameters": {"rope_type": "spiral"}}, ["rope_type='spiral'", "yarn"]),
    ("gemma2", {"layer_types": ["chunked_attention"] * 2}, ["layer_types", "chunked_attention", "sliding_attention"]),
    ("bert", {"position_embedding_type": "relative_key"}, ["position_embedding_type='relative_key'", "absolute"]),
    ("qwen3_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers=[0]"]),
    ("mixtral", {"num_experts_per_tok": 9}, ["experts_per_token=9", "num_experts"]),
    ("gemma2", {"layer_types": ["full_attention"]}, ["layer_types names 1 layers, and there are"]),
    ("gpt2", {"n_layer": 2.0}, ["config.json", "2.0, not a whole number"]),
    ("gpt2", {"architectures": "GPT2LMHead"}, ["'GPT2LMHead'", "GPT2LMHeadModel"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "not supported"]),
    ("qwen3_moe", {"moe_intermediate_size": "wide"}, ["config.json", "wrong kind"]),
    ("llama", {"hidden_size": None}, ["config.json", "wrong kind"]),
    ("t5", {"feed_forward_proj": "gated-mish"}, ["feed_forward_proj='gated-mish'"]),
  ],
)
def test_unsupported_config_field_is_refused_by_name(name, change, words, tmp_path):
  with pytest.raises(ConfigError) as error:
    read(copied(name, tmp_path, change))
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda t: {k: v for k, v in t.items() if "ln_f.bias" not in k}, ["no tensor", "ln_f.bias", "[16]"]),
    (lambda t: {**t, "transformer.h.7.x": np.zeros(3, np.float32)}, ["transformer.h.7.x", "[3]", "no place"]),
    (
      lambda t: {k: v[:-1] if k.endswith("wte.weight") else v for k, v in t.items()},
      ["wte.weight", "[47, 16]", "[48, 16]"],
    ),
  ],
  ids=["missing", "extra", "misshapen"],
)
def test_tensor_that_does_not_fit_is_refused_by_name(change, words, tmp_path):
  with pytest.raises(ConfigError) as error:
    read(copied("gpt2", tmp_path, change=change))
  assert all(word in str(error.value) for word in words), error.value


def test_unused_pretraining_heads_may_remain_in_a_folder(tmp_path):
  """As in bert-base-uncased, which calls itself a BertForMaskedLM and names norms as TensorFlow does."""

  def old(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

  path = copied("bert", tmp_path, {"architectures": ["BertForMaskedLM"]}, lambda t: {old(k): v for k, v in t.items()})
  params, (_, whole) = read(path), loaded("bert")
  jax.tree.map(np.testing.assert_array_equal, params, {k: v for k, v in whole.items() if k in params})
  assert set(whole) - set(params) == {"pooler", "sentence_head"}
  path = copied(
    "bert", tmp_path, {"architectures": ["BertModel"]}, lambda t: {k: v for k, v in t.items() if "pool" not in k}
  )
  assert set(whole) - set(read(path)) == {"pooler", "sentence_head", "head_transform", "head_norm", "head_bias"}


def test_damaged_or_foreign_file_is_refused_by_name(tmp_path):
  path = copied("gpt2", tmp_path)
  whole = (path / "model.safetensors").read_bytes()
  for content, words in (
    (whole[:-100], "truncated"),
    (whole[:40], "beginning is damaged"),
    (b"\x80\x02}q\x00.", "no safetensors file"),
  ):
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
      read(path)
  (path / "model.safetensors").unlink()
  with pytest.raises(ConfigError, match=r"no model\.safetensors"):
    read(path)
  (path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ConfigError, match=r"pickle.*save_pretrained"):
    read(path)
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
  with pytest.raises(ConfigError, match=r"b.safetensors"):
    read(path)
  (path / "config.json").write_text("{")
  with pytest.raises(ConfigError, match=r"config.json is damaged"):
    read(path)
