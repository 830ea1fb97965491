// The producer warpgroup: loads tiles of queries, keys and values from the caches into shared memory.
#pragma once

#include "attention_schedule.cuh"

namespace dsa {

struct AttentionParams {
    CUtensorMap q, k, v;
    AttentionShape shape;
};

// The current stage of a ring, and the parity of the barrier phase that ends when the stage is ready.
template <int stages>
struct AttentionPipelineState {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// The reader of a stage waits for `full`, the writer for `empty`.
template <int stages>
struct AttentionBarriers {
    uint64_t full[stages], empty[stages];

    __device__ __forceinline__ void init(int writers, int readers) {
        for (int stage = 0; stage < stages; ++stage) {
            mbarrier_init(&full[stage], writers);
            mbarrier_init(&empty[stage], readers);
        }
    }
};

template <class Tile>
struct AttentionShared {
    __nv_bfloat16 q[Tile::parts][Tile::queries][64];
    __nv_bfloat16 k[Tile::stages][Tile::parts][Tile::keys][64];
    __nv_bfloat16 v[Tile::stages][Tile::parts][Tile::keys][64];
    AttentionBarriers<1> q_barrier;
    AttentionBarriers<Tile::stages> k_barrier, v_barrier;
    uint64_t v_loaded;
    int k_valid[Tile::stages];

    __device__ __forceinline__ void init() {
        constexpr int warps = 4 * Tile::consumers;  // each releases what it has read
        q_barrier.init(1, warps);
        k_barrier.init(1, warps);
        v_barrier.init(1, warps);
        mbarrier_init(&v_loaded, 1);
    }
};

template <>
struct AttentionShared<AttentionFp8> {
    using Tile = AttentionFp8;
    static constexpr int t_warps = 3;
    uint8_t k[Tile::stages][1][Tile::keys][Tile::D];
    uint8_t v[Tile::stages][1][Tile::keys][Tile::D];
    uint8_t t[Tile::value_stages][Tile::D][Tile::keys];  // values transposed: wgmma wants e4m3 with k contiguous
    AttentionBarriers<Tile::stages> k_barrier, v_barrier;
    AttentionBarriers<Tile::value_stages> t_barrier;
    int k_valid[Tile::stages], v_valid[Tile::stages];

    __device__ __forceinline__ void init() {
        constexpr int warps = 4 * Tile::consumers;
        k_barrier.init(1, warps);
        v_barrier.init(1, t_warps);
        t_barrier.init(t_warps, warps);
    }
};

// ---- one warp that loads -------------------------------------------------------------------------------------------

template <class Tile>
struct AttentionProducer {
    AttentionShared<Tile>& shared;
    const AttentionParams& parameters;
    AttentionPipelineState<Tile::stages> k, v;
    AttentionPipelineState<1> q, loaded;
    int lane = threadIdx.x % 32;

    // All lanes wait, lane 0 arrives. __syncwarp() before the next wait: a lane that lags two phases of a barrier
    // behind would wait for the same parity again, forever. Before `v_loaded` it is that of clear_values.
    __device__ __forceinline__ void load_queries(int row, int head, int query) {
        mbarrier_wait(&shared.q_barrier.empty[0], q.phase ^ 1);
        if (lane == 0) {
            mbarrier_arrive_expect(&shared.q_barrier.full[0], sizeof(shared.q));
            for (int part = 0; part < Tile::parts; ++part) {
                tma_load_4d(shared.q[part], &parameters.q, &shared.q_barrier.full[0], part * 64, head, query, row);
            }
        }
        __syncwarp();
        q.next();
    }

    __device__ __forceinline__ void load_keys(AttentionKeys keys, int head) {
        mbarrier_wait(&shared.k_barrier.empty[k.stage], k.phase ^ 1);
        if (lane == 0) {
            shared.k_valid[k.stage] = keys.valid;
            load_tile(shared.k[k.stage], &parameters.k, &shared.k_barrier.full[k.stage], keys.token, head);
        }
        __syncwarp();
        k.next();
    }

    __device__ __forceinline__ void load_values(AttentionKeys keys, int head) {
        mbarrier_wait(&shared.v_barrier.empty[v.stage], v.phase ^ 1);
        uint64_t* full = &shared.v_barrier.full[v.stage];
        if constexpr (Tile::fp8) {
            if (lane == 0) {
                shared.v_valid[v.stage] = keys.valid;
                load_tile(shared.v[v.stage], &parameters.v, full, keys.token, head);
            }
        } else if (keys.valid == Tile::keys) {
            if (lane == 0) load_tile(shared.v[v.stage], &parameters.v, full, keys.token, head);
        } else {
            if (lane == 0) load_tile(shared.v[v.stage], &parameters.v, &shared.v_loaded, keys.token, head);
            mbarrier_wait(&shared.v_loaded, loaded.phase);
            loaded.next();
            clear_values(keys.valid);
            if (lane == 0) mbarrier_arrive(full);
        }
        __syncwarp();
        v.next();
    }

    template <class Stage>
    __device__ __forceinline__ void load_tile(Stage& to, const CUtensorMap* map, uint64_t* full, int token, int head) {
        mbarrier_arrive_expect(full, sizeof(to));
        for (int part = 0; part < Tile::parts; ++part) tma_load_3d(to[part], map, full, part * 64, head, token);
    }

    // 0 * NaN is NaN, so values behind the end of a run are cleared before any consumer reads them. The swizzle
    // permutes within rows, so whole rows can be cleared regardless of it.
    __device__ __forceinline__ void clear_values(int from) {
        constexpr int chunks = 128 / sizeof(uint4);  // of a row
        for (int part = 0; part < Tile::parts; ++part) {
            uint4* rows = reinterpret_cast<uint4*>(shared.v[v.stage][part]);
            for (int i = from * chunks + lane; i < Tile::keys * chunks; i += 32) rows[i] = make_uint4(0, 0, 0, 0);
        }
        async_proxy_fence();
        __syncwarp();
    }

    // Values follow one tile behind their keys, in the order of use.
    __device__ __forceinline__ void run() {
        const AttentionShape& shape = parameters.shape;
        AttentionSchedule<Tile> schedule(shape);
        const int tiles = query_tiles(shape.T);
        AttentionWork work;
        while (schedule.next(work)) {
            if (work.first == work.last) continue;
            const int head = work.tile / tiles;
            if constexpr (!Tile::fp8) load_queries(work.row, head, (work.tile - head * tiles) * Tile::queries);
            AttentionKeys previous = key_tile<Tile::keys>(shape, work.row, work.first);
            load_keys(previous, head);
            for (int unit = work.first + 1; unit < work.last; ++unit) {
                const AttentionKeys now = key_tile<Tile::keys>(shape, work.row, unit);
                load_keys(now, head);
                load_values(previous, head);
                previous = now;
            }
            load_values(previous, head);
        }
    }
};

// ---- three warps that transpose e4m3 values ------------------------------------------------------------------------

// Two permutations make this cheap and cost nothing elsewhere. Of 16 keys, keys 2 c, 2 c + 1, 2 c + 8, 2 c + 9 become
// neighbours, as in the registers with these keys' probabilities (attention.cuh). Of 16 values of the head the even
// ones come first, which spreads the rows of a store over all banks (attention_accumulator.cuh).
struct AttentionTransposer {
    using Tile = AttentionFp8;
    using Shared = AttentionShared<Tile>;
    Shared& shared;
    AttentionPipelineState<Tile::stages> v;
    AttentionPipelineState<Tile::value_stages> t;
    int lane = threadIdx.x % 32;

    // Zero for the bytes of keys at `valid` and beyond, in the order first, first + 1, first + 8, first + 9.
    __device__ __forceinline__ static uint32_t mask(int first, int valid) {
        return (first < valid ? 0xff : 0) | (first + 1 < valid ? 0xff00 : 0) | (first + 8 < valid ? 0xff0000 : 0) |
               (first + 9 < valid ? 0xff000000 : 0);
    }

    // All keys, 16 values of the head from `column` on. The 128-byte swizzle: chunk i of row r lies at i ^ r % 8.
    __device__ __forceinline__ void transpose(int column, int valid) {
        constexpr int blocks = Tile::keys / 32;
        const uint8_t* from = &shared.v[v.stage][0][lane][(column / 16 ^ lane % 8) * 16];
        // Of each 8 keys this thread has values 2 g and 2 g + 1 of keys 2 c and 2 c + 1; g = lane / 4, c = lane % 4.
        uint32_t x[blocks][4];
#pragma unroll
        for (int block = 0; block < blocks; ++block) ldmatrix_trans(x[block], from + block * 32 * Tile::D);
        uint8_t* to = shared.t[t.stage][column + lane % 16];
        const int chunk = lane / 16 ^ lane % 8;  // the upper lanes name the rows of the next 16 keys
#pragma unroll
        for (int block = 0; block < blocks; ++block) {
            uint32_t y[4];
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                y[i] = __byte_perm(x[block][i], x[block][i + 1], 0x6420);
                y[i + 1] = __byte_perm(x[block][i], x[block][i + 1], 0x7531);
                if (valid < Tile::keys) {
                    const uint32_t keep = mask(block * 32 + 8 * i + lane % 4 * 2, valid);
                    y[i] &= keep;
                    y[i + 1] &= keep;
                }
            }
            stmatrix(to + (chunk ^ block * 2) * 16, y);
        }
    }

    __device__ __forceinline__ void run(const AttentionShape& shape) {
        const int warp = threadIdx.x % 128 / 32 - 1;
        AttentionSchedule<Tile> schedule(shape);
        AttentionWork work;
        while (schedule.next(work)) {
            for (int unit = work.first; unit < work.last; ++unit) {
                mbarrier_wait(&shared.v_barrier.full[v.stage], v.phase);
                mbarrier_wait(&shared.t_barrier.empty[t.stage], t.phase ^ 1);
                const int valid = shared.v_valid[v.stage];
                for (int column = warp * 16; column < Tile::D; column += Shared::t_warps * 16) transpose(column, valid);
                async_proxy_fence();
                __syncwarp();
                if (lane == 0) {
                    mbarrier_arrive(&shared.v_barrier.empty[v.stage]);
                    mbarrier_arrive(&shared.t_barrier.full[t.stage]);
                }
                __syncwarp();
                v.next();
                t.next();
            }
        }
    }
};

}  // namespace dsa
