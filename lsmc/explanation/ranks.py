"""A model on a mesh as a picture: for each kind of block what a rank computes, top to bottom, and every message at its place.

Read off the graph that the ranks run (`lsmc.runtime.traffic`), in its order: Figure 2 of Linear-MoE (arXiv 2503.05447) for the
model at hand. A bar beside the boxes reaches from where a message is sent to where it is needed; what stands beside it is
computed meanwhile.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import GraphModule, Node

from lsmc.explanation.pieces import section
from lsmc.runtime.errors import LsmMeshError
from lsmc.runtime.insert import example
from lsmc.runtime.mesh import AXES, Axis
from lsmc.runtime.pages import WIDTH, legend, svg, table, text
from lsmc.runtime.scaling import Machine
from lsmc.runtime.spread import POINTWISE, name_of
from lsmc.runtime.traffic import PARAMETERS, Message, arrival, messages, totals, traffic

COLOURS = {"sp": "var(--a)", "tp": "var(--b)", "dp": "var(--c)"}
SMALL = 1024
"""Bytes up to which messages are only counted: statistics of routers, losses."""

LEFT, BOX, LANE, ROW, HIGH = 12.0, 250.0, 14.0, 40.0, 30.0
NAMES = {
    "lsmc.summary": "summary of the rank's tokens", "lsmc.remembered": "summary of the rank's tokens",
    "lsmc.incoming": "the memory that comes in", "lsmc.corrected": "correction", "lsmc.through": "correction",
    "scaled_dot_product_attention": "softmax attention", "lsmc.attend": "softmax attention", "lsmc.moe_experts": "those chosen",
}  # fmt: skip
MIXING = ("lsmc.fwd", "lsmc.columns", "scaled_dot_product_attention", "lsmc.attend", "lsmc.moe_experts")
_MAPS = POINTWISE - {"to", "contiguous", "clone", "detach", "zeros_like", "where", "lsmc.shared", "lsmc.summed"}
_SIZED = frozenset({"linear", "matmul", "bmm", "mm", "rms_norm", "layer_norm", "embedding", "cross_entropy", "conv1d"})


@dataclass(frozen=True)
class Ranks:
    """A model's graph on the axes of a mesh, and in words what it is; the graph `before`, and a table of what larger meshes
    exchange."""

    module: GraphModule
    axes: Mapping[str, Axis]
    said: str
    before: GraphModule | None = None
    larger: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ())


LARGER = (8, 64, 1024)
"""Numbers of ranks whose exchanges are counted too."""


def larger(captured: Callable[[Mapping[str, Axis]], GraphModule],
           axes: Mapping[str, Axis]) -> tuple[list[str], list[list[str]]]:  # fmt: skip
    """The same step on more ranks of "sp" (or of the mesh's first axis): what a rank receives, and how long that would take.
    Each is read off a graph of its own; where there is none, the reason stands instead."""
    machine, rows = Machine(), list[list[str]]()
    grown = "sp" if "sp" in axes else next(iter(axes))
    rest = math.prod(axis.size for name, axis in axes.items() if name != grown)
    for count in LARGER:
        wider = {**axes, grown: Axis(grown, count // rest, grown)}
        row = [f"{count:,}", ",".join(map(str, wider.values()))]
        try:
            if count % rest or count == rest:
                raise LsmMeshError(f"{count} ranks are no multiple of {2 * rest}")
            found = traffic(captured(wider), wider)
        except LsmMeshError as error:
            rows.append([*row, "", "", str(error).splitlines()[0]])
            continue
        there, back = sum(m.forward_bytes for m in found), sum(m.backward_bytes for m in found)
        rows.append([*row, f"{there:,}", f"{back:,}", f"{1e3 * machine.messages(found, wider):.2f} ms"])
    said = (f"messages one after the other, {machine.nvlink / 1e9:.0f} GB/s in nodes of {machine.per_node}, "
            f"{machine.network / 1e9:.0f} between")
    return ["ranks", "mesh", "bytes forward", "bytes backward", said], rows


def listing(module: GraphModule, axes: Mapping[str, Axis]) -> str:
    """A graph as text, one operation a line; behind collectives their axis, bytes and what they overlap."""
    found, lines = dict(messages(module, axes)), list[str]()
    for name, inner in module.named_modules():
        if isinstance(inner, GraphModule):
            lines += [f"{name or 'the step'}:"]
            for node in inner.graph.nodes:
                given = ", ".join(map(str, node.args)) if node.op != "placeholder" else ""
                line = f"  {node.name} ({_size(node)}) = {name_of(node) if given else node.op}({given})"
                m = found.get(node)
                beside = "" if m is None or not m.behind else f", beside {m.behind} operations"
                lines.append(line if m is None else f"{line}  # {m.axis}: {_about(m)}{beside}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Row:
    """What a rank computes, or a message that is sent here and needed `until` another row."""

    what: str
    size: str = ""
    mixes: bool = False
    message: Message | None = None
    until: int = 0


def plan(r: Ranks) -> str:
    """The section of a page."""
    said = (f"{r.said} Sizes are those of one rank, bytes what it receives in a step. A bar reaches from where a message is sent "
            "to where it is needed: what stands beside it is computed meanwhile. Backward messages stand where their forward value "
            "does; the backward pass goes from the bottom to the top.")
    drawn: dict[str, list[str]] = defaultdict(list)
    found = dict(messages(r.module, r.axes))
    for block, nodes in _blocks(r.module).items():
        rows, rest = _rows(nodes, found)
        if rows:
            drawn[f"{_picture(rows)}<p class='key'>{rest}</p>"].append(block)
    pictures = "".join(f"<h3>{_title(blocks)}</h3>{picture}" for picture, blocks in drawn.items())
    colours = legend(((f"{axis}, {AXES[name]}", COLOURS[name]) for name, axis in r.axes.items()), "messages over an axis")
    more = f"<h3>On more ranks</h3>{table(*r.larger)}" if r.larger[1] else ""
    inner = f"{colours}{pictures}<h3>In all</h3>{table(*totals(traffic(r.module, r.axes)))}{more}"
    return section("ranks", "The plan of the ranks", inner, said)


def _blocks(module: GraphModule) -> dict[str, list[Node]]:
    """The nodes by the numbered part of the model that they come from, "" for none, in the order of their first."""
    found: dict[str, list[Node]] = {}
    for inner in module.modules():
        for node in inner.graph.nodes if isinstance(inner, GraphModule) else ():
            if node.op.startswith("call"):
                found.setdefault(_numbered(_path(node))[0], []).append(node)
    return found


def _path(node: Node) -> str:
    """The module of the model that a node comes from; of a product, that of its matrix."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    weight = node.args[1] if name_of(node) == "linear" and len(node.args) > 1 else None
    while isinstance(weight, Node) and weight.op != "placeholder":
        weight = next(iter(weight.all_input_nodes), None)
    parts = re.split("_modules_", str(weight.name if isinstance(weight, Node) else ""))[1:]
    if parts and "_parameters_" in parts[-1]:
        path = ".".join(["", *parts]).split("_parameters_")[0]
    return re.sub(r"^L\['\w+'\]|\[(\d+)\]", lambda m: f".{m[1]}" if m[1] else "", path).strip(".")


def _numbered(path: str) -> tuple[str, str]:
    """`blocks.0.mixer` → the block, and where in it."""
    m = re.match(r"(.*?\b\d+)(?:\.|$)(.*)", path)
    return (m[1], m[2]) if m else ("", path)


def _rows(nodes: Sequence[Node], found: Mapping[Node, Message]) -> tuple[list[_Row], str]:
    """What is drawn of a block, and in words what is not."""
    rows: list[_Row] = []
    sent: dict[Node, int] = {}
    grads: dict[tuple[str, str], int] = defaultdict(int)
    small = 0
    for node in nodes:
        for issued in [n for n in sent if arrival(n) is node]:
            at = sent.pop(issued)
            rows[at] = replace(rows[at], until=len(rows))
        message = found.get(node)
        if message is not None and message.of == PARAMETERS:
            grads[message.axis, message.backward] += message.backward_bytes
        elif message is not None and message.forward_bytes + message.backward_bytes <= SMALL:
            small += 1
        elif message is not None:
            if arrival(node) is not node:
                sent[node] = len(rows)
            rows.append(_Row(_about(message), message=message, until=len(rows)))
        elif what := _what(node, bool(sent)):
            if rows and rows[-1].message is None and rows[-1].what == what:
                rows.pop()
            rows.append(_Row(what, _size(node), name_of(node) in MIXING))
    parts = [f"{kind} over {axis}, {_bytes(n)}" for (axis, kind), n in grads.items()]
    said = f"Backward, of gradients of parameters: {'; '.join(parts)}." if parts else ""
    return rows, said + f" {small} messages of at most {SMALL:,} bytes are not shown." * bool(small)


def _what(node: Node, hiding: bool) -> str:
    """What a node does in a few words; nothing for views and the like, and for maps only where they hide a message."""
    name, inside = name_of(node), _numbered(_path(node))[1]
    if name in ("lsmc.fwd", "lsmc.columns"):
        return f"{inside}: {node.meta['lsm'].name}" if "lsm" in node.meta else inside
    if name in NAMES:
        return f"{inside}: {NAMES[name]}"
    if name in _SIZED or (inside.count(".") and name in _MAPS):
        return inside or name
    return f"{inside}: elementwise" if hiding and inside and name in _MAPS else ""


def _size(node: Node) -> str:
    value = example(node)
    value = value[0] if isinstance(value, list | tuple) and value else value
    return " × ".join(map(str, value.shape)) if isinstance(value, Tensor) else ""


def _about(m: Message) -> str:
    """Bytes forward and backward."""
    parts = [f"{m.forward} {_bytes(m.forward_bytes)}"] if m.forward else []
    return ", ".join([*parts, f"back {m.backward} {_bytes(m.backward_bytes)}"] if m.backward else parts)


def _bytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"


def _title(blocks: Sequence[str]) -> str:
    """The blocks that a picture is of."""
    return ", ".join(blocks) if any(blocks) else "Around the blocks"


def _picture(rows: Sequence[_Row]) -> str:
    out = [f"<line class='edge' x1='{LEFT + BOX / 2}' x2='{LEFT + BOX / 2}' y1='2' y2='{len(rows) * ROW + 2:.0f}'/>"]
    ends = list(_lanes(rows))
    for i, row in enumerate(rows):
        y = i * ROW + ROW / 2
        if row.message is None:
            colour = "var(--d)" if row.mixes else "var(--f)"
            out += [f"<g class='node' style='--of:{colour}'><rect class='box' x='{LEFT}' y='{y - HIGH / 2}' ",
                    f"width='{BOX}' height='{HIGH}' rx='6'/>",
                    text(LEFT + BOX / 2, y - 1 if row.size else y + 4, row.what, "middle", "class='what'"),
                    text(LEFT + BOX / 2, y + 10, row.size, "middle", "class='size'"), "</g>"]
            continue
        colour, x = COLOURS[row.message.axis], LEFT + BOX + LANE * (1 + ends[i])
        low = max(y + 3, row.until * ROW + 2) if row.until > i + 1 else y
        behind = [r.what.rpartition(": ")[2] for r in rows[i + 1 : row.until] if r.message is None]
        meanwhile = f"beside {', '.join(dict.fromkeys(behind))}" if behind else "nothing beside it" if row.message.forward else ""
        end = LEFT + BOX / 2
        out += [f"<path d='M{end} {y}H{x}V{low}H{end}' fill='none' stroke='{colour}' stroke-width='2'/>" if low > y else
                f"<path d='M{end} {y}H{x}' fill='none' stroke='{colour}' stroke-width='2'/>",
                f"<circle cx='{end}' cy='{y}' r='4' fill='{colour}'/>",
                text(LEFT + BOX + 5 * LANE, y - 2, f"{row.message.axis}: {row.what}", "start", "class='strong'"),
                text(LEFT + BOX + 5 * LANE, y + 11, "; ".join(filter(None, (row.message.of[:64], meanwhile))))]
    drawn = svg(len(rows) * ROW + 4, "what a rank computes and receives", out)
    return f"<div class='graph'><div style='min-width:{0.78 * WIDTH:.0f}px'>{drawn}</div></div>"


def _lanes(rows: Sequence[_Row]) -> Iterator[int]:
    """Bars that are there at once stand side by side."""
    busy: list[int] = []
    for i, row in enumerate(rows):
        lane = next((n for n, until in enumerate(busy) if until <= i), len(busy))
        busy += [0] * (lane == len(busy))
        if row.message is not None:
            busy[lane] = max(row.until, i + 1)
        yield min(lane, 3)


__all__ = ["Ranks", "larger", "listing", "plan"]
