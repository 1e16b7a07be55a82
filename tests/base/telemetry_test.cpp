#include "sluice/base/telemetry.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <new>
#include <nlohmann/json.hpp>
#include <thread>

#include "sluice/base/error.hpp"

namespace {
// Counts this thread's allocations, so that "allocates nothing" is a test and not a claim.
thread_local std::size_t num_allocations = 0;
}  // namespace

// Not inlined: GCC 12 otherwise sees free() meet operator new and warns.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++num_allocations;
  if (void* const memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace sluice {
namespace {

TEST(Telemetry, SpanRecordsNameResourceChunkLayerAndTime) {
  SpanRecorder recorder(RankId(3), 8);
  const std::int64_t before = SpanRecorder::now_ns();
  {
    const Span span(&recorder, "gemm1", "compute", 2, 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  const std::int64_t after = SpanRecorder::now_ns();
  const std::vector<SpanRecord> spans = recorder.spans();
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].name.view(), "gemm1");
  EXPECT_EQ(spans[0].resource.view(), "compute");
  EXPECT_EQ(spans[0].chunk, 2);
  EXPECT_EQ(spans[0].layer, 1);
  EXPECT_GE(spans[0].begin_ns, before);
  EXPECT_GE(spans[0].end_ns - spans[0].begin_ns, 2'000'000);
  EXPECT_LE(spans[0].end_ns, after);
  EXPECT_EQ(recorder.rank(), RankId(3));
}

TEST(Telemetry, NoRecorderOrOffRecordsNothing) {
  SpanRecorder recorder(RankId(0), 8);
  recorder.set_on(false);
  { const Span span(&recorder, "a", "host"); }
  { const Span span(nullptr, "a", "host"); }
  recorder.record("a", "host", 1, 2);
  EXPECT_EQ(recorder.num_recorded(), 0u);
  EXPECT_TRUE(recorder.totals().empty());
  // A span that began while off stays unrecorded; one that ends while off too.
  Span began_off(&recorder, "a", "host");
  recorder.set_on(true);
  began_off.end();
  Span ends_off(&recorder, "a", "host");
  recorder.set_on(false);
  ends_off.end();
  EXPECT_EQ(recorder.num_recorded(), 0u);
}

TEST(Telemetry, MovedSpanRecordsOnceAndEndIsFinal) {
  SpanRecorder recorder(RankId(0), 8);
  {
    Span first(&recorder, "a", "host");
    Span second(std::move(first));
    second.end();
    second.end();
    EXPECT_EQ(recorder.num_recorded(), 1u);
  }
  EXPECT_EQ(recorder.num_recorded(), 1u);
  static_assert(!std::is_copy_constructible_v<Span>);
}

TEST(Telemetry, RingKeepsTheLatestAndTotalsKeepAll) {
  SpanRecorder recorder(RankId(0), 4);
  for (int i = 0; i < 10; ++i) recorder.record("a", "host", 100 * i, 100 * i + i);
  const std::vector<SpanRecord> spans = recorder.spans();
  ASSERT_EQ(spans.size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(spans[static_cast<std::size_t>(i)].begin_ns, 100 * (6 + i));
  EXPECT_EQ(recorder.num_recorded(), 10u);
  EXPECT_EQ(recorder.num_overwritten(), 6u);
  ASSERT_EQ(recorder.totals().size(), 1u);
  EXPECT_EQ(recorder.totals()[0].count, 10);
  EXPECT_EQ(recorder.totals()[0].total_ns, 45);
  EXPECT_EQ(recorder.totals()[0].min_ns, 0);
  EXPECT_EQ(recorder.totals()[0].max_ns, 9);
  recorder.clear();
  EXPECT_TRUE(recorder.spans().empty());
  EXPECT_TRUE(recorder.totals().empty());
  EXPECT_EQ(recorder.num_overwritten(), 0u);
}

TEST(Telemetry, TotalsAreByNameAndResource) {
  SpanRecorder recorder(RankId(0));
  static const char kSameText[] = "put";  // another address than the literal's, perhaps
  recorder.record("put", "in node", 0, 5);
  recorder.record("put", "across nodes", 0, 7);
  recorder.record(StaticText::promised(kSameText), "in node", 0, 3);
  recorder.record("pack", "in node", 0, 1);
  const std::vector<PhaseTotals> totals = recorder.totals();
  ASSERT_EQ(totals.size(), 3u);
  EXPECT_EQ(totals[0].name, "put");
  EXPECT_EQ(totals[0].resource, "in node");
  EXPECT_EQ(totals[0].count, 2);
  EXPECT_EQ(totals[0].total_ns, 8);
  EXPECT_EQ(totals[0].min_ns, 3);
  EXPECT_EQ(totals[0].max_ns, 5);
  EXPECT_EQ(totals[1].resource, "across nodes");
  EXPECT_EQ(busy_ns(totals, "in node"), 9);
  EXPECT_EQ(busy_ns(totals, "across nodes"), 7);
  EXPECT_EQ(busy_ns(totals, "none"), 0);
  EXPECT_TRUE(recorder.spans().empty());  // capacity 0

  const std::vector<std::vector<PhaseTotals>> ranks = {totals, {}, totals};
  const std::vector<PhaseTotals> merged = merged_totals(ranks);
  ASSERT_EQ(merged.size(), 3u);
  EXPECT_EQ(merged[0].count, 4);
  EXPECT_EQ(merged[0].total_ns, 16);
  EXPECT_EQ(merged[0].min_ns, 3);
}

TEST(Telemetry, TooManyNamesAreCountedTogether) {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < SpanRecorder::kMaxPhases + 20; ++i)
    names.push_back("phase " + std::to_string(i));
  SpanRecorder recorder(RankId(0));
  for (const std::string& name : names) recorder.record(StaticText::promised(name), "host", 0, 1);
  const std::vector<PhaseTotals> totals = recorder.totals();
  ASSERT_EQ(totals.size(), SpanRecorder::kMaxPhases);
  EXPECT_EQ(totals.back().name, "other");
  EXPECT_EQ(totals.back().count, 21);
}

TEST(Telemetry, RecordingAllocatesNothing) {
  SpanRecorder recorder(RankId(0), 16);
  const std::size_t before = num_allocations;
  for (int i = 0; i < 100; ++i) {
    const Span span(&recorder, "a", "host", i);
    recorder.record("b", "compute", 0, 1);
  }
  EXPECT_EQ(num_allocations, before);
  const auto counted = std::make_unique<int>(1);
  EXPECT_GT(num_allocations, before) << "the counter of this test does not count";
}

TEST(Telemetry, ChromeTraceHasRowsPerRankAndResource) {
  SpanRecorder a(RankId(0), 8);
  SpanRecorder b(RankId(1), 8);
  a.record("pack \"x\"", "host", 1'000'001'500, 1'000'004'000, 2, 1);
  a.record("put", "in node", 1'000'002'000, 1'000'002'001);
  b.record("gemm", "compute", 1'000'000'000, 1'000'000'000, -1, 0);
  const std::vector<std::string> events = {chrome_trace_events(a, 1'000'000'000),
                                           chrome_trace_events(b, 1'000'000'000), ""};
  const nlohmann::json json = nlohmann::json::parse(chrome_trace(events));
  std::vector<nlohmann::json> spans;
  std::map<std::pair<int, int>, std::string> rows;
  std::map<int, std::string> processes;
  for (const auto& event : json["traceEvents"]) {
    if (event["ph"] == "X") spans.push_back(event);
    if (event["name"] == "thread_name") rows[{event["pid"], event["tid"]}] = event["args"]["name"];
    if (event["name"] == "process_name") processes[event["pid"]] = event["args"]["name"];
  }
  EXPECT_EQ(processes, (std::map<int, std::string>{{0, "rank 0"}, {1, "rank 1"}}));
  EXPECT_EQ(rows, (std::map<std::pair<int, int>, std::string>{
                      {{0, 0}, "host"}, {{0, 1}, "in node"}, {{1, 0}, "compute"}}));
  ASSERT_EQ(spans.size(), 3u);
  EXPECT_EQ(spans[0]["name"], "pack \"x\"");
  EXPECT_EQ(spans[0]["ts"], 1.5);
  EXPECT_EQ(spans[0]["dur"], 2.5);
  EXPECT_EQ(spans[0]["args"], nlohmann::json::parse(R"({"layer":1,"chunk":2})"));
  EXPECT_EQ(spans[1]["tid"], 1);
  EXPECT_EQ(spans[1]["args"], nlohmann::json::object());
  EXPECT_EQ(spans[2]["pid"], 1);
  EXPECT_EQ(spans[2]["args"]["layer"], 0);
  EXPECT_TRUE(nlohmann::json::parse(chrome_trace({}))["traceEvents"].empty());
}

// The page holds the trace as it is, cannot be ended by a name, and loads nothing.
TEST(Telemetry, PageHoldsTheTraceAndLoadsNothing) {
  SpanRecorder a(RankId(0), 8);
  a.record("</script>", "host", 0, 1500, 3);
  const std::vector<std::string> events = {chrome_trace_events(a, 0)};
  const std::string page = timeline_page("2 ranks </script> \"x\"", events);
  const auto element = [&](const std::string& id) {
    const std::string open = "<script type=\"application/json\" id=\"" + id + "\">";
    const std::size_t begin = page.find(open) + open.size();
    return nlohmann::json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  };
  EXPECT_EQ(element("trace"), nlohmann::json::parse(chrome_trace(events)));
  EXPECT_EQ(element("name"), "2 ranks </script> \"x\"");
  for (const char* outside : {"http:", "https:", "src=", "@import", "url("})
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
}

TEST(Telemetry, TraceIsWrittenToAFile) {
  SpanRecorder a(RankId(0), 8);
  a.record("x", "host", 0, 1);
  const std::vector<std::string> events = {chrome_trace_events(a, 0)};
  const auto path =
      std::filesystem::temp_directory_path() / ("sluice_trace_" + std::to_string(::getpid()) + ".json");
  write_chrome_trace(path, events);
  std::ifstream file(path);
  EXPECT_EQ(nlohmann::json::parse(file)["traceEvents"].size(), 3u);
  std::filesystem::remove(path);
  try {
    write_chrome_trace("/nowhere/trace.json", events);
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kIo);
    EXPECT_NE(e.message().find("/nowhere/trace.json"), std::string::npos);
  }
}

}  // namespace
}  // namespace sluice
