// Ranks are threads of one process. A put over an unlimited link is a copy by the sender and two counters; it
// takes no lock. A put over a limited link is booked on the link's calendar and landed by the delivery thread
// of the group.
//
// Lifetime: the transports share the Group; the last one to go joins the delivery thread. A transport that
// closes first lets its own booked puts land (unless the group is aborted or an exception unwinds, when the
// sources may be gone), then shuts its windows and waits for copies under way, so that its memory may be
// freed afterwards.
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "sluice/comm/event.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/comm/watchdog.hpp"

namespace sluice::comm {
namespace {

using std::chrono::microseconds;
using std::chrono::nanoseconds;

constexpr std::uint32_t kMaxChannels = 1u << 20;  // a bound for nonsense, not a resource
constexpr std::uint32_t kCollectivesChannel = 0;  // collectives.hpp
constexpr nanoseconds kDeliverySpin =
    microseconds(60);                           // timers wake late by about this much on a busy machine
constexpr std::int64_t kCopyPiece = 256 << 10;  // how long the delivery thread may be away from its calendar
constexpr double kCopyBytesPerS = 1e9;          // pessimistic, so that copies end before they are due
constexpr nanoseconds kYieldSpan = microseconds(40);  // a waiter yields this long before it sleeps
constexpr nanoseconds kShortSleep = microseconds(100);
constexpr nanoseconds kLongSleep =
    microseconds(500);  // after kPatientAfter; an arriving put wakes at once anyway
constexpr nanoseconds kPatientAfter = std::chrono::milliseconds(5);
constexpr nanoseconds kWaitingIsFresh =
    std::chrono::milliseconds(250);  // idle() repeats at least every kLongSleep

std::int64_t now_ns() {
  return Clock::now().time_since_epoch().count();
}

struct WindowState {
  // Peers read them after this rank's ready signal; atomic because a put that came too early looks as well.
  std::atomic<std::byte*> data{nullptr};
  std::atomic<std::int64_t> bytes{0};
};

struct SignalState {
  explicit SignalState(std::size_t num_ranks) : landed(num_ranks), expected(num_ranks, 0) {}
  std::atomic<std::uint64_t> total{0};
  std::vector<std::atomic<std::uint64_t>> landed;  // [num_ranks], by source
  std::vector<std::uint64_t> expected;             // [num_ranks], by source; the owner's alone
};

// A channel of one rank. Peers read the table without a lock; the owner replaces it when the channel grows
// and keeps the old ones (a few pointers each) because a peer may still read them.
struct Channel {
  struct Table {
    std::vector<WindowState*> windows;
    std::vector<SignalState*> signals;
  };
  std::atomic<const Table*> table{nullptr};
  std::atomic<std::uint64_t> completed{0};  // own puts
  std::vector<std::unique_ptr<const Table>> tables;
  std::vector<std::unique_ptr<WindowState>> windows;
  std::vector<std::unique_ptr<SignalState>> signals;
};

struct ChannelTable {
  explicit ChannelTable(std::size_t size) : slots(size) {}
  std::vector<std::atomic<Channel*>> slots;
};

struct Transfer {
  std::size_t source = 0;
  std::size_t peer = 0;
  std::uint32_t channel = 0;
  std::uint32_t window = 0;
  std::uint32_t signal = 0;
  std::int64_t offset_bytes = 0;
  std::span<const std::byte> bytes;
  Channel* source_channel = nullptr;
  std::int64_t window_bytes = 0;  // as last seen
  std::int64_t copied_bytes = 0;  // a delivery may copy ahead of its due time
  Clock::time_point due;
  std::uint64_t order = 0;
};

enum class Landing {
  kDone,
  kNotReady,  // the peer has not opened the channel or set the window yet
  kClosed,    // the peer is gone, or the group is aborted
  kOutside,   // beyond the peer's window
};

// One rank as the others see it.
struct alignas(64) Endpoint {
  explicit Endpoint(std::size_t num_ranks)
      : outstanding_to(num_ranks), out_free{}, in_free{}, waits((num_ranks + 63) / 64) {}

  // Peers' puts
  std::atomic<const ChannelTable*> channels{nullptr};
  std::atomic<std::int32_t> num_writers{0};  // copies into this rank's windows under way
  std::atomic<std::int32_t> num_readers{0};  // copies from its sources by other threads under way
  std::atomic<bool> closed{false};
  Event arrivals;

  // Own puts not landed yet
  std::vector<std::atomic<std::int64_t>> outstanding_to;  // [num_ranks]
  std::atomic<std::int64_t> outstanding{0};

  // Puts that came before the channel was opened or the window set.
  std::mutex parked_mutex;
  std::vector<Transfer> parked;

  // When the rank's links are free: [in_node, across_nodes]. Guarded by the calendar's mutex.
  Clock::time_point out_free[2];
  Clock::time_point in_free[2];
  Clock::time_point collective_out_free[2] = {};
  Clock::time_point collective_in_free[2] = {};

  // The rank's line in the table of who waits for whom.
  std::atomic<bool> waiting{false};
  std::atomic<std::int64_t> heartbeat_ns{-1};
  std::mutex row_mutex;              // guards the rest; taken by idle() and by who judges
  std::vector<std::uint64_t> waits;  // bit r = waits for rank r
  std::string_view phase;            // static storage
  std::int32_t chunk = -1;
};

Channel* find_channel(const Endpoint& endpoint, std::uint32_t channel) {
  const ChannelTable* table = endpoint.channels.load(std::memory_order_acquire);
  if (table == nullptr || channel >= table->slots.size()) return nullptr;
  return table->slots[channel].load(std::memory_order_acquire);
}

class Group {
 public:
  explicit Group(const Topology& topology) : topology_(topology) {
    const auto n = static_cast<std::size_t>(topology.num_ranks());
    for (std::size_t r = 0; r < n; ++r) endpoints_.push_back(std::make_unique<Endpoint>(n));
    if (topology.in_node.limited() || topology.across_nodes.limited())
      delivery_ = std::thread([this] { deliver(); });
  }
  ~Group() {
    if (!delivery_.joinable()) return;
    stop_.store(true);
    calendar_event_.notify();
    delivery_.join();
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  const Topology& topology() const { return topology_; }
  Endpoint& endpoint(std::size_t rank) { return *endpoints_[rank]; }
  std::size_t num_ranks() const { return endpoints_.size(); }

  // Copies up to limit_bytes of what is left and, when all is there and `finish`, raises the signal.
  Landing land(Transfer& t, std::int64_t limit_bytes, bool finish) {
    Endpoint& to = *endpoints_[t.peer];
    // Announce the copy, then look whether the peer has closed; close() does the opposite. One of the two
    // sees the other.
    to.num_writers.fetch_add(1, std::memory_order_seq_cst);
    const Landing landing = land_announced(to, t, limit_bytes, finish);
    to.num_writers.fetch_sub(1, std::memory_order_seq_cst);
    if (landing == Landing::kDone && finish) to.arrivals.notify();
    return landing;
  }

  // Lands a booked or parked put, whose source's owner is not the caller.
  Landing land_for_other(Transfer& t, std::int64_t limit_bytes, bool finish) {
    Endpoint& from = *endpoints_[t.source];
    from.num_readers.fetch_add(1, std::memory_order_seq_cst);
    const Landing landing = land(t, limit_bytes, finish);
    from.num_readers.fetch_sub(1, std::memory_order_seq_cst);
    return landing;
  }

  // After an abort: returns when nobody reads the rank's sources or writes its windows any more. A copy that began
  // before the abort goes on to its end; none begins afterwards.
  void quiesce(std::size_t rank) {
    const Endpoint& self = *endpoints_[rank];
    while (self.num_writers.load(std::memory_order_seq_cst) != 0 ||
           self.num_readers.load(std::memory_order_seq_cst) != 0)
      sched_yield();
  }

  // Lands a put now or, when its peer is not ready for it, leaves it with the peer.
  Landing land_or_park(Transfer& t) {
    Landing landing = land_for_other(t, INT64_MAX, true);
    if (landing != Landing::kNotReady) return landing;
    Endpoint& to = *endpoints_[t.peer];
    // Look again under the lock that unpark() takes after the peer became ready: one of the two lands it.
    const std::lock_guard lock(to.parked_mutex);
    landing = land_for_other(t, INT64_MAX, true);
    if (landing == Landing::kNotReady) to.parked.push_back(t);
    return landing;
  }

  // The owner of `rank` became ready for more.
  void unpark(std::size_t rank) {
    Endpoint& to = *endpoints_[rank];
    const std::lock_guard lock(to.parked_mutex);
    std::erase_if(to.parked, [&](Transfer& t) {
      const Landing landing = land_for_other(t, INT64_MAX, true);
      if (landing == Landing::kNotReady) return false;
      account_late(t, landing);
      return true;
    });
  }

  // A put that did not land inside put(): tells its source.
  void account_late(const Transfer& t, Landing landing) {
    Endpoint& from = *endpoints_[t.source];
    if (landing == Landing::kDone) {
      from.outstanding_to[t.peer].fetch_sub(1, std::memory_order_relaxed);
      from.outstanding.fetch_sub(1, std::memory_order_release);
      from.arrivals.notify();
    } else if (!aborted()) {
      abort(undeliverable(t, landing));
    }
  }

  AbortRecord undeliverable(const Transfer& t, Landing landing) const {
    AbortRecord record;
    record.reporter = RankId(static_cast<std::int32_t>(t.source));
    if (landing == Landing::kOutside) {
      record.culprit = record.reporter;
      record.status = {ErrorCode::kInvalidArgument, outside_message(t)};
    } else {
      record.culprit = RankId(static_cast<std::int32_t>(t.peer));
      record.status = {
          ErrorCode::kPeerLost,
          str("rank ", t.source, " put ", t.bytes.size(), " bytes to rank ", t.peer, " (channel ", t.channel,
              ", signal ", t.signal, "), which has closed its transport; read its own error first")};
    }
    return record;
  }

  static std::string outside_message(const Transfer& t) {
    return str("rank ", t.source, " put bytes ", t.offset_bytes, "..",
               t.offset_bytes + static_cast<std::int64_t>(t.bytes.size()), " into window ", t.window,
               " of channel ", t.channel, " of rank ", t.peer, ", which has ", t.window_bytes,
               " bytes; sender and receiver must follow the same plan");
  }

  bool limited(std::size_t a, std::size_t b) const { return a != b && link(a, b).limited(); }
  const LinkSpeed& link(std::size_t a, std::size_t b) const {
    return topology_.link(RankId(static_cast<std::int32_t>(a)), RankId(static_cast<std::int32_t>(b)));
  }

  // Books the put on the outgoing link of its source and the incoming link of its peer, both full duplex and
  // one per level: it starts when both are free, holds them for bytes / bandwidth, and is due the latency
  // later. Collectives wait for each other only, not for rows booked before them, and rows booked after them
  // wait longer: on a real link, packets of a small message pass between those of a large one.
  LinkTime book(const Transfer& t) {
    Endpoint& from = *endpoints_[t.source];
    Endpoint& to = *endpoints_[t.peer];
    const LinkSpeed& speed = link(t.source, t.peer);
    const int level = &speed == &topology_.in_node ? 0 : 1;
    const nanoseconds span(
        speed.bytes_per_s > 0
            ? static_cast<std::int64_t>(static_cast<double>(t.bytes.size()) / speed.bytes_per_s * 1e9)
            : 0);
    from.outstanding_to[t.peer].fetch_add(1, std::memory_order_relaxed);
    from.outstanding.fetch_add(1, std::memory_order_relaxed);
    bool is_next = false;
    LinkTime time;
    {
      const std::lock_guard lock(calendar_mutex_);
      Transfer* booked = nullptr;
      if (spare_.empty()) {
        pool_.push_back(std::make_unique<Transfer>());
        booked = pool_.back().get();
      } else {
        booked = spare_.back();
        spare_.pop_back();
      }
      *booked = t;
      const bool collective = t.channel == kCollectivesChannel;
      Clock::time_point start = Clock::now();
      if (collective) {
        start = std::max({start, from.collective_out_free[level], to.collective_in_free[level]});
        from.collective_out_free[level] = to.collective_in_free[level] = start + span;
        from.out_free[level] = std::max(from.out_free[level], start) + span;
        to.in_free[level] = std::max(to.in_free[level], start) + span;
      } else {
        start = std::max({start, from.out_free[level], to.in_free[level]});
        from.out_free[level] = to.in_free[level] = start + span;
      }
      time = {start, start + span};
      booked->due = start + span + speed.latency;
      booked->order = next_order_++;
      calendar_.push_back(booked);
      std::push_heap(calendar_.begin(), calendar_.end(), later);
      is_next = calendar_.front() == booked;
    }
    if (is_next) calendar_event_.notify();
    return time;
  }

  // Removes what `rank` has put and not landed; its sources may be gone afterwards.
  void withdraw(std::size_t rank) {
    if (delivery_.joinable()) {
      while (true) {
        {
          const std::lock_guard lock(calendar_mutex_);
          if (busy_ == nullptr || busy_->source != rank) {
            std::erase_if(calendar_, [&](Transfer* t) {
              if (t->source != rank) return false;
              spare_.push_back(t);
              return true;
            });
            std::make_heap(calendar_.begin(), calendar_.end(), later);
            break;
          }
        }
        sched_yield();  // at most one piece of a copy
      }
    }
    for (const auto& peer : endpoints_) {
      const std::lock_guard lock(peer->parked_mutex);
      std::erase_if(peer->parked, [&](const Transfer& t) { return t.source == rank; });
    }
  }

  bool abort(const AbortRecord& record) noexcept {
    {
      const std::lock_guard lock(abort_mutex_);
      if (aborted()) return false;
      try {
        record_ = record;
        if (record_.status.ok())
          record_.status = {ErrorCode::kAborted, str("rank ", record.reporter.value, " ended the group")};
      } catch (...) {  // out of memory: the code says enough
        record_.status.code = record.status.ok() ? ErrorCode::kAborted : record.status.code;
      }
      aborted_.store(true, std::memory_order_seq_cst);
    }
    for (const auto& endpoint : endpoints_) endpoint->arrivals.notify();
    return true;
  }
  bool aborted() const noexcept { return aborted_.load(std::memory_order_acquire); }
  AbortRecord abort_record() const {
    const std::lock_guard lock(abort_mutex_);
    return record_;
  }

  void close(std::size_t rank, bool lossy) {
    Endpoint& self = *endpoints_[rank];
    if (!lossy) {
      // Booked puts land by themselves at their due time. Parked ones depend on the peer and are given up.
      while (!aborted() && self.outstanding.load(std::memory_order_acquire) > num_parked_from(rank)) {
        const std::uint32_t ticket = self.arrivals.ticket();
        if (self.outstanding.load(std::memory_order_acquire) == 0) break;
        self.arrivals.wait(ticket, kLongSleep);
      }
    }
    withdraw(rank);
    self.closed.store(true, std::memory_order_seq_cst);
    while (self.num_writers.load(std::memory_order_seq_cst) != 0) sched_yield();
    {
      const std::lock_guard lock(self.parked_mutex);
      self.parked.clear();
    }
    for (const auto& endpoint : endpoints_) endpoint->arrivals.notify();
  }

  std::vector<RankState> states() const {
    std::vector<RankState> states(endpoints_.size());
    const std::int64_t now = now_ns();
    for (std::size_t r = 0; r < states.size(); ++r) {
      Endpoint& endpoint = *endpoints_[r];
      RankState& state = states[r];
      const std::int64_t heartbeat = endpoint.heartbeat_ns.load(std::memory_order_relaxed);
      if (heartbeat >= 0) state.last_sign = nanoseconds(std::max<std::int64_t>(0, now - heartbeat));
      if (endpoint.closed.load(std::memory_order_acquire)) {
        state.kind = RankState::Kind::kGone;
      } else if (endpoint.waiting.load(std::memory_order_acquire) && state.last_sign <= kWaitingIsFresh) {
        state.kind = RankState::Kind::kWaiting;
        const std::lock_guard lock(endpoint.row_mutex);
        for (std::size_t p = 0; p < states.size(); ++p)
          if (endpoint.waits[p / 64] >> (p % 64) & 1)
            state.waits_for.push_back(RankId(static_cast<std::int32_t>(p)));
        state.phase = endpoint.phase;
        state.chunk = endpoint.chunk;
      } else {
        state.kind = RankState::Kind::kComputing;
      }
    }
    return states;
  }

 private:
  static bool later(const Transfer* a, const Transfer* b) {
    return a->due != b->due ? a->due > b->due : a->order > b->order;
  }

  Landing land_announced(Endpoint& to, Transfer& t, std::int64_t limit_bytes, bool finish) {
    if (to.closed.load(std::memory_order_seq_cst) || aborted_.load(std::memory_order_seq_cst))
      return Landing::kClosed;
    const Channel* channel = find_channel(to, t.channel);
    if (channel == nullptr) return Landing::kNotReady;
    const Channel::Table* table = channel->table.load(std::memory_order_acquire);
    if (t.signal >= table->signals.size()) return Landing::kNotReady;
    const auto num_bytes = static_cast<std::int64_t>(t.bytes.size());
    if (num_bytes > 0) {
      if (t.window >= table->windows.size()) return Landing::kNotReady;
      const WindowState& window = *table->windows[t.window];
      std::byte* data = window.data.load(std::memory_order_seq_cst);
      if (data == nullptr) return Landing::kNotReady;
      t.window_bytes = window.bytes.load(std::memory_order_relaxed);
      if (t.offset_bytes > t.window_bytes - num_bytes) return Landing::kOutside;
      const std::int64_t piece = std::min(limit_bytes, num_bytes - t.copied_bytes);
      std::memcpy(data + t.offset_bytes + t.copied_bytes, t.bytes.data() + t.copied_bytes,
                  static_cast<std::size_t>(piece));
      t.copied_bytes += piece;
    }
    if (finish) {
      SignalState& signal = *table->signals[t.signal];
      // The source's counter goes first: who sees the signal may rely on it.
      t.source_channel->completed.fetch_add(1, std::memory_order_release);
      signal.landed[t.source].fetch_add(1, std::memory_order_release);
      signal.total.fetch_add(1, std::memory_order_release);
    }
    return Landing::kDone;
  }

  std::int64_t num_parked_from(std::size_t rank) {
    std::int64_t count = 0;
    for (const auto& peer : endpoints_) {
      const std::lock_guard lock(peer->parked_mutex);
      count += std::count_if(peer->parked.begin(), peer->parked.end(),
                             [&](const Transfer& t) { return t.source == rank; });
    }
    return count;
  }

  // The delivery thread: earliest due first; copies ahead of the due time in pieces and signals at it.
  void deliver() {
    prctl(PR_SET_TIMERSLACK, 1000ul);  // nanoseconds; the default of 50 us is as long as a link's latency
    std::unique_lock lock(calendar_mutex_);
    while (!stop_.load()) {
      const std::uint32_t ticket = calendar_event_.ticket();
      if (calendar_.empty()) {
        lock.unlock();
        calendar_event_.wait(ticket, std::chrono::seconds(1));
        lock.lock();
        continue;
      }
      Transfer* next = calendar_.front();
      const auto left_bytes = static_cast<std::int64_t>(next->bytes.size()) - next->copied_bytes;
      const nanoseconds copy_span(
          static_cast<std::int64_t>(static_cast<double>(left_bytes) / kCopyBytesPerS * 1e9));
      const Clock::time_point now = Clock::now();
      const Clock::time_point begin = next->due - copy_span - kDeliverySpin;
      if (now < begin) {
        lock.unlock();
        calendar_event_.wait(ticket, begin - now);
        lock.lock();
      } else if (now < next->due) {
        if (left_bytes > 0) {
          busy_ = next;
          lock.unlock();
          const Landing landing = land_for_other(*next, kCopyPiece, false);
          if (landing != Landing::kDone) sched_yield();
          lock.lock();
          busy_ = nullptr;
        } else {
          lock.unlock();
          sched_yield();
          lock.lock();
        }
      } else {
        std::pop_heap(calendar_.begin(), calendar_.end(), later);
        calendar_.pop_back();
        busy_ = next;
        lock.unlock();
        const Landing landing = land_or_park(*next);
        if (landing != Landing::kNotReady) account_late(*next, landing);
        lock.lock();
        busy_ = nullptr;
        spare_.push_back(next);
      }
    }
  }

  const Topology topology_;
  std::vector<std::unique_ptr<Endpoint>> endpoints_;

  mutable std::mutex abort_mutex_;
  AbortRecord record_;
  std::atomic<bool> aborted_{false};

  // The calendar of booked puts: a heap by due time. busy_ is the one in the delivery thread's hands.
  std::mutex calendar_mutex_;
  Event calendar_event_;
  std::vector<Transfer*> calendar_;
  std::vector<Transfer*> spare_;
  std::vector<std::unique_ptr<Transfer>> pool_;
  Transfer* busy_ = nullptr;
  std::uint64_t next_order_ = 0;
  std::atomic<bool> stop_{false};
  std::thread delivery_;
};

class LocalTransport final : public Transport {
 public:
  LocalTransport(std::shared_ptr<Group> group, std::size_t rank)
      : group_(std::move(group)),
        rank_(rank),
        self_(group_->endpoint(rank)),
        wait_bits_((group_->num_ranks() + 63) / 64),
        num_exceptions_(std::uncaught_exceptions()) {}
  ~LocalTransport() override { group_->close(rank_, std::uncaught_exceptions() > num_exceptions_); }

  std::string_view name() const override { return "local"; }
  Caps caps() const override { return {.one_sided = true, .survives_peer_loss = true}; }
  Perf perf(RankId peer) const override {
    require_rank(peer, "perf");
    if (!group_->limited(rank_, peer.index())) return {};
    const LinkSpeed& link = group_->link(rank_, peer.index());
    return {.latency = link.latency,
            .bytes_per_s = link.bytes_per_s,
            .per_message = nanoseconds(0),
            .emulated = true};
  }
  RankId rank() const override { return RankId(static_cast<std::int32_t>(rank_)); }
  const Topology& topology() const override { return group_->topology(); }

  void open_channel(std::uint32_t channel, std::uint32_t num_windows, std::uint32_t num_signals) override {
    Require(channel < kMaxChannels, ErrorCode::kInvalidArgument, "channel ", channel,
            " is out of range, must be below ", kMaxChannels);
    const ChannelTable* table = self_.channels.load(std::memory_order_relaxed);
    if (table == nullptr || channel >= table->slots.size()) {
      auto larger = std::make_unique<ChannelTable>(
          std::max<std::size_t>(channel + 1, table ? 2 * table->slots.size() : 8));
      for (std::size_t c = 0; table != nullptr && c < table->slots.size(); ++c)
        larger->slots[c].store(table->slots[c].load(std::memory_order_relaxed), std::memory_order_relaxed);
      channel_tables_.push_back(std::move(larger));
      self_.channels.store(channel_tables_.back().get(), std::memory_order_release);
    }
    Channel* existing = find_channel(self_, channel);
    std::unique_ptr<Channel> created = existing ? nullptr : std::make_unique<Channel>();
    Channel& c = existing ? *existing : *created;
    if (!existing || num_windows > c.windows.size() || num_signals > c.signals.size()) {
      while (c.windows.size() < num_windows) c.windows.push_back(std::make_unique<WindowState>());
      while (c.signals.size() < num_signals)
        c.signals.push_back(std::make_unique<SignalState>(group_->num_ranks()));
      auto grown = std::make_unique<Channel::Table>();
      for (const auto& window : c.windows) grown->windows.push_back(window.get());
      for (const auto& signal : c.signals) grown->signals.push_back(signal.get());
      c.tables.push_back(std::move(grown));
      c.table.store(c.tables.back().get(), std::memory_order_release);
    }
    if (created) {
      channels_.push_back(std::move(created));
      channel_tables_.back()->slots[channel].store(&c, std::memory_order_release);
    }
    computing();
    group_->unpark(rank_);
  }

  void set_window(std::uint32_t channel, std::uint32_t window, std::span<std::byte> memory) override {
    WindowState& state = own_window(channel, window);
    if (state.data.exchange(nullptr, std::memory_order_seq_cst) != nullptr) {
      // After an abort a peer may still be copying into the old memory, which the caller is about to free.
      while (self_.num_writers.load(std::memory_order_seq_cst) != 0) sched_yield();
    }
    state.bytes.store(static_cast<std::int64_t>(memory.size()), std::memory_order_relaxed);
    state.data.store(memory.empty() ? nullptr : memory.data(), std::memory_order_seq_cst);
    computing();
    group_->unpark(rank_);
  }

  void expect(std::span<const Expect> expects) override {
    for (const Expect& e : expects) {
      require_rank(e.peer, "expect");
      SignalState& signal = own_signal(e.channel, e.signal);
      if (e.bytes != 0) {
        const std::int64_t bytes = own_window(e.channel, e.window).bytes.load(std::memory_order_relaxed);
        Require(e.bytes > 0 && e.offset_bytes >= 0 && e.offset_bytes <= bytes - e.bytes,
                ErrorCode::kInvalidArgument, "rank ", rank_, " expects ", e.bytes, " bytes at offset ",
                e.offset_bytes, " of window ", e.window, " of channel ", e.channel, ", which has ", bytes,
                " bytes; set a larger window first");
      }
      ++signal.expected[e.peer.index()];
    }
    computing();
  }

  void put(const Put& put) override {
    require_rank(put.peer, "put");
    Require(put.offset_bytes >= 0, ErrorCode::kInvalidArgument, "put at negative offset ", put.offset_bytes);
    Channel& channel = own_channel(put.channel);
    if (group_->aborted()) return;
    computing();
    Transfer t;
    t.source = rank_;
    t.peer = put.peer.index();
    t.channel = put.channel;
    t.window = put.window;
    t.signal = put.signal;
    t.offset_bytes = put.offset_bytes;
    t.bytes = put.source;
    t.source_channel = &channel;
    ++num_puts_;
    if (group_->limited(rank_, t.peer)) {
      link_time_ = group_->book(t);
      return;
    }
    const Clock::time_point begin = Clock::now();
    const Landing at_once = group_->land(t, INT64_MAX, true);
    link_time_ = {begin, Clock::now()};
    switch (at_once) {
      case Landing::kDone:
        return;
      case Landing::kNotReady:
        break;
      case Landing::kOutside:
        throw Error(ErrorCode::kInvalidArgument, group_->outside_message(t));
      case Landing::kClosed:
        if (!group_->aborted()) group_->abort(group_->undeliverable(t, Landing::kClosed));
        return;
    }
    self_.outstanding_to[t.peer].fetch_add(1, std::memory_order_relaxed);
    self_.outstanding.fetch_add(1, std::memory_order_relaxed);
    const Landing landing = group_->land_or_park(t);
    if (landing != Landing::kNotReady) group_->account_late(t, landing);
  }

  std::optional<LinkTime> last_link_time() const override { return link_time_; }

  bool progress() override {
    const std::uint32_t ticket = self_.arrivals.ticket();
    const bool moved = ticket != progress_ticket_;
    progress_ticket_ = ticket;
    return moved;
  }

  std::uint64_t signal(std::uint32_t channel, std::uint32_t signal) const override {
    return own_signal(channel, signal).total.load(std::memory_order_acquire);
  }
  std::uint64_t puts_completed(std::uint32_t channel) const override {
    return own_channel(channel).completed.load(std::memory_order_acquire);
  }
  std::vector<RankId> missing(std::uint32_t channel, std::uint32_t signal) const override {
    const SignalState& state = own_signal(channel, signal);
    std::vector<RankId> ranks;
    for (std::size_t r = 0; r < group_->num_ranks(); ++r)
      if (state.expected[r] > state.landed[r].load(std::memory_order_acquire))
        ranks.push_back(RankId(static_cast<std::int32_t>(r)));
    return ranks;
  }

  bool abort(const AbortRecord& record) noexcept override {
    const bool first = group_->abort(record);
    group_->quiesce(rank_);
    return first;
  }
  bool aborted() const noexcept override { return group_->aborted(); }
  AbortRecord abort_record() const override { return group_->abort_record(); }

  void set_timeout(nanoseconds timeout) override {
    Require(timeout.count() > 0, ErrorCode::kInvalidArgument, "the timeout of a wait must be positive, is ",
            timeout.count(), " ns");
    patience_.set_timeout(timeout);
  }
  nanoseconds timeout() const override { return patience_.timeout(); }

  Status idle(std::span<const WaitSpec> pending) override {
    const Clock::time_point now = Clock::now();
    self_.heartbeat_ns.store(now.time_since_epoch().count(), std::memory_order_relaxed);
    const std::uint32_t ticket = self_.arrivals.ticket();  // before looking: what comes after ends the sleep
    if (aborted()) return end();
    const WaitLook look = look_at(*this, pending, own_puts());
    if (look.there) return {};
    collect_missing(pending);
    publish(pending);

    if (const RankId gone = gone_among_missing(); gone.valid()) {
      // What the peer had put before it closed may have landed after we looked; closing comes after landing.
      collect_missing(pending);
      if (wait_bits_[gone.index() / 64] >> (gone.index() % 64) & 1) {
        patience_.step(now, look.key);
        group_->abort(peer_lost_record(failed_wait(pending, now), gone));
        return end();
      }
    }
    if (patience_.step(now, look.key) == Patience::Stage::kOver) {
      group_->abort(deadline_record(failed_wait(pending, now), group_->states()));
      return end();
    }
    const nanoseconds waited = patience_.elapsed(now);
    if (waited < kYieldSpan) {
      for (int i = 0; i < 8 && self_.arrivals.ticket() == ticket; ++i) sched_yield();
    } else {
      self_.arrivals.wait(ticket, waited < kPatientAfter ? kShortSleep : kLongSleep);
    }
    return {};
  }

  void advanced() override {
    patience_.restart();
    computing();
  }

 private:
  void require_rank(RankId peer, std::string_view what) const {
    Require(peer.value >= 0 && peer.index() < group_->num_ranks(), ErrorCode::kInvalidArgument, what,
            " names rank ", peer.value, "; ranks are 0..", group_->num_ranks() - 1);
  }
  Channel& own_channel(std::uint32_t channel) const {
    Channel* found = find_channel(self_, channel);
    Require(found != nullptr, ErrorCode::kInvalidState, "channel ", channel, " is not open on rank ", rank_,
            "; call open_channel first");
    return *found;
  }
  WindowState& own_window(std::uint32_t channel, std::uint32_t window) const {
    const Channel& c = own_channel(channel);
    Require(window < c.windows.size(), ErrorCode::kInvalidArgument, "window ", window, " of channel ",
            channel, " does not exist on rank ", rank_, ", which opened ", c.windows.size());
    return *c.windows[window];
  }
  SignalState& own_signal(std::uint32_t channel, std::uint32_t signal) const {
    const Channel& c = own_channel(channel);
    Require(signal < c.signals.size(), ErrorCode::kInvalidArgument, "signal ", signal, " of channel ",
            channel, " does not exist on rank ", rank_, ", which opened ", c.signals.size());
    return *c.signals[signal];
  }

  // The group has ended: reports it, once this rank's memory is its own again.
  Status end() {
    group_->quiesce(rank_);
    return abort_record().status;
  }

  // The rank does something other than waiting.
  void computing() {
    self_.waiting.store(false, std::memory_order_relaxed);
    self_.heartbeat_ns.store(now_ns(), std::memory_order_relaxed);
  }

  // Fills wait_bits_ with the ranks that owe something.
  void collect_missing(std::span<const WaitSpec> pending) {
    std::fill(wait_bits_.begin(), wait_bits_.end(), 0);
    for (std::size_t r = 0; r < group_->num_ranks(); ++r) {
      bool owes = pending.empty() && self_.outstanding_to[r].load(std::memory_order_relaxed) > 0;
      for (std::size_t i = 0; i < pending.size() && !owes; ++i) {
        const SignalState& signal = own_signal(pending[i].channel, pending[i].signal);
        owes = signal.expected[r] > signal.landed[r].load(std::memory_order_acquire);
      }
      if (owes) wait_bits_[r / 64] |= std::uint64_t{1} << (r % 64);
    }
  }

  RankId gone_among_missing() const {
    for (std::size_t r = 0; r < group_->num_ranks(); ++r)
      if ((wait_bits_[r / 64] >> (r % 64) & 1) && group_->endpoint(r).closed.load(std::memory_order_seq_cst))
        return RankId(static_cast<std::int32_t>(r));
    return RankId();
  }

  void publish(std::span<const WaitSpec> pending) {
    const std::lock_guard lock(self_.row_mutex);
    self_.waits = wait_bits_;
    self_.phase = pending.empty() ? std::string_view("own puts") : pending[0].phase;
    self_.chunk = pending.empty() ? -1 : pending[0].chunk;
    self_.waiting.store(true, std::memory_order_release);
  }

  OwnPuts own_puts() const {
    return {.made = num_puts_,
            .outstanding = static_cast<std::uint64_t>(self_.outstanding.load(std::memory_order_acquire))};
  }

  FailedWait failed_wait(std::span<const WaitSpec> pending, Clock::time_point now) const {
    std::vector<RankId> missing;
    for (std::size_t r = 0; r < group_->num_ranks(); ++r)
      if (wait_bits_[r / 64] >> (r % 64) & 1) missing.push_back(RankId(static_cast<std::int32_t>(r)));
    return describe_wait(*this, pending, std::move(missing), own_puts(), patience_, now);
  }

  std::shared_ptr<Group> group_;
  std::size_t rank_;
  Endpoint& self_;
  std::vector<std::unique_ptr<Channel>> channels_;
  std::vector<std::unique_ptr<ChannelTable>> channel_tables_;
  std::vector<std::uint64_t> wait_bits_;
  Patience patience_;
  LinkTime link_time_;  // of the last put
  std::uint32_t progress_ticket_ = 0;
  std::uint64_t num_puts_ = 0;
  int num_exceptions_;
};

}  // namespace

std::vector<std::unique_ptr<Transport>> make_local_group(const Topology& topology) {
  auto group = std::make_shared<Group>(topology);
  std::vector<std::unique_ptr<Transport>> transports;
  for (std::size_t r = 0; r < group->num_ranks(); ++r)
    transports.push_back(std::make_unique<LocalTransport>(group, r));
  return transports;
}

}  // namespace sluice::comm
