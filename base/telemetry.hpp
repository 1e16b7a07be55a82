// Telemetry: what a rank did and how long it took. A recorder belongs to one rank; there is no global one.
//
// It keeps totals per phase (name and resource) always, and the last `capacity` spans for a timeline. Everything is
// allocated in the constructor: recording allocates nothing and costs two clock reads; when off, one branch.
//
// Thread-safety: a recorder is used by its rank's thread only; read it from another thread only after joining.
// Times are nanoseconds of the steady clock: comparable among the processes of one host, not across hosts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/base/clock.hpp"
#include "sluice/base/ids.hpp"

namespace sluice {

// A text that lives as long as the program: a literal, or what a to_string() of an enum returns. Spans keep it as it
// is.
class StaticText {
 public:
  StaticText() = default;
  template <std::size_t N>
  consteval StaticText(const char (&literal)[N]) : text_(literal, N - 1) {}
  // The caller's promise that `text` is never freed.
  static constexpr StaticText promised(std::string_view text) {
    StaticText out;
    out.text_ = text;
    return out;
  }
  constexpr std::string_view view() const { return text_; }
  constexpr bool same_object(StaticText other) const {
    return text_.data() == other.text_.data() && text_.size() == other.text_.size();
  }

 private:
  std::string_view text_;
};

struct SpanRecord {
  StaticText name;
  StaticText resource;
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
  std::int32_t chunk = -1;  // -1: none
  std::int32_t layer = -1;  // -1: none
};

struct PhaseTotals {
  std::string_view name = {};
  std::string_view resource = {};
  std::int64_t count = 0;
  std::int64_t total_ns = 0;
  std::int64_t min_ns = 0;
  std::int64_t max_ns = 0;
};

class SpanRecorder {
 public:
  // Names beyond so many (name, resource) pairs are counted together under "other".
  static constexpr std::size_t kMaxPhases = 128;

  // capacity: spans kept for the timeline, the latest win; 0 keeps totals only. Starts on.
  explicit SpanRecorder(RankId rank, std::size_t capacity = 0);

  RankId rank() const { return rank_; }
  bool on() const { return on_; }
  void set_on(bool on) { on_ = on; }

  static std::int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
  }

  // A span whose begin and end are known, as of a transfer that ended in between two looks. Ignored when off.
  void record(StaticText name, StaticText resource, std::int64_t begin_ns, std::int64_t end_ns,
              std::int32_t chunk = -1, std::int32_t layer = -1) noexcept;

  // Oldest first.
  std::vector<SpanRecord> spans() const;
  std::uint64_t num_recorded() const { return num_recorded_; }
  std::uint64_t num_overwritten() const {
    return num_recorded_ > ring_.size() ? num_recorded_ - ring_.size() : 0;
  }
  // In order of first appearance, one entry a (name, resource).
  std::vector<PhaseTotals> totals() const;
  // Forgets spans and totals; frees nothing.
  void clear();

 private:
  struct Phase {
    StaticText name;
    StaticText resource;
    PhaseTotals totals;
  };
  PhaseTotals& totals_of(StaticText name, StaticText resource) noexcept;

  RankId rank_;
  bool on_ = true;
  std::uint64_t num_recorded_ = 0;
  std::vector<SpanRecord> ring_;
  std::vector<Phase> phases_;
};

// Records from construction to end() or destruction. With no recorder, or one that is off, it does nothing.
class Span {
 public:
  Span(SpanRecorder* recorder, StaticText name, StaticText resource, std::int32_t chunk = -1,
       std::int32_t layer = -1)
      : recorder_(recorder && recorder->on() ? recorder : nullptr),
        name_(name),
        resource_(resource),
        chunk_(chunk),
        layer_(layer) {
    if (recorder_) begin_ns_ = SpanRecorder::now_ns();
  }
  Span(Span&& other) noexcept
      : recorder_(std::exchange(other.recorder_, nullptr)),
        name_(other.name_),
        resource_(other.resource_),
        chunk_(other.chunk_),
        layer_(other.layer_),
        begin_ns_(other.begin_ns_) {}
  Span& operator=(Span&&) = delete;
  ~Span() { end(); }

  void end() noexcept {
    if (SpanRecorder* const recorder = std::exchange(recorder_, nullptr))
      recorder->record(name_, resource_, begin_ns_, SpanRecorder::now_ns(), chunk_, layer_);
  }

 private:
  SpanRecorder* recorder_;
  StaticText name_;
  StaticText resource_;
  std::int32_t chunk_;
  std::int32_t layer_;
  std::int64_t begin_ns_ = 0;
};

// Totals of several recorders (ranks) as one list: counts and totals add, min and max over all.
std::vector<PhaseTotals> merged_totals(std::span<const std::vector<PhaseTotals>> parts);
// Sum of total_ns over the phases of one resource: its busy time, when its spans do not nest.
std::int64_t busy_ns(std::span<const PhaseTotals> totals, std::string_view resource);

// The spans of one rank as Chrome trace events, comma-separated JSON objects: a process row a rank, a thread row a
// resource. Ranks of other processes send theirs as text. Times count from `origin_ns`, the same for all ranks.
std::string chrome_trace_events(const SpanRecorder& recorder, std::int64_t origin_ns);
// The whole document from the events of all ranks; opens in Perfetto and chrome://tracing.
std::string chrome_trace(std::span<const std::string> events_of_ranks);
// chrome_trace to a file. Throws kIo naming the file.
void write_chrome_trace(const std::filesystem::path& file, std::span<const std::string> events_of_ranks);

// A page that shows the same events in any browser, without a network: rows a rank and resource, a table of phases.
// `title` says what ran. Throws kIo naming the file.
std::string timeline_page(const std::string& title, std::span<const std::string> events_of_ranks);
void write_timeline_page(const std::filesystem::path& file, const std::string& title,
                         std::span<const std::string> events_of_ranks);

}  // namespace sluice
