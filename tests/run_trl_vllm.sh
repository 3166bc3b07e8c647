#!/usr/bin/env bash
# CPPOGRPOTrainer with a real vLLM, on a CPU; options go to pytest. What came out is
# tests/results/trl-vllm-VERSION.txt.
# VLLM_VENV: the environment that tests/run_vllm.sh makes. TRL goes into a folder of its own beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
TRL="${TRL:-1.16.0}"
VENV="${VLLM_VENV:-$PWD/build/vllm-venv}"
folder="${TRL_FOLDER:-$PWD/build/trl/vllm-$TRL}"
unset VIRTUAL_ENV
# PIP_OPTIONS is several words.
# shellcheck disable=SC2086
[ -d "$folder" ] || "$VENV/bin/pip" install --quiet ${PIP_OPTIONS:-} --no-deps --target "$folder" \
  "trl==$TRL" datasets dill multiprocess pandas python-dateutil six

export PYTHONPATH="$PWD:$PWD/tests/real_vllm/shim:$folder"
result="$PWD/tests/results/trl-vllm-$("$VENV/bin/python" -c "
from importlib.metadata import version
print(version('vllm-cpu'))").txt"
commit="$(git describe --always --dirty)"  # before the result makes the tree another one
{
  echo "$(date -u +%F), commit $commit"
  "$VENV/bin/python" -W ignore -c "
from importlib.metadata import version
names = ('trl', 'vllm-cpu', 'torch', 'transformers', 'peft')
print(*(f'{name} {version(name)}' for name in names), sep=', ')
from cppo.integrations.trl import check
print(*check(), sep='\\n')"
  "$VENV/bin/pytest" -q -s --disable-warnings --show-capture=no tests/real_trl "$@" 2>&1 |
    grep -E 'differences|passed|failed|FAILED|^E  |^[0-9]+ '
} | tee "$result"
