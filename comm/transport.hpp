// Moving bytes between ranks. One primitive, one-sided in meaning: put(bytes, peer, planned offset, signal).
// Both sides know every transfer from the plan, so a two-sided backend lowers a put to a matched send and
// receive.
//
// Vocabulary
//   channel  an independent stream of passes over the same buffers and signals (a layer context has one; 0 is
//            kept for collectives). Several are in flight at once.
//   window   registered memory of this rank into which peers put, numbered within its channel
//   signal   a counter of this rank, numbered within its channel; it grows by one each time a put that names
//            it has fully landed. It never shrinks: a waiter compares with a running total.
//
// A pass (one execution of a template on a channel):
//   1. set_window() for every window that grew        (only while no pass is in flight on the channel here)
//   2. expect() every put that will come              (sizes and offsets come from the plan)
//   3. put() a zero-byte "ready" signal to each peer that will put here; peers wait for it before they put
//   4. put() and progress() until all signals are there and puts_completed() covers all own puts
// WRONG: putting before the peer's ready signal of the same pass - its window may still be in use.
//
// Ownership: windows and put sources belong to the caller. A source must stay unchanged until
// puts_completed(channel) counts it. Windows must stay valid until they are taken back (set_window with an
// empty span) or the transport is destroyed.
// Thread-safety: one Transport serves one rank; calls come from one thread at a time, except abort() and
// aborted() and broken(), which any thread may call.
// Blocking: only wait(), wait_for_puts(), the collectives (collectives.hpp) and the destructor block. It lets
// own puts land first, then tells the peers: whoever still waits for this rank gets kPeerLost. After an abort
// nothing lands any more: once idle(), wait() or the rank's own abort() has reported it, nobody reads the rank's
// sources or writes its windows, so they may be freed. A rank that unwinds aborts before it frees them.
// Errors: misuse throws (kInvalidArgument, kInvalidState); what depends on peers comes back as Status.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sluice/base/clock.hpp"
#include "sluice/base/error.hpp"
#include "sluice/base/ids.hpp"
#include "sluice/base/topology.hpp"

namespace sluice::comm {

// What a backend can do. The scheduler asks these, never a backend's name.
struct Caps {
  bool one_sided = false;           // a put needs no matching call at the peer
  bool device_memory = false;       // windows and sources may be device memory
  bool device_initiated = false;    // kernels may put
  bool needs_host_counts = true;    // sizes must be known on the host
  bool graph_capturable = false;    // a pass can be recorded into a device graph
  bool needs_progress = false;      // transfers move only while the host is inside a call
  bool survives_peer_loss = false;  // the survivors can form a new group in this process
  std::int64_t max_in_flight = 0;   // puts outstanding before put() has to progress; 0 = no limit
};

// What a link does, for the cost model. Zero means unknown (not measured).
struct Perf {
  std::chrono::nanoseconds latency{0};      // of an empty put, one way
  double bytes_per_s = 0;                   // large puts, one way
  std::chrono::nanoseconds per_message{0};  // sender's cost of a put
  bool emulated = false;                    // slowed on purpose to a declared speed
};

struct Put {
  RankId peer;  // may be the own rank
  std::uint32_t channel = 0;
  std::uint32_t window = 0;           // of the peer
  std::int64_t offset_bytes = 0;      // in the peer's window
  std::span<const std::byte> source;  // may be empty: then only the signal travels
  std::uint32_t signal = 0;           // of the peer; grows by one when all bytes are there
};

struct Expect {
  RankId peer;
  std::uint32_t channel = 0;
  std::uint32_t window = 0;
  std::int64_t offset_bytes = 0;
  std::int64_t bytes = 0;
  std::uint32_t signal = 0;
};

// Why a group ended. The first writer wins; all ranks come to see the same record.
struct AbortRecord {
  Status status;   // full sentence: who, what, expected, seen, elapsed
  RankId culprit;  // invalid when no rank is to blame
  RankId reporter;
  std::string phase;  // "dispatch", "combine", "plan", ...
  std::int32_t chunk = -1;
};

// What a blocked rank waits for.
struct WaitSpec {
  std::uint32_t channel = 0;
  std::uint32_t signal = 0;
  std::uint64_t value = 0;  // signal total to reach
  std::string_view phase;   // static storage
  std::int32_t chunk = -1;
};

// When a put is on its link, where the backend knows.
struct LinkTime {
  Clock::time_point begin, end;
};

// Memory of this process that its peers can read where it lies, so that a large put from it is a single copy.
// Thread-safety: any thread. May outlive the transport.
class PutMemory {
 public:
  virtual ~PutMemory() = default;
  // Zeroed, aligned to a page. Null when there is no room: puts from ordinary memory go as well.
  virtual void* allocate(std::size_t bytes) noexcept = 0;
  // bytes: as allocated. No put from it may be under way.
  virtual void deallocate(void* memory, std::size_t bytes) noexcept = 0;
};

class Transport;
// A group after a loss.
struct Survivors {
  std::unique_ptr<Transport> transport;
  std::vector<RankId> former;  // [num_ranks of the new group]: the rank that each one had before
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual std::string_view name() const = 0;  // "local", "mpi", ...; for reports only
  virtual Caps caps() const = 0;
  virtual Perf perf(RankId peer) const = 0;
  virtual RankId rank() const = 0;
  virtual const Topology& topology() const = 0;
  std::int32_t num_ranks() const { return topology().num_ranks(); }

  // Makes room for a channel's windows and signals (idempotent; may grow). Local and cheap, no communication;
  // a peer's put to a channel not yet opened here waits for it.
  virtual void open_channel(std::uint32_t channel, std::uint32_t num_windows, std::uint32_t num_signals) = 0;
  // An empty span takes the window back: when it returns, nothing is written into the old memory any more.
  virtual void set_window(std::uint32_t channel, std::uint32_t window, std::span<std::byte> memory) = 0;

  // Announces puts that will come. Puts from one peer to one signal come in the order in which they are
  // expected. Throws kInvalidArgument if one lies outside its window.
  virtual void expect(std::span<const Expect> expects) = 0;
  virtual void put(const Put& put) = 0;
  // Where put sources best lie; null: no memory is better than other.
  virtual std::shared_ptr<PutMemory> put_memory() { return nullptr; }
  // Of the last put, for timelines; none where the backend cannot tell.
  virtual std::optional<LinkTime> last_link_time() const { return {}; }
  // Moves things along without blocking. True if anything happened.
  virtual bool progress() = 0;

  virtual std::uint64_t signal(std::uint32_t channel, std::uint32_t signal) const = 0;
  // Own puts on the channel whose source may be reused, in total.
  virtual std::uint64_t puts_completed(std::uint32_t channel) const = 0;
  // Peers with expected puts to this signal that have not landed, ascending, each once.
  virtual std::vector<RankId> missing(std::uint32_t channel, std::uint32_t signal) const = 0;

  // Ends the group: every rank's waits return. Returns whether this call was the first. Never throws.
  virtual bool abort(const AbortRecord& record) noexcept = 0;
  virtual bool aborted() const noexcept = 0;
  // Whether the group has been aborted, or a rank's process is known to have died: the next wait then ends with an error
  // that says more. Any thread; for those who wait for something else meanwhile, such as a GPU. A backend without
  // connections of its own (mpi) learns of a death in its own waits only.
  virtual bool broken() const noexcept { return aborted(); }
  virtual AbortRecord abort_record() const = 0;

  // How long a wait may go without anything it waits for arriving; the suspicion window comes on top of it
  // and is a fifth of it at most.
  virtual void set_timeout(std::chrono::nanoseconds timeout) = 0;
  virtual std::chrono::nanoseconds timeout() const = 0;

  // Called over and over by a rank that has nothing to do but wait for one of `pending`; empty: for its own
  // puts to complete. Publishes what it waits for; ok while there is hope, at once when one is there. Gives
  // the core away, but wakes when something arrives. After the deadline it collects who waits for whom,
  // blames the sink of that graph, aborts the group and returns the error; if the group is aborted it returns
  // that error at once.
  virtual Status idle(std::span<const WaitSpec> pending) = 0;
  // Called when something came, or when the rank goes on to compute; restarts the deadline.
  virtual void advanced() = 0;

  // After an abort, where caps().survives_peer_loss: a new group of the ranks that are left. Every survivor calls it;
  // who does not within `span`, and the culprit of the abort, are left out. Ranks keep their order and are numbered
  // anew; nodes stay who they were. Channels, windows and signals start afresh. This transport may be destroyed
  // afterwards, and can do nothing else. Blocks for at most twice `span` and what set-up takes. Throws kNotSupported,
  // kInvalidState (not aborted), kPeerLost (this rank was left out), kTimeout.
  virtual Survivors survivors(std::chrono::nanoseconds span);

  // What wait() and wait_for_puts() call before they idle: other work of the rank, which must not block. It returns
  // whether it did anything. Empty: nothing.
  void set_idle_work(std::function<bool()> work) { idle_work_ = std::move(work); }

  // Blocks until the signal total is reached: progress, idle work, idle.
  Status wait(const WaitSpec& spec);
  // Blocks until all own puts of the channel are complete, so that their sources may be reused. num_puts: all
  // puts ever made on the channel.
  Status wait_for_puts(std::uint32_t channel, std::uint64_t num_puts);

 private:
  std::function<bool()> idle_work_;
};

// Where ranks are threads of this process. Element r serves rank r. Links that the topology declares limited
// are emulated (Perf::emulated says so). The transports share state and may be destroyed in any order.
std::vector<std::unique_ptr<Transport>> make_local_group(const Topology& topology);

// How the processes of a group find each other (launch_environment.hpp); mpi needs none of it.
struct JoinOptions {
  std::string rendezvous;                                       // HOST:PORT; empty: as the launcher says
  std::string secret_file;                                      // mode 0600; empty: as the launcher says
  std::chrono::nanoseconds timeout = std::chrono::seconds(30);  // until all ranks are there
};

// One rank of a group of processes that was launched outside: "tcp", or from a module loaded on demand "mpi" (its file
// is looked for beside the library). `topology_override` null: the nodes are discovered; else the topology is this one
// and must have as many ranks. Collective. Throws kNotSupported naming the file when a module is not there,
// kInvalidConfig when the rank counts differ, and what rendezvous.hpp throws.
std::unique_ptr<Transport> load_transport(std::string_view name, const Topology* topology_override,
                                          const JoinOptions& options = {});
// The module's file, without loading it. Throws as load_transport does when it is not there.
std::string find_transport_module(std::string_view name);

}  // namespace sluice::comm
