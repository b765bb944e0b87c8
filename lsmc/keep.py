"""What the forward program keeps for the backward one, which then works it out no more.

    forward  …  %20: (T,T) = inverse(%18)  …  keep _kept_0 = %20
    backward …  %20: (T,T) = inverse(%18)  …  take _kept_0 = %20

A backward program holds the forward operations that it needs. Values among them that no cotangent enters can come from the
forward instead, memories before each chunk among them: the scan that recomputes them is then gone. It is memory against
time, and which of the two a plan takes is decided by estimated times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lsmc.ir import Builder, Program, prune, verify


def cotangents(backward: Program) -> set[int]:
    """The inputs of a backward program that its forward program has not: cotangents of outputs and of memories."""
    gradients = {name for name, _ in backward.outputs}
    return {op.id for op in backward.inputs("token", "head") if f"d_{op.attr('name')}" not in gradients} | {
        c.inp for c in backward.carries if c.reverse}


def keep(forward: Program, backward: Program, values: Iterable[int]) -> tuple[Program, Program]:
    """Both programs with these values of `backward` made and kept by `forward`; memories are values before a chunk."""
    names = {i: f"_kept_{n}" for n, i in enumerate(sorted(set(values)))}
    needed = backward.ancestors(names)
    assert not {op.id for op in needed} & cotangents(backward), "what is kept comes before any cotangent"
    b, made = Builder(forward.ops), dict[int, int]()
    for op in needed:
        made[op.id] = b.emit(op.kind, op.dims, *(made[a] for a in op.args), **dict(op.attrs))
    first = replace(forward, ops=tuple(b.ops), kept=tuple((n, made[i]) for i, n in names.items()))
    left = tuple(c for c in backward.carries if c.inp not in names)
    second = replace(backward, carries=left, taken=tuple((n, i) for i, n in names.items()))
    return verify(prune(first)), verify(prune(second))


__all__ = ["cotangents", "keep"]
