// How a wait ends: when to lose patience, whom to blame, and what the error says. Pure data in, data out,
// shared by all backends; a backend brings the table of who waits for whom.
//
// The rule: a wait that sees no awaited arrival for `timeout` becomes a suspicion; for at most a fifth of the
// timeout more the table is collected; then the sink of the waits-for graph is the culprit. A rank is a sink
// if it waits for nobody: it computes, is late, is gone, or does not answer. If every rank waits for another
// there is no culprit.
//
// Thread-safety: none; the values belong to the rank that waits.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/comm/transport.hpp"

namespace sluice::comm {

inline constexpr std::chrono::nanoseconds kDefaultTimeout = std::chrono::seconds(30);

// What is known of a rank when a deadline has passed.
struct RankState {
  enum class Kind {
    kComputing,  // alive, or not known to be dead; not inside a wait
    kWaiting,    // inside a wait for waits_for
    kGone,       // its transport was closed
    kSilent,     // asked, and did not answer
  };
  Kind kind = Kind::kSilent;
  std::vector<RankId> waits_for;  // ascending; empty unless waiting
  std::string phase;              // of the wait it is in
  std::int32_t chunk = -1;
  bool answered = false;                   // its process was asked and answered, so it is alive
  std::chrono::nanoseconds last_sign{-1};  // since its last sign of life; negative = never seen
};

struct Verdict {
  RankId culprit;             // invalid when all wait for each other
  std::vector<RankId> chain;  // from the reporter to the culprit, or round the cycle
};

// states: [num_ranks], the reporter's own entry included. Deterministic: among several sinks a gone rank
// comes before a silent one, that before a computing one, then the lowest id; chains are the shortest, ties
// to the lowest ids.
Verdict find_culprit(RankId reporter, std::span<const RankState> states);

// What the reporter waited for when it lost patience.
struct FailedWait {
  RankId rank;
  std::string phase;
  std::int32_t chunk = -1;
  std::uint32_t channel = 0;
  std::uint32_t signal = 0;
  bool for_own_puts = false;  // it waited for its own puts to complete; channel and signal mean nothing
  std::uint64_t expected = 0;
  std::uint64_t seen = 0;
  std::vector<RankId> missing;
  std::chrono::nanoseconds elapsed{0};
  std::chrono::nanoseconds timeout{0};
};

struct OwnPuts {
  std::uint64_t made = 0;
  std::uint64_t outstanding = 0;
};

// Looks at what idle() was given. `key` changes when another thing is waited for or more of it is there.
struct WaitLook {
  bool there = false;  // one of pending has come; with none pending: no own put is outstanding
  std::uint64_t key = 0;
};
WaitLook look_at(const Transport& transport, std::span<const WaitSpec> pending, OwnPuts puts);

class Patience;
// `missing`: who owes any of pending. Of several waits the first that is owed something is described.
FailedWait describe_wait(const Transport& transport, std::span<const WaitSpec> pending,
                         std::vector<RankId> missing, OwnPuts puts, const Patience& patience,
                         Clock::time_point now);

// Judges and writes the record of a wait whose deadline passed.
AbortRecord deadline_record(const FailedWait& wait, std::span<const RankState> states);
// The record of a wait for a rank that has closed.
AbortRecord peer_lost_record(const FailedWait& wait, RankId lost);

// "rank 3", "ranks 1, 2"; at most eight are listed.
std::string list_ranks(std::span<const RankId> ranks);

// The patience of one rank. Of a gap in which the rank did not wait (it computed, was itself stopped, or got no core)
// 50 ms count.
class Patience {
 public:
  enum class Stage { kHope, kSuspect, kOver };

  void set_timeout(std::chrono::nanoseconds timeout) { timeout_ = timeout; }
  std::chrono::nanoseconds timeout() const { return timeout_; }
  // How long the table is collected after the deadline.
  std::chrono::nanoseconds suspicion() const;

  void restart() { fresh_ = true; }
  // `key` stands for what is waited for and how much of it is there; a new key is a new wait.
  Stage step(Clock::time_point now, std::uint64_t key);
  std::chrono::nanoseconds elapsed(Clock::time_point now) const { return now - start_; }

 private:
  std::chrono::nanoseconds timeout_ = kDefaultTimeout;
  bool fresh_ = true;
  std::uint64_t key_ = 0;
  Clock::time_point start_;
  Clock::time_point last_step_;
};

}  // namespace sluice::comm
