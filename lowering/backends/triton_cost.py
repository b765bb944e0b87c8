"""What the launches of a schedule cost on a GPU: bytes, and the time that one program takes for one chunk.

The constants were fitted to single kernels measured on an H200 (docs/benchmarks.md); the ranking is what they are for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lsmc.ir import Op, Program
from lsmc.lowering.backends.triton_cut import Piece, brief, contracts, pieces
from lsmc.lowering.backends.triton_mild import mild
from lsmc.lowering.backends.triton_registers import alive, block, room
from lsmc.lowering.backends.triton_steady import unweighted
from lsmc.lowering.backends.triton_sums import gather
from lsmc.lowering.backends.triton_walk import held
from lsmc.schedules import Schedule, Shape
from lsmc.schedules.segments import count
from lsmc.target import Target


@dataclass(frozen=True)
class Rates:
    """Seconds of a product of tiles, with the wait for its operands, of one element of an elementwise result by 128 threads, and of
    the wait for a tile that is loaded; the products that a running sum of a tile takes as long as; `registers` of a thread that
    values may take, and by how many more a chunk takes twice as long."""

    product: float
    element: float
    load: float
    sums: int
    registers: int
    twice: int


RATES = {True: Rates(0.35e-6, 6e-11, 0.0, 2, 230, 60), False: Rates(0.27e-6, 3.3e-11, 0.05e-6, 6, 350, 150)}
"""Of scans, which load what the next chunks want, and of kernels over chunks."""
PRODUCTS = {"form": 2, "form_gate": 4, "inverse": 10, "matmul": 1}
CHAINED = 0.2e-6
"""Seconds more for each product that waits for another one on the way from a memory to the next."""
ALONE = 0.65
"""What a scan's products take where no second program shares its processor,"""
ONLY = 0.5
"""and where there is no room for a second one: what there is holds loads of more chunks ahead."""
TOKEN = 1.0e-6
"""Seconds that a walk waits at each token: for what it loads, and for sums among warps."""
WALK = 3
"""Elementwise operations for each entry of the memory and token."""
AGAIN = 0.8
"""What a scan's load costs that another block's program has brought to the L2 cache."""
BOTH = 4
"""How little a kernel over chunks loses where loads and work take alike: this norm of both is its time."""


@dataclass(frozen=True)
class Estimate:
    """One piece: bytes through memory, seconds of one chunk in one program, registers that its values want; whether a
    multiprocessor has room for no second program."""

    name: str
    bytes: float
    step: float
    registers: int
    seconds: float
    single: bool


def estimate(program: Program, schedule: Schedule, shape: Shape, target: Target) -> list[Estimate]:
    """Every piece of a schedule, in launch order."""
    return [_usual(p.kernel.of(program), p, shape, target) for p in pieces(program, schedule)]


def predict(program: Program, schedule: Schedule, kernel: str, shape: Shape, target: Target, columns: int | None,
            warps: int) -> float:
    """Seconds of the kernel of this name under a plan; `program` has its sums gathered."""
    p = next(p for p in pieces(program, schedule) if p.kernel.name == kernel)
    return _piece(p.kernel.of(program), p, shape, target, columns, warps).seconds


def _usual(program: Program, p: Piece, s: Shape, target: Target) -> Estimate:
    """By the plan that a piece has where none was measured: one program may take all columns (`triton._scanning`)."""
    found = _piece(program, p, s, target)
    if not found.single or p.kernel.stores or p.kernel.part or s.sequences > target.units:
        return found
    return min(found, _piece(program, p, s, target, s.extent[str(p.split)], 8), key=lambda e: e.seconds)


def _piece(program: Program, p: Piece, s: Shape, target: Target, columns: int | None = None, warps: int | None = None) -> Estimate:
    """`columns` of the split dimension and `warps` for each program, where not the default ones; `program` is the kernel's."""
    program, p = _likely(program, p)
    s = replace(s, chunk=1) if p.kernel.walks else s
    part, scans, walks = p.kernel.part, bool(p.kernel.carries), p.kernel.walks
    carries = [program.index[c.inp] for c in program.carries if c.name in p.kernel.carries]
    usual = held(s.key, s.value, sum("1" not in op.dims for op in carries), s.sequences, p.split is not None, target.units)
    warps = warps or (usual["num_warps"] if walks else 8 if scans and p.split is None else 4)
    if p.split:
        columns = columns or (usual["BV"] if walks else block(program, p, s.chunk))
    one = _One(program, p, s, columns)

    wanted = alive(program, p, tuple(one.extent.items())) // (128 * warps)
    rates = RATES[scans]
    slower = 1 + max(0, wanted - rates.registers) / rates.twice
    chained = max(0, _chain(program, p) - 1)
    waits = rates.product * one.products(rates.sums) * slower + rates.load * one.tiles + CHAINED * chained + TOKEN * walks
    step = waits + rates.element * one.elements * 4 / warps * slower
    side_by_side = 2 + 2 * walks
    if scans and p.split in ("K", "V") and warps <= 4 and not walks and part != "combine":
        side_by_side = max(1, room(s.element_bytes * sum(map(one.size, one.loads)), one.extent[p.split], 2))
    resident = side_by_side * target.units * 4 // warps
    segments = count(s.sequences, s.chunks, target.units) if part else 1
    programs = s.sequences * one.blocks // one.turns
    steps = segments if part == "combine" else s.chunks  # that a sequence takes
    if scans:
        side = 1 if part == "combine" else segments  # programs of one sequence, side by side
        if warps <= 4:
            beside = waits - (rates.product * slower + CHAINED) * chained if side_by_side == 1 else waits
            step -= beside * (1 - (ONLY if side_by_side == 1 else ALONE if programs * side <= target.units else 1.0))
        work = step * -(-steps // side) * -(-programs * side // resident)
    else:
        work = step * max(1.0, programs * steps / resident)
    total = one.bytes * programs * steps + 8 * sum(map(one.size, carries)) * programs  # memories are read and written once
    stream = total / target.bytes_per_s
    seconds = target.launch_s + (max(work, stream) if scans else (work**BOTH + stream**BOTH) ** (1 / BOTH))
    return Estimate(p.kernel.name, total, step, wanted, seconds, side_by_side == 1)


class _One:
    """What one program of a piece does for one chunk, with so many columns of the split dimension."""

    def __init__(self, program: Program, p: Piece, s: Shape, columns: int | None) -> None:
        self.program, self.p, self.s = program, p, s
        self.body = program.ancestors(p.roots(program), p.known)
        self.extent = {"T": s.chunk, "K": s.key, "V": s.key if p.kernel.part == "factor" else s.value, "F": s.extent["F"], "1": 1}
        self.blocks = 1
        if p.split and columns:
            columns = s.key if p.split == "F" else min(columns, self.extent[p.split])
            self.blocks = -(-self.extent[p.split] // columns)
            self.extent[p.split] = columns
        self.extent["E"] = self.extent["K"] * self.extent["V"]
        self.turns = self.blocks if p.inner else 1  # of a loop over the blocks, by one program
        own = p.kernel.own(program) | {c.inp for c in program.carries if brief(program, c)}
        self.given = [op for op in self.body if op.kind == "input" and op.id not in own]
        self.taken = [program.index[i] for i in {a for op in self.body for a in op.args} & p.known]
        self.loads = [*self.given, *self.taken]

    def size(self, op: Op) -> int:
        return self.extent[op.dims[0]] * self.extent[op.dims[1]] * (self.turns if self.p.split in op.dims else 1)

    def products(self, sums: int) -> int:
        """Products of tiles, where a running sum counts as so many."""
        def repeated(op: Op) -> int:
            return self.turns if self.p.split in (*op.dims, *contracts(self.program, op)) else 1

        counts = {**PRODUCTS, "cumsum": sums}
        return sum(counts.get(op.kind, 0) * repeated(op) for op in self.body if "1" not in op.dims)

    @property
    def tiles(self) -> int:
        """Loads of more than a column."""
        return sum(self.turns if self.p.split in op.dims else 1 for op in self.loads if "1" not in op.dims)

    @property
    def elements(self) -> int:
        """Results of elementwise operations, but those that a scan has worked out before its first chunk."""
        fixed = same(self.body) if self.p.kernel.carries else set()
        maps = sum(self.size(op) for op in self.body if op.kind in ("map", "between", "mask", "sum") and op.id not in fixed)
        kinds = {op.kind for op in self.body}  # each token by itself, back through memories that are made again
        passes = WALK * (("scan" in kinds) + 3 * ("scan_grad" in kinds))
        return maps + passes * self.extent["T"] * self.extent["E"]

    @property
    def bytes(self) -> float:
        """Read and written; programs of a sequence's blocks go side by side, and load what has no columns of the split alike."""
        program, kernel, few = self.program, self.p.kernel, self.s.element_bytes
        width = 4 if kernel.part == "combine" else few
        again = (1 + AGAIN * (self.blocks - 1)) / self.blocks if kernel.carries else 1.0

        def read(ops: Iterable[Op]) -> float:
            return sum(self.size(op) * (1 if self.p.split in op.dims else again) for op in ops)

        def written(values: Iterable[int]) -> int:
            return sum(self.size(program.index[i]) for i in values)

        stores = written((*self.p.makes, *(i for n, i in program.outputs if n in kernel.stores)))
        saves = written(c.inp for c in program.carries if c.name in kernel.saves)
        return few * (read(self.taken) + stores) + width * (read(self.given) + saves)


@functools.lru_cache(maxsize=1024)
def _likely(program: Program, p: Piece) -> tuple[Program, Piece]:
    """A piece as most chunks run it: decays of a head are mild, and over chunks all are."""
    if (found := unweighted(program, p)) is not None:
        return found[0], p.moved(found[1])
    if p.kernel.carries or not any(op.kind in ("form", "form_gate") for op in program.ancestors(p.roots(program), p.known)):
        return program, p
    other, new = mild(program)
    return other, p.moved(new)


def same(body: Iterable[Op]) -> set[int]:
    """What is the same in every chunk: numbers, constants of a head, and what is made of these and of rows alone."""
    out = set[int]()
    for op in body:
        if op.kind == "input" and op.attr("role") == "head" or op.kind not in ("input", "valid") and out.issuperset(op.args):
            out.add(op.id)
    return out


def _chain(program: Program, p: Piece) -> int:
    """Products, one after the other, between a memory before a chunk and after it."""
    inside = {op.id for op in program.ancestors(p.roots(program), p.known)}
    longest = {c.inp: 0 for c in program.carries if c.name in p.kernel.carries}
    for op in program.ops:
        before = [longest[a] for a in op.args if a in longest]
        if op.id in inside and before:
            longest[op.id] = max(before) + (op.kind == "matmul" and "1" not in op.dims)
    return max((longest.get(c.out, 0) for c in program.carries if c.name in p.kernel.carries), default=0)


def rank(program: Program, schedule: Schedule, shape: Shape, target: Target) -> tuple[float, str]:
    """The sum over the pieces, and what was counted for each."""
    found = estimate(gather(program), schedule, shape, target)
    return sum(e.seconds for e in found), ", ".join(
        f"{e.name} {e.seconds * 1e6:.0f} us ({e.bytes / 1e6:.0f} MB, {e.step * 1e6:.1f} us a chunk, {e.registers} registers)"
        for e in found)
