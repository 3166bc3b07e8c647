#!/usr/bin/env bash
# Runs the tests of verl's adapter in an environment with verl; options go to pytest. What came out is
# tests/results/verl-VERSION.txt.
# VERL_VENV: an environment that has everything already; without it build/verl-venv is made.
# TORCH, VERL: what to install there. PIP_OPTIONS: for every pip.
# verl's own extras bring torchvision, flash-attn or vLLM, of which nothing is needed here.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
TORCH="${TORCH:-torch==2.13.0}"
VENV="${VERL_VENV:-$PWD/build/verl-venv}"
unset VIRTUAL_ENV PYTHONPATH

install() {
  # The same torch each time: nothing may replace it. PIP_OPTIONS is several words.
  # shellcheck disable=SC2086
  "$VENV/bin/pip" install --quiet ${PIP_OPTIONS:-} "$@"
}

if [ -z "${VERL_VENV:-}" ]; then
  [ -x "$VENV/bin/pip" ] || (cd / && "${PYTHON:-python3}" -m venv "$VENV")
  install "$TORCH"
  install --no-deps "${VERL:-verl==0.9.1}"
  install "$TORCH" "transformers>=5.5.3,!=5.6.0,<5.11" "tensordict>=0.8,!=0.9,<=0.10" "numpy>=2" \
    accelerate cachetools codetiming datasets dill fastapi hydra-core msgspec packaging pandas peft \
    jinja2 pillow "pyarrow>=19" pylatexenc pyyaml pyzmq "ray[default]" rich scikit-learn tensorboard \
    torchdata "TransferQueue>=0.1.10" uvicorn xxhash \
    expecttest hypothesis pybind11 pytest pytest-timeout "setuptools>=77" wheel
  install --no-build-isolation --no-deps .
fi

cd /
result="$OLDPWD/tests/results/verl-$("$VENV/bin/python" -c "
from importlib.metadata import version
print(version('verl'))").txt"
cd - >/dev/null
commit="$(git describe --always --dirty)"  # before the file changes
{
  echo "$(date -u +%F), commit $commit"
  cd /
  "$VENV/bin/python" -W ignore -c "
from importlib.metadata import version
names = ('verl', 'torch', 'transformers', 'ray', 'tensordict', 'TransferQueue')
print(*(f'{name} {version(name)}' for name in names), sep=', ')
from cppo.integrations.verl import check
print(*check(), sep='\n')" 2>/dev/null
  cd - >/dev/null
  "$VENV/bin/pytest" -q --disable-warnings tests/test_integrations_verl*.py "$@" 2>&1
} | tee "$result"
