#include "sluice/runtime/src/tune/probe.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ctime>
#include <functional>
#include <numeric>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "sluice/base/clock.hpp"
#include "sluice/base/log.hpp"
#include "sluice/moe_layer.hpp"
#include "sluice/runtime/src/executor.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/machine.hpp"
#include "sluice/runtime/src/runtime_state.hpp"
#include "sluice/runtime/src/tune/predict.hpp"

namespace sluice {
namespace {

using Samples = std::vector<double>;
using Points = std::vector<Curve::Point>;

constexpr std::int64_t kLargestMessage = 8 << 20;
constexpr std::int64_t kSmallestMessage = 4 << 10;
constexpr std::int64_t kColdTimes = 4;  // so many times the most bytes of a point are rotated through
constexpr double kEnoughUs = 15000;     // of repeats a point
constexpr int kFewestRepeats = 5;
constexpr int kSweeps = 5;  // over all GEMMs: a machine shared with others has slow seconds
constexpr int kMostRepeats = 200;
constexpr std::int64_t kMostRows = 2048;             // of one group
constexpr std::int64_t kMostWeightBytes = 64 << 20;  // held at once

// The lower quartile: what a repeat takes when nothing else of the machine gets in its way, without betting on one.
double typical(Samples v) {
  if (v.empty()) return 0;
  const auto mid = v.begin() + static_cast<std::ptrdiff_t>(v.size() / 4);
  std::nth_element(v.begin(), mid, v.end());
  return *mid;
}
// The sweeps have the same amounts in the same order.
Points median_of(const std::vector<Points>& sweeps) {
  Points out = sweeps.front();
  for (std::size_t i = 0; i < out.size(); ++i) {
    Samples us;
    for (const Points& points : sweeps) us.push_back(points[i].us);
    std::nth_element(us.begin(), us.begin() + static_cast<std::ptrdiff_t>(us.size() / 2), us.end());
    out[i].us = us[us.size() / 2];
  }
  return out;
}
double us_since(Clock::time_point begin) {
  return to_us(Clock::now() - begin);
}
double mean_over_ranks(Runtime& runtime, double mine_us) {
  const std::int64_t ns = std::llround(mine_us * 1000);
  double sum = 0;
  for (const std::int64_t v : runtime.all_gather(std::span(&ns, 1), "probe")) sum += static_cast<double>(v);
  return sum / 1000 / runtime.num_ranks();
}
double from_rank(Runtime& runtime, RankId rank, double mine_us) {
  const std::int64_t ns = std::llround(mine_us * 1000);
  return static_cast<double>(runtime.all_gather(std::span(&ns, 1), "probe")[rank.index()]) / 1000;
}
void say(const Runtime& runtime, const std::string& text) {
  if (runtime.rank().value == 0) log_info("probe: ", text);
}

// Repeats until enough; the mean over ranks of each one's typical time. All ranks begin together. Collective.
double timed(Runtime& runtime, const std::function<void()>& work, int fewest = kFewestRepeats,
             double enough_us = kEnoughUs) {
  work();
  runtime.barrier("probe");
  Samples us;
  double total = 0;
  while (static_cast<int>(us.size()) < fewest ||
         (total < enough_us && static_cast<int>(us.size()) < kMostRepeats)) {
    const auto begin = Clock::now();
    work();
    us.push_back(us_since(begin));
    total += us.back();
  }
  return mean_over_ranks(runtime, typical(us));
}

// ---- GEMMs and rows --------------------------------------------------------------------------------------------------

struct Rows {
  std::vector<std::byte> bytes;
  MatrixView view;
  Rows(std::int64_t rows, std::int64_t cols, DType dtype)
      : bytes(static_cast<std::size_t>(rows * cols) * size_of(dtype)),
        view(bytes.data(), dtype, rows, cols, cols) {
    // Small numbers that are no denormals; the same for both dtypes' upper bytes is good enough.
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < cols; ++c) {
        const float v = 0.01f * static_cast<float>((r * 7 + c * 3) % 17 - 8);
        std::byte* at = view.row(r) + static_cast<std::size_t>(c) * size_of(dtype);
        if (dtype == DType::kF32) {
          std::memcpy(at, &v, sizeof v);
        } else {
          const bf16 b(v);
          std::memcpy(at, &b, sizeof b);
        }
      }
  }
};

class ComputeProbe {
 public:
  ComputeProbe(Runtime& runtime, const Config& config)
      : runtime_(runtime), kernels_(runtime.kernels()), options_(layer_options(config)) {
    layer_ = layer_shape(options_, runtime.options().threads_per_rank);
    activation_ = kernel_activation(options_.activation);
    // As many experts as a rank holds, so that weights are as cold as in a layer.
    const std::int64_t slots = std::max<std::int64_t>(
        1, (config.model.num_ffn_experts() + runtime.num_ranks() - 1) / runtime.num_ranks());
    const std::int64_t weight_bytes = layer_.hidden * layer_.pre_cols * 4;
    most_groups_ =
        std::clamp<std::int64_t>(kMostWeightBytes / std::max<std::int64_t>(1, weight_bytes), 1, slots);
  }

  // Every point is measured once a sweep and its median over sweeps is taken: what slows the machine for a second then
  // touches one sweep of several points, not all that is known of one shape.
  void gemms(MachineProfile& profile) {
    struct Curves {
      GemmShape shape;
      bool first;
      std::vector<Points> sweeps;
    };
    std::vector<Curves> wanted;
    for (const GemmKind kind : {GemmKind::kForward, GemmKind::kDgrad, GemmKind::kWgrad})
      for (const bool first : {true, false}) {
        const GemmShape shape = first ? layer_.gemm1(kind) : layer_.gemm2(kind);
        if (std::none_of(wanted.begin(), wanted.end(), [&](const Curves& c) { return c.shape == shape; }))
          wanted.push_back({shape, first, {}});
      }
    for (int sweep = 0; sweep < kSweeps; ++sweep)
      for (Curves& c : wanted) {
        say(runtime_, str(describe(c.shape), ", ", sweep + 1, " of ", kSweeps));
        c.sweeps.push_back(gemm_points(c.shape, c.first));
      }
    for (const Curves& c : wanted) profile.gemms.push_back({c.shape, fit_curve(median_of(c.sweeps))});
    profile.gemm_call_us = 0;  // part of the curves: they are of calls with several groups
  }

  void rows(MachineProfile& profile) {
    say(runtime_, "rows: pack, reduce, activation backward");
    const std::int64_t cols = layer_.hidden;
    const auto row = static_cast<double>(cols) * static_cast<double>(size_of(layer_.dtype));
    const std::int64_t most =
        std::max<std::int64_t>(4, static_cast<std::int64_t>(double(kLargestMessage) / row));
    // Each repeat takes the next rows, so that they are as cold as those of a layer.
    const Rows src(kColdTimes * most, cols, layer_.dtype);
    Rows dst(most, cols, layer_.dtype);
    std::vector<std::int32_t> index(static_cast<std::size_t>(kColdTimes * most));
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), std::mt19937_64(1));
    std::vector<Curve::Point> gather, reduce, backward;
    const std::int64_t act_cols = layer_.pre_cols + layer_.ffn;
    const std::int64_t act_rows = std::max<std::int64_t>(
        4, kColdTimes * kLargestMessage / (act_cols * static_cast<std::int64_t>(size_of(layer_.dtype))));
    Rows h(act_rows, layer_.pre_cols, layer_.dtype), u(act_rows, layer_.ffn, layer_.dtype);
    const std::vector<float> weight(static_cast<std::size_t>(std::max(most, act_rows)), 0.5f);
    std::vector<float> dw(static_cast<std::size_t>(act_rows));
    std::vector<std::int64_t> ptr(static_cast<std::size_t>(most) + 1);
    for (std::size_t i = 0; i < ptr.size(); ++i) ptr[i] = static_cast<std::int64_t>(2 * i);
    std::int64_t next = 0;
    const auto take = [&](std::int64_t n, std::int64_t of) {
      if (next + n > of) next = 0;
      return std::exchange(next, next + n);
    };
    for (std::int64_t n = 1; n <= most; n *= 4) {
      const auto some = [&] {
        return std::span<const std::int32_t>(index).subspan(
            static_cast<std::size_t>(take(n, static_cast<std::int64_t>(index.size()))),
            static_cast<std::size_t>(n));
      };
      const MatrixView out(dst.view.data, dst.view.dtype, n, cols, cols);
      gather.push_back({2 * static_cast<double>(n) * row,
                        timed(runtime_, [&] { kernels_.gather_rows(src.view, {}, some(), out); })});
      // Two rows to one.
      const std::int64_t sums = n / 2;
      if (sums > 0) {
        const MatrixView sum(dst.view.data, dst.view.dtype, sums, cols, cols);
        const std::span<const std::int64_t> some_ptr(ptr.data(), static_cast<std::size_t>(sums) + 1);
        reduce.push_back({static_cast<double>(n + sums) * row, timed(runtime_, [&] {
                            kernels_.weighted_reduce(src.view, some_ptr, some(), weight, sum);
                          })});
      }
    }
    for (std::int64_t n = 1; kColdTimes * n <= act_rows; n *= 4) {
      const double bytes = 2 * static_cast<double>(n * act_cols) * static_cast<double>(size_of(layer_.dtype));
      backward.push_back({bytes, timed(runtime_, [&] {
                            const std::int64_t begin = take(n, act_rows);
                            kernels_.activation_backward(activation_, h.view, u.view, weight, dw, h.view,
                                                         u.view, begin, begin + n);
                          })});
    }
    profile.gather = fit_curve(std::move(gather));
    profile.reduce = fit_curve(std::move(reduce));
    profile.activation_backward = fit_curve(std::move(backward));
  }

  // A fixed amount of arithmetic, about a millisecond, to see what transfers take from it.
  void work_a_while() {
    if (!busy_) {
      busy_.emplace(Busy{Rows(64, layer_.hidden, layer_.dtype),
                         Rows(layer_.pre_cols, layer_.hidden, layer_.dtype),
                         Rows(64, layer_.pre_cols, layer_.dtype)});
    }
    const std::int64_t ptr[2] = {0, 64};
    const std::byte* weights[1] = {busy_->w.view.data};
    kernels_.grouped_gemm_forward({ptr, weights}, busy_->a.view, {}, layer_.dtype, layer_.pre_cols,
                                  activation_, busy_->h.view, {});
  }

 private:
  struct Busy {
    Rows a, w, h;
  };

  Points gemm_points(const GemmShape& shape, bool first) {
    Points points;
    const std::int64_t in = shape.in_cols, out = shape.out_cols;
    std::vector<Rows> weights;
    for (std::int64_t g = 0; g < most_groups_ && shape.kind != GemmKind::kWgrad; ++g)
      weights.emplace_back(out, in, shape.dtype);
    std::vector<std::vector<float>> grads(
        shape.kind == GemmKind::kWgrad ? static_cast<std::size_t>(most_groups_) : 0,
        std::vector<float>(static_cast<std::size_t>(in * out)));
    for (std::int64_t rows = 1; rows <= kMostRows; rows *= 2) {
      const std::int64_t groups = std::clamp<std::int64_t>(kMostRows / rows, 1, most_groups_);
      const std::int64_t total = rows * groups;
      const Rows a(total, in, shape.dtype);
      Rows c(total, out, shape.dtype);
      Rows act(total, layer_.ffn, shape.dtype);
      std::vector<std::int64_t> ptr;
      for (std::int64_t g = 0; g <= groups; ++g) ptr.push_back(g * rows);
      std::vector<std::int32_t> index(static_cast<std::size_t>(total));
      std::iota(index.begin(), index.end(), 0);
      std::shuffle(index.begin(), index.end(), std::mt19937_64(2));
      std::vector<const std::byte*> w;
      std::vector<float*> g32;
      for (std::int64_t g = 0; g < groups; ++g) {
        if (shape.kind == GemmKind::kWgrad) {
          g32.push_back(grads[static_cast<std::size_t>(g)].data());
        } else {
          w.push_back(weights[static_cast<std::size_t>(g)].view.data);
        }
      }
      const kernels::Groups with{ptr, w};
      // The calls of moe_layer.cpp: what comes from peers is read through an index.
      const double us = timed(
          runtime_,
          [&] {
            switch (shape.kind) {
              case GemmKind::kForward:
                if (first) {
                  kernels_.grouped_gemm_forward(with, a.view, index, shape.dtype, out, activation_,
                                                options_.save == Save::kActivations ? c.view : MatrixView{},
                                                act.view);
                } else {
                  kernels_.grouped_gemm_forward(with, a.view, {}, shape.dtype, out, activation_, c.view, {});
                }
                break;
              case GemmKind::kDgrad: {
                Rows& da = scratch(total, in);
                kernels_.grouped_gemm_dgrad(with, c.view, first ? std::span<const std::int32_t>{} : index,
                                            shape.dtype, da.view);
                break;
              }
              case GemmKind::kWgrad:
                if (first) {
                  kernels_.grouped_gemm_wgrad(ptr, c.view, {}, a.view, index, g32);
                } else {
                  kernels_.grouped_gemm_wgrad(ptr, c.view, index, a.view, {}, g32);
                }
                break;
            }
          },
          3, kEnoughUs / kSweeps);
      points.push_back({static_cast<double>(rows), us / static_cast<double>(groups)});
    }
    return points;
  }

  Rows& scratch(std::int64_t rows, std::int64_t cols) {
    if (!scratch_ || scratch_->view.rows != rows || scratch_->view.cols != cols)
      scratch_.emplace(rows, cols, layer_.dtype);
    return *scratch_;
  }

  Runtime& runtime_;
  kernels::Kernels& kernels_;
  MoeLayerOptions options_;
  LayerShape layer_;
  kernels::Activation activation_ = kernels::Activation::kSwiGLU;
  std::int64_t most_groups_ = 1;
  std::optional<Rows> scratch_;
  std::optional<Busy> busy_;
};

// ---- links -----------------------------------------------------------------------------------------------------------

class LinkProbe {
 public:
  LinkProbe(Runtime& runtime, ComputeProbe& compute, RankId a, RankId b)
      : runtime_(runtime),
        transport_(runtime.transport()),
        compute_(compute),
        a_(a),
        b_(b),
        channel_(runtime.state().next_channel++),
        memory_(static_cast<std::size_t>(kLargestMessage)),
        source_(static_cast<std::size_t>(kLargestMessage)) {
    transport_.open_channel(channel_, 1, 1);
    transport_.set_window(channel_, 0, memory_);
  }
  ~LinkProbe() { transport_.set_window(channel_, 0, {}); }

  LinkProfile run() {
    LinkProfile out;
    std::vector<Curve::Point> send, occupied;
    std::vector<double> sizes = {0};
    for (std::int64_t n = kSmallestMessage; n <= kLargestMessage; n *= 4)
      sizes.push_back(static_cast<double>(n));
    if (sizes.back() < static_cast<double>(kLargestMessage))
      sizes.push_back(static_cast<double>(kLargestMessage));
    const comm::Perf perf = transport_.perf(me() == a_ ? b_ : a_);
    const bool emulated = from_rank(runtime_, a_, perf.emulated ? 1 : 0) > 0;
    const double bytes_per_us = from_rank(runtime_, a_, perf.bytes_per_s / 1e6);
    double latency = 0;
    for (const double n : sizes) {
      const auto bytes = static_cast<std::int64_t>(n);
      const auto [put_us, one_way_us] = ping_pong(bytes);
      double held = emulated && bytes_per_us > 0 ? n / bytes_per_us : 0;
      if (!emulated) {
        const double each = stream(bytes);
        // Where the sender's own work is as long as the stream's pace, the link is not what holds it.
        if (each > 1.2 * put_us) held = each;
      }
      if (n == 0) latency = std::max(0.0, one_way_us - put_us - held);
      send.push_back({n, put_us});
      occupied.push_back({n, held});
    }
    out.send = fit_curve(std::move(send));
    out.occupied = fit_curve(std::move(occupied));
    out.latency_us = latency;
    if (!from_rank(runtime_, a_, transport_.caps().needs_progress ? 1 : 0) &&
        out.occupied.points().back().us > 0)
      out.receive = interference(out);
    return out;
  }

 private:
  RankId me() const { return runtime_.rank(); }
  bool takes_part() const { return me() == a_ || me() == b_; }

  void expect(RankId from, std::int64_t bytes, int times) {
    expects_.assign(static_cast<std::size_t>(times), {});
    for (comm::Expect& e : expects_) {
      e.peer = from;
      e.channel = channel_;
      e.bytes = bytes;
    }
    transport_.expect(expects_);
    expected_ += static_cast<std::uint64_t>(times);
  }
  void put(RankId to, std::int64_t bytes) {
    comm::Put p;
    p.peer = to;
    p.channel = channel_;
    p.source = std::span<const std::byte>(source_).first(static_cast<std::size_t>(bytes));
    transport_.put(p);
    ++num_puts_;
  }
  void wait(std::uint64_t value) { transport_.wait({channel_, 0, value, "probe", -1}).throw_if_error(); }
  void wait_for_puts() { transport_.wait_for_puts(channel_, num_puts_).throw_if_error(); }

  // Time in put() and half a round trip.
  std::pair<double, double> ping_pong(std::int64_t bytes) {
    const int times = bytes >= (1 << 20) ? 9 : 41;
    const std::uint64_t before = expected_;
    if (takes_part()) expect(me() == a_ ? b_ : a_, bytes, times);
    runtime_.barrier("probe");
    Samples put_us, way_us;
    for (int i = 0; takes_part() && i < times; ++i) {
      const std::uint64_t next = before + static_cast<std::uint64_t>(i) + 1;
      if (me() == a_) {
        const auto begin = Clock::now();
        put(b_, bytes);
        put_us.push_back(us_since(begin));
        wait(next);
        way_us.push_back(us_since(begin) / 2);
      } else {
        wait(next);
        put(a_, bytes);
      }
      wait_for_puts();
    }
    return {from_rank(runtime_, a_, typical(put_us)), from_rank(runtime_, a_, typical(way_us))};
  }

  // A message's share of many that are sent at once.
  double stream(std::int64_t bytes) {
    const int count = bytes >= (1 << 20) ? 8 : 64;
    Samples us;
    for (int i = 0; i < kFewestRepeats; ++i) {
      if (me() == a_) expect(b_, 0, 1);
      if (me() == b_) expect(a_, bytes, count);
      runtime_.barrier("probe");
      if (me() == a_) {
        const auto begin = Clock::now();
        for (int k = 0; k < count; ++k) put(b_, bytes);
        wait(expected_);
        us.push_back(us_since(begin) / count);
      }
      if (me() == b_) {
        wait(expected_);
        put(a_, 0);
      }
      if (takes_part()) wait_for_puts();
    }
    return from_rank(runtime_, a_, typical(us));
  }

  // What landing a message takes from the processors of both ends while they compute, beside the time in put().
  Curve interference(const LinkProfile& link) {
    constexpr double kWorkUs = 20000;
    auto begin = Clock::now();
    for (int i = 0; i < 3; ++i) compute_.work_a_while();
    const double unit = from_rank(runtime_, a_, us_since(begin) / 3);
    const int units = std::clamp(static_cast<int>(kWorkUs / std::max(unit, 1.0)), 1, 1000000);
    std::vector<Curve::Point> points;
    for (const std::int64_t bytes :
         {std::int64_t{64} << 10, std::int64_t{512} << 10, std::int64_t{2} << 20}) {
      const double held = link.occupied(static_cast<double>(bytes));
      const int count = std::clamp(static_cast<int>(0.8 * kWorkUs / std::max(held, 1.0)), 1, 64);
      if (held * count > kWorkUs) continue;  // it would not be over before the work is
      Samples us;
      for (int i = 0; i < kFewestRepeats; ++i) {
        double quiet = 0, both = 0;
        for (const bool with : {false, true}) {
          if (me() == b_ && with) expect(a_, bytes, count);
          runtime_.barrier("probe");
          begin = Clock::now();
          if (takes_part()) {
            for (int k = 0; k < count && me() == a_ && with; ++k) put(b_, bytes);
            for (int k = 0; k < units; ++k) compute_.work_a_while();
          }
          const double mine = us_since(begin);
          if (takes_part()) wait_for_puts();
          if (me() == b_) wait(expected_);
          (with ? both : quiet) = from_rank(runtime_, a_, mine) + from_rank(runtime_, b_, mine);
        }
        us.push_back(std::max(0.0, (both - quiet) / count - link.send(static_cast<double>(bytes))));
      }
      points.push_back({static_cast<double>(bytes), typical(us)});
    }
    if (points.empty()) return {};
    points.push_back({0, 0});
    return fit_curve(std::move(points));
  }

  Runtime& runtime_;
  comm::Transport& transport_;
  ComputeProbe& compute_;
  RankId a_, b_;
  std::uint32_t channel_;
  std::vector<std::byte> memory_, source_;
  std::vector<comm::Expect> expects_;
  std::uint64_t expected_ = 0, num_puts_ = 0;
};

// ---- executor --------------------------------------------------------------------------------------------------------

// The cost of an op without work: a group of one rank, a batch without tokens, many chunks against one.
double op_cost_us() {
  RuntimeOptions runtime_options;
  runtime_options.progress = ProgressMode::kInline;
  auto group = Runtime::create_local(Topology::uniform(1, 1), runtime_options);
  Routing none;
  none.num_experts = 1;
  const std::vector<float> w(2 * 16 * 16), no_rows(16);
  double us[2] = {0, 0}, ops[2] = {0, 0};
  for (const int many : {0, 1}) {
    MoeLayerOptions options;
    options.hidden = options.ffn = 16;
    options.schedule = {SchedulePolicy::kPipelined, Exchange::kGateway, many ? 64 : 1};
    options.save = Save::kNone;
    MoeLayer layer(*group[0], contiguous_placement(1, 1), options);
    const auto matrix = [&](std::int64_t rows) {
      return ConstMatrixView(reinterpret_cast<const std::byte*>(w.data()), DType::kF32, rows, 16, 16);
    };
    const ExpertWeights weights[1] = {{matrix(32), matrix(16), nullptr, nullptr}};
    layer.set_weights(weights);
    const auto plan = layer.plan(none);
    std::vector<float> y(16);
    const ConstMatrixView x(reinterpret_cast<const std::byte*>(no_rows.data()), DType::kF32, 0, 16, 16);
    const MatrixView out(reinterpret_cast<std::byte*>(y.data()), DType::kF32, 0, 16, 16);
    Samples samples;
    for (int i = 0; i < 50; ++i) {
      const auto begin = Clock::now();
      { const Context context = layer.forward(plan, x, out); }
      samples.push_back(us_since(begin));
    }
    us[many] = typical(samples);
    ops[many] = static_cast<double>(layer.exchange_template().forward.ops.size());
  }
  return std::max(0.0, (us[1] - us[0]) / (ops[1] - ops[0]));
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[16];
  return {text, std::strftime(text, sizeof text, "%Y-%m-%d", &utc)};
}

}  // namespace

MachineProfile probe_machine(Runtime& runtime, const Config& config) {
  const Topology& topology = runtime.topology();
  MachineProfile out;
  out.measured = true;
  out.date = today();
  out.device = cpu_name();
  out.cores = static_cast<std::int32_t>(std::thread::hardware_concurrency());
  out.transport = std::string(runtime.transport().name());
  out.name = str(out.device, ", ", out.transport, ", ", out.date);
  out.source = str("measured on ", topology.describe(), topology.declared() ? " (declared)" : "");
  out.posting = runtime.state().executor->has_progress_thread() ? Posting::kThread : Posting::kCaller;
  out.link_model = LinkModel::kQueue;
  ComputeProbe compute(runtime, config);
  compute.gemms(out);
  compute.rows(out);
  out.op_us = mean_over_ranks(runtime, op_cost_us());
  for (const LinkClass c : {LinkClass::kInNode, LinkClass::kAcrossNodes}) {
    RankId peer;
    for (std::int32_t r = 1; r < runtime.num_ranks() && !peer.valid(); ++r)
      if (topology.same_node(RankId(0), RankId(r)) == (c == LinkClass::kInNode)) peer = RankId(r);
    if (!peer.valid()) continue;
    say(runtime, str("link ", to_string(c), ", ranks 0 and ", peer.value));
    LinkProbe probe(runtime, compute, RankId(0), peer);
    (c == LinkClass::kInNode ? out.in_node : out.across_nodes) = probe.run();
    runtime.barrier("probe");
    if (runtime.transport().perf(runtime.rank().value == 0 ? peer : RankId(0)).emulated)
      out.link_model = LinkModel::kCalendar;
  }
  if (runtime.rank().value == 0) out.validate();
  return out;
}

}  // namespace sluice
