"""Tensor parallelism: heads and widths are dealt out over the ranks of an axis.

LSM operators and attention are split along their heads, experts along their width. From there splits grow through the
graph: projections into heads are split by columns, those out of them by rows; per-head parameters and gates follow their
heads, and the short convolution its channels. A layer of two matrices is split along the width between. What all heads
share (a norm's weight, the low rank of a gate) stays whole. A mixer or a layer of experts then takes one all-reduce in each
direction, as in Megatron-LM (arXiv 1909.08053) and Figure 2 of Linear-MoE (arXiv 2503.05447).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from lsmc.inputs import parts
from lsmc.lowering import ops
from lsmc.runtime.errors import LsmMeshError
from lsmc.runtime.insert import example
from lsmc.runtime.mesh import Axis
from lsmc.runtime.plans.deal import Growth, Layouts, deal
from lsmc.runtime.plans.dims import Split, arguments, shape_of
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
            plan = ops.plan_of(str(arguments(node)[3]))
            fields, what = {f.name: f for f in plan.canonical.inputs}, f"the number of heads of {plan.name}"
            for given, source in zip(plan.inputs, arguments(node)[0]):
                dims = parts(fields[given], step=False)
                yield _of(source, dims.index("H" if "H" in dims else "HV"), axis, f"{what} (input {given!r})")
            for memory in arguments(node)[1]:
                yield _of(memory, 1, axis, what)
            for user in (user for user in node.users if user.users):  # what is kept for the backward has none yet
                yield _of(user, 2 if arguments(user)[1] == 0 else 1, axis, what)
        elif name == "scaled_dot_product_attention":
            for x in (*arguments(node)[:3], node):
                yield _of(x, len(shape_of(x)) - 3, axis, "the number of attention heads")
        elif name == "lsmc.everywhere" and len(shape_of(node)) > 3:
            yield _of(node, len(shape_of(node)) - 3, axis, "the number of attention heads")
        elif name == "lsmc.moe_experts":
            yield _of(arguments(node)[3], 1, axis, "the width of the experts", blocks=2)
            yield _of(arguments(node)[4], 2, axis, "the width of the experts")


def layouts(module: GraphModule, axis: Axis) -> Layouts:
    """What is split: all that hangs together with heads and widths, and layers of two matrices between which nothing else is."""
    growth, start = Growth(module), dict[Node, Split]()
    for node, split in seeds(module, axis):
        merged = start[node].merged(split) if node in start else split
        if merged is None:
            raise LsmMeshError(f"axis {axis.name!r} splits {node.name} in two ways")
        start[node] = merged
    found = growth.of(start)
    for node in module.graph.nodes:
        if name_of(node) == "linear" and arguments(node)[0] not in found:
            inner, width = arguments(node)[0], shape_of(arguments(node)[0])[-1]
            between = growth.of({inner: Split(len(shape_of(inner)) - 1, frozenset({(0, width)}))})
            if width % axis.size == 0 and not between.keys() & found.keys() and _closed(between, node):
                found |= between
    return found


def _closed(between: Layouts, last: Node) -> bool:
    """Whether what is split lies between projections by columns and `last`, and is used nowhere else."""
    for node in between:
        if name_of(node) == "lsmc.joined":
            continue
        if not node.op.startswith("call"):
            if not isinstance(example(node), Parameter):
                return False
            continue
        first = name_of(node) == "linear" and arguments(node)[1] in between
        if not first and any(isinstance(example(n), Tensor) and n not in between for n in node.all_input_nodes):
            return False
        for user in node.users:
            pieces = list(user.users) if name_of(user) in ("split", "chunk") else [user]
            if user is not last and not all(piece in between for piece in pieces):
                return False
    return any(name_of(node) == "linear" for node in between)


def deal_heads(module: GraphModule, axis: Axis) -> list[str]:
    """Deal out heads and widths."""
    return deal(module, axis, layouts)


__all__ = ["deal_heads", "layouts", "seeds"]
