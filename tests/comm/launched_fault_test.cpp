// What the survivors of a group of processes report. launched_fault_test TRANSPORT MODE: rank 1 of three
//   exit   leaves without a word (as if killed),
//   kill   kills itself, and the survivors form a new group where the transport can,
//   stop   stops itself,
//   late   computes for longer than the deadline,
//   close  closes its transport while the others still wait,
//   abort  ends the group with an error of its own,
//   short  sends less than its peer expects.
// Every survivor prints "survivor R culprit C reporter P code" and the sentence, and leaves with exit code 3.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/transport.hpp"

namespace {

using namespace sluice;
using namespace sluice::comm;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kTimeout(1000);

int be_culprit(Transport& t, const std::string& mode) {
  std::this_thread::sleep_for(milliseconds(200));  // the others wait by now
  if (mode == "exit") _exit(0);
  if (mode == "kill") std::raise(SIGKILL);
  if (mode == "stop") std::raise(SIGSTOP);
  if (mode == "late" || mode == "stop") std::this_thread::sleep_for(seconds(5));
  if (mode == "close") return 0;  // the destructor does it
  if (mode == "abort") {
    AbortRecord record;
    record.status = {ErrorCode::kOutOfMemory, "no memory for the window"};
    record.culprit = record.reporter = t.rank();
    record.phase = "plan";
    t.abort(record);
  }
  if (mode == "short") {
    std::vector<std::byte> source(9);
    t.put({.peer = RankId(0), .channel = 1, .source = source, .signal = 0});
    (void)t.wait({.channel = 1, .signal = 1, .value = 1, .phase = "combine"});
  }
  return 3;
}

// The ranks that are left work together again.
void form_again(Transport& t) {
  const std::int32_t me = t.rank().value;
  const Survivors next = t.survivors(seconds(2));
  next.transport->set_timeout(kTimeout);
  Collectives collectives(*next.transport);
  const std::int64_t mine = me;
  std::vector<std::int64_t> all(static_cast<std::size_t>(next.transport->num_ranks()));
  collectives.all_gather({&mine, 1}, all, "again").throw_if_error();
  std::vector<float> sum(100000, 1.0f);
  collectives.all_reduce_sum(std::span(sum), "again").throw_if_error();
  std::string line = str("rank ", me, " goes on as rank ", next.transport->rank().value, " of");
  for (std::size_t r = 0; r < all.size(); ++r) {
    Require(all[r] == next.former[r].value, ErrorCode::kInternal, "rank ", r, " was ", all[r]);
    line += str(" ", all[r]);
  }
  line += str(", sum ", static_cast<double>(sum.back()), "\n");
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fflush(stdout);
}

int run(const std::string& name, const std::string& mode) {
  const auto transport = load_transport(name, nullptr);
  Transport& t = *transport;
  t.set_timeout(kTimeout);
  Collectives collectives(t);
  for (int i = 0; i < 10; ++i) collectives.barrier("start").throw_if_error();
  std::vector<std::byte> window(10);
  t.open_channel(1, 1, 2);
  t.set_window(1, 0, window);
  if (t.rank().value == 1) return be_culprit(t, mode);
  const auto start = Clock::now();
  // The last rank waits for rank 0 only, which waits for rank 1.
  const Expect expect{.peer = RankId(t.rank().value == 0 ? 1 : 0),
                      .channel = 1,
                      .window = 0,
                      .offset_bytes = 0,
                      .bytes = 10,
                      .signal = 0};
  t.expect({&expect, 1});
  // Who does not wait here can hear of a death as well, over connections.
  const bool hears = mode == "exit" && t.name() != "mpi";
  while (hears && !t.broken() && Clock::now() - start < kTimeout)
    std::this_thread::sleep_for(milliseconds(1));
  const bool heard = !hears || t.broken();
  const Status status = t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "dispatch", .chunk = 2});
  const auto took = std::chrono::duration_cast<milliseconds>(Clock::now() - start);
  const AbortRecord record = t.abort_record();
  const bool in_time = took <= kTimeout * 12 / 10 + milliseconds(1500);
  std::string line =
      str("survivor ", t.rank().value, " culprit ", record.culprit.value, " reporter ", record.reporter.value,
          " ", to_string(status.code), in_time ? "" : " but too late", heard ? "" : " but did not hear of it",
          "\n    ", status.message, "\n    after ", took.count(), " ms\n");
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fflush(stdout);
  if (mode == "kill" && t.caps().survives_peer_loss) form_again(t);
  return 3;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc == 3 ? argv[1] : "", argc == 3 ? argv[2] : "");
  } catch (const sluice::Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
