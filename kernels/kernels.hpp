// Computing on rows: what an MoE layer needs from a device, as one interface. The CPU implements it in kernels/cpu;
// other devices implement the same calls over their own memory and streams.
//
// Ownership: every buffer belongs to the caller and stays valid until the call returned (CPU) or the stream passed it
// (devices). No call allocates in the steady state: scratch grows to its high-water mark and is kept by the object.
// Thread-safety: one object serves one rank; its calls come from one thread at a time (it may use workers inside).
// Errors: shape and dtype mismatches throw kInvalidArgument naming the argument. Indices are trusted: they come from
// a validated plan.
//
// GEMM contract (docs/design.md): each output element is ONE chain of fused multiply-adds in fp32,
//     c = c0;  for k ascending: c = fma(a[k], b[k], c)
// with c0 = 0 (forward, dgrad) or the value already there (wgrad), where the reduction index ascends over hidden/ffn
// columns (forward, dgrad) or over rows in the given order (wgrad). No split-K, no reassociation. So a row's result
// depends on that row and the weights alone, not on tile, thread or row count; tests compare bitwise with a scalar loop.
// bf16 inputs are widened to fp32 first (exact); bf16 outputs are rounded once at the end. The dtypes of the arguments
// of one call may differ from each other.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "sluice/base/dtype.hpp"
#include "sluice/base/tensor_view.hpp"

namespace sluice::kernels {

enum class Activation : std::uint8_t {
  kSwiGLU,  // a = silu(h[0:ffn]) * h[ffn:2*ffn]; h has 2*ffn columns
  kGelu,    // a = gelu(h), tanh form (Hendrycks & Gimpel, arXiv 1606.08415)
  kRelu,    // a = max(h, 0)
};
constexpr std::int64_t preactivation_cols(Activation activation, std::int64_t ffn) {
  return activation == Activation::kSwiGLU ? 2 * ffn : ffn;
}

// Rows of a grouped operation: positions group_ptr[g] .. group_ptr[g+1]-1 belong to group g.
struct Groups {
  std::span<const std::int64_t> group_ptr;  // int64 [num_groups + 1], ascending from any start
  std::span<const std::byte* const>
      weights;  // [num_groups] base of each group's weight, row-major, contiguous
  std::int64_t num_groups() const { return static_cast<std::int64_t>(group_ptr.size()) - 1; }
};

struct AdamW {
  float learning_rate, beta1, beta2, epsilon, weight_decay;
  std::int64_t step;  // 1-based
};

class Kernels {
 public:
  virtual ~Kernels() = default;

  // ---- moving rows -------------------------------------------------------------------------------------------------
  // dst[i] = index[i] < first.rows ? first[index[i]] : second[index[i] - first.rows], i in 0..index.size()-1
  // first, second: dtype [*, cols]; index: int32 [n]; dst: same dtype [n, cols]
  virtual void gather_rows(ConstMatrixView first, ConstMatrixView second, std::span<const std::int32_t> index,
                           MatrixView dst) = 0;

  // dst = src, rounded to dst's dtype.  src: dtype [n, cols]; dst: any dtype [n, cols]
  virtual void convert_rows(ConstMatrixView src, MatrixView dst) = 0;

  // out[r] = round(sum over i in row_ptr[r]..row_ptr[r+1]-1, ascending, of weight[i] * src[position[i]]), fp32 sum
  // starting from the first term (an empty sum is +0); each term is one fp32 multiply, each addition one fp32 add.
  // src: dtype [*, cols]; position: int32 [row_ptr.back()]; weight: f32, same length, or empty for all ones;
  // row_ptr: int64 [out.rows + 1] (its first value need not be 0); out: dtype [rows, cols], rounded once at the end
  virtual void weighted_reduce(ConstMatrixView src, std::span<const std::int64_t> row_ptr,
                               std::span<const std::int32_t> position, std::span<const float> weight,
                               MatrixView out) = 0;

  // y[t] += scale[t] * x[t] in fp32 (one multiply, one add), rounded to y's dtype.  x, y: dtype [n, cols]; scale: f32 [n]
  virtual void add_scaled_rows(ConstMatrixView x, std::span<const float> scale, MatrixView y) = 0;

  // out[i] = <a[row_a(i)], b[row_b(i)]> in fp32: products are rounded, lane j of 16 adds columns j, j+16, ... ascending
  // from 0, then the lanes are added in order.  a, b: dtype [*, cols]; row_x(i) = x_index.empty() ? i : x_index[i]
  // (int32); out: f32 [n]
  virtual void row_dots(ConstMatrixView a, std::span<const std::int32_t> a_index, ConstMatrixView b,
                        std::span<const std::int32_t> b_index, std::span<float> out) = 0;

  // ---- grouped GEMM ------------------------------------------------------------------------------------------------
  // Forward: h[p] = W_g a[row(p)],  act[p] = activation(h[p]) rounded to act's dtype from the unrounded fp32 h.
  // a: dtype [*, in_cols]; row(p) = a_index.empty() ? p : a_index[p] (a_index: int32, indexed by absolute p);
  // weights: dtype [out_cols, in_cols] a group; h: dtype [>= group_ptr.back(), out_cols] or null data when not kept;
  // act: dtype [>= group_ptr.back(), ffn] or null data when no activation is wanted (then h is required).
  virtual void grouped_gemm_forward(const Groups& groups, ConstMatrixView a,
                                    std::span<const std::int32_t> a_index, DType weight_dtype,
                                    std::int64_t out_cols, Activation activation, MatrixView h,
                                    MatrixView act) = 0;

  // Data gradient: da[p] = W_g^T dc[row(p)].  dc: dtype [*, out_cols]; weights: dtype [out_cols, in_cols] a group;
  // da: dtype [>= group_ptr.back(), in_cols]; dc_index as a_index above.
  virtual void grouped_gemm_dgrad(const Groups& groups, ConstMatrixView dc,
                                  std::span<const std::int32_t> dc_index, DType weight_dtype,
                                  MatrixView da) = 0;

  // Weight gradient: dW_g[o][i] += sum over positions p of group g, in order, of dc[row_c(p)][o] * a[row_a(p)][i].
  // dc: dtype [*, out_cols]; a: dtype [*, in_cols]; grads: one f32 [out_cols, in_cols] base a group, accumulated into.
  virtual void grouped_gemm_wgrad(std::span<const std::int64_t> group_ptr, ConstMatrixView dc,
                                  std::span<const std::int32_t> dc_index, ConstMatrixView a,
                                  std::span<const std::int32_t> a_index, std::span<float* const> grads) = 0;

  // ---- activation --------------------------------------------------------------------------------------------------
  // act[p] = activation(h[p]) for rows begin..end-1.  h: dtype [*, preactivation_cols]; act: dtype [*, ffn]
  virtual void activation_forward(Activation activation, ConstMatrixView h, MatrixView act,
                                  std::int64_t begin, std::int64_t end) = 0;

  // One fused pass over rows begin..end-1 (DESIGN: nothing is divided by w, expert outputs need not be kept):
  //   a = activation(h[p]) in fp32;  dw[p] = <u[p], a> in fp32: 16 lanes, lane j the fma chain over columns
  //   j, j+16, ... ascending from 0; then the lanes are added in order, ((lane 0 + lane 1) + lane 2) + ...;
  //   dh[p] = activation'(h[p]) * (weight[p] * u[p]);  wa[p] = weight[p] * a.
  // h: dtype [*, preactivation_cols]; u: dtype [*, ffn] (= W2^T dy); weight: f32 [*]; dw: f32 [*];
  // dh: dtype like h; wa: dtype like u. dh may alias h; wa may alias u.
  virtual void activation_backward(Activation activation, ConstMatrixView h, ConstMatrixView u,
                                   std::span<const float> weight, std::span<float> dw, MatrixView dh,
                                   MatrixView wa, std::int64_t begin, std::int64_t end) = 0;

  // ---- optimizer ---------------------------------------------------------------------------------------------------
  // Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), fp32 master weights, decay scaled by the learning
  // rate:  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
  //        w = w (1 - lr decay) - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + epsilon)
  // When `copy` has data it receives the updated weights rounded to its dtype. Elements are independent of each other:
  // any cut of the arrays gives the same bits.  All f32 [n]; copy: dtype [1, n] or null data.
  virtual void adamw(const AdamW& options, std::span<float> master, std::span<const float> grad,
                     std::span<float> m, std::span<float> v, MatrixView copy) = 0;

  // Largest scratch this object holds, in bytes (part of the peak-memory formula).
  virtual std::int64_t scratch_bytes() const = 0;
};

// Kernels of this CPU: AVX-512, AVX2 or portable code is chosen once by what the processor can do; all give the same
// bits. num_threads >= 1 (the calling thread is one of them).
std::unique_ptr<Kernels> make_cpu_kernels(int num_threads);
// Name of the instruction set in use ("avx512", "avx2", "portable"), for reports.
const char* cpu_isa();

}  // namespace sluice::kernels
