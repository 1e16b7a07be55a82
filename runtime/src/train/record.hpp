// Records the routing of a training job: as a trace (docs/trace.md), or, where the file's name ends in .json, as
// statistics (docs/placement.md).
//
// Calls are collective. Rank 0 writes the file; memory is that of one batch, or of the statistics.
// Errors: kIo on rank 0's file, before anything is recorded where it can be known then.
#pragma once

#include <fstream>
#include <memory>
#include <optional>
#include <string>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"
#include "sluice/runtime/src/trace/routing_trace.hpp"
#include "sluice/runtime/src/train/model.hpp"

namespace sluice::train {

// What to record. Layers of the recording are (layer, iteration) pairs in order.
struct RecordRequest {
  std::string file;
  std::string text;  // a file or directory to route once training is done; empty: the last steps of training
};
// "FILE" or "FILE=TEXT". Throws kInvalidArgument.
RecordRequest parse_record_request(const std::string& text);

class RoutingRecorder {
 public:
  RoutingRecorder(Runtime& runtime, const Config& config, std::string file);
  // The model's last batch of compute_gradients().
  void add(const Model& model);
  void finish();

 private:
  Runtime& runtime_;
  std::int32_t layers_, iterations_;
  std::string file_;
  std::int64_t next_token_ = 0;
  std::ofstream out_;                             // rank 0, a trace
  std::unique_ptr<TraceWriter> writer_;           // rank 0, a trace
  std::unique_ptr<StatisticsRecorder> recorder_;  // statistics
};

}  // namespace sluice::train
