#include "sluice/scheduler/placement_file.hpp"

#include <gtest/gtest.h>

#include "expect_error.hpp"

namespace sluice {
namespace {

TEST(PlacementFile, RoundTrip) {
  const PlacementFile file{"sluice", 4, {{0}, {1}}, {{0, {{0, 1}, {2, 3, 0}}}, {7, {{3, 1, 2}, {0}}}}};
  EXPECT_EQ(parse_placement(file.to_json(), "f"), file);
}

TEST(PlacementFile, DamageIsNamed) {
  const std::string good = PlacementFile{"p", 4, {{0}, {1}}, {{0, {{0, 1}, {2, 3}}}}}.to_json();
  const struct {
    std::string from, to, what;
  } cases[] = {
      {"\"sluice_placement\":1", "\"sluice_placement\":2", "version 2"},
      {"\"num_ranks\":2", "\"num_ranks\":3", "has 2 ranks, num_ranks is 3"},
      {"[2,3]", "[2,4]", "experts_of_rank[1][1] is 4"},
      {"[2,3]", "[2,-3]", "is -3"},
      {"[2,3]", "[2,null]", "is null"},
      {"[2,3]", "5", "must be a list"},
      {"\"planner\"", "\"plan\"", "\"planner\" is missing"},
      {"]}]}", "]}", "is no placement"},
      {"[[0],[1]]", "[[0],[0]]", "rank 0 is there twice"},
      {"[[0],[1]]", "[[0]]", "rank 1 is in none"},
  };
  for (const auto& c : cases) {
    std::string text = good;
    ASSERT_NE(text.find(c.from), std::string::npos) << c.from;
    text.replace(text.find(c.from), c.from.size(), c.to);
    try {
      parse_placement(text, "f");
      ADD_FAILURE() << "accepted: " << text;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidConfig);
      EXPECT_NE(e.message().find(c.what), std::string::npos) << e.message() << " lacks " << c.what;
    }
  }
}

}  // namespace
}  // namespace sluice
