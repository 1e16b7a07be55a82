// What ranks and the rendezvous say to each other: the layout of every message, and the parsers of what comes from
// outside. A parser takes any bytes, checks every length, count and code against its bound, and answers nothing
// (std::nullopt) when they are no message of this version; it never reads beyond the span, never throws and never
// allocates more than the bounds below. Numbers are little-endian.
//
// Three conversations:
//   handshake   fixed sizes; both sides prove that they know the job's secret (secret.hpp). Before it has succeeded
//               nothing else is read from a stranger.
//   frames      u32 length, then that many bytes: the rendezvous (rendezvous.hpp) and the watchdog (group_watch.hpp)
//   data        a fixed header, then the bytes of a put (tcp_path.cpp)
// Thread-safety: pure functions and plain values.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/comm/secret.hpp"

namespace sluice::comm::wire {

using Bytes = std::vector<std::byte>;

inline constexpr std::size_t kMaxKeyBytes = 256;
inline constexpr std::size_t kMaxValueBytes = 64 << 10;
inline constexpr std::size_t kMaxTextBytes = 4096;
inline constexpr std::size_t kMaxRequestBytes =
    kMaxValueBytes + kMaxKeyBytes + 64;                     // a frame to the rendezvous
inline constexpr std::size_t kMaxReplyBytes = 64 << 20;     // a frame from it
inline constexpr std::size_t kMaxControlBytes = 512 << 10;  // a frame between watchdogs
inline constexpr std::uint32_t kMaxRanks = 65536;
inline constexpr std::uint32_t kMaxChannels = 1u << 20;
inline constexpr std::uint32_t kMaxSignals = 1u << 22;

// ---- handshake

enum class Purpose : std::uint32_t { kRendezvous = 1, kControl = 2, kData = 3 };

enum class Verdict : std::uint32_t {
  kWelcome = 0,
  kWrongSecret = 1,
  kStaleJob = 2,     // of another job or of an earlier group of this one
  kNotExpected = 3,  // that rank is there already, or is no rank of this job
  kWrongVersion = 4,
};
// What is wrong and what to do, for the refused side.
std::string_view describe(Verdict verdict);

inline constexpr std::size_t kServerHelloBytes = 8 + 32;
inline constexpr std::size_t kClientHelloBytes = 8 + 8 + 4 + 4 + 4 + 32 + 32;
inline constexpr std::size_t kServerReplyBytes = 8 + 4 + 32;

struct ServerHello {
  Nonce nonce{};
};
struct ClientHello {
  std::uint64_t job = 0;
  Purpose purpose = Purpose::kRendezvous;
  std::int32_t rank = -1;
  std::uint32_t epoch = 0;
  Nonce nonce{};
  Mac mac{};
};
struct ServerReply {
  Verdict verdict = Verdict::kWelcome;
  Mac mac{};
};

Bytes encode(const ServerHello& m);
Bytes encode(const ClientHello& m);
Bytes encode(const ServerReply& m);
std::optional<ServerHello> parse_server_hello(std::span<const std::byte> bytes);
std::optional<ClientHello> parse_client_hello(std::span<const std::byte> bytes);
std::optional<ServerReply> parse_server_reply(std::span<const std::byte> bytes);

// What each side proves. Every field of the client's hello is covered.
Mac client_mac(const Secret& secret, const ClientHello& hello, const Nonce& server_nonce);
Mac server_mac(const Secret& secret, const ClientHello& hello, const Nonce& server_nonce);

// ---- rendezvous

// Requests: the first is kJoin.
struct Request {
  enum class Kind : std::uint8_t { kJoin = 1, kPut = 2, kGather = 3, kLeave = 4 };
  Kind kind = Kind::kJoin;
  std::string text;   // join: who this is, for people; put: the key; gather: the prefix
  std::string value;  // put
  std::uint32_t count =
      0;  // join: ranks of the job as this rank has it; gather: keys prefix0..prefix(count-1)
  std::uint32_t timeout_ms = 0;  // gather
};
struct Reply {
  enum class Kind : std::uint8_t { kDone = 1, kValues = 2, kFailed = 3 };
  Kind kind = Kind::kDone;
  std::vector<std::string> values;  // of a gather
  ErrorCode code = ErrorCode::kOk;  // of a failure
  std::string text;
};
Bytes encode(const Request& m);
Bytes encode(const Reply& m);
std::optional<Request> parse_request(std::span<const std::byte> bytes);
std::optional<Reply> parse_reply(std::span<const std::byte> bytes);

// What a rank tells all others of itself.
struct Card {
  std::string host;     // name, for people
  std::string host_id;  // equal where processes can share memory and reach each other over loopback
  std::int64_t pid = 0;
  std::string place;    // where on its host it may run, for people: "cores 0-3, NUMA node 0"
  std::string address;  // of its listener
  std::uint16_t port = 0;
  std::string path;  // of its data paths, for their peers
};
std::string encode(const Card& m);
std::optional<Card> parse_card(std::string_view bytes);

// ---- watchdog

struct Control {
  enum class Kind : std::uint8_t {
    kHeartbeat = 1,
    kQuestion,  // what do you wait for?
    kAnswer,
    kProposal,  // to the lowest rank that lives: this is my verdict
    kVerdict,   // to all: the group has ended
    kFarewell,  // the sender's transport has closed in order
    kRegroup,   // to the lowest survivor: I live and will be in the next group
    kMembers,   // from it to all survivors: the members of the next group, by their present ranks
    kCard,      // to all of them: what the next group's data paths need of the sender; number: which exchange
  };
  Kind kind = Kind::kHeartbeat;
  std::uint32_t epoch = 0;   // of the sender's group: survivors go on over the same connections
  std::uint64_t number = 0;  // of the question; of the next group
  std::int64_t last_call_ns = -1;
  bool waiting = false;
  std::vector<std::int32_t> ranks;  // answer: waited for; members: the members
  ErrorCode code = ErrorCode::kOk;
  std::int32_t culprit = -1;
  std::int32_t reporter = -1;
  std::int32_t chunk = -1;
  std::string phase;
  std::string text;
};
Bytes encode(const Control& m);
// A message of this epoch that names a rank outside 0..num_ranks-1 is no message; of another epoch, the caller must not
// use its ranks.
std::optional<Control> parse_control(std::span<const std::byte> bytes, std::int32_t num_ranks,
                                     std::uint32_t epoch);

// ---- data

inline constexpr std::size_t kDataHeaderBytes = 40;
struct DataHeader {
  std::uint32_t channel = 0;
  std::uint32_t window = 0;
  std::uint32_t signal = 0;
  std::int64_t offset_bytes = 0;
  std::int64_t bytes = 0;
};
void encode(const DataHeader& m, std::span<std::byte, kDataHeaderBytes> out);
std::optional<DataHeader> parse_data_header(std::span<const std::byte, kDataHeaderBytes> bytes);

}  // namespace sluice::comm::wire
