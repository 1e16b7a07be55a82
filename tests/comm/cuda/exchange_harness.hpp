// A rank of a group that exchanges random rows: routing that every rank can draw for every rank, plans on the device, and
// the expected results in the order of the reduction tree (docs/design.md), computed on the CPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "../../kernels/cuda/device_test_util.hpp"
#include "../../support/gpu_ranks.hpp"
#include "sluice/comm/cuda/nccl_library.hpp"
#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/kernels/cuda/routing.hpp"

namespace sluice::comm::cuda {

using kernels::cuda::DeviceArray;

inline std::uint16_t to_bf16(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return 0x7FC0;
  bits += 0x7FFF + (bits >> 16 & 1);
  return static_cast<std::uint16_t>(bits >> 16);
}
inline float from_bf16(std::uint16_t b) {
  const std::uint32_t bits = static_cast<std::uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Routing of one rank's tokens.
struct HostRouting {
  std::vector<std::int64_t> row_ptr{0};
  std::vector<std::int32_t> expert;
  std::vector<float> weight;
  std::int64_t tokens() const { return static_cast<std::int64_t>(row_ptr.size()) - 1; }
};
enum class Draw { kRagged, kEmpty, kOneExpert, kTopK };
inline HostRouting draw_routing(std::mt19937& random, std::int64_t tokens, int experts, Draw draw,
                                int top_k = 2) {
  HostRouting r;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::set<std::int32_t> chosen;
    if (draw == Draw::kOneExpert) chosen.insert(experts - 1);
    if (draw == Draw::kRagged)
      for (int i = static_cast<int>(random() % 6); i > 0; --i)
        chosen.insert(static_cast<std::int32_t>(random() % static_cast<unsigned>(experts)));
    while (draw == Draw::kTopK && static_cast<int>(chosen.size()) < top_k)
      chosen.insert(static_cast<std::int32_t>(random() % static_cast<unsigned>(experts)));
    for (const std::int32_t e : chosen) {
      r.expert.push_back(e);
      r.weight.push_back(static_cast<float>(random() % 1000) / 512.0f - 0.5f);
    }
    r.row_ptr.push_back(static_cast<std::int64_t>(r.expert.size()));
  }
  return r;
}
// Small integers: every sum of them is exact, in any order. Or any values.
inline std::vector<std::uint16_t> draw_rows(std::mt19937& random, std::int64_t rows, std::int64_t hidden,
                                            bool integers) {
  std::vector<std::uint16_t> x(static_cast<std::size_t>(rows * hidden));
  for (auto& v : x)
    v = to_bf16(integers ? static_cast<float>(static_cast<int>(random() % 7) - 3)
                         : static_cast<float>(static_cast<int>(random() % 20001) - 10000) / 4096.0f);
  return x;
}
// What expert e makes of a value.
inline std::uint16_t expert_value(int e, std::uint16_t v) {
  return to_bf16(from_bf16(v) * static_cast<float>(e % 3 + 1) + static_cast<float>(e % 5));
}

struct Batch {
  std::vector<HostRouting> routing;           // of every rank
  std::vector<std::vector<std::uint16_t>> x;  // of every rank
};

// One rank's side of one channel: its plan, its buffers. bf16 rows.
class Endpoint {
 public:
  Endpoint(RowExchange& exchange, int channel, int experts)
      : exchange_(exchange),
        channel_(channel),
        experts_(experts),
        shape_(exchange.shape()),
        ranks_(exchange.num_ranks()),
        slots_((experts + ranks_ - 1) / ranks_),
        row_ptr_(n(shape_.max_tokens + 1), 0),
        expert_(n(shape_.max_routes), 0),
        weight_(n(shape_.max_routes), 0.0f),
        x_(n(shape_.max_tokens * shape_.hidden), 0),
        y_(n(shape_.max_tokens * shape_.hidden), 0),
        rows_(n(shape_.max_routes * shape_.hidden), 0),
        expert_ptr_(n(experts + 1), 0),
        rank_ptr_(n(ranks_ + 1), 0),
        rank_route_ptr_(n(ranks_ + 1), 0),
        send_route_ptr_(n(shape_.max_tokens * ranks_ + 1), 0),
        home_ptr_(n(shape_.max_tokens + 1), 0),
        send_row_(n(shape_.max_tokens * ranks_), 0),
        send_route_(n(shape_.max_routes), 0),
        send_slot_(n(shape_.max_routes), 0),
        home_position_(n(shape_.max_tokens * ranks_), 0),
        send_weight_(n(shape_.max_routes), 0.0f),
        local_ptr_(n(slots_ + 1), 0),
        local_rank_ptr_(2, 0),
        position_(n(shape_.max_routes), 0),
        tile_flags_(n(shape_.max_routes / 16 + 1), 7),
        values_(n(shape_.max_routes), 0.0f),
        value_of_route_(n(shape_.max_routes), 0.0f),
        partial_(n(shape_.max_received * shape_.hidden), 0),
        scratch_(std::max(kernels::cuda::plan_scratch_bytes(shape_.max_tokens, experts, ranks_),
                          kernels::cuda::plan_scratch_bytes(shape_.max_received, slots_, 1)),
                 0),
        rank_of_(placement(false)),
        slot_of_(placement(true)),
        local_rank_of_(std::vector<std::int32_t>(n(slots_), 0)),
        local_slot_of_(identity(slots_)) {
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  }
  ~Endpoint() { cudaStreamDestroy(stream); }

  int rank_of(int e) const { return e % ranks_; }
  int num_slots() const { return slots_; }

  void put(const HostRouting& routing, const std::vector<std::uint16_t>& x) {
    tokens_ = routing.tokens();
    auto padded = routing.row_ptr;
    padded.resize(n(shape_.max_tokens + 1), routing.row_ptr.back());
    row_ptr_.put(padded);
    expert_.put(routing.expert);
    weight_.put(routing.weight);
    x_.put(x);
    routes_ = static_cast<std::int64_t>(routing.expert.size());
  }
  void poison_y() { y_.put(std::vector<std::uint16_t>(n(shape_.max_tokens * shape_.hidden), 0x7FFF)); }
  void poison() {
    poison_y();
    rows_.put(std::vector<std::uint16_t>(n(shape_.max_routes * shape_.hidden), 0x7FFF));
  }
  void plan() {
    using namespace kernels::cuda;
    const PlanBuffers buffers{expert_ptr_.data(),
                              nullptr,
                              nullptr,
                              nullptr,
                              rank_ptr_.data(),
                              rank_route_ptr_.data(),
                              send_row_.data(),
                              send_route_ptr_.data(),
                              send_route_.data(),
                              send_slot_.data(),
                              send_weight_.data(),
                              home_ptr_.data(),
                              home_position_.data()};
    build_plan({row_ptr_.data(), expert_.data(), weight_.data()}, tokens_,
               {rank_of_.data(), slot_of_.data(), experts_, ranks_}, buffers, scratch_.data(), stream);
    exchange_.exchange_plan(channel_, send_plan(), stream);
    const ReceiveList list = exchange_.receive_list(channel_);
    const PlanBuffers local{local_ptr_.data(), position_.data(), nullptr, nullptr, local_rank_ptr_.data()};
    build_plan({list.route_ptr, list.slot, list.weight}, shape_.max_received,
               {local_rank_of_.data(), local_slot_of_.data(), slots_, 1}, local, scratch_.data(), stream);
  }
  SendPlan send_plan() {
    return {rank_ptr_.data(),  send_row_.data(),    send_route_ptr_.data(), send_route_.data(),
            send_slot_.data(), send_weight_.data(), home_ptr_.data(),       home_position_.data()};
  }
  ExpertRows expert_rows(bool tiles) {
    ExpertRows rows{rows_.data(), shape_.hidden, position_.data(), {}};
    if (tiles) rows.tiles = {tile_flags_.data(), 16};
    return rows;
  }
  void dispatch(const MoverOptions& options, bool tiles = false) {
    exchange_.dispatch(channel_, send_plan(), x_.data(), shape_.hidden, expert_rows(tiles), options, stream);
  }
  // Rows of others in the receive list only.
  void dispatch_compact(const MoverOptions& options) {
    exchange_.dispatch(channel_, send_plan(), x_.data(), shape_.hidden, {}, options, stream);
  }
  void dispatch_by_copy(const RowExchange::HostCounts& counts) {
    exchange_.dispatch_by_copy(channel_, send_plan(), counts, x_.data(), shape_.hidden, {1, 0, 3}, stream);
  }
  MoverChoice dispatch_by_choice(const RowExchange::HostCounts* counts, int max_sms) {
    return exchange_.dispatch_by_choice(channel_, send_plan(), counts, x_.data(), shape_.hidden, max_sms,
                                        stream);
  }
  // `results`: one row a receive list entry.
  MoverChoice combine_by_choice(const RowExchange::HostCounts* counts, const void* results, int max_sms) {
    return exchange_.combine_by_choice(channel_, send_plan(), counts,
                                       {results, shape_.hidden, nullptr, false}, y_.data(), shape_.hidden,
                                       tokens_, max_sms, stream);
  }
  CombineSource outputs(bool weighted = true) {
    return {rows_.data(), shape_.hidden, position_.data(), weighted};
  }
  void combine(const MoverOptions& options) {
    exchange_.combine(channel_, send_plan(), outputs(), y_.data(), shape_.hidden, tokens_, options, stream);
  }
  // Of the rows that put_results() has put where peers read them.
  void combine_by_pull(int sms) {
    exchange_.combine_by_pull(channel_, send_plan(), y_.data(), shape_.hidden, tokens_, sms, stream);
  }
  void sync() { exchange_.wait(channel_, stream); }

  // ---- results where peers read them ------------------------------------------------------------------------------
  void put_results(const std::vector<std::uint16_t>& values) {
    void* place = exchange_.result_rows(channel_, stream);
    EXPECT_EQ(cudaMemcpyAsync(place, values.data(), values.size() * 2, cudaMemcpyHostToDevice, stream),
              cudaSuccess);
    sync();
  }
  // One row a receive list entry: this rank's experts' sum, rounded; poison behind the last.
  std::vector<std::uint16_t> reduced_rows(const Batch& batch) const {
    std::vector<std::uint16_t> rows(n(shape_.max_received * shape_.hidden), 0x7FFF);
    const auto list = expected_list(batch);
    for (std::size_t row = 0; row < list.size(); ++row)
      for (std::int64_t h = 0; h < shape_.hidden; ++h)
        rows[row * n(shape_.hidden) + n(h)] =
            to_bf16(partial_of(batch, list[row].first, list[row].second, exchange_.rank(), h).value);
    return rows;
  }
  // Nobody has written where peers read.
  void expect_results(const std::vector<std::uint16_t>& want) {
    std::vector<std::uint16_t> got(want.size());
    const void* place = exchange_.result_rows(channel_, stream);
    EXPECT_EQ(cudaMemcpyAsync(got.data(), place, got.size() * 2, cudaMemcpyDeviceToHost, stream),
              cudaSuccess);
    sync();
    ASSERT_EQ(got, want);
  }

  // ---- what should be there -------------------------------------------------------------------------------------
  // The receive list: (source, token) of every row.
  std::vector<std::pair<int, std::int64_t>> expected_list(const Batch& batch) const {
    std::vector<std::pair<int, std::int64_t>> list;
    for (int s = 0; s < ranks_; ++s) {
      const HostRouting& r = batch.routing[n(s)];
      for (std::int64_t t = 0; t < r.tokens(); ++t) {
        bool here = false;
        for (std::int64_t i = r.row_ptr[n(t)]; i < r.row_ptr[n(t + 1)]; ++i)
          here = here || rank_of(r.expert[n(i)]) == exchange_.rank();
        if (here) list.emplace_back(s, t);
      }
    }
    return list;
  }
  // (source, token) of every expert row, with its expert.
  struct ExpertRow {
    int expert, source;
    std::int64_t token;
  };
  std::vector<ExpertRow> expected_expert_rows(const Batch& batch) const {
    std::vector<ExpertRow> rows;
    for (int e = exchange_.rank(); e < experts_; e += ranks_)
      for (int s = 0; s < ranks_; ++s) {
        const HostRouting& r = batch.routing[n(s)];
        for (std::int64_t t = 0; t < r.tokens(); ++t)
          for (std::int64_t i = r.row_ptr[n(t)]; i < r.row_ptr[n(t + 1)]; ++i)
            if (r.expert[n(i)] == e) rows.push_back({e, s, t});
      }
    return rows;
  }
  void expect_received(const Batch& batch) const {
    const auto list = expected_list(batch);
    std::vector<std::uint16_t> got(n(shape_.max_received * shape_.hidden));
    cudaMemcpy(got.data(), exchange_.received(channel_), got.size() * 2, cudaMemcpyDeviceToHost);
    for (std::size_t row = 0; row < list.size(); ++row) {
      const auto [s, t] = list[row];
      if (s == exchange_.rank()) continue;
      ASSERT_EQ(std::memcmp(&got[row * n(shape_.hidden)], &batch.x[n(s)][n(t * shape_.hidden)],
                            n(shape_.hidden) * 2),
                0)
          << "receive row " << row << " (token " << t << " of rank " << s << ")";
    }
  }
  void expect_expert_rows(const Batch& batch) const {
    const auto rows = expected_expert_rows(batch);
    const auto got = rows_.get();
    for (std::size_t p = 0; p < rows.size(); ++p)
      ASSERT_EQ(
          std::memcmp(&got[p * n(shape_.hidden)],
                      &batch.x[n(rows[p].source)][n(rows[p].token * shape_.hidden)], n(shape_.hidden) * 2),
          0)
          << "expert row " << p << " (token " << rows[p].token << " of rank " << rows[p].source << ")";
    for (std::size_t i = rows.size() * n(shape_.hidden); i < got.size(); ++i)
      ASSERT_EQ(got[i], 0x7FFF) << "written past the last expert row, at " << i;
  }
  void expect_tiles(const Batch& batch) const {
    const std::size_t rows = expected_expert_rows(batch).size();
    const auto flags = tile_flags_.get();
    for (std::size_t tile = 0; tile < flags.size() - 1; ++tile)
      ASSERT_EQ(flags[tile], tile * 16 < rows ? 1u : 0u) << "tile " << tile << " of " << rows << " rows";
  }
  // The experts, on the host: expert rows become expert outputs.
  void compute(const Batch& batch) {
    const auto rows = expected_expert_rows(batch);
    auto values = rows_.get();
    for (std::size_t p = 0; p < rows.size(); ++p)
      for (std::size_t h = 0; h < n(shape_.hidden); ++h)
        values[p * n(shape_.hidden) + h] = expert_value(rows[p].expert, values[p * n(shape_.hidden) + h]);
    rows_.put(values);
  }
  // What rank d's experts make of a value, before it is rounded.
  struct Partial {
    float value = 0;
    bool any = false;
  };
  Partial partial_of(const Batch& batch, int source, std::int64_t t, int d, std::int64_t h) const {
    const HostRouting& r = batch.routing[n(source)];
    Partial partial;
    for (std::int64_t i = r.row_ptr[n(t)]; i < r.row_ptr[n(t + 1)]; ++i) {
      const int e = r.expert[n(i)];
      if (rank_of(e) != d) continue;
      const float value =
          r.weight[n(i)] * from_bf16(expert_value(e, batch.x[n(source)][n(t * shape_.hidden + h)]));
      partial.value = partial.any ? partial.value + value : value;
      partial.any = true;
    }
    return partial;
  }
  // y in the order of the tree.
  std::vector<std::uint16_t> expected_y(const Batch& batch) const {
    const HostRouting& r = batch.routing[n(exchange_.rank())];
    std::vector<std::uint16_t> y(n(r.tokens() * shape_.hidden), 0);
    for (std::int64_t t = 0; t < r.tokens(); ++t)
      for (std::int64_t h = 0; h < shape_.hidden; ++h) {
        float sum = 0;
        bool first_rank = true;
        for (int d = 0; d < ranks_; ++d) {
          const Partial partial = partial_of(batch, exchange_.rank(), t, d, h);
          if (!partial.any) continue;
          const float rounded = from_bf16(to_bf16(partial.value));
          sum = first_rank ? rounded : sum + rounded;
          first_rank = false;
        }
        y[n(t * shape_.hidden + h)] = to_bf16(sum);
      }
    return y;
  }
  std::vector<std::uint16_t> y() const { return y_.get(); }
  void expect_y(const Batch& batch) const {
    const auto want = expected_y(batch);
    const auto got = y_.get();
    for (std::size_t i = 0; i < want.size(); ++i)
      ASSERT_EQ(got[i], want[i]) << "token " << i / n(shape_.hidden) << " column " << i % n(shape_.hidden)
                                 << ": " << from_bf16(got[i]) << " for " << from_bf16(want[i]);
    for (std::size_t i = want.size(); i < got.size(); ++i)
      ASSERT_EQ(got[i], 0x7FFF) << "written past the last token, at " << i;
  }

  DeviceArray<std::uint16_t>& partial() { return partial_; }
  DeviceArray<float>& values() { return values_; }
  DeviceArray<float>& value_of_route() { return value_of_route_; }
  DeviceArray<std::int32_t>& position() { return position_; }
  DeviceArray<std::uint16_t>& y_array() { return y_; }
  DeviceArray<std::uint16_t>& rows() { return rows_; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t routes() const { return routes_; }
  template <typename T>
  static std::size_t n(T value) {
    return static_cast<std::size_t>(value);
  }

  cudaStream_t stream = nullptr;

 private:
  std::vector<std::int32_t> placement(bool slots) const {
    std::vector<std::int32_t> of;
    for (int e = 0; e < experts_; ++e) of.push_back(slots ? e / ranks_ : e % ranks_);
    return of;
  }
  static std::vector<std::int32_t> identity(int count) {
    std::vector<std::int32_t> of;
    for (int i = 0; i < count; ++i) of.push_back(i);
    return of;
  }

  RowExchange& exchange_;
  const int channel_, experts_;
  const ExchangeShape& shape_;
  const int ranks_, slots_;
  std::int64_t tokens_ = 0, routes_ = 0;
  DeviceArray<std::int64_t> row_ptr_;
  DeviceArray<std::int32_t> expert_;
  DeviceArray<float> weight_;
  DeviceArray<std::uint16_t> x_, y_, rows_;
  DeviceArray<std::int64_t> expert_ptr_, rank_ptr_, rank_route_ptr_, send_route_ptr_, home_ptr_;
  DeviceArray<std::int32_t> send_row_, send_route_, send_slot_, home_position_;
  DeviceArray<float> send_weight_;
  DeviceArray<std::int64_t> local_ptr_, local_rank_ptr_;
  DeviceArray<std::int32_t> position_;
  DeviceArray<std::uint32_t> tile_flags_;
  DeviceArray<float> values_, value_of_route_;
  DeviceArray<std::uint16_t> partial_;
  DeviceArray<unsigned char> scratch_;
  DeviceArray<std::int32_t> rank_of_, slot_of_, local_rank_of_, local_slot_of_;
};

// All ranks draw all ranks' data from the same seed.
inline Batch draw_batch(unsigned seed, int ranks, std::int64_t max_tokens, std::int64_t hidden, int experts,
                        bool integers) {
  std::mt19937 random(seed);
  Batch batch;
  for (int r = 0; r < ranks; ++r) {
    const unsigned kind = random() % 8;
    const std::int64_t tokens =
        kind == 0 ? 0 : static_cast<std::int64_t>(random() % static_cast<unsigned>(max_tokens + 1));
    const Draw draw = kind == 1   ? Draw::kEmpty
                      : kind == 2 ? Draw::kOneExpert
                      : kind < 5  ? Draw::kTopK
                                  : Draw::kRagged;
    batch.routing.push_back(draw_routing(random, tokens, experts, draw));
    batch.x.push_back(draw_rows(random, tokens, hidden, integers));
    if (integers)
      for (float& w : batch.routing.back().weight) w = static_cast<float>(static_cast<int>(random() % 3) + 1);
  }
  return batch;
}

}  // namespace sluice::comm::cuda
