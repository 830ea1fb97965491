// softmax(q K^T / sqrt(D)) V over runs of cached frames, for sm_90a.
//
// Persistent, warp-specialized blocks. Two consumer warpgroups with 64 queries each take turns on the tensor cores
// (wgmma), so that one computes its softmax while the other multiplies; a producer warpgroup loads (TMA) tiles of keys
// and values into a ring of stages. A second kernel combines the partial results of query tiles that blocks share.
#pragma once

#include <cuda_fp8.h>

#include <cstring>

#include "attention_producer.cuh"
#include "attention_accumulator.cuh"

namespace dsa {

template <class Tile>
struct AttentionConsumer {
    static constexpr int D = Tile::D, keys = Tile::keys, steps = D / Tile::step;
    static constexpr int part_bytes = keys * 128, tile_bytes = Tile::parts * part_bytes;
    AttentionShared<Tile>& shared;
    const AttentionShape& shape;
    const int group;
    AttentionPipelineState<1> q;
    AttentionPipelineState<Tile::stages> k;
    AttentionPipelineState<Tile::value_stages> v;
    uint64_t q_operand, k_operand, v_operand;
    uint32_t queries[Tile::fp8 ? 4 * steps : 1];  // e4m3, operand A of Q K^T
    float scale[2];                               // from Q K^T to scores in powers of two, of each half
    AttentionAccumulator<Tile> acc;
    float scores[keys / 2];
    uint32_t probs[keys / (Tile::fp8 ? 8 : 4)];  // operand A of P V

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

    // One arrival per warp: every warp waits for its own part of a GEMM.
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
        wgmma_results(acc.o);
        release(&values_barrier().empty[v.stage]);
        v.next();
    }

    // ---- GEMMs -----------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void gemm_qk() {
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

    __device__ __forceinline__ void gemm_pv() {
        mbarrier_wait(&values_barrier().full[v.stage], v.phase);
        const uint64_t operand = wgmma_advance(v_operand, v.stage * tile_bytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < keys / Tile::step; ++step) {
            if constexpr (Tile::fp8) {
                WgmmaE4m3<D>::rs(acc.o, probs + 4 * step, wgmma_advance(operand, step * 32), true);
            } else {
                Wgmma<D>::rs(acc.o, probs + 4 * step, wgmma_advance(operand, step * 16 * 128));
            }
        }
        wgmma_commit();
    }

    // ---- softmax ---------------------------------------------------------------------------------------------------

    // Scores become probabilities, exp2(score - row_max) 2^offset; all earlier sums must be multiplied with `factor`.
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
            float row_max = acc.row_max[half];
#pragma unroll
            for (int i = 2 * half; i < keys / 2; i += 4) row_max = fmaxf(row_max, fmaxf(scores[i], scores[i + 1]));
            row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffff, row_max, 1));
            row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffff, row_max, 2));
            factor[half] = exp2_approx((acc.row_max[half] - row_max) * scale_of(half));
            acc.row_max[half] = row_max;
            shift[half] = row_max * scale_of(half) - Tile::offset;
            acc.row_sum[half] *= factor[half];
        }
#pragma unroll
        for (int i = 0; i < keys / 2; ++i) {
            const int half = i >> 1 & 1;
            scores[i] = exp2_approx(scores[i] * scale_of(half) - shift[half]);
            acc.row_sum[half] += scores[i];
        }
    }

    __device__ __forceinline__ float scale_of(int half) const { return Tile::fp8 ? scale[half] : shape.scale; }

    // The accumulator layout of Q K^T, rounded, is that of operand A of P V: no exchange between threads. With e4m3
    // this holds for the key order of AttentionTransposer.
    __device__ __forceinline__ void round_probs() {
        if constexpr (Tile::fp8) {
#pragma unroll
            for (int i = 0; i < keys / 8; ++i) {
                const float* s = scores + i / 4 * 16 + (i >> 1 & 1) * 8 + (i & 1) * 2;
                probs[i] = e4m3_of(s[0], s[1], s[4], s[5]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < keys / 4; ++i) {
                const __nv_bfloat162 pair = __floats2bfloat162_rn(scores[2 * i], scores[2 * i + 1]);
                memcpy(probs + i, &pair, sizeof(pair));
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
        const int first = (work.tile - head * tiles) * Tile::queries + AttentionAccumulator<Tile>::query(group);
        const float k_scale = __ldg(shape.k_scale + __ldg(shape.slot + work.row) * shape.H + head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first + 8 * half;
            const __nv_bfloat16* from = shape.q + ((int64_t(work.row) * shape.T + query) * shape.H + head) * D;
            float values[D / 4], max_abs = 1e-30f;  // not zero: it is divided by
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
            for (float x : values) max_abs = fmaxf(max_abs, fabsf(x));
            max_abs = fmaxf(max_abs, __shfl_xor_sync(0xffffffff, max_abs, 1));
            max_abs = fmaxf(max_abs, __shfl_xor_sync(0xffffffff, max_abs, 2));
            const float up = 448 / max_abs;  // the largest e4m3 value
            scale[half] = shape.scale * k_scale * (max_abs / 448);
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
        acc.rescale({factor, factor});
    }

    // ---- a query tile ----------------------------------------------------------------------------------------------

    // Q K^T of a tile is issued ahead of P V of the previous one, which then overlaps the softmax.
    __device__ __forceinline__ void attend(int units) {
        float factor[2];
        int valid = await_keys();
        gemm_qk();
        wgmma_wait<0>();
        finish_scores();
        softmax(valid, factor);
        round_probs();
        if (units > 1) valid = await_keys();
        for (int unit = 1; unit < units; ++unit) {
            await_turn();
            gemm_qk();
            gemm_pv();
            pass_turn_to(1 - group);
            wgmma_wait<1>();
            finish_scores();
            softmax(valid, factor);
            // The next keys: ptxas would move the wait for P V before the softmax, but not across a branch.
            if (unit + 1 < units) valid = await_keys();
            wgmma_wait<0>();
            finish_values();
            acc.rescale(factor);
            round_probs();
        }
        if constexpr (!Tile::fp8) release(&shared.q_barrier.empty[0]);
        gemm_pv();
        wgmma_wait<0>();
        finish_values();
        acc.sum_over_columns();
        acc.row_max[0] *= scale_of(0);
        acc.row_max[1] *= scale_of(1);
    }

    __device__ __forceinline__ void run() {
        AttentionSchedule<Tile> schedule(shape);
        AttentionWork work;
        if (group == 1) pass_turn_to(0);
        while (schedule.next(work)) {
            acc.clear();
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
            if (work.partial < 0) {
                acc.store(shape, work.row, work.tile, group);
            } else {
                AttentionPartial<Tile>(shape, work.row, blockIdx.x, work.partial, group).store(acc);
            }
        }
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_kernel(const __grid_constant__ AttentionParams parameters) {
    DSA_DYNAMIC_SHARED(AttentionShared<Tile>, shared);
    if (threadIdx.x == 0) {
        if (!Tile::fp8) tma_prefetch(&parameters.q);
        tma_prefetch(&parameters.k);
        tma_prefetch(&parameters.v);
        shared->init();
        mbarrier_init_fence();
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // uniform in a warp, which the compiler can see
    if (group == Tile::consumers) {
        dealloc_registers<Tile::producer_registers>();
        const int warp = threadIdx.x % 128 / 32;
        if (warp == 0) {
            AttentionProducer<Tile>{*shared, parameters}.run();
        } else if constexpr (Tile::fp8) {
            AttentionTransposer{*shared}.run(parameters.shape);
        }
    } else {
        alloc_registers<Tile::consumer_registers>();
        AttentionConsumer<Tile>(*shared, parameters.shape, group).run();
    }
}

}  // namespace dsa
