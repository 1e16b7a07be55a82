// Selection policies: router scores (and topology) in, routing out; and back: gradient of the weights in,
// gradient of the scores out.
//
// A policy is a pure state machine. It does no I/O: step() either asks the runtime for an exchange among ranks
// and is called again with the result, or it is done. Formulas cite their source at the policy's own header.
// Ties: the higher score, then the lower expert id.
//
// What T is. Losses are means over the tokens of ALL ranks in the batch: T is the global number of tokens, and
// counts per expert are global, both through the exchange. auxiliary_loss is this rank's share: the shares of all
// ranks add up to the loss of the batch. So a trainer divides its own loss by the global T too, and adds
// gradients over ranks without averaging; then results do not depend on how tokens are spread over ranks. (One
// exception, named there: the official variant of ReLU routing.)
//
// Thread-safety: a policy object is immutable after construction and may be shared; all state of a batch is in
// the PolicyState. Errors: non-finite scores throw kInvalidRouting naming token and expert; options that cannot
// work with these scores throw kInvalidConfig; calls out of order kInvalidState.
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
  // The tokens' home, for policies that look at where experts live: one for all, or one a token where not empty.
  std::int32_t rank = 0;
  std::span<const std::int32_t> rank_of_token = {};  // int32 [num_tokens], or empty

  std::int32_t rank_of(std::size_t token) const {
    return rank_of_token.empty() ? rank : rank_of_token[token];
  }
};

// What a policy may ask the runtime for.
enum class ExchangeKind : std::uint8_t {
  kNone,
  kSumAcrossRanks,  // element-wise sum over all ranks, ranks ascending, of `buffer`; result in place
  kAllGather,       // concatenation over ranks of `buffer`, as long on all of them; result in `gathered`
  // The first send_counts[0] values of `buffer` go to rank 0, the next send_counts[1] to rank 1, ...; in `gathered` come
  // receive_counts[0] values from rank 0, and so on. Both sides know both counts.
  kAllToAll,
};

// What a policy reports of a batch besides its counts.
struct PolicyFigure {
  std::string_view name;   // "regret"
  bool per_route = false;  // mean over routes; else over tokens
  std::string_view doc;    // one line for reports
};

// What a batch did. Over all ranks once done in training; of this rank alone otherwise.
struct BatchStatistics {
  std::int64_t num_tokens = 0;
  std::int64_t num_routes = 0;
  std::int32_t min_active = 0;  // least experts of any token; 0 without tokens
  std::int32_t max_active = 0;
  std::vector<std::int64_t> tokens_of_expert;    // int64 [num_experts]
  std::vector<std::int64_t> tokens_with_active;  // int64 [num_experts + 1], tokens with so many experts
  // Sums over tokens that the policy asked for; first those of its figures(), in their order.
  std::vector<double> sums;

  double mean_active() const {
    return num_tokens == 0 ? 0 : static_cast<double>(num_routes) / static_cast<double>(num_tokens);
  }
};

// Carried along the steps of one batch. May be used again for another batch after restart(); its memory is kept.
struct PolicyState {
  int step = 0;  // steps taken in this batch
  ExchangeKind exchange = ExchangeKind::kNone;
  std::vector<double> buffer;  // f64, what to exchange; holds the result for kSumAcrossRanks
  std::vector<double>
      gathered;  // f64 [num_ranks * buffer.size()] for kAllGather; [sum of receive_counts] for kAllToAll
  std::vector<std::int64_t> send_counts, receive_counts;  // int64 [num_ranks], for kAllToAll

  // The routing is final. It can be so before the policy is done: what is left then serves statistics and
  // backward only, so its exchange may wait until then, and those of several layers may travel as one.
  bool routing_ready = false;
  bool done = false;
  bool training = false;        // as given to step()
  std::int64_t num_tokens = 0;  // of the scores given to the first step()

  Routing routing;           // valid once routing_ready
  std::vector<float> saved;  // what backward needs (policy's own layout)
  BatchStatistics statistics;
  BatchStatistics own_statistics;  // of this rank alone, in training

  // Memory of a call in progress, kept so that steps allocate nothing once sizes have settled.
  mutable std::vector<double> scratch;
  std::vector<std::int32_t> indices;
  std::vector<double> kept;  // what later steps want of earlier exchanges

  // Auxiliary loss of this batch (already multiplied by its coefficients), this rank's share. Valid once done.
  double auxiliary_loss = 0;

  void restart() {
    step = 0;
    exchange = ExchangeKind::kNone;
    routing_ready = done = training = false;
    auxiliary_loss = 0;
  }
};

// State that a policy adapts between training steps (ReLU routing's lambda, a bias per expert). Part of a
// checkpoint.
struct AdaptiveState {
  std::vector<double> values;  // f64, the policy's own layout; empty when it has none
};

// Whose an AdaptiveState is.
enum class AdaptiveScope : std::uint8_t {
  kNone,      // there is nothing to adapt
  kShared,    // one for all layers: adapt() is called once a training step with the batches of all layers
  kPerLayer,  // one a layer: adapt() is called for each layer with its own batches
};

class SelectionPolicy {
 public:
  virtual ~SelectionPolicy() = default;
  virtual std::string_view name() const = 0;

  // What statistics.sums begins with.
  virtual std::span<const PolicyFigure> figures() const { return {}; }

  // Whether a token's routing depends on its own scores alone, and the rest on sums over all tokens. Then a batch may be
  // cut into parts with a state each: step() each part, add up their buffers (all kSumAcrossRanks, after the routing),
  // over ranks too, and give every part the sum; auxiliary losses of the parts add up.
  virtual bool token_local() const { return false; }

  virtual AdaptiveScope adaptive_scope() const { return AdaptiveScope::kNone; }
  // The adaptive state before the first training step. Throws kInvalidConfig if the options do not fit so many
  // experts.
  virtual AdaptiveState initial_adaptive_state(std::int32_t num_experts) const = 0;

  // Advances one batch. Returns true when done. When false, the runtime performs state.exchange on state.buffer
  // and calls again with the same arguments. `training`: losses and global statistics are wanted and backward
  // will follow; without it no policy of the project asks for an exchange.
  virtual bool step(const Scores& scores, const AdaptiveState& adaptive, bool training,
                    PolicyState& state) const = 0;

  // dlogits = d(loss)/d(logits), the auxiliary losses' gradients included. Arguments as given to step(), which
  // must be done, in training.
  // dweight: f32 [num_routes] in the order of state.routing
  // dlogits: f32 [num_tokens, num_experts], overwritten
  virtual void backward(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                        std::span<const float> dweight, std::span<float> dlogits) const = 0;

  // After an optimizer step: adapt from the global statistics (equal on all ranks) of the step's batches: of all
  // layers or of one, as adaptive_scope() says, and of all micro-batches.
  virtual void adapt(std::span<const PolicyState* const> batches, AdaptiveState& adaptive) const {
    (void)batches, (void)adaptive;
  }
};

}  // namespace sluice
