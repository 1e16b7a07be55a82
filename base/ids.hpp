// Strong ids: a rank is not an expert. Conversion is explicit both ways; bulk arrays hold plain int32_t and say
// in their shape line what they index.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>

namespace sluice {

template <typename Tag>
struct Id {
  std::int32_t value = -1;

  constexpr Id() = default;
  constexpr explicit Id(std::int32_t v) : value(v) {}
  constexpr bool valid() const { return value >= 0; }
  constexpr std::size_t index() const { return static_cast<std::size_t>(value); }
  friend constexpr auto operator<=>(Id, Id) = default;
};

using RankId = Id<struct RankTag>;      // member of the expert-parallel group, 0..num_ranks-1
using NodeId = Id<struct NodeTag>;      // group of ranks that share a fast local link
using ExpertId = Id<struct ExpertTag>;  // logical expert, 0..num_experts-1
using SlotId = Id<struct SlotTag>;      // physical copy of an expert, global over ranks

}  // namespace sluice

template <typename Tag>
struct std::hash<sluice::Id<Tag>> {
  std::size_t operator()(sluice::Id<Tag> id) const noexcept { return std::hash<std::int32_t>{}(id.value); }
};
