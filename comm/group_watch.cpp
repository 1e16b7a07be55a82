#include "sluice/comm/group_watch.hpp"

#include <algorithm>
#include <thread>

namespace sluice::comm {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr nanoseconds kHeartbeat = milliseconds(500);
constexpr nanoseconds kWaitingIsFresh = milliseconds(250);  // waiting() repeats far more often than that
constexpr nanoseconds kFarewellGrace = milliseconds(200);   // a farewell may overtake the data sent before it
constexpr nanoseconds kDataLossGrace =
    milliseconds(500);  // and the end of the data may overtake the farewell
constexpr nanoseconds kCoordinatorTime = milliseconds(200);
constexpr std::uint64_t kMaxExchanges = 4;

}  // namespace

GroupWatch::GroupWatch(net::Loop& loop, RankId rank, std::uint32_t epoch, std::vector<Peer> peers,
                       std::function<void()> wake)
    : loop_(loop),
      rank_(rank.value),
      epoch_(epoch),
      peers_(std::move(peers)),
      wake_(std::move(wake)),
      alive_(std::make_shared<bool>(true)),
      peer_states_(peers_.size()) {}

GroupWatch::~GroupWatch() = default;

void GroupWatch::start() {
  for (std::int32_t r = 0; r < num_ranks(); ++r) {
    if (r == rank_) continue;
    peers_[static_cast<std::size_t>(r)].connection->start(
        [this, r](std::span<const std::byte> bytes) { received(r, bytes); },
        [this, r](const std::string& why) { closed(r, why); });
  }
  loop_.post([this, alive = std::weak_ptr<bool>(alive_)] {
    if (alive.lock()) heartbeat();
  });
}

void GroupWatch::heartbeat() {
  {
    const std::lock_guard lock(mutex_);
    send_to_all({});
  }
  loop_.after(kHeartbeat, [this, alive = std::weak_ptr<bool>(alive_)] {
    if (alive.lock()) heartbeat();
  });
}

void GroupWatch::computing() {
  last_call_ns_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  computing_.store(true, std::memory_order_relaxed);
}

nanoseconds GroupWatch::since_last_call(Clock::time_point now) const {
  const std::int64_t at = last_call_ns_.load(std::memory_order_relaxed);
  return nanoseconds(at < 0 ? -1 : std::max<std::int64_t>(0, now.time_since_epoch().count() - at));
}

void GroupWatch::waiting(std::span<const RankId> missing, std::string_view phase, std::int32_t chunk,
                         const Patience& patience, Patience::Stage stage, std::uint64_t key,
                         const std::function<FailedWait()>& describe) {
  const Clock::time_point now = Clock::now();
  last_call_ns_.store(now.time_since_epoch().count(), std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  if (aborted()) return;
  waiting_ = true;
  computing_.store(false, std::memory_order_relaxed);
  missing_.clear();
  for (const RankId r : missing) missing_.push_back(r.value);
  phase_ = phase;
  chunk_ = chunk;
  if (key != proposal_key_) proposal_.reset();  // something came after all
  proposal_key_ = key;
  if (stage == Patience::Stage::kHope) asking_ = false;
  if (stage == Patience::Stage::kSuspect) ask(now, patience);
  // A process that died ends the group, whoever waits for it.
  for (std::int32_t r = 0; r < num_ranks() && !proposal_ && !aborted(); ++r) {
    PeerState& p = peer_states_[static_cast<std::size_t>(r)];
    if (p.data_lost_at != Clock::time_point() && p.gone_at == Clock::time_point() &&
        now - p.data_lost_at >= kDataLossGrace) {
      p.gone_at = now;
      p.died = true;
    }
    if (p.died) propose(died_record(describe(), r), now, patience);
  }
  for (const std::int32_t r : missing_) {
    if (proposal_ || aborted() || !gone(r)) continue;
    if (now - peer_states_[static_cast<std::size_t>(r)].gone_at >= kFarewellGrace)
      propose(peer_lost_record(describe(), RankId(r)), now, patience);
  }
  if (stage == Patience::Stage::kOver && !proposal_ && !aborted())
    propose(deadline_record(describe(), states(now)), now, patience);
  if (proposal_ && !aborted() && now >= proposal_until_) record_abort(*proposal_, true);
}

AbortRecord GroupWatch::died_record(const FailedWait& wait, std::int32_t culprit) const {
  const PeerState& p = peer_states_[static_cast<std::size_t>(culprit)];
  AbortRecord out = peer_lost_record(wait, RankId(culprit));
  const std::size_t at = out.status.message.rfind("; rank ");
  out.status.message.resize(at == std::string::npos ? out.status.message.size() : at);
  out.status.message += str("; ", name(culprit), " died: its connection ended without a farewell (", p.why,
                            "); look at its own error and its host");
  return out;
}

bool GroupWatch::abort(const AbortRecord& record) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    return record_abort(record, true);
  } catch (...) {
    return false;  // memory or a lock failed: the peers find out by their deadline
  }
}

AbortRecord GroupWatch::record() const {
  const std::lock_guard lock(mutex_);
  return record_;
}

bool GroupWatch::record_abort(const AbortRecord& record, bool tell) {
  if (aborted()) return false;
  record_ = record;
  if (record_.status.ok())
    record_.status = {ErrorCode::kAborted, str("rank ", record.reporter.value, " ended the group")};
  aborted_.store(true, std::memory_order_release);
  if (tell) {
    Control m;
    m.kind = Control::Kind::kVerdict;
    m.code = record_.status.code;
    m.culprit = record_.culprit.value;
    m.reporter = record_.reporter.value;
    m.chunk = record_.chunk;
    m.phase = record_.phase;
    m.text = record_.status.message;
    send_to_all(m);
  }
  wake_();
  return true;
}

void GroupWatch::data_lost(std::int32_t peer, const std::string& why) {
  const std::lock_guard lock(mutex_);
  PeerState& p = peer_states_[static_cast<std::size_t>(peer)];
  if (p.data_lost_at != Clock::time_point()) return;
  p.data_lost_at = Clock::now();
  if (p.why.empty()) p.why = why;
}

bool GroupWatch::is_gone(std::int32_t rank) const {
  const std::lock_guard lock(mutex_);
  return gone(rank);
}

void GroupWatch::farewell(nanoseconds span) {
  {
    const std::lock_guard lock(mutex_);
    Control m;
    m.kind = Control::Kind::kFarewell;
    send_to_all(m);
  }
  flush(span);
}

void GroupWatch::flush(nanoseconds span) {
  const Clock::time_point until = Clock::now() + span;
  const auto queued = [&] {
    return std::any_of(peers_.begin(), peers_.end(),
                       [](const Peer& p) { return p.connection && p.connection->num_queued() > 0; });
  };
  while (queued() && Clock::now() < until) std::this_thread::sleep_for(std::chrono::microseconds(200));
}

// ---- messages; the mutex is held where nothing else is said

void GroupWatch::send(std::int32_t to, const Control& message) {
  const Peer& p = peers_[static_cast<std::size_t>(to)];
  // One that has said farewell as well: it may wait for how the others end. What is closed drops it.
  if (!p.connection) return;
  Control stamped = message;
  stamped.epoch = epoch_;
  p.connection->send(encode(stamped));
}

void GroupWatch::send_to_all(const Control& message) {
  for (std::int32_t r = 0; r < num_ranks(); ++r)
    if (r != rank_) send(r, message);
}

// On the loop's thread, without the mutex.
void GroupWatch::received(std::int32_t from, std::span<const std::byte> bytes) {
  const auto message = wire::parse_control(bytes, num_ranks(), epoch_);
  const std::lock_guard lock(mutex_);
  if (!message) {
    AbortRecord record;
    record.culprit = RankId(from);
    record.reporter = RankId(rank_);
    record.phase = std::string(phase_);
    record.chunk = chunk_;
    record.status = {
        ErrorCode::kDisagreement,
        str("rank ", rank_, " got ", bytes.size(), " bytes from ", name(from),
            " on the control connection that are no message of this version; it is broken or another "
            "program")};
    record_abort(record, true);
    return;
  }
  if (message->epoch == epoch_) handle(from, *message);
}

void GroupWatch::handle(std::int32_t from, const Control& m) {
  const Clock::time_point now = Clock::now();
  PeerState& p = peer_states_[static_cast<std::size_t>(from)];
  p.last_heard = now;
  const auto record_of = [&] {
    AbortRecord record;
    record.culprit = RankId(m.culprit);
    record.reporter = RankId(m.reporter);
    record.chunk = m.chunk;
    record.phase = m.phase;
    record.status = {m.code == ErrorCode::kOk ? ErrorCode::kAborted : m.code, m.text};
    return record;
  };
  switch (m.kind) {
    case Control::Kind::kHeartbeat:
      break;
    case Control::Kind::kQuestion:
      answer(from, m.number, now);
      break;
    case Control::Kind::kAnswer:
      if (m.number > question_ || m.number < p.answered) break;
      p.answered = m.number;
      p.state = RankState();
      p.state.answered = true;
      p.state.last_sign = nanoseconds(std::max<std::int64_t>(-1, m.last_call_ns));
      p.state.kind = m.waiting ? RankState::Kind::kWaiting : RankState::Kind::kComputing;
      for (const std::int32_t r : m.ranks) p.state.waits_for.push_back(RankId(r));
      p.state.phase = m.phase;
      p.state.chunk = m.chunk;
      break;
    case Control::Kind::kProposal:
      record_abort(record_of(), true);
      break;
    case Control::Kind::kVerdict:
      record_abort(record_of(), false);  // its author tells everyone
      break;
    case Control::Kind::kFarewell:
      if (p.gone_at == Clock::time_point()) p.gone_at = now;
      wake_();
      break;
    case Control::Kind::kRegroup:
      p.regroups = true;
      break;
    case Control::Kind::kMembers:
      if (std::find(m.ranks.begin(), m.ranks.end(), from) != m.ranks.end()) members_ = m.ranks;
      break;
    case Control::Kind::kCard:
      if (m.number < kMaxExchanges) cards_[{m.number, from}] = m.text;
      break;
  }
}

// On the loop's thread, without the mutex.
void GroupWatch::closed(std::int32_t from, const std::string& why) {
  const std::lock_guard lock(mutex_);
  PeerState& p = peer_states_[static_cast<std::size_t>(from)];
  if (p.gone_at != Clock::time_point()) return;
  p.gone_at = Clock::now();
  p.died = true;
  died_.store(true, std::memory_order_release);
  p.why = why;
  wake_();
}

void GroupWatch::ask(Clock::time_point now, const Patience& patience) {
  if (!asking_) {
    asking_ = true;
    next_question_ = now;
    first_question_ = question_ + 1;
  }
  if (now < next_question_) return;
  next_question_ = now + patience.suspicion() / 4;
  Control m;
  m.kind = Control::Kind::kQuestion;
  m.number = ++question_;
  send_to_all(m);
}

void GroupWatch::answer(std::int32_t to, std::uint64_t question, Clock::time_point now) {
  Control m;
  m.kind = Control::Kind::kAnswer;
  m.number = question;
  const nanoseconds age = since_last_call(now);
  m.last_call_ns = age.count();
  m.waiting = waiting_ && !computing_.load(std::memory_order_relaxed) && age <= kWaitingIsFresh;
  if (m.waiting) {
    m.ranks = missing_;
    m.chunk = chunk_;
    m.phase = std::string(phase_);
  }
  send(to, m);
}

std::vector<RankState> GroupWatch::states(Clock::time_point now) const {
  std::vector<RankState> out(peer_states_.size());
  for (std::int32_t r = 0; r < num_ranks(); ++r) {
    const PeerState& p = peer_states_[static_cast<std::size_t>(r)];
    RankState& state = out[static_cast<std::size_t>(r)];
    if (r == rank_) {
      state.kind = RankState::Kind::kWaiting;
      for (const std::int32_t m : missing_) state.waits_for.push_back(RankId(m));
      state.phase = std::string(phase_);
      state.chunk = chunk_;
    } else if (gone(r)) {
      state.kind = RankState::Kind::kGone;
    } else if (p.answered >= first_question_ && p.answered > 0) {
      state = p.state;
    } else if (p.last_heard != Clock::time_point()) {
      state.last_sign = now - p.last_heard;
    }
  }
  return out;
}

void GroupWatch::propose(AbortRecord record, Clock::time_point now, const Patience& patience) {
  std::int32_t coordinator = 0;
  for (; coordinator < rank_; ++coordinator) {
    const PeerState& p = peer_states_[static_cast<std::size_t>(coordinator)];
    if (!gone(coordinator) && (!asking_ || p.answered >= first_question_)) break;
  }
  if (coordinator == rank_) {
    record_abort(record, true);
    return;
  }
  Control m;
  m.kind = Control::Kind::kProposal;
  m.code = record.status.code;
  m.culprit = record.culprit.value;
  m.reporter = record.reporter.value;
  m.chunk = record.chunk;
  m.phase = record.phase;
  m.text = record.status.message;
  send(coordinator, m);
  proposal_ = std::move(record);
  proposal_until_ = now + std::min<nanoseconds>(patience.timeout() / 10, kCoordinatorTime);
}

std::vector<std::int32_t> GroupWatch::agree_on_survivors(nanoseconds span) {
  const Clock::time_point until = Clock::now() + span;
  std::unique_lock lock(mutex_);
  Require(aborted(), ErrorCode::kInvalidState,
          "the group has not ended; survivors exist after an abort only");
  Require(record_.culprit.value != rank_, ErrorCode::kPeerLost, "rank ", rank_,
          " is the one that the others go on without: ", record_.status.message);
  const auto is_out = [&](std::int32_t r) { return r == record_.culprit.value || gone(r); };
  peer_states_[static_cast<std::size_t>(rank_)].regroups = true;
  std::int32_t told = -1;
  while (true) {
    std::int32_t lowest = 0;
    while (is_out(lowest)) ++lowest;
    bool complete = true;
    for (std::int32_t r = 0; r < num_ranks(); ++r)
      complete = complete && (is_out(r) || peer_states_[static_cast<std::size_t>(r)].regroups);
    const bool over = Clock::now() >= until;
    if (lowest == rank_ && (complete || over)) {
      Control m;
      m.kind = Control::Kind::kMembers;
      for (std::int32_t r = 0; r < num_ranks(); ++r)
        if (!is_out(r) && peer_states_[static_cast<std::size_t>(r)].regroups) m.ranks.push_back(r);
      send_to_all(m);
      members_ = m.ranks;
    }
    if (members_) {
      Require(std::binary_search(members_->begin(), members_->end(), rank_), ErrorCode::kPeerLost, "rank ",
              rank_, " answered too late: the others go on without it");
      return *members_;
    }
    if (lowest != rank_ && told != lowest) {
      Control m;
      m.kind = Control::Kind::kRegroup;
      send(lowest, m);
      told = lowest;
    }
    // The coordinator waits for `span`; it may have begun later than this rank.
    Require(Clock::now() < until + span, ErrorCode::kTimeout, "rank ", rank_, " waited ",
            std::chrono::duration_cast<milliseconds>(2 * span).count(), " ms for ", name(lowest),
            " to say who survived; it does not answer");
    lock.unlock();
    std::this_thread::sleep_for(milliseconds(2));
    lock.lock();
  }
}

std::vector<std::string> GroupWatch::exchange(std::span<const std::int32_t> members, std::uint64_t number,
                                              const std::string& mine, Clock::time_point deadline) {
  Require(number < kMaxExchanges && mine.size() <= wire::kMaxTextBytes, ErrorCode::kInternal, "exchange ",
          number, " of ", mine.size(), " bytes is beyond what survivors exchange");
  std::unique_lock lock(mutex_);
  Control m;
  m.kind = Control::Kind::kCard;
  m.number = number;
  m.text = mine;
  for (const std::int32_t r : members)
    if (r != rank_) send(r, m);
  cards_[{number, rank_}] = mine;
  while (true) {
    std::vector<std::string> out;
    std::vector<RankId> silent;
    for (const std::int32_t r : members) {
      const auto found = cards_.find({number, r});
      if (found == cards_.end()) {
        silent.push_back(RankId(r));
        Require(!gone(r), ErrorCode::kPeerLost, name(r), " died while the survivors formed a new group");
      } else {
        out.push_back(found->second);
      }
    }
    if (silent.empty()) return out;
    Require(Clock::now() < deadline, ErrorCode::kTimeout,
            "the survivors' new group is not complete in time: ", list_ranks(silent), " did not answer");
    lock.unlock();
    std::this_thread::sleep_for(milliseconds(1));
    lock.lock();
  }
}

}  // namespace sluice::comm
