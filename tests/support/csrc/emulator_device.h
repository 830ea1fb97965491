// The functions CUDA offers in device code, for the fibers of emulator.h. Approximate intrinsics are exact here.
#pragma once

#define DSA_LOCKSTEP [[gnu::noinline]] inline

DSA_LOCKSTEP void __syncthreads() { emulate::sync_at(0, 0); }

DSA_LOCKSTEP void __syncwarp(uint32_t mask = 0xffffffffu) {
    unsigned set;
    emulate::meet(mask, 0, false, set);
}

DSA_LOCKSTEP uint32_t __ballot_sync(uint32_t mask, int predicate) {
    unsigned set;
    emulate::Meeting& m = emulate::meet(mask, 0, predicate != 0, set);
    return m.truth[set];
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    const unsigned base = emulate::lane() & ~(width - 1);
    return emulate::shuffle(mask, value, base + (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip, int width = 32) {
    const unsigned lane = emulate::lane(), source = lane ^ flip;
    return emulate::shuffle(mask, value, source & 31, source < (lane & ~(width - 1)) + width);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulate::lane();
    return emulate::shuffle(mask, value, (lane + delta) & 31, (lane & (width - 1)) + delta < unsigned(width));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulate::lane();
    return emulate::shuffle(mask, value, (lane - delta) & 31, (lane & (width - 1)) >= delta);
}

template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) {
    const T old = *at;
    *at = old + value;
    return old;
}
template <class T>
T atomicMax(T* at, std::common_type_t<T> value) {
    const T old = *at;
    *at = std::max(old, value);
    return old;
}
template <class T>
T atomicMin(T* at, std::common_type_t<T> value) {
    const T old = *at;
    *at = std::min(old, value);
    return old;
}
template <class T>
T atomicExch(T* at, std::common_type_t<T> value) {
    const T old = *at;
    *at = value;
    return old;
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> compare, std::common_type_t<T> value) {
    const T old = *at;
    if (old == compare) *at = value;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
template <class T>
void __stcs(T* at, std::common_type_t<T> value) {
    *at = value;
}
template <class T>
void __stcg(T* at, std::common_type_t<T> value) {
    *at = value;
}

inline float __int_as_float(int x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline int __float_as_int(float x) {
    int y;
    memcpy(&y, &x, 4);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
#undef __expf
#define __expf(x) expf(x)  // glibc keeps these names for itself
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define __exp2f(x) exp2f(x)

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned byte = bytes >> 8 * (selector >> 4 * i & 7) & 0xff;
        if (selector >> 4 * i & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, replicated
        result |= byte << 8 * i;
    }
    return result;
}

template <class T>
constexpr T min(T a, std::common_type_t<T> b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, std::common_type_t<T> b) {
    return a < b ? b : a;
}
