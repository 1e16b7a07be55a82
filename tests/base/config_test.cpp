// Configuration: every conversion and every kind of error, with exact positions and sources.
#include "sluice/base/config.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "sluice/base/config_schema.hpp"
#include "sluice/base/error.hpp"

namespace sluice {
namespace {

namespace schema = config_schema;
using Sets = std::vector<std::string>;

// The message of the kInvalidConfig that parsing throws, or "no error".
std::string error_of(std::string_view text, const Sets& sets = {},
                     const ConfigEnvironment& environment = {}) {
  try {
    parse_config(text, "f.toml", sets, environment);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidConfig) << e.what();
    return e.message();
  }
  return "no error";
}

// A text that loads and sets nothing.
constexpr std::string_view kNothing = "# nothing\n";

Config parsed(std::string_view text, const Sets& sets = {}, const ConfigEnvironment& environment = {}) {
  return parse_config(text, "f.toml", sets, environment).config;
}

::testing::AssertionResult contains(const std::string& text, std::string_view part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << '"' << text << "\" does not contain \"" << part << '"';
}
::testing::AssertionResult begins(const std::string& text, std::string_view part) {
  if (text.starts_with(part)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << '"' << text << "\" does not begin with \"" << part << '"';
}

class TempFile {
 public:
  explicit TempFile(std::string_view content) {
    path_ = std::filesystem::temp_directory_path() /
            ("sluice_config_test_" + std::to_string(::getpid()) + ".toml");
    std::ofstream(path_, std::ios::binary) << content;
  }
  ~TempFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::string file_error(const std::filesystem::path& path, ErrorCode code) {
  try {
    load_config(path, {}, {});
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    return e.message();
  }
  return "no error";
}

// ---- defaults and conversions
// ----------------------------------------------------------------------------------------

TEST(Config, DefaultsAreThoseOfTheSchema) {
  const Config c;
  EXPECT_EQ(c.model.num_layers, 2);
  EXPECT_EQ(c.model.num_experts, 16);
  EXPECT_EQ(c.model.hidden, 64);
  EXPECT_EQ(c.model.ffn, 128);
  EXPECT_EQ(c.model.activation, Config::Model::Activation::kSwiGLU);
  EXPECT_EQ(c.model.dtype, DType::kF32);
  EXPECT_EQ(c.model.num_ffn_experts(), 16);
  EXPECT_EQ(c.routing.policy, Config::Routing::Policy::kRelu);
  EXPECT_EQ(c.routing.relu_lambda0, 1e-8);
  EXPECT_EQ(c.routing.relu_alpha, 1.2);
  EXPECT_TRUE(c.routing.renormalize);
  EXPECT_TRUE(c.placement.slots_per_rank.empty());
  EXPECT_FALSE(c.topology.nodes.declared());
  EXPECT_EQ(c.comm.transport, "local");
  EXPECT_EQ(c.comm.timeout_ms, 30000);
  EXPECT_EQ(c.comm.wire_dtype, WireDType::kRows);
  EXPECT_EQ(c.schedule.exchange, Config::Schedule::Exchange::kGateway);
  EXPECT_EQ(c.runtime.log_level, LogLevel::kInfo);
  EXPECT_EQ(c.train.learning_rate, 3e-3);
  EXPECT_EQ(c.train.text, "");
  EXPECT_EQ(c.bench.tokens_per_rank, 1024);
  for (const schema::Row& row : schema::rows()) EXPECT_EQ(LoadedConfig().source(row.key).text, "default");
}

TEST(Config, FileConvertsEveryType) {
  const Config c = parsed(
      "[model]\nnum_experts = 8\nhidden = 1_024\nffn = 0x80\nactivation = \"gelu\"\ndtype = \"bf16\"\n"
      "[routing]\nrenormalize = false\nroute_scale = 2\nrelu_alpha = 1.25\n"
      "[placement]\nslots_per_rank = [3, 0, 5]\n"
      "[train]\ntext = \"a b.txt\"\nlearning_rate = 1e-4\n"
      "[comm]\nwire_dtype = 'bf16'\n");
  EXPECT_EQ(c.model.num_experts, 8);
  EXPECT_EQ(c.model.hidden, 1024);
  EXPECT_EQ(c.model.ffn, 128);
  EXPECT_EQ(c.model.activation, Config::Model::Activation::kGelu);
  EXPECT_EQ(c.model.dtype, DType::kBF16);
  EXPECT_FALSE(c.routing.renormalize);
  EXPECT_EQ(c.routing.route_scale, 2.0);
  EXPECT_EQ(c.routing.relu_alpha, 1.25);
  EXPECT_EQ(c.placement.slots_per_rank, (std::vector<std::int32_t>{3, 0, 5}));
  EXPECT_EQ(c.train.text, "a b.txt");
  EXPECT_EQ(c.train.learning_rate, 1e-4);
  EXPECT_EQ(wire_dtype_of(c.comm.wire_dtype, DType::kF32), DType::kBF16);
  EXPECT_EQ(wire_dtype_of(WireDType::kRows, DType::kBF16), DType::kBF16);
  EXPECT_EQ(wire_dtype_of(WireDType::kF32, DType::kBF16), DType::kF32);
}

TEST(Config, DottedKeysAreTheSame) {
  EXPECT_EQ(parsed("model.hidden = 32\n").model.hidden, 32);
}

TEST(Config, SetsConvertEveryType) {
  const Config c =
      parsed(kNothing, {"model.hidden=256", "routing.renormalize=false", "train.learning_rate=5e-4",
                        "routing.policy=softmax_topk", "placement.slots_per_rank=[8, 8]",
                        "train.text=dir=x/a.txt", "train.report=", "comm.transport=mpi"});
  EXPECT_EQ(c.model.hidden, 256);
  EXPECT_FALSE(c.routing.renormalize);
  EXPECT_EQ(c.train.learning_rate, 5e-4);
  EXPECT_EQ(c.routing.policy, Config::Routing::Policy::kSoftmaxTopK);
  EXPECT_EQ(c.placement.slots_per_rank, (std::vector<std::int32_t>{8, 8}));
  EXPECT_EQ(c.train.text, "dir=x/a.txt");
  EXPECT_EQ(c.comm.transport, "mpi");
  EXPECT_TRUE(parsed(kNothing, {"placement.slots_per_rank=[]"}).placement.slots_per_rank.empty());
}

TEST(Config, NodesInAllForms) {
  const NodesSpec lists{.num_nodes = 2, .ranks_per_node = 0, .lists = {{0, 1}, {2, 3}}};
  const NodesSpec grid{.num_nodes = 2, .ranks_per_node = 3, .lists = {}};
  const NodesSpec count{.num_nodes = 4, .ranks_per_node = 0, .lists = {}};
  EXPECT_EQ(parsed("[topology]\nnodes = [[0, 1], [2, 3]]\n").topology.nodes, lists);
  EXPECT_EQ(parsed("[topology]\nnodes = \"[[0,1],[2,3]]\"\n").topology.nodes, lists);
  EXPECT_EQ(parsed(kNothing, {"topology.nodes=[[0,1],[2,3]]"}).topology.nodes, lists);
  EXPECT_EQ(parsed(kNothing, {"topology.nodes= [ [0, 1] , [2,3] ] "}).topology.nodes, lists);
  EXPECT_EQ(parsed("[topology]\nnodes = \"2x3\"\n").topology.nodes, grid);
  EXPECT_EQ(parsed(kNothing, {"topology.nodes=2x3"}).topology.nodes, grid);
  EXPECT_EQ(parsed("[topology]\nnodes = 4\n").topology.nodes, count);
  EXPECT_EQ(parsed(kNothing, {}, {{"SLUICE_TOPOLOGY_NODES", "4"}}).topology.nodes, count);
  EXPECT_EQ(parsed("[topology]\nnodes = 0\n").topology.nodes, NodesSpec{});
  EXPECT_EQ(lists.num_ranks(), 4);
  EXPECT_EQ(grid.num_ranks(), 6);
  EXPECT_EQ(count.num_ranks(), 0);
}

TEST(Config, NodesWrong) {
  for (const std::string text :
       {"2x", "x2", "0x2", "2x0", "2x2x2", "-1", "two", "", "[[0,1],[2,3]", "[[0,1],[2,3]]]", "[0,1]",
        "[[0,1],2]", "[[0,a]]", "[[0,1],[2,3]] x", "70000", "300x300", "2.0", " 2"})
    EXPECT_TRUE(begins(error_of(kNothing, {"topology.nodes=" + text}), "--set \"topology.nodes=" + text))
        << text;
  EXPECT_TRUE(contains(error_of(kNothing, {"topology.nodes=[]"}), "no ranks"));
  EXPECT_TRUE(contains(error_of(kNothing, {"topology.nodes=[[0],[]]"}), "node 1"));
  EXPECT_TRUE(contains(error_of(kNothing, {"topology.nodes=[[0],[0]]"}), "rank 0"));
  EXPECT_TRUE(contains(error_of(kNothing, {"topology.nodes=[[0],[2]]"}), "rank 2"));
  EXPECT_TRUE(contains(error_of(kNothing, {"topology.nodes=[[1,0]]"}), "not ascending"));
  EXPECT_TRUE(begins(error_of("[topology]\nnodes = [[0, 1], [1]]\n"), "f.toml:2:9: topology.nodes: rank 1"));
  EXPECT_TRUE(
      begins(error_of("[topology]\nnodes = [[0, 1], 2]\n"), "f.toml:2:18: topology.nodes is an integer"));
  EXPECT_TRUE(
      begins(error_of("[topology]\nnodes = [[0, \"1\"]]\n"), "f.toml:2:14: topology.nodes is a string"));
  EXPECT_TRUE(
      begins(error_of("[topology]\nnodes = 1.5\n"), "f.toml:2:9: topology.nodes is a floating-point number"));
  EXPECT_TRUE(begins(error_of("[topology]\nnodes = [[-1]]\n"), "f.toml:2:9: topology.nodes names rank -1"));
}

// ---- wrong values, with positions
// ------------------------------------------------------------------------------------

TEST(Config, WrongTypeInFileIsNamedWithItsPosition) {
  EXPECT_EQ(error_of("# c\n[model]\n  hidden = \"64\"\n"),
            "f.toml:3:12: model.hidden is a string; must be an integer (1..65536); numbers and booleans are "
            "written "
            "without quotes");
  EXPECT_EQ(error_of("[model]\nhidden = 64.0\n"),
            "f.toml:2:10: model.hidden is a floating-point number; must be an integer (1..65536)");
  EXPECT_TRUE(begins(error_of("[model]\nhidden = true\n"), "f.toml:2:10: model.hidden is a boolean"));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = [1]\n"), "f.toml:2:10: model.hidden is an array"));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 1979-05-27\n"), "f.toml:2:10: model.hidden is a date"));
  EXPECT_TRUE(begins(error_of("[model.hidden]\na = 1\n"), "f.toml:1:1: model.hidden is a table"));
  EXPECT_TRUE(begins(error_of("[routing]\nrenormalize = 1\n"),
                     "f.toml:2:15: routing.renormalize is an integer; must be true or false"));
  EXPECT_TRUE(
      begins(error_of("[routing]\nroute_scale = \"1\"\n"), "f.toml:2:15: routing.route_scale is a string"));
  EXPECT_TRUE(
      begins(error_of("[routing]\npolicy = 1\n"),
             "f.toml:2:10: routing.policy is an integer; must be one of (relu, softmax_topk, sigmoid_topk, "
             "node_limited, bounded_regret, moepp, etr)"));
  EXPECT_TRUE(
      begins(error_of("[train]\ntext = 1\n"), "f.toml:2:8: train.text is an integer; must be a text"));
  EXPECT_TRUE(begins(error_of("[placement]\nslots_per_rank = 4\n"),
                     "f.toml:2:18: placement.slots_per_rank is an int"));
  EXPECT_TRUE(begins(error_of("[placement]\nslots_per_rank = [4,\n 4.5]\n"),
                     "f.toml:3:2: placement.slots_per_rank is a floating-point number"));
}

TEST(Config, OutOfRangeInFile) {
  EXPECT_EQ(error_of("[model]\nhidden = 0\n"),
            "f.toml:2:10: model.hidden is 0; must be an integer (1..65536)");
  EXPECT_TRUE(begins(error_of("[model]\nnum_experts = 4294967297\n"),
                     "f.toml:2:15: model.num_experts is 4294967297"));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 99999999999999999999\n"), "f.toml:2:"));
  EXPECT_EQ(error_of("[train]\nheldout_fraction = 1.0\n"),
            "f.toml:2:20: train.heldout_fraction is 1; must be a number (above 0, below 1)");
  EXPECT_TRUE(begins(error_of("[train]\nbeta1 = 1\n"),
                     "f.toml:2:9: train.beta1 is 1; must be a number (at least 0, below 1)"));
  EXPECT_TRUE(begins(error_of("[train]\ngrad_clip = inf\n"), "f.toml:2:13: train.grad_clip is inf"));
  EXPECT_TRUE(begins(error_of("[train]\ngrad_clip = nan\n"), "f.toml:2:13: train.grad_clip is nan"));
  EXPECT_TRUE(begins(error_of("[placement]\nslots_per_rank = [16, -1]\n"),
                     "f.toml:2:18: placement.slots_per_rank[1] is -1"));
}

TEST(Config, WrongChoiceSaysWhatIsAllowedAndMeant) {
  EXPECT_EQ(error_of("[routing]\npolicy = \"softmax_topK\"\n"),
            "f.toml:2:10: routing.policy is \"softmax_topK\"; must be one of (relu, softmax_topk, "
            "sigmoid_topk, node_limited, bounded_regret, moepp, etr); did you mean softmax_topk?");
  EXPECT_EQ(error_of("[comm]\ntransport = \"carrier pigeon\"\n"),
            "f.toml:2:13: comm.transport is \"carrier pigeon\"; must be one of (local, shm, tcp, ucx, "
            "shm+tcp, shm+ucx, mpi, nvlink, nccl)");
}

TEST(Config, WrongTexts) {
  const auto wrong = [](const std::string& set, std::string_view part) {
    return contains(error_of(kNothing, {set}), part);
  };
  EXPECT_EQ(error_of(kNothing, {"model.hidden=64k"}),
            "--set \"model.hidden=64k\": model.hidden is \"64k\"; must be an integer (1..65536)");
  for (const char* text : {"", " 64", "64 ", "+64", "6.4e1", "64.0", "0x40", "1_000", "--1", "true"})
    EXPECT_TRUE(wrong(str("model.hidden=", text), "must be an integer")) << text;
  EXPECT_TRUE(wrong("model.hidden=99999999999999999999", "too large"));
  EXPECT_TRUE(wrong("model.hidden=0", "model.hidden is 0; must be"));
  for (const char* text : {"", "1,5", "1.5x", " 1", "one", "0x1p3"})
    EXPECT_TRUE(wrong(str("train.learning_rate=", text), "must be a number")) << text;
  EXPECT_TRUE(wrong("train.grad_clip=inf", "must be a number"));
  EXPECT_TRUE(wrong("train.grad_clip=nan", "must be a number"));
  EXPECT_TRUE(wrong("train.learning_rate=1e999", "double cannot hold"));
  for (const char* text : {"", "1", "yes", "True", "TRUE", "true "})
    EXPECT_TRUE(wrong(str("routing.renormalize=", text), "must be true or false")) << text;
  for (const char* text : {"4,4", "[4,4", "[4,,4]", "[4,]", "[a]", "[4 4]", "[[4]]", "[1.5]"})
    EXPECT_TRUE(wrong(str("placement.slots_per_rank=", text), "must be a list of integers")) << text;
  EXPECT_TRUE(wrong(std::string("train.text=a\0b", 14), "NUL"));
}

TEST(Config, UnknownKeysAndSections) {
  EXPECT_EQ(error_of("[train]\nsteps = 3\nlearning_rat = 1\n"),
            "f.toml:3:1: unknown key \"train.learning_rat\"; did you mean train.learning_rate?");
  EXPECT_EQ(error_of("[trian]\nsteps = 3\n"), "f.toml:1:2: unknown section \"trian\"; did you mean train?");
  EXPECT_EQ(error_of("[train]\nhidden = 3\n"),
            "f.toml:2:1: unknown key \"train.hidden\"; did you mean model.hidden?");
  EXPECT_EQ(error_of("  steps = 3\n"),
            "f.toml:1:3: key \"steps\" is in no section; did you mean train.steps?");
  EXPECT_EQ(
      error_of("[placement]\nzzzzzzzzzzzzz = 3\n"),
      "f.toml:2:1: unknown key \"placement.zzzzzzzzzzzzz\"; keys of placement: policy, file, slots_per_rank");
  EXPECT_TRUE(contains(error_of("[qqqqqqqq]\na = 3\n"), "; sections: model, routing,"));
  EXPECT_TRUE(begins(error_of("model = 3\n"), "f.toml:1:9: model is an integer; it is a section"));
  EXPECT_TRUE(begins(error_of("[[model]]\nhidden = 3\n"), "f.toml:1:1: model is an array"));
  EXPECT_TRUE(begins(error_of("[model.deep]\nhidden = 3\n"), "f.toml:1:8: unknown key \"model.deep\""));

  EXPECT_EQ(error_of(kNothing, {"train.stpes=3"}),
            "--set \"train.stpes=3\": unknown key \"train.stpes\"; did you mean train.steps?");
  EXPECT_TRUE(
      contains(error_of(kNothing, {"tarin.steps=3"}), "unknown section \"tarin\"; did you mean train?"));
  EXPECT_TRUE(contains(error_of(kNothing, {"steps=3"}), "keys are written section.key"));
  EXPECT_TRUE(contains(error_of(kNothing, {"train.steps"}), "must be section.key=value"));
  EXPECT_TRUE(contains(error_of(kNothing, {""}), "must be section.key=value"));
  EXPECT_TRUE(contains(error_of(kNothing, {"=3"}), "keys are written section.key"));
  EXPECT_TRUE(contains(error_of(kNothing, {"train. steps=3"}), "did you mean train.steps?"));
  EXPECT_TRUE(contains(error_of(kNothing, {str("train.", std::string(100000, 'x'), "=3")}), "unknown key"));
}

TEST(Config, DuplicatesAndSyntax) {
  EXPECT_EQ(error_of(kNothing, {"train.steps=3", "train.seed=4", "train.steps=3"}),
            "--set \"train.steps=3\": train.steps is set twice; give one --set for it");
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 3\nhidden = 4\n"), "f.toml:3:"));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 3\n[model]\nffn = 4\n"), "f.toml:3:"));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 64 k\n"), "f.toml:2:13: "));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 64\nffn =\n"), "f.toml:3:6: "));
  EXPECT_TRUE(begins(error_of("[model\nhidden = 64\n"), "f.toml:1:7: "));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 64\n[\nffn = 3\n"), "f.toml:3:1: is no TOML"));
  EXPECT_TRUE(begins(error_of("["), "f.toml:1:"));
  EXPECT_TRUE(begins(error_of("[model]\nhidden = 64 \xc3\xa9\n"), "f.toml:2:13: "));
  EXPECT_TRUE(begins(error_of("[model]\n\xd2\x91 = 64\n"), "f.toml:2:1: "));
  EXPECT_TRUE(begins(error_of("[train]\ntext = \"abc\n"), "f.toml:2:12: "));
  EXPECT_TRUE(begins(error_of("[train]\ntext = \"\xff\xfe\"\n"), "f.toml:2:8: "));
  EXPECT_TRUE(begins(error_of(str("[model]\nhidden = ", std::string(10000, '['))), "f.toml:2:"));
}

// ---- files
// -----------------------------------------------------------------------------------------------------------

TEST(Config, Files) {
  const std::filesystem::path here(SLUICE_SOURCE_DIR);
  EXPECT_EQ(file_error(here / "none.toml", ErrorCode::kNotFound),
            (here / "none.toml").string() + ": cannot be opened: No such file or directory");
  EXPECT_TRUE(contains(file_error(here, ErrorCode::kIo), "is a directory"));
  {
    const TempFile file("");
    EXPECT_TRUE(
        begins(file_error(file.path(), ErrorCode::kInvalidConfig), file.path().string() + ": is empty"));
  }
  {
    const TempFile file(" \r\n\t\n");
    EXPECT_TRUE(contains(file_error(file.path(), ErrorCode::kInvalidConfig), "is empty"));
  }
  {
    const TempFile file(
        std::string_view("[model]\n\0\x7f"
                         "ELF",
                         13));
    EXPECT_TRUE(contains(file_error(file.path(), ErrorCode::kInvalidConfig), "is not a text: byte 8 is NUL"));
  }
  {
    const TempFile file("[model]\nhidden = 32 # " + std::string(kMaxConfigFileBytes - 22, 'x'));
    EXPECT_EQ(load_config(file.path(), {}, {}).config.model.hidden, 32);
  }
  {
    const TempFile file("[model]\nhidden = 32 # " + std::string(kMaxConfigFileBytes - 21, 'x'));
    EXPECT_TRUE(contains(file_error(file.path(), ErrorCode::kInvalidConfig), "larger than 1048576 bytes"));
  }
  EXPECT_TRUE(contains(file_error("/dev/zero", ErrorCode::kInvalidConfig), "larger than"));
  {
    const TempFile file("\xef\xbb\xbf[model]\r\nhidden = 32\r\n");
    const LoadedConfig loaded = load_config(file.path(), {}, {});
    EXPECT_EQ(loaded.config.model.hidden, 32);
    EXPECT_EQ(loaded.source("model.hidden").text, file.path().string() + ":2:10");
  }
}

TEST(Config, ConfigsOfTheRepositoryLoad) {
  const std::filesystem::path configs = std::filesystem::path(SLUICE_SOURCE_DIR) / "configs";
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(configs)) {
    if (entry.path().extension() != ".toml") continue;
    ++count;
    EXPECT_NO_THROW(load_config(entry.path(), {}, {})) << entry.path();
  }
  EXPECT_GE(count, 3);
  const Config quickstart = load_config(configs / "quickstart.toml", {}, {}).config;
  const Config mpi = load_config(configs / "mpi.toml", {}, {}).config;
  EXPECT_EQ(differing_keys(semantic_values(quickstart), semantic_values(mpi)),
            std::vector<std::string>{"comm.transport"});
  EXPECT_EQ(configured_ranks(quickstart), 4);
}

// ---- order and sources
// -----------------------------------------------------------------------------------------------

TEST(Config, LaterSourcesWinAndAreRemembered) {
  const ConfigEnvironment environment = {
      {"SLUICE_TRAIN_STEPS", "20"}, {"SLUICE_TRAIN_SEED", "21"}, {"PATH", "/"}};
  const LoadedConfig loaded = parse_config("[train]\nsteps = 10\nseed = 11\n  warmup_steps = 12\n",
                                           "dir/f.toml", Sets{"train.steps=30"}, environment);
  EXPECT_EQ(loaded.config.train.steps, 30);
  EXPECT_EQ(loaded.config.train.seed, 21);
  EXPECT_EQ(loaded.config.train.warmup_steps, 12);
  EXPECT_EQ(loaded.source("train.steps").text, "--set");
  EXPECT_EQ(loaded.source("train.steps").kind, ConfigSource::Kind::kCommandLine);
  EXPECT_EQ(loaded.source("train.seed").text, "SLUICE_TRAIN_SEED");
  EXPECT_EQ(loaded.source("train.seed").kind, ConfigSource::Kind::kEnvironment);
  EXPECT_EQ(loaded.source("train.warmup_steps").text, "dir/f.toml:4:18");
  EXPECT_EQ(loaded.source("train.warmup_steps").kind, ConfigSource::Kind::kFile);
  EXPECT_EQ(loaded.source("train.beta1").kind, ConfigSource::Kind::kDefault);
  EXPECT_THROW(loaded.source("train.stepz"), Error);
  // A value that a later source hides must still be right.
  EXPECT_TRUE(begins(error_of("[train]\nsteps = 0\n", {"train.steps=30"}), "f.toml:2:9"));
}

TEST(Config, WrongEnvironment) {
  const auto env_error = [](std::string name, std::string value) {
    return error_of(kNothing, {}, {{std::move(name), std::move(value)}});
  };
  EXPECT_EQ(env_error("SLUICE_TRAIN_STEPS", "many"),
            "environment SLUICE_TRAIN_STEPS: train.steps is \"many\"; must be an integer (1..1000000000)");
  EXPECT_TRUE(contains(env_error("SLUICE_TRAIN_STEPS", ""), "must be an integer"));
  EXPECT_EQ(env_error("SLUICE_TRAIN_STPES", "3"),
            "environment SLUICE_TRAIN_STPES: unknown key; did you mean SLUICE_TRAIN_STEPS?");
  EXPECT_EQ(env_error("SLUICE_TRIAN_STEPS", "3"),
            "environment SLUICE_TRIAN_STEPS: unknown key; did you mean SLUICE_TRAIN_STEPS?");
  EXPECT_TRUE(contains(env_error("SLUICE_COMM_QQQQQQQQQQQQQQQQ", "3"), "unknown key; docs/config.md"));
  // Variables of launchers and tests.
  for (const char* name :
       {"SLUICE_RANK", "SLUICE_JOB_SECRET_FILE", "SLUICE_TEST_SEED", "SLUICE_", "SLUICEX", "train"})
    EXPECT_EQ(env_error(name, "3"), "no error") << name;
}

TEST(Config, ProcessEnvironmentHasOurVariablesOnly) {
  ::setenv("SLUICE_TEST_OF_CONFIG", "a=b", 1);
  bool found = false;
  for (const auto& [name, value] : process_environment()) {
    EXPECT_TRUE(name.starts_with("SLUICE_")) << name;
    if (name == "SLUICE_TEST_OF_CONFIG") {
      found = true;
      EXPECT_EQ(value, "a=b");
    }
  }
  ::unsetenv("SLUICE_TEST_OF_CONFIG");
  EXPECT_TRUE(found);
}

TEST(Config, ValuesCanBeSetByName) {
  LoadedConfig loaded;
  loaded.set("schedule.num_chunks", "5", {ConfigSource::Kind::kCommandLine, "rank 0"});
  EXPECT_EQ(loaded.config.schedule.num_chunks, 5);
  EXPECT_EQ(loaded.source("schedule.num_chunks").text, "rank 0");
  EXPECT_THROW(loaded.set("schedule.num_chunks", "x", {}), Error);
  EXPECT_THROW(loaded.set("schedule.nope", "1", {}), Error);
  EXPECT_EQ(loaded.config.schedule.num_chunks, 5);
}

// ---- contradictions
// --------------------------------------------------------------------------------------------------

TEST(Config, Contradictions) {
  EXPECT_EQ(error_of("[routing]\ntop_k = 20\n"),
            "routing.top_k 20 (from f.toml:2:9) is more than model.num_experts 16 (from default); a token "
            "cannot visit "
            "more experts than there are");
  EXPECT_TRUE(contains(error_of("[bench]\ntop_k = 3\n", {"model.num_experts=2"}),
                       "bench.top_k 3 (from f.toml:2:9) is more than model.num_experts 2 (from --set)"));
  EXPECT_TRUE(
      begins(error_of("[model]\nzero_experts = 10\n", {"model.copy_experts=6"}),
             "model.zero_experts 10 (from f.toml:2:16) and model.copy_experts 6 (from --set) leave no expert "
             "with weights of model.num_experts 16 (from default)"));
  EXPECT_TRUE(begins(
      error_of("[routing]\naux_loss = 0.01\n"),
      "routing.aux_loss 0.01 (from f.toml:2:12) has no meaning with routing.policy relu (from default)"));
  EXPECT_TRUE(
      begins(error_of(kNothing, {"routing.z_loss=1"}), "routing.z_loss 1 (from --set) has no meaning"));
  EXPECT_EQ(error_of("[routing]\naux_loss = 0.01\npolicy = \"softmax_topk\"\n"), "no error");
  EXPECT_TRUE(contains(error_of("[routing]\naux_loss = 0.01\npolicy = \"sigmoid_topk\"\n"),
                       "has no meaning with routing.policy sigmoid_topk (from f.toml:3:10)"));

  EXPECT_TRUE(
      contains(error_of("[routing]\npolicy = \"moepp\"\nz_loss = 1\n"), "only softmax_topk has this loss"));
  EXPECT_TRUE(
      contains(error_of("[routing]\npolicy = \"bounded_regret\"\nregret_base = \"sigmoid_topk\"\n"
                        "locality_loss = 1\n"),
               "routing.policy bounded_regret (from f.toml:2:10) on routing.regret_base sigmoid_topk"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"node_limited\"\nnum_groups = 3\n"),
                       "model.num_experts 16 (from default) do not divide into routing.num_groups 3"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"node_limited\"\nnum_groups = 4\ntop_groups = 5\n"),
                       "routing.top_groups 5 (from f.toml:4:14) is more than routing.num_groups 4"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"node_limited\"\nnum_groups = 8\ntop_k = 3\n"),
                       "routing.top_k 3 (from f.toml:4:9) is more than the experts of routing.top_groups 1"));
  EXPECT_TRUE(contains(error_of("[model]\nhidden = 40\n[routing]\npolicy = \"etr\"\n"),
                       "model.hidden 40 (from f.toml:2:10) is not a multiple of model.num_experts 16"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"etr\"\netr_switch_off = 0.5\n"),
                       "is less than routing.etr_switch_on 1"));
  EXPECT_TRUE(
      contains(error_of("[model]\ngate_residual = true\nchain_iterations = 2\n"), "model.gate_residual"));
  EXPECT_TRUE(
      begins(error_of("[topology]\nranks = 3\nnodes = \"2x2\"\n"),
             "topology.nodes 2x2 (from f.toml:3:9) names 4 ranks, but topology.ranks 3 (from f.toml:2:9)"));
  EXPECT_TRUE(
      contains(error_of("[routing]\npolicy = \"moepp\"\nz_loss = 1\n"), "only softmax_topk has this loss"));
  EXPECT_TRUE(
      contains(error_of("[routing]\npolicy = \"bounded_regret\"\nregret_base = \"sigmoid_topk\"\n"
                        "locality_loss = 1\n"),
               "routing.policy bounded_regret (from f.toml:2:10) on routing.regret_base sigmoid_topk"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"node_limited\"\nnum_groups = 3\n"),
                       "model.num_experts 16 (from default) do not divide into routing.num_groups 3"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"node_limited\"\nnum_groups = 4\ntop_groups = 5\n"),
                       "routing.top_groups 5 (from f.toml:4:14) is more than routing.num_groups 4"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"node_limited\"\nnum_groups = 8\ntop_k = 3\n"),
                       "routing.top_k 3 (from f.toml:4:9) is more than the experts of routing.top_groups 1"));
  EXPECT_TRUE(contains(error_of("[model]\nhidden = 40\n[routing]\npolicy = \"etr\"\n"),
                       "model.hidden 40 (from f.toml:2:10) is not a multiple of model.num_experts 16"));
  EXPECT_TRUE(contains(error_of("[routing]\npolicy = \"etr\"\netr_switch_off = 0.5\n"),
                       "is less than routing.etr_switch_on 1"));
  EXPECT_TRUE(
      contains(error_of("[model]\ngate_residual = true\nchain_iterations = 2\n"), "model.gate_residual"));
  EXPECT_TRUE(
      begins(error_of("[topology]\nranks = 3\nnodes = 2\n"),
             "topology.ranks 3 (from f.toml:2:9) is not a multiple of topology.nodes 2 (from f.toml:3:9)"));
  EXPECT_EQ(error_of("[topology]\nranks = 4\nnodes = 2\n"), "no error");
  EXPECT_EQ(error_of("[topology]\nranks = 3\nnodes = [[0, 1], [2]]\n"), "no error");

  EXPECT_TRUE(begins(
      error_of("[placement]\nslots_per_rank = [16]\n", {"topology.nodes=2x1"}),
      "placement.slots_per_rank [16] (from f.toml:2:18) lists 1 ranks, but there are 2: topology.nodes "
      "2x1 (from --set)"));
  EXPECT_TRUE(begins(
      error_of("[placement]\nslots_per_rank = [8, 7]\n"),
      "placement.slots_per_rank [8, 7] (from f.toml:2:18) has room for 15 experts, but 16 have weights"));
  EXPECT_EQ(error_of("[placement]\nslots_per_rank = [8, 7]\n", {"model.zero_experts=1"}), "no error");
  EXPECT_TRUE(contains(error_of("[placement]\nslots_per_rank = [8, 9]\n"), "has room for 17 experts"));

  EXPECT_TRUE(begins(error_of("[topology]\nacross_nodes_latency_us = 5\n", {"comm.transport=mpi"}),
                     "topology.across_nodes_latency_us 5 (from f.toml:2:27) declares a link to emulate, but "
                     "comm.transport mpi (from --set)"));
  EXPECT_EQ(error_of("[topology]\nacross_nodes_latency_us = 0\n", {"comm.transport=mpi"}), "no error");
}

TEST(Config, TopologyFromTheConfiguration) {
  Config c = parsed(
      "[topology]\nnodes = [[0, 2], [1]]\nacross_nodes_bytes_per_s = 1e9\nacross_nodes_latency_us = 1.5\n");
  EXPECT_EQ(configured_ranks(c), 3);
  const Topology lists = configured_topology(c, 3);
  EXPECT_EQ(lists.describe(), "3 ranks on 2 nodes: {0,2} {1}");
  EXPECT_TRUE(lists.declared());
  EXPECT_EQ(lists.across_nodes.bytes_per_s, 1e9);
  EXPECT_EQ(lists.across_nodes.latency, std::chrono::nanoseconds(1500));
  EXPECT_FALSE(lists.in_node.limited());
  EXPECT_THROW(configured_topology(c, 4), Error);
  EXPECT_EQ(configured_topology(parsed("[topology]\nnodes = \"2x2\"\n"), 4).num_nodes(), 2);
  EXPECT_EQ(configured_topology(parsed("[topology]\nnodes = 2\n"), 6).num_nodes(), 2);
  EXPECT_THROW(configured_topology(parsed("[topology]\nnodes = 2\n"), 5), Error);
  const Topology discovered = configured_topology(Config(), 5);
  EXPECT_EQ(discovered.num_nodes(), 1);
  EXPECT_FALSE(discovered.declared());
  EXPECT_EQ(configured_ranks(parsed(kNothing, {"topology.ranks=5"})), 5);
  EXPECT_EQ(configured_ranks(Config()), 0);
}

// ---- kinds and hashes
// ------------------------------------------------------------------------------------------------

// A value of the row that is allowed and not its default.
std::string other_value(const schema::Row& row) {
  for (const std::string_view text : row.allowed)
    if (text != row.default_text) return std::string(text);
  for (const char* text : {"false", "true", "3", "0.75", "0.5", "1.5", "[9,9]", "other", "5000"}) {
    Config config;
    try {
      schema::set_from_text(row, config, text, "test");
    } catch (const Error&) {
      continue;
    }
    if (schema::value_text(row, config) != schema::value_text(row, Config())) return text;
  }
  return "";
}

TEST(Config, HashSeesSemanticKeysAndNothingElse) {
  const Config base;
  int semantic = 0;
  int others = 0;
  for (const schema::Row& row : schema::rows()) {
    Config changed;
    const std::string other = other_value(row);
    if (other.empty()) {
      EXPECT_EQ(row.allowed.size(), 1u) << row.key;
      continue;
    }
    schema::set_from_text(row, changed, other, "test");
    EXPECT_NE(schema::value_text(row, changed), schema::value_text(row, base)) << row.key;
    const std::vector<std::string> differing =
        differing_keys(semantic_values(base), semantic_values(changed));
    if (row.kind == schema::Kind::kSemantic) {
      ++semantic;
      EXPECT_NE(semantic_hash(changed), semantic_hash(base)) << row.key;
      EXPECT_EQ(differing, std::vector<std::string>{std::string(row.key)});
      const std::string_view own[] = {row.section()};
      EXPECT_NE(semantic_hash(changed, own), semantic_hash(base, own)) << row.key;
      const std::string_view another[] = {row.section() == "model" ? "train" : "model"};
      EXPECT_EQ(semantic_hash(changed, another), semantic_hash(base, another)) << row.key;
    } else {
      ++others;
      EXPECT_EQ(semantic_hash(changed), semantic_hash(base)) << row.key;
      EXPECT_TRUE(differing.empty()) << row.key;
    }
  }
  EXPECT_GE(semantic, 40);
  EXPECT_GE(others, 9);
  const std::string_view unknown[] = {"nope"};
  EXPECT_THROW(semantic_hash(base, unknown), Error);
}

TEST(Config, DifferingKeysAlsoNamesKeysThatOneSideLacks) {
  const std::vector<KeyValue> a = {{"x.a", "1"}, {"x.b", "2"}};
  const std::vector<KeyValue> b = {{"x.b", "3"}, {"x.c", "4"}};
  EXPECT_EQ(differing_keys(a, b), (std::vector<std::string>{"x.a", "x.b", "x.c"}));
  EXPECT_TRUE(differing_keys(a, a).empty());
}

TEST(Config, AgreedValuesTravelAsTexts) {
  const Config rank0 =
      parsed(kNothing, {"schedule.policy=pipelined", "schedule.num_chunks=7", "schedule.exchange=direct"});
  LoadedConfig mine;
  for (const KeyValue& entry : agreed_values(rank0))
    mine.set(entry.key, entry.value, {ConfigSource::Kind::kCommandLine, "rank 0"});
  EXPECT_EQ(agreed_values(mine.config), agreed_values(rank0));
  EXPECT_EQ(mine.config.schedule.policy, Config::Schedule::Policy::kPipelined);
}

// ---- the table, printing, documentation
// ------------------------------------------------------------------------------

TEST(ConfigSchema, RowsAreWellFormed) {
  std::vector<std::string_view> keys;
  for (const schema::Row& row : schema::rows()) {
    EXPECT_EQ(std::count(keys.begin(), keys.end(), row.key), 0) << row.key;
    keys.push_back(row.key);
    EXPECT_EQ(std::count(row.key.begin(), row.key.end(), '.'), 1) << row.key;
    EXPECT_FALSE(row.doc.empty()) << row.key;
    EXPECT_EQ(schema::find(row.key), &row);
    EXPECT_EQ(std::holds_alternative<schema::EnumMember>(row.member) && row.allowed.empty(), false)
        << row.key;
    bool section_known = false;
    for (const schema::Section& section : schema::sections()) section_known |= section.name == row.section();
    EXPECT_TRUE(section_known) << row.key;
  }
  EXPECT_EQ(schema::find("model.nope"), nullptr);
}

// Two rows must not share a member: changing one must leave all others.
TEST(ConfigSchema, EveryRowHasAMemberOfItsOwn) {
  for (const schema::Row& row : schema::rows()) {
    const std::string other = other_value(row);
    if (other.empty()) continue;
    Config changed;
    schema::set_from_text(row, changed, other, "test");
    for (const schema::Row& rest : schema::rows()) {
      if (&rest == &row) continue;
      EXPECT_EQ(schema::value_text(rest, changed), schema::value_text(rest, Config())) << rest.key;
    }
  }
}

TEST(ConfigSchema, DidYouMean) {
  const std::string_view words[] = {"steps", "seed", "learning_rate"};
  EXPECT_EQ(schema::did_you_mean("stpes", words), "steps");
  EXPECT_EQ(schema::did_you_mean("step", words), "steps");
  EXPECT_EQ(schema::did_you_mean("learningrate", words), "learning_rate");
  EXPECT_EQ(schema::did_you_mean("rate", words), "");
  EXPECT_EQ(schema::did_you_mean("", words), "");
  EXPECT_EQ(schema::did_you_mean("stpes", words, 0), "");
  EXPECT_EQ(schema::did_you_mean("stpes", {}), "");
}

TEST(ConfigSchema, QuotedIsOneShortLine) {
  EXPECT_EQ(schema::quoted("a\nb\x01"), "\"a\\nb?\"");
  EXPECT_EQ(schema::quoted(std::string(100, 'a')), "\"" + std::string(60, 'a') + "...\"");
  EXPECT_EQ(schema::quoted(std::string(59, 'a') + "\xc3\xa9"), "\"" + std::string(59, 'a') + "...\"");
}

TEST(Config, EffectiveTextLoadsBackToTheSameValues) {
  // Every key away from its default, as far as keys agree with each other.
  Sets sets;
  for (const schema::Row& row : schema::rows())
    if (const std::string other = other_value(row);
        !other.empty() && row.section() != "topology" && row.section() != "placement")
      sets.push_back(str(row.key, "=", other));
  const LoadedConfig loaded = [&] {
    LoadedConfig out;
    for (const std::string& set : sets) {
      const std::size_t equals = set.find('=');
      out.set(set.substr(0, equals), set.substr(equals + 1), {ConfigSource::Kind::kCommandLine, "--set"});
    }
    out.set("train.text", "q\"uo\\te\tand \xc3\xa9", {ConfigSource::Kind::kFile, "odd\nname:1:2"});
    out.set("topology.nodes", "[[0, 1], [2]]", {});
    out.set("placement.slots_per_rank", "[8, 7, 1]", {});
    out.set("model.zero_experts", "0", {});
    out.set("model.copy_experts", "0", {});
    out.set("model.constant_experts", "0", {});
    out.set("model.num_experts", "16", {});
    out.set("model.gate_residual", "false", {});
    out.set("routing.policy", "softmax_topk", {});
    return out;
  }();
  const std::string text = effective_text(loaded);
  EXPECT_TRUE(contains(text, "  # --set\n"));
  const Config again = parsed(text);
  for (const schema::Row& row : schema::rows())
    EXPECT_EQ(schema::value_text(row, again), schema::value_text(row, loaded.config)) << row.key;
  for (const char* nodes : {"2x2", "4", "0"}) {
    LoadedConfig other;
    other.set("topology.nodes", nodes, {});
    EXPECT_EQ(parsed(effective_text(other)).topology.nodes, other.config.topology.nodes) << nodes;
  }
}

TEST(Config, EffectiveJsonHasValuesWithTypesAndSources) {
  const LoadedConfig loaded =
      parse_config("[topology]\nnodes = [[0],[1]]\n", "f.toml", Sets{"train.learning_rate=0.1"}, {});
  const nlohmann::json json = nlohmann::json::parse(effective_json(loaded));
  EXPECT_EQ(json["model"]["hidden"]["value"], 64);
  EXPECT_EQ(json["model"]["hidden"]["source"], "default");
  EXPECT_EQ(json["train"]["learning_rate"]["value"], 0.1);
  EXPECT_EQ(json["train"]["learning_rate"]["source"], "--set");
  EXPECT_EQ(json["topology"]["nodes"]["value"], nlohmann::json::parse("[[0],[1]]"));
  EXPECT_EQ(json["topology"]["nodes"]["source"], "f.toml:2:9");
  EXPECT_EQ(json["routing"]["renormalize"]["value"], true);
  EXPECT_EQ(json["routing"]["policy"]["value"], "relu");
  EXPECT_EQ(json["placement"]["slots_per_rank"]["value"], nlohmann::json::array());
}

TEST(Config, JsonSchemaDescribesEveryKey) {
  const nlohmann::json json = nlohmann::json::parse(config_json_schema());
  EXPECT_EQ(json["additionalProperties"], false);
  for (const schema::Row& row : schema::rows()) {
    const auto& section = json["properties"][std::string(row.section())];
    EXPECT_EQ(section["additionalProperties"], false);
    const auto& key = section["properties"][std::string(row.name())];
    EXPECT_EQ(key["description"], std::string(row.doc)) << row.key;
    EXPECT_TRUE(key.contains("default")) << row.key;
  }
  const auto& model = json["properties"]["model"]["properties"];
  EXPECT_EQ(model["hidden"]["type"], "integer");
  EXPECT_EQ(model["hidden"]["minimum"], 1);
  EXPECT_EQ(model["hidden"]["maximum"], 65536);
  EXPECT_EQ(model["activation"]["enum"], nlohmann::json::parse(R"(["swiglu","gelu","relu"])"));
  EXPECT_EQ(json["properties"]["train"]["properties"]["beta1"]["exclusiveMaximum"], 1.0);
}

TEST(Config, DocumentationIsNotStale) {
  std::ifstream file(std::string(SLUICE_SOURCE_DIR) + "/docs/config.md", std::ios::binary);
  ASSERT_TRUE(file)
      << "docs/config.md is missing; write it with: build/release/sluice config --doc > docs/config.md";
  std::stringstream content;
  content << file.rdbuf();
  EXPECT_TRUE(content.str() == config_markdown())
      << "docs/config.md is stale; write it again with: build/release/sluice config --doc > docs/config.md";
}

}  // namespace
}  // namespace sluice
