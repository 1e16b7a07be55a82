#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstring>

#include "sluice/runtime/src/cli/commands.hpp"

namespace sluice::cli {

void add_launch(CLI::App& app, Run& run) {
  struct Options {
    int num_ranks = 0;
    bool mpi = false;
    std::vector<std::string> command;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("launch", "start local ranks of a command as processes");
  command->add_option("-n,--num-ranks", o->num_ranks, "ranks to start")
      ->required()
      ->check(CLI::Range(1, 65536));
  command->add_flag("--mpi", o->mpi, "through mpirun");
  command->add_option("command", o->command, "the command and its arguments, after --")->required();
  command->prefix_command(false);
  command->callback([o, &run] {
    run = [o]() -> int {
      Require(o->mpi, ErrorCode::kNotSupported,
              "launch starts processes through mpirun: add --mpi (transport local "
              "runs its ranks as threads and needs no launcher)");
      std::vector<std::string> words = {"mpirun", "--oversubscribe", "-n", std::to_string(o->num_ranks)};
      if (geteuid() == 0) words.insert(words.begin() + 1, "--allow-run-as-root");
      words.insert(words.end(), o->command.begin(), o->command.end());
      std::vector<char*> argv;
      for (std::string& w : words) argv.push_back(w.data());
      argv.push_back(nullptr);
      execvp(argv[0], argv.data());
      throw Error(ErrorCode::kNotFound, str("cannot run mpirun: ", std::strerror(errno),
                                            "; install Open MPI (Debian: openmpi-bin)"));
    };
  });
}

}  // namespace sluice::cli
