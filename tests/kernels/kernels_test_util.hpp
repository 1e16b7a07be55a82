// What the kernel tests share: every implementation under test, seeded random matrices of either dtype, and
// comparisons that fail on NaN.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sluice/base/dtype.hpp"
#include "sluice/base/tensor_view.hpp"
#include "sluice/kernels/cpu/cpu_kernels.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/kernels/reference.hpp"

namespace sluice::kernels {

// The tables this machine can run; the portable one always.
inline std::vector<const IsaOps*> all_isas() {
  std::vector<const IsaOps*> all;
  for (const IsaOps* ops : {avx512_ops(), avx2_ops(), portable_ops()})
    if (ops) all.push_back(ops);
  return all;
}

struct Implementation {
  std::string name;
  std::unique_ptr<Kernels> kernels;
  bool slow;  // portable code: its FMA may be a library call
};

inline std::vector<Implementation> all_implementations() {
  std::vector<Implementation> all;
  for (const IsaOps* ops : all_isas()) {
    for (const int threads : {1, 2, 3})
      all.push_back({std::string(ops->name) + "/" + std::to_string(threads), make_cpu_kernels(*ops, threads),
                     ops == portable_ops()});
  }
  return all;
}

inline constexpr std::uint64_t kSeed = 20240611;

// A matrix that owns its memory; rows are `padding` elements apart so that strides are tested, too.
class Matrix {
 public:
  Matrix() = default;
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t padding = 0)
      : dtype_(dtype), rows_(rows), cols_(cols), stride_(cols + padding) {
    bytes_.resize(static_cast<std::size_t>(rows * stride_) * size_of(dtype) + 64);
    poison();
  }

  void poison() {
    for (std::int64_t i = 0; i < rows_ * stride_; ++i) set_flat(i, std::numeric_limits<float>::quiet_NaN());
  }
  Matrix& fill_random(std::mt19937_64& random, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (std::int64_t i = 0; i < rows_ * stride_; ++i) set_flat(i, normal(random));
    return *this;
  }
  void set(std::int64_t r, std::int64_t c, float x) { set_flat(r * stride_ + c, x); }
  float get(std::int64_t r, std::int64_t c) const {
    const std::int64_t i = r * stride_ + c;
    if (dtype_ == DType::kF32) return reinterpret_cast<const float*>(bytes_.data())[i];
    return static_cast<float>(reinterpret_cast<const bf16*>(bytes_.data())[i]);
  }
  operator MatrixView() { return {bytes_.data(), dtype_, rows_, cols_, stride_}; }
  operator ConstMatrixView() const { return {bytes_.data(), dtype_, rows_, cols_, stride_}; }
  // Quick answers for long comparisons.
  bool same_row_bytes(const Matrix& other, std::int64_t r) const {
    const auto row = [r](const Matrix& m) {
      return m.data() + r * m.stride_ * static_cast<std::int64_t>(size_of(m.dtype_));
    };
    return dtype_ == other.dtype_ && cols_ == other.cols_ &&
           std::memcmp(row(*this), row(other), static_cast<std::size_t>(cols_) * size_of(dtype_)) == 0;
  }
  bool finite_row(std::int64_t r) const {
    for (std::int64_t c = 0; c < cols_; ++c)
      if (!std::isfinite(get(r, c))) return false;
    return true;
  }
  const std::byte* data() const { return bytes_.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes_.data()); }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }

 private:
  void set_flat(std::int64_t i, float x) {
    if (dtype_ == DType::kF32)
      reinterpret_cast<float*>(bytes_.data())[i] = x;
    else
      reinterpret_cast<bf16*>(bytes_.data())[i] = bf16(x);
  }

  DType dtype_ = DType::kF32;
  std::int64_t rows_ = 0, cols_ = 0, stride_ = 0;
  std::vector<std::byte> bytes_;
};

inline bool same_bits(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// Rows begin..end-1 of `got` and `want` are equal bit by bit; a NaN in either fails.
inline testing::AssertionResult same_rows(const Matrix& got, const Matrix& want, std::int64_t begin,
                                          std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    if (got.same_row_bytes(want, r) && want.finite_row(r)) continue;
    for (std::int64_t c = 0; c < want.cols(); ++c)
      if (!same_bits(got.get(r, c), want.get(r, c)) || std::isnan(want.get(r, c)))
        return testing::AssertionFailure() << "at [" << r << ", " << c << "]: got " << got.get(r, c)
                                           << ", want " << want.get(r, c) << " (seed " << kSeed << ")";
  }
  return testing::AssertionSuccess();
}
inline testing::AssertionResult same_matrix(const Matrix& got, const Matrix& want) {
  return same_rows(got, want, 0, want.rows());
}
// Rows begin..end-1 still hold the poison.
inline testing::AssertionResult untouched(const Matrix& m, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r)
    for (std::int64_t c = 0; c < m.cols(); ++c)
      if (!std::isnan(m.get(r, c)))
        return testing::AssertionFailure() << "[" << r << ", " << c << "] was written";
  return testing::AssertionSuccess();
}
// |got - want| <= relative * |want| + absolute everywhere.
inline testing::AssertionResult close_rows(const Matrix& got, const Matrix& want, std::int64_t begin,
                                           std::int64_t end, double relative, double absolute) {
  for (std::int64_t r = begin; r < end; ++r)
    for (std::int64_t c = 0; c < want.cols(); ++c) {
      const double g = got.get(r, c), w = want.get(r, c);
      if (!(std::abs(g - w) <= relative * std::abs(w) + absolute))
        return testing::AssertionFailure()
               << "at [" << r << ", " << c << "]: got " << g << ", want " << w << " (seed " << kSeed << ")";
    }
  return testing::AssertionSuccess();
}

}  // namespace sluice::kernels
