"""Fewer and shorter sums: what is added is summed once, and row sums are taken where they need the least.

Running sums that are added are taken of the sum: one pass over the rows instead of one each. Sums from the rows behind stay;
sums over the rows before become the total less those behind. In the tile functions a running
sum of 16-bit inputs keeps 15 bits of each summand, so little is lost that was there.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

import sympy

from lsmc.functions import exp
from lsmc.ir import Builder, Op, Program, operand, place, prune, verify
from lsmc.lowering.backends.triton_cut import SCANS, splits
from lsmc.lowering.backends.triton_linear import distributed
from lsmc.schedules import Kernel


def gather(program: Program) -> Program:
    """`program` as kernels are cut from it: its scans' sums `distributed`, all sums `summed`, its outputs `dealt`."""
    return _gather(program, program.terms)


@functools.cache
def _gather(program: Program, terms: tuple[tuple[str, int], ...]) -> Program:
    """Equal programs whose terms have other names are kept apart."""
    return dealt(summed(distributed(program)))


def summed(program: Program) -> Program:
    """`program` with the wide running sums of each addition taken together, powers of columns made once, and shorter row sums."""
    b = Builder()
    new: dict[int, int] = {}
    users, once = Counter(a for op in program.ops for a in op.args), defaultdict[int, bool](bool)
    users.update(i for c in program.carries for i in (c.inp, c.out))
    users.update(i for _, i in (*program.outputs, *program.kept, *program.taken))
    products = {(op.args, op.attr("tb")) for op in program.ops if op.kind == "matmul" and not op.attr("ta")}
    powers = dict[int, int]()  # e^x of a value x, where the program has it
    for op in program.ops:
        args = [new[a] for a in op.args]
        if op.kind == "sum" and op.attr("axis") == 1 and op.dims[0] == "T":
            known = {((new[x], new[y]), tb) for (x, y), tb in products if x in new and y in new}
            new[op.id] = row_sum(b, args[0], known)
        elif op.kind == "map" and op.dims in (("T", "1"), ("1", "V")) and plain_sum(op):
            own = [users[x] == 1 for x in op.args]
            parts = _summed_once(b, [a for a, mine in zip(args, own, strict=True) if mine])
            parts = [one] if (one := together(b, parts)) is not None else parts
            new[op.id] = b.add(*parts, *(a for a, mine in zip(args, own, strict=True) if not mine))
        elif op.kind == "map" and op.dims == ("K", "V") and plain_sum(op):  # products last: matrix units add to what is there
            parts = [t for a in args for t in (b.ops[a].args if once[a] and plain_sum(b.ops[a]) else (a,))]
            new[op.id] = b.add(*sorted(parts, key=lambda t: b.ops[t].kind == "matmul"))
            once[new[op.id]] = users[op.id] == 1
        elif op.kind == "map":
            expr, more = op.attr("expr"), list[int]()
            if expr == exp(operand(0)):
                powers[args[0]] = b.map(expr, *args)
            elif op.dims[1] == "1":
                expr, more = _found(expr, args, powers)
            new[op.id] = plain_sum(op) and together(b, args) or b.map(expr, *args, *more)
        else:
            new[op.id] = b.emit(op.kind, op.dims, *args, **dict(op.attrs))
    return verify(prune(program.rebuilt(b.ops, new)))


def dealt(program: Program) -> Program:
    """`program` with an output of one number per token or head left in two shares (`triton_cut.whole`) where some of its terms
    take the products of K's gradients and others those of V's: else one kernel would do the other's work again."""
    def ways(n: str, i: int) -> dict[str, bool]:
        return splits(replace(program, outputs=((n, i),)), Kernel("", (), (), (n,)), ())

    def products(*ends: int) -> set[int]:
        return {op.id for op in program.ancestors(ends) if op.kind == "matmul"}

    clean = [(i, ways(n, i)) for n, i in program.outputs]
    done = {d: products(*(i for i, way in clean if way.get(d))) for d in ("K", "V") if any(way.get(d) for _, way in clean)}
    if len(done) < 2 or any(op.kind in SCANS for op in program.ops):
        return program
    b, outputs = Builder(program.ops), list[tuple[str, int]]()
    for n, i in program.outputs:
        op, shares = program.index[i], defaultdict[str, list[int]](list)
        for a in op.args if op.kind == "map" and op.dims[1] == "1" and plain_sum(op) else ():
            fits = [d for d in done if products(a) and d in ways(n, a)]
            shares[min(fits, key=lambda d: len(products(a) - done[d]), default="")].append(a)
        rest, dims = shares.pop("", []), list(shares)
        if len(dims) < 2:
            outputs.append((n, i))
        else:
            outputs += [(n, b.add(*rest, *shares[dims[0]])), (f"_{dims[1]}_{n}", b.add(*shares[dims[1]]))]
    return verify(prune(replace(program, ops=tuple(b.ops), outputs=tuple(outputs))))


def product(b: Builder, a: int) -> tuple[sympy.Expr, tuple[int, ...]]:
    """A value as a number times other values, with repetitions."""
    op = b.ops[a]
    expr = op.attr("expr") if op.kind == "map" else None
    if expr is None or expr.is_Add or any(not (f.is_Symbol or f.is_number) for f in sympy.Mul.make_args(expr)):
        return sympy.Integer(1), (a,)
    parts = [(f, ()) if f.is_number else product(b, op.args[place(f)]) for f in sympy.Mul.make_args(expr)]
    return sympy.Mul(*(c for c, _ in parts)), tuple(sorted(v for _, vs in parts for v in vs))


def row_sum(b: Builder, a: int, products: set[tuple[tuple[int, int], bool]]) -> int:
    """The sum of each row: factors of one number a row come after it, and over V of P Q ⊙ Y it is that over K of P ⊙ Y Qᵀ, if
    Y Qᵀ is one of the `products` (whose second factors may stand transposed): gradient kernels share K among programs."""
    number, values = product(b, a)
    outside = [v for v in values if b.dims(v)[1] == "1"]
    inside = [v for v in values if b.dims(v)[1] != "1"]
    for x, y in (inside, inside[::-1]) if len(inside) == 2 else ():
        op = b.ops[x]
        if op.dims[1] == "V" and op.kind == "matmul" and not op.attr("ta") and ((y, op.args[1]), not op.attr("tb")) in products:
            inside = [op.args[0], b.matmul(y, op.args[1], tb=not op.attr("tb"))]
            break
    total = b.sum(inside[0] if len(inside) == 1 else b.mul(*inside), 1)
    if not outside and number == 1:
        return total
    return b.map(sympy.Mul(number, *(operand(i) for i in range(len(outside) + 1))), *outside, total)


def _summed_once(b: Builder, args: list[int]) -> list[int]:
    """Values with the same sum, in which what is summed over V, or its rows, is added before."""
    out, sums = list[int](), dict[int, list[int]]()
    for a in args:
        op = b.ops[a]
        inner = b.ops[op.args[0]] if op.kind == "sum" else op
        if op.kind == "sum" and inner.dims == ("T", "V") and len(product(b, inner.id)[1]) == 1:
            sums.setdefault(op.attr("axis"), []).append(inner.id)
        else:
            out.append(a)
    return out + [b.sum(b.add(*inner), axis) for axis, inner in sums.items()]


def plain_sum(op: Op) -> bool:
    """Whether a map adds its operands as they are."""
    return bool(op.attr("expr") == sympy.Add(*(operand(i) for i in range(len(op.args)))))


def _found(expr: sympy.Expr, args: list[int], powers: Mapping[int, int]) -> tuple[sympy.Expr, list[int]]:
    """An expression with powers e^x taken from the values that are these, which come behind its operands."""
    more = list[int]()
    for node in sorted(expr.atoms(exp), key=str):
        if node.args[0].is_Symbol and args[place(node.args[0])] in powers:
            expr = expr.xreplace({node: operand(len(args) + len(more))})
            more.append(powers[args[place(node.args[0])]])
    return expr, more


def together(b: Builder, args: list[int]) -> int | None:
    """The sum of these values with its wide running sums taken together, and what decays between tokens get; None where there is
    nothing to gain."""
    between = defaultdict[bool, list[int]](list)
    for a in args:
        if b.ops[a].kind == "between_grad":
            between[b.ops[a].attr("before")].append(a)
    for before, some in between.items():
        if len(some) > 1:
            one = b.emit("between_grad", ("T", "1"), b.add(*(b.ops[a].args[0] for a in some)), before=before)
            rest = [one, *(a for a in args if a not in some)]
            return together(b, rest) or b.add(*rest)
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
