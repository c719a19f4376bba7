#!/usr/bin/env bash
# The test suite. Every part runs; the exit code is 0 if all parts passed. The times of the parts are printed at the end.
#
#   bash launch/test.sh                    format, lint, types and the tests of the tier `default`
#   bash launch/test.sh fast               format, lint, types and every invariant once
#   bash launch/test.sh smoke              every shipped config: train, save, resume, evaluate
#   bash launch/test.sh full               all tests: families, meshes, processes, SLURM, TPU compilation, Transformers;
#                                          with the coverage of lines and branches
#   bash launch/test.sh full meshes        one part of them; the parts are listed in tests/conftest.py
#   bash launch/test.sh mutants            plants bugs one at a time and reports which tests catch each
#   bash launch/test.sh fast -k optim -x   further arguments go to pytest
#
# Makes .venv and installs what is needed on the first call; later calls use no network. Only `full` installs more:
# torch, Transformers and PEFT for `transformers`, libtpu for `tpu`, and, as root, SLURM for `clusters`.

set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

tier=default part=''
case "${1:-}" in
  fast | smoke | mutants)
    tier="$1"
    shift
    ;;
  full)
    tier=full
    shift
    case "${1:-}" in '' | -*) ;; *) part="$1" && shift ;; esac
    ;;
esac

failed=() times=()
# run NAME COMMAND...: run one part, remember its time and whether it failed.
run() {
  local name="$1" start="$SECONDS" code=0
  shift
  printf -- '-- %s\n' "$name"
  "$@" || code=$?
  times+=("$(printf '%5d s  %s' "$((SECONDS - start))" "$name")")
  if [ "$code" -ne 0 ]; then failed+=("$name"); fi
}

# install_libtpu: into a folder of its own, which tests/models/tpu_test.py reads; libtpu beside jax would be used at once.
install_libtpu() {
  local version
  version="$("$PYTHON" -c 'import importlib.metadata, re
print(next(re.match("libtpu[^;]*", r)[0] for r in importlib.metadata.requires("jax") if r.startswith("libtpu")))')"
  if "$PYTHON" -m pip install --quiet --disable-pip-version-check --target="$1" --upgrade --no-deps "$version"; then
    export LLMJAX_LIBTPU="$1"
  else
    note "no $version: nothing is compiled for TPUs"
    return 1
  fi
}

install_all() {
  setup dev || return
  # A part that is asked for must not pass because its tests are skipped; without a part, others still run.
  case "$tier$part" in
    full) setup dev,references || note "torch and Transformers are missing: exports are not opened with them" ;;
    fulltransformers)
      setup dev,references || return
      "$PYTHON" -c 'import peft, torch, transformers' || return
      ;;
  esac
  case "$tier$part" in
    full) install_libtpu "$ROOT/.cache/libtpu" || true ;;
    fulltpu) install_libtpu "$ROOT/.cache/libtpu" || return ;;
  esac
  case "$tier$part" in full | fullclusters) export LLMJAX_SLURM_TEST=install ;; esac
}
run 'installation' install_all
if [ "${#failed[@]}" -gt 0 ]; then exit 1; fi
cd "$ROOT"

# Compiled programs stay on disk between runs, also those of commands that tests start.
export JAX_COMPILATION_CACHE_DIR="$ROOT/.cache/jax"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export PATH="$VENV/bin:$PATH"

# run_pytest NAME ARGUMENTS...: run some tests; it is a failure if none of the calls selects a test (exit code 5).
selects=no
run_pytest() {
  local name="$1"
  shift
  run "$name" selected "$@"
}
selected() {
  local code=0
  "$PYTHON" -m pytest "$@" || code=$?
  if [ "$code" -eq 5 ]; then return 0; fi
  selects=yes
  return "$code"
}

cores="$(getconf _NPROCESSORS_ONLN)"
workers=(-n "$((cores < 4 ? cores : 4))" --dist loadfile --durations=10 --durations-min=0)
case "$tier$part${LLMJAX_LINT:-}" in # LLMJAX_LINT=no: the tests alone
  default | fast | full)
    run 'ruff format --check' "$PYTHON" -m ruff format --check .
    run 'ruff check' "$PYTHON" -m ruff check .
    run mypy "$PYTHON" -m mypy
    run shellcheck shellcheck --external-sources launch/*.sh .ci/run
    ;;
esac
case "$tier$part" in
  smoke) run_pytest 'pytest: smoke' tests/smoke_test.py "${workers[@]}" --dist load "$@" ;;
  mutants) run mutants "$PYTHON" -m tests.support.mutants "$@" ;;
  default | fast) run_pytest "pytest: $tier" tests --tier="$tier" "${workers[@]}" "$@" ;;
  full)
    run_pytest 'pytest: full' tests --tier=full -m 'not serial' "${workers[@]}" \
      --cov=llmjax --cov-branch --cov-report= "$@"
    # Several processes of their own at a time: next to other tests they run into time limits.
    run_pytest 'pytest: full, one at a time' tests --tier=full -m serial --durations=10 \
      --cov=llmjax --cov-branch --cov-append --cov-report=term:skip-covered "$@"
    ;;
  *)
    run_pytest "pytest: full, $part" tests --part="$part" -m 'not serial' "${workers[@]}" "$@"
    run_pytest "pytest: full, $part, one at a time" tests --part="$part" -m serial --durations=10 "$@"
    ;;
esac

if [ "$tier" != mutants ] && [ "$selects" = no ]; then failed+=('pytest: no test is selected'); fi

printf -- '-- times\n'
printf '%s\n' "${times[@]}" "$(printf '%5d s  in all' "$SECONDS")"
if [ "${#failed[@]}" -gt 0 ]; then
  printf -- '-- FAILED: %s\n' "$(IFS=, && echo "${failed[*]}")"
  exit 1
fi
