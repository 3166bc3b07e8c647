#!/usr/bin/env bash
# TRL's own tests of its GRPOTrainer on ours, and its GRPO examples; options go to pytest:
#
#     TRL_CHECKOUT=path tests/run_trl_suite.sh [-n 2]
#
# TRL_CHECKOUT: a clone of huggingface/trl, of about the version that is installed. None of its code
# lies here, and nothing is downloaded from the hub: tiny models are made, with random weights. What
# came out is tests/results/trl-suite-VERSION.txt. What TRL's tests want beside TRL (jmespath,
# torchvision) goes into a folder of its own; PIP_OPTIONS goes to pip.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
bin="$(dirname "$(command -v python)")"
. tests/environment.sh
checkout="$(realpath "${TRL_CHECKOUT:?names a clone of huggingface/trl}")"
suite="$PWD/tests/trl_suite" folder="$PWD/build/trl/suite"
if [ ! -d "$folder/site" ]; then
  install --no-deps --target "$folder/site" jmespath "torchvision${TORCHVISION:-==0.28.0}"
  sed -i "1i import vision_operators" "$folder/site/torchvision/__init__.py"
fi

theirs="$(git -C "$checkout" describe --always --tags 2>/dev/null || cat "$checkout/VERSION")"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$suite:$folder/site" HF_DATASETS_CACHE="$folder/hub/cache"
result="$PWD/tests/results/trl-suite-$(version_of trl).txt"
rm -rf "$folder/hub"
mkdir -p "$folder/hub"
cd "$folder/hub"
"$bin/python" -W ignore "$suite/hub.py" "$folder/hub" "$checkout"

run() {  # VARIANT [OPTIONS]: the tests may fail, what became of each is in a file
  "$bin/pytest" -q -p plugin -p no:cacheprovider --disable-warnings --show-capture=no --tb=line \
    --variant "$1" --outcomes "$folder/$1.json" "$checkout/tests/test_grpo_trainer.py" "${@:2}" || true
}

run plain "$@"
run off "$@"
run pruned "$@"
run late "$@"
run contrast -k TestGRPOTrainerVLM "$@"
{
  heading trl torch transformers accelerate peft
  echo "TRL's tests and examples: $theirs"
  "$bin/python" "$suite/compare.py" "$folder"
  echo
  "$bin/python" -W ignore "$suite/examples.py" "$folder/hub" "$checkout" 2>/dev/null
} | tee "$result"
