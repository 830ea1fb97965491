"""A GPU that is not there: tensors of device `cuda` that compute on the CPU or, above a size, hold no data.

    python -m tests.support.fake_cuda [--no-data N] [--compile ARCH] [--events FILE] SCRIPT | -m MODULE  [arguments]

runs a program on it, in a process of its own: it must be there before anything else is imported. What the program does
that a GPU forbids is an error with the line that did it; what costs a GPU time (host reads, copies between the host and
the device, waits) or memory is an event with its line.

    device.py    the state of the device: events, memory, capture, current device and stream
    tensor.py    the tensors and the rules of every operation
    graphs.py    streams, events, CUDA graphs; the CUDA runtime under a loop on the device
    launch.py    Triton kernels: interpreted, or compiled for an architecture and not run
    install.py   what takes the place of torch.cuda

Not imitated: the order of streams, races, cuBLAS and cuDNN, the CUDA branches inside torch's composite operations.
"""
