// The C interface as its users see it: linked with libsluice.so alone, which shows no other code of this tree.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <condition_variable>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <set>

#include "layer_harness.hpp"
#include "sluice/sluice.h"

extern "C" int sluice_c_header_test(void);

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the harness of this test

constexpr std::uint64_t kSeed = 550991;

#define EXPECT_OK(call) EXPECT_EQ((call), SLUICE_OK) << sluice_last_error_message()
#define ASSERT_OK(call) ASSERT_EQ((call), SLUICE_OK) << sluice_last_error_message()
// The status, its detail, and that the library remembers both.
#define EXPECT_FAILS(status, part, call)                                                        \
  do {                                                                                          \
    EXPECT_EQ((call), status) << #call;                                                         \
    EXPECT_EQ(sluice_last_error_status(), status);                                              \
    EXPECT_NE(std::string_view(sluice_last_error_message()).find(part), std::string_view::npos) \
        << #call << ": " << sluice_last_error_message();                                        \
  } while (0)

struct CountingAllocator {
  std::atomic<std::int64_t> num_allocations{0}, num_live{0}, bytes_live{0};
  std::atomic<std::int64_t> fail_after{INT64_MAX};  // allocations that still succeed

  static void* allocate(std::size_t bytes, std::size_t alignment, void* user) {
    auto& self = *static_cast<CountingAllocator*>(user);
    if (self.fail_after.fetch_sub(1) <= 0) return nullptr;
    EXPECT_GT(bytes, 0u);
    EXPECT_EQ(alignment & (alignment - 1), 0u);
    ++self.num_allocations;
    ++self.num_live;
    self.bytes_live += static_cast<std::int64_t>(bytes);
    return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  }
  static void deallocate(void* memory, std::size_t bytes, std::size_t, void* user) {
    auto& self = *static_cast<CountingAllocator*>(user);
    --self.num_live;
    self.bytes_live -= static_cast<std::int64_t>(bytes);
    std::free(memory);
  }
  sluice_allocator interface() { return {allocate, deallocate, this}; }
};

sluice_runtime_options runtime_options(std::int64_t timeout_ms, CountingAllocator* allocator = nullptr) {
  auto options = SLUICE_INIT(sluice_runtime_options);
  options.timeout_ms = timeout_ms;
  if (allocator) options.allocator = allocator->interface();
  return options;
}

std::vector<sluice_runtime*> local_group(std::int32_t num_ranks, std::int32_t num_nodes,
                                         const sluice_runtime_options& options) {
  auto topology = SLUICE_INIT(sluice_topology);
  topology.num_ranks = num_ranks;
  topology.num_nodes = num_nodes;
  sluice_group* group = nullptr;
  EXPECT_OK(sluice_group_create_local(&topology, &options, &group));
  EXPECT_EQ(sluice_group_num_ranks(group), num_ranks);
  std::vector<sluice_runtime*> runtimes(static_cast<std::size_t>(num_ranks));
  for (std::int32_t r = 0; r < num_ranks; ++r)
    EXPECT_OK(sluice_group_take_runtime(group, r, &runtimes[static_cast<std::size_t>(r)]));
  sluice_group_destroy(group);
  return runtimes;
}

// Plays every rank in a thread of its own.
void play(const std::vector<sluice_runtime*>& runtimes, const std::function<void(sluice_runtime*)>& body) {
  std::vector<std::thread> threads;
  for (sluice_runtime* runtime : runtimes) threads.emplace_back([&, runtime] { body(runtime); });
  for (auto& t : threads) t.join();
}

sluice_const_matrix in(const float* data, std::int64_t rows, std::int64_t cols) {
  return {data, rows, cols, 0, SLUICE_F32, 0};
}
sluice_matrix out(float* data, std::int64_t rows, std::int64_t cols) {
  return {data, rows, cols, 0, SLUICE_F32, 0};
}

struct Contiguous {
  std::vector<std::int32_t> expert, rank, local_index;
  sluice_placement placement = SLUICE_INIT(sluice_placement);

  Contiguous(std::int32_t num_experts, std::int32_t num_ranks, const std::int32_t* kinds = nullptr) {
    const auto n = static_cast<std::size_t>(num_experts);
    expert.resize(n);
    rank.resize(n);
    local_index.resize(n);
    placement.num_experts = num_experts;
    EXPECT_OK(sluice_placement_contiguous(num_experts, num_ranks, kinds, num_experts, expert.data(),
                                          rank.data(), local_index.data(), &placement.num_slots));
    placement.slot_expert = expert.data();
    placement.slot_rank = rank.data();
    placement.slot_local_index = local_index.data();
    placement.expert_kind = kinds;
  }
  Contiguous(const Contiguous&) = delete;
};

sluice_routing csr(const Routing& r) {
  auto routing = SLUICE_INIT(sluice_routing);
  routing.num_tokens = r.num_tokens();
  routing.num_weights = r.num_routes();
  routing.row_ptr = r.row_ptr.data();
  routing.expert = r.expert.data();
  routing.weight = r.weight.data();
  return routing;
}

// One rank with one layer: 2 experts, hidden 4, ffn 4.
struct Single {
  static constexpr std::int64_t kHidden = 4;
  CountingAllocator allocator;
  sluice_runtime* runtime = nullptr;
  sluice_layer* layer = nullptr;
  sluice_plan* plan = nullptr;
  std::vector<float> w1 = std::vector<float>(32, 0.25f), w2 = std::vector<float>(16, 0.5f), g1 = w1, g2 = w2;
  std::vector<float> x = std::vector<float>(8, 1.0f), y = std::vector<float>(8), dx = y,
                     dw = std::vector<float>(3);
  Routing routing{2, {0, 2, 3}, {0, 1, 1}, {1, 0.5f, 2}};
  Contiguous contiguous{2, 1};
  sluice_layer_options options = SLUICE_INIT(sluice_layer_options);
  std::array<sluice_expert_weights, 2> weights;

  Single() {
    runtime = local_group(1, 1, runtime_options(10000, &allocator))[0];
    options.hidden = options.ffn = kHidden;
    EXPECT_OK(sluice_layer_create(runtime, &contiguous.placement, &options, &layer));
    for (auto& w : weights) {
      w = SLUICE_INIT(sluice_expert_weights);
      w.w1 = in(w1.data(), 8, 4);
      w.w2 = in(w2.data(), 4, 4);
      w.grad_w1 = g1.data();
      w.grad_w2 = g2.data();
    }
    const sluice_routing r = csr(routing);
    EXPECT_OK(sluice_layer_plan(layer, &r, nullptr, &plan));
  }
  void set_weights() { EXPECT_OK(sluice_layer_set_weights(layer, weights.data(), 2)); }
  sluice_const_matrix x_matrix() const { return in(x.data(), 2, 4); }
  sluice_matrix y_matrix() { return out(y.data(), 2, 4); }
  sluice_matrix dx_matrix() { return out(dx.data(), 2, 4); }
  sluice_context* forward() {
    sluice_context* context = nullptr;
    const auto xm = x_matrix();
    const auto ym = y_matrix();
    EXPECT_OK(sluice_layer_forward(layer, plan, &xm, &ym, nullptr, &context));
    return context;
  }
  ~Single() {
    sluice_plan_destroy(plan);
    sluice_layer_destroy(layer);
    sluice_runtime_destroy(runtime);
  }
};

// ---- status, versions ------------------------------------------------------------------------------------------------

TEST(CApi, TheHeaderIsC11) {
  EXPECT_EQ(sluice_c_header_test(), 0) << sluice_last_error_message();
}

TEST(CApi, CodesAreThoseOfTheLibraryWithNamesAndScopes) {
  int code = 0;
#define SLUICE_X(name, text, scope)                                       \
  EXPECT_EQ(static_cast<int>(ErrorCode::name), code);                     \
  EXPECT_STREQ(sluice_status_name(code), text);                           \
  EXPECT_EQ(sluice_status_scope(code), static_cast<sluice_scope>(scope)); \
  ++code;
  SLUICE_ERROR_LIST(SLUICE_X)
#undef SLUICE_X
  EXPECT_EQ(code, SLUICE_INTERNAL + 1);
  EXPECT_STREQ(sluice_status_name(code), "unknown error code");
  EXPECT_STREQ(sluice_status_name(-1), "unknown error code");
  EXPECT_EQ(sluice_status_scope(99), SLUICE_SCOPE_PROCESS);
  EXPECT_STREQ(sluice_scope_name(SLUICE_SCOPE_GROUP), "group");
  EXPECT_STREQ(sluice_scope_name(7), "unknown scope");
}

TEST(CApi, Versions) {
  EXPECT_STREQ(sluice_version(), SLUICE_EXPECTED_VERSION);
  EXPECT_EQ(sluice_abi_version(), SLUICE_ABI_VERSION);
}

TEST(CApi, DetailsAreOfTheThreadAndOfTheLastFailure) {
  std::thread([] {
    EXPECT_STREQ(sluice_last_error_message(), "");
    EXPECT_EQ(sluice_last_error_status(), SLUICE_OK);
  }).join();
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "place for the new group is null",
               sluice_group_create_local(nullptr, nullptr, nullptr));
  EXPECT_EQ(sluice_last_error_scope(), SLUICE_SCOPE_CALL);
  const std::string before = sluice_last_error_message();
  std::thread([] {
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "runtime is null", sluice_runtime_barrier(nullptr));
  }).join();
  EXPECT_EQ(before, sluice_last_error_message());
  std::int32_t slots = 0;
  EXPECT_OK(sluice_placement_contiguous(2, 1, nullptr, 0, nullptr, nullptr, nullptr, &slots));
  EXPECT_EQ(slots, 2);
  EXPECT_EQ(before, sluice_last_error_message());  // success leaves it
  // A message longer than the buffer is cut, not lost.
  const std::string name(5000, 'n');
  sluice_runtime* runtime = nullptr;
  EXPECT_FAILS(SLUICE_NOT_SUPPORTED, "...", sluice_runtime_create(name.c_str(), nullptr, nullptr, &runtime));
  EXPECT_EQ(std::string_view(sluice_last_error_message()).size(), 2047u);
  EXPECT_EQ(runtime, nullptr);
}

// ---- structures ------------------------------------------------------------------------------------------------------

template <typename T>
struct Longer {
  T known;
  std::array<unsigned char, 24> tail{};
};

TEST(CApi, StructuresOfOtherVersions) {
  Single s;
  sluice_layer* layer = nullptr;
  const auto create = [&](const sluice_layer_options* options) {
    return sluice_layer_create(s.runtime, &s.contiguous.placement, options, &layer);
  };
  sluice_layer_options options = s.options;
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{4097}, SIZE_MAX}) {
    options.struct_size = size;
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "struct_size of sluice_layer_options is", create(&options));
    EXPECT_EQ(layer, nullptr);
  }
  // An earlier version ended before num_chunks: what follows is not read.
  options.struct_size = offsetof(sluice_layer_options, num_chunks);
  options.num_chunks = -77;
  EXPECT_OK(create(&options));
  sluice_layer_destroy(layer);
  // One that ended before hidden has a hidden of 0, which is refused for what it is.
  options.struct_size = sizeof(std::size_t);
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "hidden is 0", create(&options));
  // A later version is longer.
  Longer<sluice_layer_options> longer{s.options};
  longer.known.struct_size = sizeof longer;
  EXPECT_OK(create(&longer.known));
  sluice_layer_destroy(layer);
  longer.tail[5] = 1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "sets the one at", create(&longer.known));

  // Structures that the library fills: never more than the caller has, zero where it knows nothing.
  Longer<sluice_plan_info> info;
  std::memset(static_cast<void*>(&info), 0xff, sizeof info);
  info.known.struct_size = sizeof info;
  EXPECT_OK(sluice_plan_get_info(s.plan, &info.known));
  EXPECT_EQ(info.known.struct_size, sizeof info);
  EXPECT_EQ(info.known.num_tokens, 2);
  for (const unsigned char b : info.tail) EXPECT_EQ(b, 0);
  std::memset(static_cast<void*>(&info), 0xff, sizeof info);
  info.known.struct_size = offsetof(sluice_plan_info, num_weights);
  EXPECT_OK(sluice_plan_get_info(s.plan, &info.known));
  EXPECT_EQ(info.known.num_routes, 3);
  EXPECT_EQ(info.known.num_weights, -1);
  info.known.struct_size = 3;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "struct_size of sluice_plan_info is 3",
               sluice_plan_get_info(s.plan, &info.known));
  // Elements of an array lie as far apart as the first says.
  Longer<sluice_expert_weights> later[2] = {{s.weights[0]}, {s.weights[1]}};
  for (auto& w : later) w.known.struct_size = sizeof w;
  EXPECT_OK(sluice_layer_set_weights(s.layer, &later[0].known, 2));
  later[1].known.struct_size = sizeof(sluice_expert_weights);
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "slot 1 has struct_size",
               sluice_layer_set_weights(s.layer, &later[0].known, 2));
}

// ---- wrong arguments -------------------------------------------------------------------------------------------------

TEST(CApi, TopologiesAndRuntimesAreChecked) {
  sluice_group* group = nullptr;
  auto topology = SLUICE_INIT(sluice_topology);
  const auto create = [&] { return sluice_group_create_local(&topology, nullptr, &group); };
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "sluice_topology is null",
               sluice_group_create_local(nullptr, nullptr, &group));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "num_ranks is 0", create());
  topology.num_ranks = 3;
  topology.num_nodes = 2;
  EXPECT_FAILS(SLUICE_INVALID_CONFIG, "3 ranks on 2 equal nodes", create());
  topology.num_nodes = 4;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "num_nodes is 4", create());
  const std::int32_t gap[] = {0, 2, 0}, outside[] = {0, 1, 3}, good[] = {1, 0, 1};
  topology.num_nodes = 0;
  topology.node_of_rank = gap;
  EXPECT_FAILS(SLUICE_INVALID_CONFIG, "node 1", create());
  topology.node_of_rank = outside;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "node_of_rank[2] is 3", create());
  topology.node_of_rank = good;
  topology.num_nodes = 3;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "node_of_rank names 2", create());
  topology.num_nodes = 2;
  topology.in_node_bytes_per_s = -1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "in a node", create());
  topology.in_node_bytes_per_s = 0;

  auto options = SLUICE_INIT(sluice_runtime_options);
  const auto with_options = [&] { return sluice_group_create_local(&topology, &options, &group); };
  options.timeout_ms = -1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "timeout_ms is -1", with_options());
  options = SLUICE_INIT(sluice_runtime_options);
  options.threads_per_rank = -1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "threads_per_rank is -1", with_options());
  options = SLUICE_INIT(sluice_runtime_options);
  options.reserved = 1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "reserved", with_options());
  options = SLUICE_INIT(sluice_runtime_options);
  options.allocator.allocate = CountingAllocator::allocate;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "only one of allocate and deallocate", with_options());
  EXPECT_EQ(group, nullptr);

  ASSERT_OK(create());
  sluice_runtime *runtime = nullptr, *again = nullptr;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "rank is 3", sluice_group_take_runtime(group, 3, &runtime));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "rank is -1", sluice_group_take_runtime(group, -1, &runtime));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "group is null", sluice_group_take_runtime(nullptr, 0, &runtime));
  ASSERT_OK(sluice_group_take_runtime(group, 1, &runtime));
  EXPECT_FAILS(SLUICE_INVALID_STATE, "taken out of the group before",
               sluice_group_take_runtime(group, 1, &again));
  EXPECT_EQ(sluice_runtime_rank(runtime), 1);
  EXPECT_EQ(sluice_runtime_num_ranks(runtime), 3);
  EXPECT_EQ(sluice_runtime_num_nodes(runtime), 2);
  EXPECT_EQ(sluice_runtime_rank(nullptr), -1);
  EXPECT_EQ(sluice_runtime_num_ranks(nullptr), -1);
  EXPECT_EQ(sluice_runtime_num_nodes(nullptr), -1);
  EXPECT_EQ(sluice_group_num_ranks(nullptr), -1);
  sluice_group_destroy(group);
  sluice_runtime_destroy(runtime);

  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "name is null",
               sluice_runtime_create(nullptr, nullptr, nullptr, &runtime));
  EXPECT_FAILS(SLUICE_NOT_SUPPORTED, "pigeon", sluice_runtime_create("pigeon", nullptr, nullptr, &runtime));
  EXPECT_EQ(runtime, nullptr);
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "null", sluice_runtime_abort(nullptr, "x"));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "null", sluice_runtime_async_error(nullptr));
  // NULL may be destroyed.
  sluice_group_destroy(nullptr);
  sluice_runtime_destroy(nullptr);
  sluice_layer_destroy(nullptr);
  sluice_plan_destroy(nullptr);
  sluice_context_destroy(nullptr);
  sluice_dispatcher_destroy(nullptr);
}

TEST(CApi, PlacementsAndLayerOptionsAreChecked) {
  Single s;
  sluice_layer* layer = nullptr;
  const auto create = [&](const sluice_placement& p, const sluice_layer_options& o) {
    return sluice_layer_create(s.runtime, &p, &o, &layer);
  };
  sluice_placement p = s.contiguous.placement;
  p.num_experts = 0;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "num_experts is 0", create(p, s.options));
  p = s.contiguous.placement;
  p.slot_rank = nullptr;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "slot_rank is null but has 2", create(p, s.options));
  p = s.contiguous.placement;
  p.num_slots = -1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "slot_expert has -1", create(p, s.options));
  p = s.contiguous.placement;
  p.num_slots = 1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "1", create(p, s.options));  // expert 1 has no slot
  p = s.contiguous.placement;
  const std::int32_t wrong_rank[] = {0, 1}, wrong_kind[] = {0, 3}, swapped[] = {1, 0}, twice[] = {0, 0};
  p.slot_rank = wrong_rank;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "slot_rank[1] is 1", create(p, s.options));
  p = s.contiguous.placement;
  p.expert_kind = wrong_kind;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "expert_kind[1] is 3", create(p, s.options));
  p = s.contiguous.placement;
  p.slot_local_index = twice;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "", create(p, s.options));
  p.slot_local_index = swapped;
  EXPECT_OK(create(p, s.options));
  sluice_layer_destroy(layer);
  p.slot_local_index = nullptr;  // in the order given
  EXPECT_OK(create(p, s.options));
  sluice_layer_destroy(layer);
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "sluice_placement is null",
               sluice_layer_create(s.runtime, nullptr, &s.options, &layer));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "sluice_layer_options is null",
               sluice_layer_create(s.runtime, &p, nullptr, &layer));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "runtime is null",
               sluice_layer_create(nullptr, &p, &s.options, &layer));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "place for the new layer",
               sluice_layer_create(s.runtime, &p, &s.options, nullptr));

  const auto refused = [&](std::string_view part, const std::function<void(sluice_layer_options&)>& change) {
    sluice_layer_options o = s.options;
    change(o);
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, part, create(s.contiguous.placement, o));
    EXPECT_EQ(layer, nullptr);
  };
  refused("hidden is -4", [](auto& o) { o.hidden = -4; });
  refused("activation is 3", [](auto& o) { o.activation = 3; });
  refused("dtype is 2", [](auto& o) { o.dtype = 2; });
  refused("wire_dtype is -1", [](auto& o) { o.wire_dtype = -1; });
  refused("combine_dtype is 9", [](auto& o) { o.combine_dtype = 9; });
  refused("save is 3", [](auto& o) { o.save = 3; });
  refused("schedule is 4", [](auto& o) { o.schedule = 4; });
  refused("exchange is 2", [](auto& o) { o.exchange = 2; });
  refused("num_chunks", [](auto& o) { o.num_chunks = -1; });

  std::int32_t written[2];
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "capacity is 1",
               sluice_placement_contiguous(2, 1, nullptr, 1, written, nullptr, nullptr, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "num_ranks is 0",
               sluice_placement_contiguous(2, 0, nullptr, 2, written, nullptr, nullptr, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "num_experts is 0",
               sluice_placement_contiguous(0, 1, nullptr, 2, written, nullptr, nullptr, nullptr));
}

// With GPUs: examples/torch_layer.py.
TEST(CApi, TheLayerOnGpusIsRefusedWithoutThem) {
  auto options = runtime_options(1000);
  options.device = 2;
  auto topology = SLUICE_INIT(sluice_topology);
  topology.num_ranks = 1;
  sluice_group* group = nullptr;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "device is 2, must be 0..1",
               sluice_group_create_local(&topology, &options, &group));
  options.device = SLUICE_CPU;
  options.reserved2 = 1;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "reserved", sluice_group_create_local(&topology, &options, &group));
  // The options of a version before there were devices.
  options.struct_size = offsetof(sluice_runtime_options, device);
  ASSERT_OK(sluice_group_create_local(&topology, &options, &group));
  sluice_runtime* runtime = nullptr;
  ASSERT_OK(sluice_group_take_runtime(group, 0, &runtime));
  sluice_group_destroy(group);
  EXPECT_EQ(sluice_runtime_gpu(runtime), -1);
  EXPECT_EQ(sluice_runtime_gpu(nullptr), -1);

  const std::int32_t expert = 0, rank = 0;
  auto placement = SLUICE_INIT(sluice_placement);
  placement.num_experts = placement.num_slots = 1;
  placement.slot_expert = &expert;
  placement.slot_rank = &rank;
  auto layer_options = SLUICE_INIT(sluice_gpu_layer_options);
  layer_options.hidden = layer_options.ffn = 8;
  layer_options.max_tokens = layer_options.max_routes_of_token = 1;
  auto* layer = reinterpret_cast<sluice_gpu_layer*>(&topology);
  EXPECT_FAILS(SLUICE_NOT_SUPPORTED,
               "a runtime over nvlink or nccl with the device cuda; this one is over local",
               sluice_gpu_layer_create(runtime, &placement, &layer_options, &layer));
  EXPECT_EQ(layer, nullptr);
  layer_options.training = 2;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "training is 2",
               sluice_gpu_layer_create(runtime, &placement, &layer_options, &layer));
  layer_options.schedule = 4;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "schedule is 4",
               sluice_gpu_layer_create(runtime, &placement, &layer_options, &layer));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "options is null",
               sluice_gpu_layer_create(runtime, &placement, nullptr, &layer));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "runtime is null",
               sluice_gpu_layer_create(nullptr, &placement, &layer_options, &layer));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "GPU layer is null", sluice_gpu_layer_wait(nullptr, nullptr));
  EXPECT_EQ(sluice_gpu_layer_num_local_experts(nullptr), -1);
  sluice_gpu_layer_destroy(nullptr);
  sluice_runtime_destroy(runtime);
}
TEST(CApi, RoutingsAreChecked) {
  Single s;
  sluice_plan* plan = nullptr;
  const auto make = [&](const sluice_routing& r) { return sluice_layer_plan(s.layer, &r, nullptr, &plan); };
  const auto refused = [&](sluice_status status, std::string_view part,
                           const std::function<void(sluice_routing&)>& change) {
    sluice_routing r = csr(s.routing);
    change(r);
    EXPECT_FAILS(status, part, make(r));
    EXPECT_EQ(plan, nullptr);
  };
  refused(SLUICE_INVALID_ARGUMENT, "num_tokens is -1", [](auto& r) { r.num_tokens = -1; });
  refused(SLUICE_INVALID_ARGUMENT, "row_ptr is null", [](auto& r) { r.row_ptr = nullptr; });
  refused(SLUICE_INVALID_ARGUMENT, "expert is null", [](auto& r) { r.expert = nullptr; });
  refused(SLUICE_INVALID_ARGUMENT, "weight is null", [](auto& r) { r.weight = nullptr; });
  refused(SLUICE_INVALID_ARGUMENT, "format is 3", [](auto& r) { r.format = 3; });
  refused(SLUICE_INVALID_ROUTING, "", [](auto& r) { r.num_weights = 2; });
  refused(SLUICE_INVALID_ARGUMENT, "num_tokens * k = 2 * 2", [](auto& r) {
    r.format = SLUICE_ROUTING_TOP_K;
    r.k = 2;
  });
  refused(SLUICE_INVALID_ARGUMENT, "k is -1", [](auto& r) {
    r.format = SLUICE_ROUTING_TOP_K;
    r.k = -1;
  });
  refused(SLUICE_INVALID_ARGUMENT, "num_tokens * num_experts = 2 * 2",
          [](auto& r) { r.format = SLUICE_ROUTING_MULTI_HOT; });
  refused(SLUICE_INVALID_ARGUMENT, "map is null", [](auto& r) {
    r.format = SLUICE_ROUTING_MULTI_HOT;
    r.num_tokens = 1;
    r.num_weights = 2;
  });
  const std::int32_t experts[] = {0, 2, 1};
  refused(SLUICE_INVALID_ROUTING, "2", [&](auto& r) { r.expert = experts; });
  const std::int32_t same[] = {1, 1, 0, -1};
  const float weight[] = {1, 1, 1, 1};
  refused(SLUICE_INVALID_ROUTING, "token 0", [&](auto& r) {
    r.format = SLUICE_ROUTING_TOP_K;
    r.k = 2;
    r.num_weights = 4;
    r.expert = same;
    r.weight = weight;
  });
  refused(SLUICE_INVALID_ARGUMENT, "not aligned", [&](auto& r) {
    r.weight = reinterpret_cast<const float*>(reinterpret_cast<const char*>(s.routing.weight.data()) + 1);
    r.num_weights = 2;
    r.num_tokens = 1;
  });
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "sluice_routing is null",
               sluice_layer_plan(s.layer, nullptr, nullptr, &plan));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "place for the new plan",
               make(csr(s.routing)) == SLUICE_OK
                   ? (sluice_plan_destroy(plan), sluice_layer_plan(s.layer, nullptr, nullptr, nullptr))
                   : SLUICE_INTERNAL);
}

TEST(CApi, MatricesWeightsAndCallOrderAreChecked) {
  Single s;
  const auto x = s.x_matrix();
  const auto y = s.y_matrix(), dx = s.dx_matrix();
  sluice_context* context = nullptr;
  EXPECT_FAILS(SLUICE_INVALID_STATE, "before set_weights",
               sluice_layer_forward(s.layer, s.plan, &x, &y, nullptr, &context));
  EXPECT_EQ(context, nullptr);

  auto weights = s.weights;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "slots is null", sluice_layer_set_weights(s.layer, nullptr, 2));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "num_slots is -1",
               sluice_layer_set_weights(s.layer, weights.data(), -1));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "1 slots were given",
               sluice_layer_set_weights(s.layer, weights.data(), 1));
  weights[1].w1.rows = 4;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "w1 of slot 1 has shape [4, 4]",
               sluice_layer_set_weights(s.layer, weights.data(), 2));
  weights = s.weights;
  weights[0].w2.dtype = SLUICE_BF16;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "slot 0 are bf16",
               sluice_layer_set_weights(s.layer, weights.data(), 2));
  weights = s.weights;
  weights[0].w2.data = nullptr;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "w2 of slot 0 is null",
               sluice_layer_set_weights(s.layer, weights.data(), 2));
  s.set_weights();

  const auto refused = [&](std::string_view part, const std::function<void(sluice_const_matrix&)>& change) {
    sluice_const_matrix m = x;
    change(m);
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, part,
                 sluice_layer_forward(s.layer, s.plan, &m, &y, nullptr, &context));
    EXPECT_EQ(context, nullptr);
  };
  refused("x is null but has 2 rows", [](auto& m) { m.data = nullptr; });
  refused("dtype of x is 7", [](auto& m) { m.dtype = 7; });
  refused("x is bf16", [](auto& m) { m.dtype = SLUICE_BF16; });
  refused("x has shape [3, 4]", [](auto& m) { m.rows = 3; });
  refused("x has shape [-2, 4]", [](auto& m) { m.rows = -2; });
  refused("x has shape [2, 3]", [](auto& m) { m.cols = 3; });
  refused("row stride 3", [](auto& m) { m.row_stride = 3; });
  refused("more than memory", [](auto& m) { m.row_stride = INT64_MAX / 2; });
  refused("reserved", [](auto& m) { m.reserved = 1; });
  refused("not aligned", [](auto& m) { m.data = static_cast<const char*>(m.data) + 2; });
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "x is null",
               sluice_layer_forward(s.layer, s.plan, nullptr, &y, nullptr, &context));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "y is null",
               sluice_layer_forward(s.layer, s.plan, &x, nullptr, nullptr, &context));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "plan is null",
               sluice_layer_forward(s.layer, nullptr, &x, &y, nullptr, &context));

  int stream = 0;
  const sluice_routing routing = csr(s.routing);
  sluice_plan* plan = nullptr;
  EXPECT_FAILS(SLUICE_NOT_SUPPORTED, "stream", sluice_layer_plan(s.layer, &routing, &stream, &plan));
  EXPECT_FAILS(SLUICE_NOT_SUPPORTED, "stream",
               sluice_layer_forward(s.layer, s.plan, &x, &y, &stream, &context));
  EXPECT_FAILS(SLUICE_NOT_SUPPORTED, "stream", sluice_layer_sync_replica_gradients(s.layer, &stream));

  context = s.forward();
  EXPECT_FAILS(SLUICE_NOT_SUPPORTED, "stream",
               sluice_layer_backward(s.layer, context, &x, &dx, s.dw.data(), 3, &stream));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "context is null",
               sluice_layer_backward(s.layer, nullptr, &x, &dx, s.dw.data(), 3, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "dw has 2",
               sluice_layer_backward(s.layer, context, &x, &dx, s.dw.data(), 2, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "dw is null",
               sluice_layer_backward(s.layer, context, &x, &dx, nullptr, 3, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "dy is null",
               sluice_layer_backward(s.layer, context, nullptr, &dx, s.dw.data(), 3, nullptr));
  // Another layer's plan and context, and handles of another kind, as a language without types would pass them.
  Single other;
  other.set_weights();
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "plan was made by another layer",
               sluice_layer_forward(s.layer, other.plan, &x, &y, nullptr, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "context comes from another layer",
               sluice_layer_backward(other.layer, context, &x, &dx, s.dw.data(), 3, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "given as layer is a runtime",
               sluice_layer_sync_replica_gradients(reinterpret_cast<sluice_layer*>(s.runtime), nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "given as context is a plan",
               sluice_layer_backward(s.layer, reinterpret_cast<sluice_context*>(s.plan), &x, &dx, s.dw.data(),
                                     3, nullptr));
  EXPECT_OK(sluice_layer_backward(s.layer, context, &x, &dx, s.dw.data(), 3, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_STATE, "already",
               sluice_layer_backward(s.layer, context, &x, &dx, s.dw.data(), 3, nullptr));
  sluice_context_destroy(context);
  // Without gradients there is no backward.
  for (auto& w : s.weights) w.grad_w1 = nullptr;
  s.set_weights();
  context = s.forward();
  EXPECT_FAILS(SLUICE_INVALID_STATE, "no gradients",
               sluice_layer_backward(s.layer, context, &x, &dx, s.dw.data(), 3, nullptr));
  sluice_context_destroy(context);
  std::int64_t bytes = 0;
  EXPECT_OK(sluice_layer_memory_bytes(s.layer, &bytes));
  EXPECT_GT(bytes, 0);
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "bytes is null", sluice_layer_memory_bytes(s.layer, nullptr));
}

TEST(CApi, CollectivesAreCheckedAndWork) {
  const auto runtimes = local_group(3, 1, runtime_options(10000));
  play(runtimes, [](sluice_runtime* runtime) {
    const std::int32_t r = sluice_runtime_rank(runtime);
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "data is null", sluice_runtime_all_reduce_f32(runtime, nullptr, 1));
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "data has -1", sluice_runtime_all_reduce_f64(runtime, nullptr, -1));
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "gathered is null",
                 sluice_runtime_all_gather_i64(runtime, std::array<std::int64_t, 1>{1}.data(), 1, nullptr));
    EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "root is 3", sluice_runtime_broadcast(runtime, nullptr, 0, 3));
    std::array<float, 2> f = {float(r), 1};
    EXPECT_OK(sluice_runtime_all_reduce_f32(runtime, f.data(), 2));
    EXPECT_EQ(f, (std::array<float, 2>{3, 3}));
    double d = 0.5;
    EXPECT_OK(sluice_runtime_all_reduce_f64(runtime, &d, 1));
    EXPECT_EQ(d, 1.5);
    const std::array<std::int64_t, 2> own = {r, 10 * r};
    std::array<std::int64_t, 6> all{};
    EXPECT_OK(sluice_runtime_all_gather_i64(runtime, own.data(), 2, all.data()));
    EXPECT_EQ(all, (std::array<std::int64_t, 6>{0, 0, 1, 10, 2, 20}));
    std::int32_t word = r;
    EXPECT_OK(sluice_runtime_broadcast(runtime, &word, 4, 2));
    EXPECT_EQ(word, 2);
    EXPECT_OK(sluice_runtime_barrier(runtime));
    EXPECT_OK(sluice_runtime_async_error(runtime));
    sluice_runtime_destroy(runtime);
  });
}

// ---- the layer -------------------------------------------------------------------------------------------------------

// Forward and backward over four ranks, in each format of routing, against the dense reference and the C++ layer.
TEST(CApi, TheLayerInEveryRoutingFormat) {
  std::mt19937_64 rng(kSeed);
  const std::int32_t ranks = 4;
  const Problem p = random_problem(rng, Shape{6, 8, 12}, 30, 0, 4, 0.5, 1, 1);
  std::vector<std::int32_t> kinds;
  for (const ExpertKind k : p.kinds) kinds.push_back(static_cast<std::int32_t>(k));
  const Result want = dense_reference(p);
  LayerSetup setup;
  setup.topology = Topology::uniform(ranks, 2);
  setup.placement = contiguous_placement(6, ranks, p.kinds);
  const Result layer_result = run_layer(p, setup);
  const std::int64_t h = p.shape.hidden;
  for (const sluice_routing_format format :
       {SLUICE_ROUTING_CSR, SLUICE_ROUTING_TOP_K, SLUICE_ROUTING_MULTI_HOT}) {
    SCOPED_TRACE(str("format ", format, " seed ", kSeed));
    const Contiguous placement(6, ranks, kinds.data());
    const auto begin = deal_tokens(p.num_tokens(), ranks);
    Result got = empty_result(p);
    CountingAllocator allocator;
    play(local_group(ranks, 2, runtime_options(20000, &allocator)), [&](sluice_runtime* runtime) {
      const auto r = static_cast<std::size_t>(sluice_runtime_rank(runtime));
      auto options = SLUICE_INIT(sluice_layer_options);
      options.hidden = h;
      options.ffn = p.shape.ffn;
      sluice_layer* layer = nullptr;
      ASSERT_OK(sluice_layer_create(runtime, &placement.placement, &options, &layer));
      std::vector<sluice_expert_weights> weights;
      for (std::int32_t i = 0; i < placement.placement.num_slots; ++i) {
        if (placement.rank[static_cast<std::size_t>(i)] != static_cast<std::int32_t>(r)) continue;
        const auto e = static_cast<std::size_t>(placement.expert[static_cast<std::size_t>(i)]);
        auto w = SLUICE_INIT(sluice_expert_weights);
        w.w1 = in(p.w1[e].data(), p.shape.pre_cols(), h);
        w.w2 = in(p.w2[e].data(), h, p.shape.ffn);
        got.grad_w1[e].assign(p.w1[e].size(), 0.0f);
        got.grad_w2[e].assign(p.w2[e].size(), 0.0f);
        w.grad_w1 = got.grad_w1[e].data();
        w.grad_w2 = got.grad_w2[e].data();
        weights.push_back(w);
      }
      ASSERT_OK(sluice_layer_set_weights(layer, weights.data(), static_cast<std::int32_t>(weights.size())));

      const std::int64_t t0 = begin[r], n = begin[r + 1] - t0;
      const Routing mine = routing_slice(p.routing, t0, t0 + n);
      // The caller's arrays: routes of a token from the last to the first, or spread over all experts.
      const std::int64_t k = format == SLUICE_ROUTING_TOP_K ? 5 : 6;
      std::vector<std::int32_t> expert;
      std::vector<std::uint8_t> map;
      std::vector<float> weight;
      std::vector<std::int64_t> caller_of_route(mine.expert.size());
      sluice_routing routing = csr(mine);
      if (format != SLUICE_ROUTING_CSR) {
        expert.assign(static_cast<std::size_t>(n * k), -1);
        map.assign(static_cast<std::size_t>(n * k), 0);
        weight.assign(static_cast<std::size_t>(n * k), 0.0f);
        for (std::int64_t t = 0; t < n; ++t)
          for (auto q = mine.row_ptr[static_cast<std::size_t>(t)];
               q < mine.row_ptr[static_cast<std::size_t>(t) + 1]; ++q) {
            const std::int32_t e = mine.expert[static_cast<std::size_t>(q)];
            const std::int64_t at = t * k + (format == SLUICE_ROUTING_TOP_K
                                                 ? k - 1 - (q - mine.row_ptr[static_cast<std::size_t>(t)])
                                                 : e);
            expert[static_cast<std::size_t>(at)] = e;
            map[static_cast<std::size_t>(at)] = 1;
            weight[static_cast<std::size_t>(at)] = mine.weight[static_cast<std::size_t>(q)];
            caller_of_route[static_cast<std::size_t>(q)] = at;
          }
        routing.format = format;
        routing.k = format == SLUICE_ROUTING_TOP_K ? static_cast<std::int32_t>(k) : 0;
        routing.row_ptr = nullptr;
        routing.expert = format == SLUICE_ROUTING_TOP_K ? expert.data() : nullptr;
        routing.map = format == SLUICE_ROUTING_MULTI_HOT ? map.data() : nullptr;
        routing.weight = weight.data();
        routing.num_weights = n * k;
      } else {
        for (std::size_t q = 0; q < caller_of_route.size(); ++q)
          caller_of_route[q] = static_cast<std::int64_t>(q);
      }
      sluice_plan* plan = nullptr;
      ASSERT_OK(sluice_layer_plan(layer, &routing, nullptr, &plan));
      // Arrays are read during the call only.
      std::fill(expert.begin(), expert.end(), 77);
      std::fill(weight.begin(), weight.end(), -1.0f);
      auto info = SLUICE_INIT(sluice_plan_info);
      EXPECT_OK(sluice_plan_get_info(plan, &info));
      EXPECT_EQ(info.num_tokens, n);
      EXPECT_EQ(info.num_routes, mine.num_routes());
      EXPECT_EQ(info.num_weights, routing.num_weights);
      EXPECT_EQ(info.num_local_slots, static_cast<std::int64_t>(weights.size()));

      sluice_context* context = nullptr;
      const auto x = in(p.x.data() + t0 * h, n, h), dy = in(p.dy.data() + t0 * h, n, h);
      const auto y = out(got.y.data() + t0 * h, n, h), dx = out(got.dx.data() + t0 * h, n, h);
      ASSERT_OK(sluice_layer_forward(layer, plan, &x, &y, nullptr, &context));
      sluice_plan_destroy(plan);  // the context pins it
      std::vector<float> dw(static_cast<std::size_t>(routing.num_weights),
                            std::numeric_limits<float>::quiet_NaN());
      ASSERT_OK(sluice_layer_backward(layer, context, &dy, &dx, dw.data(), routing.num_weights, nullptr));
      EXPECT_OK(sluice_layer_sync_replica_gradients(layer, nullptr));
      const auto q0 = p.routing.row_ptr[static_cast<std::size_t>(t0)];
      for (std::size_t q = 0; q < caller_of_route.size(); ++q) {
        float& value = dw[static_cast<std::size_t>(caller_of_route[q])];
        got.dw[static_cast<std::size_t>(q0) + q] = value;
        value = 0;
      }
      for (const float v : dw) EXPECT_EQ(v, 0.0f);  // no route, no derivative
      sluice_layer_destroy(layer);
      sluice_runtime_destroy(runtime);
      sluice_context_destroy(context);
    });
    expect_close(got, want, 2e-5);
    expect_same_bits(got, layer_result);
    EXPECT_GT(allocator.num_allocations, 0);
    EXPECT_EQ(allocator.num_live, 0);
    EXPECT_EQ(allocator.bytes_live, 0);
  }
}

TEST(CApi, ExplainFitsTheBuffer) {
  Single s;
  std::size_t needed = 0;
  EXPECT_OK(sluice_plan_explain(s.plan, 16, nullptr, 0, &needed));
  ASSERT_GT(needed, 40u);
  std::vector<char> whole(needed, '?'), part(12, '?');
  EXPECT_OK(sluice_plan_explain(s.plan, 16, whole.data(), whole.size(), nullptr));
  EXPECT_EQ(std::strlen(whole.data()), needed - 1);
  EXPECT_OK(sluice_plan_explain(s.plan, 16, part.data(), part.size() - 1, &needed));
  EXPECT_EQ(std::string(part.data()), std::string(whole.data()).substr(0, 10));
  EXPECT_EQ(part[11], '?');
  EXPECT_EQ(needed, whole.size());
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "buffer is null",
               sluice_plan_explain(s.plan, 16, nullptr, 5, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "row_bytes is -1",
               sluice_plan_explain(s.plan, -1, nullptr, 0, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "plan is null", sluice_plan_explain(nullptr, 1, nullptr, 0, nullptr));
}

// ---- memory and lifetimes --------------------------------------------------------------------------------------------

TEST(CApi, ContextsLieInTheCallersMemoryAndSteadyStepsTakeNoMore) {
  Single s;
  s.set_weights();
  const auto x = s.x_matrix();
  const auto dx = s.dx_matrix();
  std::int64_t settled = 0;
  for (int step = 0; step < 5; ++step) {
    sluice_context* context = s.forward();
    EXPECT_GT(s.allocator.num_live, 0);
    EXPECT_OK(sluice_layer_backward(s.layer, context, &x, &dx, s.dw.data(), 3, nullptr));
    sluice_context_destroy(context);
    if (step == 0) settled = s.allocator.num_allocations;
    EXPECT_EQ(s.allocator.num_allocations, settled) << "step " << step;
  }
  // Two in flight need twice the memory.
  sluice_context *a = s.forward(), *b = s.forward();
  EXPECT_GT(s.allocator.num_allocations, settled);
  sluice_context_destroy(b);
  sluice_context_destroy(a);
  sluice_plan_destroy(std::exchange(s.plan, nullptr));
  sluice_layer_destroy(std::exchange(s.layer, nullptr));
  EXPECT_EQ(s.allocator.num_live, 0);
}

TEST(CApi, AnAllocatorThatFailsIsOutOfMemoryAndEndsTheGroup) {
  std::array<CountingAllocator, 2> allocators;
  // A rank calls its allocator from its own thread, which so tells whose it is.
  static thread_local CountingAllocator* mine = nullptr;
  auto options = runtime_options(10000);
  options.allocator.allocate = [](std::size_t bytes, std::size_t alignment, void*) {
    return CountingAllocator::allocate(bytes, alignment, mine);
  };
  options.allocator.deallocate = [](void* memory, std::size_t bytes, std::size_t alignment, void*) {
    CountingAllocator::deallocate(memory, bytes, alignment, mine);
  };
  const Contiguous placement(2, 2);
  std::barrier planned(2);  // rank 1 ends the group only after rank 0 has left plan
  play(local_group(2, 1, options), [&](sluice_runtime* runtime) {
    const auto r = static_cast<std::size_t>(sluice_runtime_rank(runtime));
    mine = &allocators[r];
    if (r == 1) mine->fail_after = 3;
    auto layer_options = SLUICE_INIT(sluice_layer_options);
    layer_options.hidden = layer_options.ffn = 4;
    layer_options.save = SLUICE_SAVE_NONE;
    sluice_layer* layer = nullptr;
    ASSERT_OK(sluice_layer_create(runtime, &placement.placement, &layer_options, &layer));
    std::vector<float> w1(32, 1.0f), w2(16, 1.0f), x(4, 1.0f), y(4);
    auto w = SLUICE_INIT(sluice_expert_weights);
    w.w1 = in(w1.data(), 8, 4);
    w.w2 = in(w2.data(), 4, 4);
    ASSERT_OK(sluice_layer_set_weights(layer, &w, 1));
    const Routing routing{2, {0, 2}, {0, 1}, {1, 1}};
    const sluice_routing given = csr(routing);
    sluice_plan* plan = nullptr;
    const sluice_status status = sluice_layer_plan(layer, &given, nullptr, &plan);
    planned.arrive_and_wait();
    ASSERT_OK(status);
    const auto xm = in(x.data(), 1, 4);
    const auto ym = out(y.data(), 1, 4);
    sluice_context* context = nullptr;
    if (r == 1) {
      EXPECT_FAILS(SLUICE_OUT_OF_MEMORY, "context buffer of",
                   sluice_layer_forward(layer, plan, &xm, &ym, nullptr, &context));
    } else {
      EXPECT_FAILS(SLUICE_ABORTED, "context buffer of",
                   sluice_layer_forward(layer, plan, &xm, &ym, nullptr, &context));
    }
    EXPECT_EQ(context, nullptr);
    EXPECT_NE(sluice_runtime_async_error(runtime), SLUICE_OK);
    sluice_plan_destroy(plan);
    sluice_layer_destroy(layer);
    sluice_runtime_destroy(runtime);
  });
  for (const auto& a : allocators) EXPECT_EQ(a.num_live, 0);
}

// Everything that refers to something keeps it: all 120 orders, from this thread and from another.
TEST(CApi, AnyOrderOfDestruction) {
  std::array<int, 5> order = {0, 1, 2, 3, 4};
  int round = 0;
  do {
    CountingAllocator allocator;
    {
      auto topology = SLUICE_INIT(sluice_topology);
      topology.num_ranks = 1;
      const auto options = runtime_options(10000, &allocator);
      sluice_group* group = nullptr;
      sluice_runtime* runtime = nullptr;
      sluice_layer* layer = nullptr;
      sluice_plan* plan = nullptr;
      sluice_context* context = nullptr;
      ASSERT_OK(sluice_group_create_local(&topology, &options, &group));
      ASSERT_OK(sluice_group_take_runtime(group, 0, &runtime));
      const Contiguous placement(1, 1);
      auto layer_options = SLUICE_INIT(sluice_layer_options);
      layer_options.hidden = layer_options.ffn = 4;
      ASSERT_OK(sluice_layer_create(runtime, &placement.placement, &layer_options, &layer));
      const std::vector<float> w1(32, 1.0f), w2(16, 1.0f), x(4, 1.0f);
      std::vector<float> y(4);
      auto w = SLUICE_INIT(sluice_expert_weights);
      w.w1 = in(w1.data(), 8, 4);
      w.w2 = in(w2.data(), 4, 4);
      ASSERT_OK(sluice_layer_set_weights(layer, &w, 1));
      const Routing routing{1, {0, 1}, {0}, {1}};
      const sluice_routing given = csr(routing);
      ASSERT_OK(sluice_layer_plan(layer, &given, nullptr, &plan));
      const auto xm = in(x.data(), 1, 4);
      const auto ym = out(y.data(), 1, 4);
      ASSERT_OK(sluice_layer_forward(layer, plan, &xm, &ym, nullptr, &context));
      const auto destroy_all = [&] {
        for (const int which : order) {
          if (which == 0) sluice_group_destroy(group);
          if (which == 1) sluice_runtime_destroy(runtime);
          if (which == 2) sluice_layer_destroy(layer);
          if (which == 3) sluice_plan_destroy(plan);
          if (which == 4) sluice_context_destroy(context);
        }
      };
      if (round++ % 2) {
        std::thread(destroy_all).join();
      } else {
        destroy_all();
      }
    }
    EXPECT_GT(allocator.num_allocations, 0);
    EXPECT_EQ(allocator.num_live, 0);
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(round, 120);
}

// A garbage collector's thread destroys what it finds while the rank's own thread is inside a call: it neither waits for
// that call nor disturbs it. A second call, though, is refused.
TEST(CApi, DestructionDuringACallWaitsForItsEndWithoutBlocking) {
  CountingAllocator allocator;
  auto runtimes = local_group(2, 1, runtime_options(20000, &allocator));
  const Contiguous placement(2, 2);
  std::array<sluice_layer*, 2> layer{};
  std::array<sluice_context*, 2> context{};
  std::array<sluice_plan*, 2> plan{};
  const std::vector<float> w1(32, 1.0f), w2(16, 1.0f), x(4, 1.0f);
  play(runtimes, [&](sluice_runtime* runtime) {
    const auto r = static_cast<std::size_t>(sluice_runtime_rank(runtime));
    auto options = SLUICE_INIT(sluice_layer_options);
    options.hidden = options.ffn = 4;
    ASSERT_OK(sluice_layer_create(runtime, &placement.placement, &options, &layer[r]));
    auto w = SLUICE_INIT(sluice_expert_weights);
    w.w1 = in(w1.data(), 8, 4);
    w.w2 = in(w2.data(), 4, 4);
    ASSERT_OK(sluice_layer_set_weights(layer[r], &w, 1));
    const Routing routing{2, {0, 2}, {0, 1}, {1, 1}};
    const sluice_routing given = csr(routing);
    ASSERT_OK(sluice_layer_plan(layer[r], &given, nullptr, &plan[r]));
    std::vector<float> y(4);
    const auto xm = in(x.data(), 1, 4);
    const auto ym = out(y.data(), 1, 4);
    ASSERT_OK(sluice_layer_forward(layer[r], plan[r], &xm, &ym, nullptr, &context[r]));
  });
  const std::int64_t live = allocator.num_live;
  std::thread rank0([&] {  // waits for rank 1
    sluice_status status = SLUICE_OK;
    while ((status = sluice_runtime_barrier(runtimes[0])) == SLUICE_INVALID_STATE)
      std::this_thread::yield();  // the look below was inside
    EXPECT_EQ(status, SLUICE_OK);
  });
  // Until the barrier is entered, a call of this thread is let in.
  while (sluice_runtime_all_reduce_f32(runtimes[0], nullptr, -1) == SLUICE_INVALID_ARGUMENT)
    std::this_thread::yield();
  EXPECT_FAILS(SLUICE_INVALID_STATE, "another call is inside rank 0",
               sluice_layer_sync_replica_gradients(layer[0], nullptr));
  EXPECT_OK(sluice_runtime_async_error(runtimes[0]));  // any thread, at any time
  auto info = SLUICE_INIT(sluice_plan_info);
  EXPECT_OK(sluice_plan_get_info(plan[0], &info));
  sluice_context_destroy(context[0]);
  sluice_plan_destroy(plan[0]);
  sluice_layer_destroy(layer[0]);
  EXPECT_EQ(allocator.num_live, live);  // not yet: rank 0 is inside
  EXPECT_OK(sluice_runtime_barrier(runtimes[1]));
  rank0.join();
  EXPECT_LT(allocator.num_live, live);
  sluice_runtime_destroy(runtimes[0]);
  sluice_context_destroy(context[1]);
  sluice_plan_destroy(plan[1]);
  sluice_layer_destroy(layer[1]);
  sluice_runtime_destroy(runtimes[1]);
  EXPECT_EQ(allocator.num_live, 0);
}

// ---- failures of the group -------------------------------------------------------------------------------------------

TEST(CApi, DisagreementIsNamedOnEveryRank) {
  const Contiguous placement(3, 3);
  play(local_group(3, 1, runtime_options(10000)), [&](sluice_runtime* runtime) {
    auto options = SLUICE_INIT(sluice_layer_options);
    options.hidden = 4;
    options.ffn = sluice_runtime_rank(runtime) == 1 ? 8 : 4;
    sluice_layer* layer = nullptr;
    ASSERT_OK(sluice_layer_create(runtime, &placement.placement, &options, &layer));
    const Routing routing{3, {0}, {}, {}};
    const sluice_routing given = csr(routing);
    sluice_plan* plan = nullptr;
    EXPECT_FAILS(SLUICE_DISAGREEMENT, "rank(s) 1 disagree with rank(s) 0, 2",
                 sluice_layer_plan(layer, &given, nullptr, &plan));
    EXPECT_EQ(sluice_last_error_scope(), SLUICE_SCOPE_GROUP);
    EXPECT_EQ(plan, nullptr);
    sluice_layer_destroy(layer);
    sluice_runtime_destroy(runtime);
  });
}

TEST(CApi, ARankThatClosesIsLostAndNamed) {
  std::atomic<int> through{0};
  play(local_group(3, 1, runtime_options(20000)), [&](sluice_runtime* runtime) {
    EXPECT_OK(sluice_runtime_barrier(runtime));
    // A group that ends stops whoever is still inside, so all leave the barrier before anyone closes.
    ++through;
    while (through < 3) std::this_thread::yield();
    if (sluice_runtime_rank(runtime) != 1) {
      const auto begin = std::chrono::steady_clock::now();
      EXPECT_FAILS(SLUICE_PEER_LOST, "rank 1", sluice_runtime_barrier(runtime));
      EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
      EXPECT_FAILS(SLUICE_PEER_LOST, "rank 1", sluice_runtime_async_error(runtime));
      EXPECT_EQ(sluice_last_error_scope(), SLUICE_SCOPE_GROUP);
      EXPECT_FAILS(SLUICE_PEER_LOST, "rank 1", sluice_runtime_barrier(runtime));  // and stays so
    }
    sluice_runtime_destroy(runtime);
  });
}

TEST(CApi, ARankThatDoesNotComeIsNamedByTheDeadline) {
  std::atomic<int> returned{0};
  play(local_group(3, 1, runtime_options(300)), [&](sluice_runtime* runtime) {
    if (sluice_runtime_rank(runtime) != 2) {
      EXPECT_FAILS(SLUICE_TIMEOUT, "rank 2", sluice_runtime_barrier(runtime));
      ++returned;
    } else {
      while (returned < 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      EXPECT_FAILS(SLUICE_TIMEOUT, "rank 2", sluice_runtime_async_error(runtime));
    }
    sluice_runtime_destroy(runtime);
  });
}

TEST(CApi, AbortTellsTheReason) {
  play(local_group(2, 1, runtime_options(20000)), [](sluice_runtime* runtime) {
    if (sluice_runtime_rank(runtime) == 0) {
      EXPECT_OK(sluice_runtime_abort(runtime, "the data loader caught fire"));
    } else {
      EXPECT_FAILS(SLUICE_ABORTED, "the data loader caught fire", sluice_runtime_barrier(runtime));
    }
    EXPECT_FAILS(SLUICE_ABORTED, "rank 0 ended the group", sluice_runtime_async_error(runtime));
    sluice_runtime_destroy(runtime);
  });
}

TEST(CApi, RanksThatNobodyTakesGoWithTheGroup) {
  auto topology = SLUICE_INIT(sluice_topology);
  topology.num_ranks = 2;
  const auto options = runtime_options(20000);
  sluice_group* group = nullptr;
  sluice_runtime* runtime = nullptr;
  ASSERT_OK(sluice_group_create_local(&topology, &options, &group));
  ASSERT_OK(sluice_group_take_runtime(group, 0, &runtime));
  sluice_group_destroy(group);
  EXPECT_FAILS(SLUICE_PEER_LOST, "rank 1", sluice_runtime_barrier(runtime));
  sluice_runtime_destroy(runtime);
}

// ---- dispatcher ------------------------------------------------------------------------------------------------------

// Identity experts over four ranks in both layouts, by the getters alone: y = (sum of weights) x in exact integers.
TEST(CApi, TheDispatcherInBothLayouts) {
  std::mt19937_64 rng(kSeed + 1);
  const std::int32_t ranks = 4, num_experts = 6;
  const std::int64_t h = 4;
  Problem p = random_problem(rng, Shape{num_experts, h, 4}, 26, 0, 4);
  for (auto* v : {&p.x, &p.dy})
    for (float& e : *v) e = static_cast<float>(static_cast<int>(rng() % 9) - 4);
  for (float& w : p.routing.weight) w = static_cast<float>(rng() % 4) * 0.5f;
  const Contiguous placement(num_experts, ranks);
  const auto begin = deal_tokens(p.num_tokens(), ranks);
  for (const sluice_row_layout layout : {SLUICE_RANK_ROWS, SLUICE_EXPERT_ROWS}) {
    SCOPED_TRACE(str("layout ", layout, " seed ", kSeed + 1));
    const bool expert_rows = layout == SLUICE_EXPERT_ROWS;
    play(local_group(ranks, 2, runtime_options(20000)), [&](sluice_runtime* runtime) {
      const auto r = static_cast<std::size_t>(sluice_runtime_rank(runtime));
      const std::int64_t t0 = begin[r], n = begin[r + 1] - t0;
      const Routing routing = routing_slice(p.routing, t0, t0 + n);
      const sluice_routing given = csr(routing);
      auto options = SLUICE_INIT(sluice_dispatcher_options);
      options.hidden = h;
      options.layout = layout;
      options.alignment = expert_rows ? 8 : 0;
      sluice_dispatcher* dispatcher = nullptr;
      ASSERT_OK(sluice_dispatcher_create(runtime, &placement.placement, &options, &dispatcher));
      sluice_plan* plan = nullptr;
      ASSERT_OK(sluice_dispatcher_plan(dispatcher, &given, nullptr, &plan));
      auto received = SLUICE_INIT(sluice_received);
      ASSERT_OK(sluice_plan_get_received(plan, &received));
      sluice_context* context = nullptr;
      const auto x = in(p.x.data() + t0 * h, n, h), dy = in(p.dy.data() + t0 * h, n, h);
      ASSERT_OK(sluice_dispatcher_dispatch(dispatcher, plan, &x, nullptr, &context));
      sluice_const_matrix rows{};
      ASSERT_OK(sluice_dispatcher_rows(dispatcher, context, &rows));
      EXPECT_EQ(rows.cols, h);
      EXPECT_EQ(rows.dtype, SLUICE_F32);
      // Received rows are the tokens that the getters name.
      std::vector<float> kept(static_cast<float const*>(rows.data),
                              static_cast<float const*>(rows.data) + rows.rows * h);
      const std::int32_t* row_of_route = nullptr;
      const std::int64_t* slot_begin = nullptr;
      if (expert_rows) {
        ASSERT_OK(sluice_dispatcher_layout(dispatcher, context, &slot_begin, &row_of_route));
      } else {
        EXPECT_FAILS(SLUICE_INVALID_STATE, "only expert rows",
                     sluice_dispatcher_layout(dispatcher, context, &slot_begin, &row_of_route));
        EXPECT_EQ(rows.rows, received.num_rows);
      }
      std::int32_t source = 0;
      std::set<std::int32_t> positions;
      for (std::int64_t i = 0; i < received.num_rows; ++i) {
        while (received.source_ptr[source + 1] <= i) ++source;
        const std::int64_t token = begin[static_cast<std::size_t>(source)] + received.token[i];
        ASSERT_LT(received.route_ptr[i], received.route_ptr[i + 1]);
        for (std::int64_t q = received.route_ptr[i]; q < received.route_ptr[i + 1]; ++q) {
          positions.insert(received.position_of_route[q]);
          const std::int64_t at = expert_rows ? row_of_route[q] : i;
          for (std::int64_t j = 0; j < h; ++j)
            ASSERT_EQ(kept[static_cast<std::size_t>(at * h + j)],
                      p.x[static_cast<std::size_t>(token * h + j)]);
          if (expert_rows) {
            EXPECT_GE(at, slot_begin[received.slot[q]]);
            EXPECT_LT(at, slot_begin[received.slot[q] + 1]);
          }
        }
      }
      EXPECT_EQ(received.source_ptr[ranks], received.num_rows);
      EXPECT_EQ(static_cast<std::int64_t>(positions.size()), received.num_routes);

      // What the caller's experts make of rows: themselves, or with rank rows each route's w times them.
      const auto experts = [&](const std::vector<float>& from) {
        std::vector<float> made = from;
        if (!expert_rows)
          for (std::int64_t i = 0; i < received.num_rows; ++i) {
            float w = 0;
            for (std::int64_t q = received.route_ptr[i]; q < received.route_ptr[i + 1]; ++q)
              w += received.weight[q];
            for (std::int64_t j = i * h; j < (i + 1) * h; ++j) made[static_cast<std::size_t>(j)] *= w;
          }
        return made;
      };
      const float nan = std::numeric_limits<float>::quiet_NaN();
      std::vector<float> y(static_cast<std::size_t>(n * h), nan), dx = y, dw(routing.expert.size(), nan);
      const auto y_matrix = out(y.data(), n, h), dx_matrix = out(dx.data(), n, h);
      const std::vector<float> made = experts(kept);
      const auto made_matrix = in(made.data(), rows.rows, h);
      int stream = 0;
      EXPECT_FAILS(SLUICE_NOT_SUPPORTED, "stream",
                   sluice_dispatcher_combine(dispatcher, context, &made_matrix, &y_matrix, &stream));
      ASSERT_OK(sluice_dispatcher_combine(dispatcher, context, &made_matrix, &y_matrix, nullptr));
      EXPECT_FAILS(SLUICE_INVALID_STATE, "needs dispatch",
                   sluice_dispatcher_combine(dispatcher, context, &made_matrix, &y_matrix, nullptr));
      EXPECT_FAILS(SLUICE_INVALID_STATE, "rows only between",
                   sluice_dispatcher_rows(dispatcher, context, &rows));
      ASSERT_OK(sluice_dispatcher_combine_backward(dispatcher, context, &dy,
                                                   expert_rows ? &made_matrix : nullptr, nullptr));
      ASSERT_OK(sluice_dispatcher_rows(dispatcher, context, &rows));
      const std::vector<float> brought(static_cast<float const*>(rows.data),
                                       static_cast<float const*>(rows.data) + rows.rows * h);
      std::vector<float> received_dw;
      if (!expert_rows) {
        received_dw.resize(static_cast<std::size_t>(received.num_routes));
        for (std::int64_t i = 0; i < received.num_rows; ++i) {
          float dot = 0;
          for (std::int64_t j = i * h; j < (i + 1) * h; ++j)
            dot += brought[static_cast<std::size_t>(j)] * kept[static_cast<std::size_t>(j)];
          for (std::int64_t q = received.route_ptr[i]; q < received.route_ptr[i + 1]; ++q)
            received_dw[static_cast<std::size_t>(q)] = dot;
        }
      }
      const std::vector<float> dmade = experts(brought);
      const auto dmade_matrix = in(dmade.data(), rows.rows, h);
      ASSERT_OK(sluice_dispatcher_dispatch_backward(dispatcher, context, &dmade_matrix, received_dw.data(),
                                                    static_cast<std::int64_t>(received_dw.size()), &dx_matrix,
                                                    dw.data(), static_cast<std::int64_t>(dw.size()),
                                                    nullptr));
      for (std::int64_t t = 0; t < n; ++t) {
        float sum = 0, dot = 0;
        for (std::int64_t j = 0; j < h; ++j)
          dot += p.dy[static_cast<std::size_t>((t0 + t) * h + j)] *
                 p.x[static_cast<std::size_t>((t0 + t) * h + j)];
        for (auto q = routing.row_ptr[static_cast<std::size_t>(t)];
             q < routing.row_ptr[static_cast<std::size_t>(t) + 1]; ++q) {
          sum += routing.weight[static_cast<std::size_t>(q)];
          ASSERT_EQ(dw[static_cast<std::size_t>(q)], dot);
        }
        for (std::int64_t j = 0; j < h; ++j) {
          ASSERT_EQ(y[static_cast<std::size_t>(t * h + j)],
                    sum * p.x[static_cast<std::size_t>((t0 + t) * h + j)]);
          ASSERT_EQ(dx[static_cast<std::size_t>(t * h + j)],
                    sum * p.dy[static_cast<std::size_t>((t0 + t) * h + j)]);
        }
      }
      sluice_runtime_destroy(runtime);
      sluice_dispatcher_destroy(dispatcher);
      sluice_context_destroy(context);
      sluice_plan_destroy(plan);
    });
  }
}

TEST(CApi, DispatcherArgumentsAreChecked) {
  Single s;
  auto options = SLUICE_INIT(sluice_dispatcher_options);
  sluice_dispatcher* dispatcher = nullptr;
  const auto create = [&] {
    return sluice_dispatcher_create(s.runtime, &s.contiguous.placement, &options, &dispatcher);
  };
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "hidden is 0", create());
  options.hidden = 4;
  options.layout = 2;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "layout is 2", create());
  options.layout = SLUICE_EXPERT_ROWS;
  options.alignment = -8;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "alignment is -8", create());
  options.alignment = 0;
  options.reserved = 4;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "reserved", create());
  options.reserved = 0;
  EXPECT_EQ(dispatcher, nullptr);
  ASSERT_OK(create());
  const auto x = s.x_matrix();
  sluice_context* context = nullptr;
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "another dispatcher",
               sluice_dispatcher_dispatch(dispatcher, s.plan, &x, nullptr, &context));
  s.set_weights();
  context = s.forward();  // a layer's
  sluice_const_matrix rows{};
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "another dispatcher",
               sluice_dispatcher_rows(dispatcher, context, &rows));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "rows is null", sluice_dispatcher_rows(dispatcher, context, nullptr));
  EXPECT_FAILS(SLUICE_INVALID_ARGUMENT, "dispatcher is null",
               sluice_dispatcher_rows(nullptr, context, &rows));
  sluice_context_destroy(context);
  sluice_dispatcher_destroy(dispatcher);
}

}  // namespace
}  // namespace sluice
