#include "sluice/scheduler/choose_schedule.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "sluice/base/error.hpp"
#include "sluice/base/text_table.hpp"

namespace sluice {
namespace {

std::string_view text_of(Exchange exchange) {
  return exchange == Exchange::kGateway ? "gateway" : "direct";
}
// Of two schedules that take the same time the one with less machinery.
bool simpler(const ScheduleOptions& a, const ScheduleOptions& b) {
  if (a.num_chunks != b.num_chunks) return a.num_chunks < b.num_chunks;
  if (a.policy != b.policy) return a.policy < b.policy;
  return a.exchange < b.exchange;
}

}  // namespace

std::string describe(const ScheduleOptions& s) {
  return str(to_string(s.policy), ", ", s.num_chunks, s.num_chunks == 1 ? " chunk, " : " chunks, ",
             text_of(s.exchange));
}

ScheduleChoice choose_schedule(const Topology& topology, const Placement& placement,
                               std::span<const std::int64_t> gathered, const LayerShape& layer,
                               const MachineProfile& profile, const SearchSpace& space) {
  std::optional<PlanSummary> summary;
  std::optional<GroupTemplate> group;  // of the last schedule asked for
  const auto run = [&](const ScheduleOptions& schedule, PassKind pass) {
    if (!summary || summary->exchange() != schedule.exchange)
      summary.emplace(topology, schedule.exchange, placement, gathered);
    if (!group || !(group->shapes.front().schedule == schedule))
      group = build_group_template(topology, schedule);
    return simulate(*group, *summary, profile, layer, {pass, false});
  };
  const std::size_t stride = static_cast<std::size_t>(placement.num_experts) + 2;
  std::int64_t most_tokens = 0;
  for (std::size_t i = 0; i < gathered.size(); i += stride) most_tokens = std::max(most_tokens, gathered[i]);
  return rank_schedules(space, most_tokens, run);
}

ScheduleChoice rank_schedules(const SearchSpace& space, std::int64_t most_tokens,
                              const SimulatePass& simulate_pass) {
  Require(!space.policies.empty() && !space.chunks.empty() && !space.exchanges.empty(),
          ErrorCode::kInvalidArgument, "there is no schedule to choose from");
  ScheduleChoice out;
  out.margin = space.margin;
  for (const Exchange exchange : space.exchanges)
    for (const SchedulePolicy policy : space.policies)
      for (const std::int32_t chunks : space.chunks) {
        if (policy == SchedulePolicy::kSequential && chunks != 1) continue;
        if (chunks > 1 && chunks > most_tokens) continue;
        RankedSchedule r;
        r.schedule = {policy, exchange, chunks};
        const Simulation forward = simulate_pass(r.schedule, PassKind::kForward);
        r.forward_us = forward.step_us;
        r.exposed_us = forward.exposed_comm_us;
        r.floor_us = forward.floor_us();
        r.bound = forward.bound();
        if (space.backward) {
          const Simulation backward = simulate_pass(r.schedule, PassKind::kBackward);
          r.backward_us = backward.step_us;
          r.exposed_us += backward.exposed_comm_us;
          r.floor_us += backward.floor_us();
          if (backward.floor_us() > forward.floor_us()) r.bound = backward.bound();
        }
        out.ranked.push_back(std::move(r));
      }
  Require(!out.ranked.empty(), ErrorCode::kInvalidArgument,
          "no schedule of the search fits: chunk counts must not exceed the most tokens of a rank");
  std::stable_sort(
      out.ranked.begin(), out.ranked.end(), [](const RankedSchedule& a, const RankedSchedule& b) {
        return a.total_us() != b.total_us() ? a.total_us() < b.total_us() : simpler(a.schedule, b.schedule);
      });
  const double enough = out.ranked.front().total_us() * (1 + space.margin);
  auto best = out.ranked.begin();
  for (auto it = out.ranked.begin(); it != out.ranked.end() && it->total_us() <= enough; ++it)
    if (simpler(it->schedule, best->schedule)) best = it;
  std::rotate(out.ranked.begin(), best, best + 1);
  return out;
}

std::string ScheduleChoice::explain() const {
  const RankedSchedule& best = ranked.front();
  const auto us = [](double v) { return fixed(v, 1) + " us"; };
  const auto times = [&](const RankedSchedule& r) {
    return r.backward_us > 0
               ? str(us(r.total_us()), " (forward ", us(r.forward_us), ", backward ", us(r.backward_us), ")")
               : us(r.total_us());
  };
  std::string out = str("choice: ", describe(best.schedule), "\n");
  out += str("|- predicted ", times(best), "\n");
  out += str("|- bound by ", best.bound, ", which is busy for ", us(best.floor_us), ": ",
             fixed(100 * best.floor_us / std::max(best.total_us(), 1e-9), 0), "% of the time\n");
  out += str("|- communication that nothing hides: ", us(best.exposed_us), "\n");
  const RankedSchedule* fastest = &best;
  for (const RankedSchedule& r : ranked)
    if (r.total_us() < fastest->total_us()) fastest = &r;
  if (fastest != &best)
    out +=
        str("|- ", describe(fastest->schedule), " is predicted ", us(best.total_us() - fastest->total_us()),
            " faster, within the margin of ", fixed(100 * margin, 1), "%: the simpler one is taken\n");
  if (best.schedule.num_chunks == 1) {
    const auto chunked = std::find_if(ranked.begin(), ranked.end(),
                                      [](const RankedSchedule& r) { return r.schedule.num_chunks > 1; });
    if (chunked != ranked.end())
      out += str("|- do not chunk: the best with chunks, ", describe(chunked->schedule), ", is predicted ",
                 times(*chunked), "\n");
  }
  out += "`- what else it could be, the best of each policy\n";
  for (const SchedulePolicy policy : {
#define SLUICE_X(name, text) SchedulePolicy::name,
           SLUICE_SCHEDULE_LIST(SLUICE_X)
#undef SLUICE_X
       }) {
    const auto r = std::find_if(ranked.begin() + 1, ranked.end(),
                                [&](const RankedSchedule& c) { return c.schedule.policy == policy; });
    if (r == ranked.end()) continue;
    const double more = 100 * (r->total_us() / std::max(best.total_us(), 1e-9) - 1);
    out += str("   |- ", describe(r->schedule), ": ", times(*r), ", ", more < 0 ? "" : "+", fixed(more, 1),
               "%, ", us(r->exposed_us), " exposed\n");
  }
  return out;
}

std::string ScheduleChoice::to_json() const {
  nlohmann::json out{{"margin", margin}};
  for (const RankedSchedule& r : ranked)
    out["ranked"].push_back({{"policy", to_string(r.schedule.policy)},
                             {"num_chunks", r.schedule.num_chunks},
                             {"exchange", text_of(r.schedule.exchange)},
                             {"forward_us", r.forward_us},
                             {"backward_us", r.backward_us},
                             {"exposed_comm_us", r.exposed_us},
                             {"floor_us", r.floor_us},
                             {"bound", r.bound}});
  return out.dump();
}

}  // namespace sluice
