#!/usr/bin/env bash
# Makes an environment with verl and runs the tests of its adapter there; options go to pytest.
# VERL_VENV: where (build/verl-venv). TORCH, VERL: what to install. PIP_OPTIONS: for every pip.
# verl's own extras bring torchvision, flash-attn or vLLM, of which nothing is needed here.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
TORCH="${TORCH:-torch==2.13.0}"
VENV="${VERL_VENV:-$PWD/build/verl-venv}"
unset VIRTUAL_ENV

install() {
  # The same torch each time: nothing may replace it. PIP_OPTIONS is several words.
  # shellcheck disable=SC2086
  "$VENV/bin/pip" install --quiet ${PIP_OPTIONS:-} "$@"
}

[ -x "$VENV/bin/pip" ] || (cd / && "${PYTHON:-python3}" -m venv "$VENV")
install "$TORCH"
install --no-deps "${VERL:-verl==0.9.1}"
install "$TORCH" "transformers>=5.5.3,!=5.6.0,<5.11" "tensordict>=0.8,!=0.9,<=0.10" "numpy>=2" \
  accelerate cachetools codetiming datasets dill fastapi hydra-core msgspec packaging pandas peft \
  pillow "pyarrow>=19" pylatexenc pyyaml pyzmq "ray[default]" rich scikit-learn tensorboard \
  torchdata "TransferQueue>=0.1.10" uvicorn \
  expecttest hypothesis pybind11 pytest pytest-timeout "setuptools>=77" wheel
install --no-build-isolation --no-deps .

cd /
"$VENV/bin/python" -W ignore -c "
import torch, transformers, verl, ray, tensordict
import cppo.integrations.verl as adapter
print(f'torch {torch.__version__}, transformers {transformers.__version__}, ray {ray.__version__},',
      f'tensordict {tensordict.__version__}')
print(*adapter.check(), sep='\n')" 2>/dev/null
cd - >/dev/null
"$VENV/bin/pytest" tests/test_integrations_verl*.py "$@"
