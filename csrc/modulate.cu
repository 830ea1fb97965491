// The launchers of modulate.cuh.
#include "modulate.cuh"
#include "row_launch.h"

namespace dsa {

void modulate(const ModulateArgs& args) {
    const OpInfo op{args.op, {args.B, args.T, args.C}};
    const ModulateParams p{args.x,      args.y,         args.sum,
                           args.out,    args.gate,      args.shift,
                           args.scale,  args.row_scale, int(args.B * args.T),
                           int(args.T), int(args.C),    args.eps};
    if (p.rows == 0) return;
    with_dtype(op, args.dtype, [&](auto type) {
        with_row_shape(op, p.rows, args.C, [&](auto vectors, unsigned blocks, dim3 block) {
            using T = decltype(type);
            constexpr int V = decltype(vectors)::value;
            const auto kernel = p.row_scale ? modulate_kernel<T, V, true> : modulate_kernel<T, V, false>;
            launch(op, {dim3(blocks), block, 0, args.stream}, kernel, p);
        });
    });
}

void gelu_bias(const GeluArgs& args) {
    const OpInfo op{"gelu_bias", {args.B, args.T, args.C}};
    const GeluParams p{args.x, args.out, args.bias, args.row_scale, int(args.B * args.T), int(args.T), int(args.C)};
    if (p.rows == 0) return;
    with_dtype(op, args.dtype, [&](auto type) {
        with_row_shape(op, p.rows, args.C, [&](auto vectors, unsigned blocks, dim3 block) {
            using T = decltype(type);
            constexpr int V = decltype(vectors)::value;
            const auto kernel = p.row_scale ? gelu_kernel<T, V, true> : gelu_kernel<T, V, false>;
            launch(op, {dim3(blocks), block, 0, args.stream}, kernel, p);
        });
    });
}

}  // namespace dsa
