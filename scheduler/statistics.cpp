#include "sluice/scheduler/statistics.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

namespace sluice {
namespace {

using Json = nlohmann::json;

constexpr ErrorCode kBad = ErrorCode::kInvalidArgument;
constexpr std::int64_t kMaxExperts = 1 << 16, kMaxLayers = 1 << 12, kMaxSources = 1 << 16;
constexpr std::uint64_t kSampleSeed = 0x736c75696365;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

bool earlier(const SampledToken& a, const SampledToken& b) {
  return a.key < b.key || (a.key == b.key && a.source < b.source);
}

void add_to(std::vector<double>& sum, const std::vector<double>& other) {
  if (sum.empty() || other.empty()) {  // one side does not know it
    sum.clear();
    return;
  }
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += other[i];
}

double number_at(const Json& value, const std::string& where) {
  Require(value.is_number(), kBad, where, " is ", value.dump().substr(0, 40),
          "; it must be a number of at least 0");
  const double v = value.get<double>();
  Require(std::isfinite(v) && v >= 0, kBad, where, " is ", v, "; it must be a finite number of at least 0");
  return v;
}

std::vector<double> numbers(const Json& list, std::size_t size, const std::string& where) {
  Require(list.is_array(), kBad, where, " must be a list of ", size, " numbers, is ", list.type_name());
  Require(list.size() == size, kBad, where, " has ", list.size(), " numbers; it must have ", size);
  std::vector<double> out;
  out.reserve(size);
  for (std::size_t i = 0; i < size; ++i) out.push_back(number_at(list[i], str(where, "[", i, "]")));
  return out;
}

std::vector<double> matrix(const Json& list, std::size_t rows, std::size_t cols, const std::string& where) {
  Require(list.is_array() && list.size() == rows, kBad, where, " must be a list of ", rows, " rows, ",
          list.is_array() ? str("has ", list.size()) : str("is ", list.type_name()));
  std::vector<double> out;
  out.reserve(rows * cols);
  for (std::size_t r = 0; r < rows; ++r) {
    const std::vector<double> row = numbers(list[r], cols, str(where, "[", r, "]"));
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

const Json& field(const Json& object, const char* key, const std::string& where) {
  Require(object.is_object(), kBad, where, " must be an object, is ", object.type_name());
  const auto found = object.find(key);
  Require(found != object.end(), kBad, where, ": field \"", key, "\" is missing");
  return *found;
}

std::int64_t integer(const Json& value, std::int64_t min, std::int64_t max, const std::string& where) {
  const bool fits =
      value.is_number_integer() &&
      (value.is_number_unsigned() ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(max)
                                  : value.get<std::int64_t>() <= max && value.get<std::int64_t>() >= min);
  Require(fits && value.get<std::int64_t>() >= min, kBad, where, " is ", value.dump().substr(0, 40),
          "; it must be an integer ", min, "..", max);
  return value.get<std::int64_t>();
}

std::vector<std::int32_t> layer_numbers(const Json& list, const std::string& where) {
  Require(list.is_array() && !list.empty() && list.size() <= at(kMaxLayers), kBad, where,
          " must be a list of 1..", kMaxLayers, " layer numbers");
  std::vector<std::int32_t> out;
  for (std::size_t i = 0; i < list.size(); ++i) {
    out.push_back(static_cast<std::int32_t>(integer(list[i], 0, INT32_MAX, str(where, "[", i, "]"))));
    Require(i == 0 || out[i - 1] < out[i], kBad, where, ": layers must ascend, ", out[i], " follows ",
            out[i == 0 ? 0 : i - 1]);
  }
  return out;
}

Json rows_of(const std::vector<double>& values, std::size_t cols) {
  Json out = Json::array();
  const auto number = [](double v) -> Json {  // counts print as integers
    if (v == std::floor(v) && v < 9e15) return static_cast<std::int64_t>(v);
    return v;
  };
  for (std::size_t i = 0; i < values.size(); i += cols) {
    Json row = Json::array();
    for (std::size_t k = i; k < i + cols; ++k) row.push_back(number(values[k]));
    out.push_back(std::move(row));
  }
  return out;
}

// Counts of another program: {"num_experts", "top_k", "layers", "expert_counts": {"0": [...]}, ...}
RoutingStatistics parse_counts(const Json& json, const std::string& name) {
  RoutingStatistics out;
  out.num_experts = static_cast<std::int32_t>(
      integer(field(json, "num_experts", name), 1, kMaxExperts, name + ": num_experts"));
  const std::size_t experts = at(out.num_experts);
  const std::int64_t top_k = integer(field(json, "top_k", name), 1, out.num_experts, name + ": top_k");
  const std::vector<std::int32_t> layers = layer_numbers(field(json, "layers", name), name + ": layers");
  const Json& counts = field(json, "expert_counts", name);
  Require(counts.is_object() && counts.size() == layers.size(), kBad, name,
          ": expert_counts must have one list for each of the ", layers.size(), " layers");
  out.description = name;
  if (json.contains("model") && json["model"].is_string())
    out.description = json["model"].get<std::string>() + ", counts";
  if (json.contains("domain") && json["domain"].is_string())
    out.description += " of " + json["domain"].get<std::string>();
  double tokens = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    LayerStatistics layer;
    layer.layer = layers[l];
    const std::string key = str(layers[l]);
    layer.counts = numbers(field(counts, key.c_str(), name + ": expert_counts"), experts,
                           str(name, ": expert_counts[\"", key, "\"]"));
    double sum = 0;
    for (const double c : layer.counts) sum += c;
    tokens = std::max(tokens, sum / static_cast<double>(top_k));
    out.layers.push_back(std::move(layer));
  }
  if (json.contains("slot_aligned_transitions")) {
    const Json& transitions = json["slot_aligned_transitions"];
    for (std::size_t l = 0; l + 1 < layers.size(); ++l) {
      const std::string key = str(layers[l], "->", layers[l + 1]);
      if (transitions.is_object() && !transitions.contains(key)) continue;
      out.layers[l].transitions =
          matrix(field(transitions, key.c_str(), name + ": slot_aligned_transitions"), experts, experts,
                 str(name, ": slot_aligned_transitions[\"", key, "\"]"));
    }
  }
  out.tokens_of_source = {tokens};
  out.max_sample = 0;
  return out;
}

}  // namespace

double RoutingStatistics::num_tokens() const {
  double sum = 0;
  for (const double t : tokens_of_source) sum += t;
  return sum;
}

std::string RoutingStatistics::layer_list() const {
  std::string out;
  for (const LayerStatistics& l : layers) out += str(out.empty() ? "" : ", ", l.layer);
  return out;
}

void require_same_model(const RoutingStatistics& a, std::string_view name_a, const RoutingStatistics& b,
                        std::string_view name_b) {
  Require(a.num_experts == b.num_experts, kBad, name_b, " has ", b.num_experts, " experts, ", name_a, " has ",
          a.num_experts, "; they are of different models");
  bool same = a.layers.size() == b.layers.size();
  for (std::size_t l = 0; same && l < a.layers.size(); ++l) same = a.layers[l].layer == b.layers[l].layer;
  Require(same, kBad, name_b, " has layers ", b.layer_list(), ", ", name_a, " has layers ", a.layer_list(),
          "; they are of different models, or recorded at different layers");
}

void RoutingStatistics::merge(const RoutingStatistics& other) {
  require_same_model(*this, "the statistics so far", other, "what is merged");
  const std::size_t experts = at(num_experts);
  const std::size_t sources = std::max(tokens_of_source.size(), other.tokens_of_source.size());
  const auto pad = [&](const std::vector<double>& v, std::size_t cols) {
    std::vector<double> out = v;
    if (!v.empty() || cols == 1) out.resize(sources * cols, 0.0);
    return out;
  };
  tokens_of_source = pad(tokens_of_source, 1);
  add_to(tokens_of_source, pad(other.tokens_of_source, 1));
  for (std::size_t l = 0; l < layers.size(); ++l) {
    LayerStatistics& mine = layers[l];
    const LayerStatistics& theirs = other.layers[l];
    add_to(mine.counts, theirs.counts);
    add_to(mine.coactivation, theirs.coactivation);
    if (l + 1 < layers.size()) add_to(mine.transitions, theirs.transitions);
    mine.demand = pad(mine.demand, experts);
    add_to(mine.demand, pad(theirs.demand, experts));
  }
  max_sample = std::min(max_sample, other.max_sample);
  sample.insert(sample.end(), other.sample.begin(), other.sample.end());
  std::sort(sample.begin(), sample.end(), earlier);
  if (static_cast<std::int64_t>(sample.size()) > max_sample) sample.resize(at(max_sample));
}

void validate(const RoutingStatistics& s, std::string_view name) {
  Require(s.num_experts >= 1, kBad, name, ": num_experts is ", s.num_experts, "; it must be at least 1");
  Require(!s.layers.empty(), kBad, name, ": there is no layer");
  Require(!s.tokens_of_source.empty(), kBad, name, ": there is no source rank");
  const std::size_t experts = at(s.num_experts), sources = s.tokens_of_source.size();
  const auto check = [&](const std::vector<double>& v, std::size_t size, bool may_be_empty,
                         const std::string& what) {
    if (may_be_empty && v.empty()) return;
    Require(v.size() == size, kBad, name, ": ", what, " has ", v.size(), " values; it must have ", size);
    for (std::size_t i = 0; i < v.size(); ++i)
      Require(std::isfinite(v[i]) && v[i] >= 0, kBad, name, ": ", what, "[", i, "] is ", v[i],
              "; it must be a finite number of at least 0");
  };
  check(s.tokens_of_source, sources, false, "tokens_of_source");
  for (std::size_t l = 0; l < s.layers.size(); ++l) {
    const LayerStatistics& layer = s.layers[l];
    const std::string of = str("layer ", layer.layer, ": ");
    Require(l == 0 || s.layers[l - 1].layer < layer.layer, kBad, name, ": layers must ascend, ", layer.layer,
            " follows ", s.layers[l == 0 ? 0 : l - 1].layer);
    check(layer.counts, experts, false, of + "counts");
    check(layer.coactivation, experts * experts, true, of + "coactivation");
    check(layer.transitions, experts * experts, true, of + "transitions");
    check(layer.demand, sources * experts, true, of + "demand");
    for (std::size_t e = 0; !layer.coactivation.empty() && e < experts; ++e)
      for (std::size_t f = 0; f <= e; ++f) {
        const double v = layer.coactivation[e * experts + f];
        Require(v == layer.coactivation[f * experts + e], kBad, name, ": ", of, "coactivation[", e, "][", f,
                "] is ", v, ", [", f, "][", e, "] is ", layer.coactivation[f * experts + e],
                "; it must be symmetric");
        Require(e == f ? v == 0 : v <= std::min(layer.counts[e], layer.counts[f]), kBad, name, ": ", of,
                "coactivation[", e, "][", f, "] is ", v,
                e == f ? "; the diagonal must be 0" : ", more than the experts have tokens");
      }
  }
  for (std::size_t i = 0; i < s.sample.size(); ++i) {
    const SampledToken& token = s.sample[i];
    const std::string of = str("sample[", i, "]: ");
    Require(token.source >= 0 && at(token.source) < sources, kBad, name, ": ", of, "source rank ",
            token.source, " is outside 0..", sources - 1);
    Require(token.end.size() == s.layers.size(), kBad, name, ": ", of, "it has ", token.end.size(),
            " layers, must have ", s.layers.size());
    for (std::size_t l = 0; l < token.end.size(); ++l) {
      const auto experts_here = token.experts_at(l);
      for (std::size_t k = 0; k < experts_here.size(); ++k) {
        Require(experts_here[k] >= 0 && experts_here[k] < s.num_experts, kBad, name, ": ", of, "expert ",
                experts_here[k], " at layer ", s.layers[l].layer, " is outside 0..", s.num_experts - 1);
        Require(k == 0 || experts_here[k - 1] < experts_here[k], kBad, name, ": ", of, "experts at layer ",
                s.layers[l].layer, " must ascend, ", experts_here[k], " follows ",
                experts_here[k == 0 ? 0 : k - 1]);
      }
    }
  }
}

std::string RoutingStatistics::to_json() const {
  const std::size_t experts = at(num_experts);
  Json out{
      {"sluice_statistics", kVersion},
      {"description", description},
      {"num_experts", num_experts},
      {"tokens_of_source", rows_of(tokens_of_source, std::max<std::size_t>(1, tokens_of_source.size()))[0]},
      {"max_sample", max_sample}};
  Json& list = out["layers"] = Json::array();
  for (const LayerStatistics& l : layers) {
    Json layer{{"layer", l.layer}, {"counts", rows_of(l.counts, experts)[0]}};
    if (!l.coactivation.empty()) layer["coactivation"] = rows_of(l.coactivation, experts);
    if (!l.transitions.empty()) layer["transitions"] = rows_of(l.transitions, experts);
    if (!l.demand.empty()) layer["demand"] = rows_of(l.demand, experts);
    list.push_back(std::move(layer));
  }
  Json& tokens = out["sample"] = Json::array();
  for (const SampledToken& t : sample) {
    Json by_layer = Json::array();
    for (std::size_t l = 0; l < t.end.size(); ++l) {
      const auto here = t.experts_at(l);
      by_layer.push_back(std::vector<std::int32_t>(here.begin(), here.end()));
    }
    tokens.push_back({t.key, t.source, std::move(by_layer)});
  }
  return out.dump(-1, ' ', false, Json::error_handler_t::replace);
}

RoutingStatistics parse_statistics(std::string_view text, std::string_view file) {
  const std::string name(file);
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& e) {
    throw Error(kBad, str(name, ": is no JSON of statistics: ", e.what()));
  }
  Require(json.is_object(), kBad, name, ": must be a JSON object, is ", json.type_name());
  if (json.contains("expert_counts")) return parse_counts(json, name);
  const std::int64_t version =
      integer(field(json, "sluice_statistics", name), 0, INT32_MAX, name + ": sluice_statistics");
  Require(version == RoutingStatistics::kVersion, kBad, name, ": are statistics of version ", version,
          ", this program reads version ", RoutingStatistics::kVersion);
  for (const auto& [key, value] : json.items()) {
    bool known = false;
    for (const std::string_view k : {"sluice_statistics", "description", "num_experts", "tokens_of_source",
                                     "max_sample", "layers", "sample"})
      known = known || key == k;
    Require(known, kBad, name, ": there is no field \"", key, "\"");
  }
  RoutingStatistics out;
  const Json& description = field(json, "description", name);
  Require(description.is_string(), kBad, name, ": description must be a text");
  out.description = description.get<std::string>();
  out.num_experts = static_cast<std::int32_t>(
      integer(field(json, "num_experts", name), 1, kMaxExperts, name + ": num_experts"));
  const std::size_t experts = at(out.num_experts);
  const Json& tokens = field(json, "tokens_of_source", name);
  Require(tokens.is_array() && !tokens.empty() && tokens.size() <= at(kMaxSources), kBad, name,
          ": tokens_of_source must be a list of 1..", kMaxSources, " numbers");
  out.tokens_of_source = numbers(tokens, tokens.size(), name + ": tokens_of_source");
  out.max_sample = integer(field(json, "max_sample", name), 0, INT64_MAX / 2, name + ": max_sample");
  const Json& layers = field(json, "layers", name);
  Require(layers.is_array() && layers.size() <= at(kMaxLayers), kBad, name,
          ": layers must be a list of at most ", kMaxLayers);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string of = str(name, ": layers[", l, "]");
    LayerStatistics layer;
    layer.layer =
        static_cast<std::int32_t>(integer(field(layers[l], "layer", of), 0, INT32_MAX, of + ".layer"));
    layer.counts = numbers(field(layers[l], "counts", of), experts, of + ".counts");
    if (layers[l].contains("coactivation"))
      layer.coactivation = matrix(layers[l]["coactivation"], experts, experts, of + ".coactivation");
    if (layers[l].contains("transitions"))
      layer.transitions = matrix(layers[l]["transitions"], experts, experts, of + ".transitions");
    if (layers[l].contains("demand"))
      layer.demand = matrix(layers[l]["demand"], out.tokens_of_source.size(), experts, of + ".demand");
    out.layers.push_back(std::move(layer));
  }
  const Json& sample = field(json, "sample", name);
  Require(sample.is_array(), kBad, name, ": sample must be a list");
  for (std::size_t i = 0; i < sample.size(); ++i) {
    const std::string of = str(name, ": sample[", i, "]");
    const Json& entry = sample[i];
    Require(entry.is_array() && entry.size() == 3 && entry[0].is_number_unsigned() && entry[2].is_array(),
            kBad, of, " must be [key, source, [experts by layer]]");
    SampledToken token;
    token.key = entry[0].get<std::uint64_t>();
    token.source = static_cast<std::int32_t>(integer(entry[1], 0, kMaxSources, of + "[1]"));
    for (std::size_t l = 0; l < entry[2].size(); ++l) {
      const std::string layer = str(of, "[2][", l, "]");
      Require(entry[2][l].is_array(), kBad, layer, " must be a list of experts");
      for (std::size_t k = 0; k < entry[2][l].size(); ++k)
        token.expert.push_back(static_cast<std::int32_t>(
            integer(entry[2][l][k], 0, out.num_experts - 1, str(layer, "[", k, "]"))));
      token.end.push_back(static_cast<std::int32_t>(token.expert.size()));
    }
    out.sample.push_back(std::move(token));
  }
  std::sort(out.sample.begin(), out.sample.end(), earlier);
  validate(out, name);
  return out;
}

StatisticsRecorder::StatisticsRecorder(std::int32_t num_experts, std::span<const std::int32_t> layers,
                                       std::int32_t num_sources, std::int64_t max_sample) {
  Require(num_experts >= 1 && num_experts <= kMaxExperts, kBad, "num_experts is ", num_experts,
          "; it must be 1..", kMaxExperts);
  Require(num_sources >= 1 && num_sources <= kMaxSources, kBad, "num_sources is ", num_sources,
          "; it must be 1..", kMaxSources);
  Require(max_sample >= 0, kBad, "max_sample is ", max_sample, "; it must not be negative");
  out_.num_experts = num_experts;
  out_.max_sample = max_sample;
  out_.tokens_of_source.assign(at(num_sources), 0.0);
  const std::size_t experts = at(num_experts);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    LayerStatistics layer;
    layer.layer = layers[l];
    layer.counts.assign(experts, 0);
    layer.coactivation.assign(experts * experts, 0);
    if (l + 1 < layers.size()) layer.transitions.assign(experts * experts, 0);
    layer.demand.assign(at(num_sources) * experts, 0);
    out_.layers.push_back(std::move(layer));
  }
}

void StatisticsRecorder::add(std::int32_t source, std::int64_t index, const SampledToken& routes) {
  const std::size_t experts = at(out_.num_experts);
  if (at(source) >= out_.tokens_of_source.size()) {
    Require(source < kMaxSources, kBad, "source rank ", source, " is outside 0..", kMaxSources - 1);
    out_.tokens_of_source.resize(at(source) + 1, 0.0);
    for (LayerStatistics& layer : out_.layers)
      layer.demand.resize(out_.tokens_of_source.size() * experts, 0.0);
  }
  out_.tokens_of_source[at(source)] += 1;
  for (std::size_t l = 0; l < out_.layers.size(); ++l) {
    LayerStatistics& layer = out_.layers[l];
    const auto here = routes.experts_at(l);
    for (const std::int32_t e : here) {
      layer.counts[at(e)] += 1;
      layer.demand[at(source) * experts + at(e)] += 1;
      for (const std::int32_t f : here)
        if (f != e) layer.coactivation[at(e) * experts + at(f)] += 1;
      if (l + 1 < out_.layers.size())
        for (const std::int32_t f : routes.experts_at(l + 1)) layer.transitions[at(e) * experts + at(f)] += 1;
    }
  }
  const std::uint64_t key = Hasher().add(kSampleSeed).add_int(source).add_int(index).value();
  auto& heap = out_.sample;
  const bool full = static_cast<std::int64_t>(heap.size()) >= out_.max_sample;
  if (full && (heap.empty() || key >= heap.front().key)) return;
  if (full) {
    std::pop_heap(heap.begin(), heap.end(), earlier);
    heap.pop_back();
  }
  heap.push_back(routes);
  heap.back().key = key;
  heap.back().source = source;
  std::push_heap(heap.begin(), heap.end(), earlier);
}

RoutingStatistics StatisticsRecorder::statistics() const {
  RoutingStatistics out = out_;
  std::sort(out.sample.begin(), out.sample.end(), earlier);
  return out;
}

}  // namespace sluice
