// Ranks are MPI processes. A put is a send and an expect is a receive, matched by a tag made of channel and signal; the
// order of messages with one tag between two ranks is MPI's own. Messages beyond 1 GiB travel in pieces.
//
// Two communicators, both duplicates of MPI_COMM_WORLD: one for data, one for the watchdog's small messages (who waits
// for whom, a proposed verdict, the verdict, a farewell).
//
// Threads: if this module initialised MPI (MPI_THREAD_SERIALIZED), or MPI allows calls from several threads at once, a
// service thread answers the watchdog's questions while the rank computes; so a slow rank is told from a stopped one. One
// mutex covers all MPI calls made here. In the first case the program must make no MPI calls of its own while a
// transport lives. Otherwise questions are answered inside progress() and idle() only.
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
#include "sluice/comm/transport_module.hpp"
#include "sluice/comm/watchdog.hpp"

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
constexpr nanoseconds kWaitingIsFresh = milliseconds(250);  // idle() repeats far more often than that
constexpr nanoseconds kFarewellGrace = milliseconds(200);   // a farewell may overtake the data sent before it
constexpr nanoseconds kFlush = milliseconds(100);           // to hand a verdict or a farewell to MPI
constexpr nanoseconds kLinger = milliseconds(300);          // for the other ranks to report
constexpr std::int32_t kMaxListedWaits = 64;

void check(int rc, std::string_view what) {
  if (rc == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(rc, text, &length);
  throw Error(ErrorCode::kTransport,
              str(what, " failed: ", std::string_view(text, static_cast<std::size_t>(length))));
}

enum class Kind : std::int32_t {
  kQuestion = 1,  // what do you wait for?
  kAnswer,
  kProposal,  // to the lowest rank that answers: this is my verdict
  kVerdict,   // to all: the group has ended
  kFarewell,  // the sender's transport has closed
};

// A message of the watchdog. Whatever is read from it is checked before use.
struct Message {
  static constexpr std::uint32_t kMagic = 0x534c4331;  // "SLC1": the layout's version is its last digit
  std::uint32_t magic = kMagic;
  Kind kind = Kind::kQuestion;
  std::uint64_t question = 0;
  std::int64_t last_call_ns = -1;  // age of the sender's last transport call
  std::int32_t waiting = 0;
  std::int32_t num_waits = 0;
  std::int32_t code = 0;
  std::int32_t culprit = -1;
  std::int32_t reporter = -1;
  std::int32_t chunk = -1;
  std::array<std::int32_t, kMaxListedWaits> waits{};
  std::array<char, 64> phase{};
  std::array<char, 1536> text{};
};

template <std::size_t N>
void store_text(std::array<char, N>& to, std::string_view text) {
  const std::size_t length = std::min(text.size(), N - 1);
  std::memcpy(to.data(), text.data(), length);
  to[length] = '\0';
}
template <std::size_t N>
std::string load_text(const std::array<char, N>& from) {
  return std::string(from.data(), strnlen(from.data(), N));
}

// Receives the watchdog's messages on one communicator, and knows who has said farewell.
class Inbox {
 public:
  Inbox(MPI_Comm comm, std::int32_t rank, std::int32_t num_ranks)
      : comm_(comm), gone_at_(static_cast<std::size_t>(num_ranks)), rank_(rank), num_left_(num_ranks - 1) {
    post();
  }

  // Takes the next message, checked for its size, its version and its source; returns its source or -1.
  std::int32_t take(Message& message) {
    while (request_ != MPI_REQUEST_NULL) {
      int done = 0;
      MPI_Status status{};
      if (MPI_Test(&request_, &done, &status) != MPI_SUCCESS) {
        post();  // a peer broke the connection; the watchdog will find out which
        return -1;
      }
      if (!done) return -1;
      int count = 0;
      MPI_Get_count(&status, MPI_BYTE, &count);
      message = incoming_;
      post();
      if (count == static_cast<int>(sizeof(Message)) && message.magic == Message::kMagic &&
          status.MPI_SOURCE >= 0 && status.MPI_SOURCE < static_cast<int>(gone_at_.size()) &&
          status.MPI_SOURCE != rank_)
        return status.MPI_SOURCE;
    }
    return -1;
  }

  void set_gone(std::int32_t rank) {
    Clock::time_point& at = gone_at_[static_cast<std::size_t>(rank)];
    if (at != Clock::time_point()) return;
    at = Clock::now();
    --num_left_;
  }
  // The epoch = still there.
  Clock::time_point gone_at(std::int32_t rank) const { return gone_at_[static_cast<std::size_t>(rank)]; }
  bool is_gone(std::int32_t rank) const { return gone_at(rank) != Clock::time_point(); }
  bool all_gone() const { return num_left_ == 0; }

  // No receive may be pending when its buffer goes.
  void stop() {
    if (request_ == MPI_REQUEST_NULL) return;
    MPI_Cancel(&request_);
    MPI_Wait(&request_, MPI_STATUS_IGNORE);
  }

 private:
  void post() {
    if (MPI_Irecv(&incoming_, sizeof(Message), MPI_BYTE, MPI_ANY_SOURCE, 0, comm_, &request_) != MPI_SUCCESS)
      request_ = MPI_REQUEST_NULL;
  }

  MPI_Comm comm_;
  std::vector<Clock::time_point> gone_at_;  // [num_ranks]
  std::int32_t rank_;
  std::int32_t num_left_;  // other ranks that have not said farewell
  Message incoming_;
  MPI_Request request_ = MPI_REQUEST_NULL;
};

// The MPI library of this process.
struct Library {
  bool initialised_here = false;
  int thread_level = MPI_THREAD_SINGLE;
  std::atomic<int> num_transports{0};
  std::atomic<bool> unclean{false};  // a group was aborted: no MPI call any more
  std::mutex closed_mutex;
  std::vector<std::unique_ptr<Inbox>> closed;  // of transports that ended in order

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
    for (const auto& inbox : closed) {
      while (!unclean.load() && !inbox->all_gone()) {
        Message message;
        const std::int32_t from = inbox->take(message);
        if (from < 0)
          std::this_thread::sleep_for(milliseconds(1));
        else if (message.kind == Kind::kFarewell)
          inbox->set_gone(from);
        else if (message.kind == Kind::kVerdict || message.kind == Kind::kProposal)
          unclean.store(heard_abort = true);
      }
    }
    if (heard_abort) std::this_thread::sleep_for(kLinger);
    if (unclean.load()) return;
    for (const auto& inbox : closed) inbox->stop();
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
    answers_.resize(n);
    inbox_ = std::make_unique<Inbox>(control_, rank_, num_ranks());
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
    return moved;
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
    bool first = false;
    try {
      first = record_abort(record);
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
  bool aborted() const noexcept override { return aborted_.load(std::memory_order_acquire); }
  AbortRecord abort_record() const override {
    const std::lock_guard lock(record_mutex_);
    return record_;
  }

  void set_timeout(nanoseconds timeout) override {
    Require(timeout.count() > 0, ErrorCode::kInvalidArgument, "the timeout of a wait must be positive, is ",
            timeout.count(), " ns");
    patience_.set_timeout(timeout);
  }
  nanoseconds timeout() const override { return patience_.timeout(); }

  Status idle(std::span<const WaitSpec> pending) override {
    const Clock::time_point now = Clock::now();
    heartbeat_ns_.store(now.time_since_epoch().count(), std::memory_order_relaxed);
    owner_.store(std::this_thread::get_id());
    {
      const std::lock_guard lock(mutex_);
      if (!aborted()) service_control();
      if (aborted()) {
        tell_verdict();
        return abort_record().status;
      }
      const OwnPuts puts{.made = num_puts_, .outstanding = num_outstanding_};
      const WaitLook look = look_at(*this, pending, puts);
      if (look.there) return {};
      collect_missing(pending);
      waiting_ = true;
      phase_ = pending.empty() ? std::string_view("own puts") : pending[0].phase;
      chunk_ = pending.empty() ? -1 : pending[0].chunk;
      const Patience::Stage stage = patience_.step(now, look.key);
      const auto failed = [&] { return describe_wait(*this, pending, missing_, puts, patience_, now); };
      if (look.key != proposal_key_) proposal_.reset();  // something came after all
      proposal_key_ = look.key;
      if (stage == Patience::Stage::kHope) asking_ = false;
      if (stage == Patience::Stage::kSuspect) ask(now);
      if (const RankId lost = lost_among_missing(now); lost.valid())
        propose(peer_lost_record(failed(), lost), now);
      else if (stage == Patience::Stage::kOver && !proposal_)
        propose(deadline_record(failed(), states(now)), now);
      if (proposal_ && now >= proposal_until_ && record_abort(*proposal_)) tell_verdict();
      if (aborted()) {
        tell_verdict();
        return abort_record().status;
      }
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
    for (MPI_Comm* comm : {&data_, &control_}) {
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
    record_abort(record);
    tell_verdict();
  }

  void disagree(const Operation& operation, int expected, int seen) {
    AbortRecord record = blame(operation);
    record.status = {ErrorCode::kDisagreement, str(describe(operation), " has ", seen, " bytes, expected ",
                                                   expected, "; the ranks disagree on the plan")};
    record_abort(record);
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
    heartbeat_ns_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    if (owner_.load() != std::this_thread::get_id()) owner_.store(std::this_thread::get_id());
    waiting_ = false;
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

  nanoseconds since_last_call(Clock::time_point now) const {
    const std::int64_t at = heartbeat_ns_.load(std::memory_order_relaxed);
    return nanoseconds(at < 0 ? -1 : std::max<std::int64_t>(0, now.time_since_epoch().count() - at));
  }

  RankId lost_among_missing(Clock::time_point now) const {
    for (const RankId r : missing_) {
      if (inbox_->is_gone(r.value) && now - inbox_->gone_at(r.value) >= kFarewellGrace) return r;
    }
    return RankId();
  }

  // Asks all ranks, again every quarter of the suspicion window.
  void ask(Clock::time_point now) {
    if (!asking_) {
      asking_ = true;
      next_question_ = now;
      first_question_ = question_ + 1;
    }
    if (now < next_question_) return;
    next_question_ = now + patience_.suspicion() / 4;
    Message message;
    message.kind = Kind::kQuestion;
    message.question = ++question_;
    send_to_all(message);
  }

  void answer(std::int32_t to, std::uint64_t question, Clock::time_point now) {
    Message message;
    message.kind = Kind::kAnswer;
    message.question = question;
    const nanoseconds age = since_last_call(now);
    message.last_call_ns = age.count();
    message.waiting = waiting_ && age <= kWaitingIsFresh;
    if (message.waiting) {
      message.num_waits = static_cast<std::int32_t>(std::min<std::size_t>(missing_.size(), kMaxListedWaits));
      for (std::int32_t i = 0; i < message.num_waits; ++i)
        message.waits[static_cast<std::size_t>(i)] = missing_[static_cast<std::size_t>(i)].value;
      message.chunk = chunk_;
      store_text(message.phase, phase_);
    }
    send(to, message);
  }

  // The table as this rank knows it after its questions.
  std::vector<RankState> states(Clock::time_point now) const {
    std::vector<RankState> states(answers_.size());
    for (std::size_t r = 0; r < states.size(); ++r) {
      if (static_cast<std::int32_t>(r) == rank_) {
        states[r].kind = RankState::Kind::kWaiting;
        states[r].waits_for = missing_;
        states[r].phase = phase_;
        states[r].chunk = chunk_;
      } else if (inbox_->is_gone(static_cast<std::int32_t>(r))) {
        states[r].kind = RankState::Kind::kGone;
      } else if (answers_[r].question >= first_question_) {
        states[r] = answers_[r].state;
      } else if (answers_[r].at != Clock::time_point()) {
        states[r].last_sign = now - answers_[r].at;
      }
    }
    return states;
  }

  // Hands a verdict to the lowest rank that is thought alive, so that all ranks get the same one when several judge at
  // once. Its answer is due at once; if it does not come, our own verdict stands.
  void propose(AbortRecord record, Clock::time_point now) {
    if (proposal_) return;
    std::int32_t coordinator = 0;
    for (; coordinator < rank_; ++coordinator) {
      const auto c = static_cast<std::size_t>(coordinator);
      if (!inbox_->is_gone(coordinator) && (!asking_ || answers_[c].question >= first_question_)) break;
    }
    if (coordinator == rank_) {
      if (record_abort(record)) tell_verdict();
      return;
    }
    send(coordinator, verdict_message(Kind::kProposal, record));
    proposal_ = std::move(record);
    proposal_until_ = now + std::min<nanoseconds>(patience_.timeout() / 10, milliseconds(200));
  }

  bool record_abort(const AbortRecord& record) {
    const std::lock_guard lock(record_mutex_);
    if (aborted()) return false;
    record_ = record;
    if (record_.status.ok())
      record_.status = {ErrorCode::kAborted, str("rank ", record.reporter.value, " ended the group")};
    aborted_.store(true, std::memory_order_release);
    return true;
  }

  static Message verdict_message(Kind kind, const AbortRecord& record) {
    Message message;
    message.kind = kind;
    message.code = static_cast<std::int32_t>(record.status.code);
    message.culprit = record.culprit.value;
    message.reporter = record.reporter.value;
    message.chunk = record.chunk;
    store_text(message.phase, record.phase);
    store_text(message.text, record.status.message);
    return message;
  }

  AbortRecord record_of(const Message& message) const {
    const auto valid_rank = [&](std::int32_t r) { return RankId(r >= 0 && r < num_ranks() ? r : -1); };
    AbortRecord record;
    record.culprit = valid_rank(message.culprit);
    record.reporter = valid_rank(message.reporter);
    record.chunk = message.chunk;
    record.phase = load_text(message.phase);
    const bool known = message.code > 0 && message.code <= static_cast<std::int32_t>(ErrorCode::kInternal);
    record.status = {known ? static_cast<ErrorCode>(message.code) : ErrorCode::kAborted,
                     load_text(message.text)};
    return record;
  }

  // Tells all ranks once, and gives MPI a moment to take it; afterwards no MPI call is made any more.
  void tell_verdict() {
    if (verdict_told_) return;
    verdict_told_ = true;
    Library::instance().unclean.store(true);
    for (std::size_t i = 0; i < requests_.size(); ++i)
      if (requests_[i] != MPI_REQUEST_NULL && !operations_[of_request_[i].slot].is_send)
        MPI_Cancel(&requests_[i]);  // nothing shall land any more
    if (heard_verdict_) return;     // its author tells everyone
    send_to_all(verdict_message(Kind::kVerdict, abort_record()));
    const Clock::time_point until = Clock::now() + kFlush;
    while (reclaim_sends() > 0 && Clock::now() < until) sched_yield();
  }

  void send(std::int32_t to, const Message& message) {
    reclaim_sends();
    if (spare_sends_.empty()) {
      sends_.push_back(std::make_unique<ControlSend>());
    } else {
      sends_.push_back(std::move(spare_sends_.back()));
      spare_sends_.pop_back();
    }
    ControlSend& sending = *sends_.back();
    sending.message = message;
    if (MPI_Isend(&sending.message, sizeof(Message), MPI_BYTE, to, 0, control_, &sending.request) !=
        MPI_SUCCESS) {
      // A peer that cannot be told is found out by its silence.
      spare_sends_.push_back(std::move(sends_.back()));
      sends_.pop_back();
    }
  }
  void send_to_all(const Message& message) {
    for (std::int32_t r = 0; r < num_ranks(); ++r)
      if (r != rank_) send(r, message);
  }
  std::size_t reclaim_sends() {
    for (std::size_t i = 0; i < sends_.size();) {
      int done = 0;
      if (MPI_Test(&sends_[i]->request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && !done) {
        ++i;
        continue;
      }
      spare_sends_.push_back(std::move(sends_[i]));
      sends_[i] = std::move(sends_.back());
      sends_.pop_back();
    }
    return sends_.size();
  }

  // Handles what came. The mutex is held; the group is not aborted.
  void service_control() {
    Message message;
    for (std::int32_t from = inbox_->take(message); from >= 0; from = inbox_->take(message)) {
      handle(from, message);
      if (aborted()) return;
    }
  }

  void handle(std::int32_t from, const Message& message) {
    const Clock::time_point now = Clock::now();
    const auto f = static_cast<std::size_t>(from);
    switch (message.kind) {
      case Kind::kQuestion:
        answer(from, message.question, now);
        break;
      case Kind::kAnswer: {
        Answer& a = answers_[f];
        if (message.question > question_ || message.question < a.question) break;
        a.question = message.question;
        a.at = now;
        a.state = RankState();
        a.state.answered = true;
        a.state.last_sign = nanoseconds(std::max<std::int64_t>(-1, message.last_call_ns));
        a.state.kind = message.waiting ? RankState::Kind::kWaiting : RankState::Kind::kComputing;
        for (std::int32_t i = 0; message.waiting && i < std::clamp(message.num_waits, 0, kMaxListedWaits);
             ++i) {
          const RankId r(message.waits[static_cast<std::size_t>(i)]);
          if (r.value >= 0 && r.value < num_ranks()) a.state.waits_for.push_back(r);
        }
        a.state.phase = load_text(message.phase);
        a.state.chunk = message.chunk;
        break;
      }
      case Kind::kProposal:
        if (record_abort(record_of(message))) tell_verdict();
        break;
      case Kind::kVerdict:
        if (record_abort(record_of(message))) {
          heard_verdict_ = true;
          tell_verdict();
        }
        break;
      case Kind::kFarewell:
        inbox_->set_gone(from);
        break;
    }
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
    Message message;
    message.kind = Kind::kFarewell;
    send_to_all(message);
    const Clock::time_point flushed = Clock::now() + kFlush;
    while (reclaim_sends() > 0 && Clock::now() < flushed) sched_yield();
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
      library.closed.push_back(std::move(inbox_));
    } else {
      inbox_->stop();
    }
  }

  struct Piece {
    std::size_t slot = 0;
    int bytes = 0;
  };
  struct ControlSend {
    Message message;
    MPI_Request request = MPI_REQUEST_NULL;
  };
  struct Answer {
    std::uint64_t question = 0;
    Clock::time_point at;
    RankState state;
  };

  std::int32_t rank_ = 0;
  MPI_Comm data_ = MPI_COMM_NULL;
  MPI_Comm control_ = MPI_COMM_NULL;
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

  std::unique_ptr<Inbox> inbox_;
  std::vector<std::unique_ptr<ControlSend>> sends_;
  std::vector<std::unique_ptr<ControlSend>> spare_sends_;
  std::vector<Answer> answers_;  // [num_ranks]
  std::vector<RankId> missing_;
  std::string_view phase_;
  std::int32_t chunk_ = -1;
  std::uint64_t question_ = 0;
  std::uint64_t first_question_ = 0;  // of the present suspicion
  bool asking_ = false;
  Clock::time_point next_question_;
  std::optional<AbortRecord> proposal_;
  std::uint64_t proposal_key_ = 0;
  Clock::time_point proposal_until_;
  bool verdict_told_ = false;
  bool heard_verdict_ = false;

  mutable std::mutex record_mutex_;
  AbortRecord record_;
  std::atomic<bool> aborted_{false};

  std::atomic<bool> waiting_{false};
  std::atomic<std::int64_t> heartbeat_ns_{-1};
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
