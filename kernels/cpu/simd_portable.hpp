// Vectors of 4 floats in plain C++ for processors without AVX2. Included by isa_portable.cpp only.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "sluice/base/dtype.hpp"

namespace sluice::kernels {
namespace {

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr int kTileRows = 4;
  struct F {
    float v[kWidth];
  };

  template <typename Function>
  static F each(Function function) {
    F out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = function(i);
    return out;
  }
  static F zero() { return set1(0.0f); }
  static F set1(float x) {
    return each([&](int) { return x; });
  }
  static F load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, F x) {
    for (int i = 0; i < kWidth; ++i) p[i] = x.v[i];
  }
  static F load_bf16(const std::uint16_t* p) {
    return each([&](int i) { return std::bit_cast<float>(static_cast<std::uint32_t>(p[i]) << 16); });
  }
  static void store_bf16(std::uint16_t* p, F x) {
    for (int i = 0; i < kWidth; ++i) p[i] = bf16(x.v[i]).bits;
  }
  static F fma(F a, F b, F c) {
    return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F sqrt(F a) {
    return each([&](int i) { return std::sqrt(a.v[i]); });
  }
  // a > b ? a : b and a < b ? a : b; b when unordered, so a NaN in b stays.
  static F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  // x <= 0 ? 0 : value
  static F zero_unless_positive(F x, F value) {
    return each([&](int i) { return x.v[i] <= 0.0f ? 0.0f : value.v[i]; });
  }
  // value * 2^n where n = bits(shifted) - bits(base), in two exact steps so that n may leave the exponent
  // range. Unsigned arithmetic: a NaN gives an n without meaning, which must not be undefined behaviour.
  static F scale(F value, F shifted, F base) {
    return each([&](int i) {
      const auto n = static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(shifted.v[i]) -
                                               std::bit_cast<std::uint32_t>(base.v[i]));
      const auto n1 = static_cast<std::uint32_t>(n >> 1);
      const auto n2 = static_cast<std::uint32_t>(n) - n1;
      return value.v[i] * std::bit_cast<float>((n1 + 127u) << 23) * std::bit_cast<float>((n2 + 127u) << 23);
    });
  }

  // dst[k * stride + c] = row c of src, element k, for c and k in 0..3; row stride `ld` floats.
  static void transpose(const float* src, std::int64_t ld, float* dst, std::int64_t stride) {
    for (int c = 0; c < kWidth; ++c)
      for (int k = 0; k < kWidth; ++k) dst[k * stride + c] = src[c * ld + k];
  }
};

}  // namespace
}  // namespace sluice::kernels
