// Routing statistics: what a planner of placements wants to know of recorded routing, in memory that does not grow with
// the number of tokens. Per layer:
//   counts        n(e), tokens that visit e
//   coactivation  n(e, f), tokens that visit both
//   transitions   n(p, q), tokens that visit p at this layer and q at the next one of the list
//   demand        n(s, e), tokens of source rank s that visit e
// and over all layers a sample of whole tokens: those with the smallest hash of (seed, source, index). The hash makes the
// sample uniform, the same in whatever order tokens come, and mergeable: of two samples the smallest hashes are the sample
// of both. Statistics of several ranks merge to exactly those of one recorder that saw everything.
//
// Memory: layers * (2 E^2 + (sources + 1) E) * 8 bytes and the sample.
// Thread-safety: values. Errors: kInvalidArgument naming `name` (a file), the field and the place: no number, negative,
// a shape that does not fit, statistics of another model.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sluice {

struct LayerStatistics {
  std::int32_t layer = 0;            // the model's number of the layer
  std::vector<double> counts;        // f64 [E]
  std::vector<double> coactivation;  // f64 [E, E], symmetric, diagonal 0; or empty: not known
  std::vector<double> transitions;   // f64 [E, E]; or empty: not known, or the last layer
  std::vector<double> demand;        // f64 [num_sources, E]; or empty: not known
  friend bool operator==(const LayerStatistics&, const LayerStatistics&) = default;
};

struct SampledToken {
  std::uint64_t key = 0;
  std::int32_t source = 0;
  std::vector<std::int32_t> expert;  // int32 [routes], by layer, ascending within one
  std::vector<std::int32_t> end;     // int32 [layers], where the routes of a layer end in `expert`
  std::span<const std::int32_t> experts_at(std::size_t layer) const {
    const std::int32_t begin = layer == 0 ? 0 : end[layer - 1];
    return {expert.data() + begin, static_cast<std::size_t>(end[layer] - begin)};
  }
  friend bool operator==(const SampledToken&, const SampledToken&) = default;
};

struct RoutingStatistics {
  static constexpr std::int32_t kVersion = 1;
  static constexpr std::int64_t kDefaultSample = 16384;

  std::string description;  // where it comes from
  std::int32_t num_experts = 0;
  std::vector<double> tokens_of_source;  // f64 [num_sources]; their sum is the number of tokens
  std::vector<LayerStatistics> layers;
  std::int64_t max_sample = kDefaultSample;
  std::vector<SampledToken> sample;  // ascending by (key, source)

  std::int32_t num_sources() const { return static_cast<std::int32_t>(tokens_of_source.size()); }
  double num_tokens() const;
  // "0, 7, 15"
  std::string layer_list() const;

  // Adds what other ranks saw. Throws when experts or layers differ. Fields that one side lacks are lacking after.
  void merge(const RoutingStatistics& other);
  std::string to_json() const;
  friend bool operator==(const RoutingStatistics&, const RoutingStatistics&) = default;
};

// Throws unless everything has its shape and is a finite number of at least 0.
void validate(const RoutingStatistics& statistics, std::string_view name);
// Throws naming both and what differs, unless they are of one model: the same experts and layers.
void require_same_model(const RoutingStatistics& a, std::string_view name_a, const RoutingStatistics& b,
                        std::string_view name_b);

// From JSON: what to_json() writes, or counts as in OLMoE's files ("expert_counts" by layer, "slot_aligned_transitions";
// tokens are counts / top_k). `name` stands for the text in errors.
RoutingStatistics parse_statistics(std::string_view text, std::string_view name);

// Builds statistics of tokens that come one by one.
class StatisticsRecorder {
 public:
  // layers: the model's numbers, ascending
  StatisticsRecorder(std::int32_t num_experts, std::span<const std::int32_t> layers, std::int32_t num_sources,
                     std::int64_t max_sample = RoutingStatistics::kDefaultSample);

  // A token of a source rank with its experts by layer, ascending and unique within one. `index` counts the tokens of a
  // source: (source, index) names the token. Sources beyond num_sources make room. The caller has checked the experts.
  void add(std::int32_t source, std::int64_t index, const SampledToken& routes);

  // What came so far; the recorder may go on.
  RoutingStatistics statistics() const;

 private:
  RoutingStatistics out_;  // its sample is a heap, largest key first
};

}  // namespace sluice
