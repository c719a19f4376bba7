#!/usr/bin/env bash
# Three seeds of both recipes on a text file: bash experiments/char_lm/run.sh input.txt [WORKDIR]
set -euo pipefail
text=${1:?usage: run.sh TEXT_FILE [WORKDIR]}
workdir=${2:-runs/char_lm}
for recipe in nanogpt modern; do
  for seed in 0 1 2; do
    llmjax train --config="char:text=$text,recipe=$recipe" --config.seed="$seed" \
      --workdir="$workdir/$recipe-$seed"
  done
done
python "$(dirname "$0")/plot.py" "$workdir"
