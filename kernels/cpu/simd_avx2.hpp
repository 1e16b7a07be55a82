// AVX2 vectors of 8 floats. Included by isa_avx2.cpp only (it is compiled with other flags than the rest).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sluice::kernels {
namespace {

struct Vec {
  using F = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 6;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load_bf16(const std::uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store_bf16(std::uint16_t* p, F x) {
    // The rounding of base/dtype.hpp.
    const __m256i u = _mm256_castps_si256(x);
    const __m256i high = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    rounded = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m128i low = _mm256_castsi256_si128(rounded), up = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, up));
  }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  // a > b ? a : b and a < b ? a : b; b when unordered, so a NaN in b stays.
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  // x <= 0 ? 0 : value
  static F zero_unless_positive(F x, F value) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, zero(), _CMP_LE_OQ), value);
  }
  // value * 2^n where n = bits(shifted) - bits(base), in two exact steps so that n may leave the exponent
  // range.
  static F scale(F value, F shifted, F base) {
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(base));
    const __m256i n1 = _mm256_srai_epi32(n, 1);
    const __m256i n2 = _mm256_sub_epi32(n, n1);
    const __m256i bias = _mm256_set1_epi32(127);
    const F f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n1, bias), 23));
    const F f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n2, bias), 23));
    return mul(mul(value, f1), f2);
  }

  // dst[k * stride + c] = row c of src, element k, for c and k in 0..7; row stride `ld` floats.
  static void transpose(const float* src, std::int64_t ld, float* dst, std::int64_t stride) {
    for (int k = 0; k < 8; k += 4) {
      // Lane q of r[j] holds row 4q + j, so that a 4x4 transpose within lanes puts rows in order.
      F r[4];
      for (int j = 0; j < 4; ++j) {
        const float* p = src + j * ld + k;
        r[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
      }
      const F low01 = _mm256_unpacklo_ps(r[0], r[1]), high01 = _mm256_unpackhi_ps(r[0], r[1]);
      const F low23 = _mm256_unpacklo_ps(r[2], r[3]), high23 = _mm256_unpackhi_ps(r[2], r[3]);
      store(dst + (k + 0) * stride, _mm256_shuffle_ps(low01, low23, 0x44));
      store(dst + (k + 1) * stride, _mm256_shuffle_ps(low01, low23, 0xee));
      store(dst + (k + 2) * stride, _mm256_shuffle_ps(high01, high23, 0x44));
      store(dst + (k + 3) * stride, _mm256_shuffle_ps(high01, high23, 0xee));
    }
  }
};

}  // namespace
}  // namespace sluice::kernels
