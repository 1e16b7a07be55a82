#include "sluice/runtime/src/train/check.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>

#include "sluice/base/text_table.hpp"
#include "sluice/runtime/src/gather.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/train/model.hpp"
#include "sluice/runtime/src/train/trainer.hpp"

namespace sluice::train {
namespace {

constexpr std::int64_t kSteps = 3;
constexpr double kReferenceFlops = 1.5e9;  // of one step of the reference

using Values = std::vector<double>;

std::span<const char> as_chars(std::span<const float> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size_bytes()};
}

double norm_of(const Values& v) {
  double sum = 0;
  for (const double x : v) sum += x * x;
  return std::sqrt(sum);
}

// ---- the reference ---------------------------------------------------------------------------------------------------

struct Weight {
  ParameterShape shape;
  Values value, gradient, m, v;
};

// out[t] = W a[t]; a: [n, cols], out: [n, rows]
Values times(const Weight& w, const Values& a) {
  const auto rows = static_cast<std::size_t>(w.shape.rows), cols = static_cast<std::size_t>(w.shape.cols);
  const std::size_t n = a.size() / cols;
  Values out(n * rows, 0.0);
  for (std::size_t t = 0; t < n; ++t)
    for (std::size_t o = 0; o < rows; ++o)
      for (std::size_t i = 0; i < cols; ++i) out[t * rows + o] += w.value[o * cols + i] * a[t * cols + i];
  return out;
}

// Adds to W's gradient and to da what d (of W a) means for them.
void times_backward(Weight& w, const Values& a, const Values& d, Values& da) {
  const auto rows = static_cast<std::size_t>(w.shape.rows), cols = static_cast<std::size_t>(w.shape.cols);
  for (std::size_t t = 0; t < a.size() / cols; ++t)
    for (std::size_t o = 0; o < rows; ++o) {
      const double g = d[t * rows + o];
      if (g == 0) continue;  // not routed
      for (std::size_t i = 0; i < cols; ++i) {
        w.gradient[o * cols + i] += g * a[t * cols + i];
        da[t * cols + i] += g * w.value[o * cols + i];
      }
    }
}

Values norm_forward(const Weight& gain, const Values& x) {
  const std::size_t h = gain.value.size();
  Values out(x.size());
  for (std::size_t t = 0; t < x.size() / h; ++t) {
    double squares = 0;
    for (std::size_t i = 0; i < h; ++i) squares += x[t * h + i] * x[t * h + i];
    const double s = 1 / std::sqrt(squares / double(h) + 1e-6);
    for (std::size_t i = 0; i < h; ++i) out[t * h + i] = gain.value[i] * x[t * h + i] * s;
  }
  return out;
}

void norm_backward(Weight& gain, const Values& x, const Values& d, Values& dx) {
  const std::size_t h = gain.value.size();
  for (std::size_t t = 0; t < x.size() / h; ++t) {
    double squares = 0, along = 0;
    for (std::size_t i = 0; i < h; ++i) squares += x[t * h + i] * x[t * h + i];
    const double s = 1 / std::sqrt(squares / double(h) + 1e-6);
    for (std::size_t i = 0; i < h; ++i) along += gain.value[i] * d[t * h + i] * x[t * h + i];
    for (std::size_t i = 0; i < h; ++i) {
      dx[t * h + i] += s * (gain.value[i] * d[t * h + i] - x[t * h + i] * along * s * s / double(h));
      gain.gradient[i] += d[t * h + i] * x[t * h + i] * s;
    }
  }
}

// Value and derivatives of one activation: a = f(z) for non-gated, a = silu(z) * up for gated.
struct ActivationValue {
  double a, dz, dup;
};
ActivationValue activation(Config::Model::Activation kind, double z, double up) {
  switch (kind) {
    case Config::Model::Activation::kSwiGLU: {
      const double s = 1 / (1 + std::exp(-z));
      return {z * s * up, (s + z * s * (1 - s)) * up, z * s};
    }
    case Config::Model::Activation::kGelu: {
      const double c = std::sqrt(2 / std::numbers::pi), th = std::tanh(c * (z + 0.044715 * z * z * z));
      return {0.5 * z * (1 + th), 0.5 * (1 + th) + 0.5 * z * (1 - th * th) * c * (1 + 3 * 0.044715 * z * z),
              0};
    }
    case Config::Model::Activation::kRelu:
      return {std::max(z, 0.0), z > 0 ? 1.0 : 0.0, 0};
  }
  return {};
}

// GrAP: cosines with the indicator of each slice.
Values affinities(const Values& x, std::size_t h, std::size_t num_experts) {
  const std::size_t width = h / num_experts;
  Values out(x.size() / width, 0.0);
  for (std::size_t t = 0; t < x.size() / h; ++t) {
    double squares = 0;
    for (std::size_t i = 0; i < h; ++i) {
      squares += x[t * h + i] * x[t * h + i];
      out[t * num_experts + i / width] += x[t * h + i];
    }
    for (std::size_t e = 0; e < num_experts; ++e)
      out[t * num_experts + e] /= std::sqrt(double(width) * std::max(squares, 1e-300));
  }
  return out;
}

void affinities_backward(const Values& x, std::size_t h, std::size_t num_experts, const Values& d,
                         Values& dx) {
  const std::size_t width = h / num_experts;
  const Values value = affinities(x, h, num_experts);
  for (std::size_t t = 0; t < x.size() / h; ++t) {
    double squares = 0, along = 0;
    for (std::size_t i = 0; i < h; ++i) squares += x[t * h + i] * x[t * h + i];
    for (std::size_t e = 0; e < num_experts; ++e)
      along += d[t * num_experts + e] * value[t * num_experts + e];
    for (std::size_t i = 0; i < h; ++i)
      dx[t * h + i] += d[t * num_experts + i / width] / std::sqrt(double(width) * squares) -
                       along * x[t * h + i] / squares;
  }
}

class DenseReference {
 public:
  DenseReference(const Config& config, const Topology& topology) : config_(config) {
    for (std::int32_t l = 0; l < config.model.num_layers; ++l)
      policies_.push_back(policy_of(config, topology, l));
    // As BatchReader deals them.
    const std::int64_t n = config.train.tokens_per_step, ranks = topology.num_ranks();
    for (std::int64_t r = 0; r < ranks; ++r)
      rank_of_token_.resize(static_cast<std::size_t>(n * (r + 1) / ranks), static_cast<std::int32_t>(r));
    const auto add = [&](const ParameterShape& shape) {
      const auto n = static_cast<std::size_t>(shape.size());
      std::vector<float> initial(n);
      initialize(shape, config.train.seed, initial);
      weights_[shape.name] = {shape, Values(initial.begin(), initial.end()), Values(n), Values(n), Values(n)};
    };
    for (const ParameterShape& shape : replicated_shapes(config)) add(shape);
    for (std::int32_t l = 0; l < config.model.num_layers; ++l)
      for (std::int32_t e = 0; e < config.model.num_ffn_experts(); ++e)
        for (const ParameterShape& shape : expert_shapes(config.model, l, e)) add(shape);
  }

  std::map<std::string, Weight>& weights() { return weights_; }

  // Loss with auxiliary losses; gradients into the weights. scores: f32 [num_tokens, num_experts], the model's, one for
  // each iteration of each layer, as adaptive; score_error becomes the largest difference of the reference's own.
  double step(const Batch& batch, const std::vector<std::vector<float>>& scores,
              const std::vector<AdaptiveState>& adaptive, double& score_error);

  // AdamW from `gradients` by name, clipped.
  void update(const kernels::AdamW& options, double clip, std::map<std::string, Values> gradients);

 private:
  struct Expert {
    Values z, a, out;  // [n, pre], [n, ffn], [n, hidden]
  };
  // One iteration over the experts.
  struct Round {
    Values x, y, weight;  // weight: [n, num_experts], 0 where not routed
    std::vector<Expert> experts;
    Expert shared;
    PolicyState state;
    std::vector<float> scores;
    Values dscores;  // of all that used them
  };
  struct Block {
    Values x;  // before the norm
    std::vector<Round> rounds;
  };
  Weight& at(const std::string& name) { return weights_.at(name); }
  Weight& at(std::size_t layer, const std::string& name) { return at(str("layer.", layer, ".", name)); }
  ExpertKind kind(std::size_t e) const {
    const Config::Model& m = config_.model;
    const auto i = static_cast<std::int32_t>(e) - m.num_ffn_experts();
    return i < 0                                 ? ExpertKind::kFFN
           : i < m.zero_experts                  ? ExpertKind::kZero
           : i < m.zero_experts + m.copy_experts ? ExpertKind::kCopy
                                                 : ExpertKind::kConstant;
  }
  Scores view_of(const Round& round) const {
    return {round.scores, static_cast<std::int64_t>(rank_of_token_.size()), config_.model.num_experts, 0,
            rank_of_token_};
  }
  void constant_backward(std::size_t layer, std::size_t expert, const Values& x, const Values& dout,
                         Values& dx);
  // Of the weights `name`.w1 and .w2. x: [n, hidden]
  void ffn_forward(std::size_t layer, const std::string& name, const Values& x, Expert& expert);
  void ffn_backward(std::size_t layer, const std::string& name, const Values& x, const Expert& expert,
                    const Values& dout, Values& dx);
  void experts_forward(std::size_t layer, Round& round);
  void experts_backward(std::size_t layer, Round& round, const Values& dy, Values& dx, Values& dweight);

  const Config& config_;
  std::vector<std::unique_ptr<SelectionPolicy>> policies_;  // [num_layers]
  std::map<std::string, Weight> weights_;
  std::vector<std::int32_t> rank_of_token_;
};

void DenseReference::ffn_forward(std::size_t layer, const std::string& name, const Values& x,
                                 Expert& expert) {
  const auto n = x.size() / static_cast<std::size_t>(config_.model.hidden);
  expert.z = times(at(layer, name + ".w1"), x);
  const auto f = static_cast<std::size_t>(at(layer, name + ".w2").shape.cols);
  const std::size_t pre = expert.z.size() / n;
  expert.a.resize(n * f);
  for (std::size_t t = 0; t < n; ++t)
    for (std::size_t i = 0; i < f; ++i)
      expert.a[t * f + i] =
          activation(config_.model.activation, expert.z[t * pre + i], pre > f ? expert.z[t * pre + f + i] : 0)
              .a;
  expert.out = times(at(layer, name + ".w2"), expert.a);
}

void DenseReference::ffn_backward(std::size_t layer, const std::string& name, const Values& x,
                                  const Expert& expert, const Values& dout, Values& dx) {
  const auto n = x.size() / static_cast<std::size_t>(config_.model.hidden);
  const auto f = static_cast<std::size_t>(at(layer, name + ".w2").shape.cols);
  Values da(n * f, 0.0);
  times_backward(at(layer, name + ".w2"), expert.a, dout, da);
  const std::size_t pre = expert.z.size() / n;
  Values dz(n * pre);
  for (std::size_t t = 0; t < n; ++t)
    for (std::size_t i = 0; i < f; ++i) {
      const ActivationValue v = activation(config_.model.activation, expert.z[t * pre + i],
                                           pre > f ? expert.z[t * pre + f + i] : 0);
      dz[t * pre + i] = da[t * f + i] * v.dz;
      if (pre > f) dz[t * pre + f + i] = da[t * f + i] * v.dup;
    }
  times_backward(at(layer, name + ".w1"), x, dz, dx);
}

// softmax of two
std::array<double, 2> mix_of(const Values& z, std::size_t token) {
  const double a = std::exp(z[2 * token]), b = std::exp(z[2 * token + 1]);
  return {a / (a + b), b / (a + b)};
}

void DenseReference::constant_backward(std::size_t layer, std::size_t expert, const Values& x,
                                       const Values& dout, Values& dx) {
  Weight &w = at(layer, str("constant.", expert, ".w")), &v = at(layer, str("constant.", expert, ".v"));
  const std::size_t h = v.value.size(), n = x.size() / h;
  const Values z = times(w, x);
  Values dz(2 * n, 0.0);
  for (std::size_t t = 0; t < n; ++t) {
    const auto mix = mix_of(z, t);
    double of_x = 0, of_v = 0;
    for (std::size_t i = 0; i < h; ++i) {
      const double d = dout[t * h + i];
      of_x += d * x[t * h + i];
      of_v += d * v.value[i];
      dx[t * h + i] += mix[0] * d;
      v.gradient[i] += mix[1] * d;
    }
    dz[2 * t] = mix[0] * mix[1] * (of_x - of_v);
    dz[2 * t + 1] = -dz[2 * t];
  }
  times_backward(w, x, dz, dx);
}

void DenseReference::experts_forward(std::size_t layer, Round& round) {
  const auto h = static_cast<std::size_t>(config_.model.hidden);
  const auto num_experts = static_cast<std::size_t>(config_.model.num_experts), n = round.x.size() / h;
  round.y.assign(n * h, 0.0);
  round.experts.resize(num_experts);
  for (std::size_t e = 0; e < num_experts; ++e) {
    Expert& expert = round.experts[e];
    if (kind(e) == ExpertKind::kZero) expert.out.assign(n * h, 0.0);
    if (kind(e) == ExpertKind::kCopy) expert.out = round.x;
    if (kind(e) == ExpertKind::kConstant) {
      const Values z = times(at(layer, str("constant.", e, ".w")), round.x);
      const Values& v = at(layer, str("constant.", e, ".v")).value;
      expert.out.resize(n * h);
      for (std::size_t t = 0; t < n; ++t)
        for (std::size_t i = 0; i < h; ++i)
          expert.out[t * h + i] = mix_of(z, t)[0] * round.x[t * h + i] + mix_of(z, t)[1] * v[i];
    }
    if (kind(e) == ExpertKind::kFFN) ffn_forward(layer, str("expert.", e), round.x, expert);
    for (std::size_t t = 0; t < n; ++t)
      for (std::size_t i = 0; i < h; ++i)
        round.y[t * h + i] += round.weight[t * num_experts + e] * expert.out[t * h + i];
  }
  if (config_.model.shared_ffn == 0) return;
  ffn_forward(layer, "shared", round.x, round.shared);
  for (std::size_t i = 0; i < n * h; ++i) round.y[i] += round.shared.out[i];
}

void DenseReference::experts_backward(std::size_t layer, Round& round, const Values& dy, Values& dx,
                                      Values& dweight) {
  const auto h = static_cast<std::size_t>(config_.model.hidden);
  const auto num_experts = static_cast<std::size_t>(config_.model.num_experts), n = round.x.size() / h;
  dweight.assign(n * num_experts, 0.0);
  for (std::size_t e = 0; e < num_experts; ++e) {
    const Expert& expert = round.experts[e];
    Values dout(n * h);
    for (std::size_t t = 0; t < n; ++t)
      for (std::size_t i = 0; i < h; ++i) {
        dweight[t * num_experts + e] += dy[t * h + i] * expert.out[t * h + i];
        dout[t * h + i] = round.weight[t * num_experts + e] * dy[t * h + i];
      }
    if (kind(e) == ExpertKind::kCopy)
      for (std::size_t i = 0; i < n * h; ++i) dx[i] += dout[i];
    if (kind(e) == ExpertKind::kConstant) constant_backward(layer, e, round.x, dout, dx);
    if (kind(e) == ExpertKind::kFFN) ffn_backward(layer, str("expert.", e), round.x, expert, dout, dx);
  }
  if (config_.model.shared_ffn > 0) ffn_backward(layer, "shared", round.x, round.shared, dy, dx);
}

double DenseReference::step(const Batch& batch, const std::vector<std::vector<float>>& scores,
                            const std::vector<AdaptiveState>& adaptive, double& score_error) {
  const Config::Model& m = config_.model;
  const auto n = batch.target.size(), h = static_cast<std::size_t>(m.hidden),
             embed = static_cast<std::size_t>(m.embed);
  const auto num_experts = static_cast<std::size_t>(m.num_experts),
             iterations = static_cast<std::size_t>(m.chain_iterations);
  for (auto& [name, w] : weights_) std::fill(w.gradient.begin(), w.gradient.end(), 0.0);

  Values embedded;
  for (const std::int32_t byte : batch.context)
    for (std::size_t i = 0; i < embed; ++i)
      embedded.push_back(at("embedding").value[static_cast<std::size_t>(byte) * embed + i]);
  Values x = times(at("projection"), embedded);
  std::vector<Block> blocks(static_cast<std::size_t>(m.num_layers));
  double loss = 0;
  score_error = 0;
  for (std::size_t l = 0; l < blocks.size(); ++l) {
    Block& block = blocks[l];
    block.x = x;
    Values in = norm_forward(at(l, "gain"), x);
    block.rounds.resize(iterations);
    for (std::size_t r = 0; r < iterations; ++r) {
      Round& round = block.rounds[r];
      round.x = in;
      Values own =
          num_gates(config_) == 0
              ? affinities(in, h, num_experts)
              : times(at(gate_name(m, static_cast<std::int32_t>(l), static_cast<std::int32_t>(r))), in);
      if (has_gate_residual(config_, static_cast<std::int32_t>(l))) {
        const std::vector<float>& before = blocks[l - 1].rounds[0].scores;
        const Values more = times(at(l, "gate_residual"), Values(before.begin(), before.end()));
        for (std::size_t i = 0; i < own.size(); ++i) own[i] += more[i];
      }
      const std::vector<float>& given = scores[l * iterations + r];
      for (std::size_t i = 0; i < own.size(); ++i)
        score_error = std::max(score_error, std::abs(own[i] - double(given[i])));
      round.scores = given;
      round.dscores.assign(own.size(), 0.0);
      // One rank alone, though its tokens live on many: what is summed over ranks is there already, what is gathered or
      // sent to all is its own.
      while (!policies_[l]->step(view_of(round), adaptive[l * iterations + r], true, round.state))
        round.state.gathered = round.state.buffer;
      loss += round.state.auxiliary_loss;
      round.weight.assign(n * num_experts, 0.0);
      const Routing& routing = round.state.routing;
      for (std::size_t t = 0; t < n; ++t)
        for (auto q = static_cast<std::size_t>(routing.row_ptr[t]);
             q < static_cast<std::size_t>(routing.row_ptr[t + 1]); ++q)
          round.weight[t * num_experts + static_cast<std::size_t>(routing.expert[q])] = routing.weight[q];
      experts_forward(l, round);
      if (m.chain_residual == Config::Model::ChainResidual::kInner)
        for (std::size_t i = 0; i < in.size(); ++i) in[i] += round.y[i];
      else
        in = round.y;
    }
    if (m.chain_residual == Config::Model::ChainResidual::kOuter)
      for (std::size_t i = 0; i < in.size(); ++i) in[i] += block.rounds[0].x[i];
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += in[i];
  }
  const Values last = norm_forward(at("gain"), x);
  Values d = times(at("head"), last);
  for (std::size_t t = 0; t < n; ++t) {
    double* z = d.data() + t * 256;
    const double max = *std::max_element(z, z + 256), wanted = z[batch.target[t]];
    double sum = 0;
    for (std::size_t c = 0; c < 256; ++c) sum += std::exp(z[c] - max);
    loss += (std::log(sum) + max - wanted) / double(n);
    for (std::size_t c = 0; c < 256; ++c) z[c] = std::exp(z[c] - max) / sum / double(n);
    z[batch.target[t]] -= 1 / double(n);
  }

  Values dlast(n * h, 0.0), dx(n * h, 0.0);
  times_backward(at("head"), last, d, dlast);
  norm_backward(at("gain"), x, dlast, dx);
  for (std::size_t l = blocks.size(); l-- > 0;) {
    Block& block = blocks[l];
    Values dout = dx;  // of the iteration's output
    for (std::size_t r = iterations; r-- > 0;) {
      Round& round = block.rounds[r];
      Values din(n * h, 0.0), dweight;
      experts_backward(l, round, dout, din, dweight);
      const Routing& routing = round.state.routing;
      std::vector<float> droute, dscores(n * num_experts);
      for (std::size_t t = 0; t < n; ++t)
        for (auto q = static_cast<std::size_t>(routing.row_ptr[t]);
             q < static_cast<std::size_t>(routing.row_ptr[t + 1]); ++q)
          droute.push_back(
              static_cast<float>(dweight[t * num_experts + static_cast<std::size_t>(routing.expert[q])]));
      policies_[l]->backward(view_of(round), adaptive[l * iterations + r], round.state, droute, dscores);
      for (std::size_t i = 0; i < dscores.size(); ++i) round.dscores[i] += double(dscores[i]);
      if (has_gate_residual(config_, static_cast<std::int32_t>(l))) {
        Round& before = blocks[l - 1].rounds[0];
        times_backward(at(l, "gate_residual"), Values(before.scores.begin(), before.scores.end()),
                       round.dscores, before.dscores);
      }
      if (num_gates(config_) == 0)
        affinities_backward(round.x, h, num_experts, round.dscores, din);
      else
        times_backward(at(gate_name(m, static_cast<std::int32_t>(l), static_cast<std::int32_t>(r))), round.x,
                       round.dscores, din);
      if (m.chain_residual == Config::Model::ChainResidual::kInner)
        for (std::size_t i = 0; i < n * h; ++i) din[i] += dout[i];
      if (m.chain_residual == Config::Model::ChainResidual::kOuter && r == 0)
        for (std::size_t i = 0; i < n * h; ++i) din[i] += dx[i];
      dout = std::move(din);
    }
    norm_backward(at(l, "gain"), block.x, dout, dx);
  }
  Values dembedded(embedded.size(), 0.0);
  times_backward(at("projection"), embedded, dx, dembedded);
  for (std::size_t i = 0; i < batch.context.size(); ++i)
    for (std::size_t j = 0; j < embed; ++j)
      at("embedding").gradient[static_cast<std::size_t>(batch.context[i]) * embed + j] +=
          dembedded[i * embed + j];
  return loss;
}

void DenseReference::update(const kernels::AdamW& o, double clip, std::map<std::string, Values> gradients) {
  double squares = 0;
  for (const auto& [name, g] : gradients) squares += norm_of(g) * norm_of(g);
  const double factor = clip > 0 && std::sqrt(squares) > clip ? clip / std::sqrt(squares) : 1;
  const double b1 = o.beta1, b2 = o.beta2, rate = o.learning_rate;
  for (auto& [name, w] : weights_) {
    const Values& g = gradients.at(name);
    const double decay = w.shape.decayed() ? o.weight_decay : 0;
    for (std::size_t i = 0; i < g.size(); ++i) {
      const double gi = g[i] * factor;
      w.m[i] = b1 * w.m[i] + (1 - b1) * gi;
      w.v[i] = b2 * w.v[i] + (1 - b2) * gi * gi;
      const double mean = w.m[i] / (1 - std::pow(b1, double(o.step)));
      const double square = w.v[i] / (1 - std::pow(b2, double(o.step)));
      w.value[i] = w.value[i] * (1 - rate * decay) - rate * mean / (std::sqrt(square) + double(o.epsilon));
    }
  }
}

// ---- comparison ------------------------------------------------------------------------------------------------------

void note(CheckReport::Figure& figure, double error, const std::string& where) {
  if (error <= figure.error) return;  // a NaN is noted
  figure.error = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  figure.where = where;
}

// All parameters, by name, on rank 0: replicated ones from it, experts from their owners.
std::map<std::string, Values> gather_parameters(Runtime& runtime, const Model& model, bool gradients) {
  std::string mine;
  nlohmann::json names = nlohmann::json::array();
  for (const Parameter& p : model.parameters()) {
    if (p.shape.expert < 0 ? runtime.rank() != RankId(0) : !p.owned) continue;
    const auto bytes = as_chars(gradients ? p.gradient : p.value);
    names.push_back({p.shape.name, p.shape.size()});
    mine.append(bytes.data(), bytes.size());
  }
  const auto all_names = gather_to_root(runtime, names.dump(), "check");
  const auto all = gather_to_root(runtime, mine, "check");
  std::map<std::string, Values> out;
  for (std::size_t r = 0; r < all.size(); ++r) {
    const char* next = all[r].data();
    for (const auto& entry : nlohmann::json::parse(all_names[r])) {
      std::vector<float> values(entry[1].get<std::size_t>());
      std::memcpy(values.data(), next, values.size() * sizeof(float));
      next += values.size() * sizeof(float);
      out[entry[0].get<std::string>()] = Values(values.begin(), values.end());
    }
  }
  return out;
}

// Scores of the last batch, all ranks' tokens in order, on rank 0. f32 [num_tokens, num_experts]
std::vector<float> gather_scores(Runtime& runtime, const Model& model, std::int32_t layer,
                                 std::int32_t iteration) {
  const auto bytes = as_chars(model.scores(layer, iteration));
  std::vector<float> out;
  for (const std::string& part : gather_to_root(runtime, {bytes.data(), bytes.size()}, "check")) {
    const std::size_t begin = out.size();
    out.resize(begin + part.size() / sizeof(float));
    std::memcpy(out.data() + begin, part.data(), part.size());
  }
  return out;
}

std::int64_t check_tokens(const Config& config, std::int32_t num_ranks) {
  const Config::Model& m = config.model;
  double flops = 0;
  for (const ParameterShape& shape : replicated_shapes(config))
    if (shape.name != "embedding")
      flops += 6.0 * double(shape.size()) * (shape.layer >= 0 ? m.chain_iterations : 1);
  for (const ParameterShape& shape : expert_shapes(m, 0, 0))
    flops += 6.0 * double(shape.size()) * m.num_layers * m.chain_iterations * m.num_ffn_experts();
  return std::min<std::int64_t>(config.train.tokens_per_step,
                                std::max<std::int64_t>(num_ranks, std::llround(kReferenceFlops / flops)));
}

std::vector<std::pair<std::string_view, const CheckReport::Figure*>> figures(const CheckReport& report) {
  return {{"loss", &report.loss},
          {"scores", &report.scores},
          {"gradient", &report.gradient},
          {"gradient norm", &report.grad_norm},
          {"update", &report.update}};
}

std::string where_text(const CheckReport::Figure& figure) {
  return figure.where.empty() ? "-" : figure.where;
}

}  // namespace

CheckReport check(Runtime& runtime, const LoadedConfig& loaded, const Text& text) {
  Config config = loaded.config;
  config.train.tokens_per_step = check_tokens(config, runtime.num_ranks());
  const bool root = runtime.rank() == RankId(0);
  const TextSplit split(static_cast<std::int64_t>(text.bytes.size()), config.model.context,
                        config.train.heldout_fraction);
  BatchReader reader(text, split, config, runtime.rank(), runtime.num_ranks());
  BatchReader whole(text, split, config, RankId(0), 1);
  Model model(runtime, config);

  CheckReport report;
  report.steps = std::min(kSteps, config.train.steps);
  report.tokens_per_step = config.train.tokens_per_step;
  const bool exact = config.model.dtype == DType::kF32 && config.comm.wire_dtype != WireDType::kBF16 &&
                     config.comm.combine_dtype != WireDType::kBF16;
  report.gradient.limit = exact ? 5e-5 : 5e-2;
  report.loss.limit = report.grad_norm.limit = 0.1 * report.gradient.limit;
  report.scores.limit = exact ? 2e-5 : 0.1;
  report.update.limit = 1e-3;

  std::optional<DenseReference> reference;
  if (root) reference.emplace(config, runtime.topology());
  for (std::int64_t step = 1; step <= report.steps; ++step) {
    const auto values = gather_parameters(runtime, model, false);
    std::vector<AdaptiveState> adaptive;
    for (std::int32_t l = 0; l < config.model.num_layers; ++l)
      for (std::int32_t t = 0; t < config.model.chain_iterations; ++t)
        adaptive.push_back(model.adaptive(l, t));
    const StepResult result = model.compute_gradients(reader.train(step));
    const auto gradients = gather_parameters(runtime, model, true);
    std::vector<std::vector<float>> scores;
    for (std::int32_t l = 0; l < config.model.num_layers; ++l)
      for (std::int32_t t = 0; t < config.model.chain_iterations; ++t)
        scores.push_back(gather_scores(runtime, model, l, t));
    const kernels::AdamW adamw = optimizer(config.train, step);
    model.update(adamw, config.train.grad_clip, result.grad_norm);
    const auto updated = gather_parameters(runtime, model, false);
    if (!root) continue;

    const std::string when = str("step ", step);
    report.num_parameters = static_cast<std::int64_t>(values.size());
    if (step > 1)
      for (auto& [name, w] : reference->weights()) w.value = values.at(name);
    double score_error = 0;
    const double loss = reference->step(whole.train(step), scores, adaptive, score_error);
    note(report.loss, std::abs(result.loss + result.auxiliary - loss) / std::abs(loss), when);
    note(report.scores, score_error, when);
    double squares = 0;
    for (const auto& [name, w] : reference->weights()) squares += norm_of(w.gradient) * norm_of(w.gradient);
    const double norm = std::sqrt(squares);
    note(report.grad_norm, std::abs(result.grad_norm - norm) / norm, when);
    for (const auto& [name, w] : reference->weights()) {
      Values difference = gradients.at(name);
      for (std::size_t i = 0; i < difference.size(); ++i) difference[i] -= w.gradient[i];
      note(report.gradient, norm_of(difference) / std::max(norm_of(w.gradient), 1e-3 * norm),
           when + ", " + name);
    }
    reference->update(adamw, config.train.grad_clip, gradients);
    for (const auto& [name, w] : reference->weights())
      for (std::size_t i = 0; i < w.value.size(); ++i) {
        const double rounding = 1e-6 * std::abs(w.value[i]);
        const double error = std::abs(updated.at(name)[i] - w.value[i]) - rounding;
        note(report.update, error / std::max(double(adamw.learning_rate), 1e-12), when + ", " + name);
      }
  }

  std::string failure;
  if (root)
    for (const auto& [name, figure] : figures(report))
      if (!(figure->error <= figure->limit))
        failure += str(failure.empty() ? "" : "; ", name, " differs by ", figure->error, " (limit ",
                       figure->limit, ") in ", where_text(*figure));
  std::int64_t size = static_cast<std::int64_t>(failure.size());
  runtime.broadcast(std::as_writable_bytes(std::span(&size, 1)), RankId(0), "check");
  if (size > 0) {
    failure.resize(static_cast<std::size_t>(size));
    runtime.broadcast(std::as_writable_bytes(std::span<char>(failure)), RankId(0), "check");
    throw Error(ErrorCode::kInternal, "the check against the dense reference failed: " + failure);
  }
  return report;
}

std::string to_json(const CheckReport& report) {
  nlohmann::json out{{"steps", report.steps},
                     {"tokens_per_step", report.tokens_per_step},
                     {"parameters", report.num_parameters},
                     {"passed", true}};
  for (const auto& [name, figure] : figures(report)) {
    std::string key(name);
    std::replace(key.begin(), key.end(), ' ', '_');
    out["errors"][key] = {{"error", figure->error}, {"limit", figure->limit}, {"where", figure->where}};
  }
  return out.dump(2);
}

std::string to_text(const CheckReport& report) {
  const auto number = [](double v) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2e", v);
    return std::string(text);
  };
  TextTable table({"against the dense reference", "largest error", "limit", "where"});
  for (const auto& [name, figure] : figures(report))
    table.add_row({std::string(name), number(figure->error), number(figure->limit), where_text(*figure)});
  return str("checked ", report.steps, " steps of ", report.tokens_per_step, " tokens, ",
             report.num_parameters, " parameters\n", table.to_string());
}

}  // namespace sluice::train
