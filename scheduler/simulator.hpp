// A discrete-event simulator of a pass: the templates that the executor runs, with costs in place of work.
//
//   rank        one compute resource; of the ops that may run it takes the first in the template's order, as the
//               executor does. Puts are posted by it, or beside it (MachineProfile::posting).
//   link class  an outward and an inward side a rank, one message at a time each; a message takes its time on both and is
//               seen a latency after it is through. LinkModel says which message is next, and whether one that waits
//               for its receiver holds up the sender's others (emulated links) or not (networks, which share).
//
// Uniform topologies (nodes of one size and consecutive ranks) need one template a local rank: those of other nodes
// differ by a shift of the peers, so thousands of ranks are simulated from a few templates (GroupTemplate).
//
// Deterministic: times are whole picoseconds and ties are broken by the order of events, so every rank that simulates
// the same thing gets the same numbers. Cost: O((ops + messages) log ranks).
// Thread-safety: pure functions. Errors: what the executor would refuse - templates that do not fit together
// (kInternal), chunks without rows, counts of another schedule (kInvalidArgument) - and costs that the profile cannot
// tell (kNotFound).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/scheduler/cost_model.hpp"
#include "sluice/scheduler/plan_summary.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

// The templates of a whole group. Rank r runs shapes[shape_of[r]] with every peer p read as (p + shift[r]) mod num_ranks.
struct GroupTemplate {
  std::vector<Template> shapes;
  std::vector<std::int32_t> shape_of;  // int32 [num_ranks]
  std::vector<std::int32_t> shift;     // int32 [num_ranks]

  std::int32_t num_ranks() const { return static_cast<std::int32_t>(shape_of.size()); }
  const Template& of(RankId rank) const { return shapes[static_cast<std::size_t>(shape_of[rank.index()])]; }
  std::int32_t peer(RankId rank, const Op& op) const { return (op.peer + shift[rank.index()]) % num_ranks(); }
};

// Most ranks whose templates are all built and run against each other (validate_group). Beyond, templates are shared
// where the topology allows and each is validated alone.
constexpr std::int32_t kMostFullRanks = 64;

GroupTemplate build_group_template(const Topology& topology, const ScheduleOptions& schedule);
// From one template a rank.
GroupTemplate group_template(std::vector<Template> templates);

struct OpSpan {
  std::uint32_t op = 0;
  double begin_us = 0, end_us = 0;  // of puts: on the link
};

struct RankTimes {
  double end_us = 0;      // the pass is over here
  double compute_us = 0;  // busy with ops other than puts
  double send_us = 0;     // the processor's part in puts
  double receive_us = 0;
  double out_us[2] = {0, 0};  // busy links by LinkClass
  double in_us[2] = {0, 0};
};

struct Simulation {
  double step_us = 0;           // the last rank's end
  double compute_floor_us = 0;  // the largest compute_us of a rank
  double link_floor_us[2] = {0, 0};
  double exposed_comm_us = 0;  // step less the compute floor
  std::vector<RankTimes> ranks;
  std::vector<std::vector<OpSpan>> spans;  // by rank, in the order in which they ended; only when asked for
  std::int64_t num_events = 0;

  // "compute", "in-node link" or "across-nodes link": the resource with the largest floor.
  std::string_view bound() const;
  double floor_us() const;
};

struct SimulationOptions {
  PassKind pass = PassKind::kForward;
  bool keep_spans = false;
};

Simulation simulate(const GroupTemplate& group, const PlanSummary& summary, const MachineProfile& profile,
                    const LayerShape& layer, const SimulationOptions& options = {});

}  // namespace sluice
