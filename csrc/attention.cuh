// softmax(q K^T / sqrt(D)) V over runs of cached frames, for sm_90a.
//
// A block is persistent. Two consumer warpgroups with 64 queries each multiply (wgmma) and take turns, so that the
// tensor cores work for one while the other computes its softmax; a third one loads (TMA) tiles of keys and values into
// rings of stages. A small second kernel adds up the partial results of query tiles that several blocks share.
#pragma once

#include <cuda_fp8.h>

#include <cstring>

#include "attention_load.cuh"
#include "attention_result.cuh"

namespace dsa {

template <class Tile>
struct AttentionConsumer {
    static constexpr int D = Tile::D, keys = Tile::keys, steps = D / Tile::step;
    static constexpr int part_bytes = keys * 128, tile_bytes = Tile::parts * part_bytes;
    AttentionShared<Tile>& shared;
    const AttentionShape& shape;
    const int group;
    AttentionRing<1> q;
    AttentionRing<Tile::stages> k;
    AttentionRing<Tile::value_stages> v;
    uint64_t q_operand, k_operand, v_operand;
    uint32_t queries[Tile::fp8 ? 4 * steps : 1];  // e4m3, as operand A of the product with the keys
    float scale[2];                               // from products to scores in powers of two, of each half
    AttentionResult<Tile> result;
    float scores[keys / 2];
    uint32_t weights[keys / (Tile::fp8 ? 8 : 4)];  // as operand A of the product with the values

    __device__ __forceinline__ AttentionConsumer(AttentionShared<Tile>& shared, const AttentionShape& shape, int group)
        : shared(shared), shape(shape), group(group) {
        scale[0] = scale[1] = shape.scale;
        k_operand = wgmma_k_major(shared_address(shared.k));
        if constexpr (Tile::fp8) {
            v_operand = wgmma_k_major(shared_address(shared.t));
        } else {
            q_operand = wgmma_k_major(shared_address(shared.q) + group * 64 * 128);
            v_operand = wgmma_mn_major(shared_address(shared.v), part_bytes);
        }
    }

    // ---- barriers --------------------------------------------------------------------------------------------------

    // One arrival for each warp: every warp waits for its own part of a product.
    __device__ __forceinline__ static void release(uint64_t* barrier) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
    }

    // Barrier 1 + g is the turn of group g to use the tensor cores.
    __device__ __forceinline__ void pass_turn_to(int other) { named_barrier_arrive(1 + other, 128 * Tile::consumers); }
    __device__ __forceinline__ void await_turn() { named_barrier_sync(1 + group, 128 * Tile::consumers); }

    // Waits for the next keys; returns how many of them count.
    __device__ __forceinline__ int await_keys() {
        mbarrier_wait(&shared.k_barrier.full[k.stage], k.phase);
        return shared.k_valid[k.stage];
    }

    __device__ __forceinline__ AttentionBarriers<Tile::value_stages>& values_barrier() {
        if constexpr (Tile::fp8) {
            return shared.t_barrier;
        } else {
            return shared.v_barrier;
        }
    }

    __device__ __forceinline__ void finish_scores() {
        wgmma_results(scores);
        release(&shared.k_barrier.empty[k.stage]);
        k.next();
    }

    __device__ __forceinline__ void finish_values() {
        wgmma_results(result.o);
        release(&values_barrier().empty[v.stage]);
        v.next();
    }

    // ---- products --------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void multiply_scores() {
        const uint64_t operand = wgmma_advance(k_operand, k.stage * tile_bytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < steps; ++step) {  // four steps of 32 bytes in each row of 128
            const uint64_t b = wgmma_advance(operand, step / 4 * part_bytes + step % 4 * 32);
            if constexpr (Tile::fp8) {
                WgmmaE4m3<keys>::rs(scores, queries + 4 * step, b, step > 0);
            } else {
                const uint64_t a = wgmma_advance(q_operand, step / 4 * Tile::queries * 128 + step % 4 * 32);
                Wgmma<keys>::ss(scores, a, b, step > 0);
            }
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void multiply_values() {
        mbarrier_wait(&values_barrier().full[v.stage], v.phase);
        const uint64_t operand = wgmma_advance(v_operand, v.stage * tile_bytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < keys / Tile::step; ++step) {
            if constexpr (Tile::fp8) {
                WgmmaE4m3<D>::rs(result.o, weights + 4 * step, wgmma_advance(operand, step * 32), true);
            } else {
                Wgmma<D>::rs(result.o, weights + 4 * step, wgmma_advance(operand, step * 16 * 128));
            }
        }
        wgmma_commit();
    }

    // ---- softmax ---------------------------------------------------------------------------------------------------

    // Scores become weights, exp2(score - top) 2^offset; `factor` is what all earlier sums must be multiplied with.
    __device__ __forceinline__ void softmax(int valid, float (&factor)[2]) {
        if (valid < keys) {
            const int column = threadIdx.x % 4 * 2;
#pragma unroll
            for (int i = 0; i < keys / 2; ++i) {
                if (column + i / 4 * 8 + (i & 1) >= valid) scores[i] = -INFINITY;
            }
        }
        float shift[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = result.top[half];
#pragma unroll
            for (int i = 2 * half; i < keys / 2; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
            factor[half] = exp2_approximate((result.top[half] - top) * scale_of(half));
            result.top[half] = top;
            shift[half] = top * scale_of(half) - Tile::offset;
            result.total[half] *= factor[half];
        }
#pragma unroll
        for (int i = 0; i < keys / 2; ++i) {
            const int half = i >> 1 & 1;
            scores[i] = exp2_approximate(scores[i] * scale_of(half) - shift[half]);
            result.total[half] += scores[i];
        }
    }

    __device__ __forceinline__ float scale_of(int half) const { return Tile::fp8 ? scale[half] : shape.scale; }

    // Weights as the product has them are, rounded, operand A of these keys: no thread needs another one's. With e4m3
    // this holds for the order in which AttentionTransposer puts the keys.
    __device__ __forceinline__ void round_weights() {
        if constexpr (Tile::fp8) {
#pragma unroll
            for (int i = 0; i < keys / 8; ++i) {
                const float* s = scores + i / 4 * 16 + (i >> 1 & 1) * 8 + (i & 1) * 2;
                weights[i] = e4m3_of(s[0], s[1], s[4], s[5]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < keys / 4; ++i) {
                const __nv_bfloat162 pair = __floats2bfloat162_rn(scores[2 * i], scores[2 * i + 1]);
                memcpy(weights + i, &pair, sizeof(pair));
            }
        }
    }

    __device__ __forceinline__ static uint32_t e4m3_of(float a, float b, float c, float d) {
        const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
        const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
        return low | high << 16;
    }

    // ---- queries as e4m3 -------------------------------------------------------------------------------------------

    // Reads a quarter of each of the thread's two queries: of every 16 values of the head the four from 4 (t % 4) on,
    // as operand A wants them. Each query has its own scale.
    __device__ __forceinline__ void load_queries(const AttentionWork& work) {
        const int tiles = query_tiles(shape.T), head = work.tile / tiles;
        const int first = (work.tile - head * tiles) * Tile::queries + AttentionResult<Tile>::query(group);
        const float k_scale = __ldg(shape.k_scale + __ldg(shape.slot + work.row) * shape.H + head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first + 8 * half;
            const __nv_bfloat16* from = shape.q + ((int64_t(work.row) * shape.T + query) * shape.H + head) * D;
            float values[D / 4], greatest = 1e-30f;  // not zero: it is divided by
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                uint2 bits = make_uint2(0, 0);
                if (query < shape.T) bits = __ldg(reinterpret_cast<const uint2*>(from + i * 16) + threadIdx.x % 4);
                values[4 * i] = __uint_as_float(bits.x << 16);
                values[4 * i + 1] = __uint_as_float(bits.x & 0xffff0000);
                values[4 * i + 2] = __uint_as_float(bits.y << 16);
                values[4 * i + 3] = __uint_as_float(bits.y & 0xffff0000);
            }
#pragma unroll
            for (float x : values) greatest = fmaxf(greatest, fabsf(x));
            greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffff, greatest, 1));
            greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffff, greatest, 2));
            const float up = 448 / greatest;  // the greatest e4m3 number
            scale[half] = shape.scale * k_scale * (greatest / 448);
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                const float* x = values + 4 * i;
                queries[i / 2 * 4 + i % 2 * 2 + half] = e4m3_of(x[0] * up, x[1] * up, x[2] * up, x[3] * up);
            }
        }
    }

    __device__ __forceinline__ void scale_values(const AttentionWork& work) {
        const int head = work.tile / query_tiles(shape.T);
        const float factor = __ldg(shape.v_scale + __ldg(shape.slot + work.row) * shape.H + head);
        result.rescale({factor, factor});
    }

    // ---- a query tile ----------------------------------------------------------------------------------------------

    // The scores of a tile are multiplied ahead of the values of the tile before, which then overlap its softmax.
    __device__ __forceinline__ void attend(int units) {
        float factor[2];
        int valid = await_keys();
        multiply_scores();
        wgmma_wait<0>();
        finish_scores();
        softmax(valid, factor);
        round_weights();
        if (units > 1) valid = await_keys();
        for (int unit = 1; unit < units; ++unit) {
            await_turn();
            multiply_scores();
            multiply_values();
            pass_turn_to(1 - group);
            wgmma_wait<1>();
            finish_scores();
            softmax(valid, factor);
            // The keys of the next turn, here because ptxas would move the wait for the values before the softmax, but
            // not across a branch.
            if (unit + 1 < units) valid = await_keys();
            wgmma_wait<0>();
            finish_values();
            result.rescale(factor);
            round_weights();
        }
        if constexpr (!Tile::fp8) release(&shared.q_barrier.empty[0]);
        multiply_values();
        wgmma_wait<0>();
        finish_values();
        result.sum_over_columns();
        result.top[0] *= scale_of(0);
        result.top[1] *= scale_of(1);
    }

    __device__ __forceinline__ void run() {
        AttentionSchedule<Tile> schedule(shape);
        AttentionWork work;
        if (group == 1) pass_turn_to(0);
        while (schedule.next(work)) {
            result.clear();
            if (work.first < work.last) {
                if constexpr (Tile::fp8) {
                    load_queries(work);
                } else {
                    mbarrier_wait(&shared.q_barrier.full[0], q.phase);
                    q.next();
                }
                attend(work.last - work.first);
                if constexpr (Tile::fp8) scale_values(work);
            }
            if (work.piece < 0) {
                result.store(shape, work.row, work.tile, group);
            } else {
                AttentionPartial<Tile>(shape, work.row, blockIdx.x, work.piece, group).store(result);
            }
        }
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_kernel(const __grid_constant__ AttentionParameters parameters) {
    DSA_DYNAMIC_SHARED(AttentionShared<Tile>, shared);
    if (threadIdx.x == 0) {
        if (!Tile::fp8) tma_prefetch(&parameters.q);
        tma_prefetch(&parameters.k);
        tma_prefetch(&parameters.v);
        shared->init();
        mbarrier_init_fence();
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // known to be the same in a whole warp
    if (group == Tile::consumers) {
        give_registers<Tile::feeder_registers>();
        const int warp = threadIdx.x % 128 / 32;
        if (warp == 0) {
            AttentionLoader<Tile>{*shared, parameters}.run();
        } else if constexpr (Tile::fp8) {
            AttentionTransposer{*shared}.run(parameters.shape);
        }
    } else {
        take_registers<Tile::consumer_registers>();
        AttentionConsumer<Tile>(*shared, parameters.shape, group).run();
    }
}

}  // namespace dsa
