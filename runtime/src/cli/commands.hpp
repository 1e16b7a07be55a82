// The commands of the program. Each adds its options to the command line and runs when chosen; results go to standard
// output (with --json one document), everything else to standard error. Failures throw Error.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
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
// What an option says of a key. Throws kInvalidArgument where --set says it as well.
void set_by_option(LoadedConfig& config, std::string_view key, const std::string& value,
                   std::string_view option);
// For CLI::Option::check of texts: an empty one, from a variable that is not set, is no default.
std::string not_empty(const std::string& text);

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

// A document, indented. Names of files need not be UTF-8; JSON is: what is not is replaced.
std::string json_text(const nlohmann::json& document);
// Writes a document to standard output. Throws kIo if that fails (a full disk, a closed pipe).
void print_document(const std::string& text);
// The same to a file, which it replaces. Throws kIo naming it.
void write_document(const std::string& path, const std::string& text);

}  // namespace sluice::cli
