#include "sluice/runtime/src/cuda/cuda_bench.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <tuple>

#include "sluice/base/hash.hpp"
#include "sluice/runtime/src/bench/dense_gemms.hpp"
#include "sluice/runtime/src/bench/draw_routing.hpp"
#include "sluice/runtime/src/compute_device.hpp"
#include "sluice/runtime/src/cuda/cuda_group.hpp"
#include "sluice/runtime/src/gather.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/runtime_state.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice {
namespace {

using comm::cuda::check_cuda;
using kernels::Activation;

constexpr std::string_view kPhase = "bench";
// Of |difference| / |reference|. bf16 rounds by up to 2^-9; a row passes the inner row, the expert's output, the rank's sum
// and the sum at home, and the GPU sums in another order: a few times that, and an error of the code is not small.
constexpr double kTolerance = 0.02;
constexpr std::int64_t kColumns = 8;  // inner columns whose weights' gradients are checked
// Weights that are drawn again for the check, by which it is kept short.
constexpr std::int64_t kMostValues = std::int64_t{1} << 30;
constexpr std::int64_t kMostTokens = 16;
constexpr std::size_t kFlushBytes = std::size_t{256} << 20;  // more than any cache, and time to queue a pass

std::size_t n(std::int64_t v) {
  return static_cast<std::size_t>(v);
}

// bf16 values in -scale .. scale: a function of the key and the place, so that any rank can draw any part. first: a
// multiple of 4
void draw(std::uint64_t key, std::int64_t first, float scale, std::span<bf16> out) {
  for (std::size_t i = 0; i < out.size(); i += 4) {
    std::uint64_t bits = Hasher().add(key).add_int(first / 4 + static_cast<std::int64_t>(i / 4)).value();
    for (std::size_t j = i; j < std::min(i + 4, out.size()); ++j, bits >>= 16)
      out[j] = bf16(scale * static_cast<float>(static_cast<std::int16_t>(bits & 0xffff)) * (1.0f / 32768.0f));
  }
}

struct Shape {
  std::int64_t hidden, ffn, pre;
  Activation activation;
  std::int64_t seed;

  std::uint64_t key(std::string_view what, std::int64_t of) const {
    return Hasher().add_int(seed).add_text(what).add_int(of).value();
  }
  std::uint64_t x_key(std::int32_t rank) const { return key("x", rank); }
  std::uint64_t dy_key(std::int32_t rank) const { return key("dy", rank); }
  float w1_scale() const { return 1 / std::sqrt(static_cast<float>(hidden)); }
  float w2_scale() const { return 1 / std::sqrt(static_cast<float>(ffn)); }
};

template <typename T>
MatrixView view(std::vector<T>& v, std::int64_t rows, std::int64_t cols) {
  return {v.data(), rows, cols};
}

// One expert, or some columns of its inner rows, on some rows, by the CPU's kernels: what MoeLayer's host work calls.
struct ReferenceExpert {
  std::int64_t hidden, ffn, pre;
  Activation activation;
  std::vector<bf16> w1, w2;
  std::vector<bf16> x, dy;  // [rows, hidden]
  std::vector<float> weight;
  std::vector<bf16> out, dx;  // [rows, hidden]
  std::vector<float> dweight;
  std::vector<float> grad_w1, grad_w2;

  ReferenceExpert(Activation a, std::int64_t hidden_, std::int64_t ffn_)
      : hidden(hidden_),
        ffn(ffn_),
        pre(kernels::preactivation_cols(a, ffn_)),
        activation(a),
        w1(n(pre * hidden)),
        w2(n(hidden * ffn)) {}

  void add_row(const Shape& shape, std::int32_t rank, std::int64_t token, float w) {
    x.resize(x.size() + n(hidden));
    dy.resize(x.size());
    draw(shape.x_key(rank), token * hidden, 1, std::span(x).last(n(hidden)));
    draw(shape.dy_key(rank), token * hidden, 1, std::span(dy).last(n(hidden)));
    weight.push_back(w);
  }

  void run(kernels::Kernels& kernels, bool gradients) {
    const auto rows = static_cast<std::int64_t>(weight.size());
    const std::int64_t group_ptr[2] = {0, rows};
    const std::byte* base1[1] = {reinterpret_cast<const std::byte*>(w1.data())};
    const std::byte* base2[1] = {reinterpret_cast<const std::byte*>(w2.data())};
    std::vector<bf16> h(n(rows * pre)), act(n(rows * ffn));
    out.resize(n(rows * hidden));
    dx.resize(out.size());
    dweight.resize(n(rows));
    const MatrixView vx = view(x, rows, hidden), vdy = view(dy, rows, hidden), vh = view(h, rows, pre),
                     va = view(act, rows, ffn);
    kernels.grouped_gemm_forward({group_ptr, base1}, vx, {}, DType::kBF16, pre, activation, vh, va);
    kernels.grouped_gemm_forward({group_ptr, base2}, va, {}, DType::kBF16, hidden, activation,
                                 view(out, rows, hidden), {});
    kernels.grouped_gemm_dgrad({group_ptr, base2}, vdy, {}, DType::kBF16, va);
    kernels.activation_backward(activation, vh, va, weight, dweight, vh, va, 0, rows);
    kernels.grouped_gemm_dgrad({group_ptr, base1}, vh, {}, DType::kBF16, view(dx, rows, hidden));
    if (!gradients) return;
    grad_w1.assign(w1.size(), 0);
    grad_w2.assign(w2.size(), 0);
    float* g1[1] = {grad_w1.data()};
    float* g2[1] = {grad_w2.data()};
    kernels.grouped_gemm_wgrad(group_ptr, vdy, {}, va, {}, g2);
    kernels.grouped_gemm_wgrad(group_ptr, vh, {}, vx, {}, g1);
  }
};

// |got - want| / |want|. A NaN stays one.
class NormError {
 public:
  void add(double want, double got) {
    difference_ += (got - want) * (got - want);
    size_ += want * want;
  }
  double value() const { return difference_ == 0 ? 0 : std::sqrt(difference_ / std::max(size_, 1e-60)); }

 private:
  double difference_ = 0, size_ = 0;
};

// The larger one; a NaN stays one.
void raise(double& largest, double value) {
  if (!(value <= largest)) largest = value;
}

// Device memory of the bench.
template <typename T>
class OnDevice {
 public:
  OnDevice(kernels::Device& device, std::int64_t count) : memory_(device), count_(count) {
    memory_.at_least(std::max<std::int64_t>(count, 1) * static_cast<std::int64_t>(sizeof(T)));
  }
  T* get() const { return memory_.as<T>(); }
  std::size_t bytes() const { return n(count_) * sizeof(T); }
  std::int64_t capacity_bytes() const { return memory_.capacity_bytes(); }

 private:
  DeviceMemory memory_;
  std::int64_t count_;
};

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check_cuda(cudaEventCreate(&event), "bench"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

// Rows that cross from rank to rank in a forward, by level.
struct Rows {
  std::int64_t same_rank = 0, in_node = 0, across_nodes = 0, flat_in_node = 0, flat_across_nodes = 0;
};

Rows rows_of(const GpuRouting& routing, const GpuPlacement& placement, const Topology& topology, RankId rank,
             bool two_hops) {
  Rows out;
  std::vector<std::int32_t> to;
  std::vector<NodeId> nodes;
  for (std::int64_t t = 0; t < routing.num_tokens(); ++t) {
    to.clear();
    nodes.clear();
    for (auto i = n(routing.row_ptr[n(t)]); i < n(routing.row_ptr[n(t + 1)]); ++i) {
      const RankId peer(placement.rank_of[n(routing.expert[i])]);
      const bool first = std::find(to.begin(), to.end(), peer.value) == to.end();
      if (first) to.push_back(peer.value);
      if (peer == rank) {
        out.same_rank += first;
      } else if (topology.same_node(rank, peer)) {
        out.in_node += first;
        ++out.flat_in_node;
      } else {
        const NodeId node = topology.node_of(peer);
        if (!two_hops) {
          out.across_nodes += first;
        } else {
          if (std::find(nodes.begin(), nodes.end(), node) == nodes.end()) {
            nodes.push_back(node);
            ++out.across_nodes;
          }
          out.in_node += first && topology.gateway(rank, node) != peer;
        }
        ++out.flat_across_nodes;
      }
    }
  }
  return out;
}

// The layer of one bench on one rank.
class Bench {
 public:
  Bench(CudaGroup& group, const Config& config, GpuPlacement placement, const GpuWay& way)
      : group_(group),
        runtime_(group.runtime()),
        device_(group.compute_device()),
        config_(config),
        options_(layer_options(config)),
        placement_(std::move(placement)),
        rank_(runtime_.rank()),
        shape_{options_.hidden, options_.ffn, preactivation_cols(options_),
               kernel_activation(options_.activation), config.bench.seed},
        routing_(draw_of(rank_.value)),
        tokens_(routing_.num_tokens()),
        routes_(static_cast<std::int64_t>(routing_.expert.size())),
        num_local_(std::count(placement_.rank_of.begin(), placement_.rank_of.end(), rank_.value)),
        w1_(device_, num_local_ * shape_.pre * shape_.hidden),
        w2_(device_, num_local_ * shape_.hidden * shape_.ffn),
        x_(device_, tokens_ * shape_.hidden),
        dy_(device_, tokens_ * shape_.hidden),
        y_(device_, tokens_ * shape_.hidden),
        dx_(device_, tokens_ * shape_.hidden),
        g1_(device_, num_local_ * shape_.pre * shape_.hidden),
        g2_(device_, num_local_ * shape_.hidden * shape_.ffn),
        dweight_(device_, routes_),
        row_ptr_(device_, tokens_ + 1),
        expert_(device_, routes_),
        weight_(device_, routes_),
        flush_(device_, static_cast<std::int64_t>(kFlushBytes)),
        meet_(device_, runtime_.num_ranks() + 1) {
    for (std::size_t e = 0; e < placement_.rank_of.size(); ++e)
      if (placement_.rank_of[e] == rank_.value) local_.push_back(static_cast<std::int32_t>(e));
    const GpuRowsOptions rows{.hidden = shape_.hidden,
                              .ffn = shape_.ffn,
                              .activation = shape_.activation,
                              .training = true,
                              .way = way};
    const CudaGroup::Needs whole = group_.needs_of(routing_, placement_, way.two_hops, 1);
    one_hop_ = group_.make_one_hop(placement_, rows, whole);
    if (way.two_hops) {
      const int chunks = group_.two_hop_chunks_of(placement_, rows, whole);
      const CudaGroup::Needs of_chunk = group_.needs_of(routing_, placement_, true, chunks);
      two_hops_ = group_.make_two_hops(placement_, rows, of_chunk, chunks);
    }
    upload();
  }

  // A pass: the scheduled layer, or the one it is measured beside, which has one hop.
  struct Pass {
    GroupLayer& layer;
    GpuLayerOptions options;
  };
  Pass scheduled(const GpuLayerOptions& options) { return {layer(), options}; }
  Pass sequential() {
    GpuLayerOptions options;
    options.schedule = GpuSchedule::kSequential;
    return {*one_hop_, options};
  }

  // Results of both schedules, compared with each other and with the CPU's kernels on a sample.
  void check(const Pass& scheduled, const Pass& sequential, GpuFigures& out) {
    Status status;
    std::vector<bf16> y, dx, other_y, other_dx;
    std::vector<float> dweight(n(routes_));
    group_.in_pass(kPhase, [&] {
      plan(*one_hop_);
      if (two_hops_) plan(*two_hops_);
    });
    results(sequential, other_y, other_dx);
    // Gradients of weights are added to: from zero, for one backward.
    zero(g1_);
    zero(g2_);
    results(scheduled, y, dx);
    download(dweight.data(), dweight_.get(), dweight.size() * 4);
    check_cuda(cudaStreamSynchronize(stream()), "bench");
    try {
      // Two hops round once more a node, where a node's ranks are added up before their sum travels.
      if (two_hops_ && runtime_.topology().num_nodes() < runtime_.num_ranks())
        require_near(y, other_y, dx, other_dx);
      else
        Require(same(y, other_y) && same(dx, other_dx), ErrorCode::kInternal,
                "the schedules gave different bits on rank ", rank_.value);
      const auto finite = [&](const std::vector<bf16>& rows, std::string_view what) {
        for (std::size_t i = 0; i < rows.size(); ++i)
          Require(std::isfinite(static_cast<float>(rows[i])), ErrorCode::kInternal, what, " of token ",
                  static_cast<std::int64_t>(i) / shape_.hidden, " of rank ", rank_.value, " is no number");
      };
      finite(y, "y");
      finite(dx, "dx");
      compare_tokens(y, dx, dweight, out);
      compare_gradients(out);
      for (const auto& [error, what] : {std::pair{out.y_error, "y"},
                                        {out.dx_error, "dx"},
                                        {out.dweight_error, "the gradients of the gate weights"},
                                        {out.gradient_error, "the gradients of the experts' weights"}})
        Require(error <= kTolerance, ErrorCode::kInternal, what, " of rank ", rank_.value,
                " differ from what the CPU computes by ", error, " of their norm; at most ", kTolerance,
                " is rounding");
    } catch (const Error& e) {
      status = e.status();
    }
    agree_on_success(runtime_, status, kPhase);
    out.tolerance = kTolerance;
    for (double* error : {&out.y_error, &out.dx_error, &out.dweight_error, &out.gradient_error}) {
      const auto bits = std::bit_cast<std::int64_t>(*error);
      for (const std::int64_t other : runtime_.all_gather(std::span(&bits, 1), kPhase))
        raise(*error, std::bit_cast<double>(other));
    }
    out.y_bits = hash_of_ranks(y);
    out.dx_bits = hash_of_ranks(dx);
  }

  // The time of `call` on this rank's GPU, from when all ranks have met on theirs.
  template <typename Call>
  double time_us(GroupLayer& layer, Call&& call) {
    runtime_.barrier(kPhase);
    group_.in_pass(kPhase, [&] {
      check_cuda(cudaMemsetAsync(flush_.get(), 0, kFlushBytes, stream()), "bench");
      if (group_.communicator() == nullptr)
        one_hop_->exchange.barrier(stream());
      else
        group_.communicator()->all_gather(meet_.get(), meet_.get() + 1, 4, stream());
      check_cuda(cudaEventRecord(begin_.event, stream()), "bench");
      call();
      check_cuda(cudaEventRecord(end_.event, stream()), "bench");
      layer.wait(stream());
    });
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin_.event, end_.event), "bench");
    return static_cast<double>(ms) * 1e3;
  }

  GroupLayer& layer() { return two_hops_ ? *two_hops_ : *one_hop_; }  // the scheduled one
  OneHopLayer& one_hop() { return *one_hop_; }
  void plan(GroupLayer& layer) {
    layer.plan({row_ptr_.get(), expert_.get(), weight_.get()}, tokens_, stream());
  }
  void forward(const Pass& p) { p.layer.forward(experts(), x_.get(), y_.get(), p.options, stream()); }
  void backward(const Pass& p) {
    p.layer.backward(experts(), {g1_.get(), g2_.get()}, dy_.get(), dx_.get(), dweight_.get(), p.options,
                     stream());
  }
  // Of the layer of one hop.
  void exchange_only(const GpuLayerOptions& o) {
    one_hop_->layer.exchange_only(x_.get(), y_.get(), o, stream());
  }
  void gemms_only(const GpuLayerOptions& o) { one_hop_->layer.gemms_only(experts(), x_.get(), o, stream()); }
  void local_only(const GpuLayerOptions& o) {
    one_hop_->layer.local_only(experts(), x_.get(), y_.get(), o, stream());
  }

  // GEMMs of this rank's rows as one group; null without rows.
  std::unique_ptr<DenseGemms> dense_gemms() {
    const std::int64_t rows = one_hop_->exchange.host_counts(0, stream()).receive_routes;
    if (rows == 0) return nullptr;
    std::vector<bf16> a(n(rows * shape_.hidden)), w1(n(shape_.pre * shape_.hidden)),
        w2(n(shape_.hidden * shape_.ffn));
    draw(shape_.key("dense", rank_.value), 0, 1, a);
    draw_expert(local_.front(), w1, w2);
    return std::make_unique<DenseGemms>(device_, options_, rows, std::as_bytes(std::span(a)),
                                        std::as_bytes(std::span(w1)), std::as_bytes(std::span(w2)));
  }

  std::int64_t num_tokens() const { return tokens_; }
  Rows rows() const {
    return rows_of(routing_, placement_, runtime_.topology(), rank_, two_hops_ != nullptr);
  }
  std::int64_t memory_bytes() {
    auto bytes = static_cast<std::int64_t>(layer().memory_bytes());
    for (const std::int64_t part :
         {w1_.capacity_bytes(), w2_.capacity_bytes(), x_.capacity_bytes(), dy_.capacity_bytes(),
          y_.capacity_bytes(), dx_.capacity_bytes(), g1_.capacity_bytes(), g2_.capacity_bytes(),
          dweight_.capacity_bytes(), row_ptr_.capacity_bytes(), expert_.capacity_bytes(),
          weight_.capacity_bytes()})
      bytes += part;
    return bytes;
  }

 private:
  cudaStream_t stream() const { return group_.stream(); }
  GpuExperts experts() const { return {w1_.get(), w2_.get()}; }

  GpuRouting draw_of(std::int32_t rank) const {
    GpuRouting out;
    out.assign(draw_routing(config_, static_cast<std::int32_t>(placement_.number_of.size()), RankId(rank),
                            runtime_.num_ranks()),
               placement_);
    return out;
  }
  void draw_expert(std::int32_t expert, std::span<bf16> w1, std::span<bf16> w2) const {
    draw(shape_.key("w1", expert), 0, shape_.w1_scale(), w1);
    draw(shape_.key("w2", expert), 0, shape_.w2_scale(), w2);
  }

  void upload() {
    std::vector<bf16> values(n(shape_.pre * shape_.hidden)), more(n(shape_.hidden * shape_.ffn));
    for (std::size_t i = 0; i < local_.size(); ++i) {
      draw_expert(local_[i], values, more);
      device_.upload(w1_.get() + i * values.size(), values.data(),
                     static_cast<std::int64_t>(values.size() * 2));
      device_.upload(w2_.get() + i * more.size(), more.data(), static_cast<std::int64_t>(more.size() * 2));
      device_.synchronize();
    }
    values.resize(n(tokens_ * shape_.hidden));
    for (const auto& [key, to] :
         {std::pair{shape_.x_key(rank_.value), &x_}, {shape_.dy_key(rank_.value), &dy_}}) {
      draw(key, 0, 1, values);
      device_.upload(to->get(), values.data(), static_cast<std::int64_t>(values.size() * 2));
      device_.synchronize();
    }
    device_.upload(row_ptr_.get(), routing_.row_ptr.data(), (tokens_ + 1) * 8);
    device_.upload(expert_.get(), routing_.expert.data(), routes_ * 4);
    device_.upload(weight_.get(), routing_.weight.data(), routes_ * 4);
    device_.zero(meet_.get(), (runtime_.num_ranks() + 1) * 4);
    device_.synchronize();
  }
  template <typename T>
  void zero(const OnDevice<T>& memory) {
    check_cuda(cudaMemsetAsync(memory.get(), 0, memory.bytes(), stream()), "bench");
  }
  void download(void* to, const void* from, std::size_t bytes) {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream()), "bench");
  }
  // A forward and a backward into poisoned memory.
  void results(const Pass& pass, std::vector<bf16>& y, std::vector<bf16>& dx) {
    group_.in_pass(kPhase, [&] {
      for (const OnDevice<bf16>* rows : {&y_, &dx_})
        check_cuda(cudaMemsetAsync(rows->get(), 0xff, rows->bytes(), stream()), "bench");
      check_cuda(cudaMemsetAsync(dweight_.get(), 0xff, dweight_.bytes(), stream()), "bench");
      forward(pass);
      backward(pass);
      pass.layer.wait(stream());
      y.resize(n(tokens_ * shape_.hidden));
      dx.resize(y.size());
      download(y.data(), y_.get(), y_.bytes());
      download(dx.data(), dx_.get(), dx_.bytes());
      check_cuda(cudaStreamSynchronize(stream()), "bench");
    });
  }
  static bool same(const std::vector<bf16>& a, const std::vector<bf16>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 2) == 0;
  }
  void require_near(const std::vector<bf16>& y, const std::vector<bf16>& other_y, const std::vector<bf16>& dx,
                    const std::vector<bf16>& other_dx) const {
    for (const auto& [of, other, what] : {std::tuple{&y, &other_y, "y"}, {&dx, &other_dx, "dx"}}) {
      NormError error;
      for (std::size_t i = 0; i < of->size(); ++i)
        error.add(static_cast<double>(static_cast<float>((*other)[i])),
                  static_cast<double>(static_cast<float>((*of)[i])));
      Require(error.value() <= kTolerance, ErrorCode::kInternal, what, " of two hops and of one differ by ",
              error.value(), " of their norm on rank ", rank_.value, "; at most ", kTolerance,
              " is rounding");
    }
  }

  void compare_tokens(const std::vector<bf16>& y, const std::vector<bf16>& dx,
                      const std::vector<float>& dweight, GpuFigures& out) {
    const std::int64_t of_expert = (shape_.pre + shape_.ffn) * shape_.hidden;
    const std::int64_t routes_of_token =
        std::max<std::int64_t>(1, (routes_ + tokens_ - 1) / std::max<std::int64_t>(1, tokens_));
    const std::int64_t sample = std::min(
        tokens_, std::clamp<std::int64_t>(kMostValues / (of_expert * routes_of_token), 2, kMostTokens));
    out.checked_tokens = static_cast<std::int32_t>(sample);
    struct Visit {
      std::int64_t sample;
      std::size_t route;
    };
    std::map<std::int32_t, std::vector<Visit>> visits;  // of each expert
    const auto token_of = [&](std::int64_t s) { return sample == 1 ? 0 : s * (tokens_ - 1) / (sample - 1); };
    for (std::int64_t s = 0; s < sample; ++s)
      for (auto i = n(routing_.row_ptr[n(token_of(s))]); i < n(routing_.row_ptr[n(token_of(s) + 1)]); ++i)
        visits[routing_.expert[i]].push_back({s, i});
    std::vector<double> want_y(n(sample * shape_.hidden)), want_dx(want_y.size());
    NormError dweights;
    for (const auto& [expert, of] : visits) {
      ReferenceExpert reference(shape_.activation, shape_.hidden, shape_.ffn);
      draw_expert(expert, reference.w1, reference.w2);
      for (const Visit& v : of)
        reference.add_row(shape_, rank_.value, token_of(v.sample), routing_.weight[v.route]);
      reference.run(runtime_.kernels(), false);
      for (std::size_t r = 0; r < of.size(); ++r) {
        for (std::size_t c = 0; c < n(shape_.hidden); ++c) {
          const std::size_t from = r * n(shape_.hidden) + c, to = n(of[r].sample * shape_.hidden) + c;
          want_y[to] += static_cast<double>(reference.weight[r]) *
                        static_cast<double>(static_cast<float>(reference.out[from]));
          want_dx[to] += static_cast<double>(static_cast<float>(reference.dx[from]));
        }
        dweights.add(static_cast<double>(reference.dweight[r]), static_cast<double>(dweight[of[r].route]));
      }
    }
    for (std::int64_t s = 0; s < sample; ++s) {
      NormError of_y, of_dx;
      for (std::int64_t c = 0; c < shape_.hidden; ++c) {
        const std::size_t want = n(s * shape_.hidden + c), got = n(token_of(s) * shape_.hidden + c);
        of_y.add(want_y[want], static_cast<double>(static_cast<float>(y[got])));
        of_dx.add(want_dx[want], static_cast<double>(static_cast<float>(dx[got])));
      }
      raise(out.y_error, of_y.value());
      raise(out.dx_error, of_dx.value());
    }
    raise(out.dweight_error, dweights.value());
  }

  // Some columns of the inner rows of this rank's least used expert, over all tokens of all ranks: gradients of an expert's
  // weights by inner column do not depend on the other columns.
  void compare_gradients(GpuFigures& out) {
    struct Visitor {
      std::int32_t rank;
      std::int64_t token;
      float weight;
    };
    std::vector<std::vector<Visitor>> visitors(local_.size());
    for (std::int32_t r = 0; r < runtime_.num_ranks(); ++r) {
      const GpuRouting routing = r == rank_.value ? routing_ : draw_of(r);
      for (std::int64_t t = 0; t < routing.num_tokens(); ++t)
        for (auto i = n(routing.row_ptr[n(t)]); i < n(routing.row_ptr[n(t + 1)]); ++i)
          if (const auto at = std::lower_bound(local_.begin(), local_.end(), routing.expert[i]);
              at != local_.end() && *at == routing.expert[i])
            visitors[static_cast<std::size_t>(at - local_.begin())].push_back({r, t, routing.weight[i]});
    }
    std::optional<std::size_t> chosen;
    for (std::size_t e = 0; e < visitors.size(); ++e)
      if (!visitors[e].empty() && (!chosen || visitors[e].size() < visitors[*chosen].size())) chosen = e;
    if (!chosen) return;
    const std::int32_t expert = local_[*chosen];
    const std::int64_t first = shape_.ffn / 2 / kColumns * kColumns, hidden = shape_.hidden;
    ReferenceExpert reference(shape_.activation, hidden, kColumns);
    const std::int64_t halves = shape_.pre / shape_.ffn;  // of w1: SwiGLU has two
    const std::int64_t block = kColumns * hidden;
    for (std::int64_t half = 0; half < halves; ++half)
      draw(shape_.key("w1", expert), (half * shape_.ffn + first) * hidden, shape_.w1_scale(),
           std::span(reference.w1).subspan(n(half * block), n(block)));
    for (std::int64_t o = 0; o < hidden; ++o)
      draw(shape_.key("w2", expert), o * shape_.ffn + first, shape_.w2_scale(),
           std::span(reference.w2).subspan(n(o * kColumns), n(kColumns)));
    for (const Visitor& v : visitors[*chosen]) reference.add_row(shape_, v.rank, v.token, v.weight);
    reference.run(runtime_.kernels(), true);
    std::vector<float> g1(reference.grad_w1.size()), g2(reference.grad_w2.size());
    const auto at = static_cast<std::int64_t>(*chosen);
    for (std::int64_t half = 0; half < halves; ++half)
      download(g1.data() + half * block, g1_.get() + (at * shape_.pre + half * shape_.ffn + first) * hidden,
               n(block) * 4);
    check_cuda(
        cudaMemcpy2DAsync(g2.data(), n(kColumns) * 4, g2_.get() + at * hidden * shape_.ffn + first,
                          n(shape_.ffn) * 4, n(kColumns) * 4, n(hidden), cudaMemcpyDeviceToHost, stream()),
        "bench");
    check_cuda(cudaStreamSynchronize(stream()), "bench");
    for (const auto& [want, got] : {std::pair{&reference.grad_w1, &g1}, {&reference.grad_w2, &g2}}) {
      NormError error;
      for (std::size_t i = 0; i < want->size(); ++i)
        error.add(static_cast<double>((*want)[i]), static_cast<double>((*got)[i]));
      raise(out.gradient_error, error.value());
    }
  }

  std::uint64_t hash_of_ranks(const std::vector<bf16>& rows) {
    Hasher mine;
    for (std::size_t i = 0; i < rows.size(); i += 4) {
      std::uint64_t word = 0;
      std::memcpy(&word, &rows[i], std::min<std::size_t>(4, rows.size() - i) * 2);
      mine.add(word);
    }
    const auto value = static_cast<std::int64_t>(mine.value());
    return Hasher().add_ints(runtime_.all_gather(std::span(&value, 1), kPhase)).value();
  }

  CudaGroup& group_;
  Runtime& runtime_;
  kernels::Device& device_;
  const Config& config_;
  const MoeLayerOptions options_;
  const GpuPlacement placement_;
  const RankId rank_;
  const Shape shape_;
  const GpuRouting routing_;
  const std::int64_t tokens_, routes_, num_local_;
  std::vector<std::int32_t> local_;  // experts of this rank, ascending
  OnDevice<bf16> w1_, w2_, x_, dy_, y_, dx_;
  OnDevice<float> g1_, g2_, dweight_;
  OnDevice<std::int64_t> row_ptr_;
  OnDevice<std::int32_t> expert_;
  OnDevice<float> weight_;
  OnDevice<unsigned char> flush_;
  OnDevice<std::uint32_t> meet_;
  Event begin_, end_;
  std::unique_ptr<OneHopLayer> one_hop_;
  std::unique_ptr<GroupLayer> two_hops_;  // null: one hop is what is measured
};

std::int64_t total(Runtime& runtime, std::int64_t mine) {
  std::int64_t sum = 0;
  for (const std::int64_t v : runtime.all_gather(std::span(&mine, 1), kPhase)) sum += v;
  return sum;
}

}  // namespace

LayerBenchReport cuda_bench(Runtime& runtime, const LoadedConfig& loaded) {
  const Config& config = loaded.config;
  RuntimeState& state = runtime.state();
  std::unique_ptr<CudaGroup> alone;  // one rank over a transport of the host: nothing leaves the GPU
  if (!state.gpu_group) alone = std::make_unique<CudaGroup>(runtime, GpuLink::kNvlink);
  CudaGroup& group = alone ? *alone : static_cast<CudaGroup&>(*state.gpu_group);
  state.device->make_current();
  MoeLayerOptions chosen = layer_options(config);
  if (state.gpu_group) choose_automatically(runtime, config, chosen);
  const GpuWay way = gpu_way(chosen.schedule, chosen.chunks_by_gpu_model, group.link(), runtime.topology());
  Bench bench(group, config,
              gpu_placement(placement_of(config, runtime.num_ranks(), config.bench.replay_layer)), way);

  const bool automatic = config.schedule.policy == Config::Schedule::Policy::kAuto;
  GpuLayerOptions options;
  options.schedule = automatic || way.two_hops ? GpuSchedule::kAuto
                     : way.overlapped          ? GpuSchedule::kOverlapped
                                               : GpuSchedule::kSequential;
  const Bench::Pass scheduled = bench.scheduled(options), sequential = bench.sequential();
  GpuFigures figures;
  figures.link = runtime.num_ranks() == 1 ? "none" : std::string(to_string(group.link()));
  bench.check(scheduled, sequential, figures);

  struct Times {
    std::vector<double> forward_us, backward_us;
  };
  Times passes[2], dense_us;  // scheduled, sequential
  const std::unique_ptr<DenseGemms> dense = bench.dense_gemms();
  std::vector<double> plan_us, exchange_us, gemms_us, local_us;
  for (std::int64_t round = 0; round < config.bench.warmup + config.bench.iterations; ++round) {
    const auto timed = [&](std::vector<double>& to, GroupLayer& layer, auto&& call) {
      const double us = bench.time_us(layer, call);
      if (round >= config.bench.warmup) to.push_back(us);
    };
    // In turns with the rest: what ran before decides the clock that a card at its power limit has left.
    const double dense_forward = dense ? dense->forward_us() : 0,
                 dense_backward = dense ? dense->backward_us() : 0;
    if (round >= config.bench.warmup) {
      dense_us.forward_us.push_back(dense_forward);
      dense_us.backward_us.push_back(dense_backward);
    }
    timed(plan_us, bench.layer(), [&] { bench.plan(bench.layer()); });
    for (std::int64_t i = 0; i < 2; ++i) {
      const std::int64_t which = (round + i) % 2;
      const Bench::Pass& pass = which == 0 ? scheduled : sequential;
      timed(passes[which].forward_us, pass.layer, [&] { bench.forward(pass); });
      timed(passes[which].backward_us, pass.layer, [&] { bench.backward(pass); });
    }
    timed(exchange_us, bench.one_hop(), [&] { bench.exchange_only(sequential.options); });
    timed(gemms_us, bench.one_hop(), [&] { bench.gemms_only(sequential.options); });
    timed(local_us, bench.one_hop(), [&] { bench.local_only(sequential.options); });
  }

  const auto slowest = [&](const std::vector<double>& us) { return largest_of_ranks(runtime, us, kPhase); };
  LayerBenchReport out;
  out.device = device_name(runtime);
  out.num_ranks = runtime.num_ranks();
  out.topology = runtime.topology().describe();
  out.automatic = automatic;
  out.policy = to_string(way.two_hops     ? SchedulePolicy::kHierarchical
                         : way.overlapped ? SchedulePolicy::kBySource
                                          : SchedulePolicy::kSequential);
  out.exchange = way.two_hops ? "gateway" : "direct";
  out.num_chunks = bench.layer().num_chunks();
  out.config_hash = semantic_hash(config);
  out.plan = sample_of(slowest(plan_us));
  figures.exchange = sample_of(slowest(exchange_us));
  figures.gemms = sample_of(slowest(gemms_us));
  figures.local = sample_of(slowest(local_us));
  const auto fill = [&](PassFigures& to, const std::vector<double>& mine, const std::vector<double>& baseline,
                        const std::vector<double>& dense_mine) {
    const std::vector<double> us = slowest(mine), baseline_us = slowest(baseline);
    to.scheduled = sample_of(us);
    to.sequential = sample_of(baseline_us);
    to.to_sequential = paired_ratio(us, baseline_us);
    to.dense_gemm_us = sample_of(slowest(dense_mine)).median_us;
  };
  fill(out.forward, passes[0].forward_us, passes[1].forward_us, dense_us.forward_us);
  fill(out.backward, passes[0].backward_us, passes[1].backward_us, dense_us.backward_us);
  const bool across = runtime.topology().num_nodes() > 1;
  out.forward.floor = {figures.local.median_us, across ? 0 : figures.exchange.median_us,
                       across ? figures.exchange.median_us : 0};
  const double unknown = std::nan("");
  out.backward.floor = {unknown, unknown, unknown};
  out.forward.exposed_comm_us = std::max(0.0, out.forward.scheduled.median_us - figures.local.median_us);
  out.backward.exposed_comm_us = unknown;
  const Rows rows = bench.rows();
  const std::int64_t both_ways = config.model.hidden * 4;
  out.bytes_in_node = total(runtime, rows.in_node) * both_ways;
  out.bytes_across_nodes = total(runtime, rows.across_nodes) * both_ways;
  out.flat_bytes_in_node = total(runtime, rows.flat_in_node) * both_ways;
  out.flat_bytes_across_nodes = total(runtime, rows.flat_across_nodes) * both_ways;
  const double tokens = static_cast<double>(std::max<std::int64_t>(1, total(runtime, bench.num_tokens())));
  out.crossings_same_rank = static_cast<double>(total(runtime, rows.same_rank)) / tokens;
  out.crossings_in_node = static_cast<double>(total(runtime, rows.in_node)) / tokens;
  out.crossings_across_nodes = static_cast<double>(total(runtime, rows.across_nodes)) / tokens;
  out.memory_bytes = std::llround(slowest({static_cast<double>(bench.memory_bytes())})[0]);
  out.on_gpus = figures;
  return out;
}

}  // namespace sluice
