// Python bindings of the launchers; `dsa_engine/ops/cuda_backend.py` makes the arguments. A struct of the headers is a
// tuple of its fields, an address an integer. No torch header is needed to build or to load this.
#include <pybind11/pybind11.h>

#include <tuple>

#include "attention.h"
#include "epilogue.h"
#include "graphs.h"
#include "modulate.h"
#include "norm_rope.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace dsa {

struct Address {
    uintptr_t value;

    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(value);
    }
};

}  // namespace dsa

namespace pybind11::detail {

using dsa::Address;

template <class Struct, class... Fields>
struct struct_caster {
    PYBIND11_TYPE_CASTER(Struct, const_name("tuple"));

    bool load(handle source, bool convert) {
        make_caster<std::tuple<Fields...>> fields;
        if (!fields.load(source, convert)) return false;
        value = std::apply([](auto... field) { return Struct{field...}; }, cast_op<std::tuple<Fields...>>(fields));
        return true;
    }
};

template <>
struct type_caster<Address> {
    PYBIND11_TYPE_CASTER(Address, const_name("int"));

    bool load(handle source, bool convert) {
        make_caster<uintptr_t> number;
        if (!number.load(source, convert)) return false;
        value = {cast_op<uintptr_t>(number)};
        return true;
    }
};

// clang-format off
template <> struct type_caster<dsa::Rows> : struct_caster<dsa::Rows, Address, int64_t, int64_t> {};
template <> struct type_caster<dsa::Latents> : struct_caster<dsa::Latents, Address, int64_t, int64_t> {};
template <> struct type_caster<dsa::Vector> : struct_caster<dsa::Vector, Address, int> {};
template <> struct type_caster<dsa::PerFrame> : struct_caster<dsa::PerFrame, Address, int, int64_t, int64_t, int> {};
template <> struct type_caster<dsa::Cache>
    : struct_caster<dsa::Cache, Address, int, int64_t, int64_t, int64_t, Address> {};
template <> struct type_caster<dsa::Operand>
    : struct_caster<dsa::Operand, dsa::Rows, dsa::Vector, bool, dsa::Rows, dsa::Cache> {};
template <> struct type_caster<dsa::Angles> : struct_caster<dsa::Angles, Address, Address, int64_t, int64_t> {};
template <> struct type_caster<dsa::Ring> : struct_caster<dsa::Ring, Address, bool, Address, bool, int64_t> {};
template <> struct type_caster<dsa::LatentShape>
    : struct_caster<dsa::LatentShape, int, int64_t, int64_t, int64_t, int64_t> {};
template <> struct type_caster<dsa::HeadWeights>
    : struct_caster<dsa::HeadWeights, int, int64_t, Address, Address, Address, Address, dsa::PerFrame, Address> {};
template <> struct type_caster<dsa::StopRule>
    : struct_caster<dsa::StopRule, Address, Address, Address, Address, Address> {};
// clang-format on

}  // namespace pybind11::detail

namespace {

using dsa::Address;
using Shape = std::tuple<int64_t, int64_t, int64_t>;  // B, T, C

void norm_rope(const char* op, int dtype, Shape shape, int64_t head_dim, float eps, const py::tuple& operands,
               dsa::Angles angles, dsa::Ring ring, Address stream) {
    const auto [B, T, C] = shape;
    dsa::NormRopeArgs args{op, dtype, B, T, C, head_dim, eps, int(operands.size()), {}, angles, ring, stream};
    if (operands.size() > 3) throw py::value_error("norm_rope: at most q, k and v");
    for (size_t i = 0; i < operands.size(); ++i) args.operands[i] = operands[i].cast<dsa::Operand>();
    dsa::norm_rope(args);
}

void modulate(const char* op, int dtype, Shape shape, dsa::Rows x, dsa::Rows y, dsa::Rows sum, dsa::Rows out,
              dsa::PerFrame gate, dsa::PerFrame shift, dsa::PerFrame scale, float eps, Address row_scale,
              Address stream) {
    const auto [B, T, C] = shape;
    dsa::modulate({op, dtype, B, T, C, x, y, sum, out, gate, shift, scale, eps, row_scale, stream});
}

void gelu_bias(int dtype, Shape shape, dsa::Rows x, dsa::Rows out, dsa::Vector bias, Address row_scale,
               Address stream) {
    const auto [B, T, C] = shape;
    dsa::gelu_bias({dtype, B, T, C, x, out, bias, row_scale, stream});
}

using EpilogueShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // B, F, S, C, P

void epilogue(int dtype, EpilogueShape shape, dsa::Rows hidden, dsa::PerFrame shift, dsa::PerFrame scale,
              Address weight, dsa::Vector bias, float eps, dsa::LatentShape latents, dsa::Latents x, dsa::Latents noise,
              dsa::Latents x0, dsa::Latents next, Address sigma, Address next_sigma, dsa::HeadWeights head,
              dsa::StopRule rule, Address state, Address workspace, Address stream) {
    const auto [B, F, S, C, P] = shape;
    dsa::epilogue({dtype,   B, F,     S,  C,    P,     hidden,     shift, scale, weight, bias,      eps,
                   latents, x, noise, x0, next, sigma, next_sigma, head,  rule,  state,  workspace, stream});
}

using AttentionShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

void attention(AttentionShape shape, Address q, Address k, Address v, Address out, Address slot, Address keys,
               Address workspace, size_t workspace_bytes, int blocks, Address stream, Address k_scale,
               Address v_scale) {
    const auto [B, T, H, D, N, W, S, R] = shape;
    dsa::attention({q,      k,      v,       out,    slot, keys, B, T, H, D, N, W, S, R, workspace, workspace_bytes,
                    blocks, stream, k_scale, v_scale});
}

#ifndef DSA_EMULATE  // what builds a graph needs the CUDA runtime
uintptr_t set_while(Address graph, Address after, unsigned long long handle, Address slots, int rows, Address flags,
                    int64_t stride) {
    return reinterpret_cast<uintptr_t>(dsa::set_while({graph, after, handle, slots, rows, flags, stride}));
}
#endif

}  // namespace

PYBIND11_MODULE(csrc, m) {
    m.doc() = "CUDA kernels on addresses, strides and a stream; errors name op, shape, and the rule or CUDA's words";
    m.attr("DTYPES") = py::dict("float32"_a = int(dsa::FLOAT32), "bfloat16"_a = int(dsa::BFLOAT16),
                                "float16"_a = int(dsa::FLOAT16), "float8_e4m3fn"_a = int(dsa::E4M3));
    const py::kw_only named;
    m.def("norm_rope", norm_rope, named, "op"_a, "dtype"_a, "shape"_a, "head_dim"_a, "eps"_a, "operands"_a, "angles"_a,
          "ring"_a, "stream"_a);
    m.def("modulate", modulate, named, "op"_a, "dtype"_a, "shape"_a, "x"_a, "y"_a, "sum"_a, "out"_a, "gate"_a,
          "shift"_a, "scale"_a, "eps"_a, "row_scale"_a, "stream"_a);
    m.def("gelu_bias", gelu_bias, named, "dtype"_a, "shape"_a, "x"_a, "out"_a, "bias"_a, "row_scale"_a, "stream"_a);
    m.def("epilogue", epilogue, named, "dtype"_a, "shape"_a, "hidden"_a, "shift"_a, "scale"_a, "weight"_a, "bias"_a,
          "eps"_a, "latents"_a, "x"_a, "noise"_a, "x0"_a, "next"_a, "sigma"_a, "next_sigma"_a, "head"_a, "rule"_a,
          "state"_a, "workspace"_a, "stream"_a);
    m.def("epilogue_workspace", dsa::epilogue_workspace, named, "batch"_a, "frames"_a, "tokens"_a, "channels"_a,
          "units"_a);
    m.def("attention", attention, named, "shape"_a, "q"_a, "k"_a, "v"_a, "out"_a, "slot"_a, "keys"_a, "workspace"_a,
          "workspace_bytes"_a, "blocks"_a, "stream"_a, "k_scale"_a, "v_scale"_a);
    m.def("attention_workspace", dsa::attention_workspace, named, "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a,
          "blocks"_a);
    m.def("attention_blocks", dsa::attention_blocks, named, "sms"_a);
#ifndef DSA_EMULATE
    m.def("set_while", set_while, named, "graph"_a, "after"_a, "handle"_a, "slots"_a, "rows"_a, "flags"_a, "stride"_a);
    m.attr("DEVICE") = "cuda";
#else
    m.attr("DEVICE") = "cpu";
#endif
}
