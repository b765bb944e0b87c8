"""Blocks, experts and hybrid models (imported as ``lsmc.models``)."""

from lsmc.models.configs import CONFIGS, ModelConfig, MoeConfig, config
from lsmc.models.hybrid import HybridMoE, Losses

__all__ = ["CONFIGS", "HybridMoE", "Losses", "ModelConfig", "MoeConfig", "config"]
