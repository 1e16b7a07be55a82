// Puts over TCP. A put is a header and its bytes, gathered into one system call from where they lie; an arrival is read
// straight into its place in the window, through the buffer only where a message is small or where it begins.
//
// One connection to each peer for data alone, so that what the watchdog says never queues behind rows. It is read only
// as far as the rank is ready: an arrival without a place stops its connection, and TCP's window stops the sender.
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <thread>

#include "sluice/comm/data_path.hpp"

namespace sluice::comm {
namespace {

constexpr std::size_t kBufferBytes = 16 << 10;
constexpr std::int64_t kBurstBytes = 8 << 20;  // of one peer before the others have their turn
constexpr int kMaxEvents = 64;
constexpr std::size_t kMaxParts = 64;  // of one sendmsg

struct Outgoing {
  std::array<std::byte, wire::kDataHeaderBytes> header;
  std::span<const std::byte> source;
  std::uint32_t channel = 0;
  std::size_t sent = 0;  // of header and source together
};

struct Link {
  net::Fd fd;
  std::int32_t peer = -1;
  bool closed = false;

  // sending
  std::deque<Outgoing> queue;
  bool wants_out = false;  // EPOLLOUT is asked for

  // receiving
  std::vector<std::byte> buffer;  // [kBufferBytes]; begin..end is unread
  std::size_t begin = 0, end = 0;
  bool in_body = false;
  bool stalled = false;  // an arrival has no place yet
  Arrival arrival;
  std::byte* to = nullptr;  // of the body; null: it is thrown away, for its window was taken back
  std::int64_t left = 0;    // of the body
};

class TcpPath final : public DataPath {
 public:
  explicit TcpPath(const PathContext& context)
      : landing_(*context.landing),
        links_(static_cast<std::size_t>(context.num_ranks)),
        epoll_(epoll_create1(EPOLL_CLOEXEC)) {
    Require(epoll_.valid(), ErrorCode::kTransport, "epoll_create1 failed: ", std::strerror(errno));
  }

  std::string_view name() const override { return "tcp"; }
  std::string card() override { return {}; }
  bool wants_socket() const override { return true; }

  void connect(std::span<const std::int32_t> peers, std::span<const std::string>, std::span<net::Fd> sockets,
               Clock::time_point) override {
    for (const std::int32_t r : peers) {
      Link& link = links_[static_cast<std::size_t>(r)];
      link.fd = std::move(sockets[static_cast<std::size_t>(r)]);
      link.peer = r;
      link.buffer.resize(kBufferBytes);
      const int on = 1;
      setsockopt(link.fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      epoll_event event{.events = EPOLLIN, .data = {.ptr = &link}};
      const bool added = epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, link.fd.get(), &event) == 0;
      Require(added, ErrorCode::kTransport, "epoll_ctl failed: ", std::strerror(errno));
    }
  }

  void put(const Put& put) override {
    if (stopped_.load(std::memory_order_relaxed)) return;
    Link& link = links_[put.peer.index()];
    Outgoing& out = link.queue.emplace_back();
    wire::encode({.channel = put.channel,
                  .window = put.window,
                  .signal = put.signal,
                  .offset_bytes = put.offset_bytes,
                  .bytes = static_cast<std::int64_t>(put.source.size())},
                 out.header);
    out.source = put.source;
    out.channel = put.channel;
    if (link.queue.size() == 1) send_some(link);
  }

  bool progress() override {
    if (stopped_.load(std::memory_order_relaxed)) return false;
    epoll_event events[kMaxEvents];
    const int n = epoll_wait(epoll_.get(), events, kMaxEvents, 0);
    bool moved = false;
    for (int i = 0; i < n; ++i) {
      Link& link = *static_cast<Link*>(events[i].data.ptr);
      if (events[i].events & EPOLLOUT) moved = send_some(link) || moved;
      if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) moved = receive(link) || moved;
      if (stopped_.load(std::memory_order_relaxed)) return false;
    }
    return moved;
  }

  void retry() override {
    if (num_stalled_ == 0 || stopped_.load(std::memory_order_relaxed)) return;
    for (Link& link : links_)
      if (link.stalled) {
        parse(link);
        if (!link.stalled) watch(link);
      }
  }

  void forget(std::span<std::byte> memory) override {
    for (Link& link : links_)
      if (link.in_body && link.to != nullptr && link.to + link.left > memory.data() &&
          link.to < memory.data() + memory.size())
        link.to = nullptr;
  }

  bool prepare_sleep(std::vector<pollfd>& fds) override {
    fds.push_back({.fd = epoll_.get(), .events = POLLIN, .revents = 0});
    return true;
  }

  void stop() noexcept override { stopped_.store(true, std::memory_order_relaxed); }

  bool drain(Clock::time_point deadline) override {
    // With the system is not yet with the peer: closing a connection that has unread bytes throws the unsent away.
    const auto left = [](const Link& link) {
      int bytes = 0;
      return !link.closed && link.fd.valid() &&
             (!link.queue.empty() || (ioctl(link.fd.get(), SIOCOUTQ, &bytes) == 0 && bytes > 0));
    };
    while (std::any_of(links_.begin(), links_.end(), left)) {
      if (Clock::now() >= deadline || stopped_.load(std::memory_order_relaxed)) return false;
      if (!progress()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return true;
  }

 private:
  void watch(Link& link) {
    if (link.closed) return;
    epoll_event event{.events = (link.stalled ? 0u : static_cast<std::uint32_t>(EPOLLIN)) |
                                (link.wants_out ? static_cast<std::uint32_t>(EPOLLOUT) : 0u),
                      .data = {.ptr = &link}};
    epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, link.fd.get(), &event);
  }

  void close(Link& link, const std::string& why) {
    if (link.closed) return;
    link.closed = true;
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, link.fd.get(), nullptr);
    landing_.lost(link.peer, why);
  }

  bool send_some(Link& link) {
    if (link.closed) return false;
    std::int64_t burst = 0;
    while (!link.queue.empty() && burst < kBurstBytes) {
      iovec parts[kMaxParts];
      std::size_t num_parts = 0;
      for (auto out = link.queue.begin(); out != link.queue.end() && num_parts + 2 <= kMaxParts; ++out) {
        std::size_t skip = out->sent;
        if (skip < out->header.size()) {
          parts[num_parts++] = {out->header.data() + skip, out->header.size() - skip};
          skip = 0;
        } else {
          skip -= out->header.size();
        }
        // writev reads its parts only; its type has no const.
        if (skip < out->source.size())
          parts[num_parts++] = {const_cast<std::byte*>(out->source.data()) + skip, out->source.size() - skip};
      }
      msghdr message{};
      message.msg_iov = parts;
      message.msg_iovlen = num_parts;
      ssize_t n = ::sendmsg(link.fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN || errno == EWOULDBLOCK) break;
        close(link, std::strerror(errno));
        return false;
      }
      burst += n;
      while (n > 0 && !link.queue.empty()) {
        Outgoing& out = link.queue.front();
        const std::size_t total = out.header.size() + out.source.size();
        const std::size_t step = std::min(static_cast<std::size_t>(n), total - out.sent);
        out.sent += step;
        n -= static_cast<ssize_t>(step);
        if (out.sent < total) break;
        landing_.sent(link.peer, out.channel);
        link.queue.pop_front();
      }
    }
    if (link.queue.empty() == link.wants_out) {
      link.wants_out = !link.queue.empty();
      watch(link);
    }
    return burst > 0;
  }

  bool receive(Link& link) {
    if (link.closed || link.stalled) return false;
    std::int64_t burst = 0;
    while (burst < kBurstBytes && !link.stalled) {
      // The rest of a body, and behind it what follows.
      iovec parts[2];
      int num_parts = 0;
      const bool direct = link.in_body && link.to != nullptr;
      const auto body = direct ? static_cast<std::size_t>(link.left) : 0;
      if (direct) parts[num_parts++] = {link.to, body};
      if (link.begin == link.end) link.begin = link.end = 0;
      parts[num_parts++] = {link.buffer.data() + link.end, link.buffer.size() - link.end};
      const std::size_t room = body + link.buffer.size() - link.end;
      const ssize_t n = ::readv(link.fd.get(), parts, num_parts);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN || errno == EWOULDBLOCK) break;
        close(link, std::strerror(errno));
        return burst > 0;
      }
      if (n == 0) {
        close(link, "its data connection was closed");
        return burst > 0;
      }
      burst += n;
      const auto got = static_cast<std::size_t>(n);
      if (direct) {
        const std::size_t step = std::min(got, body);
        link.to += step;
        link.left -= static_cast<std::int64_t>(step);
        link.end += got - step;
        if (link.left == 0) finish(link);
      } else {
        link.end += got;
      }
      parse(link);
      if (stopped_.load(std::memory_order_relaxed)) return true;
      if (got < room) break;  // the system had no more
    }
    if (link.stalled) watch(link);
    return burst > 0;
  }

  // Takes what is in the buffer.
  void parse(Link& link) {
    if (link.stalled) {
      link.stalled = false;
      --num_stalled_;
      if (!begin_body(link)) return;
    }
    while (link.begin < link.end) {
      if (link.in_body) {
        const std::size_t step = std::min(link.end - link.begin, static_cast<std::size_t>(link.left));
        if (link.to != nullptr) {
          std::memcpy(link.to, link.buffer.data() + link.begin, step);
          link.to += step;
        }
        link.begin += step;
        link.left -= static_cast<std::int64_t>(step);
        if (link.left == 0) finish(link);
        continue;
      }
      if (link.end - link.begin < wire::kDataHeaderBytes) {
        std::memmove(link.buffer.data(), link.buffer.data() + link.begin, link.end - link.begin);
        link.end -= link.begin;
        link.begin = 0;
        return;
      }
      const auto header = wire::parse_data_header(std::span<const std::byte, wire::kDataHeaderBytes>(
          link.buffer.data() + link.begin, wire::kDataHeaderBytes));
      if (!header) {
        landing_.broken(link.peer, "sent bytes that are no header of a put");
        return;
      }
      link.begin += wire::kDataHeaderBytes;
      link.arrival = {.peer = link.peer,
                      .channel = header->channel,
                      .window = header->window,
                      .signal = header->signal,
                      .offset_bytes = header->offset_bytes,
                      .bytes = header->bytes};
      if (!begin_body(link)) return;
    }
  }

  // False when nothing more may be read now.
  bool begin_body(Link& link) {
    switch (landing_.place(link.arrival, link.to)) {
      case Landing::Place::kThere:
        break;
      case Landing::Place::kLater:
        link.stalled = true;
        ++num_stalled_;
        return false;
      case Landing::Place::kRefused:
        return false;
    }
    link.in_body = true;
    link.left = link.arrival.bytes;
    if (link.left == 0) finish(link);
    return true;
  }

  void finish(Link& link) {
    link.in_body = false;
    landing_.landed(link.arrival);
  }

  Landing& landing_;
  std::vector<Link> links_;  // [num_ranks]
  net::Fd epoll_;
  std::atomic<bool> stopped_{false};
  int num_stalled_ = 0;
};

}  // namespace

std::unique_ptr<DataPath> make_tcp_path(const PathContext& context) {
  return std::make_unique<TcpPath>(context);
}

}  // namespace sluice::comm
