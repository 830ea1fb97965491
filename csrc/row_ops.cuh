// Device code that the row-wise kernels share: eight channels at a time, and sums over a row.
//
// A row belongs to blockDim.x threads (whole warps); blockDim.y rows share a block where one warp is enough for a row.
// Thread i of a row holds the vectors i, i + blockDim.x, ... of eight channels, so that a warp reads 512 bytes at once,
// and keeps them in registers in their own dtype: a row is read once however many passes its statistics take.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "tensor_args.h"

#if !defined(DSA_DYNAMIC_SHARED)
#define DSA_DYNAMIC_SHARED(type, name)                        \
    extern __shared__ __align__(128) unsigned char name##_[]; \
    type* name = reinterpret_cast<type*>(name##_)
#endif

namespace dsa {

constexpr int LANES = 32, VEC = 8;  // threads of a warp, channels of a vector
constexpr float E4M3_MAX = 448.0f;

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
    static constexpr int value = FLOAT32;
};
template <>
struct DtypeOf<__nv_bfloat16> {
    static constexpr int value = BFLOAT16;
};
template <>
struct DtypeOf<__half> {
    static constexpr int value = FLOAT16;
};

// ---- two values in a 32-bit word ------------------------------------------------------------------------------------

template <class Pair>
__device__ __forceinline__ Pair as_pair(uint32_t word) {
    Pair pair;
    memcpy(&pair, &word, 4);
    return pair;
}

template <class Pair>
__device__ __forceinline__ uint32_t as_word(Pair pair) {
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
    return __bfloat1622float2(as_pair<__nv_bfloat162>(word));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
    return __half22float2(as_pair<__half2>(word));
}

template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float a, float b) {
    return as_word(__floats2bfloat162_rn(a, b));
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float a, float b) {
    return as_word(__floats2half2_rn(a, b));
}

// ---- eight channels, as they lie in memory --------------------------------------------------------------------------

template <class T>
struct Vec8 {
    uint4 word;

    // Through the read-only path, so that loads may be moved above stores: never of what the same kernel writes.
    __device__ __forceinline__ void load(const T* at) { word = __ldg(reinterpret_cast<const uint4*>(at)); }
    __device__ __forceinline__ void load_shared(const T* at) { word = *reinterpret_cast<const uint4*>(at); }
    __device__ __forceinline__ void store(T* at) const { *reinterpret_cast<uint4*>(at) = word; }
    __device__ __forceinline__ void get(float (&x)[VEC]) const {
        const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<T>(words[i]);
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
    __device__ __forceinline__ void set(const float (&x)[VEC]) {
        word = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
    }
};

template <>
struct Vec8<float> {
    float4 low, high;

    __device__ __forceinline__ void load(const float* at) {
        low = __ldg(reinterpret_cast<const float4*>(at));
        high = __ldg(reinterpret_cast<const float4*>(at + 4));
    }
    __device__ __forceinline__ void load_shared(const float* at) {
        low = *reinterpret_cast<const float4*>(at);
        high = *reinterpret_cast<const float4*>(at + 4);
    }
    __device__ __forceinline__ void store(float* at) const {
        *reinterpret_cast<float4*>(at) = low;
        *reinterpret_cast<float4*>(at + 4) = high;
    }
    __device__ __forceinline__ void get(float (&x)[VEC]) const {
        const float all[VEC] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < VEC; ++i) x[i] = all[i];
    }
    __device__ __forceinline__ void set(const float (&x)[VEC]) {
        low = {x[0], x[1], x[2], x[3]};
        high = {x[4], x[5], x[6], x[7]};
    }
};

template <class T>
__device__ __forceinline__ void load(float (&x)[VEC], const T* at) {
    Vec8<T> vec;
    vec.load(at);
    vec.get(x);
}

// Parameters (weights, shifts, biases) are float32 or the dtype of the activations; every thread of a launch agrees.
template <class T>
__device__ __forceinline__ void load(float (&x)[VEC], const void* data, int dtype, int64_t offset) {
    if (dtype == FLOAT32) {
        load(x, static_cast<const float*>(data) + offset);
    } else {
        load(x, static_cast<const T*>(data) + offset);
    }
}

// Round to nearest even, saturating at the largest value, not NaN. Devices before 8.9 have no instruction for it, and
// those after 9.0 run what was compiled for 8.0: `ops/cuda_backend.py` refuses both.
__device__ __forceinline__ void store_e4m3(void* data, int64_t offset, const float (&x)[VEC]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    __trap();
#else
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float2 first = {x[4 * i], x[4 * i + 1]}, second = {x[4 * i + 2], x[4 * i + 3]};
        const uint32_t low = __nv_cvt_float2_to_fp8x2(first, __NV_SATFINITE, __NV_E4M3);
        const uint32_t high = __nv_cvt_float2_to_fp8x2(second, __NV_SATFINITE, __NV_E4M3);
        words[i] = high << 16 | low;
    }
    *reinterpret_cast<uint2*>(static_cast<char*>(data) + offset) = {words[0], words[1]};
#endif
}

template <class T>
__device__ __forceinline__ void store(void* data, int64_t offset, const float (&x)[VEC]) {
    Vec8<T> vec;
    vec.set(x);
    vec.store(static_cast<T*>(data) + offset);
}

// ---- one value of a dtype known only at run time --------------------------------------------------------------------

__device__ __forceinline__ float load_scalar(const void* data, int dtype, int64_t i) {
    if (dtype == FLOAT32) return __ldg(static_cast<const float*>(data) + i);
    if (dtype == BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    return __half2float(static_cast<const __half*>(data)[i]);
}

// Returns what was stored: rounded to the dtype.
__device__ __forceinline__ float store_scalar(void* data, int dtype, int64_t i, float x) {
    if (dtype == FLOAT32) return static_cast<float*>(data)[i] = x;
    if (dtype == BFLOAT16) {
        const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
        static_cast<__nv_bfloat16*>(data)[i] = rounded;
        return __bfloat162float(rounded);
    }
    const __half rounded = __float2half_rn(x);
    static_cast<__half*>(data)[i] = rounded;
    return __half2float(rounded);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int flip = LANES / 2; flip; flip /= 2) x += __shfl_xor_sync(0xffffffffu, x, flip);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int flip = LANES / 2; flip; flip /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, flip));
    return x;
}

// The sum (or the maximum of what is not negative) over a row's threads, the same in every one of them.
template <bool SUM>
__device__ __forceinline__ float reduce_row(float x) {
    x = SUM ? warp_sum(x) : warp_max(x);
    if (blockDim.x == LANES) return x;
    __shared__ float parts[LANES];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    __syncthreads();  // the previous reduction's parts may still be read
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = lane < blockDim.x / LANES ? parts[lane] : 0.0f;
    return SUM ? warp_sum(x) : warp_max(x);
}

__device__ __forceinline__ float row_sum(float x) { return reduce_row<true>(x); }
__device__ __forceinline__ float row_max(float x) { return reduce_row<false>(x); }

// Threads of the largest block that holds rows in V vectors each (row_launch.h).
template <int V>
constexpr int row_threads = V == 4 ? 512 : 128;

// How many such blocks an SM should hold: without it ptxas aims at a rounder number and spills.
template <class T, int V>
constexpr int row_blocks = V == 4 ? 1 : (sizeof(T) == 4 ? 3 : 4);

// A thread's share of a row of C channels: V vectors, those beyond the row's end are left out.
template <class T, int V>
struct Row {
    Vec8<T> part[V];

    static __device__ __forceinline__ int channel(int i) { return VEC * (i * blockDim.x + threadIdx.x); }

    // f(i, channel) for each vector that this thread has.
    template <class F>
    static __device__ __forceinline__ void each(int channels, F&& f) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            if (channel(i) < channels) f(i, channel(i));
        }
    }

    __device__ __forceinline__ void load(const T* row, int channels) {
        each(channels, [&](int i, int c) { part[i].load(row + c); });
    }
};

}  // namespace dsa
