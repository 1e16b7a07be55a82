#include <CLI/CLI.hpp>

#include "sluice/base/log.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/rank_group.hpp"
#include "sluice/runtime/src/train/check.hpp"
#include "sluice/runtime/src/train/trainer.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice::cli {

void add_train(CLI::App& app, Run& run) {
  struct Options {
    ConfigOptions config;
    std::string text;
    bool check = false, json = false, resume = false;
    std::int64_t resume_step = 0;
    std::vector<std::string> record;
    std::int64_t record_steps = train::TrainOptions().record_steps;
    CLI::Option* record_steps_option = nullptr;
    bool has_record_steps() const { return record_steps_option->count() > 0; }
  };
  auto o = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("train", "train a byte-level MoE language model over ranks, on real text");
  add_config_options(*command, o->config);
  add_device_option(*command, o->config);
  command
      ->add_option("--text", o->text,
                   "file or directory to learn (train.text); default: the program's own sources")
      ->check(not_empty);
  command->add_flag("--check", o->check,
                    "compare a few steps with a dense single-rank reference instead of training");
  command->add_flag("--resume", o->resume, "go on from the newest checkpoint in train.checkpoint_dir");
  command->add_option("--resume-step", o->resume_step, "go on from the checkpoint of this step")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 40));
  command
      ->add_option(
          "--record", o->record,
          "FILE: record the routing of the last steps; FILE=TEXT: of this text, once trained; statistics "
          "where FILE ends in .json, else a trace; may be repeated")
      ->allow_extra_args(false);
  o->record_steps_option = command
                               ->add_option("--record-steps", o->record_steps,
                                            "steps or batches to record; 0: every step of training")
                               ->check(CLI::Range(std::int64_t{0}, std::int64_t{1} << 40));
  command->add_flag("--json", o->json, "print the report as JSON");
  command->callback([o, &run] {
    run = [o] {
      LoadedConfig config = o->config.load();
      if (!o->text.empty()) set_by_option(config, "train.text", o->text, "--text");
      train::TrainOptions recording;
      recording.record_steps = o->record_steps;
      for (const std::string& request : o->record)
        recording.record.push_back(train::parse_record_request(request));
      Require(recording.record.empty() || !o->check, ErrorCode::kInvalidArgument,
              "--record records training, which --check does not do; leave one of them out");
      Require(!o->check || (!o->resume && o->resume_step == 0), ErrorCode::kInvalidArgument,
              "--check compares the first steps of a new training; leave --resume and --resume-step away");
      Require(
          !o->resume || o->resume_step == 0, ErrorCode::kInvalidArgument,
          "--resume goes on from the newest checkpoint, --resume-step from that of a step; give one of them");
      Require(!recording.record.empty() || !o->has_record_steps(), ErrorCode::kInvalidArgument,
              "--record-steps says how much --record records; name a file with --record");
      std::vector<std::string> written = {config.config.train.report, config.config.runtime.timeline};
      for (const train::RecordRequest& request : recording.record) written.push_back(request.file);
      std::erase(written, "");
      for (std::size_t i = 0; i < written.size(); ++i)
        for (std::size_t j = 0; j < i; ++j)
          Require(
              written[i] != written[j], ErrorCode::kInvalidArgument, written[i],
              " is named twice by train.report, runtime.timeline and --record; each needs a file of its own");
      GroupOptions group;
      group.default_ranks = 4;
      const auto work = [&](Runtime& runtime, const LoadedConfig& agreed, std::span<const GroupLoss> losses) {
        const std::string& file = agreed.config.train.report;
        // Before the work, of which nothing would be left.
        if (prints_results(runtime))
          for (const std::string& path : written) require_writable(path);
        const train::Text text = train::load_text(runtime, agreed.config);
        if (prints_results(runtime)) log_info("text: ", text.description, ", ", text.bytes.size(), " bytes");
        if (o->check) {
          const train::CheckReport report = train::check(runtime, agreed, text);
          if (!prints_results(runtime)) return;
          if (!file.empty()) write_document(file, train::to_json(report));
          print_document(o->json ? train::to_json(report) : train::to_text(report));
          return;
        }
        train::TrainOptions options = recording;
        options.resume = o->resume || o->resume_step > 0;
        options.resume_step = o->resume_step;
        for (std::size_t i = 0; i < losses.size(); ++i)
          options.recoveries.push_back(
              {losses[i].culprit.value, losses[i].phase, losses[i].chunk, losses[i].status.message,
               losses[i].num_ranks, i + 1 < losses.size() ? losses[i + 1].num_ranks : runtime.num_ranks()});
        const train::TrainReport report = train::train(runtime, agreed, text, options);
        if (!prints_results(runtime)) return;
        if (!file.empty()) write_document(file, train::to_json(report));
        print_document(o->json ? train::to_json(report) : train::to_text(report));
      };
      group.body = [&](Runtime& runtime, const LoadedConfig& agreed) { work(runtime, agreed, {}); };
      group.after_loss = work;
      run_group(config, group);
      return 0;
    };
  });
}

}  // namespace sluice::cli
