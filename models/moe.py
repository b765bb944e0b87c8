"""A mixture of SwiGLU experts: a linear router, softmax then top-k, nothing dropped."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsmc.lowering.moe import moe_experts
from lsmc.models.blocks import at_least_float32
from lsmc.models.configs import ModelConfig


class RouterStatistics(NamedTuple):
    """What one layer's router did with its tokens.

    ``load (E,)`` is the share of assignments that each expert got: it sums to 1 and is 1/E when balanced.
    """

    load: Tensor
    balance: Tensor
    z: Tensor


class SwiGLU(nn.Module):
    """``(silu(x A) ⊙ (x B)) C``."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(hidden, 2 * width, bias=False)
        self.w_out = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """``y = Σ_{e in top k} p_e · expert_e(x)`` with ``p = softmax(x W)`` over all experts.

    The chosen probabilities are used as they are; with ``renormalise`` they are divided by their sum. Routing
    is computed in float32. Losses are returned without their coefficients:

    - balance: ``E Σ_e load_e · mean(p_e)`` (Switch Transformer, eq. 4), 1 when balanced;
    - z: ``mean(logsumexp(x W)²)`` (ST-MoE, eq. 5).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        self.experts, self.top_k, self.renormalise = moe.experts, moe.top_k, moe.renormalise
        self.router = nn.Linear(config.hidden, moe.experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(moe.experts, 2 * moe.width, config.hidden))
        self.w_out = nn.Parameter(torch.empty(moe.experts, config.hidden, moe.width))
        self.shared = SwiGLU(config.hidden, moe.shared_width) if moe.shared_width else None

    def initialise(self, std: float, depth: int) -> None:
        nn.init.normal_(self.w_in, std=std)
        nn.init.normal_(self.w_out, std=std / math.sqrt(2 * depth))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, RouterStatistics]:
        """``(weights (N, k), experts (N, k), statistics)`` of ``x (N, D)``."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(at_least_float32(x), at_least_float32(self.router.weight))
        probabilities = logits.softmax(-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        # Whole numbers: their sums are exact in any order, so the load is reproducible.
        flat = experts.flatten()
        ones = torch.ones_like(flat, dtype=logits.dtype)
        load = logits.new_zeros(self.experts).scatter_add(0, flat, ones) / max(1, flat.shape[0])
        balance = self.experts * (load * probabilities.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        return weights, experts, RouterStatistics(load, balance, z)

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStatistics]:
        """``x (..., D)`` to the same shape."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts, statistics = self.route(flat)
        y = moe_experts(flat, weights, experts, self.w_in, self.w_out).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, statistics
