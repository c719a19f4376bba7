"""What a new start does with the run in its workdir: resume it, refuse it, initialise from another, or archive it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmjax.checkpoints.manager import CHECKPOINTS_DIR, Checkpoints, DamagedCheckpoint
from llmjax.checkpoints.paths import load_tokenizer
from llmjax.checkpoints.sources.run import checkpoint_tokenizer
from llmjax.config import ConfigError, ConfigTree, Json, config_differences
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.models.lora import is_adapter
from llmjax.storage.buckets import in_bucket
from llmjax.training.early_stopping import EarlyStopping
from llmjax.training.program import Program
from llmjax.training.step import TrainState

# Config keys (with all keys below them) that must not change when a run is resumed.
IMMUTABLE_KEYS = (
  *("model", "objective", "seed", "batch_size", "seq_len", "optim.name", "ema_decay"),
  *("data.corpus", "data.train", "data.tokenizer", "data.pack", "data.interleave"),
  *("trainable", "auxiliary"),
)
# Keys below them that may change all the same.
MUTABLE_KEYS = (
  *("model.attention", "model.remat", "model.dtype"),
  *("model.dropout", "model.attention_dropout", "model.mlp_dropout"),
)


def restore_or_init(program: Program, checkpoints: Checkpoints) -> tuple[TrainState, int, Json]:
  """Return the train state, its step and the data cursor.

  They come from the newest sound checkpoint of the workdir, else from init_from, else from fresh parameters (then the
  step is 0 and the cursor None). Damaged checkpoints that are newer are skipped, and moved out of the way.

  Raises:
    ConfigError: there are checkpoints, and all are damaged.
  """
  damaged: list[int] = []
  for step in reversed(checkpoints.steps()):
    try:
      state = checkpoints.restore(step, program.abstract_state)
      cursor = checkpoints.read_cursor(step)
      checkpoints.read_manifest(step)
    except DamagedCheckpoint as error:
      damaged.append(step)
      print(f"{error}; trying an older one")
      continue
    if damaged:
      checkpoints.archive_damaged(damaged)
    return state, step, cursor
  if damaged:
    raise ConfigError(f"no checkpoint of {damaged} in {checkpoints.folder} can be read; --fresh starts a new run")
  params, initialized = program.starting_params()
  if initialized:
    names = [name for name in initialized if not is_adapter(name)]
    names += ["adapters"] if any(map(is_adapter, initialized)) else []
    print(f"initialised, because {program.config['init_from']} does not have them: {', '.join(names)}")
  return program.init(params), 0, None


def read_previous_manifest(workdir: Path) -> dict[str, Json] | None:
  """Return the manifest of the newest checkpoint in `workdir`, None if there is no checkpoint."""
  if not (workdir / CHECKPOINTS_DIR).is_dir():
    return None
  checkpoints = Checkpoints(workdir)
  try:
    newest = checkpoints.newest_manifest()
    return newest[1] if newest else None
  finally:
    checkpoints.close()


def tokenizer_to_reuse(config: ConfigTree, previous: Mapping[str, Json] | None) -> Tokenizer | None:
  """Return the tokenizer that the parameters were trained with, None to make that of the config.

  A resumed run uses the tokenizer in its checkpoints, so that ids are the same even if caches are lost. A run with
  init_from uses that of init_from, because the embeddings belong to its ids.

  Raises:
    ConfigError: data.tokenizer.path is another tokenizer than that of init_from.
  """
  spec = config["data"]["tokenizer"]
  if previous is not None:
    if config_differences(previous["config"]["data"]["tokenizer"], spec):
      return None  # `check_resumable` refuses it
    return checkpoint_tokenizer(dict(previous), trust=True)
  if config["init_from"] is None:
    return None
  tokenizer = load_tokenizer(config["init_from"])  # untrusted: it must not name code outside llmjax
  if spec.get("path") is not None and make_tokenizer(spec).to_files() != tokenizer.to_files():
    raise ConfigError(
      f"data.tokenizer.path={spec['path']!r} is not the tokenizer of init_from={config['init_from']!r}; set it to none"
    )
  return tokenizer


def labels_to_reuse(config: ConfigTree, previous: Mapping[str, Json] | None) -> dict[str, Json]:
  """Return the labels that a resumed run with init_from has inferred, for keys of config.objective that are None."""
  if previous is None or config["init_from"] is None:
    return {}
  old, new = previous["config"]["objective"], config["objective"]
  if old["name"] != new.get("name"):
    return {}
  return {key: old[key] for key in ("labels", "scheme") if key in old and new.get(key, ()) is None}


def check_resumable(
  previous: Mapping[str, Json], manifest: Mapping[str, Json], workdir: Path
) -> dict[str, tuple[Json, Json]]:
  """Return the config keys that changed since the run in `workdir`, as {key: (old, new)}.

  Raises:
    ConfigError: a key of IMMUTABLE_KEYS or the content of the data has changed.
  """
  changed = config_differences(previous["config"], manifest["config"])
  starts_from_itself = any(entry["init_from"] is None for entry in manifest["config"]["auxiliary"].values())
  immutable = (*IMMUTABLE_KEYS, *(["init_from"] if starts_from_itself else []))
  way_out = "change it back, use another --workdir, or --fresh to archive the old run"
  same_data = previous["data_fingerprint"] == manifest["data_fingerprint"]
  for key, (old, new) in changed.items():
    if same_data and key == "data.corpus.files":
      continue  # the same text in another place
    if key not in MUTABLE_KEYS and any(key == part or key.startswith(part + ".") for part in immutable):
      raise ConfigError(f"{workdir} holds a run with {key}={old!r}, now {new!r}; {way_out}")
  if not same_data:
    raise ConfigError(f"{workdir} holds a run on other data: the content of data.corpus has changed; {way_out}")
  return changed


def check_archivable(workdir: Path) -> None:
  """Raise ConfigError for a run in a bucket, whose objects would have to be copied and deleted one by one."""
  if in_bucket(workdir) and workdir.exists():
    raise ConfigError(
      f"--fresh: {workdir} holds a run, and a folder in a bucket cannot be renamed; use another --workdir, "
      f"or move it first: gcloud storage mv {workdir} {workdir}.1"
    )


def archive_run(workdir: Path) -> None:
  """Rename the workdir to WORKDIR.1, .2, ...; nothing is deleted."""
  if workdir.exists() and any(workdir.iterdir()):
    number = next(i for i in range(1, 10**6) if not Path(f"{workdir}.{i}").exists())
    workdir.rename(f"{workdir}.{number}")
    print(f"moved the earlier run to {workdir}.{number}")


def is_finished(workdir: Path, total_steps: int) -> bool:
  """Whether the run in `workdir` has made `total_steps` steps, or has stopped early."""
  manifest = read_previous_manifest(workdir)
  if manifest is None:
    return False
  stopper = EarlyStopping(**manifest["config"]["early_stopping"])
  stopper.restore(manifest.get("early_stopping"))
  return stopper.should_stop or manifest["step"] >= total_steps


def finish_message(workdir: Path, manifest: Mapping[str, Json], step: int, stopped_early: bool = False) -> str:
  """Return the last lines that a run prints: its metrics, and how to continue it."""
  metrics = {name: value for name, value in manifest.get("metrics", {}).items() if isinstance(value, float)}
  numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
  if stopped_early:
    way_on = "to continue anyway, repeat the command with a larger --config.early_stopping.patience"
  else:
    way_on = f"to extend it, repeat the command with --config.total_steps={2 * step}"
  return f"{workdir} is finished at {step:,} steps: {numbers or 'no evaluations'}\n{way_on}"
