// Makes a selection policy from plain options, as a configuration file has them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "sluice/base/config.hpp"
#include "sluice/scheduler/selection.hpp"
#include "sluice/scheduler/selection/locality.hpp"

namespace sluice {

// Names and defaults are those of the configuration's routing section.
struct PolicyOptions {
  std::string name = "relu";    // one of policy_names()
  std::int32_t top_k = 2;       // experts a token: chosen, or (relu) aimed at in the mean
  std::int32_t num_layers = 1;  // layers that share relu's lambda

  // softmax_topk and sigmoid_topk
  bool renormalize = true;
  double route_scale = 1;
  // softmax_topk
  bool pre_softmax = true;  // softmax over all experts, then select; else the other way round
  double aux_loss =
      0;  // also node_limited, moepp, etr; refused elsewhere, as every loss a policy does not have
  double z_loss = 0;
  // relu
  std::string relu_variant = "paper";  // or "official"
  bool relu_load_balanced = true;
  double relu_lambda0 = 1e-8;
  double relu_alpha = 1.2;
  // sigmoid_topk and node_limited
  double bias_update = 0.001;
  // node_limited
  std::int32_t num_groups = 0;  // 0: one a node
  std::int32_t top_groups = 1;
  // bounded_regret
  std::string regret_base = "softmax_topk";  // or "sigmoid_topk", "node_limited"
  double regret_epsilon = 0.05;
  std::string regret_scope = "rank";  // or "node"
  // softmax_topk and etr
  double locality_loss = 0;
  double locality_epsilon = 0.05;
  // moepp and etr
  double capacity_factor = 1.1;
  // moepp
  double moepp_tau = 0.75;
  // etr
  double etr_tau = 0;
  double etr_temperature = 1;
  double etr_delta_max = 0;
  std::string etr_choice = "auto";   // or "token", "both"
  std::string etr_quota = "global";  // or "local"
  double etr_switch_on = 1;
  double etr_switch_off = 1.25;
  double etr_switch_decay = 0.9;
  std::int64_t hidden = 0;

  // Where experts are; what needs it and has none is refused.
  std::shared_ptr<const Locality> locality;
};
// Without locality and hidden, which are not the routing's.
PolicyOptions policy_options(const Config::Routing& routing, std::int32_t num_layers);

// "bounded_regret", "etr", "moepp", "node_limited", "relu", "sigmoid_topk", "softmax_topk"
std::span<const std::string_view> policy_names();

// Throws kInvalidConfig: an unknown name (with the list, and the nearest name), or an option out of range.
std::unique_ptr<SelectionPolicy> make_policy(const PolicyOptions& options);

}  // namespace sluice
