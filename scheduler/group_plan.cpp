#include "sluice/scheduler/group_plan.hpp"

#include <algorithm>

namespace sluice {
namespace {

using Counts = std::vector<std::int64_t>;
using Words = std::vector<std::int32_t>;

// What rank `rank` gets when everybody sends `per_peer` values to everybody.
Counts from_all(const std::vector<Counts>& sent, std::size_t rank, std::int64_t per_peer) {
  Counts out;
  for (const Counts& s : sent) {
    const auto begin = s.begin() + static_cast<std::ptrdiff_t>(rank) * per_peer;
    out.insert(out.end(), begin, begin + per_peer);
  }
  return out;
}

// The blocks that `rank` expects, in its order.
template <typename Sent>
Words headers_for(std::vector<PlanBuilder>& builders, std::size_t rank,
                  std::span<const PlanBuilder::Message> expected, const Sent& sent) {
  Words out;
  for (const PlanBuilder::Message& want : expected) {
    const PlanBuilder::Headers headers = sent(builders[want.peer.index()]);
    const auto message = std::find_if(headers.messages.begin(), headers.messages.end(),
                                      [&](const PlanBuilder::Message& m) { return m.peer.index() == rank; });
    Require(message != headers.messages.end() && message->num_words == want.num_words, ErrorCode::kInternal,
            "rank ", want.peer.value, " sends rank ", rank, " other headers than it expects");
    const auto block = headers.words.subspan(static_cast<std::size_t>(message->word_begin),
                                             static_cast<std::size_t>(message->num_words));
    out.insert(out.end(), block.begin(), block.end());
  }
  return out;
}

}  // namespace

std::vector<Plan> build_group_plans(const Topology& topology, const Placement& placement,
                                    std::span<const Routing> routings, const PlanOptions& options) {
  const auto n = static_cast<std::size_t>(topology.num_ranks());
  Require(routings.size() == n, ErrorCode::kInvalidArgument, "there are ", routings.size(), " routings for ",
          n, " ranks");
  std::vector<PlanBuilder> builders;
  std::vector<Plan> plans(n);
  Counts gathered;
  for (std::size_t r = 0; r < n; ++r) {
    builders.emplace_back(RankId(static_cast<std::int32_t>(r)), topology, placement, options);
    builders[r].begin(routings[r], plans[r]);
    gathered.insert(gathered.end(), builders[r].summary().begin(), builders[r].summary().end());
  }
  for (PlanBuilder& b : builders) b.take_summaries(gathered);
  std::vector<Counts> sent(n);
  for (std::size_t r = 0; r < n; ++r)
    sent[r].assign(builders[r].counts().begin(), builders[r].counts().end());
  for (std::size_t r = 0; r < n; ++r) builders[r].take_counts(from_all(sent, r, PlanBuilder::kCountsPerPeer));
  for (std::size_t r = 0; r < n; ++r)
    sent[r].assign(builders[r].offsets().begin(), builders[r].offsets().end());
  for (std::size_t r = 0; r < n; ++r)
    builders[r].take_offsets(from_all(sent, r, PlanBuilder::kOffsetsPerPeer));
  std::vector<Words> words(n);
  for (std::size_t r = 0; r < n; ++r)
    words[r] = headers_for(builders, r, builders[r].expected_headers1(),
                           [](const PlanBuilder& b) { return b.headers1(); });
  for (std::size_t r = 0; r < n; ++r) builders[r].take_headers1(words[r]);
  for (std::size_t r = 0; r < n; ++r)
    words[r] = headers_for(builders, r, builders[r].expected_headers2(),
                           [](const PlanBuilder& b) { return b.headers2(); });
  for (std::size_t r = 0; r < n; ++r) builders[r].take_headers2(words[r]);
  return plans;
}

std::vector<std::int64_t> gathered_demand(std::span<const Routing> routings, std::int32_t num_experts) {
  Counts out;
  for (const Routing& r : routings) {
    Require(r.num_experts == num_experts, ErrorCode::kInvalidArgument, "a routing has ", r.num_experts,
            " experts, not ", num_experts);
    out.push_back(r.num_tokens());
    out.push_back(0);
    const Counts counts = expert_counts(r);
    out.insert(out.end(), counts.begin(), counts.end());
  }
  return out;
}

}  // namespace sluice
