"""Confidence heads: how reliable is the denoised estimate of each frame?

`TokenHead` has the form of the paper (arXiv 2606.04432), as two independent summaries of its full text describe it; the
PDF itself was not at hand. `PooledHead` is this project's own form. What the summaries leave open is marked "ours".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_engine import ops
from dsa_engine.checks import check_choice
from dsa_engine.config import ModelConfig
from dsa_engine.kernel_types import HeadWeights

TAP_DEPTHS = (0.45, 0.72, 1.0)  # of the DiT: blocks 13, 21 and 29 of the 1.3B's 30, which the paper taps
TOKENS = 4  # learnable tokens a tap (ours)
INNER = 8  # the attention's width is dim / INNER (ours)
READ = (
    64  # tokens of a frame that training stores: all of a small model's, of Wan's a 25th, else a clip takes gigabytes
)


class ConfidenceHead(nn.Module, ABC):
    """Reads the output tokens of some blocks and gives a logit per latent frame; the confidence is its sigmoid.

    kind: its name in `HEADS`; taps: the blocks that it reads, from 0, rising, the last block always among them.
    """

    kind: ClassVar[str]

    def __init__(self, config: ModelConfig, taps: Sequence[int]):
        super().__init__()
        self.eps, self.taps = config.eps, tuple(taps)

    @abstractmethod
    def features(self, hidden: Sequence[Tensor], time: Tensor) -> Tensor:
        """What the head's weights are applied to, which depends on the DiT alone: a head can be fitted to it.

        Args:
            hidden: Output tokens [B, T, dim] of the blocks in `taps`.
            time: Timestep embedding [B, F, dim].

        Returns:
            [B, F, n], n depending on the kind of head and, for `TokenHead`, on the tokens per frame.
        """

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """features [..., n] -> logits [...] float32."""

    def forward(self, hidden: Sequence[Tensor], time: Tensor) -> Tensor:
        """hidden: [B, T, dim] per tap, time [B, F, dim] -> logits [B, F] float32."""
        return self.logits(self.features(hidden, time))

    def for_epilogue(self, hidden: Sequence[Tensor], time: Tensor) -> HeadWeights | Tensor:
        """What `ops.epilogue` takes: weights that it evaluates along with the step's end, or the logits."""
        return self(hidden, time)

    def settings(self) -> dict[str, Any]:
        """What `new_head` needs besides the model's sizes to make a head of this form."""
        return {"kind": self.kind}


class PooledHead(ConfidenceHead):
    """c = sigmoid(MLP([mean_s h, std_s h, e_t])) per frame, h = LayerNorm of the last block's tokens (ours).

    The hidden width is dim / 2: 3.5 M parameters beside a 1.3B DiT (0.25 %). Evaluated within `ops.epilogue`.
    """

    kind = "pooled"

    def __init__(self, config: ModelConfig):
        super().__init__(config, (config.num_layers - 1,))
        self.mlp = nn.Sequential(nn.Linear(3 * config.dim, config.dim // 2), nn.SiLU(), nn.Linear(config.dim // 2, 1))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def features(self, hidden: Sequence[Tensor], time: Tensor) -> Tensor:
        return torch.cat((ops.pool_frames(hidden[-1], time.shape[1], self.eps), time.float()), dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        return self.mlp(features.to(self.mlp[0].weight.dtype)).squeeze(-1).float()

    def for_epilogue(self, hidden: Sequence[Tensor], time: Tensor) -> HeadWeights:
        return HeadWeights(self.mlp[0].weight, self.mlp[0].bias, self.mlp[2].weight, self.mlp[2].bias)


class TokenHead(ConfidenceHead):
    """Learnable tokens cross-attend to each frame's tokens h after several blocks; one logit per frame.

        o_ti = softmax_s(q_ti . K_t n_s / sqrt(E)) V_t n_s, n = LayerNorm(h_t)     tap t, learned i, token s of a frame
        c = sigmoid(w . LayerNorm([o_ti]_ti) + b)

    Softmax is over a query that does not depend on the frame, so q . K n = (K^T q) . n: n is pooled with the vector
    K^T q, and V is applied to what was pooled (`ops.attention_pool`). That is exact, and there are no keys and values.
    Ours: LayerNorm before the attention, TOKENS tokens per tap, width E = dim / 8, no biases, one LayerNorm over all
    outputs. 1.8 M parameters beside a 1.3B DiT (0.13 %).

    Args:
        config: Sizes of the DiT.
        taps: Blocks that are read, from 0 (default: at 45, 72 and 100 % of the depth: 13, 21, 29 of 30).

    Raises:
        ValueError: Taps that are no rising block indices up to the last block.
    """

    kind = "token"

    def __init__(self, config: ModelConfig, taps: Sequence[int] | None = None):
        last = config.num_layers - 1
        default = sorted({math.ceil(depth * config.num_layers) - 1 for depth in TAP_DEPTHS})
        taps = default if taps is None else list(taps)
        if taps != sorted(set(taps)) or not taps or taps[0] < 0 or taps[-1] != last:
            rule = f"must rise from 0 on and end with the last block, {last}; the default is {default}"
            raise ValueError(f"taps={taps}: {rule}")
        super().__init__(config, taps)
        dim, inner = config.dim, max(8, config.dim // INNER)
        self.token = nn.Parameter(torch.randn(len(taps), TOKENS, inner))
        self.key, self.value = (nn.Parameter(torch.randn(len(taps), inner, dim) / dim**0.5) for _ in range(2))
        self.norm = nn.LayerNorm(len(taps) * TOKENS * inner)
        self.out = nn.Linear(len(taps) * TOKENS * inner, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def queries(self) -> Tensor:
        """K^T q / sqrt(E), the vectors that frames are pooled with: [taps, TOKENS, dim]."""
        return self.token @ self.key / self.token.shape[-1] ** 0.5

    def features(self, hidden: Sequence[Tensor], time: Tensor) -> Tensor:
        """The normalised tokens of each frame, at most READ of them, evenly spread: [B, F, taps * S * dim] float16."""
        frames = [h.unflatten(1, (time.shape[1], -1)) for h in hidden]
        read = [h[:, :, :: -(-h.shape[2] // READ)].float() for h in frames]
        return torch.stack([F.layer_norm(h, h.shape[-1:], eps=self.eps).half() for h in read], dim=2).flatten(2)

    def logits(self, features: Tensor) -> Tensor:
        tokens = features.unflatten(-1, (len(self.taps), -1, self.key.shape[-1])).to(self.key.dtype)
        share = (tokens @ self.queries.mT).softmax(dim=-2)  # [..., taps, S, TOKENS]
        return self._read_out(share.mT @ tokens)

    def forward(self, hidden: Sequence[Tensor], time: Tensor) -> Tensor:
        pooled = ops.attention_pool(hidden, self.queries, time.shape[1], self.eps)
        return self._read_out(pooled.to(self.value.dtype))

    def _read_out(self, pooled: Tensor) -> Tensor:
        """pooled [..., taps, TOKENS, dim] -> logits [...] float32."""
        return self.out(self.norm((pooled @ self.value.mT).flatten(-3))).squeeze(-1).float()

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "taps": list(self.taps)}


HEADS: dict[str, type[ConfidenceHead]] = {head.kind: head for head in (PooledHead, TokenHead)}


def new_head(config: ModelConfig, kind: str = PooledHead.kind, **settings: Any) -> ConfidenceHead:
    """An untrained head, which says 0.5 of everything. kind, settings: as `ConfidenceHead.settings` gives them."""
    check_choice("head", kind, tuple(HEADS))
    return HEADS[kind](config, **settings)
