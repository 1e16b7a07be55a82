// Reading text, splitting it, the order of tokens, and the byte statistics beside hand-computed values.
#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>

#include "train_harness.hpp"

namespace sluice::testing {
namespace {

namespace fs = std::filesystem;
using train::TextSplit;

class TrainText : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / str("sluice_train_text_", ::getpid(), "_",
                                            ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }
  fs::path write(const std::string& name, const std::string& bytes) {
    fs::create_directories((root_ / name).parent_path());
    std::ofstream(root_ / name, std::ios::binary) << bytes;
    return root_ / name;
  }
  void expect_error(const fs::path& path, ErrorCode code, std::string_view part) {
    try {
      train::read_text(path, 1 << 20);
      ADD_FAILURE() << path << " was read";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code);
      EXPECT_NE(error.message().find(part), std::string::npos) << error.message();
      EXPECT_NE(error.message().find(path.string()), std::string::npos) << error.message();
    }
  }
  fs::path root_;
};

TEST_F(TrainText, DirectoryIsReadInOrderOfPathsWithoutBinariesAndBuildFolders) {
  write("b.txt", "B");
  write("a/z.txt", "AZ");
  write("a/y/x.md", "AYX");
  write("a.txt", "A");
  write("image.bin", std::string("\x7f\x00x", 3));
  write("empty.txt", "");
  write(".git/config", "NO");
  write(".hidden", "NO");
  write("build/out.txt", "NO");
  write("other/CMakeCache.txt", "NO");
  write("other/x.txt", "NO");
  fs::create_symlink(root_ / "b.txt", root_ / "c.txt");
  fs::create_directory_symlink(root_, root_ / "a" / "loop");
  const train::Text text = train::read_text(root_, 1 << 20);
  EXPECT_EQ(text.bytes, "AAYXAZB");  // a.txt, a/y/x.md, a/z.txt, b.txt
  EXPECT_EQ(text.description, str("directory ", root_.string(), " (4 files)"));
  EXPECT_EQ(train::read_text(root_, 5).bytes, "AAYXA");
}

TEST_F(TrainText, FileIsReadUpToTheBound) {
  const fs::path file = write("a.txt", std::string(3000, 'x') + "y");
  EXPECT_EQ(train::read_text(file, 1 << 20).bytes.size(), 3001u);
  EXPECT_EQ(train::read_text(file, 3000).bytes, std::string(3000, 'x'));
  EXPECT_EQ(train::read_text(file, 10).description, "file " + file.string());
}

TEST_F(TrainText, WhatCannotBeReadIsNamed) {
  expect_error(root_ / "none.txt", ErrorCode::kNotFound, "does not exist");
  expect_error(write("empty.txt", ""), ErrorCode::kInvalidArgument, "is empty");
  expect_error(write("nul.txt", std::string("ab\0c", 4)), ErrorCode::kInvalidArgument, "binary: byte 2");
  fs::create_directory(root_ / "folder");
  expect_error(root_ / "folder", ErrorCode::kInvalidArgument, "no text files");
}

TEST_F(TrainText, AFolderThatCannotBeListedIsNotLeftOutInSilence) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may list every folder";
  write("a.txt", "some text");
  write("closed/b.txt", "other text");
  fs::permissions(root_ / "closed", fs::perms::none);
  expect_error(root_, ErrorCode::kIo, "cannot be listed");
  fs::permissions(root_ / "closed", fs::perms::owner_all);
}

TEST_F(TrainText, RanksGetTheSameTextOrTheSameError) {
  const fs::path file = write("a.txt", "some text");
  for (const std::string& path : {file.string(), (root_ / "none.txt").string()}) {
    const LoadedConfig loaded = tiny_config({"train.text=" + path});
    std::vector<std::string> got(4);
    run_job(loaded, 4, [&](Runtime& runtime) {
      try {
        const train::Text text = train::load_text(runtime, loaded.config);
        got[runtime.rank().index()] = text.description + ": " + text.bytes;
      } catch (const Error& error) {
        got[runtime.rank().index()] = error.message();
      }
      runtime.barrier();  // the group goes on
    });
    for (const std::string& one : got) EXPECT_EQ(one, got[0]);
    EXPECT_NE(got[0].find(path == file.string() ? "some text" : "does not exist"), std::string::npos)
        << got[0];
  }
}

TEST_F(TrainText, TooShortATextIsAnErrorOfTrain) {
  for (const std::size_t size : {1u, 5u, 20u, 39u}) {
    try {
      run_train(tiny_config(), 2, word_text(size));
      ADD_FAILURE() << size << " bytes were enough";
    } catch (const Error& error) {
      EXPECT_NE(error.message().find("too short"), std::string::npos) << error.message();
    }
  }
  EXPECT_NO_THROW(run_train(tiny_config(), 2, word_text(60)));
}

TEST(TrainSplit, PartsCoverTheTextAndNoWindowCrosses) {
  for (const std::int64_t size : {64, 1000, 40000, 1000003})
    for (const std::int32_t context : {1, 3, 8, 16})
      for (const double fraction : {0.1, 0.25, 0.5}) {
        if (static_cast<double>(size) * fraction <= context + 1) continue;
        const TextSplit split(size, context, fraction);
        std::vector<char> part(static_cast<std::size_t>(size), 0);
        std::int64_t heldout_bytes = 0;
        for (const auto& range : split.train_ranges())
          for (std::int64_t p = range.begin; p < range.end; ++p) ++part[static_cast<std::size_t>(p)];
        for (const auto& range : split.heldout_ranges()) {
          heldout_bytes += range.size();
          for (std::int64_t p = range.begin; p < range.end; ++p) part[static_cast<std::size_t>(p)] += 2;
        }
        for (const char p : part) ASSERT_TRUE(p == 1 || p == 2) << "every byte is in one part";
        EXPECT_NEAR(static_cast<double>(heldout_bytes), static_cast<double>(size) * fraction,
                    static_cast<double>(split.heldout_ranges().size()) + 1);
        EXPECT_LE(split.heldout_ranges().size(), static_cast<std::size_t>(TextSplit::kMaxBlocks));
        const auto check = [&](std::int64_t count, auto&& position, char want) {
          std::int64_t last = -1;
          for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t p = position(i);
            ASSERT_GT(p, last);
            ASSERT_LT(p, size);
            last = p;
            for (std::int64_t q = p - std::max(context, 2); q <= p; ++q)
              ASSERT_EQ(part[static_cast<std::size_t>(q)], want)
                  << "the window of token " << i << " ends at " << p;
          }
        };
        check(
            split.num_train(), [&](std::int64_t i) { return split.train_position(i); }, 1);
        check(
            split.num_heldout(), [&](std::int64_t i) { return split.heldout_position(i); }, 2);
        ASSERT_GT(split.num_train(), 0);
        ASSERT_GT(split.num_heldout(), 0);
      }
}

TEST(TrainSplit, BlocksAreSpreadOverALongText) {
  const TextSplit split(1000000, 8, 0.1);
  EXPECT_EQ(split.heldout_ranges().size(), 48u);  // 100000 / 2048
  EXPECT_LT(split.heldout_ranges().front().end, 30000);
  EXPECT_EQ(split.heldout_ranges().back().end, 1000000);
}

TEST(TrainOrder, EachTimeRoundIsAnotherPermutation) {
  for (const std::int64_t size : {1, 2, 3, 100, 1000}) {
    const train::TokenOrder order(5, size);
    std::vector<std::int64_t> first, second;
    for (std::int64_t g = 0; g < size; ++g) {
      first.push_back(order.at(g));
      second.push_back(order.at(g + size));
    }
    if (size >= 100) {
      EXPECT_NE(first, second);
    }
    for (auto* list : {&first, &second}) {
      std::vector<std::int64_t> sorted = *list;
      std::sort(sorted.begin(), sorted.end());
      std::vector<std::int64_t> all(static_cast<std::size_t>(size));
      std::iota(all.begin(), all.end(), 0);
      EXPECT_EQ(sorted, all);
    }
  }
  EXPECT_NE(train::TokenOrder(1, 1000).at(0), train::TokenOrder(2, 1000).at(0));
}

TEST(TrainBatches, DoNotDependOnRanks) {
  const LoadedConfig loaded = tiny_config();
  const train::Text text = word_text(3000);
  const TextSplit split(3000, loaded.config.model.context, 0.1);
  for (const std::int64_t step : {1, 2, 90}) {
    train::BatchReader whole(text, split, loaded.config, RankId(0), 1);
    const train::Batch all = whole.train(step);
    ASSERT_EQ(all.num_tokens(), 40);
    std::vector<std::int32_t> context, target;
    for (std::int32_t r = 0; r < 3; ++r) {
      train::BatchReader part(text, split, loaded.config, RankId(r), 3);
      const train::Batch batch = part.train(step);
      EXPECT_EQ(batch.num_global_tokens, 40);
      context.insert(context.end(), batch.context.begin(), batch.context.end());
      target.insert(target.end(), batch.target.begin(), batch.target.end());
    }
    EXPECT_EQ(context, std::vector<std::int32_t>(all.context.begin(), all.context.end()));
    EXPECT_EQ(target, std::vector<std::int32_t>(all.target.begin(), all.target.end()));
    // The context is what stands before the target, oldest first.
    const std::string window = {static_cast<char>(context[0]), static_cast<char>(context[1]),
                                static_cast<char>(context[2]), static_cast<char>(target[0])};
    EXPECT_NE(text.bytes.find(window), std::string::npos);
  }
}

TEST(TrainBatches, ByPositionTheSameTokensAreDealtInOrder) {
  LoadedConfig loaded = tiny_config();
  const train::Text text = word_text(3000);
  const TextSplit split(3000, loaded.config.model.context, 0.1);
  for (const std::int64_t step : {1, 2, 90}) {
    std::multiset<std::vector<std::int32_t>> windows[2];
    for (const bool by_position : {false, true}) {
      loaded.config.train.deal =
          by_position ? Config::Train::Deal::kByPosition : Config::Train::Deal::kRandom;
      std::vector<std::int32_t> in_turn;
      for (std::int32_t r = 0; r < 3; ++r) {
        train::BatchReader part(text, split, loaded.config, RankId(r), 3);
        const train::Batch batch = part.train(step);
        const auto context = static_cast<std::ptrdiff_t>(loaded.config.model.context);
        for (std::ptrdiff_t t = 0; t < batch.num_tokens(); ++t) {
          std::vector<std::int32_t> window(batch.context.begin() + t * context,
                                           batch.context.begin() + (t + 1) * context);
          window.push_back(batch.target[static_cast<std::size_t>(t)]);
          windows[by_position].insert(window);
        }
        in_turn.insert(in_turn.end(), batch.target.begin(), batch.target.end());
      }
      // Positions ascend over the ranks: the targets are found one after the other in the text.
      if (!by_position) continue;
      std::size_t at = 0;
      for (const std::int32_t byte : in_turn) {
        at = text.bytes.find(static_cast<char>(byte), at);
        ASSERT_NE(at, std::string::npos) << "step " << step;
        ++at;
      }
    }
    EXPECT_EQ(windows[0], windows[1]) << "step " << step;
  }
}

TEST(TrainBaselines, AreThoseComputedByHand) {
  // 20 bytes, half held out: train "abababab" of which tokens 2.. count, held out likewise.
  const std::string bytes =
      "ababababab"
      "abababaabb";
  const TextSplit split(20, 1, 0.5);
  ASSERT_EQ(split.num_train(), 8);    // "abababab": 4 a, 4 b
  ASSERT_EQ(split.num_heldout(), 8);  // "ababaabb" after "ab"
  std::vector<std::int64_t> heldout;
  for (std::int64_t i = 0; i < 8; ++i) heldout.push_back(split.heldout_position(i));
  const train::Baselines got = train::byte_baselines(bytes, split, heldout);

  const double u = 1.0 / 256;
  // Order 0: n(a) = n(b) = 4 of 8.
  const double a0 = got.prior[0], p0 = (4 + a0 * u) / (8 + a0);
  EXPECT_NEAR(got.order0_bpb, -std::log2(p0), 1e-12);
  // Order 1: after a always b (4 times), after b always a (4 times).
  const double a1 = got.prior[1], same = (0 + a1 * p0) / (4 + a1), other = (4 + a1 * p0) / (4 + a1);
  // Held out "ab|ababaabb": pairs ba ab ba ab ba aa ab bb.
  EXPECT_NEAR(got.order1_bpb, -(6 * std::log2(other) + 2 * std::log2(same)) / 8, 1e-12);
  // Order 2: after ab always a, after ba always b; nothing is known after aa, then order 1 decides.
  const double a2 = got.prior[2];
  const auto p2 = [&](double count, double total, double lower) {
    return (count + a2 * lower) / (total + a2);
  };
  const double hit = p2(4, 4, other), miss = p2(0, 4, same);
  // Triples: aba bab aba bab aba baa aab abb; aab has an unseen history.
  EXPECT_NEAR(got.order2_bpb,
              -(5 * std::log2(hit) + std::log2(miss) + std::log2(other) + std::log2(miss)) / 8, 1e-12);

  // The priors are the likeliest of the grid when each token is left out of its counts.
  for (int order = 0; order < 3; ++order) {
    const double lower = order == 0 ? u : order == 1 ? p0 : other, total = order == 0 ? 8 : 4;
    const auto bits = [&](double a) { return -std::log2((4 - 1 + a * lower) / (total - 1 + a)); };
    for (int e = -6; e <= 14; ++e) EXPECT_LE(bits(got.prior[order]), bits(std::ldexp(1.0, e)) + 1e-12);
  }
}

TEST(TrainBaselines, HigherOrdersTellWordsBetter) {
  const train::Text text = word_text(40000);
  const TextSplit split(40000, 4, 0.1);
  std::vector<std::int64_t> heldout;
  for (std::int64_t i = 0; i < split.num_heldout(); ++i) heldout.push_back(split.heldout_position(i));
  const train::Baselines got = train::byte_baselines(text.bytes, split, heldout);
  EXPECT_LT(got.order0_bpb, 5);
  EXPECT_LT(got.order1_bpb, got.order0_bpb - 0.5);
  EXPECT_LT(got.order2_bpb, got.order1_bpb - 0.2);
}

TEST(TrainRate, WarmsUpAndFallsToItsEnd) {
  Config::Train train = Config().train;
  train.steps = 100;
  train.warmup_steps = 10;
  train.learning_rate = 1;
  train.min_learning_rate_ratio = 0.1;
  EXPECT_DOUBLE_EQ(train::learning_rate(train, 1), 0.1);
  EXPECT_DOUBLE_EQ(train::learning_rate(train, 10), 1);
  EXPECT_NEAR(train::learning_rate(train, 55), 0.55, 1e-12);
  EXPECT_NEAR(train::learning_rate(train, 100), 0.1, 1e-12);
  train.warmup_steps = 0;
  EXPECT_LE(train::learning_rate(train, 1), 1);
  train.warmup_steps = 200;
  EXPECT_DOUBLE_EQ(train::learning_rate(train, 100), 0.5);
}

}  // namespace
}  // namespace sluice::testing
