// One rank of an expert-parallel group: its transport, its kernels, its share of the collectives.
//
// Ownership: a Runtime owns its transport and kernels; layers and contexts refer to it and must be destroyed first.
// Thread-safety: one Runtime serves one rank; its calls, and those of its layers, come from one thread at a time.
// All ranks make collective calls (marked so) in the same order.
// Errors: set-up and misuse throw Error; so do failures of the group (kTimeout, kPeerLost, kAborted, kDisagreement),
// after which only destruction is allowed. Every wait has the deadline of RuntimeOptions::timeout.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/base/ids.hpp"
#include "sluice/base/topology.hpp"

namespace sluice {

namespace comm {
class Collectives;
class Transport;
}  // namespace comm
namespace kernels {
class Kernels;
}
class SpanRecorder;
struct RuntimeState;

// Memory of contexts (receive buffers, saved activations). `allocate` returns memory aligned to `alignment` or null;
// null functions: the C++ heap. Called from the rank's own thread, never in the steady state of a step.
struct Allocator {
  void* (*allocate)(std::size_t bytes, std::size_t alignment, void* user) = nullptr;
  void (*deallocate)(void* memory, std::size_t bytes, std::size_t alignment, void* user) = nullptr;
  void* user = nullptr;
};

// Who posts transfers and moves them along while a rank computes.
enum class ProgressMode : std::uint8_t {
  kAuto,    // a thread where transfers need the host's attention and a core is left for it, else kInline
  kInline,  // the computing thread, between ops
  kThread,  // a thread of the rank
};

// Where experts are computed.
enum class ComputeDevice : std::uint8_t {
  kCpu,
  kCuda,  // a GPU of this process; ranks of a node take them in turns. Ranks may share one
};

struct RuntimeOptions {
  // How long a wait may go without anything it waits for arriving.
  std::chrono::nanoseconds timeout = std::chrono::seconds(30);
  int threads_per_rank = 1;  // compute threads, the calling thread among them
  ProgressMode progress = ProgressMode::kAuto;
  Allocator allocator;  // null functions with a GPU: memory that the GPU copies from at full speed
  // How processes find each other (docs/transports.md); empty: as the launcher says. Not for transport local or mpi.
  std::string rendezvous;   // HOST:PORT at rank 0's host
  std::string secret_file;  // of mode 0600
  // kCuda throws kNotSupported where the build has no CUDA kernels, or no GPU is there.
  ComputeDevice device = ComputeDevice::kCpu;
};

class Runtime {
 public:
  // Ranks are threads of this process: element r belongs to the thread that plays rank r. Links that the topology
  // declares limited are emulated.
  static std::vector<std::unique_ptr<Runtime>> create_local(const Topology& topology,
                                                            const RuntimeOptions& options = {});
  // One rank of a group that was launched outside, over its transport ("tcp", "mpi"). Collective. `nodes`
  // overrides discovery; null discovers. "nvlink" and "nccl": layers move their rows from GPU to GPU (docs/transports.md);
  // they need the device kCuda and a GPU for each rank.
  static std::unique_ptr<Runtime> create(std::string_view transport, const Topology* nodes = nullptr,
                                         const RuntimeOptions& options = {});
  // One rank over a transport that the caller made.
  static std::unique_ptr<Runtime> create_over(std::unique_ptr<comm::Transport> transport,
                                              const RuntimeOptions& options = {});
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  RankId rank() const;
  const Topology& topology() const;
  std::int32_t num_ranks() const { return topology().num_ranks(); }
  const RuntimeOptions& options() const;

  // Collective, blocking. Sums element-wise over ranks in ascending rank order: the same bits on every rank, over every
  // transport. data: f32 or f64 [n], n equal on all ranks
  void all_reduce_sum(std::span<float> data, std::string_view phase = "all_reduce");
  void all_reduce_sum(std::span<double> data, std::string_view phase = "all_reduce");
  void barrier(std::string_view phase = "barrier");
  // values: int64 [k]; returns int64 [num_ranks * k]
  std::vector<std::int64_t> all_gather(std::span<const std::int64_t> values,
                                       std::string_view phase = "all_gather");
  // data: bytes, equally many on all ranks; overwritten with root's
  void broadcast(std::span<std::byte> data, RankId root, std::string_view phase = "broadcast");

  // Ends the group because of a failure on this rank that peers cannot see. Never throws.
  void abort(std::string_view phase, const std::string& reason) noexcept;
  // Ok while the group lives, else why it ended. Any thread may ask.
  Status async_error() const;

  // Where spans of this rank go; null: nowhere. The recorder must outlive its use.
  SpanRecorder* recorder() const;
  void set_recorder(SpanRecorder* recorder);

  // For the project's own rooms; their headers are not installed.
  comm::Transport& transport();
  comm::Collectives& collectives();
  kernels::Kernels& kernels();
  RuntimeState& state() { return *state_; }

 private:
  explicit Runtime(std::unique_ptr<RuntimeState> state);
  std::unique_ptr<RuntimeState> state_;
};

}  // namespace sluice
