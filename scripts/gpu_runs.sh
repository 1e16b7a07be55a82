#!/bin/bash
# Everything that needs several GPUs of one host, in one go: tests, dispatch and combine, the whole layer. Each step has a
# time limit of its own, so that one that hangs costs no more than it.
#
# usage: gpu_runs.sh BINARIES OUT RANKS [DATE COMMIT]
#   BINARIES  folder with row_exchange_cuda_test, gpu_layer_cuda_test, gpu_two_hop_layer_cuda_test,
#             exchange_cuda_benchmark, multi_gpu_layer_cuda_benchmark
#             (of build/release: tests/comm/cuda, tests/runtime/cuda, benchmarks/cuda); the tests for one GPU, if they are
#             there too (tests/kernels/cuda, tests/runtime)
#   OUT       folder for results: tests.txt, exchange_*.json, layer_*.json, and their tables as .txt
#   RANKS     e.g. "2" or "2 4 8": the group sizes to time; "" for the tests alone
# NCCL is taken from SLUICE_NCCL_LIBRARY, or wherever the loader finds libnccl.so.2. Multicast stays off.
set -u
bin=$1 out=$2 ranks=$3 date=${4:-$(date +%F)} commit=${5:-unknown}
counts=${SLUICE_EXPERT_COUNTS:-}  # a file of one count an expert, for routing that is like a trained model's
export NCCL_NVLS_ENABLE=0
mkdir -p "$out"

# What needs one GPU, where its programs are in the folder as well.
for program in grouped_gemm_cuda_test rows_cuda_test routing_cuda_test cuda_kernels_test device_layer_test; do
  [ -x "$bin/$program" ] || continue
  timeout -k 2 120 "$bin/$program" > "$out/one.txt" 2>&1
  echo "$program: exit status $?, $(grep -c '^\[       OK' "$out/one.txt") passed, $(grep -cE '^\[  (FAILED|SKIPPED) \] .*ms\)' "$out/one.txt") failed or skipped" |
    tee -a "$out/tests.txt"
  grep -E "Failure|Skipped" -A3 "$out/one.txt" | head -12 >> "$out/tests.txt"
done
for program in row_exchange_cuda_test gpu_layer_cuda_test gpu_two_hop_layer_cuda_test; do
  # One process a test: each forks its ranks before it touches CUDA.
  for name in $("$bin/$program" --gtest_list_tests | awk '/^[^ ]/ {suite = $1} /^  / {print suite $1}'); do
    timeout -k 2 60 "$bin/$program" --gtest_filter="$name" > "$out/one.txt" 2>&1
    echo "$name: exit status $?" | tee -a "$out/tests.txt"
    grep -E "reported|Skipped|Failure" -A3 "$out/one.txt" | head -12 >> "$out/tests.txt"
  done
done
rm -f "$out/one.txt"

run() {  # NAME PROGRAM ARGUMENTS...
  local name=$1 program=$2
  shift 2
  timeout -k 2 100 "$bin/$program" --json --date "$date" --commit "$commit" "$@" > "$out/$name.json" 2> "$out/$name.txt"
  echo "$name: exit status $?"
  cat "$out/$name.txt"
}
for n in $ranks; do
  experts=()
  [ "$n" -gt 2 ] && experts=(--experts 256)
  run "exchange_${n}_uniform" exchange_cuda_benchmark --ranks "$n" "${experts[@]}"
  run "exchange_${n}_zipf" exchange_cuda_benchmark --ranks "$n" --shapes deepseek-v3,olmoe --routing zipf --iterations 10
  [ -n "$counts" ] &&
    run "exchange_${n}_counts" exchange_cuda_benchmark --ranks "$n" --shapes olmoe --routing "$counts" --iterations 10
  run "layer_${n}_uniform" multi_gpu_layer_cuda_benchmark --ranks "$n"
  run "layer_${n}_zipf" multi_gpu_layer_cuda_benchmark --ranks "$n" --shapes deepseek-v3 --routing zipf --iterations 8
  run "layer_${n}_moe_perf" multi_gpu_layer_cuda_benchmark --ranks "$n" --shapes moe_perf-deepseek,moe_perf-mixtral
  run "layer_${n}_nccl" multi_gpu_layer_cuda_benchmark --ranks "$n" --shapes deepseek-v3,olmoe --link nccl --iterations 7
  run "layer_${n}_nccl_hosts" multi_gpu_layer_cuda_benchmark --ranks "$n" --shapes olmoe --link nccl-hosts --iterations 3
  # Two pretended hosts; more sockets, so that the loopback interface is as fast as it can be.
  [ $((n % 2)) -eq 0 ] && NCCL_SOCKET_NTHREADS=4 NCCL_NSOCKS_PERTHREAD=4 run "layer_${n}_two_hop" \
    multi_gpu_layer_cuda_benchmark --ranks "$n" --shapes olmoe,mixtral --link two-hop --iterations 7
done
