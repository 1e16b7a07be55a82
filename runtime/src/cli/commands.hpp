// The commands of the program. Each adds its options to the command line and runs when chosen; results go to standard
// output (with --json one document), everything else to standard error. Failures throw Error.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"

namespace CLI {
class App;
}

namespace sluice::cli {

// Options that several commands share.
struct ConfigOptions {
  std::string file;               // --config
  std::vector<std::string> sets;  // --set section.key=value
  std::string device;             // --device, of commands that have it
  LoadedConfig load() const;
};
void add_config_options(CLI::App& app, ConfigOptions& options);
void add_device_option(CLI::App& app, ConfigOptions& options);

// A command that was chosen runs after parsing, so that its errors are reported in one way.
using Run = std::function<int()>;
void add_info(CLI::App& app, Run& run);
void add_config(CLI::App& app, Run& run);
void add_bench(CLI::App& app, Run& run);
void add_place(CLI::App& app, Run& run);
void add_plan(CLI::App& app, Run& run);
void add_train(CLI::App& app, Run& run);
void add_simulate(CLI::App& app, Run& run);
void add_tune(CLI::App& app, Run& run);
void add_launch(CLI::App& app, Run& run);

// Writes a document to standard output. Throws kIo if that fails (a full disk, a closed pipe).
void print_document(const std::string& text);
// The same to a file, which it replaces. Throws kIo naming it.
void write_document(const std::string& path, const std::string& text);

}  // namespace sluice::cli
