// Runs the passes that a rank has in flight: the CPU lowering of their templates. An op is a function call, a counter
// wait is a comparison. Compute ops run on the calling thread (and its kernels' workers); link ops are posted by it
// between them, or by a progress thread while it computes.
//
// Several passes are in flight at once, the oldest first: whenever the rank blocks - in finish(), in the exchanges of a
// plan, in a collective - the ops of all of them go on.
//
// Thread-safety: one Executor serves one rank, calls come from one thread at a time. The progress thread takes its
// share of that turn only while the calling thread is inside a compute op; everything but kernels and the buffers they
// work on belongs to whoever holds the turn.
// Blocking: finish(). Errors: what an op or the transport throws comes out of the call that was running ops; the
// group has been ended by then.
#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "sluice/comm/transport.hpp"
#include "sluice/runtime.hpp"

namespace sluice {

class PassRun;

class Executor {
 public:
  Executor(Runtime& runtime, bool progress_thread);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // The pass must stay until finish() or remove(). Passes without expert work run as far as they need none.
  void add(PassRun& pass);
  void remove(PassRun& pass) noexcept;
  // Runs the ops of a pass that has just been added as far as they wait for nothing. So its rows leave before older
  // passes compute; without other passes the order is that of the template, and this does nothing.
  void send_off(PassRun& pass);
  // Runs ops of all passes in flight until this one is over, then closes it and takes it out.
  void finish(PassRun& pass);
  // Runs ops of all passes in flight as long as `going()`.
  template <typename Going>
  void run_while(const Going& going) {
    while (going())
      if (!step()) wait();
  }
  // Runs one op of any pass in flight; false if none may run.
  bool step();
  bool has_progress_thread() const { return thread_.joinable(); }

 private:
  friend class ComputeTurn;
  void wait();
  void make_progress();

  Runtime& runtime_;
  comm::Transport& transport_;
  std::vector<PassRun*> passes_;  // oldest first
  std::vector<comm::WaitSpec> pending_;

  // With a progress thread: it works only while `lent`, holding the lock; the calling thread takes the turn back under
  // the lock and needs none while it has it.
  std::mutex turn_;
  std::condition_variable lent_changed_;
  bool lent_ = false;
  bool stop_ = false;
  std::exception_ptr progress_error_;
  std::thread thread_;
};

// Lends the executor's turn to the progress thread, if there is one, while the calling thread computes.
class ComputeTurn {
 public:
  explicit ComputeTurn(Executor& executor);
  ~ComputeTurn();
  ComputeTurn(const ComputeTurn&) = delete;
  ComputeTurn& operator=(const ComputeTurn&) = delete;

 private:
  Executor& executor_;
};

}  // namespace sluice
