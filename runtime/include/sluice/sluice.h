// The C interface of Sluice: the layer and the dispatcher for any language that can call C. Plain C11, self-contained.
//
// Handles are opaque. Whatever a handle refers to is kept alive by counting references: a context keeps its layer, a
// layer its runtime. So handles may be destroyed in any order, from any thread (a garbage collector's for one), also
// while a call on another object of the same rank is running: what is destroyed then goes at that call's end. NULL may
// be destroyed. Using a handle after destroying it is undefined.
// WRONG: leaving it to a garbage collector when contexts go - contexts of a layer share numbered channels, so ranks must
// destroy them in the same order between the same plans; the next plan says so (SLUICE_DISAGREEMENT).
//
// Structures begin with struct_size = sizeof(the structure); SLUICE_INIT(type) sets it and makes every other member
// zero, which means its default. A smaller structure of an earlier version is accepted; in a larger one of a later
// version the part that this library does not know must be zero.
//
// Results. Every call that can fail returns a sluice_status and sets its output handles to NULL when it does. The detail
// of a thread's last failure is in sluice_last_error_message(); calls that succeed leave it. No exception leaves the
// library. The status's scope says what is broken: after SLUICE_SCOPE_GROUP only destruction is of use.
//
// Threads. A runtime is one rank: its calls and those of its layers, dispatchers, plans and contexts come from one thread
// at a time; a second one is refused (SLUICE_INVALID_STATE). Exceptions: destruction, sluice_runtime_abort,
// sluice_runtime_async_error, and the getters that take a const pointer to a plan, which any thread may call.
// Calls marked collective are made by all ranks in the same order; they block, with the runtime's deadline. A rank that
// fails before it could take part (a bad argument) leaves the others waiting: correct and repeat the call, or
// sluice_runtime_abort.
//
// Arrays are the caller's. Shapes are row-major; a matrix may have rows apart from each other (row_stride). A pointer to
// an array without elements may be NULL. `stream` orders device work; on the CPU it must be NULL.
#ifndef SLUICE_SLUICE_H
#define SLUICE_SLUICE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SLUICE_API __attribute__((visibility("default")))
#else
#define SLUICE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Grows when something that exists changes its meaning; additions do not count.
#define SLUICE_ABI_VERSION 1

// struct_size set, zero elsewhere: sluice_layer_options options = SLUICE_INIT(sluice_layer_options);
#ifdef __cplusplus
#define SLUICE_INIT(type) sluice_init<type>()
#else
#define SLUICE_INIT(type) \
  { .struct_size = sizeof(type) }
#endif

// ---- status ---------------------------------------------------------------------------------------------------------

typedef int32_t sluice_status;
enum {
  SLUICE_OK = 0,
  SLUICE_INVALID_ARGUMENT = 1,
  SLUICE_INVALID_CONFIG = 2,
  SLUICE_INVALID_ROUTING = 3,
  SLUICE_INVALID_STATE = 4,
  SLUICE_NOT_SUPPORTED = 5,
  SLUICE_NOT_FOUND = 6,
  SLUICE_IO = 7,
  SLUICE_OUT_OF_MEMORY = 8,
  SLUICE_DISAGREEMENT = 9,
  SLUICE_TIMEOUT = 10,
  SLUICE_PEER_LOST = 11,
  SLUICE_ABORTED = 12,
  SLUICE_TRANSPORT = 13,
  SLUICE_INTERNAL = 14
};

// The largest thing that a failure breaks.
typedef int32_t sluice_scope;
enum {
  SLUICE_SCOPE_CALL = 0,     // this call only
  SLUICE_SCOPE_CONTEXT = 1,  // one plan or context
  SLUICE_SCOPE_GROUP = 2,    // the group of ranks
  SLUICE_SCOPE_PROCESS = 3   // nothing in this process can be trusted
};

// "0.1.0"; static
SLUICE_API const char* sluice_version(void);
// SLUICE_ABI_VERSION of the library; compare it with the header's.
SLUICE_API int32_t sluice_abi_version(void);
// "invalid argument"; static, also for unknown values
SLUICE_API const char* sluice_status_name(sluice_status status);
SLUICE_API sluice_scope sluice_status_scope(sluice_status status);
// "call"; static
SLUICE_API const char* sluice_scope_name(sluice_scope scope);
// Of this thread's last failure: one sentence that names the thing, the value and what was allowed (long ones are cut);
// "" when nothing failed yet. Valid until the thread's next failure.
SLUICE_API const char* sluice_last_error_message(void);
SLUICE_API sluice_status sluice_last_error_status(void);
SLUICE_API sluice_scope sluice_last_error_scope(void);

// ---- values ---------------------------------------------------------------------------------------------------------

typedef int32_t sluice_dtype;
enum { SLUICE_F32 = 0, SLUICE_BF16 = 1 };

// dtype [rows, cols]; row_stride in elements, 0 means cols. data may be NULL when rows is 0.
typedef struct sluice_matrix {
  void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  sluice_dtype dtype;
  int32_t reserved;  // 0
} sluice_matrix;
typedef struct sluice_const_matrix {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  sluice_dtype dtype;
  int32_t reserved;  // 0
} sluice_const_matrix;

// Memory of contexts (received rows, saved activations). Both functions or none (then the heap). allocate returns memory
// aligned to `alignment`, or NULL; deallocate gets what allocate got. Called by the thread in a call, or the one that
// destroys the last handle; never in the steady state of a step.
typedef struct sluice_allocator {
  void* (*allocate)(size_t bytes, size_t alignment, void* user);
  void (*deallocate)(void* memory, size_t bytes, size_t alignment, void* user);
  void* user;
} sluice_allocator;

// ---- group and runtime ----------------------------------------------------------------------------------------------

// Ranks of one process, one for each thread that plays a rank.
typedef struct sluice_group sluice_group;
// One rank: its transport, its kernels, its share of the collectives.
typedef struct sluice_runtime sluice_runtime;

// Ranks and nodes. Links with a speed above 0 are emulated (local groups only).
typedef struct sluice_topology {
  size_t struct_size;
  int32_t num_ranks;
  int32_t num_nodes;            // equal nodes of consecutive ranks; 0 means 1. With node_of_rank: 0, or their number
  const int32_t* node_of_rank;  // int32 [num_ranks], nodes 0..; NULL: as num_nodes says
  double in_node_bytes_per_s;
  double across_nodes_bytes_per_s;
  int64_t in_node_latency_ns;
  int64_t across_nodes_latency_ns;
} sluice_topology;

typedef int32_t sluice_device;
enum {
  SLUICE_CPU = 0,
  SLUICE_CUDA = 1  // a GPU of this process; ranks of a node take them in turns
};

typedef struct sluice_runtime_options {
  size_t struct_size;
  int64_t timeout_ms;        // how long a wait may go without anything arriving; 0 means 30000
  int32_t threads_per_rank;  // compute threads, the calling one among them; 0 means 1
  int32_t reserved;          // 0
  sluice_allocator allocator;
  sluice_device device;      // who computes experts
  int32_t reserved2;         // 0
} sluice_runtime_options;

// options: NULL for the defaults
SLUICE_API sluice_status sluice_group_create_local(const sluice_topology* topology,
                                                   const sluice_runtime_options* options, sluice_group** group);
// -1 for NULL
SLUICE_API int32_t sluice_group_num_ranks(const sluice_group* group);
// Takes rank `rank` out of the group, once; the runtime does not need the group any more. Ranks that are never taken go
// with the group, and the others learn that they are lost. Any thread.
SLUICE_API sluice_status sluice_group_take_runtime(sluice_group* group, int32_t rank, sluice_runtime** runtime);
SLUICE_API void sluice_group_destroy(sluice_group* group);

// Collective. One rank of a group that was launched outside (sluice launch, mpirun, srun, torchrun), over a transport loaded on
// demand: "mpi", "shm", "tcp", "ucx", or from GPU to GPU "nvlink", "nccl" (with the device SLUICE_CUDA).
// nodes: overrides the discovered nodes; NULL discovers.
SLUICE_API sluice_status sluice_runtime_create(const char* transport, const sluice_topology* nodes,
                                               const sluice_runtime_options* options, sluice_runtime** runtime);
// When the last handle of a rank is gone its transport closes; whoever still waits for it gets SLUICE_PEER_LOST.
SLUICE_API void sluice_runtime_destroy(sluice_runtime* runtime);
// -1 for NULL
SLUICE_API int32_t sluice_runtime_rank(const sluice_runtime* runtime);
SLUICE_API int32_t sluice_runtime_num_ranks(const sluice_runtime* runtime);
SLUICE_API int32_t sluice_runtime_num_nodes(const sluice_runtime* runtime);
// The GPU of a rank over nvlink or nccl, as CUDA numbers it in this process; else -1
SLUICE_API int32_t sluice_runtime_gpu(const sluice_runtime* runtime);

// SLUICE_OK while the group lives, else why it ended, with the detail. Any thread, at any time.
SLUICE_API sluice_status sluice_runtime_async_error(const sluice_runtime* runtime);
// Ends the group because of a failure on this rank that the others cannot see. reason: may be NULL. Any thread.
SLUICE_API sluice_status sluice_runtime_abort(sluice_runtime* runtime, const char* reason);

// Collective. Sums element-wise over the ranks, ascending: the same bits on every rank. data: f32 or f64 [n]
SLUICE_API sluice_status sluice_runtime_all_reduce_f32(sluice_runtime* runtime, float* data, int64_t n);
SLUICE_API sluice_status sluice_runtime_all_reduce_f64(sluice_runtime* runtime, double* data, int64_t n);
// Collective. values: int64 [n]; gathered: int64 [num_ranks * n]
SLUICE_API sluice_status sluice_runtime_all_gather_i64(sluice_runtime* runtime, const int64_t* values, int64_t n,
                                                       int64_t* gathered);
// Collective. Overwrites data (n bytes on every rank) with root's.
SLUICE_API sluice_status sluice_runtime_broadcast(sluice_runtime* runtime, void* data, int64_t n, int32_t root);
// Collective.
SLUICE_API sluice_status sluice_runtime_barrier(sluice_runtime* runtime);

// ---- placement ------------------------------------------------------------------------------------------------------

// Which copies of which experts live where. An ffn expert has at least one slot and at most one on a rank; zero and copy
// experts have none: every rank computes them for its own tokens.
typedef int32_t sluice_expert_kind;
enum { SLUICE_EXPERT_FFN = 0, SLUICE_EXPERT_ZERO = 1, SLUICE_EXPERT_COPY = 2 };

// Arrays are read during the call only. All ranks give the same.
typedef struct sluice_placement {
  size_t struct_size;
  int32_t num_experts;
  int32_t num_slots;
  const int32_t* slot_expert;       // int32 [num_slots]
  const int32_t* slot_rank;         // int32 [num_slots]
  const int32_t* slot_local_index;  // int32 [num_slots], 0.. without gaps on each rank; NULL: in the order given
  const int32_t* expert_kind;       // int32 [num_experts]; NULL: all ffn
  uint64_t version;                 // of the placement in a run
} sluice_placement;

// Each ffn expert once, ascending over the ranks, as even as it goes. Writes int32 [num_slots] to slot_expert,
// slot_rank and slot_local_index (each may be NULL), where num_slots, the number of ffn experts, must not exceed
// capacity. expert_kind: as above. num_slots: may be NULL
SLUICE_API sluice_status sluice_placement_contiguous(int32_t num_experts, int32_t num_ranks,
                                                     const int32_t* expert_kind, int32_t capacity,
                                                     int32_t* slot_expert, int32_t* slot_rank,
                                                     int32_t* slot_local_index, int32_t* num_slots);

// ---- routing and plan -----------------------------------------------------------------------------------------------

// The numbers of one batch's routing: who sends which rows where. Belongs to the layer or dispatcher that made it.
typedef struct sluice_plan sluice_plan;

typedef int32_t sluice_routing_format;
enum {
  SLUICE_ROUTING_CSR = 0,      // row_ptr, expert, weight
  SLUICE_ROUTING_TOP_K = 1,    // expert and weight [num_tokens, k]; expert -1 for none, in any order within a token
  SLUICE_ROUTING_MULTI_HOT = 2 // map and weight [num_tokens, num_experts]: a route where map is not 0
};

// Arrays are read during the call only. dw comes back in the order of `weight`; where there is no route it is 0.
typedef struct sluice_routing {
  size_t struct_size;
  sluice_routing_format format;
  int32_t k;               // top-k only
  int64_t num_tokens;
  int64_t num_weights;     // elements of weight: routes, num_tokens * k, or num_tokens * num_experts
  const int64_t* row_ptr;  // CSR: int64 [num_tokens + 1], from 0, ascending
  const int32_t* expert;   // CSR: int32 [num_weights], ascending and unique within a token. Top-k: [num_tokens, k]
  const uint8_t* map;      // multi-hot: uint8 [num_tokens, num_experts]
  const float* weight;     // f32 [num_weights], finite
} sluice_routing;

// Rows and routes of this rank's tokens by how far they go; "flat" is an exchange without de-duplication.
typedef struct sluice_plan_info {
  size_t struct_size;  // set by the caller
  int64_t num_tokens;
  int64_t num_routes;
  int64_t num_weights;      // as in the routing: elements of dw
  int64_t num_experts;
  int64_t num_local_slots;
  int64_t received_rows;    // rows that this rank's experts work on
  int64_t received_routes;
  int64_t handed_on_rows;   // rows that this rank receives for others of its node
  int64_t rows_same_rank;
  int64_t rows_in_node;
  int64_t rows_across_nodes;
  int64_t flat_rows_in_node;
  int64_t flat_rows_across_nodes;
  int64_t routes_everywhere;
  uint64_t placement_version;
  uint64_t agreement_hash;  // equal on all ranks
} sluice_plan_info;

// What this rank receives, row by row, by source rank, then token. Pointers are valid as long as the plan's handle.
typedef struct sluice_received {
  size_t struct_size;  // set by the caller
  int64_t num_rows;
  int64_t num_routes;
  const int64_t* source_ptr;         // int64 [num_ranks + 1]: rows of rank r are source_ptr[r] .. source_ptr[r+1]-1
  const int32_t* token;              // int32 [num_rows], at the source
  const int64_t* route_ptr;          // int64 [num_rows + 1]: routes of a row, experts ascending
  const int32_t* slot;               // int32 [num_routes], local slot of this rank
  const float* weight;               // f32 [num_routes]
  const int32_t* position_of_route;  // int32 [num_routes], place among all routes ordered by slot, then receive order
} sluice_received;

SLUICE_API sluice_status sluice_plan_get_info(const sluice_plan* plan, sluice_plan_info* info);
SLUICE_API sluice_status sluice_plan_get_received(const sluice_plan* plan, sluice_received* received);
// A few lines of text about rows and bytes per level, for rows of row_bytes bytes. Writes at most `capacity` bytes, the
// closing 0 included; *needed (may be NULL) is what the whole text takes. buffer may be NULL when capacity is 0.
SLUICE_API sluice_status sluice_plan_explain(const sluice_plan* plan, int64_t row_bytes, char* buffer, size_t capacity,
                                             size_t* needed);
SLUICE_API void sluice_plan_destroy(sluice_plan* plan);

// ---- layer ----------------------------------------------------------------------------------------------------------

// One Mixture-of-Experts layer: y_t = sum over the routes (e, w) of token t of w * E_e(x_t).
typedef struct sluice_layer sluice_layer;
// What lies between a forward and its backward, or a dispatch and its combine. Pins its plan. Many may be alive.
typedef struct sluice_context sluice_context;

typedef int32_t sluice_activation;
enum {
  SLUICE_SWIGLU = 0,  // E(x) = W2 (silu(W1 x) * (W3 x)), w1 = [W1; W3]
  SLUICE_GELU = 1,    // E(x) = W2 gelu(W1 x), tanh form
  SLUICE_RELU = 2
};
typedef int32_t sluice_save;
enum {
  SLUICE_SAVE_ACTIVATIONS = 0,  // received rows and the pre-activation
  SLUICE_SAVE_ROWS = 1,         // received rows; the pre-activation is computed again
  SLUICE_SAVE_NONE = 2          // nothing: forward only
};
typedef int32_t sluice_schedule;
enum {  // all give the same bits
  SLUICE_SCHEDULE_SEQUENTIAL = 0,   // dispatch, experts, combine one after the other
  SLUICE_SCHEDULE_PIPELINED = 1,    // one chunk of rows computes while the next travels
  SLUICE_SCHEDULE_BY_SOURCE = 2,    // and own rows compute while remote rows travel
  SLUICE_SCHEDULE_HIERARCHICAL = 3  // and remote rows apart by level
};
typedef int32_t sluice_exchange;
enum {
  SLUICE_EXCHANGE_GATEWAY = 0,  // a row crosses to a node once
  SLUICE_EXCHANGE_DIRECT = 1    // straight to every rank
};

typedef struct sluice_layer_options {
  size_t struct_size;
  int64_t hidden;
  int64_t ffn;
  sluice_activation activation;
  sluice_dtype dtype;          // of x, y, dy, dx and expert weights
  sluice_dtype wire_dtype;     // rows are rounded to it before they are dispatched
  sluice_dtype combine_dtype;  // sums are rounded to it at every edge of the reduction tree
  sluice_save save;
  sluice_schedule schedule;
  sluice_exchange exchange;
  int32_t num_chunks;  // 1 for a sequential schedule; 0 means 1
} sluice_layer_options;

// Weights of one local slot, and where its gradients accumulate. Pre-activation columns are 2 * ffn for SwiGLU, else ffn.
typedef struct sluice_expert_weights {
  size_t struct_size;
  sluice_const_matrix w1;  // dtype [pre-activation columns, hidden], contiguous
  sluice_const_matrix w2;  // dtype [hidden, ffn], contiguous
  float* grad_w1;          // f32 [pre-activation columns, hidden], accumulated into; both NULL: no backward
  float* grad_w2;          // f32 [hidden, ffn]
} sluice_expert_weights;

SLUICE_API sluice_status sluice_layer_create(sluice_runtime* runtime, const sluice_placement* placement,
                                             const sluice_layer_options* options, sluice_layer** layer);
SLUICE_API void sluice_layer_destroy(sluice_layer* layer);
// slots: one for each slot of this rank, in local order. The arrays they name are used until the next call.
SLUICE_API sluice_status sluice_layer_set_weights(sluice_layer* layer, const sluice_expert_weights* slots,
                                                  int32_t num_slots);
// Collective.
SLUICE_API sluice_status sluice_layer_plan(sluice_layer* layer, const sluice_routing* routing, void* stream,
                                           sluice_plan** plan);
// Collective. x: dtype [num_tokens, hidden]; y: dtype [num_tokens, hidden], overwritten. context: NULL when there will
// be no backward. A copy expert's x must stay until backward.
SLUICE_API sluice_status sluice_layer_forward(sluice_layer* layer, const sluice_plan* plan,
                                              const sluice_const_matrix* x, const sluice_matrix* y, void* stream,
                                              sluice_context** context);
// Collective, once a context. dy: dtype [num_tokens, hidden]; dx: dtype [num_tokens, hidden], overwritten; dw: f32
// [num_weights of the routing], overwritten. Weight gradients accumulate.
SLUICE_API sluice_status sluice_layer_backward(sluice_layer* layer, sluice_context* context,
                                               const sluice_const_matrix* dy, const sluice_matrix* dx, float* dw,
                                               int64_t num_dw, void* stream);
// Collective. Sums the gradients of replicated experts over their slots, the same bits in every copy.
SLUICE_API sluice_status sluice_layer_sync_replica_gradients(sluice_layer* layer, void* stream);
// Bytes held by contexts, plans and scratch at their high-water mark.
SLUICE_API sluice_status sluice_layer_memory_bytes(sluice_layer* layer, int64_t* bytes);
// Of a layer or a dispatcher. Gives its buffers back, in flight or not.
SLUICE_API void sluice_context_destroy(sluice_context* context);

// ---- layer on GPUs --------------------------------------------------------------------------------------------------

// A layer whose tokens, routing, weights and gradients lie in the memory of the ranks' GPUs, bf16 with fp32 gradients: for
// frameworks that compute there. Of a runtime over nvlink or nccl; sluice_runtime_gpu is the caller's current device.
// gpu_moe_layer.hpp has the whole contract. Calls only enqueue on `stream` (a cudaStream_t; NULL is the legacy stream), but
// for create, destroy, wait, and over nccl plan. Arrays must stay until the stream has passed what reads them.
typedef struct sluice_gpu_layer sluice_gpu_layer;

typedef int32_t sluice_gpu_schedule;
enum {
  SLUICE_GPU_AUTO = 0,        // two hops between nodes of several ranks, else what is fastest by the measured costs
  SLUICE_GPU_SEQUENTIAL = 1,  // exchange and experts one after the other
  SLUICE_GPU_OVERLAPPED = 2,  // the exchange beside the experts' GEMMs
  SLUICE_GPU_TWO_HOPS = 3     // over nccl: a row crosses to a node once
};

typedef struct sluice_gpu_layer_options {
  size_t struct_size;
  int64_t hidden;                // multiples of 8
  int64_t ffn;
  int64_t max_tokens;            // of one rank in one plan
  double imbalance;              // room for so many times a rank's even share of routes; 0: for all there are
  int32_t max_routes_of_token;   // on average over a rank's tokens
  sluice_activation activation;
  sluice_gpu_schedule schedule;
  int32_t training;              // 1: there will be backwards
} sluice_gpu_layer_options;

// Collective. Every expert of the placement is an ffn expert with one slot; a rank's experts ascend.
SLUICE_API sluice_status sluice_gpu_layer_create(sluice_runtime* runtime, const sluice_placement* placement,
                                                 const sluice_gpu_layer_options* options, sluice_gpu_layer** layer);
// All ranks destroy the layer: each waits, at most its runtime's deadline, until the others have read what they need.
SLUICE_API void sluice_gpu_layer_destroy(sluice_gpu_layer* layer);
// Experts on this rank; -1 for NULL
SLUICE_API int32_t sluice_gpu_layer_num_local_experts(const sluice_gpu_layer* layer);
// Of its buffers, on this rank's GPU.
SLUICE_API sluice_status sluice_gpu_layer_memory_bytes(sluice_gpu_layer* layer, int64_t* bytes);
// w1: bf16 [local experts, 2*ffn or ffn, hidden], for SwiGLU W1 above W3; w2: bf16 [local experts, hidden, ffn]; grad_w1,
// grad_w2: f32, the same shapes; both NULL: no backward
SLUICE_API sluice_status sluice_gpu_layer_set_weights(sluice_gpu_layer* layer, const void* w1, const void* w2,
                                                      float* grad_w1, float* grad_w2);
// Collective. Device memory: row_ptr: int64 [num_tokens + 1], from 0, ascending; expert: int32 [routes], ascending and unique
// within a token; weight: f32 [routes], finite. A routing that is none, and one with more routes than there is room for, sends
// nothing; sluice_gpu_layer_wait tells.
SLUICE_API sluice_status sluice_gpu_layer_plan(sluice_gpu_layer* layer, const int64_t* row_ptr, const int32_t* expert,
                                               const float* weight, int64_t num_tokens, void* stream);
// Collective. x, y: bf16 [num_tokens, hidden], y overwritten. keep: 1 when a backward follows
SLUICE_API sluice_status sluice_gpu_layer_forward(sluice_gpu_layer* layer, const void* x, void* y, int32_t keep,
                                                  void* stream);
// Collective, once after a forward with keep. dy, dx: bf16 [num_tokens, hidden], dx overwritten; dweight: f32 [routes],
// overwritten, or NULL. write_gradients: 0 adds to the weight gradients, 1 overwrites them.
SLUICE_API sluice_status sluice_gpu_layer_backward(sluice_gpu_layer* layer, const void* dy, void* dx, float* dweight,
                                                   int32_t write_gradients, void* stream);
// Blocks until the stream is done, with the runtime's deadline, and reports what the GPUs have found since the last wait.
SLUICE_API sluice_status sluice_gpu_layer_wait(sluice_gpu_layer* layer, void* stream);

// ---- dispatcher -----------------------------------------------------------------------------------------------------

// Dispatch and combine for frameworks that run their own experts. Per batch, on every rank, in this order:
//   plan, dispatch, rows -> the caller's experts, combine;
//   combine_backward, rows -> the caller's expert backward, dispatch_backward.
typedef struct sluice_dispatcher sluice_dispatcher;

typedef int32_t sluice_row_layout;
enum {
  // One row per (token, this rank), in receive order. The caller adds its experts up, weighted, and hands back one row
  // each; dw is the caller's and is carried home.
  SLUICE_RANK_ROWS = 0,
  // One row per route, slot by slot, each slot's rows starting at a multiple of `alignment`; padding rows are zero.
  // combine is weighted: y_t = sum w * row. Backward gives w * dy rows, dw = <dy, row>.
  SLUICE_EXPERT_ROWS = 1
};

typedef struct sluice_dispatcher_options {
  size_t struct_size;
  int64_t hidden;
  int64_t alignment;           // rows, expert rows only; 0 means 1
  sluice_dtype dtype;          // of x, y, dy, dx
  sluice_dtype wire_dtype;     // of rows()
  sluice_dtype combine_dtype;  // of what the caller hands back
  sluice_row_layout layout;
  sluice_exchange exchange;
  int32_t reserved;  // 0
} sluice_dispatcher_options;

SLUICE_API sluice_status sluice_dispatcher_create(sluice_runtime* runtime, const sluice_placement* placement,
                                                  const sluice_dispatcher_options* options,
                                                  sluice_dispatcher** dispatcher);
SLUICE_API void sluice_dispatcher_destroy(sluice_dispatcher* dispatcher);
// Collective.
SLUICE_API sluice_status sluice_dispatcher_plan(sluice_dispatcher* dispatcher, const sluice_routing* routing,
                                                void* stream, sluice_plan** plan);
// Collective. x: dtype [num_tokens, hidden]
SLUICE_API sluice_status sluice_dispatcher_dispatch(sluice_dispatcher* dispatcher, const sluice_plan* plan,
                                                    const sluice_const_matrix* x, void* stream,
                                                    sluice_context** context);
// What dispatch or combine_backward brought: wire dtype [rows, hidden], valid until the next call on the context.
SLUICE_API sluice_status sluice_dispatcher_rows(sluice_dispatcher* dispatcher, sluice_context* context,
                                                sluice_const_matrix* rows);
// Expert rows only. slot_begin: int64 [num_local_slots + 1]; row_of_route: int32 [received_routes], the row of each
// received route. Each may be NULL; valid as long as the context, after dispatch.
SLUICE_API sluice_status sluice_dispatcher_layout(sluice_dispatcher* dispatcher, sluice_context* context,
                                                  const int64_t** slot_begin, const int32_t** row_of_route);
// Collective. out: combine dtype, shaped as rows(); y: dtype [num_tokens, hidden], overwritten
SLUICE_API sluice_status sluice_dispatcher_combine(sluice_dispatcher* dispatcher, sluice_context* context,
                                                   const sluice_const_matrix* out, const sluice_matrix* y,
                                                   void* stream);
// Collective. dy: dtype [num_tokens, hidden]. out: what combine() was given (expert rows), or NULL (rank rows).
// Afterwards rows() are dy (rank rows) or w * dy (expert rows).
SLUICE_API sluice_status sluice_dispatcher_combine_backward(sluice_dispatcher* dispatcher, sluice_context* context,
                                                            const sluice_const_matrix* dy,
                                                            const sluice_const_matrix* out, void* stream);
// Collective. drows: combine dtype, shaped as rows(); received_dw: f32 [received_routes] in receive order, rank rows
// only, else NULL and 0; dx: dtype [num_tokens, hidden], overwritten; dw: f32 [num_weights of the routing], overwritten
SLUICE_API sluice_status sluice_dispatcher_dispatch_backward(sluice_dispatcher* dispatcher, sluice_context* context,
                                                             const sluice_const_matrix* drows,
                                                             const float* received_dw, int64_t num_received_dw,
                                                             const sluice_matrix* dx, float* dw, int64_t num_dw,
                                                             void* stream);

#ifdef __cplusplus
}  // extern "C"
template <typename T>
inline T sluice_init() {
  T value{};
  value.struct_size = sizeof(T);
  return value;
}
#endif

#endif  // SLUICE_SLUICE_H
