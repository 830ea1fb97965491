// The condition of a loop on the device.
#pragma once

#include <cuda_runtime.h>

#include "graphs.h"

namespace dsa {

// One warp: the rows are few, and their flags are read side by side.
__global__ void set_while_kernel(WhileArgs p) {
    bool on = false;
#pragma unroll 1
    for (int row = threadIdx.x; row < p.rows; row += 32) on = on || p.flags[p.slots[row] * p.stride] == 0.0f;
    on = __any_sync(0xffffffffu, on);
    if (threadIdx.x == 0) cudaGraphSetConditional(p.handle, on);
}

}  // namespace dsa
