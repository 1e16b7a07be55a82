#include "sluice/runtime/src/tune/predict.hpp"

#include <algorithm>

#include "sluice/runtime/src/bench/draw_routing.hpp"
#include "sluice/scheduler/group_plan.hpp"

namespace sluice {
namespace {

constexpr std::int32_t kDrawnRanks = 8;  // whose demand stands for all, beyond kMostFullRanks

}  // namespace

Predictor::Predictor(const Config& config, const Topology& topology, MachineProfile profile)
    : topology_(topology),
      profile_(std::move(profile)),
      layer_(layer_shape(layer_options(config), config.runtime.threads_per_rank)) {
  const std::int32_t ranks = topology.num_ranks(), experts = config.model.num_experts;
  if (config.model.num_ffn_experts() >= ranks || !config.placement.slots_per_rank.empty() ||
      config.placement.policy == Config::Placement::Policy::kFile) {
    placement_ = placement_of(config, ranks, config.bench.replay_layer);
  } else {
    std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(ranks));
    for (std::int32_t r = 0; r < ranks; ++r)
      lists[static_cast<std::size_t>(r)] = {r % config.model.num_ffn_experts()};
    std::vector<ExpertKind> kinds = placement_of(config, 1).kind;
    placement_ = placement_from_lists(experts, lists, kinds);
    copies_ = (ranks + config.model.num_ffn_experts() - 1) / config.model.num_ffn_experts();
  }
  most_tokens_ = config.bench.tokens_per_rank;
  const std::int32_t drawn = ranks <= kMostFullRanks ? ranks : kDrawnRanks;
  for (std::int32_t r = 0; r < drawn; ++r)
    routings_.push_back(draw_routing(config, experts, RankId(r), ranks));
  if (!config.bench.replay.empty()) {
    most_tokens_ = 0;
    for (const Routing& r : routings_) most_tokens_ = std::max(most_tokens_, r.num_tokens());
  }
  if (ranks > kMostFullRanks) {
    const std::vector<std::int64_t> few = gathered_demand(routings_, experts);
    const std::size_t stride = static_cast<std::size_t>(experts) + 2;
    for (std::int32_t r = 0; r < ranks; ++r) {
      const auto from =
          few.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(r % drawn) * stride);
      gathered_.insert(gathered_.end(), from, from + static_cast<std::ptrdiff_t>(stride));
    }
    routings_.clear();
  }
}

const PlanSummary& Predictor::summary(const ScheduleOptions& schedule) {
  // How rows are split by source changes no count; chunks do where counts are exact.
  const std::pair key(schedule.exchange, from_full_plans() ? schedule.num_chunks : 0);
  const auto known = summaries_.find(key);
  if (known != summaries_.end()) return known->second;
  if (!from_full_plans())
    return summaries_.emplace(key, PlanSummary(topology_, schedule.exchange, placement_, gathered_))
        .first->second;
  std::vector<std::int32_t> slots;
  for (std::int32_t r = 0; r < topology_.num_ranks(); ++r)
    slots.push_back(placement_.num_slots_of(RankId(r)));
  PlanSummary out(topology_, schedule.exchange, schedule.num_chunks, slots);
  for (const Plan& plan : build_group_plans(topology_, placement_, routings_,
                                            {schedule.exchange, schedule.num_chunks, SourceSplit::kNone}))
    out.add(plan);
  return summaries_.emplace(key, std::move(out)).first->second;
}

Simulation Predictor::run(const ScheduleOptions& schedule, PassKind pass, bool keep_spans) {
  Require(schedule.num_chunks <= std::max<std::int64_t>(1, most_tokens_), ErrorCode::kInvalidArgument,
          "schedule.num_chunks is ", schedule.num_chunks, ", but no rank has more than ", most_tokens_,
          " tokens; chunks would be empty");
  if (!group_ || !(group_->shapes.front().schedule == schedule))
    group_ = build_group_template(topology_, schedule);
  return simulate(*group_, summary(schedule), profile_, layer_, {pass, keep_spans});
}

ScheduleChoice Predictor::choose(const SearchSpace& space) {
  return rank_schedules(space, most_tokens_,
                        [&](const ScheduleOptions& schedule, PassKind pass) { return run(schedule, pass); });
}

}  // namespace sluice
