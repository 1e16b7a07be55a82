#include "sluice/scheduler/selection/relu.hpp"

#include <cmath>

namespace sluice {

ReluPolicy::ReluPolicy(const ReluOptions& options) : options_(options) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
  Require(options.top_k >= 1, kBad, "policy relu: top_k is ", options.top_k, "; it must be at least 1");
  Require(options.num_layers >= 1, kBad, "policy relu: num_layers is ", options.num_layers,
          "; it must be at least 1");
  Require(options.lambda0 >= 0 && std::isfinite(options.lambda0), kBad, "policy relu: lambda0 is ",
          options.lambda0, "; it must be finite and not negative");
  Require(options.alpha >= 1 && std::isfinite(options.alpha), kBad, "policy relu: alpha is ", options.alpha,
          "; it must be at least 1");
}

void ReluPolicy::check_options(std::int32_t num_experts, bool) const {
  check_top_k(name(), options_.top_k, num_experts);
}

AdaptiveState ReluPolicy::initial_state(std::int32_t) const {
  return {{options_.lambda0}};
}

double ReluPolicy::lambda_of(const AdaptiveState& adaptive) const {
  Require(adaptive.values.size() == 1, ErrorCode::kInvalidArgument, "policy relu: the adaptive state has ",
          adaptive.values.size(), " values, must have 1 (lambda)");
  const double lambda = adaptive.values[0];
  Require(lambda >= 0 && std::isfinite(lambda), ErrorCode::kInvalidState, "policy relu: lambda is ", lambda,
          "; it must be finite and not negative (does the sparsity never reach its target?)");
  return lambda;
}

void ReluPolicy::select(const Scores& scores, const AdaptiveState&, PolicyState& state) const {
  std::size_t num_routes = 0;
  for (const float z : scores.logits) num_routes += static_cast<std::size_t>(z > 0);
  Routing& routing = state.routing;
  // Every entry is written at the current end and kept only if it is a route; so one entry more is needed.
  routing.expert.resize(num_routes + 1);
  routing.weight.resize(num_routes + 1);
  routing.row_ptr.resize(static_cast<std::size_t>(scores.num_tokens) + 1);
  routing.row_ptr[0] = 0;
  std::size_t n = 0;
  const float* z = scores.logits.data();
  for (std::int64_t t = 0; t < scores.num_tokens; ++t) {
    for (std::int32_t e = 0; e < scores.num_experts; ++e, ++z) {
      routing.expert[n] = e;
      routing.weight[n] = *z;
      n += static_cast<std::size_t>(*z > 0);
    }
    routing.row_ptr[static_cast<std::size_t>(t) + 1] = static_cast<std::int64_t>(n);
  }
  routing.expert.resize(num_routes);
  routing.weight.resize(num_routes);
}

double ReluPolicy::auxiliary(const Scores& scores, const AdaptiveState& adaptive,
                             const BatchStatistics& local, PolicyState& state) const {
  const double lambda = lambda_of(adaptive);
  const bool official = options_.variant == ReluVariant::kOfficial;
  const BatchStatistics& counted = official ? local : state.statistics;
  const auto tokens = static_cast<double>(state.statistics.num_tokens);
  const double layers = official ? 1 : options_.num_layers;
  // saved: f32 [num_experts], d(loss)/dR of a route to the expert
  std::vector<double>& coefficient = state.scratch;
  coefficient.assign(static_cast<std::size_t>(scores.num_experts), 0);
  if (scores.num_tokens > 0) {  // then both T are above 0
    for (std::size_t e = 0; e < coefficient.size(); ++e) {
      const double f = options_.load_balanced
                           ? scores.num_experts * static_cast<double>(counted.tokens_of_expert[e]) /
                                 (options_.top_k * static_cast<double>(counted.num_tokens))
                           : 1;
      coefficient[e] = lambda * f / (layers * tokens);
    }
  }
  state.saved.assign(coefficient.begin(), coefficient.end());
  double loss = 0;
  for (std::size_t i = 0; i < state.routing.expert.size(); ++i)
    loss += coefficient[static_cast<std::size_t>(state.routing.expert[i])] *
            static_cast<double>(state.routing.weight[i]);
  return loss;
}

void ReluPolicy::gradient(const Scores& scores, const AdaptiveState&, const PolicyState& state,
                          std::span<const float> dweight, std::span<float> dlogits) const {
  const Routing& routing = state.routing;
  for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t) {
    float* row = dlogits.data() + t * static_cast<std::size_t>(scores.num_experts);
    for (auto i = static_cast<std::size_t>(routing.row_ptr[t]);
         i < static_cast<std::size_t>(routing.row_ptr[t + 1]); ++i) {
      const auto e = static_cast<std::size_t>(routing.expert[i]);
      row[e] = dweight[i] + state.saved[e];
    }
  }
}

void ReluPolicy::adapt(std::span<const PolicyState* const> batches, AdaptiveState& adaptive) const {
  const double lambda = lambda_of(adaptive);
  // sign(target - S) = sign(routes - k * tokens), compared in integers: exact.
  std::int64_t routes = 0;
  std::int64_t wanted = 0;
  for (const PolicyState* batch : batches) {
    Require(batch->done && batch->training, ErrorCode::kInvalidState,
            "policy relu: adapt() needs batches whose step() is done in training");
    routes += batch->statistics.num_routes;
    wanted += options_.top_k * batch->statistics.num_tokens;
  }
  if (wanted == 0) return;  // no tokens: nothing was observed
  if (routes > wanted)
    adaptive.values[0] = lambda * options_.alpha;
  else if (routes < wanted || options_.variant == ReluVariant::kOfficial)
    adaptive.values[0] = lambda / options_.alpha;
}

}  // namespace sluice
