// AVX-512 vectors of 16 floats. Included by isa_avx512.cpp only (it is compiled with other flags than the
// rest).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sluice::kernels {
namespace {

struct Vec {
  using F = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kTileRows = 14;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load_bf16(const std::uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store_bf16(std::uint16_t* p, F x) {
    // The rounding of base/dtype.hpp. (The vcvtneps2bf16 instruction flushes denormals, so it is not used.)
    const __m512i u = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_srli_epi32(rounded, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  // a > b ? a : b and a < b ? a : b; b when unordered, so a NaN in b stays.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // x <= 0 ? 0 : value
  static F zero_unless_positive(F x, F value) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, zero(), _CMP_LE_OQ), zero());
  }
  // value * 2^n where n = bits(shifted) - bits(base), in two exact steps so that n may leave the exponent
  // range.
  static F scale(F value, F shifted, F base) {
    const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(base));
    const __m512i n1 = _mm512_srai_epi32(n, 1);
    const __m512i n2 = _mm512_sub_epi32(n, n1);
    const __m512i bias = _mm512_set1_epi32(127);
    const F f1 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n1, bias), 23));
    const F f2 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n2, bias), 23));
    return mul(mul(value, f1), f2);
  }

  // dst[k * stride + c] = row c of src, element k, for c and k in 0..15; row stride `ld` floats.
  // Every row is read by one load: rows are often 4 KiB apart, where L1 keeps only eight of them.
  static void transpose(const float* src, std::int64_t ld, float* dst, std::int64_t stride) {
    // 4x4 transposes within lanes: t[4q + j], lane l, holds elements 4l + j of rows 4q..4q+3.
    F t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const F r0 = load(src), r1 = load(src + ld), r2 = load(src + 2 * ld), r3 = load(src + 3 * ld);
      src += 4 * ld;
      // Keeps the compiler from holding all 16 row addresses, which do not fit in registers.
      asm("" : "+r"(src));
      const F low01 = _mm512_unpacklo_ps(r0, r1), high01 = _mm512_unpackhi_ps(r0, r1);
      const F low23 = _mm512_unpacklo_ps(r2, r3), high23 = _mm512_unpackhi_ps(r2, r3);
      t[i] = _mm512_shuffle_ps(low01, low23, 0x44);
      t[i + 1] = _mm512_shuffle_ps(low01, low23, 0xee);
      t[i + 2] = _mm512_shuffle_ps(high01, high23, 0x44);
      t[i + 3] = _mm512_shuffle_ps(high01, high23, 0xee);
    }
    // A 4x4 transpose of lanes over q.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const F even01 = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88),
              odd01 = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd);
      const F even23 = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x88);
      const F odd23 = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xdd);
      store(dst + j * stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
      store(dst + (4 + j) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
      store(dst + (8 + j) * stride, _mm512_shuffle_f32x4(even01, even23, 0xdd));
      store(dst + (12 + j) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
    }
  }
};

}  // namespace
}  // namespace sluice::kernels
