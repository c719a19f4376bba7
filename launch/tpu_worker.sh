#!/usr/bin/env bash
# What tpu_vm.py has each worker of a TPU VM do: bash tpu_worker.sh SUBCOMMAND ARGUMENTS.
#
# Everything is in ~/.llmjax: `lock` is held while a run lasts (a process id could be another process after a reboot),
# `id` says which run it is, `rc` how it ended. gcloud repeats a command whose connection was cut, so that each can run
# twice, also at once. Exit code 65: the installation failed; 66: another run is here; what has others is tried again.

set -euo pipefail

place="$HOME/.llmjax"
variables="$HOME/.llmjax-environment"

# ready COMMIT EXTRAS: whether it is installed with them.
ready() { [ "$(cat "$HOME/llmjax-$1/.ready" 2>/dev/null)" = "$2" ]; }

# install COMMIT EXTRAS: the commit, whose archive has been unpacked, with extras of setup.py such as tpu,gcs.
install() {
  trap 'code=$?; [ "$code" = 0 ] || exit 65' EXIT
  mkdir -p "$place"
  exec 9>"$place/installing"
  flock 9
  cd "$HOME/llmjax-$1"
  cp launch/tpu_worker.sh "$place/worker.sh"
  if ready "$1" "$2"; then return; fi
  # Ubuntu 22.04, which most runtime versions are, has Python 3.10 alone.
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

# begin ID COMMIT ARGUMENTS: starts llmjax with the arguments, unless the run of that id is going on.
begin() {
  local id="$1" folder="$HOME/llmjax-$2"
  shift 2
  trap 'rm -f "$variables"' EXIT
  mkdir -p "$place"
  if [ "$(state)" = running ]; then
    if [ "$(cat "$place/id")" = "$id" ]; then return; fi
    printf 'it is running llmjax %s\n' "$(cat "$place/command")" >&2
    exit 66
  fi
  rm -f "$place/rc" "$place/pid" "$place/stopped"
  if [ -e "$place/log" ]; then mv "$place/log" "$place/log.old"; fi
  printf '%s\n' "$id" >"$place/id"
  printf '%s\n' "$*" >"$place/command"
  set -a
  # shellcheck source=/dev/null
  if [ -e "$variables" ]; then . "$variables"; fi
  set +a
  cd "$folder"
  setsid nohup flock -w 5 -o "$place/lock" bash "$folder/launch/tpu_worker.sh" hold "$@" \
    </dev/null >"$place/log" 2>&1 &
  for _ in $(seq 100); do
    if [ -e "$place/pid" ]; then return; fi
    sleep 0.1
  done
  return 1
}

# hold ARGUMENTS: the run itself.
hold() {
  local code=0
  .venv/bin/llmjax "$@" &
  printf '%s\n' "$!" >"$place/pid"
  wait "$!" || code="$?"
  # Ended by a signal that was not ours: the machine is being taken away, or restarts.
  case "$code" in 130 | 143) [ -e "$place/stopped" ] || return 0 ;; esac
  printf '%s\n' "$code" >"$place/rc"
}

# state: none, running, ended CODE, or lost (to a restart, or to what comes before a preemption).
state() {
  if [ ! -e "$place/id" ]; then
    echo none
  elif ! flock -n -s "$place/lock" true; then
    echo running
  elif [ -s "$place/rc" ]; then
    echo "ended $(cat "$place/rc")"
  else
    echo lost
  fi
}

# report: the state in a line that is told from any other.
report() { printf '\036llmjax %s %s\n' "$(hostname)" "$(state)"; }

# log OFFSET COUNT: the state, and so many bytes of the log.
log() {
  report
  tail -c "+$(($1 + 1))" "$place/log" | head -c "$2" || true
}

# errors: the end of the log of a run that failed.
errors() {
  if [ "$(state)" != 'ended 0' ]; then
    tail -n 20 "$place/log" | sed "s/^/[$(hostname)] /"
  fi
}

# stop: has the run save and end.
stop() {
  touch "$place/stopped"
  if [ "$(state)" = running ]; then kill -TERM "$(cat "$place/pid")"; fi
}

"$@"
