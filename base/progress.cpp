#include "sluice/base/progress.hpp"

#include <utility>

#include "sluice/base/error.hpp"

namespace sluice {

namespace {
constexpr std::chrono::milliseconds kTerminalPeriod{100};
constexpr std::chrono::seconds kLogPeriod{30};
}  // namespace

Progress::Progress(std::string what, std::int64_t total, bool terminal)
    : what_(std::move(what)), total_(total), terminal_(terminal) {
  Require(total >= 1, ErrorCode::kInvalidArgument, "progress of ", what_, " over ", total,
          " steps; must be 1 or more");
}

Progress::~Progress() {
  try {
    if (terminal_) show_transient_line("");
  } catch (...) {
    // The terminal keeps a stale line; nothing depends on it.
  }
}

void Progress::update(std::int64_t done, const std::function<std::string()>& text, Clock::time_point now) {
  const std::int64_t tenth = done * 10 / total_;
  const bool first = last_tenth_ < 0;
  const bool last = done >= total_;
  const bool due = terminal_ ? now - last_time_ >= kTerminalPeriod
                             : tenth != last_tenth_ || now - last_time_ >= kLogPeriod;
  if (!first && !last && !due) return;
  last_tenth_ = tenth;
  last_time_ = now;
  const std::string line = str(what_, " step ", done, " of ", total_, " ", text());
  if (terminal_ && !last)
    show_transient_line(line);
  else
    log_info(line);
}

}  // namespace sluice
