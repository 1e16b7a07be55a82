#include "sluice/moe_layer.hpp"

#include <gtest/gtest.h>

#include "layer_harness.hpp"

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the harness of this test

constexpr std::uint64_t kSeed = 424242;

Placement contiguous(const Problem& p, std::int32_t num_ranks) {
  return contiguous_placement(p.shape.num_experts, num_ranks, p.kinds);
}

// Experts on random ranks, some ranks without any, some experts twice.
Placement scattered(const Problem& p, std::int32_t num_ranks, std::mt19937_64& rng, bool replicas) {
  std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(num_ranks));
  for (std::int32_t e = 0; e < p.shape.num_experts; ++e) {
    if (p.kinds[static_cast<std::size_t>(e)] != ExpertKind::kFFN) continue;
    const auto first = static_cast<std::size_t>(rng() % static_cast<std::uint64_t>((num_ranks + 1) / 2));
    lists[first].push_back(e);
    if (replicas)
      for (std::size_t r = 0; r < lists.size(); ++r)
        if (r != first && rng() % 3 == 0) lists[r].push_back(e);
  }
  return placement_from_lists(p.shape.num_experts, lists, p.kinds);
}

const std::vector<std::vector<std::vector<std::int32_t>>> kTopologies = {{{0}},
                                                                         {{0, 1}},
                                                                         {{0}, {1}},
                                                                         {{0, 1}, {2}},
                                                                         {{0, 1}, {2, 3}},
                                                                         {{0, 2}, {1, 3}},
                                                                         {{0, 1, 2}, {3, 4}},
                                                                         {{0, 1, 2, 3}, {4, 5, 6, 7}}};

TEST(MoeLayer, AgreesWithTheDenseReferenceInFp32) {
  std::mt19937_64 rng(kSeed);
  int round = 0;
  for (const auto& nodes : kTopologies)
    for (const ExpertActivation activation :
         {ExpertActivation::kSwiGLU, ExpertActivation::kGelu, ExpertActivation::kRelu}) {
      SCOPED_TRACE(str("round ", round, " seed ", kSeed));
      ++round;
      Shape shape{9, 16, 24, activation};
      const Problem p = random_problem(rng, shape, 37, 0, 5, double(round % 3), round % 2, round % 4 == 0);
      LayerSetup setup;
      setup.topology = Topology(nodes);
      const auto ranks = setup.topology.num_ranks();
      setup.placement = round % 3 ? scattered(p, ranks, rng, round % 2) : contiguous(p, ranks);
      setup.schedule.exchange = round % 4 == 3 ? Exchange::kDirect : Exchange::kGateway;
      setup.save = round % 2 ? Save::kRows : Save::kActivations;
      setup.even_tokens = round % 5 != 0;
      if (round % 4 != 0)
        setup.schedule = {static_cast<SchedulePolicy>(round % 4), setup.schedule.exchange, 1 + round % 3};
      // Sums of at most 5 experts over 24..48 terms each: a few hundred roundings of 2^-24.
      expect_close(run_layer(p, setup), dense_reference(p), 2e-5);
    }
}

TEST(MoeLayer, AgreesWithTheDenseReferenceInBf16) {
  std::mt19937_64 rng(kSeed + 1);
  for (const auto& nodes : kTopologies) {
    const Problem p = random_problem(rng, Shape{8, 32, 40, ExpertActivation::kSwiGLU}, 40, 0, 4);
    LayerSetup setup;
    setup.topology = Topology(nodes);
    setup.placement = contiguous(p, setup.topology.num_ranks());
    setup.dtype = setup.wire_dtype = setup.combine_dtype = DType::kBF16;
    // bf16 keeps 8 bits: each stored value (h, a, out, partial, node sum, y) is off by at most 2^-9 of its size. Along the
    // longest way, six such roundings meet sums of up to 40 terms of mixed sign; relative to the largest element of the
    // array, 8 * 2^-8 bounds what independent roundings reach by a factor of about two.
    expect_close(run_layer(p, setup), dense_reference(p), 8.0 / 256);
  }
}

// A bf16 wire under fp32 experts rounds rows and sums only: the error stays near one bf16 rounding.
TEST(MoeLayer, Bf16WireUnderFp32Experts) {
  std::mt19937_64 rng(kSeed + 2);
  const Problem p = random_problem(rng, Shape{8, 32, 40}, 48, 1, 4);
  LayerSetup setup;
  setup.topology = Topology({{0, 1}, {2, 3}});
  setup.placement = contiguous(p, 4);
  setup.combine_dtype = DType::kBF16;
  setup.wire_dtype = DType::kBF16;
  const Result got = run_layer(p, setup);
  expect_close(got, dense_reference(p), 4.0 / 256);
  // The option does something.
  setup.combine_dtype = setup.wire_dtype = DType::kF32;
  EXPECT_FALSE(same_bits(got.y, run_layer(p, setup).y));
}

// Same placement, topology and wire: the same bits, whatever the schedule, exchange, chunks, threads, or what is kept.
TEST(MoeLayer, BitsDoNotDependOnScheduleExchangeChunksThreadsOrSave) {
  std::mt19937_64 rng(kSeed + 3);
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Problem p = random_problem(rng, Shape{8, 24, 32}, 61, 0, 6, 1.0, 1, 1);
    LayerSetup setup;
    setup.topology = Topology({{0, 1}, {2, 3}});
    setup.placement = scattered(p, 4, rng, true);
    setup.dtype = setup.wire_dtype = setup.combine_dtype = dtype;
    const Result base = run_layer(p, setup);
    for (const Exchange exchange : {Exchange::kGateway, Exchange::kDirect})
      for (const auto& [policy, chunks] :
           std::vector<std::pair<SchedulePolicy, std::int32_t>>{{SchedulePolicy::kSequential, 1},
                                                                {SchedulePolicy::kPipelined, 3},
                                                                {SchedulePolicy::kPipelined, 100},
                                                                {SchedulePolicy::kBySource, 1},
                                                                {SchedulePolicy::kBySource, 2},
                                                                {SchedulePolicy::kHierarchical, 1},
                                                                {SchedulePolicy::kHierarchical, 7}})
        for (const int threads : {1, 2}) {
          LayerSetup other = setup;
          other.schedule = {policy, exchange, chunks};
          other.threads = threads;
          other.progress = threads == 1 ? ProgressMode::kInline : ProgressMode::kThread;
          // With bf16 a recomputed pre-activation is the kept one: both are rounded once.
          other.save = chunks % 2 ? Save::kRows : Save::kActivations;
          SCOPED_TRACE(str("dtype ", to_string(dtype), " ", to_string(policy), " chunks ", chunks,
                           " threads ", threads));
          expect_same_bits(run_layer(p, other), base);
        }
  }
}

// Small integers and powers of two: every sum is exact, so world size, placement, replicas, topology and chunks must not
// change a bit. relu experts keep values integral.
TEST(MoeLayer, ExactIntegersAreInvariantOverWorldSizeAndPlacement) {
  std::mt19937_64 rng(kSeed + 4);
  Problem p = random_problem(rng, Shape{6, 8, 8, ExpertActivation::kRelu}, 50, 0, 4);
  const auto small = [&](std::vector<float>& v, int range) {
    for (float& e : v)
      e = static_cast<float>(static_cast<int>(rng() % static_cast<std::uint64_t>(2 * range + 1)) - range);
  };
  small(p.x, 2);
  small(p.dy, 2);
  for (auto& w : p.w1) small(w, 1);
  for (auto& w : p.w2) small(w, 1);
  for (float& w : p.routing.weight) w = rng() % 2 ? 1.0f : 0.5f;
  const Result want = dense_reference(p);
  for (std::int32_t ranks = 1; ranks <= 8; ++ranks)
    for (int variant = 0; variant < 4; ++variant) {
      LayerSetup setup;
      setup.topology =
          ranks % 2 == 0 && variant % 2 ? Topology::uniform(ranks, 2) : Topology::uniform(ranks, 1);
      setup.placement = variant == 0 ? contiguous(p, ranks) : scattered(p, ranks, rng, variant >= 2);
      setup.schedule = {variant ? SchedulePolicy::kPipelined : SchedulePolicy::kSequential,
                        Exchange::kGateway, variant ? variant + 1 : 1};
      setup.even_tokens = variant != 2;
      SCOPED_TRACE(str(ranks, " ranks, variant ", variant, ", seed ", kSeed + 4));
      expect_same_bits(run_layer(p, setup), want);
    }
}

TEST(MoeLayer, EdgeShapes) {
  std::mt19937_64 rng(kSeed + 5);
  LayerSetup setup;
  setup.topology = Topology({{0, 1}, {2, 3}});
  const auto check = [&](const Problem& p) {
    setup.placement = contiguous(p, 4);
    expect_close(run_layer(p, setup), dense_reference(p), 2e-5);
  };
  check(random_problem(rng, Shape{8, 16, 16}, 0, 0, 0));   // no tokens
  check(random_problem(rng, Shape{8, 16, 16}, 3, 8, 8));   // fewer tokens than ranks, every expert
  check(random_problem(rng, Shape{1, 16, 16}, 40, 1, 1));  // one expert takes all, ranks without experts
  check(random_problem(rng, Shape{3, 1, 1}, 20, 0, 3));    // one column
  Problem idle = random_problem(rng, Shape{8, 16, 16}, 20, 0, 0);
  setup.placement = contiguous(idle, 4);
  const Result got = run_layer(idle, setup);  // no routes: exact zeros
  for (const float v : got.y) EXPECT_EQ(std::bit_cast<std::uint32_t>(v), 0u);
  for (const float v : got.dx) EXPECT_EQ(std::bit_cast<std::uint32_t>(v), 0u);
}

// <layer_linear(x), v> = <x, layer_linear^T(v)> with relu experts kept in their linear region by large biases in x is not
// needed here: backward against central differences of forward, through the whole exchange.
TEST(MoeLayer, BackwardIsTheDerivativeOfForward) {
  std::mt19937_64 rng(kSeed + 6);
  Problem p = random_problem(rng, Shape{5, 6, 7, ExpertActivation::kSwiGLU}, 9, 1, 3);
  LayerSetup setup;
  setup.topology = Topology({{0}, {1, 2}});
  setup.placement = contiguous(p, 3);
  const Result base = run_layer(p, setup);
  const auto loss = [&](const Problem& q) {
    LayerSetup forward_only = setup;
    forward_only.save = Save::kNone;
    const Result r = run_layer(q, forward_only);
    double sum = 0;
    for (std::size_t i = 0; i < r.y.size(); ++i) sum += double(r.y[i]) * double(q.dy[i]);
    return sum;
  };
  const auto check = [&](auto&& element, double analytic, const char* what) {
    const float step = 1.0f / 64;
    Problem up = p, down = p;
    element(up) += step;
    element(down) -= step;
    const double numeric = (loss(up) - loss(down)) / (2.0 * double(step));
    EXPECT_NEAR(numeric, analytic, 5e-3 * std::max(1.0, std::abs(analytic))) << what;
  };
  for (int i = 0; i < 6; ++i) {
    const std::size_t at = rng() % p.x.size();
    check([at](Problem& q) -> float& { return q.x[at]; }, base.dx[at], "x");
    const std::size_t route = rng() % p.routing.weight.size();
    check([route](Problem& q) -> float& { return q.routing.weight[route]; }, base.dw[route], "w");
    const auto e = static_cast<std::size_t>(p.routing.expert[route]);
    const std::size_t a1 = rng() % p.w1[e].size(), a2 = rng() % p.w2[e].size();
    check([=](Problem& q) -> float& { return q.w1[e][a1]; }, base.grad_w1[e][a1], "w1");
    check([=](Problem& q) -> float& { return q.w2[e][a2]; }, base.grad_w2[e][a2], "w2");
  }
}

// Two contexts alive at once, backward in the other order, a plan used twice.
TEST(MoeLayer, SeveralContextsInFlight) {
  std::mt19937_64 rng(kSeed + 7);
  const Problem p = random_problem(rng, Shape{8, 16, 16}, 32, 0, 4);
  const std::int64_t h = 16;
  auto group = Runtime::create_local(Topology({{0, 1}, {2, 3}}), {});
  run_ranks(group, [&](Runtime& runtime) {
    MoeLayerOptions options;
    options.hidden = options.ffn = 16;
    const Placement placement = contiguous(p, 4);
    MoeLayer layer(runtime, placement, options);
    std::vector<ExpertWeights> weights;
    std::vector<std::vector<float>> g1, g2;
    for (const std::int32_t e : placement.experts_of(runtime.rank())) {
      g1.emplace_back(static_cast<std::size_t>(32 * h), 0.0f);
      g2.emplace_back(static_cast<std::size_t>(16 * h), 0.0f);
      weights.push_back({ConstMatrixView(p.w1[static_cast<std::size_t>(e)].data(), 32, h),
                         ConstMatrixView(p.w2[static_cast<std::size_t>(e)].data(), h, 16), nullptr, nullptr});
    }
    for (std::size_t i = 0; i < weights.size(); ++i) {
      weights[i].grad_w1 = g1[i].data();
      weights[i].grad_w2 = g2[i].data();
    }
    layer.set_weights(weights);
    const auto begin = deal_tokens(p.num_tokens(), 4);
    const std::int64_t t0 = begin[runtime.rank().index()], n = begin[runtime.rank().index() + 1] - t0;
    const Routing routing = routing_slice(p.routing, t0, t0 + n);
    const auto plan = layer.plan(routing);
    std::vector<float> other_x(p.x.rbegin(), p.x.rend());
    const ConstMatrixView xa(p.x.data() + t0 * h, n, h), xb(other_x.data() + t0 * h, n, h),
        dy(p.dy.data() + t0 * h, n, h);
    std::vector<float> ya(static_cast<std::size_t>(n * h)), yb(ya), dxa(ya), dxb(ya), again(ya);
    std::vector<float> dwa(routing.expert.size()), dwb(dwa), dw_again(dwa);
    Context a = layer.forward(plan, xa, MatrixView(ya.data(), n, h));
    Context b = layer.forward(plan, xb, MatrixView(yb.data(), n, h));
    layer.backward(b, dy, MatrixView(dxb.data(), n, h), dwb);
    layer.backward(a, dy, MatrixView(dxa.data(), n, h), dwa);
    a = Context();
    b = Context();
    // Alone, the first gives the same bits.
    Context c = layer.forward(plan, xa, MatrixView(again.data(), n, h));
    EXPECT_TRUE(same_bits(again, ya));
    layer.backward(c, dy, MatrixView(again.data(), n, h), dw_again);
    EXPECT_TRUE(same_bits(again, dxa));
    EXPECT_TRUE(same_bits(dw_again, dwa));
    if (n > 0) {
      EXPECT_FALSE(same_bits(ya, yb));
    }
  });
}

TEST(MoeLayer, SteadyStateGrowsNoBuffer) {
  std::mt19937_64 rng(kSeed + 8);
  const Problem p = random_problem(rng, Shape{8, 16, 16}, 64, 0, 4);
  auto group = Runtime::create_local(Topology({{0, 1}, {2, 3}}), {});
  run_ranks(group, [&](Runtime& runtime) {
    MoeLayerOptions options;
    options.hidden = options.ffn = 16;
    options.save = Save::kNone;
    const Placement placement = contiguous(p, 4);
    MoeLayer layer(runtime, placement, options);
    std::vector<ExpertWeights> weights;
    for (const std::int32_t e : placement.experts_of(runtime.rank()))
      weights.push_back({ConstMatrixView(p.w1[static_cast<std::size_t>(e)].data(), 32, 16),
                         ConstMatrixView(p.w2[static_cast<std::size_t>(e)].data(), 16, 16)});
    layer.set_weights(weights);
    const std::int64_t t0 = 16 * runtime.rank().value;
    const Routing routing = routing_slice(p.routing, t0, t0 + 16);
    std::vector<float> y(256);
    std::int64_t bytes = 0;
    for (int step = 0; step < 6; ++step) {
      const Context c = layer.forward(layer.plan(routing), ConstMatrixView(p.x.data() + t0 * 16, 16, 16),
                                      MatrixView(y.data(), 16, 16));
      if (step == 2) bytes = layer.memory().total();
    }
    EXPECT_EQ(layer.memory().total(), bytes);
  });
}

// docs/memory.md's formula is what a fresh layer holds, to the byte; also when every token visits every expert.
TEST(MoeLayer, MemoryIsWhatTheFormulaSays) {
  std::mt19937_64 rng(kSeed + 9);
  for (const Save save : {Save::kNone, Save::kRows, Save::kActivations})
    for (const DType wire : {DType::kF32, DType::kBF16})
      for (const bool dense : {false, true}) {
        const Problem p = random_problem(rng, Shape{8, 16, 24}, 48, dense ? 8 : 0, dense ? 8 : 3);
        auto group = Runtime::create_local(Topology({{0, 1}, {2, 3}}), {});
        run_ranks(group, [&](Runtime& runtime) {
          MoeLayerOptions options;
          options.hidden = 16;
          options.ffn = 24;
          options.save = save;
          options.wire_dtype = wire;
          const Placement placement = contiguous(p, 4);
          MoeLayer layer(runtime, placement, options);
          std::vector<float> grads(2 * 24 * 16 + 16 * 24);
          std::vector<ExpertWeights> weights;
          for (const std::int32_t e : placement.experts_of(runtime.rank()))
            weights.push_back({ConstMatrixView(p.w1[static_cast<std::size_t>(e)].data(), 48, 16),
                               ConstMatrixView(p.w2[static_cast<std::size_t>(e)].data(), 16, 24),
                               grads.data(), grads.data() + 768});
          layer.set_weights(weights);
          const std::int64_t t0 = 12 * runtime.rank().value;
          const Routing routing = routing_slice(p.routing, t0, t0 + 12);
          std::vector<float> y(12 * 16), dw(routing.expert.size());
          const auto plan = layer.plan(routing);
          const ConstMatrixView x(p.x.data() + t0 * 16, 12, 16);
          Context c = layer.forward(plan, x, MatrixView(y.data(), 12, 16));
          EXPECT_EQ(layer.memory().contexts, context_bytes(*plan, options).forward);
          if (save != Save::kNone) {
            layer.backward(c, x, MatrixView(y.data(), 12, 16), dw);
            EXPECT_EQ(layer.memory().contexts, context_bytes(*plan, options).peak);
          }
        });
      }
}

// ---- misuse ----------------------------------------------------------------------------------------------------------

template <typename Call>
void expect_code(ErrorCode code, std::string_view word, Call&& call) {
  try {
    call();
    ADD_FAILURE() << "no error; expected one that says " << word;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    EXPECT_NE(e.message().find(word), std::string::npos) << e.what();
  }
}

TEST(MoeLayer, MisuseIsNamedAndHarmless) {
  auto group = Runtime::create_local(Topology::uniform(1, 1), {});
  Runtime& runtime = *group[0];
  MoeLayerOptions options;
  options.hidden = 4;
  options.ffn = 4;
  MoeLayer layer(runtime, contiguous_placement(2, 1), options);
  Routing routing;
  routing.num_experts = 2;
  routing.row_ptr = {0, 1, 2};
  routing.expert = {0, 1};
  routing.weight = {1, 1};
  std::vector<float> x(8, 1.0f), y(8), w1(32, 0.5f), w2(16, 0.5f), g1(32), g2(16), dw(2);
  const auto plan = layer.plan(routing);
  expect_code(ErrorCode::kInvalidState, "set_weights",
              [&] { layer.forward(plan, ConstMatrixView(x.data(), 2, 4), MatrixView(y.data(), 2, 4)); });
  expect_code(ErrorCode::kInvalidArgument, "2", [&] { layer.set_weights({}); });
  ExpertWeights bad{ConstMatrixView(w1.data(), 4, 4), ConstMatrixView(w2.data(), 4, 4)};
  expect_code(ErrorCode::kInvalidArgument, "w1 of slot 0", [&] { layer.set_weights(std::vector{bad, bad}); });
  const ExpertWeights good{ConstMatrixView(w1.data(), 8, 4), ConstMatrixView(w2.data(), 4, 4), g1.data(),
                           g2.data()};
  layer.set_weights(std::vector{good, good});
  expect_code(ErrorCode::kInvalidArgument, "x has shape [3",
              [&] { layer.forward(plan, ConstMatrixView(x.data(), 3, 4), MatrixView(y.data(), 2, 4)); });
  expect_code(ErrorCode::kInvalidArgument, "no plan",
              [&] { layer.forward(nullptr, ConstMatrixView(x.data(), 2, 4), MatrixView(y.data(), 2, 4)); });
  Routing wrong = routing;
  wrong.expert = {0, 7};
  expect_code(ErrorCode::kInvalidRouting, "7", [&] { layer.plan(wrong); });
  Context c = layer.forward(plan, ConstMatrixView(x.data(), 2, 4), MatrixView(y.data(), 2, 4));
  expect_code(ErrorCode::kInvalidArgument, "dw",
              [&] { layer.backward(c, ConstMatrixView(x.data(), 2, 4), MatrixView(y.data(), 2, 4), {}); });
  layer.backward(c, ConstMatrixView(x.data(), 2, 4), MatrixView(y.data(), 2, 4), dw);
  expect_code(ErrorCode::kInvalidState, "already",
              [&] { layer.backward(c, ConstMatrixView(x.data(), 2, 4), MatrixView(y.data(), 2, 4), dw); });
  Context empty;
  expect_code(ErrorCode::kInvalidState, "context", [&] {
    layer.backward(empty, ConstMatrixView(x.data(), 2, 4), MatrixView(y.data(), 2, 4), dw);
  });
}

// Ranks that come with different options are told so, on every rank.
TEST(MoeLayer, DisagreementIsNamedOnEveryRank) {
  RuntimeOptions runtime_options;
  runtime_options.timeout = std::chrono::seconds(10);
  auto group = Runtime::create_local(Topology::uniform(3, 1), runtime_options);
  std::vector<std::string> messages(3);
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < 3; ++r)
    threads.emplace_back([&, r] {
      MoeLayerOptions options;
      options.hidden = 4;
      options.ffn = r == 1 ? 8 : 4;
      MoeLayer layer(*group[r], contiguous_placement(3, 3), options);
      try {
        layer.plan(Routing{3, {0}, {}, {}});
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::kDisagreement);
        messages[r] = e.what();
      }
    });
  for (auto& t : threads) t.join();
  for (const std::string& message : messages)
    EXPECT_NE(message.find("rank(s) 1 disagree with rank(s) 0, 2"), std::string::npos) << message;
}

std::shared_ptr<const MachineProfile> declared_machine(double link_bytes_per_us) {
  auto m = std::make_shared<MachineProfile>();
  m->name = "test";
  m->link_model = LinkModel::kCalendar;
  for (LinkProfile* link : {&m->in_node, &m->across_nodes})
    *link = {Curve::line(0, link_bytes_per_us), 1, Curve::line(0.1, 1e6), Curve::line(0.1, 1e6)};
  m->roofline = GemmRoofline{1e9, 1e10};
  m->gather = m->reduce = m->activation_backward = Curve::line(0, 1e4);
  return m;
}

// The choice follows the machine and the batch, ranks agree on it, and it never changes a bit.
TEST(MoeLayer, AutomaticScheduleFollowsTheMachineAndKeepsTheBits) {
  std::mt19937_64 rng(kSeed + 6);
  const Problem p = random_problem(rng, Shape{8, 24, 32}, 96, 1, 4);
  LayerSetup setup;
  setup.topology = Topology({{0, 1}, {2, 3}});
  setup.placement = contiguous(p, 4);
  const Result base = run_layer(p, setup);
  for (const double speed : {1e9, 3.0, 0.1}) {
    SCOPED_TRACE(speed);
    setup.auto_profile = declared_machine(speed);
    expect_same_bits(run_layer(p, setup), base);
  }

  RuntimeOptions runtime_options;
  auto group = Runtime::create_local(Topology({{0}, {1}}), runtime_options);
  testing::run_ranks(group, [&](Runtime& runtime) {
    const auto policy = [&](double speed, std::int32_t first_expert) {
      MoeLayerOptions options;
      options.hidden = 64;
      options.ffn = 64;
      options.auto_profile = declared_machine(speed);
      MoeLayer layer(runtime, contiguous_placement(8, 2), options);
      EXPECT_EQ(layer.schedule_choice(), nullptr);
      Routing routing;
      routing.num_experts = 8;
      for (std::int32_t t = 0; t < 256; ++t) {
        routing.expert.push_back((first_expert + t % 4) % 8);
        routing.weight.push_back(1);
        routing.row_ptr.push_back(t + 1);
      }
      layer.plan(routing);
      return layer.schedule_choice()->schedule();
    };
    // Nothing to hide behind a link that costs nothing; much to hide behind a slow one; nothing when every token stays.
    EXPECT_EQ(policy(1e9, 0).policy, SchedulePolicy::kSequential);
    EXPECT_NE(policy(20, 2).policy, SchedulePolicy::kSequential);
    EXPECT_EQ(policy(20, runtime.rank().value * 4).policy, SchedulePolicy::kSequential);
  });
}

// Several passes in flight, begun in the same order on all ranks and finished in another one on each, with plans built
// and gradients computed in between: every result has the bits of a pass that ran alone.
TEST(MoeLayer, PassesInFlightDoNotTouchEachOther) {
  constexpr int kPasses = 3;
  for (const ProgressMode progress : {ProgressMode::kInline, ProgressMode::kThread}) {
    SCOPED_TRACE(static_cast<int>(progress));
    Topology topology({{0, 1}, {2, 3}});
    topology.across_nodes = {20e6, std::chrono::microseconds(200)};  // slow enough that passes meet
    RuntimeOptions runtime_options;
    runtime_options.progress = progress;
    auto group = Runtime::create_local(topology, runtime_options);
    testing::run_ranks(group, [&](Runtime& runtime) {
      const auto rank = static_cast<std::size_t>(runtime.rank().value);
      std::mt19937_64 rng(kSeed + rank);
      std::uniform_real_distribution<float> uniform(-1, 1);
      const auto random = [&](std::size_t n) {
        std::vector<float> v(n);
        for (float& e : v) e = uniform(rng);
        return v;
      };
      MoeLayerOptions options;
      options.hidden = 8;
      options.ffn = 12;
      options.schedule = {SchedulePolicy::kBySource, Exchange::kGateway, 2};
      MoeLayer layer(runtime, contiguous_placement(8, 4), options);
      std::vector<std::vector<float>> w1, w2, g1, g2;
      for (int i = 0; i < 2; ++i) {
        w1.push_back(random(24 * 8));
        w2.push_back(random(8 * 12));
        g1.emplace_back(24 * 8, 0.0f);
        g2.emplace_back(8 * 12, 0.0f);
      }
      std::vector<ExpertWeights> weights;
      for (std::size_t i = 0; i < 2; ++i)
        weights.push_back({ConstMatrixView(w1[i].data(), 24, 8), ConstMatrixView(w2[i].data(), 8, 12),
                           g1[i].data(), g2[i].data()});
      layer.set_weights(weights);

      struct Batch {
        Routing routing;
        std::vector<float> x, dy, y, dx, dw;
      };
      std::vector<Batch> batches(kPasses);
      for (Batch& b : batches) {
        b.routing.num_experts = 8;
        const std::size_t tokens = 5 + rng() % 20;
        for (std::size_t t = 0; t < tokens; ++t) {
          for (std::int32_t e = 0; e < 8; ++e)
            if (rng() % 3 == 0) {
              b.routing.expert.push_back(e);
              b.routing.weight.push_back(uniform(rng));
            }
          b.routing.row_ptr.push_back(static_cast<std::int64_t>(b.routing.expert.size()));
        }
        b.x = random(tokens * 8);
        b.dy = random(tokens * 8);
      }
      const auto rows = [](std::vector<float>& v) {
        return MatrixView(v.data(), static_cast<std::int64_t>(v.size() / 8), 8);
      };
      const auto clear = [&](Batch& b) {
        b.y.assign(b.x.size(), std::nanf(""));
        b.dx.assign(b.x.size(), std::nanf(""));
        b.dw.assign(b.routing.expert.size(), std::nanf(""));
      };
      std::vector<Batch> alone = batches;
      for (Batch& b : alone) {
        clear(b);
        Context context = layer.forward(layer.plan(b.routing), rows(b.x), rows(b.y));
        layer.backward(context, rows(b.dy), rows(b.dx), b.dw);
      }
      std::vector<Context> contexts;
      for (Batch& b : batches) {
        clear(b);
        contexts.push_back(layer.start_forward(layer.plan(b.routing), rows(b.x), rows(b.y)));
      }
      for (std::size_t i = 0; i < kPasses; ++i) layer.finish(contexts[(i + rank) % kPasses]);
      for (std::size_t i = 0; i < kPasses; ++i)
        layer.start_backward(contexts[i], rows(batches[i].dy), rows(batches[i].dx), batches[i].dw);
      EXPECT_THROW(layer.start_backward(contexts[0], rows(batches[0].dy), rows(batches[0].dx), batches[0].dw),
                   Error);
      for (std::size_t i = 0; i < kPasses; ++i) layer.finish(contexts[(i + 2 * rank) % kPasses]);
      EXPECT_THROW(layer.finish(contexts[0]), Error);  // nothing in flight
      for (std::size_t i = 0; i < kPasses; ++i) {
        EXPECT_TRUE(testing::same_bits(batches[i].y, alone[i].y)) << "y of pass " << i;
        EXPECT_TRUE(testing::same_bits(batches[i].dx, alone[i].dx)) << "dx of pass " << i;
        EXPECT_TRUE(testing::same_bits(batches[i].dw, alone[i].dw)) << "dw of pass " << i;
      }
    });
  }
}

// A rank that dies in the middle: the others come back within the deadline with its name.
TEST(MoeLayer, LostRankIsNamedWithinTheDeadline) {
  RuntimeOptions runtime_options;
  runtime_options.timeout = std::chrono::milliseconds(400);
  auto group = Runtime::create_local(Topology({{0, 1}, {2, 3}}), runtime_options);
  std::vector<std::string> messages(4);
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < 4; ++r)
    threads.emplace_back([&, r] {
      MoeLayerOptions options;
      options.hidden = options.ffn = 4;
      options.save = Save::kNone;
      const Placement placement = contiguous_placement(4, 4);
      MoeLayer layer(*group[r], placement, options);
      std::vector<float> w1(32, 0.1f), w2(16, 0.1f), x(4, 1.0f), y(4);
      layer.set_weights(
          std::vector{ExpertWeights{ConstMatrixView(w1.data(), 8, 4), ConstMatrixView(w2.data(), 4, 4)}});
      try {
        const Routing routing{4, {0, 4}, {0, 1, 2, 3}, {1, 1, 1, 1}};
        const auto plan = layer.plan(routing);
        if (r == 2) return;  // never comes to forward
        layer.forward(plan, ConstMatrixView(x.data(), 1, 4), MatrixView(y.data(), 1, 4));
        ADD_FAILURE() << "rank " << r << " finished without rank 2";
      } catch (const Error& e) {
        messages[r] = e.what();
      }
    });
  for (auto& t : threads) t.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(3));
  for (const std::size_t r : {0u, 1u, 3u})
    EXPECT_NE(messages[r].find("rank 2"), std::string::npos) << r << ": " << messages[r];
}

}  // namespace
}  // namespace sluice
