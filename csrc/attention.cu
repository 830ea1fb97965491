#include "attention.cuh"

#include <utility>

#include "attention.h"
#include "launch.h"

namespace dsa {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function through the runtime: nothing is linked against the driver.
Encode encoder(const OpInfo& op) {
#ifdef DSA_EMULATE
    return emulate::encode_tiled;
#else
    static const Encode encode = [&] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
              op);
        if (found != cudaDriverEntryPointSuccess)
            refuse(op, "the driver has no cuTensorMapEncodeTiled; it needs CUDA 12 or later");
        return reinterpret_cast<Encode>(function);
    }();
    return encode;
#endif
}

// A tensor [outer.., H, D], read in boxes of 128 bytes of one head and `rows` rows. Beyond its end it reads zeros.
CUtensorMap tensor_map(const OpInfo& op, const void* data, bool fp8, cuuint32_t rank, const cuuint64_t (&dims)[4],
                       cuuint32_t rows) {
    CUtensorMap map;
    const cuuint64_t size = fp8 ? 1 : 2;
    const cuuint64_t strides[3] = {dims[0] * size, dims[0] * dims[1] * size, dims[0] * dims[1] * dims[2] * size};
    const cuuint32_t box[4] = {cuuint32_t(128 / size), 1, rows, 1}, steps[4] = {1, 1, 1, 1};
    const CUresult result =
        encoder(op)(&map, fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
                    const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        refuse(op, "cuTensorMapEncodeTiled failed with CUresult " + std::to_string(int(result)));
    return map;
}

void check_arguments(const AttentionArgs& a, const OpInfo& op) {
    const auto str = [](int64_t x) { return std::to_string(x); };
    if (a.D != 64 && a.D != 128) refuse(op, "head dim " + str(a.D) + " must be 64 or 128");
    if (!a.k_scale != !a.v_scale) refuse(op, "scales must be given for both keys and values, or for none");
    if (a.k_scale && a.D != 128) refuse(op, "head dim " + str(a.D) + " must be 128 with an e4m3 cache");
    if (a.R < 1 || a.R > attention_max_runs) {
        refuse(op, str(a.R) + " runs of keys; there must be 1 to " + str(attention_max_runs));
    }
    const std::pair<const char*, int64_t> sizes[] = {{"B", a.B}, {"T", a.T}, {"H", a.H},          {"N", a.N},
                                                     {"W", a.W}, {"S", a.S}, {"blocks", a.blocks}};
    for (const auto& [name, size] : sizes) {
        if (size < 1 || size > INT32_MAX) refuse(op, std::string(name) + " = " + str(size) + " must be 1 to 2^31 - 1");
    }
    if (a.B > 65535) refuse(op, str(a.B) + " rows; there may be at most 65535");
    // Tokens, tiles and units of work are counted in 32 bits on the device.
    const int64_t units = a.W * a.S / AttentionFp8::keys + a.R;
    if (a.W > INT32_MAX / a.S / a.N || a.T + AttentionBlock::queries > INT32_MAX / a.H ||
        units > INT32_MAX / a.blocks) {
        refuse(op, "cache [" + str(a.N) + ", " + str(a.W) + ", " + str(a.S) + "]: too large for 32-bit token numbers");
    }
    for (const void* pointer :
         {a.q, a.k, a.v, static_cast<const void*>(a.out), static_cast<const void*>(a.workspace)}) {
        if (!pointer || reinterpret_cast<uintptr_t>(pointer) % 16)
            refuse(op, "every tensor must lie at a multiple of 16 bytes");
    }
    const size_t needed = attention_workspace(a.B, a.T, a.H, a.D, a.blocks);
    if (a.workspace_bytes < needed) {
        refuse(op, "a workspace of " + str(a.workspace_bytes) + " bytes; it must have " + str(needed));
    }
}

template <class Tile>
void launch_attention(const AttentionArgs& a, const OpInfo& op) {
    AttentionParams p;
    const cuuint64_t D = Tile::D, H = a.H, tokens = a.N * a.W * a.S;
    if (!Tile::fp8) p.q = tensor_map(op, a.q, false, 4, {D, H, cuuint64_t(a.T), cuuint64_t(a.B)}, Tile::queries);
    p.k = tensor_map(op, a.k, Tile::fp8, 3, {D, H, tokens, 1}, Tile::keys);
    p.v = tensor_map(op, a.v, Tile::fp8, 3, {D, H, tokens, 1}, Tile::keys);
    p.shape = {a.slot,
               a.keys,
               a.k_scale,
               a.v_scale,
               static_cast<const __nv_bfloat16*>(a.q),
               static_cast<__nv_bfloat16*>(a.out),
               static_cast<float*>(a.workspace),
               int(a.B),
               int(a.T),
               int(a.H),
               int(a.W),
               int(a.S),
               int(a.R),
               a.blocks,
               1.4426950408889634f / sqrtf(float(D))};
    const LaunchConfig all = {dim3(a.blocks), dim3(Tile::threads), sizeof(AttentionShared<Tile>), a.stream};
    launch(op, all, attention_kernel<Tile>, p);
    const unsigned splits = query_tiles(a.T) * a.H % a.blocks;
    if (splits == 0) return;
    const LaunchConfig combine = {dim3(splits, a.B, Tile::consumers), dim3(128), 0, a.stream};
    launch(op, combine, attention_combine_kernel<Tile>, p.shape);
}

}  // namespace

int attention_blocks(int sms) { return sms; }

size_t attention_workspace(int64_t B, int64_t, int64_t, int64_t D, int blocks) {
    const size_t floats =
        D == 64 ? AttentionPartial<AttentionBf16<64>>::floats : AttentionPartial<AttentionBf16<128>>::floats;
    return B * blocks * 2 * floats * sizeof(float);  // a block's share of a row touches two split tiles at most
}

void attention(const AttentionArgs& args) {
    const OpInfo op = {"attention", {args.B * args.T, args.H, args.D}};
    check_arguments(args, op);
    if (args.k_scale) {
        launch_attention<AttentionFp8>(args, op);
    } else if (args.D == 64) {
        launch_attention<AttentionBf16<64>>(args, op);
    } else {
        launch_attention<AttentionBf16<128>>(args, op);
    }
}

}  // namespace dsa
