#include "sluice/runtime/src/pass_run.hpp"

#include <algorithm>
#include <cstring>

#include "sluice/base/telemetry.hpp"
#include "sluice/runtime/src/executor.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {

PassRun::PassRun(Runtime& runtime, const Template& shape, const Plan& plan, const PassFormat& format,
                 ContextStorage& storage, PassKind kind)
    : runtime_(runtime),
      transport_(runtime.transport()),
      kernels_(runtime.kernels()),
      shape_(shape),
      pass_(shape.pass(kind)),
      plan_(plan),
      format_(format),
      s_(storage),
      kind_(kind),
      backward_(kind == PassKind::kBackward),
      done_(storage.tables.done),
      send1_segment_(storage.tables.send1_segment),
      recv1_segment_(storage.tables.recv1_segment),
      send2_segment_(storage.tables.send2_segment),
      recv2_segment_(storage.tables.recv2_segment),
      expects_(storage.tables.expects) {
  done_.assign(pass_.ops.size(), 0);
}

PassRun::~PassRun() {
  runtime_.state().executor->remove(*this);
}

std::size_t PassRun::num_waits() const {
  std::size_t n = 0;
  for (const Op& op : pass_.ops) n += op.waits.size();
  return n;
}

template <typename List>
PassRun::Range PassRun::chunk_routes(const List& list, std::int32_t segment, std::int32_t chunk) const {
  if (segment < 0) return {};
  const auto at =
      static_cast<std::size_t>(segment) * (static_cast<std::size_t>(plan_.options.num_chunks) + 1) +
      static_cast<std::size_t>(chunk);
  return {list.chunk_route[at], list.chunk_route[at + 1]};
}

// ---- start -----------------------------------------------------------------------------------------------------------

void PassRun::start(ConstMatrixView in) {
  // Sources of the last pass on this channel must have left before their buffers are written again.
  transport_.wait_for_puts(s_.channel, s_.num_puts).throw_if_error();
  in_ = in;
  index_segments();
  size_buffers();
  if (in.dtype != format_.wire_dtype) {
    s_.rounded.resize(in.rows, in.cols, format_.wire_dtype);
    kernels_.convert_rows(in, s_.rounded.view());
    in_ = s_.rounded.view();
  }
  announce();
  runtime_.state().executor->add(*this);
}

void PassRun::index_segments() {
  const std::size_t num_sources = shape_.hop1_from.size() + 1;
  std::vector<std::int32_t>& source_index = s_.tables.source_index;
  source_index.assign(static_cast<std::size_t>(shape_.num_ranks), -1);
  source_index[plan_.rank.index()] = 0;
  for (std::size_t i = 0; i < shape_.hop1_from.size(); ++i)
    source_index[static_cast<std::size_t>(shape_.hop1_from[i])] = static_cast<std::int32_t>(i + 1);
  std::vector<std::int32_t>& member_index = s_.tables.member_index;
  member_index.assign(static_cast<std::size_t>(shape_.num_ranks), -1);
  for (std::size_t m = 0; m < shape_.members.size(); ++m)
    member_index[static_cast<std::size_t>(shape_.members[m])] = static_cast<std::int32_t>(m);

  send2_segment_.assign(shape_.members.size() * num_sources, -1);
  for (std::size_t i = 0; i < plan_.send2.segments.size(); ++i) {
    const Segment& seg = plan_.send2.segments[i];
    const auto m = static_cast<std::size_t>(member_index[static_cast<std::size_t>(seg.peer)]);
    const auto k = static_cast<std::size_t>(source_index[static_cast<std::size_t>(seg.source)]);
    send2_segment_[m * num_sources + k] = static_cast<std::int32_t>(i);
  }
  recv2_segment_.assign(static_cast<std::size_t>(shape_.num_ranks), -1);
  for (std::size_t i = 0; i < plan_.recv2.segments.size(); ++i)
    recv2_segment_[static_cast<std::size_t>(plan_.recv2.segments[i].source)] = static_cast<std::int32_t>(i);
  recv1_segment_.assign(shape_.hop1_from.size(), -1);
  for (std::size_t i = 0; i < plan_.recv1.segments.size(); ++i)
    recv1_segment_[static_cast<std::size_t>(
        source_index[static_cast<std::size_t>(plan_.recv1.segments[i].source)] - 1)] =
        static_cast<std::int32_t>(i);
  send1_segment_.assign(shape_.hop1_to.size(), -1);
  for (std::size_t i = 0; i < plan_.send1.segments.size(); ++i) {
    const auto it = std::find(shape_.hop1_to.begin(), shape_.hop1_to.end(), plan_.send1.segments[i].peer);
    send1_segment_[static_cast<std::size_t>(it - shape_.hop1_to.begin())] = static_cast<std::int32_t>(i);
  }
}

void PassRun::set_window(Window window, std::span<std::byte> memory) {
  std::span<std::byte>& known = s_.windows[window];
  if (known.data() == memory.data() && known.size() == memory.size()) return;
  transport_.set_window(s_.channel, window, memory);
  known = memory;
}

void PassRun::size_buffers() {
  const std::int64_t hidden = format_.hidden;
  const DType wire = format_.wire_dtype, combine = format_.combine_dtype;
  s_.send1.resize(plan_.send1.num_rows(), hidden, wire);
  s_.recv1.resize(plan_.recv1.num_rows(), hidden, wire);
  s_.send2.resize(plan_.send2.num_rows(), hidden, wire);
  RowBuffer& received2 = backward_ ? s_.recv_dy : s_.recv2;
  received2.resize(plan_.recv2.num_rows(), hidden, wire);
  s_.partial.resize(plan_.recv2.num_rows(), hidden, combine);
  s_.ret2.resize(plan_.send2.num_rows(), hidden, combine);
  s_.ret1.resize(plan_.recv1.num_rows(), hidden, combine);
  s_.home.resize(plan_.num_home_rows(), hidden, combine);
  set_window(kWindowRecv1, s_.recv1.bytes());
  set_window(backward_ ? kWindowRecvDy : kWindowRecv2, received2.bytes());
  set_window(kWindowRet2, s_.ret2.bytes());
  set_window(kWindowRet1, s_.home.bytes(plan_.num_own_partials, plan_.num_home_rows()));
  if (backward_) {
    s_.dw_received.resize(static_cast<std::size_t>(plan_.recv2.num_routes()));
    s_.dw_ret2.resize(static_cast<std::size_t>(plan_.send2.num_routes()));
    s_.dw_recv1.resize(static_cast<std::size_t>(plan_.recv1.num_routes()));
    s_.dw_home.resize(static_cast<std::size_t>(plan_.send1.num_routes()));
    set_window(kWindowDw2, std::as_writable_bytes(std::span<float>(s_.dw_ret2)));
    set_window(kWindowDw1, std::as_writable_bytes(std::span<float>(s_.dw_home)));
  }
}

void PassRun::expect(std::int32_t peer, SignalKind kind, std::int32_t chunk, Window window,
                     std::int64_t offset_bytes, std::int64_t bytes) {
  comm::Expect e;
  e.peer = RankId(peer);
  e.channel = s_.channel;
  e.window = window;
  e.offset_bytes = offset_bytes;
  e.bytes = bytes;
  e.signal = signal_index(shape_.num_ranks, plan_.options.num_chunks, kind_, kind, chunk);
  expects_.push_back(e);
}

// Everything that will come, in the order in which each peer sends it (template.cpp).
void PassRun::announce() {
  const std::int64_t row = s_.send2.row_bytes(), sum_row = s_.ret2.row_bytes();
  expects_.clear();
  for (const std::int32_t p : shape_.peers) {
    comm::Expect e;
    e.peer = RankId(p);
    e.channel = s_.channel;
    e.signal = ready_signal(RankId(p));
    e.window = kWindowRet2;
    expects_.push_back(e);
  }
  const Window window2 = backward_ ? kWindowRecvDy : kWindowRecv2;
  const auto expect_sums = [&](std::int32_t peer, SignalKind kind, std::int32_t c, const SendList& list,
                               std::int32_t segment, Window rows, Window routes) {
    const Range r = chunk_rows(list, segment, c);
    expect(peer, kind, c, rows, r.begin * sum_row, (r.end - r.begin) * sum_row);
    if (!backward_) return;
    const Range q = chunk_routes(list, segment, c);
    expect(peer, kind, c, routes, q.begin * std::int64_t{4}, (q.end - q.begin) * std::int64_t{4});
  };
  for (std::int32_t c = 0; c < plan_.options.num_chunks; ++c) {
    for (std::size_t k = 0; k < shape_.hop1_from.size(); ++k) {
      const Range r = chunk_rows(plan_.recv1, recv1_segment_[k], c);
      expect(shape_.hop1_from[k], SignalKind::kArrived1, c, kWindowRecv1, r.begin * row,
             (r.end - r.begin) * row);
    }
    for (std::size_t m = 0; m < shape_.members.size(); ++m) {
      const std::int32_t member = shape_.members[m];
      if (member == plan_.rank.value) continue;
      const bool in_node = runtime_.topology().same_node(plan_.rank, RankId(member));
      for (const std::int32_t source : shape_.sources_of_member[m]) {
        const Range r = chunk_rows(plan_.recv2, recv2_segment_[static_cast<std::size_t>(source)], c);
        expect(member, source == member && in_node ? SignalKind::kArrivedInNode : SignalKind::kArrivedAcross,
               c, window2, r.begin * row, (r.end - r.begin) * row);
      }
      for (std::size_t k = 0; k <= shape_.hop1_from.size(); ++k)
        expect_sums(member, k == 0 ? SignalKind::kReturnedOwn : SignalKind::kReturnedHandedOn, c, plan_.send2,
                    send2_segment(m, k), kWindowRet2, kWindowDw2);
    }
    for (std::size_t i = 0; i < shape_.hop1_to.size(); ++i)
      expect_sums(shape_.hop1_to[i], SignalKind::kReturned1, c, plan_.send1, send1_segment_[i], kWindowRet1,
                  kWindowDw1);
  }
  transport_.expect(expects_);
}

// ---- the loop --------------------------------------------------------------------------------------------------------

bool PassRun::may_run(std::size_t index) const {
  const Op& op = pass_.ops[index];
  if (done_[index] || (!work_ && phase_of(op.kind) != Phase::kDispatch)) return false;
  for (const CounterWait& w : op.waits) {
    if (w.completion) {
      if (!done_[w.index]) return false;
    } else if (transport_.signal(s_.channel, w.index) < s_.signal_base[w.index] + w.value) {
      return false;
    }
  }
  return true;
}

void PassRun::mark_done(std::size_t op) {
  done_[op] = 1;
  ++num_done_;
  while (first_open_ < done_.size() && done_[first_open_]) ++first_open_;
}

bool PassRun::step() {
  for (std::size_t i = first_open_; i < pass_.ops.size(); ++i) {
    if (!may_run(i)) continue;
    run_op(pass_.ops[i]);
    mark_done(i);
    return true;
  }
  return false;
}

bool PassRun::experts_done() const {
  for (std::size_t i = first_open_; i < pass_.ops.size(); ++i)
    if (!done_[i] && phase_of(pass_.ops[i].kind) == Phase::kExperts) return false;
  return true;
}

bool PassRun::post() {
  for (std::size_t i = first_open_; i < pass_.ops.size(); ++i) {
    if (pass_.ops[i].resource == Resource::kCompute || !may_run(i)) continue;
    run_op(pass_.ops[i]);
    mark_done(i);
    return true;
  }
  return false;
}

bool PassRun::add_pending(std::vector<comm::WaitSpec>& pending) const {
  bool any_may_run = false;
  for (std::size_t i = first_open_; i < pass_.ops.size(); ++i) {
    const Op& op = pass_.ops[i];
    if (done_[i] || (!work_ && phase_of(op.kind) != Phase::kDispatch)) continue;
    for (const CounterWait& w : op.waits)
      if (!w.completion && transport_.signal(s_.channel, w.index) < s_.signal_base[w.index] + w.value)
        pending.push_back(
            {s_.channel, w.index, s_.signal_base[w.index] + w.value, to_string(phase_of(op.kind)), op.chunk});
    any_may_run |= may_run(i);  // asked last: a signal that was there above is there now
  }
  return any_may_run;
}

void PassRun::set_work(ExpertWork& work, MatrixView out, std::span<float> dw) {
  work_ = &work;
  out_ = out;
  dw_ = dw;
}

void PassRun::close() {
  // A channel has room for the signals of all its layer's schedules; this one's come first.
  for (std::size_t i = 0; i < pass_.signal_totals.size(); ++i) s_.signal_base[i] += pass_.signal_totals[i];
}

void PassRun::run_dispatch() {
  std::size_t target = 0;
  for (const Op& op : pass_.ops) target += phase_of(op.kind) == Phase::kDispatch;
  runtime_.state().executor->run_while([&] { return num_done_ < target; });
  // The last rows from peers: what the first expert op waits for.
  for (const Op& op : pass_.ops)
    if (op.kind == OpKind::kExpertGemm1 || op.kind == OpKind::kExpertDgrad2)
      for (const CounterWait& w : op.waits)
        if (!w.completion)
          transport_
              .wait({s_.channel, w.index, s_.signal_base[w.index] + w.value, to_string(Phase::kDispatch),
                     op.chunk})
              .throw_if_error();
}

void PassRun::run_op(const Op& op) {
  // Where the backend knows when a put is on its link, that is the op's span; posting it is the host's work.
  const bool on_link = op.resource == Resource::kInNodeLink || op.resource == Resource::kAcrossNodesLink;
  const Resource busy = on_link && transport_.last_link_time() ? Resource::kHost : op.resource;
  const Span span(runtime_.recorder(), StaticText::promised(to_string(op.kind)),
                  StaticText::promised(to_string(busy)), op.chunk);
  std::optional<ComputeTurn> turn;
  if (op.resource == Resource::kCompute) turn.emplace(*runtime_.state().executor);
  switch (op.kind) {
    case OpKind::kReady:
      put(op, kWindowRet2, 0, {});
      break;
    case OpKind::kPack:
      pack(op);
      break;
    case OpKind::kPut:
      put_rows(op);
      break;
    case OpKind::kForward:
      hand_on(op);
      break;
    case OpKind::kReturn:
      send_back(op);
      break;
    case OpKind::kNodeReduce:
      node_reduce(op);
      break;
    case OpKind::kUnpack:
      unpack(op);
      break;
    case OpKind::kExpertGemm1:
    case OpKind::kExpertGemm2:
    case OpKind::kExpertDgrad2:
    case OpKind::kActivationBackward:
    case OpKind::kExpertDgrad1:
    case OpKind::kReduce:
    case OpKind::kWgrad:
      work_->run(op);
      break;
  }
}

void PassRun::put(const Op& op, Window window, std::int64_t offset_bytes, std::span<const std::byte> source) {
  comm::Put p;
  p.peer = RankId(op.peer);
  p.channel = s_.channel;
  p.window = window;
  p.offset_bytes = offset_bytes;
  p.source = source;
  p.signal = static_cast<std::uint32_t>(op.raises_signal);
  transport_.put(p);
  ++s_.num_puts;
  SpanRecorder* recorder = runtime_.recorder();
  if (!recorder || source.empty()) return;
  if (const auto time = transport_.last_link_time()) {
    const auto ns = [](Clock::time_point t) {
      return std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count();
    };
    recorder->record(StaticText::promised(to_string(op.kind)), StaticText::promised(to_string(op.resource)),
                     ns(time->begin), ns(time->end), op.chunk);
  }
}

// ---- ops -------------------------------------------------------------------------------------------------------------

void PassRun::pack(const Op& op) {
  if (op.hop == 1) {
    for (const std::int32_t segment : send1_segment_) {
      const Range r = chunk_rows(plan_.send1, segment, op.chunk);
      if (r.begin < r.end)
        kernels_.gather_rows(in_, {},
                             plan_.send1.row.span(static_cast<std::size_t>(r.begin),
                                                  static_cast<std::size_t>(r.end - r.begin)),
                             s_.send1.rows(r.begin, r.end));
    }
    return;
  }
  for (std::size_t m = 0; m < shape_.members.size(); ++m) {
    const bool here = shape_.members[m] == plan_.rank.value;  // no link: straight to where the experts read
    if (here != (op.hop == 0)) continue;
    const std::int32_t index = send2_segment(m, 0);
    const Range r = chunk_rows(plan_.send2, index, op.chunk);
    if (r.begin == r.end) continue;
    const Segment& seg = plan_.send2.segments[static_cast<std::size_t>(index)];
    const std::int32_t shift = seg.peer_row_begin - seg.row_begin;
    kernels_.gather_rows(
        in_, {},
        plan_.send2.row.span(static_cast<std::size_t>(r.begin), static_cast<std::size_t>(r.end - r.begin)),
        here ? received().rows(r.begin + shift, r.end + shift) : s_.send2.rows(r.begin, r.end));
  }
}

void PassRun::hand_on(const Op& op) {
  for (std::size_t m = 0; m < shape_.members.size(); ++m)
    for (std::size_t k = 1; k <= shape_.hop1_from.size(); ++k) {
      const std::int32_t index = send2_segment(m, k);
      const Range r = chunk_rows(plan_.send2, index, op.chunk);
      if (r.begin == r.end) continue;
      const Segment& seg = plan_.send2.segments[static_cast<std::size_t>(index)];
      const std::int32_t shift = seg.peer_row_begin - seg.row_begin;
      const bool here = seg.peer == plan_.rank.value;
      kernels_.gather_rows(
          in_, s_.recv1.view(),
          plan_.send2.row.span(static_cast<std::size_t>(r.begin), static_cast<std::size_t>(r.end - r.begin)),
          here ? received().rows(r.begin + shift, r.end + shift) : s_.send2.rows(r.begin, r.end));
    }
}

void PassRun::put_rows(const Op& op) {
  const auto put_segment = [&](const SendList& list, const RowBuffer& buffer, std::int32_t index,
                               Window window) {
    const Range r = chunk_rows(list, index, op.chunk);
    const std::int64_t shift = index < 0 ? 0
                                         : list.segments[static_cast<std::size_t>(index)].peer_row_begin -
                                               list.segments[static_cast<std::size_t>(index)].row_begin;
    put(op, window, (r.begin + shift) * buffer.row_bytes(), buffer.bytes(r.begin, r.end));
  };
  if (op.hop == 1) {
    const auto i = static_cast<std::size_t>(std::find(shape_.hop1_to.begin(), shape_.hop1_to.end(), op.peer) -
                                            shape_.hop1_to.begin());
    put_segment(plan_.send1, s_.send1, send1_segment_[i], kWindowRecv1);
    return;
  }
  const auto m = static_cast<std::size_t>(std::find(shape_.members.begin(), shape_.members.end(), op.peer) -
                                          shape_.members.begin());
  const Window window = backward_ ? kWindowRecvDy : kWindowRecv2;
  if (!op.handed_on) {
    put_segment(plan_.send2, s_.send2, send2_segment(m, 0), window);
  } else {
    for (std::size_t k = 1; k <= shape_.hop1_from.size(); ++k)
      put_segment(plan_.send2, s_.send2, send2_segment(m, k), window);
  }
}

void PassRun::reduce_rows(ConstMatrixView src, std::span<const std::int32_t> position,
                          std::span<const float> weight, const Op& op) {
  for_each_received(op, [&](const Segment& seg, std::int32_t, Range r) {
    kernels_.weighted_reduce(src,
                             plan_.recv2.route_ptr.span(static_cast<std::size_t>(r.begin),
                                                        static_cast<std::size_t>(r.end - r.begin) + 1),
                             position, weight, reduced_rows(seg, r));
  });
}

void PassRun::reduce_none(ConstMatrixView src, const Op& op) {
  for_each_received(op, [&](const Segment& seg, std::int32_t, Range r) {
    const ConstMatrixView rows(src.row(r.begin), src.dtype, r.end - r.begin, src.cols, src.row_stride);
    kernels_.convert_rows(rows, reduced_rows(seg, r));
  });
}

void PassRun::send_dw(std::span<const float> value, std::span<const std::int32_t> position, const Op& op) {
  for_each_received(op, [&](const Segment& seg, std::int32_t index, Range) {
    const Range q = chunk_routes(plan_.recv2, index, op.chunk);
    const bool here = seg.peer == plan_.rank.value;
    float* out = here ? s_.dw_ret2.data() + (seg.peer_route_begin - seg.route_begin) : s_.dw_received.data();
    for (std::int32_t i = q.begin; i < q.end; ++i)
      out[i] = value[static_cast<std::size_t>(position.empty() ? i : position[static_cast<std::size_t>(i)])];
  });
}

void PassRun::send_back(const Op& op) {
  const auto return_segment = [&](const ReceiveList& list, std::int32_t index, const RowBuffer& buffer,
                                  Window window, const GrowArray<float>& dw, Window dw_window) {
    const Segment none;
    const Segment& seg = index < 0 ? none : list.segments[static_cast<std::size_t>(index)];
    const Range r = chunk_rows(list, index, op.chunk);
    put(op, window, (r.begin + std::int64_t{seg.peer_row_begin} - seg.row_begin) * buffer.row_bytes(),
        buffer.bytes(r.begin, r.end));
    if (!backward_) return;
    const Range q = chunk_routes(list, index, op.chunk);
    put(op, dw_window, (q.begin + std::int64_t{seg.peer_route_begin} - seg.route_begin) * 4,
        std::as_bytes(dw.span(static_cast<std::size_t>(q.begin), static_cast<std::size_t>(q.end - q.begin))));
  };
  if (op.hop == 1) {
    const auto k = static_cast<std::size_t>(
        std::find(shape_.hop1_from.begin(), shape_.hop1_from.end(), op.peer) - shape_.hop1_from.begin());
    return_segment(plan_.recv1, recv1_segment_[k], s_.ret1, kWindowRet1, s_.dw_recv1, kWindowDw1);
    return;
  }
  const auto m = static_cast<std::size_t>(std::find(shape_.members.begin(), shape_.members.end(), op.peer) -
                                          shape_.members.begin());
  for (const std::int32_t source : shape_.sources_of_member[m])
    if ((source != op.peer) == op.handed_on)
      return_segment(plan_.recv2, recv2_segment_[static_cast<std::size_t>(source)], s_.partial, kWindowRet2,
                     s_.dw_received, kWindowDw2);
}

void PassRun::node_reduce(const Op& op) {
  const auto reduce = [&](std::int64_t first, std::int64_t count, MatrixView out) {
    if (count > 0)
      kernels_.weighted_reduce(
          s_.ret2.view(),
          plan_.partial_ptr.span(static_cast<std::size_t>(first), static_cast<std::size_t>(count) + 1),
          plan_.partial_position, {}, out);
  };
  if (op.handed_on) {
    for (const std::int32_t segment : recv1_segment_) {
      const Range r = chunk_rows(plan_.recv1, segment, op.chunk);
      reduce(plan_.num_own_partials + std::int64_t{r.begin}, r.end - r.begin, s_.ret1.rows(r.begin, r.end));
    }
  } else {
    const std::int64_t tokens = plan_.num_tokens;
    const auto t0 = static_cast<std::size_t>(chunk_begin(tokens, op.chunk, plan_.options.num_chunks));
    const auto t1 = static_cast<std::size_t>(chunk_begin(tokens, op.chunk + 1, plan_.options.num_chunks));
    const std::int32_t p0 = plan_.own_partial_ptr[t0], p1 = plan_.own_partial_ptr[t1];
    reduce(p0, p1 - p0, s_.home.rows(p0, p1));
  }
  if (!backward_) return;
  for (std::size_t i = 0; i < plan_.send2.segments.size(); ++i) {
    if ((plan_.send2.segments[i].source != plan_.rank.value) != op.handed_on) continue;
    const Range q = chunk_routes(plan_.send2, static_cast<std::int32_t>(i), op.chunk);
    for (std::int32_t j = q.begin; j < q.end; ++j) {
      const std::int32_t route = plan_.send2.route[static_cast<std::size_t>(j)];
      const float value = s_.dw_ret2[static_cast<std::size_t>(j)];
      if (op.handed_on) {
        s_.dw_recv1[static_cast<std::size_t>(route - plan_.num_routes)] = value;
      } else {
        dw_[static_cast<std::size_t>(route)] = value;
      }
    }
  }
}

void PassRun::unpack(const Op& op) {
  const std::int64_t tokens = plan_.num_tokens;
  const std::int64_t t0 = chunk_begin(tokens, op.chunk, plan_.options.num_chunks);
  const std::int64_t t1 = chunk_begin(tokens, op.chunk + 1, plan_.options.num_chunks);
  if (t0 < t1) {
    const MatrixView out(out_.row(t0), out_.dtype, t1 - t0, out_.cols, out_.row_stride);
    kernels_.weighted_reduce(
        s_.home.view(),
        plan_.home_ptr.span(static_cast<std::size_t>(t0), static_cast<std::size_t>(t1 - t0) + 1),
        plan_.home_position, {}, out);
  }
  if (!backward_) return;
  for (std::size_t i = 0; i < plan_.send1.segments.size(); ++i) {
    const Range q = chunk_routes(plan_.send1, static_cast<std::int32_t>(i), op.chunk);
    for (std::int32_t j = q.begin; j < q.end; ++j)
      dw_[static_cast<std::size_t>(plan_.send1.route[static_cast<std::size_t>(j)])] =
          s_.dw_home[static_cast<std::size_t>(j)];
  }
}

}  // namespace sluice
