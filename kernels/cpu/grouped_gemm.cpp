#include "sluice/kernels/cpu/grouped_gemm.hpp"

#include <algorithm>
#include <utility>

namespace sluice::kernels {

namespace {

// Rows of a block at most: B is packed once a block, so more rows spread that cost; the tile of C (kBlockN
// columns) and B's block should stay in L2 together.
constexpr std::int64_t kBlockRows = 448;
// Floats between two panels of packed B: two lines more than they hold, so that panels written side by side do not
// share L1 sets.
std::int64_t panel_stride_b(std::int64_t width) {
  return kBlockK * width + 32;
}
// Columns of a forward task, which reads as many rows of W; the others read kBlockN columns of each row, where long
// pieces matter.
constexpr std::int64_t kForwardCols = 128;
// Floats between two rows of a task's tile of C.
constexpr std::int64_t kTileStride = kBlockN + 16;
constexpr std::int64_t kCacheLine = 64;
// Floats between two step-major A panels: one line more than they hold, so that panels written side by side do not
// share L1 sets.
constexpr std::int64_t kPanelStrideA = kBlockK * kStepStrideA + 16;
// K blocks begin at multiples of it, so that packing works on whole vectors; none exceeds kBlockK because that is
// such a multiple, too.
constexpr std::int64_t kStepGrain = 16;
static_assert(kBlockK % kStepGrain == 0);

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Part `i` of `n` cut into `parts` almost equal parts starts here.
std::int64_t part_begin(std::int64_t n, std::int64_t parts, std::int64_t i) {
  return n * i / parts;
}

const std::int32_t* at(const std::int32_t* index, std::int64_t i) {
  return index ? index + i : nullptr;
}

// Floats between two rows of A that is not cut into k blocks.
std::int64_t few_rows_stride(std::int64_t length) {
  return length + 16;
}

// Whether tiles may read a panel of `steps` steps where it lies, `stride` floats apart. Within a page all steps share
// few L2 sets; past so many pages they evict each other, and packing is cheaper.
bool readable_in_place(std::int64_t steps, std::int64_t stride) {
  constexpr std::int64_t kPageFloats = 1024, kMaxPages = 192;
  return steps * std::min(stride, kPageFloats) <= kMaxPages * kPageFloats;
}

// How many tiles of `steps` steps it takes until memory has answered, about 3000 cycles of FMAs to be safe.
std::int64_t tiles_ahead(std::int64_t steps) {
  return std::max<std::int64_t>(1, 112 / std::max<std::int64_t>(1, steps));
}

// Cache lines that `bytes` bytes at `p` touch.
std::int64_t lines_of(const char* p, std::int64_t bytes) {
  return ceil_div(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kCacheLine) + bytes,
                  kCacheLine);
}

std::int64_t element_bytes(DType dtype) {
  return static_cast<std::int64_t>(size_of(dtype));
}

}  // namespace

GroupedGemm::GroupedGemm(const IsaOps& ops, ThreadPool& pool) : ops_(ops), pool_(pool) {
  workers_.resize(static_cast<std::size_t>(pool.num_threads()));
}

void GroupedGemm::forward(const Groups& groups, ConstMatrixView a, std::span<const std::int32_t> a_index,
                          DType weight_dtype, std::int64_t out_cols, Activation activation, MatrixView h,
                          MatrixView act) {
  Call call{};
  call.kind = Kind::kForward;
  call.cols = out_cols;
  call.gated = act.data != nullptr && activation == Activation::kSwiGLU;
  call.task_cols = call.gated ? kForwardCols / 2 : kForwardCols;
  call.num_tasks_a_block = ceil_div(call.gated ? out_cols / 2 : out_cols, call.task_cols);
  call.group_ptr = groups.group_ptr;
  call.rows_a = {a, a_index.empty() ? nullptr : a_index.data()};
  call.weights = groups.weights;
  call.weight_dtype = weight_dtype;
  call.activation = activation;
  call.out = h;
  call.act = act;
  run(call);
}

void GroupedGemm::dgrad(const Groups& groups, ConstMatrixView dc, std::span<const std::int32_t> dc_index,
                        DType weight_dtype, MatrixView da) {
  Call call{};
  call.kind = Kind::kDgrad;
  call.cols = da.cols;
  call.task_cols = kBlockN;
  call.num_tasks_a_block = ceil_div(da.cols, kBlockN);
  call.group_ptr = groups.group_ptr;
  call.rows_a = {dc, dc_index.empty() ? nullptr : dc_index.data()};
  call.weights = groups.weights;
  call.weight_dtype = weight_dtype;
  call.out = da;
  run(call);
}

void GroupedGemm::wgrad(std::span<const std::int64_t> group_ptr, ConstMatrixView dc,
                        std::span<const std::int32_t> dc_index, ConstMatrixView a,
                        std::span<const std::int32_t> a_index, std::span<float* const> grads) {
  Call call{};
  call.kind = Kind::kWgrad;
  call.cols = a.cols;
  call.task_cols = kBlockN;
  call.num_tasks_a_block = ceil_div(a.cols, kBlockN);
  call.group_ptr = group_ptr;
  call.rows_a = {dc, dc_index.empty() ? nullptr : dc_index.data()};
  call.rows_b = {a, a_index.empty() ? nullptr : a_index.data()};
  call.grads = grads;
  run(call);
}

std::int64_t GroupedGemm::scratch_bytes() const {
  auto bytes = static_cast<std::int64_t>(blocks_.capacity() * sizeof(Block));
  for (const Worker& worker : workers_) bytes += worker.buffer.bytes();
  return bytes;
}

GroupedGemm::KRange GroupedGemm::k_range(const Block& block, std::int64_t k_block) const {
  const auto border = [&](std::int64_t i) {
    return std::min(block.length,
                    ceil_div(part_begin(block.length, block.num_k_blocks, i), kStepGrain) * kStepGrain);
  };
  if (block.num_k_blocks == 1) return {0, block.length};
  return {border(k_block), border(k_block + 1) - border(k_block)};
}

void GroupedGemm::run(const Call& call) {
  add_blocks(call);
  reserve_scratch(call);
  next_draw_.store(0, std::memory_order_relaxed);
  if (blocks_.empty()) return;
  pool_.run([&](int worker) { draw_tasks(call, workers_[static_cast<std::size_t>(worker)]); });
}

void GroupedGemm::add_blocks(const Call& call) {
  blocks_.clear();
  const bool wgrad = call.kind == Kind::kWgrad;
  for (std::size_t g = 0; g + 1 < call.group_ptr.size(); ++g) {
    const std::int64_t group_rows = call.group_ptr[g + 1] - call.group_ptr[g];
    if (group_rows == 0) continue;
    const std::int64_t rows = wgrad ? call.rows_a.view.cols : group_rows;
    const std::int64_t parts = ceil_div(rows, kBlockRows);
    for (std::int64_t i = 0; i < parts; ++i) {
      Block block;
      block.group = static_cast<std::int64_t>(g);
      block.row_begin = part_begin(rows, parts, i);
      block.rows = part_begin(rows, parts, i + 1) - block.row_begin;
      block.length = wgrad ? group_rows : call.rows_a.view.cols;
      block.few = !wgrad && block.rows <= kFewRows;
      block.num_k_blocks = block.few ? 1 : ceil_div(block.length, kBlockK);
      block.num_panels = ceil_div(block.rows, ops_.tile_rows);
      block.panel_rows = ceil_div(block.rows, block.num_panels);
      block.num_panels = ceil_div(block.rows, block.panel_rows);
      block.a_floats = wgrad       ? block.num_panels * kPanelStrideA
                       : block.few ? block.rows * few_rows_stride(block.length)
                                   : (call.keeps_a() ? block.rows : block.panel_rows) * kRowStrideA;
      blocks_.push_back(block);
    }
  }
  // Large blocks first, so that what is left at the end is small and the threads finish together.
  if (pool_.num_threads() > 1) {
    std::sort(blocks_.begin(), blocks_.end(), [](const Block& x, const Block& y) {
      const std::int64_t work_x = x.rows * x.length, work_y = y.rows * y.length;
      if (work_x != work_y) return work_x > work_y;
      return x.group != y.group ? x.group < y.group : x.row_begin < y.row_begin;
    });
  }
}

void GroupedGemm::reserve_scratch(const Call& call) {
  std::int64_t a_floats = 0, max_rows = 0;
  for (const Block& block : blocks_) {
    a_floats = std::max(a_floats, (call.keeps_a() ? block.num_k_blocks : 1) * block.a_floats);
    max_rows = std::max(max_rows, block.rows);
  }
  const std::int64_t b_floats = kBlockN / ops_.panel_width * panel_stride_b(ops_.panel_width);
  const std::int64_t c_floats = (call.kind == Kind::kWgrad ? ops_.tile_rows : max_rows) * kTileStride;
  for (Worker& worker : workers_) {
    worker.block_in_a = -1;
    worker.b = worker.buffer.reserve(b_floats + c_floats + a_floats);
    worker.c = worker.b + b_floats;
    worker.a = worker.c + c_floats;
  }
}

void GroupedGemm::draw_tasks(const Call& call, Worker& worker) {
  Step step;
  for (bool more = draw(call, worker, step); more;) {
    // The next draw happens one step early, so that its weights can be asked for.
    Step next = step;
    more = advance(call, worker, next);
    if (call.kind == Kind::kWgrad)
      run_wgrad_step(call, worker, step, more ? &next : nullptr);
    else if (block_of(step).few)
      run_few_rows(call, worker, step);
    else
      run_step(call, worker, step, more ? &next : nullptr);
    step = next;
  }
}

// Takes the next tasks that nobody has; false when there are none. A draw stays within one block, so that its
// packed A serves all of it, and leaves some of the block to the other threads.
bool GroupedGemm::draw(const Call& call, Worker& worker, Step& step) {
  const std::int64_t size = std::max<std::int64_t>(1, call.num_tasks_a_block / (2 * pool_.num_threads()));
  const std::int64_t draws_a_block = ceil_div(call.num_tasks_a_block, size);
  const std::int64_t i = next_draw_.fetch_add(1, std::memory_order_relaxed);
  if (i >= static_cast<std::int64_t>(blocks_.size()) * draws_a_block) return false;
  step = {i / draws_a_block, i % draws_a_block * size, 0};
  worker.tasks_end = std::min(step.task + size, call.num_tasks_a_block);
  return true;
}

bool GroupedGemm::advance(const Call& call, Worker& worker, Step& step) {
  if (++step.k_block < block_of(step).num_k_blocks) return true;
  step.k_block = 0;
  return ++step.task < worker.tasks_end || draw(call, worker, step);
}

GroupedGemm::Segments GroupedGemm::segments_of(const Call& call, std::int64_t task) const {
  const std::int64_t first = task * call.task_cols;
  if (!call.gated) return {{{first, std::min(call.task_cols, call.cols - first), 0}, {}}, 1};
  const std::int64_t ffn = call.cols / 2;
  const std::int64_t count = std::min(call.task_cols, ffn - first);
  return {{{first, count, 0}, {ffn + first, count, call.task_cols}}, 2};
}

// What pack_b reads for a segment of a step (forward, dgrad).
Prefetch GroupedGemm::weights_of(const Call& call, const Step& step, const Segment& segment) const {
  const Block& block = block_of(step);
  const KRange k = k_range(block, step.k_block);
  const std::int64_t element = element_bytes(call.weight_dtype);
  const bool forward = call.kind == Kind::kForward;
  Prefetch prefetch;
  prefetch.row_bytes = (forward ? call.rows_a.view.cols : call.cols) * element;
  prefetch.base = reinterpret_cast<const char*>(call.weights[static_cast<std::size_t>(block.group)]) +
                  (forward ? segment.first : k.begin) * prefetch.row_bytes +
                  (forward ? k.begin : segment.first) * element;
  prefetch.lines_a_row = lines_of(prefetch.base, (forward ? k.steps : segment.count) * element);
  prefetch.rows_left = forward ? segment.count : k.steps;
  return prefetch;
}

// Columns first_col..first_col+cols-1 of rows first_row..first_row+rows-1 of the source.
Prefetch GroupedGemm::rows_of(const RowSource& source, std::int64_t first_row, std::int64_t rows,
                              std::int64_t first_col, std::int64_t cols) {
  const std::int64_t element = element_bytes(source.view.dtype);
  Prefetch prefetch;
  prefetch.base =
      reinterpret_cast<const char*>(source.index ? source.view.data : source.view.row(first_row)) +
      first_col * element;
  prefetch.index = at(source.index, first_row);
  prefetch.row_bytes = source.view.row_bytes_stride();
  prefetch.lines_a_row = lines_of(prefetch.base, cols * element);
  prefetch.rows_left = rows;
  return prefetch;
}

// `rows` rows of `row_floats` floats, `stride` floats apart, of packed A.
Prefetch GroupedGemm::packed_rows(const float* first, std::int64_t stride, std::int64_t rows,
                                  std::int64_t row_floats) {
  Prefetch prefetch;
  prefetch.base = reinterpret_cast<const char*>(first);
  prefetch.row_bytes = stride * 4;
  prefetch.lines_a_row = ceil_div(row_floats * 4, kCacheLine);
  prefetch.rows_left = rows;
  return prefetch;
}

// True when A's part for this step is to be packed now: the worker has just come to the block.
bool GroupedGemm::begin_step(Worker& worker, const Step& step) {
  if (worker.block_in_a != step.block) {
    worker.block_in_a = step.block;
    worker.packing_task = step.task;
  }
  return worker.packing_task == step.task;
}

void GroupedGemm::run_step(const Call& call, Worker& worker, const Step& step, const Step* next) {
  const Block& block = block_of(step);
  const bool packing = begin_step(worker, step);
  const Segments segments = segments_of(call, step.task);
  const KRange k = k_range(block, step.k_block);
  const Panels b = panels_b(call, worker, block, segments, k);

  const std::int64_t width = ops_.panel_width;
  // fp32 results rest where they belong; others, and those of a partial panel, in the tile of the task.
  bool direct = call.out.data != nullptr && call.out.dtype == DType::kF32;
  std::int64_t tiles_a_panel = 0;
  for (const Segment& segment : segments) {
    direct = direct && segment.count % width == 0;
    tiles_a_panel += ceil_div(segment.count, width);
  }

  // Tiles ask for the weights and first rows of the next step; the first tiles of a panel ask for the rows of the next
  // panel instead, as they are to be packed or already packed.
  Prefetch weights, more_weights, first_rows;
  const float* next_c = nullptr;  // first tile of the next step
  if (next && !block_of(*next).few) {
    const Block& next_block = block_of(*next);
    const Segments coming = segments_of(call, next->task);
    weights = weights_of(call, *next, coming.list[0]);
    if (coming.count == 2) more_weights = weights_of(call, *next, coming.list[1]);
    const std::int64_t next_first_row =
        call.group_ptr[static_cast<std::size_t>(next_block.group)] + next_block.row_begin;
    if (direct) next_c = call.out.row_as<float>(next_first_row) + coming.list[0].first;
    const KRange next_k = k_range(next_block, next->k_block);
    if (next->block != step.block || (packing && next->task == step.task))
      first_rows = rows_of(call.rows_a, next_first_row, next_block.panel_rows, next_k.begin, next_k.steps);
    else
      first_rows =
          packed_rows(worker.a + next->k_block * block.a_floats, kRowStrideA, block.panel_rows, next_k.steps);
    const std::int64_t lines = weights.rows_left * weights.lines_a_row +
                               more_weights.rows_left * more_weights.lines_a_row +
                               first_rows.rows_left * first_rows.lines_a_row;
    const std::int64_t rounds =
        (tiles_a_panel - (tiles_a_panel > 1)) * block.num_panels * (k.steps / kStepsARound);
    weights.lines_a_round = more_weights.lines_a_round = first_rows.lines_a_round =
        ceil_div(lines, std::max<std::int64_t>(1, rounds));
  }

  const std::int64_t first_row = call.group_ptr[static_cast<std::size_t>(block.group)] + block.row_begin;
  const bool last = step.k_block + 1 == block.num_k_blocks, fresh = step.k_block == 0;
  const RowSource& source = call.rows_a;
  const std::int64_t ldc = direct ? call.out.row_stride : kTileStride;
  const auto tile_of_c = [&](std::int64_t row, const Segment& segment) {
    return direct ? call.out.row_as<float>(first_row + row) + segment.first
                  : worker.c + row * kTileStride + segment.tile_col;
  };
  for (std::int64_t row = 0; row < block.rows; row += block.panel_rows) {
    const std::int64_t rows = std::min(block.panel_rows, block.rows - row);
    float* const a = worker.a + (call.keeps_a() ? step.k_block * block.a_floats + row * kRowStrideA : 0);
    const std::int64_t next_rows = std::min(block.panel_rows, block.rows - row - rows);
    Prefetch rows_ahead;
    if (packing) {
      // Each panel right before its first use, so that it is still in cache.
      const std::byte* src = source.index ? source.view.data : source.view.row(first_row + row);
      ops_.copy_rows(src + k.begin * element_bytes(source.view.dtype), source.view.dtype,
                     source.view.row_bytes_stride(), at(source.index, first_row + row), rows, k.steps, a,
                     kRowStrideA);
      rows_ahead = rows_of(source, first_row + row + rows, next_rows, k.begin, k.steps);
    } else {
      rows_ahead = packed_rows(a + rows * kRowStrideA, kRowStrideA, next_rows, k.steps);
    }
    // All of them within one tile: a line holds at least kStepGrain steps of a row.
    rows_ahead.lines_a_round = kStepsARound * kMaxTileRows / kStepGrain + 1;
    const TileFunction tile = ops_.tile_row_major[rows];
    const float* const below = row + rows < block.rows ? tile_of_c(row + rows, segments.list[0]) : next_c;
    for (const Segment& segment : segments) {
      float* const c = tile_of_c(row, segment);
      const float* const after = &segment + 1 < segments.end() ? tile_of_c(row, *(&segment + 1)) : below;
      for (std::int64_t col = 0; col < segment.count; col += width) {
        Prefetch& prefetch = rows_ahead.rows_left > 0 ? rows_ahead : weights;
        tile(k.steps, a, 0, b.data + (segment.tile_col + col) / width * b.panel_stride, b.step_stride,
             c + col, ldc, fresh, col + width < segment.count ? c + col + width : after, prefetch);
        if (weights.rows_left == 0) {
          std::swap(weights, more_weights);
          std::swap(more_weights, first_rows);
        }
      }
    }
    if (last) store_rows(call, worker, block, segments, direct, row, rows);
  }
}

void GroupedGemm::run_few_rows(const Call& call, Worker& worker, const Step& step) {
  const Block& block = block_of(step);
  const std::int64_t first_row = call.group_ptr[static_cast<std::size_t>(block.group)] + block.row_begin;
  const std::int64_t lda = few_rows_stride(block.length);
  if (worker.block_in_a != step.block) {
    const RowSource& source = call.rows_a;
    ops_.copy_rows(source.index ? source.view.data : source.view.row(first_row), source.view.dtype,
                   source.view.row_bytes_stride(), at(source.index, first_row), block.rows, block.length,
                   worker.a, lda);
    worker.block_in_a = step.block;
  }
  const Segments segments = segments_of(call, step.task);
  const std::int64_t element = element_bytes(call.weight_dtype);
  const bool forward = call.kind == Kind::kForward;
  const std::int64_t row_bytes = (forward ? block.length : call.cols) * element;
  const auto rows = static_cast<std::size_t>(block.rows);
  for (const Segment& segment : segments) {
    const std::byte* w =
        call.weights[static_cast<std::size_t>(block.group)] + segment.first * (forward ? row_bytes : element);
    const FewRowsFunction multiply = forward ? ops_.few_rows_transposed[rows] : ops_.few_rows_straight[rows];
    multiply(block.length, worker.a, lda, w, call.weight_dtype, row_bytes, segment.count,
             worker.c + segment.tile_col, kTileStride);
  }
  store_rows(call, worker, block, segments, false, 0, block.rows);
}

void GroupedGemm::run_wgrad_step(const Call& call, Worker& worker, const Step& step, const Step* next) {
  const Block& block = block_of(step);
  const bool packing = begin_step(worker, step);
  const Segments segments = segments_of(call, step.task);
  const Segment& segment = segments.list[0];
  const KRange k = k_range(block, step.k_block);
  Panels a;
  const RowSource& source = call.rows_a;
  const std::int64_t first = call.group_ptr[static_cast<std::size_t>(block.group)] + k.begin;
  if (!source.index && source.view.dtype == DType::kF32 &&
      readable_in_place(k.steps, source.view.row_stride)) {
    a = {source.view.row_as<float>(first) + block.row_begin, block.panel_rows, source.view.row_stride};
  } else {
    float* const packed = worker.a + (call.keeps_a() ? step.k_block * block.a_floats : 0);
    a = {packed, kPanelStrideA, kStepStrideA};
    if (packing) {
      // Columns of dc become rows of A. Whole vectors are copied; the tile ignores the excess.
      const std::byte* src = source.index ? source.view.data : source.view.row(first);
      ops_.copy_panels(src + block.row_begin * element_bytes(source.view.dtype), source.view.dtype,
                       source.view.row_bytes_stride(), at(source.index, first), k.steps,
                       source.view.cols - block.row_begin, block.num_panels, block.panel_rows, packed,
                       kPanelStrideA, kStepStrideA);
    }
  }
  const Panels b = panels_b(call, worker, block, segments, k);

  // Tiles ask for a tile of the gradient that comes after them and for what the next step reads.
  const std::int64_t width = ops_.panel_width;
  Prefetch rows_ahead, more_rows;
  if (next) {
    const Block& next_block = block_of(*next);
    const Segments coming = segments_of(call, next->task);
    const KRange next_k = k_range(next_block, next->k_block);
    const std::int64_t next_first = call.group_ptr[static_cast<std::size_t>(next_block.group)] + next_k.begin;
    rows_ahead = rows_of(call.rows_b, next_first, next_k.steps, coming.list[0].first, coming.list[0].count);
    if (next->block != step.block || (packing && next->task == step.task))
      more_rows = rows_of(call.rows_a, next_first, next_k.steps, next_block.row_begin, next_block.rows);
    const std::int64_t lines =
        rows_ahead.rows_left * rows_ahead.lines_a_row + more_rows.rows_left * more_rows.lines_a_row;
    const std::int64_t rounds = std::max<std::int64_t>(1, k.steps / kStepsARound);
    rows_ahead.lines_a_round = more_rows.lines_a_round =
        ceil_div(lines, rounds * block.num_panels * ceil_div(segment.count, width));
  }

  const auto grads_of = [&](const Step& at_step) {
    const Block& at_block = block_of(at_step);
    return call.grads[static_cast<std::size_t>(at_block.group)] + at_block.row_begin * call.cols +
           segments_of(call, at_step.task).list[0].first;
  };
  float* const grads = grads_of(step);
  const float* const next_grads = next ? grads_of(*next) : nullptr;
  const std::int64_t tiles_a_panel = ceil_div(segment.count, width);
  // Tile i of this step or, past its end, of the next, which has the same shape or nearly so.
  const auto tile_of_c = [&](std::int64_t i) -> const float* {
    const float* base = grads;
    if (i >= block.num_panels * tiles_a_panel) {
      i -= block.num_panels * tiles_a_panel;
      base = next_grads;
    }
    return base ? base + i / tiles_a_panel * block.panel_rows * call.cols + i % tiles_a_panel * width
                : nullptr;
  };
  std::int64_t coming = tiles_ahead(k.steps);
  for (std::int64_t panel = 0; panel < block.num_panels; ++panel) {
    const std::int64_t row = panel * block.panel_rows;
    const std::int64_t rows = std::min(block.panel_rows, block.rows - row);
    const TileFunction tile = ops_.tile_step_major[rows];
    Prefetch next_panel;
    if (a.step_stride == kStepStrideA && panel + 1 < block.num_panels) {
      next_panel = packed_rows(a.data + (panel + 1) * a.panel_stride, 0, 1, k.steps * kStepStrideA);
      next_panel.lines_a_round = kStepsARound;
    }
    for (std::int64_t col = 0; col < segment.count; col += width, ++coming) {
      float* const c = grads + row * call.cols + col;
      const float* const a_panel = a.data + panel * a.panel_stride;
      const float* const b_panel = b.data + col / width * b.panel_stride;
      const float* const coming_c = tile_of_c(coming);
      Prefetch& prefetch = next_panel.rows_left > 0 ? next_panel : rows_ahead;
      const std::int64_t cols = std::min(width, segment.count - col);
      if (cols == width) {
        tile(k.steps, a_panel, a.step_stride, b_panel, b.step_stride, c, call.cols, false, coming_c,
             prefetch);
      } else {
        float* const copy = worker.c;
        for (std::int64_t r = 0; r < rows; ++r) {
          std::copy_n(c + r * call.cols, cols, copy + r * kTileStride);
          std::fill_n(copy + r * kTileStride + cols, width - cols, 0.0f);
        }
        tile(k.steps, a_panel, a.step_stride, b_panel, b.step_stride, copy, kTileStride, false, nullptr,
             prefetch);
        for (std::int64_t r = 0; r < rows; ++r) std::copy_n(copy + r * kTileStride, cols, c + r * call.cols);
      }
      if (rows_ahead.rows_left == 0 && more_rows.rows_left > 0) std::swap(rows_ahead, more_rows);
    }
  }
}

// B of a step: where it lies if its rows are rows of an fp32 matrix and no panel is partial, else packed.
GroupedGemm::Panels GroupedGemm::panels_b(const Call& call, Worker& worker, const Block& block,
                                          const Segments& segments, KRange k) {
  const std::int64_t width = ops_.panel_width;
  if (call.kind != Kind::kForward && segments.list[0].count % width == 0) {
    const auto group = static_cast<std::size_t>(block.group);
    const std::int64_t col = segments.list[0].first;
    const RowSource& source = call.rows_b;
    if (call.kind == Kind::kDgrad) {
      if (call.weight_dtype == DType::kF32 && readable_in_place(k.steps, call.cols))
        return {reinterpret_cast<const float*>(call.weights[group]) + k.begin * call.cols + col, width,
                call.cols};
    } else if (!source.index && source.view.dtype == DType::kF32 &&
               readable_in_place(k.steps, source.view.row_stride)) {
      return {source.view.row_as<float>(call.group_ptr[group] + k.begin) + col, width,
              source.view.row_stride};
    }
  }
  pack_b(call, worker, block, segments, k);
  return {worker.b, panel_stride_b(width), width};
}

void GroupedGemm::pack_b(const Call& call, Worker& worker, const Block& block, const Segments& segments,
                         KRange k) {
  const std::int64_t width = ops_.panel_width;
  const auto group = static_cast<std::size_t>(block.group);
  const std::int64_t element = element_bytes(call.weight_dtype);
  for (const Segment& segment : segments) {
    float* const dst = worker.b + segment.tile_col / width * panel_stride_b(width);
    const std::int64_t num_panels = ceil_div(segment.count, width), panel_stride = panel_stride_b(width);
    if (call.kind == Kind::kForward) {
      const std::int64_t row_bytes = call.rows_a.view.cols * element;
      for (std::int64_t panel = 0; panel < num_panels; ++panel) {
        const std::int64_t done = panel * width;
        ops_.pack_transposed(call.weights[group] + (segment.first + done) * row_bytes + k.begin * element,
                             call.weight_dtype, row_bytes, std::min(width, segment.count - done), k.steps,
                             dst + panel * panel_stride);
      }
    } else if (call.kind == Kind::kDgrad) {
      const std::int64_t row_bytes = call.cols * element;
      ops_.copy_panels(call.weights[group] + k.begin * row_bytes + segment.first * element, call.weight_dtype,
                       row_bytes, nullptr, k.steps, segment.count, num_panels, width, dst, panel_stride,
                       width);
    } else {
      const RowSource& source = call.rows_b;
      const std::int64_t first = call.group_ptr[group] + k.begin;
      const std::byte* src = source.index ? source.view.data : source.view.row(first);
      ops_.copy_panels(src + segment.first * element_bytes(source.view.dtype), source.view.dtype,
                       source.view.row_bytes_stride(), at(source.index, first), k.steps, segment.count,
                       num_panels, width, dst, panel_stride, width);
    }
  }
}

// Rows row_begin..row_begin+rows-1 of the block are complete; `direct`: they are in call.out already.
void GroupedGemm::store_rows(const Call& call, Worker& worker, const Block& block, const Segments& segments,
                             bool direct, std::int64_t row_begin, std::int64_t rows) {
  const std::int64_t first =
      call.group_ptr[static_cast<std::size_t>(block.group)] + block.row_begin + row_begin;
  for (std::int64_t r = 0; r < rows; ++r) {
    float* const c = worker.c + (row_begin + r) * kTileStride;
    if (call.out.data && !direct) {
      for (const Segment& segment : segments)
        ops_.narrow(c + segment.tile_col,
                    call.out.row(first + r) + segment.first * element_bytes(call.out.dtype), call.out.dtype,
                    segment.count);
    }
    if (!call.act.data) continue;
    const Segment &gate = segments.list[0], &up = segments.list[call.gated ? 1 : 0];
    const float* const h = direct ? call.out.row_as<float>(first + r) : nullptr;
    std::byte* const target = call.act.row(first + r) + gate.first * element_bytes(call.act.dtype);
    const bool f32 = call.act.dtype == DType::kF32;
    float* const act = f32 ? reinterpret_cast<float*>(target) : c;
    ops_.activate(call.activation, h ? h + gate.first : c + gate.tile_col, h ? h + up.first : c + up.tile_col,
                  act, gate.count);
    if (!f32) ops_.narrow(act, target, call.act.dtype, gate.count);
  }
}

}  // namespace sluice::kernels
