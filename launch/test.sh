#!/usr/bin/env bash
# The whole test suite: format, lint, types, tests. Every part runs; the exit code says whether all passed.
#
#   bash launch/test.sh              everything
#   bash launch/test.sh matrix       instead, every kind of model on every kind of mesh (`everything` has 14 of these 45)
#   bash launch/test.sh fast         without the tests marked slow
#   bash launch/test.sh smoke        only the smoke test: every config, a few steps
#   bash launch/test.sh fast -k optim -x        further arguments go to pytest
#
# Makes .venv and installs what is needed at the first call; afterwards no network is used.

set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

lint=yes
# Those marked slow have several processes of their own, and come one by one afterwards.
cores="$(getconf _NPROCESSORS_ONLN)"
side_by_side=(-n "$((cores < 4 ? cores : 4))" --dist loadfile)
fast=(tests -m "not slow and not matrix" "${side_by_side[@]}")
slow=(tests -m "slow and not matrix")
case "${1:-}" in
  smoke)
    fast=(tests/smoke_test.py "${side_by_side[@]}" --dist load)
    slow=()
    lint=no
    shift
    ;;
  matrix)
    fast=(tests/verify_test.py -k any_mesh)
    slow=()
    lint=no
    shift
    ;;
  fast)
    slow=()
    shift
    ;;
esac

setup dev
cd "$ROOT"

# Compiled programs are kept between runs, also those of the commands that tests start.
export JAX_COMPILATION_CACHE_DIR="$ROOT/.cache/jax"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export PATH="$VENV/bin:$PATH"

failed=()
part() {
  local name="$1"
  shift
  printf -- '-- %s\n' "$name"
  "$PYTHON" -m "$@" || failed+=("$name")
}

if [ "$lint" = yes ]; then
  part 'ruff format --check' ruff format --check .
  part 'ruff check' ruff check .
  part mypy mypy
  if [ "${#failed[@]}" -gt 0 ]; then
    printf '   FAILED so far: %s\n' "$(IFS=, && echo "${failed[*]}")"
  fi
fi

ran=no
check() {
  local code=0
  "$PYTHON" -m pytest "$@" || code=$?
  case "$code" in
    0) ran=yes ;;
    5) ;; # none of these was asked for
    *) failed+=(pytest) ran=yes ;;
  esac
}

printf -- '-- pytest\n'
check "${fast[@]}" "$@"
if [ "${#slow[@]}" -gt 0 ]; then
  printf -- '-- pytest, slow ones\n'
  check "${slow[@]}" "$@"
fi
[ "${#failed[@]}" -eq 0 ] && [ "$ran" = yes ]
