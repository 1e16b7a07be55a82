// Tables and progress lines.
#include <gtest/gtest.h>

#include <limits>

#include "sluice/base/error.hpp"
#include "sluice/base/progress.hpp"
#include "sluice/base/text_table.hpp"

namespace sluice {
namespace {

TEST(TextTable, AlignsNumbersToTheRight) {
  TextTable table({"phase", "us", "note"});
  table.add_row({"pack", "1.5", "ok"})
      .add_row({"gemm", "120.25", ""})
      .add_rule()
      .add_row({"caf\xc3\xa9", "-"});
  EXPECT_EQ(table.to_string(),
            "phase      us  note\n"
            "-------------------\n"
            "pack      1.5  ok\n"
            "gemm   120.25\n"
            "-------------------\n"
            "caf\xc3\xa9        -\n");
  EXPECT_EQ(table.num_rows(), 3u);
}

TEST(TextTable, EmptyAndWrong) {
  EXPECT_EQ(TextTable({"a", "b"}).to_string(), "a  b\n----\n");
  EXPECT_THROW(TextTable({}), Error);
  TextTable table({"a"});
  EXPECT_THROW(table.add_row({"1", "2"}), Error);
}

TEST(TextTable, Numbers) {
  EXPECT_EQ(fixed(3.14159, 2), "3.14");
  EXPECT_EQ(fixed(-0.5, 0), "-0");
  EXPECT_EQ(fixed(std::numeric_limits<double>::quiet_NaN(), 2), "-");
  EXPECT_EQ(fixed(std::numeric_limits<double>::infinity(), 2), "-");
  EXPECT_EQ(fixed(std::numeric_limits<double>::max(), 0).size(), 309u);
  EXPECT_EQ(bytes_text(0), "0 B");
  EXPECT_EQ(bytes_text(1023), "1023 B");
  EXPECT_EQ(bytes_text(1536), "1.50 KiB");
  EXPECT_EQ(bytes_text(-2 * 1024 * 1024), "-2.00 MiB");
  EXPECT_EQ(bytes_text(std::numeric_limits<std::int64_t>::max()), "8192.00 PiB");
  EXPECT_EQ(grouped(0), "0");
  EXPECT_EQ(grouped(999), "999");
  EXPECT_EQ(grouped(-1000), "-1 000");
  EXPECT_EQ(grouped(-100), "-100");
  EXPECT_EQ(grouped(1234567), "1 234 567");
}

TEST(Progress, SparseLinesWhereThereIsNoTerminal) {
  LogCapture capture;
  const Clock::time_point start = Clock::now();
  Progress progress("train", 1000, false);
  int texts = 0;
  for (int step = 1; step <= 1000; ++step)
    progress.update(
        step, [&] { return str("loss ", ++texts); }, start);
  const std::vector<std::string> lines = capture.lines();
  ASSERT_EQ(lines.size(), 11u);  // the first step, and each tenth
  EXPECT_EQ(lines.front(), "sluice info train step 1 of 1000 loss 1");
  EXPECT_EQ(lines[1], "sluice info train step 100 of 1000 loss 2");
  EXPECT_EQ(lines.back(), "sluice info train step 1000 of 1000 loss 11");
  EXPECT_EQ(texts, 11);
}

TEST(Progress, SlowJobsPrintByTime) {
  LogCapture capture;
  const Clock::time_point start = Clock::now();
  Progress progress("train", 1000000, false);
  const auto text = [] { return std::string("x"); };
  progress.update(1, text, start);
  progress.update(2, text, start + std::chrono::seconds(29));
  EXPECT_EQ(capture.lines().size(), 1u);
  progress.update(3, text, start + std::chrono::seconds(30));
  EXPECT_EQ(capture.lines().size(), 2u);
}

TEST(Progress, OnATerminalOnlyTheLastLineStays) {
  LogCapture capture;
  Progress progress("train", 3, true);
  for (int step = 1; step <= 3; ++step) progress.update(step, [] { return std::string("x"); });
  EXPECT_EQ(capture.lines(), std::vector<std::string>{"sluice info train step 3 of 3 x"});
  EXPECT_THROW(Progress("train", 0, false), Error);
}

}  // namespace
}  // namespace sluice
