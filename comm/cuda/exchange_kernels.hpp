// Kernels of RowExchange and what they share with the host: where things lie in a channel's window and what a channel's
// state is. Launch functions enqueue and return the runtime's answer; they check nothing (RowExchange has).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "sluice/comm/cuda/row_exchange.hpp"

namespace sluice::comm::cuda {

// What a wait was for, in the first one that passed its deadline. Pinned host memory.
enum class WaitFor : std::uint32_t {
  kBarrier,
  kPlanCounts,
  kPlanHeaders,
  kDispatchReady,
  kDispatchRows,
  kCombineReady,
  kCombineRows,
  kScalarsReady,
  kScalars
};
struct WaitError {
  std::uint32_t set;
  std::uint32_t what;
  std::int32_t peer;
  std::int32_t channel;
  std::int32_t chunk;
  std::uint32_t expected;
  std::uint32_t observed;
  std::uint32_t failure;  // 1: what the host copies to `failed` to end all waits
  std::uint64_t waited_ns;
};

// Offsets in bytes from the start of a channel's part of the window, the same at all ranks. R: num_ranks.
struct WindowLayout {
  std::size_t counts;      // uint32 [R][R][2]: rows and routes from source to destination
  std::size_t count_flag;  // uint32 [R], as all flags: the epoch, by source
  std::size_t header_flag;
  std::size_t dispatch_ready;
  std::size_t combine_ready;
  std::size_t result_flag;  // results that peers may read are there
  std::size_t scalar_ready;
  std::size_t scalar_flag;
  std::size_t given_up;        // 1: the rank writes though this one has not said that it may
  std::size_t dispatch_flags;  // uint32 [R][max_chunks]
  std::size_t combine_flags;   // uint32 [R][max_chunks]
  std::size_t route_ptr;       // int64 [max_received + 1]
  std::size_t slot;            // int32 [max_routes]
  std::size_t weight;          // f32 [max_routes]
  std::size_t scalars;         // f32 [max_routes]
  std::size_t scale;           // f32 [max_received]
  std::size_t rows;            // [max_received][wire row]
  std::size_t home;            // [max_home][row]; in a pass by pull: [max_received][row], this rank's results
  std::size_t bytes;
};

// Of this rank alone. Only kernels write it, one of each kind at a time (a channel's calls are in stream order).
struct ChannelState {
  std::uint32_t plan_epoch, dispatch_epoch, push_epoch, sum_epoch, scalar_epoch, barrier_epoch;
  std::uint32_t plan_exits, dispatch_exits, push_exits, sum_exits, scalar_exits, scalar_arrivals;
  std::uint32_t expand_ticket, sum_ticket, local_ticket, local_exits;
  std::uint32_t status;
  std::int64_t receive_ptr[kMaxExchangeRanks + 1];
  std::int64_t push_base[kMaxExchangeRanks];
  std::int64_t home_base[kMaxExchangeRanks];
  std::int64_t receive_route_ptr[kMaxExchangeRanks + 1];
  std::int64_t push_route_base[kMaxExchangeRanks];
  std::int64_t home_route_base[kMaxExchangeRanks];
};

struct ChannelView {
  std::byte* window[kMaxExchangeRanks];  // this channel's part, of every rank
  WindowLayout at;
  ChannelState* state;
  std::uint32_t* dispatch_done;  // uint32 [R][max_chunks] rows of a chunk that have left
  std::uint32_t* combine_done;
  std::uint32_t* tile_done;  // uint32 [max_routes / 16 + 1]
  std::uint32_t* failed;     // uint32 [1] of the group
  WaitError* error;          // of the group
  std::uint64_t deadline_ns;
  std::int64_t max_tokens, max_received, max_routes, max_home;
  std::int64_t hidden;
  int rank, num_ranks, channel;
  int chunk_rows, max_chunks;
  int row_parts;  // pieces of a row that different warps expand or sum
  int few_rows;   // 1: the start of a kernel is much of its time
  int row_bytes, wire_row_bytes;
  int num_local_slots;
};

struct DispatchCall {
  const std::byte* x;
  std::int64_t x_stride_bytes;
  const std::int64_t* rank_ptr;
  const std::int32_t* send_row;
  std::byte* out;  // expert rows
  std::int64_t out_stride_bytes;
  const std::int32_t* position_of_route;
  std::uint32_t* tile_flags;
  int tile_rows;
  int push_blocks, blocks;
  bool arrived;      // the rows of others are there already: no flags
  bool own, others;  // whose rows to expand
  bool pass;         // a dispatch; else rows that are here are expanded, at any time
};
struct CombineCall {
  const std::byte* source;
  std::int64_t source_stride_bytes;
  const std::int32_t* position_of_route;
  bool weighted;
  const std::int64_t* rank_ptr;
  const std::int64_t* home_ptr;
  const std::int32_t* home_position;
  std::byte* y;
  std::int64_t y_stride_bytes;
  std::int64_t first_token, end_token;
  bool push, sum, last;  // which parts; `last`: the sums of this pass end with this call
  int push_blocks, blocks;
  bool arrived;  // the rows of others are there already: no flags
  bool pull;  // rows lie in their rank's window and are read there: nothing but y, counts and blocks matters
  std::byte*
      staging;  // not null: rows go here, at their place in the receive list, and nowhere else; no part of the pass
};
// Which part of the plan's exchange (or of return_scalars) a kernel does.
enum class ExchangePart {
  kAll,     // over peers' memory
  kBefore,  // what must be there before NCCL moves it: own counts; scalars in the order of routes, in staging
  kHeaders,  // with all counts there: state, and row pointers for the peers in staging
  kAfter,    // scalars that have arrived to where they belong
};
struct PackCall {
  const std::byte* x;
  std::int64_t x_stride_bytes;
  const std::int64_t* rank_ptr;
  const std::int32_t* send_row;
  std::byte* staging;  // wire rows of the send list; own rows are left out
  float* staging_scale;
  int first_chunk, end_chunk;  // of every peer's rows
  bool first;
  bool handshake;  // with the first slice
  int blocks;
};

// `view` lies in device memory.
cudaError_t preload_kernels();  // so that none is loaded while another waits
cudaError_t launch_plan(const ChannelView* view, const SendPlan& plan, ExchangePart part,
                        std::int64_t* staging, Stream stream);
cudaError_t launch_check_headers(const ChannelView* view, Stream stream);
// processors: of the device
cudaError_t launch_dispatch(const ChannelView* view, const DispatchCall& call, bool fp8, int processors,
                            Stream stream);
cudaError_t launch_combine(const ChannelView* view, const CombineCall& call, DType dtype, int processors,
                           Stream stream);
cudaError_t launch_scalars(const ChannelView* view, const SendPlan& plan, const float* values,
                           const std::int32_t* position_of_route, float* value_of_route, ExchangePart part,
                           float* staging, Stream stream);
cudaError_t launch_pack(const ChannelView* view, const PackCall& call, bool fp8, Stream stream);
cudaError_t launch_wait_dispatch(const ChannelView* view, Stream stream);
cudaError_t launch_raise_flags(const ChannelView* view, int peer, bool dispatch, int first_chunk,
                               int end_chunk, Stream stream);
// Until peers have ended the sums of the last pass. begin: one by copy engines begins.
cudaError_t launch_combine_handshake(const ChannelView* view, bool begin, Stream stream);
cudaError_t launch_barrier(const ChannelView* view, std::uint32_t* epoch, std::size_t flags_at,
                           Stream stream);
// Tells all peers that this rank's kernels are over and waits for theirs, for as long as `failed` in a group that has failed,
// or fails meanwhile.
cudaError_t launch_leave(const ChannelView* view, std::size_t flags_at, std::chrono::nanoseconds deadline,
                         std::chrono::nanoseconds failed, Stream stream);

}  // namespace sluice::comm::cuda
