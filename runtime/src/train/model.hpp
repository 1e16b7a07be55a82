// The model of `sluice train`: a neural n-gram over bytes (after Bengio et al. 2003), its middle made of residual
// Mixture-of-Experts blocks. Forward and backward of one step on one rank's tokens, and AdamW.
//
//   x   = W_p [ embedding of each of the last `context` bytes, oldest first ]
//   x  += MoE_l(n),  n = rms_norm_l(x),  scores of the policy z_l = W_l n        for each layer l
//         z_l = W_l n + R_l z_(l-1) from the second layer on with model.gate_residual; affinities of n with etr
//         or a chain of such, with a shared expert or without (chain_layer.hpp)
//   p   = softmax(W_o rms_norm(x));   loss = mean over the tokens of ALL ranks of -ln p(next byte) + auxiliary losses
//   rms_norm(x) = g * x / sqrt(mean(x^2) + 1e-6)                                 (Zhang & Sennrich 2019)
//
// Everything but the experts is replicated; each rank computes it for its own tokens, and its gradients are summed over
// ranks as one flat buffer. Experts live where the placement says; their gradients are complete at their owner.
// dtypes: the residual stream x, all replicated parameters and all masters, gradients and moments are f32. Rows that
// experts see (n) and expert weights have model.dtype.
//
// The same bits for equal topology and placement over transports, schedules and threads: every sum has a fixed order.
// Over world sizes results differ by rounding only: initial values depend on (seed, parameter, expert), tokens on
// (seed, step); gradients add up in another order.
// The gradient norm adds squares within a parameter in order, then over logical experts ascending: it does not depend on
// where experts live but through the gradients themselves.
//
// Ownership: owns parameters, gradients and moments; the Runtime must outlive it. A Batch is read during the call only.
// Thread-safety: that of the Runtime. Calls marked collective block with its deadline.
// Steady state: compute_gradients() and update() allocate nothing once routes have reached their high-water mark, as far
// as this file goes.
// Errors: kInvalidConfig; group errors of runtime.hpp.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/base/grow_array.hpp"
#include "sluice/chain_layer.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/runtime.hpp"
#include "sluice/scheduler/selection.hpp"

namespace sluice::train {

struct ParameterShape {
  std::string name;          // "embedding", "layer.0.gate", "layer.0.gate.1", "layer.1.expert.7.w1"
  std::int32_t layer = -1;   // -1: of no layer
  std::int32_t expert = -1;  // logical expert; -1: replicated on all ranks
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  double scale = 0;  // initial values are uniform with this standard deviation; 0: all are 1 (a norm's gain)
  bool decayed() const { return scale != 0; }  // by weight decay
  std::int64_t size() const { return rows * cols; }
};
// Replicated parameters, in the order of the flat buffer: embedding [256, embed], projection [hidden, context * embed],
// each layer's gates [num_experts, hidden] (none with etr), gate residual [num_experts, num_experts], constant experts' w
// [2, hidden] and v [1, hidden], and shared expert, head [256, hidden], then the gains [1, hidden]: one a
// layer, and the last.
std::vector<ParameterShape> replicated_shapes(const Config& config);
std::int32_t num_gates(const Config& config);  // trained ones of a layer
bool has_gate_residual(const Config& config, std::int32_t layer);
// Name of the gate of one iteration.
std::string gate_name(const Config::Model& model, std::int32_t layer, std::int32_t iteration);
// w1 [2*ffn or ffn, hidden] and w2 [hidden, ffn] of one expert with weights, or of a layer's shared one (expert -1).
std::array<ParameterShape, 2> expert_shapes(const Config::Model& model, std::int32_t layer,
                                            std::int32_t expert);
// A function of seed, name and place in the array alone. value: f32 [rows, cols]
void initialize(const ParameterShape& shape, std::int64_t seed, std::span<float> value);

// One parameter, or one expert's matrix, that this rank holds.
struct Parameter {
  ParameterShape shape;
  bool owned = true;                // false: a replica, the expert's lowest copy is elsewhere
  std::span<float> value = {};      // f32 [rows, cols], the master
  std::span<float> gradient = {};   // f32 [rows, cols]
  std::span<float> m = {}, v = {};  // f32 [rows, cols], AdamW's moments
};

// Tokens of this rank in one step.
struct Batch {
  std::span<const std::int32_t> context;  // int32 [num_tokens, model.context], bytes, oldest first
  std::span<const std::int32_t> target;   // int32 [num_tokens]
  std::int64_t num_global_tokens = 0;     // over all ranks
  std::int64_t num_tokens() const { return static_cast<std::int64_t>(target.size()); }
};

// One step over all ranks; equal on all of them.
struct StepResult {
  double loss = 0;         // nats per token, without auxiliary losses; not finite: the step is void
  double auxiliary = 0;    // auxiliary losses
  double grad_norm = 0;    // over all parameters, before clipping
  double mean_active = 0;  // experts per token and iteration, mean over tokens, layers and iterations
  std::int32_t min_active = 0;
  std::int32_t max_active = 0;
  double expert_balance = 0;  // mean/max of the tokens of an expert with weights, mean over layers; 1: even
  double rank_balance = 0;    // mean/max of the routes that a rank works on, mean over layers
  // The policy's figures(), in their order: means over tokens or routes of all layers and iterations.
  std::vector<double> figures;
};

// Rows that this rank's tokens and gateways moved, and the bytes of all four directions (rows of x and dy out, of y and
// dx home, and a route's gradient home).
struct Movement {
  Traffic rows;
  std::int64_t in_node_bytes = 0;
  std::int64_t across_nodes_bytes = 0;
  std::int64_t flat_in_node_bytes = 0;
  std::int64_t flat_across_nodes_bytes = 0;
  // What this rank's links carry one way, the busier way; rows only.
  std::int64_t in_node_link_bytes = 0;
  std::int64_t across_nodes_link_bytes = 0;

  Movement& operator+=(const Movement& other) {
    rows += other.rows;
    in_node_bytes += other.in_node_bytes;
    across_nodes_bytes += other.across_nodes_bytes;
    flat_in_node_bytes += other.flat_in_node_bytes;
    flat_across_nodes_bytes += other.flat_across_nodes_bytes;
    in_node_link_bytes += other.in_node_link_bytes;
    across_nodes_link_bytes += other.across_nodes_link_bytes;
    return *this;
  }
};

class Model {
 public:
  // Collective through its layers. All ranks pass the same configuration.
  Model(Runtime& runtime, const Config& config);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Collective. Gradients of the batch into Parameter::gradient (overwritten), summed over ranks. When the loss is not
  // finite, on every rank alike, gradients are meaningless.
  StepResult compute_gradients(const Batch& batch);

  // Collective. AdamW with the gradients scaled to at most `clip` in norm (0: never); then adapts the policy from the
  // batch. `grad_norm` as compute_gradients() returned it.
  void update(const kernels::AdamW& options, double clip, double grad_norm);

  // Collective. Sum of -ln p over this rank's tokens; nothing is kept.
  double evaluate(const Batch& batch);

  // Makes layers of another schedule over the same weights, for swap_schedules(): from then on the other layers serve. The
  // bits stay the same.
  void add_schedule(const ScheduleOptions& schedule, std::int32_t chain_chunks);
  void swap_schedules();

  const std::vector<Parameter>& parameters() const { return parameters_; }
  // Of the first layer; others differ only in where experts are.
  const SelectionPolicy& policy() const { return *policies_.front(); }
  // Adaptive state of the policy for one iteration of one layer (shared: the same for all).
  const AdaptiveState& adaptive(std::int32_t layer, std::int32_t iteration = 0) const;
  // All of it, in the order of a checkpoint.
  const std::vector<AdaptiveState>& adaptive_states() const { return adaptive_; }
  // After the values and moments of all parameters() were overwritten, as from a checkpoint: takes the adaptive state with
  // them. Throws kInvalidArgument when it is not that of this policy.
  void restored(std::vector<AdaptiveState> adaptive);
  // Scores of this rank's tokens in the last batch of compute_gradients(). f32 [num_tokens, num_experts]
  std::span<const float> scores(std::int32_t layer, std::int32_t iteration = 0) const;
  // Of this rank's tokens in the last batch of compute_gradients(). Throws kNotSupported where the chain cuts it in chunks.
  RoutingView routing(std::int32_t layer, std::int32_t iteration = 0) const;
  // Of the last batch of compute_gradients(), over its layers.
  const Movement& movement() const { return movement_; }

  // Parameters, gradients, moments and activations of this rank, without the layers.
  std::int64_t parameter_bytes() const;
  std::int64_t activation_bytes() const;
  std::int64_t layer_bytes() const;  // contexts, plans and scratch of all layers

 private:
  // A growing matrix of one dtype.
  struct Rows {
    GrowArray<std::byte> memory;
    DType dtype = DType::kF32;
    std::int64_t rows = 0, cols = 0;
    MatrixView resize(std::int64_t num_rows, std::int64_t num_cols, DType type);
    MatrixView view() { return {memory.data(), dtype, rows, cols, cols}; }
    ConstMatrixView view() const { return {memory.data(), dtype, rows, cols, cols}; }
    float* f32() { return reinterpret_cast<float*>(memory.data()); }
    const float* f32() const { return reinterpret_cast<const float*>(memory.data()); }
  };
  struct Norm {
    Rows normalized;           // dtype [n, hidden], what follows sees
    GrowArray<float> inverse;  // f32 [n], 1 / sqrt(mean(x^2) + eps)
  };
  struct Layer {
    std::unique_ptr<ChainLayer> moe, other;  // other: of the schedule not in use, or null
    // In parameters_: gates one after the other, w1 and w2 of the shared expert.
    std::size_t gate = 0, gain = 0, shared = 0, residual = 0, constant = 0;
    Rows x;  // f32 [n, hidden], input of the block
    Norm norm;
    Rows y;  // dtype [n, hidden], what the experts give
    ChainContext context;
    std::int64_t num_positions = 0;  // routes that this rank worked on in the last batch
  };

  void allocate_parameters();
  void set_weights();
  ConstMatrixView weight(std::size_t parameter) const;
  // out = a W^T; a: [n, cols of W], out: [n, rows of W]
  void multiply(std::size_t parameter, ConstMatrixView a, MatrixView out);
  // da = dc W;  dW += dc^T a
  void multiply_backward_input(std::size_t parameter, ConstMatrixView dc, MatrixView da);
  void multiply_backward_weight(std::size_t parameter, ConstMatrixView dc, ConstMatrixView a);
  void norm_forward(std::size_t gain, const Rows& x, Norm& norm, DType dtype);
  void norm_backward(std::size_t gain, const Rows& x, const Norm& norm, const Rows& dnormalized, Rows& dx);

  std::span<const AdaptiveState> adaptive_of(std::size_t layer) const;
  // x through all blocks. Returns the sum of -ln p of this rank's tokens; NaN if scores were not finite.
  double forward(const Batch& batch, bool training);
  void backward(const Batch& batch);
  void count_movement(Layer& layer);
  void count_movement(const Plan& plan);
  void add_figures(StepResult& result) const;
  void finish_step(StepResult& result);

  Runtime& runtime_;
  kernels::Kernels& kernels_;
  const Config config_;
  const std::int64_t hidden_, num_experts_;
  const DType dtype_;
  DType wire_dtype_ = DType::kF32, combine_dtype_ = DType::kF32;
  std::vector<std::unique_ptr<SelectionPolicy>> policies_;  // [num_layers]
  std::vector<AdaptiveState> adaptive_;                     // one, or [num_layers][chain_iterations]

  std::vector<Parameter> parameters_;
  std::size_t embedding_ = 0, projection_ = 0, head_ = 0, final_gain_ = 0;
  std::int64_t num_replicated_ = 0;              // values of replicated parameters, which come first
  GrowArray<float> values_, gradients_, m_, v_;  // all parameters of this rank, one after the other
  GrowArray<std::byte> copies_;                  // expert weights in dtype, where that is not f32
  std::size_t first_expert_ = 0;                 // in parameters_; w1, w2 by layer, slot

  std::vector<Layer> layers_;
  Rows embedded_;  // f32 [n, context * embed]
  Rows x_;         // f32 [n, hidden], the residual stream; in backward its gradient
  Rows final_x_;   // f32 [n, hidden]
  Norm final_norm_;
  Rows logits_;               // f32 [n, 256]; in backward their gradient
  Rows dnormalized_;          // f32 [n, hidden]
  Rows dscores_[2];           // f32 [n, num_experts], of gate residuals, by the parity of the layer
  Rows drows_;                // dtype [n, hidden], dy of a block in dtype
  Rows dembedded_;            // f32 [n, context * embed]
  std::vector<double> sums_;  // what is summed over ranks once a step
  std::vector<const PolicyState*> batch_states_;  // [num_layers][chain_iterations]
  Movement movement_;
};

}  // namespace sluice::train
