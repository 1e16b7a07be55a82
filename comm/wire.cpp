#include "sluice/comm/wire.hpp"

#include <bit>
#include <concepts>
#include <cstring>

namespace sluice::comm::wire {
namespace {

static_assert(std::endian::native == std::endian::little, "messages are written as they lie in memory");

// The last digits are the version of everything in wire.hpp.
constexpr std::uint64_t kMagic = 0x3230'3145'4349'554cull;  // "LUICE102"
constexpr std::uint32_t kDataMagic = 0x31304453;            // "SD01"

class Writer {
 public:
  template <typename T>
  requires std::integral<T> || std::is_enum_v<T> Writer& add(T value) {
    return add_bytes(std::as_bytes(std::span(&value, 1)));
  }
  Writer& add_bytes(std::span<const std::byte> bytes) {
    out_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    return *this;
  }
  Writer& add_text(std::string_view text, std::size_t max_bytes) {
    text = text.substr(0, max_bytes);
    add(static_cast<std::uint32_t>(text.size()));
    return add_bytes(std::as_bytes(std::span(text.data(), text.size())));
  }
  Bytes take() const {
    const auto bytes = std::as_bytes(std::span(out_.data(), out_.size()));
    return Bytes(bytes.begin(), bytes.end());
  }

 private:
  std::string out_;
};

// Reads what is there; once something is missing or out of its bound, ok() stays false and values are zero.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}
  bool ok() const { return ok_; }
  // All was read and nothing is left.
  bool done() const { return ok_ && rest_.empty(); }
  void require(bool condition) { ok_ = ok_ && condition; }

  template <typename T>
  requires std::integral<T> || std::is_enum_v<T> T get() {
    T value{};
    const auto from = get_bytes(sizeof value);
    if (ok_) std::memcpy(&value, from.data(), sizeof value);
    return value;
  }
  // A code in first..last.
  template <typename E>
  E get_code(E first, E last) {
    const auto value = get<std::underlying_type_t<E>>();
    require(value >= static_cast<std::underlying_type_t<E>>(first) &&
            value <= static_cast<std::underlying_type_t<E>>(last));
    return ok_ ? static_cast<E>(value) : first;
  }
  bool get_bool() {
    const auto value = get<std::uint8_t>();
    require(value <= 1);
    return ok_ && value == 1;
  }
  template <std::size_t N>
  std::array<std::byte, N> get_array() {
    std::array<std::byte, N> out{};
    const auto from = get_bytes(N);
    if (ok_) std::memcpy(out.data(), from.data(), N);
    return out;
  }
  std::string get_text(std::size_t max_bytes) {
    const auto size = get<std::uint32_t>();
    require(size <= max_bytes);
    const auto from = get_bytes(ok_ ? size : 0);
    return ok_ ? std::string(reinterpret_cast<const char*>(from.data()), from.size()) : std::string();
  }

 private:
  std::span<const std::byte> get_bytes(std::size_t size) {
    require(size <= rest_.size());
    if (!ok_) return {};
    const auto out = rest_.first(size);
    rest_ = rest_.subspan(size);
    return out;
  }
  std::span<const std::byte> rest_;
  bool ok_ = true;
};

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

Bytes hello_body(const ClientHello& m) {
  return Writer().add(kMagic).add(m.job).add(m.purpose).add(m.rank).add(m.epoch).add_bytes(m.nonce).take();
}

}  // namespace

std::string_view describe(Verdict verdict) {
  switch (verdict) {
    case Verdict::kWelcome:
      return "welcome";
    case Verdict::kWrongSecret:
      return "the secrets differ; give all ranks the same secret file, or start them with one launcher";
    case Verdict::kStaleJob:
      return "another job or an earlier group listens there; end what is left of it, or choose another port";
    case Verdict::kNotExpected:
      return "that rank is there already, or is no rank of this job; start every rank once";
    case Verdict::kWrongVersion:
      return "it runs another version of Sluice; install one version everywhere";
  }
  return "unknown answer";
}

Bytes encode(const ServerHello& m) {
  return Writer().add(kMagic).add_bytes(m.nonce).take();
}
Bytes encode(const ClientHello& m) {
  return Writer().add_bytes(hello_body(m)).add_bytes(m.mac).take();
}
Bytes encode(const ServerReply& m) {
  return Writer().add(kMagic).add(m.verdict).add_bytes(m.mac).take();
}

std::optional<ServerHello> parse_server_hello(std::span<const std::byte> bytes) {
  Reader r(bytes);
  r.require(r.get<std::uint64_t>() == kMagic);
  ServerHello m;
  m.nonce = r.get_array<32>();
  return r.done() ? std::optional(m) : std::nullopt;
}
std::optional<ClientHello> parse_client_hello(std::span<const std::byte> bytes) {
  Reader r(bytes);
  r.require(r.get<std::uint64_t>() == kMagic);
  ClientHello m;
  m.job = r.get<std::uint64_t>();
  m.purpose = r.get_code(Purpose::kRendezvous, Purpose::kData);
  m.rank = r.get<std::int32_t>();
  r.require(m.rank >= 0 && m.rank < static_cast<std::int32_t>(kMaxRanks));
  m.epoch = r.get<std::uint32_t>();
  m.nonce = r.get_array<32>();
  m.mac = r.get_array<32>();
  return r.done() ? std::optional(m) : std::nullopt;
}
std::optional<ServerReply> parse_server_reply(std::span<const std::byte> bytes) {
  Reader r(bytes);
  r.require(r.get<std::uint64_t>() == kMagic);
  ServerReply m;
  m.verdict = r.get_code(Verdict::kWelcome, Verdict::kWrongVersion);
  m.mac = r.get_array<32>();
  return r.done() ? std::optional(m) : std::nullopt;
}

Mac client_mac(const Secret& secret, const ClientHello& hello, const Nonce& server_nonce) {
  return secret.mac({bytes_of("sluice client"), hello_body(hello), server_nonce});
}
Mac server_mac(const Secret& secret, const ClientHello& hello, const Nonce& server_nonce) {
  return secret.mac({bytes_of("sluice server"), hello_body(hello), server_nonce});
}

Bytes encode(const Request& m) {
  return Writer()
      .add(m.kind)
      .add_text(m.text, kMaxKeyBytes)
      .add_text(m.value, kMaxValueBytes)
      .add(m.count)
      .add(m.timeout_ms)
      .take();
}
Bytes encode(const Reply& m) {
  Writer w;
  w.add(m.kind).add(static_cast<std::int32_t>(m.code)).add_text(m.text, kMaxTextBytes);
  w.add(static_cast<std::uint32_t>(m.values.size()));
  for (const std::string& value : m.values) w.add_text(value, kMaxValueBytes);
  return w.take();
}
std::optional<Request> parse_request(std::span<const std::byte> bytes) {
  Reader r(bytes);
  Request m;
  m.kind = r.get_code(Request::Kind::kJoin, Request::Kind::kLeave);
  m.text = r.get_text(kMaxKeyBytes);
  m.value = r.get_text(kMaxValueBytes);
  m.count = r.get<std::uint32_t>();
  r.require(m.count <= kMaxRanks);
  m.timeout_ms = r.get<std::uint32_t>();
  return r.done() ? std::optional(std::move(m)) : std::nullopt;
}
std::optional<Reply> parse_reply(std::span<const std::byte> bytes) {
  Reader r(bytes);
  Reply m;
  m.kind = r.get_code(Reply::Kind::kDone, Reply::Kind::kFailed);
  m.code = r.get_code(ErrorCode::kOk, ErrorCode::kInternal);
  m.text = r.get_text(kMaxTextBytes);
  const auto count = r.get<std::uint32_t>();
  r.require(count <= kMaxRanks);
  for (std::uint32_t i = 0; r.ok() && i < count; ++i) m.values.push_back(r.get_text(kMaxValueBytes));
  return r.done() ? std::optional(std::move(m)) : std::nullopt;
}

std::string encode(const Card& m) {
  const Bytes out = Writer()
                        .add_text(m.host, 256)
                        .add_text(m.host_id, 1024)
                        .add(m.pid)
                        .add_text(m.place, 256)
                        .add_text(m.address, 256)
                        .add(m.port)
                        .add_text(m.path, kMaxValueBytes / 2)
                        .take();
  return std::string(reinterpret_cast<const char*>(out.data()), out.size());
}
std::optional<Card> parse_card(std::string_view bytes) {
  Reader r(bytes_of(bytes));
  Card m;
  m.host = r.get_text(256);
  m.host_id = r.get_text(1024);
  m.pid = r.get<std::int64_t>();
  m.place = r.get_text(256);
  m.address = r.get_text(256);
  m.port = r.get<std::uint16_t>();
  m.path = r.get_text(kMaxValueBytes / 2);
  r.require(m.pid > 0);
  return r.done() ? std::optional(std::move(m)) : std::nullopt;
}

Bytes encode(const Control& m) {
  Writer w;
  w.add(m.kind).add(m.epoch).add(m.number).add(m.last_call_ns).add(static_cast<std::uint8_t>(m.waiting));
  w.add(static_cast<std::uint32_t>(m.ranks.size()));
  for (const std::int32_t rank : m.ranks) w.add(rank);
  w.add(static_cast<std::int32_t>(m.code)).add(m.culprit).add(m.reporter).add(m.chunk);
  w.add_text(m.phase, 256).add_text(m.text, kMaxTextBytes);
  return w.take();
}
std::optional<Control> parse_control(std::span<const std::byte> bytes, std::int32_t num_ranks,
                                     std::uint32_t epoch) {
  Reader r(bytes);
  Control m;
  m.kind = r.get_code(Control::Kind::kHeartbeat, Control::Kind::kCard);
  m.epoch = r.get<std::uint32_t>();
  const auto limit = m.epoch == epoch ? num_ranks : static_cast<std::int32_t>(kMaxRanks);
  const auto is_rank = [&](std::int32_t rank) { return rank >= 0 && rank < limit; };
  m.number = r.get<std::uint64_t>();
  m.last_call_ns = r.get<std::int64_t>();
  m.waiting = r.get_bool();
  const auto count = r.get<std::uint32_t>();
  r.require(count <= static_cast<std::uint32_t>(limit));
  for (std::uint32_t i = 0; r.ok() && i < count; ++i) {
    m.ranks.push_back(r.get<std::int32_t>());
    r.require(is_rank(m.ranks.back()) && (i == 0 || m.ranks[i - 1] < m.ranks[i]));
  }
  m.code = r.get_code(ErrorCode::kOk, ErrorCode::kInternal);
  m.culprit = r.get<std::int32_t>();
  m.reporter = r.get<std::int32_t>();
  m.chunk = r.get<std::int32_t>();
  r.require((m.culprit == -1 || is_rank(m.culprit)) && (m.reporter == -1 || is_rank(m.reporter)));
  m.phase = r.get_text(256);
  m.text = r.get_text(kMaxTextBytes);
  return r.done() ? std::optional(std::move(m)) : std::nullopt;
}

void encode(const DataHeader& m, std::span<std::byte, kDataHeaderBytes> out) {
  const std::uint32_t head[4] = {kDataMagic, m.channel, m.window, m.signal};
  std::memcpy(out.data(), head, 16);
  std::memcpy(out.data() + 16, &m.offset_bytes, 8);
  std::memcpy(out.data() + 24, &m.bytes, 8);
  // A cheap check against bytes that are no header at all; it is no protection against a liar.
  const std::uint64_t check = (std::uint64_t{m.channel} << 32 | m.signal) ^ (std::uint64_t{m.window} << 16) ^
                              static_cast<std::uint64_t>(m.offset_bytes) * 3 ^
                              static_cast<std::uint64_t>(m.bytes) * 5 ^ kMagic;
  std::memcpy(out.data() + 32, &check, 8);
}
std::optional<DataHeader> parse_data_header(std::span<const std::byte, kDataHeaderBytes> bytes) {
  DataHeader m;
  std::uint32_t head[4];
  std::memcpy(head, bytes.data(), 16);
  m.channel = head[1];
  m.window = head[2];
  m.signal = head[3];
  std::memcpy(&m.offset_bytes, bytes.data() + 16, 8);
  std::memcpy(&m.bytes, bytes.data() + 24, 8);
  std::array<std::byte, kDataHeaderBytes> again;
  encode(m, again);
  const bool valid = head[0] == kDataMagic && std::memcmp(again.data(), bytes.data(), again.size()) == 0 &&
                     m.channel < kMaxChannels && m.signal < kMaxSignals && m.offset_bytes >= 0 &&
                     m.bytes >= 0 && m.bytes <= (std::int64_t{1} << 48) &&
                     m.offset_bytes <= (std::int64_t{1} << 48);
  return valid ? std::optional(m) : std::nullopt;
}

}  // namespace sluice::comm::wire
