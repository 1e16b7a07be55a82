// Predictions of `sluice bench`'s layer on any number of ranks: the routing that bench would draw, the counts that come of
// it, and the simulator.
//
// Up to kMostFullRanks ranks the counts are those of full plans; beyond, they are estimated from the demand of a few drawn
// ranks (plan_summary.hpp). With fewer experts than ranks every rank holds one: rank r a copy of expert r mod num_experts.
// Thread-safety: one object serves one thread. Errors: those of the configuration, the profile and the simulator.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/scheduler/choose_schedule.hpp"
#include "sluice/scheduler/simulator.hpp"

namespace sluice {

class Predictor {
 public:
  Predictor(const Config& config, const Topology& topology, MachineProfile profile);
  Predictor(const Predictor&) = delete;  // summaries refer to its topology
  Predictor& operator=(const Predictor&) = delete;

  Simulation run(const ScheduleOptions& schedule, PassKind pass, bool keep_spans = false);
  ScheduleChoice choose(const SearchSpace& space);

  const Topology& topology() const { return topology_; }
  const MachineProfile& profile() const { return profile_; }
  const LayerShape& layer() const { return layer_; }
  bool from_full_plans() const { return !routings_.empty(); }
  std::int32_t copies() const { return copies_; }  // of every expert
  std::int64_t most_tokens() const { return most_tokens_; }

 private:
  const PlanSummary& summary(const ScheduleOptions& schedule);

  Topology topology_;
  MachineProfile profile_;
  LayerShape layer_;
  Placement placement_;
  std::int32_t copies_ = 1;
  std::int64_t most_tokens_ = 0;
  std::vector<Routing> routings_;       // of all ranks, or none
  std::vector<std::int64_t> gathered_;  // when there are none
  std::map<std::pair<Exchange, std::int32_t>, PlanSummary> summaries_;
  std::optional<GroupTemplate> group_;  // of the last schedule
};

}  // namespace sluice
