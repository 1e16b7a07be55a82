#include "sluice/runtime/src/bench/dense_gemms.hpp"

#include "sluice/base/clock.hpp"
#include "sluice/runtime/src/device_layer.hpp"
#include "sluice/runtime/src/layer_config.hpp"

namespace sluice {

void dense_gemms_on_device(kernels::Device& device, const MoeLayerOptions& options, std::int64_t rows,
                           std::span<const std::byte> a, std::span<const std::byte> in_w1,
                           std::span<const std::byte> in_w2, std::vector<double>& forward_us,
                           std::vector<double>& backward_us) {
  const std::int64_t pre = preactivation_cols(options);
  DeviceCopy<std::byte> x(device), w1(device), w2(device);
  DeviceCopy<std::int64_t> ptr(device);
  DeviceRows h(device), act(device), out(device);
  DeviceMemory g1(device), g2(device);
  device.make_current();
  x.upload(a);
  w1.upload(in_w1);
  w2.upload(in_w2);
  ptr.upload(std::vector<std::int64_t>{0, rows});
  h.resize(rows, pre, options.dtype);
  act.resize(rows, options.ffn, options.dtype);
  out.resize(rows, options.hidden, options.dtype);
  g1.at_least(pre * options.hidden * 4);
  g2.at_least(options.ffn * options.hidden * 4);
  device.zero(g1.as<float>(), pre * options.hidden * 4);
  device.zero(g2.as<float>(), options.ffn * options.hidden * 4);
  const ConstMatrixView va(x.span().data(), options.dtype, rows, options.hidden, options.hidden);
  const std::byte* const base1[1] = {w1.span().data()};
  const std::byte* const base2[1] = {w2.span().data()};
  float* const grad1[1] = {g1.as<float>()};
  float* const grad2[1] = {g2.as<float>()};
  kernels::Kernels& kernels = device.kernels();
  const kernels::Activation activation = kernels::Activation::kRelu;  // any: only h is wanted
  kernels.grouped_gemm_dgrad({ptr.span(), base2}, va, {}, options.dtype,
                             act.view());  // values for the second GEMM
  for (int i = 0; i < 1 + kDenseRuns; ++i) {
    device.synchronize();
    auto begin = Clock::now();
    kernels.grouped_gemm_forward({ptr.span(), base1}, va, {}, options.dtype, pre, activation, h.view(), {});
    kernels.grouped_gemm_forward({ptr.span(), base2}, act.view(), {}, options.dtype, options.hidden,
                                 activation, out.view(), {});
    device.synchronize();
    if (i > 0) forward_us.push_back(to_us(Clock::now() - begin));
    begin = Clock::now();
    kernels.grouped_gemm_dgrad({ptr.span(), base2}, va, {}, options.dtype, act.view());
    kernels.grouped_gemm_dgrad({ptr.span(), base1}, h.view(), {}, options.dtype, out.view());
    kernels.grouped_gemm_wgrad(ptr.span(), va, {}, act.view(), {}, grad2);
    kernels.grouped_gemm_wgrad(ptr.span(), h.view(), {}, va, {}, grad1);
    device.synchronize();
    if (i > 0) backward_us.push_back(to_us(Clock::now() - begin));
  }
}

}  // namespace sluice
