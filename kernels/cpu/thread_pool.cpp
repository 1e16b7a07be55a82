#include "sluice/kernels/cpu/thread_pool.hpp"

#include "sluice/base/error.hpp"

namespace sluice::kernels {

namespace {

// About 5 us of polling, less than it costs to be woken up by the kernel.
constexpr int kSpins = 200;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Returns once `word` differs from `old`.
void wait_while_equal(const std::atomic<std::uint32_t>& word, std::uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause();
  }
  word.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  Require(num_threads >= 1, ErrorCode::kInvalidArgument, "num_threads is ", num_threads,
          ", must be at least 1");
  workers_.reserve(static_cast<std::size_t>(num_threads) - 1);
  try {
    for (int worker = 1; worker < num_threads; ++worker)
      workers_.emplace_back(&ThreadPool::work, this, worker);
  } catch (...) {
    this->~ThreadPool();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_erased(Task task, const void* argument) {
  task_ = task;
  argument_ = argument;
  unfinished_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  task(argument, 0);
  for (std::uint32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;)
    wait_while_equal(unfinished_, left);
}

void ThreadPool::work(int worker) {
  for (std::uint32_t seen = 0;;) {
    wait_while_equal(round_, seen);
    // A round can only be raised again after this worker finished it, so none is skipped.
    ++seen;
    if (stop_) return;
    task_(argument_, worker);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

}  // namespace sluice::kernels
