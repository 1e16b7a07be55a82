#include "sluice/runtime/src/train/model.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "sluice/base/hash.hpp"
#include "sluice/base/telemetry.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/runtime_state.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice::train {
namespace {

constexpr std::int64_t kVocabulary = 256;
constexpr float kNormEpsilon = 1e-6f;

// In lanes of fixed order: value i belongs to lane i mod 8, lanes are added ascending at the end.
double sum_of_squares(std::span<const float> values) {
  constexpr std::size_t kLanes = 8;
  double lane[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (std::size_t j = 0; j < kLanes; ++j) lane[j] += double(values[i + j]) * double(values[i + j]);
  for (; i < values.size(); ++i) lane[i % kLanes] += double(values[i]) * double(values[i]);
  double sum = 0;
  for (const double s : lane) sum += s;
  return sum;
}

double mean_over_max(std::span<const double> loads) {
  double sum = 0, max = 0;
  for (const double load : loads) {
    sum += load;
    max = std::max(max, load);
  }
  return max == 0 ? 1 : sum / static_cast<double>(loads.size()) / max;
}

}  // namespace

// ---- shapes ----------------------------------------------------------------------------------------------------------

std::int32_t num_gates(const Config& config) {
  return config.routing.policy == Config::Routing::Policy::kEtr ? 0 : config.model.num_gates();
}

bool has_gate_residual(const Config& config, std::int32_t layer) {
  return config.model.gate_residual && layer > 0;
}

std::vector<ParameterShape> replicated_shapes(const Config& config) {
  const Config::Model& model = config.model;
  const auto fan = [](std::int64_t cols) { return 1 / std::sqrt(static_cast<double>(cols)); };
  const std::int64_t inputs = model.context * model.embed;
  std::vector<ParameterShape> out;
  out.push_back({.name = "embedding", .rows = kVocabulary, .cols = model.embed, .scale = 1});
  out.push_back({.name = "projection", .rows = model.hidden, .cols = inputs, .scale = fan(inputs)});
  for (std::int32_t l = 0; l < model.num_layers; ++l) {
    for (std::int32_t t = 0; t < num_gates(config); ++t)
      out.push_back({.name = gate_name(model, l, t),
                     .layer = l,
                     .rows = model.num_experts,
                     .cols = model.hidden,
                     .scale = fan(model.hidden)});
    // Half the share of the layer's own scores to begin with.
    if (has_gate_residual(config, l))
      out.push_back({.name = str("layer.", l, ".gate_residual"),
                     .layer = l,
                     .rows = model.num_experts,
                     .cols = model.num_experts,
                     .scale = 0.5 * fan(model.num_experts)});
    for (std::int32_t i = 0; i < model.constant_experts; ++i) {
      const std::string name = str("layer.", l, ".constant.", model.num_experts - model.constant_experts + i);
      out.push_back(
          {.name = name + ".w", .layer = l, .rows = 2, .cols = model.hidden, .scale = fan(model.hidden)});
      out.push_back({.name = name + ".v", .layer = l, .rows = 1, .cols = model.hidden, .scale = 0.5});
    }
    if (model.shared_ffn > 0)
      for (ParameterShape& shape : expert_shapes(model, l, -1)) out.push_back(std::move(shape));
  }
  // Small, so that the first predictions are near uniform.
  out.push_back(
      {.name = "head", .rows = kVocabulary, .cols = model.hidden, .scale = 0.25 * fan(model.hidden)});
  for (std::int32_t l = 0; l < model.num_layers; ++l)
    out.push_back({.name = str("layer.", l, ".gain"), .layer = l, .rows = 1, .cols = model.hidden});
  out.push_back({.name = "gain", .rows = 1, .cols = model.hidden});
  return out;
}

std::string gate_name(const Config::Model& model, std::int32_t layer, std::int32_t iteration) {
  const std::string name = str("layer.", layer, ".gate");
  return model.num_gates() == 1 ? name : str(name, ".", iteration);
}

std::array<ParameterShape, 2> expert_shapes(const Config::Model& model, std::int32_t layer,
                                            std::int32_t expert) {
  const std::string prefix =
      expert < 0 ? str("layer.", layer, ".shared") : str("layer.", layer, ".expert.", expert);
  const std::int64_t ffn = expert < 0 ? model.shared_ffn : model.ffn;
  return {ParameterShape{.name = prefix + ".w1",
                         .layer = layer,
                         .expert = expert,
                         .rows = model.activation == Config::Model::Activation::kSwiGLU ? 2 * ffn : ffn,
                         .cols = model.hidden,
                         .scale = 1 / std::sqrt(static_cast<double>(model.hidden))},
          // Blocks add up in the residual stream: the more there are, the smaller each begins.
          ParameterShape{
              .name = prefix + ".w2",
              .layer = layer,
              .expert = expert,
              .rows = model.hidden,
              .cols = ffn,
              .scale = 1 / std::sqrt(static_cast<double>(ffn * model.num_layers * model.chain_iterations))}};
}

void initialize(const ParameterShape& shape, std::int64_t seed, std::span<float> value) {
  if (shape.scale == 0) {
    std::fill(value.begin(), value.end(), 1.0f);
    return;
  }
  const std::uint64_t key = Hasher().add_int(seed).add_text(shape.name).value();
  const double width = shape.scale * std::sqrt(3.0);  // uniform in -width .. width
  for (std::size_t i = 0; i < value.size(); ++i) {
    const std::uint64_t bits = Hasher().add(key).add(i).value();
    value[i] = static_cast<float>(width * (std::ldexp(static_cast<double>(bits >> 11), -52) - 1));
  }
}

// ---- construction ----------------------------------------------------------------------------------------------------

MatrixView Model::Rows::resize(std::int64_t num_rows, std::int64_t num_cols, DType type) {
  memory.resize(static_cast<std::size_t>(num_rows * num_cols) * size_of(type));
  dtype = type;
  rows = num_rows;
  cols = num_cols;
  return view();
}

Model::Model(Runtime& runtime, const Config& config)
    : runtime_(runtime),
      kernels_(runtime.kernels()),
      config_(config),
      hidden_(config.model.hidden),
      num_experts_(config.model.num_experts),
      dtype_(config.model.dtype) {
  const std::int32_t num_layers = config.model.num_layers;
  check_placement_file(config, runtime.topology(), num_layers, runtime.rank() == RankId(0));
  for (std::int32_t l = 0; l < num_layers; ++l) policies_.push_back(policy_of(config, runtime.topology(), l));
  const auto num_batches = static_cast<std::size_t>(num_layers * config.model.chain_iterations);
  adaptive_.resize(policy().adaptive_scope() == AdaptiveScope::kPerLayer ? num_batches : 1);
  for (AdaptiveState& state : adaptive_) state = policy().initial_adaptive_state(config.model.num_experts);

  ChainLayerOptions options = chain_options(config);
  choose_automatically(runtime, config, options.layer);
  wire_dtype_ = options.layer.wire_dtype;
  combine_dtype_ = options.layer.combine_dtype;
  layers_.resize(static_cast<std::size_t>(num_layers));
  for (std::int32_t l = 0; l < num_layers; ++l)
    layers_[static_cast<std::size_t>(l)].moe =
        std::make_unique<ChainLayer>(runtime, placement_of(config, runtime.num_ranks(), l), options,
                                     *policies_[static_cast<std::size_t>(l)]);
  batch_states_.resize(num_batches);
  allocate_parameters();
  set_weights();
}

Model::~Model() = default;

void Model::allocate_parameters() {
  const Config::Model& model = config_.model;
  for (ParameterShape& shape : replicated_shapes(config_)) {
    const std::size_t index = parameters_.size();
    if (shape.name == "embedding") embedding_ = index;
    if (shape.name == "projection") projection_ = index;
    if (shape.name == "head") head_ = index;
    if (shape.name == "gain") final_gain_ = index;
    if (shape.layer >= 0) {
      Layer& layer = layers_[static_cast<std::size_t>(shape.layer)];
      if (shape.scale == 0) layer.gain = index;
      if (shape.name == gate_name(model, shape.layer, 0)) layer.gate = index;
      if (shape.name == expert_shapes(model, shape.layer, -1)[0].name) layer.shared = index;
      if (shape.name == str("layer.", shape.layer, ".gate_residual")) layer.residual = index;
      if (shape.name ==
          str("layer.", shape.layer, ".constant.", model.num_experts - model.constant_experts, ".w"))
        layer.constant = index;
    }
    num_replicated_ += shape.size();
    parameters_.push_back({.shape = std::move(shape)});
  }
  first_expert_ = parameters_.size();
  std::int64_t size = num_replicated_;
  for (std::int32_t l = 0; l < model.num_layers; ++l) {
    const Placement& placement = layers_[static_cast<std::size_t>(l)].moe->placement();
    for (const std::int32_t e : placement.experts_of(runtime_.rank())) {
      const std::int32_t first = placement.slots_of(ExpertId(e)).front();
      for (ParameterShape& shape : expert_shapes(model, l, e)) {
        size += shape.size();
        parameters_.push_back(
            {.shape = std::move(shape),
             .owned = placement.slot_rank[static_cast<std::size_t>(first)] == runtime_.rank().value});
      }
    }
  }
  const auto n = static_cast<std::size_t>(size);
  values_.resize(n);
  gradients_.assign(n, 0.0f);
  m_.assign(n, 0.0f);
  v_.assign(n, 0.0f);
  std::size_t begin = 0;
  for (Parameter& p : parameters_) {
    const auto count = static_cast<std::size_t>(p.shape.size());
    p.value = {values_.data() + begin, count};
    p.gradient = {gradients_.data() + begin, count};
    p.m = {m_.data() + begin, count};
    p.v = {v_.data() + begin, count};
    begin += count;
    initialize(p.shape, config_.train.seed, p.value);
  }
}

void Model::set_weights() {
  const std::int64_t num_expert_values = static_cast<std::int64_t>(values_.size()) - num_replicated_;
  const bool copied = dtype_ != DType::kF32;
  if (copied) {
    copies_.resize(static_cast<std::size_t>(num_expert_values) * size_of(dtype_));
    kernels_.convert_rows({values_.data() + num_replicated_, 1, num_expert_values},
                          {copies_.data(), dtype_, 1, num_expert_values, num_expert_values});
  }
  const auto view = [&](const Parameter& p) -> ConstMatrixView {
    const std::byte* data = reinterpret_cast<const std::byte*>(p.value.data());
    if (copied)
      data = copies_.data() + (p.value.data() - values_.data() - num_replicated_) *
                                  static_cast<std::ptrdiff_t>(size_of(dtype_));
    return {data, dtype_, p.shape.rows, p.shape.cols, p.shape.cols};
  };
  std::size_t next = first_expert_;
  for (Layer& layer : layers_) {
    std::vector<ExpertWeights> slots;
    for (std::int32_t i = 0; i < layer.moe->placement().num_slots_of(runtime_.rank()); ++i, next += 2) {
      const Parameter &w1 = parameters_[next], &w2 = parameters_[next + 1];
      slots.push_back({view(w1), view(w2), w1.gradient.data(), w2.gradient.data()});
    }
    std::vector<GateWeights> gates;
    for (std::size_t i = layer.gate; i < layer.gate + static_cast<std::size_t>(num_gates(config_)); ++i)
      gates.push_back({weight(i), parameters_[i].gradient.data()});
    std::vector<ConstantExpertWeights> constants;
    for (std::size_t i = 0; i < static_cast<std::size_t>(config_.model.constant_experts); ++i) {
      const std::size_t w = layer.constant + 2 * i;
      constants.push_back(
          {weight(w), weight(w + 1), parameters_[w].gradient.data(), parameters_[w + 1].gradient.data()});
    }
    for (ChainLayer* moe : {layer.moe.get(), layer.other.get()}) {
      if (!moe) continue;
      moe->set_weights(slots);
      moe->set_gates(gates);
      moe->set_constant_experts(constants);
      if (layer.residual != 0)
        moe->set_gate_residual({weight(layer.residual), parameters_[layer.residual].gradient.data()});
      if (config_.model.shared_ffn > 0)
        moe->set_shared_expert({weight(layer.shared), weight(layer.shared + 1),
                                parameters_[layer.shared].gradient.data(),
                                parameters_[layer.shared + 1].gradient.data()});
    }
  }
}

void Model::add_schedule(const ScheduleOptions& schedule, std::int32_t chain_chunks) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    ChainLayerOptions options = layer.moe->options();
    options.layer.schedule = schedule;
    options.layer.auto_profile = nullptr;
    options.num_chunks = chain_chunks;
    layer.other = std::make_unique<ChainLayer>(runtime_, layer.moe->placement(), options, *policies_[l]);
  }
  set_weights();
}

void Model::swap_schedules() {
  for (Layer& layer : layers_) layer.moe.swap(layer.other);
}

std::span<const AdaptiveState> Model::adaptive_of(std::size_t layer) const {
  if (policy().adaptive_scope() != AdaptiveScope::kPerLayer) return adaptive_;
  const auto iterations = static_cast<std::size_t>(config_.model.chain_iterations);
  return std::span(adaptive_).subspan(layer * iterations, iterations);
}

const AdaptiveState& Model::adaptive(std::int32_t layer, std::int32_t iteration) const {
  const std::span<const AdaptiveState> states = adaptive_of(static_cast<std::size_t>(layer));
  return states[states.size() == 1 ? 0 : static_cast<std::size_t>(iteration)];
}

void Model::restored(std::vector<AdaptiveState> adaptive) {
  Require(adaptive.size() == adaptive_.size(), ErrorCode::kInvalidArgument, "section adaptive: expected ",
          adaptive_.size(), " states of policy ", policy().name(), ", seen ", adaptive.size());
  for (std::size_t i = 0; i < adaptive.size(); ++i)
    Require(adaptive[i].values.size() == adaptive_[i].values.size(), ErrorCode::kInvalidArgument,
            "section adaptive: state ", i, ": expected ", adaptive_[i].values.size(), " values, seen ",
            adaptive[i].values.size());
  adaptive_ = std::move(adaptive);
  set_weights();  // the experts' copies in another dtype follow the masters
}

std::span<const float> Model::scores(std::int32_t layer, std::int32_t iteration) const {
  return layers_[static_cast<std::size_t>(layer)].context.scores(iteration);
}

RoutingView Model::routing(std::int32_t layer, std::int32_t iteration) const {
  const ChainContext& context = layers_[static_cast<std::size_t>(layer)].context;
  Require(context.num_chunks() == 1, ErrorCode::kNotSupported, "routing of a batch in ", context.num_chunks(),
          " chunks cannot be told; set schedule.chain_chunks to 1");
  return context.policy_state(iteration).routing;
}

std::int64_t Model::parameter_bytes() const {
  return static_cast<std::int64_t>(values_.capacity_bytes() + gradients_.capacity_bytes() +
                                   m_.capacity_bytes() + v_.capacity_bytes() + copies_.capacity_bytes());
}

std::int64_t Model::activation_bytes() const {
  std::size_t bytes = final_norm_.inverse.capacity_bytes();
  for (const Rows* rows : {&embedded_, &x_, &final_x_, &final_norm_.normalized, &logits_, &dnormalized_,
                           &drows_, &dscores_[0], &dscores_[1], &dembedded_})
    bytes += rows->memory.capacity_bytes();
  for (const Layer& layer : layers_)
    bytes += layer.x.memory.capacity_bytes() + layer.norm.normalized.memory.capacity_bytes() +
             layer.norm.inverse.capacity_bytes() + layer.y.memory.capacity_bytes();
  return static_cast<std::int64_t>(bytes);
}

std::int64_t Model::layer_bytes() const {
  std::int64_t bytes = kernels_.scratch_bytes();  // one for all layers
  for (const Layer& layer : layers_) {
    const ChainLayer::Memory memory = layer.moe->memory();
    bytes += memory.layer.contexts + memory.layer.plans + memory.chain;
  }
  return bytes;
}

// ---- dense parts -----------------------------------------------------------------------------------------------------

ConstMatrixView Model::weight(std::size_t parameter) const {
  const Parameter& p = parameters_[parameter];
  return {p.value.data(), p.shape.rows, p.shape.cols};
}

void Model::multiply(std::size_t parameter, ConstMatrixView a, MatrixView out) {
  const ConstMatrixView w = weight(parameter);
  const std::int64_t group_ptr[2] = {0, a.rows};
  const std::byte* const data[1] = {w.data};
  kernels_.grouped_gemm_forward({group_ptr, data}, a, {}, DType::kF32, w.rows, kernels::Activation::kRelu,
                                out, {});
}

void Model::multiply_backward_input(std::size_t parameter, ConstMatrixView dc, MatrixView da) {
  const ConstMatrixView w = weight(parameter);
  const std::int64_t group_ptr[2] = {0, dc.rows};
  const std::byte* const data[1] = {w.data};
  kernels_.grouped_gemm_dgrad({group_ptr, data}, dc, {}, DType::kF32, da);
}

void Model::multiply_backward_weight(std::size_t parameter, ConstMatrixView dc, ConstMatrixView a) {
  const std::int64_t group_ptr[2] = {0, dc.rows};
  float* const gradient[1] = {parameters_[parameter].gradient.data()};
  kernels_.grouped_gemm_wgrad(group_ptr, dc, {}, a, {}, gradient);
}

void Model::norm_forward(std::size_t gain, const Rows& x, Norm& norm, DType dtype) {
  const float* g = parameters_[gain].value.data();
  norm.inverse.resize(static_cast<std::size_t>(x.rows));
  // bf16 rows are formed in f32 and rounded once.
  Rows& out = dtype == DType::kF32 ? norm.normalized : dnormalized_;
  out.resize(x.rows, hidden_, DType::kF32);
  for (std::int64_t t = 0; t < x.rows; ++t) {
    const float* in = x.f32() + t * hidden_;
    float* to = out.f32() + t * hidden_;
    float squares = 0;
    for (std::int64_t i = 0; i < hidden_; ++i) squares += in[i] * in[i];
    const float inverse = 1 / std::sqrt(squares / static_cast<float>(hidden_) + kNormEpsilon);
    norm.inverse[static_cast<std::size_t>(t)] = inverse;
    for (std::int64_t i = 0; i < hidden_; ++i) to[i] = in[i] * inverse * g[i];
  }
  if (dtype != DType::kF32) kernels_.convert_rows(out.view(), norm.normalized.resize(x.rows, hidden_, dtype));
}

// With s = 1/sqrt(mean(x^2) + eps):  dx_i = s g_i d_i - x_i s^3 / hidden * sum_j g_j d_j x_j;  dg_i = sum_t d_i x_i s
void Model::norm_backward(std::size_t gain, const Rows& x, const Norm& norm, const Rows& dnormalized,
                          Rows& dx) {
  const float* g = parameters_[gain].value.data();
  float* dg = parameters_[gain].gradient.data();
  for (std::int64_t t = 0; t < x.rows; ++t) {
    const float* in = x.f32() + t * hidden_;
    const float* d = dnormalized.f32() + t * hidden_;
    float* out = dx.f32() + t * hidden_;
    const float s = norm.inverse[static_cast<std::size_t>(t)];
    float dot = 0;
    for (std::int64_t i = 0; i < hidden_; ++i) dot += g[i] * d[i] * in[i];
    const float along = dot * s * s * s / static_cast<float>(hidden_);
    for (std::int64_t i = 0; i < hidden_; ++i) {
      out[i] += s * g[i] * d[i] - in[i] * along;
      dg[i] += d[i] * in[i] * s;
    }
  }
}

// ---- forward ---------------------------------------------------------------------------------------------------------

double Model::forward(const Batch& batch, bool training) {
  const std::int64_t n = batch.num_tokens();
  const std::int64_t context = config_.model.context, embed = config_.model.embed;
  Require(batch.context.size() == batch.target.size() * static_cast<std::size_t>(context),
          ErrorCode::kInvalidArgument, "batch.context has ", batch.context.size(), " entries for ", n,
          " tokens of ", context, " bytes each");
  bool finite = true;
  {
    const Span span(runtime_.recorder(), "embed", "compute");
    embedded_.resize(n, context * embed, DType::kF32);
    kernels_.gather_rows(weight(embedding_), {}, batch.context,
                         {embedded_.memory.data(), DType::kF32, n * context, embed, embed});
    multiply(projection_, embedded_.view(), layers_.front().x.resize(n, hidden_, DType::kF32));
  }
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    {
      const Span span(runtime_.recorder(), "gate", "compute");
      norm_forward(layer.gain, layer.x, layer.norm, dtype_);
    }
    layer.context = ChainContext();  // gives back what the last batch kept
    ConstMatrixView previous;
    if (layer.residual != 0) previous = {layers_[l - 1].context.scores(0).data(), n, num_experts_};
    layer.context = layer.moe->forward(layer.norm.normalized.view(), layer.y.resize(n, hidden_, dtype_),
                                       adaptive_of(l), training, previous);
    // A score that is not finite voids the step on all ranks alike: the loss says so.
    finite = finite && layer.context.all_finite();
    Rows& next = l + 1 < layers_.size() ? layers_[l + 1].x : final_x_;
    next.resize(n, hidden_, DType::kF32);
    const float* x = layer.x.f32();
    float* to = next.f32();
    if (dtype_ == DType::kF32) {
      const float* y = layer.y.f32();
      for (std::int64_t i = 0; i < n * hidden_; ++i) to[i] = x[i] + y[i];
    } else {
      kernels_.convert_rows(layer.y.view(), next.view());
      for (std::int64_t i = 0; i < n * hidden_; ++i) to[i] = x[i] + to[i];
    }
  }
  const Span span(runtime_.recorder(), "head", "compute");
  norm_forward(final_gain_, final_x_, final_norm_, DType::kF32);
  multiply(head_, final_norm_.normalized.view(), logits_.resize(n, kVocabulary, DType::kF32));

  // Softmax and its gradient, (p - [c = target]) / T, in place.
  double loss = 0;
  const float scale = batch.num_global_tokens > 0 ? 1 / static_cast<float>(batch.num_global_tokens) : 0;
  for (std::int64_t t = 0; t < n; ++t) {
    float* z = logits_.f32() + t * kVocabulary;
    const std::int32_t target = batch.target[static_cast<std::size_t>(t)];
    const float max = *std::max_element(z, z + kVocabulary), wanted = z[target];
    float sum = 0;
    for (std::int64_t c = 0; c < kVocabulary; ++c) sum += z[c] = std::exp(z[c] - max);
    loss += std::log(double(sum)) + (double(max) - double(wanted));
    if (!training) continue;
    const float factor = scale / sum;
    for (std::int64_t c = 0; c < kVocabulary; ++c) z[c] *= factor;
    z[target] -= scale;
  }
  return finite ? loss : std::numeric_limits<double>::quiet_NaN();
}

double Model::evaluate(const Batch& batch) {
  return forward(batch, false);
}

// ---- backward --------------------------------------------------------------------------------------------------------

void Model::backward(const Batch& batch) {
  const std::int64_t n = batch.num_tokens();
  SpanRecorder* const recorder = runtime_.recorder();
  {
    const Span span(recorder, "head_backward", "compute");
    multiply_backward_weight(head_, logits_.view(), final_norm_.normalized.view());
    multiply_backward_input(head_, logits_.view(), dnormalized_.resize(n, hidden_, DType::kF32));
    x_.resize(n, hidden_, DType::kF32);
    std::fill_n(x_.f32(), n * hidden_, 0.0f);
    norm_backward(final_gain_, final_x_, final_norm_, dnormalized_, x_);
  }
  for (std::size_t l = layers_.size(); l-- > 0;) {
    Layer& layer = layers_[l];
    ConstMatrixView dy = x_.view();
    if (dtype_ != DType::kF32) {
      kernels_.convert_rows(x_.view(), drows_.resize(n, hidden_, dtype_));
      dy = drows_.view();
    }
    ScoreGradients path;
    if (l + 1 < layers_.size() && layers_[l + 1].residual != 0) path.of_scores = dscores_[(l + 1) % 2].view();
    if (layer.residual != 0) path.of_previous = dscores_[l % 2].resize(n, num_experts_, DType::kF32);
    layer.moe->backward(layer.context, dy, dnormalized_.resize(n, hidden_, DType::kF32), path);
    const Span span(recorder, "gate_backward", "compute");
    count_movement(layer);
    norm_backward(layer.gain, layer.x, layer.norm, dnormalized_, x_);
  }
  const Span span(recorder, "embed_backward", "compute");
  const std::int64_t context = config_.model.context, embed = config_.model.embed;
  multiply_backward_weight(projection_, x_.view(), embedded_.view());
  multiply_backward_input(projection_, x_.view(), dembedded_.resize(n, context * embed, DType::kF32));
  float* gradient = parameters_[embedding_].gradient.data();
  for (std::int64_t i = 0; i < n * context; ++i) {
    float* row = gradient + batch.context[static_cast<std::size_t>(i)] * embed;
    const float* d = dembedded_.f32() + i * embed;
    for (std::int64_t j = 0; j < embed; ++j) row[j] += d[j];
  }
}

void Model::count_movement(Layer& layer) {
  layer.num_positions = 0;
  for (std::int32_t t = 0; t < config_.model.chain_iterations; ++t)
    for (std::int32_t chunk = 0; chunk < layer.context.num_chunks(); ++chunk) {
      const Plan& plan = layer.context.plan(t, chunk);
      layer.num_positions += plan.num_positions();
      count_movement(plan);
    }
}

void Model::count_movement(const Plan& plan) {
  movement_.rows += plan.traffic;
  const auto wire = static_cast<std::int64_t>(size_of(wire_dtype_)),
             sums = static_cast<std::int64_t>(size_of(combine_dtype_));
  const std::int64_t row_bytes = 2 * hidden_ * (wire + sums), route_bytes = sizeof(float);
  // In node, across nodes.
  std::int64_t sent[2] = {0, 0}, received[2] = {0, 0}, sent_routes[2] = {0, 0};
  const auto count = [&](const std::vector<Segment>& segments, std::int64_t* rows, std::int64_t* routes) {
    for (const Segment& segment : segments) {
      if (segment.peer == plan.rank.value) continue;
      const int level = runtime_.topology().same_node(plan.rank, RankId(segment.peer)) ? 0 : 1;
      rows[level] += segment.num_rows;
      if (routes) routes[level] += segment.num_routes;
    }
  };
  count(plan.send1.segments, sent, sent_routes);
  count(plan.send2.segments, sent, sent_routes);
  count(plan.recv1.segments, received, nullptr);
  count(plan.recv2.segments, received, nullptr);
  // Out: dispatched rows and returned sums; in: the other way round. Forward and backward.
  const auto link = [&](int level) {
    return 2 * hidden_ *
           (std::max(sent[level], received[level]) * std::max(wire, sums) +
            std::min(sent[level], received[level]) * std::min(wire, sums));
  };
  movement_.in_node_link_bytes += link(0);
  movement_.across_nodes_link_bytes += link(1);
  movement_.in_node_bytes += plan.traffic.rows_in_node * row_bytes + sent_routes[0] * route_bytes;
  movement_.across_nodes_bytes += plan.traffic.rows_across_nodes * row_bytes + sent_routes[1] * route_bytes;
  movement_.flat_in_node_bytes += plan.traffic.flat_rows_in_node * (row_bytes + route_bytes);
  movement_.flat_across_nodes_bytes += plan.traffic.flat_rows_across_nodes * (row_bytes + route_bytes);
}

// ---- step ------------------------------------------------------------------------------------------------------------

StepResult Model::compute_gradients(const Batch& batch) {
  StepResult result;
  movement_ = {};
  std::fill(gradients_.begin(), gradients_.end(), 0.0f);
  const double loss = forward(batch, true);

  // The loss, and what the policies want summed, in one exchange.
  {
    const Span span(runtime_.recorder(), "exchange_policy", "host");
    sums_.assign(1, loss);
    for (Layer& layer : layers_) {
      const std::span<double> pending = layer.moe->pending_sums(layer.context);
      sums_.insert(sums_.end(), pending.begin(), pending.end());
    }
    runtime_.all_reduce_sum(std::span<double>(sums_), "loss and policy");
  }
  result.loss = sums_[0] / static_cast<double>(batch.num_global_tokens);
  auto next = sums_.begin() + 1;
  std::size_t num_batches = 0;
  for (Layer& layer : layers_) {
    const std::span<double> pending = layer.moe->pending_sums(layer.context);
    std::copy_n(next, pending.size(), pending.begin());
    next += static_cast<std::ptrdiff_t>(pending.size());
    layer.moe->settle(layer.context);
    for (std::int32_t t = 0; t < config_.model.chain_iterations; ++t) {
      const PolicyState& state = *(batch_states_[num_batches++] = &layer.context.policy_state(t));
      result.mean_active += state.statistics.mean_active() / static_cast<double>(batch_states_.size());
      result.min_active = num_batches == 1 ? state.statistics.min_active
                                           : std::min(result.min_active, state.statistics.min_active);
      result.max_active = std::max(result.max_active, state.statistics.max_active);
    }
  }
  add_figures(result);
  if (!std::isfinite(result.loss)) {  // on all ranks alike
    for (Layer& layer : layers_) layer.context = ChainContext();
    return result;
  }
  backward(batch);
  finish_step(result);
  return result;
}

void Model::add_figures(StepResult& result) const {
  const std::span<const PolicyFigure> figures = policy().figures();
  result.figures.assign(figures.size(), 0.0);
  double tokens = 0, routes = 0;
  for (const PolicyState* state : batch_states_) {
    tokens += static_cast<double>(state->statistics.num_tokens);
    routes += static_cast<double>(state->statistics.num_routes);
    for (std::size_t i = 0; i < figures.size(); ++i) result.figures[i] += state->statistics.sums[i];
  }
  for (std::size_t i = 0; i < figures.size(); ++i)
    result.figures[i] /= std::max(1.0, figures[i].per_route ? routes : tokens);
}

void Model::finish_step(StepResult& result) {
  const Span span(runtime_.recorder(), "gradient_sums", "host");
  runtime_.all_reduce_sum({gradients_.data(), static_cast<std::size_t>(num_replicated_)}, "gradients");
  for (Layer& layer : layers_) layer.moe->sync_replica_gradients();

  // One exchange: the auxiliary losses, each rank's load by layer, and the squares of each expert's gradient, which its
  // owner alone gives, so that their sum has one order wherever experts live.
  const auto num_ranks = static_cast<std::size_t>(runtime_.num_ranks());
  const auto num_ffn = static_cast<std::size_t>(config_.model.num_ffn_experts());
  const std::size_t loads = 1, squares = loads + layers_.size() * num_ranks;
  sums_.assign(squares + layers_.size() * num_ffn, 0.0);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    sums_[0] += layers_[l].context.auxiliary_loss();
    sums_[loads + l * num_ranks + runtime_.rank().index()] = static_cast<double>(layers_[l].num_positions);
  }
  for (const Parameter& p : parameters_)
    if (p.shape.expert >= 0 && p.owned)
      sums_[squares + static_cast<std::size_t>(p.shape.layer) * num_ffn +
            static_cast<std::size_t>(p.shape.expert)] += sum_of_squares(p.gradient);
  runtime_.all_reduce_sum(std::span<double>(sums_), "gradient norm");

  result.auxiliary = sums_[0];
  double norm = 0;
  for (std::size_t i = 0; i < first_expert_; ++i) norm += sum_of_squares(parameters_[i].gradient);
  for (std::size_t i = squares; i < sums_.size(); ++i) norm += sums_[i];
  result.grad_norm = std::sqrt(norm);

  const double share = 1 / static_cast<double>(layers_.size());
  for (std::size_t l = 0; l < layers_.size(); ++l)
    result.rank_balance += share * mean_over_max({sums_.data() + loads + l * num_ranks, num_ranks});
  for (const PolicyState* state : batch_states_) {
    double sum = 0, max = 0;
    for (std::size_t e = 0; e < num_ffn; ++e) {
      const auto tokens = static_cast<double>(state->statistics.tokens_of_expert[e]);
      sum += tokens;
      max = std::max(max, tokens);
    }
    result.expert_balance +=
        (max == 0 ? 1 : sum / static_cast<double>(num_ffn) / max) / static_cast<double>(batch_states_.size());
  }
}

void Model::update(const kernels::AdamW& options, double clip, double grad_norm) {
  const Span span(runtime_.recorder(), "optimizer", "compute");
  if (clip > 0 && grad_norm > clip) {
    const auto factor = static_cast<float>(clip / grad_norm);
    for (float& g : gradients_) g *= factor;
  }
  kernels::AdamW undecayed = options;
  undecayed.weight_decay = 0;
  for (const Parameter& p : parameters_) {
    MatrixView copy;
    if (p.shape.expert >= 0 && dtype_ != DType::kF32) {
      const std::ptrdiff_t at = p.value.data() - values_.data() - num_replicated_;
      copy = {copies_.data() + at * static_cast<std::ptrdiff_t>(size_of(dtype_)), dtype_, 1, p.shape.size(),
              p.shape.size()};
    }
    kernels_.adamw(p.shape.decayed() ? options : undecayed, p.value, p.gradient, p.m, p.v, copy);
  }
  if (runtime_.state().device) set_weights();  // a device has copies
  const std::span<const PolicyState* const> states(batch_states_);
  if (policy().adaptive_scope() == AdaptiveScope::kShared) policy().adapt(states, adaptive_[0]);
  if (policy().adaptive_scope() == AdaptiveScope::kPerLayer)
    for (std::size_t i = 0; i < states.size(); ++i) policy().adapt(states.subspan(i, 1), adaptive_[i]);
}

}  // namespace sluice::train
