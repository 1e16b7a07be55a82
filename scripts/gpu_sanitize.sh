#!/bin/bash
# The GPU tests under compute-sanitizer: memcheck, initcheck and racecheck, each test program with a time limit of its own.
# Programs for one GPU run side by side, one on each card; then those for two.
#
# usage: gpu_sanitize.sh BINARIES OUT [TOOL...]
#   BINARIES  folder with the test programs (of build/release: tests/kernels/cuda, tests/comm/cuda, tests/runtime/cuda)
#   OUT       folder: sanitizer.txt, and a log of each run that was not clean
#   TOOL      memcheck initcheck racecheck (default: all three)
# Tests between processes are left to memcheck and initcheck: racecheck looks at shared memory, which one process shows. NCCL's own
# failed look-ups of kernel images are left out. Exit status 1 if a run was not clean.
set -u
export bin=$1 out=$2
shift 2
tools=("$@")
[ ${#tools[@]} -eq 0 ] && tools=(memcheck initcheck racecheck)
export NCCL_NVLS_ENABLE=0 SLUICE_TEST_PLANS=6
mkdir -p "$out"

check() {  # TOOL SECONDS PROGRAM FILTER
  local tool=$1 seconds=$2 program=$3 filter=$4
  [ -x "$bin/$program" ] || { echo "$program: not there" | tee -a "$out/sanitizer.txt"; return 1; }
  local log start=$SECONDS
  log=$out/${tool}_$(echo "${program}_$filter" | tr -c 'A-Za-z0-9\n' _ | cut -c1-80).txt
  timeout -k 2 "$seconds" compute-sanitizer --tool "$tool" --report-api-errors no --target-processes all --error-exitcode 99 \
    "$bin/$program" --gtest_filter="$filter" > "$log" 2>&1
  local rc=$?
  local ran
  ran=$(grep -c '^\[       OK' "$log")
  echo "$tool $program $filter: exit status $rc, $ran tests, $((SECONDS - start)) s, $(grep -h SUMMARY "$log" | sort | uniq -c | tr -s ' \n' ' ')" |
    tee -a "$out/sanitizer.txt"
  # A run in which every test was skipped shows nothing.
  [ $rc -eq 0 ] && [ "$ran" -gt 0 ] && rm "$log"
}
export -f check

status=0
cards=$(nvidia-smi -L | wc -l)
for tool in "${tools[@]}"; do
  echo "$tool 150 grouped_gemm_cuda_test *"
done > "$out/queue"  # the longest first
for tool in "${tools[@]}"; do
  for program in rows_cuda_test routing_cuda_test cuda_kernels_test; do
    echo "$tool 60 $program *"
  done
done >> "$out/queue"
xargs -a "$out/queue" -L 1 -P "$cards" --process-slot-var=card bash -c 'CUDA_VISIBLE_DEVICES=$card check "$@"' _ || status=1
rm "$out/queue"

if [ "$cards" -ge 2 ]; then
  for tool in "${tools[@]}"; do
    check "$tool" 90 row_exchange_cuda_test '*RandomPlansBetweenThreads*:*RandomPullsBetweenThreads*:*WideRows*:*OneRank*' || status=1
    if [ "$tool" != racecheck ]; then
      check "$tool" 90 row_exchange_cuda_test '*ThousandRandomPlans*:*AllMovers*:*NcclSendAndReceive*' || status=1
      check "$tool" 90 gpu_layer_cuda_test '*TwoRanksSwiGlu*' || status=1
      check "$tool" 90 gpu_two_hop_layer_cuda_test '*TwoNodesOfOneRank' || status=1
    fi
  done
else
  echo "one card: the exchange and the layers of two ranks were not checked" | tee -a "$out/sanitizer.txt"
  status=1
fi
exit $status
