#include "sluice/runtime/src/rank_group.hpp"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <system_error>
#include <thread>

#include "sluice/base/log.hpp"
#include "sluice/comm/launch_environment.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/runtime/src/gather.hpp"
#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {

// Of transport local. Memory grows with its square.
constexpr std::int32_t kMostThreadRanks = 1024;

// Cores this process may use.
std::vector<int> usable_cores() {
  cpu_set_t set;
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int c = 0; c < CPU_SETSIZE; ++c)
      if (CPU_ISSET(c, &set)) cores.push_back(c);
  return cores;
}

// Gives the calling thread its share of the cores, so that ranks do not chase each other over them.
void pin_to(const std::vector<int>& cores, std::size_t first, std::size_t count) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (std::size_t i = 0; i < count; ++i) CPU_SET(cores[first + i], &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // only a preference: failure changes speed alone
}

// Keys and values, a line each; a value's own line ends are written "\\n".
std::string pack(const std::vector<KeyValue>& values) {
  std::string out;
  for (const KeyValue& v : values) {
    out += v.key + '\n';
    for (const char c : v.value) {
      if (c == '\n')
        out += "\\n";
      else if (c == '\\')
        out += "\\\\";
      else
        out += c;
    }
    out += '\n';
  }
  return out;
}

std::vector<KeyValue> unpack(std::string_view text) {
  std::vector<KeyValue> out;
  while (!text.empty()) {
    KeyValue v;
    for (std::string* part : {&v.key, &v.value}) {
      const std::size_t end = text.find('\n');
      if (end == std::string_view::npos) return out;
      for (std::size_t i = 0; i < end; ++i) {
        const bool escaped = text[i] == '\\' && i + 1 < end;
        if (escaped) ++i;
        *part += escaped && text[i] == 'n' ? '\n' : text[i];
      }
      text.remove_prefix(end + 1);
    }
    out.push_back(std::move(v));
  }
  return out;
}

// Semantic keys must be equal; agreed keys become rank 0's. Collective.
LoadedConfig agree_on(Runtime& runtime, const LoadedConfig& mine) {
  constexpr std::string_view kPhase = "config agreement";
  const auto own = semantic_values(mine.config);
  const auto from_rank0 = [&](const std::vector<KeyValue>& values) {
    return unpack(text_of_root(runtime, pack(values), kMaxConfigFileBytes, "a configuration", kPhase));
  };
  const std::vector<KeyValue> reference = from_rank0(own);
  // One bit a key, so that every rank can name what any rank has different. All ranks run one program: the keys are the
  // same and in the same order.
  const auto differing = differing_keys(reference, own);
  std::vector<std::int64_t> bits(own.size() / 63 + 1, 0);
  for (std::size_t k = 0; k < own.size(); ++k)
    if (std::find(differing.begin(), differing.end(), own[k].key) != differing.end())
      bits[k / 63] |= std::int64_t{1} << (k % 63);
  const auto all = runtime.all_gather(bits, kPhase);
  std::string who;
  for (std::size_t r = 0; r < all.size() / bits.size(); ++r) {
    std::string keys;
    for (std::size_t k = 0; k < own.size(); ++k)
      if ((all[r * bits.size() + k / 63] >> (k % 63)) & 1) keys += str(keys.empty() ? "" : ", ", own[k].key);
    if (!keys.empty()) who += str(who.empty() ? "" : "; ", "rank ", r, ": ", keys);
  }
  Require(who.empty(), ErrorCode::kDisagreement, "semantic keys differ from rank 0's on ", who,
          "; start all ranks with the same configuration");
  LoadedConfig out = mine;
  for (const KeyValue& v : from_rank0(agreed_values(mine.config)))
    if (runtime.rank().value != 0) out.set(v.key, v.value, {ConfigSource::Kind::kCommandLine, "rank 0"});
  validate(out);
  return out;
}

RuntimeOptions runtime_options(const Config& config) {
  RuntimeOptions out;
  out.timeout = std::chrono::milliseconds(config.comm.timeout_ms);
  out.threads_per_rank = config.runtime.threads_per_rank;
  out.rendezvous = config.comm.rendezvous;
  out.secret_file = config.comm.secret_file;
  if (config.runtime.device == Config::Runtime::Device::kCuda) out.device = ComputeDevice::kCuda;
  switch (config.runtime.progress) {
    case Config::Runtime::Progress::kAuto:
      out.progress = ProgressMode::kAuto;
      break;
    case Config::Runtime::Progress::kInline:
      out.progress = ProgressMode::kInline;
      break;
    case Config::Runtime::Progress::kThread:
      out.progress = ProgressMode::kThread;
      break;
  }
  return out;
}

// What is left of a group of `num_ranks` ranks for the next one; former: the ranks that stay, ascending.
LoadedConfig shrunk(const LoadedConfig& loaded, std::int32_t num_ranks, std::span<const RankId> former) {
  LoadedConfig out = loaded;
  Config& c = out.config;
  const ConfigSource source{ConfigSource::Kind::kCommandLine, "the loss of a rank"};
  if (c.topology.nodes.declared()) {
    const Topology before = configured_topology(loaded.config, num_ranks);
    NodesSpec nodes;
    for (std::int32_t n = 0; n < before.num_nodes(); ++n) {
      std::vector<std::int32_t> ranks;
      for (std::size_t i = 0; i < former.size(); ++i)
        if (before.node_of(former[i]) == NodeId(n)) ranks.push_back(static_cast<std::int32_t>(i));
      if (!ranks.empty()) nodes.lists.push_back(std::move(ranks));
    }
    nodes.num_nodes = static_cast<std::int32_t>(nodes.lists.size());
    c.topology.nodes = nodes;
    out.set_source("topology.nodes", source);
  }
  if (c.topology.ranks > 0) {
    c.topology.ranks = static_cast<std::int32_t>(former.size());
    out.set_source("topology.ranks", source);
  }
  if (!c.placement.slots_per_rank.empty()) {
    log_warn("placement.slots_per_rank was for ", num_ranks, " ranks; the ", former.size(),
             " that are left share the experts evenly");
    c.placement.slots_per_rank.clear();
    out.set_source("placement.slots_per_rank", source);
  }
  if (c.placement.policy == Config::Placement::Policy::kFile) {
    log_warn("placement.file ", c.placement.file, " was for ", num_ranks, " ranks; the ", former.size(),
             " that are left share the experts evenly");
    c.placement.policy = Config::Placement::Policy::kContiguous;
    c.placement.file.clear();
    out.set_source("placement.policy", source);
    out.set_source("placement.file", source);
  }
  validate(out);
  return out;
}

bool goes_on(const LoadedConfig& config, const GroupOptions& options) {
  return options.after_loss && config.config.train.on_failure == Config::Train::OnFailure::kShrink;
}

GroupLoss loss_of(const comm::AbortRecord& record, std::int32_t num_ranks) {
  return {record.culprit, record.phase, record.chunk, record.status, num_ranks};
}

// What became of a group of threads.
struct LocalOutcome {
  std::vector<std::exception_ptr> errors;  // [num_ranks]
  comm::AbortRecord record;                // of the group; ok when it ended in order

  bool own(std::size_t rank) const {  // the rank failed by itself, not with the group
    if (!errors[rank]) return false;
    try {
      std::rethrow_exception(errors[rank]);
    } catch (const Error& error) {
      return error.scope() != Scope::kGroup;
    } catch (...) {
      return true;
    }
  }
  // The first cause: an error of a rank's own before one that only tells of the end of the group.
  std::exception_ptr cause() const {
    std::exception_ptr out;
    for (std::size_t r = 0; r < errors.size(); ++r) {
      if (errors[r] && own(r)) return errors[r];
      if (!out) out = errors[r];
    }
    return out;
  }
  // Ranks that only learned of the loss of another; empty when nobody in particular was lost.
  std::vector<RankId> survivors() const {
    std::vector<RankId> out;
    bool lost = record.culprit.valid();
    for (std::size_t r = 0; r < errors.size(); ++r) {
      const RankId rank(static_cast<std::int32_t>(r));
      if (own(r) || rank == record.culprit)
        lost = true;
      else
        out.push_back(rank);
    }
    if (!lost) out.clear();
    return out;
  }
};

using LocalBody = std::function<void(Runtime& runtime)>;

LocalOutcome run_threads(const LoadedConfig& config, std::int32_t num_ranks, const LocalBody& body) {
  const Topology topology = configured_topology(config.config, num_ranks);
  auto group = Runtime::create_local(topology, runtime_options(config.config));
  const std::vector<int> cores = usable_cores();
  const auto threads = static_cast<std::size_t>(config.config.runtime.threads_per_rank);
  const bool pin = group.size() * threads <= cores.size();

  LocalOutcome out;
  out.errors.resize(group.size());
  std::vector<std::thread> ranks;
  ranks.reserve(group.size());
  const auto run_rank = [&](std::size_t r) {
    const LogRank log_rank(static_cast<std::int32_t>(r));
    if (pin) pin_to(cores, r * threads, threads);
    try {
      body(*group[r]);
      group[r]->barrier("end");
    } catch (...) {
      out.errors[r] = std::current_exception();
      const Status status = current_exception_status();
      if (status.scope() != Scope::kGroup) group[r]->abort("job", status.message);
    }
  };
  for (std::size_t r = 0; r < group.size(); ++r) {
    try {
      ranks.emplace_back(run_rank, r);
    } catch (const std::system_error& e) {
      const std::string why =
          str("cannot start a thread for rank ", r, " of ", group.size(), ": ", e.code().message(),
              "; run fewer ranks, or ranks as processes (comm.transport)");
      group[r]->abort("start", why);
      for (std::thread& t : ranks) t.join();
      throw Error(ErrorCode::kOutOfMemory, why);
    }
  }
  for (std::thread& t : ranks) t.join();
  if (group[0]->transport().aborted()) out.record = group[0]->transport().abort_record();
  return out;
}

void run_local(LoadedConfig config, const GroupOptions& options) {
  if (!options.alone) {
    const auto launched = comm::launched_as(comm::process_environment_variable);
    Require(!launched || launched->num_ranks == 1, ErrorCode::kInvalidConfig, "comm.transport local (from ",
            config.source("comm.transport").text, ") runs all ranks as threads of one process, but ",
            launched ? launched->launcher : "", " started ", launched ? launched->num_ranks : 0,
            " processes, and each would do the whole job by itself; choose a transport between processes, "
            "such as "
            "comm.transport=shm, or start one process");
  }
  std::int32_t num_ranks = configured_ranks(config.config);
  if (num_ranks == 0) num_ranks = options.default_ranks;
  Require(num_ranks <= kMostThreadRanks, ErrorCode::kInvalidConfig, num_ranks,
          " ranks are too many for threads of one "
          "process (comm.transport local): at most ",
          kMostThreadRanks, "; run them as processes, or set topology.ranks or topology.nodes to fewer");
  std::vector<GroupLoss> losses;
  while (true) {
    const LocalOutcome outcome = run_threads(config, num_ranks, [&](Runtime& runtime) {
      if (losses.empty())
        options.body(runtime, config);
      else
        options.after_loss(runtime, config, losses);
    });
    const std::exception_ptr cause = outcome.cause();
    if (!cause) return;
    const std::vector<RankId> survivors = outcome.survivors();
    if (!goes_on(config, options) || survivors.empty()) std::rethrow_exception(cause);
    losses.push_back(loss_of(outcome.record, num_ranks));
    log_warn("a rank was lost: ", outcome.record.status.message, "; ", survivors.size(), " of ", num_ranks,
             " ranks form a new group");
    config = shrunk(config, num_ranks, survivors);
    num_ranks = static_cast<std::int32_t>(survivors.size());
  }
}

void run_launched(const LoadedConfig& config, const GroupOptions& options) {
  std::optional<Topology> nodes;
  const Config& c = config.config;
  if (c.topology.nodes.declared()) {
    std::int32_t num_ranks = configured_ranks(c);
    Require(num_ranks > 0, ErrorCode::kInvalidConfig,
            "topology.nodes does not say how many ranks there are; set "
            "topology.ranks, list the ranks of each node, or leave topology.nodes away");
    nodes = configured_topology(c, num_ranks);
  }
  auto runtime = Runtime::create(c.comm.transport, nodes ? &*nodes : nullptr, runtime_options(c));
  const std::int32_t joined = runtime->num_ranks();
  if (c.comm.transport == "mpi" && joined == 1) {
    // Where launcher and MPI library do not know each other, every process is a world of its own.
    const auto launched = comm::launched_as(comm::process_environment_variable);
    Require(!launched || launched->num_ranks == 1, ErrorCode::kInvalidConfig,
            "comm.transport mpi: ", launched ? launched->launcher : "", " started ",
            launched ? launched->num_ranks : 0,
            " processes, but for MPI each is alone; start them with mpirun of the same MPI, srun --mpi=pmix, "
            "or sluice "
            "launch --mpi");
  }
  Require(c.topology.ranks == 0 || c.topology.ranks == joined, ErrorCode::kInvalidConfig,
          "topology.ranks is ", c.topology.ranks, " (from ", config.source("topology.ranks").text, "), but ",
          joined, joined == 1 ? " process was" : " processes were",
          " started; start as many as topology.ranks says, or leave topology.ranks out");
  LoadedConfig mine = config;
  std::vector<GroupLoss> losses;
  while (true) {
    set_process_log_rank(runtime->rank().value);
    try {
      const LoadedConfig agreed = agree_on(*runtime, mine);
      if (losses.empty())
        options.body(*runtime, agreed);
      else
        options.after_loss(*runtime, agreed, losses);
      runtime->barrier("end");
      return;
    } catch (...) {
      const Status status = current_exception_status();
      if (status.scope() != Scope::kGroup) runtime->abort("job", status.message);
      comm::Transport& transport = runtime->transport();
      // Only a loss that is somebody else's leaves this rank something to go on with.
      const bool survives = status.scope() == Scope::kGroup && transport.aborted() &&
                            transport.abort_record().culprit.valid() &&
                            transport.abort_record().culprit != runtime->rank() &&
                            transport.caps().survives_peer_loss && goes_on(mine, options);
      if (!survives) {
        // Say it before the transport goes: its end may take the process with it.
        log_error(to_string(status.code), ": ", status.message);
        runtime.reset();
        throw;
      }
    }
    const std::int32_t num_ranks = runtime->num_ranks();
    losses.push_back(loss_of(runtime->transport().abort_record(), num_ranks));
    comm::Survivors next = runtime->transport().survivors(std::chrono::milliseconds(c.comm.timeout_ms));
    log_warn("a rank was lost: ", losses.back().status.message, "; ", next.former.size(), " of ", num_ranks,
             " ranks form a new group");
    mine = shrunk(mine, num_ranks, next.former);
    const auto link = gpu_link_of(c.comm.transport);
    runtime = link ? create_over_gpus(std::move(next.transport), runtime_options(mine.config), *link)
                   : Runtime::create_over(std::move(next.transport), runtime_options(mine.config));
  }
}

}  // namespace

void run_group(const LoadedConfig& config, const GroupOptions& options) {
  set_log_level(config.config.runtime.log_level);
  if (config.config.comm.transport == "local") {
    run_local(config, options);
  } else {
    run_launched(config, options);
  }
}

bool prints_results(const Runtime& runtime) {
  return runtime.rank().value == 0;
}

}  // namespace sluice
