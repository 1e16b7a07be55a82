// Selection policies: router scores (and topology) in, routing out; and back: gradient of the weights in, gradient of
// the scores out.
//
// A policy is a pure state machine. It does no I/O: step() either asks the runtime for an exchange among ranks and is
// called again with the result, or it is done. Token-local policies are done at the first step. Formulas cite their
// source at the policy's own header. Ties: the higher score, then the lower expert id.
//
// Thread-safety: a policy object is immutable after construction and may be shared; all state of a batch is in the
// PolicyState. Errors: non-finite scores throw kInvalidRouting naming token and expert.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "sluice/scheduler/routing.hpp"

namespace sluice {

// Scores of one rank's tokens. f32 [num_tokens, num_experts], row-major
struct Scores {
  std::span<const float> logits;
  std::int64_t num_tokens = 0;
  std::int32_t num_experts = 0;
};

// What a policy may ask the runtime for.
enum class ExchangeKind : std::uint8_t {
  kNone,
  kSumAcrossRanks,  // element-wise sum over all ranks, ranks ascending, of `buffer`; result in place
  kAllGather,       // concatenation over ranks; result in `gathered`
};

// Carried along the steps of one batch, and adaptive state carried from one training step to the next.
struct PolicyState {
  int step = 0;
  ExchangeKind exchange = ExchangeKind::kNone;
  std::vector<double> buffer;    // f64, what to exchange; holds the result for kSumAcrossRanks
  std::vector<double> gathered;  // f64 [num_ranks * buffer.size()], for kAllGather

  Routing routing;               // valid once done
  std::vector<float> saved;      // what backward needs (policy's own layout)
  std::vector<double> statistics;  // policy's own; global values once its exchanges are done

  // Auxiliary loss of this batch (already multiplied by its coefficients), this rank's share.
  double auxiliary_loss = 0;
};

// State that a policy adapts between training steps (ReLU routing's lambda, a bias per expert). Part of a checkpoint.
struct AdaptiveState {
  std::vector<double> values;
};

class SelectionPolicy {
 public:
  virtual ~SelectionPolicy() = default;
  virtual std::string_view name() const = 0;

  // The adaptive state before the first training step.
  virtual AdaptiveState initial_adaptive_state() const { return {}; }

  // Advances one batch. Returns true when done: state.routing is set. When false, the runtime performs
  // state.exchange on state.buffer and calls again. `training` turns auxiliary statistics on.
  virtual bool step(const Scores& scores, const AdaptiveState& adaptive, bool training, PolicyState& state) const = 0;

  // dlogits = d(loss)/d(logits), the auxiliary losses' gradients included.
  // dweight: f32 [num_routes] in the order of state.routing; dlogits: f32 [num_tokens, num_experts], overwritten
  virtual void backward(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                        std::span<const float> dweight, std::span<float> dlogits) const = 0;

  // After an optimizer step: adapt from the global statistics of the batch (equal on all ranks).
  virtual void adapt(const PolicyState& state, AdaptiveState& adaptive) const { (void)state, (void)adaptive; }
};

}  // namespace sluice
