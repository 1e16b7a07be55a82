#include "sluice/kernels/cpu/grouped_gemm.hpp"

#include <algorithm>

namespace sluice::kernels {

namespace {

// Rows of a block at most: B is packed once a block, so more rows spread that cost; the tile of C (kBlockN
// columns) and B's block should stay in L2 together.
constexpr std::int64_t kBlockRows = 448;
// Floats between two rows of a task's tile of C.
constexpr std::int64_t kTileStride = kBlockN + 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Part `i` of `n` cut into `parts` almost equal parts starts here.
std::int64_t part_begin(std::int64_t n, std::int64_t parts, std::int64_t i) {
  return n * i / parts;
}

// Block `i` of a reduction cut into n blocks starts here: at a multiple of 16 steps, so that packing works on
// whole vectors; no block exceeds kBlockK because that is such a multiple, too.
static_assert(kBlockK % 16 == 0);
std::int64_t k_block_begin(std::int64_t length, std::int64_t n, std::int64_t i) {
  return std::min(length, (part_begin(length, n, i) + 15) / 16 * 16);
}

const std::int32_t* at(const std::int32_t* index, std::int64_t i) {
  return index ? index + i : nullptr;
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
  call.task_cols = call.gated ? kBlockN / 2 : kBlockN;
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
  std::int64_t bytes = static_cast<std::int64_t>(blocks_.capacity() * sizeof(Block));
  for (const Worker& worker : workers_) bytes += worker.a.bytes() + worker.b.bytes() + worker.c.bytes();
  return bytes;
}

std::int64_t GroupedGemm::reduction_length(const Call& call, std::int64_t group) const {
  if (call.kind != Kind::kWgrad) return call.rows_a.view.cols;
  const auto g = static_cast<std::size_t>(group);
  return call.group_ptr[g + 1] - call.group_ptr[g];
}

std::int64_t GroupedGemm::a_floats_a_k_block(const Call& call, std::int64_t rows) const {
  return call.kind == Kind::kWgrad ? num_panels(rows) * kBlockK * kStepStrideA : rows * kRowStrideA;
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
  for (std::size_t g = 0; g + 1 < call.group_ptr.size(); ++g) {
    const std::int64_t group_rows = call.group_ptr[g + 1] - call.group_ptr[g];
    if (group_rows == 0) continue;
    const std::int64_t rows = call.kind == Kind::kWgrad ? call.rows_a.view.cols : group_rows;
    const std::int64_t parts = ceil_div(rows, kBlockRows);
    for (std::int64_t i = 0; i < parts; ++i) {
      const std::int64_t begin = part_begin(rows, parts, i);
      blocks_.push_back({static_cast<std::int64_t>(g), begin, part_begin(rows, parts, i + 1) - begin});
    }
  }
  // Large blocks first, so that what is left at the end is small and the threads finish together.
  if (pool_.num_threads() > 1) {
    std::sort(blocks_.begin(), blocks_.end(), [&](const Block& x, const Block& y) {
      const std::int64_t work_x = x.rows * reduction_length(call, x.group);
      const std::int64_t work_y = y.rows * reduction_length(call, y.group);
      if (work_x != work_y) return work_x > work_y;
      return x.group != y.group ? x.group < y.group : x.row_begin < y.row_begin;
    });
  }
}

void GroupedGemm::reserve_scratch(const Call& call) {
  std::int64_t a_floats = 0, max_rows = 0;
  for (const Block& block : blocks_) {
    const std::int64_t num_k_blocks = ceil_div(reduction_length(call, block.group), kBlockK);
    a_floats = std::max(a_floats, num_k_blocks * a_floats_a_k_block(call, block.rows));
    max_rows = std::max(max_rows, block.rows);
  }
  for (Worker& worker : workers_) {
    worker.block_in_a = -1;
    worker.a.reserve(a_floats);
    worker.b.reserve(kBlockK * kBlockN);
    worker.c.reserve((call.kind == Kind::kWgrad ? ops_.tile_rows : max_rows) * kTileStride);
  }
}

void GroupedGemm::draw_tasks(const Call& call, Worker& worker) {
  // A draw stays within one block, so that its packed A serves all of it, and leaves some for the other
  // threads.
  const std::int64_t draw = std::max<std::int64_t>(1, call.num_tasks_a_block / (2 * pool_.num_threads()));
  const std::int64_t draws_a_block = ceil_div(call.num_tasks_a_block, draw);
  const std::int64_t num_draws = static_cast<std::int64_t>(blocks_.size()) * draws_a_block;
  for (std::int64_t i; (i = next_draw_.fetch_add(1, std::memory_order_relaxed)) < num_draws;) {
    const std::int64_t block = i / draws_a_block;
    const std::int64_t begin = i % draws_a_block * draw;
    const std::int64_t end = std::min(begin + draw, call.num_tasks_a_block);
    for (std::int64_t task = begin; task < end; ++task) run_task(call, worker, block, task);
  }
}

void GroupedGemm::run_task(const Call& call, Worker& worker, std::int64_t block_number, std::int64_t task) {
  const Block& block = blocks_[static_cast<std::size_t>(block_number)];
  if (worker.block_in_a != block_number) {
    pack_a(call, worker, block);
    worker.block_in_a = block_number;
  }
  Segment segments[2];
  std::size_t num_segments = 1;
  const std::int64_t first = task * call.task_cols;
  if (call.gated) {
    const std::int64_t ffn = call.cols / 2;
    const std::int64_t count = std::min(call.task_cols, ffn - first);
    segments[0] = {first, count, 0};
    segments[1] = {ffn + first, count, call.task_cols};
    num_segments = 2;
  } else {
    segments[0] = {first, std::min(call.task_cols, call.cols - first), 0};
  }
  const std::span<const Segment> used(segments, num_segments);

  const std::int64_t length = reduction_length(call, block.group);
  const std::int64_t num_k_blocks = ceil_div(length, kBlockK);
  const std::int64_t panels = num_panels(block.rows);
  const std::int64_t width = ops_.panel_width;
  const bool wgrad = call.kind == Kind::kWgrad;
  for (std::int64_t kb = 0; kb < num_k_blocks; ++kb) {
    const std::int64_t k_begin = k_block_begin(length, num_k_blocks, kb);
    const std::int64_t steps = k_block_begin(length, num_k_blocks, kb + 1) - k_begin;
    pack_b(call, worker, block, used, k_begin, steps);
    const float* a_block = worker.a.data() + kb * a_floats_a_k_block(call, block.rows);
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t row = part_begin(block.rows, panels, panel);
      const std::int64_t rows = part_begin(block.rows, panels, panel + 1) - row;
      if (wgrad) {
        multiply_into_grads(call, worker, block, used, row, rows, a_block + panel * kBlockK * kStepStrideA,
                            steps);
        continue;
      }
      const TileFunction tile = ops_.tile_row_major[rows];
      for (const Segment& segment : used) {
        const std::int64_t end = segment.tile_col + segment.count;
        for (std::int64_t col = segment.tile_col; col < end; col += width)
          tile(steps, a_block + row * kRowStrideA, worker.b.data() + col * kBlockK,
               worker.c.data() + row * kTileStride + col, kTileStride, kb == 0);
      }
      if (kb + 1 == num_k_blocks) store_rows(call, worker, block, used, row, rows);
    }
  }
}

void GroupedGemm::pack_a(const Call& call, Worker& worker, const Block& block) {
  const std::int64_t group_begin = call.group_ptr[static_cast<std::size_t>(block.group)];
  const RowSource& source = call.rows_a;
  const auto element = static_cast<std::int64_t>(size_of(source.view.dtype));
  const std::int64_t row_bytes = source.view.row_bytes_stride();
  const std::int64_t length = reduction_length(call, block.group);
  const std::int64_t num_k_blocks = ceil_div(length, kBlockK);
  for (std::int64_t kb = 0; kb < num_k_blocks; ++kb) {
    const std::int64_t k_begin = k_block_begin(length, num_k_blocks, kb);
    const std::int64_t steps = k_block_begin(length, num_k_blocks, kb + 1) - k_begin;
    float* dst = worker.a.data() + kb * a_floats_a_k_block(call, block.rows);
    if (call.kind != Kind::kWgrad) {
      const std::int64_t first = group_begin + block.row_begin;
      const std::byte* src = (source.index ? source.view.data : source.view.row(first)) + k_begin * element;
      ops_.copy_rows(src, source.view.dtype, row_bytes, at(source.index, first), block.rows, steps, dst,
                     kRowStrideA, steps);
      continue;
    }
    // Columns of dc become rows of A. Whole vectors are copied where the row has them; the tile ignores the
    // excess.
    const std::int64_t first = group_begin + k_begin;
    const std::byte* src = source.index ? source.view.data : source.view.row(first);
    const std::int64_t panels = num_panels(block.rows);
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t col = block.row_begin + part_begin(block.rows, panels, panel);
      const std::int64_t cols = std::min(kStepStrideA, source.view.cols - col);
      ops_.copy_rows(src + col * element, source.view.dtype, row_bytes, at(source.index, first), steps, cols,
                     dst + panel * kBlockK * kStepStrideA, kStepStrideA, cols);
    }
  }
}

void GroupedGemm::pack_b(const Call& call, Worker& worker, const Block& block,
                         std::span<const Segment> segments, std::int64_t k_begin, std::int64_t steps) {
  const std::int64_t width = ops_.panel_width;
  const auto group = static_cast<std::size_t>(block.group);
  for (const Segment& segment : segments) {
    for (std::int64_t done = 0; done < segment.count; done += width) {
      const std::int64_t col = segment.first + done;
      const std::int64_t cols = std::min(width, segment.count - done);
      float* dst = worker.b.data() + (segment.tile_col + done) * kBlockK;
      if (call.kind == Kind::kWgrad) {
        const RowSource& source = call.rows_b;
        const std::int64_t first = call.group_ptr[group] + k_begin;
        const std::byte* src = source.index ? source.view.data : source.view.row(first);
        ops_.copy_rows(src + col * static_cast<std::int64_t>(size_of(source.view.dtype)), source.view.dtype,
                       source.view.row_bytes_stride(), at(source.index, first), steps, cols, dst, width,
                       width);
        continue;
      }
      const auto element = static_cast<std::int64_t>(size_of(call.weight_dtype));
      if (call.kind == Kind::kForward) {
        const std::int64_t row_bytes = call.rows_a.view.cols * element;
        ops_.pack_transposed(call.weights[group] + col * row_bytes + k_begin * element, call.weight_dtype,
                             row_bytes, cols, steps, dst);
      } else {
        const std::int64_t row_bytes = call.cols * element;
        ops_.copy_rows(call.weights[group] + k_begin * row_bytes + col * element, call.weight_dtype,
                       row_bytes, nullptr, steps, cols, dst, width, width);
      }
    }
  }
}

void GroupedGemm::multiply_into_grads(const Call& call, Worker& worker, const Block& block,
                                      std::span<const Segment> segments, std::int64_t row_begin,
                                      std::int64_t rows, const float* a, std::int64_t steps) {
  const TileFunction tile = ops_.tile_step_major[rows];
  float* grads =
      call.grads[static_cast<std::size_t>(block.group)] + (block.row_begin + row_begin) * call.cols;
  for (const Segment& segment : segments) {
    for (std::int64_t done = 0; done < segment.count; done += ops_.panel_width) {
      float* c = grads + segment.first + done;
      const float* b = worker.b.data() + (segment.tile_col + done) * kBlockK;
      const std::int64_t cols = std::min(ops_.panel_width, segment.count - done);
      if (cols == ops_.panel_width) {
        tile(steps, a, b, c, call.cols, false);
        continue;
      }
      float* copy = worker.c.data();
      for (std::int64_t r = 0; r < rows; ++r) {
        std::copy_n(c + r * call.cols, cols, copy + r * kTileStride);
        std::fill_n(copy + r * kTileStride + cols, ops_.panel_width - cols, 0.0f);
      }
      tile(steps, a, b, copy, kTileStride, false);
      for (std::int64_t r = 0; r < rows; ++r) std::copy_n(copy + r * kTileStride, cols, c + r * call.cols);
    }
  }
}

void GroupedGemm::store_rows(const Call& call, Worker& worker, const Block& block,
                             std::span<const Segment> segments, std::int64_t row_begin, std::int64_t rows) {
  const std::int64_t first =
      call.group_ptr[static_cast<std::size_t>(block.group)] + block.row_begin + row_begin;
  const auto out_element = static_cast<std::int64_t>(size_of(call.out.dtype));
  const auto act_element = static_cast<std::int64_t>(size_of(call.act.dtype));
  for (std::int64_t r = 0; r < rows; ++r) {
    float* c = worker.c.data() + (row_begin + r) * kTileStride;
    if (call.out.data) {
      for (const Segment& segment : segments)
        ops_.narrow(c + segment.tile_col, call.out.row(first + r) + segment.first * out_element,
                    call.out.dtype, segment.count);
    }
    if (call.act.data) {
      const Segment& gate = segments.front();
      ops_.activate(call.activation, c, call.gated ? c + segments.back().tile_col : nullptr, c, gate.count);
      ops_.narrow(c, call.act.row(first + r) + gate.first * act_element, call.act.dtype, gate.count);
    }
  }
}

}  // namespace sluice::kernels
