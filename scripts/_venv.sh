# Sourced by the other scripts: `ensure_venv [extra]` makes .venv at the root if there is none, and installs what
# pyproject.toml asks for if that has changed. Sets PY to the environment's python.
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# The root holds links named `kernels`, `serve`, ...; nothing may import them as top-level packages.
export PYTHONSAFEPATH=1
PY="$root/.venv/bin/python"

ensure_venv() {
  local extra=${1:-} python=${PYTHON:-python3} target="." stamp
  [ -n "$extra" ] && target=".[$extra]"
  if [ ! -x "$PY" ]; then
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
      echo "error: $("$python" --version 2>&1) at $(command -v "$python") is not supported; set PYTHON to a Python 3.11 to 3.13" >&2
      exit 2
    fi
    echo "making .venv with $("$python" --version) ..."
    "$python" -m venv .venv
  fi
  stamp=".venv/.installed-${extra:-base}"
  if ! cat pyproject.toml constraints.txt | cmp -s - "$stamp"; then
    echo "installing $target into .venv (about a minute the first time) ..."
    "$PY" -m pip install --disable-pip-version-check --no-warn-script-location -c constraints.txt -e "$target" |
      sed '/^Requirement already satisfied/d'
    cat pyproject.toml constraints.txt > "$stamp"
  fi
}
