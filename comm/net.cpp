#include "sluice/comm/net.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/buffer.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <deque>
#include <list>
#include <thread>
#include <utility>

#include "sluice/base/log.hpp"

namespace sluice::comm::net {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr nanoseconds kRedial = milliseconds(20);
constexpr nanoseconds kDrainTime = std::chrono::seconds(1);

std::string address_text(const sockaddr_storage& address, socklen_t size) {
  char host[NI_MAXHOST] = "?";
  getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host, sizeof host, nullptr, 0,
              NI_NUMERICHOST);
  std::string out = host;
  if (out.starts_with("::ffff:")) out.erase(0, 7);
  return out;
}

void set_no_delay(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// ---- blocking calls with a deadline, on a socket that does not block

// Waits for `events`; false when the deadline passes.
bool wait_for(int fd, short events, Clock::time_point deadline) {
  while (true) {
    const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return false;
    pollfd p{.fd = fd, .events = events, .revents = 0};
    const int n = poll(&p, 1, static_cast<int>(std::min<std::int64_t>(left, 1000)));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) return true;  // the call that follows reports it
  }
}

void write_all(int fd, std::span<const std::byte> data, Clock::time_point deadline, const std::string& whom) {
  while (!data.empty()) {
    const ssize_t n = ::send(fd, data.data(), data.size(), MSG_NOSIGNAL);
    if (n > 0) {
      data = data.subspan(static_cast<std::size_t>(n));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      Require(wait_for(fd, POLLOUT, deadline), ErrorCode::kTimeout, whom,
              " took nothing in time; look whether it runs");
    } else if (errno != EINTR) {
      throw Error(ErrorCode::kTransport, str("the connection to ", whom, " broke: ", std::strerror(errno)));
    }
  }
}

// False: the other side closed before the first byte.
bool read_all(int fd, std::span<std::byte> data, Clock::time_point deadline, const std::string& whom) {
  bool first = true;
  while (!data.empty()) {
    const ssize_t n = ::recv(fd, data.data(), data.size(), 0);
    if (n > 0) {
      data = data.subspan(static_cast<std::size_t>(n));
      first = false;
    } else if (n == 0) {
      if (first) return false;
      throw Error(ErrorCode::kTransport, str(whom, " closed the connection in the middle of a message"));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      Require(wait_for(fd, POLLIN, deadline), ErrorCode::kTimeout, whom, " did not answer in time");
    } else if (errno != EINTR) {
      throw Error(ErrorCode::kTransport, str("the connection to ", whom, " broke: ", std::strerror(errno)));
    }
  }
  return true;
}

// One try to connect; an invalid Fd and `why` when nobody is there.
Fd connect_once(const DialOptions& o, std::string& why) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int rc = getaddrinfo(o.host.c_str(), std::to_string(o.port).c_str(), &hints, &found);
  if (rc != 0) {
    why = gai_strerror(rc);
    return {};
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    Fd fd(::socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd.valid()) {
      why = std::strerror(errno);
      continue;
    }
    if (::connect(fd.get(), a->ai_addr, a->ai_addrlen) != 0) {
      if (errno != EINPROGRESS) {
        why = std::strerror(errno);
        continue;
      }
      const Clock::time_point patience =
          std::min(o.deadline, Clock::now() + std::chrono::seconds(2));  // a lost packet is sent again
      if (!wait_for(fd.get(), POLLOUT, patience)) {
        why = "no answer";
        continue;
      }
      int error = 0;
      socklen_t size = sizeof error;
      getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) {
        why = std::strerror(error);
        continue;
      }
    }
    set_no_delay(fd.get());
    return fd;
  }
  return {};
}

// ---- a connection on a loop

class StreamConnection final : public Connection, public std::enable_shared_from_this<StreamConnection> {
 public:
  StreamConnection(asio::io_context& context, Fd fd, std::size_t max_frame_bytes)
      : context_(context), socket_(context), drain_(context), max_frame_bytes_(max_frame_bytes) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size);
    socket_.assign(address.ss_family == AF_INET6 ? tcp::v6() : tcp::v4(), fd.release());
  }

  void start(std::function<void(std::span<const std::byte>)> on_frame,
             std::function<void(const std::string&)> on_closed) override {
    asio::post(context_, [self = shared_from_this(), on_frame = std::move(on_frame),
                          on_closed = std::move(on_closed)]() mutable {
      if (self->closed_) return;
      self->on_frame_ = std::move(on_frame);
      self->on_closed_ = std::move(on_closed);
      if (!std::exchange(self->reading_, true)) self->read_length();
    });
  }

  void send(wire::Bytes body) override {
    num_queued_.fetch_add(1);
    asio::post(context_, [self = shared_from_this(), body = std::move(body)]() mutable {
      if (self->closed_ || self->closing_) {
        self->num_queued_.fetch_sub(1);
        return;
      }
      const auto length = static_cast<std::uint32_t>(body.size());
      wire::Bytes frame(sizeof length + body.size());
      std::memcpy(frame.data(), &length, sizeof length);
      if (!body.empty()) std::memcpy(frame.data() + sizeof length, body.data(), body.size());
      self->queue_.push_back(std::move(frame));
      if (self->queue_.size() == 1) self->write_next();
    });
  }

  void close() override {
    asio::post(context_, [self = shared_from_this()] {
      self->on_frame_ = nullptr;
      self->on_closed_ = nullptr;
      if (self->closed_) return;
      self->closing_ = true;
      if (self->queue_.empty()) {
        self->shut();
        return;
      }
      self->drain_.expires_after(kDrainTime);
      self->drain_.async_wait([self](error_code) { self->shut(); });
    });
  }

  std::size_t num_queued() const override { return num_queued_.load(); }

 private:
  void read_length() {
    asio::async_read(socket_, asio::buffer(&length_, sizeof length_),
                     [self = shared_from_this()](error_code error, std::size_t) {
                       if (self->closed_) return;  // what had completed before the close comes after it
                       if (error) return self->fail(error.message());
                       if (self->length_ > self->max_frame_bytes_)
                         return self->fail(str("a message of ", self->length_,
                                               " bytes is beyond the bound of ", self->max_frame_bytes_));
                       self->body_.resize(self->length_);
                       self->read_body();
                     });
  }
  void read_body() {
    asio::async_read(socket_, asio::buffer(body_.data(), body_.size()),
                     [self = shared_from_this()](error_code error, std::size_t) {
                       if (self->closed_) return;  // what had completed before the close comes after it
                       if (error) return self->fail(error.message());
                       if (self->on_frame_) {
                         // The handler may close the connection, which takes the handlers away later on this thread.
                         self->on_frame_(self->body_);
                       }
                       if (!self->closed_) self->read_length();
                     });
  }
  void write_next() {
    asio::async_write(socket_, asio::buffer(queue_.front().data(), queue_.front().size()),
                      [self = shared_from_this()](error_code error, std::size_t) {
                        if (self->closed_) return;
                        if (error) return self->fail(error.message());
                        self->queue_.pop_front();
                        self->num_queued_.fetch_sub(1);
                        if (!self->queue_.empty())
                          self->write_next();
                        else if (self->closing_)
                          self->shut();
                      });
  }
  void fail(const std::string& why) {
    if (closed_) return;
    const auto on_closed = std::move(on_closed_);
    shut();
    if (on_closed) on_closed(why);
  }
  void shut() {
    if (closed_) return;
    closed_ = true;
    error_code ignored;
    drain_.cancel(ignored);
    socket_.shutdown(tcp::socket::shutdown_both, ignored);
    socket_.close(ignored);
    num_queued_.fetch_sub(queue_.size());
    queue_.clear();
    on_frame_ = nullptr;
    on_closed_ = nullptr;
  }

  asio::io_context& context_;
  tcp::socket socket_;
  asio::steady_timer drain_;
  std::size_t max_frame_bytes_;
  std::function<void(std::span<const std::byte>)> on_frame_;
  std::function<void(const std::string&)> on_closed_;
  std::uint32_t length_ = 0;
  wire::Bytes body_;
  std::deque<wire::Bytes> queue_;
  std::atomic<std::size_t> num_queued_{0};
  bool reading_ = false;
  bool closing_ = false;
  bool closed_ = false;
};

}  // namespace

void Fd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

// ---- Loop

struct Loop::State {
  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  std::thread thread;
};

Loop::Loop() : state_(std::make_unique<State>()) {
  state_->thread = std::thread([s = state_.get()] {
    while (true) {
      try {
        s->context.run();
        return;
      } catch (const std::exception& e) {
        // A handler ran out of memory or the like: that message is lost, its rank is found out by its silence.
        log_error("control thread: ", e.what());
      }
    }
  });
}

Loop::~Loop() {
  stop();
}

void Loop::stop() {
  state_->context.stop();
  if (state_->thread.joinable()) state_->thread.join();
}

void Loop::post(std::function<void()> work) {
  asio::post(state_->context, std::move(work));
}

void Loop::after(nanoseconds span, std::function<void()> work) {
  auto timer = std::make_shared<asio::steady_timer>(state_->context, span);
  timer->async_wait([timer, work = std::move(work)](error_code error) {
    if (!error) work();
  });
}

std::shared_ptr<Connection> Loop::adopt(Fd fd, std::size_t max_frame_bytes) {
  return std::make_shared<StreamConnection>(state_->context, std::move(fd), max_frame_bytes);
}

// ---- Listener

struct Listener::State : std::enable_shared_from_this<Listener::State> {
  State(asio::io_context& context, ListenOptions o)
      : options(std::move(o)), acceptor(context), pause(context) {}

  // A stranger until it has answered the challenge.
  struct Pending {
    Pending(tcp::socket s) : socket(std::move(s)), timer(socket.get_executor()) {}
    tcp::socket socket;
    asio::steady_timer timer;
    wire::ServerHello challenge;
    wire::Bytes out;
    std::array<std::byte, wire::kClientHelloBytes> in{};
    std::string peer;
    void drop() {
      error_code ignored;
      timer.cancel(ignored);
      socket.close(ignored);
    }
  };

  void accept() {
    acceptor.async_accept([self = shared_from_this()](error_code error, tcp::socket socket) {
      if (!self->acceptor.is_open()) return;
      if (error) {
        // Out of descriptors, say: let some go before trying again.
        self->pause.expires_after(milliseconds(50));
        self->pause.async_wait([self](error_code stopped) {
          if (!stopped) self->accept();
        });
        return;
      }
      self->challenge(std::move(socket));
      self->accept();
    });
  }

  void challenge(tcp::socket socket) {
    if (pending.size() >= kMaxPending) {
      pending.front()->drop();
      pending.pop_front();
    }
    auto p = std::make_shared<Pending>(std::move(socket));
    pending.push_back(p);
    error_code ignored;
    const auto remote = p->socket.remote_endpoint(ignored);
    p->peer = str(remote.address().to_string(ignored), ":", remote.port());
    set_no_delay(p->socket.native_handle());
    p->timer.expires_after(kHandshakeTime);
    p->timer.async_wait([self = shared_from_this(), p](error_code stopped) {
      if (!stopped) self->refuse(p, "no answer to the challenge");
    });
    p->challenge.nonce = random_nonce();
    p->out = encode(p->challenge);
    asio::async_write(p->socket, asio::buffer(p->out), [](error_code, std::size_t) {});
    asio::async_read(p->socket, asio::buffer(p->in),
                     [self = shared_from_this(), p](error_code error, std::size_t) {
                       if (!error) return self->judge(p);
                       self->pending.remove(p);
                       p->drop();
                     });
  }

  void judge(const std::shared_ptr<Pending>& p) {
    const auto hello = wire::parse_client_hello(p->in);
    if (!hello) return refuse(p, "its bytes are no message of this version of Sluice");
    wire::ServerReply reply;
    if (!equal(hello->mac, client_mac(*options.secret, *hello, p->challenge.nonce)))
      reply.verdict = hello->job != options.job ? wire::Verdict::kStaleJob : wire::Verdict::kWrongSecret;
    else if (hello->job != options.job)
      reply.verdict = wire::Verdict::kStaleJob;
    else
      reply.verdict = options.admit(*hello);
    if (reply.verdict == wire::Verdict::kWelcome)
      reply.mac = server_mac(*options.secret, *hello, p->challenge.nonce);
    p->out = encode(reply);
    asio::async_write(p->socket, asio::buffer(p->out),
                      [self = shared_from_this(), p, hello = *hello, verdict = reply.verdict](
                          error_code error, std::size_t) {
                        if (error || verdict != wire::Verdict::kWelcome)
                          return self->refuse(p, error ? error.message() : std::string(describe(verdict)));
                        self->pending.remove(p);
                        error_code ignored;
                        p->timer.cancel(ignored);
                        const int fd = p->socket.release(ignored);
                        if (fd < 0) return;
                        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
                        self->options.accepted(hello, Fd(fd), p->peer);
                      });
  }

  void refuse(const std::shared_ptr<Pending>& p, const std::string& why) {
    pending.remove(p);
    p->drop();
    // A flood must not fill the log.
    if (++num_refused <= kMaxRefusalsLogged)
      log_info("refused a connection from ", p->peer, ": ", why,
               num_refused == kMaxRefusalsLogged ? "; further ones are not reported" : "");
  }

  void stop() {
    error_code ignored;
    acceptor.close(ignored);
    pause.cancel(ignored);
    for (const auto& p : pending) p->drop();
    pending.clear();
  }

  static constexpr int kMaxRefusalsLogged = 8;
  ListenOptions options;
  tcp::acceptor acceptor;
  asio::steady_timer pause;
  std::list<std::shared_ptr<Pending>> pending;
  int num_refused = 0;
};

Listener::Listener(Loop& loop, ListenOptions options) : loop_(loop) {
  asio::io_context& context = loop.state().context;
  state_ = std::make_shared<State>(context, std::move(options));
  const ListenOptions& o = state_->options;
  error_code error;
  tcp::resolver resolver(context);
  const auto found = resolver.resolve(o.address, std::to_string(o.port), tcp::resolver::passive, error);
  const std::string where = str(o.address, ":", o.port);
  Require(!error && !found.empty(), ErrorCode::kTransport, "cannot listen on ", where, ": ", error.message(),
          "; give an address of this host");
  const tcp::endpoint at = found.begin()->endpoint();
  auto& acceptor = state_->acceptor;
  acceptor.open(at.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor.bind(at, error);
  if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
  Require(!error, ErrorCode::kTransport, "cannot listen on ", where, ": ", error.message(),
          "; choose another port, or an address of this host");
  fcntl(acceptor.native_handle(), F_SETFD, FD_CLOEXEC);
  loop.post([state = state_] { state->accept(); });
}

Listener::~Listener() {
  loop_.post([state = state_] { state->stop(); });
}

std::uint16_t Listener::port() const {
  return state_->acceptor.local_endpoint().port();
}

// ---- the dialling side

Fd dial(const DialOptions& o) {
  const std::string whom = str(o.to_whom, " at ", o.host, ":", o.port);
  std::string why = "nobody listens there";
  Fd fd;
  while (true) {
    fd = connect_once(o, why);
    if (fd.valid()) {
      try {
        std::array<std::byte, wire::kServerHelloBytes> in{};
        const Clock::time_point until = std::min(o.deadline, Clock::now() + kHandshakeTime);
        if (read_all(fd.get(), in, until, whom)) {
          const auto challenge = wire::parse_server_hello(in);
          Require(
              challenge.has_value(), ErrorCode::kTransport, whom,
              " does not speak this version of Sluice; another program listens there, or another version");
          wire::ClientHello hello{.job = o.job, .purpose = o.purpose, .rank = o.rank, .epoch = o.epoch};
          hello.nonce = random_nonce();
          hello.mac = client_mac(*o.secret, hello, challenge->nonce);
          write_all(fd.get(), encode(hello), until, whom);
          std::array<std::byte, wire::kServerReplyBytes> answer{};
          if (read_all(fd.get(), answer, until, whom)) {
            const auto reply = wire::parse_server_reply(answer);
            Require(reply.has_value(), ErrorCode::kTransport, whom, " answers nonsense");
            Require(reply->verdict == wire::Verdict::kWelcome, ErrorCode::kDisagreement, whom,
                    " refused rank ", o.rank, ": ", describe(reply->verdict));
            Require(equal(reply->mac, server_mac(*o.secret, hello, challenge->nonce)),
                    ErrorCode::kDisagreement, whom,
                    " does not know the job's secret; another job or an impostor listens there");
            return fd;
          }
        }
        why = "it closed the connection before it had let this rank in";
      } catch (const Error& e) {
        if (e.code() == ErrorCode::kDisagreement || Clock::now() >= o.deadline || !o.retry) throw;
        why = e.message();
      }
    }
    const bool over = Clock::now() + kRedial >= o.deadline;
    Require(!over, ErrorCode::kTimeout, "rank ", o.rank, " cannot reach ", whom, ": ", why,
            "; see that it runs, and that the address and the network between are right");
    Require(o.retry, ErrorCode::kTransport, "rank ", o.rank, " cannot reach ", whom, ": ", why);
    std::this_thread::sleep_for(kRedial);
  }
}

std::string own_address(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  const bool known = getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  Require(known, ErrorCode::kTransport, "getsockname failed: ", std::strerror(errno));
  return address_text(address, size);
}

bool is_loopback(const std::string& host) {
  if (host == "localhost") return true;
  error_code error;
  const auto address = asio::ip::make_address(host, error);
  return !error && address.is_loopback();
}

HostPort parse_host_port(const std::string& text, std::string_view where) {
  const std::size_t colon = text.rfind(':');
  HostPort out;
  unsigned port = 0;
  bool valid = colon != std::string::npos && colon > 0;
  if (valid) {
    const char* end = text.data() + text.size();
    const auto [at, ec] = std::from_chars(text.data() + colon + 1, end, port);
    valid = ec == std::errc{} && at == end && port <= 65535;
  }
  Require(valid, ErrorCode::kInvalidConfig, where, " is \"", text.substr(0, 80),
          "\"; must be HOST:PORT with a port in 0..65535");
  out.host = text.substr(0, colon);
  if (out.host.size() > 2 && out.host.front() == '[' && out.host.back() == ']')
    out.host = out.host.substr(1, out.host.size() - 2);
  out.port = static_cast<std::uint16_t>(port);
  return out;
}

void send_frame(int fd, const wire::Bytes& body, Clock::time_point deadline, const std::string& to_whom) {
  const auto length = static_cast<std::uint32_t>(body.size());
  wire::Bytes out(sizeof length + body.size());
  std::memcpy(out.data(), &length, sizeof length);
  if (!body.empty()) std::memcpy(out.data() + sizeof length, body.data(), body.size());
  write_all(fd, out, deadline, to_whom);
}

wire::Bytes read_frame(int fd, std::size_t max_bytes, Clock::time_point deadline,
                       const std::string& from_whom) {
  std::uint32_t length = 0;
  Require(read_all(fd, std::as_writable_bytes(std::span(&length, 1)), deadline, from_whom),
          ErrorCode::kPeerLost, from_whom, " closed the connection; read its own error first");
  Require(length <= max_bytes, ErrorCode::kTransport, from_whom, " announces a message of ", length,
          " bytes, beyond the bound of ", max_bytes);
  wire::Bytes body(length);
  Require(length == 0 || read_all(fd, body, deadline, from_whom), ErrorCode::kPeerLost, from_whom,
          " closed the connection; read its own error first");
  return body;
}

}  // namespace sluice::comm::net
