// The grouped GEMM of the CPU kernels: blocking, packing and scheduling around the tiles of an instruction
// set.
//
// Every call is C[M, N] (+)= A[M, K] B[K, N] for each group, with the reduction over K in order:
//   forward  M = rows of the group, K = in_cols,  N = out_cols, B = W^T (packed through a transpose)
//   dgrad    M = rows of the group, K = out_cols, N = in_cols,  B = W
//   wgrad    M = out_cols,          K = rows of the group, N = in_cols, A = dc^T, B = a, accumulating
// A task is a block of rows of one group times kBlockN columns. Threads draw tasks from one counter, largest
// blocks first, so one big group is shared by all of them. A thread keeps the packed A of the block it works
// on. The K loop is cut into blocks of kBlockK; between them C rests in fp32, so the chain of each element is
// unbroken.
//
// Ownership: holds scratch that grows to its high-water mark. Thread-safety: one call at a time. Arguments
// are checked by the caller (cpu_kernels.cpp).
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

  // Rows row_begin..row_begin+rows-1 of group `group`'s C.
  struct Block {
    std::int64_t group, row_begin, rows;
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
  };
  // Columns of C that lie side by side in B and in the task's tile of C.
  struct Segment {
    std::int64_t first, count, tile_col;
  };
  struct Worker {
    AlignedBuffer a, b, c;
    std::int64_t block_in_a;  // whose packed A `a` holds, or -1
  };

  void run(const Call& call);
  void add_blocks(const Call& call);
  void reserve_scratch(const Call& call);
  void draw_tasks(const Call& call, Worker& worker);
  void run_task(const Call& call, Worker& worker, std::int64_t block_number, std::int64_t task);
  void pack_a(const Call& call, Worker& worker, const Block& block);
  void pack_b(const Call& call, Worker& worker, const Block& block, std::span<const Segment> segments,
              std::int64_t k_begin, std::int64_t steps);
  void multiply_into_grads(const Call& call, Worker& worker, const Block& block,
                           std::span<const Segment> segments, std::int64_t row_begin, std::int64_t rows,
                           const float* a, std::int64_t steps);
  void store_rows(const Call& call, Worker& worker, const Block& block, std::span<const Segment> segments,
                  std::int64_t row_begin, std::int64_t rows);

  std::int64_t reduction_length(const Call& call, std::int64_t group) const;
  std::int64_t num_panels(std::int64_t rows) const { return (rows + ops_.tile_rows - 1) / ops_.tile_rows; }
  std::int64_t a_floats_a_k_block(const Call& call, std::int64_t rows) const;

  const IsaOps& ops_;
  ThreadPool& pool_;
  std::vector<Worker> workers_;
  std::vector<Block> blocks_;
  std::atomic<std::int64_t> next_draw_{0};
};

}  // namespace sluice::kernels
