"""muP: unchanged programs at the base width, and the published rules for wider models."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from llmjax import trees
from llmjax.config import ConfigError
from llmjax.interop.folder_writer import choose_family
from llmjax.models import mup
from llmjax.models.transformer import Transformer
from llmjax.training import optimizers, step
from llmjax.types import dummy_batch
from tests.support import cases
from tests.support.tiers import by_tier

COMMON = {
  **{"lr": 1.0, "weight_decay": 0.1, "decay_mask": ((".*", True),), "clip_norm": None},
  **{"lr_scale": ((".*", 1.0),), "layer_decay": None},
}


def make_tx(cfg, params, axes, **keys):
  return optimizers.make_optimizer({"name": "adamw", **COMMON, **keys}, params, axes, ratios=cfg.width_ratios)


def lowered_programs(case, **changes):
  """Return the texts of the programs of initialization and of the train step."""
  cfg = dataclasses.replace(case.cfg, **changes)
  model, (params, axes) = Transformer(cfg), cases.parameters(cfg)
  batch, key, tx = cases.make_batch(case), jax.random.key(0), make_tx(cfg, params, axes)
  train = functools.partial(step.train_step, model=model, objective=case.objective, tx=tx, accum=1, ema_decay=None)
  state = jax.eval_shape(lambda params: step.make_train_state(params, tx, False), params)
  return jax.jit(model.init).lower(key, batch).as_text(), jax.jit(train).lower(state, batch, key, 1e-2).as_text()


@pytest.mark.parametrize("name", by_tier(["gemma causal_lm", "t5 span_corruption"], ["gemma causal_lm"]))
def test_programs_at_base_width_equal_programs_without_mup(name):
  """Equal programs give identical results; above the base width they differ."""
  case = cases.CASES[name]
  plain = lowered_programs(case)
  assert lowered_programs(case, base_width=case.cfg.d_model, base_head_dim=case.cfg.head_width) == plain
  wider = lowered_programs(case, base_width=case.cfg.d_model // 4)
  assert wider[0] != plain[0] and wider[1] != plain[1]


# Table 8 of Yang et al. 2022 for four times the base's fan-in and fan-out, with twice as many heads of twice the width.
RATIOS = {"embed": 4.0, "mlp": 4.0, "head": 4.0, "norm": 4.0, "heads": 2.0, "kv_heads": 2.0, "head_dim": 2.0}
TABLE = {  # axes: (initial standard deviation, multiplier, rate of Adam, of gradient descent)
  ("vocab", "embed"): (1, 1, 1, 4),
  ("positions", "embed"): (1, 1, 1, 4),
  ("layers", "norm"): (1, 1, 1, 4),
  ("layers", "heads", "head_dim"): (1, 1, 1, 4),
  ("buckets", "heads"): (1, 1, 1, 2),
  ("layers", "embed", "heads", "head_dim"): (1 / 2, 1, 1 / 4, 1),
  ("layers", "heads", "head_dim", "embed"): (1 / 2, 1, 1 / 4, 1),
  ("layers", "mlp", "embed"): (1 / 2, 1, 1 / 4, 1),
  ("layers", "experts", "embed", "mlp"): (1 / 2, 1, 1 / 4, 1),
  ("head", "embed"): (1 / 2, 1, 1 / 4, 1),
  ("embed", "vocab"): (1, 1 / 4, 1, 4),
  ("embed", "classes"): (1, 1 / 4, 1, 4),
  ("layers", "embed", "experts"): (1, 1 / 4, 1, 4),
  ("vocab",): (1, 1, 1, 1),
  ("classes", "classes"): (1, 1, 1, 1),
  ("layers", "mlp", "lora"): (1 / 2, 1, 1 / 4, 1 / 4),
  ("layers", "lora", "embed"): (1, 1, 1, 4),
}


@pytest.mark.parametrize("axes", TABLE, ids="-".join)
def test_mup_scales_equal_table_8_of_the_paper(axes):
  unstacked = mup.strip_stacked_axes(axes)
  rates = [mup.lr_multiplier({"name": name}, unstacked, RATIOS) for name in ("adamw", "sgd")]
  assert (mup.init_scale(unstacked, RATIOS), mup.input_multiplier(unstacked, RATIOS), *rates) == TABLE[axes]
  stddev, _, adam, _ = TABLE[axes]
  assert mup.lr_multiplier({"name": "lion"}, unstacked, RATIOS) == adam
  assert mup.lr_multiplier({"name": "adafactor", "parameter_scale": False}, unstacked, RATIOS) == adam
  # `parameter_scale` multiplies the rate by the parameter's own scale.
  assert mup.lr_multiplier({"name": "adafactor", "parameter_scale": True}, unstacked, RATIOS) * stddev == adam
  orthogonal = mup.matrix_input_dims(unstacked) is not None and "lora" not in unstacked
  assert mup.lr_multiplier({"name": "muon", "consistent_rms": None}, unstacked, RATIOS) == (1 if orthogonal else adam)
  assert mup.lr_multiplier({"name": "muon", "consistent_rms": 0.2}, unstacked, RATIOS) == (
    1 / 2 if orthogonal else adam
  )


@pytest.mark.parametrize("init_stddev", [0.15, pytest.param(None, marks=pytest.mark.slow)])
def test_mup_initial_values_of_hidden_matrices_are_smaller(init_stddev):
  cfg = dataclasses.replace(cases.MIXTRAL, init_stddev=init_stddev)
  based = dataclasses.replace(cfg, base_width=cfg.d_model // 4)
  axes = trees.flatten_tree(cases.parameters(cfg)[1])
  standard, scaled = (trees.flatten_tree(initial_parameters(c)) for c in (cfg, based))
  natural = 1.0 if init_stddev is None else 0.5  # 1 / sqrt(fan-in) depends on the width already
  for path, names in axes.items():
    hidden = mup.matrix_input_dims(mup.strip_stacked_axes(names)) is not None
    ratio = natural if hidden else 2 * natural if names[-1] in mup.READOUT_AXES else 1
    ratio = 2 if path == "embedding/table" and init_stddev is None else ratio
    np.testing.assert_allclose(scaled[path], ratio * standard[path], rtol=1e-5, err_msg=path)


def initial_parameters(cfg):
  return jax.device_get(nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(0), dummy_batch())["params"]))


@pytest.mark.parametrize(
  "changes", [{}, {"tie_embeddings": False}, {"head": "sequence", "num_classes": 3, "pooling": "last"}]
)
def test_mup_readouts_are_divided_by_the_width_multiplier(changes):
  cfg = dataclasses.replace(cases.GPT, **changes)
  params, batch = cases.parameters(cfg)[0], cases.make_batch(cases.CASES["gpt causal_lm"])
  based = dataclasses.replace(cfg, base_width=cfg.d_model // 4)
  # Not compiled as a whole: XLA rounds logits near zero differently if the division is part of a fusion.
  standard, scaled = (Transformer(c).apply({"params": params}, batch) for c in (cfg, based))
  np.testing.assert_array_equal(standard.hidden, scaled.hidden)
  np.testing.assert_allclose(np.asarray(standard.logits) / 4, scaled.logits, rtol=1e-5)


def test_mup_score_scale_follows_the_head_width_only():
  base = dataclasses.replace(cases.GPT, num_heads=2)  # heads of 16
  wide = dataclasses.replace(base, d_model=128, d_ff=192, base_width=32, base_head_dim=16)  # and of 64
  assert base.score_scale == 1 / 4 and wide.score_scale == pytest.approx(4 / 64)
  more = dataclasses.replace(base, num_heads=8, d_model=128, base_width=32)
  assert more.score_scale == base.score_scale
  t5 = dataclasses.replace(cases.T5, num_heads=2, d_model=128, base_width=32, base_head_dim=16)
  assert t5.score_scale == pytest.approx(1 / 4) and t5.query_scale == 1 / 4
  for cfg in (wide, more):
    assert (cfg.base_d_model, cfg.width_ratios["embed"]) == (32, 4)
    assert cfg.width_ratios["heads"] * cfg.width_ratios["head_dim"] == 4


def test_mup_does_not_scale_weight_decay_and_multiplies_lr_scale():
  cfg = dataclasses.replace(cases.GPT, base_width=cases.GPT.d_model // 4)
  axes = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "bias": ("mlp",), "table": ("vocab", "embed")}
  params = {name: np.full((2,) * len(names), 3.0, np.float32) for name, names in axes.items()}

  def direction(grad, **keys):
    tx = make_tx(cfg, params, axes, **keys)
    grads = jax.tree.map(lambda x: np.full_like(x, grad), params)
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    return {name: float(x.mean()) for name, x in jax.device_get(update(grads, params)).items()}

  assert direction(0.0) == pytest.approx(dict.fromkeys(axes, 0.3))
  rules = (("up", 3.0), (".*", 1.0))
  assert direction(1.0, weight_decay=0.0, lr_scale=rules) == pytest.approx(
    {"up": 3 / 4, "down": 1 / 4, "bias": 1, "table": 1}, rel=1e-4
  )


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"base_width": 0}, ["model.base_width=0", "at least 1"]),
    ({"base_head_dim": 8}, ["model.base_head_dim=8 needs model.base_width"]),
    ({"base_width": 4}, ["model.base_width=4: 4 heads of 8", "set model.base_head_dim", "model.num_heads"]),
  ],
)
def test_config_rejects_invalid_base_width_in_one_line(changes, words):
  with pytest.raises(ConfigError) as error:
    dataclasses.replace(cases.GPT, **changes)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_huggingface_export_rejects_base_width():
  plain = dataclasses.replace(cases.GPT, d_ff=None)
  assert choose_family(plain)[1] == "GPT2LMHeadModel"
  with pytest.raises(ConfigError, match=r"no architecture .* but for model.base_width=16 \(there None\)"):
    choose_family(dataclasses.replace(plain, base_width=16))
