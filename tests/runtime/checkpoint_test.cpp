// Checkpoints: a resumed job has the bits of one that was never interrupted, at the same size; other sizes read the same
// checkpoint; what is damaged or of another job is refused by name; and after the loss of a rank the others go on as a
// job of their size would that resumed from that checkpoint.
#include "sluice/runtime/src/train/checkpoint.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <mutex>

#include "sluice/runtime/src/rank_group.hpp"
#include "sluice/scheduler/placement_file.hpp"
#include "train_harness.hpp"

namespace sluice::testing {
namespace {

namespace fs = std::filesystem;
using train::TrainOptions;
using train::TrainReport;

class Checkpoint : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "sluice-checkpoint-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override { fs::remove_all(root_); }

  fs::path dir(const std::string& name = "c") const { return root_ / name; }
  fs::path step_dir(int step, const std::string& name = "c") const {
    std::string digits = std::to_string(step);
    return dir(name) / ("step-" + std::string(10 - digits.size(), '0') + digits);
  }
  LoadedConfig config(std::vector<std::string> sets = {}, const std::string& name = "c") const {
    sets.push_back("train.checkpoint_dir=" + dir(name).string());
    const bool own_keep = std::any_of(sets.begin(), sets.end(), [](const std::string& set) {
      return set.starts_with("train.checkpoint_keep=");
    });
    if (!own_keep) sets.push_back("train.checkpoint_keep=3");
    sets.push_back("train.checkpoint_every=3");
    sets.push_back("train.steps=9");
    return tiny_config(sets);
  }
  // A copy without the checkpoints after `step`: what a job that died then has left.
  void copy_up_to(int step, const std::string& to) {
    fs::copy(dir(), dir(to), fs::copy_options::recursive);
    for (const std::int64_t s : train::list_checkpoints(dir(to)))
      if (s > step) fs::remove_all(step_dir(static_cast<int>(s), to));
  }
  fs::path a_shard(int step, const std::string& name = "c") const {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(step_dir(step, name)))
      if (entry.path().extension() == ".bin") found.push_back(entry.path());
    std::sort(found.begin(), found.end());
    return found.at(0);
  }

  fs::path root_;
  const train::Text text_ = word_text(6000);
};

TrainReport job(const LoadedConfig& loaded, std::int32_t num_ranks, const train::Text& text,
                TrainOptions options = {}) {
  options.progress = false;
  std::vector<TrainReport> reports(static_cast<std::size_t>(num_ranks));
  run_job(loaded, num_ranks, [&](Runtime& runtime) {
    reports[runtime.rank().index()] = train::train(runtime, loaded, text, options);
  });
  for (const TrainReport& report : reports) {
    EXPECT_EQ(report.losses, reports[0].losses);
    EXPECT_EQ(report.heldout_bpb, reports[0].heldout_bpb);
  }
  return reports[0];
}

TrainReport resume(const LoadedConfig& loaded, std::int32_t num_ranks, const train::Text& text) {
  TrainOptions options;
  options.resume = true;
  return job(loaded, num_ranks, text, options);
}

// The error of a job on all ranks alike.
Status failure(const LoadedConfig& loaded, std::int32_t num_ranks, const train::Text& text,
               const TrainOptions& options) {
  std::mutex mutex;
  std::vector<Status> seen;
  run_job(loaded, num_ranks, [&](Runtime& runtime) {
    Status status;
    try {
      TrainOptions quiet = options;
      quiet.progress = false;
      train::train(runtime, loaded, text, quiet);
    } catch (...) {
      status = current_exception_status();
    }
    const std::lock_guard lock(mutex);
    seen.push_back(status);
  });
  for (const Status& status : seen) {
    EXPECT_EQ(status.code, seen[0].code);
    EXPECT_EQ(status.message, seen[0].message);
  }
  return seen[0];
}

void expect_refused(const Status& status, ErrorCode code, std::vector<std::string> words) {
  EXPECT_EQ(status.code, code) << status.message;
  for (const std::string& word : words)
    EXPECT_NE(status.message.find(word), std::string::npos) << status.message;
}

void expect_same(const TrainReport& a, const TrainReport& b) {
  EXPECT_EQ(a.losses, b.losses);
  EXPECT_EQ(a.auxiliary, b.auxiliary);
  EXPECT_EQ(a.grad_norms, b.grad_norms);
  EXPECT_EQ(a.lambda, b.lambda);
  EXPECT_EQ(a.active_max, b.active_max);
  EXPECT_EQ(a.learning_rates, b.learning_rates);
  EXPECT_EQ(a.heldout_bpb, b.heldout_bpb);
  ASSERT_EQ(a.figures.size(), b.figures.size());
  for (std::size_t i = 0; i < a.figures.size(); ++i) EXPECT_EQ(a.figures[i].values, b.figures[i].values);
}

TEST_F(Checkpoint, AResumedJobHasTheSameBits) {
  const std::vector<std::vector<std::string>> cases = {
      {},
      {"model.dtype=bf16", "comm.wire_dtype=bf16", "topology.nodes=[[0,1],[2]]"},
      {"routing.policy=softmax_topk", "routing.aux_loss=0.01", "model.chain_iterations=2",
       "model.shared_ffn=6"},
      {"routing.policy=sigmoid_topk", "placement.slots_per_rank=[4,0,2]"},
      {"routing.policy=moepp", "model.zero_experts=1", "model.constant_experts=1",
       "model.gate_residual=true"},
      {"routing.policy=etr", "routing.renormalize=false"},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(str("case ", i));
    fs::remove_all(root_);
    const LoadedConfig loaded = config(cases[i]);
    const TrainReport whole = job(loaded, 3, text_);
    ASSERT_EQ(whole.losses.size(), 9u);
    EXPECT_EQ(whole.resumed_from, 0);
    for (const int step : {3, 6, 9}) {
      const std::string name = str("at", step);
      copy_up_to(step, name);
      const TrainReport resumed = resume(config(cases[i], name), 3, text_);
      EXPECT_EQ(resumed.resumed_from, step);
      EXPECT_EQ(resumed.measured_steps, 9 - step);
      expect_same(resumed, whole);
    }
  }
}

TEST_F(Checkpoint, OtherWorldSizesGoOnFromIt) {
  const TrainReport whole = job(config(), 3, text_);
  for (const std::int32_t ranks : {1, 2, 4, 6}) {
    SCOPED_TRACE(str(ranks, " ranks"));
    copy_up_to(6, str("a", ranks));
    copy_up_to(6, str("b", ranks));
    const TrainReport a = resume(config({}, str("a", ranks)), ranks, text_);
    const TrainReport b = resume(config({}, str("b", ranks)), ranks, text_);
    expect_same(a, b);
    const TrainReport fresh = job(config({}, str("fresh", ranks)), ranks, text_);
    for (std::size_t i = 0; i < whole.losses.size(); ++i) {
      if (i < 6) {
        EXPECT_EQ(a.losses[i], whole.losses[i]);
      }
      EXPECT_TRUE(std::abs(a.losses[i] - whole.losses[i]) <= 1e-4 * whole.losses[i]) << i;
      EXPECT_TRUE(std::abs(a.losses[i] - fresh.losses[i]) <= 1e-4 * fresh.losses[i]) << i;
    }
  }
}

TEST_F(Checkpoint, TheNewestAreKeptAndLeftoversOfACrashGo) {
  // What a crash may leave: a folder without a manifest, a temporary file, a file that is none of ours.
  fs::create_directories(step_dir(2));
  std::ofstream(step_dir(2) / "shard-1-00000.bin.tmp") << "half";
  fs::create_directories(step_dir(3));
  std::ofstream(step_dir(3) / "shard-1-00000.bin") << "stale";
  std::ofstream(dir() / "notes.txt") << "mine";
  job(config({"train.checkpoint_keep=2"}), 2, text_);
  EXPECT_EQ(train::list_checkpoints(dir()), (std::vector<std::int64_t>{6, 9}));
  EXPECT_FALSE(fs::exists(step_dir(2)));
  EXPECT_FALSE(fs::exists(step_dir(3)));
  EXPECT_TRUE(fs::exists(dir() / "notes.txt"));
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(step_dir(9))) ++files;
  EXPECT_EQ(files, 3u);  // two shards, one manifest
  EXPECT_TRUE(train::list_checkpoints(root_ / "nowhere").empty());
}

TEST_F(Checkpoint, ANewJobDoesNotMixWithAnOldOne) {
  job(config(), 2, text_);
  expect_refused(failure(config(), 2, text_, {}), ErrorCode::kInvalidState,
                 {dir().string(), "step 9", "--resume"});
  TrainOptions options;
  options.resume = true;
  expect_refused(failure(config({}, "empty"), 2, text_, options), ErrorCode::kNotFound,
                 {dir("empty").string()});
  options.resume_step = 5;
  expect_refused(failure(config(), 2, text_, options), ErrorCode::kNotFound, {"no checkpoint of step 5"});
  expect_refused(failure(tiny_config(), 2, text_, options), ErrorCode::kInvalidConfig,
                 {"train.checkpoint_dir"});
}

TEST_F(Checkpoint, AnotherJobIsRefusedByName) {
  job(config(), 2, text_);
  TrainOptions options;
  options.resume = true;
  const std::string file = (step_dir(9) / "manifest.sluice").string();
  expect_refused(failure(config({"model.hidden=16"}), 2, text_, options), ErrorCode::kInvalidConfig,
                 {file, "section semantic", "model.hidden", "has 12", "this job 16"});
  expect_refused(failure(config({"train.seed=8"}), 2, text_, options), ErrorCode::kInvalidConfig,
                 {"train.seed", "has 7", "this job 8"});
  expect_refused(failure(config(), 2, word_text(6000, 2), options), ErrorCode::kInvalidConfig,
                 {file, "section text", "expected 6000 bytes"});
  // Not bound to the placement, the schedule or the wire.
  EXPECT_EQ(
      resume(config({"comm.wire_dtype=bf16", "schedule.policy=pipelined", "schedule.num_chunks=2"}), 2, text_)
          .resumed_from,
      9);
}

TEST_F(Checkpoint, DamageIsRefusedByFileAndSection) {
  job(config({"train.checkpoint_keep=1"}), 2, text_);
  TrainOptions options;
  options.resume = true;
  const auto damaged = [&](const std::string& name, const std::function<void()>& damage,
                           const std::function<fs::path()>& file, std::vector<std::string> words,
                           ErrorCode code = ErrorCode::kInvalidArgument) {
    SCOPED_TRACE(name);
    fs::copy(dir(), dir(name), fs::copy_options::recursive);
    words.push_back(file().string());
    damage();
    expect_refused(failure(config({}, name), 3, text_, options), code, words);
  };
  const auto flip = [](const fs::path& path, std::int64_t at) {
    const int fd = ::open(path.c_str(), O_RDWR);
    ASSERT_GE(fd, 0);
    char byte = 0;
    ASSERT_EQ(::pread(fd, &byte, 1, at), 1);
    byte = static_cast<char>(byte ^ 16);
    ASSERT_EQ(::pwrite(fd, &byte, 1, at), 1);
    ::close(fd);
  };
  const auto shard = [&](const std::string& name) { return a_shard(9, name); };
  const auto manifest = [&](const std::string& name) { return step_dir(9, name) / "manifest.sluice"; };
  damaged(
      "cut", [&] { fs::resize_file(shard("cut"), fs::file_size(shard("cut")) / 2); },
      [&] { return shard("cut"); }, {"section ", "truncated", "expected", "seen"});
  damaged(
      "flipped", [&] { flip(shard("flipped"), 100); }, [&] { return shard("flipped"); },
      {"section embedding/value", "corrupt", "expected checksum", "seen"});
  damaged(
      "header", [&] { flip(shard("header"), 17); }, [&] { return shard("header"); },
      {"section header", "nonce", "expected", "seen"});
  damaged(
      "longer", [&] { std::ofstream(shard("longer"), std::ios::app) << "x"; },
      [&] { return shard("longer"); }, {"at its end", "expected", "seen"});
  damaged(
      "manifest", [&] { flip(manifest("manifest"), 300); }, [&] { return manifest("manifest"); },
      {"corrupt", "expected checksum", "seen"});
  damaged(
      "half", [&] { fs::resize_file(manifest("half"), 200); }, [&] { return manifest("half"); },
      {"truncated", "expected", "seen"});
  damaged(
      "empty", [&] { fs::resize_file(manifest("empty"), 0); }, [&] { return manifest("empty"); },
      {"no manifest"});
  const fs::path gone = shard("c");
  fs::copy(dir(), dir("gone"), fs::copy_options::recursive);
  fs::remove(step_dir(9, "gone") / gone.filename());
  expect_refused(failure(config({}, "gone"), 2, text_, options), ErrorCode::kNotFound,
                 {gone.filename().string()});
  // Every byte of a shard belongs to a section, to the header or to padding: a sample of flips, none unseen.
  const auto size = static_cast<std::int64_t>(fs::file_size(gone));
  std::mt19937_64 rng(11);
  for (int i = 0; i < 6; ++i) {
    const std::string name = str("flip", i);
    fs::copy(dir(), dir(name), fs::copy_options::recursive);
    const auto at = static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(size));
    flip(step_dir(9, name) / gone.filename(), at);
    const Status status = failure(config({}, name), 2, text_, options);
    if (!status.ok()) expect_refused(status, ErrorCode::kInvalidArgument, {"section", "expected", "seen"});
    // Flips in the padding change nothing that is read.
    if (status.ok()) {
      EXPECT_EQ(resume(config({}, name), 2, text_).losses.size(), 9u);
    }
  }
}

TEST_F(Checkpoint, ADamagedNewestSaysWhichIsOlderAndRecoveryTakesIt) {
  const TrainReport whole = job(config(), 2, text_);
  fs::resize_file(a_shard(9), 100);
  TrainOptions options;
  options.resume = true;
  expect_refused(failure(config(), 2, text_, options), ErrorCode::kInvalidArgument, {"--resume-step 6"});
  options.resume_step = 6;
  expect_same(job(config(), 2, text_, options), whole);  // and saves step 9 again

  fs::resize_file(a_shard(9), 100);
  std::string log;
  const LogSink before =
      set_log_sink([&](LogLevel, std::string_view line) { log += std::string(line) + "\n"; });
  TrainOptions recovery;
  recovery.recoveries.push_back({});
  const TrainReport recovered = job(config(), 2, text_, recovery);
  set_log_sink(before);
  EXPECT_EQ(recovered.resumed_from, 6);
  expect_same(recovered, whole);
  EXPECT_NE(log.find("step 9 refused"), std::string::npos) << log;
  EXPECT_NE(log.find("going back to the one of step 6"), std::string::npos) << log;
}

// Rank 1 of 3 fails after a step; the other two go on. The bits are those of two ranks that resume from that checkpoint.
TEST_F(Checkpoint, SurvivorsGoOnAsAJobOfTheirSizeWould) {
  struct Case {
    int lost_after;
    std::int64_t from;
    std::vector<std::string> sets;
  };
  const std::string placement =
      ::testing::TempDir() + "sluice_shrink_" + std::to_string(::getpid()) + ".json";
  std::ofstream(placement)
      << PlacementFile{"by hand", 6, {{0, 1, 2}}, {{0, {{5, 0}, {1, 2, 3}, {4, 0}}}}}.to_json();
  const std::vector<Case> cases = {
      {7, 6, {}},
      {3, 3, {"topology.nodes=[[0,1],[2]]", "topology.ranks=3"}},
      {2, 0, {"placement.slots_per_rank=[1,2,3]"}},
      {3, 3, {"placement.policy=file", "placement.file=" + placement}},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(str("case ", i));
    fs::remove_all(root_);
    std::vector<std::string> sets = cases[i].sets;
    sets.push_back("train.on_failure=shrink");
    const LoadedConfig loaded = config(sets);
    const LogCapture warnings;
    std::vector<TrainReport> reports(2);
    std::vector<GroupLoss> seen;
    GroupOptions group;
    group.default_ranks = 3;
    group.body = [&](Runtime& runtime, const LoadedConfig& agreed) {
      TrainOptions options;
      options.progress = false;
      options.after_step = [&](std::int64_t step) {
        if (runtime.rank() == RankId(1) && step == cases[i].lost_after) {
          // What a job of two ranks will find: as it lies there now.
          if (cases[i].from > 0) fs::copy(dir(), dir("left"), fs::copy_options::recursive);
          throw Error(ErrorCode::kIo, "the disk of rank 1 is on fire");
        }
      };
      train::train(runtime, agreed, text_, options);
    };
    group.after_loss = [&](Runtime& runtime, const LoadedConfig& agreed, std::span<const GroupLoss> losses) {
      TrainOptions options;
      options.progress = false;
      options.recoveries.resize(losses.size());
      reports[runtime.rank().index()] = train::train(runtime, agreed, text_, options);
      if (runtime.rank() == RankId(0)) seen.assign(losses.begin(), losses.end());
    };
    run_group(loaded, group);
    ASSERT_EQ(seen.size(), 1u);
    EXPECT_EQ(seen[0].culprit, RankId(1));
    EXPECT_EQ(seen[0].num_ranks, 3);
    EXPECT_NE(seen[0].status.message.find("on fire"), std::string::npos) << seen[0].status.message;
    EXPECT_EQ(reports[0].resumed_from, cases[i].from);
    expect_same(reports[0], reports[1]);

    const std::vector<std::string> two =
        i == 1 ? std::vector<std::string>{"topology.nodes=[[0],[1]]"} : std::vector<std::string>{};
    const TrainReport undisturbed =
        cases[i].from > 0 ? resume(config(two, "left"), 2, text_) : job(config(two, "left"), 2, text_);
    expect_same(reports[0], undisturbed);
  }
}

TEST_F(Checkpoint, WithoutShrinkTheJobStopsWithTheCause) {
  GroupOptions group;
  group.default_ranks = 3;
  group.body = [&](Runtime& runtime, const LoadedConfig& agreed) {
    TrainOptions options;
    options.progress = false;
    options.after_step = [&](std::int64_t step) {
      if (runtime.rank() == RankId(1) && step == 4)
        throw Error(ErrorCode::kIo, "the disk of rank 1 is on fire");
    };
    train::train(runtime, agreed, text_, options);
  };
  group.after_loss = [](Runtime&, const LoadedConfig&, std::span<const GroupLoss>) { FAIL(); };
  try {
    run_group(config(), group);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIo);
  }
  // All ranks fail alike: there is nobody left to go on.
  group.body = [](Runtime&, const LoadedConfig&) { throw Error(ErrorCode::kInvalidState, "diverged"); };
  EXPECT_THROW(run_group(config({"train.on_failure=shrink"}, "d"), group), Error);
}

}  // namespace
}  // namespace sluice::testing
