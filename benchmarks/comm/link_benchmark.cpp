// What a link does through a transport, beside the raw way of the same run: latency of 8 B and bandwidth from 4 KiB to
// 64 MiB between ranks 0 and 1, medians over interleaved repetitions.
//
//   link_benchmark local                                   ranks are threads
//   sluice launch -n 2 -- link_benchmark shm|tcp [--json]
//   mpirun -n 2 link_benchmark mpi [--json]
//
// Raw: for local and shm one thread's memcpy between buffers as large as the transport's; for all others a plain blocking
// socket over loopback (TCP_NODELAY, one write and one read loop), made by the ranks themselves.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/transport.hpp"

namespace {

using namespace sluice;
using namespace sluice::comm;

constexpr std::uint32_t kChannel = 1;
constexpr std::size_t kWindowBytes = std::size_t{64} << 20;
constexpr std::size_t kBytesARepetition = std::size_t{64} << 20;  // at most; small messages fewer
constexpr std::size_t kMaxMessages = 2048;
constexpr int kRepetitions = 15;
constexpr int kPings = 500;

struct Spread {
  double median = 0, mad = 0;
};
Spread spread_of(std::vector<double> values) {
  const auto median = [](std::vector<double>& v) {
    std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
    return v[v.size() / 2];
  };
  Spread out;
  out.median = median(values);
  for (double& v : values) v = std::fabs(v - out.median);
  out.mad = median(values);
  return out;
}

void check(bool ok, const char* what) {
  Require(ok, ErrorCode::kTransport, what, " failed: ", std::strerror(errno));
}

// A plain connection between ranks 0 and 1.
class Socket {
 public:
  Socket(Collectives& collectives, std::int32_t me) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    int listener = -1;
    std::int64_t port = 0;
    if (me == 1) {
      listener = ::socket(AF_INET, SOCK_STREAM, 0);
      check(::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 && ::listen(listener, 1) == 0,
            "listen");
      check(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0, "getsockname");
      port = ntohs(address.sin_port);
    }
    std::vector<std::int64_t> ports(static_cast<std::size_t>(collectives.transport().num_ranks()));
    collectives.all_gather({&port, 1}, ports, "port").throw_if_error();
    if (me == 1) {
      fd_ = ::accept(listener, nullptr, nullptr);
      ::close(listener);
      check(fd_ >= 0, "accept");
    } else if (me == 0) {
      address.sin_port = htons(static_cast<std::uint16_t>(ports[1]));
      fd_ = ::socket(AF_INET, SOCK_STREAM, 0);
      check(::connect(fd_, reinterpret_cast<sockaddr*>(&address), size) == 0, "connect");
    }
    const int on = 1;
    if (fd_ >= 0) setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  void write(const std::byte* data, std::size_t bytes) {
    while (bytes > 0) {
      const ssize_t n = ::send(fd_, data, bytes, MSG_NOSIGNAL);
      check(n > 0, "send");
      data += n;
      bytes -= static_cast<std::size_t>(n);
    }
  }
  void read(std::byte* data, std::size_t bytes) {
    while (bytes > 0) {
      const ssize_t n = ::recv(fd_, data, bytes, 0);
      check(n > 0, "recv");
      data += n;
      bytes -= static_cast<std::size_t>(n);
    }
  }

 private:
  int fd_ = -1;
};

class Bench {
 public:
  explicit Bench(Transport& transport)
      : t_(transport),
        collectives_(transport),
        me_(t_.rank().value),
        window_(kWindowBytes),
        source_(kWindowBytes) {
    t_.set_timeout(std::chrono::seconds(60));
    t_.open_channel(kChannel, 1, 1);
    t_.set_window(kChannel, 0, window_);
    std::memset(source_.data(), 1, source_.size());
    raw_is_memcpy_ = t_.name() == "local" || t_.name() == "shm";
    if (!raw_is_memcpy_) socket_ = std::make_unique<Socket>(collectives_, me_);
  }
  ~Bench() { t_.set_window(kChannel, 0, {}); }

  void run(bool json) {
    std::string rows;
    if (me_ == 0 && !json)
      std::printf("%s beside %s\n%12s %14s %10s %14s %10s %8s\n", std::string(t_.name()).c_str(), raw_name(),
                  "bytes", "transport", "mad", "raw", "mad", "ratio");
    // Latency, microseconds one way. Memory has none to compare with.
    {
      std::vector<double> ours, raw;
      for (int i = 0; i < kRepetitions + 2; ++i) {
        const double a = timed([&] { ping(); }) / (2 * kPings);
        const double b = raw_is_memcpy_ ? 0 : timed([&] { raw_ping(); }) / (2 * kPings);
        if (i < 2) continue;
        ours.push_back(a);
        raw.push_back(b);
      }
      report(rows, json, "latency_us", 8, spread_of(ours), spread_of(raw));
    }
    for (std::size_t bytes = 4096; bytes <= kWindowBytes; bytes *= 4) {
      const std::size_t count = std::clamp<std::size_t>(kBytesARepetition / bytes, 1, kMaxMessages);
      const double total = static_cast<double>(bytes * count);
      std::vector<double> ours, raw;
      for (int i = 0; i < kRepetitions + 2; ++i) {
        const double a = total / timed([&] { stream(bytes, count); });
        const double b = total / timed([&] { raw_stream(bytes, count); });
        if (i < 2) continue;
        ours.push_back(a / 1e3);  // GB/s
        raw.push_back(b / 1e3);
      }
      report(rows, json, "gb_per_s", bytes, spread_of(ours), spread_of(raw));
    }
    if (me_ == 0 && json)
      std::printf("{\"transport\": \"%s\", \"raw\": \"%s\", \"rows\": [%s]}\n",
                  std::string(t_.name()).c_str(), raw_name(), rows.c_str());
  }

 private:
  const char* raw_name() const { return raw_is_memcpy_ ? "memcpy of one thread" : "a plain socket"; }

  // Microseconds at rank 0.
  template <typename Body>
  double timed(Body body) {
    collectives_.barrier("start").throw_if_error();
    const auto begin = Clock::now();
    body();
    return to_us(Clock::now() - begin);
  }

  void report(std::string& rows, bool json, const char* what, std::size_t bytes, Spread ours, Spread raw) {
    if (me_ != 0) return;
    const bool is_latency = std::strcmp(what, "latency_us") == 0;
    const double ratio = raw.median == 0 ? 0
                         : is_latency    ? raw.median / ours.median
                                         : ours.median / raw.median;
    if (json)
      rows += str(rows.empty() ? "" : ", ", "{\"what\": \"", what, "\", \"bytes\": ", bytes,
                  ", \"median\": ", ours.median, ", \"mad\": ", ours.mad, ", \"raw\": ", raw.median,
                  ", \"raw_mad\": ", raw.mad, ", \"ratio\": ", ratio, "}");
    else
      std::printf("%12zu %10.3f %s %10.3f %9.3f %s %10.3f %7.2fx\n", bytes, ours.median,
                  is_latency ? "us  " : "GB/s", ours.mad, raw.median, is_latency ? "us  " : "GB/s", raw.mad,
                  ratio);
    std::fflush(stdout);
  }

  void expect(std::int32_t from, std::size_t offset, std::size_t bytes) {
    const Expect e{.peer = RankId(from),
                   .channel = kChannel,
                   .window = 0,
                   .offset_bytes = static_cast<std::int64_t>(offset),
                   .bytes = static_cast<std::int64_t>(bytes),
                   .signal = 0};
    t_.expect({&e, 1});
  }
  void put(std::int32_t to, std::size_t offset, std::size_t bytes) {
    t_.put({.peer = RankId(to),
            .channel = kChannel,
            .window = 0,
            .offset_bytes = static_cast<std::int64_t>(offset),
            .source = std::span(source_).subspan(offset, bytes),
            .signal = 0});
    ++num_puts_;
  }
  void wait(std::uint64_t more) {
    num_signals_ += more;
    t_.wait({.channel = kChannel, .signal = 0, .value = num_signals_, .phase = "bench"}).throw_if_error();
  }

  void ping() {
    if (me_ > 1) return;
    for (int i = 0; i < kPings; ++i) {
      expect(1 - me_, 0, 8);
      if (me_ == 0) put(1, 0, 8);
      wait(1);
      if (me_ == 1) put(0, 0, 8);
    }
  }
  void raw_ping() {
    if (me_ > 1) return;
    for (int i = 0; i < kPings; ++i) {
      if (me_ == 0) socket_->write(source_.data(), 8);
      socket_->read(window_.data(), 8);
      if (me_ == 1) socket_->write(source_.data(), 8);
    }
  }

  // Rank 0 sends, rank 1 says when all is there.
  void stream(std::size_t bytes, std::size_t count) {
    if (me_ > 1) return;
    if (me_ == 1) {
      for (std::size_t i = 0; i < count; ++i) expect(0, i * bytes % kWindowBytes, bytes);
      put(0, 0, 0);
      wait(count);
      Require(window_[(count - 1) * bytes % kWindowBytes] == std::byte{1}, ErrorCode::kInternal,
              "wrong bytes");
      put(0, 0, 0);
    } else {
      expect(1, 0, 0);
      expect(1, 0, 0);
      wait(1);
      for (std::size_t i = 0; i < count; ++i) put(1, i * bytes % kWindowBytes, bytes);
      wait(1);
      t_.wait_for_puts(kChannel, num_puts_).throw_if_error();
    }
  }
  void raw_stream(std::size_t bytes, std::size_t count) {
    if (me_ > 1) return;
    if (raw_is_memcpy_) {
      // Rank 1 is at rest, as the one thread of the baseline wants it.
      if (me_ == 0)
        for (std::size_t i = 0; i < count; ++i)
          std::memcpy(window_.data() + i * bytes % kWindowBytes, source_.data() + i * bytes % kWindowBytes,
                      bytes);
      return;
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (me_ == 0) socket_->write(source_.data() + i * bytes % kWindowBytes, bytes);
      if (me_ == 1) socket_->read(window_.data() + i * bytes % kWindowBytes, bytes);
    }
    if (me_ == 1) socket_->write(source_.data(), 1);
    if (me_ == 0) socket_->read(window_.data(), 1);
  }

  Transport& t_;
  Collectives collectives_;
  std::int32_t me_;
  std::vector<std::byte> window_, source_;
  std::unique_ptr<Socket> socket_;
  bool raw_is_memcpy_ = false;
  std::uint64_t num_signals_ = 0, num_puts_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const bool json = argc > 2 && std::string(argv[2]) == "--json";
  if (name.empty() || argc > 3 || (argc == 3 && !json)) {
    std::fprintf(stderr,
                 "usage: link_benchmark local [--json]\n"
                 "       sluice launch -n 2 -- link_benchmark shm|tcp [--json]\n"
                 "       mpirun -n 2 link_benchmark mpi [--json]\n");
    return 2;
  }
  try {
    if (name == "local") {
      auto transports = make_local_group(Topology::uniform(2, 1));
      std::vector<std::thread> threads;
      for (auto& t : transports) threads.emplace_back([&t, json] { Bench(*t).run(json); });
      for (auto& thread : threads) thread.join();
    } else {
      const auto transport = load_transport(name, nullptr);
      Require(transport->num_ranks() >= 2, ErrorCode::kInvalidConfig, "run two ranks");
      Bench(*transport).run(json);
    }
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
