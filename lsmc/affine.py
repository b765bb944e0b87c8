"""Chunk program → the affine map that a chunk applies to its memory: M ↦ a ⊙ M + T M + B.

Every chunk program is affine in its carry. Splitting it off lets all chunks be computed at once, before and after a
short scan over (a, T, B), and it is the summary that processors exchange when a sequence is split over them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from lsmc.ir import Builder, Carry, LsmIRError, Op, Program, operand


@dataclass(frozen=True)
class Affine:
    """M ↦ scale ⊙ M + transition · M + constant; None stands for an absent term."""

    scale: int | None
    transition: int | None
    constant: int | None


def split(b: Builder, program: Program, carry: Carry) -> Affine:
    """The affine map of `carry`, in values of `b` (which starts from the program's operations).

    Raises `LsmIRError` if some operation on the memory is not affine: a fault of the program, not of the user.
    """
    return dependence(b, program, carry.out, carry.inp)


def dependence(b: Builder, program: Program, out: int, on: int, fixed: Iterable[int] = ()) -> Affine:
    """The affine map from the value `on` to the value `out`, while the values `fixed` stay what they are."""
    found: dict[int, Affine] = {on: Affine(b.map(sympy.Integer(1)), None, None)}
    for op in program.ancestors([out], fixed):
        if op.id != on and any(x in found for x in op.args):
            found[op.id] = _push(b, op, found)
    return found.get(out, Affine(None, None, out))


def _times(b: Builder, x: int, y: int) -> int:
    """x ⊙ y, without a product where one of them is 1."""
    one = b.map(sympy.Integer(1))
    return y if x == one else x if y == one else b.mul(x, y)


def _push(b: Builder, op: Op, found: dict[int, Affine]) -> Affine:
    """How one operation carries an affine function of the memory on."""
    def each(f: Affine, scale: int) -> Affine:
        return Affine(*(None if i is None else _times(b, i, scale) for i in (f.scale, f.transition, f.constant)))

    def join(parts: list[int | None]) -> int | None:
        there = [p for p in parts if p is not None]
        return b.add(*there) if there else None

    if op.kind == "map":
        expr, zero = op.attr("expr"), {operand(i): 0 for i, x in enumerate(op.args) if x in found}
        terms: list[Affine] = []
        for i, x in enumerate(op.args):
            if x in found:
                coef = sympy.diff(expr, operand(i))
                if coef.free_symbols & set(zero):
                    raise LsmIRError(f"{op}\nis not affine in the memory")
                terms.append(each(found[x], b.map(coef, *op.args)))
        rest = sympy.expand(expr).xreplace({s: sympy.Integer(0) for s in zero})
        const = None if rest == 0 else b.expand(b.map(rest, *op.args), op.dims)
        return Affine(join([t.scale for t in terms]), join([t.transition for t in terms]),
                      join([t.constant for t in terms] + [const]))
    if op.kind == "matmul" and op.args[1] in found and op.args[0] not in found and not op.attr("tb"):
        left, f, ta = op.args[0], found[op.args[1]], op.attr("ta")
        direct = None
        if f.scale is not None:
            columns = f.scale if b.dims(f.scale) == ("1", "1") else b.transpose(f.scale)
            direct = _times(b, b.transpose(left) if ta else left, columns)
        through = None if f.transition is None else b.matmul(left, f.transition, ta=ta)
        return Affine(None, join([direct, through]), None if f.constant is None else b.matmul(left, f.constant, ta=ta))
    if op.kind == "expand":
        f = found[op.args[0]]
        return Affine(f.scale, f.transition, None if f.constant is None else b.expand(f.constant, op.dims))
    raise LsmIRError(f"{op}\nis not affine in the memory")
