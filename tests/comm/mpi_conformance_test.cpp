// The conformance suite over the MPI transport. Run by mpirun; every rank runs all cases in the same order on one
// transport. Rank 0 prints the course of the tests, the others their failures only.
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>

#include "transport_conformance.hpp"

namespace sluice::comm::conformance {
namespace {

std::unique_ptr<Transport> transport;
std::unique_ptr<Collectives> first;

class MpiConformance : public ::testing::TestWithParam<Case> {};

TEST_P(MpiConformance, Holds) {
  for (const Case& c : kCases) {
    if (std::string_view(c.name) != GetParam().name) continue;
    const std::int64_t large_bytes = (transport->num_ranks() <= 2 ? std::int64_t{64} : std::int64_t{8}) << 20;
    c.run({*transport, *first, first_channel(c), large_bytes});
  }
  EXPECT_FALSE(transport->aborted()) << transport->abort_record().status.message;
}

INSTANTIATE_TEST_SUITE_P(Mpi, MpiConformance, ::testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(MpiTransport, DiscoversOneNode) {
  EXPECT_EQ(transport->topology().num_nodes(), 1);
  EXPECT_FALSE(transport->topology().declared());
}

TEST(MpiTransport, TopologyOverrideMustFit) {
  const Topology larger = Topology::uniform(transport->num_ranks() + 1, 1);
  EXPECT_EQ(code_of([&] { (void)load_transport("mpi", &larger); }), ErrorCode::kInvalidConfig);
}

TEST(MpiTransport, ASecondGroupLivesBesideTheFirst) {
  Topology pretended = Topology::uniform(transport->num_ranks(), transport->num_ranks());
  pretended.set_declared(true);
  const auto second = load_transport("mpi", &pretended);
  EXPECT_EQ(second->topology().num_nodes(), transport->num_ranks());
  Collectives own(*second);
  SLUICE_EXPECT_OK(own.barrier("second"));
  SLUICE_EXPECT_OK(first->barrier("first"));
}

}  // namespace
}  // namespace sluice::comm::conformance

int main(int argc, char** argv) {
  using namespace sluice::comm::conformance;
  ::testing::InitGoogleTest(&argc, argv);
  transport = sluice::comm::load_transport("mpi", nullptr);
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
