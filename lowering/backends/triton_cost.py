"""What the launches of a schedule cost on a GPU: bytes, and the time that one program takes for one chunk.

The constants were fitted to single kernels measured on an H200 (docs/benchmarks.md); the ranking is what they are for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lsmc.ir import Op, Program
from lsmc.lowering.backends.triton_cut import SCANS, Piece, brief, contracts, pieces
from lsmc.lowering.backends.triton_mild import mild
from lsmc.lowering.backends.triton_registers import alive, block, room
from lsmc.lowering.backends.triton_sums import gather
from lsmc.lowering.backends.triton_walk import held
from lsmc.schedules import Schedule, Shape
from lsmc.schedules.segments import count
from lsmc.target import Target


@dataclass(frozen=True)
class Rates:
    """Seconds of a product of tiles, with the wait for its operands, and of one element of an elementwise result by 128 threads;
    `registers` of a thread that values may take, and by how many more a chunk takes twice as long."""

    product: float
    element: float
    registers: int
    twice: int


RATES = {True: Rates(0.35e-6, 6e-11, 230, 60), False: Rates(0.65e-6, 8e-11, 300, 800)}
"""Of scans, which load what the next chunks want, and of kernels over chunks."""
PRODUCTS = {"form": 2, "form_gate": 4, "inverse": 10, "cumsum": 2, "matmul": 1}
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
STREAM = {True: 1.0, False: 0.85}
"""Part of the rate of a copy that loads and stores reach together, in scans and over chunks."""


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
    part, n = p.kernel.part, count(s.sequences, s.chunks, target.units) if p.kernel.part else 1
    ends = p.roots(program)
    body = program.ancestors(ends, p.known)
    extent = {"T": s.chunk, "K": s.key, "V": s.key if part == "factor" else s.value, "F": s.extent["F"], "1": 1}
    carries = [program.index[c.inp] for c in program.carries if c.name in p.kernel.carries]
    usual = held(s.key, s.value, sum("1" not in op.dims for op in carries), s.sequences, p.split is not None, target.units)
    warps = warps or (usual["num_warps"] if p.kernel.walks else 8 if p.kernel.carries and p.split is None else 4)
    blocks = 1
    if p.split:
        columns = columns or (usual["BV"] if p.kernel.walks else block(program, p, s.chunk))
        columns = s.key if p.split == "F" else min(columns, extent[p.split])
        blocks = -(-extent[p.split] // columns)
        extent[p.split] = columns
    extent["E"] = extent["K"] * extent["V"]

    turns = blocks if p.inner else 1  # of a loop over the blocks, by one program

    def size(op: Op) -> int:
        return extent[op.dims[0]] * extent[op.dims[1]] * (turns if p.split in op.dims else 1)

    def repeated(op: Op) -> int:
        return turns if p.split in (*op.dims, *contracts(program, op)) else 1

    products = sum(PRODUCTS.get(op.kind, 0) * repeated(op) for op in body if "1" not in op.dims)
    fixed = same(body) if p.kernel.carries else set()
    elements = sum(size(op) for op in body if op.kind in ("map", "between", "mask", "sum") and op.id not in fixed)
    walks = [op.kind for op in body if op.kind in SCANS]  # each token by itself, back through memories that are made again
    elements += WALK * ("scan" in walks) * extent["T"] * extent["E"] + 3 * WALK * ("scan_grad" in walks) * extent["T"] * extent["E"]
    taken = {a for op in body for a in op.args} & p.known
    width = 4 if part == "combine" else s.element_bytes
    own = p.kernel.own(program) | {c.inp for c in program.carries if brief(program, c)}
    again = (1 + AGAIN * (blocks - 1)) / blocks if p.kernel.carries else 1.0  # programs of a sequence's blocks go side by side
    moved = sum(size(op) * width * (1 if p.split in op.dims else again) for op in body if op.kind == "input" and op.id not in own)
    moved += sum(size(op) * s.element_bytes * (1 if p.split in op.dims else again) for op in (program.index[i] for i in taken))
    moved += sum(size(program.index[i]) * s.element_bytes for i in p.makes)
    moved += sum(size(program.index[i]) * s.element_bytes for n, i in program.outputs if n in p.kernel.stores)
    moved += sum(size(program.index[c.inp]) * width for c in program.carries if c.name in p.kernel.saves)
    wanted = alive(program, p, tuple(extent.items())) // (128 * warps)
    rates = RATES[bool(p.kernel.carries)]
    slower = 1 + max(0, wanted - rates.registers) / rates.twice
    waits = rates.product * products * slower + CHAINED * max(0, _chain(program, p) - 1) + TOKEN * p.kernel.walks
    step = waits + rates.element * elements * 4 / warps * slower
    side_by_side = 2 + 2 * p.kernel.walks
    if p.kernel.carries and p.split in ("K", "V") and warps <= 4 and not p.kernel.walks and part != "combine":
        loads = [*(op for op in body if op.kind == "input" and op.id not in own), *(program.index[i] for i in taken)]
        side_by_side = max(1, room(s.element_bytes * sum(map(size, loads)), extent[p.split], 2))
    resident = side_by_side * target.units * 4 // warps
    programs = s.sequences * blocks // turns
    steps = n if part == "combine" else s.chunks  # that a sequence takes
    if p.kernel.carries:
        side = 1 if part == "combine" else n  # programs of one sequence, side by side
        if warps <= 4:
            step -= waits * (1 - (ONLY if side_by_side == 1 else ALONE if programs * side <= target.units else 1.0))
        work = step * -(-steps // side) * -(-programs * side // resident)
    else:
        work = step * max(1.0, programs * steps / resident)
    states = 8 * sum(map(size, carries))  # read and written once
    total = moved * programs * steps + states * programs
    scans = bool(p.kernel.carries)
    seconds = target.launch_s + max(work, total / (STREAM[scans] * target.bytes_per_s))
    return Estimate(p.kernel.name, total, step, wanted, seconds, side_by_side == 1)


@functools.lru_cache(maxsize=1024)
def _likely(program: Program, p: Piece) -> tuple[Program, Piece]:
    """A piece as most chunks run it: over chunks, decays are mild."""
    if p.kernel.carries or not any(op.kind in ("form", "form_gate") for op in program.ancestors(p.roots(program), p.known)):
        return program, p
    other, new = mild(program)
    return other, replace(p, known=frozenset(new[i] for i in p.known), makes=tuple(new[i] for i in p.makes))


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
