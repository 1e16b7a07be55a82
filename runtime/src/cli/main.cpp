// sluice: the command line. Exit codes: 0 done, 1 failed with one line on standard error, 2 the command line is wrong.
#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>

#include "sluice/base/log.hpp"
#include "sluice/runtime/src/cli/commands.hpp"

namespace sluice::cli {

LoadedConfig ConfigOptions::load() const {
  std::vector<std::string> all = sets;
  if (!device.empty()) {  // over --set, and before the configuration is checked
    std::erase_if(all, [](const std::string& set) { return set.starts_with("runtime.device="); });
    all.push_back("runtime.device=" + device);
  }
  return load_config(file.empty() ? std::nullopt : std::optional<std::filesystem::path>(file), all);
}

void add_config_options(CLI::App& app, ConfigOptions& options) {
  app.add_option("--config", options.file, "configuration file (TOML); docs/config.md lists the keys");
  app.add_option("--set", options.sets,
                 "section.key=value, over the file and the environment; may be repeated")
      ->allow_extra_args(false);
}

void add_device_option(CLI::App& app, ConfigOptions& options) {
  app.add_option("--device", options.device, "where experts are computed (runtime.device): cpu or cuda");
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
    std::fprintf(stderr, "sluice: %s; see sluice --help\n", e.what());
    return 2;
  }
  try {
    return run();
  } catch (const Error& e) {
    // A launched rank has said it already, with its number.
    if (log_counts().errors == 0) log_error(e.what());
    log_debug("raised at ", e.where());
  } catch (const std::exception& e) {
    log_error("internal error (please report): ", e.what());
  }
  return 1;
}
