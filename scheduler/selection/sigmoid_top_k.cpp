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

// h = s / sum s over all experts, without underflow. out: f64 [num_experts]
void normalized(const float* z, std::span<double> out) {
  for (std::size_t e = 0; e < out.size(); ++e) out[e] = log_sigmoid(static_cast<double>(z[e]));
  const double top = *std::max_element(out.begin(), out.end());
  double sum = 0;
  for (double& v : out) sum += v = std::exp(v - top);
  for (double& v : out) v /= sum;
}

}  // namespace

SigmoidTopKPolicy::SigmoidTopKPolicy(const SigmoidTopKOptions& options)
    : options_(options), swap_(options_.name, options.locality, options.regret) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
  Require(options.top_k >= 1, kBad, "policy ", name(), ": top_k is ", options.top_k,
          "; it must be at least 1");
  Require(options.route_scale > 0 && std::isfinite(options.route_scale), kBad, "policy ", name(),
          ": route_scale is ", options.route_scale, "; it must be above 0");
  Require(options.num_groups >= 1, kBad, "policy ", name(), ": num_groups is ", options.num_groups,
          "; it must be at least 1");
  Require(options.top_groups >= 1 && options.top_groups <= options.num_groups, kBad, "policy ", name(),
          ": top_groups is ", options.top_groups, "; it must be from 1 to num_groups, ", options.num_groups);
  Require(options.bias_update >= 0 && std::isfinite(options.bias_update), kBad, "policy ", name(),
          ": bias_update is ", options.bias_update, "; it must not be negative");
  Require(options.aux_loss >= 0 && std::isfinite(options.aux_loss), kBad, "policy ", name(), ": aux_loss is ",
          options.aux_loss, "; it must not be negative");
}

void SigmoidTopKPolicy::check_options(std::int32_t num_experts, bool training) const {
  check_top_k(name(), options_.top_k, num_experts);
  Require(num_experts % options_.num_groups == 0, ErrorCode::kInvalidConfig, "policy ", name(), ": ",
          num_experts, " experts do not divide into ", options_.num_groups,
          " groups; choose num_groups among the divisors of the number of experts");
  const std::int32_t room = num_experts / options_.num_groups * options_.top_groups;
  Require(options_.top_k <= room, ErrorCode::kInvalidConfig, "policy ", name(), ": top_k is ", options_.top_k,
          " but ", options_.top_groups, " of ", options_.num_groups, " groups have ", room,
          " experts; raise top_groups");
  Require(!training || options_.top_k > 1 || !options_.renormalize, ErrorCode::kInvalidConfig, "policy ",
          name(),
          ": with top_k 1 a renormalized weight is always route_scale and the router gets no "
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
  Require(bias.empty() || bias.size() == num_experts, ErrorCode::kInvalidArgument, "policy ", name(),
          ": the adaptive state has ", bias.size(), " values, must have one bias for each of the ",
          num_experts, " experts, or none");
  bool biased = false;
  for (std::size_t e = 0; e < bias.size(); ++e) {
    Require(std::isfinite(bias[e]), ErrorCode::kInvalidState, "policy ", name(), ": the bias of expert ", e,
            " is ", bias[e], "; it must be finite");
    biased = biased || bias[e] != 0;
  }
  Routing& routing = state.routing;
  routing.expert.resize(num_tokens * top_k);
  routing.weight.resize(num_tokens * top_k);
  routing.row_ptr.resize(num_tokens + 1);
  for (std::size_t t = 0; t <= num_tokens; ++t) routing.row_ptr[t] = static_cast<std::int64_t>(t * top_k);
  const auto num_groups = static_cast<std::size_t>(options_.num_groups), of_group = num_experts / num_groups;
  const bool limited = options_.top_groups < options_.num_groups;
  swap_.check(name(), scores);
  state.scratch.resize(top_k + num_experts + num_groups);
  const std::span<double> log_score(state.scratch.data(), top_k);
  const std::span<double> preference(state.scratch.data() + top_k, num_experts);
  const std::span<double> group_score(state.scratch.data() + top_k + num_experts, num_groups);
  std::vector<std::int32_t>& groups = state.indices;
  groups.resize(static_cast<std::size_t>(options_.top_groups));

  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* z = scores.logits.data() + t * num_experts;
    std::int32_t* chosen = routing.expert.data() + t * top_k;
    float* weight = routing.weight.data() + t * top_k;
    if (biased || limited || swap_.on())
      for (std::size_t e = 0; e < num_experts; ++e)
        preference[e] = sigmoid(static_cast<double>(z[e])) + (biased ? bias[e] : 0);
    if (limited) {
      for (std::size_t g = 0; g < num_groups; ++g) {
        double first = -HUGE_VAL, second = -HUGE_VAL;
        for (std::size_t e = g * of_group; e < (g + 1) * of_group; ++e) {
          const double p = preference[e];
          second = std::max(second, std::min(first, p));
          first = std::max(first, p);
        }
        group_score[g] = of_group > 1 ? first + second : first;
      }
      const double* score = group_score.data();
      select_top_k(
          options_.num_groups, options_.top_groups,
          [score](std::int32_t a, std::int32_t b) { return score[a] > score[b]; }, groups.data());
      // The experts of the groups that stay, one after the other: positions ascend with ids.
      const double* key = preference.data();
      const auto id = [&](std::int32_t i) {
        const auto at = static_cast<std::size_t>(i);
        return static_cast<std::size_t>(groups[at / of_group]) * of_group + at % of_group;
      };
      select_top_k(
          static_cast<std::int32_t>(groups.size() * of_group), options_.top_k,
          [&](std::int32_t a, std::int32_t b) {
            const std::size_t i = id(a), j = id(b);
            return key[i] != key[j] ? key[i] > key[j] : z[i] > z[j];
          },
          chosen);
      for (std::size_t i = 0; i < top_k; ++i) chosen[i] = static_cast<std::int32_t>(id(chosen[i]));
    } else if (biased) {
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
    if (swap_.on()) swap_.apply(scores.rank_of(t), preference, {chosen, top_k}, state.statistics.sums);
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

double SigmoidTopKPolicy::aux_factor(std::int32_t num_experts, const PolicyState& state) const {
  const auto tokens = static_cast<double>(state.statistics.num_tokens);
  return tokens == 0 ? 0 : options_.aux_loss * num_experts / (options_.top_k * tokens * tokens);
}

double SigmoidTopKPolicy::auxiliary(const Scores& scores, const AdaptiveState&, const BatchStatistics&,
                                    PolicyState& state) const {
  if (options_.aux_loss == 0) return 0;
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  state.scratch.resize(num_experts);
  double weighted = 0;
  for (std::size_t t = 0; t < static_cast<std::size_t>(scores.num_tokens); ++t) {
    normalized(scores.logits.data() + t * num_experts, state.scratch);
    for (std::size_t e = 0; e < num_experts; ++e)
      weighted += static_cast<double>(state.statistics.tokens_of_expert[e]) * state.scratch[e];
  }
  return aux_factor(scores.num_experts, state) * weighted;
}

void SigmoidTopKPolicy::adapt(std::span<const PolicyState* const> batches, AdaptiveState& adaptive) const {
  std::vector<double>& bias = adaptive.values;
  if (options_.bias_update == 0 || bias.empty()) return;
  for (const PolicyState* batch : batches)
    Require(batch->done && batch->training && batch->statistics.tokens_of_expert.size() == bias.size(),
            ErrorCode::kInvalidState, "policy ", name(),
            ": adapt() needs batches of these experts whose step() is done in training");
  const auto num_experts = static_cast<std::int64_t>(bias.size());
  std::int64_t total = 0;
  for (const PolicyState* batch : batches) total += batch->statistics.num_routes;
  for (std::size_t e = 0; e < bias.size(); ++e) {
    std::int64_t count = 0;
    for (const PolicyState* batch : batches) count += batch->statistics.tokens_of_expert[e];
    if (count * num_experts != total)
      bias[e] += count * num_experts < total ? options_.bias_update : -options_.bias_update;
  }
}

void SigmoidTopKPolicy::gradient(const Scores& scores, const AdaptiveState&, const PolicyState& state,
                                 std::span<const float> dweight, std::span<float> dlogits) const {
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  const double factor = aux_factor(scores.num_experts, state);
  std::vector<double>& h = state.scratch;
  h.resize(num_experts);
  for (std::size_t t = 0; t < static_cast<std::size_t>(scores.num_tokens); ++t) {
    if (factor > 0) {
      const float* z = scores.logits.data() + t * num_experts;
      normalized(z, h);
      double of_all = 0;
      for (std::size_t e = 0; e < num_experts; ++e)
        of_all += h[e] * static_cast<double>(state.statistics.tokens_of_expert[e]);
      for (std::size_t e = 0; e < num_experts; ++e)
        dlogits[t * num_experts + e] =
            static_cast<float>(factor * h[e] * sigmoid(-static_cast<double>(z[e])) *
                               (static_cast<double>(state.statistics.tokens_of_expert[e]) - of_all));
    }
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
      dlogits[at] += static_cast<float>(static_cast<double>(weight[i]) * one_minus_s *
                                        (static_cast<double>(a[i]) - mean));
    }
  }
}

}  // namespace sluice
