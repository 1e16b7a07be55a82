// One MoE layer, measured: the configured schedule beside the sequential one, interleaved in one run, with its floors.
//
// Figures (docs/benchmarks.md): a time is the slowest rank's, from a barrier to the return of the call; medians and
// median absolute deviations over the iterations. The clock starts when the plan is ready; plan time is reported apart.
// Both arms must give the same bits, or the run fails.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"

namespace sluice {

struct Sample {
  double median_us = 0;
  double mad_us = 0;
};
Sample sample_of(std::vector<double> values_us);

// Busy time of one pass by resource, the largest over ranks.
struct Floor {
  double compute_us = 0;       // GEMMs, packing and reducing, as measured in the run
  double in_node_us = 0;       // bytes at the declared speed, else time in the puts
  double across_nodes_us = 0;  // likewise
  double largest_us() const { return std::max(compute_us, std::max(in_node_us, across_nodes_us)); }
};

// Time of a pass over the sequential one's in the same round, over the rounds.
struct PairedRatio {
  double median = 0;
  double upper95 =
      0;  // one-sided 95 % bound on the median, from order statistics: no distribution is assumed
};
PairedRatio paired_ratio(std::span<const double> values, std::span<const double> baseline);

struct PassFigures {
  Sample scheduled, sequential;
  PairedRatio to_sequential;
  Floor floor;
  double dense_gemm_us = 0;    // one large GEMM for each of the pass's, of as many rows, without the exchange
  double exposed_comm_us = 0;  // scheduled median less the compute floor
  double predicted_us = std::numeric_limits<double>::quiet_NaN();  // by the cost model; NaN without a profile
  double prediction_error() const { return predicted_us / scheduled.median_us - 1; }
  double to_dense() const;  // scheduled over dense_gemm_us; NaN where there is none
  // (sequential - scheduled) / (sequential - floor); NaN unless sequential exceeds the floor by 5% or more
  double overlap_efficiency() const;
};

// Of a layer whose rows stay on GPUs (gpu_bench.hpp). Its floor is what each rank's processors must do wherever rows come
// from (compute), and the exchange alone (in_node, across_nodes), both of the forward pass; of the backward it is not known.
struct GpuFigures {
  std::string link;                 // "nvlink", "nccl"; "none" of one rank
  Sample exchange, gemms, local;    // of a forward: the exchange alone, its GEMMs alone, all but the link
  std::int32_t checked_tokens = 0;  // of every rank, against the CPU's kernels
  double tolerance = 0;  // of |difference| / |reference|, norms over a token's row, or over what is compared
  double y_error = 0, dx_error = 0;  // the largest of any rank and token
  double dweight_error = 0, gradient_error = 0;
  std::uint64_t y_bits = 0, dx_bits = 0;  // hashes of all ranks' results
};

struct LayerBenchReport {
  std::string device;
  std::optional<GpuFigures> on_gpus;  // none: rows pass through the host's memory
  std::string host_rows_because;      // why they do, where the experts are computed on a GPU
  std::int32_t num_ranks = 0;
  std::string topology;
  bool emulated_links = false;
  bool automatic = false;  // the schedule was chosen by the layer
  std::string policy, exchange;
  std::int32_t num_chunks = 1;
  Sample plan;
  PassFigures forward, backward;
  std::int64_t bytes_in_node = 0, bytes_across_nodes = 0;            // a forward, all ranks, both ways
  std::int64_t flat_bytes_in_node = 0, flat_bytes_across_nodes = 0;  // one row a route, no de-duplication
  double crossings_same_rank = 0, crossings_in_node = 0, crossings_across_nodes = 0;  // a token
  std::int64_t memory_bytes = 0;  // of the layer, largest rank
  std::uint64_t config_hash = 0;

  std::string to_json() const;  // one JSON object, keys of docs/cli.md
  std::string to_text() const;  // a table
};

// Collective. The configs differ in their schedules only; they and the sequential schedule take turns, round by round.
// One report a config, complete on rank 0. The first config's last round goes to its runtime.timeline, if it names one.
std::vector<LayerBenchReport> run_layer_bench(Runtime& runtime, std::span<const LoadedConfig> configs);

}  // namespace sluice
