#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/grouped_gemm.hpp"
#include "sluice/kernels/cuda/grouped_gemm_gather.cuh"
#include "sluice/kernels/cuda/grouped_gemm_impl.cuh"
#include "sluice/kernels/cuda/grouped_wgrad_impl.cuh"
#include "sluice/kernels/cuda/portable_gemm.hpp"

namespace sluice::kernels::cuda {
namespace {

void require(bool condition, const char* what) {
  Require(condition, ErrorCode::kInvalidArgument, "grouped GEMM: ", what);
}

void check(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  cudaGetLastError();
  throw Error(ErrorCode::kInternal, std::string("grouped GEMM: ") + call + ": " + cudaGetErrorString(result));
}

// The driver's function, found at run time: the library is not needed where there is no GPU.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult query{};
    check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &query),
        "cudaGetDriverEntryPointByVersion");
    Require(query == cudaDriverEntryPointSuccess && found != nullptr, ErrorCode::kNotSupported,
            "grouped GEMM: the driver has no cuTensorMapEncodeTiled; CUDA 12 or newer is needed");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

struct MapDimension {
  std::int64_t size;
  std::int64_t stride;  // elements; the first one's is 1
  int box;
};

template <std::size_t kRank>
CUtensorMap make_map(const void* base, const MapDimension (&dimensions)[kRank], const char* what,
                     CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {
  const int element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 4;
  cuuint64_t sizes[kRank], strides[kRank];
  cuuint32_t boxes[kRank], steps[kRank];
  for (std::size_t i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(dimensions[i].size);
    boxes[i] = static_cast<cuuint32_t>(dimensions[i].box);
    steps[i] = 1;
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(dimensions[i].stride * element_bytes);
  }
  CUtensorMap map;
  const CUresult result = encode_function()(
      &map, type, kRank, const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  Require(result == CUDA_SUCCESS, ErrorCode::kInvalidArgument, "grouped GEMM: no tensor map for ", what,
          " (driver code ", static_cast<int>(result), "): see the alignment rules in grouped_gemm.hpp");
  return map;
}

void check_rows(const void* data, std::int64_t stride, std::int64_t columns, const char* what) {
  Require(data != nullptr, ErrorCode::kInvalidArgument, "grouped GEMM: ", what, " is null");
  Require(reinterpret_cast<std::uintptr_t>(data) % 16 == 0, ErrorCode::kInvalidArgument,
          "grouped GEMM: ", what, " is not 16-byte aligned");
  Require(stride >= columns && stride % 8 == 0, ErrorCode::kInvalidArgument, "grouped GEMM: row stride ",
          stride, " of ", what, " must be a multiple of 8 and at least ", columns);
}

void check_columns(std::int64_t columns, const char* what) {
  Require(columns > 0 && columns % 8 == 0 && columns <= (1 << 24), ErrorCode::kInvalidArgument,
          "grouped GEMM: ", what, " is ", columns, "; it must be a positive multiple of 8");
}

GemmParams group_params(const GemmGroups& groups) {
  Require(groups.num_groups >= 1 && groups.num_groups <= kMaxGemmGroups, ErrorCode::kInvalidArgument,
          "grouped GEMM: num_groups is ", groups.num_groups, "; 1..", kMaxGemmGroups,
          " are possible in one call");
  require(groups.group_ptr != nullptr, "group_ptr is null");
  Require(groups.num_rows >= 0 && groups.num_rows < (std::int64_t{1} << 30), ErrorCode::kInvalidArgument,
          "grouped GEMM: num_rows is ", groups.num_rows, "; at most 2^30 - 1 are possible");
  Require(groups.max_sms >= 0 && groups.max_sms % 2 == 0, ErrorCode::kInvalidArgument,
          "grouped GEMM: max_sms is ", groups.max_sms, "; it must be even (0: all)");
  if (groups.arrival.flags != nullptr) {
    require(groups.arrival.diagnosis != nullptr, "arrival flags need a diagnosis record");
    require(groups.arrival.rows_per_flag > 0, "arrival.rows_per_flag must be positive");
  }
  const GemmTickets& tickets = groups.tickets;
  Require(tickets.sms >= 0 && tickets.sms % 2 == 0 && (tickets.sms == 0 || groups.max_sms > 0),
          ErrorCode::kInvalidArgument, "grouped GEMM: tickets.sms is ", tickets.sms,
          "; it must be even, and with it max_sms must be given");
  GemmParams p{};
  p.ticket = tickets.next;
  p.group_ptr = groups.group_ptr;
  p.order = groups.order;
  p.weight_index = groups.weight_index;
  p.arrival = groups.arrival;
  p.num_rows = groups.num_rows;
  p.num_groups = groups.num_groups;
  return p;
}

void check_weights(const GemmWeights& weights) {
  check_columns(weights.out, "out");
  check_columns(weights.in, "in");
  check_rows(weights.base, weights.in, weights.in, "weights");
  Require(weights.num_weights > 0 && weights.stride >= weights.out * weights.in && weights.stride % 8 == 0,
          ErrorCode::kInvalidArgument, "grouped GEMM: ", weights.num_weights, " weights ", weights.stride,
          " elements apart; at least one, and a stride of at least out * in and a multiple of 8");
}

struct Device {
  int processors;
  bool hopper;
};
// The current device; refuses what neither kernel is for.
Device current_device() {
  int device = 0, major = 0, minor = 0, processors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  Require(major >= 8, ErrorCode::kNotSupported, "grouped GEMM: device ", device, " has compute capability ",
          major, ".", minor, "; 8.0 or newer is needed");
  return {processors, major == 9 && minor == 0};
}
bool takes_portable(const GemmGroups& groups, const Device& device) {
  return groups.path == GemmPath::kPortable || !device.hopper;
}

// Blocks of a launch; sets the clusters that take its tickets.
int grid_of(const GemmGroups& groups, int processors, GemmParams& p) {
  Require(groups.max_sms <= processors || groups.tickets.sms == 0, ErrorCode::kInvalidArgument,
          "grouped GEMM: max_sms is ", groups.max_sms, " of ", processors,
          " processors, but others share its tickets");
  const int sms = groups.max_sms > 0 ? std::min(groups.max_sms, processors) : processors;
  p.ticket_clusters = (groups.tickets.sms > 0 ? groups.tickets.sms : sms) / kClusterSize;
  return sms / kClusterSize * kClusterSize;
}

// What the forms of the forward call share: checks, and parameters but for the rows.
struct Forward {
  GemmParams params;
  bool swiglu;
};
Forward forward_of(const GemmGroups& groups, const GemmWeights& weights, GemmRows h, GemmRows act,
                   GemmActivation activation) {
  GemmParams p = group_params(groups);
  check_weights(weights);
  const bool swiglu = activation == GemmActivation::kSwiGLU;
  require(!swiglu || weights.out % 16 == 0, "SwiGLU: out = 2 * ffn must be a multiple of 16");
  require((activation == GemmActivation::kNone) == (act.data == nullptr),
          "act must be given with an activation, and only then");
  require(h.data != nullptr || act.data != nullptr, "neither h nor act is wanted");
  if (h.data != nullptr && groups.num_rows > 0) check_rows(h.data, h.stride, weights.out, "h");
  if (act.data != nullptr && groups.num_rows > 0)
    check_rows(act.data, act.stride, swiglu ? weights.out / 2 : weights.out, "act");
  p.num_weights = weights.num_weights;
  p.x_extent = static_cast<int>(weights.out);
  p.k_extent = static_cast<int>(weights.in);
  p.activation = activation;
  p.c = static_cast<std::uint16_t*>(h.data);
  p.c_stride = h.stride;
  p.act = static_cast<std::uint16_t*>(act.data);
  p.act_stride = act.stride;
  return {p, swiglu};
}

// grads: group g's 16-byte units from g * stride floats on.
__global__ void __launch_bounds__(256)
    zero_groups_without_rows(const __grid_constant__ GemmParams p, float* grads, std::int64_t stride,
                             std::int64_t units) {
  const int g = p.order != nullptr ? p.order[blockIdx.y] : static_cast<int>(blockIdx.y);
  if (g < 0 || g >= p.num_groups || p.group_ptr[g] < p.group_ptr[g + 1]) return;
  float4* const to = reinterpret_cast<float4*>(grads + g * stride);
  for (std::int64_t i = blockIdx.x * std::int64_t{256} + threadIdx.x; i < units;
       i += gridDim.x * std::int64_t{256})
    to[i] = float4{0, 0, 0, 0};
}

template <typename... Arguments>
void start(void (*kernel)(Arguments...), int blocks, Stream stream,
           const std::type_identity_t<Arguments>&... arguments) {
  // Per device: the attribute is part of its context.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(arguments...);
  check(cudaGetLastError(), "launch");
}
template <GemmOp kOp>
void launch(const GemmGroups& groups, GemmParams params, const CUtensorMap& x, const CUtensorMap& y,
            int processors, Stream stream) {
  const int blocks = grid_of(groups, processors, params);
  start(grouped_gemm_kernel<kOp>, blocks, stream, x, y, params);
}

}  // namespace

void grouped_gemm_forward(const GemmGroups& groups, const GemmWeights& weights, ConstGemmRows a, GemmRows h,
                          GemmRows act, GemmActivation activation, Stream stream) {
  const Forward f = forward_of(groups, weights, h, act, activation);
  if (groups.num_rows == 0) return;
  check_rows(a.data, a.stride, weights.in, "a");
  const Device device = current_device();
  if (takes_portable(groups, device))
    return portable::forward(groups, weights, {nullptr, a, groups.num_rows, {}, 0}, h, act, activation,
                             device.processors, stream);
  const CUtensorMap y = make_map(a.data, {{weights.in, 1, kBlockK}, {groups.num_rows, a.stride, 64}}, "a");
  if (f.swiglu) {
    // Rows of W1 and W3 alternate in blocks of 8, so that one thread accumulates both factors of an element.
    const std::int64_t ffn = weights.out / 2;
    const CUtensorMap x = make_map(weights.base,
                                   {{weights.in, 1, kBlockK},
                                    {8, weights.in, 8},
                                    {2, ffn * weights.in, 2},
                                    {ffn / 8, 8 * weights.in, kBlockX / 16},
                                    {weights.num_weights, weights.stride, 1}},
                                   "weights");
    launch<GemmOp::kForwardSwiGLU>(groups, f.params, x, y, device.processors, stream);
  } else {
    const CUtensorMap x = make_map(weights.base,
                                   {{weights.in, 1, kBlockK},
                                    {weights.out, weights.in, kBlockX},
                                    {weights.num_weights, weights.stride, 1}},
                                   "weights");
    launch<GemmOp::kForward>(groups, f.params, x, y, device.processors, stream);
  }
}

void grouped_gemm_forward(const GemmGroups& groups, const GemmWeights& weights, const GatheredRows& a,
                          GemmRows h, GemmRows act, GemmActivation activation, Stream stream) {
  const Forward f = forward_of(groups, weights, h, act, activation);
  if (groups.num_rows == 0) return;
  require(a.index != nullptr, "the index of gathered rows is null");
  const auto check_place = [&](const ConstGemmRows& place, std::int64_t rows, const char* what) {
    Require(rows >= 0 && rows < (std::int64_t{1} << 30), ErrorCode::kInvalidArgument, "grouped GEMM: ", rows,
            " rows in ", what, "; at most 2^30 - 1 are possible");
    if (rows > 0) check_rows(place.data, place.stride, weights.in, what);
  };
  check_place(a.first, a.first_rows, "a.first");
  check_place(a.second, a.second_rows, "a.second");
  require(a.first_rows > 0 || a.second_rows > 0, "there are no rows to gather from");
  // A place without rows is never read from: the other one stands for it.
  GatheredRows rows = a;
  if (a.first_rows == 0) rows.first = a.second, rows.first_rows = a.second_rows;
  if (a.second_rows == 0) rows.second = a.first, rows.second_rows = a.first_rows;
  const Device device = current_device();
  if (takes_portable(groups, device))
    return portable::forward(groups, weights, rows, h, act, activation, device.processors, stream);
  GatherParams p{};
  p.gemm = f.params;
  p.index = rows.index;
  p.first = static_cast<const unsigned char*>(rows.first.data);
  p.second = static_cast<const unsigned char*>(rows.second.data);
  p.first_stride = rows.first.stride * 2;
  p.second_stride = rows.second.stride * 2;
  p.first_rows = static_cast<int>(rows.first_rows);
  p.second_rows = static_cast<int>(rows.second_rows);
  const int blocks = grid_of(groups, device.processors, p.gemm);
  const auto run = [&](auto* kernel, const CUtensorMap& x) { start(kernel, blocks, stream, x, p); };
  if (f.swiglu) {
    const std::int64_t ffn = weights.out / 2;
    run(gathering_gemm_kernel<true>, make_map(weights.base,
                                              {{weights.in, 1, kBlockK},
                                               {ffn, weights.in, 64},
                                               {2, ffn * weights.in, 2},
                                               {weights.num_weights, weights.stride, 1}},
                                              "weights"));
  } else {
    run(gathering_gemm_kernel<false>, make_map(weights.base,
                                               {{weights.in, 1, kBlockK},
                                                {weights.out, weights.in, 128},
                                                {weights.num_weights, weights.stride, 1}},
                                               "weights"));
  }
}

void grouped_gemm_dgrad(const GemmGroups& groups, const GemmWeights& weights, ConstGemmRows dc, GemmRows da,
                        Stream stream) {
  GemmParams p = group_params(groups);
  check_weights(weights);
  if (groups.num_rows == 0) return;
  check_rows(dc.data, dc.stride, weights.out, "dc");
  check_rows(da.data, da.stride, weights.in, "da");
  const Device device = current_device();
  if (takes_portable(groups, device))
    return portable::dgrad(groups, weights, dc, da, device.processors, stream);
  p.num_weights = weights.num_weights;
  p.x_extent = static_cast<int>(weights.in);
  p.k_extent = static_cast<int>(weights.out);
  p.c = static_cast<std::uint16_t*>(da.data);
  p.c_stride = da.stride;
  const CUtensorMap x = make_map(
      weights.base,
      {{weights.in, 1, 64}, {weights.out, weights.in, kBlockK}, {weights.num_weights, weights.stride, 1}},
      "weights");
  const CUtensorMap y =
      make_map(dc.data, {{weights.out, 1, kBlockK}, {groups.num_rows, dc.stride, 64}}, "dc");
  launch<GemmOp::kDgrad>(groups, p, x, y, device.processors, stream);
}

void grouped_gemm_wgrad(const GemmGroups& groups, ConstGemmRows dc, std::int64_t out, ConstGemmRows a,
                        std::int64_t in, float* grads, std::int64_t grad_stride, GradientUpdate update,
                        Stream stream) {
  GemmParams p = group_params(groups);
  require(groups.weight_index == nullptr, "wgrad: weight_index must be null");
  require(groups.tickets.next == nullptr, "wgrad: tickets must be null");
  check_columns(out, "out");
  check_columns(in, "in");
  require(grads != nullptr && reinterpret_cast<std::uintptr_t>(grads) % 16 == 0,
          "grads must be 16-byte aligned");
  Require(grad_stride >= out * in && grad_stride % 4 == 0, ErrorCode::kInvalidArgument,
          "grouped GEMM: grad_stride ", grad_stride, " must be a multiple of 4 and at least ", out * in);
  const bool write = update == GradientUpdate::kWrite;
  if (write) {
    constexpr unsigned kBlocks = 64;  // of a group
    zero_groups_without_rows<<<dim3(kBlocks, static_cast<unsigned>(groups.num_groups)), 256, 0, stream>>>(
        p, grads, grad_stride, out * in / 4);
    check(cudaGetLastError(), "launch");
  }
  if (groups.num_rows == 0) return;
  check_rows(dc.data, dc.stride, out, "dc");
  check_rows(a.data, a.stride, in, "a");
  const Device device = current_device();
  if (takes_portable(groups, device))
    return portable::wgrad(groups, dc, out, a, in, grads, grad_stride, update, device.processors, stream);
  p.num_weights = groups.num_groups;
  p.x_extent = static_cast<int>(out);
  p.y_extent = static_cast<int>(in);
  const CUtensorMap x = make_map(dc.data, {{out, 1, 64}, {groups.num_rows, dc.stride, wgrad::kBlockK}}, "dc");
  const CUtensorMap y = make_map(a.data, {{in, 1, 64}, {groups.num_rows, a.stride, wgrad::kBlockK}}, "a");
  const CUtensorMap c = make_map(grads, {{in, 1, 32}, {out, in, 64}, {groups.num_groups, grad_stride, 1}},
                                 "grads", CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
  const int blocks = grid_of(groups, device.processors, p);
  start(write ? wgrad::grouped_wgrad_kernel<true> : wgrad::grouped_wgrad_kernel<false>, blocks, stream, x, y,
        c, p);
}

}  // namespace sluice::kernels::cuda
