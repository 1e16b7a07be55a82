// The inner loops over one vector type `Vec`, which the including file defined just before. Everything has
// internal linkage and no inline function of another header is used in the wide builds: the linker must never
// pick a copy compiled for another processor.
//
// Loops over columns work on whole vectors; the last, partial one goes through a zero-padded buffer, so that
// every element sees the same operations wherever it stands.

#include <type_traits>

#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels {
namespace {

using F = Vec::F;
constexpr int kWidth = Vec::kWidth;
constexpr int kPanelVecs = 2;
constexpr std::int64_t kPanelWidth = kPanelVecs * kWidth;
static_assert(kLanes % kWidth == 0 && kBlockN % kPanelWidth == 0 && Vec::kTileRows <= kMaxTileRows);
static_assert(kStepStrideA >= kMaxTileRows);

// ---- elements of f32 and bf16 -----------------------------------------------------------------------------

struct Float32 {
  using Element = float;
  static F load(const float* p) { return Vec::load(p); }
  static void store(float* p, F x) { Vec::store(p, x); }
};
struct BFloat16 {
  using Element = std::uint16_t;
  static F load(const std::uint16_t* p) { return Vec::load_bf16(p); }
  static void store(std::uint16_t* p, F x) { Vec::store_bf16(p, x); }
};

// The n < kWidth leading elements at p, zeros behind them.
template <typename T>
F load_part(const typename T::Element* p, std::int64_t n) {
  typename T::Element buffer[kWidth] = {};
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return T::load(buffer);
}
template <typename T>
void store_part(typename T::Element* p, F x, std::int64_t n) {
  typename T::Element buffer[kWidth];
  T::store(buffer, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <typename Source, typename Target>
void convert(const std::byte* src, std::byte* dst, std::int64_t n) {
  const auto* s = reinterpret_cast<const typename Source::Element*>(src);
  auto* d = reinterpret_cast<typename Target::Element*>(dst);
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Target::store(d + i, Source::load(s + i));
  if (i < n) store_part<Target>(d + i, load_part<Source>(s + i, n - i), n - i);
}

void widen(const std::byte* src, DType dtype, float* dst, std::int64_t n) {
  auto* d = reinterpret_cast<std::byte*>(dst);
  dtype == DType::kF32 ? convert<Float32, Float32>(src, d, n) : convert<BFloat16, Float32>(src, d, n);
}
void narrow(const float* src, std::byte* dst, DType dtype, std::int64_t n) {
  const auto* s = reinterpret_cast<const std::byte*>(src);
  dtype == DType::kF32 ? convert<Float32, Float32>(s, dst, n) : convert<Float32, BFloat16>(s, dst, n);
}

// ---- GEMM -------------------------------------------------------------------------------------------------

template <int kRows, bool kRowMajor>
void tile(std::int64_t steps, const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
          float* c, std::int64_t ldc, bool fresh, const float* coming_c, Prefetch& prefetch) {
  constexpr std::int64_t kRowStride = kRowMajor ? kRowStrideA : 1;
  F acc[kRows][kPanelVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v)
      acc[r][v] = fresh ? Vec::zero() : Vec::load(c + r * ldc + v * kWidth);
  }
  const auto step = [&]() __attribute__((always_inline)) {
    F bk[kPanelVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) bk[v] = Vec::load(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F ak = Vec::set1(a[r * kRowStride]);
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = Vec::fma(ak, bk[v], acc[r][v]);
    }
    a += kRowMajor ? 1 : a_stride;
    b += b_stride;
  };
  // Not unrolled: with all accumulators in registers there is none left for a second step.
  const auto round = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 1
    for (std::int64_t i = 0; i < kStepsARound; ++i) step();
  };

  // A round asks for rows of the coming C (a short tile: several) and for lines of the cursor.
  const std::int64_t rounds = steps / kStepsARound, rest = steps % kStepsARound;
  const std::int64_t c_rows_a_round = rounds >= kRows ? 1 : rounds > 0 ? (kRows + rounds - 1) / rounds : 0;
  std::int64_t c_rows_left = coming_c ? kRows : 0;
  Prefetch p = prefetch;
  const char* next =
      p.rows_left > 0 ? p.base + (p.index ? *p.index * p.row_bytes : 0) + p.line * 64 : nullptr;
  for (std::int64_t t = 0; t < rounds; ++t) {
    for (std::int64_t i = 0; i < c_rows_a_round && c_rows_left > 0; ++i, --c_rows_left) {
      for (int v = 0; v < kPanelVecs; ++v) __builtin_prefetch(coming_c + v * kWidth, 1, 3);
      __builtin_prefetch(coming_c + kPanelWidth - 1, 1, 3);  // another line unless C is aligned
      coming_c += ldc;
    }
    for (std::int64_t i = 0; i < p.lines_a_round && p.rows_left > 0; ++i) {
      __builtin_prefetch(next, 0, 2);
      next += 64;
      if (++p.line < p.lines_a_row) continue;
      p.line = 0;
      if (--p.rows_left == 0) break;
      if (p.index)
        next = p.base + *++p.index * p.row_bytes;
      else
        next = p.base += p.row_bytes;
    }
    round();
  }
  prefetch = p;
  for (std::int64_t i = 0; i < rest; ++i) step();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) Vec::store(c + r * ldc + v * kWidth, acc[r][v]);
  }
}

// Indexed rows may lie anywhere: asks for one a few rows ahead, which the processor cannot guess.
constexpr std::int64_t kRowsAhead = 4;
inline void prefetch_row(const std::byte* src, std::int64_t row_bytes, const std::int32_t* index,
                         std::int64_t r, std::int64_t rows, std::int64_t bytes) {
  if (!index || r + kRowsAhead >= rows) return;
  const std::byte* row = src + index[r + kRowsAhead] * row_bytes;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
}

template <typename T>
void copy_rows_as(const std::byte* src, std::int64_t row_bytes, const std::int32_t* index, std::int64_t rows,
                  std::int64_t cols, float* dst, std::int64_t dst_stride) {
  constexpr auto kElement = static_cast<std::int64_t>(sizeof(typename T::Element));
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto* row = reinterpret_cast<const typename T::Element*>(src + (index ? index[r] : r) * row_bytes);
    prefetch_row(src, row_bytes, index, r, rows, cols * kElement);
    float* out = dst + r * dst_stride;
    std::int64_t c = 0;
    for (; c + kWidth <= cols; c += kWidth) Vec::store(out + c, T::load(row + c));
    if (c < cols) store_part<Float32>(out + c, load_part<T>(row + c, cols - c), cols - c);
  }
}
void copy_rows(const std::byte* src, DType dtype, std::int64_t row_bytes, const std::int32_t* index,
               std::int64_t rows, std::int64_t cols, float* dst, std::int64_t dst_stride) {
  if (dtype == DType::kF32)
    copy_rows_as<Float32>(src, row_bytes, index, rows, cols, dst, dst_stride);
  else
    copy_rows_as<BFloat16>(src, row_bytes, index, rows, cols, dst, dst_stride);
}

template <typename T>
void copy_panels_as(const std::byte* src, std::int64_t row_bytes, const std::int32_t* index,
                    std::int64_t rows, std::int64_t cols, std::int64_t num_panels, std::int64_t panel_cols,
                    float* dst, std::int64_t panel_stride, std::int64_t width) {
  constexpr auto kElement = static_cast<std::int64_t>(sizeof(typename T::Element));
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto* row = reinterpret_cast<const typename T::Element*>(src + (index ? index[r] : r) * row_bytes);
    prefetch_row(src, row_bytes, index, r, rows, cols * kElement);
    for (std::int64_t panel = 0; panel < num_panels; ++panel) {
      float* out = dst + panel * panel_stride + r * width;
      const typename T::Element* from = row + panel * panel_cols;
      const std::int64_t left = cols - panel * panel_cols;
      for (std::int64_t c = 0; c < width; c += kWidth) {
        F x = Vec::zero();
        if (c + kWidth <= left)
          x = T::load(from + c);
        else if (c < left)
          x = load_part<T>(from + c, left - c);
        Vec::store(out + c, x);
      }
    }
  }
}
void copy_panels(const std::byte* src, DType dtype, std::int64_t row_bytes, const std::int32_t* index,
                 std::int64_t rows, std::int64_t cols, std::int64_t num_panels, std::int64_t panel_cols,
                 float* dst, std::int64_t panel_stride, std::int64_t width) {
  if (dtype == DType::kF32)
    copy_panels_as<Float32>(src, row_bytes, index, rows, cols, num_panels, panel_cols, dst, panel_stride,
                            width);
  else
    copy_panels_as<BFloat16>(src, row_bytes, index, rows, cols, num_panels, panel_cols, dst, panel_stride,
                             width);
}

// dst[k * stride + c] = src[c][k] for k < num_steps and c < kWidth, zero for c >= num_cols.
template <typename T>
void transpose_block(const std::byte* src, std::int64_t row_bytes, std::int64_t num_cols,
                     std::int64_t num_steps, float* dst, std::int64_t stride) {
  if (std::is_same_v<T, Float32> && num_cols == kWidth && num_steps == kWidth)
    return Vec::transpose(reinterpret_cast<const float*>(src), row_bytes / 4, dst, stride);
  alignas(64) float rows[kWidth * kWidth], columns[kWidth * kWidth];
  for (std::int64_t c = 0; c < kWidth; ++c) {
    const auto* row = reinterpret_cast<const typename T::Element*>(src + c * row_bytes);
    F x = Vec::zero();
    if (c < num_cols) x = num_steps == kWidth ? T::load(row) : load_part<T>(row, num_steps);
    Vec::store(rows + c * kWidth, x);
  }
  if (num_steps == kWidth) return Vec::transpose(rows, kWidth, dst, stride);
  Vec::transpose(rows, kWidth, columns, kWidth);
  for (std::int64_t k = 0; k < num_steps; ++k) Vec::store(dst + k * stride, Vec::load(columns + k * kWidth));
}

// Rows are first copied next to each other: they are often 4 KiB apart, where L1 keeps only a few of them, and may
// begin within a line.
template <typename T>
void pack_transposed_as(const std::byte* src, std::int64_t row_bytes, std::int64_t cols, std::int64_t steps,
                        float* dst) {
  constexpr std::int64_t kPiece = 128, kStride = kPiece + 16;
  static_assert(kPiece % kWidth == 0);
  alignas(64) float rows[kWidth * kStride], columns[kWidth * kWidth];
  for (std::int64_t c = 0; c < kPanelWidth; c += kWidth) {
    for (std::int64_t first = 0; first < steps; first += kPiece) {
      const std::int64_t n = steps - first < kPiece ? steps - first : kPiece;
      for (std::int64_t r = 0; r < kWidth; ++r) {
        const auto* row = reinterpret_cast<const typename T::Element*>(src + (c + r) * row_bytes) + first;
        float* const out = rows + r * kStride;
        for (std::int64_t k = 0; k < n; k += kWidth) {
          F x = Vec::zero();
          if (c + r < cols) x = k + kWidth <= n ? T::load(row + k) : load_part<T>(row + k, n - k);
          Vec::store(out + k, x);
        }
      }
      for (std::int64_t k = 0; k < n; k += kWidth) {
        float* const out = dst + (first + k) * kPanelWidth + c;
        if (k + kWidth <= n) {
          Vec::transpose(rows + k, kStride, out, kPanelWidth);
        } else {
          Vec::transpose(rows + k, kStride, columns, kWidth);
          for (std::int64_t i = 0; k + i < n; ++i)
            Vec::store(out + i * kPanelWidth, Vec::load(columns + i * kWidth));
        }
      }
    }
  }
}
void pack_transposed(const std::byte* src, DType dtype, std::int64_t row_bytes, std::int64_t cols,
                     std::int64_t steps, float* dst) {
  if (dtype == DType::kF32)
    pack_transposed_as<Float32>(src, row_bytes, cols, steps, dst);
  else
    pack_transposed_as<BFloat16>(src, row_bytes, cols, steps, dst);
}

// Columns of C are rows of w: blocks of w are transposed into a buffer that stays in L1.
template <int kRows, typename T>
void few_rows_transposed_as(std::int64_t steps, const float* a, std::int64_t lda, const std::byte* w,
                            std::int64_t row_bytes, std::int64_t cols, float* c, std::int64_t ldc) {
  constexpr auto kElement = static_cast<std::int64_t>(sizeof(typename T::Element));
  alignas(64) float block[kWidth * kWidth];
  for (std::int64_t col = 0; col < cols; col += kWidth) {
    const std::int64_t num_cols = cols - col < kWidth ? cols - col : kWidth;
    F acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = Vec::zero();
    for (std::int64_t k = 0; k < steps; k += kWidth) {
      const std::int64_t num_steps = steps - k < kWidth ? steps - k : kWidth;
      const std::byte* from = w + col * row_bytes + k * kElement;
      // The same place in the next kWidth rows, whose turn is next.
      for (std::int64_t i = 0; i < kWidth; ++i) __builtin_prefetch(from + (kWidth + i) * row_bytes, 0, 2);
      transpose_block<T>(from, row_bytes, num_cols, num_steps, block, kWidth);
      for (std::int64_t i = 0; i < num_steps; ++i) {
        const F b = Vec::load(block + i * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r] = Vec::fma(Vec::set1(a[r * lda + k + i]), b, acc[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      if (num_cols == kWidth)
        Vec::store(c + r * ldc + col, acc[r]);
      else
        store_part<Float32>(c + r * ldc + col, acc[r], num_cols);
    }
  }
}
template <int kRows>
void few_rows_transposed(std::int64_t steps, const float* a, std::int64_t lda, const std::byte* w,
                         DType w_dtype, std::int64_t row_bytes, std::int64_t cols, float* c,
                         std::int64_t ldc) {
  if (w_dtype == DType::kF32)
    few_rows_transposed_as<kRows, Float32>(steps, a, lda, w, row_bytes, cols, c, ldc);
  else
    few_rows_transposed_as<kRows, BFloat16>(steps, a, lda, w, row_bytes, cols, c, ldc);
}

// kSteps reduction steps over all columns; C rests in L1 between two visits.
template <int kRows, int kSteps, typename T>
void few_rows_steps(const float* a, std::int64_t lda, const std::byte* w, std::int64_t row_bytes,
                    std::int64_t cols, float* c, std::int64_t ldc, bool fresh) {
  constexpr std::int64_t kRoundsAhead = 4;
  const auto visit = [&](std::int64_t col, std::int64_t n) __attribute__((always_inline)) {
    F b[kSteps];
#pragma GCC unroll 4
    for (int k = 0; k < kSteps; ++k) {
      const auto* p = reinterpret_cast<const typename T::Element*>(w + k * row_bytes) + col;
      b[k] = n == kWidth ? T::load(p) : load_part<T>(p, n);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* at = c + r * ldc + col;
      F acc = Vec::zero();
      if (!fresh) acc = n == kWidth ? Vec::load(at) : load_part<Float32>(at, n);
#pragma GCC unroll 4
      for (int k = 0; k < kSteps; ++k) acc = Vec::fma(Vec::set1(a[r * lda + k]), b[k], acc);
      if (n == kWidth)
        Vec::store(at, acc);
      else
        store_part<Float32>(at, acc, n);
    }
  };
  const std::int64_t bytes = cols * static_cast<std::int64_t>(sizeof(typename T::Element));
  for (int k = 0; k < kSteps; ++k) {
    const std::byte* ahead = w + (kRoundsAhead * kSteps + k) * row_bytes;
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
  }
  std::int64_t col = 0;
  for (; col + kWidth <= cols; col += kWidth) visit(col, kWidth);
  if (col < cols) visit(col, cols - col);
}
template <int kRows, typename T>
void few_rows_straight_as(std::int64_t steps, const float* a, std::int64_t lda, const std::byte* w,
                          std::int64_t row_bytes, std::int64_t cols, float* c, std::int64_t ldc) {
  constexpr int kSteps = 4;
  std::int64_t k = 0;
  for (; k + kSteps <= steps; k += kSteps)
    few_rows_steps<kRows, kSteps, T>(a + k, lda, w + k * row_bytes, row_bytes, cols, c, ldc, k == 0);
  for (; k < steps; ++k)
    few_rows_steps<kRows, 1, T>(a + k, lda, w + k * row_bytes, row_bytes, cols, c, ldc, k == 0);
}
template <int kRows>
void few_rows_straight(std::int64_t steps, const float* a, std::int64_t lda, const std::byte* w,
                       DType w_dtype, std::int64_t row_bytes, std::int64_t cols, float* c, std::int64_t ldc) {
  if (w_dtype == DType::kF32)
    few_rows_straight_as<kRows, Float32>(steps, a, lda, w, row_bytes, cols, c, ldc);
  else
    few_rows_straight_as<kRows, BFloat16>(steps, a, lda, w, row_bytes, cols, c, ldc);
}

// ---- activation -------------------------------------------------------------------------------------------

// e^x to about 1 ulp: n = rint(x / ln 2), r = x - n ln 2 in two FMAs (Cody & Waite), e^r = 1 + r + r^2 q(r)
// with q the minimax polynomial of degree 4 on |r| <= ln(2)/2 (own fit, relative error 2^-28), times 2^n.
// Overflows to infinity above 88.73, falls to 0 through the denormals; NaN stays NaN.
F exponential(F x) {
  x = Vec::max(Vec::set1(-104.0f), Vec::min(Vec::set1(89.0f), x));
  const F magic = Vec::set1(12582912.0f);  // 1.5 * 2^23: adding it leaves rint(x / ln 2) in the low bits
  const F shifted = Vec::fma(x, Vec::set1(1.4426950216293335f), magic);
  const F n = Vec::sub(shifted, magic);
  F r = Vec::fma(n, Vec::set1(-0.693145751953125f), x);
  r = Vec::fma(n, Vec::set1(-1.428606765330187e-06f), r);
  F q = Vec::set1(0.0013814466074109077f);
  q = Vec::fma(q, r, Vec::set1(0.008368780836462975f));
  q = Vec::fma(q, r, Vec::set1(0.04166839271783829f));
  q = Vec::fma(q, r, Vec::set1(0.1666651964187622f));
  q = Vec::fma(q, r, Vec::set1(0.4999999403953552f));
  const F e = Vec::add(Vec::set1(1.0f), Vec::fma(Vec::mul(r, r), q, r));
  return Vec::scale(e, shifted, magic);
}
F sigmoid(F x) {
  const F one = Vec::set1(1.0f);
  return Vec::div(one, Vec::add(one, exponential(Vec::sub(Vec::zero(), x))));
}

// gelu(x) = x/2 (1 + tanh(z)) = x sigmoid(2z), 2z = x (c0 + c1 x^2), c0 = 2 sqrt(2/pi), c1 = 0.044715 c0
// (Hendrycks & Gimpel, arXiv 1606.08415).
constexpr float kGelu0 = 1.5957691216057308f;
constexpr float kGelu1 = 0.07135481282676983f;
constexpr float kGelu1Times3 = 0.2140644384803095f;

struct Value {
  F value, gate_slope, up_slope;  // slopes: derivative by gate and by up
};

template <Activation kActivation>
F activation_value(F gate, F up) {
  if constexpr (kActivation == Activation::kSwiGLU) {
    return Vec::mul(Vec::mul(gate, sigmoid(gate)), up);
  } else if constexpr (kActivation == Activation::kGelu) {
    return Vec::mul(
        gate, sigmoid(Vec::mul(gate, Vec::fma(Vec::mul(gate, gate), Vec::set1(kGelu1), Vec::set1(kGelu0)))));
  } else {
    return Vec::max(Vec::zero(), gate);
  }
}
// The value in the same operations as activation_value, and the derivatives.
template <Activation kActivation>
Value activation_slopes(F gate, F up) {
  const F one = Vec::set1(1.0f);
  if constexpr (kActivation == Activation::kSwiGLU) {
    // silu'(x) = s (1 + x (1 - s)), s = sigmoid(x)
    const F s = sigmoid(gate);
    const F silu = Vec::mul(gate, s);
    const F slope = Vec::mul(s, Vec::fma(gate, Vec::sub(one, s), one));
    return {Vec::mul(silu, up), Vec::mul(slope, up), silu};
  } else if constexpr (kActivation == Activation::kGelu) {
    // (x s(t))' = s + x s (1 - s) t', t' = c0 + 3 c1 x^2
    const F square = Vec::mul(gate, gate);
    const F s = sigmoid(Vec::mul(gate, Vec::fma(square, Vec::set1(kGelu1), Vec::set1(kGelu0))));
    const F inner = Vec::fma(square, Vec::set1(kGelu1Times3), Vec::set1(kGelu0));
    const F value = Vec::mul(gate, s);
    return {value, Vec::fma(Vec::mul(value, Vec::sub(one, s)), inner, s), Vec::zero()};
  } else {
    return {Vec::max(Vec::zero(), gate), Vec::zero_unless_positive(gate, one), Vec::zero()};
  }
}

template <Activation kActivation>
void activate_as(const float* gate, const float* up, float* act, std::int64_t n) {
  constexpr bool kGated = kActivation == Activation::kSwiGLU;
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    Vec::store(act + i,
               activation_value<kActivation>(Vec::load(gate + i), kGated ? Vec::load(up + i) : Vec::zero()));
  if (i < n) {
    const F u = kGated ? load_part<Float32>(up + i, n - i) : Vec::zero();
    store_part<Float32>(act + i, activation_value<kActivation>(load_part<Float32>(gate + i, n - i), u),
                        n - i);
  }
}
void activate(Activation activation, const float* gate, const float* up, float* act, std::int64_t n) {
  switch (activation) {
    case Activation::kSwiGLU:
      return activate_as<Activation::kSwiGLU>(gate, up, act, n);
    case Activation::kGelu:
      return activate_as<Activation::kGelu>(gate, up, act, n);
    case Activation::kRelu:
      return activate_as<Activation::kRelu>(gate, up, act, n);
  }
}

template <Activation kActivation>
void activate_backward_as(const float* gate, const float* up, const float* u, float weight, float* dgate,
                          float* dup, float* wa, float* lanes, std::int64_t n) {
  constexpr bool kGated = kActivation == Activation::kSwiGLU;
  constexpr int kVecs = static_cast<int>(kLanes) / kWidth;
  F sums[kVecs];
  for (int v = 0; v < kVecs; ++v) sums[v] = Vec::load(lanes + v * kWidth);
  const F w = Vec::set1(weight);
  // One vector of columns: its derivatives and w a are returned in a Value, u a is added to `sum`.
  const auto step = [&](F g, F p, F x, F& sum) {
    const Value a = activation_slopes<kActivation>(g, p);
    sum = Vec::fma(x, a.value, sum);
    const F wu = Vec::mul(w, x);
    return Value{Vec::mul(w, a.value), Vec::mul(a.gate_slope, wu), Vec::mul(a.up_slope, wu)};
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int v = 0; v < kVecs; ++v) {
      const std::int64_t at = i + v * kWidth;
      const Value out =
          step(Vec::load(gate + at), kGated ? Vec::load(up + at) : Vec::zero(), Vec::load(u + at), sums[v]);
      Vec::store(wa + at, out.value);
      Vec::store(dgate + at, out.gate_slope);
      if (kGated) Vec::store(dup + at, out.up_slope);
    }
  }
  for (int v = 0; v < kVecs; ++v) Vec::store(lanes + v * kWidth, sums[v]);
  for (; i < n; i += kWidth) {
    // Lanes past the end keep their sum: adding +0 could turn a -0 around.
    const std::int64_t rest = n - i < kWidth ? n - i : kWidth;
    float* lane = lanes + i % kLanes;
    F sum = load_part<Float32>(lane, rest);
    const Value out =
        step(load_part<Float32>(gate + i, rest), kGated ? load_part<Float32>(up + i, rest) : Vec::zero(),
             load_part<Float32>(u + i, rest), sum);
    store_part<Float32>(lane, sum, rest);
    store_part<Float32>(wa + i, out.value, rest);
    store_part<Float32>(dgate + i, out.gate_slope, rest);
    if (kGated) store_part<Float32>(dup + i, out.up_slope, rest);
  }
}
void activate_backward(Activation activation, const float* gate, const float* up, const float* u,
                       float weight, float* dgate, float* dup, float* wa, float* lanes, std::int64_t n) {
  switch (activation) {
    case Activation::kSwiGLU:
      return activate_backward_as<Activation::kSwiGLU>(gate, up, u, weight, dgate, dup, wa, lanes, n);
    case Activation::kGelu:
      return activate_backward_as<Activation::kGelu>(gate, up, u, weight, dgate, dup, wa, lanes, n);
    case Activation::kRelu:
      return activate_backward_as<Activation::kRelu>(gate, up, u, weight, dgate, dup, wa, lanes, n);
  }
}

// ---- rows -------------------------------------------------------------------------------------------------

template <typename Source, typename Target>
void reduce_row_as(const std::byte* src, std::int64_t row_bytes, const std::int32_t* position,
                   const float* weight, std::int64_t count, std::byte* out, std::int64_t cols) {
  const auto term = [&](std::int64_t i, std::int64_t col, std::int64_t n) {
    const auto* p = reinterpret_cast<const typename Source::Element*>(src + position[i] * row_bytes) + col;
    const F x = n == kWidth ? Source::load(p) : load_part<Source>(p, n);
    return weight ? Vec::mul(Vec::set1(weight[i]), x) : x;
  };
  auto* o = reinterpret_cast<typename Target::Element*>(out);
  constexpr int kVecs = 4;
  std::int64_t col = 0;
  for (; col + kVecs * kWidth <= cols; col += kVecs * kWidth) {
    F sum[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = count ? term(0, col + v * kWidth, kWidth) : Vec::zero();
    for (std::int64_t i = 1; i < count; ++i)
      for (int v = 0; v < kVecs; ++v) sum[v] = Vec::add(sum[v], term(i, col + v * kWidth, kWidth));
    for (int v = 0; v < kVecs; ++v) Target::store(o + col + v * kWidth, sum[v]);
  }
  for (; col < cols; col += kWidth) {
    const std::int64_t n = cols - col < kWidth ? cols - col : kWidth;
    F sum = count ? term(0, col, n) : Vec::zero();
    for (std::int64_t i = 1; i < count; ++i) sum = Vec::add(sum, term(i, col, n));
    store_part<Target>(o + col, sum, n);
  }
}
void reduce_row(const std::byte* src, DType src_dtype, std::int64_t row_bytes, const std::int32_t* position,
                const float* weight, std::int64_t count, std::byte* out, DType out_dtype, std::int64_t cols) {
  const bool source_f32 = src_dtype == DType::kF32, out_f32 = out_dtype == DType::kF32;
  if (source_f32 && out_f32)
    reduce_row_as<Float32, Float32>(src, row_bytes, position, weight, count, out, cols);
  if (source_f32 && !out_f32)
    reduce_row_as<Float32, BFloat16>(src, row_bytes, position, weight, count, out, cols);
  if (!source_f32 && out_f32)
    reduce_row_as<BFloat16, Float32>(src, row_bytes, position, weight, count, out, cols);
  if (!source_f32 && !out_f32)
    reduce_row_as<BFloat16, BFloat16>(src, row_bytes, position, weight, count, out, cols);
}

template <typename X, typename Y>
void add_scaled_as(const std::byte* x, float scale, std::byte* y, std::int64_t n) {
  const auto* xs = reinterpret_cast<const typename X::Element*>(x);
  auto* ys = reinterpret_cast<typename Y::Element*>(y);
  const F s = Vec::set1(scale);
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    Y::store(ys + i, Vec::add(Y::load(ys + i), Vec::mul(s, X::load(xs + i))));
  if (i < n) {
    const F sum = Vec::add(load_part<Y>(ys + i, n - i), Vec::mul(s, load_part<X>(xs + i, n - i)));
    store_part<Y>(ys + i, sum, n - i);
  }
}
void add_scaled(const std::byte* x, DType x_dtype, float scale, std::byte* y, DType y_dtype, std::int64_t n) {
  const bool x_f32 = x_dtype == DType::kF32, y_f32 = y_dtype == DType::kF32;
  if (x_f32 && y_f32) add_scaled_as<Float32, Float32>(x, scale, y, n);
  if (x_f32 && !y_f32) add_scaled_as<Float32, BFloat16>(x, scale, y, n);
  if (!x_f32 && y_f32) add_scaled_as<BFloat16, Float32>(x, scale, y, n);
  if (!x_f32 && !y_f32) add_scaled_as<BFloat16, BFloat16>(x, scale, y, n);
}

// ---- optimizer --------------------------------------------------------------------------------------------

void adamw(const AdamWStep& s, float* master, const float* grad, float* m, float* v, std::byte* copy,
           DType copy_dtype, std::int64_t n) {
  const auto step = [&](F& w, F g, F& first, F& second) {
    first = Vec::fma(Vec::set1(s.beta1), first, Vec::mul(Vec::set1(s.one_minus_beta1), g));
    second = Vec::fma(Vec::set1(s.beta2), second, Vec::mul(Vec::set1(s.one_minus_beta2), Vec::mul(g, g)));
    const F root = Vec::add(Vec::sqrt(Vec::mul(second, Vec::set1(s.inv_bias2))), Vec::set1(s.epsilon));
    const F move = Vec::div(Vec::mul(Vec::set1(s.step_size), first), root);
    w = Vec::sub(Vec::mul(w, Vec::set1(s.keep)), move);
  };
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    F w = Vec::load(master + i), first = Vec::load(m + i), second = Vec::load(v + i);
    step(w, Vec::load(grad + i), first, second);
    Vec::store(master + i, w);
    Vec::store(m + i, first);
    Vec::store(v + i, second);
  }
  if (i < n) {
    const std::int64_t rest = n - i;
    F w = load_part<Float32>(master + i, rest);
    F first = load_part<Float32>(m + i, rest), second = load_part<Float32>(v + i, rest);
    step(w, load_part<Float32>(grad + i, rest), first, second);
    store_part<Float32>(master + i, w, rest);
    store_part<Float32>(m + i, first, rest);
    store_part<Float32>(v + i, second, rest);
  }
  if (copy) narrow(master, copy, copy_dtype, n);
}

// ---- the table --------------------------------------------------------------------------------------------

template <int kRows>
constexpr void add_tiles(IsaOps& ops) {
  if constexpr (kRows <= Vec::kTileRows) {
    ops.tile_row_major[kRows] = &tile<kRows, true>;
    ops.tile_step_major[kRows] = &tile<kRows, false>;
    add_tiles<kRows + 1>(ops);
  }
}

template <int kRows>
constexpr void add_few_rows(IsaOps& ops) {
  ops.few_rows_transposed[kRows] = &few_rows_transposed<kRows>;
  ops.few_rows_straight[kRows] = &few_rows_straight<kRows>;
  if constexpr (kRows < kFewRows) add_few_rows<kRows + 1>(ops);
}

constexpr IsaOps make_ops(const char* name) {
  IsaOps ops{};
  ops.name = name;
  ops.tile_rows = Vec::kTileRows;
  ops.panel_width = kPanelWidth;
  add_tiles<1>(ops);
  add_few_rows<1>(ops);
  ops.widen = &widen;
  ops.narrow = &narrow;
  ops.copy_rows = &copy_rows;
  ops.copy_panels = &copy_panels;
  ops.pack_transposed = &pack_transposed;
  ops.activate = &activate;
  ops.activate_backward = &activate_backward;
  ops.reduce_row = &reduce_row;
  ops.add_scaled = &add_scaled;
  ops.adamw = &adamw;
  return ops;
}

}  // namespace
}  // namespace sluice::kernels
