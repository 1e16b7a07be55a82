#include <gtest/gtest.h>

#include <sstream>

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
  write_trace_header(out, 2, 8);
  write_trace_tokens(out, 1, 2, a);
  write_trace_tokens(out, 0, 0, b);
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
      {"sluice-trace 2 layers 1 experts 4\n", "t:1:", "version 2"},
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
  EXPECT_THROW(read(head + "0 0 1:1 2:1\n", 1), Error);
  EXPECT_THROW(read_trace_file("/nonexistent/trace"), Error);
}

}  // namespace
}  // namespace sluice
