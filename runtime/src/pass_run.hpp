// The executor: runs one pass of a template with the numbers of a plan, on the calling thread. It is the CPU lowering of
// the template: an op is a function call, a counter wait is a comparison, and the transport moves along between ops.
#pragma once

#include <cstdint>
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

  // Sizes buffers, registers windows, announces what will come and tells the peers that they may put.
  // in: dtype [num_tokens, hidden], x or dy
  void start(ConstMatrixView in);
  // Runs until the received rows are complete (every chunk), without expert work.
  void run_dispatch();
  // Runs what is left. out: dtype [num_tokens, hidden], y or dx; dw: f32 [num_routes], backward only
  void run_all(ExpertWork& work, MatrixView out, std::span<float> dw);

  // For ExpertWork, on an op's block: rows of one rank's experts are added up and laid where they leave from.
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
  struct Range {
    std::int32_t begin = 0, end = 0;
  };
  template <typename List>
  Range chunk_rows(const List& list, std::int32_t segment, std::int32_t chunk) const;
  template <typename List>
  Range chunk_routes(const List& list, std::int32_t segment, std::int32_t chunk) const;
  std::int32_t send2_segment(std::size_t member, std::size_t source) const {
    return send2_segment_[member * (shape_.hop1_from.size() + 1) + source];
  }
  // Calls visit(segment, its index, range of rows) for the rows of the op's block, source by source.
  template <typename Visit>
  void for_each_received(const Op& op, Visit&& visit);

  void index_segments();
  void size_buffers();
  void set_window(Window window, std::span<std::byte> memory);
  void announce();
  void expect(std::int32_t peer, SignalKind kind, std::int32_t chunk, Window window,
              std::int64_t offset_bytes, std::int64_t bytes);
  void put(std::int32_t peer, std::uint32_t signal, Window window, std::int64_t offset_bytes,
           std::span<const std::byte> source);

  bool may_run(const Op& op) const;
  void run_until(std::size_t target, ExpertWork* work);
  void wait();
  void run_op(const Op& op, ExpertWork* work);
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

  std::size_t num_done_ = 0;
  std::size_t first_open_ = 0;
  bool dispatch_only_ = false;
  // Kept in the storage, so that a pass allocates nothing once its sizes are known.
  std::vector<char>& done_;
  std::vector<std::int32_t>&send1_segment_, &recv1_segment_, &send2_segment_, &recv2_segment_;
  std::vector<comm::Expect>& expects_;
  std::vector<comm::WaitSpec>& pending_;
};

}  // namespace sluice
