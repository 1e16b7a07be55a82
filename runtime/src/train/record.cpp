#include "sluice/runtime/src/train/record.hpp"

#include <cerrno>
#include <cstring>
#include <numeric>

#include "sluice/runtime/src/gather.hpp"

namespace sluice::train {

RecordRequest parse_record_request(const std::string& text) {
  const std::size_t cut = text.find('=');
  RecordRequest out{text.substr(0, cut), cut == text.npos ? "" : text.substr(cut + 1)};
  Require(!out.file.empty() && (cut == text.npos || !out.text.empty()), ErrorCode::kInvalidArgument,
          "--record ", text, " must be FILE, or FILE=TEXT with the text to route after training");
  return out;
}

RoutingRecorder::RoutingRecorder(Runtime& runtime, const Config& config, std::string file)
    : runtime_(runtime),
      layers_(config.model.num_layers),
      iterations_(config.model.chain_iterations),
      file_(std::move(file)) {
  const bool root = runtime.rank() == RankId(0);
  if (root) {
    out_.open(file_, std::ios::binary);
    Require(out_.is_open(), ErrorCode::kIo, file_, ": cannot be written: ", std::strerror(errno));
  }
  const std::int32_t num_layers = layers_ * iterations_;
  if (file_.ends_with(".json")) {
    std::vector<std::int32_t> numbers(static_cast<std::size_t>(num_layers));
    std::iota(numbers.begin(), numbers.end(), 0);
    recorder_ = std::make_unique<StatisticsRecorder>(config.model.num_experts, numbers, runtime.num_ranks());
  } else if (root) {
    writer_ = std::make_unique<TraceWriter>(out_, num_layers, config.model.num_experts);
  }
}

void RoutingRecorder::add(const Model& model) {
  std::string lines;
  std::vector<RoutingView> routings;
  for (std::int32_t l = 0; l < layers_; ++l)
    for (std::int32_t t = 0; t < iterations_; ++t) routings.push_back(model.routing(l, t));
  if (recorder_) {
    SampledToken token;
    for (std::size_t i = 0; i < static_cast<std::size_t>(routings[0].num_tokens()); ++i) {
      token.expert.clear();
      token.end.clear();
      for (const RoutingView& r : routings) {
        for (auto q = r.row_ptr[i]; q < r.row_ptr[i + 1]; ++q)
          token.expert.push_back(r.expert[static_cast<std::size_t>(q)]);
        token.end.push_back(static_cast<std::int32_t>(token.expert.size()));
      }
      recorder_->add(runtime_.rank().value, next_token_++, token);
    }
    return;
  }
  for (std::size_t l = 0; l < routings.size(); ++l)
    TraceWriter::append_lines(lines, static_cast<std::int32_t>(l), runtime_.rank().value, routings[l]);
  for (const std::string& text : gather_to_root(runtime_, lines, "record")) writer_->write_lines(text);
}

void RoutingRecorder::finish() {
  if (recorder_) {
    const auto parts = gather_to_root(runtime_, recorder_->statistics().to_json(), "record");
    if (parts.empty()) return;
    RoutingStatistics all = parse_statistics(parts[0], "rank 0");
    for (std::size_t r = 1; r < parts.size(); ++r) all.merge(parse_statistics(parts[r], str("rank ", r)));
    all.description = "recorded by sluice train";
    out_ << all.to_json() << '\n' << std::flush;
    Require(static_cast<bool>(out_), ErrorCode::kIo, "cannot write ", file_);
  } else if (writer_) {
    writer_->finish();
  }
}

}  // namespace sluice::train
