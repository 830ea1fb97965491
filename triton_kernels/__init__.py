"""The portable Triton kernels. They install as `dsa_engine.triton_kernels`; each op's file has the stem of `ops/`."""

if __name__ == "triton_kernels":
    raise ImportError("import dsa_engine.triton_kernels: the bare name is another package's")
