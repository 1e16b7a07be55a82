// Makes a selection policy from plain options, as a configuration file has them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "sluice/scheduler/selection.hpp"

namespace sluice {

// Options that a policy does not name are not read by it.
struct PolicyOptions {
  std::string name = "relu";    // one of policy_names()
  std::int32_t top_k = 1;       // experts a token: chosen, or (relu) aimed at in the mean
  std::int32_t num_layers = 1;  // relu: layers that share lambda

  // relu
  std::string relu_variant = "paper";  // "paper" or "official"
  bool relu_load_balanced = true;
  double relu_lambda0 = 1e-8;
  double relu_alpha = 1.2;

  // softmax_topk
  std::string softmax_order = "pre";  // "pre" (softmax over all, then select) or "post"
  bool softmax_renormalise = false;   // with "pre"
  double aux_loss_coeff = 0;
  double z_loss_coeff = 0;

  // sigmoid_topk
  bool sigmoid_renormalise = true;

  // softmax_topk and sigmoid_topk
  double route_scale = 1;
};

// "relu", "sigmoid_topk", "softmax_topk"
std::span<const std::string_view> policy_names();

// Throws kInvalidConfig: an unknown name (with the list, and the nearest name), or an option out of range.
std::unique_ptr<SelectionPolicy> make_policy(const PolicyOptions& options);

}  // namespace sluice
