// Whom a failed wait blames, when patience ends, and what the sentence says.
#include "sluice/comm/watchdog.hpp"

#include <gtest/gtest.h>

namespace sluice::comm {
namespace {

using Kind = RankState::Kind;
using std::chrono::milliseconds;
using std::chrono::seconds;

RankState waits(std::vector<std::int32_t> ranks) {
  RankState state;
  state.kind = Kind::kWaiting;
  for (const std::int32_t r : ranks) state.waits_for.push_back(RankId(r));
  state.phase = "combine";
  state.chunk = 4;
  return state;
}
RankState is(Kind kind, std::chrono::nanoseconds last_sign = seconds(9)) {
  RankState state;
  state.kind = kind;
  state.last_sign = last_sign;
  return state;
}
std::vector<RankId> ids(std::vector<std::int32_t> ranks) {
  std::vector<RankId> out;
  for (const std::int32_t r : ranks) out.push_back(RankId(r));
  return out;
}

TEST(FindCulprit, TheSinkIsToBlame) {
  const std::vector<RankState> states{waits({1}), waits({2}), waits({3}), is(Kind::kComputing)};
  const Verdict verdict = find_culprit(RankId(0), states);
  EXPECT_EQ(verdict.culprit, RankId(3));
  EXPECT_EQ(verdict.chain, ids({0, 1, 2, 3}));
}

TEST(FindCulprit, OnlyWhatTheReporterDependsOnCounts) {
  const std::vector<RankState> states{is(Kind::kGone), waits({2}), is(Kind::kComputing)};
  EXPECT_EQ(find_culprit(RankId(1), states).culprit, RankId(2));
}

TEST(FindCulprit, WorstSinkFirstThenLowest) {
  std::vector<RankState> states{waits({1, 2, 3, 4}), is(Kind::kComputing), is(Kind::kSilent), waits({0}),
                                is(Kind::kSilent)};
  EXPECT_EQ(find_culprit(RankId(0), states).culprit, RankId(2));
  states[4].kind = Kind::kGone;
  EXPECT_EQ(find_culprit(RankId(0), states).culprit, RankId(4));
}

TEST(FindCulprit, ASinkBesideACycleIsToBlame) {
  // 0 and 1 wait for each other, 1 also for 2, which computes.
  const std::vector<RankState> states{waits({1}), waits({0, 2}), is(Kind::kComputing)};
  EXPECT_EQ(find_culprit(RankId(0), states).culprit, RankId(2));
}

TEST(FindCulprit, ACycleHasNoCulpritAndStartsAtItsLowestRank) {
  // 0 leads into the cycle 1 -> 3 -> 2 -> 1.
  const std::vector<RankState> states{waits({3}), waits({3}), waits({1}), waits({2})};
  const Verdict verdict = find_culprit(RankId(0), states);
  EXPECT_FALSE(verdict.culprit.valid());
  EXPECT_EQ(verdict.chain, ids({1, 3, 2}));
}

TEST(FindCulprit, WaitingForNobodyElse) {
  EXPECT_EQ(find_culprit(RankId(0), std::vector<RankState>{waits({})}).culprit, RankId(0));
  EXPECT_EQ(find_culprit(RankId(0), std::vector<RankState>{waits({0}), waits({0})}).culprit, RankId(0));
  EXPECT_EQ(find_culprit(RankId(1), std::vector<RankState>{waits({0}), waits({0})}).culprit, RankId(0));
}

TEST(FindCulprit, RanksOutOfRangeAreIgnored) {
  const std::vector<RankState> states{waits({1, 7, -3}), is(Kind::kComputing)};
  EXPECT_EQ(find_culprit(RankId(0), states).culprit, RankId(1));
}

FailedWait failed_wait() {
  FailedWait wait;
  wait.rank = RankId(0);
  wait.phase = "dispatch";
  wait.chunk = 2;
  wait.channel = 5;
  wait.signal = 7;
  wait.expected = 8;
  wait.seen = 6;
  wait.missing = ids({1});
  wait.elapsed = milliseconds(6012);
  wait.timeout = seconds(5);
  return wait;
}

TEST(DeadlineRecord, SaysEverything) {
  const AbortRecord record = deadline_record(
      failed_wait(), std::vector<RankState>{waits({1}), is(Kind::kComputing, milliseconds(120))});
  EXPECT_EQ(record.culprit, RankId(1));
  EXPECT_EQ(record.reporter, RankId(0));
  EXPECT_EQ(record.phase, "dispatch");
  EXPECT_EQ(record.chunk, 2);
  EXPECT_EQ(record.status.code, ErrorCode::kTimeout);
  EXPECT_EQ(
      record.status.message,
      "rank 0 waited 6.012 s in phase dispatch, chunk 2, for signal 7 of channel 5: expected 8, seen 6, "
      "missing from rank 1; rank 1 is late, not dead: it waits for nobody and gave a sign of life 0.120 s "
      "ago; see what rank 1 does, or raise comm.timeout_ms (now 5.000 s) if it is only slow");
}

TEST(DeadlineRecord, NamesTheKindOfSilence) {
  const auto record = [](RankState state) {
    return deadline_record(failed_wait(), std::vector<RankState>{waits({1}), std::move(state)});
  };
  const auto says = [](const AbortRecord& r, const char* text) {
    return r.status.message.find(text) != std::string::npos;
  };
  EXPECT_TRUE(says(record(is(Kind::kComputing, seconds(6))), "no sign of life for 6.000 s"));
  EXPECT_TRUE(says(record(is(Kind::kComputing, std::chrono::nanoseconds(-1))), "rank 1 never arrived"));
  EXPECT_TRUE(says(record(is(Kind::kSilent)), "does not answer"));
  EXPECT_EQ(record(is(Kind::kSilent)).status.code, ErrorCode::kPeerLost);
  EXPECT_EQ(record(is(Kind::kGone)).status.code, ErrorCode::kPeerLost);
  RankState answered = is(Kind::kComputing, seconds(6));
  answered.answered = true;
  EXPECT_TRUE(says(record(answered), "late, not dead: its process answers"));
  EXPECT_TRUE(
      says(record(waits({1})), "rank 1 waits in phase combine, chunk 4, for something that no other"));
  const AbortRecord cycle = record(waits({0}));
  EXPECT_FALSE(cycle.culprit.valid());
  EXPECT_TRUE(says(cycle, "all wait for each other (rank 0 -> rank 1 -> rank 0)"));
}

TEST(ListRanks, IsShort) {
  EXPECT_EQ(list_ranks(ids({3})), "rank 3");
  EXPECT_EQ(list_ranks(ids({1, 2})), "ranks 1, 2");
  EXPECT_EQ(list_ranks(ids({0, 1, 2, 3, 4, 5, 6, 7, 8, 9})), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
}

class PatienceTest : public ::testing::Test {
 protected:
  PatienceTest() { patience.set_timeout(milliseconds(1000)); }
  // Steps every 10 ms for `span`, as a waiting rank does, and returns the last stage.
  Patience::Stage pass(milliseconds span, std::uint64_t key) {
    Patience::Stage stage = patience.step(now, key);
    for (milliseconds t(0); t < span; t += milliseconds(10))
      stage = patience.step(now += milliseconds(10), key);
    return stage;
  }
  Patience patience;
  Clock::time_point now{seconds(1000)};
};

TEST_F(PatienceTest, HopeThenSuspicionThenOver) {
  EXPECT_EQ(patience.suspicion(), milliseconds(200));
  EXPECT_EQ(pass(milliseconds(990), 1), Patience::Stage::kHope);
  EXPECT_EQ(pass(milliseconds(20), 1), Patience::Stage::kSuspect);
  EXPECT_EQ(pass(milliseconds(170), 1), Patience::Stage::kSuspect);
  EXPECT_EQ(pass(milliseconds(30), 1), Patience::Stage::kOver);
  EXPECT_GE(patience.elapsed(now), milliseconds(1200));
}

TEST_F(PatienceTest, AnArrivalStartsAnew) {
  EXPECT_EQ(pass(milliseconds(1100), 1), Patience::Stage::kSuspect);
  EXPECT_EQ(pass(milliseconds(900), 2), Patience::Stage::kHope);
  patience.restart();
  EXPECT_EQ(pass(milliseconds(900), 2), Patience::Stage::kHope);
  EXPECT_EQ(pass(milliseconds(400), 2), Patience::Stage::kOver);
}

TEST_F(PatienceTest, TimeNotSpentWaitingDoesNotCount) {
  EXPECT_EQ(pass(milliseconds(500), 1), Patience::Stage::kHope);
  now += seconds(60);  // the rank computed, or was stopped itself
  EXPECT_EQ(patience.step(now, 1), Patience::Stage::kHope);
  EXPECT_EQ(pass(milliseconds(400), 1), Patience::Stage::kHope);
  EXPECT_EQ(pass(milliseconds(400), 1), Patience::Stage::kOver);
}

// A machine that is too busy lets the rank look now and then only: the deadline passes all the same.
TEST_F(PatienceTest, AStarvedRankLosesItsPatienceToo) {
  auto stage = patience.step(now, 1);
  for (int looks = 0; looks < 30 && stage != Patience::Stage::kOver; ++looks) {
    now += milliseconds(200);
    stage = patience.step(now, 1);
  }
  EXPECT_EQ(stage, Patience::Stage::kOver);
}

}  // namespace
}  // namespace sluice::comm
