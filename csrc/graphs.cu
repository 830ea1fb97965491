// The launcher of graphs.cuh. It adds a node to a graph instead of running anything.
#include "graphs.cuh"
#include "launch.h"

namespace dsa {

cudaGraphNode_t set_while(const WhileArgs& args) {
    const OpInfo op{"set_while", {args.rows, args.stride, 1}};
    if (args.rows < 1) refuse(op, "rows must be at least 1");
    void* arguments[] = {const_cast<WhileArgs*>(&args)};  // copied into the node
    cudaKernelNodeParams params{};
    params.func = reinterpret_cast<void*>(set_while_kernel);
    params.gridDim = dim3(1);
    params.blockDim = dim3(32);
    params.kernelParams = arguments;
    cudaGraphNode_t node = nullptr;
    check(cudaGraphAddKernelNode(&node, args.graph, &args.after, 1, &params), op);
    return node;
}

}  // namespace dsa
