// A training step in its steady state allocates nothing: batch, forward, plan, exchange, backward, sums over ranks and
// optimizer, of all ranks and their compute threads.
//
// Counted: every operator new of the program, aligned ones too, which is what containers, GrowArray, shared pointers and
// std::function use. Not counted: malloc called directly, as by C libraries (the C++ library's exceptions, stdio).
#include <atomic>
#include <cstdlib>
#include <new>

#include "sluice/runtime/src/context_storage.hpp"
#include "train_harness.hpp"

namespace {

std::atomic<bool> counting{false};
std::atomic<std::int64_t> num_allocations{0};

void* counted(std::size_t size, std::size_t alignment) {
  if (counting.load(std::memory_order_relaxed)) num_allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = nullptr;
  if (alignment <= alignof(std::max_align_t))
    memory = std::malloc(size == 0 ? 1 : size);
  else if (posix_memalign(&memory, alignment, size == 0 ? alignment : size) != 0)
    memory = nullptr;
  return memory;
}

void* counted_or_throw(std::size_t size, std::size_t alignment) {
  void* memory = counted(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// Not inlined: a compiler that sees through `delete` alone finds free() on what came from `new`.
[[gnu::noinline]] void* operator new(std::size_t size) {
  return counted_or_throw(size, 1);
}
void* operator new[](std::size_t size) {
  return counted_or_throw(size, 1);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return counted_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return counted_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return counted(size, 1);
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return counted(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

namespace sluice::testing {
namespace {

// Allocations of all ranks in `measured` steps after `settling` ones. Batches repeat with period `period`.
std::int64_t allocations(const LoadedConfig& loaded, std::int32_t num_ranks, int settling, int measured,
                         int period) {
  const train::Text text = word_text(20000);
  num_allocations = 0;
  run_job(loaded, num_ranks, [&](Runtime& runtime) {
    const train::TextSplit split(static_cast<std::int64_t>(text.bytes.size()), loaded.config.model.context,
                                 0.1);
    train::BatchReader reader(text, split, loaded.config, runtime.rank(), num_ranks);
    train::Model model(runtime, loaded.config);
    SpanRecorder recorder(runtime.rank(), 1000);
    runtime.set_recorder(&recorder);
    for (int step = 1; step <= settling + measured; ++step) {
      if (step == settling + 1) {
        runtime.barrier();
        counting = true;
      }
      const train::StepResult result = model.compute_gradients(reader.train(step % period + 1));
      model.update(train::optimizer(loaded.config.train, step), loaded.config.train.grad_clip,
                   result.grad_norm);
    }
    runtime.barrier();
    counting = false;
    runtime.set_recorder(nullptr);
  });
  return num_allocations;
}

TEST(TrainAllocation, TheHookCounts) {
  num_allocations = 0;
  counting = true;
  int* volatile kept = new int(1);  // a pair that nobody looks at may be left out by the compiler
  delete kept;
  std::vector<double> v(10);
  GrowArray<float> aligned;
  aligned.resize(10);
  RowBuffer rows;
  rows.resize(3, 4, DType::kF32);
  counting = false;
  EXPECT_EQ(num_allocations, 4);
}

TEST(TrainAllocation, NoneInTheSteadyStateOfAStep) {
  // Routes repeat: weights stay (no learning rate), and lambda and biases too.
  const std::vector<std::string> fixed = {"train.learning_rate=0", "routing.relu_alpha=1", "topology.nodes=2",
                                          "model.copy_experts=1", "model.zero_experts=1"};
  for (const std::vector<std::string>& sets : std::vector<std::vector<std::string>>{
           {},
           {"schedule.policy=pipelined", "schedule.num_chunks=3"},
           {"schedule.exchange=direct", "runtime.save=rows"},
           {"routing.policy=softmax_topk", "routing.z_loss=0.01", "routing.aux_loss=0.01"},
           {"routing.policy=sigmoid_topk", "routing.bias_update=0"},
           {"model.dtype=bf16", "runtime.threads_per_rank=2"},
           {"comm.wire_dtype=bf16"},
           {"model.chain_iterations=3", "model.chain_residual=inner", "model.shared_ffn=10",
            "schedule.chain_chunks=3", "routing.policy=softmax_topk"}}) {
    std::vector<std::string> all = fixed;
    all.insert(all.end(), sets.begin(), sets.end());
    EXPECT_EQ(allocations(tiny_config(all), 4, 8, 8, 2), 0) << (sets.empty() ? "defaults" : sets[0]);
  }
}

}  // namespace
}  // namespace sluice::testing
