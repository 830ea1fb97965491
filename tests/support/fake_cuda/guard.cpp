// A CUDA device guard for a torch that is built without CUDA: it switches nothing and knows which index is current.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    static c10::Device at(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }

    c10::Device getDevice() const override { return at(current); }
    c10::Device exchangeDevice(c10::Device device) const override {
        auto before = getDevice();
        uncheckedSetDevice(device);
        return before;
    }
    void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
    void uncheckedSetDevice(c10::Device device) const noexcept override {
        if (device.index() >= 0) current = device.index();
    }
    c10::Stream getStream(c10::Device device) const noexcept override {
        return c10::Stream(c10::Stream::DEFAULT, device);
    }
    c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
        return c10::Stream(c10::Stream::DEFAULT, stream.device());
    }
};

Guard guard;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

}  // namespace

extern "C" int get_current() { return current; }
extern "C" void set_current(int index) { current = static_cast<c10::DeviceIndex>(index); }
