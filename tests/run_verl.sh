#!/usr/bin/env bash
# Runs the tests of verl's adapter in an environment with verl; options go to pytest. What came out is
# tests/results/verl-VERSION.txt.
# VERL_VENV: an environment that has everything already; without it build/verl-venv is made.
# TORCH, VERL: what to install there. PIP_OPTIONS: for every pip.
# verl's own extras bring torchvision, flash-attn or vLLM, of which nothing is needed here.
set -euo pipefail
cd "$(dirname "$0")/.."
bin="${VERL_VENV:-$PWD/build/verl-venv}/bin"
. tests/environment.sh
unset VIRTUAL_ENV PYTHONPATH

if [ -z "${VERL_VENV:-}" ]; then
  make_environment
  install --no-deps "${VERL:-verl==0.9.1}"
  install "$TORCH" "transformers>=5.5.3,!=5.6.0,<5.11" "tensordict>=0.8,!=0.9,<=0.10" "numpy>=2" \
    accelerate cachetools codetiming datasets dill fastapi hydra-core msgspec packaging pandas peft \
    jinja2 pillow "pyarrow>=19" pylatexenc pyyaml pyzmq "ray[default]" rich scikit-learn tensorboard \
    torchdata "TransferQueue>=0.1.10" uvicorn xxhash \
    expecttest hypothesis pybind11 pytest pytest-timeout "setuptools>=77" wheel
  install --no-build-isolation --no-deps .
fi

{
  heading verl torch transformers ray tensordict TransferQueue
  fits verl 2>/dev/null
  "$bin/pytest" -q --disable-warnings tests/test_integrations_verl*.py "$@" 2>&1
} | tee "tests/results/verl-$(version_of verl).txt"
