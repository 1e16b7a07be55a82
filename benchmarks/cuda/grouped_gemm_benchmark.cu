// Grouped GEMM on one GPU against one dense cuBLAS GEMM of the same FLOPs, in the same run.
//
// usage: grouped_gemm_benchmark [--json] [--shape NAME] [--op forward|gather|dgrad|wgrad] [--portable] [--iterations N] [--commit HASH] [--date DATE]
//
// Shapes are one rank's share of a layer on two ranks: T tokens a rank with k routes each, E experts in all, so
// rows = T * k on E / 2 local experts; gemm1 is [2 * ffn, hidden], gemm2 [hidden, ffn]. Group sizes are T * k draws:
// "uniform" over the local experts, "zipf" with weights 1 / rank in a shuffled order (seed printed).
// FLOPs are those of real rows. Arms alternate; before each timed launch 256 MB are written, so that nothing is left
// in L2. Times are from events around one launch; median and median absolute deviation over the iterations.
// wgrad adds to gradients, wgrad_write writes them.
// Baselines: forward and dgrad, the dense GEMM [rows] x [out, in]; wgrad, the larger of the dense GEMM with fp32
// accumulation into one [out, in] and reading and writing all groups' fp32 gradients at the measured copy bandwidth;
// gather, where the call fetches its rows itself: the dense GEMM; beside it gathering the rows first and then the call;
// decode, reading the weights once at the measured read bandwidth. Every arm's result is sampled against double sums.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "sluice/kernels/cuda/grouped_gemm.hpp"
#include "sluice/kernels/cuda/rows.hpp"
#include "timing.cuh"

namespace {

using namespace sluice::kernels::cuda;
using namespace sluice::benchmarks;

constexpr unsigned kSeed = 20260101;

struct Shape {
  const char* name;
  std::int64_t tokens, rows;
  int groups;
  std::int64_t hidden, ffn;
};
constexpr Shape kShapes[] = {
    {"deepseek-v3", 8192, 8192 * 8, 32, 7168, 2048}, {"qwen3-235b", 8192, 8192 * 8, 64, 4096, 1536},
    {"qwen3-30b", 16384, 16384 * 8, 64, 2048, 768},  {"mixtral-8x7b", 8192, 8192 * 2, 4, 4096, 14336},
    {"olmoe", 16384, 16384 * 8, 32, 2048, 1024},
};

__global__ void read_all(const uint4* data, std::int64_t count, unsigned* sink) {
  unsigned sum = 0;
  std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = data[i], b = data[i + step], c = data[i + 2 * step], d = data[i + 3 * step];
    sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += step) sum += data[i].x;
  if (sum == 0x12345678) *sink = sum;
}

std::vector<std::int64_t> draw_groups(const Shape& shape, bool zipf) {
  std::mt19937 random(kSeed);
  std::vector<double> weights(static_cast<std::size_t>(shape.groups), 1.0);
  if (zipf) {
    for (int g = 0; g < shape.groups; ++g) weights[static_cast<std::size_t>(g)] = 1.0 / (g + 1);
    std::shuffle(weights.begin(), weights.end(), random);
  }
  std::discrete_distribution<int> pick(weights.begin(), weights.end());
  std::vector<std::int64_t> ptr(static_cast<std::size_t>(shape.groups) + 1, 0);
  for (std::int64_t r = 0; r < shape.rows; ++r) ++ptr[static_cast<std::size_t>(pick(random)) + 1];
  std::partial_sum(ptr.begin(), ptr.end(), ptr.begin());
  return ptr;
}

struct Row {
  std::string shape, kase, baseline;
  Timing time;
  double baseline_us, tflops;
  std::string more;
};
std::vector<Row> g_rows;
bool g_json = false;
GemmPath g_path = GemmPath::kBest;
std::string g_op;  // one operation only; empty: all
bool wanted(const char* op) {
  return g_op.empty() || g_op == op;
}

void add_row(Row row) {
  std::fprintf(g_json ? stderr : stdout,
               "%-22s %-34s %10.1f us (mad %6.1f)  %7.1f TFLOP/s  baseline %10.1f us  ratio %.4f\n",
               row.shape.c_str(), row.kase.c_str(), row.time.median_us, row.time.mad_us, row.tflops,
               row.baseline_us, row.baseline_us / row.time.median_us);
  std::fflush(nullptr);
  g_rows.push_back(std::move(row));
}

std::vector<float> fetch(const __nv_bfloat16* data, std::int64_t first, std::int64_t count,
                         std::int64_t step) {
  std::vector<__nv_bfloat16> raw(static_cast<std::size_t>(count));
  CHECK(cudaMemcpy2D(raw.data(), 2, data + first, static_cast<std::size_t>(step) * 2, 2,
                     static_cast<std::size_t>(count), cudaMemcpyDeviceToHost));
  std::vector<float> values;
  for (const auto v : raw) values.push_back(__bfloat162float(v));
  return values;
}
double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}
void expect_near(double got, double want, double tolerance, const char* what) {
  if (!(std::abs(got - want) <= tolerance)) {
    std::fprintf(stderr, "wrong result of %s: %g, expected %g\n", what, got, want);
    std::exit(1);
  }
}

struct Bench {
  cublasHandle_t blas;
  Timer timer;
  double copy_bytes_per_us = 0, read_bytes_per_us = 0;
  std::mt19937 random{kSeed};

  explicit Bench(int iterations) : timer(iterations) {
    CHECK(cublasCreate(&blas));
    const std::int64_t bytes = std::int64_t{4} << 30;
    Buffer<unsigned char> from(bytes), to(bytes);
    Buffer<unsigned> sink(1);
    fill<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(from.data), bytes / 2, 1, 1.0f);
    const auto times = timer.run(
        {[&] { CHECK(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, nullptr)); },
         [&] {
           read_all<<<132 * 8, 512>>>(reinterpret_cast<const uint4*>(from.data), bytes / 16, sink.data);
         }});
    copy_bytes_per_us = 2.0 * static_cast<double>(bytes) / times[0].median_us;
    read_bytes_per_us = static_cast<double>(bytes) / times[1].median_us;
    std::fprintf(stderr, "copy %.0f GB/s (read + written), read %.0f GB/s\n", copy_bytes_per_us / 1e3,
                 read_bytes_per_us / 1e3);
  }

  // c[m, n] = op(a) op(b) in row-major terms through cuBLAS's column-major call: c^T = op(b)^T op(a)^T.
  void dense(cublasOperation_t op_b, cublasOperation_t op_a, std::int64_t n, std::int64_t m, std::int64_t k,
             const void* b, std::int64_t ldb, const void* a, std::int64_t lda, void* c, std::int64_t ldc,
             bool wgrad) {
    const float one = 1.0f, zero = 0.0f;
    CHECK(cublasGemmEx(blas, op_b, op_a, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), &one,
                       b, CUDA_R_16BF, static_cast<int>(ldb), a, CUDA_R_16BF, static_cast<int>(lda),
                       wgrad ? &one : &zero, c, wgrad ? CUDA_R_32F : CUDA_R_16BF, static_cast<int>(ldc),
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

  void matrix(const Shape& shape, bool zipf, const char* which, std::int64_t out, std::int64_t in,
              bool swiglu) {
    const std::vector<std::int64_t> ptr = draw_groups(shape, zipf);
    const std::int64_t rows = shape.rows, groups = shape.groups;
    Bf16 weights(groups * out * in), a(rows * in), dc(rows * out), c(rows * std::max(out, in));
    Buffer<std::int64_t> group_ptr(groups + 1);
    CHECK(cudaMemcpy(group_ptr.data, ptr.data(), ptr.size() * 8, cudaMemcpyHostToDevice));
    fill<<<1024, 256>>>(weights.data, groups * out * in, 2, 1.0f / std::sqrt(static_cast<float>(in)));
    fill<<<1024, 256>>>(a.data, rows * in, 3, 1.0f);
    fill<<<1024, 256>>>(dc.data, rows * out, 4, 1.0f);
    GemmGroups g;
    g.group_ptr = group_ptr.data;
    g.num_groups = shape.groups;
    g.num_rows = rows;
    g.path = g_path;
    const GemmWeights w{weights.data, groups, out * in, out, in};
    const double flops = 2.0 * static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in);
    const std::string label = std::string(shape.name) + "/" + which, suffix = zipf ? "zipf" : "uniform";
    const auto group_of = [&](std::int64_t row) {
      return std::upper_bound(ptr.begin(), ptr.end(), row) - ptr.begin() - 1;
    };
    const auto sample = [&](std::int64_t limit) {
      return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(limit));
    };

    const auto forward = [&] {
      grouped_gemm_forward(g, w, {a.data, in}, {c.data, out}, {}, GemmActivation::kNone, nullptr);
    };
    const auto dense_forward = [&] {
      dense(CUBLAS_OP_T, CUBLAS_OP_N, out, rows, in, weights.data, in, a.data, in, c.data, out, false);
    };
    Buffer<std::uint32_t> ticket(1);
    CHECK(cudaMemset(ticket.data, 0, 4));
    GemmGroups by_tickets = g;
    by_tickets.tickets.next = ticket.data;
    const auto forward_tickets = [&] {
      grouped_gemm_forward(by_tickets, w, {a.data, in}, {c.data, out}, {}, GemmActivation::kNone, nullptr);
    };
    std::vector<std::function<void()>> arms = {forward, dense_forward, forward_tickets};
    if (swiglu) {
      arms.push_back([&] {
        grouped_gemm_forward(g, w, {a.data, in}, {}, {c.data, out / 2}, GemmActivation::kSwiGLU, nullptr);
      });
      arms.push_back([&] {
        grouped_gemm_forward(g, w, {a.data, in}, {c.data, out}, {dc.data, out / 2}, GemmActivation::kSwiGLU,
                             nullptr);
      });
    }
    std::vector<Timing> times;
    const auto add = [&](const std::string& kase, Timing time, double baseline_us, const char* baseline,
                         std::string more) {
      add_row({label, kase + suffix, baseline, time, baseline_us, flops / time.median_us * 1e-6,
               std::move(more)});
    };
    if (wanted("forward")) {
      times = timer.run(arms);
      add("grouped_gemm_forward_", times[0], times[1].median_us, "cublas_dense", "");
      add("grouped_gemm_forward_tickets_", times[2], times[1].median_us, "cublas_dense", "");
      if (swiglu) {
        add("grouped_gemm_forward_swiglu_", times[3], times[1].median_us, "cublas_dense", "");
        add("grouped_gemm_forward_swiglu_h_", times[4], times[1].median_us, "cublas_dense", "");
      }
      CHECK(cudaMemset(c.data, 0xFF, rows * out * 2));
      forward();
      for (int i = 0; i < 32; ++i) {
        const std::int64_t row = sample(rows), column = sample(out);
        const double want = dot(fetch(a.data, row * in, in, 1),
                                fetch(weights.data, (group_of(row) * out + column) * in, in, 1));
        expect_near(fetch(c.data, row * out + column, 1, 1)[0], want, std::abs(want) / 128 + 1e-3, "forward");
      }
      if (swiglu) fill<<<1024, 256>>>(dc.data, rows * out, 4, 1.0f);
    }

    if (swiglu && wanted("gather")) {
      // Rows of a group are of random tokens, ascending.
      std::vector<std::int32_t> index(static_cast<std::size_t>(rows));
      for (std::int32_t& token : index) token = static_cast<std::int32_t>(sample(shape.tokens));
      for (std::size_t group = 0; group + 1 < ptr.size(); ++group)
        std::sort(index.begin() + ptr[group], index.begin() + ptr[group + 1]);
      Bf16 x(shape.tokens * in);
      fill<<<1024, 256>>>(x.data, shape.tokens * in, 8, 1.0f);
      const Buffer<std::int32_t> where(index);
      const auto view = [&](const Bf16& b, std::int64_t n) {
        return sluice::MatrixView(reinterpret_cast<std::byte*>(b.data), sluice::DType::kBF16, n, in, in);
      };
      const GatheredRows gathered{where.data, {x.data, in}, shape.tokens, {}, 0};
      const auto lay_out = [&] {
        gather_rows(view(x, shape.tokens), {}, where.data, view(a, rows), nullptr, nullptr);
        grouped_gemm_forward(by_tickets, w, {a.data, in}, {}, {c.data, out / 2}, GemmActivation::kSwiGLU,
                             nullptr);
      };
      const auto fixed = [&] {
        grouped_gemm_forward(g, w, gathered, {}, {dc.data, out / 2}, GemmActivation::kSwiGLU, nullptr);
      };
      const auto tickets = [&] {
        grouped_gemm_forward(by_tickets, w, gathered, {}, {dc.data, out / 2}, GemmActivation::kSwiGLU,
                             nullptr);
      };
      // h kept, as in training, of rows that are laid out and of rows that are not.
      const auto kept = [&] {
        grouped_gemm_forward(by_tickets, w, {a.data, in}, {c.data, out}, {dc.data, out / 2},
                             GemmActivation::kSwiGLU, nullptr);
      };
      const auto kept_gathering = [&] {
        grouped_gemm_forward(by_tickets, w, gathered, {c.data, out}, {dc.data, out / 2},
                             GemmActivation::kSwiGLU, nullptr);
      };
      times = timer.run({lay_out, dense_forward, fixed, tickets, kept, kept_gathering});
      add("rows_first_swiglu_tickets_", times[0], times[1].median_us, "cublas_dense", "");
      add("gather_swiglu_", times[2], times[1].median_us, "cublas_dense", "");
      add("gather_swiglu_tickets_", times[3], times[1].median_us, "cublas_dense", "");
      add("laid_out_swiglu_h_tickets_", times[4], times[1].median_us, "cublas_dense", "");
      add("gather_swiglu_h_tickets_", times[5], times[1].median_us, "cublas_dense", "");
      lay_out();
      for (const auto& arm : {std::function<void()>(fixed), std::function<void()>(tickets)}) {
        CHECK(cudaMemset(dc.data, 0xFF, rows * out));
        arm();
        std::vector<__nv_bfloat16> want(static_cast<std::size_t>(rows * out / 2)), got(want.size());
        CHECK(cudaMemcpy(want.data(), c.data, want.size() * 2, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(got.data(), dc.data, got.size() * 2, cudaMemcpyDeviceToHost));
        if (std::memcmp(want.data(), got.data(), want.size() * 2) != 0) {
          std::fprintf(stderr, "gathering gave other bits than rows laid out first\n");
          std::exit(1);
        }
      }
      fill<<<1024, 256>>>(a.data, rows * in, 3, 1.0f);
      fill<<<1024, 256>>>(dc.data, rows * out, 4, 1.0f);
    }

    const auto dgrad = [&] { grouped_gemm_dgrad(g, w, {dc.data, out}, {c.data, in}, nullptr); };
    if (wanted("dgrad")) {
      times = timer.run({dgrad,
                         [&] {
                           dense(CUBLAS_OP_N, CUBLAS_OP_N, in, rows, out, weights.data, in, dc.data, out,
                                 c.data, in, false);
                         },
                         [&] {
                           grouped_gemm_dgrad(by_tickets, w, {dc.data, out}, {c.data, in}, nullptr);
                         }});
      add("grouped_gemm_dgrad_", times[0], times[1].median_us, "cublas_dense", "");
      add("grouped_gemm_dgrad_tickets_", times[2], times[1].median_us, "cublas_dense", "");
      CHECK(cudaMemset(c.data, 0xFF, rows * in * 2));
      dgrad();
      for (int i = 0; i < 32; ++i) {
        const std::int64_t row = sample(rows), column = sample(in);
        const double want = dot(fetch(dc.data, row * out, out, 1),
                                fetch(weights.data, group_of(row) * out * in + column, out, in));
        expect_near(fetch(c.data, row * in + column, 1, 1)[0], want, std::abs(want) / 128 + 1e-3, "dgrad");
      }
    }

    if (!wanted("wgrad")) return;
    Buffer<float> grads(groups * out * in);
    CHECK(cudaMemset(grads.data, 0, groups * out * in * 4));
    const auto wgrad = [&](GradientUpdate update) {
      grouped_gemm_wgrad(g, {dc.data, out}, out, {a.data, in}, in, grads.data, out * in, update, nullptr);
    };
    for (const GradientUpdate update : {GradientUpdate::kAdd, GradientUpdate::kWrite}) {
      if (update == GradientUpdate::kWrite) CHECK(cudaMemset(grads.data, 0xFF, groups * out * in * 4));
      wgrad(update);
      for (int i = 0; i < 32; ++i) {
        const std::int64_t group = sample(groups), o = sample(out), column = sample(in);
        const std::int64_t first = ptr[static_cast<std::size_t>(group)],
                           count = ptr[static_cast<std::size_t>(group) + 1] - first;
        if (count == 0) continue;
        const double want =
            dot(fetch(dc.data, first * out + o, count, out), fetch(a.data, first * in + column, count, in));
        float got = 0;
        CHECK(cudaMemcpy(&got, grads.data + (group * out + o) * in + column, 4, cudaMemcpyDeviceToHost));
        expect_near(got, want, std::abs(want) * 1e-4 + 1e-2, "wgrad");
      }
    }
    times = timer.run({[&] { wgrad(GradientUpdate::kAdd); },
                       [&] {
                         dense(CUBLAS_OP_N, CUBLAS_OP_T, in, out, rows, a.data, in, dc.data, out, grads.data,
                               in, true);
                       },
                       [&] { wgrad(GradientUpdate::kWrite); }});
    const double traffic_us = 8.0 * static_cast<double>(groups * out * in) / copy_bytes_per_us;
    char more[96];
    std::snprintf(more, sizeof more, ", \"dense_us\": %.1f, \"gradient_traffic_us\": %.1f",
                  times[1].median_us, traffic_us);
    add("grouped_gemm_wgrad_", times[0], std::max(times[1].median_us, traffic_us),
        "max(cublas_dense, gradient_traffic)", more);
    // Half of the traffic; the same dense GEMM, whose one gradient is no traffic to speak of.
    std::snprintf(more, sizeof more, ", \"dense_us\": %.1f, \"gradient_traffic_us\": %.1f",
                  times[1].median_us, traffic_us / 2);
    add("grouped_gemm_wgrad_write_", times[2], std::max(times[1].median_us, traffic_us / 2),
        "max(cublas_dense, gradient_traffic)", more);
  }

  void decode() {
    Shape shape = kShapes[0];
    shape.rows = 128 * 8;
    const std::vector<std::int64_t> ptr = draw_groups(shape, false);
    const std::int64_t hidden = shape.hidden, ffn = shape.ffn, groups = shape.groups;
    Bf16 w1(groups * 2 * ffn * hidden), w2(groups * hidden * ffn), x(shape.rows * hidden),
        act(shape.rows * ffn), y(shape.rows * hidden);
    Buffer<std::int64_t> group_ptr(groups + 1);
    CHECK(cudaMemcpy(group_ptr.data, ptr.data(), ptr.size() * 8, cudaMemcpyHostToDevice));
    fill<<<1024, 256>>>(w1.data, groups * 2 * ffn * hidden, 5, 0.02f);
    fill<<<1024, 256>>>(w2.data, groups * hidden * ffn, 6, 0.02f);
    fill<<<1024, 256>>>(x.data, shape.rows * hidden, 7, 1.0f);
    GemmGroups g;
    g.group_ptr = group_ptr.data;
    g.num_groups = shape.groups;
    g.num_rows = shape.rows;
    g.path = g_path;
    const auto first = [&] {
      grouped_gemm_forward(g, {w1.data, groups, 2 * ffn * hidden, 2 * ffn, hidden}, {x.data, hidden}, {},
                           {act.data, ffn}, GemmActivation::kSwiGLU, nullptr);
    };
    const auto second = [&] {
      grouped_gemm_forward(g, {w2.data, groups, hidden * ffn, hidden, ffn}, {act.data, ffn}, {y.data, hidden},
                           {}, GemmActivation::kNone, nullptr);
    };
    const auto times = timer.run({[&] {
                                    first();
                                    second();
                                  },
                                  first, second});
    const double bytes = 2.0 * static_cast<double>(groups * 3 * ffn * hidden);
    char more[96];
    std::snprintf(more, sizeof more, ", \"gemm1_us\": %.1f, \"gemm2_us\": %.1f", times[1].median_us,
                  times[2].median_us);
    add_row(
        {"deepseek-v3/128-tokens", "grouped_gemm_decode", "weights_read_once", times[0],
         bytes / read_bytes_per_us,
         bytes * static_cast<double>(shape.rows) / static_cast<double>(groups) / times[0].median_us * 1e-6,
         more});
  }
};

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_options(argc, argv, {"--shape", "--op"}, {"--portable"});
  const std::string only = options.value("--shape");
  g_json = options.json;
  g_op = options.value("--op");
  if (!options.value("--portable").empty()) g_path = GemmPath::kPortable;

  Bench bench(options.iterations);
  for (const Shape& shape : kShapes) {
    if (!only.empty() && only != shape.name) continue;
    for (const bool zipf : {false, true}) {
      bench.matrix(shape, zipf, "gemm1", 2 * shape.ffn, shape.hidden, true);
      bench.matrix(shape, zipf, "gemm2", shape.hidden, shape.ffn, false);
    }
  }
  if ((only.empty() && g_op.empty()) || only == "decode") bench.decode();

  for (const char* kase : {"grouped_gemm_forward_uniform",
                           "grouped_gemm_forward_zipf",
                           "grouped_gemm_forward_tickets_uniform",
                           "grouped_gemm_forward_tickets_zipf",
                           "grouped_gemm_dgrad_tickets_uniform",
                           "grouped_gemm_dgrad_tickets_zipf",
                           "grouped_gemm_forward_swiglu_uniform",
                           "grouped_gemm_forward_swiglu_zipf",
                           "rows_first_swiglu_tickets_uniform",
                           "rows_first_swiglu_tickets_zipf",
                           "gather_swiglu_uniform",
                           "gather_swiglu_zipf",
                           "gather_swiglu_tickets_uniform",
                           "gather_swiglu_tickets_zipf",
                           "grouped_gemm_dgrad_uniform",
                           "grouped_gemm_dgrad_zipf",
                           "grouped_gemm_wgrad_uniform",
                           "grouped_gemm_wgrad_zipf",
                           "grouped_gemm_wgrad_write_uniform",
                           "grouped_gemm_wgrad_write_zipf"}) {
    double log_sum = 0, least = 1e9;
    int count = 0;
    for (const Row& row : g_rows) {
      if (row.kase != kase) continue;
      const double ratio = row.baseline_us / row.time.median_us;
      log_sum += std::log(ratio);
      least = std::min(least, ratio);
      ++count;
    }
    if (count > 0)
      std::fprintf(stderr, "%-36s geometric mean %.4f, least %.4f\n", kase, std::exp(log_sum / count), least);
  }
  if (!g_json) return 0;
  char bandwidths[96];
  std::snprintf(bandwidths, sizeof bandwidths, "\"copy_gb_per_s\": %.0f, \"read_gb_per_s\": %.0f,",
                bench.copy_bytes_per_us / 1e3, bench.read_bytes_per_us / 1e3);
  print_json_head(options, kSeed, bandwidths);
  for (std::size_t i = 0; i < g_rows.size(); ++i) {
    const Row& row = g_rows[i];
    std::printf(
        "  {\"shape\": \"%s\", \"case\": \"%s\", \"median_us\": %.1f, \"mad_us\": %.1f, \"baseline\": "
        "\"%s\", "
        "\"baseline_us\": %.1f, \"ratio\": %.4f, \"tflop_per_s\": %.1f%s}%s\n",
        row.shape.c_str(), row.kase.c_str(), row.time.median_us, row.time.mad_us, row.baseline.c_str(),
        row.baseline_us, row.baseline_us / row.time.median_us, row.tflops, row.more.c_str(),
        i + 1 < g_rows.size() ? "," : "");
  }
  std::printf("]}\n");
}
