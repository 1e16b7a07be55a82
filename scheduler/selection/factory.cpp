#include "sluice/scheduler/selection/factory.hpp"

#include <array>
#include <utility>

#include "sluice/base/config_schema.hpp"
#include "sluice/scheduler/selection/etr.hpp"
#include "sluice/scheduler/selection/moepp.hpp"
#include "sluice/scheduler/selection/relu.hpp"
#include "sluice/scheduler/selection/sigmoid_top_k.hpp"
#include "sluice/scheduler/selection/softmax_top_k.hpp"

namespace sluice {
namespace {

constexpr std::array<std::string_view, 7> kPolicies = {
    "bounded_regret", "etr", "moepp", "node_limited", "relu", "sigmoid_topk", "softmax_topk"};
constexpr std::array<std::string_view, 3> kRegretBases = {"node_limited", "sigmoid_topk", "softmax_topk"};
constexpr std::array<std::string_view, 2> kRegretScopes = {"node", "rank"};
constexpr std::array<std::string_view, 3> kEtrChoices = {"auto", "token", "both"};
constexpr std::array<std::string_view, 2> kEtrQuotas = {"global", "local"};
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
  using Routing = Config::Routing;
  switch (routing.policy) {
    case Routing::Policy::kRelu:
      out.name = "relu";
      break;
    case Routing::Policy::kSoftmaxTopK:
      out.name = "softmax_topk";
      break;
    case Routing::Policy::kSigmoidTopK:
      out.name = "sigmoid_topk";
      break;
    case Routing::Policy::kNodeLimited:
      out.name = "node_limited";
      break;
    case Routing::Policy::kBoundedRegret:
      out.name = "bounded_regret";
      break;
    case Routing::Policy::kMoepp:
      out.name = "moepp";
      break;
    case Routing::Policy::kEtr:
      out.name = "etr";
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
  out.bias_update = routing.bias_update;
  out.num_groups = routing.num_groups;
  out.top_groups = routing.top_groups;
  out.regret_base = routing.regret_base == Routing::RegretBase::kSoftmaxTopK   ? "softmax_topk"
                    : routing.regret_base == Routing::RegretBase::kSigmoidTopK ? "sigmoid_topk"
                                                                               : "node_limited";
  out.regret_epsilon = routing.regret_epsilon;
  out.regret_scope = routing.regret_scope == Routing::RegretScope::kRank ? "rank" : "node";
  out.locality_loss = routing.locality_loss;
  out.locality_epsilon = routing.locality_epsilon;
  out.capacity_factor = routing.capacity_factor;
  out.moepp_tau = routing.moepp_tau;
  out.etr_tau = routing.etr_tau;
  out.etr_temperature = routing.etr_temperature;
  out.etr_delta_max = routing.etr_delta_max;
  out.etr_choice = routing.etr_choice == Routing::EtrChoice::kAuto    ? "auto"
                   : routing.etr_choice == Routing::EtrChoice::kToken ? "token"
                                                                      : "both";
  out.etr_quota = routing.etr_quota == Routing::EtrQuota::kGlobal ? "global" : "local";
  out.etr_switch_on = routing.etr_switch_on;
  out.etr_switch_off = routing.etr_switch_off;
  out.etr_switch_decay = routing.etr_switch_decay;
  return out;
}

std::unique_ptr<SelectionPolicy> make_policy(const PolicyOptions& options) {
  const std::string_view name = kPolicies[one_of("selection policy", options.name, kPolicies)];
  const bool swapping = name == "bounded_regret";
  const std::string_view router =
      swapping ? kRegretBases[one_of("router under bounded_regret", options.regret_base, kRegretBases)]
               : name;
  RegretOptions regret;
  if (swapping) {
    Require(options.regret_epsilon >= 0, ErrorCode::kInvalidConfig,
            "policy bounded_regret: regret_epsilon is ", options.regret_epsilon, "; it must not be negative");
    regret = {options.regret_epsilon,
              one_of("scope of bounded_regret", options.regret_scope, kRegretScopes) == 1
                  ? RegretScope::kRank
                  : RegretScope::kNode};
  }
  const auto refuse = [&](std::string_view key, double value) {
    Require(value == 0, ErrorCode::kInvalidConfig, "policy ", router, " has no ", key,
            " but its coefficient is ", value, "; set it to 0, or use softmax_topk");
  };
  if (router == "relu" || router == "sigmoid_topk") refuse("aux_loss", options.aux_loss);
  if (router != "softmax_topk") refuse("z_loss", options.z_loss);
  if (router != "softmax_topk" && router != "etr") refuse("locality_loss", options.locality_loss);

  if (router == "softmax_topk")
    return std::make_unique<SoftmaxTopKPolicy>(
        SoftmaxTopKOptions{.top_k = options.top_k,
                           .order = options.pre_softmax ? SoftmaxOrder::kPre : SoftmaxOrder::kPost,
                           .renormalize = options.renormalize,
                           .route_scale = options.route_scale,
                           .aux_loss = options.aux_loss,
                           .z_loss = options.z_loss,
                           .name = std::string(name),
                           .regret = regret,
                           .locality_loss = options.locality_loss,
                           .locality_epsilon = options.locality_epsilon,
                           .locality = options.locality});
  if (router == "sigmoid_topk" || router == "node_limited") {
    std::int32_t num_groups = 1;
    if (router == "node_limited") {
      num_groups = options.num_groups;
      Require(num_groups >= 0, ErrorCode::kInvalidConfig, "policy ", name, ": num_groups is ", num_groups,
              "; it must be at least 1, or 0 for one a node");
      Require(num_groups > 0 || options.locality, ErrorCode::kInvalidConfig, "policy ", name,
              ": num_groups is 0, one a node, but it was not told where experts live");
      if (num_groups == 0) num_groups = options.locality->num_nodes;
    }
    return std::make_unique<SigmoidTopKPolicy>(
        SigmoidTopKOptions{.top_k = options.top_k,
                           .renormalize = options.renormalize,
                           .route_scale = options.route_scale,
                           .num_groups = num_groups,
                           .top_groups = router == "node_limited" ? options.top_groups : 1,
                           .bias_update = options.bias_update,
                           .aux_loss = options.aux_loss,
                           .name = std::string(name),
                           .regret = regret,
                           .locality = options.locality});
  }
  if (router == "moepp") {
    Require(options.locality != nullptr, ErrorCode::kInvalidConfig,
            "policy moepp: it was not told the kinds of the experts");
    return std::make_unique<MoeppPolicy>(MoeppOptions{.top_k = options.top_k,
                                                      .kinds = options.locality->kind,
                                                      .tau = options.moepp_tau,
                                                      .capacity_factor = options.capacity_factor,
                                                      .aux_loss = options.aux_loss});
  }
  if (router == "etr") {
    constexpr std::array<EtrChoice, 3> kChoices = {EtrChoice::kAuto, EtrChoice::kToken, EtrChoice::kBoth};
    return std::make_unique<EtrPolicy>(
        EtrOptions{.top_k = options.top_k,
                   .tau = options.etr_tau,
                   .temperature = options.etr_temperature,
                   .renormalize = options.renormalize,
                   .route_scale = options.route_scale,
                   .capacity_factor = options.capacity_factor,
                   .delta_max = options.etr_delta_max,
                   .hidden = options.hidden,
                   .choice = kChoices[one_of("choice of policy etr", options.etr_choice, kEtrChoices)],
                   .local_quota = one_of("quota of policy etr", options.etr_quota, kEtrQuotas) == 1,
                   .switch_on = options.etr_switch_on,
                   .switch_off = options.etr_switch_off,
                   .switch_decay = options.etr_switch_decay,
                   .aux_loss = options.aux_loss,
                   .locality_loss = options.locality_loss,
                   .locality_epsilon = options.locality_epsilon,
                   .locality = options.locality});
  }
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
