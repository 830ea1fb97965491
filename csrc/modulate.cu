// The launchers of modulate.cuh.
#include "modulate.cuh"
#include "rows.h"

namespace dsa {

void modulate(const ModulateArgs& args) {
    const Work work{args.op, {args.B, args.T, args.C}};
    const Modulate p{args.x, args.y, args.sum, args.out, args.gate, args.shift, args.scale, args.row_scale,
                     int(args.B * args.T), int(args.T), int(args.C), args.eps};
    if (p.rows == 0) return;
    with_dtype(work, args.dtype, [&](auto type) {
        with_row_shape(work, p.rows, args.C, [&](auto vectors, unsigned blocks, dim3 block) {
            using T = decltype(type);
            constexpr int V = decltype(vectors)::value;
            const auto kernel = p.row_scale ? modulate_kernel<T, V, true> : modulate_kernel<T, V, false>;
            launch(work, {dim3(blocks), block, 0, args.stream}, kernel, p);
        });
    });
}

void gelu_bias(const GeluArgs& args) {
    const Work work{"gelu_bias", {args.B, args.T, args.C}};
    const Gelu p{args.x, args.out, args.bias, args.row_scale, int(args.B * args.T), int(args.T), int(args.C)};
    if (p.rows == 0) return;
    with_dtype(work, args.dtype, [&](auto type) {
        with_row_shape(work, p.rows, args.C, [&](auto vectors, unsigned blocks, dim3 block) {
            using T = decltype(type);
            constexpr int V = decltype(vectors)::value;
            const auto kernel = p.row_scale ? gelu_kernel<T, V, true> : gelu_kernel<T, V, false>;
            launch(work, {dim3(blocks), block, 0, args.stream}, kernel, p);
        });
    });
}

}  // namespace dsa
