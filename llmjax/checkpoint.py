"""Checkpoints over Orbax: state, data cursor and manifest together, atomic and asynchronous, onto any mesh.

  WORKDIR/checkpoints/STEP/{state, data, manifest}
The manifest is versioned JSON and says all that is needed to use the parameters without a config file: how to build
the model, the tokenizer's files, the objective, the whole config, package versions.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.metadata
import logging
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from llmjax import hosts
from llmjax.config import ConfigError, default_config
from llmjax.data.buckets import in_bucket, move, place

FORMAT_VERSION = 1
FOLDER = "checkpoints"
HEAD = {"head": "lm", "num_classes": 0, "crf": False}  # of a model, which no config says: that of older ones
SECTIONS = (
  "model",
  "data",
  "optim",
  "checkpoint",
  "log",
  "rules",
  "early_stopping",
)  # of a config, whose keys are fixed
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def make_manifest(program: Any) -> dict[str, Any]:
  """What a checkpoint says about itself besides the step."""
  return {
    "format_version": FORMAT_VERSION,
    "config": program.config,
    "model": program.config["model"],
    "objective": program.config["objective"],
    "tokenizer": pack_tokenizer(program.tokenizer),
    "num_params": program.num_params,
    "total_steps": program.total_steps,
    "layout": "scanned" if program.model.cfg.scan else "unrolled",
    "ema": program.config["optim"]["ema_decay"] is not None,
    "versions": versions() | {"commit": commit()},
  }


def versions() -> dict[str, str]:
  """Of the packages that a checkpoint was made with; processes that run as one must have the same."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


@functools.cache
def commit(root: Path = Path(__file__).parent.parent) -> str | None:
  """Of the code that runs, with "-dirty" where tracked files are changed; None where nothing says it.

  Containers have it in LLMJAX_COMMIT, archives that launchers ship in `.commit`, and else git knows it of a checkout.
  """
  with contextlib.suppress(OSError):
    return os.environ.get("LLMJAX_COMMIT") or (root / ".commit").read_text(encoding="utf-8").strip()
  git = ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
  words = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    # What is installed can lie in somebody else's repository, or be part of one.
    if 'name="llmjax"' in (root / "setup.py").read_text(encoding="utf-8"):
      return subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
  return None


def pack_tokenizer(tokenizer: Any) -> dict[str, Any]:
  """A tokenizer as JSON."""
  files = {name: base64.b64encode(data).decode() for name, data in tokenizer.to_files().items()}
  return {"spec": tokenizer.spec(), "files": files}


def tokenizer_files(manifest: Mapping[str, Any]) -> dict[str, bytes]:
  """The tokenizer's files as `Tokenizer.to_files` gave them."""
  return {name: base64.b64decode(data) for name, data in manifest["tokenizer"]["files"].items()}


def upgraded(manifest: dict[str, Any]) -> dict[str, Any]:
  """A manifest with the default of every config key that there was not yet when it was written."""
  config = manifest["config"]
  for key, default in default_config().items():
    value = config.setdefault(key, default)
    if key in SECTIONS and (key != "model" or value.get("name") == default["name"]):
      config[key] = {**default, **(HEAD if key == "model" else {}), **value}
  if manifest["model"].get("name") == config["model"].get("name"):
    manifest["model"] = {**config["model"], **manifest["model"]}
  return manifest


class Damaged(ConfigError):
  """A checkpoint whose files cannot be read."""


class Checkpoints:
  """The checkpoints of one workdir. Wraps Orbax's manager, whose API still moves, in one place."""

  def __init__(
    self,
    workdir: str | Path,
    *,
    write: bool = False,
    keep: int | None = None,
    keep_every: int | None = None,
    best: str | None = None,
    best_is: str = "least",
  ):
    """Opens them to read, or to write: then tells how many of the latest to keep (None: all; the newest is always
    kept), a period to keep for ever, and a metric whose least (or "most") to keep."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
    keepers: list[Any] = [policies.LatestN(max(keep or 1, 1))]
    if keep_every:
      keepers.append(policies.EveryNSteps(keep_every))
    options: dict[str, Any] = {}
    if best:
      # `max_to_keep` with `best_fn` would delete the newest; these policies do not.

      sign = 1 if best_is == "least" else -1

      def measure(metrics: Any) -> float:
        return sign * metrics[best] if metrics and best in metrics else float("inf")

      keepers.append(policies.BestN(get_metric_fn=measure, reverse=True, n=1))
      options = {"best_fn": measure, "best_mode": "min"}
    workdir = place(workdir)
    self.folder = epath.Path(workdir if in_bucket(workdir) else workdir.resolve()) / FOLDER
    self.manager = ocp.CheckpointManager(
      self.folder,
      item_handlers={
        "state": ocp.PyTreeCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "manifest": ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=None if keep is None else policies.AnyPreservationPolicy(keepers),
        # A reader must not clean up what another process is saving at this moment.
        cleanup_tmp_directories=write,
        read_only=not write,
        **options,
      ),
    )

  def steps(self) -> list[int]:
    """All complete checkpoints, oldest first."""
    return sorted(self.manager.all_steps())

  def save(self, step: int, state: Any, cursor: Any, manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Starts an asynchronous save; blocks only while the state is copied off the devices."""
    if step in self.manager.all_steps():
      return
    parts = {
      "state": ocp.args.PyTreeSave(state),
      "data": ocp.args.JsonSave({"cursor": cursor}),
      "manifest": ocp.args.JsonSave({**manifest, "step": step, "time": time.time(), "metrics": dict(metrics)}),
    }
    self.manager.save(step, args=ocp.args.Composite(**parts), metrics=dict(metrics), force=True)

  def set_aside(self, steps: Iterable[int]) -> None:
    """Moves damaged checkpoints to WORKDIR/damaged, so that others can take their place."""
    self._meet("begin")  # no process still reads what is moved
    if hosts.leader():
      for step in steps:
        move(self.folder / str(step), self.folder.parent / "damaged" / f"{step}-{time.time_ns()}")
    self._meet("end")
    self.manager.reload()

  def _meet(self, when: str) -> None:
    if not hosts.meet(f"{self.folder}/set_aside/{when}", timeout=600):
      raise TimeoutError(f"{self.folder}: not all processes came to set damaged checkpoints aside; run again")

  def newest_manifest(self) -> tuple[int, dict[str, Any]] | None:
    """The newest step whose manifest can be read, and that; None if there is no checkpoint at all.

    Raises Damaged if there are checkpoints, and none of them can be read.
    """
    failure = None
    for step in reversed(self.steps()):
      try:
        return step, self.read(step, "manifest")
      except Damaged as error:
        failure = error
    if failure is not None:
      raise failure
    return None

  def read(self, step: int, item: str) -> Any:
    """`manifest` or `data` of a checkpoint."""
    found = self._load(step, **{item: ocp.args.JsonRestore()})[item]
    return upgraded(found) if item == "manifest" else found

  def _load(self, step: int, **items: Any) -> Any:
    with self._readable(step):
      return self.manager.restore(step, args=ocp.args.Composite(**items))

  @contextlib.contextmanager
  def _readable(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and tensorstore raise anything for a damaged file
      reason = f"checkpoint {self.folder}/{step} cannot be read ({type(error).__name__})"
      raise Damaged(f"{reason}; there are {self.steps()}") from error

  def restore(self, step: int, abstract_state: Any) -> Any:
    """The state, laid out as `abstract_state` says: a tree of ShapeDtypeStructs with shardings.

    Raises:
      ConfigError: parameters or shapes that differ from the checkpoint's, named, before anything is read.
    """
    self._compare(step, abstract_state, whole=True)
    args = ocp.args.PyTreeRestore(abstract_state, ocp.checkpoint_utils.construct_restore_args(abstract_state))
    return self._load(step, state=args)["state"]

  def restore_parts(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """Only some of a state: {"params", "ema" or "frozen": what of it}, as `restore`."""
    self._compare(step, wanted)
    args = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)
    return self._load(step, state=args)["state"]

  def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every array in a checkpoint's state."""
    with self._readable(step):
      tree = self.manager.item_metadata(step)["state"].tree
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {_path(path): tuple(leaf.shape) for path, leaf in leaves if getattr(leaf, "shape", None) is not None}

  def _compare(self, step: int, abstract: Any, *, whole: bool = False) -> None:
    saved = self.shapes(step)
    wanted = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    extra = sorted(saved.keys() - wanted.keys()) if whole else []
    if extra:
      raise ConfigError(
        f"checkpoint {self.folder}/{step} holds {extra[0]}, which this config does not keep; model.* or optim.* changed"
      )
    for name, leaf in wanted.items():
      if name not in saved:
        raise ConfigError(f"checkpoint {self.folder}/{step} has no {name}; it belongs to another model or optimizer")
      if saved[name] != tuple(leaf.shape):
        raise ConfigError(
          f"checkpoint {self.folder}/{step}: {name} has shape {saved[name]}, this config's is {tuple(leaf.shape)}"
        )

  def wait(self) -> None:
    """Until everything is on disk; a failed save raises here."""
    self.manager.wait_until_finished()

  def close(self) -> None:
    self.manager.close()


def _path(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
