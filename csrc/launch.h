// Checked launches: an error of CUDA becomes a std::runtime_error that names the op, its shape and CUDA's message, a
// value that breaks a rule a std::invalid_argument. Python sees RuntimeError and ValueError.
// With DSA_EMULATE the same launchers run on the host (tests/support/csrc/emulator.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dsa {

// Op and shape as error messages name them, "modulate [1, 4680, 1536]"; formatted only on failure.
struct OpInfo {
    const char* op;
    int64_t shape[3];

    std::string text() const {
        std::string s = std::string(op) + " [";
        for (int i = 0; i < 3; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
        return s + "]";
    }
};

struct LaunchConfig {
    dim3 grid, block;
    size_t shared;  // bytes of dynamic shared memory
    cudaStream_t stream;
};

#ifdef DSA_EMULATE

inline size_t shared_limit(const OpInfo&) { return emulate::shared_limit; }
inline int sm_count(const OpInfo&) { return 4; }

template <class Parameters>
void launch(const OpInfo& op, const LaunchConfig& at, void (*kernel)(Parameters), const Parameters& parameters) {
    try {
        emulate::launch(at.grid, at.block, at.shared, [&] { kernel(parameters); });
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(op.text() + ": " + error.what());
    }
}

#else

inline void check(cudaError_t error, const OpInfo& op) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next op would report it
    throw std::runtime_error(op.text() + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

inline int device_attribute(cudaDeviceAttr attribute, const OpInfo& op) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&value, attribute, device), op);
    return value;
}

// Bytes of shared memory that one block may have.
inline size_t shared_limit(const OpInfo& op) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, op); }
inline int sm_count(const OpInfo& op) { return device_attribute(cudaDevAttrMultiProcessorCount, op); }

template <class Parameters>
void launch(const OpInfo& op, const LaunchConfig& at, void (*kernel)(Parameters), const Parameters& parameters) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (at.shared > 48 << 10) {  // the default limit
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.shared)), op);
    }
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    check(cudaLaunchKernel(function, at.grid, at.block, arguments, at.shared, at.stream), op);
    check(cudaGetLastError(), op);
}

#endif

[[noreturn]] inline void refuse(const OpInfo& op, const std::string& why) {
    throw std::invalid_argument(op.text() + ": " + why);
}

}  // namespace dsa
