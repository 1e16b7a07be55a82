#include "sluice/scheduler/cost_model.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

namespace sluice {
namespace {

constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
constexpr std::size_t kMaxPoints = 4096;

void check_time(double us, std::string_view what) {
  Require(std::isfinite(us) && us >= 0, kBad, what, " is ", us, " us; it must be a number, 0 or more");
}

}  // namespace

std::string_view to_string(LinkClass link) noexcept {
  return link == LinkClass::kInNode ? "in_node" : "across_nodes";
}
std::string_view to_string(GemmKind kind) noexcept {
  switch (kind) {
    case GemmKind::kForward:
      return "forward";
    case GemmKind::kDgrad:
      return "dgrad";
    case GemmKind::kWgrad:
      return "wgrad";
  }
  return "unknown GEMM";
}
std::string_view to_string(LinkModel model) noexcept {
  return model == LinkModel::kCalendar ? "calendar" : "queue";
}
std::string_view to_string(Posting posting) noexcept {
  switch (posting) {
    case Posting::kCaller:
      return "caller";
    case Posting::kThread:
      return "thread";
    case Posting::kOwnCore:
      return "own_core";
  }
  return "unknown posting";
}
std::string describe(const GemmShape& s) {
  return str(to_string(s.kind), " GEMM of ", to_string(s.dtype), " weights [", s.out_cols, ", ", s.in_cols,
             "] with ", s.threads, s.threads == 1 ? " thread" : " threads");
}

// ---- curves ----------------------------------------------------------------------------------------------------------

Curve Curve::line(double fixed_us, double per_us) {
  constexpr double kFar = 1 << 20;
  return Curve({{0, fixed_us}, {kFar, fixed_us + kFar / per_us}});
}

double Curve::operator()(double at) const {
  if (points_.empty()) return 0;
  if (at <= points_.front().at || points_.size() == 1) return points_.front().us;
  auto b = std::upper_bound(points_.begin(), points_.end(), at,
                            [](double value, const Point& p) { return value < p.at; });
  if (b == points_.end()) --b;
  const Point& lo = *(b - 1);
  return lo.us + (at - lo.at) * ((b->us - lo.us) / (b->at - lo.at));
}

void Curve::validate(std::string_view what, bool may_be_empty) const {
  Require(may_be_empty || !points_.empty(), kBad, what, " has no points; measure at least one");
  for (std::size_t i = 0; i < points_.size(); ++i) {
    const Point& p = points_[i];
    Require(std::isfinite(p.at) && p.at >= 0 && std::isfinite(p.us) && p.us >= 0, kBad, what, ": point ", i,
            " is [", p.at, ", ", p.us, "]; both must be numbers, 0 or more");
    if (i == 0) continue;
    Require(p.at > points_[i - 1].at, kBad, what, ": point ", i, " is at ", p.at, ", not above the ",
            points_[i - 1].at, " before it", p.at == points_[i - 1].at ? " (two times for one amount)" : "");
    Require(p.us >= points_[i - 1].us, kBad, what, ": time falls from ", points_[i - 1].us, " us at ",
            points_[i - 1].at, " to ", p.us, " us at ", p.at, "; more work cannot take less time");
  }
}

Curve fit_curve(std::vector<Curve::Point> samples) {
  std::sort(samples.begin(), samples.end(), [](const Curve::Point& a, const Curve::Point& b) {
    return a.at < b.at || (a.at == b.at && a.us < b.us);
  });
  struct Pool {
    double sum = 0;
    std::size_t count = 0;
    double mean() const { return sum / static_cast<double>(count); }
  };
  std::vector<double> at;
  std::vector<Pool> pools;  // pools of neighbours that fell
  for (std::size_t i = 0; i < samples.size();) {
    std::size_t end = i;
    while (end < samples.size() && samples[end].at == samples[i].at) ++end;
    at.push_back(samples[i].at);
    pools.push_back({samples[i + (end - i) / 2].us, 1});
    while (pools.size() > 1 && pools[pools.size() - 2].mean() > pools.back().mean()) {
      pools[pools.size() - 2].sum += pools.back().sum;
      pools[pools.size() - 2].count += pools.back().count;
      pools.pop_back();
    }
    i = end;
  }
  std::vector<Curve::Point> points;
  for (const Pool& pool : pools)
    for (std::size_t k = 0; k < pool.count; ++k) points.push_back({at[points.size()], pool.mean()});
  return Curve(std::move(points));
}

// ---- profiles --------------------------------------------------------------------------------------------------------

double MachineProfile::gemm_us(const GemmShape& shape, std::span<const double> group_rows) const {
  double sum = 0;
  bool any = false;
  const auto found =
      std::find_if(gemms.begin(), gemms.end(), [&](const GemmProfile& g) { return g.shape == shape; });
  if (found == gemms.end()) {
    Require(roofline.has_value(), ErrorCode::kNotFound, "profile ", name, " has no ", describe(shape),
            "; measure it with `sluice info --probe --config` and the configuration that needs it");
    const double weights = static_cast<double>(shape.in_cols) * static_cast<double>(shape.out_cols);
    const double weight_bytes =
        weights * (shape.kind == GemmKind::kWgrad ? 8.0 : static_cast<double>(size_of(shape.dtype)));
    for (const double rows : group_rows) {
      if (!(rows > 0)) continue;
      any = true;
      sum += std::max(2e6 * rows * weights / roofline->flops_per_s,
                      1e6 * weight_bytes / roofline->memory_bytes_per_s);
    }
  } else {
    for (const double rows : group_rows) {
      if (!(rows > 0)) continue;
      any = true;
      sum += found->rows(rows);
    }
  }
  return any ? sum + gemm_call_us : 0;
}

void MachineProfile::validate() const {
  const std::string of = "profile " + (name.empty() ? std::string("without a name") : name) + ": ";
  Require(!name.empty(), kBad, "a profile has no name");
  Require(!measured || (!date.empty() && !device.empty() && cores > 0 && !transport.empty()), kBad, of,
          "it is called measured, but device, cores, transport or date are missing");
  Require(cores >= 0, kBad, of, "cores is ", cores, ", must not be negative");
  for (const LinkClass c : {LinkClass::kInNode, LinkClass::kAcrossNodes}) {
    const LinkProfile& l = link(c);
    const std::string at = of + "links." + std::string(to_string(c)) + ".";
    check_time(l.latency_us, at + "latency_us");
    l.occupied.validate(at + "occupied", true);
    l.send.validate(at + "send", true);
    l.receive.validate(at + "receive", true);
  }
  for (std::size_t i = 0; i < gemms.size(); ++i) {
    const GemmShape& s = gemms[i].shape;
    Require(s.in_cols > 0 && s.out_cols > 0 && s.threads > 0, kBad, of, "gemms[", i, "] has in_cols ",
            s.in_cols, ", out_cols ", s.out_cols, ", threads ", s.threads, "; all must be at least 1");
    gemms[i].rows.validate(str(of, "gemms[", i, "].rows"), false);
    for (std::size_t k = 0; k < i; ++k)
      Require(!(gemms[k].shape == s), kBad, of, "gemms[", k, "] and gemms[", i, "] are both the ",
              describe(s), "; which of them holds?");
  }
  if (roofline)
    Require(std::isfinite(roofline->flops_per_s) && roofline->flops_per_s > 0 &&
                std::isfinite(roofline->memory_bytes_per_s) && roofline->memory_bytes_per_s > 0,
            kBad, of, "roofline has ", roofline->flops_per_s, " flops_per_s and ",
            roofline->memory_bytes_per_s, " memory_bytes_per_s; both must be above 0");
  Require(!gemms.empty() || roofline.has_value(), kBad, of, "it has neither gemms nor a roofline");
  check_time(gemm_call_us, of + "gemm_call_us");
  check_time(op_us, of + "op_us");
  gather.validate(of + "gather", false);
  reduce.validate(of + "reduce", false);
  activation_backward.validate(of + "activation_backward", false);
}

std::uint64_t machine_hash(std::string_view device, std::int32_t cores, std::string_view transport) {
  return Hasher().add_text(device).add_int(cores).add_text(transport).value();
}
std::uint64_t MachineProfile::machine_hash() const {
  return sluice::machine_hash(device, cores, transport);
}
std::uint64_t MachineProfile::hash() const {
  return Hasher().add_text(to_json()).value();
}

// ---- text form -------------------------------------------------------------------------------------------------------

namespace {

using Json = nlohmann::ordered_json;

Json curve_json(const Curve& curve) {
  Json out = Json::array();
  for (const Curve::Point& p : curve.points()) out.push_back({p.at, p.us});
  return out;
}

Json link_json(const LinkProfile& l) {
  return {{"latency_us", l.latency_us},
          {"occupied", curve_json(l.occupied)},
          {"send", curve_json(l.send)},
          {"receive", curve_json(l.receive)}};
}

// Takes the fields of one object apart; done() finds those that nobody asked for.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    Require(object.is_object(), kBad, where_, ": must be an object, is ", object.type_name());
  }
  std::string path(std::string_view key) const { return where_ + ": " + std::string(key); }
  bool has(const char* key) const { return object_.contains(key); }
  const Json& get(const char* key) {
    Require(object_.contains(key), kBad, where_, ": ", key, " is missing");
    seen_.push_back(key);
    return object_.at(key);
  }
  double number(const char* key) {
    const Json& v = get(key);
    Require(v.is_number(), kBad, path(key), " must be a number, is ", v.type_name());
    return v.get<double>();
  }
  std::int64_t integer(const char* key, std::int64_t min, std::int64_t max) {
    const Json& v = get(key);
    Require(v.is_number_integer(), kBad, path(key), " must be an integer, is ", v.type_name());
    const bool fits = v.is_number_unsigned() ? v.get<std::uint64_t>() <= static_cast<std::uint64_t>(max)
                                             : v.get<std::int64_t>() <= max;
    Require(fits && (v.is_number_unsigned() || v.get<std::int64_t>() >= min), kBad, path(key), " is ",
            v.dump(), "; it must be ", min, "..", max);
    return v.get<std::int64_t>();
  }
  std::string text(const char* key) {
    const Json& v = get(key);
    Require(v.is_string(), kBad, path(key), " must be a text, is ", v.type_name());
    return v.get<std::string>();
  }
  template <typename Enum>
  Enum choice(const char* key, std::initializer_list<Enum> values) {
    const std::string word = text(key);
    std::string allowed;
    for (const Enum v : values) {
      if (word == to_string(v)) return v;
      allowed += str(allowed.empty() ? "" : ", ", to_string(v));
    }
    throw Error(kBad, str(path(key), " is \"", word, "\"; it must be one of ", allowed));
  }
  Curve curve(const char* key) {
    const Json& v = get(key);
    Require(v.is_array(), kBad, path(key), " must be a list of points [amount, us], is ", v.type_name());
    Require(v.size() <= kMaxPoints, kBad, path(key), " has ", v.size(), " points; at most ", kMaxPoints);
    std::vector<Curve::Point> points;
    for (const Json& p : v) {
      Require(p.is_array() && p.size() == 2 && p[0].is_number() && p[1].is_number(), kBad, path(key),
              ": point ", points.size(), " must be [amount, us], is ", p.dump());
      points.push_back({p[0].get<double>(), p[1].get<double>()});
    }
    return Curve(std::move(points));
  }
  void done() const {
    for (const auto& [key, value] : object_.items())
      Require(std::find(seen_.begin(), seen_.end(), key) != seen_.end(), kBad, where_,
              ": there is no field \"", key, "\"");
  }

 private:
  const Json& object_;
  std::string where_;
  std::vector<std::string> seen_;
};

LinkProfile link_from(const Json& json, const std::string& where) {
  Fields f(json, where);
  LinkProfile out{.occupied = f.curve("occupied"),
                  .latency_us = f.number("latency_us"),
                  .send = f.curve("send"),
                  .receive = f.curve("receive")};
  f.done();
  return out;
}

}  // namespace

std::string MachineProfile::to_json() const {
  Json out{{"sluice_profile", kVersion},
           {"name", name},
           {"measured", measured},
           {"date", date},
           {"device", device},
           {"cores", cores},
           {"transport", transport},
           {"source", source},
           {"link_model", to_string(link_model)},
           {"posting", to_string(posting)},
           {"links", {{"in_node", link_json(in_node)}, {"across_nodes", link_json(across_nodes)}}},
           {"op_us", op_us},
           {"gemm_call_us", gemm_call_us},
           {"gather", curve_json(gather)},
           {"reduce", curve_json(reduce)},
           {"activation_backward", curve_json(activation_backward)}};
  if (roofline)
    out["roofline"] = {{"flops_per_s", roofline->flops_per_s},
                       {"memory_bytes_per_s", roofline->memory_bytes_per_s}};
  Json& list = out["gemms"] = Json::array();
  for (const GemmProfile& g : gemms)
    list.push_back({{"kind", to_string(g.shape.kind)},
                    {"in_cols", g.shape.in_cols},
                    {"out_cols", g.shape.out_cols},
                    {"dtype", to_string(g.shape.dtype)},
                    {"threads", g.shape.threads},
                    {"rows", curve_json(g.rows)}});
  return out.dump(1);
}

MachineProfile parse_profile(std::string_view text, std::string_view file) {
  const std::string name(file);
  Json json;
  try {
    // A field twice is a contradiction that a JSON library would settle silently.
    std::vector<std::vector<std::string>> keys;
    const auto once = [&](int, Json::parse_event_t event, Json& parsed) {
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key) {
        const auto key = parsed.get<std::string>();
        Require(std::find(keys.back().begin(), keys.back().end(), key) == keys.back().end(), kBad, name,
                ": field \"", key, "\" is there twice");
        keys.back().push_back(key);
      }
      return true;
    };
    json = Json::parse(text, once);
  } catch (const nlohmann::json::exception& e) {
    throw Error(kBad, str(name, ": is no profile (", e.what(), "); `sluice info --probe` writes one"));
  }
  Fields f(json, name);
  const std::int64_t version = f.integer("sluice_profile", 0, INT32_MAX);
  Require(version == MachineProfile::kVersion, kBad, name, ": is a profile of version ", version,
          ", this program reads version ", MachineProfile::kVersion, "; measure it again");
  MachineProfile out;
  out.name = f.text("name");
  const Json& measured = f.get("measured");
  Require(measured.is_boolean(), kBad, f.path("measured"), " must be true or false");
  out.measured = measured.get<bool>();
  out.date = f.text("date");
  out.device = f.text("device");
  out.cores = static_cast<std::int32_t>(f.integer("cores", 0, 1 << 20));
  out.transport = f.text("transport");
  out.source = f.text("source");
  out.link_model = f.choice("link_model", {LinkModel::kCalendar, LinkModel::kQueue});
  out.posting = f.choice("posting", {Posting::kCaller, Posting::kThread, Posting::kOwnCore});
  {
    Fields links(f.get("links"), f.path("links"));
    out.in_node = link_from(links.get("in_node"), links.path("in_node"));
    out.across_nodes = link_from(links.get("across_nodes"), links.path("across_nodes"));
    links.done();
  }
  out.op_us = f.number("op_us");
  out.gemm_call_us = f.number("gemm_call_us");
  out.gather = f.curve("gather");
  out.reduce = f.curve("reduce");
  out.activation_backward = f.curve("activation_backward");
  if (f.has("roofline")) {
    Fields r(f.get("roofline"), f.path("roofline"));
    out.roofline = GemmRoofline{r.number("flops_per_s"), r.number("memory_bytes_per_s")};
    r.done();
  }
  const Json& gemms = f.get("gemms");
  Require(gemms.is_array(), kBad, f.path("gemms"), " must be a list, is ", gemms.type_name());
  for (const Json& g : gemms) {
    Fields gf(g, str(name, ": gemms[", out.gemms.size(), "]"));
    GemmProfile p;
    p.shape.kind = gf.choice("kind", {GemmKind::kForward, GemmKind::kDgrad, GemmKind::kWgrad});
    p.shape.in_cols = gf.integer("in_cols", 1, 1 << 30);
    p.shape.out_cols = gf.integer("out_cols", 1, 1 << 30);
    p.shape.dtype = gf.choice("dtype", {DType::kF32, DType::kBF16});
    p.shape.threads = static_cast<std::int32_t>(gf.integer("threads", 1, 1 << 20));
    p.rows = gf.curve("rows");
    gf.done();
    out.gemms.push_back(std::move(p));
  }
  f.done();
  try {
    out.validate();
  } catch (const Error& e) {
    throw Error(e.code(), str(name, ": ", e.message()));
  }
  return out;
}

// ---- ops -------------------------------------------------------------------------------------------------------------

void OpWork::clear() {
  group_rows.clear();
  rows = bytes = num_messages = 0;
}

OpCost op_cost(const MachineProfile& profile, const LayerShape& layer, PassKind pass, const Op& op,
               const OpWork& work) {
  OpCost out;
  out.compute_us = profile.op_us;
  // Row work of no rows is a test and nothing more.
  const auto over = [](const Curve& curve, double amount) { return amount > 0 ? curve(amount) : 0; };
  switch (op.kind) {
    case OpKind::kReady:
    case OpKind::kPut:
    case OpKind::kReturn: {
      const LinkProfile& link = profile.link(
          op.resource == Resource::kAcrossNodesLink ? LinkClass::kAcrossNodes : LinkClass::kInNode);
      if (!(work.num_messages > 0)) return out;
      const double mean = work.bytes / work.num_messages;
      out.compute_us += work.num_messages * link.send(mean);
      out.link_us = work.num_messages * link.occupied(mean);
      out.receive_us = work.num_messages * link.receive(mean);
      out.latency_us = link.latency_us;
      return out;
    }
    case OpKind::kPack:
    case OpKind::kForward:
      out.compute_us += over(profile.gather, work.bytes);
      return out;
    case OpKind::kReduce:
    case OpKind::kNodeReduce:
    case OpKind::kUnpack:
      out.compute_us += over(profile.reduce, work.bytes);
      return out;
    case OpKind::kExpertGemm1:
      if (pass == PassKind::kForward || layer.recompute)
        out.compute_us += profile.gemm_us(layer.gemm1(GemmKind::kForward), work.group_rows);
      return out;
    case OpKind::kExpertGemm2:
      out.compute_us += profile.gemm_us(layer.gemm2(GemmKind::kForward), work.group_rows);
      return out;
    case OpKind::kExpertDgrad2:
      out.compute_us += profile.gemm_us(layer.gemm2(GemmKind::kDgrad), work.group_rows);
      return out;
    case OpKind::kExpertDgrad1:
      out.compute_us += profile.gemm_us(layer.gemm1(GemmKind::kDgrad), work.group_rows);
      return out;
    case OpKind::kActivationBackward: {
      // Reads h and u, writes dh and w a.
      const auto cols = static_cast<double>(2 * (layer.pre_cols + layer.ffn));
      out.compute_us +=
          over(profile.activation_backward, work.rows * cols * static_cast<double>(size_of(layer.dtype)));
      return out;
    }
    case OpKind::kWgrad:
      out.compute_us += profile.gemm_us(layer.gemm2(GemmKind::kWgrad), work.group_rows) +
                        profile.gemm_us(layer.gemm1(GemmKind::kWgrad), work.group_rows);
      return out;
  }
  throw Error(ErrorCode::kInternal, str("op ", to_string(op.kind), " has no cost"));
}

}  // namespace sluice
