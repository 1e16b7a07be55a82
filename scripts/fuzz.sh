#!/usr/bin/env bash
# Fuzzes every parser of foreign bytes, with AddressSanitizer and UndefinedBehaviorSanitizer on and guided by coverage.
#   scripts/fuzz.sh                          ten million executions of each target
#   scripts/fuzz.sh 200000 [SEED [TARGET]]   so many
# One line of JSON a target on standard output; an input that breaks something is left in fuzz-crash-TARGET-SEED.bin.
set -euo pipefail
cd "$(dirname "$0")/.."
runs="${1:-10000000}" seed="${2:-1}" target="${3:-all}"
cmake --preset asan -B build/fuzz -DSLUICE_MPI=OFF \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1 -fsanitize-coverage=trace-pc" >&2
cmake --build build/fuzz --target fuzz -j "$(nproc)" >&2
export ASAN_OPTIONS="max_allocation_size_mb=2048:allocator_may_return_null=0:detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
exec build/fuzz/tests/fuzz/fuzz --target "$target" --runs "$runs" --seed "$seed"
