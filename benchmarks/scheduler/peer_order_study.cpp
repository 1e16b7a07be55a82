// Which order of peers is best under which traffic: completion over the floor (largest row or column sum), the mean and the
// worst over seeds. No clock: the figures are those of a model and the same everywhere.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "sluice/scheduler/peer_order.hpp"

namespace {

using namespace sluice;
using Draw = std::function<double(std::mt19937_64&, std::size_t, std::size_t, std::size_t)>;

double floor_of(const std::vector<double>& bytes, std::size_t n) {
  double out = 0;
  for (std::size_t i = 0; i < n; ++i) {
    double row = 0, column = 0;
    for (std::size_t k = 0; k < n; ++k)
      if (k != i) {
        row += bytes[i * n + k];
        column += bytes[k * n + i];
      }
    out = std::max({out, row, column});
  }
  return out;
}

}  // namespace

int main() {
  const auto uniform = [](std::mt19937_64& rng) { return std::uniform_real_distribution<double>(0, 1)(rng); };
  const std::vector<std::pair<std::string, Draw>> kinds = {
      {"even", [](std::mt19937_64&, std::size_t, std::size_t, std::size_t) { return 100.0; }},
      {"even +- 20%",
       [&](std::mt19937_64& rng, std::size_t, std::size_t, std::size_t) { return 80 + 40 * uniform(rng); }},
      {"Zipf receivers",
       [&](std::mt19937_64& rng, std::size_t, std::size_t d, std::size_t) {
         return 1000.0 / (1 + static_cast<double>(d)) * (0.8 + 0.4 * uniform(rng));
       }},
      {"one pair in four", [&](std::mt19937_64& rng, std::size_t, std::size_t,
                               std::size_t) { return rng() % 4 == 0 ? 100 * uniform(rng) : 0; }},
      {"log-normal pairs", [](std::mt19937_64& rng, std::size_t, std::size_t, std::size_t) {
         return std::exp(std::normal_distribution<double>(0, 1.2)(rng));
       }}};
  std::printf("%-18s %6s %-9s", "traffic", "ranks", "links");
  for (const char* name : {"rotation", "longest-first", "open-shop", "rounds"}) std::printf(" %20s", name);
  std::printf("\n");
  for (const auto& [name, traffic] : kinds)
    for (const std::size_t n : {8u, 32u})
      for (const bool blocking : {true, false}) {
        std::printf("%-18s %6zu %-9s", name.c_str(), n, blocking ? "blocking" : "sharing");
        for (const PeerOrder order :
             {PeerOrder::kRotation, PeerOrder::kLongestFirst, PeerOrder::kOpenShop, PeerOrder::kRounds}) {
          double sum = 0, worst = 0;
          constexpr int kSeeds = 20;
          for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
            std::mt19937_64 rng(seed);
            std::vector<double> bytes(n * n, 0);
            for (std::size_t s = 0; s < n; ++s)
              for (std::size_t d = 0; d < n; ++d)
                if (s != d) bytes[s * n + d] = traffic(rng, s, d, n);
            const double over =
                completion(bytes, peer_orders(order, bytes, static_cast<std::int32_t>(n)), blocking) /
                floor_of(bytes, n);
            sum += over;
            worst = std::max(worst, over);
          }
          std::printf("      %6.3f (%6.3f)", sum / kSeeds, worst);
        }
        std::printf("\n");
      }
}
