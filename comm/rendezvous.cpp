#include "sluice/comm/rendezvous.hpp"

#include <algorithm>

#include "sluice/comm/watchdog.hpp"

namespace sluice::comm {
namespace {

using std::chrono::milliseconds;

constexpr std::size_t kMaxGroups = 4096;
constexpr std::size_t kMaxKeys = 8 * wire::kMaxRanks;  // of a group
constexpr std::size_t kMaxStoredBytes = std::size_t{256} << 20;
// What a reply may lag behind a gather's own deadline.
constexpr std::chrono::nanoseconds kReplyGrace = std::chrono::seconds(2);

}  // namespace

// Everything happens on the loop's thread.
struct RendezvousServer::State : std::enable_shared_from_this<State> {
  State(net::Loop& l, const Options& o) : loop(l), options(o) {}

  struct Member {
    std::shared_ptr<net::Connection> connection;
    std::string who;
    bool joined = false;
    bool left = false;
    bool lost = false;
  };
  struct Gather {
    std::uint64_t id = 0;
    std::int32_t rank = 0;
    std::string prefix;
    std::uint32_t count = 0;
  };
  // One group of the job.
  struct Group {
    std::map<std::int32_t, Member> members;
    std::map<std::string, std::string> values;
    std::size_t stored_bytes = 0;
    std::vector<Gather> gathers;
  };

  wire::Verdict admit(const wire::ClientHello& hello) const {
    const auto group = groups.find(hello.epoch);
    const bool is_new = group == groups.end();
    if (hello.purpose != wire::Purpose::kRendezvous || hello.rank >= options.num_ranks ||
        (is_new && groups.size() >= kMaxGroups) || (!is_new && group->second.members.contains(hello.rank)))
      return wire::Verdict::kNotExpected;
    return wire::Verdict::kWelcome;
  }

  void accepted(const wire::ClientHello& hello, net::Fd fd) {
    Group& g = groups[hello.epoch];
    if (g.members.contains(hello.rank)) return;  // twice at once: the first one stays
    Member& m = g.members[hello.rank];
    m.connection = loop.adopt(std::move(fd), wire::kMaxRequestBytes);
    const std::int32_t rank = hello.rank;
    const std::uint32_t epoch = hello.epoch;
    // The server lives as long as its connections' handlers can run.
    m.connection->start([this, epoch, rank](std::span<const std::byte> body) { handle(epoch, rank, body); },
                        [this, epoch, rank](const std::string&) { gone(epoch, rank); });
  }

  static std::string name(const Group& g, std::int32_t rank) {
    const auto m = g.members.find(rank);
    return m == g.members.end() || m->second.who.empty() ? str("rank ", rank)
                                                         : str("rank ", rank, " (", m->second.who, ")");
  }

  static void reply(Group& g, std::int32_t rank, const wire::Reply& r) {
    g.members[rank].connection->send(encode(r));
  }
  static void fail(Group& g, std::int32_t rank, ErrorCode code, std::string text) {
    reply(g, rank, {.kind = wire::Reply::Kind::kFailed, .values = {}, .code = code, .text = std::move(text)});
  }

  void handle(std::uint32_t epoch, std::int32_t rank, std::span<const std::byte> body) {
    Group& g = groups[epoch];
    auto request = wire::parse_request(body);
    Member& m = g.members[rank];
    const bool in_turn = request && (request->kind == wire::Request::Kind::kJoin) != m.joined;
    if (!in_turn) {
      m.connection->close();
      gone(epoch, rank);
      return;
    }
    switch (request->kind) {
      case wire::Request::Kind::kJoin:
        m.joined = true;
        m.who = request->text;
        if (request->count != static_cast<std::uint32_t>(options.num_ranks))
          return fail(
              g, rank, ErrorCode::kInvalidConfig,
              str("rank ", rank, " is configured for ", request->count, " ranks, but ", options.num_ranks,
                  " were started; start as many as the configuration names, or leave topology out"));
        return reply(g, rank, {});
      case wire::Request::Kind::kPut:
        if (g.values.size() >= kMaxKeys || g.stored_bytes + request->value.size() > kMaxStoredBytes)
          return fail(g, rank, ErrorCode::kNotSupported, "the rendezvous holds as much as it may");
        g.stored_bytes += request->value.size();
        g.values[request->text] = std::move(request->value);
        reply(g, rank, {});
        return serve_gathers(g);
      case wire::Request::Kind::kGather: {
        const std::uint64_t id = next_gather++;
        g.gathers.push_back({id, rank, request->text, request->count});
        loop.after(milliseconds(request->timeout_ms), [self = shared_from_this(), epoch, id] {
          const auto group = self->groups.find(epoch);
          if (group != self->groups.end()) self->give_up(group->second, id);
        });
        return serve_gathers(g);
      }
      case wire::Request::Kind::kLeave:
        m.left = true;
        if (g.members.size() == static_cast<std::size_t>(options.num_ranks) &&
            std::all_of(g.members.begin(), g.members.end(), [](const auto& e) { return e.second.left; })) {
          // The group stands without us. Its values go; the members stay, so that nobody comes twice.
          g.values.clear();
          g.stored_bytes = 0;
        }
        return;
    }
  }

  void serve_gathers(Group& group) {
    const std::string lost = lost_text(group);
    std::erase_if(group.gathers, [&](const Gather& g) {
      wire::Reply out{.kind = wire::Reply::Kind::kValues, .values = {}, .code = ErrorCode::kOk, .text = {}};
      for (std::uint32_t i = 0; i < g.count; ++i) {
        const auto found = group.values.find(str(g.prefix, i));
        if (found == group.values.end()) break;
        out.values.push_back(found->second);
      }
      if (out.values.size() == g.count) {
        reply(group, g.rank, out);
        return true;
      }
      if (lost.empty()) return false;
      fail(group, g.rank, ErrorCode::kPeerLost, lost);
      return true;
    });
  }

  void give_up(Group& group, std::uint64_t id) {
    const auto found =
        std::find_if(group.gathers.begin(), group.gathers.end(), [&](const Gather& g) { return g.id == id; });
    if (found == group.gathers.end()) return;
    std::vector<RankId> absent;
    std::string late;
    for (std::uint32_t i = 0; i < found->count; ++i) {
      if (group.values.contains(str(found->prefix, i))) continue;
      const auto rank = static_cast<std::int32_t>(i);
      if (group.members.contains(rank))
        late += str(late.empty() ? "" : ", ", name(group, rank));
      else
        absent.push_back(RankId(rank));
    }
    std::string text = str("the rendezvous of ", options.num_ranks, " ranks is not complete in time: ");
    if (!absent.empty())
      text += str(list_ranks(absent), " never came; see that ", absent.size() == 1 ? "it runs" : "they run",
                  " and can reach this address");
    if (!late.empty()) text += str(absent.empty() ? "" : "; ", late, " came but did not go on; look there");
    fail(group, found->rank, ErrorCode::kTimeout, text);
    group.gathers.erase(found);
  }

  void gone(std::uint32_t epoch, std::int32_t rank) {
    Group& g = groups[epoch];
    Member& m = g.members[rank];
    if (m.left) return;
    m.lost = true;
    serve_gathers(g);
  }

  static std::string lost_text(const Group& g) {
    for (const auto& [rank, m] : g.members)
      if (m.lost) return str(name(g, rank), " left during the rendezvous; read its own error first");
    return {};
  }

  net::Loop& loop;
  const Options options;
  std::map<std::uint32_t, Group> groups;
  std::uint64_t next_gather = 0;
};

RendezvousServer::RendezvousServer(const Options& options, Secret secret)
    : secret_(std::move(secret)), state_(std::make_shared<State>(loop_, options)) {
  net::ListenOptions listen;
  listen.address = options.address;
  listen.port = options.port;
  listen.secret = &secret_;
  listen.job = options.job;
  listen.admit = [state = state_.get()](const wire::ClientHello& hello) { return state->admit(hello); };
  listen.accepted = [state = state_.get()](const wire::ClientHello& hello, net::Fd fd, const std::string&) {
    state->accepted(hello, std::move(fd));
  };
  listener_ = std::make_unique<net::Listener>(loop_, std::move(listen));
}

RendezvousServer::~RendezvousServer() {
  loop_.stop();
  listener_.reset();
  state_.reset();  // its connections belong to the loop, which must still be there
}

std::uint16_t RendezvousServer::port() const {
  return listener_->port();
}

Rendezvous::Rendezvous(const Options& o, const Secret& secret)
    : num_ranks_(o.num_ranks), server_(str("the rendezvous at ", o.host, ":", o.port)) {
  fd_ = net::dial({.host = o.host,
                   .port = o.port,
                   .secret = &secret,
                   .job = o.job,
                   .purpose = wire::Purpose::kRendezvous,
                   .rank = o.rank,
                   .epoch = o.group,
                   .deadline = o.deadline,
                   .retry = o.retry,
                   .to_whom = "the rendezvous"});
  ask({.kind = wire::Request::Kind::kJoin,
       .text = o.who,
       .value = {},
       .count = static_cast<std::uint32_t>(o.num_ranks),
       .timeout_ms = 0},
      o.deadline);
}

wire::Reply Rendezvous::ask(const wire::Request& request, Clock::time_point deadline) {
  net::send_frame(fd_.get(), encode(request), deadline, server_);
  const auto reply =
      wire::parse_reply(net::read_frame(fd_.get(), wire::kMaxReplyBytes, deadline + kReplyGrace, server_));
  Require(reply.has_value(), ErrorCode::kTransport, server_, " answers nonsense");
  if (reply->kind == wire::Reply::Kind::kFailed) throw Error(reply->code, reply->text);
  return *reply;
}

void Rendezvous::put(const std::string& key, std::string value, Clock::time_point deadline) {
  Require(key.size() <= wire::kMaxKeyBytes && value.size() <= wire::kMaxValueBytes,
          ErrorCode::kInvalidArgument, "key ", key.substr(0, 80), " with ", value.size(),
          " bytes is too large for the rendezvous, which takes ", wire::kMaxValueBytes);
  ask({.kind = wire::Request::Kind::kPut,
       .text = key,
       .value = std::move(value),
       .count = 0,
       .timeout_ms = 0},
      deadline);
}

std::vector<std::string> Rendezvous::gather(const std::string& prefix, Clock::time_point deadline) {
  const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now()).count();
  wire::Reply reply =
      ask({.kind = wire::Request::Kind::kGather,
           .text = prefix,
           .value = {},
           .count = static_cast<std::uint32_t>(num_ranks_),
           .timeout_ms = static_cast<std::uint32_t>(std::clamp<std::int64_t>(left, 0, 86400000))},
          deadline);
  Require(
      reply.kind == wire::Reply::Kind::kValues && reply.values.size() == static_cast<std::size_t>(num_ranks_),
      ErrorCode::kTransport, server_, " answered with ", reply.values.size(), " values, expected ",
      num_ranks_);
  return std::move(reply.values);
}

void Rendezvous::leave() noexcept {
  try {
    net::send_frame(
        fd_.get(),
        encode(wire::Request{
            .kind = wire::Request::Kind::kLeave, .text = {}, .value = {}, .count = 0, .timeout_ms = 0}),
        Clock::now() + milliseconds(200), server_);
  } catch (...) {
    // The server is gone already.
  }
}

}  // namespace sluice::comm
