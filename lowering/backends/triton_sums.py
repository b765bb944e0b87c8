"""Running sums that are added are taken of the sum: one pass over the rows instead of one each.

Sums from the rows behind stay; sums over the rows before become the total less those behind. In the tile functions a
running sum of 16-bit inputs keeps 17 bits of each summand, so nothing is lost that was there.
"""

from __future__ import annotations

import sympy

from lsmc.ir import Builder, Carry, Op, Program, operand, prune, verify


def gather(program: Program) -> Program:
    """`program` with the wide running sums of each addition taken together."""
    b = Builder()
    new: dict[int, int] = {}
    for op in program.ops:
        args = [new[a] for a in op.args]
        if op.kind == "map":
            new[op.id] = plain_sum(op) and together(b, args) or b.map(op.attr("expr"), *args)
        else:
            new[op.id] = b.emit(op.kind, op.dims, *args, **dict(op.attrs))
    carries = tuple(Carry(c.name, new[c.inp], new[c.out], c.reverse) for c in program.carries)
    return verify(prune(Program(program.name, tuple(b.ops), carries, tuple((n, new[i]) for n, i in program.outputs))))


def plain_sum(op: Op) -> bool:
    """Whether a map adds its operands as they are."""
    return bool(op.attr("expr") == sympy.Add(*(operand(i) for i in range(len(op.args)))))


def together(b: Builder, args: list[int]) -> int | None:
    """The sum of these values with its wide running sums taken together; None where there is nothing to gain."""
    sums = [a for a in args if b.ops[a].kind == "cumsum" and b.ops[a].dims[1] != "1"]
    if len(sums) < 2:
        return None
    inner: list[int] = []
    outer = [a for a in args if a not in sums]
    for a in sums:
        (x,), reverse, exclusive = b.ops[a].args, b.ops[a].attr("reverse"), b.ops[a].attr("exclusive")
        inner.append(x if reverse else b.map(-operand(0), x))
        if not reverse:
            outer.append(b.sum(x, axis=0))
        if reverse == exclusive:  # the row itself: too much behind it, or too little before it
            outer.append(b.map(-operand(0), x) if reverse else x)
    return b.add(b.cumsum(b.add(*inner), reverse=True), *outer)
