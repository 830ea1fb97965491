// The launcher of norm_rope.cuh.
#include "norm_rope.cuh"

#include <algorithm>

#include "row_launch.h"

namespace dsa {
namespace {

void check_shapes(const OpInfo& op, const NormRopeArgs& args) {
    const auto any = [&](auto has) { return std::any_of(args.operands, args.operands + args.count, has); };
    const bool rotates = any([](const Operand& s) { return s.rotate; });
    const bool appends = any([](const Operand& s) { return s.cache.data != nullptr; });
    if ((rotates || appends) && (args.D < 8 || args.D % 8 || args.C % args.D)) {
        refuse(op, "head dim " + std::to_string(args.D) + " must be a multiple of 8 that divides the channels");
    }
    if (appends && (args.ring.frame_tokens < 1 || args.T % args.ring.frame_tokens)) {
        refuse(op, std::to_string(args.ring.frame_tokens) + " tokens a frame must divide the tokens");
    }
}

}  // namespace

void norm_rope(const NormRopeArgs& args) {
    const OpInfo op{args.op, {args.B, args.T, args.C}};
    check_shapes(op, args);
    NormRopeParams p{{}, args.angles, args.ring, int(args.B * args.T), int(args.T), int(args.C), int(args.D), args.eps};
    std::copy(args.operands, args.operands + args.count, p.operands);
    if (p.rows == 0) return;
    with_dtype(op, args.dtype, [&](auto type) {
        with_row_shape(op, p.rows, args.C, [&](auto vectors, unsigned blocks, dim3 block) {
            const LaunchConfig at{dim3(blocks, args.count), block, 0, args.stream};
            launch(op, at, norm_rope_kernel<decltype(type), decltype(vectors)::value>, p);
        });
    });
}

}  // namespace dsa
