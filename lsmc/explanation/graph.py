"""A program as a picture: operations in layers, top to bottom, the way from a memory to the next one drawn strongly.

Layers are longest paths from the inputs; nodes are ordered by the medians of their neighbours, and pulled towards them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from lsmc.explanation.mathml import GREEK
from lsmc.ir import Op, Program, operand
from lsmc.runtime.pages import svg, text

BOX, HIGH, GAP, STEP = 76.0, 31.0, 12.0, 58.0
"""A node's width and height, the space between two, and from one layer to the next."""
SWEEPS = 24
ZOOM = 1.3
"""Pixels a unit, where there is room; a wide picture shrinks to its place, then scrolls."""

KINDS: dict[str, tuple[str, str]] = {
    "input": ("input", "var(--f)"), "product": ("matrix product", "var(--a)"),
    "form": ("decayed product, solve or scan", "var(--d)"), "sum": ("sum over rows or columns", "var(--c)"),
    "map": ("elementwise", "var(--b)"),
}  # fmt: skip
_KIND = {"input": "input", "matmul": "product", "form": "form", "form_gate": "form", "inverse": "form", "scan": "form",
         "scan_grad": "form", "between": "form", "between_grad": "form", "sum": "sum", "max": "sum", "cumsum": "sum"}


@dataclass(eq=False)
class _Node:
    """An operation, or the passage of a long edge through a layer (`op` None)."""

    layer: int
    op: Op | None
    above: list[_Node] = field(default_factory=list)
    below: list[_Node] = field(default_factory=list)
    x: float = 0.0

    @property
    def width(self) -> float:
        return BOX if self.op else 8.0


def label(op: Op, name: Callable[[int], str]) -> str:
    """What an operation does, in a few signs; `name` says how its operands are called."""
    a = [name(i) for i in op.args]
    match op.kind:
        case "input":
            return shown_name(op.attr("name"))
        case "map":
            return _short(op.attr("expr"), a)
        case "matmul":
            return f"{a[0]}{'ᵀ' * op.attr('ta')} · {a[1]}{'ᵀ' * op.attr('tb')}"
        case "form":
            x, y = a[:2]
            return {"P": f"⟨{x}, {y}⟩", "X": f"{x} ⟨{y}⟩", "Y": f"{x}ᵀ ⟨{y}⟩"}[op.attr("wrt")]
        case "sum":
            return f"Σ {'rows' if op.attr('axis') == 0 else 'columns'} {a[0]}"
        case "cumsum":
            signs = ("<", ">") if op.attr("exclusive") else ("≤", "≥")
            return f"Σ l {signs[op.attr('reverse')]} i {a[0]}"
        case "scan":
            return f"scan, {a[0]} · M" if op.attr("at") else "scan, M"
        case "scan_grad":
            return f"∂ scan / ∂ {a[op.attr('wrt')]}"
    shown = {"form_gate": "∂⟨{1}, {2}⟩/∂{3}", "inverse": "(I + {0})⁻¹", "between": "e^Σ {0}", "between_grad": "∂ e^Σ, {0}",
             "valid": "{0}, rows ≤ T", "expand": "{0}, wide", "transpose": "{0}ᵀ", "mask": "lower {0}", "max": "max {0}"}
    return shown.get(op.kind, op.kind).format(*a)


def shown_name(name: str) -> str:
    """Greek letters by their names, behind d_ for a gradient as well."""
    front, cut, rest = name.rpartition("_")
    return f"{front}{cut}{GREEK.get(rest, rest)}"


def _short(e: sympy.Expr, names: Sequence[str]) -> str:
    """An elementwise expression of operands."""
    shown = str(e.xreplace({operand(i): sympy.Symbol(n) for i, n in enumerate(names)}))
    shown = re.sub(r"exp\((%?\w+)\)", r"e^\1", shown).replace("**", "^").replace("*", " ")
    return shown if len(shown) <= 18 else f"f({', '.join(names)})"


def serial(program: Program) -> set[int]:
    """The operations between a memory before the chunk and the same memory after it: what one chunk waits for."""
    out: set[int] = set()
    for c in program.carries:
        after = {c.inp}
        for op in program.ops:
            if after & set(op.args):
                after.add(op.id)
        out |= {op.id for op in program.ancestors([c.out])} & after
    return out


def picture(program: Program, names: Mapping[int, str], marks: Callable[[int], str], edge_marks: Callable[[int, int], str],
            kernels: Sequence[tuple[str, set[int]]]) -> str:
    """The SVG.

    names    of values that are terms of the declaration
    marks    attributes of a value's node; edge_marks: of an edge from one value to another
    kernels  colour of each kernel, and what it works out: a dot for every kernel
    """
    nodes, layers = _layers(program)
    _order(layers)
    width = _place(layers)
    height = len(layers) * STEP + 14
    way = serial(program)
    out: list[str] = []
    for n in nodes.values():
        for a in n.above:
            out.append(_edge(a, n, way, edge_marks))
    for n in nodes.values():
        assert n.op is not None
        out.append(_box(program, n, names, marks(n.op.id), n.op.id in way,
                        [colour for colour, ops in kernels if n.op.id in ops]))
    made = svg(height, f"the operations of {program.name}", out, width)
    return (f"<div class='graph'><div style='max-width:{ZOOM * width:.0f}px;min-width:{0.78 * width:.0f}px'>"
            f"{made}</div></div>")


def _layers(program: Program) -> tuple[dict[int, _Node], list[list[_Node]]]:
    """Nodes by value, and by layer with the passages of long edges; inputs right above their first use."""
    depth: dict[int, int] = {}
    for op in program.ops:
        depth[op.id] = max((depth[a] + 1 for a in op.args), default=0)
    for op in program.ops:
        if not op.args:
            depth[op.id] = min((depth[u.id] - 1 for u in program.ops if op.id in u.args), default=0)
    nodes = {op.id: _Node(depth[op.id], op) for op in program.ops}
    layers: list[list[_Node]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for op in program.ops:
        layers[depth[op.id]].append(nodes[op.id])
    for op in program.ops:
        passages: dict[tuple[int, int], _Node] = {}
        lower = nodes[op.id]
        users = [nodes[u.id] for u in program.ops if op.id in u.args]
        for user in sorted(users, key=lambda u: u.layer):
            upper = lower
            for at in range(lower.layer + 1, user.layer):
                if (op.id, at) not in passages:
                    passages[op.id, at] = made = _Node(at, None)
                    layers[at].append(made)
                    _join(upper, made)
                upper = passages[op.id, at]
            _join(upper, user)
    return nodes, layers


def _join(upper: _Node, lower: _Node) -> None:
    if lower not in upper.below:
        upper.below.append(lower)
        lower.above.append(upper)


def _order(layers: list[list[_Node]]) -> None:
    """Fewer crossings: down and up the layers, each sorted by the mean place of its neighbours in the one before."""
    for layer in layers:
        for n, node in enumerate(layer):
            node.x = n
    best, order = float("inf"), [list(layer) for layer in layers]
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            layer.sort(key=lambda node: _mean([m.x for m in (node.above if sweep % 2 == 0 else node.below)], node.x))
            for n, node in enumerate(layer):
                node.x = n - len(layer) / 2
        found = _crossings(layers)
        if found < best:
            best, order = found, [list(layer) for layer in layers]
    for layer, kept in zip(layers, order):
        layer[:] = kept


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(layers: list[list[_Node]]) -> int:
    place = {id(node): n for layer in layers for n, node in enumerate(layer)}
    total = 0
    for layer in layers:
        ends = [(place[id(node)], place[id(low)]) for node in layer for low in node.below]
        total += sum((a - c) * (b - d) < 0 for n, (a, b) in enumerate(ends) for c, d in ends[:n])
    return total


def _place(layers: list[list[_Node]]) -> float:
    """Coordinates: nodes drawn to their neighbours, no two of a layer closer than they fit. Returns the width."""
    for layer in layers:
        at = 0.0
        for node in layer:
            node.x = at + node.width / 2
            at += node.width + GAP
        for node in layer:
            node.x -= at / 2
    for sweep in range(60):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = [_mean([m.x for m in node.above] + [m.x for m in node.below], node.x) for node in layer]
            for node, x in zip(layer, _apart(layer, wanted)):
                node.x = x
    left = min(node.x - node.width / 2 for layer in layers for node in layer) - 8
    for layer in layers:
        for node in layer:
            node.x -= left
    return max(node.x + node.width / 2 for layer in layers for node in layer) + 8


def _apart(layer: Sequence[_Node], wanted: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones (least squares) that keep order and distance: pool what would overlap."""
    offset = [0.0]
    for a, b in zip(layer, layer[1:]):
        offset.append(offset[-1] + (a.width + b.width) / 2 + GAP)
    pools: list[tuple[float, int]] = []
    for want, o in zip(wanted, offset):
        pools.append((want - o, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (x, n), (y, m) = pools[-2:]
            pools[-2:] = [((x * n + y * m) / (n + m), n + m)]
    flat = [x for x, n in pools for _ in range(n)]
    return [x + o for x, o in zip(flat, offset)]


def _y(node: _Node) -> float:
    return 16 + node.layer * STEP


def _edge(above: _Node, node: _Node, way: set[int], marks: Callable[[int, int], str]) -> str:
    """One edge, through its passages up to the operation that it comes from."""
    points = [(node.x, _y(node)), (above.x, _y(above) + (HIGH if above.op else 0))]
    while above.op is None:
        points[-1:] = [(above.x, _y(above) + HIGH), (above.x, _y(above))]
        above = above.above[0]
        points.append((above.x, _y(above) + (HIGH if above.op else 0)))
    points.reverse()
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        half = (y0 + y1) / 2
        path += f"L{x1:.1f} {y1:.1f}" if x0 == x1 else f"C{x0:.1f} {half:.1f} {x1:.1f} {half:.1f} {x1:.1f} {y1:.1f}"
    assert node.op is not None
    kind = "way" if above.op.id in way and node.op.id in way else "edge"
    return f"<path class='{kind}' {marks(above.op.id, node.op.id)} d='{path}'/>"


def _box(program: Program, node: _Node, names: Mapping[int, str], marks: str, strong: bool, dots: Sequence[str]) -> str:
    op, x, y = node.op, node.x, _y(node)
    assert op is not None
    before, after = ({getattr(c, end): c.name for c in program.carries} for end in ("inp", "out"))
    ends = {i: n for n, i in program.outputs}

    def called(i: int) -> str:
        source = program.index[i]
        return shown_name(source.attr("name")) if source.kind == "input" else f"%{i}"

    shown = f"{before[op.id]} before" if op.id in before else label(op, called)
    beside = ends.get(op.id) or (f"{after[op.id]} after" if op.id in after else "") or (names.get(op.id, "") if op.args else "")
    size = 9.5 if len(shown) <= 14 else 9.5 * 14 / len(shown)
    colour = KINDS[_KIND.get(op.kind, "map")][1]
    out = [f"<g class='node{' strong' * strong}' style='--of:{colour}' {marks}><title>{html.escape(str(op))}</title>",
           f"<rect class='box' x='{x - BOX / 2:.1f}' y='{y:.1f}' width='{BOX:.0f}' height='{HIGH:.0f}' rx='6'/>",
           text(x, y + 13, shown, "middle", f"class='what' style='font-size:{size:.1f}px'"),
           text(x, y + 24, f"%{op.id}   {op.dims[0]} × {op.dims[1]}", "middle", "class='size'")]
    if beside:
        out.append(text(x - BOX / 2 + 3, y - 3, beside, "start", "class='name'"))
    out += [f"<circle cx='{x - BOX / 2 + 8 + 8 * n:.1f}' cy='{y + HIGH:.1f}' r='3' fill='{c}'/>" for n, c in enumerate(dots)]
    return "".join(out) + "</g>"


__all__ = ["KINDS", "label", "picture", "serial"]
