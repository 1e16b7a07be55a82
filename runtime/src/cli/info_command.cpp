#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <thread>

#include "sluice/base/clock.hpp"
#include "sluice/base/text_table.hpp"
#include "sluice/comm/host.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/compute_device.hpp"
#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/machine.hpp"
#include "sluice/runtime/src/rank_group.hpp"
#include "sluice/runtime/src/tune/probe.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice::cli {
namespace {

nlohmann::json transport_json(std::string_view name, const std::function<void()>& probe,
                              std::string_view what) {
  nlohmann::json out{{"name", name}, {"what", what}, {"usable", true}};
  try {
    probe();
  } catch (const Error& e) {
    out["usable"] = false;
    out["why_not"] = e.message();
  }
  return out;
}

std::string link_text(const LinkProfile& link) {
  const double large = link.occupied.empty() ? 0 : link.occupied.points().back().at;
  const double held = std::max(link.occupied(large), link.send(large));
  return str("latency ", fixed(link.latency_us, 1), " us, ", bytes_text(static_cast<std::int64_t>(large)),
             " in ", fixed(held, 1), " us (", held > 0 ? fixed(large / held / 1e3, 2) : "-", " GB/s), ",
             fixed(link.send(0), 2), " us to send nothing");
}

// The profile of what the configuration runs on. Collective over its ranks.
int run_probe(const LoadedConfig& loaded, const std::string& output, bool json) {
  Require(!output.empty(), ErrorCode::kInvalidArgument, "-o is empty; name the profile file to write");
  require_writable(output);
  Require(!rows_go_between_gpus(loaded.config), ErrorCode::kNotSupported, "comm.transport is ",
          loaded.config.comm.transport,
          ", but sluice info --probe measures links of the host; choose a transport of the host");
  const auto begin = Clock::now();
  GroupOptions group;
  group.default_ranks = 2;
  group.body = [&](Runtime& runtime, const LoadedConfig& config) {
    const MachineProfile profile = probe_machine(runtime, config.config);
    if (!prints_results(runtime)) return;
    write_profile_file(output, profile);
    if (json) {
      print_document(profile.to_json());
      return;
    }
    TextTable table({"measured", "is"});
    table.add_row({"machine", profile.name});
    for (const LinkClass c : {LinkClass::kInNode, LinkClass::kAcrossNodes})
      if (!profile.link(c).send.empty())
        table.add_row({str("link ", to_string(c)), link_text(profile.link(c))});
    for (const GemmProfile& g : profile.gemms) {
      const double flops = 2.0 * static_cast<double>(g.shape.in_cols) * static_cast<double>(g.shape.out_cols);
      std::string rates;
      for (const double rows : {1.0, 32.0, 1024.0})
        rates += str(rates.empty() ? "" : ", ", fixed(rows, 0), " rows ", fixed(g.rows(rows), 1), " us (",
                     fixed(flops * rows / g.rows(rows) / 1e3, 1), " GFLOP/s)");
      table.add_row({describe(g.shape), rates});
    }
    for (const auto& [name, curve] : {std::pair{"pack", &profile.gather},
                                      {"reduce", &profile.reduce},
                                      {"activation backward", &profile.activation_backward}})
      table.add_row({name, str(fixed(1048576.0 / std::max((*curve)(1048576), 1e-9) / 1e3, 2),
                               " GB/s read and written, at 1 MiB")});
    table.add_row({"op", str(fixed(profile.op_us, 2), " us to start one")});
    print_document(str(table.to_string(), "written to ", output, " in ",
                       fixed(to_us(Clock::now() - begin) / 1e6, 1), " s\n"));
  };
  run_group(loaded, group);
  return 0;
}

}  // namespace

void add_info(CLI::App& app, Run& run) {
  struct Options {
    ConfigOptions config;
    std::string output;
    bool json = false, probe = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("info", "devices, transports and topology");
  add_config_options(*command, o->config);
  command->add_flag("--json", o->json, "print as JSON");
  CLI::Option* probe = command->add_flag(
      "--probe", o->probe, "measure links and GEMMs over the configured transport into a profile file");
  CLI::Option* file = command->add_option("-o,--output", o->output, "the profile file to write");
  probe->needs(file);
  file->needs(probe);
  command->callback([o, &run] {
    run = [o] {
      const LoadedConfig loaded = o->config.load();
      if (o->probe) return run_probe(loaded, o->output, o->json);
      nlohmann::json out;
      out["version"] = SLUICE_VERSION;
      out["devices"] = nlohmann::json::array({{{"kind", "cpu"},
                                               {"model", cpu_name()},
                                               {"isa", kernels::cpu_isa()},
                                               {"cores", std::thread::hardware_concurrency()},
                                               {"memory_bytes", physical_memory_bytes()}}});
      out["gpus"] = num_gpus();
      const comm::HostDescription host = comm::describe_host();
      out["host"] = {{"name", comm::host_name()},
                     {"packages", host.packages},
                     {"cores", host.cores},
                     {"threads", host.threads},
                     {"numa_nodes", host.numa_nodes},
                     {"l3_bytes", host.l3_bytes},
                     {"own_threads", host.own_threads},
                     {"own_cores", host.num_own_cores},
                     {"own_numa_nodes", host.own_numa_nodes}};
      out["transports"] =
          nlohmann::json::array({transport_json(
                                     "local", [] { (void)comm::make_local_group(Topology::uniform(1, 1)); },
                                     "ranks are threads of one process"),
                                 transport_json(
                                     "shm", [] {}, "ranks are processes of this host, over shared memory"),
                                 transport_json(
                                     "tcp", [] {}, "ranks are processes of any hosts, over TCP"),
                                 transport_json(
                                     "ucx", [] { comm::find_transport_module("ucx"); },
                                     "ranks are processes of any hosts, over UCX"),
                                 transport_json(
                                     "mpi", [] { comm::find_transport_module("mpi"); },
                                     "ranks are processes, launched by mpirun or srun"),
                                 transport_json(
                                     "nvlink", [] { require_gpu_link(GpuLink::kNvlink); },
                                     "ranks are processes of this host with a GPU each; rows go from GPU to "
                                     "GPU by stores"),
                                 transport_json(
                                     "nccl", [] { require_gpu_link(GpuLink::kNccl); },
                                     "ranks are processes of any hosts with a GPU each; rows go from GPU to "
                                     "GPU over NCCL")});
      const std::int32_t ranks = std::max(1, configured_ranks(loaded.config));
      const Topology topology = configured_topology(loaded.config, ranks);
      out["topology"] = {{"ranks", ranks},
                         {"num_nodes", topology.num_nodes()},
                         {"declared", topology.declared()},
                         {"text", topology.describe()}};
      for (std::int32_t n = 0; n < topology.num_nodes(); ++n)
        out["topology"]["nodes"].push_back(topology.ranks_of(NodeId(n)));
      if (o->json) {
        print_document(json_text(out));
        return 0;
      }
      TextTable table({"what", "is"});
      table.add_row({"version", SLUICE_VERSION});
      table.add_row({"cpu", str(cpu_name(), ", ", std::thread::hardware_concurrency(), " cores, kernels ",
                                kernels::cpu_isa())});
      table.add_row({"host", str(comm::host_name(), ": ", host.packages, " packages, ", host.cores,
                                 " cores, ", host.threads, " threads, ", host.numa_nodes, " NUMA nodes, L3 ",
                                 bytes_text(host.l3_bytes))});
      table.add_row({"may run on", str("threads ", host.own_threads, " (", host.num_own_cores,
                                       " cores), NUMA nodes ", host.own_numa_nodes)});
      table.add_row({"memory", bytes_text(physical_memory_bytes())});
      table.add_row({"GPUs", str(num_gpus())});
      for (const auto& t : out["transports"])
        table.add_row({"transport " + t["name"].get<std::string>(),
                       t["usable"].get<bool>() ? t["what"].get<std::string>()
                                               : "not usable: " + t["why_not"].get<std::string>()});
      table.add_row({"topology", topology.describe() + (topology.declared() ? " (declared)" : "")});
      print_document(table.to_string());
      return 0;
    };
  });
}

}  // namespace sluice::cli
