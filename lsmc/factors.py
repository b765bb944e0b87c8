"""Row factors leave matrix products: (s ⊙ X) Y = s ⊙ (X Y) for one number s per row.

What enters a product is then what was loaded, as it was loaded; and the same product with different factors is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lsmc.ir import Builder, Op, Program, operand, prune, verify


def hoist(program: Program) -> Program:
    """`program` with the row factors of left operands applied after the product."""
    b = Builder()
    new: dict[int, int] = {}
    for op in program.ops:
        args = [new[a] for a in op.args]
        found = factor(b.ops, args[0]) if op.kind == "matmul" and not op.attr("ta") else None
        if found and "1" not in op.dims:
            s, x = found
            new[op.id] = b.mul(b.matmul(x, args[1], tb=op.attr("tb")), s)
        else:
            new[op.id] = b.map(op.attr("expr"), *args) if op.kind == "map" else b.emit(op.kind, op.dims, *args, **dict(op.attrs))
    return verify(prune(program.rebuilt(b.ops, new)))


def factor(ops: Mapping[int, Op] | Sequence[Op], i: int) -> tuple[int, int] | None:
    """(s, X) where the value i is s ⊙ X with one s per row."""
    op = ops[i]
    if op.kind != "map" or len(op.args) != 2 or op.attr("expr") != operand(0) * operand(1):
        return None
    x, y = op.args
    for s, wide in ((x, y), (y, x)):
        if ops[s].dims == (op.dims[0], "1") and ops[wide].dims == op.dims != (op.dims[0], "1"):
            return s, wide
    return None


__all__ = ["factor", "hoist"]
