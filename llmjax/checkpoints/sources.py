"""A PATH resolved to model, parameters and tokenizer: an own checkpoint, a Hugging Face folder, a name on the hub."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh, SingleDeviceSharding

from llmjax.checkpoints import manager
from llmjax.checkpoints.manifest import FORMAT_VERSION, tokenizer_files
from llmjax.config import ConfigError, build, default_config, resolve_callable, to_dict
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers import base as tokenizers
from llmjax.data.tokenizers.hf_formats import VOCABULARIES
from llmjax.data.tokenizers.huggingface import from_folder
from llmjax.distributed import sharding
from llmjax.interop import family, hub, huggingface, peft
from llmjax.interop.families import FAMILIES
from llmjax.models.layer_stacks import HEAD_PREFIXES
from llmjax.models.lora import is_adapter
from llmjax.models.transformer import MODELS
from llmjax.objectives import OBJECTIVES, tag_scheme
from llmjax.objectives.task import FRESH_HEAD, NOTHING
from llmjax.storage.buckets import as_path, fetch_folder, in_bucket
from llmjax.trees import flatten_tree, unflatten_tree
from llmjax.types import Model, Objective

HEAD_FIELDS = (  # of a config: what is behind the last layer
  *("head", "num_classes", "pooling", "head_transform", "head_bias"),
  *("pooler", "pooler_activation", "sentence_classes", "crf"),
)
OUTPUTS = ("head/", "head_bias/", "head_transform/", "head_norm/", "crf/")  # parameters of one kind of head alone
Rules = Sequence[tuple[str, str | None]]
INHERITED_ENTRIES = ("family", "generation")
DEFAULT_SEQ_LEN = 1024  # tokens that a Hugging Face model is evaluated on at a time, where its folder does not say
FROM_PRETRAINED = "pretrained"  # config.model.name: the model of init_from


class Pretrained(NamedTuple):
  """What `load` returns: `model, params, tokenizer = llmjax.load(PATH)`."""

  model: nn.Module
  params: Any
  tokenizer: Any


@dataclasses.dataclass(frozen=True)
class PretrainedSource:
  """What is behind a PATH; its parameters are not read yet.

  Attributes:
    path: as the user gave it; `place`: the folder that this is.
    manifest: what a checkpoint says about itself, see `checkpoint.make_manifest`.
    read_params: (model, shapes with shardings, rules) -> parameters. With rules (see `load_params`) it gives what it
      has for the model, without them all or a ConfigError.
    read_tokenizer: trust -> the tokenizer, or None.
  """

  path: str
  place: Path
  manifest: dict[str, Any]
  read_params: Callable[[Any, Any, Rules | None], Any]
  read_tokenizer: Callable[[bool], Any]

  @property
  def config(self) -> dict[str, Any]:
    """The config of the run; of a Hugging Face folder the defaults, with its model."""
    return self.manifest["config"]

  def make_model(self, trust: bool = False, **changes: Any) -> nn.Module:
    """The model, with some of its config's fields changed."""
    return build({**with_auto_attention(self.manifest["model"]), **changes}, MODELS, "model", trust=trust)

  def load(
    self, trust: bool = False, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES, **changes: Any
  ) -> Pretrained:
    """See `llmjax.checkpoints.sources.load`."""
    tokenizer = self.read_tokenizer(trust)
    model = self.make_model(trust, **changes)
    return Pretrained(model, self.read_params(model, abstract_params(model, mesh, rules), None), tokenizer)

  def tokenizer(self, trust: bool = False) -> Any:
    """Raises ConfigError where there is none."""
    found = self.read_tokenizer(trust)
    if found is None:
      from_folder(self.place)  # says what was looked for
    return found

  def objective(self, trust: bool = False) -> Objective:
    """What the model was trained on; one that names code outside llmjax, also in a part, needs `trust`."""
    spec = self.config["objective"]
    if spec is None:
      head = self.manifest["model"]["head"]
      raise ConfigError(f"{self.path} has a head on a {head} and no objective that says how well it does")
    if not trust:
      check_trusted(spec)
    return make_objective(spec, self.tokenizer(trust), self.config["seq_len"], self.manifest["model"])


def with_auto_attention(spec: Mapping[str, Any]) -> dict[str, Any]:
  """A model's config for other devices and lengths than it learned with: the kernel is chosen again."""
  return {**spec, "attention": "auto"} if "attention" in spec else dict(spec)


@contextlib.contextmanager
def open_path(path: str | Path) -> Iterator[PretrainedSource]:
  """What PATH means, until the block ends.

  Args:
    path: a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP or /best, a Hugging Face folder, a folder of
      adapters as PEFT writes it, or a hub name such as gpt2 or org/name@revision: looked for among local folders, then
      in the Hugging Face cache, then downloaded. Workdirs, checkpoints and Hugging Face folders may be in a bucket.
  Raises:
    ConfigError: nothing is there, or it is damaged, or from a newer format.
  """
  if peft.is_adapter_folder(path):
    with open_path(peft.base_path(path)) as base:
      yield _open_adapter(str(path), base)
  elif is_huggingface_folder(path):
    yield _open_folder(str(path), fetch_folder(str(path)) if in_bucket(path) else Path(path))
  elif as_path(path).exists() or not hub.is_name(str(path)):
    checkpoints, step, manifest = open_checkpoint(path)
    try:
      yield _open_own(str(path), checkpoints, step, manifest)
    finally:
      checkpoints.close()
  else:
    yield _open_folder(str(path), hub.fetch(str(path)))


def is_huggingface_folder(path: str | Path) -> bool:
  folder = as_path(path)
  return (folder / huggingface.CONFIG).is_file() and not (folder / manager.FOLDER).is_dir()


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


def abstract_params(model: Model, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES) -> Any:
  """The parameters as ShapeDtypeStructs with shardings: over a mesh, or on the first device.

  Raises:
    ConfigError: a dimension that its mesh axes do not divide.
  """
  shapes, axes = sharding.abstract_parameters(model)
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
      resolve_callable(objective["name"], OBJECTIVES, "objective", trust=False)
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


def load_params(path: str | Path, model: Model, abstract: Any, rules: Rules = ()) -> tuple[Any, list[str]]:
  """Parameters for a model of the same shape, but for what is behind its last layer and its adapters.

  Args:
    abstract: the model's parameters as ShapeDtypeStructs with shardings.
    rules: ((regex, replacement or None), ...) over the paths of the model's parameters: what they are called there, as
      in `re.sub`, or None for those that shall not be read; the first that matches a whole path counts.
  Returns:
    those that are there, and the paths of the others, which start afresh.
  Raises:
    ConfigError: a parameter of another shape or in the body of the model is missing; a rule that matches nothing.
  """
  for rule in rules:
    pair = isinstance(rule, (tuple, list)) and len(rule) == 2
    if not pair or not isinstance(rule[0], str) or not isinstance(rule[1], (str, type(None))):
      raise ConfigError(f"init_map: {rule!r} is not a rule; a rule is (regex, name there or None)")
    try:
      matched = [re.sub(rule[0], rule[1] or "", name) for name in flatten_tree(abstract) if re.fullmatch(rule[0], name)]
    except re.error as error:
      raise ConfigError(f"init_map: {rule!r} is no regular expression and replacement: {error}") from None
    if not matched:
      raise ConfigError(
        f"init_map: {rule[0]!r} matches no parameter (a regex must match a whole path, such as "
        f"{next(iter(flatten_tree(abstract)))!r}); mend or remove it"
      )
  with open_path(path) as source:
    params = source.read_params(model, abstract, rules)
  return params, sorted(set(flatten_tree(abstract)) - set(flatten_tree(params)))


def source_name(rules: Rules, name: str) -> str | None:
  """What a parameter is called where it is read from; None where it is not read."""
  for regex, replacement in rules:
    if re.fullmatch(regex, name):
      return None if replacement is None else re.sub(regex, replacement, name)
  return name


def may_be_reinitialized(name: str) -> bool:
  """Whether a parameter may start afresh where there is none to read: a head, an adapter."""
  return name.startswith(HEAD_PREFIXES) or is_adapter(name)


def inherited_manifest_entries(path: str | Path | None) -> dict[str, Any]:
  """What a run keeps of the manifest that it starts from: which family it is of, and how it shall generate."""
  if path is None:
    return {}
  with open_path(path) as source:
    return {key: source.manifest[key] for key in INHERITED_ENTRIES if key in source.manifest}


def labels_of_init(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """The objective of init_from, with the "path", where a config that names no labels goes on with the head of some;
  else nothing."""
  path, ours = config["init_from"], config["objective"]
  if path is None or ours.get("labels", ()) is not None or source_name(config["init_map"], "head/kernel") is None:
    return NOTHING
  with open_path(path) as source:
    theirs = source.config["objective"] or {}
  return {**theirs, "path": path} if theirs.get("labels") and theirs["name"] == ours["name"] else NOTHING


def make_objective(
  spec: Any,
  tokenizer: Any,
  seq_len: int,
  model: Mapping[str, Any],
  records: Any = None,
  learned: Mapping[str, Any] = NOTHING,
) -> Objective:
  """The objective of a config.

  Args:
    model: config.model, of which the kind of stacks is looked at.
    records: opens the training split, for what the config leaves open.
    learned: see `learned_labels`.
  """
  encoder, decoder = model.get("encoder_layers"), model.get("decoder_layers")
  stacks = "both" if encoder and decoder else "encoder" if encoder else "decoder"
  runtime = {"tokenizer": tokenizer, "seq_len": seq_len, "stacks": stacks, "records": records, "learned": learned}
  return build(spec, OBJECTIVES, "objective", **runtime)


def with_head_fields(
  spec: Mapping[str, Any], head: Mapping[str, Any], model_type: str | None, asked: Mapping[str, Any]
) -> dict[str, Any]:
  """A model's config with the head that an objective needs.

  Where that is of another kind than the model's own, what stands before it is as the family has it, else plain.

  Args:
    spec: the model's.
    head: `Objective.head`.
    model_type: the family that the model is of, where one is known.
    asked: config.model; what it says of the fields of HEAD_FIELDS goes before what families have.
  """
  if spec["name"] not in MODELS:  # a model of one's own knows what it is made for
    return dict(spec)
  if spec.get("head", head["head"]) == head["head"]:
    return {**spec, **head}
  known = FAMILIES[model_type].heads.values() if model_type is not None and model_type in FAMILIES else ()
  fields: Mapping[str, Any] = next((h.fields for h in known if h.fields.get("head", "lm") == head["head"]), {})
  encoder = bool(spec.get("encoder_layers")) and not spec.get("decoder_layers")
  plain = {
    "head_transform": False,
    "head_bias": head["head"] != "lm" and not fields,
    "pooler": False,
    "sentence_classes": 0,
    "pooling": "first" if encoder else "last",
  }
  own = {k: v for k, v in asked.items() if k in HEAD_FIELDS and v is not None and asked["name"] == FROM_PRETRAINED}
  return {**spec, **plain, **fields, **own, **head}


def pretrained_model_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
  """config.model where its name is "pretrained": that of `init_from`, with the fields that are not None changed; and
  the family that it is of, where one is known."""
  changes = {key: value for key, value in config["model"].items() if key != "name" and value is not None}
  if config["init_from"] is None:
    raise ConfigError(
      f"model.name={FROM_PRETRAINED!r} is the model of init_from, which is not set; set it, or another model.name"
    )
  with open_path(config["init_from"]) as source:
    spec = source.manifest["model"]
    resolve_callable(spec["name"], MODELS, "model", trust=False)
    return {**spec, **changes}, source.manifest.get("family")


# Own checkpoints.


def locate_checkpoint(path: str | Path) -> tuple[Path, int | None]:
  """(workdir, step) of a PATH; step None is the newest."""
  path = as_path(path)
  if (path / manager.FOLDER).is_dir():
    return path, None
  if path.name == "best" and path.parent.name == manager.FOLDER and path.parent.is_dir():
    return path.parent.parent, best_step(path.parent.parent)
  if path.name.isdigit() and path.parent.name == manager.FOLDER and path.is_dir():
    return path.parent.parent, int(path.name)
  if not path.exists():
    raise ConfigError(f"{path}: no such workdir, checkpoint or Hugging Face folder")
  raise ConfigError(
    f"{path} holds no checkpoint; give a workdir of `llmjax train`, WORKDIR/{manager.FOLDER}/STEP, or a Hugging "
    f"Face folder with {huggingface.CONFIG} and safetensors"
  )


def best_step(workdir: Path) -> int:
  """The checkpoint of a workdir that is best in its config.checkpoint.best."""
  checkpoints = manager.Checkpoints(workdir)
  manifests = {step: checkpoints.read(step, "manifest") for step in checkpoints.steps()}
  checkpoints.close()
  said = manifests[max(manifests)]["config"]["checkpoint"] if manifests else {"best": None}
  measured = {step: m["metrics"][said["best"]] for step, m in manifests.items() if said["best"] in m["metrics"]}
  if not measured:
    raise ConfigError(
      f"{workdir}/{manager.FOLDER}/best: no checkpoint has a number of checkpoint.best={said['best']!r}; give STEP"
    )
  return (max if said["best_mode"] == "max" else min)(measured, key=lambda step: measured[step])


def open_checkpoint(path: str | Path) -> tuple[manager.Checkpoints, int, dict[str, Any]]:
  """The checkpoints that PATH points into, the step it means, and that step's manifest."""
  workdir, step = locate_checkpoint(path)
  checkpoints = manager.Checkpoints(workdir)
  if step is not None and step not in checkpoints.steps():
    raise ConfigError(f"{path} is no complete checkpoint; there are {checkpoints.steps()}")
  found = checkpoints.newest_manifest() if step is None else (step, checkpoints.read(step, "manifest"))
  if found is None:
    raise ConfigError(f"{path} holds no complete checkpoint")
  step, manifest = found
  if manifest["format_version"] > FORMAT_VERSION:
    raise ConfigError(f"{path} was written by a newer llmjax (format {manifest['format_version']}); update llmjax")
  return checkpoints, step, manifest


def checkpoint_tokenizer(manifest: dict[str, Any], *, trust: bool = False) -> Any:
  """The tokenizer that a checkpoint carries, None where it has none."""
  if manifest["tokenizer"] is None:
    return None
  return tokenizers.from_files(manifest["tokenizer"]["spec"], tokenizer_files(manifest), trust=trust)


def _open_own(path: str, checkpoints: manager.Checkpoints, step: int, manifest: dict[str, Any]) -> PretrainedSource:
  learned = "ema" if manifest["ema"] else "params"

  def read_params(model: Any, abstract: Any, rules: Rules | None) -> Any:
    saved = checkpoints.shapes(step)
    split = (name.partition("/") for name in saved)
    parts = {name: part for part, _, name in split if part in (learned, "frozen")}
    wanted: dict[str, tuple[str, Any]] = {}  # {path here: (path there, leaf)}
    for name, leaf in flatten_tree(abstract).items():
      there = source_name(rules or (), name)
      if there is None or (rules is not None and there not in parts and may_be_reinitialized(there)):
        continue
      shape = saved.get(f"{parts.get(there)}/{there}")
      if rules is not None and shape not in (None, tuple(leaf.shape)) and name.startswith(OUTPUTS):
        if model.cfg.head != manifest["model"].get("head", "lm"):
          continue
        raise _other_head(path, name, leaf.shape, shape)
      wanted[name] = there, leaf
    if rules is not None:
      left = set(parts) - {there for there, _ in wanted.values()}
      lost = sorted(n for n in left if not n.startswith(HEAD_PREFIXES) and source_name(rules, n) is not None)
      if lost:
        raise ConfigError(
          f"init_from={path}: its {lost[0]} has no place in this model, which would compute something else without "
          "it; set model.* as it was there"
        )
    tree: dict[str, dict[str, Any]] = {}
    for there, leaf in wanted.values():
      tree.setdefault(parts.get(there, learned), {})[there] = leaf
    restored = checkpoints.restore_parts(step, {part: unflatten_tree(leaves) for part, leaves in tree.items()})
    found = {name: leaf for part in restored.values() for name, leaf in flatten_tree(part).items()}
    return unflatten_tree({name: found[there] for name, (there, _) in wanted.items()})

  return PretrainedSource(
    path, as_path(path), manifest, read_params, lambda trust: checkpoint_tokenizer(manifest, trust=trust)
  )


def _other_head(path: str, name: str, ours: Any, theirs: Any) -> ConfigError:
  return ConfigError(
    f"init_from={path}: {name} is of size {list(theirs)} there and {list(ours)} here, a head for other classes; "
    f"{FRESH_HEAD}"
  )


# Hugging Face folders.


def _open_folder(path: str, place: Path) -> PretrainedSource:
  folder = huggingface.open_folder(place)
  has_tokenizer = any((place / name).is_file() for names in VOCABULARIES for name in names)

  def read_params(model: Any, abstract: Any, rules: Rules | None) -> Any:
    different = family.differences(model.cfg, folder.cfg)
    for field in sorted(set(different) - {"max_len"} - set(() if rules is None else HEAD_FIELDS)):
      ours, theirs = different[field]
      raise ConfigError(f"init_from={path}: model.{field}={ours!r}, and there it is {theirs!r}; set it as it is there")
    if rules is None:
      return huggingface.read_params(folder, model.cfg, abstract)
    if any(replacement is not None for _, replacement in rules):
      raise ConfigError(
        f"init_map: {path} is a Hugging Face folder, of which names are known; only None is of use here"
      )
    cfg = model.cfg
    if cfg.head == folder.cfg.head and cfg.num_classes != folder.cfg.num_classes:
      fresh = [
        name for name in flatten_tree(abstract) if name.startswith(OUTPUTS) and source_name(rules, name) is not None
      ]
      if fresh:
        raise _other_head(path, fresh[0], (cfg.num_classes,), (folder.cfg.num_classes,))

    kept = _shared(folder, cfg.head)

    def skip(name: str) -> bool:
      other = cfg.head != folder.cfg.head and name.startswith(OUTPUTS) and name not in kept
      return other or source_name(rules, name) is None

    return huggingface.read_params(folder, cfg, abstract, skip, may_be_reinitialized)

  def read_tokenizer(trust: bool) -> Any:
    return from_folder(place) if has_tokenizer else None

  spec = {"name": "transformer", **dataclasses.asdict(folder.cfg)}
  return PretrainedSource(path, place, _describe(folder, spec), read_params, read_tokenizer)


def _shared(folder: huggingface.Folder, kind: str) -> set[str]:
  """Parameters behind the last layer that a folder's architecture shares with its family's for another kind of head, as
  ModernBERT's do the projection before it."""

  def held(head: family.Head) -> set[tuple[str, str]]:
    return {(path, tensor) for tensor, parts in head.names.items() for path, _ in parts}

  heads = folder.family.heads
  other = next((held(head) for head in heads.values() if head.fields.get("head", "lm") == kind), set())
  return {path for path, _ in held(heads[folder.architecture]) & other}


def _open_adapter(path: str, base: PretrainedSource) -> PretrainedSource:
  """A model with PEFT's adapter on it."""
  adapter = peft.open_adapter(path)
  cfg = transformer_config_of(base.make_model())
  own = peft.family_of(base.manifest, cfg)
  spec, head = {**base.manifest["model"], "lora_rank": 0}, peft.read_head(adapter, own, cfg)
  spec = with_head_fields(spec, head, own.model_type, {"name": spec["name"]}) if head else spec
  settings, found = peft.read_adapter(adapter, own, transformer_config_of(build(spec, MODELS, "model", trust=False)))
  spec |= settings

  def read_params(model: Any, abstract: Any, rules: Rules | None) -> Any:
    def skip(name: str) -> bool:
      if rules is None:
        return False
      other = name.startswith(OUTPUTS if model.cfg.head != spec["head"] else ()) or (
        name.startswith(HEAD_PREFIXES) and name not in flatten_tree(abstract)
      )
      return other or source_name(rules, name) is None

    here = peft.place(adapter, found, model.cfg, abstract, skip)
    kernels = unflatten_tree({name: leaf for name, leaf in flatten_tree(abstract).items() if not is_adapter(name)})
    skipped = [(r".*lora_[ab]", None), *((re.escape(name), None) for name in here if not is_adapter(name))]
    there = flatten_tree(base.read_params(model, kernels, (*skipped, *(rules or ()))))
    there |= here
    missing = set(flatten_tree(abstract)) - set(there)
    if missing and rules is None:
      raise ConfigError(f"{path}: neither it nor {base.path} has {min(missing)}")
    return unflatten_tree(there)

  labels = [f"LABEL_{i}" for i in range(head.get("num_classes", 0))]
  task = _infer_objective(head["head"], labels, None, base.config["seq_len"]) if head else None
  objective = task or base.manifest["objective"]
  manifest = base.manifest | {"model": spec, "config": base.config | {"model": spec, "objective": objective}}
  manifest |= {"objective": objective, "family": own.model_type, "ema": False, "total_steps": 0}
  manifest |= {"architecture": f"{own.model_type} with an adapter"}
  if head:
    manifest["labels"] = labels
  return dataclasses.replace(base, path=path, manifest=manifest, read_params=read_params)


def _infer_objective(head: str, labels: Sequence[str], problem: str | None, seq_len: int) -> dict[str, Any]:
  """The objective that a head of Hugging Face's was trained with; `problem` is the problem_type of a config.json."""
  if head == "span":
    part = seq_len // 4
    return {"name": "span_qa", "stride": min(128, part), "max_question": min(64, part)}
  if head == "token":
    return {"name": "tagging", "labels": tuple(labels), "scheme": tag_scheme.guess(labels)}
  if problem == "regression" or len(labels) == 1:
    return {"name": "classification", "kind": "regression", "labels": ()}
  kind = "multi" if problem == "multi_label_classification" else "single"
  return {"name": "classification", "kind": kind, "labels": tuple(labels)}


def _describe(folder: huggingface.Folder, spec: dict[str, Any]) -> dict[str, Any]:
  """The manifest that a folder would have as a checkpoint."""
  sentences = huggingface.read_sentence_settings(folder.path)
  config = to_dict(default_config())
  config["model"] = spec
  config["seq_len"] = min(sentences.get("seq_len", DEFAULT_SEQ_LEN), folder.cfg.max_len)
  config["batch_size"] = 8
  labels = family.labels(folder.config) if folder.cfg.head in ("sequence", "token") else None
  if folder.cfg.head == "lm":
    config["objective"] = dict(folder.family.objective)
  else:
    config["objective"] = _infer_objective(
      folder.cfg.head, labels or (), folder.config.get("problem_type"), config["seq_len"]
    )
  if "pooling" in sentences:
    config["objective"] = {"name": "contrastive", "pooling": sentences["pooling"]}
  config["data"] |= {"tokenizer": {"name": "hf", "path": str(folder.path)}}
  return {
    "format_version": FORMAT_VERSION,
    "config": config,
    "model": spec,
    "objective": config["objective"],
    "family": folder.family.model_type,
    "architecture": folder.architecture,
    "labels": labels,
    "generation": huggingface.read_generation(folder.path, folder.config),
    "ema": False,
    "total_steps": 0,
    "metrics": {},
    "layout": "scanned",
  }


def transformer_config_of(model: Any) -> TransformerConfig:
  """A model's config; a model of one's own has none that could be exported."""
  if not isinstance(getattr(model, "cfg", None), TransformerConfig):
    raise ConfigError("the model is none of llmjax's Transformers, and no Hugging Face architecture is known for it")
  return model.cfg
