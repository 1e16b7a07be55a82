// The chain of experts: against a dense reference iteration by iteration, the published small case, the plain layer bit
// for bit, and the same bits over chunks, schedules, threads and (on integers) world sizes.
#include "sluice/chain_layer.hpp"

#include <algorithm>
#include <optional>

#include "layer_harness.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/scheduler/selection/relu.hpp"
#include "sluice/scheduler/selection/sigmoid_top_k.hpp"
#include "sluice/scheduler/selection/softmax_top_k.hpp"

namespace sluice::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Experts, gates, S and a batch of the whole group.
struct ChainProblem {
  Problem experts;                        // its routing is not used
  std::vector<std::vector<float>> gates;  // [C, or 1 shared] f32 [num_experts, hidden]
  std::vector<float> shared_w1, shared_w2;
  std::int32_t num_iterations = 1;
  ChainResidual residual = ChainResidual::kNone;
  std::int64_t shared_ffn = 0;
  bool shared_gate() const { return gates.size() == 1 && num_iterations > 1; }
  const std::vector<float>& gate(std::int32_t t) const {
    return gates[gates.size() == 1 ? 0 : static_cast<std::size_t>(t)];
  }
};

struct ChainResult {
  Result layer;                                // y, dx, expert gradients
  std::vector<std::vector<float>> grad_gates;  // summed over ranks
  std::vector<float> grad_shared_w1, grad_shared_w2;
  double auxiliary = 0;
  std::int32_t num_chunks = 0;
  std::vector<std::int64_t> routes;  // [C], over all ranks
};

ChainProblem random_chain(std::uint64_t seed, const Shape& shape, std::int64_t num_tokens,
                          std::int32_t num_iterations, ChainResidual residual, bool shared_gate = false,
                          std::int64_t shared_ffn = 0, std::int32_t zero = 0, std::int32_t copy = 0) {
  std::mt19937_64 rng(seed);
  ChainProblem p;
  p.experts = random_problem(rng, shape, num_tokens, 0, 0, 0, zero, copy);
  p.num_iterations = num_iterations;
  p.residual = residual;
  p.shared_ffn = shared_ffn;
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<float>& v, std::int64_t rows, std::int64_t cols) {
    v.resize(static_cast<std::size_t>(rows * cols));
    for (float& e : v) e = representable(normal(rng) / std::sqrt(static_cast<float>(cols)));
  };
  p.gates.resize(shared_gate ? 1 : static_cast<std::size_t>(num_iterations));
  for (auto& gate : p.gates) fill(gate, shape.num_experts, shape.hidden);
  const bool gated = shape.activation == ExpertActivation::kSwiGLU;
  fill(p.shared_w1, gated ? 2 * shared_ffn : shared_ffn, shape.hidden);
  fill(p.shared_w2, shape.hidden, shared_ffn);
  return p;
}

void add_to(std::vector<float>& to, const std::vector<float>& from) {
  if (to.empty()) to.assign(from.size(), 0.0f);
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
}

// Scores in double, choices by the policy, experts by dense_reference() in double; iterations hand on f32.
ChainResult chain_reference(const ChainProblem& p, const SelectionPolicy& policy,
                            const AdaptiveState& adaptive) {
  const Shape& shape = p.experts.shape;
  const auto n = static_cast<std::size_t>(p.experts.x.size()) / static_cast<std::size_t>(shape.hidden),
             h = static_cast<std::size_t>(shape.hidden),
             num_experts = static_cast<std::size_t>(shape.num_experts);
  const auto last = static_cast<std::size_t>(p.num_iterations);
  std::vector<std::vector<float>> x = {p.experts.x}, scores(last);
  std::vector<PolicyState> states(last);
  ChainResult out;
  out.grad_gates.resize(p.gates.size());

  // Of experts and S under the routing of iteration t.
  const auto parts = [&](std::size_t t, const std::vector<float>& d) {
    Problem experts = p.experts;
    experts.routing = states[t].routing;
    experts.x = x[t];
    experts.dy = d;
    std::vector<Result> results = {dense_reference(experts)};
    if (p.shared_ffn > 0) {
      Problem s;
      s.shape = shape;
      s.shape.num_experts = 1;
      s.shape.ffn = p.shared_ffn;
      s.kinds = {ExpertKind::kFFN};
      s.w1 = {p.shared_w1};
      s.w2 = {p.shared_w2};
      s.x = x[t];
      s.dy = d;
      s.routing.num_experts = 1;
      s.routing.expert.assign(n, 0);
      s.routing.weight.assign(n, 1.0f);
      for (std::size_t i = 0; i < n; ++i) s.routing.row_ptr.push_back(static_cast<std::int64_t>(i) + 1);
      results.push_back(dense_reference(s));
    }
    return results;
  };

  for (std::size_t t = 0; t < last; ++t) {
    const std::vector<float>& gate = p.gate(static_cast<std::int32_t>(t));
    scores[t].resize(n * num_experts);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t e = 0; e < num_experts; ++e) {
        double z = 0;
        for (std::size_t j = 0; j < h; ++j) z += double(gate[e * h + j]) * double(x[t][i * h + j]);
        scores[t][i * num_experts + e] = static_cast<float>(z);
      }
    const Scores view{scores[t], static_cast<std::int64_t>(n), shape.num_experts};
    while (!policy.step(view, adaptive, true, states[t])) {
    }
    out.auxiliary += states[t].auxiliary_loss;
    out.routes.push_back(states[t].routing.num_routes());
    std::vector<float> next(n * h, 0.0f);
    for (const Result& part : parts(t, std::vector<float>(n * h, 0.0f))) add_to(next, part.y);
    if (p.residual == ChainResidual::kInner) add_to(next, x[t]);
    x.push_back(std::move(next));
  }
  out.layer.y = x[last];
  if (p.residual == ChainResidual::kOuter) add_to(out.layer.y, x[0]);

  std::vector<float> d = p.experts.dy;
  out.layer.grad_w1.resize(p.experts.w1.size());
  out.layer.grad_w2.resize(p.experts.w2.size());
  for (std::size_t t = last; t-- > 0;) {
    const std::vector<Result> results = parts(t, d);
    std::vector<float> before(n * h, 0.0f), dscores(n * num_experts, kNaN);
    for (const Result& part : results) add_to(before, part.dx);
    for (std::size_t e = 0; e < num_experts; ++e) {
      add_to(out.layer.grad_w1[e], results[0].grad_w1[e]);
      add_to(out.layer.grad_w2[e], results[0].grad_w2[e]);
    }
    if (p.shared_ffn > 0) {
      add_to(out.grad_shared_w1, results[1].grad_w1[0]);
      add_to(out.grad_shared_w2, results[1].grad_w2[0]);
    }
    policy.backward({scores[t], static_cast<std::int64_t>(n), shape.num_experts}, adaptive, states[t],
                    results[0].dw, dscores);
    const std::vector<float>& gate = p.gate(static_cast<std::int32_t>(t));
    std::vector<double> dgate(num_experts * h, 0), dx(n * h, 0);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t e = 0; e < num_experts; ++e)
        for (std::size_t j = 0; j < h; ++j) {
          dgate[e * h + j] += double(dscores[i * num_experts + e]) * double(x[t][i * h + j]);
          dx[i * h + j] += double(dscores[i * num_experts + e]) * double(gate[e * h + j]);
        }
    add_to(out.grad_gates[p.gates.size() == 1 ? 0 : t], std::vector<float>(dgate.begin(), dgate.end()));
    add_to(before, std::vector<float>(dx.begin(), dx.end()));
    if (p.residual == ChainResidual::kInner) add_to(before, d);
    d = std::move(before);
  }
  if (p.residual == ChainResidual::kOuter) add_to(d, p.experts.dy);
  out.layer.dx = std::move(d);
  return out;
}

struct ChainSetup {
  LayerSetup layer;
  std::int32_t num_chunks = 1;
  std::vector<std::int64_t> token_begin = {};  // [num_ranks + 1], or empty: dealt evenly
  int repeats = 1;                             // batches run before, whose gradients are cleared
};

// A rank's share of the weights, gradients and batch.
class ChainRank {
 public:
  ChainRank(Runtime& runtime, const ChainProblem& p, const ChainSetup& setup, const SelectionPolicy& policy)
      : runtime_(runtime), p_(p), setup_(setup), dtype_(setup.layer.dtype), h_(p.experts.shape.hidden) {
    MoeLayerOptions o;
    o.hidden = h_;
    o.ffn = p.experts.shape.ffn;
    o.activation = p.experts.shape.activation;
    o.dtype = dtype_;
    o.wire_dtype = setup.layer.wire_dtype;
    o.combine_dtype = setup.layer.combine_dtype;
    o.schedule = setup.layer.schedule;
    o.save = setup.layer.save;
    layer_options = o;
    options = {
        o, GateKind::kLinear, p.num_iterations, p.residual, p.shared_gate(), p.shared_ffn, setup.num_chunks};
    policy_ = &policy;
    const auto mine = setup.layer.placement.experts_of(runtime.rank());
    experts.assign(mine.begin(), mine.end());
    for (const std::int32_t e : experts) {
      w1_.push_back(to_dtype(p.experts.w1[static_cast<std::size_t>(e)], dtype_));
      w2_.push_back(to_dtype(p.experts.w2[static_cast<std::size_t>(e)], dtype_));
      g1.emplace_back(p.experts.w1[static_cast<std::size_t>(e)].size());
      g2.emplace_back(p.experts.w2[static_cast<std::size_t>(e)].size());
    }
    for (const auto& gate : p.gates) grad_gates.emplace_back(gate.size());
    gs1.resize(p.shared_w1.size());
    gs2.resize(p.shared_w2.size());
    const std::int64_t num_tokens = static_cast<std::int64_t>(p.experts.x.size()) / h_;
    const auto begin =
        setup.token_begin.empty() ? deal_tokens(num_tokens, runtime.num_ranks()) : setup.token_begin;
    first = begin[runtime.rank().index()];
    n = begin[runtime.rank().index() + 1] - first;
    const auto slice = [&](const std::vector<float>& v) {
      return to_dtype(
          std::span(v).subspan(static_cast<std::size_t>(first * h_), static_cast<std::size_t>(n * h_)),
          dtype_);
    };
    x = slice(p.experts.x);
    dy = slice(p.experts.dy);
    y = to_dtype(std::vector<float>(static_cast<std::size_t>(n * h_), kNaN), dtype_);
    dx.assign(static_cast<std::size_t>(n * h_), kNaN);
  }

  std::vector<ExpertWeights> slots() {
    const Shape& shape = p_.experts.shape;
    std::vector<ExpertWeights> out;
    for (std::size_t i = 0; i < experts.size(); ++i)
      out.push_back({ConstMatrixView(w1_[i].data(), dtype_, shape.pre_cols(), h_, h_),
                     ConstMatrixView(w2_[i].data(), dtype_, h_, shape.ffn, shape.ffn), g1[i].data(),
                     g2[i].data()});
    return out;
  }
  std::unique_ptr<ChainLayer> make_layer() {
    auto layer = std::make_unique<ChainLayer>(runtime_, setup_.layer.placement, options, *policy_);
    layer->set_weights(slots());
    std::vector<GateWeights> gates;
    for (std::size_t t = 0; t < p_.gates.size(); ++t)
      gates.push_back(
          {ConstMatrixView(p_.gates[t].data(), p_.experts.shape.num_experts, h_), grad_gates[t].data()});
    layer->set_gates(gates);
    if (p_.shared_ffn > 0)
      layer->set_shared_expert(
          {ConstMatrixView(p_.shared_w1.data(), static_cast<std::int64_t>(p_.shared_w1.size()) / h_, h_),
           ConstMatrixView(p_.shared_w2.data(), h_, p_.shared_ffn), gs1.data(), gs2.data()});
    return layer;
  }
  void clear_gradients() {
    for (auto* list : {&g1, &g2, &grad_gates})
      for (auto& g : *list) std::fill(g.begin(), g.end(), 0.0f);
    std::fill(gs1.begin(), gs1.end(), 0.0f);
    std::fill(gs2.begin(), gs2.end(), 0.0f);
  }
  ConstMatrixView x_view() const { return {x.data(), dtype_, n, h_, h_}; }
  ConstMatrixView dy_view() const { return {dy.data(), dtype_, n, h_, h_}; }
  MatrixView y_view() { return {y.data(), dtype_, n, h_, h_}; }
  MatrixView dx_view() { return {dx.data(), n, h_}; }

  void report(ChainResult& out) {
    from_dtype(y, dtype_, out.layer.y.data() + first * h_);
    std::copy(dx.begin(), dx.end(), out.layer.dx.begin() + first * h_);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      const auto e = static_cast<std::size_t>(experts[i]);
      const Placement& placement = setup_.layer.placement;
      if (placement.slot_rank[static_cast<std::size_t>(placement.slots_of(ExpertId(experts[i]))[0])] !=
          runtime_.rank().value)
        continue;
      out.layer.grad_w1[e] = g1[i];
      out.layer.grad_w2[e] = g2[i];
    }
    for (auto& g : grad_gates) runtime_.all_reduce_sum(std::span<float>(g));
    if (p_.shared_ffn > 0) {
      runtime_.all_reduce_sum(std::span<float>(gs1));
      runtime_.all_reduce_sum(std::span<float>(gs2));
    }
    if (runtime_.rank() != RankId(0)) return;
    out.grad_gates = grad_gates;
    out.grad_shared_w1 = gs1;
    out.grad_shared_w2 = gs2;
  }

  std::vector<std::int32_t> experts;
  std::vector<std::vector<float>> g1, g2, grad_gates;
  std::vector<float> gs1, gs2;
  std::int64_t first = 0, n = 0;
  std::vector<std::byte> x, dy, y;
  std::vector<float> dx;
  MoeLayerOptions layer_options;
  ChainLayerOptions options;

 private:
  Runtime& runtime_;
  const ChainProblem& p_;
  const ChainSetup& setup_;
  DType dtype_;
  std::int64_t h_;
  const SelectionPolicy* policy_ = nullptr;
  std::vector<std::vector<std::byte>> w1_, w2_;
};

ChainResult empty_chain_result(const ChainProblem& p) {
  ChainResult out;
  Problem routed = p.experts;
  out.layer = empty_result(routed);
  return out;
}

RuntimeOptions runtime_options(const LayerSetup& setup) {
  RuntimeOptions options;
  options.timeout = std::chrono::seconds(20);
  options.threads_per_rank = setup.threads;
  options.progress = setup.progress;
  return options;
}

ChainResult run_chain(const ChainProblem& p, const ChainSetup& setup, const SelectionPolicy& policy,
                      const AdaptiveState& adaptive) {
  ChainResult out = empty_chain_result(p);
  auto group = Runtime::create_local(setup.layer.topology, runtime_options(setup.layer));
  run_ranks(group, [&](Runtime& runtime) {
    ChainRank rank(runtime, p, setup, policy);
    const auto layer = rank.make_layer();
    double aux = 0;
    ChainContext context;
    for (int i = 0; i < setup.repeats; ++i) {
      context = ChainContext();
      rank.clear_gradients();
      context = layer->forward(rank.x_view(), rank.y_view(), std::span(&adaptive, 1), true);
      EXPECT_TRUE(context.all_finite());
      layer->backward(context, rank.dy_view(), rank.dx_view());
      layer->sync_replica_gradients();
      aux = context.auxiliary_loss();
    }
    runtime.all_reduce_sum(std::span<double>(&aux, 1));
    rank.report(out);
    if (runtime.rank() != RankId(0)) return;
    out.auxiliary = aux;
    out.num_chunks = context.num_chunks();
    for (std::int32_t t = 0; t < p.num_iterations; ++t)
      out.routes.push_back(context.policy_state(t).statistics.num_routes);
  });
  return out;
}

void expect_close(const ChainResult& got, const ChainResult& want, double tolerance) {
  EXPECT_LE(relative_error(got.layer.y, want.layer.y), tolerance) << "y";
  EXPECT_LE(relative_error(got.layer.dx, want.layer.dx), tolerance) << "dx";
  for (std::size_t e = 0; e < want.layer.grad_w1.size(); ++e) {
    EXPECT_LE(relative_error(got.layer.grad_w1[e], want.layer.grad_w1[e]), tolerance) << "w1 of expert " << e;
    EXPECT_LE(relative_error(got.layer.grad_w2[e], want.layer.grad_w2[e]), tolerance) << "w2 of expert " << e;
  }
  ASSERT_EQ(got.grad_gates.size(), want.grad_gates.size());
  for (std::size_t t = 0; t < want.grad_gates.size(); ++t)
    EXPECT_LE(relative_error(got.grad_gates[t], want.grad_gates[t]), tolerance) << "gate " << t;
  EXPECT_LE(relative_error(got.grad_shared_w1, want.grad_shared_w1), tolerance) << "shared w1";
  EXPECT_LE(relative_error(got.grad_shared_w2, want.grad_shared_w2), tolerance) << "shared w2";
  EXPECT_NEAR(got.auxiliary, want.auxiliary, 1e-5 * std::abs(want.auxiliary) + 1e-12);
  EXPECT_EQ(got.routes, want.routes);
}

void expect_same_bits(const ChainResult& got, const ChainResult& want) {
  expect_same_bits(got.layer, want.layer);
  for (std::size_t t = 0; t < want.grad_gates.size(); ++t)
    EXPECT_TRUE(same_bits(got.grad_gates[t], want.grad_gates[t])) << "gate " << t;
  EXPECT_TRUE(same_bits(got.grad_shared_w1, want.grad_shared_w1)) << "shared w1";
  EXPECT_TRUE(same_bits(got.grad_shared_w2, want.grad_shared_w2)) << "shared w2";
  EXPECT_EQ(got.routes, want.routes);
}

Topology grid(std::int32_t num_nodes, std::int32_t ranks_per_node) {
  return Topology::uniform(num_nodes * ranks_per_node, num_nodes);
}

struct NamedPolicy {
  std::string name;
  std::unique_ptr<SelectionPolicy> policy;
  AdaptiveState adaptive;
};
NamedPolicy make_named(const std::string& name, std::int32_t num_experts) {
  NamedPolicy out{name, nullptr, {}};
  if (name == "relu")
    out.policy = std::make_unique<ReluPolicy>(ReluOptions{.top_k = 2, .num_layers = 4, .lambda0 = 0.5});
  if (name == "relu_official")
    out.policy = std::make_unique<ReluPolicy>(
        ReluOptions{.top_k = 2, .num_layers = 4, .lambda0 = 0.5, .variant = ReluVariant::kOfficial});
  if (name == "softmax")
    out.policy =
        std::make_unique<SoftmaxTopKPolicy>(SoftmaxTopKOptions{.top_k = 2, .aux_loss = 0.1, .z_loss = 0.1});
  if (name == "sigmoid") out.policy = std::make_unique<SigmoidTopKPolicy>(SigmoidTopKOptions{.top_k = 3});
  out.adaptive = out.policy->initial_adaptive_state(num_experts);
  return out;
}

LayerSetup on(const Topology& topology, std::int32_t num_experts, std::int32_t zero = 0,
              std::int32_t copy = 0) {
  LayerSetup out;
  out.topology = topology;
  std::vector<ExpertKind> kinds(static_cast<std::size_t>(num_experts - zero - copy), ExpertKind::kFFN);
  kinds.insert(kinds.end(), static_cast<std::size_t>(copy), ExpertKind::kCopy);
  kinds.insert(kinds.end(), static_cast<std::size_t>(zero), ExpertKind::kZero);
  out.placement = contiguous_placement(num_experts, topology.num_ranks(), kinds);
  return out;
}

constexpr Shape kShape{.num_experts = 8, .hidden = 16, .ffn = 24};

// ---- the published case ----------------------------------------------------------------------------------------------

// One column, experts x and -x/2 (for x > 0), one expert a token, gates [1, 0] and [-1, 0], x = 2.
TEST(Chain, SmallCaseByHand) {
  for (const bool with_shared : {false, true}) {
    ChainProblem p;
    p.experts.shape = {.num_experts = 2, .hidden = 1, .ffn = 1, .activation = ExpertActivation::kRelu};
    p.experts.kinds = {ExpertKind::kFFN, ExpertKind::kFFN};
    p.experts.w1 = {{1}, {1}};
    p.experts.w2 = {{1}, {-0.5f}};
    p.experts.routing.num_experts = 2;
    p.experts.x = {2};
    p.experts.dy = {1};
    p.gates = {{1, 0}, {-1, 0}};
    p.num_iterations = 2;
    p.residual = ChainResidual::kInner;
    if (with_shared) {
      p.shared_ffn = 1;
      p.shared_w1 = {1};
      p.shared_w2 = {0.25f};
    }
    const SoftmaxTopKPolicy policy({.top_k = 1});
    const ChainResult got = run_chain(p, {.layer = on(grid(1, 1), 2)}, policy, {});
    EXPECT_NEAR(got.layer.y[0], with_shared ? 3.2258217226 : 1.9235260086, 2e-6);
    p.num_iterations = 1;
    p.gates.resize(1);
    EXPECT_NEAR(run_chain(p, {.layer = on(grid(1, 1), 2)}, policy, {}).layer.y[0],
                with_shared ? 4.261594 : 3.761594, 2e-6);
  }
}

// ---- against the reference -------------------------------------------------------------------------------------------

TEST(Chain, AgreesWithTheDenseReference) {
  struct Case {
    std::string policy;
    std::int32_t num_iterations;
    ChainResidual residual;
    bool shared_gate;
    std::int64_t shared_ffn;
    std::int32_t zero, copy;
    Topology topology;
    std::int32_t num_chunks;
    SchedulePolicy schedule;
    std::vector<std::int64_t> token_begin;
  };
  using enum SchedulePolicy;
  const Topology one = grid(1, 1), four = grid(1, 4), nodes = grid(2, 2),
                 odd(std::vector<std::vector<std::int32_t>>{{0, 2}, {1}});
  const std::vector<Case> cases = {
      {"softmax", 1, ChainResidual::kNone, false, 0, 0, 0, one, 1, kSequential, {}},
      {"softmax", 2, ChainResidual::kInner, false, 0, 0, 0, one, 3, kSequential, {}},
      {"softmax", 2, ChainResidual::kInner, false, 0, 0, 0, nodes, 2, kPipelined, {}},
      {"softmax", 3, ChainResidual::kOuter, false, 12, 0, 0, nodes, 4, kSequential, {}},
      {"sigmoid", 4, ChainResidual::kInner, false, 40, 0, 0, four, 3, kBySource, {}},
      {"sigmoid", 2, ChainResidual::kNone, true, 0, 0, 0, odd, 2, kHierarchical, {}},
      {"relu", 2, ChainResidual::kInner, false, 12, 0, 0, nodes, 1, kPipelined, {}},
      {"relu", 3, ChainResidual::kInner, true, 0, 1, 2, nodes, 3, kSequential, {}},
      {"softmax", 2, ChainResidual::kInner, false, 12, 1, 2, four, 2, kSequential, {0, 0, 30, 31, 60}},
      {"softmax", 2, ChainResidual::kInner, false, 12, 0, 0, nodes, 4, kSequential, {0, 60, 60, 60, 60}},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    const Case& c = cases[i];
    Shape shape = kShape;
    shape.activation = static_cast<ExpertActivation>(i % 2);
    const ChainProblem p = random_chain(100 + i, shape, 60, c.num_iterations, c.residual, c.shared_gate,
                                        c.shared_ffn, c.zero, c.copy);
    const NamedPolicy policy = make_named(c.policy, shape.num_experts);
    ChainSetup setup{.layer = on(c.topology, shape.num_experts, c.zero, c.copy)};
    setup.layer.schedule = {c.schedule, Exchange::kGateway, c.schedule == kSequential ? 1 : 2};
    setup.layer.save = i % 3 == 2 ? Save::kRows : Save::kActivations;
    setup.num_chunks = c.num_chunks;
    setup.token_begin = c.token_begin;
    const ChainResult got = run_chain(p, setup, *policy.policy, policy.adaptive);
    EXPECT_EQ(got.num_chunks, c.num_chunks);
    expect_close(got, chain_reference(p, *policy.policy, policy.adaptive), 2e-5);
  }
}

TEST(Chain, Bf16StaysNearTheReference) {
  const ChainProblem p = random_chain(7, kShape, 50, 2, ChainResidual::kInner, false, 16);
  // Choices must not depend on rounding: all experts are chosen.
  const SoftmaxTopKPolicy policy({.top_k = 8});
  ChainSetup setup{.layer = on(grid(2, 2), 8), .num_chunks = 3};
  setup.layer.dtype = setup.layer.wire_dtype = setup.layer.combine_dtype = DType::kBF16;
  expect_close(run_chain(p, setup, policy, {}), chain_reference(p, policy, {}), 3e-2);
}

// ---- the plain layer -------------------------------------------------------------------------------------------------

// Scores, policy, MoeLayer, policy backward and gate backward by hand.
ChainResult run_plain(const ChainProblem& p, const ChainSetup& setup, const SelectionPolicy& policy,
                      const AdaptiveState& adaptive) {
  ChainResult out = empty_chain_result(p);
  auto group = Runtime::create_local(setup.layer.topology, runtime_options(setup.layer));
  run_ranks(group, [&](Runtime& runtime) {
    ChainRank rank(runtime, p, setup, policy);
    MoeLayer layer(runtime, setup.layer.placement, rank.layer_options);
    layer.set_weights(rank.slots());
    kernels::Kernels& kernels = runtime.kernels();
    const std::int64_t num_experts = p.experts.shape.num_experts, h = p.experts.shape.hidden;
    std::vector<float> scores(static_cast<std::size_t>(rank.n * num_experts), kNaN), dscores = scores;
    const std::int64_t group_ptr[2] = {0, rank.n};
    const std::byte* const w[1] = {reinterpret_cast<const std::byte*>(p.gates[0].data())};
    kernels.grouped_gemm_forward({group_ptr, w}, rank.x_view(), {}, DType::kF32, num_experts,
                                 kernels::Activation::kRelu, MatrixView(scores.data(), rank.n, num_experts),
                                 {});
    PolicyState state;
    const Scores view{scores, rank.n, static_cast<std::int32_t>(num_experts)};
    while (!policy.step(view, adaptive, true, state)) runtime.all_reduce_sum(std::span<double>(state.buffer));
    Context context = layer.forward(layer.plan(state.routing), rank.x_view(), rank.y_view());
    std::vector<float> dw(state.routing.weight.size(), kNaN),
        dgate(static_cast<std::size_t>(rank.n * h), kNaN);
    std::vector<std::byte> dmoe = rank.dy;
    layer.backward(context, rank.dy_view(), MatrixView(dmoe.data(), setup.layer.dtype, rank.n, h, h), dw);
    layer.sync_replica_gradients();
    policy.backward(view, adaptive, state, dw, dscores);
    kernels.grouped_gemm_dgrad({group_ptr, w}, ConstMatrixView(dscores.data(), rank.n, num_experts), {},
                               DType::kF32, MatrixView(dgate.data(), rank.n, h));
    float* const gradient[1] = {rank.grad_gates[0].data()};
    kernels.grouped_gemm_wgrad(group_ptr, ConstMatrixView(dscores.data(), rank.n, num_experts), {},
                               rank.x_view(), {}, gradient);
    from_dtype(dmoe, setup.layer.dtype, rank.dx.data());
    for (std::size_t i = 0; i < dgate.size(); ++i) rank.dx[i] += dgate[i];
    rank.report(out);
    if (runtime.rank() == RankId(0)) out.routes = {state.statistics.num_routes};
  });
  return out;
}

TEST(Chain, OneIterationWithoutResidualIsThePlainLayerBitForBit) {
  for (const std::string name : {"relu", "softmax", "sigmoid"})
    for (const DType dtype : {DType::kF32, DType::kBF16})
      for (const std::int32_t num_chunks : {1, 3}) {
        SCOPED_TRACE(str(name, " ", to_string(dtype), " chunks ", num_chunks));
        const ChainProblem p = random_chain(11, kShape, 70, 1, ChainResidual::kNone, false, 0, 0, 1);
        const NamedPolicy policy = make_named(name, kShape.num_experts);
        ChainSetup setup{.layer = on(grid(2, 2), 8, 0, 1), .num_chunks = num_chunks};
        setup.layer.dtype = setup.layer.wire_dtype = setup.layer.combine_dtype = dtype;
        const ChainResult got = run_chain(p, setup, *policy.policy, policy.adaptive);
        EXPECT_EQ(got.num_chunks, num_chunks);
        expect_same_bits(got, run_plain(p, setup, *policy.policy, policy.adaptive));
      }
}

// ---- the same bits ---------------------------------------------------------------------------------------------------

TEST(Chain, ChunksSchedulesThreadsAndWhatIsSavedGiveTheSameBits) {
  using enum SchedulePolicy;
  for (const std::string name : {"relu", "softmax", "sigmoid"})
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const ChainProblem p =
          random_chain(21, kShape, 90, 3, ChainResidual::kInner, name == "sigmoid", 20, 0, 1);
      const NamedPolicy policy = make_named(name, kShape.num_experts);
      ChainSetup base{.layer = on(grid(2, 2), 8, 0, 1), .token_begin = {0, 10, 11, 60, 90}};
      base.layer.dtype = base.layer.wire_dtype = base.layer.combine_dtype = dtype;
      const ChainResult want = run_chain(p, base, *policy.policy, policy.adaptive);
      const auto check = [&](const std::string& what, auto&& change) {
        SCOPED_TRACE(str(name, " ", to_string(dtype), " ", what));
        ChainSetup setup = base;
        change(setup);
        const ChainResult got = run_chain(p, setup, *policy.policy, policy.adaptive);
        expect_same_bits(got, want);
        EXPECT_NEAR(got.auxiliary, want.auxiliary, 1e-12 * std::abs(want.auxiliary));
        EXPECT_EQ(got.num_chunks, std::min(49, setup.num_chunks));
      };
      for (const std::int32_t chunks : {2, 3, 7, 80})
        check(str(chunks, " chunks"), [&](ChainSetup& s) { s.num_chunks = chunks; });
      check("pipelined", [](ChainSetup& s) {
        s.layer.schedule = {kPipelined, Exchange::kGateway, 3};
        s.num_chunks = 2;
      });
      check("by source", [](ChainSetup& s) {
        s.layer.schedule = {kBySource, Exchange::kGateway, 2};
        s.num_chunks = 3;
      });
      check("direct", [](ChainSetup& s) {
        s.layer.schedule.exchange = Exchange::kDirect;
        s.num_chunks = 2;
      });
      check("threads", [](ChainSetup& s) {
        s.layer.threads = 2;
        s.layer.progress = ProgressMode::kThread;
        s.num_chunks = 3;
      });
      check("rows saved", [](ChainSetup& s) {
        s.layer.save = Save::kRows;
        s.num_chunks = 3;
      });
      check("a third batch of the same layer", [](ChainSetup& s) {
        s.repeats = 3;
        s.num_chunks = 3;
      });
    }
}

// All values are small integers, so sums are exact in any order.
TEST(Chain, IntegersAreExactOverWorldSizes) {
  std::mt19937_64 rng(5);
  std::uniform_int_distribution<int> small(-1, 1);
  const auto fill = [&](std::vector<float>& v) {
    for (float& e : v) e = static_cast<float>(small(rng));
  };
  const Shape shape{.num_experts = 6, .hidden = 4, .ffn = 3, .activation = ExpertActivation::kRelu};
  ChainProblem p = random_chain(1, shape, 24, 2, ChainResidual::kInner, false, 2);
  for (auto* list : {&p.experts.w1, &p.experts.w2, &p.gates})
    for (auto& v : *list) fill(v);
  for (auto* v : {&p.experts.x, &p.experts.dy, &p.shared_w1, &p.shared_w2}) fill(*v);
  const ReluPolicy policy({.top_k = 2, .num_layers = 2, .lambda0 = 0});
  const AdaptiveState adaptive = policy.initial_adaptive_state(shape.num_experts);
  const ChainResult want = chain_reference(p, policy, adaptive);
  double largest = 0;
  for (const float v : want.layer.dx) largest = std::max(largest, std::abs(double(v)));
  ASSERT_GT(largest, 10);
  ASSERT_LT(largest, 1 << 16);
  for (const Topology& topology : {grid(1, 1), grid(1, 2), grid(2, 2), grid(3, 1), grid(2, 3)})
    for (const std::int32_t chunks : {1, 4}) {
      SCOPED_TRACE(str(topology.describe(), " chunks ", chunks));
      const ChainResult got =
          run_chain(p, {.layer = on(topology, shape.num_experts), .num_chunks = chunks}, policy, adaptive);
      expect_close(got, want, 0);
    }
}

TEST(Chain, ReplicatedExpertsAddUp) {
  const ChainProblem p = random_chain(3, kShape, 64, 2, ChainResidual::kInner);
  const NamedPolicy policy = make_named("softmax", kShape.num_experts);
  ChainSetup setup{.layer = on(grid(2, 2), 8), .num_chunks = 2};
  std::vector<std::vector<std::int32_t>> experts = {{0, 1, 2}, {2, 3, 7}, {4, 5, 0}, {6, 7}};
  setup.layer.placement = placement_from_lists(8, experts);
  expect_close(run_chain(p, setup, *policy.policy, policy.adaptive),
               chain_reference(p, *policy.policy, policy.adaptive), 2e-5);
}

// ---- policies that need all tokens -----------------------------------------------------------------------------------

// Routes to experts whose score is above the mean over all tokens and ranks: an exchange before the routing.
class AboveMeanPolicy final : public SelectionPolicy {
 public:
  std::string_view name() const override { return "above_mean"; }
  AdaptiveState initial_adaptive_state(std::int32_t) const override { return {}; }
  bool step(const Scores& scores, const AdaptiveState&, bool training, PolicyState& state) const override {
    if (state.step == 0) {
      state.training = training;
      double sum = 0;
      for (const float z : scores.logits) sum += double(z);
      state.buffer = {sum, static_cast<double>(scores.logits.size())};
      state.exchange = ExchangeKind::kSumAcrossRanks;
      state.step = 1;
      return false;
    }
    // Rounded, so that the threshold does not depend on the order of the sum.
    const double mean = std::round(state.buffer[0] / std::max(1.0, state.buffer[1]) * 1e6) / 1e6;
    state.routing = {};
    state.routing.num_experts = scores.num_experts;
    for (std::int64_t t = 0; t < scores.num_tokens; ++t) {
      for (std::int32_t e = 0; e < scores.num_experts; ++e) {
        const float z = scores.logits[static_cast<std::size_t>(t * scores.num_experts + e)];
        if (!(double(z) > mean + 0.5)) continue;
        state.routing.expert.push_back(e);
        state.routing.weight.push_back(z);
      }
      state.routing.row_ptr.push_back(state.routing.num_routes());
    }
    state.statistics.num_routes = state.routing.num_routes();
    state.routing_ready = state.done = true;
    return true;
  }
  void backward(const Scores& scores, const AdaptiveState&, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const override {
    std::fill(dlogits.begin(), dlogits.end(), 0.0f);
    for (std::int64_t t = 0; t < scores.num_tokens; ++t)
      for (auto q = static_cast<std::size_t>(state.routing.row_ptr[static_cast<std::size_t>(t)]);
           q < static_cast<std::size_t>(state.routing.row_ptr[static_cast<std::size_t>(t) + 1]); ++q)
        dlogits[static_cast<std::size_t>(t * scores.num_experts + state.routing.expert[q])] = dweight[q];
  }
};

TEST(Chain, PoliciesThatNeedAllTokensMakeRoundsBarriers) {
  const ChainProblem p = random_chain(31, kShape, 64, 3, ChainResidual::kInner);
  const AboveMeanPolicy policy;
  const ChainResult want = chain_reference(p, policy, {});
  for (const Topology& topology : {grid(1, 1), grid(2, 2)}) {
    ChainResult got = run_chain(p, {.layer = on(topology, 8), .num_chunks = 4}, policy, {});
    EXPECT_EQ(got.num_chunks, 1);
    got.routes = want.routes;  // this policy counts a rank's only
    expect_close(got, want, 2e-5);
  }
  const NamedPolicy official = make_named("relu_official", 8);
  EXPECT_EQ(run_chain(p, {.layer = on(grid(1, 2), 8), .num_chunks = 4}, *official.policy, official.adaptive)
                .num_chunks,
            1);
}

// ---- use and misuse --------------------------------------------------------------------------------------------------

TEST(Chain, NoTokensAnywhere) {
  const ChainProblem p = random_chain(41, kShape, 0, 2, ChainResidual::kInner, false, 8);
  const NamedPolicy policy = make_named("softmax", 8);
  const ChainResult got =
      run_chain(p, {.layer = on(grid(1, 3), 8), .num_chunks = 4}, *policy.policy, policy.adaptive);
  EXPECT_EQ(got.num_chunks, 1);
  for (const auto& g : got.layer.grad_w1)
    EXPECT_TRUE(std::all_of(g.begin(), g.end(), [](float v) { return v == 0; }));
}

TEST(Chain, SeveralContextsAndInferenceBetweenThem) {
  const ChainProblem p = random_chain(51, kShape, 48, 2, ChainResidual::kInner, false, 8);
  const NamedPolicy policy = make_named("softmax", 8);
  const ChainSetup setup{.layer = on(grid(2, 2), 8), .num_chunks = 3};
  ChainResult want = run_chain(p, setup, *policy.policy, policy.adaptive);
  ChainResult got = empty_chain_result(p);
  auto group = Runtime::create_local(setup.layer.topology, runtime_options(setup.layer));
  run_ranks(group, [&](Runtime& runtime) {
    ChainRank rank(runtime, p, setup, *policy.policy), other(runtime, p, setup, *policy.policy);
    const auto layer = rank.make_layer();
    const std::span adaptive(&policy.adaptive, 1);
    ChainContext first = layer->forward(rank.x_view(), rank.y_view(), adaptive, true);
    ChainContext second = layer->forward(other.x_view(), other.y_view(), adaptive, true);
    EXPECT_EQ(rank.y, other.y);
    std::fill(other.y.begin(), other.y.end(), std::byte{0xff});
    ChainContext inference = layer->forward(other.x_view(), other.y_view(), adaptive, false);
    EXPECT_EQ(rank.y, other.y);
    EXPECT_EQ(layer->pending_sums(inference).size(), 0u);
    EXPECT_THROW(layer->backward(inference, other.dy_view(), other.dx_view()), Error);
    // Several layers' sums travel as one: here those of two contexts.
    for (ChainContext* context : {&second, &first}) {
      runtime.all_reduce_sum(layer->pending_sums(*context));
      layer->settle(*context);
      EXPECT_THROW(layer->settle(*context), Error);
    }
    layer->backward(second, other.dy_view(), other.dx_view());
    rank.clear_gradients();
    layer->backward(first, rank.dy_view(), rank.dx_view());
    EXPECT_TRUE(same_bits(rank.dx, other.dx));
    EXPECT_THROW(layer->backward(first, rank.dy_view(), rank.dx_view()), Error);
    EXPECT_GT(layer->memory().chain, 0);
    rank.report(got);
  });
  got.routes = want.routes;
  expect_same_bits(got, want);
}

TEST(Chain, AScoreThatIsNotFiniteVoidsItsTokenAlone) {
  ChainProblem p = random_chain(61, kShape, 20, 2, ChainResidual::kInner);
  p.experts.x[3 * 16 + 5] = std::numeric_limits<float>::infinity();
  const NamedPolicy policy = make_named("softmax", 8);
  const ChainSetup setup{.layer = on(grid(1, 2), 8), .num_chunks = 2};
  auto group = Runtime::create_local(setup.layer.topology, runtime_options(setup.layer));
  run_ranks(group, [&](Runtime& runtime) {
    ChainRank rank(runtime, p, setup, *policy.policy);
    const auto layer = rank.make_layer();
    const ChainContext context =
        layer->forward(rank.x_view(), rank.y_view(), std::span(&policy.adaptive, 1), true);
    EXPECT_EQ(context.all_finite(), runtime.rank() != RankId(0));
    std::vector<float> y(static_cast<std::size_t>(rank.n * 16));
    from_dtype(rank.y, DType::kF32, y.data());
    for (std::int64_t t = 0; t < rank.n; ++t)
      for (std::int64_t i = 0; i < 16; ++i)
        EXPECT_EQ(std::isfinite(y[static_cast<std::size_t>(t * 16 + i)]), rank.first + t != 3) << t;
  });
}

TEST(Chain, RanksWithOtherOptionsAreNamed) {
  const ChainProblem p = random_chain(71, kShape, 20, 2, ChainResidual::kInner);
  const NamedPolicy policy = make_named("softmax", 8);
  const ChainSetup setup{.layer = on(grid(1, 2), 8)};
  auto group = Runtime::create_local(setup.layer.topology, runtime_options(setup.layer));
  std::vector<std::string> messages(2);
  run_ranks(group, [&](Runtime& runtime) {
    ChainRank rank(runtime, p, setup, *policy.policy);
    if (runtime.rank() == RankId(1)) rank.options.residual = ChainResidual::kOuter;
    const auto layer = rank.make_layer();
    try {
      layer->forward(rank.x_view(), rank.y_view(), std::span(&policy.adaptive, 1), true);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kDisagreement);
      messages[runtime.rank().index()] = error.message();
    }
  });
  EXPECT_NE(messages[0].find("rank 1 has a chain layer of other options"), std::string::npos) << messages[0];
  EXPECT_NE(messages[1].find("rank 0"), std::string::npos) << messages[1];
}

TEST(Chain, MisuseIsRefused) {
  const ChainProblem p = random_chain(81, kShape, 4, 2, ChainResidual::kInner);
  const NamedPolicy policy = make_named("softmax", 8);
  const ChainSetup setup{.layer = on(grid(1, 1), 8)};
  auto group = Runtime::create_local(setup.layer.topology, runtime_options(setup.layer));
  run_ranks(group, [&](Runtime& runtime) {
    ChainRank rank(runtime, p, setup, *policy.policy);
    const std::span adaptive(&policy.adaptive, 1);
    for (const auto& [iterations, chunks, ffn] :
         {std::tuple{0, 1, 0}, std::tuple{1, 0, 0}, std::tuple{1, 1, -1}}) {
      ChainLayerOptions bad = rank.options;
      bad.num_iterations = iterations;
      bad.num_chunks = chunks;
      bad.shared_ffn = ffn;
      EXPECT_THROW(ChainLayer(runtime, setup.layer.placement, bad, *policy.policy), Error);
    }
    const auto layer = rank.make_layer();
    EXPECT_THROW(layer->set_gates({}), Error);
    EXPECT_THROW(layer->set_shared_expert({}), Error);
    EXPECT_THROW(layer->forward(rank.x_view(), rank.y_view(), {}, true), Error);
    const ConstMatrixView narrow(reinterpret_cast<const float*>(rank.x.data()), rank.n, 15);
    EXPECT_THROW(layer->forward(narrow, rank.y_view(), adaptive, true), Error);
    ChainContext none;
    EXPECT_THROW(layer->backward(none, rank.dy_view(), rank.dx_view()), Error);
    // The layer is as good as before.
    ChainContext context = layer->forward(rank.x_view(), rank.y_view(), adaptive, true);
    layer->backward(context, rank.dy_view(), rank.dx_view());
  });
}

}  // namespace
}  // namespace sluice::testing
