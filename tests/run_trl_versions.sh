#!/usr/bin/env bash
# The TRL tests against the oldest and the newest supported TRL, with DeepSpeed beside them:
#
#     tests/run_trl_versions.sh [VERSION ...]        # default: 1.7.0 1.16.0
#
# Each version goes into a folder of its own, in front of the active environment's packages, which stay
# as they are. What came out is tests/results/trl-VERSION.txt. PIP_OPTIONS goes to pip, PYTEST_OPTIONS to
# pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
bin="$(dirname "$(command -v python)")"
. tests/environment.sh
versions=("$@")
[ $# -gt 0 ] || versions=(1.7.0 1.16.0)

install_into() {  # FOLDER PACKAGE ...
    [ -d "$1" ] || DS_BUILD_OPS=0 install --no-deps --no-build-isolation --target "$@"
}

deepspeed="$PWD/build/trl/deepspeed"
install_into "$deepspeed" deepspeed==0.19.8 hjson ninja py-cpuinfo msgpack einops pydantic==2.14.3 \
    pydantic-core==2.50.4 annotated-types typing-inspection
for version in "${versions[@]}"; do
    folder="$PWD/build/trl/$version"
    # Older TRL imports requests, which its requirements do not name.
    install_into "$folder" "trl==$version" requests urllib3 charset-normalizer idna certifi
    export PYTHONPATH="$folder:$deepspeed"
    {
        heading trl torch transformers accelerate peft deepspeed
        fits trl
        "$bin/pytest" -q --disable-warnings ${PYTEST_OPTIONS:-} tests/test_integrations_trl*.py \
            tests/test_docs_integrations.py 2>&1
    } | tee "tests/results/trl-$version.txt"
done
