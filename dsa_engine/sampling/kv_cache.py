"""The KV cache: a preallocated ring of frames with an optional sink, one slot per session.

Contract. A slot holds a sink of s frames, which are never evicted, and a ring of R >= W - s: frame p of a clip lies at
p if p < s, else at s + (p - s) mod R, so nothing ever moves. A chunk of F frames at position p sees the sink and the
last W - s frames that end with itself. The chunk being denoised is written at its own ring index; only `advance` moves
the position, so every denoising step of a chunk, its commit, and a second try after a failure write the same frames.
With R = W - s these are the frames that the chunk evicts; with `headroom` more, the chunk after next fits in as well,
so that one forward can commit a chunk and denoise the next, each row seeing its own window.

Keys are stored rotated at the absolute frame position they were made for (Self-Forcing's convention). RoPE makes a
score depend on the distance of two frames alone, and within the ring no distance ever exceeds W, however long the clip.
Only the sink falls behind: after p frames it is p frames away, beyond anything a model was trained on. With
`rope="relative"` it moves along instead: sink frame j is seen at j + max(0, p + F - W), next to the oldest ring frame.

In e4m3 the cache takes half the memory of bfloat16. `scales` dequantize it (`CacheScales`); they are the same for every
slot and constant for the cache's lifetime, since stored keys depend on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_engine import ops
from dsa_engine.checks import check_min
from dsa_engine.kernel_types import CacheScales
from dsa_engine.models.fp8 import E4M3
from dsa_engine.models.rope import axis_pairs, rates
from dsa_engine.ops.reference import to_e4m3


class KVCache:
    """K and V of all layers: two tensors [layers, N, s + R, S, H, D]; per slot, on the device: `position` [N], the next
    frame's, and `first_valid` [N], the first frame of the ring that is valid.

    window: W, frames, counting the chunk being denoised and holding the sink; tokens: S, per frame; slots: N sessions;
    rope: "absolute" or "relative" (above), with `theta` of the model's RoPE; headroom: R - (W - s); scales: with an
    e4m3 `dtype`, and only then, k, v [layers, H] (`models.fp8.cache_scales`).
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        tokens: int,
        window: int,
        sink: int = 0,
        slots: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rope: str = "absolute",
        theta: float = 10000.0,
        headroom: int = 0,
        scales: CacheScales | None = None,
    ):
        if not 0 <= sink < window:
            raise ValueError(f"sink={sink} with window={window}: the sink must be smaller; nearest is {window - 1}")
        if (dtype == E4M3) != (scales is not None):
            raise ValueError(
                f"cache of {dtype} {'with' if scales else 'without'} scales: {E4M3} has them, no other dtype"
            )
        self.window, self.sink, self.slots, self.headroom = window, sink, slots, headroom
        self.ring = window - sink + headroom
        self.k = torch.empty(layers, slots, sink + self.ring, tokens, heads, head_dim, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.position, self.first_valid = torch.zeros(2, slots, device=device, dtype=torch.long)
        self.theta = theta
        self.scales = None if scales is None else CacheScales(*(_for_slots(x, slots, self.k.device) for x in scales))
        # With a moving sink, its keys as first written: rotating these each time keeps rounding from accumulating.
        self.unrotated_sink = self.k[:, :, :sink].clone() if rope == "relative" and sink else None
        self._free = list(range(slots))

    def acquire(self, rows: int = 1) -> Tensor:
        """Take and clear `rows` free slots: their indices [rows] on the device."""
        check_min("rows", rows)
        if rows > len(self._free):
            raise RuntimeError(
                f"{rows} cache slots requested, {len(self._free)} of {self.slots} are free: "
                "close a session, or make the pipeline with a larger max_sessions"
            )
        taken, self._free = self._free[:rows], self._free[rows:]
        slot = torch.tensor(taken, device=self.k.device)
        self.clear(slot)
        return slot

    def release(self, slot: Tensor) -> None:
        """Free slots from `acquire`. Raises ValueError for one that is free already: another session may own it."""
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
        self.position[slot], self.first_valid[slot] = 0, 0

    def seek(self, slot: Tensor, position: int) -> None:
        """The next frame has absolute position `position`. After a gap what the ring held before is out of sight."""
        self.first_valid[slot] = torch.where(self.position[slot] == position, self.first_valid[slot], position)
        self.position[slot] = position

    def rows(self, slot: Tensor, frames: int, ahead: int | Tensor = 0) -> CacheView:
        """The view through which one forward over a chunk of `frames` frames reads and writes the slots [B].

        ahead: the chunk starts that many frames after the next position, [B] on the device or for all, at most
        `headroom` where frames are evicted: what lies between is written in the same forward.
        With relative positions the sink's keys are turned to where this chunk sees them.
        """
        if frames > self.window - self.sink:
            raise ValueError(
                f"chunk of {frames} frames: the ring holds {self.window - self.sink} beside the sink; "
                f"nearest is {self.window - self.sink}"
            )
        if isinstance(ahead, int) and ahead > self.headroom:
            raise ValueError(
                f"ahead={ahead}: the ring has {self.headroom} frames of headroom; nearest is {self.headroom}"
            )
        start = self.position[slot] + ahead
        if self.unrotated_sink is not None:
            self._rotate_sink(slot, (start + frames - self.window).clamp(min=0))
        position = start[:, None] + torch.arange(frames, device=self.k.device)
        return CacheView(
            self, slot, write=self._ring_index(position), keys=self._visible_runs(slot, start + frames), frames=position
        )

    def _ring_index(self, position: Tensor) -> Tensor:
        """Index in a slot of the frames at these positions."""
        return torch.where(position < self.sink, position, self.sink + (position - self.sink) % self.ring)

    def _visible_runs(self, slot: Tensor, end: Tensor) -> Tensor:
        """Runs of frames [B, 3, 2] that a chunk ending at `end` [B] sees: the sink, the ring, its part that wrapped."""
        start = torch.maximum(self.first_valid[slot], end - (self.window - self.sink)).clamp(min=self.sink)
        count = (end - start).clamp(min=0)
        first = torch.where(count == self.ring, self.sink, self._ring_index(start))  # a full ring is one run
        last, limit = first + count, self.sink + self.ring
        zero = torch.zeros_like(end)
        edges = (
            zero,
            end.clamp(max=self.sink),
            first,
            last.clamp(max=limit),
            zero + self.sink,
            self.sink + (last - limit).clamp(min=0),
        )
        return torch.stack(edges, dim=-1).unflatten(-1, (3, 2))

    def advance(self, slot: Tensor, frames: int) -> None:
        """Commit the position: the chunk written last becomes part of the past."""
        if self.unrotated_sink is not None:
            filling = (self.position[slot] < self.sink)[:, None, None, None, None]
            sink, k = _as_bytes(self.unrotated_sink), _as_bytes(self.k)
            sink[:, slot] = torch.where(filling, k[:, slot, : self.sink], sink[:, slot])
        self.position[slot] += frames

    def _rotate_sink(self, slot: Tensor, shift: Tensor) -> None:
        """The sink's keys as if their frames lay `shift` [B] positions later.

        In e4m3 they are rounded again after the rotation, which preserves the norm of a pair and so the scales' range.
        """
        pairs = axis_pairs(self.k.shape[-1])[0]
        angle = shift[:, None].double() * rates(pairs, self.theta, self.k.device)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None, None, None].to(torch.complex64)
        keys, k, sink = _copy_slots(self.unrotated_sink, slot), _as_bytes(self.k), slice(self.sink)
        part = keys[..., : 2 * pairs].float()
        if self.scales is not None:
            scale = self.scales.k[:, slot][:, :, None, None, :, None]
            part = part * scale
        part = torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        if self.scales is not None:
            part = to_e4m3(part / scale)
        keys[..., : 2 * pairs] = part.to(keys.dtype)
        moves = (shift > 0)[:, None, None, None, None]  # until then the sink is still being filled
        k[:, slot, sink] = torch.where(moves, _as_bytes(keys), k[:, slot, sink])

    def save(self, slot: Tensor) -> dict[str, Tensor]:
        """A copy of the slots' whole state. `load` brings it back, also into other slots of an equal cache."""
        return {name: _copy_slots(array, slot) for name, array in self._arrays().items()} | {
            name: getattr(self, name)[slot].clone() for name in ("position", "first_valid")
        }

    def load(self, slot: Tensor, state: dict[str, Tensor]) -> None:
        """Raises ValueError, with nothing changed, for a state of a cache of another dtype."""
        arrays = self._arrays()
        for name, array in arrays.items():
            if state[name].dtype != array.dtype:
                raise ValueError(
                    f"state of a cache of {state[name].dtype}: this one's is {array.dtype}; load it into an equal one"
                )
        for name, array in arrays.items():
            _as_bytes(array)[:, slot] = _as_bytes(state[name].to(array.device))
        for name in ("position", "first_valid"):
            getattr(self, name)[slot] = state[name].to(self.k.device)

    def _arrays(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v} | (
            {} if self.unrotated_sink is None else {"unrotated_sink": self.unrotated_sink}
        )

    def layer(self, layer: int) -> tuple[Tensor, Tensor, CacheScales | None]:
        """Keys, values and scales of one layer, as `ops.attention` takes them."""
        scales = None if self.scales is None else CacheScales(*(x[layer] for x in self.scales))
        return self.k[layer], self.v[layer], scales

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self._arrays().values(), *(self.scales or ())))


def _for_slots(scales: Tensor, slots: int, device: torch.device) -> Tensor:
    """[layers, ...] -> [layers, slots, ...] float32; materialized, since kernels take dense tensors."""
    scales = scales.to(device, torch.float32)
    return scales[:, None].expand(-1, slots, *scales.shape[1:]).contiguous()


def _as_bytes(x: Tensor) -> Tensor:
    """e4m3 viewed as uint8: indexing and copies do not support the dtype on every device."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def _copy_slots(x: Tensor, slot: Tensor) -> Tensor:
    """A copy of x[:, slot]."""
    return _as_bytes(x)[:, slot].view(x.dtype)


class CacheView:
    """One forward's view of the cache; the `KVMemory` of the DiT at inference."""

    def __init__(self, cache: KVCache, slot: Tensor, write: Tensor, keys: Tensor, frames: Tensor):
        self.cache, self.slot, self.write, self.keys, self.frames = cache, slot, write, keys, frames

    def attend(self, layer, q, k, v, norm_weights, rope, eps) -> Tensor:
        k_cache, v_cache, scales = self.cache.layer(layer)
        args = (*norm_weights, *rope, eps, k_cache, v_cache, self.slot, self.write, scales)
        q = ops.norm_rope_append(q, k, v, *args)
        return ops.attention(q, k_cache, v_cache, self.slot, self.keys, scales).flatten(2)

    def select(self, rows: Tensor) -> CacheView:
        """The view of some of the rows: a batch without those whose chunks have stopped."""
        return CacheView(self.cache, self.slot[rows], self.write[rows], self.keys[rows], self.frames[rows])
