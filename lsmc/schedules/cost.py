"""What a kernel costs: bytes moved, matrix operations, and the latency of its serial steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import networkx as nx

from lsmc.ir import Op, Program
from lsmc.target import Target

if TYPE_CHECKING:
    from lsmc.schedules.base import Kernel


@dataclass(frozen=True)
class Shape:
    """Problem sizes: B·H sequences of T tokens, chunk length C, memory K×V, bytes per element of the inputs."""

    sequences: int
    tokens: int
    key: int
    value: int
    chunk: int = 64
    element_bytes: int = 2

    @property
    def chunks(self) -> int:
        return -(-self.tokens // self.chunk)

    def size(self, dims: tuple[str, str]) -> int:
        return self.extent[dims[0]] * self.extent[dims[1]]

    @property
    def extent(self) -> dict[str, int]:
        return {"T": self.chunk, "K": self.key, "V": self.value, "F": self.key**2, "E": self.key * self.value, "1": 1}


@dataclass(frozen=True)
class Cost:
    """Bytes and FLOP of all chunks of all sequences; `steps` dependent matrix products on the critical path."""

    bytes: float
    flops: float
    steps: int
    parallel: int

    def seconds(self, target: Target) -> float:
        """Launch, then the slowest of memory, matrix units (as far as they are filled) and the dependent steps."""
        filled = min(1.0, self.parallel / target.units)
        return target.launch_s + max(self.bytes / (target.bytes_per_s * min(1.0, 2 * filled)),
                                     self.flops / (target.flops_per_s * 0.4 * filled), self.steps * target.step_s)


def graph(program: Program) -> nx.DiGraph:
    """The data-flow graph of a program: one node an operation, weighted 1 where it is a matrix product."""
    g = nx.DiGraph()
    for op in program.ops:
        g.add_node(op.id, op=op)
        g.add_edges_from((a, op.id, {"weight": int(_flops(program, op, Shape(1, 64, 64, 64)) > 0)}) for a in op.args)
    return g


def _flops(program: Program, op: Op, s: Shape) -> float:
    dims = [program.index[a].dims for a in op.args]
    match op.kind:
        case "matmul":
            inner = dims[0][0] if op.attr("ta") else dims[0][1]
            return 2.0 * s.size(op.dims) * s.extent[inner]
        case "form" | "form_gate":  # half of a square, on log2(C) levels of halves
            d = dims[-1][1]
            return (4.0 if op.kind == "form_gate" else 1.0) * s.chunk * s.chunk * s.extent[d]
        case "pairs_grad":
            return 2.0 * s.size(dims[0])
        case "inverse":
            return 2.0 / 3.0 * s.chunk**3
    return 0.0


def cost(program: Program, kernel: Kernel, s: Shape) -> Cost:
    """The cost of one kernel of a schedule at the given sizes, as if sequences were not cut into segments: a backend that
    runs segments side by side counts them itself."""
    program, s = kernel.of(program), replace(s, chunk=1) if kernel.walks else s
    ops = kernel.body(program)
    tiles = float(sum(s.size(op.dims) * (4 if op.attr("role") == "carry" else s.element_bytes)
                      for op in ops if op.kind == "input" and op.id not in kernel.own(program)))
    tiles += sum(s.size(program.index[i].dims) * s.element_bytes for n, i in program.outputs if n in kernel.stores)
    tiles += sum(4 * s.size(program.index[c.inp].dims) for c in program.carries if c.name in kernel.saves)
    used = {a for op in ops for a in op.args}
    tiles += sum(s.size(program.index[i].dims) * s.element_bytes for _, i in program.taken if i in used)
    flops = sum(_flops(program, op, s) for op in ops)
    carried = {c.inp: c.out for c in program.carries if c.name in kernel.carries}
    depth = 1
    if carried:
        sub = graph(program).subgraph(op.id for op in ops)
        paths = [nx.dag_longest_path_length(sub.subgraph(nx.descendants(sub, i) & nx.ancestors(sub, o) | {i, o}))
                 for i, o in carried.items() if i in sub and o in sub]
        depth = max([1, *paths]) * s.chunks
    n = s.sequences * s.chunks
    return Cost(tiles * n, flops * n, depth, s.sequences if carried else n)
