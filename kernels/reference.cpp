#include "sluice/kernels/reference.hpp"

#include <cmath>
#include <cstring>

#include "sluice/kernels/checks.hpp"

namespace sluice::kernels {

namespace {

float load(const std::byte* base, DType dtype, std::int64_t i) {
  if (dtype == DType::kF32) return reinterpret_cast<const float*>(base)[i];
  return static_cast<float>(reinterpret_cast<const bf16*>(base)[i]);
}
void store(std::byte* base, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::kF32)
    reinterpret_cast<float*>(base)[i] = value;
  else
    reinterpret_cast<bf16*>(base)[i] = bf16(value);
}
float get(const ConstMatrixView& view, std::int64_t r, std::int64_t c) {
  return load(view.row(r), view.dtype, c);
}
void set(const MatrixView& view, std::int64_t r, std::int64_t c, float value) {
  store(view.row(r), view.dtype, c, value);
}
std::int64_t row_of(std::span<const std::int32_t> index, std::int64_t p) {
  return index.empty() ? p : index[static_cast<std::size_t>(p)];
}

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

struct Value {
  double value, gate_slope, up_slope;
};

Value activation_value(Activation activation, double gate, double up) {
  switch (activation) {
    case Activation::kSwiGLU: {
      const double s = sigmoid(gate);
      return {gate * s * up, s * (1.0 + gate * (1.0 - s)) * up, gate * s};
    }
    case Activation::kGelu: {
      const double c = std::sqrt(2.0 / 3.14159265358979323846);
      const double t = std::tanh(c * (gate + 0.044715 * gate * gate * gate));
      const double slope =
          0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * gate * gate);
      return {0.5 * gate * (1.0 + t), slope, 0.0};
    }
    case Activation::kRelu:
      break;
  }
  return {gate > 0.0 ? gate : gate * 0.0, gate > 0.0 ? 1.0 : 0.0, 0.0};
}

class ReferenceKernels final : public Kernels {
 public:
  void gather_rows(ConstMatrixView first, ConstMatrixView second, std::span<const std::int32_t> index,
                   MatrixView dst) override {
    check_gather_rows(first, second, index, dst);
    for (std::int64_t i = 0; i < dst.rows; ++i) {
      const std::int64_t r = row_of(index, i);
      const bool in_first = r < first.rows;
      for (std::int64_t c = 0; c < dst.cols; ++c)
        set(dst, i, c, in_first ? get(first, r, c) : get(second, r - first.rows, c));
    }
  }

  void convert_rows(ConstMatrixView src, MatrixView dst) override {
    require_shape(src, "src", dst.rows, dst.cols);
    require_shape(dst, "dst", dst.rows, dst.cols);
    for (std::int64_t r = 0; r < dst.rows; ++r)
      for (std::int64_t c = 0; c < dst.cols; ++c) set(dst, r, c, get(src, r, c));
  }

  void weighted_reduce(ConstMatrixView src, std::span<const std::int64_t> row_ptr,
                       std::span<const std::int32_t> position, std::span<const float> weight,
                       MatrixView out) override {
    check_weighted_reduce(src, row_ptr, position, weight, out);
    for (std::int64_t r = 0; r < out.rows; ++r) {
      const std::int64_t begin = row_ptr[static_cast<std::size_t>(r)],
                         end = row_ptr[static_cast<std::size_t>(r) + 1];
      for (std::int64_t c = 0; c < out.cols; ++c) {
        float sum = 0.0f;
        for (std::int64_t i = begin; i < end; ++i) {
          const auto k = static_cast<std::size_t>(i);
          const float x = get(src, position[k], c);
          const float term = weight.empty() ? x : weight[k] * x;
          sum = i == begin ? term : sum + term;
        }
        set(out, r, c, sum);
      }
    }
  }

  void add_scaled_rows(ConstMatrixView x, std::span<const float> scale, MatrixView y) override {
    check_add_scaled_rows(x, scale, y);
    for (std::int64_t r = 0; r < y.rows; ++r)
      for (std::int64_t c = 0; c < y.cols; ++c)
        set(y, r, c, get(y, r, c) + scale[static_cast<std::size_t>(r)] * get(x, r, c));
  }

  void row_dots(ConstMatrixView a, std::span<const std::int32_t> a_index, ConstMatrixView b,
                std::span<const std::int32_t> b_index, std::span<float> out) override {
    check_row_dots(a, a_index, b, b_index, out);
    for (std::size_t i = 0; i < out.size(); ++i) {
      float lane[16] = {};
      const auto r = static_cast<std::int64_t>(i);
      for (std::int64_t c = 0; c < a.cols; ++c) {
        const float product = get(a, row_of(a_index, r), c) * get(b, row_of(b_index, r), c);
        lane[c % 16] += product;
      }
      out[i] = lane[0];
      for (int j = 1; j < 16; ++j) out[i] += lane[j];
    }
  }

  void grouped_gemm_forward(const Groups& groups, ConstMatrixView a, std::span<const std::int32_t> a_index,
                            DType weight_dtype, std::int64_t out_cols, Activation activation, MatrixView h,
                            MatrixView act) override {
    check_forward(groups, a, a_index, out_cols, activation, h, act);
    for_rows(groups.group_ptr, [&](std::size_t g, std::int64_t p) {
      const auto element = [&](std::int64_t o) {
        float c = 0.0f;
        for (std::int64_t k = 0; k < a.cols; ++k)
          c = std::fma(get(a, row_of(a_index, p), k), load(groups.weights[g], weight_dtype, o * a.cols + k),
                       c);
        return c;
      };
      if (h.data)
        for (std::int64_t o = 0; o < out_cols; ++o) set(h, p, o, element(o));
      if (act.data) {
        for (std::int64_t j = 0; j < act.cols; ++j) {
          const float up = activation == Activation::kSwiGLU ? element(act.cols + j) : 0.0f;
          set(act, p, j, static_cast<float>(activation_value(activation, element(j), up).value));
        }
      }
    });
  }

  void grouped_gemm_dgrad(const Groups& groups, ConstMatrixView dc, std::span<const std::int32_t> dc_index,
                          DType weight_dtype, MatrixView da) override {
    check_dgrad(groups, dc, dc_index, da);
    for_rows(groups.group_ptr, [&](std::size_t g, std::int64_t p) {
      for (std::int64_t i = 0; i < da.cols; ++i) {
        float c = 0.0f;
        for (std::int64_t o = 0; o < dc.cols; ++o)
          c = std::fma(get(dc, row_of(dc_index, p), o),
                       load(groups.weights[g], weight_dtype, o * da.cols + i), c);
        set(da, p, i, c);
      }
    });
  }

  void grouped_gemm_wgrad(std::span<const std::int64_t> group_ptr, ConstMatrixView dc,
                          std::span<const std::int32_t> dc_index, ConstMatrixView a,
                          std::span<const std::int32_t> a_index, std::span<float* const> grads) override {
    check_wgrad(group_ptr, dc, dc_index, a, a_index, grads);
    for_rows(group_ptr, [&](std::size_t g, std::int64_t p) {
      for (std::int64_t o = 0; o < dc.cols; ++o)
        for (std::int64_t i = 0; i < a.cols; ++i) {
          float& c = grads[g][o * a.cols + i];
          c = std::fma(get(dc, row_of(dc_index, p), o), get(a, row_of(a_index, p), i), c);
        }
    });
  }

  void activation_forward(Activation activation, ConstMatrixView h, MatrixView act, std::int64_t begin,
                          std::int64_t end) override {
    check_activation_forward(activation, h, act, begin, end);
    for (std::int64_t p = begin; p < end; ++p)
      for (std::int64_t j = 0; j < act.cols; ++j)
        set(act, p, j, static_cast<float>(value(activation, h, p, j, act.cols).value));
  }

  void activation_backward(Activation activation, ConstMatrixView h, ConstMatrixView u,
                           std::span<const float> weight, std::span<float> dw, MatrixView dh, MatrixView wa,
                           std::int64_t begin, std::int64_t end) override {
    check_activation_backward(activation, h, u, weight, dw, dh, wa, begin, end);
    for (std::int64_t p = begin; p < end; ++p) {
      double sum = 0.0;
      const double w = weight[static_cast<std::size_t>(p)];
      for (std::int64_t j = 0; j < u.cols; ++j) {
        const Value a = value(activation, h, p, j, u.cols);
        const double x = get(u, p, j);
        sum += x * a.value;
        set(dh, p, j, static_cast<float>(a.gate_slope * (w * x)));
        if (activation == Activation::kSwiGLU)
          set(dh, p, u.cols + j, static_cast<float>(a.up_slope * (w * x)));
        set(wa, p, j, static_cast<float>(w * a.value));
      }
      dw[static_cast<std::size_t>(p)] = static_cast<float>(sum);
    }
  }

  void adamw(const AdamW& options, std::span<float> master, std::span<const float> grad, std::span<float> m,
             std::span<float> v, MatrixView copy) override {
    check_adamw(options, master, grad, m, v, copy);
    const double beta1 = options.beta1, beta2 = options.beta2, t = static_cast<double>(options.step);
    const auto step_size = static_cast<float>(options.learning_rate / (1.0 - std::pow(beta1, t)));
    const auto inv_bias2 = static_cast<float>(1.0 / (1.0 - std::pow(beta2, t)));
    const auto keep =
        static_cast<float>(1.0 - static_cast<double>(options.learning_rate) * options.weight_decay);
    for (std::size_t i = 0; i < master.size(); ++i) {
      const float g = grad[i];
      m[i] = std::fma(options.beta1, m[i], static_cast<float>(1.0 - beta1) * g);
      v[i] = std::fma(options.beta2, v[i], static_cast<float>(1.0 - beta2) * (g * g));
      master[i] = master[i] * keep - step_size * m[i] / (std::sqrt(v[i] * inv_bias2) + options.epsilon);
      if (copy.data) store(copy.data, copy.dtype, static_cast<std::int64_t>(i), master[i]);
    }
  }

  std::int64_t scratch_bytes() const override { return 0; }

 private:
  static Value value(Activation activation, const ConstMatrixView& h, std::int64_t p, std::int64_t j,
                     std::int64_t ffn) {
    const double up = activation == Activation::kSwiGLU ? get(h, p, ffn + j) : 0.0;
    return activation_value(activation, get(h, p, j), up);
  }

  template <typename Function>
  static void for_rows(std::span<const std::int64_t> group_ptr, const Function& function) {
    for (std::size_t g = 0; g + 1 < group_ptr.size(); ++g)
      for (std::int64_t p = group_ptr[g]; p < group_ptr[g + 1]; ++p) function(g, p);
  }
};

}  // namespace

std::unique_ptr<Kernels> make_reference_kernels() {
  return std::make_unique<ReferenceKernels>();
}

}  // namespace sluice::kernels
