#include "sluice/runtime/src/train/checkpoint.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "sluice/base/log.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/runtime/src/gather.hpp"

namespace sluice::train {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPhase = "checkpoint";
constexpr std::string_view kManifestName = "manifest.sluice";
constexpr std::string_view kStepPrefix = "step-";
constexpr std::size_t kStepDigits = 10;
constexpr std::string_view kHistory = "history";
// What a checkpoint depends on; the rest of the semantic keys may change between runs (ranks, placement, wire).
constexpr std::array<std::string_view, 3> kBoundSections = {"model", "routing", "train"};
constexpr std::int64_t kAlignment = 64;  // of a tensor in its shard

std::string padded(std::uint64_t value, std::size_t digits) {
  std::string out = std::to_string(value);
  return out.size() < digits ? std::string(digits - out.size(), '0') + out : out;
}

fs::path step_folder(const fs::path& folder, std::int64_t step) {
  return folder / str(kStepPrefix, padded(static_cast<std::uint64_t>(step), kStepDigits));
}

// The step of a folder's name; 0 when it is none.
std::int64_t step_of(const fs::path& folder) {
  const std::string name = folder.filename().string();
  if (name.size() != kStepPrefix.size() + kStepDigits ||
      name.compare(0, kStepPrefix.size(), kStepPrefix) != 0)
    return 0;
  std::int64_t step = 0;
  for (const char c : name.substr(kStepPrefix.size())) {
    if (c < '0' || c > '9') return 0;
    step = step * 10 + (c - '0');
  }
  return step;
}

// A file descriptor that closes itself. Paths in errors.
class File {
 public:
  File(const fs::path& path, int flags) : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
    Require(fd_ >= 0, errno == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo, path.string(),
            ": cannot be opened: ", std::strerror(errno));
  }
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
      if (n < 0 && errno == EINTR) continue;
      Require(n > 0, ErrorCode::kIo, path_.string(), ": cannot be written: ", std::strerror(errno));
      bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
  }
  // Returns how many bytes there were, up to the size of the span.
  std::size_t read(std::int64_t offset, std::span<std::byte> bytes) const {
    std::size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t n = ::pread(fd_, bytes.data() + done, bytes.size() - done,
                                static_cast<off_t>(offset + static_cast<std::int64_t>(done)));
      if (n < 0 && errno == EINTR) continue;
      Require(n >= 0, ErrorCode::kIo, path_.string(), ": cannot be read: ", std::strerror(errno));
      if (n == 0) break;
      done += static_cast<std::size_t>(n);
    }
    return done;
  }
  std::int64_t size() const {
    struct stat info {};
    Require(::fstat(fd_, &info) == 0 && S_ISREG(info.st_mode), ErrorCode::kIo, path_.string(),
            ": is no plain file");
    return info.st_size;
  }
  void sync() {
    const bool flushed = ::fsync(fd_) == 0;
    Require(flushed, ErrorCode::kIo, path_.string(),
            ": cannot be flushed to the disk: ", std::strerror(errno));
  }

 private:
  fs::path path_;
  int fd_;
};

void sync_folder(const fs::path& folder) {
  File(folder, O_RDONLY | O_DIRECTORY).sync();
}

// Under a temporary name, flushed, then renamed: the name stands for the whole content or nothing.
template <typename Write>
void write_whole(const fs::path& path, Write&& write) {
  fs::path temporary = path;
  temporary += ".tmp";
  {
    File file(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    write(file);
    file.sync();
  }
  const bool renamed = ::rename(temporary.c_str(), path.c_str()) == 0;
  Require(renamed, ErrorCode::kIo, path.string(), ": cannot be renamed into place: ", std::strerror(errno));
  sync_folder(path.parent_path());
}

std::string read_manifest_text(const fs::path& path) {
  const File file(path, O_RDONLY);
  const std::int64_t size = file.size();
  Require(size >= 0 && static_cast<std::uint64_t>(size) <= kMaxManifestBytes, ErrorCode::kInvalidArgument,
          path.string(), ": has ", size, " bytes; no manifest has more than ", kMaxManifestBytes);
  std::string text(static_cast<std::size_t>(size), '\0');
  text.resize(file.read(0, std::as_writable_bytes(std::span(text))));
  return text;
}

// The status of a call on this rank alone.
template <typename Call>
Status status_of(Call&& call) {
  try {
    call();
  } catch (...) {
    return current_exception_status();
  }
  return {};
}

struct Tensor {
  std::string name;
  std::string_view dtype;
  std::int64_t rows = 0, cols = 0;
  std::span<std::byte> bytes;
};

std::array<Tensor, 3> tensors_of(const Parameter& p) {
  const auto one = [&](const char* kind, std::span<float> values) {
    return Tensor{str(p.shape.name, "/", kind), "f32", p.shape.rows, p.shape.cols,
                  std::as_writable_bytes(values)};
  };
  return {one("value", p.value), one("m", p.m), one("v", p.v)};
}

}  // namespace

std::vector<std::int64_t> list_checkpoints(const fs::path& folder) {
  std::vector<std::int64_t> out;
  std::error_code ec;
  for (fs::directory_iterator at(folder, ec), end; !ec && at != end; at.increment(ec)) {
    std::error_code ignored;
    const std::int64_t step = step_of(at->path());
    if (step > 0 && fs::exists(at->path() / kManifestName, ignored)) out.push_back(step);
  }
  Require(!ec || ec == std::errc::no_such_file_or_directory, ErrorCode::kIo, folder.string(),
          ": cannot be listed: ", ec.message());
  std::sort(out.begin(), out.end());
  return out;
}

CheckpointStore::CheckpointStore(Runtime& runtime, const LoadedConfig& loaded, const Text& text)
    : runtime_(runtime),
      config_(loaded.config),
      folder_(loaded.config.train.checkpoint_dir),
      text_bytes_(static_cast<std::int64_t>(text.bytes.size())),
      text_hash_(checksum(std::as_bytes(std::span(text.bytes)))) {
  Require(!folder_.empty(), ErrorCode::kInvalidConfig,
          "train.checkpoint_dir is empty; name the folder of the checkpoints");
}

void CheckpointStore::require_fresh() const {
  Status status;
  if (runtime_.rank() == RankId(0))
    status = status_of([&] {
      const std::vector<std::int64_t> steps = list_checkpoints(folder_);
      Require(steps.empty(), ErrorCode::kInvalidState, "train.checkpoint_dir ", folder_.string(),
              " already holds ", steps.size(), " checkpoint(s), the newest of step ",
              steps.empty() ? 0 : steps.back(),
              "; add --resume to go on from it, or name another folder for a new job");
      // Before the work, of which nothing would be left.
      std::error_code ec;
      fs::create_directories(folder_, ec);
      Require(!ec, ErrorCode::kIo, "train.checkpoint_dir ", folder_.string(),
              ": cannot be made: ", ec.message());
      const bool writable = ::access(folder_.c_str(), W_OK | X_OK) == 0;
      Require(writable, ErrorCode::kIo, "train.checkpoint_dir ", folder_.string(),
              ": cannot be written: ", std::strerror(errno));
    });
  agree_on_success(runtime_, status, kPhase);
}

// ---- save ------------------------------------------------------------------------------------------------------------

void CheckpointStore::save(const Model& model, std::int64_t step, const History& history) const {
  const bool root = runtime_.rank() == RankId(0);
  const fs::path folder = step_folder(folder_, step);
  CheckpointManifest manifest;
  manifest.step = step;
  Status status;
  if (root)
    status = status_of([&] {
      std::error_code ec;
      fs::create_directories(folder, ec);
      Require(!ec, ErrorCode::kIo, folder.string(), ": cannot be made: ", ec.message());
      sync_folder(folder_);
      std::random_device random;
      manifest.nonce = std::uint64_t{random()} << 32 | random();
    });
  agree_on_success(runtime_, status, kPhase);
  runtime_.broadcast(std::as_writable_bytes(std::span(&manifest.nonce, 1)), RankId(0), kPhase);

  // This rank's tensors: its own experts, every n-th replicated parameter, and on rank 0 the history.
  std::vector<Tensor> tensors;
  std::size_t replicated = 0;
  for (const Parameter& p : model.parameters()) {
    const bool mine = p.shape.expert >= 0 ? p.owned
                                          : replicated++ % static_cast<std::size_t>(runtime_.num_ranks()) ==
                                                runtime_.rank().index();
    if (!mine) continue;
    for (Tensor& tensor : tensors_of(p)) tensors.push_back(std::move(tensor));
  }
  std::vector<double> rows = history.values;
  if (root)
    tensors.push_back({std::string(kHistory), "f64",
                       history.cols == 0 ? 0 : static_cast<std::int64_t>(rows.size()) / history.cols,
                       history.cols, std::as_writable_bytes(std::span(rows))});

  nlohmann::json mine;
  status = status_of([&] {
    const auto shard = static_cast<std::int32_t>(runtime_.rank().index());
    std::int64_t size = static_cast<std::int64_t>(kShardHeaderBytes);
    nlohmann::json sections = nlohmann::json::array();
    const auto aligned = [](std::int64_t at) { return (at + kAlignment - 1) / kAlignment * kAlignment; };
    for (const Tensor& tensor : tensors) {
      sections.push_back({{"name", tensor.name},
                          {"dtype", tensor.dtype},
                          {"offset", size},
                          {"rows", tensor.rows},
                          {"cols", tensor.cols},
                          {"checksum", checksum(tensor.bytes)}});
      size = aligned(size + static_cast<std::int64_t>(tensor.bytes.size()));
    }
    const std::string name =
        str("shard-", manifest.nonce, "-", padded(static_cast<std::uint64_t>(shard), 5), ".bin");
    mine = {{"file", name}, {"bytes", size}, {"sections", std::move(sections)}};
    write_whole(folder / name, [&](File& file) {
      file.write(shard_header(manifest, shard, size));
      constexpr std::array<std::byte, kAlignment> kZeros{};
      for (const Tensor& tensor : tensors) {
        file.write(tensor.bytes);
        const auto bytes = static_cast<std::int64_t>(tensor.bytes.size());
        file.write(std::span(kZeros).first(static_cast<std::size_t>(aligned(bytes) - bytes)));
      }
    });
  });
  agree_on_success(runtime_, status, kPhase);
  const std::vector<std::string> all = gather_to_root(runtime_, mine.dump(), kPhase);

  if (root)
    status = status_of([&] {
      manifest.seed = config_.train.seed;
      manifest.next_token = step * config_.train.tokens_per_step;
      manifest.text_bytes = text_bytes_;
      manifest.text_hash = text_hash_;
      manifest.config_hash = semantic_hash(config_, kBoundSections);
      manifest.semantic = semantic_values(config_);
      for (const AdaptiveState& state : model.adaptive_states()) manifest.adaptive.push_back(state.values);
      manifest.world = str(runtime_.topology().describe(), ", transport ", runtime_.transport().name());
      for (const std::string& text : all) {
        const nlohmann::json shard = nlohmann::json::parse(text);
        const auto index = static_cast<std::int32_t>(manifest.shards.size());
        manifest.shards.push_back(
            {shard.at("file").get<std::string>(), shard.at("bytes").get<std::int64_t>()});
        for (const auto& s : shard.at("sections"))
          manifest.sections.push_back({s.at("name").get<std::string>(), s.at("dtype").get<std::string>(),
                                       index, s.at("offset").get<std::int64_t>(),
                                       s.at("rows").get<std::int64_t>(), s.at("cols").get<std::int64_t>(),
                                       s.at("checksum").get<std::uint64_t>()});
      }
      const std::string text = to_text(manifest);
      // What could not be read back must not replace what can.
      (void)parse_manifest(text, (folder / kManifestName).string());
      write_whole(folder / kManifestName, [&](File& file) { file.write(std::as_bytes(std::span(text))); });
      // Shards of an earlier save of this step.
      std::set<std::string> wanted{std::string(kManifestName)};
      for (const ShardFile& shard : manifest.shards) wanted.insert(shard.file);
      std::error_code ignored;
      for (const auto& entry : fs::directory_iterator(folder, ignored))
        if (!wanted.contains(entry.path().filename().string())) fs::remove(entry.path(), ignored);
      delete_old();
    });
  agree_on_success(runtime_, status, kPhase);
}

void CheckpointStore::delete_old() const {
  const std::vector<std::int64_t> steps = list_checkpoints(folder_);
  const auto keep = static_cast<std::size_t>(config_.train.checkpoint_keep);
  std::error_code ignored;
  for (std::size_t i = 0; i + keep < steps.size(); ++i) {
    const fs::path old = step_folder(folder_, steps[i]);
    fs::remove(old / kManifestName, ignored);  // first, so that no half of it counts as a checkpoint
    fs::remove_all(old, ignored);
  }
  // Folders that a crash left without a manifest, older than what is kept.
  std::vector<fs::path> broken;
  for (const auto& entry : fs::directory_iterator(folder_, ignored)) {
    const std::int64_t step = step_of(entry.path());
    if (step > 0 && !steps.empty() && step < steps.back() &&
        !fs::exists(entry.path() / kManifestName, ignored))
      broken.push_back(entry.path());
  }
  for (const fs::path& path : broken) fs::remove_all(path, ignored);
}

// ---- restore ---------------------------------------------------------------------------------------------------------

std::int64_t CheckpointStore::restore(Model& model, History& history, std::int64_t step,
                                      bool allow_older) const {
  // The list of steps is rank 0's.
  std::vector<std::int64_t> steps;
  Status status;
  if (runtime_.rank() == RankId(0))
    status = status_of([&] {
      steps = list_checkpoints(folder_);
      if (step > 0) std::erase_if(steps, [&](std::int64_t s) { return s != step; });
      Require(!steps.empty(), ErrorCode::kNotFound, folder_.string(), ": there is no checkpoint",
              step > 0 ? str(" of step ", step) : std::string(), " to go on from; a checkpoint is a folder ",
              kStepPrefix, "N with a ", kManifestName);
    });
  agree_on_success(runtime_, status, kPhase);
  auto count = static_cast<std::int64_t>(steps.size());
  runtime_.broadcast(std::as_writable_bytes(std::span(&count, 1)), RankId(0), kPhase);
  steps.resize(static_cast<std::size_t>(count));
  runtime_.broadcast(std::as_writable_bytes(std::span(steps)), RankId(0), kPhase);

  for (std::size_t i = steps.size(); i-- > 0;) {
    try {
      restore_step(model, history, steps[i]);
      return steps[i];
    } catch (const Error& error) {  // the same on all ranks
      const bool damaged = error.code() == ErrorCode::kInvalidArgument ||
                           error.code() == ErrorCode::kNotFound || error.code() == ErrorCode::kIo;
      if (!damaged || i == 0) throw;
      if (!allow_older)
        throw Error(error.code(), str(error.message(), "; the checkpoint before it is of step ", steps[i - 1],
                                      ": `--resume-step ", steps[i - 1], "` goes on from there"));
      if (runtime_.rank() == RankId(0))
        log_warn("checkpoint of step ", steps[i], " refused: ", error.message(),
                 "; going back to the one of step ", steps[i - 1]);
    }
  }
  throw Error(ErrorCode::kInternal, "a list of checkpoints ended without a result");
}

void CheckpointStore::restore_step(Model& model, History& history, std::int64_t step) const {
  const fs::path folder = step_folder(folder_, step);
  const std::string name = (folder / kManifestName).string();
  std::string text;
  Status status;
  if (runtime_.rank() == RankId(0)) status = status_of([&] { text = read_manifest_text(name); });
  agree_on_success(runtime_, status, kPhase);
  text = text_of_root(runtime_, std::move(text), kMaxManifestBytes, "a manifest", kPhase);
  status = status_of([&] {
    const CheckpointManifest manifest = parse_manifest(text, name);
    Require(manifest.step == step, ErrorCode::kInvalidArgument, name, ": step: expected ", step, ", seen ",
            manifest.step);
    check_model(manifest, name);
    read_sections(manifest, folder, model, history);
    std::vector<AdaptiveState> adaptive;
    for (const auto& values : manifest.adaptive) adaptive.push_back({values});
    model.restored(std::move(adaptive));
  });
  agree_on_success(runtime_, status, kPhase);
}

void CheckpointStore::check_model(const CheckpointManifest& manifest, std::string_view name) const {
  const std::vector<KeyValue> mine = semantic_values(config_);
  const auto bound = [](std::string_view key) {
    return std::find(kBoundSections.begin(), kBoundSections.end(), key.substr(0, key.find('.'))) !=
           kBoundSections.end();
  };
  const auto value_in = [](std::span<const KeyValue> values, const std::string& key) {
    const auto at = std::find_if(values.begin(), values.end(), [&](const auto& v) { return v.key == key; });
    return at == values.end() ? std::string("(no such key)") : at->value;
  };
  std::string differ, others;
  for (const std::string& key : differing_keys(manifest.semantic, mine)) {
    std::string& list = bound(key) ? differ : others;
    list += str(list.empty() ? "" : "; ", key, ": the checkpoint has ", value_in(manifest.semantic, key),
                ", this job ", value_in(mine, key));
  }
  Require(differ.empty(), ErrorCode::kInvalidConfig, name,
          ": section semantic: is a checkpoint of another job: ", differ);
  const std::uint64_t hash = semantic_hash(config_, kBoundSections);
  Require(manifest.config_hash == hash, ErrorCode::kInvalidConfig, name, ": section config_hash: expected ",
          hash, ", seen ", manifest.config_hash);
  Require(manifest.text_bytes == text_bytes_ && manifest.text_hash == text_hash_, ErrorCode::kInvalidConfig,
          name, ": section text: was trained on another text: expected ", manifest.text_bytes,
          " bytes with hash ", manifest.text_hash, ", seen ", text_bytes_, " bytes with hash ", text_hash_,
          "; name the text by --text");
  Require(manifest.seed == config_.train.seed &&
              manifest.next_token == manifest.step * config_.train.tokens_per_step,
          ErrorCode::kInvalidArgument, name, ": section next_token: expected ",
          manifest.step * config_.train.tokens_per_step, ", seen ", manifest.next_token);
  if (!others.empty() && runtime_.rank() == RankId(0))
    log_info("going on with other keys than the checkpoint was made with; bits may differ: ", others);
}

void CheckpointStore::read_sections(const CheckpointManifest& manifest, const fs::path& folder, Model& model,
                                    History& history) const {
  std::map<std::string_view, const TensorSection*> by_name;
  for (const TensorSection& section : manifest.sections) by_name[section.name] = &section;
  std::map<std::int32_t, std::unique_ptr<File>> files;
  const auto path_of = [&](std::int32_t shard) {
    return folder / manifest.shards[static_cast<std::size_t>(shard)].file;
  };
  const auto open = [&](std::int32_t shard) -> const File& {
    std::unique_ptr<File>& file = files[shard];
    if (file) return *file;
    const fs::path path = path_of(shard);
    file = std::make_unique<File>(path, O_RDONLY);
    const std::int64_t expected = manifest.shards[static_cast<std::size_t>(shard)].bytes, seen = file->size();
    // The first section that lies beyond the end, for the error.
    std::string_view cut = "end";
    for (const TensorSection& s : manifest.sections)
      if (s.shard == shard && s.offset_bytes + s.num_bytes() > seen) {
        cut = s.name;
        break;
      }
    Require(seen == expected, ErrorCode::kInvalidArgument, path.string(), ": section ", cut, ": ",
            seen < expected ? "the file is truncated" : "the file has bytes at its end", ": expected ",
            expected, " bytes, seen ", seen);
    std::array<std::byte, kShardHeaderBytes> header;
    const std::size_t size = file->read(0, header);
    check_shard_header(std::span(header).first(size), manifest, shard, path.string());
    return *file;
  };
  const auto find = [&](const std::string& name) -> const TensorSection& {
    const auto at = by_name.find(name);
    Require(at != by_name.end(), ErrorCode::kInvalidArgument, (folder / kManifestName).string(), ": section ",
            name, ": expected, seen none");
    return *at->second;
  };
  const auto read = [&](const TensorSection& section, std::span<std::byte> bytes) {
    const std::size_t seen_bytes = open(section.shard).read(section.offset_bytes, bytes);
    Require(seen_bytes == bytes.size(), ErrorCode::kInvalidArgument, path_of(section.shard).string(),
            ": section ", section.name, ": expected ", bytes.size(), " bytes, seen ", seen_bytes);
    const std::uint64_t seen = checksum(bytes);
    Require(seen == section.checksum, ErrorCode::kInvalidArgument, path_of(section.shard).string(),
            ": section ", section.name, ": is corrupt: expected checksum ", section.checksum, ", seen ",
            seen);
  };
  for (const Parameter& p : model.parameters())
    for (const Tensor& tensor : tensors_of(p)) {
      const TensorSection& section = find(tensor.name);
      Require(section.dtype == tensor.dtype && section.rows == tensor.rows && section.cols == tensor.cols,
              ErrorCode::kInvalidArgument, (folder / kManifestName).string(), ": section ", tensor.name,
              ": expected ", tensor.dtype, " [", tensor.rows, ", ", tensor.cols, "], seen ", section.dtype,
              " [", section.rows, ", ", section.cols, "]");
      read(section, tensor.bytes);
    }
  const TensorSection& rows = find(std::string(kHistory));
  Require(rows.dtype == "f64" && rows.rows == manifest.step && rows.cols == history.cols,
          ErrorCode::kInvalidArgument, (folder / kManifestName).string(), ": section ", kHistory,
          ": expected f64 [", manifest.step, ", ", history.cols, "], seen ", rows.dtype, " [", rows.rows,
          ", ", rows.cols, "]");
  history.values.resize(static_cast<std::size_t>(rows.rows * rows.cols));
  read(rows, std::as_writable_bytes(std::span(history.values)));
}

}  // namespace sluice::train
