// In which order a rank sends to its peers. Each receiver takes one message at a time, so under skew the order decides
// how long receivers stand idle while others queue.
//
//   rotation       the next rank first; what templates do by themselves. Without skew nothing is better
//   longest-first  the largest message first
//   open-shop      greedy: whenever a sender and a receiver are free, the pair with the most work left between sender and
//                  receiver goes (longest remaining first; Gonzalez & Sahni, J. ACM 1976, name the problem)
//   rounds         the matrix is taken apart into matchings, the one with the largest smallest entry first (Birkhoff
//                  1946; a message that a round does not finish counts with its first round)
//
// Deterministic. Thread-safety: pure. Errors: kInvalidArgument on sizes.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "sluice/scheduler/plan_summary.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

// X(enumerator, text)
#define SLUICE_PEER_ORDER_LIST(X)   \
  X(kRotation, "rotation")          \
  X(kLongestFirst, "longest-first") \
  X(kOpenShop, "open-shop")         \
  X(kRounds, "rounds")

enum class PeerOrder : std::uint8_t {
#define SLUICE_X(name, text) name,
  SLUICE_PEER_ORDER_LIST(SLUICE_X)
#undef SLUICE_X
};
std::string_view to_string(PeerOrder order) noexcept;

// For every sender its receivers, first one first; all but itself are there, those without bytes last.
// bytes: double [num_ranks, num_ranks], from row to column; the diagonal does not count
std::vector<std::vector<std::int32_t>> peer_orders(PeerOrder order, std::span<const double> bytes,
                                                   std::int32_t num_ranks);

// When the last message has arrived if senders keep that order: the figure that an order is about. The floor is the
// largest row or column sum.
//   blocking  a message holds sender and receiver at once; receivers take senders as they ask
//   else      the queue model of the simulator: a busy receiver holds up its own messages only
double completion(std::span<const double> bytes, const std::vector<std::vector<std::int32_t>>& orders,
                  bool blocking);

// The order with the least completion; of equal ones the first of the list, so rotation where it is as good. What a plan
// would carry: a pure function of counts that all ranks have.
PeerOrder best_peer_order(std::span<const double> bytes, std::int32_t num_ranks, bool blocking);

// The rows that ranks put to each other over a hop. double [num_ranks, num_ranks]
std::vector<double> hop_rows(const PlanSummary& summary, std::int32_t hop);

// Reorders the puts (and, by the transposed matrix, the returns) of one hop in the templates of some or all ranks of a
// group: within every chunk, in place. What they wait for and raise does not change, so ranks need not agree.
void apply_peer_order(std::span<Template> templates, std::int32_t hop, PeerOrder order,
                      std::span<const double> bytes);

}  // namespace sluice
