// The end of a denoising step: what the launcher takes. Needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "tensor_args.h"

namespace dsa {

// [B, F, channels, height, width], tiled by patches of patch x patch pixels with all their channels
struct LatentShape {
    int dtype;
    int64_t channels, height, width, patch;
};

// The confidence head: weight1 [M, 3 C], bias1 [M], weight2 [M], bias2 [1], all of one dtype. weight1 is null where
// there is no head, or where it has been evaluated already: then logits has what it gave.
struct HeadWeights {
    int dtype;
    int64_t units;  // M
    const void* weight1;
    const void* bias1;
    const void* weight2;
    const void* bias2;
    PerFrame time;        // [B, F, C], what the head reads beside the statistics
    const float* logits;  // [B, F]
};

// [B] each; reduce: 0 min, 1 mean, 2 max
struct StopRule {
    const int* step;
    const int* min_steps;
    const int* max_steps;
    const int* reduce;
    const float* threshold;
};

struct EpilogueArgs {
    int dtype;  // of hidden and weight
    int64_t B, F, S, C, P;
    Rows hidden;
    PerFrame shift, scale;
    const void* weight;  // [P, C]
    Vector bias;         // [P]
    float eps;
    LatentShape latents;
    Latents x, noise, x0, next;
    const float* sigma;  // [B, F], and so is next_sigma
    const float* next_sigma;
    HeadWeights head;
    StopRule rule;
    float* state;     // [B, F + 1]
    void* workspace;  // epilogue_workspace() bytes, 16-byte aligned; its content does not matter
    cudaStream_t stream;
};

// Bytes that the statistics of the tiles and the head's hidden layer take; depends on shapes only.
size_t epilogue_workspace(int64_t B, int64_t F, int64_t S, int64_t C, int64_t M);

// Two launches. Throws std::invalid_argument with the value and the rule it breaks, std::runtime_error with CUDA's
// message.
void epilogue(const EpilogueArgs& args);

}  // namespace dsa
