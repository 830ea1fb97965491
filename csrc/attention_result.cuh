// What a warpgroup knows of the results of 64 queries: registers, partial results in memory, the final store.
#pragma once

#include "attention_work.cuh"

namespace dsa {

// Thread t of a warpgroup holds two queries, t / 32 * 16 + t % 32 / 4 (half 0) and the eighth after it (half 1), and of
// them the columns 8 j + 2 (t % 4) + e of the product in o[4 j + 2 half + e]. The rows of the transposed e4m3 values
// are so ordered (attention_load.cuh) that its columns of j and j + 1, j even, are four neighbours of the head.
template <class Tile>
struct AttentionResult {
    static constexpr int D = Tile::D;
    float o[D / 2];  // sums of weight * value
    float top[2];    // greatest score so far
    float total[2];  // sum of the weights; until sum_over_columns() of this thread's columns only

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (float& x : o) x = 0;
        top[0] = top[1] = -INFINITY;
        total[0] = total[1] = 0;
    }

    __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] *= factor[i >> 1 & 1];
    }

    __device__ __forceinline__ void sum_over_columns() {
#pragma unroll
        for (float& x : total) {
            x += __shfl_xor_sync(0xffffffff, x, 1);
            x += __shfl_xor_sync(0xffffffff, x, 2);
        }
    }

    // The first query of this thread within the tile.
    __device__ __forceinline__ static int query(int group) {
        const int thread = threadIdx.x % 128;
        return group * 64 + thread / 32 * 16 + thread % 32 / 4;
    }

    __device__ __forceinline__ void store(const AttentionShape& shape, int row, int tile, int group) const {
        const int tiles = query_tiles(shape.T), head = tile / tiles;
        const int first = (tile - head * tiles) * Tile::queries + query(group);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (first + 8 * half >= shape.T) continue;
            const float inverse = total[half] == 0 ? 0 : __frcp_rn(total[half]);  // no keys: zeros
            __nv_bfloat16* to = shape.out + ((int64_t(row) * shape.T + first + 8 * half) * shape.H + head) * D;
            store_columns(to, inverse, half);
        }
    }

    __device__ __forceinline__ void store_columns(__nv_bfloat16* to, float inverse, int half) const {
        const int quarter = threadIdx.x % 4;
        const float* from = o + 2 * half;
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            __nv_bfloat162 low, high;
            if constexpr (Tile::fp8) {
                low = __floats2bfloat162_rn(from[4 * j] * inverse, from[4 * j + 4] * inverse);
                high = __floats2bfloat162_rn(from[4 * j + 1] * inverse, from[4 * j + 5] * inverse);
                __nv_bfloat162* at = reinterpret_cast<__nv_bfloat162*>(to + 8 * j + 4 * quarter);
                at[0] = low;
                at[1] = high;
            } else {
                low = __floats2bfloat162_rn(from[4 * j] * inverse, from[4 * j + 1] * inverse);
                high = __floats2bfloat162_rn(from[4 * j + 4] * inverse, from[4 * j + 5] * inverse);
                *reinterpret_cast<__nv_bfloat162*>(to + 8 * j + 2 * quarter) = low;
                *reinterpret_cast<__nv_bfloat162*>(to + 8 * j + 8 + 2 * quarter) = high;
            }
        }
    }
};

// A partial result of 128 queries: sums as the threads hold them, which coalesces every access, then top and total.
template <class Tile>
struct AttentionPartial {
    static constexpr int vectors = Tile::D / 8;  // of four sums, of each thread
    static constexpr int floats = Tile::queries * (Tile::D + 2);
    float4* sums;
    float2* rows;

    __device__ __forceinline__ AttentionPartial(const AttentionShape& shape, int row, int block, int piece, int group) {
        float* start = shape.partial + ((int64_t(row) * shape.blocks + block) * 2 + piece) * floats;
        sums = reinterpret_cast<float4*>(start) + group * vectors * 128 + threadIdx.x % 128;
        rows = reinterpret_cast<float2*>(start + Tile::queries * Tile::D) + AttentionResult<Tile>::query(group);
    }

    __device__ __forceinline__ void store(const AttentionResult<Tile>& result) const {
        const float* o = result.o;
#pragma unroll
        for (int j = 0; j < vectors; ++j)
            sums[j * 128] = make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
        if (threadIdx.x % 4) return;
        rows[0] = make_float2(result.top[0], result.total[0]);
        rows[8] = make_float2(result.top[1], result.total[1]);
    }

    __device__ __forceinline__ void add_to(AttentionResult<Tile>& result) const {
        float mine[2], theirs[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 other = rows[8 * half];
            const float top = fmaxf(result.top[half], other.x);
            mine[half] = exp2_approximate(result.top[half] - top);
            theirs[half] = exp2_approximate(other.x - top);
            result.top[half] = top;
            result.total[half] = result.total[half] * mine[half] + other.y * theirs[half];
        }
        result.rescale(mine);
#pragma unroll
        for (int j = 0; j < vectors; ++j) {
            const float4 other = sums[j * 128];
            result.o[4 * j] += other.x * theirs[0];
            result.o[4 * j + 1] += other.y * theirs[0];
            result.o[4 * j + 2] += other.z * theirs[1];
            result.o[4 * j + 3] += other.w * theirs[1];
        }
    }
};

// Adds up, in the order of the blocks, the partial results of one cut query tile: grid (cut tiles, rows, consumers).
template <class Tile>
__global__ void __launch_bounds__(128) attention_combine_kernel(const __grid_constant__ AttentionShape shape) {
    const int cuts = gridDim.x, cut = blockIdx.x, row = blockIdx.y, group = blockIdx.z;
    const int units = key_tiles<Tile::keys>(shape, row), work = cuts * units, first = cut * units, last = first + units;
    AttentionResult<Tile> result;
    result.clear();
    if (units > 0) {
        int block = int(int64_t(cut) * shape.blocks / cuts);  // the block that does unit `first`, or one before it
        while (share(work, block + 1, shape.blocks) <= first) ++block;
        const bool whole = share(work, block, shape.blocks) == first && share(work, block + 1, shape.blocks) == last;
        if (whole) return;
        for (; block < shape.blocks && share(work, block, shape.blocks) < last; ++block) {
            const int begin = share(work, block, shape.blocks);
            if (begin == share(work, block + 1, shape.blocks)) continue;  // a block with nothing to do
            AttentionPartial<Tile>(shape, row, block, cut - begin / units, group).add_to(result);
        }
    }
    result.store(shape, row, query_tiles(shape.T) * shape.H - cuts + cut, group);
}

}  // namespace dsa
