// The end of a denoising step, the second of two launches: the confidence head and the stop flags.
//
// Each block combines a frame's statistics from those of its tiles (Chan's formula) and computes a slice of the hidden
// layer; the last block to arrive computes confidences and stop flags. No sum depends on the order of arrival.
#pragma once

#include "epilogue.cuh"

namespace dsa {

constexpr int SLICES = 16;  // blocks that share a frame's hidden layer

struct ConfidenceParams {
    const float* statistics;  // [B * F, tiles, 2, C]
    HeadWeights head;
    StopRule rule;
    float* hidden;  // [B * F, M]
    float* state;   // [B, F + 1]
    unsigned* arrived;
    int batch, frames, frame_tokens, tile_tokens, tiles, channels;
    float eps;
};

// features = (mean, deviation, time) of one frame, four channels a thread at a time.
__device__ __forceinline__ void compute_features(const ConfidenceParams& p, int frame, float* features) {
    const float* tiles = p.statistics + int64_t(frame) * p.tiles * 2 * p.channels;
    for (int c = threadIdx.x * 4; c < p.channels; c += THREADS * 4) {
        float count = 0.0f, mean[4] = {}, squares[4] = {};
#pragma unroll 4
        for (int tile = 0; tile < p.tiles; ++tile) {
            const float more = min(p.tile_tokens, p.frame_tokens - tile * p.tile_tokens);
            const float4 m = __ldg(reinterpret_cast<const float4*>(tiles + (2 * tile) * p.channels + c));
            const float4 s = __ldg(reinterpret_cast<const float4*>(tiles + (2 * tile + 1) * p.channels + c));
            const float means[4] = {m.x, m.y, m.z, m.w}, sums[4] = {s.x, s.y, s.z, s.w};
            const float part = more / (count + more);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float apart = means[i] - mean[i];
                mean[i] += apart * part;
                squares[i] += sums[i] + apart * apart * count * part;
            }
            count += more;
        }
        const int64_t time = frame / p.frames * p.head.time.batch + frame % p.frames * p.head.time.frame + c;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            features[c + i] = mean[i];
            features[p.channels + c + i] = sqrtf(squares[i] / p.frame_tokens + p.eps);
            features[2 * p.channels + c + i] = load_scalar(p.head.time.data, p.head.time.dtype, time + i);
        }
    }
}

// A warp's dot product of a row of weights, as they lie in memory, and float32 values.
template <class T>
__device__ __forceinline__ float warp_dot(const T* weights, const float* values, int length) {
    float sum = 0.0f;
#pragma unroll 4
    for (int c = threadIdx.x % LANES * VEC; c < length; c += LANES * VEC) {
        float w[VEC];
        load(w, weights + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum += w[i] * values[c + i];
    }
    return warp_sum(sum);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// The stop flag of a row of the batch; its confidences are in the state already.
__device__ __forceinline__ void set_stop_flag(const ConfidenceParams& p, int b) {
    float* state = p.state + b * (p.frames + 1);
    float low = state[0], high = state[0], sum = 0.0f;
    for (int f = 0; f < p.frames; ++f) {
        low = fminf(low, state[f]);
        high = fmaxf(high, state[f]);
        sum += state[f];  // NaN if any is: then the row goes on
    }
    const float reduced = p.rule.reduce[b] == 0 ? low : p.rule.reduce[b] == 1 ? sum / p.frames : high;
    const bool confident = sum == sum && reduced >= p.rule.threshold[b];
    const bool stop = p.rule.step[b] >= p.rule.max_steps[b] || (p.rule.step[b] >= p.rule.min_steps[b] && confident);
    state[p.frames] = stop ? 1.0f : 0.0f;
}

// blockIdx: slice of the hidden layer, frame. One block where no head is to be evaluated.
template <class T>
__global__ void __launch_bounds__(THREADS) confidence_kernel(const __grid_constant__ ConfidenceParams p) {
    DSA_DYNAMIC_SHARED(float, features);
    __shared__ bool last;
    constexpr int dtype = DtypeOf<T>::value;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, all = p.batch * p.frames;
    if (p.head.weight1) {
        compute_features(p, blockIdx.y, features);
        __syncthreads();
        for (int unit = blockIdx.x * WARPS + warp; unit < p.head.units; unit += gridDim.x * WARPS) {
            const T* weights = static_cast<const T*>(p.head.weight1) + int64_t(unit) * 3 * p.channels;
            const float x = warp_dot(weights, features, 3 * p.channels) + load_scalar(p.head.bias1, dtype, unit);
            if (lane == 0) p.hidden[int64_t(blockIdx.y) * p.head.units + unit] = x * sigmoid(x);
        }
        __threadfence();  // what this block wrote is visible before it counts as arrived
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(p.arrived, 1u) == gridDim.x * gridDim.y - 1;
        __syncthreads();
        if (!last) return;
        __threadfence();
    }
    for (int frame = warp; frame < all; frame += WARPS) {
        float sum = 0.0f;
        for (int unit = lane; p.head.weight1 && unit < p.head.units; unit += LANES) {
            sum += load_scalar(p.head.weight2, dtype, unit) * __ldcg(p.hidden + int64_t(frame) * p.head.units + unit);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            float logit = __int_as_float(0x7fc00000);  // NaN: no head
            if (p.head.weight1) logit = sum + load_scalar(p.head.bias2, dtype, 0);
            if (p.head.logits) logit = p.head.logits[frame];
            p.state[frame / p.frames * (p.frames + 1) + frame % p.frames] = sigmoid(logit);
        }
    }
    __syncthreads();
    for (int b = threadIdx.x; b < p.batch; b += THREADS) set_stop_flag(p, b);
}

}  // namespace dsa
