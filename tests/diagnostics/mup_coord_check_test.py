"""Coordinate check of muP on a character model."""

import functools

import jax
import pytest

from llmjax.config import load_config
from llmjax.diagnostics.mup_coord_check import activation_changes, change_slopes, mup_scale_table
from llmjax.training.program import make_program


def char_config(home, width, base_width):
  """Return the config of a character model of a width, with muP if `base_width` is a number."""
  text = home / "t.txt"
  text.write_text("".join(f"{i}: the quick fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(200)))
  keys = {
    **{"model.d_model": width, "model.num_heads": width // 16, "model.base_width": base_width},
    **{"seq_len": 16, "batch_size": 4, "data.corpus.chunk": 17, "optim.lr": 2e-3, "schedule.warmup": "none"},
    "total_steps": 9,
  }
  flags = [f"--config.{key}={value}" for key, value in keys.items()]
  return load_config([f"--config=char:text={text},debug,recipe=nanogpt", *flags])


@pytest.mark.slow
def test_activation_changes_have_flat_slopes_with_mup_only(home):
  measure = functools.partial(activation_changes, steps=4, devices=jax.devices()[:1])
  wide = measure({size: char_config(home, size, 64) for size in (64, 128, 512)})
  assert set(wide) == {"layer_0", "layer_1", "layer_2", "hidden", "logits"}
  slopes = change_slopes(wide)
  assert all(abs(slope) < 0.2 for slope in slopes.values()), slopes
  plain = measure({512: char_config(home, 512, "none")})  # the same as muP at 64
  slopes = change_slopes({name: {64: wide[name][64]} | by for name, by in plain.items()})
  assert slopes["logits"] > 0.4 and slopes["layer_2"] > 0.4, slopes


def test_mup_scale_table_has_the_multipliers_of_each_parameter(home):
  table = mup_scale_table(make_program(char_config(home, 128, 64), devices=jax.devices()[:1]))
  rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
  assert rows["decoder/layers/mlp/up/kernel"] == ["0.7071", "1", "0.5"] and rows["embedding/table"] == ["1", "1", "1"]
