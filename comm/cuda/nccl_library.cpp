#include "sluice/comm/cuda/nccl_library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#if SLUICE_HAVE_NCCL
#include <nccl.h>
#endif

namespace sluice::comm::cuda {

#if SLUICE_HAVE_NCCL
namespace {

// Windows are read by code of the headers this was built with: an older library may lay them out differently.
constexpr int kWindowVersion = NCCL_VERSION_CODE;

#define SLUICE_NCCL_FUNCTIONS(X)                                                                       \
  X(ncclGetVersion)                                                                                    \
  X(ncclGetUniqueId)                                                                                   \
  X(ncclCommInitRankConfig)                                                                            \
  X(ncclCommDestroy)                                                                                   \
  X(ncclCommFinalize)                                                                                  \
  X(ncclCommAbort)                                                                                     \
  X(ncclCommGetAsyncError) X(ncclGetErrorString) X(ncclGetLastError) X(ncclGroupStart) X(ncclGroupEnd) \
      X(ncclSend) X(ncclRecv) X(ncclAllGather) X(ncclReduceScatter) X(ncclMemAlloc) X(ncclMemFree)

struct Library {
  void* handle = nullptr;
  int version = 0;
  std::string why_not;
#define SLUICE_DECLARE(name) decltype(&::name) name = nullptr;
  SLUICE_NCCL_FUNCTIONS(SLUICE_DECLARE)
  SLUICE_DECLARE(ncclCommWindowRegister)
  SLUICE_DECLARE(ncclCommWindowDeregister)
#undef SLUICE_DECLARE

  Library() {
    // Multicast stays off unless the user asks for it.
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    const char* named = std::getenv("SLUICE_NCCL_LIBRARY");
    const char* names[] = {named != nullptr ? named : "libnccl.so.2",
                           named != nullptr ? named : "libnccl.so"};
    for (const char* name : names) {
      if (handle == nullptr) handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    if (handle == nullptr) {
      const char* error = dlerror();
      why_not = str("NCCL cannot be loaded: ", error != nullptr ? error : "no reason given");
      return;
    }
#define SLUICE_FIND(name)                                           \
  name = reinterpret_cast<decltype(&::name)>(dlsym(handle, #name)); \
  if (name == nullptr && why_not.empty()) why_not = "the NCCL library found has no " #name;
    SLUICE_NCCL_FUNCTIONS(SLUICE_FIND)
#undef SLUICE_FIND
    ncclCommWindowRegister =
        reinterpret_cast<decltype(&::ncclCommWindowRegister)>(dlsym(handle, "ncclCommWindowRegister"));
    ncclCommWindowDeregister =
        reinterpret_cast<decltype(&::ncclCommWindowDeregister)>(dlsym(handle, "ncclCommWindowDeregister"));
    if (why_not.empty()) ncclGetVersion(&version);
  }
};
const Library& library() {
  static const Library loaded;
  return loaded;
}
const Library& require_library() {
  const Library& loaded = library();
  Require(loaded.why_not.empty(), ErrorCode::kNotSupported, loaded.why_not,
          " (SLUICE_NCCL_LIBRARY may name the file)");
  return loaded;
}
constexpr auto kAbortPatience = std::chrono::seconds(2);

ncclComm_t as_comm(void* comm) {
  return static_cast<ncclComm_t>(comm);
}

}  // namespace

bool nccl_available(std::string* why_not) {
  if (why_not != nullptr) *why_not = library().why_not;
  return library().why_not.empty();
}
int nccl_version() {
  return library().version;
}

NcclCommunicator::NcclCommunicator(const Bootstrap& bootstrap, std::chrono::milliseconds deadline,
                                   bool blocking)
    : rank_(bootstrap.rank),
      num_ranks_(bootstrap.num_ranks),
      names_(bootstrap.names),
      lost_(bootstrap.lost),
      deadline_(deadline) {
  const Library& nccl = require_library();
  struct Id {
    ncclUniqueId id;
    std::int32_t good;
  };
  Id mine{};
  if (rank_ == 0) mine.good = nccl.ncclGetUniqueId(&mine.id) == ncclSuccess;
  std::vector<Id> all(static_cast<std::size_t>(num_ranks_));
  bootstrap.all_gather(&mine, all.data(), sizeof mine);
  Require(all[0].good != 0, ErrorCode::kTransport, "NCCL: rank 0 could not make a unique id");
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = blocking ? 1 : 0;
  ncclComm_t comm = nullptr;
  const ncclResult_t result = nccl.ncclCommInitRankConfig(&comm, num_ranks_, all[0].id, rank_, &config);
  comm_ = comm;
  settle(result, "ncclCommInitRankConfig", deadline_);
}
std::string NcclCommunicator::who() const {
  std::string peers;
  for (int r = 0; r < num_ranks_; ++r)
    if (r != rank_) peers += (peers.empty() ? " with rank " : ", ") + std::to_string(name_of_rank(names_, r));
  return "rank " + std::to_string(name_of_rank(names_, rank_)) + peers;
}
NcclCommunicator::~NcclCommunicator() {
  if (lost_ && lost_()) abort();
  if (comm_ == nullptr) return;
  const Library& nccl = library();
  // A communicator that is not blocking is finalized first; one whose peers are gone never is.
  ncclResult_t state = nccl.ncclCommFinalize(as_comm(comm_));
  const auto end = Clock::now() + deadline_;
  while (state == ncclInProgress && Clock::now() < end && !(lost_ && lost_())) {
    std::this_thread::yield();
    if (nccl.ncclCommGetAsyncError(as_comm(comm_), &state) != ncclSuccess) state = ncclInternalError;
  }
  if (state == ncclSuccess) {
    nccl.ncclCommDestroy(as_comm(comm_));
    comm_ = nullptr;
  } else {
    abort();
  }
}

void NcclCommunicator::abort() noexcept {
  if (comm_ == nullptr) return;
  ncclComm_t comm = as_comm(std::exchange(comm_, nullptr));
  // NCCL waits for the device while it ends a communicator, and so for kernels of another one that wait for a lost peer too:
  // that one must get its turn.
  try {
    int device = 0;
    cudaGetDevice(&device);
    auto done = std::make_shared<std::promise<void>>();
    std::future<void> ended = done->get_future();
    std::thread([comm, device, done] {
      cudaSetDevice(device);
      library().ncclCommAbort(comm);
      done->set_value();
    }).detach();
    ended.wait_for(kAbortPatience);
  } catch (const std::exception&) {  // no thread
    library().ncclCommAbort(comm);
  }
}

// Waits until a call that is in progress is done.
void NcclCommunicator::settle(int result, const char* call, std::chrono::milliseconds deadline) {
  const Library& nccl = library();
  auto state = static_cast<ncclResult_t>(result);
  const auto end = Clock::now() + deadline;
  while (state == ncclInProgress) {
    if (Clock::now() > end) {
      abort();
      throw Error(ErrorCode::kTimeout, str("NCCL: ", call, " was not done after ", deadline.count(),
                                           " ms; the communicator of ", who(), " was aborted"));
    }
    end_if_lost(call);
    std::this_thread::yield();
    if (nccl.ncclCommGetAsyncError(as_comm(comm_), &state) != ncclSuccess) state = ncclInternalError;
  }
  if (state == ncclSuccess) return;
  const char* more = comm_ != nullptr ? nccl.ncclGetLastError(as_comm(comm_)) : nullptr;
  const std::string text = str("NCCL: ", call, " at ", who(), ": ", nccl.ncclGetErrorString(state), " (",
                               more != nullptr ? more : "", ")");
  abort();
  throw Error(ErrorCode::kTransport, text);
}

void NcclCommunicator::end_if_lost(const char* what) {
  if (!lost_ || !lost_()) return;
  abort();
  throw Error(ErrorCode::kPeerLost,
              str("NCCL: ", what, " at ", who(),
                  ": the host has learned that a rank of the group is gone; the communicator was aborted"));
}

void NcclCommunicator::require_alive() const {
  if (comm_ == nullptr)
    throw Error(ErrorCode::kAborted, str("NCCL: the communicator of ", who(), " was aborted"));
}

void NcclCommunicator::exchange(const std::vector<NcclTransfer>& transfers, Stream stream) {
  require_alive();
  const Library& nccl = library();
  nccl.ncclGroupStart();
  ncclResult_t bad = ncclSuccess;
  const auto note = [&](ncclResult_t result) {
    if (result != ncclSuccess && result != ncclInProgress && bad == ncclSuccess) bad = result;
  };
  for (const NcclTransfer& t : transfers) {
    if (t.send_bytes > 0) note(nccl.ncclSend(t.send, t.send_bytes, ncclInt8, t.peer, as_comm(comm_), stream));
    if (t.receive_bytes > 0)
      note(nccl.ncclRecv(t.receive, t.receive_bytes, ncclInt8, t.peer, as_comm(comm_), stream));
  }
  const ncclResult_t end = nccl.ncclGroupEnd();
  settle(bad != ncclSuccess ? bad : end, "send and receive", deadline_);
}
void NcclCommunicator::all_gather(const void* mine, void* all, std::size_t bytes, Stream stream) {
  require_alive();
  settle(library().ncclAllGather(mine, all, bytes, ncclInt8, as_comm(comm_), stream), "all-gather",
         deadline_);
}
void NcclCommunicator::reduce_scatter_bf16(const void* all, void* mine, std::size_t count, Stream stream) {
  require_alive();
  settle(library().ncclReduceScatter(all, mine, count, ncclBfloat16, ncclSum, as_comm(comm_), stream),
         "reduce-scatter", deadline_);
}

void NcclCommunicator::wait(Stream stream, std::chrono::milliseconds deadline, const char* phase) {
  require_alive();
  const Library& nccl = library();
  const auto end = Clock::now() + deadline;
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state == cudaSuccess) return;
    if (state != cudaErrorNotReady) check_cuda(state, phase);
    cudaGetLastError();
    ncclResult_t error = ncclSuccess;
    nccl.ncclCommGetAsyncError(as_comm(comm_), &error);
    if (error != ncclSuccess && error != ncclInProgress) settle(error, phase, deadline);
    end_if_lost(phase);
    if (Clock::now() > end) {
      abort();
      throw Error(ErrorCode::kTimeout, str("NCCL: ", phase, " at ", who(), " was not done after ",
                                           deadline.count(), " ms; the communicator was aborted"));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

void* NcclCommunicator::allocate(std::size_t bytes) {
  require_alive();
  void* memory = nullptr;
  Require(library().ncclMemAlloc(&memory, bytes) == ncclSuccess, ErrorCode::kOutOfMemory,
          "NCCL: ncclMemAlloc of ", bytes, " bytes failed");
  return memory;
}
void NcclCommunicator::release(void* memory) noexcept {
  library().ncclMemFree(memory);
}
void* NcclCommunicator::register_window(void* memory, std::size_t bytes) {
  require_alive();
  const Library& nccl = library();
  Require(nccl.ncclCommWindowRegister != nullptr && nccl.version >= kWindowVersion, ErrorCode::kNotSupported,
          "NCCL ", nccl.version, " is too old for windows of the device API; ", kWindowVersion,
          " or newer is needed");
  ncclWindow_t window = nullptr;
  settle(nccl.ncclCommWindowRegister(as_comm(comm_), memory, bytes, &window, NCCL_WIN_COLL_SYMMETRIC),
         "ncclCommWindowRegister", deadline_);
  Require(window != nullptr, ErrorCode::kNotSupported,
          "NCCL gives no window: its ranks cannot load from and store to each other's memory");
  return window;
}
void NcclCommunicator::deregister_window(void* window) noexcept {
  if (comm_ == nullptr) return;
  library().ncclCommWindowDeregister(as_comm(comm_), static_cast<ncclWindow_t>(window));
}

#else  // no headers: nothing to call

namespace {
[[noreturn]] void unsupported() {
  throw Error(ErrorCode::kNotSupported, "built without NCCL's headers");
}
}  // namespace
bool nccl_available(std::string* why_not) {
  if (why_not != nullptr) *why_not = "built without NCCL's headers";
  return false;
}
int nccl_version() {
  return 0;
}
NcclCommunicator::NcclCommunicator(const Bootstrap& bootstrap, std::chrono::milliseconds deadline, bool)
    : rank_(bootstrap.rank),
      num_ranks_(bootstrap.num_ranks),
      names_(bootstrap.names),
      lost_(bootstrap.lost),
      deadline_(deadline) {
  unsupported();
}
NcclCommunicator::~NcclCommunicator() = default;
std::string NcclCommunicator::who() const {
  unsupported();
}
void NcclCommunicator::require_alive() const {
  unsupported();
}
void NcclCommunicator::abort() noexcept {}
void NcclCommunicator::settle(int, const char*, std::chrono::milliseconds) {
  unsupported();
}
void NcclCommunicator::end_if_lost(const char*) {
  unsupported();
}
void NcclCommunicator::exchange(const std::vector<NcclTransfer>&, Stream) {
  unsupported();
}
void NcclCommunicator::all_gather(const void*, void*, std::size_t, Stream) {
  unsupported();
}
void NcclCommunicator::reduce_scatter_bf16(const void*, void*, std::size_t, Stream) {
  unsupported();
}
void NcclCommunicator::wait(Stream, std::chrono::milliseconds, const char*) {
  unsupported();
}
void* NcclCommunicator::allocate(std::size_t) {
  unsupported();
}
void NcclCommunicator::release(void*) noexcept {}
void* NcclCommunicator::register_window(void*, std::size_t) {
  unsupported();
}
void NcclCommunicator::deregister_window(void*) noexcept {}
std::vector<std::byte*> window_parts(void*, int) {
  unsupported();
}
#endif

}  // namespace sluice::comm::cuda
