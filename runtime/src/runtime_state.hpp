// What a Runtime holds, for the files of this room.
#pragma once

#include <memory>
#include <vector>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/kernels/device.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/runtime.hpp"

namespace sluice {

class Executor;
class GpuGroup;
struct MachineProfile;
struct ContextStorage;

struct RuntimeState {
  RuntimeState();
  ~RuntimeState();
  RuntimeOptions options;
  std::unique_ptr<kernels::Device> device;  // null: the CPU. Outlives every buffer on it
  // Buffers that a failed or abandoned pass left to the transport; freed after it, so declared before it.
  // Room for every storage is made when it is made (ContextPool), since they retire in destructors.
  std::vector<std::shared_ptr<ContextStorage>> retired;
  std::unique_ptr<comm::Transport> transport;
  std::unique_ptr<comm::Collectives> collectives;
  std::unique_ptr<kernels::Kernels> kernels;
  std::unique_ptr<Executor> executor;
  std::unique_ptr<GpuGroup> gpu_group;            // null: rows travel between ranks through host memory
  std::shared_ptr<const MachineProfile> profile;  // once it was asked for (tune/profile.hpp)
  SpanRecorder* recorder = nullptr;
  std::uint32_t next_channel = 1;  // 0 belongs to the collectives
};

}  // namespace sluice
