// A transport that does what a broken rank does, at a chosen place of a training step. It passes everything on to the
// transport it wraps until then.
//
// Where a rank is in a step is told from what it does: puts of the plan's first exchange have a size that nothing else
// has (`summary_bytes`), puts on a channel of a layer belong to a pass, and a wait names its phase.
#pragma once

#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sluice/base/clock.hpp"
#include "sluice/comm/transport.hpp"

namespace sluice::testing {

enum class Fault {
  kNone,
  kVanish,   // the rank's thread stops for good, without a word
  kLate,     // it computes and computes, and is seen to live
  kThrow,    // an error of its own
  kKill,     // SIGKILL
  kStop,     // SIGSTOP
  kCut,      // all its connections break
  kSlow,     // every put is slow; nothing is wrong
  kLie,      // counts of the plan that are not true
  kGarbage,  // row headers of the plan that are random bytes
  kOther,    // the agreement hash of another configuration
};

enum class Place { kStart, kPlan, kDispatch, kCombine, kBackward, kAllReduce };

struct FaultSpec {
  Fault fault = Fault::kNone;
  Place place = Place::kPlan;
  int count = 1;  // at the count-th time it is there
  std::uint64_t seed = 0;
  std::size_t summary_bytes = 0;
  std::function<void()> triggered;  // called once, right before
};

class FaultyTransport final : public comm::Transport {
 public:
  FaultyTransport(std::unique_ptr<comm::Transport> inner, FaultSpec spec)
      : inner_(std::move(inner)), spec_(std::move(spec)), random_(spec_.seed) {}

  std::string_view name() const override { return inner_->name(); }
  comm::Caps caps() const override { return inner_->caps(); }
  comm::Perf perf(RankId peer) const override { return inner_->perf(peer); }
  RankId rank() const override { return inner_->rank(); }
  const Topology& topology() const override { return inner_->topology(); }
  void open_channel(std::uint32_t channel, std::uint32_t windows, std::uint32_t signals) override {
    inner_->open_channel(channel, windows, signals);
  }
  void set_window(std::uint32_t channel, std::uint32_t window, std::span<std::byte> memory) override {
    inner_->set_window(channel, window, memory);
  }
  std::shared_ptr<comm::PutMemory> put_memory() override { return inner_->put_memory(); }
  void expect(std::span<const comm::Expect> expects) override { inner_->expect(expects); }

  void put(const comm::Put& put) override {
    follow(put);
    if (put.channel != 0) {
      at(after_loss_ ? Place::kBackward : Place::kDispatch);
    } else if (stage_ == Stage::kSummary) {
      if (place_ != Place::kPlan) after_loss_ = false;
      at(Place::kPlan);
    }
    if (slow_) std::this_thread::sleep_for(std::chrono::microseconds(500));
    comm::Put sent = put;
    if (wants_tampering(put)) {
      // The source must live until the put is complete, so it is kept for good.
      const auto& copy = kept_.emplace_back(tampered(put.source));
      sent.source = copy;
      if (spec_.triggered) spec_.triggered();
      tamper_ = false;
    }
    inner_->put(sent);
  }
  std::optional<comm::LinkTime> last_link_time() const override { return inner_->last_link_time(); }
  bool progress() override { return inner_->progress(); }
  std::uint64_t signal(std::uint32_t channel, std::uint32_t signal) const override {
    return inner_->signal(channel, signal);
  }
  std::uint64_t puts_completed(std::uint32_t channel) const override {
    return inner_->puts_completed(channel);
  }
  std::vector<RankId> missing(std::uint32_t channel, std::uint32_t signal) const override {
    return inner_->missing(channel, signal);
  }
  bool abort(const comm::AbortRecord& record) noexcept override { return inner_->abort(record); }
  bool aborted() const noexcept override { return inner_->aborted(); }
  bool broken() const noexcept override { return inner_->broken(); }
  comm::AbortRecord abort_record() const override { return inner_->abort_record(); }
  void set_timeout(std::chrono::nanoseconds timeout) override { inner_->set_timeout(timeout); }
  std::chrono::nanoseconds timeout() const override { return inner_->timeout(); }
  void advanced() override { inner_->advanced(); }
  comm::Survivors survivors(std::chrono::nanoseconds span) override { return inner_->survivors(span); }

  Status idle(std::span<const comm::WaitSpec> pending) override {
    const std::string_view phase = pending.empty() ? std::string_view() : pending[0].phase;
    if (phase == "plan") {
      if (place_ != Place::kPlan) after_loss_ = false;
      at(Place::kPlan);
    } else if (phase == "dispatch" || phase == "experts") {
      at(after_loss_ ? Place::kBackward : Place::kDispatch);
    } else if (phase == "combine") {
      at(after_loss_ ? Place::kBackward : Place::kCombine);
    } else if (phase == "loss and policy") {
      after_loss_ = true;
      at(Place::kAllReduce);
    } else if (phase == "gradients" || phase == "gradient norm") {
      at(Place::kAllReduce);
    } else if (place_ == Place::kStart && !phase.empty()) {
      at(Place::kStart);
    }
    return inner_->idle(pending);
  }

 private:
  void at(Place place) {
    place_ = place;
    if (done_ || spec_.fault == Fault::kNone || place != spec_.place || ++seen_ < spec_.count) return;
    done_ = true;
    act();
  }

  void act() {
    const bool tampers =
        spec_.fault == Fault::kLie || spec_.fault == Fault::kGarbage || spec_.fault == Fault::kOther;
    if (tampers) {
      tamper_ = true;  // at the next message of that kind
      return;
    }
    if (spec_.triggered) spec_.triggered();
    switch (spec_.fault) {
      case Fault::kVanish:
        until_aborted(false);
        return;
      case Fault::kLate:
        until_aborted(true);
        return;
      case Fault::kThrow:
        throw Error(ErrorCode::kOutOfMemory, "an injected error");
      case Fault::kKill:
        raise(SIGKILL);
        return;
      case Fault::kStop:
        raise(SIGSTOP);
        return;
      case Fault::kCut:
        cut();
        return;
      case Fault::kSlow:
        slow_ = true;
        return;
      default:
        return;
    }
  }

  void until_aborted(bool alive) {
    const auto until = Clock::now() + std::chrono::seconds(60);
    while (!inner_->aborted() && Clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      if (alive) inner_->advanced();
    }
  }

  // As if the cable was pulled: every connected socket of this process is dead.
  static void cut() {
    for (int fd = 3; fd < 1024; ++fd) {
      sockaddr_storage address{};
      socklen_t size = sizeof address;
      if (getpeername(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
          (address.ss_family == AF_INET || address.ss_family == AF_INET6))
        shutdown(fd, SHUT_RDWR);
    }
  }

  // Where in a plan's exchanges the rank is: sizes alone would not do, a header may have any.
  enum class Stage { kNone, kSummary, kCounts, kOffsets, kHeaders };
  static constexpr std::size_t kCountsBytes = 48, kOffsetsBytes = 32;

  // It begins with the rank's number of tokens; sums, which may have its size, are floating-point numbers.
  bool is_summary(const comm::Put& put) const {
    if (put.source.size() != spec_.summary_bytes) return false;
    std::int64_t tokens = 0;
    std::memcpy(&tokens, put.source.data(), sizeof tokens);
    return tokens > 0 && tokens < 4096;
  }

  void follow(const comm::Put& put) {
    const std::size_t size = put.source.size();
    if (put.channel != 0)
      stage_ = Stage::kNone;
    else if (stage_ <= Stage::kSummary)
      stage_ = is_summary(put)                                     ? Stage::kSummary
               : stage_ == Stage::kSummary && size == kCountsBytes ? Stage::kCounts
                                                                   : Stage::kNone;
    else if (stage_ == Stage::kCounts && size == kOffsetsBytes)
      stage_ = Stage::kOffsets;
    else if (stage_ == Stage::kOffsets && size != kOffsetsBytes)
      stage_ = Stage::kHeaders;
  }

  bool wants_tampering(const comm::Put& put) const {
    if (!tamper_ || put.channel != 0 || put.source.empty()) return false;
    if (spec_.fault == Fault::kOther) return stage_ == Stage::kSummary;
    // To a peer of the node: between nodes rows go through a gateway, and whether it or the source lies nobody can tell.
    if (!topology().same_node(rank(), put.peer)) return false;
    return stage_ == (spec_.fault == Fault::kLie ? Stage::kCounts : Stage::kHeaders);
  }

  std::vector<std::byte> tampered(std::span<const std::byte> source) {
    std::vector<std::byte> out(source.begin(), source.end());
    if (spec_.fault == Fault::kGarbage) {
      for (std::byte& b : out) b = static_cast<std::byte>(random_());
      return out;
    }
    std::int64_t words[2];
    std::memcpy(words, out.data(), sizeof words);
    if (spec_.fault == Fault::kOther) {
      words[1] ^= static_cast<std::int64_t>(random_() | 1);
    } else {
      // Rows and routes for this peer: a few more, many more, negative, or the routes alone.
      switch (random_() % 5) {
        case 0:
          ++words[0], ++words[1];
          break;
        case 1:
          words[0] = words[1] = std::int64_t{1} << (20 + random_() % 40);
          break;
        case 2:
          words[0] = -1 - static_cast<std::int64_t>(random_() % 1000);
          break;
        case 3:
          ++words[1];
          break;
        default:
          words[1] = INT64_MIN;
          break;
      }
    }
    std::memcpy(out.data(), words, sizeof words);
    return out;
  }

  std::unique_ptr<comm::Transport> inner_;
  FaultSpec spec_;
  std::mt19937_64 random_;
  std::deque<std::vector<std::byte>> kept_;
  Place place_ = Place::kStart;
  bool after_loss_ = false;  // this step's loss has been exchanged: passes are backward ones
  bool done_ = false, tamper_ = false, slow_ = false;
  int seen_ = 0;
  Stage stage_ = Stage::kNone;
};

}  // namespace sluice::testing
