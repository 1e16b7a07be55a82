#include "sluice/kernels/cpu/thread_pool.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <ctime>
#include <thread>

#include "sluice/base/error.hpp"

namespace sluice::kernels {
namespace {

TEST(ThreadPool, EveryWorkerRunsOncePerRound) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    std::vector<int> calls(static_cast<std::size_t>(threads), 0);
    for (int round = 1; round <= 2000; ++round) {
      pool.run([&](int worker) { ++calls[static_cast<std::size_t>(worker)]; });
      for (const int n : calls) ASSERT_EQ(n, round);
    }
  }
}

TEST(ThreadPool, WorkersSleepWhenIdle) {
  ThreadPool pool(3);
  pool.run([](int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double busy_ms = 1e3 * static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  EXPECT_LT(busy_ms, 50.0) << "two idle workers used " << busy_ms << " ms of processor time in 200 ms";
  int runs = 0;
  pool.run([&](int worker) {
    if (worker == 0) ++runs;
  });
  EXPECT_EQ(runs, 1);
}

TEST(ThreadPool, NeedsAThread) {
  EXPECT_THROW(ThreadPool(0), Error);
}

}  // namespace
}  // namespace sluice::kernels
