// What a checkpoint of `sluice train` is on disk, and the parsing of its manifest (docs/faults.md, "Checkpoints").
//
//   DIR/step-0000000020/manifest.sluice          one line with version, size and checksum, then JSON
//   DIR/step-0000000020/shard-NONCE-00000.bin    a header and tensors, one file a rank that saved
//
// Tensors are keyed by parameter and logical expert, so any placement and world size can read them. A step without a
// manifest is no checkpoint: the manifest is renamed into place last.
//
// Thread-safety: plain values. Nothing here touches files: parse_manifest() is what reads foreign bytes.
// Errors: kInvalidArgument naming file, field, expected and seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/config.hpp"

namespace sluice::train {

inline constexpr std::int32_t kCheckpointVersion = 1;
inline constexpr std::size_t kMaxManifestBytes = std::size_t{256} << 20;
inline constexpr std::size_t kShardHeaderBytes = 64;

struct TensorSection {
  std::string name;   // "layer.0.expert.3.w1/value"; kinds: value, m, v; "history" for the losses so far
  std::string dtype;  // "f32" or "f64", little endian
  std::int32_t shard = -1;  // in CheckpointManifest::shards
  std::int64_t offset_bytes = 0;
  std::int64_t rows = 0, cols = 0;
  std::uint64_t checksum = 0;

  std::int64_t num_bytes() const { return rows * cols * (dtype == "f64" ? 8 : 4); }
};

struct ShardFile {
  std::string file;  // in the folder of the manifest
  std::int64_t bytes = 0;
};

struct CheckpointManifest {
  std::uint64_t nonce = 0;  // of this save; shards bear it
  std::int64_t step = 0;    // optimizer steps done
  // Random numbers are functions of (seed, counter); the counter is the token drawn next.
  std::int64_t seed = 0, next_token = 0;
  std::int64_t text_bytes = 0;
  std::uint64_t text_hash = 0;
  std::uint64_t config_hash = 0;              // of the semantic keys that a checkpoint depends on
  std::vector<KeyValue> semantic;             // all semantic keys, for errors that name one
  std::vector<std::vector<double>> adaptive;  // state of the selection policy, e.g. lambda of ReLU routing
  std::string world;                          // who saved it, for people
  std::vector<ShardFile> shards;
  std::vector<TensorSection> sections;
};

// Detects any change within one 8-byte word for certain, others but for one in 2^64. Not cryptographic.
std::uint64_t checksum(std::span<const std::byte> bytes);

std::string to_text(const CheckpointManifest& manifest);
// `name` stands for the file in errors. Everything is checked that can be without the shards.
CheckpointManifest parse_manifest(std::string_view text, std::string_view name);

// The first bytes of a shard. bytes: [kShardHeaderBytes]
std::vector<std::byte> shard_header(const CheckpointManifest& manifest, std::int32_t shard,
                                    std::int64_t file_bytes);
// Whether these are the first bytes of that shard of that save; throws what differs.
void check_shard_header(std::span<const std::byte> bytes, const CheckpointManifest& manifest,
                        std::int32_t shard, std::string_view name);

}  // namespace sluice::train
