#include "sluice/runtime/src/gather.hpp"

#include <algorithm>

#include "sluice/comm/collectives.hpp"

namespace sluice {

std::vector<std::string> gather_to_root(Runtime& runtime, std::string_view mine, std::string_view phase) {
  const auto num_ranks = static_cast<std::size_t>(runtime.num_ranks());
  const bool root = runtime.rank() == RankId(0);
  const auto size = static_cast<std::int64_t>(mine.size());
  const std::vector<std::int64_t> sizes = runtime.all_gather(std::span(&size, 1), phase);
  std::vector<std::string> out(root ? num_ranks : 0);
  std::vector<std::span<const std::byte>> sends(num_ranks);
  std::vector<std::span<std::byte>> receives(num_ranks);
  if (root)
    out[0] = mine;
  else
    sends[0] = std::as_bytes(std::span<const char>(mine));
  for (std::size_t r = 1; r < out.size(); ++r) {
    out[r].resize(static_cast<std::size_t>(sizes[r]));
    receives[r] = std::as_writable_bytes(std::span<char>(out[r]));
  }
  runtime.collectives().all_to_all_v(sends, receives, phase).throw_if_error();
  return out;
}

std::string text_of_root(Runtime& runtime, std::string text, std::size_t max_bytes, std::string_view what,
                         std::string_view phase) {
  auto size = static_cast<std::int64_t>(text.size());
  runtime.broadcast(std::as_writable_bytes(std::span(&size, 1)), RankId(0), phase);
  Require(size >= 0 && static_cast<std::uint64_t>(size) <= max_bytes, ErrorCode::kDisagreement,
          "rank 0 announces ", what, " of ", size, " bytes; at most ", max_bytes, " are taken");
  text.resize(static_cast<std::size_t>(size));
  if (size > 0)
    runtime.broadcast(std::as_writable_bytes(std::span(text.data(), text.size())), RankId(0), phase);
  return text;
}

void agree_on_success(Runtime& runtime, const Status& mine, std::string_view phase) {
  const std::int64_t head[2] = {static_cast<std::int64_t>(mine.code),
                                static_cast<std::int64_t>(std::min<std::size_t>(mine.message.size(), 4096))};
  const std::vector<std::int64_t> all = runtime.all_gather(head, phase);
  for (std::int32_t r = 0; r < runtime.num_ranks(); ++r) {
    const std::int64_t code = all[2 * static_cast<std::size_t>(r)];
    const std::int64_t size = all[2 * static_cast<std::size_t>(r) + 1];
    if (code == static_cast<std::int64_t>(ErrorCode::kOk)) continue;
    Require(code > 0 && code <= static_cast<std::int64_t>(ErrorCode::kInternal) && size >= 0 && size <= 4096,
            ErrorCode::kDisagreement, "rank ", r, " announces an error ", code, " of ", size, " bytes");
    std::string message = mine.message;
    message.resize(static_cast<std::size_t>(size));
    if (size > 0) runtime.broadcast(std::as_writable_bytes(std::span(message)), RankId(r), phase);
    throw Error(static_cast<ErrorCode>(code),
                runtime.num_ranks() > 1 ? str("rank ", r, ": ", message) : message);
  }
}

}  // namespace sluice
