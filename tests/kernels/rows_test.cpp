// Moving and reducing rows, activations and the optimizer: bitwise against the reference where the operations
// are promised, within a few ulp where a transcendental is involved, and the same bits on every instruction
// set.
#include <algorithm>
#include <cmath>

#include "kernels_test_util.hpp"

namespace sluice::kernels {
namespace {

constexpr DType kDtypes[] = {DType::kF32, DType::kBF16};
constexpr std::int64_t kCols[] = {1, 3, 8, 15, 16, 17, 64, 127, 300};
constexpr Activation kActivations[] = {Activation::kSwiGLU, Activation::kGelu, Activation::kRelu};

TEST(Rows, Gather) {
  std::mt19937_64 random(kSeed);
  for (const DType dtype : kDtypes) {
    for (const std::int64_t cols : kCols) {
      const Matrix first = Matrix(dtype, 5, cols, 2).fill_random(random),
                   second = Matrix(dtype, 700, cols).fill_random(random);
      std::vector<std::int32_t> index(900);
      std::uniform_int_distribution<std::int32_t> pick(0, 704);
      for (auto& i : index) i = pick(random);
      Matrix want(dtype, 900, cols);
      make_reference_kernels()->gather_rows(first, second, index, want);
      for (auto& [name, kernels, slow] : all_implementations()) {
        Matrix got(dtype, 900, cols, 1);
        kernels->gather_rows(first, second, index, got);
        ASSERT_TRUE(same_matrix(got, want)) << name << " cols " << cols;
      }
    }
  }
  // Nothing to gather, and nothing in the second part.
  make_cpu_kernels(1)->gather_rows({}, {}, {}, {});
  const Matrix only = Matrix(DType::kF32, 2, 4).fill_random(random);
  Matrix got(DType::kF32, 1, 4);
  make_cpu_kernels(1)->gather_rows(only, {}, std::vector<std::int32_t>{1}, got);
  EXPECT_EQ(got.get(0, 3), only.get(1, 3));
}

TEST(Rows, Convert) {
  std::mt19937_64 random(kSeed);
  for (const DType source : kDtypes)
    for (const DType target : kDtypes)
      for (const std::int64_t cols : kCols) {
        const Matrix src = Matrix(source, 40, cols, 3).fill_random(random);
        Matrix want(target, 40, cols);
        make_reference_kernels()->convert_rows(src, want);
        for (auto& [name, kernels, slow] : all_implementations()) {
          Matrix got(target, 40, cols, 1);
          kernels->convert_rows(src, got);
          ASSERT_TRUE(same_matrix(got, want)) << name << " cols " << cols;
        }
      }
}

TEST(Rows, Dots) {
  std::mt19937_64 random(kSeed);
  for (const DType a_dtype : kDtypes)
    for (const DType b_dtype : kDtypes)
      for (const std::int64_t cols : kCols) {
        const Matrix a = Matrix(a_dtype, 30, cols, 1).fill_random(random),
                     b = Matrix(b_dtype, 40, cols).fill_random(random);
        std::vector<std::int32_t> index(25);
        for (auto& i : index) i = std::uniform_int_distribution<std::int32_t>(0, 29)(random);
        std::vector<float> want(25, std::nanf("")), got(25, std::nanf(""));
        make_reference_kernels()->row_dots(a, index, b, {}, want);
        double exact = 0;
        for (std::int64_t c = 0; c < cols; ++c) exact += double(a.get(index[3], c)) * double(b.get(3, c));
        EXPECT_NEAR(want[3], exact, 1e-4 * double(cols));
        for (auto& [name, kernels, slow] : all_implementations()) {
          kernels->row_dots(a, index, b, {}, got);
          for (std::size_t i = 0; i < want.size(); ++i)
            ASSERT_EQ(got[i], want[i]) << name << " cols " << cols;
        }
      }
}

TEST(Rows, WeightedReduce) {
  std::mt19937_64 random(kSeed);
  constexpr std::int64_t kRows = 300;
  for (const DType source : kDtypes) {
    for (const DType target : kDtypes) {
      for (const std::int64_t cols : kCols) {
        const Matrix src = Matrix(source, 50, cols, 3).fill_random(random);
        std::vector<std::int64_t> row_ptr{2};
        for (std::int64_t r = 0; r < kRows; ++r)
          row_ptr.push_back(row_ptr.back() + std::uniform_int_distribution<std::int64_t>(0, 5)(random));
        std::vector<std::int32_t> position(static_cast<std::size_t>(row_ptr.back()));
        std::vector<float> weight(position.size());
        for (auto& p : position) p = std::uniform_int_distribution<std::int32_t>(0, 49)(random);
        for (auto& w : weight) w = std::normal_distribution<float>()(random);
        for (const bool weighted : {false, true}) {
          const std::span<const float> w =
              weighted ? std::span<const float>(weight) : std::span<const float>();
          Matrix want(target, kRows, cols);
          make_reference_kernels()->weighted_reduce(src, row_ptr, position, w, want);
          for (auto& [name, kernels, slow] : all_implementations()) {
            Matrix got(target, kRows, cols, 1);
            kernels->weighted_reduce(src, row_ptr, position, w, got);
            ASSERT_TRUE(same_matrix(got, want)) << name << " cols " << cols;
          }
        }
      }
    }
  }
}

TEST(Rows, WeightedReduceKeepsNegativeZero) {
  // The sum starts from the first term, so a single -0 stays; an empty sum is +0.
  Matrix src(DType::kF32, 1, 2), out(DType::kF32, 2, 2);
  src.set(0, 0, -0.0f);
  src.set(0, 1, -0.0f);
  const std::vector<std::int64_t> row_ptr{0, 1, 1};
  make_cpu_kernels(1)->weighted_reduce(src, row_ptr, std::vector<std::int32_t>{0}, {}, out);
  EXPECT_TRUE(same_bits(out.get(0, 0), -0.0f));
  EXPECT_TRUE(same_bits(out.get(1, 1), 0.0f));
}

TEST(Rows, AddScaled) {
  std::mt19937_64 random(kSeed);
  for (const DType x_dtype : kDtypes) {
    for (const DType y_dtype : kDtypes) {
      for (const std::int64_t cols : kCols) {
        const Matrix x = Matrix(x_dtype, 200, cols, 1).fill_random(random),
                     y = Matrix(y_dtype, 200, cols, 2).fill_random(random);
        std::vector<float> scale(200);
        for (auto& s : scale) s = std::normal_distribution<float>()(random);
        Matrix want = y;
        make_reference_kernels()->add_scaled_rows(x, scale, want);
        for (auto& [name, kernels, slow] : all_implementations()) {
          Matrix got = y;
          kernels->add_scaled_rows(x, scale, got);
          ASSERT_TRUE(same_matrix(got, want)) << name << " cols " << cols;
        }
      }
    }
  }
}

TEST(Rows, Bf16RoundingIsThatOfDtype) {
  // Every rounding case through a reduce of one term: ties, denormals, overflow, infinities; NaN stays NaN.
  std::vector<float> values = {0.0f,
                               -0.0f,
                               1.0f,
                               1.00390625f,
                               1.01171875f,
                               3.3895314e38f,
                               3.4e38f,
                               1e-40f,
                               5e-41f,
                               std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::denorm_min(),
                               std::numeric_limits<float>::max()};
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 1000; ++i) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (!std::isnan(x)) values.push_back(x);
  }
  values.push_back(std::numeric_limits<float>::quiet_NaN());
  values.push_back(std::bit_cast<float>(0x7f800001u));
  const auto n = static_cast<std::int64_t>(values.size());
  Matrix src(DType::kF32, 1, n);
  for (std::int64_t i = 0; i < n; ++i) src.floats()[i] = values[static_cast<std::size_t>(i)];
  for (auto& [name, kernels, slow] : all_implementations()) {
    Matrix out(DType::kBF16, 1, n);
    kernels->weighted_reduce(src, std::vector<std::int64_t>{0, 1}, std::vector<std::int32_t>{0}, {}, out);
    for (std::int64_t i = 0; i < n; ++i) {
      const auto want = static_cast<float>(bf16(values[static_cast<std::size_t>(i)]));
      ASSERT_TRUE(std::isnan(want) ? std::isnan(out.get(0, i)) : same_bits(out.get(0, i), want))
          << name << ": " << values[static_cast<std::size_t>(i)] << " became " << out.get(0, i);
    }
  }
}

// Values that meet every branch: tiny, ordinary, saturating, and the exact zero.
Matrix activation_input(DType dtype, std::int64_t rows, std::int64_t cols, std::mt19937_64& random) {
  Matrix h = Matrix(dtype, rows, cols, 2).fill_random(random, 3.0f);
  const float special[] = {0.0f, -0.0f, 1e-30f, -1e-30f, 20.0f, -20.0f, 60.0f, -60.0f, 87.0f, -87.0f};
  for (std::int64_t i = 0; i < std::min<std::int64_t>(rows * cols, 10); ++i)
    h.set(i / cols, i % cols, special[i]);
  return h;
}

// Relative and absolute bounds against the reference. The GELU of a large negative value is e^-t times
// something, which multiplies the rounding of t by t; the tanh form of the reference loses it altogether
// there.
double relative_bound(DType dtype) {
  return dtype == DType::kF32 ? 3e-6 : 8e-3;
}
double absolute_bound(Activation activation) {
  return activation == Activation::kGelu ? 1e-9 : 1e-37;
}

TEST(Activation, ForwardIsCloseToTheReferenceAndTheSameEverywhere) {
  std::mt19937_64 random(kSeed);
  for (const Activation activation : kActivations) {
    for (const DType h_dtype : kDtypes) {
      for (const DType act_dtype : kDtypes) {
        for (const std::int64_t ffn : kCols) {
          constexpr std::int64_t kRows = 70, kBegin = 2, kEnd = 69;
          const Matrix h = activation_input(h_dtype, kRows, preactivation_cols(activation, ffn), random);
          Matrix want(act_dtype, kRows, ffn), first(act_dtype, kRows, ffn);
          make_reference_kernels()->activation_forward(activation, h, want, kBegin, kEnd);
          make_cpu_kernels(*portable_ops(), 1)->activation_forward(activation, h, first, kBegin, kEnd);
          ASSERT_TRUE(
              close_rows(first, want, kBegin, kEnd, relative_bound(act_dtype), absolute_bound(activation)))
              << static_cast<int>(activation);
          for (auto& [name, kernels, slow] : all_implementations()) {
            Matrix got(act_dtype, kRows, ffn, 1);
            kernels->activation_forward(activation, h, got, kBegin, kEnd);
            ASSERT_TRUE(same_rows(got, first, kBegin, kEnd)) << name << " ffn " << ffn;
            ASSERT_TRUE(untouched(got, 0, kBegin));
            ASSERT_TRUE(untouched(got, kEnd, kRows));
          }
        }
      }
    }
  }
}

// silu(x) * 1 over the whole range, in ulp of the true value: the error of the exponential, the division and
// two products.
TEST(Activation, AccuracyOverTheRange) {
  constexpr std::int64_t kN = 200000;
  Matrix h(DType::kF32, 1, 2 * kN), act(DType::kF32, 1, kN);
  for (std::int64_t i = 0; i < kN; ++i) {
    h.set(0, i, static_cast<float>(-87.0 + 174.0 * static_cast<double>(i) / kN));
    h.set(0, kN + i, 1.0f);
  }
  make_cpu_kernels(1)->activation_forward(Activation::kSwiGLU, h, act, 0, 1);
  double worst = 0.0;
  for (std::int64_t i = 0; i < kN; ++i) {
    const double x = h.get(0, i), want = x / (1.0 + std::exp(-x)), got = act.get(0, i);
    const double ulp = std::ldexp(1.0, std::ilogb(want == 0.0 ? 1.0 : want) - 23);
    worst = std::max(worst, std::abs(got - want) / ulp);
    ASSERT_TRUE(std::abs(got - want) <= 4.0 * ulp) << "x " << x << " got " << got << " want " << want;
  }
  RecordProperty("worst_ulp", std::to_string(worst));
}

TEST(Activation, ExtremesAndNaN) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const IsaOps* ops : all_isas()) {
    Matrix h(DType::kF32, 1, 4), act(DType::kF32, 1, 4);
    const float values[] = {-200.0f, 200.0f, inf, std::numeric_limits<float>::quiet_NaN()};
    for (int i = 0; i < 4; ++i) h.set(0, i, values[i]);
    for (const Activation activation : {Activation::kGelu, Activation::kRelu}) {
      make_cpu_kernels(*ops, 1)->activation_forward(activation, h, act, 0, 1);
      EXPECT_EQ(act.get(0, 0), 0.0f) << ops->name;
      EXPECT_EQ(act.get(0, 1), 200.0f) << ops->name;
      EXPECT_EQ(act.get(0, 2), inf) << ops->name;
      EXPECT_TRUE(std::isnan(act.get(0, 3))) << ops->name;
    }
  }
}

TEST(Activation, BackwardIsCloseToTheReferenceAndTheSameEverywhere) {
  std::mt19937_64 random(kSeed);
  constexpr std::int64_t kRows = 40, kBegin = 1, kEnd = 38;
  for (const Activation activation : kActivations) {
    for (const DType dtype : kDtypes) {
      for (const std::int64_t ffn : kCols) {
        const std::int64_t cols = preactivation_cols(activation, ffn);
        const Matrix h = activation_input(dtype, kRows, cols, random);
        const Matrix u = Matrix(dtype, kRows, ffn, 1).fill_random(random);
        std::vector<float> weight(kRows);
        for (auto& w : weight) w = std::normal_distribution<float>()(random);
        const float nan = std::numeric_limits<float>::quiet_NaN();
        std::vector<float> want_dw(kRows, nan), first_dw(kRows, nan);
        Matrix want_dh(dtype, kRows, cols), want_wa(dtype, kRows, ffn), first_dh = want_dh,
                                                                        first_wa = want_wa;
        make_reference_kernels()->activation_backward(activation, h, u, weight, want_dw, want_dh, want_wa,
                                                      kBegin, kEnd);
        make_cpu_kernels(*portable_ops(), 1)
            ->activation_backward(activation, h, u, weight, first_dw, first_dh, first_wa, kBegin, kEnd);
        // The slopes lose relative accuracy where they cross zero.
        ASSERT_TRUE(close_rows(first_dh, want_dh, kBegin, kEnd, relative_bound(dtype), 2e-6));
        ASSERT_TRUE(close_rows(first_wa, want_wa, kBegin, kEnd, relative_bound(dtype),
                               4 * absolute_bound(activation)));
        for (std::int64_t p = kBegin; p < kEnd; ++p) {
          double scale = 0.0;
          for (std::int64_t j = 0; j < ffn; ++j)
            scale += std::abs(u.get(p, j) * want_wa.get(p, j) / weight[static_cast<std::size_t>(p)]);
          const auto i = static_cast<std::size_t>(p);
          ASSERT_TRUE(std::abs(static_cast<double>(first_dw[i]) - want_dw[i]) <=
                      relative_bound(DType::kF32) * scale + 4 * absolute_bound(activation));
        }
        for (auto& [name, kernels, slow] : all_implementations()) {
          SCOPED_TRACE(testing::Message() << name << " ffn " << ffn);
          std::vector<float> dw(kRows, nan);
          Matrix dh(dtype, kRows, cols, 3), wa(dtype, kRows, ffn, 2);
          kernels->activation_backward(activation, h, u, weight, dw, dh, wa, kBegin, kEnd);
          ASSERT_TRUE(same_rows(dh, first_dh, kBegin, kEnd));
          ASSERT_TRUE(same_rows(wa, first_wa, kBegin, kEnd));
          ASSERT_TRUE(untouched(dh, 0, kBegin));
          ASSERT_TRUE(untouched(dh, kEnd, kRows));
          for (std::size_t p = 0; p < dw.size(); ++p) {
            const bool inside = p >= kBegin && p < kEnd;
            ASSERT_TRUE(inside ? same_bits(dw[p], first_dw[p]) && !std::isnan(dw[p]) : std::isnan(dw[p]))
                << "dw " << p;
          }
          // In place.
          Matrix h_inout = h, u_inout = u;
          std::vector<float> dw_inout(kRows, nan);
          kernels->activation_backward(activation, h_inout, u_inout, weight, dw_inout, h_inout, u_inout,
                                       kBegin, kEnd);
          ASSERT_TRUE(same_rows(h_inout, first_dh, kBegin, kEnd));
          ASSERT_TRUE(same_rows(u_inout, first_wa, kBegin, kEnd));
          ASSERT_TRUE(same_bits(dw_inout[kBegin], first_dw[kBegin]));
        }
      }
    }
  }
}

// dw is 16 interleaved FMA chains, added in order; its definition, evaluated here from wa with weight 1.
TEST(Activation, DwIsSixteenChains) {
  std::mt19937_64 random(kSeed);
  for (const std::int64_t ffn : kCols) {
    const Matrix h = Matrix(DType::kF32, 1, ffn).fill_random(random),
                 u = Matrix(DType::kF32, 1, ffn).fill_random(random);
    Matrix dh(DType::kF32, 1, ffn), a(DType::kF32, 1, ffn);
    std::vector<float> dw(1);
    make_cpu_kernels(1)->activation_backward(Activation::kGelu, h, u, std::vector<float>{1.0f}, dw, dh, a, 0,
                                             1);
    float lanes[16] = {};
    for (std::int64_t j = 0; j < ffn; ++j) lanes[j % 16] = std::fma(u.get(0, j), a.get(0, j), lanes[j % 16]);
    float want = lanes[0];
    for (int lane = 1; lane < 16; ++lane) want += lanes[lane];
    EXPECT_TRUE(same_bits(dw[0], want)) << "ffn " << ffn << ": " << dw[0] << " " << want;
  }
}

// Derivatives against central differences of the activation in double precision.
TEST(Activation, BackwardIsTheDerivative) {
  std::mt19937_64 random(kSeed);
  constexpr std::int64_t kFfn = 64;
  const auto value = [](Activation activation, double gate, double up) {
    if (activation == Activation::kSwiGLU) return gate / (1.0 + std::exp(-gate)) * up;
    if (activation == Activation::kRelu) return std::max(gate, 0.0);
    return 0.5 * gate *
           (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (gate + 0.044715 * gate * gate * gate)));
  };
  for (const Activation activation : kActivations) {
    const std::int64_t cols = preactivation_cols(activation, kFfn);
    const Matrix h = Matrix(DType::kF32, 1, cols).fill_random(random, 2.0f),
                 u = Matrix(DType::kF32, 1, kFfn).fill_random(random);
    const std::vector<float> weight{0.75f};
    std::vector<float> dw(1);
    Matrix dh(DType::kF32, 1, cols), wa(DType::kF32, 1, kFfn);
    make_cpu_kernels(1)->activation_backward(activation, h, u, weight, dw, dh, wa, 0, 1);
    const bool gated = activation == Activation::kSwiGLU;
    const double step = 1e-5;
    double loss_by_weight = 0.0;
    for (std::int64_t j = 0; j < kFfn; ++j) {
      const double gate = h.get(0, j), up = gated ? h.get(0, kFfn + j) : 0.0, outer = 0.75 * u.get(0, j);
      if (activation == Activation::kRelu && std::abs(gate) < 2 * step) continue;
      const double by_gate =
          (value(activation, gate + step, up) - value(activation, gate - step, up)) / (2 * step);
      EXPECT_TRUE(std::abs(dh.get(0, j) - outer * by_gate) <= 1e-5)
          << static_cast<int>(activation) << " " << gate;
      if (gated) {
        const double by_up =
            (value(activation, gate, up + step) - value(activation, gate, up - step)) / (2 * step);
        EXPECT_TRUE(std::abs(dh.get(0, kFfn + j) - outer * by_up) <= 1e-5) << gate << " " << up;
      }
      loss_by_weight += u.get(0, j) * value(activation, gate, up);
    }
    EXPECT_TRUE(std::abs(dw[0] - loss_by_weight) <= 1e-4);
  }
}

TEST(Optimizer, AdamW) {
  std::mt19937_64 random(kSeed);
  for (const std::size_t n : {1u, 15u, 16u, 100u, 70001u}) {
    const AdamW options{0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 3};
    std::vector<float> master(n), grad(n), m(n), v(n);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < n; ++i) {
      master[i] = normal(random);
      grad[i] = normal(random);
      m[i] = normal(random);
      v[i] = std::abs(normal(random));
    }
    auto want_master = master, want_m = m, want_v = v;
    Matrix want_copy(DType::kBF16, 1, static_cast<std::int64_t>(n));
    make_reference_kernels()->adamw(options, want_master, grad, want_m, want_v, want_copy);
    for (auto& [name, kernels, slow] : all_implementations()) {
      auto w = master, first = m, second = v;
      Matrix copy(DType::kBF16, 1, static_cast<std::int64_t>(n));
      kernels->adamw(options, w, grad, first, second, copy);
      ASSERT_TRUE(same_matrix(copy, want_copy)) << name;
      for (std::size_t i = 0; i < n; ++i) {
        ASSERT_TRUE(same_bits(w[i], want_master[i])) << name << " " << i;
        ASSERT_TRUE(same_bits(first[i], want_m[i]) && same_bits(second[i], want_v[i])) << name << " " << i;
      }
      auto without = master;
      first = m;
      second = v;
      kernels->adamw(options, without, grad, first, second, {});
      ASSERT_EQ(without, w);
    }
  }
}

// The first step from zero moments moves every weight by learning_rate against the sign of its gradient,
// after decay.
TEST(Optimizer, FirstStepByHand) {
  std::vector<float> master{1.0f, -2.0f}, grad{0.5f, -3.0f}, m(2, 0.0f), v(2, 0.0f);
  make_cpu_kernels(1)->adamw({0.1f, 0.9f, 0.999f, 0.0f, 0.5f, 1}, master, grad, m, v, {});
  EXPECT_NEAR(master[0], 1.0 * 0.95 - 0.1, 1e-5);
  EXPECT_NEAR(master[1], -2.0 * 0.95 + 0.1, 1e-5);
  EXPECT_NEAR(m[0], 0.05, 1e-7);
  EXPECT_NEAR(v[1], 0.009, 1e-6);
}

TEST(Rows, MisuseIsNamed) {
  const auto kernels = make_cpu_kernels(1);
  Matrix a(DType::kF32, 2, 4), b(DType::kBF16, 2, 4), c(DType::kF32, 2, 5);
  const std::vector<std::int32_t> index{0, 1};
  EXPECT_THROW(kernels->gather_rows(b, {}, index, a), Error);
  EXPECT_THROW(kernels->gather_rows(c, {}, index, a), Error);
  EXPECT_THROW(kernels->weighted_reduce(a, std::vector<std::int64_t>{0, 1}, index, {}, a), Error);
  EXPECT_THROW(kernels->add_scaled_rows(a, std::vector<float>{1.0f}, a), Error);
  EXPECT_THROW(kernels->activation_forward(Activation::kSwiGLU, a, a, 0, 2), Error);
  EXPECT_THROW(kernels->activation_forward(Activation::kGelu, a, a, 1, 3), Error);
  std::vector<float> x(3), y(2);
  EXPECT_THROW(kernels->adamw({0.1f, 0.9f, 0.99f, 1e-8f, 0.0f, 0}, x, x, x, x, {}), Error);
  EXPECT_THROW(kernels->adamw({0.1f, 0.9f, 0.99f, 1e-8f, 0.0f, 1}, x, y, x, x, {}), Error);
  EXPECT_THROW(make_cpu_kernels(0), Error);
}

}  // namespace
}  // namespace sluice::kernels
