// Grouped GEMM on the device against double sums of the same rounded inputs. Every output is NaN before the call;
// rows and columns that belong to no group keep their canary; rows of no group are NaN in the inputs.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
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

void check_wgrad(const Problem& p, int max_sms = 0) {
  OnDevice d(p);
  GemmGroups groups = d.groups(p);
  groups.max_sms = max_sms;
  const std::int64_t stride = p.out * p.in + 12;
  std::vector<float> start(static_cast<std::size_t>(stride * p.groups()));
  for (std::size_t i = 0; i < start.size(); ++i) start[i] = static_cast<float>(i % 17) - 8.0f;
  DeviceArray<float> grads(start);
  grouped_gemm_wgrad(groups, {d.dc.data(), p.dc.stride}, p.out, {d.a.data(), p.a.stride}, p.in, grads.data(),
                     stride, nullptr);
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
      const double expected = start[at] + (i < p.out * p.in ? want[static_cast<std::size_t>(i)] : 0.0);
      const bool exact = i >= p.out * p.in || scale == 0;
      if (!(std::abs(got[at] - expected) <= (exact ? 0.0 : 1e-5 + 2e-6 * scale)) && ++bad < 5)
        ADD_FAILURE() << "gradient " << i << " of group " << g << ": " << got[at] << ", expected "
                      << expected;
    }
  }
  EXPECT_EQ(bad, 0);
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
}

// A row's result has the same bits alone, in a large group, in any tile, in any order and on any number of processors.
TEST_P(GroupedGemmCuda, RowsAreIndependent) {
  const std::int64_t rows = 700, out = 512, in = 1024;
  Problem p({rows}, out, in, 18);
  OnDevice d(p);
  const auto run = [&](const std::vector<std::int64_t>& ptr, std::vector<std::int32_t> order, int max_sms,
                       bool dgrad) {
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
}

INSTANTIATE_TEST_SUITE_P(Paths, GroupedGemmCuda, testing::Values(GemmPath::kBest, GemmPath::kPortable),
                         [](const testing::TestParamInfo<GemmPath>& path) {
                           return path.param == GemmPath::kBest ? "Best" : "Portable";
                         });

}  // namespace
}  // namespace sluice::kernels::cuda
