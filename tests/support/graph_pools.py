"""A small model, a pool of it, and its chunks with graphs and without."""

from __future__ import annotations

import dataclasses

import torch

from dsa_engine import Confidence, Fixed, PerChunk, Relative
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.engine.chunk_plan import lower
from dsa_engine.engine.engine import Engine
from dsa_engine.models.confidence import new_head
from dsa_engine.models.dit import CausalDiT

SIZE, CHUNKS, FRAMES, STEPS = 4, 4, 2, 4


def random_model(kind="pooled", **options):
    """Weights at which no gate or gain is what would hide it, and confidences on both sides of one half. kind: of the
    head."""
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, text_dim=40, freq_dim=64, **options)
    dit, head = CausalDiT(config).requires_grad_(False).eval(), new_head(config, kind).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.15)
    torch.nn.init.normal_((head.mlp[2] if kind == "pooled" else head.out).weight, std=1.0 if kind == "pooled" else 0.2)
    return dit, head


def pool(dit, head, slots, deterministic=True, window=6):
    """An engine, and the inputs of a pool."""
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0, window=window)
    engine = Engine(dit, head, None, None, config, slots, deterministic)
    return engine, engine._pool(engine._pool_shape(SIZE, SIZE, CHUNKS * FRAMES, config), slots)


def rollout(engine, inputs, policies, commit="clean"):
    """One row for each policy, in a pool whose keys and values are not numbers yet. The prompts have padding."""
    rows = len(policies)
    embeds = torch.randn(rows, 7, engine.dit.config.text_dim, generator=torch.Generator().manual_seed(5))
    roll = engine.rollout(
        embeds.to(inputs.x),
        height=SIZE,
        width=SIZE,
        frames=CHUNKS * FRAMES,
        policy=Fixed(1),
        seeds=range(rows),
        config=dataclasses.replace(engine.config, commit=commit),
    )
    roll.inputs, roll.cache, roll.slot = inputs, inputs.cache, inputs.cache.acquire(rows)
    roll.slots = roll.slot.tolist()
    roll.policies = [policy.start(STEPS) for policy in policies]
    inputs.cache.k.fill_(float("nan"))
    inputs.cache.v.fill_(float("nan"))
    return roll


def eager(inputs, rows):
    """A forward without graphs, as `GraphRunner` makes it."""
    lengths = [inputs.text.kv.shape[3]] * len(rows)
    inputs.run(inputs.rows(rows), lengths, any(not row.commit for row in rows))


@torch.inference_mode()
def chunk(roll, made=None, on_device=False):
    """The next chunk, and which slots took part in each of its forwards. made: with graphs; on_device: the flags alone
    decide."""
    plan, seen = roll.prepare_chunk(), []

    def done(forward, live):
        roll.on_forward_done(forward, live)
        seen.append((forward, list(live)))

    launches = lower(plan) if made is None else made.lower(plan, len(roll.slots), host_decides=not on_device)
    for launch, live in roll.run(launches, done):
        if made is not None:
            made.launch(launch, live)
        else:
            eager(roll.inputs, launch.forwards[0].rows(live))
    result = roll.result()
    roll.accept(result.latents, result.confidence)
    return result, seen


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_alike(ours, theirs):
    """The bits of all that matters later: not the scratch entry, nor what was left in x after the last step."""
    for name in ("x0", "state", "step"):
        assert same(getattr(ours, name)[:-1], getattr(theirs, name)[:-1]), name
    for name in ("position", "k", "v"):
        assert same(getattr(ours.cache, name), getattr(theirs.cache, name)), name


POLICIES = {
    "every count": [PerChunk([1, 2, 3, 4])],
    "known counts, two rows": [PerChunk([3, 1, 4, 2])] * 2,
    "counts that differ, three rows": [PerChunk([1, 4, 2, 3]), PerChunk([4, 1, 2, 2]), PerChunk([2, 2, 2, 4])],
    "confidence": [Confidence(0.5)],
    "confidence, three rows": [Confidence(0.5), Confidence(0.55, min_steps=2), Confidence(0.45, max_steps=3)],
    "one never stops": [Confidence(1.0), Confidence(0.0)],
    "relative": [Relative()],
    "relative, three rows": [Relative(), Relative(2, frame_reduce="mean"), Confidence(0.5)],
    "five rows": [Confidence(0.4 + 0.05 * i) for i in range(5)],
}
