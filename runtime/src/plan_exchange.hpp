// Building a plan over a Runtime: the builder's steps with the collectives between them.
#pragma once

#include <vector>

#include "sluice/runtime.hpp"
#include "sluice/scheduler/plan.hpp"

namespace sluice {

class PlanExchange {
 public:
  // References must outlive the object.
  PlanExchange(Runtime& runtime, const Placement& placement, PlanOptions options);

  // How to cut the rows of a batch, from the demand of all ranks: a pure function of it, and of what ranks agree on.
  // gathered: int64 [num_ranks * (num_experts + 2)], as PlanBuilder::take_summaries has it
  using Choose = std::function<PlanOptions(std::span<const std::int64_t> gathered)>;

  // Collective, blocking. Builds into `plan`, whose memory is reused. extra_hash joins the agreement check. Without
  // `choose` rows are cut as the constructor was told. A peer's message that cannot be true ends the group, naming it.
  void build(const RoutingView& routing, Plan& plan, std::uint64_t extra_hash, const Choose& choose = {});

  // Throws kInvalidArgument when the plan cannot be of this placement, rank and exchange, or is cut otherwise.
  void require_own(const Plan& plan, std::string_view call, bool any_cut = false) const;

 private:
  void exchange(const RoutingView& routing, Plan& plan, std::uint64_t extra_hash, const Choose& choose);
  void exchange_headers(const PlanBuilder::Headers& out, std::span<const PlanBuilder::Message> in);

  Runtime& runtime_;
  const Placement& placement_;
  PlanOptions options_;
  PlanBuilder builder_;
  std::vector<std::int64_t> received_;
  GrowArray<std::int32_t> words_;
  std::vector<std::span<const std::byte>> sends_;  // [num_ranks]
  std::vector<std::span<std::byte>> receives_;     // [num_ranks]
};

}  // namespace sluice
