// wgmma of Hopper: d[64, N] (+)= x[64, 16] * y[N, 16]^T, bf16 operands in shared memory, fp32 accumulators in registers.
// One warpgroup (128 threads) issues it. Thread t holds of row 16*(t/32) + (t%32)/4 (+8) the columns
// 8*j + 2*(t%4) + {0, 1}: d[4j], d[4j+1] and, of the row 8 below, d[4j+2], d[4j+3].
// Source: PTX ISA 9.0, "wgmma.mma_async", register fragments and matrix descriptors.
#pragma once

#include <cstdint>

namespace sluice::kernels::cuda {

// Operands lie in 128-byte swizzled tiles as the tensor copy writes them. Row-of-64-k tiles ("k inner"): rows of 128
// bytes, 8 rows = 1024 bytes; 16 k further = 32 bytes. Tiles with k outer: 64 k rows of 128 bytes hold 64 rows of the
// operand; 64 operand rows further = `block_bytes`; 16 k further = 2048 bytes.
__device__ __forceinline__ std::uint64_t matrix_descriptor(std::uint32_t shared_address,
                                                           std::uint32_t block_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | (std::uint64_t{block_bytes >> 4} << 16) |
         ((shared_address & 0x3FFFF) >> 4);
}

// Keeps the compiler from moving reads or writes of the accumulators across this point.
template <int kSize>
__device__ __forceinline__ void fence_accumulators(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define SLUICE_S0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SLUICE_S1 \
  SLUICE_S0       \
  ", "            \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define SLUICE_S2 \
  SLUICE_S1       \
  ", "            \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define SLUICE_S3 \
  SLUICE_S2       \
  ", "            \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define SLUICE_S4 \
  SLUICE_S3       \
  ", "            \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define SLUICE_S5 \
  SLUICE_S4       \
  ", "            \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define SLUICE_S6 \
  SLUICE_S5       \
  ", "            \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define SLUICE_S7 \
  SLUICE_S6       \
  ", "            \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define SLUICE_S8 \
  SLUICE_S7       \
  ", "            \
  "%64, %65, %66, %67, %68, %69, %70, %71"
#define SLUICE_S9 \
  SLUICE_S8       \
  ", "            \
  "%72, %73, %74, %75, %76, %77, %78, %79"
#define SLUICE_S10 \
  SLUICE_S9        \
  ", "             \
  "%80, %81, %82, %83, %84, %85, %86, %87"
#define SLUICE_S11 \
  SLUICE_S10       \
  ", "             \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define SLUICE_S12 \
  SLUICE_S11       \
  ", "             \
  "%96, %97, %98, %99, %100, %101, %102, %103"
#define SLUICE_S13 \
  SLUICE_S12       \
  ", "             \
  "%104, %105, %106, %107, %108, %109, %110, %111"
#define SLUICE_S14 \
  SLUICE_S13       \
  ", "             \
  "%112, %113, %114, %115, %116, %117, %118, %119"
#define SLUICE_S15 \
  SLUICE_S14       \
  ", "             \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define SLUICE_D0 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define SLUICE_D1                                                                                     \
  SLUICE_D0, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), \
      "+f"(d[15])
#define SLUICE_D2                                                                                       \
  SLUICE_D1, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), \
      "+f"(d[23])
#define SLUICE_D3                                                                                       \
  SLUICE_D2, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), \
      "+f"(d[31])
#define SLUICE_D4                                                                                       \
  SLUICE_D3, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), \
      "+f"(d[39])
#define SLUICE_D5                                                                                       \
  SLUICE_D4, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), \
      "+f"(d[47])
#define SLUICE_D6                                                                                       \
  SLUICE_D5, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
      "+f"(d[55])
#define SLUICE_D7                                                                                       \
  SLUICE_D6, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
      "+f"(d[63])
#define SLUICE_D8                                                                                       \
  SLUICE_D7, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), \
      "+f"(d[71])
#define SLUICE_D9                                                                                       \
  SLUICE_D8, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), \
      "+f"(d[79])
#define SLUICE_D10                                                                                      \
  SLUICE_D9, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), \
      "+f"(d[87])
#define SLUICE_D11                                                                                       \
  SLUICE_D10, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), \
      "+f"(d[95])
#define SLUICE_D12                                                                                          \
  SLUICE_D11, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), \
      "+f"(d[103])
#define SLUICE_D13                                                                                \
  SLUICE_D12, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), \
      "+f"(d[110]), "+f"(d[111])
#define SLUICE_D14                                                                                \
  SLUICE_D13, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), \
      "+f"(d[118]), "+f"(d[119])
#define SLUICE_D15                                                                                \
  SLUICE_D14, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), \
      "+f"(d[126]), "+f"(d[127])
// Half as many again: n is an odd multiple of 8.
#define SLUICE_SH0 "%0, %1, %2, %3"
#define SLUICE_DH0 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define SLUICE_SH1 \
  SLUICE_S0        \
  ", "             \
  "%8, %9, %10, %11"
#define SLUICE_DH1 SLUICE_D0, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define SLUICE_SH2 \
  SLUICE_S1        \
  ", "             \
  "%16, %17, %18, %19"
#define SLUICE_DH2 SLUICE_D1, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define SLUICE_SH3 \
  SLUICE_S2        \
  ", "             \
  "%24, %25, %26, %27"
#define SLUICE_DH3 SLUICE_D2, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define SLUICE_SH4 \
  SLUICE_S3        \
  ", "             \
  "%32, %33, %34, %35"
#define SLUICE_DH4 SLUICE_D3, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define SLUICE_SH5 \
  SLUICE_S4        \
  ", "             \
  "%40, %41, %42, %43"
#define SLUICE_DH5 SLUICE_D4, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define SLUICE_SH6 \
  SLUICE_S5        \
  ", "             \
  "%48, %49, %50, %51"
#define SLUICE_DH6 SLUICE_D5, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define SLUICE_SH7 \
  SLUICE_S6        \
  ", "             \
  "%56, %57, %58, %59"
#define SLUICE_DH7 SLUICE_D6, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define SLUICE_WGMMA(N, I, X, Y, P, TX, TY)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                   \
               ", 0;\n"                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SLUICE_S##I \
               "}, %" X ", %" Y ", p, 1, 1, %" TX ", %" TY ";\n}"                       \
               : SLUICE_D##I                                                            \
               : "l"(x), "l"(y), "r"(accumulate), "n"(kXOuter), "n"(kYOuter))

// kXOuter, kYOuter: 1 if k is the outer dimension of that operand's tile, else 0. accumulate 0: d is overwritten.
template <int kN, int kXOuter, int kYOuter, int kSize>
__device__ __forceinline__ void wgmma(float (&d)[kSize], std::uint64_t x, std::uint64_t y, int accumulate) {
  static_assert((kN % 16 == 0 || (kN % 8 == 0 && kN < 128)) && kN >= 8 && kN <= 256 && kN <= 2 * kSize);
  if constexpr (kN == 8)
    SLUICE_WGMMA(8, H0, "4", "5", "6", "7", "8");
  else if constexpr (kN == 24)
    SLUICE_WGMMA(24, H1, "12", "13", "14", "15", "16");
  else if constexpr (kN == 40)
    SLUICE_WGMMA(40, H2, "20", "21", "22", "23", "24");
  else if constexpr (kN == 56)
    SLUICE_WGMMA(56, H3, "28", "29", "30", "31", "32");
  else if constexpr (kN == 72)
    SLUICE_WGMMA(72, H4, "36", "37", "38", "39", "40");
  else if constexpr (kN == 88)
    SLUICE_WGMMA(88, H5, "44", "45", "46", "47", "48");
  else if constexpr (kN == 104)
    SLUICE_WGMMA(104, H6, "52", "53", "54", "55", "56");
  else if constexpr (kN == 120)
    SLUICE_WGMMA(120, H7, "60", "61", "62", "63", "64");
  else if constexpr (kN == 16)
    SLUICE_WGMMA(16, 0, "8", "9", "10", "11", "12");
  else if constexpr (kN == 32)
    SLUICE_WGMMA(32, 1, "16", "17", "18", "19", "20");
  else if constexpr (kN == 48)
    SLUICE_WGMMA(48, 2, "24", "25", "26", "27", "28");
  else if constexpr (kN == 64)
    SLUICE_WGMMA(64, 3, "32", "33", "34", "35", "36");
  else if constexpr (kN == 80)
    SLUICE_WGMMA(80, 4, "40", "41", "42", "43", "44");
  else if constexpr (kN == 96)
    SLUICE_WGMMA(96, 5, "48", "49", "50", "51", "52");
  else if constexpr (kN == 112)
    SLUICE_WGMMA(112, 6, "56", "57", "58", "59", "60");
  else if constexpr (kN == 128)
    SLUICE_WGMMA(128, 7, "64", "65", "66", "67", "68");
  else if constexpr (kN == 144)
    SLUICE_WGMMA(144, 8, "72", "73", "74", "75", "76");
  else if constexpr (kN == 160)
    SLUICE_WGMMA(160, 9, "80", "81", "82", "83", "84");
  else if constexpr (kN == 176)
    SLUICE_WGMMA(176, 10, "88", "89", "90", "91", "92");
  else if constexpr (kN == 192)
    SLUICE_WGMMA(192, 11, "96", "97", "98", "99", "100");
  else if constexpr (kN == 208)
    SLUICE_WGMMA(208, 12, "104", "105", "106", "107", "108");
  else if constexpr (kN == 224)
    SLUICE_WGMMA(224, 13, "112", "113", "114", "115", "116");
  else if constexpr (kN == 240)
    SLUICE_WGMMA(240, 14, "120", "121", "122", "123", "124");
  else if constexpr (kN == 256)
    SLUICE_WGMMA(256, 15, "128", "129", "130", "131", "132");
}

#undef SLUICE_WGMMA
#undef SLUICE_SH0
#undef SLUICE_DH0
#undef SLUICE_SH1
#undef SLUICE_DH1
#undef SLUICE_SH2
#undef SLUICE_DH2
#undef SLUICE_SH3
#undef SLUICE_DH3
#undef SLUICE_SH4
#undef SLUICE_DH4
#undef SLUICE_SH5
#undef SLUICE_DH5
#undef SLUICE_SH6
#undef SLUICE_DH6
#undef SLUICE_SH7
#undef SLUICE_DH7
#undef SLUICE_S0
#undef SLUICE_S1
#undef SLUICE_S2
#undef SLUICE_S3
#undef SLUICE_S4
#undef SLUICE_S5
#undef SLUICE_S6
#undef SLUICE_S7
#undef SLUICE_S8
#undef SLUICE_S9
#undef SLUICE_S10
#undef SLUICE_S11
#undef SLUICE_S12
#undef SLUICE_S13
#undef SLUICE_S14
#undef SLUICE_S15
#undef SLUICE_D0
#undef SLUICE_D1
#undef SLUICE_D2
#undef SLUICE_D3
#undef SLUICE_D4
#undef SLUICE_D5
#undef SLUICE_D6
#undef SLUICE_D7
#undef SLUICE_D8
#undef SLUICE_D9
#undef SLUICE_D10
#undef SLUICE_D11
#undef SLUICE_D12
#undef SLUICE_D13
#undef SLUICE_D14
#undef SLUICE_D15

}  // namespace sluice::kernels::cuda
