// The GEMM contract: bitwise equality with the scalar reference over row counts, ragged groups, indices,
// dtypes, instruction sets and thread counts.
#include <algorithm>
#include <numeric>

#include "kernels_test_util.hpp"

namespace sluice::kernels {
namespace {

struct Case {
  std::vector<std::int64_t> group_ptr;
  std::vector<Matrix> weights;  // [out_cols, in_cols] a group
  std::vector<std::int32_t> index;
  Matrix a, dc;
  std::int64_t out_cols, in_cols;

  std::int64_t end() const { return group_ptr.back(); }
  Groups groups() {
    bases.clear();
    for (const Matrix& w : weights) bases.push_back(w.data());
    return {group_ptr, bases};
  }

 private:
  std::vector<const std::byte*> bases;
};

std::vector<std::int64_t> ptr_of(const std::vector<std::int64_t>& sizes, std::int64_t start) {
  std::vector<std::int64_t> ptr{start};
  for (const std::int64_t n : sizes) ptr.push_back(ptr.back() + n);
  return ptr;
}

Case make_case(const std::vector<std::int64_t>& sizes, std::int64_t out_cols, std::int64_t in_cols,
               DType dtype, DType weight_dtype, bool indexed, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Case c;
  c.group_ptr = ptr_of(sizes, indexed ? 3 : 0);
  c.out_cols = out_cols;
  c.in_cols = in_cols;
  for (std::size_t g = 0; g < sizes.size(); ++g)
    c.weights.push_back(Matrix(weight_dtype, out_cols, in_cols).fill_random(random));
  const std::int64_t source_rows = indexed ? c.end() / 2 + 1 : c.end();
  c.a = Matrix(dtype, source_rows, in_cols, 5);
  c.a.fill_random(random);
  c.dc = Matrix(dtype, source_rows, out_cols, 3);
  c.dc.fill_random(random);
  if (indexed) {
    std::uniform_int_distribution<std::int32_t> pick(0, static_cast<std::int32_t>(source_rows - 1));
    c.index.resize(static_cast<std::size_t>(c.end()));
    for (auto& i : c.index) i = pick(random);
  }
  return c;
}

// Forward results of one implementation; `h` is kept, `act` from its own call without h.
void forward(Kernels& kernels, Case& c, Activation activation, Matrix& h, Matrix& act) {
  kernels.grouped_gemm_forward(c.groups(), c.a, c.index,
                               c.weights.empty() ? DType::kF32 : ConstMatrixView(c.weights[0]).dtype,
                               c.out_cols, activation, h, act);
}

void expect_all_equal(Case& c, DType dtype, bool with_slow = true) {
  const auto reference = make_reference_kernels();
  const DType weight_dtype = ConstMatrixView(c.weights[0]).dtype;
  const std::int64_t begin = c.group_ptr.front(), end = c.end();
  const std::int64_t ffn = c.out_cols / 2;
  Matrix want_h(dtype, end, c.out_cols), want_da(dtype, end, c.in_cols);
  std::mt19937_64 random(kSeed + 1);
  std::vector<Matrix> want_grads, start_grads;
  for (std::size_t g = 0; g < c.weights.size(); ++g)
    start_grads.push_back(Matrix(DType::kF32, c.out_cols, c.in_cols).fill_random(random));
  want_grads = start_grads;
  const auto bases = [](std::vector<Matrix>& grads) {
    std::vector<float*> out;
    for (Matrix& m : grads) out.push_back(m.floats());
    return out;
  };
  reference->grouped_gemm_forward(c.groups(), c.a, c.index, weight_dtype, c.out_cols, Activation::kRelu,
                                  want_h, {});
  reference->grouped_gemm_dgrad(c.groups(), c.dc, c.index, weight_dtype, want_da);
  reference->grouped_gemm_wgrad(c.group_ptr, c.dc, c.index, c.a, c.index, bases(want_grads));
  // fp32 h, from which the activation inside the GEMM must come (it is applied before rounding).
  Matrix full_h(DType::kF32, end, c.out_cols);
  reference->grouped_gemm_forward(c.groups(), c.a, c.index, weight_dtype, c.out_cols, Activation::kRelu,
                                  full_h, {});

  for (auto& [name, kernels, slow] : all_implementations()) {
    if (slow && !with_slow) continue;
    SCOPED_TRACE(name);
    Matrix h(dtype, end, c.out_cols, 2), da(dtype, end, c.in_cols, 1);
    kernels->grouped_gemm_forward(c.groups(), c.a, c.index, weight_dtype, c.out_cols, Activation::kRelu, h,
                                  {});
    ASSERT_TRUE(same_rows(h, want_h, begin, end)) << "forward";
    ASSERT_TRUE(untouched(h, 0, begin));
    kernels->grouped_gemm_dgrad(c.groups(), c.dc, c.index, weight_dtype, da);
    ASSERT_TRUE(same_rows(da, want_da, begin, end)) << "dgrad";
    ASSERT_TRUE(untouched(da, 0, begin));
    std::vector<Matrix> grads = start_grads;
    kernels->grouped_gemm_wgrad(c.group_ptr, c.dc, c.index, c.a, c.index, bases(grads));
    for (std::size_t g = 0; g < grads.size(); ++g)
      ASSERT_TRUE(same_matrix(grads[g], want_grads[g])) << "wgrad " << g;

    for (const Activation activation : {Activation::kSwiGLU, Activation::kGelu, Activation::kRelu}) {
      if (activation == Activation::kSwiGLU && c.out_cols % 2) continue;
      const std::int64_t act_cols = activation == Activation::kSwiGLU ? ffn : c.out_cols;
      Matrix act(dtype, end, act_cols, 4), alone(dtype, end, act_cols), want(dtype, end, act_cols);
      Matrix kept(dtype, end, c.out_cols);
      kernels->activation_forward(activation, full_h, want, begin, end);
      forward(*kernels, c, activation, kept, act);
      ASSERT_TRUE(same_rows(kept, want_h, begin, end)) << "h beside act";
      ASSERT_TRUE(same_rows(act, want, begin, end)) << "act";
      kernels->grouped_gemm_forward(c.groups(), c.a, c.index, weight_dtype, c.out_cols, activation, {},
                                    alone);
      ASSERT_TRUE(same_rows(alone, want, begin, end)) << "act without h";
    }
  }
}

TEST(GroupedGemm, RaggedGroups) {
  const std::vector<std::vector<std::int64_t>> shapes = {
      {1}, {0, 1, 0}, {5, 0, 1, 13, 2}, {0, 0, 61, 0}, {14, 15, 16, 28, 29, 3}};
  for (const auto& sizes : shapes) {
    for (const bool indexed : {false, true}) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        SCOPED_TRACE(testing::Message() << "groups " << testing::PrintToString(sizes) << " indexed "
                                        << indexed << " " << to_string(dtype));
        Case c = make_case(sizes, 46, 37, dtype, dtype, indexed, kSeed);
        expect_all_equal(c, dtype);
      }
    }
  }
}

TEST(GroupedGemm, OddShapes) {
  // Around every edge of the blocking: panel widths, k blocks, columns of a task.
  const std::pair<std::int64_t, std::int64_t> shapes[] = {
      {1, 1}, {2, 17}, {33, 31}, {64, 65}, {130, 129}, {257, 5}, {5, 257}, {6, 385}, {386, 800}, {16, 384}};
  for (const auto& [out_cols, in_cols] : shapes) {
    SCOPED_TRACE(testing::Message() << "weights [" << out_cols << ", " << in_cols << "]");
    Case c = make_case({7, 0, 17}, out_cols, in_cols, DType::kF32, DType::kF32, true, kSeed);
    expect_all_equal(c, DType::kF32, out_cols * in_cols < 20000);
  }
}

TEST(GroupedGemm, MixedDtypes) {
  Case c = make_case({9, 4}, 50, 70, DType::kF32, DType::kBF16, false, kSeed);
  expect_all_equal(c, DType::kBF16);
  Case d = make_case({9, 4}, 50, 70, DType::kBF16, DType::kF32, false, kSeed);
  expect_all_equal(d, DType::kF32);
}

// Sanitizers make every access ten times slower: some row counts are enough for them.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// The result of a row does not depend on how many rows there are.
TEST(GroupedGemm, EveryRowCount) {
  constexpr std::int64_t kRows = 257, kOut = 70, kIn = 401;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Case all = make_case({kRows}, kOut, kIn, dtype, dtype, false, kSeed);
    const auto reference = make_reference_kernels();
    Matrix want_h(dtype, kRows, kOut), want_da(dtype, kRows, kIn);
    reference->grouped_gemm_forward(all.groups(), all.a, {}, dtype, kOut, Activation::kRelu, want_h, {});
    reference->grouped_gemm_dgrad(all.groups(), all.dc, {}, dtype, want_da);
    Matrix grads_from(DType::kF32, kOut, kIn);
    std::mt19937_64 random(kSeed);
    grads_from.fill_random(random);

    for (auto& [name, kernels, slow] : all_implementations()) {
      Matrix want_grads = grads_from;
      for (std::int64_t rows = 1; rows <= kRows; ++rows) {
        // The reference adds one more row to what it had: the gradient of `rows` rows.
        reference->grouped_gemm_wgrad(std::vector<std::int64_t>{rows - 1, rows}, all.dc, {}, all.a, {},
                                      std::vector<float*>{want_grads.floats()});
        if ((slow || kSanitized) && rows > 20 && rows % 63 != 0) continue;
        SCOPED_TRACE(testing::Message() << name << " " << to_string(dtype) << " rows " << rows);
        Case c = all;
        c.group_ptr = {0, rows};
        Matrix h(dtype, rows, kOut), da(dtype, rows, kIn), grads = grads_from;
        kernels->grouped_gemm_forward(c.groups(), c.a, {}, dtype, kOut, Activation::kRelu, h, {});
        ASSERT_TRUE(same_rows(h, want_h, 0, rows));
        kernels->grouped_gemm_dgrad(c.groups(), c.dc, {}, dtype, da);
        ASSERT_TRUE(same_rows(da, want_da, 0, rows));
        kernels->grouped_gemm_wgrad(c.group_ptr, c.dc, {}, c.a, {}, std::vector<float*>{grads.floats()});
        ASSERT_TRUE(same_matrix(grads, want_grads));
      }
    }
  }
}

// One big group and many small ones: more than one block of rows, more blocks than threads.
TEST(GroupedGemm, SkewedGroups) {
  Case c = make_case({3, 1000, 1, 0, 40, 2, 9}, 40, 24, DType::kF32, DType::kF32, true, kSeed);
  expect_all_equal(c, DType::kF32);
}

// Panels of whole width that are read where they lie, and, in the first shape, groups that are too tall for it.
TEST(GroupedGemm, PanelsReadInPlace) {
  const std::pair<std::int64_t, std::int64_t> shapes[] = {{224, 1056}, {96, 64}};
  for (const auto& [out_cols, in_cols] : shapes) {
    SCOPED_TRACE(testing::Message() << "weights [" << out_cols << ", " << in_cols << "]");
    Case c = make_case({250, 12, 0, 30, 400}, out_cols, in_cols, DType::kF32, DType::kF32, false, kSeed);
    expect_all_equal(c, DType::kF32, false);
  }
}

TEST(GroupedGemm, WgradOfRowsInTwoCallsIsTheSame) {
  constexpr std::int64_t kRows = 900, kOut = 35, kIn = 41;
  Case c = make_case({kRows}, kOut, kIn, DType::kF32, DType::kF32, true, kSeed);
  const std::int64_t first = c.group_ptr.front();
  for (auto& [name, kernels, slow] : all_implementations()) {
    if (slow) continue;
    SCOPED_TRACE(name);
    Matrix whole(DType::kF32, kOut, kIn);
    std::mt19937_64 random(kSeed);
    whole.fill_random(random);
    const Matrix start = whole;
    kernels->grouped_gemm_wgrad(c.group_ptr, c.dc, c.index, c.a, c.index,
                                std::vector<float*>{whole.floats()});
    for (const std::int64_t cut : {1, 5, 384, 400, 899}) {
      Matrix parts = start;
      for (const auto& [begin, end] : {std::pair{first, first + cut}, {first + cut, first + kRows}})
        kernels->grouped_gemm_wgrad(std::vector<std::int64_t>{begin, end}, c.dc, c.index, c.a, c.index,
                                    std::vector<float*>{parts.floats()});
      ASSERT_TRUE(same_matrix(parts, whole)) << "cut at " << cut;
    }
  }
}

TEST(GroupedGemm, NoRowsAtAll) {
  const auto kernels = make_cpu_kernels(2);
  const std::vector<std::int64_t> ptr{4, 4, 4};
  const std::vector<const std::byte*> weights{nullptr, nullptr};
  kernels->grouped_gemm_forward({ptr, weights}, {}, {}, DType::kF32, 8, Activation::kRelu, {}, {});
  kernels->grouped_gemm_dgrad({ptr, weights}, {}, {}, DType::kF32, {});
  kernels->grouped_gemm_wgrad(ptr, {}, {}, {}, {}, std::vector<float*>{nullptr, nullptr});
  const std::vector<std::int64_t> none{0};
  kernels->grouped_gemm_forward({none, {}}, {}, {}, DType::kF32, 8, Activation::kRelu, {}, {});
}

// dgrad is the transpose of forward: <dgrad(dc), a> = <dc, forward(a)>, and wgrad too: <wgrad, W> = <dc,
// forward(a)>.
TEST(GroupedGemm, Adjoint) {
  Case c = make_case({20, 0, 7, 33}, 60, 44, DType::kF32, DType::kF32, false, kSeed);
  const auto kernels = make_cpu_kernels(2);
  Matrix h(DType::kF32, c.end(), c.out_cols), da(DType::kF32, c.end(), c.in_cols);
  kernels->grouped_gemm_forward(c.groups(), c.a, {}, DType::kF32, c.out_cols, Activation::kRelu, h, {});
  kernels->grouped_gemm_dgrad(c.groups(), c.dc, {}, DType::kF32, da);
  std::vector<std::vector<float>> grads(
      c.weights.size(), std::vector<float>(static_cast<std::size_t>(c.out_cols * c.in_cols), 0.0f));
  std::vector<float*> bases;
  for (auto& g : grads) bases.push_back(g.data());
  kernels->grouped_gemm_wgrad(c.group_ptr, c.dc, {}, c.a, {}, bases);
  double left = 0, right = 0, scale = 0, by_weights = 0;
  for (std::int64_t p = 0; p < c.end(); ++p) {
    for (std::int64_t i = 0; i < c.in_cols; ++i) left += static_cast<double>(da.get(p, i)) * c.a.get(p, i);
    for (std::int64_t o = 0; o < c.out_cols; ++o) {
      right += static_cast<double>(h.get(p, o)) * c.dc.get(p, o);
      scale += std::abs(static_cast<double>(h.get(p, o)) * c.dc.get(p, o));
    }
  }
  for (std::size_t g = 0; g < grads.size(); ++g)
    for (std::int64_t o = 0; o < c.out_cols; ++o)
      for (std::int64_t i = 0; i < c.in_cols; ++i)
        by_weights += static_cast<double>(grads[g][static_cast<std::size_t>(o * c.in_cols + i)]) *
                      c.weights[g].get(o, i);
  EXPECT_TRUE(std::abs(left - right) <= 1e-5 * scale) << left << " " << right;
  EXPECT_TRUE(std::abs(by_weights - right) <= 1e-5 * scale) << by_weights << " " << right;
}

TEST(GroupedGemm, ScratchGrowsOnlyOnce) {
  const auto kernels = make_cpu_kernels(2);
  Case c = make_case({100, 3}, 64, 96, DType::kF32, DType::kF32, false, kSeed);
  Matrix h(DType::kF32, c.end(), c.out_cols), da(DType::kF32, c.end(), c.in_cols), g0(DType::kF32, 64, 96),
      g1(DType::kF32, 64, 96);
  const auto all = [&] {
    kernels->grouped_gemm_forward(c.groups(), c.a, {}, DType::kF32, c.out_cols, Activation::kRelu, h, {});
    kernels->grouped_gemm_dgrad(c.groups(), c.dc, {}, DType::kF32, da);
    kernels->grouped_gemm_wgrad(c.group_ptr, c.dc, {}, c.a, {},
                                std::vector<float*>{g0.floats(), g1.floats()});
  };
  EXPECT_EQ(kernels->scratch_bytes(), 0);
  all();
  const std::int64_t bytes = kernels->scratch_bytes();
  EXPECT_GT(bytes, 0);
  all();
  EXPECT_EQ(kernels->scratch_bytes(), bytes);
}

TEST(GroupedGemm, MisuseIsNamed) {
  const auto kernels = make_cpu_kernels(1);
  Case c = make_case({4}, 8, 6, DType::kF32, DType::kF32, false, kSeed);
  Matrix h(DType::kF32, 4, 8), narrow(DType::kF32, 4, 7), few(DType::kF32, 3, 8);
  const auto message = [&](MatrixView out, MatrixView act) -> std::string {
    try {
      kernels->grouped_gemm_forward(c.groups(), c.a, {}, DType::kF32, 8, Activation::kSwiGLU, out, act);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      return e.message();
    }
    return "";
  };
  EXPECT_EQ(message(h, {}), "");
  EXPECT_NE(message({}, {}).find("h and act are both null"), std::string::npos);
  EXPECT_NE(message(narrow, {}).find("h has shape [4, 7]"), std::string::npos);
  EXPECT_NE(message(few, {}).find("h has 3 rows"), std::string::npos);
  EXPECT_NE(message(h, narrow).find("act has shape"), std::string::npos);
  const std::vector<std::int32_t> short_index{0, 1};
  EXPECT_THROW(kernels->grouped_gemm_dgrad(c.groups(), c.dc, short_index, DType::kF32, h), Error);
  c.group_ptr = {4, 0};
  EXPECT_NE(message(h, {}).find("group_ptr[1] is 0"), std::string::npos);
}

}  // namespace
}  // namespace sluice::kernels
