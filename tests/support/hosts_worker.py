"""Run commands one after the other, and record what they print and the rows of each training batch made here.

  python -m tests.support.hosts_worker FOLDER '[["train", "--config=...", ...], ...]'

FOLDER/output.I.json is a list with the standard output of each command in process I; FOLDER/rows.I.json has
[number of the training, step, row, hash of the row].
"""

import contextlib
import io
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import jax

from llmjax.cli.main import main
from llmjax.data.pipeline import TrainStream
from llmjax.diagnostics.measurement import row_hashes
from llmjax.distributed import processes
from llmjax.training import program


def run_commands(folder, commands) -> None:
  """Run `llmjax` commands in this process; write output.I.json and rows.I.json."""
  rows, outputs, trainings = [], [], itertools.count()

  class RecordingStream(TrainStream):
    def __init__(self, *args, **settings):
      super().__init__(*args, **settings)
      self.training, self.steps = next(trainings), itertools.count()

    def __next__(self):
      batch, step = super().__next__(), next(self.steps)
      rows.extend([self.training, step, row, name] for row, name in row_hashes(batch))
      return batch

  with contextlib.ExitStack() as patches:
    patches.enter_context(mock.patch.object(program, "TrainStream", RecordingStream))
    for command in commands:
      with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(command)
      assert code == 0, command
      outputs.append(out.getvalue())
      # JAX connects to the other processes once.
      patches.enter_context(mock.patch.object(processes, "join_processes", lambda *args, **settings: None))
  for name, content in (("output", outputs), ("rows", rows)):
    Path(folder, f"{name}.{jax.process_index()}.json").write_text(json.dumps(content))


if __name__ == "__main__":
  run_commands(sys.argv[1], json.loads(sys.argv[2]))
