"""One file for each way of spreading a graph over an axis; `PLANS` lists them in the order in which they run.

A plan is `(module, axis, …) → what it changed`: it rewrites a graph that means whole tensors.
"""

from __future__ import annotations

from lsmc.runtime.insert import Plan
from lsmc.runtime.plans.batch import spread_batch
from lsmc.runtime.plans.between import deal_tokens
from lsmc.runtime.plans.noise import place_numbers
from lsmc.runtime.plans.sequence import spread_sequence
from lsmc.runtime.plans.tensor import deal_heads

PLANS: tuple[tuple[str, tuple[str, ...], Plan], ...] = (
    ("numbers", ("dp", "sp", "tp"), place_numbers),
    ("tensor", ("tp",), deal_heads),
    ("batch", ("dp",), spread_batch),
    ("sequence", ("sp",), spread_sequence),
    ("tokens", ("tp",), deal_tokens),
)
"""The name of a plan among the graph passes, the axes that it serves, and its function."""

__all__ = ["PLANS"]
