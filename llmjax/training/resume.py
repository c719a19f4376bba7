"""What a rerun does with the run that it finds: continue it, refuse, start from another, or move it aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmjax.checkpoints.manager import FOLDER, Checkpoints, DamagedCheckpoint
from llmjax.checkpoints.sources import checkpoint_tokenizer, load_tokenizer
from llmjax.config import ConfigError, config_differences
from llmjax.data.tokenizers import base as tokenizers
from llmjax.models.lora import is_adapter
from llmjax.storage.buckets import in_bucket
from llmjax.training.early_stopping import EarlyStopping
from llmjax.training.program import Program
from llmjax.training.step import TrainState

# What a checkpoint cannot be continued with once it is changed.
IMMUTABLE_KEYS = (
  *("model", "objective", "seed", "batch_size", "seq_len", "optim.name", "optim.ema_decay"),
  *("data.corpus", "data.train", "data.tokenizer", "data.pack", "data.interleave"),
  *("trainable", "auxiliary"),
)
# What of it may change all the same.
MUTABLE_KEYS = (
  *("model.attention", "model.remat", "model.dtype"),
  *("model.dropout", "model.attention_dropout", "model.mlp_dropout"),
)


def restore_or_init(program: Program, checkpoints: Checkpoints) -> tuple[TrainState, int, Any]:
  """State, its step and the data cursor: this workdir's newest sound checkpoint, else init_from, else from scratch."""
  failures: list[int] = []
  for step in reversed(checkpoints.steps()):
    try:
      state = checkpoints.restore(step, program.abstract_state)
      cursor = checkpoints.read(step, "data")["cursor"]
      checkpoints.read(step, "manifest")
    except DamagedCheckpoint as error:
      failures.append(step)
      print(f"{error}; trying an older one")
      continue
    if failures:
      checkpoints.set_aside(failures)
    return state, step, cursor
  if failures:
    raise ConfigError(f"no checkpoint of {failures} in {checkpoints.folder} can be read; --fresh starts anew")
  params, fresh = program.starting_params()
  if fresh:
    named = [name for name in fresh if not is_adapter(name)] + (["adapters"] if any(map(is_adapter, fresh)) else [])
    print(f"not in {program.config['init_from']}, and so started afresh: {', '.join(named)}")
  return program.init(params), 0, None


def read_previous_manifest(workdir: Path) -> dict[str, Any] | None:
  """The manifest of the newest checkpoint in `workdir`, if there is one."""
  if not (workdir / FOLDER).is_dir():
    return None
  checkpoints = Checkpoints(workdir)
  try:
    found = checkpoints.newest_manifest()
    return found[1] if found else None
  finally:
    checkpoints.close()


def tokenizer_to_reuse(config: Any, earlier: dict[str, Any] | None) -> Any:
  """The tokenizer that parameters were trained with: this workdir's, when the config still asks for it, so that ids
  are the same even where caches are gone; else that of `init_from`, since its embeddings mean nothing to another."""
  if earlier is not None:
    same = not config_differences(earlier["config"]["data"]["tokenizer"], config["data"]["tokenizer"])
    return checkpoint_tokenizer(earlier, trust=True) if same else None
  if config["init_from"] is None:
    return None
  kept = load_tokenizer(config["init_from"])  # it may be a stranger's, so it may not name code outside llmjax
  spec = config["data"]["tokenizer"]
  if spec.get("path") is not None and tokenizers.make_tokenizer(spec).to_files() != kept.to_files():
    raise ConfigError(
      f"data.tokenizer.path={spec['path']!r} is not the tokenizer of init_from={config['init_from']!r}; set it to none"
    )
  return kept


def labels_to_reuse(config: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
  """What the run in this workdir found out of its labels, of the keys of config.objective that are None: what it
  started from has no more say in them."""
  if earlier is None or config["init_from"] is None:
    return {}
  known, ours = earlier["config"]["objective"], config["objective"]
  same = known["name"] == ours.get("name")
  return {key: known[key] for key in ("labels", "scheme") if same and key in known and ours.get(key, ()) is None}


def check_resumable(earlier: dict[str, Any], manifest: dict[str, Any], workdir: Path) -> dict[str, tuple[Any, Any]]:
  """What changed since the run in `workdir`, as {key: (old, new)}; refuses what it cannot be continued with."""
  changed = config_differences(earlier["config"], manifest["config"])
  frozen = manifest["config"]["auxiliary"].values()
  fixed = (*IMMUTABLE_KEYS, *(["init_from"] if any(entry["init_from"] is None for entry in frozen) else []))
  way_out = "change it back, use another --workdir, or --fresh to move the old run aside"
  same_data = earlier["data_fingerprint"] == manifest["data_fingerprint"]
  for key, (old, new) in changed.items():
    if same_data and key == "data.corpus.files":
      continue  # the same text in another place
    if key not in MUTABLE_KEYS and any(key == f or key.startswith(f + ".") for f in fixed):
      raise ConfigError(f"{workdir} holds a run with {key}={old!r}, now {new!r}; {way_out}")
  if not same_data:
    raise ConfigError(f"{workdir} holds a run on other data: the content of data.corpus has changed; {way_out}")
  return changed


def check_archivable(workdir: Path) -> None:
  """Refuses to move a run in a bucket: its objects would be copied and deleted one by one."""
  if in_bucket(workdir) and workdir.exists():
    raise ConfigError(
      f"--fresh: {workdir} holds a run, and a folder in a bucket cannot be moved aside at once; use another --workdir, "
      f"or move it first: gcloud storage mv {workdir} {workdir}.1"
    )


def archive_run(workdir: Path) -> None:
  """Moves an earlier run to WORKDIR.1, .2, ...: nothing is ever deleted."""
  if workdir.exists() and any(workdir.iterdir()):
    number = next(i for i in range(1, 10**6) if not Path(f"{workdir}.{i}").exists())
    workdir.rename(f"{workdir}.{number}")
    print(f"moved the earlier run to {workdir}.{number}")


def is_finished(workdir: Path, steps: int) -> bool:
  """Whether the run in `workdir` has come to its end, after so many steps or early."""
  found = read_previous_manifest(workdir)
  if found is None:
    return False
  stopper = EarlyStopping(**found["config"]["early_stopping"])
  stopper.restore(found.get("early_stopping"))
  return stopper.should_stop or found["step"] >= steps


def finish_message(workdir: Path, manifest: dict[str, Any], step: int, early: bool = False) -> str:
  """The last words of a run; `early`: it stopped before its end."""
  numbers = ", ".join(f"{k} {v:.4f}" for k, v in manifest.get("metrics", {}).items() if isinstance(v, float))
  return f"{workdir} is finished at {step:,} steps: {numbers or 'no evaluations'}\n" + (
    "to go on all the same, repeat the command with a larger --config.early_stopping.patience"
    if early
    else f"to extend it, repeat the command with --config.total_steps={2 * step}"
  )
