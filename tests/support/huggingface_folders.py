"""Reference folders of Hugging Face models in tests/testdata/huggingface, which make_huggingface.py wrote.

Float32 rounding between two implementations is a few 1e-6 here. The smallest misreading that was tried, a wrong norm
epsilon, changes logits by 3e-4.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from llmjax.checkpoints.sources.base import abstract_params
from llmjax.interop.folder_reader import open_huggingface_folder, read_folder_params
from llmjax.models.transformer import Transformer
from llmjax.types import Batch

DATA = Path(__file__).parents[1] / "testdata" / "huggingface"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
TOLERANCE = 1e-4

# One folder for each family and head is in the tier default; these have a further option of their family.
OPTIONS = (
  *("gpt_neox_sequential", "llama3", "llama_dynamic", "llama_linear", "llama_yarn", "modernbert_sequence_mean"),
  *("opt_350m_like", "phi3_partial"),
)
DEFAULT = [name for name in NAMES if name not in OPTIONS]
FAST = ("bert", "gpt2", "llama", "mixtral", "t5")
SLOW = ("gemma3", "modernbert")  # with FAST: every kind of layer


@functools.cache
def reference_folder(name):
  return open_huggingface_folder(DATA / name)


@functools.cache
def expected_outputs(name):
  """Return what Transformers computes, see make_huggingface.py."""
  return dict(np.load(DATA / name / "expected.npz"))


def reference_config(name):
  """Return the config of a folder.

  Transformers reads short texts with other frequencies in models with LongRoPE; ours depend on `max_len`. It is set to
  the original context for them.
  """
  cfg = reference_folder(name).cfg
  is_length_dependent = cfg.rotary_scaling is not None and cfg.rotary_scaling.name == "longrope"
  return dataclasses.replace(cfg, max_len=cfg.rotary_scaling.original_max_len) if is_length_dependent else cfg


@functools.cache
def reference_model(name, **changes):
  """Return (model, parameters) with changes of the config."""
  cfg = dataclasses.replace(reference_config(name), **changes)
  model = Transformer(cfg)
  return model, read_folder_params(reference_folder(name), cfg, abstract_params(model))


def reference_batch(name):
  e = expected_outputs(name)
  return Batch.from_tokens(
    e["input_ids"], e.get("attention_mask"), target_ids=e.get("decoder_input_ids"), token_types=e.get("token_type_ids")
  )


@functools.cache
def reference_outputs(name):
  """Return the outputs of our model for the reference batch."""
  model, params = reference_model(name)
  return jax.jit(functools.partial(model.apply, all_hidden=True))({"params": params}, reference_batch(name))


def assert_close(actual, desired, mask=None):
  """Assert that arrays are equal within TOLERANCE, where `mask` is not 0."""
  actual, desired = np.asarray(actual), np.asarray(desired)
  selected = slice(None) if mask is None else np.asarray(mask) > 0
  np.testing.assert_allclose(actual[selected], desired[selected], atol=TOLERANCE, rtol=0)


def copy_reference(name, target, config=None, change_tensors=None):
  """Copy a folder to `target`, with changes of its config.json and its tensors."""
  content = json.loads((DATA / name / "config.json").read_text())
  (target / "config.json").write_text(json.dumps({**content, **(config or {})}))
  tensors = load_file(DATA / name / "model.safetensors")
  save_file(change_tensors(tensors) if change_tensors else tensors, target / "model.safetensors")
  return target


def read_params_of(path):
  """Return the parameters in a folder."""
  folder = open_huggingface_folder(path)
  return read_folder_params(folder, folder.cfg, abstract_params(Transformer(folder.cfg)))
