// Running a job's ranks as a configuration says: threads of this process (transport local) or this process as one rank
// of a launched group. Before the job starts all ranks agree on the configuration.
//
// Thread-safety: run_group blocks until the job is over; the body runs once a local rank, each on its own thread.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"

namespace sluice {

// The loss of a rank, as the survivors saw it. Ranks by the numbers of the group that lost it.
struct GroupLoss {
  RankId culprit;
  std::string phase;
  std::int32_t chunk = -1;
  Status status;
  std::int32_t num_ranks = 0;  // of that group
};

struct GroupOptions {
  // Ranks when the configuration and the launcher leave it open (transport local only).
  std::int32_t default_ranks = 1;
  // Whether each process that a launcher started may do all of it by itself (transport local only): nothing is trained or
  // measured.
  bool alone = false;
  // Called after the group stands and agrees, once a rank.
  std::function<void(Runtime& runtime, const LoadedConfig& config)> body;
  // Called instead of body by the group that the survivors of a loss form, where train.on_failure = "shrink" and the
  // transport survives it. Ranks keep their order and are numbered anew; nodes stay together. losses: all so far.
  std::function<void(Runtime& runtime, const LoadedConfig& config, std::span<const GroupLoss> losses)>
      after_loss;
};

// When a rank is lost and the others do not go on: throws the error of the rank that failed first; others' errors that
// only follow from it are dropped. Collective over the launched group. Throws kDisagreement naming ranks and keys when
// semantic keys differ; agreed keys are rank 0's.
void run_group(const LoadedConfig& config, const GroupOptions& options);

// Whether this process prints results: rank 0 of a launched group, or the only process.
bool prints_results(const Runtime& runtime);

}  // namespace sluice
