// Recorded routing: which experts tokens visited, as a streamed text format (docs/trace.md).
//
//   sluice-trace 1 layers 2 experts 64
//   # layer, source rank, then expert:weight of every route
//   0 3 5:0.25 17:0.75
//
// A line is one token at one layer. Tokens of one (layer, source) are in order; lines of different layers and sources
// may interleave. Thread-safety: values. Blocks on the stream.
// Errors: kInvalidRouting "name:line:column: what, allowed" for anything malformed; kIo when the stream fails.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/scheduler/routing.hpp"

namespace sluice {

struct RoutingTrace {
  std::int32_t num_layers = 0;
  std::int32_t num_experts = 0;
  // [num_layers][num_sources]; sources as in the file, 0..highest
  std::vector<std::vector<Routing>> layers;

  std::int32_t num_sources() const {
    return layers.empty() ? 0 : static_cast<std::int32_t>(layers[0].size());
  }
};

// Reads a whole trace. `name` stands for the stream in errors. Refuses more than max_routes routes.
RoutingTrace read_trace(std::istream& in, std::string_view name,
                        std::int64_t max_routes = std::int64_t{1} << 28);
RoutingTrace read_trace_file(const std::string& file);

void write_trace_header(std::ostream& out, std::int32_t num_layers, std::int32_t num_experts);
// All tokens of one layer and source. Weights print shortest round-trip.
void write_trace_tokens(std::ostream& out, std::int32_t layer, std::int32_t source,
                        const RoutingView& routing);

}  // namespace sluice
