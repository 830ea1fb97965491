// Tile shapes, and the schedule that divides the work among the thread blocks: data-parallel, then stream-K.
//
// Per row of the batch: as many whole query tiles as divide evenly among the blocks, then the remaining tiles, split
// into equal shares of key tiles so that all blocks end together. In the first part the blocks read the same keys at
// about the same time, which keeps them in the L2 cache. Split tiles leave partial results.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "hopper.cuh"

namespace dsa {

constexpr int attention_max_runs = 4;

// A thread block: 128 queries, 64 for each of two consumer warpgroups, and a producer warpgroup.
struct AttentionBlock {
    static constexpr int queries = 128;
    static constexpr int consumers = queries / 64;
    static constexpr int threads = 128 * (consumers + 1);
};

// bf16. 176 keys: two stages of keys and values and the queries fill the shared memory at D = 128; scores (88),
// probabilities (44) and results (64 registers) fit the 232 registers of a consumer thread. Two rows of 128 bytes hold
// a head of 128.
template <int head_dim>
struct AttentionBf16 : AttentionBlock {
    static constexpr int D = head_dim;
    static constexpr bool fp8 = false;
    static constexpr int keys = 176;
    static constexpr int stages = 2, value_stages = 2;
    static constexpr int parts = D / 64;
    static constexpr int step = 16;  // of k in one wgmma
    static constexpr float offset = 0;
    static constexpr int producer_registers = 40, consumer_registers = 232;  // 64 K for 384 threads
};

// e4m3. 128 keys: one 128-byte row of the transposed values; registers: 64 scores, 32 probabilities, 64 results, 16
// queries. Probabilities are 2^8 exp2(score - row_max): e4m3 reaches 448, and the factor cancels.
struct AttentionFp8 : AttentionBlock {
    static constexpr int D = 128;
    static constexpr bool fp8 = true;
    static constexpr int keys = 128;
    static constexpr int stages = 4, value_stages = 2;  // as loaded; transposed
    static constexpr int parts = 1;
    static constexpr int step = 32;
    static constexpr float offset = 8;
    static constexpr int producer_registers = 56, consumer_registers = 224;
};

struct AttentionShape {
    const int64_t* slot;
    const int64_t* keys;
    const float* k_scale;  // [N, H], with an e4m3 cache only
    const float* v_scale;
    const __nv_bfloat16* q;
    __nv_bfloat16* out;
    float* partial;
    int B, T, H, W, S, R;
    int blocks;   // that share the work
    float scale;  // log2(e) / sqrt(D): the softmax works with powers of two
};

__host__ __device__ __forceinline__ int query_tiles(int T) {
    return (T + AttentionBlock::queries - 1) / AttentionBlock::queries;
}

// ---- keys of a row -------------------------------------------------------------------------------------------------

__device__ __forceinline__ int run_tokens(const AttentionShape& shape, int row, int run) {
    const int64_t* ends = shape.keys + (int64_t(row) * shape.R + run) * 2;
    return max(0, int(__ldg(ends + 1) - __ldg(ends))) * shape.S;
}

struct AttentionKeys {
    int token;  // of the whole cache
    int valid;  // tokens the row attends to; those behind belong to another frame or slot
};

// Key tile `unit` of a row. A tile never reaches across two runs.
template <int keys>
__device__ __forceinline__ AttentionKeys key_tile(const AttentionShape& shape, int row, int unit) {
    int run = 0, tokens = run_tokens(shape, row, 0);
    while (unit * keys >= tokens && run + 1 < shape.R) {
        unit -= (tokens + keys - 1) / keys;
        tokens = run_tokens(shape, row, ++run);
    }
    const int start = int(__ldg(shape.keys + (int64_t(row) * shape.R + run) * 2));
    const int frame = int(__ldg(shape.slot + row)) * shape.W + start;
    return {frame * shape.S + unit * keys, min(keys, tokens - unit * keys)};
}

template <int keys>
__device__ __forceinline__ int key_tiles(const AttentionShape& shape, int row) {
    int units = 0;
    for (int run = 0; run < shape.R; ++run) units += (run_tokens(shape, row, run) + keys - 1) / keys;
    return units;
}

// ---- shares of the blocks ------------------------------------------------------------------------------------------

// Block `index` of `blocks` does units share(index) up to share(index + 1) of `work`.
__device__ __forceinline__ int share(int work, int index, int blocks) { return int(int64_t(work) * index / blocks); }

struct AttentionWork {
    int row, tile;    // tile = head * query tiles + query tile
    int first, last;  // key tiles
    int partial;      // which of the block's two partial results of this row; -1: the tile is done whole
};

// The sequence of work of one block, the same for all its warps.
template <class Tile>
struct AttentionSchedule {
    const AttentionShape& shape;
    int tiles, whole;  // of a row; those from `whole` on are split
    int row = -1, tile, units = 0;
    int at = 0, first_split = 0, end = 0;  // share of the split tiles, counted in key tiles

    __device__ __forceinline__ explicit AttentionSchedule(const AttentionShape& shape) : shape(shape) {
        tiles = query_tiles(shape.T) * shape.H;
        whole = tiles / shape.blocks * shape.blocks;
        tile = whole;
    }

    __device__ __forceinline__ bool next(AttentionWork& work) {
        while (tile >= whole && at == end) {
            if (++row == shape.B) return false;
            units = key_tiles<Tile::keys>(shape, row);
            tile = blockIdx.x;
            at = share((tiles - whole) * units, blockIdx.x, shape.blocks);
            end = share((tiles - whole) * units, blockIdx.x + 1, shape.blocks);
            first_split = at == end ? 0 : at / units;
        }
        if (tile < whole) {
            work = {row, tile, 0, units, -1};
            tile += shape.blocks;
            return true;
        }
        // There are fewer split tiles than blocks, so a share is at most one tile long and touches at most two.
        const int split = at / units, first = at - split * units, last = min(units, first + end - at);
        work = {row, whole + split, first, last, last - first == units ? -1 : split - first_split};
        at += last - first;
        return true;
    }
};

}  // namespace dsa
