// The configuration: plain nested structs, filled from one schema table (config_schema.cpp).
//
// Order: defaults < file (TOML) < environment SLUICE_SECTION_KEY < --set section.key=value. Every value
// remembers where it came from. Absent means default; present but wrong (type, range, unknown key, trailing
// junk, contradiction) throws kInvalidConfig naming the source: "file:line:column", the environment variable,
// or the --set.
//
// Kinds of keys: semantic keys change results or the protocol and must be equal on all ranks
// (semantic_values() tells which differ); agreed keys are decided by rank 0 and broadcast; local keys may
// differ.
//
// Thread-safety: values; functions are pure but for reading the file and the environment. Blocks on the file
// only.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/base/dtype.hpp"
#include "sluice/base/log.hpp"
#include "sluice/base/topology.hpp"

namespace sluice {

// topology.nodes in one of its three forms, or not declared: then nodes are discovered.
struct NodesSpec {
  std::int32_t num_nodes = 0;                    // 0: not declared
  std::int32_t ranks_per_node = 0;               // 0: the ranks that there are, in equal parts
  std::vector<std::vector<std::int32_t>> lists;  // int32 [num_nodes][ranks of the node], or empty

  bool declared() const { return num_nodes > 0; }
  // How many ranks the declaration names; 0 when it leaves that open.
  std::int32_t num_ranks() const;
  friend bool operator==(const NodesSpec&, const NodesSpec&) = default;
};

// What rows look like on the wire. kRows: as in memory.
enum class WireDType : std::uint8_t { kF32, kBF16, kRows };
constexpr DType wire_dtype_of(WireDType wire, DType rows) {
  return wire == WireDType::kRows ? rows : wire == WireDType::kF32 ? DType::kF32 : DType::kBF16;
}

// What each member means, its unit, range and default stand in the schema: docs/config.md.
struct Config {
  struct Model {
    enum class Activation : std::uint8_t { kSwiGLU, kGelu, kRelu };
    std::int32_t num_layers;
    std::int32_t num_experts;
    std::int64_t hidden;
    std::int64_t ffn;
    Activation activation;
    std::int32_t context;
    std::int64_t embed;
    DType dtype;
    std::int32_t zero_experts;
    std::int32_t copy_experts;
    std::int32_t constant_experts;
    enum class ChainResidual : std::uint8_t { kNone, kInner, kOuter };
    std::int32_t chain_iterations;
    ChainResidual chain_residual;
    bool chain_shared_gate;
    std::int64_t shared_ffn;
    bool gate_residual;

    // Experts with weights; their ids come first, then zero, copy and constant experts.
    std::int32_t num_ffn_experts() const {
      return num_experts - zero_experts - copy_experts - constant_experts;
    }
    std::int32_t num_gates() const { return chain_shared_gate ? 1 : chain_iterations; }  // of a layer
  } model;

  struct Routing {
    enum class Policy : std::uint8_t {
      kRelu,
      kSoftmaxTopK,
      kSigmoidTopK,
      kNodeLimited,
      kBoundedRegret,
      kMoepp,
      kEtr
    };
    enum class ReluVariant : std::uint8_t { kPaper, kOfficial };
    enum class RegretBase : std::uint8_t { kSoftmaxTopK, kSigmoidTopK, kNodeLimited };
    enum class RegretScope : std::uint8_t { kRank, kNode };
    enum class EtrChoice : std::uint8_t { kAuto, kToken, kBoth };
    enum class EtrQuota : std::uint8_t { kGlobal, kLocal };
    Policy policy;
    std::int32_t top_k;
    bool renormalize;
    bool pre_softmax;
    double route_scale;
    ReluVariant relu_variant;
    double relu_lambda0;
    double relu_alpha;
    bool relu_load_balanced;
    double aux_loss;
    double z_loss;
    double bias_update;
    std::int32_t num_groups;
    std::int32_t top_groups;
    RegretBase regret_base;
    double regret_epsilon;
    RegretScope regret_scope;
    double locality_loss;
    double locality_epsilon;
    double capacity_factor;
    double moepp_tau;
    double etr_tau;
    double etr_temperature;
    double etr_delta_max;
    EtrChoice etr_choice;
    EtrQuota etr_quota;
    double etr_switch_on;
    double etr_switch_off;
    double etr_switch_decay;
  } routing;

  struct Placement {
    enum class Policy : std::uint8_t { kContiguous, kFile };
    Policy policy;
    std::string file;
    std::vector<std::int32_t> slots_per_rank;  // int32 [ranks], or empty: even
  } placement;

  struct TopologyKeys {
    std::int32_t ranks;
    NodesSpec nodes;
    double in_node_bytes_per_s;
    double in_node_latency_us;
    double across_nodes_bytes_per_s;
    double across_nodes_latency_us;
  } topology;

  struct Comm {
    std::string transport;
    std::int64_t timeout_ms;
    std::string rendezvous;
    std::string secret_file;
    WireDType wire_dtype;
    WireDType combine_dtype;
    bool deterministic;
  } comm;

  struct Schedule {
    enum class Policy : std::uint8_t { kSequential, kPipelined, kBySource, kHierarchical, kAuto };
    enum class Exchange : std::uint8_t { kGateway, kDirect };
    Policy policy;
    std::int32_t num_chunks;
    std::int32_t chain_chunks;
    Exchange exchange;
    std::string profile;
  } schedule;

  struct Machine {
    std::string name;
    std::string source;
    double gemm_flops_per_s;
    double memory_bytes_per_s;
    double op_us;
    double message_us;
  } machine;

  struct Runtime {
    enum class Save : std::uint8_t { kRows, kActivations };
    enum class Progress : std::uint8_t { kAuto, kInline, kThread };
    enum class Device : std::uint8_t { kCpu, kCuda };
    Device device;
    std::int32_t threads_per_rank;
    LogLevel log_level;
    Save save;
    Progress progress;
    std::string timeline;
  } runtime;

  struct Train {
    std::int64_t steps;
    std::int64_t seed;
    std::int64_t tokens_per_step;
    double learning_rate;
    std::int64_t warmup_steps;
    double min_learning_rate_ratio;
    double weight_decay;
    double beta1;
    double beta2;
    double epsilon;
    double grad_clip;
    double heldout_fraction;
    enum class Deal : std::uint8_t { kRandom, kByPosition };
    Deal deal;
    std::string text;
    std::int64_t max_text_bytes;
    std::string report;
    enum class OnFailure : std::uint8_t { kStop, kShrink };
    std::string checkpoint_dir;
    std::int64_t checkpoint_every;
    std::int64_t checkpoint_keep;
    OnFailure on_failure;
  } train;

  struct Bench {
    std::int64_t tokens_per_rank;
    std::int32_t top_k;
    double skew;
    std::string popularity;
    std::string replay;
    std::int32_t replay_layer;
    std::int64_t iterations;
    std::int64_t warmup;
    std::int64_t seed;
  } bench;

  // All defaults of the schema.
  Config();
};

// Whether token rows travel from GPU to GPU: comm.transport is nvlink or nccl.
bool rows_go_between_gpus(const Config& config);

// How many ranks the configuration asks for (topology.ranks, else topology.nodes); 0 when it leaves that to
// the launcher.
std::int32_t configured_ranks(const Config& config);
// The topology for `num_ranks` ranks as the configuration declares it: nodes when declared (labelled so),
// else one node; link speeds as declared. Throws kInvalidConfig when the declared nodes do not have that many
// ranks.
Topology configured_topology(const Config& config, std::int32_t num_ranks);

struct ConfigSource {
  enum class Kind : std::uint8_t { kDefault, kFile, kEnvironment, kCommandLine };
  Kind kind = Kind::kDefault;
  std::string text =
      "default";  // "default", "file:line:column", "SLUICE_TRAIN_STEPS", "--set", or a sender's words
};

class LoadedConfig {
 public:
  Config config;

  LoadedConfig();
  // Where the value of "section.key" came from. Throws kInvalidConfig when there is no such key.
  const ConfigSource& source(std::string_view key) const;
  void set_source(std::string_view key, ConfigSource source);
  // Sets one value from its text form, as an agreed value that rank 0 sent. Throws like load_config; the
  // caller calls validate() once all are set.
  void set(std::string_view key, std::string_view text, ConfigSource source);

 private:
  std::vector<ConfigSource> sources_;  // one a row of the schema
};

// Name and value of each environment variable that begins with SLUICE_.
using ConfigEnvironment = std::vector<std::pair<std::string, std::string>>;
ConfigEnvironment process_environment();

// Largest configuration file that is read.
inline constexpr std::size_t kMaxConfigFileBytes = std::size_t{1} << 20;

// Reads, converts, checks. `sets` are texts "section.key=value". A missing file is kNotFound, an unreadable
// one kIo.
LoadedConfig load_config(const std::optional<std::filesystem::path>& file,
                         std::span<const std::string> sets = {},
                         const ConfigEnvironment& environment = process_environment());
// The same from a text; `name` stands for the file in sources and errors.
LoadedConfig parse_config(std::string_view text, std::string_view name,
                          std::span<const std::string> sets = {}, const ConfigEnvironment& environment = {});

// Contradictions between keys. Throws kInvalidConfig naming the keys, their values and where each came from.
// load_config and parse_config call it last.
void validate(const LoadedConfig& loaded);

struct KeyValue {
  std::string key;    // "section.key"
  std::string value;  // its text form; floats print shortest round-trip
  friend bool operator==(const KeyValue&, const KeyValue&) = default;
};
// In schema order.
std::vector<KeyValue> semantic_values(const Config& config);
std::vector<KeyValue> agreed_values(const Config& config);
// Keys whose values differ, or that only one side has; for naming what two ranks do not share.
std::vector<std::string> differing_keys(std::span<const KeyValue> a, std::span<const KeyValue> b);
// Hash of semantic_values(); with `sections`, of these sections only (a checkpoint does not depend on the
// topology).
std::uint64_t semantic_hash(const Config& config, std::span<const std::string_view> sections = {});

// The effective configuration as TOML, each line with its source as a comment; loads back to the same values.
std::string effective_text(const LoadedConfig& loaded);
// {"section": {"key": {"value": ..., "source": "..."}}}
std::string effective_json(const LoadedConfig& loaded);
// docs/config.md
std::string config_markdown();
// JSON Schema (draft 2020-12) of the file.
std::string config_json_schema();

}  // namespace sluice
