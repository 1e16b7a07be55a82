#include "sluice/runtime/src/cuda/cuda_group.hpp"

#include <algorithm>
#include <cstring>

#include "sluice/comm/collectives.hpp"
#include "sluice/comm/host.hpp"
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

// The passes of one layer.
class CudaRows final : public GpuRows {
 public:
  CudaRows(CudaGroup& group, const Placement& placement, const GpuRowsOptions& options)
      : group_(group),
        placement_(gpu_placement(placement)),
        options_(options),
        x_(group.device()),
        y_(group.device()),
        row_ptr_(group.device()),
        expert_(group.device()),
        weight_(group.device()),
        dweight_(group.device()) {
    pass_.schedule = options.overlapped ? GpuSchedule::kOverlapped : GpuSchedule::kSequential;
    pass_.keep = options.training;
  }

  void plan(const RoutingView& routing) override {
    routing_.assign(routing, placement_);
    group_.in_pass("plan", [&] {
      const CudaGroup::Needs needs = group_.needs_of(routing_, placement_);
      if (!layer_ || needs.tokens > capacity_.tokens || needs.routes > capacity_.routes) grow(needs);
      upload(row_ptr_, routing_.row_ptr);
      upload(expert_, routing_.expert);
      upload(weight_, routing_.weight);
      layer_->plan({row_ptr_.as<std::int64_t>(), expert_.as<std::int32_t>(), weight_.as<float>()},
                   routing_.num_tokens(), group_.stream());
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
    if (layer_) bytes += static_cast<std::int64_t>(layer_->buffer_bytes() + exchange_->window_bytes());
    return bytes;
  }

 private:
  // Collective: all ranks see the same needs, so they grow together. With room to spare, since routings differ.
  void grow(const CudaGroup::Needs& needs) {
    layer_.reset();
    exchange_.reset();
    const auto with_room = [](std::int64_t had, std::int64_t n) { return std::max(had, n + n / 4 + 16); };
    capacity_ = {with_room(capacity_.tokens, needs.tokens), with_room(capacity_.routes, needs.routes)};
    exchange_ = group_.make_exchange(placement_, options_.hidden, capacity_);
    GpuLayerShape shape;
    shape.ffn = options_.ffn;
    shape.activation = options_.activation;
    shape.num_experts = static_cast<int>(placement_.rank_of.size());
    shape.rank_of = placement_.rank_of;
    shape.training = options_.training;
    layer_ = std::make_unique<GpuLayer>(*exchange_, 0, shape);
    const std::int64_t rows = capacity_.tokens * options_.hidden * 2;
    x_.at_least(rows);
    y_.at_least(rows);
    row_ptr_.at_least((capacity_.tokens + 1) * 8);
    for (DeviceMemory* memory : {&expert_, &weight_, &dweight_}) memory->at_least(capacity_.routes * 4);
  }
  template <typename T>
  void upload(DeviceMemory& to, const std::vector<T>& from) {
    check_cuda(cudaMemcpyAsync(to.as<T>(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice,
                               group_.stream()),
               "GPU rows");
  }
  void begin(ConstMatrixView rows) {
    group_.device().synchronize();  // weights and gradients were queued on the device's own stream
    if (rows.rows > 0) copy(x_.as<void>(), rows.row_bytes(), rows.data, rows.row_bytes_stride(), rows);
  }
  void end(MatrixView rows) {
    exchange_->wait(0, group_.stream());
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
  std::unique_ptr<RowExchange> exchange_;
  std::unique_ptr<GpuLayer> layer_;
  DeviceMemory x_, y_;  // of the pass: x and y, or dy and dx
  DeviceMemory row_ptr_, expert_, weight_, dweight_;
  std::vector<float> dweight_here_;
};

}  // namespace

CudaGroup::CudaGroup(Runtime& runtime, GpuLink link)
    : runtime_(runtime), device_(runtime.state().device.get()), link_(link) {
  device_->make_current();
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
  return {runtime_.rank().value, runtime_.num_ranks(),
          [this](const void* mine, void* all, std::size_t bytes) {
            const std::size_t words = (bytes + 7) / 8, ranks = static_cast<std::size_t>(runtime_.num_ranks());
            std::vector<std::int64_t> own(words, 0);
            std::memcpy(own.data(), mine, bytes);
            const std::vector<std::int64_t> gathered = runtime_.all_gather(own, "GPUs meet");
            for (std::size_t r = 0; r < ranks; ++r)
              std::memcpy(static_cast<std::byte*>(all) + r * bytes, gathered.data() + r * words, bytes);
          }};
}

void CudaGroup::check_devices() {
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
  std::vector<Card> all(static_cast<std::size_t>(runtime_.num_ranks()));
  bootstrap().all_gather(&mine, all.data(), sizeof mine);
  // All ranks see the same cards, so all say the same.
  for (std::size_t r = 0; r < all.size(); ++r) {
    Require(link_ != GpuLink::kNvlink || std::strcmp(all[r].host_id, all[0].host_id) == 0,
            ErrorCode::kNotSupported, "nvlink reaches GPUs of one host only, but rank 0 is on ", all[0].host,
            " and rank ", r, " on ", all[r].host, "; use comm.transport = nccl");
    for (std::size_t s = 0; s < r; ++s)
      Require(
          std::memcmp(all[r].uuid, all[s].uuid, sizeof mine.uuid) != 0, ErrorCode::kNotSupported, "ranks ", s,
          " and ", r, " share one GPU (", all[r].gpu, " of ", all[r].host, "), but comm.transport ",
          to_string(link_), " needs one for each rank; rank ", r, " sees ", all[r].num_visible,
          ": start no more ranks on a host than it has GPUs, or choose a transport of the host (shm, tcp), "
          "over which ranks may share one");
  }
}

CudaGroup::Needs CudaGroup::needs_of(const GpuRouting& routing, const GpuPlacement& placement) {
  const auto ranks = static_cast<std::size_t>(runtime_.num_ranks());
  std::vector<std::int64_t> mine(ranks + 1, 0);  // tokens, then routes to each rank
  mine[0] = routing.num_tokens();
  for (const std::int32_t e : routing.expert)
    ++mine[static_cast<std::size_t>(placement.rank_of[static_cast<std::size_t>(e)]) + 1];
  const std::vector<std::int64_t> all = runtime_.all_gather(mine, "routes between GPUs");
  Needs out;
  std::vector<std::int64_t> received(ranks, 0);
  for (std::size_t s = 0; s < ranks; ++s) {
    std::int64_t sent = 0;
    for (std::size_t d = 0; d < ranks; ++d) {
      const std::int64_t n = all[s * (ranks + 1) + 1 + d];
      sent += n;
      received[d] += n;
    }
    out.tokens = std::max(out.tokens, all[s * (ranks + 1)]);
    out.routes = std::max(out.routes, sent);
  }
  out.routes = std::max(out.routes, *std::max_element(received.begin(), received.end()));
  return out;
}

std::unique_ptr<RowExchange> CudaGroup::make_exchange(const GpuPlacement& placement, std::int64_t hidden,
                                                      const Needs& capacity) {
  comm::cuda::ExchangeShape shape;
  shape.max_tokens = std::max<std::int64_t>(1, capacity.tokens);
  shape.max_routes = std::max<std::int64_t>(1, capacity.routes);
  shape.hidden = hidden;
  shape.num_local_slots =
      static_cast<int>(std::count(placement.rank_of.begin(), placement.rank_of.end(), runtime_.rank().value));
  shape.deadline = runtime_.options().timeout;
  return std::make_unique<RowExchange>(
      bootstrap(), shape, link_ == GpuLink::kNvlink ? comm::cuda::Link::kNvlink : comm::cuda::Link::kNccl,
      comm::cuda::PeerPath::kBest, communicator_.get());
}

std::unique_ptr<GpuRows> CudaGroup::make_rows(const Placement& placement, const GpuRowsOptions& options) {
  return std::make_unique<CudaRows>(*this, placement, options);
}

}  // namespace sluice
