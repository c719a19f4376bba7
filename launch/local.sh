#!/usr/bin/env bash
# Train a small GPT on real text on this machine, then print the report.
#
#   bash launch/local.sh                                            a nano GPT on the Python library's own source
#   bash launch/local.sh --config=gpt:size=nano,text=my.txt         on your own text
#   bash launch/local.sh --config.total_steps=4000                  other settings: arguments go to `llmjax train`
#
# Makes .venv and installs the dependencies at the first call. After an interruption, the same command resumes.

set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config='' workdir='' trains=yes previous=''
for argument in "$@"; do
  case "$previous" in
    --config | -config) config="$argument" ;;
    --workdir | -workdir) workdir="$argument" ;;
  esac
  case "$argument" in
    --config=*) config="${argument#*=}" ;;
    --workdir=*) workdir="${argument#*=}" ;;
    --dry_run | --help | -h) trains=no ;;
  esac
  previous="$argument"
done

arguments=()
if [ -z "$workdir" ]; then
  # One folder for each config: a run cannot be resumed with another model.
  name="local${config:+-$(printf '%s' "$config" | tr -c 'A-Za-z0-9._=,' '-')}"
  workdir="$ROOT/runs/$name"
  if [ "$PWD" -ef "$ROOT" ]; then workdir="runs/$name"; fi
  arguments+=("--workdir=$workdir")
fi
if [ -z "$config" ]; then
  config=gpt:size=nano
  arguments+=("--config=$config")
fi

setup "$(accelerator)"

llmjax="$VENV/bin/llmjax"
if [ "$trains" = no ]; then
  exec "$llmjax" train ${arguments[@]+"${arguments[@]}"} "$@"
fi
"$llmjax" train ${arguments[@]+"${arguments[@]}"} "$@"
printf '\n'
"$llmjax" report --workdir="$workdir"

if [ "$PWD" -ef "$ROOT" ]; then llmjax=.venv/bin/llmjax; fi
cat <<TEXT

next steps:
  # train this run further: the same command with a larger --config.total_steps
  # on your own text
  bash $(printf '%q' "$0") --config=gpt:size=nano,text=my.txt
  # on the text in a column of your own CSV (or TSV, JSONL, Parquet)
  bash $(printf '%q' "$0") --config=gpt:size=nano,text=my.csv,column=review
  # all configs
  $(printf '%q' "$llmjax") configs
  # faster: the same command on a machine with an NVIDIA GPU or on a Cloud TPU installs JAX for it and trains there
TEXT
