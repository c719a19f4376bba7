"""Shipped configs: they build, every key is read, and the models have the published sizes."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

import llmjax
from configs import base
from configs.sizes import SIZES
from llmjax.checkpoints.sources.base import abstract_params
from llmjax.config import ConfigError, optional, values
from llmjax.config import files as cfglib
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.distributed import sharding
from llmjax.models.transformer import Transformer
from llmjax.training import components, program, step
from llmjax.training.evals import EvaluationSchedule
from llmjax.types import dummy_batch
from tests.support.datasets import small_datasets

# Counted from the released checkpoints (Hugging Face model cards and safetensors headers).
PUBLISHED = {
  "gpt2_124m": 124_439_808,
  "gpt2_355m": 354_823_168,
  "gpt2_774m": 774_030_080,
  "gpt2_1.5b": 1_557_611_200,
  "llama2_7b": 6_738_415_616,
  "llama2_13b": 13_015_864_320,
  "llama2_70b": 68_976_648_192,
  "llama3_1b": 1_235_814_400,
  "llama3_3b": 3_212_749_824,
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3_405b": 405_853_388_800,
  # with both pretraining heads
  "bert_base": 110_106_428,
  "bert_large": 336_226_108,
  # without the two position embeddings that are never used
  "roberta_base": 124_697_433 - 2 * 768,
  "roberta_large": 355_412_057 - 2 * 1024,
  "modernbert_base": 149_655_232,
  "modernbert_large": 395_881_664,
  "t5_small": 60_506_624,
  "t5_base": 222_903_552,
  "t5_large": 737_668_096,
  "t5_3b": 2_851_598_336,
  "t5_11b": 11_307_321_344,
  "t5_v1.1_small": 76_961_152,
  "t5_v1.1_base": 247_577_856,
  "t5_v1.1_large": 783_150_080,
  "t5_v1.1_xl": 2_849_757_184,
  "t5_v1.1_xxl": 11_135_332_352,
}
# The GPT-3 paper names its models by rounded counts.
ROUNDED = {
  "gpt3_125m": 125e6,
  "gpt3_350m": 356e6,
  "gpt3_760m": 760e6,
  "gpt3_1.3b": 1.3e9,
  "gpt3_2.7b": 2.65e9,
  "gpt3_6.7b": 6.66e9,
  "gpt3_13b": 12.85e9,
  "gpt3_175b": 174.6e9,
}
# In millions, table 1 of Turc et al. 2019, with both pretraining heads (without them, mini has 11.2).
TABLE = {"bert_tiny": 4.4, "bert_mini": 11.3, "bert_small": 29.1, "bert_medium": 41.7}

UNPUBLISHED = ("debug", "nano", "nano_moe")
NAMED = {name: size for sizes in SIZES.values() for name, size in sizes.items() if name not in UNPUBLISHED}
# One of each architecture; the others are in the tier default.
FAST_SIZES = ("gpt2_124m", "llama3_1b", "bert_base", "roberta_base", "modernbert_base", "t5_small", "t5_v1.1_small")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  with small_datasets(tmp_path_factory.mktemp("datasets")):
    yield


def count_parameters(name):
  model = Transformer(TransformerConfig(**NAMED[name]["model"]))
  init = functools.partial(step.init_params, model=model)
  shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), batch=dummy_batch()))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
  "name", [name if name in FAST_SIZES else pytest.param(name, marks=pytest.mark.slow) for name in NAMED]
)
def test_parameter_count_is_the_published_one(name):
  count = count_parameters(name)
  if name in PUBLISHED:
    assert count == PUBLISHED[name]
  elif name in TABLE:
    assert round(count / 1e6, 1) == TABLE[name]
  else:
    assert abs(count / ROUNDED[name] - 1) < 0.02


def test_sizes_have_published_counts_and_unique_names():
  assert {*PUBLISHED, *ROUNDED, *TABLE} == set(NAMED)
  assert sum(len(set(sizes) - set(UNPUBLISHED)) for sizes in SIZES.values()) == len(NAMED)


CONFIGS = {"gpt": "decoder", "bert": "encoder", "contrastive": "encoder", "t5": "both"}


def load(reference, *flags):
  return cfglib.load_config([f"--config={reference}", *flags])


@pytest.mark.parametrize("name", CONFIGS)
def test_size_loads_with_its_recipe(name):
  for size, entry in SIZES[CONFIGS[name]].items():
    config = load(f"{name}:size={size}")
    assert config.batch_size * config.seq_len == entry["batch_tokens"] and config.optim.lr == entry["lr"], size
    assert values.to_dict(config.optim).items() >= entry.get("optim", {}).items()
  with pytest.raises(ConfigError, match=r"size='big' is unknown"):
    load(f"{name}:size=big")
  with pytest.raises(ConfigError, match=r"optim='adam' is unknown; did you mean `adamw`"):
    load(f"{name}:optim=adam")


@pytest.mark.parametrize(
  "reference",
  [
    *("gpt:size=gpt2_124m", "gpt:size=gpt2_124m,optim=lion", "bert:size=bert_tiny", "bert:size=roberta_base"),
    *("bert:size=modernbert_base", "bert:size=modernbert_base,pairs=order", "t5:size=t5_small"),
    *("t5:size=t5_v1.1_small,optim=muon", "contrastive:size=bert_base", "contrastive:size=bert_base,with_mlm"),
  ],
)
def test_published_recipe_builds(reference):
  tokenizer = make_tokenizer({"name": "bytes", "mask": True, "sentinels": 100})
  built = program.make_program(load(reference), tokenizer=tokenizer)
  assert built.learning_rate(built.total_steps // 2) > 0


def test_bert_sentence_pair_objective_is_the_published_one():
  assert load("bert:size=bert_base").objective.sentence_pairs == "next"
  for size, pairs in (("nano", ""), ("roberta_base", ""), ("modernbert_base", ""), ("bert_base", ",pairs=none")):
    config = load(f"bert:size={size}{pairs}")
    assert config.objective.sentence_pairs == "none" and not config.model.pooler and not config.model.sentence_classes
  config = load("bert:pairs=order,whole_words")
  assert config.objective.whole_words and config.model.pooler and config.model.token_types == 2


def test_contrastive_model_equals_bert_of_the_same_size():
  for size in SIZES["encoder"]:
    assert load(f"contrastive:size={size}").model == load(f"bert:size={size},pairs=none").model, size


def test_contrastive_dropout_views_have_dropout_and_no_retrieval():
  pairs, dropout = load("contrastive"), load("contrastive:views=dropout")
  assert (pairs.objective.anchor, pairs.objective.positive, pairs.objective.symmetric) == ("summary", "text", True)
  assert "retrieval" in pairs.evals and "retrieval" not in dropout.evals
  for config in (dropout, load("contrastive:views=dropout,corpus=lm1b"), load("contrastive:with_mlm,text=my.txt")):
    part = config.objective.get("parts", {}).get("contrastive", config.objective)
    assert config.model.dropout > 0 and part.anchor == "text" and part.positive is None
  with pytest.raises(ConfigError, match="anchor=FIELD is missing"):
    load("contrastive:corpus=lm1b")


def test_contrastive_reads_the_named_fields_of_a_file():
  config = load("contrastive:text=my.csv,column=passage,anchor=query,negative=other")
  assert config.data.corpus.columns == ("other", "query") and config.data.corpus.column == "passage"
  assert (config.objective.anchor, config.objective.negative) == ("query", "other")


def test_base_config_lists_every_model_field_with_its_default():
  listed = values.to_dict(base.get_config().model)
  fields = {f.name: f.default for f in dataclasses.fields(TransformerConfig)}
  listed["rotary_scaling"] = listed["rotary_scaling"] or None
  set_by_objective = {"head", "num_classes", "crf"}
  assert set(listed) == {"name", *fields} - set_by_objective
  assert all(listed[k] == v for k, v in fields.items() if k in listed and v is not dataclasses.MISSING)


# Parts whose unknown keys `build` refuses.
BUILT = ("model", "objective", "optim", "schedule", "data.corpus", "data.tokenizer", "evals")


def unread_keys(config):
  """Return the keys that no line of the library subscripts."""
  source = "".join(path.read_text(encoding="utf-8") for path in Path(llmjax.__file__).parent.rglob("*.py"))
  keys = [k for k in values.flatten_config(config) if not k.startswith(BUILT)]
  return [key for key in keys if not all(f'["{part}"]' in source for part in key.split("."))]


def test_base_config_has_no_unread_key():
  config = base.get_config()
  config.mesh = config.rules = config.early_stopping = optional(None)  # read as a whole
  assert not unread_keys(config)
  config.log.colour = "red"
  assert unread_keys(config) == ["log.colour"]


def test_unknown_key_of_a_built_part_is_refused(datasets):
  for part in ("model", "objective", "optim", "schedule", "data.tokenizer", "evals.heldout"):
    config = values.to_dict(cfglib.load_config(["--config=gpt:debug"]))
    functools.reduce(lambda c, key: c[key], part.split("."), config)["unknown"] = 1
    with pytest.raises(ConfigError, match="unknown"):
      EvaluationSchedule(program.make_program(config))


# smoke_test.py trains all shipped configs as they are.
FAST_REFERENCES = ("gpt:objective=prefix_lm", "bert:pairs=order,whole_words", "t5:", "contrastive:with_mlm", "tag:crf")
SLOW_REFERENCES = ("bert:pairs=next", "contrastive:views=dropout")


@pytest.mark.parametrize(
  "reference", [*FAST_REFERENCES, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_REFERENCES)]
)
def test_config_builds_and_its_step_traces(datasets, reference):
  config = load(f"{reference},debug", "--config.batch_size=8")
  built = program.make_program(config)
  stream = built.make_stream(components.open_source(config, config.data.train), prefetch=0)
  batch = next(stream)
  stream.close()
  with sharding.use_mesh(built.mesh, built.rules):
    state, metrics = jax.eval_shape(
      built.train_step,
      built.state_shapes,
      batch,
      jax.eval_shape(jax.random.key, 0),
      jax.ShapeDtypeStruct((), np.float32),
      {name: abstract_params(model) for name, model in built.auxiliary.items()},
    )
  assert jax.tree.structure(state) == jax.tree.structure(built.state_shapes) and "loss" in metrics


def test_loading_a_config_does_not_change_another():
  first = values.to_dict(load("classify:init_from=a,train=b.csv"))
  for other in ("lora:init_from=a", "lora:task=classify,init_from=a", "dpo:init_from=a", "bert:init_from=a"):
    load(other)
  assert values.to_dict(load("classify:init_from=a,train=b.csv")) == first
