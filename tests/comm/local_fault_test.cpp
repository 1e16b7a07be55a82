// What the survivors see when a rank of the local transport is late, gone, wrong, or ends the group: the right culprit,
// the same record everywhere, in time; and that an orderly end is no fault.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <random>
#include <thread>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/transport.hpp"

namespace sluice::comm {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kTimeout(400);
// Timeout, suspicion, and what a loaded machine adds.
constexpr milliseconds kInTime(480 + 1500);

struct Outcome {
  Status status;
  AbortRecord record;
  milliseconds took{0};
};

// Runs body(transport, rank) in a thread a rank; a thread owns its transport and closes it when the body ends, also by
// an exception. Returns what the bodies returned and how long they took.
std::vector<Outcome> run(const Topology& topology,
                         const std::function<Status(Transport&, std::int32_t)>& body) {
  auto transports = make_local_group(topology);
  std::vector<Outcome> outcomes(transports.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < transports.size(); ++r) {
    threads.emplace_back([&, r, own = std::move(transports[r])]() mutable {
      const auto start = Clock::now();
      const auto transport = std::move(own);
      try {
        const std::unique_ptr<Transport>& t = transport;
        t->set_timeout(kTimeout);
        outcomes[r].status = body(*t, static_cast<std::int32_t>(r));
        outcomes[r].record = t->abort_record();
      } catch (...) {
        outcomes[r].status = current_exception_status();
      }
      outcomes[r].took = std::chrono::duration_cast<milliseconds>(Clock::now() - start);
    });
  }
  for (auto& thread : threads) thread.join();
  return outcomes;
}

void expect_blamed(const std::vector<Outcome>& outcomes, RankId culprit, ErrorCode code,
                   const std::vector<std::int32_t>& survivors, const char* says) {
  for (const std::int32_t r : survivors) {
    const Outcome& outcome = outcomes[static_cast<std::size_t>(r)];
    SCOPED_TRACE(str("rank ", r, ": ", outcome.status.message));
    EXPECT_EQ(outcome.status.code, code);
    EXPECT_EQ(outcome.record.culprit, culprit);
    EXPECT_EQ(outcome.record.status.message,
              outcomes[static_cast<std::size_t>(survivors[0])].record.status.message);
    EXPECT_NE(outcome.status.message.find(says), std::string::npos);
    EXPECT_LE(outcome.took, kInTime);
  }
}

Status barrier_of(Transport& t, int times = 1) {
  Collectives collectives(t);
  for (int i = 0; i < times; ++i)
    if (Status s = collectives.barrier("start"); !s.ok()) return s;
  return {};
}

void sleep_until_aborted(Transport& t, bool with_heartbeat) {
  const auto until = Clock::now() + seconds(10);
  while (!t.aborted() && Clock::now() < until) {
    std::this_thread::sleep_for(milliseconds(2));
    if (with_heartbeat) t.advanced();
  }
}

TEST(LocalFault, ARankThatNeverArrives) {
  const auto outcomes = run(Topology::uniform(4, 1), [](Transport& t, std::int32_t r) {
    if (r != 2) return barrier_of(t);
    sleep_until_aborted(t, false);
    return Status();
  });
  expect_blamed(outcomes, RankId(2), ErrorCode::kTimeout, {0, 1, 3}, "rank 2 never arrived");
  for (const int r : {0, 1, 3}) {
    EXPECT_GE(outcomes[static_cast<std::size_t>(r)].took, kTimeout);
    EXPECT_EQ(outcomes[static_cast<std::size_t>(r)].record.phase, "start");
  }
}

TEST(LocalFault, ARankThatStopsHalfWay) {
  const auto outcomes = run(Topology::uniform(3, 1), [](Transport& t, std::int32_t r) {
    if (r != 0) return barrier_of(t, 50);
    Collectives collectives(t);
    for (int i = 0; i < 20; ++i)
      if (Status s = collectives.barrier("start"); !s.ok()) return s;
    sleep_until_aborted(t, false);
    return Status();
  });
  expect_blamed(outcomes, RankId(0), ErrorCode::kTimeout, {1, 2}, "rank 0 ");
}

// 0 waits for 1, 1 for 2, 2 for 3; 3 computes and is seen to live.
TEST(LocalFault, AChainBlamesItsEndAndLateIsNotDead) {
  const auto outcomes = run(Topology::uniform(4, 2), [](Transport& t, std::int32_t r) {
    t.open_channel(1, 0, 1);
    if (r == 3) {
      sleep_until_aborted(t, true);
      return Status();
    }
    const Expect expect{.peer = RankId(r + 1), .channel = 1, .signal = 0};
    t.expect({&expect, 1});
    return t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "dispatch", .chunk = r});
  });
  expect_blamed(outcomes, RankId(3), ErrorCode::kTimeout, {0, 1, 2}, "rank 3 is late, not dead");
}

TEST(LocalFault, ACycleBlamesNobody) {
  const auto outcomes = run(Topology::uniform(3, 1), [](Transport& t, std::int32_t r) {
    t.open_channel(1, 0, 1);
    const Expect expect{.peer = RankId((r + 1) % 3), .channel = 1, .signal = 0};
    t.expect({&expect, 1});
    return t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "dispatch"});
  });
  expect_blamed(outcomes, RankId(), ErrorCode::kTimeout, {0, 1, 2}, "all wait for each other (rank 0 ->");
}

TEST(LocalFault, AnExceptionIsSeenAtOnce) {
  const auto outcomes = run(Topology::uniform(4, 1), [](Transport& t, std::int32_t r) -> Status {
    t.set_timeout(seconds(30));
    if (r != 1) return barrier_of(t);
    throw Error(ErrorCode::kOutOfMemory, "no memory for the window");
  });
  expect_blamed(outcomes, RankId(1), ErrorCode::kPeerLost, {0, 2, 3}, "has closed its transport");
  EXPECT_EQ(outcomes[1].status.code, ErrorCode::kOutOfMemory);
}

// Rank 2 waits for rank 1 only, which waits for rank 0, which is gone.
TEST(LocalFault, ALossReachesThoseWhoDoNotWaitForTheLostRank) {
  const auto outcomes = run(Topology::uniform(3, 1), [](Transport& t, std::int32_t r) -> Status {
    t.set_timeout(seconds(30));
    t.open_channel(1, 0, 1);
    if (r == 0) throw Error(ErrorCode::kIo, "disk full");
    const Expect expect{.peer = RankId(r - 1), .channel = 1, .signal = 0};
    t.expect({&expect, 1});
    return t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "combine"});
  });
  expect_blamed(outcomes, RankId(0), ErrorCode::kPeerLost, {1, 2}, "rank 0 has closed its transport");
}

TEST(LocalFault, AnAbortWakesEveryoneAndTheFirstWins) {
  std::atomic<int> firsts{0};
  const auto outcomes = run(Topology::uniform(4, 1), [&](Transport& t, std::int32_t r) {
    t.set_timeout(seconds(30));
    if (r < 2) return barrier_of(t);
    std::this_thread::sleep_for(milliseconds(50));
    AbortRecord record;
    record.status = {ErrorCode::kDisagreement, "the placements of ranks 0 and 1 differ"};
    record.culprit = RankId(0);
    record.reporter = RankId(r);
    record.phase = "plan";
    if (t.abort(record)) ++firsts;
    return t.abort_record().status;
  });
  EXPECT_EQ(firsts.load(), 1);
  expect_blamed(outcomes, RankId(0), ErrorCode::kDisagreement, {0, 1, 2, 3}, "placements");
  for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.record.reporter, outcomes[0].record.reporter);
}

TEST(LocalFault, AnAbortComesFromAnyThread) {
  auto transports = make_local_group(Topology::uniform(2, 1));
  transports[0]->set_timeout(seconds(30));
  std::thread waiting([&] {
    transports[0]->open_channel(1, 0, 1);
    const Status status = transports[0]->wait({.channel = 1, .signal = 0, .value = 1, .phase = "dispatch"});
    EXPECT_EQ(status.code, ErrorCode::kAborted);
    EXPECT_FALSE(status.message.empty());
  });
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_TRUE(transports[0]->abort({}));
  EXPECT_FALSE(transports[0]->abort({}));
  waiting.join();
  EXPECT_TRUE(transports[1]->aborted());
  // Nothing travels any more, and nothing throws.
  transports[1]->open_channel(1, 0, 1);
  transports[1]->put({.peer = RankId(0), .channel = 1, .source = {}, .signal = 0});
  EXPECT_EQ(transports[0]->signal(1, 0), 0u);
}

TEST(LocalFault, AWaitForWhatNobodySendsIsItsOwnFault) {
  const auto outcomes = run(Topology::uniform(2, 1), [](Transport& t, std::int32_t r) {
    t.open_channel(1, 0, 1);
    if (r == 0) return t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "dispatch"});
    sleep_until_aborted(t, true);
    return Status();
  });
  expect_blamed(outcomes, RankId(0), ErrorCode::kTimeout, {0}, "no other rank is expected to send");
}

TEST(LocalFault, PutsThatNobodyTakes) {
  const auto outcomes = run(Topology::uniform(2, 1), [](Transport& t, std::int32_t r) {
    t.open_channel(1, 0, 1);
    if (r == 1) {
      sleep_until_aborted(t, false);
      return Status();
    }
    t.put({.peer = RankId(1), .channel = 1, .source = {}, .signal = 3});  // a signal that rank 1 never opens
    return t.wait_for_puts(1, 1);
  });
  expect_blamed(outcomes, RankId(1), ErrorCode::kTimeout, {0},
                "for its own puts to be taken: expected 1, seen 0");
}

TEST(LocalFault, APutBeyondTheWindowThrowsAtItsSource) {
  const auto outcomes = run(Topology::uniform(2, 1), [](Transport& t, std::int32_t r) -> Status {
    std::vector<std::byte> window(100), source(101);
    t.open_channel(1, 1, 1);
    t.set_window(1, 0, window);
    Collectives collectives(t);
    if (Status s = collectives.barrier("windows"); !s.ok()) return s;
    if (r == 0)
      t.put({.peer = RankId(1), .channel = 1, .window = 0, .offset_bytes = 0, .source = source, .signal = 0});
    return collectives.barrier("end");
  });
  EXPECT_EQ(outcomes[0].status.code, ErrorCode::kInvalidArgument);
  EXPECT_NE(outcomes[0].status.message.find("which has 100 bytes"), std::string::npos)
      << outcomes[0].status.message;
  expect_blamed(outcomes, RankId(0), ErrorCode::kPeerLost, {1}, "has closed its transport");
}

Topology limited(std::int32_t num_ranks, double bytes_per_s, std::chrono::nanoseconds latency) {
  Topology topology = Topology::uniform(num_ranks, num_ranks);
  topology.across_nodes = {.bytes_per_s = bytes_per_s, .latency = latency};
  return topology;
}

TEST(LocalFault, APutBeyondTheWindowOverALimitedLinkEndsTheGroup) {
  const auto outcomes = run(limited(2, 1e9, milliseconds(1)), [](Transport& t, std::int32_t r) -> Status {
    std::vector<std::byte> window(100), source(101);
    t.open_channel(1, 1, 1);
    t.set_window(1, 0, window);
    Collectives collectives(t);
    if (Status s = collectives.barrier("windows"); !s.ok()) return s;
    if (r == 0)
      t.put({.peer = RankId(1), .channel = 1, .window = 0, .offset_bytes = 0, .source = source, .signal = 0});
    Status s = t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "data"});
    t.set_window(1, 0, {});
    return s;
  });
  expect_blamed(outcomes, RankId(0), ErrorCode::kInvalidArgument, {0, 1}, "which has 100 bytes");
}

// The source closes while its puts are on the way: they land, and nobody is lost.
TEST(LocalFault, AnOrderlyEndLetsPutsLand) {
  const auto outcomes = run(limited(2, 50e6, milliseconds(5)), [](Transport& t, std::int32_t r) -> Status {
    t.open_channel(1, 1, 1);
    static const std::vector<std::byte> source(500'000, std::byte{7});
    std::vector<std::byte> window(500'000);
    t.set_window(1, 0, window);
    Collectives collectives(t);
    if (Status s = collectives.barrier("windows"); !s.ok()) return s;
    if (r == 0) {
      t.put({.peer = RankId(1), .channel = 1, .window = 0, .offset_bytes = 0, .source = source, .signal = 0});
      return {};
    }
    const Expect expect{
        .peer = RankId(0), .channel = 1, .window = 0, .offset_bytes = 0, .bytes = 500'000, .signal = 0};
    t.expect({&expect, 1});
    Status s = t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "data"});
    EXPECT_EQ(window, source);
    t.set_window(1, 0, {});
    return s;
  });
  for (const Outcome& outcome : outcomes) EXPECT_TRUE(outcome.status.ok()) << outcome.status.message;
}

// After its abort() a rank frees the source of a put that is on the way: it must not be read any more.
TEST(LocalFault, AnAbortWithdrawsPuts) {
  // The copy takes a quarter of a second, so that it is under way 50 ms on, also on a busy machine.
  const auto outcomes = run(limited(2, 2e6, milliseconds(5)), [](Transport& t, std::int32_t r) -> Status {
    t.set_timeout(seconds(30));
    std::vector<std::byte> window(500'000);
    t.open_channel(1, 1, 1);
    t.set_window(1, 0, window);
    Collectives collectives(t);
    if (Status s = collectives.barrier("windows"); !s.ok()) return s;
    const Expect expect{
        .peer = RankId(0), .channel = 1, .window = 0, .offset_bytes = 0, .bytes = 500'000, .signal = 0};
    if (r == 1) t.expect({&expect, 1});
    if (r == 1) {
      Status s = t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "data"});
      t.set_window(1, 0, {});
      return s;
    }
    const std::vector<std::byte> source(500'000, std::byte{7});
    t.put({.peer = RankId(1), .channel = 1, .window = 0, .offset_bytes = 0, .source = source, .signal = 0});
    std::this_thread::sleep_for(milliseconds(50));  // the copy has begun
    AbortRecord record;
    record.status = {ErrorCode::kIo, "disk full"};
    record.culprit = record.reporter = RankId(0);
    t.abort(record);
    return record.status;
  });
  expect_blamed(outcomes, RankId(0), ErrorCode::kIo, {0, 1}, "disk full");
}

TEST(LocalFault, DestructionInAnyOrderIsNoFault) {
  std::mt19937 random(7);
  for (int round = 0; round < 40; ++round) {
    auto transports = make_local_group(round % 2 ? Topology::uniform(4, 2)
                                                 : limited(4, 1e9, std::chrono::microseconds(20)));
    std::vector<std::thread> threads;
    for (auto& transport : transports)
      threads.emplace_back([&transport] { EXPECT_TRUE(barrier_of(*transport, 3).ok()); });
    for (auto& thread : threads) thread.join();
    std::shuffle(transports.begin(), transports.end(), random);
    for (auto& transport : transports) {
      EXPECT_FALSE(transport->aborted());
      transport.reset();
    }
  }
}

// Idle work that throws in the middle of a collective ends the group before the rank frees what peers write into.
TEST(LocalFault, AnExceptionInsideACollectiveEndsTheGroupFirst) {
  for (int round = 0; round < 20; ++round) {
    const auto outcomes = run(Topology::uniform(3, 1), [&](Transport& t, std::int32_t r) -> Status {
      t.set_timeout(seconds(20));
      int calls = 0;
      if (r == 1)
        t.set_idle_work([&]() -> bool {
          if (++calls == 5 + round) throw Error(ErrorCode::kOutOfMemory, "no memory for the work");
          return false;
        });
      Collectives collectives(t);
      for (int i = 0; i < 1'000'000; ++i) {
        std::vector<float> data(40'000, 1.0f);
        if (Status s = collectives.all_reduce_sum(std::span(data), "sum"); !s.ok()) return s;
      }
      return {};
    });
    EXPECT_EQ(outcomes[1].status.code, ErrorCode::kOutOfMemory);
    expect_blamed(outcomes, RankId(1), ErrorCode::kAborted, {0, 2}, "no memory for the work");
    EXPECT_EQ(outcomes[0].record.phase, "sum");
  }
}

// Ranks that abort at random moments take their windows back and free them at once, while peers still put: nothing may
// be written into freed memory (the sanitizers watch), and all come to see one record.
TEST(LocalFault, AbortsAtRandomMomentsUnderTraffic) {
  constexpr std::uint32_t kSeed = 99;
  SCOPED_TRACE(str("seed ", kSeed));
  std::mt19937 random(kSeed);
  for (int round = 0; round < 30; ++round) {
    const auto who = static_cast<std::int32_t>(random() % 3);
    const auto when = std::chrono::microseconds(random() % 3000);
    const Topology topology =
        round % 2 ? Topology::uniform(3, 1) : limited(3, 2e9, std::chrono::microseconds(10));
    const auto outcomes = run(topology, [&](Transport& t, std::int32_t r) -> Status {
      t.set_timeout(seconds(20));
      const auto start = Clock::now();
      Collectives collectives(t);
      std::vector<float> data(40'000, 1.0f);
      for (int i = 0; i < 1'000'000; ++i) {
        if (r == who && Clock::now() - start > when) {
          AbortRecord record;
          record.status = {ErrorCode::kIo, "disk full"};
          record.culprit = record.reporter = t.rank();
          t.abort(record);
          return record.status;
        }
        if (Status s = collectives.all_reduce_sum(std::span(data), "sum"); !s.ok()) return s;
      }
      return {};
    });
    expect_blamed(outcomes, RankId(who), ErrorCode::kIo, {0, 1, 2}, "disk full");
  }
}

}  // namespace
}  // namespace sluice::comm
