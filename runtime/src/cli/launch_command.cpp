// sluice launch: starts the ranks of a command as processes of this host, serves their rendezvous, and says how each
// ended. On several hosts one launcher a host, told which ranks are its own and where all meet.
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstring>
#include <optional>
#include <thread>

#include "sluice/base/clock.hpp"
#include "sluice/base/log.hpp"
#include "sluice/comm/launch_environment.hpp"
#include "sluice/comm/net.hpp"
#include "sluice/comm/rendezvous.hpp"
#include "sluice/comm/watchdog.hpp"
#include "sluice/runtime/src/cli/commands.hpp"

extern char** environ;

namespace sluice::cli {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kPoll(20);
constexpr milliseconds kTermTime(2000);  // between SIGTERM and SIGKILL

struct LaunchOptions {
  int num_ranks = 0;
  bool mpi = false;
  std::string here;        // "FIRST-LAST"
  std::string rendezvous;  // HOST:PORT
  std::string secret_file;
  bool keep_going = false;
  int grace_s = 10;
  std::vector<std::string> command;
};

// What the launcher was told to do in the meantime.
volatile std::sig_atomic_t g_signal = 0;
void note_signal(int signal) {
  g_signal = signal;
}

int run_mpirun(const LaunchOptions& o) {
  std::vector<std::string> words = {"mpirun", "--oversubscribe", "-n", std::to_string(o.num_ranks)};
  if (geteuid() == 0) words.insert(words.begin() + 1, "--allow-run-as-root");
  words.insert(words.end(), o.command.begin(), o.command.end());
  std::vector<char*> argv;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  throw Error(ErrorCode::kNotFound,
              str("cannot run mpirun: ", std::strerror(errno), "; install Open MPI (Debian: openmpi-bin)"));
}

struct Range {
  int first = 0, last = 0;
};

Range parse_here(const LaunchOptions& o) {
  if (o.here.empty()) return {0, o.num_ranks - 1};
  Range out;
  const char* end = o.here.data() + o.here.size();
  auto [at, ec] = std::from_chars(o.here.data(), end, out.first);
  bool valid = ec == std::errc{};
  out.last = out.first;
  if (valid && at != end) {
    valid = *at == '-';
    const auto second = std::from_chars(at + 1, end, out.last);
    valid = valid && second.ec == std::errc{} && second.ptr == end;
  }
  Require(valid && out.first >= 0 && out.first <= out.last && out.last < o.num_ranks,
          ErrorCode::kInvalidArgument, "--here is \"", o.here, "\"; must be FIRST-LAST within 0-",
          o.num_ranks - 1);
  return out;
}

// A child: one rank of the job.
struct Child {
  int rank = 0;
  pid_t pid = -1;
  bool running = true;
  int status = 0;
  bool failed() const { return !running && !(WIFEXITED(status) && WEXITSTATUS(status) == 0); }
};

std::string how_it_ended(const Child& c) {
  if (WIFSIGNALED(c.status))
    return str("was killed by signal ", WTERMSIG(c.status), " (", strsignal(WTERMSIG(c.status)), ")");
  return str("ended with exit code ", WEXITSTATUS(c.status));
}

// Everything is made before fork(): between it and exec() only plain system calls are safe.
pid_t start(const LaunchOptions& o, int rank, const std::vector<std::string>& variables) {
  std::vector<std::string> own;
  for (char** entry = environ; *entry != nullptr; ++entry)
    if (!std::string_view(*entry).starts_with("SLUICE_LAUNCH_")) own.emplace_back(*entry);
  own.insert(own.end(), variables.begin(), variables.end());
  own.push_back(str(comm::kLaunchRank, "=", rank));
  std::vector<char*> envp, argv;
  for (std::string& v : own) envp.push_back(v.data());
  envp.push_back(nullptr);
  std::vector<std::string> words = o.command;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  int report[2];
  const bool piped = pipe2(report, O_CLOEXEC) == 0;
  Require(piped, ErrorCode::kIo, "cannot start rank ", rank, ": pipe: ", std::strerror(errno));
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);  // a launcher that is killed leaves nothing behind
    if (getppid() == parent) execvpe(argv[0], argv.data(), envp.data());
    const int error = errno;
    [[maybe_unused]] const ssize_t ignored = write(report[1], &error, sizeof error);
    _exit(127);
  }
  const int fork_error = errno;
  close(report[1]);
  int error = 0;
  const bool failed = pid > 0 && read(report[0], &error, sizeof error) == sizeof error;
  close(report[0]);
  Require(pid > 0, ErrorCode::kIo, "cannot start rank ", rank, ": fork: ", std::strerror(fork_error));
  if (failed) {
    waitpid(pid, nullptr, 0);
    throw Error(ErrorCode::kNotFound, str("cannot run ", o.command[0], ": ", std::strerror(error)));
  }
  return pid;
}

class Job {
 public:
  explicit Job(std::vector<Child> children) : children_(std::move(children)) {}
  ~Job() {
    signal_all(SIGKILL);
    for (Child& c : children_)
      if (c.running) waitpid(c.pid, nullptr, 0);
  }
  void add(Child child) { children_.push_back(child); }

  // Returns when all have ended.
  void supervise(const LaunchOptions& o) {
    std::optional<Clock::time_point> end_at;  // of the job, after a failure
    int next_signal = SIGTERM;
    while (reap()) {
      const Clock::time_point now = Clock::now();
      if (g_signal != 0 && !interrupted_) {
        interrupted_ = true;
        signal_all(g_signal);
        end_at = now + kTermTime;
      }
      if (first_failed_ && !o.keep_going && !end_at) {
        end_at = now + std::chrono::seconds(o.grace_s);
        log_error(name(*first_failed_), " ", how_it_ended(*first_failed_), "; the other ranks have ",
                  o.grace_s, " s to report and end");
      }
      if (end_at && now >= *end_at) {
        signal_all(next_signal);
        next_signal = SIGKILL;
        end_at = now + kTermTime;
      }
      std::this_thread::sleep_for(kPoll);
    }
  }

  // 0, or 1 with one line that says which rank ended how.
  int verdict(const LaunchOptions& o) const {
    std::string others;
    int num_done = 0;
    for (const Child& c : children_) {
      num_done += !c.failed();
      if (c.failed() && first_failed_ && c.pid != first_failed_->pid)
        others += str(others.empty() ? "; then rank " : ", rank ", c.rank, " ", how_it_ended(c));
    }
    if (!first_failed_) return interrupted_ ? 1 : 0;
    const std::string line = str(name(*first_failed_), " ", how_it_ended(*first_failed_), others);
    if (o.keep_going && num_done > 0 && !interrupted_) {
      log_warn(line, "; ", num_done, " of ", children_.size(), " ranks ended well");
      return 0;
    }
    log_error(line);
    return 1;
  }

 private:
  static std::string name(const Child& c) { return str("rank ", c.rank, " (pid ", c.pid, ")"); }

  // Whether any runs still.
  bool reap() {
    bool running = false;
    std::vector<Child> ended;
    for (Child& c : children_) {
      if (!c.running) continue;
      int status = 0;
      if (waitpid(c.pid, &status, WNOHANG) != c.pid) {
        running = true;
        continue;
      }
      c.running = false;
      c.status = status;
      if (c.failed()) ended.push_back(c);
    }
    // Of those that ended since the last look, one that was killed is the cause rather than one that reports it.
    const auto killed =
        std::find_if(ended.begin(), ended.end(), [](const Child& c) { return WIFSIGNALED(c.status); });
    if (!ended.empty() && !first_failed_) first_failed_ = killed != ended.end() ? *killed : ended.front();
    return running;
  }
  void signal_all(int signal) {
    for (const Child& c : children_) {
      if (!c.running) continue;
      kill(c.pid, signal);
      if (signal == SIGTERM) kill(c.pid, SIGCONT);  // a stopped process does not end
    }
  }

  std::vector<Child> children_;
  std::optional<Child> first_failed_;
  bool interrupted_ = false;
};

int run_launch(const LaunchOptions& o) {
  const Range here = parse_here(o);
  const bool all_here = here.first == 0 && here.last == o.num_ranks - 1;
  Require(
      all_here || (!o.rendezvous.empty() && !o.secret_file.empty()), ErrorCode::kInvalidArgument,
      "--here starts a part of the ranks; every host's launcher needs --rendezvous HOST:PORT of the host of "
      "rank 0, and --secret-file");
  comm::RendezvousServer::Options serve;
  serve.num_ranks = o.num_ranks;
  std::string where = "127.0.0.1";
  if (!o.rendezvous.empty()) {
    const comm::net::HostPort at = comm::net::parse_host_port(o.rendezvous, "--rendezvous");
    Require(comm::net::is_loopback(at.host) || !o.secret_file.empty(), ErrorCode::kInvalidArgument,
            "--rendezvous ", o.rendezvous,
            " can be reached from other hosts, so it needs --secret-file (mode 0600; openssl rand -hex 32)");
    Require(all_here || at.port != 0, ErrorCode::kInvalidArgument, "--rendezvous ", o.rendezvous,
            ": all launchers must know the port, so it cannot be 0");
    where = serve.address = at.host;
    serve.port = at.port;
  }
  const comm::Secret secret =
      o.secret_file.empty() ? comm::Secret::random() : comm::Secret::from_file(o.secret_file);
  // Launchers on several hosts have only the address in common.
  const std::string job_name = all_here ? comm::Secret::random().reveal().substr(0, 16) : o.rendezvous;
  {
    // As a rank will compute it.
    comm::LaunchInfo probe = comm::detect_launch(
        [&](const char* name) -> std::optional<std::string> {
          const std::string_view n = name;
          if (n == comm::kLaunchRank) return "0";
          if (n == comm::kLaunchSize) return std::to_string(o.num_ranks);
          if (n == comm::kLaunchRendezvous) return "127.0.0.1:1";
          if (n == comm::kLaunchJob) return job_name;
          if (n == comm::kLaunchSecret) return secret.reveal();
          return std::nullopt;
        },
        "", "");
    serve.job = probe.job;
  }
  std::unique_ptr<comm::RendezvousServer> server;
  std::uint16_t port = serve.port;
  if (here.first == 0) {
    server = std::make_unique<comm::RendezvousServer>(serve, secret);
    port = server->port();
  }
  const bool v6 = where.find(':') != std::string::npos;
  const std::vector<std::string> variables = {
      str(comm::kLaunchSize, "=", o.num_ranks),
      str(comm::kLaunchRendezvous, "=", v6 ? "[" : "", where, v6 ? "]:" : ":", port),
      str(comm::kLaunchJob, "=", job_name), str(comm::kLaunchSecret, "=", secret.reveal())};

  struct sigaction action {};
  action.sa_handler = note_signal;
  for (const int s : {SIGINT, SIGTERM, SIGHUP}) sigaction(s, &action, nullptr);
  Job job({});
  for (int r = here.first; r <= here.last; ++r) job.add({.rank = r, .pid = start(o, r, variables)});
  job.supervise(o);
  return job.verdict(o);
}

}  // namespace

void add_launch(CLI::App& app, Run& run) {
  auto o = std::make_shared<LaunchOptions>();
  CLI::App* command =
      app.add_subcommand("launch", "start the ranks of a command as processes (docs/transports.md)");
  command->add_option("-n,--num-ranks", o->num_ranks, "ranks of the job")
      ->required()
      ->check(CLI::Range(1, 65536));
  CLI::Option* mpi = command->add_flag("--mpi", o->mpi, "through mpirun");
  const auto ours = [&](CLI::Option* option) { option->excludes(mpi); };
  ours(command->add_option("--here", o->here, "FIRST-LAST: the ranks to start on this host (default: all)")
           ->check(not_empty));
  ours(
      command
          ->add_option("--rendezvous", o->rendezvous,
                       "HOST:PORT where the ranks meet, served by the launcher of rank 0 (default: loopback)")
          ->check(not_empty));
  ours(command
           ->add_option("--secret-file", o->secret_file,
                        "file of mode 0600 with the job's secret (default: one is made for this job)")
           ->check(not_empty));
  ours(command->add_flag("--keep-going", o->keep_going,
                         "after a rank is lost let the others go on (train.on_failure = \"shrink\")"));
  ours(command->add_option("--grace", o->grace_s, "seconds for the others to report after a rank has failed")
           ->check(CLI::Range(0, 86400)));
  command->add_option("command", o->command, "the command and its arguments, after --")->required();
  command->prefix_command(false);
  command->callback([o, &run] { run = [o]() -> int { return o->mpi ? run_mpirun(*o) : run_launch(*o); }; });
}

}  // namespace sluice::cli
