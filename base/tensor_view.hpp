// Views of caller-owned memory. A view owns nothing and must not outlive the memory it names.
#pragma once

#include <cstdint>

#include "sluice/base/dtype.hpp"
#include "sluice/base/error.hpp"

namespace sluice {

// [rows, cols] of dtype, row-major; row_stride in elements (>= cols). Data may be null when rows == 0.
template <typename Byte>
struct BasicMatrixView {
  Byte* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;

  BasicMatrixView() = default;
  BasicMatrixView(Byte* d, DType t, std::int64_t r, std::int64_t c, std::int64_t stride)
      : data(d), dtype(t), rows(r), cols(c), row_stride(stride) {}
  // A contiguous matrix of float or bf16.
  template <typename T>
  BasicMatrixView(T* d, std::int64_t r, std::int64_t c)
      : data(reinterpret_cast<Byte*>(d)),
        dtype(dtype_of<std::remove_const_t<T>>),
        rows(r),
        cols(c),
        row_stride(c) {}
  // A mutable view converts to a const one.
  template <typename Mutable>
  requires(std::is_const_v<Byte> && !std::is_const_v<Mutable>)
      BasicMatrixView(const BasicMatrixView<Mutable>& other)
      : data(other.data),
        dtype(other.dtype),
        rows(other.rows),
        cols(other.cols),
        row_stride(other.row_stride) {}

  Byte* row(std::int64_t r) const { return data + r * row_bytes_stride(); }
  template <typename T>
  auto* row_as(std::int64_t r) const {
    using Element = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    return reinterpret_cast<Element*>(row(r));
  }
  std::int64_t row_bytes() const { return cols * static_cast<std::int64_t>(size_of(dtype)); }
  std::int64_t row_bytes_stride() const { return row_stride * static_cast<std::int64_t>(size_of(dtype)); }
};

using MatrixView = BasicMatrixView<std::byte>;
using ConstMatrixView = BasicMatrixView<const std::byte>;

// Throws kInvalidArgument naming `what` unless the view has this shape, a stride of at least cols, and data
// wherever rows > 0.
inline void require_shape(const ConstMatrixView& view, std::string_view what, std::int64_t rows,
                          std::int64_t cols) {
  Require(view.rows == rows && view.cols == cols, ErrorCode::kInvalidArgument, what, " has shape [",
          view.rows, ", ", view.cols, "], must be [", rows, ", ", cols, "]");
  Require(view.row_stride >= cols, ErrorCode::kInvalidArgument, what, " has row stride ", view.row_stride,
          ", must be at least ", cols);
  Require(view.data != nullptr || rows == 0 || cols == 0, ErrorCode::kInvalidArgument, what,
          " is null but has ", rows, " rows");
}

}  // namespace sluice
