// All ranks of a group in one thread: builders run in lockstep and the exchanges are memory copies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "sluice/scheduler/plan.hpp"

namespace sluice::testing {

// Routings of all ranks.
struct World {
  Topology topology;
  Placement placement;
  std::vector<Routing> routings;  // [num_ranks]
};

// A routing with 0..max_routes distinct experts a token; experts are drawn with a power-law preference `skew`.
inline Routing random_routing(std::mt19937_64& rng, std::int64_t num_tokens, std::int32_t num_experts,
                              std::int32_t min_routes, std::int32_t max_routes, double skew = 0) {
  std::vector<double> popularity(static_cast<std::size_t>(num_experts));
  for (std::size_t e = 0; e < popularity.size(); ++e) popularity[e] = 1.0 / std::pow(double(e) + 1.0, skew);
  Routing out;
  out.num_experts = num_experts;
  std::uniform_int_distribution<std::int32_t> routes(min_routes, max_routes);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<std::pair<double, std::int32_t>> keys(static_cast<std::size_t>(num_experts));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    // The k largest of log(u)/p: weighted draw without replacement (Efraimidis & Spirakis 2006).
    for (std::int32_t e = 0; e < num_experts; ++e)
      keys[static_cast<std::size_t>(e)] = {
          -std::log(1 - uniform(rng)) / popularity[static_cast<std::size_t>(e)], e};
    const auto k = static_cast<std::ptrdiff_t>(routes(rng));
    std::partial_sort(keys.begin(), keys.begin() + k, keys.end());
    std::vector<std::int32_t> chosen;
    for (std::ptrdiff_t i = 0; i < k; ++i) chosen.push_back(keys[static_cast<std::size_t>(i)].second);
    std::sort(chosen.begin(), chosen.end());
    for (const std::int32_t e : chosen) {
      out.expert.push_back(e);
      out.weight.push_back(static_cast<float>(uniform(rng)));
    }
    out.row_ptr.push_back(static_cast<std::int64_t>(out.expert.size()));
  }
  return out;
}

// Moves the blocks of all ranks; received[r] is laid out as rank r expects. Sizes that differ between the sides throw,
// or, when `tampered`, are cut or filled with zeros.
template <typename Get, typename Expected>
std::vector<std::vector<std::int32_t>> exchange_headers(std::vector<PlanBuilder>& builders, Get&& sent,
                                                        Expected&& expected, bool tampered) {
  std::vector<std::vector<std::int32_t>> received(builders.size());
  for (std::size_t r = 0; r < builders.size(); ++r)
    for (const auto& want : expected(builders[r])) {
      const std::size_t end = received[r].size() + static_cast<std::size_t>(want.num_words);
      const auto headers = sent(builders[want.peer.index()]);
      for (const auto& message : headers.messages)
        if (message.peer.index() == r) {
          if (message.num_words != want.num_words && !tampered)
            throw std::runtime_error("message sizes differ between sides");
          const auto block = headers.words.subspan(static_cast<std::size_t>(message.word_begin),
                                                   static_cast<std::size_t>(message.num_words));
          received[r].insert(received[r].end(), block.begin(), block.end());
        }
      if (tampered) received[r].resize(end, 0);
    }
  return received;
}

inline std::vector<std::int64_t> all_to_all(std::size_t num_ranks, std::size_t per_peer,
                                            const std::vector<std::vector<std::int64_t>>& sent,
                                            std::size_t rank) {
  std::vector<std::int64_t> out;
  for (std::size_t s = 0; s < num_ranks; ++s)
    out.insert(out.end(), sent[s].begin() + static_cast<std::ptrdiff_t>(rank * per_peer),
               sent[s].begin() + static_cast<std::ptrdiff_t>((rank + 1) * per_peer));
  return out;
}

inline std::vector<PlanBuilder> make_builders(const World& world, PlanOptions options) {
  std::vector<PlanBuilder> builders;
  for (std::int32_t r = 0; r < world.topology.num_ranks(); ++r)
    builders.emplace_back(RankId(r), world.topology, world.placement, options);
  return builders;
}

// Builds the plans of all ranks. `tamper(step, rank, values)` may change what a rank receives (fault tests).
struct NoTamper {
  template <typename Values>
  void operator()(int, std::size_t, Values&) const {}
};

template <typename Tamper = NoTamper>
void build_plans(std::vector<PlanBuilder>& builders, const World& world, std::vector<Plan>& plans,
                 Tamper&& tamper = {}, bool tampered = false) {
  const std::size_t n = builders.size();
  plans.resize(n);
  std::vector<std::int64_t> gathered;
  for (std::size_t r = 0; r < n; ++r) {
    builders[r].begin(world.routings[r], plans[r]);
    gathered.insert(gathered.end(), builders[r].summary().begin(), builders[r].summary().end());
  }
  for (std::size_t r = 0; r < n; ++r) {
    auto in = gathered;
    tamper(0, r, in);
    builders[r].take_summaries(in);
  }
  std::vector<std::vector<std::int64_t>> sent(n);
  for (std::size_t r = 0; r < n; ++r)
    sent[r].assign(builders[r].counts().begin(), builders[r].counts().end());
  for (std::size_t r = 0; r < n; ++r) {
    auto in = all_to_all(n, PlanBuilder::kCountsPerPeer, sent, r);
    tamper(1, r, in);
    builders[r].take_counts(in);
  }
  for (std::size_t r = 0; r < n; ++r)
    sent[r].assign(builders[r].offsets().begin(), builders[r].offsets().end());
  for (std::size_t r = 0; r < n; ++r) {
    auto in = all_to_all(n, PlanBuilder::kOffsetsPerPeer, sent, r);
    tamper(2, r, in);
    builders[r].take_offsets(in);
  }
  auto words = exchange_headers(
      builders, [](PlanBuilder& b) { return b.headers1(); },
      [](PlanBuilder& b) { return b.expected_headers1(); }, tampered);
  for (std::size_t r = 0; r < n; ++r) {
    tamper(3, r, words[r]);
    builders[r].take_headers1(words[r]);
  }
  words = exchange_headers(
      builders, [](PlanBuilder& b) { return b.headers2(); },
      [](PlanBuilder& b) { return b.expected_headers2(); }, tampered);
  for (std::size_t r = 0; r < n; ++r) {
    tamper(4, r, words[r]);
    builders[r].take_headers2(words[r]);
  }
}

inline std::vector<Plan> build_plans(const World& world, PlanOptions options) {
  auto builders = make_builders(world, options);
  std::vector<Plan> plans;
  build_plans(builders, world, plans);
  return plans;
}

}  // namespace sluice::testing
