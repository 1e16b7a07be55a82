#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "sluice/base/error.hpp"
#include "sluice/comm/cuda/device_memory.hpp"
#include "sluice/kernels/cuda/grouped_gemm.hpp"
#include "sluice/kernels/cuda/rows.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"

namespace sluice {
namespace {

using comm::cuda::check_cuda;
using comm::cuda::CombineSource;
using comm::cuda::DeviceMemory;
using comm::cuda::ExpertRows;
using comm::cuda::MoverOptions;
using comm::cuda::ReceiveList;
using comm::cuda::RowExchange;
using comm::cuda::SendPlan;
using comm::cuda::Stream;
namespace gpu = kernels::cuda;

constexpr auto kBad = ErrorCode::kInvalidArgument;
// The cost model of a push beside a GEMM, measured on an H200 (docs/benchmarks.md): bytes a second that a processor stores to
// peers, and that the link takes; floating-point operations a second of a processor's part of a GEMM. What NCCL has
// between nodes is taken for a fast network card: a slower one only makes all of a GEMM run beside it.
constexpr double kStoreBytes = 42e9, kLinkBytes = 350e9, kNetworkBytes = 40e9, kGemmFlops = 4.9e12;
constexpr double kRoutesOfRow = 2;  // a row crosses once for at least so many routes
constexpr double kMostShare = 0.5;  // of a GEMM that should have a push beside it
constexpr double kMargin = 1.15;
constexpr int kFewestSms = 8, kMostSms = 16;
// With fewer rows an expert, by the size of the buffers, a GEMM only reads weights, and the one that fetches its rows has
// half as many bytes of them on their way.
constexpr std::int64_t kRowsToGather = 128;
constexpr double kOverlapFrom = 1.0 / 6;  // the link's share of the GEMMs' time

// Every expert has two slots: of own rows, and behind them of others'.
__global__ void split_slots_kernel(const std::int32_t* slot, const std::int64_t* source_route_ptr, int rank,
                                   int ranks, std::int32_t* split) {
  const std::int64_t own = source_route_ptr[rank], end = source_route_ptr[rank + 1],
                     all = source_route_ptr[ranks];
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < all;
       i += std::int64_t{gridDim.x} * blockDim.x)
    split[i] = 2 * slot[i] + (i >= own && i < end ? 0 : 1);
}

// What GEMMs need of a finished plan.
struct Groups {
  const std::int64_t* split_ptr;
  std::int64_t* group_ptr;   // [experts + 1]: own and others' rows together
  std::int64_t* gather_ptr;  // [2 experts + 1]: of the first `own_first` experts own rows before all others
  int experts, own_first;
  // Where the row of each position lies: a token of this rank, or ~ its place in the receive list.
  const std::int64_t* source_ptr;
  const std::int64_t* route_ptr;
  const std::int32_t* position;
  const std::int64_t* rank_ptr;
  const std::int32_t* send_row;
  std::int32_t* gather_index;
  int rank, ranks;
};
__global__ void groups_kernel(Groups g) {
  const std::int64_t thread = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t e = thread; e <= g.experts; e += threads) {
    const std::int64_t begin = g.split_ptr[2 * e];
    g.group_ptr[e] = begin;
    g.gather_ptr[2 * e] = begin;
    if (e == g.experts) break;
    // Whole tiles of the GEMM, so that cutting makes no more of them: where an expert's own rows end within one, that
    // tile is done with the others'.
    constexpr std::int64_t kTile = 256, kStep = 16;
    const std::int64_t all = g.split_ptr[2 * e + 2] - begin,
                       tiles = max((all + kTile - 1) / kTile, std::int64_t{1});
    const std::int64_t step = max(((all + tiles - 1) / tiles + kStep - 1) / kStep * kStep, kStep);
    g.gather_ptr[2 * e + 1] =
        begin + (e < g.own_first ? (g.split_ptr[2 * e + 1] - begin) / step * step : std::int64_t{0});
  }
  const std::int64_t own = g.source_ptr[g.rank], own_end = g.source_ptr[g.rank + 1];
  for (std::int64_t row = thread; row < g.source_ptr[g.ranks]; row += threads) {
    const bool is_own = row >= own && row < own_end;
    const auto where = is_own ? g.send_row[g.rank_ptr[g.rank] + row - own] : static_cast<std::int32_t>(~row);
    for (std::int64_t i = g.route_ptr[row]; i < g.route_ptr[row + 1]; ++i)
      g.gather_index[g.position[i]] = where;
  }
}

__global__ void raise_kernel(std::uint32_t* flag) {
  __threadfence();
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

constexpr const char* kWhat = "GPU layer";
template <typename T>
DeviceMemory<T> memory(std::int64_t count) {
  return DeviceMemory<T>(static_cast<std::size_t>(count), kWhat);
}
using Bf16 = std::uint16_t;

}  // namespace

struct GpuLayer::Impl {
  comm::cuda::RowExchange& exchange;
  const int channel;
  const GpuLayerShape shape;
  const comm::cuda::ExchangeShape& rows;
  const int ranks, local;
  const std::int64_t hidden, ffn, pre;  // columns of a preactivation row
  const std::int64_t routes;            // that the buffers hold
  int processors = 0;
  std::int64_t num_tokens = 0;
  comm::cuda::StreamHandle beside_gemms;  // of the exchange
  comm::cuda::EventHandle ready, arrived, computed, sent;

  DeviceMemory<std::int32_t> rank_of, slot_of, local_rank_of, local_slot_of;
  DeviceMemory<std::int64_t> expert_ptr, rank_ptr, rank_route_ptr, send_route_ptr, home_ptr, local_rank_ptr;
  // Expert rows of local expert e: split_ptr[2e] .. split_ptr[2e+1] are own ones, those up to split_ptr[2e+2] others';
  // group_ptr[e] .. group_ptr[e+1] both.
  DeviceMemory<std::int64_t> split_ptr, group_ptr;
  // kGathered: the same rows, cut where tiles end (groups_kernel), and in which order; where each row lies.
  DeviceMemory<std::int64_t> gather_ptr;
  DeviceMemory<std::int32_t> gather_order, gather_index;
  // Others' rows are here; tiles taken of the GEMM of the moment.
  DeviceMemory<std::uint32_t> arrived_flag, ticket;
  DeviceMemory<gpu::WaitDiagnosis> diagnosis;
  DeviceMemory<std::int32_t> only_own, only_others, rest,
      expert_of_split;  // which groups of split_ptr, and their weights
  DeviceMemory<std::int32_t> send_row, send_route, send_slot, home_position, split_slot, position;
  DeviceMemory<float> send_weight, weight_of_position, dweight_of_position;
  DeviceMemory<unsigned char> scratch;
  DeviceMemory<Bf16> expert_rows, act, out, h, gradient_rows, u, reduced;

  Impl(comm::cuda::RowExchange& e, int channel_, const GpuLayerShape& s)
      : exchange(e),
        channel(channel_),
        shape(s),
        rows(e.shape()),
        ranks(e.num_ranks()),
        local(static_cast<int>(std::count(s.rank_of.begin(), s.rank_of.end(), e.rank()))),
        hidden(rows.hidden),
        ffn(s.ffn),
        pre(kernels::preactivation_cols(s.activation, s.ffn)),
        routes(rows.max_routes) {
    Require(rows.dtype == DType::kBF16, kBad, "GPU layer: rows must be bf16");
    Require(s.num_experts >= 1 && static_cast<int>(s.rank_of.size()) == s.num_experts, kBad,
            "GPU layer: rank_of has ", s.rank_of.size(), " entries for ", s.num_experts, " experts");
    for (const std::int32_t r : s.rank_of)
      Require(r >= 0 && r < ranks, kBad, "GPU layer: an expert lives on rank ", r, " of ", ranks);
    Require(s.ffn >= 8 && s.ffn % 8 == 0 && hidden % 8 == 0, kBad, "GPU layer: ffn ", s.ffn, " and hidden ",
            hidden, " must be multiples of 8");
    Require(2 * local <= gpu::kMaxGemmGroups, kBad, "GPU layer: ", local, " experts of a rank; at most ",
            gpu::kMaxGemmGroups / 2, " are possible");
    Require(rows.num_local_slots == local, kBad, "GPU layer: the exchange has ", rows.num_local_slots,
            " slots for this rank, which has ", local, " experts");
    int device = 0;
    check_cuda(cudaGetDevice(&device), kWhat);
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kWhat);
    std::vector<std::int32_t> slots, next(static_cast<std::size_t>(ranks), 0), zeros, identity;
    for (const std::int32_t r : s.rank_of) slots.push_back(next[static_cast<std::size_t>(r)]++);
    for (int i = 0; i < 2 * local; ++i) {
      zeros.push_back(0);
      identity.push_back(i);
    }
    rank_of = comm::cuda::upload(s.rank_of, kWhat);
    slot_of = comm::cuda::upload(slots, kWhat);
    local_rank_of = comm::cuda::upload(zeros, kWhat);
    local_slot_of = comm::cuda::upload(identity, kWhat);
    const std::int64_t send_rows = rows.max_tokens * ranks;
    expert_ptr = memory<std::int64_t>(s.num_experts + 1);
    rank_ptr = memory<std::int64_t>(ranks + 1);
    rank_route_ptr = memory<std::int64_t>(ranks + 1);
    send_route_ptr = memory<std::int64_t>(send_rows + 1);
    home_ptr = memory<std::int64_t>(rows.max_tokens + 1);
    split_ptr = memory<std::int64_t>(2 * local + 1);
    group_ptr = memory<std::int64_t>(local + 1);
    gather_ptr = memory<std::int64_t>(2 * local + 1);
    std::vector<std::int32_t> own, others, expert, own_first;
    for (int i = 0; i < 2 * local; ++i) {
      own_first.push_back(i < local ? 2 * i : 2 * (i - local) + 1);
      own.push_back(i % 2 == 0 ? i : -1);
      others.push_back(i % 2 == 1 ? i : -1);
      expert.push_back(i / 2);
    }
    std::vector<std::int32_t> from;  // [local + 1][2 * local]
    for (int after = 0; after <= local; ++after)
      for (int i = 0; i < 2 * local; ++i) from.push_back(i % 2 == 1 || i / 2 >= after ? i : -1);
    rest = comm::cuda::upload(from, kWhat);
    gather_order = comm::cuda::upload(own_first, kWhat);
    gather_index = memory<std::int32_t>(routes);
    arrived_flag = memory<std::uint32_t>(1);
    ticket = memory<std::uint32_t>(1);
    diagnosis = memory<gpu::WaitDiagnosis>(1);
    only_own = comm::cuda::upload(own, kWhat);
    only_others = comm::cuda::upload(others, kWhat);
    expert_of_split = comm::cuda::upload(expert, kWhat);
    local_rank_ptr = memory<std::int64_t>(2);
    send_row = memory<std::int32_t>(send_rows);
    send_route = memory<std::int32_t>(routes);
    send_slot = memory<std::int32_t>(routes);
    home_position = memory<std::int32_t>(send_rows);
    split_slot = memory<std::int32_t>(routes);
    position = memory<std::int32_t>(routes);
    send_weight = memory<float>(routes);
    weight_of_position = memory<float>(routes);
    scratch = memory<unsigned char>(static_cast<std::int64_t>(
        std::max(gpu::plan_scratch_bytes(rows.max_tokens, s.num_experts, ranks),
                 gpu::plan_scratch_bytes(rows.max_received, std::max(1, 2 * local), 1))));
    expert_rows = memory<Bf16>(routes * hidden);
    act = memory<Bf16>(routes * ffn);
    out = memory<Bf16>(routes * hidden);
    reduced = memory<Bf16>(rows.max_received * hidden);
    if (s.training) {
      h = memory<Bf16>(routes * pre);
      u = memory<Bf16>(routes * ffn);
      gradient_rows = memory<Bf16>(routes * hidden);
      dweight_of_position = memory<float>(routes);
    }
  }
  ~Impl() { exchange.drain(beside_gemms.stream); }

  SendPlan send_plan() const {
    return {rank_ptr.get(),  send_row.get(),    send_route_ptr.get(), send_route.get(),
            send_slot.get(), send_weight.get(), home_ptr.get(),       home_position.get()};
  }
  void meet(const comm::cuda::EventHandle& at, Stream from, Stream to) const {
    check_cuda(cudaEventRecord(at.event, from), kWhat);
    check_cuda(cudaStreamWaitEvent(to, at.event, 0), kWhat);
  }
  bool is_sequential(const GpuLayerOptions& options) const {
    return options.schedule == GpuSchedule::kSequential || options.schedule == GpuSchedule::kGathered ||
           (options.schedule == GpuSchedule::kAuto && exchange.link() == comm::cuda::Link::kNvlink &&
            !overlap_pays(shape, rows, ranks, processors));
  }
  bool gathers(const GpuLayerOptions& options) const {
    const bool wanted = options.schedule == GpuSchedule::kGathered ||
                        (options.schedule == GpuSchedule::kAuto &&
                         routes >= kRowsToGather * std::max(local, 1) && gpu::gathering_pays(pre));
    return wanted && exchange.link() == comm::cuda::Link::kNvlink && rows.wire == comm::cuda::Wire::kRows &&
           !(shape.training && options.keep);
  }
  void check_options(const GpuLayerOptions& options) const {
    Require(options.comm_sms >= 0 && options.comm_sms % 2 == 0 && options.comm_sms <= processors / 2, kBad,
            "GPU layer: comm_sms is ", options.comm_sms, "; an even number up to ", processors / 2,
            " is needed, 0 for the cost model");
  }

  // ---- the GEMMs of some experts' rows -------------------------------------------------------------------------------
  enum class Rows { kOwn, kOthers, kAll, kRest };  // kRest: of others, and own ones of experts from `after`
  struct Part {
    Rows rows;
    int first, count;  // experts
    int max_sms;       // 0: all
    int after = 0;
  };
  gpu::GemmGroups groups(const Part& p, bool tickets = true) const {
    gpu::GemmGroups g;
    if (tickets) g.tickets.next = ticket.get();
    if (p.rows == Rows::kAll) {
      g.group_ptr = group_ptr.get() + p.first;
      g.num_groups = p.count;
    } else {
      g.group_ptr = split_ptr.get() + 2 * p.first;
      g.order = p.rows == Rows::kOwn      ? only_own.get()
                : p.rows == Rows::kOthers ? only_others.get()
                                          : rest.get() + std::int64_t{p.after} * 2 * local;
      g.weight_index = expert_of_split.get();
      g.num_groups = 2 * p.count;
    }
    g.num_rows = routes;
    g.max_sms = p.max_sms;
    return g;
  }
  gpu::GemmWeights weights(const void* base, const Part& p, std::int64_t out_cols,
                           std::int64_t in_cols) const {
    return {static_cast<const Bf16*>(base) + p.first * out_cols * in_cols, p.count, out_cols * in_cols,
            out_cols, in_cols};
  }
  gpu::GemmActivation gemm_activation() const {
    switch (shape.activation) {
      case kernels::Activation::kSwiGLU:
        return gpu::GemmActivation::kSwiGLU;
      case kernels::Activation::kGelu:
        return gpu::GemmActivation::kGelu;
      case kernels::Activation::kRelu:
        return gpu::GemmActivation::kRelu;
    }
    return gpu::GemmActivation::kNone;
  }
  void gemm1(const GpuExperts& e, const Part& p, bool keep, Stream stream) const {
    if (p.count == 0) return;
    gpu::grouped_gemm_forward(groups(p), weights(e.w1, p, pre, hidden), {expert_rows.get(), hidden},
                              {shape.training && keep ? h.get() : nullptr, pre}, {act.get(), ffn},
                              gemm_activation(), stream);
  }
  void gemm2(const GpuExperts& e, const Part& p, Stream stream) const {
    if (p.count == 0) return;
    gpu::grouped_gemm_forward(groups(p), weights(e.w2, p, hidden, ffn), {act.get(), ffn}, {out.get(), hidden},
                              {}, gpu::GemmActivation::kNone, stream);
  }
  // A push of rows beside a GEMM: its processors, and how many experts the GEMM does meanwhile. The push takes time by the
  // routes of others, the GEMM by own ones, which are 1 / (ranks - 1) of them where experts are chosen evenly, or by all.
  struct Beside {
    int sms, experts;
  };
  Beside beside(std::int64_t out_cols, std::int64_t in_cols, int wanted, Rows of = Rows::kOwn) const {
    const double gemm = 2.0 * static_cast<double>(out_cols) * static_cast<double>(in_cols) / kGemmFlops;
    const auto share = [&](int sms) {
      const double rate = exchange.link() == comm::cuda::Link::kNvlink
                              ? std::min(sms * kStoreBytes, kLinkBytes)
                              : kNetworkBytes;
      const double push = static_cast<double>(hidden) * 2 / kRoutesOfRow / rate;
      return (ranks - 1) * push / (gemm / (processors - sms)) * kMargin / (of == Rows::kAll ? ranks : 1);
    };
    const int most = std::min(kMostSms, processors / 4 * 2);
    int sms = wanted;
    if (sms == 0) {
      sms = most;  // NCCL takes more than it needs
      if (exchange.link() == comm::cuda::Link::kNvlink)
        for (sms = std::min(kFewestSms, most); sms < most && share(sms) > kMostShare;) sms += 2;
    }
    const auto experts = static_cast<int>(std::ceil(std::min(share(sms), 1.0) * local));
    return {sms, std::clamp(experts, std::min(1, local), local)};
  }
  // Rows of `x` to the experts and `gemm` over them: own rows of the first few experts beside the push that brings the
  // others', then, when all are there, everything else at once: a GEMM's last tiles leave processors idle, so that few GEMMs
  // are best.
  template <typename Gemm>
  void bring_beside(const Gemm& gemm, const void* x, Bf16* to, const Beside& b, Stream stream) const {
    const ExpertRows target{to, hidden, position.get(), {}};
    meet(ready, stream, beside_gemms.stream);
    exchange.dispatch(channel, send_plan(), x, hidden, {}, {b.sms, 0}, beside_gemms.stream);
    check_cuda(cudaEventRecord(arrived.event, beside_gemms.stream), kWhat);
    exchange.expand(channel, send_plan(), RowExchange::Rows::kOwn, x, hidden, target, {1, processors - b.sms},
                    stream);
    gemm(Part{Rows::kOwn, 0, b.experts, (processors - b.sms) / 2 * 2});
    check_cuda(cudaStreamWaitEvent(stream, arrived.event, 0), kWhat);
    exchange.expand(channel, send_plan(), RowExchange::Rows::kOthers, x, hidden, target, {1, 0}, stream);
    gemm(Part{Rows::kRest, 0, local, 0, b.experts});
  }
  // Results of others leave beside `gemm` over `of`; `sent` says when.
  template <typename Gemm>
  void return_beside(const Gemm& gemm, Rows of, bool weighted, const Beside& b, Stream stream) const {
    exchange.reduce_results(channel, results(weighted), reduced.get(), {1, 0}, stream);
    meet(computed, stream, beside_gemms.stream);
    exchange.push_results(channel, {reduced.get(), hidden, nullptr, false}, {b.sms, 0}, beside_gemms.stream);
    check_cuda(cudaEventRecord(sent.event, beside_gemms.stream), kWhat);
    gemm(Part{of, 0, b.experts, (processors - b.sms) / 2 * 2});
    gemm(Part{of, b.experts, local - b.experts, 0});
  }
  // GEMM 1 over rows where they are. `sharing`: one of two launches that share the tiles, on `sms` processors, while others'
  // rows may be on their way; else all are here.
  void gemm1_gathering(const GpuExperts& e, const void* x, bool sharing, int sms, Stream stream) const {
    if (local == 0 || (num_tokens == 0 && ranks == 1)) return;
    gpu::GemmGroups g;
    g.group_ptr = gather_ptr.get();
    g.order = gather_order.get();
    g.weight_index = expert_of_split.get();
    g.num_groups = 2 * local;
    g.num_rows = routes;
    g.max_sms = sms;
    // The push ends by its own deadlines, and raises the flag in any case.
    if (sharing)
      g.arrival = {arrived_flag.get(), 1, 1, 8 * static_cast<std::uint64_t>(rows.deadline.count()),
                   diagnosis.get()};
    const gpu::GatheredRows from{gather_index.get(),
                                 {x, hidden},
                                 num_tokens,
                                 {exchange.received(channel), hidden},
                                 ranks > 1 ? rows.max_received : 0};
    g.tickets = {ticket.get(), sharing ? processors / 2 * 2 : 0};
    gpu::grouped_gemm_forward(g, weights(e.w1, all_of(Rows::kAll), pre, hidden), from, {}, {act.get(), ffn},
                              gemm_activation(), stream);
  }
  // The processors of the push take tiles when it is done. They are never given to the GEMM before: it would wait for a push
  // that waits for them.
  void bring_gathering(const GpuExperts& e, const void* x, const Beside& b, Stream stream) const {
    if (ranks == 1) return gemm1_gathering(e, x, false, 0, stream);
    check_cuda(cudaMemsetAsync(arrived_flag.get(), 0, arrived_flag.bytes(), stream), kWhat);
    meet(ready, stream, beside_gemms.stream);
    exchange.dispatch(channel, send_plan(), x, hidden, {}, {b.sms, 0}, beside_gemms.stream);
    raise_kernel<<<1, 1, 0, beside_gemms.stream>>>(arrived_flag.get());
    check_cuda(cudaGetLastError(), kWhat);
    gemm1_gathering(e, x, true, b.sms, beside_gemms.stream);
    check_cuda(cudaEventRecord(arrived.event, beside_gemms.stream), kWhat);
    gemm1_gathering(e, x, true, processors / 2 * 2 - b.sms, stream);
    check_cuda(cudaStreamWaitEvent(stream, arrived.event, 0), kWhat);
  }
  Part all_of(Rows of) const { return {of, 0, local, 0}; }

  void bring(const void* x, Bf16* to, Stream stream) const {
    exchange.dispatch(channel, send_plan(), x, hidden, {to, hidden, position.get(), {}}, all_processors(),
                      stream);
  }
  MoverOptions all_processors() const {  // as measured with many tokens and with few
    const int push = std::min(rows.max_tokens > 1024 ? 48 : 64, processors / 2);
    return {push, processors - push};
  }
  CombineSource results(bool weighted) const { return {out.get(), hidden, position.get(), weighted}; }

  void forward(const GpuExperts& e, const void* x, void* y, const GpuLayerOptions& options, Stream stream) {
    const auto first = [&](const Part& p) { gemm1(e, p, options.keep, stream); };
    const auto second = [&](const Part& p) { gemm2(e, p, stream); };
    if (is_sequential(options) || gathers(options)) {
      if (gathers(options)) {
        bring_gathering(e, x, beside(pre, hidden, options.comm_sms), stream);
      } else {
        bring(x, expert_rows.get(), stream);
        first(all_of(Rows::kAll));
      }
      second(all_of(Rows::kAll));
      exchange.combine(channel, send_plan(), results(true), y, hidden, num_tokens, all_processors(), stream);
      return;
    }
    bring_beside(first, x, expert_rows.get(), beside(pre, hidden, options.comm_sms), stream);
    second(all_of(Rows::kOthers));
    return_beside(second, Rows::kOwn, true, beside(hidden, ffn, options.comm_sms), stream);
    check_cuda(cudaStreamWaitEvent(stream, sent.event, 0), kWhat);
    exchange.sum_at_home(channel, send_plan(), results(true), y, hidden, 0, num_tokens, true, {1, 0}, stream);
  }

  void backward(const GpuExperts& e, const GpuExpertGradients& g, const void* dy, void* dx, float* dweight,
                const GpuLayerOptions& options, Stream stream) {
    const bool sequential = is_sequential(options);
    const auto to_act = [&](const Part& p) {
      if (p.count > 0)
        gpu::grouped_gemm_dgrad(groups(p), weights(e.w2, p, hidden, ffn), {gradient_rows.get(), hidden},
                                {u.get(), ffn}, stream);
    };
    const auto to_rows = [&](const Part& p) {
      if (p.count > 0)
        gpu::grouped_gemm_dgrad(groups(p), weights(e.w1, p, pre, hidden), {h.get(), pre}, {out.get(), hidden},
                                stream);
    };
    if (sequential) {
      bring(dy, gradient_rows.get(), stream);
      to_act(all_of(Rows::kAll));
    } else {
      bring_beside(to_act, dy, gradient_rows.get(), beside(hidden, ffn, options.comm_sms), stream);
    }
    // In place: h becomes dh, u becomes weight * act.
    const auto view = [](const Bf16* data, std::int64_t n, std::int64_t cols) {
      return MatrixView(reinterpret_cast<std::byte*>(const_cast<Bf16*>(data)), DType::kBF16, n, cols, cols);
    };
    gpu::activation_backward(shape.activation, view(h.get(), routes, pre), view(u.get(), routes, ffn),
                             weight_of_position.get(), dweight_of_position.get(), view(h.get(), routes, pre),
                             view(u.get(), routes, ffn), 0, routes, group_ptr.get() + local, stream);
    to_rows(all_of(Rows::kAll));
    const auto wgrads = [&](bool second, const Part& p) {
      if (p.count == 0) return;
      if (second) {
        gpu::grouped_gemm_wgrad(groups(p, false), {gradient_rows.get(), hidden}, hidden, {u.get(), ffn}, ffn,
                                g.w2 + p.first * hidden * ffn, hidden * ffn, g.update, stream);
      } else {
        gpu::grouped_gemm_wgrad(groups(p, false), {h.get(), pre}, pre, {expert_rows.get(), hidden}, hidden,
                                g.w1 + p.first * pre * hidden, pre * hidden, g.update, stream);
      }
    };
    const auto wgrad2 = [&](const Part& p) { wgrads(true, p); };
    const auto scalars = [&](Stream on) {
      if (dweight != nullptr)
        exchange.return_scalars(channel, send_plan(), dweight_of_position.get(), position.get(), dweight, on);
      if (options.results_done != nullptr) check_cuda(cudaEventRecord(options.results_done, on), kWhat);
    };
    if (sequential) {
      exchange.combine(channel, send_plan(), results(false), dx, hidden, num_tokens, all_processors(),
                       stream);
      scalars(stream);
      wgrad2(all_of(Rows::kAll));
      wgrads(false, all_of(Rows::kAll));
      return;
    }
    return_beside(wgrad2, Rows::kAll, false, beside(hidden, ffn, options.comm_sms, Rows::kAll), stream);
    wgrads(false, all_of(Rows::kAll));
    check_cuda(cudaStreamWaitEvent(stream, sent.event, 0), kWhat);
    exchange.sum_at_home(channel, send_plan(), results(false), dx, hidden, 0, num_tokens, true, {1, 0},
                         stream);
    scalars(stream);
  }
};

bool overlap_pays(const GpuLayerShape& shape, const comm::cuda::ExchangeShape& rows, int num_ranks,
                  int processors) {
  if (num_ranks == 1 || rows.max_routes < kRowsToGather * std::max(rows.num_local_slots, 1)) return false;
  const double ranks = num_ranks, routes = static_cast<double>(rows.max_routes),
               hidden = static_cast<double>(rows.hidden);
  const double leave =
      std::min(static_cast<double>(rows.max_tokens) * (ranks - 1), routes * (ranks - 1) / ranks);
  const double link = 2 * leave * hidden * 2 / kLinkBytes;  // there and back
  const double columns =
      static_cast<double>(kernels::preactivation_cols(shape.activation, shape.ffn) + shape.ffn);
  return link > kOverlapFrom * routes * 2 * hidden * columns / (kGemmFlops * processors);
}

GpuLayer::GpuLayer(comm::cuda::RowExchange& exchange, int channel, const GpuLayerShape& shape)
    : impl_(std::make_unique<Impl>(exchange, channel, shape)) {}
GpuLayer::~GpuLayer() = default;

int GpuLayer::num_local_experts() const {
  return impl_->local;
}
std::size_t GpuLayer::buffer_bytes() const {
  const Impl& i = *impl_;
  return i.expert_rows.bytes() + i.act.bytes() + i.out.bytes() + i.h.bytes() + i.u.bytes() +
         i.gradient_rows.bytes() + i.reduced.bytes();
}

void GpuLayer::plan(const kernels::cuda::ConstRouting& routing, std::int64_t num_tokens, Stream stream) {
  Impl& i = *impl_;
  Require(num_tokens >= 0 && num_tokens <= i.rows.max_tokens, kBad, "GPU layer: ", num_tokens,
          " tokens; max_tokens is ", i.rows.max_tokens);
  i.num_tokens = num_tokens;
  const gpu::PlanBuffers send{i.expert_ptr.get(),
                              nullptr,
                              nullptr,
                              nullptr,
                              i.rank_ptr.get(),
                              i.rank_route_ptr.get(),
                              i.send_row.get(),
                              i.send_route_ptr.get(),
                              i.send_route.get(),
                              i.send_slot.get(),
                              i.send_weight.get(),
                              i.home_ptr.get(),
                              i.home_position.get()};
  gpu::build_plan(routing, num_tokens, {i.rank_of.get(), i.slot_of.get(), i.shape.num_experts, i.ranks}, send,
                  i.scratch.get(), stream);
  i.exchange.exchange_plan(i.channel, i.send_plan(), stream);
  const ReceiveList list = i.exchange.receive_list(i.channel);
  if (i.local == 0) {
    check_cuda(cudaMemsetAsync(i.split_ptr.get(), 0, i.split_ptr.bytes(), stream), kWhat);
    check_cuda(cudaMemsetAsync(i.group_ptr.get(), 0, i.group_ptr.bytes(), stream), kWhat);
    return;
  }
  split_slots_kernel<<<64, 256, 0, stream>>>(list.slot, list.source_route_ptr, i.exchange.rank(), i.ranks,
                                             i.split_slot.get());
  check_cuda(cudaGetLastError(), "GPU layer: plan");
  const gpu::PlanBuffers receive{i.split_ptr.get(), i.position.get(), nullptr, i.weight_of_position.get(),
                                 i.local_rank_ptr.get()};
  gpu::build_plan({list.route_ptr, i.split_slot.get(), list.weight}, i.rows.max_received,
                  {i.local_rank_of.get(), i.local_slot_of.get(), 2 * i.local, 1}, receive, i.scratch.get(),
                  stream);
  // A push beside a GEMM takes up to twice as long as alone, so own rows of twice the experts come first.
  const int own_first = i.ranks == 1 ? 0 : std::min(i.local, 2 * i.beside(i.pre, i.hidden, 0).experts);
  groups_kernel<<<64, 256, 0, stream>>>({i.split_ptr.get(), i.group_ptr.get(), i.gather_ptr.get(), i.local,
                                         own_first, list.source_ptr, list.route_ptr, i.position.get(),
                                         i.rank_ptr.get(), i.send_row.get(), i.gather_index.get(),
                                         i.exchange.rank(), i.ranks});
  check_cuda(cudaGetLastError(), "GPU layer: plan");
}

void GpuLayer::forward(const GpuExperts& experts, const void* x, void* y, const GpuLayerOptions& options,
                       Stream stream) {
  impl_->check_options(options);
  Require(impl_->local == 0 || (experts.w1 != nullptr && experts.w2 != nullptr), kBad,
          "GPU layer: weights are null");
  impl_->forward(experts, x, y, options, stream);
}
void GpuLayer::backward(const GpuExperts& experts, const GpuExpertGradients& gradients, const void* dy,
                        void* dx, float* dweight, const GpuLayerOptions& options, Stream stream) {
  impl_->check_options(options);
  Require(impl_->shape.training, ErrorCode::kInvalidState, "GPU layer: backward needs `training`");
  Require(impl_->local == 0 || (gradients.w1 != nullptr && gradients.w2 != nullptr), kBad,
          "GPU layer: gradients are null");
  impl_->backward(experts, gradients, dy, dx, dweight, options, stream);
}

void GpuLayer::exchange_only(const void* x, void* y, const GpuLayerOptions& options, Stream stream) {
  impl_->check_options(options);
  Impl& i = *impl_;
  i.bring(x, i.expert_rows.get(), stream);
  i.exchange.combine(i.channel, i.send_plan(), i.results(true), y, i.hidden, i.num_tokens, i.all_processors(),
                     stream);
}
void GpuLayer::gemms_only(const GpuExperts& experts, const void* x, const GpuLayerOptions& options,
                          Stream stream) {
  if (impl_->gathers(options))
    impl_->gemm1_gathering(experts, x, false, 0, stream);
  else
    impl_->gemm1(experts, impl_->all_of(Impl::Rows::kAll), options.keep, stream);
  impl_->gemm2(experts, impl_->all_of(Impl::Rows::kAll), stream);
}

void GpuLayer::local_only(const GpuExperts& experts, const void* x, void* y, const GpuLayerOptions& options,
                          Stream stream) {
  Impl& i = *impl_;
  if (!i.gathers(options))
    for (const RowExchange::Rows rows : {RowExchange::Rows::kOwn, RowExchange::Rows::kOthers})
      i.exchange.expand(i.channel, i.send_plan(), rows, x, i.hidden,
                        {i.expert_rows.get(), i.hidden, i.position.get(), {}}, {1, 0}, stream);
  gemms_only(experts, x, options, stream);
  i.exchange.reduce_results(i.channel, i.results(true), i.reduced.get(), {1, 0}, stream);
  i.exchange.sum_again(i.channel, i.send_plan(), i.results(true), y, i.hidden, i.num_tokens, stream);
}

}  // namespace sluice
