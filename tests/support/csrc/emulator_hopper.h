// csrc/hopper.cuh for the fibers of emulator.h: mbarriers, TMA tile loads and wgmma as the PTX manual defines them.
//
// Everything asynchronous happens as late as it may. A TMA load fills its destination with NaN at once and lands when a
// thread waits on its barrier and no thread can go on without it; a wgmma fills its accumulators with NaN at once,
// reads shared memory and delivers when a thread waits for its group and no other thread can go on. Shared memory
// exists twice: as threads see it and as TMA and wgmma see it; an ordinary store crosses over at async_proxy_fence().
// So a forgotten wait, fence or release gives NaN or wrong values. Addresses of shared memory start at 1024, like on
// the device, so that an offset is not mistaken for an address.
//
// Not modelled: the precision of the tensor cores, which keep fewer bits of e4m3 sums than the float32 used here, and
// who among several threads executed a proxy fence.
#pragma once

#include "emulator_tma.h"

namespace emulate {

inline float value_of(const unsigned char* at, int bytes) {
    static const std::vector<float> e4m3 = [] {
        std::vector<float> table(256);
        for (int i = 0; i < 256; ++i) {
            table[i] = __half2float(__nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t(i), __NV_E4M3));
        }
        return table;
    }();
    if (bytes == 1) return e4m3[*at];
    const uint32_t bits = uint32_t(at[0] | at[1] << 8) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// One operand of a multiply in shared memory: element (row, k), row being m of A or n of B.
struct Operand {
    uint32_t start, leading, stride;
    bool mn_major;
    int bytes;

    Operand(uint64_t descriptor, bool mn_major, int bytes) : mn_major(mn_major), bytes(bytes) {
        start = (descriptor & 0x3fff) << 4;
        leading = (descriptor >> 16 & 0x3fff) << 4;
        stride = (descriptor >> 32 & 0x3fff) << 4;
        if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated");
        if (descriptor >> 49 & 7 || (start >> 7 & 7)) fail("wgmma: the operand is not aligned to its swizzle pattern");
    }

    float operator()(int row, int k) const {
        uint32_t address = start;
        if (mn_major) {  // ((8 values, 8, m), (8, k)) : ((1, 8 values, leading), (128 bytes, stride))
            address += row % 64 * 2 + row / 64 * leading + k % 8 * 128 + k / 8 * stride;
        } else {  // ((8, m), (8 values, 2)) : ((128 bytes, stride), (1, 8 values))
            address += row % 8 * 128 + row / 8 * stride + k * bytes;
        }
        const uint32_t at = swizzled(address) - shared_base;
        if (at + bytes > state().shared_bytes) fail("wgmma: an operand outside of the block's shared memory");
        return value_of(&hopper().asynchronous[at], bytes);
    }
};

__attribute__((optimize("O3"))) inline void gemm_tile(const float (*a)[32], const float (*b)[256], float (*c)[256],
                                                      int n, int depth) {
    for (int i = 0; i < 64; ++i) {
        for (int j = 0; j < n; ++j) c[i][j] = 0;
        for (int k = 0; k < depth; ++k) {
            const float factor = a[i][k];
            for (int j = 0; j < n; ++j) c[i][j] += factor * b[k][j];
        }
    }
}

// Thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4 and 8 below; of the result columns 8 j + 2 (t % 4) and
// the next; of operand A, 32 bits of one row in each register: k from 4 (t % 4) bytes on, and from 16 bytes further on.
inline void execute(Warpgroup& group, const WgmmaOp& op) {
    static float a[64][32], b[32][256], c[64][256];
    const int depth = 32 / op.bytes;
    if (op.a_in_shared) {
        const Operand operand(op.a, false, op.bytes);
        for (int i = 0; i < 64; ++i)
            for (int k = 0; k < depth; ++k) a[i][k] = operand(i, k);
    } else {
        for (int t = 0; t < 128; ++t)
            for (int r = 0; r < 4; ++r)
                for (int e = 0; e < 4 / op.bytes; ++e) {
                    const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (r & 1),
                              k = (4 * (t % 4) + 16 * (r >> 1)) / op.bytes + e;
                    a[row][k] =
                        value_of(reinterpret_cast<const unsigned char*>(&op.a_values[t][r]) + e * op.bytes, op.bytes);
                }
    }
    const Operand operand(op.b, op.b_mn_major, op.bytes);
    for (int k = 0; k < depth; ++k)
        for (int j = 0; j < op.n; ++j) b[k][j] = operand(j, k);
    gemm_tile(a, b, c, op.n, depth);
    for (int t = 0; t < 128; ++t) {
        std::vector<float>& d = group.threads[t].in_flight[op.d[t]];
        for (int i = 0; i < op.n / 2; ++i) {
            const float product =
                c[16 * (t / 32) + t % 32 / 4 + 8 * (i >> 1 & 1)][8 * (i >> 2) + 2 * (t % 4) + (i & 1)];
            d[i] = op.accumulate ? d[i] + product : product;
        }
    }
}

inline Warpgroup& my_warpgroup() { return hopper().warpgroups[thread() / 128]; }

inline void issue(float* d, int n, const WgmmaOp& given, const uint32_t* a_registers) {
    Warpgroup& group = my_warpgroup();
    const unsigned t = thread() % 128;
    Warpgroup::Thread& mine = group.threads[t];
    if (!mine.fenced) fail("wgmma without a wgmma.fence since the last wait");
    if (mine.issued == group.ops.size()) group.ops.push_back(given);
    WgmmaOp& op = group.ops[mine.issued++];
    if (op.n != given.n || op.bytes != given.bytes || op.a != given.a || op.b != given.b ||
        op.a_in_shared != given.a_in_shared || op.b_mn_major != given.b_mn_major || op.accumulate != given.accumulate) {
        fail("wgmma: the threads of a warpgroup disagree about the operands");
    }
    ++op.issued;
    op.a_registers[t] = a_registers;
    if (a_registers) memcpy(op.a_values[t], a_registers, sizeof(op.a_values[t]));
    op.d[t] = d;
    if (!mine.in_flight.count(d)) mine.in_flight.emplace(d, std::vector<float>(d, d + n / 2));
    std::fill(d, d + n / 2, NAN);
    progress();
}

inline void commit() {
    Warpgroup::Thread& mine = my_warpgroup().threads[thread() % 128];
    mine.groups.push_back(mine.issued);
    mine.committed = mine.issued;
}

inline void wait_for_groups(size_t pending) {
    Warpgroup& group = my_warpgroup();
    const unsigned t = thread() % 128;
    Warpgroup::Thread& mine = group.threads[t];
    size_t target = mine.delivered;
    while (mine.groups.size() > pending) {
        target = mine.groups.front();
        mine.groups.pop_front();
    }
    if (target > mine.delivered) wait_until_stuck("wgmma.wait_group");
    while (group.executed < target) {
        const size_t next = group.executed;
        wait_until("wgmma that not all of its warpgroup issues", [&] { return group.ops[next].issued == 128; });
        if (group.executed != next) continue;  // another thread did it meanwhile
        execute(group, group.ops[next]);
        ++group.executed;
    }
    std::map<float*, bool> unfinished;
    for (size_t i = target; i < mine.issued; ++i) unfinished[group.ops[i].d[t]] = true;
    for (size_t i = mine.delivered; i < target; ++i) {
        const WgmmaOp& op = group.ops[i];
        if (op.a_registers[t] && memcmp(op.a_registers[t], op.a_values[t], sizeof(op.a_values[t]))) {
            fail("wgmma: registers of operand A changed before the wait");
        }
        float* d = op.d[t];
        auto found = mine.in_flight.find(d);
        if (unfinished.count(d) || found == mine.in_flight.end()) continue;
        std::copy(found->second.begin(), found->second.end(), d);
        mine.in_flight.erase(found);
    }
    mine.delivered = target;
    mine.fenced = false;
}

}  // namespace emulate

namespace dsa {

inline uint32_t shared_address(const void* pointer) { return emulate::address_of(pointer); }

DSA_LOCKSTEP void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    if (emulate::address_of(barrier) % 8 || arrivals == 0)
        emulate::fail("mbarrier.init: alignment 8, at least one arrival");
    emulate::Mbarrier fresh;
    fresh.arrivals = fresh.pending = arrivals;
    emulate::hopper().mbarriers[emulate::address_of(barrier)] = fresh;
}
inline void mbarrier_init_fence() {}
DSA_LOCKSTEP void mbarrier_arrive(uint64_t* barrier) { emulate::arrive(emulate::barrier_at(barrier), 0); }
DSA_LOCKSTEP void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    emulate::arrive(emulate::barrier_at(barrier), bytes);
}
DSA_LOCKSTEP void mbarrier_wait(uint64_t* pointer, uint32_t parity) {
    emulate::Mbarrier& barrier = emulate::barrier_at(pointer);
    static std::map<std::pair<uint32_t, uint32_t>, std::string> reasons;  // outlive the waits
    std::string& reason = reasons[{emulate::address_of(pointer), parity}];
    if (reason.empty())
        reason = "mbarrier at " + std::to_string(emulate::address_of(pointer)) + ", parity " + std::to_string(parity);
    emulate::wait_until(reason.c_str(), [&] {
        const bool stuck = emulate::state().idle > emulate::state().alive;
        if (stuck && barrier.phase == (parity & 1)) emulate::complete_loads(barrier);
        return barrier.phase != (parity & 1);
    });
}

inline void tma_prefetch(const CUtensorMap*) {}
DSA_LOCKSTEP void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    emulate::load_tile(to, map, barrier, {x, y, z});
}
DSA_LOCKSTEP void tma_load_4d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
    emulate::load_tile(to, map, barrier, {x, y, z, w});
}
DSA_LOCKSTEP void async_proxy_fence() {
    memcpy(emulate::hopper().asynchronous.data(), emulate::state().shared, emulate::state().shared_bytes);
}

DSA_LOCKSTEP void named_barrier_sync(int id, int threads) { emulate::sync_at(id, threads); }
DSA_LOCKSTEP void named_barrier_arrive(int id, int threads) { emulate::arrive_at(id, threads); }
template <int count>
void dealloc_registers() {
    static_assert(count >= 24 && count <= 256 && count % 8 == 0, "setmaxnreg: 24..256 by 8");
}
template <int count>
void alloc_registers() {
    static_assert(count >= 24 && count <= 256 && count % 8 == 0, "setmaxnreg: 24..256 by 8");
}

inline void wgmma_fence() { emulate::my_warpgroup().threads[emulate::thread() % 128].fenced = true; }
DSA_LOCKSTEP void wgmma_commit() { emulate::commit(); }
template <int pending>
DSA_LOCKSTEP void wgmma_wait() {
    emulate::wait_for_groups(pending);
}
template <int count>
void wgmma_results(float (&)[count]) {}

template <int N>
struct Wgmma {
    static_assert(N >= 8 && N <= 256 && N % 8 == 0, "wgmma: N is a multiple of 8 up to 256");
    static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
        emulate::WgmmaOp op{};
        op.n = N;
        op.a_in_shared = true;
        op.accumulate = accumulate;
        op.a = a;
        op.b = b;
        emulate::issue(d, N, op, nullptr);
    }
    static void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b) {
        emulate::WgmmaOp op{};
        op.n = N;
        op.b_mn_major = op.accumulate = true;
        op.b = b;
        emulate::issue(d, N, op, a);
    }
};

template <int N>
struct WgmmaE4m3 {
    static void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
        emulate::WgmmaOp op{};
        op.n = N;
        op.bytes = 1;
        op.accumulate = accumulate;
        op.b = b;
        emulate::issue(d, N, op, a);
    }
};

// Every lane learns the addresses of all 32 rows.
inline void exchange_rows(const void* row, char* (&rows)[32]) {
    if (emulate::address_of(row) % 16) emulate::fail("ldmatrix, stmatrix: a row is not aligned to 16 bytes");
    unsigned set;
    emulate::Meeting& m = emulate::meet(0xffffffffu, reinterpret_cast<uintptr_t>(row), false, set);
    for (int i = 0; i < 32; ++i) rows[i] = reinterpret_cast<char*>(m.value[set][i]);
}
DSA_LOCKSTEP void ldmatrix_trans(uint32_t (&x)[4], const void* row) {
    char* rows[32];
    exchange_rows(row, rows);
    const int lane = emulate::lane();
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) memcpy(&pair[e], rows[8 * i + lane % 4 * 2 + e] + lane / 4 * 2, 2);
        memcpy(&x[i], pair, 4);
    }
    __syncwarp();
}
DSA_LOCKSTEP void stmatrix(void* row, const uint32_t (&x)[4]) {
    char* rows[32];
    exchange_rows(row, rows);
    const int lane = emulate::lane();
    for (int i = 0; i < 4; ++i) memcpy(rows[8 * i + lane / 4] + lane % 4 * 4, &x[i], 4);
    __syncwarp();
}

inline float exp2_approx(float x) { return exp2f(x); }

}  // namespace dsa
