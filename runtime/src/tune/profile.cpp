#include "sluice/runtime/src/tune/profile.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "sluice/base/clock.hpp"
#include "sluice/base/log.hpp"
#include "sluice/runtime/src/gather.hpp"
#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/machine.hpp"
#include "sluice/runtime/src/runtime_state.hpp"
#include "sluice/runtime/src/tune/probe.hpp"

namespace sluice {
namespace {

constexpr std::int64_t kMaxProfileBytes = 4 << 20;

// Whether ranks of the topology are joined by links of that class.
bool has_links(const Topology& topology, bool across) {
  return across ? topology.num_nodes() > 1 : topology.num_ranks() > topology.num_nodes();
}

// Empty where the profile says what messages cost over every class of links that the topology has.
std::string missing_links(const MachineProfile& profile, const Topology& topology) {
  for (const bool across : {false, true}) {
    const LinkProfile& link = across ? profile.across_nodes : profile.in_node;
    if (has_links(topology, across) && link.occupied.empty() && link.send.empty() && link.receive.empty())
      return str("links.", across ? "across_nodes" : "in_node",
                 " was not measured, but there are such links: ", topology.describe(),
                 "; measure with `sluice info --probe` where there are, or declare topology.",
                 across ? "across_nodes" : "in_node", "_bytes_per_s");
  }
  return {};
}

MachineProfile measured_profile(const Config& config, const Topology& topology) {
  MachineProfile out = read_profile_file(config.schedule.profile);
  apply_declared_links(out, topology, config.comm.transport);
  return out;
}

MachineProfile declared_profile(const Config& config, const Topology& topology) {
  const Config::Machine& m = config.machine;
  Require(m.gemm_flops_per_s > 0 && m.memory_bytes_per_s > 0, ErrorCode::kInvalidConfig,
          "there is no machine to predict for: set schedule.profile to a file that `sluice info --probe -o "
          "FILE` wrote, "
          "or declare machine.gemm_flops_per_s and machine.memory_bytes_per_s");
  MachineProfile out;
  out.name = m.name.empty() ? "declared machine" : m.name;
  out.source = m.source;
  out.posting = Posting::kOwnCore;  // devices do not post from their arithmetic units
  out.roofline = GemmRoofline{m.gemm_flops_per_s, m.memory_bytes_per_s};
  out.op_us = m.op_us;
  out.gather = out.reduce = out.activation_backward = Curve::line(0, m.memory_bytes_per_s / 1e6);
  for (const bool across : {false, true}) {
    const LinkSpeed& speed = across ? topology.across_nodes : topology.in_node;
    const std::string_view key = across ? "across_nodes" : "in_node";
    Require(!has_links(topology, across) || speed.bytes_per_s > 0, ErrorCode::kInvalidConfig, "topology.",
            key, "_bytes_per_s is 0; a declared machine needs declared links");
    LinkProfile& link = across ? out.across_nodes : out.in_node;
    if (speed.bytes_per_s > 0) link.occupied = Curve::line(m.message_us, speed.bytes_per_s / 1e6);
    link.latency_us = to_us(std::chrono::duration_cast<Clock::duration>(speed.latency));
  }
  return out;
}

}  // namespace

bool has_profile(const Config& config) {
  return !config.schedule.profile.empty() || config.machine.gemm_flops_per_s > 0;
}

void require_writable(const std::string& path) {
  std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (folder.empty()) folder = ".";
  std::error_code ec;
  Require(!std::filesystem::is_directory(path, ec), ErrorCode::kIo, path,
          ": cannot be written: it is a folder");
  // Before the message asks for errno.
  const bool writable = access(std::filesystem::exists(path, ec) ? path.c_str() : folder.c_str(), W_OK) == 0;
  Require(writable, ErrorCode::kIo, path, ": cannot be written: ", std::strerror(errno));
}

MachineProfile read_profile_file(const std::string& path) {
  std::error_code ec;
  Require(std::filesystem::exists(path, ec), ErrorCode::kNotFound, path,
          ": there is no such profile; `sluice info --probe -o FILE` writes one");
  Require(std::filesystem::is_regular_file(path, ec), ErrorCode::kIo, path, ": is no file");
  std::ifstream in(path, std::ios::binary);
  std::string text(static_cast<std::size_t>(kMaxProfileBytes) + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  Require(in.is_open() && !in.bad(), ErrorCode::kIo, path, ": cannot be read: ", std::strerror(errno));
  Require(in.gcount() <= kMaxProfileBytes, ErrorCode::kInvalidConfig, path, ": is larger than ",
          kMaxProfileBytes, " bytes; no profile is");
  text.resize(static_cast<std::size_t>(in.gcount()));
  return parse_profile(text, path);
}

void write_profile_file(const std::string& path, const MachineProfile& profile) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << profile.to_json() << '\n';
  out.flush();
  Require(static_cast<bool>(out), ErrorCode::kIo, path, ": cannot be written: ", std::strerror(errno));
}

void apply_declared_links(MachineProfile& profile, const Topology& topology, std::string_view transport) {
  for (const bool across : {false, true}) {
    const LinkSpeed& speed = across ? topology.across_nodes : topology.in_node;
    if (!speed.limited()) continue;
    LinkProfile& link = across ? profile.across_nodes : profile.in_node;
    const double declared_us = to_us(std::chrono::duration_cast<Clock::duration>(speed.latency));
    link.occupied = speed.bytes_per_s > 0 ? Curve::line(0, speed.bytes_per_s / 1e6) : Curve();
    link.latency_us = std::max(link.latency_us, declared_us);
    if (transport == "local") profile.link_model = LinkModel::kCalendar;
  }
}

MachineProfile profile_of(const Config& config, const Topology& topology) {
  if (config.schedule.profile.empty()) return declared_profile(config, topology);
  MachineProfile out = measured_profile(config, topology);
  const std::string missing = missing_links(out, topology);
  Require(missing.empty(), ErrorCode::kInvalidConfig, config.schedule.profile, ": ", missing);
  return out;
}

bool has_profile_of_links(const Config& config, const Topology& topology) {
  if (!config.schedule.profile.empty())
    return missing_links(measured_profile(config, topology), topology).empty();
  return (!has_links(topology, false) || topology.in_node.bytes_per_s > 0) &&
         (!has_links(topology, true) || topology.across_nodes.bytes_per_s > 0);
}

std::string foreign_machine(const MachineProfile& profile, std::string_view transport) {
  const std::string device = cpu_name();
  const auto cores = static_cast<std::int32_t>(std::thread::hardware_concurrency());
  if (!profile.measured || profile.machine_hash() == machine_hash(device, cores, transport)) return {};
  return str("profile ", profile.name, " was measured on another machine: ", profile.device, ", ",
             profile.cores, " cores, transport ", profile.transport, "; this is ", device, ", ", cores,
             " cores, transport ", transport,
             ". Predictions may be far off; measure again with `sluice info --probe`");
}

namespace {

// Rank 0's, on all ranks.
MachineProfile broadcast_profile(Runtime& runtime, const std::string& mine) {
  return parse_profile(text_of_root(runtime, mine, kMaxProfileBytes, "a profile", "profile agreement"),
                       "rank 0's profile");
}

}  // namespace

MachineProfile agreed_profile(Runtime& runtime, const Config& config) {
  std::string text;
  if (runtime.rank().value == 0) {
    const MachineProfile mine = profile_of(config, runtime.topology());
    if (const std::string differs = foreign_machine(mine, config.comm.transport); !differs.empty())
      log_warn(differs);
    text = mine.to_json();
  }
  return broadcast_profile(runtime, text);
}

std::shared_ptr<const MachineProfile> group_profile(Runtime& runtime, const Config& config) {
  std::shared_ptr<const MachineProfile>& kept = runtime.state().profile;
  if (kept) return kept;
  if (has_profile(config)) {
    kept = std::make_shared<const MachineProfile>(agreed_profile(runtime, config));
  } else {
    Require(!runtime.state().device, ErrorCode::kNotSupported,
            "schedule.policy = auto on a GPU needs a profile of it in schedule.profile; only CPUs are "
            "measured here");
    if (runtime.rank().value == 0)
      log_info("measuring the machine; `sluice info --probe -o FILE` and schedule.profile save the time");
    MachineProfile mine = probe_machine(runtime, config);
    apply_declared_links(mine, runtime.topology(), config.comm.transport);
    kept = std::make_shared<const MachineProfile>(
        broadcast_profile(runtime, runtime.rank().value == 0 ? mine.to_json() : std::string()));
  }
  return kept;
}

void choose_automatically(Runtime& runtime, const Config& config, MoeLayerOptions& options) {
  if (config.schedule.policy != Config::Schedule::Policy::kAuto) return;
  // Profiles are of CPUs. GPUs' rows have two hops or the one that layer_options() has chosen.
  if (!rows_go_between_gpus(config)) {
    options.auto_profile = group_profile(runtime, config);
  } else if (auto_is_two_hops(*gpu_link_of(config.comm.transport), runtime.topology())) {
    options.schedule = {SchedulePolicy::kHierarchical, Exchange::kGateway, 1};
    options.chunks_by_gpu_model = true;
  }
}

}  // namespace sluice
