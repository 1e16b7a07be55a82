// What the survivors of an MPI group report. mpi_fault_test MODE: rank 1 of at least two ranks
//   exit   leaves without a word (as if killed),
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

int run(const std::string& mode) {
  const auto transport = load_transport("mpi", nullptr);
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
  const Status status = t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "dispatch", .chunk = 2});
  const auto took = std::chrono::duration_cast<milliseconds>(Clock::now() - start);
  const AbortRecord record = t.abort_record();
  const bool in_time = took <= kTimeout * 12 / 10 + milliseconds(1500);
  std::string line = str("survivor ", t.rank().value, " culprit ", record.culprit.value, " reporter ",
                         record.reporter.value, " ", to_string(status.code), in_time ? "" : " but too late",
                         "\n    ", status.message, "\n    after ", took.count(), " ms\n");
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fflush(stdout);
  return 3;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 2 ? argv[1] : "";
  try {
    return run(mode);
  } catch (const sluice::Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
