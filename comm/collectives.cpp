#include "sluice/comm/collectives.hpp"

#include <algorithm>
#include <cstring>

namespace sluice::comm {
namespace {

constexpr std::uint32_t kChannel = 0;
constexpr std::size_t kSlotBytes =
    2048;  // counts of some hundred experts; larger messages bear the handshake
constexpr std::uint32_t kSlotWindow = 0;
constexpr std::uint32_t kFirstDirectWindow = 1;  // + source rank
constexpr std::uint32_t kDataSignal = 0;         // + parity of the round
constexpr std::uint32_t kReadySignal = 2;        // + parity of the round
constexpr std::uint32_t kNumSignals = 4;
// all_reduce works in blocks, so that its staging stays small: it needs as many bytes as a block.
constexpr std::size_t kReduceBlockBytes = std::size_t{16} << 20;

std::span<std::byte> row_bytes(std::span<std::int64_t> rows, std::size_t row, std::size_t k) {
  return std::as_writable_bytes(rows.subspan(row * k, k));
}

}  // namespace

Collectives::Collectives(Transport& transport)
    : transport_(transport),
      num_ranks_(static_cast<std::size_t>(transport.num_ranks())),
      rank_(transport.rank().index()),
      slots_(2 * num_ranks_ * kSlotBytes),
      sends_(num_ranks_),
      receives_(num_ranks_) {
  expects_.reserve(2 * num_ranks_);
  transport_.open_channel(kChannel, kFirstDirectWindow + static_cast<std::uint32_t>(num_ranks_), kNumSignals);
  transport_.set_window(kChannel, kSlotWindow, slots_);
}

Collectives::~Collectives() {
  for (std::uint32_t w = 0; w < kFirstDirectWindow + num_ranks_; ++w) transport_.set_window(kChannel, w, {});
}

Status Collectives::barrier(std::string_view phase) {
  std::fill(sends_.begin(), sends_.end(), std::span<const std::byte>());
  std::fill(receives_.begin(), receives_.end(), std::span<std::byte>());
  return exchange(phase);
}

Status Collectives::all_gather(std::span<const std::int64_t> mine, std::span<std::int64_t> all,
                               std::string_view phase) {
  Require(all.size() == num_ranks_ * mine.size(), ErrorCode::kInvalidArgument, "all_gather of ", mine.size(),
          " integers a rank into ", all.size(), "; must be ", num_ranks_ * mine.size());
  for (std::size_t r = 0; r < num_ranks_; ++r) {
    sends_[r] = std::as_bytes(mine);
    receives_[r] = row_bytes(all, r, mine.size());
  }
  return exchange(phase);
}

Status Collectives::all_to_all(std::span<const std::int64_t> send, std::span<std::int64_t> receive,
                               std::string_view phase) {
  Require(send.size() == receive.size() && send.size() % num_ranks_ == 0, ErrorCode::kInvalidArgument,
          "all_to_all of ", send.size(), " into ", receive.size(), " integers; must be equal multiples of ",
          num_ranks_);
  const std::size_t k = send.size() / num_ranks_;
  for (std::size_t r = 0; r < num_ranks_; ++r) {
    sends_[r] = std::as_bytes(send.subspan(r * k, k));
    receives_[r] = row_bytes(receive, r, k);
  }
  return exchange(phase);
}

Status Collectives::all_to_all_v(std::span<const std::span<const std::byte>> sends,
                                 std::span<const std::span<std::byte>> receives, std::string_view phase) {
  Require(sends.size() == num_ranks_ && receives.size() == num_ranks_, ErrorCode::kInvalidArgument,
          "all_to_all_v has ", sends.size(), " sends and ", receives.size(),
          " receives; must be one a rank, ", num_ranks_);
  std::copy(sends.begin(), sends.end(), sends_.begin());
  std::copy(receives.begin(), receives.end(), receives_.begin());
  return exchange(phase);
}

Status Collectives::broadcast(std::span<std::byte> data, RankId root, std::string_view phase) {
  Require(root.valid() && root.index() < num_ranks_, ErrorCode::kInvalidArgument, "broadcast from rank ",
          root.value, "; ranks are 0..", num_ranks_ - 1);
  const bool is_root = root.index() == rank_;
  for (std::size_t r = 0; r < num_ranks_; ++r) {
    sends_[r] = is_root && r != rank_ ? std::span<const std::byte>(data) : std::span<const std::byte>();
    receives_[r] = !is_root && r == root.index() ? data : std::span<std::byte>();
  }
  return exchange(phase);
}

Status Collectives::all_reduce_sum(std::span<float> data, std::string_view phase) {
  return sum(data, phase);
}
Status Collectives::all_reduce_sum(std::span<double> data, std::string_view phase) {
  return sum(data, phase);
}

template <typename T>
Status Collectives::sum(std::span<T> data, std::string_view phase) {
  if (num_ranks_ == 1) return barrier(phase);
  // Rank r sums slice r of a block: slices differ by at most one slice length, trailing ones may be empty.
  constexpr std::size_t kBlock = kReduceBlockBytes / sizeof(T);
  for (std::size_t begin = 0; begin < data.size(); begin += kBlock) {
    const std::span<T> block = data.subspan(begin, std::min(kBlock, data.size() - begin));
    const std::size_t slice = (block.size() + num_ranks_ - 1) / num_ranks_;
    const auto slice_of = [&](std::size_t r) {
      const std::size_t from = std::min(r * slice, block.size());
      return block.subspan(from, std::min(slice, block.size() - from));
    };
    const std::span<T> mine = slice_of(rank_);
    const std::size_t mine_bytes = mine.size() * sizeof(T);
    if (staging_.size() < num_ranks_ * mine_bytes) staging_.resize(num_ranks_ * mine_bytes);
    for (std::size_t r = 0; r < num_ranks_; ++r) {
      sends_[r] = std::as_bytes(slice_of(r));
      receives_[r] = std::span(staging_).subspan(r * mine_bytes, mine_bytes);
    }
    if (Status status = exchange(phase); !status.ok()) return status;
    if (!mine.empty()) {
      // std::byte storage holds the bytes of T here; the allocator aligns it for any T.
      const auto* parts = reinterpret_cast<const T*>(staging_.data());
      std::memcpy(mine.data(), parts, mine_bytes);
      for (std::size_t r = 1; r < num_ranks_; ++r) {
        const T* part = parts + r * mine.size();
        for (std::size_t i = 0; i < mine.size(); ++i) mine[i] += part[i];
      }
    }
    for (std::size_t r = 0; r < num_ranks_; ++r) {
      sends_[r] = std::as_bytes(mine);
      receives_[r] = std::as_writable_bytes(slice_of(r));
    }
    sends_[rank_] = {};
    receives_[rank_] = {};
    if (Status status = exchange(phase); !status.ok()) return status;
  }
  return {};
}

Status Collectives::exchange(std::string_view phase) {
  try {
    return run_round(phase);
  } catch (...) {
    const Status status = current_exception_status();
    AbortRecord record;
    record.status = {status.scope() == Scope::kGroup ? status.code : ErrorCode::kAborted,
                     str("rank ", rank_, " ended the group in ", phase, ": ", status.message)};
    record.culprit = record.reporter = transport_.rank();
    record.phase = std::string(phase);
    transport_.abort(record);
    throw;
  }
}

Status Collectives::run_round(std::string_view phase) {
  const auto parity = static_cast<std::uint32_t>(round_++ % 2);
  Require(sends_[rank_].size() == receives_[rank_].size(), ErrorCode::kInvalidArgument, "rank ", rank_,
          " sends itself ", sends_[rank_].size(), " bytes but expects ", receives_[rank_].size());
  if (!sends_[rank_].empty())
    std::memmove(receives_[rank_].data(), sends_[rank_].data(), sends_[rank_].size());
  const std::size_t set_bytes = parity * num_ranks_ * kSlotBytes;
  const auto offset_of = [&](std::size_t source) {
    return static_cast<std::int64_t>(set_bytes + source * kSlotBytes);
  };
  const auto id = [](std::size_t r) { return RankId(static_cast<std::int32_t>(r)); };

  expects_.clear();
  for (std::size_t r = 0; r < num_ranks_; ++r) {
    if (r == rank_) continue;
    Expect data{.peer = id(r),
                .channel = kChannel,
                .window = kSlotWindow,
                .offset_bytes = offset_of(r),
                .bytes = static_cast<std::int64_t>(receives_[r].size()),
                .signal = kDataSignal + parity};
    if (receives_[r].size() > kSlotBytes) {
      data.window = kFirstDirectWindow + static_cast<std::uint32_t>(r);
      data.offset_bytes = 0;
      transport_.set_window(kChannel, data.window, receives_[r]);
    }
    expects_.push_back(data);
    ++num_data_[parity];
    if (sends_[r].size() > kSlotBytes) {
      expects_.push_back({.peer = id(r),
                          .channel = kChannel,
                          .window = 0,
                          .offset_bytes = 0,
                          .bytes = 0,
                          .signal = kReadySignal + parity});
      ++num_ready_[parity];
    }
  }
  transport_.expect(expects_);

  // Peers in the order after the own rank, so that not all begin with rank 0. First what lets others go on.
  bool any_large = false;
  const auto put = [&](std::size_t r, std::uint32_t window, std::int64_t offset,
                       std::span<const std::byte> source, std::uint32_t signal) {
    transport_.put({.peer = id(r),
                    .channel = kChannel,
                    .window = window,
                    .offset_bytes = offset,
                    .source = source,
                    .signal = signal});
    ++num_puts_;
  };
  for (std::size_t i = 1; i < num_ranks_; ++i) {
    const std::size_t r = (rank_ + i) % num_ranks_;
    if (receives_[r].size() > kSlotBytes) put(r, 0, 0, {}, kReadySignal + parity);
    if (sends_[r].size() <= kSlotBytes)
      put(r, kSlotWindow, offset_of(rank_), sends_[r], kDataSignal + parity);
    any_large = any_large || sends_[r].size() > kSlotBytes;
  }
  if (any_large) {
    if (Status status = wait(kReadySignal + parity, num_ready_[parity], phase); !status.ok()) return status;
    for (std::size_t i = 1; i < num_ranks_; ++i) {
      const std::size_t r = (rank_ + i) % num_ranks_;
      if (sends_[r].size() > kSlotBytes)
        put(r, kFirstDirectWindow + static_cast<std::uint32_t>(rank_), 0, sends_[r], kDataSignal + parity);
    }
  }
  if (Status status = wait(kDataSignal + parity, num_data_[parity], phase); !status.ok()) return status;
  for (std::size_t r = 0; r < num_ranks_; ++r) {
    if (r == rank_ || receives_[r].empty() || receives_[r].size() > kSlotBytes) continue;
    std::memcpy(receives_[r].data(), slots_.data() + offset_of(r), receives_[r].size());
  }
  return transport_.wait_for_puts(kChannel, num_puts_);
}

Status Collectives::wait(std::uint32_t signal, std::uint64_t value, std::string_view phase) {
  return transport_.wait(
      {.channel = kChannel, .signal = signal, .value = value, .phase = phase, .chunk = -1});
}

}  // namespace sluice::comm
