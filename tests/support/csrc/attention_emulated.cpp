// csrc/attention.cu on the host, behind C functions for ctypes. Compiled by test_attention.py.
#include "emulator_hopper.h"

#include "attention.cu"

extern "C" size_t workspace_bytes(int64_t B, int64_t T, int64_t H, int64_t D, int blocks) {
    return dsa::attention_workspace(B, T, H, D, blocks);
}

extern "C" size_t shared_bytes(int64_t D, int fp8) {
    using namespace dsa;
    if (fp8) return sizeof(AttentionShared<AttentionFp8>);
    return D == 64 ? sizeof(AttentionShared<AttentionBf16<64>>) : sizeof(AttentionShared<AttentionBf16<128>>);
}

// pointers: q, k, v, out, slot, keys, workspace, k_scale, v_scale; sizes: B, T, H, D, N, W, S, R, workspace bytes.
// Returns null, or why it failed.
extern "C" const char* attention(void* const* pointers, const int64_t* sizes, int blocks, int order) {
    static std::string error;
    error.clear();
    emulate::order() = order;
    dsa::AttentionArgs args{};
    args.q = pointers[0];
    args.k = pointers[1];
    args.v = pointers[2];
    args.out = pointers[3];
    args.slot = static_cast<const int64_t*>(pointers[4]);
    args.keys = static_cast<const int64_t*>(pointers[5]);
    args.workspace = pointers[6];
    args.k_scale = static_cast<const float*>(pointers[7]);
    args.v_scale = static_cast<const float*>(pointers[8]);
    int64_t* const into[] = {&args.B, &args.T, &args.H, &args.D, &args.N, &args.W, &args.S, &args.R};
    for (int i = 0; i < 8; ++i) *into[i] = sizes[i];
    args.workspace_bytes = sizes[8];
    args.blocks = blocks;
    try {
        dsa::attention(args);
    } catch (const std::exception& caught) {
        error = caught.what();
    }
    return error.empty() ? nullptr : error.c_str();
}
