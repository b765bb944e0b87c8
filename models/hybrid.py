"""``HybridMoE``: LSM and attention layers in any pattern, each followed by a mixture of experts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lsmc.models.blocks import Attention, LinearMixer, RMSNorm, ShortConvolution, at_least_float32
from lsmc.models.configs import ModelConfig
from lsmc.models.moe import MixtureOfExperts, RouterStatistics


class Losses(NamedTuple):
    """``total`` is to be minimised: mean negative log likelihood (nats a token) + weighted router losses.

    ``load (layers, E)`` is each expert's share of its layer's assignments.
    """

    total: Tensor
    nll: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + experts(norm(x))``."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.mixer = LinearMixer(config) if kind == "L" else Attention(config)
        self.experts_norm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.experts = MixtureOfExperts(config)

    def _experts(self, x: Tensor) -> tuple[Tensor, RouterStatistics]:
        y, statistics = self.experts(self.experts_norm(x))
        return x + y, statistics

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStatistics]:
        return self._experts(x + self.mixer(self.mixer_norm(x)))

    def prefill(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer.prefill(self.mixer_norm(x), state)
        return self._experts(x + y)[0], state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer.step(self.mixer_norm(x), state)
        return self._experts(x + y)[0], state


class HybridMoE(nn.Module):
    """Embedding, blocks by ``config.pattern``, RMSNorm, untied head.

    - ``model(tokens)``: logits ``(B, T, vocabulary)``;
    - ``model(tokens, targets)``: :class:`Losses`;
    - ``logits, state = model.prefill(tokens)`` and ``logits, state = model.step(token, state)``: decoding,
      with memory constant in the length for 'L' layers.

    A row is one document: packed documents are for the operator alone (its ``cu_seqlens``); here attention and
    the convolution would look past a document's start.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.pattern)
        self.norm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Normal weights, and constants about 1 where the method does not say how large they are: of factors that are all zero
        none would learn. The two projections that feed the residual stream are smaller by √(2 layers)."""
        std, depth = self.config.initial_std, self.config.layers
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, ShortConvolution):
                module.initialise()
            if isinstance(module, LinearMixer):
                for i in module.inputs:
                    if i.name in module.constants and i.role == "free":
                        nn.init.normal_(module.constants[i.name], mean=1.0, std=std)
        for block in self._layers:
            nn.init.normal_(block.mixer.out.weight, std=std / math.sqrt(2 * depth))
            block.experts.initialise(std, depth)
            if block.experts.shared is not None:
                nn.init.normal_(block.experts.shared.w_out.weight, std=std / math.sqrt(2 * depth))

    @property
    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def parameter_counts(self) -> tuple[int, int]:
        """``(all, active without embeddings)``: a token uses ``top_k`` of the experts."""
        total = sum(p.numel() for p in self.parameters())
        embeddings = self.embedding.weight.numel() + self.head.weight.numel()
        moe = self.config.moe
        experts = sum(b.experts.w_in.numel() + b.experts.w_out.numel() for b in self._layers)
        return total, total - embeddings - experts + experts * moe.top_k // moe.experts

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | Losses:
        """``tokens, targets (B, T)`` int64."""
        x = self.embedding(tokens)
        statistics: list[RouterStatistics] = []
        for block in self._layers:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x, s = checkpoint(block, x, use_reentrant=False)
            else:
                x, s = block(x)
            statistics.append(s)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        moe = self.config.moe
        nll = F.cross_entropy(at_least_float32(logits.flatten(0, 1)), targets.flatten())
        balance = torch.stack([s.balance for s in statistics]).mean()
        z = torch.stack([s.z for s in statistics]).mean()
        total = nll + moe.balance_loss * balance + moe.z_loss * z
        load = torch.stack([s.load for s in statistics])
        return Losses(total, nll, balance, z, load)

    def prefill(self, tokens: Tensor, state: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Logits ``(B, T, vocabulary)`` of ``tokens (B, T)``, T ≥ 1, and the state after them."""
        x = self.embedding(tokens)
        states = []
        for block, before in zip(self._layers, state or [None] * len(self.blocks)):
            x, after = block.prefill(x, before)
            states.append(after)
        return self.head(self.norm(x)), states

    def step(self, token: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits ``(B, vocabulary)`` after one more ``token (B,)``."""
        x = self.embedding(token)
        states = []
        for block, before in zip(self._layers, state):
            x, after = block.step(x, before)
            states.append(after)
        return self.head(self.norm(x)), states
