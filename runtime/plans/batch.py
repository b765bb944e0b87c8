"""Data parallelism: axis "dp" deals out the batch, dimension 0 of the inputs."""

from __future__ import annotations

from torch.fx import GraphModule

from lsmc.runtime.mesh import Axis
from lsmc.runtime.spread import RULES, Spread


def spread_batch(module: GraphModule, axis: Axis) -> list[str]:
    """Each rank computes its share of the batch; losses are those of the whole batch."""
    return Spread(axis, 0, RULES).run(module)


__all__ = ["spread_batch"]
