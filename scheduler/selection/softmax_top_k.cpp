#include "sluice/scheduler/selection/softmax_top_k.hpp"

#include <algorithm>
#include <cmath>

namespace sluice {

SoftmaxTopKPolicy::SoftmaxTopKPolicy(const SoftmaxTopKOptions& options)
    : options_(options),
      swap_(options_.name, options.locality, options.regret),
      locality_loss_(options_.name, options.locality.get(), options.locality_loss, options.locality_epsilon) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
  Require(options.top_k >= 1, kBad, "policy ", name(), ": top_k is ", options.top_k,
          "; it must be at least 1");
  Require(options.route_scale > 0 && std::isfinite(options.route_scale), kBad, "policy ", name(),
          ": route_scale is ", options.route_scale, "; it must be above 0");
  Require(options.aux_loss >= 0 && std::isfinite(options.aux_loss), kBad, "policy ", name(), ": aux_loss is ",
          options.aux_loss, "; it must not be negative");
  Require(options.z_loss >= 0 && std::isfinite(options.z_loss), kBad, "policy ", name(), ": z_loss is ",
          options.z_loss, "; it must not be negative");
}

void SoftmaxTopKPolicy::check_options(std::int32_t num_experts, bool training) const {
  check_top_k(name(), options_.top_k, num_experts);
  Require(!training || options_.top_k > 1 || !over_selected(), ErrorCode::kInvalidConfig, "policy ", name(),
          ": with top_k 1 a softmax over the chosen expert is always 1 and the router gets no "
          "gradient; use pre_softmax without renormalize, or top_k of at least 2");
}

// saved, in training: f32 [num_tokens, num_experts] p, then f32 [num_tokens] logsumexp
void SoftmaxTopKPolicy::select(const Scores& scores, const AdaptiveState&, PolicyState& state) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  Routing& routing = state.routing;
  routing.expert.resize(num_tokens * top_k);
  routing.weight.resize(num_tokens * top_k);
  routing.row_ptr.resize(num_tokens + 1);
  for (std::size_t t = 0; t <= num_tokens; ++t) routing.row_ptr[t] = static_cast<std::int64_t>(t * top_k);
  const bool need_all = state.training || !over_selected() || swap_.on();
  if (locality_loss_.on()) options_.locality->check(name(), scores);
  swap_.check(name(), scores);
  std::vector<double>& preference = state.scratch;
  if (swap_.on()) preference.resize(num_experts);
  // Without training one token's p at a time.
  state.saved.resize(state.training ? num_tokens * (num_experts + 1) : num_experts);

  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* z = scores.logits.data() + t * num_experts;
    std::int32_t* chosen = routing.expert.data() + t * top_k;
    float* weight = routing.weight.data() + t * top_k;
    select_top_k(
        scores.num_experts, options_.top_k, [z](std::int32_t a, std::int32_t b) { return z[a] > z[b]; },
        chosen);
    float* p = state.saved.data() + (state.training ? t * num_experts : 0);
    if (need_all) {
      const float top = *std::max_element(z, z + num_experts);
      double sum = 0;
      for (std::size_t e = 0; e < num_experts; ++e) sum += static_cast<double>(p[e] = std::exp(z[e] - top));
      const auto inverse = static_cast<float>(1 / sum);
      for (std::size_t e = 0; e < num_experts; ++e) p[e] *= inverse;
      if (state.training)
        state.saved[num_tokens * num_experts + t] =
            static_cast<float>(static_cast<double>(top) + std::log(sum));
    }
    if (swap_.on()) {
      std::copy_n(p, num_experts, preference.begin());
      swap_.apply(scores.rank_of(t), preference, {chosen, top_k}, state.statistics.sums);
    }
    const auto scale = static_cast<float>(options_.route_scale);
    if (over_selected()) {
      float top = z[chosen[0]];
      for (std::size_t i = 1; i < top_k; ++i) top = std::max(top, z[chosen[i]]);
      double sum = 0;
      for (std::size_t i = 0; i < top_k; ++i)
        sum += static_cast<double>(weight[i] = std::exp(z[chosen[i]] - top));
      for (std::size_t i = 0; i < top_k; ++i)
        weight[i] = static_cast<float>(static_cast<double>(weight[i]) / sum) * scale;
    } else {
      for (std::size_t i = 0; i < top_k; ++i) weight[i] = p[chosen[i]] * scale;
    }
  }
  if (state.training)
    locality_loss_.add_sums(scores, state.saved.data(),
                            std::span(state.statistics.sums).subspan(figures().size()));
}

double SoftmaxTopKPolicy::aux_factor(std::int32_t num_experts, const PolicyState& state) const {
  const auto tokens = static_cast<double>(state.statistics.num_tokens);
  return tokens == 0 ? 0 : options_.aux_loss * num_experts / (options_.top_k * tokens * tokens);
}

double SoftmaxTopKPolicy::auxiliary(const Scores& scores, const AdaptiveState&, const BatchStatistics&,
                                    PolicyState& state) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  double loss = 0;
  if (options_.aux_loss > 0) {
    std::vector<double>& sum = state.scratch;
    sum.assign(num_experts, 0);
    for (std::size_t t = 0; t < num_tokens; ++t)
      for (std::size_t e = 0; e < num_experts; ++e)
        sum[e] += static_cast<double>(state.saved[t * num_experts + e]);
    double weighted = 0;
    for (std::size_t e = 0; e < num_experts; ++e)
      weighted += static_cast<double>(state.statistics.tokens_of_expert[e]) * sum[e];
    loss += aux_factor(scores.num_experts, state) * weighted;
  }
  if (options_.z_loss > 0 && num_tokens > 0) {
    double squares = 0;
    for (std::size_t t = 0; t < num_tokens; ++t) {
      const auto lse = static_cast<double>(state.saved[num_tokens * num_experts + t]);
      squares += lse * lse;
    }
    loss += options_.z_loss * squares / static_cast<double>(state.statistics.num_tokens);
  }
  loss += locality_loss_.loss(scores, std::span(state.statistics.sums).subspan(figures().size()));
  return loss;
}

void SoftmaxTopKPolicy::gradient(const Scores& scores, const AdaptiveState&, const PolicyState& state,
                                 std::span<const float> dweight, std::span<float> dlogits) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  if (num_tokens == 0) return;
  const double scale = options_.route_scale;
  const double z_factor = 2 * options_.z_loss / static_cast<double>(state.statistics.num_tokens);
  state.scratch.resize(2 * num_experts);
  const std::span<double> of_loss(state.scratch.data(), num_experts);                 // g_e
  const std::span<double> upstream(state.scratch.data() + num_experts, num_experts);  // on p
  for (std::size_t e = 0; e < num_experts; ++e)
    of_loss[e] =
        aux_factor(scores.num_experts, state) * static_cast<double>(state.statistics.tokens_of_expert[e]);

  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* p = state.saved.data() + t * num_experts;
    const std::int32_t* chosen = state.routing.expert.data() + t * top_k;
    const float* weight = state.routing.weight.data() + t * top_k;
    const float* a = dweight.data() + t * top_k;
    float* dz = dlogits.data() + t * num_experts;
    std::copy(of_loss.begin(), of_loss.end(), upstream.begin());
    if (!over_selected())
      for (std::size_t i = 0; i < top_k; ++i)
        upstream[static_cast<std::size_t>(chosen[i])] += scale * static_cast<double>(a[i]);
    locality_loss_.add_gradient(scores, t, std::span(state.statistics.sums).subspan(figures().size()),
                                upstream);
    double mean = 0;
    for (std::size_t e = 0; e < num_experts; ++e) mean += static_cast<double>(p[e]) * upstream[e];
    const double of_z = z_factor * static_cast<double>(state.saved[num_tokens * num_experts + t]);
    // upstream becomes dz in double
    for (std::size_t e = 0; e < num_experts; ++e)
      upstream[e] = static_cast<double>(p[e]) * (upstream[e] - mean + of_z);
    if (over_selected()) {
      double chosen_mean = 0;  // sum over S of a_e q_e, with w = scale * q
      for (std::size_t i = 0; i < top_k; ++i)
        chosen_mean += static_cast<double>(a[i]) * static_cast<double>(weight[i]) / scale;
      for (std::size_t i = 0; i < top_k; ++i)
        upstream[static_cast<std::size_t>(chosen[i])] +=
            static_cast<double>(weight[i]) * (static_cast<double>(a[i]) - chosen_mean);
    }
    for (std::size_t e = 0; e < num_experts; ++e) dz[e] = static_cast<float>(upstream[e]);
  }
}

}  // namespace sluice
