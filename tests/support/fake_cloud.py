#!/usr/bin/env python3
"""Stands in for gcloud, kubectl or docker, its first argument: answers by a transcript, and plays workers in folders.

$FAKE_CLOUD is a folder with `transcript.json`, [{"call": regular expression, "answers": [{...}, ...]}, ...]: the first
whose expression is found in the call answers it, each time by its next answer, and by the last one again from then on.
An answer has `stdout`, `stderr`, `code`; `seconds` to wait before; `play`: run ssh and scp on the workers, which
are folders `workers/NODE-INDEX` that serve as homes. Calls are written to `calls.jsonl`, with the mode and the text of
files that are copied and what comes in.
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
  answer = record(words)
  time.sleep(answer.get("seconds", 0))
  if answer.get("play"):
    return play(words)
  sys.stdout.write(answer.get("stdout", ""))
  sys.stderr.write(answer.get("stderr", ""))
  return answer.get("code", 0)


def record(words: list) -> dict:
  """Writes the call down; the answer to it."""
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


def play(words: list) -> int:
  """Runs `gcloud compute tpus tpu-vm ssh NODE --worker=W --command=C` or `scp SOURCE NODE:TARGET` on the workers."""
  flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
  node = words[5] if words[4] == "ssh" else words[6].split(":")[0]
  homes = sorted(name for name in os.listdir(f"{FOLDER}/workers") if name.startswith(f"{node}-w"))
  if flags["worker"] != "all":
    homes = [homes[int(flags["worker"])]]
  command, codes = flags.get("command", ""), []
  if words[4] == "scp":  # with its mode, as scp does
    command = f"cp -p {words[5]} {words[6].split(':')[1]}"
  for home in homes:
    place = f"{FOLDER}/workers/{home}"
    path = f"{FOLDER}/worker_bin:{os.environ['PATH']}"
    if not os.fork():
      os.chdir(place)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      os.execvpe("bash", ["bash", "-c", command], {**os.environ, "HOME": place, "WORKER": home, "PATH": path})
    codes.append(os.wait()[1] >> 8)
  return next((code for code in codes if code), 0)


if __name__ == "__main__":
  sys.exit(main())
