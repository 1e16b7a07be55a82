#include "sluice/kernels/cpu/thread_pool.hpp"

#include "sluice/base/error.hpp"

namespace sluice::kernels {

namespace {

// A few microseconds of polling, less than it costs to be woken up by the kernel.
constexpr int kSpins = 200;
constexpr std::uint64_t kClosed = std::uint64_t{1} << 31;
constexpr std::uint64_t kInside = kClosed - 1;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Returns once `word` differs from `old`.
template <typename T>
void wait_while_equal(const std::atomic<T>& word, T old) {
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
  door_.store(kClosed, std::memory_order_relaxed);
  workers_.reserve(static_cast<std::size_t>(num_threads) - 1);
  try {
    for (int worker = 1; worker < num_threads; ++worker)
      workers_.emplace_back(&ThreadPool::work, this, worker);
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::stop() {
  stop_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_erased(Task task, const void* argument) {
  task_ = task;
  argument_ = argument;
  const std::uint32_t round = round_.load(std::memory_order_relaxed) + 1;
  door_.store(std::uint64_t{round} << 32, std::memory_order_release);
  round_.store(round, std::memory_order_release);
  round_.notify_all();
  task(argument, 0);
  std::uint64_t door = door_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
  while ((door & kInside) != 0) {
    wait_while_equal(door_, door);
    door = door_.load(std::memory_order_acquire);
  }
}

// False when the round is closed or over.
bool ThreadPool::enter(std::uint32_t round) {
  std::uint64_t door = door_.load(std::memory_order_acquire);
  while (door >> 32 == round && (door & kClosed) == 0)
    if (door_.compare_exchange_weak(door, door + 1, std::memory_order_acq_rel, std::memory_order_acquire))
      return true;
  return false;
}

void ThreadPool::work(int worker) {
  for (std::uint32_t seen = 0;;) {
    wait_while_equal(round_, seen);
    seen = round_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;
    if (!enter(seen)) continue;
    task_(argument_, worker);
    const std::uint64_t before = door_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kClosed) != 0) door_.notify_one();
  }
}

}  // namespace sluice::kernels
