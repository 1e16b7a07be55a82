// A whole MoE layer on one GPU, from router scores to its output and back, against the dense cuBLAS GEMMs of its FLOPs.
//
// usage: layer_cuda_benchmark [--json] [--shape NAME] [--iterations N] [--commit HASH] [--date DATE]
//
// Shapes are one GPU's share of a layer: T tokens choose k of the E experts that live here, by softmax of random scores.
//   forward   gate -> plan -> GEMM 1 with SwiGLU, which fetches its rows (or, where that does not pay, rows by position and
//             then GEMM 1) -> GEMM 2 -> weighted reduce
//   training  the same with rows laid out by position before GEMM 1, because wgrad 1 reads them so, keeping the
//             pre-activation; then dy by position -> dgrad 2 -> activation backward -> dgrad 1 ->
//             reduce; wgrad 2, wgrad 1; gradients of route weights and of the scores. first_training: wgrads write instead of
//             adding, as in the first backward of a step
// Each is one CUDA graph on one stream; no count reaches the host. Baselines: the sum of the dense GEMMs with as many
// rows, [rows] x [2 ffn, hidden] and [rows] x [hidden, ffn], their dgrads, and their wgrads with fp32 accumulation.
// Arms take turns; before each 256 MB are written. Results of every stage are sampled against double sums.
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "sluice/kernels/cuda/grouped_gemm.hpp"
#include "sluice/kernels/cuda/routing.hpp"
#include "sluice/kernels/cuda/rows.hpp"
#include "timing.cuh"

namespace {

using namespace sluice;
using namespace sluice::kernels;
using namespace sluice::kernels::cuda;
using namespace sluice::benchmarks;

constexpr unsigned kSeed = 20260101;

struct Shape {
  const char* name;
  std::int64_t tokens;
  int top_k, experts;
  std::int64_t hidden, ffn;
  double forward_target, training_target;  // times the dense GEMMs
};
constexpr Shape kShapes[] = {
    {"deepseek-v3", 8192, 8, 32, 7168, 2048, 1.08, 1.10},
    {"qwen3-235b", 8192, 8, 64, 4096, 1536, 1.12, 1.15},
    {"mixtral-8x7b", 8192, 2, 4, 4096, 14336, 1.06, 1.10},
};

__global__ void fill_scores(float* data, std::int64_t count, std::uint64_t salt) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x)
    data[i] = hash_value(static_cast<std::uint64_t>(i), salt);
}

class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& body) {
    body();  // once without: kernels are loaded
    CHECK(cudaStreamSynchronize(stream));
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    body();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec_, graph, 0));
    CHECK(cudaGraphDestroy(graph));
  }
  ~Graph() { cudaGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch() const { CHECK(cudaGraphLaunch(exec_, nullptr)); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

template <typename T>
std::vector<T> fetch(const T* data, std::int64_t first, std::int64_t count) {
  std::vector<T> out(static_cast<std::size_t>(count));
  CHECK(cudaMemcpy(out.data(), data + first, out.size() * sizeof(T), cudaMemcpyDeviceToHost));
  return out;
}
std::vector<double> fetch_row(const __nv_bfloat16* data, std::int64_t first, std::int64_t count,
                              std::int64_t step = 1) {
  std::vector<__nv_bfloat16> raw(static_cast<std::size_t>(count));
  CHECK(cudaMemcpy2D(raw.data(), 2, data + first, static_cast<std::size_t>(step) * 2, 2,
                     static_cast<std::size_t>(count), cudaMemcpyDeviceToHost));
  std::vector<double> out;
  for (const auto v : raw) out.push_back(__bfloat162float(v));
  return out;
}
double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
void expect_near(double got, double want, double tolerance, const char* what) {
  if (std::abs(got - want) <= tolerance) return;
  std::fprintf(stderr, "wrong result of %s: %g, expected %g\n", what, got, want);
  std::exit(1);
}

struct Stage {
  const char* name;
  double us;
};
struct Report {
  const Shape* shape;
  Timing forward, training, first_training;
  double dense_forward_us, dense_training_us;
  std::vector<Stage> stages;
};

struct Layer {
  const Shape& s;
  cudaStream_t stream;
  std::int64_t rows = s.tokens * s.top_k, up = 2 * s.ffn;
  Bf16 x{s.tokens * s.hidden}, y{s.tokens * s.hidden}, dy{s.tokens * s.hidden}, dx{s.tokens * s.hidden};
  Bf16 w1{s.experts * up * s.hidden}, w2{s.experts * s.hidden * s.ffn};
  Bf16 a{rows * s.hidden}, h{rows * up}, act{rows * s.ffn}, out{rows * s.hidden}, dyp{rows * s.hidden};
  Buffer<float> g1{s.experts * up * s.hidden}, g2{s.experts * s.hidden * s.ffn};
  Buffer<float> logits{s.tokens * s.experts}, dlogits{s.tokens * s.experts};
  Buffer<std::int64_t> row_ptr{s.tokens + 1}, expert_ptr{s.experts + 1};
  Buffer<std::int32_t> expert{rows}, rank_of{std::vector<std::int32_t>(s.experts, 0)}, slot_of{s.experts};
  Buffer<std::int32_t> position{rows}, row_of{rows};
  Buffer<float> weight{rows}, weight_of{rows}, dw_position{rows}, dweight{rows};
  Buffer<std::uint32_t> status{1}, ticket{1};
  Buffer<unsigned char> scratch{static_cast<std::int64_t>(plan_scratch_bytes(s.tokens, s.experts, 1))};

  Layer(const Shape& shape, cudaStream_t on) : s(shape), stream(on) {
    fill<<<1024, 256>>>(x.data, s.tokens * s.hidden, 1, 1.0f);
    fill<<<1024, 256>>>(dy.data, s.tokens * s.hidden, 2, 1.0f);
    fill<<<1024, 256>>>(w1.data, s.experts * up * s.hidden, 3,
                        1.0f / std::sqrt(static_cast<float>(s.hidden)));
    fill<<<1024, 256>>>(w2.data, s.experts * s.hidden * s.ffn, 4,
                        1.0f / std::sqrt(static_cast<float>(s.ffn)));
    fill_scores<<<1024, 256>>>(logits.data, s.tokens * s.experts, 5);
    std::vector<std::int32_t> slots;
    for (int e = 0; e < s.experts; ++e) slots.push_back(e);
    CHECK(cudaMemcpy(slot_of.data, slots.data(), slots.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemset(status.data, 0, 4));
    CHECK(cudaMemset(ticket.data, 0, 4));
    CHECK(cudaMemset(g1.data, 0, s.experts * up * s.hidden * 4));
    CHECK(cudaMemset(g2.data, 0, s.experts * s.hidden * s.ffn * 4));
    CHECK(cudaDeviceSynchronize());
  }

  static MatrixView view(Bf16& b, std::int64_t num_rows, std::int64_t cols) {
    return {reinterpret_cast<std::byte*>(b.data), DType::kBF16, num_rows, cols, cols};
  }
  static MatrixView column(Buffer<float>& b, std::int64_t num_rows) {
    return {reinterpret_cast<std::byte*>(b.data), DType::kF32, num_rows, 1, 1};
  }
  GateScores scores() const { return {logits.data, s.experts, s.tokens, s.experts}; }
  SoftmaxGate gate() const { return {s.top_k, false, 1.0f}; }
  GemmGroups groups(bool tickets = true) const {
    GemmGroups g;
    if (tickets) g.tickets.next = ticket.data;
    g.group_ptr = expert_ptr.data;
    g.num_groups = s.experts;
    g.num_rows = rows;
    return g;
  }
  GemmWeights weights1() const { return {w1.data, s.experts, up * s.hidden, up, s.hidden}; }
  GemmWeights weights2() const { return {w2.data, s.experts, s.hidden * s.ffn, s.hidden, s.ffn}; }

  void route_and_plan() {
    gate_softmax(scores(), gate(), {row_ptr.data, expert.data, weight.data, rows, status.data}, {}, stream);
    PlanBuffers plan;
    plan.expert_ptr = expert_ptr.data;
    plan.position_of_route = position.data;
    plan.row_of_position = row_of.data;
    plan.weight_of_position = weight_of.data;
    Buffer<std::int64_t>& unused = rank_ptr;
    plan.rank_ptr = unused.data;
    build_plan({row_ptr.data, expert.data, weight.data}, s.tokens, {rank_of.data, slot_of.data, s.experts, 1},
               plan, scratch.data, stream);
  }
  Buffer<std::int64_t> rank_ptr{2};
  // Rows by position. From the token's side (the backward of an unweighted reduce) each row is read once.
  void lay_out(Bf16& from, Bf16& to) {
    weighted_reduce_backward(view(from, s.tokens, s.hidden), {}, row_ptr.data, position.data, nullptr,
                             view(to, rows, s.hidden), nullptr, stream);
  }
  void gemm1(bool keep_h) {
    grouped_gemm_forward(groups(), weights1(), {a.data, s.hidden}, {keep_h ? h.data : nullptr, up},
                         {act.data, s.ffn}, GemmActivation::kSwiGLU, stream);
  }
  // Fetches the rows itself.
  void gemm1_gathering() {
    grouped_gemm_forward(groups(), weights1(), {row_of.data, {x.data, s.hidden}, s.tokens, {}, 0}, {},
                         {act.data, s.ffn}, GemmActivation::kSwiGLU, stream);
  }
  void gemm2() {
    grouped_gemm_forward(groups(), weights2(), {act.data, s.ffn}, {out.data, s.hidden}, {},
                         GemmActivation::kNone, stream);
  }
  void reduce(Bf16& to, const float* weights) {
    weighted_reduce(view(out, rows, s.hidden), row_ptr.data, position.data, weights,
                    view(to, s.tokens, s.hidden), stream);
  }
  void forward(bool keep) {
    route_and_plan();
    if (!keep && gathering_pays(up)) {
      gemm1_gathering();
    } else {
      lay_out(x, a);
      gemm1(keep);
    }
    gemm2();
    reduce(y, weight.data);
  }
  void dgrad2() { grouped_gemm_dgrad(groups(), weights2(), {dyp.data, s.hidden}, {act.data, s.ffn}, stream); }
  void activation() {
    activation_backward(Activation::kSwiGLU, view(h, rows, up), view(act, rows, s.ffn), weight_of.data,
                        dw_position.data, view(h, rows, up), view(act, rows, s.ffn), 0, rows, nullptr,
                        stream);
  }
  void dgrad1() { grouped_gemm_dgrad(groups(), weights1(), {h.data, up}, {out.data, s.hidden}, stream); }
  void wgrads(GradientUpdate update) {
    grouped_gemm_wgrad(groups(false), {dyp.data, s.hidden}, s.hidden, {act.data, s.ffn}, s.ffn, g2.data,
                       s.hidden * s.ffn, update, stream);
    grouped_gemm_wgrad(groups(false), {h.data, up}, up, {a.data, s.hidden}, s.hidden, g1.data, up * s.hidden,
                       update, stream);
  }
  void gate_gradients() {
    gather_rows(column(dw_position, rows), {}, position.data, column(dweight, rows), nullptr, stream);
    gate_softmax_backward(scores(), gate(), {row_ptr.data, expert.data, weight.data}, dweight.data, nullptr,
                          0, dlogits.data, s.experts, stream);
  }
  void backward(GradientUpdate update) {
    lay_out(dy, dyp);
    dgrad2();
    activation();
    dgrad1();
    reduce(dx, nullptr);
    wgrads(update);
    gate_gradients();
  }

  // After a forward that kept h.
  void check_forward() {
    std::mt19937_64 random(kSeed);
    const auto routes = fetch(row_ptr.data, 0, s.tokens + 1);
    const auto positions = fetch(position.data, 0, rows), tokens = fetch(row_of.data, 0, rows);
    const auto weights = fetch(weight.data, 0, rows);
    const auto begins = fetch(expert_ptr.data, 0, s.experts + 1);
    if (routes.back() != rows || begins.back() != rows) {
      std::fprintf(stderr, "the gate made %lld routes, the plan %lld positions; %lld are right\n",
                   static_cast<long long>(routes.back()), static_cast<long long>(begins.back()),
                   static_cast<long long>(rows));
      std::exit(1);
    }
    for (int i = 0; i < 16; ++i) {
      const auto p = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(rows));
      const auto e = std::upper_bound(begins.begin(), begins.end(), p) - begins.begin() - 1;
      const auto t = tokens[static_cast<std::size_t>(p)];
      const auto f = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(s.ffn));
      const auto c = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(s.hidden));
      const auto row = fetch_row(x.data, t * s.hidden, s.hidden);
      const double gate = dot(row, fetch_row(w1.data, (e * up + f) * s.hidden, s.hidden));
      const double factor = dot(row, fetch_row(w1.data, (e * up + s.ffn + f) * s.hidden, s.hidden));
      const double want = gate / (1 + std::exp(-gate)) * factor;
      expect_near(fetch_row(act.data, p * s.ffn + f, 1)[0], want, std::abs(want) / 100 + 1e-2, "GEMM 1");
      const double value =
          dot(fetch_row(act.data, p * s.ffn, s.ffn), fetch_row(w2.data, (e * s.hidden + c) * s.ffn, s.ffn));
      expect_near(fetch_row(out.data, p * s.hidden + c, 1)[0], value, std::abs(value) / 128 + 1e-3, "GEMM 2");
      double sum = 0;
      for (auto q = routes[static_cast<std::size_t>(t)]; q < routes[static_cast<std::size_t>(t) + 1]; ++q)
        sum += weights[static_cast<std::size_t>(q)] *
               fetch_row(out.data, positions[static_cast<std::size_t>(q)] * s.hidden + c, 1)[0];
      expect_near(fetch_row(y.data, t * s.hidden + c, 1)[0], sum, std::abs(sum) / 128 + 1e-3,
                  "the weighted reduce");
    }
  }
  // After a backward: out has the rows' gradients, h those of the pre-activation.
  void check_backward() {
    std::mt19937_64 random(kSeed + 1);
    const auto routes = fetch(row_ptr.data, 0, s.tokens + 1);
    const auto positions = fetch(position.data, 0, rows);
    const auto begins = fetch(expert_ptr.data, 0, s.experts + 1);
    for (int i = 0; i < 16; ++i) {
      const auto t = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(s.tokens));
      const auto c = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(s.hidden));
      double sum = 0;
      for (auto q = routes[static_cast<std::size_t>(t)]; q < routes[static_cast<std::size_t>(t) + 1]; ++q) {
        const std::int64_t p = positions[static_cast<std::size_t>(q)];
        const auto e = std::upper_bound(begins.begin(), begins.end(), p) - begins.begin() - 1;
        const double want =
            dot(fetch_row(h.data, p * up, up), fetch_row(w1.data, e * up * s.hidden + c, up, s.hidden));
        const double got = fetch_row(out.data, p * s.hidden + c, 1)[0];
        expect_near(got, want, std::abs(want) / 128 + 1e-2, "dgrad 1");
        sum += got;
      }
      expect_near(fetch_row(dx.data, t * s.hidden + c, 1)[0], sum, std::abs(sum) / 128 + 1e-3,
                  "the reduce of dx");
    }
  }
};

struct Bench {
  Timer timer;
  cublasHandle_t blas;
  cudaStream_t stream;
  explicit Bench(int iterations) : timer(iterations) {
    CHECK(cublasCreate(&blas));
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  // c[m, n] = op(a) op(b) in row-major terms: c^T = op(b)^T op(a)^T.
  void dense(cublasOperation_t op_b, cublasOperation_t op_a, std::int64_t n, std::int64_t m, std::int64_t k,
             const void* b, std::int64_t ldb, const void* a, std::int64_t lda, void* c, std::int64_t ldc,
             bool wgrad) {
    const float one = 1.0f, zero = 0.0f;
    CHECK(cublasGemmEx(blas, op_b, op_a, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), &one,
                       b, CUDA_R_16BF, static_cast<int>(ldb), a, CUDA_R_16BF, static_cast<int>(lda),
                       wgrad ? &one : &zero, c, wgrad ? CUDA_R_32F : CUDA_R_16BF, static_cast<int>(ldc),
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

  Report run(const Shape& shape) {
    Layer l(shape, stream);
    const std::int64_t rows = l.rows, hidden = shape.hidden, ffn = shape.ffn, up = l.up;
    l.forward(true);
    CHECK(cudaDeviceSynchronize());
    l.check_forward();
    const auto kept = fetch(l.y.data, 0, shape.tokens * shape.hidden);
    CHECK(cudaMemset(l.act.data, 0xFF, rows * ffn * 2));
    l.gemm1_gathering();
    l.gemm2();
    l.reduce(l.y, l.weight.data);
    CHECK(cudaDeviceSynchronize());
    if (std::memcmp(kept.data(), fetch(l.y.data, 0, shape.tokens * shape.hidden).data(), kept.size() * 2) !=
        0) {
      std::fprintf(stderr, "gathering gave other bits than rows laid out first\n");
      std::exit(1);
    }
    l.forward(true);
    l.backward(GradientUpdate::kAdd);
    CHECK(cudaDeviceSynchronize());
    l.check_backward();

    const Graph forward(stream, [&] { l.forward(false); });
    const Graph training(stream, [&] {
      l.forward(true);
      l.backward(GradientUpdate::kAdd);
    });
    const Graph first_training(stream, [&] {
      l.forward(true);
      l.backward(GradientUpdate::kWrite);
    });
    const auto forward1 = [&] {
      dense(CUBLAS_OP_T, CUBLAS_OP_N, up, rows, hidden, l.w1.data, hidden, l.a.data, hidden, l.h.data, up,
            false);
    };
    const auto forward2 = [&] {
      dense(CUBLAS_OP_T, CUBLAS_OP_N, hidden, rows, ffn, l.w2.data, ffn, l.act.data, ffn, l.out.data, hidden,
            false);
    };
    const auto dgrad1 = [&] {
      dense(CUBLAS_OP_N, CUBLAS_OP_N, hidden, rows, up, l.w1.data, hidden, l.h.data, up, l.out.data, hidden,
            false);
    };
    const auto dgrad2 = [&] {
      dense(CUBLAS_OP_N, CUBLAS_OP_N, ffn, rows, hidden, l.w2.data, ffn, l.dyp.data, hidden, l.act.data, ffn,
            false);
    };
    const auto wgrad1 = [&] {
      dense(CUBLAS_OP_N, CUBLAS_OP_T, hidden, up, rows, l.a.data, hidden, l.h.data, up, l.g1.data, hidden,
            true);
    };
    const auto wgrad2 = [&] {
      dense(CUBLAS_OP_N, CUBLAS_OP_T, ffn, hidden, rows, l.act.data, ffn, l.dyp.data, hidden, l.g2.data, ffn,
            true);
    };
    const auto times = timer.run({[&] { forward.launch(); },
                                  [&] {
                                    forward1();
                                    forward2();
                                  },
                                  [&] { training.launch(); },
                                  [&] {
                                    forward1();
                                    forward2();
                                    dgrad2();
                                    dgrad1();
                                    wgrad2();
                                    wgrad1();
                                  },
                                  [&] { first_training.launch(); }});
    Report report{&shape, times[0], times[2], times[4], times[1].median_us, times[3].median_us, {}};
    const Graph stages[] = {{stream, [&] { l.route_and_plan(); }},
                            {stream, [&] { l.lay_out(l.x, l.a); }},
                            {stream, [&] { l.gemm1(false); }},
                            {stream, [&] { l.gemm1_gathering(); }},
                            {stream, [&] { l.gemm2(); }},
                            {stream, [&] { l.reduce(l.y, l.weight.data); }},
                            {stream, [&] { l.dgrad2(); }},
                            {stream, [&] { l.activation(); }},
                            {stream, [&] { l.dgrad1(); }},
                            {stream, [&] { l.wgrads(GradientUpdate::kAdd); }},
                            {stream, [&] { l.wgrads(GradientUpdate::kWrite); }},
                            {stream, [&] { l.gate_gradients(); }}};
    const char* const names[] = {"gate_and_plan", "rows_by_position", "gemm1",        "gemm1_gathering",
                                 "gemm2",         "reduce",           "dgrad2",       "activation_backward",
                                 "dgrad1",        "wgrads",           "wgrads_write", "gate_gradients"};
    std::vector<std::function<void()>> arms;
    for (const Graph& stage : stages) arms.push_back([&stage] { stage.launch(); });
    const auto stage_times = timer.run(arms);
    for (std::size_t i = 0; i < stage_times.size(); ++i)
      report.stages.push_back({names[i], stage_times[i].median_us});
    return report;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_options(argc, argv, {"--shape"});
  Bench bench(options.iterations);
  std::vector<Report> reports;
  for (const Shape& shape : kShapes) {
    if (!options.value("--shape").empty() && options.value("--shape") != shape.name) continue;
    reports.push_back(bench.run(shape));
    const Report& r = reports.back();
    std::FILE* to = options.json ? stderr : stdout;
    std::fprintf(to,
                 "%-14s forward %9.1f us (mad %5.1f), dense %9.1f, ratio %.3f (target %.2f); forward and "
                 "backward %9.1f us "
                 "(mad %5.1f), dense %9.1f, ratio %.3f (target %.2f); gradients written %.3f\n   ",
                 shape.name, r.forward.median_us, r.forward.mad_us, r.dense_forward_us,
                 r.forward.median_us / r.dense_forward_us, shape.forward_target, r.training.median_us,
                 r.training.mad_us, r.dense_training_us, r.training.median_us / r.dense_training_us,
                 shape.training_target, r.first_training.median_us / r.dense_training_us);
    for (const Stage& stage : r.stages) std::fprintf(to, " %s %.1f", stage.name, stage.us);
    std::fprintf(to, "\n");
    std::fflush(to);
  }
  if (!options.json) return 0;
  print_json_head(options, kSeed, "");
  for (std::size_t i = 0; i < reports.size(); ++i) {
    const Report& r = reports[i];
    std::printf(
        "  {\"shape\": \"%s\", \"forward_us\": %.1f, \"forward_mad_us\": %.1f, \"dense_forward_us\": %.1f, "
        "\"forward_ratio\": %.4f, \"forward_target\": %.2f, \"training_us\": %.1f, \"training_mad_us\": "
        "%.1f, "
        "\"dense_training_us\": %.1f, \"training_ratio\": %.4f, \"training_target\": %.2f, "
        "\"first_training_us\": %.1f, \"first_training_mad_us\": %.1f, \"first_training_ratio\": %.4f, "
        "\"stages_us\": {",
        r.shape->name, r.forward.median_us, r.forward.mad_us, r.dense_forward_us,
        r.forward.median_us / r.dense_forward_us, r.shape->forward_target, r.training.median_us,
        r.training.mad_us, r.dense_training_us, r.training.median_us / r.dense_training_us,
        r.shape->training_target, r.first_training.median_us, r.first_training.mad_us,
        r.first_training.median_us / r.dense_training_us);
    for (std::size_t j = 0; j < r.stages.size(); ++j)
      std::printf("%s\"%s\": %.1f", j > 0 ? ", " : "", r.stages[j].name, r.stages[j].us);
    std::printf("}}%s\n", i + 1 < reports.size() ? "," : "");
  }
  std::printf("]}\n");
}
