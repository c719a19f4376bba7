"""Stand in for `llmjax` in a process of launch/processes.py: report the environment, then act as told.

Argument i is the action of process i: `wait`, `killed`, or an exit code.
"""

import os
import signal
import sys
import time

VARIABLES = (
  "LLMJAX_COORDINATOR",
  "LLMJAX_NUM_PROCESSES",
  "JAX_PLATFORMS",
  "JAX_NUM_CPU_DEVICES",
  "CUDA_VISIBLE_DEVICES",
)


def report(text, file=None):
  """Print a line in one write, so that lines of several processes do not mix."""
  print(f"{text}\n", end="", file=file, flush=True)


def end(number, frame):
  report(f"received {signal.Signals(number).name}")
  time.sleep(0.3)
  sys.exit(130)


def main():
  index = int(os.environ["LLMJAX_PROCESS_ID"])
  if os.getsid(0) != os.getpid():
    report("in the session of the terminal")
  signal.signal(signal.SIGINT, end)
  signal.signal(signal.SIGTERM, end)
  report(" ".join([str(index), *(os.environ.get(name, "-") for name in VARIABLES)]))
  report("to stderr", sys.stderr)
  action = sys.argv[1 + index]
  if action == "wait":
    time.sleep(60)
  elif action == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
  sys.exit(int(action))


if __name__ == "__main__":
  main()
