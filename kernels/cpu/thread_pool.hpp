// A fixed set of workers for the loops inside one kernel call.
//
// The calling thread is worker 0; num_threads - 1 threads are started by the constructor and joined by the
// destructor. Idle workers spin a few microseconds and then sleep in the kernel: ranks are often threads of
// one process on few cores, so an idle worker must not burn a core. With num_threads == 1 there are no
// threads and no synchronisation.
//
// Thread-safety: run() from one thread at a time. run() blocks until every worker returned; the function must
// not throw and must not call run() again.
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

  // Calls function(worker) once for every worker 0..num_threads-1, each on its own thread.
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

  Task task_ = nullptr;
  const void* argument_ = nullptr;
  bool stop_ = false;                         // written before round_ is raised
  std::atomic<std::uint32_t> round_{0};       // raised once a run
  std::atomic<std::uint32_t> unfinished_{0};  // workers that have not returned from this round
  std::vector<std::thread> workers_;
};

}  // namespace sluice::kernels
