// Puts between processes of one host. Every rank owns a segment of POSIX shared memory with one inbox for each peer: a
// ring of records that the peer alone writes and the rank alone reads.
//
//   small puts   travel in the ring, copied in by the sender and out by the receiver
//   large puts   are announced in the ring. From put_memory(), which lies behind the inboxes in the segment, the receiver
//                copies them where they belong: one copy, by memcpy, and the sender may compute.
//                From other memory they are cut into pieces that both sides claim from one counter: the receiver reads
//                a piece through the system (process_vm_readv: one copy at less than half of memcpy's speed), the sender
//                copies a piece into the ring when it has nothing else to do. So an idle pair of cores shares the work
//                and a busy sender does none of it. Where the system does not allow the first, which is tried when the
//                group forms, all pieces go through the ring.
//
// Only the rank itself ever writes into its windows. So a peer that is killed, or stopped in the middle of anything, can
// damage nothing, and memory that was taken back is not written any more. What peers wrote into shared memory is copied
// before it is looked at, and checked like bytes of a network.
//
// Nothing blocks: a full ring leaves puts in the sender's queue. A rank that sleeps says so in its segment, and whoever
// has something for it then rings its doorbell, a datagram socket (so that one poll() serves all paths of a group).
//
// Segments lose their names as soon as all peers have them open; what a process that died before left behind is swept
// when the next group forms.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "sluice/base/log.hpp"
#include "sluice/comm/data_path.hpp"

namespace sluice::comm {
namespace {

constexpr std::uint64_t kMagic = 0x3230'6d68'7331'6c73ull;
constexpr std::size_t kLine = 64;
constexpr std::size_t kMaxRingBytes = 1 << 20;
constexpr std::size_t kMinRingBytes = 64 << 10;
constexpr std::size_t kHostBytes =
    256 << 20;  // of all rings of a host together, while that leaves them large enough
constexpr std::size_t kMaxPieceBytes = 128 << 10;
constexpr std::size_t kMaxSmallBytes = 8 << 10;
constexpr std::uint32_t kMappedPieces = 8;   // claimed at once where the source is mapped
constexpr std::size_t kPullBytes = 1 << 20;  // read from one peer before something else is looked at
constexpr std::size_t kPage = 4096;
// Of the put memory of all ranks of a host together, in the addresses of each: a part of what a process can have.
constexpr std::size_t kHostPutAddresses = std::size_t{1} << 45;
constexpr std::uint64_t kNotThere = ~std::uint64_t{0};
constexpr std::uint64_t kMaxLarge = 64;        // announced and not landed, of one peer
constexpr std::int64_t kBurstBytes = 4 << 20;  // of one peer before the others have their turn

static_assert(std::atomic<std::uint64_t>::is_always_lock_free &&
                  std::atomic<std::uint32_t>::is_always_lock_free,
              "atomics in shared memory must not need a lock");

// ---- what lies in shared memory

// Each atomic has one writer, but next_piece and sleeping.
struct Inbox {
  alignas(kLine) std::atomic<std::uint64_t> tail;  // by the peer: bytes written, ever
  alignas(kLine) std::atomic<std::uint64_t> head;  // by the owner: bytes read, ever
  std::atomic<std::uint64_t> num_large_landed;     // by the owner
  std::atomic<std::uint32_t> is_mapped;            // by the owner: it has the peer's put memory mapped
  alignas(kLine) std::atomic<
      std::uint32_t> next_piece[kMaxLarge];  // of large put n, at n % kMaxLarge: the next to claim
};

struct Segment {
  std::uint64_t magic;
  std::uint64_t ring_bytes;
  std::uint64_t num_inboxes;
  alignas(kLine) std::atomic<std::uint32_t> sleeping;
  alignas(kLine) std::atomic<std::uint32_t> stopped;  // nobody may read the owner's memory any more
};

struct alignas(kLine) Record {
  enum Kind : std::uint32_t { kSkip = 1, kSmall, kLarge, kPiece };
  std::uint32_t kind;
  std::uint32_t payload_bytes;  // behind the record
  std::uint32_t channel;
  std::uint32_t window;
  std::uint32_t signal;
  std::uint32_t piece;
  std::int64_t offset_bytes;
  std::int64_t bytes;
  std::uint64_t address;  // of a large put's source, in the sender
  std::uint64_t number;   // of the large put
  std::uint64_t place;    // of a large put's source in the sender's put memory; or kNotThere
};
static_assert(sizeof(Record) == kLine);

constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + kLine - 1) / kLine * kLine;
}
constexpr std::size_t kInboxBytes = padded(sizeof(Inbox));

std::size_t inbox_offset(std::size_t index, std::size_t ring_bytes) {
  return padded(sizeof(Segment)) + index * (kInboxBytes + ring_bytes);
}

// Of so many ranks on one host.
std::size_t ring_bytes_for(std::int32_t num_ranks) {
  const auto n = static_cast<std::size_t>(num_ranks);
  return std::clamp(std::bit_floor(kHostBytes / (n * n)), kMinRingBytes, kMaxRingBytes);
}
std::size_t piece_bytes_for(std::size_t ring_bytes) {
  return std::min(kMaxPieceBytes, ring_bytes / 8);
}

// A mapped segment, one's own or a peer's.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int fd, std::size_t bytes, const std::string& name, std::size_t offset = 0,
          int protection = PROT_READ | PROT_WRITE)
      : bytes_(bytes) {
    memory_ = ::mmap(nullptr, bytes, protection, MAP_SHARED | MAP_NORESERVE, fd, static_cast<off_t>(offset));
    Require(memory_ != MAP_FAILED, ErrorCode::kTransport, "cannot map shared memory ", name, ": ",
            std::strerror(errno));
  }
  ~Mapping() {
    if (memory_ != MAP_FAILED) ::munmap(memory_, bytes_);
  }
  Mapping(Mapping&& other) noexcept
      : memory_(std::exchange(other.memory_, MAP_FAILED)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  bool valid() const { return memory_ != MAP_FAILED; }
  std::byte* data() const { return static_cast<std::byte*>(memory_); }
  std::size_t size() const { return bytes_; }
  Segment& segment() const { return *static_cast<Segment*>(memory_); }
  Inbox& inbox(std::size_t index, std::size_t ring_bytes) const {
    return *reinterpret_cast<Inbox*>(static_cast<std::byte*>(memory_) + inbox_offset(index, ring_bytes));
  }
  std::byte* ring(std::size_t index, std::size_t ring_bytes) const {
    return static_cast<std::byte*>(memory_) + inbox_offset(index, ring_bytes) + kInboxBytes;
  }

 private:
  void* memory_ = MAP_FAILED;
  std::size_t bytes_ = 0;
};

// The put memory of a rank: behind the inboxes in its segment, as many addresses as the machine has memory, of which only
// what is allocated exists.
class MappedPutMemory final : public PutMemory {
 public:
  // fd: of the segment; begin: where in it.
  MappedPutMemory(net::Fd fd, std::size_t begin, Mapping mapping)
      : fd_(std::move(fd)), begin_(begin), mapping_(std::move(mapping)), free_{{0, mapping_.size()}} {}

  void* allocate(std::size_t bytes) noexcept override {
    try {
      const std::lock_guard lock(mutex_);
      bytes = to_pages(bytes);
      // The rings of the next group have to find room as well.
      struct statvfs system {};
      if (::fstatvfs(fd_.get(), &system) != 0 || bytes / system.f_frsize > system.f_bavail / 2)
        return nullptr;
      const auto found =
          std::find_if(free_.begin(), free_.end(), [&](const auto& f) { return f.second >= bytes; });
      if (found == free_.end()) return nullptr;
      const std::size_t at = found->first;
      // Reserved, for memory that is not there when it is written to kills the process.
      if (::posix_fallocate(fd_.get(), static_cast<off_t>(begin_ + at), static_cast<off_t>(bytes)) != 0) {
        punch(at, bytes);
        return nullptr;
      }
      const std::size_t left = found->second - bytes;
      free_.erase(found);
      if (left > 0) free_.emplace(at + bytes, left);
      return mapping_.data() + at;
    } catch (...) {
      return nullptr;
    }
  }
  void deallocate(void* memory, std::size_t bytes) noexcept override {
    try {
      const std::lock_guard lock(mutex_);
      std::size_t at = static_cast<std::size_t>(static_cast<std::byte*>(memory) - mapping_.data());
      bytes = to_pages(bytes);
      punch(at, bytes);
      const auto next = free_.lower_bound(at);
      if (next != free_.end() && next->first == at + bytes) {
        bytes += next->second;
        free_.erase(next);
      }
      const auto after = free_.lower_bound(at);
      if (after != free_.begin()) {
        const auto before = std::prev(after);
        if (before->first + before->second == at) {
          before->second += bytes;
          return;
        }
      }
      free_.emplace(at, bytes);
    } catch (...) {
      // No memory for the list: these addresses are not used again.
    }
  }
  // Where a source lies in it, or kNotThere.
  std::uint64_t place_of(std::span<const std::byte> source) const {
    const auto from = reinterpret_cast<std::uintptr_t>(source.data());
    const auto base = reinterpret_cast<std::uintptr_t>(mapping_.data());
    return from >= base && from - base <= mapping_.size() && source.size() <= mapping_.size() - (from - base)
               ? from - base
               : kNotThere;
  }
  std::size_t size() const { return mapping_.size(); }

 private:
  static std::size_t to_pages(std::size_t bytes) {
    return (std::max<std::size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  }
  void punch(std::size_t at, std::size_t bytes) noexcept {
    (void)::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(begin_ + at),
                      static_cast<off_t>(bytes));
  }

  const net::Fd fd_;
  const std::size_t begin_;
  const Mapping mapping_;
  std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  // offset, bytes; neighbours are joined
};

// ---- names

std::string pid_namespace() {
  struct stat info {};
  return ::stat("/proc/self/ns/pid", &info) == 0 ? str(static_cast<std::uint64_t>(info.st_ino)) : "0";
}

// Names are sluice-PIDNAMESPACE-PID-NUMBER: whose owner is gone is litter.
void sweep() {
  const std::string prefix = str("sluice-", pid_namespace(), "-");
  DIR* folder = ::opendir("/dev/shm");
  if (folder == nullptr) return;
  while (const dirent* entry = ::readdir(folder)) {
    const std::string_view name = entry->d_name;
    if (!name.starts_with(prefix)) continue;
    const std::string_view rest = name.substr(prefix.size());
    pid_t pid = 0;
    const auto [end, ec] = std::from_chars(rest.data(), rest.data() + rest.size(), pid);
    if (ec == std::errc{} && pid > 0 && ::kill(pid, 0) != 0 && errno == ESRCH) ::shm_unlink(entry->d_name);
  }
  ::closedir(folder);
}

// What a rank tells its peers.
struct CardData {
  std::uint64_t magic = kMagic;
  std::int64_t pid = 0;
  std::uint64_t segment_bytes = 0;  // of the inboxes
  std::uint64_t put_bytes = 0;      // of the put memory behind them
  std::uint64_t probe_address = 0;  // of 16 bytes that a peer tries to read
  std::array<std::byte, 16> probe{};
  std::uint32_t doorbell_bytes = 0;
  std::array<char, 108> doorbell{};
  std::array<char, 64> name{};
};

// ---- the two directions between this rank and a peer

struct LargeOut {
  std::span<const std::byte> source;
  bool in_put_memory = false;
  std::uint32_t channel = 0;
  std::uint32_t num_pieces = 0;
  std::uint64_t number = 0;
};

// An arrival that is not complete, or waits for one before it.
struct Open {
  Arrival arrival;
  std::byte* to = nullptr;  // null: thrown away, its window was taken back
  std::uint64_t address = 0;
  const std::byte* mapped = nullptr;  // the source, where it can be seen from here
  std::uint64_t number = 0;
  std::uint32_t num_pieces = 0;  // 0: small
  std::uint32_t num_left = 0;
};

struct Link {
  std::int32_t peer = -1;
  bool broken = false;
  Mapping theirs;
  Mapping their_put_memory;  // not valid: it cannot be mapped
  sockaddr_un doorbell{};
  socklen_t doorbell_bytes = 0;
  pid_t pid = 0;
  bool may_read = false;  // process_vm_readv works

  // Out: this rank writes the peer's inbox.
  Inbox* out = nullptr;
  std::byte* out_ring = nullptr;
  std::uint64_t out_tail = 0;
  std::deque<Put> queue;        // not announced yet
  std::deque<LargeOut> large;   // announced and not landed
  std::uint64_t num_large = 0;  // announced, ever
  std::size_t staging = 0;      // index in `large` of the first that may have unclaimed pieces

  // In: this rank reads its own inbox.
  Inbox* in = nullptr;
  std::byte* in_ring = nullptr;
  std::uint64_t in_head = 0;
  std::deque<Open> open;
  std::uint64_t num_large_in = 0;
  std::uint64_t num_large_landed = 0;
  bool stalled = false;  // the record at the head has no place yet
};

class ShmPath final : public DataPath {
 public:
  explicit ShmPath(const PathContext& context)
      : context_(context),
        landing_(*context.landing),
        ring_bytes_(ring_bytes_for(context.num_ranks)),
        piece_bytes_(piece_bytes_for(ring_bytes_)),
        probe_(),
        links_(static_cast<std::size_t>(context.num_ranks)) {
    sweep();
    const Nonce nonce = random_nonce();
    std::copy_n(nonce.begin(), probe_.size(), probe_.begin());
    make_segment();
    make_doorbell();
  }
  ~ShmPath() override {
    stop();
    unlink();
  }

  std::string_view name() const override { return "shm"; }
  std::shared_ptr<PutMemory> put_memory() override { return put_memory_; }

  std::string card() override {
    CardData card;
    card.pid = ::getpid();
    card.segment_bytes = segment_bytes();
    card.put_bytes = put_memory_ ? put_memory_->size() : 0;
    card.probe_address = reinterpret_cast<std::uintptr_t>(probe_.data());
    card.probe = probe_;
    card.doorbell_bytes = own_doorbell_bytes_;
    std::memcpy(card.doorbell.data(), own_doorbell_.sun_path,
                own_doorbell_bytes_ - offsetof(sockaddr_un, sun_path));
    std::memcpy(card.name.data(), name_.data(), name_.size());
    return std::string(reinterpret_cast<const char*>(&card), sizeof card);
  }

  void connect(std::span<const std::int32_t> peers, std::span<const std::string> cards, std::span<net::Fd>,
               Clock::time_point) override {
    for (const std::int32_t r : peers) {
      Link& link = links_[static_cast<std::size_t>(r)];
      const std::string& text = cards[static_cast<std::size_t>(r)];
      CardData card;
      Require(text.size() == sizeof card, ErrorCode::kTransport, "rank ", r, " sends a card of ", text.size(),
              " bytes for shared memory, expected ", sizeof card,
              "; it uses another transport (comm.transport must be the same on all ranks), or runs another "
              "version of Sluice");
      std::memcpy(&card, text.data(), sizeof card);
      constexpr std::size_t kFamily = offsetof(sockaddr_un, sun_path);
      Require(card.magic == kMagic && card.segment_bytes == segment_bytes() && card.pid > 0 &&
                  card.doorbell_bytes > kFamily && card.doorbell_bytes <= kFamily + card.doorbell.size() &&
                  card.name.back() == '\0' && std::string_view(card.name.data()).starts_with("/sluice-"),
              ErrorCode::kTransport, "rank ", r,
              " sends a card for shared memory that makes no sense; it runs "
              "another version of Sluice");
      link.peer = r;
      link.pid = static_cast<pid_t>(card.pid);
      link.doorbell.sun_family = AF_UNIX;
      std::memcpy(link.doorbell.sun_path, card.doorbell.data(), card.doorbell_bytes - kFamily);
      link.doorbell_bytes = card.doorbell_bytes;
      const std::string name = card.name.data();
      const net::Fd fd(::shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0));
      struct stat info {};
      const bool open = fd.valid() && ::fstat(fd.get(), &info) == 0;
      Require(open, ErrorCode::kTransport, "cannot open the shared memory ", name, " of rank ", r, ": ",
              std::strerror(errno), "; do all ranks of the host see one /dev/shm?");
      Require(info.st_uid == ::geteuid() && card.put_bytes <= kHostPutAddresses &&
                  static_cast<std::uint64_t>(info.st_size) == card.segment_bytes + card.put_bytes,
              ErrorCode::kTransport, "the shared memory ", name, " of rank ", r, " has ", info.st_size,
              " bytes of user ", info.st_uid, ", expected ", card.segment_bytes + card.put_bytes, " of user ",
              ::geteuid());
      link.theirs = Mapping(fd.get(), card.segment_bytes, name);
      const auto me = static_cast<std::size_t>(context_.rank);
      link.out = &link.theirs.inbox(me, ring_bytes_);
      link.out_ring = link.theirs.ring(me, ring_bytes_);
      link.in = &own_.inbox(static_cast<std::size_t>(r), ring_bytes_);
      link.in_ring = own_.ring(static_cast<std::size_t>(r), ring_bytes_);
      if (card.put_bytes > 0) {
        try {
          link.their_put_memory = Mapping(fd.get(), card.put_bytes, name, card.segment_bytes, PROT_READ);
          link.in->is_mapped.store(1, std::memory_order_release);
        } catch (const Error& e) {
          log_debug("put memory of rank ", r, " is not used: ", e.message());
        }
      }
      std::array<std::byte, 16> seen{};
      link.may_read =
          read_peer(link, seen.data(), card.probe_address, seen.size()) == 0 && seen == card.probe;
    }
  }
  void all_connected() override { unlink(); }

  void put(const Put& put) override {
    if (stopped()) return;
    Link& link = links_[put.peer.index()];
    link.queue.push_back(put);
    if (send(link)) ring_doorbell(link);
  }

  bool progress() override {
    if (stopped()) return false;
    bool moved = false;
    for (Link& link : links_) {
      if (link.peer < 0 || link.broken) continue;
      const bool sent = send(link);
      const bool received = receive(link);
      if (stopped()) return false;
      if (sent || received) ring_doorbell(link);
      moved = moved || sent || received;
    }
    return moved;
  }

  void retry() override {
    for (Link& link : links_) link.stalled = false;
  }

  void forget(std::span<std::byte> memory) override {
    for (Link& link : links_)
      for (Open& open : link.open)
        if (open.to != nullptr && open.to + open.arrival.bytes > memory.data() &&
            open.to < memory.data() + memory.size())
          open.to = nullptr;
  }

  bool prepare_sleep(std::vector<pollfd>& fds) override {
    own_.segment().sleeping.store(1, std::memory_order_seq_cst);
    // Look once more: what came before the flag could be seen rang no bell.
    for (const Link& link : links_)
      if (link.peer >= 0 && !link.broken && has_work(link)) return false;
    fds.push_back({.fd = bell_.get(), .events = POLLIN, .revents = 0});
    return true;
  }
  void end_sleep() override {
    own_.segment().sleeping.store(0, std::memory_order_relaxed);
    char bin[16];
    while (::recv(bell_.get(), bin, sizeof bin, MSG_DONTWAIT) >= 0) {
    }
  }

  void stop() noexcept override {
    stopped_.store(true, std::memory_order_seq_cst);
    own_.segment().stopped.store(1, std::memory_order_seq_cst);
  }

  bool drain(Clock::time_point deadline) override {
    const auto left = [&](const Link& link) {
      // What lies in the ring stays readable when this process is gone; large puts need it.
      return link.peer >= 0 && !link.broken && (!link.queue.empty() || !link.large.empty());
    };
    while (std::any_of(links_.begin(), links_.end(), left)) {
      if (Clock::now() >= deadline || stopped()) return false;
      if (!progress()) ::usleep(50);
    }
    return true;
  }

 private:
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  std::size_t segment_bytes() const {
    const std::size_t bytes = inbox_offset(static_cast<std::size_t>(context_.num_ranks), ring_bytes_);
    return (bytes + kPage - 1) / kPage * kPage;
  }

  void make_segment() {
    std::uint64_t number = 0;
    const Nonce nonce = random_nonce();
    std::memcpy(&number, nonce.data(), sizeof number);
    name_ = str("/sluice-", pid_namespace(), "-", ::getpid(), "-", number % 1000000000);
    net::Fd fd(::shm_open(name_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    Require(fd.valid(), ErrorCode::kTransport, "cannot make the shared memory ", name_, ": ",
            std::strerror(errno));
    named_ = true;
    // Reserved, for memory that is not there when it is written to kills the process.
    const int error = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(segment_bytes()));
    if (error != 0) {
      unlink();
      throw Error(ErrorCode::kOutOfMemory, str("no room for ", segment_bytes(),
                                               " bytes of shared memory in /dev/shm: ", std::strerror(error),
                                               "; make it larger or start fewer ranks on a host"));
    }
    own_ = Mapping(fd.get(), segment_bytes(), name_);
    // New pages are zero, and so is every counter.
    Segment& s = own_.segment();
    s.magic = kMagic;
    s.ring_bytes = ring_bytes_;
    s.num_inboxes = static_cast<std::uint64_t>(context_.num_ranks);
    // Without it puts go as well: a limit on addresses (ulimit -v) is the one reason known.
    const auto memory = static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)) * kPage;
    const std::size_t put_bytes =
        std::min(memory, kHostPutAddresses / static_cast<std::size_t>(context_.num_ranks)) / kPage * kPage;
    try {
      Mapping mapping(fd.get(), put_bytes, name_, segment_bytes());
      const bool longer = ::ftruncate(fd.get(), static_cast<off_t>(segment_bytes() + put_bytes)) == 0;
      Require(longer, ErrorCode::kTransport, "it cannot be made longer: ", std::strerror(errno));
      put_memory_ = std::make_shared<MappedPutMemory>(std::move(fd), segment_bytes(), std::move(mapping));
    } catch (const Error& e) {
      log_debug("no put memory: ", e.message());
    }
  }
  void unlink() noexcept {
    if (named_) ::shm_unlink(name_.c_str());
    named_ = false;
  }

  void make_doorbell() {
    bell_ = net::Fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    own_doorbell_.sun_family = AF_UNIX;
    own_doorbell_bytes_ = sizeof own_doorbell_;
    // The system gives it a name of its own.
    const bool bound =
        bell_.valid() &&
        ::bind(bell_.get(), reinterpret_cast<const sockaddr*>(&own_doorbell_), sizeof(sa_family_t)) == 0 &&
        ::getsockname(bell_.get(), reinterpret_cast<sockaddr*>(&own_doorbell_), &own_doorbell_bytes_) == 0;
    Require(bound, ErrorCode::kTransport, "cannot make a doorbell socket: ", std::strerror(errno));
  }

  void ring_doorbell(Link& link) {
    std::atomic<std::uint32_t>& sleeping = link.theirs.segment().sleeping;
    std::atomic_thread_fence(std::memory_order_seq_cst);  // what was published before comes before the look
    if (sleeping.load(std::memory_order_relaxed) == 0 || sleeping.exchange(0, std::memory_order_relaxed) == 0)
      return;
    const char ring = 1;
    // A full socket has rung already; a peer that is gone does not matter.
    (void)::sendto(bell_.get(), &ring, 1, MSG_DONTWAIT | MSG_NOSIGNAL,
                   reinterpret_cast<const sockaddr*>(&link.doorbell), link.doorbell_bytes);
  }

  static int read_peer(const Link& link, void* to, std::uint64_t from, std::size_t bytes) {
    const iovec own{to, bytes};
    const iovec theirs{reinterpret_cast<void*>(static_cast<std::uintptr_t>(from)), bytes};
    const ssize_t n = ::process_vm_readv(link.pid, &own, 1, &theirs, 1, 0);
    return n == static_cast<ssize_t>(bytes) ? 0 : n < 0 ? errno : EFAULT;
  }

  void break_off(Link& link, const std::string& what) {
    link.broken = true;
    landing_.broken(link.peer, what);
  }

  std::uint32_t num_pieces(std::int64_t bytes) const {
    const auto piece = static_cast<std::int64_t>(piece_bytes_);
    return static_cast<std::uint32_t>((bytes + piece - 1) / piece);
  }
  std::size_t bytes_of_piece(std::int64_t bytes, std::uint32_t piece) const {
    const auto from = static_cast<std::int64_t>(piece) * static_cast<std::int64_t>(piece_bytes_);
    return static_cast<std::size_t>(std::min(bytes - from, static_cast<std::int64_t>(piece_bytes_)));
  }

  // ---- out

  // Room in the peer's ring for a record with so much behind it, in one piece; null: not now.
  std::byte* reserve(Link& link, std::size_t payload_bytes) {
    const std::size_t need = sizeof(Record) + padded(payload_bytes);
    const std::uint64_t head = link.out->head.load(std::memory_order_acquire);
    const std::uint64_t used = link.out_tail - head;
    if (head > link.out_tail || used > ring_bytes_) {
      break_off(link, "has read more than was written into shared memory");
      return nullptr;
    }
    const std::size_t at = static_cast<std::size_t>(link.out_tail % ring_bytes_);
    const std::size_t to_end = ring_bytes_ - at;
    const std::size_t skip = need > to_end ? to_end : 0;
    if (need + skip > ring_bytes_ - used) return nullptr;
    if (skip > 0) {
      Record record{};
      record.kind = Record::kSkip;
      record.payload_bytes = static_cast<std::uint32_t>(skip - sizeof(Record));
      std::memcpy(link.out_ring + at, &record, sizeof record);
      link.out_tail += skip;
    }
    return link.out_ring + link.out_tail % ring_bytes_;
  }
  void publish(Link& link, std::size_t payload_bytes) {
    link.out_tail += sizeof(Record) + padded(payload_bytes);
    link.out->tail.store(link.out_tail, std::memory_order_release);
  }

  bool send(Link& link) {
    if (link.broken) return false;
    bool moved = false;
    // Landed large puts.
    const std::uint64_t landed = link.out->num_large_landed.load(std::memory_order_acquire);
    if (landed > link.num_large) {
      break_off(link, "counts more puts than there were");
      return false;
    }
    while (!link.large.empty() && link.large.front().number < landed) {
      landing_.sent(link.peer, link.large.front().channel);
      link.large.pop_front();
      if (link.staging > 0) --link.staging;
      moved = true;
    }
    while (!link.queue.empty()) {
      const Put& put = link.queue.front();
      const bool small = put.source.size() <= std::min(kMaxSmallBytes, piece_bytes_);
      if (!small && link.large.size() >= kMaxLarge) break;
      const std::size_t payload = small ? put.source.size() : 0;
      std::byte* at = reserve(link, payload);
      if (at == nullptr) break;
      Record record{};
      record.kind = small ? Record::kSmall : Record::kLarge;
      record.payload_bytes = static_cast<std::uint32_t>(payload);
      record.channel = put.channel;
      record.window = put.window;
      record.signal = put.signal;
      record.offset_bytes = put.offset_bytes;
      record.bytes = static_cast<std::int64_t>(put.source.size());
      if (!small) {
        record.address = reinterpret_cast<std::uintptr_t>(put.source.data());
        record.place = put_memory_ ? put_memory_->place_of(put.source) : kNotThere;
        record.number = link.num_large;
        link.out->next_piece[link.num_large % kMaxLarge].store(0, std::memory_order_relaxed);
        link.large.push_back({.source = put.source,
                              .in_put_memory = record.place != kNotThere,
                              .channel = put.channel,
                              .num_pieces = num_pieces(record.bytes),
                              .number = link.num_large++});
      }
      std::memcpy(at, &record, sizeof record);
      if (payload > 0) std::memcpy(at + sizeof record, put.source.data(), payload);
      publish(link, payload);
      if (small) landing_.sent(link.peer, put.channel);
      link.queue.pop_front();
      moved = true;
    }
    while (link.staging < link.large.size() && !link.broken) {
      const LargeOut& out = link.large[link.staging];
      if (out.in_put_memory && link.out->is_mapped.load(std::memory_order_relaxed) != 0) {
        ++link.staging;  // the peer copies all of it
        continue;
      }
      std::byte* at = reserve(link, piece_bytes_);
      if (at == nullptr) break;
      std::atomic<std::uint32_t>& next = link.out->next_piece[out.number % kMaxLarge];
      const std::uint32_t piece = next.load(std::memory_order_relaxed) < out.num_pieces
                                      ? next.fetch_add(1, std::memory_order_relaxed)
                                      : out.num_pieces;
      if (piece >= out.num_pieces) {
        ++link.staging;
        continue;
      }
      const std::size_t bytes = bytes_of_piece(static_cast<std::int64_t>(out.source.size()), piece);
      Record record{};
      record.kind = Record::kPiece;
      record.payload_bytes = static_cast<std::uint32_t>(bytes);
      record.piece = piece;
      record.number = out.number;
      std::memcpy(at, &record, sizeof record);
      std::memcpy(at + sizeof record, out.source.data() + piece * piece_bytes_, bytes);
      publish(link, bytes);
      ring_doorbell(link);  // the peer copies this one out while the next goes in
      moved = true;
    }
    return moved;
  }

  // ---- in

  bool has_work(const Link& link) const {
    if (!link.stalled && link.in->tail.load(std::memory_order_seq_cst) != link.in_head) return true;
    if (claimable(link) < link.open.size()) return true;
    if (link.large.empty() && link.queue.empty()) return false;
    if (link.out->num_large_landed.load(std::memory_order_seq_cst) > link.num_large - link.large.size())
      return true;
    const bool waits_for_room =
        (!link.queue.empty() && link.large.size() < kMaxLarge) || link.staging < link.large.size();
    return waits_for_room && ring_bytes_ - (link.out_tail - link.out->head.load(std::memory_order_seq_cst)) >=
                                 2 * (sizeof(Record) + std::max(piece_bytes_, kMaxSmallBytes));
  }

  // The first arrival that this side can read and that has a piece nobody has claimed; one past the end: none.
  static std::size_t claimable(const Link& link) {
    std::size_t i = 0;
    while (i < link.open.size() && ((!link.may_read && link.open[i].mapped == nullptr) ||
                                    link.in->next_piece[link.open[i].number % kMaxLarge].load(
                                        std::memory_order_relaxed) >= link.open[i].num_pieces))
      ++i;
    return i;
  }

  bool receive(Link& link) {
    bool moved = false;
    std::int64_t burst = 0;
    while (!link.broken && !link.stalled && burst < kBurstBytes && !stopped()) {
      const std::uint64_t tail = link.in->tail.load(std::memory_order_acquire);
      if (tail == link.in_head) break;
      Record record;
      std::memcpy(&record, link.in_ring + link.in_head % ring_bytes_, sizeof record);
      const std::uint64_t used = tail - link.in_head;
      const std::size_t size = sizeof record + padded(record.payload_bytes);
      if (tail < link.in_head || used > ring_bytes_ || used % kLine != 0 || size > used ||
          size > ring_bytes_ - link.in_head % ring_bytes_) {
        break_off(link, "wrote nonsense into shared memory");
        break;
      }
      const std::byte* payload = link.in_ring + link.in_head % ring_bytes_ + sizeof record;
      if (!take(link, record, payload)) break;
      burst += static_cast<std::int64_t>(size);
      link.in_head += size;
      link.in->head.store(link.in_head, std::memory_order_release);
      moved = true;
    }
    if (moved || link.broken || stopped()) return moved;
    return pull(link);
  }

  // False: it stays at the head of the ring, or the link is broken.
  bool take(Link& link, const Record& record, const std::byte* payload) {
    switch (record.kind) {
      case Record::kSkip:
        return true;
      case Record::kSmall:
      case Record::kLarge: {
        const bool small = record.kind == Record::kSmall;
        if (record.bytes < 0 || record.offset_bytes < 0 || record.bytes > (std::int64_t{1} << 44) ||
            (small && record.bytes != record.payload_bytes) ||
            (!small &&
             (record.bytes == 0 || record.payload_bytes != 0 || record.number != link.num_large_in ||
              link.num_large_in - link.num_large_landed >= kMaxLarge ||
              (record.place != kNotThere && link.their_put_memory.valid() &&
               (record.place > link.their_put_memory.size() ||
                static_cast<std::uint64_t>(record.bytes) > link.their_put_memory.size() - record.place)))) ||
            record.channel >= wire::kMaxChannels || record.signal >= wire::kMaxSignals) {
          break_off(link, "announced a put in shared memory that makes no sense");
          return false;
        }
        Open open;
        open.arrival = {link.peer,     record.channel,      record.window,
                        record.signal, record.offset_bytes, record.bytes};
        switch (landing_.place(open.arrival, open.to)) {
          case Landing::Place::kThere:
            break;
          case Landing::Place::kLater:
            link.stalled = true;
            return false;
          case Landing::Place::kRefused:
            return false;
        }
        if (small) {
          if (record.payload_bytes > 0) std::memcpy(open.to, payload, record.payload_bytes);
        } else {
          open.address = record.address;
          if (record.place != kNotThere && link.their_put_memory.valid())
            open.mapped = link.their_put_memory.data() + record.place;
          open.number = link.num_large_in++;
          open.num_pieces = open.num_left = num_pieces(record.bytes);
        }
        link.open.push_back(open);
        finish(link);
        return true;
      }
      case Record::kPiece: {
        const auto found = std::find_if(link.open.begin(), link.open.end(), [&](const Open& o) {
          return o.num_pieces > 0 && o.number == record.number;
        });
        if (found == link.open.end() || record.piece >= found->num_pieces || found->num_left == 0 ||
            record.payload_bytes != bytes_of_piece(found->arrival.bytes, record.piece)) {
          break_off(link, "wrote a piece into shared memory that belongs to no put");
          return false;
        }
        if (found->to != nullptr)
          std::memcpy(found->to + record.piece * piece_bytes_, payload, record.payload_bytes);
        --found->num_left;
        finish(link);
        return true;
      }
      default:
        break_off(link, "wrote a record into shared memory that is none");
        return false;
    }
  }

  // Copies pieces straight from the sender.
  bool pull(Link& link) {
    bool moved = false;
    for (std::size_t cost = 0; cost < kPullBytes && !link.broken && !stopped();) {
      const std::size_t found = claimable(link);
      if (found == link.open.size()) break;
      moved = true;
      Open& open = link.open[found];
      const bool is_mapped = open.mapped != nullptr;
      const std::uint32_t most = is_mapped ? kMappedPieces : 1;
      const std::uint32_t piece =
          link.in->next_piece[open.number % kMaxLarge].fetch_add(most, std::memory_order_relaxed);
      if (piece >= open.num_pieces) continue;
      const std::uint32_t pieces = std::min(most, open.num_pieces - piece);
      if (pieces > open.num_left) {
        break_off(link, "has pieces of a put in shared memory claimed twice");
        break;
      }
      const std::size_t begin = piece * piece_bytes_;
      const std::size_t bytes =
          (pieces - 1) * piece_bytes_ + bytes_of_piece(open.arrival.bytes, piece + pieces - 1);
      // What the sender may be staging is looked for sooner.
      cost += is_mapped ? bytes : bytes * kMappedPieces;
      if (open.to != nullptr) {
        int error = 0;
        if (is_mapped)
          std::memcpy(open.to + begin, open.mapped + begin, bytes);
        else
          error = read_peer(link, open.to + begin, open.address + begin, bytes);
        // A source may be freed once its owner has stopped: what was read then is nothing.
        const bool has_stopped = link.theirs.segment().stopped.load(std::memory_order_seq_cst) != 0;
        if (error != 0 || has_stopped) {
          link.broken = true;
          landing_.lost(link.peer,
                        has_stopped ? "it has left the group" : str("its memory: ", std::strerror(error)));
          break;
        }
      }
      open.num_left -= pieces;
      finish(link);
    }
    return moved;
  }

  // Tells of arrivals in the order in which they were put.
  void finish(Link& link) {
    while (!link.open.empty() && link.open.front().num_left == 0) {
      const Open open = link.open.front();
      link.open.pop_front();
      landing_.landed(open.arrival);
      if (open.num_pieces > 0)
        link.in->num_large_landed.store(++link.num_large_landed, std::memory_order_release);
    }
  }

  const PathContext context_;
  Landing& landing_;
  const std::size_t ring_bytes_;
  const std::size_t piece_bytes_;
  std::array<std::byte, 16> probe_;
  std::vector<Link> links_;  // [num_ranks]
  std::string name_;
  bool named_ = false;
  Mapping own_;
  std::shared_ptr<MappedPutMemory> put_memory_;  // null: there is none
  net::Fd bell_;
  sockaddr_un own_doorbell_{};
  socklen_t own_doorbell_bytes_ = 0;
  std::atomic<bool> stopped_{false};
};

}  // namespace

std::unique_ptr<DataPath> make_shm_path(const PathContext& context) {
  return std::make_unique<ShmPath>(context);
}

}  // namespace sluice::comm
