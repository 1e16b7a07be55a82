// Planners of placements behind one interface (docs/placement.md):
//   contiguous         experts in order of their ids
//   eplb_global        DeepSeek's EPLB, balance alone: replicas of the hottest, packed over all ranks
//   eplb_hierarchical  the same, groups of experts first packed to nodes
//   coactivation       experts that tokens visit together share a node, then a rank; each once
//   exflow             ExFlow (arXiv 2401.08383): experts that follow one another in consecutive layers share a rank
//   sluice             ours: least predicted step time after de-duplication and choice of copies
//
// Pure and deterministic: the same problem gives the same placement on any machine with IEEE arithmetic; ties go to the
// lowest id. Thread-safety: planners have no state. Errors: kInvalidArgument or kNotSupported naming the planner, what it
// cannot do, and what would do.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "sluice/scheduler/workload.hpp"

namespace sluice {

struct PlacementProblem {
  Topology topology{{{0}}};
  std::vector<std::int32_t> slots_per_rank;  // int32 [num_ranks]
  std::int32_t num_everywhere =
      0;  // the last so many experts live everywhere (zero, copy, constant) and have no slots
  std::span<const RoutingStatistics> domains;
  SourceAssignment assignment = SourceAssignment::kMixed;
  StepCosts costs;
  std::int32_t eplb_groups = 0;  // of eplb_hierarchical; 0: 8 where nodes and experts allow, else one a node
  std::int64_t moves = 60000;    // budget of planner sluice, over all layers; 0: construction alone
  std::uint64_t seed = 1;
  // The objective of planner sluice beside the step time (docs/placement.md): how much less balance than EPLB's is free of
  // charge where it was planned, and what the mean crossings cost in parts of their own time.
  double balance_slack = 0.04;
  double mean_price = 0.5;
  double hedge = 1;  // against loads nobody has seen, 0..1; 0: planned for the loads as counted

  std::int32_t num_experts() const { return domains[0].num_experts; }
  std::int32_t num_ffn() const { return num_experts() - num_everywhere; }
};
// Throws unless the problem is consistent: slots for every expert, no rank with a negative number, statistics of one model.
void validate(const PlacementProblem& problem);

struct PlacementPlan {
  std::vector<Placement> layers;
  std::int64_t moves = 0;  // placements compared
};

class PlacementPlanner {
 public:
  virtual ~PlacementPlanner() = default;
  virtual std::string_view name() const = 0;
  virtual PlacementPlan plan(const PlacementProblem& problem) const = 0;
};
std::span<const std::string_view> planner_names();
// Throws kNotFound naming the planners that there are.
std::unique_ptr<PlacementPlanner> make_planner(std::string_view name);

// ---- EPLB, exactly (github.com/deepseek-ai/EPLB, eplb.py; loads are float32, sorts stable) ----

struct EplbPlan {
  std::vector<std::int32_t> slot_expert;  // int32 [num_slots], physical to logical
  std::vector<std::int32_t> copies;       // int32 [num_experts]
};
// int32 [n]: pack of each item, and its place in the pack.
struct Packing {
  std::vector<std::int32_t> pack, place;
};
Packing balanced_packing(std::span<const float> weight, std::int32_t num_packs);
// weight: f32 [n]. expert and copy number of each of num_slots slots, and copies of each expert.
struct Replication {
  std::vector<std::int32_t> slot_expert, slot_copy, copies;
};
Replication replicate_experts(std::span<const float> weight, std::int32_t num_slots);
// One layer. Throws kNotSupported where a number does not divide: experts by groups, groups by nodes, slots by ranks, ranks
// by nodes. groups = nodes = 1 is the global policy.
EplbPlan eplb_hierarchical(std::span<const float> weight, std::int32_t num_slots, std::int32_t num_groups,
                           std::int32_t num_nodes, std::int32_t num_ranks);
// As the published rebalance_experts: hierarchical where groups divide by nodes, else global.
EplbPlan eplb(std::span<const float> weight, std::int32_t num_slots, std::int32_t num_groups,
              std::int32_t num_nodes, std::int32_t num_ranks);

// ---- parts of planners, for tests ----

// Changes of rank along paths: transitions between layers l and l+1 whose experts are on different ranks.
// transitions[l]: f64 [E, E]; rank_of[l]: int32 [E]
double count_hops(std::span<const std::vector<double>> transitions,
                  std::span<const std::vector<std::int32_t>> rank_of);
// ExFlow's placement: rank_of[l], every rank with its slots' share of each layer.
std::vector<std::vector<std::int32_t>> exflow_assign(std::span<const std::vector<double>> transitions,
                                                     std::int32_t num_experts, const Topology& topology,
                                                     std::span<const std::int32_t> experts_per_rank);

// Experts that a rank holds when each has one copy: num_ffn spread as the slots are, the first ranks one more.
std::vector<std::int32_t> single_copies_per_rank(const PlacementProblem& problem);
// A placement of a layer from the experts of each rank; a second copy on one rank is left out.
Placement placement_of_lists(const PlacementProblem& problem,
                             std::span<const std::vector<std::int32_t>> experts);

// What a planner searches with, for one layer: f64, a token of the mean over domains.
struct LayerAffinity {
  std::vector<double> load;       // [E], share of tokens
  std::vector<double> node_load;  // [num_nodes, E], its part by node of the home
  std::vector<double> together;  // [E, E], share of tokens that visit both; as if independent where not known
};
LayerAffinity layer_affinity(const PlacementProblem& problem, const Workload& workload, std::size_t layer);

std::unique_ptr<PlacementPlanner> make_sluice_planner();

}  // namespace sluice
