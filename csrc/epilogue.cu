// The launcher of epilogue.cuh and epilogue_confidence.cuh.
#include <algorithm>

#include "epilogue.cuh"
#include "epilogue_confidence.cuh"
#include "row_launch.h"

namespace dsa {
namespace {

// The workspace: where each part starts, in floats.
struct Workspace {
    size_t statistics, hidden, arrived, end;

    Workspace(int64_t frames, int64_t tiles, int64_t C, int64_t M) {
        statistics = 0;
        hidden = statistics + frames * tiles * 2 * C;
        arrived = hidden + frames * M;
        end = arrived + 1;
    }
};

size_t project_shared(int tiles, int64_t C, size_t size) {
    const size_t tokens = 16 * tiles;
    return std::max(tokens * row_bytes(C, size), tokens * WARPS * SUM_STRIDE * sizeof(float));
}

// How many times 16 tokens a block has: enough that all blocks run at once, else as many as fit into shared memory, for
// each block reads the whole weight.
int choose_tiles(const OpInfo& op, const EpilogueArgs& args, size_t size) {
    const int max_tiles = size == 4 ? 1 : 3;
    const size_t limit = shared_limit(op) - 1024;  // the kernel's static part
    if (project_shared(1, args.C, size) > limit) {
        const int64_t max_channels = (int64_t(limit) / 16 - 64) / 128 * 128 / size;
        refuse(op, std::to_string(args.C) + " channels do not fit into shared memory; at most " +
                       std::to_string(max_channels));
    }
    for (int tiles = 1; tiles < max_tiles; ++tiles) {
        const int64_t blocks = args.B * args.F * ((args.S + 16 * tiles - 1) / (16 * tiles));
        if (blocks <= sm_count(op) || project_shared(tiles + 1, args.C, size) > limit) return tiles;
    }
    return max_tiles;
}

void check_shapes(const OpInfo& op, const EpilogueArgs& args) {
    if (args.C < 8 || args.C % 8) refuse(op, std::to_string(args.C) + " channels must be a multiple of 8");
    const LatentShape& x = args.latents;
    const bool tiled = x.patch > 0 && args.S * x.patch * x.patch == x.height * x.width && x.height % x.patch == 0;
    if (!tiled || args.P != x.patch * x.patch * x.channels || args.P > MAX_OUTPUTS) {
        const std::string side = std::to_string(x.patch), depth = std::to_string(x.channels);
        refuse(op, std::to_string(args.P) + " outputs must be those of a patch of " + side + " x " + side +
                       " pixels with " + depth + " channels, at most " + std::to_string(MAX_OUTPUTS) +
                       ", and tile the latents");
    }
}

ProjectParams project_params(const EpilogueArgs& args, float* statistics, unsigned* arrived) {
    if (!args.head.weight1) statistics = nullptr;
    return {args.hidden, args.shift,  args.scale,  args.weight,     args.bias,  args.x,  args.noise,
            args.x0,     args.next,   args.sigma,  args.next_sigma, statistics, arrived, args.latents,
            int(args.F), int(args.S), int(args.C), int(args.P),     args.eps};
}

ConfidenceParams confidence_params(const EpilogueArgs& args, const float* statistics, float* hidden, unsigned* arrived,
                                   int tokens) {
    const int tiles = (args.S + tokens - 1) / tokens;
    return {statistics,  args.head,   args.rule, hidden, args.state,  arrived, int(args.B),
            int(args.F), int(args.S), tokens,    tiles,  int(args.C), args.eps};
}

}  // namespace

size_t epilogue_workspace(int64_t B, int64_t F, int64_t S, int64_t C, int64_t M) {
    return sizeof(float) * Workspace(B * F, (S + 15) / 16, C, M).end;
}

void epilogue(const EpilogueArgs& args) {
    const OpInfo op{"epilogue", {args.B, args.F * args.S, args.C}};
    check_shapes(op, args);
    if (args.B * args.F * args.S == 0) return;
    const Workspace at(args.B * args.F, (args.S + 15) / 16, args.C, args.head.units);
    float* floats = static_cast<float*>(args.workspace);
    unsigned* arrived = reinterpret_cast<unsigned*>(floats + at.arrived);
    int tiles = 0;
    with_dtype(op, args.dtype, [&](auto type) {
        using T = decltype(type);
        tiles = choose_tiles(op, args, sizeof(T));
        auto kernel = project_kernel<T, 1>;
        if constexpr (sizeof(T) == 2) {
            if (tiles > 1) kernel = tiles == 2 ? project_kernel<T, 2> : project_kernel<T, 3>;
        }
        const dim3 grid((args.S + 16 * tiles - 1) / (16 * tiles), args.B * args.F);
        const LaunchConfig geometry{grid, dim3(THREADS), project_shared(tiles, args.C, sizeof(T)), args.stream};
        launch(op, geometry, kernel, project_params(args, floats + at.statistics, arrived));
    });
    with_dtype(op, args.head.dtype, [&](auto type) {
        const bool head = args.head.weight1 != nullptr;
        const dim3 grid(head ? SLICES : 1, head ? args.B * args.F : 1);
        const LaunchConfig geometry{grid, dim3(THREADS), head ? 3 * args.C * sizeof(float) : 0, args.stream};
        const auto p = confidence_params(args, floats + at.statistics, floats + at.hidden, arrived, 16 * tiles);
        launch(op, geometry, confidence_kernel<decltype(type)>, p);
    });
}

}  // namespace dsa
