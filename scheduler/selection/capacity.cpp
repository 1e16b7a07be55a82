#include "sluice/scheduler/selection/capacity.hpp"

#include <algorithm>

namespace sluice {

GatheredCounts::GatheredCounts(std::string_view policy, std::int32_t rank, std::int32_t num_experts,
                               std::span<const double> own, std::span<const double> gathered)
    : rows_(gathered), width_(static_cast<std::size_t>(num_experts) + 1) {
  Require(own.size() == width_ && !gathered.empty() && gathered.size() % width_ == 0,
          ErrorCode::kInvalidState, "policy ", policy, ": ", gathered.size(),
          " values were gathered; rows have ", width_);
  // A group of one that plays all ranks (a reference) has one row, whatever rank its tokens live on.
  own_ = rank % num_ranks();
  Require(std::equal(own.begin(), own.end(),
                     gathered.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(own_) * width_)),
          ErrorCode::kInvalidState, "policy ", policy, ": row ", own_,
          " of the gathered counts is not what rank ", rank, " gave");
}

std::int64_t GatheredCounts::num_tokens() const {
  double sum = 0;
  for (std::size_t i = 0; i < rows_.size(); i += width_) sum += rows_[i];
  return static_cast<std::int64_t>(sum);
}

std::int64_t GatheredCounts::num_routes() const {
  double sum = 0;
  for (std::size_t i = 0; i < rows_.size(); ++i) sum += i % width_ == 0 ? 0 : rows_[i];
  return static_cast<std::int64_t>(sum);
}

std::int64_t GatheredCounts::before(std::int32_t rank, std::size_t expert) const {
  std::int64_t sum = 0;
  for (std::int32_t r = 0; r < rank; ++r) sum += of(r, expert);
  return sum;
}

void ask_for_counts(const Scores& scores, PolicyState& state) {
  state.buffer.assign(static_cast<std::size_t>(scores.num_experts) + 1, 0.0);
  state.buffer[0] = static_cast<double>(scores.num_tokens);
  for (const std::int32_t e : state.routing.expert) state.buffer[static_cast<std::size_t>(e) + 1] += 1;
  state.exchange = ExchangeKind::kAllGather;
}

}  // namespace sluice
