// softmax(q K^T / sqrt(D)) V over runs of cached frames: what the launcher takes. Needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace dsa {

struct AttentionArgs {
    const void* q;        // [B, T, H, D] bf16
    const void* k;        // [N, W, S, H, D] bf16 or, with scales, e4m3: one layer of the cache
    const void* v;        // like k
    void* out;            // like q
    const int64_t* slot;  // [B] on the device: the cache slot that a row reads, 0..N-1
    const int64_t* keys;  // [B, R, 2] on the device: runs [start, stop) of frames of that slot, 0..W; may be empty
    int64_t B, T, H, D, N, W, S, R;
    void* workspace;  // attention_workspace() bytes on the device, 16-byte aligned; its content does not matter
    size_t workspace_bytes;
    int blocks;  // thread blocks that share the work: attention_blocks() of the device
    cudaStream_t stream;
    // e4m3 cache, D = 128: [N, H] float32 on the device; a key is k * k_scale, a value v * v_scale. Both null: bf16.
    const float* k_scale = nullptr;
    const float* v_scale = nullptr;
};

// One block fits on an SM, so as many blocks as there are SMs keep the device full.
int attention_blocks(int sms);

// Bytes that the partial results of `blocks` blocks take; depends on shapes only, so that a graph can be captured.
size_t attention_workspace(int64_t B, int64_t T, int64_t H, int64_t D, int blocks);

// Throws std::runtime_error with the values and the rule they break, or with CUDA's message.
void attention(const AttentionArgs& args);

}  // namespace dsa
