// A counter that a thread can sleep on: the waker bumps it, a sleeper wakes at once. Built on the Linux futex
// because a condition variable would put a lock into every put, and std::atomic::wait has no timeout.
//
// Thread-safety: any number of notifiers, any number of sleepers. Only wait() blocks.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

namespace sluice::comm {

class Event {
 public:
  // Take this before looking at the state that the sleeper waits for; wait() returns at once if it moved on
  // since.
  std::uint32_t ticket() const { return count_.load(std::memory_order_seq_cst); }

  void notify() {
    count_.fetch_add(1, std::memory_order_seq_cst);
    if (num_sleepers_.load(std::memory_order_seq_cst) != 0)
      syscall(SYS_futex, word(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // Sleeps until notify() or until `span` has passed; may wake early.
  void wait(std::uint32_t ticket, std::chrono::nanoseconds span) {
    if (span.count() <= 0) return;
    num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
    if (count_.load(std::memory_order_seq_cst) == ticket) {
      const timespec spec{static_cast<std::time_t>(span.count() / 1'000'000'000),
                          static_cast<long>(span.count() % 1'000'000'000)};
      syscall(SYS_futex, word(), FUTEX_WAIT_PRIVATE, ticket, &spec, nullptr, 0);
    }
    num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t),
                "a futex word is a plain 32-bit integer");
  std::uint32_t* word() { return reinterpret_cast<std::uint32_t*>(&count_); }

  std::atomic<std::uint32_t> count_{0};
  std::atomic<std::uint32_t> num_sleepers_{0};
};

}  // namespace sluice::comm
