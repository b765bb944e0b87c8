"""Spreading a graph over the ranks of one axis: splits grow out of seeds, and collectives stand where they end.

Seeds say how the operands and results of some nodes are split (the heads of an LSM operator, say). `Growth` carries each
split to all tensors whose dimensions correspond to it (`plans.dims`), forward and backward, as far as there are rules.
`Deal` then writes the graph anew. A tensor in it is

| state | means | its cotangent is |
|---|---|---|
| whole | the same on all ranks, and so is all that uses it | whole |
| inner | the same on all ranks, used together with what is split | partial |
| a `Split` | each rank has its part | split |
| partial | the sum over the ranks is meant | whole |

and a call computes with split operands where its result is split, or a sum over what is split: then it is partial. Between
states stand the operators of `lsmc.runtime.collectives`, so that every gradient is that of one process.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lsmc.lowering.absorb import mutates
from lsmc.runtime import collectives
from lsmc.runtime.errors import LsmMeshError
from lsmc.runtime.insert import Writer, example, mode_of
from lsmc.runtime.mesh import Axis
from lsmc.runtime.plans.dims import (
    LINEAR,
    REPEATS,
    Link,
    Split,
    argument,
    arguments,
    dim_of,
    links,
    over_dims,
    shape_of,
    sizes_of,
)
from lsmc.runtime.spread import name_of

WHOLE, INNER, PARTIAL = "whole", "inner", "partial"
State = Split | str
Layouts = Mapping[Node, Split]
Plan = Callable[[GraphModule, Axis], Layouts]
"""Which tensors of a graph are split; raises LsmMeshError where what must be cannot be."""


class Growth:
    """How far splits reach in one graph."""

    def __init__(self, module: GraphModule) -> None:
        self.around: dict[Node, list[Link]] = defaultdict(list)
        for node in module.graph.nodes:
            for link in links(node):
                self.around[link.operand].append(link)
                self.around[link.result].append(link)

    def of(self, seeds: Mapping[Node, Split]) -> dict[Node, Split]:
        """All tensors that are split when the seeds are. Where two ways of splitting meet, the first stays."""
        found = dict(seeds)
        queue = deque(found)
        while queue:
            node = queue.popleft()
            for link in self.around[node]:
                other, carry = (link.result, link.forth) if node is link.operand else (link.operand, link.back)
                split = carry(found[node])
                if split is None:
                    continue
                before = found.get(other)
                after = split if before is None else before.merged(split)
                if after is not None and after != before:
                    found[other] = after
                    queue.append(other)
        return found


class Deal:
    """One graph, written anew for the ranks of an axis."""

    def __init__(self, module: GraphModule, axis: Axis, layouts: Layouts) -> None:
        self.module, self.axis, self.layouts = module, axis, layouts
        self.graph = Graph()
        self.writer = Writer(self.graph, mode_of(module))
        self.made: dict[Node, Any] = {}
        self.state: dict[Node, State] = {}
        self.converted: dict[tuple[Node, State], Any] = {}
        self.wanted: dict[Node, dict[Node, State]] = defaultdict(dict)  # of what is whole, by whom and how
        self.changes: list[str] = []

    def run(self) -> list[str]:
        """Write the graph anew; says what is made whole, and for what."""
        regions: list[Any] = []
        try:
            with torch.enable_grad():
                self._run(regions)
        finally:
            for region in reversed(regions):  # an error left them open
                region.__exit__(None, None, None)
        return self.changes

    def _run(self, regions: list[Any]) -> None:
        for node in self.module.graph.nodes:
            self.writer.origin = node
            if name_of(node) in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled"):
                args = map_arg(arguments(node), lambda n: self.made[n])
                self.made[node] = self.writer.call(node, args, {})  # for what follows, also here
                if name_of(node) == "_enter_autocast":
                    regions.append(self.made[node].example)
                elif name_of(node) == "_exit_autocast":
                    regions.remove(args[0].example)
                self.state[node] = WHOLE
            elif node.op in ("call_function", "call_method"):
                self._check_writes(node)
                self.state[node] = self._inside(node) or self._outside(node)
                self.made[node].node.meta["whole"] = self.state[node] == WHOLE  # for `plans.between`
            else:
                self._outside(node)
                self.state[node] = WHOLE
        for node in reversed(self.graph.nodes):  # joined for nothing: their parts are what is used
            if name_of(node) == "lsmc.joined" and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        self.module.graph = self.graph
        self.module.recompile()

    def _check_writes(self, node: Node) -> None:
        """What is written in place must have no other copies: parts, or the whole of parts."""
        copied = {n for n, _ in self.converted} | {n for n, state in self.state.items() if state != WHOLE}
        if mutates(node) and any(n in copied for n in node.all_input_nodes):
            raise LsmMeshError(f"axis {self.axis.name!r} splits what {node.format_node()} writes in place")

    # -- states

    def take(self, node: Node, want: State) -> Any:
        """A node's value in another state, as a proxy; made once."""
        have, x = self.state[node], self.made[node]
        if have == WHOLE and self.writer.origin is not None:
            self.wanted[node][self.writer.origin] = want
        if have == want or not isinstance(example(node), Tensor):
            return x
        if have == WHOLE and want == INNER and not example(node).requires_grad:
            return x
        if (node, want) not in self.converted:
            if want == WHOLE:
                made = self._to_whole(node, have, x)
            else:
                whole = x if have == WHOLE else self.take(node, WHOLE)
                made = collectives.shared(whole, self.axis) if want == INNER else self._deal(whole, want)
            self.converted[node, want] = made
        return self.converted[node, want]

    def _deal(self, x: Any, split: State) -> Any:
        assert isinstance(split, Split)
        how = split.dim, split.flat()
        if name_of(x.node) == "lsmc.joined" and list(x.node.args[1:]) == [*how, self.axis.size, self.axis.group]:
            mine = self.writer.proxy(x.node.args[0])
            all_dealt = mine.shape[split.dim] * self.axis.size == x.shape[split.dim]
            return mine if all_dealt else collectives.kept(mine, *how, self.axis)
        return collectives.dealt(x, *how, self.axis)

    def _to_whole(self, node: Node, have: State, x: Any) -> Any:
        self.changes.append(f"{node.name}, {have}, is made whole for {', '.join(u.name for u in node.users)}")
        if have == PARTIAL:
            return collectives.summed(x, self.axis)
        if have == INNER:
            return collectives.summed(x / self.axis.size, self.axis)
        assert isinstance(have, Split)
        if not have.covers(shape_of(node)[have.dim]):
            raise LsmMeshError(f"axis {self.axis.name!r} splits {node.name} along {have}, which {next(iter(node.users)).name} "
                               "needs whole")
        return collectives.joined(x, have.dim, have.flat(), self.axis)

    # -- calls

    def _outside(self, node: Node) -> State:
        """The call as it is, of whole tensors."""
        copied = self.graph.node_copy(node, lambda n: self._node(self.take(n, WHOLE)))
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
        self.made[node] = self.writer.proxy(copied)
        return WHOLE

    def _node(self, x: Any) -> Node:
        return x.node

    def _call(self, node: Node, want: Mapping[Node, State], args: Any = None, target: Any = None) -> None:
        """The call, of operands in the wanted states (inner where nothing is wanted)."""
        def given(n: Node) -> Any:
            return self.take(n, want.get(n, INNER))

        args = map_arg(arguments(node) if args is None else args, given)
        kwargs = map_arg(node.kwargs, given)
        try:
            self.made[node] = self.writer.create_proxy(node.op, target or node.target, tuple(args), kwargs)
        except Exception as error:
            raise LsmMeshError(f"axis {self.axis.name!r} cannot split {node.format_node()}: {error}") from error

    def _inside(self, node: Node) -> State | None:
        """The call of parts, where it can be one; the state of its result."""
        operands = [n for n in node.all_input_nodes if n in self.state]
        name = name_of(node)
        special = getattr(self, "_" + name.replace(".", "_"), None) if name in self.SPECIAL else None
        if special is not None:
            state = special(node)
            if state is not None:
                return state
        if not isinstance(example(node), Tensor):
            return None
        split = self.layouts.get(node)
        if split is not None:
            want: dict[Node, State] = {}
            reached = False
            for link in links(node):
                if link.result is node:
                    back = link.back(split)
                    reached |= back is not None
                    if back is not None:
                        want[link.operand] = back
            if reached or (name in REPEATS and links(node)):
                self._call(node, want, args=self._local(node, split))
                self._check(node, split)
                return split
            return None
        states = {self.state[n] for n in operands if isinstance(example(n), Tensor)}
        if states == {PARTIAL} and (name in LINEAR or (name in ("add", "sub") and len(operands) == 2)):
            self._call(node, dict.fromkeys(operands, PARTIAL))
            return PARTIAL
        if INNER in states and links(node) and all(
            self.state[n] == INNER or n.op in ("placeholder", "get_attr") or not example(n).requires_grad for n in operands
            if isinstance(example(n), Tensor) and (self.state[n] in (INNER, WHOLE))
        ) and states <= {INNER, WHOLE}:  # fmt: skip
            self._call(node, {})
            return INNER
        return None

    def _check(self, node: Node, split: Split) -> None:
        """What is computed has the shape of a part."""
        wanted = list(shape_of(node))
        wanted[split.dim] = split.local(wanted[split.dim], self.axis.size)
        if list(self.made[node].shape) != wanted:
            raise LsmMeshError(f"axis {self.axis.name!r} cannot split {node.format_node()}: of parts it is "
                               f"{tuple(self.made[node].shape)}, not {tuple(wanted)}")

    def _local(self, node: Node, split: Split) -> Any:
        """The arguments, with sizes of parts where they name sizes of the result."""
        name, args = name_of(node), arguments(node)

        def part(size: Any, dim: int) -> Any:
            return split.local(size, self.axis.size) if dim == split.dim and isinstance(size, int) and size > 0 else size

        if name in ("view", "reshape", "expand"):
            if len(args) == 2 and isinstance(args[1], list | tuple):
                return (args[0], [part(n, i) for i, n in enumerate(args[1])])
            return (args[0], *(part(n, i) for i, n in enumerate(args[1:])))
        if name == "unflatten":
            dim = int(args[1]) % len(shape_of(args[0]))
            return (args[0], args[1], [part(n, dim + i) for i, n in enumerate(args[2])])
        return args

    # -- calls that sums, several results or parameters make special

    SPECIAL = frozenset({"linear", "matmul", "bmm", "mm", "sum", "split", "chunk", "unbind", "getitem", "lsmc.fwd",
                         "lsmc.moe_experts", "scaled_dot_product_attention"})  # fmt: skip

    def _summed_over(self, node: Any, dims: Collection[int]) -> Split | None:
        """How an operand is split, if along one of these dimensions, and all of it: then sums over it are partial."""
        split, shape = self.layouts.get(node), shape_of(node)
        over = split is not None and split.dim in {d % len(shape) for d in dims} and split.covers(shape[split.dim])
        return split if over else None

    def _linear(self, node: Node) -> State | None:
        x, w, bias = arguments(node)[0], argument(node, 1, "weight"), argument(node, 2, "bias")
        split = self._summed_over(x, (-1,))
        if split is None:
            return None
        self.made[node] = self.writer.create_proxy(
            "call_function", torch.nn.functional.linear, (self.take(x, split), self.take(w, Split(1, split.spans))), {})
        if bias is None:
            return PARTIAL
        whole = collectives.summed(self.made[node], self.axis)
        self.made[node] = whole + self.take(bias, WHOLE)
        return WHOLE

    def _matmul(self, node: Node) -> State | None:
        a, b = arguments(node)[0], arguments(node)[1]
        split = self._summed_over(a, (-1,))
        if split is None or len(shape_of(b)) < 2:
            return None
        self._call(node, {a: split, b: Split(len(shape_of(b)) - 2, split.spans)})
        return PARTIAL

    _bmm = _mm = _matmul

    def _sum(self, node: Node) -> State | None:
        x = arguments(node)[0]
        split = self._summed_over(x, over_dims(node))
        if split is None:
            return None
        self._call(node, {x: split})
        return PARTIAL

    def _split(self, node: Node) -> State | None:
        x = arguments(node)[0]
        split = self.layouts.get(x)
        if split is None:
            return None
        sizes, dim = sizes_of(node), dim_of(node)
        if split.dim == dim:
            start, local = 0, []
            for size in sizes:
                inside = frozenset(s for s in split.spans if start <= s[0] and s[1] <= start + size)
                local.append(Split(dim, inside).local(size, self.axis.size))
                start += size
            if sum(local) != split.local(start, self.axis.size):
                return None
            sizes = local
        self.made[node] = self.writer.create_proxy("call_function", torch.split, (self.take(x, split), sizes, dim), {})
        return split

    _chunk = _split

    def _unbind(self, node: Node) -> State | None:
        split = self.layouts.get(arguments(node)[0])
        if split is None or split.dim == dim_of(node):
            return None
        self._call(node, {arguments(node)[0]: split})
        return split

    def _getitem(self, node: Node) -> State | None:
        source = arguments(node)[0]
        if isinstance(example(source), Tensor) or self.state[source] == WHOLE:
            return None
        self.made[node] = self.writer.create_proxy(node.op, node.target, (self.made[source], arguments(node)[1]), {})
        if self.state[source] == PARTIAL:
            return PARTIAL
        return self.layouts.get(node, INNER)

    def _lsmc_fwd(self, node: Node) -> State | None:
        given = [*arguments(node)[0], *arguments(node)[1]]
        if not any(n in self.layouts for n in given):
            return None
        self._call(node, {n: self.layouts.get(n, INNER) for n in given})
        return INNER

    def _scaled_dot_product_attention(self, node: Node) -> State | None:
        q, k, v = arguments(node)[:3]
        if node not in self.layouts:
            return None
        self._call(node, {n: self.layouts[n] for n in (q, k, v)})
        return self.layouts[node]

    def _lsmc_moe_experts(self, node: Node) -> State | None:
        w_in, w_out = arguments(node)[3], arguments(node)[4]
        if w_in not in self.layouts:
            return None
        self._call(node, {w_in: self.layouts[w_in], w_out: self.layouts[w_out]})
        return PARTIAL


def deal(module: GraphModule, axis: Axis, plan: Plan) -> list[str]:
    """Spread a graph, and those nested in it, over an axis; says what was changed."""
    return [change for made in _deals(module, axis, plan).values() for change in made.changes]


def _deals(module: GraphModule, axis: Axis, plan: Plan) -> dict[GraphModule, Deal]:
    made = {inner: Deal(inner, axis, plan(inner, axis)) for inner in module.modules() if isinstance(inner, GraphModule)}
    for one in made.values():
        one.run()
    return made


def dealt_inputs(module: GraphModule, axis: Axis, plan: Plan) -> dict[int, Split]:
    """The inputs of a graph, by number, that it uses in one way alone, dealt out; the graph is spent."""
    before = {inner: list(inner.graph.nodes) for inner in module.modules() if isinstance(inner, GraphModule)}
    made = _deals(module, axis, plan)

    def uses(inner: GraphModule, node: Node) -> Iterator[State]:
        for user, state in made[inner].wanted[node].items():
            bodies = [n for n in user.all_input_nodes if n.op == "get_attr"]
            body = getattr(inner, str(bodies[0].target)) if bodies else None
            if isinstance(body, GraphModule):
                given = [n for n in arguments(user) if n is not bodies[0]]
                for place, inside in zip(given, (n for n in before[body] if n.op == "placeholder")):
                    if place is node:
                        yield from uses(body, inside)
            else:
                yield state

    found = {}
    for i, node in enumerate(n for n in before[module] if n.op == "placeholder"):
        states = set(uses(module, node))
        if len(states) == 1 and isinstance(state := states.pop(), Split):
            found[i] = state
    return found


__all__ = ["Deal", "Growth", "Layouts", "Plan", "deal", "dealt_inputs"]
