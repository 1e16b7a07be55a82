#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/comm/cuda/device_memory.hpp"
#include "sluice/kernels/cuda/rows.hpp"
#include "sluice/runtime/src/cuda/gpu_two_hop_layer.hpp"

namespace sluice {
namespace {

using comm::cuda::check_cuda;
using comm::cuda::DeviceMemory;
using comm::cuda::EventHandle;
using comm::cuda::ExchangeShape;
using comm::cuda::Link;
using comm::cuda::ReceiveList;
using comm::cuda::RowExchange;
using comm::cuda::SendPlan;
using comm::cuda::Stream;
using comm::cuda::StreamHandle;
namespace gpu = kernels::cuda;
using Bf16 = std::uint16_t;

constexpr auto kBad = ErrorCode::kInvalidArgument;
constexpr const char* kWhat = "two-hop layer";
constexpr int kMostChunks = 16;
// The cost model, of an H200 (docs/benchmarks.md): floating-point operations and bytes of memory a second; rows of a GEMM's
// tile; what a chunk costs however few rows it has, inside (launches and handshakes) and on its way between nodes.
constexpr double kGemmFlops = 640e12, kMemoryBytes = 4e12, kTileRows = 128;
constexpr double kChunkSeconds = 60e-6, kMessageSeconds = 40e-6;

std::size_t size(std::int64_t n) {
  return static_cast<std::size_t>(n);
}
GpuTwoHopShape checked(const GpuTwoHopShape& s) {
  Require(s.num_nodes >= 1 && s.ranks_per_node >= 1, kBad, "two-hop layer: ", s.num_nodes, " nodes of ",
          s.ranks_per_node, " ranks; at least 1 each");
  Require(s.max_tokens >= 1 && s.hidden >= 8 && s.hidden % 8 == 0, kBad, "two-hop layer: max_tokens is ",
          s.max_tokens, " and hidden ", s.hidden, "; at least 1, and a multiple of 8");
  Require(s.max_routes_of_token >= 1, kBad, "two-hop layer: max_routes_of_token is ", s.max_routes_of_token,
          "; at least 1");
  Require(s.imbalance == 0 || s.imbalance >= 1, kBad, "two-hop layer: imbalance is ", s.imbalance,
          "; 0 or at least 1");
  Require(s.chunks >= 0 && s.chunks <= kMostChunks, kBad, "two-hop layer: chunks is ", s.chunks, "; 0..",
          kMostChunks, " are possible");
  Require(s.network_bytes_s > 0, kBad, "two-hop layer: network_bytes_s must be positive");
  Require(s.layer.num_experts >= 1 && static_cast<int>(s.layer.rank_of.size()) == s.layer.num_experts, kBad,
          "two-hop layer: rank_of has ", s.layer.rank_of.size(), " entries for ", s.layer.num_experts,
          " experts");
  for (const std::int32_t r : s.layer.rank_of)
    Require(r >= 0 && r < s.num_nodes * s.ranks_per_node, kBad, "two-hop layer: an expert lives on rank ", r,
            " of ", s.num_nodes * s.ranks_per_node);
  return s;
}
std::int64_t tokens_of_chunk(const GpuTwoHopShape& s, int chunks) {
  return (s.max_tokens + chunks - 1) / chunks;
}
// Of a chunk's routes, what may come to one of `ranks` ranks.
std::int64_t routes_of_chunk(const GpuTwoHopShape& s, std::int64_t tokens, int ranks) {
  const double even = static_cast<double>(tokens * s.max_routes_of_token);
  const double most = even * ranks;
  return static_cast<std::int64_t>(std::ceil(s.imbalance == 0 ? most : std::min(most, even * s.imbalance)));
}
// How long a pass takes, in seconds: parts leave one after the other, are worked on, return, and are worked on further.
double pass_seconds(int chunks, double one_way, double work, double further, double work_of_chunk) {
  const double travel = one_way / chunks + kMessageSeconds;
  double done = 0, home = chunks * travel;  // nothing returns before all have left
  for (int c = 0; c < chunks; ++c) {
    done = std::max(done, (c + 1) * travel) + work / chunks + work_of_chunk;
    home = std::max(home, done) + travel;
    done += further / chunks;
  }
  return std::max(home, done);
}

}  // namespace

int two_hop_chunks(const GpuTwoHopShape& shape) {
  const GpuTwoHopShape s = checked(shape);
  if (s.chunks > 0) return s.chunks;
  if (s.num_nodes == 1) return 1;
  // Every token goes to every other node, and has as many routes as it may.
  const auto tokens = static_cast<double>(s.max_tokens), hidden = static_cast<double>(s.hidden);
  const auto pre = static_cast<double>(kernels::preactivation_cols(s.layer.activation, s.layer.ffn));
  const double one_way = tokens * (s.num_nodes - 1) * hidden * 2 / s.network_bytes_s;
  const double experts = static_cast<double>(s.layer.num_experts) / (s.num_nodes * s.ranks_per_node);
  const double weights = hidden * (pre + static_cast<double>(s.layer.ffn));  // of an expert
  const double row = 2 * weights / kGemmFlops;
  const double work = tokens * s.max_routes_of_token * row;
  const double more = kChunkSeconds + experts * (kTileRows / 2 * row + weights * 2 / kMemoryBytes);
  // Backward: twice the products, half of them for weights' gradients, which are read and written in fp32.
  const double more_back = kChunkSeconds + experts * (kTileRows * row + weights * (2 + 8) / kMemoryBytes);
  int best = 1;
  double least = 0;
  for (int c = 1; c <= kMostChunks && c <= s.max_tokens; ++c) {
    const double seconds = pass_seconds(c, one_way, work, 0, more) +
                           (s.layer.training ? pass_seconds(c, one_way, work, work, more_back) : 0);
    if (c == 1 || seconds < least) best = c, least = seconds;
  }
  return best;
}

ExchangeShape two_hop_between(const GpuTwoHopShape& shape, int rank) {
  const int chunks = two_hop_chunks(shape);
  const std::int64_t tokens = tokens_of_chunk(shape, chunks);
  ExchangeShape e;
  e.max_tokens = tokens;
  e.hidden = shape.hidden;
  e.max_received = tokens * shape.num_nodes;
  e.max_routes = routes_of_chunk(shape, tokens, shape.num_nodes);
  e.num_local_slots = static_cast<int>(
      std::count_if(shape.layer.rank_of.begin(), shape.layer.rank_of.end(),
                    [&](std::int32_t r) { return r / shape.ranks_per_node == rank / shape.ranks_per_node; }));
  e.chunk_rows = shape.chunk_rows;
  e.num_channels = chunks;
  e.deadline = shape.deadline;
  return e;
}
ExchangeShape two_hop_inside(const GpuTwoHopShape& shape, int rank) {
  ExchangeShape e = two_hop_between(shape, rank);
  const std::int64_t tokens = e.max_tokens;
  e.max_tokens = e.max_received;  // a gateway's rows
  e.max_received = e.max_tokens * shape.ranks_per_node;
  e.max_routes =
      std::max(e.max_routes, routes_of_chunk(shape, tokens, shape.num_nodes * shape.ranks_per_node));
  e.num_local_slots =
      static_cast<int>(std::count(shape.layer.rank_of.begin(), shape.layer.rank_of.end(), rank));
  e.deadline = 2 * shape.deadline;
  return e;
}

struct GpuTwoHopLayer::Impl {
  struct Chunk {
    int channel = 0;
    std::unique_ptr<GpuLayer> layer;  // none where the node has no experts
    DeviceMemory<std::int64_t> rank_ptr, send_route_ptr, home_ptr;
    DeviceMemory<std::int32_t> send_row, send_route, send_slot, home_position;
    DeviceMemory<float> send_weight, dweight;  // dweight: of the receive list's routes
    DeviceMemory<Bf16> result;                 // of the receive list, the node's sums
    EventHandle arrived, computed;
    RowExchange::HostCounts counts;
    std::int64_t first = 0, tokens = 0;  // of this rank

    SendPlan send_plan() const {
      return {rank_ptr.get(),  send_row.get(),    send_route_ptr.get(), send_route.get(),
              send_slot.get(), send_weight.get(), home_ptr.get(),       home_position.get()};
    }
  };

  RowExchange& between;
  RowExchange& inside;
  const GpuTwoHopShape shape;
  const int node, nodes;
  const std::int64_t hidden;
  int processors = 0;
  std::int64_t num_tokens = 0;
  bool planned = false;
  DeviceMemory<std::int32_t> node_of, slot_of, identity;
  DeviceMemory<std::int64_t> expert_ptr, rank_route_ptr;
  DeviceMemory<unsigned char> scratch;
  std::vector<std::unique_ptr<Chunk>> chunks;
  StreamHandle out, work, back;
  EventHandle begun, left, worked, returned;

  void require_shape(const ExchangeShape& have, const ExchangeShape& want, const char* name,
                     int first_channel) const {
    const auto same = [&](std::int64_t a, std::int64_t b, const char* what) {
      Require(a == b, kBad, "two-hop layer: ", what, " of the exchange ", name, " is ", a, "; ", b,
              " is needed (two_hop_", name, "() makes the shape)");
    };
    same(have.max_tokens, want.max_tokens, "max_tokens");
    same(have.hidden, want.hidden, "hidden");
    same(have.max_received, want.max_received, "max_received");
    same(have.max_routes, want.max_routes, "max_routes");
    same(have.num_local_slots, want.num_local_slots, "num_local_slots");
    Require(have.dtype == DType::kBF16 && have.wire == comm::cuda::Wire::kRows, kBad,
            "two-hop layer: the exchange ", name, " must move bf16 rows as they are");
    Require(first_channel >= 0 && first_channel + want.num_channels <= have.num_channels, kBad,
            "two-hop layer: channels ", first_channel, "..", first_channel + want.num_channels - 1,
            " of the exchange ", name, ", which has ", have.num_channels);
  }

  Impl(RowExchange& between_, RowExchange& inside_, int first_channel, const GpuTwoHopShape& s)
      : between(between_),
        inside(inside_),
        shape(checked(s)),
        node(between_.rank()),
        nodes(s.num_nodes),
        hidden(s.hidden) {
    Require(between.num_ranks() == nodes && inside.num_ranks() == shape.ranks_per_node, kBad,
            "two-hop layer: ", between.num_ranks(), " ranks between nodes and ", inside.num_ranks(),
            " inside; the shape says ", nodes, " and ", shape.ranks_per_node);
    const int me = node * shape.ranks_per_node + inside.rank();
    const ExchangeShape outer = two_hop_between(shape, me), inner = two_hop_inside(shape, me);
    require_shape(between.shape(), outer, "between", first_channel);
    require_shape(inside.shape(), inner, "inside", first_channel);
    int device = 0;
    check_cuda(cudaGetDevice(&device), kWhat);
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kWhat);
    // An expert's slot is its place among its node's; the inner layer's experts are this node's.
    GpuLayerShape of_node = shape.layer;
    of_node.rank_of.clear();
    std::vector<std::int32_t> of, slots, next(static_cast<std::size_t>(nodes), 0);
    for (const std::int32_t r : shape.layer.rank_of) {
      of.push_back(r / shape.ranks_per_node);
      slots.push_back(next[static_cast<std::size_t>(of.back())]++);
      if (of.back() == node) of_node.rank_of.push_back(r % shape.ranks_per_node);
    }
    of_node.num_experts = static_cast<int>(of_node.rank_of.size());
    node_of = comm::cuda::upload(of, kWhat);
    slot_of = comm::cuda::upload(slots, kWhat);
    std::vector<std::int32_t> ascending(size(outer.max_routes));
    std::iota(ascending.begin(), ascending.end(), 0);
    identity = comm::cuda::upload(ascending, kWhat);
    expert_ptr = DeviceMemory<std::int64_t>(of.size() + 1, kWhat);
    rank_route_ptr = DeviceMemory<std::int64_t>(size(nodes + 1), kWhat);
    scratch = DeviceMemory<unsigned char>(
        gpu::plan_scratch_bytes(outer.max_tokens, shape.layer.num_experts, nodes), kWhat);
    const std::size_t send_rows = size(outer.max_tokens * nodes), routes = size(outer.max_routes);
    for (int i = 0; i < outer.num_channels; ++i) {
      auto c = std::make_unique<Chunk>();
      c->channel = first_channel + i;
      if (of_node.num_experts > 0) c->layer = std::make_unique<GpuLayer>(inside, c->channel, of_node);
      c->rank_ptr = DeviceMemory<std::int64_t>(size(nodes + 1), kWhat);
      c->send_route_ptr = DeviceMemory<std::int64_t>(send_rows + 1, kWhat);
      c->home_ptr = DeviceMemory<std::int64_t>(size(outer.max_tokens + 1), kWhat);
      c->send_row = DeviceMemory<std::int32_t>(send_rows, kWhat);
      c->send_route = DeviceMemory<std::int32_t>(routes, kWhat);
      c->send_slot = DeviceMemory<std::int32_t>(routes, kWhat);
      c->home_position = DeviceMemory<std::int32_t>(send_rows, kWhat);
      c->send_weight = DeviceMemory<float>(routes, kWhat);
      if (shape.layer.training) c->dweight = DeviceMemory<float>(routes, kWhat);
      c->result = DeviceMemory<Bf16>(size(outer.max_received * hidden), kWhat);
      chunks.push_back(std::move(c));
    }
  }
  ~Impl() {
    // In the order in which one waits for the other.
    between.drain(out.stream);
    inside.drain(work.stream);
    between.drain(back.stream);
  }

  static void meet(const EventHandle& event, Stream from, std::initializer_list<Stream> to) {
    check_cuda(cudaEventRecord(event.event, from), kWhat);
    for (Stream stream : to) check_cuda(cudaStreamWaitEvent(stream, event.event, 0), kWhat);
  }
  void begin(Stream stream) { meet(begun, stream, {out.stream, work.stream, back.stream}); }
  void finish(Stream stream) {
    meet(left, out.stream, {stream});
    meet(worked, work.stream, {stream});
    meet(returned, back.stream, {stream});
  }
  comm::cuda::MoverOptions movers() const {
    const int push = std::min(16, processors / 2);
    return {push, processors - push};
  }

  // How many routes each chunk has: routes that do not fit must not be written.
  void require_routes(const gpu::ConstRouting& routing) {
    if (num_tokens == 0) return;
    between.wait_for(out.stream);  // what the caller enqueued before may wait for others
    std::vector<std::int64_t> at;  // where chunks begin, and the end
    for (std::size_t i = 0; i <= chunks.size(); ++i) {
      const std::int64_t token = i < chunks.size() ? chunks[i]->first : num_tokens;
      at.push_back(0);
      check_cuda(cudaMemcpyAsync(&at.back(), routing.row_ptr + token, sizeof at[0], cudaMemcpyDeviceToHost,
                                 out.stream),
                 kWhat);
      check_cuda(cudaStreamSynchronize(out.stream), kWhat);
    }
    for (std::size_t i = 0; i < chunks.size(); ++i)
      Require(at[i + 1] - at[i] <= between.shape().max_routes, kBad, "two-hop layer: chunk ", i, " of ",
              chunks.size(), " has ", at[i + 1] - at[i], " routes; at most ", between.shape().max_routes,
              " fit: raise max_routes_of_token");
  }

  void plan(const gpu::ConstRouting& routing, std::int64_t tokens, Stream stream) {
    Require(tokens >= 0 && tokens <= shape.max_tokens, kBad, "two-hop layer: ", tokens,
            " tokens; max_tokens is ", shape.max_tokens);
    Require(tokens == 0 || routing.row_ptr != nullptr, kBad, "two-hop layer: row_ptr is null");
    planned = false;
    num_tokens = tokens;
    const auto count = static_cast<std::int64_t>(chunks.size());
    const std::int64_t each = (tokens + count - 1) / count;
    for (std::int64_t i = 0; i < count; ++i) {
      chunks[size(i)]->first = std::min(tokens, i * each);
      chunks[size(i)]->tokens = std::min(tokens, (i + 1) * each) - chunks[size(i)]->first;
    }
    begin(stream);
    require_routes(routing);
    for (const auto& c : chunks) {
      const gpu::PlanBuffers send{expert_ptr.get(),
                                  nullptr,
                                  nullptr,
                                  nullptr,
                                  c->rank_ptr.get(),
                                  rank_route_ptr.get(),
                                  c->send_row.get(),
                                  c->send_route_ptr.get(),
                                  c->send_route.get(),
                                  c->send_slot.get(),
                                  c->send_weight.get(),
                                  c->home_ptr.get(),
                                  c->home_position.get()};
      gpu::build_plan({routing.row_ptr + c->first, routing.expert, routing.weight}, c->tokens,
                      {node_of.get(), slot_of.get(), shape.layer.num_experts, nodes}, send, scratch.get(),
                      out.stream);
      between.exchange_plan(c->channel, c->send_plan(), out.stream);
      c->counts = between.host_counts(c->channel, out.stream);
      check_cuda(cudaEventRecord(c->arrived.event, out.stream), kWhat);
    }
    // Over NCCL the inner plan waits on the host, and must not be blamed for what comes late from another node.
    if (inside.link() == Link::kNccl) between.wait(chunks[0]->channel, out.stream);
    for (const auto& c : chunks) {
      check_cuda(cudaStreamWaitEvent(work.stream, c->arrived.event, 0), kWhat);
      const ReceiveList list = between.receive_list(c->channel);
      if (c->layer != nullptr)
        c->layer->plan({list.route_ptr, list.slot, list.weight}, c->counts.receive_ptr.back(), work.stream);
    }
    finish(stream);
    planned = true;
  }

  // Rows of the chunk's tokens to the nodes that want them; own ones into their places between the others'.
  void bring(Chunk& c, const Bf16* x) {
    const auto me = size(node);
    const std::int64_t own = c.counts.receive_ptr[me + 1] - c.counts.receive_ptr[me];
    const Bf16* rows = x + c.first * hidden;
    between.dispatch(c.channel, c.send_plan(), rows, hidden, {}, {movers().push_sms, 0}, out.stream);
    if (own > 0)
      gpu::gather_rows(
          ConstMatrixView(reinterpret_cast<const std::byte*>(rows), DType::kBF16, c.tokens, hidden, hidden),
          {}, c.send_row.get() + c.counts.send_ptr[me],
          MatrixView(reinterpret_cast<std::byte*>(received(c) + c.counts.receive_ptr[me] * hidden),
                     DType::kBF16, own, hidden, hidden),
          nullptr, out.stream);
    check_cuda(cudaEventRecord(c.arrived.event, out.stream), kWhat);
  }
  Bf16* received(const Chunk& c) const { return static_cast<Bf16*>(between.received(c.channel)); }
  // The node's sums home, when `computed` says that they are there.
  void take(Chunk& c, Bf16* y) {
    check_cuda(cudaStreamWaitEvent(back.stream, c.computed.event, 0), kWhat);
    between.combine(c.channel, c.send_plan(), {c.result.get(), hidden, nullptr, false}, y + c.first * hidden,
                    hidden, c.tokens, movers(), back.stream);
  }
  // Beside what travels between nodes the inner layer must not count on its processors: NCCL's kernels keep theirs until
  // another node's have come, which wait there for processors. GEMMs that end by themselves (kOverlapped) and kernels whose
  // first blocks are enough to go on (kSequential) do no harm; a GEMM that waits for rows could wait for ever.
  GpuLayerOptions inner(const GpuLayerOptions& options) const {
    GpuLayerOptions o = options;
    if (inside.link() == Link::kNvlink && inside.num_ranks() > 1 && chunks.size() > 1 &&
        o.schedule != GpuSchedule::kOverlapped)
      o.schedule = GpuSchedule::kSequential;
    return o;
  }
  // `compute`: of a chunk, on work, and records `computed`; `after`: on back.
  template <typename Compute, typename After>
  void pass(const void* x, void* y, const Compute& compute, const After& after, Stream stream) {
    Require(planned, ErrorCode::kInvalidState, "two-hop layer: there is no plan");
    begin(stream);
    for (const auto& c : chunks) bring(*c, static_cast<const Bf16*>(x));
    meet(left, out.stream, {back.stream});  // one order of messages for all ranks
    for (const auto& c : chunks) {
      check_cuda(cudaStreamWaitEvent(work.stream, c->arrived.event, 0), kWhat);
      if (c->layer != nullptr) {
        compute(*c);
      } else {
        check_cuda(cudaEventRecord(c->computed.event, work.stream), kWhat);
      }
      take(*c, static_cast<Bf16*>(y));
      after(*c);
    }
    finish(stream);
  }
};

GpuTwoHopLayer::GpuTwoHopLayer(RowExchange& between, RowExchange& inside, int first_channel,
                               const GpuTwoHopShape& shape)
    : impl_(std::make_unique<Impl>(between, inside, first_channel, shape)) {}
GpuTwoHopLayer::~GpuTwoHopLayer() = default;

int GpuTwoHopLayer::num_chunks() const {
  return static_cast<int>(impl_->chunks.size());
}
std::size_t GpuTwoHopLayer::buffer_bytes() const {
  std::size_t bytes = 0;
  for (const auto& c : impl_->chunks)
    bytes += c->result.bytes() + (c->layer != nullptr ? c->layer->buffer_bytes() : 0);
  return bytes;
}
void GpuTwoHopLayer::plan(const gpu::ConstRouting& routing, std::int64_t num_tokens, Stream stream) {
  impl_->plan(routing, num_tokens, stream);
}
void GpuTwoHopLayer::forward(const GpuExperts& experts, const void* x, void* y,
                             const GpuLayerOptions& options, Stream stream) {
  Impl& i = *impl_;
  i.pass(
      x, y,
      [&](Impl::Chunk& c) {
        c.layer->forward(experts, i.received(c), c.result.get(), i.inner(options), i.work.stream);
        check_cuda(cudaEventRecord(c.computed.event, i.work.stream), kWhat);
      },
      [](Impl::Chunk&) {}, stream);
}
void GpuTwoHopLayer::backward(const GpuExperts& experts, const GpuExpertGradients& gradients, const void* dy,
                              void* dx, float* dweight, const GpuLayerOptions& options, Stream stream) {
  Impl& i = *impl_;
  Require(i.shape.layer.training, ErrorCode::kInvalidState, "two-hop layer: backward needs `training`");
  GpuExpertGradients of_chunks = gradients;
  i.pass(
      dy, dx,
      [&](Impl::Chunk& c) {
        GpuLayerOptions of_chunk = i.inner(options);
        of_chunk.results_done = c.computed.event;
        c.layer->backward(experts, of_chunks, i.received(c), c.result.get(), c.dweight.get(), of_chunk,
                          i.work.stream);
        of_chunks.update = gpu::GradientUpdate::kAdd;  // to what the first chunk has written
      },
      [&](Impl::Chunk& c) {
        if (dweight != nullptr)
          i.between.return_scalars(c.channel, c.send_plan(), c.dweight.get(), i.identity.get(), dweight,
                                   i.back.stream);
      },
      stream);
  if (options.results_done != nullptr) check_cuda(cudaEventRecord(options.results_done, stream), kWhat);
}

void GpuTwoHopLayer::wait(Stream stream) {
  Impl& i = *impl_;
  for (const auto& [exchange, on] : {std::pair{&i.between, i.out.stream}, std::pair{&i.inside, i.work.stream},
                                     std::pair{&i.between, i.back.stream}})
    exchange->wait(i.chunks[0]->channel, on);
  check_cuda(cudaStreamSynchronize(stream), kWhat);
  check();
}
void GpuTwoHopLayer::check() const {
  for (const RowExchange* exchange : {&impl_->between, &impl_->inside})
    for (const auto& c : impl_->chunks) exchange->check(c->channel);
}
void GpuTwoHopLayer::clear(Stream stream) {
  impl_->begin(stream);
  for (const auto& c : impl_->chunks) {
    impl_->between.clear(c->channel, impl_->out.stream);
    impl_->inside.clear(c->channel, impl_->work.stream);
  }
  impl_->finish(stream);
}

}  // namespace sluice
