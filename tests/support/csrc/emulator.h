// Runs CUDA kernel source on the host, so that its arithmetic, indexing and synchronisation are tested without a GPU.
//
// Include this before the kernel's own headers, compile with
//     g++ -std=c++17 -O2 -U_FORTIFY_SOURCE -DDSA_EMULATE -I<cuda>/include
// and call
//     emulate::launch(grid, block, shared_bytes, [&] { kernel<128>(x, y, n); });
//
// Blocks run one after another. Every thread of a block is a fiber; a fiber runs until it has to wait for another one
// (barrier, shuffle, mbarrier). The order in which fibers get their turn is `emulate::order()`: 0 ascending, 1
// descending, any other number a shuffle with that seed. A forgotten barrier goes unnoticed in one order and gives a
// wrong result in another, so a test runs several. Threads that wait for what never comes are reported as a deadlock,
// with what they wait for.
//
// Kernel source: `__shared__` works as written (one static object, blocks being sequential; its content is not reset
// from block to block), dynamic shared memory is declared with DSA_DYNAMIC_SHARED(type, name) and is full of NaN when a
// block starts. Inline PTX belongs behind `#ifndef DSA_EMULATE`.
#pragma once

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "compile with -U_FORTIFY_SOURCE: its longjmp knows one stack only"
#endif

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (emulate::state().fibers[emulate::state().running].index)
#define blockIdx (emulate::state().block_index)
#define blockDim (emulate::state().block)
#define gridDim (emulate::state().grid)
#define warpSize 32
#define DSA_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulate::state().shared)

namespace emulate {

constexpr size_t stack_bytes = 256 << 10;
constexpr size_t shared_limit = 232448;  // what one block may have on sm_90

struct Fiber {
    jmp_buf context;
    char* stack = nullptr;
    uint3 index{};
    bool alive = false;
    const char* waiting = "nothing";
};

struct Barrier {
    unsigned arrived = 0, expected = 0, generation = 0;
};

// Lanes of one mask meeting: two sets of values, because a fast lane may come back before a slow one has read.
struct Meeting {
    unsigned arrived = 0, generation = 0;
    uint64_t value[2][32];
    uint32_t truth[2] = {0, 0};
};

struct State {
    dim3 grid, block;
    uint3 block_index{};
    std::vector<Fiber> fibers;
    std::vector<unsigned> turn;   // fibers in the order in which they run
    std::vector<unsigned> place;  // the inverse of turn
    unsigned running = 0, threads = 0, alive = 0, idle = 0;
    std::map<unsigned, Barrier> barriers;
    std::vector<std::map<uint32_t, Meeting>> meetings;  // of each warp
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::function<void()> kernel;
    std::string failure;
    jmp_buf main;
    ucontext_t starter;
    std::vector<std::function<void()>> at_start, at_end;  // what an extension resets and checks for each block
};

inline State& state() {
    static State s;
    return s;
}

inline int& order() {
    static int seed = 0;
    return seed;
}

// Somebody's wait may have ended: the search for a deadlock starts afresh.
inline void progress() { state().idle = 0; }

[[gnu::noinline]] inline void back_to_main() { _longjmp(state().main, 1); }

[[noreturn, gnu::noinline]] inline void fail(const std::string& message) {
    State& s = state();
    const uint3 t = s.fibers[s.running].index;
    s.failure = message + " (block " + std::to_string(s.block_index.x) + "," + std::to_string(s.block_index.y) + "," +
                std::to_string(s.block_index.z) + " thread " + std::to_string(t.x) + "," + std::to_string(t.y) + "," +
                std::to_string(t.z) + ")";
    back_to_main();
    __builtin_unreachable();
}

inline std::string who_waits() {
    std::map<std::string, std::pair<unsigned, unsigned>> reasons;  // -> first thread, count
    State& s = state();
    for (unsigned i = 0; i < s.threads; ++i) {
        if (!s.fibers[i].alive) continue;
        reasons.emplace(s.fibers[i].waiting, std::make_pair(i, 0u)).first->second.second++;
    }
    std::string text;
    for (const auto& [reason, place] : reasons) {
        text +=
            "\n  " + std::to_string(place.second) + " threads, first " + std::to_string(place.first) + ": " + reason;
    }
    return text;
}

[[gnu::noinline]] inline void switch_to_next() {
    State& s = state();
    unsigned at = s.place[s.running];
    do {
        at = at + 1 == s.threads ? 0 : at + 1;
    } while (!s.fibers[s.turn[at]].alive);
    Fiber& from = s.fibers[s.running];
    s.running = s.turn[at];
    if (_setjmp(from.context) == 0) _longjmp(s.fibers[s.running].context, 1);
}

// Gives way to the others; `reason` is what a deadlock report says of this thread.
inline void yield(const char* reason) {
    State& s = state();
    s.fibers[s.running].waiting = reason;
    if (++s.idle > 3 * s.alive + 3) fail("deadlock:" + who_waits());
    switch_to_next();
}

template <class Condition>
void wait_until(const char* reason, Condition&& done) {
    while (!done()) yield(reason);
    progress();
}

// For what happens asynchronously: waits as long as any other thread can go on.
inline void wait_until_stuck(const char* reason) {
    while (state().idle <= state().alive) yield(reason);
}

// After an operation that others may be waiting for: except in order 0, they go first.
inline void give_way() {
    if (order() != 0) yield("its turn");
}

inline unsigned thread() { return state().running; }
inline unsigned lane() { return thread() % 32; }

inline void check_block_barrier();

[[gnu::noinline]] inline void fiber_main() {
    for (;;) {
        State& s = state();
        std::string error;
        try {
            s.kernel();
        } catch (const std::exception& caught) {
            error = caught.what();
        }
        if (!error.empty()) fail(error);
        s.fibers[s.running].alive = false;
        --s.alive;
        progress();
        check_block_barrier();
        if (s.alive) {
            switch_to_next();
        } else if (_setjmp(s.fibers[s.running].context) == 0) {
            back_to_main();
        }
    }
}

// Runs a new fiber up to the point from which switch_to_next() can enter it.
[[gnu::noinline]] inline void fiber_entry() {
    State& s = state();
    if (_setjmp(s.fibers[s.running].context) == 0) setcontext(&s.starter);
    fiber_main();
}

[[gnu::noinline]] inline void make_fiber(unsigned i) {
    State& s = state();
    Fiber& fiber = s.fibers[i];
    if (!fiber.stack) {
        void* memory =
            mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("emulate: no memory for the stacks of the threads");
        fiber.stack = static_cast<char*>(memory);
        mprotect(fiber.stack, 4096, PROT_NONE);  // an overflow stops at once
    }
    s.running = i;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_entry, 0);
    swapcontext(&s.starter, &context);
}

[[gnu::noinline]] inline void run_block() {
    State& s = state();
    if (_setjmp(s.main) == 0) {
        s.running = s.turn[0];
        _longjmp(s.fibers[s.running].context, 1);
    }
}

template <class Kernel>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel&& kernel) {
    State& s = state();
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024) throw std::runtime_error("emulate: a block has 1 to 1024 threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw std::runtime_error("emulate: a grid may not be empty");
    if (shared_bytes > shared_limit) throw std::runtime_error("emulate: more than 232448 bytes of shared memory");
    if (!s.shared) {
        s.shared =
            static_cast<char*>(mmap(nullptr, 256 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
    s.grid = grid;
    s.block = block;
    s.threads = threads;
    s.shared_bytes = shared_bytes;
    s.kernel = kernel;
    s.turn.resize(threads);
    s.place.resize(threads);
    for (unsigned i = s.fibers.size(); i < threads; ++i) {
        s.fibers.emplace_back();
        make_fiber(i);
    }
    std::mt19937 random(order());
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                s.block_index = {x, y, z};
                std::iota(s.turn.begin(), s.turn.end(), 0);
                if (order() == 1) std::reverse(s.turn.begin(), s.turn.end());
                if (order() > 1) std::shuffle(s.turn.begin(), s.turn.end(), random);
                for (unsigned i = 0; i < threads; ++i) {
                    s.place[s.turn[i]] = i;
                    s.fibers[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
                    s.fibers[i].alive = true;
                }
                s.alive = threads;
                s.idle = 0;
                s.barriers.clear();
                s.meetings.assign((threads + 31) / 32, {});
                s.failure.clear();
                memset(s.shared, 0xff, 256 << 10);
                for (auto& reset : s.at_start) reset();
                run_block();
                if (s.failure.empty())
                    for (auto& check : s.at_end) check();
                if (!s.failure.empty()) {
                    for (unsigned i = 0; i < s.fibers.size(); ++i)
                        make_fiber(i);  // some are stuck in the middle of the kernel
                    throw std::runtime_error("emulate: " + s.failure);
                }
            }
}

// bar.sync and bar.arrive of PTX. count 0: every thread of the block that has not ended.
inline void arrive_at(unsigned id, unsigned count) {
    State& s = state();
    Barrier& barrier = s.barriers[id];
    if (id > 15 || count % 32) fail("barrier " + std::to_string(id) + ": ids are 0..15, counts whole warps");
    if (barrier.arrived == 0) barrier.expected = count;
    if (barrier.expected != count) fail("barrier " + std::to_string(id) + ": threads disagree about the count");
    ++barrier.arrived;
    if (barrier.arrived == (count ? count : s.alive)) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    progress();
}

inline void sync_at(unsigned id, unsigned count) {
    static const char* const reasons[16] = {
        "barrier 0", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
        "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
    Barrier& barrier = state().barriers[id];
    const unsigned generation = barrier.generation;
    arrive_at(id, count);
    wait_until(reasons[id & 15], [&] { return barrier.generation != generation; });
}

inline void check_block_barrier() {
    State& s = state();
    auto found = s.barriers.find(0);
    if (found == s.barriers.end() || found->second.expected != 0) return;
    if (found->second.arrived && found->second.arrived == s.alive) {
        found->second.arrived = 0;
        ++found->second.generation;
    }
}

// All lanes of `mask` meet; each leaves a value, then reads the set. Returns which of the two sets.
inline Meeting& meet(uint32_t mask, uint64_t value, bool truth, unsigned& set) {
    State& s = state();
    const unsigned warp = thread() / 32, lanes = std::min(32u, s.threads - 32 * warp);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (!(mask >> lane() & 1)) fail("a lane calls a warp function whose mask leaves it out");
    Meeting& m = s.meetings[warp][mask];
    const unsigned generation = m.generation;
    set = generation & 1;
    if (m.arrived == 0) m.truth[set] = 0;
    m.value[set][lane()] = value;
    m.truth[set] |= uint32_t(truth) << lane();
    progress();
    if (++m.arrived == unsigned(__builtin_popcount(mask))) {
        m.arrived = 0;
        ++m.generation;
    }
    wait_until("warp function", [&] { return m.generation != generation; });
    return m;
}

template <class T>
T shuffle(uint32_t mask, T value, unsigned source, bool inside) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    unsigned set;
    Meeting& m = meet(mask, bits, false, set);
    if (!inside) return value;
    if (!(mask >> source & 1)) fail("a shuffle reads lane " + std::to_string(source) + ", which the mask leaves out");
    memcpy(&value, &m.value[set][source], sizeof(T));
    return value;
}

}  // namespace emulate

#include "emulator_device.h"
