// One run with one fault: ranks train a small model, one of them breaks at a chosen place of a step, and what every rank
// saw is printed, one JSON line a rank on standard output. fault_runs.py starts it and judges.
//
//   fault_rank local RANKS VICTIM FAULT PLACE COUNT TIMEOUT_MS SEED     all ranks as threads
//   fault_rank TRANSPORT ...the same...                                 this process as one rank of a launched group
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>

#include "faulty_transport.hpp"
#include "sluice/base/log.hpp"
#include "sluice/runtime.hpp"
#include "sluice/runtime/src/train/trainer.hpp"

namespace sluice::testing {
namespace {

const std::map<std::string, Fault> kFaults = {
    {"none", Fault::kNone}, {"vanish", Fault::kVanish},   {"late", Fault::kLate},  {"throw", Fault::kThrow},
    {"kill", Fault::kKill}, {"stop", Fault::kStop},       {"cut", Fault::kCut},    {"slow", Fault::kSlow},
    {"lie", Fault::kLie},   {"garbage", Fault::kGarbage}, {"other", Fault::kOther}};
const std::map<std::string, Place> kPlaces = {
    {"start", Place::kStart},     {"plan", Place::kPlan},         {"dispatch", Place::kDispatch},
    {"combine", Place::kCombine}, {"backward", Place::kBackward}, {"all-reduce", Place::kAllReduce}};

constexpr std::int32_t kExperts = 13;

// The clock of the host, so that processes can be compared.
std::int64_t now_ns() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

std::mutex output;
void print(const nlohmann::json& line) {
  const std::lock_guard lock(output);
  const std::string text = line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  // In one call: ranks that are processes share the file.
  if (write(STDOUT_FILENO, text.data(), text.size()) != static_cast<ssize_t>(text.size()))
    std::fputs("fault_rank: standard output takes no more\n", stderr);
}

struct Options {
  std::string transport;
  std::int32_t ranks = 3, victim = 1;
  FaultSpec spec;
  std::int64_t timeout_ms = 1000;
  // Enough for any fault to happen; few where nothing breaks: then the losses are looked at.
  std::int64_t steps = 3000;
};

LoadedConfig config_of(const Options& options) {
  return parse_config(str("[model]\nnum_layers = 3\nnum_experts = ", kExperts,
                          "\nhidden = 16\nffn = 16\ncontext = 3\nembed = 6\n[routing]\ntop_k = 3\n"
                          "[train]\nsteps = ",
                          options.steps, "\ntokens_per_step = 96\n[topology]\nnodes = ",
                          options.spec.seed % 2 == 0 || options.ranks < 3 ? "0" : "[[0, 1], [2",
                          options.spec.seed % 2 == 0 || options.ranks < 3 ? ""
                          : options.ranks > 3                             ? ", 3]]"
                                                                          : "]]",
                          "\n"),
                      "fault_rank");
}

train::Text text_of() {
  train::Text out{.bytes = {}, .description = "numbers"};
  for (int i = 0; out.bytes.size() < 6000; ++i) out.bytes += str(i * 7919 % 1000, i % 3 == 0 ? "\n" : " ");
  return out;
}

void run_rank(std::unique_ptr<comm::Transport> transport, const Options& options) {
  const std::int32_t rank = transport->rank().value;
  const LogRank log_rank(rank);
  nlohmann::json line{{"rank", rank}, {"event", "end"}};
  if (rank == options.victim && options.spec.fault != Fault::kNone) {
    FaultSpec spec = options.spec;
    spec.triggered = [rank] { print({{"rank", rank}, {"event", "fault"}, {"at_ns", now_ns()}}); };
    transport = std::make_unique<FaultyTransport>(std::move(transport), std::move(spec));
  }
  RuntimeOptions runtime_options;
  runtime_options.timeout = std::chrono::milliseconds(options.timeout_ms);
  const auto runtime = Runtime::create_over(std::move(transport), runtime_options);
  try {
    const LoadedConfig loaded = config_of(options);
    const train::TrainReport report = train::train(*runtime, loaded, text_of(), {.progress = false});
    std::string losses;
    for (const double loss : report.losses) losses += str(loss, " ");
    line["losses"] = losses;
  } catch (...) {
    const Status status = current_exception_status();
    line["at_ns"] = now_ns();
    line["code"] = to_string(status.code);
    line["message"] = status.message;
    if (status.scope() != Scope::kGroup) runtime->abort("job", status.message);
    if (runtime->transport().aborted()) {
      const comm::AbortRecord record = runtime->transport().abort_record();
      line["culprit"] = record.culprit.value;
      line["phase"] = record.phase;
      line["chunk"] = record.chunk;
      line["record"] = record.status.message;
    }
  }
  print(line);
}

int run(int argc, char** argv) {
  Require(argc == 9, ErrorCode::kInvalidArgument,
          "usage: fault_rank TRANSPORT RANKS VICTIM FAULT PLACE COUNT TIMEOUT_MS SEED");
  Options o;
  o.transport = argv[1];
  o.ranks = std::atoi(argv[2]);
  o.victim = std::atoi(argv[3]);
  o.spec.fault = kFaults.at(argv[4]);
  o.spec.place = kPlaces.at(argv[5]);
  o.spec.count = std::atoi(argv[6]);
  o.timeout_ms = std::atoll(argv[7]);
  o.spec.seed = std::strtoull(argv[8], nullptr, 10);
  o.spec.summary_bytes = (kExperts + 2) * sizeof(std::int64_t);
  if (o.spec.fault == Fault::kSlow) o.steps = 8;
  if (o.spec.fault == Fault::kNone) o.steps = o.spec.count;
  set_log_level(LogLevel::kError);
  const LoadedConfig loaded = config_of(o);
  const Topology topology = configured_topology(loaded.config, o.ranks);
  if (o.transport != "local") {
    run_rank(comm::load_transport(o.transport, loaded.config.topology.nodes.declared() ? &topology : nullptr),
             o);
    return 0;
  }
  std::vector<std::thread> threads;
  for (auto& transport : comm::make_local_group(topology))
    threads.emplace_back([&o, own = std::move(transport)]() mutable { run_rank(std::move(own), o); });
  for (std::thread& thread : threads) thread.join();
  return 0;
}

}  // namespace
}  // namespace sluice::testing

int main(int argc, char** argv) {
  try {
    return sluice::testing::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fault_rank: %s\n", error.what());
    return 1;
  }
}
