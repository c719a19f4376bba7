"""Checkpoints over Orbax: state, data cursor and manifest together, saved atomically and asynchronously.

  WORKDIR/checkpoints/STEP/{state, data, manifest}

A state is restored onto any mesh. Checkpoints of earlier formats are read too, see `upgrade`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from llmjax.checkpoints.manifest import Manifest
from llmjax.checkpoints.upgrade import (
  FORMAT_VERSION,
  current_parameter_path,
  from_saved_names,
  to_saved_names,
  upgrade_manifest,
)
from llmjax.config import ConfigError, Json
from llmjax.distributed import processes
from llmjax.storage.buckets import as_path, in_bucket, move_folder
from llmjax.trees import PyTree, path_string

CHECKPOINTS_DIR = "checkpoints"


class DamagedCheckpoint(ConfigError):
  """A checkpoint whose files cannot be read."""


class Checkpoints:
  """The checkpoints of one workdir.

  All uses of Orbax's manager, whose API still changes, are here.

  Args:
    workdir: folder of the run.
    write: open for saving. Readers never delete the unfinished checkpoints of other processes.
    keep: number of latest checkpoints that are kept, at least 1; None: all.
    keep_every: also keep checkpoints at multiples of this number of steps.
    best: also keep the checkpoint with the best value of this metric.
    mode: whether the lowest ("min") or the highest ("max") value of `best` is the best.
  """

  def __init__(
    self,
    workdir: str | Path,
    *,
    write: bool = False,
    keep: int | None = None,
    keep_every: int | None = None,
    best: str | None = None,
    mode: Literal["min", "max"] = "min",
  ):
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs several lines for every save
    retained: list[policies.PreservationPolicy] = [policies.LatestN(max(keep or 1, 1))]
    if keep_every:
      retained.append(policies.EveryNSteps(keep_every))
    metric_options: dict[str, Json] = {}
    if best:
      sign = 1 if mode == "min" else -1

      def badness(metrics: Mapping[str, float] | None) -> float:
        return sign * metrics[best] if metrics and best in metrics else float("inf")

      # Orbax's `max_to_keep` with `best_fn` would delete the newest checkpoint; these policies do not.
      retained.append(policies.BestN(get_metric_fn=badness, reverse=True, n=1))
      metric_options = {"best_fn": badness, "best_mode": "min"}
    workdir = as_path(workdir)
    self.folder = epath.Path(workdir if in_bucket(workdir) else workdir.resolve()) / CHECKPOINTS_DIR
    self.manager = ocp.CheckpointManager(
      self.folder,
      item_handlers={
        "state": ocp.PyTreeCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "manifest": ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=None if keep is None else policies.AnyPreservationPolicy(retained),
        cleanup_tmp_directories=write,
        read_only=not write,
        **metric_options,
      ),
    )

  # Saving

  def save(
    self, step: int, state: PyTree, cursor: Json, manifest: Mapping[str, Json], metrics: Mapping[str, float]
  ) -> None:
    """Start an asynchronous save; blocks only while the state is copied off the devices.

    Args:
      step: steps made; an existing checkpoint of this step stays as it is.
      state: the train state.
      cursor: position in the data, as JSON.
      manifest: see `make_manifest`.
      metrics: values measured at this step.
    """
    if step in self.manager.all_steps():
      return
    items = {
      "state": ocp.args.PyTreeSave(state),
      "data": ocp.args.JsonSave({"cursor": cursor}),
      "manifest": ocp.args.JsonSave({**manifest, "step": step, "time": time.time(), "metrics": dict(metrics)}),
    }
    self.manager.save(step, args=ocp.args.Composite(**items), metrics=dict(metrics), force=True)

  def wait(self) -> None:
    """Wait until everything is on disk; a failed save raises here."""
    self.manager.wait_until_finished()

  def close(self) -> None:
    self.manager.close()

  def archive_damaged(self, steps: Iterable[int]) -> None:
    """Move damaged checkpoints to WORKDIR/damaged, so that new ones can be saved at their steps."""
    self._barrier("begin")  # another process may still read what is moved
    if processes.is_primary_process():
      for step in steps:
        move_folder(self.folder / str(step), self.folder.parent / "damaged" / f"{step}-{time.time_ns()}")
    self._barrier("end")
    self.manager.reload()

  def _barrier(self, when: str) -> None:
    if not processes.barrier(f"{self.folder}/archive_damaged/{when}", timeout=600):
      raise TimeoutError(f"{self.folder}: not all processes were there to archive damaged checkpoints; run again")

  # Reading

  def steps(self) -> list[int]:
    """Return the steps of all complete checkpoints, oldest first."""
    return sorted(self.manager.all_steps())

  def newest_manifest(self) -> tuple[int, Manifest] | None:
    """Return the newest step whose manifest can be read, and the manifest; None if there are no checkpoints.

    Raises:
      DamagedCheckpoint: there are checkpoints, but none of them can be read.
    """
    failure = None
    for step in reversed(self.steps()):
      try:
        return step, self.read_manifest(step)
      except DamagedCheckpoint as error:
        failure = error
    if failure is not None:
      raise failure
    return None

  def read_manifest(self, step: int) -> Manifest:
    """Return the manifest of a checkpoint, in the current format."""
    manifest: Manifest = self._read_json(step, "manifest")
    return upgrade_manifest(manifest)

  def read_cursor(self, step: int) -> Json:
    """Return the data cursor of a checkpoint."""
    return self._read_json(step, "data")["cursor"]

  def parameter_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of all arrays in a checkpoint's state, such as "params/embedding/table"."""
    with self._translate_read_errors(step):
      tree = self.manager.item_metadata(step)["state"].tree
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    shapes = {path_string(p): leaf.shape for p, leaf in leaves if getattr(leaf, "shape", None) is not None}
    version = self._format_version(step)
    return {current_parameter_path(path, version): tuple(shape) for path, shape in shapes.items()}

  def restore(self, step: int, abstract_state: PyTree) -> PyTree:
    """Return the state of a checkpoint.

    Args:
      abstract_state: the state with ShapeDtypeStructs with shardings as leaves.

    Raises:
      ConfigError: the checkpoint has other parameters or shapes; the first difference is named, before any is read.
    """
    self._check_shapes(step, abstract_state, is_whole=True)
    return self._restore_state(step, abstract_state)

  def restore_parts(self, step: int, wanted: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return some leaves of a state: {"params", "ema" or "frozen": tree}. See `restore`."""
    self._check_shapes(step, wanted)
    parts: dict[str, PyTree] = self._restore_state(step, dict(wanted), is_partial=True)
    return parts

  def _restore_state(self, step: int, abstract: PyTree, *, is_partial: bool = False) -> PyTree:
    version = self._format_version(step)
    saved = to_saved_names(abstract, version)
    restore_args = ocp.checkpoint_utils.construct_restore_args(saved)
    state = self._load_item(step, "state", ocp.args.PyTreeRestore(saved, restore_args, partial_restore=is_partial))
    return from_saved_names(state, version)

  def _format_version(self, step: int) -> int:
    return int(self._read_json(step, "manifest").get("format_version", FORMAT_VERSION))

  def _read_json(self, step: int, item: str) -> Json:
    return self._load_item(step, item, ocp.args.JsonRestore())

  def _load_item(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> PyTree:
    with self._translate_read_errors(step):
      return self.manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

  @contextlib.contextmanager
  def _translate_read_errors(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise errors of any class for a damaged file
      reason = f"checkpoint {self.folder}/{step} cannot be read ({type(error).__name__})"
      raise DamagedCheckpoint(f"{reason}; existing steps are {self.steps()}") from error

  def _check_shapes(self, step: int, abstract: PyTree, *, is_whole: bool = False) -> None:
    """Raise ConfigError if a leaf is missing or has another shape; if `is_whole`, also if the checkpoint has more."""
    saved = self.parameter_shapes(step)
    wanted = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    name = f"checkpoint {self.folder}/{step}"
    superfluous = sorted(saved.keys() - wanted.keys()) if is_whole else []
    if superfluous:
      raise ConfigError(f"{name} has {superfluous[0]}, which this config does not; model.* or optim.* has changed")
    for path, leaf in wanted.items():
      if path not in saved:
        raise ConfigError(f"{name} has no {path}; it belongs to another model or optimizer")
      if saved[path] != tuple(leaf.shape):
        raise ConfigError(f"{name}: {path} has shape {saved[path]}, but this config requires {tuple(leaf.shape)}")
