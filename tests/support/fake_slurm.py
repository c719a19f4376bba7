"""Stand-ins for SLURM's programs, and calls of launch/slurm.py."""

import json
import sys

from tests.support.launchers import ROOT, run_script, write_program

# Append the call to calls.jsonl and answer with the next of the answers in NAME.json; the last one repeats.
PROGRAM = r"""
import json, os, sys
folder, name = os.path.split(sys.argv[0])
with open(f"{folder}/calls.jsonl", "a") as calls:
  calls.write(json.dumps([name, *sys.argv[1:]]) + "\n")
answers = [["", "", 0]]
if os.path.exists(f"{folder}/{name}.json"):
  with open(f"{folder}/{name}.json") as file:
    answers = json.load(file)
if len(answers) > 1:
  with open(f"{folder}/{name}.json", "w") as file:
    json.dump(answers[1:], file)
out, err, code = answers[0]
print(out, end="")
print(err, end="", file=sys.stderr)
sys.exit(code)
"""


class FakeSlurm:
  """SLURM's programs in a folder of the PATH, whose answers are set by the test."""

  def __init__(self, folder):
    self.folder = folder
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
      write_program(folder / name, PROGRAM, interpreter=f"{sys.executable} -SE")
    self.set_answer("sbatch", "17\n")

  def set_answer(self, name, out="", err="", code=0):
    self.set_answers(name, (out, err, code))

  def set_answers(self, name, *answers):
    """Set what a program prints, writes to stderr and returns, call by call."""
    (self.folder / f"{name}.json").write_text(json.dumps(answers))

  def calls(self, *names):
    """Return the calls so far as lists of words; only those of the programs `names` if given."""
    path = self.folder / "calls.jsonl"
    calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [call for call in calls if not names or call[0] in names]


def run_slurm_script(*words, root=ROOT):
  """Run launch/slurm.py; return its standard output, standard error and exit code."""
  code, out, err = run_script(root / "launch" / "slurm.py", *words)
  return out, err, code


def run_queued(home, folder="sweep", dry_run=False):
  """Run `slurm.py queued` for a folder of `home`; return its standard output, standard error and exit code."""
  return run_slurm_script("queued", f"--folder={home / folder}", *(["--dry_run"] if dry_run else []))
