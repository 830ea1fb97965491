// Checked launches: an error of CUDA becomes a std::runtime_error that names the op, its shape and CUDA's own words, a
// value that breaks a rule a std::invalid_argument. Python sees RuntimeError and ValueError.
// With DSA_EMULATE the same launchers run on the host (tests/support/csrc/emulator.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dsa {

// What an error message calls the work: "modulate [1, 4680, 1536]". Made into text only where something failed.
struct Work {
    const char* op;
    int64_t shape[3];

    std::string text() const {
        std::string s = std::string(op) + " [";
        for (int i = 0; i < 3; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
        return s + "]";
    }
};

struct Geometry {
    dim3 grid, block;
    size_t shared;  // bytes of dynamic shared memory
    cudaStream_t stream;
};

#ifdef DSA_EMULATE

inline size_t shared_limit(const Work&) { return emulate::shared_limit; }
inline int sm_count(const Work&) { return 4; }

template <class Parameters>
void launch(const Work& work, const Geometry& at, void (*kernel)(Parameters), const Parameters& parameters) {
    try {
        emulate::launch(at.grid, at.block, at.shared, [&] { kernel(parameters); });
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(work.text() + ": " + error.what());
    }
}

#else

inline void check(cudaError_t error, const Work& work) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next op would be blamed for it
    throw std::runtime_error(work.text() + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

inline int device_attribute(cudaDeviceAttr attribute, const Work& work) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), work);
    check(cudaDeviceGetAttribute(&value, attribute, device), work);
    return value;
}

// Bytes of shared memory that one block may have.
inline size_t shared_limit(const Work& work) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, work); }
inline int sm_count(const Work& work) { return device_attribute(cudaDevAttrMultiProcessorCount, work); }

template <class Parameters>
void launch(const Work& work, const Geometry& at, void (*kernel)(Parameters), const Parameters& parameters) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (at.shared > 48 << 10) {  // what every device allows unasked
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.shared)), work);
    }
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    check(cudaLaunchKernel(function, at.grid, at.block, arguments, at.shared, at.stream), work);
    check(cudaGetLastError(), work);
}

#endif

[[noreturn]] inline void refuse(const Work& work, const std::string& why) {
    throw std::invalid_argument(work.text() + ": " + why);
}

}  // namespace dsa
