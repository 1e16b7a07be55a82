#include "sluice/chain_layer.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "sluice/base/grow_array.hpp"
#include "sluice/base/hash.hpp"
#include "sluice/base/telemetry.hpp"
#include "sluice/comm/collectives.hpp"
#include "sluice/kernels/grap.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/runtime/src/executor.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {

// A growing matrix. Contents are unspecified after resize.
struct Rows {
  GrowArray<std::byte> memory;
  DType dtype = DType::kF32;
  std::int64_t num_rows = 0, cols = 0;

  MatrixView resize(std::int64_t rows, std::int64_t num_cols, DType type) {
    memory.resize(static_cast<std::size_t>(rows * num_cols) * size_of(type));
    dtype = type;
    num_rows = rows;
    cols = num_cols;
    return view();
  }
  MatrixView view() { return {memory.data(), dtype, num_rows, cols, cols}; }
  float* f32() { return reinterpret_cast<float*>(memory.data()); }
  const float* f32() const { return reinterpret_cast<const float*>(memory.data()); }
};

template <typename View>
View row_range(const View& m, std::int64_t begin, std::int64_t end) {
  return {begin == end ? nullptr : m.row(begin), m.dtype, end - begin, m.cols, m.row_stride};
}

// Calls f(p) with a pointer to the view's row as its element type.
template <typename View, typename Call>
void with_row(const View& m, std::int64_t row, Call&& f) {
  if (m.dtype == DType::kF32)
    f(m.template row_as<float>(row));
  else
    f(m.template row_as<bf16>(row));
}

// sum[j] += row of m, widened.
void add_row(const ConstMatrixView& m, std::int64_t row, float* sum) {
  with_row(m, row, [&](const auto* p) {
    for (std::int64_t j = 0; j < m.cols; ++j) sum[j] += static_cast<float>(p[j]);
  });
}
void load_row(const ConstMatrixView& m, std::int64_t row, float* to) {
  with_row(m, row, [&](const auto* p) {
    for (std::int64_t j = 0; j < m.cols; ++j) to[j] = static_cast<float>(p[j]);
  });
}
void store_row(const float* from, const MatrixView& m, std::int64_t row) {
  with_row(m, row, [&](auto* p) {
    using Element = std::remove_reference_t<decltype(*p)>;
    for (std::int64_t j = 0; j < m.cols; ++j) p[j] = static_cast<Element>(from[j]);
  });
}

}  // namespace

// What one (iteration, chunk) does.
struct ChainStep {
  Context context;
  PolicyState state;
  std::shared_ptr<const Plan> plan;  // from prepare_step() to begin_step()
};

struct ChainStorage {
  bool in_use = false;
  bool training = false;
  bool settled = false;
  bool backward_done = false;
  std::int32_t num_iterations = 0, num_chunks = 0;
  ConstMatrixView x;
  MatrixView y;
  std::span<const AdaptiveState> adaptive;
  ConstMatrixView previous;  // of forward
  ScoreGradients path;       // of backward

  std::vector<ChainStep> steps;          // [num_iterations][num_chunks], and more that were used once
  std::vector<Rows> inner;               // [num_iterations - 1] dtype [n, hidden], x(t + 1)
  std::vector<Rows> scores;              // [num_iterations] f32 [n, num_experts]
  std::vector<Rows> shared_hidden;       // [num_iterations, or 2] dtype [n, pre], pre-activation of S
  std::vector<std::int64_t> not_finite;  // tokens
  std::vector<double> sums;              // buffers of the iterations' states, added up over chunks
  std::vector<std::size_t> sums_begin;   // [num_iterations + 1]

  ChainStep& step(std::int32_t t, std::int32_t chunk) {
    return steps[static_cast<std::size_t>(t) * static_cast<std::size_t>(num_chunks) +
                 static_cast<std::size_t>(chunk)];
  }
  std::int64_t capacity_bytes() const {
    std::size_t bytes = sums.capacity() * sizeof(double);
    for (const std::vector<Rows>* list : {&inner, &scores, &shared_hidden})
      for (const Rows& rows : *list) bytes += rows.memory.capacity_bytes();
    for (const ChainStep& s : steps)
      bytes += s.state.routing.row_ptr.capacity() * sizeof(std::int64_t) +
               s.state.routing.expert.capacity() * sizeof(std::int32_t) +
               (s.state.routing.weight.capacity() + s.state.saved.capacity()) * sizeof(float);
    return static_cast<std::int64_t>(bytes);
  }
};

// ---- context ---------------------------------------------------------------------------------------------------------

ChainContext::ChainContext(ChainContext&& other) noexcept {
  *this = std::move(other);
}
ChainContext& ChainContext::operator=(ChainContext&& other) noexcept {
  if (this == &other) return *this;
  release();
  storage_ = std::exchange(other.storage_, nullptr);
  pool_ = std::move(other.pool_);
  return *this;
}
ChainContext::~ChainContext() {
  release();
}
void ChainContext::release() noexcept {
  if (storage_) {
    for (ChainStep& step : storage_->steps) step.context = Context();
    storage_->in_use = false;
  }
  storage_ = nullptr;
  pool_.reset();
}

std::int32_t ChainContext::num_chunks() const {
  return storage_->num_chunks;
}
const Plan& ChainContext::plan(std::int32_t t, std::int32_t chunk) const {
  const Context& context = storage_->step(t, chunk).context;
  Require(context.valid(), ErrorCode::kInvalidState, "the plan of iteration ", t, ", chunk ", chunk,
          " is gone; plans live from forward to backward, in training");
  return context.plan();
}
std::span<const float> ChainContext::scores(std::int32_t t) const {
  const Rows& rows = storage_->scores[static_cast<std::size_t>(t)];
  return {rows.f32(), static_cast<std::size_t>(rows.num_rows * rows.cols)};
}
bool ChainContext::all_finite() const {
  return storage_->not_finite.empty();
}
const PolicyState& ChainContext::policy_state(std::int32_t t) const {
  return storage_->step(t, 0).state;
}
double ChainContext::auxiliary_loss() const {
  double loss = 0;
  for (std::int32_t t = 0; t < storage_->num_iterations; ++t)
    for (std::int32_t c = 0; c < storage_->num_chunks; ++c) loss += storage_->step(t, c).state.auxiliary_loss;
  return loss;
}

// ---- layer -----------------------------------------------------------------------------------------------------------

struct ChainLayer::State {
  // Outlives the layer as long as contexts do.
  struct Pool {
    std::vector<std::unique_ptr<ChainStorage>> storages;
  };

  Runtime& runtime;
  kernels::Kernels& kernels;
  ChainLayerOptions options;
  const SelectionPolicy& policy;
  MoeLayer moe;
  std::shared_ptr<Pool> pool = std::make_shared<Pool>();
  std::int64_t hidden, num_experts;
  DType dtype;
  kernels::Activation activation;
  std::int64_t shared_pre = 0;  // columns of S's pre-activation
  std::uint64_t hash = 0;
  bool compared = false;
  std::vector<std::int64_t> gathered;  // [num_ranks * 2]

  std::vector<GateWeights> gates;  // [num_iterations] or [1]; none for GrAP
  GateWeights residual;            // W_g
  ExpertWeights shared;

  // Of the pass in progress: one forward or backward runs at a time.
  Rows shared_out;                   // f32 [n, hidden]
  Rows shared_activation;            // dtype [n, shared_ffn]
  Rows d[2];                         // f32 [n, hidden], D(t + 1) by the parity of t
  Rows d_rows[2];                    // dtype [n, hidden], the same for experts; unused when dtype is f32
  Rows moe_out;                      // dtype [n, hidden], D through the experts
  Rows gate_out;                     // f32 [n of a chunk, hidden]
  Rows path_out;                     // f32 [n of a chunk, num_experts], W_g z'
  Rows dscores;                      // f32 [n, num_experts]
  Rows shared_wa[2];                 // dtype [n, shared_ffn], by the parity of t
  std::vector<GrowArray<float>> dw;  // [num_chunks] f32 [routes]
  GrowArray<float> ones;             // f32 [n]
  GrowArray<float> unused_dw;        // f32 [n]
  std::vector<float> sum;            // [hidden]
  std::vector<Context> to_add;       // [num_chunks]

  State(Runtime& r, Placement placement, const ChainLayerOptions& o, const SelectionPolicy& p)
      : runtime(r),
        kernels(r.kernels()),
        options(o),
        policy(p),
        moe(r, std::move(placement), o.layer),
        hidden(o.layer.hidden),
        num_experts(moe.placement().num_experts),
        dtype(o.layer.dtype),
        activation(kernel_activation(o.layer.activation)) {
    Require(o.num_iterations >= 1, ErrorCode::kInvalidArgument, "num_iterations is ", o.num_iterations,
            "; it must be at least 1");
    Require(o.num_chunks >= 1, ErrorCode::kInvalidArgument, "num_chunks is ", o.num_chunks,
            "; it must be at least 1");
    Require(o.shared_ffn >= 0, ErrorCode::kInvalidArgument, "shared_ffn is ", o.shared_ffn,
            "; it must be a width, or 0 for no shared expert");
    if (o.shared_ffn > 0) shared_pre = kernels::preactivation_cols(activation, o.shared_ffn);
    hash = Hasher()
               .add_int(o.num_iterations)
               .add_int(static_cast<int>(o.residual))
               .add_int(o.shared_gate)
               .add_int(o.shared_ffn)
               .add_int(o.num_chunks)
               .add_text(p.name())
               .add_int(static_cast<int>(o.gate))
               .value();
    if (o.gate == GateKind::kGrap)
      Require(hidden % num_experts == 0, ErrorCode::kInvalidConfig, "hidden is ", hidden,
              ", which is no multiple of the ", num_experts,
              " experts; affinities (GrAP) give each expert an equal slice of the row");
    gathered.resize(2 * static_cast<std::size_t>(r.num_ranks()));
    sum.resize(static_cast<std::size_t>(hidden));
  }

  bool saves_hidden() const { return options.layer.save == Save::kActivations; }
  const GateWeights& gate(std::int32_t t) const {
    return gates[options.shared_gate ? 0 : static_cast<std::size_t>(t)];
  }
  const AdaptiveState& adaptive(const ChainStorage& c, std::int32_t t) const {
    return c.adaptive[c.adaptive.size() == 1 ? 0 : static_cast<std::size_t>(t)];
  }
  static std::size_t parity(std::int32_t t) { return static_cast<std::size_t>(t) & 1; }
  Rows& shared_hidden(ChainStorage& c, std::int32_t t) const {
    return c.shared_hidden[saves_hidden() ? static_cast<std::size_t>(t) : parity(t)];
  }

  // x(t), before iteration t (from 0).
  ConstMatrixView input(ChainStorage& c, std::int32_t t) const {
    return t == 0 ? c.x : ConstMatrixView(c.inner[static_cast<std::size_t>(t) - 1].view());
  }
  MatrixView output(ChainStorage& c, std::int32_t t) const {
    return t + 1 == c.num_iterations ? c.y : c.inner[static_cast<std::size_t>(t)].view();
  }
  struct Chunk {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
  };
  static Chunk chunk_of(const ChainStorage& c, std::int32_t chunk) {
    return {chunk_begin(c.x.rows, chunk, c.num_chunks), chunk_begin(c.x.rows, chunk + 1, c.num_chunks)};
  }
  Scores scores_of(ChainStorage& c, std::int32_t t, const Chunk& rows) const {
    const float* first = c.scores[static_cast<std::size_t>(t)].f32() + rows.begin * num_experts;
    return {{first, static_cast<std::size_t>(rows.size() * num_experts)},
            rows.size(),
            static_cast<std::int32_t>(num_experts),
            runtime.rank().value};
  }

  ChainStorage& acquire();
  std::int32_t agree_on_chunks(std::int64_t num_tokens);
  // What is under way goes on as far as it can without waiting.
  void drive() {
    while (runtime.state().executor->step()) {
    }
  }
  void multiply(ConstMatrixView w, ConstMatrixView a, MatrixView out);
  void multiply_backward_input(ConstMatrixView w, ConstMatrixView dc, MatrixView da);
  void multiply_backward_weight(ConstMatrixView dc, ConstMatrixView a, float* gradient);

  void exchange(PolicyState& state);
  void select(ChainStorage& c, std::int32_t t, std::int32_t chunk);
  void prepare_step(ChainStorage& c, std::int32_t t, std::int32_t chunk);
  void begin_step(ChainStorage& c, std::int32_t t, std::int32_t chunk);
  void shared_forward(ChainStorage& c, std::int32_t t, const Chunk& rows, std::int32_t chunk);
  void shared_backward(ChainStorage& c, std::int32_t t, const Chunk& rows, std::int32_t chunk);
  void end_step(ChainStorage& c, std::int32_t t, std::int32_t chunk);
  void gather_sums(ChainStorage& c);
  void settle(ChainStorage& c);
  void begin_backward_step(ChainStorage& c, std::int32_t t, std::int32_t chunk);
  void end_backward_step(ChainStorage& c, std::int32_t t, std::int32_t chunk, ConstMatrixView dy,
                         MatrixView dx);
  void add_expert_gradients(ChainStorage& c, std::int32_t t);
  void add_gate_gradients(ChainStorage& c, std::int32_t t);
  ConstMatrixView d_view(std::int32_t t) {
    return dtype == DType::kF32 ? d[parity(t)].view() : d_rows[parity(t)].view();
  }
};

ChainLayer::ChainLayer(Runtime& runtime, Placement placement, const ChainLayerOptions& options,
                       const SelectionPolicy& policy)
    : state_(std::make_unique<State>(runtime, std::move(placement), options, policy)) {}
ChainLayer::~ChainLayer() = default;

const ChainLayerOptions& ChainLayer::options() const {
  return state_->options;
}
const Placement& ChainLayer::placement() const {
  return state_->moe.placement();
}
void ChainLayer::set_weights(std::span<const ExpertWeights> slots) {
  state_->moe.set_weights(slots);
}
void ChainLayer::set_constant_experts(std::span<const ConstantExpertWeights> experts) {
  state_->moe.set_constant_experts(experts);
}

namespace {
void require_contiguous(const ConstMatrixView& m, std::string_view what) {
  Require(m.row_stride == m.cols, ErrorCode::kInvalidArgument, what, " is not contiguous");
}
}  // namespace

void ChainLayer::set_gates(std::span<const GateWeights> gates) {
  State& s = *state_;
  const std::size_t expected = s.options.gate == GateKind::kGrap ? 0
                               : s.options.shared_gate           ? 1
                                                       : static_cast<std::size_t>(s.options.num_iterations);
  Require(gates.size() == expected, ErrorCode::kInvalidArgument, gates.size(), " gates were given; ",
          s.options.num_iterations, " iterations ", s.options.shared_gate ? "share " : "have ", expected);
  for (std::size_t t = 0; t < gates.size(); ++t) {
    require_shape(gates[t].w, str("gate ", t), s.num_experts, s.hidden);
    require_contiguous(gates[t].w, str("gate ", t));
  }
  s.gates.assign(gates.begin(), gates.end());
}

void ChainLayer::set_gate_residual(const GateWeights& residual) {
  State& s = *state_;
  require_shape(residual.w, "the gate residual", s.num_experts, s.num_experts);
  require_contiguous(residual.w, "the gate residual");
  s.residual = residual;
}

void ChainLayer::set_shared_expert(const ExpertWeights& weights) {
  State& s = *state_;
  Require(s.options.shared_ffn > 0, ErrorCode::kInvalidState,
          "set_shared_expert: the layer has none; set shared_ffn");
  require_shape(weights.w1, "w1 of the shared expert", s.shared_pre, s.hidden);
  require_shape(weights.w2, "w2 of the shared expert", s.hidden, s.options.shared_ffn);
  require_contiguous(weights.w1, "w1 of the shared expert");
  require_contiguous(weights.w2, "w2 of the shared expert");
  s.shared = weights;
}

ChainStorage& ChainLayer::State::acquire() {
  for (auto& storage : pool->storages)
    if (!storage->in_use) return *storage;
  pool->storages.push_back(std::make_unique<ChainStorage>());
  ChainStorage& c = *pool->storages.back();
  c.num_iterations = options.num_iterations;
  const auto iterations = static_cast<std::size_t>(c.num_iterations);
  c.inner.resize(iterations - 1);
  c.scores.resize(iterations);
  c.sums_begin.resize(iterations + 1);
  if (options.shared_ffn > 0) c.shared_hidden.resize(saves_hidden() ? iterations : 2);
  return c;
}

std::int32_t ChainLayer::State::agree_on_chunks(std::int64_t num_tokens) {
  if (compared && options.num_chunks == 1) return 1;
  const std::int64_t mine[2] = {static_cast<std::int64_t>(hash), num_tokens};
  runtime.collectives().all_gather(mine, gathered, "chain").throw_if_error();
  std::int64_t most = 1;
  for (std::size_t r = 0; 2 * r < gathered.size(); ++r) {
    Require(gathered[2 * r] == mine[0], ErrorCode::kDisagreement, "rank ", r,
            " has a chain layer of other options or policy than rank ", runtime.rank().value);
    most = std::max(most, gathered[2 * r + 1]);
  }
  compared = true;
  if (!policy.token_local()) return 1;
  return static_cast<std::int32_t>(std::min<std::int64_t>(options.num_chunks, most));
}

// out = a W^T
void ChainLayer::State::multiply(ConstMatrixView w, ConstMatrixView a, MatrixView out) {
  const std::int64_t group_ptr[2] = {0, a.rows};
  const std::byte* const data[1] = {w.data};
  kernels.grouped_gemm_forward({group_ptr, data}, a, {}, w.dtype, w.rows, kernels::Activation::kRelu, out,
                               {});
}

// da = dc W
void ChainLayer::State::multiply_backward_input(ConstMatrixView w, ConstMatrixView dc, MatrixView da) {
  const std::int64_t group_ptr[2] = {0, dc.rows};
  const std::byte* const data[1] = {w.data};
  kernels.grouped_gemm_dgrad({group_ptr, data}, dc, {}, w.dtype, da);
}

// dW += dc^T a
void ChainLayer::State::multiply_backward_weight(ConstMatrixView dc, ConstMatrixView a, float* gradient) {
  const std::int64_t group_ptr[2] = {0, dc.rows};
  float* const gradients[1] = {gradient};
  kernels.grouped_gemm_wgrad(group_ptr, dc, {}, a, {}, gradients);
}

// ---- selection -------------------------------------------------------------------------------------------------------

void ChainLayer::State::exchange(PolicyState& state) {
  const Span span(runtime.recorder(), "exchange_policy", "host");
  if (state.exchange == ExchangeKind::kSumAcrossRanks) {
    runtime.all_reduce_sum(std::span<double>(state.buffer), "policy");
    return;
  }
  if (state.exchange == ExchangeKind::kAllToAll) {
    const auto ranks = static_cast<std::size_t>(runtime.num_ranks());
    Require(state.send_counts.size() == ranks && state.receive_counts.size() == ranks, ErrorCode::kInternal,
            "policy ", policy.name(), " asks for an exchange among ", state.send_counts.size(), " ranks");
    std::int64_t received = 0;
    for (const std::int64_t n : state.receive_counts) received += n;
    state.gathered.resize(static_cast<std::size_t>(received));
    std::vector<std::span<const std::byte>> sends;
    std::vector<std::span<std::byte>> receives;
    std::size_t from = 0, to = 0;
    for (std::size_t r = 0; r < ranks; ++r) {
      const auto sent = static_cast<std::size_t>(state.send_counts[r]),
                 arriving = static_cast<std::size_t>(state.receive_counts[r]);
      sends.push_back(std::as_bytes(std::span(state.buffer).subspan(from, sent)));
      receives.push_back(std::as_writable_bytes(std::span(state.gathered).subspan(to, arriving)));
      from += sent;
      to += arriving;
    }
    runtime.collectives().all_to_all_v(sends, receives, "policy").throw_if_error();
    return;
  }
  std::vector<std::int64_t> bits(state.buffer.size());
  std::memcpy(bits.data(), state.buffer.data(), state.buffer.size() * sizeof(double));
  const std::vector<std::int64_t> all = runtime.all_gather(bits, "policy");
  state.gathered.resize(all.size());
  std::memcpy(state.gathered.data(), all.data(), all.size() * sizeof(double));
}

// Until the routing is there. Sums that serve statistics and backward only wait for settle().
void ChainLayer::State::select(ChainStorage& c, std::int32_t t, std::int32_t chunk) {
  const Chunk rows = chunk_of(c, chunk);
  const Scores scores = scores_of(c, t, rows);
  PolicyState& state = c.step(t, chunk).state;
  state.restart();
  while (!policy.step(scores, adaptive(c, t), c.training, state)) {
    if (c.training && state.routing_ready && state.exchange == ExchangeKind::kSumAcrossRanks) return;
    Require(c.num_chunks == 1, ErrorCode::kInternal, "policy ", policy.name(),
            " says it is token-local but asks for an exchange before the routing");
    exchange(state);
  }
}

void ChainLayer::State::gather_sums(ChainStorage& c) {
  c.sums.clear();
  for (std::int32_t t = 0; t < c.num_iterations; ++t) {
    const std::size_t begin = c.sums_begin[static_cast<std::size_t>(t)] = c.sums.size();
    for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) {
      const PolicyState& state = c.step(t, chunk).state;
      if (state.done) continue;
      if (chunk == 0) c.sums.resize(begin + state.buffer.size(), 0.0);
      for (std::size_t i = 0; i < state.buffer.size(); ++i) c.sums[begin + i] += state.buffer[i];
    }
  }
  c.sums_begin.back() = c.sums.size();
}

void ChainLayer::State::settle(ChainStorage& c) {
  for (std::int32_t t = 0; t < c.num_iterations; ++t)
    for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) {
      PolicyState& state = c.step(t, chunk).state;
      if (state.done) continue;
      std::copy_n(c.sums.data() + c.sums_begin[static_cast<std::size_t>(t)], state.buffer.size(),
                  state.buffer.begin());
      const Scores scores = scores_of(c, t, chunk_of(c, chunk));
      while (!policy.step(scores, adaptive(c, t), true, state)) {
        Require(c.num_chunks == 1, ErrorCode::kInternal, "policy ", policy.name(),
                " says it is token-local but asks for a second exchange");
        exchange(state);
      }
    }
  c.settled = true;
}

std::span<double> ChainLayer::pending_sums(ChainContext& context) const {
  Require(context.valid(), ErrorCode::kInvalidState, "pending_sums needs a context that forward returned");
  return context.storage_->sums;
}

void ChainLayer::settle(ChainContext& context) {
  Require(context.valid() && context.pool_ == state_->pool && context.storage_->training &&
              !context.storage_->settled,
          ErrorCode::kInvalidState, "settle needs a context of a training forward of this layer, once");
  state_->settle(*context.storage_);
}

// ---- forward ---------------------------------------------------------------------------------------------------------

ChainContext ChainLayer::forward(ConstMatrixView x, MatrixView y, std::span<const AdaptiveState> adaptive,
                                 bool training, ConstMatrixView previous) {
  State& s = *state_;
  const ChainLayerOptions& o = s.options;
  for (const auto& [view, what] : {std::pair{x, "x"}, std::pair{ConstMatrixView(y), "y"}}) {
    require_shape(view, what, x.rows, s.hidden);
    Require(view.dtype == s.dtype, ErrorCode::kInvalidArgument, what, " is ", to_string(view.dtype),
            ", must be ", to_string(s.dtype));
  }
  Require(!s.gates.empty() || o.gate == GateKind::kGrap, ErrorCode::kInvalidState,
          "forward before set_gates");
  if (previous.data != nullptr) {
    require_shape(previous, "previous scores", x.rows, s.num_experts);
    Require(previous.dtype == DType::kF32, ErrorCode::kInvalidArgument, "previous scores are ",
            to_string(previous.dtype), ", must be f32");
    Require(o.num_iterations == 1 && o.gate == GateKind::kLinear, ErrorCode::kInvalidState,
            "previous scores go with one iteration and a trained gate");
    Require(s.residual.w.data != nullptr, ErrorCode::kInvalidState,
            "forward with previous scores before set_gate_residual");
  }
  Require(o.shared_ffn == 0 || s.shared.w1.data != nullptr, ErrorCode::kInvalidState,
          "forward before set_shared_expert");
  Require(adaptive.size() == 1 || adaptive.size() == static_cast<std::size_t>(o.num_iterations),
          ErrorCode::kInvalidArgument, "adaptive has ", adaptive.size(), " states; it must have 1 or ",
          o.num_iterations);
  Require(!training || o.layer.save != Save::kNone, ErrorCode::kInvalidState,
          "the layer keeps nothing for backward; set save to rows or activations");

  const std::int64_t n = x.rows;
  ChainStorage& c = s.acquire();
  ChainContext context;
  context.storage_ = &c;
  context.pool_ = s.pool;
  c.in_use = true;
  c.training = training;
  c.settled = c.backward_done = false;
  c.x = x;
  c.y = y;
  c.adaptive = adaptive;
  c.previous = previous;
  c.not_finite.clear();
  c.sums.clear();
  c.num_chunks = s.agree_on_chunks(n);
  const auto num_steps = static_cast<std::size_t>(c.num_iterations) * static_cast<std::size_t>(c.num_chunks);
  if (c.steps.size() < num_steps) c.steps.resize(num_steps);
  for (Rows& rows : c.inner) rows.resize(n, s.hidden, s.dtype);
  for (Rows& rows : c.scores) rows.resize(n, s.num_experts, DType::kF32);
  if (o.shared_ffn > 0) {
    s.shared_out.resize(n, s.hidden, DType::kF32);
    s.shared_activation.resize(n, o.shared_ffn, s.dtype);
    if (training && s.saves_hidden())
      for (Rows& rows : c.shared_hidden) rows.resize(n, s.shared_pre, s.dtype);
  }

  // The first iteration is planned as a whole: a plan's small exchanges wait for peers, and peers that compute answer
  // late.
  for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) s.prepare_step(c, 0, chunk);
  for (std::int32_t t = 0; t < c.num_iterations; ++t)
    for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) {
      if (t > 0) {
        s.end_step(c, t - 1, chunk);
        s.prepare_step(c, t, chunk);
      }
      s.begin_step(c, t, chunk);
    }
  for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) s.end_step(c, c.num_iterations - 1, chunk);

  s.sum.assign(s.sum.size(), std::numeric_limits<float>::quiet_NaN());
  for (const std::int64_t token : c.not_finite) store_row(s.sum.data(), y, token);
  if (training) s.gather_sums(c);
  return context;
}

void ChainLayer::State::prepare_step(ChainStorage& c, std::int32_t t, std::int32_t chunk) {
  const Chunk rows = chunk_of(c, chunk);
  const ConstMatrixView in = row_range(input(c, t), rows.begin, rows.end);
  ChainStep& step = c.step(t, chunk);
  {
    const Span span(runtime.recorder(), "gate", "compute", chunk);
    const ComputeTurn turn(*runtime.state().executor);
    Rows& scores = c.scores[static_cast<std::size_t>(t)];
    const MatrixView out = row_range(scores.view(), rows.begin, rows.end);
    if (options.gate == GateKind::kGrap)
      kernels::grap_affinity(in, out);
    else
      multiply(gate(t).w, in, out);
    if (c.previous.data != nullptr) {
      multiply(residual.w, row_range(c.previous, rows.begin, rows.end),
               path_out.resize(rows.size(), num_experts, DType::kF32));
      float* z = scores.f32() + rows.begin * num_experts;
      for (std::int64_t i = 0; i < rows.size() * num_experts; ++i) z[i] += path_out.f32()[i];
    }
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
      float* z = scores.f32() + i * num_experts;
      if (std::all_of(z, z + num_experts, [](float v) { return std::isfinite(v); })) continue;
      std::fill_n(z, num_experts, 0.0f);
      c.not_finite.push_back(i);
    }
  }
  select(c, t, chunk);
  step.plan = moe.plan(step.state.routing);
}

void ChainLayer::State::begin_step(ChainStorage& c, std::int32_t t, std::int32_t chunk) {
  const Chunk rows = chunk_of(c, chunk);
  ChainStep& step = c.step(t, chunk);
  step.context = moe.start_forward(step.plan, row_range(input(c, t), rows.begin, rows.end),
                                   row_range(output(c, t), rows.begin, rows.end));
  step.plan.reset();
}

void ChainLayer::State::shared_forward(ChainStorage& c, std::int32_t t, const Chunk& rows,
                                       std::int32_t chunk) {
  const ConstMatrixView in = row_range(input(c, t), rows.begin, rows.end);
  const Span span(runtime.recorder(), "shared_expert", "compute", chunk);
  const ComputeTurn turn(*runtime.state().executor);
  const std::int64_t group_ptr[2] = {0, rows.size()};
  const std::byte* const w1[1] = {shared.w1.data};
  const MatrixView act = row_range(shared_activation.view(), rows.begin, rows.end);
  const bool kept = c.training && saves_hidden();
  kernels.grouped_gemm_forward(
      {group_ptr, w1}, in, {}, shared.w1.dtype, shared_pre, activation,
      kept ? row_range(shared_hidden(c, t).view(), rows.begin, rows.end) : MatrixView{}, act);
  multiply(shared.w2, act, row_range(shared_out.view(), rows.begin, rows.end));
}

void ChainLayer::State::end_step(ChainStorage& c, std::int32_t t, std::int32_t chunk) {
  const Chunk rows = chunk_of(c, chunk);
  ChainStep& step = c.step(t, chunk);
  if (options.shared_ffn > 0) {  // while rows are away
    drive();
    shared_forward(c, t, rows, chunk);
  }
  moe.finish(step.context);
  if (!c.training) step.context = Context();
  const bool has_shared = options.shared_ffn > 0, inner = options.residual == ChainResidual::kInner,
             outer = options.residual == ChainResidual::kOuter && t + 1 == c.num_iterations;
  if (!has_shared && !inner && !outer) return;
  const Span span(runtime.recorder(), "residual", "compute", chunk);
  const ComputeTurn turn(*runtime.state().executor);
  const MatrixView out = output(c, t);
  const ConstMatrixView in = input(c, t);
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    load_row(out, i, sum.data());
    if (has_shared) add_row(shared_out.view(), i, sum.data());
    if (inner) add_row(in, i, sum.data());
    if (outer) add_row(c.x, i, sum.data());
    store_row(sum.data(), out, i);
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

void ChainLayer::backward(ChainContext& context, ConstMatrixView dy, MatrixView dx,
                          const ScoreGradients& path) {
  State& s = *state_;
  Require(context.valid() && context.pool_ == s.pool, ErrorCode::kInvalidState,
          "backward needs a context that forward of this layer returned");
  ChainStorage& c = *context.storage_;
  Require(c.training, ErrorCode::kInvalidState, "backward of a forward that was not for training");
  Require(!c.backward_done, ErrorCode::kInvalidState, "backward was already run on this context");
  const std::int64_t n = c.x.rows;
  require_shape(dy, "dy", n, s.hidden);
  require_shape(dx, "dx", n, s.hidden);
  Require(dy.dtype == s.dtype, ErrorCode::kInvalidArgument, "dy is ", to_string(dy.dtype), ", must be ",
          to_string(s.dtype));
  Require(dx.dtype == s.dtype || dx.dtype == DType::kF32, ErrorCode::kInvalidArgument, "dx is ",
          to_string(dx.dtype), ", must be f32 or ", to_string(s.dtype));
  for (const GateWeights& gate : s.gates)
    Require(gate.grad != nullptr, ErrorCode::kInvalidState, "set_gates gave no gradient for some gate");
  Require(s.options.shared_ffn == 0 || (s.shared.grad_w1 && s.shared.grad_w2), ErrorCode::kInvalidState,
          "set_shared_expert gave no gradients");
  for (const auto& [view, what] :
       {std::pair{path.of_scores, "gradient of the scores"},
        std::pair{ConstMatrixView(path.of_previous), "gradient of the previous scores"}})
    if (view.data != nullptr) {
      require_shape(view, what, n, s.num_experts);
      Require(view.dtype == DType::kF32 && c.num_iterations == 1, ErrorCode::kInvalidArgument, "the ", what,
              " must be f32, of a layer of one iteration");
    }
  if (c.previous.data != nullptr)
    Require(n == 0 || (path.of_previous.data != nullptr && s.residual.grad != nullptr),
            ErrorCode::kInvalidState,
            "backward needs room for the gradient of the previous scores, and of the gate residual");
  c.path = path;
  if (!c.settled) {
    s.runtime.all_reduce_sum(std::span<double>(c.sums), "policy");
    s.settle(c);
  }
  c.backward_done = true;

  for (Rows& rows : s.d) rows.resize(n, s.hidden, DType::kF32);
  if (s.dtype != DType::kF32)
    for (Rows& rows : s.d_rows) rows.resize(n, s.hidden, s.dtype);
  s.moe_out.resize(n, s.hidden, s.dtype);
  s.dscores.resize(n, s.num_experts, DType::kF32);
  if (s.dw.size() < static_cast<std::size_t>(c.num_chunks))
    s.dw.resize(static_cast<std::size_t>(c.num_chunks));
  if (s.options.shared_ffn > 0) {
    s.shared_out.resize(n, s.hidden, DType::kF32);
    for (Rows& rows : s.shared_wa) rows.resize(n, s.options.shared_ffn, s.dtype);
    if (!s.saves_hidden()) {
      s.shared_activation.resize(n, s.options.shared_ffn, s.dtype);
      for (Rows& rows : c.shared_hidden) rows.resize(n, s.shared_pre, s.dtype);
    }
    s.ones.assign(static_cast<std::size_t>(n), 1.0f);
    s.unused_dw.resize(static_cast<std::size_t>(n));
  }

  const std::int32_t last = c.num_iterations - 1;
  s.kernels.convert_rows(dy, s.d[State::parity(last)].view());
  if (s.dtype != DType::kF32) s.kernels.convert_rows(dy, s.d_rows[State::parity(last)].view());
  for (std::int32_t t = last; t >= 0; --t) {
    for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) {
      if (t < last) s.end_backward_step(c, t + 1, chunk, dy, dx);
      s.begin_backward_step(c, t, chunk);
    }
    if (t == last) continue;
    s.add_expert_gradients(c, t + 1);  // while the next iteration's rows travel
    s.add_gate_gradients(c, t + 1);
  }
  s.add_expert_gradients(c, 0);  // while the last sums travel home
  for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) s.end_backward_step(c, 0, chunk, dy, dx);
  s.add_gate_gradients(c, 0);
}

void ChainLayer::State::begin_backward_step(ChainStorage& c, std::int32_t t, std::int32_t chunk) {
  const Chunk rows = chunk_of(c, chunk);
  ChainStep& step = c.step(t, chunk);
  const ConstMatrixView in = row_range(d_view(t), rows.begin, rows.end);
  GrowArray<float>& weights = dw[static_cast<std::size_t>(chunk)];
  weights.resize(static_cast<std::size_t>(step.state.routing.num_routes()));
  // One chunk is a plain pass; several add up in the order of one.
  moe.start_backward(step.context, in, row_range(moe_out.view(), rows.begin, rows.end), weights,
                     c.num_chunks == 1 ? WeightGradients::kNow : WeightGradients::kLater);
}

void ChainLayer::State::shared_backward(ChainStorage& c, std::int32_t t, const Chunk& rows,
                                        std::int32_t chunk) {
  const ConstMatrixView in = row_range(d_view(t), rows.begin, rows.end);
  const Span span(runtime.recorder(), "shared_expert", "compute", chunk);
  const ComputeTurn turn(*runtime.state().executor);
  const MatrixView h = row_range(shared_hidden(c, t).view(), rows.begin, rows.end);
  const MatrixView wa = row_range(shared_wa[parity(t)].view(), rows.begin, rows.end);
  if (!saves_hidden()) {
    const std::int64_t group_ptr[2] = {0, rows.size()};
    const std::byte* const w1[1] = {shared.w1.data};
    kernels.grouped_gemm_forward({group_ptr, w1}, row_range(input(c, t), rows.begin, rows.end), {},
                                 shared.w1.dtype, shared_pre, activation, h,
                                 row_range(shared_activation.view(), rows.begin, rows.end));
  }
  multiply_backward_input(shared.w2, in, wa);  // u, then w a with w = 1
  kernels.activation_backward(activation, h, wa, ones, unused_dw, h, wa, 0, rows.size());
  multiply_backward_input(shared.w1, h, row_range(shared_out.view(), rows.begin, rows.end));
}

void ChainLayer::State::end_backward_step(ChainStorage& c, std::int32_t t, std::int32_t chunk,
                                          ConstMatrixView dy, MatrixView dx) {
  const Chunk rows = chunk_of(c, chunk);
  ChainStep& step = c.step(t, chunk);
  if (options.shared_ffn > 0) {
    drive();
    shared_backward(c, t, rows, chunk);
  }
  moe.finish(step.context);
  const Span span(runtime.recorder(), "gate_backward", "compute", chunk);
  const ComputeTurn turn(*runtime.state().executor);
  const std::span<float> dlogits(dscores.f32() + rows.begin * num_experts,
                                 static_cast<std::size_t>(rows.size() * num_experts));
  policy.backward(scores_of(c, t, rows), adaptive(c, t), step.state, dw[static_cast<std::size_t>(chunk)],
                  dlogits);
  const MatrixView ds = row_range(dscores.view(), rows.begin, rows.end);
  if (c.path.of_scores.data != nullptr)
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
      const float* more = c.path.of_scores.row_as<float>(i);
      for (std::int64_t e = 0; e < num_experts; ++e) dscores.f32()[i * num_experts + e] += more[e];
    }
  if (c.previous.data != nullptr)
    multiply_backward_input(residual.w, ds, row_range(c.path.of_previous, rows.begin, rows.end));
  gate_out.resize(rows.size(), hidden, DType::kF32);
  if (options.gate == GateKind::kGrap)
    kernels::grap_backward(
        row_range(input(c, t), rows.begin, rows.end),
        row_range(ConstMatrixView(c.scores[static_cast<std::size_t>(t)].view()), rows.begin, rows.end), ds,
        gate_out.view());
  else
    multiply_backward_input(gate(t).w, ds, gate_out.view());

  const MatrixView to = t == 0 ? dx : d[parity(t - 1)].view();
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    load_row(moe_out.view(), i, sum.data());
    add_row(gate_out.view(), i - rows.begin, sum.data());
    if (options.shared_ffn > 0) add_row(shared_out.view(), i, sum.data());
    if (options.residual == ChainResidual::kInner) add_row(d[parity(t)].view(), i, sum.data());
    if (options.residual == ChainResidual::kOuter && t == 0) add_row(dy, i, sum.data());
    store_row(sum.data(), to, i);
    if (t > 0 && dtype != DType::kF32) store_row(sum.data(), d_rows[parity(t - 1)].view(), i);
  }
}

// Of one iteration, all chunks: tokens in their order, whatever the chunks.
void ChainLayer::State::add_expert_gradients(ChainStorage& c, std::int32_t t) {
  if (c.num_chunks == 1) return;  // the pass added them
  if (t == 0)
    for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk) moe.finish_experts(c.step(t, chunk).context);
  drive();
  to_add.clear();
  for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk)
    to_add.push_back(std::move(c.step(t, chunk).context));
  moe.add_weight_gradients(to_add);
  for (std::int32_t chunk = 0; chunk < c.num_chunks; ++chunk)
    c.step(t, chunk).context = std::move(to_add[static_cast<std::size_t>(chunk)]);
}

void ChainLayer::State::add_gate_gradients(ChainStorage& c, std::int32_t t) {
  const Span span(runtime.recorder(), "gate_backward", "compute");
  const ComputeTurn turn(*runtime.state().executor);
  if (options.gate == GateKind::kLinear) multiply_backward_weight(dscores.view(), input(c, t), gate(t).grad);
  if (c.previous.data != nullptr) multiply_backward_weight(dscores.view(), c.previous, residual.grad);
  if (options.shared_ffn == 0) return;
  multiply_backward_weight(d_view(t), shared_wa[parity(t)].view(), shared.grad_w2);
  multiply_backward_weight(shared_hidden(c, t).view(), input(c, t), shared.grad_w1);
}

void ChainLayer::sync_replica_gradients() {
  state_->moe.sync_replica_gradients();
}

ChainLayer::Memory ChainLayer::memory() const {
  const State& s = *state_;
  std::size_t bytes = s.ones.capacity_bytes() + s.unused_dw.capacity_bytes();
  for (const Rows* rows :
       {&s.shared_out, &s.shared_activation, &s.d[0], &s.d[1], &s.d_rows[0], &s.d_rows[1], &s.moe_out,
        &s.gate_out, &s.path_out, &s.dscores, &s.shared_wa[0], &s.shared_wa[1]})
    bytes += rows->memory.capacity_bytes();
  for (const GrowArray<float>& dw : s.dw) bytes += dw.capacity_bytes();
  std::int64_t chain = static_cast<std::int64_t>(bytes);
  for (const auto& storage : s.pool->storages) chain += storage->capacity_bytes();
  return {s.moe.memory(), chain};
}

}  // namespace sluice
