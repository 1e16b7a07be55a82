// Which schedule to take: every candidate is simulated with the counts of the batch at hand and the profile of the
// machine, and the fastest wins. The answer may be "do not chunk", or "sequential".
//
// A pure function of what all ranks have (topology, placement, gathered demand, layer shape, profile), so ranks cannot
// disagree. Among candidates within `margin` of the fastest the simplest wins: fewer chunks, then the policy with fewer
// parts; a prediction is not better than that.
// Cost: a simulation a candidate and pass; see SimulationOptions. Thread-safety: pure. Errors: those of the simulator.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "sluice/scheduler/cost_model.hpp"
#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/simulator.hpp"

namespace sluice {

struct SearchSpace {
  std::vector<SchedulePolicy> policies = {SchedulePolicy::kSequential, SchedulePolicy::kPipelined,
                                          SchedulePolicy::kBySource, SchedulePolicy::kHierarchical};
  std::vector<std::int32_t> chunks = {1, 2, 3, 4, 6, 8, 12, 16};
  std::vector<Exchange> exchanges = {Exchange::kGateway};
  bool backward = true;  // counts with the forward pass
  double margin = 0.01;  // of the fastest
};

struct RankedSchedule {
  ScheduleOptions schedule;
  double forward_us = 0, backward_us = 0;  // backward 0 when it does not count
  double exposed_us = 0;                   // communication that no rank's compute hides, both passes
  double floor_us = 0;                     // the busiest resource, both passes
  std::string bound;                       // which that is
  double total_us() const { return forward_us + backward_us; }
};

struct ScheduleChoice {
  std::vector<RankedSchedule> ranked;  // the choice first, then by predicted time
  double margin = 0;

  const ScheduleOptions& schedule() const { return ranked.front().schedule; }
  // Why: the choice, its floor and what bounds it, and what each other policy would cost.
  std::string explain() const;
  std::string to_json() const;
};

// gathered: int64 [num_ranks * (num_experts + 2)], as PlanBuilder::take_summaries has it. Chunk counts above the most
// tokens of a rank are left out.
ScheduleChoice choose_schedule(const Topology& topology, const Placement& placement,
                               std::span<const std::int64_t> gathered, const LayerShape& layer,
                               const MachineProfile& profile, const SearchSpace& space = {});

// The same over any way to simulate a schedule. most_tokens: of a rank.
using SimulatePass = std::function<Simulation(const ScheduleOptions& schedule, PassKind pass)>;
ScheduleChoice rank_schedules(const SearchSpace& space, std::int64_t most_tokens,
                              const SimulatePass& simulate_pass);

// "by-source, 4 chunks, gateway"
std::string describe(const ScheduleOptions& schedule);

}  // namespace sluice
