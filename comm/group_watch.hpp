// The watchdog of a group of processes: who lives, who waits for whom, who is to blame, and that all ranks get the same
// answer. It speaks to the other ranks over one connection each (Control messages of wire.hpp), on the connections'
// thread, so a rank that computes still answers and a slow rank is told from a stopped one.
//
// The course of a failure: a wait passes its deadline -> for the suspicion window all ranks are asked what they wait
// for -> the sink of that graph is the culprit (watchdog.hpp) -> the verdict is proposed to the lowest rank that lives,
// whose answer goes to all; when it does not come in time, our own verdict stands. A connection that breaks without a
// farewell means that its process died: that is proposed at once, with what this rank waits for.
//
// Thread-safety: all public calls from any thread, but waiting(), advanced() and look() from the rank's own.
// Blocking: farewell() and flush(), for at most their span.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sluice/comm/net.hpp"
#include "sluice/comm/watchdog.hpp"

namespace sluice::comm {

class GroupWatch {
 public:
  struct Peer {
    std::string name;                             // "rank 3 (host b, pid 4711)"
    std::shared_ptr<net::Connection> connection;  // null for the own rank
  };
  // wake: called on the connections' thread when something happened that a waiter should see; must not block.
  GroupWatch(net::Loop& loop, RankId rank, std::uint32_t epoch, std::vector<Peer> peers,
             std::function<void()> wake);
  // The loop has stopped, or retire() was called and the connections have other handlers.
  ~GroupWatch();
  GroupWatch(const GroupWatch&) = delete;
  GroupWatch& operator=(const GroupWatch&) = delete;
  // Begins to read and to send heartbeats.
  void start();

  // ---- the rank's own thread

  // The rank does something other than waiting.
  void computing();
  // One turn of a wait: publishes it, asks, judges. `missing`: who owes something; `describe` gives what failed when
  // patience is over. Afterwards look at aborted().
  void waiting(std::span<const RankId> missing, std::string_view phase, std::int32_t chunk,
               const Patience& patience, Patience::Stage stage, std::uint64_t key,
               const std::function<FailedWait()>& describe);

  // ---- any thread

  bool abort(const AbortRecord& record) noexcept;
  bool aborted() const noexcept { return aborted_.load(std::memory_order_acquire); }
  // Aborted, or a rank has died: waiting() will say so.
  bool broken() const noexcept { return aborted() || died_.load(std::memory_order_acquire); }
  AbortRecord record() const;
  // A data path to the peer broke. Fatal unless the peer says farewell within a moment.
  void data_lost(std::int32_t peer, const std::string& why);
  const std::string& name(std::int32_t rank) const { return peers_[static_cast<std::size_t>(rank)].name; }
  // Whether the rank's process has ended or closed, as far as known.
  bool is_gone(std::int32_t rank) const;

  // Says farewell to all and waits until it is on its way.
  void farewell(std::chrono::nanoseconds span);
  // Waits until what was said is on its way.
  void flush(std::chrono::nanoseconds span);

  // After an abort: agrees with the other survivors on who is left, and returns them by their present ranks, ascending,
  // this one among them. Those that do not answer within `span` are left out. Throws kPeerLost when this rank was left
  // out, kTimeout when the survivors' lowest rank does not answer.
  std::vector<std::int32_t> agree_on_survivors(std::chrono::nanoseconds span);
  // Exchanges a text with those survivors: theirs in the same order. `number` tells exchanges apart. Throws kTimeout
  // naming who did not answer.
  std::vector<std::string> exchange(std::span<const std::int32_t> members, std::uint64_t number,
                                    const std::string& mine, Clock::time_point deadline);
  // Ends the heartbeats; the connections may be given to the watch of the next group. On the loop's thread.
  void retire() { alive_.reset(); }
  std::shared_ptr<net::Connection> connection(std::int32_t rank) const {
    return peers_[static_cast<std::size_t>(rank)].connection;
  }

 private:
  using Control = wire::Control;
  struct PeerState {
    Clock::time_point gone_at;       // the epoch = still there
    Clock::time_point data_lost_at;  // likewise
    bool died = false;               // gone without a farewell
    std::string why;
    Clock::time_point last_heard;
    std::uint64_t answered = 0;  // the last question it answered
    RankState state;
    bool regroups = false;
  };

  void heartbeat();
  void received(std::int32_t from, std::span<const std::byte> bytes);
  void handle(std::int32_t from, const Control& message);
  void closed(std::int32_t from, const std::string& why);
  void send(std::int32_t to, const Control& message);
  void send_to_all(const Control& message);
  void ask(Clock::time_point now, const Patience& patience);
  void answer(std::int32_t to, std::uint64_t question, Clock::time_point now);
  std::vector<RankState> states(Clock::time_point now) const;
  void propose(AbortRecord record, Clock::time_point now, const Patience& patience);
  bool record_abort(const AbortRecord& record, bool tell);
  AbortRecord died_record(const FailedWait& wait, std::int32_t culprit) const;
  std::chrono::nanoseconds since_last_call(Clock::time_point now) const;
  std::int32_t num_ranks() const { return static_cast<std::int32_t>(peers_.size()); }
  bool gone(std::int32_t rank) const {
    return peer_states_[static_cast<std::size_t>(rank)].gone_at != Clock::time_point();
  }

  net::Loop& loop_;
  const std::int32_t rank_;
  const std::uint32_t epoch_;
  std::vector<Peer> peers_;
  std::function<void()> wake_;
  std::shared_ptr<bool> alive_;  // for timers of the loop that outlive this object; of the loop's thread
  std::atomic<bool> aborted_{false}, died_{false};
  std::atomic<std::int64_t> last_call_ns_{-1};
  std::atomic<bool> computing_{true};  // the last call was no wait

  mutable std::mutex mutex_;  // guards the rest
  std::vector<PeerState> peer_states_;
  bool waiting_ = false;
  std::vector<std::int32_t> missing_;
  std::string_view phase_;
  std::int32_t chunk_ = -1;
  std::uint64_t question_ = 0;
  std::uint64_t first_question_ = 0;  // of the present suspicion
  bool asking_ = false;
  Clock::time_point next_question_;
  std::optional<AbortRecord> proposal_;
  std::uint64_t proposal_key_ = 0;
  Clock::time_point proposal_until_;
  AbortRecord record_;
  std::optional<std::vector<std::int32_t>> members_;                     // of the next group
  std::map<std::pair<std::uint64_t, std::int32_t>, std::string> cards_;  // by exchange and rank
};

}  // namespace sluice::comm
