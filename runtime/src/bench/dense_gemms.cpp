#include "sluice/runtime/src/bench/dense_gemms.hpp"

#include "sluice/base/clock.hpp"
#include "sluice/runtime/src/layer_config.hpp"

namespace sluice {
namespace {

constexpr kernels::Activation kActivation = kernels::Activation::kRelu;  // any: only h is wanted

}  // namespace

DenseGemms::DenseGemms(kernels::Device& device, const MoeLayerOptions& options, std::int64_t rows,
                       std::span<const std::byte> a, std::span<const std::byte> w1,
                       std::span<const std::byte> w2)
    : device_(device),
      options_(options),
      rows_(rows),
      pre_(preactivation_cols(options)),
      x_(device),
      w1_(device),
      w2_(device),
      ptr_(device),
      h_(device),
      act_(device),
      out_(device),
      g1_(device),
      g2_(device) {
  device.make_current();
  x_.upload(a);
  w1_.upload(w1);
  w2_.upload(w2);
  ptr_.upload(std::vector<std::int64_t>{0, rows});
  h_.resize(rows, pre_, options.dtype);
  act_.resize(rows, options.ffn, options.dtype);
  out_.resize(rows, options.hidden, options.dtype);
  for (const auto& [memory, cols] : {std::pair{&g1_, pre_}, {&g2_, options.ffn}}) {
    memory->at_least(cols * options.hidden * 4);
    device.zero(memory->as<float>(), cols * options.hidden * 4);
  }
  const std::byte* const base2[1] = {w2_.span().data()};
  // Values for the second GEMM.
  device.kernels().grouped_gemm_dgrad({ptr_.span(), base2}, this->a(), {}, options.dtype, act_.view());
}

double DenseGemms::forward_us() {
  kernels::Kernels& kernels = device_.kernels();
  const std::byte* const base1[1] = {w1_.span().data()};
  const std::byte* const base2[1] = {w2_.span().data()};
  device_.make_current();
  device_.synchronize();
  const auto begin = Clock::now();
  kernels.grouped_gemm_forward({ptr_.span(), base1}, a(), {}, options_.dtype, pre_, kActivation, h_.view(),
                               {});
  kernels.grouped_gemm_forward({ptr_.span(), base2}, act_.view(), {}, options_.dtype, options_.hidden,
                               kActivation, out_.view(), {});
  device_.synchronize();
  return to_us(Clock::now() - begin);
}

double DenseGemms::backward_us() {
  kernels::Kernels& kernels = device_.kernels();
  const std::byte* const base1[1] = {w1_.span().data()};
  const std::byte* const base2[1] = {w2_.span().data()};
  float* const grad1[1] = {g1_.as<float>()};
  float* const grad2[1] = {g2_.as<float>()};
  device_.make_current();
  device_.synchronize();
  const auto begin = Clock::now();
  kernels.grouped_gemm_dgrad({ptr_.span(), base2}, a(), {}, options_.dtype, act_.view());
  kernels.grouped_gemm_dgrad({ptr_.span(), base1}, h_.view(), {}, options_.dtype, out_.view());
  kernels.grouped_gemm_wgrad(ptr_.span(), a(), {}, act_.view(), {}, grad2);
  kernels.grouped_gemm_wgrad(ptr_.span(), h_.view(), {}, a(), {}, grad1);
  device_.synchronize();
  return to_us(Clock::now() - begin);
}

}  // namespace sluice
