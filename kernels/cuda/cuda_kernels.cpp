#include "sluice/kernels/cuda/cuda_kernels.hpp"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <span>

#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/fp32_gemm.hpp"
#include "sluice/kernels/cuda/launch.hpp"
#include "sluice/kernels/cuda/rows.hpp"

namespace sluice::kernels::cuda {
namespace {

constexpr auto kBad = ErrorCode::kInvalidArgument;

// Device memory that grows and is kept.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { cudaFree(data_); }

  void* at_least(std::int64_t bytes) {
    if (bytes > bytes_) {
      check_cuda(cudaFree(data_), "scratch: cudaFree");  // waits for what still reads it
      data_ = nullptr;
      bytes_ = 0;
      check_cuda(cudaMalloc(&data_, static_cast<std::size_t>(bytes)), "scratch: cudaMalloc");
      bytes_ = bytes;
    }
    return data_;
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

// All operands of a call have one dtype.
void require_dtype(DType dtype, DType wanted, const char* what) {
  Require(dtype == wanted, ErrorCode::kNotSupported, "grouped GEMM on CUDA: ", what, " is ", to_string(dtype),
          ", another operand ", to_string(wanted), "; they must be the same");
}

GemmActivation gemm_activation(Activation activation) {
  switch (activation) {
    case Activation::kSwiGLU:
      return GemmActivation::kSwiGLU;
    case Activation::kGelu:
      return GemmActivation::kGelu;
    case Activation::kRelu:
      return GemmActivation::kRelu;
  }
  throw Error(kBad, "activation must be one of kSwiGLU, kGelu, kRelu");
}

// Elements from one base to the next; `alone` where there is one.
template <typename Pointer>
std::int64_t spacing(std::span<const Pointer> bases, std::int64_t element_bytes, std::int64_t alone,
                     const char* what) {
  const auto address = [&](std::size_t i) { return reinterpret_cast<std::intptr_t>(bases[i]); };
  for (std::size_t i = 0; i < bases.size(); ++i)
    Require(bases[i] != nullptr, kBad, what, "[", i, "] is null; on CUDA every group needs one");
  if (bases.size() < 2) return alone;
  const std::int64_t bytes = address(1) - address(0);
  for (std::size_t i = 2; i < bases.size(); ++i)
    Require(address(i) - address(i - 1) == bytes, ErrorCode::kNotSupported, what, "[", i, "] lies ",
            address(i) - address(i - 1), " bytes after the one before, the others ", bytes,
            "; on CUDA they must be evenly spaced");
  Require(bytes > 0 && bytes % element_bytes == 0, ErrorCode::kNotSupported, what, " are ", bytes,
          " bytes apart; on CUDA they must ascend");
  return bytes / element_bytes;
}

class CudaKernels final : public Kernels {
 public:
  CudaKernels(Stream stream, GemmPath path) : stream_(stream), path_(path) {}

  void gather_rows(ConstMatrixView first, ConstMatrixView second, std::span<const std::int32_t> index,
                   MatrixView dst) override {
    Require(static_cast<std::int64_t>(index.size()) == dst.rows, kBad, "index has ", index.size(),
            " elements, dst has ", dst.rows, " rows");
    cuda::gather_rows(first, second, index.data(), dst, nullptr, stream_);
  }
  void convert_rows(ConstMatrixView src, MatrixView dst) override {
    cuda::convert_rows(src, dst, nullptr, stream_);
  }
  void weighted_reduce(ConstMatrixView src, std::span<const std::int64_t> row_ptr,
                       std::span<const std::int32_t> position, std::span<const float> weight,
                       MatrixView out) override {
    Require(static_cast<std::int64_t>(row_ptr.size()) == out.rows + 1, kBad, "row_ptr has ", row_ptr.size(),
            " elements, must have out.rows + 1 = ", out.rows + 1);
    Require(weight.empty() || weight.size() >= position.size(), kBad, "weight has ", weight.size(),
            " elements, position has ", position.size());
    cuda::weighted_reduce(src, row_ptr.data(), position.data(), weight.empty() ? nullptr : weight.data(), out,
                          stream_);
  }
  void add_scaled_rows(ConstMatrixView x, std::span<const float> scale, MatrixView y) override {
    Require(static_cast<std::int64_t>(scale.size()) == y.rows, kBad, "scale has ", scale.size(),
            " elements, y has ", y.rows, " rows");
    cuda::add_scaled_rows(x, scale.data(), y, stream_);
  }
  void row_dots(ConstMatrixView a, std::span<const std::int32_t> a_index, ConstMatrixView b,
                std::span<const std::int32_t> b_index, std::span<float> out) override {
    for (const auto& index : {a_index, b_index})
      Require(index.empty() || index.size() == out.size(), kBad, "an index has ", index.size(),
              " elements, out has ", out.size());
    cuda::row_dots(a, a_index.empty() ? nullptr : a_index.data(), b,
                   b_index.empty() ? nullptr : b_index.data(), out.data(),
                   static_cast<std::int64_t>(out.size()), stream_);
  }

  void grouped_gemm_forward(const Groups& groups, ConstMatrixView a, std::span<const std::int32_t> a_index,
                            DType weight_dtype, std::int64_t out_cols, Activation activation, MatrixView h,
                            MatrixView act) override {
    if (groups.num_groups() <= 0) return;
    require_dtype(weight_dtype, a.dtype, "the weight dtype");
    if (h.data != nullptr) check(h, a.dtype, out_cols, "h");
    if (act.data != nullptr)
      check(act, a.dtype, activation == Activation::kSwiGLU ? out_cols / 2 : out_cols, "act");
    if (a.dtype == DType::kF32) {
      fp32::Groups g = fp32_groups(groups.group_ptr, num_positions(a, a_index));
      if (h.data != nullptr) g.num_rows = std::min(g.num_rows, h.rows);
      if (act.data != nullptr) g.num_rows = std::min(g.num_rows, act.rows);
      fp32::forward(g, fp32_weights(groups, out_cols, a.cols), fp32_rows(a, a_index), h, act,
                    act.data != nullptr ? gemm_activation(activation) : GemmActivation::kNone, stream_);
      return;
    }
    const ConstMatrixView rows = gathered(a, a_index, 0);
    GemmGroups g = gemm_groups(groups.group_ptr, rows.rows);
    if (h.data != nullptr) g.num_rows = std::min(g.num_rows, h.rows);
    if (act.data != nullptr) g.num_rows = std::min(g.num_rows, act.rows);
    cuda::grouped_gemm_forward(g, gemm_weights(groups, out_cols, a.cols), {rows.data, rows.row_stride},
                               {h.data, h.row_stride}, {act.data, act.row_stride},
                               act.data != nullptr ? gemm_activation(activation) : GemmActivation::kNone,
                               stream_);
  }
  void grouped_gemm_dgrad(const Groups& groups, ConstMatrixView dc, std::span<const std::int32_t> dc_index,
                          DType weight_dtype, MatrixView da) override {
    if (groups.num_groups() <= 0) return;
    require_dtype(weight_dtype, dc.dtype, "the weight dtype");
    check(da, dc.dtype, da.cols, "da");
    if (dc.dtype == DType::kF32) {
      fp32::dgrad(fp32_groups(groups.group_ptr, std::min(num_positions(dc, dc_index), da.rows)),
                  fp32_weights(groups, dc.cols, da.cols), fp32_rows(dc, dc_index), da, stream_);
      return;
    }
    const ConstMatrixView rows = gathered(dc, dc_index, 0);
    GemmGroups g = gemm_groups(groups.group_ptr, std::min(rows.rows, da.rows));
    cuda::grouped_gemm_dgrad(g, gemm_weights(groups, dc.cols, da.cols), {rows.data, rows.row_stride},
                             {da.data, da.row_stride}, stream_);
  }
  void grouped_gemm_wgrad(std::span<const std::int64_t> group_ptr, ConstMatrixView dc,
                          std::span<const std::int32_t> dc_index, ConstMatrixView a,
                          std::span<const std::int32_t> a_index, std::span<float* const> grads) override {
    if (grads.empty()) return;
    Require(grads.size() + 1 == group_ptr.size(), kBad, "grads has ", grads.size(), " groups, group_ptr has ",
            group_ptr.size() - 1);
    require_dtype(a.dtype, dc.dtype, "a");
    if (dc.dtype == DType::kF32) {
      fp32::wgrad(fp32_groups(group_ptr, std::min(num_positions(dc, dc_index), num_positions(a, a_index))),
                  fp32_rows(dc, dc_index), dc.cols, fp32_rows(a, a_index), a.cols, grads[0],
                  spacing(grads, sizeof(float), dc.cols * a.cols, "grads"), stream_);
      return;
    }
    const ConstMatrixView c_rows = gathered(dc, dc_index, 0), a_rows = gathered(a, a_index, 1);
    const GemmGroups g = gemm_groups(group_ptr, std::min(c_rows.rows, a_rows.rows));
    cuda::grouped_gemm_wgrad(g, {c_rows.data, c_rows.row_stride}, dc.cols, {a_rows.data, a_rows.row_stride},
                             a.cols, grads[0], spacing(grads, sizeof(float), dc.cols * a.cols, "grads"),
                             GradientUpdate::kAdd, stream_);
  }

  void activation_forward(Activation activation, ConstMatrixView h, MatrixView act, std::int64_t begin,
                          std::int64_t end) override {
    cuda::activation_forward(activation, h, act, begin, end, nullptr, stream_);
  }
  void activation_backward(Activation activation, ConstMatrixView h, ConstMatrixView u,
                           std::span<const float> weight, std::span<float> dw, MatrixView dh, MatrixView wa,
                           std::int64_t begin, std::int64_t end) override {
    Require(static_cast<std::int64_t>(std::min(weight.size(), dw.size())) >= end, kBad, "weight has ",
            weight.size(), " elements and dw ", dw.size(), ", both must have at least ", end);
    cuda::activation_backward(activation, h, u, weight.data(), dw.data(), dh, wa, begin, end, nullptr,
                              stream_);
  }
  void adamw(const AdamW& options, std::span<float> master, std::span<const float> grad, std::span<float> m,
             std::span<float> v, MatrixView copy) override {
    for (const std::size_t size : {grad.size(), m.size(), v.size()})
      Require(size == master.size(), kBad, "grad, m or v has ", size, " elements, master has ",
              master.size());
    const auto n = static_cast<std::int64_t>(master.size());
    if (copy.data != nullptr) require_shape(copy, "copy", 1, n);
    cuda::adamw(options, master.data(), grad.data(), m.data(), v.data(), copy.data, copy.dtype, n, stream_);
  }

  std::int64_t scratch_bytes() const override { return scratch_[0].bytes() + scratch_[1].bytes(); }

 private:
  static void check(const MatrixView& view, DType dtype, std::int64_t cols, const char* what) {
    require_dtype(view.dtype, dtype, what);
    require_shape(view, what, view.rows, cols);
  }
  // Rows in the order the GEMM reads them.
  ConstMatrixView gathered(const ConstMatrixView& view, std::span<const std::int32_t> index, int which) {
    if (index.empty()) return view;
    const auto rows = static_cast<std::int64_t>(index.size());
    const std::int64_t stride = (view.cols + 7) / 8 * 8;
    const MatrixView to(static_cast<std::byte*>(scratch_[which].at_least(rows * stride * 2)), view.dtype,
                        rows, view.cols, stride);
    cuda::gather_rows(view, {}, index.data(), to, nullptr, stream_);
    return to;
  }
  static std::int64_t num_positions(const ConstMatrixView& view, std::span<const std::int32_t> index) {
    return index.empty() ? view.rows : static_cast<std::int64_t>(index.size());
  }
  static fp32::Groups fp32_groups(std::span<const std::int64_t> group_ptr, std::int64_t num_rows) {
    return {group_ptr.data(),
            static_cast<int>(std::min<std::size_t>(group_ptr.size() - 1, kMaxGemmGroups + 1)), num_rows};
  }
  static fp32::Rows fp32_rows(const ConstMatrixView& view, std::span<const std::int32_t> index) {
    return {reinterpret_cast<const float*>(view.data), view.row_stride,
            index.empty() ? nullptr : index.data()};
  }
  static fp32::Weights fp32_weights(const Groups& groups, std::int64_t out, std::int64_t in) {
    check_weights(groups);
    return {reinterpret_cast<const float*>(groups.weights[0]),
            spacing(groups.weights, 4, out * in, "weights"), out, in};
  }
  GemmGroups gemm_groups(std::span<const std::int64_t> group_ptr, std::int64_t num_rows) const {
    GemmGroups g;
    g.group_ptr = group_ptr.data();
    g.num_groups = static_cast<int>(std::min<std::size_t>(group_ptr.size() - 1, kMaxGemmGroups + 1));
    g.num_rows = num_rows;
    g.path = path_;
    return g;
  }
  static void check_weights(const Groups& groups) {
    Require(groups.weights.size() + 1 == groups.group_ptr.size(), kBad, "weights has ", groups.weights.size(),
            " groups, group_ptr has ", groups.num_groups());
  }
  static GemmWeights gemm_weights(const Groups& groups, std::int64_t out, std::int64_t in) {
    check_weights(groups);
    return {groups.weights[0], groups.num_groups(), spacing(groups.weights, 2, out * in, "weights"), out, in};
  }

  Stream stream_;
  GemmPath path_;
  Scratch scratch_[2];
};

}  // namespace

std::unique_ptr<Kernels> make_cuda_kernels(Stream stream, GemmPath path) {
  int device = 0, major = 0;
  Require(cudaGetDevice(&device) == cudaSuccess &&
              cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
              major >= 8,
          ErrorCode::kNotSupported, "CUDA kernels: no device of compute capability 8.0 or newer (found ",
          major, ".x)");
  return std::make_unique<CudaKernels>(stream, path);
}

}  // namespace sluice::kernels::cuda
