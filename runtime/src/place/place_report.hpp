// `sluice place`: what planners make of recorded routing, as figures, tables and a drawing. Pure but for the clock.
//
// Thread-safety: values. Errors: those of the planners; a planner that cannot plan the problem is reported with its reason
// when several are asked for.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/scheduler/planners.hpp"

namespace sluice {

// What a row and a route cost on the machine that the configuration declares or has a profile of; links and GEMMs at full
// batches (their fixed costs are spread over tokens_per_rank tokens of `routes_per_token` routes).
StepCosts step_costs(const Config& config, const Topology& topology, std::int64_t tokens_per_rank,
                     double routes_per_token, std::int64_t num_slots);

struct PlannerResult {
  std::string name;
  std::string refused;  // why there is no placement
  std::vector<Placement> layers;
  double planning_ms = 0;
  std::int64_t moves = 0;
  PlacementMetrics fit;
  std::optional<PlacementMetrics> eval;
};

struct PlaceReport {
  Topology topology{{{0}}};
  std::vector<std::int32_t> slots_per_rank;
  std::vector<std::int32_t> layer_numbers;
  std::vector<std::string> fit_names, eval_names;
  std::string fit_assignment, eval_assignment;
  StepCosts costs;
  std::vector<PlannerResult> planners;

  std::string to_json() const;
  std::string to_text() const;
  // Load of ranks, and rows in and out of nodes, a token, mean over layers: `before` beside `after`, on what was evaluated.
  std::string to_svg(const PlannerResult& before, const PlannerResult& after) const;
};

// fit is planned on and measured; eval, unless null, is measured. refuse: a planner that cannot plan throws.
PlaceReport run_planners(const PlacementProblem& problem, const std::vector<std::string>& names,
                         const Workload& fit, const Workload* eval, bool refuse);

}  // namespace sluice
