#include "sluice/scheduler/cost_model.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "expect_error.hpp"
#include "profile_harness.hpp"

namespace sluice {
namespace {

TEST(Curve, LinesThroughThePoints) {
  const Curve c({{10, 4}, {20, 6}, {40, 6}, {50, 16}});
  EXPECT_EQ(c(0), 4);
  EXPECT_EQ(c(10), 4);
  EXPECT_EQ(c(15), 5);
  EXPECT_EQ(c(30), 6);
  EXPECT_EQ(c(45), 11);
  EXPECT_EQ(c(60), 26);  // the last slope goes on
  EXPECT_EQ(Curve()(100), 0);
  EXPECT_EQ(Curve({{8, 3}})(100), 3);
  EXPECT_NEAR(Curve::line(2, 100)(1e7), 2 + 1e5, 1e-6);
}

TEST(Curve, FitNeverFalls) {
  // Medians of equal places; 5 and 3 fall and become their mean.
  const Curve c = fit_curve({{1, 1}, {1, 100}, {1, 2}, {2, 5}, {4, 3}, {8, 9}});
  ASSERT_EQ(c.points().size(), 4u);
  EXPECT_EQ(c.points()[0], (Curve::Point{1, 2}));
  EXPECT_EQ(c.points()[1], (Curve::Point{2, 4}));
  EXPECT_EQ(c.points()[2], (Curve::Point{4, 4}));
  EXPECT_EQ(c.points()[3], (Curve::Point{8, 9}));
  EXPECT_NO_THROW(c.validate("c", false));
}

TEST(Profile, TextRoundTrip) {
  MachineProfile p = testing::tiny_profile();
  p.measured = true;
  p.date = "2030-01-02";
  p.device = "a \"quoted\" processor";
  p.cores = 2;
  p.transport = "local";
  p.link_model = LinkModel::kCalendar;
  p.posting = Posting::kThread;
  p.roofline = GemmRoofline{1e12, 1.0 / 3 * 1e11};
  const MachineProfile back = parse_profile(p.to_json(), "file");
  EXPECT_EQ(back, p);
  EXPECT_EQ(back.hash(), p.hash());
  p.op_us = 0.125;
  EXPECT_NE(back.hash(), p.hash());
  EXPECT_EQ(back.machine_hash(), p.machine_hash());
  p.transport = "mpi";
  EXPECT_NE(back.machine_hash(), p.machine_hash());
}

TEST(Profile, ContradictionsAreErrors) {
  const auto refuse = [](std::initializer_list<std::string_view> words, auto&& damage) {
    MachineProfile p = testing::tiny_profile();
    damage(p);
    expect_error(ErrorCode::kInvalidConfig, words, [&] { p.validate(); });
    expect_error(ErrorCode::kInvalidConfig, words, [&] { parse_profile(p.to_json(), "there.json"); });
  };
  refuse({"gather", "no points"}, [](MachineProfile& p) { p.gather = Curve(); });
  refuse({"in_node.occupied", "time falls", "10"}, [](MachineProfile& p) {
    p.in_node.occupied = Curve({{0, 10}, {5, 9}});
  });
  refuse({"across_nodes.send", "two times"}, [](MachineProfile& p) {
    p.across_nodes.send = Curve({{5, 1}, {5, 2}});
  });
  refuse({"across_nodes.receive", "not above"}, [](MachineProfile& p) {
    p.across_nodes.receive = Curve({{5, 1}, {4, 2}});
  });
  refuse({"latency_us", "-1"}, [](MachineProfile& p) { p.in_node.latency_us = -1; });
  refuse({"gemms[0].rows", "point 1", "-3"}, [](MachineProfile& p) {
    p.gemms[0].rows = Curve({{1, 2}, {2, -3}});
  });
  refuse({"gemms[0] and gemms[6]", "forward GEMM"}, [](MachineProfile& p) {
    p.gemms.push_back({p.gemms[0].shape, Curve({{1, 5}})});
  });
  refuse({"neither gemms nor a roofline"}, [](MachineProfile& p) { p.gemms.clear(); });
  refuse({"roofline", "flops"}, [](MachineProfile& p) { p.roofline = GemmRoofline{0, 1}; });
  refuse({"called measured"}, [](MachineProfile& p) { p.measured = true; });
  MachineProfile nan = testing::tiny_profile();
  nan.op_us = std::numeric_limits<double>::quiet_NaN();
  expect_error(ErrorCode::kInvalidConfig, {"op_us"}, [&] { nan.validate(); });
}

TEST(Profile, TextErrorsNameTheField) {
  const std::string good = testing::tiny_profile().to_json();
  const auto refuse = [&](std::initializer_list<std::string_view> words, std::string_view from,
                          std::string_view to) {
    std::string text = good;
    const std::size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    expect_error(ErrorCode::kInvalidConfig, words, [&] { parse_profile(text, "there.json"); });
  };
  refuse({"there.json", "\"opus\""}, "\"op_us\"", "\"opus\": 1, \"op_us\"");
  refuse({"there.json", "twice", "op_us"}, "\"op_us\"", "\"op_us\": 1, \"op_us\"");
  refuse({"there.json", "op_us", "missing"}, "\"op_us\": 0.0,", "");
  refuse({"version 2"}, "\"sluice_profile\": 1", "\"sluice_profile\": 2");
  refuse({"link_model", "\"fifo\"", "calendar, queue"}, "\"queue\"", "\"fifo\"");
  refuse({"gemms[0]", "dtype", "f32, bf16"}, "\"f32\"", "\"f8\"");
  refuse({"in_cols", "integer", "string"}, "\"in_cols\": 10", "\"in_cols\": \"1.5\"");
  refuse({"cores", "-4"}, "\"cores\": 0", "\"cores\": -4");
  refuse({"measured"}, "\"measured\": false", "\"measured\": 0");
  for (const std::string_view text :
       {std::string_view(""), std::string_view("[]"), std::string_view("nonsense"),
        std::string_view("{\"sluice_profile\": 1")})
    expect_error(ErrorCode::kInvalidConfig, {"there.json"}, [&] { parse_profile(text, "there.json"); });
  expect_error(ErrorCode::kInvalidConfig, {"there.json"}, [&] { parse_profile(good + "x", "there.json"); });
}

TEST(Profile, GemmOfGroups) {
  MachineProfile p = testing::tiny_profile();
  p.gemm_call_us = 3;
  const GemmShape shape = testing::tiny_layer().gemm1(GemmKind::kForward);
  const double rows[] = {4, 0, 1};
  EXPECT_EQ(p.gemm_us(shape, rows), 3 + 8 + 2);
  const double none[] = {0, 0};
  EXPECT_EQ(p.gemm_us(shape, none), 0);
  GemmShape other = shape;
  other.in_cols = 11;
  expect_error(ErrorCode::kNotFound, {"tiny", "[20, 11]", "--probe"}, [&] { p.gemm_us(other, rows); });
  p.roofline = GemmRoofline{1e9, 1e9};
  // 2 * 4 * 20 * 11 flops in 1.76 us against 880 bytes of weights in 0.88 us; one row is bound by its weights.
  EXPECT_NEAR(p.gemm_us(other, rows), 3 + 1.76 + 0.88, 1e-9);
}

}  // namespace
}  // namespace sluice
