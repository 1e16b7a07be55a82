// The parsers of foreign bytes: what was written is read again, everything else is refused, and nothing crashes.
#include "sluice/comm/wire.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

namespace sluice::comm::wire {
namespace {

constexpr std::uint32_t kSeed = 20260714;

Control sample_control() {
  Control m;
  m.kind = Control::Kind::kVerdict;
  m.epoch = 3;
  m.number = 77;
  m.last_call_ns = -5;
  m.waiting = true;
  m.ranks = {0, 2, 3};
  m.code = ErrorCode::kTimeout;
  m.culprit = 2;
  m.reporter = 0;
  m.chunk = 4;
  m.phase = "dispatch";
  m.text = "rank 0 waited";
  return m;
}

TEST(Wire, ControlComesBack) {
  const Bytes bytes = encode(sample_control());
  const auto m = parse_control(bytes, 4, 3);
  ASSERT_TRUE(m);
  EXPECT_EQ(m->kind, Control::Kind::kVerdict);
  EXPECT_EQ(m->epoch, 3u);
  EXPECT_EQ(m->number, 77u);
  EXPECT_EQ(m->last_call_ns, -5);
  EXPECT_TRUE(m->waiting);
  EXPECT_EQ(m->ranks, (std::vector<std::int32_t>{0, 2, 3}));
  EXPECT_EQ(m->code, ErrorCode::kTimeout);
  EXPECT_EQ(m->culprit, 2);
  EXPECT_EQ(m->reporter, 0);
  EXPECT_EQ(m->chunk, 4);
  EXPECT_EQ(m->phase, "dispatch");
  EXPECT_EQ(m->text, "rank 0 waited");
  EXPECT_FALSE(parse_control(bytes, 3, 3)) << "rank 3 of 3 ranks";
  EXPECT_TRUE(parse_control(bytes, 3, 2)) << "another epoch has other ranks";
}

TEST(Wire, RanksAreAscending) {
  for (const std::vector<std::int32_t>& ranks : {std::vector<std::int32_t>{1, 1}, {2, 1}, {-1}, {4}}) {
    Control m;
    m.ranks = ranks;
    EXPECT_FALSE(parse_control(encode(m), 4, 0)) << ranks.front();
  }
}

// Cut anywhere, or with a byte too many, it is no message.
template <typename Parse>
void cut(const Bytes& bytes, Parse parse) {
  ASSERT_TRUE(parse(std::span<const std::byte>(bytes)));
  for (std::size_t n = 0; n < bytes.size(); ++n)
    EXPECT_FALSE(parse(std::span<const std::byte>(bytes).first(n))) << n << " of " << bytes.size();
  Bytes longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(parse(std::span<const std::byte>(longer)));
}

TEST(Wire, CutMessagesAreRefused) {
  cut(encode(sample_control()), [](auto b) { return parse_control(b, 4, 3).has_value(); });
  cut(encode(Request{
          .kind = Request::Kind::kPut, .text = "card/1", .value = "value", .count = 2, .timeout_ms = 3}),
      [](auto b) { return parse_request(b).has_value(); });
  cut(encode(Reply{
          .kind = Reply::Kind::kValues, .values = {"a", "", "ccc"}, .code = ErrorCode::kOk, .text = "t"}),
      [](auto b) { return parse_reply(b).has_value(); });
  cut(encode(ServerHello{}), [](auto b) { return parse_server_hello(b).has_value(); });
  cut(encode(ClientHello{.rank = 3}), [](auto b) { return parse_client_hello(b).has_value(); });
  cut(encode(ServerReply{}), [](auto b) { return parse_server_reply(b).has_value(); });
  const std::string card = encode(Card{.host = "h",
                                       .host_id = "id",
                                       .pid = 5,
                                       .place = "threads 0-3 of 8, NUMA node 0",
                                       .address = "127.0.0.1",
                                       .port = 9,
                                       .path = std::string("\0x", 2)});
  ASSERT_TRUE(parse_card(card));
  EXPECT_EQ(parse_card(card)->path.size(), 2u);
  for (std::size_t n = 0; n < card.size(); ++n) EXPECT_FALSE(parse_card(std::string_view(card).substr(0, n)));
}

TEST(Wire, LengthsBeyondTheirBoundsAreRefused) {
  // A text that claims to be 4 GiB, in every place where a length stands.
  for (std::size_t at = 0; at + 4 <= encode(sample_control()).size(); ++at) {
    Bytes bytes = encode(sample_control());
    std::memset(bytes.data() + at, 0xff, 4);
    (void)parse_control(bytes, 4, 3);
  }
  Request big{.kind = Request::Kind::kPut,
              .text = std::string(kMaxKeyBytes + 10, 'k'),
              .value = {},
              .count = 0,
              .timeout_ms = 0};
  ASSERT_TRUE(parse_request(encode(big)));
  EXPECT_EQ(parse_request(encode(big))->text.size(), kMaxKeyBytes);
}

TEST(Wire, RandomBytesNeverCrash) {
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  const Bytes seeds[] = {
      encode(sample_control()),
      encode(Request{.kind = Request::Kind::kJoin, .text = "x", .value = {}, .count = 4, .timeout_ms = 0}),
      encode(Reply{.kind = Reply::Kind::kValues, .values = {"a", "b"}, .code = ErrorCode::kOk, .text = {}}),
      encode(ClientHello{.rank = 1})};
  for (int i = 0; i < 200000; ++i) {
    Bytes bytes = seeds[static_cast<std::size_t>(i) % 4];
    for (unsigned k = random() % 4; k > 0; --k)
      if (!bytes.empty()) bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    if (random() % 4 == 0) bytes.resize(random() % (bytes.size() + 8));
    (void)parse_control(bytes, 4, 3);
    (void)parse_request(bytes);
    (void)parse_reply(bytes);
    (void)parse_client_hello(bytes);
    (void)parse_server_hello(bytes);
    (void)parse_server_reply(bytes);
    (void)parse_card(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
}

TEST(Wire, DataHeader) {
  std::array<std::byte, kDataHeaderBytes> bytes;
  encode(DataHeader{.channel = 5, .window = 2, .signal = 9, .offset_bytes = 1 << 20, .bytes = 33}, bytes);
  const auto m = parse_data_header(bytes);
  ASSERT_TRUE(m);
  EXPECT_EQ(m->channel, 5u);
  EXPECT_EQ(m->window, 2u);
  EXPECT_EQ(m->signal, 9u);
  EXPECT_EQ(m->offset_bytes, 1 << 20);
  EXPECT_EQ(m->bytes, 33);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    auto wrong = bytes;
    wrong[i] ^= std::byte{0x40};
    EXPECT_FALSE(parse_data_header(wrong)) << "byte " << i;
  }
  for (const DataHeader& bad : {DataHeader{.offset_bytes = -1}, DataHeader{.bytes = -1},
                                DataHeader{.channel = kMaxChannels}, DataHeader{.signal = kMaxSignals}}) {
    encode(bad, bytes);
    EXPECT_FALSE(parse_data_header(bytes));
  }
}

TEST(Wire, ProofsCoverEveryField) {
  const Secret secret = Secret::from_text("a secret of sixteen", "test");
  const Secret other = Secret::from_text("b secret of sixteen", "test");
  Nonce server{};
  ClientHello hello{.job = 1, .rank = 2, .epoch = 3};
  const Mac mac = client_mac(secret, hello, server);
  EXPECT_TRUE(equal(mac, client_mac(secret, hello, server)));
  EXPECT_FALSE(equal(mac, client_mac(other, hello, server)));
  EXPECT_FALSE(equal(mac, server_mac(secret, hello, server)));
  for (int field = 0; field < 6; ++field) {
    ClientHello h = hello;
    Nonce n = server;
    if (field == 0) h.job = 2;
    if (field == 1) h.rank = 1;
    if (field == 2) h.epoch = 4;
    if (field == 3) h.purpose = Purpose::kData;
    if (field == 4) h.nonce[0] = std::byte{1};
    if (field == 5) n[0] = std::byte{1};
    EXPECT_FALSE(equal(mac, client_mac(secret, h, n))) << "field " << field;
  }
}

}  // namespace
}  // namespace sluice::comm::wire
