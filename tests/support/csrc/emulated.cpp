// csrc's launchers and bindings with the kernels on the host: the module that `emulated.py` puts in the place of
// `dsa_engine.csrc`. Everything but the GPU is the real thing.
#include <pybind11/pybind11.h>

#include "emulator_hopper.h"

#include "attention.cu"
#include "bindings.cpp"
#include "epilogue.cu"
#include "modulate.cu"
#include "norm_rope.cu"

// The order in which a block's threads take their turn (emulator.h).
extern "C" void set_order(int order) { emulate::order() = order; }
