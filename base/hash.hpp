// A 64-bit hash for agreement checks: every rank hashes the same values in the same order and compares. Not
// cryptographic. The result depends on values only, never on addresses, padding or byte order of the host.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace sluice {

class Hasher {
 public:
  Hasher& add(std::uint64_t value) {
    // Multiply-xorshift rounds of the splitmix64 generator (Steele, Lea, Flood, OOPSLA 2014).
    std::uint64_t z = (state_ ^ value) + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    state_ = z ^ (z >> 31);
    return *this;
  }
  Hasher& add_int(std::int64_t value) { return add(static_cast<std::uint64_t>(value)); }
  Hasher& add_float(double value) { return add(std::bit_cast<std::uint64_t>(value)); }
  Hasher& add_text(std::string_view text) {
    add(text.size());
    for (const char c : text) add(static_cast<unsigned char>(c));
    return *this;
  }
  template <typename Range>
  Hasher& add_ints(const Range& values) {
    add(static_cast<std::uint64_t>(values.size()));
    for (const auto v : values) add_int(static_cast<std::int64_t>(v));
    return *this;
  }
  std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0x5157494345ull;
};

}  // namespace sluice
