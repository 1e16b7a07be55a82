// The log: one line a message on standard error, "sluice <level> [rank R] text name value name value".
//
// Levels by volume: error = the job or a part of it failed; warn = it goes on but not as asked; info = a few
// lines a job; debug = lines proportional to steps or objects. Text is written "name value", not
// "name=value", so that a double-click selects the value. The function that decides which error it is logs it
// once; callers propagate.
//
// The log is the one process-wide object of Sluice: standard error is one per process. Everything here is
// thread-safe. A line is one write(2), so lines of several processes do not mix. A message below the level
// costs one relaxed load and formats nothing. Nothing here throws or blocks on anything but standard error.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/error.hpp"

namespace sluice {

enum class LogLevel : std::uint8_t { kError = 0, kWarn = 1, kInfo = 2, kDebug = 3 };
std::string_view to_string(LogLevel level) noexcept;

// Lines less important than this are dropped. Starts at kInfo.
void set_log_level(LogLevel level) noexcept;
LogLevel log_level() noexcept;

// Lines of this thread carry "rank R"; ranks of the local transport are threads, so the rank belongs to the
// thread. For processes of one rank, set_process_log_rank() serves the threads that have none of their own.
// -1: no rank.
void set_process_log_rank(std::int32_t rank) noexcept;
class LogRank {
 public:
  explicit LogRank(std::int32_t rank) noexcept;
  ~LogRank();
  LogRank(const LogRank&) = delete;
  LogRank& operator=(const LogRank&) = delete;

 private:
  std::int32_t previous_;
};

// Error and warning lines since the process began. Lines that a sink took (a LogCapture, say) were expected
// and are not counted, so a test program can fail on a count that grew.
struct LogCounts {
  std::uint64_t errors = 0;
  std::uint64_t warnings = 0;
  friend bool operator==(const LogCounts&, const LogCounts&) = default;
};
LogCounts log_counts() noexcept;

// Where lines go instead of standard error; `line` has no newline. Called under the log's lock: a sink must
// not log.
using LogSink = std::function<void(LogLevel level, std::string_view line)>;
// Returns the sink that was there; an empty sink is standard error.
LogSink set_log_sink(LogSink sink);

// Takes the lines of all threads from construction to destruction, at every level. For tests; captures nest.
class LogCapture {
 public:
  LogCapture();
  ~LogCapture();
  LogCapture(const LogCapture&) = delete;
  LogCapture& operator=(const LogCapture&) = delete;

  std::vector<std::string> lines() const;
  bool contains(std::string_view text) const;

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> lines_;
  LogSink previous_;
  LogLevel previous_level_;
};

// A line that the next line, transient or not, replaces; for progress on a terminal. Only where standard
// error is a terminal; elsewhere it does nothing. An empty text removes the line.
void show_transient_line(std::string_view text);
bool stderr_is_terminal() noexcept;

namespace detail {
extern std::atomic<LogLevel> log_threshold;
void write_log_line(LogLevel level, std::string_view message) noexcept;
}  // namespace detail

inline bool log_enabled(LogLevel level) noexcept {
  return level <= detail::log_threshold.load(std::memory_order_relaxed);
}

// Parts are strings or numbers and are joined as they are: log_info("train step ", step, " loss ", loss).
template <typename... Parts>
void log(LogLevel level, const Parts&... parts) {
  if (log_enabled(level)) detail::write_log_line(level, str(parts...));
}
template <typename... Parts>
void log_error(const Parts&... parts) {
  log(LogLevel::kError, parts...);
}
template <typename... Parts>
void log_warn(const Parts&... parts) {
  log(LogLevel::kWarn, parts...);
}
template <typename... Parts>
void log_info(const Parts&... parts) {
  log(LogLevel::kInfo, parts...);
}
template <typename... Parts>
void log_debug(const Parts&... parts) {
  log(LogLevel::kDebug, parts...);
}

}  // namespace sluice
