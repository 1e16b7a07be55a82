// How the bytes of puts get from this process to some of its peers, and theirs here: the part in which tcp, shm and ucx
// differ. Everything else - channels, windows, signals, what is expected, how a wait ends - is the group's
// (process_transport.cpp), which gives every peer to one path, so that one group can use several.
//
// The group calls a path from the rank's own thread only, but stop(), which any thread may call. A path moves bytes
// inside progress() and put(), and tells the group through Landing. It never throws out of progress(); what goes wrong
// it reports by broken() (the peer's bytes make no sense: the group ends) or lost() (the connection is gone).
#pragma once

#include <poll.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/clock.hpp"
#include "sluice/comm/net.hpp"
#include "sluice/comm/transport.hpp"

namespace sluice::comm {

// A put of a peer as it arrives.
struct Arrival {
  std::int32_t peer = -1;
  std::uint32_t channel = 0;
  std::uint32_t window = 0;
  std::uint32_t signal = 0;
  std::int64_t offset_bytes = 0;
  std::int64_t bytes = 0;
};

class Landing {
 public:
  enum class Place {
    kThere,    // `to` is where its bytes go; the arrival is matched with what is expected
    kLater,    // this rank is not ready for it; ask again after retry()
    kRefused,  // it is not what is expected: the group has been ended
  };
  // Once for every arrival, in the order of the peer's puts.
  virtual Place place(const Arrival& arrival, std::byte*& to) = 0;
  // All its bytes are there. In the order of the peer's puts to that signal.
  virtual void landed(const Arrival& arrival) = 0;
  // An own put's source may be reused.
  virtual void sent(std::int32_t peer, std::uint32_t channel) = 0;
  virtual void lost(std::int32_t peer, const std::string& why) = 0;
  // text: what the peer did, "sent a header that is none".
  virtual void broken(std::int32_t peer, const std::string& text) = 0;

 protected:
  ~Landing() = default;
};

// The group a path is made for.
struct PathContext {
  std::int32_t rank = 0;
  std::int32_t num_ranks = 1;
  std::uint32_t epoch = 0;
  Landing* landing = nullptr;
};

class DataPath {
 public:
  virtual ~DataPath() = default;
  virtual std::string_view name() const = 0;
  // As Transport::put_memory().
  virtual std::shared_ptr<PutMemory> put_memory() { return nullptr; }

  // What peers need to know; may be binary, at most 16 KiB.
  virtual std::string card() = 0;
  // Whether a peer needs an authenticated socket of its own; the group makes it and gives it to connect().
  virtual bool wants_socket() const { return false; }
  // peers: the ranks that this path serves; cards, sockets: [num_ranks], of those that are served. Throws Error.
  virtual void connect(std::span<const std::int32_t> peers, std::span<const std::string> cards,
                       std::span<net::Fd> sockets, Clock::time_point deadline) = 0;
  // All peers have connected: what was needed for that alone may go.
  virtual void all_connected() {}

  // A put that will come from a peer of this path; `to` is where. For paths that match sends and receives.
  virtual void expect(const Expect& expect, std::byte* to) {
    (void)expect;
    (void)to;
  }
  virtual void put(const Put& put) = 0;
  virtual bool progress() = 0;
  // This rank became ready for more: what had to wait may be asked for again.
  virtual void retry() {}
  // Nothing may be written into this memory any more.
  virtual void forget(std::span<std::byte> memory) = 0;

  // Before the rank sleeps: adds what to poll for. False if something came in the meantime.
  virtual bool prepare_sleep(std::vector<pollfd>& fds) = 0;
  virtual void end_sleep() {}

  // The group has ended: nobody reads this rank's sources or writes its windows after a further call of progress() or
  // put(), which do nothing any more.
  virtual void stop() noexcept = 0;
  // The same on the rank's own thread, before it goes on to free its memory: what the system or a device may still have
  // under way is taken back.
  virtual void settle() noexcept {}
  // An orderly end: what was put goes on its way until the deadline. True when all of it has.
  virtual bool drain(Clock::time_point deadline) = 0;
};

std::unique_ptr<DataPath> make_shm_path(const PathContext& context);
std::unique_ptr<DataPath> make_tcp_path(const PathContext& context);

// What a module of a path (libsluice_comm_NAME.so) exports: one factory with C linkage.
using MakePath = DataPath*(const PathContext* context);
inline constexpr const char* kMakePathSymbol = "sluice_comm_make_path_1";

}  // namespace sluice::comm
