#include "sluice/kernels/cpu/cpu_kernels.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "sluice/kernels/checks.hpp"
#include "sluice/kernels/cpu/grouped_gemm.hpp"
#include "sluice/kernels/cpu/thread_pool.hpp"

namespace sluice::kernels {

namespace {

// Smaller ranges are not worth waking another thread for.
constexpr std::int64_t kMinElementsARange = 1 << 15;
// Several, so that a thread that was slow to come leaves most of its share to the others.
constexpr std::int64_t kRangesAThread = 4;
// Columns that go through the fp32 buffers at a time when rows are bf16; a multiple of kLanes.
constexpr std::int64_t kChunk = 256;
static_assert(kChunk % kLanes == 0);

std::int64_t element_bytes(DType dtype) {
  return static_cast<std::int64_t>(size_of(dtype));
}

template <typename X, typename Y>
float dot(const std::byte* x_bytes, const std::byte* y_bytes, std::int64_t cols) {
  constexpr std::int64_t kLanes = 16;
  const X* x = reinterpret_cast<const X*>(x_bytes);
  const Y* y = reinterpret_cast<const Y*>(y_bytes);
  float lane[kLanes] = {};
  std::int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes)
    for (std::int64_t j = 0; j < kLanes; ++j)
      lane[j] += static_cast<float>(x[c + j]) * static_cast<float>(y[c + j]);
  for (std::int64_t j = 0; c + j < cols; ++j)
    lane[j] += static_cast<float>(x[c + j]) * static_cast<float>(y[c + j]);
  float sum = lane[0];
  for (std::int64_t j = 1; j < kLanes; ++j) sum += lane[j];
  return sum;
}
template <typename X>
float dot_with(const std::byte* x, const std::byte* y, DType y_dtype, std::int64_t cols) {
  return y_dtype == DType::kF32 ? dot<X, float>(x, y, cols) : dot<X, bf16>(x, y, cols);
}

class CpuKernels final : public Kernels {
 public:
  CpuKernels(const IsaOps& ops, int num_threads) : ops_(ops), pool_(num_threads), gemm_(ops, pool_) {}

  void gather_rows(ConstMatrixView first, ConstMatrixView second, std::span<const std::int32_t> index,
                   MatrixView dst) override {
    check_gather_rows(first, second, index, dst);
    const auto bytes = static_cast<std::size_t>(dst.row_bytes());
    if (bytes == 0) return;
    for_ranges(dst.rows, dst.cols, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t r = index[static_cast<std::size_t>(i)];
        std::memcpy(dst.row(i), r < first.rows ? first.row(r) : second.row(r - first.rows), bytes);
      }
    });
  }

  void convert_rows(ConstMatrixView src, MatrixView dst) override {
    require_shape(src, "src", dst.rows, dst.cols);
    require_shape(dst, "dst", dst.rows, dst.cols);
    const std::int32_t self = 0;  // a sum of one term is the term
    for_ranges(dst.rows, dst.cols, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        ops_.reduce_row(src.row(r), src.dtype, src.row_bytes_stride(), &self, nullptr, 1, dst.row(r),
                        dst.dtype, dst.cols);
    });
  }

  void weighted_reduce(ConstMatrixView src, std::span<const std::int64_t> row_ptr,
                       std::span<const std::int32_t> position, std::span<const float> weight,
                       MatrixView out) override {
    check_weighted_reduce(src, row_ptr, position, weight, out);
    const std::int64_t terms_a_row = out.rows ? (row_ptr.back() - row_ptr.front()) / out.rows + 1 : 1;
    for_ranges(out.rows, out.cols * terms_a_row, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t first = row_ptr[static_cast<std::size_t>(r)];
        const std::int64_t count = row_ptr[static_cast<std::size_t>(r) + 1] - first;
        ops_.reduce_row(src.data, src.dtype, src.row_bytes_stride(), position.data() + first,
                        weight.empty() ? nullptr : weight.data() + first, count, out.row(r), out.dtype,
                        out.cols);
      }
    });
  }

  void add_scaled_rows(ConstMatrixView x, std::span<const float> scale, MatrixView y) override {
    check_add_scaled_rows(x, scale, y);
    for_ranges(y.rows, y.cols, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        ops_.add_scaled(x.row(r), x.dtype, scale[static_cast<std::size_t>(r)], y.row(r), y.dtype, y.cols);
    });
  }

  void row_dots(ConstMatrixView a, std::span<const std::int32_t> a_index, ConstMatrixView b,
                std::span<const std::int32_t> b_index, std::span<float> out) override {
    check_row_dots(a, a_index, b, b_index, out);
    for_ranges(static_cast<std::int64_t>(out.size()), a.cols, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const auto k = static_cast<std::size_t>(i);
        const std::byte* x = a.row(a_index.empty() ? i : a_index[k]);
        const std::byte* y = b.row(b_index.empty() ? i : b_index[k]);
        out[k] = a.dtype == DType::kF32 ? dot_with<float>(x, y, b.dtype, a.cols)
                                        : dot_with<bf16>(x, y, b.dtype, a.cols);
      }
    });
  }

  void grouped_gemm_forward(const Groups& groups, ConstMatrixView a, std::span<const std::int32_t> a_index,
                            DType weight_dtype, std::int64_t out_cols, Activation activation, MatrixView h,
                            MatrixView act) override {
    check_forward(groups, a, a_index, out_cols, activation, h, act);
    gemm_.forward(groups, a, a_index, weight_dtype, out_cols, activation, h, act);
  }

  void grouped_gemm_dgrad(const Groups& groups, ConstMatrixView dc, std::span<const std::int32_t> dc_index,
                          DType weight_dtype, MatrixView da) override {
    check_dgrad(groups, dc, dc_index, da);
    gemm_.dgrad(groups, dc, dc_index, weight_dtype, da);
  }

  void grouped_gemm_wgrad(std::span<const std::int64_t> group_ptr, ConstMatrixView dc,
                          std::span<const std::int32_t> dc_index, ConstMatrixView a,
                          std::span<const std::int32_t> a_index, std::span<float* const> grads) override {
    check_wgrad(group_ptr, dc, dc_index, a, a_index, grads);
    gemm_.wgrad(group_ptr, dc, dc_index, a, a_index, grads);
  }

  void activation_forward(Activation activation, ConstMatrixView h, MatrixView act, std::int64_t begin,
                          std::int64_t end) override {
    check_activation_forward(activation, h, act, begin, end);
    for_ranges(end - begin, h.cols, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t p = begin + first; p < begin + last; ++p)
        activate_row(activation, h.row(p), h.dtype, act.row(p), act.dtype, act.cols);
    });
  }

  void activation_backward(Activation activation, ConstMatrixView h, ConstMatrixView u,
                           std::span<const float> weight, std::span<float> dw, MatrixView dh, MatrixView wa,
                           std::int64_t begin, std::int64_t end) override {
    check_activation_backward(activation, h, u, weight, dw, dh, wa, begin, end);
    for_ranges(end - begin, h.cols, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t p = begin + first; p < begin + last; ++p) {
        const auto i = static_cast<std::size_t>(p);
        dw[i] = backward_row(activation, h.row(p), h.dtype, u.row(p), u.dtype, weight[i], dh.row(p),
                             wa.row(p), u.cols);
      }
    });
  }

  void adamw(const AdamW& options, std::span<float> master, std::span<const float> grad, std::span<float> m,
             std::span<float> v, MatrixView copy) override {
    check_adamw(options, master, grad, m, v, copy);
    AdamWStep step;
    step.beta1 = options.beta1;
    step.one_minus_beta1 = static_cast<float>(1.0 - static_cast<double>(options.beta1));
    step.beta2 = options.beta2;
    step.one_minus_beta2 = static_cast<float>(1.0 - static_cast<double>(options.beta2));
    const auto t = static_cast<double>(options.step);
    step.step_size =
        static_cast<float>(options.learning_rate / (1.0 - std::pow(static_cast<double>(options.beta1), t)));
    step.inv_bias2 = static_cast<float>(1.0 / (1.0 - std::pow(static_cast<double>(options.beta2), t)));
    step.keep = static_cast<float>(1.0 - static_cast<double>(options.learning_rate) * options.weight_decay);
    step.epsilon = options.epsilon;
    for_ranges(
        static_cast<std::int64_t>(master.size()), 1, kLanes, [&](std::int64_t begin, std::int64_t end) {
          std::byte* const target = copy.data ? copy.data + begin * element_bytes(copy.dtype) : nullptr;
          ops_.adamw(step, master.data() + begin, grad.data() + begin, m.data() + begin, v.data() + begin,
                     target, copy.dtype, end - begin);
        });
  }

  std::int64_t scratch_bytes() const override { return gemm_.scratch_bytes(); }

 private:
  // Calls function(begin, end) on disjoint ranges that cover 0..n-1, on several threads when n * work is large
  // enough. Inner borders are multiples of `grain`. The result must not depend on where the borders are.
  template <typename Function>
  void for_ranges(std::int64_t n, std::int64_t work, std::int64_t grain, const Function& function) {
    const std::int64_t elements = n * std::max<std::int64_t>(work, 1);
    if (pool_.num_threads() == 1 || elements < 2 * kMinElementsARange) {
      if (n > 0) function(0, n);
      return;
    }
    const std::int64_t ranges =
        std::min<std::int64_t>(elements / kMinElementsARange, kRangesAThread * pool_.num_threads());
    const auto border = [&](std::int64_t i) { return i == ranges ? n : n * i / ranges / grain * grain; };
    std::atomic<std::int64_t> next{0};
    pool_.run([&](int) {
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < ranges;)
        if (border(i) < border(i + 1)) function(border(i), border(i + 1));
    });
  }

  void activate_row(Activation activation, const std::byte* h, DType h_dtype, std::byte* act, DType act_dtype,
                    std::int64_t ffn) const {
    const bool gated = activation == Activation::kSwiGLU;
    const std::int64_t h_element = element_bytes(h_dtype);
    if (h_dtype == DType::kF32 && act_dtype == DType::kF32) {
      const auto* gate = reinterpret_cast<const float*>(h);
      ops_.activate(activation, gate, gated ? gate + ffn : nullptr, reinterpret_cast<float*>(act), ffn);
      return;
    }
    alignas(64) float gate[kChunk], up[kChunk];
    for (std::int64_t i = 0; i < ffn; i += kChunk) {
      const std::int64_t n = std::min(kChunk, ffn - i);
      ops_.widen(h + i * h_element, h_dtype, gate, n);
      if (gated) ops_.widen(h + (ffn + i) * h_element, h_dtype, up, n);
      ops_.activate(activation, gate, up, gate, n);
      ops_.narrow(gate, act + i * element_bytes(act_dtype), act_dtype, n);
    }
  }

  float backward_row(Activation activation, const std::byte* h, DType h_dtype, const std::byte* u,
                     DType u_dtype, float weight, std::byte* dh, std::byte* wa, std::int64_t ffn) const {
    const bool gated = activation == Activation::kSwiGLU;
    const std::int64_t h_element = element_bytes(h_dtype), u_element = element_bytes(u_dtype);
    alignas(64) float lanes[kLanes] = {};
    if (h_dtype == DType::kF32 && u_dtype == DType::kF32) {
      const auto* gate = reinterpret_cast<const float*>(h);
      auto* dgate = reinterpret_cast<float*>(dh);
      ops_.activate_backward(activation, gate, gated ? gate + ffn : nullptr,
                             reinterpret_cast<const float*>(u), weight, dgate, gated ? dgate + ffn : nullptr,
                             reinterpret_cast<float*>(wa), lanes, ffn);
    } else {
      alignas(64) float gate[kChunk], up[kChunk], us[kChunk];
      for (std::int64_t i = 0; i < ffn; i += kChunk) {
        const std::int64_t n = std::min(kChunk, ffn - i);
        ops_.widen(h + i * h_element, h_dtype, gate, n);
        if (gated) ops_.widen(h + (ffn + i) * h_element, h_dtype, up, n);
        ops_.widen(u + i * u_element, u_dtype, us, n);
        ops_.activate_backward(activation, gate, up, us, weight, gate, up, us, lanes, n);
        ops_.narrow(gate, dh + i * h_element, h_dtype, n);
        if (gated) ops_.narrow(up, dh + (ffn + i) * h_element, h_dtype, n);
        ops_.narrow(us, wa + i * u_element, u_dtype, n);
      }
    }
    float sum = lanes[0];
    for (std::int64_t lane = 1; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  }

  const IsaOps& ops_;
  ThreadPool pool_;
  GroupedGemm gemm_;
};

}  // namespace

std::unique_ptr<Kernels> make_cpu_kernels(const IsaOps& ops, int num_threads) {
  return std::make_unique<CpuKernels>(ops, num_threads);
}

std::unique_ptr<Kernels> make_cpu_kernels(int num_threads) {
  return make_cpu_kernels(best_ops(), num_threads);
}

const char* cpu_isa() {
  return best_ops().name;
}

}  // namespace sluice::kernels
