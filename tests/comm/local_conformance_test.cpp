// The conformance suite over the local transport, by number of ranks and kind of link.
#include <memory>
#include <thread>

#include "transport_conformance.hpp"

namespace sluice::comm::conformance {
namespace {

enum class Links { kUnlimited, kEmulated, kEmulatedAcross };

struct Setup {
  std::int32_t num_ranks;
  std::int32_t num_nodes;
  Links links;
};

std::string setup_name(const Setup& s) {
  const char* links = s.links == Links::kUnlimited  ? "unlimited"
                      : s.links == Links::kEmulated ? "emulated"
                                                    : "emulated_across";
  return std::to_string(s.num_ranks) + "_ranks_" + std::to_string(s.num_nodes) + "_nodes_" + links;
}

Topology make_topology(const Setup& s) {
  Topology topology = Topology::uniform(s.num_ranks, s.num_nodes);
  const LinkSpeed fast{.bytes_per_s = 4e9, .latency = std::chrono::microseconds(10)};
  const LinkSpeed slow{.bytes_per_s = 1e9, .latency = std::chrono::microseconds(50)};
  if (s.links == Links::kEmulated) topology.in_node = fast;
  if (s.links != Links::kUnlimited) topology.across_nodes = slow;
  topology.set_declared(true);
  return topology;
}

class LocalConformance : public ::testing::TestWithParam<std::tuple<Setup, Case>> {};

TEST_P(LocalConformance, Holds) {
  const auto& [setup, conformance_case] = GetParam();
  auto transports = make_local_group(make_topology(setup));
  const std::int64_t large_bytes = setup.num_ranks <= 2 && setup.links == Links::kUnlimited
                                       ? std::int64_t{64} << 20
                                       : std::int64_t{2} << 20;
  std::vector<std::thread> threads;
  for (auto& transport : transports) {
    threads.emplace_back([&, body = conformance_case.run] {
      transport->set_timeout(std::chrono::seconds(30));
      Collectives collectives(*transport);
      body({*transport, collectives, kChannelsPerCase, large_bytes});
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& transport : transports)
    EXPECT_FALSE(transport->aborted()) << transport->abort_record().status.message;
}

INSTANTIATE_TEST_SUITE_P(
    Local, LocalConformance,
    ::testing::Combine(::testing::Values(Setup{1, 1, Links::kUnlimited}, Setup{2, 1, Links::kUnlimited},
                                         Setup{3, 1, Links::kUnlimited}, Setup{4, 2, Links::kUnlimited},
                                         Setup{8, 2, Links::kUnlimited}, Setup{1, 1, Links::kEmulated},
                                         Setup{2, 2, Links::kEmulated}, Setup{3, 3, Links::kEmulatedAcross},
                                         Setup{4, 2, Links::kEmulated}, Setup{4, 2, Links::kEmulatedAcross},
                                         Setup{8, 2, Links::kEmulated}),
                       ::testing::ValuesIn(kCases)),
    [](const auto& info) {
      return setup_name(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
    });

}  // namespace
}  // namespace sluice::comm::conformance
