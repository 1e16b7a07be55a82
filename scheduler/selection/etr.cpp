#include "sluice/scheduler/selection/etr.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace sluice {
namespace {

constexpr std::int64_t kFlagsPerValue = 32;  // answers in one double

std::int64_t values_of_flags(std::int64_t flags) {
  return (flags + kFlagsPerValue - 1) / kFlagsPerValue;
}

// Which of `delta` are among the `capacity` highest; ties: the earlier.
void best_of(std::span<const double> delta, std::int64_t capacity, std::vector<std::int32_t>& order,
             std::vector<char>& taken) {
  taken.assign(delta.size(), 1);
  if (static_cast<std::int64_t>(delta.size()) <= capacity) return;
  order.resize(delta.size());
  std::iota(order.begin(), order.end(), 0);
  const auto middle = order.begin() + static_cast<std::ptrdiff_t>(capacity);
  std::nth_element(order.begin(), middle, order.end(), [&](std::int32_t a, std::int32_t b) {
    const double x = delta[static_cast<std::size_t>(a)], y = delta[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (auto refused = middle; refused != order.end(); ++refused)
    taken[static_cast<std::size_t>(*refused)] = 0;
}

}  // namespace

double etr_min_capacity(std::int64_t hidden, std::int32_t num_experts, double delta) {
  const double square = delta * delta;
  return std::exp(static_cast<double>(hidden) * square / (2 - square)) / num_experts;
}

EtrPolicy::EtrPolicy(const EtrOptions& options)
    : options_(options),
      locality_loss_("etr", options.locality.get(), options.locality_loss, options.locality_epsilon) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
  const auto not_negative = [](std::string_view what, double value) {
    Require(value >= 0 && std::isfinite(value), kBad, "policy etr: ", what, " is ", value,
            "; it must not be negative");
  };
  const auto above_zero = [](std::string_view what, double value) {
    Require(value > 0 && std::isfinite(value), kBad, "policy etr: ", what, " is ", value,
            "; it must be above 0");
  };
  Require(options.top_k >= 1, kBad, "policy etr: top_k is ", options.top_k, "; it must be at least 1");
  not_negative("etr_tau", options.tau);
  above_zero("etr_temperature", options.temperature);
  above_zero("route_scale", options.route_scale);
  not_negative("capacity_factor", options.capacity_factor);
  not_negative("aux_loss", options.aux_loss);
  Require(options.delta_max >= 0 && options.delta_max <= 1, kBad, "policy etr: etr_delta_max is ",
          options.delta_max, "; it must be from 0 to 1");
  Require(options.delta_max == 0 || options.hidden >= 1, kBad, "policy etr: etr_delta_max is ",
          options.delta_max, " but hidden is ", options.hidden,
          "; the least capacity needs the width of a row");
  not_negative("etr_switch_on", options.switch_on);
  Require(options.switch_off >= options.switch_on && std::isfinite(options.switch_off), kBad,
          "policy etr: etr_switch_off is ", options.switch_off, "; it must be at least etr_switch_on, ",
          options.switch_on);
  Require(options.switch_decay >= 0 && options.switch_decay < 1, kBad, "policy etr: etr_switch_decay is ",
          options.switch_decay, "; it must be at least 0 and below 1");
}

void EtrPolicy::check_options(std::int32_t num_experts, bool training) const {
  check_top_k(name(), options_.top_k, num_experts);
  Require(
      !training || !options_.renormalize || (options_.top_k > 1 && options_.tau > 0),
      ErrorCode::kInvalidConfig,
      "policy etr: with one expert a token a renormalized weight is always route_scale and affinities get "
      "no gradient; switch renormalize off, or use top_k of at least 2 and etr_tau above 0");
}

AdaptiveState EtrPolicy::initial_state(std::int32_t num_experts) const {
  AdaptiveState out{std::vector<double>(static_cast<std::size_t>(num_experts) + 2, 2.0)};
  out.values[0] = 0;
  out.values[1] = -1;
  return out;
}

std::int64_t EtrPolicy::capacity(std::int64_t num_offers, std::int64_t num_tokens, std::int32_t num_experts,
                                 std::int32_t num_ranks) const {
  if (options_.capacity_factor == 0) return num_tokens;
  double wanted = options_.capacity_factor * static_cast<double>(num_offers) / num_experts;
  if (options_.delta_max > 0)
    wanted = std::max(wanted, etr_min_capacity(options_.hidden, num_experts, options_.delta_max) / num_ranks);
  return static_cast<std::int64_t>(
      std::clamp(std::ceil(wanted), 1.0, std::max(1.0, static_cast<double>(num_tokens))));
}

std::int32_t EtrPolicy::owner(std::int32_t expert, std::int32_t num_ranks) const {
  const std::int32_t first =
      options_.locality ? options_.locality->first_rank[static_cast<std::size_t>(expert)] : expert;
  return first % num_ranks;
}

// saved: f32 [num_tokens, num_experts] p
void EtrPolicy::make_offers(const Scores& scores, PolicyState& state) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  if (options_.locality) options_.locality->check(name(), scores);
  Routing& routing = state.routing;
  routing.row_ptr.assign(1, 0);
  state.saved.resize(num_tokens * num_experts);
  std::vector<std::int32_t>& order = state.indices;
  order.resize(num_experts);
  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* delta = scores.logits.data() + t * num_experts;
    float* p = state.saved.data() + t * num_experts;
    const float top = *std::max_element(delta, delta + num_experts);
    double sum = 0;
    for (std::size_t e = 0; e < num_experts; ++e)
      sum += static_cast<double>(
          p[e] = static_cast<float>(
              std::exp((static_cast<double>(delta[e]) - static_cast<double>(top)) / options_.temperature)));
    const auto inverse = static_cast<float>(1 / sum);
    for (std::size_t e = 0; e < num_experts; ++e) p[e] *= inverse;

    std::iota(order.begin(), order.end(), 0);
    const auto by_affinity = [delta](std::int32_t a, std::int32_t b) {
      return delta[a] != delta[b] ? delta[a] > delta[b] : a < b;
    };
    std::partial_sort(order.begin(), order.begin() + options_.top_k, order.end(), by_affinity);
    double mass = static_cast<double>(delta[order[0]]);
    std::size_t count = 1;
    for (; count < top_k && mass < options_.tau && delta[order[count]] > 0; ++count)
      mass += static_cast<double>(delta[order[count]]);
    std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count));
    for (std::size_t i = 0; i < count; ++i) {
      routing.expert.push_back(order[i]);
      routing.weight.push_back(static_cast<float>(options_.route_scale) * p[order[i]]);
    }
    routing.row_ptr.push_back(static_cast<std::int64_t>(routing.expert.size()));
  }
  state.statistics.sums[0] = static_cast<double>(routing.expert.size());
  if (!state.training) return;
  double* offers = state.statistics.sums.data() + kFigures.size() + 2 * num_experts;
  for (const std::int32_t e : routing.expert) offers[e] += 1;
}

// Deltas of the offers, by owner, then expert, then token. state.indices becomes int32 [offers]: the routes in that order.
void EtrPolicy::send_offers(const Scores& scores, const GatheredCounts& counts, PolicyState& state) const {
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  const Routing& routing = state.routing;
  const std::int32_t ranks = counts.num_ranks();
  state.send_counts.assign(static_cast<std::size_t>(ranks), 0);
  state.receive_counts.assign(static_cast<std::size_t>(ranks), 0);
  std::vector<std::size_t> next(num_experts);
  std::size_t at = 0;
  for (std::int32_t r = 0; r < ranks; ++r)
    for (std::int32_t e = 0; e < scores.num_experts; ++e) {
      if (owner(e, ranks) != r) continue;
      next[static_cast<std::size_t>(e)] = at;
      const std::int64_t mine = counts.of(counts.own(), static_cast<std::size_t>(e));
      at += static_cast<std::size_t>(mine);
      state.send_counts[static_cast<std::size_t>(r)] += mine;
      if (r == counts.own())
        for (std::int32_t s = 0; s < ranks; ++s)
          state.receive_counts[static_cast<std::size_t>(s)] += counts.of(s, static_cast<std::size_t>(e));
    }
  state.buffer.resize(at);
  state.indices.resize(at);
  for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t)
    for (auto i = routing.row_ptr[t]; i < routing.row_ptr[t + 1]; ++i) {
      const auto e = static_cast<std::size_t>(routing.expert[static_cast<std::size_t>(i)]);
      const std::size_t to = next[e]++;
      state.indices[to] = static_cast<std::int32_t>(i);
      state.buffer[to] = static_cast<double>(scores.logits[t * num_experts + e]);
    }
  state.exchange = ExchangeKind::kAllToAll;
}

// A bit for each offer received, in the order of its sender.
void EtrPolicy::answer(const Scores& scores, const GatheredCounts& counts, PolicyState& state) const {
  const std::int32_t ranks = counts.num_ranks();
  std::vector<std::size_t> next(static_cast<std::size_t>(ranks));  // in gathered, of each source
  std::size_t expected = 0;
  for (std::size_t s = 0; s < next.size(); ++s) {
    next[s] = expected;
    expected += static_cast<std::size_t>(state.receive_counts[s]);
  }
  Require(state.gathered.size() == expected, ErrorCode::kInvalidState, "policy etr: ", state.gathered.size(),
          " offers arrived, ", expected, " were announced");
  const std::vector<std::size_t> begin = next;
  std::vector<char> flags(expected), taken;
  std::vector<double> delta;
  std::vector<std::int32_t> order;
  const std::int64_t limit = capacity(counts.num_routes(), counts.num_tokens(), scores.num_experts);
  for (std::int32_t e = 0; e < scores.num_experts; ++e) {
    if (owner(e, ranks) != counts.own()) continue;
    delta.clear();
    for (std::int32_t s = 0; s < ranks; ++s) {  // so that ties go to the lower rank, then token
      const auto from =
          state.gathered.begin() + static_cast<std::ptrdiff_t>(next[static_cast<std::size_t>(s)]);
      delta.insert(delta.end(), from, from + counts.of(s, static_cast<std::size_t>(e)));
    }
    best_of(delta, limit, order, taken);
    std::size_t i = 0;
    for (std::int32_t s = 0; s < ranks; ++s)
      for (std::int64_t n = counts.of(s, static_cast<std::size_t>(e)); n > 0; --n)
        flags[next[static_cast<std::size_t>(s)]++] = taken[i++];
  }
  state.buffer.clear();
  for (std::size_t s = 0; s < begin.size(); ++s) {
    const std::int64_t num = state.receive_counts[s];
    for (std::int64_t first = 0; first < num; first += kFlagsPerValue) {
      std::uint64_t bits = 0;
      for (std::int64_t i = first; i < std::min(num, first + kFlagsPerValue); ++i)
        bits |= static_cast<std::uint64_t>(flags[begin[s] + static_cast<std::size_t>(i)]) << (i - first);
      state.buffer.push_back(static_cast<double>(bits));
    }
  }
  std::swap(state.send_counts, state.receive_counts);
  for (std::vector<std::int64_t>* list : {&state.send_counts, &state.receive_counts})
    for (std::int64_t& n : *list) n = values_of_flags(n);
}

void EtrPolicy::take_answers(const Scores& scores, const GatheredCounts& counts, PolicyState& state) const {
  std::vector<char> taken(state.indices.size());
  std::size_t offer = 0, value = 0;
  for (std::int32_t r = 0; r < counts.num_ranks(); ++r) {
    std::int64_t num = 0;  // offers to this owner
    for (std::int32_t e = 0; e < scores.num_experts; ++e)
      if (owner(e, counts.num_ranks()) == r) num += counts.of(counts.own(), static_cast<std::size_t>(e));
    Require(value + static_cast<std::size_t>(values_of_flags(num)) <= state.gathered.size(),
            ErrorCode::kInvalidState, "policy etr: rank ", r, " answered less than the ", num,
            " offers it was sent");
    for (std::int64_t i = 0; i < num; ++i) {
      const double packed = state.gathered[value + static_cast<std::size_t>(i / kFlagsPerValue)];
      Require(packed >= 0 && packed < 4294967296.0, ErrorCode::kInvalidState, "policy etr: rank ", r,
              " answered ", packed, ", which is no set of ", kFlagsPerValue, " bits");
      taken[static_cast<std::size_t>(state.indices[offer++])] =
          static_cast<char>(static_cast<std::uint64_t>(packed) >> (i % kFlagsPerValue) & 1);
    }
    value += static_cast<std::size_t>(values_of_flags(num));
  }
  keep_routes(state.routing, [&](std::size_t i, std::int32_t) { return taken[i] != 0; });
}

bool EtrPolicy::choose(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const {
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  if (state.training)
    Require(adaptive.values.size() == num_experts + 2, ErrorCode::kInvalidArgument,
            "policy etr: the adaptive state has ", adaptive.values.size(), " values, must have ",
            num_experts + 2, " (mode, crowding, a threshold an expert)");
  if (state.step == 0) {
    make_offers(scores, state);
    if (!state.training || options_.capacity_factor == 0) return finish(scores, adaptive, state);
    if (!options_.local_quota) {
      ask_for_counts(scores, state);
      return false;
    }
    const std::int64_t limit = capacity(state.routing.num_routes(), scores.num_tokens, scores.num_experts,
                                        options_.locality ? options_.locality->num_ranks : 1);
    if (!both(adaptive)) {
      std::vector<std::int64_t> room(num_experts, limit);
      keep_routes(state.routing,
                  [&](std::size_t, std::int32_t e) { return room[static_cast<std::size_t>(e)]-- > 0; });
      return finish(scores, adaptive, state);
    }
    std::vector<std::vector<std::int32_t>> routes(num_experts);
    std::vector<std::vector<double>> delta(num_experts);
    for (std::size_t t = 0; t + 1 < state.routing.row_ptr.size(); ++t)
      for (auto i = state.routing.row_ptr[t]; i < state.routing.row_ptr[t + 1]; ++i) {
        const auto e = static_cast<std::size_t>(state.routing.expert[static_cast<std::size_t>(i)]);
        routes[e].push_back(static_cast<std::int32_t>(i));
        delta[e].push_back(static_cast<double>(scores.logits[t * num_experts + e]));
      }
    std::vector<char> keep(state.routing.expert.size()), taken;
    for (std::size_t e = 0; e < num_experts; ++e) {
      best_of(delta[e], limit, state.indices, taken);
      for (std::size_t i = 0; i < routes[e].size(); ++i)
        keep[static_cast<std::size_t>(routes[e][i])] = taken[i];
    }
    keep_routes(state.routing, [&](std::size_t i, std::int32_t) { return keep[i] != 0; });
    return finish(scores, adaptive, state);
  }
  if (state.step == 1) state.kept = state.gathered;
  // What this rank gave is no longer in the buffer after the first exchange, but it is its row.
  const std::size_t width = num_experts + 1;
  Require(!state.kept.empty() && state.kept.size() % width == 0, ErrorCode::kInvalidState,
          "policy etr: ", state.kept.size(), " values were gathered; rows have ", width);
  const auto own = static_cast<std::size_t>(scores.rank) % (state.kept.size() / width);
  const GatheredCounts counts(name(), scores.rank, scores.num_experts,
                              state.step == 1 ? std::span<const double>(state.buffer)
                                              : std::span(state.kept).subspan(own * width, width),
                              state.kept);
  if (state.step == 1) {
    if (both(adaptive)) {
      send_offers(scores, counts, state);
      return false;
    }
    const std::int64_t limit = capacity(counts.num_routes(), counts.num_tokens(), scores.num_experts);
    std::vector<std::int64_t> room(num_experts);
    for (std::size_t e = 0; e < num_experts; ++e) room[e] = limit - counts.before(counts.own(), e);
    keep_routes(state.routing,
                [&](std::size_t, std::int32_t e) { return room[static_cast<std::size_t>(e)]-- > 0; });
    return finish(scores, adaptive, state);
  }
  if (state.step == 2) {
    answer(scores, counts, state);
    return false;
  }
  take_answers(scores, counts, state);
  return finish(scores, adaptive, state);
}

bool EtrPolicy::finish(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const {
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  Routing& routing = state.routing;
  std::vector<double>& sums = state.statistics.sums;
  sums[1] = sums[0] - static_cast<double>(routing.expert.size());
  if (options_.renormalize)
    for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t) {
      double sum = 0;
      for (auto i = routing.row_ptr[t]; i < routing.row_ptr[t + 1]; ++i)
        sum += static_cast<double>(routing.weight[static_cast<std::size_t>(i)]);
      if (sum == 0) continue;
      for (auto i = routing.row_ptr[t]; i < routing.row_ptr[t + 1]; ++i) {
        float& w = routing.weight[static_cast<std::size_t>(i)];
        w = static_cast<float>(options_.route_scale * static_cast<double>(w) / sum);
      }
    }
  if (!state.training) return true;
  if (both(adaptive)) sums[2] = static_cast<double>(scores.num_tokens);
  double* taken = sums.data() + kFigures.size();
  double* above = taken + num_experts;
  for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t) {
    const float* delta = scores.logits.data() + t * num_experts;
    for (std::size_t e = 0; e < num_experts; ++e)
      above[e] += static_cast<double>(delta[e]) > adaptive.values[2 + e] ? 1 : 0;
    for (auto i = routing.row_ptr[t]; i < routing.row_ptr[t + 1]; ++i) {
      const std::int32_t e = routing.expert[static_cast<std::size_t>(i)];
      taken[e] += static_cast<double>(delta[e]);
    }
  }
  locality_loss_.add_sums(scores, state.saved.data(),
                          std::span(sums).subspan(kFigures.size() + 3 * num_experts));
  return true;
}

void EtrPolicy::adapt(std::span<const PolicyState* const> batches, AdaptiveState& adaptive) const {
  const std::size_t num_experts = adaptive.values.size() - 2;
  for (const PolicyState* batch : batches)
    Require(batch->done && batch->training && batch->statistics.tokens_of_expert.size() == num_experts,
            ErrorCode::kInvalidState,
            "policy etr: adapt() needs batches of these experts whose step() is done in training");
  double tokens = 0, offers = 0;
  for (const PolicyState* batch : batches) {
    tokens += static_cast<double>(batch->statistics.num_tokens);
    offers += batch->statistics.sums[0];
  }
  if (tokens == 0) return;  // nothing was observed
  const auto limit = static_cast<double>(
      capacity(std::llround(offers), std::llround(tokens), static_cast<std::int32_t>(num_experts)));
  double crowding = 0, seen = 0;
  for (std::size_t e = 0; e < num_experts; ++e) {
    double delta = 0, above = 0, taken = 0;
    for (const PolicyState* batch : batches) {
      const double* sums = batch->statistics.sums.data() + kFigures.size();
      delta += sums[e];
      above += sums[num_experts + e];
      taken += static_cast<double>(batch->statistics.tokens_of_expert[e]);
    }
    double& threshold = adaptive.values[2 + e];
    if (threshold < 2) {
      crowding += 2 * above / limit;
      seen += 1;
    }
    if (taken > 0) threshold = std::min(delta / taken, 1.0);
  }
  if (seen == 0) return;
  crowding /= seen;
  double& running = adaptive.values[1];
  running = running < 0 ? crowding : options_.switch_decay * running + (1 - options_.switch_decay) * crowding;
  if (running <= options_.switch_on) adaptive.values[0] = 1;
  if (running > options_.switch_off) adaptive.values[0] = 0;
}

std::span<const double> EtrPolicy::locality_sums(const PolicyState& state, std::int32_t num_experts) const {
  return std::span(state.statistics.sums)
      .subspan(kFigures.size() + 3 * static_cast<std::size_t>(num_experts));
}

// d(aux)/d(p_te) / (offers to e)
double EtrPolicy::aux_factor(std::int32_t num_experts, const PolicyState& state) const {
  const double offers = state.statistics.sums[0];
  return offers == 0
             ? 0
             : options_.aux_loss * num_experts / (offers * static_cast<double>(state.statistics.num_tokens));
}

double EtrPolicy::auxiliary(const Scores& scores, const AdaptiveState&, const BatchStatistics&,
                            PolicyState& state) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  double weighted = 0;
  if (options_.aux_loss > 0)
    for (std::size_t e = 0; e < num_experts; ++e) {
      double sum = 0;
      for (std::size_t t = 0; t < num_tokens; ++t)
        sum += static_cast<double>(state.saved[t * num_experts + e]);
      weighted += state.statistics.sums[kFigures.size() + 2 * num_experts + e] * sum;
    }
  return aux_factor(scores.num_experts, state) * weighted +
         locality_loss_.loss(scores, locality_sums(state, scores.num_experts));
}

void EtrPolicy::gradient(const Scores& scores, const AdaptiveState&, const PolicyState& state,
                         std::span<const float> dweight, std::span<float> dlogits) const {
  const auto num_tokens = static_cast<std::size_t>(scores.num_tokens);
  const auto num_experts = static_cast<std::size_t>(scores.num_experts);
  std::vector<double>& upstream = state.scratch;
  upstream.resize(num_experts);
  const Routing& routing = state.routing;
  const double factor = aux_factor(scores.num_experts, state);
  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* p = state.saved.data() + t * num_experts;
    const auto begin = static_cast<std::size_t>(routing.row_ptr[t]);
    const auto end = static_cast<std::size_t>(routing.row_ptr[t + 1]);
    for (std::size_t e = 0; e < num_experts; ++e)
      upstream[e] = factor * state.statistics.sums[kFigures.size() + 2 * num_experts + e];
    locality_loss_.add_gradient(scores, t, locality_sums(state, scores.num_experts), upstream);
    if (!options_.renormalize)
      for (std::size_t i = begin; i < end; ++i)
        upstream[static_cast<std::size_t>(routing.expert[i])] +=
            options_.route_scale * static_cast<double>(dweight[i]);
    double mean = 0;
    for (std::size_t e = 0; e < num_experts; ++e) mean += static_cast<double>(p[e]) * upstream[e];
    for (std::size_t e = 0; e < num_experts; ++e)
      upstream[e] = static_cast<double>(p[e]) * (upstream[e] - mean);
    if (options_.renormalize) {
      double along = 0;  // sum over the kept of a q, with w = scale * q
      for (std::size_t i = begin; i < end; ++i)
        along +=
            static_cast<double>(dweight[i]) * static_cast<double>(routing.weight[i]) / options_.route_scale;
      for (std::size_t i = begin; i < end; ++i)
        upstream[static_cast<std::size_t>(routing.expert[i])] +=
            static_cast<double>(routing.weight[i]) * (static_cast<double>(dweight[i]) - along);
    }
    for (std::size_t e = 0; e < num_experts; ++e)
      dlogits[t * num_experts + e] = static_cast<float>(upstream[e] / options_.temperature);
  }
}

}  // namespace sluice
