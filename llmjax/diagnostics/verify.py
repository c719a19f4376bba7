"""`llmjax verify`: one config on many meshes and numbers of processes, which must agree up to rounding.

A shrunk config gives its initial parameters, losses, the gradient of every parameter, held-out metrics, and parameters
after some steps of gradient descent. These are computed in float32 on one device and on others, and compared. The
config's own objective, model and clipping are run, so that a sum that is not taken over all devices is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from llmjax.config import ConfigError, ConfigLike, ConfigTree
from llmjax.diagnostics.comparison import MIN_NORM_FRACTION, TOLERANCE, compare_measurements
from llmjax.diagnostics.local_processes import measure_processes
from llmjax.diagnostics.measurement import PARTS, Measurement, measure_run
from llmjax.diagnostics.shrink import NUM_STEPS, candidate_meshes, shrink_config
from llmjax.distributed import sharding

TITLE_WIDTH = 44  # characters before the numbers of a line
MAX_SHOWN = 5  # arrays that are printed for a mesh


def verify(
  config: ConfigLike, meshes: Sequence[str] | None = None, processes: Sequence[int] = (), flags: Sequence[str] = ()
) -> bool:
  """Return whether one device, every mesh and every number of processes give the same results; prints a table.

  Args:
    config: a config as `llmjax.config.default_config` returns it.
    meshes: such as "data=2,tensor=4". None: those of `candidate_meshes` that the config supports.
    processes: numbers of processes, which share the devices. They are compared on all `meshes`, or if that is None on
      some.
    flags: flags of the command line that give the same config; for `processes`.

  Raises:
    ConfigError: the config cannot run, or it does not support one of `meshes`.
  """
  devices = jax.devices()
  _check_arguments(meshes, processes, devices)
  small_config = shrink_config(config, len(devices))
  expected = measure_run(small_config, {}, devices[:1])
  _print_header(expected)
  all_equal, compared = _verify_meshes(small_config, meshes, expected, devices)
  process_meshes = compared if meshes is not None else compared[1::4] or compared
  for count in processes:
    for mesh in process_meshes:
      all_equal &= _verify_processes(flags, count, mesh, len(devices), expected)
  if not compared:
    raise ConfigError(f"nothing was compared: the config supports none of the meshes on {len(devices)} devices")
  _print_now(f"\nthe same on {len(compared)} meshes" if all_equal else "\nNOT the same")
  return all_equal


def _check_arguments(meshes: Sequence[str] | None, processes: Sequence[int], devices: Sequence[jax.Device]) -> None:
  for count in processes:
    if count < 2 or len(devices) % count:
      raise ConfigError(f"--processes={count} must be at least 2 and divide the {len(devices)} devices")
  if processes and devices[0].platform != "cpu":
    raise ConfigError("--processes is for simulated devices of a CPU; set JAX_PLATFORMS=cpu")
  for text in meshes or ():
    sharding.resolve_mesh_sizes(sharding.parse_mesh(text, "--meshes"), len(devices))


def _print_header(expected: Measurement) -> None:
  gradient = expected.parts["gradient"]
  zero = [name for name, array in gradient.items() if not np.any(array)]
  _print_now(
    f"{len(gradient)} parameters' gradients, {NUM_STEPS} steps, against one device; deviations in multiples of the "
    "tolerance"
  )
  _print_now(f"({TOLERANCE:g} of an array's norm, of at least {MIN_NORM_FRACTION:g} of the whole tree's)")
  if zero:
    _print_now(f"zero, and therefore hardly compared: the gradients of {', '.join(zero)}")
  _print_now(f"\n{'':<{TITLE_WIDTH}}" + "".join(f"{part:>9}" for part in PARTS))


def _verify_meshes(
  config: ConfigTree, meshes: Sequence[str] | None, expected: Measurement, devices: Sequence[jax.Device]
) -> tuple[bool, list[str]]:
  """Compare all meshes; return whether all are equal, and the meshes that the config supports."""
  all_equal, compared = True, []
  for text in candidate_meshes(len(devices)) if meshes is None else meshes:
    try:
      actual = measure_run(config, sharding.parse_mesh(text, "--meshes"), devices)
    except ConfigError as error:
      if meshes is not None:
        raise
      _print_now(f"{text:<{TITLE_WIDTH}}not supported by this config: {error}")
      continue
    all_equal &= report_differences(text, expected, actual)
    compared.append(text)
  return all_equal, compared


def _verify_processes(flags: Sequence[str], count: int, mesh: str, num_devices: int, expected: Measurement) -> bool:
  """Compare a number of processes on a mesh; return whether all are equal and hold all rows together."""
  all_equal, rows = True, set[str]()
  for index, actual in enumerate(measure_processes(flags, count, mesh, num_devices)):
    all_equal &= report_differences(f"{mesh}, process {index} of {count}", expected, actual)
    rows |= actual.rows.keys()
  missing = expected.rows.keys() - rows
  if missing:
    _print_now(f"  no process has row {min(missing)}")
  return all_equal and not missing


def report_differences(title: str, expected: Measurement, actual: Measurement) -> bool:
  """Print a line of the table, and the largest deviations; return whether all are within the tolerance."""
  differences = compare_measurements(expected, actual)
  largest = [max((d.excess for d in differences if d.part == part), default=0.0) for part in PARTS]
  collectives = ", ".join(f"{count} {name}" for name, count in actual.collectives.items()) or "no collectives"
  _print_now(f"{title:<{TITLE_WIDTH}}" + "".join(f"{value:>9.2g}" for value in largest) + f"  {collectives}")
  too_large = [d for d in differences if not d.excess <= 1]
  for difference in too_large[:MAX_SHOWN]:
    _print_now(f"  {difference.part} {difference.name}: {difference.excess:.3g} times the tolerance")
  other_rows = [row for row, digest in actual.rows.items() if expected.rows.get(row) != digest]
  if other_rows:
    step, row = other_rows[0].split("/")
    _print_now(f"  row {row} of batch {step} holds other data")
  return not too_large and not other_rows


def _print_now(text: str) -> None:
  """Print without buffering, because each line takes a while to compute."""
  print(text, flush=True)
