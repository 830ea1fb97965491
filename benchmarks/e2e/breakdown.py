"""What is known of a chunk beside its time: a decision, the kinds of op, FLOP and the machine's own rate, memory."""

from __future__ import annotations

import resource
import time
from collections import Counter
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.timing import clock, measure
from benchmarks.e2e.protocol import Bench, Rounds, Scenario
from benchmarks.e2e.timeline import Run
from benchmarks.micro import roofline
from benchmarks.micro.measure import busy_state
from dsa_engine import Confidence, Fixed, Pipeline

KINDS = {  # words in the names of torch's operations and of kernels; the first that fits
    "attention": ("attn", "attention", "flash", "fmha", "sdpa", "bmm", "softmax"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "::mm", "addmm", "linear"),
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decision_us(bench: Bench, scenario: Scenario) -> float | None:
    """Median microseconds in which the host learns who goes on, the forward being complete. None without a head, and
    where the host is not asked."""
    if bench.pipe.engine.head is None or bench.pipe.max_steps < 2:
        return None
    spans = []
    with bench.session(scenario, 0, Confidence(1.0)) as session:
        if session.rollout.inputs.graphs is not None:  # the stop flags decide
            return None
        for _ in range(min(scenario.chunks, 10)):
            session.next_chunk()
            synchronize(session.device)
            start = time.perf_counter()
            session.rollout.poll_stop_flags(session.rollout.slots)
            spans.append(1e6 * (time.perf_counter() - start))
    return median(spans)


def by_op(bench: Bench, scenario: Scenario) -> dict[str, float]:
    """Milliseconds of a steady chunk of all steps and the commit, by kind of op."""
    repeats, kinds = 2, Counter(dict.fromkeys((*KINDS, "elementwise"), 0.0))
    with bench.session(scenario, 0, Fixed(bench.pipe.max_steps)) as session:
        for _ in range(scenario.skip):
            session.next_chunk()
        cuda = session.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
            for _ in range(repeats):  # a chunk that is not accepted is made again
                session.rollout.denoise()
            synchronize(session.device)
    for op in profiler.key_averages():
        if not cuda or (op.device_type == DeviceType.CUDA and not op.is_user_annotation):
            name = next((k for k, words in KINDS.items() if any(w in op.key.lower() for w in words)), "elementwise")
            kinds[name] += (op.self_device_time_total if cuda else op.self_cpu_time_total) / 1e3 / repeats
    return dict(kinds)


def gemm_peak(pipe: Pipeline) -> dict:
    """TF/s of a large square GEMM in the model's dtype."""
    dit = pipe.engine.dit
    side = 8192 if dit.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=dit.device).to(dit.dtype) for _ in range(2))
    timing = measure([lambda: a @ b], clock(dit.device))
    peak = {"side": side, "tflops": 2 * side**3 / timing.us / 1e6}
    return peak | ({"gpu": busy_state(a, b)} if dit.device.type == "cuda" else {})


class Work:
    """FLOP of a run, the model's own: linear in the frames of keys that each forward sees."""

    def __init__(self, pipe: Pipeline):
        dit = pipe.engine.dit
        rows = roofline.rows(roofline.Sizes(dit.config, pipe.height, pipe.width, pipe.config.chunk_frames))

        def forward(frames: int) -> float:
            return sum(roofline.total(roofline.forward(rows, "bf16", frames), "bf16", {}).flop.values())

        near, far = roofline.KEY_FRAMES[:2]
        self.frame = (forward(far) - forward(near)) / (far - near)
        self.base = forward(near) - near * self.frame
        self.step = sum(r.flop for r in rows if r.op in roofline.STEP_OPS)
        hopper = dit.device.type == "cuda" and torch.cuda.get_device_capability(dit.device) == (9, 0)
        self.sheet = roofline.HOPPER["bf16"] if hopper and dit.dtype == torch.bfloat16 else None

    def __call__(self, run: Run) -> float:
        forwards = sum(self.base + self.frame * frames for c in run.chunks for frames in c.forwards)
        return forwards + self.step * sum(c.steps for c in run.chunks)

    def rate(self, rounds: Rounds, peak: float) -> dict:
        """TF/s, and their share of the GEMM's peak and of the datasheet's, where it is known."""
        runs = [run for one in rounds for run in one]
        flop = sum(map(self, runs))
        tflops = flop / sum(r.stage("denoise", "commit") for r in runs) / 1e9
        return {
            "tflop_a_chunk": flop / sum(len(r.chunks) for r in runs) / 1e12,
            "tflops": tflops,
            "of_product": tflops / peak,
            "of_sheet": 1e12 * tflops / self.sheet if self.sheet else None,
        }


def decode_ms(rounds: Rounds) -> float:
    """Milliseconds per chunk."""
    runs = [run for one in rounds for run in one]
    return sum(r.stage("decode") for r in runs) / sum(len(r.chunks) for r in runs)


def memory(pipe: Pipeline) -> dict:
    """MiB: the peak so far, of a process on a CPU and of torch's tensors on a GPU; of weights and of cache pools."""
    cuda, engine = pipe.engine.dit.device.type == "cuda", pipe.engine
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    modules = [m for m in (engine.dit, engine.head, engine.decoder, engine.text) if isinstance(m, torch.nn.Module)]
    weights = sum(p.nbytes for m in modules for p in m.parameters())
    return {name: n / 2**20 for name, n in (("peak", peak), ("weights", weights), ("cache", engine.cache_bytes))}
