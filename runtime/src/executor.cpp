#include "sluice/runtime/src/executor.hpp"

#include <algorithm>

#include "sluice/base/telemetry.hpp"
#include "sluice/runtime/src/pass_run.hpp"

namespace sluice {
namespace {
// Between two looks of the progress thread when nothing moves.
constexpr std::chrono::microseconds kLook{20};
}  // namespace

Executor::Executor(Runtime& runtime, bool progress_thread)
    : runtime_(runtime), transport_(runtime.transport()) {
  transport_.set_idle_work([this] { return step(); });
  if (progress_thread) thread_ = std::thread([this] { make_progress(); });
}

Executor::~Executor() {
  transport_.set_idle_work({});
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(turn_);
    stop_ = true;
  }
  lent_changed_.notify_all();
  thread_.join();
}

void Executor::add(PassRun& pass) {
  passes_.push_back(&pass);
  // How many waits are open at once is a matter of timing; room for all of them is not.
  std::size_t num_waits = 0;
  for (const PassRun* p : passes_) num_waits += p->num_waits();
  pending_.reserve(num_waits);
}

void Executor::send_off(PassRun& pass) {
  if (passes_.size() < 2) return;
  while (pass.step()) {
    transport_.advanced();
    transport_.progress();
  }
}

void Executor::remove(PassRun& pass) noexcept {
  passes_.erase(std::remove(passes_.begin(), passes_.end(), &pass), passes_.end());
}

bool Executor::step() {
  for (PassRun* pass : passes_) {
    if (!pass->step()) continue;
    if (progress_error_) std::rethrow_exception(std::exchange(progress_error_, nullptr));
    transport_.advanced();
    transport_.progress();
    return true;
  }
  return false;
}

void Executor::finish(PassRun& pass) {
  run_while([&] { return !pass.done(); });
  remove(pass);
  pass.close();
}

void Executor::wait() {
  const Span span(runtime_.recorder(), "wait", "idle");
  if (transport_.progress()) return;
  pending_.clear();
  bool may_run = false;
  for (const PassRun* pass : passes_) may_run |= pass->add_pending(pending_);
  if (may_run) return;  // signals came in the meantime
  Require(!pending_.empty(), ErrorCode::kInternal, "passes in flight have ops left that nothing can release");
  transport_.idle(pending_).throw_if_error();
}

void Executor::make_progress() {
  std::unique_lock lock(turn_);
  while (true) {
    lent_changed_.wait(lock, [&] { return lent_ || stop_; });
    if (stop_) return;
    bool moved = false;
    try {
      moved = transport_.progress();
      for (PassRun* pass : passes_)
        while (pass->post()) moved = true;
    } catch (...) {
      progress_error_ = std::current_exception();
      lent_ = false;  // until the next compute op
      continue;
    }
    // The lock is given up even when things move: the calling thread may be waiting for its turn.
    lock.unlock();
    if (moved) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kLook);
    }
    lock.lock();
  }
}

ComputeTurn::ComputeTurn(Executor& executor) : executor_(executor) {
  if (!executor_.has_progress_thread()) return;
  {
    const std::lock_guard lock(executor_.turn_);
    executor_.lent_ = true;
  }
  executor_.lent_changed_.notify_one();
}

ComputeTurn::~ComputeTurn() {
  if (!executor_.has_progress_thread()) return;
  const std::lock_guard lock(executor_.turn_);
  executor_.lent_ = false;
}

}  // namespace sluice
