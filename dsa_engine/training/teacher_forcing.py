"""All chunks of a clip in one forward: teacher forcing, each on the clean past as the KV cache would serve it, or as a
base model sees a clip, every frame by every other."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_engine import ops
from dsa_engine.models.dit import CausalDiT, DiTOutput
from dsa_engine.ops.reference import sdpa


class TeacherForced:
    """A `KVMemory` whose rows are (clip, copy, chunk): copy 0 is clean and supplies the keys, copy 1 is noisy.

    The query of chunk i, in either copy, sees the clean chunks i - context .. i - 1 and its own chunk. Keys are
    gathered per chunk, not masked out of the full score matrix, so the cost stays linear in the clip's length.
    """

    def __init__(self, clips: int, chunks: int, tokens: int, context: int, device=None):
        self.rows = (clips, 2, chunks)
        self.context = context
        past = torch.arange(-context, 0, device=device).repeat_interleave(tokens)
        inside = torch.arange(chunks, device=device)[:, None] + past >= 0
        seen = torch.cat((inside, inside.new_ones(chunks, tokens)), dim=1)
        bias = torch.zeros(seen.shape, device=device).masked_fill(~seen, float("-inf"))
        self.bias = bias.expand(clips, 2, -1, -1).reshape(-1, 1, 1, seen.shape[1])

    def attend(self, layer, q, k, v, norm_weights, rope, eps) -> Tensor:
        (q_weight, k_weight), (cos, sin) = norm_weights, rope
        q, k = ops.norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
        k, v = self._with_past(k), self._with_past(v.unflatten(-1, k.shape[-2:]))
        return sdpa(q, k, v, self.bias).flatten(2)

    def _with_past(self, x: Tensor) -> Tensor:
        """[rows, T, H, D] -> [rows, (context + 1) T, H, D]."""
        x = x.unflatten(0, self.rows)
        clean = torch.cat((torch.zeros_like(x[:, 0, : self.context]), x[:, 0]), dim=1)
        chunks = self.rows[2]
        past = [clean[:, j : j + chunks] for j in range(self.context)]
        return torch.cat([p[:, None].expand_as(x) for p in past] + [x], dim=3).flatten(0, 2)


def teacher_forced(
    model: CausalDiT,
    clean: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    clean_text: Tensor,
    text: Tensor,
    context: int,
    taps: tuple[int, ...] = (),
) -> DiTOutput:
    """One pass over clips; returns the output for the noisy copy, rows (clip, chunk).

    clean, noisy [B, N, F, C, H, W]: N chunks a clip; sigma [B, N] noise level of each noisy chunk;
    clean_text, text [B, N, L, text_dim]: the prompt under which each chunk was committed and is denoised;
    context: how many past chunks the cache window holds; taps: as of `CausalDiT.forward`.
    """
    clips, chunks, frames = noisy.shape[:3]
    x = torch.stack((clean, noisy), dim=1).flatten(0, 2)
    t = torch.stack((torch.zeros_like(sigma), 1000 * sigma), dim=1).reshape(-1, 1).expand(-1, frames)
    position = torch.arange(chunks * frames, device=x.device).view(1, 1, chunks, frames)
    position = position.expand(clips, 2, -1, -1).reshape(-1, frames)
    text_kv = model.text_kv(torch.stack((clean_text, text), dim=1).flatten(0, 2))
    p = model.config.patch_size[1]
    tokens = frames * (x.shape[-2] // p) * (x.shape[-1] // p)
    memory = TeacherForced(clips, chunks, tokens, min(context, chunks), x.device)
    out = model(x, t, position, text_kv, memory, taps)
    return out.map(lambda part: part.unflatten(0, (clips, 2, chunks))[:, 1].flatten(0, 1))


class WholeClip:
    """A `KVMemory` without a past: every token of a row sees every other, as in Wan's bidirectional base models."""

    def attend(self, layer, q, k, v, norm_weights, rope, eps) -> Tensor:
        (q_weight, k_weight), (cos, sin) = norm_weights, rope
        q, k = ops.norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
        return sdpa(q, k, v.unflatten(-1, k.shape[-2:])).flatten(2)


def whole_clip(
    model: CausalDiT,
    clean: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    clean_text: Tensor,
    text: Tensor,
    context: int,
    taps: tuple[int, ...] = (),
) -> DiTOutput:
    """`teacher_forced` for a bidirectional model: arguments and rows are the same, what it sees is not.

    A row is a clip: its frames are denoised together, under the prompt of its first chunk. clean, clean_text and
    context are not used. Source: Self-Forcing (arXiv 2506.08009) `model/dmd.py`, where scores are Wan's base models.
    """
    clips, chunks, frames = noisy.shape[:3]
    t = 1000 * sigma.repeat_interleave(frames, dim=1)
    position = torch.arange(chunks * frames, device=noisy.device).expand(clips, -1)
    out = model(noisy.flatten(1, 2), t, position, model.text_kv(text[:, 0]), WholeClip(), taps)
    return out.map(lambda part: part.unflatten(1, (chunks, -1)).flatten(0, 1))
