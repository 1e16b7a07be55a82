// Rows between GPUs. Ranks are processes or threads with a GPU each; what needs more GPUs than there are skips and says so.
//
// SLUICE_TEST_PLANS: how many random plans (default 1,000).
#include <signal.h>

#include <chrono>
#include <cstdlib>
#include <thread>

#include "exchange_harness.hpp"

namespace sluice::comm::cuda {
namespace {

using namespace std::chrono_literals;
using gpu_ranks::Rank;

constexpr int kExperts = 11;

int devices() {
  static const int count = gpu_ranks::count_devices();
  return count;
}
ExchangeShape small_shape(std::int64_t hidden = 72) {
  ExchangeShape shape;
  shape.max_tokens = 45;
  shape.hidden = hidden;
  shape.num_local_slots = kExperts;
  shape.chunk_rows = 4;
  shape.deadline = 20s;
  return shape;
}
// Runs the body as processes on GPUs of their own, or as threads. Each rank's failures fail the test.
enum class As { kProcesses, kThreads };
void run(As as, int ranks, const std::function<void(Rank&)>& body, std::chrono::seconds deadline = 120s) {
  const auto rank_body = [&](Rank& rank) {
    rank.use_device();
    body(rank);
    rank.barrier();
    return testing::Test::HasFailure() ? 1 : 0;
  };
  const auto results = as == As::kProcesses ? gpu_ranks::run_processes(ranks, rank_body, deadline)
                                            : gpu_ranks::run_threads(ranks, rank_body);
  for (std::size_t r = 0; r < results.size(); ++r) EXPECT_EQ(results[r], 0) << "rank " << r;
}
// Each test forks, so it must not have touched CUDA before: ctest runs every test of this program on its own.
#define NEED_DEVICES(n) \
  if (devices() < (n)) GTEST_SKIP() << "needs " << (n) << " GPUs, there are " << devices()

MoverOptions small_movers(unsigned seed) {
  return {1 + static_cast<int>(seed % 3), static_cast<int>(seed / 3 % 3)};
}

// One pass over a batch: dispatch in several ways, combine, compare with the CPU.
void pass(Rank& rank, RowExchange& exchange, Endpoint& end, const Batch& batch, unsigned seed) {
  const auto me = static_cast<std::size_t>(rank.rank);
  end.put(batch.routing[me], batch.x[me]);
  end.poison();
  end.plan();
  end.dispatch(small_movers(seed), seed % 2 == 0);
  end.sync();
  end.expect_received(batch);
  end.expect_expert_rows(batch);
  if (seed % 2 == 0) end.expect_tiles(batch);
  end.compute(batch);
  if (seed % 5 == 4) {  // in two halves
    exchange.push_results(0, end.outputs(), small_movers(seed), end.stream);
    const std::int64_t middle = end.tokens() / 2;
    exchange.sum_at_home(0, end.send_plan(), end.outputs(), end.y_array().data(), exchange.shape().hidden, 0,
                         middle, false, {1, 2}, end.stream);
    exchange.sum_at_home(0, end.send_plan(), end.outputs(), end.y_array().data(), exchange.shape().hidden,
                         middle, end.tokens(), true, {1, 0}, end.stream);
  } else {
    end.combine(small_movers(seed / 2));
  }
  end.sync();
  end.expect_y(batch);
}

void random_plans(Rank& rank, int plans, Link link, PeerPath path, bool integers, std::int64_t hidden = 72) {
  std::unique_ptr<NcclCommunicator> nccl;
  if (link == Link::kNccl || path == PeerPath::kNccl)
    nccl = std::make_unique<NcclCommunicator>(rank.bootstrap(), 60s, path == PeerPath::kNccl);
  {
    RowExchange exchange(rank.bootstrap(), small_shape(hidden), link, path, nccl.get());
    Endpoint end(exchange, 0, kExperts);
    for (int i = 0; i < plans && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE(testing::Message() << "plan " << i << " rank " << rank.rank);
      const auto seed = static_cast<unsigned>(i);
      pass(rank, exchange, end,
           draw_batch(seed, rank.num_ranks, exchange.shape().max_tokens, exchange.shape().hidden, kExperts,
                      integers),
           seed);
    }
    rank.barrier();
  }
  rank.barrier();
}
// Each plan's results by reads, twice, and by stores: the same bits every time, and the rows that are read stay as they are.
void random_pulls(Rank& rank, int plans, bool integers, std::int64_t hidden = 72) {
  {
    RowExchange exchange(rank.bootstrap(), small_shape(hidden));
    Endpoint end(exchange, 0, kExperts);
    const auto me = static_cast<std::size_t>(rank.rank);
    for (int i = 0; i < plans && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE(testing::Message() << "plan " << i << " rank " << rank.rank);
      const auto seed = static_cast<unsigned>(i);
      const Batch batch = draw_batch(seed + 20000, rank.num_ranks, exchange.shape().max_tokens,
                                     exchange.shape().hidden, kExperts, integers);
      end.put(batch.routing[me], batch.x[me]);
      end.poison();
      end.plan();
      end.dispatch(small_movers(seed));
      end.sync();
      end.compute(batch);
      const auto rows = end.reduced_rows(batch);
      for (int again = 0; again < 2; ++again) {
        if (again == 0) end.put_results(rows);
        end.poison_y();
        end.combine_by_pull(static_cast<int>(seed % 4));
        end.sync();
        end.expect_y(batch);
      }
      end.expect_results(rows);
      rank.barrier();       // the next pass may write there
      if (seed % 3 == 0) {  // movers may change from pass to pass
        end.poison_y();
        end.combine(small_movers(seed / 3));
        end.sync();
        end.expect_y(batch);
      }
    }
    rank.barrier();
  }
  rank.barrier();
}
int num_plans() {
  const char* wanted = std::getenv("SLUICE_TEST_PLANS");
  return wanted != nullptr ? std::atoi(wanted) : 1000;
}

TEST(RowExchange, ThousandRandomPlansBetweenProcesses) {
  NEED_DEVICES(2);
  run(
      As::kProcesses, 2,
      [](Rank& rank) { random_plans(rank, num_plans(), Link::kNvlink, PeerPath::kBest, true); }, 300s);
}
TEST(RowExchange, RandomPlansBetweenThreadsOfOneProcess) {
  NEED_DEVICES(2);
  run(As::kThreads, 2, [](Rank& rank) {
    random_plans(rank, std::min(60, num_plans()), Link::kNvlink, PeerPath::kBest, false);
  });
}
TEST(RowExchange, ThousandRandomPlansByPull) {
  NEED_DEVICES(2);
  run(
      As::kProcesses, 2, [](Rank& rank) { random_pulls(rank, num_plans(), true); }, 300s);
}
TEST(RowExchange, RandomPullsBetweenThreadsOfOneProcess) {
  NEED_DEVICES(2);
  run(As::kThreads, 2, [](Rank& rank) { random_pulls(rank, std::min(60, num_plans()), false); });
}
// Rows that warps share: whole pieces and a rest.
TEST(RowExchange, RandomPlansOfWideRows) {
  NEED_DEVICES(2);
  run(As::kThreads, 2, [](Rank& rank) {
    random_plans(rank, std::min(30, num_plans()), Link::kNvlink, PeerPath::kBest, false, 2312);
    random_pulls(rank, std::min(30, num_plans()), false, 2312);
  });
}
TEST(RowExchange, OneRank) {
  NEED_DEVICES(1);
  run(As::kThreads, 1, [](Rank& rank) {
    random_plans(rank, std::min(25, num_plans()), Link::kNvlink, PeerPath::kBest, true);
    random_pulls(rank, std::min(25, num_plans()), true);
  });
}
TEST(RowExchange, AsManyRanksAsGpus) {
  NEED_DEVICES(3);
  for (const int ranks : {3, std::min(8, devices())})
    run(As::kProcesses, ranks, [](Rank& rank) {
      random_plans(rank, std::min(200, num_plans()), Link::kNvlink, PeerPath::kBest, true);
      random_pulls(rank, std::min(200, num_plans()), true);
    });
}
TEST(RowExchange, WindowsOfNccl) {
  NEED_DEVICES(2);
  std::string why;
  if (!nccl_available(&why)) GTEST_SKIP() << why;
  constexpr int kNoWindow = 77;  // NCCL gives none on this machine: CUDA IPC is what there is
  const auto results = gpu_ranks::run_processes(
      2,
      [](Rank& rank) {
        rank.use_device();
        try {
          random_plans(rank, std::min(40, num_plans()), Link::kNvlink, PeerPath::kNccl, false);
        } catch (const Error& e) {
          std::fprintf(stderr, "rank %d: %s\n", rank.rank, e.what());
          return e.code() == ErrorCode::kNotSupported ? kNoWindow : 1;
        }
        return testing::Test::HasFailure() ? 1 : 0;
      },
      120s);
  if (results[0] == kNoWindow && results[1] == kNoWindow)
    GTEST_SKIP() << "NCCL gives no window between these GPUs";
  for (const int result : results) EXPECT_EQ(result, 0);
}
TEST(RowExchange, NcclSendAndReceive) {
  NEED_DEVICES(2);
  std::string why;
  if (!nccl_available(&why)) GTEST_SKIP() << why;
  run(As::kProcesses, 2,
      [](Rank& rank) { random_plans(rank, std::min(60, num_plans()), Link::kNccl, PeerPath::kBest, true); });
}
// NCCL sees two hosts: sockets, no shared memory, no peer access.
TEST(RowExchange, NcclBetweenTwoPretendedHosts) {
  NEED_DEVICES(2);
  std::string why;
  if (!nccl_available(&why)) GTEST_SKIP() << why;
  run(As::kProcesses, 2, [](Rank& rank) {
    setenv("NCCL_HOSTID", rank.rank == 0 ? "pretended-host-0" : "pretended-host-1", 1);
    setenv("NCCL_P2P_DISABLE", "1", 1);
    setenv("NCCL_SHM_DISABLE", "1", 1);
    setenv("NCCL_IB_DISABLE", "1", 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 1);
    random_plans(rank, std::min(20, num_plans()), Link::kNccl, PeerPath::kBest, false);
  });
}

// The same values through stores, copy engines and NCCL: the same bits, also where sums are not exact.
TEST(RowExchange, AllMoversGiveTheSameBits) {
  NEED_DEVICES(2);
  std::string why;
  if (!nccl_available(&why)) GTEST_SKIP() << why;
  run(As::kProcesses, 2, [](Rank& rank) {
    NcclCommunicator nccl(rank.bootstrap(), 60s);
    {
      RowExchange stores(rank.bootstrap(), small_shape()),
          messages(rank.bootstrap(), small_shape(), Link::kNccl, PeerPath::kBest, &nccl);
      Endpoint a(stores, 0, kExperts), b(messages, 0, kExperts);
      const auto me = static_cast<std::size_t>(rank.rank);
      for (unsigned seed = 0; seed < 20; ++seed) {
        const Batch batch = draw_batch(seed + 5000, 2, 45, 72, kExperts, false);
        std::vector<std::vector<std::uint16_t>> results;
        for (Endpoint* end : {&a, &b}) {
          end->put(batch.routing[me], batch.x[me]);
          end->poison();
          end->plan();
          end->dispatch({2, 2});
          end->sync();
          end->compute(batch);
          end->combine({2, 2});
          end->sync();
          results.push_back(end->y());
        }
        EXPECT_EQ(results[0], results[1]) << "seed " << seed;
        // Copy engines: rows of others, and one row a receive list entry back.
        const auto counts = stores.host_counts(0, a.stream);
        std::vector<std::uint16_t> wiped(static_cast<std::size_t>(stores.shape().max_received * 72), 0x7FFF);
        cudaMemcpy(const_cast<void*>(stores.received(0)), wiped.data(), wiped.size() * 2,
                   cudaMemcpyHostToDevice);
        cudaStreamSynchronize(cudaStreamLegacy);
        rank.barrier();
        a.dispatch_by_copy(counts);
        a.sync();
        a.expect_received(batch);
        // By choice, and differently: rank 0 has no processors for it.
        cudaMemcpy(const_cast<void*>(stores.received(0)), wiped.data(), wiped.size() * 2,
                   cudaMemcpyHostToDevice);
        cudaStreamSynchronize(cudaStreamLegacy);
        rank.barrier();
        const MoverChoice choice =
            a.dispatch_by_choice(rank.rank == 0 ? &counts : nullptr, rank.rank == 0 ? 0 : 2);
        EXPECT_EQ(choice.mover, rank.rank == 0 ? Mover::kCopyEngines : Mover::kStores);
        a.sync();
        a.expect_received(batch);
        const auto list = a.expected_list(batch);
        std::vector<std::uint16_t> partial(wiped.size(), 0);
        for (std::size_t row = 0; row < list.size(); ++row)
          for (std::size_t h = 0; h < 72; ++h)
            partial[row * 72 + h] =
                expert_value(rank.rank, batch.x[static_cast<std::size_t>(list[row].first)]
                                               [static_cast<std::size_t>(list[row].second) * 72 + h]);
        a.partial().put(partial);
        std::vector<std::vector<std::uint16_t>> homes;
        for (int way = 0; way < 6; ++way) {
          if (way == 5) a.put_results(partial);
          a.poison();
          rank.barrier();
          const CombineSource source{a.partial().data(), 72, nullptr, false};
          if (way == 5) {
            a.combine_by_pull(3);
          } else if (way >= 3) {  // by choice: differently, then both by copy engines
            const bool copies = way == 4 || rank.rank == 0;
            const MoverChoice made =
                a.combine_by_choice(copies ? &counts : nullptr, a.partial().data(), copies ? 0 : 2);
            EXPECT_EQ(made.mover, copies ? Mover::kCopyEngines : Mover::kStores);
          } else if (way == 0) {
            stores.combine(0, a.send_plan(), source, a.y_array().data(), 72, a.tokens(), {1, 2}, a.stream);
          } else {
            stores.combine_by_copy(0, a.send_plan(), counts, source, a.y_array().data(), 72, a.tokens(),
                                   {1, way == 1 ? 0 : 4}, a.stream);
          }
          a.sync();
          homes.push_back(a.y());
        }
        for (std::size_t way = 1; way < homes.size(); ++way)
          EXPECT_EQ(homes[0], homes[way]) << "seed " << seed << " way " << way;
        // What should be there: the sum over the ranks that the token visits.
        const HostRouting& r = batch.routing[me];
        for (std::int64_t t = 0; t < r.tokens(); ++t) {
          bool visits[2] = {false, false};
          for (std::int64_t i = r.row_ptr[static_cast<std::size_t>(t)];
               i < r.row_ptr[static_cast<std::size_t>(t + 1)]; ++i)
            visits[r.expert[static_cast<std::size_t>(i)] % 2] = true;
          for (std::size_t h = 0; h < 72; ++h) {
            const std::size_t at = static_cast<std::size_t>(t) * 72 + h;
            const float zero = visits[0] ? from_bf16(expert_value(0, batch.x[me][at])) : 0.0f;
            const float one = visits[1] ? from_bf16(expert_value(1, batch.x[me][at])) : 0.0f;
            ASSERT_EQ(homes[0][at], to_bf16(visits[0] && visits[1] ? zero + one : visits[0] ? zero : one));
          }
        }
        rank.barrier();
      }
      rank.barrier();
    }
    rank.barrier();
  });
}

// Two groups and two channels each, their passes enqueued in turns on streams of their own.
TEST(RowExchange, InterleavedGroupsAndPlans) {
  NEED_DEVICES(2);
  run(As::kProcesses, 2, [](Rank& rank) {
    ExchangeShape shape = small_shape();
    shape.num_channels = 2;
    {
      RowExchange one(rank.bootstrap(), shape), two(rank.bootstrap(), shape);
      Endpoint a(one, 0, kExperts), b(one, 1, kExperts), c(two, 0, kExperts), d(two, 1, kExperts);
      Endpoint* ends[] = {&a, &b, &c, &d};
      const auto me = static_cast<std::size_t>(rank.rank);
      for (unsigned round = 0; round < 30 && !testing::Test::HasFailure(); ++round) {
        std::vector<Batch> batches;
        for (unsigned i = 0; i < 4; ++i) {
          batches.push_back(draw_batch(round * 4 + i + 9000, 2, 45, 72, kExperts, true));
          ends[i]->put(batches[i].routing[me], batches[i].x[me]);
          ends[i]->poison();
        }
        for (unsigned i = 0; i < 4; ++i) ends[i]->plan();
        for (unsigned i = 0; i < 4; ++i) ends[(i + round) % 4]->dispatch({1, 1});
        for (unsigned i = 0; i < 4; ++i) {
          ends[i]->sync();
          ends[i]->expect_expert_rows(batches[i]);
          ends[i]->compute(batches[i]);
          if ((i + round) % 3 == 0) ends[i]->put_results(ends[i]->reduced_rows(batches[i]));
        }
        for (unsigned turn = 0; turn < 4; ++turn) {
          const unsigned i = (turn + round + 1) % 4;
          if ((i + round) % 3 == 0) {
            ends[i]->combine_by_pull(2);
          } else {
            ends[i]->combine({1, 1});
          }
        }
        for (unsigned i = 0; i < 4; ++i) {
          ends[i]->sync();
          ends[i]->expect_y(batches[i]);
        }
      }
      rank.barrier();
    }
    rank.barrier();
  });
}

// A graph holds plan, dispatch and combine, and is replayed on other routings.
TEST(RowExchange, GraphIsReplayedOnOtherRoutings) {
  NEED_DEVICES(2);
  run(As::kProcesses, 2, [](Rank& rank) {
    {
      RowExchange exchange(rank.bootstrap(), small_shape());
      Endpoint end(exchange, 0, kExperts);
      const auto me = static_cast<std::size_t>(rank.rank);
      // Tokens of a captured plan are fixed: all batches have the same number.
      const auto batch_of = [&](unsigned seed) {
        std::mt19937 random(seed);
        Batch batch;
        for (int r = 0; r < 2; ++r) {
          batch.routing.push_back(
              draw_routing(random, 40, kExperts, seed % 2 == 0 ? Draw::kRagged : Draw::kTopK));
          batch.x.push_back(draw_rows(random, 40, 72, true));
        }
        return batch;
      };
      const Batch first = batch_of(1);
      end.put(first.routing[me], first.x[me]);
      cudaGraph_t dispatch_graph, combine_graph, pull_graph;
      cudaGraphExec_t dispatch, combine, pull;
      CUDA_OK(cudaStreamBeginCapture(end.stream, cudaStreamCaptureModeThreadLocal));
      end.plan();
      end.dispatch({2, 2}, true);
      CUDA_OK(cudaStreamEndCapture(end.stream, &dispatch_graph));
      CUDA_OK(cudaGraphInstantiate(&dispatch, dispatch_graph, 0));
      CUDA_OK(cudaStreamBeginCapture(end.stream, cudaStreamCaptureModeThreadLocal));
      end.combine({2, 2});
      CUDA_OK(cudaStreamEndCapture(end.stream, &combine_graph));
      CUDA_OK(cudaGraphInstantiate(&combine, combine_graph, 0));
      CUDA_OK(cudaStreamBeginCapture(end.stream, cudaStreamCaptureModeThreadLocal));
      end.combine_by_pull(4);
      end.combine_by_pull(1);
      CUDA_OK(cudaStreamEndCapture(end.stream, &pull_graph));
      CUDA_OK(cudaGraphInstantiate(&pull, pull_graph, 0));
      for (unsigned seed = 1; seed < 12 && !testing::Test::HasFailure(); ++seed) {
        const Batch batch = batch_of(seed);
        end.put(batch.routing[me], batch.x[me]);
        end.poison();
        CUDA_OK(cudaGraphLaunch(dispatch, end.stream));
        end.sync();
        end.expect_expert_rows(batch);
        end.expect_tiles(batch);
        end.compute(batch);
        CUDA_OK(cudaGraphLaunch(combine, end.stream));
        end.sync();
        end.expect_y(batch);
        end.put_results(end.reduced_rows(batch));
        end.poison_y();
        CUDA_OK(cudaGraphLaunch(pull, end.stream));
        end.sync();
        end.expect_y(batch);
      }
      cudaGraphExecDestroy(dispatch);
      cudaGraphExecDestroy(combine);
      cudaGraphExecDestroy(pull);
      cudaGraphDestroy(pull_graph);
      cudaGraphDestroy(dispatch_graph);
      cudaGraphDestroy(combine_graph);
      rank.barrier();
    }
    rank.barrier();
  });
}

TEST(RowExchange, OverflowIsReportedSendsNothingAndPoisonsTheSums) {
  NEED_DEVICES(2);
  run(As::kProcesses, 2, [](Rank& rank) {
    ExchangeShape shape = small_shape();
    shape.max_received = 30;
    shape.max_routes = 200;
    {
      RowExchange exchange(rank.bootstrap(), shape);
      Endpoint end(exchange, 0, kExperts);
      const auto me = static_cast<std::size_t>(rank.rank);
      std::mt19937 random(3);
      Batch large, fits;
      for (int r = 0; r < 2; ++r) {
        large.routing.push_back(draw_routing(random, 40, kExperts, Draw::kTopK, 3));
        large.x.push_back(draw_rows(random, 40, 72, true));
        fits.routing.push_back(draw_routing(random, 14, kExperts, Draw::kTopK, 3));
        fits.x.push_back(draw_rows(random, 14, 72, true));
      }
      end.put(large.routing[me], large.x[me]);
      end.poison();
      end.plan();
      end.dispatch({1, 1});
      end.combine({1, 1});
      try {
        end.sync();
        ADD_FAILURE() << "no error";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::kInvalidState) << e.what();
        EXPECT_NE(e.message().find("max_received"), std::string::npos) << e.what();
      }
      const auto y = end.y();
      for (std::size_t i = 0; i < 40 * 72; ++i) ASSERT_TRUE(std::isnan(from_bf16(y[i]))) << i;
      // Copy engines at rank 0, stores at rank 1: no peer waits for what the other leaves out, and passes go on together.
      const auto counts = exchange.host_counts(0, end.stream);
      if (rank.rank == 0) {
        end.dispatch_by_copy(counts);
      } else {
        end.dispatch_compact({1, 0});
      }
      end.y_array().put(std::vector<std::uint16_t>(45 * 72, 0));
      const MoverChoice made = end.combine_by_choice(rank.rank == 0 ? &counts : nullptr, end.partial().data(),
                                                     rank.rank == 0 ? 0 : 2);
      EXPECT_EQ(made.mover, rank.rank == 0 ? Mover::kCopyEngines : Mover::kStores);
      try {
        end.sync();
        ADD_FAILURE() << "no error";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::kInvalidState) << e.what();
      }
      const auto mixed = end.y();
      for (std::size_t i = 0; i < 40 * 72; ++i) ASSERT_TRUE(std::isnan(from_bf16(mixed[i]))) << i;
      end.y_array().put(std::vector<std::uint16_t>(45 * 72, 0));
      end.combine_by_pull(2);
      EXPECT_THROW(end.sync(), Error);
      const auto pulled = end.y();
      for (std::size_t i = 0; i < 40 * 72; ++i) ASSERT_TRUE(std::isnan(from_bf16(pulled[i]))) << i;
      exchange.clear(0, end.stream);
      pass(rank, exchange, end, fits, 1);
      rank.barrier();
    }
    rank.barrier();
  });
}

// A rank is killed between the plan and what it sends, or while rows travel: the other reports it within the deadline,
// another group of the same process goes on, and so does a new one of the survivor alone. told: a host that knows at once
// who is gone says so, and no deadline is waited for.
enum class Travels { kDispatch, kPulledRows };
void peer_dies(bool while_rows_travel, Travels what = Travels::kDispatch, bool told = false) {
  const auto deadline = told ? 50s : 2s, patience = told ? 0s : deadline;
  const auto results = gpu_ranks::run_processes(
      2,
      [&](Rank& rank) {
        rank.use_device();
        ExchangeShape shape = small_shape(while_rows_travel ? 8192 : 72);
        if (while_rows_travel) shape.max_tokens = 8192;
        shape.deadline = deadline;
        Rank alone(*gpu_ranks::make_meeting(), 0, 1);
        RowExchange own(alone.bootstrap(), small_shape());
        Endpoint own_end(own, 0, kExperts);
        Bootstrap pair = rank.bootstrap();
        auto known_from = std::chrono::steady_clock::time_point::max();
        if (told) pair.lost = [&] { return std::chrono::steady_clock::now() >= known_from; };
        auto exchange = std::make_unique<RowExchange>(pair, shape);
        auto end = std::make_unique<Endpoint>(*exchange, 0, kExperts);
        std::mt19937 random(11);
        Batch batch;
        for (int r = 0; r < 2; ++r) {
          batch.routing.push_back(draw_routing(random, shape.max_tokens, kExperts, Draw::kTopK, 3));
          batch.x.push_back(draw_rows(random, shape.max_tokens, shape.hidden, true));
        }
        const auto me = static_cast<std::size_t>(rank.rank);
        end->put(batch.routing[me], batch.x[me]);
        end->plan();
        end->sync();
        rank.barrier();
        // One processor, so that the rows take hundreds of milliseconds: a kill takes tens of them on a busy machine.
        const auto send = [&] {
          for (int i = 0; i < 100; ++i) {
            if (what == Travels::kDispatch) end->dispatch_compact({1, 0});
            if (what == Travels::kPulledRows) end->combine_by_pull(1);
          }
        };
        if (rank.rank == 1) {
          if (while_rows_travel) {  // the process goes while they travel
            send();
            std::this_thread::sleep_for(8ms);
          }
          kill(getpid(), SIGKILL);
        }
        const auto start = std::chrono::steady_clock::now();
        known_from = start + 300ms;
        send();
        try {
          end->sync();
          ADD_FAILURE() << "no error";
        } catch (const Error& e) {
          EXPECT_EQ(e.code(), ErrorCode::kPeerLost) << e.what();
          EXPECT_NE(e.message().find(told ? "a rank of the group is gone" : "for rank 1"), std::string::npos)
              << e.what();
          std::fprintf(stderr, "reported: %s\n", e.what());
        }
        EXPECT_LT(std::chrono::steady_clock::now() - start, patience + 2s);
        EXPECT_TRUE(exchange->failed());
        // Another group of this process, and a new one.
        const Batch mine = draw_batch(77, 1, 45, 72, kExperts, true);
        pass(alone, own, own_end, mine, 2);
        end.reset();
        const auto leaving = std::chrono::steady_clock::now();
        exchange.reset();
        EXPECT_LT(std::chrono::steady_clock::now() - leaving, 4s);
        RowExchange again(alone.bootstrap(), small_shape());
        Endpoint again_end(again, 0, kExperts);
        pass(alone, again, again_end, mine, 1);
        return testing::Test::HasFailure() ? 1 : 0;
      },
      60s);
  EXPECT_EQ(results[0], 0);
  EXPECT_EQ(results[1], -SIGKILL);
}
TEST(RowExchange, PeerKilledBeforeItsDispatch) {
  NEED_DEVICES(2);
  peer_dies(false);
}
TEST(RowExchange, PeerKilledWhileRowsTravel) {
  NEED_DEVICES(2);
  peer_dies(true);
}
TEST(RowExchange, PeerKilledBeforeItsRowsAreRead) {
  NEED_DEVICES(2);
  peer_dies(false, Travels::kPulledRows);
}
TEST(RowExchange, PeerKilledWhileItsRowsAreRead) {
  NEED_DEVICES(2);
  peer_dies(true, Travels::kPulledRows);
}
TEST(RowExchange, PeerWhoseLossIsKnownIsNotWaitedFor) {
  NEED_DEVICES(2);
  peer_dies(false, Travels::kDispatch, true);
  peer_dies(true, Travels::kPulledRows, true);
}
// Exchanges over the same ranks are made and left again and again. Then a rank is killed that the other is waiting for on its
// way out, of several exchanges, as of a model's layers: it hears of that, and waits for the others once.
TEST(RowExchange, PeerKilledBeforeItLeaves) {
  NEED_DEVICES(2);
  const auto results = gpu_ranks::run_processes(
      2,
      [](Rank& rank) {
        rank.use_device();
        ExchangeShape shape = small_shape();
        shape.deadline = 50s;
        Bootstrap pair = rank.bootstrap();
        auto known_from = std::chrono::steady_clock::time_point::max();
        pair.lost = [&] { return std::chrono::steady_clock::now() >= known_from; };
        auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < 5; ++i) {
          RowExchange exchange(pair, shape);
          Endpoint end(exchange, 0, kExperts);
          pass(rank, exchange, end, draw_batch(static_cast<unsigned>(i), 2, 45, 72, kExperts, true), 1);
        }
        EXPECT_LT(std::chrono::steady_clock::now() - start, 30s);
        std::vector<std::unique_ptr<RowExchange>> layers;
        for (int i = 0; i < 6; ++i) layers.push_back(std::make_unique<RowExchange>(pair, shape));
        rank.barrier();
        if (rank.rank == 1) kill(getpid(), SIGKILL);
        start = std::chrono::steady_clock::now();
        known_from = start + 300ms;
        layers.clear();
        EXPECT_LT(std::chrono::steady_clock::now() - start, 4s);
        return testing::Test::HasFailure() ? 1 : 0;
      },
      120s);
  EXPECT_EQ(results[0], 0);
  EXPECT_EQ(results[1], -SIGKILL);
}
// A plan whose counts did not come gives no counts to the host, by which copies would go, and no sums, not even of rows that
// do not travel.
TEST(RowExchange, PeerKilledBeforeItsPlan) {
  NEED_DEVICES(2);
  const auto results = gpu_ranks::run_processes(
      2,
      [](Rank& rank) {
        rank.use_device();
        ExchangeShape shape = small_shape();
        shape.max_received = 20;
        shape.deadline = 1s;
        RowExchange exchange(rank.bootstrap(), shape);
        Endpoint end(exchange, 0, kExperts);
        HostRouting own;
        for (int t = 0; t < 40; ++t) {
          own.expert.push_back(0);
          own.weight.push_back(1);
          own.row_ptr.push_back(t + 1);
        }
        std::mt19937 random(5);
        end.put(own, draw_rows(random, 40, 72, true));
        end.y_array().put(std::vector<std::uint16_t>(45 * 72, 0));
        rank.barrier();
        if (rank.rank == 1) kill(getpid(), SIGKILL);
        end.plan();
        end.dispatch({1, 1});
        end.combine({1, 1});
        for (const bool counts : {true, false}) {
          try {
            if (counts) {
              exchange.host_counts(0, end.stream);
            } else {
              end.sync();
            }
            ADD_FAILURE() << "no error";
          } catch (const Error& e) {
            EXPECT_EQ(e.code(), ErrorCode::kPeerLost) << e.what();
            EXPECT_NE(e.message().find("for rank 1"), std::string::npos) << e.what();
          }
        }
        const auto y = end.y();
        for (std::size_t i = 0; i < 40 * 72; ++i) EXPECT_TRUE(std::isnan(from_bf16(y[i]))) << i;
        return testing::Test::HasFailure() ? 1 : 0;
      },
      60s);
  EXPECT_EQ(results[0], 0);
  EXPECT_EQ(results[1], -SIGKILL);
}
// Rank 0 gives up rank 1, which is only late, and writes over what rank 1 has not read yet: by copy engines, or where peers
// read results. Rank 1 hears of it.
enum class Over { kReceived, kResults, kReadResults };
void late_peer_is_written_over(Over over) {
  const auto results = gpu_ranks::run_processes(
      2,
      [&](Rank& rank) {
        rank.use_device();
        ExchangeShape shape = small_shape();
        shape.deadline = rank.rank == 0 ? 2s : 20s;
        {
          RowExchange exchange(rank.bootstrap(), shape);
          Endpoint end(exchange, 0, kExperts);
          const Batch batch = draw_batch(31, 2, 45, 72, kExperts, true);
          const auto me = static_cast<std::size_t>(rank.rank);
          end.put(batch.routing[me], batch.x[me]);
          end.poison();
          end.plan();
          const auto counts = exchange.host_counts(0, end.stream);
          end.dispatch({1, 1});
          end.sync();
          end.compute(batch);
          if (over != Over::kReceived) {
            if (rank.rank == 0) {
              end.combine({1, 1});
            } else {
              exchange.push_results(0, end.outputs(), {1, 0}, end.stream);
            }
            end.sync();
          }
          rank.barrier();
          if (rank.rank == 0) {
            if (over == Over::kReceived) end.dispatch_by_copy(counts);
            if (over == Over::kResults) end.combine_by_choice(&counts, end.partial().data(), 0);
            if (over == Over::kReadResults) exchange.result_rows(0, end.stream);
          } else {
            rank.barrier();  // rank 0 has failed
            if (over != Over::kReceived)
              exchange.sum_at_home(0, end.send_plan(), end.outputs(), end.y_array().data(), 72, 0,
                                   end.tokens(), true, {1, 0}, end.stream);
          }
          try {
            end.sync();
            ADD_FAILURE() << "no error";
          } catch (const Error& e) {
            EXPECT_EQ(e.code(), ErrorCode::kPeerLost) << e.what();
            EXPECT_NE(e.message().find(rank.rank == 0 ? "for rank 1" : "rank 0 did not wait"),
                      std::string::npos)
                << e.what();
          }
          if (rank.rank == 0) rank.barrier();
        }
        rank.barrier();
        return testing::Test::HasFailure() ? 1 : 0;
      },
      60s);
  for (const int result : results) EXPECT_EQ(result, 0);
}
TEST(RowExchange, LatePeerHearsThatItWasWrittenOver) {
  NEED_DEVICES(2);
  for (const Over over : {Over::kReceived, Over::kResults, Over::kReadResults}) {
    SCOPED_TRACE(static_cast<int>(over));
    late_peer_is_written_over(over);
  }
}
void nccl_peer_dies(bool told) {
  std::string why;
  if (!nccl_available(&why)) GTEST_SKIP() << why;
  const auto results = gpu_ranks::run_processes(
      2,
      [&](Rank& rank) {
        rank.use_device();
        Bootstrap pair = rank.bootstrap();
        auto known_from = std::chrono::steady_clock::time_point::max();
        if (told) pair.lost = [&] { return std::chrono::steady_clock::now() >= known_from; };
        NcclCommunicator nccl(pair, told ? 50s : 20s);
        ExchangeShape shape = small_shape();
        shape.deadline = told ? 50s : 3s;
        RowExchange exchange(pair, shape, Link::kNccl, PeerPath::kBest, &nccl);
        Endpoint end(exchange, 0, kExperts);
        const Batch batch = draw_batch(4242, 2, 45, 72, kExperts, true);
        const auto me = static_cast<std::size_t>(rank.rank);
        end.put(batch.routing[me], batch.x[me]);
        end.plan();
        end.sync();
        rank.barrier();
        if (rank.rank == 1) kill(getpid(), SIGKILL);
        const auto start = std::chrono::steady_clock::now();
        known_from = start + 300ms;
        try {
          end.dispatch({1, 1});
          end.sync();
          // What was on its way may still have come; the next exchange cannot.
          end.plan();
          end.sync();
          ADD_FAILURE() << "no error";
        } catch (const Error& e) {
          // NCCL may find out by itself before the host is asked.
          EXPECT_TRUE(e.code() == (told ? ErrorCode::kPeerLost : ErrorCode::kTimeout) ||
                      e.code() == ErrorCode::kTransport)
              << e.what();
          std::fprintf(stderr, "reported: %s\n", e.what());
        }
        EXPECT_LT(std::chrono::steady_clock::now() - start, told ? 5s : 12s);
        EXPECT_TRUE(nccl.dead());
        return testing::Test::HasFailure() ? 1 : 0;
      },
      60s);
  EXPECT_EQ(results[0], 0);
  EXPECT_EQ(results[1], -SIGKILL);
}
TEST(RowExchange, NcclPeerKilled) {
  NEED_DEVICES(2);
  nccl_peer_dies(false);
}
TEST(RowExchange, NcclPeerWhoseLossIsKnownIsNotWaitedFor) {
  NEED_DEVICES(2);
  nccl_peer_dies(true);
}

// The error of an fp8 wire, as row_exchange.hpp states it; own rows are rounded as well.
TEST(RowExchange, Fp8WireKeepsItsBound) {
  NEED_DEVICES(2);
  run(As::kProcesses, 2, [](Rank& rank) {
    ExchangeShape shape = small_shape(80);
    shape.wire = Wire::kFp8;
    {
      RowExchange exchange(rank.bootstrap(), shape);
      Endpoint end(exchange, 0, kExperts);
      const auto me = static_cast<std::size_t>(rank.rank);
      for (unsigned seed = 0; seed < 20 && !testing::Test::HasFailure(); ++seed) {
        const Batch batch = draw_batch(seed + 300, 2, 45, 80, kExperts, false);
        end.put(batch.routing[me], batch.x[me]);
        end.poison();
        end.plan();
        for (const bool copy : {false, true}) {
          if (copy) {
            const auto counts = exchange.host_counts(0, end.stream);
            end.dispatch_by_copy(counts);
            end.sync();
            break;
          }
          end.dispatch({1, 1});
          end.sync();
          const auto rows = end.expected_expert_rows(batch);
          const auto got = end.rows().get();
          for (std::size_t p = 0; p < rows.size(); ++p) {
            const std::uint16_t* x = &batch.x[static_cast<std::size_t>(rows[p].source)]
                                             [static_cast<std::size_t>(rows[p].token * 80)];
            float most = 0;
            for (int h = 0; h < 80; ++h) most = std::max(most, std::abs(from_bf16(x[h])));
            for (std::size_t h = 0; h < 80; ++h) {
              const float value = from_bf16(x[h]), error = std::abs(from_bf16(got[p * 80 + h]) - value);
              // 2^-4 of the value and bf16's own rounding; below the smallest normal, half a step of 2^-9 * scale.
              const float bound = std::abs(value) * (0.0625f + 0.005f) + most / 448.0f * 0.001f;
              ASSERT_TRUE(error <= bound)
                  << "row " << p << " column " << h << ": " << value << " off by " << error;
            }
          }
        }
      }
      rank.barrier();
    }
    rank.barrier();
  });
}

TEST(RowExchange, ScalarsComeBackInTheCallersOrder) {
  NEED_DEVICES(2);
  std::string why;
  const bool with_nccl = nccl_available(&why);
  run(As::kProcesses, 2, [&](Rank& rank) {
    std::unique_ptr<NcclCommunicator> nccl;
    if (with_nccl) nccl = std::make_unique<NcclCommunicator>(rank.bootstrap(), 60s);
    for (const Link link : {Link::kNvlink, Link::kNccl}) {
      if (link == Link::kNccl && !with_nccl) continue;
      RowExchange exchange(rank.bootstrap(), small_shape(), link, PeerPath::kBest, nccl.get());
      Endpoint end(exchange, 0, kExperts);
      const auto me = static_cast<std::size_t>(rank.rank);
      for (unsigned seed = 0; seed < 25 && !testing::Test::HasFailure(); ++seed) {
        const Batch batch = draw_batch(seed + 700, 2, 45, 72, kExperts, true);
        end.put(batch.routing[me], batch.x[me]);
        end.plan();
        end.sync();
        std::vector<float> values;
        const auto value_of = [](int expert, int source, std::int64_t token) {
          return static_cast<float>(expert * 1000000 + source * 10000) + static_cast<float>(token);
        };
        for (const auto& row : end.expected_expert_rows(batch))
          values.push_back(value_of(row.expert, row.source, row.token));
        end.values().put(values);
        end.value_of_route().put(std::vector<float>(Endpoint::n(exchange.shape().max_routes), -1.0f));
        exchange.return_scalars(0, end.send_plan(), end.values().data(), end.position().data(),
                                end.value_of_route().data(), end.stream);
        end.sync();
        const auto got = end.value_of_route().get();
        const HostRouting& r = batch.routing[me];
        for (std::int64_t t = 0; t < r.tokens(); ++t)
          for (std::int64_t i = r.row_ptr[Endpoint::n(t)]; i < r.row_ptr[Endpoint::n(t + 1)]; ++i)
            ASSERT_EQ(got[Endpoint::n(i)], value_of(r.expert[Endpoint::n(i)], rank.rank, t)) << "route " << i;
        for (std::size_t i = r.expert.size(); i < got.size(); ++i) ASSERT_EQ(got[i], -1.0f);
      }
      rank.barrier();
    }
    rank.barrier();
  });
}

// Needs no GPU.
TEST(RowExchange, TheCheaperMoverIsChosen) {
  const MoverCosts costs;
  constexpr std::int64_t kRows = 117'200'000;
  const MoverChoice many = choose_mover(kRows, 132, true, costs);
  EXPECT_EQ(many.mover, Mover::kStores);
  EXPECT_GE(many.sms, 8);
  EXPECT_LE(many.sms, 10);  // more do not help the link
  EXPECT_EQ(choose_mover(kRows, 2, true, costs).mover, Mover::kCopyEngines);
  EXPECT_EQ(choose_mover(kRows, 2, false, costs).mover, Mover::kStores);  // nothing else is possible
  EXPECT_EQ(choose_mover(kRows, 0, true, costs).mover, Mover::kCopyEngines);
  EXPECT_EQ(choose_mover(0, 4, true, costs).sms, 1);
  EXPECT_THROW(choose_mover(kRows, 0, false, costs), Error);
  EXPECT_THROW(choose_mover(-1, 8, true, costs), Error);
  // A combine starts later whichever way it goes, and so stores have less to gain from more processors.
  const MoverChoice combine = choose_mover(kRows, 132, true, kCombineCosts);
  EXPECT_EQ(combine.mover, Mover::kStores);
  EXPECT_LE(combine.sms, many.sms);
  EXPECT_GT(combine.us, many.us);
  EXPECT_EQ(choose_mover(kRows, 4, true, kCombineCosts).mover, Mover::kCopyEngines);
  EXPECT_EQ(choose_mover(kRows, 4, false, kCombineCosts).mover, Mover::kStores);
}
// Needs no GPU: shapes are checked first.
TEST(RowExchange, RefusesShapes) {
  const Bootstrap bootstrap{
      0, 1, [](const void* mine, void* all, std::size_t bytes) { std::memcpy(all, mine, bytes); }};
  const auto refused = [&](auto change, const char* name) {
    ExchangeShape shape = small_shape();
    change(shape);
    try {
      RowExchange exchange(bootstrap, shape);
      ADD_FAILURE() << name << " was taken";
    } catch (const Error& e) {
      EXPECT_NE(e.message().find(name), std::string::npos) << e.what();
    }
  };
  refused([](ExchangeShape& s) { s.max_tokens = 0; }, "max_tokens");
  refused([](ExchangeShape& s) { s.hidden = 7; }, "hidden");
  refused([](ExchangeShape& s) { s.dtype = DType::kF32, s.wire = Wire::kFp8; }, "fp8");
  refused([](ExchangeShape& s) { s.max_received = 46; }, "max_received");
  refused([](ExchangeShape& s) { s.chunk_rows = 0; }, "chunk_rows");
  refused([](ExchangeShape& s) { s.num_channels = 0; }, "num_channels");
  Bootstrap many = bootstrap;
  many.num_ranks = kMaxExchangeRanks + 1;
  EXPECT_THROW(RowExchange(many, small_shape()), Error);
  EXPECT_THROW(RowExchange(bootstrap, small_shape(), Link::kNccl), Error);  // without a communicator
}
TEST(RowExchange, RefusesWhatItCannotDo) {
  NEED_DEVICES(1);
  run(As::kThreads, 1, [](Rank& rank) {
    RowExchange exchange(rank.bootstrap(), small_shape());
    Endpoint end(exchange, 0, kExperts);
    EXPECT_THROW(end.dispatch({0, 1}), Error);
    EXPECT_THROW(end.dispatch({1000, 1}), Error);
    EXPECT_THROW(exchange.dispatch(1, end.send_plan(), end.rows().data(), 72, {}, {1, 0}, end.stream), Error);
    EXPECT_THROW(exchange.dispatch(0, end.send_plan(), end.rows().data(), 71, {}, {1, 0}, end.stream), Error);
    EXPECT_THROW(end.combine_by_choice(nullptr, end.partial().data(), 0), Error);
    EXPECT_THROW(end.combine_by_pull(-1), Error);
    EXPECT_THROW(end.combine_by_pull(1000), Error);
  });
}

}  // namespace
}  // namespace sluice::comm::cuda
