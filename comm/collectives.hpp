// Small and blocking exchanges of all ranks over a Transport's channel 0: counts, agreement, start and end,
// and the fixed-order sum of replicated gradients.
//
// All ranks call the same operations in the same order with fitting sizes; one object serves one transport,
// and nothing else uses channel 0. Buffers belong to the caller and may be reused as soon as a call returns
// ok. After an error the group has ended and the buffers hold nothing of use. Thread-safety: that of the
// transport, one thread at a time. Every call blocks, with the transport's deadline; `phase` (static storage)
// is what its errors call it. Allocates only when sizes grow.
//
// How it works: every operation is one or more rounds in which each pair of ranks exchanges exactly one
// message each way (perhaps empty). Who has ended round n has seen every peer enter round n, so every peer
// has ended round n-1: two sets of small receive slots, used in turn, need no handshake. A message larger
// than a slot goes straight into the receiver's buffer, after the receiver said that it is ready.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "sluice/comm/transport.hpp"

namespace sluice::comm {

class Collectives {
 public:
  // Opens channel 0. The transport must outlive this object.
  explicit Collectives(Transport& transport);
  ~Collectives();
  Collectives(const Collectives&) = delete;
  Collectives& operator=(const Collectives&) = delete;

  Transport& transport() { return transport_; }

  Status barrier(std::string_view phase);
  // mine: int64 [k]; all: int64 [num_ranks, k], row r from rank r. k equal on all ranks.
  Status all_gather(std::span<const std::int64_t> mine, std::span<std::int64_t> all, std::string_view phase);
  // send: int64 [num_ranks, k], row d for rank d; receive: int64 [num_ranks, k], row s from rank s.
  Status all_to_all(std::span<const std::int64_t> send, std::span<std::int64_t> receive,
                    std::string_view phase);
  // sends[d]: bytes for rank d; receives[s]: bytes from rank s, as many as rank s sends here. [num_ranks]
  // each.
  Status all_to_all_v(std::span<const std::span<const std::byte>> sends,
                      std::span<const std::span<std::byte>> receives, std::string_view phase);
  // data: as many bytes on all ranks; overwritten with root's.
  Status broadcast(std::span<std::byte> data, RankId root, std::string_view phase);
  // data: [n], n equal on all ranks; every element becomes ((x_0 + x_1) + x_2) + ..., x_r that of rank r,
  // each addition rounded to T. So the result is bit-identical on all ranks, over all transports and arrival
  // orders.
  Status all_reduce_sum(std::span<float> data, std::string_view phase);
  Status all_reduce_sum(std::span<double> data, std::string_view phase);

 private:
  template <typename T>
  Status sum(std::span<T> data, std::string_view phase);
  // One round: sends_ and receives_ to and from every rank. An exception, of idle work for one, ends the group before it
  // leaves: peers may be writing into what the caller is about to free.
  Status exchange(std::string_view phase);
  Status run_round(std::string_view phase);
  Status wait(std::uint32_t signal, std::uint64_t value, std::string_view phase);

  Transport& transport_;
  std::size_t num_ranks_;
  std::size_t rank_;
  std::vector<std::byte> slots_;  // [2, num_ranks, slot bytes]
  std::vector<std::span<const std::byte>> sends_;
  std::vector<std::span<std::byte>> receives_;
  std::vector<Expect> expects_;
  std::vector<std::byte> staging_;  // all_reduce: [num_ranks, slice bytes]
  std::uint64_t round_ = 0;
  std::uint64_t num_puts_ = 0;
  std::uint64_t num_data_[2] = {0, 0};  // expected so far, by parity of the round
  std::uint64_t num_ready_[2] = {0, 0};
};

}  // namespace sluice::comm
