#include "sluice/scheduler/routing.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace sluice {
namespace {

constexpr std::uint32_t kExponentBits = 0x7f800000u;

// Finds what is wrong with a routing already known to be wrong, and throws.
[[noreturn]] void throw_first_fault(const RoutingView& routing) {
  const std::int64_t num_tokens = routing.num_tokens();
  const std::int64_t num_routes = routing.num_routes();
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const std::int64_t begin = routing.row_ptr[static_cast<std::size_t>(t)];
    const std::int64_t end = routing.row_ptr[static_cast<std::size_t>(t) + 1];
    Require(begin <= end, ErrorCode::kInvalidRouting, "row_ptr descends at token ", t, ": row_ptr[", t,
            "] is ", begin, ", row_ptr[", t + 1, "] is ", end, "; it must ascend");
    Require(end <= num_routes, ErrorCode::kInvalidRouting, "row_ptr[", t + 1, "] of token ", t, " is ", end,
            ", beyond the ", num_routes, " routes");
  }
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const std::int64_t begin = routing.row_ptr[static_cast<std::size_t>(t)];
    const std::int64_t end = routing.row_ptr[static_cast<std::size_t>(t) + 1];
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const std::int32_t expert = routing.expert[at];
      Require(expert >= 0 && expert < routing.num_experts, ErrorCode::kInvalidRouting, "token ", t,
              ", route ", i, ": expert ", expert, " is outside 0..", routing.num_experts - 1);
      if (i > begin) {
        const std::int32_t previous = routing.expert[at - 1];
        Require(previous != expert, ErrorCode::kInvalidRouting, "token ", t, ", route ", i, ": expert ",
                expert, " appears twice in the token; add its weights into one route");
        Require(previous < expert, ErrorCode::kInvalidRouting, "token ", t, ", route ", i, ": expert ",
                expert, " comes after expert ", previous,
                "; experts of a token must ascend (routing_from_topk sorts them)");
      }
      Require(std::isfinite(routing.weight[at]), ErrorCode::kInvalidRouting, "token ", t, ", route ", i,
              ": the weight of expert ", expert, " is ", routing.weight[at], "; it must be finite");
    }
  }
  throw Error(ErrorCode::kInternal, "validate() found a fault in the routing that it could not name");
}

}  // namespace

void validate(const RoutingView& routing) {
  Require(routing.num_experts >= 0, ErrorCode::kInvalidRouting, "num_experts is ", routing.num_experts,
          "; it must not be negative");
  Require(!routing.row_ptr.empty(), ErrorCode::kInvalidRouting,
          "row_ptr is empty; it must have num_tokens + 1 entries, {0} for no tokens");
  Require(routing.row_ptr.front() == 0, ErrorCode::kInvalidRouting, "row_ptr[0] is ", routing.row_ptr.front(),
          "; it must be 0");
  Require(routing.weight.size() == routing.expert.size(), ErrorCode::kInvalidRouting, "there are ",
          routing.weight.size(), " weights for ", routing.expert.size(), " routes; there must be one each");
  const std::size_t num_routes = routing.expert.size();
  const std::size_t num_tokens = routing.row_ptr.size() - 1;

  // The good case takes straight loops without early exits, so that they vectorise; only a fault is looked
  // for slowly.
  const std::int64_t* row_ptr = routing.row_ptr.data();
  unsigned bad = 0;
  for (std::size_t t = 0; t < num_tokens; ++t) bad |= static_cast<unsigned>(row_ptr[t + 1] < row_ptr[t]);
  if (bad != 0) throw_first_fault(routing);
  Require(static_cast<std::uint64_t>(row_ptr[num_tokens]) == num_routes, ErrorCode::kInvalidRouting,
          "row_ptr[", num_tokens, "] (its last entry, after token ",
          static_cast<std::int64_t>(num_tokens) - 1, ") is ", row_ptr[num_tokens], " but there are ",
          num_routes, " routes");
  if (num_routes == 0) return;

  const std::int32_t* expert = routing.expert.data();
  const float* weight = routing.weight.data();
  const auto num_experts = static_cast<std::uint32_t>(routing.num_experts);
  std::uint32_t out_of_range = 0;
  std::uint32_t not_finite = 0;
  std::uint32_t not_ascending = 0;  // neighbours of the whole list that do not ascend
  for (std::size_t i = 0; i < num_routes; ++i)
    out_of_range |= static_cast<std::uint32_t>(static_cast<std::uint32_t>(expert[i]) >= num_experts);
  for (std::size_t i = 0; i < num_routes; ++i)
    not_finite |= static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(weight[i]) & kExponentBits) ==
                                             kExponentBits);
  Require(num_routes <= UINT32_MAX, ErrorCode::kInvalidRouting, "there are ", num_routes,
          " routes; one batch may have at most ", UINT32_MAX);  // the counters below have 32 bits
  for (std::size_t i = 1; i < num_routes; ++i)
    not_ascending += static_cast<std::uint32_t>(expert[i] <= expert[i - 1]);
  // They are allowed exactly where a token begins. Of tokens that begin at the same route (all but the last
  // are empty), the first is counted.
  std::uint32_t allowed = 0;
  for (std::size_t t = 1; t < num_tokens; ++t) {
    const auto start = static_cast<std::size_t>(row_ptr[t]);
    if (row_ptr[t] != row_ptr[t - 1] && start < num_routes)
      allowed += static_cast<std::uint32_t>(expert[start] <= expert[start - 1]);
  }
  if ((out_of_range | not_finite) != 0 || not_ascending != allowed) throw_first_fault(routing);
}

std::vector<std::int64_t> expert_counts(const RoutingView& routing) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(routing.num_experts), 0);
  for (const std::int32_t e : routing.expert) ++counts[static_cast<std::size_t>(e)];
  return counts;
}

AdaptedRouting routing_from_topk(std::span<const std::int32_t> expert, std::span<const float> weight,
                                 std::int64_t num_tokens, std::int64_t k, std::int32_t num_experts) {
  Require(num_tokens >= 0 && k >= 0 && num_experts >= 0, ErrorCode::kInvalidRouting, "num_tokens ",
          num_tokens, ", k ", k, " and num_experts ", num_experts, " must not be negative");
  const auto entries = static_cast<std::uint64_t>(num_tokens) * static_cast<std::uint64_t>(k);
  Require(expert.size() == entries && weight.size() == entries, ErrorCode::kInvalidRouting, "expert has ",
          expert.size(), " and weight ", weight.size(), " entries; num_tokens ", num_tokens, " times k ", k,
          " is ", entries);
  AdaptedRouting out;
  out.routing.num_experts = num_experts;
  out.routing.row_ptr.reserve(static_cast<std::size_t>(num_tokens) + 1);
  out.routing.expert.reserve(entries);
  out.routing.weight.reserve(entries);
  out.caller_index.reserve(entries);
  std::vector<std::int64_t> order;
  order.reserve(static_cast<std::size_t>(k));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    order.clear();
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t at = t * k + j;
      const std::int32_t e = expert[static_cast<std::size_t>(at)];
      if (e == -1) continue;
      Require(e >= 0 && e < num_experts, ErrorCode::kInvalidRouting, "token ", t, ", choice ", j, ": expert ",
              e, " is outside 0..", num_experts - 1, " and is not -1 (none)");
      const float w = weight[static_cast<std::size_t>(at)];
      Require(std::isfinite(w), ErrorCode::kInvalidRouting, "token ", t, ", choice ", j,
              ": the weight of expert ", e, " is ", w, "; it must be finite");
      order.push_back(at);
    }
    std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      const std::int32_t ea = expert[static_cast<std::size_t>(a)];
      const std::int32_t eb = expert[static_cast<std::size_t>(b)];
      return ea != eb ? ea < eb : a < b;
    });
    for (std::size_t i = 0; i < order.size(); ++i) {
      const auto at = static_cast<std::size_t>(order[i]);
      if (i > 0) {
        const auto before = static_cast<std::size_t>(order[i - 1]);
        Require(expert[before] != expert[at], ErrorCode::kInvalidRouting, "token ", t, ", choices ",
                order[i - 1] - t * k, " and ", order[i] - t * k, ": expert ", expert[at],
                " is chosen twice; add its weights into one choice");
      }
      out.routing.expert.push_back(expert[at]);
      out.routing.weight.push_back(weight[at]);
      out.caller_index.push_back(order[i]);
    }
    out.routing.row_ptr.push_back(static_cast<std::int64_t>(out.routing.expert.size()));
  }
  return out;
}

AdaptedRouting routing_from_multihot(std::span<const std::uint8_t> map, std::span<const float> weight,
                                     std::int64_t num_tokens, std::int32_t num_experts) {
  Require(num_tokens >= 0 && num_experts >= 0, ErrorCode::kInvalidRouting, "num_tokens ", num_tokens,
          " and num_experts ", num_experts, " must not be negative");
  const auto entries = static_cast<std::uint64_t>(num_tokens) * static_cast<std::uint64_t>(num_experts);
  Require(map.size() == entries && weight.size() == entries, ErrorCode::kInvalidRouting, "map has ",
          map.size(), " and weight ", weight.size(), " entries; num_tokens ", num_tokens,
          " times num_experts ", num_experts, " is ", entries);
  AdaptedRouting out;
  out.routing.num_experts = num_experts;
  out.routing.row_ptr.reserve(static_cast<std::size_t>(num_tokens) + 1);
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int32_t e = 0; e < num_experts; ++e) {
      const std::int64_t at = t * num_experts + e;
      if (map[static_cast<std::size_t>(at)] == 0) continue;
      const float w = weight[static_cast<std::size_t>(at)];
      Require(std::isfinite(w), ErrorCode::kInvalidRouting, "token ", t, ", route ", out.routing.num_routes(),
              ": the weight of expert ", e, " is ", w, "; it must be finite");
      out.routing.expert.push_back(e);
      out.routing.weight.push_back(w);
      out.caller_index.push_back(at);
    }
    out.routing.row_ptr.push_back(out.routing.num_routes());
  }
  return out;
}

void scatter_to_caller(const AdaptedRouting& adapted, std::span<const float> per_route,
                       std::span<float> caller) {
  Require(per_route.size() == adapted.caller_index.size(), ErrorCode::kInvalidArgument, "per_route has ",
          per_route.size(), " entries; the routing has ", adapted.caller_index.size(), " routes");
  std::int64_t needed = 0;
  for (const std::int64_t at : adapted.caller_index) needed = std::max(needed, at + 1);
  Require(static_cast<std::uint64_t>(needed) <= caller.size(), ErrorCode::kInvalidArgument, "caller has ",
          caller.size(), " entries; the routes came from an array of at least ", needed);
  std::fill(caller.begin(), caller.end(), 0.0f);
  for (std::size_t i = 0; i < per_route.size(); ++i)
    caller[static_cast<std::size_t>(adapted.caller_index[i])] = per_route[i];
}

}  // namespace sluice
