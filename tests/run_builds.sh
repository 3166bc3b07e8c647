#!/usr/bin/env bash
# The tests of the ops against builds with other flags than those that are shipped:
#
#     tests/run_builds.sh [O1] [sanitizers]          # default: both
#
# O1          accuracy and results hang on no optimisation of the compiler
# sanitizers  AddressSanitizer and UndefinedBehaviorSanitizer: no access outside a tensor, no undefined
#             arithmetic. Triton's interpreter is left out, which is Python.
#
# Each build goes into a folder of its own below build/; the package in the tree stays as it is. What came
# out is tests/results/builds.txt. PYTEST_OPTIONS goes to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
# The root of the repository stays off the path: the tests import the package of the build.
export PYTHONSAFEPATH=1
bin="$(dirname "$(command -v python)")"
builds=("$@")
[ $# -gt 0 ] || builds=(O1 sanitizers)

ops=(tests/test_row_kernels.py tests/test_token_stats.py tests/test_cppo_loss.py tests/test_logits_ops.py
    tests/test_inplace.py tests/test_private_ops.py tests/test_perception_mask.py
    tests/test_pack_completions.py tests/test_advantages.py tests/test_planners.py tests/test_heads.py
    tests/test_kept_memory.py)

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
    local options=(-q --disable-warnings -p no:cacheprovider)
    if [ "$1" = sanitizers ]; then
        # Python itself leaks; torch's allocations are tracked too, and a page that is kept is no leak.
        export ASAN_OPTIONS="detect_leaks=0" UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1"
        LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so)"
        LD_PRELOAD+=" $("${CXX:-g++}" -print-file-name=libubsan.so)"
        export LD_PRELOAD
        # Of memory and times: a sanitizer multiplies both.
        options+=(-k "not triton and not memory and not opcheck and not torch_compile")
    fi
    PYTHONPATH="$PWD/build/builds/$1/lib" "$bin/python" -c "
import cppo, torch
print('cppo from', cppo.__file__.removeprefix('$PWD/'), 'torch', torch.__version__)
print('row kernels:', torch.ops.cppo.row_capability())"
    PYTHONPATH="$PWD/build/builds/$1/lib" "$bin/python" -m pytest "${options[@]}" \
        ${PYTEST_OPTIONS:-} "${ops[@]}" 2>&1
}

mkdir -p build/builds
for name in "${builds[@]}"; do flags_of "$name" >/dev/null; done
{
    echo "$(date -u +%F), commit $(git describe --always --dirty), $("${CXX:-g++}" --version | head -1)"
    for name in "${builds[@]}"; do
        echo
        echo "== $name: $(flags_of "$name")"
        build "$name"
        (check "$name")
    done
} | tee tests/results/builds.txt
