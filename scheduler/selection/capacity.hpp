// How many routes an expert takes of a batch, for policies that drop: what ranks tell each other for it, and "first come".
//
// Every rank gathers [T_r, routes of each expert on r]: one row a rank. Then any rank knows the global number of tokens and,
// for each expert, how many routes come before its own in the order (rank, token). So a limit that keeps the first comers
// of all ranks is exact with no further exchange, and does not depend on how tokens, in their order, are dealt to ranks.
#pragma once

#include <cstdint>
#include <span>

#include "sluice/scheduler/selection.hpp"

namespace sluice {

// Rows of the gathered counts. A view; the array must live on.
class GatheredCounts {
 public:
  // Throws kInvalidState when the rows do not fit, or this rank's row is not what it gave.
  // own: f64 [num_experts + 1], as given; gathered: f64 [num_ranks, num_experts + 1]
  GatheredCounts(std::string_view policy, std::int32_t rank, std::int32_t num_experts,
                 std::span<const double> own, std::span<const double> gathered);
  std::int32_t num_ranks() const { return static_cast<std::int32_t>(rows_.size() / width_); }
  std::int32_t own() const { return own_; }  // row of this rank
  std::int64_t of(std::int32_t rank, std::size_t expert) const {
    return static_cast<std::int64_t>(rows_[static_cast<std::size_t>(rank) * width_ + 1 + expert]);
  }
  std::int64_t num_tokens() const;
  std::int64_t num_routes() const;
  std::int64_t of_all(std::size_t expert) const { return before(num_ranks(), expert); }
  std::int64_t before(std::int32_t rank, std::size_t expert) const;  // of ranks below

 private:
  std::span<const double> rows_;
  std::size_t width_;
  std::int32_t own_ = 0;
};

// Asks for that gather: state.buffer and state.exchange.
void ask_for_counts(const Scores& scores, PolicyState& state);

// Removes the routes for which keep(index, expert) is false; indices are those before.
template <typename Keep>
void keep_routes(Routing& routing, Keep&& keep) {
  std::size_t n = 0;
  std::int64_t begin = 0;
  for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t) {
    const std::int64_t end = routing.row_ptr[t + 1];
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
      if (!keep(i, routing.expert[i])) continue;
      routing.expert[n] = routing.expert[i];
      routing.weight[n++] = routing.weight[i];
    }
    begin = end;
    routing.row_ptr[t + 1] = static_cast<std::int64_t>(n);
  }
  routing.expert.resize(n);
  routing.weight.resize(n);
}

}  // namespace sluice
