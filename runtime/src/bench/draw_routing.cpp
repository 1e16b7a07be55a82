#include "sluice/runtime/src/bench/draw_routing.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"
#include "sluice/runtime/src/trace/routing_trace.hpp"

namespace sluice {
namespace {

std::vector<double> read_popularity(const Config& config, std::int32_t num_experts) {
  const std::string& file = config.bench.popularity;
  std::ifstream in(file);
  Require(in.is_open(), ErrorCode::kNotFound, "bench.popularity: ", file,
          ": cannot be opened: ", std::strerror(errno));
  std::vector<double> out;
  std::int32_t num_positive = 0;
  for (std::string word; in >> word;) {
    double value = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    Require(error == std::errc() && end == word.data() + word.size() && std::isfinite(value) && value >= 0,
            ErrorCode::kInvalidConfig, "bench.popularity: ", file, ": '", word, "' in place ", out.size(),
            " is no number of at least 0");
    num_positive += value > 0;
    out.push_back(value);
  }
  Require(out.size() == static_cast<std::size_t>(num_experts), ErrorCode::kInvalidConfig,
          "bench.popularity: ", file, " has ", out.size(), " numbers, the model has ", num_experts,
          " experts");
  Require(num_positive >= config.bench.top_k, ErrorCode::kInvalidConfig, "bench.popularity: ", file, " has ",
          num_positive, " experts above 0, bench.top_k is ", config.bench.top_k);
  return out;
}

}  // namespace

Routing draw_routing(const Config& config, std::int32_t num_experts, RankId rank, std::int32_t num_ranks) {
  if (!config.bench.replay.empty()) {
    Routing out = replay_layer(config.bench.replay, config.bench.replay_layer, rank.value, num_ranks);
    Require(out.num_experts == num_experts, ErrorCode::kInvalidConfig, "bench.replay: ", config.bench.replay,
            " has ", out.num_experts, " experts, model.num_experts is ", num_experts);
    return out;
  }
  std::mt19937_64 order_rng(static_cast<std::uint64_t>(config.bench.seed));
  std::vector<double> popularity(static_cast<std::size_t>(num_experts));
  for (std::size_t e = 0; e < popularity.size(); ++e)
    popularity[e] = 1 / std::pow(double(e) + 1, config.bench.skew);
  std::shuffle(popularity.begin(), popularity.end(), order_rng);
  if (!config.bench.popularity.empty()) popularity = read_popularity(config, num_experts);
  std::mt19937_64 rng(Hasher().add_int(config.bench.seed).add_int(rank.value).value());
  std::uniform_real_distribution<double> uniform(0, 1);
  Routing out;
  out.num_experts = num_experts;
  std::vector<std::pair<double, std::int32_t>> keys(popularity.size());
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(config.bench.top_k));
  for (std::int64_t t = 0; t < config.bench.tokens_per_rank; ++t) {
    // The k smallest of Exp(1) / popularity: a draw without replacement (Efraimidis & Spirakis 2006).
    for (std::size_t e = 0; e < keys.size(); ++e)
      keys[e] = {-std::log(1 - uniform(rng)) / popularity[e], static_cast<std::int32_t>(e)};
    std::partial_sort(keys.begin(), keys.begin() + config.bench.top_k, keys.end());
    for (std::size_t i = 0; i < chosen.size(); ++i) chosen[i] = keys[i].second;
    std::sort(chosen.begin(), chosen.end());
    for (const std::int32_t e : chosen) {
      out.expert.push_back(e);
      out.weight.push_back(1.0f / static_cast<float>(config.bench.top_k));
    }
    out.row_ptr.push_back(static_cast<std::int64_t>(out.expert.size()));
  }
  return out;
}

}  // namespace sluice
