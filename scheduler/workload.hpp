// A workload: the tokens that a placement is judged by, each with a source rank and its experts at every layer; and what
// a placement makes of them: crossings, load and predicted time.
//
// Metrics (docs/placement.md has the formulas). All follow the rule of choose_replicas() with the workload's demand, so
// every planner is judged by the same choice of copies.
//   node crossings   distinct remote nodes that a token's row goes to, mean over tokens, then over layers
//   rank crossings   distinct ranks other than the home rank, likewise
//   hops             of a token that would stay where its expert is: share of transitions between experts of consecutive
//                    layers that have no rank in common, summed over the layers
//   balance          mean / max of the routes of a rank, by layer, then the mean
//   busiest node     rows that leave plus rows that enter a node, the largest over nodes by layer, then the mean; a token
//                    of the mean node
//   predicted step   of all layers, forward and backward (StepCosts)
// Thread-safety: values. Errors: kInvalidArgument naming what does not fit.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/topology.hpp"
#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/statistics.hpp"

namespace sluice {

// Which rank is a token's home.
enum class SourceAssignment : std::uint8_t {
  kRecorded,  // as recorded; needs as many sources as ranks
  kMixed,     // tokens of every domain are dealt to all ranks
  kSkewed,    // domain d lives on node d (nodes and domains wrap around), dealt to the ranks there
};
std::string_view to_string(SourceAssignment assignment) noexcept;

struct WorkloadLayer {
  std::int32_t layer = 0;             // the model's number
  std::vector<std::int64_t> row_ptr;  // int64 [num_tokens + 1]
  std::vector<std::int32_t> expert;   // int32 [routes], ascending within a token
  std::vector<double> transitions;    // f64 [E, E] to the next layer; or empty
};

struct Workload {
  std::int32_t num_experts = 0;
  std::int32_t num_ranks = 0;
  bool drawn = false;  // tokens were drawn from counts, experts independent: crossings mean nothing
  std::vector<std::int32_t> source;  // int32 [num_tokens], ascending
  std::vector<std::int32_t> domain;  // int32 [num_tokens]
  std::vector<WorkloadLayer> layers;

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(source.size()); }
  // int64 [num_ranks, num_experts]
  std::vector<std::int64_t> demand(std::size_t layer) const;
};

// Each domain gives an equal share of the tokens, at most max_tokens in all; with kSkewed every rank has as many. Domains
// without a sample have tokens drawn from their counts (systematic sampling: an expert is in exactly its share of the
// tokens, up to rounding), and then all are called drawn.
Workload make_workload(std::span<const RoutingStatistics> domains, SourceAssignment assignment,
                       const Topology& topology, std::int64_t max_tokens);

// What work costs, in microseconds; rows one way. A pass sends every row there and a result back; backward likewise.
struct StepCosts {
  double route_forward_us = 0;  // an expert's GEMMs for one route
  double route_backward_us = 0;
  double row_in_node_us = 0;  // a row at a rank's link within the node
  double row_across_us = 0;   // a row at a rank's link to other nodes
  std::int64_t tokens_per_rank = 4096;
  std::string source;  // where the figures come from

  // Share of the resources that are not the bottleneck which a schedule fails to hide behind it: measured overlap
  // efficiencies are 0.88 to 0.97 (docs/benchmarks.md).
  static constexpr double kUnhidden = 0.1;
  // Of one layer, forward and backward, from the most loaded rank of each resource:
  //   T = sum over passes of (max(c, i, a) + kUnhidden * (c + i + a - max(c, i, a)))
  double layer_us(double routes, double in_node_rows, double across_rows) const;
};

// What one layer does to ranks and nodes. Rows count at both ends.
struct LayerLoad {
  std::vector<std::int64_t> routes;    // int64 [num_ranks]
  std::vector<std::int64_t> in_node;   // int64 [num_ranks], rows out and in
  std::vector<std::int64_t> across;    // int64 [num_ranks], rows out and in, at homes and gateways
  std::vector<std::int64_t> node_out;  // int64 [num_nodes]
  std::vector<std::int64_t> node_in;   // int64 [num_nodes]
  std::int64_t node_crossings = 0;
  std::int64_t rank_crossings = 0;

  double step_us(const StepCosts& costs,
                 double scale) const;  // scale: tokens of a real step over the workload's
  double balance() const;
};
LayerLoad count_layer(const Workload& workload, std::size_t layer, const Placement& placement,
                      const Topology& topology);

struct PlacementMetrics {
  bool drawn = false;
  double node_crossings_per_token = 0;
  double rank_crossings_per_token = 0;
  double hops_per_token = 0;
  bool has_hops = false;
  double balance = 0;
  double busiest_node_crossings = 0;
  double busiest_node_in = 0, busiest_node_out = 0;  // one way each
  double predicted_step_us = 0;
  std::vector<LayerLoad> layers;
};
// placements: one a layer of the workload
PlacementMetrics measure(const Workload& workload, std::span<const Placement> placements,
                         const Topology& topology, const StepCosts& costs);

}  // namespace sluice
