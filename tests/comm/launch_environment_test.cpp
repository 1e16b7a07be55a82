// Which rank this is, by the variables of each launcher; what is said when they make no sense.
#include "sluice/comm/launch_environment.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>

#include "sluice/base/error.hpp"

namespace sluice::comm {
namespace {

namespace fs = std::filesystem;

LaunchInfo detect(const std::map<std::string, std::string>& variables, const std::string& rendezvous = "",
                  const std::string& secret_file = "") {
  return detect_launch(
      [&](const char* name) -> std::optional<std::string> {
        const auto found = variables.find(name);
        return found == variables.end() ? std::nullopt : std::optional(found->second);
      },
      rendezvous, secret_file);
}

template <typename Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidConfig);
    return e.message();
  }
  return "";
}

class Folder {
 public:
  Folder() {
    char name[] = "/tmp/sluice_launch_XXXXXX";
    path_ = mkdtemp(name);
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path path_;
};

std::string secret_file(const Folder& folder, mode_t mode, const std::string& text = "0123456789abcdef") {
  const fs::path path = folder.path_ / "secret";
  std::ofstream(path) << text << "\n";
  chmod(path.c_str(), mode);
  return path;
}

TEST(LaunchEnvironment, RanksOfOneHostMeetInAFolderThatIsThere) {
  const Folder folder;
  std::map<std::string, std::string> variables = {{"SLURM_PROCID", "1"},
                                                  {"SLURM_STEP_ID", "0"},
                                                  {"SLURM_STEP_NUM_TASKS", "2"},
                                                  {"SLURM_STEP_NUM_NODES", "1"},
                                                  {"XDG_RUNTIME_DIR", folder.path_.string()}};
  EXPECT_EQ(detect(variables).meeting_file.parent_path().parent_path(), folder.path_);
  // Of the host that the job was sent from.
  variables["XDG_RUNTIME_DIR"] = (folder.path_ / "of another host").string();
  EXPECT_EQ(detect(variables).meeting_file.parent_path().parent_path(), "/tmp");
}

TEST(LaunchEnvironment, WhoStartedThisProcess) {
  const auto launched = [](const std::map<std::string, std::string>& variables) {
    return launched_as([&](const char* name) -> std::optional<std::string> {
      const auto found = variables.find(name);
      return found == variables.end() ? std::nullopt : std::optional(found->second);
    });
  };
  EXPECT_FALSE(launched({}).has_value());
  EXPECT_FALSE(launched({{"RANK", "1"}, {"WORLD_SIZE", "2"}}).has_value());
  // Neither address nor secret is asked for.
  const auto alone = launched({{"SLUICE_LAUNCH_RANK", "2"}, {"SLUICE_LAUNCH_SIZE", "4"}});
  ASSERT_TRUE(alone.has_value());
  EXPECT_EQ(alone->launcher, "sluice launch");
  EXPECT_EQ(alone->rank, 2);
  EXPECT_EQ(alone->num_ranks, 4);
  const auto far = launched({{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}});
  ASSERT_TRUE(far.has_value());
  EXPECT_EQ(far->launcher, "mpirun");
  EXPECT_EQ(far->num_ranks, 2);
}

TEST(LaunchEnvironment, SluiceLaunch) {
  const LaunchInfo info = detect({{"SLUICE_LAUNCH_RANK", "2"},
                                  {"SLUICE_LAUNCH_SIZE", "4"},
                                  {"SLUICE_LAUNCH_RENDEZVOUS", "127.0.0.1:4711"},
                                  {"SLUICE_LAUNCH_JOB", "j"},
                                  {"SLUICE_LAUNCH_SECRET", "0123456789abcdef"},
                                  {"OMPI_COMM_WORLD_RANK", "0"}});
  EXPECT_EQ(info.launcher, "sluice launch");
  EXPECT_EQ(info.rank, 2);
  EXPECT_EQ(info.num_ranks, 4);
  EXPECT_EQ(info.host, "127.0.0.1");
  EXPECT_EQ(info.port, 4711);
  EXPECT_FALSE(info.serves);
  EXPECT_TRUE(info.secret);
}

TEST(LaunchEnvironment, TorchrunOnOneHostAndOnSeveral) {
  std::map<std::string, std::string> v = {{"RANK", "0"},
                                          {"WORLD_SIZE", "2"},
                                          {"MASTER_ADDR", "a"},
                                          {"MASTER_PORT", "29500"},
                                          {"LOCAL_WORLD_SIZE", "2"}};
  const LaunchInfo one = detect(v);
  EXPECT_EQ(one.launcher, "torchrun");
  EXPECT_TRUE(one.serves);
  EXPECT_FALSE(one.meeting_file.empty());
  v["LOCAL_WORLD_SIZE"] = "1";
  EXPECT_NE(error_of([&] { detect(v); }).find("comm.secret_file"), std::string::npos);
  const Folder folder;
  const std::string file = secret_file(folder, 0600);
  EXPECT_EQ(detect(v, "", file).host, "a");
  EXPECT_EQ(detect(v, "", file).port, 29500);
  v["TORCHELASTIC_USE_AGENT_STORE"] = "True";
  EXPECT_EQ(detect(v, "", file).port, 29501);
  v["RANK"] = "2";
  EXPECT_NE(error_of([&] { detect(v, "", file); }).find("rank 2 of 2"), std::string::npos);
}

TEST(LaunchEnvironment, Mpirun) {
  std::map<std::string, std::string> v = {{"OMPI_COMM_WORLD_RANK", "1"},
                                          {"OMPI_COMM_WORLD_SIZE", "2"},
                                          {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                                          {"PMIX_NAMESPACE", "123"}};
  const LaunchInfo one = detect(v);
  EXPECT_EQ(one.launcher, "mpirun");
  EXPECT_FALSE(one.serves);
  EXPECT_FALSE(one.meeting_file.empty());
  v["PMIX_NAMESPACE"] = "124";
  EXPECT_NE(detect(v).meeting_file, one.meeting_file) << "another job";
  v["OMPI_COMM_WORLD_LOCAL_SIZE"] = "1";
  EXPECT_NE(error_of([&] { detect(v); }).find("comm.rendezvous"), std::string::npos);
  const Folder folder;
  const LaunchInfo two = detect(v, "host:77", secret_file(folder, 0600));
  EXPECT_EQ(two.host, "host");
  EXPECT_EQ(two.port, 77);
}

TEST(LaunchEnvironment, Srun) {
  std::map<std::string, std::string> v = {{"SLURM_PROCID", "3"},         {"SLURM_NTASKS", "4"},
                                          {"SLURM_JOB_ID", "9"},         {"SLURM_STEP_ID", "0"},
                                          {"SLURM_STEP_NUM_NODES", "2"}, {"SLURM_STEP_NODELIST", "n[07-08]"}};
  const Folder folder;
  const LaunchInfo info = detect(v, "", secret_file(folder, 0600));
  EXPECT_EQ(info.launcher, "srun");
  EXPECT_EQ(info.rank, 3);
  EXPECT_EQ(info.host, "n07");
  EXPECT_GE(info.port, 20000);
  v["SLURM_STEP_NUM_NODES"] = "1";
  EXPECT_FALSE(detect(v).meeting_file.empty());
  EXPECT_EQ(first_host("a,b"), "a");
  EXPECT_EQ(first_host("a"), "a");
  EXPECT_EQ(first_host("n[3,7-9]-ib,m1"), "n3-ib");
  EXPECT_EQ(first_host("n["), "");
}

TEST(LaunchEnvironment, NoLauncher) {
  EXPECT_NE(error_of([] { detect({}); }).find("sluice launch"), std::string::npos);
  EXPECT_NE(error_of([] {
              detect({{"SLUICE_LAUNCH_RANK", "x"}});
            }).find("SLUICE_LAUNCH_RANK"),
            std::string::npos);
  EXPECT_NE(error_of([] {
              detect({{"SLUICE_LAUNCH_RANK", "0"}});
            }).find("SLUICE_LAUNCH_SIZE"),
            std::string::npos);
}

TEST(LaunchEnvironment, SecretFiles) {
  const Folder folder;
  EXPECT_NE(error_of([&] { Secret::from_file(secret_file(folder, 0644)); }).find("chmod 600"),
            std::string::npos);
  EXPECT_NE(error_of([&] { Secret::from_file(secret_file(folder, 0600, "short")); }).find("5 bytes"),
            std::string::npos);
  EXPECT_NE(error_of([&] { Secret::from_file(folder.path_ / "none"); }).find("none"), std::string::npos);
  EXPECT_NE(error_of([&] { Secret::from_file(folder.path_); }).find("regular"), std::string::npos);
  EXPECT_EQ(Secret::from_file(secret_file(folder, 0600)).reveal(), "0123456789abcdef");
  EXPECT_NE(Secret::random().reveal(), Secret::random().reveal());
}

TEST(LaunchEnvironment, MeetingFiles) {
  const Folder folder;
  const fs::path path = folder.path_ / "mine" / "job-1";
  EXPECT_FALSE(read_meeting_file(path));
  write_meeting_file(path, {77, "0123456789abcdef"});
  const auto read = read_meeting_file(path);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->port, 77);
  EXPECT_EQ(read->secret, "0123456789abcdef");
  write_meeting_file(path, {78, "another of sixteen"});
  EXPECT_EQ(read_meeting_file(path)->port, 78) << "an older file is replaced";
  chmod(path.c_str(), 0644);
  EXPECT_FALSE(read_meeting_file(path)) << "others could have written it";
  std::ofstream(path) << "78\nhalf";
  chmod(path.c_str(), 0600);
  EXPECT_FALSE(read_meeting_file(path));
  chmod((folder.path_ / "mine").c_str(), 0755);
  EXPECT_NE(error_of([&] {
              write_meeting_file(path, {1, "0123456789abcdef"});
            }).find("0700"),
            std::string::npos);
}

}  // namespace
}  // namespace sluice::comm
