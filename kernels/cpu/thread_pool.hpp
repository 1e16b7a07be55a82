// A fixed set of workers for the loops inside one kernel call.
//
// The calling thread is worker 0; num_threads - 1 threads are started by the constructor and joined by the destructor.
// Idle workers spin a few microseconds and then sleep in the kernel: ranks are often threads of one process on few
// cores, so an idle worker must not burn a core. For the same reason the caller never waits for a worker that has not
// begun: it may be waiting for a core itself. With num_threads == 1 there are no threads and no synchronisation.
//
// Thread-safety: run() from one thread at a time. run() blocks until its own call and those of the workers that joined
// it have returned; the function must not throw and must not call run() again.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace sluice::kernels {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls function(0) on this thread and, meanwhile, function(worker) at most once on each other worker that gets
  // there in time. Work is shared by drawing from a counter inside the function, so that it is done when function(0)
  // finds none left, whoever took part.
  template <typename Function>
  void run(const Function& function) {
    if (workers_.empty()) return function(0);
    run_erased([](const void* f, int worker) noexcept { (*static_cast<const Function*>(f))(worker); },
               &function);
  }

 private:
  using Task = void (*)(const void*, int) noexcept;

  void run_erased(Task task, const void* argument);
  void work(int worker);
  bool enter(std::uint32_t round);
  void stop();

  Task task_ = nullptr;  // of the open round; read only by workers inside
  const void* argument_ = nullptr;
  std::atomic<bool> stop_{false};        // written before round_ is raised
  std::atomic<std::uint32_t> round_{0};  // raised once a run; what sleeping workers watch
  // The door of a round: its number << 32, kClosed once nobody may enter any more, and how many are inside.
  std::atomic<std::uint64_t> door_{0};
  std::vector<std::thread> workers_;
};

}  // namespace sluice::kernels
