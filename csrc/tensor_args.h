// Tensors as the launchers take them: an address, and strides in elements. Needs no CUDA compiler.
//
// Letters: B rows of the batch, F frames, S tokens per frame, T = F * S tokens, C channels, H heads, D head dim.
// Channels are contiguous, rows start at multiples of 16 bytes, C is a multiple of 8 (`ops/cuda_backend.py` checks it).
#pragma once

#include <cstdint>

namespace dsa {

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, E4M3 = 3 };

// [B, T, C]
struct Rows {
    void* data;
    int64_t batch, row;
};

// [C]
struct Vector {
    const void* data;
    int dtype;
};

// [B, T / tokens, C]: one vector for `tokens` consecutive tokens. A batch stride of 0: the same for all rows.
struct PerFrame {
    const void* data;
    int dtype;
    int64_t batch, frame;
    int tokens;
};

// [B, F, c, H, W], the last three contiguous
struct Latents {
    void* data;
    int64_t batch, frame;
};

}  // namespace dsa
