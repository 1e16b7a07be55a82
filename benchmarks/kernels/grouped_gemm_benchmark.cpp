// Grouped GEMM over 64 experts against one dense GEMM of the same FLOPs by OpenBLAS and oneDNN on the same cores.
//
// For each shape, dtype, thread count and direction the arms (grouped zipf, grouped uniform, each library) run in
// turn, `--pairs` times after one warm-up, each time beginning with another arm. Medians and median absolute
// deviations of wall time are reported, and medians of processor time, which other work on the machine disturbs less.
// The grouped arms read 64 different weights and, forward, gather their rows through an index; the dense arm has one
// weight and contiguous rows. Sampled elements of the grouped forward and dgrad results are compared bitwise with a
// scalar FMA chain in the same run.
// It also reports whether a library's row result depends on the number of rows (1..257) and whether it is the scalar
// FMA chain, which is what rules it out as the backend (docs/design.md, GEMM contract).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sluice/base/clock.hpp"
#include "sluice/kernels/cpu/cpu_kernels.hpp"
#include "sluice/kernels/kernels.hpp"

#ifdef SLUICE_BENCH_OPENBLAS
#include <cblas-openblas.h>
#endif
#ifdef SLUICE_BENCH_ONEDNN
#include <omp.h>

#include <dnnl.hpp>
#endif

namespace sluice {
namespace {

using Json = nlohmann::ordered_json;
using kernels::Activation;

enum class Direction { kForward, kDgrad, kWgrad };
constexpr const char* name_of(Direction d) {
  return d == Direction::kForward ? "forward" : d == Direction::kDgrad ? "dgrad" : "wgrad";
}

struct Shape {
  const char* name;
  std::int64_t hidden, ffn, rows;
  int pairs;  // unless --pairs is given
};
constexpr Shape kShapes[] = {
    {"tiny", 64, 128, 2048, 300}, {"small", 256, 512, 8192, 40}, {"large", 1024, 2048, 8192, 20}};
constexpr std::int64_t kExperts = 64;

// Matrix of either dtype with values in [-1, 1).
class Matrix {
 public:
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols, std::uint64_t seed)
      : dtype_(dtype),
        rows_(rows),
        cols_(cols),
        bytes_(static_cast<std::size_t>(rows * cols) * size_of(dtype)) {
    std::uint64_t state = seed * 0x9e3779b97f4a7c15ull + 1;
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      const float x = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f;
      if (dtype == DType::kF32)
        reinterpret_cast<float*>(bytes_.data())[i] = x;
      else
        reinterpret_cast<bf16*>(bytes_.data())[i] = bf16(x);
    }
  }
  float get(std::int64_t r, std::int64_t c) const {
    const std::int64_t i = r * cols_ + c;
    return dtype_ == DType::kF32 ? reinterpret_cast<const float*>(bytes_.data())[i]
                                 : static_cast<float>(reinterpret_cast<const bf16*>(bytes_.data())[i]);
  }
  std::byte* data() { return bytes_.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes_.data()); }
  MatrixView view() { return {bytes_.data(), dtype_, rows_, cols_, cols_}; }
  DType dtype() const { return dtype_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }

 private:
  DType dtype_;
  std::int64_t rows_, cols_;
  std::vector<std::byte> bytes_;
};

// Group sizes proportional to 1 / rank, largest remainder, in a shuffled order.
std::vector<std::int64_t> zipf_ptr(std::int64_t rows) {
  double sum = 0;
  for (std::int64_t g = 1; g <= kExperts; ++g) sum += 1.0 / static_cast<double>(g);
  std::vector<std::int64_t> sizes;
  std::vector<std::pair<double, std::size_t>> rest;
  for (std::int64_t g = 1; g <= kExperts; ++g) {
    const double exact = static_cast<double>(rows) / (static_cast<double>(g) * sum);
    sizes.push_back(static_cast<std::int64_t>(exact));
    rest.push_back({std::floor(exact) - exact, sizes.size() - 1});
  }
  std::sort(rest.begin(), rest.end());
  const std::int64_t missing = rows - std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  for (std::int64_t i = 0; i < missing; ++i) ++sizes[rest[static_cast<std::size_t>(i)].second];
  std::shuffle(sizes.begin(), sizes.end(), std::mt19937_64(7));
  std::vector<std::int64_t> ptr{0};
  for (const std::int64_t n : sizes) ptr.push_back(ptr.back() + n);
  return ptr;
}
std::vector<std::int64_t> uniform_ptr(std::int64_t rows) {
  std::vector<std::int64_t> ptr;
  for (std::int64_t g = 0; g <= kExperts; ++g) ptr.push_back(rows * g / kExperts);
  return ptr;
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  const std::size_t n = x.size();
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}
double deviation(const std::vector<double>& x) {
  const double m = median(x);
  std::vector<double> d;
  for (const double v : x) d.push_back(std::abs(v - m));
  return median(d);
}

// Processor time of all threads of this process.
double cpu_us() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) * 1e-3;
}

struct Arm {
  std::string name;
  std::function<void()> call;
  std::vector<double> wall_us, cpu_us;
};

void measure(std::vector<Arm>& arms, int pairs) {
  for (int pair = -1; pair < pairs; ++pair) {
    for (std::size_t i = 0; i < arms.size(); ++i) {
      Arm& arm = arms[(i + static_cast<std::size_t>(pair + 1)) % arms.size()];
      const double cpu_begin = cpu_us();
      const auto begin = Clock::now();
      arm.call();
      const double wall = to_us(Clock::now() - begin);
      if (pair < 0) continue;
      arm.wall_us.push_back(wall);
      arm.cpu_us.push_back(cpu_us() - cpu_begin);
    }
  }
}

// The dense GEMM of a library: C[m, n] = (beta) C + op(A) op(B), fp32 accumulation.
struct Library {
  std::string name;
  // Null when the library cannot do it. Captures views; the matrices must outlive the call.
  std::function<std::function<void()>(Direction, Matrix& a, Matrix& b, Matrix& c, int threads)> dense;
};

std::vector<Library> libraries() {
  std::vector<Library> all;
#ifdef SLUICE_BENCH_OPENBLAS
  all.push_back({"openblas_dense", [](Direction d, Matrix& a, Matrix& b, Matrix& c, int threads) {
                   std::function<void()> call;
                   if (a.dtype() != DType::kF32) return call;
                   const bool ta = d == Direction::kWgrad, tb = d == Direction::kForward;
                   const auto m = static_cast<int>(c.rows()), n = static_cast<int>(c.cols());
                   const auto k = static_cast<int>(ta ? a.rows() : a.cols());
                   call = [=, &a, &b, &c] {
                     openblas_set_num_threads(threads);
                     cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans,
                                 tb ? CblasTrans : CblasNoTrans, m, n, k, 1.0f, a.floats(),
                                 static_cast<int>(a.cols()), b.floats(), static_cast<int>(b.cols()),
                                 d == Direction::kWgrad ? 1.0f : 0.0f, c.floats(), n);
                   };
                   return call;
                 }});
#endif
#ifdef SLUICE_BENCH_ONEDNN
  all.push_back(
      {"onednn_dense", [](Direction d, Matrix& a, Matrix& b, Matrix& c, int threads) {
         const bool ta = d == Direction::kWgrad, tb = d == Direction::kForward;
         std::function<void()> call;
         if (a.dtype() == DType::kF32) {
           const std::int64_t k = ta ? a.rows() : a.cols();
           call = [=, &a, &b, &c] {
             omp_set_num_threads(threads);
             dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', c.rows(), c.cols(), k, 1.0f, a.floats(), a.cols(),
                        b.floats(), b.cols(), d == Direction::kWgrad ? 1.0f : 0.0f, c.floats(), c.cols());
           };
           return call;
         }
         // bf16 through a matmul primitive; it picks fp32 AVX-512 code where there is no bf16 instruction.
         using dnnl::memory;
         const auto type = [](const Matrix& x) {
           return x.dtype() == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
         };
         const auto desc = [&](const Matrix& x, bool transposed) {
           const memory::dims dims =
               transposed ? memory::dims{x.cols(), x.rows()} : memory::dims{x.rows(), x.cols()};
           const memory::dims strides = transposed ? memory::dims{1, x.cols()} : memory::dims{x.cols(), 1};
           return memory::desc(dims, type(x), strides);
         };
         omp_set_num_threads(threads);
         auto engine = std::make_shared<dnnl::engine>(dnnl::engine::kind::cpu, 0);
         auto stream = std::make_shared<dnnl::stream>(*engine);
         const auto da = desc(a, ta), db = desc(b, tb), dc = desc(c, false);
         dnnl::primitive_attr attr;
         if (d == Direction::kWgrad) {
           dnnl::post_ops sum;
           sum.append_sum(1.0f);
           attr.set_post_ops(sum);
         }
         auto matmul = std::make_shared<dnnl::matmul>(
             dnnl::matmul::primitive_desc(dnnl::matmul::desc(da, db, dc), attr, *engine));
         memory ma(da, *engine, a.data()), mb(db, *engine, b.data()), mc(dc, *engine, c.data());
         call = [=] {
           omp_set_num_threads(threads);
           matmul->execute(*stream, {{DNNL_ARG_SRC, ma}, {DNNL_ARG_WEIGHTS, mb}, {DNNL_ARG_DST, mc}});
           stream->wait();
         };
         return call;
       }});
#endif
  return all;
}

// Whether rows 0..m-1 of a product of m rows are bitwise those of the product of 257 rows, for m in 1..257, and
// whether they are the scalar FMA chain.
Json contract_of(const Library& library) {
  constexpr std::int64_t kRows = 257, kIn = 1024, kOut = 512;
  Matrix a(DType::kF32, kRows, kIn, 1), b(DType::kF32, kOut, kIn, 2), all(DType::kF32, kRows, kOut, 3);
  library.dense(Direction::kForward, a, b, all, 1)();
  std::int64_t differing = 0, first = 0;
  for (std::int64_t m = 1; m <= kRows; ++m) {
    Matrix part(DType::kF32, m, kIn, 1), c(DType::kF32, m, kOut, 3);
    std::memcpy(part.data(), a.data(), static_cast<std::size_t>(m * kIn) * 4);
    library.dense(Direction::kForward, part, b, c, 1)();
    if (std::memcmp(c.data(), all.data(), static_cast<std::size_t>(m * kOut) * 4) != 0) {
      ++differing;
      if (first == 0) first = m;
    }
  }
  std::int64_t not_chain = 0;
  for (std::int64_t p = 0; p < kRows; p += 16) {
    for (std::int64_t o = 0; o < kOut; ++o) {
      float c = 0.0f;
      for (std::int64_t k = 0; k < kIn; ++k) c = std::fma(a.get(p, k), b.get(o, k), c);
      not_chain += c != all.get(p, o);
    }
  }
  return {{"baseline", library.name},
          {"row_counts", kRows},
          {"row_counts_with_other_bits", differing},
          {"first_row_count_with_other_bits", first},
          {"elements_checked", (kRows + 15) / 16 * kOut},
          {"elements_not_the_fma_chain", not_chain},
          {"holds", differing == 0 && not_chain == 0}};
}

struct Options {
  std::string shape, direction, dtype, json;
  int pairs = 0, threads = 0;  // 0: what the shape says, all thread counts
  bool contract = true;
};

// One (shape, dtype, threads, direction): all arms interleaved.
void run_case(const Shape& shape, DType dtype, int threads, Direction direction, const Options& options,
              Json& rows) {
  const std::int64_t in = shape.hidden, out = shape.ffn;
  std::vector<Matrix> weights;
  std::vector<const std::byte*> bases;
  std::vector<float*> grad_bases;
  const bool wgrad = direction == Direction::kWgrad;
  weights.reserve(kExperts);
  for (std::int64_t g = 0; g < kExperts; ++g) {
    weights.emplace_back(wgrad ? DType::kF32 : dtype, out, in, static_cast<std::uint64_t>(g) + 100);
    bases.push_back(weights.back().data());
    grad_bases.push_back(weights.back().floats());
  }
  Matrix a(dtype, shape.rows, in, 1), dc(dtype, shape.rows, out, 2);
  Matrix h(dtype, shape.rows, out, 3), da(dtype, shape.rows, in, 4), dense_grad(DType::kF32, out, in, 5);
  std::vector<std::int32_t> index(static_cast<std::size_t>(shape.rows));
  std::iota(index.begin(), index.end(), 0);
  std::shuffle(index.begin(), index.end(), std::mt19937_64(11));

  const auto kernels = kernels::make_cpu_kernels(threads);
  const std::vector<std::int64_t> zipf = zipf_ptr(shape.rows), uniform = uniform_ptr(shape.rows);
  const auto grouped = [&](const std::vector<std::int64_t>& ptr) -> std::function<void()> {
    switch (direction) {
      case Direction::kForward:
        return [&] {
          kernels->grouped_gemm_forward({ptr, bases}, a.view(), index, dtype, out, Activation::kRelu,
                                        h.view(), {});
        };
      case Direction::kDgrad:
        return [&] { kernels->grouped_gemm_dgrad({ptr, bases}, dc.view(), {}, dtype, da.view()); };
      case Direction::kWgrad:
        break;
    }
    return [&] { kernels->grouped_gemm_wgrad(ptr, dc.view(), {}, a.view(), {}, grad_bases); };
  };

  std::vector<Arm> arms{{"zipf", grouped(zipf), {}, {}}, {"uniform", grouped(uniform), {}, {}}};
  for (const Library& library : libraries()) {
    auto call = direction == Direction::kForward ? library.dense(direction, a, weights[0], h, threads)
                : direction == Direction::kDgrad ? library.dense(direction, dc, weights[0], da, threads)
                                                 : library.dense(direction, dc, a, dense_grad, threads);
    if (call) arms.push_back({library.name, call, {}, {}});
  }
  const int pairs = options.pairs ? options.pairs : shape.pairs;
  measure(arms, pairs);

  // Sampled elements of the zipf call against the scalar chain.
  if (!wgrad) {
    arms[0].call();
    std::mt19937_64 random(5);
    for (int i = 0; i < 64; ++i) {
      const auto p = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(shape.rows));
      const auto g =
          static_cast<std::size_t>(std::upper_bound(zipf.begin(), zipf.end(), p) - zipf.begin() - 1);
      float c = 0.0f, got = 0.0f;
      if (direction == Direction::kForward) {
        const auto o = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(out));
        for (std::int64_t k = 0; k < in; ++k)
          c = std::fma(a.get(index[static_cast<std::size_t>(p)], k), weights[g].get(o, k), c);
        got = h.get(p, o);
      } else {
        const auto o = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(in));
        for (std::int64_t k = 0; k < out; ++k) c = std::fma(dc.get(p, k), weights[g].get(k, o), c);
        got = da.get(p, o);
      }
      Require(round_to(dtype, c) == got, ErrorCode::kInternal, name_of(direction), " of row ", p, " is ", got,
              ", must be ", round_to(dtype, c));
    }
  }

  const double gflop = 2e-9 * static_cast<double>(shape.rows) * static_cast<double>(in * out);
  for (std::size_t i = 0; i < arms.size(); ++i) {
    std::cerr << "  " << arms[i].name << ": wall " << median(arms[i].wall_us) << " us (mad "
              << deviation(arms[i].wall_us) << "), cpu " << median(arms[i].cpu_us) << " us, "
              << gflop / median(arms[i].wall_us) * 1e6 << " GFLOP/s wall, "
              << gflop / median(arms[i].cpu_us) * 1e6 << " GFLOP/s per core\n";
  }
  for (std::size_t i = 0; i < 2; ++i) {
    for (std::size_t b = 2; b < arms.size(); ++b) {
      rows.push_back({{"shape",
                       {{"name", shape.name},
                        {"hidden", in},
                        {"ffn", out},
                        {"rows", shape.rows},
                        {"experts", kExperts}}},
                      {"case", std::string("grouped_gemm_") + name_of(direction) + "_" + arms[i].name},
                      {"dtype", to_string(dtype)},
                      {"threads", threads},
                      {"median_us", median(arms[i].wall_us)},
                      {"mad_us", deviation(arms[i].wall_us)},
                      {"cpu_us", median(arms[i].cpu_us)},
                      {"baseline", arms[b].name},
                      {"baseline_us", median(arms[b].wall_us)},
                      {"baseline_mad_us", deviation(arms[b].wall_us)},
                      {"baseline_cpu_us", median(arms[b].cpu_us)},
                      {"ratio", median(arms[b].wall_us) / median(arms[i].wall_us)},
                      {"cpu_ratio", median(arms[b].cpu_us) / median(arms[i].cpu_us)},
                      {"pairs", pairs}});
    }
  }
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown processor";
}

int run(const Options& options) {
  Json rows = Json::array(), contract = Json::array();
  if (options.contract) {
    for (const Library& library : libraries()) {
      contract.push_back(contract_of(library));
      std::cerr << contract.back().dump() << "\n";
    }
  }
  for (const Shape& shape : kShapes) {
    if (!options.shape.empty() && options.shape != shape.name) continue;
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      if (!options.dtype.empty() && options.dtype != to_string(dtype)) continue;
      for (const int threads : {1, 2}) {
        if (options.threads != 0 && options.threads != threads) continue;
        for (const Direction direction : {Direction::kForward, Direction::kDgrad, Direction::kWgrad}) {
          if (!options.direction.empty() && options.direction != name_of(direction)) continue;
          std::cerr << shape.name << " " << to_string(dtype) << " " << threads << " thread(s) "
                    << name_of(direction) << "\n";
          run_case(shape, dtype, threads, direction, options, rows);
        }
      }
    }
  }
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  double load = -1.0;
  if (getloadavg(&load, 1) != 1) load = -1.0;
  const Json document{{"date", date},
                      {"commit", SLUICE_COMMIT},
                      {"device", processor_name() + ", " + kernels::cpu_isa()},
                      {"driver", "none"},
                      {"processors", static_cast<int>(std::thread::hardware_concurrency())},
                      {"load_average_at_end", load},
                      {"contract", contract},
                      {"rows", rows}};
  if (!options.json.empty()) {
    std::ofstream file;
    if (options.json != "-") {
      file.open(options.json);
      Require(file.good(), ErrorCode::kIo, "cannot write ", options.json);
    }
    (options.json == "-" ? std::cout : file) << document.dump(1) << "\n";
  }
  return 0;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--no-contract") {
      options.contract = false;
      continue;
    }
    Require(i + 1 < argc, ErrorCode::kInvalidArgument, key,
            " needs a value; options are --shape tiny|small|large, ",
            "--direction forward|dgrad|wgrad, --dtype f32|bf16, --threads 1|2, --pairs N, --no-contract, "
            "--json FILE|-");
    const std::string value = argv[++i];
    if (key == "--shape") {
      options.shape = value;
    } else if (key == "--direction") {
      options.direction = value;
    } else if (key == "--dtype") {
      options.dtype = value;
    } else if (key == "--threads") {
      options.threads = std::stoi(value);
    } else if (key == "--pairs") {
      options.pairs = std::stoi(value);
    } else if (key == "--json") {
      options.json = value;
    } else {
      Require(false, ErrorCode::kInvalidArgument, "unknown option ", key);
    }
  }
  Require(options.pairs >= 0, ErrorCode::kInvalidArgument, "--pairs is ", options.pairs,
          ", must be at least 1, or 0 for what each shape says");
  return options;
}

}  // namespace
}  // namespace sluice

int main(int argc, char** argv) {
  try {
    return sluice::run(sluice::parse(argc, argv));
  } catch (const std::exception& e) {
    std::cerr << "grouped_gemm_benchmark: " << e.what() << "\n";
    return 1;
  }
}
