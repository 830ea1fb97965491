"""What a joint training takes of a device: predictions against what the package's own passes allocate."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.training_memory import JointWorkload, parts, pass_bytes, predict_joint, report, score_bytes
from dsa_engine.ops import reference
from dsa_engine.training import teacher_forcing
from tests.support.live_memory import Live

WAN, LARGE = ModelConfig.preset("wan2.1-t2v-1.3b"), ModelConfig.preset("wan2.1-t2v-14b")


class Kernel(torch.autograd.Function):
    """Attention that keeps its inputs and output alone, as FlashAttention does."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v, out := torch.empty_like(q))
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@pytest.fixture
def kernels(monkeypatch):
    for module in (teacher_forcing, reference):
        monkeypatch.setattr(module, "sdpa", lambda q, k, v, bias=None: Kernel.apply(q, k, v))


def allocated(config: ModelConfig, load: JointWorkload, whole: bool, checkpointing: bool, grad: bool = True):
    """(bytes after the forward, peak of forward and backward) of a real pass on the CPU, less parameters' gradients."""
    dit = CausalDiT(config).bfloat16().requires_grad_(grad)
    dit.checkpointing = checkpointing
    shape = (load.clips, load.chunks)
    video = torch.randn(*shape, load.chunk_frames, 16, load.height, load.width)
    sigma, text = torch.rand(shape), torch.randn(*shape, config.text_len, config.text_dim)
    run = teacher_forcing.whole_clip if whole else teacher_forcing.teacher_forced
    with torch.set_grad_enabled(grad), Live() as live:
        with torch.autocast("cpu", torch.bfloat16):
            out = run(dit, video, video, sigma, text, text, load.chunks - 1)
        held = live.now
        if grad:
            out.velocity.float().square().mean().backward()
    return held, live.peak - (sum(p.nbytes for p in dit.parameters()) if grad and not checkpointing else 0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers, ffn, chunks", [(4, 128, 3), (6, 384, 2)])
def test_a_pass_allocates_what_is_predicted(kernels, whole, checkpointing, layers, ffn, chunks):
    config = ModelConfig(dim=64, ffn_dim=ffn, num_heads=4, num_layers=layers, text_dim=16, text_len=16, freq_dim=16)
    load = JointWorkload(chunks, 3, 16, 16, whole=whole)
    held, peak = allocated(config, load, whole, checkpointing)
    said = pass_bytes(config, load, whole, checkpointing)
    if not checkpointing:  # else the last layers' own, which count as work, are most of a small model's
        assert 0.75 * said.saved <= held <= 1.35 * said.saved, (held, said)
    assert peak <= 1.05 * (said.saved + said.work) and said.saved + said.work <= 1.35 * peak, (peak, said)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("ffn", [128, 384])
def test_a_score_allocates_what_is_predicted(kernels, whole, ffn):
    config = ModelConfig(dim=64, ffn_dim=ffn, num_heads=4, num_layers=4, text_dim=16, text_len=16, freq_dim=16)
    load = JointWorkload(3, 3, 16, 16, whole=whole)
    peak, said = allocated(config, load, whole, False, grad=False)[1], score_bytes(config, load)
    assert peak <= said <= 1.35 * peak, (peak, said)


def test_states_are_shared_out_and_the_actor_is_not():
    one, eight = (predict_joint(WAN, WAN, WAN, JointWorkload(), n) for n in (1, 8))
    count = 1_418_996_800
    assert parts(WAN)[0] == count
    assert (one["weights"], one["gradients"], one["optimizer"], one["ema"]) == (
        10 * count,
        8 * count,
        16 * count,
        4 * count,
    )
    assert all(eight[name] == one[name] // 8 for name in ("weights", "gradients", "optimizer", "ema"))
    assert eight["actor"] == one["actor"] == 2 * count and eight["activations"] == one["activations"]
    assert one["peak"] == sum(value for name, value in one.items() if name != "peak")


def test_the_table_is_for_both_teachers_and_checkpointing_takes_less():
    facts = report(WAN)
    assert len(facts) == 3 and all(
        list(rows) == ["1 process", "2 processes", "4 processes", "8 processes"] for rows in facts.values()
    )
    for rows in facts.values():
        assert list(rows) == ["1 process", "2 processes", "4 processes", "8 processes"]
        peaks = [row["peak"] for row in rows.values()]
        assert peaks == sorted(peaks, reverse=True)
        assert all(row["peak"] < row["peak_without_checkpointing"] for row in rows.values())
    large, mixed = (predict_joint(WAN, LARGE, critic, JointWorkload(), 8)["peak"] for critic in (LARGE, WAN))
    assert mixed < large
