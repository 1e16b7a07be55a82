#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "sluice/runtime/src/cli/commands.hpp"

namespace sluice::cli {

void add_config(CLI::App& app, Run& run) {
  struct Options {
    ConfigOptions config;
    std::string check;
    bool doc = false, schema = false, json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("config", "print the effective configuration with its sources, or document it");
  add_config_options(*command, o->config);
  auto* check =
      command->add_option("--check", o->check, "check a file and say nothing else")->check(not_empty);
  auto* doc = command->add_flag("--doc", o->doc, "print the documentation of all keys (docs/config.md)");
  auto* schema = command->add_flag("--schema", o->schema, "print the JSON schema of the file");
  check->excludes(doc)->excludes(schema);
  doc->excludes(schema);
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] {
    run = [o] {
      if (o->doc) {
        print_document(config_markdown());
      } else if (o->schema) {
        print_document(config_json_schema());
      } else if (!o->check.empty()) {
        ConfigOptions options = o->config;
        Require(options.file.empty(), ErrorCode::kInvalidArgument,
                "--check names the file; leave --config away");
        options.file = o->check;
        (void)options.load();
        print_document(o->json ? json_text({{"file", o->check}, {"valid", true}}) : str(o->check, ": valid"));
      } else {
        const LoadedConfig loaded = o->config.load();
        print_document(o->json ? effective_json(loaded) : effective_text(loaded));
      }
      return 0;
    };
  });
}

}  // namespace sluice::cli
