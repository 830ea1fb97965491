// How rows of C channels are spread over threads, and which instance of a kernel template is launched.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.h"
#include "tensor_args.h"

namespace dsa {

constexpr int MAX_CHANNELS = 16384;

// f(T{}) for the type of `dtype`.
template <class F>
void with_dtype(const OpInfo& op, int dtype, F&& f) {
    if (dtype == BFLOAT16) return f(__nv_bfloat16{});
    if (dtype == FLOAT16) return f(__half{});
    if (dtype == FLOAT32) return f(float{});
    refuse(op, "dtype code " + std::to_string(dtype) + " must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

// f(V, blocks, block): each thread of a row holds V vectors of eight channels. One warp holds a row of up to 1536
// channels (Wan's width), so its sums need no barrier, and four rows share a block; a wider row has its own block.
template <class F>
void with_row_shape(const OpInfo& op, int64_t rows, int64_t channels, F&& f) {
    if (channels < 8 || channels % 8 || channels > MAX_CHANNELS) {
        refuse(op, std::to_string(channels) + " channels must be a multiple of 8 and at most " +
                       std::to_string(MAX_CHANNELS));
    }
    const int64_t vectors = channels / 8;
    const unsigned quarter = (rows + 3) / 4;
    if (vectors <= 6 * 32) return f(std::integral_constant<int, 6>{}, quarter, dim3(32, 4));
    f(std::integral_constant<int, 4>{}, unsigned(rows), dim3(32 * ((vectors + 127) / 128)));
}

}  // namespace dsa
