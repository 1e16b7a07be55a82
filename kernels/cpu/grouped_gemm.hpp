// The grouped GEMM of the CPU kernels: blocking, packing and scheduling around the tiles of an instruction set.
//
// Every call is C[M, N] (+)= A[M, K] B[K, N] for each group, with the reduction over K in order:
//   forward  M = rows of the group, K = in_cols,  N = out_cols, B = W^T (packed through a transpose)
//   dgrad    M = rows of the group, K = out_cols, N = in_cols,  B = W
//   wgrad    M = out_cols,          K = rows of the group, N = in_cols, A = dc^T, B = a, accumulating
// A task is a block of rows of one group times kBlockN columns. Threads draw tasks from one counter, largest
// blocks first, so one big group is shared by all of them. A thread keeps the packed A of the block it works on if
// other tasks read it again; else one buffer serves panel after panel (forward, dgrad) or step after step (wgrad).
// Panels that are rows of an fp32 matrix already (B of dgrad, A and B of wgrad without an index) are read where they
// lie, unless they are too many pages apart.
// The K loop is cut into blocks of kBlockK, one step each; between them C rests in fp32, so the chain of each
// element is unbroken. Weights are read once a block and usually from memory: while a thread computes, its tiles
// ask for what its next step will read, for the next panel of A and for a tile of C that comes later.
// Groups of at most kFewRows rows are multiplied without packing B: there, reading the weights is the work.
//
// Ownership: holds scratch that grows to its high-water mark. Thread-safety: one call at a time. Arguments are
// checked by the caller (cpu_kernels.cpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/base/tensor_view.hpp"
#include "sluice/kernels/cpu/aligned_buffer.hpp"
#include "sluice/kernels/cpu/isa.hpp"
#include "sluice/kernels/cpu/thread_pool.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels {

class GroupedGemm {
 public:
  GroupedGemm(const IsaOps& ops, ThreadPool& pool);

  // As in kernels.hpp.
  void forward(const Groups& groups, ConstMatrixView a, std::span<const std::int32_t> a_index,
               DType weight_dtype, std::int64_t out_cols, Activation activation, MatrixView h,
               MatrixView act);
  void dgrad(const Groups& groups, ConstMatrixView dc, std::span<const std::int32_t> dc_index,
             DType weight_dtype, MatrixView da);
  void wgrad(std::span<const std::int64_t> group_ptr, ConstMatrixView dc,
             std::span<const std::int32_t> dc_index, ConstMatrixView a, std::span<const std::int32_t> a_index,
             std::span<float* const> grads);

  std::int64_t scratch_bytes() const;

 private:
  enum class Kind : std::uint8_t { kForward, kDgrad, kWgrad };

  // Rows row_begin..row_begin+rows-1 of group `group`'s C, cut into panels (of A, tiles of C) of panel_rows rows; the
  // last panel may have fewer, but at least one.
  struct Block {
    std::int64_t group, row_begin, rows;
    std::int64_t length, num_k_blocks;  // of the reduction
    std::int64_t num_panels, panel_rows;
    std::int64_t a_floats;  // packed A of one k block
    bool few;               // at most kFewRows rows: B is not packed and the reduction not cut
  };
  // Source of rows, gathered through `index` when it is not null: row i is view.row(index ? index[i] : i).
  struct RowSource {
    ConstMatrixView view;
    const std::int32_t* index;
  };
  // Everything one call needs; lives on the stack of the call.
  struct Call {
    Kind kind;
    std::int64_t cols;       // N
    std::int64_t task_cols;  // columns of the output (ffn columns for a gated activation) a task covers
    std::int64_t num_tasks_a_block;
    std::span<const std::int64_t> group_ptr;
    RowSource rows_a;  // a (forward), dc (dgrad, wgrad)
    RowSource rows_b;  // a (wgrad)
    std::span<const std::byte* const> weights;
    DType weight_dtype;
    Activation activation;
    bool gated;           // C's left and right halves meet in the activation
    MatrixView out, act;  // h and act (forward), da (dgrad)
    std::span<float* const> grads;
    // Whether packed A is used again by other tasks of the block.
    bool keeps_a() const { return num_tasks_a_block > 1; }
  };
  // Where the panels of A (step-major, wgrad) or B of a step lie; strides in floats.
  struct Panels {
    const float* data;
    std::int64_t panel_stride, step_stride;
  };
  // Columns of C that lie side by side in B and in the task's tile of C.
  struct Segment {
    std::int64_t first, count, tile_col;
  };
  struct Segments {
    Segment list[2];
    std::size_t count;
    const Segment* begin() const { return list; }
    const Segment* end() const { return list + count; }
  };
  // One k block of one task.
  struct Step {
    std::int64_t block, task, k_block;
  };
  // Reduction indices begin..begin+steps-1 of a k block.
  struct KRange {
    std::int64_t begin, steps;
  };
  struct Worker {
    AlignedBuffer buffer;
    float *a, *b, *c;           // parts of `buffer`: packed A, packed B, tile of C
    std::int64_t block_in_a;    // whose packed A `a` holds, or -1
    std::int64_t packing_task;  // task of that block during which A is packed
    std::int64_t tasks_end;     // of the draw that is being worked on
  };

  void run(const Call& call);
  void add_blocks(const Call& call);
  void reserve_scratch(const Call& call);
  void draw_tasks(const Call& call, Worker& worker);
  bool draw(const Call& call, Worker& worker, Step& step);
  bool advance(const Call& call, Worker& worker, Step& step);
  void run_step(const Call& call, Worker& worker, const Step& step, const Step* next);
  void run_few_rows(const Call& call, Worker& worker, const Step& step);
  void run_wgrad_step(const Call& call, Worker& worker, const Step& step, const Step* next);
  static bool begin_step(Worker& worker, const Step& step);
  Panels panels_b(const Call& call, Worker& worker, const Block& block, const Segments& segments, KRange k);
  void pack_b(const Call& call, Worker& worker, const Block& block, const Segments& segments, KRange k);
  void store_rows(const Call& call, Worker& worker, const Block& block, const Segments& segments, bool direct,
                  std::int64_t row_begin, std::int64_t rows);

  const Block& block_of(const Step& step) const { return blocks_[static_cast<std::size_t>(step.block)]; }
  Segments segments_of(const Call& call, std::int64_t task) const;
  Prefetch weights_of(const Call& call, const Step& step, const Segment& segment) const;
  static Prefetch rows_of(const RowSource& source, std::int64_t first_row, std::int64_t rows,
                          std::int64_t first_col, std::int64_t cols);
  static Prefetch packed_rows(const float* first, std::int64_t stride, std::int64_t rows,
                              std::int64_t row_floats);
  KRange k_range(const Block& block, std::int64_t k_block) const;

  const IsaOps& ops_;
  ThreadPool& pool_;
  std::vector<Worker> workers_;
  std::vector<Block> blocks_;
  std::atomic<std::int64_t> next_draw_{0};
};

}  // namespace sluice::kernels
