#include "sluice/dispatcher.hpp"

#include <gtest/gtest.h>

#include "layer_harness.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the harness of this test

constexpr std::uint64_t kSeed = 990017;

std::int64_t size_of_rows(const ConstMatrixView& v) {
  return v.rows * v.row_bytes();
}
std::span<const std::byte> bytes_of(const ConstMatrixView& v) {
  return {v.data, static_cast<std::size_t>(size_of_rows(v))};
}

struct DispatchSetup {
  Topology topology = Topology::uniform(1, 1);
  Placement placement;
  Exchange exchange = Exchange::kGateway;
  DType dtype = DType::kF32;
  DType wire_dtype = DType::kF32;
  DType combine_dtype = DType::kF32;
  RowLayout layout = RowLayout::kRankRows;
  std::int64_t alignment = 1;
  bool even_tokens = true;
};

// A rank's share of a problem and everything it needs to play it, for either layout.
class RankOfProblem {
 public:
  RankOfProblem(Runtime& runtime, const Problem& p, const DispatchSetup& setup)
      : runtime_(runtime), p_(p), setup_(setup), h_(p.shape.hidden) {
    const auto begin = deal_tokens(p.num_tokens(), runtime.num_ranks(), setup.even_tokens);
    t0_ = begin[runtime.rank().index()];
    n_ = begin[runtime.rank().index() + 1] - t0_;
    routing_ = routing_slice(p.routing, t0_, t0_ + n_);
    x_ = slice(p.x);
    dy_ = slice(p.dy);
    const std::vector<float> poison(static_cast<std::size_t>(n_ * h_),
                                    std::numeric_limits<float>::quiet_NaN());
    y_ = to_dtype(poison, setup.dtype);
    dx_ = y_;
    dw_.assign(routing_.expert.size(), std::numeric_limits<float>::quiet_NaN());
  }

  DispatcherOptions options() const {
    DispatcherOptions o;
    o.hidden = h_;
    o.dtype = setup_.dtype;
    o.wire_dtype = setup_.wire_dtype;
    o.combine_dtype = setup_.combine_dtype;
    o.layout = setup_.layout;
    o.alignment = setup_.alignment;
    o.exchange = setup_.exchange;
    return o;
  }
  const Routing& routing() const { return routing_; }
  ConstMatrixView x() const { return view(x_); }
  ConstMatrixView dy() const { return view(dy_); }
  MatrixView y() { return {y_.data(), setup_.dtype, n_, h_, h_}; }
  MatrixView dx() { return {dx_.data(), setup_.dtype, n_, h_, h_}; }
  std::span<float> dw() { return dw_; }

  void store(Result& out) const {
    from_dtype(y_, setup_.dtype, out.y.data() + t0_ * h_);
    from_dtype(dx_, setup_.dtype, out.dx.data() + t0_ * h_);
    std::copy(dw_.begin(), dw_.end(), out.dw.begin() + p_.routing.row_ptr[static_cast<std::size_t>(t0_)]);
  }

 private:
  std::vector<std::byte> slice(const std::vector<float>& v) const {
    return to_dtype(std::span<const float>(v).subspan(static_cast<std::size_t>(t0_ * h_),
                                                      static_cast<std::size_t>(n_ * h_)),
                    setup_.dtype);
  }
  ConstMatrixView view(const std::vector<std::byte>& bytes) const {
    return {bytes.data(), setup_.dtype, n_, h_, h_};
  }

  Runtime& runtime_;
  const Problem& p_;
  const DispatchSetup& setup_;
  std::int64_t h_, t0_ = 0, n_ = 0;
  Routing routing_;
  std::vector<std::byte> x_, dy_, y_, dx_;
  std::vector<float> dw_;
};

// What a caller's experts are: the layer's kernels on rows that lie slot by slot. So the layer's bits are expected.
class CallerExperts {
 public:
  CallerExperts(Runtime& runtime, const Problem& p, const Placement& placement, DType dtype)
      : kernels_(runtime.kernels()), p_(p), dtype_(dtype) {
    for (const std::int32_t e : placement.experts_of(runtime.rank())) {
      const auto i = static_cast<std::size_t>(e);
      experts_.push_back(i);
      w1_.push_back(to_dtype(p.w1[i], dtype));
      w2_.push_back(to_dtype(p.w2[i], dtype));
      g1_.emplace_back(p.w1[i].size(), 0.0f);
      g2_.emplace_back(p.w2[i].size(), 0.0f);
    }
    for (std::size_t l = 0; l < w1_.size(); ++l) {
      w1_ptr_.push_back(w1_[l].data());
      w2_ptr_.push_back(w2_[l].data());
      g1_ptr_.push_back(g1_[l].data());
      g2_ptr_.push_back(g2_[l].data());
    }
  }

  // out[p] = E_slot(rows[row(p)]); out: dtype [positions, hidden]. row: empty for the identity
  ConstMatrixView forward(std::span<const std::int64_t> slot_ptr, ConstMatrixView rows,
                          std::span<const std::int32_t> row) {
    const std::int64_t positions = slot_ptr.back(), pre = p_.shape.pre_cols(), f = p_.shape.ffn,
                       h = p_.shape.hidden;
    hidden_.assign(static_cast<std::size_t>(positions * pre) * size_of(dtype_), std::byte{0});
    act_.assign(static_cast<std::size_t>(positions * f) * size_of(dtype_), std::byte{0});
    out_.assign(static_cast<std::size_t>(positions * h) * size_of(dtype_), std::byte{0});
    kernels_.grouped_gemm_forward({slot_ptr, w1_ptr_}, rows, row, dtype_, pre, activation(),
                                  matrix(hidden_, positions, pre), matrix(act_, positions, f));
    kernels_.grouped_gemm_forward({slot_ptr, w2_ptr_}, matrix(act_, positions, f), {}, dtype_, h,
                                  activation(), matrix(out_, positions, h), {});
    return matrix(out_, positions, h);
  }

  // From drows[row(p)] = dy and the routes' weights: dx of every position, dw of every position; gradients add up.
  ConstMatrixView backward(std::span<const std::int64_t> slot_ptr, ConstMatrixView x_rows,
                           std::span<const std::int32_t> row, ConstMatrixView dy_rows,
                           std::span<const float> weight, std::vector<float>& dw) {
    const std::int64_t positions = slot_ptr.back(), pre = p_.shape.pre_cols(), f = p_.shape.ffn,
                       h = p_.shape.hidden;
    dw.assign(static_cast<std::size_t>(positions), std::numeric_limits<float>::quiet_NaN());
    kernels_.grouped_gemm_dgrad({slot_ptr, w2_ptr_}, dy_rows, row, dtype_, matrix(act_, positions, f));
    kernels_.activation_backward(activation(), matrix(hidden_, positions, pre), matrix(act_, positions, f),
                                 weight, dw, matrix(hidden_, positions, pre), matrix(act_, positions, f), 0,
                                 positions);
    kernels_.grouped_gemm_dgrad({slot_ptr, w1_ptr_}, matrix(hidden_, positions, pre), {}, dtype_,
                                matrix(out_, positions, h));
    kernels_.grouped_gemm_wgrad(slot_ptr, dy_rows, row, matrix(act_, positions, f), {}, g2_ptr_);
    kernels_.grouped_gemm_wgrad(slot_ptr, matrix(hidden_, positions, pre), {}, x_rows, row, g1_ptr_);
    return matrix(out_, positions, h);
  }

  // Every expert of these tests has one slot.
  void store(Result& out) const {
    for (std::size_t l = 0; l < experts_.size(); ++l) {
      out.grad_w1[experts_[l]] = g1_[l];
      out.grad_w2[experts_[l]] = g2_[l];
    }
  }

 private:
  kernels::Activation activation() const {
    return p_.shape.activation == ExpertActivation::kSwiGLU ? kernels::Activation::kSwiGLU
           : p_.shape.activation == ExpertActivation::kGelu ? kernels::Activation::kGelu
                                                            : kernels::Activation::kRelu;
  }
  MatrixView matrix(std::vector<std::byte>& bytes, std::int64_t rows, std::int64_t cols) const {
    return {bytes.data(), dtype_, rows, cols, cols};
  }

  kernels::Kernels& kernels_;
  const Problem& p_;
  DType dtype_;
  std::vector<std::size_t> experts_;
  std::vector<std::vector<std::byte>> w1_, w2_;
  std::vector<std::vector<float>> g1_, g2_;
  std::vector<const std::byte*> w1_ptr_, w2_ptr_;
  std::vector<float*> g1_ptr_, g2_ptr_;
  std::vector<std::byte> hidden_, act_, out_;
};

// The layer by way of rank rows: the caller sorts received rows by expert, as the plan's positions say, and adds each
// row's experts up.
void run_rank_rows(Runtime& runtime, const Problem& p, const DispatchSetup& setup, Result& out) {
  RankOfProblem mine(runtime, p, setup);
  Dispatcher dispatcher(runtime, setup.placement, mine.options());
  CallerExperts experts(runtime, p, setup.placement, setup.dtype);
  const auto plan = dispatcher.plan(mine.routing());
  const std::int64_t num_rows = plan->recv2.num_rows(), h = p.shape.hidden;
  Context c = dispatcher.dispatch(plan, mine.x());
  const ConstMatrixView rows = dispatcher.rows(c);
  ASSERT_EQ(rows.rows, num_rows);
  const std::vector<std::byte> kept(bytes_of(rows).begin(), bytes_of(rows).end());
  const ConstMatrixView x_rows(kept.data(), setup.wire_dtype, num_rows, h, h);
  std::vector<std::byte> sums(static_cast<std::size_t>(num_rows * h) * size_of(setup.combine_dtype));
  const MatrixView sums_view(sums.data(), setup.combine_dtype, num_rows, h, h);
  runtime.kernels().weighted_reduce(experts.forward(plan->slot_ptr, x_rows, plan->expert_row),
                                    plan->recv2.route_ptr, plan->position_of_route, plan->recv2.weight,
                                    sums_view);
  dispatcher.combine(c, sums_view, mine.y());

  dispatcher.combine_backward(c, mine.dy(), {});
  std::vector<float> dw_position;
  const ConstMatrixView drows = experts.backward(plan->slot_ptr, x_rows, plan->expert_row, dispatcher.rows(c),
                                                 plan->expert_weight, dw_position);
  std::vector<float> received_dw(dw_position.size());
  for (std::size_t q = 0; q < received_dw.size(); ++q)
    received_dw[q] = dw_position[static_cast<std::size_t>(plan->position_of_route[q])];
  runtime.kernels().weighted_reduce(drows, plan->recv2.route_ptr, plan->position_of_route, {}, sums_view);
  dispatcher.dispatch_backward(c, sums_view, received_dw, mine.dx(), mine.dw());
  mine.store(out);
  experts.store(out);
}

// The layer by way of expert rows: the rows are already the experts' inputs.
void run_expert_rows(Runtime& runtime, const Problem& p, const DispatchSetup& setup, Result& out) {
  RankOfProblem mine(runtime, p, setup);
  Dispatcher dispatcher(runtime, setup.placement, mine.options());
  CallerExperts experts(runtime, p, setup.placement, setup.dtype);
  const auto plan = dispatcher.plan(mine.routing());
  const std::int64_t h = p.shape.hidden;
  Context c = dispatcher.dispatch(plan, mine.x());
  const ConstMatrixView rows = dispatcher.rows(c);
  const std::vector<std::int64_t> begin(dispatcher.slot_begin(c).begin(), dispatcher.slot_begin(c).end());
  const std::vector<std::int32_t> row_of_route(dispatcher.row_of_route(c).begin(),
                                               dispatcher.row_of_route(c).end());
  ASSERT_EQ(rows.rows, begin.back());
  // Slots begin at multiples of the alignment; what lies between is zero; every route has a row of its own.
  std::vector<char> taken(static_cast<std::size_t>(rows.rows), 0);
  for (const std::int32_t r : row_of_route) ++taken[static_cast<std::size_t>(r)];
  for (std::size_t l = 0; l + 1 < begin.size(); ++l) {
    EXPECT_EQ(begin[l] % setup.alignment, 0) << "slot " << l;
    const std::int64_t count = plan->slot_ptr[l + 1] - plan->slot_ptr[l];
    EXPECT_LT(begin[l + 1] - begin[l] - count, setup.alignment) << "slot " << l;
    for (std::int64_t r = begin[l]; r < begin[l + 1]; ++r) {
      EXPECT_EQ(taken[static_cast<std::size_t>(r)], r - begin[l] < count ? 1 : 0) << "row " << r;
      if (r - begin[l] < count) continue;
      for (std::int64_t b = 0; b < rows.row_bytes(); ++b)
        EXPECT_EQ(rows.row(r)[b], std::byte{0}) << "padding row " << r;
    }
  }
  const std::vector<std::byte> kept(bytes_of(rows).begin(), bytes_of(rows).end());
  const ConstMatrixView x_rows(kept.data(), setup.wire_dtype, begin.back(), h, h);
  const ConstMatrixView result = experts.forward(begin, x_rows, {});
  const std::vector<std::byte> outputs(bytes_of(result).begin(), bytes_of(result).end());
  const ConstMatrixView outputs_view(outputs.data(), setup.combine_dtype, begin.back(), h, h);
  dispatcher.combine(c, outputs_view, mine.y());

  dispatcher.combine_backward(c, mine.dy(), outputs_view);
  // The rows carry w already.
  const std::vector<float> ones(static_cast<std::size_t>(begin.back()), 1.0f);
  std::vector<float> unused;
  const ConstMatrixView drows = experts.backward(begin, x_rows, {}, dispatcher.rows(c), ones, unused);
  dispatcher.dispatch_backward(c, drows, {}, mine.dx(), mine.dw());
  mine.store(out);
  experts.store(out);
}

Result run_dispatcher(const Problem& p, const DispatchSetup& setup) {
  Result out = empty_result(p);
  RuntimeOptions options;
  options.timeout = std::chrono::seconds(20);
  auto group = Runtime::create_local(setup.topology, options);
  run_ranks(group, [&](Runtime& runtime) {
    setup.layout == RowLayout::kRankRows ? run_rank_rows(runtime, p, setup, out)
                                         : run_expert_rows(runtime, p, setup, out);
  });
  return out;
}

LayerSetup layer_setup(const DispatchSetup& s) {
  LayerSetup out;
  out.topology = s.topology;
  out.placement = s.placement;
  out.schedule.exchange = s.exchange;
  out.dtype = s.dtype;
  out.wire_dtype = s.wire_dtype;
  out.combine_dtype = s.combine_dtype;
  out.even_tokens = s.even_tokens;
  return out;
}

// Experts dealt to random ranks of the lower half: the others have none.
Placement lopsided(const Problem& p, std::int32_t num_ranks, std::mt19937_64& rng) {
  std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(num_ranks));
  for (std::int32_t e = 0; e < p.shape.num_experts; ++e)
    lists[rng() % static_cast<std::uint64_t>((num_ranks + 1) / 2)].push_back(e);
  return placement_from_lists(p.shape.num_experts, lists);
}

struct Case {
  std::vector<std::vector<std::int32_t>> nodes;
  std::int64_t num_tokens;
  std::int32_t min_routes, max_routes;
  double skew;
  bool even, lopsided;
  Exchange exchange;
};
const std::vector<Case> kCases = {
    {{{0}}, 23, 0, 4, 0, true, false, Exchange::kGateway},
    {{{0, 1}, {2, 3}}, 41, 0, 5, 0, true, false, Exchange::kGateway},  // ragged
    {{{0, 1}, {2, 3}},
     41,
     1,
     3,
     2.0,
     false,
     true,
     Exchange::kGateway},  // skewed, ranks without tokens or slots
    {{{0, 2}, {1, 3, 4}}, 29, 2, 2, 1.0, true, true, Exchange::kDirect},  // straight to every rank
    {{{0, 1, 2}, {3}}, 2, 0, 7, 0, true, false, Exchange::kGateway},      // fewer tokens than ranks
    {{{0, 1}, {2, 3}}, 0, 0, 0, 0, true, false, Exchange::kGateway},      // no tokens
    {{{0}, {1}, {2}}, 17, 0, 0, 0, true, false, Exchange::kGateway},      // tokens without routes
};

void for_all_cases(std::uint64_t seed,
                   const std::function<void(const Problem&, DispatchSetup&, std::mt19937_64&)>& body) {
  std::mt19937_64 rng(seed);
  for (std::size_t i = 0; i < kCases.size(); ++i)
    for (const ExpertActivation activation : {ExpertActivation::kSwiGLU, ExpertActivation::kRelu}) {
      const Case& c = kCases[i];
      SCOPED_TRACE(str("case ", i, " activation ", static_cast<int>(activation), " seed ", seed));
      const Problem p =
          random_problem(rng, Shape{7, 16, 12, activation}, c.num_tokens, c.min_routes, c.max_routes, c.skew);
      DispatchSetup setup;
      setup.topology = Topology(c.nodes);
      const std::int32_t ranks = setup.topology.num_ranks();
      setup.placement = c.lopsided ? lopsided(p, ranks, rng) : contiguous_placement(7, ranks);
      setup.exchange = c.exchange;
      setup.even_tokens = c.even;
      body(p, setup, rng);
    }
}

// With the layer's own kernels as the caller's experts, rank rows are the layer taken apart: not a bit may differ.
TEST(Dispatcher, RankRowsAreTheLayerBitForBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for_all_cases(kSeed, [&](const Problem& p, DispatchSetup& setup, std::mt19937_64&) {
      setup.dtype = setup.wire_dtype = setup.combine_dtype = dtype;
      expect_same_bits(run_dispatcher(p, setup), run_layer(p, layer_setup(setup)));
    });
}

// A wire narrower than the caller's rows rounds rows and sums as the layer does.
TEST(Dispatcher, RankRowsWithABf16WireAreTheLayerBitForBit) {
  for_all_cases(kSeed + 1, [&](const Problem& p, DispatchSetup& setup, std::mt19937_64&) {
    setup.wire_dtype = setup.combine_dtype = DType::kBF16;
    expect_same_bits(run_dispatcher(p, setup), run_layer(p, layer_setup(setup)));
  });
}

// Expert rows: y takes the layer's path exactly. The backward pass scales dy instead of u = W2^T dy, and dw is <dy, row>
// instead of <u, a>: other roundings of the same numbers, so the dense reference judges them.
TEST(Dispatcher, ExpertRowsAgreeAtEveryAlignment) {
  for (const std::int64_t alignment : {1, 8, 16})
    for_all_cases(kSeed + 2, [&](const Problem& p, DispatchSetup& setup, std::mt19937_64&) {
      SCOPED_TRACE(str("alignment ", alignment));
      setup.layout = RowLayout::kExpertRows;
      setup.alignment = alignment;
      const Result got = run_dispatcher(p, setup);
      EXPECT_TRUE(same_bits(got.y, run_layer(p, layer_setup(setup)).y)) << "y";
      // As in moe_layer_test: sums of at most 7 experts over 12..24 terms.
      expect_close(got, dense_reference(p), 2e-5);
    });
}

TEST(Dispatcher, ExpertRowsInBf16) {
  for_all_cases(kSeed + 3, [&](const Problem& p, DispatchSetup& setup, std::mt19937_64&) {
    setup.layout = RowLayout::kExpertRows;
    setup.alignment = 8;
    setup.dtype = setup.wire_dtype = setup.combine_dtype = DType::kBF16;
    const Result got = run_dispatcher(p, setup);
    EXPECT_TRUE(same_bits(got.y, run_layer(p, layer_setup(setup)).y)) << "y";
    // w dy is rounded to bf16 before the experts, one rounding more than the layer has: moe_layer_test allows 8 / 256.
    expect_close(got, dense_reference(p), 10.0 / 256);
  });
}

// Small integers, and weights that are halves: every sum is exact.
Problem integer_problem(std::mt19937_64& rng, std::int64_t num_tokens, std::int32_t min_routes,
                        std::int32_t max_routes, double skew) {
  Problem p =
      random_problem(rng, Shape{7, 8, 8, ExpertActivation::kRelu}, num_tokens, min_routes, max_routes, skew);
  for (auto* v : {&p.x, &p.dy})
    for (float& e : *v) e = static_cast<float>(static_cast<int>(rng() % 9) - 4);
  for (float& w : p.routing.weight) w = static_cast<float>(rng() % 4) * 0.5f;
  return p;
}

// Identity experts: y_t = (sum of weights) x_t, dx_t = (sum of weights) dy_t, dw = <dy_t, x_t>, to the last bit.
TEST(Dispatcher, IdentityExpertsGiveTheSumOfWeightsExactly) {
  std::mt19937_64 rng(kSeed + 4);
  for (std::size_t i = 0; i < kCases.size(); ++i)
    for (const RowLayout layout : {RowLayout::kRankRows, RowLayout::kExpertRows})
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        SCOPED_TRACE(str("case ", i, " layout ", static_cast<int>(layout), " ", to_string(dtype), " seed ",
                         kSeed + 4));
        const Case& c = kCases[i];
        const Problem p = integer_problem(rng, c.num_tokens, c.min_routes, c.max_routes, c.skew);
        DispatchSetup setup;
        setup.topology = Topology(c.nodes);
        const std::int32_t ranks = setup.topology.num_ranks();
        setup.placement = c.lopsided ? lopsided(p, ranks, rng) : contiguous_placement(7, ranks);
        setup.exchange = c.exchange;
        setup.even_tokens = c.even;
        setup.layout = layout;
        setup.alignment = layout == RowLayout::kExpertRows ? 4 : 1;
        setup.dtype = setup.wire_dtype = setup.combine_dtype = dtype;
        const std::int64_t h = p.shape.hidden;
        Result got = empty_result(p);
        auto group = Runtime::create_local(setup.topology, {});
        run_ranks(group, [&](Runtime& runtime) {
          RankOfProblem mine(runtime, p, setup);
          Dispatcher dispatcher(runtime, setup.placement, mine.options());
          const auto plan = dispatcher.plan(mine.routing());
          Context context = dispatcher.dispatch(plan, mine.x());
          const ConstMatrixView rows = dispatcher.rows(context);
          const std::vector<std::byte> kept(bytes_of(rows).begin(), bytes_of(rows).end());
          const std::int64_t n = rows.rows;
          const ConstMatrixView x_rows(kept.data(), dtype, n, h, h);
          std::vector<std::byte> scaled(kept.size());
          const MatrixView scaled_view(scaled.data(), dtype, n, h, h);
          // Rank rows: the caller adds a row's experts up, here w x once a route.
          const auto add_up = [&](ConstMatrixView from) {
            std::vector<std::int32_t> row(plan->recv2.slot.size());
            for (std::size_t r = 0; r + 1 < plan->recv2.route_ptr.size(); ++r)
              for (std::int64_t q = plan->recv2.route_ptr[r]; q < plan->recv2.route_ptr[r + 1]; ++q)
                row[static_cast<std::size_t>(q)] = static_cast<std::int32_t>(r);
            runtime.kernels().weighted_reduce(from, plan->recv2.route_ptr, row, plan->recv2.weight,
                                              scaled_view);
            return row;
          };
          if (layout == RowLayout::kRankRows) {
            const auto row = add_up(x_rows);
            dispatcher.combine(context, scaled_view, mine.y());
            dispatcher.combine_backward(context, mine.dy(), {});
            std::vector<float> dw(row.size());
            runtime.kernels().row_dots(dispatcher.rows(context), row, x_rows, row, dw);
            add_up(dispatcher.rows(context));
            dispatcher.dispatch_backward(context, scaled_view, dw, mine.dx(), mine.dw());
          } else {
            dispatcher.combine(context, x_rows, mine.y());
            dispatcher.combine_backward(context, mine.dy(), x_rows);
            const ConstMatrixView drows = dispatcher.rows(context);
            const std::vector<std::byte> same(bytes_of(drows).begin(), bytes_of(drows).end());
            dispatcher.dispatch_backward(context, ConstMatrixView(same.data(), dtype, n, h, h), {}, mine.dx(),
                                         mine.dw());
          }
          mine.store(got);
        });
        Result want = got;
        for (std::int64_t t = 0; t < p.num_tokens(); ++t) {
          float sum = 0, dot = 0;
          for (std::int64_t j = 0; j < h; ++j)
            dot += p.dy[static_cast<std::size_t>(t * h + j)] * p.x[static_cast<std::size_t>(t * h + j)];
          for (auto q = p.routing.row_ptr[static_cast<std::size_t>(t)];
               q < p.routing.row_ptr[static_cast<std::size_t>(t) + 1]; ++q) {
            sum += p.routing.weight[static_cast<std::size_t>(q)];
            want.dw[static_cast<std::size_t>(q)] = dot;
          }
          for (std::int64_t j = t * h; j < (t + 1) * h; ++j) {
            want.y[static_cast<std::size_t>(j)] = sum * p.x[static_cast<std::size_t>(j)];
            want.dx[static_cast<std::size_t>(j)] = sum * p.dy[static_cast<std::size_t>(j)];
          }
        }
        // By value: sums that are 0 may be +0 or -0.
        for (std::size_t j = 0; j < want.y.size(); ++j) {
          ASSERT_EQ(got.y[j], want.y[j]) << "y " << j;
          ASSERT_EQ(got.dx[j], want.dx[j]) << "dx " << j;
        }
        for (std::size_t j = 0; j < want.dw.size(); ++j) ASSERT_EQ(got.dw[j], want.dw[j]) << "dw " << j;
      }
}

// <dispatch(x), v> = <x, dispatch_backward(v)> and <combine(v), dy> = <v, combine_backward(dy)>, v anything, in exact
// integers summed over all ranks. Rows of the padding do not count: they come from nowhere and go nowhere.
TEST(Dispatcher, BackwardIsTheAdjoint) {
  std::mt19937_64 rng(kSeed + 5);
  for (std::size_t i = 0; i < kCases.size(); ++i)
    for (const RowLayout layout : {RowLayout::kRankRows, RowLayout::kExpertRows}) {
      SCOPED_TRACE(str("case ", i, " layout ", static_cast<int>(layout), " seed ", kSeed + 5));
      const Case& c = kCases[i];
      const Problem p = integer_problem(rng, c.num_tokens, c.min_routes, c.max_routes, c.skew);
      DispatchSetup setup;
      setup.topology = Topology(c.nodes);
      const std::int32_t ranks = setup.topology.num_ranks();
      setup.placement = c.lopsided ? lopsided(p, ranks, rng) : contiguous_placement(7, ranks);
      setup.exchange = c.exchange;
      setup.even_tokens = c.even;
      setup.layout = layout;
      setup.alignment = layout == RowLayout::kExpertRows ? 8 : 1;
      auto group = Runtime::create_local(setup.topology, {});
      // Integer dot products per rank: dispatch here, dispatch at home, combine at home, combine here.
      std::vector<std::array<double, 4>> dots(static_cast<std::size_t>(ranks), std::array<double, 4>{});
      run_ranks(group, [&](Runtime& runtime) {
        RankOfProblem mine(runtime, p, setup);
        Dispatcher dispatcher(runtime, setup.placement, mine.options());
        const auto plan = dispatcher.plan(mine.routing());
        Context context = dispatcher.dispatch(plan, mine.x());
        const ConstMatrixView rows = dispatcher.rows(context);
        const std::int64_t h = p.shape.hidden;
        std::mt19937_64 own(kSeed + static_cast<std::uint64_t>(runtime.rank().value));
        std::vector<float> v(static_cast<std::size_t>(rows.rows * h)), u(v.size());
        std::vector<char> real(static_cast<std::size_t>(rows.rows), layout == RowLayout::kRankRows);
        if (layout == RowLayout::kExpertRows)
          for (const std::int32_t r : dispatcher.row_of_route(context)) real[static_cast<std::size_t>(r)] = 1;
        for (std::size_t j = 0; j < v.size(); ++j) {
          v[j] = static_cast<float>(static_cast<int>(own() % 7) - 3);
          u[j] = static_cast<float>(static_cast<int>(own() % 7) - 3);
        }
        const auto dot = [&](ConstMatrixView a, const float* b, bool rows_only) {
          double sum = 0;
          for (std::int64_t r = 0; r < a.rows; ++r)
            for (std::int64_t j = 0; j < a.cols && (!rows_only || real[static_cast<std::size_t>(r)]); ++j)
              sum += double(a.row_as<float>(r)[j]) * double(b[r * h + j]);
          return sum;
        };
        auto& d = dots[runtime.rank().index()];
        const ConstMatrixView v_view(v.data(), rows.rows, h), u_view(u.data(), rows.rows, h);
        d[0] = dot(rows, v.data(), true);
        dispatcher.combine(context, u_view, mine.y());
        d[2] = dot(mine.y(), mine.dy().row_as<float>(0), false);
        dispatcher.combine_backward(context, mine.dy(),
                                    layout == RowLayout::kExpertRows ? u_view : ConstMatrixView());
        d[3] = dot(dispatcher.rows(context), u.data(), true);
        const std::vector<float> dw(
            layout == RowLayout::kRankRows ? static_cast<std::size_t>(plan->num_positions()) : 0, 0.0f);
        dispatcher.dispatch_backward(context, v_view, dw, mine.dx(), mine.dw());
        d[1] = dot(mine.dx(), mine.x().row_as<float>(0), false);
      });
      std::array<double, 4> total{};
      for (const auto& d : dots)
        for (std::size_t k = 0; k < 4; ++k) total[k] += d[k];
      EXPECT_EQ(total[0], total[1]) << "dispatch";
      EXPECT_EQ(total[2], total[3]) << "combine";
      if (!p.routing.expert.empty() && c.num_tokens > 10) {
        EXPECT_NE(total[0], 0.0);
        EXPECT_NE(total[2], 0.0);
      }
    }
}

// ---- misuse ----------------------------------------------------------------------------------------------------------

template <typename Call>
void expect_code(ErrorCode code, std::string_view part, Call&& call) {
  try {
    call();
    ADD_FAILURE() << "expected: " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    EXPECT_NE(std::string_view(e.what()).find(part), std::string_view::npos) << e.what();
  }
}

TEST(Dispatcher, CallsOutOfOrderAreRefusedAndHarmless) {
  for (const RowLayout layout : {RowLayout::kRankRows, RowLayout::kExpertRows}) {
    SCOPED_TRACE(static_cast<int>(layout));
    auto group = Runtime::create_local(Topology::uniform(1, 1), {});
    Runtime& runtime = *group[0];
    DispatcherOptions options;
    options.hidden = 4;
    options.layout = layout;
    const Placement placement = contiguous_placement(2, 1);
    Dispatcher dispatcher(runtime, placement, options), other(runtime, placement, options);
    const bool expert_rows = layout == RowLayout::kExpertRows;
    const Routing routing{2, {0, 2, 3}, {0, 1, 0}, {1, 2, 3}};
    const std::vector<float> x = {1, 2, 3, 4, 5, 6, 7, 8};
    std::vector<float> y(8), dx(8), dw(3);
    const ConstMatrixView x_view(x.data(), 2, 4);
    const MatrixView y_view(y.data(), 2, 4), dx_view(dx.data(), 2, 4);
    const auto plan = dispatcher.plan(routing);
    const std::int64_t n = expert_rows ? 3 : 2;
    const std::vector<float> out(static_cast<std::size_t>(n * 4), 1.0f),
        received_dw(expert_rows ? 0 : 3, 1.0f);
    const ConstMatrixView out_view(out.data(), n, 4),
        backward_out = expert_rows ? out_view : ConstMatrixView();

    Context empty;
    expect_code(ErrorCode::kInvalidState, "empty context",
                [&] { dispatcher.combine(empty, out_view, y_view); });
    expect_code(ErrorCode::kInvalidState, "empty context", [&] { dispatcher.rows(empty); });
    expect_code(ErrorCode::kInvalidArgument, "no plan", [&] { dispatcher.dispatch(nullptr, x_view); });
    expect_code(ErrorCode::kInvalidArgument, "x has shape",
                [&] { dispatcher.dispatch(plan, ConstMatrixView(x.data(), 1, 4)); });
    expect_code(ErrorCode::kInvalidArgument, "x is bf16", [&] {
      dispatcher.dispatch(
          plan, ConstMatrixView(reinterpret_cast<const std::byte*>(x.data()), DType::kBF16, 2, 4, 4));
    });

    Context c = dispatcher.dispatch(plan, x_view);
    expect_code(ErrorCode::kInvalidState, "another dispatcher", [&] { other.combine(c, out_view, y_view); });
    expect_code(ErrorCode::kInvalidState, "another dispatcher", [&] { other.rows(c); });
    expect_code(ErrorCode::kInvalidState, "combine_backward needs combine",
                [&] { dispatcher.combine_backward(c, x_view, backward_out); });
    expect_code(ErrorCode::kInvalidState, "dispatch_backward needs combine_backward",
                [&] { dispatcher.dispatch_backward(c, out_view, received_dw, dx_view, dw); });
    expect_code(ErrorCode::kInvalidArgument, "out has shape",
                [&] { dispatcher.combine(c, ConstMatrixView(out.data(), n - 1, 4), y_view); });
    if (!expert_rows) {
      expect_code(ErrorCode::kInvalidState, "expert rows", [&] { dispatcher.slot_begin(c); });
      expect_code(ErrorCode::kInvalidState, "expert rows", [&] { dispatcher.row_of_route(c); });
    }
    dispatcher.combine(c, out_view, y_view);  // the refusals left it as it was
    EXPECT_EQ(y[0], expert_rows ? 3.0f : 1.0f);
    expect_code(ErrorCode::kInvalidState, "combine needs dispatch",
                [&] { dispatcher.combine(c, out_view, y_view); });
    expect_code(ErrorCode::kInvalidState, "rows only between", [&] { dispatcher.rows(c); });
    if (expert_rows) {
      expect_code(ErrorCode::kInvalidArgument, "out has shape",
                  [&] { dispatcher.combine_backward(c, x_view, {}); });
    } else {
      expect_code(ErrorCode::kInvalidArgument, "out must be empty",
                  [&] { dispatcher.combine_backward(c, x_view, out_view); });
    }
    dispatcher.combine_backward(c, x_view, backward_out);
    expect_code(ErrorCode::kInvalidState, "combine needs dispatch",
                [&] { dispatcher.combine(c, out_view, y_view); });
    expect_code(ErrorCode::kInvalidArgument, "received_dw has 2",
                [&] { dispatcher.dispatch_backward(c, out_view, std::vector<float>(2), dx_view, dw); });
    expect_code(ErrorCode::kInvalidArgument, "dw has 0",
                [&] { dispatcher.dispatch_backward(c, out_view, received_dw, dx_view, {}); });
    dispatcher.dispatch_backward(c, out_view, received_dw, dx_view, dw);
    EXPECT_EQ(dx[0], expert_rows ? 2.0f : 1.0f);
    expect_code(ErrorCode::kInvalidState, "combine_backward",
                [&] { dispatcher.dispatch_backward(c, out_view, received_dw, dx_view, dw); });
  }
}

TEST(Dispatcher, OptionsAndForeignPlansAreRefused) {
  auto group = Runtime::create_local(Topology::uniform(1, 1), {});
  DispatcherOptions options;
  options.hidden = 4;
  const Placement placement = contiguous_placement(2, 1);
  DispatcherOptions bad = options;
  bad.hidden = 0;
  expect_code(ErrorCode::kInvalidArgument, "hidden is 0", [&] { Dispatcher(*group[0], placement, bad); });
  bad = options;
  bad.alignment = 0;
  expect_code(ErrorCode::kInvalidArgument, "alignment is 0", [&] { Dispatcher(*group[0], placement, bad); });
  const std::vector<ExpertKind> kinds = {ExpertKind::kFFN, ExpertKind::kCopy};
  expect_code(ErrorCode::kNotSupported, "expert 1",
              [&] { Dispatcher(*group[0], contiguous_placement(2, 1, kinds), options); });

  Dispatcher dispatcher(*group[0], placement, options),
      larger(*group[0], contiguous_placement(3, 1), options);
  const auto plan = larger.plan(Routing{3, {0, 1}, {2}, {1}});
  const std::vector<float> x(4);
  expect_code(ErrorCode::kInvalidArgument, "belong to the layer or dispatcher",
              [&] { dispatcher.dispatch(plan, ConstMatrixView(x.data(), 1, 4)); });
  MoeLayerOptions layer_options;
  layer_options.hidden = layer_options.ffn = 4;
  MoeLayer layer(*group[0], placement, layer_options);
  const std::vector<float> w1(32), w2(16);
  const ExpertWeights weights{ConstMatrixView(w1.data(), 8, 4), ConstMatrixView(w2.data(), 4, 4)};
  layer.set_weights(std::vector{weights, weights});
  std::vector<float> y(4);
  expect_code(ErrorCode::kInvalidArgument, "belong to the layer or dispatcher",
              [&] { layer.forward(plan, ConstMatrixView(x.data(), 1, 4), MatrixView(y.data(), 1, 4)); });
  // A layer's context is none of a dispatcher's.
  Context c = layer.forward(layer.plan(Routing{2, {0, 0}, {}, {}}), ConstMatrixView(x.data(), 1, 4),
                            MatrixView(y.data(), 1, 4));
  expect_code(ErrorCode::kInvalidState, "of a layer",
              [&] { dispatcher.combine_backward(c, ConstMatrixView(x.data(), 1, 4), {}); });
}

// A dispatcher and its contexts go while puts of the last pass are still on a slow link, or before the combine: what
// lands late must find its memory. (Without the pool's care this is a use after free, seen by the address sanitizer.)
TEST(Dispatcher, MayGoWhileRowsAreOnTheirWay) {
  std::mt19937_64 rng(kSeed + 6);
  const Problem p = random_problem(rng, Shape{7, 64, 8}, 64, 1, 3);
  DispatchSetup setup;
  setup.topology = Topology({{0, 1}, {2, 3}});
  setup.topology.in_node.latency = setup.topology.across_nodes.latency = std::chrono::milliseconds(20);
  setup.placement = contiguous_placement(7, 4);
  auto group = Runtime::create_local(setup.topology, {});
  run_ranks(group, [&](Runtime& runtime) {
    for (int round = 0; round < 2; ++round) {
      RankOfProblem mine(runtime, p, setup);
      {
        Dispatcher dispatcher(runtime, setup.placement, mine.options());
        Context c = dispatcher.dispatch(dispatcher.plan(mine.routing()), mine.x());
        if (round == 0) {
          const std::vector<float> out(static_cast<std::size_t>(dispatcher.rows(c).rows * p.shape.hidden),
                                       1.0f);
          dispatcher.combine(c, ConstMatrixView(out.data(), dispatcher.rows(c).rows, p.shape.hidden),
                             mine.y());
        }
      }
      runtime.barrier();  // the group lives on
    }
  });
}

}  // namespace
}  // namespace sluice
