// Work on rows on the device against the scalar loops of kernels/reference.hpp: bitwise where the operations are the
// same, within rounding where the order of a sum or exp differs. Every output is NaN before the call.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../kernels_test_util.hpp"
#include "device_test_util.hpp"
#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/rows.hpp"

namespace sluice::kernels::cuda {
namespace {

class RowsCuda : public DeviceTest<8> {};

// A matrix on the device, like one of the host, padding included.
class DeviceMatrix {
 public:
  explicit DeviceMatrix(const Matrix& m) : view_(static_cast<ConstMatrixView>(m)), bytes_(bytes_of(m)) {}
  operator MatrixView() {
    return {reinterpret_cast<std::byte*>(bytes_.data()), view_.dtype, view_.rows, view_.cols,
            view_.row_stride};
  }
  operator ConstMatrixView() { return static_cast<MatrixView>(*this); }
  // Back into a host matrix of the same shape.
  void get(Matrix& m) {
    const auto bytes = bytes_.get();
    std::memcpy(static_cast<MatrixView>(m).data, bytes.data(), bytes.size());
  }

 private:
  static std::vector<unsigned char> bytes_of(const Matrix& m) {
    const auto view = static_cast<ConstMatrixView>(m);
    std::vector<unsigned char> bytes(static_cast<std::size_t>(view.rows * view.row_bytes_stride()));
    if (!bytes.empty()) std::memcpy(bytes.data(), view.data, bytes.size());
    return bytes;
  }
  ConstMatrixView view_;
  DeviceArray<unsigned char> bytes_;
};

testing::AssertionResult near_rows(const Matrix& got, const Matrix& want, double relative, double absolute,
                                   std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r)
    for (std::int64_t c = 0; c < want.cols(); ++c) {
      const double g = got.get(r, c), w = want.get(r, c);
      if (!(std::abs(g - w) <= relative * std::abs(w) + absolute))
        return testing::AssertionFailure() << "at [" << r << ", " << c << "]: got " << g << ", want " << w;
    }
  return testing::AssertionSuccess();
}

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};
// Columns and padding: aligned, not a multiple of 8, multiple of 8 with odd strides.
const std::pair<std::int64_t, std::int64_t> kColumns[] = {{64, 8}, {520, 0}, {7, 0},
                                                          {13, 2}, {16, 3},  {2048, 0}};

struct Lists {
  std::vector<std::int64_t> row_ptr{0};
  std::vector<std::int32_t> position;
  std::vector<float> weight;
};
// Rows with 0, 1, ... terms; each source row occurs once.
Lists random_lists(std::int64_t rows, std::mt19937_64& random) {
  Lists lists;
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto terms = static_cast<std::int32_t>(random() % 11);
    for (std::int32_t i = 0; i < terms; ++i) {
      lists.position.push_back(static_cast<std::int32_t>(lists.position.size()));
      lists.weight.push_back(static_cast<float>(random() % 1000) / 500.0f - 1.0f);
    }
    lists.row_ptr.push_back(static_cast<std::int64_t>(lists.position.size()));
  }
  std::shuffle(lists.position.begin(), lists.position.end(), random);
  return lists;
}

TEST_F(RowsCuda, GatherAndConvert) {
  std::mt19937_64 random(kSeed);
  const auto reference = make_reference_kernels();
  for (const DType dtype : kTypes)
    for (const auto& [cols, padding] : kColumns) {
      const std::string what = std::string(to_string(dtype)) + " " + std::to_string(cols);
      Matrix first(dtype, 50, cols, padding), second(dtype, 30, cols, padding);
      first.fill_random(random), second.fill_random(random);
      std::vector<std::int32_t> index;
      for (int i = 0; i < 133; ++i) index.push_back(static_cast<std::int32_t>(random() % 80));
      Matrix want(dtype, 133, cols, padding), got(dtype, 133, cols, padding);
      reference->gather_rows(first, second, index, want);
      DeviceMatrix a(first), b(second), out(got);
      DeviceArray<std::int32_t> device_index(index);
      gather_rows(a, b, device_index.data(), out, nullptr, nullptr);
      out.get(got);
      EXPECT_TRUE(same_rows(got, want, 0, 133)) << what;
      // A true count on the device: rows past it stay as they are.
      got.poison();
      DeviceMatrix part(got);
      DeviceArray<std::int64_t> count(1, std::int64_t{77});
      gather_rows(a, b, device_index.data(), part, count.data(), nullptr);
      part.get(got);
      EXPECT_TRUE(same_rows(got, want, 0, 77)) << what;
      for (std::int64_t r = 77; r < 133; ++r)
        for (std::int64_t c = 0; c < cols; ++c) ASSERT_TRUE(std::isnan(got.get(r, c))) << what;
      for (const DType to : kTypes) {
        Matrix converted(to, 50, cols, padding), expected(to, 50, cols, padding);
        reference->convert_rows(first, expected);
        DeviceMatrix target(converted);
        convert_rows(a, target, nullptr, nullptr);
        target.get(converted);
        EXPECT_TRUE(same_rows(converted, expected, 0, 50)) << what << " to " << to_string(to);
      }
    }
}

TEST_F(RowsCuda, WeightedReduceAndItsBackward) {
  std::mt19937_64 random(kSeed + 1);
  const auto reference = make_reference_kernels();
  for (const DType dtype : kTypes)
    for (const DType out_type : kTypes)
      for (const auto& [cols, padding] : kColumns) {
        const std::string what = std::string(to_string(dtype)) + " to " + std::string(to_string(out_type)) +
                                 " " + std::to_string(cols);
        const std::int64_t rows = 61;
        const Lists lists = random_lists(rows, random);
        const auto terms = static_cast<std::int64_t>(lists.position.size());
        Matrix src(dtype, terms, cols, padding), dout(out_type, rows, cols, padding);
        src.fill_random(random), dout.fill_random(random);
        DeviceMatrix d_src(src), d_dout(dout);
        DeviceArray<std::int64_t> row_ptr(lists.row_ptr);
        DeviceArray<std::int32_t> position(lists.position);
        DeviceArray<float> weight(lists.weight);
        for (const bool weighted : {true, false}) {
          const std::vector<float> weights = weighted ? lists.weight : std::vector<float>{};
          Matrix want(out_type, rows, cols, padding), got(out_type, rows, cols, padding);
          reference->weighted_reduce(src, lists.row_ptr, lists.position, weights, want);
          DeviceMatrix out(got);
          weighted_reduce(d_src, row_ptr.data(), position.data(), weighted ? weight.data() : nullptr, out,
                          nullptr);
          out.get(got);
          EXPECT_TRUE(same_rows(got, want, 0, rows)) << what << " weighted " << weighted;

          Matrix dsrc(dtype, terms, cols, padding), dsrc_want(dtype, terms, cols, padding);
          DeviceMatrix d_dsrc(dsrc);
          DeviceArray<float> dweight(static_cast<std::size_t>(terms), std::nanf(""));
          weighted_reduce_backward(d_dout, d_src, row_ptr.data(), position.data(),
                                   weighted ? weight.data() : nullptr, d_dsrc, dweight.data(), nullptr);
          d_dsrc.get(dsrc);
          const auto dw = dweight.get();
          for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t i = lists.row_ptr[static_cast<std::size_t>(r)];
                 i < lists.row_ptr[static_cast<std::size_t>(r) + 1]; ++i) {
              const auto k = static_cast<std::size_t>(i);
              double dot = 0, scale = 0;
              for (std::int64_t c = 0; c < cols; ++c) {
                dsrc_want.set(lists.position[k], c, (weighted ? lists.weight[k] : 1.0f) * dout.get(r, c));
                const double product = static_cast<double>(dout.get(r, c)) * src.get(lists.position[k], c);
                dot += product;
                scale += std::abs(product);
              }
              EXPECT_LE(std::abs(dw[k] - dot), 1e-6 * scale + 1e-30) << what << " route " << i;
            }
          EXPECT_TRUE(same_rows(dsrc, dsrc_want, 0, terms)) << what << " weighted " << weighted;
        }
      }
}

TEST_F(RowsCuda, AddScaledAndDots) {
  std::mt19937_64 random(kSeed + 2);
  const auto reference = make_reference_kernels();
  for (const DType x_type : kTypes)
    for (const DType y_type : kTypes)
      for (const auto& [cols, padding] : kColumns) {
        const std::string what = std::string(to_string(x_type)) + " " + std::string(to_string(y_type)) + " " +
                                 std::to_string(cols);
        Matrix x(x_type, 37, cols, padding), y(y_type, 37, cols, padding);
        x.fill_random(random), y.fill_random(random);
        std::vector<float> scale;
        std::vector<std::int32_t> index;
        for (int i = 0; i < 37; ++i) {
          scale.push_back(static_cast<float>(random() % 100) / 50.0f - 1.0f);
          index.push_back(static_cast<std::int32_t>(random() % 37));
        }
        DeviceMatrix dx(x), dy(y);
        DeviceArray<float> d_scale(scale), out(37, std::nanf(""));
        DeviceArray<std::int32_t> d_index(index);
        row_dots(dx, d_index.data(), dy, nullptr, out.data(), 37, nullptr);
        const auto dots = out.get();
        for (std::size_t i = 0; i < 37; ++i) {
          double dot = 0, size = 0;
          for (std::int64_t c = 0; c < cols; ++c) {
            const double product =
                static_cast<double>(x.get(index[i], c)) * y.get(static_cast<std::int64_t>(i), c);
            dot += product;
            size += std::abs(product);
          }
          EXPECT_TRUE(std::abs(dots[i] - dot) <= 1e-6 * size) << what;
        }
        add_scaled_rows(dx, d_scale.data(), dy, nullptr);
        reference->add_scaled_rows(x, scale, y);
        Matrix got(y_type, 37, cols, padding);
        dy.get(got);
        EXPECT_TRUE(same_rows(got, y, 0, 37)) << what;
      }
}

TEST_F(RowsCuda, Activations) {
  std::mt19937_64 random(kSeed + 3);
  const auto reference = make_reference_kernels();
  for (const Activation activation : {Activation::kSwiGLU, Activation::kGelu, Activation::kRelu})
    for (const DType h_type : kTypes)
      for (const DType u_type : kTypes)
        for (const auto& [ffn, padding] : kColumns) {
          const std::string what = std::to_string(static_cast<int>(activation)) + " " +
                                   std::string(to_string(h_type)) + " " + std::string(to_string(u_type)) +
                                   " " + std::to_string(ffn);
          const std::int64_t rows = 29, begin = 3, end = 26;
          const std::int64_t h_cols = preactivation_cols(activation, ffn);
          Matrix h(h_type, rows, h_cols, padding), u(u_type, rows, ffn, padding);
          h.fill_random(random, 2.0f), u.fill_random(random);
          h.set(begin, 0, 90.0f), h.set(begin + 1, 0, -90.0f),
              h.set(begin + 2, 0, 0.0f);  // far out, and the kink
          std::vector<float> weight(static_cast<std::size_t>(rows));
          for (float& w : weight) w = static_cast<float>(random() % 100) / 50.0f - 1.0f;
          weight[5] = 0;
          // bf16: half an ulp of each of two roundings that may fall to either side
          const double h_unit = h_type == DType::kF32 ? 2e-6 : 1.0 / 128,
                       u_unit = u_type == DType::kF32 ? 2e-6 : 1.0 / 128;
          Matrix act(u_type, rows, ffn, padding), act_want(u_type, rows, ffn, padding);
          DeviceMatrix dh(h), du(u), dact(act);
          activation_forward(activation, dh, dact, begin, end, nullptr, nullptr);
          reference->activation_forward(activation, h, act_want, begin, end);
          dact.get(act);
          EXPECT_TRUE(near_rows(act, act_want, u_unit, 1e-6, begin, end)) << what;
          for (const std::int64_t r : {begin - 1, end})
            EXPECT_TRUE(std::isnan(act.get(r, 0)) && std::isnan(act.get(r, ffn - 1))) << what;

          Matrix dh_want(h_type, rows, h_cols, padding), wa_want(u_type, rows, ffn, padding);
          std::vector<float> dw_want(weight.size(), std::nanf(""));
          reference->activation_backward(activation, h, u, weight, dw_want, dh_want, wa_want, begin, end);
          DeviceArray<float> d_weight(weight), d_dw(weight.size(), std::nanf(""));
          Matrix dh_got(h_type, rows, h_cols, padding), wa_got(u_type, rows, ffn, padding);
          DeviceMatrix d_dh(dh_got), d_wa(wa_got);
          activation_backward(activation, dh, du, d_weight.data(), d_dw.data(), d_dh, d_wa, begin, end,
                              nullptr, nullptr);
          d_dh.get(dh_got), d_wa.get(wa_got);
          EXPECT_TRUE(near_rows(dh_got, dh_want, h_unit, 3e-6, begin, end)) << what;
          EXPECT_TRUE(near_rows(wa_got, wa_want, u_unit, 1e-6, begin, end)) << what;
          const auto dw = d_dw.get();
          for (std::int64_t r = begin; r < end; ++r) {
            const auto i = static_cast<std::size_t>(r);
            EXPECT_TRUE(std::abs(dw[i] - dw_want[i]) <=
                        1e-5 * std::abs(dw_want[i]) + 2e-6 * static_cast<double>(ffn))
                << what << ": dw[" << r << "] " << dw[i] << ", want " << dw_want[i];
          }
          // In place, fewer rows by a count on the device, and the same bits.
          DeviceArray<std::int64_t> count(1, std::int64_t{20});
          activation_backward(activation, dh, du, d_weight.data(), d_dw.data(), dh, du, begin, end,
                              count.data(), nullptr);
          Matrix in_place(h_type, rows, h_cols, padding), wa_in_place(u_type, rows, ffn, padding);
          dh.get(in_place), du.get(wa_in_place);
          EXPECT_TRUE(same_rows(in_place, dh_got, begin, 20)) << what;
          EXPECT_TRUE(same_rows(wa_in_place, wa_got, begin, 20)) << what;
          EXPECT_TRUE(same_rows(in_place, h, 20, rows)) << what;
        }
}

TEST_F(RowsCuda, AdamWGivesTheBitsOfTheCpu) {
  std::mt19937_64 random(kSeed + 4);
  const auto reference = make_reference_kernels();
  for (const std::int64_t n : {1, 7, 8, 1000, 4099}) {
    Matrix master(DType::kF32, 1, n), grad(DType::kF32, 1, n), m(DType::kF32, 1, n), v(DType::kF32, 1, n);
    master.fill_random(random), grad.fill_random(random, 0.1f);
    for (std::int64_t i = 0; i < n; ++i) m.set(0, i, 0), v.set(0, i, 0);
    for (const DType copy_type : kTypes) {
      Matrix w1 = master, m1 = m, v1 = v, copy(copy_type, 1, n), copy_got(copy_type, 1, n);
      DeviceMatrix dw(w1), dm(m1), dv(v1), dg(grad), dcopy(copy);
      const auto floats = [](DeviceMatrix& x) {
        return reinterpret_cast<float*>(static_cast<MatrixView>(x).data);
      };
      const auto count = static_cast<std::size_t>(n);
      for (std::int64_t step = 1; step <= 3; ++step) {
        const AdamW options{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, step};
        reference->adamw(options, {w1.floats(), count}, {grad.floats(), count}, {m1.floats(), count},
                         {v1.floats(), count}, copy);
        adamw(options, floats(dw), floats(dg), floats(dm), floats(dv), static_cast<MatrixView>(dcopy).data,
              copy_type, n, nullptr);
      }
      Matrix got(DType::kF32, 1, n);
      dw.get(got);
      EXPECT_TRUE(same_rows(got, w1, 0, 1)) << n;
      dm.get(got);
      EXPECT_TRUE(same_rows(got, m1, 0, 1)) << n;
      dv.get(got);
      EXPECT_TRUE(same_rows(got, v1, 0, 1)) << n;
      dcopy.get(copy_got);
      EXPECT_TRUE(same_rows(copy_got, copy, 0, 1)) << n;
    }
  }
}

TEST_F(RowsCuda, ArgumentsAreChecked) {
  Matrix a(DType::kF32, 4, 8), b(DType::kBF16, 4, 8), narrow(DType::kF32, 4, 7);
  DeviceMatrix da(a), db(b), dn(narrow);
  DeviceArray<std::int32_t> index(4, 0);
  EXPECT_THROW(gather_rows(da, {}, index.data(), db, nullptr, nullptr), Error);
  EXPECT_THROW(gather_rows(da, {}, index.data(), dn, nullptr, nullptr), Error);
  EXPECT_THROW(gather_rows(da, {}, nullptr, da, nullptr, nullptr), Error);
  EXPECT_THROW(convert_rows(da, dn, nullptr, nullptr), Error);
  EXPECT_THROW(activation_forward(Activation::kSwiGLU, da, da, 0, 4, nullptr, nullptr), Error);
  EXPECT_THROW(activation_forward(Activation::kRelu, da, da, 2, 1, nullptr, nullptr), Error);
  EXPECT_THROW(activation_forward(Activation::kRelu, da, da, 0, 5, nullptr, nullptr), Error);
}

}  // namespace
}  // namespace sluice::kernels::cuda
