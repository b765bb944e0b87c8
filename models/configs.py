"""Sizes of the hybrid models, by name.

``config("a0.3b-2b", lsm="gla", pattern="LLLNLLLNLLLN")`` gives a :class:`ModelConfig`; any field may be
overridden. The two large ones are those of Linear-MoE (arXiv 2503.05447, Table 2).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lsmc.runtime.errors import LsmConfigError

DEFAULT_LSM = "gla"
"""The method of the L layers where nothing else is asked for."""


@dataclass(frozen=True)
class MoeConfig:
    """Experts of one layer; see :class:`lsmc.models.moe.MixtureOfExperts`."""

    experts: int = 8
    top_k: int = 2
    width: int = 128
    """Inner width of one SwiGLU expert."""
    renormalise: bool = False
    """Divide the chosen probabilities by their sum."""
    balance_loss: float = 0.01
    """Coefficient of the load-balancing loss; 0 turns it off."""
    z_loss: float = 0.0
    """Coefficient of the mean squared log-sum-exp of the router's logits; 0 turns it off."""
    shared_width: int = 0
    """Inner width of an expert that sees every token; 0 for none."""


@dataclass(frozen=True)
class ModelConfig:
    """A stack of blocks. ``pattern`` has a letter a layer: 'L' an LSM layer, 'N' causal softmax attention."""

    lsm: Any = DEFAULT_LSM
    """A name in the zoo, ``FILE.py:NAME``, or a declaration itself."""
    pattern: str = "LLLN"
    hidden: int = 128
    heads: int = 2
    """Query/key heads."""
    value_heads: int = 0
    """Value heads, a multiple of ``heads``; 0 for as many."""
    head_dim: int = 0
    """Width K of a query/key head; 0 for ``hidden // heads``."""
    value_dim: int = 0
    """Width V of a value head; 0 for ``head_dim · heads / value_heads``."""
    vocabulary: int = 256
    convolution: int = 4
    """Width of the causal depthwise convolution over q, k, v; 0 for none."""
    gate_rank: int = 16
    """Rank of the projections of vector gates."""
    gate_normaliser: float = 16.0
    """Log decays are ``logsigmoid(x) / gate_normaliser``."""
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    initial_std: float = 0.02

    def __post_init__(self) -> None:
        def need(condition: bool, field: str, rule: str) -> None:
            if not condition:
                raise LsmConfigError(f"ModelConfig.{field} = {getattr(self, field, '')!r}: {rule}")

        need(
            bool(self.pattern) and set(self.pattern) <= {"L", "N"},
            "pattern",
            "one letter L or N for each layer",
        )
        for field in ("hidden", "heads", "vocabulary", "gate_rank"):
            need(getattr(self, field) > 0, field, "must be positive")
        need(self.gate_normaliser > 0, "gate_normaliser", "must be positive")
        need(
            self.head_dim > 0 or self.hidden % self.heads == 0, "heads", f"must divide hidden = {self.hidden}"
        )
        need(self.value_heads % self.heads == 0, "value_heads", f"must be a multiple of heads = {self.heads}")
        need(self.convolution >= 0, "convolution", "must not be negative")
        need("N" not in self.pattern or self.k_dim % 2 == 0, "head_dim", "must be even: RoPE rotates pairs")
        moe = self.moe
        if moe.experts < 1 or moe.width < 1 or not 1 <= moe.top_k <= moe.experts:
            raise LsmConfigError(
                f"ModelConfig.moe: top_k = {moe.top_k} of experts = {moe.experts}, width = {moe.width}: "
                "1 <= top_k <= experts and a positive width are needed"
            )

    @property
    def layers(self) -> int:
        return len(self.pattern)

    @property
    def v_heads(self) -> int:
        return self.value_heads or self.heads

    @property
    def k_dim(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def v_dim(self) -> int:
        return self.value_dim or max(1, self.k_dim * self.heads // self.v_heads)


CONFIGS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        pattern="LLLN",
        hidden=128,
        heads=2,
        vocabulary=256,
        gate_normaliser=4.0,
        moe=MoeConfig(experts=4, top_k=1, width=256, renormalise=False),
        initial_std=0.05,  # 0.02 is for wide layers: this narrow one would learn more slowly at first
    ),
    "a0.3b-2b": ModelConfig(
        pattern="L" * 12,
        hidden=1024,
        heads=8,
        vocabulary=151_936,
        moe=MoeConfig(experts=64, top_k=8, width=896),
    ),
    "a1b-7b": ModelConfig(
        pattern="L" * 16,
        hidden=2048,
        heads=16,
        vocabulary=151_936,
        moe=MoeConfig(experts=64, top_k=8, width=1024),
    ),
}


def config(name: str, **overrides: Any) -> ModelConfig:
    """The named size with some fields replaced; fields of the experts may be given as ``moe=dict(...)``."""
    if name not in CONFIGS:
        raise LsmConfigError(f"no model configuration {name!r}; there are {', '.join(CONFIGS)}")
    base = CONFIGS[name]
    fields = {field.name for field in dataclasses.fields(base)}
    for key in overrides:
        if key not in fields:
            raise LsmConfigError(f"ModelConfig has no field {key!r}; it has {', '.join(sorted(fields))}")
    if isinstance(overrides.get("moe"), dict):
        overrides["moe"] = dataclasses.replace(base.moe, **overrides["moe"])
    return dataclasses.replace(base, **overrides)
