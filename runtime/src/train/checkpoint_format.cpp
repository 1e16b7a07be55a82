#include "sluice/runtime/src/train/checkpoint_format.hpp"

#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

namespace sluice::train {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are written as they lie in memory");

constexpr std::string_view kMagic = "sluice-checkpoint";
constexpr std::array<char, 8> kShardMagic = {'S', 'L', 'U', 'I', 'C', 'E', 'C', 'K'};
constexpr std::int64_t kMaxDimension = std::int64_t{1} << 40;

std::string hex(std::uint64_t value) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string out(16, '0');
  for (std::size_t i = 16; i-- > 0; value >>= 4) out[i] = kDigits[value & 15];
  return out;
}

template <typename Number>
bool parse_number(std::string_view text, Number& out, int base = 10) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out, base);
  return error == std::errc() && end == text.data() + text.size();
}

// Reads fields of one manifest; every error names the file and the field.
class Reader {
 public:
  explicit Reader(std::string_view name) : name_(name) {}

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    throw Error(ErrorCode::kInvalidArgument, str(name_, ": ", parts...));
  }
  const nlohmann::json& field(const nlohmann::json& object, const char* key) const {
    if (!object.is_object()) fail("expected an object with ", key, ", seen ", object.type_name());
    const auto at = object.find(key);
    if (at == object.end()) fail("has no ", key);
    return *at;
  }
  std::int64_t integer(const nlohmann::json& object, const char* key, std::int64_t min,
                       std::int64_t max) const {
    const nlohmann::json& value = field(object, key);
    if (!value.is_number_integer()) fail(key, ": expected an integer, seen ", value.type_name());
    // Above 2^63 the library keeps it unsigned.
    const std::int64_t out =
        value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX ? -1 : value.get<std::int64_t>();
    if (out < min || out > max) fail(key, ": expected ", min, "..", max, ", seen ", value.dump());
    return out;
  }
  std::string text(const nlohmann::json& object, const char* key) const {
    const nlohmann::json& value = field(object, key);
    if (!value.is_string()) fail(key, ": expected a text, seen ", value.type_name());
    return value.get<std::string>();
  }
  std::uint64_t hash(const nlohmann::json& object, const char* key) const {
    const std::string digits = text(object, key);
    std::uint64_t out = 0;
    if (digits.size() != 16 || !parse_number(digits, out, 16)) fail(key, ": expected 16 hexadecimal digits");
    return out;
  }
  const nlohmann::json& list(const nlohmann::json& object, const char* key) const {
    const nlohmann::json& value = field(object, key);
    if (!value.is_array()) fail(key, ": expected a list, seen ", value.type_name());
    return value;
  }

 private:
  std::string_view name_;
};

}  // namespace

std::uint64_t checksum(std::span<const std::byte> bytes) {
  Hasher hasher;
  hasher.add(bytes.size());
  std::size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, 8);
    hasher.add(word);
  }
  if (i < bytes.size()) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, bytes.size() - i);
    hasher.add(word);
  }
  return hasher.value();
}

std::string to_text(const CheckpointManifest& manifest) {
  using nlohmann::json;
  json semantic = json::array(), shards = json::array(), sections = json::array();
  for (const KeyValue& v : manifest.semantic) semantic.push_back({v.key, v.value});
  for (const ShardFile& s : manifest.shards) shards.push_back({{"file", s.file}, {"bytes", s.bytes}});
  for (const TensorSection& s : manifest.sections)
    sections.push_back({{"name", s.name},
                        {"dtype", s.dtype},
                        {"shard", s.shard},
                        {"offset", s.offset_bytes},
                        {"rows", s.rows},
                        {"cols", s.cols},
                        {"checksum", hex(s.checksum)}});
  const json out{{"nonce", hex(manifest.nonce)},
                 {"step", manifest.step},
                 {"seed", manifest.seed},
                 {"next_token", manifest.next_token},
                 {"text_bytes", manifest.text_bytes},
                 {"text_hash", hex(manifest.text_hash)},
                 {"config_hash", hex(manifest.config_hash)},
                 {"semantic", semantic},
                 {"adaptive", manifest.adaptive},
                 {"world", manifest.world},
                 {"shards", shards},
                 {"sections", sections}};
  const std::string body = out.dump(1, ' ', false, json::error_handler_t::replace) + "\n";
  return str(kMagic, " ", kCheckpointVersion, " ", body.size(), " ",
             hex(checksum(std::as_bytes(std::span(body)))), "\n", body);
}

CheckpointManifest parse_manifest(std::string_view text, std::string_view name) {
  const Reader read(name);
  // Head line.
  const std::size_t end = text.substr(0, 128).find('\n');
  const std::string_view head = text.substr(0, end);
  if (end == std::string_view::npos || head.substr(0, kMagic.size()) != kMagic)
    read.fail("is no manifest of a checkpoint: expected a first line \"", kMagic,
              " VERSION BYTES CHECKSUM\"");
  std::array<std::string_view, 3> words;
  std::string_view rest = head.substr(kMagic.size());
  for (std::string_view& word : words) {
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    word = rest.substr(0, rest.find(' '));
    rest.remove_prefix(word.size());
  }
  std::int32_t version = 0;
  if (!parse_number(words[0], version)) read.fail("the first line has no version");
  if (version != kCheckpointVersion)
    read.fail("format version: expected ", kCheckpointVersion, ", seen ", version,
              "; it was written by another release");
  std::uint64_t size = 0, sum = 0;
  if (!parse_number(words[1], size) || words[2].size() != 16 || !parse_number(words[2], sum, 16) ||
      !rest.empty())
    read.fail("the first line is broken: expected \"", kMagic, " VERSION BYTES CHECKSUM\"");
  const std::string_view body = text.substr(end + 1);
  if (body.size() != size)
    read.fail(body.size() < size ? "is truncated" : "has bytes at its end", ": expected ", size,
              " bytes after the first line, seen ", body.size());
  const std::uint64_t seen = checksum(std::as_bytes(std::span(body)));
  if (seen != sum) read.fail("is corrupt: expected checksum ", hex(sum), ", seen ", hex(seen));

  const nlohmann::json json = nlohmann::json::parse(body, nullptr, false);
  if (json.is_discarded()) read.fail("is no JSON after the first line");
  CheckpointManifest out;
  out.nonce = read.hash(json, "nonce");
  out.step = read.integer(json, "step", 1, std::int64_t{1} << 40);
  out.seed = read.integer(json, "seed", 0, INT64_MAX);
  out.next_token = read.integer(json, "next_token", 0, INT64_MAX);
  out.text_bytes = read.integer(json, "text_bytes", 1, INT64_MAX);
  out.text_hash = read.hash(json, "text_hash");
  out.config_hash = read.hash(json, "config_hash");
  out.world = read.text(json, "world");
  for (const auto& pair : read.list(json, "semantic")) {
    if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_string())
      read.fail("semantic: expected pairs of texts");
    out.semantic.push_back({pair[0].get<std::string>(), pair[1].get<std::string>()});
  }
  for (const auto& state : read.list(json, "adaptive")) {
    if (!state.is_array()) read.fail("adaptive: expected lists of numbers");
    std::vector<double> values;
    for (const auto& value : state) {
      if (!value.is_number() || !std::isfinite(value.get<double>()))
        read.fail("adaptive: expected finite numbers, seen ", value.dump());
      values.push_back(value.get<double>());
    }
    out.adaptive.push_back(std::move(values));
  }
  for (const auto& shard : read.list(json, "shards")) {
    ShardFile file{read.text(shard, "file"),
                   read.integer(shard, "bytes", static_cast<std::int64_t>(kShardHeaderBytes), INT64_MAX)};
    // A name, not a way out of the folder.
    if (file.file.empty() || file.file.size() > 200 ||
        file.file.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-.") != std::string::npos ||
        file.file[0] == '.')
      read.fail("shards: ", nlohmann::json(file.file).dump(-1, ' ', true), " is no name of a shard");
    out.shards.push_back(std::move(file));
  }
  std::set<std::string> names;
  for (const auto& section : read.list(json, "sections")) {
    TensorSection s;
    s.name = read.text(section, "name");
    if (s.name.empty() || s.name.size() > 200) read.fail("sections: a name of ", s.name.size(), " bytes");
    if (!names.insert(s.name).second) read.fail("section ", s.name, " occurs twice");
    s.dtype = read.text(section, "dtype");
    if (s.dtype != "f32" && s.dtype != "f64") read.fail("section ", s.name, ": dtype must be f32 or f64");
    s.shard = static_cast<std::int32_t>(
        read.integer(section, "shard", 0, static_cast<std::int64_t>(out.shards.size()) - 1));
    s.rows = read.integer(section, "rows", 0, kMaxDimension);
    s.cols = read.integer(section, "cols", 0, kMaxDimension);
    s.checksum = read.hash(section, "checksum");
    const std::int64_t file_bytes = out.shards[static_cast<std::size_t>(s.shard)].bytes;
    s.offset_bytes =
        read.integer(section, "offset", static_cast<std::int64_t>(kShardHeaderBytes), file_bytes);
    // Division first: the product may not fit.
    const std::int64_t room = (file_bytes - s.offset_bytes) / (s.dtype == "f64" ? 8 : 4);
    if (s.rows > 0 && s.cols > room / s.rows)
      read.fail("section ", s.name, ": [", s.rows, ", ", s.cols, "] at byte ", s.offset_bytes,
                " does not fit its shard of ", file_bytes, " bytes");
    out.sections.push_back(std::move(s));
  }
  return out;
}

std::vector<std::byte> shard_header(const CheckpointManifest& manifest, std::int32_t shard,
                                    std::int64_t file_bytes) {
  std::vector<std::byte> out(kShardHeaderBytes, std::byte{0});
  std::memcpy(out.data(), kShardMagic.data(), 8);
  std::memcpy(out.data() + 8, &kCheckpointVersion, 4);
  std::memcpy(out.data() + 12, &shard, 4);
  std::memcpy(out.data() + 16, &manifest.nonce, 8);
  std::memcpy(out.data() + 24, &manifest.step, 8);
  std::memcpy(out.data() + 32, &file_bytes, 8);
  return out;
}

void check_shard_header(std::span<const std::byte> bytes, const CheckpointManifest& manifest,
                        std::int32_t shard, std::string_view name) {
  Require(bytes.size() >= kShardHeaderBytes && std::memcmp(bytes.data(), kShardMagic.data(), 8) == 0,
          ErrorCode::kInvalidArgument, name, ": section header: is no shard of a checkpoint");
  const std::vector<std::byte> wanted =
      shard_header(manifest, shard, manifest.shards[static_cast<std::size_t>(shard)].bytes);
  const auto compare = [&](std::size_t at, std::size_t size, const char* what) {
    std::uint64_t expected = 0, seen = 0;
    std::memcpy(&expected, wanted.data() + at, size);
    std::memcpy(&seen, bytes.data() + at, size);
    Require(expected == seen, ErrorCode::kInvalidArgument, name, ": section header: ", what, ": expected ",
            expected, ", seen ", seen);
  };
  compare(8, 4, "format version");
  compare(12, 4, "number of the shard");
  compare(16, 8, "nonce of the save");
  compare(24, 8, "step");
  compare(32, 8, "bytes of the file");
}

}  // namespace sluice::train
