# shellcheck shell=bash
# Functions for the other scripts: make .venv and install llmjax into it, if something has changed since the last time.
# Works with bash 3.2 (macOS), from any folder, in a path with spaces.
#
# Dependencies have the versions of launch/constraints-*.txt, so that a new release of one cannot break a first run.
# Environment variables:
#   LLMJAX_NEWEST=1       installs the newest releases that setup.py allows
#   LLMJAX_PYTHON=PATH    makes the environment with this Python
#   LLMJAX_VENV=DIR       uses this environment instead of .venv

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="${LLMJAX_VENV:-$ROOT/.venv}"
PYTHON="$VENV/bin/python"

note() { printf '%s\n' "$*" >&2; }

die() {
  note "$(basename "$0"): $*"
  exit 1
}

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# find_python: print the first Python that can run llmjax.
find_python() {
  local candidate
  if [ -n "${LLMJAX_PYTHON:-}" ]; then
    supported "$LLMJAX_PYTHON" || die "LLMJAX_PYTHON=$LLMJAX_PYTHON does not run or is older than 3.11"
    echo "$LLMJAX_PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer found (tried python3.13, python3.12, python3.11, python3);" \
    "install one from your package manager or https://www.python.org/downloads/"
}

# python_of VERSION: print the path of that Python, from PATH or pyenv; fail if neither has it.
python_of() {
  local candidate
  for candidate in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/"python$1"; do
    if [ -x "$candidate" ] && supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  if [ ! -e "$PYTHON" ]; then
    local base
    base="$(find_python)" || exit 1
    note "making $VENV with $base"
    "$base" -m venv "$VENV" ||
      die "$base cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"
  fi
  supported "$PYTHON" || die "the Python of $VENV does not run or is older than 3.11; remove that folder and run again"
}

# accelerator: print the extra or requirement for the accelerator of this machine: "cuda", "jax[cuda12]", "tpu" or "".
accelerator() {
  [ "$(uname -s)" = Linux ] || return 0
  local gpu driver capability
  if gpu="$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null | head -n 1)"; then
    driver="${gpu%%.*}"
    capability="${gpu##*, }"
    capability="${capability%%.*}${capability##*.}"
    case "$driver$capability" in
      '' | *[!0-9]*) ;;
      *)
        # CUDA 13 needs driver 580 and compute capability 7.5; CUDA 12 needs driver 525.
        if [ "$driver" -ge 580 ] && [ "$capability" -ge 75 ]; then
          echo cuda
        elif [ "$driver" -ge 525 ]; then
          echo 'jax[cuda12]'
        else
          note "the NVIDIA driver $driver is too old for JAX (525 or newer); using the CPU"
        fi
        return 0
        ;;
    esac
  fi
  if has_tpu; then echo tpu; fi
}

# has_tpu: succeed on a TPU VM. Other cards have such device files too, so the metadata of Google Cloud must agree.
has_tpu() {
  compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null || return 1
  [ -z "${TPU_NAME:-}${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_ID:-}" ] || return 0
  local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type
  curl --silent --fail --max-time 2 --header 'Metadata-Flavor: Google' "$metadata" >/dev/null 2>&1
}

# constraints: print the file of exact versions for this environment's Python.
constraints() {
  "$PYTHON" -c 'import sys; print("launch/constraints-3.%d.txt" % (11 if sys.version_info < (3, 12) else 13))'
}

# install EXTRA: install llmjax, editable, with an extra of setup.py, another requirement, or nothing.
install() {
  local extra="$1" stamp now requirements files=(setup.py)
  case "$extra" in
    '') requirements=(-e .) ;;
    *'['*) requirements=(-e . "$extra") ;;
    *) requirements=(-e ".[$extra]") ;;
  esac
  if [ -z "${LLMJAX_NEWEST:-}" ]; then
    files+=("$(constraints)")
    requirements+=(--constraint "${files[1]}")
  else
    requirements+=(--upgrade --upgrade-strategy eager)
  fi
  stamp="$VENV/.installed-$(printf '%s' "$extra" | tr -c 'a-z0-9' '-')"
  now="$("$PYTHON" -c 'import hashlib, sys
digests = [hashlib.sha256(open(path, "rb").read()).hexdigest() for path in sys.argv[3:]]
print(sys.version, *sys.argv[1:3], *digests)' "$ROOT" "$extra" "${files[@]}")"
  if [ -z "${LLMJAX_NEWEST:-}" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
    return
  fi
  note "installing llmjax${extra:+ with $extra} into $VENV (some minutes the first time)"
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --upgrade >/dev/null
  if "$PYTHON" -m pip install --quiet --disable-pip-version-check "${requirements[@]}"; then
    printf '%s\n' "$now" >"$stamp"
  elif [ -x "$VENV/bin/llmjax" ] && "$PYTHON" -c 'import llmjax.cli' 2>/dev/null; then
    note "could not update $VENV (is there a network?); continuing with the installed versions"
  else
    die "installing failed, see above. Check the network and run again; LLMJAX_NEWEST=1 installs the newest releases" \
      "in place of the versions in launch/constraints-*.txt"
  fi
}

# setup EXTRA: make the environment and install llmjax with the extra.
setup() (
  cd "$ROOT"
  make_venv
  install "$1"
)
