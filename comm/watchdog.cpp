#include "sluice/comm/watchdog.hpp"

#include <algorithm>

#include "sluice/base/hash.hpp"

namespace sluice::comm {
namespace {

// A rank that waits steps its patience at least every millisecond; a longer gap means that it did something else, or was
// kept from running. So much of a gap counts as waiting, that deadlines pass on a machine that is always too busy.
constexpr std::chrono::nanoseconds kGap = std::chrono::milliseconds(50);

std::string seconds(std::chrono::nanoseconds span) {
  // Three digits after the point are plenty for a reader and keep the sentence short.
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(span).count();
  std::string fraction = std::to_string(ms % 1000);
  fraction.insert(0, 3 - fraction.size(), '0');
  return str(ms / 1000, ".", fraction, " s");
}

std::string where(const std::string& phase, std::int32_t chunk) {
  std::string out = str("phase ", phase.empty() ? std::string("(unnamed)") : phase);
  if (chunk >= 0) out += str(", chunk ", chunk);
  return out;
}

std::string head(const FailedWait& wait) {
  std::string out =
      str("rank ", wait.rank.value, " waited ", seconds(wait.elapsed), " in ", where(wait.phase, wait.chunk));
  if (wait.for_own_puts)
    out += str(", for its own puts to be taken: expected ", wait.expected, ", seen ", wait.seen);
  else
    out += str(", for signal ", wait.signal, " of channel ", wait.channel, ": expected ", wait.expected,
               ", seen ", wait.seen);
  if (!wait.missing.empty())
    out += str(", missing ", wait.for_own_puts ? "at " : "from ", list_ranks(wait.missing));
  return out;
}

int severity(RankState::Kind kind) {
  switch (kind) {
    case RankState::Kind::kGone:
      return 0;
    case RankState::Kind::kSilent:
      return 1;
    case RankState::Kind::kComputing:
      return 2;
    case RankState::Kind::kWaiting:
      return 3;
  }
  return 3;
}

std::string arrow_chain(const std::vector<RankId>& chain) {
  std::string out;
  for (const RankId r : chain) out += str(out.empty() ? "rank " : " -> rank ", r.value);
  return out;
}

}  // namespace

std::string list_ranks(std::span<const RankId> ranks) {
  constexpr std::size_t kShown = 8;
  std::string out = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < std::min(ranks.size(), kShown); ++i)
    out += str(i == 0 ? "" : ", ", ranks[i].value);
  if (ranks.size() > kShown) out += str(" and ", ranks.size() - kShown, " more");
  return out;
}

Verdict find_culprit(RankId reporter, std::span<const RankState> states) {
  const std::size_t n = states.size();
  // Breadth first, neighbours ascending, so that parents give the shortest chain.
  std::vector<std::int32_t> parent(n, -2);  // -2 = not reached
  std::vector<std::size_t> order{reporter.index()};
  parent[reporter.index()] = -1;
  const auto waits_on_another = [&](std::size_t r) {
    return states[r].kind == RankState::Kind::kWaiting &&
           std::any_of(states[r].waits_for.begin(), states[r].waits_for.end(),
                       [&](RankId to) { return to.valid() && to.index() < n && to.index() != r; });
  };
  for (std::size_t i = 0; i < order.size(); ++i) {
    const std::size_t r = order[i];
    if (!waits_on_another(r)) continue;
    for (const RankId to : states[r].waits_for) {
      if (!to.valid() || to.index() >= n || parent[to.index()] != -2) continue;
      parent[to.index()] = static_cast<std::int32_t>(r);
      order.push_back(to.index());
    }
  }
  Verdict verdict;
  for (const std::size_t r : order) {
    if (waits_on_another(r)) continue;
    const RankId candidate(static_cast<std::int32_t>(r));
    if (!verdict.culprit.valid() ||
        std::pair(severity(states[r].kind), candidate.value) <
            std::pair(severity(states[verdict.culprit.index()].kind), verdict.culprit.value))
      verdict.culprit = candidate;
  }
  if (verdict.culprit.valid()) {
    for (std::int32_t r = verdict.culprit.value; r >= 0; r = parent[static_cast<std::size_t>(r)])
      verdict.chain.push_back(RankId(r));
    std::reverse(verdict.chain.begin(), verdict.chain.end());
    return verdict;
  }
  // No sink within reach, so every walk along the waits runs into a cycle; turn it to start at its lowest
  // rank.
  std::vector<bool> visited(n, false);
  RankId at = reporter;
  while (!visited[at.index()]) {
    visited[at.index()] = true;
    verdict.chain.push_back(at);
    for (const RankId to : states[at.index()].waits_for) {
      if (to.valid() && to.index() < n && to != at) {
        at = to;
        break;
      }
    }
  }
  verdict.chain.erase(verdict.chain.begin(), std::find(verdict.chain.begin(), verdict.chain.end(), at));
  std::rotate(verdict.chain.begin(), std::min_element(verdict.chain.begin(), verdict.chain.end()),
              verdict.chain.end());
  return verdict;
}

WaitLook look_at(const Transport& transport, std::span<const WaitSpec> pending, OwnPuts puts) {
  if (pending.empty()) return {.there = puts.outstanding == 0, .key = puts.outstanding};
  WaitLook look;
  Hasher key;
  for (const WaitSpec& spec : pending) {
    const std::uint64_t total = transport.signal(spec.channel, spec.signal);
    look.there = look.there || total >= spec.value;
    key.add(spec.channel).add(spec.signal).add(spec.value).add(total);
  }
  look.key = key.value();
  return look;
}

FailedWait describe_wait(const Transport& transport, std::span<const WaitSpec> pending,
                         std::vector<RankId> missing, OwnPuts puts, const Patience& patience,
                         Clock::time_point now) {
  FailedWait wait;
  wait.rank = transport.rank();
  wait.missing = std::move(missing);
  wait.elapsed = patience.elapsed(now);
  wait.timeout = patience.timeout();
  if (pending.empty()) {
    wait.phase = "own puts";
    wait.for_own_puts = true;
    wait.expected = puts.made;
    wait.seen = puts.made - puts.outstanding;
    return wait;
  }
  const auto owed = std::find_if(pending.begin(), pending.end(), [&](const WaitSpec& spec) {
    return !transport.missing(spec.channel, spec.signal).empty();
  });
  const WaitSpec& spec = owed == pending.end() ? pending.front() : *owed;
  wait.phase = spec.phase;
  wait.chunk = spec.chunk;
  wait.channel = spec.channel;
  wait.signal = spec.signal;
  wait.expected = spec.value;
  wait.seen = transport.signal(spec.channel, spec.signal);
  return wait;
}

AbortRecord deadline_record(const FailedWait& wait, std::span<const RankState> states) {
  const Verdict verdict = find_culprit(wait.rank, states);
  AbortRecord record;
  record.culprit = verdict.culprit;
  record.reporter = wait.rank;
  record.phase = wait.phase;
  record.chunk = wait.chunk;
  record.status.code = ErrorCode::kTimeout;
  std::string& text = record.status.message;
  text = head(wait);
  if (!verdict.culprit.valid()) {
    std::vector<RankId> round = verdict.chain;
    round.push_back(verdict.chain.front());
    text +=
        str("; all wait for each other (", arrow_chain(round), "), so no rank is to blame; start at rank ",
            verdict.chain.front().value, ": the ranks disagree on the plan or on the order of calls");
    return record;
  }
  const RankState& state = states[verdict.culprit.index()];
  const std::string who = str("rank ", verdict.culprit.value);
  if (verdict.chain.size() > 2) text += str("; ", arrow_chain(verdict.chain));
  switch (state.kind) {
    case RankState::Kind::kGone:
      record.status.code = ErrorCode::kPeerLost;
      text += str("; ", who, " has closed its transport; read its own error first");
      break;
    case RankState::Kind::kSilent:
      record.status.code = ErrorCode::kPeerLost;
      text += str("; ", who, " does not answer: it has exited, is stopped, or its host is unreachable");
      if (state.last_sign.count() >= 0)
        text += str(" (last sign of life ", seconds(state.last_sign), " ago)");
      text += str("; look at it, then relaunch");
      break;
    case RankState::Kind::kComputing:
      if (state.answered)
        text += str(
            "; ", who,
            " is late, not dead: its process answers, but it waits for nobody and last called the transport ",
            seconds(state.last_sign), " ago");
      else if (state.last_sign.count() >= 0 && state.last_sign <= wait.timeout)
        text += str("; ", who, " is late, not dead: it waits for nobody and gave a sign of life ",
                    seconds(state.last_sign), " ago");
      else if (state.last_sign.count() >= 0)
        text += str("; ", who, " waits for nobody and gave no sign of life for ", seconds(state.last_sign));
      else
        text += str("; ", who, " never arrived");
      text += str("; see what ", who, " does, or raise comm.timeout_ms (now ", seconds(wait.timeout),
                  ") if it is only slow");
      break;
    case RankState::Kind::kWaiting:
      text += str(
          "; ", who, " waits in ", where(state.phase, state.chunk),
          ", for something that no other rank is expected to send: its plan or its order of calls is wrong");
      break;
  }
  return record;
}

AbortRecord peer_lost_record(const FailedWait& wait, RankId lost) {
  AbortRecord record;
  record.culprit = lost;
  record.reporter = wait.rank;
  record.phase = wait.phase;
  record.chunk = wait.chunk;
  record.status = {ErrorCode::kPeerLost,
                   str(head(wait), "; rank ", lost.value,
                       " has closed its transport and will never send it; read its own error first")};
  return record;
}

std::chrono::nanoseconds Patience::suspicion() const {
  // Long enough for an answer over a slow control link, short against the timeout.
  return std::min<std::chrono::nanoseconds>(timeout_ / 5, std::chrono::seconds(2));
}

Patience::Stage Patience::step(Clock::time_point now, std::uint64_t key) {
  if (fresh_ || key != key_) {
    fresh_ = false;
    key_ = key;
    start_ = now;
  } else if (now - last_step_ > kGap) {
    start_ += now - last_step_ - kGap;
  }
  last_step_ = now;
  const std::chrono::nanoseconds waited = now - start_;
  if (waited < timeout_) return Stage::kHope;
  return waited < timeout_ + suspicion() ? Stage::kSuspect : Stage::kOver;
}

}  // namespace sluice::comm
