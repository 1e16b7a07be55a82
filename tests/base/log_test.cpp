#include "sluice/base/log.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <thread>

namespace sluice {
namespace {

TEST(Log, LineCarriesLevelAndParts) {
  LogCapture capture;
  log_info("train step ", 3, " loss ", 0.5);
  log_warn("slow peer ", 2);
  ASSERT_EQ(capture.lines().size(), 2u);
  EXPECT_EQ(capture.lines()[0], "sluice info train step 3 loss 0.5");
  EXPECT_EQ(capture.lines()[1], "sluice warn slow peer 2");
  EXPECT_TRUE(capture.contains("peer 2"));
  EXPECT_FALSE(capture.contains("peer 3"));
}

TEST(Log, RankOfTheThreadThenOfTheProcess) {
  LogCapture capture;
  set_process_log_rank(7);
  log_info("a");
  {
    const LogRank rank(2);
    log_info("b");
    std::thread([] { log_info("c"); }).join();
  }
  log_info("d");
  set_process_log_rank(-1);
  log_info("e");
  EXPECT_EQ(capture.lines(),
            (std::vector<std::string>{"sluice info rank 7 a", "sluice info rank 2 b", "sluice info rank 7 c",
                                      "sluice info rank 7 d", "sluice info e"}));
}

TEST(Log, ALineStaysOneLine) {
  LogCapture capture;
  log_info("two\nlines\r and \x1b[31m red");
  ASSERT_EQ(capture.lines().size(), 1u);
  EXPECT_EQ(capture.lines()[0], "sluice info two\\nlines  and  [31m red");
}

TEST(Log, LevelsDropWhatIsLessImportant) {
  LogCapture capture;
  set_log_level(LogLevel::kWarn);
  log_error("1");
  log_warn("2");
  log_info("3");
  log_debug("4");
  EXPECT_EQ(capture.lines(), (std::vector<std::string>{"sluice error 1", "sluice warn 2"}));
  EXPECT_FALSE(log_enabled(LogLevel::kInfo));
  EXPECT_TRUE(log_enabled(LogLevel::kError));
}

TEST(Log, CaptureRestoresLevelAndSink) {
  const LogLevel before = log_level();
  LogCapture outer;
  {
    LogCapture inner;
    log_info("inner");
    EXPECT_EQ(inner.lines().size(), 1u);
  }
  log_info("outer");
  EXPECT_EQ(outer.lines(), std::vector<std::string>{"sluice info outer"});
  set_log_level(before);
}

// In a process of its own: in this one, counted lines fail the test that logs them (tests/support/main.cpp).
TEST(LogDeathTest, CountsErrorsAndWarningsOnStandardErrorOnly) {
  const auto count = [] {
    const LogCounts before = log_counts();
    {
      LogCapture capture;
      log_error("expected");
      log_warn("expected");
    }
    if (log_counts() != before) std::exit(1);
    log_error("unexpected ", 1);
    log_warn("unexpected ", 2);
    log_info("not counted");
    const LogCounts after = log_counts();
    std::exit(after.errors == before.errors + 1 && after.warnings == before.warnings + 1 ? 0 : 2);
  };
  EXPECT_EXIT(count(), testing::ExitedWithCode(0),
              "sluice error unexpected 1\nsluice warn unexpected 2\nsluice info not counted\n");
}

TEST(Log, ASinkThatThrowsIsNotTheCallersProblem) {
  LogSink previous = set_log_sink([](LogLevel, std::string_view) { throw 1; });
  EXPECT_NO_THROW(log_error("lost"));
  set_log_sink(std::move(previous));
}

TEST(Log, LinesOfManyThreadsAreWhole) {
  LogCapture capture;
  constexpr int kThreads = 4;
  constexpr int kLines = 200;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([t] {
      const LogRank rank(t);
      for (int i = 0; i < kLines; ++i) log_debug("line ", i);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<int> next(kThreads, 0);
  for (const std::string& line : capture.lines()) {
    int rank = -1;
    int i = -1;
    ASSERT_EQ(std::sscanf(line.c_str(), "sluice debug rank %d line %d", &rank, &i), 2) << line;
    ASSERT_TRUE(rank >= 0 && rank < kThreads) << line;
    EXPECT_EQ(i, next[static_cast<std::size_t>(rank)]++);
  }
  for (const int n : next) EXPECT_EQ(n, kLines);
}

}  // namespace
}  // namespace sluice
