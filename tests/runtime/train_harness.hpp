// Small training jobs over a local group of ranks.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "layer_harness.hpp"
#include "sluice/base/config.hpp"
#include "sluice/base/telemetry.hpp"
#include "sluice/runtime/src/train/model.hpp"
#include "sluice/runtime/src/train/text.hpp"
#include "sluice/runtime/src/train/trainer.hpp"

namespace sluice::testing {

// A tiny model; `sets` override.
inline LoadedConfig tiny_config(std::vector<std::string> sets = {}) {
  static constexpr std::string_view kText = R"(
[model]
num_layers = 2
num_experts = 6
hidden = 12
ffn = 8
context = 3
embed = 5
[routing]
policy = "relu"
top_k = 2
relu_lambda0 = 1e-3
[train]
steps = 5
seed = 7
tokens_per_step = 40
learning_rate = 1e-2
warmup_steps = 2
)";
  return parse_config(kText, "tiny", sets);
}

// Words of a small vocabulary, so that there is something to learn. Deterministic.
inline train::Text word_text(std::size_t num_bytes, std::uint64_t seed = 1) {
  static const char* const kWords[] = {"gate ",  "flow ", "sluice ", "water ",
                                       "token ", "rank ", "node, ",  "expert.\n"};
  std::mt19937_64 rng(seed);
  train::Text out{.bytes = {}, .description = "words"};
  std::size_t word = 0;
  while (out.bytes.size() < num_bytes) {
    word = (word * 3 + rng() % 3) % std::size(kWords);
    out.bytes += kWords[word];
  }
  out.bytes.resize(num_bytes);
  return out;
}

// Runs `body` on every rank of a local group as the configuration says, or of `num_ranks` ranks on one node.
inline void run_job(const LoadedConfig& loaded, std::int32_t num_ranks,
                    const std::function<void(Runtime&)>& body) {
  RuntimeOptions options;
  options.timeout = std::chrono::seconds(60);
  options.threads_per_rank = loaded.config.runtime.threads_per_rank;
  auto group = Runtime::create_local(configured_topology(loaded.config, num_ranks), options);
  run_ranks(group, body);
}

// The whole job; the report of rank 0. Every rank must have the same losses.
inline train::TrainReport run_train(const LoadedConfig& loaded, std::int32_t num_ranks,
                                    const train::Text& text) {
  std::vector<train::TrainReport> reports(static_cast<std::size_t>(num_ranks));
  run_job(loaded, num_ranks, [&](Runtime& runtime) {
    reports[runtime.rank().index()] = train::train(runtime, loaded, text, {.progress = false});
  });
  for (const auto& report : reports) {
    EXPECT_EQ(report.losses, reports[0].losses);
    EXPECT_EQ(report.heldout_bpb, reports[0].heldout_bpb);
  }
  return reports[0];
}

}  // namespace sluice::testing
