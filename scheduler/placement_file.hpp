// The text form of placements of a model's layers: what `sluice place --out` writes and placement.file reads.
//
//   {"sluice_placement": 1, "planner": "sluice", "num_experts": 4, "num_ranks": 2, "nodes": [[0], [1]],
//    "layers": [{"layer": 0, "experts_of_rank": [[0, 1], [2, 3, 0]]}]}
//
// Experts without a slot live everywhere (zero, copy and constant experts) or the placement is refused when a layer is made.
// Thread-safety: values. Errors: kInvalidConfig naming the file, the field and the value.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/scheduler/placement.hpp"

namespace sluice {

struct PlacementFile {
  static constexpr std::int32_t kVersion = 1;
  struct Layer {
    std::int32_t layer = 0;                                  // the model's number
    std::vector<std::vector<std::int32_t>> experts_of_rank;  // by rank, in local order
    friend bool operator==(const Layer&, const Layer&) = default;
  };
  std::string planner;
  std::int32_t num_experts = 0;
  std::vector<std::vector<std::int32_t>> nodes;  // ranks of each node that it was planned for
  std::vector<Layer> layers;

  std::int32_t num_ranks() const;
  std::string to_json() const;
  friend bool operator==(const PlacementFile&, const PlacementFile&) = default;
};

PlacementFile parse_placement(std::string_view text, std::string_view name);

}  // namespace sluice
