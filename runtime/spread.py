"""A graph of whole tensors → the graph in which each rank of an axis holds its part: where the parts of every value lie.

The graph was captured at the sizes of the whole, so that every constant in it (a number of tokens that divides, the end of
a range of positions) is that of one process. It is run once, node by node, on fake parts. A node whose operands are whole
stays as it is; for others the table `RULES` says what their function does to parts: the names of functions, methods and
operators stand for what is known to leave the parts apart. Where they meet, a sum over tokens becomes the sum over the
ranks too; and what would mix them otherwise is refused by its name and line. A whole value that meets parts is cut where
it has their dimension, and is `shared` where it has not: each rank then has a share of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from lsmc.errors import LsmError
from lsmc.lowering import ops
from lsmc.lowering.absorb import mutates
from lsmc.lowering.torch_maps import NAMES
from lsmc.lowering.torch_maps import POINTWISE as MAPS
from lsmc.runtime import collectives
from lsmc.runtime.errors import LsmMeshError
from lsmc.runtime.insert import Value, Writer, example, hasten, mode_of, source
from lsmc.runtime.mesh import AXES, Axis


@dataclass(frozen=True)
class Split:
    """Where the parts of a value lie: dimension `dim` holds `outer` blocks of `size` entries in all, of which a part has its
    share, each of them as many numbers as are left; `ahead` entries of the part before come first."""

    dim: int
    size: int
    outer: int = 1
    ahead: int = 0

    def local(self, shape: Sequence[int], ranks: int) -> tuple[int, ...]:
        """The shape of a part, from that of the whole."""
        n = shape[self.dim]
        return (*shape[: self.dim], (n - self.ahead) // ranks + self.ahead, *shape[self.dim + 1 :])


SMALL = 1 << 18
"""Numbers up to which a gradient is sent together with others: a megabyte in float32 takes about as long as the latency alone."""

Rule = Callable[..., Any]
"""rule(spread, node, *args, **kwargs): the value of `node` for parts, its place marked; a tuple of them where it has several."""


def name_of(node: Node) -> str:
    """The name by which the tables know what a node calls."""
    target = node.target
    if target in NAMES:
        return NAMES[target]
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        space, name = target._qualified_op_name.split("::")
        return name if space == "aten" else f"{space}.{name}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


class Spread:
    """Rewrites one graph, and the graphs in it, for one axis; `dim` is where its inputs are split."""

    def __init__(self, axis: Axis, dim: int, rules: Mapping[str, Rule]) -> None:
        self.axis, self.dim, self.rules = axis, dim, rules
        self.changes: list[str] = []
        self.regions: list[Any] = []

    # -- whole graphs

    def run(self, module: GraphModule) -> list[str]:
        """Rewrite `module` in place: whole tensors in, whole tensors out. Says what was changed."""
        try:
            with torch.enable_grad():
                self._graph(module, None)
        finally:
            for region in reversed(self.regions):  # an error left them open
                region.__exit__(None, None, None)
        return self.changes

    def _graph(self, module: GraphModule, given: Sequence[tuple[Any, Split | None]] | None) -> tuple[Any, Any]:
        """Rewrite a graph whose inputs are (example, place), or whole; the examples and places of its outputs."""
        old, new = module.graph, Graph()
        self.module, self.writer = module, Writer(new, mode_of(module))
        self.env: dict[Node, Any] = {}
        self.place: dict[Node, Any] = {}
        self.memo: dict[Any, Value] = {}
        self.bodies: dict[Any, tuple[Any, Any]] = {}
        result: Any = (None, None)
        inputs = [n for n in old.nodes if n.op == "placeholder"]
        for node, known in zip(inputs, given if given is not None else [None] * len(inputs), strict=True):
            made = new.node_copy(node)
            if hasattr(node, "_dynamo_source"):
                made._dynamo_source = node._dynamo_source
            self.env[node] = value = self.writer.proxy(made)
            if known is not None:
                made.meta["example_value"] = known[0]
                self.mark(value, known[1])
        if given is None:
            for node in self._inputs(inputs):
                size = example(node).shape[self.dim]
                self.writer.origin = None
                self.env[node] = self.mark(collectives.part(self.env[node], self.dim, self.axis), Split(self.dim, size))
        for node in old.nodes:
            self.writer.origin = node
            if node.op == "get_attr":
                self.env[node] = self.writer.attribute(module, node)
            elif node.op == "output":
                values = map_arg(node.args[0], lambda n: self.env[n])
                if given is None:
                    values = _mapped(self._whole, values)
                result = _mapped(lambda v: v.example, values), _mapped(self.of, values)
                new.output(_mapped(lambda v: v.node, values)).meta.update(node.meta)
            elif node.op != "placeholder" and (node.users or name_of(node) != "getitem"):
                self.env[node] = self._call(node)
        for node in reversed(new.nodes):  # whole values that were needed in parts only
            if not node.users and node.op.startswith("call") and name_of(node) in POINTWISE | _LAYOUTS and not mutates(node):
                new.erase_node(node)
        for value in self.env.values():
            if isinstance(value, Value) and value.node.op == "placeholder" and self.of(value) is None:
                self._share_once(value)
        self._share_together()
        hasten(new)
        module.graph = new
        new.lint()
        module.recompile()
        return result

    def _share_once(self, value: Value) -> None:
        """Where all that an input becomes is shared, share the input: one sum over the ranks for all of its gradient."""
        found: list[Node] = []

        def ends(node: Node) -> bool:
            for user in node.users:
                if user.target is torch.ops.lsmc.shared.default and user.args[1] == self.axis.group:
                    found.append(user)
                elif user.op == "output" or user in self.place or user.all_input_nodes != [node] or not ends(user):
                    return False
            return True

        if not isinstance(value.example, Tensor) or not value.requires_grad or not ends(value.node):
            return
        if not found or [n.args[0] for n in found] == [value.node]:
            return
        users = list(value.node.users)
        self.writer.origin = None
        with self.writer.graph.inserting_before(min(users)):
            whole = collectives.shared(value, self.axis).node
        for user in users:
            user.replace_input_with(value.node, whole)
        for node in found:
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.writer.graph.erase_node(node)

    def _share_together(self) -> None:
        """One message for the gradients of all small inputs of a type: a message costs its latency, whatever is in it."""
        found: dict[torch.dtype, dict[Node, Node]] = {}
        for node in self.writer.graph.nodes:
            if node.target is torch.ops.lsmc.shared.default and node.args[1] == self.axis.group:
                (given,) = node.all_input_nodes
                if _given(given) and example(node).requires_grad and example(node).numel() <= SMALL:
                    found.setdefault(example(node).dtype, {})[node] = given
        self.writer.origin = None
        for nodes in (nodes for nodes in found.values() if len(nodes) > 1):
            last = max(nodes.values())
            with self.writer.graph.inserting_before(next(n for n in self.writer.graph.nodes if n > last and n.op != "placeholder")):
                made = collectives.shared_all([self.writer.proxy(given) for given in nodes.values()], self.axis)
                pieces = [made[i].node for i in range(len(nodes))]
            for node, piece in zip(nodes, pieces):
                node.replace_all_uses_with(piece)
                self.writer.graph.erase_node(node)

    def _inputs(self, nodes: Sequence[Node]) -> list[Node]:
        """The inputs that are split: tensors (B, T, …) with the B and T of the operators, or else of most inputs."""
        leading: dict[tuple[int, ...], list[Node]] = {}
        for node in nodes:
            x = example(node)
            if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter) and "_buffers_" not in node.name and x.ndim > 1:
                if any(not isinstance(n, int) for n in x.shape):
                    raise LsmMeshError(f"{_shown(node)} has a size that is not known before it runs", help="leave out mark_dynamic")
                leading.setdefault(tuple(x.shape[:2]), []).append(node)
        for _, node in ops.in_graph(self.module):  # its batch may have been split already
            given: Any = node.args[0]
            size = ops.extents(ops.plan_of(str(node.args[3])), [example(n) for n in given])
            known = {bt: found for bt, found in leading.items() if bt[0] % size.batch == 0 and bt[1] == size.tokens}
            leading = known or leading
            if self.dim == 0 and node.args[2] is not None:
                raise self.refused(node, "has packed sequences (cu_seqlens), which are one batch: axis 'sp' splits them")
        what = AXES[self.axis.name]
        if not leading:
            raise LsmMeshError(f"no argument of the model holds {what}, which axis {self.axis.name!r} splits",
                               help="pass a tensor (B, T, …)")
        found = max(leading.values(), key=len)
        names = ", ".join(map(_shown, found))
        self.axis.share(example(found[0]).shape[self.dim], f"the size of {what}, dimension {self.dim} of {names},")
        self.changes.append(f"dimension {self.dim} of {names} is dealt out to {self.axis.size} ranks")
        return found

    def _call(self, node: Node) -> Any:
        args, kwargs = self._operands(node, self.env.__getitem__)
        if name_of(node) == "getitem" and isinstance(args[0], tuple):
            return args[0][args[1]]
        if not any(self.of(v) is not None for v in _values((args, kwargs))):
            return self._copied(node, args, kwargs)
        rule = self.rules.get(name_of(node))
        if rule is None:
            raise self.refused(node, "is not known to keep them apart")
        try:
            value = rule(self, node, *args, **kwargs)
        except LsmError:
            raise
        except Exception as error:  # arguments that no rule knows
            raise self.refused(node, f"is called in a way that is not known to keep them apart ({error})") from error
        if isinstance(value, tuple):
            pairs = [(v.example, self.of(v)) for v in value]
        else:
            pairs = list(zip(tree_leaves(value.example), self._places(value)))
        for (x, split), whole in zip(pairs, tree_leaves(example(node))):
            if isinstance(x, Tensor):
                wanted = whole.shape if split is None else split.local(whole.shape, self.axis.size)
                if tuple(x.shape) != tuple(wanted):
                    raise self.refused(node, f"makes {tuple(x.shape)} of a part and {tuple(whole.shape)} of the whole")
        return value

    @staticmethod
    def _operands(node: Node, value: Callable[[Node], Any]) -> tuple[Any, Any]:
        operands: Any = map_arg((node.args, node.kwargs), value)
        return operands

    def _copied(self, node: Node, args: Any, kwargs: Any) -> Value:
        """A node of whole operands, as it was."""
        name, value = name_of(node), example(node)
        if name in ("_enter_autocast", "_set_grad_enabled", "_exit_autocast"):
            made = self.writer.call(node, args, kwargs)  # for what follows, also here
            if name == "_enter_autocast":
                self.regions.append(made.example)
            elif name == "_exit_autocast":
                self.regions.remove(args[0].example)
            return made
        a, k = _mapped(lambda v: v.node, (args, kwargs))
        new = self.writer.graph.create_node(node.op, node.target, a, k, name=node.name)
        new.meta = dict(node.meta)
        new.meta["example_value"] = value
        return self.writer.proxy(new)

    # -- places

    def of(self, value: Any) -> Any:
        """The place of the parts of a value: a Split, None of a whole, or several of them."""
        return self.place.get(value.node)

    def mark(self, value: Any, split: Any) -> Any:
        """Say where the parts of a value lie."""
        if split is not None:
            self.place[value.node] = split
        return value

    def _places(self, value: Value) -> list[Any]:
        found = self.of(value)
        return list(found) if isinstance(found, tuple) else [found] * len(tree_leaves(value.example))

    def follow(self, node: Node, value: Any, before: Split) -> Any:
        """The parts stayed apart: they lie along the one dimension in which part and whole differ."""
        def place(x: Any, whole: Any) -> Split | None:
            if not isinstance(x, Tensor):
                return None
            moved = [d for d, (a, b) in enumerate(zip(x.shape, whole.shape, strict=True)) if a != b]
            if len(moved) != 1:
                raise self.refused(node, f"makes {tuple(x.shape)} of a part and {tuple(whole.shape)} of the whole")
            return replace(before, dim=moved[0])

        if isinstance(value.example, tuple | list):
            return self.mark(value, tuple(place(x, w) for x, w in zip(value.example, example(node), strict=True)))
        return self.mark(value, place(value.example, example(node)))

    def again(self, node: Node, args: Any, kwargs: Any, before: Split) -> Any:
        """The same call of parts, which it keeps apart; whole operands are shared."""
        args, kwargs = _mapped(self.used, (args, kwargs))
        return self.follow(node, self.writer.call(node, args, kwargs), before)

    def used(self, value: Any) -> Any:
        """A value as an operand beside parts."""
        if self.of(value) is not None or not isinstance(value.example, Tensor) or not value.requires_grad:
            return value
        if ("shared", value.node) not in self.memo:
            self.memo["shared", value.node] = collectives.shared(value, self.axis)
        return self.memo["shared", value.node]

    def rank(self) -> Any:
        """The rank along the axis."""
        if "rank" not in self.memo:
            first = next(n for n in self.writer.graph.nodes if n.op == "placeholder" and isinstance(example(n), Tensor))
            self.memo["rank"] = collectives.rank(self.writer.proxy(first), self.axis)
        return self.memo["rank"]

    def taken(self, value: Any, dim: int) -> Any:
        """This rank's part of a whole value along `dim`; of ranges and what is computed from them, only the part."""
        key = ("part", value.node, dim)
        if key not in self.memo:
            self.memo[key] = self._taken(value, dim)
        return self.memo[key]

    def _taken(self, value: Any, dim: int) -> Any:
        node, name, n = value.node, name_of(value.node), self.axis.share(value.shape[dim], "a dimension")
        args, kwargs = self._operands(node, self.writer.proxy)
        if value.requires_grad:
            return collectives.part(value, dim, self.axis)
        if name == "arange" and len(args) < 3 and all(isinstance(x, int) for x in args) and set(kwargs) <= {"device", "dtype"}:
            index = self.writer.create_proxy("call_function", torch.arange, (n,), {"device": value.device})
            return (index + (self.rank() * n + (args[0] if len(args) == 2 else 0))).to(value.dtype)
        if name in POINTWISE:
            def fit(x: Any) -> Any:
                d = dim - value.ndim + x.ndim if isinstance(x, Value) and isinstance(x.example, Tensor) else -1
                return self.taken(x, d) if d >= 0 and x.shape[d] == value.shape[dim] else x

            return self.writer.call(node, *tree_map(fit, (args, kwargs)))
        if name == "getitem" and isinstance(args[1], tuple) and all(x is None or x == slice(None) for x in args[1]):
            if args[1][dim : dim + 1] != (None,):
                return self.writer.call(node, (self.taken(args[0], dim - args[1][:dim].count(None)), args[1]), kwargs)
        return collectives.part(value, dim, self.axis)

    def _whole(self, value: Any) -> Any:
        """All parts of an output."""
        split = self.of(value)
        if split is None:
            return value
        assert isinstance(split, Split)
        if split.ahead:
            raise LsmMeshError(f"an output holds tokens twice over axis {self.axis.name!r}")
        return self._joined(value, collectives.whole)

    def _joined(self, value: Any, join: Callable[..., Any]) -> Any:
        """All parts of a value side by side."""
        split = self.of(value)
        if split.outer == 1:
            return join(value, split.dim, self.axis)
        return join(value.unflatten(split.dim, (split.outer, -1)), split.dim + 1, self.axis).flatten(split.dim, split.dim + 1)

    def global_shape(self, value: Value) -> tuple[int, ...]:
        """The shape of the whole of which `value` is a part."""
        split, shape = self.of(value), list(value.shape)
        if split is not None:
            shape[split.dim] = (shape[split.dim] - split.ahead) * self.axis.size + split.ahead
        return tuple(shape)

    def only(self, node: Node, *values: Any) -> Split:
        """The place that the split ones among the values share, seen from their last dimension; refuses different ones."""
        found = {replace(s, dim=s.dim - v.ndim) for v in values if (s := self.of(v)) is not None}
        if len(found) != 1 or not all(isinstance(s, Split) for s in found):
            raise self.refused(node, "meets parts that lie along different dimensions")
        return found.pop()

    def refused(self, node: Node, why: str) -> LsmMeshError:
        """The error for a node that does not keep parts apart."""
        place = "".join(f"\n    {line}" for line in source(node))
        return LsmMeshError(f"axis {self.axis.name!r} splits {AXES[self.axis.name]}, and {name_of(node)} {why}{place}")


def _given(node: Node) -> bool:
    """Whether a value is an input, as it came or as one of several that are shared together."""
    return node.op == "placeholder" or (name_of(node) == "getitem" and name_of(node.all_input_nodes[0]) == "lsmc.shared_all")


def _shown(node: Node) -> str:
    """The name of an argument."""
    return node.name.removeprefix("l_").removesuffix("_")


def _values(nested: Any) -> list[Value]:
    return [v for v in tree_leaves(nested) if isinstance(v, Value)]


def _mapped(function: Callable[[Value], Any], nested: Any) -> Any:
    return tree_map(lambda v: function(v) if isinstance(v, Value) else v, nested)


# --- what functions do to parts


def pointwise(s: Spread, node: Node, *args: Any, **kwargs: Any) -> Value:
    """Functions of single numbers: operands are aligned by their last dimensions."""
    values = [v for v in _values((args, kwargs)) if isinstance(v.example, Tensor)]
    split = s.only(node, *values)

    def fit(v: Any) -> Any:
        if not isinstance(v, Value) or not isinstance(v.example, Tensor) or s.of(v) is not None:
            return v
        d = split.dim + v.ndim
        if d < 0 or v.shape[d] == 1:
            return s.used(v)
        return beside(s, node, v, split, d)

    value = s.writer.call(node, *tree_map(fit, (args, kwargs)))
    return s.mark(value, replace(split, dim=split.dim + value.ndim))


def beside(s: Spread, node: Node, v: Value, split: Split, dim: int) -> Value:
    """The part of a whole operand that stands beside parts of another."""
    if split.ahead:
        raise s.refused(node, "meets a whole value beside tokens that are there twice")
    part: Any = s.taken(v, dim) if split.outer == 1 else s.taken(v.unflatten(dim, (split.outer, -1)), dim + 1)
    return part if split.outer == 1 else part.flatten(dim, dim + 1)


def along(position: int, default: Any) -> Rule:
    """Functions along a dimension, the argument `dim` at a position: parts stay apart along others."""
    def rule(s: Spread, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
        split = s.of(x)
        if split is None or not isinstance(split, Split):
            raise s.refused(node, "meets parts in an operand that it does not go along")
        if split.dim in _dims(kwargs.get("dim", (x, *args)[position] if len(args) >= position else default), x.ndim):
            raise s.refused(node, "goes along the dimension that holds them")
        return s.again(node, (x, *args), kwargs, split)

    return rule


def _dims(dim: Any, rank: int) -> list[int]:
    if dim is None:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, list | tuple) else [dim])]


def reduction(s: Spread, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """sum and mean: along the parts, the sum over the ranks too."""
    split = s.of(x)
    dim = kwargs.get("dim", args[0] if args else None)
    if split.dim not in _dims(dim, x.ndim):
        return s.again(node, (x, *args), kwargs, split)
    if split.ahead:
        raise s.refused(node, "would count tokens twice")
    value = s.writer.call(node, (x, *args), kwargs)
    return collectives.summed(value / s.axis.size if name_of(node) == "mean" else value, s.axis)


def last(names: int) -> Rule:
    """Functions of the last dimensions, as many as the argument after x names (or one): norms."""
    def rule(s: Spread, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
        shape = kwargs.get("normalized_shape", args[0] if args and names else (0,))
        if s.of(x) is None or s.of(x).dim >= x.ndim - len(shape):
            raise s.refused(node, "goes along the dimension that holds them")
        return s.again(node, (x, *args), kwargs, s.of(x))

    return rule


def matmul(s: Spread, node: Node, a: Value, b: Value) -> Value:
    """Products of matrices: along a row, a column or a batch the parts stay apart; where they are contracted, they are summed."""
    sa, sb = s.of(a), s.of(b)
    da = None if sa is None else sa.dim - a.ndim
    db = None if sb is None else sb.dim - b.ndim
    inner = -2 if b.ndim > 1 else -1
    if da == -1 and db == inner and sa.ahead == sb.ahead == 0:
        return collectives.summed(s.writer.call(node, (a, b), {}), s.axis)
    if da == -1 or db == inner or (da is not None and db is not None and (da != db or da > -3)):
        raise s.refused(node, "contracts the dimension that holds them")

    def fit(v: Value, split: Split | None, d: int) -> Value:
        if split is not None or d > -3 or v.ndim + d < 0 or v.shape[d] == 1:
            return s.used(v)
        return s.taken(v, v.ndim + d)

    return s.follow(node, s.writer.call(node, (fit(a, sa, db or 0), fit(b, sb, da or 0)), {}), sa or sb)


def regroup(s: Spread, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Views that merge or divide dimensions: what lies before the parts in memory stays before them."""
    split, whole = s.of(x), tuple(example(node).shape)
    if split.ahead:
        raise s.refused(node, "regroups tokens that are there twice")
    before = math.prod(s.global_shape(x)[: split.dim]) * split.outer
    dim = next(d for d in range(len(whole)) if math.prod(whole[:d]) <= before < math.prod(whole[: d + 1]))
    outer, rest = divmod(before, math.prod(whole[:dim]))
    if rest or whole[dim] % (outer * split.size):
        raise s.refused(node, "divides the dimension that holds them")
    made = Split(dim, split.size, outer)
    return s.mark(x.reshape(made.local(whole, s.axis.size)), made)


def expand(s: Spread, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    split, whole = s.of(x), tuple(example(node).shape)
    made = replace(split, dim=split.dim - x.ndim + len(whole))
    return s.mark(x.expand(made.local(whole, s.axis.size)), made)


def layout(s: Spread, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Changes of the order of dimensions, and of those of size 1."""
    return s.again(node, (x, *args), kwargs, s.of(x))


def getitem(s: Spread, node: Node, x: Any, index: Any) -> Value:
    """An element of several, or a part of a tensor that takes all tokens; of tokens that are there twice, as many as there are."""
    split = s.of(x)
    if isinstance(x.example, tuple | list):
        return s.mark(s.writer.call(node, (x, index), {}), split[index])
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in parts):
        raise s.refused(node, "picks entries by a tensor")
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[at : at + 1] = [slice(None)] * (x.ndim - sum(i is not None and i is not Ellipsis for i in parts))
    source = [i for i, p in enumerate(parts) if p is not None][split.dim]
    chosen, size = parts[source], s.global_shape(x)[split.dim]
    if not isinstance(chosen, slice):
        raise s.refused(node, "takes one token")
    start, stop, step = chosen.indices(size)
    if (start, stop, step) == (0, size, 1):
        return s.follow(node, s.writer.call(node, (x, index), {}), split)
    if step != 1 or not split.ahead or stop - start != size - split.ahead:
        raise s.refused(node, f"takes the tokens from {start} to {stop}")
    parts[source] = slice(start, start + x.shape[split.dim] - split.ahead)
    return s.follow(node, s.writer.call(node, (x, tuple(parts)), {}), replace(split, ahead=0))


def everywhere(s: Spread, node: Node, x: Value, dim: int) -> Value:
    """All parts along a dimension, for what is split otherwise."""
    split = s.of(x)
    if split.dim != dim % x.ndim:
        return s.again(node, (x, dim), {}, split)
    value: Value = s._joined(x, collectives.gathered)
    s.memo["shared", value.node] = value  # its adjoint sums over the ranks
    return value


def joined(s: Spread, node: Node, xs: Sequence[Value], dim: int = 0, **kwargs: Any) -> Value:
    """cat and stack along another dimension."""
    dim = kwargs.pop("axis", dim)
    split = s.only(node, *xs)
    n = xs[0].ndim
    if name_of(node) != "stack" and (dim % n) == split.dim + n:
        raise s.refused(node, "joins along the dimension that holds them")
    values = [v if s.of(v) is not None else beside(s, node, v, split, split.dim + n) for v in xs]
    return s.follow(node, s.writer.call(node, (values, dim), kwargs), split)


def linear(s: Spread, node: Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if s.of(x) is None or s.of(x).dim == x.ndim - 1:
        raise s.refused(node, "contracts the dimension that holds them")
    return s.again(node, (x, weight, bias), {}, s.of(x))


def embedding(s: Spread, node: Node, index: Value, weight: Value, *args: Any, **kwargs: Any) -> Value:
    if s.of(index) is None:
        raise s.refused(node, "looks rows up in them")
    return s.again(node, (index, weight, *args), kwargs, s.of(index))


def padded(s: Spread, node: Node, x: Value, pad: Sequence[int], *args: Any, **kwargs: Any) -> Value:
    """Entries beside those that are there, along another dimension."""
    split = s.of(x)
    if any(pad[i : i + 2] if (i := 2 * (x.ndim - 1 - split.dim)) < len(pad) else ()):
        raise s.refused(node, "adds entries to the dimension that holds them")
    return s.again(node, (x, pad, *args), kwargs, split)


def made(s: Spread, node: Node, *args: Any, **kwargs: Any) -> Value:
    """New tensors of a given size: whole."""
    return s.writer.call(node, args, kwargs)


def scatter_add(s: Spread, node: Node, x: Value, dim: int, index: Value, values: Value) -> Value:
    """What all ranks add to a whole."""
    split = s.only(node, index, values)
    if s.of(x) is not None or split.dim + index.ndim != dim % index.ndim:
        raise s.refused(node, "adds to them")
    index, values = (v if s.of(v) is not None else beside(s, node, v, split, v.ndim + split.dim) for v in (index, values))
    zeros = x.new_zeros(tuple(x.shape))
    return x + collectives.summed(zeros.scatter_add(dim, index, values), s.axis)


def cross_entropy(s: Spread, node: Node, x: Value, target: Value, weight: Any = None, size_average: Any = None,
                  ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0) -> Value:
    """The mean over all targets that count, wherever they are."""
    if weight is not None or (size_average, reduce) != (None, None) or target.example.is_floating_point():
        raise s.refused(node, "has weights, class probabilities or arguments that are deprecated")
    split = s.of(x)
    if split is None or split.dim == min(1, x.ndim - 1):
        raise s.refused(node, "goes along the dimension that holds them")
    target = target if s.of(target) is not None else beside(s, node, target, split, 0)
    options: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if reduction == "none":
        return s.follow(node, F.cross_entropy(x, target, reduction="none", **options), split)
    total = F.cross_entropy(x, target, reduction="sum", **options)
    if reduction == "sum":
        return collectives.summed(total, s.axis)
    both = collectives.summed(torch.stack([total, (target != ignore_index).sum().to(total.dtype)]), s.axis)
    return both[0] / both[1]


def checkpointed(s: Spread, node: Node, body: Value, *args: Any, **kwargs: Any) -> Value:
    """A graph in the graph: rewritten as its operands come."""
    inner = getattr(s.module, str(body.node.target))
    given = [(v.example, s.of(v)) if isinstance(v, Value) else (v, None) for v in args]
    places = tuple(place for _, place in given)
    if inner not in s.bodies:
        within = type(s)(s.axis, s.dim, s.rules)
        within.changes, within.regions = s.changes, s.regions
        s.bodies[inner] = places, within._graph(inner, given)
    known, (values, found) = s.bodies[inner]
    if known != places:
        raise s.refused(node, "runs one region with parts that lie along different dimensions")
    a, k = _mapped(lambda v: v.node, ((body, *args), kwargs))
    new = s.writer.graph.create_node(node.op, node.target, a, k, name=node.name)
    new.meta = dict(node.meta) | {"example_value": values}
    value = s.writer.proxy(new)
    return s.mark(value, found)


def experts(s: Spread, node: Node, x: Value, weights: Value, index: Value, w_in: Value, w_out: Value) -> Value:
    """Tokens go to their experts on the rank where they are."""
    split = s.only(node, x, weights, index)
    value = s.writer.call(node, (x, weights, index, s.used(w_in), s.used(w_out)), {})
    whole = replace(split, dim=0)
    rows = replace(whole, outer=1)
    return s.mark(value, (whole, rows, rows, None))


def batched(s: Spread, node: Node, inputs: Sequence[Value], start: Sequence[Value], cu_seqlens: Any, spec: str) -> Any:
    """An LSM operator whose sequences are dealt out."""
    places = {split for v in (*inputs, *start) if (split := s.of(v)) is not None}
    if len(places) != 1 or (split := places.pop()) != Split(0, split.size):
        raise s.refused(node, "goes along the dimension that holds them")
    tokens = {f.name for f in ops.plan_of(spec).canonical.inputs if f.per == "token"}
    given = [v if s.of(v) is not None else s.taken(v, 0) if name in tokens else s.used(v)
             for name, v in zip(ops.plan_of(spec).inputs, inputs, strict=True)]
    first = [v if s.of(v) is not None else s.taken(v, 0) for v in start]
    made = s.writer.call(node, (given, first, None, spec), {})
    return tuple(s.mark(made[i], split) for i in range(1 + len(ops.plan_of(spec).carries)))


def attention(s: Spread, node: Node, q: Value, k: Value, v: Value, attn_mask: Any = None, dropout_p: float = 0.0,
              is_causal: bool = False, **kwargs: Any) -> Value:
    """Softmax attention whose sequences or heads are dealt out; dropout has been taken out (`plans.noise`)."""
    split = s.only(node, q, k, v)
    if split.dim > -3:
        raise s.refused(node, "goes along the dimension that holds them")
    if attn_mask is not None and s.of(attn_mask) is None and attn_mask.ndim >= -split.dim and attn_mask.shape[split.dim] != 1:
        attn_mask = s.taken(attn_mask, attn_mask.ndim + split.dim)
    options = {"attn_mask": attn_mask, "is_causal": is_causal, **kwargs}
    return s.again(node, (q, k, v), options, replace(split, dim=split.dim + q.ndim))


POINTWISE = frozenset({
    *MAPS, *"to float double half bfloat16 long int bool type clone contiguous detach".split(),
    *"eq ne lt le gt ge and_ or_ xor rshift logical_and logical_or logical_not bitwise_not invert where masked_fill".split(),
    *"maximum minimum floordiv floor_divide mod remainder rsub sign floor ceil round isfinite isnan isinf nan_to_num".split(),
    *"zeros_like ones_like empty_like full_like logaddexp lerp addcmul iadd isub imul itruediv log2 log10 exp2".split(),
    *"tan atan asin acos sinh cosh mish hardtanh hardswish hardsigmoid relu6 leaky_relu celu selu softsign".split(),
    "lsmc.shared", "lsmc.summed", "lsmc.drawn",
})  # fmt: skip
"""Functions of single numbers, and casts."""

_LAYOUTS = frozenset({"transpose", "swapaxes", "permute", "movedim", "t", "squeeze", "unsqueeze", "view_as", "getitem", "arange"})

RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(("transpose", "swapaxes", "permute", "movedim", "t", "squeeze", "unsqueeze"), layout),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten"), regroup),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "lsmc.rank"), made),
    **dict.fromkeys(("sum", "mean"), reduction),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "cumsum", "cumprod", "glu", "select", "gather", "lsmc.part",
                     "lsmc.whole", "lsmc.dealt", "lsmc.joined", "lsmc.kept", "narrow"), along(1, -1)),
    **dict.fromkeys(("amax", "amin", "prod", "any", "all", "argmax", "argmin", "var", "std", "flip"), along(1, None)),
    **dict.fromkeys(("sort", "argsort"), along(1, -1)), **dict.fromkeys(("topk",), along(2, -1)),
    **dict.fromkeys(("norm", "vector_norm"), along(2, None)), "normalize": along(2, 1), "unbind": along(1, 0),
    **dict.fromkeys(("chunk", "split"), along(2, 0)), **dict.fromkeys(("cat", "concat", "stack"), joined),
    **dict.fromkeys(("rms_norm", "layer_norm"), last(1)), **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    "expand": expand, "expand_as": expand, "getitem": getitem, "linear": linear, "embedding": embedding,
    "scatter_add": scatter_add, "cross_entropy": cross_entropy, "tag_activation_checkpoint": checkpointed,
    "lsmc.moe_experts": experts, "pad": padded, "lsmc.fwd": batched, "lsmc.everywhere": everywhere,
    "scaled_dot_product_attention": attention,
}  # fmt: skip
"""Function → what it does to parts."""

__all__ = ["RULES", "Rule", "Split", "Spread", "name_of"]
