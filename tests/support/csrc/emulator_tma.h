// State of a block on the Hopper emulator (emulator_hopper.h), tensor maps, mbarriers and TMA tile loads.
#pragma once

#include <cuda.h>

#include <deque>

#include "emulator.h"

namespace emulate {

constexpr uint32_t shared_base = 1024, shared_size = 256 << 10;

// What cuTensorMapEncodeTiled would hide in the 128 bytes of a CUtensorMap.
struct TensorMap {
    const char* data;
    uint64_t dim[5], stride[5];  // stride in bytes
    uint16_t box[5];
    uint8_t rank, element, swizzle;
    uint8_t magic;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a tensor map is 128 bytes");

// The checks are those of the driver's manual.
inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                             const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    TensorMap m{};
    m.element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    const bool supported = (m.element != 2 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) &&
                           interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                           (swizzle == CU_TENSOR_MAP_SWIZZLE_128B || swizzle == CU_TENSOR_MAP_SWIZZLE_NONE);
    if (!supported || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
    if (reinterpret_cast<uintptr_t>(data) % 16) return CUDA_ERROR_INVALID_VALUE;
    m.data = static_cast<const char*>(data);
    m.rank = rank;
    m.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    m.magic = 0x5a;
    for (unsigned i = 0; i < rank; ++i) {
        m.dim[i] = dims[i];
        m.box[i] = box[i];
        m.stride[i] = i == 0 ? m.element : strides[i - 1];
        if (dims[i] == 0 || dims[i] > uint64_t(1) << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        if (i > 0 && (m.stride[i] % 16 || m.stride[i] >= uint64_t(1) << 40 || m.stride[i] < m.stride[i - 1])) {
            return CUDA_ERROR_INVALID_VALUE;
        }
    }
    if (box[0] * m.element % 16 || (m.swizzle && box[0] * m.element > 128)) return CUDA_ERROR_INVALID_VALUE;
    memset(static_cast<void*>(map), 0, sizeof(*map));
    memcpy(static_cast<void*>(map), &m, sizeof(m));
    return CUDA_SUCCESS;
}

struct Load {
    TensorMap map;
    uint32_t to;
    int64_t at[5];
};

struct Mbarrier {
    int64_t arrivals = 0, pending = 0, bytes = 0;
    uint32_t phase = 0;
    std::vector<Load> loads;
};

struct WgmmaOp {
    int n, bytes = 2;  // of an element of A and B: bf16 or e4m3
    bool a_in_shared, b_mn_major, accumulate;
    uint64_t a, b;
    unsigned issued = 0;  // threads so far
    const uint32_t* a_registers[128];
    uint32_t a_values[128][4];
    float* d[128];
};

struct Warpgroup {
    std::deque<WgmmaOp> ops;  // in order of issue
    size_t executed = 0;
    struct Thread {
        size_t issued = 0, delivered = 0;
        bool fenced = false;
        std::deque<size_t> groups;  // number of ops issued when each uncompleted group was committed
        size_t committed = 0;
        std::map<float*, std::vector<float>> in_flight;  // accumulators of unfinished ops
    } threads[128];
};

struct Hopper {
    std::map<uint32_t, Mbarrier> mbarriers;
    std::deque<Warpgroup> warpgroups;
    std::vector<unsigned char> asynchronous = std::vector<unsigned char>(shared_size);
};

inline Hopper& hopper() {
    static Hopper* h = [] {
        auto* fresh = new Hopper;
        state().at_start.push_back([fresh] {
            fresh->mbarriers.clear();
            fresh->warpgroups.clear();
            fresh->warpgroups.resize((state().threads + 127) / 128);
            std::fill(fresh->asynchronous.begin(), fresh->asynchronous.end(), 0xff);
        });
        state().at_start.back()();
        state().at_end.push_back([fresh] {
            for (const auto& [address, barrier] : fresh->mbarriers) {
                if (!barrier.loads.empty()) state().failure = "a block ended while a TMA load was under way";
            }
        });
        return fresh;
    }();
    return *h;
}

inline uint32_t address_of(const void* pointer) {
    const int64_t offset = static_cast<const char*>(pointer) - state().shared;
    if (offset < 0 || offset >= int64_t(state().shared_bytes)) fail("the address is not in the block's shared memory");
    return uint32_t(offset) + shared_base;
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void check_range(uint32_t address, uint32_t bytes, const char* who) {
    if (address < shared_base || address - shared_base + bytes > state().shared_bytes) {
        fail(std::string(who) + ": outside of the block's shared memory");
    }
}

inline uint32_t box_bytes(const TensorMap& map) {
    uint32_t bytes = map.element;
    for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
    return bytes;
}

inline void end_phase_if_complete(Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    barrier.phase ^= 1;
    progress();
}

inline Mbarrier& barrier_at(const uint64_t* pointer) {
    auto found = hopper().mbarriers.find(address_of(pointer));
    if (found == hopper().mbarriers.end()) fail("an mbarrier is used before its initialisation");
    return found->second;
}

inline void arrive(Mbarrier& barrier, int64_t bytes) {
    if (barrier.pending == 0) fail("more arrivals at an mbarrier than it was initialised for");
    barrier.bytes += bytes;
    --barrier.pending;
    progress();
    end_phase_if_complete(barrier);
    give_way();
}

// Copies the box, element after element, zero beyond the tensor's edge.
inline void complete_load(const Load& load) {
    const TensorMap& m = load.map;
    const uint32_t bytes = box_bytes(m);
    for (uint32_t byte = 0; byte < bytes; byte += m.element) {
        uint32_t rest = byte / m.element;
        const char* from = m.data;
        bool inside = true;
        for (int i = 0; i < m.rank; ++i) {
            const int64_t at = load.at[i] + rest % m.box[i];
            rest /= m.box[i];
            inside = inside && at >= 0 && uint64_t(at) < m.dim[i];
            if (inside) from += at * m.stride[i];
        }
        uint32_t to = load.to + byte;
        if (m.swizzle) to = swizzled(to);
        static const char zero[8] = {};
        memcpy(state().shared + (to - shared_base), inside ? from : zero, m.element);
        memcpy(&hopper().asynchronous[to - shared_base], inside ? from : zero, m.element);
    }
}

inline void complete_loads(Mbarrier& barrier) {
    std::vector<Load> loads;
    loads.swap(barrier.loads);
    for (const Load& load : loads) {
        complete_load(load);
        barrier.bytes -= box_bytes(load.map);
        progress();
    }
    if (!loads.empty()) end_phase_if_complete(barrier);
}

inline void load_tile(void* to, const CUtensorMap* map, uint64_t* barrier, std::initializer_list<int> at) {
    Load load;
    memcpy(&load.map, map, sizeof(TensorMap));
    if (load.map.magic != 0x5a) fail("TMA: the tensor map was not encoded");
    if (load.map.rank != at.size()) fail("TMA: the tensor map has another rank than the load");
    load.to = address_of(to);
    check_range(load.to, box_bytes(load.map), "TMA");
    if (load.to % (load.map.swizzle ? 1024 : 128)) fail("TMA: the destination is not aligned to the swizzle pattern");
    std::copy(at.begin(), at.end(), load.at);
    memset(state().shared + (load.to - shared_base), 0xff, box_bytes(load.map));
    memset(&hopper().asynchronous[load.to - shared_base], 0xff, box_bytes(load.map));
    barrier_at(barrier).loads.push_back(load);
    progress();
    give_way();
}

}  // namespace emulate
