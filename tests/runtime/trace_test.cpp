#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "sluice/base/error.hpp"
#include "sluice/runtime/src/trace/routing_trace.hpp"

namespace sluice {
namespace {

RoutingTrace read(const std::string& text, std::int64_t max_routes = 1000) {
  std::istringstream in(text);
  return read_trace(in, "t", max_routes);
}

TEST(RoutingTrace, RoundTrip) {
  Routing a{8, {0, 2, 2, 3}, {1, 7, 0}, {0.1f, -2.5e-7f, 1.0f}};
  Routing b{8, {0, 1}, {3}, {0.333333343f}};
  std::ostringstream out;
  TraceWriter writer(out, 2, 8);
  writer.write(1, 2, a);
  writer.write(0, 0, b);
  writer.finish();
  const RoutingTrace trace = read(out.str());
  EXPECT_EQ(trace.num_layers, 2);
  EXPECT_EQ(trace.num_experts, 8);
  ASSERT_EQ(trace.num_sources(), 3);
  const Routing& got = trace.layers[1][2];
  EXPECT_EQ(got.row_ptr, a.row_ptr);
  EXPECT_EQ(got.expert, a.expert);
  EXPECT_EQ(got.weight, a.weight);  // shortest round-trip: bit for bit
  EXPECT_EQ(trace.layers[0][0].weight, b.weight);
  EXPECT_EQ(trace.layers[0][1].num_tokens(), 0);
  for (const auto& layer : trace.layers)
    for (const Routing& r : layer) EXPECT_NO_THROW(validate(r));
}

TEST(RoutingTrace, CommentsAndBlankLines) {
  const RoutingTrace trace =
      read("# c\n\nsluice-trace 1 layers 1 experts 4\n  # more\n0 0 1:1 2:0.5\r\n\n0 0\n");
  EXPECT_EQ(trace.layers[0][0].num_tokens(), 2);
  EXPECT_EQ(trace.layers[0][0].num_routes(), 2);
}

TEST(RoutingTrace, EveryKindOfDamageIsPlaced) {
  const std::string head = "sluice-trace 1 layers 2 experts 4\n";
  const struct {
    std::string text, where, what;
  } cases[] = {
      {"", "t:1:1", "empty"},
      {"hello\n", "t:1:1", "sluice-trace"},
      {"sluice-trace 3 layers 1 experts 4\n", "t:1:", "version 3"},
      {"sluice-trace 2 layers 1 experts 4\n0 0 1:1\n", "t:3:1", "cut short"},
      {"sluice-trace 2 layers 1 experts 4\n0 0 1:1\nend 2\n", "t:3:", "there are 1"},
      {"sluice-trace 2 layers 1 experts 4\n0 0 1:nan\nend 1\n", "t:2:", "finite"},
      {"sluice-trace 2 layers 1 experts 4\n0 0 1:1\nend 1\n0 0 1:1\n", "t:4:", "junk behind the last"},
      {"sluice-trace 1 layers 0 experts 4\n", "t:1:", "at least 1"},
      {"sluice-trace 1 layers 1 experts 4 x\n", "t:1:", "junk"},
      {head + "2 0 1:1\n", "t:2:", "0..1"},
      {head + "0 -1 1:1\n", "t:2:", "source rank"},
      {head + "0 99999999 1:1\n", "t:2:", "source rank"},
      {head + "0 0 4:1\n", "t:2:5", "0..3"},
      {head + "0 0 2:1 1:1\n", "t:2:", "ascend"},
      {head + "0 0 2:1 2:1\n", "t:2:", "ascend"},
      {head + "0 0 2\n", "t:2:", "':'"},
      {head + "0 0 2:\n", "t:2:", "finite"},
      {head + "0 0 2:nan\n", "t:2:", "finite"},
      {head + "0 0 2:inf\n", "t:2:", "finite"},
      {head + "0 0 2:1x\n", "t:2:", "junk"},
      {head + "0 0 1:1\n0\n", "t:3:", "source rank"},
      {head + std::string("0 0 1:1\n\0\0\n", 12), "t:3:", "layer"},
  };
  for (const auto& c : cases) {
    try {
      read(c.text);
      ADD_FAILURE() << "accepted: " << c.text;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidRouting);
      EXPECT_EQ(e.message().find(c.where), 0u) << e.message();
      EXPECT_NE(e.message().find(c.what), std::string::npos) << e.message();
    }
  }
  // A few bytes must not ask for memory of 65,536 layers times 26,481 source ranks.
  try {
    read("sluice-trace 2 layers 65536 experts 16\n1 26480 3:1\n");
    ADD_FAILURE() << "taken";
  } catch (const Error& e) {
    EXPECT_NE(e.message().find("source rank 26480 of a trace of 65536 layers"), std::string::npos)
        << e.message();
  }
  EXPECT_THROW(read(head + "0 0 1:1 2:1\n", 1), Error);
  EXPECT_THROW(read_trace_file("/nonexistent/trace"), Error);
}

class TempFile {
 public:
  explicit TempFile(const std::string& text)
      : path_(::testing::TempDir() + "sluice_trace_" + std::to_string(::getpid()) + "_" +
              std::to_string(next_++)) {
    std::ofstream(path_) << text;
  }
  ~TempFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  static inline int next_ = 0;
  std::string path_;
};

TEST(StatisticsFile, TraceAndRoutes) {
  // Layer 1 comes late and sources interleave.
  const TempFile trace(
      "sluice-trace 2 layers 2 experts 4\n0 0 0:1 2:1\n0 1 3:1\n0 0 1:1\n1 1 0:1\n1 0 1:1\n1 0\nend 6\n");
  const RoutingStatistics s = read_statistics_file(trace.path());
  EXPECT_EQ(s.num_tokens(), 3);
  EXPECT_EQ(s.tokens_of_source, (std::vector<double>{2, 1}));
  EXPECT_EQ(s.layers[0].counts, (std::vector<double>{1, 1, 1, 1}));
  EXPECT_EQ(s.layers[0].transitions[2 * 4 + 1], 1);
  EXPECT_EQ(s.layers[0].transitions[3 * 4 + 0], 1);
  EXPECT_EQ(s.layers[0].transitions[1 * 4 + 1], 0);

  const TempFile routes("# a model, layers 0,7, top-2 of 4: one line a token\n# more\n0,1 3,2\n1,2 0,3\n");
  const RoutingStatistics r = read_statistics_file(routes.path());
  EXPECT_EQ(r.num_tokens(), 2);
  EXPECT_EQ(r.layers[1].layer, 7);
  EXPECT_EQ(r.layers[0].coactivation[1 * 4 + 2], 1);
  EXPECT_EQ(r.layers[1].counts, (std::vector<double>{1, 0, 1, 2}));

  const TempFile json(s.to_json());
  RoutingStatistics back = read_statistics_file(json.path());
  back.description = s.description;
  EXPECT_EQ(back, s);
}

TEST(StatisticsFile, DamageIsPlaced) {
  const std::string head = "# layers 0,7, top-2 of 4\n";
  const struct {
    std::string text, what;
  } cases[] = {
      {"", "empty"},
      {"0,1 2,3\n", ":1:1: no comment"},
      {head + "0,1 2,3\n0,1 2\n", ":3:6: layer 7 has 1 experts, must have 2"},
      {head + "0,1\n", ":2:4: the line has experts of 1 layers"},
      {head + "0,4 2,3\n", ":2:3: expert must be an integer 0..3"},
      {head + "0,0 2,3\n", "expert 0 is there twice"},
      {head + "0,1 2,3 1,2\n", "more than 2 layers"},
      {head + "0,-1 2,3\n", "must be an integer"},
      {head + "0,nan 2,3\n", "must be an integer"},
      {head, "empty"},
      {"sluice-trace 2 layers 2 experts 4\n0 0 1:1\nend 1\n", "source rank 0 has 1 tokens at layer 0 and 0"},
      {"sluice-trace 2 layers 1 experts 4\nend 0\n", "no token"},
  };
  for (const auto& c : cases) {
    const TempFile file(c.text);
    try {
      read_statistics_file(file.path());
      ADD_FAILURE() << "accepted: " << c.text;
    } catch (const Error& e) {
      EXPECT_NE(e.message().find(c.what), std::string::npos) << e.message() << " lacks " << c.what;
    }
  }
  EXPECT_THROW(read_statistics_file("/nonexistent/statistics"), Error);
}

TEST(Replay, DealsTokensInTurnOrBySource) {
  const TempFile file("sluice-trace 2 layers 1 experts 4\n0 0 0:1\n0 0 1:1\n0 1 2:1\n0 1 3:1\nend 4\n");
  EXPECT_EQ(replay_layer(file.path(), 0, 1, 2).expert, (std::vector<std::int32_t>{2, 3}));
  EXPECT_EQ(replay_layer(file.path(), 0, 1, 3).expert, (std::vector<std::int32_t>{1}));
  EXPECT_EQ(replay_layer(file.path(), 0, 0, 3).expert, (std::vector<std::int32_t>{0, 3}));
  EXPECT_THROW(replay_layer(file.path(), 1, 0, 2), Error);
}

}  // namespace
}  // namespace sluice
