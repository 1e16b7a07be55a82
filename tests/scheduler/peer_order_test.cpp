#include "sluice/scheduler/peer_order.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "expect_error.hpp"

namespace sluice {
namespace {

constexpr PeerOrder kOrders[] = {PeerOrder::kRotation, PeerOrder::kLongestFirst, PeerOrder::kOpenShop,
                                 PeerOrder::kRounds};

double floor_of(const std::vector<double>& bytes, std::size_t n) {
  double out = 0;
  for (std::size_t i = 0; i < n; ++i) {
    double row = 0, column = 0;
    for (std::size_t k = 0; k < n; ++k) {
      if (k == i) continue;
      row += bytes[i * n + k];
      column += bytes[k * n + i];
    }
    out = std::max({out, row, column});
  }
  return out;
}

TEST(PeerOrder, EveryPeerOnceAndNoFasterThanTheFloor) {
  for (const std::size_t n : {1u, 2u, 3u, 8u, 17u})
    for (const std::uint64_t seed : {1, 2, 3, 4}) {
      std::mt19937_64 rng(seed);
      std::vector<double> bytes(n * n);
      for (double& b : bytes) b = rng() % 3 == 0 ? 0 : static_cast<double>(rng() % 1000);
      double total = 0;
      for (const double b : bytes) total += b;
      for (const PeerOrder order : kOrders) {
        SCOPED_TRACE(str(to_string(order), " n ", n, " seed ", seed));
        const auto orders = peer_orders(order, bytes, static_cast<std::int32_t>(n));
        for (std::size_t s = 0; s < n; ++s) {
          auto sorted = orders[s];
          std::sort(sorted.begin(), sorted.end());
          std::vector<std::int32_t> all;
          for (std::size_t d = 0; d < n; ++d)
            if (d != s) all.push_back(static_cast<std::int32_t>(d));
          EXPECT_EQ(sorted, all);
        }
        for (const bool blocking : {true, false}) {
          const double t = completion(bytes, orders, blocking);
          EXPECT_GE(t, floor_of(bytes, n));
          EXPECT_LE(t, total);
        }
      }
    }
}

TEST(PeerOrder, EvenTrafficTakesNoLongerThanItMust) {
  const std::vector<double> bytes(64, 5);
  for (const PeerOrder order : kOrders)
    for (const bool blocking : {true, false})
      EXPECT_EQ(completion(bytes, peer_orders(order, bytes, 8), blocking), 35) << to_string(order);
}

// Messages of very different sizes, no end much busier than the others: who waits for whom decides.
TEST(PeerOrder, OpenShopBeatsRotationUnderSkew) {
  double rotation = 0, open_shop = 0;
  for (const std::uint64_t seed : {1, 2, 3, 4, 5, 6, 7, 8}) {
    std::mt19937_64 rng(seed);
    std::vector<double> bytes(256);
    for (double& b : bytes) b = std::exp(static_cast<double>(rng() % 1000) / 250);
    rotation += completion(bytes, peer_orders(PeerOrder::kRotation, bytes, 16), true) / floor_of(bytes, 16);
    open_shop += completion(bytes, peer_orders(PeerOrder::kOpenShop, bytes, 16), true) / floor_of(bytes, 16);
  }
  std::printf("time over floor: rotation %.3f, open-shop %.3f\n", rotation / 8, open_shop / 8);
  EXPECT_LT(open_shop, 0.9 * rotation);
  EXPECT_EQ(best_peer_order(std::vector<double>(64, 5), 8, true), PeerOrder::kRotation);
}

TEST(PeerOrder, TemplatesStayValid) {
  const Topology topology = Topology::uniform(6, 2);
  std::vector<double> bytes(36);
  for (std::size_t i = 0; i < 36; ++i) bytes[i] = static_cast<double>((i * 7) % 11);
  for (const PeerOrder order : kOrders) {
    std::vector<Template> templates;
    for (std::int32_t r = 0; r < 6; ++r)
      templates.push_back(
          build_template(RankId(r), topology, {SchedulePolicy::kHierarchical, Exchange::kGateway, 2}));
    for (const std::int32_t hop : {1, 2}) apply_peer_order(templates, hop, order, bytes);
    EXPECT_NO_THROW(validate_group(templates));
  }
}

TEST(PeerOrder, RefusesNonsense) {
  const std::vector<double> bytes = {0, 1, -1, 0};
  expect_error(ErrorCode::kInvalidArgument, {"-1"}, [&] { peer_orders(PeerOrder::kRounds, bytes, 2); });
  expect_error(ErrorCode::kInvalidArgument, {"4 entries"},
               [&] { peer_orders(PeerOrder::kRounds, bytes, 3); });
}

}  // namespace
}  // namespace sluice
