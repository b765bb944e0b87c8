"""Sums over V on the way from the cotangent of a memory to the next one, which wait for each other, are taken side by side.

A backward program is linear in its cotangents. In the gradient of a norm, sums over V of what came from another sum follow each
other; with x a cotangent's row, s = Σ a ⊙ x an earlier sum and a, b, c made of forward values,

    Σ (b ⊙ x + s c)  =  Σ b ⊙ x + s Σ c

so that all wide sums are of x, and what depends on another sum is one number a row. The factors of x and s become values of
their own, without cotangents: kernels over all chunks can make them (`triton_cut._outside`).
"""

from __future__ import annotations

import sympy

from lsmc.ir import Builder, Op, Program, operand, prune, verify

Terms = dict[int, int | None]
"""A late value as a sum: late values, each with its factor, which no cotangent enters; None is 1."""


def distributed(program: Program) -> Program:
    """`program` with such sums taken of the cotangent itself; as it is where there are none."""
    carried = [c for c in program.carries if c.reverse]
    late = {c.inp for c in carried}
    for op in program.ops:
        if late.intersection(op.args):
            late.add(op.id)
    way = {op.id for op in program.ancestors([c.out for c in carried])} & late
    if not any(_across(op) for op in program.ops if op.id in way):
        return program
    return _Way(program, late, way).rewritten()


def _across(op: Op) -> bool:
    return op.kind == "sum" and op.attr("axis") == 1 and op.dims == ("T", "1")


class _Way:
    """Late maps stay sums of terms, at most one of them wide, until something else than a map or a sum over V takes them."""

    def __init__(self, program: Program, late: set[int], way: set[int]) -> None:
        self.program, self.late, self.way, self.b = program, late, way, Builder()
        self.new: dict[int, int] = {}
        self.terms: dict[int, Terms] = {}

    def rewritten(self) -> Program:
        for op in self.program.ops:
            if op.id in self.way and op.dims[0] == "T" and op.kind in ("map", "expand"):
                self._map(op)
            elif op.id in self.way and _across(op):
                self.new[op.id] = self._sum(self._of(op.args[0]))
            else:
                self.new[op.id] = self.b.emit(op.kind, op.dims, *map(self._value, op.args), **dict(op.attrs))
        return verify(prune(self.program.rebuilt(self.b.ops, {op.id: self._value(op.id) for op in self.program.ops})))

    def _of(self, i: int) -> Terms:
        return self.terms.get(i) or {self.new[i]: None}

    def _value(self, i: int) -> int:
        if i not in self.new:
            parts = [x if c is None else self.b.mul(c, x) for x, c in self.terms[i].items()]
            self.new[i] = self.b.expand(self.b.add(*parts), self.program.index[i].dims)
        return self.new[i]

    def _map(self, op: Op) -> None:
        """The terms of a map that is linear in what is late; a value of its own where it adds other values or wide ones."""
        expr = op.attr("expr") if op.kind == "map" else operand(0)
        moving = {n for n, a in enumerate(op.args) if a in self.late}
        slopes = {n: expr.diff(operand(n)) for n in moving}
        if any(slope.free_symbols & {operand(n) for n in moving} for slope in slopes.values()):
            self.new[op.id] = self.b.map(expr, *map(self._value, op.args))
            return
        terms: Terms = {}
        for n, slope in slopes.items():
            own = None if slope == 1 else self._early(slope, op)
            for x, c in self._of(op.args[n]).items():
                factor = own if c is None else c if own is None else self.b.mul(own, c)
                if x in terms:
                    factor = self.b.add(self._factor(terms[x]), self._factor(factor))
                terms[x] = factor
        self.terms[op.id] = terms
        rest = expr.xreplace({operand(n): sympy.Integer(0) for n in moving})
        if rest != 0 or sum(self.b.dims(x)[1] != "1" for x in terms) > 1:
            late = self._value(op.id)
            self.new[op.id] = late if rest == 0 else self.b.add(late, self._early(rest, op))
            del self.terms[op.id]

    def _early(self, expr: sympy.Expr, op: Op) -> int:
        """A map of the early operands of `op`; the late ones, which it does not have, stand for any."""
        return self.b.map(expr, *(self.new.get(a, 0) for a in op.args))

    def _sum(self, terms: Terms) -> int:
        parts = []
        for x, c in terms.items():
            pair = (x, self._factor(c))
            wide = [i for i in pair if self.b.dims(i)[1] != "1"] or [self.b.expand(self._factor(None), ("1", "V"))]
            narrow = [i for i in pair if self.b.dims(i)[1] == "1"]  # what is one number a row leaves the sum
            parts.append(self.b.mul(*narrow, self.b.sum(self.b.mul(*wide), 1)))
        return self.b.add(*parts)

    def _factor(self, c: int | None) -> int:
        return self.b.map(sympy.Integer(1)) if c is None else c
