// Puts over UCP, which picks RDMA, shared memory or TCP itself. Two-sided: what is expected is posted as a receive into its
// window, a put is a send with the same tag, which names the sender, the channel and the signal; UCP matches those of one
// tag in the order in which they were posted. So rows go from where they lie to where they belong by whatever way UCP has.
//
// To ranks of other hosts endpoints handle errors themselves. UCP 1.13 that is asked for it has only loopback TCP to ranks of
// the same host; so for those it is not asked, and takes shared memory and reads from process to process. That one of them
// died is what its control connection says (group_watch.hpp).
//
// A module that is loaded on demand, like the MPI transport.
#include <ucp/api/ucp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <unordered_map>

#include "sluice/base/hash.hpp"
#include "sluice/comm/data_path.hpp"
#include "sluice/comm/host.hpp"

namespace sluice::comm {
namespace {

constexpr std::uint32_t kSignalBits = 22;
constexpr std::uint32_t kChannelBits = 20;

void check(ucs_status_t status, std::string_view what) {
  Require(status == UCS_OK, ErrorCode::kTransport, what, " failed: ", ucs_status_string(status));
}

class UcxPath final : public DataPath {
 public:
  explicit UcxPath(const PathContext& context)
      : context_(context),
        landing_(*context.landing),
        endpoints_(static_cast<std::size_t>(context.num_ranks), nullptr),
        handles_errors_(static_cast<std::size_t>(context.num_ranks), true) {
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS;
    params.features = UCP_FEATURE_TAG | UCP_FEATURE_WAKEUP;
    params.estimated_num_eps = static_cast<std::size_t>(context.num_ranks);
    ucp_config_t* config = nullptr;
    check(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
    const ucs_status_t made = ucp_init(&params, config, &context_handle_);
    ucp_config_release(config);
    check(made, "ucp_init");
    ucp_worker_params_t worker{};
    worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    ucs_status_t status = ucp_worker_create(context_handle_, &worker, &worker_);
    if (status == UCS_OK) status = ucp_worker_get_efd(worker_, &event_fd_);
    if (status != UCS_OK) {
      release();
      check(status, "ucp_worker_create");
    }
  }
  ~UcxPath() override {
    stop();
    release();
  }

  std::string_view name() const override { return "ucx"; }

  std::string card() override {
    ucp_address_t* address = nullptr;
    std::size_t bytes = 0;
    check(ucp_worker_get_address(worker_, &address, &bytes), "ucp_worker_get_address");
    const std::uint64_t host = own_host();
    std::string out(reinterpret_cast<const char*>(&host), sizeof host);
    out.append(reinterpret_cast<const char*>(address), bytes);
    ucp_worker_release_address(worker_, address);
    return out;
  }

  void connect(std::span<const std::int32_t> peers, std::span<const std::string> cards, std::span<net::Fd>,
               Clock::time_point) override {
    peers_.reserve(peers.size());
    for (const std::int32_t r : peers) {
      peers_.push_back({this, r});
      const std::string& card = cards[static_cast<std::size_t>(r)];
      std::uint64_t host = 0;
      Require(card.size() > sizeof host, ErrorCode::kTransport, "rank ", r, " gave no address of UCX");
      std::memcpy(&host, card.data(), sizeof host);
      const bool handles_errors = host != own_host();
      handles_errors_[static_cast<std::size_t>(r)] = handles_errors;
      ucp_ep_params_t params{};
      params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                          UCP_EP_PARAM_FIELD_ERR_HANDLER;
      params.address = reinterpret_cast<const ucp_address_t*>(card.data() + sizeof host);
      params.err_mode = handles_errors ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE;
      params.err_handler.cb = [](void* arg, ucp_ep_h, ucs_status_t status) {
        const auto& peer = *static_cast<const Peer*>(arg);
        peer.path->landing_.lost(peer.rank, ucs_status_string(status));
      };
      params.err_handler.arg = &peers_.back();
      const ucs_status_t status = ucp_ep_create(worker_, &params, &endpoints_[static_cast<std::size_t>(r)]);
      Require(status == UCS_OK, ErrorCode::kTransport, "UCX cannot connect to rank ", r, ": ",
              ucs_status_string(status), "; look at UCX_TLS and UCX_NET_DEVICES");
    }
  }

  void expect(const Expect& expect, std::byte* to) override {
    if (stopped()) return;
    Operation* operation = take();
    operation->arrival = {expect.peer.value, expect.channel,      expect.window,
                          expect.signal,     expect.offset_bytes, expect.bytes};
    operation->is_send = false;
    ucp_request_param_t param{};
    param.op_attr_mask =
        UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
    param.cb.recv = [](void* request, ucs_status_t status, const ucp_tag_recv_info_t* info, void* user) {
      auto* done = static_cast<Operation*>(user);
      done->path->received(*done, status, info->length);
      ucp_request_free(request);
    };
    param.user_data = operation;
    const std::uint64_t from = tag(expect.peer.value, expect.channel, expect.signal);
    incoming_[from].push_back(operation);
    operation->request = ucp_tag_recv_nbx(worker_, to, static_cast<std::size_t>(expect.bytes), from,
                                          ~std::uint64_t{0}, &param);
    if (UCS_PTR_IS_ERR(operation->request)) failed(*operation, UCS_PTR_STATUS(operation->request));
  }

  void put(const Put& put) override {
    if (stopped()) return;
    Operation* operation = take();
    operation->arrival = {put.peer.value, put.channel,      put.window,
                          put.signal,     put.offset_bytes, static_cast<std::int64_t>(put.source.size())};
    operation->is_send = true;
    ++num_sending_;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.send = [](void* request, ucs_status_t status, void* user) {
      auto* done = static_cast<Operation*>(user);
      done->path->was_sent(*done, status);
      ucp_request_free(request);
    };
    param.user_data = operation;
    void* request = ucp_tag_send_nbx(endpoints_[put.peer.index()], put.source.data(), put.source.size(),
                                     tag(context_.rank, put.channel, put.signal), &param);
    if (request == nullptr)
      was_sent(*operation, UCS_OK);
    else if (UCS_PTR_IS_ERR(request))
      failed(*operation, UCS_PTR_STATUS(request));
    else
      operation->request = request;
  }

  bool progress() override {
    if (stopped()) return false;
    // A part of a put that moved counts: who waits for the rest does not sleep between parts.
    const std::uint64_t before = num_done_;
    int moved = 0;
    while (moved < 64 && ucp_worker_progress(worker_) != 0 && !stopped()) ++moved;
    return moved > 0 || num_done_ != before;
  }

  void forget(std::span<std::byte>) override {
    // UCP writes into a window only while a put to it is expected, and none is when a pass has ended; after an abort the
    // receives are cancelled first.
  }

  bool prepare_sleep(std::vector<pollfd>& fds) override {
    if (ucp_worker_arm(worker_) != UCS_OK) return false;
    fds.push_back({.fd = event_fd_, .events = POLLIN, .revents = 0});
    return true;
  }

  void stop() noexcept override { stopped_.store(true, std::memory_order_seq_cst); }
  void settle() noexcept override { cancel(); }

  bool drain(Clock::time_point deadline) override {
    while (num_sending_ > 0) {
      if (Clock::now() >= deadline || stopped()) return false;
      if (!progress()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return true;
  }

 private:
  struct Peer {
    UcxPath* path = nullptr;
    std::int32_t rank = -1;
  };
  struct Operation {
    UcxPath* path = nullptr;
    Arrival arrival;
    void* request = nullptr;
    bool is_send = false;
    bool busy = false;
  };

  static std::uint64_t tag(std::int32_t from, std::uint32_t channel, std::uint32_t signal) {
    return static_cast<std::uint64_t>(from) << (kChannelBits + kSignalBits) |
           static_cast<std::uint64_t>(channel) << kSignalBits | signal;
  }
  static std::uint64_t own_host() {
    static const std::uint64_t host = Hasher().add_text(host_identity()).value();
    return host;
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  Operation* take() {
    if (spare_.empty()) {
      pool_.push_back(std::make_unique<Operation>());
      spare_.push_back(pool_.back().get());
    }
    Operation* out = spare_.back();
    spare_.pop_back();
    out->path = this;
    out->request = nullptr;
    out->busy = true;
    return out;
  }
  void give(Operation& operation) {
    operation.busy = false;
    spare_.push_back(&operation);
    ++num_done_;
  }

  void received(Operation& operation, ucs_status_t status, std::size_t bytes) {
    const Arrival arrival = operation.arrival;
    if (stopped()) {
      operation.busy = false;
      return;
    }
    if (status == UCS_ERR_MESSAGE_TRUNCATED ||
        (status == UCS_OK && bytes != static_cast<std::size_t>(arrival.bytes))) {
      Arrival said = arrival;
      said.bytes = status == UCS_OK ? static_cast<std::int64_t>(bytes) : arrival.bytes + 1;
      std::byte* to = nullptr;
      landing_.place(said, to);  // refuses it by name
      return;
    }
    if (status != UCS_OK) {
      landing_.lost(arrival.peer, ucs_status_string(status));
      return;
    }
    // UCP matches in order but may complete a small message before a large one that was put earlier.
    operation.busy = false;
    std::deque<Operation*>& queue = incoming_[tag(arrival.peer, arrival.channel, arrival.signal)];
    while (!queue.empty() && !queue.front()->busy) {
      Operation& first = *queue.front();
      queue.pop_front();
      std::byte* to = nullptr;
      if (landing_.place(first.arrival, to) == Landing::Place::kThere) landing_.landed(first.arrival);
      give(first);
    }
  }
  void was_sent(Operation& operation, ucs_status_t status) {
    const Arrival arrival = operation.arrival;
    give(operation);
    --num_sending_;
    if (stopped()) return;
    if (status == UCS_OK)
      landing_.sent(arrival.peer, arrival.channel);
    else
      landing_.lost(arrival.peer, ucs_status_string(status));
  }
  void failed(Operation& operation, ucs_status_t status) {
    const Arrival arrival = operation.arrival;
    if (operation.is_send) --num_sending_;
    give(operation);
    landing_.lost(arrival.peer, ucs_status_string(status));
  }

  // After this nothing is written into windows or read from sources.
  void cancel() noexcept {
    if (worker_ == nullptr || cancelled_) return;
    cancelled_ = true;
    for (const auto& operation : pool_)
      if (operation->busy && operation->request != nullptr && !operation->is_send)
        ucp_request_cancel(worker_, operation->request);
    std::vector<void*> closing;
    for (std::size_t r = 0; r < endpoints_.size(); ++r) {
      ucp_ep_h& ep = endpoints_[r];
      // One without errors cannot be closed by force; it goes with the worker.
      if (ep == nullptr || !handles_errors_[r]) continue;
      ucp_request_param_t param{};
      param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
      param.flags = UCP_EP_CLOSE_FLAG_FORCE;
      void* request = ucp_ep_close_nbx(ep, &param);
      if (request != nullptr && !UCS_PTR_IS_ERR(request)) closing.push_back(request);
      ep = nullptr;
    }
    const Clock::time_point until = Clock::now() + std::chrono::seconds(1);
    for (void* request : closing) {
      while (ucp_request_check_status(request) == UCS_INPROGRESS && Clock::now() < until)
        ucp_worker_progress(worker_);
      ucp_request_free(request);
    }
    for (int i = 0; i < 100; ++i) ucp_worker_progress(worker_);
  }
  void release() noexcept {
    cancel();
    if (worker_ != nullptr) ucp_worker_destroy(worker_);
    if (context_handle_ != nullptr) ucp_cleanup(context_handle_);
    worker_ = nullptr;
    context_handle_ = nullptr;
  }

  const PathContext context_;
  Landing& landing_;
  ucp_context_h context_handle_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::vector<Peer> peers_;
  std::vector<ucp_ep_h> endpoints_;   // [num_ranks]
  std::vector<bool> handles_errors_;  // [num_ranks]
  std::vector<std::unique_ptr<Operation>> pool_;
  std::vector<Operation*> spare_;
  std::unordered_map<std::uint64_t, std::deque<Operation*>> incoming_;  // by tag, in the order of the puts
  std::uint64_t num_done_ = 0;
  std::int64_t num_sending_ = 0;
  std::atomic<bool> stopped_{false};
  bool cancelled_ = false;
};

}  // namespace
}  // namespace sluice::comm

extern "C" sluice::comm::DataPath* sluice_comm_make_path_1(const sluice::comm::PathContext* context) {
  return new sluice::comm::UcxPath(*context);
}
