// Dispatch and combine between GPUs that reach each other's memory: de-duplicated rows are stored straight into the
// receiver's memory, results straight home, each chunk of rows announced by a flag (`nvlink`). Where they do not reach
// each other's memory, the same calls move the same rows with NCCL (`nccl`): results have the same bits.
//
// Words (docs/design.md): a *channel* is one plan in flight with its buffers. Its *receive list* is what this rank gets:
// rows of source 0, of source 1, ... (its own among them), within a source by token. Rows of others are stored into
// `received()`, at their place in the list; own rows stay where they are, in the caller's x. Results travel back to
// `home` places: a token's send rows, ranks ascending, as the plan numbers them.
//
// A pass, all on one stream, all ranks in the same order of calls for a channel:
//   exchange_plan()            once a routing: counts and row headers; the receive list exists when it is done
//   dispatch() / combine() /   any number of times, forward or backward; each begins with a handshake by which every
//   return_scalars()           rank says that it is done with what the last call of this kind left in its memory
// So the stream must be done with received() (what the caller enqueued to read it) before the next dispatch() is
// enqueued on the channel. Calls on different channels are independent of each other.
// All calls only enqueue work; all can be captured in a CUDA graph and replayed (flags are compared with an epoch that
// lies in device memory), except those of the copy engine, which need counts on the host.
//
// How a wait ends: every wait on the device has a deadline. When it passes, the group has failed: the first waiter
// writes what it waited for, all kernels of the group return without waiting any more, their results are undefined
// (sums at home are NaN), and check() throws kPeerLost naming the peer. A rank that has failed announces nothing any more, so
// that a peer that was only late fails as well instead of taking its results. What it writes all the same, by a copy engine or
// in result_rows(), it tells its peers before, whose check() throws then. No kernel traps: other groups go on.
// Where the host can say that a rank is gone (Bootstrap::lost), wait() and host_counts() ask it meanwhile, end all waits of
// this rank on the device at once, and throw kPeerLost; over NCCL the communicator is aborted.
//
// Errors: what the host can see throws kInvalidArgument or kInvalidState. What only the device sees sets a sticky bit of
// the channel's status: kExchangeOverflow (more rows or routes than the buffers hold: nothing is sent, sums are NaN) and
// kExchangeBadHeader (a peer's header does not fit this rank; the routes are left out). check() throws for them too.
//
// Ownership: the object owns its windows, flags and streams; plans, rows and outputs belong to the caller, device memory
// of the current device, valid until the stream passed the call. Thread-safety: one thread at a time.
// Blocking: constructor (collective), destructor (waits for this rank's streams, then until the peers are done with this
// rank's memory: at most the deadline, at most a second in a group that has failed or fails meanwhile, and hardly at all
// where the last one was left without somebody a moment ago), check() (waits for nothing; call it after synchronising),
// host_counts().
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "sluice/base/dtype.hpp"
#include "sluice/comm/cuda/bootstrap.hpp"
#include "sluice/comm/cuda/symmetric_memory.hpp"

namespace sluice::comm::cuda {

inline constexpr int kMaxExchangeRanks = 64;
inline constexpr std::uint32_t kExchangeOverflow = 1;
inline constexpr std::uint32_t kExchangeBadHeader = 2;

enum class Link : std::uint8_t {
  kNvlink,  // stores into peers' memory; no call waits for the device
  kNccl,  // grouped send and receive, also between nodes; exchange_plan() waits for the stream, since NCCL needs sizes
  // on the host, and so no call can be captured. check() looks at NCCL's asynchronous error, wait() has the
  // deadline; after one of them has thrown the communicator is dead.
};

enum class Wire : std::uint8_t {
  kRows,  // as they are
  kFp8,  // bf16 rows as e4m3 with one fp32 scale a row: |error| <= max |row| * 2^-4 / (1 - 2^-4), elementwise at most
  // 2^-4 of the value where that is above max |row| * 2^-14. Results of combine stay bf16.
};

struct ExchangeShape {
  std::int64_t max_tokens = 0;  // of one rank
  std::int64_t hidden = 0;      // columns; rows are multiples of 16 bytes on the wire
  DType dtype = DType::kBF16;   // of rows and results: bf16 or fp32
  Wire wire = Wire::kRows;
  std::int64_t max_received = 0;  // rows of the receive list, <= num_ranks * max_tokens; 0: that
  std::int64_t max_routes =
      0;                    // of one rank's tokens, and of one receive list; 0: 8 a row of the receive list
  int num_local_slots = 1;  // experts of this rank, to check what peers send
  int chunk_rows = 64;      // rows a flag announces
  int num_channels = 1;
  std::chrono::nanoseconds deadline = std::chrono::seconds(10);  // of one wait
};

// What the sender's plan says; kernels/cuda/routing.hpp's PlanBuffers of the same names. Device memory.
struct SendPlan {
  const std::int64_t* rank_ptr = nullptr;        // int64 [num_ranks + 1]
  const std::int32_t* send_row = nullptr;        // int32 [send rows]: token
  const std::int64_t* send_route_ptr = nullptr;  // int64 [send rows + 1]
  const std::int32_t* send_route = nullptr;      // int32 [routes sent]; for return_scalars() only
  const std::int32_t* send_slot = nullptr;       // int32 [routes sent]
  const float* send_weight = nullptr;            // f32 [routes sent]
  const std::int64_t* home_ptr = nullptr;        // int64 [num_tokens + 1]; for combine()
  const std::int32_t* home_position = nullptr;   // int32 [send rows]
};

// The receive list of a channel, as exchange_plan() leaves it. Device memory of the exchange; row_ptr is filled up to
// max_received, so that a plan may be built over that many rows without knowing how many there are.
struct ReceiveList {
  const std::int64_t* source_ptr;        // int64 [num_ranks + 1]: rows of each source
  const std::int64_t* source_route_ptr;  // int64 [num_ranks + 1]: their routes
  const std::int64_t* route_ptr;         // int64 [max_received + 1]: routes of each row
  const std::int32_t* slot;              // int32 [routes]: local expert, ascending within a row
  const float* weight;                   // f32 [routes]
};

// Tiles of `rows` rows whose flags are set (to 1) when all rows of the tile are there; the grouped GEMM waits for them.
struct TileFlags {
  std::uint32_t* flags =
      nullptr;  // uint32 [ceil(rows of the result / rows)], or null: none. Zeroed by dispatch().
  int rows = 64;
};

// Where dispatch() also puts rows: in the order the grouped GEMM reads them, one row a route.
struct ExpertRows {
  void* data = nullptr;     // dtype [routes, hidden]; null: rows stay in the receive list
  std::int64_t stride = 0;  // elements
  const std::int32_t* position_of_route = nullptr;  // int32 [routes]: of the receiver's plan
  TileFlags tiles;
};

struct MoverOptions {
  int push_sms = 16;  // processors that store to peers
  int local_sms =
      0;  // processors that work on local memory meanwhile: expanding rows, summing at home, packing
  int copy_slices = 3;  // parts of a copy engine's transfer, so that packing, copying and summing overlap
};

// Which mover takes rows to peers sooner. Costs in microseconds and bytes a microsecond; the defaults, of a dispatch, and
// those of a combine up to its last sum were measured on two H200s (docs/benchmarks.md). Stores take processors away from
// others; copy engines take none but to pack, need counts on the host and cannot be captured.
enum class Mover : std::uint8_t { kStores, kCopyEngines };
struct MoverCosts {
  double store_start_us = 14, store_bytes_us_sm = 42e3, store_bytes_us = 362e3;
  double copy_start_us = 57, copy_bytes_us = 269e3;  // packing and announcing included
};
inline constexpr MoverCosts kCombineCosts = {.store_start_us = 72,
                                             .store_bytes_us_sm = 42e3,
                                             .store_bytes_us = 367e3,
                                             .copy_start_us = 58,
                                             .copy_bytes_us = 251e3};
struct MoverChoice {
  Mover mover;
  int sms;  // kStores: the fewest that take at most 3% longer than the best
  double us;
};
// bytes: that leave this rank. max_sms: that stores may have, 0: none. counts_known: copy engines are possible.
// Errors: kInvalidArgument where neither is possible.
MoverChoice choose_mover(std::int64_t bytes, int max_sms, bool counts_known, const MoverCosts& costs = {});

// What a rank has for combine(): one row a receive list entry (weights and positions null), or expert outputs.
struct CombineSource {
  const void* data = nullptr;  // dtype [rows or routes, hidden]
  std::int64_t stride = 0;     // elements
  const std::int32_t* position_of_route =
      nullptr;           // int32 [routes]; null: rows are in the order of the receive list
  bool weighted = true;  // of expert outputs: by the routes' weights; else plain sums (backward)
};

class RowExchange {
 public:
  // communicator: required for Link::kNccl and PeerPath::kNccl; must outlive the object.
  RowExchange(const Bootstrap& bootstrap, const ExchangeShape& shape, Link link = Link::kNvlink,
              PeerPath path = PeerPath::kBest, NcclCommunicator* communicator = nullptr);
  ~RowExchange();
  RowExchange(const RowExchange&) = delete;
  RowExchange& operator=(const RowExchange&) = delete;

  int rank() const;
  int num_ranks() const;
  Link link() const;
  const ExchangeShape& shape() const;
  std::string_view path_name() const;
  std::size_t window_bytes() const;  // device memory of all channels' windows

  void exchange_plan(int channel, const SendPlan& plan, Stream stream);
  ReceiveList receive_list(int channel) const;
  // Rows of others at their place in the receive list; the places of own rows are the caller's to use.
  // dtype, or e4m3 for kFp8 [max_received, hidden]
  void* received(int channel) const;
  const float* received_scale(int channel) const;  // f32 [max_received], kFp8 only

  // x: dtype [num_tokens, hidden], x_stride elements from row to row
  void dispatch(int channel, const SendPlan& plan, const void* x, std::int64_t x_stride,
                const ExpertRows& expert_rows, const MoverOptions& options, Stream stream);
  // Rows that are here, one a route; no part of the pass: own ones from x at any time, also on another stream than
  // dispatch(), beside it; those of others after a dispatch() that left them in the receive list. options.local_sms: 0 for all
  enum class Rows { kOwn, kOthers };
  void expand(int channel, const SendPlan& plan, Rows rows, const void* x, std::int64_t x_stride,
              const ExpertRows& expert_rows, const MoverOptions& options, Stream stream);
  // y[t] = sum over the ranks of token t, ascending, of the rank's row, in fp32, rounded once; no rows: zeros. A rank's row
  // of expert outputs is the sum over its routes, ascending, of weight * output in fp32, rounded to dtype whether or
  // not it travels.  y: dtype [num_tokens, hidden]
  void combine(int channel, const SendPlan& plan, const CombineSource& source, void* y, std::int64_t y_stride,
               std::int64_t num_tokens, const MoverOptions& options, Stream stream);
  // The same sums the other way round, for callers that make the reduced rows themselves: rows stay at their rank, and home
  // reads them there while it sums. No row is stored on the way. All ranks of a pass must do the same.
  // Where the rows go: one a receive list entry of this rank, own ones as well, without gaps.  dtype [max_received, hidden]
  // What the stream does next may write there: this waits on the device until peers have read those of the last pass.
  // They stay until another pass begins.
  void* result_rows(int channel, Stream stream);
  // All rows are there, in stream order. sms: processors at home, 0 for all; 16 are enough for the link.
  void combine_by_pull(int channel, const SendPlan& plan, void* y, std::int64_t y_stride,
                       std::int64_t num_tokens, int sms, Stream stream);
  // The halves of combine(), for callers that let others work between them. What others get of expert outputs, one row a
  // receive list entry (own ones are left out), is made ...   rows: dtype [max_received, hidden]
  void reduce_results(int channel, const CombineSource& source, void* rows, const MoverOptions& options,
                      Stream stream);
  // ... rows leave, of `rows` or of expert outputs; sums at home.
  void push_results(int channel, const CombineSource& source, const MoverOptions& options, Stream stream);
  // Tokens first..end-1; the pass ends with the call that has `last`.
  void sum_at_home(int channel, const SendPlan& plan, const CombineSource& source, void* y,
                   std::int64_t y_stride, std::int64_t first_token, std::int64_t end_token, bool last,
                   const MoverOptions& options, Stream stream);
  // Sums again of what the last pass brought: no part of a pass, for measurements.
  void sum_again(int channel, const SendPlan& plan, const CombineSource& source, void* y,
                 std::int64_t y_stride, std::int64_t num_tokens, Stream stream);
  // One value a route back to who sent it: value_of_route[send_route[i]] = values[position_of_route[...]].
  // values: f32 [routes received]; value_of_route: f32 [routes of this rank's tokens]
  void return_scalars(int channel, const SendPlan& plan, const float* values,
                      const std::int32_t* position_of_route, float* value_of_route, Stream stream);

  // ---- copy engines: the counts of the channel's plan, read once after exchange_plan() (waits for the stream; over
  // kNccl, where exchange_plan() has read them, for nothing); zero rows received where the plan did not fit ----
  struct HostCounts {
    std::vector<std::int64_t> send_ptr;     // [num_ranks + 1] rows to each rank
    std::vector<std::int64_t> receive_ptr;  // [num_ranks + 1] rows from each rank
    std::vector<std::int64_t>
        push_base;  // [num_ranks] where this rank's rows start in each peer's receive list
    std::vector<std::int64_t>
        home_base;  // [num_ranks] where this rank's results start in each peer's home places
    std::int64_t receive_routes = 0;
  };
  HostCounts host_counts(int channel, Stream stream);
  // Rows are packed by options.local_sms processors (0: all) into staging memory and copied by copy engines, in slices.
  void dispatch_by_copy(int channel, const SendPlan& plan, const HostCounts& counts, const void* x,
                        std::int64_t x_stride, const MoverOptions& options, Stream stream);
  // By the mover that choose_mover() names; counts may be null where stores have processors. Ranks may choose differently.
  MoverChoice dispatch_by_choice(int channel, const SendPlan& plan, const HostCounts* counts, const void* x,
                                 std::int64_t x_stride, int max_sms, Stream stream,
                                 const MoverCosts& costs = {});
  // source must hold one row a receive list entry, without gaps. The sums at home start while copies run if
  // options.local_sms > 0 (on so many processors), else when this rank's copies are done, on all.
  void combine_by_copy(int channel, const SendPlan& plan, const HostCounts& counts,
                       const CombineSource& source, void* y, std::int64_t y_stride, std::int64_t num_tokens,
                       const MoverOptions& options, Stream stream);

  // By the mover that choose_mover() names with the costs of a combine, stores beside sums on all other processors. Copies
  // are possible where counts are given and the source is as combine_by_copy() needs it. Ranks may choose differently.
  MoverChoice combine_by_choice(int channel, const SendPlan& plan, const HostCounts* counts,
                                const CombineSource& source, void* y, std::int64_t y_stride,
                                std::int64_t num_tokens, int max_sms, Stream stream,
                                const MoverCosts& costs = kCombineCosts);

  // Meets all ranks on the device: a kernel of one block. For timing and tests.
  void barrier(Stream stream);
  // Waits on the host until the stream is done, then check(). The device's own deadlines end it (kNvlink), or the
  // communicator is aborted when the deadline passes (kNccl).
  void wait(int channel, Stream stream);
  // The same without check(): for what the stream did before this group's part began.
  void wait_for(Stream stream);
  // The same for destructors: whatever went wrong, the stream is done then.
  void drain(Stream stream) noexcept;
  // Throws what the device has reported. The group's failure names the peer; `channel` adds its status bits.
  void check(int channel) const;
  // Clears the channel's status bits, so that it can be used with a plan that fits.
  void clear(int channel, Stream stream);
  bool failed() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice::comm::cuda
