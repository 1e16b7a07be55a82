// One MoE layer whose rows, weights and results stay on GPUs, measured: on one rank, or on several over comm.transport nvlink
// or nccl.
//
// Figures (docs/cli.md): a pass's time is the slowest rank's, between two events of its GPU, the first recorded when all
// ranks have met on the device; medians and median absolute deviations over the iterations, in which all that is measured
// takes turns. The plan is ready when the clock starts; plan time is reported apart. Before anything is timed the results
// are compared with the CPU's kernels on a sample, and the schedules with each other, bit for bit.
#pragma once

#include <span>
#include <string>

#include "sluice/runtime/src/bench/layer_bench.hpp"

namespace sluice {

// Why a bench of these configurations has to take rows through the host's memory; empty: gpu_bench() can measure it.
// Throws kNotSupported with that reason where comm.transport says that rows stay on the GPUs.
std::string why_host_rows(Runtime& runtime, std::span<const LoadedConfig> configs);

// Collective. The configured schedule beside the sequential one; complete on rank 0. Throws kInternal when a result is off
// by more than the tolerance, or is no number.
LayerBenchReport gpu_bench(Runtime& runtime, const LoadedConfig& config);

}  // namespace sluice
