// Makes a selection policy from plain options, as a configuration file has them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "sluice/base/config.hpp"
#include "sluice/scheduler/selection.hpp"

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
  double aux_loss = 0;      // the others have no such losses: a coefficient above 0 is refused there
  double z_loss = 0;
  // relu
  std::string relu_variant = "paper";  // or "official"
  bool relu_load_balanced = true;
  double relu_lambda0 = 1e-8;
  double relu_alpha = 1.2;
};
PolicyOptions policy_options(const Config::Routing& routing, std::int32_t num_layers);

// "relu", "sigmoid_topk", "softmax_topk"
std::span<const std::string_view> policy_names();

// Throws kInvalidConfig: an unknown name (with the list, and the nearest name), or an option out of range.
std::unique_ptr<SelectionPolicy> make_policy(const PolicyOptions& options);

}  // namespace sluice
