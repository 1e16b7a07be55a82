#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <type_traits>

#include "sluice/base/error.hpp"
#include "sluice/dispatcher.hpp"
#include "sluice/gpu_moe_layer.hpp"
#include "sluice/moe_layer.hpp"
#include "sluice/runtime.hpp"
#include "sluice/sluice.h"

namespace sluice {
namespace {

#define SLUICE_SAME(c_name, cpp_name) \
  static_assert(c_name == static_cast<sluice_status>(ErrorCode::cpp_name), "status codes follow ErrorCode")
SLUICE_SAME(SLUICE_OK, kOk);
SLUICE_SAME(SLUICE_INVALID_ARGUMENT, kInvalidArgument);
SLUICE_SAME(SLUICE_INVALID_CONFIG, kInvalidConfig);
SLUICE_SAME(SLUICE_INVALID_ROUTING, kInvalidRouting);
SLUICE_SAME(SLUICE_INVALID_STATE, kInvalidState);
SLUICE_SAME(SLUICE_NOT_SUPPORTED, kNotSupported);
SLUICE_SAME(SLUICE_NOT_FOUND, kNotFound);
SLUICE_SAME(SLUICE_IO, kIo);
SLUICE_SAME(SLUICE_OUT_OF_MEMORY, kOutOfMemory);
SLUICE_SAME(SLUICE_DISAGREEMENT, kDisagreement);
SLUICE_SAME(SLUICE_TIMEOUT, kTimeout);
SLUICE_SAME(SLUICE_PEER_LOST, kPeerLost);
SLUICE_SAME(SLUICE_ABORTED, kAborted);
SLUICE_SAME(SLUICE_TRANSPORT, kTransport);
SLUICE_SAME(SLUICE_INTERNAL, kInternal);
#undef SLUICE_SAME
static_assert(SLUICE_SCOPE_CALL == static_cast<int>(Scope::kCall) &&
              SLUICE_SCOPE_CONTEXT == static_cast<int>(Scope::kContext) &&
              SLUICE_SCOPE_GROUP == static_cast<int>(Scope::kGroup) &&
              SLUICE_SCOPE_PROCESS == static_cast<int>(Scope::kProcess));

// ---- errors ----------------------------------------------------------------------------------------------------------

// A fixed buffer: reporting out of memory must not allocate, and a thread's end has nothing to destroy.
struct LastError {
  sluice_status status;
  char message[2048];
};
thread_local LastError last_error{SLUICE_OK, ""};

sluice_status fail(ErrorCode code, std::string_view message) noexcept {
  constexpr std::string_view kCut = "...";
  constexpr std::size_t kMost = sizeof(LastError::message) - 1;
  last_error.status = static_cast<sluice_status>(code);
  std::size_t length = std::min(message.size(), kMost);
  std::memcpy(last_error.message, message.data(), length);
  if (length < message.size())
    std::memcpy(last_error.message + kMost - kCut.size(), kCut.data(), kCut.size());
  last_error.message[length] = '\0';
  return last_error.status;
}

template <typename Call>
sluice_status guarded(Call&& call) noexcept {
  try {
    call();
    return SLUICE_OK;
  } catch (const Error& e) {
    return fail(e.code(), e.message());
  } catch (const std::bad_alloc&) {
    return fail(ErrorCode::kOutOfMemory, "host memory allocation failed");
  } catch (const std::exception& e) {
    return fail(ErrorCode::kInternal, e.what());
  } catch (...) {
    return fail(ErrorCode::kInternal, "an exception of unknown type");
  }
}

template <typename... Parts>
void require_argument(bool condition, const Parts&... parts) {
  Require(condition, ErrorCode::kInvalidArgument, parts...);
}

// ---- handles ---------------------------------------------------------------------------------------------------------

struct Handle;

// What all handles of one rank share. One call at a time is inside; handles that are destroyed meanwhile wait for its
// end, because layers and contexts touch the transport when they go.
class Rank {
 public:
  explicit Rank(std::unique_ptr<Runtime> r) : runtime(std::move(r)) {}
  const std::unique_ptr<Runtime> runtime;

  bool enter() noexcept { return !busy_.exchange(true); }
  void leave() noexcept {
    do {
      destroy_waiting();
      busy_.store(false);
      // What came after the look goes now, unless another call has begun: then that one's end sees to it.
    } while (has_waiting() && enter());
  }
  void destroy(Handle* handle) noexcept;

 private:
  bool has_waiting() noexcept {
    const std::lock_guard lock(mutex_);
    return first_ != nullptr;
  }
  void destroy_waiting() noexcept;

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  Handle* first_ = nullptr;  // in the order in which they were given up
  Handle* last_ = nullptr;
};

enum class HandleKind : std::uint32_t { kRuntime = 0x51, kLayer, kDispatcher, kPlan, kContext, kGpuLayer };
std::string_view to_string(HandleKind kind) {
  switch (kind) {
    case HandleKind::kRuntime:
      return "runtime";
    case HandleKind::kLayer:
      return "layer";
    case HandleKind::kDispatcher:
      return "dispatcher";
    case HandleKind::kPlan:
      return "plan";
    case HandleKind::kContext:
      return "context";
    case HandleKind::kGpuLayer:
      return "GPU layer";
  }
  return "handle of another kind";
}

struct Handle {
  Handle(HandleKind k, std::shared_ptr<Rank> r) : kind(k), rank(std::move(r)) {}
  virtual ~Handle() = default;
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  const HandleKind kind;
  const std::shared_ptr<Rank> rank;  // outlives the members of derived handles
  Handle* next = nullptr;
};

void Rank::destroy(Handle* handle) noexcept {
  {
    const std::lock_guard lock(mutex_);
    (last_ ? last_->next : first_) = handle;
    last_ = handle;
  }
  if (enter()) leave();
}

void Rank::destroy_waiting() noexcept {
  Handle* handle = nullptr;
  {
    const std::lock_guard lock(mutex_);
    handle = std::exchange(first_, nullptr);
    last_ = nullptr;
  }
  while (handle) delete std::exchange(handle, handle->next);
}

// One call inside a rank.
class Visit {
 public:
  explicit Visit(std::shared_ptr<Rank> rank) : rank_(std::move(rank)) {
    Require(rank_->enter(), ErrorCode::kInvalidState, "another call is inside rank ",
            rank_->runtime->rank().value, "; calls of one rank come from one thread at a time");
  }
  ~Visit() { rank_->leave(); }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  std::shared_ptr<Rank> rank_;  // the call may destroy the last handle
};

void require_kind(const Handle* handle, HandleKind kind) {
  require_argument(handle != nullptr, "the ", to_string(kind), " is null");
  require_argument(handle->kind == kind, "the handle given as ", to_string(kind), " is a ",
                   to_string(handle->kind));
}

void require_no_stream(const void* stream) {
  Require(stream == nullptr, ErrorCode::kNotSupported,
          "a stream was given, but this runtime computes on the CPU, where calls return when they are done; "
          "pass NULL");
}

template <typename T>
void clear_out(T** out, std::string_view what) {
  require_argument(out != nullptr, "the place for the new ", what, " is null");
  *out = nullptr;
}

}  // namespace
}  // namespace sluice

// ---- the handles' types ----------------------------------------------------------------------------------------------

struct sluice_group {
  std::mutex mutex;
  std::vector<std::unique_ptr<sluice::Runtime>> runtimes;  // null: taken
};
struct sluice_runtime final : sluice::Handle {
  explicit sluice_runtime(std::shared_ptr<sluice::Rank> r)
      : Handle(sluice::HandleKind::kRuntime, std::move(r)) {}
};
struct sluice_layer final : sluice::Handle {
  sluice_layer(std::shared_ptr<sluice::Rank> r, std::shared_ptr<sluice::MoeLayer> l)
      : Handle(sluice::HandleKind::kLayer, std::move(r)), layer(std::move(l)) {}
  const std::shared_ptr<sluice::MoeLayer> layer;
};
struct sluice_gpu_layer final : sluice::Handle {
  sluice_gpu_layer(std::shared_ptr<sluice::Rank> r, std::unique_ptr<sluice::GpuMoeLayer> l)
      : Handle(sluice::HandleKind::kGpuLayer, std::move(r)), layer(std::move(l)) {}
  const std::unique_ptr<sluice::GpuMoeLayer> layer;
};
struct sluice_dispatcher final : sluice::Handle {
  sluice_dispatcher(std::shared_ptr<sluice::Rank> r, std::shared_ptr<sluice::Dispatcher> d)
      : Handle(sluice::HandleKind::kDispatcher, std::move(r)), dispatcher(std::move(d)) {}
  const std::shared_ptr<sluice::Dispatcher> dispatcher;
};
struct sluice_plan final : sluice::Handle {
  explicit sluice_plan(std::shared_ptr<sluice::Rank> r) : Handle(sluice::HandleKind::kPlan, std::move(r)) {}
  std::shared_ptr<const void> owner;                      // the layer or dispatcher
  std::shared_ptr<const sluice::AdaptedRouting> adapted;  // null: the caller's order is the plan's
  std::shared_ptr<const sluice::Plan> plan;
  std::int64_t num_weights = 0;
  std::vector<std::int64_t> source_ptr;  // int64 [num_ranks + 1]
};
struct sluice_context final : sluice::Handle {
  sluice_context(std::shared_ptr<sluice::Rank> r, const sluice_plan& plan)
      : Handle(sluice::HandleKind::kContext, std::move(r)),
        owner(plan.owner),
        adapted(plan.adapted),
        num_weights(plan.num_weights) {}
  const std::shared_ptr<const void> owner;  // outlives the context below
  const std::shared_ptr<const sluice::AdaptedRouting> adapted;
  const std::int64_t num_weights;
  sluice::Context context;
};

namespace sluice {
namespace {

template <HandleKind kKind, typename T>
T& checked(T* handle) {
  require_kind(handle, kKind);
  return *handle;
}
sluice_runtime& checked(sluice_runtime* h) {
  return checked<HandleKind::kRuntime>(h);
}
sluice_layer& checked(sluice_layer* h) {
  return checked<HandleKind::kLayer>(h);
}
sluice_gpu_layer& checked(sluice_gpu_layer* h) {
  return checked<HandleKind::kGpuLayer>(h);
}
sluice_dispatcher& checked(sluice_dispatcher* h) {
  return checked<HandleKind::kDispatcher>(h);
}
const sluice_plan& checked(const sluice_plan* h) {
  return checked<HandleKind::kPlan>(h);
}
sluice_context& checked(sluice_context* h) {
  return checked<HandleKind::kContext>(h);
}

template <typename T>
void destroy(T* handle) noexcept {
  if (!handle) return;
  const std::shared_ptr<Rank> rank = handle->rank;  // the last one closes the rank here, outside of it
  rank->destroy(handle);
}

const sluice_plan& owned(const sluice_plan* plan, const std::shared_ptr<const void>& owner,
                         std::string_view what) {
  const sluice_plan& p = checked(plan);
  require_argument(p.owner == owner, "the plan was made by another ", what);
  return p;
}
sluice_context& owned(sluice_context* context, const std::shared_ptr<const void>& owner,
                      std::string_view what) {
  sluice_context& c = checked(context);
  require_argument(c.owner == owner, "the context comes from another ", what);
  return c;
}

// ---- reading what the caller gives -----------------------------------------------------------------------------------

constexpr std::size_t kLargestStruct = 4096;  // a bound for members that were never set

void check_struct_size(std::size_t size, std::string_view name) {
  require_argument(size >= sizeof(std::size_t) && size <= kLargestStruct, "struct_size of ", name, " is ",
                   size, "; set it to sizeof(", name, ")");
}

// The caller's structure as this version knows it: members that it is too small for are zero.
template <typename T>
T read_struct(const T* given, std::string_view name) {
  static_assert(std::is_trivially_copyable_v<T>);
  require_argument(given != nullptr, name, " is null");
  const std::size_t size = given->struct_size;
  check_struct_size(size, name);
  T out{};
  std::memcpy(&out, given, std::min(size, sizeof(T)));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(T); i < size; ++i)
    require_argument(bytes[i] == 0, name, " has ", size, " bytes and sets the one at ", i, "; this library (",
                     SLUICE_VERSION_TEXT, ") knows the first ", sizeof(T),
                     ". Leave what it does not know zero, or use a newer library");
  return out;
}

template <typename T>
void write_struct(T* out, T full, std::string_view name) {
  require_argument(out != nullptr, name, " is null");
  const std::size_t size = out->struct_size;
  check_struct_size(size, name);
  full.struct_size = size;
  std::memcpy(out, &full, std::min(size, sizeof(T)));
  if (size > sizeof(T)) std::memset(reinterpret_cast<unsigned char*>(out) + sizeof(T), 0, size - sizeof(T));
}

void check_reserved(std::int32_t value, std::string_view name) {
  require_argument(value == 0, "reserved member of ", name, " is ", value, ", must be 0");
}

// The enumerator at `value`, which counts `allowed` from 0.
template <typename Enum>
Enum pick(std::int32_t value, std::initializer_list<Enum> allowed, std::string_view what) {
  require_argument(value >= 0 && static_cast<std::size_t>(value) < allowed.size(), what, " is ", value,
                   ", must be 0..", allowed.size() - 1);
  return allowed.begin()[value];
}
DType read_dtype(std::int32_t value, std::string_view what) {
  return pick(value, {DType::kF32, DType::kBF16}, what);
}
Exchange read_exchange(std::int32_t value) {
  return pick(value, {Exchange::kGateway, Exchange::kDirect}, "exchange");
}

template <typename T>
std::span<T> read_array(T* data, std::int64_t size, std::string_view what) {
  require_argument(size >= 0, what, " has ", size, " elements");
  require_argument(data != nullptr || size == 0, what, " is null but has ", size, " elements");
  require_argument(reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0, what, " is not aligned to ",
                   alignof(T), " bytes");
  return {data, static_cast<std::size_t>(size)};
}

template <typename View, typename Matrix>
View read_matrix(const Matrix* matrix, std::string_view what) {
  require_argument(matrix != nullptr, what, " is null");
  const Matrix& m = *matrix;
  const DType dtype = read_dtype(m.dtype, str("dtype of ", what));
  check_reserved(m.reserved, what);
  require_argument(m.rows >= 0 && m.cols >= 0, what, " has shape [", m.rows, ", ", m.cols, "]");
  const std::int64_t stride = m.row_stride == 0 ? m.cols : m.row_stride;
  require_argument(stride >= m.cols, what, " has row stride ", stride, ", must be at least its ", m.cols,
                   " columns");
  std::int64_t bytes = 0;
  require_argument(!__builtin_mul_overflow(m.rows, stride, &bytes) &&
                       !__builtin_mul_overflow(bytes, std::int64_t{4}, &bytes),
                   what, " has ", m.rows, " rows of ", stride, " elements, more than memory can hold");
  require_argument(m.data != nullptr || m.rows == 0 || m.cols == 0, what, " is null but has ", m.rows,
                   " rows");
  require_argument(reinterpret_cast<std::uintptr_t>(m.data) % size_of(dtype) == 0, what,
                   " is not aligned to its ", to_string(dtype), " elements");
  using Byte = std::conditional_t<std::is_same_v<Matrix, sluice_matrix>, std::byte, const std::byte>;
  return {static_cast<Byte*>(m.data), dtype, m.rows, m.cols, stride};
}
ConstMatrixView read_view(const sluice_const_matrix* m, std::string_view what) {
  return read_matrix<ConstMatrixView>(m, what);
}
MatrixView read_view(const sluice_matrix* m, std::string_view what) {
  return read_matrix<MatrixView>(m, what);
}

Topology read_topology(const sluice_topology* given) {
  const sluice_topology t = read_struct(given, "sluice_topology");
  constexpr std::int32_t kMostRanks = 1 << 20;
  require_argument(t.num_ranks >= 1 && t.num_ranks <= kMostRanks, "num_ranks is ", t.num_ranks,
                   ", must be 1..", kMostRanks);
  require_argument(t.num_nodes >= 0 && t.num_nodes <= t.num_ranks, "num_nodes is ", t.num_nodes,
                   ", must be 0..", t.num_ranks);
  const auto build = [&] {
    if (!t.node_of_rank) return Topology::uniform(t.num_ranks, t.num_nodes == 0 ? 1 : t.num_nodes);
    std::vector<std::vector<std::int32_t>> nodes;
    for (std::int32_t r = 0; r < t.num_ranks; ++r) {
      const std::int32_t node = t.node_of_rank[r];
      require_argument(node >= 0 && node < t.num_ranks, "node_of_rank[", r, "] is ", node, ", must be 0..",
                       t.num_ranks - 1);
      if (nodes.size() <= static_cast<std::size_t>(node)) nodes.resize(static_cast<std::size_t>(node) + 1);
      nodes[static_cast<std::size_t>(node)].push_back(r);
    }
    require_argument(t.num_nodes == 0 || static_cast<std::size_t>(t.num_nodes) == nodes.size(),
                     "num_nodes is ", t.num_nodes, ", but node_of_rank names ", nodes.size());
    Topology topology(std::move(nodes));
    topology.set_declared(true);
    return topology;
  };
  Topology topology = build();
  const auto link = [](double bytes_per_s, std::int64_t latency_ns, std::string_view what) {
    require_argument(bytes_per_s >= 0 && bytes_per_s < 1e18 && latency_ns >= 0, "the link ", what, " has ",
                     bytes_per_s, " bytes/s and a latency of ", latency_ns, " ns; neither may be negative");
    LinkSpeed speed;
    speed.bytes_per_s = bytes_per_s;
    speed.latency = std::chrono::nanoseconds(latency_ns);
    return speed;
  };
  topology.in_node = link(t.in_node_bytes_per_s, t.in_node_latency_ns, "in a node");
  topology.across_nodes = link(t.across_nodes_bytes_per_s, t.across_nodes_latency_ns, "across nodes");
  if (topology.num_nodes() > 1 || topology.in_node.limited() || topology.across_nodes.limited())
    topology.set_declared(true);
  return topology;
}

RuntimeOptions read_runtime_options(const sluice_runtime_options* given) {
  RuntimeOptions out;
  if (!given) return out;
  const sluice_runtime_options o = read_struct(given, "sluice_runtime_options");
  constexpr std::int64_t kMostMs = 1'000'000'000;  // eleven days
  require_argument(o.timeout_ms >= 0 && o.timeout_ms <= kMostMs, "timeout_ms is ", o.timeout_ms,
                   ", must be 0..", kMostMs);
  check_reserved(o.reserved, "sluice_runtime_options");
  check_reserved(o.reserved2, "sluice_runtime_options");
  out.device = pick(o.device, {ComputeDevice::kCpu, ComputeDevice::kCuda}, "device");
  require_argument(o.threads_per_rank >= 0, "threads_per_rank is ", o.threads_per_rank,
                   ", must not be negative");
  if (o.timeout_ms > 0) out.timeout = std::chrono::milliseconds(o.timeout_ms);
  if (o.threads_per_rank > 0) out.threads_per_rank = o.threads_per_rank;
  out.allocator.allocate = o.allocator.allocate;
  out.allocator.deallocate = o.allocator.deallocate;
  out.allocator.user = o.allocator.user;
  return out;
}

std::vector<ExpertKind> read_kinds(const std::int32_t* kind, std::int32_t num_experts) {
  require_argument(num_experts >= 1, "num_experts is ", num_experts, ", must be at least 1");
  std::vector<ExpertKind> out;
  if (!kind) return out;
  for (std::int32_t e = 0; e < num_experts; ++e)
    out.push_back(
        pick(kind[e], {ExpertKind::kFFN, ExpertKind::kZero, ExpertKind::kCopy}, str("expert_kind[", e, "]")));
  return out;
}

Placement read_placement(const sluice_placement* given, std::int32_t num_ranks) {
  const sluice_placement p = read_struct(given, "sluice_placement");
  const auto kinds = read_kinds(p.expert_kind, p.num_experts);
  const auto expert = read_array(p.slot_expert, p.num_slots, "slot_expert");
  const auto rank = read_array(p.slot_rank, p.num_slots, "slot_rank");
  std::vector<std::int32_t> next(static_cast<std::size_t>(num_ranks), 0);
  std::vector<Slot> slots;
  for (std::size_t i = 0; i < expert.size(); ++i) {
    require_argument(rank[i] >= 0 && rank[i] < num_ranks, "slot_rank[", i, "] is ", rank[i], ", must be 0..",
                     num_ranks - 1);
    slots.push_back({expert[i], rank[i],
                     p.slot_local_index ? p.slot_local_index[i] : next[static_cast<std::size_t>(rank[i])]++});
  }
  return make_placement(p.num_experts, num_ranks, slots, kinds, {}, p.version);
}

ExpertActivation read_activation(std::int32_t value) {
  return pick(value, {ExpertActivation::kSwiGLU, ExpertActivation::kGelu, ExpertActivation::kRelu},
              "activation");
}

MoeLayerOptions read_layer_options(const sluice_layer_options* given) {
  const sluice_layer_options o = read_struct(given, "sluice_layer_options");
  MoeLayerOptions out;
  out.hidden = o.hidden;
  out.ffn = o.ffn;
  out.activation = read_activation(o.activation);
  out.dtype = read_dtype(o.dtype, "dtype");
  out.wire_dtype = read_dtype(o.wire_dtype, "wire_dtype");
  out.combine_dtype = read_dtype(o.combine_dtype, "combine_dtype");
  out.save = pick(o.save, {Save::kActivations, Save::kRows, Save::kNone}, "save");
  out.schedule.policy = pick(o.schedule,
                             {SchedulePolicy::kSequential, SchedulePolicy::kPipelined,
                              SchedulePolicy::kBySource, SchedulePolicy::kHierarchical},
                             "schedule");
  out.schedule.exchange = read_exchange(o.exchange);
  out.schedule.num_chunks = o.num_chunks == 0 ? 1 : o.num_chunks;
  return out;
}

DispatcherOptions read_dispatcher_options(const sluice_dispatcher_options* given) {
  const sluice_dispatcher_options o = read_struct(given, "sluice_dispatcher_options");
  check_reserved(o.reserved, "sluice_dispatcher_options");
  DispatcherOptions out;
  out.hidden = o.hidden;
  out.dtype = read_dtype(o.dtype, "dtype");
  out.wire_dtype = read_dtype(o.wire_dtype, "wire_dtype");
  out.combine_dtype = read_dtype(o.combine_dtype, "combine_dtype");
  out.layout = pick(o.layout, {RowLayout::kRankRows, RowLayout::kExpertRows}, "layout");
  out.alignment = o.alignment == 0 ? 1 : o.alignment;
  out.exchange = read_exchange(o.exchange);
  return out;
}

// num_tokens * per_token, which `what` must have.
void check_rectangle(std::int64_t num_weights, std::int64_t num_tokens, std::int64_t per_token,
                     std::string_view what) {
  std::int64_t expected = 0;
  require_argument(!__builtin_mul_overflow(num_tokens, per_token, &expected) && num_weights == expected,
                   "num_weights is ", num_weights, ", must be num_tokens * ", what, " = ", num_tokens, " * ",
                   per_token);
}

// The routing as the planner wants it. Fills `adapted` where the caller's order is another.
RoutingView read_routing(const sluice_routing* given, std::int32_t num_experts,
                         std::shared_ptr<const AdaptedRouting>& adapted, std::int64_t& num_weights) {
  const sluice_routing r = read_struct(given, "sluice_routing");
  require_argument(r.num_tokens >= 0, "num_tokens is ", r.num_tokens, ", must not be negative");
  const auto weight = read_array(r.weight, r.num_weights, "weight");
  num_weights = r.num_weights;
  switch (r.format) {
    case SLUICE_ROUTING_CSR: {
      require_argument(r.row_ptr != nullptr,
                       "row_ptr is null; it has num_tokens + 1 elements, so at least one");
      const auto row_ptr = read_array(r.row_ptr, r.num_tokens + 1, "row_ptr");
      return {num_experts, row_ptr, read_array(r.expert, r.num_weights, "expert"), weight};
    }
    case SLUICE_ROUTING_TOP_K:
      require_argument(r.k >= 0, "k is ", r.k, ", must not be negative");
      check_rectangle(r.num_weights, r.num_tokens, r.k, "k");
      adapted = std::make_shared<const AdaptedRouting>(routing_from_topk(
          read_array(r.expert, r.num_weights, "expert"), weight, r.num_tokens, r.k, num_experts));
      return adapted->routing;
    case SLUICE_ROUTING_MULTI_HOT:
      check_rectangle(r.num_weights, r.num_tokens, num_experts, "num_experts");
      adapted = std::make_shared<const AdaptedRouting>(
          routing_from_multihot(read_array(r.map, r.num_weights, "map"), weight, r.num_tokens, num_experts));
      return adapted->routing;
    default:
      throw Error(ErrorCode::kInvalidArgument, str("routing format is ", r.format, ", must be 0..2"));
  }
}

template <typename Owner>
std::unique_ptr<sluice_plan> make_plan(const std::shared_ptr<Rank>& rank, const std::shared_ptr<Owner>& owner,
                                       std::int32_t num_experts, const sluice_routing* routing) {
  auto handle = std::make_unique<sluice_plan>(rank);
  handle->owner = owner;
  const RoutingView view = read_routing(routing, num_experts, handle->adapted, handle->num_weights);
  handle->source_ptr.assign(static_cast<std::size_t>(rank->runtime->num_ranks()) + 1, 0);
  handle->plan = owner->plan(view);
  for (const Segment& segment : handle->plan->recv2.segments)
    handle->source_ptr[static_cast<std::size_t>(segment.source) + 1] += segment.num_rows;
  std::partial_sum(handle->source_ptr.begin(), handle->source_ptr.end(), handle->source_ptr.begin());
  return handle;
}

// Where per-route results go: straight to the caller, or by way of the plan's order.
class RouteResults {
 public:
  RouteResults(const sluice_context& context, float* dw, std::int64_t num_dw)
      : adapted_(context.adapted.get()), caller_(read_array(dw, num_dw, "dw")) {
    require_argument(num_dw == context.num_weights, "dw has ", num_dw, " elements, the routing has ",
                     context.num_weights, " weights");
    if (adapted_) own_.resize(adapted_->routing.weight.size());
  }
  std::span<float> span() { return adapted_ ? std::span<float>(own_) : caller_; }
  void deliver() {
    if (adapted_) scatter_to_caller(*adapted_, own_, caller_);
  }

 private:
  const AdaptedRouting* adapted_;
  std::span<float> caller_;
  std::vector<float> own_;
};

}  // namespace
}  // namespace sluice

using namespace sluice;  // NOLINT: the functions below are the boundary

// ---- status ----------------------------------------------------------------------------------------------------------

const char* sluice_version(void) {
  return SLUICE_VERSION_TEXT;
}
int32_t sluice_abi_version(void) {
  return SLUICE_ABI_VERSION;
}
// The texts are literals, so they end with a 0.
const char* sluice_status_name(sluice_status status) {
  return to_string(static_cast<ErrorCode>(status)).data();
}
sluice_scope sluice_status_scope(sluice_status status) {
  return static_cast<sluice_scope>(scope_of(static_cast<ErrorCode>(status)));
}
const char* sluice_scope_name(sluice_scope scope) {
  return to_string(static_cast<Scope>(scope)).data();
}
const char* sluice_last_error_message(void) {
  return last_error.message;
}
sluice_status sluice_last_error_status(void) {
  return last_error.status;
}
sluice_scope sluice_last_error_scope(void) {
  return sluice_status_scope(last_error.status);
}

// ---- group and runtime -----------------------------------------------------------------------------------------------

sluice_status sluice_group_create_local(const sluice_topology* topology,
                                        const sluice_runtime_options* options, sluice_group** group) {
  return guarded([&] {
    clear_out(group, "group");
    auto handle = std::make_unique<sluice_group>();
    handle->runtimes = Runtime::create_local(read_topology(topology), read_runtime_options(options));
    *group = handle.release();
  });
}

int32_t sluice_group_num_ranks(const sluice_group* group) {
  return group ? static_cast<int32_t>(group->runtimes.size()) : -1;
}

sluice_status sluice_group_take_runtime(sluice_group* group, int32_t rank, sluice_runtime** runtime) {
  return guarded([&] {
    clear_out(runtime, "runtime");
    require_argument(group != nullptr, "the group is null");
    const std::lock_guard lock(group->mutex);
    require_argument(rank >= 0 && static_cast<std::size_t>(rank) < group->runtimes.size(), "rank is ", rank,
                     ", must be 0..", group->runtimes.size() - 1);
    std::unique_ptr<Runtime>& taken = group->runtimes[static_cast<std::size_t>(rank)];
    Require(taken != nullptr, ErrorCode::kInvalidState, "rank ", rank, " was taken out of the group before");
    *runtime = new sluice_runtime(std::make_shared<Rank>(std::move(taken)));
  });
}

void sluice_group_destroy(sluice_group* group) {
  delete group;
}

sluice_status sluice_runtime_create(const char* transport, const sluice_topology* nodes,
                                    const sluice_runtime_options* options, sluice_runtime** runtime) {
  return guarded([&] {
    clear_out(runtime, "runtime");
    require_argument(transport != nullptr, "the transport's name is null");
    const RuntimeOptions read = read_runtime_options(options);
    std::unique_ptr<Topology> topology;
    if (nodes) topology = std::make_unique<Topology>(read_topology(nodes));
    *runtime = new sluice_runtime(std::make_shared<Rank>(Runtime::create(transport, topology.get(), read)));
  });
}

void sluice_runtime_destroy(sluice_runtime* runtime) {
  destroy(runtime);
}
int32_t sluice_runtime_rank(const sluice_runtime* runtime) {
  return runtime ? runtime->rank->runtime->rank().value : -1;
}
int32_t sluice_runtime_num_ranks(const sluice_runtime* runtime) {
  return runtime ? runtime->rank->runtime->num_ranks() : -1;
}
int32_t sluice_runtime_num_nodes(const sluice_runtime* runtime) {
  return runtime ? runtime->rank->runtime->topology().num_nodes() : -1;
}
int32_t sluice_runtime_gpu(const sluice_runtime* runtime) {
  return runtime ? gpu_of(*runtime->rank->runtime) : -1;
}

sluice_status sluice_runtime_async_error(const sluice_runtime* runtime) {
  return guarded([&] {
    require_kind(runtime, HandleKind::kRuntime);
    runtime->rank->runtime->async_error().throw_if_error();
  });
}

sluice_status sluice_runtime_abort(sluice_runtime* runtime, const char* reason) {
  return guarded(
      [&] { checked(runtime).rank->runtime->abort("abort", reason ? reason : "no reason was given"); });
}

sluice_status sluice_runtime_all_reduce_f32(sluice_runtime* runtime, float* data, int64_t n) {
  return guarded([&] {
    const Visit visit(checked(runtime).rank);
    runtime->rank->runtime->all_reduce_sum(read_array(data, n, "data"));
  });
}
sluice_status sluice_runtime_all_reduce_f64(sluice_runtime* runtime, double* data, int64_t n) {
  return guarded([&] {
    const Visit visit(checked(runtime).rank);
    runtime->rank->runtime->all_reduce_sum(read_array(data, n, "data"));
  });
}

sluice_status sluice_runtime_all_gather_i64(sluice_runtime* runtime, const int64_t* values, int64_t n,
                                            int64_t* gathered) {
  return guarded([&] {
    const Visit visit(checked(runtime).rank);
    const auto own = read_array(values, n, "values");
    require_argument(gathered != nullptr || n == 0, "gathered is null but gets ", n,
                     " values from each rank");
    const std::vector<std::int64_t> all = runtime->rank->runtime->all_gather(own);
    std::copy(all.begin(), all.end(), gathered);
  });
}

sluice_status sluice_runtime_broadcast(sluice_runtime* runtime, void* data, int64_t n, int32_t root) {
  return guarded([&] {
    const Visit visit(checked(runtime).rank);
    Runtime& r = *runtime->rank->runtime;
    require_argument(root >= 0 && root < r.num_ranks(), "root is ", root, ", must be 0..", r.num_ranks() - 1);
    r.broadcast(read_array(static_cast<std::byte*>(data), n, "data"), RankId(root));
  });
}

sluice_status sluice_runtime_barrier(sluice_runtime* runtime) {
  return guarded([&] {
    const Visit visit(checked(runtime).rank);
    runtime->rank->runtime->barrier();
  });
}

// ---- placement -------------------------------------------------------------------------------------------------------

sluice_status sluice_placement_contiguous(int32_t num_experts, int32_t num_ranks, const int32_t* expert_kind,
                                          int32_t capacity, int32_t* slot_expert, int32_t* slot_rank,
                                          int32_t* slot_local_index, int32_t* num_slots) {
  return guarded([&] {
    require_argument(num_ranks >= 1, "num_ranks is ", num_ranks, ", must be at least 1");
    const Placement p = contiguous_placement(num_experts, num_ranks, read_kinds(expert_kind, num_experts));
    if (num_slots) *num_slots = p.num_slots();
    const auto write = [&](const std::vector<std::int32_t>& from, int32_t* to) {
      if (!to) return;
      require_argument(p.num_slots() <= capacity, "capacity is ", capacity, ", the placement has ",
                       p.num_slots(), " slots");
      std::copy(from.begin(), from.end(), to);
    };
    write(p.slot_expert, slot_expert);
    write(p.slot_rank, slot_rank);
    write(p.slot_local_index, slot_local_index);
  });
}

// ---- plan ------------------------------------------------------------------------------------------------------------

sluice_status sluice_plan_get_info(const sluice_plan* plan, sluice_plan_info* info) {
  return guarded([&] {
    const sluice_plan& handle = checked(plan);
    const Plan& p = *handle.plan;
    sluice_plan_info out{};
    out.num_tokens = p.num_tokens;
    out.num_routes = p.num_routes;
    out.num_weights = handle.num_weights;
    out.num_experts = p.num_experts;
    out.num_local_slots = p.num_local_slots;
    out.received_rows = p.recv2.num_rows();
    out.received_routes = p.recv2.num_routes();
    out.handed_on_rows = p.recv1.num_rows();
    out.rows_same_rank = p.traffic.rows_same_rank;
    out.rows_in_node = p.traffic.rows_in_node;
    out.rows_across_nodes = p.traffic.rows_across_nodes;
    out.flat_rows_in_node = p.traffic.flat_rows_in_node;
    out.flat_rows_across_nodes = p.traffic.flat_rows_across_nodes;
    out.routes_everywhere = p.traffic.routes_everywhere;
    out.placement_version = p.placement_version;
    out.agreement_hash = p.agreement_hash;
    write_struct(info, out, "sluice_plan_info");
  });
}

sluice_status sluice_plan_get_received(const sluice_plan* plan, sluice_received* received) {
  return guarded([&] {
    const sluice_plan& handle = checked(plan);
    const Plan& p = *handle.plan;
    sluice_received out{};
    out.num_rows = p.recv2.num_rows();
    out.num_routes = p.recv2.num_routes();
    out.source_ptr = handle.source_ptr.data();
    out.token = p.recv2.token.data();
    out.route_ptr = p.recv2.route_ptr.data();
    out.slot = p.recv2.slot.data();
    out.weight = p.recv2.weight.data();
    out.position_of_route = p.position_of_route.data();
    write_struct(received, out, "sluice_received");
  });
}

sluice_status sluice_plan_explain(const sluice_plan* plan, int64_t row_bytes, char* buffer, size_t capacity,
                                  size_t* needed) {
  return guarded([&] {
    const sluice_plan& handle = checked(plan);
    require_argument(row_bytes >= 0, "row_bytes is ", row_bytes, ", must not be negative");
    require_argument(buffer != nullptr || capacity == 0, "buffer is null but has a capacity of ", capacity);
    const std::string text = handle.plan->explain(row_bytes);
    if (needed) *needed = text.size() + 1;
    if (capacity == 0) return;
    const std::size_t length = std::min(text.size(), capacity - 1);
    std::memcpy(buffer, text.data(), length);
    buffer[length] = '\0';
  });
}

void sluice_plan_destroy(sluice_plan* plan) {
  destroy(plan);
}

// ---- layer -----------------------------------------------------------------------------------------------------------

sluice_status sluice_layer_create(sluice_runtime* runtime, const sluice_placement* placement,
                                  const sluice_layer_options* options, sluice_layer** layer) {
  return guarded([&] {
    clear_out(layer, "layer");
    const std::shared_ptr<Rank>& rank = checked(runtime).rank;
    const Visit visit(rank);
    *layer = new sluice_layer(rank, std::make_shared<MoeLayer>(
                                        *rank->runtime, read_placement(placement, rank->runtime->num_ranks()),
                                        read_layer_options(options)));
  });
}

void sluice_layer_destroy(sluice_layer* layer) {
  destroy(layer);
}

sluice_status sluice_layer_set_weights(sluice_layer* layer, const sluice_expert_weights* slots,
                                       int32_t num_slots) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    require_argument(num_slots >= 0, "num_slots is ", num_slots, ", must not be negative");
    require_argument(slots != nullptr || num_slots == 0, "slots is null but num_slots is ", num_slots);
    std::vector<ExpertWeights> weights;
    const auto* at = reinterpret_cast<const unsigned char*>(slots);
    for (std::int32_t i = 0; i < num_slots; ++i) {
      // Elements lie as far apart as the caller's version of the structure is long.
      const auto* given = reinterpret_cast<const sluice_expert_weights*>(at);
      const sluice_expert_weights w = read_struct(given, "sluice_expert_weights");
      require_argument(given->struct_size == slots->struct_size, "slot ", i, " has struct_size ",
                       given->struct_size, ", the first has ", slots->struct_size);
      weights.push_back({read_view(&w.w1, str("w1 of slot ", i)), read_view(&w.w2, str("w2 of slot ", i)),
                         w.grad_w1, w.grad_w2});
      at += given->struct_size;
    }
    layer->layer->set_weights(weights);
  });
}

sluice_status sluice_layer_plan(sluice_layer* layer, const sluice_routing* routing, void* stream,
                                sluice_plan** plan) {
  return guarded([&] {
    clear_out(plan, "plan");
    const Visit visit(checked(layer).rank);
    require_no_stream(stream);
    *plan = make_plan(layer->rank, layer->layer, layer->layer->placement().num_experts, routing).release();
  });
}

sluice_status sluice_layer_forward(sluice_layer* layer, const sluice_plan* plan, const sluice_const_matrix* x,
                                   const sluice_matrix* y, void* stream, sluice_context** context) {
  return guarded([&] {
    if (context) *context = nullptr;
    const Visit visit(checked(layer).rank);
    require_no_stream(stream);
    const sluice_plan& p = owned(plan, layer->layer, "layer");
    auto handle = std::make_unique<sluice_context>(layer->rank, p);
    handle->context = layer->layer->forward(p.plan, read_view(x, "x"), read_view(y, "y"));
    if (context) *context = handle.release();
  });
}

sluice_status sluice_layer_backward(sluice_layer* layer, sluice_context* context,
                                    const sluice_const_matrix* dy, const sluice_matrix* dx, float* dw,
                                    int64_t num_dw, void* stream) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    require_no_stream(stream);
    sluice_context& c = owned(context, layer->layer, "layer");
    RouteResults results(c, dw, num_dw);
    layer->layer->backward(c.context, read_view(dy, "dy"), read_view(dx, "dx"), results.span());
    results.deliver();
  });
}

sluice_status sluice_layer_sync_replica_gradients(sluice_layer* layer, void* stream) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    require_no_stream(stream);
    layer->layer->sync_replica_gradients();
  });
}

sluice_status sluice_layer_memory_bytes(sluice_layer* layer, int64_t* bytes) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    require_argument(bytes != nullptr, "bytes is null");
    *bytes = layer->layer->memory().total();
  });
}

void sluice_context_destroy(sluice_context* context) {
  destroy(context);
}

// ---- layer on GPUs ---------------------------------------------------------------------------------------------------

sluice_status sluice_gpu_layer_create(sluice_runtime* runtime, const sluice_placement* placement,
                                      const sluice_gpu_layer_options* options, sluice_gpu_layer** layer) {
  return guarded([&] {
    clear_out(layer, "GPU layer");
    const std::shared_ptr<Rank> rank = checked(runtime).rank;
    const Visit visit(rank);
    const sluice_gpu_layer_options o = read_struct(options, "sluice_gpu_layer_options");
    GpuMoeLayerOptions out;
    out.hidden = o.hidden;
    out.ffn = o.ffn;
    out.max_tokens = o.max_tokens;
    out.imbalance = o.imbalance;
    out.max_routes_of_token = o.max_routes_of_token;
    out.activation = read_activation(o.activation);
    out.schedule = pick(o.schedule,
                        {GpuMoeSchedule::kAuto, GpuMoeSchedule::kSequential, GpuMoeSchedule::kOverlapped,
                         GpuMoeSchedule::kTwoHops},
                        "schedule");
    out.training = pick(o.training, {false, true}, "training");
    *layer = new sluice_gpu_layer(
        rank, std::make_unique<GpuMoeLayer>(*rank->runtime,
                                            read_placement(placement, rank->runtime->num_ranks()), out));
  });
}
void sluice_gpu_layer_destroy(sluice_gpu_layer* layer) {
  destroy(layer);
}
int32_t sluice_gpu_layer_num_local_experts(const sluice_gpu_layer* layer) {
  return layer ? layer->layer->num_local_experts() : -1;
}
sluice_status sluice_gpu_layer_memory_bytes(sluice_gpu_layer* layer, int64_t* bytes) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    require_argument(bytes != nullptr, "the place for the bytes is null");
    *bytes = layer->layer->memory_bytes();
  });
}
sluice_status sluice_gpu_layer_set_weights(sluice_gpu_layer* layer, const void* w1, const void* w2,
                                           float* grad_w1, float* grad_w2) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    layer->layer->set_weights(w1, w2, grad_w1, grad_w2);
  });
}
sluice_status sluice_gpu_layer_plan(sluice_gpu_layer* layer, const int64_t* row_ptr, const int32_t* expert,
                                    const float* weight, int64_t num_tokens, void* stream) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    layer->layer->plan({row_ptr, expert, weight}, num_tokens, stream);
  });
}
sluice_status sluice_gpu_layer_forward(sluice_gpu_layer* layer, const void* x, void* y, int32_t keep,
                                       void* stream) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    layer->layer->forward(x, y, pick(keep, {false, true}, "keep"), stream);
  });
}
sluice_status sluice_gpu_layer_backward(sluice_gpu_layer* layer, const void* dy, void* dx, float* dweight,
                                        int32_t write_gradients, void* stream) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    layer->layer->backward(dy, dx, dweight, pick(write_gradients, {false, true}, "write_gradients"), stream);
  });
}
sluice_status sluice_gpu_layer_wait(sluice_gpu_layer* layer, void* stream) {
  return guarded([&] {
    const Visit visit(checked(layer).rank);
    layer->layer->wait(stream);
  });
}

// ---- dispatcher ------------------------------------------------------------------------------------------------------

sluice_status sluice_dispatcher_create(sluice_runtime* runtime, const sluice_placement* placement,
                                       const sluice_dispatcher_options* options,
                                       sluice_dispatcher** dispatcher) {
  return guarded([&] {
    clear_out(dispatcher, "dispatcher");
    const std::shared_ptr<Rank>& rank = checked(runtime).rank;
    const Visit visit(rank);
    *dispatcher = new sluice_dispatcher(
        rank,
        std::make_shared<Dispatcher>(*rank->runtime, read_placement(placement, rank->runtime->num_ranks()),
                                     read_dispatcher_options(options)));
  });
}

void sluice_dispatcher_destroy(sluice_dispatcher* dispatcher) {
  destroy(dispatcher);
}

sluice_status sluice_dispatcher_plan(sluice_dispatcher* dispatcher, const sluice_routing* routing,
                                     void* stream, sluice_plan** plan) {
  return guarded([&] {
    clear_out(plan, "plan");
    const Visit visit(checked(dispatcher).rank);
    require_no_stream(stream);
    *plan = make_plan(dispatcher->rank, dispatcher->dispatcher,
                      dispatcher->dispatcher->placement().num_experts, routing)
                .release();
  });
}

sluice_status sluice_dispatcher_dispatch(sluice_dispatcher* dispatcher, const sluice_plan* plan,
                                         const sluice_const_matrix* x, void* stream,
                                         sluice_context** context) {
  return guarded([&] {
    clear_out(context, "context");
    const Visit visit(checked(dispatcher).rank);
    require_no_stream(stream);
    const sluice_plan& p = owned(plan, dispatcher->dispatcher, "dispatcher");
    auto handle = std::make_unique<sluice_context>(dispatcher->rank, p);
    handle->context = dispatcher->dispatcher->dispatch(p.plan, read_view(x, "x"));
    *context = handle.release();
  });
}

sluice_status sluice_dispatcher_rows(sluice_dispatcher* dispatcher, sluice_context* context,
                                     sluice_const_matrix* rows) {
  return guarded([&] {
    const Visit visit(checked(dispatcher).rank);
    require_argument(rows != nullptr, "rows is null");
    const ConstMatrixView view =
        dispatcher->dispatcher->rows(owned(context, dispatcher->dispatcher, "dispatcher").context);
    *rows = {view.data, view.rows, view.cols, view.row_stride, static_cast<sluice_dtype>(view.dtype), 0};
  });
}

sluice_status sluice_dispatcher_layout(sluice_dispatcher* dispatcher, sluice_context* context,
                                       const int64_t** slot_begin, const int32_t** row_of_route) {
  return guarded([&] {
    const Visit visit(checked(dispatcher).rank);
    const Context& c = owned(context, dispatcher->dispatcher, "dispatcher").context;
    const auto begin = dispatcher->dispatcher->slot_begin(c);
    const auto row = dispatcher->dispatcher->row_of_route(c);
    if (slot_begin) *slot_begin = begin.data();
    if (row_of_route) *row_of_route = row.data();
  });
}

sluice_status sluice_dispatcher_combine(sluice_dispatcher* dispatcher, sluice_context* context,
                                        const sluice_const_matrix* out, const sluice_matrix* y,
                                        void* stream) {
  return guarded([&] {
    const Visit visit(checked(dispatcher).rank);
    require_no_stream(stream);
    dispatcher->dispatcher->combine(owned(context, dispatcher->dispatcher, "dispatcher").context,
                                    read_view(out, "out"), read_view(y, "y"));
  });
}

sluice_status sluice_dispatcher_combine_backward(sluice_dispatcher* dispatcher, sluice_context* context,
                                                 const sluice_const_matrix* dy,
                                                 const sluice_const_matrix* out, void* stream) {
  return guarded([&] {
    const Visit visit(checked(dispatcher).rank);
    require_no_stream(stream);
    dispatcher->dispatcher->combine_backward(owned(context, dispatcher->dispatcher, "dispatcher").context,
                                             read_view(dy, "dy"),
                                             out ? read_view(out, "out") : ConstMatrixView());
  });
}

sluice_status sluice_dispatcher_dispatch_backward(sluice_dispatcher* dispatcher, sluice_context* context,
                                                  const sluice_const_matrix* drows, const float* received_dw,
                                                  int64_t num_received_dw, const sluice_matrix* dx, float* dw,
                                                  int64_t num_dw, void* stream) {
  return guarded([&] {
    const Visit visit(checked(dispatcher).rank);
    require_no_stream(stream);
    sluice_context& c = owned(context, dispatcher->dispatcher, "dispatcher");
    RouteResults results(c, dw, num_dw);
    dispatcher->dispatcher->dispatch_backward(c.context, read_view(drows, "drows"),
                                              read_array(received_dw, num_received_dw, "received_dw"),
                                              read_view(dx, "dx"), results.span());
    results.deliver();
  });
}
