// A Mixture-of-Experts layer applied C times to the same tokens, its experts shared by all iterations: Chain-of-Experts
// (Wang et al., arXiv 2506.18945; code ZihanWang314/CoE d2af562).
//
//   x(0) = x;  for t = 1..C:  x(t) = sum_e g_te E_e(x(t-1)) + S(x(t-1)) + I x(t-1)
//   y = x(C)                    residual kNone (I = 0) and kInner (I = 1)
//   y = x(C) + x(0)             residual kOuter (I = 0)
//   g_t = policy(W_t x(t-1))    a gate W_t for each iteration, or one for all; or policy(affinities of x(t-1)) without a
//                               trained gate (kernels/grap.hpp)
//   with C = 1 the scores may add W_g z', z' the token's scores at the layer before (MoE++'s pathway-aware router)
//   S   a dense ffn that every token visits in every iteration, or none (several shared experts are one ffn of their
//       widths together)
// Backward, D(C) = dy:  D(t-1) = I D(t) + J_MoE,t^T D(t) + J_S^T D(t) + W_t^T dz_t, z_t the scores; kOuter adds dy to D(0).
// Experts, S and a shared gate gather gradients over all iterations, t = C first. Auxiliary losses are one an iteration.
// With C = 1, no residual and no S, y and all gradients are those of MoeLayer under the same gate, bit for bit.
//
// Budget: the paper gives each iteration K/C experts of a plain layer's K, so that expert calls stay K a token. The
// policy is the caller's, so its top_k is what ONE iteration may use. It does not renormalize the chosen scores.
//
// Chunks. Rounds are strictly serial for a token, so they overlap over tokens only: the batch is cut into chunks, and
// iteration t+1 of one is gated, planned and under way while another is still in iteration t. Each (iteration, chunk)
// has its own plan and context. A policy that is not token_local() needs all tokens at once: it makes every round a
// barrier, so the batch is one chunk. Ranks agree on min(num_chunks, most tokens of a rank) chunks at each forward;
// a rank's chunk may be empty. Collective calls go by iteration, then chunk, on every rank.
// Results do not depend on the number of chunks, bit for bit: y and dx are sums of a token alone, and gradients add up in
// an order of their own (iteration, source rank, token). One exception: with replicated experts each chunk chooses among
// the copies anew, so sums meet on other ranks and differ by rounding.
//
// dtypes: x(t) has the layer's dtype; sums within an iteration are f32, rounded once. D(t) is f32 throughout; what
// experts see of it is rounded to the layer's dtype.
//
// Ownership: weights, gradients, x, y, adaptive states and the policy are the caller's. x and the adaptive states stay
// untouched from forward to backward. The ranks' gradients of gates and S are of their own tokens: the caller adds them
// up over ranks, as of any replicated parameter.
// Memory: contexts of all C * chunks until backward has passed them; C - 1 states, C score matrices. After a warm-up
// nothing is allocated.
// Thread-safety: that of the Runtime. forward, settle, backward and sync_replica_gradients block, with its deadline.
// Errors: as MoeLayer's; kInvalidConfig of the policy. A score that is not finite does not throw, since other ranks
// could not know: the token goes on with scores of zero, its y is NaN, and all_finite() says so.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "sluice/moe_layer.hpp"
#include "sluice/scheduler/selection.hpp"

namespace sluice {

enum class ChainResidual : std::uint8_t { kNone, kInner, kOuter };

// Where scores come from.
enum class GateKind : std::uint8_t { kLinear, kGrap };

struct ChainLayerOptions {
  MoeLayerOptions layer;
  GateKind gate = GateKind::kLinear;
  std::int32_t num_iterations = 1;  // C
  ChainResidual residual = ChainResidual::kNone;
  bool shared_gate = false;     // one gate for all iterations; the paper finds it markedly worse
  std::int64_t shared_ffn = 0;  // inner width of S; 0: none
  std::int32_t num_chunks = 1;  // at most; changes no result
};

// A gate and where its gradient accumulates. Caller-owned.
struct GateWeights {
  ConstMatrixView w;      // f32 or bf16 [num_experts, hidden], contiguous
  float* grad = nullptr;  // f32 [num_experts, hidden], accumulated into; null: no backward
};

// Gradients of scores, in backward of a layer whose scores go on to the next, or came from the one before. f32 [num_tokens,
// num_experts] each
struct ScoreGradients {
  ConstMatrixView of_scores =
      {};  // what the next layer wants of these scores, added to the policy's; or nothing
  MatrixView of_previous = {};  // overwritten; needed when forward had previous scores
};

struct ChainStorage;
class ChainLayer;

// What lies between a forward and its backward. Move-only. The order of releasing contexts is the same on all ranks, as
// for Context.
class ChainContext {
 public:
  ChainContext() = default;
  ChainContext(ChainContext&&) noexcept;
  ChainContext& operator=(ChainContext&&) noexcept;
  ~ChainContext();

  bool valid() const { return storage_ != nullptr; }
  std::int32_t num_chunks() const;
  // As long as the context lives, in training. t: 0 .. C-1; chunk: 0 .. num_chunks()-1
  const Plan& plan(std::int32_t t, std::int32_t chunk) const;
  // f32 [num_tokens, num_experts]
  std::span<const float> scores(std::int32_t t) const;
  bool all_finite() const;  // of this rank's scores

  // In training, once settled. Its statistics are of the whole iteration over all ranks; its routing is of one chunk.
  const PolicyState& policy_state(std::int32_t t) const;
  double auxiliary_loss() const;  // this rank's share, over all iterations

 private:
  friend class ChainLayer;
  void release() noexcept;
  ChainStorage* storage_ = nullptr;
  std::shared_ptr<void> pool_;
};

class ChainLayer {
 public:
  // Every rank passes the same placement, options and policy; the first forward() compares them. The policy must
  // outlive the layer.
  ChainLayer(Runtime& runtime, Placement placement, const ChainLayerOptions& options,
             const SelectionPolicy& policy);
  ~ChainLayer();
  ChainLayer(const ChainLayer&) = delete;
  ChainLayer& operator=(const ChainLayer&) = delete;

  const ChainLayerOptions& options() const;
  const Placement& placement() const;

  // As MoeLayer::set_weights: one for each local slot.
  void set_weights(std::span<const ExpertWeights> slots);
  void set_constant_experts(std::span<const ConstantExpertWeights> experts);
  // C gates, or one when it is shared; none with GateKind::kGrap.
  void set_gates(std::span<const GateWeights> gates);
  // W_g: f32 or bf16 [num_experts, num_experts]. Needed where forward gets previous scores.
  void set_gate_residual(const GateWeights& residual);
  // S. w1: f32 or bf16 [2*shared_ffn or shared_ffn, hidden]; w2: [hidden, shared_ffn]; both contiguous
  void set_shared_expert(const ExpertWeights& weights);

  // Collective. x, y: dtype [num_tokens, hidden], not overlapping; y is overwritten. num_tokens may differ by rank.
  // adaptive: the policy's state, one for all iterations or C of them. training: backward will follow.
  // previous: f32 [num_tokens, num_experts], the tokens' scores at the layer before, untouched until backward; or nothing
  // (C = 1 only).
  ChainContext forward(ConstMatrixView x, MatrixView y, std::span<const AdaptiveState> adaptive,
                       bool training, ConstMatrixView previous = {});

  // What the policy's statistics and auxiliary losses want summed over ranks (element-wise, f64), in place, before
  // settle(); so that the sums of several layers can travel as one. Empty when nothing is wanted.
  std::span<double> pending_sums(ChainContext& context) const;
  // Takes the sums. Collective for policies that want more exchanges after them; none of the project's does.
  void settle(ChainContext& context);

  // Collective. dy: dtype [num_tokens, hidden]; dx: f32 or dtype [num_tokens, hidden], overwritten, not overlapping dy.
  // Gradients of experts, gates and S accumulate. Sums over ranks and settles first if the caller did not.
  void backward(ChainContext& context, ConstMatrixView dy, MatrixView dx, const ScoreGradients& scores = {});

  // Collective. As MoeLayer's.
  void sync_replica_gradients();

  // Bytes held at the high-water mark. MoeLayer's part, and states, scores and scratch of the chain.
  struct Memory {
    MoeLayer::Memory layer;
    std::int64_t chain = 0;
    std::int64_t total() const { return layer.total() + chain; }
  };
  Memory memory() const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace sluice
