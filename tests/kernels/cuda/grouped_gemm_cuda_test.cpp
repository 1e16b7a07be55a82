// Grouped GEMM on the device against double sums of the same rounded inputs. Every output is NaN before the call;
// rows and columns that belong to no group keep their canary; rows of no group are NaN in the inputs.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device_test_util.hpp"
#include "sluice/base/dtype.hpp"
#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/grouped_gemm.hpp"

namespace sluice::kernels::cuda {
namespace {

constexpr std::uint16_t kCanary = 0x7FC1;  // a NaN no kernel writes

struct Matrix {  // bf16 [rows, columns] in rows of `stride`
  std::int64_t rows, columns, stride;
  std::vector<std::uint16_t> bits;
  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t stride)
      : rows(rows),
        columns(columns),
        stride(stride),
        bits(static_cast<std::size_t>(rows * stride), kCanary) {}
  float at(std::int64_t r, std::int64_t c) const {
    bf16 v;
    v.bits = bits[static_cast<std::size_t>(r * stride + c)];
    return static_cast<float>(v);
  }
  void fill(std::mt19937& random, std::int64_t first, std::int64_t last) {
    std::normal_distribution<float> normal;
    for (std::int64_t r = first; r < last; ++r)
      for (std::int64_t c = 0; c < columns; ++c)
        bits[static_cast<std::size_t>(r * stride + c)] = bf16(normal(random)).bits;
  }
};

GemmPath g_path;  // of the test that runs

class GroupedGemmCuda : public testing::TestWithParam<GemmPath> {
 protected:
  void SetUp() override {
    g_path = GetParam();
    if (const std::string why = no_device(g_path == GemmPath::kPortable ? 8 : 9); !why.empty())
      GTEST_SKIP() << why;
  }
  void TearDown() override {
    if (!IsSkipped()) {
      EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
  }
};

// Rows kLead.. belong to groups of the given sizes; kTrail rows after them to none.
constexpr std::int64_t kLead = 3, kTrail = 5;
struct Problem {
  std::vector<std::int64_t> sizes, group_ptr;
  std::int64_t num_rows, out, in;
  Matrix weights;  // [groups * out, in]
  Matrix a, dc;
  std::mt19937 random;
  Problem(std::vector<std::int64_t> s, std::int64_t out, std::int64_t in, unsigned seed)
      : sizes(std::move(s)),
        num_rows(kLead + kTrail + std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0})),
        out(out),
        in(in),
        weights(static_cast<std::int64_t>(sizes.size()) * out, in, in),
        a(num_rows, in, in + 8),
        dc(num_rows, out, out + 16),
        random(seed) {
    group_ptr = {kLead};
    for (std::int64_t size : sizes) group_ptr.push_back(group_ptr.back() + size);
    weights.fill(random, 0, weights.rows);
    a.fill(random, kLead, num_rows - kTrail);
    dc.fill(random, kLead, num_rows - kTrail);
  }
  int groups() const { return static_cast<int>(sizes.size()); }
};

struct OnDevice {
  DeviceArray<std::int64_t> group_ptr;
  DeviceArray<std::uint16_t> weights, a, dc;
  explicit OnDevice(const Problem& p)
      : group_ptr(p.group_ptr), weights(p.weights.bits), a(p.a.bits), dc(p.dc.bits) {}
  GemmGroups groups(const Problem& p) {
    GemmGroups g;
    g.group_ptr = group_ptr.data();
    g.num_groups = p.groups();
    g.num_rows = p.num_rows;
    g.path = g_path;
    return g;
  }
  GemmWeights weight_view(const Problem& p) {
    return {weights.data(), p.groups(), p.out * p.in, p.out, p.in};
  }
};

double activation(GemmActivation kind, double x) {
  switch (kind) {
    case GemmActivation::kGelu:
      return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case GemmActivation::kRelu:
      return std::max(x, 0.0);
    default:
      return x;
  }
}
double silu(double x) {
  return x / (1 + std::exp(-x));
}

// expected(p, c) for each row p of a group; everything else must hold the canary. `scale`: size of the summed terms.
void expect_rows(const Problem& p, const std::vector<std::uint16_t>& bits, std::int64_t columns,
                 std::int64_t stride, double scale, const std::string& what,
                 const std::function<void(std::int64_t, int, std::vector<double>&)>& row_of) {
  std::vector<double> expected(static_cast<std::size_t>(columns));
  std::int64_t bad = 0;
  int group = 0;
  for (std::int64_t r = 0; r < p.num_rows; ++r) {
    const bool inside = r >= p.group_ptr.front() && r < p.group_ptr.back();
    if (inside) {
      while (r >= p.group_ptr[static_cast<std::size_t>(group) + 1]) ++group;
      row_of(r, group, expected);
    }
    for (std::int64_t c = 0; c < stride; ++c) {
      bf16 v;
      v.bits = bits[static_cast<std::size_t>(r * stride + c)];
      if (!inside || c >= columns) {
        if (v.bits != kCanary && ++bad < 5)
          ADD_FAILURE() << what << ": canary overwritten at row " << r << " column " << c;
        continue;
      }
      const double want = expected[static_cast<std::size_t>(c)];
      const double difference = std::abs(static_cast<double>(static_cast<float>(v)) - want);
      if (!(difference <= std::abs(want) / 256 + 2e-6 * scale) && ++bad < 5)
        ADD_FAILURE() << what << ": row " << r << " of group " << group << " column " << c << ": "
                      << static_cast<float>(v) << ", expected " << want;
    }
  }
  EXPECT_EQ(bad, 0) << what;
}

// W as floats once, so that the reference loops are plain.
struct Reference {
  const Problem& p;
  std::vector<float> w;
  explicit Reference(const Problem& p) : p(p) {
    for (std::int64_t r = 0; r < p.weights.rows; ++r)
      for (std::int64_t c = 0; c < p.in; ++c) w.push_back(p.weights.at(r, c));
  }
  void forward(std::int64_t row, int weight, std::vector<double>& h) const {
    std::vector<float> x(static_cast<std::size_t>(p.in));
    for (std::int64_t c = 0; c < p.in; ++c) x[static_cast<std::size_t>(c)] = p.a.at(row, c);
    h.resize(static_cast<std::size_t>(p.out));
    for (std::int64_t o = 0; o < p.out; ++o) {
      const float* line = w.data() + (weight * p.out + o) * p.in;
      double sum = 0;
      for (std::int64_t c = 0; c < p.in; ++c)
        sum += static_cast<double>(line[c]) * x[static_cast<std::size_t>(c)];
      h[static_cast<std::size_t>(o)] = sum;
    }
  }
  void dgrad(std::int64_t row, int weight, std::vector<double>& da) const {
    da.assign(static_cast<std::size_t>(p.in), 0);
    for (std::int64_t o = 0; o < p.out; ++o) {
      const float* line = w.data() + (weight * p.out + o) * p.in;
      const double d = p.dc.at(row, o);
      for (std::int64_t c = 0; c < p.in; ++c) da[static_cast<std::size_t>(c)] += d * line[c];
    }
  }
};

std::vector<std::uint16_t> poisoned(std::int64_t rows, std::int64_t stride) {
  return std::vector<std::uint16_t>(static_cast<std::size_t>(rows * stride), kCanary);
}

const std::vector<std::int64_t> kRagged = {0,  1,   2,   15,  16,  17,  0,   31,  63,  64,
                                           65, 127, 128, 129, 255, 256, 257, 300, 513, 0};

void check_forward(const Problem& p, GemmActivation kind, bool keep_h) {
  OnDevice d(p);
  const bool swiglu = kind == GemmActivation::kSwiGLU;
  const std::int64_t act_columns = swiglu ? p.out / 2 : p.out;
  DeviceArray<std::uint16_t> h(poisoned(p.num_rows, p.out + 8)), act(poisoned(p.num_rows, act_columns + 24));
  const bool with_h = keep_h || kind == GemmActivation::kNone;
  const bool with_act = kind != GemmActivation::kNone;
  grouped_gemm_forward(d.groups(p), d.weight_view(p), {d.a.data(), p.a.stride},
                       {with_h ? h.data() : nullptr, p.out + 8},
                       {with_act ? act.data() : nullptr, act_columns + 24}, kind, nullptr);
  CUDA_OK(cudaDeviceSynchronize());
  const Reference reference(p);
  const double scale = static_cast<double>(p.in);
  if (with_h) {
    expect_rows(p, h.get(), p.out, p.out + 8, scale, "h",
                [&](std::int64_t row, int g, std::vector<double>& e) { reference.forward(row, g, e); });
  } else {
    EXPECT_EQ(h.get(), poisoned(p.num_rows, p.out + 8)) << "h was not wanted";
  }
  if (!with_act) return;
  expect_rows(p, act.get(), act_columns, act_columns + 24, scale * 10, "act",
              [&](std::int64_t row, int g, std::vector<double>& e) {
                std::vector<double> x;
                reference.forward(row, g, x);
                for (std::size_t c = 0; c < e.size(); ++c)
                  e[c] = swiglu ? silu(x[c]) * x[c + e.size()] : activation(kind, x[c]);
              });
}

void check_dgrad(const Problem& p) {
  OnDevice d(p);
  DeviceArray<std::uint16_t> da(poisoned(p.num_rows, p.in + 8));
  grouped_gemm_dgrad(d.groups(p), d.weight_view(p), {d.dc.data(), p.dc.stride}, {da.data(), p.in + 8},
                     nullptr);
  CUDA_OK(cudaDeviceSynchronize());
  const Reference reference(p);
  expect_rows(p, da.get(), p.in, p.in + 8, static_cast<double>(p.out), "da",
              [&](std::int64_t row, int g, std::vector<double>& e) { reference.dgrad(row, g, e); });
}

// kWrite: of poison, which may not show.
void check_wgrad(const Problem& p, int max_sms, GradientUpdate update) {
  const bool write = update == GradientUpdate::kWrite;
  OnDevice d(p);
  GemmGroups groups = d.groups(p);
  groups.max_sms = max_sms;
  const std::int64_t stride = p.out * p.in + 12;
  std::vector<float> start(static_cast<std::size_t>(stride * p.groups()));
  for (std::size_t i = 0; i < start.size(); ++i) start[i] = static_cast<float>(i % 17) - 8.0f;
  for (std::size_t i = 0; write && i < start.size(); ++i)
    if (static_cast<std::int64_t>(i) % stride < p.out * p.in) start[i] = std::nanf("");
  DeviceArray<float> grads(start);
  grouped_gemm_wgrad(groups, {d.dc.data(), p.dc.stride}, p.out, {d.a.data(), p.a.stride}, p.in, grads.data(),
                     stride, update, nullptr);
  CUDA_OK(cudaDeviceSynchronize());
  const std::vector<float> got = grads.get();
  std::vector<double> want(static_cast<std::size_t>(p.out * p.in));
  std::int64_t bad = 0;
  for (int g = 0; g < p.groups(); ++g) {
    std::fill(want.begin(), want.end(), 0.0);
    for (std::int64_t r = p.group_ptr[static_cast<std::size_t>(g)];
         r < p.group_ptr[static_cast<std::size_t>(g) + 1]; ++r)
      for (std::int64_t o = 0; o < p.out; ++o)
        for (std::int64_t c = 0; c < p.in; ++c)
          want[static_cast<std::size_t>(o * p.in + c)] += static_cast<double>(p.dc.at(r, o)) * p.a.at(r, c);
    const double scale = static_cast<double>(p.sizes[static_cast<std::size_t>(g)]);
    for (std::int64_t i = 0; i < stride; ++i) {
      const auto at = static_cast<std::size_t>(g * stride + i);
      const bool gradient = i < p.out * p.in;
      const double expected =
          (write && gradient ? 0.0f : start[at]) + (gradient ? want[static_cast<std::size_t>(i)] : 0.0);
      const bool exact = i >= p.out * p.in || scale == 0;
      if (!(std::abs(got[at] - expected) <= (exact ? 0.0 : 1e-5 + 2e-6 * scale)) && ++bad < 5)
        ADD_FAILURE() << "gradient " << i << " of group " << g << ": " << got[at] << ", expected "
                      << expected;
    }
  }
  EXPECT_EQ(bad, 0);
}
void check_wgrad(const Problem& p, int max_sms = 0) {
  for (const GradientUpdate update : {GradientUpdate::kAdd, GradientUpdate::kWrite}) {
    SCOPED_TRACE(update == GradientUpdate::kAdd ? "added" : "written");
    check_wgrad(p, max_sms, update);
  }
}

TEST_P(GroupedGemmCuda, ForwardRaggedGroups) {
  check_forward(Problem(kRagged, 256, 128, 1), GemmActivation::kNone, true);
  // Multiples of 8 that are no multiple of a tile.
  check_forward(Problem(kRagged, 328, 136, 2), GemmActivation::kNone, true);
  check_forward(Problem({5, 70}, 8, 8, 3), GemmActivation::kNone, true);
}

TEST_P(GroupedGemmCuda, ForwardEveryRowCount) {
  std::vector<std::int64_t> sizes(257);
  std::iota(sizes.begin(), sizes.end(), 1);
  check_forward(Problem(sizes, 64, 64, 4), GemmActivation::kNone, true);
}

TEST_P(GroupedGemmCuda, ForwardOneGroupTakesAll) {
  check_forward(Problem({0, 0, 3000, 0}, 512, 64, 5), GemmActivation::kNone, true);
  check_forward(Problem({0, 0, 0}, 256, 64, 6), GemmActivation::kNone, true);
  // More blocks of k than stages, so that the ring turns and the warpgroups run apart.
  check_forward(Problem({700, 1, 40}, 256, 1536, 7), GemmActivation::kNone, true);
}

TEST_P(GroupedGemmCuda, ForwardActivations) {
  for (const bool keep_h : {true, false}) {
    check_forward(Problem(kRagged, 256, 64, 8), GemmActivation::kSwiGLU, keep_h);
    check_forward(Problem({17, 0, 300}, 208, 576, 9), GemmActivation::kSwiGLU, keep_h);
    check_forward(Problem({17, 0, 300}, 264, 72, 10), GemmActivation::kGelu, keep_h);
    check_forward(Problem({17, 0, 300}, 264, 72, 11), GemmActivation::kRelu, keep_h);
  }
}

TEST_P(GroupedGemmCuda, DgradRaggedGroups) {
  check_dgrad(Problem(kRagged, 128, 256, 12));
  check_dgrad(Problem(kRagged, 136, 328, 13));
  check_dgrad(Problem({700, 1, 40}, 1536, 256, 14));
}

// No group of more than 64 rows, as in decoding: the Hopper kernel has more and smaller stages then.
TEST_P(GroupedGemmCuda, FewRowsAGroup) {
  const std::vector<std::int64_t> sizes = {1, 0, 16, 17, 31, 33, 48, 49, 63, 64, 2};
  check_forward(Problem(sizes, 328, 1608, 22), GemmActivation::kNone, true);
  check_forward(Problem(sizes, 208, 648, 23), GemmActivation::kSwiGLU, false);
  check_forward(Problem({1}, 264, 72, 24), GemmActivation::kGelu, true);
  check_dgrad(Problem(sizes, 1288, 136, 25));
}

TEST_P(GroupedGemmCuda, WgradRaggedGroups) {
  check_wgrad(Problem(kRagged, 128, 256, 15));
  check_wgrad(Problem({0, 1, 700, 33, 1000}, 264, 328, 16));
  std::vector<std::int64_t> sizes(130);
  std::iota(sizes.begin(), sizes.end(), 1);
  check_wgrad(Problem(sizes, 64, 64, 17));
  // Many tiles a processor, of more and of fewer blocks of rows than there are stages.
  check_wgrad(Problem({330, 70, 0, 1, 700}, 264, 600, 21), 2);
  // Tiles of every width, and warpgroups without a row of the gradient.
  check_wgrad(Problem({70, 1}, 8, 8, 26));
  check_wgrad(Problem({3, 130, 0, 64}, 72, 128, 27), 2);
  check_wgrad(Problem({40, 1, 200}, 136, 448, 28), 2);
  // No rows at all: nothing is added, zeros are written.
  check_wgrad(Problem({0, 0, 0}, 64, 72, 30));
}

// The sum of a gradient has the same bits in any order of the groups and on any number of processors, and is added to
// what was there with one rounding.
TEST_P(GroupedGemmCuda, WgradIsOneAdditionInAnyOrder) {
  const Problem p({64, 0, 300, 1, 127, 40, 511}, 392, 520, 29);
  OnDevice d(p);
  const std::int64_t stride = p.out * p.in;
  const auto run = [&](float start, std::vector<std::int32_t> order, int max_sms,
                       GradientUpdate update = GradientUpdate::kAdd) {
    DeviceArray<float> grads(std::vector<float>(static_cast<std::size_t>(stride * p.groups()), start));
    DeviceArray<std::int32_t> order_d(order);
    GemmGroups groups = d.groups(p);
    groups.order = order.empty() ? nullptr : order_d.data();
    groups.max_sms = max_sms;
    grouped_gemm_wgrad(groups, {d.dc.data(), p.dc.stride}, p.out, {d.a.data(), p.a.stride}, p.in,
                       grads.data(), stride, update, nullptr);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return grads.get();
  };
  const auto sums = run(0.0f, {}, 0);
  EXPECT_EQ(sums, run(0.0f, {}, 2));
  EXPECT_EQ(sums, run(0.0f, {6, 1, 5, 0, 3, 2, 4}, 0));
  EXPECT_EQ(sums, run(0.0f, {3, 2, 6, 4, 0, 5, 1}, 4));
  std::vector<float> added = sums;
  for (float& value : added) value = 1024.0f + value;
  EXPECT_EQ(added, run(1024.0f, {}, 6));
  EXPECT_EQ(sums, run(1024.0f, {}, 0, GradientUpdate::kWrite));
  EXPECT_EQ(sums, run(std::nanf(""), {3, 2, 6, 4, 0, 5, 1}, 4, GradientUpdate::kWrite));
  // A group that is not in the order is left alone.
  auto some = sums;
  std::fill(some.begin() + 2 * stride, some.begin() + 3 * stride, 0.0f);
  EXPECT_EQ(some, run(0.0f, {3, -1, 6, 4, 0, 5, 1}, 0));
  std::fill(some.begin() + 2 * stride, some.begin() + 3 * stride, 7.0f);
  EXPECT_EQ(some, run(7.0f, {3, -1, 6, 4, 0, 5, 1}, 0, GradientUpdate::kWrite));
}

// A row's result has the same bits alone, in a large group, in any tile, in any order and on any number of processors.
TEST_P(GroupedGemmCuda, RowsAreIndependent) {
  const std::int64_t rows = 700, out = 512, in = 1024;
  Problem p({rows}, out, in, 18);
  OnDevice d(p);
  DeviceArray<std::uint32_t> ticket({0});
  const auto run = [&](const std::vector<std::int64_t>& ptr, std::vector<std::int32_t> order, int max_sms,
                       bool dgrad, bool tickets = false) {
    const int groups = static_cast<int>(ptr.size()) - 1;
    DeviceArray<std::int64_t> group_ptr(ptr);
    DeviceArray<std::int32_t> weight_index(std::vector<std::int32_t>(static_cast<std::size_t>(groups), 0));
    DeviceArray<std::int32_t> order_d(order);
    DeviceArray<std::uint16_t> c(poisoned(p.num_rows, dgrad ? in : out));
    GemmGroups g;
    g.group_ptr = group_ptr.data();
    g.weight_index = weight_index.data();
    g.order = order.empty() ? nullptr : order_d.data();
    g.num_groups = groups;
    g.num_rows = p.num_rows;
    g.max_sms = max_sms;
    g.path = g_path;
    if (tickets) g.tickets.next = ticket.data();
    if (dgrad) {
      grouped_gemm_dgrad(g, d.weight_view(p), {d.dc.data(), p.dc.stride}, {c.data(), in}, nullptr);
    } else {
      grouped_gemm_forward(g, d.weight_view(p), {d.a.data(), p.a.stride}, {c.data(), out}, {},
                           GemmActivation::kNone, nullptr);
    }
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return c.get();
  };
  for (const bool dgrad : {false, true}) {
    const auto whole = run({kLead, kLead + rows}, {}, 0, dgrad);
    std::vector<std::int64_t> ones;
    for (std::int64_t i = 0; i <= 400; ++i) ones.push_back(kLead + i);
    ones.push_back(kLead + rows);
    EXPECT_EQ(whole, run(ones, {}, 0, dgrad));
    std::vector<std::int64_t> few = {kLead};
    while (few.back() < kLead + rows) few.push_back(std::min(few.back() + 61, kLead + rows));
    EXPECT_EQ(whole, run(few, {}, 0, dgrad));
    const std::vector<std::int64_t> some = {kLead,      kLead + 7,   kLead + 7,
                                            kLead + 90, kLead + 347, kLead + rows};
    EXPECT_EQ(whole, run(some, {4, 0, 3, 1, 2}, 0, dgrad));
    EXPECT_EQ(whole, run(some, {}, 2, dgrad));
    EXPECT_EQ(whole, run(ones, {}, 0, dgrad, true));
    EXPECT_EQ(whole, run(few, {}, 0, dgrad, true));
    EXPECT_EQ(whole, run(some, {4, 0, 3, 1, 2}, 6, dgrad, true));
    EXPECT_EQ(ticket.get()[0], 0u);
  }
}

TEST_P(GroupedGemmCuda, CapturedGraphReadsNewSizes) {
  Problem p({100, 30, 0, 200}, 256, 192, 19);
  OnDevice d(p);
  DeviceArray<std::uint16_t> c(poisoned(p.num_rows, p.out));
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  grouped_gemm_forward(d.groups(p), d.weight_view(p), {d.a.data(), p.a.stride}, {c.data(), p.out}, {},
                       GemmActivation::kNone, stream);
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  const Reference reference(p);
  for (const auto& sizes : {p.sizes, std::vector<std::int64_t>{0, 0, 257, 73}}) {
    p.sizes = sizes;
    p.group_ptr = {kLead};
    for (std::int64_t size : sizes) p.group_ptr.push_back(p.group_ptr.back() + size);
    d.group_ptr.put(p.group_ptr);
    c.put(poisoned(p.num_rows, p.out));
    CUDA_OK(cudaGraphLaunch(exec, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    expect_rows(p, c.get(), p.out, p.out, static_cast<double>(p.in), "replay",
                [&](std::int64_t row, int g, std::vector<double>& e) { reference.forward(row, g, e); });
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_P(GroupedGemmCuda, TilesWaitForTheirRows) {
  Problem p({300, 0, 129, 500}, 256, 640, 20);
  OnDevice d(p);
  constexpr int kRowsPerFlag = 64;
  const auto num_flags = static_cast<std::size_t>((p.num_rows + kRowsPerFlag - 1) / kRowsPerFlag);
  DeviceArray<std::uint32_t> flags(std::vector<std::uint32_t>(num_flags, 6));
  DeviceArray<WaitDiagnosis> diagnosis(std::vector<WaitDiagnosis>(1));
  DeviceArray<std::uint16_t> c(poisoned(p.num_rows, p.out));
  DeviceArray<std::int32_t> order({3, 0, 2, 1});
  d.a.put(poisoned(p.num_rows, p.a.stride));  // nothing there yet
  cudaStream_t stream, arrivals;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA_OK(cudaStreamCreateWithFlags(&arrivals, cudaStreamNonBlocking));
  GemmGroups groups = d.groups(p);
  groups.order = order.data();
  groups.arrival = {flags.data(), kRowsPerFlag, 7, 5'000'000'000, diagnosis.data()};
  grouped_gemm_forward(groups, d.weight_view(p), {d.a.data(), p.a.stride}, {c.data(), p.out}, {},
                       GemmActivation::kNone, stream);
  const std::uint32_t arrived = 7;
  for (std::size_t i = num_flags; i-- > 0;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::int64_t first = static_cast<std::int64_t>(i) * kRowsPerFlag;
    const std::int64_t rows = std::min<std::int64_t>(kRowsPerFlag, p.num_rows - first);
    CUDA_OK(cudaMemcpyAsync(d.a.data() + first * p.a.stride, p.a.bits.data() + first * p.a.stride,
                            static_cast<std::size_t>(rows * p.a.stride) * 2, cudaMemcpyHostToDevice,
                            arrivals));
    CUDA_OK(cudaMemcpyAsync(flags.data() + i, &arrived, 4, cudaMemcpyHostToDevice, arrivals));
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  EXPECT_EQ(diagnosis.get()[0].expired, 0u);
  const Reference reference(p);
  expect_rows(p, c.get(), p.out, p.out, static_cast<double>(p.in), "rows that arrived",
              [&](std::int64_t row, int g, std::vector<double>& e) { reference.forward(row, g, e); });

  // One flag never comes: the call ends by its deadline and says which.
  std::vector<std::uint32_t> late(num_flags, 7);
  late[5] = 6;
  flags.put(late);
  groups.arrival.timeout_ns = 20'000'000;
  const auto start = std::chrono::steady_clock::now();
  grouped_gemm_forward(groups, d.weight_view(p), {d.a.data(), p.a.stride}, {c.data(), p.out}, {},
                       GemmActivation::kNone, stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
  const WaitDiagnosis record = diagnosis.get()[0];
  EXPECT_EQ(record.expired, 1u);
  EXPECT_EQ(record.flag_index, 5u);
  EXPECT_EQ(record.expected, 7u);
  EXPECT_EQ(record.observed, 6u);
  cudaStreamDestroy(arrivals);
  cudaStreamDestroy(stream);
}

// Rows in two places, some of them several times, and rows laid out by position: the same bits.
struct Gathered {
  Matrix first, second;
  std::vector<std::int32_t> index;
  // p.a becomes what the index says.
  Gathered(Problem& p, std::int64_t first_rows, std::int64_t second_rows)
      : first(first_rows, p.in, p.in + 16), second(second_rows, p.in, p.in + 8) {
    first.fill(p.random, 0, first_rows);
    second.fill(p.random, 0, second_rows);
    // What belongs to no group points nowhere.
    index.assign(static_cast<std::size_t>(p.num_rows), std::int32_t{0x7FFFFFFF});
    for (std::int64_t row = p.group_ptr.front(); row < p.group_ptr.back(); ++row) {
      const bool other = first_rows == 0 || (second_rows > 0 && p.random() % 3 == 0);
      const Matrix& from = other ? second : first;
      const auto at = static_cast<std::int64_t>(p.random() % static_cast<unsigned>(from.rows));
      index[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(other ? ~at : at);
      std::copy_n(from.bits.begin() + at * from.stride, p.in, p.a.bits.begin() + row * p.a.stride);
    }
  }
};

struct GatheredOnDevice {
  DeviceArray<std::int32_t> index;
  DeviceArray<std::uint16_t> first, second;
  GatheredRows rows;
  explicit GatheredOnDevice(const Gathered& g) : index(g.index), first(g.first.bits), second(g.second.bits) {
    rows.index = index.data();
    if (g.first.rows > 0) rows.first = {first.data(), g.first.stride};
    rows.first_rows = g.first.rows;
    if (g.second.rows > 0) rows.second = {second.data(), g.second.stride};
    rows.second_rows = g.second.rows;
  }
};

struct Outputs {
  DeviceArray<std::uint16_t> h, act;
  GemmRows h_rows, act_rows;
  Outputs(const Problem& p, GemmActivation kind, bool keep_h)
      : h(poisoned(p.num_rows, p.out + 8)), act(poisoned(p.num_rows, p.out + 24)) {
    if (keep_h || kind == GemmActivation::kNone) h_rows = {h.data(), p.out + 8};
    if (kind != GemmActivation::kNone) act_rows = {act.data(), p.out + 24};
  }
};

enum class Take { kShares, kTickets, kTwoLaunches };

void expect_same_bits_gathered(Problem p, GemmActivation kind, bool keep_h, Take take,
                               std::int64_t first_rows = 50, std::int64_t second_rows = 20) {
  SCOPED_TRACE("out " + std::to_string(p.out) + " in " + std::to_string(p.in) + " activation " +
               std::to_string(static_cast<int>(kind)) + " h " + std::to_string(keep_h) + " take " +
               std::to_string(static_cast<int>(take)));
  const Gathered gathered(p, first_rows, second_rows);
  OnDevice d(p);
  GatheredOnDevice rows(gathered);
  Outputs want(p, kind, keep_h), got(p, kind, keep_h);
  DeviceArray<std::uint32_t> ticket({0});
  GemmGroups groups = d.groups(p);
  grouped_gemm_forward(groups, d.weight_view(p), {d.a.data(), p.a.stride}, want.h_rows, want.act_rows, kind,
                       nullptr);
  if (take != Take::kShares) groups.tickets.next = ticket.data();
  if (take == Take::kTwoLaunches) {
    groups.tickets.sms = 6;
    cudaStream_t streams[2];
    CUDA_OK(cudaDeviceSynchronize());
    for (int i = 0; i < 2; ++i) {
      CUDA_OK(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
      groups.max_sms = 2 + 2 * i;
      grouped_gemm_forward(groups, d.weight_view(p), rows.rows, got.h_rows, got.act_rows, kind, streams[i]);
    }
    CUDA_OK(cudaDeviceSynchronize());
    for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
  } else {
    grouped_gemm_forward(groups, d.weight_view(p), rows.rows, got.h_rows, got.act_rows, kind, nullptr);
  }
  CUDA_OK(cudaDeviceSynchronize());
  EXPECT_EQ(ticket.get()[0], 0u);
  const auto expect_equal = [&](const std::vector<std::uint16_t>& a, const std::vector<std::uint16_t>& b,
                                const char* what) {
    const auto at = std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin();
    if (at == static_cast<std::ptrdiff_t>(a.size())) return;
    const auto stride = static_cast<std::ptrdiff_t>(a.size()) / p.num_rows;
    ADD_FAILURE() << what << " differs first at row " << at / stride << " column " << at % stride << ": "
                  << a[static_cast<std::size_t>(at)] << ", " << b[static_cast<std::size_t>(at)];
  };
  expect_equal(want.h.get(), got.h.get(), "h");
  expect_equal(want.act.get(), got.act.get(), "act");
  // Against double sums too, where that is cheap: both could be wrong alike.
  if (kind == GemmActivation::kNone && p.num_rows < 1000) {
    const Reference reference(p);
    expect_rows(p, got.h.get(), p.out, p.out + 8, static_cast<double>(p.in), "h",
                [&](std::int64_t row, int g, std::vector<double>& e) { reference.forward(row, g, e); });
  }
}

TEST_P(GroupedGemmCuda, GatheredRowsGiveTheSameBits) {
  using A = GemmActivation;
  std::vector<std::int64_t> every(257);
  std::iota(every.begin(), every.end(), 1);
  for (const Take take : {Take::kShares, Take::kTickets, Take::kTwoLaunches}) {
    for (const bool keep_h : {true, false}) {
      expect_same_bits_gathered(Problem(kRagged, 256, 64, 30), A::kSwiGLU, keep_h, take);
      expect_same_bits_gathered(Problem({17, 0, 300}, 208, 576, 31), A::kSwiGLU, keep_h, take);
      expect_same_bits_gathered(Problem({17, 0, 300}, 264, 72, 32), A::kGelu, keep_h, take);
      expect_same_bits_gathered(Problem({17, 0, 300}, 264, 72, 33), A::kRelu, keep_h, take);
    }
    expect_same_bits_gathered(Problem(kRagged, 328, 136, 34), A::kNone, true, take);
    expect_same_bits_gathered(Problem({5, 70}, 8, 8, 35), A::kNone, true, take);
    expect_same_bits_gathered(Problem({1}, 16, 8, 36), A::kSwiGLU, true, take);
    expect_same_bits_gathered(Problem(every, 64, 64, 37), A::kNone, true, take);
    expect_same_bits_gathered(Problem({0, 0, 3000, 0}, 512, 64, 38), A::kNone, true, take);
    expect_same_bits_gathered(Problem({0, 0, 0}, 256, 64, 39), A::kNone, true, take);
    expect_same_bits_gathered(Problem({700, 1, 40}, 784, 1536, 40), A::kSwiGLU, true, take);
    expect_same_bits_gathered(Problem({700, 1, 40}, 784, 1608, 41), A::kSwiGLU, false, take);
    // All rows in one place; one row for all.
    expect_same_bits_gathered(Problem(kRagged, 256, 64, 42), A::kSwiGLU, false, take, 1, 0);
    expect_same_bits_gathered(Problem(kRagged, 256, 64, 43), A::kSwiGLU, false, take, 0, 33);
  }
}

TEST_P(GroupedGemmCuda, GatherFollowsNoIndexOutOfItsPlace) {
  Problem p({100, 30}, 256, 128, 44);
  Gathered gathered(p, 7, 3);
  const std::int64_t row = p.group_ptr.front() + 4;
  gathered.index[static_cast<std::size_t>(row)] = 7;
  gathered.index[static_cast<std::size_t>(row) + 1] = 0x7FFFFFFF;
  gathered.index[static_cast<std::size_t>(row) + 2] = ~3;
  gathered.index[static_cast<std::size_t>(row) + 3] = std::numeric_limits<std::int32_t>::min();
  for (int i = 0; i < 4; ++i) {
    const Matrix& from = i < 2 ? gathered.first : gathered.second;
    std::copy_n(from.bits.begin() + (from.rows - 1) * from.stride, p.in,
                p.a.bits.begin() + (row + i) * p.a.stride);
  }
  OnDevice d(p);
  GatheredOnDevice rows(gathered);
  Outputs got(p, GemmActivation::kNone, true);
  grouped_gemm_forward(d.groups(p), d.weight_view(p), rows.rows, got.h_rows, {}, GemmActivation::kNone,
                       nullptr);
  CUDA_OK(cudaDeviceSynchronize());
  const Reference reference(p);
  expect_rows(p, got.h.get(), p.out, p.out + 8, static_cast<double>(p.in), "h",
              [&](std::int64_t r, int g, std::vector<double>& e) { reference.forward(r, g, e); });
}

// Tiles of rows in the first place are done while the others' are waited for; two launches share the tiles, and the
// second one begins when those are there.
TEST_P(GroupedGemmCuda, GatheredTilesWaitForTheSecondPlace) {
  Problem p({300, 70, 129, 500}, 256, 640, 45);
  Gathered gathered(p, 200, 90);
  for (const bool comes : {true, false}) {
    OnDevice d(p);
    GatheredOnDevice rows(gathered);
    rows.second.put(poisoned(gathered.second.rows, gathered.second.stride));
    Outputs got(p, GemmActivation::kNone, true);
    DeviceArray<std::uint32_t> flag({6}), ticket({0});
    DeviceArray<WaitDiagnosis> diagnosis(std::vector<WaitDiagnosis>(1));
    cudaStream_t stream, arrivals;
    CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_OK(cudaStreamCreateWithFlags(&arrivals, cudaStreamNonBlocking));
    GemmGroups groups = d.groups(p);
    groups.max_sms = 4;
    groups.tickets = {ticket.data(), 8};
    groups.arrival = {flag.data(), 64, 7, comes ? 5'000'000'000u : 20'000'000u, diagnosis.data()};
    const auto start = std::chrono::steady_clock::now();
    const auto launch = [&](cudaStream_t on) {
      grouped_gemm_forward(groups, d.weight_view(p), rows.rows, got.h_rows, {}, GemmActivation::kNone, on);
    };
    launch(stream);
    if (comes) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      const std::uint32_t arrived = 7;
      CUDA_OK(cudaMemcpyAsync(rows.second.data(), gathered.second.bits.data(),
                              gathered.second.bits.size() * 2, cudaMemcpyHostToDevice, arrivals));
      CUDA_OK(cudaMemcpyAsync(flag.data(), &arrived, 4, cudaMemcpyHostToDevice, arrivals));
      launch(arrivals);
      CUDA_OK(cudaStreamSynchronize(arrivals));
    } else {
      launch(arrivals);
    }
    CUDA_OK(cudaDeviceSynchronize());
    EXPECT_EQ(ticket.get()[0], 0u);
    const WaitDiagnosis record = diagnosis.get()[0];
    if (comes) {
      EXPECT_EQ(record.expired, 0u);
      const Reference reference(p);
      expect_rows(p, got.h.get(), p.out, p.out + 8, static_cast<double>(p.in), "rows that arrived",
                  [&](std::int64_t row, int g, std::vector<double>& e) { reference.forward(row, g, e); });
    } else {
      EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
      EXPECT_EQ(record.expired, 1u);
      EXPECT_EQ(record.flag_index, 0u);
      EXPECT_EQ(record.expected, 7u);
      EXPECT_EQ(record.observed, 6u);
    }
    cudaStreamDestroy(arrivals);
    cudaStreamDestroy(stream);
  }
}

// Arguments are checked before the device is asked for, so this runs anywhere.
TEST(GroupedGemmCudaArguments, Refusals) {
  alignas(16) static std::uint16_t memory[64];
  alignas(16) static std::int64_t group_ptr[2];
  GemmGroups groups;
  groups.group_ptr = group_ptr;
  groups.num_groups = 1;
  groups.num_rows = 1;
  const GemmWeights weights{memory, 1, 64, 8, 8};
  const auto code = [&](const GemmGroups& g, const GemmWeights& w, ConstGemmRows a, GemmRows h) {
    try {
      grouped_gemm_forward(g, w, a, h, {}, GemmActivation::kNone, nullptr);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const auto expect_names = [](const std::string& text, const char* name) {
    EXPECT_NE(text.find("invalid argument"), std::string::npos) << text;
    EXPECT_NE(text.find(name), std::string::npos) << text;
  };
  GemmWeights w = weights;
  w.in = 12;
  expect_names(code(groups, w, {memory, 16}, {memory, 8}), "in is 12");
  w = weights;
  w.stride = 60;
  expect_names(code(groups, w, {memory, 8}, {memory, 8}), "60 elements");
  expect_names(code(groups, weights, {memory, 12}, {memory, 8}), "row stride 12 of a");
  expect_names(code(groups, weights, {memory + 1, 8}, {memory, 8}), "a is not 16-byte aligned");
  expect_names(code(groups, weights, {memory, 8}, {}), "neither h nor act");
  GemmGroups g = groups;
  g.num_groups = kMaxGemmGroups + 1;
  expect_names(code(g, weights, {memory, 8}, {memory, 8}), "num_groups is 513");
  g = groups;
  g.max_sms = 3;
  expect_names(code(g, weights, {memory, 8}, {memory, 8}), "max_sms is 3");

  alignas(16) static std::int32_t index[1];
  alignas(16) static std::uint32_t ticket[1];
  const auto gathered = [&](GemmGroups of, const GatheredRows& a, const GemmTickets& tickets) {
    of.tickets = tickets;
    try {
      grouped_gemm_forward(of, weights, a, {memory, 8}, {}, GemmActivation::kNone, nullptr);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  expect_names(gathered(groups, {nullptr, {memory, 8}, 1, {}, 0}, {}), "index of gathered rows is null");
  expect_names(gathered(groups, {index, {memory, 8}, 0, {}, 0}, {}), "no rows to gather from");
  expect_names(gathered(groups, {index, {memory, 8}, 1, {memory, 12}, 1}, {}), "row stride 12 of a.second");
  expect_names(gathered(groups, {index, {memory, 8}, -1, {}, 0}, {}), "-1 rows in a.first");
  expect_names(gathered(groups, {index, {memory, 8}, 1, {}, 0}, {ticket, 4}), "tickets.sms is 4");
}

INSTANTIATE_TEST_SUITE_P(Paths, GroupedGemmCuda, testing::Values(GemmPath::kBest, GemmPath::kPortable),
                         [](const testing::TestParamInfo<GemmPath>& path) {
                           return path.param == GemmPath::kBest ? "Best" : "Portable";
                         });

}  // namespace
}  // namespace sluice::kernels::cuda
