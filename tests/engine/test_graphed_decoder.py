"""A decoder over buffers of its own gives the codec's bits, eager or captured, whatever streams take turns in it."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine import Fixed
from dsa_engine.config import RolloutConfig
from dsa_engine.engine import engine as engine_module
from dsa_engine.engine import graphed_decoder as module
from dsa_engine.engine.engine import Engine
from dsa_engine.engine.graphed_decoder import BorrowedState, GraphedDecoder
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.pipeline import Pipeline
from dsa_engine.shapes.codec import PixelCodec
from tests.support.cuda_stand_in import Cuda

CHUNK = (1, 3, 3, 2, 3)  # of latents
PATCHED = ("Stream", "current_stream", "stream", "CUDAGraph", "graph", "graph_pool_handle")


class Patched:
    """`Cuda` in torch's place while capturing; its streams wait for each other."""

    def __init__(self):
        self.cuda = Cuda()

    def capture(self, decoder, **options):
        with pytest.MonkeyPatch.context() as patch:
            for name in PATCHED:
                patch.setattr(torch.cuda, name, getattr(self.cuda, name))
            current = self.cuda.current_stream
            waiting = SimpleNamespace(wait_stream=lambda other: self.cuda.log.append(f"main waits for {other.name}"))
            both = lambda device=None: SimpleNamespace(**vars(current()), **vars(waiting))  # noqa: E731
            patch.setattr(torch.cuda, "current_stream", both)
            return decoder.capture(**options)


def small(kind):
    torch.manual_seed(3)
    if kind == "wan":
        vae = WanVAE(
            dim=4,
            latent_channels=3,
            multipliers=(1, 2, 2),
            time_down=(True, True),
            mean=(0.5, -1.0, 0.1),
            std=(2.0, 1.5, 0.7),
        )
    else:
        vae = TAEHV(widths=(4, 4, 4, 4), latent_channels=3)
    for parameter in vae.requires_grad_(False).eval().parameters():
        parameter.normal_(std=0.2)
    return vae


@pytest.fixture(scope="module", params=["wan", "tiny"])
def codec(request):
    return small(request.param)


@pytest.fixture(scope="module", params=["eager", "captured"])
def decoder(codec, request):
    made = GraphedDecoder(codec, CHUNK)
    if request.param == "captured":
        made.cuda = Patched()
        made.cuda.capture(made)
    return made


def latents(seed, frames=3, rows=1):
    return torch.randn(rows, frames, *CHUNK[2:], generator=torch.Generator().manual_seed(seed))


def tensors(state):
    return state if isinstance(state, tuple) else copy.deepcopy(state)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(("next", "again", "copy", "odd", "drop"))), max_size=14))
def test_streams_that_take_turns_get_the_codecs_bits(codec, decoder, turns):
    """Each goes on, decodes a chunk twice, moves to a copy of its state, decodes a chunk of another length, or ends."""
    mine, theirs = {}, {}
    for number, (stream, what) in enumerate(turns):
        past, expected_past = mine.get(stream), theirs.get(stream)
        if what == "drop":
            mine.pop(stream, None), theirs.pop(stream, None)
            continue
        if what == "copy" and past is not None:
            past = copy.deepcopy(past)
            assert isinstance(past, tuple) and all(map(torch.equal, past, expected_past))
        chunk = latents(number, frames=1 if what == "odd" else 3)
        with torch.inference_mode():
            expected, theirs[stream] = codec.decode(chunk, expected_past)
        for _ in range(1 + (what == "again")):
            frames, mine[stream] = decoder.decode(chunk, past)
            assert torch.equal(frames, expected)
    for stream, state in mine.items():
        assert all(map(torch.equal, tensors(state), theirs[stream]))


def test_a_stream_alone_stays_where_it_is(decoder, monkeypatch):
    """No state is copied from its second chunk on, and results of before are not written again."""
    _, state = decoder.decode(latents(0), None)
    frames, state = decoder.decode(latents(1), state)
    kept = frames.clone()
    monkeypatch.setattr(decoder, "_evict", lambda buffer: None if decoder._owner(buffer) is None else 1 / 0)
    buffers = []
    for number in range(2, 6):
        buffers.append(state.buffer)
        _, state = decoder.decode(latents(number), state)
        assert isinstance(state, BorrowedState) and state.own is None
    assert buffers in ([0, 1, 0, 1], [1, 0, 1, 0]) and torch.equal(frames, kept)


def test_a_state_survives_what_comes_after_it(codec, decoder):
    """Three chunks on, and capturing anew: both buffers were written since."""
    _, first = decoder.decode(latents(0), None)
    _, second = decoder.decode(latents(1), first)
    expected = codec.decode(latents(2), codec.decode(latents(1), tensors(first))[1])[0]
    state = second
    for number in range(2, 5):
        _, state = decoder.decode(latents(number), state)
    assert second.own is not None and torch.equal(decoder.decode(latents(2), second)[0], expected)
    _, state = decoder.decode(latents(3), second)
    copied = copy.deepcopy(state)
    before = [tail.clone() for tail in copied]
    if hasattr(decoder, "cuda"):  # what lies in either buffer, too, when it is captured anew
        _, later = decoder.decode(latents(4), state)
        assert {state.buffer, later.buffer} == {0, 1}
        after = copy.deepcopy(later)
        decoder.cuda.capture(decoder)
        assert all(map(torch.equal, copy.deepcopy(state), before)) and all(
            map(torch.equal, copy.deepcopy(later), after)
        )
    for number in range(2):
        _, state = decoder.decode(latents(number), state)
    assert all(map(torch.equal, copied, before))


def test_a_state_of_another_shape_is_refused_by_the_codec(codec, decoder):
    _, wide = codec.decode(torch.randn(1, 3, 3, 2, 4))
    _, two = codec.decode(latents(0, rows=2))
    for state in (wide, two, codec.decode(latents(0))[1][:-1]):
        with pytest.raises(ValueError, match="state holds"):
            decoder.decode(latents(0), state)
    with pytest.raises(ValueError, match="latents of shape"):
        decoder.decode(torch.zeros(1, 3, 4, 2, 3), None)


def test_a_capture_is_launched_once_a_chunk_and_tells_torch_nothing(codec):
    patched, decoder = Patched(), GraphedDecoder(codec, CHUNK)
    before, seen = torch.backends.cudnn.benchmark, []
    step = decoder._step
    decoder._step = lambda source: (seen.append((source, torch.backends.cudnn.benchmark)), step(source))[1]
    for tune in (True, False):
        patched.cuda.log.clear()
        assert patched.capture(decoder, tune=tune) >= 0
        assert patched.cuda.log == [
            "side waits for main",
            *["capture in pool on side, thread_local"] * 3,
            "main waits for side",
        ]
    assert seen == [(source, tune) for tune in (True, False) for source in (0, None, 0, 1, None)]
    assert torch.backends.cudnn.benchmark == before
    _, state = decoder.decode(latents(0), None)
    for number in range(3):
        _, state = decoder.decode(latents(number), state)
    assert patched.cuda.launches == 4  # the first chunk of a clip too


def test_it_is_a_codec(codec, decoder):
    assert (decoder.spatial_stride, decoder.temporal_stride, decoder.latent_channels) == (
        codec.spatial_stride,
        codec.temporal_stride,
        3,
    )
    assert decoder.frames_of(3, True) == codec.frames_of(3, True) and decoder.latent_frames_of(9) == 3
    frames = torch.rand(1, 5, 3, 8, 16)
    assert torch.equal(decoder.encode(frames), codec.encode(frames))
    with pytest.raises(ValueError, match="codec PixelCodec: must be a StreamingVAE"):
        GraphedDecoder(PixelCodec(), CHUNK)


# ---- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tiny_dit):
    vae = WanVAE(dim=2)
    for parameter in vae.requires_grad_(False).eval().parameters():
        parameter.normal_(std=0.3)
    engine = Engine(tiny_dit, None, vae, None, RolloutConfig(window=9, sink=0))
    return Pipeline(engine, name="random", height=16, width=16, frames=21, fps=16.0)


def streamed(pipe, chunks=4):
    embeds = torch.ones(1, 2, pipe.engine.dit.config.text_dim)
    options = {"prompt_embeds": embeds, "height": 16, "width": 16, "step_policy": Fixed(1)}
    with pipe.session(seed=1, **options) as a, pipe.session(seed=2, **options) as b:
        frames = [a.next_chunk().frames]
        taken = a.snapshot()
        for _ in range(chunks - 1):
            frames += [a.next_chunk().frames, b.next_chunk().frames]
        a.restore(taken)
        frames += [a.next_chunk().frames, b.next_chunk().frames, a.next_chunk().frames]
        taken = a.snapshot()  # of a state in the buffers
        frames += [a.next_chunk().frames]
        a.restore(taken)
        frames += [a.next_chunk().frames]
    frames += [chunk.frames for chunk in pipe.session(seed=3, num_frames=33, **options).chunks()]
    return frames


def test_sessions_on_it_give_the_same_frames(pipe, monkeypatch):
    expected = streamed(pipe)
    monkeypatch.setattr(GraphedDecoder, "capture", lambda decoder, tune, stream: 0.5)
    monkeypatch.setattr(engine_module, "why_not_captured", lambda codec, shape: None)
    shape = pipe.engine._chunk(2, 2, pipe.config)
    assert shape == (1, 3, 16, 2, 2)
    assert pipe.engine._capture_decoder(shape) == 0.5 and pipe.engine._capture_decoder(shape) == 0
    used = []
    decode = GraphedDecoder.decode
    monkeypatch.setattr(GraphedDecoder, "decode", lambda *args: used.append(decode(*args)) or used[-1])
    found = streamed(pipe)
    assert len(found) == len(expected) and all(map(np.array_equal, found, expected))
    assert sum(isinstance(state, BorrowedState) for _, state in used) >= 10
    pipe.close()
    assert pipe.engine._decoders == {}


def test_a_closed_session_leaves_no_state_behind(pipe, monkeypatch):
    monkeypatch.setattr(GraphedDecoder, "capture", lambda decoder, tune, stream: 0.0)
    monkeypatch.setattr(engine_module, "why_not_captured", lambda codec, shape: None)
    pipe.engine._capture_decoder((1, 3, 16, 2, 2))
    embeds = torch.ones(1, 2, pipe.engine.dit.config.text_dim)
    session = pipe.session(prompt_embeds=embeds, step_policy=Fixed(1))
    for _ in range(3):
        session.next_chunk()
    (decoder,) = pipe.engine._decoders.values()
    assert [decoder._owner(i) is None for i in (0, 1)].count(False) == 1
    session.close()
    assert decoder._owner(0) is None and decoder._owner(1) is None


def test_what_does_not_fit_is_not_captured_and_said(pipe, monkeypatch, caplog):
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        assert pipe.engine._capture_decoder((1, 3, 16, 60, 104)) == 0
    (text,) = caplog.messages
    assert text.startswith("the decoder was not captured, its chunks are launched op by op: it would take ")
    assert pipe.engine._decoders == {}
    pipe.engine.decoder = PixelCodec()
    assert pipe.engine._capture_decoder((1, 3, 16, 60, 104)) == 0


def test_the_room_it_asks_for_is_that_of_its_buffers_and_its_work(monkeypatch):
    vae = WanVAE(dim=96).to("meta", torch.bfloat16)
    asked = []
    monkeypatch.setattr(module, "free_bytes", lambda device: asked.append(device) or 0)
    why = module.why_not_captured(vae, (1, 3, 16, 60, 104))
    gigabytes = float(why.split("would take ")[1].split(" GB")[0])
    assert gigabytes == pytest.approx(2 * 1.89 + 4.2, abs=0.15)  # two states, and what lives during a pass


# ---- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["wan", "tiny"])
def test_replays_on_a_gpu(kind):
    """In bfloat16, at channels that every kernel takes: the eager bits without tuning, with it what rounding leaves."""
    torch.manual_seed(0)
    codec = WanVAE(dim=32) if kind == "wan" else TAEHV()
    codec = codec.to("cuda", torch.bfloat16).requires_grad_(False).eval()
    chunks = torch.randn(6, 1, 3, 16, 16, 24, device="cuda", dtype=torch.bfloat16)
    plain = GraphedDecoder(codec, chunks[0].shape)
    for tune, tolerance in ((False, 0.0), (True, 0.05)):
        captured, a, b = GraphedDecoder(codec, chunks[0].shape), None, None
        captured.capture(tune=tune)
        for chunk in chunks:
            (expected, a), (frames, b) = plain.decode(chunk, a), captured.decode(chunk, b)
            torch.testing.assert_close(frames, expected, rtol=0, atol=tolerance)
