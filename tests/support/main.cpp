// The main of every test program: a test that logs a warning or an error it did not take with a LogCapture fails.
#include <gtest/gtest.h>

#include "sluice/base/log.hpp"

namespace {

class UnexpectedLogFails : public testing::EmptyTestEventListener {
  void OnTestStart(const testing::TestInfo&) override { before_ = sluice::log_counts(); }
  void OnTestEnd(const testing::TestInfo&) override {
    const sluice::LogCounts now = sluice::log_counts();
    if (now != before_)
      ADD_FAILURE() << "the test logged " << now.errors - before_.errors << " errors and "
                    << now.warnings - before_.warnings
                    << " warnings (see standard error); take expected ones with sluice::LogCapture";
  }
  sluice::LogCounts before_;
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new UnexpectedLogFails);  // owned by GoogleTest
  return RUN_ALL_TESTS();
}
