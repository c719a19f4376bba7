"""Programs of clouds that answer from a transcript, for tests of launch/tpu_vm.py and launch/gke.py."""

import json
import re
import sys
from pathlib import Path

from tests.support.launchers import LAUNCH, ROOT, run_script, write_program

FAKE_CLOUD = Path(__file__).parent / "fake_cloud.py"
TESTDATA = ROOT / "tests" / "testdata"

# In place of launch/setup.sh and of llmjax. With config=slow, llmjax runs until the home has a file `go`, and takes
# $SAVING seconds to end after SIGTERM.
SETUP = """
setup() {
  echo "installed $1" >>"$HOME/installations"
  mkdir -p .venv/bin
  cat >.venv/bin/llmjax <<'LLMJAX'
#!/usr/bin/env bash
echo "started $*" | tee -a "$HOME/runs"
echo "token ${TOKEN:-none} slice ${MEGASCALE_SLICE_ID:-none}/${MEGASCALE_NUM_SLICES:-1} $MEGASCALE_COORDINATOR_ADDRESS"
trap 'sleep "${SAVING:-0}"; echo saved; exit 130' TERM
case "$*" in
  *config=bad*) echo 'llmjax: a mistake' >&2; exit 2 ;;
  *config=slow*) until [ -e "$HOME/go" ]; do sleep 0.05; done ;;
esac
echo done
LLMJAX
  chmod +x .venv/bin/llmjax
}
"""


class TranscriptCloud:
  """Programs on the PATH that answer from a transcript, which the test sets.

  Subclasses define:
    PROGRAMS: Names of the programs.
    ANSWERS: {name: answer}, as in fake_cloud.py.
    CALLS: Kinds of calls as regular expressions; the first that matches counts.
    USUAL_ANSWERS: Names of the answers to each kind, in order.
    OTHER_ENTRIES: Further entries of the transcript.
  """

  PROGRAMS: tuple = ()
  ANSWERS: dict = {}  # noqa: RUF012
  CALLS: dict = {}  # noqa: RUF012
  USUAL_ANSWERS: dict = {}  # noqa: RUF012
  OTHER_ENTRIES: tuple = ()

  def __init__(self, folder):
    self.folder = folder
    (folder / "bin").mkdir()
    for name in self.PROGRAMS:
      write_program(folder / "bin" / name, f'exec {sys.executable} -S -E {FAKE_CLOUD} {name} "$@"')

  def write_transcript(self, answers, run_id=""):
    """Write the transcript; `answers` replace the usual ones: names of ANSWERS, or lists of names and answers."""
    entries = []
    for kind, usual in self.USUAL_ANSWERS.items():
      given = answers.get(kind, usual)
      names = given.split() if isinstance(given, str) else given
      values = [self.ANSWERS[name] if isinstance(name, str) else name for name in names]
      entries.append({"call": self.CALLS[kind], "answers": values})
    text = json.dumps([*entries, *self.OTHER_ENTRIES]).replace("RUN", run_id)
    (self.folder / "transcript.json").write_text(text)
    (self.folder / "counts.json").unlink(missing_ok=True)

  def run_launcher(self, script, *words):
    """Run a launcher; return its exit code, standard output and standard error."""
    result = run_script(script, *words)
    assert all(call["known"] for call in self.calls()), result[2]
    return result

  def calls(self):
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def count(self, pattern):
    """Return how many calls a regular expression matches."""
    return sum(bool(re.search(pattern, " ".join(call["words"]))) for call in self.calls())


class TpuCloud(TranscriptCloud):
  """A project of Google Cloud; its workers are folders."""

  PROGRAMS = ("gcloud",)
  ANSWERS = json.loads((TESTDATA / "tpu_vm.json").read_text())
  CALLS = {  # noqa: RUF012
    "address": r"tpu-vm describe .*format=value",
    "describe": "queued-resources describe",
    "node": "tpu-vm describe",
    "create": "queued-resources create",
    "delete": "queued-resources delete",
    "log": r"tpu-vm ssh .*\.sh log ",
    "ssh": "tpu-vm ssh",
    "scp": "tpu-vm scp",
  }
  USUAL_ANSWERS = {  # noqa: RUF012
    "address": "address",
    "describe": "not_found waiting provisioning active",
    "node": "ready",
    "create": "created",
    "delete": "deleted",
    "log": "play",
    "ssh": "play",
    "scp": "play",
  }

  def __init__(self, folder, checkout):
    super().__init__(folder)
    self.checkout = checkout
    for name in ("worker_bin", "workers"):
      (folder / name).mkdir()
    write_program(folder / "worker_bin" / "hostname", 'echo "$WORKER"')
    write_program(folder / "worker_bin" / "python3.12", "exit 0")
    write_program(folder / "worker_bin" / "sudo", "exit 1")
    self.set_answers()

  def set_answers(self, *, nodes=("a",), workers=1, **answers):
    """Set the answers, from the first one, and make the homes of the workers."""
    self.write_transcript(answers)
    for node in nodes:
      for index in range(workers):
        (self.folder / "workers" / f"{node}-w{index}").mkdir(exist_ok=True)

  def run(self, *words):
    return self.run_launcher(self.checkout / "launch" / "tpu_vm.py", *words)

  def home(self, worker):
    return self.folder / "workers" / worker

  def log(self, worker="a-w0"):
    return (self.home(worker) / ".llmjax" / "log").read_text()

  def num_starts(self, worker="a-w0"):
    return (self.home(worker) / "runs").read_text().count("started")


class KubernetesCluster(TranscriptCloud):
  """kubectl and docker; the run that the answers contain is that of `run_flags`."""

  PROGRAMS = ("kubectl", "docker")
  ANSWERS = json.loads((TESTDATA / "gke.json").read_text())
  CALLS = {"jobset": "get jobset", "pods": "get pods", "logs": "kubectl logs", "create": "kubectl create"}  # noqa: RUF012
  USUAL_ANSWERS = {  # noqa: RUF012
    "jobset": "absent running running completed",
    "pods": "nothing pod pod_succeeded",
    "logs": "log more_log",
    "create": "created",
  }
  OTHER_ENTRIES = ({"call": "kubectl (delete|patch)|docker", "answers": [{}]},)

  def __init__(self, folder, run_flags, command):
    super().__init__(folder)
    self.run_flags, self.command = run_flags, command

  def set_answers(self, **answers):
    """Set the answers, from the first one, and forget the calls so far."""
    self.write_transcript(answers, self.manifest(*self.run_flags)["metadata"]["annotations"]["llmjax/run"])
    (self.folder / "calls.jsonl").unlink(missing_ok=True)

  def run(self, *words, script=LAUNCH / "gke.py"):
    return self.run_launcher(script, *words)

  def manifest(self, *words):
    """Return the manifest that --dry_run prints."""
    _, output, _ = self.run(*words, "--dry_run", *self.command)
    return json.loads(re.search(r"<<'MANIFEST'\n(.*)\nMANIFEST", output, re.DOTALL)[1])
