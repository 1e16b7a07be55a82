#include "sluice/scheduler/selection/sigmoid_top_k.hpp"

#include <algorithm>
#include <cmath>

namespace sluice {
namespace {

double sigmoid(double z) {
  // exp of a negative number only: no overflow, full precision on both sides
  const double e = std::exp(-std::abs(z));
  return z >= 0 ? 1 / (1 + e) : e / (1 + e);
}

// log(sigmoid(z)), finite for every finite z of float range
double log_sigmoid(double z) {
  return std::min(z, 0.0) - std::log1p(std::exp(-std::abs(z)));
}

}  // namespace

SigmoidTopKPolicy::SigmoidTopKPolicy(const SigmoidTopKOptions& options) : options_(options) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
  Require(options.top_k >= 1, kBad, "policy sigmoid_topk: top_k is ", options.top_k,
          "; it must be at least 1");
  Require(options.route_scale > 0 && std::isfinite(options.route_scale), kBad,
          "policy sigmoid_topk: route_scale is ", options.route_scale, "; it must be above 0");
}

void SigmoidTopKPolicy::check_options(std::int32_t num_experts, bool training) const {
  check_top_k(name(), options_.top_k, num_experts);
  Require(
      !training || options_.top_k > 1 || !options_.renormalize, ErrorCode::kInvalidConfig,
      "policy sigmoid_topk: with top_k 1 a renormalized weight is always route_scale and the router gets no "
      "gradient; switch renormalize off, or use top_k of at least 2");
}

AdaptiveState SigmoidTopKPolicy::initial_state(std::int32_t num_experts) const {
  return {std::vector<double>(static_cast<std::size_t>(num_experts), 0)};
}

void SigmoidTopKPolicy::select(const Scores& scores, const AdaptiveState& adaptive,
                               PolicyState& state) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  const std::vector<double>& bias = adaptive.values;
  Require(bias.empty() || bias.size() == num_experts, ErrorCode::kInvalidArgument,
          "policy sigmoid_topk: the adaptive state has ", bias.size(),
          " values, must have one bias for each of the ", num_experts, " experts, or none");
  bool biased = false;
  for (std::size_t e = 0; e < bias.size(); ++e) {
    Require(std::isfinite(bias[e]), ErrorCode::kInvalidState, "policy sigmoid_topk: the bias of expert ", e,
            " is ", bias[e], "; it must be finite");
    biased = biased || bias[e] != 0;
  }
  Routing& routing = state.routing;
  routing.expert.resize(num_tokens * top_k);
  routing.weight.resize(num_tokens * top_k);
  routing.row_ptr.resize(num_tokens + 1);
  for (std::size_t t = 0; t <= num_tokens; ++t) routing.row_ptr[t] = static_cast<std::int64_t>(t * top_k);
  state.scratch.resize(top_k + num_experts);
  const std::span<double> log_score(state.scratch.data(), top_k);
  const std::span<double> preference(state.scratch.data() + top_k, num_experts);

  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* z = scores.logits.data() + t * num_experts;
    std::int32_t* chosen = routing.expert.data() + t * top_k;
    float* weight = routing.weight.data() + t * top_k;
    if (biased) {
      for (std::size_t e = 0; e < num_experts; ++e)
        preference[e] = sigmoid(static_cast<double>(z[e])) + bias[e];
      const double* key = preference.data();
      select_top_k(
          scores.num_experts, options_.top_k,
          [z, key](std::int32_t a, std::int32_t b) {
            return key[a] != key[b] ? key[a] > key[b] : z[a] > z[b];
          },
          chosen);
    } else {  // s grows with z: the same choice without the exponentials
      select_top_k(
          scores.num_experts, options_.top_k, [z](std::int32_t a, std::int32_t b) { return z[a] > z[b]; },
          chosen);
    }
    if (options_.renormalize) {
      for (std::size_t i = 0; i < top_k; ++i) log_score[i] = log_sigmoid(static_cast<double>(z[chosen[i]]));
      const double top = *std::max_element(log_score.begin(), log_score.end());
      double sum = 0;
      for (double& value : log_score) sum += value = std::exp(value - top);
      for (std::size_t i = 0; i < top_k; ++i)
        weight[i] = static_cast<float>(options_.route_scale * log_score[i] / sum);
    } else {
      for (std::size_t i = 0; i < top_k; ++i)
        weight[i] = static_cast<float>(options_.route_scale * sigmoid(static_cast<double>(z[chosen[i]])));
    }
  }
}

void SigmoidTopKPolicy::gradient(const Scores& scores, const AdaptiveState&, const PolicyState& state,
                                 std::span<const float> dweight, std::span<float> dlogits) const {
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  for (std::size_t t = 0; t < static_cast<std::size_t>(scores.num_tokens); ++t) {
    const std::int32_t* chosen = state.routing.expert.data() + t * top_k;
    const float* weight = state.routing.weight.data() + t * top_k;
    const float* a = dweight.data() + t * top_k;
    double mean = 0;
    if (options_.renormalize)
      for (std::size_t i = 0; i < top_k; ++i)
        mean += static_cast<double>(a[i]) * static_cast<double>(weight[i]) / options_.route_scale;
    for (std::size_t i = 0; i < top_k; ++i) {
      const std::size_t at = t * num_experts + static_cast<std::size_t>(chosen[i]);
      const double one_minus_s = sigmoid(-static_cast<double>(scores.logits[at]));
      dlogits[at] = static_cast<float>(static_cast<double>(weight[i]) * one_minus_s *
                                       (static_cast<double>(a[i]) - mean));
    }
  }
}

}  // namespace sluice
