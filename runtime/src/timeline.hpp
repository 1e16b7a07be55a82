// The timeline of a group: the spans of all ranks in one file.
#pragma once

#include <string>

#include "sluice/base/telemetry.hpp"
#include "sluice/runtime.hpp"

namespace sluice {

// Collective. Rank 0 writes the spans of all ranks: Chrome trace JSON, or a page that needs nothing but a browser if
// the file is named *.html. Throws kIo naming the file.
void write_timeline(Runtime& runtime, const SpanRecorder& recorder, const std::string& file);

}  // namespace sluice
