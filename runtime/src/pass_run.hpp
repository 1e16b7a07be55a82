// One pass of a template with the numbers of a plan, while it is in flight: which ops are done, and what each of them
// does. The executor (executor.hpp) decides when they run.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "sluice/comm/transport.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/runtime.hpp"
#include "sluice/runtime/src/context_storage.hpp"
#include "sluice/scheduler/plan.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

// What a rank does with received rows: the expert ops and the reduction of one rank's experts.
class ExpertWork {
 public:
  virtual ~ExpertWork() = default;
  // Runs an op of Phase::kExperts, or kReduce.
  virtual void run(const Op& op) = 0;
  // Held beyond the storage's buffers.
  virtual std::int64_t capacity_bytes() const { return 0; }
};

struct PassFormat {
  std::int64_t hidden = 0;
  DType wire_dtype = DType::kF32;
  DType combine_dtype = DType::kF32;
};

class PassRun {
 public:
  // All references must outlive the run.
  PassRun(Runtime& runtime, const Template& shape, const Plan& plan, const PassFormat& format,
          ContextStorage& storage, PassKind kind);
  ~PassRun();  // leaves the executor
  PassRun(const PassRun&) = delete;
  PassRun& operator=(const PassRun&) = delete;

  // Sizes buffers, registers windows, announces what will come, and joins the passes in flight.
  // in: dtype [num_tokens, hidden], x or dy; stays valid until the pass is over
  void start(ConstMatrixView in);
  // Without expert work, ops run only as far as it is not needed.
  void set_work(ExpertWork& work, MatrixView out, std::span<float> dw);
  // Runs until the received rows are complete (every chunk), without expert work.
  void run_dispatch();

  // Runs the first op that may run; false if none may.
  bool step();
  // Runs the first link op that may run, for the progress thread.
  bool post();
  bool done() const { return num_done_ == pass_.ops.size(); }
  bool experts_done() const;  // what is left reduces and travels
  // Adds what the ops left wait for. Returns whether one of them may run.
  bool add_pending(std::vector<comm::WaitSpec>& pending) const;
  std::size_t num_waits() const;
  // The pass is over: signals of the next one on this channel count from here.
  void close();

  struct Range {
    std::int32_t begin = 0, end = 0;
  };
  // For ExpertWork, on an op's block.
  // Calls visit(segment, its index, range of received rows) source by source.
  template <typename Visit>
  void for_each_received(const Op& op, Visit&& visit) {
    const Topology& topology = runtime_.topology();
    for (std::size_t i = 0; i < plan_.recv2.segments.size(); ++i) {
      const Segment& seg = plan_.recv2.segments[i];
      if (part_of(plan_.options.split, source_class(topology, plan_.rank, RankId(seg.source))) != op.part)
        continue;
      const Range r = chunk_rows(plan_.recv2, static_cast<std::int32_t>(i), op.chunk);
      if (r.begin < r.end) visit(seg, static_cast<std::int32_t>(i), r);
    }
  }
  // Where the sums of a segment's received rows leave from.
  MatrixView reduced_rows(const Segment& segment, Range r) const {
    const std::int32_t shift = segment.peer_row_begin - segment.row_begin;
    return segment.peer == plan_.rank.value ? s_.ret2.rows(r.begin + shift, r.end + shift)
                                            : s_.partial.rows(r.begin, r.end);
  }
  // Rows of one rank's experts are added up and laid there.
  // src: dtype [*, hidden]; position: int32 [recv2 routes]; weight: f32 [recv2 routes] or empty
  void reduce_rows(ConstMatrixView src, std::span<const std::int32_t> position, std::span<const float> weight,
                   const Op& op);
  // The same for rows that are already one a received row. src: dtype [recv2 rows, hidden]
  void reduce_none(ConstMatrixView src, const Op& op);
  // dw of the block's received routes, from value[position[route]]; position empty: the identity.
  void send_dw(std::span<const float> value, std::span<const std::int32_t> position, const Op& op);

  bool is_backward() const { return backward_; }
  const RowBuffer& received() const { return backward_ ? s_.recv_dy : s_.recv2; }

 private:
  template <typename List>
  Range chunk_rows(const List& list, std::int32_t segment, std::int32_t chunk) const {
    if (segment < 0) return {};
    const auto at =
        static_cast<std::size_t>(segment) * (static_cast<std::size_t>(plan_.options.num_chunks) + 1) +
        static_cast<std::size_t>(chunk);
    return {list.chunk_row[at], list.chunk_row[at + 1]};
  }
  template <typename List>
  Range chunk_routes(const List& list, std::int32_t segment, std::int32_t chunk) const;
  std::int32_t send2_segment(std::size_t member, std::size_t source) const {
    return send2_segment_[member * (shape_.hop1_from.size() + 1) + source];
  }

  void index_segments();
  void size_buffers();
  void set_window(Window window, std::span<std::byte> memory);
  void announce();
  void expect(std::int32_t peer, SignalKind kind, std::int32_t chunk, Window window,
              std::int64_t offset_bytes, std::int64_t bytes);
  void put(const Op& op, Window window, std::int64_t offset_bytes, std::span<const std::byte> source);

  bool may_run(std::size_t op) const;
  void mark_done(std::size_t op);
  void run_op(const Op& op);
  void pack(const Op& op);
  void put_rows(const Op& op);
  void hand_on(const Op& op);
  void send_back(const Op& op);
  void node_reduce(const Op& op);
  void unpack(const Op& op);

  Runtime& runtime_;
  comm::Transport& transport_;
  kernels::Kernels& kernels_;
  const Template& shape_;
  const PassTemplate& pass_;
  const Plan& plan_;
  PassFormat format_;
  ContextStorage& s_;
  PassKind kind_;
  bool backward_;
  ConstMatrixView in_;
  MatrixView out_;
  std::span<float> dw_;

  ExpertWork* work_ = nullptr;
  std::size_t num_done_ = 0;
  std::size_t first_open_ = 0;
  // Kept in the storage, so that a pass allocates nothing once its sizes are known.
  std::vector<char>& done_;
  std::vector<std::int32_t>&send1_segment_, &recv1_segment_, &send2_segment_, &recv2_segment_;
  std::vector<comm::Expect>& expects_;
};

// A storage's room for its pass in flight, so that steps allocate nothing.
struct PassSlot {
  std::shared_ptr<const Template> shape;  // of the run, where it may change from plan to plan
  std::optional<PassRun> run;
  std::optional<PassKind> ran_on_gpus;  // a pass that needs no run, from its start until finish()
  std::unique_ptr<ExpertWork> work;     // the layer's, reused pass by pass
};

}  // namespace sluice
