#!/bin/sh
# Builds the C kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests against that build.
# Usage: tests/ops/run_sanitized.sh [pytest arguments]. PYTHON names the interpreter, BUILD a folder to keep the build in.
# Where a compiler, cmake or the sanitizer's library is missing it says so and fails.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python}

missing() {
    echo "The C kernels' tests under the sanitizers need a C compiler, cmake and libasan, and there is no $1: install it." >&2
    exit 1
}
command -v cmake > /dev/null || missing cmake
compiler=$(command -v "${CC:-gcc}") || missing "C compiler"
asan=$("$compiler" -print-file-name=libasan.so)
[ -f "$asan" ] || missing libasan

if [ -z "${BUILD:-}" ]; then
    BUILD=$(mktemp -d)
    trap 'rm -rf "$BUILD"' EXIT
fi
CC=$compiler cmake -S "$root" -B "$BUILD" -DBNKIT_SANITIZE=address,undefined > /dev/null
cmake --build "$BUILD" --parallel "$(nproc)" > /dev/null
library=$BUILD/bnkit/ops/csrc/_bnkit_cpu.so
grep -q __asan_report_load "$library" && grep -q __ubsan_handle "$library" || { echo "$library is not sanitized" >&2; exit 1; }

# The interpreter is not sanitized, so the runtime must be there before it; what Python and torch leak is not ours. Left out
# are the tests that start other processes or a compiler, those of PyTorch's own code, and most of those with large tensors.
left_out="after_fork or torchs_own or fewer_threads or the_reference or checkpointing or streamed_gradients"
left_out="$left_out or in_a_compiled_graph or past_the_caches or (too_large and (bfloat16 or avx2 or portable))"
cd "$root"
env LD_PRELOAD="$asan" ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:quarantine_size_mb=32 \
    UBSAN_OPTIONS=print_stacktrace=1 BNKIT_CPU_LIBRARY="$library" \
    "$python" -m pytest -p no:cacheprovider tests/ops/test_cpu.py tests/ops/test_cpu_activations.py \
    tests/ops/test_cpu_layouts.py tests/ops/test_cpu_masks.py tests/ops/test_cpu_outputs.py tests/ops/test_cpu_threads.py \
    tests/ops/test_fuzz.py tests/ops/test_saved_tensors.py -k "not ($left_out)" "$@"
