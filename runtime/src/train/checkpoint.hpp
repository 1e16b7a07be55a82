// Saving a training job and going on from it. The format: checkpoint_format.hpp.
//
// What is saved: masters and moments of every parameter by logical expert, the policy's adaptive state, the step, the
// place in the data, the series that the report shows. Experts are written by the rank that owns them, replicated
// parameters by the ranks in turn. All ranks must see the same folder.
// Atomic: files are written under temporary names, flushed to the disk and renamed, shards first, the manifest last;
// what a crash leaves behind is no checkpoint and is cleared by a later save.
//
// Collective; blocks on the disk and with the Runtime's deadline. A save or restore that fails on any rank throws the
// same error on all: kIo, kNotFound, kInvalidArgument (truncated, corrupt; naming file, section, expected and seen),
// kInvalidConfig (made by another model, text or optimizer; naming the key). After a failed restore() the model's values
// are unspecified.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"
#include "sluice/runtime/src/train/checkpoint_format.hpp"
#include "sluice/runtime/src/train/model.hpp"
#include "sluice/runtime/src/train/text.hpp"

namespace sluice::train {

// The job's own part of a checkpoint: one row a step, in the trainer's own order of columns.
struct History {
  std::int64_t cols = 0;
  std::vector<double> values;  // f64 [steps, cols]
};

// Steps with a manifest, ascending. Not collective. An empty list when there is no such folder.
std::vector<std::int64_t> list_checkpoints(const std::filesystem::path& folder);

class CheckpointStore {
 public:
  // loaded: train.checkpoint_dir, which must not be empty, and train.checkpoint_keep.
  CheckpointStore(Runtime& runtime, const LoadedConfig& loaded, const Text& text);

  // Collective. Throws kInvalidState when the folder already holds checkpoints: a new job would mix with them.
  void require_fresh() const;
  // Collective. Saves `step`, then deletes the oldest ones beyond train.checkpoint_keep.
  void save(const Model& model, std::int64_t step, const History& history) const;
  // Collective. Reads the newest checkpoint, or that of `step` (0: the newest). With `allow_older` a damaged one is
  // passed over for the one before, saying so on the log; one of another model never is. Returns its step.
  std::int64_t restore(Model& model, History& history, std::int64_t step, bool allow_older) const;

 private:
  void restore_step(Model& model, History& history, std::int64_t step) const;
  void check_model(const CheckpointManifest& manifest, std::string_view name) const;
  void read_sections(const CheckpointManifest& manifest, const std::filesystem::path& folder, Model& model,
                     History& history) const;
  void delete_old() const;

  Runtime& runtime_;
  const Config config_;
  const std::filesystem::path folder_;
  const std::int64_t text_bytes_;
  const std::uint64_t text_hash_;
};

}  // namespace sluice::train
