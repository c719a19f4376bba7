#!/usr/bin/env python3
"""Runs llmjax on Google Kubernetes Engine as a JobSet: makes its manifest, applies it, follows it.

Kubernetes restarts the run where a node goes (spot), and it goes on from its bucket; a run that fails by a mistake of
the user (exit code 2) is not restarted. It survives the end of this script: the same command finds it again. Needs
kubectl with a cluster that has JobSet, git and docker for `image`, and Python 3.9; llmjax need not be installed here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import shipping
from command_line import Parser, Unsettled, pauses, positive, serve, split
from jobset import TPUS, VERSION, chips_and_machines, manifest, secret_name

EXAMPLES = """examples:
  python3 launch/gke.py image --tag=REGION-docker.pkg.dev/PROJECT/REPOSITORY/llmjax
  python3 launch/gke.py run --name=a --image=TAG --accelerator=tpu-v5-lite-podslice --topology=4x4 --spot -- \\
    train --config=gpt:size=gpt2_124m --workdir=gs://BUCKET/a
  the same with --slices=2             several slices as one run (multislice)
  the same with --env=WANDB_API_KEY    a variable of this shell, by name, through a Secret (image --extra=wandb)
  the same with --dry_run              prints the manifest and every command, and runs none
  python3 launch/gke.py run --name=b --image=TAG --accelerator=nvidia-h100-80gb --gpus=8 --nodes=2 -- train ...
  python3 launch/gke.py status|logs|delete --name=a"""

TRIES = 20  # of kubectl, once it has worked
JOBSET = "https://jobset.sigs.k8s.io/docs/installation"


# Commands, as lists of words.


def kubectl(options: argparse.Namespace, *words: str) -> list[str]:
  where = {"namespace": options.namespace, "context": options.context}
  return ["kubectl", *words, *(f"--{key}={value}" for key, value in where.items() if value)]


def create(options: argparse.Namespace) -> list[str]:
  """Prints the uid."""
  return kubectl(options, "create", "--filename=-", "--output=jsonpath={.metadata.uid}")


def get(options: argparse.Namespace) -> list[str]:
  return kubectl(options, "get", "jobset", options.name, "--output=json", "--ignore-not-found")


def pods(options: argparse.Namespace) -> list[str]:
  return kubectl(options, "get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}", "--output=json")


def log(options: argparse.Namespace, pod: str, since: str, follow: bool) -> list[str]:
  flags = ["--timestamps", *(["--follow"] if follow else []), *([f"--since-time={since}"] if since else [])]
  return kubectl(options, "logs", pod, *flags)


def delete(options: argparse.Namespace, what: str = "jobset") -> list[str]:
  name = options.name if what == "jobset" else secret_name(options)
  return kubectl(options, "delete", what, name, "--ignore-not-found", "--cascade=foreground")


def create_secret(options: argparse.Namespace) -> list[str]:
  return kubectl(options, "create", "secret", "generic", secret_name(options), "--from-env-file=/dev/stdin")


def own_secret(options: argparse.Namespace, uid: str) -> list[str]:
  """The Secret then goes with the JobSet of that uid."""
  owner = {"apiVersion": VERSION, "kind": "JobSet", "name": options.name, "uid": uid}
  patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
  return kubectl(options, "patch", "secret", secret_name(options), "--type=merge", f"--patch={patch}")


def call(command: Sequence[str], given: str = "") -> tuple[int, str, str]:
  """The exit code, output and errors."""
  try:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
  except FileNotFoundError:
    raise Unsettled(f"{command[0]} was not found; install it, and log in to the cluster") from None
  return done.returncode, done.stdout, done.stderr


def ask(command: Sequence[str], given: str = "") -> str:
  code, output, errors = call(command, given)
  if code:
    raise Unsettled(explain(errors))
  return output


def explain(errors: str) -> str:
  said = (errors.strip().splitlines() or ["no message"])[-1]
  if "resource type" in said and "jobset" in said:
    return f"the cluster has no JobSet ({said}); install it: {JOBSET}"
  return f"kubectl: {said}"


def say(text: str) -> None:
  print(f"gke.py: {text}", file=sys.stderr, flush=True)


# The life of a run: created, pending, running, restarted, ended.


def run(options: argparse.Namespace) -> int:
  secrets = {} if options.secret else shipping.secrets(options.env)
  wanted = manifest(options)
  there = ask(get(options)).strip()
  jobset = json.loads(there) if there else {}
  if jobset and ended(jobset):
    say(f"{options.name}: replacing what has ended ({ended(jobset)})")
    ask(delete(options))
    jobset = {}
  if jobset and identity(jobset) != identity(wanted):
    raise Unsettled(f"{options.name} is running something else; end it by gke.py delete, or use another --name")
  if jobset:
    say(f"{options.name} is there")
    return follow(options)
  if secrets:
    ask(delete(options, "secret"))
    ask(create_secret(options), "".join(f"{name}={value}\n" for name, value in secrets.items()))
  uid = ask(create(options), json.dumps(wanted)).strip()
  say(f"{options.name}: created")
  if secrets:
    code, _, errors = call(own_secret(options, uid))
    if code:
      say(f"the Secret {secret_name(options)} stays when {options.name} is gone: {explain(errors)}")
  return follow(options)


def identity(jobset: dict[str, Any]) -> str:
  """Equal for equal runs: a run that is there is followed, and not created twice."""
  return jobset["metadata"].get("annotations", {}).get("llmjax/run", "")


def follow(options: argparse.Namespace) -> int:
  """Shows the log of worker 0, that of its successors after restarts, and waits for the end; the exit code."""
  shown: dict[str, str] = {}  # {pod: the time of its last line}
  said, waits = "", pauses(options.poll)
  while True:
    jobset, items = observe(options)
    pod, before = first(items), dict(shown)
    if options.follow and pod and pod["status"]["phase"] in ("Running", "Succeeded", "Failed"):
      stream(options, pod["metadata"]["name"], shown, follow=pod["status"]["phase"] == "Running")
    state = ended(jobset)
    if state:
      code = exit_code(items, state)
      say(f"{options.name}: the run has ended with exit code {code} ({state})")
      return code
    now = describe(jobset, pod)
    if now != said:
      said, waits = now, pauses(options.poll)
      say(f"{options.name}: {now}")
    if shown == before:
      time.sleep(next(waits))


def observe(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The JobSet and its pods; again where there is no connection."""
  for pause in itertools.islice(pauses(options.poll), TRIES):
    code, jobset, errors = call(get(options))
    if not code and not jobset.strip():
      raise Unsettled(f"{options.name} was deleted by someone else; run the same command to create it anew")
    if not code:
      code, listed, errors = call(pods(options))
    if not code:
      return json.loads(jobset), json.loads(listed)["items"]
    time.sleep(pause)
  raise Unsettled(f"{explain(errors)}; the run goes on, and the same command finds it")


def stream(options: argparse.Namespace, pod: str, shown: dict[str, str], follow: bool) -> None:
  """Prints what the log of a pod has behind its last line that was shown."""
  command = log(options, pod, shown.get(pod, ""), follow)
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    assert process.stdout
    for line in process.stdout:
      stamp, _, text = line.partition(b" ")
      if stamp.decode(errors="replace") > shown.get(pod, ""):
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
        shown[pod] = stamp.decode(errors="replace")


def first(items: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """The newest pod of worker 0 of the first slice."""
  index = ("jobset.sigs.k8s.io/job-index", "batch.kubernetes.io/job-completion-index")
  own = [pod for pod in items if all(pod["metadata"]["labels"].get(key) == "0" for key in index)]
  return max(own, key=lambda pod: pod["metadata"]["creationTimestamp"], default=None)


def ended(jobset: dict[str, Any]) -> str:
  """Completed, Failed with a reason, or empty."""
  for condition in jobset.get("status", {}).get("conditions", []):
    if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
      return condition["type"] + (f": {condition.get('message', '')}" if condition["type"] == "Failed" else "")
  return ""


def exit_code(items: Sequence[dict[str, Any]], state: str) -> int:
  """That of worker 0, else that of another that failed."""
  if state == "Completed":
    return 0
  own = first(items)
  codes = []
  for pod in sorted(items, key=lambda pod: pod is not own):
    statuses = pod["status"].get("containerStatuses", [])
    codes += [status["state"].get("terminated", {}).get("exitCode", 0) for status in statuses]
  return next((code for code in codes if code), 1)


def describe(jobset: dict[str, Any], pod: dict[str, Any] | None) -> str:
  restarts = jobset.get("status", {}).get("restarts", 0)
  return (f"restart {restarts}: " if restarts else "") + (waiting(pod) if pod else "pending")


def waiting(pod: dict[str, Any]) -> str:
  """The phase of a pod, and what keeps it there."""
  status = pod["status"]
  reasons = [state["state"]["waiting"] for state in status.get("containerStatuses", []) if "waiting" in state["state"]]
  reasons += [
    each for each in status.get("conditions", []) if each["type"] == "PodScheduled" and each["status"] != "True"
  ]
  why = "; ".join(f"{each.get('reason', '')} {each.get('message', '')}".strip() for each in reasons)
  return status["phase"].lower() + (f" ({why})" if why else "")


# The other subcommands.


def status(options: argparse.Namespace) -> int:
  there = ask(get(options))
  if not there.strip():
    print(f"{options.name}: absent")
    return 0
  jobset, items = json.loads(there), json.loads(ask(pods(options)))["items"]
  print(f"{options.name}: {ended(jobset) or describe(jobset, first(items))}")
  for pod in sorted(items, key=lambda pod: pod["metadata"]["name"]):
    print(f"{pod['metadata']['name']}: {waiting(pod)}")
  return 0


def logs(options: argparse.Namespace) -> int:
  pod = first(json.loads(ask(pods(options)))["items"])
  if pod is None:
    raise Unsettled(f"{options.name} has no pods; gke.py status says what there is")
  stream(options, pod["metadata"]["name"], {}, options.follow)
  return 0


def delete_all(options: argparse.Namespace) -> int:
  ask(delete(options))
  if not options.secret:
    ask(delete(options, "secret"))
  say(f"{options.name}: deleted; the run had two minutes to save")
  return 0


def image(options: argparse.Namespace) -> int:
  with tempfile.TemporaryDirectory() as folder:
    archive = Path(folder) / "llmjax.tar.gz"
    commit = shipping.archive(shipping.ROOT, archive, options.dirty)
    say(f"commit {commit}")
    for command in (build(options, commit), push(options)):
      with open(archive, "rb") as context:
        try:
          code = subprocess.run(command, stdin=context).returncode
        except FileNotFoundError:
          raise ValueError("docker was not found; install it, and log in to the registry") from None
      if code:
        raise ValueError(f"{shlex.join(command)} failed with exit code {code}, see above")
  return 0


def build(options: argparse.Namespace, commit: str) -> list[str]:
  extras = options.extra if "cuda" in options.extra else dict.fromkeys(["tpu", *options.extra])
  arguments = [f"--build-arg=COMMIT={commit}", f"--build-arg=EXTRA={','.join(extras)}"]
  return ["docker", "build", "--file=launch/Dockerfile", *arguments, f"--tag={options.tag}", "-"]


def push(options: argparse.Namespace) -> list[str]:
  return ["docker", "push", options.tag]


# What --dry_run prints.


def plan(options: argparse.Namespace) -> Iterator[str]:
  """Every command, for a shell; of a run, those where nothing goes wrong."""
  if options.action == "image":
    commit = shipping.commit(shipping.ROOT, options.dirty)
    archive = f"/tmp/llmjax-{commit}.tar.gz"
    dirty = ["--dirty"] if options.dirty else []
    yield shlex.join(["python3", shipping.__file__, f"--output={archive}", *dirty])
    yield f"{shlex.join(build(options, commit))} <{archive}"
    yield shlex.join(push(options))
    return
  if options.action == "delete":
    yield shlex.join(delete(options))
    if not options.secret:
      yield shlex.join(delete(options, "secret"))
    return
  if options.action != "logs":
    yield shlex.join(get(options))
  if options.action == "run":
    secret = options.env and not options.secret
    if secret:
      yield shlex.join(delete(options, "secret"))
      values = " ".join(f'{name} "${name}"' for name in options.env)
      yield f"printf '%s=%s\\n' {values} | {shlex.join(create_secret(options))}"
    creation = f"{shlex.join(create(options))} <<'MANIFEST'\n{json.dumps(manifest(options), indent=2)}\nMANIFEST"
    yield f'OWNER="$({creation}\n)"' if secret else creation
    if secret:
      yield shlex.join(own_secret(options, "OWNER")).replace("OWNER", "'\"$OWNER\"'")
    yield "# again until it has ended"
  yield shlex.join(pods(options))
  if options.action == "logs" or (options.action == "run" and options.follow):
    yield "# POD is that of worker 0"
    yield shlex.join(log(options, "POD", "", options.follow))


# The command line.

ACTIONS = {
  "run": (run, "apply the manifest, follow the log of worker 0, wait for the end"),
  "status": (status, "what there is"),
  "logs": (logs, "the log of worker 0"),
  "delete": (delete_all, "have the run save and end, and remove it"),
  "image": (image, "build the image of this commit, and push it"),
}


def parse(words: Sequence[str]) -> argparse.Namespace:
  own, arguments = split(words)
  parser = Parser(prog="gke.py", description=__doc__, epilog=EXAMPLES)
  actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
  for name, (_, text) in ACTIONS.items():
    add = actions.add_parser(name, help=text, description=text, epilog=EXAMPLES).add_argument
    add("--dry_run", action="store_true", help="print every command, and run none")
    if name == "image":
      add("--tag", required=True, help="such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/llmjax:NAME")
      add(
        "--extra",
        type=shipping.extras,
        default=[],
        metavar="NAME[,NAME]",
        help="of setup.py, besides gcs: cuda for GPUs (tpu), and more such as wandb",
      )
      add("--dirty", action="store_true", help="ship uncommitted changes of tracked files")
    else:
      add("--name", required=True, help="of the JobSet")
      add("--namespace", help="(the one of kubectl's context)")
      add("--context", help="of kubectl (the current one)")
      add("--secret", default="", help="a Secret that is there and has the variables of --env (one is made of them)")
    if name in ("run", "logs"):
      add("--follow", action="store_true", default=name == "run", help="show the log as it grows")
    if name == "run":
      add("--no_follow", dest="follow", action="store_false", help="wait without showing the log")
      add("--image", required=True, help="that `image` has pushed")
      add("--accelerator", required=True, help=f"{', '.join(TPUS)}, or of GPUs, such as nvidia-h100-80gb")
      add("--topology", default="", help="of a TPU slice, such as 4x4")
      add("--chips_per_node", type=positive, help="1, 4 or 8 (4, as slices of several machines have)")
      add("--slices", type=positive, default=1, help="of one multislice run (1)")
      add("--gpus", type=positive, default=8, help="of each node (8)")
      add("--nodes", type=positive, default=1, help="with GPUs (1)")
      add("--spot", action="store_true", help="cheaper, and may be taken away: the run then goes on")
      add("--service_account", help="of Kubernetes, with access to the bucket")
      add("--node_selector", action="append", default=[], metavar="KEY=VALUE", help="more of them; repeatable")
      add("--env", action="append", default=[], metavar="NAME", help="variable that the run gets too; repeatable")
      add("--max_restarts", type=int, default=100, help="after failures and preemptions (100)")
      add("--poll", type=float, default=5, help="seconds between two looks (5)")
  options = parser.parse_args(own)
  options.arguments = arguments
  if options.action != "image" and not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
    raise ValueError(
      f"--name={options.name} must be at most 40 lower-case letters, digits and hyphens, from a letter to no hyphen"
    )
  if options.action == "run":
    check(options)
  return options


def check(options: argparse.Namespace) -> None:
  """Refuses what would fail late."""
  if not options.arguments:
    raise ValueError("nothing to run; put llmjax's subcommand and flags behind --, such as -- train --config=gpt")
  if options.arguments[0] == "train" and not any(re.match(r"--workdir=gs://.", each) for each in options.arguments):
    raise ValueError("train needs --workdir=gs://BUCKET/..., since a container's disk goes with it")
  if any("=" not in item for item in options.node_selector):
    raise ValueError(f"--node_selector={options.node_selector[0]} must be KEY=VALUE")
  if options.accelerator.startswith("tpu"):
    if options.accelerator not in TPUS:
      raise ValueError(f"--accelerator={options.accelerator} must be {', '.join(TPUS)}, or one of GPUs")
    dimensions = TPUS[options.accelerator][1]
    if not re.fullmatch(r"x".join([r"[1-9]\d*"] * dimensions), options.topology):
      shape = "x".join(["4"] * dimensions)
      raise ValueError(f"--topology={options.topology} of {options.accelerator} must be like {shape}, in chips")
    chips_and_machines(options)
  elif options.topology or options.slices > 1:
    raise ValueError(
      f"--topology and --slices are those of TPUs, and --accelerator={options.accelerator} is none of them"
    )


def main(words: Sequence[str]) -> int:
  options = parse(words)
  if options.dry_run:
    if options.action == "run" and not options.secret:
      shipping.secrets(options.env)  # those that are missing are told
    print("\n".join(plan(options)))
    return 0
  return ACTIONS[options.action][0](options)


if __name__ == "__main__":
  serve(main, "a run goes on in the cluster: the same command follows it, and gke.py delete ends it")
