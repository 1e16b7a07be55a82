#include "sluice/kernels/cpu/thread_pool.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>
#include <vector>

#include "sluice/base/error.hpp"

namespace sluice::kernels {
namespace {

TEST(ThreadPool, AllWorkIsDoneOnceWhoeverTakesPart) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (int round = 1; round <= 2000; ++round) {
      std::vector<int> calls(static_cast<std::size_t>(threads), 0), done(16, 0);
      std::atomic<std::size_t> next{0};
      pool.run([&](int worker) {
        ++calls[static_cast<std::size_t>(worker)];
        for (std::size_t i; (i = next.fetch_add(1)) < done.size();) ++done[i];
      });
      ASSERT_EQ(calls[0], 1);
      for (const int n : calls) ASSERT_LE(n, 1);
      for (const int n : done) ASSERT_EQ(n, 1);
    }
  }
}

TEST(ThreadPool, OthersJoinLongWork) {
  ThreadPool pool(3);
  std::atomic<int> joined{0};
  pool.run([&](int worker) {
    joined.fetch_or(1 << worker);
    // Worker 0 has work until the others came; they come within the deadline even on a loaded machine.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (worker == 0 && joined.load() != 7 && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
  });
  EXPECT_EQ(joined.load(), 7);
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
