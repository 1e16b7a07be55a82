#include "sluice/scheduler/selection/moepp.hpp"

#include <algorithm>
#include <cmath>

#include "sluice/scheduler/selection/capacity.hpp"

namespace sluice {

MoeppPolicy::MoeppPolicy(const MoeppOptions& options) : options_(options) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
  Require(options.top_k >= 1, kBad, "policy moepp: top_k is ", options.top_k, "; it must be at least 1");
  Require(options.tau > 0 && options.tau <= 1, kBad, "policy moepp: moepp_tau is ", options.tau,
          "; it must be above 0 and at most 1");
  Require(options.capacity_factor >= 0 && std::isfinite(options.capacity_factor), kBad,
          "policy moepp: capacity_factor is ", options.capacity_factor,
          "; it must be at least 0, and 0 is no capacity");
  Require(options.aux_loss >= 0 && std::isfinite(options.aux_loss), kBad, "policy moepp: aux_loss is ",
          options.aux_loss, "; it must not be negative");
  for (const ExpertKind kind : options.kinds) (is_everywhere(kind) ? num_zc_ : num_ffn_) += 1;
}

void MoeppPolicy::check_options(std::int32_t num_experts, bool) const {
  check_top_k(name(), options_.top_k, num_experts);
  Require(options_.kinds.size() == static_cast<std::size_t>(num_experts), ErrorCode::kInvalidConfig,
          "policy moepp: it was told the kinds of ", options_.kinds.size(), " experts; there are ",
          num_experts);
}

std::int64_t MoeppPolicy::capacity(ExpertKind kind, std::int64_t num_tokens) const {
  const double assignments = static_cast<double>(options_.top_k) * static_cast<double>(num_tokens);
  const double share = (is_everywhere(kind) ? 1 : options_.tau) / (options_.tau * num_ffn_ + num_zc_);
  return static_cast<std::int64_t>(std::ceil(options_.capacity_factor * share * assignments));
}

// saved, in training: f32 [num_tokens, num_experts] p, then [num_tokens, top_k] the experts selected
bool MoeppPolicy::choose(const Scores& scores, const AdaptiveState&, PolicyState& state) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  Routing& routing = state.routing;
  if (state.step == 1) {
    const GatheredCounts counts(name(), scores.rank, scores.num_experts, state.buffer, state.gathered);
    std::vector<std::int64_t> room(num_experts);
    for (std::size_t e = 0; e < num_experts; ++e)
      room[e] = capacity(kind(e), counts.num_tokens()) - counts.before(counts.own(), e);
    const std::size_t before = routing.expert.size();
    keep_routes(routing,
                [&](std::size_t, std::int32_t e) { return room[static_cast<std::size_t>(e)]-- > 0; });
    state.statistics.sums[0] = static_cast<double>(before - routing.expert.size());
    finish(state);
    return true;
  }
  routing.expert.resize(num_tokens * top_k);
  routing.weight.resize(num_tokens * top_k);
  routing.row_ptr.resize(num_tokens + 1);
  for (std::size_t t = 0; t <= num_tokens; ++t) routing.row_ptr[t] = static_cast<std::int64_t>(t * top_k);
  state.saved.resize(state.training ? num_tokens * (num_experts + top_k) : num_experts);
  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* z = scores.logits.data() + t * num_experts;
    std::int32_t* chosen = routing.expert.data() + t * top_k;
    float* weight = routing.weight.data() + t * top_k;
    float* p = state.saved.data() + (state.training ? t * num_experts : 0);
    select_top_k(
        scores.num_experts, options_.top_k, [z](std::int32_t a, std::int32_t b) { return z[a] > z[b]; },
        chosen);
    const float top = *std::max_element(z, z + num_experts);
    double sum = 0;
    for (std::size_t e = 0; e < num_experts; ++e) sum += static_cast<double>(p[e] = std::exp(z[e] - top));
    const auto inverse = static_cast<float>(1 / sum);
    for (std::size_t e = 0; e < num_experts; ++e) p[e] *= inverse;
    bool any_zero = false, any_other = false;
    float highest = 0;
    for (std::size_t i = 0; i < top_k; ++i) {
      const auto e = static_cast<std::size_t>(chosen[i]);
      if (kind(e) == ExpertKind::kZero) {
        any_zero = true;
        continue;
      }
      highest = any_other ? std::max(highest, z[e]) : z[e];
      any_other = true;
    }
    if (any_zero) {  // relative to the highest of the others, so that nothing underflows to 0 / 0
      double others = 0;
      for (std::size_t i = 0; i < top_k; ++i) {
        const auto e = static_cast<std::size_t>(chosen[i]);
        weight[i] = kind(e) == ExpertKind::kZero ? 0 : std::exp(z[e] - highest);
        others += static_cast<double>(weight[i]);
      }
      for (std::size_t i = 0; i < top_k; ++i)
        if (weight[i] > 0) weight[i] = static_cast<float>(static_cast<double>(weight[i]) / others);
    } else {
      for (std::size_t i = 0; i < top_k; ++i) weight[i] = p[chosen[i]];
    }
    if (!state.training) continue;
    for (std::size_t i = 0; i < top_k; ++i) {
      state.saved[num_tokens * num_experts + t * top_k + i] = static_cast<float>(chosen[i]);
      state.statistics.sums[kFigures.size() + static_cast<std::size_t>(chosen[i])] += 1;
    }
  }
  if (!state.training || options_.capacity_factor == 0) {
    finish(state);
    return true;
  }
  ask_for_counts(scores, state);
  return false;
}

void MoeppPolicy::finish(PolicyState& state) const {
  for (const std::int32_t e : state.routing.expert)
    state.statistics.sums[is_everywhere(kind(static_cast<std::size_t>(e))) ? 1 : 2] += 1;
}

double MoeppPolicy::aux_factor(std::size_t expert, const PolicyState& state) const {
  const auto tokens = static_cast<double>(state.statistics.num_tokens);
  const double eta = is_everywhere(kind(expert)) ? options_.tau : 1;
  return tokens == 0 ? 0 : options_.aux_loss * eta / (tokens * tokens);
}

double MoeppPolicy::auxiliary(const Scores& scores, const AdaptiveState&, const BatchStatistics&,
                              PolicyState& state) const {
  if (options_.aux_loss == 0) return 0;
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  double loss = 0;
  for (std::size_t e = 0; e < num_experts; ++e) {
    double sum = 0;
    for (std::size_t t = 0; t < num_tokens; ++t) sum += static_cast<double>(state.saved[t * num_experts + e]);
    loss += aux_factor(e, state) * state.statistics.sums[kFigures.size() + e] * sum;
  }
  return loss;
}

void MoeppPolicy::gradient(const Scores& scores, const AdaptiveState&, const PolicyState& state,
                           std::span<const float> dweight, std::span<float> dlogits) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  std::vector<double>& upstream = state.scratch;
  upstream.resize(num_experts);
  const Routing& routing = state.routing;
  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* p = state.saved.data() + t * num_experts;
    const float* selected = state.saved.data() + num_tokens * num_experts + t * top_k;
    const float* z = scores.logits.data() + t * num_experts;
    const bool any_zero = std::any_of(selected, selected + top_k, [&](float e) {
      return kind(static_cast<std::size_t>(e)) == ExpertKind::kZero;
    });
    for (std::size_t e = 0; e < num_experts; ++e)
      upstream[e] = aux_factor(e, state) * state.statistics.sums[kFigures.size() + e];
    const auto begin = static_cast<std::size_t>(routing.row_ptr[t]);
    const auto end = static_cast<std::size_t>(routing.row_ptr[t + 1]);
    if (!any_zero)
      for (std::size_t i = begin; i < end; ++i)
        upstream[static_cast<std::size_t>(routing.expert[i])] += static_cast<double>(dweight[i]);
    double mean = 0;
    for (std::size_t e = 0; e < num_experts; ++e) mean += static_cast<double>(p[e]) * upstream[e];
    for (std::size_t e = 0; e < num_experts; ++e)
      upstream[e] = static_cast<double>(p[e]) * (upstream[e] - mean);
    if (any_zero) {
      // q over all that were renormalized, dropped ones too; a over what is left.
      double along = 0;
      for (std::size_t i = begin; i < end; ++i)
        along += static_cast<double>(routing.weight[i]) * static_cast<double>(dweight[i]);
      float highest = 0;
      bool first = true;
      const auto renormalized = [&](float e) {
        return kind(static_cast<std::size_t>(e)) != ExpertKind::kZero;
      };
      for (std::size_t i = 0; i < top_k; ++i)
        if (renormalized(selected[i])) {
          const float value = z[static_cast<std::size_t>(selected[i])];
          highest = first ? value : std::max(highest, value);
          first = false;
        }
      double sum = 0;
      for (std::size_t i = 0; i < top_k; ++i)
        if (renormalized(selected[i]))
          sum += std::exp(static_cast<double>(z[static_cast<std::size_t>(selected[i])] - highest));
      for (std::size_t i = 0; i < top_k; ++i)
        if (renormalized(selected[i])) {
          const auto e = static_cast<std::size_t>(selected[i]);
          upstream[e] -= std::exp(static_cast<double>(z[e] - highest)) / sum * along;
        }
      for (std::size_t i = begin; i < end; ++i)  // a zero expert's weight is 0
        upstream[static_cast<std::size_t>(routing.expert[i])] +=
            static_cast<double>(routing.weight[i]) * static_cast<double>(dweight[i]);
    }
    for (std::size_t e = 0; e < num_experts; ++e)
      dlogits[t * num_experts + e] = static_cast<float>(upstream[e]);
  }
}

}  // namespace sluice
