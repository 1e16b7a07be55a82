// Memory-bound work on rows on an NVIDIA GPU (any of compute capability 8.0 or newer): gather, convert, weighted
// reduce and its backward, dots, activations, AdamW. Each is one pass: every input is read once, every output written
// once.
//
// Ownership: every data pointer, also those inside MatrixView, is device memory of the current device, owned by the
// caller, valid until the stream passed the call. No call allocates or synchronises; all can be captured in a CUDA
// graph. Thread-safety: calls are independent; on one stream they run in order. Blocking: none.
// Errors: shapes and null pointers are checked on the host (kInvalidArgument names the argument); a failing launch gives
// kInternal. What lies in device memory (indices, pointers into lists) is trusted: it comes from a validated plan.
//
// Counts on the device: where a call takes `num_rows`, it is the address of the true number of rows in device memory
// (int64, or null for all); the host's shape is then an upper bound, and rows past the true number are not touched.
//
// Results: gather, convert, weighted_reduce, add_scaled_rows and adamw give the CPU's bits. Sums over a row's columns
// (row_dots, dw) have a fixed order of their own: lane l of 32 adds its blocks of 8 columns ascending (blocks l, l+32,
// ...; single columns where a row is not aligned for blocks), then the lanes are added in a butterfly. So same inputs,
// same bits, whatever else is in the call. Activations: fp32 results within a few ulp; where all is bf16, exp and
// division are the quick ones, far below bf16's rounding.
// Speed: rows whose bases and strides are multiples of 16 bytes and whose columns are multiples of 8 take 16-byte
// accesses; all others go element by element.
#pragma once

#include <cstdint>

#include "sluice/base/tensor_view.hpp"
#include "sluice/kernels/cuda/grouped_gemm.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels::cuda {

// dst[i] = index[i] < first.rows ? first[index[i]] : second[index[i] - first.rows].
// first, second: dtype [*, cols] (second may have no rows); index: int32 [dst.rows]; dst: same dtype [n, cols]
void gather_rows(ConstMatrixView first, ConstMatrixView second, const std::int32_t* index, MatrixView dst,
                 const std::int64_t* num_rows, Stream stream);

// dst = src, rounded to dst's dtype.  src, dst: any dtype [n, cols]
void convert_rows(ConstMatrixView src, MatrixView dst, const std::int64_t* num_rows, Stream stream);

// out[r] = round(sum over i in row_ptr[r]..row_ptr[r+1]-1, ascending, of weight[i] * src[position[i]]), as kernels.hpp says.
// src: dtype [*, cols]; row_ptr: int64 [out.rows + 1]; position: int32 [row_ptr.back()]; weight: f32, same length, or
// null for all ones; out: dtype [rows, cols]
void weighted_reduce(ConstMatrixView src, const std::int64_t* row_ptr, const std::int32_t* position,
                     const float* weight, MatrixView out, Stream stream);

// Its backward: for i in row_ptr[r]..row_ptr[r+1]-1:  dsrc[position[i]] = round(weight[i] * dout[r]);
// dweight[i] = <dout[r], src[position[i]]>. Each position must occur once. Either result may be absent.
// dout: dtype [rows, cols]; src: dtype [*, cols] (read for dweight only); weight: f32 or null for all ones;
// dsrc: dtype [*, cols] or null data; dweight: f32 [row_ptr.back()] or null
void weighted_reduce_backward(ConstMatrixView dout, ConstMatrixView src, const std::int64_t* row_ptr,
                              const std::int32_t* position, const float* weight, MatrixView dsrc,
                              float* dweight, Stream stream);

// y[t] += scale[t] * x[t].  x, y: dtype [n, cols]; scale: f32 [n]
void add_scaled_rows(ConstMatrixView x, const float* scale, MatrixView y, Stream stream);

// out[i] = <a[row_a(i)], b[row_b(i)]>, row_x(i) = x_index null ? i : x_index[i].  a, b: dtype [*, cols]; out: f32 [n]
void row_dots(ConstMatrixView a, const std::int32_t* a_index, ConstMatrixView b, const std::int32_t* b_index,
              float* out, std::int64_t n, Stream stream);

// act[p] = activation(h[p]) for rows begin..end-1.  h: dtype [*, preactivation_cols]; act: dtype [*, ffn]
void activation_forward(Activation activation, ConstMatrixView h, MatrixView act, std::int64_t begin,
                        std::int64_t end, const std::int64_t* num_rows, Stream stream);

// One pass over rows begin..end-1, as kernels.hpp says: a = activation(h[p]); dw[p] = <u[p], a>;
// dh[p] = activation'(h[p]) * (weight[p] * u[p]); wa[p] = weight[p] * a. The activation is recomputed from h, so it
// need not be kept; wa may have null data where weight * a is not wanted.
// h, dh: dtype [*, preactivation_cols]; u, wa: dtype [*, ffn]; weight, dw: f32 [*]. dh may alias h; wa may alias u.
void activation_backward(Activation activation, ConstMatrixView h, ConstMatrixView u, const float* weight,
                         float* dw, MatrixView dh, MatrixView wa, std::int64_t begin, std::int64_t end,
                         const std::int64_t* num_rows, Stream stream);

// kernels.hpp's adamw.  master, grad, m, v: f32 [n]; copy: bf16 or f32 [n], or null
void adamw(const AdamW& options, float* master, const float* grad, float* m, float* v, void* copy,
           DType copy_dtype, std::int64_t n, Stream stream);

}  // namespace sluice::kernels::cuda
