// Element types of rows and weights, and the one rounding from fp32 to bf16 used everywhere
// (round to nearest, ties to even; NaN stays NaN).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace sluice {

enum class DType : std::uint8_t { kF32 = 0, kBF16 = 1 };

constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : 2;
}
constexpr std::string_view to_string(DType dtype) {
  return dtype == DType::kF32 ? "f32" : "bf16";
}

struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  constexpr explicit bf16(float value) : bits(round(value)) {}
  constexpr explicit operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  friend constexpr bool operator==(bf16 a, bf16 b) { return a.bits == b.bits; }

 private:
  static constexpr std::uint16_t round(float value) {
    const auto u = std::bit_cast<std::uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
    return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};
static_assert(sizeof(bf16) == 2);

// `value` as it comes out of a store to `dtype` and a load back.
constexpr float round_to(DType dtype, float value) {
  return dtype == DType::kF32 ? value : static_cast<float>(bf16(value));
}

template <typename T>
inline constexpr DType dtype_of = DType::kF32;
template <>
inline constexpr DType dtype_of<bf16> = DType::kBF16;

}  // namespace sluice
