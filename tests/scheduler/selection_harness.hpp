// Runs a policy over several ranks in one process, doing the exchanges as the runtime does.
#pragma once

#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/scheduler/selection.hpp"

namespace sluice {

struct RankBatch {
  std::vector<float> logits;  // f32 [num_tokens, num_experts]
  Scores scores;
  PolicyState state;
  std::vector<float> dlogits;  // filled by backward_of()
};

// What kAllToAll of all ranks gives each.
inline void all_to_all(std::vector<RankBatch>& ranks) {
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    std::vector<double> out;
    for (std::size_t s = 0; s < ranks.size(); ++s) {
      const PolicyState& from = ranks[s].state;
      Require(from.send_counts.size() == ranks.size() && from.receive_counts.size() == ranks.size() &&
                  from.send_counts[r] == ranks[r].state.receive_counts[s],
              ErrorCode::kInternal, "rank ", s, " sends rank ", r, " another count than it expects");
      std::ptrdiff_t begin = 0;
      for (std::size_t d = 0; d < r; ++d) begin += from.send_counts[d];
      out.insert(out.end(), from.buffer.begin() + begin, from.buffer.begin() + begin + from.send_counts[r]);
    }
    ranks[r].state.gathered = std::move(out);
  }
}

// tokens_of_rank: rows of `logits` for each rank, in order.
inline std::vector<RankBatch> run_policy(const SelectionPolicy& policy, const std::vector<float>& logits,
                                         std::int32_t num_experts,
                                         const std::vector<std::int64_t>& tokens_of_rank,
                                         const AdaptiveState& adaptive, bool training) {
  std::vector<RankBatch> ranks(tokens_of_rank.size());
  auto from = logits.begin();
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const auto to = from + tokens_of_rank[r] * num_experts;
    ranks[r].logits.assign(from, to);
    ranks[r].scores = {ranks[r].logits, tokens_of_rank[r], num_experts, static_cast<std::int32_t>(r)};
    from = to;
  }
  Require(from == logits.end(), ErrorCode::kInternal, "tokens_of_rank does not cover the logits");
  for (;;) {
    std::size_t num_done = 0;
    for (RankBatch& rank : ranks)
      num_done += policy.step(rank.scores, adaptive, training, rank.state) ? 1 : 0;
    if (num_done == ranks.size()) return ranks;
    Require(num_done == 0, ErrorCode::kInternal, "ranks are done after different numbers of steps");
    const ExchangeKind kind = ranks[0].state.exchange;
    if (kind == ExchangeKind::kAllToAll) {
      all_to_all(ranks);
      continue;
    }
    std::vector<double> gathered;
    for (const RankBatch& rank : ranks) {
      Require(rank.state.exchange == kind && rank.state.buffer.size() == ranks[0].state.buffer.size(),
              ErrorCode::kInternal, "ranks ask for different exchanges");
      gathered.insert(gathered.end(), rank.state.buffer.begin(), rank.state.buffer.end());
    }
    const std::size_t n = ranks[0].state.buffer.size();
    for (RankBatch& rank : ranks) {
      if (kind == ExchangeKind::kAllGather) {
        rank.state.gathered = gathered;
        continue;
      }
      Require(kind == ExchangeKind::kSumAcrossRanks, ErrorCode::kInternal,
              "not done, but no exchange asked for");
      for (std::size_t i = 0; i < n; ++i) {
        rank.state.buffer[i] = 0;
        for (std::size_t r = 0; r < ranks.size(); ++r) rank.state.buffer[i] += gathered[r * n + i];
      }
    }
  }
}

// The same tokens on one rank that plays all: homes is what tells where they live.
inline RankBatch run_as_one(const SelectionPolicy& policy, const std::vector<float>& logits,
                            std::int32_t num_experts, const std::vector<std::int32_t>& homes,
                            const AdaptiveState& adaptive, bool training) {
  RankBatch one;
  one.logits = logits;
  one.scores = {one.logits, static_cast<std::int64_t>(homes.size()), num_experts, 0, homes};
  while (!policy.step(one.scores, adaptive, training, one.state)) one.state.gathered = one.state.buffer;
  return one;
}

// dense: f32 [all tokens, num_experts], the gradient of each possible weight; those of routes are taken.
inline void backward_of(const SelectionPolicy& policy, const std::vector<float>& dense,
                        const AdaptiveState& adaptive, std::vector<RankBatch>& ranks) {
  std::size_t row = 0;
  for (RankBatch& rank : ranks) {
    const Routing& routing = rank.state.routing;
    std::vector<float> dweight;
    for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t, ++row)
      for (auto i = routing.row_ptr[t]; i < routing.row_ptr[t + 1]; ++i)
        dweight.push_back(dense[row * static_cast<std::size_t>(routing.num_experts) +
                                static_cast<std::size_t>(routing.expert[static_cast<std::size_t>(i)])]);
    rank.dlogits.assign(rank.logits.size(), std::numeric_limits<float>::quiet_NaN());
    policy.backward(rank.scores, adaptive, rank.state, dweight, rank.dlogits);
  }
}

inline std::vector<float> concatenated_dlogits(const std::vector<RankBatch>& ranks) {
  std::vector<float> out;
  for (const RankBatch& rank : ranks) out.insert(out.end(), rank.dlogits.begin(), rank.dlogits.end());
  return out;
}

inline double total_loss(const std::vector<RankBatch>& ranks) {
  double out = 0;
  for (const RankBatch& rank : ranks) out += rank.state.auxiliary_loss;
  return out;
}

// Normal, but none nearer than 0.01 to zero: away from ReLU's kink.
inline std::vector<float> random_logits(std::mt19937& gen, std::size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& z : out) {
    do z = normal(gen);
    while (z > -.01f && z < .01f);
  }
  return out;
}

}  // namespace sluice
