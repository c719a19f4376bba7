#!/usr/bin/env bash
# Commands that tpu_vm.py runs on each worker of a TPU VM: bash tpu_worker.sh SUBCOMMAND ARGUMENTS.
#
# Files are in ~/.llmjax: `lock` is locked while a run lasts (a process id could be another process after a reboot), `id`
# identifies the run, `rc` has its exit code. gcloud repeats a command whose connection was cut, so each command may run
# twice, also at the same time. Exit code 65: the installation failed; 66: another run is running; others are retried.

set -euo pipefail

state_dir="$HOME/.llmjax"
variables="$HOME/.llmjax-environment"

# ready COMMIT EXTRAS: succeed if the commit is installed with the extras.
ready() { [ "$(cat "$HOME/llmjax-$1/.ready" 2>/dev/null)" = "$2" ]; }

# install COMMIT EXTRAS: install the unpacked commit with extras of setup.py such as tpu,gcs.
install() {
  trap 'code=$?; [ "$code" = 0 ] || exit 65' EXIT
  mkdir -p "$state_dir"
  exec 9>"$state_dir/installing"
  flock 9
  cd "$HOME/llmjax-$1"
  cp launch/tpu_worker.sh "$state_dir/worker.sh"
  if ready "$1" "$2"; then return; fi
  # Most runtime versions are Ubuntu 22.04, which has only Python 3.10.
  if ! python3.12 -m ensurepip --version >/dev/null 2>&1; then
    packages update
    packages install python3.12-venv || {
      sudo add-apt-repository --yes ppa:deadsnakes/ppa
      packages install python3.12-venv
    }
  fi
  bash -c '. launch/setup.sh; setup "$1"' setup "$2"
  rm -f "$HOME/llmjax-$1.tar.gz"
  printf '%s\n' "$2" >.ready
}

packages() { sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 "$@"; }

# begin ID COMMIT ARGUMENTS: start llmjax with the arguments, unless the run of that id is running.
begin() {
  local id="$1" folder="$HOME/llmjax-$2"
  shift 2
  trap 'rm -f "$variables"' EXIT
  mkdir -p "$state_dir"
  if [ "$(state)" = running ]; then
    if [ "$(cat "$state_dir/id")" = "$id" ]; then return; fi
    printf 'it is running llmjax %s\n' "$(cat "$state_dir/command")" >&2
    exit 66
  fi
  rm -f "$state_dir/rc" "$state_dir/pid" "$state_dir/stopped"
  if [ -e "$state_dir/log" ]; then mv "$state_dir/log" "$state_dir/log.old"; fi
  printf '%s\n' "$id" >"$state_dir/id"
  printf '%s\n' "$*" >"$state_dir/command"
  set -a
  # shellcheck source=/dev/null
  if [ -e "$variables" ]; then . "$variables"; fi
  set +a
  cd "$folder"
  setsid nohup flock -w 5 -o "$state_dir/lock" bash "$folder/launch/tpu_worker.sh" hold "$@" \
    </dev/null >"$state_dir/log" 2>&1 &
  for _ in $(seq 100); do
    if [ -e "$state_dir/pid" ]; then return; fi
    sleep 0.1
  done
  return 1
}

# hold ARGUMENTS: run llmjax and write its exit code.
hold() {
  local code=0
  .venv/bin/llmjax "$@" &
  printf '%s\n' "$!" >"$state_dir/pid"
  wait "$!" || code="$?"
  # A signal that `stop` has not sent: the machine is preempted or restarts, so the run has no exit code.
  case "$code" in 130 | 143) [ -e "$state_dir/stopped" ] || return 0 ;; esac
  printf '%s\n' "$code" >"$state_dir/rc"
}

# state: print none, running, ended CODE, or lost (by a restart or a preemption).
state() {
  if [ ! -e "$state_dir/id" ]; then
    echo none
  elif ! flock -n -s "$state_dir/lock" true; then
    echo running
  elif [ -s "$state_dir/rc" ]; then
    echo "ended $(cat "$state_dir/rc")"
  else
    echo lost
  fi
}

# report: print the state in a line that no other output looks like.
report() { printf '\036llmjax %s %s\n' "$(hostname)" "$(state)"; }

# log OFFSET COUNT: print the state, and COUNT bytes of the log.
log() {
  report
  tail -c "+$(($1 + 1))" "$state_dir/log" | head -c "$2" || true
}

# errors: print the end of the log of a failed run.
errors() {
  if [ "$(state)" != 'ended 0' ]; then
    tail -n 20 "$state_dir/log" | sed "s/^/[$(hostname)] /"
  fi
}

# stop: have the run save and end.
stop() {
  touch "$state_dir/stopped"
  if [ "$(state)" = running ]; then kill -TERM "$(cat "$state_dir/pid")"; fi
}

"$@"
