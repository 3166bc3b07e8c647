#!/usr/bin/env bash
# The TRL tests against the oldest and the newest supported TRL:
#
#     tests/run_trl_versions.sh [VERSION ...]        # default: 1.7.0 1.16.0
#
# Each version goes into a folder of its own, in front of the active environment's packages, which stay
# as they are. PIP_OPTIONS goes to pip, PYTEST_OPTIONS to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
bin="$(dirname "$(command -v python)")"
versions=("$@")
[ $# -gt 0 ] || versions=(1.7.0 1.16.0)

for version in "${versions[@]}"; do
    folder="$PWD/build/trl/$version"
    if [ ! -d "$folder/trl" ]; then
        # Older TRL imports requests, which its requirements do not name.
        "$bin/pip" install ${PIP_OPTIONS:-} -q --no-deps --target "$folder" "trl==$version" \
            requests urllib3 charset-normalizer idna certifi
    fi
    echo "trl $version"
    PYTHONPATH="$folder" "$bin/pytest" -q ${PYTEST_OPTIONS:-} \
        tests/test_integrations_trl.py tests/test_docs_integrations.py
done
