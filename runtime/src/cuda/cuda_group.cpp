#include "sluice/runtime/src/cuda/cuda_group.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/host.hpp"
#include "sluice/runtime/src/cuda/routing_check.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {

using comm::cuda::check_cuda;
using comm::cuda::RowExchange;

// A rank's GPU and host, as all ranks are told.
struct Card {
  char host[64];      // its name, cut
  char host_id[128];  // comm::host_identity(), cut at the front
  char gpu[64];
  unsigned char uuid[16];
  std::int64_t num_visible;
};

template <std::size_t n>
void put(char (&to)[n], std::string_view text) {
  const std::size_t size = std::min(n - 1, text.size());
  std::memcpy(to, text.data() + (text.size() - size), size);
  to[size] = '\0';
}

std::vector<Card> cards_of(const comm::cuda::Bootstrap& bootstrap) {
  int device = 0, visible = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "GPU group");
  check_cuda(cudaGetDeviceCount(&visible), "GPU group");
  check_cuda(cudaGetDeviceProperties(&properties, device), "GPU group");
  Card mine{};
  put(mine.host, comm::host_name());
  put(mine.host_id, comm::host_identity());
  put(mine.gpu, properties.name);
  std::memcpy(mine.uuid, properties.uuid.bytes, sizeof mine.uuid);
  mine.num_visible = visible;
  std::vector<Card> all(static_cast<std::size_t>(bootstrap.num_ranks));
  bootstrap.all_gather(&mine, all.data(), sizeof mine);
  return all;
}

// Whether this rank's device reaches the memory of a GPU of this host. One that this process does not see counts as out of
// reach: nothing can be asked about it.
bool reaches(const Card& peer) {
  int device = 0, visible = 0;
  check_cuda(cudaGetDevice(&device), "GPU group");
  check_cuda(cudaGetDeviceCount(&visible), "GPU group");
  for (int other = 0; other < visible; ++other) {
    cudaDeviceProp properties{};
    check_cuda(cudaGetDeviceProperties(&properties, other), "GPU group");
    if (std::memcmp(properties.uuid.bytes, peer.uuid, sizeof peer.uuid) != 0) continue;
    int possible = 0;
    if (other != device) check_cuda(cudaDeviceCanAccessPeer(&possible, device, other), "GPU group");
    return other == device || possible != 0;
  }
  return false;
}

std::size_t n(std::int64_t v) {
  return static_cast<std::size_t>(v);
}

GpuLayerShape layer_shape(const GpuPlacement& placement, const GpuRowsOptions& options) {
  GpuLayerShape shape;
  shape.ffn = options.ffn;
  shape.activation = options.activation;
  shape.num_experts = static_cast<int>(placement.rank_of.size());
  shape.rank_of = placement.rank_of;
  shape.training = options.training;
  return shape;
}

struct TwoHopLayer final : LayerOfWay<TwoHopLayer> {
  RowExchange between, inside;
  GpuTwoHopLayer layer;

  TwoHopLayer(const comm::cuda::Bootstrap& across, comm::cuda::NcclCommunicator& across_nccl,
              const comm::cuda::Bootstrap& node, comm::cuda::Link node_link,
              comm::cuda::NcclCommunicator* node_nccl, int rank, const GpuTwoHopShape& shape)
      : between(across, two_hop_between(shape, rank), comm::cuda::Link::kNccl, comm::cuda::PeerPath::kBest,
                &across_nccl),
        inside(node, two_hop_inside(shape, rank), node_link, comm::cuda::PeerPath::kBest, node_nccl),
        layer(between, inside, 0, shape) {}
  int num_chunks() const override { return layer.num_chunks(); }
  void wait(cudaStream_t stream) override { layer.wait(stream); }
  void clear(cudaStream_t stream) override { layer.clear(stream); }
  std::size_t memory_bytes() const override {
    return layer.buffer_bytes() + between.window_bytes() + inside.window_bytes();
  }
};

// The passes of one layer.
class CudaRows final : public GpuRows {
 public:
  CudaRows(CudaGroup& group, const Placement& placement, const GpuRowsOptions& options)
      : group_(group),
        placement_(gpu_placement(placement)),
        options_(options),
        x_(group.compute_device()),
        y_(group.compute_device()),
        row_ptr_(group.compute_device()),
        expert_(group.compute_device()),
        weight_(group.compute_device()),
        dweight_(group.compute_device()) {
    pass_.schedule = options.way.two_hops     ? GpuSchedule::kAuto  // of the inner layer
                     : options.way.overlapped ? GpuSchedule::kOverlapped
                                              : GpuSchedule::kSequential;
    pass_.keep = options.training;
  }

  void plan(const RoutingView& routing) override {
    routing_.assign(routing, placement_);
    group_.in_pass("plan", [&] {
      const CudaGroup::Needs needs =
          group_.needs_of(routing_, placement_, options_.way.two_hops, layer_ ? layer_->num_chunks() : 1);
      if (!layer_ || needs.tokens > capacity_.tokens || needs.routes > capacity_.routes ||
          needs.routes_of_token > capacity_.routes_of_token)
        grow(needs);
      const auto routes = static_cast<std::int64_t>(routing_.route.size());
      for (DeviceMemory* memory : {&expert_, &weight_, &dweight_}) memory->at_least(with_room(routes) * 4);
      upload(row_ptr_, routing_.row_ptr);
      upload(expert_, routing_.expert);
      upload(weight_, routing_.weight);
      layer_->plan({row_ptr_.as<std::int64_t>(), expert_.as<std::int32_t>(), weight_.as<float>()},
                   routing_.num_tokens(), group_.stream());
      // Copies from such memory as a forward's rows wait for what the stream does, without a deadline.
      layer_->wait(group_.stream());
    });
  }

  void forward(const void* w1, const void* w2, ConstMatrixView x, MatrixView y) override {
    group_.in_pass("forward", [&] {
      begin(x);
      layer_->forward({w1, w2}, x_.as<void>(), y_.as<void>(), pass_, group_.stream());
      end(y);
    });
  }

  void backward(const void* w1, const void* w2, float* grad_w1, float* grad_w2, ConstMatrixView dy,
                MatrixView dx, std::span<float> dw) override {
    group_.in_pass("backward", [&] {
      begin(dy);
      layer_->backward({w1, w2}, {grad_w1, grad_w2}, x_.as<void>(), y_.as<void>(), dweight_.as<float>(),
                       pass_, group_.stream());
      end(dx);
      dweight_here_.resize(routing_.route.size());
      check_cuda(cudaMemcpyAsync(dweight_here_.data(), dweight_.as<float>(), dweight_here_.size() * 4,
                                 cudaMemcpyDeviceToHost, group_.stream()),
                 "GPU rows");
      check_cuda(cudaStreamSynchronize(group_.stream()), "GPU rows");
      for (std::size_t i = 0; i < dweight_here_.size(); ++i)
        dw[static_cast<std::size_t>(routing_.route[i])] = dweight_here_[i];
    });
  }

  std::int64_t capacity_bytes() const override {
    std::int64_t bytes = 0;
    for (const DeviceMemory* memory : {&x_, &y_, &row_ptr_, &expert_, &weight_, &dweight_})
      bytes += memory->capacity_bytes();
    if (layer_) bytes += static_cast<std::int64_t>(layer_->memory_bytes());
    return bytes;
  }

 private:
  // Collective: all ranks see the same needs, so they grow together. With room to spare, since routings differ.
  static std::int64_t with_room(std::int64_t n) { return n + n / 4 + 16; }
  void grow(CudaGroup::Needs needs) {
    const int had_chunks = layer_ ? layer_->num_chunks() : 1;
    layer_.reset();
    const auto raise = [](std::int64_t& had, std::int64_t n) {
      if (n > had || had == 0) had = with_room(n);
    };
    raise(capacity_.tokens, needs.tokens);
    capacity_.routes_of_token = std::max(capacity_.routes_of_token, needs.routes_of_token);
    int chunks = 1;
    if (options_.way.two_hops) {
      chunks = group_.two_hop_chunks_of(placement_, options_, capacity_);
      if (chunks != had_chunks) {
        needs = group_.needs_of(routing_, placement_, true, chunks);
        capacity_.routes_of_token = std::max(capacity_.routes_of_token, needs.routes_of_token);
        capacity_.routes = 0;
      }
    }
    raise(capacity_.routes, needs.routes);
    if (options_.way.two_hops)
      layer_ = group_.make_two_hops(placement_, options_, capacity_, chunks);
    else
      layer_ = group_.make_one_hop(placement_, options_, capacity_);
    const std::int64_t rows = capacity_.tokens * options_.hidden * 2;
    x_.at_least(rows);
    y_.at_least(rows);
    row_ptr_.at_least((capacity_.tokens + 1) * 8);
  }
  template <typename T>
  void upload(DeviceMemory& to, const std::vector<T>& from) {
    check_cuda(cudaMemcpyAsync(to.as<T>(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice,
                               group_.stream()),
               "GPU rows");
  }
  void begin(ConstMatrixView rows) {
    group_.compute_device().synchronize();  // weights and gradients were queued on the device's own stream
    if (rows.rows > 0) copy(x_.as<void>(), rows.row_bytes(), rows.data, rows.row_bytes_stride(), rows);
  }
  void end(MatrixView rows) {
    layer_->wait(group_.stream());
    if (rows.rows > 0) copy(rows.data, rows.row_bytes_stride(), y_.as<void>(), rows.row_bytes(), rows);
    check_cuda(cudaStreamSynchronize(group_.stream()), "GPU rows");
  }
  void copy(void* to, std::int64_t to_stride, const void* from, std::int64_t from_stride,
            ConstMatrixView shape) {
    check_cuda(
        cudaMemcpy2DAsync(to, static_cast<std::size_t>(to_stride), from,
                          static_cast<std::size_t>(from_stride), static_cast<std::size_t>(shape.row_bytes()),
                          static_cast<std::size_t>(shape.rows), cudaMemcpyDefault, group_.stream()),
        "GPU rows");
  }

  CudaGroup& group_;
  const GpuPlacement placement_;
  const GpuRowsOptions options_;
  GpuLayerOptions pass_;
  GpuRouting routing_;
  CudaGroup::Needs capacity_;
  std::unique_ptr<GroupLayer> layer_;
  DeviceMemory x_, y_;  // of the pass: x and y, or dy and dx
  DeviceMemory row_ptr_, expert_, weight_, dweight_;
  std::vector<float> dweight_here_;
};

// The passes of one layer from and to device memory.
class CudaResident final : public GpuResidentLayer {
 public:
  CudaResident(CudaGroup& group, const Placement& placement, const GpuResidentOptions& o) : group_(group) {
    group_.in_pass("GPU layer", [&] {
      const GpuPlacement experts = gpu_placement(placement);
      const auto routes_of = [&](std::int64_t tokens) {
        return static_cast<std::int64_t>(
            std::ceil(static_cast<double>(tokens * o.max_routes_of_token) * o.imbalance));
      };
      CudaGroup::Needs room{o.max_tokens, routes_of(o.max_tokens), o.max_routes_of_token};
      if (o.rows.way.two_hops) {
        const int chunks = group_.two_hop_chunks_of(experts, o.rows, room);
        room.routes = routes_of((o.max_tokens + chunks - 1) / chunks);
        layer_ = group_.make_two_hops(experts, o.rows, room, chunks);
      } else {
        layer_ = group_.make_one_hop(experts, o.rows, room);
      }
      const std::int64_t routes = o.max_tokens * o.max_routes_of_token;
      check_ = std::make_unique<RoutingCheck>(o.max_tokens, routes, static_cast<int>(experts.rank_of.size()));
      nothing_ = comm::cuda::DeviceMemory<std::byte>(16, "GPU layer");
      if (o.rows.training)
        unwanted_ = comm::cuda::DeviceMemory<float>(static_cast<std::size_t>(routes), "GPU layer");
    });
    pass_.schedule = o.automatic || o.rows.way.two_hops ? GpuSchedule::kAuto
                     : o.rows.way.overlapped            ? GpuSchedule::kOverlapped
                                                        : GpuSchedule::kSequential;
  }

  void set_weights(const void* w1, const void* w2, float* grad_w1, float* grad_w2) override {
    experts_ = {w1, w2};
    gradients_ = {grad_w1, grad_w2};
  }
  void plan(const GpuRoutingView& r, std::int64_t num_tokens, void* stream) override {
    group_.in_pass("plan", [&] {
      const auto on = static_cast<cudaStream_t>(stream);
      layer_->plan(check_->enqueue({r.row_ptr, r.expert, r.weight}, num_tokens, on), num_tokens, on);
    });
  }
  void forward(const void* x, void* y, bool keep, void* stream) override {
    group_.in_pass("forward", [&] {
      pass_.keep = keep;
      layer_->forward(experts_, or_nothing(x), or_nothing(y), pass_, static_cast<cudaStream_t>(stream));
    });
  }
  void backward(const void* dy, void* dx, float* dweight, bool write_gradients, void* stream) override {
    group_.in_pass("backward", [&] {
      gradients_.update =
          write_gradients ? kernels::cuda::GradientUpdate::kWrite : kernels::cuda::GradientUpdate::kAdd;
      // Ranks return these values together, whoever wants them.
      layer_->backward(experts_, gradients_, or_nothing(dy), or_nothing(dx),
                       dweight != nullptr ? dweight : unwanted_.get(), pass_,
                       static_cast<cudaStream_t>(stream));
    });
  }
  void wait(void* stream) override {
    const auto on = static_cast<cudaStream_t>(stream);
    std::string no_room;
    group_.in_pass("GPU pass", [&] {
      try {
        layer_->wait(on);
      } catch (const Error& e) {
        if (e.code() != ErrorCode::kInvalidState) throw;
        // More rows than fit: on all ranks alike, and over with the plan.
        layer_->clear(on);
        check_cuda(cudaStreamSynchronize(on), "GPU layer");
        no_room = e.message();
      }
    });
    check_->throw_if_bad();
    Require(no_room.empty(), ErrorCode::kInvalidState, no_room);
  }
  std::int64_t memory_bytes() const override {
    return static_cast<std::int64_t>(layer_->memory_bytes() + check_->memory_bytes() + unwanted_.bytes());
  }

 private:
  // A rank without tokens may have no arrays, but has its part in the exchange.
  const void* or_nothing(const void* data) const { return data != nullptr ? data : nothing_.get(); }
  void* or_nothing(void* data) const { return data != nullptr ? data : nothing_.get(); }

  CudaGroup& group_;
  std::unique_ptr<GroupLayer> layer_;
  std::unique_ptr<RoutingCheck> check_;
  comm::cuda::DeviceMemory<std::byte> nothing_;
  comm::cuda::DeviceMemory<float> unwanted_;
  GpuLayerOptions pass_;
  GpuExperts experts_;
  GpuExpertGradients gradients_;
};

}  // namespace

CudaGroup::CudaGroup(Runtime& runtime, GpuLink link)
    : runtime_(runtime), device_(runtime.state().device.get()), link_(link) {
  device_->make_current();
  check_cuda(cudaGetDevice(&cuda_device_), "GPU group");
  check_devices();
  if (link == GpuLink::kNccl)
    communicator_ = std::make_unique<comm::cuda::NcclCommunicator>(
        bootstrap(), std::chrono::duration_cast<std::chrono::milliseconds>(runtime.options().timeout));
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "GPU group");
}

CudaGroup::~CudaGroup() {
  if (stream_ != nullptr) {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaGetLastError();
  }
}

comm::cuda::Bootstrap CudaGroup::bootstrap() {
  return {runtime_.rank().value,
          runtime_.num_ranks(),
          [this](const void* mine, void* all, std::size_t bytes) {
            const std::size_t words = (bytes + 7) / 8, ranks = static_cast<std::size_t>(runtime_.num_ranks());
            std::vector<std::int64_t> own(words, 0);
            std::memcpy(own.data(), mine, bytes);
            const std::vector<std::int64_t> gathered = runtime_.all_gather(own, "GPUs meet");
            for (std::size_t r = 0; r < ranks; ++r)
              std::memcpy(static_cast<std::byte*>(all) + r * bytes, gathered.data() + r * words, bytes);
          },
          {},
          [&transport = runtime_.transport()] { return transport.broken(); }};
}

comm::cuda::Bootstrap CudaGroup::bootstrap_of(const std::vector<int>& members) {
  const comm::cuda::Bootstrap all = bootstrap();
  const auto here = std::find(members.begin(), members.end(), all.rank);
  return {static_cast<int>(here - members.begin()), static_cast<int>(members.size()),
          [all, members](const void* mine, void* theirs, std::size_t bytes) {
            std::vector<std::byte> of_all(n(all.num_ranks) * bytes);
            all.all_gather(mine, of_all.data(), bytes);
            for (std::size_t i = 0; i < members.size(); ++i)
              std::memcpy(static_cast<std::byte*>(theirs) + i * bytes, of_all.data() + n(members[i]) * bytes,
                          bytes);
          },
          members, all.lost};
}

void CudaGroup::check_devices() {
  const std::vector<Card> all = cards_of(bootstrap());
  // All ranks see the same cards, so all say the same.
  for (std::size_t r = 0; r < all.size(); ++r) {
    Require(link_ != GpuLink::kNvlink || std::strcmp(all[r].host_id, all[0].host_id) == 0,
            ErrorCode::kNotSupported, "nvlink reaches GPUs of one host only, but rank 0 is on ", all[0].host,
            " and rank ", r, " on ", all[r].host, "; use comm.transport = nccl");
    for (std::size_t s = 0; s < r; ++s)
      Require(
          std::memcmp(all[r].uuid, all[s].uuid, sizeof all[r].uuid) != 0, ErrorCode::kNotSupported, "ranks ",
          s, " and ", r, " share one GPU (", all[r].gpu, " of ", all[r].host, "), but comm.transport ",
          to_string(link_), " needs one for each rank; rank ", r, " sees ", all[r].num_visible,
          ": start no more ranks on a host than it has GPUs, or choose a transport of the host (shm, tcp), "
          "over which ranks may share one");
  }
}

bool CudaGroup::nodes_have_peer_access(const std::vector<int>& node) {
  const std::vector<Card> cards = cards_of(bootstrap());
  std::int64_t here = 1;
  for (const int r : node)
    if (std::strcmp(cards[n(r)].host_id, cards[n(runtime_.rank().value)].host_id) != 0 ||
        !reaches(cards[n(r)]))
      here = 0;
  const std::vector<std::int64_t> all = runtime_.all_gather(std::span(&here, 1), "GPUs of a node");
  return std::count(all.begin(), all.end(), 1) == runtime_.num_ranks();
}

CudaGroup::TwoHops& CudaGroup::two_hops() {
  if (two_hops_) return *two_hops_;
  const Topology& topology = runtime_.topology();
  const RankId me = runtime_.rank();
  const std::vector<int>& node = topology.ranks_of(topology.node_of(me));
  std::vector<int> places;  // this rank's on all nodes
  for (std::int32_t i = 0; i < topology.num_nodes(); ++i)
    places.push_back(topology.ranks_of(NodeId(i))[n(topology.local_index(me))]);
  auto made = std::make_unique<TwoHops>();
  made->between = bootstrap_of(places);
  made->inside = bootstrap_of(node);
  // The same on all nodes, since all gather together.
  made->inside_link = nodes_have_peer_access(node) ? comm::cuda::Link::kNvlink : comm::cuda::Link::kNccl;
  const auto deadline = std::chrono::duration_cast<std::chrono::milliseconds>(runtime_.options().timeout);
  made->between_nccl = std::make_unique<comm::cuda::NcclCommunicator>(made->between, deadline);
  if (made->inside_link == comm::cuda::Link::kNccl)
    made->inside_nccl = std::make_unique<comm::cuda::NcclCommunicator>(made->inside, deadline);
  two_hops_ = std::move(made);
  return *two_hops_;
}

void CudaGroup::abort_communicators() noexcept {
  if (communicator_) communicator_->abort();
  if (!two_hops_) return;
  two_hops_->between_nccl->abort();
  if (two_hops_->inside_nccl) two_hops_->inside_nccl->abort();
}

CudaGroup::Needs CudaGroup::needs_of(const GpuRouting& routing, const GpuPlacement& placement, bool two_hops,
                                     int chunks) {
  const std::size_t ranks = n(runtime_.num_ranks()), parts = n(chunks);
  const std::size_t width = 1 + parts * ranks;
  const auto part_tokens = [&](std::int64_t tokens) { return (tokens + chunks - 1) / chunks; };
  std::vector<std::int64_t> mine(width, 0);  // tokens, then by part the routes to each rank
  mine[0] = routing.num_tokens();
  for (std::int64_t t = 0; t < mine[0]; ++t) {
    const std::size_t part = n(t / part_tokens(mine[0]));
    for (std::size_t i = n(routing.row_ptr[n(t)]); i < n(routing.row_ptr[n(t + 1)]); ++i)
      ++mine[1 + part * ranks + n(placement.rank_of[n(routing.expert[i])])];
  }
  const std::vector<std::int64_t> all = runtime_.all_gather(mine, "routes between GPUs");
  const Topology& topology = runtime_.topology();
  Needs out;
  for (std::size_t part = 0; part < parts; ++part) {
    std::vector<std::int64_t> received(ranks, 0), handed_on(ranks, 0);  // by the gateway
    for (std::size_t s = 0; s < ranks; ++s) {
      const std::int64_t tokens = all[s * width];
      std::int64_t sent = 0;
      for (std::size_t d = 0; d < ranks; ++d) {
        const std::int64_t routes = all[s * width + 1 + part * ranks + d];
        sent += routes;
        received[d] += routes;
        if (two_hops) {
          const RankId to(static_cast<std::int32_t>(d));
          handed_on[topology.gateway(RankId(static_cast<std::int32_t>(s)), topology.node_of(to)).index()] +=
              routes;
        }
      }
      out.tokens = std::max(out.tokens, tokens);
      out.routes = std::max(out.routes, sent);
      const std::int64_t each = part_tokens(tokens), first = static_cast<std::int64_t>(part) * each;
      const std::int64_t of_part = std::clamp<std::int64_t>(tokens - first, 0, each);
      if (two_hops && of_part > 0)
        out.routes_of_token = std::max(out.routes_of_token, (sent + of_part - 1) / of_part);
    }
    for (const auto* routes : {&received, &handed_on})
      out.routes = std::max(out.routes, *std::max_element(routes->begin(), routes->end()));
  }
  return out;
}

std::unique_ptr<OneHopLayer> CudaGroup::make_one_hop(const GpuPlacement& placement,
                                                     const GpuRowsOptions& options, const Needs& room) {
  comm::cuda::ExchangeShape rows;
  rows.max_tokens = std::max<std::int64_t>(1, room.tokens);
  rows.max_routes = std::max<std::int64_t>(1, room.routes);
  rows.hidden = options.hidden;
  rows.num_local_slots =
      static_cast<int>(std::count(placement.rank_of.begin(), placement.rank_of.end(), runtime_.rank().value));
  rows.deadline = runtime_.options().timeout;
  return std::make_unique<OneHopLayer>(
      bootstrap(), rows, link_ == GpuLink::kNvlink ? comm::cuda::Link::kNvlink : comm::cuda::Link::kNccl,
      communicator_.get(), layer_shape(placement, options));
}

GpuTwoHopShape CudaGroup::two_hop_shape(const GpuPlacement& placement, const GpuRowsOptions& options,
                                        const Needs& room) const {
  GpuTwoHopShape shape;
  shape.layer = layer_shape(placement, options);
  shape.num_nodes = runtime_.topology().num_nodes();
  shape.ranks_per_node = runtime_.num_ranks() / shape.num_nodes;
  shape.max_tokens = std::max<std::int64_t>(1, room.tokens);
  shape.hidden = options.hidden;
  shape.max_routes_of_token = static_cast<int>(std::max<std::int64_t>(1, room.routes_of_token));
  shape.chunks = options.way.chunks;
  shape.deadline = runtime_.options().timeout;
  return shape;
}

int CudaGroup::two_hop_chunks_of(const GpuPlacement& placement, const GpuRowsOptions& options,
                                 const Needs& room) const {
  return two_hop_chunks(two_hop_shape(placement, options, room));
}

std::unique_ptr<GroupLayer> CudaGroup::make_two_hops(const GpuPlacement& placement,
                                                     const GpuRowsOptions& options, const Needs& room,
                                                     int chunks) {
  GpuTwoHopShape shape = two_hop_shape(placement, options, room);
  shape.chunks = chunks;
  const std::int64_t even = (shape.max_tokens + chunks - 1) / chunks * shape.max_routes_of_token;
  shape.imbalance = std::max(1.0, static_cast<double>(room.routes) / static_cast<double>(even));
  TwoHops& groups = two_hops();
  return std::make_unique<TwoHopLayer>(groups.between, *groups.between_nccl, groups.inside,
                                       groups.inside_link, groups.inside_nccl.get(), runtime_.rank().value,
                                       shape);
}

std::unique_ptr<GpuResidentLayer> CudaGroup::make_resident(const Placement& placement,
                                                           const GpuResidentOptions& options) {
  return std::make_unique<CudaResident>(*this, placement, options);
}
std::unique_ptr<GpuRows> CudaGroup::make_rows(const Placement& placement, const GpuRowsOptions& options) {
  return std::make_unique<CudaRows>(*this, placement, options);
}

}  // namespace sluice
