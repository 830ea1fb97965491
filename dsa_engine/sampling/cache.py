"""The KV cache: a preallocated ring of frames with an optional sink, one slot a session.

Contract. A slot holds W frames: the first s are the sink, the other W - s a ring. Frames are written at `head`, which
runs 0 .. W-1 and then wraps to s, so the sink stays for ever and the oldest ring frame is overwritten. The chunk being
denoised is written at `head` too, over the frames it evicts; only `advance` moves the head, so every denoising step of
a chunk, its commit, and a second try after a failure write the same frames (as long as the chunk's size stays). At any
time exactly the first min(length + F, W) frames of a slot are valid for a chunk of F frames, whatever the head: no data
ever moves.

Keys are stored rotated at the absolute frame position they were made for (Self-Forcing's convention). RoPE makes a
score depend on the distance of two frames alone, and within the ring no distance ever exceeds W, however long the clip.
Only the sink falls behind: after p frames it is p frames away, beyond anything a model was trained on. With
`rope="relative"` it moves along instead: sink frame j is seen at j + max(0, p + F - W), next to the oldest ring frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_engine import ops
from dsa_engine.models.rope import axis_pairs, rates


class KVCache:
    """K and V of all layers: two tensors [layers, N, W, S, H, D]; `head`, `length` and `position` [N] on the device.

    window: W, frames, counting the chunk being denoised and holding the sink; tokens: S, per frame; slots: N sessions;
    rope: "absolute" or "relative" (above), with `theta` of the model's RoPE.
    """

    def __init__(
        self, layers: int, heads: int, head_dim: int, tokens: int, window: int, sink: int = 0, slots: int = 1,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, rope: str = "absolute",
        theta: float = 10000.0,
    ):  # fmt: skip
        if not 0 <= sink < window:
            raise ValueError(f"sink={sink} with window={window}: the sink must be smaller; nearest is {window - 1}")
        self.window, self.sink, self.slots = window, sink, slots
        self.k = torch.empty(layers, slots, window, tokens, heads, head_dim, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.head, self.length, self.position = torch.zeros(3, slots, device=device, dtype=torch.long)
        self.theta = theta
        # Where the sink moves, its keys as they were made: turned anew from these each time, rounding never adds up.
        self.still = self.k[:, :, :sink].clone() if rope == "relative" and sink else None
        self._free = list(range(slots))

    def acquire(self, rows: int = 1) -> Tensor:
        """Take and clear `rows` free slots: their indices [rows] on the device."""
        if rows < 1:
            raise ValueError(f"rows={rows}: must be at least 1")
        if rows > len(self._free):
            raise RuntimeError(
                f"{rows} cache slots wanted, {len(self._free)} of {self.slots} are free: "
                "close a session, or make the pipeline with a larger max_sessions"
            )
        taken, self._free = self._free[:rows], self._free[rows:]
        slot = torch.tensor(taken, device=self.k.device)
        self.clear(slot)
        return slot

    def release(self, slot: Tensor) -> None:
        """Give slots back that `acquire` gave; giving one back twice is an error, for another session may have it."""
        given = slot.tolist()
        if any(s in self._free or not 0 <= s < self.slots for s in given):
            raise ValueError(f"slots {given} are not all in use; free are {self._free} of {self.slots}")
        self._free = sorted(self._free + given)

    @property
    def in_use(self) -> int:
        """How many slots are taken."""
        return self.slots - len(self._free)

    def clear(self, slot: Tensor) -> None:
        """Forget the slots' frames; the next one has absolute position 0."""
        self.head[slot], self.length[slot], self.position[slot] = 0, 0, 0

    def seek(self, slot: Tensor, position: int) -> None:
        """The next frame has absolute position `position`."""
        self.position[slot] = position

    def rows(self, slot: Tensor, frames: int) -> CacheRows:
        """The view through which one forward over a chunk of `frames` frames reads and writes the slots [B].

        With relative positions the sink's keys are turned to where this chunk sees them.
        """
        if frames > self.window - self.sink:
            raise ValueError(
                f"chunk of {frames} frames: the ring holds {self.window - self.sink} beside the sink; "
                f"nearest is {self.window - self.sink}"
            )
        if self.still is not None:
            self._place_sink(slot, (self.position[slot] + frames - self.window).clamp(min=0))
        ahead = torch.arange(frames, device=self.k.device)
        return CacheRows(
            cache=self,
            slot=slot,
            write=self._wrap(self.head[slot, None] + ahead),
            keys=_run(self.length[slot] + frames, self.window),
            frames=self.position[slot, None] + ahead,
        )

    def advance(self, slot: Tensor, frames: int) -> None:
        """Make the chunk that was written last part of the past."""
        if self.still is not None:
            filling = (self.position[slot] < self.sink)[:, None, None, None, None]
            self.still[:, slot] = torch.where(filling, self.k[:, slot, : self.sink], self.still[:, slot])
        self.head[slot] = self._wrap(self.head[slot] + frames)
        self.length[slot] = (self.length[slot] + frames).clamp(max=self.window)
        self.position[slot] += frames

    def _place_sink(self, slot: Tensor, shift: Tensor) -> None:
        """The sink's keys as if their frames lay `shift` [B] positions later."""
        pairs = axis_pairs(self.k.shape[-1])[0]
        angle = shift[:, None].double() * rates(pairs, self.theta, self.k.device)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None, None, None].to(torch.complex64)
        still = self.still[:, slot]
        time = torch.view_as_complex(still[..., : 2 * pairs].float().unflatten(-1, (-1, 2)))
        still[..., : 2 * pairs] = torch.view_as_real(time * turn).flatten(-2).to(still.dtype)
        moves = (shift > 0)[:, None, None, None, None]  # until then the sink is still being made
        self.k[:, slot, : self.sink] = torch.where(moves, still, self.k[:, slot, : self.sink])

    def _wrap(self, index: Tensor) -> Tensor:
        ring = self.window - self.sink
        return torch.where(index < self.window, index, self.sink + (index - self.sink) % ring)

    def save(self, slot: Tensor) -> dict[str, Tensor]:
        """A copy of the slots' whole state. `load` brings it back, also into other slots of an equal cache."""
        arrays = {"k": self.k[:, slot], "v": self.v[:, slot]}
        if self.still is not None:
            arrays["still"] = self.still[:, slot]
        return arrays | {name: getattr(self, name)[slot].clone() for name in ("head", "length", "position")}

    def load(self, slot: Tensor, state: dict[str, Tensor]) -> None:
        self.k[:, slot], self.v[:, slot] = state["k"].to(self.k.device), state["v"].to(self.v.device)
        if self.still is not None:
            self.still[:, slot] = state["still"].to(self.k.device)
        for name in ("head", "length", "position"):
            getattr(self, name)[slot] = state[name].to(self.k.device)

    @property
    def nbytes(self) -> int:
        return 2 * self.k.nbytes + (0 if self.still is None else self.still.nbytes)


def _run(length: Tensor, window: int) -> Tensor:
    """The one run of frames that is valid: [B, 1, 2] holding (0, length), at most (0, window)."""
    length = length.clamp(max=window)
    return torch.stack((torch.zeros_like(length), length), dim=-1)[:, None]


class CacheRows:
    """One forward's view of the cache; the `Memory` of the DiT at inference."""

    def __init__(self, cache: KVCache, slot: Tensor, write: Tensor, keys: Tensor, frames: Tensor):
        self.cache, self.slot, self.write, self.keys, self.frames = cache, slot, write, keys, frames

    def attend(self, layer, q, k, v, gains, rope, eps) -> Tensor:
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        q = ops.norm_rope_append(q, k, v, *gains, *rope, eps, k_cache, v_cache, self.slot, self.write)
        return ops.attention(q, k_cache, v_cache, self.slot, self.keys).flatten(2)

    def select(self, rows: Tensor) -> CacheRows:
        """The view of some of the rows: what is left of a batch after some of its chunks have stopped."""
        return CacheRows(self.cache, self.slot[rows], self.write[rows], self.keys[rows], self.frames[rows])
