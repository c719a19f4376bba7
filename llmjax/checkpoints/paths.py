"""PATHs, which refer to pretrained models: a run's checkpoint, a Hugging Face folder, an adapter or a hub name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jax.sharding import Mesh

from llmjax.checkpoints.manager import CHECKPOINTS_DIR
from llmjax.checkpoints.sources.adapter import AdapterSource
from llmjax.checkpoints.sources.base import Pretrained, PretrainedSource
from llmjax.checkpoints.sources.huggingface_folder import HuggingFaceSource
from llmjax.checkpoints.sources.run import RunSource, open_checkpoint
from llmjax.config import Json
from llmjax.config.mesh import RULES, Rules
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.interop.folder_settings import CONFIG_FILE
from llmjax.interop.hub import fetch_from_hub, is_hub_name
from llmjax.interop.peft.adapter_folder import adapter_base_path, is_adapter_folder
from llmjax.storage.buckets import as_path, fetch_folder, in_bucket


@contextlib.contextmanager
def open_path(path: str | Path) -> Iterator[PretrainedSource]:
  """Yield the pretrained model that PATH refers to.

  Args:
    path: one of
      - a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP or WORKDIR/checkpoints/best;
      - a Hugging Face folder;
      - a folder with an adapter in the format of PEFT;
      - a hub name such as gpt2 or org/name@revision, which is searched in the Hugging Face cache, then downloaded.
      Local folders come before hub names. Workdirs, checkpoints and Hugging Face folders may be in a bucket.

  Raises:
    ConfigError: nothing is there, or it is damaged, or of a newer format.
  """
  if is_adapter_folder(path):
    with open_path(adapter_base_path(path)) as base:
      yield AdapterSource(str(path), base)
  elif is_huggingface_folder(path):
    yield HuggingFaceSource(str(path), fetch_folder(str(path)) if in_bucket(path) else Path(path))
  elif as_path(path).exists() or not is_hub_name(str(path)):
    checkpoints, step, manifest = open_checkpoint(path)
    try:
      yield RunSource(str(path), checkpoints, step, manifest)
    finally:
      checkpoints.close()
  else:
    yield HuggingFaceSource(str(path), fetch_from_hub(str(path)))


def is_huggingface_folder(path: str | Path) -> bool:
  """Whether a folder has a config.json and is not a run."""
  folder = as_path(path)
  return (folder / CONFIG_FILE).is_file() and not (folder / CHECKPOINTS_DIR).is_dir()


def load(
  path: str | Path, *, trust: bool = False, mesh: Mesh | None = None, rules: Rules = RULES, **changes: Json
) -> Pretrained:
  """Return model, parameters and tokenizer of a PATH. Needs no config file.

  Args:
    path: see `open_path`.
    trust: allow a checkpoint to name a model outside llmjax, whose code then runs.
    mesh: devices that the parameters are sharded over by `rules`; None: the first device.
    changes: fields of the model's config with other values, such as dtype="bfloat16" or max_len=4096.

  Returns:
    The model, its parameters (the moving average if the run has one), and the tokenizer or None.

  Raises:
    ConfigError: see `open_path`.
  """
  with open_path(path) as source:
    return source.load(trust, mesh, rules, **changes)


def load_tokenizer(path: str | Path, *, trust: bool = False) -> Tokenizer:
  """Return only the tokenizer of a PATH."""
  with open_path(path) as source:
    return source.tokenizer(trust)
