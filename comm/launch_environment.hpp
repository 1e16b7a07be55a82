// Which rank of which job this process is, as whoever started it says in the environment: `sluice launch`, torchrun,
// mpirun (Open MPI), srun, or a PMI launcher (MPICH). And where the rank finds the others: the address the launcher or
// the configuration gives, else, when all ranks are on one host, a meeting file that rank 0 writes into a directory of
// this user (mode 0700), with the port it chose and a secret made for this job.
//
// Thread-safety: reads the environment; call it while nobody changes it. Errors: kInvalidConfig saying what is missing
// and how to give it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "sluice/comm/secret.hpp"

namespace sluice::comm {

// The variables of `sluice launch`.
inline constexpr const char* kLaunchRank = "SLUICE_LAUNCH_RANK";
inline constexpr const char* kLaunchSize = "SLUICE_LAUNCH_SIZE";
inline constexpr const char* kLaunchRendezvous = "SLUICE_LAUNCH_RENDEZVOUS";  // HOST:PORT
inline constexpr const char* kLaunchJob = "SLUICE_LAUNCH_JOB";
inline constexpr const char* kLaunchSecret = "SLUICE_LAUNCH_SECRET";

struct LaunchInfo {
  std::string launcher;  // "sluice launch", "torchrun", "mpirun", "srun", "pmi"
  std::int32_t rank = 0;
  std::int32_t num_ranks = 1;
  std::uint64_t job = 0;
  bool serves = false;  // this rank runs the rendezvous
  std::string host;     // empty: the meeting file says where
  std::uint16_t port = 0;
  std::optional<Secret> secret;        // none: the meeting file holds it
  std::filesystem::path meeting_file;  // empty where host is given
};

using Environment = std::function<std::optional<std::string>(const char* name)>;
std::optional<std::string> process_environment_variable(const char* name);

// launcher, rank and num_ranks alone; nothing where no launcher started this process.
std::optional<LaunchInfo> launched_as(const Environment& environment);

// rendezvous: "HOST:PORT" of the configuration, or empty; secret_file: likewise. Reads no file but secret_file.
LaunchInfo detect_launch(const Environment& environment, const std::string& rendezvous,
                         const std::string& secret_file);

// "n[07-09,12],m1" -> "n07": the first host of a SLURM node list. Empty when it is none.
std::string first_host(const std::string& node_list);

// What rank 0 writes and the others read. Writing makes the directory if it is not there and checks whose it is.
struct Meeting {
  std::uint16_t port = 0;
  std::string secret;
};
void write_meeting_file(const std::filesystem::path& path, const Meeting& meeting);
// Nothing while there is no complete file.
std::optional<Meeting> read_meeting_file(const std::filesystem::path& path);

}  // namespace sluice::comm
