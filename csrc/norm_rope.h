// RMSNorm, rotary embedding and the append to the KV cache: what the launcher takes. Needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_args.h"

namespace dsa {

// One layer of the cache [N, W, S, H, D], H and D contiguous. scale [N, H] float32: stored is x / scale; null: x.
struct Cache {
    void* data;
    int dtype;
    int64_t slot, frame, token;  // strides
    const float* scale;
};

// One of q, k, v. weight null: x as it is (v). Goes to `out`, or to the cache where that has data.
struct Operand {
    Rows x;
    Vector weight;
    bool rotate;
    Rows out;
    Cache cache;
};

// [B, T, D / 2] float32; not read where nothing is rotated
struct Angles {
    const float* cos;
    const float* sin;
    int64_t batch, row;
};

// Where the cache is written: slot [B] and write [B, T / S] on the device, contiguous, int64 or else int32.
struct Ring {
    const void* slot;
    bool slot64;
    const void* write;
    bool write64;
    int64_t frame_tokens;  // S
};

struct NormRopeArgs {
    const char* op;
    int dtype;  // of x and out
    int64_t B, T, C, D;
    float eps;
    int count;  // of operands
    Operand operands[3];
    Angles angles;
    Ring ring;
    cudaStream_t stream;
};

// Throws std::invalid_argument with the value and the rule it breaks, std::runtime_error with CUDA's message.
void norm_rope(const NormRopeArgs& args);

}  // namespace dsa
