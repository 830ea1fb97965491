"""The shapes model's text encoder: a `TextEncoder` of the grammar's four word slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsa_engine.shapes.world import NULL_TOKENS, VOCABULARY, Caption


class SlotTextEncoder(nn.Module):
    """One learned vector per word slot: colour, shape, motion, background. Its own null tokens are the empty prompt."""

    def __init__(self, text_dim: int):
        super().__init__()
        self.text_dim = text_dim
        self.table = nn.Embedding(VOCABULARY, text_dim)
        nn.init.normal_(self.table.weight, std=0.5)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts of the grammar -> [B, 4, text_dim]; anything else raises ValueError with the nearest legal prompt."""
        tokens = [Caption.parse(p).tokens for p in prompts]
        return self.table(torch.tensor(tokens, device=self.table.weight.device))

    def null(self, batch: int) -> Tensor:
        """The unconditional embedding, for classifier-free guidance: [B, 4, text_dim]."""
        return self.table(torch.tensor([NULL_TOKENS] * batch, device=self.table.weight.device))
