"""Checkpoints are readable through Orbax's v1 API, to which the project moves when it is stable."""

import numpy as np
import pytest

from llmjax.checkpoints.manager import Checkpoints

v1 = pytest.importorskip("orbax.checkpoint.experimental.v1", reason="this Orbax has no v1 API")


def test_checkpoint_read_through_orbax_v1_equals_what_was_saved(tmp_path):
  state = {"params": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "step": np.int32(7)}
  checkpoints = Checkpoints(tmp_path, write=True)
  checkpoints.save(7, state, {"row": 3}, {"format_version": 1}, {})
  checkpoints.wait()
  folder = checkpoints.folder / "7"
  checkpoints.close()
  load = getattr(v1, "load", None) or v1.load_pytree  # the name has changed
  restored = load(folder, checkpointable_name="state")
  np.testing.assert_array_equal(restored["params"]["kernel"], state["params"]["kernel"])
  assert restored["step"] == 7
