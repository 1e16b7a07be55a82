#include "sluice/kernels/grap.hpp"

#include <cmath>

#include "sluice/base/error.hpp"

namespace sluice::kernels {
namespace {

// Calls f(p) with a pointer to the row as its element type.
template <typename Call>
void with_row(const ConstMatrixView& m, std::int64_t row, Call&& f) {
  if (m.dtype == DType::kF32)
    f(m.row_as<float>(row));
  else
    f(m.row_as<bf16>(row));
}

void check(const ConstMatrixView& x, const ConstMatrixView& affinity) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidArgument;
  Require(affinity.cols >= 1 && x.cols % affinity.cols == 0, kBad, "GrAP: hidden is ", x.cols,
          ", which is no multiple of the ", affinity.cols, " experts; each owns an equal slice of a row");
  Require(x.rows == affinity.rows, kBad, "GrAP: x has ", x.rows, " rows, affinities ", affinity.rows);
  Require(affinity.dtype == DType::kF32, kBad, "GrAP: affinities are ", to_string(affinity.dtype),
          ", must be f32");
}

}  // namespace

void grap_affinity(ConstMatrixView x, MatrixView out) {
  check(x, out);
  const std::int64_t width = x.cols / out.cols;
  const double scale = std::sqrt(static_cast<double>(out.cols) / static_cast<double>(x.cols));
  for (std::int64_t t = 0; t < x.rows; ++t) {
    float* const delta = out.row_as<float>(t);
    with_row(x, t, [&](const auto* row) {
      double squares = 0;
      for (std::int64_t j = 0; j < x.cols; ++j) {
        const auto v = static_cast<double>(static_cast<float>(row[j]));
        squares += v * v;
      }
      const double factor = squares == 0 ? 0 : scale / std::sqrt(squares);
      for (std::int64_t i = 0; i < out.cols; ++i) {
        double sum = 0;
        for (std::int64_t j = i * width; j < (i + 1) * width; ++j)
          sum += static_cast<double>(static_cast<float>(row[j]));
        delta[i] = static_cast<float>(factor * sum);
      }
    });
  }
}

void grap_backward(ConstMatrixView x, ConstMatrixView affinity, ConstMatrixView d_affinity, MatrixView dx) {
  check(x, affinity);
  check(x, d_affinity);
  Require(d_affinity.cols == affinity.cols, ErrorCode::kInvalidArgument, "GrAP: gradients of ",
          d_affinity.cols, " experts for affinities of ", affinity.cols);
  Require(dx.dtype == DType::kF32 && dx.rows == x.rows && dx.cols == x.cols, ErrorCode::kInvalidArgument,
          "GrAP: dx is ", to_string(dx.dtype), " [", dx.rows, ", ", dx.cols, "], must be f32 [", x.rows, ", ",
          x.cols, "]");
  const std::int64_t width = x.cols / affinity.cols;
  const double scale = std::sqrt(static_cast<double>(affinity.cols) / static_cast<double>(x.cols));
  for (std::int64_t t = 0; t < x.rows; ++t) {
    const float* const delta = affinity.row_as<float>(t);
    const float* const g = d_affinity.row_as<float>(t);
    float* const out = dx.row_as<float>(t);
    with_row(x, t, [&](const auto* row) {
      double squares = 0, along = 0;
      for (std::int64_t j = 0; j < x.cols; ++j) {
        const auto v = static_cast<double>(static_cast<float>(row[j]));
        squares += v * v;
      }
      for (std::int64_t i = 0; i < affinity.cols; ++i)
        along += static_cast<double>(g[i]) * static_cast<double>(delta[i]);
      const double inverse = squares == 0 ? 0 : 1 / std::sqrt(squares);
      for (std::int64_t i = 0; i < affinity.cols; ++i)
        for (std::int64_t j = i * width; j < (i + 1) * width; ++j)
          out[j] = static_cast<float>(inverse *
                                      (scale * static_cast<double>(g[i]) -
                                       static_cast<double>(static_cast<float>(row[j])) * inverse * along));
    });
  }
}

}  // namespace sluice::kernels
