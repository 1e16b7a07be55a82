// Ranks are MPI processes. A put is a send and an expect is a receive, matched by a tag made of channel and signal; the
// order of messages with one tag between two ranks is MPI's own. Messages beyond 1 GiB travel in pieces.
//
// Two communicators, both duplicates of MPI_COMM_WORLD: one for data, one for what the watchdog says (group_watch.hpp),
// which has its connections over MPI here: it queues messages, and whoever makes MPI calls sends and receives them.
//
// Threads: if this module initialised MPI (MPI_THREAD_SERIALIZED), or MPI allows calls from several threads at once, a
// service thread answers the watchdog's questions while the rank computes; so a slow rank is told from a stopped one. One
// mutex covers all MPI calls made here. In the first case the program must make no MPI calls of its own while a
// transport lives. Otherwise questions are answered inside progress() and idle() only. Locks are taken in this order: MPI's,
// the watchdog's, a connection's.
//
// How it ends: whoever initialised MPI finalises it; here that happens when the process exits, after the last transport
// is gone. After an abort it does not happen at all, because MPI_Finalize waits for ranks that may be dead: the process
// exits with its own error, and the launcher cleans up. For that reason the destructor lingers after an abort: a
// launcher kills the job at the first improper exit, and the other ranks shall report before. Communicators are never
// freed, since that is collective and a peer may be gone. A rank that has ended in order waits for the others' farewells
// before it finalises MPI, and leaves without finalising when it hears of an abort instead.
#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "sluice/comm/event.hpp"
#include "sluice/comm/group_watch.hpp"
#include "sluice/comm/transport_module.hpp"

namespace sluice::comm {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr std::int64_t kPieceBytes = std::int64_t{1} << 30;  // an MPI count is an int
constexpr nanoseconds kYieldSpan = microseconds(100);        // a waiter yields this long before it sleeps
constexpr nanoseconds kMaxYieldSpan = microseconds(500);  // likewise, while a large message may be on its way
constexpr nanoseconds kSleep = microseconds(10);          // the kernel's timer slack makes it about 60
constexpr nanoseconds kServicePeriod = milliseconds(10);
constexpr nanoseconds kFlush = milliseconds(100);   // to hand a verdict or a farewell to MPI
constexpr nanoseconds kLinger = milliseconds(300);  // for the other ranks to report

void check(int rc, std::string_view what) {
  if (rc == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(rc, text, &length);
  throw Error(ErrorCode::kTransport,
              str(what, " failed: ", std::string_view(text, static_cast<std::size_t>(length))));
}

// The watchdog's connections to all other ranks. Everything but a connection's own calls needs MPI's mutex.
class Control {
 public:
  Control(MPI_Comm comm, std::int32_t rank, std::int32_t num_ranks)
      : comm_(comm),
        rank_(rank),
        gone_(static_cast<std::size_t>(num_ranks), false),
        incoming_(wire::kMaxControlBytes) {
    for (std::int32_t r = 0; r < num_ranks; ++r)
      lines_.push_back(r == rank ? nullptr : std::make_shared<Line>(has_queued_));
    post();
  }

  std::shared_ptr<net::Connection> connection(std::int32_t rank) const {
    return lines_[static_cast<std::size_t>(rank)];
  }

  // Hands on what has come and sends what is queued.
  void pump() {
    receive([this](std::int32_t from, std::span<const std::byte> bytes) {
      lines_[static_cast<std::size_t>(from)]->deliver(bytes);
    });
    if (has_queued_.exchange(false))
      for (std::size_t r = 0; r < lines_.size(); ++r)
        if (lines_[r])
          for (wire::Bytes& body : lines_[r]->take()) send(static_cast<std::int32_t>(r), std::move(body));
    if (!sends_.empty()) reclaim();
  }
  // Until what is queued is on its way; nothing is queued any more afterwards.
  void flush(nanoseconds span) {
    const Clock::time_point until = Clock::now() + span;
    do {
      pump();
    } while (!sends_.empty() && Clock::now() < until && sched_yield() == 0);
    for (const auto& line : lines_)
      if (line) line->close();
  }

  // After the transport is gone: looks for farewells. True when a rank says that the group has ended.
  bool hears_abort() {
    bool heard = false;
    receive([&](std::int32_t from, std::span<const std::byte> bytes) {
      const auto message = wire::parse_control(bytes, static_cast<std::int32_t>(lines_.size()), 0);
      if (!message) return;
      if (message->kind == wire::Control::Kind::kFarewell) set_gone(from);
      heard = heard || message->kind == wire::Control::Kind::kVerdict ||
              message->kind == wire::Control::Kind::kProposal;
    });
    return heard;
  }
  void set_gone(std::int32_t rank) { gone_[static_cast<std::size_t>(rank)] = true; }
  bool all_gone() const {
    for (std::size_t r = 0; r < gone_.size(); ++r)
      if (!gone_[r] && static_cast<std::int32_t>(r) != rank_) return false;
    return true;
  }

  // No receive may be pending when its buffer goes.
  void stop() {
    if (request_ == MPI_REQUEST_NULL) return;
    MPI_Cancel(&request_);
    MPI_Wait(&request_, MPI_STATUS_IGNORE);
  }

 private:
  class Line final : public net::Connection {
   public:
    // has_queued: set when there is something to take, while the line is not closed.
    explicit Line(std::atomic<bool>& has_queued) : has_queued_(has_queued) {}
    void start(std::function<void(std::span<const std::byte>)> on_frame,
               std::function<void(const std::string&)>) override {
      on_frame_ = std::move(on_frame);
    }
    void send(wire::Bytes body) override {
      const std::lock_guard lock(mutex_);
      if (closed_) return;
      queue_.push_back(std::move(body));
      has_queued_.store(true);
    }
    void close() override {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      queue_.clear();
    }
    std::size_t num_queued() const override {
      const std::lock_guard lock(mutex_);
      return queue_.size();
    }
    std::vector<wire::Bytes> take() {
      const std::lock_guard lock(mutex_);
      return std::exchange(queue_, {});
    }
    void deliver(std::span<const std::byte> bytes) {
      if (on_frame_) on_frame_(bytes);
    }

   private:
    std::atomic<bool>& has_queued_;
    std::function<void(std::span<const std::byte>)> on_frame_;
    mutable std::mutex mutex_;
    std::vector<wire::Bytes> queue_;
    bool closed_ = false;
  };
  struct Sending {
    wire::Bytes body;
    MPI_Request request = MPI_REQUEST_NULL;
  };

  void send(std::int32_t to, wire::Bytes body) {
    auto sending = std::make_unique<Sending>();
    sending->body = std::move(body);
    // A peer that cannot be told is found out by its silence.
    if (MPI_Isend(sending->body.data(), static_cast<int>(sending->body.size()), MPI_BYTE, to, 0, comm_,
                  &sending->request) == MPI_SUCCESS)
      sends_.push_back(std::move(sending));
  }
  void reclaim() {
    std::erase_if(sends_, [](const std::unique_ptr<Sending>& sending) {
      int done = 0;
      return MPI_Test(&sending->request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done;
    });
  }
  void post() {
    if (MPI_Irecv(incoming_.data(), static_cast<int>(incoming_.size()), MPI_BYTE, MPI_ANY_SOURCE, 0, comm_,
                  &request_) != MPI_SUCCESS)
      request_ = MPI_REQUEST_NULL;
  }
  template <typename Take>
  void receive(Take&& take) {
    while (request_ != MPI_REQUEST_NULL) {
      int done = 0, count = 0;
      MPI_Status status{};
      if (MPI_Test(&request_, &done, &status) != MPI_SUCCESS) {
        post();  // a peer broke the connection; the watchdog will find out which
        return;
      }
      if (!done) return;
      MPI_Get_count(&status, MPI_BYTE, &count);
      if (status.MPI_SOURCE >= 0 && status.MPI_SOURCE < static_cast<int>(lines_.size()) &&
          status.MPI_SOURCE != rank_ && count >= 0)
        take(status.MPI_SOURCE, std::span<const std::byte>(incoming_).first(static_cast<std::size_t>(count)));
      post();
    }
  }

  const MPI_Comm comm_;
  const std::int32_t rank_;
  std::atomic<bool> has_queued_{false};
  std::vector<std::shared_ptr<Line>> lines_;  // [num_ranks], null for the own rank
  std::vector<bool> gone_;                    // [num_ranks]; only once the transport is gone
  std::vector<std::unique_ptr<Sending>> sends_;
  std::vector<std::byte> incoming_;
  MPI_Request request_ = MPI_REQUEST_NULL;
};

// The MPI library of this process.
struct Library {
  bool initialised_here = false;
  int thread_level = MPI_THREAD_SINGLE;
  std::atomic<int> num_transports{0};
  std::atomic<bool> unclean{false};  // a group was aborted: no MPI call any more
  std::mutex closed_mutex;
  std::vector<std::unique_ptr<Control>> closed;  // of transports that ended in order

  static Library& instance() {
    static Library library;
    return library;
  }

  void require_initialised() {
    int finalised = 0, initialised = 0;
    MPI_Finalized(&finalised);
    Require(finalised == 0, ErrorCode::kInvalidState,
            "MPI was finalised already in this process; it cannot start again");
    Require(
        !unclean.load(), ErrorCode::kInvalidState,
        "an earlier group of this process was aborted, and MPI does not survive that; start a new process");
    MPI_Initialized(&initialised);
    if (initialised != 0) {
      MPI_Query_thread(&thread_level);
      return;
    }
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &thread_level), "MPI_Init_thread");
    initialised_here = true;
    std::atexit([] { instance().finalise(); });
  }

  // MPI_Finalize waits for all ranks, so it must not begin before they have all ended in order. Waits as long as
  // MPI_Finalize would, but leaves when the others have given up.
  void finalise() {
    int done = 0;
    MPI_Finalized(&done);
    if (done != 0 || num_transports.load() > 0) return;
    const std::lock_guard lock(closed_mutex);
    bool heard_abort = false;
    for (const auto& control : closed) {
      while (!unclean.load() && !control->all_gone()) {
        if (control->hears_abort())
          unclean.store(heard_abort = true);
        else if (!control->all_gone())
          std::this_thread::sleep_for(milliseconds(1));
      }
    }
    if (heard_abort) std::this_thread::sleep_for(kLinger);
    if (unclean.load()) return;
    for (const auto& control : closed) control->stop();
    MPI_Finalize();
  }
};

struct Window {
  std::byte* data = nullptr;
  std::int64_t bytes = 0;
};
struct Signal {
  std::uint64_t total = 0;
  std::vector<std::uint64_t> expected;  // [num_ranks], by source
  std::vector<std::uint64_t> landed;    // [num_ranks], by source
};
struct Channel {
  bool open = false;
  std::vector<Window> windows;
  std::vector<Signal> signals;
  std::uint64_t completed = 0;  // own puts
};

// A put or an expected put under way.
struct Operation {
  bool is_send = false;
  std::int32_t peer = -1;
  std::uint32_t channel = 0;
  std::uint32_t signal = 0;
  std::int64_t bytes = 0;
  std::int32_t num_pieces_left = 0;
};

class MpiTransport final : public Transport {
 public:
  explicit MpiTransport(const Topology* topology_override) : topology_(join(topology_override)) {
    const auto n = static_cast<std::size_t>(num_ranks());
    outstanding_to_.assign(n, 0);
    control_ = std::make_unique<Control>(control_comm_, rank_, num_ranks());
    std::vector<GroupWatch::Peer> peers;
    for (std::int32_t r = 0; r < num_ranks(); ++r)
      peers.push_back({str("rank ", r), control_->connection(r)});
    watch_ = std::make_unique<GroupWatch>(loop_, RankId(rank_), 0, std::move(peers), [] {});
    watch_->start();
    void* value = nullptr;
    int found = 0;
    check(MPI_Comm_get_attr(data_, MPI_TAG_UB, &value, &found), "MPI_Comm_get_attr(MPI_TAG_UB)");
    const std::int64_t tag_limit = found ? std::int64_t{*static_cast<int*>(value)} + 1 : 32768;
    int bits = 0;
    while ((std::int64_t{2} << bits) <= tag_limit) ++bits;
    signal_bits_ = static_cast<std::uint32_t>(bits / 2 + 1);
    channel_bits_ = static_cast<std::uint32_t>(bits) - signal_bits_;
    Library& library = Library::instance();
    ++library.num_transports;
    if (library.thread_level == MPI_THREAD_MULTIPLE ||
        (library.initialised_here && library.thread_level == MPI_THREAD_SERIALIZED))
      service_ = std::thread([this] { serve(); });
  }

  ~MpiTransport() override {
    if (service_.joinable()) {
      stop_.store(true);
      service_event_.notify();
      service_.join();
    }
    {
      const std::lock_guard lock(mutex_);
      if (aborted())
        tell_verdict();
      else
        close();
    }
    loop_.stop();
    Library& library = Library::instance();
    if (aborted()) {
      library.unclean.store(true);
      std::this_thread::sleep_for(kLinger);
    }
    --library.num_transports;
  }

  std::string_view name() const override { return "mpi"; }
  Caps caps() const override { return {.needs_progress = true}; }
  Perf perf(RankId peer) const override {
    require_rank(peer, "perf");
    return {};
  }
  RankId rank() const override { return RankId(rank_); }
  const Topology& topology() const override { return topology_; }

  void open_channel(std::uint32_t channel, std::uint32_t num_windows, std::uint32_t num_signals) override {
    Require(channel < 1u << channel_bits_ && num_signals <= 1u << signal_bits_, ErrorCode::kNotSupported,
            "channel ", channel, " with ", num_signals,
            " signals does not fit the tags of this MPI library, which allow ", 1u << channel_bits_,
            " channels of ", 1u << signal_bits_, " signals");
    if (channel >= channels_.size()) channels_.resize(channel + 1);
    Channel& c = channels_[channel];
    c.open = true;
    if (num_windows > c.windows.size()) c.windows.resize(num_windows);
    const std::vector<std::uint64_t> none(static_cast<std::size_t>(num_ranks()), 0);
    if (num_signals > c.signals.size()) c.signals.resize(num_signals, Signal{0, none, none});
    computing();
  }

  // MPI writes into a window inside the receiver's own calls only, and only while a put to it is expected, so there is
  // nothing to wait for: a pass has ended, or the group was aborted and no MPI call is made any more.
  void set_window(std::uint32_t channel, std::uint32_t window, std::span<std::byte> memory) override {
    own_window(channel, window) = {memory.data(), static_cast<std::int64_t>(memory.size())};
    computing();
  }

  void expect(std::span<const Expect> expects) override {
    for (const Expect& e : expects) {
      require_rank(e.peer, "expect");
      Signal& signal = own_signal(e.channel, e.signal);
      std::byte* to = nullptr;
      if (e.bytes != 0) {
        const Window& window = own_window(e.channel, e.window);
        Require(e.bytes > 0 && e.offset_bytes >= 0 && e.offset_bytes <= window.bytes - e.bytes,
                ErrorCode::kInvalidArgument, "rank ", rank_, " expects ", e.bytes, " bytes at offset ",
                e.offset_bytes, " of window ", e.window, " of channel ", e.channel, ", which has ",
                window.bytes, " bytes; set a larger window first");
        to = window.data + e.offset_bytes;
      }
      ++signal.expected[e.peer.index()];
      start({.is_send = false, .peer = e.peer.value, .channel = e.channel, .signal = e.signal}, to, e.bytes);
    }
    computing();
  }

  void put(const Put& put) override {
    require_rank(put.peer, "put");
    Require(put.offset_bytes >= 0, ErrorCode::kInvalidArgument, "put at negative offset ", put.offset_bytes);
    own_channel(put.channel);
    Require(put.signal < 1u << signal_bits_, ErrorCode::kInvalidArgument, "put names signal ", put.signal,
            ", must be below ", 1u << signal_bits_);
    computing();
    if (aborted()) return;
    ++num_puts_;
    ++num_outstanding_;
    outstanding_bytes_ += static_cast<std::int64_t>(put.source.size());
    ++outstanding_to_[put.peer.index()];
    // MPI reads a send buffer only, but takes it as a plain pointer in the receive's signature that start() shares.
    start({.is_send = true, .peer = put.peer.value, .channel = put.channel, .signal = put.signal},
          const_cast<std::byte*>(put.source.data()), static_cast<std::int64_t>(put.source.size()));
  }

  bool progress() override {
    const std::lock_guard lock(mutex_);
    if (aborted()) {
      tell_verdict();
      return false;
    }
    const bool moved = progress_data();
    service_control();
    return moved && !aborted();
  }

  std::uint64_t signal(std::uint32_t channel, std::uint32_t signal) const override {
    return own_signal(channel, signal).total;
  }
  std::uint64_t puts_completed(std::uint32_t channel) const override {
    return own_channel(channel).completed;
  }
  std::vector<RankId> missing(std::uint32_t channel, std::uint32_t signal) const override {
    const Signal& state = own_signal(channel, signal);
    std::vector<RankId> ranks;
    for (std::size_t r = 0; r < state.expected.size(); ++r)
      if (state.expected[r] > state.landed[r]) ranks.push_back(RankId(static_cast<std::int32_t>(r)));
    return ranks;
  }

  // Without a service thread, another thread's abort reaches the peers with the next call of the rank's own thread.
  bool abort(const AbortRecord& record) noexcept override {
    const bool first = watch_->abort(record);
    try {
      if (!first) return false;
      if (std::this_thread::get_id() == owner_.load() || service_.joinable()) {
        const std::lock_guard lock(mutex_);
        tell_verdict();
      }
    } catch (...) {
      // Memory or a lock failed: the peers find out by their deadline.
    }
    return first;
  }
  bool aborted() const noexcept override { return watch_->aborted(); }
  AbortRecord abort_record() const override { return watch_->record(); }

  void set_timeout(nanoseconds timeout) override {
    Require(timeout.count() > 0, ErrorCode::kInvalidArgument, "the timeout of a wait must be positive, is ",
            timeout.count(), " ns");
    patience_.set_timeout(timeout);
  }
  nanoseconds timeout() const override { return patience_.timeout(); }

  Status idle(std::span<const WaitSpec> pending) override {
    const Clock::time_point now = Clock::now();
    owner_.store(std::this_thread::get_id());
    OwnPuts puts;
    {
      const std::lock_guard lock(mutex_);
      if (!aborted()) service_control();
      if (aborted()) return end();
      puts = {.made = num_puts_, .outstanding = num_outstanding_};
    }
    const WaitLook look = look_at(*this, pending, puts);
    if (look.there) return {};
    collect_missing(pending);
    phase_ = pending.empty() ? std::string_view("own puts") : pending[0].phase;
    chunk_ = pending.empty() ? -1 : pending[0].chunk;
    const Patience::Stage stage = patience_.step(now, look.key);
    watch_->waiting(missing_, phase_, chunk_, patience_, stage, look.key,
                    [&] { return describe_wait(*this, pending, missing_, puts, patience_, now); });
    if (aborted()) {
      const std::lock_guard lock(mutex_);
      return end();
    }
    // MPI moves bytes inside our calls: a rank that sends is not idle, nor is one that receives, for as long as what it
    // expects would take at 1 GB/s.
    const nanoseconds due = std::clamp(nanoseconds(expected_bytes_), kYieldSpan, kMaxYieldSpan);
    if (patience_.elapsed(now) < due || outstanding_bytes_ > 0)
      sched_yield();
    else
      std::this_thread::sleep_for(kSleep);
    return {};
  }

  void advanced() override {
    patience_.restart();
    computing();
  }

 private:
  // ---- set-up

  Topology join(const Topology* topology_override) {
    Library::instance().require_initialised();
    int rank = 0, size = 0;
    check(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
    check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
    rank_ = rank;
    Require(topology_override == nullptr || topology_override->num_ranks() == size, ErrorCode::kInvalidConfig,
            "topology.nodes names ", topology_override ? topology_override->num_ranks() : 0,
            " ranks but MPI runs ", size,
            "; start as many processes as the configuration names, or leave topology.nodes out");
    for (MPI_Comm* comm : {&data_, &control_comm_}) {
      check(MPI_Comm_dup(MPI_COMM_WORLD, comm), "MPI_Comm_dup");
      check(MPI_Comm_set_errhandler(*comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    }
    if (topology_override != nullptr) return *topology_override;
    // A node is known by its lowest rank.
    MPI_Comm node = MPI_COMM_NULL;
    check(MPI_Comm_split_type(data_, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node),
          "MPI_Comm_split_type");
    int leader = rank;
    check(MPI_Allreduce(&rank, &leader, 1, MPI_INT, MPI_MIN, node), "MPI_Allreduce");
    check(MPI_Comm_free(&node), "MPI_Comm_free");
    std::vector<int> leaders(static_cast<std::size_t>(size));
    check(MPI_Allgather(&leader, 1, MPI_INT, leaders.data(), 1, MPI_INT, data_), "MPI_Allgather");
    std::vector<std::vector<std::int32_t>> nodes;
    for (int l = 0; l < size; ++l) {
      std::vector<std::int32_t> members;
      for (int r = 0; r < size; ++r)
        if (leaders[static_cast<std::size_t>(r)] == l) members.push_back(r);
      if (!members.empty()) nodes.push_back(std::move(members));
    }
    return Topology(std::move(nodes));
  }

  // ---- data

  void require_rank(RankId peer, std::string_view what) const {
    Require(peer.value >= 0 && peer.value < num_ranks(), ErrorCode::kInvalidArgument, what, " names rank ",
            peer.value, "; ranks are 0..", num_ranks() - 1);
  }
  const Channel& own_channel(std::uint32_t channel) const {
    Require(channel < channels_.size() && channels_[channel].open, ErrorCode::kInvalidState, "channel ",
            channel, " is not open on rank ", rank_, "; call open_channel first");
    return channels_[channel];
  }
  Window& own_window(std::uint32_t channel, std::uint32_t window) {
    const Channel& c = own_channel(channel);
    Require(window < c.windows.size(), ErrorCode::kInvalidArgument, "window ", window, " of channel ",
            channel, " does not exist on rank ", rank_, ", which opened ", c.windows.size());
    return channels_[channel].windows[window];
  }
  const Signal& own_signal(std::uint32_t channel, std::uint32_t signal) const {
    const Channel& c = own_channel(channel);
    Require(signal < c.signals.size(), ErrorCode::kInvalidArgument, "signal ", signal, " of channel ",
            channel, " does not exist on rank ", rank_, ", which opened ", c.signals.size());
    return c.signals[signal];
  }
  Signal& own_signal(std::uint32_t channel, std::uint32_t signal) {
    return const_cast<Signal&>(std::as_const(*this).own_signal(channel, signal));
  }

  int tag_of(std::uint32_t channel, std::uint32_t signal) const {
    return static_cast<int>(channel << signal_bits_ | signal);
  }

  void start(Operation operation, std::byte* data, std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    if (aborted()) return;
    std::size_t slot = operations_.size();
    if (spare_.empty()) {
      operations_.emplace_back();
    } else {
      slot = spare_.back();
      spare_.pop_back();
    }
    operation.bytes = bytes;
    if (!operation.is_send) expected_bytes_ += bytes;
    operation.num_pieces_left =
        static_cast<std::int32_t>(std::max<std::int64_t>(1, (bytes + kPieceBytes - 1) / kPieceBytes));
    operations_[slot] = operation;
    const int tag = tag_of(operation.channel, operation.signal);
    std::int64_t at = 0;
    do {
      const int count = static_cast<int>(std::min(kPieceBytes, bytes - at));
      MPI_Request request = MPI_REQUEST_NULL;
      const int rc = operation.is_send
                         ? MPI_Isend(data + at, count, MPI_BYTE, operation.peer, tag, data_, &request)
                         : MPI_Irecv(data + at, count, MPI_BYTE, operation.peer, tag, data_, &request);
      if (rc != MPI_SUCCESS) {
        fail(rc, operation);
        return;
      }
      requests_.push_back(request);
      of_request_.push_back({slot, count});
      at += count;
    } while (at < bytes);
  }

  // Moves data along; true if anything completed. The mutex is held.
  bool progress_data() {
    if (requests_.empty()) return false;
    const auto n = requests_.size();
    if (finished_.size() < n) {
      finished_.resize(requests_.capacity());
      statuses_.resize(requests_.capacity());
    }
    int num_finished = 0;
    const int rc = MPI_Testsome(static_cast<int>(n), requests_.data(), &num_finished, finished_.data(),
                                statuses_.data());
    if (rc != MPI_SUCCESS && rc != MPI_ERR_IN_STATUS) {
      fail(rc, operations_[of_request_.front().slot]);
      return false;
    }
    if (num_finished == MPI_UNDEFINED || num_finished <= 0) return false;
    for (int i = 0; i < num_finished; ++i) {
      const Piece piece = of_request_[static_cast<std::size_t>(finished_[static_cast<std::size_t>(i)])];
      const MPI_Status& status = statuses_[static_cast<std::size_t>(i)];
      Operation& operation = operations_[piece.slot];
      if (rc == MPI_ERR_IN_STATUS && status.MPI_ERROR != MPI_SUCCESS) {
        fail(status.MPI_ERROR, operation);
        return false;
      }
      int count = piece.bytes;
      if (!operation.is_send) MPI_Get_count(&status, MPI_BYTE, &count);
      if (count != piece.bytes) {
        disagree(operation, piece.bytes, count);
        return false;
      }
      if (--operation.num_pieces_left == 0) complete(operation, piece.slot);
    }
    // Close the gaps that finished requests leave, keeping the order.
    std::size_t kept = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (requests_[i] == MPI_REQUEST_NULL) continue;
      requests_[kept] = requests_[i];
      of_request_[kept] = of_request_[i];
      ++kept;
    }
    requests_.resize(kept);
    of_request_.resize(kept);
    return true;
  }

  void complete(const Operation& operation, std::size_t slot) {
    Channel& channel = channels_[operation.channel];
    if (operation.is_send) {
      ++channel.completed;
      --num_outstanding_;
      outstanding_bytes_ -= operation.bytes;
      --outstanding_to_[static_cast<std::size_t>(operation.peer)];
    } else {
      Signal& signal = channel.signals[operation.signal];
      expected_bytes_ -= operation.bytes;
      ++signal.landed[static_cast<std::size_t>(operation.peer)];
      ++signal.total;
    }
    spare_.push_back(slot);
  }

  // ---- failures

  void fail(int rc, const Operation& operation) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(rc, text, &length);
    int error_class = MPI_SUCCESS;
    MPI_Error_class(rc, &error_class);
    AbortRecord record = blame(operation);
    record.status = error_class == MPI_ERR_TRUNCATE
                        ? Status{ErrorCode::kDisagreement, str(describe(operation),
                                                               " is larger than expected; the ranks "
                                                               "disagree on the plan")}
                        : Status{ErrorCode::kTransport,
                                 str(describe(operation),
                                     " failed: ", std::string_view(text, static_cast<std::size_t>(length)))};
    watch_->abort(record);
    tell_verdict();
  }

  void disagree(const Operation& operation, int expected, int seen) {
    AbortRecord record = blame(operation);
    record.status = {ErrorCode::kDisagreement, str(describe(operation), " has ", seen, " bytes, expected ",
                                                   expected, "; the ranks disagree on the plan")};
    watch_->abort(record);
    tell_verdict();
  }

  AbortRecord blame(const Operation& operation) const {
    AbortRecord record;
    record.culprit = RankId(operation.peer);
    record.reporter = rank();
    record.phase = phase_;
    record.chunk = chunk_;
    return record;
  }
  std::string describe(const Operation& operation) const {
    return str("rank ", rank_, ": a message ", operation.is_send ? "to" : "from", " rank ", operation.peer,
               " for signal ", operation.signal, " of channel ", operation.channel);
  }

  // ---- the watchdog

  void computing() {
    watch_->computing();
    if (owner_.load() != std::this_thread::get_id()) owner_.store(std::this_thread::get_id());
  }

  void collect_missing(std::span<const WaitSpec> pending) {
    missing_.clear();
    for (std::int32_t r = 0; r < num_ranks(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      bool owes = pending.empty() && outstanding_to_[i] > 0;
      for (std::size_t p = 0; p < pending.size() && !owes; ++p) {
        const Signal& signal = own_signal(pending[p].channel, pending[p].signal);
        owes = signal.expected[i] > signal.landed[i];
      }
      if (owes) missing_.push_back(RankId(r));
    }
  }

  // The mutex is held.
  Status end() {
    tell_verdict();
    return abort_record().status;
  }

  // Tells all ranks once, and gives MPI a moment to take it; afterwards no MPI call is made any more.
  void tell_verdict() {
    if (verdict_told_) return;
    verdict_told_ = true;
    Library::instance().unclean.store(true);
    for (std::size_t i = 0; i < requests_.size(); ++i)
      if (requests_[i] != MPI_REQUEST_NULL && !operations_[of_request_[i].slot].is_send)
        MPI_Cancel(&requests_[i]);  // nothing shall land any more
    control_->flush(kFlush);
  }

  // Sends and handles what the watchdogs say. The mutex is held; the group is not aborted.
  void service_control() {
    control_->pump();
    if (aborted()) tell_verdict();
  }

  void serve() {
    while (!stop_.load()) {
      const std::uint32_t ticket = service_event_.ticket();
      {
        const std::lock_guard lock(mutex_);
        if (aborted()) return;
        service_control();
      }
      service_event_.wait(ticket, kServicePeriod);
    }
  }

  // An orderly end: own puts go first, then the farewell. The mutex is held and the service thread has ended.
  void close() {
    const Clock::time_point until = Clock::now() + patience_.timeout();
    while (num_outstanding_ > 0 && !aborted() && Clock::now() < until) {
      if (progress_data()) continue;
      service_control();
      std::this_thread::sleep_for(kSleep);
    }
    if (aborted()) return;
    watch_->farewell(nanoseconds(0));
    control_->flush(kFlush);
    for (std::int32_t r = 0; r < num_ranks(); ++r)
      if (watch_->is_gone(r)) control_->set_gone(r);
    // Receives that nobody will serve must not outlive their buffers.
    for (MPI_Request& request : requests_) {
      int done = 0;
      MPI_Cancel(&request);
      MPI_Test(&request, &done, MPI_STATUS_IGNORE);
      if (!done) MPI_Request_free(&request);
    }
    Library& library = Library::instance();
    if (num_outstanding_ > 0) library.unclean.store(true);  // MPI_Finalize would wait for their receiver
    if (library.initialised_here) {
      const std::lock_guard lock(library.closed_mutex);
      library.closed.push_back(std::move(control_));
    } else {
      control_->stop();
    }
  }

  struct Piece {
    std::size_t slot = 0;
    int bytes = 0;
  };
  std::int32_t rank_ = 0;
  MPI_Comm data_ = MPI_COMM_NULL;
  MPI_Comm control_comm_ = MPI_COMM_NULL;
  Topology topology_;
  std::uint32_t signal_bits_ = 0;
  std::uint32_t channel_bits_ = 0;

  // The owner's alone.
  std::vector<Channel> channels_;
  Patience patience_;
  std::uint64_t num_puts_ = 0;

  // Guards every MPI call and all that follows up to the record.
  std::mutex mutex_;
  std::uint64_t num_outstanding_ = 0;  // own puts
  std::int64_t outstanding_bytes_ = 0;
  std::int64_t expected_bytes_ = 0;           // of receives that have not landed
  std::vector<std::int64_t> outstanding_to_;  // [num_ranks]
  std::vector<Operation> operations_;
  std::vector<std::size_t> spare_;
  std::vector<MPI_Request> requests_;
  std::vector<Piece> of_request_;  // beside requests_
  std::vector<int> finished_;
  std::vector<MPI_Status> statuses_;

  std::unique_ptr<Control> control_;
  bool verdict_told_ = false;

  // The owner's alone: of the last wait.
  std::vector<RankId> missing_;
  std::string_view phase_;
  std::int32_t chunk_ = -1;

  net::Loop loop_;  // for the watch's heartbeats
  std::unique_ptr<GroupWatch> watch_;

  std::atomic<std::thread::id> owner_{};
  std::atomic<bool> stop_{false};
  Event service_event_;
  std::thread service_;
};

}  // namespace
}  // namespace sluice::comm

extern "C" sluice::comm::Transport* sluice_comm_make_transport_1(const sluice::Topology* topology_override) {
  return new sluice::comm::MpiTransport(topology_override);
}
