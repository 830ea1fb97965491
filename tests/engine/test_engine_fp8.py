"""Engines in FP8: against a memory that keeps every number, rounded by hand, and against themselves run another way."""

from __future__ import annotations

import copy

import pytest
import torch

from dsa_engine import Fixed, PerChunk, Pipeline
from dsa_engine.config import RolloutConfig
from dsa_engine.engine.batch_runner import BatchRunner
from dsa_engine.engine.cuda_graphs import GraphRunner
from dsa_engine.engine.engine import Engine
from dsa_engine.models.fp8 import E4M3, cache_scales, quantize_linears
from dsa_engine.ops import reference
from dsa_engine.sampling.schedule import Schedule
from tests.engine.test_cuda_graphs import chunk as graphed_chunk
from tests.engine.test_cuda_graphs import random_model
from tests.engine.test_cuda_graphs import rollout as graphed_rollout
from tests.engine.test_rollout import CHUNKS, FRAMES, SIZE, Everything, naive, rotated, run
from tests.support.cuda_stand_in import Cuda, masked_attention, patch

COUNTS = (2, 1, 3, 2)


def engine(dit, fp8_cache=True, deterministic=False, **options) -> Engine:
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0, **options)
    return Engine(dit, None, None, None, config, 2, deterministic, fp8_cache)


def rollout(made, noise, embeds, given=None):
    return made.rollout(
        embeds,
        height=SIZE,
        width=SIZE,
        frames=CHUNKS * FRAMES,
        policy=PerChunk(list(COUNTS)),
        seeds=range(len(noise)),
        config=made.config,
        initial_noise=noise,
        renoise=given,
    )


class Rounded(Everything):
    """`Everything`, whose keys and values are e4m3 numbers: those of a float64 that torch rounds once."""

    scales = None  # of the engine

    def attend(self, layer, q, k, v, gains, rope, eps):
        def norm(x, gain):
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

        def stored(x, scale):
            return (x / scale[:, None]).clamp(-448, 448).to(E4M3).float() * scale[:, None]

        q, k = rotated(norm(q, gains[0]), self.heads, *rope), rotated(norm(k, gains[1]), self.heads, *rope)
        k, v = stored(k, self.scales.k[layer]), stored(v.unflatten(-1, (self.heads, -1)), self.scales.v[layer])
        past = self.kv[layer] + [(k, v)]
        if self.keep:
            self.kv[layer] = past
        keys, values = (torch.cat([pair[i] for pair in past], dim=1) for i in (0, 1))
        sink, ring = self.sink * self.tokens, (self.window - self.sink) * self.tokens
        start = max(sink, keys.shape[1] - ring)
        keys, values = (torch.cat((x[:, :sink], x[:, start:]), dim=1) for x in (keys, values))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2)


def drawn(rows=2):
    noise, given = torch.randn(2, rows, CHUNKS * FRAMES, 16, SIZE, SIZE).unbind(0)
    return noise, given, torch.randn(rows, 5, 40)


def apart(one, other) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("window, sink, commit", [(6, 0, "clean"), (7, 3, "clean"), (6, 1, "exit_step")])
def test_an_fp8_cache_is_one_of_rounded_numbers(tiny_dit, monkeypatch, window, sink, commit):
    """A sum in another order may round a number to its other neighbour, so they agree to a fraction of what rounding
    does to the latents."""
    noise, given, embeds = drawn()
    options = dict(window=window, sink=sink, commit=commit)
    made = engine(tiny_dit, **options)
    ours = run(rollout(made, noise, embeds, given))
    sigmas = Schedule(shift=3.0).sigmas
    full = naive(tiny_dit, noise, embeds, COUNTS, given, sigmas, window, sink, commit)
    Rounded.scales = cache_scales(tiny_dit, [0.0, *(1000 * s for s in sigmas)])
    monkeypatch.setattr("tests.engine.test_rollout.Everything", Rounded)
    rounded = naive(tiny_dit, noise, embeds, COUNTS, given, sigmas, window, sink, commit)
    assert apart(ours, rounded) < 0.1 * apart(full, rounded)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 6},
        {"window": 7, "sink": 3},
        {"window": 6, "sink": 2, "rope": "relative"},
        {"window": None},
        {"window": 6, "commit": "exit_step"},
    ],
)
def test_the_engine_is_the_plain_loop(tiny_dit, options, linear):
    """Forwards on the step inputs, commits riding along, against `denoise_chunk` and a commit of its own: row by row
    they are the same products, so the same bits."""
    noise, given, embeds = drawn(1)
    if linear:
        quantize_linears(tiny_dit)
    made = engine(tiny_dit, deterministic=True, **options)
    plain, ours = (rollout(made, noise, embeds, given) for _ in range(2))
    for _ in range(CHUNKS):
        one, other = plain.denoise(lambda step: None), ours.denoise()
        assert one.latents.equal(other.latents) and one.steps == other.steps
        plain.accept(one.latents)
        ours.accept(other.latents)


def test_a_state_comes_back_and_a_recache_remakes_it(tiny_dit):
    noise, given, embeds = drawn(1)
    roll = rollout(engine(tiny_dit, deterministic=True, window=6, sink=2, rope="relative"), noise, embeds, given)
    for _ in range(3):
        roll.accept(roll.denoise().latents)
    state = roll.save()
    first = [roll.denoise().latents]
    roll.accept(first[0])
    first.append(roll.denoise().latents)
    roll.load(state)
    again = [roll.denoise().latents]
    roll.accept(again[0])
    again.append(roll.denoise().latents)
    assert all(map(torch.equal, first, again))
    roll.set_prompt(roll.text_kv, recache=True)
    assert roll.denoise().latents.isfinite().all()


@pytest.fixture(scope="module", params=["fp8", "fp8-cache"])
def fp8_pipe(request, untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu", deterministic=True, quantization=request.param)


def test_the_pipeline_makes_such_a_cache(fp8_pipe, pipe):
    with fp8_pipe.session("a red circle jumps") as session, pipe.session("a red circle jumps") as plain:
        cache, other = session.rollout.cache, plain.rollout.cache
        assert cache.k.dtype == cache.v.dtype == E4M3 and other.k.dtype == torch.float32
        assert 4 * cache.k.nbytes == other.k.nbytes
        with pytest.raises(ValueError, match="state of a cache of torch.float32"):
            session.restore(plain.snapshot())


def test_sessions_together_make_what_each_makes_alone(fp8_pipe):
    prompts = ["a red circle jumps", "a blue square moves sideways on navy", "a green cross rests"]

    def opened():
        return [fp8_pipe.session(p, seed=i, step_policy=PerChunk([2, 1, 3])) for i, p in enumerate(prompts)]

    alone = []
    for session in opened():
        with session:
            alone.append([session.next_chunk().latents for _ in range(4)])
    sessions, runner, made = opened(), BatchRunner(4), [[], [], []]
    for session in sessions:
        runner.add(session)
    while len(runner):
        for session in runner.forward():
            index = sessions.index(session)
            made[index].append(session.finish().latents)
            if len(made[index]) < 4:
                runner.add(session)
    assert all(a.equal(b) for mine, others in zip(made, alone) for a, b in zip(mine, others))
    for session in sessions:
        session.close()


def test_it_is_another_video_but_not_far_away(fp8_pipe, pipe):
    """Rounding shows, which an option that does nothing would not, and does not take over."""
    noise, embeds = torch.randn(1, 6, 16, 8, 8), pipe.engine.encode(["a red circle jumps"])
    options = dict(latents=noise, prompt_embeds=embeds, renoise=torch.randn_like(noise), step_policy=Fixed(2))
    ours, plain = (p.generate_latents(**options) for p in (fp8_pipe, pipe))
    assert 1e-4 < apart(ours, plain) < 0.2


@pytest.mark.parametrize("options", [{}, {"sink": 1, "rope": "relative"}], ids=["absolute", "relative"])
def test_captured_forwards_are_the_eager_ones(monkeypatch, options):
    """On the stand-in for CUDA: whole chunks as one launch, with FP8 products and cache, to the bits."""
    patch(Cuda(), monkeypatch)

    def attention(q, k, v, slot, keys, scales):
        k, v = (x.float() * scale[:, None, None, :, None] for x, scale in ((k, scales.k), (v, scales.v)))
        return masked_attention(q, k, v, slot, keys)

    monkeypatch.setattr(reference, "attention", attention)
    dit, head = random_model(dim=64, ffn_dim=96, num_heads=2, text_len=12)
    quantize_linears(dit)
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0, window=6, **options)
    made = Engine(dit, head, None, None, config, 2, True, True)
    pools = [made._pool(made._pool_shape(SIZE, SIZE, None, config), 2) for _ in range(2)]
    graphs = GraphRunner(pools[0], (2,), loop_rows=2)
    graphs.capture()
    policies = [PerChunk([2, 1, 4, 3]), PerChunk([2, 3, 1, 1])]
    captured, eager = (graphed_rollout(made, pool, policies) for pool in pools)
    for _ in range(4):
        (got, _), (expected, _) = graphed_chunk(captured, graphs, on_device=True), graphed_chunk(eager)
        assert got.latents.equal(expected.latents) and got.steps == expected.steps
        for name in ("k", "v"):
            ours, theirs = (getattr(pool.cache, name).view(torch.uint8) for pool in pools)
            assert ours.equal(theirs)


@pytest.mark.gpu
def test_on_a_gpu():
    """Captured or not the same bits, and in bfloat16 not far from FP8 in float32 on a CPU: one chunk, one step."""
    dit, head = random_model(
        dim=256, ffn_dim=384, num_heads=2, text_len=12
    )  # heads of 128, as the CUDA kernel has them
    quantised = copy.deepcopy(dit)
    quantize_linears(quantised)
    cuda = copy.deepcopy(dit).to("cuda", torch.bfloat16)
    quantize_linears(cuda)
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0, window=6)
    on_cpu, on_gpu = (
        Engine(m, copy.deepcopy(head).to(m.device, m.dtype), None, None, config, 1, True, True)
        for m in (quantised, cuda)
    )
    pools = [on_gpu._pool(on_gpu._pool_shape(SIZE, SIZE, None, config), 1) for _ in range(2)]
    graphs = GraphRunner(pools[0], (1,), loop_rows=0)
    graphs.capture()
    policies = [PerChunk([1, 3, 2, 4])]
    captured, eager = (graphed_rollout(on_gpu, pool, policies) for pool in pools)
    reference = graphed_rollout(on_cpu, on_cpu._pool(on_cpu._pool_shape(SIZE, SIZE, None, config), 1), policies)
    expected = graphed_chunk(reference)[0].latents
    for index in range(4):
        got, other = graphed_chunk(captured, graphs, on_device=True)[0], graphed_chunk(eager)[0]
        assert got.latents.equal(other.latents)
        assert index or apart(got.latents.float().cpu(), expected) < 0.2
