// One warp's 16 x 16 by 16 x 8 GEMM with float32 sums (mma.sync m16n8k16): the tensor cores of sm_80 and later.
//
// With g = lane / 4 and q = lane % 4, the fragments of a lane are (PTX manual, "Matrix Fragments for mma.m16n8k16"):
//   a: rows g, g + 8 at k = 2q, 2q + 1, then the same rows at k = 2q + 8, 2q + 9;   two values per word
//   b: column g at k = 2q, 2q + 1, then at k = 2q + 8, 2q + 9
//   d: row g at columns 2q, 2q + 1, then row g + 8
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "row_ops.cuh"

namespace dsa {

#ifdef DSA_EMULATE

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static uint32_t all_a[LANES][LANES][4], all_b[LANES][LANES][2];  // warp, lane
    const int warp = emulate::thread() / LANES, lane = emulate::lane(), g = lane / 4, q = lane % 4;
    memcpy(all_a[warp][lane], a, sizeof a);
    memcpy(all_b[warp][lane], b, sizeof b);
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = 2 * q + i % 2;  // row 0: g, row 1: g + 8
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < 4; ++k) {  // pairs
                const float2 x = unpack<T>(all_a[warp][4 * g + k][2 * half + row]);
                const float2 y = unpack<T>(all_b[warp][4 * column + k][half]);
                d[i] += x.x * y.x + x.y * y.y;
            }
        }
    }
    __syncwarp();
}

#else

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace dsa
