// The rendezvous: values come together, who is missing is named, and strangers do not get in the way.
#include "sluice/comm/rendezvous.hpp"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <thread>

namespace sluice::comm {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

const Secret& secret() {
  static const Secret s = Secret::from_text("0123456789abcdef", "test");
  return s;
}

class RendezvousTest : public ::testing::Test {
 protected:
  void serve(std::int32_t num_ranks) {
    server_ = std::make_unique<RendezvousServer>(
        RendezvousServer::Options{.address = "127.0.0.1", .port = 0, .num_ranks = num_ranks, .job = 5},
        secret());
  }
  Rendezvous::Options options(std::int32_t rank, std::int32_t num_ranks, seconds span = seconds(10)) {
    return {.host = "127.0.0.1",
            .port = server_->port(),
            .job = 5,
            .group = 0,
            .rank = rank,
            .num_ranks = num_ranks,
            .who = "host h, pid " + std::to_string(100 + rank),
            .deadline = Clock::now() + span,
            .retry = true};
  }
  // A stranger's plain connection.
  int connect_raw() {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(server_->port());
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    return fd;
  }
  // All ranks join, exchange and leave.
  void expect_works(std::int32_t num_ranks, std::uint32_t group = 0) {
    std::vector<std::thread> threads;
    for (std::int32_t r = 0; r < num_ranks; ++r)
      threads.emplace_back([&, r] {
        try {
          Rendezvous::Options o = options(r, num_ranks);
          o.group = group;
          Rendezvous rendezvous(o, secret());
          for (const std::string prefix : {"a/", "b/"}) {
            rendezvous.put(prefix + std::to_string(r), prefix + std::string(static_cast<std::size_t>(r), 'x'),
                           o.deadline);
            const auto all = rendezvous.gather(prefix, o.deadline);
            for (std::size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], prefix + std::string(i, 'x'));
          }
          EXPECT_EQ(rendezvous.own_address(), "127.0.0.1");
          rendezvous.leave();
        } catch (const Error& e) {
          ADD_FAILURE() << e.what();
        }
      });
    for (auto& t : threads) t.join();
  }
  std::unique_ptr<RendezvousServer> server_;
};

template <typename Call>
Status status_of(Call call) {
  try {
    call();
  } catch (const Error& e) {
    return e.status();
  }
  return {};
}

TEST_F(RendezvousTest, ValuesComeTogether) {
  serve(5);
  expect_works(5);
  expect_works(5, 1);  // a second group of the same job
}

TEST_F(RendezvousTest, WhoIsMissingIsNamed) {
  serve(3);
  Rendezvous r0(options(0, 3), secret()), r1(options(1, 3), secret());
  r0.put("card/0", "x", Clock::now() + seconds(5));
  const auto begin = Clock::now();
  const Status s = status_of([&] { (void)r0.gather("card/", Clock::now() + milliseconds(300)); });
  EXPECT_EQ(s.code, ErrorCode::kTimeout);
  EXPECT_NE(s.message.find("rank 2 never came"), std::string::npos) << s.message;
  EXPECT_NE(s.message.find("rank 1 (host h, pid 101) came but"), std::string::npos) << s.message;
  EXPECT_LT(Clock::now() - begin, seconds(3));
}

TEST_F(RendezvousTest, WhoLeavesIsNamed) {
  serve(3);
  Rendezvous r0(options(0, 3), secret());
  auto r1 = std::make_unique<Rendezvous>(options(1, 3), secret());
  std::thread leaver([&] {
    std::this_thread::sleep_for(milliseconds(100));
    r1.reset();
  });
  const auto begin = Clock::now();
  const Status s = status_of([&] { (void)r0.gather("card/", Clock::now() + seconds(10)); });
  leaver.join();
  EXPECT_EQ(s.code, ErrorCode::kPeerLost);
  EXPECT_NE(s.message.find("rank 1 (host h, pid 101) left"), std::string::npos) << s.message;
  EXPECT_LT(Clock::now() - begin, seconds(5));
}

TEST_F(RendezvousTest, OthersAreRefused) {
  serve(2);
  const Secret wrong = Secret::from_text("fedcba9876543210", "test");
  Status s = status_of([&] { Rendezvous(options(0, 2), wrong); });
  EXPECT_EQ(s.code, ErrorCode::kDisagreement);
  EXPECT_NE(s.message.find("secret"), std::string::npos) << s.message;
  EXPECT_EQ(s.message.find(wrong.reveal()), std::string::npos);
  auto o = options(0, 2);
  o.job = 6;
  s = status_of([&] { Rendezvous(o, secret()); });
  EXPECT_NE(s.message.find("another job"), std::string::npos) << s.message;
  s = status_of([&] { Rendezvous(options(2, 2), secret()); });
  EXPECT_NE(s.message.find("no rank of this job"), std::string::npos) << s.message;
  s = status_of([&] { Rendezvous(options(0, 3), secret()); });
  EXPECT_EQ(s.code, ErrorCode::kInvalidConfig);
  EXPECT_NE(s.message.find("3 ranks"), std::string::npos) << s.message;
  // Rank 0 came, with another size; its place is taken.
  s = status_of([&] { Rendezvous(options(0, 2), secret()); });
  EXPECT_NE(s.message.find("there already"), std::string::npos) << s.message;
}

TEST_F(RendezvousTest, NobodyThere) {
  serve(1);
  auto o = options(0, 1, seconds(1));
  server_.reset();
  const Status s = status_of([&] { Rendezvous(o, secret()); });
  EXPECT_EQ(s.code, ErrorCode::kTimeout);
  EXPECT_NE(s.message.find("cannot reach"), std::string::npos) << s.message;
}

TEST_F(RendezvousTest, StrangersDoNotGetInTheWay) {
  constexpr std::uint32_t kSeed = 7;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  serve(3);
  std::mt19937 random(kSeed);
  std::vector<int> silent;
  for (int i = 0; i < 300; ++i) silent.push_back(connect_raw());  // more than may be pending
  for (int i = 0; i < 50; ++i) {
    const int fd = connect_raw();
    std::vector<unsigned> noise(1 + random() % 2000);
    for (unsigned& n : noise) n = random();
    (void)!::send(fd, noise.data(), noise.size() * sizeof(unsigned), MSG_NOSIGNAL);
    ::close(fd);
  }
  expect_works(3);
  for (const int fd : silent) ::close(fd);
}

TEST_F(RendezvousTest, AMemberThatBreaksTheRulesIsOut) {
  serve(2);
  Rendezvous r0(options(0, 2), secret());
  const net::Fd bad = net::dial({.host = "127.0.0.1",
                                 .port = server_->port(),
                                 .secret = &secret(),
                                 .job = 5,
                                 .purpose = wire::Purpose::kRendezvous,
                                 .rank = 1,
                                 .epoch = 0,
                                 .deadline = Clock::now() + seconds(5),
                                 .retry = true,
                                 .to_whom = "the rendezvous"});
  const std::uint32_t huge = 0x7fffffff;
  ASSERT_EQ(::send(bad.get(), &huge, sizeof huge, MSG_NOSIGNAL), 4);
  const Status s = status_of([&] { (void)r0.gather("card/", Clock::now() + seconds(10)); });
  EXPECT_EQ(s.code, ErrorCode::kPeerLost);
  EXPECT_NE(s.message.find("rank 1"), std::string::npos) << s.message;
}

}  // namespace
}  // namespace sluice::comm
