#include "sluice/comm/process_transport.hpp"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "sluice/base/hash.hpp"
#include "sluice/base/log.hpp"
#include "sluice/comm/data_path.hpp"
#include "sluice/comm/group_watch.hpp"
#include "sluice/comm/host.hpp"
#include "sluice/comm/launch_environment.hpp"
#include "sluice/comm/rendezvous.hpp"
#include "sluice/comm/transport_module.hpp"

namespace sluice::comm {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr nanoseconds kYieldSpan = microseconds(50);  // a waiter yields this long before it sleeps
constexpr nanoseconds kSleep =
    microseconds(500);  // what arrives wakes at once; peers are looked after this often
constexpr nanoseconds kFlush = milliseconds(200);  // to hand a verdict or a farewell to the system
constexpr nanoseconds kRereadMeeting = milliseconds(10);
constexpr std::size_t kMaxEarlySignals = 1 << 16;  // different ones that came before their channel was opened

// Where on its host this process may run, for people.
std::string own_place() {
  try {
    const HostDescription host = describe_host();
    return str("threads ", host.own_threads, " of ", host.threads, ", NUMA node ", host.own_numa_nodes);
  } catch (const Error& e) {
    return e.message();  // ranks meet without it
  }
}

// ---- what outlives a group: survivors go on with it

class Process {
 public:
  Process(Secret secret, std::uint64_t job, std::int32_t num_ranks)
      : secret_(std::move(secret)),
        job_(job),
        num_ranks_(num_ranks),
        wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    Require(wake_.valid(), ErrorCode::kTransport, "eventfd failed: ", std::strerror(errno));
  }
  ~Process() {
    loop_.stop();
    listener_.reset();
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  net::Loop& loop() { return loop_; }
  const Secret& secret() const { return secret_; }
  std::uint64_t job() const { return job_; }
  int wake_fd() const { return wake_.get(); }
  void wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t ignored = ::write(wake_.get(), &one, sizeof one);
  }
  void clear_wake() {
    std::uint64_t count = 0;
    [[maybe_unused]] const ssize_t ignored = ::read(wake_.get(), &count, sizeof count);
  }

  void serve(std::shared_ptr<RendezvousServer> server) { server_ = std::move(server); }

  std::uint16_t listen(const std::string& address) {
    net::ListenOptions o;
    o.address = address;
    o.secret = &secret_;
    o.job = job_;
    o.admit = [this](const wire::ClientHello& hello) {
      const std::lock_guard lock(mutex_);
      if (hello.epoch < epoch_) return wire::Verdict::kStaleJob;
      if (hello.epoch > epoch_ + 1 || hello.rank >= num_ranks_ ||
          hello.purpose == wire::Purpose::kRendezvous || seen_.contains(key(hello)))
        return wire::Verdict::kNotExpected;
      return wire::Verdict::kWelcome;
    };
    o.accepted = [this](const wire::ClientHello& hello, net::Fd fd, const std::string&) {
      const std::lock_guard lock(mutex_);
      if (!seen_.emplace(key(hello), true).second) return;  // twice at once: the first one stays
      arrived_[key(hello)] = std::move(fd);
      arrival_.notify_all();
    };
    listener_ = std::make_unique<net::Listener>(loop_, std::move(o));
    return listener_->port();
  }

  void set_epoch(std::uint32_t epoch) {
    const std::lock_guard lock(mutex_);
    epoch_ = epoch;
  }

  // The connection that `rank` made here. An invalid one when it did not come in time.
  net::Fd take(std::uint32_t epoch, std::int32_t rank, wire::Purpose purpose, Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    const Key k{epoch, rank, purpose};
    if (!arrival_.wait_until(lock, deadline, [&] { return arrived_.contains(k); })) return {};
    net::Fd fd = std::move(arrived_[k]);
    arrived_.erase(k);
    return fd;
  }

 private:
  using Key = std::tuple<std::uint32_t, std::int32_t, wire::Purpose>;
  static Key key(const wire::ClientHello& hello) { return {hello.epoch, hello.rank, hello.purpose}; }

  const Secret secret_;
  const std::uint64_t job_;
  const std::int32_t num_ranks_;
  net::Fd wake_;
  std::mutex mutex_;
  std::condition_variable arrival_;
  std::uint32_t epoch_ = 0;
  std::map<Key, bool> seen_;
  std::map<Key, net::Fd> arrived_;
  std::shared_ptr<RendezvousServer> server_;
  net::Loop loop_;
  std::unique_ptr<net::Listener> listener_;
};

// ---- the group's books

struct Window {
  std::byte* data = nullptr;
  std::int64_t bytes = 0;
};
struct Expected {
  std::uint32_t window = 0;
  std::int64_t offset_bytes = 0;
  std::int64_t bytes = 0;
};
// What one peer puts to one signal.
struct FromPeer {
  std::uint64_t expected = 0;
  std::uint64_t placed = 0;
  std::uint64_t landed = 0;
  std::vector<Expected> queue;  // head.. are expected and not placed
  std::size_t head = 0;
};
struct Signal {
  std::uint64_t total = 0;
  std::vector<FromPeer> from;  // [num_ranks]
};
struct Channel {
  bool open = false;
  std::vector<Window> windows;
  std::vector<Signal> signals;
  std::uint64_t completed = 0;  // own puts
};

// Everything that makes a group but its books.
struct GroupParts {
  std::string name;
  std::shared_ptr<Process> process;
  std::int32_t rank = 0;
  std::uint32_t epoch = 0;
  Topology topology{{{0}}};
  std::vector<wire::Card> cards;   // [num_ranks]
  std::vector<std::string> kinds;  // [num_ranks]: which path serves the peer; empty for the own rank
};

std::string peer_name(std::int32_t rank, const wire::Card& card) {
  return str("rank ", rank, " (host ", card.host, ", pid ", card.pid, ")");
}

std::unique_ptr<DataPath> make_path(std::string_view kind, const PathContext& context) {
  if (kind == "shm") return make_shm_path(context);
  if (kind == "tcp") return make_tcp_path(context);
  if (kind == "ucx") {
    auto* make = reinterpret_cast<MakePath*>(load_module_symbol("ucx", kMakePathSymbol));
    return std::unique_ptr<DataPath>(make(&context));
  }
  throw Error(ErrorCode::kInternal, str("no data path is called ", kind));
}

class ProcessTransport final : public Transport, private Landing {
 public:
  explicit ProcessTransport(GroupParts parts)
      : parts_(std::move(parts)),
        num_ranks_(parts_.topology.num_ranks()),
        path_of_(static_cast<std::size_t>(num_ranks_), nullptr),
        outstanding_to_(static_cast<std::size_t>(num_ranks_), 0),
        num_exceptions_(std::uncaught_exceptions()) {
    for (const std::string& kind : parts_.kinds) {
      if (kind.empty() ||
          std::any_of(paths_.begin(), paths_.end(), [&](const auto& p) { return p->name() == kind; }))
        continue;
      paths_.push_back(make_path(
          kind, {.rank = parts_.rank, .num_ranks = num_ranks_, .epoch = parts_.epoch, .landing = this}));
    }
    for (std::size_t r = 0; r < path_of_.size(); ++r)
      for (const auto& path : paths_)
        if (path->name() == parts_.kinds[r]) path_of_[r] = path.get();
  }

  ~ProcessTransport() override {
    if (watch_) {
      if (!aborted() && std::uncaught_exceptions() == num_exceptions_) {
        const Clock::time_point until = Clock::now() + patience_.timeout();
        bool drained = true;
        for (const auto& path : paths_) drained = path->drain(until) && drained;
        if (!aborted()) watch_->farewell(kFlush);
      } else {
        watch_->flush(kFlush);
      }
      if (!succeeded_) parts_.process->loop().stop();
    }
    for (const auto& path : paths_) path->stop();
    paths_.clear();
  }

  // ---- set-up

  // Binary, one text a path.
  std::string path_cards() {
    std::string out;
    for (const auto& path : paths_) {
      const std::string card = path->card();
      const auto size = static_cast<std::uint32_t>(card.size());
      out.append(path->name());
      out.push_back('\0');
      out.append(reinterpret_cast<const char*>(&size), sizeof size);
      out.append(card);
    }
    return out;
  }
  static std::string path_card(std::string_view all, std::string_view kind) {
    while (!all.empty()) {
      const std::size_t end = all.find('\0');
      std::uint32_t size = 0;
      if (end == std::string_view::npos || all.size() - end - 1 < sizeof size) return {};
      std::memcpy(&size, all.data() + end + 1, sizeof size);
      const std::string_view name = all.substr(0, end);
      all.remove_prefix(end + 1 + sizeof size);
      if (size > all.size()) return {};
      if (name == kind) return std::string(all.substr(0, size));
      all.remove_prefix(size);
    }
    return {};
  }

  void set_path_cards(const std::vector<std::string>& cards) {
    for (std::size_t r = 0; r < cards.size(); ++r) parts_.cards[r].path = cards[r];
  }

  void connect_control(Clock::time_point deadline) {
    std::vector<std::shared_ptr<net::Connection>> connections;
    for (std::int32_t r = 0; r < num_ranks_; ++r)
      connections.push_back(
          r == parts_.rank ? nullptr
                           : parts_.process->loop().adopt(connect_to(r, wire::Purpose::kControl, deadline),
                                                          wire::kMaxControlBytes));
    start_watch(std::move(connections));
  }

  // Connects the data paths; the cards of all ranks are there.
  void connect_paths(Clock::time_point deadline) {
    const auto n = static_cast<std::size_t>(num_ranks_);
    for (const auto& path : paths_) {
      std::vector<std::int32_t> peers;
      std::vector<std::string> cards(n);
      std::vector<net::Fd> sockets(n);
      for (std::size_t r = 0; r < n; ++r) {
        if (path_of_[r] != path.get()) continue;
        peers.push_back(static_cast<std::int32_t>(r));
        cards[r] = path_card(parts_.cards[r].path, path->name());
      }
      if (path->wants_socket())
        for (const std::int32_t r : peers)
          sockets[static_cast<std::size_t>(r)] = connect_to(r, wire::Purpose::kData, deadline);
      path->connect(peers, cards, sockets, deadline);
    }
  }
  void all_connected() {
    for (const auto& path : paths_) path->all_connected();
  }

  // The higher rank dials.
  net::Fd connect_to(std::int32_t peer, wire::Purpose purpose, Clock::time_point deadline) {
    const wire::Card& card = parts_.cards[static_cast<std::size_t>(peer)];
    if (peer < parts_.rank)
      return net::dial({.host = card.address,
                        .port = card.port,
                        .secret = &parts_.process->secret(),
                        .job = parts_.process->job(),
                        .purpose = purpose,
                        .rank = parts_.rank,
                        .epoch = parts_.epoch,
                        .deadline = deadline,
                        .retry = true,
                        .to_whom = peer_name(peer, card)});
    net::Fd fd = parts_.process->take(parts_.epoch, peer, purpose, deadline);
    Require(fd.valid(), ErrorCode::kTimeout, peer_name(peer, card), " did not connect to rank ", parts_.rank,
            " in time; look at its own error, and whether its host reaches ",
            parts_.cards[static_cast<std::size_t>(parts_.rank)].address);
    return fd;
  }

  void start_watch(std::vector<std::shared_ptr<net::Connection>> connections) {
    std::vector<GroupWatch::Peer> peers;
    for (std::int32_t r = 0; r < num_ranks_; ++r)
      peers.push_back({peer_name(r, parts_.cards[static_cast<std::size_t>(r)]),
                       std::move(connections[static_cast<std::size_t>(r)])});
    watch_ = std::make_unique<GroupWatch>(parts_.process->loop(), RankId(parts_.rank), parts_.epoch,
                                          std::move(peers), [p = parts_.process.get()] { p->wake(); });
    watch_->start();
  }

  // ---- Transport

  std::string_view name() const override { return parts_.name; }
  Caps caps() const override {
    return {.one_sided = false, .needs_progress = num_ranks_ > 1, .survives_peer_loss = true};
  }
  Perf perf(RankId peer) const override {
    require_rank(peer, "perf");
    return {};
  }
  RankId rank() const override { return RankId(parts_.rank); }
  const Topology& topology() const override { return parts_.topology; }

  void open_channel(std::uint32_t channel, std::uint32_t num_windows, std::uint32_t num_signals) override {
    Require(channel < wire::kMaxChannels && num_signals <= wire::kMaxSignals, ErrorCode::kInvalidArgument,
            "channel ", channel, " with ", num_signals, " signals is out of range; there may be ",
            wire::kMaxChannels, " channels of ", wire::kMaxSignals, " signals");
    if (channel >= channels_.size()) channels_.resize(channel + 1);
    Channel& c = channels_[channel];
    c.open = true;
    if (num_windows > c.windows.size()) c.windows.resize(num_windows);
    while (c.signals.size() < num_signals)
      c.signals.push_back({.total = 0, .from = std::vector<FromPeer>(static_cast<std::size_t>(num_ranks_))});
    std::erase_if(early_, [&](const auto& entry) {
      const auto& [of, count] = entry;
      const auto& [ch, signal, peer] = of;
      if (ch != channel || signal >= c.signals.size()) return false;
      FromPeer& from = c.signals[signal].from[static_cast<std::size_t>(peer)];
      from.placed += count;
      from.landed += count;
      c.signals[signal].total += count;
      return true;
    });
    changed();
  }

  void set_window(std::uint32_t channel, std::uint32_t window, std::span<std::byte> memory) override {
    Window& w = own_window(channel, window);
    if (w.data != nullptr)
      for (const auto& path : paths_) path->forget({w.data, static_cast<std::size_t>(w.bytes)});
    w = {memory.empty() ? nullptr : memory.data(), static_cast<std::int64_t>(memory.size())};
    changed();
  }

  void expect(std::span<const Expect> expects) override {
    for (const Expect& e : expects) {
      require_rank(e.peer, "expect");
      Signal& signal = own_signal(e.channel, e.signal);
      std::byte* to = nullptr;
      if (e.bytes != 0) {
        const Window& window = own_window(e.channel, e.window);
        Require(e.bytes > 0 && e.offset_bytes >= 0 && e.offset_bytes <= window.bytes - e.bytes,
                ErrorCode::kInvalidArgument, "rank ", parts_.rank, " expects ", e.bytes, " bytes at offset ",
                e.offset_bytes, " of window ", e.window, " of channel ", e.channel, ", which has ",
                window.bytes, " bytes; set a larger window first");
        to = window.data + e.offset_bytes;
      }
      FromPeer& from = signal.from[e.peer.index()];
      ++from.expected;
      if (from.expected <= from.placed) {
        // It came before it was expected, which only a signal may.
        if (e.bytes != 0) refuse({e.peer.value, e.channel, e.window, e.signal, 0, 0}, &e);
      } else {
        if (from.head == from.queue.size()) {
          from.queue.clear();
          from.head = 0;
        }
        from.queue.push_back({e.window, e.offset_bytes, e.bytes});
      }
      if (DataPath* path = path_of_[e.peer.index()]) path->expect(e, to);
    }
    changed();
  }

  std::shared_ptr<PutMemory> put_memory() override {
    for (const auto& path : paths_)
      if (auto memory = path->put_memory()) return memory;
    return nullptr;
  }

  void put(const Put& put) override {
    require_rank(put.peer, "put");
    Require(put.offset_bytes >= 0, ErrorCode::kInvalidArgument, "put at negative offset ", put.offset_bytes);
    Require(put.signal < wire::kMaxSignals, ErrorCode::kInvalidArgument, "put names signal ", put.signal,
            ", must be below ", wire::kMaxSignals);
    own_channel(put.channel);
    watch_->computing();
    if (aborted()) return;
    ++num_puts_;
    ++num_outstanding_;
    ++outstanding_to_[put.peer.index()];
    if (put.peer.value == parts_.rank) {
      if (!own_puts_.empty() || !land_own(put)) own_puts_.push_back(put);
      return;
    }
    path_of_[put.peer.index()]->put(put);
  }

  bool progress() override {
    if (aborted()) {
      settle();
      return false;
    }
    bool moved = false;
    for (const auto& path : paths_) moved = path->progress() || moved;
    return moved;
  }

  std::uint64_t signal(std::uint32_t channel, std::uint32_t signal) const override {
    return own_signal(channel, signal).total;
  }
  std::uint64_t puts_completed(std::uint32_t channel) const override {
    return own_channel(channel).completed;
  }
  std::vector<RankId> missing(std::uint32_t channel, std::uint32_t signal) const override {
    const Signal& s = own_signal(channel, signal);
    std::vector<RankId> out;
    for (std::int32_t r = 0; r < num_ranks_; ++r) {
      const FromPeer& from = s.from[static_cast<std::size_t>(r)];
      if (from.expected > from.landed) out.push_back(RankId(r));
    }
    return out;
  }

  bool abort(const AbortRecord& record) noexcept override {
    const bool first = watch_->abort(record);
    stop_paths();
    return first;
  }
  bool aborted() const noexcept override { return watch_->aborted(); }
  bool broken() const noexcept override { return watch_->broken(); }
  AbortRecord abort_record() const override { return watch_->record(); }

  void set_timeout(nanoseconds timeout) override {
    Require(timeout.count() > 0, ErrorCode::kInvalidArgument, "the timeout of a wait must be positive, is ",
            timeout.count(), " ns");
    patience_.set_timeout(timeout);
  }
  nanoseconds timeout() const override { return patience_.timeout(); }

  Status idle(std::span<const WaitSpec> pending) override {
    const Clock::time_point now = Clock::now();
    if (aborted()) return end();
    const OwnPuts puts{.made = num_puts_, .outstanding = num_outstanding_};
    const WaitLook look = look_at(*this, pending, puts);
    if (look.there) return {};
    collect_missing(pending);
    const Patience::Stage stage = patience_.step(now, look.key);
    watch_->waiting(missing_, pending.empty() ? std::string_view("own puts") : pending[0].phase,
                    pending.empty() ? -1 : pending[0].chunk, patience_, stage, look.key,
                    [&] { return describe_wait(*this, pending, missing_, puts, patience_, now); });
    if (aborted()) return end();
    if (patience_.elapsed(now) < kYieldSpan)
      sched_yield();
    else
      sleep();
    return {};
  }

  void advanced() override {
    patience_.restart();
    watch_->computing();
  }

  Survivors survivors(nanoseconds span) override;

 private:
  void require_rank(RankId peer, std::string_view what) const {
    Require(peer.value >= 0 && peer.value < num_ranks_, ErrorCode::kInvalidArgument, what, " names rank ",
            peer.value, "; ranks are 0..", num_ranks_ - 1);
  }
  const Channel& own_channel(std::uint32_t channel) const {
    Require(channel < channels_.size() && channels_[channel].open, ErrorCode::kInvalidState, "channel ",
            channel, " is not open on rank ", parts_.rank, "; call open_channel first");
    return channels_[channel];
  }
  Window& own_window(std::uint32_t channel, std::uint32_t window) {
    const Channel& c = own_channel(channel);
    Require(window < c.windows.size(), ErrorCode::kInvalidArgument, "window ", window, " of channel ",
            channel, " does not exist on rank ", parts_.rank, ", which opened ", c.windows.size());
    return channels_[channel].windows[window];
  }
  const Signal& own_signal(std::uint32_t channel, std::uint32_t signal) const {
    const Channel& c = own_channel(channel);
    Require(signal < c.signals.size(), ErrorCode::kInvalidArgument, "signal ", signal, " of channel ",
            channel, " does not exist on rank ", parts_.rank, ", which opened ", c.signals.size());
    return c.signals[signal];
  }
  Signal& own_signal(std::uint32_t channel, std::uint32_t signal) {
    return const_cast<Signal&>(std::as_const(*this).own_signal(channel, signal));
  }

  // This rank is ready for more than before.
  void changed() {
    watch_->computing();
    if (aborted()) return;
    while (!own_puts_.empty() && land_own(own_puts_.front())) own_puts_.erase(own_puts_.begin());
    for (const auto& path : paths_) path->retry();
  }

  bool land_own(const Put& put) {
    const Arrival arrival{parts_.rank, put.channel,      put.window,
                          put.signal,  put.offset_bytes, static_cast<std::int64_t>(put.source.size())};
    std::byte* to = nullptr;
    switch (place(arrival, to)) {
      case Place::kThere:
        break;
      case Place::kLater:
        return false;
      case Place::kRefused:
        return true;
    }
    if (!put.source.empty()) std::memmove(to, put.source.data(), put.source.size());
    sent(parts_.rank, put.channel);
    landed(arrival);
    return true;
  }

  // ---- Landing

  Place place(const Arrival& a, std::byte*& to) override {
    to = nullptr;
    if (a.channel >= channels_.size() || !channels_[a.channel].open ||
        a.signal >= channels_[a.channel].signals.size()) {
      if (a.bytes != 0) return Place::kLater;
      if (early_.size() < kMaxEarlySignals) return Place::kThere;
      broken(a.peer, "raises signals that nobody opened");
      return Place::kRefused;
    }
    Channel& channel = channels_[a.channel];
    FromPeer& from = channel.signals[a.signal].from[static_cast<std::size_t>(a.peer)];
    const bool is_expected = from.head < from.queue.size();
    if (!is_expected) {
      if (a.bytes != 0) return Place::kLater;
      ++from.placed;
      return Place::kThere;
    }
    const Expected& e = from.queue[from.head];
    const Expect said{RankId(a.peer), a.channel, e.window, e.offset_bytes, e.bytes, a.signal};
    if (a.bytes != e.bytes || (a.bytes != 0 && (a.window != e.window || a.offset_bytes != e.offset_bytes))) {
      refuse(a, &said);
      return Place::kRefused;
    }
    if (a.bytes != 0) {
      // The window is as large as when this was expected, or the rank took it back while it waits.
      const Window& window = channel.windows[a.window];
      if (window.data == nullptr) return Place::kLater;
      if (a.offset_bytes > window.bytes - a.bytes) {
        refuse(a, &said);
        return Place::kRefused;
      }
      to = window.data + a.offset_bytes;
    }
    ++from.head;
    ++from.placed;
    return Place::kThere;
  }

  void landed(const Arrival& a) override {
    if (a.channel >= channels_.size() || !channels_[a.channel].open ||
        a.signal >= channels_[a.channel].signals.size()) {
      ++early_[{a.channel, a.signal, a.peer}];
      return;
    }
    Signal& signal = channels_[a.channel].signals[a.signal];
    ++signal.from[static_cast<std::size_t>(a.peer)].landed;
    ++signal.total;
  }

  void sent(std::int32_t peer, std::uint32_t channel) override {
    ++channels_[channel].completed;
    --num_outstanding_;
    --outstanding_to_[static_cast<std::size_t>(peer)];
  }

  void lost(std::int32_t peer, const std::string& why) override { watch_->data_lost(peer, why); }

  void broken(std::int32_t peer, const std::string& text) override {
    end_with(peer, str("rank ", parts_.rank, ": ", watch_->name(peer), " ", text,
                       "; it is broken, or runs another version"));
  }

  void refuse(const Arrival& a, const Expect* expected) {
    end_with(a.peer,
             str("rank ", parts_.rank, ": ", watch_->name(a.peer), " put ", a.bytes, " bytes at offset ",
                 a.offset_bytes, " of window ", a.window, " for signal ", a.signal, " of channel ", a.channel,
                 ", expected ", expected->bytes, " bytes at offset ", expected->offset_bytes, " of window ",
                 expected->window, "; the ranks disagree on the plan"));
  }

  void end_with(std::int32_t culprit, std::string text) {
    AbortRecord record;
    record.culprit = RankId(culprit);
    record.reporter = RankId(parts_.rank);
    record.phase = phase_;
    record.chunk = chunk_;
    record.status = {ErrorCode::kDisagreement, std::move(text)};
    watch_->abort(record);
    stop_paths();
  }

  // ---- waiting

  Status end() {
    settle();
    return watch_->record().status;
  }

  void settle() noexcept {
    stop_paths();
    for (const auto& path : paths_) path->settle();
  }
  void stop_paths() noexcept {
    for (const auto& path : paths_) path->stop();
  }

  void collect_missing(std::span<const WaitSpec> pending) {
    phase_ = pending.empty() ? std::string_view("own puts") : pending[0].phase;
    chunk_ = pending.empty() ? -1 : pending[0].chunk;
    missing_.clear();
    for (std::int32_t r = 0; r < num_ranks_; ++r) {
      const auto i = static_cast<std::size_t>(r);
      bool owes = pending.empty() && outstanding_to_[i] > 0;
      for (std::size_t p = 0; p < pending.size() && !owes; ++p) {
        const FromPeer& from = own_signal(pending[p].channel, pending[p].signal).from[i];
        owes = from.expected > from.landed;
      }
      if (owes) missing_.push_back(RankId(r));
    }
  }

  void sleep() {
    fds_.clear();
    fds_.push_back({.fd = parts_.process->wake_fd(), .events = POLLIN, .revents = 0});
    bool nothing = true;
    std::size_t num_prepared = 0;
    for (; num_prepared < paths_.size() && nothing; ++num_prepared)
      nothing = paths_[num_prepared]->prepare_sleep(fds_);
    if (nothing) {
      const timespec span{0, kSleep.count()};
      ppoll(fds_.data(), fds_.size(), &span, nullptr);
      if (fds_[0].revents != 0) parts_.process->clear_wake();
    }
    for (std::size_t i = 0; i < num_prepared; ++i) paths_[i]->end_sleep();
  }

  GroupParts parts_;
  const std::int32_t num_ranks_;
  std::vector<std::unique_ptr<DataPath>> paths_;
  std::vector<DataPath*> path_of_;  // [num_ranks]; null for the own rank
  std::unique_ptr<GroupWatch> watch_;
  bool succeeded_ = false;  // survivors() gave everything to the next group

  std::vector<Channel> channels_;
  std::map<std::tuple<std::uint32_t, std::uint32_t, std::int32_t>, std::uint64_t> early_;
  std::vector<Put> own_puts_;  // to this rank, which was not ready
  std::uint64_t num_puts_ = 0;
  std::uint64_t num_outstanding_ = 0;
  std::vector<std::int64_t> outstanding_to_;  // [num_ranks]
  Patience patience_;
  std::vector<RankId> missing_;
  std::string_view phase_;  // of the last wait
  std::int32_t chunk_ = -1;
  std::vector<pollfd> fds_;
  int num_exceptions_;
};

// ---- joining

// A server at an address that all ranks know serves every group that this process joins.
std::shared_ptr<RendezvousServer> server_at(const LaunchInfo& info) {
  static std::mutex mutex;
  static std::map<std::uint16_t, std::shared_ptr<RendezvousServer>> servers;
  const std::lock_guard lock(mutex);
  std::shared_ptr<RendezvousServer>& server = servers[info.port];
  if (!server) {
    RendezvousServer::Options o;
    o.address = info.host;
    o.port = info.port;
    o.num_ranks = info.num_ranks;
    o.job = info.job;
    server = std::make_shared<RendezvousServer>(o, *info.secret);
  }
  return server;
}

// Where the launcher says that the ranks meet; on one host, where rank 0 says in its meeting file.
std::unique_ptr<Rendezvous> meet(LaunchInfo& info, std::uint32_t group,
                                 std::shared_ptr<RendezvousServer>& server, Clock::time_point deadline) {
  const bool by_file = !info.meeting_file.empty();
  if (by_file) info.meeting_file += str("-", group);
  if (info.serves && by_file) {
    info.secret = Secret::random();
    RendezvousServer::Options o;
    o.num_ranks = info.num_ranks;
    o.job = info.job;
    server = std::make_shared<RendezvousServer>(o, *info.secret);
    info.host = o.address;
    info.port = server->port();
    write_meeting_file(info.meeting_file, {info.port, info.secret->reveal()});
  } else if (info.serves) {
    server = server_at(info);
  }
  Rendezvous::Options o;
  o.job = info.job;
  o.group = group;
  o.rank = info.rank;
  o.num_ranks = info.num_ranks;
  o.who = str("host ", host_name(), ", pid ", ::getpid());
  o.deadline = deadline;
  if (!by_file || info.serves) {
    o.host = info.host;
    o.port = info.port;
    return std::make_unique<Rendezvous>(o, *info.secret);
  }
  // A file that an earlier job left is read as well; rank 0 replaces it.
  o.host = "127.0.0.1";
  o.retry = false;
  std::string why = "the file is not there";
  while (true) {
    if (const auto meeting = read_meeting_file(info.meeting_file)) {
      try {
        info.secret = Secret::from_text(meeting->secret, info.meeting_file.string());
        o.port = meeting->port;
        return std::make_unique<Rendezvous>(o, *info.secret);
      } catch (const Error& e) {
        if (e.code() == ErrorCode::kInvalidConfig) throw;
        why = e.message();
      }
    }
    Require(Clock::now() + kRereadMeeting < deadline, ErrorCode::kTimeout, "rank ", info.rank,
            " did not find rank 0 by ", info.meeting_file.string(), ": ", why,
            "; see that rank 0 runs, on this host and as this user");
    std::this_thread::sleep_for(kRereadMeeting);
  }
}

Topology discover(const std::vector<wire::Card>& cards) {
  std::vector<std::vector<std::int32_t>> nodes;
  std::map<std::string, std::size_t> known;
  for (std::size_t r = 0; r < cards.size(); ++r) {
    const auto [at, is_new] = known.emplace(cards[r].host_id, nodes.size());
    if (is_new) nodes.emplace_back();
    nodes[at->second].push_back(static_cast<std::int32_t>(r));
  }
  return Topology(std::move(nodes));
}

// Which path serves each peer. "shm+tcp": shared memory between ranks of one node, TCP between nodes; ranks that only
// pretend to share a node have nothing but TCP.
std::vector<std::string> path_kinds(std::string_view name, std::int32_t rank,
                                    const std::vector<wire::Card>& cards, const Topology& topology) {
  const std::size_t plus = name.find('+');
  const std::string in_node(name.substr(0, plus));
  const std::string across(plus == std::string_view::npos ? name : name.substr(plus + 1));
  const wire::Card& own = cards[static_cast<std::size_t>(rank)];
  std::vector<std::string> out;
  for (std::size_t r = 0; r < cards.size(); ++r) {
    const RankId peer(static_cast<std::int32_t>(r));
    const bool one_host = cards[r].host_id == own.host_id;
    if (peer.value == rank)
      out.emplace_back();
    else
      out.push_back(topology.same_node(peer, RankId(rank)) && (one_host || in_node != "shm") ? in_node
                                                                                             : across);
    Require(out.back() != "shm" || one_host, ErrorCode::kInvalidConfig,
            "transport shm joins ranks of one host, but rank ", rank, " is on ", own.host, " and rank ", r,
            " on ", cards[r].host, "; set comm.transport to shm+tcp or tcp");
  }
  return out;
}

Survivors ProcessTransport::survivors(nanoseconds span) {
  Require(!succeeded_, ErrorCode::kInvalidState, "survivors() was called before on this group");
  stop_paths();
  const std::vector<std::int32_t> members = watch_->agree_on_survivors(span);
  const Clock::time_point deadline = Clock::now() + 2 * span;
  GroupParts next;
  next.name = parts_.name;
  next.process = parts_.process;
  next.epoch = parts_.epoch + 1;
  std::vector<std::vector<std::int32_t>> nodes;
  Survivors out;
  for (std::size_t i = 0; i < members.size(); ++i) {
    const auto former = static_cast<std::size_t>(members[i]);
    if (members[i] == parts_.rank) next.rank = static_cast<std::int32_t>(i);
    next.cards.push_back(parts_.cards[former]);
    next.kinds.push_back(parts_.kinds[former]);
    out.former.push_back(RankId(members[i]));
  }
  for (std::int32_t node = 0; node < parts_.topology.num_nodes(); ++node) {
    std::vector<std::int32_t> left;
    for (const std::int32_t r : parts_.topology.ranks_of(NodeId(node))) {
      const auto at = std::lower_bound(members.begin(), members.end(), r);
      if (at != members.end() && *at == r) left.push_back(static_cast<std::int32_t>(at - members.begin()));
    }
    if (!left.empty()) nodes.push_back(std::move(left));
  }
  next.topology = Topology(std::move(nodes));
  next.topology.set_declared(parts_.topology.declared());
  parts_.process->set_epoch(next.epoch);
  auto group = std::make_unique<ProcessTransport>(next);
  const std::vector<std::string> cards = watch_->exchange(members, 0, group->path_cards(), deadline);
  group->set_path_cards(cards);
  group->connect_paths(deadline);
  (void)watch_->exchange(members, 1, "", deadline);
  group->all_connected();
  // The connections change hands on the loop's thread; when the second turn has run, no handler of this watch will.
  std::promise<void> changed, over;
  parts_.process->loop().post([&] {
    watch_->retire();
    std::vector<std::shared_ptr<net::Connection>> connections;
    for (const std::int32_t r : members) connections.push_back(watch_->connection(r));
    group->start_watch(std::move(connections));
    parts_.process->loop().post([&] { over.set_value(); });
    changed.set_value();
  });
  changed.get_future().wait();
  over.get_future().wait();
  succeeded_ = true;
  group->set_timeout(timeout());
  out.transport = std::move(group);
  return out;
}

}  // namespace

bool is_process_transport(std::string_view name) {
  constexpr std::array<std::string_view, 5> kNames = {"shm", "tcp", "ucx", "shm+tcp", "shm+ucx"};
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

std::unique_ptr<Transport> join_group(std::string_view name, const Topology* topology_override,
                                      const JoinOptions& options) {
  LaunchInfo info = detect_launch(process_environment_variable, options.rendezvous, options.secret_file);
  Require(topology_override == nullptr || topology_override->num_ranks() == info.num_ranks,
          ErrorCode::kInvalidConfig, "topology.nodes names ",
          topology_override ? topology_override->num_ranks() : 0, " ranks but ", info.launcher, " started ",
          info.num_ranks,
          "; start as many processes as the configuration names, or leave topology.nodes out");
  const Clock::time_point deadline = Clock::now() + options.timeout;
  // All ranks form their groups in the same order.
  static std::atomic<std::uint32_t> num_groups{0};
  const std::uint32_t group_number = num_groups.fetch_add(1);
  std::shared_ptr<RendezvousServer> server;
  const std::unique_ptr<Rendezvous> rendezvous = meet(info, group_number, server, deadline);
  const std::uint64_t job = Hasher().add(info.job).add(group_number).value();
  auto process = std::make_shared<Process>(*info.secret, job, info.num_ranks);
  process->serve(std::move(server));

  wire::Card card;
  card.host = host_name();
  card.host_id = host_identity();
  card.pid = ::getpid();
  card.place = own_place();
  card.address = rendezvous->own_address();
  card.port = process->listen(card.address);
  rendezvous->put(str("card/", info.rank), encode(card), deadline);

  GroupParts parts;
  parts.name = name;
  parts.process = process;
  parts.rank = info.rank;
  for (const std::string& text : rendezvous->gather("card/", deadline)) {
    const auto parsed = wire::parse_card(text);
    Require(parsed.has_value(), ErrorCode::kTransport, "rank ", parts.cards.size(),
            " introduces itself with nonsense; it runs another version of Sluice");
    parts.cards.push_back(*parsed);
    if (info.rank == 0)
      log_debug(peer_name(static_cast<std::int32_t>(parts.cards.size()) - 1, *parsed), ": ", parsed->place);
  }
  if (info.serves && !info.meeting_file.empty()) {
    std::error_code ignored;
    std::filesystem::remove(info.meeting_file, ignored);
  }
  parts.topology = topology_override != nullptr ? *topology_override : discover(parts.cards);
  parts.kinds = path_kinds(name, info.rank, parts.cards, parts.topology);
  auto group = std::make_unique<ProcessTransport>(std::move(parts));
  rendezvous->put(str("path/", info.rank), group->path_cards(), deadline);
  group->set_path_cards(rendezvous->gather("path/", deadline));
  group->connect_control(deadline);
  group->connect_paths(deadline);
  rendezvous->put(str("ready/", info.rank), "", deadline);
  (void)rendezvous->gather("ready/", deadline);
  group->all_connected();
  group->set_timeout(kDefaultTimeout);
  rendezvous->leave();
  return group;
}

}  // namespace sluice::comm
