// The secret of a job and what is proven with it: whoever joins shows that it knows the secret by answering a
// challenge (HMAC-SHA256 of OpenSSL's libcrypto). The secret itself is never sent, printed or put on a command line.
//
// Thread-safety: plain values. Errors: kInvalidConfig naming the file and what is wrong with it; kInternal when
// libcrypto fails.
#pragma once

#include <array>
#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

namespace sluice::comm {

using Nonce = std::array<std::byte, 32>;
using Mac = std::array<std::byte, 32>;

class Secret {
 public:
  static constexpr std::size_t kMinBytes = 16;
  static constexpr std::size_t kMaxBytes = 4096;

  // 256 bits of the system's randomness, as text.
  static Secret random();
  // Spaces and line ends around it are cut off. `where` names its source in errors.
  static Secret from_text(std::string_view text, std::string_view where);
  // A regular file of this user that nobody else may read (mode 0600 or less).
  static Secret from_file(const std::filesystem::path& path);

  // For the environment of a child process or a file of mode 0600; nowhere else.
  const std::string& reveal() const { return text_; }
  Mac mac(std::initializer_list<std::span<const std::byte>> parts) const;

 private:
  explicit Secret(std::string text) : text_(std::move(text)) {}
  std::string text_;
};

Nonce random_nonce();
// In constant time.
bool equal(const Mac& a, const Mac& b);

}  // namespace sluice::comm
