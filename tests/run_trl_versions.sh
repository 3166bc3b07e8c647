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
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
bin="$(dirname "$(command -v python)")"
versions=("$@")
[ $# -gt 0 ] || versions=(1.7.0 1.16.0)

install() {  # FOLDER PACKAGE ...
    [ -d "$1" ] || DS_BUILD_OPS=0 "$bin/pip" install ${PIP_OPTIONS:-} -q --no-deps --no-build-isolation \
        --target "$@"
}

deepspeed="$PWD/build/trl/deepspeed"
install "$deepspeed" deepspeed==0.19.8 hjson ninja py-cpuinfo msgpack einops pydantic==2.14.3 \
    pydantic-core==2.50.4 annotated-types typing-inspection
commit="$(git describe --always --dirty)"  # before the results make the tree another one
for version in "${versions[@]}"; do
    folder="$PWD/build/trl/$version"
    # Older TRL imports requests, which its requirements do not name.
    install "$folder" "trl==$version" requests urllib3 charset-normalizer idna certifi
    export PYTHONPATH="$folder:$deepspeed"
    {
        echo "$(date -u +%F), commit $commit"
        cd /
        "$bin/python" -W ignore -c "
from importlib.metadata import version
names = ('trl', 'torch', 'transformers', 'accelerate', 'peft', 'deepspeed')
print(*(f'{name} {version(name)}' for name in names), sep=', ')
from cppo.integrations.trl import check
print(*check(), sep='\n')"
        cd - >/dev/null
        "$bin/pytest" -q --disable-warnings ${PYTEST_OPTIONS:-} tests/test_integrations_trl*.py \
            tests/test_docs_integrations.py 2>&1
    } | tee "tests/results/trl-$version.txt"
done
