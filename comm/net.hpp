// Authenticated connections: a thread that runs them (Loop), a listener that lets in only who knows the job's secret,
// and the blocking side that dials. Everything of Boost.Asio is in net.cpp.
//
// A stranger gets a challenge, has kHandshakeTime and a fixed number of bytes to answer it, and is then let in or
// closed; at most kMaxPending handshakes are open at once (the oldest goes first), so a flood or a silent intruder
// costs little and the job goes on. Frames beyond their bound close the connection.
//
// Ownership: a Loop must outlive its listeners; connections live as long as someone holds them or the Loop runs.
// Thread-safety: send(), close() and post() from any thread; handlers run on the loop's thread and must not block.
// Blocking: dial(), send_frame(), read_frame(), each until its deadline; they throw Error naming the address.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "sluice/base/clock.hpp"
#include "sluice/comm/wire.hpp"

namespace sluice::comm::net {

inline constexpr std::chrono::nanoseconds kHandshakeTime = std::chrono::seconds(3);
inline constexpr std::size_t kMaxPending = 128;

// A file descriptor that closes itself.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() { reset(); }
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = other.release();
    }
    return *this;
  }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void reset();

 private:
  int fd_ = -1;
};

class Connection {
 public:
  virtual ~Connection() = default;
  // Begins to read; called again, gives what comes from then on to other handlers. No handler is called before, nor
  // after close(); on_closed is the last call of all.
  virtual void start(std::function<void(std::span<const std::byte>)> on_frame,
                     std::function<void(const std::string& why)> on_closed) = 0;
  // Queues a frame. Dropped when the connection is closed.
  virtual void send(wire::Bytes body) = 0;
  // What was sent still goes, for a second at most.
  virtual void close() = 0;
  // Frames queued and not yet with the system.
  virtual std::size_t num_queued() const = 0;
};

class Loop {
 public:
  Loop();
  // Ends the thread; connections are closed without handlers being called.
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  // Ends the thread: no handler runs any more when it returns. Connections may be let go afterwards.
  void stop();
  void post(std::function<void()> work);
  void after(std::chrono::nanoseconds span, std::function<void()> work);
  std::shared_ptr<Connection> adopt(Fd fd, std::size_t max_frame_bytes);

  struct State;
  State& state() { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

struct ListenOptions {
  std::string address;     // of this host, or a name of it
  std::uint16_t port = 0;  // 0: any that is free
  const Secret* secret = nullptr;
  std::uint64_t job = 0;
  // Whether somebody who knows the secret may come in; kWelcome then. On the loop's thread, as is the next.
  std::function<wire::Verdict(const wire::ClientHello&)> admit;
  // peer: "address:port".
  std::function<void(const wire::ClientHello&, Fd, const std::string& peer)> accepted;
};

class Listener {
 public:
  // Throws kTransport naming the address when it cannot listen there.
  Listener(Loop& loop, ListenOptions options);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  std::uint16_t port() const;

  struct State;

 private:
  Loop& loop_;
  std::shared_ptr<State> state_;
};

struct DialOptions {
  std::string host;
  std::uint16_t port = 0;
  const Secret* secret = nullptr;
  std::uint64_t job = 0;
  wire::Purpose purpose = wire::Purpose::kRendezvous;
  std::int32_t rank = 0;
  std::uint32_t epoch = 0;
  Clock::time_point deadline;
  bool retry = true;    // while nobody listens there yet
  std::string to_whom;  // for errors: "the rendezvous", "rank 3 (host b)"
};
// Connects and proves itself. Throws kTransport (unreachable, no Sluice there), kTimeout, kDisagreement (refused: the
// secret, the job, the rank or the version).
Fd dial(const DialOptions& options);

// The addresses of a connected socket: "10.0.0.1".
std::string own_address(int fd);
bool is_loopback(const std::string& host);
// "host:port" or "[v6]:port"; throws kInvalidConfig naming `where`.
struct HostPort {
  std::string host;
  std::uint16_t port = 0;
};
HostPort parse_host_port(const std::string& text, std::string_view where);

void send_frame(int fd, const wire::Bytes& body, Clock::time_point deadline, const std::string& to_whom);
wire::Bytes read_frame(int fd, std::size_t max_bytes, Clock::time_point deadline,
                       const std::string& from_whom);

}  // namespace sluice::comm::net
