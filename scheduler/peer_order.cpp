#include "sluice/scheduler/peer_order.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>

#include "sluice/base/error.hpp"

namespace sluice {
namespace {

constexpr std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

class Matrix {
 public:
  Matrix(std::span<const double> values, std::int32_t n) : values_(values.begin(), values.end()), n_(at(n)) {
    for (std::size_t i = 0; i < n_; ++i) values_[i * n_ + i] = 0;
  }
  double& operator()(std::size_t from, std::size_t to) { return values_[from * n_ + to]; }
  double operator()(std::size_t from, std::size_t to) const { return values_[from * n_ + to]; }
  std::size_t size() const { return n_; }

 private:
  std::vector<double> values_;
  std::size_t n_;
};

using Orders = std::vector<std::vector<std::int32_t>>;

// Senders and receivers as they get free, each pair the most loaded one that can go.
Orders open_shop(const Matrix& bytes) {
  const std::size_t n = bytes.size();
  Matrix left = bytes;
  std::vector<double> out_left(n, 0), in_left(n, 0), out_free(n, 0), in_free(n, 0);
  for (std::size_t s = 0; s < n; ++s)
    for (std::size_t d = 0; d < n; ++d) {
      out_left[s] += left(s, d);
      in_left[d] += left(s, d);
    }
  Orders orders(n);
  std::vector<double> times = {0};  // a heap of the times at which somebody gets free
  while (!times.empty()) {
    std::pop_heap(times.begin(), times.end(), std::greater<>{});
    const double now = times.back();
    times.pop_back();
    while (true) {
      double most = 0;
      std::size_t from = 0, to = 0;
      for (std::size_t s = 0; s < n; ++s) {
        if (out_free[s] > now) continue;
        for (std::size_t d = 0; d < n; ++d) {
          if (in_free[d] > now || !(left(s, d) > 0)) continue;
          // The busier end decides; of equal ones the longer message.
          const double weight = std::max(out_left[s], in_left[d]) + 1e-6 * left(s, d);
          if (weight > most) {
            most = weight;
            from = s;
            to = d;
          }
        }
      }
      if (!(most > 0)) break;
      const double size = left(from, to);
      orders[from].push_back(static_cast<std::int32_t>(to));
      out_left[from] -= size;
      in_left[to] -= size;
      left(from, to) = 0;
      out_free[from] = in_free[to] = now + size;
      times.push_back(now + size);
      std::push_heap(times.begin(), times.end(), std::greater<>{});
    }
  }
  return orders;
}

// A matching of most pairs among those with at least `least` left (Kuhn's augmenting paths); match[d] is its sender.
std::size_t match(const Matrix& left, double least, std::vector<std::int32_t>& sender_of) {
  const std::size_t n = left.size();
  sender_of.assign(n, -1);
  std::vector<char> seen(n);
  const auto augment = [&](auto&& self, std::size_t s) -> bool {
    for (std::size_t d = 0; d < n; ++d) {
      if (seen[d] || !(left(s, d) >= least) || !(left(s, d) > 0)) continue;
      seen[d] = 1;
      if (sender_of[d] < 0 || self(self, at(sender_of[d]))) {
        sender_of[d] = static_cast<std::int32_t>(s);
        return true;
      }
    }
    return false;
  };
  std::size_t pairs = 0;
  for (std::size_t s = 0; s < n; ++s) {
    std::fill(seen.begin(), seen.end(), 0);
    pairs += augment(augment, s) ? 1 : 0;
  }
  return pairs;
}

Orders rounds(const Matrix& bytes) {
  const std::size_t n = bytes.size();
  Matrix left = bytes;
  Orders orders(n);
  std::vector<std::int32_t> sender_of, best;
  while (true) {
    const std::size_t most = match(left, 0, best);
    if (most == 0) return orders;
    // The largest threshold at which as many pairs are matched.
    std::vector<double> values;
    for (std::size_t s = 0; s < n; ++s)
      for (std::size_t d = 0; d < n; ++d)
        if (left(s, d) > 0) values.push_back(left(s, d));
    std::sort(values.begin(), values.end());
    std::size_t lo = 0, hi = values.size() - 1;
    while (lo < hi) {
      const std::size_t mid = lo + (hi - lo + 1) / 2;
      if (match(left, values[mid], sender_of) == most) {
        lo = mid;
      } else {
        hi = mid - 1;
      }
    }
    match(left, values[lo], best);
    for (std::size_t d = 0; d < n; ++d) {
      if (best[d] < 0) continue;
      // A message goes whole, in the round in which it begins.
      orders[at(best[d])].push_back(static_cast<std::int32_t>(d));
      left(at(best[d]), d) = 0;
    }
  }
}

}  // namespace

std::string_view to_string(PeerOrder order) noexcept {
  switch (order) {
#define SLUICE_X(name, text) \
  case PeerOrder::name:      \
    return text;
    SLUICE_PEER_ORDER_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return "unknown order";
}

std::vector<std::vector<std::int32_t>> peer_orders(PeerOrder order, std::span<const double> bytes,
                                                   std::int32_t num_ranks) {
  Require(num_ranks >= 1 && bytes.size() == at(num_ranks) * at(num_ranks), ErrorCode::kInvalidArgument,
          "a matrix of ", bytes.size(), " entries is not one of ", num_ranks, " ranks");
  for (const double b : bytes)
    Require(b >= 0 && b < std::numeric_limits<double>::infinity(), ErrorCode::kInvalidArgument,
            "a matrix of bytes has the entry ", b);
  const Matrix m(bytes, num_ranks);
  const std::size_t n = m.size();
  Orders orders(n);
  if (order == PeerOrder::kOpenShop) orders = open_shop(m);
  if (order == PeerOrder::kRounds) orders = rounds(m);
  for (std::size_t s = 0; s < n; ++s) {
    std::vector<char> there(n, 0);
    there[s] = 1;
    for (const std::int32_t d : orders[s]) there[at(d)] = 1;
    const std::size_t first = orders[s].size();
    for (std::size_t k = 1; k < n; ++k)
      if (!there[(s + k) % n]) orders[s].push_back(static_cast<std::int32_t>((s + k) % n));
    if (order == PeerOrder::kLongestFirst)
      std::stable_sort(orders[s].begin() + static_cast<std::ptrdiff_t>(first), orders[s].end(),
                       [&](std::int32_t a, std::int32_t b) { return m(s, at(a)) > m(s, at(b)); });
  }
  return orders;
}

double completion(std::span<const double> bytes, const std::vector<std::vector<std::int32_t>>& orders,
                  bool blocking) {
  const std::size_t n = orders.size();
  Require(bytes.size() == n * n, ErrorCode::kInvalidArgument, "a matrix of ", bytes.size(),
          " entries is not one of ", n, " ranks");
  struct Event {
    double time;
    std::size_t from, to;
    bool operator>(const Event& o) const { return time != o.time ? time > o.time : from > o.from; }
  };
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events;
  std::vector<std::size_t> next(n, 0);
  // The sender's next message with bytes; its receiver, or n.
  const auto receiver = [&](std::size_t s) {
    while (next[s] < orders[s].size() && !(bytes[s * n + at(orders[s][next[s]])] > 0)) ++next[s];
    return next[s] < orders[s].size() ? at(orders[s][next[s]]) : n;
  };
  double last = 0;
  if (!blocking) {
    std::vector<double> in_free(n, 0);
    for (std::size_t s = 0; s < n; ++s)
      if (const std::size_t d = receiver(s); d < n) events.push({0, s, d});
    while (!events.empty()) {
      const Event e = events.top();  // departs
      events.pop();
      const double held = bytes[e.from * n + e.to];
      in_free[e.to] = std::max(in_free[e.to], e.time) + held;
      last = std::max(last, in_free[e.to]);
      ++next[e.from];
      if (const std::size_t d = receiver(e.from); d < n) events.push({e.time + held, e.from, d});
    }
    return last;
  }
  std::vector<std::queue<std::size_t>> asking(n);
  std::vector<char> busy(n, 0);
  const auto start = [&](std::size_t s, std::size_t d, double now) {
    busy[d] = 1;
    events.push({now + bytes[s * n + d], s, d});
  };
  const auto ask = [&](std::size_t s, double now) {
    const std::size_t d = receiver(s);
    if (d == n) return;
    if (busy[d]) {
      asking[d].push(s);
    } else {
      start(s, d, now);
    }
  };
  for (std::size_t s = 0; s < n; ++s) ask(s, 0);
  while (!events.empty()) {
    const Event e = events.top();  // is there
    events.pop();
    last = std::max(last, e.time);
    busy[e.to] = 0;
    if (!asking[e.to].empty()) {
      const std::size_t s = asking[e.to].front();
      asking[e.to].pop();
      start(s, e.to, e.time);
    }
    ++next[e.from];
    ask(e.from, e.time);
  }
  return last;
}

PeerOrder best_peer_order(std::span<const double> bytes, std::int32_t num_ranks, bool blocking) {
  PeerOrder best = PeerOrder::kRotation;
  double least = std::numeric_limits<double>::infinity();
  for (const PeerOrder order : {
#define SLUICE_X(name, text) PeerOrder::name,
           SLUICE_PEER_ORDER_LIST(SLUICE_X)
#undef SLUICE_X
       }) {
    const double t = completion(bytes, peer_orders(order, bytes, num_ranks), blocking);
    if (t < least) {
      least = t;
      best = order;
    }
  }
  return best;
}

std::vector<double> hop_rows(const PlanSummary& summary, std::int32_t hop) {
  const Topology exchange = summary.exchange() == Exchange::kGateway
                                ? summary.topology()
                                : Topology::uniform(summary.topology().num_ranks(), 1);
  const std::int32_t n = exchange.num_ranks();
  std::vector<double> out(at(n) * at(n), 0);
  for (std::int32_t s = 0; s < n; ++s) {
    const RankId source(s);
    if (hop == 1) {
      for (std::int32_t node = 0; node < exchange.num_nodes(); ++node)
        if (node != exchange.node_of(source).value)
          out[at(s) * at(n) + exchange.gateway(source, NodeId(node)).index()] +=
              summary.to_node(source, NodeId(node), 0, 1).rows;
      continue;
    }
    for (const std::int32_t d : exchange.ranks_of(exchange.node_of(source)))
      if (d != s)
        out[at(s) * at(n) + at(d)] =
            summary.to_rank(source, RankId(d), 0, 1).rows + summary.handed_on(source, RankId(d), 0, 1).rows;
  }
  return out;
}

void apply_peer_order(std::span<Template> templates, std::int32_t hop, PeerOrder order,
                      std::span<const double> bytes) {
  if (templates.empty()) return;
  const std::int32_t n = templates.front().num_ranks;
  const Orders puts = peer_orders(order, bytes, n);
  std::vector<double> back(bytes.size());
  for (std::size_t s = 0; s < at(n); ++s)
    for (std::size_t d = 0; d < at(n); ++d) back[d * at(n) + s] = bytes[s * at(n) + d];
  const Orders returns = peer_orders(order, back, n);
  for (Template& t : templates) {
    std::vector<std::int32_t> place(at(n), 0);
    for (PassTemplate* pass : {&t.forward, &t.backward}) {
      for (const OpKind kind : {OpKind::kPut, OpKind::kReturn}) {
        const auto& mine = (kind == OpKind::kPut ? puts : returns)[t.rank.index()];
        for (std::size_t i = 0; i < mine.size(); ++i) place[at(mine[i])] = static_cast<std::int32_t>(i);
        for (const bool handed_on : {false, true})
          for (std::int32_t c = 0; c < t.schedule.num_chunks; ++c) {
            std::vector<std::size_t> where;
            for (std::size_t i = 0; i < pass->ops.size(); ++i) {
              const Op& op = pass->ops[i];
              if (op.kind == kind && op.hop == hop && op.chunk == c && op.handed_on == handed_on)
                where.push_back(i);
            }
            // Nothing waits for a put, so it may change places freely.
            std::vector<Op> ops;
            for (const std::size_t i : where) ops.push_back(std::move(pass->ops[i]));
            std::stable_sort(ops.begin(), ops.end(),
                             [&](const Op& a, const Op& b) { return place[at(a.peer)] < place[at(b.peer)]; });
            for (std::size_t i = 0; i < where.size(); ++i) pass->ops[where[i]] = std::move(ops[i]);
          }
      }
    }
  }
}

}  // namespace sluice
