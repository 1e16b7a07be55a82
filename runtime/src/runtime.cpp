#include "sluice/runtime.hpp"

#include <algorithm>
#include <thread>

#include "sluice/base/hash.hpp"
#include "sluice/comm/host.hpp"
#include "sluice/runtime/src/compute_device.hpp"
#include "sluice/runtime/src/executor.hpp"
#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {

void give_device(RuntimeState& state, std::int64_t rank_in_node) {
  state.device = make_compute_device(static_cast<int>(rank_in_node));
  state.options.device = ComputeDevice::kCuda;
  if (state.options.allocator.allocate == nullptr) state.options.allocator = device_allocator(*state.device);
}

std::unique_ptr<RuntimeState> make_state(std::unique_ptr<comm::Transport> transport,
                                         const RuntimeOptions& options) {
  Require(options.threads_per_rank >= 1, ErrorCode::kInvalidArgument, "threads_per_rank is ",
          options.threads_per_rank, ", must be at least 1");
  Require((options.allocator.allocate == nullptr) == (options.allocator.deallocate == nullptr),
          ErrorCode::kInvalidArgument,
          "the allocator has only one of allocate and deallocate; give both or none");
  auto state = std::make_unique<RuntimeState>();
  state->options = options;
  if (options.device == ComputeDevice::kCuda) {
    const Topology& topology = transport->topology();
    const auto here = topology.ranks_of(topology.node_of(transport->rank()));
    give_device(*state, std::find(here.begin(), here.end(), transport->rank().value) - here.begin());
  }
  transport->set_timeout(options.timeout);
  state->collectives = std::make_unique<comm::Collectives>(*transport);
  state->transport = std::move(transport);
  state->kernels = kernels::make_cpu_kernels(options.threads_per_rank);
  return state;
}

// Worth a thread where transfers wait for the host to look, and a core is left for it.
bool wants_progress_thread(const RuntimeState& state) {
  switch (state.options.progress) {
    case ProgressMode::kInline:
      return false;
    case ProgressMode::kThread:
      return true;
    case ProgressMode::kAuto:
      break;
  }
  const comm::Transport& t = *state.transport;
  const auto ranks_here = t.topology().ranks_of(t.topology().node_of(t.rank())).size();
  const std::size_t cores = std::thread::hardware_concurrency();
  return t.caps().needs_progress &&
         cores >= ranks_here * (static_cast<std::size_t>(state.options.threads_per_rank) + 1);
}

}  // namespace

RuntimeState::RuntimeState() = default;
RuntimeState::~RuntimeState() = default;

Runtime::Runtime(std::unique_ptr<RuntimeState> state) : state_(std::move(state)) {
  state_->executor = std::make_unique<Executor>(*this, wants_progress_thread(*state_));
}
Runtime::~Runtime() = default;

std::vector<std::unique_ptr<Runtime>> Runtime::create_local(const Topology& topology,
                                                            const RuntimeOptions& options) {
  std::vector<std::unique_ptr<Runtime>> out;
  for (auto& transport : comm::make_local_group(topology))
    out.push_back(create_over(std::move(transport), options));
  return out;
}

std::unique_ptr<Runtime> Runtime::create(std::string_view transport, const Topology* nodes,
                                         const RuntimeOptions& options) {
  const std::optional<GpuLink> link = gpu_link_of(transport);
  if (link) {
    Require(options.device == ComputeDevice::kCuda, ErrorCode::kInvalidArgument, "transport ", transport,
            " moves rows from GPU to GPU, but the device is cpu; set it to cuda (runtime.device), or choose "
            "another transport");
    require_gpu_link(*link);
  }
  // Where rows travel between GPUs, the host's transport carries all else; it always finds a way.
  auto joined = comm::load_transport(
      link ? "shm+tcp" : transport, nodes,
      {.rendezvous = options.rendezvous, .secret_file = options.secret_file, .timeout = options.timeout});
  return link ? create_over_gpus(std::move(joined), options, *link) : create_over(std::move(joined), options);
}

std::unique_ptr<Runtime> Runtime::create_over(std::unique_ptr<comm::Transport> transport,
                                              const RuntimeOptions& options) {
  return std::unique_ptr<Runtime>(new Runtime(make_state(std::move(transport), options)));
}

std::unique_ptr<Runtime> create_over_gpus(std::unique_ptr<comm::Transport> transport,
                                          const RuntimeOptions& options, GpuLink link) {
  RuntimeOptions on_host = options;
  on_host.device = ComputeDevice::kCpu;
  auto runtime = Runtime::create_over(std::move(transport), on_host);
  // Hosts as they are: nodes may be declared otherwise, but GPUs are the host's.
  const auto host = static_cast<std::int64_t>(Hasher().add_text(comm::host_identity()).value());
  const std::vector<std::int64_t> hosts = runtime->all_gather(std::span(&host, 1), "GPUs");
  give_device(runtime->state(), std::count(hosts.begin(), hosts.begin() + runtime->rank().value, host));
  runtime->state().gpu_group = make_gpu_group(*runtime, link);
  return runtime;
}

RankId Runtime::rank() const {
  return state_->transport->rank();
}
const Topology& Runtime::topology() const {
  return state_->transport->topology();
}
const RuntimeOptions& Runtime::options() const {
  return state_->options;
}

void Runtime::all_reduce_sum(std::span<float> data, std::string_view phase) {
  state_->collectives->all_reduce_sum(data, phase).throw_if_error();
}
void Runtime::all_reduce_sum(std::span<double> data, std::string_view phase) {
  state_->collectives->all_reduce_sum(data, phase).throw_if_error();
}
void Runtime::barrier(std::string_view phase) {
  state_->collectives->barrier(phase).throw_if_error();
}

std::vector<std::int64_t> Runtime::all_gather(std::span<const std::int64_t> values, std::string_view phase) {
  std::vector<std::int64_t> out(values.size() * static_cast<std::size_t>(num_ranks()));
  state_->collectives->all_gather(values, out, phase).throw_if_error();
  return out;
}

void Runtime::broadcast(std::span<std::byte> data, RankId root, std::string_view phase) {
  state_->collectives->broadcast(data, root, phase).throw_if_error();
}

void Runtime::abort(std::string_view phase, const std::string& reason) noexcept {
  try {
    comm::AbortRecord record;
    record.status = {ErrorCode::kAborted,
                     str("rank ", rank().value, " ended the group in ", phase, ": ", reason)};
    record.culprit = rank();
    record.reporter = rank();
    record.phase = std::string(phase);
    state_->transport->abort(record);
  } catch (...) {
    // Out of memory while reporting: peers find out by their deadline.
  }
}

Status Runtime::async_error() const {
  return state_->transport->aborted() ? state_->transport->abort_record().status : Status{};
}

SpanRecorder* Runtime::recorder() const {
  return state_->recorder;
}
void Runtime::set_recorder(SpanRecorder* recorder) {
  state_->recorder = recorder;
}
comm::Transport& Runtime::transport() {
  return *state_->transport;
}
comm::Collectives& Runtime::collectives() {
  return *state_->collectives;
}
kernels::Kernels& Runtime::kernels() {
  return *state_->kernels;
}

}  // namespace sluice
