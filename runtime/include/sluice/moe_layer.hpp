// One Mixture-of-Experts layer over the ranks of a Runtime: dispatch, grouped expert compute, combine, and the backward
// pass of all three.
//
//   Forward   y_t = sum over the routes (e, w) of token t of w * E_e(x_t); a token without routes gives exact zeros
//   Backward  dw_te = <dy_t, E_e(x_t)>;  dx_t = sum_e J_e(x_t)^T (w_te dy_t);  dW_e += over all tokens of all ranks
//   Expert    gated: E(x) = W2 (silu(W1 x) * (W3 x)), w1 = [W1; W3];  else E(x) = W2 act(W1 x)
//   everywhere: zero E(x) = 0, copy E(x) = x, constant E(x) = a1 x + a2 v with [a1, a2] = softmax(W_c x) (MoE++, arXiv
//           2410.07348 eqs 3-5); computed at home after the tree of docs/design.md, experts ascending
//
// On a device (RuntimeOptions::device) the experts are computed there; x, y, dy, dx, dw, weights and gradients stay host
// memory, and so does the exchange. Then set_weights() copies, and must be called again when values changed; gradients
// reach the caller's memory in sync_replica_gradients(). Results agree with the CPU's within rounding.
// Over transports nvlink and nccl rows travel from GPU to GPU instead: dtypes are all bf16, an expert has one slot, the
// slots of a rank are in ascending order of experts, start_forward() and start_backward() run the pass, the schedule is
// sequential or by-source (others run as sequential), and only the last forward can be followed by its backward.
//
// Usage, on every rank, in the same order:
//   MoeLayer layer(runtime, placement, options);
//   layer.set_weights(slots);
//   auto plan = layer.plan(routing);                 // collective
//   Context context = layer.forward(plan, x, y);     // collective
//   layer.backward(context, dy, dx, dw);             // collective
// Several contexts may be alive; each pins its plan. A plan may be used by several contexts.
// WRONG: creating or destroying contexts in different orders on different ranks - they share numbered channels; the
// next plan() says so (kDisagreement).
//
// Ownership: weights, gradients, x, y are the caller's. The layer keeps views of weights and gradients; forward and
// backward return when they are done with x, y, dy, dx, dw (x must stay until backward where
// there are copy or constant experts).
// Thread-safety: that of the Runtime. plan, forward, backward and sync_replica_gradients block, with its deadline.
// Errors: kInvalidArgument for shapes and dtypes, kInvalidRouting, kInvalidState (backward twice, weights not set),
// kDisagreement and the group errors of runtime.hpp.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "sluice/base/dtype.hpp"
#include "sluice/base/tensor_view.hpp"
#include "sluice/runtime.hpp"
#include "sluice/scheduler/choose_schedule.hpp"
#include "sluice/scheduler/cost_model.hpp"
#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/plan.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

// What an ffn expert does between its two matrices.
enum class ExpertActivation : std::uint8_t { kSwiGLU, kGelu, kRelu };

// What a context keeps for backward.
enum class Save : std::uint8_t {
  kNone,         // nothing: forward only
  kRows,         // received rows; the pre-activation is computed again
  kActivations,  // received rows and the pre-activation
};

// When a backward adds to the weight gradients.
enum class WeightGradients : std::uint8_t {
  kNow,    // in the pass
  kLater,  // in add_weight_gradients(), for contexts whose order of summation is not that of their passes
};

struct MoeLayerOptions {
  std::int64_t hidden = 0;
  std::int64_t ffn = 0;
  ExpertActivation activation = ExpertActivation::kSwiGLU;
  DType dtype = DType::kF32;          // of x, y, dy, dx and expert weights
  DType wire_dtype = DType::kF32;     // rows are rounded to it before they are dispatched (own rows as well)
  DType combine_dtype = DType::kF32;  // sums are rounded to it at every edge of the reduction tree
  ScheduleOptions schedule;
  // Null: `schedule` as it is. Else the layer chooses policy and chunks plan by plan, by simulating the candidates on
  // the machine of this profile with the demand of the batch (choose_schedule.hpp); schedule.exchange stays. Equal on
  // all ranks (checked by plan()).
  std::shared_ptr<const MachineProfile> auto_profile;
  // kHierarchical between GPUs: the number of chunks is by that layer's own cost model, not schedule.num_chunks.
  bool chunks_by_gpu_model = false;
  Save save = Save::kActivations;
};

// Weights of one local slot, and where its gradients accumulate. Caller-owned.
struct ExpertWeights {
  ConstMatrixView w1;        // dtype [2*ffn or ffn, hidden], contiguous
  ConstMatrixView w2;        // dtype [hidden, ffn], contiguous
  float* grad_w1 = nullptr;  // f32 [2*ffn or ffn, hidden], accumulated into; null: no backward
  float* grad_w2 = nullptr;  // f32 [hidden, ffn]
};

// A constant expert, the same on all ranks; gradients are of this rank's tokens, so the caller adds them up over ranks.
// Caller-owned.
struct ConstantExpertWeights {
  ConstMatrixView w;        // f32 [2, hidden], contiguous: W_c
  ConstMatrixView v;        // f32 [1, hidden], contiguous
  float* grad_w = nullptr;  // f32 [2, hidden], accumulated into; null: no backward
  float* grad_v = nullptr;  // f32 [1, hidden]
};

// Bytes of buffers that one context of this plan holds on its rank: after forward, and at most, with backward. Exact for
// a fresh layer; buffers that were larger once keep their size. docs/memory.md explains the terms.
struct ContextBytes {
  std::int64_t forward = 0;
  std::int64_t peak = 0;
};
ContextBytes context_bytes(const Plan& plan, const MoeLayerOptions& options);

struct ContextStorage;
class MoeLayer;

// What lies between a forward and its backward. Move-only; destroying it in flight gives its buffers back.
class Context {
 public:
  Context() = default;
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;
  ~Context();

  bool valid() const { return storage_ != nullptr; }
  const Plan& plan() const { return *plan_; }

 private:
  friend class MoeLayer;
  friend class Dispatcher;
  void release() noexcept;
  std::shared_ptr<const Plan> plan_;
  ContextStorage* storage_ = nullptr;
  std::shared_ptr<void> pool_;  // owns the storage; outlives the layer if need be
  ConstMatrixView x_;           // for dw of copy and constant experts
  ConstMatrixView in_;          // of the pass in flight: x or dy
  MatrixView out_;              // y or dx
  std::span<float> dw_;
  bool backward_done_ = false;
  bool gradients_left_ = false;  // for add_weight_gradients()
};

class MoeLayer {
 public:
  // Collective only through its plans: every rank passes the same placement and options (checked by plan()).
  MoeLayer(Runtime& runtime, Placement placement, const MoeLayerOptions& options);
  ~MoeLayer();
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  const MoeLayerOptions& options() const;
  const Placement& placement() const;
  // Of the options' schedule, or of the last plan's with an auto_profile.
  const Template& exchange_template() const;
  // Why the last plan got its schedule; null without an auto_profile, or before the first plan.
  const ScheduleChoice* schedule_choice() const;

  // slots: one for each local slot, in local order. Views are kept until the next call.
  void set_weights(std::span<const ExpertWeights> slots);
  // One for each constant expert of the placement, ids ascending.
  void set_constant_experts(std::span<const ConstantExpertWeights> experts);

  // Collective. Builds the plan of one batch. routing: host CSR; read only during the call.
  std::shared_ptr<const Plan> plan(const RoutingView& routing);

  // Collective. x: dtype [num_tokens, hidden]; y: dtype [num_tokens, hidden], overwritten.
  Context forward(const std::shared_ptr<const Plan>& plan, ConstMatrixView x, MatrixView y);

  // Collective. dy: dtype [num_tokens, hidden]; dx: dtype [num_tokens, hidden], overwritten; dw: f32 [num_routes] in
  // the caller's route order, overwritten. Weight gradients accumulate. Ends the context's use; release it after.
  void backward(Context& context, ConstMatrixView dy, MatrixView dx, std::span<float> dw);

  // Collective. As forward and backward, but they return when the pass has begun; it goes on whenever this rank blocks in
  // a call of the group (plan, finish, collectives). Several may be in flight; all ranks start them in the same order.
  // in and out views stay valid and untouched until finish(); the layer outlives its passes.
  Context start_forward(const std::shared_ptr<const Plan>& plan, ConstMatrixView x, MatrixView y);
  void start_backward(Context& context, ConstMatrixView dy, MatrixView dx, std::span<float> dw,
                      WeightGradients when = WeightGradients::kNow);
  // Blocks until the context's pass is over.
  void finish(Context& context);
  // Blocks until this rank's experts are done with the context's pass; sums may still be on their way home.
  void finish_experts(Context& context);
  // Adds the weight gradients that the backward of these contexts left for later, once experts are done with it: by
  // source rank, then context, then token. That is the order, and so the bits, of one batch in which each rank's tokens
  // are those of its contexts one after the other. Not collective.
  void add_weight_gradients(std::span<Context> contexts);

  // Collective. Sums the gradients of replicated experts over their slots, ranks ascending, so that every copy holds
  // the same sum. Without replicas it returns at once, on a device after its gradients were added to the caller's.
  void sync_replica_gradients();

  // Bytes held at the high-water mark by this layer's contexts and plans, and by the rank's kernels as scratch; on a
  // device with its memory, weights and gradients there counted as contexts.
  struct Memory {
    std::int64_t contexts = 0, plans = 0, scratch = 0;
    std::int64_t total() const { return contexts + plans + scratch; }
  };
  Memory memory() const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace sluice
