// Compiled with -fmad=false: a*b+c is an FMA only where the code says fmaf, as on the CPU.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/launch.hpp"
#include "sluice/kernels/cuda/rows.hpp"

namespace sluice::kernels::cuda {
namespace {

constexpr auto kBad = ErrorCode::kInvalidArgument;
constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements a thread handles at a time ...
constexpr int kHalf = 4;  // ... where fp32 alone is written: a warp's 16-byte accesses then lie side by side
constexpr unsigned kAll = 0xFFFFFFFFu;

using Bf16 = __nv_bfloat16;

// ---- elements in groups of kN ----------------------------------------------------------------------------------------
template <int kN>
struct Lanes {
  float v[kN];
};

__device__ __forceinline__ float low_half(std::uint32_t bits) {
  return __uint_as_float(bits << 16);
}
__device__ __forceinline__ float high_half(std::uint32_t bits) {
  return __uint_as_float(bits & 0xFFFF0000u);
}
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

template <int kN>
__device__ __forceinline__ Lanes<kN> load(const float* p) {
  Lanes<kN> r;
  if constexpr (kN == kVector) {
    const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
    r.v[0] = a.x, r.v[1] = a.y, r.v[2] = a.z, r.v[3] = a.w;
    r.v[4] = b.x, r.v[5] = b.y, r.v[6] = b.z, r.v[7] = b.w;
  } else if constexpr (kN == 4) {
    const float4 a = *reinterpret_cast<const float4*>(p);
    r.v[0] = a.x, r.v[1] = a.y, r.v[2] = a.z, r.v[3] = a.w;
  } else {
    r.v[0] = *p;
  }
  return r;
}
template <int kN>
__device__ __forceinline__ Lanes<kN> load(const Bf16* p) {
  Lanes<kN> r;
  if constexpr (kN == kVector) {
    const uint4 a = *reinterpret_cast<const uint4*>(p);
    r.v[0] = low_half(a.x), r.v[1] = high_half(a.x), r.v[2] = low_half(a.y), r.v[3] = high_half(a.y);
    r.v[4] = low_half(a.z), r.v[5] = high_half(a.z), r.v[6] = low_half(a.w), r.v[7] = high_half(a.w);
  } else if constexpr (kN == 4) {
    const uint2 a = *reinterpret_cast<const uint2*>(p);
    r.v[0] = low_half(a.x), r.v[1] = high_half(a.x), r.v[2] = low_half(a.y), r.v[3] = high_half(a.y);
  } else {
    r.v[0] = __bfloat162float(*p);
  }
  return r;
}
// Results are not read again by the same kernel: they leave the caches first.
template <int kN>
__device__ __forceinline__ void store(float* p, const Lanes<kN>& r) {
  if constexpr (kN == kVector) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(r.v[0], r.v[1], r.v[2], r.v[3]));
    __stcs(reinterpret_cast<float4*>(p + 4), make_float4(r.v[4], r.v[5], r.v[6], r.v[7]));
  } else if constexpr (kN == 4) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(r.v[0], r.v[1], r.v[2], r.v[3]));
  } else {
    *p = r.v[0];
  }
}
template <int kN>
__device__ __forceinline__ void store(Bf16* p, const Lanes<kN>& r) {
  if constexpr (kN == kVector) {
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(pack(r.v[0], r.v[1]), pack(r.v[2], r.v[3]),
                                                   pack(r.v[4], r.v[5]), pack(r.v[6], r.v[7])));
  } else if constexpr (kN == 4) {
    __stcs(reinterpret_cast<uint2*>(p), make_uint2(pack(r.v[0], r.v[1]), pack(r.v[2], r.v[3])));
  } else {
    *p = __float2bfloat16_rn(r.v[0]);
  }
}

// ---- which element a thread works on ---------------------------------------------------------------------------------
// Rows of `units` units, cut into blocks of threads without regard to row ends. One 64-bit division a block.
struct Place {
  std::int64_t row;
  int unit;
};
__device__ __forceinline__ Place place_of(std::int64_t first_row, int first_unit, int offset, int units) {
  const int at = first_unit + offset;
  const int rows = at / units;
  return {first_row + rows, at - rows * units};
}
__device__ __forceinline__ std::int64_t true_rows(std::int64_t bound, const std::int64_t* num_rows) {
  return num_rows != nullptr && *num_rows < bound ? *num_rows : bound;
}

template <typename Unit, int kEach>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Unit* first, std::int64_t first_stride, std::int64_t first_rows, const Unit* second,
                  std::int64_t second_stride, const std::int32_t* index, Unit* dst, std::int64_t dst_stride,
                  std::int64_t bound, const std::int64_t* num_rows, int units) {
  const std::int64_t rows = true_rows(bound, num_rows);
  const std::int64_t begin = blockIdx.x * std::int64_t{kThreads * kEach};
  const std::int64_t first_row = begin / units;
  if (first_row >= rows) return;
  const int first_unit = static_cast<int>(begin - first_row * units);
  Unit value[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const Place at = place_of(first_row, first_unit, j * kThreads + static_cast<int>(threadIdx.x), units);
    if (at.row < rows) {
      const std::int64_t from = index[at.row];
      value[j] = from < first_rows ? first[from * first_stride + at.unit]
                                   : second[(from - first_rows) * second_stride + at.unit];
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const Place at = place_of(first_row, first_unit, j * kThreads + static_cast<int>(threadIdx.x), units);
    if (at.row < rows) {
      if constexpr (sizeof(Unit) == 16) {
        __stcs(&dst[at.row * dst_stride + at.unit], value[j]);
      } else {
        dst[at.row * dst_stride + at.unit] = value[j];
      }
    }
  }
}

template <typename From, typename To, int kN, int kEach>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const From* src, std::int64_t src_stride, To* dst, std::int64_t dst_stride,
                   std::int64_t bound, const std::int64_t* num_rows, int units) {
  const std::int64_t rows = true_rows(bound, num_rows);
  const std::int64_t begin = blockIdx.x * std::int64_t{kThreads * kEach};
  const std::int64_t first_row = begin / units;
  if (first_row >= rows) return;
  const int first_unit = static_cast<int>(begin - first_row * units);
  Lanes<kN> value[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const Place at = place_of(first_row, first_unit, j * kThreads + static_cast<int>(threadIdx.x), units);
    if (at.row < rows) value[j] = load<kN>(src + at.row * src_stride + at.unit * kN);
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const Place at = place_of(first_row, first_unit, j * kThreads + static_cast<int>(threadIdx.x), units);
    if (at.row < rows) store<kN>(dst + at.row * dst_stride + at.unit * kN, value[j]);
  }
}

// One thread: kN columns of one row, terms in order; several terms are loaded ahead.
template <typename From, typename To, int kN>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const From* __restrict__ src, std::int64_t src_stride,
                  const std::int64_t* __restrict__ row_ptr, const std::int32_t* __restrict__ position,
                  const float* __restrict__ weight, To* __restrict__ out, std::int64_t out_stride,
                  std::int64_t rows, int units) {
  constexpr int kAhead = 4;
  const std::int64_t begin = blockIdx.x * std::int64_t{kThreads};
  const std::int64_t first_row = begin / units;
  const Place at =
      place_of(first_row, static_cast<int>(begin - first_row * units), static_cast<int>(threadIdx.x), units);
  if (at.row >= rows) return;
  std::int64_t i = row_ptr[at.row];
  const std::int64_t end = row_ptr[at.row + 1];
  const From* column = src + at.unit * kN;
  Lanes<kN> sum{};
  bool started = false;
  const auto add = [&](const Lanes<kN>& x, std::int64_t term) {
    const float w = weight != nullptr ? weight[term] : 1.0f;
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      const float value = weight != nullptr ? w * x.v[c] : x.v[c];
      sum.v[c] = started ? sum.v[c] + value : value;
    }
    started = true;
  };
  for (; i + kAhead <= end; i += kAhead) {
    Lanes<kN> x[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) x[a] = load<kN>(column + position[i + a] * src_stride);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) add(x[a], i + a);
  }
  for (; i < end; ++i) add(load<kN>(column + position[i] * src_stride), i);
  store<kN>(out + at.row * out_stride + at.unit * kN, sum);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

// One block a row of dout (it stays in L1), one warp a route. A lane loads one unit of src at a time: with more, reads and
// writes come in longer bursts, which is slower (measured: two 6%, four over 20%).
template <typename D, typename S, typename G, int kN>
__global__ void __launch_bounds__(kThreads)
    reduce_backward_kernel(const D* dout, std::int64_t dout_stride, const S* src, std::int64_t src_stride,
                           const std::int64_t* row_ptr, const std::int32_t* position, const float* weight,
                           G* dsrc, std::int64_t dsrc_stride, float* dweight, int units) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row = blockIdx.x;
  const D* d = dout + row * dout_stride;
  const std::int64_t end = row_ptr[row + 1];
  for (std::int64_t i = row_ptr[row] + warp; i < end; i += kThreads / 32) {
    const std::int64_t p = position[i];
    const float w = weight != nullptr ? weight[i] : 1.0f;
    float dot = 0.0f;
    for (int unit = lane; unit < units; unit += 32) {
      Lanes<kN> s;
      if (dweight != nullptr) s = load<kN>(src + p * src_stride + unit * kN);
      Lanes<kN> x = load<kN>(d + unit * kN);
      if (dweight != nullptr) {
#pragma unroll
        for (int c = 0; c < kN; ++c) dot = fmaf(x.v[c], s.v[c], dot);
      }
      if (dsrc != nullptr) {
#pragma unroll
        for (int c = 0; c < kN; ++c) x.v[c] = w * x.v[c];
        store<kN>(dsrc + p * dsrc_stride + unit * kN, x);
      }
    }
    if (dweight != nullptr) {
      dot = warp_sum(dot);
      if (lane == 0) dweight[i] = dot;
    }
  }
}

template <typename X, typename Y, int kN>
__global__ void __launch_bounds__(kThreads)
    add_scaled_kernel(const X* x, std::int64_t x_stride, const float* scale, Y* y, std::int64_t y_stride,
                      std::int64_t rows, int units) {
  const std::int64_t begin = blockIdx.x * std::int64_t{kThreads};
  const std::int64_t first_row = begin / units;
  const Place at =
      place_of(first_row, static_cast<int>(begin - first_row * units), static_cast<int>(threadIdx.x), units);
  if (at.row >= rows) return;
  Y* target = y + at.row * y_stride + at.unit * kN;
  const Lanes<kN> a = load<kN>(x + at.row * x_stride + at.unit * kN);
  Lanes<kN> b = load<kN>(target);
  const float s = scale[at.row];
#pragma unroll
  for (int c = 0; c < kN; ++c) b.v[c] = b.v[c] + s * a.v[c];
  store<kN>(target, b);
}

template <typename A, typename B, int kN>
__global__ void __launch_bounds__(kThreads)
    dots_kernel(const A* a, std::int64_t a_stride, const std::int32_t* a_index, const B* b,
                std::int64_t b_stride, const std::int32_t* b_index, float* out, std::int64_t n, int units) {
  constexpr int kAhead = 4;
  const int lane = threadIdx.x % 32;
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads / 32} + threadIdx.x / 32;
  if (i >= n) return;
  const A* x = a + (a_index != nullptr ? a_index[i] : i) * a_stride;
  const B* y = b + (b_index != nullptr ? b_index[i] : i) * b_stride;
  float dot = 0.0f;
  for (int unit = lane; unit < units; unit += 32 * kAhead) {
    Lanes<kN> p[kAhead], q[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (unit + 32 * k < units) {
        p[k] = load<kN>(x + (unit + 32 * k) * kN);
        q[k] = load<kN>(y + (unit + 32 * k) * kN);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (unit + 32 * k < units) {
#pragma unroll
        for (int c = 0; c < kN; ++c) dot = fmaf(p[k].v[c], q[k].v[c], dot);
      }
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) out[i] = dot;
}

// ---- activations -----------------------------------------------------------------------------------------------------
struct Value {
  float value, gate_slope, up_slope;
};
// kQuick: results are rounded to bf16, so exp and division may be off by a few ulp of fp32 (and by 2^-20 far out, where
// |gate| is in the tens).
template <bool kQuick>
__device__ __forceinline__ float logistic(float x) {
  return kQuick ? __fdividef(1.0f, 1.0f + __expf(-x)) : 1.0f / (1.0f + expf(-x));
}
template <Activation kActivation, bool kQuick>
__device__ __forceinline__ Value activation_value(float gate, float up) {
  if constexpr (kActivation == Activation::kSwiGLU) {
    const float s = logistic<kQuick>(gate);
    const float silu = gate * s;
    return {silu * up, up * fmaf(silu, 1.0f - s, s), silu};
  } else if constexpr (kActivation == Activation::kGelu) {
    // (1 + tanh(u)) / 2 = logistic(2u), and its derivative is logistic(2u) (1 - logistic(2u)) 2u': nothing cancels.
    constexpr float kScale = 0.7978845608028654f, kCube = 0.044715f;
    const float square = gate * gate;
    const float half = logistic<kQuick>(2.0f * kScale * fmaf(kCube * square, gate, gate));
    const float slope =
        half + half * (1.0f - half) * (2.0f * kScale * gate) * fmaf(3.0f * kCube, square, 1.0f);
    return {gate * half, slope, 0.0f};
  } else {
    return {gate > 0.0f ? gate : 0.0f, gate > 0.0f ? 1.0f : 0.0f, 0.0f};
  }
}

template <Activation kActivation, typename H, typename A, int kN>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(const H* h, std::int64_t h_stride, A* act, std::int64_t act_stride, std::int64_t begin,
                      std::int64_t end, const std::int64_t* num_rows, int units) {
  end = true_rows(end, num_rows);
  const std::int64_t item = blockIdx.x * std::int64_t{kThreads};
  const std::int64_t first_row = item / units;
  const Place at = place_of(begin + first_row, static_cast<int>(item - first_row * units),
                            static_cast<int>(threadIdx.x), units);
  if (at.row >= end) return;
  const H* row = h + at.row * h_stride;
  const Lanes<kN> gate = load<kN>(row + at.unit * kN);
  Lanes<kN> up{};
  if constexpr (kActivation == Activation::kSwiGLU) up = load<kN>(row + (units + at.unit) * kN);
  Lanes<kN> a;
#pragma unroll
  for (int c = 0; c < kN; ++c)
    a.v[c] = activation_value<kActivation, std::is_same_v<A, Bf16>>(gate.v[c], up.v[c]).value;
  store<kN>(act + at.row * act_stride + at.unit * kN, a);
}

// One warp a row. dh may alias h, wa may alias u: a thread reads what it overwrites first.
template <Activation kActivation, typename H, typename U, int kN>
__global__ void __launch_bounds__(kThreads)
    activation_backward_kernel(const H* h, std::int64_t h_stride, const U* u, std::int64_t u_stride,
                               const float* weight, float* dw, H* dh, std::int64_t dh_stride, U* wa,
                               std::int64_t wa_stride, std::int64_t begin, std::int64_t end,
                               const std::int64_t* num_rows, int units) {
  constexpr bool kGated = kActivation == Activation::kSwiGLU;
  constexpr int kAhead = kN == 1 ? 1 : 2;
  end = true_rows(end, num_rows);
  const int lane = threadIdx.x % 32;
  const std::int64_t p = begin + blockIdx.x * std::int64_t{kThreads / 32} + threadIdx.x / 32;
  if (p >= end) return;
  const float w = weight[p];
  float dot = 0.0f;
  for (int first = lane; first < units; first += 32 * kAhead) {
    Lanes<kN> gate[kAhead], up[kAhead], us[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int unit = first + 32 * k;
      if (unit < units) {
        gate[k] = load<kN>(h + p * h_stride + unit * kN);
        if constexpr (kGated) up[k] = load<kN>(h + p * h_stride + (units + unit) * kN);
        us[k] = load<kN>(u + p * u_stride + unit * kN);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int unit = first + 32 * k;
      if (unit < units) {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          const Value a = activation_value < kActivation, std::is_same_v<H, Bf16> && std::is_same_v < U,
                      Bf16 >> (gate[k].v[c], kGated ? up[k].v[c] : 0.0f);
          dot = fmaf(us[k].v[c], a.value, dot);
          const float wu = w * us[k].v[c];
          gate[k].v[c] = a.gate_slope * wu;
          if constexpr (kGated) up[k].v[c] = a.up_slope * wu;
          us[k].v[c] = w * a.value;
        }
        store<kN>(dh + p * dh_stride + unit * kN, gate[k]);
        if constexpr (kGated) store<kN>(dh + p * dh_stride + (units + unit) * kN, up[k]);
        if (wa != nullptr) store<kN>(wa + p * wa_stride + unit * kN, us[k]);
      }
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) dw[p] = dot;
}

// ---- AdamW -----------------------------------------------------------------------------------------------------------
struct AdamWStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_bias2, keep, epsilon;
};

template <typename Copy, int kN>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamWStep s, float* master, const float* grad,
                                                         float* m, float* v, Copy* copy, std::int64_t n) {
  const std::int64_t at = (blockIdx.x * std::int64_t{kThreads} + threadIdx.x) * kN;
  if (at + kN > n) return;
  const Lanes<kN> g = load<kN>(grad + at);
  Lanes<kN> mm = load<kN>(m + at), vv = load<kN>(v + at), w = load<kN>(master + at);
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    mm.v[c] = fmaf(s.beta1, mm.v[c], s.one_minus_beta1 * g.v[c]);
    vv.v[c] = fmaf(s.beta2, vv.v[c], s.one_minus_beta2 * (g.v[c] * g.v[c]));
    w.v[c] = w.v[c] * s.keep - s.step_size * mm.v[c] / (sqrtf(vv.v[c] * s.inv_bias2) + s.epsilon);
  }
  store<kN>(m + at, mm);
  store<kN>(v + at, vv);
  store<kN>(master + at, w);
  if (copy != nullptr) store<kN>(copy + at, w);
}

// ---- host side -------------------------------------------------------------------------------------------------------
bool aligned(const ConstMatrixView& view) {
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.row_bytes_stride() % 16 == 0;
}
bool vectors(std::int64_t cols, std::initializer_list<ConstMatrixView> views) {
  if (cols % kVector != 0) return false;
  for (const ConstMatrixView& view : views)
    if (view.data != nullptr && !aligned(view)) return false;
  return true;
}

template <typename T>
struct Type {
  using type = T;
};
// function(Type<float>) or function(Type<Bf16>)
template <typename Function>
void with_type(DType dtype, const Function& function) {
  if (dtype == DType::kF32) {
    function(Type<float>{});
  } else {
    function(Type<Bf16>{});
  }
}
template <int kN>
struct Count {};
template <typename Function>
void with_vectors(bool vector, const Function& function) {
  if (vector) {
    function(Count<kVector>{});
  } else {
    function(Count<1>{});
  }
}
template <Activation kActivation>
struct Kind {};
template <typename Function>
void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kSwiGLU:
      return function(Kind<Activation::kSwiGLU>{});
    case Activation::kGelu:
      return function(Kind<Activation::kGelu>{});
    case Activation::kRelu:
      return function(Kind<Activation::kRelu>{});
  }
  Require(false, kBad, "activation is ", static_cast<int>(activation),
          ", must be one of kSwiGLU, kGelu, kRelu");
}

template <typename T, typename View>
auto* as(const View& view) {
  using Byte = std::remove_reference_t<decltype(*view.data)>;
  return reinterpret_cast<std::conditional_t<std::is_const_v<Byte>, const T, T>*>(view.data);
}

void check_columns(std::int64_t cols, const char* what) {
  Require(cols < (std::int64_t{1} << 30), kBad, what, " has ", cols,
          " columns; fewer than 2^30 are possible");
}
void check_pointer(const void* pointer, const char* what) {
  Require(pointer != nullptr, kBad, what, " is null");
}
void check_launch(const char* what) {
  check_cuda(cudaGetLastError(), what);
}
// At least `rows` rows of exactly `cols` columns.
void check_view(const ConstMatrixView& view, const char* what, std::int64_t rows, std::int64_t cols) {
  Require(view.rows >= rows, kBad, what, " has ", view.rows, " rows, must have at least ", rows);
  require_shape(view, what, view.rows, cols);
}

}  // namespace

void gather_rows(ConstMatrixView first, ConstMatrixView second, const std::int32_t* index, MatrixView dst,
                 const std::int64_t* num_rows, Stream stream) {
  require_shape(dst, "dst", dst.rows, dst.cols);
  check_columns(dst.cols, "dst");
  for (const auto& [view, what] : {std::pair(first, "first"), std::pair(second, "second")}) {
    if (view.rows == 0) continue;
    require_shape(view, what, view.rows, dst.cols);
    Require(view.dtype == dst.dtype, kBad, what, " is ", to_string(view.dtype), ", dst is ",
            to_string(dst.dtype));
  }
  if (dst.rows == 0 || dst.cols == 0) return;
  check_pointer(index, "index");
  const auto run = [&]<typename Unit, int kEach>(Type<Unit>, Count<kEach>) {
    const auto size = static_cast<std::int64_t>(sizeof(Unit));
    const std::int64_t units = dst.row_bytes() / size;
    gather_kernel<Unit, kEach>
        <<<blocks_for(dst.rows * units, kThreads * kEach, "gather_rows"), kThreads, 0, stream>>>(
            reinterpret_cast<const Unit*>(first.data), first.row_bytes_stride() / size, first.rows,
            reinterpret_cast<const Unit*>(second.data), second.row_bytes_stride() / size, index,
            reinterpret_cast<Unit*>(dst.data), dst.row_bytes_stride() / size, dst.rows, num_rows,
            static_cast<int>(units));
  };
  const auto fits = [&](const ConstMatrixView& view) { return view.rows == 0 || aligned(view); };
  if (dst.row_bytes() % 16 == 0 && aligned(dst) && fits(first) && fits(second)) {
    run(Type<uint4>{}, Count<4>{});
  } else if (dst.dtype == DType::kF32) {
    run(Type<std::uint32_t>{}, Count<4>{});
  } else {
    run(Type<std::uint16_t>{}, Count<4>{});
  }
  check_launch("gather_rows");
}

void convert_rows(ConstMatrixView src, MatrixView dst, const std::int64_t* num_rows, Stream stream) {
  require_shape(dst, "dst", dst.rows, dst.cols);
  require_shape(src, "src", dst.rows, dst.cols);
  check_columns(dst.cols, "dst");
  if (dst.rows == 0 || dst.cols == 0) return;
  with_type(src.dtype, [&]<typename From>(Type<From>) {
    with_type(dst.dtype, [&]<typename To>(Type<To>) {
      with_vectors(vectors(dst.cols, {src, dst}), [&]<int kWidth>(Count<kWidth>) {
        constexpr int kN = kWidth > 1 && std::is_same_v<To, float> ? kHalf : kWidth;
        constexpr int kEach = kN == kHalf ? 4 : 2;
        const std::int64_t units = dst.cols / kN;
        convert_kernel<From, To, kN, kEach>
            <<<blocks_for(dst.rows * units, kThreads * kEach, "convert_rows"), kThreads, 0, stream>>>(
                as<From>(src), src.row_stride, as<To>(dst), dst.row_stride, dst.rows, num_rows,
                static_cast<int>(units));
      });
    });
  });
  check_launch("convert_rows");
}

void weighted_reduce(ConstMatrixView src, const std::int64_t* row_ptr, const std::int32_t* position,
                     const float* weight, MatrixView out, Stream stream) {
  require_shape(out, "out", out.rows, out.cols);
  if (src.rows > 0) require_shape(src, "src", src.rows, out.cols);
  check_columns(out.cols, "out");
  if (out.rows == 0 || out.cols == 0) return;
  check_pointer(row_ptr, "row_ptr");
  with_type(src.dtype, [&]<typename From>(Type<From>) {
    with_type(out.dtype, [&]<typename To>(Type<To>) {
      with_vectors(vectors(out.cols, {src, out}), [&]<int kN>(Count<kN>) {
        const std::int64_t units = out.cols / kN;
        reduce_kernel<From, To, kN>
            <<<blocks_for(out.rows * units, kThreads, "weighted_reduce"), kThreads, 0, stream>>>(
                as<From>(src), src.row_stride, row_ptr, position, weight, as<To>(out), out.row_stride,
                out.rows, static_cast<int>(units));
      });
    });
  });
  check_launch("weighted_reduce");
}

void weighted_reduce_backward(ConstMatrixView dout, ConstMatrixView src, const std::int64_t* row_ptr,
                              const std::int32_t* position, const float* weight, MatrixView dsrc,
                              float* dweight, Stream stream) {
  require_shape(dout, "dout", dout.rows, dout.cols);
  if (dweight != nullptr) require_shape(src, "src", src.rows, dout.cols);
  if (dsrc.data != nullptr) require_shape(dsrc, "dsrc", dsrc.rows, dout.cols);
  check_columns(dout.cols, "dout");
  if (dout.rows == 0 || (dsrc.data == nullptr && dweight == nullptr)) return;
  check_pointer(row_ptr, "row_ptr");
  with_type(dout.dtype, [&]<typename D>(Type<D>) {
    with_type(src.dtype, [&]<typename S>(Type<S>) {
      with_type(dsrc.dtype, [&]<typename G>(Type<G>) {
        with_vectors(vectors(dout.cols, {dout, src, dsrc}), [&]<int kN>(Count<kN>) {
          reduce_backward_kernel<D, S, G, kN>
              <<<blocks_for(dout.rows, 1, "weighted_reduce_backward"), kThreads, 0, stream>>>(
                  as<D>(dout), dout.row_stride, as<S>(src), src.row_stride, row_ptr, position, weight,
                  as<G>(dsrc), dsrc.row_stride, dweight, static_cast<int>(dout.cols / kN));
        });
      });
    });
  });
  check_launch("weighted_reduce_backward");
}

void add_scaled_rows(ConstMatrixView x, const float* scale, MatrixView y, Stream stream) {
  require_shape(y, "y", y.rows, y.cols);
  require_shape(x, "x", y.rows, y.cols);
  check_columns(y.cols, "y");
  if (y.rows == 0 || y.cols == 0) return;
  check_pointer(scale, "scale");
  with_type(x.dtype, [&]<typename X>(Type<X>) {
    with_type(y.dtype, [&]<typename Y>(Type<Y>) {
      with_vectors(vectors(y.cols, {x, y}), [&]<int kN>(Count<kN>) {
        const std::int64_t units = y.cols / kN;
        add_scaled_kernel<X, Y, kN>
            <<<blocks_for(y.rows * units, kThreads, "add_scaled_rows"), kThreads, 0, stream>>>(
                as<X>(x), x.row_stride, scale, as<Y>(y), y.row_stride, y.rows, static_cast<int>(units));
      });
    });
  });
  check_launch("add_scaled_rows");
}

void row_dots(ConstMatrixView a, const std::int32_t* a_index, ConstMatrixView b, const std::int32_t* b_index,
              float* out, std::int64_t n, Stream stream) {
  Require(a.cols == b.cols, kBad, "a has ", a.cols, " columns, b has ", b.cols);
  check_view(a, "a", a_index == nullptr ? n : 0, a.cols);
  check_view(b, "b", b_index == nullptr ? n : 0, b.cols);
  check_columns(a.cols, "a");
  if (n == 0) return;
  check_pointer(out, "out");
  with_type(a.dtype, [&]<typename A>(Type<A>) {
    with_type(b.dtype, [&]<typename B>(Type<B>) {
      with_vectors(vectors(a.cols, {a, b}), [&]<int kN>(Count<kN>) {
        dots_kernel<A, B, kN><<<blocks_for(n, kThreads / 32, "row_dots"), kThreads, 0, stream>>>(
            as<A>(a), a.row_stride, a_index, as<B>(b), b.row_stride, b_index, out, n,
            static_cast<int>(a.cols / kN));
      });
    });
  });
  check_launch("row_dots");
}

void activation_forward(Activation activation, ConstMatrixView h, MatrixView act, std::int64_t begin,
                        std::int64_t end, const std::int64_t* num_rows, Stream stream) {
  Require(0 <= begin && begin <= end, kBad, "rows begin..end-1 are ", begin, "..", end,
          ", must satisfy 0 <= begin <= end");
  if (begin == end || act.cols == 0) return;
  check_view(act, "act", end, act.cols);
  check_view(h, "h", end, preactivation_cols(activation, act.cols));
  check_columns(h.cols, "h");
  with_activation(activation, [&]<Activation kActivation>(Kind<kActivation>) {
    with_type(h.dtype, [&]<typename H>(Type<H>) {
      with_type(act.dtype, [&]<typename A>(Type<A>) {
        with_vectors(vectors(act.cols, {h, act}), [&]<int kN>(Count<kN>) {
          const std::int64_t units = act.cols / kN;
          activation_kernel<kActivation, H, A, kN>
              <<<blocks_for((end - begin) * units, kThreads, "activation_forward"), kThreads, 0, stream>>>(
                  as<H>(h), h.row_stride, as<A>(act), act.row_stride, begin, end, num_rows,
                  static_cast<int>(units));
        });
      });
    });
  });
  check_launch("activation_forward");
}

void activation_backward(Activation activation, ConstMatrixView h, ConstMatrixView u, const float* weight,
                         float* dw, MatrixView dh, MatrixView wa, std::int64_t begin, std::int64_t end,
                         const std::int64_t* num_rows, Stream stream) {
  Require(0 <= begin && begin <= end, kBad, "rows begin..end-1 are ", begin, "..", end,
          ", must satisfy 0 <= begin <= end");
  if (begin == end) return;
  check_view(u, "u", end, u.cols);
  check_view(h, "h", end, preactivation_cols(activation, u.cols));
  check_view(dh, "dh", end, h.cols);
  if (wa.data != nullptr) {
    check_view(wa, "wa", end, u.cols);
    Require(wa.dtype == u.dtype, kBad, "wa is ", to_string(wa.dtype), ", u is ", to_string(u.dtype));
  }
  Require(dh.dtype == h.dtype, kBad, "dh is ", to_string(dh.dtype), ", h is ", to_string(h.dtype));
  check_columns(h.cols, "h");
  check_pointer(weight, "weight");
  check_pointer(dw, "dw");
  with_activation(activation, [&]<Activation kActivation>(Kind<kActivation>) {
    with_type(h.dtype, [&]<typename H>(Type<H>) {
      with_type(u.dtype, [&]<typename U>(Type<U>) {
        with_vectors(vectors(u.cols, {h, u, dh, wa}), [&]<int kN>(Count<kN>) {
          activation_backward_kernel<kActivation, H, U, kN>
              <<<blocks_for(end - begin, kThreads / 32, "activation_backward"), kThreads, 0, stream>>>(
                  as<H>(h), h.row_stride, as<U>(u), u.row_stride, weight, dw, as<H>(dh), dh.row_stride,
                  as<U>(wa), wa.row_stride, begin, end, num_rows, static_cast<int>(u.cols / kN));
        });
      });
    });
  });
  check_launch("activation_backward");
}

void adamw(const AdamW& options, float* master, const float* grad, float* m, float* v, void* copy,
           DType copy_dtype, std::int64_t n, Stream stream) {
  Require(options.step >= 1, kBad, "step is ", options.step, ", must be at least 1");
  if (n == 0) return;
  for (const auto& [pointer, what] :
       {std::pair<const void*, const char*>(master, "master"), {grad, "grad"}, {m, "m"}, {v, "v"}})
    check_pointer(pointer, what);
  const double beta1 = options.beta1, beta2 = options.beta2, t = static_cast<double>(options.step);
  AdamWStep step;
  step.beta1 = options.beta1;
  step.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  step.beta2 = options.beta2;
  step.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  step.step_size = static_cast<float>(options.learning_rate / (1.0 - std::pow(beta1, t)));
  step.inv_bias2 = static_cast<float>(1.0 / (1.0 - std::pow(beta2, t)));
  step.keep = static_cast<float>(1.0 - static_cast<double>(options.learning_rate) * options.weight_decay);
  step.epsilon = options.epsilon;
  bool vector = true;
  for (const void* pointer :
       {static_cast<const void*>(master), static_cast<const void*>(grad), static_cast<const void*>(m),
        static_cast<const void*>(v), static_cast<const void*>(copy)})
    vector = vector && reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  const std::int64_t body = vector ? n / kHalf * kHalf : 0;
  with_type(copy_dtype, [&]<typename Copy>(Type<Copy>) {
    Copy* const target = static_cast<Copy*>(copy);
    if (body > 0)
      adamw_kernel<Copy, kHalf><<<blocks_for(body, kThreads * kHalf, "adamw"), kThreads, 0, stream>>>(
          step, master, grad, m, v, target, body);
    if (body < n)
      adamw_kernel<Copy, 1><<<blocks_for(n - body, kThreads, "adamw"), kThreads, 0, stream>>>(
          step, master + body, grad + body, m + body, v + body, target != nullptr ? target + body : nullptr,
          n - body);
  });
  check_launch("adamw");
}

}  // namespace sluice::kernels::cuda
