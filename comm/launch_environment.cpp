#include "sluice/comm/launch_environment.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"
#include "sluice/comm/net.hpp"

namespace sluice::comm {
namespace {

namespace fs = std::filesystem;

std::int64_t number_of(const std::string& text, const char* name, std::int64_t min, std::int64_t max) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [at, ec] = std::from_chars(text.data(), end, value);
  Require(ec == std::errc{} && at == end && value >= min && value <= max, ErrorCode::kInvalidConfig,
          "environment ", name, " is \"", text.substr(0, 40), "\"; must be a number in ", min, "..", max);
  return value;
}

std::int64_t required_number(const Environment& get, const char* name, std::int64_t min, std::int64_t max) {
  const auto text = get(name);
  Require(text.has_value(), ErrorCode::kInvalidConfig, "environment ", name,
          " is not set, although the launcher sets its sisters; start all ranks with one launcher");
  return number_of(*text, name, min, max);
}

std::int64_t number_or(const Environment& get, const char* name, std::int64_t otherwise) {
  const auto text = get(name);
  return text ? number_of(*text, name, 0, INT32_MAX) : otherwise;
}

constexpr std::int64_t kMaxRanks = wire::kMaxRanks;
constexpr const char* kSluiceLaunch = "sluice launch";

fs::path meeting_directory(const Environment& get) {
  const auto runtime = get("XDG_RUNTIME_DIR");
  // srun hands on the variable of the host that the job was sent from, whose folder a compute node need not have.
  std::error_code ignored;
  const bool there = runtime && !runtime->empty() && fs::is_directory(*runtime, ignored);
  const fs::path base = there ? fs::path(*runtime) : fs::path("/tmp");
  return base / str("sluice-", ::geteuid());
}

}  // namespace

std::optional<std::string> process_environment_variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::optional<std::string>(value) : std::nullopt;
}

std::string first_host(const std::string& list) {
  const std::size_t end = list.find_first_of(",[");
  std::string host = list.substr(0, end);
  if (end == std::string::npos || list[end] == ',') return host;
  const std::size_t stop = list.find_first_of(",-]", end + 1);
  if (stop == std::string::npos) return {};
  host += list.substr(end + 1, stop - end - 1);
  // What stands behind the bracket belongs to every name.
  const std::size_t close = list.find(']', stop);
  if (close == std::string::npos) return {};
  const std::size_t next = list.find(',', close);
  return host + list.substr(close + 1, next == std::string::npos ? std::string::npos : next - close - 1);
}

std::optional<LaunchInfo> launched_as(const Environment& get) {
  LaunchInfo info;
  const auto take = [&](const char* launcher, const char* rank, const char* size) {
    info.launcher = launcher;
    info.rank = static_cast<std::int32_t>(required_number(get, rank, 0, kMaxRanks - 1));
    info.num_ranks = static_cast<std::int32_t>(required_number(get, size, 1, kMaxRanks));
  };
  if (get(kLaunchRank))
    take(kSluiceLaunch, kLaunchRank, kLaunchSize);
  else if (get("RANK") && get("WORLD_SIZE") && get("MASTER_ADDR"))
    take("torchrun", "RANK", "WORLD_SIZE");
  else if (get("OMPI_COMM_WORLD_RANK"))
    take("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
  else if (get("SLURM_PROCID") && get("SLURM_STEP_ID"))
    take("srun", "SLURM_PROCID", get("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS");
  else if (get("PMI_RANK"))
    take("pmi", "PMI_RANK", "PMI_SIZE");
  else
    return std::nullopt;
  Require(info.rank < info.num_ranks, ErrorCode::kInvalidConfig, info.launcher, " says that this is rank ",
          info.rank, " of ", info.num_ranks, "; ranks are 0..", info.num_ranks - 1);
  return info;
}

LaunchInfo detect_launch(const Environment& get, const std::string& rendezvous,
                         const std::string& secret_file) {
  std::optional<LaunchInfo> launched = launched_as(get);
  Require(launched.has_value(), ErrorCode::kInvalidConfig,
          "this process was started by no launcher: no rank in its environment; start the ranks with "
          "sluice launch -n N -- COMMAND, torchrun, mpirun or srun, or use transport local");
  LaunchInfo info = std::move(*launched);
  std::string job;
  bool one_host = true;
  std::string address = rendezvous;  // HOST:PORT
  if (info.launcher == kSluiceLaunch) {
    const auto where = get(kLaunchRendezvous);
    Require(where.has_value(), ErrorCode::kInvalidConfig, "environment ", kLaunchRendezvous,
            " is not set, although ", kLaunchRank, " is; start ranks with sluice launch");
    address = *where;
    job = get(kLaunchJob).value_or("");
    if (const auto secret = get(kLaunchSecret))
      info.secret = Secret::from_text(*secret, str("environment ", kLaunchSecret));
  } else if (info.launcher == "torchrun") {
    const std::string master_port = get("MASTER_PORT").value_or("29500");
    job = str("torchrun ", get("TORCHELASTIC_RUN_ID").value_or(""), " ", master_port, " ",
              get("TORCHELASTIC_RESTART_COUNT").value_or("0"));
    one_host = number_or(get, "LOCAL_WORLD_SIZE", -1) == info.num_ranks;
    if (!one_host && address.empty()) {
      // torchrun's agent listens on MASTER_PORT itself where it says so.
      const bool taken = get("TORCHELASTIC_USE_AGENT_STORE").value_or("") == "True";
      address =
          str(*get("MASTER_ADDR"), ":", number_of(master_port, "MASTER_PORT", 1, 65534) + (taken ? 1 : 0));
    }
  } else if (info.launcher == "mpirun") {
    job = str("mpirun ", get("PMIX_NAMESPACE").value_or(get("OMPI_MCA_ess_base_jobid").value_or("")));
    one_host = number_or(get, "OMPI_COMM_WORLD_LOCAL_SIZE", -1) == info.num_ranks;
  } else if (info.launcher == "srun") {
    job = str("srun ", get("SLURM_JOB_ID").value_or(""), ".", *get("SLURM_STEP_ID"));
    one_host = number_or(get, get("SLURM_STEP_NUM_NODES") ? "SLURM_STEP_NUM_NODES" : "SLURM_NNODES", -1) == 1;
    const std::string host =
        first_host(get("SLURM_STEP_NODELIST").value_or(get("SLURM_JOB_NODELIST").value_or("")));
    // All ranks know the job's number, and so the same port, which is free as far as anybody can tell.
    if (!one_host && address.empty() && !host.empty())
      address = str(host, ":", 20000 + Hasher().add_text(job).value() % 10000);
  } else {
    // pmi: the ranks of a host have one parent, the launcher's agent.
    job = str("pmi ", ::getppid());
    one_host = number_or(get, "MPI_LOCALNRANKS", -1) == info.num_ranks;
  }
  info.job = Hasher().add_text(job).value();
  if (!secret_file.empty()) info.secret = Secret::from_file(secret_file);
  info.serves = info.rank == 0 && info.launcher != kSluiceLaunch;

  if (address.empty()) {
    Require(one_host, ErrorCode::kInvalidConfig, info.launcher, " started ", info.num_ranks,
            " ranks on several hosts but does not say where they meet; set comm.rendezvous to HOST:PORT of "
            "rank 0's "
            "host, and comm.secret_file to a file of mode 0600 that every host has");
    info.meeting_file = meeting_directory(get) / str("job-", info.job, "-", info.num_ranks);
    return info;
  }
  const net::HostPort at =
      net::parse_host_port(address, info.launcher == kSluiceLaunch ? kLaunchRendezvous : "comm.rendezvous");
  Require(at.port != 0, ErrorCode::kInvalidConfig, "comm.rendezvous is ", address,
          "; all ranks must know the port, so it cannot be 0");
  info.host = at.host;
  info.port = at.port;
  Require(info.secret.has_value(), ErrorCode::kInvalidConfig, "the rendezvous at ", address,
          " needs the job's secret: set comm.secret_file to a file of mode 0600 that every rank can read "
          "(make one "
          "with: openssl rand -hex 32)");
  return info;
}

void write_meeting_file(const fs::path& path, const Meeting& meeting) {
  const fs::path folder = path.parent_path();
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST)
    throw Error(ErrorCode::kIo, str("cannot make ", folder.string(), ": ", std::strerror(errno)));
  struct stat info {};
  Require(::lstat(folder.c_str(), &info) == 0 && S_ISDIR(info.st_mode) && info.st_uid == ::geteuid() &&
              (info.st_mode & 077) == 0,
          ErrorCode::kInvalidConfig, folder.string(),
          " is not a directory of this user alone (mode 0700); remove it, or set comm.rendezvous and "
          "comm.secret_file");
  const fs::path draft = str(path.string(), ".", ::getpid());
  const int fd = ::open(draft.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  Require(fd >= 0, ErrorCode::kIo, "cannot write ", draft.string(), ": ", std::strerror(errno));
  const std::string text = str(meeting.port, "\n", meeting.secret, "\nend\n");
  const bool written = ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
                       ::rename(draft.c_str(), path.c_str()) == 0;
  const int error = errno;
  ::close(fd);
  Require(written, ErrorCode::kIo, "cannot write ", path.string(), ": ", std::strerror(error));
}

std::optional<Meeting> read_meeting_file(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return std::nullopt;
  struct stat info {};
  char text[256] = "";
  const ssize_t size = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == ::geteuid() &&
                               (info.st_mode & 077) == 0
                           ? ::read(fd, text, sizeof text)
                           : -1;
  ::close(fd);
  if (size <= 0) return std::nullopt;
  const std::string_view all(text, static_cast<std::size_t>(size));
  const std::size_t first = all.find('\n');
  if (first == std::string_view::npos || !all.ends_with("\nend\n")) return std::nullopt;
  Meeting out;
  const auto [at, ec] = std::from_chars(all.data(), all.data() + first, out.port);
  if (ec != std::errc{} || at != all.data() + first || all.size() < first + 7) return std::nullopt;
  out.secret = std::string(all.substr(first + 1, all.size() - first - 1 - 5));
  return out;
}

}  // namespace sluice::comm
