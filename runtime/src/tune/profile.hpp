// The machine profile that a configuration asks for: the file that schedule.profile names, else what [machine] and
// [topology] declare.
//
// Blocks on the file only; agreed_profile is collective. Errors: kNotFound and kIo for the file, kInvalidConfig for what
// is in it or when nothing is declared.
#pragma once

#include <memory>
#include <string>

#include "sluice/base/config.hpp"
#include "sluice/moe_layer.hpp"
#include "sluice/runtime.hpp"
#include "sluice/scheduler/cost_model.hpp"

namespace sluice {

// Whether there is one: schedule.profile is set, or machine.gemm_flops_per_s.
bool has_profile(const Config& config);
MachineProfile profile_of(const Config& config, const Topology& topology);
// Whether profile_of() knows all links of the topology, or refuses it.
bool has_profile_of_links(const Config& config, const Topology& topology);
// Rank 0's, on all ranks; it warns when the profile was measured on another machine. Collective.
MachineProfile agreed_profile(Runtime& runtime, const Config& config);

// The group's profile: that of the configuration, else one that is measured now, for the configuration's layer. The
// runtime keeps it: it is read or measured once. Collective; blocks for the seconds of a measurement.
std::shared_ptr<const MachineProfile> group_profile(Runtime& runtime, const Config& config);
// Gives the options of a layer group_profile() where the configuration says schedule.policy = "auto".
void choose_automatically(Runtime& runtime, const Config& config, MoeLayerOptions& options);

// Throws kIo where no file can be written: better known before a measurement than after it.
void require_writable(const std::string& path);

MachineProfile read_profile_file(const std::string& path);
void write_profile_file(const std::string& path, const MachineProfile& profile);

// Links whose speed the topology declares take it: an emulated link does what is declared, whatever it did when the
// profile was measured. Costs of processors stay as measured.
void apply_declared_links(MachineProfile& profile, const Topology& topology, std::string_view transport);

// Empty when the profile is of this machine or declared; else a sentence that says what differs.
std::string foreign_machine(const MachineProfile& profile, std::string_view transport);

}  // namespace sluice
