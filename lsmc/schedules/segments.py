"""Sequences cut into segments that run side by side: for few sequences that are long.

A scan over the chunks of a sequence becomes a scan over those of every segment, from nothing; a short one over the segments,
which combines their affine maps M ↦ F ∘ M + B exactly (`lsmc.affine`); and the scan itself, each segment from where it begins.
Every chunk is walked through twice, three times where reads make F a K×K matrix, so this pays only where sequences are too
few to fill the device. A reverse scan takes the factors of the memory whose cotangent it carries, transposed.

Scans stay whole where memories need one another (momentum, rotations) or move token by token. Each packed sequence has
segments of its own.
"""

from __future__ import annotations

from dataclasses import replace

from lsmc.affine import FACTOR, moves, origin
from lsmc.ir import Program
from lsmc.schedules.base import Cut, Kernel, Schedule
from lsmc.schedules.fused import fused
from lsmc.schedules.two_pass import two_pass
from lsmc.target import H200


def segments(program: Program) -> Schedule:
    """`two_pass`, each scan {segments: B, F}, {over segments: M}, {segments: M, save it}."""
    return _cut("segments", two_pass, program)


def fused_segments(program: Program) -> Schedule:
    """`fused`, each scan {segments: B, F}, {over segments: M}, {segments: M on chip, outputs}."""
    return _cut("fused_segments", fused, program)


def count(sequences: int, chunks: int, units: int = H200.units) -> int:
    """How many segments each of B·H sequences is cut into: a power of two, as many as the device has room for and as pay:
    walking through a segment twice and over all segments takes the least time where there are about √(2 chunks)."""
    n = 1
    while 2 * n * sequences <= units and 2 * n * n <= chunks:
        n *= 2
    return n


def _cut(name: str, base: Cut, program: Program) -> Schedule:
    kernels: list[Kernel] = []
    made = set[str]()
    for k in base(program).kernels:
        kinds = {c: moves(program).get(c) for c in k.carries}
        if not k.carries or None in kinds.values():
            kernels.append(k)
            continue
        wanted = {origin(program, c) + FACTOR: kind for c, kind in kinds.items() if kind != "whole"}
        wanted = {f: kind for f, kind in wanted.items() if f not in made}
        made |= wanted.keys()
        beside = tuple(f for f, kind in wanted.items() if kind == "scaled")
        mixed = tuple(f for f, kind in wanted.items() if kind == "mixed")
        kernels.append(Kernel(f"{k.name}_map", (*k.carries, *beside), (), (), "map"))
        kernels += [Kernel(f"{k.name}_factor", mixed, (), (), "factor")] * bool(mixed)
        kernels += [Kernel(f"{k.name}_combine", k.carries, k.carries, (), "combine"), replace(k, part="apply")]
    return Schedule(name, tuple(kernels))
