"""Tensor parallelism: heads and widths are dealt out over the ranks of an axis.

LSM operators and attention are split along their heads, experts along their width. From there splits grow through the
graph: projections into heads are split by columns, those out of them by rows, per-head parameters and gates follow their
heads, and the short convolution its channels; what all heads share (a norm's weight, the low rank of a gate) stays whole.
A layer then takes one all-reduce in each direction, as in Megatron-LM (arXiv 1909.08053) and Figure 2 of Linear-MoE
(arXiv 2503.05447).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from lsmc.inputs import parts
from lsmc.lowering import ops
from lsmc.runtime.mesh import Axis
from lsmc.runtime.plans.deal import deal
from lsmc.runtime.plans.dims import Split, shape_of
from lsmc.runtime.spread import name_of


def _of(node: Node, dim: int, axis: Axis, what: str, blocks: int = 1) -> tuple[Node, Split]:
    """Deal out a dimension, made of so many blocks, each by itself."""
    size = shape_of(node)[dim] // blocks
    axis.share(size, what)
    return node, Split(dim % len(shape_of(node)), frozenset((i * size, (i + 1) * size) for i in range(blocks)))


def seeds(module: GraphModule, axis: Axis) -> Iterator[tuple[Node, Split]]:
    """The heads of LSM operators and attention, the widths of experts."""
    for node in module.graph.nodes:
        name = name_of(node)
        if name == "lsmc.fwd":
            plan = ops.plan_of(str(node.args[3]))
            fields, what = {f.name: f for f in plan.canonical.inputs}, f"the number of heads of {plan.name}"
            for given, source in zip(plan.inputs, node.args[0]):
                dims = parts(fields[given], step=False)
                yield _of(source, dims.index("H" if "H" in dims else "HV"), axis, f"{what} (input {given!r})")
            for memory in node.args[1]:
                yield _of(memory, 1, axis, what)
            for user in node.users:
                yield _of(user, 2 if user.args[1] == 0 else 1, axis, what)
        elif name == "scaled_dot_product_attention":
            for x in (*node.args[:3], node):
                yield _of(x, len(shape_of(x)) - 3, axis, "the number of attention heads")
        elif name == "lsmc.moe_experts":
            yield _of(node.args[3], 1, axis, "the width of the experts", blocks=2)
            yield _of(node.args[4], 2, axis, "the width of the experts")


def deal_heads(module: GraphModule, axis: Axis) -> list[str]:
    """Deal out heads and widths."""
    return deal(module, axis, seeds)


__all__ = ["deal_heads", "seeds"]
