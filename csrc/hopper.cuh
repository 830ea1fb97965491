// Instructions of sm_90a without a CUDA C++ intrinsic, one small function each: mbarriers, TMA loads, wgmma.
// Under DSA_EMULATE the same functions come from tests/support/csrc/emulator_hopper.h, written from the PTX manual.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#ifdef DSA_EMULATE
#include "emulator_hopper.h"
#else

#define DSA_DYNAMIC_SHARED(type, name)                         \
    extern __shared__ __align__(1024) unsigned char name##_[]; \
    type* name = reinterpret_cast<type*>(name##_)

namespace dsa {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier: a phase ends when all arrivals and all announced bytes are in ---------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA; the other threads still need a __syncthreads().
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity is over. A fresh barrier is in phase 0, so parity 1 passes at once.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- TMA: one thread asks for a box of a tensor; its bytes count against the barrier -------------------------------

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void tma_load_4d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z,
                                            int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
        "%5}], [%6];" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
        : "memory");
}

// Ordinary stores of this thread to shared memory become visible to what TMA and wgmma read.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- groups of warps -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int count>
__device__ __forceinline__ void dealloc_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void alloc_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- 8 x 8 matrices of two-byte elements: lane l names row l % 8 of matrix l / 8 -----------------------------------

// Lane l receives of each matrix the elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Lane l gives of each matrix the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1).
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

// ---- wgmma: four warps multiply 64 x 16 by 16 x N; operands and results must not be touched before the wait -------

// Orders register accesses before the first wgmma of a sequence.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` committed groups are unfinished.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from reading results ahead of their wait.
template <int count>
__device__ __forceinline__ void wgmma_results(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define DSA_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define DSA_LIST_30 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," DSA_TEN(1) DSA_TEN(2)
#define DSA_LIST_32 DSA_LIST_30 "%30,%31"
#define DSA_LIST_64 DSA_LIST_30 DSA_TEN(3) DSA_TEN(4) DSA_TEN(5) "%60,%61,%62,%63"
#define DSA_LIST_88 DSA_LIST_30 DSA_TEN(3) DSA_TEN(4) DSA_TEN(5) DSA_TEN(6) DSA_TEN(7) "%80,%81,%82,%83,%84,%85,%86,%87"
#define DSA_D8(i)                                                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define DSA_D32 DSA_D8(0), DSA_D8(8), DSA_D8(16), DSA_D8(24)
#define DSA_D64 DSA_D32, DSA_D8(32), DSA_D8(40), DSA_D8(48), DSA_D8(56)
#define DSA_D88 DSA_D64, DSA_D8(64), DSA_D8(72), DSA_D8(80)

template <int N>
struct Wgmma;
template <int N>
struct WgmmaE4m3;

// ss: d (+)= A B with A and B in shared memory, both with k contiguous ("K-major").
// rs: d += A B with A in registers and B in shared memory with n contiguous ("MN-major").
// p0..p4 number the operands that follow the N/2 accumulators.
#define DSA_WGMMA(N, count, p0, p1, p2, p3, p4)                                                                 \
    template <>                                                                                                 \
    struct Wgmma<N> {                                                                                           \
        static __device__ __forceinline__ void ss(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p2                                                 \
                         ", 0;\n"                                                                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" DSA_LIST_##count          \
                         "}, " p0 ", " p1 ", p, 1, 1, 0, 0;\n}\n"                                               \
                         : DSA_D##count                                                                         \
                         : "l"(a), "l"(b), "r"(int(accumulate)));                                               \
        }                                                                                                       \
        static __device__ __forceinline__ void rs(float (&d)[count], const uint32_t* a, uint64_t b) {           \
            asm volatile(                                                                                       \
                "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                      \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" DSA_LIST_##count                   \
                "}, {" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1, 1;\n}\n"                                 \
                : DSA_D##count                                                                                  \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
        }                                                                                                       \
    };

// e4m3: 64 x 32 by 32 x N, A in registers, B in shared memory with k contiguous, which is the only way for 8 bits.
#define DSA_WGMMA_E4M3(N, count, p0, p1, p2, p3, p4, p5)                                                               \
    template <>                                                                                                        \
    struct WgmmaE4m3<N> {                                                                                              \
        static __device__ __forceinline__ void rs(float (&d)[count], const uint32_t* a, uint64_t b, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p5                                                        \
                         ", 0;\n"                                                                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" DSA_LIST_##count                 \
                         "}, {" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1;\n}\n"                                  \
                         : DSA_D##count                                                                                \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));                  \
        }                                                                                                              \
    };

DSA_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36")
DSA_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68")
DSA_WGMMA(176, 88, "%88", "%89", "%90", "%91", "%92")

DSA_WGMMA_E4M3(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")

#undef DSA_WGMMA
#undef DSA_WGMMA_E4M3

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: stays ahead of a later wait
    return y;
}

}  // namespace dsa

#endif  // DSA_EMULATE

namespace dsa {

// Shared-memory operands with TMA's 128-byte swizzle: rows of 128 bytes, patterns of eight rows, aligned to 1024 bytes.
// Fields of the descriptor: address, leading and stride byte offset (all / 16); mode 1 in bits 62-63 is this swizzle.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(1) << 62;
}

// Rows are m or n, k lies along the 128 bytes; patterns follow one another. 16 more of k: 32 bytes further.
__device__ __forceinline__ uint64_t wgmma_k_major(uint32_t address) { return wgmma_descriptor(address, 16, 1024); }

// Rows are k, 64 values of n lie along the 128 bytes; the next 64 are `column` bytes away. 16 more of k: 2048 bytes.
__device__ __forceinline__ uint64_t wgmma_mn_major(uint32_t address, uint32_t column) {
    return wgmma_descriptor(address, column, 1024);
}

__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

}  // namespace dsa
