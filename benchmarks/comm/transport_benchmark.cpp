// What a transport costs: signals, puts and collectives, measured at rank 0 as medians over repetitions after a warm-up.
// Every put's bytes are checked at its receiver once per repetition.
//
//   transport_benchmark local RANKS          ranks are threads
//   mpirun -n RANKS transport_benchmark mpi
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/transport.hpp"

namespace {

using namespace sluice;
using namespace sluice::comm;

constexpr int kRepetitions = 31;
constexpr std::uint32_t kChannel = 1;

struct Spread {
  double median = 0;
  double mad = 0;
};

Spread spread_of(std::vector<double> values) {
  const auto median = [](std::vector<double>& v) {
    std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
    return v[v.size() / 2];
  };
  Spread spread;
  spread.median = median(values);
  for (double& v : values) v = std::fabs(v - spread.median);
  spread.mad = median(values);
  return spread;
}

class Bench {
 public:
  explicit Bench(Transport& transport) : t_(transport), collectives_(transport), window_(kWindowBytes) {
    t_.open_channel(kChannel, 1, 1);
    t_.set_window(kChannel, 0, window_);
    source_.resize(kWindowBytes);
  }
  ~Bench() { t_.set_window(kChannel, 0, {}); }

  void run() {
    if (t_.rank().value == 0)
      std::printf("%s, %d ranks\n%-34s %12s %10s\n", std::string(t_.name()).c_str(), t_.num_ranks(), "case",
                  "median", "mad");
    // Half of a round trip between ranks 0 and 1, both waiting.
    report("empty put, one way, us", 1.0 / 200, [&] {
      for (int i = 0; i < 100; ++i) ping(0);
    });
    report("64 B put, one way, us", 1.0 / 200, [&] {
      for (int i = 0; i < 100; ++i) ping(64);
    });
    report("1000 puts of 64 B, us a put", 1.0 / 1000, [&] { stream(1000, 64); });
    report("8 puts of 4 MiB, us a MiB", 1.0 / 32, [&] { stream(8, 4 << 20); });
    report("barrier, us", 1.0 / 50, [&] {
      for (int i = 0; i < 50; ++i) collectives_.barrier("barrier").throw_if_error();
    });
    std::vector<std::int64_t> mine(64, t_.rank().value), all(64 * static_cast<std::size_t>(t_.num_ranks()));
    report("all_gather of 64 int64, us", 1.0 / 50, [&] {
      for (int i = 0; i < 50; ++i) collectives_.all_gather(mine, all, "gather").throw_if_error();
    });
    std::vector<float> sum(1 << 20, 1.0f);
    report("all_reduce_sum of 1 Mi f32, us", 1.0, [&] {
      std::fill(sum.begin(), sum.end(), 1.0f);
      collectives_.all_reduce_sum(std::span(sum), "sum").throw_if_error();
      Require(sum[12345] == static_cast<float>(t_.num_ranks()), ErrorCode::kInternal, "wrong sum ",
              sum[12345]);
    });
  }

 private:
  static constexpr std::size_t kWindowBytes = std::size_t{32} << 20;

  void report(const char* name, double scale, const std::function<void()>& body) {
    std::vector<double> times;
    for (int i = 0; i < kRepetitions + 3; ++i) {
      collectives_.barrier("start").throw_if_error();
      const auto start = Clock::now();
      body();
      if (i >= 3) times.push_back(to_us(Clock::now() - start) * scale);
    }
    const Spread spread = spread_of(std::move(times));
    if (t_.rank().value == 0) std::printf("%-34s %12.3f %10.3f\n", name, spread.median, spread.mad);
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

  void ping(std::size_t bytes) {
    if (t_.rank().value > 1) return;
    const std::int32_t peer = 1 - t_.rank().value;
    expect(peer, 0, bytes);
    if (t_.rank().value == 0) put(peer, 0, bytes);
    wait(1);
    if (t_.rank().value == 1) put(peer, 0, bytes);
  }

  // Rank 0 puts to rank 1, which answers when all is there.
  void stream(std::size_t count, std::size_t bytes) {
    if (t_.rank().value == 0) {
      expect(1, 0, 0);
      expect(1, 0, 0);
      wait(1);  // ready
      source_[(count - 1) * bytes] = static_cast<std::byte>(++stamp_);
      for (std::size_t i = 0; i < count; ++i) put(1, i * bytes, bytes);
      wait(1);
      t_.wait_for_puts(kChannel, num_puts_).throw_if_error();
    } else if (t_.rank().value == 1) {
      for (std::size_t i = 0; i < count; ++i) expect(0, i * bytes, bytes);
      put(0, 0, 0);  // ready
      wait(count);
      Require(window_[(count - 1) * bytes] == static_cast<std::byte>(++stamp_), ErrorCode::kInternal,
              "wrong bytes");
      put(0, 0, 0);
    }
  }

  Transport& t_;
  Collectives collectives_;
  std::vector<std::byte> window_, source_;
  std::uint64_t num_signals_ = 0;
  std::uint64_t num_puts_ = 0;
  unsigned stamp_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const int num_ranks = argc > 2 ? std::atoi(argv[2]) : 0;
  try {
    if (name == "local" && num_ranks >= 2) {
      auto transports = make_local_group(Topology::uniform(num_ranks, 1));
      std::vector<std::thread> threads;
      for (auto& t : transports) threads.emplace_back([&t] { Bench(*t).run(); });
      for (auto& thread : threads) thread.join();
    } else if (name == "mpi" && argc == 2) {
      const auto transport = load_transport("mpi", nullptr);
      Require(transport->num_ranks() >= 2, ErrorCode::kInvalidConfig,
              "run at least two ranks: mpirun -n 2 ...");
      Bench(*transport).run();
    } else {
      std::fprintf(stderr,
                   "usage: transport_benchmark local RANKS   (2 or more)\n"
                   "       mpirun -n RANKS transport_benchmark mpi\n");
      return 2;
    }
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
