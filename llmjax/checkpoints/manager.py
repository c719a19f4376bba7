"""Checkpoints over Orbax: state, data cursor and manifest together, atomic and asynchronous, onto any mesh.

  WORKDIR/checkpoints/STEP/{state, data, manifest}
The manifest is versioned JSON and says all that is needed to use the parameters without a config file: how to build
the model, the tokenizer's files, the objective, the whole config, package versions.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from llmjax.checkpoints.manifest import upgrade_manifest
from llmjax.config import ConfigError
from llmjax.distributed import processes
from llmjax.storage.buckets import as_path, in_bucket, move_folder

FOLDER = "checkpoints"


class DamagedCheckpoint(ConfigError):
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
    mode: str = "min",
  ):
    """Opens them to read, or to write: then tells how many of the latest to keep (None: all; the newest is always
    kept), a period to keep for ever, and a metric whose least (or "max") to keep."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
    keepers: list[Any] = [policies.LatestN(max(keep or 1, 1))]
    if keep_every:
      keepers.append(policies.EveryNSteps(keep_every))
    options: dict[str, Any] = {}
    if best:
      # `max_to_keep` with `best_fn` would delete the newest; these policies do not.

      sign = 1 if mode == "min" else -1

      def measure(metrics: Any) -> float:
        return sign * metrics[best] if metrics and best in metrics else float("inf")

      keepers.append(policies.BestN(get_metric_fn=measure, reverse=True, n=1))
      options = {"best_fn": measure, "best_mode": "min"}
    workdir = as_path(workdir)
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
    if processes.is_primary_process():
      for step in steps:
        move_folder(self.folder / str(step), self.folder.parent / "damaged" / f"{step}-{time.time_ns()}")
    self._meet("end")
    self.manager.reload()

  def _meet(self, when: str) -> None:
    if not processes.barrier(f"{self.folder}/set_aside/{when}", timeout=600):
      raise TimeoutError(f"{self.folder}: not all processes came to set damaged checkpoints aside; run again")

  def newest_manifest(self) -> tuple[int, dict[str, Any]] | None:
    """The newest step whose manifest can be read, and that; None if there is no checkpoint at all.

    Raises Damaged if there are checkpoints, and none of them can be read.
    """
    failure = None
    for step in reversed(self.steps()):
      try:
        return step, self.read(step, "manifest")
      except DamagedCheckpoint as error:
        failure = error
    if failure is not None:
      raise failure
    return None

  def read(self, step: int, item: str) -> Any:
    """`manifest` or `data` of a checkpoint."""
    found = self._load(step, **{item: ocp.args.JsonRestore()})[item]
    return upgrade_manifest(found) if item == "manifest" else found

  def _load(self, step: int, **items: Any) -> Any:
    with self._readable(step):
      return self.manager.restore(step, args=ocp.args.Composite(**items))

  @contextlib.contextmanager
  def _readable(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and tensorstore raise anything for a damaged file
      reason = f"checkpoint {self.folder}/{step} cannot be read ({type(error).__name__})"
      raise DamagedCheckpoint(f"{reason}; there are {self.steps()}") from error

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
