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
from benchmarks.e2e.protocol import Bench, Regime, Rounds
from benchmarks.e2e.timeline import Run, play
from benchmarks.micro import roofline
from benchmarks.micro.measure import busy_state
from dsa_engine import Confidence, Fixed, Pipeline

KINDS = {  # words in the names of torch's operations and of kernels; the first that fits
    "attention": ("attn", "attention", "flash", "fmha", "sdpa", "bmm", "softmax"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "::mm", "addmm", "linear"),
}


def decision_us(bench: Bench, regime: Regime) -> float | None:
    """Median microseconds in which the host learns who goes on, the forward being complete. None without a head, and
    where the host is not asked."""
    if bench.pipe.engine.head is None or bench.pipe.max_steps < 2:
        return None
    stream = bench.stream(regime, 0, Confidence(1.0))
    stopped, spans = stream.rollout.poll_stop_flags, []

    def timed(live):
        bench.watch.synchronise()
        start = time.perf_counter()
        answer = stopped(live)
        spans.append(1e6 * (time.perf_counter() - start))
        return answer

    stream.rollout.poll_stop_flags = timed
    play(lambda: stream, min(regime.chunks, 10))
    return median(spans) if spans else None


def by_op(bench: Bench, regime: Regime) -> dict[str, float]:
    """Milliseconds of a steady chunk of all steps and the commit, by kind of op."""
    stream = bench.stream(regime, 0, Fixed(bench.pipe.max_steps))
    for _ in range(regime.skip):
        stream.next()
    cuda, repeats = stream.watch.cuda, 2
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        for _ in range(repeats):  # a chunk that is not accepted is made again
            stream.denoise()
        bench.watch.synchronise()
    stream.close()
    kinds = Counter(dict.fromkeys((*KINDS, "elementwise"), 0.0))
    for op in found.key_averages():
        if not cuda or (op.device_type == DeviceType.CUDA and not op.is_user_annotation):
            name = next((k for k, words in KINDS.items() if any(w in op.key.lower() for w in words)), "elementwise")
            kinds[name] += (op.self_device_time_total if cuda else op.self_cpu_time_total) / 1e3 / repeats
    return dict(kinds)


def product(pipe: Pipeline) -> dict:
    """TF/s of a large square product in the model's dtype."""
    dit = pipe.engine.dit
    side = 8192 if dit.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=dit.device).to(dit.dtype) for _ in range(2))
    timing = measure([lambda: a @ b], clock(dit.device))
    found = {"side": side, "tflops": 2 * side**3 / timing.us / 1e6}
    return found | ({"gpu": busy_state(a, b)} if dit.device.type == "cuda" else {})


class Work:
    """FLOP of a run, as the model's own."""

    def __init__(self, pipe: Pipeline):
        rows = roofline.rows(roofline.Sizes(pipe.engine.dit.config, pipe.height, pipe.width, pipe.config.chunk_frames))
        near, far = roofline.KEY_FRAMES[:2]
        low, high = (
            sum(roofline.total(roofline.forward(rows, "bf16", f), "bf16", {}).flop.values()) for f in (near, far)
        )
        self.frame = (high - low) / (far - near)
        self.base = low - near * self.frame
        self.step = sum(r.flop for r in rows if r.op in roofline.STEP_OPS)
        dit = pipe.engine.dit
        hopper = dit.device.type == "cuda" and torch.cuda.get_device_capability(dit.device) == (9, 0)
        self.sheet = roofline.HOPPER["bf16"] if hopper and dit.dtype == torch.bfloat16 else None

    def __call__(self, run: Run) -> float:
        forwards = sum(self.base + self.frame * frames for c in run.chunks for frames in c.forwards)
        return forwards + self.step * sum(c.steps for c in run.chunks)

    def rate(self, rounds: Rounds, ceiling: float) -> dict:
        """TF/s, and their share of the ceiling and of the datasheet's, where it is known."""
        runs = [run for one in rounds for run in one]
        flop, chunks = sum(map(self, runs)), sum(len(r.chunks) for r in runs)
        tflops = flop / sum(r.stage("denoise", "commit") for r in runs) / 1e9
        part = 1e12 * tflops / self.sheet if self.sheet else None
        return {
            "tflop_a_chunk": flop / chunks / 1e12,
            "tflops": tflops,
            "of_product": tflops / ceiling,
            "of_sheet": part,
        }


def decode_ms(rounds: Rounds) -> float:
    """Milliseconds a chunk."""
    chunks = [c for one in rounds for r in one for c in r.chunks]
    return sum(c.ms["decode"] for c in chunks) / len(chunks)


def memory(pipe: Pipeline) -> dict:
    """MiB: the most so far, of a process on a CPU and of torch's tensors on a GPU; of weights and of cache pools."""
    cuda, engine = pipe.engine.dit.device.type == "cuda", pipe.engine
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    modules = [m for m in (engine.dit, engine.head, engine.decoder, engine.text) if isinstance(m, torch.nn.Module)]
    weights = sum(p.nbytes for m in modules for p in m.parameters())
    return {name: n / 2**20 for name, n in (("peak", peak), ("weights", weights), ("cache", engine.cache_bytes))}
