#include "sluice/comm/cuda/row_exchange.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <utility>

#include "sluice/comm/cuda/device_memory.hpp"
#include "sluice/comm/cuda/exchange_kernels.hpp"
#include "sluice/comm/cuda/nccl_library.hpp"

namespace sluice::comm::cuda {
namespace {

constexpr auto kBad = ErrorCode::kInvalidArgument;
// Of the window, before the channels: flags of barrier(), and of ranks that leave.
constexpr std::size_t kBarrierFlags = 0, kLeaveFlags = 2048, kGroupBytes = 4096;
// How long a rank that leaves a group that has failed waits for the others: theirs end their waits as well, or are gone.
constexpr std::chrono::nanoseconds kLeaveFailed = std::chrono::seconds(1);
// The same for the next one, where somebody has not come to the last: a model's layers have an exchange each.
constexpr std::chrono::nanoseconds kLeaveNext = std::chrono::milliseconds(20);
thread_local std::chrono::steady_clock::time_point left_alone;  // when somebody did not come
constexpr int kFirstSlice = 8;         // a copy engine's first slice is 1/8, the others share the rest
constexpr int kSumsBesideCopies = 64;  // processors, the best measured (docs/benchmarks.md)

std::size_t align_up(std::size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

const char* name_of(WaitFor what) {
  switch (what) {
    case WaitFor::kBarrier:
      return "barrier";
    case WaitFor::kPlanCounts:
      return "plan: row counts";
    case WaitFor::kPlanHeaders:
      return "plan: row headers";
    case WaitFor::kDispatchReady:
      return "dispatch: the peer's buffer to be free";
    case WaitFor::kDispatchRows:
      return "dispatch: rows";
    case WaitFor::kCombineReady:
      return "combine: the peer's buffer to be free";
    case WaitFor::kCombineRows:
      return "combine: results";
    case WaitFor::kScalarsReady:
      return "scalars: the peer's buffer to be free";
    case WaitFor::kScalars:
      return "scalars";
  }
  return "unknown";
}

ExchangeShape checked(ExchangeShape shape, int num_ranks, int rank) {
  Require(num_ranks >= 1 && num_ranks <= kMaxExchangeRanks, kBad, "row exchange: num_ranks is ", num_ranks,
          "; 1..", kMaxExchangeRanks, " are possible");
  Require(rank >= 0 && rank < num_ranks, kBad, "row exchange: rank ", rank, " of ", num_ranks);
  Require(shape.max_tokens >= 1 && shape.max_tokens < (std::int64_t{1} << 24), kBad,
          "row exchange: max_tokens is ", shape.max_tokens, "; 1..2^24-1 are possible");
  Require(shape.dtype == DType::kBF16 || shape.dtype == DType::kF32, ErrorCode::kNotSupported,
          "row exchange: rows are bf16 or fp32");
  const std::int64_t element = shape.dtype == DType::kBF16 ? 2 : 4;
  Require(shape.hidden >= 1 && shape.hidden <= (1 << 20) && shape.hidden * element % 16 == 0, kBad,
          "row exchange: hidden is ", shape.hidden,
          "; rows must be a multiple of 16 bytes, up to 2^20 columns");
  Require(shape.wire == Wire::kRows || (shape.dtype == DType::kBF16 && shape.hidden % 16 == 0), kBad,
          "row exchange: an fp8 wire needs bf16 rows and hidden a multiple of 16, not ", shape.hidden);
  if (shape.max_received == 0) shape.max_received = shape.max_tokens * num_ranks;
  Require(shape.max_received >= 1 && shape.max_received <= shape.max_tokens * num_ranks &&
              shape.max_received < (std::int64_t{1} << 30),
          kBad, "row exchange: max_received is ", shape.max_received,
          "; up to num_ranks * max_tokens = ", shape.max_tokens * num_ranks, " are possible");
  if (shape.max_routes == 0) shape.max_routes = 8 * shape.max_received;
  Require(shape.max_routes >= 1 && shape.max_routes < (std::int64_t{1} << 31) - 1, kBad,
          "row exchange: max_routes is ", shape.max_routes);
  Require(shape.num_local_slots >= 0, kBad, "row exchange: num_local_slots is ", shape.num_local_slots);
  Require(shape.chunk_rows >= 1 && shape.chunk_rows <= 4096, kBad, "row exchange: chunk_rows is ",
          shape.chunk_rows, "; 1..4096 are possible");
  Require(shape.num_channels >= 1 && shape.num_channels <= 256, kBad, "row exchange: num_channels is ",
          shape.num_channels, "; 1..256 are possible");
  Require(shape.deadline.count() > 0, kBad, "row exchange: the deadline must be positive");
  return shape;
}

std::int64_t row_bytes(const ExchangeShape& s) {
  return s.hidden * (s.dtype == DType::kBF16 ? 2 : 4);
}

WindowLayout layout_of(const ExchangeShape& s, int num_ranks, int max_chunks) {
  const auto ranks = static_cast<std::size_t>(num_ranks), chunks = static_cast<std::size_t>(max_chunks);
  const auto rows = static_cast<std::size_t>(s.max_received), routes = static_cast<std::size_t>(s.max_routes);
  const auto bytes = static_cast<std::size_t>(row_bytes(s));
  const std::size_t wire = s.wire == Wire::kFp8 ? bytes / 2 : bytes;
  WindowLayout at{};
  std::size_t next = 0;
  const auto place = [&](std::size_t size) {
    const std::size_t here = next;
    next += align_up(size);
    return here;
  };
  at.counts = place(ranks * ranks * 8);
  at.count_flag = place(ranks * 4);
  at.header_flag = place(ranks * 4);
  at.dispatch_ready = place(ranks * 4);
  at.combine_ready = place(ranks * 4);
  at.result_flag = place(ranks * 4);
  at.scalar_ready = place(ranks * 4);
  at.scalar_flag = place(ranks * 4);
  at.given_up = place(ranks * 4);
  at.dispatch_flags = place(ranks * chunks * 4);
  at.combine_flags = place(ranks * chunks * 4);
  at.route_ptr = place((rows + 1) * 8);
  at.slot = place(routes * 4);
  at.weight = place(routes * 4);
  at.scalars = place(routes * 4);
  at.scale = place(s.wire == Wire::kFp8 ? rows * 4 : 0);
  at.rows = place(rows * wire);
  at.home = place(static_cast<std::size_t>(s.max_tokens) * ranks * bytes);
  at.bytes = next;
  return at;
}

}  // namespace

MoverChoice choose_mover(std::int64_t bytes, int max_sms, bool counts_known, const MoverCosts& costs) {
  Require(bytes >= 0 && max_sms >= 0, kBad, "choose_mover: ", bytes, " bytes, ", max_sms, " processors");
  Require(max_sms > 0 || counts_known, kBad,
          "choose_mover: copy engines need the counts on the host, stores a processor; there is neither");
  const auto stores = [&](int sms) {
    return costs.store_start_us +
           static_cast<double>(bytes) / std::min(sms * costs.store_bytes_us_sm, costs.store_bytes_us);
  };
  const double copies = costs.copy_start_us + static_cast<double>(bytes) / costs.copy_bytes_us;
  if (max_sms == 0 || (counts_known && copies < stores(max_sms))) return {Mover::kCopyEngines, 0, copies};
  int sms = 1;
  while (sms < max_sms && stores(sms) > 1.03 * stores(max_sms)) ++sms;
  return {Mover::kStores, sms, stores(sms)};
}

struct RowExchange::Impl {
  struct Channel {
    ChannelView view{};  // the host's copy
    DeviceMemory<ChannelView> on_device;
    DeviceMemory<ChannelState> state;
    DeviceMemory<std::uint32_t> dispatch_done, combine_done, tile_done;
    // Made when first needed: what copy engines and NCCL send from.
    DeviceMemory<std::byte> staging;
    DeviceMemory<float> staging_scale, staging_scalars;
    DeviceMemory<std::int64_t> staging_headers;
    HostCounts counts;  // kNccl: of the plan, and its routes to and from each rank
    std::vector<std::int64_t> send_route_ptr, receive_route_ptr;
    bool overflow = false;
  };

  ExchangeShape shape;
  Link link;
  int rank, num_ranks, device = 0, processors = 0;
  const std::vector<int> names;
  const std::function<bool()> lost;
  bool gave_up = false;
  std::unique_ptr<StreamHandle> control;  // where the host can end this rank's waits
  NcclCommunicator* communicator;
  std::unique_ptr<SymmetricMemory> memory;
  DeviceMemory<std::uint32_t> failed, barrier_epoch;
  DeviceMemory<std::byte> alone;  // kNccl: the window, which nobody else maps
  DeviceMemory<ChannelView> barrier_view;
  WaitError* error = nullptr;  // pinned
  std::vector<Channel> channels;
  std::vector<cudaStream_t> copy_streams;  // one a peer
  std::vector<std::unique_ptr<EventHandle>> copied;
  std::unique_ptr<EventHandle> packed;

  Impl(const Bootstrap& bootstrap, const ExchangeShape& wanted, Link link_, PeerPath path,
       NcclCommunicator* comm)
      : shape(checked(wanted, bootstrap.num_ranks, bootstrap.rank)),
        link(link_),
        rank(bootstrap.rank),
        num_ranks(bootstrap.num_ranks),
        names(bootstrap.names),
        lost(bootstrap.lost),
        communicator(comm) {
    Require(link == Link::kNvlink || communicator != nullptr, kBad,
            "row exchange: NCCL needs a communicator");
    check_cuda(cudaGetDevice(&device), "row exchange");
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "row exchange");
    check_cuda(preload_kernels(), "row exchange: loading kernels");
    agree(bootstrap);
    const int max_chunks = static_cast<int>((shape.max_tokens + shape.chunk_rows - 1) / shape.chunk_rows);
    const WindowLayout at = layout_of(shape, num_ranks, max_chunks);
    const std::size_t bytes = kGroupBytes + at.bytes * static_cast<std::size_t>(shape.num_channels);
    if (link == Link::kNvlink) {
      memory = std::make_unique<SymmetricMemory>(bootstrap, bytes, path, communicator);
    } else {
      alone = DeviceMemory<std::byte>(bytes, "row exchange: buffers");
    }
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&error), sizeof *error,
                             cudaHostAllocMapped | cudaHostAllocPortable),
               "row exchange: error record");
    std::memset(error, 0, sizeof *error);
    error->failure = 1;
    if (lost) control = std::make_unique<StreamHandle>();
    failed = DeviceMemory<std::uint32_t>(1, "row exchange");
    barrier_epoch = DeviceMemory<std::uint32_t>(1, "row exchange");
    packed = std::make_unique<EventHandle>();
    channels.resize(static_cast<std::size_t>(shape.num_channels));
    for (int i = 0; i < shape.num_channels; ++i) {
      Channel& c = channels[static_cast<std::size_t>(i)];
      const auto chunks = static_cast<std::size_t>(num_ranks) * static_cast<std::size_t>(max_chunks);
      c.state = DeviceMemory<ChannelState>(1, "row exchange");
      c.dispatch_done = DeviceMemory<std::uint32_t>(chunks, "row exchange");
      c.combine_done = DeviceMemory<std::uint32_t>(chunks, "row exchange");
      c.tile_done =
          DeviceMemory<std::uint32_t>(static_cast<std::size_t>(shape.max_routes / 16 + 1), "row exchange");
      ChannelView& v = c.view;
      for (int r = 0; r < num_ranks; ++r)
        v.window[r] =
            window(r) != nullptr ? window(r) + kGroupBytes + at.bytes * static_cast<std::size_t>(i) : nullptr;
      v.at = at;
      v.state = c.state.get();
      v.dispatch_done = c.dispatch_done.get();
      v.combine_done = c.combine_done.get();
      v.tile_done = c.tile_done.get();
      v.failed = failed.get();
      v.error = error;
      v.deadline_ns = static_cast<std::uint64_t>(shape.deadline.count());
      v.max_tokens = shape.max_tokens;
      v.max_received = shape.max_received;
      v.max_routes = shape.max_routes;
      v.max_home = shape.max_tokens * num_ranks;
      v.hidden = shape.hidden;
      v.row_bytes = static_cast<int>(row_bytes(shape));
      v.rank = rank;
      v.num_ranks = num_ranks;
      v.channel = i;
      v.chunk_rows = shape.chunk_rows;
      v.max_chunks = max_chunks;
      // Enough pieces for some thousand warps, and none much longer than 4 KB: then the rows that all warps work on at a
      // time are fewer, and lie closer together. An fp8 row has one scale and is one piece.
      v.row_parts = shape.wire == Wire::kFp8
                        ? 1
                        : static_cast<int>(std::min<std::int64_t>(
                              std::clamp<std::int64_t>(
                                  std::max<std::int64_t>(2048 / shape.max_tokens, v.row_bytes / 3584), 1, 8),
                              v.row_bytes / 1024 + 1));
      v.few_rows = shape.max_tokens <= 1024;
      v.wire_row_bytes = shape.wire == Wire::kFp8 ? v.row_bytes / 2 : v.row_bytes;
      v.num_local_slots = shape.num_local_slots;
      c.on_device = upload(v);
    }
    ChannelView whole = channels[0].view;
    for (int r = 0; r < num_ranks; ++r) whole.window[r] = window(r);
    barrier_view = upload(whole);
    // Nobody stores into a peer's window before it is there and zero: map_by_* is collective, and so is this.
    std::int32_t here = 1;
    std::vector<std::int32_t> all(static_cast<std::size_t>(num_ranks));
    bootstrap.all_gather(&here, all.data(), sizeof here);
  }
  ~Impl() {
    end_if_lost();
    cudaDeviceSynchronize();
    if (memory != nullptr) {
      // Peers may still read and store here; when all have come this far nobody does.
      using Clock = std::chrono::steady_clock;
      const auto begin = Clock::now();
      const auto patience =
          std::min(shape.deadline, begin - left_alone < kLeaveFailed ? kLeaveNext : kLeaveFailed);
      launch_leave(barrier_view.get(), kLeaveFlags, shape.deadline, patience, nullptr);
      while (lost && cudaStreamQuery(nullptr) == cudaErrorNotReady) {
        end_if_lost();
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      cudaDeviceSynchronize();
      if (gave_up || error->set != 0)
        left_alone = Clock::now() - begin < patience ? Clock::time_point() : Clock::now();
    }
    for (cudaStream_t stream : copy_streams) cudaStreamDestroy(stream);
    if (error != nullptr) cudaFreeHost(error);
    cudaGetLastError();
  }

  // What was on its way to or from a rank that is gone is given up: waits end now.
  void end_if_lost() {
    if (gave_up || !lost || !lost()) return;
    gave_up = true;
    if (link == Link::kNccl) return communicator->abort();
    cudaMemcpyAsync(failed.get(), &error->failure, sizeof error->failure, cudaMemcpyHostToDevice,
                    control->stream);
  }
  void wait_for(Stream stream) {
    if (link == Link::kNccl) return communicator->wait(stream, deadline_ms(), "exchange of rows");
    if (!lost) return check_cuda(cudaStreamSynchronize(stream), "row exchange");
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      const cudaError_t state = cudaStreamQuery(stream);
      if (state == cudaSuccess) return;
      if (state != cudaErrorNotReady) check_cuda(state, "row exchange");
      cudaGetLastError();
      end_if_lost();
      if (std::chrono::steady_clock::now() - start > std::chrono::milliseconds(2))
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  // Throws where the group has failed.
  void require_group() const {
    const WaitError& e = *error;
    if (*static_cast<const volatile std::uint32_t*>(&e.set) != 0) {
      throw Error(ErrorCode::kPeerLost,
                  str("rank ", name(rank), " waited ", e.waited_ns / 1000000, " ms for rank ", name(e.peer),
                      " (", name_of(static_cast<WaitFor>(e.what)), ", channel ", e.channel,
                      e.chunk >= 0 ? str(", chunk ", e.chunk) : std::string(), "): expected epoch ",
                      e.expected, ", seen ", e.observed));
    }
    if (gave_up)
      throw Error(
          ErrorCode::kPeerLost,
          str("rank ", name(rank), " gave up a pass: the host has learned that a rank of the group is gone"));
  }

  std::byte* window(int r) const {
    if (memory != nullptr) return memory->part(r);
    return r == rank ? alone.get() : nullptr;
  }
  static DeviceMemory<ChannelView> upload(const ChannelView& v) {
    DeviceMemory<ChannelView> to(1, "row exchange");
    check_cuda(cudaMemcpy(to.get(), &v, sizeof v, cudaMemcpyHostToDevice), "row exchange");
    return to;
  }
  // All ranks must have the same shape (but for their own slots): offsets into each other's windows depend on it.
  void agree(const Bootstrap& bootstrap) const {
    const std::int64_t mine[] = {shape.max_tokens,
                                 shape.hidden,
                                 static_cast<std::int64_t>(shape.dtype),
                                 static_cast<std::int64_t>(shape.wire),
                                 shape.max_received,
                                 shape.max_routes,
                                 shape.chunk_rows,
                                 shape.num_channels,
                                 static_cast<std::int64_t>(link)};
    constexpr const char* kNames[] = {"max_tokens", "hidden",     "dtype",        "wire", "max_received",
                                      "max_routes", "chunk_rows", "num_channels", "link"};
    constexpr std::size_t kValues = std::size(kNames);
    std::vector<std::int64_t> all(static_cast<std::size_t>(num_ranks) * kValues);
    bootstrap.all_gather(mine, all.data(), sizeof mine);
    for (std::size_t r = 0; r < static_cast<std::size_t>(num_ranks); ++r)
      for (std::size_t i = 0; i < kValues; ++i)
        Require(all[r * kValues + i] == all[i], ErrorCode::kDisagreement, "row exchange: ", kNames[i], " is ",
                all[r * kValues + i], " at rank ", name(static_cast<int>(r)), " and ", all[i], " at rank ",
                name(0));
  }

  // What messages call a member.
  int name(int r) const { return name_of_rank(names, r); }
  Channel& channel(int i) {
    Require(i >= 0 && i < shape.num_channels, kBad, "row exchange: channel ", i, " of ", shape.num_channels);
    return channels[static_cast<std::size_t>(i)];
  }
  std::int64_t element() const { return shape.dtype == DType::kBF16 ? 2 : 4; }
  bool fp8() const { return shape.wire == Wire::kFp8; }
  void check_rows(const void* data, std::int64_t stride, const char* what) const {
    Require(data != nullptr && reinterpret_cast<std::uintptr_t>(data) % 16 == 0, kBad, "row exchange: ", what,
            " must be given, 16-byte aligned");
    Require(stride >= shape.hidden && stride * element() % 16 == 0, kBad, "row exchange: the row stride of ",
            what, " is ", stride, "; it must be at least hidden = ", shape.hidden,
            " and a multiple of 16 bytes");
  }
  void check_options(const MoverOptions& options, bool push) const {
    Require(options.push_sms >= (push ? 1 : 0) && options.local_sms >= 0 &&
                options.push_sms + options.local_sms <= processors,
            kBad, "row exchange: ", options.push_sms, " processors to push and ", options.local_sms,
            " for local work; at least one to push and at most ", processors, " in all");
  }
  void check_copy(const MoverOptions& options) const {
    Require(options.local_sms >= 0 && options.local_sms <= processors, kBad,
            "row exchange: ", options.local_sms, " processors for local work of ", processors);
    Require(options.copy_slices >= 1 && options.copy_slices <= 64, kBad,
            "row exchange: ", options.copy_slices, " slices of a copy; 1..64 are possible");
  }
  void require_nvlink(const char* what) const {
    Require(link == Link::kNvlink, ErrorCode::kInvalidState, "row exchange: ", what, " is for Link::kNvlink");
  }

  void make_staging(Channel& c, bool headers) {
    const auto home = static_cast<std::size_t>(shape.max_tokens) * static_cast<std::size_t>(num_ranks);
    const auto received = static_cast<std::size_t>(shape.max_received);
    if (c.staging.get() == nullptr) {
      c.staging = DeviceMemory<std::byte>(
          std::max(home, received) * static_cast<std::size_t>(row_bytes(shape)), "row exchange: staging");
      c.staging_scale = DeviceMemory<float>(home, "row exchange: staging");
    }
    if (headers && c.staging_headers.get() == nullptr) {
      c.staging_headers = DeviceMemory<std::int64_t>(home + 1, "row exchange: staging");
      c.staging_scalars =
          DeviceMemory<float>(static_cast<std::size_t>(shape.max_routes), "row exchange: staging");
    }
  }
  void make_copy_streams() {
    while (static_cast<int>(copy_streams.size()) < num_ranks) {
      cudaStream_t stream = nullptr;
      check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "row exchange: copy stream");
      copy_streams.push_back(stream);
      copied.push_back(std::make_unique<EventHandle>());
    }
  }

  HostCounts read_counts(Channel& c, Stream stream) {
    ChannelState s{};
    std::vector<std::uint32_t> matrix(static_cast<std::size_t>(num_ranks * num_ranks) * 2);
    wait_for(stream);  // copies to such memory wait by themselves, and ask nobody
    require_group();
    check_cuda(cudaMemcpyAsync(&s, c.state.get(), sizeof s, cudaMemcpyDeviceToHost, stream),
               "row exchange: counts");
    check_cuda(cudaMemcpyAsync(matrix.data(), c.view.window[rank] + c.view.at.counts, matrix.size() * 4,
                               cudaMemcpyDeviceToHost, stream),
               "row exchange: counts");
    check_cuda(cudaStreamSynchronize(stream), "row exchange: counts");
    HostCounts counts;
    const auto ranks = static_cast<std::size_t>(num_ranks);
    counts.send_ptr.assign(ranks + 1, 0);
    counts.receive_ptr.assign(s.receive_ptr, s.receive_ptr + ranks + 1);
    counts.push_base.assign(s.push_base, s.push_base + ranks);
    counts.home_base.assign(s.home_base, s.home_base + ranks);
    counts.receive_routes = s.receive_route_ptr[num_ranks];
    for (std::size_t d = 0; d < ranks; ++d)
      counts.send_ptr[d + 1] = counts.send_ptr[d] + matrix[2 * (static_cast<std::size_t>(rank) * ranks + d)];
    c.overflow = (s.status & kExchangeOverflow) != 0;
    return counts;
  }

  // ---- NCCL ------------------------------------------------------------------------------------------------------
  void read_route_counts(Channel& c) const {
    std::vector<std::uint32_t> matrix(static_cast<std::size_t>(num_ranks * num_ranks) * 2);
    check_cuda(cudaMemcpy(matrix.data(), c.view.window[rank] + c.view.at.counts, matrix.size() * 4,
                          cudaMemcpyDeviceToHost),
               "row exchange: counts");
    const auto ranks = static_cast<std::size_t>(num_ranks), me = static_cast<std::size_t>(rank);
    c.send_route_ptr.assign(ranks + 1, 0);
    c.receive_route_ptr.assign(ranks + 1, 0);
    for (std::size_t d = 0; d < ranks; ++d) {
      c.send_route_ptr[d + 1] = c.send_route_ptr[d] + matrix[2 * (me * ranks + d) + 1];
      c.receive_route_ptr[d + 1] = c.receive_route_ptr[d] + matrix[2 * (d * ranks + me) + 1];
    }
  }
  void plan_by_nccl(Channel& c, const SendPlan& plan, Stream stream) {
    make_staging(c, true);
    const ChannelView& v = c.view;
    std::byte* own = v.window[rank];
    const auto ranks = static_cast<std::size_t>(num_ranks), me = static_cast<std::size_t>(rank);
    check_cuda(launch_plan(c.on_device.get(), plan, ExchangePart::kBefore, nullptr, stream), "exchange_plan");
    communicator->all_gather(own + v.at.counts + me * ranks * 8, own + v.at.counts, ranks * 8, stream);
    check_cuda(launch_plan(c.on_device.get(), plan, ExchangePart::kHeaders, c.staging_headers.get(), stream),
               "exchange_plan");
    communicator->wait(stream, deadline_ms(), "plan counts");
    c.counts = read_counts(c, stream);
    if (c.overflow) return;
    read_route_counts(c);
    std::vector<NcclTransfer> transfers;
    for (std::size_t d = 0; d < ranks; ++d) {
      const HostCounts& n = c.counts;
      const auto out = static_cast<std::size_t>(n.send_ptr[d]),
                 in = static_cast<std::size_t>(n.receive_ptr[d]);
      const auto out_rows = static_cast<std::size_t>(n.send_ptr[d + 1]) - out;
      const auto in_rows = static_cast<std::size_t>(n.receive_ptr[d + 1]) - in;
      const auto out_route = static_cast<std::size_t>(c.send_route_ptr[d]);
      const auto in_route = static_cast<std::size_t>(c.receive_route_ptr[d]);
      const auto out_routes = static_cast<std::size_t>(c.send_route_ptr[d + 1]) - out_route;
      const auto in_routes = static_cast<std::size_t>(c.receive_route_ptr[d + 1]) - in_route;
      const auto move = [&](const void* from, std::size_t out_bytes, std::byte* to, std::size_t in_bytes) {
        if (d == me) {
          check_cuda(cudaMemcpyAsync(to, from, in_bytes, cudaMemcpyDeviceToDevice, stream), "exchange_plan");
        } else {
          transfers.push_back({static_cast<int>(d), from, out_bytes, to, in_bytes});
        }
      };
      move(c.staging_headers.get() + out, out_rows * 8, own + v.at.route_ptr + in * 8, in_rows * 8);
      move(plan.send_slot + out_route, out_routes * 4, own + v.at.slot + in_route * 4, in_routes * 4);
      if (plan.send_weight != nullptr)
        move(plan.send_weight + out_route, out_routes * 4, own + v.at.weight + in_route * 4, in_routes * 4);
    }
    communicator->exchange(transfers, stream);
  }
  std::chrono::milliseconds deadline_ms() const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(shape.deadline) +
           std::chrono::milliseconds(1);
  }
  PackCall pack_call(Channel& c, const SendPlan& plan, const void* x, std::int64_t x_stride, int sms) const {
    PackCall call{};
    call.x = static_cast<const std::byte*>(x);
    call.x_stride_bytes = x_stride * element();
    call.rank_ptr = plan.rank_ptr;
    call.send_row = plan.send_row;
    call.staging = c.staging.get();
    call.staging_scale = c.staging_scale.get();
    call.first = true;
    call.handshake = false;
    call.end_chunk = c.view.max_chunks;
    call.blocks = sms > 0 ? std::min(sms, processors) : processors;
    return call;
  }
  void dispatch_by_nccl(Channel& c, const SendPlan& plan, const void* x, std::int64_t x_stride,
                        DispatchCall call, Stream stream) {
    if (c.overflow) return;
    check_cuda(launch_pack(c.on_device.get(), pack_call(c, plan, x, x_stride, 0), fp8(), stream),
               "dispatch: pack");
    std::vector<NcclTransfer> transfers;
    const auto wire = static_cast<std::size_t>(c.view.wire_row_bytes);
    std::byte* own = c.view.window[rank];
    for (std::size_t d = 0; d < static_cast<std::size_t>(num_ranks); ++d) {
      if (static_cast<int>(d) == rank) continue;
      const auto out = static_cast<std::size_t>(c.counts.send_ptr[d]);
      const auto in = static_cast<std::size_t>(c.counts.receive_ptr[d]);
      const auto out_rows = static_cast<std::size_t>(c.counts.send_ptr[d + 1]) - out;
      const auto in_rows = static_cast<std::size_t>(c.counts.receive_ptr[d + 1]) - in;
      transfers.push_back({static_cast<int>(d), c.staging.get() + out * wire, out_rows * wire,
                           own + c.view.at.rows + in * wire, in_rows * wire});
      if (fp8())
        transfers.push_back({static_cast<int>(d), c.staging_scale.get() + out, out_rows * 4,
                             own + c.view.at.scale + in * 4, in_rows * 4});
    }
    communicator->exchange(transfers, stream);
    if (call.out == nullptr) return;
    call.push_blocks = 0;
    call.blocks = processors;
    call.arrived = true;
    check_cuda(launch_dispatch(c.on_device.get(), call, fp8(), processors, stream), "dispatch: expand");
  }
  // What others get, at its place in the receive list. sms: 0 for all
  void reduce(Channel& c, CombineCall call, std::byte* rows, int sms, Stream stream) {
    call.push = true;
    call.sum = false;
    call.push_blocks = call.blocks = sms > 0 ? sms : processors;
    call.staging = rows;
    check_cuda(launch_combine(c.on_device.get(), call, shape.dtype, processors, stream), "combine: reduce");
  }
  void push_by_nccl(Channel& c, const CombineCall& call, Stream stream) {
    if (c.overflow) return;
    const bool reduced = call.position_of_route == nullptr && call.source_stride_bytes == c.view.row_bytes;
    if (!reduced) reduce(c, call, c.staging.get(), 0, stream);
    const std::byte* from = reduced ? call.source : c.staging.get();
    std::vector<NcclTransfer> transfers;
    const auto bytes = static_cast<std::size_t>(c.view.row_bytes);
    for (std::size_t d = 0; d < static_cast<std::size_t>(num_ranks); ++d) {
      if (static_cast<int>(d) == rank) continue;
      const auto home = static_cast<std::size_t>(c.counts.send_ptr[d]);
      const auto got = static_cast<std::size_t>(c.counts.receive_ptr[d]);
      transfers.push_back({static_cast<int>(d), from + got * bytes,
                           (static_cast<std::size_t>(c.counts.receive_ptr[d + 1]) - got) * bytes,
                           c.view.window[rank] + c.view.at.home + home * bytes,
                           (static_cast<std::size_t>(c.counts.send_ptr[d + 1]) - home) * bytes});
    }
    communicator->exchange(transfers, stream);
  }

  CombineCall combine_call(const SendPlan& plan, const CombineSource& source, void* y,
                           std::int64_t y_stride) const {
    check_rows(source.data, source.stride, "the results");
    CombineCall call{};
    call.source = static_cast<const std::byte*>(source.data);
    call.source_stride_bytes = source.stride * element();
    call.position_of_route = source.position_of_route;
    call.weighted = source.weighted && source.position_of_route != nullptr;
    call.rank_ptr = plan.rank_ptr;
    call.home_ptr = plan.home_ptr;
    call.home_position = plan.home_position;
    call.y = static_cast<std::byte*>(y);
    call.y_stride_bytes = y_stride * element();
    call.last = true;
    return call;
  }
  void check_home(const SendPlan& plan, const void* y, std::int64_t y_stride, std::int64_t num_tokens) const {
    Require(num_tokens >= 0 && num_tokens <= shape.max_tokens, kBad, "row exchange: ", num_tokens,
            " tokens; max_tokens is ", shape.max_tokens);
    Require(plan.rank_ptr != nullptr && plan.home_ptr != nullptr && plan.home_position != nullptr, kBad,
            "row exchange: combine needs rank_ptr, home_ptr and home_position");
    if (num_tokens > 0) check_rows(y, y_stride, "y");
  }
};

RowExchange::RowExchange(const Bootstrap& bootstrap, const ExchangeShape& shape, Link link, PeerPath path,
                         NcclCommunicator* communicator)
    : impl_(std::make_unique<Impl>(bootstrap, shape, link, path, communicator)) {}
RowExchange::~RowExchange() = default;

int RowExchange::rank() const {
  return impl_->rank;
}
int RowExchange::num_ranks() const {
  return impl_->num_ranks;
}
Link RowExchange::link() const {
  return impl_->link;
}
const ExchangeShape& RowExchange::shape() const {
  return impl_->shape;
}
std::string_view RowExchange::path_name() const {
  return impl_->memory != nullptr ? impl_->memory->path_name() : "nccl send/receive";
}
std::size_t RowExchange::window_bytes() const {
  return kGroupBytes + impl_->channels[0].view.at.bytes * impl_->channels.size();
}

void RowExchange::exchange_plan(int channel, const SendPlan& plan, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  Require(plan.rank_ptr != nullptr && plan.send_row != nullptr && plan.send_route_ptr != nullptr &&
              plan.send_slot != nullptr,
          kBad, "exchange_plan: rank_ptr, send_row, send_route_ptr and send_slot must be given");
  if (impl_->link == Link::kNccl) {
    impl_->plan_by_nccl(c, plan, stream);
  } else {
    check_cuda(launch_plan(c.on_device.get(), plan, ExchangePart::kAll, nullptr, stream), "exchange_plan");
  }
  check_cuda(launch_check_headers(c.on_device.get(), stream), "exchange_plan");
}

ReceiveList RowExchange::receive_list(int channel) const {
  const ChannelView& v = impl_->channel(channel).view;
  const std::byte* own = v.window[impl_->rank];
  return {v.state->receive_ptr, v.state->receive_route_ptr,
          reinterpret_cast<const std::int64_t*>(own + v.at.route_ptr),
          reinterpret_cast<const std::int32_t*>(own + v.at.slot),
          reinterpret_cast<const float*>(own + v.at.weight)};
}
void* RowExchange::received(int channel) const {
  const ChannelView& v = impl_->channel(channel).view;
  return v.window[impl_->rank] + v.at.rows;
}
const float* RowExchange::received_scale(int channel) const {
  const ChannelView& v = impl_->channel(channel).view;
  return reinterpret_cast<const float*>(v.window[impl_->rank] + v.at.scale);
}

void RowExchange::dispatch(int channel, const SendPlan& plan, const void* x, std::int64_t x_stride,
                           const ExpertRows& expert_rows, const MoverOptions& options, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  Require(plan.rank_ptr != nullptr && plan.send_row != nullptr, kBad,
          "dispatch: rank_ptr and send_row must be given");
  impl_->check_rows(x, x_stride, "x");
  impl_->check_options(options, true);
  DispatchCall call{};
  call.x = static_cast<const std::byte*>(x);
  call.x_stride_bytes = x_stride * impl_->element();
  call.rank_ptr = plan.rank_ptr;
  call.send_row = plan.send_row;
  call.own = call.others = call.pass = true;
  call.push_blocks = options.push_sms;
  call.blocks = options.push_sms + (expert_rows.data != nullptr ? options.local_sms : 0);
  if (expert_rows.data != nullptr) {
    impl_->check_rows(expert_rows.data, expert_rows.stride, "expert rows");
    Require(expert_rows.position_of_route != nullptr, kBad, "dispatch: expert rows need position_of_route");
    call.out = static_cast<std::byte*>(expert_rows.data);
    call.out_stride_bytes = expert_rows.stride * impl_->element();
    call.position_of_route = expert_rows.position_of_route;
    if (expert_rows.tiles.flags != nullptr) {
      Require(expert_rows.tiles.rows >= 16, kBad, "dispatch: tiles of ", expert_rows.tiles.rows,
              " rows; at least 16 are needed");
      call.tile_flags = expert_rows.tiles.flags;
      call.tile_rows = expert_rows.tiles.rows;
      const auto tiles = (impl_->shape.max_routes + call.tile_rows - 1) / call.tile_rows;
      check_cuda(cudaMemsetAsync(call.tile_flags, 0, static_cast<std::size_t>(tiles) * 4, stream),
                 "dispatch");
    }
  }
  if (impl_->link == Link::kNccl) {
    impl_->dispatch_by_nccl(c, plan, x, x_stride, call, stream);
  } else {
    check_cuda(launch_dispatch(c.on_device.get(), call, impl_->fp8(), impl_->processors, stream), "dispatch");
  }
}

void RowExchange::expand(int channel, const SendPlan& plan, Rows rows, const void* x, std::int64_t x_stride,
                         const ExpertRows& expert_rows, const MoverOptions& options, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  Require(plan.rank_ptr != nullptr && plan.send_row != nullptr && expert_rows.position_of_route != nullptr,
          kBad, "expand: rank_ptr, send_row and position_of_route must be given");
  Require(expert_rows.tiles.flags == nullptr, kBad, "expand: tile flags belong to dispatch()");
  impl_->check_rows(x, x_stride, "x");
  impl_->check_rows(expert_rows.data, expert_rows.stride, "expert rows");
  Require(options.local_sms >= 0 && options.local_sms <= impl_->processors, kBad,
          "expand: ", options.local_sms, " processors of ", impl_->processors);
  DispatchCall call{};
  call.x = static_cast<const std::byte*>(x);
  call.x_stride_bytes = x_stride * impl_->element();
  call.rank_ptr = plan.rank_ptr;
  call.send_row = plan.send_row;
  call.out = static_cast<std::byte*>(expert_rows.data);
  call.out_stride_bytes = expert_rows.stride * impl_->element();
  call.position_of_route = expert_rows.position_of_route;
  call.blocks = options.local_sms > 0 ? options.local_sms : impl_->processors;
  call.arrived = true;
  call.own = rows == Rows::kOwn;
  call.others = rows == Rows::kOthers;
  check_cuda(launch_dispatch(c.on_device.get(), call, impl_->fp8(), impl_->processors, stream), "expand");
}

void RowExchange::combine(int channel, const SendPlan& plan, const CombineSource& source, void* y,
                          std::int64_t y_stride, std::int64_t num_tokens, const MoverOptions& options,
                          Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->check_home(plan, y, y_stride, num_tokens);
  impl_->check_options(options, true);
  CombineCall call = impl_->combine_call(plan, source, y, y_stride);
  call.end_token = num_tokens;
  if (impl_->link == Link::kNccl) {
    impl_->push_by_nccl(c, call, stream);
    call.arrived = true;
    call.sum = true;
    call.blocks = impl_->processors;
  } else {
    call.push = call.sum = true;
    call.push_blocks = options.push_sms;
    call.blocks = options.push_sms + options.local_sms;
  }
  check_cuda(launch_combine(c.on_device.get(), call, impl_->shape.dtype, impl_->processors, stream),
             "combine");
}
void RowExchange::reduce_results(int channel, const CombineSource& source, void* rows,
                                 const MoverOptions& options, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  Require(source.position_of_route != nullptr, kBad, "reduce_results: the results must be expert outputs");
  impl_->check_rows(rows, impl_->shape.hidden, "the reduced rows");
  Require(options.local_sms >= 0 && options.local_sms <= impl_->processors, kBad,
          "reduce_results: ", options.local_sms, " processors of ", impl_->processors);
  impl_->reduce(c, impl_->combine_call({}, source, nullptr, 0), static_cast<std::byte*>(rows),
                options.local_sms, stream);
}
void RowExchange::push_results(int channel, const CombineSource& source, const MoverOptions& options,
                               Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->check_options(options, true);
  CombineCall call = impl_->combine_call({}, source, nullptr, 0);
  if (impl_->link == Link::kNccl) return impl_->push_by_nccl(c, call, stream);
  call.push = true;
  call.push_blocks = call.blocks = options.push_sms;
  check_cuda(launch_combine(c.on_device.get(), call, impl_->shape.dtype, impl_->processors, stream),
             "push_results");
}
void RowExchange::sum_at_home(int channel, const SendPlan& plan, const CombineSource& source, void* y,
                              std::int64_t y_stride, std::int64_t first_token, std::int64_t end_token,
                              bool last, const MoverOptions& options, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->check_home(plan, y, y_stride, end_token);
  Require(0 <= first_token && first_token <= end_token, kBad, "sum_at_home: tokens ", first_token, "..",
          end_token);
  Require(options.local_sms >= 0 && options.local_sms <= impl_->processors, kBad,
          "sum_at_home: ", options.local_sms, " processors of ", impl_->processors);
  CombineCall call = impl_->combine_call(plan, source, y, y_stride);
  call.sum = true;
  call.first_token = first_token;
  call.end_token = end_token;
  call.last = last;
  call.blocks = options.local_sms > 0 ? options.local_sms : impl_->processors;
  call.arrived = impl_->link == Link::kNccl;
  check_cuda(launch_combine(c.on_device.get(), call, impl_->shape.dtype, impl_->processors, stream),
             "sum_at_home");
}

void* RowExchange::result_rows(int channel, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->require_nvlink("result_rows");
  check_cuda(launch_combine_handshake(c.on_device.get(), false, stream), "result_rows");
  return c.view.window[impl_->rank] + c.view.at.home;
}
void RowExchange::combine_by_pull(int channel, const SendPlan& plan, void* y, std::int64_t y_stride,
                                  std::int64_t num_tokens, int sms, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->require_nvlink("combine_by_pull");
  impl_->check_home(plan, y, y_stride, num_tokens);
  Require(sms >= 0 && sms <= impl_->processors, kBad, "combine_by_pull: ", sms, " processors of ",
          impl_->processors);
  const void* rows = c.view.window[impl_->rank] + c.view.at.home;
  CombineCall call = impl_->combine_call(plan, {rows, impl_->shape.hidden}, y, y_stride);
  call.pull = true;
  call.end_token = num_tokens;
  call.blocks = sms > 0 ? sms : impl_->processors;
  check_cuda(launch_combine(c.on_device.get(), call, impl_->shape.dtype, impl_->processors, stream),
             "combine_by_pull");
}

void RowExchange::sum_again(int channel, const SendPlan& plan, const CombineSource& source, void* y,
                            std::int64_t y_stride, std::int64_t num_tokens, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->check_home(plan, y, y_stride, num_tokens);
  CombineCall call = impl_->combine_call(plan, source, y, y_stride);
  call.sum = true;
  call.end_token = num_tokens;
  call.last = false;
  call.arrived = true;
  call.blocks = impl_->processors;
  check_cuda(launch_combine(c.on_device.get(), call, impl_->shape.dtype, impl_->processors, stream),
             "sum_again");
}

void RowExchange::return_scalars(int channel, const SendPlan& plan, const float* values,
                                 const std::int32_t* position_of_route, float* value_of_route,
                                 Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  Require(plan.rank_ptr != nullptr && plan.send_route_ptr != nullptr && plan.send_route != nullptr &&
              values != nullptr && position_of_route != nullptr && value_of_route != nullptr,
          kBad, "return_scalars: a pointer is null");
  const auto launch = [&](ExchangePart part) {
    check_cuda(launch_scalars(c.on_device.get(), plan, values, position_of_route, value_of_route, part,
                              c.staging_scalars.get(), stream),
               "return_scalars");
  };
  if (impl_->link == Link::kNvlink) return launch(ExchangePart::kAll);
  if (c.overflow) return;
  launch(ExchangePart::kBefore);
  std::vector<NcclTransfer> transfers;
  std::byte* own = c.view.window[impl_->rank];
  for (std::size_t d = 0; d < static_cast<std::size_t>(impl_->num_ranks); ++d) {
    const auto got = static_cast<std::size_t>(c.receive_route_ptr[d]),
               home = static_cast<std::size_t>(c.send_route_ptr[d]);
    const std::size_t out = (static_cast<std::size_t>(c.receive_route_ptr[d + 1]) - got) * 4;
    const std::size_t in = (static_cast<std::size_t>(c.send_route_ptr[d + 1]) - home) * 4;
    const float* from = c.staging_scalars.get() + got;
    std::byte* to = own + c.view.at.scalars + home * 4;
    if (static_cast<int>(d) == impl_->rank) {
      check_cuda(cudaMemcpyAsync(to, from, in, cudaMemcpyDeviceToDevice, stream), "return_scalars");
    } else {
      transfers.push_back({static_cast<int>(d), from, out, to, in});
    }
  }
  impl_->communicator->exchange(transfers, stream);
  launch(ExchangePart::kAfter);
}

RowExchange::HostCounts RowExchange::host_counts(int channel, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  return impl_->link == Link::kNccl ? c.counts : impl_->read_counts(c, stream);
}

void RowExchange::dispatch_by_copy(int channel, const SendPlan& plan, const HostCounts& counts, const void* x,
                                   std::int64_t x_stride, const MoverOptions& options, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->require_nvlink("dispatch_by_copy");
  Require(plan.rank_ptr != nullptr && plan.send_row != nullptr, kBad,
          "dispatch_by_copy: rank_ptr and send_row must be given");
  impl_->check_rows(x, x_stride, "x");
  impl_->check_copy(options);
  // Nothing is sent, but peers that store expect the handshake, and epochs go on.
  if (c.overflow) return dispatch(channel, plan, x, x_stride, {}, {1, 0}, stream);
  impl_->make_staging(c, false);
  impl_->make_copy_streams();
  const ChannelView& v = c.view;
  const int me = impl_->rank, ranks = impl_->num_ranks;
  std::int64_t most = 0;
  for (int d = 0; d < ranks; ++d)
    if (d != me)
      most = std::max(most, counts.send_ptr[static_cast<std::size_t>(d) + 1] -
                                counts.send_ptr[static_cast<std::size_t>(d)]);
  const auto chunks = static_cast<int>((most + v.chunk_rows - 1) / v.chunk_rows);
  const auto wire = static_cast<std::size_t>(v.wire_row_bytes);
  PackCall call = impl_->pack_call(c, plan, x, x_stride, options.local_sms);
  const int slices = options.copy_slices;
  for (int slice = 0; slice < slices; ++slice) {
    // 1/8, then equal parts of the rest
    const auto boundary = [&](int i) {
      if (i == 0 || i == slices) return i == 0 ? 0 : chunks;
      const int first = std::min(chunks, std::max(1, chunks / kFirstSlice));
      return first + (chunks - first) * (i - 1) / (slices - 1);
    };
    call.first_chunk = boundary(slice);
    call.end_chunk = boundary(slice + 1);
    call.first = slice == 0;
    call.handshake = slice == 0;
    if (slice > 0 && call.first_chunk == call.end_chunk) continue;
    check_cuda(launch_pack(c.on_device.get(), call, impl_->fp8(), stream), "dispatch_by_copy: pack");
    check_cuda(cudaEventRecord(impl_->packed->event, stream), "dispatch_by_copy");
    for (int step = 1; step < ranks; ++step) {
      const auto d = static_cast<std::size_t>((me + step) % ranks);
      cudaStream_t copies = impl_->copy_streams[d];
      const std::int64_t rows = counts.send_ptr[d + 1] - counts.send_ptr[d];
      const std::int64_t first = std::min<std::int64_t>(rows, std::int64_t{call.first_chunk} * v.chunk_rows);
      const std::int64_t end = std::min<std::int64_t>(rows, std::int64_t{call.end_chunk} * v.chunk_rows);
      if (end <= first) continue;
      check_cuda(cudaStreamWaitEvent(copies, impl_->packed->event, 0), "dispatch_by_copy");
      const auto from = static_cast<std::size_t>(counts.send_ptr[d] + first);
      const auto to = static_cast<std::size_t>(counts.push_base[d] + first);
      const auto n = static_cast<std::size_t>(end - first);
      check_cuda(cudaMemcpyAsync(v.window[d] + v.at.rows + to * wire, c.staging.get() + from * wire, n * wire,
                                 cudaMemcpyDefault, copies),
                 "dispatch_by_copy: copy");
      if (impl_->fp8())
        check_cuda(cudaMemcpyAsync(v.window[d] + v.at.scale + to * 4, c.staging_scale.get() + from, n * 4,
                                   cudaMemcpyDefault, copies),
                   "dispatch_by_copy: copy");
      check_cuda(launch_raise_flags(c.on_device.get(), static_cast<int>(d), true, call.first_chunk,
                                    static_cast<int>((end + v.chunk_rows - 1) / v.chunk_rows), copies),
                 "dispatch_by_copy: flags");
    }
  }
  for (int step = 1; step < ranks; ++step) {
    const auto d = static_cast<std::size_t>((me + step) % ranks);
    check_cuda(cudaEventRecord(impl_->copied[d]->event, impl_->copy_streams[d]), "dispatch_by_copy");
    check_cuda(cudaStreamWaitEvent(stream, impl_->copied[d]->event, 0), "dispatch_by_copy");
  }
  check_cuda(launch_wait_dispatch(c.on_device.get(), stream), "dispatch_by_copy: wait");
}

MoverChoice RowExchange::dispatch_by_choice(int channel, const SendPlan& plan, const HostCounts* counts,
                                            const void* x, std::int64_t x_stride, int max_sms, Stream stream,
                                            const MoverCosts& costs) {
  const auto me = static_cast<std::size_t>(impl_->rank);
  // Without counts: as if every token went to every rank, which is when most processors pay.
  const std::int64_t rows = counts != nullptr
                                ? counts->send_ptr.back() - (counts->send_ptr[me + 1] - counts->send_ptr[me])
                                : impl_->shape.max_tokens * (impl_->num_ranks - 1);
  const MoverChoice choice = choose_mover(rows * impl_->channel(channel).view.wire_row_bytes, max_sms,
                                          counts != nullptr && impl_->link == Link::kNvlink, costs);
  if (choice.mover == Mover::kStores) {
    dispatch(channel, plan, x, x_stride, {}, {choice.sms, 0}, stream);
  } else {
    dispatch_by_copy(channel, plan, *counts, x, x_stride, {1, 0}, stream);
  }
  return choice;
}

void RowExchange::combine_by_copy(int channel, const SendPlan& plan, const HostCounts& counts,
                                  const CombineSource& source, void* y, std::int64_t y_stride,
                                  std::int64_t num_tokens, const MoverOptions& options, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  impl_->require_nvlink("combine_by_copy");
  impl_->check_home(plan, y, y_stride, num_tokens);
  Require(source.position_of_route == nullptr && source.stride == impl_->shape.hidden, kBad,
          "combine_by_copy: the results must be one row a receive list entry, without gaps");
  impl_->check_copy(options);
  // Where the plan did not fit as well: the sums below end a pass, which this begins.
  check_cuda(launch_combine_handshake(c.on_device.get(), true, stream), "combine_by_copy");
  if (!c.overflow) {
    impl_->make_copy_streams();
    const ChannelView& v = c.view;
    const int me = impl_->rank, ranks = impl_->num_ranks;
    check_cuda(cudaEventRecord(impl_->packed->event, stream), "combine_by_copy");
    const auto bytes = static_cast<std::size_t>(v.row_bytes);
    for (int step = 1; step < ranks; ++step)
      check_cuda(cudaStreamWaitEvent(impl_->copy_streams[static_cast<std::size_t>((me + step) % ranks)],
                                     impl_->packed->event, 0),
                 "combine_by_copy");
    for (int slice = 0; slice < options.copy_slices; ++slice) {
      for (int step = 1; step < ranks; ++step) {
        const auto d = static_cast<std::size_t>((me + step) % ranks);
        const std::int64_t rows = counts.receive_ptr[d + 1] - counts.receive_ptr[d];
        const std::int64_t chunks = (rows + v.chunk_rows - 1) / v.chunk_rows;
        const std::int64_t first_chunk = chunks * slice / options.copy_slices;
        const std::int64_t end_chunk = chunks * (slice + 1) / options.copy_slices;
        if (first_chunk == end_chunk) continue;
        const std::int64_t first = first_chunk * v.chunk_rows, end = std::min(rows, end_chunk * v.chunk_rows);
        check_cuda(
            cudaMemcpyAsync(
                v.window[d] + v.at.home + static_cast<std::size_t>(counts.home_base[d] + first) * bytes,
                static_cast<const std::byte*>(source.data) +
                    static_cast<std::size_t>(counts.receive_ptr[d] + first) * bytes,
                static_cast<std::size_t>(end - first) * bytes, cudaMemcpyDefault, impl_->copy_streams[d]),
            "combine_by_copy: copy");
        check_cuda(
            launch_raise_flags(c.on_device.get(), static_cast<int>(d), false, static_cast<int>(first_chunk),
                               static_cast<int>(end_chunk), impl_->copy_streams[d]),
            "combine_by_copy: flags");
      }
    }
  }
  const auto join = [&] {
    for (int d = 0; d < impl_->num_ranks && !c.overflow; ++d) {
      const auto i = static_cast<std::size_t>(d);
      if (d == impl_->rank) continue;
      check_cuda(cudaEventRecord(impl_->copied[i]->event, impl_->copy_streams[i]), "combine_by_copy");
      check_cuda(cudaStreamWaitEvent(stream, impl_->copied[i]->event, 0), "combine_by_copy");
    }
  };
  if (options.local_sms == 0) join();
  sum_at_home(channel, plan, source, y, y_stride, 0, num_tokens, true, options, stream);
  if (options.local_sms > 0) join();
}

MoverChoice RowExchange::combine_by_choice(int channel, const SendPlan& plan, const HostCounts* counts,
                                           const CombineSource& source, void* y, std::int64_t y_stride,
                                           std::int64_t num_tokens, int max_sms, Stream stream,
                                           const MoverCosts& costs) {
  const auto me = static_cast<std::size_t>(impl_->rank);
  const bool can_copy = counts != nullptr && impl_->link == Link::kNvlink &&
                        source.position_of_route == nullptr && source.stride == impl_->shape.hidden;
  const std::int64_t rows =
      counts != nullptr ? counts->receive_ptr.back() - (counts->receive_ptr[me + 1] - counts->receive_ptr[me])
                        : impl_->shape.max_tokens * (impl_->num_ranks - 1);
  const MoverChoice choice =
      choose_mover(rows * impl_->channel(channel).view.row_bytes, max_sms, can_copy, costs);
  if (choice.mover == Mover::kStores) {
    combine(channel, plan, source, y, y_stride, num_tokens, {choice.sms, impl_->processors - choice.sms},
            stream);
  } else {
    combine_by_copy(channel, plan, *counts, source, y, y_stride, num_tokens,
                    {1, std::min(kSumsBesideCopies, impl_->processors)}, stream);
  }
  return choice;
}

void RowExchange::barrier(Stream stream) {
  impl_->require_nvlink("barrier");
  check_cuda(launch_barrier(impl_->barrier_view.get(), impl_->barrier_epoch.get(), kBarrierFlags, stream),
             "barrier");
}

bool RowExchange::failed() const {
  return *static_cast<volatile std::uint32_t*>(&impl_->error->set) != 0 || impl_->gave_up ||
         (impl_->communicator != nullptr && impl_->communicator->dead());
}
void RowExchange::wait(int channel, Stream stream) {
  wait_for(stream);
  check(channel);
}
void RowExchange::wait_for(Stream stream) {
  impl_->wait_for(stream);
}
void RowExchange::drain(Stream stream) noexcept {
  impl_->end_if_lost();
  try {
    impl_->wait_for(stream);
  } catch (const std::exception&) {  // the waits have ended
  }
  cudaStreamSynchronize(stream);
  cudaGetLastError();
}
void RowExchange::check(int channel) const {
  impl_->require_group();
  const Impl::Channel& c = impl_->channel(channel);
  if (impl_->link == Link::kNvlink) {
    std::uint32_t given_up[kMaxExchangeRanks];
    check_cuda(cudaMemcpy(given_up, c.view.window[impl_->rank] + c.view.at.given_up,
                          static_cast<std::size_t>(impl_->num_ranks) * 4, cudaMemcpyDeviceToHost),
               "row exchange");
    for (int r = 0; r < impl_->num_ranks; ++r)
      if (given_up[r] != 0)
        throw Error(ErrorCode::kPeerLost,
                    str("rank ", impl_->name(r), " did not wait any longer for rank ",
                        impl_->name(impl_->rank), " (channel ", channel,
                        "), and may have written over rows of the last pass before they were read"));
  }
  std::uint32_t status = 0;
  check_cuda(cudaMemcpy(&status, &c.view.state->status, sizeof status, cudaMemcpyDeviceToHost),
             "row exchange");
  Require((status & kExchangeOverflow) == 0, ErrorCode::kInvalidState, "channel ", channel, " of rank ",
          impl_->name(impl_->rank), ": a rank gets more rows than max_received = ", impl_->shape.max_received,
          ", or more routes than max_routes = ", impl_->shape.max_routes,
          "; nothing was sent; use larger buffers");
  Require((status & kExchangeBadHeader) == 0, ErrorCode::kTransport, "channel ", channel, " of rank ",
          impl_->name(impl_->rank), ": a peer sent row headers that do not fit its counts or this rank's ",
          impl_->shape.num_local_slots, " slots");
}
void RowExchange::clear(int channel, Stream stream) {
  Impl::Channel& c = impl_->channel(channel);
  c.overflow = false;
  check_cuda(cudaMemsetAsync(&c.view.state->status, 0, sizeof(std::uint32_t), stream), "row exchange");
  // Headers that did not fit leave tiles that no rows have completed.
  check_cuda(cudaMemsetAsync(c.tile_done.get(), 0, c.tile_done.bytes(), stream), "row exchange");
}

}  // namespace sluice::comm::cuda
