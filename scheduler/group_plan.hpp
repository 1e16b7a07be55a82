// The plans of a whole group, built in one place: builders in lockstep, copies in place of exchanges. For predictions,
// where one process knows (or makes up) the routings of all ranks.
//
// Thread-safety: pure. Errors: those of PlanBuilder; kInvalidArgument when there is not one routing a rank.
#pragma once

#include <span>
#include <vector>

#include "sluice/scheduler/plan.hpp"

namespace sluice {

// routings: one a rank. References must stay valid during the call.
std::vector<Plan> build_group_plans(const Topology& topology, const Placement& placement,
                                    std::span<const Routing> routings, const PlanOptions& options);

// The demand that exchange 1 of a plan gathers. int64 [num_ranks * (num_experts + 2)]
std::vector<std::int64_t> gathered_demand(std::span<const Routing> routings, std::int32_t num_experts);

}  // namespace sluice
