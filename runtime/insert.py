"""Collectives enter the graph: the plans of a mesh, in a listed order, each `graph → graph` with a log of what it changed.

A plan spreads a graph that means whole tensors over one axis. It rewrites what Dynamo captured, before autograd: the
backward collectives come from `lsmc.runtime.collectives`, and caches see the graph as it runs. Plans write new nodes with
a `Writer`, whose values know their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from lsmc.lowering.absorb import mutates
from lsmc.runtime.mesh import Axis

Plan = Callable[..., list[str]]
"""(module, axis, …): spreads a graph, with the graphs nested in it, over an axis or several; says what it changed."""


_INSIDE = (str(Path(torch.__file__).parent), *(str(Path(__file__).parents[1] / name) for name in ("lowering", "api.py", "lsm.py")))
"""Where the lines are that tell a user nothing."""

ISSUED = (torch.ops._c10d_functional.all_gather_into_tensor.default, torch.ops._c10d_functional.reduce_scatter_tensor.default)


def hasten(graph: Graph) -> None:
    """Compute first what is sent, and what does not need the answer while it is under way.

    Between the arrival of one message and the next, what feeds the message comes first, then the message, then the rest.
    Regions (autocast, no_grad) and writes in place keep their places.
    """
    waits = {n: next((u for u in n.users if "wait_tensor" in str(u.target)), None) for n in graph.nodes if n.target in ISSUED}
    last, seen = next(iter(graph.nodes)).prev, set[Node]()

    def place(node: Node) -> None:
        nonlocal last
        if node not in seen:
            seen.add(node)
            if last.next is not node:
                last.append(node)
            last = node

    block: list[Node] = []
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output") or _fixed(node):
            for n in (*block, node):
                place(n)
            block = []
            continue
        block.append(node)
        sent = next((n for n, wait in waits.items() if wait is node and n in block), None)
        if sent is not None:
            needed = _ancestors(sent, set(block))
            for n in (*(n for n in block if n in needed), *block):
                place(n)
            block = []
    for n in block:
        place(n)


def _fixed(node: Node) -> bool:
    return mutates(node) or (node.op.startswith("call") and not tensors(node.meta.get("example_value")))


def _ancestors(node: Node, among: set[Node]) -> set[Node]:
    found, todo = {node}, [node]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n in among and n not in found]
        found |= set(new)
        todo += new
    return found


def passes(axes: Mapping[str, Axis],
           plans: Iterable[tuple[str, tuple[str, ...], Plan]]) -> dict[str, Callable[[GraphModule], list[str]]]:  # fmt: skip
    """The passes that a mesh needs, by name, in the order of the plans (name, axes, plan)."""
    def on(plan: Plan, given: list[Axis]) -> Callable[[GraphModule], list[str]]:
        return lambda module: plan(module, *given)

    found = [(name, plan, [axes[axis] for axis in served if axis in axes]) for name, served, plan in plans]
    return {name: on(plan, given) for name, plan, given in found if given}


if TYPE_CHECKING:

    class _Proxy(Tensor):  # what a type checker may take a proxy for
        node: Node

else:
    _Proxy = Proxy


class Value(_Proxy):
    """A node under construction that has the shape, type and device of what it will compute."""

    @property
    def example(self) -> Any:
        return self.node.meta.get("example_value")

    if not TYPE_CHECKING:
        shape, dtype, device, ndim, requires_grad = (
            property(lambda self, name=name: getattr(self.example, name))
            for name in ("shape", "dtype", "device", "ndim", "requires_grad")
        )

    def dim(self) -> int:
        return self.ndim


class Writer(GraphAppendingTracer):
    """Appends nodes to a graph and works out at once, on fake tensors, what they compute.

    `origin` is the node that is being rewritten: new nodes take over its place in the user's source.
    """

    def __init__(self, graph: Graph, mode: FakeTensorMode) -> None:
        super().__init__(graph)
        self.mode = mode
        self.origin: Node | None = None

    def proxy(self, node: Node) -> Any:
        return Value(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None,
                    type_expr: Any = None) -> Node:  # fmt: skip
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if self.origin is not None:
            node.meta |= {k: v for k, v in self.origin.meta.items() if k != "example_value"}
        if kind in ("call_function", "call_method"):
            node.meta["example_value"] = self._computed(node)
        return node

    def _computed(self, node: Node) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        with self.mode:
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def attribute(self, module: GraphModule, node: Node) -> Value:
        """A copy of the node that takes an attribute of `module`."""
        made = self.graph.node_copy(node)
        value = getattr(module, str(node.target), None)
        if isinstance(value, Tensor) and "example_value" not in made.meta:
            made.meta["example_value"] = self.mode.from_tensor(value)
        return self.proxy(made)

    def call(self, node: Node, args: Any, kwargs: Any) -> Value:
        """The same call as `node`, of other arguments."""
        made: Any = self.create_proxy(node.op, node.target, tuple(args), kwargs)
        return made


def mode_of(module: GraphModule) -> FakeTensorMode:
    """The mode of the example values, which is not the one that is active while a backend runs."""
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def example(node: Node) -> Any:
    """What a node was seen to compute; None where that is no tensor and holds none."""
    return node.meta.get("example_value")


def source(node: Node) -> list[str]:
    """The place in the user's source that a node comes from, and the line there; nothing if that is not known."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    lines = [i for i, line in enumerate(trace) if line.startswith("File ") and not any(part in line for part in _INSIDE)]
    return [trace[lines[-1]].removeprefix("File "), trace[lines[-1] + 1]] if lines else []


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested value, in order."""
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


__all__ = ["Plan", "Value", "Writer", "example", "hasten", "mode_of", "passes", "source", "tensors"]
