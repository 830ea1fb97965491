// The accumulator of a warpgroup's 64 queries: registers, partial results in memory, the final store.
#pragma once

#include "attention_schedule.cuh"

namespace dsa {

// Thread t of a warpgroup holds two queries, t / 32 * 16 + t % 32 / 4 (half 0) and the eighth after it (half 1), and of
// them the columns 8 j + 2 (t % 4) + e of P V in o[4 j + 2 half + e]. The rows of the transposed e4m3 values
// are so ordered (attention_producer.cuh) that its columns of j and j + 1, j even, are four neighbours of the head.
template <class Tile>
struct AttentionAccumulator {
    static constexpr int D = Tile::D;
    float o[D / 2];    // sums of probability * value
    float row_max[2];  // max score so far
    float row_sum[2];  // sum of the probabilities; until sum_over_columns() of this thread's columns only

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (float& x : o) x = 0;
        row_max[0] = row_max[1] = -INFINITY;
        row_sum[0] = row_sum[1] = 0;
    }

    __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] *= factor[i >> 1 & 1];
    }

    __device__ __forceinline__ void sum_over_columns() {
#pragma unroll
        for (float& x : row_sum) {
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
            const float inverse = row_sum[half] == 0 ? 0 : __frcp_rn(row_sum[half]);  // no keys: zeros
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

// Partial result of 128 queries: sums as the threads hold them, so every access is coalesced, then row_max and row_sum.
template <class Tile>
struct AttentionPartial {
    static constexpr int vectors = Tile::D / 8;  // of four sums, of each thread
    static constexpr int floats = Tile::queries * (Tile::D + 2);
    float4* sums;
    float2* rows;

    __device__ __forceinline__ AttentionPartial(const AttentionShape& shape, int row, int block, int partial,
                                                int group) {
        float* start = shape.partial + ((int64_t(row) * shape.blocks + block) * 2 + partial) * floats;
        sums = reinterpret_cast<float4*>(start) + group * vectors * 128 + threadIdx.x % 128;
        rows = reinterpret_cast<float2*>(start + Tile::queries * Tile::D) + AttentionAccumulator<Tile>::query(group);
    }

    __device__ __forceinline__ void store(const AttentionAccumulator<Tile>& acc) const {
        const float* o = acc.o;
#pragma unroll
        for (int j = 0; j < vectors; ++j)
            sums[j * 128] = make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
        if (threadIdx.x % 4) return;
        rows[0] = make_float2(acc.row_max[0], acc.row_sum[0]);
        rows[8] = make_float2(acc.row_max[1], acc.row_sum[1]);
    }

    __device__ __forceinline__ void add_to(AttentionAccumulator<Tile>& acc) const {
        float mine[2], theirs[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 other = rows[8 * half];
            const float row_max = fmaxf(acc.row_max[half], other.x);
            mine[half] = exp2_approx(acc.row_max[half] - row_max);
            theirs[half] = exp2_approx(other.x - row_max);
            acc.row_max[half] = row_max;
            acc.row_sum[half] = acc.row_sum[half] * mine[half] + other.y * theirs[half];
        }
        acc.rescale(mine);
#pragma unroll
        for (int j = 0; j < vectors; ++j) {
            const float4 other = sums[j * 128];
            acc.o[4 * j] += other.x * theirs[0];
            acc.o[4 * j + 1] += other.y * theirs[0];
            acc.o[4 * j + 2] += other.z * theirs[1];
            acc.o[4 * j + 3] += other.w * theirs[1];
        }
    }
};

// Combines, in block order, the partial results of one split query tile: grid (split tiles, rows, consumers).
template <class Tile>
__global__ void __launch_bounds__(128) attention_combine_kernel(const __grid_constant__ AttentionShape shape) {
    const int splits = gridDim.x, split = blockIdx.x, row = blockIdx.y, group = blockIdx.z;
    const int units = key_tiles<Tile::keys>(shape, row), work = splits * units;
    const int first = split * units, last = first + units;
    AttentionAccumulator<Tile> acc;
    acc.clear();
    if (units > 0) {
        int block = int(int64_t(split) * shape.blocks / splits);  // the block with unit `first`, or an earlier one
        while (share(work, block + 1, shape.blocks) <= first) ++block;
        const bool whole = share(work, block, shape.blocks) == first && share(work, block + 1, shape.blocks) == last;
        if (whole) return;
        for (; block < shape.blocks && share(work, block, shape.blocks) < last; ++block) {
            const int begin = share(work, block, shape.blocks);
            if (begin == share(work, block + 1, shape.blocks)) continue;  // a block with nothing to do
            AttentionPartial<Tile>(shape, row, block, split - begin / units, group).add_to(acc);
        }
    }
    acc.store(shape, row, query_tiles(shape.T) * shape.H - splits + split, group);
}

}  // namespace dsa
