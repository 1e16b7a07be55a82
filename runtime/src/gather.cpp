#include "sluice/runtime/src/gather.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <fstream>
#include <thread>

#include "sluice/base/hash.hpp"
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

std::vector<double> largest_of_ranks(Runtime& runtime, const std::vector<double>& mine_us,
                                     std::string_view phase) {
  std::vector<std::int64_t> ns;
  for (const double v : mine_us) ns.push_back(std::llround(v * 1000));
  const std::vector<std::int64_t> all = runtime.all_gather(ns, phase);
  std::vector<double> out(mine_us.size(), 0);
  for (std::size_t i = 0; i < all.size(); ++i)
    out[i % out.size()] = std::max(out[i % out.size()], static_cast<double>(all[i]) / 1000);
  return out;
}

std::string shared_cores_note(Runtime& runtime, int threads_per_rank, std::string_view phase) {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  const std::int64_t mine[] = {std::bit_cast<std::int64_t>(Hasher().add_text(boot).value()),
                               static_cast<std::int64_t>(std::thread::hardware_concurrency()),
                               threads_per_rank};
  const std::vector<std::int64_t> all = runtime.all_gather(mine, phase);
  for (std::size_t r = 0; r < all.size(); r += 3) {
    std::int64_t threads = 0;
    for (std::size_t other = 0; other < all.size(); other += 3)
      if (all[other] == all[r]) threads += all[other + 2];
    if (threads > all[r + 1])
      return str(threads, " compute threads of the ranks share ", all[r + 1],
                 " cores: times would tell of their queue");
  }
  return {};
}

}  // namespace sluice
