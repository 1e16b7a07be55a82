#include "sluice/runtime/src/trace/routing_trace.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <ostream>

namespace sluice {
namespace {

constexpr std::int32_t kMaxLayers = 1 << 16, kMaxExperts = 1 << 20, kMaxSources = 1 << 16;
// Layers times source ranks of a trace that is held in memory: a short file can name the last of both.
constexpr std::int64_t kMaxParts = 1 << 18;
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
  bool next_is(std::string_view word) { return !at_end() && text_.substr(at_, word.size()) == word; }
  bool next_char_is(char c) const { return at_ < text_.size() && text_[at_] == c; }
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
    if (ec != std::errc{} || !std::isfinite(value))
      fail("a weight must be a finite decimal number that fits a 32-bit float");
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

TraceReader::TraceReader(std::istream& in, std::string_view name, std::int64_t max_routes)
    : in_(in), name_(name), max_routes_(max_routes) {
  Require(next_line(), ErrorCode::kInvalidRouting, name_,
          ":1:1: expected \"sluice-trace 2 layers L experts E\"; the file is empty");
  Line line(text_, name_, number_);
  line.expect_word("sluice-trace");
  version_ = line.integer("version", 1 << 30, true);
  if (version_ != 1 && version_ != 2)
    line.fail(str("version ", version_, " is not known; this program reads versions 1 and 2"));
  line.expect_word("layers");
  num_layers_ = line.integer("layers", kMaxLayers, true);
  line.expect_word("experts");
  num_experts_ = line.integer("experts", kMaxExperts, true);
  if (num_layers_ == 0 || num_experts_ == 0) line.fail("layers and experts must be at least 1");
  if (!line.at_end()) line.fail("junk behind the header");
}

bool TraceReader::next_line() {
  while (std::getline(in_, text_)) {
    ++number_;
    Line line(text_, name_, number_);
    if (text_.size() > kMaxLineBytes) line.fail(str("the line is longer than ", kMaxLineBytes, " bytes"));
    if (!line.at_end() && !line.next_is("#")) return true;
  }
  Require(in_.eof(), ErrorCode::kIo, "cannot read ", name_, " beyond line ", number_);
  return false;
}

bool TraceReader::next(TraceToken& token) {
  if (!next_line()) {
    Require(version_ == 1, ErrorCode::kInvalidRouting, name_, ":", number_ + 1,
            ":1: the trace was cut short: its last line must be \"end ", num_lines_, "\"");
    return false;
  }
  Line line(text_, name_, number_);
  if (version_ > 1 && line.next_is("end")) {
    line.expect_word("end");
    const std::int64_t count = line.integer("number of lines", INT32_MAX, true);
    if (count != num_lines_)
      line.fail(str("the trace says it has ", count, " lines of tokens, but there are ", num_lines_));
    if (!line.at_end()) line.fail("junk behind the end");
    if (next_line()) Line(text_, name_, number_).fail("junk behind the last line");
    return false;
  }
  ++num_lines_;
  token.layer = line.integer("layer", num_layers_ - 1, true);
  token.source = line.integer("source rank", kMaxSources - 1, true);
  token.expert.clear();
  token.weight.clear();
  while (!line.at_end()) {
    const std::int32_t expert = line.integer("expert", num_experts_ - 1, false);
    if (!token.expert.empty() && token.expert.back() >= expert)
      line.fail(str("experts of a token must ascend, ", expert, " follows ", token.expert.back()));
    line.expect_char(':');
    token.expert.push_back(expert);
    token.weight.push_back(line.weight());
    if (++num_routes_ > max_routes_) line.fail(str("more than ", max_routes_, " routes"));
  }
  return true;
}

namespace {

void append_token(Routing& routing, const TraceToken& token) {
  routing.expert.insert(routing.expert.end(), token.expert.begin(), token.expert.end());
  routing.weight.insert(routing.weight.end(), token.weight.begin(), token.weight.end());
  routing.row_ptr.push_back(static_cast<std::int64_t>(routing.expert.size()));
}

std::ifstream open_trace(const std::string& file) {
  std::error_code ignored;
  Require(!std::filesystem::is_directory(file, ignored), ErrorCode::kInvalidArgument, file,
          " is a folder; a file of routing is wanted");
  std::ifstream in(file, std::ios::binary);
  Require(in.is_open(), errno == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo, file,
          ": cannot be opened: ", std::strerror(errno));
  return in;
}

}  // namespace

RoutingTrace read_trace(std::istream& in, std::string_view name, std::int64_t max_routes) {
  TraceReader reader(in, name, max_routes);
  RoutingTrace trace;
  trace.num_layers = reader.num_layers();
  trace.num_experts = reader.num_experts();
  trace.layers.resize(static_cast<std::size_t>(trace.num_layers));
  Routing none;
  none.num_experts = trace.num_experts;
  TraceToken token;
  while (reader.next(token)) {
    if (token.source >= trace.num_sources()) {
      Require(trace.num_layers * (token.source + std::int64_t{1}) <= kMaxParts, ErrorCode::kInvalidRouting,
              name, ": source rank ", token.source, " of a trace of ", trace.num_layers,
              " layers; layers times source ranks may be ", kMaxParts, " at most");
      for (auto& sources : trace.layers) sources.resize(static_cast<std::size_t>(token.source) + 1, none);
    }
    append_token(trace.layers[static_cast<std::size_t>(token.layer)][static_cast<std::size_t>(token.source)],
                 token);
  }
  return trace;
}

RoutingTrace read_trace_file(const std::string& file) {
  std::ifstream in = open_trace(file);
  return read_trace(in, file);
}

Routing replay_layer(const std::string& file, std::int32_t layer, std::int32_t rank, std::int32_t num_ranks) {
  const RoutingTrace trace = read_trace_file(file);
  Require(layer >= 0 && layer < trace.num_layers, ErrorCode::kInvalidArgument, "layer ", layer, " of ", file,
          " is asked for; it has layers 0..", trace.num_layers - 1);
  const auto& sources = trace.layers[static_cast<std::size_t>(layer)];
  if (trace.num_sources() == num_ranks) return sources[static_cast<std::size_t>(rank)];
  Routing out;
  out.num_experts = trace.num_experts;
  std::int64_t next = 0;
  for (const Routing& r : sources)
    for (std::int64_t t = 0; t < r.num_tokens(); ++t) {
      if (next++ % num_ranks != rank) continue;
      const auto begin = r.row_ptr[static_cast<std::size_t>(t)],
                 end = r.row_ptr[static_cast<std::size_t>(t) + 1];
      out.expert.insert(out.expert.end(), r.expert.begin() + begin, r.expert.begin() + end);
      out.weight.insert(out.weight.end(), r.weight.begin() + begin, r.weight.begin() + end);
      out.row_ptr.push_back(static_cast<std::int64_t>(out.expert.size()));
    }
  return out;
}

TraceWriter::TraceWriter(std::ostream& out, std::int32_t num_layers, std::int32_t num_experts) : out_(out) {
  out_ << "sluice-trace 2 layers " << num_layers << " experts " << num_experts << '\n';
}

void TraceWriter::append_lines(std::string& text, std::int32_t layer, std::int32_t source,
                               const RoutingView& routing) {
  const auto number = [&](auto value) {
    char digits[32];
    text.append(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
  };
  for (std::int64_t t = 0; t < routing.num_tokens(); ++t) {
    number(layer);
    text += ' ';
    number(source);
    for (auto q = static_cast<std::size_t>(routing.row_ptr[static_cast<std::size_t>(t)]);
         q < static_cast<std::size_t>(routing.row_ptr[static_cast<std::size_t>(t) + 1]); ++q) {
      text += ' ';
      number(routing.expert[q]);
      text += ':';
      number(routing.weight[q]);
    }
    text += '\n';
  }
}

void TraceWriter::write_lines(std::string_view lines) {
  num_lines_ += std::count(lines.begin(), lines.end(), '\n');
  out_ << lines;
}

void TraceWriter::write(std::int32_t layer, std::int32_t source, const RoutingView& routing) {
  std::string lines;
  append_lines(lines, layer, source, routing);
  write_lines(lines);
}

void TraceWriter::finish() {
  out_ << "end " << num_lines_ << '\n' << std::flush;
  Require(static_cast<bool>(out_), ErrorCode::kIo, "cannot write the trace");
}

// ---- statistics of files ---------------------------------------------------------------------------------------------

namespace {

// Tokens of a trace, put together from their lines: a token is complete when every layer has told it.
class TokenAssembler {
 public:
  TokenAssembler(std::string name, std::int32_t num_layers, StatisticsRecorder& recorder)
      : name_(std::move(name)), num_layers_(static_cast<std::size_t>(num_layers)), recorder_(recorder) {}

  void add(const TraceToken& token) {
    Source& source = sources_.try_emplace(token.source, Source{{}, std::vector<std::int64_t>(num_layers_, 0)})
                         .first->second;
    const auto layer = static_cast<std::size_t>(token.layer);
    const std::int64_t index = source.seen[layer]++;
    while (source.first + static_cast<std::int64_t>(source.waiting.size()) <= index)
      source.waiting.emplace_back(num_layers_);
    source.waiting[static_cast<std::size_t>(index - source.first)][layer] = token.expert;
    num_waiting_ += 1 + static_cast<std::int64_t>(token.expert.size());
    Require(num_waiting_ <= kMaxWaiting, ErrorCode::kInvalidRouting, name_,
            ": the lines of one token are more than ", kMaxWaiting,
            " routes apart; write the layers of a batch one after the other");
    // The oldest is complete when every layer is past it.
    while (*std::min_element(source.seen.begin(), source.seen.end()) > source.first) {
      SampledToken whole;
      for (const auto& experts : source.waiting.front()) {
        whole.expert.insert(whole.expert.end(), experts.begin(), experts.end());
        whole.end.push_back(static_cast<std::int32_t>(whole.expert.size()));
      }
      num_waiting_ -= static_cast<std::int64_t>(num_layers_ + whole.expert.size());
      recorder_.add(token.source, source.first++, whole);
      source.waiting.pop_front();
    }
  }
  void finish() const {
    for (const auto& [source, tokens] : sources_)
      for (std::size_t l = 1; l < num_layers_; ++l)
        Require(tokens.seen[l] == tokens.seen[0], ErrorCode::kInvalidRouting, name_, ": source rank ", source,
                " has ", tokens.seen[0], " tokens at layer 0 and ", tokens.seen[l], " at layer ", l,
                "; every token visits every layer");
  }

 private:
  static constexpr std::int64_t kMaxWaiting = std::int64_t{1} << 26;
  struct Source {
    std::deque<std::vector<std::vector<std::int32_t>>> waiting;  // [layers] of experts
    std::vector<std::int64_t> seen;                              // int64 [layers]
    std::int64_t first = 0;                                      // index of the first that waits
  };
  std::string name_;
  std::size_t num_layers_;
  StatisticsRecorder& recorder_;
  std::map<std::int32_t, Source> sources_;
  std::int64_t num_waiting_ = 0;
};

RoutingStatistics trace_statistics(std::istream& in, const std::string& name, std::int64_t max_sample) {
  TraceReader reader(in, name);
  std::vector<std::int32_t> layers(static_cast<std::size_t>(reader.num_layers()));
  for (std::size_t l = 0; l < layers.size(); ++l) layers[l] = static_cast<std::int32_t>(l);
  StatisticsRecorder recorder(reader.num_experts(), layers, 1, max_sample);
  TokenAssembler assembler(name, reader.num_layers(), recorder);
  TraceToken token;
  while (reader.next(token)) assembler.add(token);
  assembler.finish();
  return recorder.statistics();
}

// "layers 0,7,15" and "top-8 of 64" of a comment.
struct RoutesHeader {
  std::vector<std::int32_t> layers;
  std::int32_t top_k = 0, num_experts = 0;
  bool complete() const { return !layers.empty() && num_experts > 0; }
  void look_at(std::string_view text) {
    const auto number_at = [&](std::size_t& i) {
      std::int32_t value = -1;
      const auto [end, ec] = std::from_chars(text.data() + i, text.data() + text.size(), value);
      i = static_cast<std::size_t>(end - text.data());
      return ec == std::errc() && value >= 0 ? value : -1;
    };
    constexpr std::string_view kLayers = "layers ", kTop = "top-", kOf = " of ";
    if (std::size_t i = text.find(kLayers); i != text.npos && layers.empty()) {
      i += kLayers.size();
      for (std::int32_t v = number_at(i); v >= 0; v = number_at(i)) {
        layers.push_back(v);
        if (i >= text.size() || text[i] != ',') break;
        ++i;
      }
    }
    if (std::size_t i = text.find(kTop); i != text.npos && num_experts == 0) {
      i += kTop.size();
      const std::int32_t k = number_at(i);
      if (k > 0 && text.substr(i, kOf.size()) == kOf) {
        i += kOf.size();
        top_k = k;
        num_experts = number_at(i);
      }
    }
  }
};

RoutingStatistics routes_statistics(std::istream& in, const std::string& name, std::int64_t max_sample) {
  RoutesHeader header;
  std::optional<StatisticsRecorder> recorder;
  std::string text, description;
  std::int64_t number = 0, index = 0;
  SampledToken token;
  while (std::getline(in, text)) {
    ++number;
    Line line(text, name, number);
    if (text.size() > kMaxLineBytes) line.fail(str("the line is longer than ", kMaxLineBytes, " bytes"));
    if (line.at_end()) continue;
    if (line.next_is("#")) {
      if (!recorder) header.look_at(text);
      if (description.empty()) description = text.substr(std::min(text.size(), text.find_first_not_of("# ")));
      continue;
    }
    if (!recorder) {
      if (!header.complete())
        line.fail(
            "no comment before the tokens says \"layers A,B,...\" and \"top-K of E\": which layers and "
            "experts are they?");
      for (std::size_t l = 1; l < header.layers.size(); ++l)
        if (header.layers[l - 1] >= header.layers[l])
          line.fail("the layers that the comment names do not ascend");
      if (header.num_experts > kMaxExperts || header.top_k > header.num_experts)
        line.fail("the comment names too many experts, or a larger top-K than there are experts");
      recorder.emplace(header.num_experts, header.layers, 1, max_sample);
    }
    token.expert.clear();
    token.end.clear();
    for (std::size_t l = 0; l < header.layers.size(); ++l) {
      const std::size_t begin = token.expert.size();
      if (line.at_end())
        line.fail(str("the line has experts of ", l, " layers, must have ", header.layers.size(),
                      "; is it cut short?"));
      do {
        token.expert.push_back(line.integer("expert", header.num_experts - 1, false));
        if (!line.next_char_is(',')) break;
        line.expect_char(',');
      } while (true);
      const auto count = static_cast<std::int32_t>(token.expert.size() - begin);
      if (count != header.top_k)
        line.fail(str("layer ", header.layers[l], " has ", count, " experts, must have ", header.top_k,
                      "; is the line cut short?"));
      const auto first = token.expert.begin() + static_cast<std::ptrdiff_t>(begin);
      std::sort(first, token.expert.end());
      if (const auto twice = std::adjacent_find(first, token.expert.end()); twice != token.expert.end())
        line.fail(str("expert ", *twice, " is there twice at layer ", header.layers[l]));
      token.end.push_back(static_cast<std::int32_t>(token.expert.size()));
    }
    if (!line.at_end()) line.fail(str("there is more than ", header.layers.size(), " layers"));
    recorder->add(0, index++, token);
  }
  Require(in.eof(), ErrorCode::kIo, "cannot read ", name, " beyond line ", number);
  Require(recorder.has_value(), ErrorCode::kInvalidRouting, name, ":", number + 1, ":1: there is no token");
  RoutingStatistics out = recorder->statistics();
  out.description = description;
  return out;
}

}  // namespace

RoutingStatistics read_statistics_file(const std::string& file, std::int64_t max_sample) {
  std::ifstream in = open_trace(file);
  // What the first line that is no comment begins with.
  std::string text;
  char first = 0;
  while (first == 0 && std::getline(in, text)) {
    const std::size_t i = text.find_first_not_of(" \t\r");
    if (i != text.npos && text[i] != '#') first = text[i];
  }
  Require(first != 0, ErrorCode::kInvalidRouting, file, ":1:1: the file is empty");
  in.clear();
  in.seekg(0);
  RoutingStatistics out;
  if (first == '{' || first == '[') {
    const std::string json((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    out = parse_statistics(json, file);
  } else if ((first >= '0' && first <= '9') || first == '-') {
    out = routes_statistics(in, file, max_sample);
  } else {
    out = trace_statistics(in, file, max_sample);
  }
  if (out.description.empty()) out.description = file;
  Require(out.num_tokens() > 0, ErrorCode::kInvalidRouting, file, ": there is no token");
  return out;
}

}  // namespace sluice
