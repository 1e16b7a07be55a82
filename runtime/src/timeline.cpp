#include "sluice/runtime/src/timeline.hpp"

#include <algorithm>
#include <filesystem>

#include "sluice/runtime/src/gather.hpp"

namespace sluice {

void write_timeline(Runtime& runtime, const SpanRecorder& recorder, const std::string& file) {
  const std::vector<SpanRecord> spans = recorder.spans();
  std::int64_t mine = SpanRecorder::now_ns();
  for (const SpanRecord& span : spans) mine = std::min(mine, span.begin_ns);
  const std::vector<std::int64_t> begins = runtime.all_gather(std::span(&mine, 1), "timeline");
  const auto events = gather_to_root(
      runtime, chrome_trace_events(recorder, *std::min_element(begins.begin(), begins.end())), "timeline");
  if (runtime.rank() != RankId(0)) return;
  if (std::filesystem::path(file).extension() == ".html") {
    write_timeline_page(file, runtime.topology().describe(), events);
  } else {
    write_chrome_trace(file, events);
  }
}

}  // namespace sluice
