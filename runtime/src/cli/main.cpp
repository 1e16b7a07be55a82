// sluice: the command line. Exit codes: 0 done, 1 failed with one line on standard error, 2 the command line is wrong.
#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <new>
#include <nlohmann/json.hpp>

#include "sluice/base/config_schema.hpp"
#include "sluice/base/log.hpp"
#include "sluice/runtime/src/cli/commands.hpp"

namespace sluice::cli {

LoadedConfig ConfigOptions::load() const {
  std::vector<std::string> all = sets;
  if (!device.empty()) {  // over --set, and before the configuration is checked
    for (const std::string& set : sets)
      Require(!set.starts_with("runtime.device="), ErrorCode::kInvalidArgument, "--device ", device,
              " and --set ", set, " both say runtime.device; give one of them");
    all.push_back("runtime.device=" + device);
  }
  return load_config(file.empty() ? std::nullopt : std::optional<std::filesystem::path>(file), all);
}

void add_config_options(CLI::App& app, ConfigOptions& options) {
  app.add_option("--config", options.file, "configuration file (TOML); docs/config.md lists the keys")
      ->check(not_empty);
  app.add_option("--set", options.sets,
                 "section.key=value, over the file and the environment; may be repeated")
      ->allow_extra_args(false);
}

void add_device_option(CLI::App& app, ConfigOptions& options) {
  app.add_option("--device", options.device, "where experts are computed (runtime.device): cpu or cuda")
      ->check(not_empty);
}

void set_by_option(LoadedConfig& config, std::string_view key, const std::string& value,
                   std::string_view option) {
  Require(config.source(key).text != "--set", ErrorCode::kInvalidArgument, option, " ", value, " and --set ",
          key, "=... both say ", key, "; give one of them");
  config.set(key, value, {ConfigSource::Kind::kCommandLine, std::string(option)});
}

std::string not_empty(const std::string& text) {
  return text.empty() ? "is empty; give a value, or leave the option away" : "";
}

std::string json_text(const nlohmann::json& document) {
  return document.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

void print_document(const std::string& text) {
  std::cout << text;
  if (text.empty() || text.back() != '\n') std::cout << '\n';
  std::cout.flush();
  Require(static_cast<bool>(std::cout), ErrorCode::kIo, "cannot write the result to standard output");
}

void write_document(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
  if (text.empty() || text.back() != '\n') out << '\n';
  out.flush();
  Require(static_cast<bool>(out), ErrorCode::kIo, path, ": cannot be written: ", std::strerror(errno));
}

namespace {

// What is wrong with the command line, of which the parser says `what`.
std::string wrong_command_line(const CLI::App& app, int argc, char** argv, const char* what) {
  const std::string first = argc > 1 ? argv[1] : "";
  if (first.empty() || first[0] == '-' || !app.get_subcommands().empty()) return what;
  std::vector<std::string_view> names;
  std::string all;
  for (const CLI::App* command : app.get_subcommands({})) {
    names.push_back(command->get_name());
    all += str(all.empty() ? "" : ", ", command->get_name());
  }
  const std::string_view meant = config_schema::did_you_mean(first, names);
  return str("there is no command ", config_schema::quoted(first),
             meant.empty() ? str("; there are ", all) : str("; did you mean ", meant, "?"));
}

}  // namespace
}  // namespace sluice::cli

int main(int argc, char** argv) {
  using namespace sluice;
  CLI::App app("Sluice: a distributed expert-parallel runtime for Mixture-of-Experts models");
  app.require_subcommand(1);
  app.set_version_flag("--version", SLUICE_VERSION);
  cli::Run run;
  cli::add_train(app, run);
  cli::add_bench(app, run);
  cli::add_plan(app, run);
  cli::add_place(app, run);
  cli::add_simulate(app, run);
  cli::add_tune(app, run);
  cli::add_info(app, run);
  cli::add_config(app, run);
  cli::add_launch(app, run);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::CallForVersion& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    std::fprintf(stderr, "sluice: %s; see sluice --help\n",
                 cli::wrong_command_line(app, argc, argv, e.what()).c_str());
    return 2;
  }
  try {
    return run();
  } catch (const Error& e) {
    // A launched rank has said it already, with its number.
    if (log_counts().errors == 0) log_error(e.what());
    log_debug("raised at ", e.where());
  } catch (const std::bad_alloc&) {
    log_error(to_string(ErrorCode::kOutOfMemory),
              ": this machine cannot give the memory that the sizes of the configuration need; make the "
              "model or the batch "
              "smaller, or run fewer ranks");
  } catch (const std::exception& e) {
    log_error(to_string(ErrorCode::kInternal), ": ", e.what());
  }
  return 1;
}
