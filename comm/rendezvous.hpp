// Where the processes of a job find each other: a key-value exchange that one process serves and all ranks join.
//
// A rank joins with its number and the size of the job, puts values under keys ("card/3"), and gathers the values of
// all ranks under a prefix, which waits until all are there. When a rank leaves without a word, or a gather's deadline
// passes, everybody who gathers gets an error that names the ranks that are gone or missing. Values are bounded
// (wire.hpp), a rank's connection as well; who does not know the secret never gets this far (net.hpp).
//
// Thread-safety: the server runs on a thread of its own; a Rendezvous serves one thread.
// Blocking: the constructor and the calls of Rendezvous, each until its deadline. Errors: Error as dial() throws it;
// kTimeout naming the missing ranks; kPeerLost naming who left; kInvalidConfig when the job's size differs.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "sluice/comm/net.hpp"

namespace sluice::comm {

class RendezvousServer {
 public:
  struct Options {
    std::string address = "127.0.0.1";
    std::uint16_t port = 0;  // 0: any that is free
    std::int32_t num_ranks = 1;
    std::uint64_t job = 0;
  };
  RendezvousServer(const Options& options, Secret secret);
  ~RendezvousServer();
  RendezvousServer(const RendezvousServer&) = delete;
  RendezvousServer& operator=(const RendezvousServer&) = delete;
  std::uint16_t port() const;

 private:
  struct State;
  Secret secret_;
  net::Loop loop_;  // before the listener that it runs
  std::shared_ptr<State> state_;
  std::unique_ptr<net::Listener> listener_;
};

class Rendezvous {
 public:
  struct Options {
    std::string host;
    std::uint16_t port = 0;
    std::uint64_t job = 0;
    std::uint32_t group = 0;  // a job may form several; all ranks count them alike
    std::int32_t rank = 0;
    std::int32_t num_ranks = 1;
    std::string who;  // for people: "host b, pid 4711"
    Clock::time_point deadline;
    bool retry = true;  // while nobody listens there yet
  };
  Rendezvous(const Options& options, const Secret& secret);

  void put(const std::string& key, std::string value, Clock::time_point deadline);
  // The values of prefix0 .. prefix(num_ranks - 1).
  std::vector<std::string> gather(const std::string& prefix, Clock::time_point deadline);
  // Says goodbye; going without it is an accident.
  void leave() noexcept;
  // This host's address on the way to the server.
  std::string own_address() const { return net::own_address(fd_.get()); }

 private:
  wire::Reply ask(const wire::Request& request, Clock::time_point deadline);
  net::Fd fd_;
  std::int32_t num_ranks_;
  std::string server_;
};

}  // namespace sluice::comm
