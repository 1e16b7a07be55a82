#include "sluice/scheduler/selection/factory.hpp"

#include <algorithm>
#include <array>
#include <vector>

#include "sluice/scheduler/selection/relu.hpp"
#include "sluice/scheduler/selection/sigmoid_top_k.hpp"
#include "sluice/scheduler/selection/softmax_top_k.hpp"

namespace sluice {
namespace {

constexpr std::array<std::string_view, 3> kPolicies = {"relu", "sigmoid_topk", "softmax_topk"};
constexpr std::array<std::string_view, 2> kReluVariants = {"paper", "official"};
constexpr std::array<std::string_view, 2> kSoftmaxOrders = {"pre", "post"};

// Single-character edits from one word to the other (Levenshtein).
std::size_t edits(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({substituted, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

// Position of `value` in `allowed`; throws with the list and the nearest word.
std::size_t one_of(std::string_view what, std::string_view value, std::span<const std::string_view> allowed) {
  std::size_t nearest = 0;
  std::string list;
  for (std::size_t i = 0; i < allowed.size(); ++i) {
    if (allowed[i] == value) return i;
    if (edits(value, allowed[i]) < edits(value, allowed[nearest])) nearest = i;
    list += str(i == 0 ? "" : ", ", allowed[i]);
  }
  const std::size_t distance = edits(value, allowed[nearest]);
  const bool close = distance <= std::max<std::size_t>(2, allowed[nearest].size() / 2);
  throw Error(ErrorCode::kInvalidConfig,
              str("there is no ", what, " '", value, "'; it must be one of: ", list,
                  close ? str(" (did you mean '", allowed[nearest], "'?)") : std::string()));
}

}  // namespace

std::span<const std::string_view> policy_names() {
  return kPolicies;
}

std::unique_ptr<SelectionPolicy> make_policy(const PolicyOptions& options) {
  const std::string_view name = kPolicies[one_of("selection policy", options.name, kPolicies)];
  if (name == "relu") {
    const bool official = one_of("variant of policy relu", options.relu_variant, kReluVariants) == 1;
    return std::make_unique<ReluPolicy>(
        ReluOptions{.top_k = options.top_k,
                    .num_layers = options.num_layers,
                    .lambda0 = options.relu_lambda0,
                    .alpha = options.relu_alpha,
                    .load_balanced = options.relu_load_balanced,
                    .variant = official ? ReluVariant::kOfficial : ReluVariant::kPaper});
  }
  if (name == "softmax_topk") {
    const bool post = one_of("order of policy softmax_topk", options.softmax_order, kSoftmaxOrders) == 1;
    return std::make_unique<SoftmaxTopKPolicy>(
        SoftmaxTopKOptions{.top_k = options.top_k,
                           .order = post ? SoftmaxOrder::kPost : SoftmaxOrder::kPre,
                           .renormalise = options.softmax_renormalise,
                           .route_scale = options.route_scale,
                           .aux_loss_coeff = options.aux_loss_coeff,
                           .z_loss_coeff = options.z_loss_coeff});
  }
  return std::make_unique<SigmoidTopKPolicy>(SigmoidTopKOptions{.top_k = options.top_k,
                                                                .renormalise = options.sigmoid_renormalise,
                                                                .route_scale = options.route_scale});
}

}  // namespace sluice
