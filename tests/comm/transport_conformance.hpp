// What every transport must do. Each case is a body that all ranks of a group run at once, every rank with
// its own transport; a new backend runs the whole list. Channel 0 belongs to the Collectives, case i uses the
// channels from kChannelsPerCase * (i + 1) on, so that one group can run all cases one after another.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/transport.hpp"

namespace sluice::comm::conformance {

inline constexpr std::uint32_t kChannelsPerCase = 16;
inline constexpr std::byte kPoison{0xEE};

struct Rank {
  Transport& transport;
  Collectives& collectives;
  std::uint32_t channel;     // the first of this case
  std::int64_t large_bytes;  // of the large message; less where links are emulated
  std::int32_t me() const { return transport.rank().value; }
  std::int32_t n() const { return transport.num_ranks(); }
};

struct Case {
  const char* name;
  void (*run)(Rank);
};

#define SLUICE_EXPECT_OK(expression)                                              \
  do {                                                                            \
    const ::sluice::Status sluice_status = (expression);                          \
    EXPECT_TRUE(sluice_status.ok()) << #expression ": " << sluice_status.message; \
    if (!sluice_status.ok()) return;                                              \
  } while (false)

// The byte that belongs at position i of the message from s to d in a pass.
inline std::byte content(std::int32_t s, std::int32_t d, int pass, std::int64_t i) {
  std::uint64_t z =
      static_cast<std::uint64_t>(i) + 1315423911u * static_cast<std::uint64_t>(s * 1000 + d * 10 + pass);
  z = (z ^ (z >> 13)) * 0x9e3779b97f4a7c15ull;
  return static_cast<std::byte>(z >> 56);
}

// Passes on one channel in which every rank sends bytes(s, d, pass) to every rank, itself included, in one
// window with `gap` poisoned bytes before every message and `skew` bytes of misalignment of the sources.
class AllToAll {
 public:
  using Size = std::function<std::int64_t(std::int32_t s, std::int32_t d, int pass)>;

  AllToAll(Rank rank, std::uint32_t channel, Size bytes, std::int64_t gap = 0, std::int64_t skew = 0)
      : rank_(rank), t_(rank.transport), channel_(channel), bytes_(std::move(bytes)), gap_(gap), skew_(skew) {
    t_.open_channel(channel_, 1, 2);
  }
  ~AllToAll() { t_.set_window(channel_, 0, {}); }

  std::int64_t offset(std::int32_t s, std::int32_t d, int pass) const {
    std::int64_t at = gap_;
    for (std::int32_t r = 0; r < s; ++r) at += bytes_(r, d, pass) + gap_;
    return at;
  }

  // Sets the window, announces, says ready.
  void begin(int pass) {
    const std::int32_t me = rank_.me(), n = rank_.n();
    const std::int64_t total = offset(n, me, pass);
    if (static_cast<std::int64_t>(window_.size()) < total) {
      window_.resize(static_cast<std::size_t>(total));
      t_.set_window(channel_, 0, window_);
    }
    std::fill(window_.begin(), window_.end(), kPoison);
    sources_.resize(static_cast<std::size_t>(n));
    std::vector<Expect> expects;
    for (std::int32_t r = 0; r < n; ++r) {
      expects.push_back({.peer = RankId(r), .channel = channel_, .signal = 0});
      expects.push_back({.peer = RankId(r),
                         .channel = channel_,
                         .window = 0,
                         .offset_bytes = offset(r, me, pass),
                         .bytes = bytes_(r, me, pass),
                         .signal = 1});
      auto& source = sources_[static_cast<std::size_t>(r)];
      const std::int64_t count = bytes_(me, r, pass);
      source.resize(static_cast<std::size_t>(skew_ + count));
      for (std::int64_t i = 0; i < count; ++i)
        source[static_cast<std::size_t>(skew_ + i)] = content(me, r, pass, i);
    }
    t_.expect(expects);
    for (std::int32_t r = 0; r < n; ++r)
      t_.put({.peer = RankId(r), .channel = channel_, .source = {}, .signal = 0});
    num_puts_ += static_cast<std::uint64_t>(n);
    num_passes_ += 1;
  }
  Status wait_ready() {
    return t_.wait({.channel = channel_,
                    .signal = 0,
                    .value = num_passes_ * static_cast<std::uint64_t>(rank_.n()),
                    .phase = "ready"});
  }
  void put(std::int32_t to, int pass) {
    const auto& source = sources_[static_cast<std::size_t>(to)];
    t_.put({.peer = RankId(to),
            .channel = channel_,
            .window = 0,
            .offset_bytes = offset(rank_.me(), to, pass),
            .source = std::span(source).subspan(static_cast<std::size_t>(skew_)),
            .signal = 1});
    ++num_puts_;
  }
  Status end(int pass) {
    const std::uint64_t total = num_passes_ * static_cast<std::uint64_t>(rank_.n());
    if (Status s = t_.wait({.channel = channel_, .signal = 1, .value = total, .phase = "data"}); !s.ok())
      return s;
    EXPECT_EQ(t_.signal(channel_, 1), total);
    EXPECT_TRUE(t_.missing(channel_, 1).empty());
    if (Status s = t_.wait_for_puts(channel_, num_puts_); !s.ok()) return s;
    EXPECT_EQ(t_.puts_completed(channel_), num_puts_);
    check(pass);
    return {};
  }
  Status run(int pass) {
    begin(pass);
    if (Status s = wait_ready(); !s.ok()) return s;
    for (std::int32_t i = 0; i < rank_.n(); ++i) put((rank_.me() + i) % rank_.n(), pass);
    return end(pass);
  }

 private:
  void check(int pass) {
    const std::int32_t me = rank_.me();
    std::vector<std::byte> want(window_.size(), kPoison);
    for (std::int32_t s = 0; s < rank_.n(); ++s) {
      const std::int64_t from = offset(s, me, pass), count = bytes_(s, me, pass);
      for (std::int64_t i = 0; i < count; ++i)
        want[static_cast<std::size_t>(from + i)] = content(s, me, pass, i);
    }
    const auto [a, b] = std::mismatch(window_.begin(), window_.end(), want.begin());
    EXPECT_TRUE(a == window_.end()) << "rank " << me << " pass " << pass << ": byte " << a - window_.begin()
                                    << " of " << window_.size() << " is wrong";
  }

  Rank rank_;
  Transport& t_;
  std::uint32_t channel_;
  Size bytes_;
  std::int64_t gap_, skew_;
  std::vector<std::byte> window_;
  std::vector<std::vector<std::byte>> sources_;
  std::uint64_t num_puts_ = 0;
  std::uint64_t num_passes_ = 0;
};

inline void planned_offsets(Rank r) {
  // Sizes grow and shrink, so the window grows in pass 0, 1 and 3.
  AllToAll exchange(
      r, r.channel,
      [](std::int32_t s, std::int32_t d, int pass) {
        return std::int64_t{100} * ((pass * 7 + s * 3 + d * 5) % 11) + 8;
      },
      8);
  for (int pass = 0; pass < 6; ++pass) SLUICE_EXPECT_OK(exchange.run(pass));
}

inline void zero_length(Rank r) {
  AllToAll exchange(r, r.channel, [](auto, auto, auto) { return std::int64_t{0}; });
  for (int pass = 0; pass < 5; ++pass) SLUICE_EXPECT_OK(exchange.run(pass));
  // Some empty, some not.
  AllToAll mixed(
      r, r.channel + 1,
      [](std::int32_t s, std::int32_t d, int pass) { return std::int64_t{(s + d + pass) % 2 == 0 ? 0 : 33}; },
      3);
  for (int pass = 0; pass < 5; ++pass) SLUICE_EXPECT_OK(mixed.run(pass));
}

inline void own_rank(Rank r) {
  Transport& t = r.transport;
  std::vector<std::byte> window(4096, kPoison), source(4000);
  for (std::size_t i = 0; i < source.size(); ++i)
    source[i] = content(r.me(), r.me(), 0, static_cast<std::int64_t>(i));
  t.open_channel(r.channel, 1, 1);
  t.set_window(r.channel, 0, window);
  const Expect expect{.peer = t.rank(), .channel = r.channel, .window = 0, .offset_bytes = 96, .bytes = 4000};
  t.expect({&expect, 1});
  EXPECT_EQ(t.missing(r.channel, 0), std::vector<RankId>{t.rank()});
  t.put({.peer = t.rank(),
         .channel = r.channel,
         .window = 0,
         .offset_bytes = 96,
         .source = source,
         .signal = 0});
  SLUICE_EXPECT_OK(t.wait({.channel = r.channel, .signal = 0, .value = 1, .phase = "self"}));
  SLUICE_EXPECT_OK(t.wait_for_puts(r.channel, 1));
  EXPECT_EQ(std::memcmp(window.data() + 96, source.data(), 4000), 0);
  EXPECT_EQ(window[95], kPoison);
  t.set_window(r.channel, 0, {});
}

inline void unaligned(Rank r) {
  for (std::uint32_t skew = 1; skew < 8; skew += 2) {
    AllToAll exchange(
        r, r.channel + skew,
        [](std::int32_t s, std::int32_t d, int pass) {
          return std::int64_t{1 + (s * 31 + d * 17 + pass * 13) % 67};
        },
        skew, skew);
    for (int pass = 0; pass < 3; ++pass) SLUICE_EXPECT_OK(exchange.run(pass));
  }
}

inline void large(Rank r) {
  AllToAll exchange(
      r, r.channel,
      [&](std::int32_t s, std::int32_t d, int) {
        return (s + 1) % r.n() == d ? r.large_bytes + 5 : std::int64_t{0};
      },
      1);
  for (int pass = 0; pass < 2; ++pass) SLUICE_EXPECT_OK(exchange.run(pass));
}

// Where a transport has put memory, puts from it and from ordinary memory take turns and mean the same.
inline void put_memory(Rank r) {
  Transport& t = r.transport;
  const std::shared_ptr<PutMemory> memory = t.put_memory();
  if (!memory) return;
  EXPECT_EQ(memory->allocate(std::size_t{1} << 62), nullptr);
  constexpr std::int64_t kSizes[] = {1, 8193, 131072, 200007, (1 << 20) + 1, (3 << 20) + 5};
  constexpr std::int64_t kWindowBytes = (6 << 20);
  const std::int32_t to = (r.me() + 1) % r.n(), from = (r.me() + r.n() - 1) % r.n();
  t.open_channel(r.channel, 1, 1);
  std::vector<std::byte> window(kWindowBytes);
  t.set_window(r.channel, 0, window);
  std::uint64_t num_puts = 0;
  for (int pass = 0; pass < 3; ++pass) {
    std::fill(window.begin(), window.end(), kPoison);
    std::vector<std::pair<std::byte*, std::size_t>> sources;
    std::vector<std::vector<std::byte>> ordinary;
    std::vector<Expect> expects;
    std::int64_t at = pass;
    for (const std::int64_t bytes : kSizes) {
      const auto size = static_cast<std::size_t>(bytes);
      auto* source = static_cast<std::byte*>(memory->allocate(size + 3));
      ASSERT_NE(source, nullptr);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(source) % 64, 0u);
      for (std::size_t i = 0; i < size + 3; ++i)
        ASSERT_EQ(source[i], std::byte{0}) << "at " << i << " of " << size;
      sources.emplace_back(source, size + 3);
      ordinary.emplace_back(size);
      for (std::int64_t i = 0; i < bytes; ++i)
        source[3 + i] = ordinary.back()[static_cast<std::size_t>(i)] = content(r.me(), to, pass, i);
      for (int twice = 0; twice < 2 && at + bytes <= kWindowBytes; ++twice, at += bytes)
        expects.push_back({.peer = RankId(from), .channel = r.channel, .offset_bytes = at, .bytes = bytes});
    }
    t.expect(expects);
    SLUICE_EXPECT_OK(r.collectives.barrier("ready"));
    for (std::size_t e = 0, k = 0; k < sources.size(); ++k)
      for (int twice = 0; twice < 2 && e < expects.size() && expects[e].bytes == kSizes[k];
           ++twice, ++e, ++num_puts)
        t.put({.peer = RankId(to),
               .channel = r.channel,
               .offset_bytes = expects[e].offset_bytes,
               .source = twice == 0 ? std::span<const std::byte>(sources[k].first + 3, ordinary[k].size())
                                    : std::span<const std::byte>(ordinary[k])});
    SLUICE_EXPECT_OK(t.wait({.channel = r.channel, .signal = 0, .value = num_puts, .phase = "data"}));
    SLUICE_EXPECT_OK(t.wait_for_puts(r.channel, num_puts));
    std::int64_t end = pass;
    for (const Expect& e : expects) {
      end = e.offset_bytes + e.bytes;
      for (std::int64_t i = 0; i < e.bytes; ++i)
        ASSERT_EQ(window[static_cast<std::size_t>(e.offset_bytes + i)], content(from, r.me(), pass, i))
            << "byte " << i << " of " << e.bytes << ", pass " << pass;
    }
    EXPECT_TRUE(end == kWindowBytes || window[static_cast<std::size_t>(end)] == kPoison);
    // Freed in another order than taken: the next pass finds clean memory all the same.
    for (std::size_t k = 0; k < sources.size(); k += 2)
      memory->deallocate(sources[k].first, sources[k].second);
    for (std::size_t k = 1; k < sources.size(); k += 2)
      memory->deallocate(sources[k].first, sources[k].second);
  }
  t.set_window(r.channel, 0, {});
}

inline void thousands_in_flight(Rank r) {
  constexpr std::int64_t kPuts = 3000, kBytes = 48;
  constexpr std::uint32_t kSignals = 16;
  Transport& t = r.transport;
  const std::int64_t n = r.n();
  std::vector<std::byte> window(static_cast<std::size_t>(n * kPuts * kBytes), kPoison);
  std::vector<std::byte> source(static_cast<std::size_t>(kPuts * kBytes));
  t.open_channel(r.channel, 1, kSignals + 1);
  t.set_window(r.channel, 0, window);
  std::vector<Expect> expects;
  for (std::int32_t s = 0; s < n; ++s) {
    expects.push_back({.peer = RankId(s), .channel = r.channel, .signal = kSignals});
    for (std::int64_t i = 0; i < kPuts; ++i)
      expects.push_back({.peer = RankId(s),
                         .channel = r.channel,
                         .window = 0,
                         .offset_bytes = (s * kPuts + i) * kBytes,
                         .bytes = kBytes,
                         .signal = static_cast<std::uint32_t>(i % kSignals)});
  }
  t.expect(expects);
  for (std::int64_t i = 0; i < kPuts * kBytes; ++i)
    source[static_cast<std::size_t>(i)] = content(r.me(), 0, 0, i);
  for (std::int32_t d = 0; d < n; ++d)
    t.put({.peer = RankId(d), .channel = r.channel, .source = {}, .signal = kSignals});
  SLUICE_EXPECT_OK(t.wait(
      {.channel = r.channel, .signal = kSignals, .value = static_cast<std::uint64_t>(n), .phase = "ready"}));
  // Signals interleave in another order than expected; within a signal the order holds.
  for (std::int32_t d = 0; d < n; ++d) {
    for (std::uint32_t first = 0; first < kSignals; ++first) {
      for (std::int64_t i = first; i < kPuts; i += kSignals)
        t.put({.peer = RankId(d),
               .channel = r.channel,
               .window = 0,
               .offset_bytes = (r.me() * kPuts + i) * kBytes,
               .source = std::span(source).subspan(static_cast<std::size_t>(i * kBytes), kBytes),
               .signal = first});
    }
  }
  for (std::uint32_t s = 0; s < kSignals; ++s) {
    const std::int64_t per_rank = (kPuts - s + kSignals - 1) / kSignals;
    SLUICE_EXPECT_OK(t.wait({.channel = r.channel,
                             .signal = s,
                             .value = static_cast<std::uint64_t>(n * per_rank),
                             .phase = "data"}));
  }
  SLUICE_EXPECT_OK(t.wait_for_puts(r.channel, static_cast<std::uint64_t>(n * (kPuts + 1))));
  std::int64_t wrong = 0;
  for (std::int32_t s = 0; s < n; ++s)
    for (std::int64_t i = 0; i < kPuts * kBytes; ++i)
      wrong += window[static_cast<std::size_t>(s * kPuts * kBytes + i)] != content(s, 0, 0, i);
  EXPECT_EQ(wrong, 0);
  t.set_window(r.channel, 0, {});
}

inline void channels_interleaved(Rank r) {
  constexpr std::uint32_t kChannels = 4;
  std::vector<std::unique_ptr<AllToAll>> exchanges;
  for (std::uint32_t c = 0; c < kChannels; ++c)
    exchanges.push_back(std::make_unique<AllToAll>(
        r, r.channel + c,
        [c](std::int32_t s, std::int32_t d, int pass) {
          return std::int64_t{64 + 16 * c + s + 3 * d + 100 * pass};
        },
        4));
  for (int pass = 0; pass < 4; ++pass) {
    for (auto& e : exchanges) e->begin(pass);
    // Ready and data of the channels in opposite orders.
    for (auto& e : exchanges) SLUICE_EXPECT_OK(e->wait_ready());
    for (std::int32_t d = 0; d < r.n(); ++d)
      for (auto e = exchanges.rbegin(); e != exchanges.rend(); ++e) (*e)->put((r.me() + d) % r.n(), pass);
    for (auto& e : exchanges) SLUICE_EXPECT_OK(e->end(pass));
  }
}

// Only signals may come that early: data wait for the peer's ready.
inline void put_before_open(Rank r) {
  Transport& t = r.transport;
  const std::int32_t late = r.n() - 1;
  if (r.me() == late) {
    SLUICE_EXPECT_OK(r.collectives.barrier("early"));  // the others have put by now
    t.open_channel(r.channel, 0, 1);
    std::vector<Expect> expects;
    for (std::int32_t s = 0; s < late; ++s)
      for (int i = 0; i < 3; ++i) expects.push_back({.peer = RankId(s), .channel = r.channel, .signal = 0});
    t.expect(expects);
    SLUICE_EXPECT_OK(t.wait({.channel = r.channel,
                             .signal = 0,
                             .value = static_cast<std::uint64_t>(3 * late),
                             .phase = "early"}));
  } else {
    t.open_channel(r.channel, 0, 1);
    for (int i = 0; i < 3; ++i)
      t.put({.peer = RankId(late), .channel = r.channel, .source = {}, .signal = 0});
    SLUICE_EXPECT_OK(r.collectives.barrier("early"));
    SLUICE_EXPECT_OK(t.wait_for_puts(r.channel, 3));
  }
  // A channel may grow while it is in use.
  t.open_channel(r.channel, 1, 2);
  t.open_channel(r.channel, 0, 1);
  EXPECT_EQ(t.signal(r.channel, 1), 0u);
}

template <typename Call>
ErrorCode code_of(Call call) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_FALSE(e.message().empty());
    return e.code();
  }
  return ErrorCode::kOk;
}

inline void misuse(Rank r) {
  Transport& t = r.transport;
  std::vector<std::byte> window(100);
  const auto expect = [&](Expect e) {
    e.channel = r.channel;
    t.expect({&e, 1});
  };
  EXPECT_EQ(code_of([&] { expect({.peer = RankId(0)}); }), ErrorCode::kInvalidState);
  EXPECT_EQ(code_of([&] { (void)t.signal(r.channel, 0); }), ErrorCode::kInvalidState);
  EXPECT_EQ(code_of([&] { t.put({.peer = RankId(0), .channel = r.channel, .source = {}}); }),
            ErrorCode::kInvalidState);
  t.open_channel(r.channel, 1, 1);
  t.set_window(r.channel, 0, window);
  const auto bad = ErrorCode::kInvalidArgument;
  EXPECT_EQ(code_of([&] { expect({.peer = RankId(0), .offset_bytes = 1, .bytes = 100}); }), bad);
  EXPECT_EQ(code_of([&] { expect({.peer = RankId(0), .offset_bytes = -1, .bytes = 10}); }), bad);
  EXPECT_EQ(code_of([&] { expect({.peer = RankId(0), .offset_bytes = 0, .bytes = -1}); }), bad);
  EXPECT_EQ(
      code_of([&] {
        expect({.peer = RankId(0), .offset_bytes = std::numeric_limits<std::int64_t>::max(), .bytes = 10});
      }),
      bad);
  EXPECT_EQ(code_of([&] { expect({.peer = RankId(r.n())}); }), bad);
  EXPECT_EQ(code_of([&] { expect({.peer = RankId()}); }), bad);
  EXPECT_EQ(code_of([&] { expect({.peer = RankId(0), .window = 1, .bytes = 1}); }), bad);
  EXPECT_EQ(code_of([&] { expect({.peer = RankId(0), .signal = 1}); }), bad);
  EXPECT_EQ(code_of([&] { t.put({.peer = RankId(r.n()), .channel = r.channel, .source = {}}); }), bad);
  EXPECT_EQ(code_of([&] { t.set_window(r.channel, 1, window); }), bad);
  EXPECT_EQ(code_of([&] { t.set_timeout(std::chrono::seconds(0)); }), bad);
  EXPECT_TRUE(t.missing(r.channel, 0).empty());
  t.set_window(r.channel, 0, {});
}

inline void signals_are_monotonic(Rank r) {
  Transport& t = r.transport;
  constexpr int kPasses = 20;
  AllToAll exchange(r, r.channel,
                    [](std::int32_t, std::int32_t, int pass) { return std::int64_t{1 + pass}; });
  std::uint64_t last[2] = {0, 0};
  const auto look = [&] {
    for (std::uint32_t s = 0; s < 2; ++s) {
      const std::uint64_t now = t.signal(r.channel, s);
      EXPECT_GE(now, last[s]);
      last[s] = now;
    }
  };
  for (int pass = 0; pass < kPasses; ++pass) {
    exchange.begin(pass);
    look();
    SLUICE_EXPECT_OK(exchange.wait_ready());
    for (std::int32_t d = 0; d < r.n(); ++d) {
      exchange.put(d, pass);
      t.progress();
      look();
    }
    SLUICE_EXPECT_OK(exchange.end(pass));
    look();
    EXPECT_EQ(last[1], static_cast<std::uint64_t>((pass + 1) * r.n()));
  }
}

inline void missing_names_the_peers(Rank r) {
  Transport& t = r.transport;
  t.open_channel(r.channel, 0, 1);
  std::vector<Expect> expects;
  std::vector<RankId> others;
  // Descending and twice each: missing() is ascending, each once.
  for (int twice = 0; twice < 2; ++twice)
    for (std::int32_t s = r.n() - 1; s >= 0; --s)
      if (s != r.me()) expects.push_back({.peer = RankId(s), .channel = r.channel, .signal = 0});
  for (std::int32_t s = 0; s < r.n(); ++s)
    if (s != r.me()) others.push_back(RankId(s));
  t.expect(expects);
  EXPECT_EQ(t.missing(r.channel, 0), others);  // nobody has put yet: see the barrier
  SLUICE_EXPECT_OK(r.collectives.barrier("looked"));
  for (const RankId d : others)
    for (int i = 0; i < 2; ++i) t.put({.peer = d, .channel = r.channel, .source = {}, .signal = 0});
  SLUICE_EXPECT_OK(
      t.wait({.channel = r.channel, .signal = 0, .value = 2 * others.size(), .phase = "missing"}));
  EXPECT_TRUE(t.missing(r.channel, 0).empty());
  SLUICE_EXPECT_OK(t.wait_for_puts(r.channel, 2 * others.size()));
}

inline void caps_are_honest(Rank r) {
  Transport& t = r.transport;
  const Caps caps = t.caps();
  EXPECT_FALSE(t.name().empty());
  EXPECT_GE(caps.max_in_flight, 0);
  EXPECT_FALSE(caps.device_initiated && !caps.device_memory);
  EXPECT_EQ(t.num_ranks(), t.topology().num_ranks());
  for (std::int32_t p = 0; p < r.n(); ++p) {
    const Perf perf = t.perf(RankId(p));
    EXPECT_GE(perf.latency.count(), 0);
    EXPECT_GE(perf.bytes_per_s, 0);
    if (perf.emulated) {
      EXPECT_TRUE(t.topology().link(t.rank(), RankId(p)).limited());
      EXPECT_EQ(perf.bytes_per_s, t.topology().link(t.rank(), RankId(p)).bytes_per_s);
    }
  }
  EXPECT_FALSE(t.perf(t.rank()).emulated);
  EXPECT_EQ(code_of([&] { (void)t.perf(RankId(r.n())); }), ErrorCode::kInvalidArgument);
  if (!caps.one_sided) return;
  // One-sided: a put lands although its peer neither expects it nor calls anything but signal().
  t.open_channel(r.channel, 1, 1);
  std::vector<std::byte> window(64, kPoison), source(64, std::byte(r.me()));
  t.set_window(r.channel, 0, window);
  SLUICE_EXPECT_OK(r.collectives.barrier("windows"));
  const RankId next((r.me() + 1) % r.n());
  t.put({.peer = next, .channel = r.channel, .window = 0, .offset_bytes = 0, .source = source, .signal = 0});
  const auto deadline = Clock::now() + std::chrono::seconds(10);
  while (t.signal(r.channel, 0) == 0 && Clock::now() < deadline) std::this_thread::yield();
  EXPECT_EQ(t.signal(r.channel, 0), 1u);
  EXPECT_EQ(window[63], std::byte((r.me() + r.n() - 1) % r.n()));
  SLUICE_EXPECT_OK(t.wait_for_puts(r.channel, 1));
  t.set_window(r.channel, 0, {});
}

// Random sizes, chunked into several puts a message, signals per chunk, many passes; equal on all ranks by
// the seed.
inline void random_traffic(Rank r) {
  constexpr std::uint32_t kSeed = 20240611;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  std::vector<std::vector<std::vector<std::int64_t>>> sizes(30);
  for (auto& pass : sizes) {
    pass.assign(static_cast<std::size_t>(r.n()), std::vector<std::int64_t>(static_cast<std::size_t>(r.n())));
    for (auto& row : pass)
      for (auto& size : row) size = random() % 3 == 0 ? 0 : static_cast<std::int64_t>(random() % 20000);
  }
  AllToAll exchange(
      r, r.channel,
      [&](std::int32_t s, std::int32_t d, int pass) {
        return sizes[static_cast<std::size_t>(pass)][static_cast<std::size_t>(s)]
                    [static_cast<std::size_t>(d)];
      },
      2, 3);
  for (int pass = 0; pass < 30; ++pass) SLUICE_EXPECT_OK(exchange.run(pass));
}

// Values whose sum depends on the order of the additions.
template <typename T>
T term(std::int32_t rank, std::size_t i) {
  std::uint64_t z =
      (i + 1) * 0x9e3779b97f4a7c15ull + static_cast<std::uint64_t>(rank) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 30)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  const double mantissa = static_cast<double>(z >> 32) / 4294967296.0 - 0.5;
  return static_cast<T>(std::ldexp(mantissa, static_cast<int>(z % 40) - 20));
}

template <typename T>
void check_sum(Rank r, std::size_t count) {
  std::vector<T> data(count), want(count);
  for (std::size_t i = 0; i < count; ++i) {
    data[i] = term<T>(r.me(), i);
    want[i] = term<T>(0, i);
    for (std::int32_t s = 1; s < r.n(); ++s) want[i] = want[i] + term<T>(s, i);
  }
  SLUICE_EXPECT_OK(r.collectives.all_reduce_sum(std::span(data), "sum"));
  EXPECT_TRUE(count == 0 || std::memcmp(data.data(), want.data(), count * sizeof(T)) == 0)
      << "all_reduce_sum of " << count;
}

inline void collectives(Rank r) {
  Collectives& c = r.collectives;
  const auto n = static_cast<std::size_t>(r.n());
  const auto me = static_cast<std::size_t>(r.me());
  constexpr std::int64_t kUnset = std::numeric_limits<std::int64_t>::min();
  // 300 integers do not fit a slot, so both ways of a message are taken, in turn.
  for (const std::size_t k : {1, 0, 7, 300, 1, 256, 257, 3}) {
    SLUICE_EXPECT_OK(c.barrier("start"));
    std::vector<std::int64_t> mine(k), all(n * k, kUnset);
    for (std::size_t i = 0; i < k; ++i) mine[i] = static_cast<std::int64_t>(me * 1000 + i);
    SLUICE_EXPECT_OK(c.all_gather(mine, all, "gather"));
    for (std::size_t s = 0; s < n; ++s)
      for (std::size_t i = 0; i < k; ++i) EXPECT_EQ(all[s * k + i], static_cast<std::int64_t>(s * 1000 + i));
    std::vector<std::int64_t> send(n * k), receive(n * k, kUnset);
    for (std::size_t d = 0; d < n; ++d)
      for (std::size_t i = 0; i < k; ++i)
        send[d * k + i] = static_cast<std::int64_t>(me * 1000000 + d * 1000 + i);
    SLUICE_EXPECT_OK(c.all_to_all(send, receive, "counts"));
    for (std::size_t s = 0; s < n; ++s)
      for (std::size_t i = 0; i < k; ++i)
        EXPECT_EQ(receive[s * k + i], static_cast<std::int64_t>(s * 1000000 + me * 1000 + i));
  }
  // Ragged bytes: empty, small, larger than a slot.
  const auto bytes_of = [&](std::size_t s, std::size_t d, std::size_t round) {
    return (s * 7 + d * 13 + round) % 3 == 0 ? 0 : (s * 977 + d * 1231 + round * 411) % 9000;
  };
  for (std::size_t round = 0; round < 8; ++round) {
    std::vector<std::vector<std::byte>> out(n), in(n);
    std::vector<std::span<const std::byte>> sends(n);
    std::vector<std::span<std::byte>> receives(n);
    for (std::size_t p = 0; p < n; ++p) {
      out[p].resize(bytes_of(me, p, round));
      in[p].assign(bytes_of(p, me, round), kPoison);
      for (std::size_t i = 0; i < out[p].size(); ++i)
        out[p][i] = content(r.me(), static_cast<std::int32_t>(p), static_cast<int>(round),
                            static_cast<std::int64_t>(i));
      sends[p] = out[p];
      receives[p] = in[p];
    }
    SLUICE_EXPECT_OK(c.all_to_all_v(sends, receives, "bytes"));
    for (std::size_t p = 0; p < n; ++p)
      for (std::size_t i = 0; i < in[p].size(); ++i)
        if (in[p][i] != content(static_cast<std::int32_t>(p), r.me(), static_cast<int>(round),
                                static_cast<std::int64_t>(i))) {
          ADD_FAILURE() << "round " << round << " from " << p << " byte " << i;
          break;
        }
  }
  for (std::int32_t root = 0; root < r.n(); ++root) {
    for (const std::size_t size : {0, 5, 2048, 2049, 100001}) {
      std::vector<std::byte> data(size, kPoison);
      if (root == r.me())
        for (std::size_t i = 0; i < size; ++i) data[i] = content(root, 0, 1, static_cast<std::int64_t>(i));
      SLUICE_EXPECT_OK(c.broadcast(data, RankId(root), "broadcast"));
      for (std::size_t i = 0; i < size; ++i) {
        if (data[i] == content(root, 0, 1, static_cast<std::int64_t>(i))) continue;
        ADD_FAILURE() << "broadcast from " << root << " byte " << i;
        break;
      }
    }
  }
  for (const std::size_t count :
       {std::size_t{0}, std::size_t{1}, n, 3 * n + 1, std::size_t{1000}, std::size_t{20011}}) {
    check_sum<float>(r, count);
    check_sum<double>(r, count);
  }
  EXPECT_EQ(code_of([&] { (void)c.broadcast({}, RankId(r.n()), "bad"); }), ErrorCode::kInvalidArgument);
  std::vector<std::int64_t> one(1);
  EXPECT_EQ(code_of([&] { (void)c.all_gather(one, {}, "bad"); }), ErrorCode::kInvalidArgument);
}

// More than a block of all_reduce_sum (16 MiB), so that slices of several blocks meet.
inline void collectives_in_blocks(Rank r) {
  constexpr std::size_t kCount = (std::size_t{16} << 20) / sizeof(float) + 12345;
  std::vector<float> data(kCount);
  for (std::size_t i = 0; i < kCount; ++i)
    data[i] = std::ldexp(static_cast<float>(i % 977) + 0.37f, (r.me() * 11 + static_cast<int>(i % 13)) % 29);
  SLUICE_EXPECT_OK(r.collectives.all_reduce_sum(std::span(data), "sum"));
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < kCount; ++i) {
    float want = 0;
    for (std::int32_t s = 0; s < r.n(); ++s) {
      const float x =
          std::ldexp(static_cast<float>(i % 977) + 0.37f, (s * 11 + static_cast<int>(i % 13)) % 29);
      want = s == 0 ? x : want + x;
    }
    wrong += !(data[i] == want);
  }
  EXPECT_EQ(wrong, 0u);
}

inline constexpr Case kCases[] = {
    {"planned_offsets", planned_offsets},
    {"zero_length", zero_length},
    {"own_rank", own_rank},
    {"unaligned", unaligned},
    {"large", large},
    {"put_memory", put_memory},
    {"thousands_in_flight", thousands_in_flight},
    {"channels_interleaved", channels_interleaved},
    {"put_before_open", put_before_open},
    {"misuse", misuse},
    {"signals_are_monotonic", signals_are_monotonic},
    {"missing_names_the_peers", missing_names_the_peers},
    {"caps_are_honest", caps_are_honest},
    {"random_traffic", random_traffic},
    {"collectives", collectives},
    {"collectives_in_blocks", collectives_in_blocks},
};

inline std::uint32_t first_channel(const Case& c) {
  return kChannelsPerCase * static_cast<std::uint32_t>(&c - kCases + 1);
}

}  // namespace sluice::comm::conformance
