#include "sluice/runtime/src/trace/routing_trace.hpp"

#include <charconv>
#include <cmath>
#include <fstream>
#include <istream>
#include <ostream>

namespace sluice {
namespace {

constexpr std::int32_t kMaxLayers = 1 << 16, kMaxExperts = 1 << 20, kMaxSources = 1 << 16;
constexpr std::size_t kMaxLineBytes = std::size_t{1} << 24;

// Words of one line, with their place for errors.
class Line {
 public:
  Line(std::string_view text, std::string_view name, std::int64_t number)
      : text_(text), name_(name), number_(number) {}

  bool at_end() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\r')) ++at_;
    return at_ == text_.size();
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorCode::kInvalidRouting, str(name_, ":", number_, ":", at_ + 1, ": ", what));
  }
  void expect_word(std::string_view word) {
    if (at_end() || text_.substr(at_, word.size()) != word) fail(str("expected \"", word, "\""));
    at_ += word.size();
    end_of_word(word);
  }
  void expect_char(char c) {
    if (at_ >= text_.size() || text_[at_] != c) fail(str("expected '", c, "'"));
    ++at_;
  }
  std::int32_t integer(std::string_view what, std::int32_t max, bool whole_word) {
    if (at_end()) fail(str("expected ", what, ", 0..", max));
    std::int32_t value = -1;
    const auto [end, ec] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (ec != std::errc{} || value < 0 || value > max) fail(str(what, " must be an integer 0..", max));
    at_ = static_cast<std::size_t>(end - text_.data());
    if (whole_word) end_of_word(what);
    return value;
  }
  float weight() {
    float value = 0;
    const auto [end, ec] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (ec != std::errc{} || !std::isfinite(value)) fail("a weight must be a finite number");
    at_ = static_cast<std::size_t>(end - text_.data());
    end_of_word("weight");
    return value;
  }

 private:
  void end_of_word(std::string_view what) const {
    if (at_ < text_.size() && text_[at_] != ' ' && text_[at_] != '\t' && text_[at_] != '\r')
      fail(str("junk after ", what));
  }
  std::string_view text_, name_;
  std::int64_t number_;
  std::size_t at_ = 0;
};

}  // namespace

RoutingTrace read_trace(std::istream& in, std::string_view name, std::int64_t max_routes) {
  RoutingTrace trace;
  std::string text;
  std::int64_t number = 0, num_routes = 0;
  std::int32_t num_sources = 0;
  bool header = false;
  while (std::getline(in, text)) {
    ++number;
    Line line(text, name, number);
    if (text.size() > kMaxLineBytes) line.fail(str("the line is longer than ", kMaxLineBytes, " bytes"));
    if (line.at_end() || text[text.find_first_not_of(" \t")] == '#') continue;
    if (!header) {
      line.expect_word("sluice-trace");
      const std::int32_t version = line.integer("version", 1 << 30, true);
      if (version != 1) line.fail(str("version ", version, " is not known; this program reads version 1"));
      line.expect_word("layers");
      trace.num_layers = line.integer("layers", kMaxLayers, true);
      line.expect_word("experts");
      trace.num_experts = line.integer("experts", kMaxExperts, true);
      if (trace.num_layers == 0 || trace.num_experts == 0) line.fail("layers and experts must be at least 1");
      if (!line.at_end()) line.fail("junk behind the header");
      trace.layers.resize(static_cast<std::size_t>(trace.num_layers));
      header = true;
      continue;
    }
    const std::int32_t layer = line.integer("layer", trace.num_layers - 1, true);
    const std::int32_t source = line.integer("source rank", kMaxSources - 1, true);
    if (source >= num_sources) {
      num_sources = source + 1;
      for (auto& sources : trace.layers) {
        sources.resize(static_cast<std::size_t>(num_sources));
        for (Routing& r : sources) r.num_experts = trace.num_experts;
      }
    }
    Routing& routing = trace.layers[static_cast<std::size_t>(layer)][static_cast<std::size_t>(source)];
    const auto first = static_cast<std::int64_t>(routing.expert.size());
    while (!line.at_end()) {
      const std::int32_t expert = line.integer("expert", trace.num_experts - 1, false);
      if (static_cast<std::int64_t>(routing.expert.size()) > first && routing.expert.back() >= expert)
        line.fail(str("experts of a token must ascend, ", expert, " follows ", routing.expert.back()));
      line.expect_char(':');
      routing.expert.push_back(expert);
      routing.weight.push_back(line.weight());
      if (++num_routes > max_routes) line.fail(str("more than ", max_routes, " routes"));
    }
    routing.row_ptr.push_back(static_cast<std::int64_t>(routing.expert.size()));
  }
  Require(in.eof(), ErrorCode::kIo, "cannot read ", name, " beyond line ", number);
  Require(header, ErrorCode::kInvalidRouting, name,
          ":1:1: expected \"sluice-trace 1 layers L experts E\"; the file is empty");
  return trace;
}

RoutingTrace read_trace_file(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  Require(in.is_open(), ErrorCode::kNotFound, "cannot open the trace ", file);
  return read_trace(in, file);
}

void write_trace_header(std::ostream& out, std::int32_t num_layers, std::int32_t num_experts) {
  out << "sluice-trace 1 layers " << num_layers << " experts " << num_experts << '\n';
}

void write_trace_tokens(std::ostream& out, std::int32_t layer, std::int32_t source,
                        const RoutingView& routing) {
  std::string text;
  for (std::int64_t t = 0; t < routing.num_tokens(); ++t) {
    text = str(layer, " ", source);
    for (auto q = routing.row_ptr[static_cast<std::size_t>(t)];
         q < routing.row_ptr[static_cast<std::size_t>(t) + 1]; ++q) {
      char weight[32];
      const auto end =
          std::to_chars(weight, weight + sizeof weight, routing.weight[static_cast<std::size_t>(q)]).ptr;
      text += str(" ", routing.expert[static_cast<std::size_t>(q)], ":",
                  std::string_view(weight, static_cast<std::size_t>(end - weight)));
    }
    out << text << '\n';
  }
}

}  // namespace sluice
