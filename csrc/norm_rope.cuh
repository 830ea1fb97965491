// y = x / sqrt(mean(x^2) + eps) * weight over the full width; each neighbouring pair rotated by its angle; to a dense
// tensor or into frames of a cache slot, both named on the device. blockIdx.y is the operand: q, k or v.
#pragma once

#include "norm_rope.h"
#include "row_ops.cuh"

namespace dsa {

struct NormRopeParams {
    Operand operands[3];
    Angles angles;
    Ring ring;
    int rows, tokens, channels, head_dim;
    float eps;
};

__device__ __forceinline__ int64_t index_at(const void* data, bool wide, int64_t i) {
    return wide ? __ldg(static_cast<const int64_t*>(data) + i) : __ldg(static_cast<const int32_t*>(data) + i);
}

__device__ __forceinline__ void rotate(float (&x)[VEC], const float* cos, const float* sin) {
    const float4 c4 = __ldg(reinterpret_cast<const float4*>(cos)), s4 = __ldg(reinterpret_cast<const float4*>(sin));
    const float c[VEC / 2] = {c4.x, c4.y, c4.z, c4.w}, s[VEC / 2] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * c[i] - b * s[i];
        x[2 * i + 1] = a * s[i] + b * c[i];
    }
}

// Offset of a token's row in the cache, and its slot.
struct CacheRow {
    int64_t offset, slot;
};

__device__ __forceinline__ CacheRow cache_row(const Cache& cache, const NormRopeParams& p, int b, int t) {
    const int frame_tokens = p.ring.frame_tokens, frame = t / frame_tokens, frames = p.tokens / frame_tokens;
    const int64_t slot = index_at(p.ring.slot, p.ring.slot64, b);
    const int64_t written = index_at(p.ring.write, p.ring.write64, int64_t(b) * frames + frame);
    return {slot * cache.slot + written * cache.frame + (t - frame * frame_tokens) * cache.token, slot};
}

// x, eight channels from c on, into the cache in its dtype.
__device__ __forceinline__ void append(float (&x)[VEC], const Cache& cache, const NormRopeParams& p, CacheRow at,
                                       int c) {
    if (cache.scale) {
        const float inverse = 1.0f / __ldg(cache.scale + at.slot * (p.channels / p.head_dim) + c / p.head_dim);
#pragma unroll
        for (int i = 0; i < VEC; ++i) x[i] *= inverse;
    }
    if (cache.dtype == E4M3) {
        store_e4m3(cache.data, at.offset + c, x);
    } else if (cache.dtype == BFLOAT16) {
        store<__nv_bfloat16>(cache.data, at.offset + c, x);
    } else if (cache.dtype == FLOAT16) {
        store<__half>(cache.data, at.offset + c, x);
    } else {
        store<float>(cache.data, at.offset + c, x);
    }
}

template <class T, int V>
__global__ void __launch_bounds__(row_threads<V>, row_blocks<T, V>)
    norm_rope_kernel(const __grid_constant__ NormRopeParams p) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;  // whole warps, and only where a row is one warp: no barrier is missed
    const Operand& of = p.operands[blockIdx.y];
    const int b = row / p.tokens, t = row - b * p.tokens;

    Row<T, V> x;
    x.load(static_cast<const T*>(of.x.data) + b * of.x.batch + t * of.x.row, p.channels);
    float factor = 1.0f;
    if (of.weight.data) {
        float squares = 0.0f;
        x.each(p.channels, [&](int i, int) {
            float v[VEC];
            x.part[i].get(v);
#pragma unroll
            for (float a : v) squares += a * a;
        });
        factor = rsqrtf(row_sum(squares) / p.channels + p.eps);
    }
    const CacheRow at = of.cache.data ? cache_row(of.cache, p, b, t) : CacheRow{0, 0};
    const int64_t angles = b * p.angles.batch + t * p.angles.row;
    x.each(p.channels, [&](int i, int c) {
        float y[VEC];
        x.part[i].get(y);
        if (of.weight.data) {
            float weight[VEC];
            load<T>(weight, of.weight.data, of.weight.dtype, c);
#pragma unroll
            for (int j = 0; j < VEC; ++j) y[j] *= factor * weight[j];
        }
        if (of.rotate) {
            const int64_t pair = angles + c % p.head_dim / 2;
            rotate(y, p.angles.cos + pair, p.angles.sin + pair);
        }
        if (of.cache.data) {
            append(y, of.cache, p, at, c);
        } else {
            store<T>(of.out.data, b * of.out.batch + t * of.out.row + c, y);
        }
    });
}

}  // namespace dsa
