#!/bin/sh
# Builds the C kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests against that build.
# Usage: tests/ops/run_sanitized.sh [pytest arguments]. PYTHON names the interpreter, BUILD a folder to keep the build in.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python}
build=${BUILD:-$(mktemp -d)}
cmake -S "$root" -B "$build" -DBNKIT_SANITIZE=address,undefined > /dev/null
cmake --build "$build" --parallel "$(nproc)" > /dev/null
compiler=$(sed -n 's/^CMAKE_C_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")

# The interpreter is not sanitized, so the runtime must be there before it; what Python and torch leak is not ours.
cd "$root"
exec env LD_PRELOAD="$("$compiler" -print-file-name=libasan.so)" \
  ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
  BNKIT_CPU_LIBRARY="$build/bnkit/ops/csrc/_bnkit_cpu.so" \
  "$python" -m pytest -p no:cacheprovider tests/ops/test_cpu.py tests/ops/test_cpu_activations.py \
  tests/ops/test_cpu_layouts.py tests/ops/test_cpu_threads.py "$@"
