"""Chunk program → the affine map that a chunk applies to its memory: M ↦ a ⊙ M + T M + B.

Every chunk program is affine in its carry. Splitting it off lets all chunks be computed at once, before and after a
short scan over (a, T, B), and it is the summary that processors exchange when a sequence is split over them.

The same holds for runs of chunks, segments: B is the memory after a segment that starts from none, and what a segment makes
of the memory before it, its *factor* F, moves from chunk to chunk like a memory without what is written. F starts from ones
where a chunk scales its memory elementwise, and from the identity where it mixes the rows of it (reads): the chunk's
operations then act on K columns instead of V. M ↦ F ∘ M + B takes a memory over the segment. In reverse, the cotangent dM
of a memory M has the transposed map: D ↦ Fᵀ ∘ D + B.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import sympy

from lsmc.ir import Builder, Carry, LsmIRError, Op, Program, operand, verify


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


# -- segments ---------------------------------------------------------------------------------------------------------

FACTOR, PART = "_factor", "_part"
"""Behind a memory's name: what a segment makes of the memory before it, and what it holds if that is zero."""

LINEAR = frozenset({"matmul", "expand", "sum", "cumsum", "valid"})


def origin(program: Program, name: str) -> str:
    """The memory whose factor takes `name` over a segment: M for M and for its cotangent d_M."""
    names = [c.name for c in program.carries]
    return name[2:] if name.startswith("d_") and name[2:] in names else name


@functools.cache
def moves(program: Program) -> Mapping[str, str]:
    """How memories pass through a chunk: "whole", "scaled" elementwise, or "mixed" by a K×K matrix. Memories that need one
    another on their way, and those that go token by token inside a chunk, or have other rows to mix than K, are left out."""
    found: dict[str, str] = {}
    for c in program.carries:
        together = {d.inp for d in program.carries if d.reverse == c.reverse and d != c}
        if together & {op.id for op in program.ancestors([c.out])}:
            continue
        b = Builder(program.ops)
        try:
            how = split(b, program, c)
            if how.transition is not None and origin(program, c.name) == c.name:
                _columns(b, program, c, c.inp)
        except LsmIRError:
            continue
        if how.transition is not None and b.dims(c.inp)[0] != "K":
            continue
        one = b.map(sympy.Integer(1))
        found[c.name] = "mixed" if how.transition is not None else "whole" if how.scale == one else "scaled"
    return {n: kind for n, kind in found.items() if kind == found.get(origin(program, n))}


@functools.cache
def factors(program: Program) -> Program:
    """`program` with a carry M_factor beside each memory M that a chunk scales, (K, 1) or (K, V), or mixes, where its
    columns V stand for K. Cotangents have none: they take that of their memory."""
    b, carries = Builder(program.ops), list(program.carries)
    for c in program.carries:
        kind = moves(program).get(c.name, "whole")
        if kind == "whole" or origin(program, c.name) != c.name:
            continue
        if kind == "mixed":
            f = b.input(c.name + FACTOR, "carry", b.dims(c.inp))
            out = _columns(b, program, c, f)
        else:
            scale = split(b, program, c).scale
            scale = b.map(sympy.Integer(0)) if scale is None else scale
            f = b.input(c.name + FACTOR, "carry", (b.dims(c.inp)[0], b.dims(scale)[1]))
            out = b.mul(f, scale)
        carries.append(Carry(c.name + FACTOR, f, out, c.reverse))
    return replace(program, ops=tuple(b.ops), carries=tuple(carries))


@functools.cache
def combination(program: Program, names: tuple[str, ...]) -> Program:
    """M ↦ F ∘ M + B for these memories, a segment at a time; F and B are memories that were left behind by each segment."""
    b, carries = Builder(), dict[str, Carry]()
    known = {c.name: c for c in factors(program).carries}
    for name in names:
        of, dims = origin(program, name), program.index[known[name].inp].dims
        memory, part = b.input(name, "carry", dims), b.input(name + PART, "carry", dims)
        kind = moves(program)[name]
        factor = None
        if kind == "whole":
            out = b.add(memory, part)
        elif kind == "scaled":
            factor = b.input(of + FACTOR, "carry", factors(program).index[known[of + FACTOR].inp].dims)
            out = b.map(operand(0) * operand(1) + operand(2), factor, memory, part)
        else:
            factor = b.input(of + FACTOR, "carry", ("K", "K"))
            out = b.add(b.matmul(factor, memory, ta=name != of), part)
        carries[name] = Carry(name, memory, out, known[name].reverse)
        carries[name + PART] = Carry(name + PART, part, part)
        if factor is not None:
            carries[of + FACTOR] = Carry(of + FACTOR, factor, factor)
    return verify(Program(program.name, tuple(b.ops), tuple(carries.values()), ()))


def _columns(b: Builder, program: Program, carry: Carry, x: int) -> int:
    """The linear part of a chunk's map applied to x, whose columns may be any: the chunk's operations without what is added.

    Raises `LsmIRError` where columns do not go through alike.
    """
    found = {carry.inp: x}
    for op in program.ancestors([carry.out]):
        on = [a for a in op.args if a in found]
        if op.id == carry.inp or not on:
            continue
        if op.dims[1] != "V":
            raise LsmIRError(f"{op}\nmixes the columns of the memory")
        if op.kind == "map":
            slopes = [(found[a], b.map(sympy.diff(op.attr("expr"), operand(i)), *op.args)) for i, a in enumerate(op.args)
                      if a in found]
            if any(b.dims(s)[1] == "V" for _, s in slopes):
                raise LsmIRError(f"{op}\nscales the columns of the memory")
            found[op.id] = b.expand(b.add(*(_times(b, a, s) for a, s in slopes)), op.dims)
        elif op.kind in LINEAR and len(on) == 1:
            found[op.id] = b.emit(op.kind, op.dims, *(found.get(a, a) for a in op.args), **dict(op.attrs))
        else:
            raise LsmIRError(f"{op}\nis not linear in the memory")
    return found[carry.out]
