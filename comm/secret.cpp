#include "sluice/comm/secret.hpp"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "sluice/base/error.hpp"

namespace sluice::comm {
namespace {

void random_bytes(std::span<std::byte> out) {
  Require(RAND_bytes(reinterpret_cast<unsigned char*>(out.data()), static_cast<int>(out.size())) == 1,
          ErrorCode::kInternal, "libcrypto gave no random bytes");
}

}  // namespace

Secret Secret::random() {
  Nonce bytes;
  random_bytes(bytes);
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte b : bytes) {
    text += kDigits[static_cast<unsigned>(b) >> 4];
    text += kDigits[static_cast<unsigned>(b) & 15];
  }
  return Secret(std::move(text));
}

Secret Secret::from_text(std::string_view text, std::string_view where) {
  constexpr std::string_view kSpace = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(kSpace);
  text = begin == std::string_view::npos ? std::string_view()
                                         : text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
  Require(text.size() >= kMinBytes && text.size() <= kMaxBytes, ErrorCode::kInvalidConfig, where, " holds ",
          text.size(), " bytes; a secret has ", kMinBytes, "..", kMaxBytes,
          " (make one with: openssl rand -hex 32)");
  return Secret(std::string(text));
}

Secret Secret::from_file(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  Require(fd >= 0, ErrorCode::kInvalidConfig, "cannot open the secret file ", path.string(), ": ",
          std::strerror(errno));
  struct stat info {};
  const bool known = ::fstat(fd, &info) == 0;
  std::string text(kMaxBytes + 16, '\0');
  std::size_t size = 0;
  while (size < text.size()) {
    const ssize_t n = ::read(fd, text.data() + size, text.size() - size);
    if (n <= 0) break;
    size += static_cast<std::size_t>(n);
  }
  ::close(fd);
  text.resize(size);
  Require(known && S_ISREG(info.st_mode), ErrorCode::kInvalidConfig, "the secret file ", path.string(),
          " is no regular file");
  Require(info.st_uid == ::geteuid(), ErrorCode::kInvalidConfig, "the secret file ", path.string(),
          " belongs to user ", info.st_uid, ", not to user ", ::geteuid(), " who runs the job");
  Require((info.st_mode & 077) == 0, ErrorCode::kInvalidConfig, "the secret file ", path.string(),
          " may be read or written by others; chmod 600 it");
  return from_text(text, str("the secret file ", path.string()));
}

Mac Secret::mac(std::initializer_list<std::span<const std::byte>> parts) const {
  std::vector<unsigned char> message;
  for (const auto part : parts) {
    const auto* data = reinterpret_cast<const unsigned char*>(part.data());
    message.insert(message.end(), data, data + part.size());
  }
  Mac out{};
  unsigned int size = 0;
  const unsigned char* done = HMAC(EVP_sha256(), text_.data(), static_cast<int>(text_.size()), message.data(),
                                   message.size(), reinterpret_cast<unsigned char*>(out.data()), &size);
  Require(done != nullptr && size == out.size(), ErrorCode::kInternal, "libcrypto's HMAC-SHA256 failed");
  return out;
}

Nonce random_nonce() {
  Nonce out;
  random_bytes(out);
  return out;
}

bool equal(const Mac& a, const Mac& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace sluice::comm
