#include "sluice/runtime/src/bench/gpu_bench.hpp"

#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {

std::string host_rows_reason(Runtime& runtime, std::span<const LoadedConfig> configs) {
  const Config& c = configs.front().config;
  const RuntimeState& state = runtime.state();
  if (!state.device) return "experts are computed on the CPU";
  if (!state.gpu_group && runtime.num_ranks() > 1)
    return str("ranks exchange rows over ", c.comm.transport,
               "; comm.transport nvlink and nccl keep them on the GPUs");
  if (configs.size() > 1) return "--sweep compares schedules of the host";
  const MoeLayerOptions o = layer_options(c);
  for (const DType dtype : {o.dtype, o.wire_dtype, o.combine_dtype})
    if (dtype != DType::kBF16) return "layers whose rows stay on GPUs are bf16 (model.dtype)";
  if (o.hidden % 8 != 0 || o.ffn % 8 != 0)
    return "model.hidden and model.ffn are no multiples of 8";  // and DeviceExperts says so
  if (c.runtime.save == Config::Runtime::Save::kRows)
    return "runtime.save is rows; layers whose rows stay on GPUs keep activations";
  const bool hierarchical = o.schedule.policy == SchedulePolicy::kHierarchical;
  if (hierarchical ? !state.gpu_group
                   : o.schedule.num_chunks > 1 || o.schedule.policy == SchedulePolicy::kPipelined)
    return "schedules with chunks or levels (schedule.policy, schedule.num_chunks) are the host's";
  if (c.model.num_ffn_experts() != c.model.num_experts)
    return "zero, copy and constant experts are computed on the host";
  if (!c.runtime.timeline.empty()) return "a timeline (runtime.timeline) has spans of the host's work";
  try {
    gpu_placement(placement_of(c, runtime.num_ranks(), c.bench.replay_layer));
  } catch (const Error& e) {
    return e.message();
  }
  return {};
}

}  // namespace

std::string why_host_rows(Runtime& runtime, std::span<const LoadedConfig> configs) {
  const std::string why = host_rows_reason(runtime, configs);
  Require(why.empty() || !runtime.state().gpu_group, ErrorCode::kNotSupported, "comm.transport ",
          configs.front().config.comm.transport, " cannot measure this: ", why);
  return why;
}

}  // namespace sluice
