#include "sluice/scheduler/selection/factory.hpp"

#include <array>
#include <utility>

#include "sluice/base/config_schema.hpp"
#include "sluice/scheduler/selection/relu.hpp"
#include "sluice/scheduler/selection/sigmoid_top_k.hpp"
#include "sluice/scheduler/selection/softmax_top_k.hpp"

namespace sluice {
namespace {

constexpr std::array<std::string_view, 3> kPolicies = {"relu", "sigmoid_topk", "softmax_topk"};
constexpr std::array<std::string_view, 2> kReluVariants = {"paper", "official"};

// Position of `value` in `allowed`; throws with the list and the nearest word.
std::size_t one_of(std::string_view what, std::string_view value, std::span<const std::string_view> allowed) {
  std::string list;
  for (std::size_t i = 0; i < allowed.size(); ++i) {
    if (allowed[i] == value) return i;
    list += str(i == 0 ? "" : ", ", allowed[i]);
  }
  const std::string_view meant = config_schema::did_you_mean(value, allowed);
  throw Error(ErrorCode::kInvalidConfig,
              str("there is no ", what, " ", config_schema::quoted(value), "; it must be one of: ", list,
                  meant.empty() ? std::string() : str(" (did you mean ", meant, "?)")));
}

}  // namespace

std::span<const std::string_view> policy_names() {
  return kPolicies;
}

PolicyOptions policy_options(const Config::Routing& routing, std::int32_t num_layers) {
  PolicyOptions out;
  switch (routing.policy) {
    case Config::Routing::Policy::kRelu:
      out.name = "relu";
      break;
    case Config::Routing::Policy::kSoftmaxTopK:
      out.name = "softmax_topk";
      break;
    case Config::Routing::Policy::kSigmoidTopK:
      out.name = "sigmoid_topk";
      break;
  }
  out.top_k = routing.top_k;
  out.num_layers = num_layers;
  out.renormalize = routing.renormalize;
  out.route_scale = routing.route_scale;
  out.pre_softmax = routing.pre_softmax;
  out.aux_loss = routing.aux_loss;
  out.z_loss = routing.z_loss;
  out.relu_variant = routing.relu_variant == Config::Routing::ReluVariant::kPaper ? "paper" : "official";
  out.relu_load_balanced = routing.relu_load_balanced;
  out.relu_lambda0 = routing.relu_lambda0;
  out.relu_alpha = routing.relu_alpha;
  return out;
}

std::unique_ptr<SelectionPolicy> make_policy(const PolicyOptions& options) {
  const std::string_view name = kPolicies[one_of("selection policy", options.name, kPolicies)];
  if (name == "softmax_topk")
    return std::make_unique<SoftmaxTopKPolicy>(
        SoftmaxTopKOptions{.top_k = options.top_k,
                           .order = options.pre_softmax ? SoftmaxOrder::kPre : SoftmaxOrder::kPost,
                           .renormalize = options.renormalize,
                           .route_scale = options.route_scale,
                           .aux_loss = options.aux_loss,
                           .z_loss = options.z_loss});
  for (const auto& [key, value] :
       {std::pair{"aux_loss", options.aux_loss}, std::pair{"z_loss", options.z_loss}})
    Require(value == 0, ErrorCode::kInvalidConfig, "policy ", name, " has no ", key,
            " but its coefficient is ", value, "; set it to 0, or use softmax_topk");
  if (name == "sigmoid_topk")
    return std::make_unique<SigmoidTopKPolicy>(SigmoidTopKOptions{
        .top_k = options.top_k, .renormalize = options.renormalize, .route_scale = options.route_scale});
  const bool official = one_of("variant of policy relu", options.relu_variant, kReluVariants) == 1;
  return std::make_unique<ReluPolicy>(
      ReluOptions{.top_k = options.top_k,
                  .num_layers = options.num_layers,
                  .lambda0 = options.relu_lambda0,
                  .alpha = options.relu_alpha,
                  .load_balanced = options.relu_load_balanced,
                  .variant = official ? ReluVariant::kOfficial : ReluVariant::kPaper});
}

}  // namespace sluice
