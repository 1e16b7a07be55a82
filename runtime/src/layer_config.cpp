#include "sluice/runtime/src/layer_config.hpp"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "sluice/base/log.hpp"
#include "sluice/scheduler/placement_file.hpp"
#include "sluice/scheduler/selection/factory.hpp"

namespace sluice {
namespace {

constexpr std::int64_t kMaxPlacementBytes = std::int64_t{256} << 20;

PlacementFile read_placement_file(const Config& config) {
  const std::string& path = config.placement.file;
  std::error_code ec;
  Require(!std::filesystem::exists(path, ec) || std::filesystem::is_regular_file(path, ec), ErrorCode::kIo,
          "placement.file ", path, ": is no file");
  std::ifstream in(path, std::ios::binary);
  Require(in.is_open(), errno == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo, "placement.file ", path,
          ": cannot be opened: ", std::strerror(errno));
  const auto size = static_cast<std::int64_t>(std::filesystem::file_size(path, ec));
  Require(!ec && size <= kMaxPlacementBytes, ErrorCode::kInvalidConfig, "placement.file ", path,
          ": is larger than ", kMaxPlacementBytes, " bytes; no placement is");
  std::string text(static_cast<std::size_t>(size), '\0');
  in.read(text.data(), size);
  Require(in.gcount() == size, ErrorCode::kIo, "placement.file ", path, ": cannot be read");
  PlacementFile file = parse_placement(text, path);
  Require(file.num_experts == config.model.num_experts, ErrorCode::kInvalidConfig, path, " places ",
          file.num_experts, " experts, model.num_experts is ", config.model.num_experts);
  return file;
}

}  // namespace

void check_placement_file(const Config& config, const Topology& topology, std::int32_t num_layers,
                          bool warns) {
  if (config.placement.policy != Config::Placement::Policy::kFile) return;
  const PlacementFile file = read_placement_file(config);
  const auto layers = static_cast<std::int32_t>(file.layers.size());
  Require(num_layers == 0 || layers == 1 || layers == num_layers, ErrorCode::kInvalidConfig,
          config.placement.file, " has ", layers, " layers, model.num_layers is ", num_layers,
          "; it must have one for each layer, or one for all (a recorded chain counts each iteration as a "
          "layer)");
  std::vector<std::vector<std::int32_t>> nodes;
  for (std::int32_t n = 0; n < topology.num_nodes(); ++n) nodes.push_back(topology.ranks_of(NodeId(n)));
  if (warns && file.nodes != nodes)
    log_warn("placement.file ", config.placement.file,
             " was planned for other nodes than those of this job, ", topology.describe(),
             "; it holds, but may cross nodes more than one that is planned for them");
}

Placement placement_of(const Config& config, std::int32_t num_ranks, std::int32_t layer) {
  const auto& m = config.model;
  std::vector<ExpertKind> kinds(static_cast<std::size_t>(m.num_ffn_experts()), ExpertKind::kFFN);
  kinds.insert(kinds.end(), static_cast<std::size_t>(m.zero_experts), ExpertKind::kZero);
  kinds.insert(kinds.end(), static_cast<std::size_t>(m.copy_experts), ExpertKind::kCopy);
  kinds.insert(kinds.end(), static_cast<std::size_t>(m.constant_experts), ExpertKind::kConstant);
  if (config.placement.policy == Config::Placement::Policy::kFile) {
    const std::string& path = config.placement.file;
    const PlacementFile file = read_placement_file(config);
    Require(file.num_ranks() == num_ranks, ErrorCode::kInvalidConfig, path, " places experts on ",
            file.num_ranks(), " ranks, there are ", num_ranks);
    const auto index = file.layers.size() == 1 ? std::size_t{0} : static_cast<std::size_t>(layer);
    Require(index < file.layers.size(), ErrorCode::kInvalidConfig, path, " has ", file.layers.size(),
            " layers, layer ", layer, " is asked for; it must have one for each layer, or one for all");
    try {
      return placement_from_lists(m.num_experts, file.layers[index].experts_of_rank, kinds);
    } catch (const Error& e) {
      throw Error(ErrorCode::kInvalidConfig, str(path, ": layers[", index, "]: ", e.message()));
    }
  }
  return contiguous_placement(m.num_experts, num_ranks, kinds, config.placement.slots_per_rank);
}

MoeLayerOptions layer_options(const Config& config) {
  MoeLayerOptions out;
  out.hidden = config.model.hidden;
  out.ffn = config.model.ffn;
  switch (config.model.activation) {
    case Config::Model::Activation::kSwiGLU:
      out.activation = ExpertActivation::kSwiGLU;
      break;
    case Config::Model::Activation::kGelu:
      out.activation = ExpertActivation::kGelu;
      break;
    case Config::Model::Activation::kRelu:
      out.activation = ExpertActivation::kRelu;
      break;
  }
  out.dtype = config.model.dtype;
  out.wire_dtype = wire_dtype_of(config.comm.wire_dtype, out.dtype);
  out.combine_dtype = wire_dtype_of(config.comm.combine_dtype, out.dtype);
  switch (config.schedule.policy) {
    case Config::Schedule::Policy::kAuto:  // until there is a profile (tune/profile.hpp)
    case Config::Schedule::Policy::kSequential:
      out.schedule.policy = SchedulePolicy::kSequential;
      break;
    case Config::Schedule::Policy::kPipelined:
      out.schedule.policy = SchedulePolicy::kPipelined;
      break;
    case Config::Schedule::Policy::kBySource:
      out.schedule.policy = SchedulePolicy::kBySource;
      break;
    case Config::Schedule::Policy::kHierarchical:
      out.schedule.policy = SchedulePolicy::kHierarchical;
      break;
  }
  out.schedule.num_chunks =
      out.schedule.policy == SchedulePolicy::kSequential ? 1 : config.schedule.num_chunks;
  out.schedule.exchange = config.schedule.exchange == Config::Schedule::Exchange::kGateway
                              ? Exchange::kGateway
                              : Exchange::kDirect;
  if (rows_go_between_gpus(config)) {
    // With one hop a row goes straight to each GPU that needs it. NCCL's sends hide behind GEMMs, stores over NVLink need
    // not (docs/cuda_dispatch.md). Whether auto is two hops depends on the nodes: choose_automatically().
    const bool two_hops = out.schedule.policy == SchedulePolicy::kHierarchical;
    out.schedule.exchange = two_hops ? Exchange::kGateway : Exchange::kDirect;
    if (config.schedule.policy == Config::Schedule::Policy::kAuto && config.comm.transport == "nccl")
      out.schedule.policy = SchedulePolicy::kBySource;
    if (!two_hops) out.schedule.num_chunks = 1;
  }
  out.save = config.runtime.save == Config::Runtime::Save::kRows ? Save::kRows : Save::kActivations;
  return out;
}

ChainLayerOptions chain_options(const Config& config) {
  ChainLayerOptions out;
  out.layer = layer_options(config);
  out.num_iterations = config.model.chain_iterations;
  switch (config.model.chain_residual) {
    case Config::Model::ChainResidual::kNone:
      out.residual = ChainResidual::kNone;
      break;
    case Config::Model::ChainResidual::kInner:
      out.residual = ChainResidual::kInner;
      break;
    case Config::Model::ChainResidual::kOuter:
      out.residual = ChainResidual::kOuter;
      break;
  }
  out.gate = config.routing.policy == Config::Routing::Policy::kEtr ? GateKind::kGrap : GateKind::kLinear;
  out.shared_gate = config.model.chain_shared_gate;
  out.shared_ffn = config.model.shared_ffn;
  out.num_chunks = config.schedule.chain_chunks;
  return out;
}

std::unique_ptr<SelectionPolicy> policy_of(const Config& config, const Topology& topology,
                                           std::int32_t layer) {
  PolicyOptions options =
      policy_options(config.routing, config.model.num_layers * config.model.chain_iterations);
  options.hidden = config.model.hidden;
  options.locality = std::make_shared<const Locality>(
      locality_of(placement_of(config, topology.num_ranks(), layer), topology));
  return make_policy(options);
}

kernels::Activation kernel_activation(ExpertActivation activation) {
  switch (activation) {
    case ExpertActivation::kSwiGLU:
      return kernels::Activation::kSwiGLU;
    case ExpertActivation::kGelu:
      return kernels::Activation::kGelu;
    case ExpertActivation::kRelu:
      return kernels::Activation::kRelu;
  }
  throw Error(ErrorCode::kInvalidArgument, str("activation ", static_cast<int>(activation), " is unknown"));
}

std::int64_t preactivation_cols(const MoeLayerOptions& options) {
  return kernels::preactivation_cols(kernel_activation(options.activation), options.ffn);
}

LayerShape layer_shape(const MoeLayerOptions& options, std::int32_t threads_per_rank) {
  LayerShape out;
  out.hidden = options.hidden;
  out.ffn = options.ffn;
  out.pre_cols = preactivation_cols(options);
  out.dtype = options.dtype;
  out.wire_dtype = options.wire_dtype;
  out.combine_dtype = options.combine_dtype;
  out.recompute = options.save == Save::kRows;
  out.threads = threads_per_rank;
  return out;
}

std::string hash_text(std::uint64_t hash) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out(16, '0');
  for (std::size_t i = 16; i-- > 0; hash >>= 4) out[i] = kDigits[hash & 15];
  return out;
}

}  // namespace sluice
