// The end of a denoising step, the first of two launches (the second: epilogue_confidence.cuh).
//
// A block has up to 16 * TILES tokens of one frame. It normalizes and modulates them in shared memory, multiplies them
// with the weight [P, C], turns the velocity into x0 and the next x, and writes each channel's mean and sum of squared
// deviations over its tokens.
#pragma once

#include "epilogue.h"
#include "mma.cuh"
#include "row_ops.cuh"

namespace dsa {

constexpr int WARPS = 8, THREADS = WARPS * LANES;
constexpr int MAX_OUTPUTS = 64;              // of the projection
constexpr int SUM_STRIDE = MAX_OUTPUTS + 8;  // floats; the eight keep a warp's stores in different banks

// Bytes between rows in shared memory: 64 beyond a multiple of 128, so that rows read together lie in different banks.
__host__ __device__ constexpr int row_bytes(int channels, int size) { return (channels * size + 127) / 128 * 128 + 64; }

struct ProjectParams {
    Rows hidden;
    PerFrame shift, scale;
    const void* weight;
    Vector bias;
    Latents x, noise, x0, next;
    const float* sigma;
    const float* next_sigma;
    float* statistics;  // [B * F, tiles, 2, C]; null: not needed
    unsigned* arrived;  // counter of confidence_kernel, cleared here
    LatentShape latents;
    int frames, frame_tokens, channels, outputs;
    float eps;
};

template <class T>
__device__ __forceinline__ T* tile_row(void* tile, int channels, int token) {
    return reinterpret_cast<T*>(static_cast<char*>(tile) + token * row_bytes(channels, sizeof(T)));
}

// Rows of the tile into shared memory, each by one warp; mean and 1 / deviation of each.
template <class T>
__device__ __forceinline__ void load_tile(const ProjectParams& p, const T* hidden, void* tile, int tokens,
                                          float2* statistics) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    for (int token = warp; token < tokens; token += WARPS) {
        const T* from = hidden + token * p.hidden.row;
        T* row = tile_row<T>(tile, p.channels, token);
        float sum = 0.0f, squares = 0.0f, v[VEC];
#pragma unroll 6
        for (int c = lane * VEC; c < p.channels; c += LANES * VEC) {
            Vec8<T> vec;
            vec.load(from + c);
            vec.store(row + c);
            vec.get(v);
#pragma unroll
            for (float a : v) sum += a;
        }
        const float mean = warp_sum(sum) / p.channels;
#pragma unroll 6
        for (int c = lane * VEC; c < p.channels; c += LANES * VEC) {  // what this lane has stored itself
            Vec8<T> vec;
            vec.load_shared(row + c);
            vec.get(v);
#pragma unroll
            for (float a : v) squares += (a - mean) * (a - mean);
        }
        squares = warp_sum(squares);
        if (lane == 0) statistics[token] = {mean, rsqrtf(squares / p.channels + p.eps)};
    }
}

// Down the columns: each channel's statistics over the tokens, and the modulated tokens in place of the raw ones.
template <class T>
__device__ __forceinline__ void modulate_tile(const ProjectParams& p, int b, int f, void* tile, int tokens,
                                              const float2* statistics, float* column_statistics) {
    const int64_t shift_at = b * p.shift.batch + f * p.frame_tokens / p.shift.tokens * p.shift.frame;
    const int64_t scale_at = b * p.scale.batch + f * p.frame_tokens / p.scale.tokens * p.scale.frame;
    for (int c = threadIdx.x * VEC; c < p.channels; c += THREADS * VEC) {
        Vec8<T> vec;
        float v[VEC], shift[VEC], scale[VEC], mean[VEC] = {}, squares[VEC] = {};
        load<T>(shift, p.shift.data, p.shift.dtype, shift_at + c);
        load<T>(scale, p.scale.data, p.scale.dtype, scale_at + c);
        for (int token = 0; column_statistics && token < tokens; ++token) {
            vec.load_shared(tile_row<T>(tile, p.channels, token) + c);
            vec.get(v);
#pragma unroll
            for (int i = 0; i < VEC; ++i) mean[i] += (v[i] - statistics[token].x) * statistics[token].y;
        }
#pragma unroll
        for (float& m : mean) m /= tokens;
        for (int token = 0; token < tokens; ++token) {
            T* at = tile_row<T>(tile, p.channels, token) + c;
            vec.load_shared(at);
            vec.get(v);
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const float h = (v[i] - statistics[token].x) * statistics[token].y;
                squares[i] += (h - mean[i]) * (h - mean[i]);
                v[i] = h * (1.0f + scale[i]) + shift[i];
            }
            vec.set(v);
            vec.store(at);
        }
        if (column_statistics) {
            store<float>(column_statistics, c, mean);
            store<float>(column_statistics, p.channels + c, squares);
        }
    }
}

// sums[tile][column block] += the tile's tokens x the weight's rows, over this warp's channels: 32 at a time.
//
// The order of the channels within a GEMM is free, so a lane reads eight neighbours at once (16 bytes) and gives
// them to two mma: channels 8q, 8q+1 | 8q+2, 8q+3 to the first, 8q+4, 8q+5 | 8q+6, 8q+7 to the second, of tokens and
// weight alike.
template <class T, int TILES>
__device__ __forceinline__ void gemm(const ProjectParams& p, void* tile, float (&sums)[TILES][MAX_OUTPUTS / 8][4]) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;
    const T* weight = static_cast<const T*>(p.weight);
    for (int start = warp * 32; start < p.channels; start += WARPS * 32) {
        const int c = start + q * VEC;
        const bool inside = c < p.channels;
        Vec8<T> a[TILES][2], w[MAX_OUTPUTS / 8];
#pragma unroll
        for (int n = 0; n < MAX_OUTPUTS / 8; ++n) {
            w[n] = {};
            if (inside && 8 * n + g < p.outputs) w[n].load(weight + int64_t(8 * n + g) * p.channels + c);
        }
#pragma unroll
        for (int m = 0; m < 2 * TILES; ++m) {
            a[m / 2][m % 2] = {};
            if (inside) a[m / 2][m % 2].load_shared(tile_row<T>(tile, p.channels, 8 * m + g) + c);
        }
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            const uint4 top = a[m][0].word, low = a[m][1].word;
#pragma unroll
            for (int n = 0; n < MAX_OUTPUTS / 8; ++n) {
                mma<T>(sums[m][n], {top.x, low.x, top.y, low.y}, {w[n].word.x, w[n].word.y});
                mma<T>(sums[m][n], {top.z, low.z, top.w, low.w}, {w[n].word.z, w[n].word.w});
            }
        }
    }
}

// The same in float32, without tensor cores (they would round to 10 bits): for tests and small models.
template <int TILES>
__device__ __forceinline__ void gemm(const ProjectParams& p, void* tile, float (&sums)[TILES][MAX_OUTPUTS / 8][4]) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;
    for (int c = warp * VEC; c < p.channels; c += WARPS * VEC) {
        float a[2 * TILES][VEC], w[VEC];
#pragma unroll
        for (int m = 0; m < 2 * TILES; ++m) {
            Vec8<float> vec;
            vec.load_shared(tile_row<float>(tile, p.channels, 8 * m + g) + c);
            vec.get(a[m]);
        }
#pragma unroll
        for (int i = 0; i < MAX_OUTPUTS / 4; ++i) {
            const int n = i / 2, column = i % 2, output = 8 * n + 2 * q + column;
            if (output >= p.outputs) continue;
            load(w, static_cast<const float*>(p.weight) + int64_t(output) * p.channels + c);
#pragma unroll
            for (int m = 0; m < 2 * TILES; ++m) {
#pragma unroll
                for (int k = 0; k < VEC; ++k) sums[m / 2][n][m % 2 * 2 + column] += a[m][k] * w[k];
            }
        }
    }
}

// Adds the warps' sums in order and writes x0 and the next x at the patch's position in the latents. Neighbouring
// threads have neighbouring columns of the image.
__device__ __forceinline__ void write_latents(const ProjectParams& p, int b, int f, int first, int tokens,
                                              int tile_tokens, const float* sums) {
    const int64_t x = b * p.x.batch + f * p.x.frame, noise = b * p.noise.batch + f * p.noise.frame;
    const int64_t x0 = b * p.x0.batch + f * p.x0.frame, next = b * p.next.batch + f * p.next.frame;
    const float sigma = p.sigma[b * p.frames + f], next_sigma = p.next_sigma[b * p.frames + f];
    const int dtype = p.latents.dtype, patch = p.latents.patch, width = p.latents.width, grid_width = width / patch;
    for (int i = threadIdx.x; i < p.outputs * tile_tokens; i += THREADS) {
        const int column = i % patch, token = i / patch % tile_tokens;
        const int row = i / (patch * tile_tokens) % patch, channel = i / (patch * tile_tokens * patch);
        if (token >= tokens) continue;
        const int output = (row * patch + column) * int(p.latents.channels) + channel;
        float velocity = load_scalar(p.bias.data, p.bias.dtype, output);
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) velocity += sums[(warp * tile_tokens + token) * SUM_STRIDE + output];

        const int grid_row = (first + token) / grid_width, grid_column = (first + token) % grid_width;
        const int64_t image_row = channel * p.latents.height + grid_row * patch + row;
        const int64_t at = image_row * width + grid_column * patch + column;
        const float noisy = load_scalar(p.x.data, dtype, x + at), fresh = load_scalar(p.noise.data, dtype, noise + at);
        const float clean = store_scalar(p.x0.data, dtype, x0 + at, noisy - sigma * velocity);
        store_scalar(p.next.data, dtype, next + at, (1.0f - next_sigma) * clean + next_sigma * fresh);
    }
}

template <class T, int TILES>
__global__ void __launch_bounds__(THREADS, 1) project_kernel(const __grid_constant__ ProjectParams p) {
    constexpr int TOKENS = 16 * TILES;
    DSA_DYNAMIC_SHARED(char, tile);  // rows of tokens; when they have been used, the warps' sums
    __shared__ float2 statistics[TOKENS];
    const int b = blockIdx.y / p.frames, f = blockIdx.y % p.frames, first = blockIdx.x * TOKENS;
    const int tokens = min(TOKENS, p.frame_tokens - first);
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *p.arrived = 0;

    const T* hidden = static_cast<const T*>(p.hidden.data);
    hidden += b * p.hidden.batch + (int64_t(f) * p.frame_tokens + first) * p.hidden.row;
    load_tile(p, hidden, tile, tokens, statistics);
    __syncthreads();
    const int64_t index = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
    modulate_tile<T>(p, b, f, tile, tokens, statistics, p.statistics ? p.statistics + index * 2 * p.channels : nullptr);
    __syncthreads();

    float sums[TILES][MAX_OUTPUTS / 8][4] = {};
    if constexpr (sizeof(T) == 4) {
        gemm<TILES>(p, tile, sums);
    } else {
        gemm<T, TILES>(p, tile, sums);
    }
    __syncthreads();
    float* all_sums = reinterpret_cast<float*>(tile);  // [WARPS, TOKENS, SUM_STRIDE]
    const int warp = threadIdx.x / LANES, g = threadIdx.x % LANES / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < 2 * TILES; ++m) {
        float* row = all_sums + (warp * TOKENS + 8 * m + g) * SUM_STRIDE + 2 * q;
#pragma unroll
        for (int n = 0; n < MAX_OUTPUTS / 8; ++n) {
            const float* pair = sums[m / 2][n] + m % 2 * 2;
            *reinterpret_cast<float2*>(row + 8 * n) = {pair[0], pair[1]};
        }
    }
    __syncthreads();
    write_latents(p, b, f, first, tokens, TOKENS, all_sums);
}

}  // namespace dsa
