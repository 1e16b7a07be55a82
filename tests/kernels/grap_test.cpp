// GrAP affinities against the published example, and the backward against central differences.
#include "sluice/kernels/grap.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "sluice/base/error.hpp"

namespace sluice::kernels {
namespace {

std::vector<float> affinity(const std::vector<float>& x, std::int64_t hidden, std::int64_t num_experts) {
  const auto n = static_cast<std::int64_t>(x.size()) / hidden;
  std::vector<float> out(static_cast<std::size_t>(n * num_experts), std::nanf(""));
  grap_affinity({x.data(), n, hidden}, {out.data(), n, num_experts});
  return out;
}

TEST(Grap, Example) {
  const std::vector<float> x = {1, 3, -1, 1, 0, 0, 2, 2, 2, 2, 0, 0, 1, -1, 0, 0,  //
                                0, 0, 3,  1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1,  1, 1,  //
                                0, 0, 0,  0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0,  1, 5};
  const std::vector<double> want = {.632456, 0,  0,  .632456, .894427, 0, 0,       0, 0, .894427, 0, 0,
                                    .5,      .5, .5, .5,      0,       0, .707107, 0, 0, .136083, 0, .816497};
  const std::vector<float> got = affinity(x, 8, 4);
  for (std::size_t i = 0; i < want.size(); ++i)
    EXPECT_TRUE(std::abs(double(got[i]) - want[i]) <= 1e-6) << i << ": " << got[i] << ", wanted " << want[i];
}

TEST(Grap, ZeroRowsHaveNoAffinityAndNoGradient) {
  const std::vector<float> x(8, 0.0f), d = {1, 2};
  const std::vector<float> delta = affinity(x, 8, 2);
  EXPECT_EQ(delta, (std::vector<float>{0, 0}));
  std::vector<float> dx(8, std::nanf(""));
  grap_backward({x.data(), 1, 8}, {delta.data(), 1, 2}, {d.data(), 1, 2}, {dx.data(), 1, 8});
  EXPECT_EQ(dx, std::vector<float>(8, 0.0f));
}

TEST(Grap, BackwardIsTheDifferenceQuotient) {
  const unsigned seed = 5;
  std::mt19937 gen(seed);
  std::normal_distribution<float> normal;
  constexpr std::int64_t kTokens = 3, kHidden = 12, kExperts = 4;
  std::vector<float> x(kTokens * kHidden), d(kTokens * kExperts), dx(x.size(), std::nanf(""));
  for (float& v : x) v = normal(gen);
  for (float& v : d) v = normal(gen);
  const std::vector<float> delta = affinity(x, kHidden, kExperts);
  grap_backward({x.data(), kTokens, kHidden}, {delta.data(), kTokens, kExperts},
                {d.data(), kTokens, kExperts}, {dx.data(), kTokens, kHidden});
  const auto loss = [&](const std::vector<double>& row, std::size_t t) {
    double squares = 0, out = 0;
    for (const double v : row) squares += v * v;
    for (std::size_t i = 0; i < kExperts; ++i) {
      double sum = 0;
      for (std::size_t j = 0; j < 3; ++j) sum += row[3 * i + j];
      out += double(d[t * kExperts + i]) * sum / std::sqrt(3 * squares);
    }
    return out;
  };
  for (std::size_t t = 0; t < kTokens; ++t)
    for (std::size_t j = 0; j < kHidden; ++j) {
      std::vector<double> row(x.begin() + std::ptrdiff_t(t * kHidden),
                              x.begin() + std::ptrdiff_t((t + 1) * kHidden));
      row[j] += 1e-5;
      const double up = loss(row, t);
      row[j] -= 2e-5;
      const double want = (up - loss(row, t)) / 2e-5;
      EXPECT_TRUE(std::abs(double(dx[t * kHidden + j]) - want) <= 1e-6)
          << "seed " << seed << " token " << t << " " << j;
    }
}

TEST(Grap, Bf16RowsAreThatOfTheirValues) {
  const std::vector<float> x = {1, 2, -3, .5f, 4, 0, 1, 1};
  std::vector<bf16> narrow;
  for (const float v : x) narrow.push_back(static_cast<bf16>(v));  // exact
  std::vector<float> out(4, std::nanf(""));
  grap_affinity({narrow.data(), 1, 8}, {out.data(), 1, 4});
  EXPECT_EQ(out, affinity(x, 8, 4));
}

TEST(Grap, RefusesWhatDoesNotDivide) {
  const std::vector<float> x(10, 1.0f);
  try {
    affinity(x, 10, 4);
    ADD_FAILURE() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(e.message().find("hidden is 10"), std::string::npos) << e.message();
    EXPECT_NE(e.message().find("4 experts"), std::string::npos) << e.message();
  }
}

}  // namespace
}  // namespace sluice::kernels
