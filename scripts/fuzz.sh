#!/usr/bin/env bash
# Fuzzes every parser of foreign bytes, with AddressSanitizer and UndefinedBehaviorSanitizer on and guided by coverage.
#   scripts/fuzz.sh                          ten million executions of each target
#   scripts/fuzz.sh 200000 [SEED [TARGET]]   so many
# As many targets at a time as there are cores (SLUICE_FUZZ_JOBS: so many). One line of JSON a target on standard output; an
# input that breaks something is left in fuzz-crash-TARGET-SEED.bin. Then the others still run, and the exit status is not 0.
set -euo pipefail
cd "$(dirname "$0")/.."
runs="${1:-10000000}" seed="${2:-1}" target="${3:-all}" jobs="${SLUICE_FUZZ_JOBS:-$(nproc)}"
cmake --preset asan -B build/fuzz -DSLUICE_MPI=OFF \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O2 -g1 -fsanitize-coverage=trace-pc" >&2
cmake --build build/fuzz --target fuzz -j "$jobs" >&2
# Freed memory is kept back for longer than an execution lasts, not for thousands of them, one frame of who allocated it is
# noted, and the first bytes of new memory are filled: much of the time went there. Run an input that was left, for a full
# report, without these options: fuzz --target TARGET --input FILE.
export ASAN_OPTIONS="max_allocation_size_mb=2048:allocator_may_return_null=0:detect_leaks=0:malloc_context_size=1\
:quarantine_size_mb=8:max_malloc_fill_size=64${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
fuzz=build/fuzz/tests/fuzz/fuzz
if [ "$target" != all ]; then exec "$fuzz" --target "$target" --runs "$runs" --seed "$seed"; fi
"$fuzz" --list | xargs -P "$jobs" -I{} "$fuzz" --target {} --runs "$runs" --seed "$seed"
