# shellcheck shell=bash
# Sourced by the other scripts: `ensure_venv [extra]` makes .venv at the root if there is none, and installs the
# requirements of pyproject.toml if they have changed. Sets PY to the environment's python.
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
# The root holds links named `kernels`, `serve`, ...; nothing may import them as top-level packages.
export PYTHONSAFEPATH=1
PY="$root/.venv/bin/python"
pip_log=.venv/pip.log

ensure_venv() {
  local extra=${1:-} stamp
  stamp=".venv/.installed-${extra:-base}"
  if [ -x "$PY" ] && cat pyproject.toml constraints.txt | cmp -s - "$stamp"; then return; fi
  # An environment without pip is incomplete: an earlier run was interrupted.
  if ! "$PY" -m pip show pip > /dev/null 2>&1; then make_venv; fi
  rm -f "$stamp"
  install_packages "$extra"
  cat pyproject.toml constraints.txt > "$stamp"
}

make_venv() {
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $("$python" --version 2>&1) at $(command -v "$python") is not supported; set PYTHON to a Python 3.11 to 3.13" >&2
    exit 2
  fi
  echo "making .venv with $("$python" --version) ..."
  "$python" -m venv --clear .venv || exit
}

# PyPI's torch for Linux is the CUDA build, several gigabytes. Without an NVIDIA driver, torch comes from the index of
# CPU builds, in a call of its own: with both indexes in one call, pip might take any package from either. If pip's
# settings already name a package source, they are respected.
install_packages() {
  local extra=$1 start=$SECONDS
  : > "$pip_log"
  if pip_has_index; then
    echo "pip's own configuration says where packages come from; it is used as it is"
  elif ! has_nvidia_driver; then
    echo "installing torch's CPU build into .venv (there is no NVIDIA driver) ..."
    pip_install --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch
  fi
  echo "installing moe-runtime${extra:+[$extra]} and what it needs into .venv ..."
  pip_install -c constraints.txt -e ".${extra:+[$extra]}"
  echo "installed in $((SECONDS - start)) s"
}

has_nvidia_driver() { [ -e /dev/nvidiactl ] || [ -e /proc/driver/nvidia/version ]; }

# Whether pip's files or PIP_* variables name a package source; `pip config list` shows both, as section.key='value'.
pip_has_index() {
  local config
  config=$("$PY" -m pip config list) || exit
  grep -Eq "\.(index-url|pypi-url|extra-index-url|find-links|no-index)=.{3,}" <<< "$config" # ='' counts as unset
}

pip_install() {
  local options=(--disable-pip-version-check --no-warn-script-location --progress-bar off)
  if ! (
    set -o pipefail
    "$PY" -m pip install "${options[@]}" "$@" < /dev/null 2>&1 | tee -a "$pip_log" | scripts/_pip_progress
  ); then
    tail -n 15 "$pip_log" >&2
    echo "error: pip failed; all it said is in $root/$pip_log" >&2
    exit 1
  fi
}
