// Recorded routing: which experts tokens visited, as a streamed text format (docs/trace.md).
//
//   sluice-trace 2 layers 2 experts 64
//   # layer, source rank, then expert:weight of every route
//   0 3 5:0.25 17:0.75
//   1 3 2:1
//   end 2
//
// A line is one token at one layer. Tokens of one (layer, source) are in order; lines of different layers and sources
// may interleave. The last line counts the tokens' lines, so that a file that was cut short is known; version 1 has none.
// Thread-safety: values. Blocks on the stream.
// Errors: kInvalidRouting "name:line:column: what, allowed" for anything malformed; kIo when the stream fails.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/scheduler/routing.hpp"
#include "sluice/scheduler/statistics.hpp"

namespace sluice {

// One token at one layer.
struct TraceToken {
  std::int32_t layer = 0;
  std::int32_t source = 0;
  std::vector<std::int32_t> expert;  // int32 [routes], ascending
  std::vector<float> weight;         // f32 [routes]
};

// Reads token by token; memory does not grow with the trace. `name` stands for the stream in errors.
class TraceReader {
 public:
  // Reads the header. Refuses more than max_routes routes.
  TraceReader(std::istream& in, std::string_view name, std::int64_t max_routes = std::int64_t{1} << 28);

  std::int32_t num_layers() const { return num_layers_; }
  std::int32_t num_experts() const { return num_experts_; }
  // False at the end, which has been checked then.
  bool next(TraceToken& token);

 private:
  bool next_line();  // skips blank lines and comments
  std::istream& in_;
  std::string name_, text_;
  std::int64_t max_routes_, number_ = 0, num_routes_ = 0, num_lines_ = 0;
  std::int32_t version_ = 0, num_layers_ = 0, num_experts_ = 0;
};

struct RoutingTrace {
  std::int32_t num_layers = 0;
  std::int32_t num_experts = 0;
  // [num_layers][num_sources]; sources as in the file, 0..highest
  std::vector<std::vector<Routing>> layers;

  std::int32_t num_sources() const {
    return layers.empty() ? 0 : static_cast<std::int32_t>(layers[0].size());
  }
};

// Reads a whole trace.
RoutingTrace read_trace(std::istream& in, std::string_view name,
                        std::int64_t max_routes = std::int64_t{1} << 28);
RoutingTrace read_trace_file(const std::string& file);

// One layer of a trace for one of num_ranks ranks: the tokens of the source of that number when the trace has a source
// for each rank; else tokens are dealt to the ranks in turn. Throws kInvalidArgument when there is no such layer.
Routing replay_layer(const std::string& file, std::int32_t layer, std::int32_t rank, std::int32_t num_ranks);

// Writes a trace token by token; finish() writes its last line.
class TraceWriter {
 public:
  TraceWriter(std::ostream& out, std::int32_t num_layers, std::int32_t num_experts);
  // All tokens of one layer and source. Weights print shortest round-trip.
  void write(std::int32_t layer, std::int32_t source, const RoutingView& routing);
  // The same in two steps: a rank makes lines, the one with the file writes them.
  static void append_lines(std::string& lines, std::int32_t layer, std::int32_t source,
                           const RoutingView& routing);
  void write_lines(std::string_view lines);
  // Throws kIo if the stream has failed.
  void finish();

 private:
  std::ostream& out_;
  std::int64_t num_lines_ = 0;
};

// Statistics of a file of any kind that there is, told apart by what is in it: JSON (statistics.hpp), a trace, or routes:
//   # OLMoE-1B-7B, domain arxiv, layers 0,7,15, top-8 of 64: one line a token, ...
//   0,12,17 2,4,17 1,8,9
// one line a token, experts of a layer separated by commas, layers by spaces; a comment names layers, top-k and experts.
// Routes have no source rank and no weights: all are of source 0. Traces and routes are streamed.
RoutingStatistics read_statistics_file(const std::string& file,
                                       std::int64_t max_sample = RoutingStatistics::kDefaultSample);

}  // namespace sluice
