"""What a model takes of a device: the predictions against what its own forwards allocate."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from dsa_engine.config import PRESETS, ModelConfig, RolloutConfig
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.kernel_types import CacheScales
from dsa_engine.models import memory_estimate
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import E4M3
from dsa_engine.models.memory_estimate import Workload, predict
from dsa_engine.models.offload import OffloadedFeatureCache
from dsa_engine.models.streaming_vae import FeatureCache
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.ops import reference
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.shapes.codec import PixelCodec
from tests.support.live_memory import Live, meta, on_meta, tensors_in

SMALL_CARD = 12 * 10**9
WAN = ModelConfig.preset("wan2.1-t2v-1.3b")


def test_live_counts_what_is_alive():
    with Live() as live:
        kept = torch.zeros(100)
        for _ in range(3):
            torch.zeros(50).add(1)
        kept[:10].add_(1)
    assert (live.peak, live.now) == (4 * 200, 4 * 100)


# ---- predictions


def dit_parameters(config: ModelConfig) -> int:
    dim, patch = config.dim, config.patch_size[1] ** 2

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    ends = linear(config.in_dim * patch, dim) + linear(dim, config.out_dim * patch) + 2 * dim
    text = linear(config.text_dim, dim) + linear(dim, dim)
    time = linear(config.freq_dim, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    attention = 4 * linear(dim, dim) + 2 * dim
    feed_forward = linear(dim, config.ffn_dim) + linear(config.ffn_dim, dim)
    return ends + text + time + config.num_layers * (2 * attention + feed_forward + 8 * dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PRESETS)
def test_weights_are_the_parameters_by_closed_forms(name, dtype):
    config = PRESETS[name]
    resident = predict(config, RolloutConfig(), Workload(dtype=dtype)).resident
    assert resident["generator"] == dtype.itemsize * dit_parameters(config)
    assert resident["confidence"] == dtype.itemsize * ((3 * config.dim + 2) * (config.dim // 2) + 1)


def test_umt5_has_the_size_that_is_said():
    with torch.device("meta"):
        model = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.encoder.block]
    assert sum(p.numel() for p in model.parameters()) == memory_estimate.UMT5_XXL.parameters
    assert max(blocks) == memory_estimate.UMT5_XXL.block


@pytest.mark.parametrize(
    "rollout, frames, spare",
    [({}, 21, 0), ({}, 6, 0), ({"window": 12, "sink": 3}, 12, 3), ({"window": 9, "sink": 2, "rope": "relative"}, 9, 3)],
)
@pytest.mark.parametrize("slots", [1, 3])
def test_the_cache_is_the_one_that_is_made(rollout, frames, spare, slots):
    sink, rope = rollout.get("sink", 0), rollout.get("rope", "absolute")
    cache = KVCache(
        30, 12, 128, 1560, frames, sink, slots, device="meta", dtype=torch.bfloat16, rope=rope, headroom=spare
    )
    moving = 0 if cache.unrotated_sink is None else cache.unrotated_sink.nbytes
    load = Workload(frames=frames, sessions=slots)
    assert predict(WAN, RolloutConfig(**rollout), load).resident["kv_cache"] == cache.k.nbytes + cache.v.nbytes + moving


def test_a_prompt_is_there_for_its_session_and_for_the_forwards():
    config = PRESETS["shapes"]
    prompt = sum(t.nbytes for t in tensors_in(on_meta(CausalDiT, config).text_kv(meta(1, 4, 64))))
    load = Workload(8, 8, sessions=3)
    estimate = predict(config, RolloutConfig(), load)
    assert estimate.resident["prompt_kv"] == (3 + 3 + 1) * prompt and estimate.transient["denoise"] > 2 * 3 * prompt


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("rollout, frames, spare", [({}, 21, 0), ({"window": 9, "sink": 2, "rope": "relative"}, 9, 3)])
def test_an_fp8_cache_is_half_of_it_and_its_scales(rollout, frames, spare, slots):
    with torch.device("meta"):
        scales = CacheScales(torch.ones(30, 12), torch.ones(30, 12))
    cache = KVCache(
        30,
        12,
        128,
        1560,
        frames,
        rollout.get("sink", 0),
        slots,
        device="meta",
        dtype=E4M3,
        headroom=spare,
        rope=rollout.get("rope", "absolute"),
        scales=scales,
    )
    whole, half = (predict(WAN, RolloutConfig(**rollout), Workload(sessions=slots, cache=t)) for t in (None, E4M3))
    assert half.resident["kv_cache"] == cache.nbytes and half.transient == whole.transient
    assert 2 * (cache.nbytes - sum(x.nbytes for x in cache.scales)) == whole.resident["kv_cache"]


@pytest.mark.parametrize("cache", [None, E4M3])
@pytest.mark.parametrize("card", memory_estimate.LARGE_GPU_SIZES_GB)
@pytest.mark.parametrize("window", memory_estimate.TABLE_WINDOWS)
def test_so_many_sessions_fit_and_not_one_more(card, window, cache):
    """Counted by the tensors of a pool on the meta device, the weights, a decode beside a forward of eight rows."""
    facts = memory_estimate.report(WAN, RolloutConfig(), Workload())
    dtype = cache or torch.bfloat16
    count = facts["sessions"][f"{card} GB, window {window}"][str(dtype).removeprefix("torch.")]
    with torch.device("meta"):
        scales = CacheScales(torch.ones(30, 12), torch.ones(30, 12))
    one = predict(WAN, RolloutConfig(), Workload())
    weights = sum(one.resident[part] for part in ("cuda_context", "generator", "confidence", "vae", "text"))
    work = one.transient["decode"] + 8 * one.transient["denoise"] // 2

    def used(slots):
        pool = KVCache(30, 12, 128, 1560, window, 0, slots, "meta", dtype, headroom=3, scales=scales if cache else None)
        inputs = ModelRunner(on_meta(CausalDiT, WAN), None, pool, 3, (60, 104), 4)
        prompts = slots * inputs.text.kv.nbytes // (slots + 1)  # each session's own, beside those of the inputs
        return weights + work + pool.nbytes + inputs.nbytes + prompts + slots * one.resident["vae_state"]

    assert used(count) <= 1.0001 * card * 10**9 < 1.0002 * used(count + 1) and count > 5


def test_fp8_weights_are_counted_as_they_are_stored():
    """A byte a weight and four an output channel in the blocks' products, but for the prompt's keys and values."""
    plain, fp8 = (predict(WAN, RolloutConfig(), Workload(linear=t)).resident["generator"] for t in (None, E4M3))
    dit, saved = on_meta(CausalDiT, WAN), 0
    for block in dit.blocks:
        own, cross = block.self_attn, block.cross_attn
        for layer in (own.q, own.k, own.v, own.o, cross.q, cross.o, block.ffn[0], block.ffn[2]):
            saved += layer.weight.numel() - 4 * layer.out_features
    assert plain - fp8 == saved


@pytest.mark.parametrize("name, height, width", [("wan2.1-t2v-1.3b", 60, 104), ("shapes", 8, 8), ("shapes", 60, 104)])
def test_a_forward_allocates_what_is_predicted(monkeypatch, name, height, width):
    """On the meta device, with attention as the kernels do it: no more memory than their result."""
    config = PRESETS[name]
    for op in ("attention", "cross_attention"):
        monkeypatch.setattr(reference, op, lambda q, *_: torch.empty_like(q))
    dit = on_meta(CausalDiT, config)
    tokens = config.tokens_per_frame(height, width)
    sizes = (config.num_layers, config.num_heads, config.head_dim, tokens, 21)
    rows = KVCache(*sizes, device="meta", dtype=torch.bfloat16).rows(torch.zeros(1, dtype=torch.long, device="meta"), 3)
    text = dit.text_kv(meta(1, config.text_len, config.text_dim))
    with torch.no_grad(), Live() as live:
        dit(meta(1, 3, 16, height, width), torch.empty(1, 3, device="meta"), rows.frames, text, rows)
    work = predict(config, RolloutConfig(), Workload(height, width)).transient["denoise"]
    predicted = work // 2 - sum(tensor.nbytes for tensor in tensors_in(text))  # of two rows, each with its prompt
    assert live.peak <= predicted <= 1.2 * live.peak, f"{live.peak:,} and predicted {predicted:,}"


class Nowhere(OffloadedFeatureCache):
    """As if the state on the CPU took no memory: on the meta device nothing can leave."""

    def _store(self, frames):
        return FeatureCache._store(self, frames).shape


@pytest.fixture
def fused(monkeypatch):
    """The ops of the VAE as the kernels run them, which is what a CUDA device does: no tensor but the result."""

    def norm_silu(x, gain, silu=True, bias=None, out=None):
        return torch.empty_like(x) if out is None else out

    monkeypatch.setattr(reference, "norm_silu", norm_silu)
    monkeypatch.setattr(reference, "bias_residual", lambda x, y, bias: torch.empty_like(x))


@pytest.mark.parametrize(
    "make, size", [(WanVAE, memory_estimate.WAN_VAE_FOOTPRINT), (TAEHV, memory_estimate.TAEHV_FOOTPRINT)]
)
def test_a_decode_allocates_what_is_predicted(fused, make, size):
    vae = on_meta(make)
    assert memory_estimate.vae_footprint(vae) == size
    latents, load = meta(1, 3, 16, 60, 104), Workload()
    with torch.no_grad():
        with Live() as first:
            _, state = vae.decode(latents)
        with Live() as later:
            vae.decode(latents, state)
    peak = max(first.peak, later.peak)
    here = predict(WAN, RolloutConfig(), load, vae=size)
    assert peak <= here.transient["decode"] <= 1.1 * peak, f"{peak:,} and predicted {here.transient['decode']:,}"
    held = sum(tensor.nbytes for tensor in state)
    assert held <= here.resident["vae_state"] <= 1.01 * held
    shapes = [tensor.shape for tensor in state]
    with torch.no_grad(), Live() as live:
        stream = Nowhere(tuple(torch.empty(0) for _ in shapes), vae.time_axis, torch.device("meta"))
        stream._state = (meta(*shape) for shape in shapes)
        vae._decode(latents[:, :1], stream)
    away = predict(WAN, RolloutConfig(), load, vae=size, offload=("text", "vae"))
    decode = away.transient["decode"] - 2 * size.parameters
    assert live.peak <= decode <= 1.1 * live.peak, f"{live.peak:,} and predicted {decode:,}"
    assert not {"vae", "vae_state"} & away.resident.keys()


def test_the_pixel_codec_is_counted_too():
    codec = on_meta(PixelCodec)
    with torch.no_grad(), Live() as live:
        codec.decode(meta(1, 3, 16, 8, 8))
    size = memory_estimate.vae_footprint(codec)
    work = predict(PRESETS["shapes"], RolloutConfig(), Workload(8, 8), vae=size).transient["decode"]
    assert size == memory_estimate.PIXEL_CODEC_FOOTPRINT and live.peak <= work <= 1.1 * live.peak


def test_a_narrower_vae_takes_as_much_less(fused):
    vae, latents = on_meta(WanVAE, dim=24), meta(1, 3, 16, 60, 104)
    with torch.no_grad():
        _, state = vae.decode(latents)
        with Live() as live:
            vae.decode(latents, state)
    work = predict(WAN, RolloutConfig(), Workload(), vae=memory_estimate.vae_footprint(vae)).transient["decode"]
    assert live.peak <= work <= 1.2 * live.peak
    assert memory_estimate.vae_footprint(nn.Linear(3, 4)) == memory_estimate.VAEFootprint("Linear", 16)


def test_1_3b_runs_on_a_12_gb_card():
    """A window of all 21 latent frames in bfloat16: with Wan's VAE offloaded, with TAEHV where it is."""
    peaks = {name: predict(WAN, RolloutConfig(), Workload(), offload=name) for name in memory_estimate.PLACEMENTS}
    held = peaks["text", "vae"].resident
    assert (held["generator"], held["kv_cache"]) == (2 * 1_418_996_800, 2 * 30 * 21 * 1560 * 1536 * 2)
    assert peaks["text", "vae"].peak < SMALL_CARD < peaks["text",].peak
    assert peaks[()].peak - peaks["text",].peak == 2 * 5_680_910_336
    assert (
        predict(WAN, RolloutConfig(), Workload(), vae=memory_estimate.TAEHV_FOOTPRINT, offload=("text",)).peak
        < SMALL_CARD
    )
    assert predict(WAN, RolloutConfig(), Workload(sessions=4), offload=("text", "vae")).peak > SMALL_CARD
    fits = memory_estimate.report(WAN, RolloutConfig(), Workload())["fits"]
    assert fits["12 GB"] == "offload text,vae" and fits["8 GB"] is None and fits["80 GB"] == "offload nothing"


@given(
    st.sampled_from(memory_estimate.PLACEMENTS),
    st.integers(3, 30),
    st.integers(1, 4),
    st.sampled_from(
        [
            memory_estimate.WAN_VAE_FOOTPRINT,
            memory_estimate.TAEHV_FOOTPRINT,
            memory_estimate.PIXEL_CODEC_FOOTPRINT,
            None,
        ]
    ),
    st.sampled_from([memory_estimate.UMT5_XXL, None]),
)
def test_more_takes_more_and_offloading_takes_less(offload, window, sessions, codec, text):
    def peak(window=window, sessions=sessions, offload=offload):
        load = Workload(sessions=sessions)
        return predict(WAN, RolloutConfig(window=window), load, vae=codec, text=text, offload=offload).peak

    assert peak() < peak(window=window + 1) and peak() < peak(sessions=sessions + 1)
    assert peak() <= peak(offload=offload[:-1])


def test_a_report_is_for_json_and_for_people():
    facts = memory_estimate.report(
        WAN, RolloutConfig(window=12, sink=3), Workload(), vae=memory_estimate.TAEHV_FOOTPRINT, text=None
    )
    assert "12 latent frames, bfloat16, 1 session, TAEHV" in facts["for"] and "text" not in facts["held"]
    assert facts["peak"]["offload nothing"] == sum(facts["held"].values()) + sum(facts["work"].values())
    assert memory_estimate.format_bytes(facts)["held"]["generator"] == "2.84 GB" and memory_estimate.format_bytes(
        {"a": [None, 5]}
    ) == {"a": [None, 5]}
    assert memory_estimate.format_bytes({"a": None, "b": 123_456}) == {"a": None, "b": "0.12 MB"}


# ---- what is there


def test_what_is_measured_is_what_is_there():
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    tied.append(tied[0])
    parts = {"generator": tied, "vae": on_meta(PixelCodec), "text": None}
    facts = memory_estimate.measure(parts)
    batch_norm = 3 * 4 + 3 * 4 + 8  # mean, variance, and an int64 count
    assert facts["weights"] == {
        "generator": {"cpu": 9 * 4 + batch_norm},
        "vae": {"unread": memory_estimate.module_bytes(parts["vae"])},
    }
    assert (
        memory_estimate.module_bytes(parts["vae"]) > 2 * memory_estimate.PIXEL_CODEC_FOOTPRINT.parameters
        and "device" not in facts
    )
    assert 10**7 < facts["process"] <= facts["process_peak"] < 10**12


def test_memory_that_is_touched_is_resident():
    before = memory_estimate.process_memory()
    block = torch.ones(50_000_000)
    assert 0.8 * block.nbytes < memory_estimate.process_memory() - before < 1.5 * block.nbytes
    assert memory_estimate.process_memory_peak() >= before + 0.8 * block.nbytes


def test_sizes_are_those_of_the_parts():
    codec, text = PixelCodec(), nn.Linear(2, 3)
    sizes = memory_estimate.footprints({"generator": nn.Linear(3, 4), "confidence": None, "vae": codec, "text": text})
    assert sizes == {
        "vae": memory_estimate.PIXEL_CODEC_FOOTPRINT,
        "text": None,
        "weights": {"generator": 64, "confidence": 0, "vae": memory_estimate.module_bytes(codec), "text": 36},
    }
    held = predict(PRESETS["shapes"], RolloutConfig(), Workload(8, 8), offload=("text", "vae"), **sizes).resident
    assert held["text"] == 36 and held["generator"] == 64 and not {"vae", "confidence"} & held.keys()


# ---- choosing


def test_the_first_placement_that_fits_is_chosen_and_said(caplog):
    peaks = {(): 30, ("text",): 20, ("text", "vae"): 10}
    with caplog.at_level(logging.INFO, logger=memory_estimate.__name__):
        assert [memory_estimate.pick_offload(peaks, room) for room in (30, 29, 20, 19, 10)] == [
            (),
            ("text",),
            ("text",),
            ("text", "vae"),
            ("text", "vae"),
        ]
        assert {record.levelname for record in caplog.records} == {"INFO"} and "offload text,vae: " in caplog.text
        assert memory_estimate.pick_offload(peaks, 9) == ("text", "vae")
    assert caplog.records[-1].levelname == "WARNING" and "memory may run out; a smaller window" in caplog.text


def test_what_a_cuda_device_has_left_counts_the_allocators_own(monkeypatch):
    for name, value in {"mem_get_info": (100, 500), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory_estimate.free_bytes(torch.device("cuda")) == 140


def test_placements_are_told_by_their_names():
    assert memory_estimate.parse_offload(None) == memory_estimate.parse_offload(()) == ()
    assert memory_estimate.parse_offload("text") == memory_estimate.parse_offload(["text"]) == ("text",)
    assert memory_estimate.parse_offload("text, vae") == ("text", "vae")
    for wrong in ("dit", "text,", ["vae", "codec"], ""):
        with pytest.raises(ValueError, match="must be 'auto', None, or of text, vae; the DiT stays"):
            memory_estimate.parse_offload(wrong)
