"""A process of hosts_test.py: runs commands of the command line one after the other, and writes down what they said and
which rows of each training batch were made here.

  python -m tests.support.hosts_worker FOLDER '[["train", "--config=...", ...], ...]'

FOLDER/said.I.json is a list of what the commands said; FOLDER/rows.I.json of [which training, step, row, hash].
"""

import contextlib
import io
import itertools
import json
import sys
from pathlib import Path

import jax

from llmjax import cli, hosts, train
from llmjax.data.pipeline import TrainStream
from llmjax.verify import row_hashes

ROWS: list = []


class Recorded(TrainStream):
  """Writes down the rows that it hands out."""

  trainings = itertools.count()

  def __init__(self, *args, **settings):
    super().__init__(*args, **settings)
    self.training, self.steps = next(self.trainings), itertools.count()

  def __next__(self):
    batch, step = super().__next__(), next(self.steps)
    ROWS.extend([self.training, step, row, name] for row, name in row_hashes(batch))
    return batch


def main(folder, commands):
  train.TrainStream = Recorded
  said = []
  for command in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out:
      code = cli.main(command)
    assert code == 0, command
    said.append(out.getvalue())
    hosts.start = lambda *args, **settings: None  # JAX joins the others once
  for name, content in (("said", said), ("rows", ROWS)):
    Path(folder, f"{name}.{jax.process_index()}.json").write_text(json.dumps(content))


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
