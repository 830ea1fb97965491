// Loops on the device: what the launcher takes. Needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsa {

struct WhileArgs {
    cudaGraph_t graph;
    cudaGraphNode_t after;  // the node that it waits for
    cudaGraphConditionalHandle handle;
    const int64_t* slots;  // [rows]
    int rows;
    const float* flags;  // that of slot n at flags[n * stride]; 0: the slot goes on
    int64_t stride;
};

// Adds a node to a graph which sets the condition of its WHILE node: does any row's slot go on? Throws
// std::invalid_argument with the value and the rule it breaks, std::runtime_error with CUDA's message.
cudaGraphNode_t set_while(const WhileArgs& args);

}  // namespace dsa
