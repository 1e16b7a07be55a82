#include "sluice/runtime/src/gather.hpp"

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

}  // namespace sluice
