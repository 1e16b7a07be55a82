// Routing: which experts each token visits, with what weight. A ragged list in CSR form; nothing assumes T x K.
//
// Meaning: y_t = sum over the routes (e, w) of token t of w * E_e(x_t); no routes, y_t = 0 exactly. A route of weight 0
// is still a route. Experts are ascending and unique within a token.
// Thread-safety: plain data.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/base/error.hpp"

namespace sluice {

// Views of caller-owned arrays.
struct RoutingView {
  std::int32_t num_experts = 0;
  std::span<const std::int64_t> row_ptr;  // int64 [num_tokens + 1], row_ptr[0] = 0, ascending
  std::span<const std::int32_t> expert;   // int32 [num_routes], ascending and unique within a token
  std::span<const float> weight;          // f32 [num_routes], finite

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(row_ptr.size()) - 1; }
  std::int64_t num_routes() const { return static_cast<std::int64_t>(expert.size()); }
};

struct Routing {
  std::int32_t num_experts = 0;
  std::vector<std::int64_t> row_ptr = {0};  // int64 [num_tokens + 1]
  std::vector<std::int32_t> expert;         // int32 [num_routes]
  std::vector<float> weight;                // f32 [num_routes]

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(row_ptr.size()) - 1; }
  std::int64_t num_routes() const { return static_cast<std::int64_t>(expert.size()); }
  operator RoutingView() const { return {num_experts, row_ptr, expert, weight}; }
};

// Throws kInvalidRouting naming the token and route at fault: sizes that do not fit, row_ptr not ascending, expert out
// of range, not ascending or twice in a token, weight not finite.
void validate(const RoutingView& routing);

// Counts per expert. int64 [num_experts]
std::vector<std::int64_t> expert_counts(const RoutingView& routing);

// An adapter's result: the routing, and for each route where the caller's array held it, so that per-route results
// (dw) go back to the caller's order.
struct AdaptedRouting {
  Routing routing;
  std::vector<std::int64_t> caller_index;  // int64 [num_routes], index into the flattened caller array
};

// From rectangular top-k: expert int32 [num_tokens, k] with -1 for "none", weight f32 [num_tokens, k].
// Experts of a token may come in any order; twice the same is an error.
AdaptedRouting routing_from_topk(std::span<const std::int32_t> expert, std::span<const float> weight,
                                 std::int64_t num_tokens, std::int64_t k, std::int32_t num_experts);

// From a dense map: a route wherever map is non-zero. map uint8 [num_tokens, num_experts], weight f32 likewise.
AdaptedRouting routing_from_multihot(std::span<const std::uint8_t> map, std::span<const float> weight,
                                     std::int64_t num_tokens, std::int32_t num_experts);

// caller[caller_index[i]] = per_route[i]; entries without a route become 0.
void scatter_to_caller(const AdaptedRouting& adapted, std::span<const float> per_route,
                       std::span<float> caller);

}  // namespace sluice
