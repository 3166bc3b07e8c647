#!/usr/bin/env bash
# The tests of the ops against builds with other flags than those that are shipped:
#
#     tests/run_builds.sh [O1] [sanitizers]          # default: both
#
# O1          accuracy and results hang on no optimisation of the compiler
# sanitizers  AddressSanitizer and UndefinedBehaviorSanitizer: no access outside a tensor, no undefined
#             arithmetic
#
# Triton's kernels are left out: no compiler of C++ sees them.
# Each build goes into a folder of its own below build/; the package in the tree stays as it is. What came
# out is tests/results/builds.txt. PYTEST_OPTIONS goes to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
root="$PWD"
bin="$(dirname "$(command -v python)")"
builds=("$@")
[ $# -gt 0 ] || builds=(O1 sanitizers)

ops=(test_row_kernels.py test_token_stats.py test_cppo_loss.py test_logits_ops.py
    test_inplace.py test_private_ops.py test_perception_mask.py
    test_pack_completions.py test_advantages.py test_planners.py test_heads.py)

flags_of() {
    case "$1" in
    O1) echo "-O1" ;;
    sanitizers)
        # vptr checks need the type information of a library that is loaded later.
        echo "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr"
        ;;
    *) echo "tests/run_builds.sh: no build is called '$1' (O1, sanitizers)" >&2 && exit 2 ;;
    esac
}

build() {  # NAME
    CPPO_FORCE_BUILD=1 CPPO_CXXFLAGS="$(flags_of "$1")" "$bin/python" setup.py -q build \
        --build-base "build/builds/$1" --build-lib "build/builds/$1/lib" >"build/builds/$1.log" 2>&1
}

check() {  # NAME: the tests against that build
    local options=(-q --disable-warnings -rfE -p no:cacheprovider) without="not triton"
    if [ "$1" = sanitizers ]; then
        # Python itself leaks. An allocation of terabytes fails as it does without a sanitizer.
        export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1"
        export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1"
        LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so)"
        LD_PRELOAD+=" $("${CXX:-g++}" -print-file-name=libubsan.so)"
        export LD_PRELOAD
        # A sanitizer multiplies what a process takes.
        without+=" and not memory"
    fi
    # From there: processes that the tests start import the build too, not the tree they stand in.
    cd "build/builds/$1"
    export PYTHONPATH="$PWD/lib"
    "$bin/python" -c "
import cppo, torch
print('cppo from', cppo.__file__.removeprefix('$root/'), 'torch', torch.__version__)
print('row kernels:', torch.ops.cppo.row_capability())"
    "$bin/pytest" "${options[@]}" -k "$without" ${PYTEST_OPTIONS:-} "${ops[@]/#/$root/tests/}" 2>&1
}

mkdir -p build/builds
commit="$(git describe --always --dirty)"  # before the file of results is another
for name in "${builds[@]}"; do flags_of "$name" >/dev/null; done
{
    echo "$(date -u +%F), commit $commit, $("${CXX:-g++}" --version | head -1)"
    for name in "${builds[@]}"; do
        echo
        echo "== $name: $(flags_of "$name")"
        build "$name"
        (check "$name") || failed=1
    done
    exit "${failed:-0}"
} | tee tests/results/builds.txt
