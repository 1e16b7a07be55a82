#include "sluice/scheduler/selection/staged.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace sluice {
namespace {

std::int64_t to_count(double value) {
  return static_cast<std::int64_t>(std::llround(value));
}

void set_range(BatchStatistics& statistics) {
  statistics.min_active = 0;
  statistics.max_active = 0;
  bool any = false;
  for (std::size_t k = 0; k < statistics.tokens_with_active.size(); ++k) {
    if (statistics.tokens_with_active[k] == 0) continue;
    if (!any) statistics.min_active = static_cast<std::int32_t>(k);
    statistics.max_active = static_cast<std::int32_t>(k);
    any = true;
  }
}

void pack(const BatchStatistics& statistics, std::vector<double>& buffer) {
  buffer.clear();
  buffer.push_back(static_cast<double>(statistics.num_tokens));
  for (const std::int64_t c : statistics.tokens_of_expert) buffer.push_back(static_cast<double>(c));
  for (const std::int64_t c : statistics.tokens_with_active) buffer.push_back(static_cast<double>(c));
  buffer.insert(buffer.end(), statistics.sums.begin(), statistics.sums.end());
}

void unpack(std::span<const double> buffer, BatchStatistics& statistics) {
  const double* value = buffer.data();
  statistics.num_tokens = to_count(*value++);
  statistics.num_routes = 0;
  for (std::int64_t& c : statistics.tokens_of_expert) statistics.num_routes += c = to_count(*value++);
  for (std::int64_t& c : statistics.tokens_with_active) c = to_count(*value++);
  for (double& sum : statistics.sums) sum = *value++;
  set_range(statistics);
}

}  // namespace

void check_scores(const Scores& scores) {
  Require(scores.num_tokens >= 0, ErrorCode::kInvalidArgument, "num_tokens is ", scores.num_tokens,
          "; it must not be negative");
  Require(scores.num_experts >= 1, ErrorCode::kInvalidArgument, "num_experts is ", scores.num_experts,
          "; it must be at least 1");
  const auto entries =
      static_cast<std::uint64_t>(scores.num_tokens) * static_cast<std::uint64_t>(scores.num_experts);
  Require(scores.logits.size() == entries, ErrorCode::kInvalidArgument, "logits has ", scores.logits.size(),
          " entries; num_tokens ", scores.num_tokens, " times num_experts ", scores.num_experts, " is ",
          entries);
  constexpr std::uint32_t kExponentBits = 0x7f800000u;
  std::uint32_t bad = 0;
  for (const float z : scores.logits)
    bad |= static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(z) & kExponentBits) == kExponentBits);
  if (bad == 0) [[likely]]
    return;
  for (std::size_t i = 0; i < scores.logits.size(); ++i)
    Require(std::isfinite(scores.logits[i]), ErrorCode::kInvalidRouting, "token ",
            i / static_cast<std::size_t>(scores.num_experts), ": the score of expert ",
            i % static_cast<std::size_t>(scores.num_experts), " is ", scores.logits[i],
            "; scores must be finite (has the training diverged?)");
}

void count_routes(const Routing& routing, BatchStatistics& statistics) {
  const auto num_experts = static_cast<std::size_t>(routing.num_experts);
  statistics.num_tokens = routing.num_tokens();
  statistics.num_routes = routing.num_routes();
  statistics.tokens_of_expert.assign(num_experts, 0);
  for (const std::int32_t e : routing.expert) ++statistics.tokens_of_expert[static_cast<std::size_t>(e)];
  statistics.tokens_with_active.assign(num_experts + 1, 0);
  for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t)
    ++statistics.tokens_with_active[static_cast<std::size_t>(routing.row_ptr[t + 1] - routing.row_ptr[t])];
  set_range(statistics);
}

void check_top_k(std::string_view policy, std::int32_t top_k, std::int32_t num_experts) {
  Require(top_k >= 1 && top_k <= num_experts, ErrorCode::kInvalidConfig, "policy ", policy, ": top_k is ",
          top_k, "; it must be from 1 to the number of experts, ", num_experts);
}

AdaptiveState StagedPolicy::initial_adaptive_state(std::int32_t num_experts) const {
  check_options(num_experts, false);
  return initial_state(num_experts);
}

bool StagedPolicy::step(const Scores& scores, const AdaptiveState& adaptive, bool training,
                        PolicyState& state) const {
  Require(!state.done, ErrorCode::kInvalidState, "policy ", name(),
          ": step() was called for a batch that is done; call restart() on its state first");
  if (state.step == 0) {
    check_scores(scores);
    check_options(scores.num_experts, training);
    state.training = training;
    state.auxiliary_loss = 0;
    state.saved.clear();
    state.routing.num_experts = scores.num_experts;
    state.routing.row_ptr.clear();
    state.routing.expert.clear();
    state.routing.weight.clear();
    state.num_tokens = scores.num_tokens;
    state.statistics.sums.assign(training ? num_sums(scores.num_experts) : figures().size(), 0.0);
  } else {
    Require(state.training == training && state.routing.num_experts == scores.num_experts &&
                state.num_tokens == scores.num_tokens,
            ErrorCode::kInvalidState, "policy ", name(),
            ": step() was called with other scores or mode than at the start of the batch");
  }
  if (!state.routing_ready) {
    const bool ready = choose(scores, adaptive, state);
    ++state.step;
    if (!ready) return false;
    count_routes(state.routing, state.statistics);
    state.routing_ready = true;
    if (training) {
      pack(state.statistics, state.buffer);
      state.exchange = ExchangeKind::kSumAcrossRanks;
      return false;
    }
  } else {
    const std::size_t expected =
        2 * static_cast<std::size_t>(scores.num_experts) + 2 + num_sums(scores.num_experts);
    Require(state.buffer.size() == expected, ErrorCode::kInvalidState, "policy ", name(),
            ": the exchanged buffer has ", state.buffer.size(), " values, must have ", expected);
    state.own_statistics = state.statistics;
    const BatchStatistics& local = state.own_statistics;
    unpack(state.buffer, state.statistics);
    Require(
        state.statistics.num_tokens >= local.num_tokens && state.statistics.num_routes >= local.num_routes,
        ErrorCode::kInvalidState, "policy ", name(), ": the exchange gave ", state.statistics.num_tokens,
        " tokens over all ranks but this rank alone has ", local.num_tokens);
    state.auxiliary_loss = auxiliary(scores, adaptive, local, state);
    ++state.step;
  }
  state.exchange = ExchangeKind::kNone;
  state.done = true;
  return true;
}

void StagedPolicy::backward(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                            std::span<const float> dweight, std::span<float> dlogits) const {
  Require(state.done && state.training, ErrorCode::kInvalidState, "policy ", name(),
          ": backward() needs a batch whose step() is done in training");
  Require(state.routing.num_tokens() == scores.num_tokens && state.routing.num_experts == scores.num_experts,
          ErrorCode::kInvalidArgument, "policy ", name(), ": the scores are [", scores.num_tokens, ", ",
          scores.num_experts, "], those of the batch were [", state.routing.num_tokens(), ", ",
          state.routing.num_experts, "]");
  Require(dweight.size() == state.routing.weight.size(), ErrorCode::kInvalidArgument, "policy ", name(),
          ": dweight has ", dweight.size(), " entries for ", state.routing.weight.size(), " routes");
  Require(dlogits.size() == scores.logits.size(), ErrorCode::kInvalidArgument, "policy ", name(),
          ": dlogits has ", dlogits.size(), " entries, must have as many as logits, ", scores.logits.size());
  std::fill(dlogits.begin(), dlogits.end(), 0.0f);
  gradient(scores, adaptive, state, dweight, dlogits);
}

}  // namespace sluice
