// The training job: steps of a Model on a Text over the ranks of a Runtime, what came of it, and its report.
//
// All calls are collective; every rank passes the same configuration and text (load_text()). train() blocks for the
// whole job. Results are those of rank 0; `losses` and what follows from them are equal on all ranks, what only rank 0
// knows is said at the member.
// Errors: kInvalidState on all ranks alike, naming the step, when loss or gradient are not finite; group errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"
#include "sluice/runtime/src/train/model.hpp"
#include "sluice/runtime/src/train/record.hpp"
#include "sluice/runtime/src/train/text.hpp"

namespace sluice::train {

// A rank that was lost on the way, and what the others did about it.
struct Recovery {
  std::int32_t lost_rank = -1;  // by the numbers of the group that lost it
  std::string phase;
  std::int32_t chunk = -1;
  std::string error;
  std::int32_t ranks_before = 0, ranks_after = 0;
};

struct TrainOptions {
  bool progress = true;  // progress lines on standard error, by rank 0
  // Go on from the newest checkpoint in train.checkpoint_dir, or from that of resume_step.
  bool resume = false;
  std::int64_t resume_step = 0;
  // Losses of ranks before this call, whose last this call goes on from: from the newest checkpoint that can be read,
  // or from the beginning when none was saved yet. For the report.
  std::vector<Recovery> recoveries = {};
  // Called on every rank after each step and its checkpoint; may throw.
  std::function<void(std::int64_t step)> after_step = {};
  std::vector<RecordRequest> record = {};
  std::int64_t record_steps =
      8;  // of training: the last so many, 0 all; of a text: so many batches spread over it
};

struct TrainReport {
  // Quality, bits per byte of the held-out tokens; the baselines on rank 0 only.
  double heldout_bpb = 0;
  Baselines baselines;
  std::int64_t num_heldout_tokens = 0;

  // One entry a step, those before the checkpoint that the job went on from included.
  std::vector<double> losses;       // nats per byte, mean over the step's tokens
  std::vector<double> auxiliary;    // auxiliary losses
  std::vector<double> grad_norms;   // before clipping
  std::vector<double> active_mean;  // experts per token, mean over tokens and layers
  std::vector<std::int32_t> active_min, active_max;
  std::vector<double> sparsity;        // 1 - active / num_experts
  std::vector<double> lambda;          // of ReLU routing, as used in the step; empty for other policies
  std::vector<double> expert_balance;  // mean / max of the tokens of an expert
  std::vector<double> rank_balance;    // mean / max of the routes a rank works on
  std::vector<double> learning_rates;
  std::string policy;
  // The policy's figures (selection.hpp): name, doc, one value a step.
  struct Figure {
    std::string name, doc;
    std::vector<double> values;
  };
  std::vector<Figure> figures;

  double seconds = 0;  // of the measured steps, without evaluation
  double tokens_per_s = 0;

  std::int64_t resumed_from = 0;  // step of the checkpoint that this run went on from; 0: from the beginning
  std::int64_t measured_steps = 0;  // steps of this run, which the following tells of
  std::vector<Recovery> recoveries;

  // Over the run and all ranks.
  Movement movement;
  Movement movement_at_end;  // of the last tenth of the steps
  std::int64_t steps_at_end = 0;
  std::map<std::string, double> phases_us;  // mean over steps and ranks; on rank 0 only
  // After the last step a few steps are timed as scheduled and sequentially, in turns, without the optimizer: medians of
  // the slowest rank. floor: the largest busy time of one resource, compute as measured, links as bytes over their
  // declared speed, else the time in puts. Efficiency = (sequential - scheduled) / (sequential - floor), absent unless
  // sequential exceeds the floor by 5% or more; overlap_note says why nothing was measured.
  struct Overlap {
    std::optional<double> efficiency;
    double scheduled_us = 0, sequential_us = 0;
    double compute_us = 0, in_node_us = 0, across_nodes_us = 0;
    std::string note;
    double floor_us() const { return std::max({compute_us, in_node_us, across_nodes_us}); }
  } overlap;

  // Largest of any rank, and the sum over ranks.
  struct Memory {
    std::int64_t parameters = 0, activations = 0, layers = 0;
    std::int64_t total() const { return parameters + activations + layers; }
  } memory_max, memory_sum;

  std::string text;  // where it came from
  std::int64_t text_bytes = 0, num_train_tokens = 0;
  std::int64_t seed = 0, steps = 0, tokens_per_step = 0, num_layers = 0;
  std::int32_t num_experts = 0, num_ranks = 0, num_nodes = 0;
  std::string topology, transport;
  bool emulated_links = false;
  std::uint64_t config_hash = 0;
};

TrainReport train(Runtime& runtime, const LoadedConfig& loaded, const Text& text,
                  const TrainOptions& options = {});

// Learning rate of a step, 1-based: linear warm-up, then a cosine down to its end.
double learning_rate(const Config::Train& train, std::int64_t step);
// AdamW of that step.
kernels::AdamW optimizer(const Config::Train& train, std::int64_t step);

// Fills the batches of one rank: tokens are dealt to ranks in contiguous parts, of a step's tokens as drawn or in order of
// their position (train.deal). Which tokens a step has depends on neither.
class BatchReader {
 public:
  BatchReader(const Text& text, const TextSplit& split, const Config& config, RankId rank,
              std::int32_t num_ranks);
  // The training batch of a step, 1-based. Valid until the next call of either.
  Batch train(std::int64_t step);
  // This rank's share of these tokens.
  Batch at(std::span<const std::int64_t> positions);

 private:
  Batch fill(std::int64_t num_global);
  const Text& text_;
  const TextSplit& split_;
  TokenOrder order_;
  std::int64_t context_, tokens_per_step_;
  bool by_position_;
  std::int32_t rank_, num_ranks_;
  std::vector<std::int64_t> position_;
  std::vector<std::int32_t> bytes_, target_;
};

// The document of docs/design.md, section `train`, as one JSON object.
std::string to_json(const TrainReport& report);
// Tables for a terminal.
std::string to_text(const TrainReport& report);

}  // namespace sluice::train
