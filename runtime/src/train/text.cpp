#include "sluice/runtime/src/train/text.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <memory>
#include <span>
#include <system_error>

#include "sluice/base/hash.hpp"
#include "sluice/base/log.hpp"

namespace sluice::train {
namespace {

namespace fs = std::filesystem;

// The first `max_bytes` of a file.
std::string read_file(const fs::path& path, std::int64_t max_bytes) {
  std::ifstream in(path, std::ios::binary);
  Require(in.good(), ErrorCode::kIo, "text ", path.string(), " cannot be opened; is it readable?");
  std::string out;
  constexpr std::int64_t kChunk = 1 << 20;
  while (in && static_cast<std::int64_t>(out.size()) < max_bytes) {
    const std::size_t old = out.size();
    out.resize(old + static_cast<std::size_t>(std::min(kChunk, max_bytes - static_cast<std::int64_t>(old))));
    in.read(out.data() + old, static_cast<std::streamsize>(out.size() - old));
    out.resize(old + static_cast<std::size_t>(in.gcount()));
  }
  Require(!in.bad(), ErrorCode::kIo, "text ", path.string(), " cannot be read to its end");
  return out;
}

bool is_binary(const std::string& bytes) {
  return bytes.find('\0') != std::string::npos;
}

bool skipped_folder(const fs::path& folder) {
  const std::string name = folder.filename().string();
  std::error_code ignored;
  return name.starts_with(".") || name.starts_with("build") || name == "__pycache__" ||
         name == "node_modules" || fs::exists(folder / "CMakeCache.txt", ignored);
}

// Regular files below `folder`, ascending by path. Links are not followed, so there are no cycles.
std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code error;
  fs::recursive_directory_iterator it(folder, error);
  for (; !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    const fs::path& path = it->path();
    std::error_code ignored;
    const fs::file_status status = it->symlink_status(ignored);
    if (fs::is_directory(status)) {
      if (skipped_folder(path)) it.disable_recursion_pending();
    } else if (fs::is_regular_file(status) && !path.filename().string().starts_with(".")) {
      out.push_back(path);
    }
  }
  Require(!error, ErrorCode::kIo, "text ", folder.string(), " cannot be listed: ", error.message());
  std::sort(out.begin(), out.end(),
            [](const fs::path& a, const fs::path& b) { return a.generic_string() < b.generic_string(); });
  return out;
}

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  return Hasher().add(a).add(b).value();
}

}  // namespace

Text read_text(const fs::path& path, std::int64_t max_bytes) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  Require(status.type() != fs::file_type::not_found, ErrorCode::kNotFound, "text ", path.string(),
          " does not exist; give --text (train.text) a file or a directory");
  Require(fs::exists(status), ErrorCode::kIo, "text ", path.string(), " cannot be looked at: ", error.message());
  Text out;
  if (!fs::is_directory(status)) {
    out.bytes = read_file(path, max_bytes);
    Require(!is_binary(out.bytes), ErrorCode::kInvalidArgument, "text ", path.string(), " is binary: byte ",
            out.bytes.find('\0'), " is NUL; give a text file");
    Require(!out.bytes.empty(), ErrorCode::kInvalidArgument, "text ", path.string(), " is empty");
    out.description = str("file ", path.string());
    return out;
  }
  std::int64_t num_files = 0;
  for (const fs::path& file : files_below(path)) {
    const std::int64_t left = max_bytes - static_cast<std::int64_t>(out.bytes.size());
    if (left <= 0) break;
    const std::string bytes = read_file(file, left);
    if (bytes.empty() || is_binary(bytes)) continue;
    out.bytes += bytes;
    ++num_files;
  }
  Require(!out.bytes.empty(), ErrorCode::kInvalidArgument, "text directory ", path.string(),
          " has no text files (binary files, hidden files and build folders are not taken)");
  out.description = str("directory ", path.string(), " (", num_files, num_files == 1 ? " file)" : " files)");
  return out;
}

fs::path default_text_path() {
  const fs::path sources = SLUICE_SOURCE_DIR;
  std::error_code ignored;
  return fs::exists(sources / "runtime" / "include" / "sluice", ignored) ? sources : fs::path(".");
}

Text load_text(Runtime& runtime, const Config& config) {
  Text text;
  Status status;
  const bool reader = runtime.rank() == RankId(0);
  if (reader) {
    try {
      fs::path path = config.train.text;
      if (path.empty()) {
        path = default_text_path();
        log_info("train: no text was named (--text); reading ",
                 path == "." ? "the current directory" : "this program's own sources, ",
                 path == "." ? "" : path.string());
      }
      text = read_text(path, config.train.max_text_bytes);
    } catch (...) {
      status = current_exception_status();
    }
  }
  // Error code, then the sizes of message, description and text.
  std::int64_t head[4] = {
      static_cast<std::int64_t>(status.code), static_cast<std::int64_t>(status.message.size()),
      static_cast<std::int64_t>(text.description.size()), static_cast<std::int64_t>(text.bytes.size())};
  const auto send = [&](std::string& bytes, std::int64_t size) {
    bytes.resize(static_cast<std::size_t>(size));
    if (size > 0) runtime.broadcast(std::as_writable_bytes(std::span<char>(bytes)), RankId(0), "text");
  };
  runtime.broadcast(std::as_writable_bytes(std::span<std::int64_t>(head)), RankId(0), "text");
  send(status.message, head[1]);
  if (head[0] != static_cast<std::int64_t>(ErrorCode::kOk))
    throw Error(static_cast<ErrorCode>(head[0]), status.message);
  send(text.description, head[2]);
  send(text.bytes, head[3]);
  return text;
}

// ---- split -----------------------------------------------------------------------------------------------------------

void TextSplit::Part::add(TextRange range, std::int64_t margin) {
  ranges.push_back(range);
  first.push_back(first.back() + std::max<std::int64_t>(0, range.size() - margin));
}

std::int64_t TextSplit::Part::position(std::int64_t i, std::int64_t margin) const {
  const auto range =
      static_cast<std::size_t>(std::upper_bound(first.begin(), first.end(), i) - first.begin()) - 1;
  return ranges[range].begin + margin + (i - first[range]);
}

TextSplit::TextSplit(std::int64_t num_bytes, std::int32_t context, double heldout_fraction)
    : margin_(std::max<std::int64_t>(context, 2)) {
  const auto heldout_bytes = static_cast<std::int64_t>(static_cast<double>(num_bytes) * heldout_fraction);
  const std::int64_t block = std::max(kMinBlockBytes, 16 * margin_);
  const std::int64_t num_blocks = std::clamp<std::int64_t>(heldout_bytes / block, 1, kMaxBlocks);
  for (std::int64_t i = 0; i < num_blocks; ++i) {
    const std::int64_t begin = num_bytes * i / num_blocks, end = num_bytes * (i + 1) / num_blocks;
    const auto share = static_cast<std::int64_t>(static_cast<double>(end - begin) * heldout_fraction);
    train_.add({begin, end - share}, margin_);
    heldout_.add({end - share, end}, margin_);
  }
  Require(num_train() > 0 && num_heldout() > 0, ErrorCode::kInvalidArgument, "the text is too short: of ",
          num_bytes, " bytes train.heldout_fraction ", heldout_fraction, " holds out ", heldout_bytes,
          "; both parts need more than ", margin_,
          " bytes (model.context, at least 2). Give a longer text or a smaller model.context");
}

// ---- order -----------------------------------------------------------------------------------------------------------

TokenOrder::TokenOrder(std::uint64_t seed, std::int64_t num_tokens)
    : seed_(mix(seed, 0x746f6b656e73ull)), num_tokens_(num_tokens), half_bits_(1) {
  while ((std::int64_t{1} << (2 * half_bits_)) < num_tokens) ++half_bits_;
}

std::int64_t TokenOrder::at(std::int64_t g) const {
  // A Feistel network (Luby & Rackoff 1988) permutes 0..4^half_bits-1; walking its cycles stays below num_tokens.
  const std::uint64_t key = mix(seed_, static_cast<std::uint64_t>(g / num_tokens_));
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  auto x = static_cast<std::uint64_t>(g % num_tokens_);
  do {
    std::uint64_t left = x >> half_bits_, right = x & mask;
    for (std::uint64_t round = 0; round < 4; ++round) {
      const std::uint64_t next = left ^ (mix(key + round, right) & mask);
      left = right;
      right = next;
    }
    x = (left << half_bits_) | right;
  } while (x >= static_cast<std::uint64_t>(num_tokens_));
  return static_cast<std::int64_t>(x);
}

// ---- baselines -------------------------------------------------------------------------------------------------------

namespace {

constexpr std::size_t kBytes = 256;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Counts of one order: n(h, c) for all 256^order histories h.
struct Counts {
  explicit Counts(int order)
      : num_histories(std::size_t{1} << (8 * order)),
        // Untouched pages of calloc cost nothing: few of the 2^24 pairs of order 2 occur.
        count(static_cast<std::uint32_t*>(std::calloc(num_histories * kBytes, sizeof(std::uint32_t)))),
        total(num_histories, 0) {
    Require(count != nullptr, ErrorCode::kOutOfMemory, "no memory for the byte statistics of order ", order);
  }
  std::size_t num_histories;
  std::unique_ptr<std::uint32_t[], Free> count;
  std::vector<std::uint32_t> total;
};

// The bytes before position p, as an index of `order` bytes.
std::size_t history(const std::string& bytes, std::int64_t p, int order) {
  std::size_t h = 0;
  for (int i = order; i >= 1; --i)
    h = h << 8 | static_cast<unsigned char>(bytes[static_cast<std::size_t>(p - i)]);
  return h;
}

// A pair (history, byte) that occurs, and what the next lower order gives it.
struct Seen {
  double count, total, lower;
};

double best_prior(const std::vector<Seen>& seen) {
  double best = 1, best_bits = std::numeric_limits<double>::infinity();
  for (int exponent = -6; exponent <= 14; ++exponent) {
    const double a = std::ldexp(1.0, exponent);
    double bits = 0;
    for (const Seen& s : seen) bits -= s.count * std::log2((s.count - 1 + a * s.lower) / (s.total - 1 + a));
    if (bits < best_bits) {
      best_bits = bits;
      best = a;
    }
  }
  return best;
}

}  // namespace

Baselines byte_baselines(const std::string& bytes, const TextSplit& split,
                         const std::vector<std::int64_t>& heldout) {
  std::array<Counts, 3> counts = {Counts(0), Counts(1), Counts(2)};
  for (const TextRange& range : split.train_ranges())
    for (std::int64_t p = range.begin + split.margin(); p < range.end; ++p) {
      const auto c = static_cast<unsigned char>(bytes[static_cast<std::size_t>(p)]);
      for (int order = 0; order < 3; ++order) {
        Counts& n = counts[static_cast<std::size_t>(order)];
        const std::size_t h = history(bytes, p, order);
        ++n.count[h * kBytes + c];
        ++n.total[h];
      }
    }
  Baselines out;
  // lower(h', c) of the order below, as a table [256^(order-1), 256]; for order 0 it is 1/256.
  std::vector<double> lower, probability;
  for (std::size_t order = 0; order < 3; ++order) {
    const Counts& n = counts[order];
    const auto lower_of = [&](std::size_t h, std::size_t c) {
      if (order == 0) return 1.0 / kBytes;
      return lower[(h & ((std::size_t{1} << (8 * (order - 1))) - 1)) * kBytes + c];
    };
    std::vector<Seen> seen;
    for (std::size_t h = 0; h < n.num_histories; ++h) {
      if (n.total[h] == 0) continue;
      for (std::size_t c = 0; c < kBytes; ++c)
        if (n.count[h * kBytes + c] > 0)
          seen.push_back({double(n.count[h * kBytes + c]), double(n.total[h]), lower_of(h, c)});
    }
    const double a = out.prior[order] = best_prior(seen);
    const auto p_of = [&](std::size_t h, std::size_t c) {
      return (n.count[h * kBytes + c] + a * lower_of(h, c)) / (n.total[h] + a);
    };
    double bits = 0;
    for (const std::int64_t p : heldout)
      bits -= std::log2(p_of(history(bytes, p, static_cast<int>(order)),
                             static_cast<unsigned char>(bytes[static_cast<std::size_t>(p)])));
    (order == 0   ? out.order0_bpb
     : order == 1 ? out.order1_bpb
                  : out.order2_bpb) = bits / static_cast<double>(heldout.size());
    if (order == 2) break;
    probability.resize(n.num_histories * kBytes);
    for (std::size_t h = 0; h < n.num_histories; ++h)
      for (std::size_t c = 0; c < kBytes; ++c) probability[h * kBytes + c] = p_of(h, c);
    lower.swap(probability);
  }
  return out;
}

}  // namespace sluice::train
