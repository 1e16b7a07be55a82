#include "sluice/base/telemetry.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "sluice/base/error.hpp"

namespace sluice {

namespace {

void add(PhaseTotals& to, const PhaseTotals& more) {
  if (more.count == 0) return;
  to.min_ns = to.count == 0 ? more.min_ns : std::min(to.min_ns, more.min_ns);
  to.max_ns = to.count == 0 ? more.max_ns : std::max(to.max_ns, more.max_ns);
  to.count += more.count;
  to.total_ns += more.total_ns;
}

void append_json_string(std::string& out, std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += str("\\", c);
    else if (u < 0x20)
      out += str("\\u00", kHex[u >> 4], kHex[u & 15]);
    else
      out += c;
  }
  out += '"';
}

// Microseconds with the nanoseconds as decimals, which a double would round for large times.
std::string microseconds(std::int64_t ns) {
  char buffer[40];
  const std::int64_t magnitude = ns < 0 ? -ns : ns;
  std::snprintf(buffer, sizeof buffer, "%s%lld.%03d", ns < 0 ? "-" : "",
                static_cast<long long>(magnitude / 1000), static_cast<int>(magnitude % 1000));
  return buffer;
}

void append_metadata(std::string& out, std::string_view what, std::int32_t rank, std::size_t row,
                     std::string_view name) {
  out += str(out.empty() ? "" : ",\n", R"({"ph":"M","name":")", what, R"(","pid":)", rank, R"(,"tid":)", row,
             R"(,"args":{"name":)");
  append_json_string(out, name);
  out += "}}";
}

}  // namespace

SpanRecorder::SpanRecorder(RankId rank, std::size_t capacity) : rank_(rank), ring_(capacity) {
  phases_.reserve(kMaxPhases);
}

PhaseTotals& SpanRecorder::totals_of(StaticText name, StaticText resource) noexcept {
  for (Phase& phase : phases_)
    if (phase.name.same_object(name) && phase.resource.same_object(resource)) return phase.totals;
  if (phases_.size() + 1 < kMaxPhases) {
    phases_.push_back({name, resource, {.name = name.view(), .resource = resource.view()}});
    return phases_.back().totals;
  }
  // The last place is kept for all the rest.
  if (phases_.size() < kMaxPhases)
    phases_.push_back({"other", "other", {.name = "other", .resource = "other"}});
  return phases_.back().totals;
}

void SpanRecorder::record(StaticText name, StaticText resource, std::int64_t begin_ns, std::int64_t end_ns,
                          std::int32_t chunk, std::int32_t layer) noexcept {
  if (!on_) return;
  const std::int64_t ns = end_ns - begin_ns;
  add(totals_of(name, resource), {.count = 1, .total_ns = ns, .min_ns = ns, .max_ns = ns});
  if (!ring_.empty()) ring_[num_recorded_ % ring_.size()] = {name, resource, begin_ns, end_ns, chunk, layer};
  ++num_recorded_;
}

std::vector<SpanRecord> SpanRecorder::spans() const {
  std::vector<SpanRecord> out;
  const std::uint64_t kept = std::min<std::uint64_t>(num_recorded_, ring_.size());
  out.reserve(kept);
  for (std::uint64_t i = num_recorded_ - kept; i < num_recorded_ && kept > 0; ++i)
    out.push_back(ring_[i % ring_.size()]);
  return out;
}

std::vector<PhaseTotals> SpanRecorder::totals() const {
  // One literal may have several addresses: entries of the same text are one phase.
  std::vector<std::vector<PhaseTotals>> parts(1);
  for (const Phase& phase : phases_) parts[0].push_back(phase.totals);
  return merged_totals(parts);
}

void SpanRecorder::clear() {
  num_recorded_ = 0;
  phases_.clear();
}

std::vector<PhaseTotals> merged_totals(std::span<const std::vector<PhaseTotals>> parts) {
  std::vector<PhaseTotals> out;
  for (const std::vector<PhaseTotals>& part : parts) {
    for (const PhaseTotals& phase : part) {
      const auto found = std::find_if(out.begin(), out.end(), [&](const PhaseTotals& other) {
        return other.name == phase.name && other.resource == phase.resource;
      });
      if (found == out.end())
        out.push_back(phase);
      else
        add(*found, phase);
    }
  }
  return out;
}

std::int64_t busy_ns(std::span<const PhaseTotals> totals, std::string_view resource) {
  std::int64_t sum = 0;
  for (const PhaseTotals& phase : totals)
    if (phase.resource == resource) sum += phase.total_ns;
  return sum;
}

std::string chrome_trace_events(const SpanRecorder& recorder, std::int64_t origin_ns) {
  const std::int32_t rank = recorder.rank().value;
  const std::vector<SpanRecord> spans = recorder.spans();
  std::vector<std::string_view> resources;
  std::string out;
  append_metadata(out, "process_name", rank, 0, str("rank ", rank));
  for (const SpanRecord& span : spans) {
    auto found = std::find(resources.begin(), resources.end(), span.resource.view());
    if (found == resources.end()) {
      resources.push_back(span.resource.view());
      found = resources.end() - 1;
      append_metadata(out, "thread_name", rank, resources.size() - 1, span.resource.view());
    }
    out += ",\n{\"ph\":\"X\",\"name\":";
    append_json_string(out, span.name.view());
    out += str(",\"pid\":", rank, ",\"tid\":", found - resources.begin(),
               ",\"ts\":", microseconds(span.begin_ns - origin_ns),
               ",\"dur\":", microseconds(span.end_ns - span.begin_ns), ",\"args\":{");
    if (span.layer >= 0) out += str("\"layer\":", span.layer);
    if (span.chunk >= 0) out += str(span.layer >= 0 ? "," : "", "\"chunk\":", span.chunk);
    out += "}}";
  }
  return out;
}

std::string chrome_trace(std::span<const std::string> events_of_ranks) {
  std::string out = "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n";
  bool first = true;
  for (const std::string& events : events_of_ranks) {
    if (events.empty()) continue;
    out += str(first ? "" : ",\n", events);
    first = false;
  }
  return out + "\n]}\n";
}

namespace {
void write_text(const std::filesystem::path& file, const std::string& text) {
  std::FILE* const out = std::fopen(file.c_str(), "wb");
  Require(out != nullptr, ErrorCode::kIo, "timeline ", file.string(),
          " cannot be written: ", std::strerror(errno));
  const bool written = std::fwrite(text.data(), 1, text.size(), out) == text.size();
  const bool closed = std::fclose(out) == 0;
  Require(written && closed, ErrorCode::kIo, "timeline ", file.string(),
          " cannot be written: ", std::strerror(errno));
}
}  // namespace

void write_chrome_trace(const std::filesystem::path& file, std::span<const std::string> events_of_ranks) {
  write_text(file, chrome_trace(events_of_ranks));
}

void write_timeline_page(const std::filesystem::path& file, const std::string& title,
                         std::span<const std::string> events_of_ranks) {
  write_text(file, timeline_page(title, events_of_ranks));
}

}  // namespace sluice
