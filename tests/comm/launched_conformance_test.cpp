// The conformance suite over a transport whose ranks are processes: launched_conformance_test TRANSPORT, started by a
// launcher. Every rank runs all cases in the same order on one transport. Rank 0 prints the course of the tests, the
// others their failures only.
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>

#include "transport_conformance.hpp"

namespace sluice::comm::conformance {
namespace {

std::string transport_name;
std::unique_ptr<Transport> transport;
std::unique_ptr<Collectives> first;

class LaunchedConformance : public ::testing::TestWithParam<Case> {};

TEST_P(LaunchedConformance, Holds) {
  for (const Case& c : kCases) {
    if (std::string_view(c.name) != GetParam().name) continue;
    const std::int64_t large_bytes = (transport->num_ranks() <= 2 ? std::int64_t{64} : std::int64_t{8}) << 20;
    c.run({*transport, *first, first_channel(c), large_bytes});
  }
  EXPECT_FALSE(transport->aborted()) << transport->abort_record().status.message;
}

INSTANTIATE_TEST_SUITE_P(Launched, LaunchedConformance, ::testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(LaunchedTransport, DiscoversOneNode) {
  EXPECT_EQ(transport->topology().num_nodes(), 1);
  EXPECT_FALSE(transport->topology().declared());
}

TEST(LaunchedTransport, TopologyOverrideMustFit) {
  const Topology larger = Topology::uniform(transport->num_ranks() + 1, 1);
  EXPECT_EQ(code_of([&] { (void)load_transport(transport_name, &larger); }), ErrorCode::kInvalidConfig);
}

TEST(LaunchedTransport, ASecondGroupLivesBesideTheFirst) {
  Topology pretended = Topology::uniform(transport->num_ranks(), transport->num_ranks());
  pretended.set_declared(true);
  const auto second = load_transport(transport_name, &pretended);
  EXPECT_EQ(second->topology().num_nodes(), transport->num_ranks());
  Collectives own(*second);
  SLUICE_EXPECT_OK(own.barrier("second"));
  SLUICE_EXPECT_OK(first->barrier("first"));
}

// More than two sizes beyond what 32 bits count, in one message. 6 GiB a rank, so it runs by its own name only.
TEST(LaunchedTransport, DISABLED_MultiGigabyte) {
  const auto group = load_transport(transport_name, nullptr);
  group->set_timeout(std::chrono::seconds(120));
  Transport& t = *group;
  constexpr std::int64_t kBytes = (std::int64_t{5} << 29) + 12345;  // 2.5 GiB
  const std::int32_t me = t.rank().value, n = t.num_ranks();
  std::vector<std::byte> window(static_cast<std::size_t>(me < 2 ? kBytes : 0), kPoison), source;
  t.open_channel(1, 1, 2);
  t.set_window(1, 0, window);
  // Ranks 0 and 1 alone: rank 0 sends, then rank 1.
  for (std::int32_t from = 0; from < std::min(n, 2); ++from) {
    const std::int32_t to = (from + 1) % std::min(n, 2);
    if (me == to) {
      const Expect e{
          .peer = RankId(from), .channel = 1, .window = 0, .offset_bytes = 0, .bytes = kBytes, .signal = 0};
      t.expect({&e, 1});
      t.put({.peer = RankId(from), .channel = 1, .source = {}, .signal = 1});
    }
    if (me == from) {
      source.resize(static_cast<std::size_t>(kBytes));
      for (std::size_t i = 0; i < source.size(); i += 4096)
        source[i] = content(from, to, 0, static_cast<std::int64_t>(i));
      source.back() = std::byte{0x5A};
      const Expect e{.peer = RankId(to), .channel = 1, .signal = 1};
      t.expect({&e, 1});
      SLUICE_EXPECT_OK(t.wait({.channel = 1, .signal = 1, .value = 1, .phase = "ready"}));
      t.put(
          {.peer = RankId(to), .channel = 1, .window = 0, .offset_bytes = 0, .source = source, .signal = 0});
      SLUICE_EXPECT_OK(t.wait_for_puts(1, me == to ? 2 : from == 0 ? 1 : 2));
    }
    if (me == to) {
      SLUICE_EXPECT_OK(t.wait({.channel = 1, .signal = 0, .value = 1, .phase = "data"}));
      std::int64_t wrong = 0;
      for (std::size_t i = 0; i < window.size(); i += 4096)
        wrong += window[i] != content(from, to, 0, static_cast<std::int64_t>(i));
      EXPECT_EQ(wrong, 0);
      EXPECT_EQ(window.back(), std::byte{0x5A});
    }
  }
  SLUICE_EXPECT_OK(Collectives(t).barrier("done"));
}

}  // namespace
}  // namespace sluice::comm::conformance

int main(int argc, char** argv) {
  using namespace sluice::comm::conformance;
  ::testing::InitGoogleTest(&argc, argv);
  if (argc != 2) {
    std::fprintf(stderr, "usage: launched_conformance_test TRANSPORT [GoogleTest options]\n");
    return 2;
  }
  transport_name = argv[1];
  transport = sluice::comm::load_transport(transport_name, nullptr);
  transport->set_timeout(std::chrono::seconds(30));
  first = std::make_unique<sluice::comm::Collectives>(*transport);
  if (transport->rank().value != 0) {
    class FailuresOnly : public ::testing::EmptyTestEventListener {
      void OnTestPartResult(const ::testing::TestPartResult& result) override {
        if (result.failed())
          std::fprintf(stderr, "rank %d: %s:%d: %s\n", transport->rank().value, result.file_name(),
                       result.line_number(), result.message());
      }
    };
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOnly);
  }
  const int rc = RUN_ALL_TESTS();
  first.reset();
  transport.reset();
  return rc;
}
