// r = x + gate * y; LayerNorm(r) * (1 + scale) + shift; gelu(x + bias). The last two also as e4m3 with a scale per row.
#pragma once

#include "modulate.h"
#include "row_ops.cuh"

namespace dsa {

struct ModulateParams {
    Rows x, y, sum, out;
    PerFrame gate, shift, scale;
    float* row_scale;
    int rows, tokens, channels;
    float eps;
};

struct GeluParams {
    Rows x, out;
    Vector bias;
    float* row_scale;
    int rows, tokens, channels;
};

__device__ __forceinline__ int64_t start_of(const Rows& rows, int b, int t) { return b * rows.batch + t * rows.row; }
__device__ __forceinline__ int64_t start_of(const PerFrame& m, int b, int t) {
    return b * m.batch + t / m.tokens * m.frame;
}

// A row that is still float32, to e4m3 with the row's own scale: its largest magnitude becomes 448.
template <int V, class T>
__device__ __forceinline__ void store_rowwise(const Row<T, V>& like, float (&y)[V][VEC], int channels, void* out,
                                              int64_t start, float* row_scale) {
    float top = 0.0f;
    like.each(channels, [&](int i, int) {
#pragma unroll
        for (float v : y[i]) top = fmaxf(top, fabsf(v));
    });
    top = row_max(top);
    const float scale = top > 0.0f ? top / E4M3_MAX : 1.0f, inverse = 1.0f / scale;
    like.each(channels, [&](int i, int c) {
#pragma unroll
        for (float& v : y[i]) v *= inverse;
        store_e4m3(out, start + c, y[i]);
    });
    if (threadIdx.x == 0) *row_scale = scale;
}

template <class T, int V>
__device__ __forceinline__ void add_gated(Row<T, V>& r, const ModulateParams& p, int b, int t) {
    Row<T, V> y;
    y.load(static_cast<const T*>(p.y.data) + start_of(p.y, b, t), p.channels);
    const int64_t gate = start_of(p.gate, b, t);
    r.each(p.channels, [&](int i, int c) {
        float a[VEC], d[VEC], g[VEC];
        r.part[i].get(a);
        y.part[i].get(d);
        if (p.gate.data) {
            load<T>(g, p.gate.data, p.gate.dtype, gate + c);
        } else {
#pragma unroll
            for (float& v : g) v = 1.0f;
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) a[j] += g[j] * d[j];
        r.part[i].set(a);  // what follows works on the rounded sum
        r.part[i].store(static_cast<T*>(p.sum.data) + start_of(p.sum, b, t) + c);
    });
}

// The mean and 1 / deviation of a row, the deviation from the mean itself: no cancellation.
template <class T, int V>
__device__ __forceinline__ float2 row_statistics(const Row<T, V>& r, int channels, float eps) {
    float sum = 0.0f, squares = 0.0f;
    r.each(channels, [&](int i, int) {
        float a[VEC];
        r.part[i].get(a);
#pragma unroll
        for (float v : a) sum += v;
    });
    const float mean = row_sum(sum) / channels;
    r.each(channels, [&](int i, int) {
        float a[VEC];
        r.part[i].get(a);
#pragma unroll
        for (float v : a) squares += (v - mean) * (v - mean);
    });
    return {mean, rsqrtf(row_sum(squares) / channels + eps)};
}

template <class T, int V, bool ROWWISE>
__global__ void __launch_bounds__(row_threads<V>, row_blocks<T, V>)
    modulate_kernel(const __grid_constant__ ModulateParams p) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;  // whole warps, and only where a row is one warp: no barrier is missed
    const int b = row / p.tokens, t = row - b * p.tokens;

    Row<T, V> r;
    r.load(static_cast<const T*>(p.x.data) + start_of(p.x, b, t), p.channels);
    if (p.y.data) add_gated(r, p, b, t);
    if (!p.out.data) return;

    const float2 statistics = row_statistics(r, p.channels, p.eps);
    const int64_t shift = start_of(p.shift, b, t), scale = start_of(p.scale, b, t), out = start_of(p.out, b, t);
    float y[ROWWISE ? V : 1][VEC];
    r.each(p.channels, [&](int i, int c) {
        float a[VEC], m[VEC], (&d)[VEC] = y[ROWWISE ? i : 0];
        r.part[i].get(a);
        load<T>(m, p.scale.data, p.scale.dtype, scale + c);
        load<T>(d, p.shift.data, p.shift.dtype, shift + c);
#pragma unroll
        for (int j = 0; j < VEC; ++j) d[j] += (a[j] - statistics.x) * statistics.y * (1.0f + m[j]);
        if (!ROWWISE) store<T>(p.out.data, out + c, d);
    });
    if constexpr (ROWWISE) store_rowwise(r, y, p.channels, p.out.data, out, p.row_scale + row);
}

// x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
__device__ __forceinline__ float gelu_tanh(float x) {
    const float u = 0.7978845608028654f * x * (1.0f + 0.044715f * x * x);
    return __fdividef(x, 1.0f + __expf(-2.0f * u));
}

template <class T, int V, bool ROWWISE>
__global__ void __launch_bounds__(row_threads<V>, row_blocks<T, V>) gelu_kernel(const __grid_constant__ GeluParams p) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;
    const int b = row / p.tokens, t = row - b * p.tokens;
    Row<T, V> x;
    x.load(static_cast<const T*>(p.x.data) + start_of(p.x, b, t), p.channels);
    const int64_t out = start_of(p.out, b, t);
    float y[ROWWISE ? V : 1][VEC];
    x.each(p.channels, [&](int i, int c) {
        float a[VEC], (&d)[VEC] = y[ROWWISE ? i : 0];
        x.part[i].get(a);
        load<T>(d, p.bias.data, p.bias.dtype, c);
#pragma unroll
        for (int j = 0; j < VEC; ++j) d[j] = gelu_tanh(a[j] + d[j]);
        if (!ROWWISE) store<T>(p.out.data, out + c, d);
    });
    if constexpr (ROWWISE) store_rowwise(x, y, p.channels, p.out.data, out, p.row_scale + row);
}

}  // namespace dsa
