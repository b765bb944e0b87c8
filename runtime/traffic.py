"""What the ranks of a mesh exchange in one step of a model, read off the graph: without any rank, data or weights.

Bytes are those that a rank receives from others with the usual algorithms: W − 1 parts in a gather or a reduce-scatter,
(W − 1) / W of the tensor in an all-to-all, and twice that in an all-reduce. Backward ones follow from the adjoints in
`lsmc.runtime.collectives`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lsmc.lowering.inductor import PASSES
from lsmc.runtime.insert import example, passes, source, tensors
from lsmc.runtime.mesh import Axis, sizes
from lsmc.runtime.plans import PLANS
from lsmc.runtime.spread import name_of


@dataclass(frozen=True)
class Message:
    """One exchange over an axis: what is done forward and backward, for what, and how much a rank receives.

    behind     how many operations of the graph stand between the forward message and its arrival
    operators  how many of them are LSM operators
    """

    axis: str
    forward: str
    backward: str
    of: str
    forward_bytes: int
    backward_bytes: int
    behind: int
    operators: int


def parse(text: str) -> dict[str, Axis]:
    """Axes from ``"sp=2,dp=4"``, of a mesh that nobody has; raises LsmMeshError for others than those there are."""
    found = {name: Axis(name, size, name) for name, size in sizes(text, "--mesh").items()}
    return {name: axis for name, axis in found.items() if axis.size > 1}


class _Captured(Exception):
    """The graph is there; it is not to run."""


def trace(model: Callable[..., Any], *arguments: Tensor) -> GraphModule:
    """The graph of `model(*arguments)` as it is captured, of whole tensors; everything may be fake."""
    graphs: list[GraphModule] = []

    def stop(*_: Any) -> Any:
        raise _Captured

    def keep(module: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return stop

    torch._dynamo.reset()
    try:
        torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*arguments)
    except _Captured:
        pass
    finally:
        torch._dynamo.reset()
    return graphs[0]


def capture(model: Callable[..., Any], axes: Mapping[str, Axis], *arguments: Tensor) -> GraphModule:
    """The graph of `model(*arguments)` on a mesh of these axes."""
    module = trace(model, *arguments)
    for run in (PASSES["find"], *passes(axes, PLANS).values()):
        run(module)
    return module


def messages(module: GraphModule, axes: Mapping[str, Axis]) -> Iterator[tuple[Node, Message]]:
    """All exchanges of a graph, and of the regions in it, in order, each with the node that issues it."""
    by_group = {axis.group: axis for axis in axes.values()}
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            order = {node: i for i, node in enumerate(inner.graph.nodes)}
            for node in order:
                if (message := _message(node, by_group, order)) is not None:
                    yield node, message


def traffic(module: GraphModule, axes: Mapping[str, Axis]) -> list[Message]:
    """All exchanges of a graph, and of the regions in it, in order."""
    return [message for _, message in messages(module, axes)]


def totals(found: Sequence[Message]) -> tuple[list[str], list[list[str]]]:
    """A table of messages, equal ones in one row."""
    rows: dict[tuple[str, ...], list[Message]] = {}
    for m in found:
        rows.setdefault((m.axis, m.of, m.forward, m.backward), []).append(m)
    lines = []
    for (axis, of, forward, backward), many in rows.items():
        there, back = sum(m.forward_bytes for m in many), sum(m.backward_bytes for m in many)
        hidden = min(m.behind for m in many)
        lines.append([axis, of, str(len(many)), forward, f"{there:,}" if there else "", backward, f"{back:,}" if back else "",
                      f"{hidden} operations" if hidden else ""])
    return ["axis", "of", "times", "forward", "bytes", "backward", "bytes", "overlaps"], lines


def arrival(node: Node) -> Node:
    """Where what a node issued is needed: its wait, or itself."""
    return next((user for user in node.users if "wait_tensor" in str(user.target)), node)


PARAMETERS = "gradients of parameters"

_KINDS = {
    "all_gather_into_tensor": ("all-gather", "reduce-scatter"), "reduce_scatter_tensor": ("reduce-scatter", "all-gather"),
    "shared": ("", "all-reduce"), "shared_all": ("", "all-reduce"), "summed": ("all-reduce", ""),
    "part": ("", "all-gather"), "whole": ("all-gather", ""),
    "scattered": ("reduce-scatter", "all-gather"), "gathered": ("all-gather", "reduce-scatter"),
    "traded": ("all-to-all", "all-to-all"), "dealt": ("", "all-gather"), "joined": ("all-gather", ""), "kept": ("", "all-reduce"),
}  # fmt: skip


def _message(node: Node, axes: Mapping[str, Axis], order: Mapping[Node, int]) -> Message | None:
    name = getattr(node.target, "_opname", "")
    if name not in _KINDS or not isinstance(node.args[-1], str) or node.args[-1] not in axes:
        return None
    axis, (forward, backward) = axes[node.args[-1]], _KINDS[name]
    sent, made = (tensors([example(n) for n in nodes]) for nodes in (node.all_input_nodes, [node]))
    size = sum(x.numel() * x.itemsize for x in sent)
    share = (axis.size - 1) / axis.size
    factor = {"all-gather": axis.size - 1, "reduce-scatter": axis.size - 1, "all-reduce": 2 * share, "all-to-all": share, "": 0}
    if name in ("reduce_scatter_tensor", "scattered", "part"):
        size //= axis.size
    back = factor[backward] if sent[0].requires_grad and made[0].requires_grad else 0
    behind = list(order)[order[node] + 1 : order[arrival(node)]]
    if not factor[forward] and not back:
        return None
    operators = sum(name_of(n) == "lsmc.fwd" for n in behind)
    return Message(axis.name, forward, backward if back else "", _of(node), int(size * factor[forward]), int(size * back),
                   len(behind), operators)


def _of(node: Node) -> str:
    """What it is for: the gradient of a parameter, the memories of an operator, or a line of the model."""
    first = node
    while getattr(first.target, "namespace", "") == "lsmc":
        first = first.all_input_nodes[0]
    if isinstance(example(first), torch.nn.Parameter):
        return PARAMETERS
    if "lsm" in node.meta:
        what = "tokens for heads" if name_of(node) == "lsmc.traded" else "memories"
        return f"{what} of {node.meta['lsm'].name}"
    return (source(node) or ["", "arguments"])[1]


__all__ = ["PARAMETERS", "Message", "arrival", "capture", "messages", "parse", "totals", "trace", "traffic"]
