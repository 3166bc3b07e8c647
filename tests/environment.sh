# shellcheck shell=bash
# What the scripts share that run tests in an environment of their own; each sources it after it has
# set `bin`, the folder of that environment's python. PIP_OPTIONS: for every pip.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
commit="$(git describe --always --dirty)"  # before the results make the tree another one

install() {  # PACKAGE ...
  # PIP_OPTIONS is several words.
  # shellcheck disable=SC2086
  "$bin/pip" install --quiet ${PIP_OPTIONS:-} "$@"
}

make_environment() {  # unless it is there; torch first, and later the same: nothing may replace it
  [ -x "$bin/pip" ] || (cd / && "${PYTHON:-python3}" -m venv "$(dirname "$bin")")
  install "${TORCH:=torch==2.13.0}"
}

version_of() {  # DISTRIBUTION
  (cd / && "$bin/python" -c "
from importlib.metadata import version
print(version('$1'))")
}

heading() {  # DISTRIBUTION ...: when, of which commit and with what the results are
  echo "$(date -u +%F), commit $commit"
  (cd / && "$bin/python" -W ignore -c "
import sys
from importlib.metadata import version
print(*(f'{name} {version(name)}' for name in sys.argv[1:]), sep=', ')" "$@")
}

fits() {  # ADAPTER: what its check of the installed library says
  (cd / && "$bin/python" -W ignore -c "
from cppo.integrations.$1 import check
print(*check(), sep='\n')")
}
