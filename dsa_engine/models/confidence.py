"""The confidence head: how reliable is the denoised estimate of each frame?

Only the paper's abstract (arXiv 2606.04432) was at hand, so the head's exact form is this project's: statistics of the
last hidden states of a frame and its timestep embedding go through a small MLP to one logit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsa_engine import ops
from dsa_engine.config import ModelConfig
from dsa_engine.kernel_types import HeadWeights


class ConfidenceHead(nn.Module):
    """c = sigmoid(MLP([mean_s h, std_s h, e_t])) per latent frame, h = LayerNorm of the hidden tokens.

    The hidden width is dim / 2: 3.5 M parameters beside a 1.3B DiT (0.25 %).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.eps
        self.mlp = nn.Sequential(nn.Linear(3 * config.dim, config.dim // 2), nn.SiLU(), nn.Linear(config.dim // 2, 1))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    @property
    def weights(self) -> HeadWeights:
        """The MLP, as `ops.epilogue` takes it."""
        return HeadWeights(self.mlp[0].weight, self.mlp[0].bias, self.mlp[2].weight, self.mlp[2].bias)

    def features(self, hidden: Tensor, time: Tensor) -> Tensor:
        """hidden [B, T, dim], time [B, F, dim] -> what the MLP reads, [B, F, 3 dim] float32."""
        return torch.cat((ops.pool_frames(hidden, time.shape[1], self.eps), time.float()), dim=-1)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """hidden [B, T, dim], time [B, F, dim] -> logits [B, F] float32; the confidence is their sigmoid."""
        features = self.features(hidden, time).to(self.mlp[0].weight.dtype)
        return self.mlp(features).squeeze(-1).float()
