// The report of a training run: its keys, what its figures must add up to, and the timeline.
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "sluice/base/log.hpp"
#include "train_harness.hpp"

namespace sluice::testing {
namespace {

using nlohmann::json;

LoadedConfig small_config(std::vector<std::string> sets = {}) {
  std::vector<std::string> all = {"topology.nodes=2", "train.steps=12"};
  all.insert(all.end(), sets.begin(), sets.end());
  return tiny_config(all);
}

TEST(TrainReport, HasTheKeysThatScriptsRelyOn) {
  const LoadedConfig loaded = small_config();
  const train::TrainReport report = run_train(loaded, 4, word_text(20000));
  const json got = json::parse(train::to_json(report));
  for (const char* key : {"heldout_bpb", "order0_bpb", "order1_bpb", "order2_bpb", "tokens_per_s"}) {
    ASSERT_TRUE(got.contains(key)) << key;
    EXPECT_TRUE(got[key].is_number() && got[key].get<double>() > 0) << key << " " << got[key];
  }
  EXPECT_EQ(got["losses"].get<std::vector<double>>(), report.losses) << "full precision";
  EXPECT_EQ(report.losses.size(), 12u);
  for (const char* key : {"mean", "min", "max"}) EXPECT_TRUE(got["active_experts"][key].is_number()) << key;
  for (const char* key : {"same_rank", "in_node", "across_nodes"})
    EXPECT_TRUE(got["crossings_per_token"][key].is_number()) << key;
  for (const char* what : {"bytes", "flat_bytes"})
    for (const char* key : {"in_node", "across_nodes"})
      EXPECT_GT(got[what][key].get<std::int64_t>(), 0) << what;
  EXPECT_TRUE(got["overlap_efficiency"].is_null());
  EXPECT_EQ(got["overlap"]["note"], "the schedule is sequential");
  EXPECT_EQ(got["config_hash"].get<std::string>().size(), 16u);
  EXPECT_EQ(got["seed"], 7);
  EXPECT_EQ(got["world"]["ranks"], 4);
  EXPECT_EQ(got["world"]["nodes"], 2);
  EXPECT_EQ(got["world"]["transport"], "local");
  EXPECT_EQ(got["text"]["source"], "words");
  EXPECT_EQ(got["text"]["bytes"], 20000);
  EXPECT_GT(got["memory_bytes"]["all_ranks"]["total"], got["memory_bytes"]["largest_rank"]["total"]);
  for (const char* key : {"sparsity", "lambda", "grad_norms", "auxiliary_losses"})
    EXPECT_EQ(got[key].size(), 12u) << key;
  for (const char* key : {"experts", "ranks"})
    for (const double v : got["balance"][key]) EXPECT_TRUE(v > 0 && v <= 1) << key << " " << v;
  // Phases of the layer and of the model; each takes time.
  for (const char* key :
       {"plan", "expert_gemm1", "expert_gemm2", "wgrad", "pack", "gate", "head", "optimizer"}) {
    ASSERT_TRUE(got["phases_us"].contains(key)) << key;
    EXPECT_GT(got["phases_us"][key], 0) << key;
  }
}

TEST(TrainReport, FiguresOfThePolicy) {
  const LoadedConfig loaded = small_config({"routing.policy=bounded_regret", "routing.regret_epsilon=0.3"});
  const train::TrainReport report = run_train(loaded, 4, word_text(20000));
  const json got = json::parse(train::to_json(report));
  EXPECT_EQ(got["routing"]["policy"], "bounded_regret");
  for (const char* name : {"regret", "swapped_share", "saved_node_crossings", "saved_rank_crossings"}) {
    const json& figure = got["routing"]["figures"][name];
    EXPECT_EQ(figure["series"].size(), 12u) << name;
    EXPECT_GT(figure["mean"], 0) << name;
  }
  EXPECT_LE(got["routing"]["figures"]["regret"]["mean"], 0.3);
  EXPECT_GT(got["crossings_per_token_at_end"]["same_rank"], 0);
  EXPECT_NE(train::to_text(report).find("bounded_regret: score given up"), std::string::npos);
  // The more it may give up, the less it sends.
  const json none = json::parse(
      train::to_json(run_train(small_config({"routing.policy=softmax_topk"}), 4, word_text(20000))));
  EXPECT_LT(got["crossings_per_token"]["across_nodes"], none["crossings_per_token"]["across_nodes"]);
  EXPECT_TRUE(none["routing"]["figures"].empty());
}

TEST(TrainReport, FiguresAddUp) {
  const LoadedConfig loaded = small_config({"schedule.exchange=direct"});
  const train::TrainReport report = run_train(loaded, 4, word_text(20000));
  const Traffic& rows = report.movement.rows;
  const double visits = 12.0 * 40 * 2;  // steps, tokens, layers
  const double routes = [&] {
    double sum = 0;
    for (const double mean : report.active_mean) sum += mean * 40 * 2;
    return sum;
  }();
  // Without de-duplication a row a route; with it at most that, and at most one a rank.
  EXPECT_LE(rows.rows_same_rank + rows.rows_in_node + rows.rows_across_nodes, routes + 0.5);
  EXPECT_LE(static_cast<double>(rows.rows_same_rank), visits);
  EXPECT_GT(rows.flat_rows_across_nodes, rows.rows_across_nodes);
  // Rows of x, y, dy, dx in f32, and a route's gradient home.
  const std::int64_t row_bytes = 4 * 12 * 4;
  EXPECT_EQ(report.movement.flat_across_nodes_bytes, rows.flat_rows_across_nodes * (row_bytes + 4));
  EXPECT_GE(report.movement.across_nodes_bytes, rows.rows_across_nodes * (row_bytes + 4));
  EXPECT_LE(report.movement.across_nodes_bytes,
            rows.rows_across_nodes * row_bytes + rows.flat_rows_across_nodes * 4);
  for (std::size_t i = 0; i < report.active_mean.size(); ++i) {
    EXPECT_NEAR(report.sparsity[i], 1 - report.active_mean[i] / 6, 1e-12);
    EXPECT_LE(report.active_min[i], report.active_mean[i]);
    EXPECT_GE(report.active_max[i], report.active_mean[i]);
    // lambda moves by alpha, towards the target of 2.
    if (i > 0) {
      EXPECT_NEAR(report.lambda[i] / report.lambda[i - 1], report.active_mean[i - 1] > 2 ? 1.2 : 1 / 1.2,
                  1e-9)
          << i;
    }
  }
}

TEST(TrainReport, GatewayAndDirectDifferInTrafficOnly) {
  const train::TrainReport gateway = run_train(small_config(), 4, word_text(20000));
  const train::TrainReport direct =
      run_train(small_config({"schedule.exchange=direct"}), 4, word_text(20000));
  EXPECT_EQ(gateway.losses, direct.losses);
  EXPECT_LT(gateway.movement.across_nodes_bytes, direct.movement.across_nodes_bytes);
}

TEST(TrainReport, TextNamesWhatMatters) {
  const train::TrainReport report = run_train(small_config(), 2, word_text(20000));
  const std::string text = train::to_text(report);
  for (const char* part : {"this model", "order-2 statistics", "active experts of 6", "across nodes",
                           "tokens/s", "overlap not measured"})
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
}

TEST(TrainReport, TimelineHasAllRanks) {
  const auto file =
      std::filesystem::temp_directory_path() / str("sluice_train_timeline_", ::getpid(), ".json");
  run_train(small_config({"runtime.timeline=" + file.string()}), 4, word_text(20000));
  std::ifstream in(file);
  const json trace = json::parse(in);
  std::set<int> ranks;
  std::set<std::string> names;
  for (const auto& event : trace["traceEvents"]) {
    if (event["ph"] != "X") continue;
    ranks.insert(event["pid"].get<int>());
    names.insert(event["name"].get<std::string>());
    EXPECT_GE(event["ts"].get<double>(), 0);
  }
  EXPECT_EQ(ranks.size(), 4u);
  EXPECT_TRUE(names.contains("expert_gemm1") && names.contains("optimizer"));
  std::filesystem::remove(file);
}

TEST(TrainReport, OverlapIsMeasuredWhereItMeansSomething) {
  // Two ranks of a thread each; on one core nothing is measured, and the report says so.
  const LoadedConfig loaded =
      small_config({"schedule.policy=pipelined", "topology.across_nodes_bytes_per_s=1e6"});
  const train::TrainReport report = run_train(loaded, 2, word_text(20000));
  EXPECT_TRUE(report.emulated_links);
  if (std::thread::hardware_concurrency() < 2) {
    EXPECT_NE(report.overlap.note, "");
    return;
  }
  EXPECT_GT(report.overlap.scheduled_us, 0);
  // The link is slow on purpose: it is the floor, and no step can beat it.
  EXPECT_EQ(report.overlap.floor_us(), report.overlap.across_nodes_us);
  EXPECT_GE(report.overlap.scheduled_us, report.overlap.floor_us());
  EXPECT_GE(report.overlap.sequential_us, report.overlap.floor_us());
}

TEST(TrainProgress, SaysWhatTheRunDoes) {
  const LogCapture log;
  const LoadedConfig loaded = small_config();
  const train::Text text = word_text(20000);
  run_job(loaded, 2, [&](Runtime& runtime) { train::train(runtime, loaded, text); });
  if (stderr_is_terminal()) return;  // there it is one line that is written over
  for (const char* part : {"train step 1 of 12 bits/byte", "train step 12 of 12", "tokens/s",
                           "active experts", "rows kept on rank"})
    EXPECT_TRUE(log.contains(part)) << part;
}

}  // namespace
}  // namespace sluice::testing
