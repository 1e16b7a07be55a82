// The interface of kernels.hpp on the device against the scalar loops of kernels/reference.hpp: one expert layer forward
// and backward, with gathered rows, over ragged groups, both paths of the GEMM.
#include "sluice/kernels/cuda/cuda_kernels.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "../kernels_test_util.hpp"
#include "device_test_util.hpp"
#include "sluice/base/error.hpp"

namespace sluice::kernels::cuda {
namespace {

class CudaKernelsTest : public DeviceTest<8> {};

class OnDevice {
 public:
  explicit OnDevice(const Matrix& m) : view_(static_cast<ConstMatrixView>(m)), bytes_(bytes_of(m)) {}
  MatrixView view() {
    return {reinterpret_cast<std::byte*>(bytes_.data()), view_.dtype, view_.rows, view_.cols,
            view_.row_stride};
  }
  void get(Matrix& m) {
    const auto bytes = bytes_.get();
    std::memcpy(static_cast<MatrixView>(m).data, bytes.data(), bytes.size());
  }

 private:
  static std::vector<unsigned char> bytes_of(const Matrix& m) {
    const auto view = static_cast<ConstMatrixView>(m);
    std::vector<unsigned char> bytes(static_cast<std::size_t>(view.rows * view.row_bytes_stride()));
    std::memcpy(bytes.data(), view.data, bytes.size());
    return bytes;
  }
  ConstMatrixView view_;
  DeviceArray<unsigned char> bytes_;
};

void expect_near(const Matrix& got, const Matrix& want, double relative, double absolute,
                 const std::string& what) {
  int bad = 0;
  for (std::int64_t r = 0; r < want.rows(); ++r)
    for (std::int64_t c = 0; c < want.cols(); ++c) {
      const double g = got.get(r, c), w = want.get(r, c);
      if (!(std::abs(g - w) <= relative * std::abs(w) + absolute) && ++bad < 4)
        ADD_FAILURE() << what << " [" << r << ", " << c << "]: " << g << ", expected " << w;
    }
  EXPECT_EQ(bad, 0) << what;
}

TEST_F(CudaKernelsTest, ALayerForwardAndBackward) {
  constexpr std::int64_t kHidden = 72, kFfn = 40, kTokens = 50;
  const std::vector<std::int64_t> ptr = {0, 0, 1, 18, 18, 83, 130};
  const auto groups_n = static_cast<std::int64_t>(ptr.size()) - 1, rows = ptr.back();
  std::mt19937_64 random(kSeed);
  Matrix x(DType::kBF16, kTokens, kHidden), dy(DType::kBF16, kTokens, kHidden);
  Matrix w1(DType::kBF16, groups_n * 2 * kFfn, kHidden), w2(DType::kBF16, groups_n * kHidden, kFfn);
  x.fill_random(random), dy.fill_random(random), w1.fill_random(random, 0.2f), w2.fill_random(random, 0.2f);
  std::vector<std::int32_t> index;
  std::vector<float> weight;
  for (std::int64_t i = 0; i < rows; ++i) {
    index.push_back(static_cast<std::int32_t>(random() % kTokens));
    weight.push_back(static_cast<float>(random() % 100) / 100.0f);
  }
  struct Results {
    Matrix h{DType::kBF16, 130, 2 * kFfn}, act{DType::kBF16, 130, kFfn}, y{DType::kBF16, 130, kHidden};
    Matrix u{DType::kBF16, 130, kFfn}, dh{DType::kBF16, 130, 2 * kFfn}, wa{DType::kBF16, 130, kFfn};
    Matrix dx{DType::kBF16, 130, kHidden};
    Matrix g1{DType::kF32, 6 * 2 * kFfn, kHidden}, g2{DType::kF32, 6 * kHidden, kFfn};
    std::vector<float> dw = std::vector<float>(130, std::nanf(""));
  };
  const auto bases = [&](std::byte* base, std::int64_t bytes) {
    std::vector<const std::byte*> all;
    for (std::int64_t g = 0; g < groups_n; ++g) all.push_back(base + g * bytes);
    return all;
  };
  const auto grad_bases = [&](std::byte* base, std::int64_t elements) {
    std::vector<float*> all;
    for (std::int64_t g = 0; g < groups_n; ++g) all.push_back(reinterpret_cast<float*>(base) + g * elements);
    return all;
  };
  const auto zero = [](Matrix& m) {
    for (std::int64_t r = 0; r < m.rows(); ++r)
      for (std::int64_t c = 0; c < m.cols(); ++c) m.set(r, c, 0.5f);
  };
  Results want;
  zero(want.g1), zero(want.g2);
  {
    const auto k = make_reference_kernels();
    const auto b1 = bases(static_cast<MatrixView>(w1).data, 2 * kFfn * kHidden * 2),
               b2 = bases(static_cast<MatrixView>(w2).data, kFfn * kHidden * 2);
    k->grouped_gemm_forward({ptr, b1}, x, index, DType::kBF16, 2 * kFfn, Activation::kSwiGLU, want.h,
                            want.act);
    k->grouped_gemm_forward({ptr, b2}, want.act, {}, DType::kBF16, kHidden, Activation::kRelu, want.y, {});
    k->grouped_gemm_dgrad({ptr, b2}, dy, index, DType::kBF16, want.u);
    k->activation_backward(Activation::kSwiGLU, want.h, want.u, weight, want.dw, want.dh, want.wa, 0, rows);
    k->grouped_gemm_dgrad({ptr, b1}, want.dh, {}, DType::kBF16, want.dx);
    k->grouped_gemm_wgrad(ptr, want.dh, {}, x, index,
                          grad_bases(static_cast<MatrixView>(want.g1).data, 2 * kFfn * kHidden));
    k->grouped_gemm_wgrad(ptr, dy, index, want.wa, {},
                          grad_bases(static_cast<MatrixView>(want.g2).data, kFfn * kHidden));
  }
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  for (const GemmPath path : {GemmPath::kBest, GemmPath::kPortable}) {
    const auto k = make_cuda_kernels(nullptr, path);
    Results got;
    zero(got.g1), zero(got.g2);
    OnDevice dx_in(x), ddy(dy), dw1(w1), dw2(w2), h(got.h), act(got.act), y(got.y), u(got.u), dh(got.dh),
        wa(got.wa), dx(got.dx), g1(got.g1), g2(got.g2);
    DeviceArray<std::int64_t> dptr(ptr);
    DeviceArray<std::int32_t> dindex(index);
    DeviceArray<float> dweight(weight), ddw(got.dw);
    const std::span<const std::int64_t> p(dptr.data(), ptr.size());
    const std::span<const std::int32_t> i(dindex.data(), index.size());
    const auto b1 = bases(dw1.view().data, 2 * kFfn * kHidden * 2),
               b2 = bases(dw2.view().data, kFfn * kHidden * 2);
    k->grouped_gemm_forward({p, b1}, dx_in.view(), i, DType::kBF16, 2 * kFfn, Activation::kSwiGLU, h.view(),
                            act.view());
    k->grouped_gemm_forward({p, b2}, act.view(), {}, DType::kBF16, kHidden, Activation::kRelu, y.view(), {});
    k->grouped_gemm_dgrad({p, b2}, ddy.view(), i, DType::kBF16, u.view());
    k->activation_backward(Activation::kSwiGLU, h.view(), u.view(), {dweight.data(), weight.size()},
                           {ddw.data(), weight.size()}, dh.view(), wa.view(), 0, rows);
    k->grouped_gemm_dgrad({p, b1}, dh.view(), {}, DType::kBF16, dx.view());
    k->grouped_gemm_wgrad(p, dh.view(), {}, dx_in.view(), i, grad_bases(g1.view().data, 2 * kFfn * kHidden));
    k->grouped_gemm_wgrad(p, ddy.view(), i, wa.view(), {}, grad_bases(g2.view().data, kFfn * kHidden));
    CUDA_OK(cudaDeviceSynchronize());
    EXPECT_GT(k->scratch_bytes(), 0);
    h.get(got.h), act.get(got.act), y.get(got.y), u.get(got.u), dh.get(got.dh), wa.get(got.wa),
        dx.get(got.dx);
    g1.get(got.g1), g2.get(got.g2);
    const std::string name = path == GemmPath::kBest ? "best " : "portable ";
    // bf16 rounds intermediate results to either side: 1/256 each, more after several steps.
    expect_near(got.h, want.h, 1.0 / 128, 1e-3, name + "h");
    expect_near(got.act, want.act, 1.0 / 64, 1e-2, name + "act");
    expect_near(got.y, want.y, 1.0 / 64, 3e-2, name + "y");
    expect_near(got.u, want.u, 1.0 / 128, 1e-3, name + "u");
    expect_near(got.dh, want.dh, 1.0 / 32, 2e-2, name + "dh");
    expect_near(got.wa, want.wa, 1.0 / 32, 2e-2, name + "wa");
    expect_near(got.dx, want.dx, 1.0 / 32, 6e-2, name + "dx");
    expect_near(got.g1, want.g1, 1.0 / 32, 0.15, name + "dW1");
    expect_near(got.g2, want.g2, 1.0 / 32, 0.15, name + "dW2");
    const auto dw = ddw.get();
    for (std::size_t r = 0; r < dw.size(); ++r)
      EXPECT_TRUE(std::abs(dw[r] - want.dw[r]) <= std::abs(want.dw[r]) / 32 + 0.1) << name << "dw " << r;
    // What the interface cannot do here is refused by name.
    Matrix f32(DType::kF32, rows, kHidden);
    OnDevice df32(f32);
    EXPECT_THROW(k->grouped_gemm_dgrad({p, b1}, df32.view(), {}, DType::kBF16, dx.view()), Error);
    auto uneven = b1;
    uneven[2] += 16;
    EXPECT_THROW(k->grouped_gemm_dgrad({p, uneven}, dh.view(), {}, DType::kBF16, dx.view()), Error);
  }
}

}  // namespace
}  // namespace sluice::kernels::cuda
