// What one rank computes to build a dispatch plan, on one core: all steps of PlanBuilder, without the exchanges between
// them. What the measured rank receives is captured beforehand from builders of all ranks, for several routings that
// take turns, so that no branch predictor learns them. A plain implementation of the same lists takes turns with it and
// must produce the same plan and the same messages in the same run.
//
//   plan_benchmark [--json] [--iterations N] [--only TEXT] [--commit ID]
#include <sys/utsname.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "plain_plan.hpp"
#include "sluice/base/clock.hpp"
#include "sluice/scheduler/plan.hpp"

namespace sluice {
namespace {

struct Case {
  std::string name;
  std::int64_t num_tokens = 8192;  // a rank
  std::int32_t routes_per_token = 8;
  std::int32_t num_experts = 256;
  std::int32_t num_ranks = 64;
  std::int32_t num_nodes = 8;
  double skew = 0;         // popularity of expert e is 1 / (e' + 1)^skew, e' its place in a random order
  bool scattered = false;  // experts dealt to ranks at random instead of contiguously
  std::int32_t num_chunks = 1;
  Exchange exchange = Exchange::kGateway;

  std::int64_t num_routes() const { return num_tokens * routes_per_token; }
  std::string shape() const {
    return str(num_tokens, " tokens a rank, ", routes_per_token, " routes each, ", num_experts, " experts, ",
               num_ranks, " ranks on ", num_nodes, num_nodes == 1 ? " node" : " nodes",
               exchange == Exchange::kGateway ? ", gateway exchange" : ", direct exchange",
               skew > 0 ? str(", Zipf ", skew) : ", uniform", scattered ? ", scattered placement" : "", ", ",
               num_chunks, num_chunks == 1 ? " chunk" : " chunks");
  }
};

// Draws distinct experts of a token by popularity: rejection of what was already drawn.
class Router {
 public:
  explicit Router(const Case& c) : case_(c), order_(static_cast<std::size_t>(c.num_experts)) {
    std::mt19937_64 rng(4711);
    for (std::size_t e = 0; e < order_.size(); ++e) order_[e] = static_cast<std::int32_t>(e);
    std::shuffle(order_.begin(), order_.end(), rng);
    double sum = 0;
    for (std::int32_t e = 0; e < c.num_experts; ++e) cumulative_.push_back(sum += std::pow(e + 1.0, -c.skew));
    for (double& v : cumulative_) v /= sum;
  }

  Routing draw(std::int32_t rank, std::int32_t variant) const {
    std::mt19937_64 rng(1 + static_cast<std::uint64_t>(rank) * 1000 + static_cast<std::uint64_t>(variant));
    std::uniform_real_distribution<float> uniform(0, 1);
    Routing out;
    out.num_experts = case_.num_experts;
    out.row_ptr.reserve(static_cast<std::size_t>(case_.num_tokens) + 1);
    out.expert.reserve(static_cast<std::size_t>(case_.num_routes()));
    out.weight.reserve(static_cast<std::size_t>(case_.num_routes()));
    std::vector<std::int64_t> drawn_for(static_cast<std::size_t>(case_.num_experts), -1);
    for (std::int64_t t = 0; t < case_.num_tokens; ++t) {
      for (std::int32_t k = 0; k < case_.routes_per_token;) {
        const std::int32_t e = draw_expert(rng);
        std::int64_t& last = drawn_for[static_cast<std::size_t>(e)];
        if (last == t) continue;
        last = t;
        out.expert.push_back(e);
        out.weight.push_back(uniform(rng));
        ++k;
      }
      std::sort(out.expert.end() - case_.routes_per_token, out.expert.end());
      out.row_ptr.push_back(static_cast<std::int64_t>(out.expert.size()));
    }
    return out;
  }

 private:
  std::int32_t draw_expert(std::mt19937_64& rng) const {
    if (case_.skew == 0)
      return static_cast<std::int32_t>(rng() % static_cast<std::uint64_t>(case_.num_experts));
    const double u = std::uniform_real_distribution<double>(0, 1)(rng);
    const auto at = std::upper_bound(cumulative_.begin(), cumulative_.end() - 1, u) - cumulative_.begin();
    return order_[static_cast<std::size_t>(at)];
  }
  const Case& case_;
  std::vector<std::int32_t> order_;
  std::vector<double> cumulative_;
};

Placement make_case_placement(const Case& c) {
  if (!c.scattered) return contiguous_placement(c.num_experts, c.num_ranks);
  std::mt19937_64 rng(815);
  std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(c.num_ranks));
  std::vector<std::int32_t> experts(static_cast<std::size_t>(c.num_experts));
  for (std::size_t e = 0; e < experts.size(); ++e) experts[e] = static_cast<std::int32_t>(e);
  std::shuffle(experts.begin(), experts.end(), rng);
  for (std::size_t i = 0; i < experts.size(); ++i) lists[i % lists.size()].push_back(experts[i]);
  return placement_from_lists(c.num_experts, lists);
}

// What the measured rank receives, step by step.
struct Received {
  Routing routing;
  std::vector<std::int64_t> summaries, counts, offsets;
  std::vector<std::int32_t> headers1, headers2;
};

// Builders of all ranks would not fit in memory together at 1,024 ranks: ranks are taken one by one and brought as far
// as the messages of the step need.
class World {
 public:
  explicit World(const Case& c)
      : case_(c),
        topology_(Topology::uniform(c.num_ranks, c.num_nodes)),
        placement_(make_case_placement(c)),
        router_(c) {}

  const Topology& topology() const { return topology_; }
  const Placement& placement() const { return placement_; }
  RankId measured() const { return RankId(case_.num_ranks / 2); }
  PlanOptions options() const { return {case_.exchange, case_.num_chunks}; }
  PlanBuilder make_builder(RankId rank) const { return PlanBuilder(rank, topology_, placement_, options()); }

  Received capture(std::int32_t variant) const {
    const std::int32_t num_ranks = case_.num_ranks;
    std::vector<std::int64_t> gathered;
    std::vector<std::vector<std::int64_t>> counts(static_cast<std::size_t>(num_ranks)), offsets = counts;
    Plan plan;
    const auto bring = [&](std::int32_t r, int step, auto&& use) {
      PlanBuilder builder = make_builder(RankId(r));
      const Routing routing = router_.draw(r, variant);
      builder.begin(routing, plan);
      if (step >= 1) builder.take_summaries(gathered);
      if (step >= 2) builder.take_counts(column(counts, r, PlanBuilder::kCountsPerPeer));
      if (step >= 3) builder.take_offsets(column(offsets, r, PlanBuilder::kOffsetsPerPeer));
      use(builder);
    };
    for (std::int32_t r = 0; r < num_ranks; ++r)
      bring(r, 0,
            [&](PlanBuilder& b) { gathered.insert(gathered.end(), b.summary().begin(), b.summary().end()); });
    for (std::int32_t r = 0; r < num_ranks; ++r)
      bring(r, 1, [&](PlanBuilder& b) { counts[at(r)].assign(b.counts().begin(), b.counts().end()); });
    for (std::int32_t r = 0; r < num_ranks; ++r)
      bring(r, 2, [&](PlanBuilder& b) { offsets[at(r)].assign(b.offsets().begin(), b.offsets().end()); });

    const Topology exchange =
        case_.exchange == Exchange::kGateway ? topology_ : Topology::uniform(num_ranks, 1);
    const std::vector<std::int32_t>& members = exchange.ranks_of(exchange.node_of(measured()));
    // Hop-1 words that each member receives; sources ascend, as the members expect.
    std::map<std::int32_t, std::vector<std::int32_t>> headers1;
    for (std::int32_t r = 0; r < num_ranks && case_.exchange == Exchange::kGateway; ++r)
      bring(r, 3, [&](PlanBuilder& b) {
        const auto sent = b.headers1();
        for (const auto& m : sent.messages)
          if (exchange.same_node(m.peer, measured())) append(headers1[m.peer.value], sent.words, m);
      });
    Received out;
    for (const std::int32_t m : members)
      bring(m, 3, [&](PlanBuilder& b) {
        b.take_headers1(headers1[m]);
        const auto sent = b.headers2();
        for (const auto& message : sent.messages)
          if (message.peer == measured()) append(out.headers2, sent.words, message);
      });
    out.routing = router_.draw(measured().value, variant);
    out.summaries = std::move(gathered);
    out.counts = column(counts, measured().value, PlanBuilder::kCountsPerPeer);
    out.offsets = column(offsets, measured().value, PlanBuilder::kOffsetsPerPeer);
    out.headers1 = std::move(headers1[measured().value]);
    return out;
  }

 private:
  static std::size_t at(std::int32_t i) { return static_cast<std::size_t>(i); }
  static std::vector<std::int64_t> column(const std::vector<std::vector<std::int64_t>>& sent,
                                          std::int32_t rank, std::int64_t per_peer) {
    std::vector<std::int64_t> out;
    for (const auto& row : sent)
      out.insert(out.end(), row.begin() + rank * per_peer, row.begin() + (rank + 1) * per_peer);
    return out;
  }
  static void append(std::vector<std::int32_t>& to, std::span<const std::int32_t> words,
                     const PlanBuilder::Message& m) {
    const auto block =
        words.subspan(static_cast<std::size_t>(m.word_begin), static_cast<std::size_t>(m.num_words));
    to.insert(to.end(), block.begin(), block.end());
  }
  const Case& case_;
  const Topology topology_;
  const Placement placement_;
  const Router router_;
};

constexpr std::array<const char*, 6> kSteps = {"begin",        "take_summaries", "take_counts",
                                               "take_offsets", "take_headers1",  "take_headers2"};
constexpr std::size_t kNumSteps = kSteps.size();

// Times of one build in microseconds.
struct Times {
  double total = 0;  // the steps together
  std::array<double, kNumSteps> step{};
  double copy = 0;  // handing over the payload, which is what an exchange within one process adds
};

// One build. Before each step its input is copied to where the step reads it, as an exchange does; that is timed apart.
template <typename Builder>
Times build(Builder& builder, const Received& in, Received& landing, Plan& plan) {
  Times times;
  std::size_t i = 0;
  const auto step = [&](const auto& from, auto& to, auto&& take) {
    const auto start = Clock::now();
    to = from;
    const auto ready = Clock::now();
    take();
    const auto done = Clock::now();
    if (i > 0) times.copy += to_us(ready - start);  // the routing is the caller's, it does not travel
    times.step[i] = to_us(done - ready);
    times.total += times.step[i++];
  };
  step(in.routing, landing.routing, [&] { builder.begin(landing.routing, plan); });
  step(in.summaries, landing.summaries, [&] { builder.take_summaries(landing.summaries); });
  step(in.counts, landing.counts, [&] { builder.take_counts(landing.counts); });
  step(in.offsets, landing.offsets, [&] { builder.take_offsets(landing.offsets); });
  step(in.headers1, landing.headers1, [&] { builder.take_headers1(landing.headers1); });
  step(in.headers2, landing.headers2, [&] { builder.take_headers2(landing.headers2); });
  return times;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}
double mad(const std::vector<double>& values) {
  const double middle = median(values);
  std::vector<double> away;
  for (const double v : values) away.push_back(std::abs(v - middle));
  return median(away);
}

[[noreturn]] void differ(const Case& c, const std::string& what) {
  throw std::runtime_error(c.name + ": the plain plan differs: " + what);
}

// Plans and messages of both builders are the same; hashes are left out, the plain one has none.
void compare(const Case& c, const PlanBuilder& builder, const Plan& plan, const testing::PlainPlanner& plain,
             const Plan& plain_plan) {
  const std::string difference = testing::first_difference(plan, plain_plan);
  if (!difference.empty()) differ(c, difference);
  for (std::size_t i = 0; i < builder.summary().size(); ++i)
    if (i != 1 && builder.summary()[i] != plain.summary()[i]) differ(c, str("summary ", i));
  for (std::size_t i = 0; i < builder.counts().size(); ++i)
    if (i % 6 != 2 && i % 6 != 5 && builder.counts()[i] != plain.counts()[i]) differ(c, str("counts ", i));
  const auto same_headers = [&](const PlanBuilder::Headers& a, const testing::PlainPlanner::Messages& b,
                                const char* name) {
    if (a.messages.size() != b.size()) differ(c, str(name, " has ", a.messages.size(), " messages"));
    for (std::size_t i = 0; i < b.size(); ++i) {
      const auto& m = a.messages[i];
      const auto words =
          a.words.subspan(static_cast<std::size_t>(m.word_begin), static_cast<std::size_t>(m.num_words));
      if (m.peer.value != b[i].first || !std::ranges::equal(words, b[i].second))
        differ(c, str(name, " to rank ", m.peer.value));
    }
  };
  same_headers(builder.headers1(), plain.headers1(), "headers1");
  same_headers(builder.headers2(), plain.headers2(), "headers2");
}

nlohmann::json run(const Case& c, int iterations, std::ostream& log) {
  const World world(c);
  // Routings take turns; together they hold at least half a million routes.
  const auto variants = static_cast<std::int32_t>(
      std::clamp<std::int64_t>((1 << 19) / c.num_routes(), 2, c.num_ranks > 256 ? 4 : 32));
  std::vector<Received> in;
  for (std::int32_t v = 0; v < variants; ++v) in.push_back(world.capture(v));

  PlanBuilder builder = world.make_builder(world.measured());
  testing::PlainPlanner plain(world.measured(), world.topology(), world.placement(), world.options());
  Plan plan, plain_plan;
  Received landing;
  for (const Received& r : in) {
    build(builder, r, landing, plan);
    build(plain, r, landing, plain_plan);
    compare(c, builder, plan, plain, plain_plan);
    plan.validate();
  }

  std::vector<double> total, copy, plain_total;
  std::array<std::vector<double>, kNumSteps> step;
  // Two ways: one build after the other, as in a loop over plans, then in turns with the plain code, which leaves the
  // caches full of its own lists, as a layer's work between two plans would.
  for (int i = 0; i < iterations; ++i) {
    const Received& r = in[static_cast<std::size_t>(i) % in.size()];
    const Times times = build(builder, r, landing, plan);
    total.push_back(times.total);
    for (std::size_t s = 0; s < kNumSteps; ++s) step[s].push_back(times.step[s]);
    copy.push_back(times.copy);
  }
  std::vector<double> cold;
  for (int i = 0; i < iterations; ++i) {
    const Received& r = in[static_cast<std::size_t>(i) % in.size()];
    cold.push_back(build(builder, r, landing, plan).total);
    plain_total.push_back(build(plain, r, landing, plain_plan).total);
  }
  compare(c, builder, plan, plain, plain_plan);

  nlohmann::json row;
  row["case"] = c.name;
  row["shape"] = c.shape();
  row["routes"] = c.num_routes();
  row["ranks"] = c.num_ranks;
  row["min_us"] = *std::min_element(total.begin(), total.end());
  row["median_us"] = median(total);
  row["mad_us"] = mad(total);
  row["median_ns_per_route"] = median(total) * 1e3 / static_cast<double>(c.num_routes());
  row["min_ns_per_route"] = row["min_us"].get<double>() * 1e3 / static_cast<double>(c.num_routes());
  row["baseline"] = "plain";
  row["baseline_us"] = median(plain_total);
  row["baseline_min_us"] = *std::min_element(plain_total.begin(), plain_total.end());
  row["ratio"] = median(plain_total) / median(cold);  // of the same turns
  row["cold_min_us"] = *std::min_element(cold.begin(), cold.end());
  row["cold_median_us"] = median(cold);
  row["cold_mad_us"] = mad(cold);
  row["payload_copy_us"] = median(copy);
  row["iterations"] = iterations;
  row["routings_in_turn"] = variants;
  for (std::size_t s = 0; s < kNumSteps; ++s) {
    row["steps_us"][kSteps[s]] = median(step[s]);
    row["steps_min_us"][kSteps[s]] = *std::min_element(step[s].begin(), step[s].end());
  }
  row["rows_handed_on"] = plan.recv1.num_rows();
  row["rows_received"] = plan.recv2.num_rows();
  row["positions"] = plan.num_positions();

  char line[256];
  std::snprintf(line, sizeof line,
                "%-24s min %9.1f  median %9.1f +- %7.1f us  %6.2f ns/route  in turns %9.1f, plain %9.1f us  "
                "x%5.2f  copy %7.1f",
                c.name.c_str(), row["min_us"].get<double>(), row["median_us"].get<double>(),
                row["mad_us"].get<double>(), row["median_ns_per_route"].get<double>(),
                row["cold_median_us"].get<double>(), row["baseline_us"].get<double>(),
                row["ratio"].get<double>(), row["payload_copy_us"].get<double>());
  log << line << "\n   ";
  for (std::size_t s = 0; s < kNumSteps; ++s) {
    std::snprintf(line, sizeof line, " %s %.1f/%.1f", kSteps[s], row["steps_min_us"][kSteps[s]].get<double>(),
                  row["steps_us"][kSteps[s]].get<double>());
    log << line;
  }
  log << std::endl;
  return row;
}

std::vector<Case> all_cases() {
  std::vector<Case> out;
  const auto add = [&](std::string name, auto&& change) {
    Case c;
    c.name = std::move(name);
    change(c);
    out.push_back(c);
  };
  add("plan_build", [](Case&) {});
  add("plan_build_zipf", [](Case& c) { c.skew = 1; });
  add("plan_build_scattered", [](Case& c) { c.scattered = true; });
  add("plan_build_direct", [](Case& c) { c.exchange = Exchange::kDirect; });
  add("plan_build_direct_zipf", [](Case& c) {
    c.exchange = Exchange::kDirect;
    c.skew = 1;
  });
  add("plan_build_chunks", [](Case& c) { c.num_chunks = 4; });
  for (std::int64_t tokens = 128; tokens <= 131072; tokens *= 4)
    if (tokens != 8192) add(str("plan_build_routes_", tokens * 8), [&](Case& c) { c.num_tokens = tokens; });
  for (std::int32_t ranks = 2; ranks <= 1024; ranks *= 2)
    if (ranks != 64)
      add(str("plan_build_ranks_", ranks), [&](Case& c) {
        c.num_ranks = ranks;
        c.num_nodes = ranks <= 8 ? (ranks == 2 ? 1 : 2) : ranks / 8;
      });
  return out;
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown CPU";
}

int main_checked(int argc, char** argv) {
  bool json = false;
  int iterations = 200;
  std::string only, commit = "unknown";
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) throw std::runtime_error(arg + " needs a value");
      return std::string(argv[++i]);
    };
    if (arg == "--json") {
      json = true;
    } else if (arg == "--iterations") {
      iterations = std::stoi(value());
    } else if (arg == "--only") {
      only = value();
    } else if (arg == "--commit") {
      commit = value();
    } else {
      throw std::runtime_error("unknown argument " + arg + "; known: --json --iterations --only --commit");
    }
  }
  nlohmann::json out;
  const std::time_t now = std::time(nullptr);
  char date[32];
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  utsname system{};
  uname(&system);
  out["benchmark"] = "plan_build";
  out["date"] = date;
  out["commit"] = commit;
  out["device"] = cpu_name() + ", one core";
  out["driver"] = std::string(system.sysname) + " " + system.release;
  for (const Case& c : all_cases())
    if (only.empty() || c.name == only) out["rows"].push_back(run(c, iterations, std::cerr));
  if (json) std::cout << out.dump(1) << std::endl;
  return 0;
}

}  // namespace
}  // namespace sluice

int main(int argc, char** argv) {
  try {
    return sluice::main_checked(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "plan_benchmark: " << e.what() << std::endl;
    return 1;
  }
}
