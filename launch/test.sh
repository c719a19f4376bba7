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

tests=(tests -m "not matrix")
lint=yes
case "${1:-}" in
  smoke)
    tests=(tests/smoke_test.py)
    lint=no
    shift
    ;;
  matrix)
    tests=(tests/verify_test.py -k any_mesh)
    lint=no
    shift
    ;;
  fast)
    tests=(tests -m "not slow")
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
part pytest pytest "${tests[@]}" "$@"
[ "${#failed[@]}" -eq 0 ]
