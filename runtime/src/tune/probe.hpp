// Measures a machine profile over a running group: links by ping-pong and streams between one pair of ranks a link class,
// GEMMs, row work and the executor on all ranks at once, as they are when a layer runs.
//
// Collective and blocking: seconds. Nothing else should run on the machine. Errors: those of the group.
#pragma once

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"
#include "sluice/scheduler/cost_model.hpp"

namespace sluice {

// The GEMM shapes are those of the configuration's layer. The profile is complete on rank 0.
MachineProfile probe_machine(Runtime& runtime, const Config& config);

}  // namespace sluice
