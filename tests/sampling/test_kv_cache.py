"""The ring cache against a cache that keeps every frame for ever and slices what the window would hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine.sampling.kv_cache import KVCache

TOKENS, HEADS, HEAD_DIM, EPS = 2, 2, 4, 1e-6
WIDTH = HEADS * HEAD_DIM
THETA = 6.25  # with two pairs, both of the time axis: 1 and 0.4 radians a frame
GAINS = (torch.linspace(0.5, 1.5, WIDTH), torch.linspace(-1.0, 2.0, WIDTH))


def angles(frames):
    """frames [B, F] -> [B, F * S, D / 2]: a rotation that tells positions and pairs apart."""
    return (frames[..., None] * torch.tensor([1.0, 0.4])).repeat_interleave(TOKENS, dim=1)


def attend(rows, qkv, layer=0):
    a = angles(rows.frames)
    return rows.attend(layer, *qkv, GAINS, (a.cos(), a.sin()), EPS)


class KeepsEverything:
    """One session: all committed keys and values, rotated at the positions that this class counts itself."""

    def __init__(self, window: int, sink: int):
        self.window, self.sink = window, sink
        self.k, self.v = torch.empty(2, 0, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64)

    def turn(self, x, gain):
        """[F * S, C] -> [F, S, H, D]: normalised, scaled and turned as complex numbers."""
        x = x.double()
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain.double()
        pairs = torch.view_as_complex(x.view(-1, TOKENS, HEADS, HEAD_DIM // 2, 2))
        position = torch.arange(len(self.k), len(self.k) + len(pairs))[None]
        phase = angles(position)[0].double().view(-1, TOKENS, 1, HEAD_DIM // 2)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(phase), phase)).flatten(-2)

    def attend(self, qkv):
        """The output [F * S, C] of a chunk; it is remembered only when `advance` is called next."""
        q, self.chunk_k, self.chunk_v = self.turn(qkv[0], GAINS[0]), self.turn(qkv[1], GAINS[1]), qkv[2].double()
        self.chunk_v = self.chunk_v.view(self.chunk_k.shape)
        k, v = (self.visible(torch.cat(pair)) for pair in ((self.k, self.chunk_k), (self.v, self.chunk_v)))
        scores = torch.einsum("fshd,gthd->fshgt", q, k) / math.sqrt(HEAD_DIM)
        weights = scores.flatten(-2).softmax(-1).view(scores.shape)
        return torch.einsum("fshgt,gthd->fshd", weights, v).reshape(-1, WIDTH)

    def visible(self, frames):
        if len(frames) <= self.window:
            return frames
        return torch.cat((frames[: self.sink], frames[len(frames) - (self.window - self.sink) :]))

    def advance(self):
        self.k, self.v = torch.cat((self.k, self.chunk_k)), torch.cat((self.v, self.chunk_v))


class MovesTheSink(KeepsEverything):
    """Keys as the model gives them, all turned anew for each chunk, with the sink just before the oldest ring frame."""

    def normed(self, x, gain):
        x = x.double()
        return (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain.double()).view(-1, TOKENS, HEADS, HEAD_DIM)

    def visible(self, frames):
        seen = super().visible(frames)
        if frames is not self.keys:
            return seen
        first_valid = len(frames) - len(seen)  # of what is seen, had the window no sink
        position = torch.arange(first_valid, len(frames))[None]
        phase = angles(position)[0].double().view(-1, TOKENS, 1, HEAD_DIM // 2)
        pairs = torch.view_as_complex(seen.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(phase), phase)).flatten(-2)

    def attend(self, qkv):
        self.chunk_k, self.chunk_v = self.normed(qkv[1], GAINS[1]), qkv[2].double().view(-1, TOKENS, HEADS, HEAD_DIM)
        q = super().turn(qkv[0], GAINS[0])
        self.keys = torch.cat((self.k, self.chunk_k))
        k, v = self.visible(self.keys), self.visible(torch.cat((self.v, self.chunk_v)))
        scores = torch.einsum("fshd,gthd->fshgt", q, k) / math.sqrt(HEAD_DIM)
        weights = scores.flatten(-2).softmax(-1).view(scores.shape)
        return torch.einsum("fshgt,gthd->fshd", weights, v).reshape(-1, WIDTH)


def nan_cache(window, sink=0, slots=3, layers=1, rope="absolute", headroom=0):
    cache = KVCache(layers, HEADS, HEAD_DIM, TOKENS, window, sink, slots, rope=rope, theta=THETA, headroom=headroom)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    return cache


def chunk(rows: int, frames: int):
    return torch.randn(3, rows, frames * TOKENS, WIDTH)


def bits(x):
    return x.view(torch.int32)


@st.composite
def rollouts(draw):
    """(window, sink, headroom, turns); a turn is (rows that take part, frames of the chunk, how often it is
    written)."""
    window = draw(st.integers(1, 9))
    sink = draw(st.integers(0, window - 1))
    frames = st.integers(1, window - sink)
    if draw(st.booleans()):  # mostly one chunk size a session, as in a rollout
        frames = st.just(draw(frames))
    rows = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
    return (
        window,
        sink,
        draw(st.integers(0, 4)),
        draw(st.lists(st.tuples(rows, frames, st.integers(1, 3)), min_size=1, max_size=12)),
    )


@pytest.mark.parametrize("rope, kept", [("absolute", KeepsEverything), ("relative", MovesTheSink)])
@settings(max_examples=80)
@given(rollout=rollouts())
def test_the_ring_equals_a_cache_that_keeps_every_frame(rope, kept, rollout):
    """Any window, sink and chunk sizes, chunks rewritten before they are kept, sessions at different points."""
    window, sink, headroom, turns = rollout
    torch.manual_seed(0)
    cache = nan_cache(window, sink, rope=rope, headroom=headroom)
    slot = cache.acquire(3)[[2, 0, 1]]
    naive = [kept(window, sink) for _ in range(3)]
    for taking_part, frames, writes in turns:
        slots = slot[taking_part]
        for _ in range(writes):
            qkv = chunk(len(taking_part), frames)
            rows = cache.rows(slots, frames)
            seen = (rows.keys[..., 1] - rows.keys[..., 0]).sum(1).tolist()
            assert seen == [min(len(naive[row].k) + frames, window) for row in taking_part]
            out = attend(rows, qkv)
            expected = torch.stack([naive[row].attend(qkv[:, i]) for i, row in enumerate(taking_part)])
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
        cache.advance(slots, frames)
        for row in taking_part:
            naive[row].advance()
    assert cache.position[slot].tolist() == [len(n.k) for n in naive]


@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2), st.integers(0, 9))
def test_one_forward_commits_a_chunk_and_starts_the_next(frames, sink, more, extra, before):
    """Two rows of one slot: each sees its own window, also where the second has evicted what the first still sees."""
    torch.manual_seed(0)
    window = sink + frames + more
    cache, naive = nan_cache(window, sink, headroom=frames + extra), KeepsEverything(window, sink)
    slot = cache.acquire(3)[1:2]
    for _ in range(before):
        qkv = chunk(1, frames)
        attend(cache.rows(slot, frames), qkv)
        naive.attend(qkv[:, 0])
        naive.advance()
        cache.advance(slot, frames)
    both = chunk(2, frames)
    out = attend(cache.rows(slot.repeat(2), frames, ahead=torch.tensor([0, frames])), both)
    clean = naive.attend(both[:, 0])
    naive.advance()
    torch.testing.assert_close(out.double(), torch.stack((clean, naive.attend(both[:, 1]))), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=f"ahead={cache.headroom + 1}.*nearest is {cache.headroom}"):
        cache.rows(slot, frames, ahead=cache.headroom + 1)


@pytest.mark.parametrize("window, sink, frames", [(7, 0, 3), (8, 2, 3), (6, 3, 3), (5, 4, 1)])
def test_a_write_changes_its_own_frames_only(window, sink, frames):
    """Bits of every other frame, slot and layer stay, those of the sink for ever."""
    cache = nan_cache(window, sink, slots=2, layers=2)
    slot = cache.acquire(2)[1:]
    for n in range(8):
        rows, before = cache.rows(slot, frames), torch.stack((cache.k, cache.v)).clone()
        attend(rows, chunk(1, frames), layer=1)
        changed = (bits(torch.stack((cache.k, cache.v))) != bits(before)).any(dim=(-3, -2, -1))
        written = torch.zeros_like(changed)
        written[:, 1, slot[:, None], rows.write] = True
        assert torch.equal(changed, written)
        assert n * frames < sink or rows.write.min() >= sink
        cache.advance(slot, frames)


def test_rows_and_steps_leave_the_counters_alone():
    cache = nan_cache(5, 1)
    slot = cache.acquire(1)
    before = [getattr(cache, name).clone() for name in ("position", "first_valid")]
    for _ in range(3):
        attend(cache.rows(slot, 2), chunk(1, 2))
    assert all(torch.equal(getattr(cache, n), b) for n, b in zip(("position", "first_valid"), before))


def test_counters_are_integer_tensors_that_are_never_read_back():
    """On the meta device nothing can be: taking, viewing, moving and clearing slots works without a value."""
    cache = KVCache(1, HEADS, HEAD_DIM, TOKENS, window=5, sink=1, slots=3, device="meta")
    for counter in (cache.position, cache.first_valid):
        assert counter.shape == (3,) and counter.dtype == torch.long and counter.is_meta
    slot = cache.acquire(2)
    rows = cache.rows(slot, 2)
    cache.advance(slot, 2)
    cache.seek(slot, 7)
    cache.clear(slot)
    assert [list(x.shape) for x in (rows.write, rows.keys, rows.frames)] == [[2, 2], [2, 3, 2], [2, 2]]


def test_a_slot_taken_again_shows_nothing_of_its_last_session():
    cache = nan_cache(4, 1, slots=1)
    slot = cache.acquire(1)
    for _ in range(3):
        attend(cache.rows(slot, 2), chunk(1, 2))
        cache.advance(slot, 2)
    cache.release(slot)
    again, qkv = cache.acquire(1), chunk(1, 2)
    out = attend(cache.rows(again, 2), qkv)
    torch.testing.assert_close(out[0].double(), KeepsEverything(4, 1).attend(qkv[:, 0]), rtol=0, atol=2e-5)


def test_seek_moves_one_session_and_clear_starts_it_anew():
    cache = nan_cache(4, slots=2)
    slot = cache.acquire(2)
    cache.seek(slot[1:], 5000)
    cache.advance(slot, 2)
    assert cache.rows(slot, 2).frames.tolist() == [[2, 3], [5002, 5003]]
    cache.clear(slot[1:])
    assert cache.rows(slot, 2).frames.tolist() == [[2, 3], [0, 1]]
    assert (cache.position[slot].tolist(), cache.first_valid[slot].tolist()) == ([2, 0], [0, 0])


def test_slots_run_out_with_an_error_and_come_back():
    cache = nan_cache(4, slots=3)
    first, second = cache.acquire(1), cache.acquire(2)
    assert sorted([*first.tolist(), *second.tolist()]) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="1 cache slots requested, 0 of 3 are free.*max_sessions"):
        cache.acquire(1)
    cache.release(second[:1])
    with pytest.raises(RuntimeError, match="2 cache slots requested, 1 of 3 are free"):
        cache.acquire(2)
    assert cache.acquire(1).tolist() == second[:1].tolist()


@pytest.mark.parametrize("slots", [[0], [1], [2], [-1], [0, 1]])
def test_only_slots_in_use_can_be_released(slots):
    cache = nan_cache(4, slots=2)
    cache.release(cache.acquire(1))
    with pytest.raises(ValueError, match="not all in use"):
        cache.release(torch.tensor(slots))
    assert sorted(cache.acquire(2).tolist()) == [0, 1]


def test_a_saved_state_goes_on_in_another_slot_and_back_in_its_own():
    """After `save` the session runs on; what was saved runs on elsewhere, and again where it was, to the same bits."""
    cache = nan_cache(5, 1, layers=2)
    a, b = cache.acquire(3)[:2].split(1)
    for _ in range(3):
        for layer in (0, 1):
            attend(cache.rows(a, 2), chunk(1, 2), layer)
        cache.advance(a, 2)
    state, inputs = cache.save(a), [chunk(1, 2) for _ in range(3)]

    def run(slot):
        outputs = []
        for qkv in inputs:
            outputs += [attend(cache.rows(slot, 2), qkv, layer) for layer in (0, 1)]
            cache.advance(slot, 2)
        return torch.stack(outputs)

    first = run(a)
    for slot in (b, a):
        cache.load(slot, state)
        assert torch.equal(run(slot), first)
    assert first.isfinite().all()


def test_selected_rows_go_on_alone():
    cache = nan_cache(4)
    slot, qkv = cache.acquire(3), chunk(3, 2)
    whole = attend(cache.rows(slot, 2), qkv)
    kept = torch.tensor([2, 0])
    assert torch.equal(attend(cache.rows(slot, 2).select(kept), qkv[:, kept]), whole[kept])


def test_memory_of_a_wan_clip():
    """21 latent frames of 1560 tokens, 30 layers, 12 heads of 128, two bytes: 6.04 GB."""
    cache = KVCache(30, 12, 128, 1560, window=21, device="meta", dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 30 * 21 * 1560 * 1536 * 2
    assert cache.nbytes / 1e9 == pytest.approx(6.04, abs=0.005)


@pytest.mark.parametrize("window, sink, nearest", [(4, 4, 3), (4, 9, 3), (1, 1, 0)])
def test_a_sink_that_fills_the_window_is_refused(window, sink, nearest):
    with pytest.raises(ValueError, match=f"sink={sink} with window={window}.*nearest is {nearest}"):
        nan_cache(window, sink)


def test_a_chunk_larger_than_the_ring_is_refused():
    cache = nan_cache(5, 2)
    with pytest.raises(ValueError, match="chunk of 4 frames: the ring holds 3 .*nearest is 3"):
        cache.rows(cache.acquire(1), 4)


def test_a_moving_sink_does_not_wear_off():
    """After a thousand chunks in bfloat16 the sink's keys are those of the first, turned once."""
    cache = KVCache(1, HEADS, HEAD_DIM, TOKENS, 5, 2, dtype=torch.bfloat16, rope="relative", theta=THETA)
    slot = cache.acquire(1)
    made = torch.randn(1, 2, TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    cache.k[0, slot, :2] = made
    for _ in range(1000):
        cache.rows(slot, 3)
        cache.advance(slot, 3)
    cache.rows(slot, 3)
    phase = (3 * 1000 + 3 - 5) * torch.tensor([1.0, 0.4], dtype=torch.float64)
    pairs = torch.view_as_complex(made.double().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(phase), phase)).flatten(-2)
    torch.testing.assert_close(cache.k[0, slot, :2].double(), turned, rtol=2**-8, atol=2**-8)
