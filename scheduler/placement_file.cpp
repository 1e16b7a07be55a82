#include "sluice/scheduler/placement_file.hpp"

#include <nlohmann/json.hpp>

#include "sluice/base/error.hpp"

namespace sluice {
namespace {

using Json = nlohmann::ordered_json;

constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
constexpr std::int64_t kMaxExperts = 1 << 20, kMaxRanks = 1 << 16;

const Json& field(const Json& object, const char* key, const std::string& where) {
  Require(object.is_object() && object.contains(key), kBad, where, ": field \"", key, "\" is missing");
  return object.at(key);
}

std::int32_t integer(const Json& value, std::int64_t min, std::int64_t max, const std::string& where) {
  const bool small = value.is_number_integer() &&
                     (!value.is_number_unsigned() || value.get<std::uint64_t>() <= std::uint64_t{1} << 40);
  Require(small && value.get<std::int64_t>() >= min && value.get<std::int64_t>() <= max, kBad, where, " is ",
          value.dump().substr(0, 40), "; it must be an integer ", min, "..", max);
  return value.get<std::int32_t>();
}

std::vector<std::vector<std::int32_t>> lists(const Json& value, std::int64_t max, const std::string& where) {
  Require(value.is_array() && !value.empty() && static_cast<std::int64_t>(value.size()) <= kMaxRanks, kBad,
          where, " must be a list of 1..", kMaxRanks, " lists");
  std::vector<std::vector<std::int32_t>> out;
  for (std::size_t r = 0; r < value.size(); ++r) {
    const std::string at = str(where, "[", r, "]");
    Require(value[r].is_array(), kBad, at, " must be a list of integers");
    out.emplace_back();
    for (std::size_t i = 0; i < value[r].size(); ++i)
      out.back().push_back(integer(value[r][i], 0, max, str(at, "[", i, "]")));
  }
  return out;
}

}  // namespace

std::int32_t PlacementFile::num_ranks() const {
  return layers.empty() ? 0 : static_cast<std::int32_t>(layers[0].experts_of_rank.size());
}

std::string PlacementFile::to_json() const {
  Json out{{"sluice_placement", kVersion},
           {"planner", planner},
           {"num_experts", num_experts},
           {"num_ranks", num_ranks()},
           {"nodes", nodes}};
  Json& list = out["layers"] = Json::array();
  for (const Layer& l : layers) list.push_back({{"layer", l.layer}, {"experts_of_rank", l.experts_of_rank}});
  return out.dump();
}

PlacementFile parse_placement(std::string_view text, std::string_view file) {
  const std::string name(file);
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& e) {
    throw Error(kBad, str(name, ": is no placement (", e.what(), "); `sluice place --out` writes one"));
  }
  const std::int32_t version =
      integer(field(json, "sluice_placement", name), 0, INT32_MAX, name + ": sluice_placement");
  Require(version == PlacementFile::kVersion, kBad, name, ": is a placement of version ", version,
          ", this program reads version ", PlacementFile::kVersion);
  PlacementFile out;
  const Json& planner = field(json, "planner", name);
  Require(planner.is_string(), kBad, name, ": planner must be a text");
  out.planner = planner.get<std::string>();
  out.num_experts = integer(field(json, "num_experts", name), 1, kMaxExperts, name + ": num_experts");
  const std::int32_t num_ranks = integer(field(json, "num_ranks", name), 1, kMaxRanks, name + ": num_ranks");
  out.nodes = lists(field(json, "nodes", name), num_ranks - 1, name + ": nodes");
  const Json& layers = field(json, "layers", name);
  Require(layers.is_array() && !layers.empty(), kBad, name, ": layers must be a list of at least one");
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string at = str(name, ": layers[", l, "]");
    PlacementFile::Layer layer;
    layer.layer = integer(field(layers[l], "layer", at), 0, INT32_MAX, at + ".layer");
    layer.experts_of_rank =
        lists(field(layers[l], "experts_of_rank", at), out.num_experts - 1, at + ".experts_of_rank");
    Require(static_cast<std::int32_t>(layer.experts_of_rank.size()) == num_ranks, kBad, at,
            ".experts_of_rank has ", layer.experts_of_rank.size(), " ranks, num_ranks is ", num_ranks);
    out.layers.push_back(std::move(layer));
  }
  std::vector<bool> seen(static_cast<std::size_t>(num_ranks), false);
  for (const auto& node : out.nodes)
    for (const std::int32_t rank : node) {
      Require(!seen[static_cast<std::size_t>(rank)], kBad, name, ": nodes: rank ", rank, " is there twice");
      seen[static_cast<std::size_t>(rank)] = true;
    }
  for (std::size_t r = 0; r < seen.size(); ++r)
    Require(seen[r], kBad, name, ": nodes: rank ", r, " is in none");
  return out;
}

}  // namespace sluice
