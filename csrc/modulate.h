// Adaptive LayerNorm, gated residual, bias with its activation: what the launchers take. Needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_args.h"

namespace dsa {

// r = x + gate * y (y null: r = x; gate null: r = x + y), to `sum` if that has data;
// LayerNorm(r) * (1 + scale) + shift to `out` if that has data.
struct ModulateArgs {
    const char* op;
    int dtype;  // of x, y, sum and out
    int64_t B, T, C;
    Rows x, y, sum, out;
    PerFrame gate, shift, scale;
    float eps;
    float* row_scale;  // [B, T]: `out` is e4m3 and this its scale; null: `out` is of the dtype
    cudaStream_t stream;
};

// gelu(x + bias), the tanh approximation, to `out`.
struct GeluArgs {
    int dtype;
    int64_t B, T, C;
    Rows x, out;
    Vector bias;
    float* row_scale;
    cudaStream_t stream;
};

// Both throw std::invalid_argument with the value and the rule it breaks, std::runtime_error with CUDA's message.
void modulate(const ModulateArgs& args);
void gelu_bias(const GeluArgs& args);

}  // namespace dsa
