// One Mixture-of-Experts layer over four ranks, threads of this process that play two nodes of two ranks: forward,
// backward, and a plain loop over all routes that must agree. Prints what crossed which link.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "sluice/moe_layer.hpp"
#include "sluice/runtime.hpp"

namespace {

constexpr std::int32_t kRanks = 4, kNodes = 2, kExperts = 8;
constexpr std::int64_t kTokens = 32, kHidden = 16, kFfn = 24;  // tokens of each rank

struct Expert {
  std::vector<float> w1, w2;            // f32 [2 * ffn, hidden], [hidden, ffn]
  std::vector<float> grad_w1, grad_w2;  // likewise
};

// E(x) = W2 (silu(W1 x) * (W3 x)) in double, w1 = [W1; W3].
std::vector<double> plain_expert(const Expert& e, const std::vector<double>& x) {
  std::vector<double> a(kFfn), out(kHidden, 0.0);
  for (std::int64_t f = 0; f < kFfn; ++f) {
    double gate = 0, up = 0;
    for (std::int64_t i = 0; i < kHidden; ++i) {
      gate += e.w1[f * kHidden + i] * x[i];
      up += e.w1[(kFfn + f) * kHidden + i] * x[i];
    }
    a[f] = gate / (1 + std::exp(-gate)) * up;
  }
  for (std::int64_t o = 0; o < kHidden; ++o)
    for (std::int64_t f = 0; f < kFfn; ++f) out[o] += e.w2[o * kFfn + f] * a[f];
  return out;
}

std::vector<float> random_values(std::mt19937& rng, std::int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  std::generate(values.begin(), values.end(), [&] { return normal(rng); });
  return values;
}

// What one rank computed, and from what.
struct Share {
  sluice::Routing routing;
  std::vector<float> x, dy, y, dx, dw;
  sluice::Traffic traffic;
};

void play_rank(sluice::Runtime& runtime, const sluice::Placement& placement, std::vector<Expert>& experts,
               Share& share) {
  std::mt19937 rng(100 + static_cast<unsigned>(runtime.rank().value));
  share.x = random_values(rng, kTokens * kHidden, 1);
  share.dy = random_values(rng, kTokens * kHidden, 1);
  share.y = share.dx = std::vector<float>(kTokens * kHidden);

  // Any number of experts a token, experts ascending: a ragged list.
  share.routing.num_experts = kExperts;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (std::int32_t e = 0; e < kExperts; ++e)
      if (rng() % 4 == 0) {
        share.routing.expert.push_back(e);
        share.routing.weight.push_back(std::uniform_real_distribution<float>(0, 1)(rng));
      }
    share.routing.row_ptr.push_back(static_cast<std::int64_t>(share.routing.expert.size()));
  }
  share.dw.resize(share.routing.expert.size());

  sluice::MoeLayerOptions options;
  options.hidden = kHidden;
  options.ffn = kFfn;
  sluice::MoeLayer layer(runtime, placement, options);
  std::vector<sluice::ExpertWeights> weights;
  for (const std::int32_t e : placement.experts_of(runtime.rank())) {
    Expert& w = experts[e];
    weights.push_back({sluice::ConstMatrixView(w.w1.data(), 2 * kFfn, kHidden),
                       sluice::ConstMatrixView(w.w2.data(), kHidden, kFfn), w.grad_w1.data(),
                       w.grad_w2.data()});
  }
  layer.set_weights(weights);

  const auto plan = layer.plan(share.routing);
  share.traffic = plan->traffic;
  sluice::Context context = layer.forward(plan, sluice::ConstMatrixView(share.x.data(), kTokens, kHidden),
                                          sluice::MatrixView(share.y.data(), kTokens, kHidden));
  layer.backward(context, sluice::ConstMatrixView(share.dy.data(), kTokens, kHidden),
                 sluice::MatrixView(share.dx.data(), kTokens, kHidden), share.dw);
}

// The largest difference between what a rank computed and the definition. dw = <dy, E(x)>; dx by central differences of
// the loss <dy, y> over a few columns.
double largest_error(const Share& s, const std::vector<Expert>& experts) {
  double worst = 0;
  const auto check = [&](double got, double want) {
    const double error = std::abs(got - want) / std::max(1.0, std::abs(want));
    worst = error <= worst ? worst : error;  // a NaN stays
  };
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const std::vector<double> x(&s.x[t * kHidden], &s.x[t * kHidden] + kHidden);
    const float* dy = &s.dy[t * kHidden];
    const auto dot_dy = [&](const std::vector<double>& v) {
      double sum = 0;
      for (std::int64_t i = 0; i < kHidden; ++i) sum += dy[i] * v[i];
      return sum;
    };
    std::vector<double> y(kHidden, 0.0);
    const auto loss = [&](const std::vector<double>& at) {
      double sum = 0;
      for (std::int64_t q = s.routing.row_ptr[t]; q < s.routing.row_ptr[t + 1]; ++q)
        sum += s.routing.weight[q] * dot_dy(plain_expert(experts[s.routing.expert[q]], at));
      return sum;
    };
    for (std::int64_t q = s.routing.row_ptr[t]; q < s.routing.row_ptr[t + 1]; ++q) {
      const std::vector<double> out = plain_expert(experts[s.routing.expert[q]], x);
      for (std::int64_t i = 0; i < kHidden; ++i) y[i] += s.routing.weight[q] * out[i];
      check(s.dw[q], dot_dy(out));
    }
    for (std::int64_t i = 0; i < kHidden; ++i) check(s.y[t * kHidden + i], y[i]);
    for (std::int64_t i = t % 5; i < kHidden; i += 5) {
      constexpr double kStep = 1e-5;
      std::vector<double> up = x, down = x;
      up[i] += kStep;
      down[i] -= kStep;
      check(s.dx[t * kHidden + i], (loss(up) - loss(down)) / (2 * kStep));
    }
  }
  return worst;
}

}  // namespace

int main() {
  std::mt19937 rng(7);
  std::vector<Expert> experts(kExperts);
  for (Expert& e : experts) {
    e.w1 = random_values(rng, 2 * kFfn * kHidden, 1 / std::sqrt(float(kHidden)));
    e.w2 = random_values(rng, kHidden * kFfn, 1 / std::sqrt(float(kFfn)));
    e.grad_w1.resize(e.w1.size());
    e.grad_w2.resize(e.w2.size());
  }
  const sluice::Placement placement = sluice::contiguous_placement(kExperts, kRanks);
  auto group = sluice::Runtime::create_local(sluice::Topology::uniform(kRanks, kNodes));

  std::vector<Share> shares(kRanks);
  std::vector<char> failed(kRanks, 0);
  std::vector<std::thread> threads;
  for (std::int32_t r = 0; r < kRanks; ++r)
    threads.emplace_back([&, r] {
      try {
        play_rank(*group[r], placement, experts, shares[r]);
      } catch (const sluice::Error& error) {
        std::fprintf(stderr, "rank %d: %s\n", r, error.what());
        failed[r] = 1;
        group[r]->abort("example", error.message());
      }
    });
  for (std::thread& t : threads) t.join();
  if (std::count(failed.begin(), failed.end(), 1) > 0) return 1;

  sluice::Traffic traffic;
  double worst = 0;
  for (const Share& s : shares) {
    traffic += s.traffic;
    const double error = largest_error(s, experts);
    worst = error <= worst ? worst : error;
  }
  const auto line = [](const char* what, std::int64_t rows, std::int64_t flat) {
    std::printf("%-28s %5lld   one row a route: %5lld\n", what, static_cast<long long>(rows),
                static_cast<long long>(flat));
  };
  std::printf("%s, %lld tokens\n", group[0]->topology().describe().c_str(),
              static_cast<long long>(kRanks * kTokens));
  // A gateway hands rows on, so fewer rows between nodes mean more within them.
  line("rows between ranks of a node", traffic.rows_in_node, traffic.flat_rows_in_node);
  line("rows between nodes", traffic.rows_across_nodes, traffic.flat_rows_across_nodes);
  std::printf("largest error %.2g\n", worst);
  // fp32 against double, through at most eight experts of a few dozen terms.
  return worst <= 1e-4 ? 0 : 1;
}
