#include "sluice/scheduler/selection/bounded_regret.hpp"

#include <algorithm>
#include <cmath>

namespace sluice {

LocalitySwap::LocalitySwap(std::string_view policy, std::shared_ptr<const Locality> locality,
                           const RegretOptions& options)
    : locality_(std::move(locality)), options_(options) {
  Require(std::isfinite(options.epsilon), ErrorCode::kInvalidConfig, "policy ", policy,
          ": regret_epsilon is ", options.epsilon, "; it must be finite");
  Require(!on() || locality_ != nullptr, ErrorCode::kInvalidConfig, "policy ", policy,
          ": it was not told where experts live, so it cannot tell near from far");
}

void LocalitySwap::apply(std::int32_t rank, std::span<const double> preference,
                         std::span<std::int32_t> chosen, std::span<double> figures) const {
  const Locality& where = *locality_;
  const std::int32_t* const destination = where.destinations(rank);
  const std::int32_t node = where.node_of(rank);
  double budget = options_.epsilon;

  // One stage: places (nodes or ranks) whose routes leave the circle that `near` says, and candidates within it.
  const auto stage = [&](auto&& place, auto&& near, double& saved) {
    const auto is_chosen = [&](std::int32_t e) {
      return std::find(chosen.begin(), chosen.end(), e) != chosen.end();
    };
    // The best expert within the circle that is not chosen and comes after `last` in order of preference.
    const auto next_best = [&](std::int32_t last) {
      std::int32_t best = -1;
      for (std::int32_t e = 0; e < where.num_experts; ++e) {
        const auto at = static_cast<std::size_t>(e);
        if (destination[e] < 0 || !near(e) || is_chosen(e)) continue;
        if (last >= 0) {
          const double of_last = preference[static_cast<std::size_t>(last)];
          if (preference[at] > of_last || (preference[at] == of_last && e <= last)) continue;
        }
        if (best < 0 || preference[at] > preference[static_cast<std::size_t>(best)]) best = e;
      }
      return best;
    };
    for (;;) {
      std::int32_t cheapest = -1;
      double least = 0;
      for (const std::int32_t first : chosen) {
        const std::int32_t p = place(first);
        if (p < 0 || (cheapest >= 0 && p == cheapest)) continue;
        double regret = 0;
        std::int32_t candidate = -1;
        bool enough = true;
        for (const std::int32_t e : chosen) {
          if (place(e) != p) continue;
          candidate = next_best(candidate);
          if (candidate < 0) {
            enough = false;
            break;
          }
          regret += preference[static_cast<std::size_t>(e)] - preference[static_cast<std::size_t>(candidate)];
        }
        regret = std::max(regret, 0.0);
        if (!enough || !(regret <= budget)) continue;
        if (cheapest < 0 || regret < least || (regret == least && p < cheapest)) {
          cheapest = p;
          least = regret;
        }
      }
      if (cheapest < 0) return;
      budget -= least;
      figures[0] += least;
      saved += 1;
      // All who come are found before anyone leaves: an expert that leaves is outside the circle anyway.
      std::int32_t candidate = -1;
      for (std::int32_t& e : chosen) {
        if (place(e) != cheapest) continue;
        candidate = next_best(candidate);
        e = candidate;
        figures[1] += 1;
      }
    }
  };
  // A swapped expert is near, so it is never `place`d; next_best() skips it, as chosen and as not after `last`.
  stage(
      [&](std::int32_t e) {
        const std::int32_t n = destination[e] < 0 ? node : where.node_of(destination[e]);
        return n == node ? -1 : n;
      },
      [&](std::int32_t e) { return where.node_of(destination[e]) == node; }, figures[2]);
  if (options_.scope == RegretScope::kRank)
    stage(
        [&](std::int32_t e) {
          const std::int32_t to = destination[e];
          return to < 0 || to == rank || where.node_of(to) != node ? -1 : to;
        },
        [&](std::int32_t e) { return destination[e] == rank; }, figures[3]);
  std::sort(chosen.begin(), chosen.end());
}

}  // namespace sluice
