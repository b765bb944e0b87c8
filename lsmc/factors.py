"""Row factors leave matrix products: (s ⊙ X) Y = s ⊙ (X Y) for one number s per row.

What enters a product is then what was loaded, as it was loaded; and the same product with different factors is computed once.
So are weights of pairs of tokens with their decay, which gradients take apart: (S ⊙ dP) ⊙ D = P ⊙ dP where P = S ⊙ D is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import sympy

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
    return verify(prune(regrouped(program.rebuilt(b.ops, new))))


def regrouped(program: Program) -> Program:
    """`program` with products of three (T, T) tiles taken by way of a product of two of them that came before."""
    b, new, pairs = Builder(), dict[int, int](), dict[frozenset[int], int]()
    users = Counter(a for op in program.ops for a in op.args)
    ends = {i for _, i in (*program.outputs, *program.kept, *program.taken)}

    def multiplied(i: int) -> list[int] | None:
        """The operands of a product of (T, T) tiles."""
        op = program.index[i]
        alike = op.kind == "map" and op.dims == ("T", "T") and all(program.index[a].dims == op.dims for a in op.args)
        return [*op.args] if alike and op.attr("expr") == sympy.Mul(*(operand(n) for n in range(len(op.args)))) else None

    for op in program.ops:
        args = [new[a] for a in op.args]
        whole = multiplied(op.id)
        tiles = [x for a in whole or () for x in (users[a] == 1 and a not in ends and multiplied(a) or [a])]
        known = [pair for pair in pairs if len(tiles) == len({*tiles}) == 3 and pair <= {*tiles}]
        if known:
            new[op.id] = b.mul(new[pairs[known[0]]], *(new[i] for i in tiles if i not in known[0]))
        else:
            new[op.id] = b.map(op.attr("expr"), *args) if op.kind == "map" else b.emit(op.kind, op.dims, *args, **dict(op.attrs))
        if whole and len({*whole}) == 2:
            pairs.setdefault(frozenset(whole), op.id)
    return program.rebuilt(b.ops, new)


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
