"""csrc/attention: its results on a host emulator of Hopper, and what the CUDA compiler makes of it.

No GPU is needed. The emulator (emulator.h) runs the kernel's own source: TMA with its swizzle, wgmma with its
descriptors and fragments, barriers and their phases, everything asynchronous as late as it may happen.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.support.csrc.emulated import HERE, cuda_headers

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NAN = float("nan")


def compile_emulated(folder: Path, csrc: Path = CSRC, optimise: str = "-O2") -> Emulated:
    headers, compiler = cuda_headers(), shutil.which("g++")
    if compiler is None or headers is None:
        pytest.skip("needs g++ and the CUDA headers")
    library = folder / "attention.so"
    flags = ["-std=c++17", optimise, "-U_FORTIFY_SOURCE", "-DDSA_EMULATE", "-shared", "-fPIC", "-Wno-psabi"]
    include = [f"-I{path}" for path in (csrc, HERE, headers)]
    source = HERE / "attention_emulated.cpp"
    subprocess.run([compiler, *flags, *include, str(source), "-o", str(library)], check=True)
    return Emulated(library)


class Emulated:
    """The launcher and the kernels, on CPU tensors."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.attention.restype = ctypes.c_char_p
        for function in (self.library.workspace_bytes, self.library.shared_bytes):
            function.restype = ctypes.c_size_t
            function.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_int]
        self.library.shared_bytes.argtypes = [ctypes.c_int64, ctypes.c_int]

    def __call__(self, q, k, v, slot, keys, scales=None, *, blocks=3, order=0, workspace=None, out=None):
        B, T, H, D = q.shape
        if workspace is None:
            workspace = torch.full((self.library.workspace_bytes(B, T, H, D, blocks) // 4,), NAN)
        guard = torch.full((q.numel() + 4096,), NAN, dtype=q.dtype)
        out = guard[: q.numel()].view(q.shape) if out is None else out
        tensors = (q, k, v, out, slot, keys, workspace, *(() if scales is None else scales))
        pointers = (ctypes.c_void_p * 9)(*(tensor.data_ptr() for tensor in tensors))
        sizes = (ctypes.c_int64 * 9)(B, T, H, D, *k.shape[:3], keys.shape[1], workspace.numel() * 4)
        error = self.library.attention(pointers, sizes, blocks, order)
        if error is not None:
            raise RuntimeError(error.decode())
        assert guard[q.numel() :].isnan().all(), "it wrote beyond the last query"
        return out


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    return compile_emulated(tmp_path_factory.mktemp("attention"))


def problem(T, H, D, W, S, slot, keys, slots=None, seed=0, e4m3=False):
    """Random q, k, v; every cached frame that no row sees is NaN. With e4m3 also the scales of k and v."""
    generator = torch.Generator().manual_seed(seed)
    slots = slots or max(slot) + 1
    q = torch.randn(len(slot), T, H, D, generator=generator)
    cache = torch.randn(2, slots, W, S, H, D, generator=generator)
    seen = torch.zeros(slots, W, dtype=torch.bool)
    for index, runs in zip(slot, keys):
        for start, stop in runs:
            seen[index, start:stop] = True
    cache[:, ~seen] = NAN
    arguments = [q.to(torch.bfloat16), *cache.to(torch.bfloat16).contiguous(), torch.tensor(slot), torch.tensor(keys)]
    if e4m3:
        arguments[1:3] = (cache * 60).to(torch.float8_e4m3fn)
        arguments.append(torch.rand(2, slots, H, generator=generator) / 60 + 1 / 120)
    return arguments


def by_torch(q, k, v, slot, keys, scales=None, plain=False):
    """softmax(q K^T / sqrt(D)) V of each row in float32; zeros for a row that sees nothing.

    Plain: what torch makes of it in the kernel's dtype, bf16 or, with an e4m3 cache, queries and weights in e4m3.
    """
    out = torch.zeros(q.shape)
    for row, (index, runs) in enumerate(zip(slot.tolist(), keys.tolist())):
        frames = torch.cat([torch.arange(start, stop) for start, stop in runs])
        if len(frames) == 0:
            continue
        seen = [cache[index, frames].flatten(0, 1).transpose(0, 1) for cache in (k, v)]  # [H, tokens, D]
        queries = q[row].transpose(0, 1)
        if scales is not None:
            seen = [x.float() * scale[index, :, None, None] for x, scale in zip(seen, scales)]
            result = attend_e4m3(queries.float(), *seen) if plain else attend(queries.float(), *seen)
        else:
            result = attend(*(x if plain else x.float() for x in (queries, *seen)))
        out[row] = result.transpose(0, 1)
    return out


def attend(q, k, v):
    return scaled_dot_product_attention(q[None], k[None], v[None])[0]


def attend_e4m3(q, k, v):
    scale = q.abs().amax(-1, keepdim=True) / 448
    scores = (q / scale).to(torch.float8_e4m3fn).float() @ k.mT * scale / math.sqrt(q.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    result = (weights * 256).to(torch.float8_e4m3fn).float() / 256 @ v / weights.sum(-1, keepdim=True)
    return result.to(torch.bfloat16)


def errors(out, *arguments) -> tuple[float, float]:
    """Greatest error of the kernel and of plain torch in the same dtypes, both against float32."""
    exact = by_torch(*arguments)
    worst = (out.float() - exact).abs()
    assert not worst.isnan().any(), f"NaN at {worst.isnan().nonzero()[0].tolist()}"
    return worst.max().item(), (by_torch(*arguments, plain=True) - exact).abs().max().item()


def check(out, *arguments) -> None:
    kernel, plain = errors(out, *arguments)
    # The floor: where few keys are seen, torch's rounding may happen to be exact, while the kernel rounds each weight.
    assert kernel <= 2 * plain + 2**-11, f"worst error {kernel:.2e}, plain {plain:.2e}"


CASES = {
    "one tile, one key frame": dict(T=64, H=1, D=128, W=2, S=5, slot=[0], keys=[[[1, 2]]], blocks=1),
    "two query tiles, two key tiles": dict(T=200, H=2, D=128, W=16, S=16, slot=[0], keys=[[[0, 13]]], blocks=1),
    "whole tiles and split tiles": dict(T=200, H=2, D=128, W=24, S=16, slot=[0], keys=[[[0, 24]]], blocks=3),
    "a block with two partial results": dict(T=130, H=1, D=128, W=40, S=16, slot=[0], keys=[[[1, 40]]], blocks=3),
    "more blocks than work": dict(T=5, H=1, D=128, W=30, S=7, slot=[0], keys=[[[0, 27]]], blocks=7),
    "two runs": dict(T=64, H=2, D=128, W=31, S=7, slot=[1], keys=[[[0, 3], [5, 31]]], blocks=2),
    "four runs, two of them empty": dict(
        T=33, H=1, D=128, W=20, S=11, slot=[0], keys=[[[4, 4], [0, 3], [9, 9], [10, 19]]], blocks=2
    ),
    "rows share a slot": dict(
        T=130, H=3, D=128, W=12, S=16, slot=[1, 1, 0], keys=[[[0, 3]], [[3, 12]], [[11, 12]]], blocks=4
    ),
    "a row sees nothing": dict(
        T=5, H=2, D=128, W=4, S=5, slot=[0, 0, 0], keys=[[[0, 1]], [[2, 2]], [[3, 4]]], blocks=3
    ),
    "nobody sees anything": dict(T=200, H=1, D=128, W=4, S=5, slot=[0], keys=[[[0, 0], [4, 4]]], blocks=1),
    "an exact tile": dict(T=128, H=1, D=128, W=12, S=16, slot=[0], keys=[[[1, 12]]], blocks=1),
    "head dim 64": dict(T=200, H=2, D=64, W=24, S=16, slot=[0, 0], keys=[[[0, 20]], [[20, 24]]], blocks=3),
}


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float32(emulated, case, e4m3, order):
    case = dict(case)
    blocks = case.pop("blocks")
    if e4m3:
        case["D"] = 128
    arguments = problem(**case, e4m3=e4m3)
    check(emulated(*arguments, blocks=blocks, order=order), *arguments)


@st.composite
def problems(draw):
    W, S = draw(st.integers(1, 14)), draw(st.sampled_from([1, 5, 16, 37]))
    slots, rows, runs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ends = st.lists(st.integers(0, W), min_size=2 * runs, max_size=2 * runs)
    keys = [torch.tensor(sorted(draw(ends))).view(runs, 2).tolist() for _ in range(rows)]
    slot = [draw(st.integers(0, slots - 1)) for _ in range(rows)]
    T, H, seed = draw(st.integers(1, 140)), draw(st.integers(1, 2)), draw(st.integers(0, 99))
    D, e4m3 = draw(st.sampled_from([(64, False), (128, False), (128, True)]))
    arguments = problem(T, H, D, W, S, slot, keys, slots, seed, e4m3)
    return arguments, draw(st.integers(1, 6)), draw(st.integers(0, 9))


@settings(max_examples=25)
@given(problems())
def test_any_shape(emulated, drawn):
    arguments, blocks, order = drawn
    check(emulated(*arguments, blocks=blocks, order=order), *arguments)


@pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
def test_late_maxima(emulated, e4m3):
    """Scores grow from frame to frame: all earlier sums are scaled down, again and again."""
    q, k, *rest = problem(70, 1, 128, 30, 16, [0], [[[0, 30]]], e4m3=e4m3)
    k = (k.float() * torch.linspace(0.1, 1, 30)[None, :, None, None, None]).to(k.dtype)
    arguments = (q * 8, k, *rest)
    check(emulated(*arguments, blocks=2), *arguments)


@pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
def test_same_bits_every_time(emulated, e4m3):
    arguments = problem(150, 1, 128, 40, 16, slot=[0, 1], keys=[[[1, 40]], [[0, 33]]], e4m3=e4m3)
    first = emulated(*arguments, blocks=3, order=0)
    for order in (1, 2):
        assert torch.equal(emulated(*arguments, blocks=3, order=order), first)


def test_refusals(emulated):
    arguments = problem(T=5, H=1, D=128, W=4, S=5, slot=[0], keys=[[[0, 4]]])
    q, k, v, slot, keys = arguments
    with pytest.raises(RuntimeError, match=r"attention \[5, 1, 96\]: head dim 96 must be 64 or 128"):
        emulated(q[..., :96], k[..., :96], v[..., :96], slot, keys)
    with pytest.raises(RuntimeError, match="5 runs of keys; there must be 1 to 4"):
        emulated(q, k, v, slot, keys.expand(1, 5, 2).contiguous())
    with pytest.raises(RuntimeError, match="a workspace of 256 bytes; it must have 399360"):
        emulated(*arguments, workspace=torch.empty(64))
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        emulated(*arguments, out=torch.empty(1000, dtype=q.dtype)[1:641].view(q.shape))
    with pytest.raises(RuntimeError, match="blocks = 0 must be 1 to"):
        emulated(*arguments, blocks=0)
    with pytest.raises(RuntimeError, match="scales must be given for both keys and values, or for none"):
        emulated(*arguments, [torch.ones(1, 1)])
    with pytest.raises(RuntimeError, match="head dim 64 must be 128 with an e4m3 cache"):
        emulated(q[..., :64], k[..., :64], v[..., :64], slot, keys, torch.ones(2, 1, 1))


DEFECTS = {
    "cleared values not shown to wgmma": ("attention_producer.cuh", "}\n        async_proxy_fence();", "}"),
    "keys released before they are read": (
        "attention.cuh",
        "wgmma_wait<1>();\n            finish_scores();",
        "finish_scores();",
    ),
    "results read before they are there": (
        "attention.cuh",
        "wgmma_wait<0>();\n        finish_values();",
        "finish_values();",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_the_emulator_notices(tmp_path, defect):
    """Each defect would give the right result wherever asynchronous work happens to be done early."""
    name, correct, wrong = defect
    shutil.copytree(CSRC, tmp_path / "csrc")
    file = tmp_path / "csrc" / name
    source = file.read_text()
    assert source.count(correct) == 1
    file.write_text(source.replace(correct, wrong))
    broken = compile_emulated(tmp_path, tmp_path / "csrc", "-O0")
    arguments = problem(T=70, H=1, D=128, W=50, S=16, slot=[0], keys=[[[0, 47]]])
    try:
        kernel, plain = errors(broken(*arguments, blocks=1), *arguments)
    except (AssertionError, RuntimeError):
        return
    assert kernel > 2 * plain + 2**-11


# ---- what the compiler makes of it -----------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """A CUDA tool on the PATH or in Triton's wheel."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    target = tmp_path_factory.mktemp("attention-sm90a") / "attention.o"
    command = [nvcc, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-c"]
    done = subprocess.run([*command, str(CSRC / "attention.cu"), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, done.stdout + done.stderr


@pytest.fixture(scope="session")
def sass(compiled) -> dict[str, list[str]]:
    """Machine code by kernel."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    text = subprocess.run([cuobjdump, "-sass", str(compiled[0])], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\S+)", text)
    return {name: body.splitlines() for name, body in zip(parts[1::2], parts[2::2])}


def test_registers_and_shared_memory(compiled, emulated):
    report = compiled[1]
    assert "(C7" not in report, report  # wgmma made serial, registers not given up, fences added
    kernels = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(kernels) == 6
    print(f"\n{'kernel':32} registers  threads  shared bytes  blocks an SM")
    for name, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), report
        stem, tile = re.search(r"(attention(?:_combine)?)_kernelINS_\d+Attention(Bf16ILi\d+|Fp8)E", name).groups()
        fp8, D = tile == "Fp8", 64 if "64" in tile else 128
        threads, shared = (128, 0) if "combine" in stem else (384, emulated.library.shared_bytes(D, fp8))
        assert shared <= 232448
        # 64 K registers, 2,048 threads, 228 KB of shared memory of which each block takes another 1 KB
        blocks = min(65536 // (int(registers) * threads), 2048 // threads, 233472 // (shared + 1024))
        assert blocks >= 1
        title = f"{stem} {'e4m3' if fp8 else 'bf16'} {D}"
        print(f"{title:32} {registers:>9}  {threads:>7}  {shared:>12}  {blocks:>12}")


def kernel_code(sass, tile) -> list[str]:
    (code,) = [lines for name, lines in sass.items() if re.search(rf"16attention_kernel.*{tile}E", name)]
    return code


MULTIPLIES = {
    "Bf16ILi64": ["HGMMA.64x176x16.F32.BF16", "HGMMA.64x64x16.F32.BF16", "tnspB", "UTMALDG.4D"],
    "Bf16ILi128": ["HGMMA.64x176x16.F32.BF16", "HGMMA.64x128x16.F32.BF16", "tnspB", "UTMALDG.4D"],
    "Fp8": ["QGMMA.64x128x32.F32.E4M3.E4M3", "LDSM.16.MT88.4", "STSM.16.M88.4"],
}


@pytest.mark.parametrize("tile", MULTIPLIES)
def test_machine_code(sass, tile):
    text = "\n".join(kernel_code(sass, tile))
    for instruction in [*MULTIPLIES[tile], "UTMALDG.3D", "USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC"]:
        assert instruction in text, instruction
    assert not re.search(r"\b(LDL|STL)\b", text), "local memory"


@pytest.mark.parametrize("tile", MULTIPLIES)
def test_softmax_overlaps_the_product_with_the_values(sass, tile):
    """In the main loop the exponentials stand between the wait for the scores and the wait for the values."""
    events = [found[0] for line in kernel_code(sass, tile) if (found := re.search(r"gsb0, 0x[01]|MUFU\.EX2", line))]
    softmax = events[events.index("gsb0, 0x1") + 1 :]
    keys = 128 if tile == "Fp8" else 176
    assert softmax.index("gsb0, 0x0") == 64 * keys // 128 + 2  # scores of a thread, and two factors
