#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <thread>

#include "sluice/base/text_table.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/machine.hpp"

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

}  // namespace

void add_info(CLI::App& app, Run& run) {
  struct Options {
    ConfigOptions config;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("info", "devices, transports and topology");
  add_config_options(*command, o->config);
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] {
    run = [o] {
      const LoadedConfig loaded = o->config.load();
      nlohmann::json out;
      out["version"] = SLUICE_VERSION;
      out["devices"] = nlohmann::json::array({{{"kind", "cpu"},
                                               {"model", cpu_name()},
                                               {"isa", kernels::cpu_isa()},
                                               {"cores", std::thread::hardware_concurrency()},
                                               {"memory_bytes", physical_memory_bytes()}}});
      out["transports"] =
          nlohmann::json::array({transport_json(
                                     "local", [] { (void)comm::make_local_group(Topology::uniform(1, 1)); },
                                     "ranks are threads of one process"),
                                 transport_json(
                                     "mpi", [] { comm::find_transport_module("mpi"); },
                                     "ranks are processes, launched by mpirun or srun")});
      const std::int32_t ranks = std::max(1, configured_ranks(loaded.config));
      const Topology topology = configured_topology(loaded.config, ranks);
      out["topology"] = {{"ranks", ranks},
                         {"num_nodes", topology.num_nodes()},
                         {"declared", topology.declared()},
                         {"text", topology.describe()}};
      for (std::int32_t n = 0; n < topology.num_nodes(); ++n)
        out["topology"]["nodes"].push_back(topology.ranks_of(NodeId(n)));
      if (o->json) {
        print_document(out.dump(2));
        return 0;
      }
      TextTable table({"what", "is"});
      table.add_row({"version", SLUICE_VERSION});
      table.add_row({"cpu", str(cpu_name(), ", ", std::thread::hardware_concurrency(), " cores, kernels ",
                                kernels::cpu_isa())});
      table.add_row({"memory", bytes_text(physical_memory_bytes())});
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
