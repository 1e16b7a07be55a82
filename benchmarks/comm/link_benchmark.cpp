// What a transport does, beside the raw way over the same wire in the same run: latency of 8 B and bandwidth from 4 KiB to
// 64 MiB between ranks 0 and 1; then what signals, small puts and collectives cost over all ranks.
//
//   link_benchmark local [RANKS]                                          ranks are threads
//   sluice launch -n 2 -- link_benchmark shm|tcp|ucx|shm+tcp|shm+ucx
//   mpirun -n 2 link_benchmark mpi
//     --json             one document
//     --repetitions N    15; after one that is not counted
//
// Raw: for local and what goes through shared memory one thread's memcpy between buffers of the same sizes; a plain
// blocking socket for tcp; ucx_perftest for ucx; MPI's own calls for mpi. A repetition measures every size, the transport
// and the raw way in turn; figures are medians over repetitions, a ratio is the median of the repetitions' ratios. Messages
// follow each other through buffers of 64 MiB, but beside ucx_perftest, which sends one buffer again and again. Sources lie
// in the transport's put memory where it has such. What arrives is checked at its last byte once a repetition.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "raw_link.hpp"
#include "sluice/base/grow_array.hpp"
#include "sluice/comm/collectives.hpp"
#include "sluice/comm/transport.hpp"

namespace sluice::bench {
namespace {

using namespace sluice::comm;

constexpr std::uint32_t kChannel = 1;
constexpr std::size_t kBufferBytes = std::size_t{64} << 20;
constexpr std::size_t kBytesARepetition = std::size_t{64} << 20;  // of a size; small messages fewer
constexpr std::size_t kMaxMessages = 2048;
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
  if (values.empty()) return out;
  out.median = median(values);
  for (double& v : values) v = std::fabs(v - out.median);
  out.mad = median(values);
  return out;
}

// Source and window of a rank, over one life of its transport.
class Endpoint {
 public:
  explicit Endpoint(std::unique_ptr<Transport> transport)
      : transport_(std::move(transport)), t_(*transport_), collectives_(t_), me_(t_.rank().value) {
    window_.assign(kBufferBytes, std::byte{0});
    ordinary_.assign(kBufferBytes, std::byte{1});
    Require(t_.num_ranks() >= 2, ErrorCode::kInvalidConfig, "run at least two ranks");
    t_.set_timeout(std::chrono::seconds(60));
    t_.open_channel(kChannel, 1, 1);
    t_.set_window(kChannel, 0, window_);
    put_memory_ = t_.put_memory();
    void* memory = put_memory_ ? put_memory_->allocate(kBufferBytes) : nullptr;
    in_put_memory_ = memory != nullptr;
    source_ = in_put_memory_ ? std::span(static_cast<std::byte*>(memory), kBufferBytes)
                             : std::span<std::byte>(ordinary_);
    std::memset(source_.data(), 1, source_.size());
  }
  ~Endpoint() {
    t_.set_window(kChannel, 0, {});
    if (in_put_memory_) put_memory_->deallocate(source_.data(), source_.size());
  }
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  Transport& transport() { return t_; }
  Collectives& collectives() { return collectives_; }
  bool in_put_memory() const { return in_put_memory_; }
  RawBuffers buffers() { return {.source = ordinary_, .sink = window_}; }

  // Microseconds at this rank.
  double timed(const std::function<void()>& body) {
    collectives_.barrier("start").throw_if_error();
    const auto begin = Clock::now();
    body();
    return to_us(Clock::now() - begin);
  }

  // There and back.
  void ping(int pings, std::size_t bytes) {
    for (int i = 0; i < pings && me_ <= 1; ++i) {
      expect(1 - me_, 0, bytes);
      if (me_ == 0) put(1, 0, bytes);
      wait(1);
      if (me_ == 1) put(0, 0, bytes);
    }
  }

  // Rank 0 puts to rank 1, which says when all is there.
  void stream(std::size_t bytes, std::size_t count, bool one_place) {
    const auto at = [&](std::size_t i) { return one_place ? 0 : i * bytes % kBufferBytes; };
    const std::size_t last = at(count - 1) + bytes - 1;
    if (me_ == 1) {
      window_[last] = std::byte{0};
      for (std::size_t i = 0; i < count; ++i) expect(0, at(i), bytes);
      put(0, 0, 0);
      wait(count);
      Require(window_[last] == std::byte{1}, ErrorCode::kInternal, "wrong bytes of ", bytes);
      put(0, 0, 0);
    } else if (me_ == 0) {
      expect(1, 0, 0);
      expect(1, 0, 0);
      wait(1);
      for (std::size_t i = 0; i < count; ++i) put(1, at(i), bytes);
      wait(1);
      t_.wait_for_puts(kChannel, num_puts_).throw_if_error();
    }
  }

 private:
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
            .source = source_.subspan(offset, bytes),
            .signal = 0});
    ++num_puts_;
  }
  void wait(std::uint64_t more) {
    num_signals_ += more;
    t_.wait({.channel = kChannel, .signal = 0, .value = num_signals_, .phase = "bench"}).throw_if_error();
  }

  std::unique_ptr<Transport> transport_;
  Transport& t_;
  Collectives collectives_;
  std::int32_t me_;
  GrowArray<std::byte> window_, ordinary_;
  std::shared_ptr<PutMemory> put_memory_;
  bool in_put_memory_ = false;
  std::span<std::byte> source_;
  std::uint64_t num_signals_ = 0, num_puts_ = 0;
};

std::unique_ptr<RawLink> make_raw(const std::string& name, Endpoint& endpoint) {
  if (name == "tcp") return make_raw_socket(endpoint.collectives(), endpoint.buffers());
  if (name == "ucx") return make_raw_ucx_perftest(endpoint.collectives());
  if (name == "mpi") {
    auto raw = make_raw_mpi(endpoint.buffers());
    Require(raw != nullptr, ErrorCode::kNotSupported, "this benchmark was built without MPI");
    return raw;
  }
  return make_raw_memcpy(endpoint.collectives(), endpoint.buffers());
}

struct Options {
  std::string name;
  bool json = false;
  int repetitions = 15;
  int threads = 2;  // of local
};

// One size: the transport's and the raw way's figures of each repetition; latencies in microseconds, the rest in GB/s.
struct Line {
  std::size_t bytes = 0;
  bool is_latency = false;
  std::vector<double> ours, raw, ratios;
};
// Costs without a raw way, microseconds.
struct Cost {
  std::string what;
  double scale = 1;
  std::function<void(Endpoint&)> body;
  std::vector<double> us;
};

std::vector<Cost> make_costs() {
  std::vector<Cost> out;
  out.push_back({"an empty put, one way", 1.0 / 200, [](Endpoint& e) { e.ping(100, 0); }, {}});
  out.push_back(
      {"a put of 64 B, one of 1000", 1.0 / 1000, [](Endpoint& e) { e.stream(64, 1000, false); }, {}});
  out.push_back({"barrier",
                 1.0 / 50,
                 [](Endpoint& e) {
                   for (int i = 0; i < 50; ++i) e.collectives().barrier("barrier").throw_if_error();
                 },
                 {}});
  out.push_back({"all_gather of 64 int64",
                 1.0 / 50,
                 [](Endpoint& e) {
                   const auto n = static_cast<std::size_t>(e.transport().num_ranks());
                   const std::vector<std::int64_t> mine(64, e.transport().rank().value);
                   std::vector<std::int64_t> all(64 * n, -1);
                   for (int i = 0; i < 50; ++i)
                     e.collectives().all_gather(mine, all, "gather").throw_if_error();
                   Require(all[64 * n - 1] == static_cast<std::int64_t>(n) - 1, ErrorCode::kInternal,
                           "gathered ", all[64 * n - 1]);
                 },
                 {}});
  out.push_back({"all_reduce_sum of 1 Mi f32",
                 1,
                 [](Endpoint& e) {
                   std::vector<float> sum(1 << 20, 1.0f);
                   e.collectives().all_reduce_sum(std::span(sum), "sum").throw_if_error();
                   Require(sum[12345] == static_cast<float>(e.transport().num_ranks()), ErrorCode::kInternal,
                           "wrong sum ", sum[12345]);
                 },
                 {}});
  return out;
}

void print(const Options& o, const std::string& raw_name, bool one_place, bool in_put_memory, int num_ranks,
           const std::vector<Line>& lines, const std::vector<Cost>& costs) {
  std::string rows, others;
  if (!o.json)
    std::printf("%s beside %s, %d ranks%s%s\n%12s %14s %9s %14s %9s %8s\n", o.name.c_str(), raw_name.c_str(),
                num_ranks, one_place ? ", one buffer again and again" : "",
                in_put_memory ? ", sources in put memory" : "", "bytes", "transport", "mad", "raw", "mad",
                "ratio");
  for (const Line& line : lines) {
    const Spread ours = spread_of(line.ours), raw = spread_of(line.raw), ratio = spread_of(line.ratios);
    const char* unit = line.is_latency ? "us" : "GB/s";
    if (o.json)
      rows += str(rows.empty() ? "" : ", ", "{\"what\": \"", line.is_latency ? "latency_us" : "gb_per_s",
                  "\", \"bytes\": ", line.bytes, ", \"median\": ", ours.median, ", \"mad\": ", ours.mad,
                  ", \"raw\": ", raw.median, ", \"raw_mad\": ", raw.mad, ", \"ratio\": ", ratio.median,
                  ", \"ratio_mad\": ", ratio.mad, "}");
    else if (line.raw.empty())
      std::printf("%12zu %9.3f %-4s %9.3f %14s %9s %8s\n", line.bytes, ours.median, unit, ours.mad, "-", "-",
                  "-");
    else
      std::printf("%12zu %9.3f %-4s %9.3f %9.3f %-4s %9.3f %7.2fx\n", line.bytes, ours.median, unit, ours.mad,
                  raw.median, unit, raw.mad, ratio.median);
  }
  for (const Cost& cost : costs) {
    const Spread us = spread_of(cost.us);
    if (o.json)
      others += str(others.empty() ? "" : ", ", "{\"what\": \"", cost.what, "\", \"us\": ", us.median,
                    ", \"mad\": ", us.mad, "}");
    else
      std::printf("%-32s %9.3f us   %9.3f\n", cost.what.c_str(), us.median, us.mad);
  }
  if (o.json)
    std::printf(
        "{\"transport\": \"%s\", \"raw\": \"%s\", \"ranks\": %d, \"one_place\": %s, \"put_memory\": %s, "
        "\"repetitions\": %d, \"rows\": [%s], \"costs\": [%s]}\n",
        o.name.c_str(), raw_name.c_str(), num_ranks, one_place ? "true" : "false",
        in_put_memory ? "true" : "false", o.repetitions, rows.c_str(), others.c_str());
  std::fflush(stdout);
}

// make: the transport of this rank, as often as wanted.
void run_rank(const Options& o, const std::function<std::unique_ptr<Transport>()>& make) {
  auto endpoint = std::make_unique<Endpoint>(make());
  std::unique_ptr<RawLink> raw = make_raw(o.name, *endpoint);
  // Of a raw link that may not run beside a transport: buffers of its own, as large.
  GrowArray<std::byte> source, sink;
  if (raw->needs_all()) {
    source.assign(kBufferBytes, std::byte{1});
    sink.assign(kBufferBytes, std::byte{0});
    raw = make_raw_mpi({source, sink});
  }
  const std::string raw_name = raw->name();
  const bool one_place = raw->one_place(), in_put_memory = endpoint->in_put_memory();
  const int num_ranks = endpoint->transport().num_ranks();
  const bool measures = endpoint->transport().rank().value == 0;

  std::vector<Line> lines = {{8, true, {}, {}, {}}};
  for (std::size_t bytes = 4096; bytes <= kBufferBytes; bytes *= 4)
    lines.push_back({bytes, false, {}, {}, {}});
  std::vector<Cost> costs = make_costs();
  const auto count_of = [](const Line& line) {
    return std::clamp<std::size_t>(kBytesARepetition / line.bytes, 1, kMaxMessages);
  };
  const auto figure = [&](const Line& line, double us) {
    return line.is_latency ? us : static_cast<double>(line.bytes * count_of(line)) / us / 1e3;
  };
  for (int repetition = -1; repetition < o.repetitions; ++repetition) {
    const bool counts = repetition >= 0;
    const auto measure_raw = [&](Line& line) {
      const double us = line.is_latency ? raw->ping_us(kPings) : raw->stream_us(line.bytes, count_of(line));
      if (counts && us > 0) line.raw.push_back(figure(line, us));
    };
    for (Line& line : lines) {
      const double us =
          line.is_latency ? endpoint->timed([&] { endpoint->ping(kPings, line.bytes); }) / (2 * kPings)
                          : endpoint->timed([&] { endpoint->stream(line.bytes, count_of(line), one_place); });
      if (counts) line.ours.push_back(figure(line, us));
      if (!raw->needs_all()) measure_raw(line);
    }
    for (Cost& cost : costs) {
      const double us = endpoint->timed([&] { cost.body(*endpoint); }) * cost.scale;
      if (counts) cost.us.push_back(us);
    }
    if (raw->needs_all()) {
      endpoint.reset();
      for (Line& line : lines) measure_raw(line);
      if (repetition + 1 < o.repetitions) endpoint = std::make_unique<Endpoint>(make());
    }
  }
  for (Line& line : lines)
    for (std::size_t i = 0; i < line.raw.size(); ++i)
      line.ratios.push_back(line.is_latency ? line.raw[i] / line.ours[i] : line.ours[i] / line.raw[i]);
  if (measures) print(o, raw_name, one_place, in_put_memory, num_ranks, lines, costs);
}

int run(int argc, char** argv) {
  Options o;
  bool ok = argc > 1;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--json")
      o.json = true;
    else if (word == "--repetitions" && i + 1 < argc)
      o.repetitions = std::atoi(argv[++i]);
    else if (o.name.empty() && word[0] != '-')
      o.name = word;
    else if (o.name == "local" && std::atoi(argv[i]) > 0)
      o.threads = std::atoi(argv[i]);
    else
      ok = false;
  }
  if (!ok || o.name.empty() || o.repetitions < 1 || o.threads < 2) {
    std::fprintf(stderr,
                 "usage: link_benchmark local [RANKS] [--json] [--repetitions N]\n"
                 "       sluice launch -n 2 -- link_benchmark shm|tcp|ucx|shm+tcp|shm+ucx ...\n"
                 "       mpirun -n 2 link_benchmark mpi ...\n");
    return 2;
  }
  try {
    if (o.name != "local") {
      run_rank(o, [&] { return load_transport(o.name, nullptr); });
      return 0;
    }
    auto transports = make_local_group(Topology::uniform(o.threads, 1));
    std::vector<std::thread> threads;
    for (auto& t : transports) threads.emplace_back([&o, &t] { run_rank(o, [&t] { return std::move(t); }); });
    for (auto& thread : threads) thread.join();
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace sluice::bench

int main(int argc, char** argv) {
  return sluice::bench::run(argc, argv);
}
