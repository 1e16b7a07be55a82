// Grouped GEMM of an MoE layer on an NVIDIA GPU: bf16 operands, fp32 accumulation. Compute capability 9.0 (Hopper) has a
// kernel of its own; a portable one (several times slower) serves all others from 8.0.
// Group sizes are read from device memory, so no call waits for the device and every call can be captured in a CUDA
// graph and replayed with other sizes.
//
// Ownership: every pointer is device memory of the current device, owned by the caller, valid until the stream passed
// the call. No call allocates device memory or synchronises. Thread-safety: calls are independent of each other; on one
// stream they run in order. Blocking: none on the host; on the device only where `arrival` says so, with a deadline.
// Errors: shapes, alignment and pointers are checked before the launch (kInvalidArgument names the argument); a device
// below compute capability 8.0 gives kNotSupported; a failing launch kInternal with the runtime's text. What lies in device memory
// is trusted, but rows outside 0..num_rows-1 are never touched.
//
// Result contract: an element of a forward or dgrad result is one fp32 sum in a fixed order over the reduction index
// (blocks of 16 ascending, each added by one tensor-core instruction), rounded once. It depends on that row and the
// weights alone: not on the number of rows, groups or tiles, on their order, or on the processors used. wgrad adds one
// such sum over the rows of a group, in order, to the gradient with one fp32 addition. No split sums: same inputs, same
// bits. (The tensor core's own order inside 16 terms is not an fma chain, so bits differ from the CPU's.)
//
// Alignment (TMA): bases 16 bytes; leading dimensions and group strides multiples of 8 bf16 elements; columns (in, out)
// multiples of 8, and for SwiGLU ffn = out/2 a multiple of 8. Rows: any number, any group boundaries. Best speed: in and
// out multiples of 256.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace sluice::kernels::cuda {

using Stream = CUstream_st*;  // cudaStream_t

inline constexpr int kMaxGemmGroups = 512;  // groups of one call

// The first wait that passed its deadline; zero before the call. Device or pinned host memory.
struct WaitDiagnosis {
  std::uint32_t expired;     // 1: the fields below are set and the results of the call are undefined
  std::uint32_t flag_index;  // the flag that did not arrive
  std::uint32_t expected;
  std::uint32_t observed;
};

// Rows that arrive while the kernel runs: flag i covers rows i*rows_per_flag .. (i+1)*rows_per_flag-1 of the operand.
// A tile is loaded once every flag over its rows reached `value` (as a signed distance, so flags may wrap). The writer
// stores the rows, then the flag with release semantics at system scope.
struct Arrival {
  const std::uint32_t* flags = nullptr;  // uint32 [ceil(num_rows / rows_per_flag)]; null: no waits
  std::int32_t rows_per_flag = 64;
  std::uint32_t value = 1;
  std::uint64_t timeout_ns = 2'000'000'000;  // of one wait
  WaitDiagnosis* diagnosis = nullptr;        // required with flags
};

enum class GemmPath : std::uint8_t {
  kBest,      // what the device has
  kPortable,  // the portable kernel, also on a Hopper (to test and to time it)
};

// Tiles taken one after another from a counter instead of a fixed share each: who starts late, because others had its
// processors, or is slow does fewer. Several launches of the same call may share the tiles: each does what is left. Which
// bits a result has does not depend on it.
struct GemmTickets {
  std::uint32_t* next = nullptr;  // uint32 [1], 0 before and again 0 after all launches; null: fixed shares
  int sms = 0;  // the sum of the max_sms of all launches that share `next`; 0: this launch alone
};

// Which rows belong to which group, and in which order groups are worked on.
struct GemmGroups {
  const std::int64_t* group_ptr =
      nullptr;  // int64 [num_groups + 1], ascending; group g: group_ptr[g]..group_ptr[g+1]-1
  const std::int32_t* order =
      nullptr;  // int32 [num_groups]: groups started first, each at most once, -1: none; null: 0, 1, ...
  const std::int32_t* weight_index =
      nullptr;                // int32 [num_groups]: which weight a group uses (several may use one: the
                              // segments of one expert's rows by origin); null: its own number
  int num_groups = 0;         // <= kMaxGemmGroups
  std::int64_t num_rows = 0;  // rows the row buffers hold, >= group_ptr[num_groups]
  Arrival arrival;
  int max_sms = 0;      // processors used at most (even; 0: all), so that communication can have the others
  GemmTickets tickets;  // forward and dgrad; wgrad has fixed shares only
  GemmPath path = GemmPath::kBest;
};

// bf16 weights [num_weights][out, in], row-major: group w at base + w * stride elements.
struct GemmWeights {
  const void* base = nullptr;
  std::int64_t num_weights = 0;
  std::int64_t stride = 0;  // elements from one weight to the next, >= out * in
  std::int64_t out = 0;
  std::int64_t in = 0;
};

enum class GemmActivation : std::uint8_t { kNone, kSwiGLU, kGelu, kRelu };

// A bf16 row-major matrix of num_rows rows; null data where a result is not wanted.
struct GemmRows {
  void* data = nullptr;
  std::int64_t stride = 0;  // elements from one row to the next
};
struct ConstGemmRows {
  const void* data = nullptr;
  std::int64_t stride = 0;
};

// Token rows that lie in up to two places: row p is first[index[p]], or second[~index[p]] where index[p] is negative. An
// index past its place's rows is taken for the last one: it is never followed. With groups.arrival, its first flag says
// that all of `second` is there (rows_per_flag does not count); tiles whose rows are all in `first` do not wait.
struct GatheredRows {
  const std::int32_t* index = nullptr;  // int32 [groups.num_rows]
  ConstGemmRows first;                  // bf16 [first_rows, in]
  std::int64_t first_rows = 0;
  ConstGemmRows second;  // bf16 [second_rows, in]; null: all rows are in `first`
  std::int64_t second_rows = 0;
};

// h[p] = W_g a[p];  act[p] = activation(h[p]) rounded from the unrounded fp32 h.
// a: bf16 [num_rows, in]; h: bf16 [num_rows, out] or null; act: bf16 [num_rows, out, or out/2 for SwiGLU] or null. With kNone
// only h is written. SwiGLU: weights hold W1 above W3 (out = 2*ffn), act = silu(W1 a) * (W3 a).
void grouped_gemm_forward(const GemmGroups& groups, const GemmWeights& weights, ConstGemmRows a, GemmRows h,
                          GemmRows act, GemmActivation activation, Stream stream);

// The same with rows that the call fetches from where they lie: the same bits as of rows laid out by position.
void grouped_gemm_forward(const GemmGroups& groups, const GemmWeights& weights, const GatheredRows& a,
                          GemmRows h, GemmRows act, GemmActivation activation, Stream stream);

// Whether that is faster than laying the rows out first. Products take about 2% longer where rows are fetched, a pass that lays
// them out takes time by 1 / out of the products': measured 6% of them at out = 3072, 5% at 4096, 1% at 28672.
constexpr bool gathering_pays(std::int64_t out) {
  return out <= 8192;
}

// da[p] = W_g^T dc[p].  dc: bf16 [num_rows, out]; da: bf16 [num_rows, in].
void grouped_gemm_dgrad(const GemmGroups& groups, const GemmWeights& weights, ConstGemmRows dc, GemmRows da,
                        Stream stream);

// What becomes of a gradient that is there already.
enum class GradientUpdate : std::uint8_t {
  kAdd,  // sums are added to it
  kWrite,  // it is overwritten, whatever it is: as kAdd on zeros, but nobody has to write the zeros and read them
};

// dW_g[o][i] += sum over rows p of group g, in order, of dc[p][o] * a[p][i].
// dc: bf16 [num_rows, out]; a: bf16 [num_rows, in]; grads: f32 [num_groups][out, in], group g at base + g * grad_stride
// elements, rows contiguous. groups.weight_index must be null (two groups must not add to one gradient). A group without
// rows is left alone, or with kWrite set to zeros.
void grouped_gemm_wgrad(const GemmGroups& groups, ConstGemmRows dc, std::int64_t out, ConstGemmRows a,
                        std::int64_t in, float* grads, std::int64_t grad_stride, GradientUpdate update,
                        Stream stream);

}  // namespace sluice::kernels::cuda
