// Gates and dispatch plans on an NVIDIA GPU (any of compute capability 8.0 or newer): from router scores to a ragged
// routing, and from a routing to who gets which row, without the host seeing a count.
//
// Ownership: every pointer is device memory of the current device, owned by the caller, valid until the stream passed
// the call. No call allocates or synchronises; all can be captured in a CUDA graph and replayed on other values.
// Thread-safety: calls are independent; on one stream they run in order. Blocking: none.
// Errors: sizes, options and null pointers are checked on the host (kInvalidArgument, kInvalidConfig); what only the
// device can see goes to a status word. A failing launch gives kInternal.
// Results are deterministic: order comes from prefix sums, never from who was first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sluice/kernels/cuda/grouped_gemm.hpp"

namespace sluice::kernels::cuda {

inline constexpr int kMaxGateExperts = 1024;
inline constexpr int kMaxPlanExperts = 2048;
inline constexpr int kMaxPlanRanks = 64;

// Bits of a status word; calls only set them, the caller clears them.
inline constexpr std::uint32_t kStatusOverflow =
    1;  // more routes than fit: the routing was cut, results are of no use
inline constexpr std::uint32_t kStatusNonFinite = 2;  // a score was NaN or infinite

// Scores of one rank's tokens.  logits: f32 [num_tokens, num_experts], `stride` elements from row to row
struct GateScores {
  const float* logits = nullptr;
  std::int64_t stride = 0;
  std::int64_t num_tokens = 0;
  int num_experts = 0;  // <= kMaxGateExperts
};

// CSR routing, as scheduler/routing.hpp: experts ascend within a token.
struct RoutingBuffers {
  std::int64_t* row_ptr = nullptr;  // int64 [num_tokens + 1]
  std::int32_t* expert = nullptr;   // int32 [capacity]
  float* weight = nullptr;          // f32 [capacity]
  std::int64_t capacity = 0;        // routes that fit
  std::uint32_t* status = nullptr;  // uint32 [1], required
};
struct ConstRouting {
  const std::int64_t* row_ptr = nullptr;
  const std::int32_t* expert = nullptr;
  const float* weight = nullptr;
};

// What a batch did, overwritten; null where not wanted. Sparsity is 1 - row_ptr[num_tokens] / (tokens * experts).
struct GateCounts {
  std::int32_t* tokens_of_expert = nullptr;    // int32 [num_experts]
  std::int32_t* tokens_with_active = nullptr;  // int32 [num_experts + 1]: tokens with so many experts
};

// Softmax top-k: p = softmax(z); the top_k experts by z (ties: the lower id). Weight: route_scale * p_i, or with
// over_selected route_scale * softmax of z over the chosen ones. Formulas and losses: scheduler/selection/softmax_top_k.hpp.
struct SoftmaxGate {
  int top_k = 2;
  bool over_selected = false;
  float route_scale = 1;
};
void gate_softmax(const GateScores& scores, const SoftmaxGate& gate, const RoutingBuffers& routing,
                  const GateCounts& counts, Stream stream);
// dlogits (f32 [num_tokens, num_experts], `dlogits_stride`) is overwritten. dweight: f32 [routes].
// aux_gradient: f32 [num_experts], d(auxiliary loss)/d(p_te), or null; z_factor: z_loss / T (ST-MoE), or 0.
void gate_softmax_backward(const GateScores& scores, const SoftmaxGate& gate, const ConstRouting& routing,
                           const float* dweight, const float* aux_gradient, float z_factor, float* dlogits,
                           std::int64_t dlogits_stride, Stream stream);

// Sigmoid top-k, group-limited (DeepSeek-V3 report, section 2.1.2 and its inference code): s = sigmoid(z); a group's score
// is the sum of its two best s + bias (its only one, if it has one expert); of the top_groups best groups (ties: the
// lower) the top_k experts by s + bias (ties: the higher z, then the lower id) are chosen. Weights without bias:
// route_scale * s_i / sum s, or route_scale * s_i. num_groups 1: no limit. bias: f32 [num_experts] or null.
struct SigmoidGate {
  int top_k = 2;
  bool renormalize = true;
  float route_scale = 1;
  int num_groups = 1;  // divides num_experts, <= 32
  int top_groups = 1;  // top_groups * (num_experts / num_groups) >= top_k
};
void gate_sigmoid(const GateScores& scores, const SigmoidGate& gate, const float* bias,
                  const RoutingBuffers& routing, const GateCounts& counts, Stream stream);
void gate_sigmoid_backward(const GateScores& scores, const SigmoidGate& gate, const ConstRouting& routing,
                           const float* dweight, float* dlogits, std::int64_t dlogits_stride, Stream stream);

// ReLU (ReMoE, arXiv 2412.14711): weight max(z, 0), routed iff z > 0. scratch: gate_relu_scratch_bytes(), 8-byte aligned.
std::size_t gate_relu_scratch_bytes(std::int64_t num_tokens);
void gate_relu(const GateScores& scores, const RoutingBuffers& routing, const GateCounts& counts,
               void* scratch, Stream stream);
// dz_te = dweight_te + l1_gradient_e where the routing has (t, e), which is where z_te > 0, else 0; the scores themselves
// are not read. l1_gradient: f32 [num_experts] (lambda f_e / (L T)) or null.
void gate_relu_backward(const GateScores& scores, const ConstRouting& routing, const float* dweight,
                        const float* l1_gradient, float* dlogits, std::int64_t dlogits_stride, Stream stream);

// ---- plan ------------------------------------------------------------------------------------------------------------
// Where experts live.  rank_of: int32 [num_experts], -1: everywhere, never sent; slot_of: int32 [num_experts], place
// among its rank's experts
struct PlanPlacement {
  const std::int32_t* rank_of = nullptr;
  const std::int32_t* slot_of = nullptr;
  int num_experts = 0;  // <= kMaxPlanExperts
  int num_ranks = 1;    // <= kMaxPlanRanks
};

// One rank's plan. Null arrays are left out, except expert_ptr and rank_ptr.
// Positions: routes by expert, then token. Send rows: (token, rank) pairs, once each, by rank, then token.
// A receiver's plan over what it got is the same call: rows for tokens, local slots for experts, one rank.
struct PlanBuffers {
  std::int64_t* expert_ptr = nullptr;         // int64 [num_experts + 1]: group_ptr of the grouped GEMM
  std::int32_t* position_of_route = nullptr;  // int32 [routes]
  std::int32_t* row_of_position = nullptr;    // int32 [routes]: token
  float* weight_of_position = nullptr;        // f32 [routes]

  std::int64_t* rank_ptr = nullptr;        // int64 [num_ranks + 1]: send rows of each rank
  std::int64_t* rank_route_ptr = nullptr;  // int64 [num_ranks + 1]: routes sent to each rank
  std::int32_t* send_row = nullptr;        // int32 [send rows]: token
  std::int64_t* send_route_ptr = nullptr;  // int64 [send rows + 1]: routes of each send row
  std::int32_t* send_route = nullptr;      // int32 [routes sent]: own route, experts ascending within a row
  std::int32_t* send_slot = nullptr;       // int32 [routes sent]
  float* send_weight = nullptr;            // f32 [routes sent]
  std::int64_t* home_ptr = nullptr;        // int64 [num_tokens + 1]
  std::int32_t* home_position = nullptr;   // int32 [send rows]: a token's send rows, ranks ascending
};

std::size_t plan_scratch_bytes(std::int64_t num_tokens, int num_experts, int num_ranks);
// num_tokens bounds row_ptr; `scratch` holds plan_scratch_bytes() and is 16-byte aligned.
void build_plan(const ConstRouting& routing, std::int64_t num_tokens, const PlanPlacement& placement,
                const PlanBuffers& plan, void* scratch, Stream stream);

}  // namespace sluice::kernels::cuda
