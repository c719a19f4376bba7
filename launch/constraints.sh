#!/usr/bin/env bash
# Write launch/constraints-3.11.txt and launch/constraints-3.13.txt: exact versions of the newest releases of all
# dependencies of llmjax and its extras. Run it, then the tests, then commit both files.
#
#   bash launch/constraints.sh
#
# Needs Python 3.11 and 3.13, and a network. Environments with Python 3.12 and newer use the file of 3.13.

set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT
cd "$ROOT"
for version in 3.11 3.13; do
  python="$(python_of "$version")" || die "no Python $version found on PATH or below pyenv's versions"
  "$python" -m venv "$temporary/$version"
  "$temporary/$version/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev,gcs,wandb]'
  {
    printf '# Made by launch/constraints.sh with Python %s.\n' "$version"
    "$temporary/$version/bin/python" -m pip freeze --disable-pip-version-check --exclude-editable
  } >"$temporary/$version.txt"
  mv "$temporary/$version.txt" "launch/constraints-$version.txt"
  note "wrote launch/constraints-$version.txt"
done
