// The inner loops of the CPU kernels, once per instruction set. Each table is built from the same source
// (isa_ops.inl) over another vector type, and every operation in it is a fixed sequence of IEEE operations
// and explicit FMAs per element, so all tables give the same bits.
//
// Ownership: tables are static and immutable; arguments belong to the caller. Thread-safety: all functions
// are pure. Nothing here blocks, allocates, checks shapes or throws.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sluice/base/dtype.hpp"

namespace sluice::kernels {

enum class Activation : std::uint8_t;

// Blocking of the grouped GEMM, equal on all instruction sets.
inline constexpr std::int64_t kMaxTileRows = 14;  // rows of C in registers at most
inline constexpr std::int64_t kBlockK = 384;      // reduction steps between two visits of a C tile
// Floats between two rows of a row-major A panel: not a multiple of 4 KiB/8, so that the rows of a panel do
// not share L1 sets.
inline constexpr std::int64_t kRowStrideA = kBlockK + 16;
inline constexpr std::int64_t kStepStrideA =
    16;  // floats between two reduction steps of a packed step-major A panel
inline constexpr std::int64_t kBlockN = 256;  // columns of C a task works on at most
// A block of at most so many rows is multiplied without packing B: reading the weights once takes longer than the rest.
inline constexpr std::int64_t kFewRows = 8;
inline constexpr std::int64_t kLanes = 16;  // lanes of the dw sum (kernels.hpp, activation_backward)

// One step of AdamW with the scalars that do not depend on the element worked out once.
struct AdamWStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;  // learning_rate / (1 - beta1^step)
  float inv_bias2;  // 1 / (1 - beta2^step)
  float keep;       // 1 - learning_rate * weight_decay
  float epsilon;
};

// Rows of memory that tiles ask for while they compute, so that it is in cache when its turn comes: `lines_a_row`
// cache lines of each of `rows_left` rows, `row_bytes` apart or named by an index. A cursor: tiles advance it.
// Only a hint; nothing is dereferenced but the index.
struct Prefetch {
  const char* base = nullptr;           // row 0 (indexed), or the row that is being asked for
  const std::int32_t* index = nullptr;  // of the row that is being asked for, or null
  std::int64_t row_bytes = 0;
  std::int64_t rows_left = 0;  // the one that is being asked for included; 0: nothing left
  std::int64_t lines_a_row = 0;
  std::int64_t line = 0;
  std::int64_t lines_a_round = 1;  // lines to ask for every kStepsARound reduction steps
};
inline constexpr std::int64_t kStepsARound = 4;

// C tile [rows, panel width] f32, row stride ldc floats: c = fma(a[k][row], b[k][col], c) for k ascending in
// 0..steps-1, from 0 when `fresh`, else from the values in C.
// a: f32 panel, row-major (kRowStrideA between rows, a_stride unused) or step-major (a_stride between steps);
// b: f32 [steps, panel width], b_stride between steps; coming_c: a tile that comes later, same stride, only asked for,
// or null. Strides in floats.
using TileFunction = void (*)(std::int64_t steps, const float* a, std::int64_t a_stride, const float* b,
                              std::int64_t b_stride, float* c, std::int64_t ldc, bool fresh,
                              const float* coming_c, Prefetch& prefetch);

// C [rows, cols] f32, row stride ldc floats: the same chains from 0 for 1..kFewRows rows, with the weights read as they
// lie. a: f32 [rows, steps], row stride lda floats; w: dtype, row stride in bytes.
using FewRowsFunction = void (*)(std::int64_t steps, const float* a, std::int64_t lda, const std::byte* w,
                                 DType w_dtype, std::int64_t row_bytes, std::int64_t cols, float* c,
                                 std::int64_t ldc);

struct IsaOps {
  const char* name;
  std::int64_t tile_rows;    // largest rows of a tile, at most kMaxTileRows
  std::int64_t panel_width;  // columns of a tile

  TileFunction tile_row_major[kMaxTileRows + 1];  // indexed by rows, 1..tile_rows
  TileFunction tile_step_major[kMaxTileRows + 1];

  FewRowsFunction few_rows_transposed[kFewRows + 1];  // indexed by rows; w: [cols, steps]
  FewRowsFunction few_rows_straight[kFewRows + 1];    // w: [steps, cols]

  // dst[i] = src[i] widened to f32.  src: dtype [n]; dst: f32 [n]
  void (*widen)(const std::byte* src, DType dtype, float* dst, std::int64_t n);
  // dst[i] = src[i] rounded to dtype.  src: f32 [n]; dst: dtype [n]
  void (*narrow)(const float* src, std::byte* dst, DType dtype, std::int64_t n);
  // dst[r][c] = src[index ? index[r] : r][c].
  // src: dtype [*, cols], row stride in bytes; index: int32 [rows] or null; dst: f32 [rows, cols], row stride
  // dst_stride floats
  void (*copy_rows)(const std::byte* src, DType dtype, std::int64_t row_bytes, const std::int32_t* index,
                    std::int64_t rows, std::int64_t cols, float* dst, std::int64_t dst_stride);
  // Cuts rows into panels: dst[panel][r][c] = src[index ? index[r] : r][panel * panel_cols + c] for c in
  // 0..width-1, zero where that is past the last column.
  // src: dtype [*, cols], row stride in bytes; index: int32 [rows] or null;
  // dst: f32 [num_panels][rows][width], panels panel_stride floats apart
  void (*copy_panels)(const std::byte* src, DType dtype, std::int64_t row_bytes, const std::int32_t* index,
                      std::int64_t rows, std::int64_t cols, std::int64_t num_panels, std::int64_t panel_cols,
                      float* dst, std::int64_t panel_stride, std::int64_t width);
  // dst[k][c] = src[c][k], columns cols..panel_width-1 zero.
  // src: dtype [cols, steps], row stride in bytes; dst: f32 [steps, panel_width]
  void (*pack_transposed)(const std::byte* src, DType dtype, std::int64_t row_bytes, std::int64_t cols,
                          std::int64_t steps, float* dst);

  // act[i] = activation(h)[i].  h: f32 [n] or, SwiGLU, gate f32 [n] and up f32 [n]; act: f32 [n], may alias
  // gate
  void (*activate)(Activation activation, const float* gate, const float* up, float* act, std::int64_t n);
  // The backward pass of kernels.hpp over n columns of one row; lanes[j] += sum over columns j, j+16, ... of
  // u * a. gate, up, u: f32 [n]; dgate, dup, wa: f32 [n], may alias gate, up, u; lanes: f32 [kLanes]
  void (*activate_backward)(Activation activation, const float* gate, const float* up, const float* u,
                            float weight, float* dgate, float* dup, float* wa, float* lanes, std::int64_t n);

  // One output row of weighted_reduce.  src: dtype rows at src + position[i] * row_bytes; weight: f32 [count]
  // or null
  void (*reduce_row)(const std::byte* src, DType src_dtype, std::int64_t row_bytes,
                     const std::int32_t* position, const float* weight, std::int64_t count, std::byte* out,
                     DType out_dtype, std::int64_t cols);
  // y[i] += scale * x[i].  x: dtype [n]; y: dtype [n]
  void (*add_scaled)(const std::byte* x, DType x_dtype, float scale, std::byte* y, DType y_dtype,
                     std::int64_t n);
  // All f32 [n]; copy: copy_dtype [n] or null
  void (*adamw)(const AdamWStep& step, float* master, const float* grad, float* m, float* v, std::byte* copy,
                DType copy_dtype, std::int64_t n);
};

// The table of an instruction set, or null when this build or this processor has not got it.
const IsaOps* avx512_ops();
const IsaOps* avx2_ops();
const IsaOps* portable_ops();  // never null

// The widest table this processor can run; chosen once.
const IsaOps& best_ops();

}  // namespace sluice::kernels
