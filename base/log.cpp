#include "sluice/base/log.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

namespace sluice {

namespace detail {
std::atomic<LogLevel> log_threshold{LogLevel::kInfo};
}  // namespace detail

namespace {

struct State {
  std::mutex mutex;
  LogSink sink;
  bool transient_shown = false;
};
// Never destroyed: threads that outlive main's statics may still log.
State& state() {
  static State* const instance = new State;
  return *instance;
}

std::atomic<std::uint64_t> num_errors{0};
std::atomic<std::uint64_t> num_warnings{0};
std::atomic<std::int32_t> process_rank{-1};
thread_local std::int32_t thread_rank = -1;

// Standard error may be closed, full or a broken pipe: a log that cannot be written is dropped.
void write_stderr(std::string_view text) noexcept {
  while (!text.empty()) {
    const ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    text.remove_prefix(static_cast<std::size_t>(n));
  }
}

constexpr std::string_view kEraseLine = "\r\x1b[K";

}  // namespace

std::string_view to_string(LogLevel level) noexcept {
  switch (level) {
    case LogLevel::kError:
      return "error";
    case LogLevel::kWarn:
      return "warn";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kDebug:
      return "debug";
  }
  return "unknown level";
}

void set_log_level(LogLevel level) noexcept {
  detail::log_threshold.store(level, std::memory_order_relaxed);
}
LogLevel log_level() noexcept {
  return detail::log_threshold.load(std::memory_order_relaxed);
}

void set_process_log_rank(std::int32_t rank) noexcept {
  process_rank.store(rank, std::memory_order_relaxed);
}
LogRank::LogRank(std::int32_t rank) noexcept : previous_(thread_rank) {
  thread_rank = rank;
}
LogRank::~LogRank() {
  thread_rank = previous_;
}

LogCounts log_counts() noexcept {
  return {num_errors.load(std::memory_order_relaxed), num_warnings.load(std::memory_order_relaxed)};
}

LogSink set_log_sink(LogSink sink) {
  const std::lock_guard lock(state().mutex);
  std::swap(state().sink, sink);
  return sink;
}

LogCapture::LogCapture() : previous_level_(log_level()) {
  previous_ = set_log_sink([this](LogLevel, std::string_view line) {
    const std::lock_guard lock(mutex_);
    lines_.emplace_back(line);
  });
  set_log_level(LogLevel::kDebug);
}

LogCapture::~LogCapture() {
  set_log_level(previous_level_);
  set_log_sink(std::move(previous_));
}

std::vector<std::string> LogCapture::lines() const {
  const std::lock_guard lock(mutex_);
  return lines_;
}

bool LogCapture::contains(std::string_view text) const {
  const std::lock_guard lock(mutex_);
  for (const std::string& line : lines_)
    if (line.find(text) != std::string::npos) return true;
  return false;
}

bool stderr_is_terminal() noexcept {
  return ::isatty(STDERR_FILENO) == 1;
}

void show_transient_line(std::string_view text) {
  if (!stderr_is_terminal()) return;
  const std::lock_guard lock(state().mutex);
  if (text.empty() && !state().transient_shown) return;
  // A line longer than the terminal would wrap and could not be written over. Only whole UTF-8 characters are cut off.
  winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 && text.size() >= size.ws_col) {
    std::size_t length = size.ws_col - 1u;
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xc0) == 0x80) --length;
    text = text.substr(0, length);
  }
  write_stderr(str(kEraseLine, text));
  state().transient_shown = !text.empty();
}

void detail::write_log_line(LogLevel level, std::string_view message) noexcept {
  try {
    std::string line = str("sluice ", to_string(level));
    const std::int32_t rank = thread_rank >= 0 ? thread_rank : process_rank.load(std::memory_order_relaxed);
    if (rank >= 0) line += str(" rank ", rank);
    line += ' ';
    // One line stays one line, and a terminal is not steered by what a message carries.
    for (const char c : message) {
      if (c == '\n')
        line += "\\n";
      else
        line += (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) ? ' ' : c;
    }
    const std::lock_guard lock(state().mutex);
    if (state().sink) {
      state().sink(level, line);
      return;
    }
    if (level == LogLevel::kError) num_errors.fetch_add(1, std::memory_order_relaxed);
    if (level == LogLevel::kWarn) num_warnings.fetch_add(1, std::memory_order_relaxed);
    line += '\n';
    if (state().transient_shown) line.insert(0, kEraseLine);
    state().transient_shown = false;
    write_stderr(line);
  } catch (...) {
    // Out of memory, or a sink that throws: losing the line is better than ending the caller.
  }
}

}  // namespace sluice
