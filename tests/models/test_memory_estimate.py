"""What a model takes of a device: the predictions against what its own forwards allocate, and parts that are offloaded
against the same parts that are not."""

from __future__ import annotations

import copy
import logging
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from dsa_engine.config import PRESETS, ModelConfig, RolloutConfig
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.kernel_types import CacheScales
from dsa_engine.models import memory_estimate
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import E4M3
from dsa_engine.models.memory_estimate import Workload, predict
from dsa_engine.models.offload import HomeStream, Loan, Offloaded, lend
from dsa_engine.models.streaming_vae import Stream
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.ops import reference
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.shapes.codec import PixelCodec

SMALL_CARD = 12 * 10**9
WAN = ModelConfig.preset("wan2.1-t2v-1.3b")


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that a computation makes and keeps alive, at their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor, 0)  # it was there before
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self._see(tensor, tensor.untyped_storage().nbytes())
        return out

    def _see(self, tensor, count):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = weakref.finalize(storage, self._forget, storage._cdata, count)
            self.now += count
            self.peak = max(self.peak, self.now)

    def _forget(self, key, count):
        del self._known[key]
        self.now -= count


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def on_meta(make, *args, **options):
    with torch.device("meta"):
        return make(*args, **options).to("meta", torch.bfloat16).requires_grad_(False).eval()


def meta(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def test_live_counts_what_is_alive():
    with Live() as live:
        kept = torch.zeros(100)
        for _ in range(3):
            torch.zeros(50).add(1)
        kept[:10].add_(1)
    assert (live.peak, live.now) == (4 * 200, 4 * 100)


# ---- predictions


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_are_those_of_the_modules(name):
    config = PRESETS[name]
    for make, count in ((CausalDiT, memory_estimate.dit_parameters), (ConfidenceHead, memory_estimate.head_parameters)):
        assert count(config) == sum(p.numel() for p in on_meta(make, config).parameters())


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
    cache = KVCache(30, 12, 128, 1560, frames, sink, slots, device="meta", dtype=torch.bfloat16, rope=rope, headroom=spare)
    moving = 0 if cache.unrotated_sink is None else cache.unrotated_sink.nbytes
    load = Workload(frames=frames, sessions=slots)
    assert predict(WAN, RolloutConfig(**rollout), load).held["kv_cache"] == cache.k.nbytes + cache.v.nbytes + moving


def test_a_prompt_is_there_for_its_session_and_for_the_forwards():
    config = PRESETS["shapes"]
    prompt = sum(t.nbytes for t in tensors_in(on_meta(CausalDiT, config).text_kv(meta(1, 4, 64))))
    load = Workload(8, 8, sessions=3)
    estimate = predict(config, RolloutConfig(), load)
    assert estimate.held["prompt_kv"] == (3 + 3 + 1) * prompt and estimate.work["denoise"] > 2 * 3 * prompt


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
    assert half.held["kv_cache"] == cache.nbytes and half.work == whole.work
    assert 2 * (cache.nbytes - sum(x.nbytes for x in cache.scales)) == whole.held["kv_cache"]


@pytest.mark.parametrize("cache", [None, E4M3])
@pytest.mark.parametrize("card", memory_estimate.BIG_CARDS)
@pytest.mark.parametrize("window", memory_estimate.WINDOWS)
def test_so_many_sessions_fit_and_not_one_more(card, window, cache):
    """Counted by the tensors of a pool on the meta device, the weights, a decode beside a forward of eight rows."""
    facts = memory_estimate.report(WAN, RolloutConfig(), Workload())
    dtype = cache or torch.bfloat16
    count = facts["sessions"][f"{card} GB, window {window}"][str(dtype).removeprefix("torch.")]
    with torch.device("meta"):
        scales = CacheScales(torch.ones(30, 12), torch.ones(30, 12))
    one = predict(WAN, RolloutConfig(), Workload())
    weights = sum(one.held[part] for part in ("cuda_context", "generator", "confidence", "vae", "text"))
    work = one.work["decode"] + 8 * one.work["denoise"] // 2

    def used(slots):
        pool = KVCache(30, 12, 128, 1560, window, 0, slots, "meta", dtype, headroom=3, scales=scales if cache else None)
        inputs = ModelRunner(on_meta(CausalDiT, WAN), None, pool, 3, (60, 104), 4)
        prompts = slots * inputs.text.kv.nbytes // (slots + 1)  # each session's own, beside those of the inputs
        return weights + work + pool.nbytes + inputs.nbytes + prompts + slots * one.held["vae_state"]

    assert used(count) <= 1.0001 * card * 10**9 < 1.0002 * used(count + 1) and count > 5


def test_fp8_weights_are_counted_as_they_are_stored():
    """A byte a weight and four an output channel in the blocks' products, but for the prompt's keys and values."""
    plain, fp8 = (predict(WAN, RolloutConfig(), Workload(linear=t)).held["generator"] for t in (None, E4M3))
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
    work = predict(config, RolloutConfig(), Workload(height, width)).work["denoise"]
    predicted = work // 2 - sum(tensor.nbytes for tensor in tensors_in(text))  # of two rows, each with its prompt
    assert live.peak <= predicted <= 1.2 * live.peak, f"{live.peak:,} and predicted {predicted:,}"


class Nowhere(HomeStream):
    """As if the home of the tails took no memory: on the meta device nothing can leave."""

    def _kept(self, tail):
        return Stream._kept(self, tail).shape


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
    assert memory_estimate.codec_of(vae) == size
    latents, load = meta(1, 3, 16, 60, 104), Workload()
    with torch.no_grad():
        with Live() as first:
            _, state = vae.decode(latents)
        with Live() as later:
            vae.decode(latents, state)
    peak = max(first.peak, later.peak)
    here = predict(WAN, RolloutConfig(), load, codec=size)
    assert peak <= here.work["decode"] <= 1.1 * peak, f"{peak:,} and predicted {here.work['decode']:,}"
    held = sum(tensor.nbytes for tensor in state)
    assert held <= here.held["vae_state"] <= 1.01 * held
    shapes = [tensor.shape for tensor in state]
    with torch.no_grad(), Live() as live:
        stream = Nowhere(tuple(torch.empty(0) for _ in shapes), vae.time_axis, torch.device("meta"))
        stream._past = (meta(*shape) for shape in shapes)
        vae._decode(latents[:, :1], stream)
    away = predict(WAN, RolloutConfig(), load, codec=size, offload=("text", "vae"))
    decode = away.work["decode"] - 2 * size.parameters
    assert live.peak <= decode <= 1.1 * live.peak, f"{live.peak:,} and predicted {decode:,}"
    assert not {"vae", "vae_state"} & away.held.keys()


def test_the_pixel_codec_is_counted_too():
    codec = on_meta(PixelCodec)
    with torch.no_grad(), Live() as live:
        codec.decode(meta(1, 3, 16, 8, 8))
    size = memory_estimate.codec_of(codec)
    work = predict(PRESETS["shapes"], RolloutConfig(), Workload(8, 8), codec=size).work["decode"]
    assert size == memory_estimate.PIXEL_CODEC_FOOTPRINT and live.peak <= work <= 1.1 * live.peak


def test_a_narrower_vae_takes_as_much_less(fused):
    vae, latents = on_meta(WanVAE, dim=24), meta(1, 3, 16, 60, 104)
    with torch.no_grad():
        _, state = vae.decode(latents)
        with Live() as live:
            vae.decode(latents, state)
    work = predict(WAN, RolloutConfig(), Workload(), codec=memory_estimate.codec_of(vae)).work["decode"]
    assert live.peak <= work <= 1.2 * live.peak
    assert memory_estimate.codec_of(nn.Linear(3, 4)) == memory_estimate.Codec("Linear", 16)


def test_1_3b_runs_on_a_12_gb_card():
    """A window of all 21 latent frames in bfloat16: with Wan's VAE offloaded, with TAEHV where it is."""
    peaks = {name: predict(WAN, RolloutConfig(), Workload(), offload=name) for name in memory_estimate.PLACEMENTS}
    held = peaks["text", "vae"].held
    assert (held["generator"], held["kv_cache"]) == (2 * 1_418_996_800, 2 * 30 * 21 * 1560 * 1536 * 2)
    assert peaks["text", "vae"].peak < SMALL_CARD < peaks["text",].peak
    assert peaks[()].peak - peaks["text",].peak == 2 * 5_680_910_336
    assert (
        predict(WAN, RolloutConfig(), Workload(), codec=memory_estimate.TAEHV_FOOTPRINT, offload=("text",)).peak
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
        return predict(WAN, RolloutConfig(window=window), load, codec=codec, text=text, offload=offload).peak

    assert peak() < peak(window=window + 1) and peak() < peak(sessions=sessions + 1)
    assert peak() <= peak(offload=offload[:-1])


def test_a_report_is_for_json_and_for_people():
    facts = memory_estimate.report(
        WAN, RolloutConfig(window=12, sink=3), Workload(), codec=memory_estimate.TAEHV_FOOTPRINT, text=None
    )
    assert "12 latent frames, bfloat16, 1 session, TAEHV" in facts["for"] and "text" not in facts["held"]
    assert facts["peak"]["offload nothing"] == sum(facts["held"].values()) + sum(facts["work"].values())
    assert memory_estimate.shown(facts)["held"]["generator"] == "2.84 GB" and memory_estimate.shown(
        {"a": [None, 5]}
    ) == {"a": [None, 5]}
    assert memory_estimate.shown({"a": None, "b": 123_456}) == {"a": None, "b": "0.12 MB"}


# ---- what is there


def test_what_is_measured_is_what_is_there():
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    tied.append(tied[0])
    parts = {"generator": tied, "vae": on_meta(PixelCodec), "text": None}
    facts = memory_estimate.measure(parts)
    batch_norm = 3 * 4 + 3 * 4 + 8  # mean, variance, and an int64 count
    assert facts["weights"] == {
        "generator": {"cpu": 9 * 4 + batch_norm},
        "vae": {"unread": memory_estimate.part_bytes(parts["vae"])},
    }
    assert (
        memory_estimate.part_bytes(parts["vae"]) > 2 * memory_estimate.PIXEL_CODEC_FOOTPRINT.parameters
        and "device" not in facts
    )
    assert 10**7 < facts["process"] <= facts["process_peak"] < 10**12


def test_memory_that_is_touched_is_resident():
    before = memory_estimate.resident()
    block = torch.ones(50_000_000)
    assert 0.8 * block.nbytes < memory_estimate.resident() - before < 1.5 * block.nbytes
    assert memory_estimate.resident_peak() >= before + 0.8 * block.nbytes


def test_sizes_are_those_of_the_parts():
    codec, text = PixelCodec(), nn.Linear(2, 3)
    sizes = memory_estimate.sizes_of({"generator": nn.Linear(3, 4), "confidence": None, "vae": codec, "text": text})
    assert sizes == {
        "codec": memory_estimate.PIXEL_CODEC_FOOTPRINT,
        "text": None,
        "weights": {"generator": 64, "confidence": 0, "vae": memory_estimate.part_bytes(codec), "text": 36},
    }
    held = predict(PRESETS["shapes"], RolloutConfig(), Workload(8, 8), offload=("text", "vae"), **sizes).held
    assert held["text"] == 36 and held["generator"] == 64 and not {"vae", "confidence"} & held.keys()


# ---- choosing


def test_the_first_placement_that_fits_is_chosen_and_said(caplog):
    peaks = {(): 30, ("text",): 20, ("text", "vae"): 10}
    with caplog.at_level(logging.INFO, logger=memory_estimate.__name__):
        assert [memory_estimate.choose(peaks, room) for room in (30, 29, 20, 19, 10)] == [
            (),
            ("text",),
            ("text",),
            ("text", "vae"),
            ("text", "vae"),
        ]
        assert {record.levelname for record in caplog.records} == {"INFO"} and "offload text,vae: " in caplog.text
        assert memory_estimate.choose(peaks, 9) == ("text", "vae")
    assert caplog.records[-1].levelname == "WARNING" and "memory may run out; a smaller window" in caplog.text


def test_what_a_cuda_device_has_left_counts_the_allocators_own(monkeypatch):
    for name, value in {"mem_get_info": (100, 500), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory_estimate.room(torch.device("cuda")) == 140


def test_placements_are_told_by_their_names():
    assert memory_estimate.placement_of(None) == memory_estimate.placement_of(()) == ()
    assert memory_estimate.placement_of("text") == memory_estimate.placement_of(["text"]) == ("text",)
    assert memory_estimate.placement_of("text, vae") == ("text", "vae")
    for wrong in ("dit", "text,", ["vae", "codec"], ""):
        with pytest.raises(ValueError, match="must be 'auto', None, or of text, vae; the DiT stays"):
            memory_estimate.placement_of(wrong)


# ---- weights on loan; the meta device stands for one that is far away


class Codec(nn.Module):
    """Notes where its weights are when it is called, and fails on demand."""

    spatial_stride = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tied = self.layer
        self.register_buffer("mean", torch.ones(3), persistent=False)
        self.seen = []

    def note(self, x, state=None):
        self.seen.append([str(t.device) for t in (self.layer.weight, self.tied.bias, self.mean, x)])
        if state == "fail":
            raise RuntimeError("no memory")
        return self.layer(x) + self.mean, state

    def decode(self, latents, state=None):
        return self.note(latents, state)

    def encode(self, frames):
        return self.note(frames)[0]

    def forward(self, x, *rest, scale=None):
        return self.note(x, *rest)[0] * (1 if scale is None else scale)


def test_weights_are_on_the_device_for_a_call_and_at_home_after_it():
    codec = Codec()
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    away = Offloaded(codec, "meta")
    home = [codec.layer.weight, codec.layer.bias, codec.mean]
    for call in (away.decode, away.encode):
        call(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="no memory"):
        away.decode(torch.zeros(2, 3), "fail")
    assert codec.seen == [["meta"] * 4] * 3
    assert all(a is b for a, b in zip(home, [codec.layer.weight, codec.layer.bias, codec.mean]))
    assert codec.tied.weight is codec.layer.weight and not codec.layer.weight.requires_grad
    assert all(codec.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert away.spatial_stride == 4 and sum(p.numel() for p in away.parameters()) == 12
    with pytest.raises(AttributeError, match="nothing"):
        away.nothing  # noqa: B018


def test_what_is_shared_is_moved_once():
    codec, moves = Codec(), []
    loan = Loan(codec, "meta")
    with Live() as live, loan:
        moves.append(codec.tied.weight is codec.layer.weight)
        assert live.now == (9 + 3 + 3) * 4
    assert moves == [True] and codec.layer.weight.device.type == "cpu"


def test_a_lent_module_takes_its_arguments_along():
    codec = Codec()
    lend(codec, "meta")
    out = codec(torch.zeros(2, 3), None, scale=torch.ones(3))
    assert out.is_meta and codec.seen == [["meta"] * 4] and codec.layer.weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match="no memory"):
        codec(torch.zeros(2, 3), "fail")
    assert codec.layer.weight.device.type == codec.mean.device.type == "cpu"


def test_a_loan_under_inference_mode_leaves_usable_weights():
    codec = Codec()
    away = Offloaded(codec, "cpu")
    with torch.inference_mode():
        away.decode(torch.zeros(2, 3))
    assert not codec.layer.weight.is_inference()
    codec(torch.ones(2, 3, requires_grad=True)).sum().backward()


def random_weights(vae):
    for parameter in vae.requires_grad_(False).eval().parameters():
        parameter.normal_(std=0.15)
    return vae


VAES = {
    "wan": lambda: WanVAE(
        dim=4,
        latent_channels=3,
        multipliers=(1, 2, 2),
        time_down=(True, True),
        mean=(0.5, -1.0, 0.1),
        std=(2.0, 1.5, 0.7),
    ),
    "taehv": lambda: TAEHV(widths=(8, 6, 5, 4), latent_channels=3),
    "pixels": PixelCodec,
}


@pytest.mark.parametrize("name", VAES)
def test_an_offloaded_decoder_gives_the_same_frames(name, close):
    codec = random_weights(VAES[name]())
    away = Offloaded(copy.deepcopy(codec), "cpu")
    latents = torch.randn(2, 7, codec.latent_channels, 3, 2)
    state = kept = None
    expected_state = None
    for part in latents.split((3, 3, 1), dim=1):
        kept = state
        expected, expected_state = codec.decode(part, expected_state)
        frames, state = away.decode(part, kept)
        close(frames, expected, 1e-5)
        assert away.decode(part, kept)[0].equal(frames)  # the state given is as it was
        if name == "pixels":
            continue
        assert all(tensor.device.type == "cpu" for tensor in state) and len(state) == len(expected_state)
        for ours, theirs in zip(copy.deepcopy(state), expected_state):
            close(ours, theirs, 1e-5)
    clip = torch.rand(1, 9, 3, 16, 16)
    assert away.encode(clip).equal(codec.encode(clip))
    assert away.frames_of(3, True) == codec.frames_of(3, True) and away.latent_channels == codec.latent_channels
    with pytest.raises(ValueError, match="latents of shape"):
        away.decode(latents[:, :, :2])
    with pytest.raises(ValueError, match="state holds|latents of shape"):
        away.decode(latents[:1], state) if name != "pixels" else away.decode(latents[0], state)


def test_the_wrapper_is_seen_through():
    away = Offloaded(TAEHV(widths=(8, 6, 5, 4)), "cpu")
    assert (
        memory_estimate.codec_of(away) == memory_estimate.codec_of(away.codec)
        and memory_estimate.codec_of(away).name == "TAEHV"
    )
    assert memory_estimate.part_bytes(away) == memory_estimate.part_bytes(away.codec)
