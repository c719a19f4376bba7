"""A PATH resolved to model, parameters and tokenizer: an own checkpoint, a Hugging Face folder, a name on the hub."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh, SingleDeviceSharding

from llmjax import checkpoint, sharding
from llmjax.config import ConfigError, build, default_config, resolve
from llmjax.data import hf_tokenizer
from llmjax.data import tokenizer as tokenizers
from llmjax.data.hf_formats import VOCABULARIES
from llmjax.interop import family, hub, huggingface
from llmjax.models.config import TransformerConfig
from llmjax.models.layout import HEADS
from llmjax.models.transformer import MODELS
from llmjax.objectives import OBJECTIVES
from llmjax.types import Objective

HEAD_FIELDS = (  # of a config: what is behind the last layer
  *("head", "num_classes", "pooling", "head_transform", "head_bias"),
  *("pooler", "pooler_activation", "sentence_classes"),
)
INHERITED = ("family", "generation")
LENGTH = 1024  # tokens that a Hugging Face model is evaluated on at a time, where its folder does not say
SAME = "pretrained"  # config.model.name: the model of init_from


class Pretrained(NamedTuple):
  """What `load` returns: `model, params, tokenizer = llmjax.load(PATH)`."""

  model: nn.Module
  params: Any
  tokenizer: Any


@dataclasses.dataclass(frozen=True)
class Source:
  """What is behind a PATH; its parameters are not read yet.

  Attributes:
    path: as the user gave it; `place`: the folder that this is.
    manifest: what a checkpoint says about itself, see `checkpoint.make_manifest`.
    read_params: (model, shapes with shardings, whether a head may be left behind) -> parameters.
    read_tokenizer: trust -> the tokenizer, or None.
  """

  path: str
  place: Path
  manifest: dict[str, Any]
  read_params: Callable[[Any, Any, bool], Any]
  read_tokenizer: Callable[[bool], Any]

  @property
  def config(self) -> dict[str, Any]:
    """The config of the run; of a Hugging Face folder the defaults, with its model."""
    return self.manifest["config"]

  def make_model(self, trust: bool = False, **changes: Any) -> nn.Module:
    """The model, with some of its config's fields changed."""
    return build({**self.manifest["model"], **changes}, MODELS, "model", trust=trust)

  def load(
    self, trust: bool = False, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES, **changes: Any
  ) -> Pretrained:
    """See `llmjax.pretrained.load`."""
    tokenizer = self.read_tokenizer(trust)
    model = self.make_model(trust, **changes)
    return Pretrained(model, self.read_params(model, abstract_params(model, mesh, rules), False), tokenizer)

  def tokenizer(self, trust: bool = False) -> Any:
    """Raises ConfigError where there is none."""
    found = self.read_tokenizer(trust)
    if found is None:
      hf_tokenizer.from_folder(self.place)  # says what was looked for
    return found

  def objective(self, trust: bool = False) -> Objective:
    """What the model was trained on; one that names code outside llmjax, also in a part, needs `trust`."""
    spec = self.config["objective"]
    if spec is None:
      head = self.manifest["model"]["head"]
      raise ConfigError(f"{self.path} has a head on a {head} and no objective that says how well it does")
    if not trust:
      check_trusted(spec)
    return build(spec, OBJECTIVES, "objective", tokenizer=self.tokenizer(trust), seq_len=self.config["seq_len"])


@contextlib.contextmanager
def open_path(path: str | Path) -> Iterator[Source]:
  """What PATH means, until the block ends.

  Args:
    path: a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP, a Hugging Face folder, or a hub name such as
      gpt2 or org/name@revision: looked for among local folders, then in the Hugging Face cache, then downloaded.
  Raises:
    ConfigError: nothing is there, or it is damaged, or from a newer format.
  """
  if is_huggingface(path):
    yield _open_folder(str(path), Path(path))
  elif Path(path).exists() or not hub.is_name(str(path)):
    checkpoints, step, manifest = open_checkpoint(path)
    try:
      yield _open_own(str(path), checkpoints, step, manifest)
    finally:
      checkpoints.close()
  else:
    yield _open_folder(str(path), hub.fetch(str(path)))


def is_huggingface(path: str | Path) -> bool:
  return (Path(path) / huggingface.CONFIG).is_file() and not (Path(path) / checkpoint.FOLDER).is_dir()


def load(
  path: str | Path,
  *,
  trust: bool = False,
  mesh: Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
  **changes: Any,
) -> Pretrained:
  """Model, parameters (the average, where one was kept) and tokenizer from a PATH; needs no config file.

  Args:
    path: see `open_path`.
    trust: allow a checkpoint to name a model outside llmjax, which runs its code.
    mesh: where the parameters lie, cut by `rules`; None is the first device.
    changes: fields of the model's config that shall be others, such as dtype="bfloat16" or max_len=4096.
  Raises:
    ConfigError: see `open_path`.
  """
  with open_path(path) as source:
    return source.load(trust, mesh, rules, **changes)


def abstract_params(model: nn.Module, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES) -> Any:
  """The parameters as ShapeDtypeStructs with shardings: over a mesh, or on the first device.

  Raises:
    ConfigError: a dimension that its mesh axes do not divide.
  """
  shapes, axes = sharding.parameters(model)
  if mesh is None:
    first = SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: first, shapes)
  else:
    where = sharding.param_shardings(shapes, axes, mesh, rules)
  return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, where)


def check_trusted(objective: Any) -> None:
  """Refuses every `name` that is none of llmjax's objectives in an objective's config."""
  if isinstance(objective, dict):
    if "name" in objective:
      resolve(objective["name"], OBJECTIVES, "objective", trust=False)
    for part in objective.values():
      check_trusted(part)
  elif isinstance(objective, (list, tuple)):
    for part in objective:
      check_trusted(part)


# What starts from a PATH: `config.init_from`.


def load_tokenizer(path: str | Path, *, trust: bool = False) -> Any:
  """Only the tokenizer of a PATH."""
  with open_path(path) as source:
    return source.tokenizer(trust)


def load_params(path: str | Path, model: nn.Module, abstract: Any) -> Any:
  """Only the parameters, for a model of the same shape, but for what is behind its last layer."""
  with open_path(path) as source:
    return source.read_params(model, abstract, True)


def inherited(path: str | Path | None) -> dict[str, Any]:
  """What a run keeps of the manifest that it starts from: which family it is of, and how it shall generate."""
  if path is None:
    return {}
  with open_path(path) as source:
    return {key: source.manifest[key] for key in INHERITED if key in source.manifest}


def same_model(config: Mapping[str, Any]) -> dict[str, Any]:
  """config.model where its name is "pretrained": that of `init_from`, with the fields that are not None changed."""
  changes = {key: value for key, value in config["model"].items() if key != "name" and value is not None}
  if config["init_from"] is None:
    raise ConfigError(f"model.name={SAME!r} is the model of init_from, which is not set; set it, or another model.name")
  with open_path(config["init_from"]) as source:
    spec = source.manifest["model"]
    resolve(spec["name"], MODELS, "model", trust=False)
    return {**spec, **changes}


# Own checkpoints.


def locate(path: str | Path) -> tuple[Path, int | None]:
  """(workdir, step) of a PATH; step None is the newest."""
  path = Path(path)
  if (path / checkpoint.FOLDER).is_dir():
    return path, None
  if path.name.isdigit() and path.parent.name == checkpoint.FOLDER and path.is_dir():
    return path.parent.parent, int(path.name)
  if not path.exists():
    raise ConfigError(f"{path}: no such workdir, checkpoint or Hugging Face folder")
  raise ConfigError(
    f"{path} holds no checkpoint; give a workdir of `llmjax train`, WORKDIR/{checkpoint.FOLDER}/STEP, or a Hugging "
    f"Face folder with {huggingface.CONFIG} and safetensors"
  )


def open_checkpoint(path: str | Path) -> tuple[checkpoint.Checkpoints, int, dict[str, Any]]:
  """The checkpoints that PATH points into, the step it means, and that step's manifest."""
  workdir, step = locate(path)
  checkpoints = checkpoint.Checkpoints(workdir)
  if step is not None and step not in checkpoints.steps():
    raise ConfigError(f"{path} is no complete checkpoint; there are {checkpoints.steps()}")
  found = checkpoints.newest_manifest() if step is None else (step, checkpoints.read(step, "manifest"))
  if found is None:
    raise ConfigError(f"{path} holds no complete checkpoint")
  step, manifest = found
  if manifest["format_version"] > checkpoint.FORMAT_VERSION:
    raise ConfigError(f"{path} was written by a newer llmjax (format {manifest['format_version']}); update llmjax")
  return checkpoints, step, manifest


def checkpoint_tokenizer(manifest: dict[str, Any], *, trust: bool = False) -> Any:
  """The tokenizer that a checkpoint carries, None where it has none."""
  if manifest["tokenizer"] is None:
    return None
  return tokenizers.from_files(manifest["tokenizer"]["spec"], checkpoint.tokenizer_files(manifest), trust=trust)


def _open_own(path: str, checkpoints: checkpoint.Checkpoints, step: int, manifest: dict[str, Any]) -> Source:
  part = "ema" if manifest["ema"] else "params"

  def read_params(model: Any, abstract: Any, headless: bool) -> Any:
    if headless:
      saved = {name.removeprefix(f"{part}/") for name in checkpoints.shapes(step) if name.startswith(f"{part}/")}
      leaves = jax.tree_util.tree_leaves_with_path(abstract)
      left = sorted(saved - {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves})
      lost = [name for name in left if not name.startswith(HEADS)]
      if lost:
        raise ConfigError(
          f"init_from={path}: its {lost[0]} has no place in this model, which would compute something else without "
          "it; set model.* as it was there"
        )
    return checkpoints.restore_part(step, part, abstract)

  return Source(path, Path(path), manifest, read_params, lambda trust: checkpoint_tokenizer(manifest, trust=trust))


# Hugging Face folders.


def _open_folder(path: str, place: Path) -> Source:
  folder = huggingface.open_folder(place)
  has_tokenizer = any((place / name).is_file() for names in VOCABULARIES for name in names)

  def read_params(model: Any, abstract: Any, headless: bool) -> Any:
    different = family.differences(model.cfg, folder.cfg)
    for field in sorted(set(different) - {"max_len"} - set(HEAD_FIELDS if headless else ())):
      ours, theirs = different[field]
      raise ConfigError(f"init_from={path}: model.{field}={ours!r}, and there it is {theirs!r}; set it as it is there")
    return huggingface.read_params(folder, model.cfg, abstract)

  def read_tokenizer(trust: bool) -> Any:
    return hf_tokenizer.from_folder(place) if has_tokenizer else None

  spec = {"name": "transformer", **dataclasses.asdict(folder.cfg)}
  return Source(path, place, _describe(folder, spec), read_params, read_tokenizer)


def _describe(folder: huggingface.Folder, spec: dict[str, Any]) -> dict[str, Any]:
  """The manifest that a folder would have as a checkpoint."""
  sentences = huggingface.read_sentence_settings(folder.path)
  config = default_config()
  config["model"] = spec
  config["seq_len"] = min(sentences.get("seq_len", LENGTH), folder.cfg.max_len)
  config["batch_size"] = 8
  config["objective"] = dict(folder.family.objective) if folder.cfg.head == "lm" else None
  if "pooling" in sentences:
    config["objective"] = {"name": "contrastive", "pooling": sentences["pooling"]}
  config["data"] |= {"tokenizer": {"name": "hf", "path": str(folder.path)}}
  return {
    "format_version": checkpoint.FORMAT_VERSION,
    "config": config,
    "model": spec,
    "objective": config["objective"],
    "family": folder.family.model_type,
    "architecture": folder.architecture,
    "labels": family.labels(folder.config) if folder.cfg.head in ("sequence", "token") else None,
    "generation": huggingface.read_generation(folder.path, folder.config),
    "ema": False,
    "total_steps": 0,
    "metrics": {},
    "layout": "scanned",
  }


def cfg_of(model: Any) -> TransformerConfig:
  """A model's config; a model of one's own has none that could be exported."""
  if not isinstance(getattr(model, "cfg", None), TransformerConfig):
    raise ConfigError("the model is none of llmjax's Transformers, and no Hugging Face architecture is known for it")
  return model.cfg
