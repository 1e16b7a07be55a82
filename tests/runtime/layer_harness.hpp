// A plain dense reference of the MoE layer (one process, no plan, double precision or exact), and a group of ranks as
// threads to hold against it.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "sluice/base/dtype.hpp"
#include "sluice/moe_layer.hpp"
#include "sluice/runtime.hpp"

namespace sluice::testing {

struct Shape {
  std::int32_t num_experts = 8;
  std::int64_t hidden = 16;
  std::int64_t ffn = 24;
  ExpertActivation activation = ExpertActivation::kSwiGLU;
  std::int64_t pre_cols() const { return activation == ExpertActivation::kSwiGLU ? 2 * ffn : ffn; }
};

// One batch of the whole group in global token order, and the weights of all experts. Values are representable in
// bf16, so that both dtypes see the same inputs.
struct Problem {
  Shape shape;
  std::vector<ExpertKind> kinds;           // [num_experts]
  std::vector<std::vector<float>> w1, w2;  // per expert
  Routing routing;                         // all tokens
  std::vector<float> x, dy;                // [num_tokens, hidden]
  std::int64_t num_tokens() const { return routing.num_tokens(); }
};

struct Result {
  std::vector<float> y, dx;                          // [num_tokens, hidden]
  std::vector<float> dw;                             // [num_routes]
  std::vector<std::vector<float>> grad_w1, grad_w2;  // per expert
};

inline float representable(float v) {
  return static_cast<float>(bf16(v));
}

inline Problem random_problem(std::mt19937_64& rng, const Shape& shape, std::int64_t num_tokens,
                              std::int32_t min_routes, std::int32_t max_routes, double skew = 0,
                              std::int32_t zero = 0, std::int32_t copy = 0) {
  Problem p;
  p.shape = shape;
  p.kinds.assign(static_cast<std::size_t>(shape.num_experts), ExpertKind::kFFN);
  for (std::int32_t i = 0; i < zero + copy; ++i)
    p.kinds[static_cast<std::size_t>(shape.num_experts - 1 - i)] =
        i < zero ? ExpertKind::kZero : ExpertKind::kCopy;
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<float>& v, std::size_t n, float scale) {
    v.resize(n);
    for (float& e : v) e = representable(scale * normal(rng));
  };
  const auto h = static_cast<std::size_t>(shape.hidden), f = static_cast<std::size_t>(shape.ffn);
  for (std::int32_t e = 0; e < shape.num_experts; ++e) {
    p.w1.emplace_back();
    p.w2.emplace_back();
    fill(p.w1.back(), static_cast<std::size_t>(shape.pre_cols()) * h, 1.0f / std::sqrt(float(h)));
    fill(p.w2.back(), h * f, 1.0f / std::sqrt(float(f)));
  }
  fill(p.x, static_cast<std::size_t>(num_tokens) * h, 1);
  fill(p.dy, static_cast<std::size_t>(num_tokens) * h, 1);
  p.routing.num_experts = shape.num_experts;
  std::vector<double> popularity(static_cast<std::size_t>(shape.num_experts));
  for (std::size_t e = 0; e < popularity.size(); ++e) popularity[e] = 1.0 / std::pow(double(e) + 1, skew);
  std::uniform_int_distribution<std::int32_t> routes(min_routes, max_routes);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    std::vector<std::pair<double, std::int32_t>> keys;
    for (std::int32_t e = 0; e < shape.num_experts; ++e)
      keys.push_back({-std::log(1 - uniform(rng)) / popularity[static_cast<std::size_t>(e)], e});
    std::sort(keys.begin(), keys.end());
    std::vector<std::int32_t> chosen;
    for (std::int32_t i = 0, k = routes(rng); i < k; ++i)
      chosen.push_back(keys[static_cast<std::size_t>(i)].second);
    std::sort(chosen.begin(), chosen.end());
    for (const std::int32_t e : chosen) {
      p.routing.expert.push_back(e);
      p.routing.weight.push_back(representable(static_cast<float>(uniform(rng))));
    }
    p.routing.row_ptr.push_back(static_cast<std::int64_t>(p.routing.expert.size()));
  }
  return p;
}

// The definition, in double: forward and backward of every route, added up.
inline Result dense_reference(const Problem& p) {
  const auto h = static_cast<std::size_t>(p.shape.hidden), f = static_cast<std::size_t>(p.shape.ffn);
  const auto pre = static_cast<std::size_t>(p.shape.pre_cols());
  const auto tokens = static_cast<std::size_t>(p.num_tokens());
  std::vector<double> y(tokens * h, 0), dx(tokens * h, 0);
  std::vector<std::vector<double>> g1(p.w1.size()), g2(p.w2.size());
  Result out;
  out.dw.assign(p.routing.expert.size(), 0);
  for (std::size_t e = 0; e < p.w1.size(); ++e) {
    g1[e].assign(pre * h, 0);
    g2[e].assign(h * f, 0);
  }
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  for (std::size_t t = 0; t < tokens; ++t) {
    const float* x = &p.x[t * h];
    const float* dy = &p.dy[t * h];
    for (auto q = static_cast<std::size_t>(p.routing.row_ptr[t]);
         q < static_cast<std::size_t>(p.routing.row_ptr[t + 1]); ++q) {
      const auto e = static_cast<std::size_t>(p.routing.expert[q]);
      const double w = p.routing.weight[q];
      if (p.kinds[e] == ExpertKind::kZero) continue;
      if (p.kinds[e] == ExpertKind::kCopy) {
        double dot = 0;
        for (std::size_t i = 0; i < h; ++i) {
          y[t * h + i] += w * x[i];
          dx[t * h + i] += w * dy[i];
          dot += double(dy[i]) * x[i];
        }
        out.dw[q] = static_cast<float>(dot);
        continue;
      }
      std::vector<double> z(pre, 0), a(f), da_dz(pre), u(f, 0);
      for (std::size_t o = 0; o < pre; ++o)
        for (std::size_t i = 0; i < h; ++i) z[o] += double(p.w1[e][o * h + i]) * x[i];
      for (std::size_t i = 0; i < f; ++i) {
        switch (p.shape.activation) {
          case ExpertActivation::kSwiGLU: {
            const double s = sigmoid(z[i]);
            a[i] = z[i] * s * z[f + i];
            da_dz[i] = (s + z[i] * s * (1 - s)) * z[f + i];
            da_dz[f + i] = z[i] * s;
            break;
          }
          case ExpertActivation::kGelu: {
            const double c = std::sqrt(2 / 3.14159265358979323846);
            const double inner = c * (z[i] + 0.044715 * z[i] * z[i] * z[i]), th = std::tanh(inner);
            a[i] = 0.5 * z[i] * (1 + th);
            da_dz[i] = 0.5 * (1 + th) + 0.5 * z[i] * (1 - th * th) * c * (1 + 3 * 0.044715 * z[i] * z[i]);
            break;
          }
          case ExpertActivation::kRelu:
            a[i] = z[i] > 0 ? z[i] : 0;
            da_dz[i] = z[i] > 0 ? 1 : 0;
            break;
        }
      }
      double dw = 0;
      for (std::size_t o = 0; o < h; ++o) {
        double value = 0;
        for (std::size_t i = 0; i < f; ++i) {
          value += double(p.w2[e][o * f + i]) * a[i];
          u[i] += double(p.w2[e][o * f + i]) * dy[o];
          g2[e][o * f + i] += dy[o] * w * a[i];
        }
        y[t * h + o] += w * value;
      }
      for (std::size_t i = 0; i < f; ++i) dw += u[i] * a[i];
      out.dw[q] = static_cast<float>(dw);
      for (std::size_t o = 0; o < pre; ++o) {
        const double dz = da_dz[o] * w * u[o % f];
        for (std::size_t i = 0; i < h; ++i) {
          g1[e][o * h + i] += dz * x[i];
          dx[t * h + i] += dz * p.w1[e][o * h + i];
        }
      }
    }
  }
  out.y.assign(y.begin(), y.end());
  out.dx.assign(dx.begin(), dx.end());
  for (std::size_t e = 0; e < g1.size(); ++e) {
    out.grad_w1.emplace_back(g1[e].begin(), g1[e].end());
    out.grad_w2.emplace_back(g2[e].begin(), g2[e].end());
  }
  return out;
}

// Runs `body` as every rank of a local group; the first exception of any rank is thrown on.
inline void run_ranks(std::vector<std::unique_ptr<Runtime>>& group,
                      const std::function<void(Runtime&)>& body) {
  std::vector<std::exception_ptr> errors(group.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < group.size(); ++r)
    threads.emplace_back([&, r] {
      try {
        body(*group[r]);
      } catch (...) {
        errors[r] = std::current_exception();
        group[r]->abort("test", current_exception_status().message);
      }
    });
  for (auto& t : threads) t.join();
  // A rank that was aborted by another tells less than the one that failed first.
  std::exception_ptr first;
  for (auto& e : errors) {
    if (!e) continue;
    if (!first) first = e;
    try {
      std::rethrow_exception(e);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kAborted) first = e;
    } catch (...) {
      first = e;
    }
  }
  if (first) std::rethrow_exception(first);
}

// The tokens of a problem dealt to ranks: token_begin[r] .. token_begin[r + 1] - 1.
inline std::vector<std::int64_t> deal_tokens(std::int64_t num_tokens, std::int32_t num_ranks,
                                             bool even = true) {
  std::vector<std::int64_t> begin(static_cast<std::size_t>(num_ranks) + 1, 0);
  for (std::int32_t r = 0; r <= num_ranks; ++r)
    begin[static_cast<std::size_t>(r)] =
        even ? num_tokens * r / num_ranks : num_tokens * r * r / (num_ranks * num_ranks);
  return begin;
}

inline Routing routing_slice(const Routing& all, std::int64_t begin, std::int64_t end) {
  Routing out;
  out.num_experts = all.num_experts;
  const std::int64_t q0 = all.row_ptr[static_cast<std::size_t>(begin)];
  for (std::int64_t t = begin; t < end; ++t)
    out.row_ptr.push_back(all.row_ptr[static_cast<std::size_t>(t) + 1] - q0);
  out.expert.assign(all.expert.begin() + q0, all.expert.begin() + all.row_ptr[static_cast<std::size_t>(end)]);
  out.weight.assign(all.weight.begin() + q0, all.weight.begin() + all.row_ptr[static_cast<std::size_t>(end)]);
  return out;
}

inline std::vector<std::byte> to_dtype(std::span<const float> values, DType dtype) {
  std::vector<std::byte> out(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i)
    if (dtype == DType::kF32)
      reinterpret_cast<float*>(out.data())[i] = values[i];
    else
      reinterpret_cast<bf16*>(out.data())[i] = bf16(values[i]);
  return out;
}
inline void from_dtype(std::span<const std::byte> bytes, DType dtype, float* out) {
  for (std::size_t i = 0; i < bytes.size() / size_of(dtype); ++i)
    out[i] = dtype == DType::kF32 ? reinterpret_cast<const float*>(bytes.data())[i]
                                  : static_cast<float>(reinterpret_cast<const bf16*>(bytes.data())[i]);
}

struct LayerSetup {
  Topology topology = Topology::uniform(1, 1);
  Placement placement;
  ScheduleOptions schedule;
  DType dtype = DType::kF32;
  DType wire_dtype = DType::kF32;
  DType combine_dtype = DType::kF32;
  Save save = Save::kActivations;
  int threads = 1;
  ProgressMode progress = ProgressMode::kAuto;
  std::shared_ptr<const MachineProfile> auto_profile;
  bool even_tokens = true;
  ComputeDevice device = ComputeDevice::kCpu;
};

// What one rank does in run_layer; shared by the tests of other transports.
inline void run_layer_rank(Runtime& runtime, const Problem& p, const LayerSetup& setup, Result& out) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto h = p.shape.hidden;
  MoeLayerOptions options;
  options.hidden = h;
  options.ffn = p.shape.ffn;
  options.activation = p.shape.activation;
  options.dtype = setup.dtype;
  options.wire_dtype = setup.wire_dtype;
  options.combine_dtype = setup.combine_dtype;
  options.schedule = setup.schedule;
  options.auto_profile = setup.auto_profile;
  options.save = setup.save;
  MoeLayer layer(runtime, setup.placement, options);
  const auto experts = setup.placement.experts_of(runtime.rank());
  std::vector<std::vector<std::byte>> w1, w2;
  std::vector<std::vector<float>> g1, g2;
  for (const std::int32_t e : experts) {
    w1.push_back(to_dtype(p.w1[static_cast<std::size_t>(e)], setup.dtype));
    w2.push_back(to_dtype(p.w2[static_cast<std::size_t>(e)], setup.dtype));
    g1.emplace_back(p.w1[static_cast<std::size_t>(e)].size(), 0.0f);
    g2.emplace_back(p.w2[static_cast<std::size_t>(e)].size(), 0.0f);
  }
  std::vector<ExpertWeights> weights;
  for (std::size_t i = 0; i < experts.size(); ++i)
    weights.push_back({ConstMatrixView(w1[i].data(), setup.dtype, p.shape.pre_cols(), h, h),
                       ConstMatrixView(w2[i].data(), setup.dtype, h, p.shape.ffn, p.shape.ffn), g1[i].data(),
                       g2[i].data()});
  layer.set_weights(weights);

  const auto begin = deal_tokens(p.num_tokens(), runtime.num_ranks(), setup.even_tokens);
  const std::int64_t t0 = begin[runtime.rank().index()], t1 = begin[runtime.rank().index() + 1], n = t1 - t0;
  const Routing routing = routing_slice(p.routing, t0, t1);
  const auto slice = [&](const std::vector<float>& v) {
    return to_dtype(
        std::span<const float>(v).subspan(static_cast<std::size_t>(t0 * h), static_cast<std::size_t>(n * h)),
        setup.dtype);
  };
  const auto x = slice(p.x), dy = slice(p.dy);
  const std::vector<float> poison(static_cast<std::size_t>(n * h), nan);
  auto y = to_dtype(poison, setup.dtype), dx = to_dtype(poison, setup.dtype);
  std::vector<float> dw(routing.expert.size(), nan);
  const auto view = [&](auto& bytes) { return MatrixView(bytes.data(), setup.dtype, n, h, h); };
  const auto const_view = [&](auto& bytes) { return ConstMatrixView(bytes.data(), setup.dtype, n, h, h); };

  const auto plan = layer.plan(routing);
  Context context = layer.forward(plan, const_view(x), view(y));
  if (setup.save != Save::kNone) {
    layer.backward(context, const_view(dy), view(dx), dw);
    layer.sync_replica_gradients();
  }
  from_dtype(y, setup.dtype, out.y.data() + t0 * h);
  from_dtype(dx, setup.dtype, out.dx.data() + t0 * h);
  const std::int64_t q0 = p.routing.row_ptr[static_cast<std::size_t>(t0)];
  std::copy(dw.begin(), dw.end(), out.dw.begin() + q0);
  for (std::size_t i = 0; i < experts.size(); ++i) {
    const auto e = static_cast<std::size_t>(experts[i]);
    // Every copy of a replicated expert holds the same sum; the lowest rank's is reported, the others are compared.
    if (setup.placement
            .slot_rank[static_cast<std::size_t>(setup.placement.slots_of(ExpertId(experts[i]))[0])] ==
        runtime.rank().value) {
      out.grad_w1[e] = g1[i];
      out.grad_w2[e] = g2[i];
    }
  }
}

inline Result empty_result(const Problem& p) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Result out;
  out.y.assign(p.x.size(), nan);
  out.dx.assign(p.x.size(), nan);
  out.dw.assign(p.routing.expert.size(), nan);
  for (std::size_t e = 0; e < p.w1.size(); ++e) {
    const bool ffn = p.kinds[e] == ExpertKind::kFFN;
    out.grad_w1.emplace_back(p.w1[e].size(), ffn ? nan : 0.0f);
    out.grad_w2.emplace_back(p.w2[e].size(), ffn ? nan : 0.0f);
  }
  return out;
}

// The layer, forward and backward, over a local group.
inline Result run_layer(const Problem& p, const LayerSetup& setup) {
  Result out = empty_result(p);
  RuntimeOptions options;
  options.timeout = std::chrono::seconds(20);
  options.threads_per_rank = setup.threads;
  options.progress = setup.progress;
  options.device = setup.device;
  auto group = Runtime::create_local(setup.topology, options);
  run_ranks(group, [&](Runtime& runtime) { run_layer_rank(runtime, p, setup, out); });
  return out;
}

// Largest |got - want| relative to the largest |want| of the array; NaN counts as infinite.
inline double relative_error(std::span<const float> got, std::span<const float> want) {
  double scale = 0, worst = 0;
  for (const float w : want) scale = std::max(scale, std::abs(double(w)));
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double d = std::abs(double(got[i]) - double(want[i]));
    if (!(d <= 1e300)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, d);
  }
  return scale == 0 ? worst : worst / scale;
}

inline void expect_close(const Result& got, const Result& want, double tolerance) {
  EXPECT_LE(relative_error(got.y, want.y), tolerance) << "y";
  EXPECT_LE(relative_error(got.dx, want.dx), tolerance) << "dx";
  EXPECT_LE(relative_error(got.dw, want.dw), tolerance) << "dw";
  for (std::size_t e = 0; e < want.grad_w1.size(); ++e) {
    EXPECT_LE(relative_error(got.grad_w1[e], want.grad_w1[e]), tolerance) << "grad_w1 of expert " << e;
    EXPECT_LE(relative_error(got.grad_w2[e], want.grad_w2[e]), tolerance) << "grad_w2 of expert " << e;
  }
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}
inline void expect_same_bits(const Result& got, const Result& want) {
  EXPECT_TRUE(same_bits(got.y, want.y)) << "y";
  EXPECT_TRUE(same_bits(got.dx, want.dx)) << "dx";
  EXPECT_TRUE(same_bits(got.dw, want.dw)) << "dw";
  for (std::size_t e = 0; e < want.grad_w1.size(); ++e) {
    EXPECT_TRUE(same_bits(got.grad_w1[e], want.grad_w1[e])) << "grad_w1 of expert " << e;
    EXPECT_TRUE(same_bits(got.grad_w2[e], want.grad_w2[e])) << "grad_w2 of expert " << e;
  }
}

}  // namespace sluice::testing
