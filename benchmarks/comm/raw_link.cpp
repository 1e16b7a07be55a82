#include "raw_link.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <sstream>
#include <thread>
#include <vector>

#include "sluice/base/clock.hpp"

namespace sluice::bench {
namespace {

void check(bool ok, const char* what) {
  Require(ok, ErrorCode::kTransport, what, " failed: ", std::strerror(errno));
}

class RawMemcpy final : public RawLink {
 public:
  RawMemcpy(comm::Collectives& collectives, RawBuffers buffers)
      : collectives_(collectives), buffers_(buffers) {}
  std::string name() const override { return "memcpy of one thread"; }
  double ping_us(int) override { return 0; }
  double stream_us(std::size_t bytes, std::size_t count) override {
    collectives_.barrier("raw").throw_if_error();
    const auto begin = Clock::now();
    // The others are at rest, as the one thread wants it.
    if (collectives_.transport().rank().value == 0)
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t at = i * bytes % buffers_.sink.size();
        std::memcpy(buffers_.sink.data() + at, buffers_.source.data() + at, bytes);
      }
    return to_us(Clock::now() - begin);
  }

 private:
  comm::Collectives& collectives_;
  RawBuffers buffers_;
};

class RawSocket final : public RawLink {
 public:
  RawSocket(comm::Collectives& collectives, RawBuffers buffers)
      : collectives_(collectives), buffers_(buffers), me_(collectives.transport().rank().value) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    int listener = -1;
    std::int64_t port = 0;
    if (me_ == 1) {
      listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      check(::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 && ::listen(listener, 1) == 0,
            "listen");
      check(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0, "getsockname");
      port = ntohs(address.sin_port);
    }
    std::vector<std::int64_t> ports(static_cast<std::size_t>(collectives.transport().num_ranks()));
    collectives.all_gather({&port, 1}, ports, "port").throw_if_error();
    if (me_ == 1) {
      fd_ = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      ::close(listener);
      check(fd_ >= 0, "accept");
    } else if (me_ == 0) {
      address.sin_port = htons(static_cast<std::uint16_t>(ports[1]));
      fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      check(::connect(fd_, reinterpret_cast<sockaddr*>(&address), size) == 0, "connect");
    }
    const int on = 1;
    if (fd_ >= 0) setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  ~RawSocket() override {
    if (fd_ >= 0) ::close(fd_);
  }
  RawSocket(const RawSocket&) = delete;
  RawSocket& operator=(const RawSocket&) = delete;

  std::string name() const override { return "a plain socket"; }
  double ping_us(int pings) override {
    collectives_.barrier("raw").throw_if_error();
    const auto begin = Clock::now();
    for (int i = 0; i < pings && me_ <= 1; ++i) {
      if (me_ == 0) write(0, 8);
      read(0, 8);
      if (me_ == 1) write(0, 8);
    }
    return to_us(Clock::now() - begin) / (2 * pings);
  }
  double stream_us(std::size_t bytes, std::size_t count) override {
    collectives_.barrier("raw").throw_if_error();
    const auto begin = Clock::now();
    for (std::size_t i = 0; i < count; ++i) {
      if (me_ == 0) write(i * bytes % buffers_.source.size(), bytes);
      if (me_ == 1) read(i * bytes % buffers_.sink.size(), bytes);
    }
    if (me_ == 1) write(0, 1);
    if (me_ == 0) read(0, 1);
    return to_us(Clock::now() - begin);
  }

 private:
  void write(std::size_t at, std::size_t bytes) {
    const std::byte* data = buffers_.source.data() + at;
    while (bytes > 0) {
      const ssize_t n = ::send(fd_, data, bytes, MSG_NOSIGNAL);
      check(n > 0, "send");
      data += n;
      bytes -= static_cast<std::size_t>(n);
    }
  }
  void read(std::size_t at, std::size_t bytes) {
    std::byte* data = buffers_.sink.data() + at;
    while (bytes > 0) {
      const ssize_t n = ::recv(fd_, data, bytes, 0);
      check(n > 0, "recv");
      data += n;
      bytes -= static_cast<std::size_t>(n);
    }
  }

  comm::Collectives& collectives_;
  RawBuffers buffers_;
  std::int32_t me_;
  int fd_ = -1;
};

// The program prints, in the end, one line of numbers: iterations, microseconds a message (middle, average, overall), ...
class RawUcxPerftest final : public RawLink {
 public:
  explicit RawUcxPerftest(comm::Collectives& collectives)
      : collectives_(collectives), me_(collectives.transport().rank().value) {
    std::int64_t port = 20000 + ::getpid() % 20000;
    std::vector<std::int64_t> ports(static_cast<std::size_t>(collectives.transport().num_ranks()));
    collectives.all_gather({&port, 1}, ports, "port").throw_if_error();
    port_ = static_cast<int>(ports[1]);
  }
  std::string name() const override { return "ucx_perftest"; }
  bool one_place() const override { return true; }
  double ping_us(int pings) override { return run("tag_lat", 8, static_cast<std::size_t>(pings)); }
  double stream_us(std::size_t bytes, std::size_t count) override {
    return run("tag_bw", bytes, count) * static_cast<double>(count);
  }

 private:
  double run(const std::string& test, std::size_t bytes, std::size_t count) {
    ++port_;  // the last one may still be closing
    collectives_.barrier("raw").throw_if_error();
    double us = 0;
    if (me_ == 1) (void)output_of({"ucx_perftest", "-p", str(port_), "-f"});
    const auto until = Clock::now() + std::chrono::seconds(20);
    while (me_ == 0 && us == 0) {
      Require(Clock::now() < until, ErrorCode::kTransport, "ucx_perftest does not answer on port ", port_);
      std::this_thread::sleep_for(std::chrono::milliseconds(40));  // until it listens
      us = last_figures(output_of({"ucx_perftest", "-p", str(port_), "-f", "-t", test, "-s", str(bytes), "-n",
                                   str(count), "-w", str(count / 10 + 1), "127.0.0.1"}));
    }
    collectives_.barrier("raw").throw_if_error();
    return us;
  }

  static double last_figures(const std::string& text) {
    double us = 0;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      std::istringstream in(line);
      std::vector<double> values;
      for (double value = 0; in >> value;) values.push_back(value);
      if (in.eof() && values.size() == 8) us = values[3];
    }
    return us;
  }

  static std::string output_of(const std::vector<std::string>& words) {
    std::vector<char*> arguments;
    for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    int ends[2];
    check(::pipe2(ends, O_CLOEXEC) == 0, "pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY,
                                     0);  // tries until it listens
    pid_t pid = 0;
    const int error = ::posix_spawnp(&pid, words[0].c_str(), &actions, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    std::string out;
    char buffer[4096];
    for (ssize_t n = 0; error == 0 && (n = ::read(ends[0], buffer, sizeof buffer)) > 0;)
      out.append(buffer, static_cast<std::size_t>(n));
    ::close(ends[0]);
    Require(error == 0, ErrorCode::kNotFound, "cannot start ", words[0], ": ", std::strerror(error),
            "; install Debian's ucx-utils");
    int status = 0;
    ::waitpid(pid, &status, 0);
    return out;
  }

  comm::Collectives& collectives_;
  std::int32_t me_;
  int port_ = 0;
};

}  // namespace

std::unique_ptr<RawLink> make_raw_memcpy(comm::Collectives& collectives, RawBuffers buffers) {
  return std::make_unique<RawMemcpy>(collectives, buffers);
}
std::unique_ptr<RawLink> make_raw_socket(comm::Collectives& collectives, RawBuffers buffers) {
  return std::make_unique<RawSocket>(collectives, buffers);
}
std::unique_ptr<RawLink> make_raw_ucx_perftest(comm::Collectives& collectives) {
  return std::make_unique<RawUcxPerftest>(collectives);
}
#ifndef SLUICE_BENCH_MPI
std::unique_ptr<RawLink> make_raw_mpi(RawBuffers) {
  return nullptr;
}
#endif

}  // namespace sluice::bench
