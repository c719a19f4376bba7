"""Patterns of tensors, and safetensors files."""

import json

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.interop.tensors import merge_parameters, parameter_view, parse_pattern, tensor_shape
from tests.support.huggingface_folders import copy_reference, read_params_of

H, A, D = 2, 3, 4


@pytest.mark.parametrize(
  ("patterns", "shapes", "expected"),
  [
    (["F D -> D F"], [(4, 5)], lambda tensor: [tensor.T]),
    (["(H A) D -> D H A"], [(D, H, A)], lambda tensor: [tensor.reshape(H, A, D).transpose(2, 0, 1)]),
    (["2+P D -> P D"], [(5, D)], lambda tensor: [tensor[2:]]),
    (["[F] D -> D F", "[F] D -> D F"], [(D, 3), (D, 2)], lambda tensor: [tensor[:3].T, tensor[3:].T]),
    (
      ["(H [A]) D -> D H A"] * 3,
      [(D, H, A)] * 3,
      lambda tensor: [tensor.reshape(H, 3, A, D)[:, i].transpose(2, 0, 1) for i in range(3)],
    ),
  ],
  ids=["transpose", "heads", "skipped rows", "fused", "fused by head"],
)
def test_pattern_views_and_merges_its_parameters(patterns, shapes, expected):
  patterns = [parse_pattern(pattern) for pattern in patterns]
  shape = tensor_shape(patterns, shapes)
  tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  views = [parameter_view(tensor, patterns, shapes, i) for i in range(len(patterns))]
  for view, array in zip(views, expected(tensor), strict=True):
    np.testing.assert_array_equal(view, array)
    assert np.shares_memory(view, tensor)
  merged = merge_parameters(views, patterns)
  skip = patterns[0].tensor[0].skip
  np.testing.assert_array_equal(merged[skip:], tensor[skip:])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda content: content[:-100], "truncated"),
    (lambda content: content[:40], "beginning is damaged"),
    (lambda content: b"\x80\x02}q\x00.", "not a safetensors file"),
  ],
  ids=["truncated", "header", "other format"],
)
def test_damaged_safetensors_file_is_refused(change, words, tmp_path):
  file = copy_reference("gpt2", tmp_path) / "model.safetensors"
  file.write_bytes(change(file.read_bytes()))
  with pytest.raises(ConfigError, match=words):
    read_params_of(tmp_path)


def test_folder_without_safetensors_names_pickles_and_missing_shards(tmp_path):
  folder = copy_reference("gpt2", tmp_path)
  (folder / "model.safetensors").unlink()
  with pytest.raises(ConfigError, match=r"no model\.safetensors"):
    read_params_of(folder)
  (folder / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ConfigError, match=r"pickle.*save_pretrained"):
    read_params_of(folder)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
  with pytest.raises(ConfigError, match=r"b.safetensors, which does not exist"):
    read_params_of(folder)
