"""Absorption: maps of what feeds an LSM operator become part of its declaration, and are compiled with it.

    k = normalize(x);  g = logsigmoid(y) / 16;  o = method(q, k, v, g)   →   o = method'(q, x, v, y)

where method' is the declaration with k replaced by l2norm(k) and g by logsigmoid(g) / 16. The forward and backward
programs of method' come from the same derivation as all others, so that there is nothing to prove but that method' is the
same function. Its maps are computed in float32 at least, also where the graph rounded between them to 16 bits.

Absorbed is what a token does alone: functions of `torch_maps`, of values that nothing else uses. Left alone, and said why:
what is used elsewhere, is computed without gradients, is written in place in the meantime, would have the operator read
more than it did, or is not finite where a sequence is padded with zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lsmc.errors import LsmError
from lsmc.expr import DIM_SYMBOL, Field, number
from lsmc.inputs import Sizes, parts
from lsmc.lowering import ops
from lsmc.lowering.plan import Plan
from lsmc.lowering.torch_maps import CASTS, MUTATING, NAMES, POINTWISE, ROWS, SHAPES, Refused
from lsmc.reference import _Evaluator
from lsmc.target import H200

Axes = tuple[str, ...]
"""The named dimensions of a value: B, T, H or HV, K, V; 1 where it is broadcast; "HV.K" where two are one."""


Judge = Callable[[Plan, Plan, float], str | None]


def judge(plan: Plan, absorbed: Plan, moved: float) -> str | None:
    """Why an input's maps are better computed outside, moving so many bytes; None where they are better inside.

    Inside they are computed by every kernel that loads the input, outside once by a kernel in each direction, which
    moves bytes. On CPUs the operator is compiled together with what surrounds it: nothing is saved.
    """
    if plan.forward.target != "triton":
        return "on this device the operator is compiled together with what feeds it"
    inside, outside = absorbed.seconds - plan.seconds, 2 * H200.launch_s + moved / H200.bytes_per_s
    if inside > outside:
        return f"it is estimated to take {inside * 1e6:.0f} us more inside, and {outside * 1e6:.0f} us outside"
    return None


def absorb(module: GraphModule, judge: Judge = judge) -> list[str]:
    """Replace operators by those of declarations that hold the maps of their inputs, where `judge` has no objection."""
    changes = []
    for inner, node in list(ops.in_graph(module)):
        changes += _Absorption(inner, node, judge).run()
        inner.graph.lint()
        inner.recompile()
    return changes


@functools.cache
def _derived(spec: str, values: tuple[tuple[Field, sympy.Expr], ...]) -> Plan:
    """The plan of a plan's method with inputs replaced, at the same options.

    The factor on q becomes a part of its expression where the new q is another one than the old.
    """
    plan, inside = ops.plan_of(spec), dict(values)
    scale = plan.scale
    for q in plan.canonical.inputs:
        if q.name == "q" and scale != 1.0 and (q in inside or any(q in x.free_symbols for x in inside.values())):
            inside[q], scale = inside.get(q, q) * number(scale), 1.0
    return plan.derive(plan.canonical.substitute(inside), scale)


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _value_of(node: object) -> Tensor | None:
    """What Dynamo saw a node compute: shape, type and device."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _idle(node: Node) -> bool:
    """Whether a node leaves every number as it is."""
    name = NAMES[node.target]
    return name in SHAPES or (name in CASTS and _type(node) == _type(node.all_input_nodes[0]))


def _mutates(node: Node) -> bool:
    """Whether a call writes into a tensor that it was given."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (target in MUTATING or (name.endswith("_") and not name.startswith("_")) or "mutation" in name
            or node.kwargs.get("inplace") is True or "out" in node.kwargs)  # fmt: skip


class _Left(Exception):
    """A node that is not absorbed, with the reason."""

    def __init__(self, node: Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


Step = tuple[str, tuple[Any, ...]]
"""A tensor method and its arguments."""


@dataclass(frozen=True)
class _Leaves:
    """The inputs of the new declaration: for each value of the graph, laid out so, its symbol; and how to lay it out."""

    symbols: dict[tuple[Node, str, Axes, str], Field]
    layouts: dict[Field, tuple[Node, list[Step]]]


class _Absorption:
    """What one operator absorbs."""

    def __init__(self, module: GraphModule, node: Node, judge: Judge) -> None:
        self.graph, self.op, self.judge = module.graph, node, judge
        self.spec = str(node.args[3])
        self.plan = ops.plan_of(self.spec)
        self.fields = {f.name: f for f in self.plan.canonical.inputs}
        self.given: dict[str, Node] = dict(zip(self.plan.inputs, node.args[0]))  # type: ignore[arg-type]
        self.sizes: dict[str, Any] = {}
        for name, source in self.given.items():
            value = _value_of(source)
            if value is not None:
                self.sizes |= dict(zip(parts(self.fields[name], step=False), value.shape))
        self.heads = ("H", "HV") if _same(self.sizes.get("H", 0), self.sizes.get("HV", 0)) else ("HV",)  # that are HV
        self.place = {n: i for i, n in enumerate(self.graph.nodes)}
        self.written = [i for n, i in self.place.items() if i < self.place[node] and n.op.startswith("call") and _mutates(n)]
        self.left: dict[Node, str] = {}  # what is not absorbed, and why ("" where that needs no word)

    # -- which nodes

    def run(self) -> list[str]:
        if any(_value_of(source) is None for source in self.given.values()):
            return []
        while True:  # what is left alone is an input, and what feeds it is left alone too
            inside = self._inside()
            try:
                values, leaves = self._compose(inside)
                break
            except _Left as left:
                self.left[left.node] = left.why
        said = [f"{n.name} is left to itself: {why}" for n, why in self.left.items() if why]
        return [*(self._rewrite(inside, values, leaves) if inside else []), *said]

    def _inside(self) -> dict[Node, None]:
        """The nodes whose values end in the operator's inputs and nowhere else, users before producers."""
        inside: dict[Node, None] = {}
        roots = set(self.given.values())
        for node in reversed(list(self.place)[: self.place[self.op]]):
            if node not in self.left and (node in roots or any(user in inside for user in node.users)):
                why = self._why_not(node, inside)
                if why is None:
                    inside[node] = None
                else:
                    self.left[node] = why
        for node in reversed(list(inside)):  # what only lays out what comes from outside is done outside
            if _idle(node) and not any(n in inside for n in node.all_input_nodes):
                del inside[node]
        return inside

    def _why_not(self, node: Node, inside: Mapping[Node, None]) -> str | None:
        value = _value_of(node)
        name = NAMES.get(node.target) if node.op in ("call_function", "call_method") else None
        sources = [x for x in map(_value_of, node.all_input_nodes) if x is not None]
        if node.op not in ("call_function", "call_method") or len(sources) < len(node.all_input_nodes) or value is None:
            return ""
        if name is None or not value.is_floating_point():
            return "it is no map of one token"
        if any(user is not self.op and user not in inside for user in node.users) or node in self.op.args[1]:  # type: ignore[operator]
            return "it is used elsewhere"
        if any(x.requires_grad for x in sources) and not value.requires_grad:
            return "it has no gradient"
        if any(x.device != value.device for x in sources):
            return "it changes the device"
        if any(self.place[node] < i for i in self.written):
            return "a tensor is written in place between it and the operator"
        return None

    # -- their meaning

    def _compose(self, inside: Mapping[Node, None]) -> tuple[dict[Field, sympy.Expr], _Leaves]:
        """Each input of the method in terms of the values that feed what is inside."""
        leaves, values = _Leaves({}, {}), dict[Field, sympy.Expr]()
        for name, source in self.given.items():
            symbol = self.fields[name]
            if name == "v" and self.plan.canonical.normalizer and source in inside:
                raise _Left(source, "the normaliser is the memory of v = 1")
            values[symbol] = _Composer(self, inside, leaves, symbol).value(source, parts(symbol, step=False), None)
            if source in inside:
                if name in ("q", "k", "v") and not any(
                    s in leaves.layouts and (s.dims, s.heads) == (symbol.dims, symbol.heads)
                    and _type(leaves.layouts[s][0]) == _type(source) for s in values[symbol].free_symbols
                ):  # fmt: skip
                    raise _Left(source, "nothing that feeds it has its shape and type")
                if not _finite_at_zero(values[symbol]):
                    raise _Left(source, "its value or derivative is not finite at 0, with which sequences are padded")
        changed = {f: x for f, x in values.items() if f != x}
        self._check_worth(inside, changed, leaves)
        return changed, leaves

    def _check_worth(self, inside: Mapping[Node, None], changed: Mapping[Field, sympy.Expr], leaves: _Leaves) -> None:
        """Leave what feeds an input alone where, after the inputs before it, it has no chunk form inside, or does not pay."""
        extent = {"K": self.plan.shape.key, "V": self.plan.shape.value}
        rows = self.plan.shape.sequences * self.plan.shape.tokens

        def size(field: Field, node: Node) -> int:
            return _type(node).itemsize * math.prod(extent[d] for d in field.dims) * (rows if field.per == "token" else 1)

        before, so_far = self.plan, dict[Field, sympy.Expr]()
        for symbol, value in changed.items():
            source, so_far[symbol] = self.given[symbol.name], value
            try:
                absorbed = _derived(self.spec, tuple(so_far.items()))
            except LsmError as error:
                raise _Left(source, error.rule) from None
            # forward it reads the leaves and writes the input; backward it reads both again and writes gradients of the leaves
            reads = sum(size(s, leaves.layouts[s][0]) for s in value.free_symbols if s in leaves.layouts)
            why = self.judge(before, absorbed, 2 * size(symbol, source) + 3 * reads) if source in inside else None
            if why is not None:
                raise _Left(source, why)
            before = absorbed

    def _rewrite(self, inside: Iterable[Node], values: Mapping[Field, sympy.Expr], leaves: _Leaves) -> list[str]:
        plan = _derived(self.spec, tuple(values.items()))
        laid = {s.name: self._lay_out(*layout) for s, layout in leaves.layouts.items()}
        self.op.args = ([laid[name] for name in plan.inputs], *self.op.args[1:3], ops.register(plan, self.spec.endswith(ops.KEEP)))
        if "lsm" in self.op.meta:
            self.op.meta["lsm"] = plan
        for node in inside:
            self.graph.erase_node(node)
        names = ", ".join(n.name for n in reversed(list(inside)))
        return [f"{self.op.name} absorbs {names} and is now {plan.canonical}"]

    def _lay_out(self, node: Node, steps: Iterable[Step]) -> Node:
        for method, args in steps:
            before = _value_of(node)
            with self.graph.inserting_before(self.op):
                node = self.graph.call_method(method, (node, *args))
            node.meta["example_value"] = getattr(before, method)(*args)
        return node


class _Composer:
    """The expression of one input in terms of leaves: what is inside is looked through, all else is a leaf."""

    def __init__(self, of: _Absorption, inside: Mapping[Node, None], leaves: _Leaves, symbol: Field) -> None:
        self.of, self.inside, self.leaves, self.symbol = of, inside, leaves, symbol
        self.claimed = frozenset(leaves.layouts)  # what earlier inputs read costs nothing
        self.done: dict[tuple[Node, Axes], sympy.Expr] = {}

    def value(self, node: Node, axes: Axes, consumer: Node | None) -> sympy.Expr:
        """`node`, whose dimensions are `axes`, as an expression; `consumer` is who needs it."""
        if (node, axes) not in self.done:
            if node in self.inside:
                try:
                    made = self._inner(node, axes)
                    self._check_reads(made)
                except (Refused, TypeError) as why:  # TypeError: arguments that no rule knows
                    raise _Left(node, str(why)) from None
            elif consumer is None:  # the input as it was
                symbol = self.symbol
                heads = "HV" if "H" in self.of.heads else symbol.heads
                made = self.leaves.symbols.setdefault((node, symbol.per, symbol.dims, heads), symbol)
                self.leaves.layouts.setdefault(made, (node, []))
            else:
                try:
                    made = self._leaf(node, axes)
                except Refused as why:
                    raise _Left(consumer, str(why)) from None
            self.done[node, axes] = made
        return self.done[node, axes]

    def _inner(self, node: Node, axes: Axes) -> sympy.Expr:
        name, args, kwargs = NAMES[node.target], node.args, node.kwargs
        first = args[0] if args else None
        shape = _shape(node)
        if name in SHAPES:
            assert isinstance(first, Node)
            return self.value(first, _before(name, args, _shape(first), shape, axes), node)

        def operand(x: Any) -> Any:
            return self.value(x, _narrow(axes, shape, _shape(x)), node) if isinstance(x, Node) else x

        if name in CASTS:
            return operand(first)
        if name in POINTWISE:
            given = [operand(x) for x in args]
            given[0] = sympy.sympify(given[0]) if isinstance(given[0], int | float) else given[0]
            return POINTWISE[name](*given, **{k: operand(x) for k, x in kwargs.items()})
        if not isinstance(first, Node):
            raise Refused("its first argument is no tensor")
        wide = _shape(first)
        last = next((d for d in (*self.symbol.dims, "K", "V") if _same(self.of.sizes.get(d, -1), wide[-1])), None)
        if last is None:
            raise Refused("its last dimension is neither K nor V")
        axes, shape = (*(axes[:-1] if len(wide) == len(shape) else axes), last), wide
        if len(axes) != len(wide):
            raise Refused("it is over several dimensions")
        return ROWS[name](DIM_SYMBOL[last], operand(first), len(wide), *map(operand, args[1:]),
                          **{k: operand(x) for k, x in kwargs.items()})  # fmt: skip

    def _check_reads(self, made: sympy.Expr) -> None:
        """Absorbing must not make the operator read more than it did."""
        new = [s for s in made.free_symbols - self.claimed if isinstance(s, Field) and s.per == "token"]
        if any(len(s.dims) > len(self.symbol.dims) for s in new):
            raise Refused("it is smaller than what it is made of")
        wide = [_type(self.leaves.layouts[s][0]).itemsize for s in new if len(s.dims) == len(self.symbol.dims)]
        if sum(wide) > _type(self.of.given[self.symbol.name]).itemsize:
            raise Refused("what it is made of takes more bytes than it does")

    def _leaf(self, node: Node, axes: Axes) -> sympy.Expr:
        """The symbol of a value that comes from outside, laid out as an input."""
        of, target = self.of, _type(of_input := self.of.given[self.symbol.name])
        kind = _type(node)
        if not kind.is_floating_point or (kind == torch.float64) != (target == torch.float64):
            raise Refused(f"{node.name} has the type {kind}, {of_input.name} {target}")
        split = [a for axis in axes for a in axis.split(".")]
        if split[:2] == ["B", "T"]:
            per, lead = "token", 2
        elif not {"B", "T"} & set(split):
            per, lead = "head", 0
        else:
            raise Refused(f"{node.name} varies over {' and '.join(sorted({'B', 'T'} & set(split)))} alone")
        names = [a for a in split[lead:] if a != "1"]
        heads = names.pop(0) if names and names[0] in ("H", "HV") else None
        if heads == "H" and "H" in of.heads:
            heads = "HV"
        dims = tuple(names)
        if len(dims) > 1 or not set(dims) <= {"K", "V"}:
            raise Refused(f"{node.name} varies over {', '.join(split)}")
        if per == "token" and heads is None:
            raise Refused(f"{node.name} is the same for all heads")
        if per == "head" and heads == "H":
            raise Refused(f"{node.name} is per query head")
        key = (node, per, dims, heads or "")
        if key not in self.leaves.symbols:
            symbol = self._name(per, dims, heads)
            steps: list[Step] = []
            for i, axis in reversed(list(enumerate(axes))):
                if "." in axis:
                    steps.append(("unflatten", (i, tuple(of.sizes[a] for a in axis.split(".")))))
                elif axis == "1":
                    steps.append(("squeeze", (i,)))
            if heads is None:
                steps += [("expand", (of.sizes["HV"], *(of.sizes[d] for d in dims))), ("contiguous", ())]
            if any(not isinstance(n, int) for _, given in steps for n in given if not isinstance(n, tuple)):
                raise Refused(f"{node.name} is laid out by sizes that are not known")
            self.leaves.symbols[key] = symbol
            self.leaves.layouts[symbol] = node, steps
        return self.leaves.symbols[key]

    def _name(self, per: str, dims: Axes, heads: str | None) -> Field:
        """The input itself, for the first value of its layout; else a new one, named after it."""
        symbol, used = self.symbol, {s.name for s in self.leaves.layouts}
        own = "HV" if "H" in self.of.heads else symbol.heads
        if symbol.name not in used and (per, dims, heads) == (symbol.per, symbol.dims, own):
            return symbol
        used |= set(self.of.fields)
        name = next(n for n in (f"{symbol.name}_{i}" for i in range(1, len(used) + 2)) if n not in used)
        if heads == "H":
            raise Refused("it is per query head, besides another that is")
        return Field(name, dims, per)  # type: ignore[arg-type]


def _type(node: Node) -> torch.dtype:
    value = _value_of(node)
    assert value is not None
    return value.dtype


def _shape(node: Node) -> tuple[Any, ...]:
    value = _value_of(node)
    if value is None:
        raise Refused(f"{node.name} is no tensor")
    return tuple(value.shape)


def _narrow(axes: Axes, shape: tuple[Any, ...], operand: tuple[Any, ...]) -> Axes:
    """The dimensions of an operand that is broadcast to `axes`."""
    out = []
    for axis, size, own in zip(axes[len(axes) - len(operand) :], shape[len(shape) - len(operand) :], operand, strict=True):
        if not (_same(own, size) or _same(own, 1)):
            raise Refused(f"shapes {operand} and {shape} do not fit")
        out.append(axis if _same(own, size) else "1")
    return tuple(out)


def _before(name: str, args: tuple[Any, ...], old: tuple[Any, ...], new: tuple[Any, ...], axes: Axes) -> Axes:
    """The dimensions of the operand of a change of shape, from those of its result."""
    if name in ("expand", "expand_as"):
        return _narrow(axes, new, old)
    if name == "unsqueeze":
        i = args[1] % len(axes)
        return (*axes[:i], *axes[i + 1 :])
    if name == "squeeze" and len(args) == 2 and isinstance(args[1], int) and len(old) == len(new) + 1:
        i = args[1] % len(old)
        return (*axes[:i], "1", *axes[i:])
    if name == "getitem":
        index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
        if any(x is not None and x is not Ellipsis and x != slice(None) for x in index):
            raise Refused("it takes a part of a tensor")
        rest = len(axes) - sum(x is not Ellipsis for x in index)
        at = index.index(Ellipsis) if Ellipsis in index else len(index)
        index[at : at + 1] = [slice(None)] * rest
        return tuple(axis for axis, x in zip(axes, index, strict=True) if x is not None)
    if name in ("unflatten", "flatten", "view", "reshape"):
        return _regroup(old, new, axes)
    raise Refused("a change of shape that has no rule")


def _regroup(old: tuple[Any, ...], new: tuple[Any, ...], axes: Axes) -> Axes:
    """Dimensions before a view that makes two of one, or one of two, or adds or drops some of size 1."""
    out: list[str] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = old[i:], new[j:]
        if a and b and _same(a[0], b[0]):
            out.append(axes[j])
            i, j = i + 1, j + 1
        elif a and len(b) > 1 and _same(a[0], b[0] * b[1]):
            out.append(f"{axes[j]}.{axes[j + 1]}")
            i, j = i + 1, j + 2
        elif b and len(a) > 1 and _same(a[0] * a[1], b[0]) and axes[j].count(".") == 1:
            out += axes[j].split(".")
            i, j = i + 2, j + 1
        elif b and _same(b[0], 1):
            j += 1
        elif a and _same(a[0], 1):
            out.append("1")
            i += 1
        else:
            raise Refused(f"a view of {old} as {new}")
    return tuple(out)


def _finite_at_zero(expr: sympy.Expr) -> bool:
    """Whether a map and its derivatives are finite where all that varies over tokens is 0, as behind a sequence's end."""
    symbols = [s for s in expr.free_symbols if isinstance(s, Field)]
    sizes = Sizes(B=1, T=1, H=1, HV=1, K=1, V=1, N=1)
    points = {s: torch.full((1, 1, 1), 0.0 if s.per == "token" else 0.5, dtype=torch.float64, requires_grad=True)
              for s in symbols}  # fmt: skip
    value = _Evaluator(points, sizes, torch.float64, torch.device("cpu"))(expr)
    slopes = torch.autograd.grad(value.sum(), list(points.values())) if value.requires_grad else ()
    return all(bool(torch.isfinite(x).all()) for x in (value, *slopes))
