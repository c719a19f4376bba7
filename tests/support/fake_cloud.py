#!/usr/bin/env python3
"""Stand in for gcloud, kubectl or docker (the first argument): answer from a transcript and run workers in folders.

$FAKE_CLOUD is a folder with `transcript.json`, [{"call": regular expression, "answers": [{...}, ...]}, ...]. The first
entry whose expression is found in the call answers it: each call takes its next answer, the last one repeats. Keys of
an answer, all optional:
  stdout, stderr, code  the response
  before                shell command to run first; $CALLER is the process that called
  seconds               time to wait before the response
  play                  run ssh and scp on the workers, folders `workers/NODE-wINDEX` that serve as homes
Calls are appended to `calls.jsonl` with the standard input and the mode and text of copied files.
"""

import fcntl
import json
import os
import re
import sys
import time

FOLDER = os.environ["FAKE_CLOUD"]


def main() -> int:
  words = sys.argv[1:]
  answer = record_call(words)
  if "before" in answer:
    os.environ["CALLER"] = str(os.getppid())
    if os.system(answer["before"]):  # importing subprocess would take a third longer than all of this
      return 98
  time.sleep(answer.get("seconds", 0))
  if answer.get("play"):
    return run_on_workers(words)
  sys.stdout.write(answer.get("stdout", ""))
  sys.stderr.write(answer.get("stderr", ""))
  return answer.get("code", 0)


def record_call(words: list) -> dict:
  """Append the call to `calls.jsonl` and return the answer to it."""
  with open(f"{FOLDER}/lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(f"{FOLDER}/transcript.json") as file:
      transcript = json.load(file)
    counts = {}
    if os.path.exists(f"{FOLDER}/counts.json"):
      with open(f"{FOLDER}/counts.json") as file:
        counts = json.load(file)
    answer = {"stderr": f"fake: no answer to {words}\n", "code": 99}
    for entry in transcript:
      if re.search(entry["call"], " ".join(words)):
        count = counts.get(entry["call"], 0)
        answer = entry["answers"][min(count, len(entry["answers"]) - 1)]
        counts[entry["call"]] = count + 1
        break
    with open(f"{FOLDER}/counts.json", "w") as file:
      json.dump(counts, file)
    call = {"words": words, "known": answer.get("code") != 99}
    if "scp" in words and not words[5].endswith(".gz"):
      with open(words[5]) as file:
        call.update(mode=oct(os.stat(words[5]).st_mode & 0o777), text=file.read())
    if {"--filename=-", "--from-env-file=/dev/stdin"} & set(words):
      call["input"] = sys.stdin.read()
    with open(f"{FOLDER}/calls.jsonl", "a") as calls:
      calls.write(json.dumps(call) + "\n")
  return answer


def run_on_workers(words: list) -> int:
  """Run `gcloud compute tpus tpu-vm ssh NODE --worker=W --command=C` or `scp SOURCE NODE:TARGET` on the workers."""
  flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
  node = words[5] if words[4] == "ssh" else words[6].split(":")[0]
  homes = sorted(name for name in os.listdir(f"{FOLDER}/workers") if name.startswith(f"{node}-w"))
  if flags["worker"] != "all":
    homes = [homes[int(flags["worker"])]]
  command, codes = flags.get("command", ""), []
  if words[4] == "scp":  # -p: scp keeps the mode
    command = f"cp -p {words[5]} {words[6].split(':')[1]}"
  for name in homes:
    home = f"{FOLDER}/workers/{name}"
    path = f"{FOLDER}/worker_bin:{os.environ['PATH']}"
    if not os.fork():
      os.chdir(home)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      os.execvpe("bash", ["bash", "-c", command], {**os.environ, "HOME": home, "WORKER": name, "PATH": path})
    codes.append(os.wait()[1] >> 8)
  return next((code for code in codes if code), 0)


if __name__ == "__main__":
  sys.exit(main())
