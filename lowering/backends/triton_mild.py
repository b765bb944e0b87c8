"""A chunk program where all decays are mild: forms become products with e^G and e^−G, and sums take common factors out.

With s the running sum of g, the decay from j to i is e^{s_i} e^{−s_j}, which no dtype overflows while s stays above the
bound of `triton_tiles.mild`. All forms on one decay then share its factors with each other and with the reads of the
memory, e^{s} A + e^{s} B is e^{s} (A + B), and few tiles have to be alive at once. Kernels take this form for the chunks
that allow it, and the program as it stands for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import sympy

from lsmc.functions import exp
from lsmc.ir import Builder, Op, Program, operand, place
from lsmc.lowering.backends.triton_sums import plain_sum, product, together

Term = tuple[sympy.Expr, tuple[int, ...]]
"""A number and the values that it multiplies, with repetitions."""


def mild(program: Program) -> tuple[Program, dict[int, int]]:
    """The program for mild decays, and where each value of the given one is in it."""
    b = _Factored()
    new: dict[int, int] = {}
    decays = {op.args[-1] for op in program.ops if op.kind in ("form", "form_gate")}
    for op in program.ops:
        args = [new[a] for a in op.args]
        if op.kind == "form":
            new[op.id] = _form(b, op, args)
        elif op.kind == "form_gate":
            new[op.id] = _gate(b, op, args)
        elif (pair := _traced(program, op)) is not None:
            new[op.id] = b.emit("diagonal", op.dims, b.matmul(new[pair[0]], new[pair[1]], tb=True))
        elif op.kind == "map" and plain_sum(op):
            args = [a for arg in args for a in (b.ops[arg].args if b.ops[arg].kind == "map" and plain_sum(b.ops[arg]) else [arg])]
            new[op.id] = together(b, args) or b.add(*args)
        elif op.kind == "map":
            new[op.id] = b.map(*_shared(b, program, op, args, decays))
        elif op.kind == "sum":
            new[op.id] = b.sum(args[0], op.attr("axis"))
        else:
            new[op.id] = b.emit(op.kind, op.dims, *args, **dict(op.attrs))
    return program.rebuilt(b.ops, new), new


class _Factored(Builder):
    """A builder whose sums of products take common factors out, and use the rounded form of a product that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: dict[tuple[int, ...], Term] = {}  # a product of values, as a number times one value

    def round(self, a: int) -> int:
        """`a` as an operand of the matrix units: what is subtracted from one another has to be the same numbers."""
        number, values = product(self, a)
        out = self.emit("round", self.dims(a), a)
        self.rounded[values] = 1 / number, (out,)
        return out

    def up(self, g: int, before: bool) -> int:
        """e^s of this row (of the row before)."""
        return self.exp(self.cumsum(g, exclusive=before))

    def down(self, g: int) -> int:
        return super().map(exp(-operand(0)), self.cumsum(g))

    def sum(self, a: int, axis: int) -> int:
        """A sum over rows adds up what running sums of the same rows add up."""
        term = self._term(operand(0), (a,))
        rounded = axis == 0 and term is not None and any(whole[0] in term[1] for _, whole in self.rounded.values())
        return super().sum(self.multiplied(term) if rounded and term else a, axis)

    def map(self, expr: sympy.Expr | int, *args: int) -> int:
        terms = self._terms(sympy.expand(expr), args)
        if len(terms) < 2 or None in terms:
            return super().map(expr, *args)
        return self.summed([t for t in terms if t is not None])

    def _terms(self, expr: sympy.Expr, args: Sequence[int]) -> list[Term | None]:
        out = list[Term | None]()
        for part in sympy.Add.make_args(expr):
            number, rest = part.as_coeff_Mul()
            op = self.ops[args[place(rest)]] if rest.is_Symbol else None
            if op is not None and op.kind == "map" and op.attr("expr").is_Add:
                out += [t and (number * t[0], t[1]) for t in self._terms(op.attr("expr"), op.args)]
            else:
                out.append(self._term(part, args))
        return out

    def _term(self, expr: sympy.Expr, args: Sequence[int]) -> Term | None:
        number, values = sympy.Integer(1), list[int]()
        for f in sympy.Mul.make_args(expr):
            base, power = f.as_base_exp()
            if f.is_number:
                number *= f
            elif base.is_Symbol and power.is_Integer and power > 0:
                c, vs = product(self, args[place(base)])
                number, values = number * c**power, values + list(vs) * int(power)
            else:
                return None
        for pair, (c, whole) in self.rounded.items():
            if not Counter(pair) - Counter(values):
                number, values = number * c, [*(Counter(values) - Counter(pair)).elements(), *whole]
        return number, tuple(sorted(values))

    def summed(self, terms: list[Term]) -> int:
        """The sum of products; a factor of several of them, widest first, is taken out of their sum."""
        count = Counter(v for _, vs in terms for v in set(vs))
        shared = max(count, key=lambda v: (count[v], "1" not in self.dims(v), v), default=None)
        if shared is None or count[shared] < 2 or "1" in self.dims(shared):
            parts = sorted(self.multiplied(t) for t in terms)
            return parts[0] if len(parts) == 1 else super().map(sympy.Add(*(operand(i) for i in range(len(parts)))), *parts)
        inner = [(c, _without(vs, shared)) for c, vs in terms if shared in vs]
        rest = [t for t in terms if shared not in t[1]]
        sign = sympy.Integer(-1 if all(c.is_negative for c, _ in inner) else 1)
        whole = sign, tuple(sorted((shared, self.summed([(sign * c, vs) for c, vs in inner]))))
        return self.summed([whole, *rest]) if rest else self.multiplied(whole)

    def multiplied(self, term: Term) -> int:
        number, values = term
        expr = sympy.Mul(number, *(operand(i) for i in range(len(values))))
        return super().map(expr, *sorted(values, key=lambda v: "1" not in self.dims(v)))


def _without(values: tuple[int, ...], one: int) -> tuple[int, ...]:
    at = values.index(one)
    return values[:at] + values[at + 1:]


def _form(b: _Factored, op: Op, args: list[int]) -> int:
    """∂F/∂P, ∂F/∂X or ∂F/∂Y."""
    *_, g = args
    strict, before = op.attr("strict"), op.attr("before")
    up, down = b.up(g, before), b.down(g)
    if op.attr("wrt") == "P":
        return b.mask(b.matmul(b.mul(args[0], up), b.mul(args[1], down), tb=True), strict)
    p = b.mask(args[0], strict)
    if op.attr("wrt") == "X":
        return b.mul(up, b.matmul(p, b.mul(args[1], down)))
    return b.mul(down, b.matmul(p, b.mul(args[1], up), ta=True))


def _gate(b: _Factored, op: Op, args: list[int]) -> int:
    """∂F/∂g: a pair adds to the rows l <= i and takes from the rows l <= j what cancels exactly."""
    p, x, y, g = args
    strict, before = op.attr("strict"), op.attr("before")
    p = b.mask(p, strict)
    xs, ys = b.mul(x, b.up(g, before)), b.mul(y, b.down(g))
    to_x, to_y = b.matmul(p, ys), b.matmul(p, xs, ta=True)
    xs, ys = b.round(xs), b.round(ys)
    sums = b.cumsum(b.map(operand(0) * operand(1) - operand(2) * operand(3), xs, to_x, ys, to_y), reverse=True)
    return b.add(sums, b.map(-operand(0) * operand(1), xs, to_x)) if before else sums


def _traced(program: Program, op: Op) -> tuple[int, int] | None:
    """Of row sums of X ⊙ Y the factors of X Yᵀ, whose diagonal they are, where that product is there."""
    inner = program.index[op.args[0]] if op.kind == "sum" and op.attr("axis") == 1 and op.dims[0] == "T" else None
    if inner is None or inner.kind != "map" or inner.attr("expr") != operand(0) * operand(1):
        return None
    products = {o.args for o in program.ops if o.kind == "matmul" and o.attr("tb") and not o.attr("ta")}
    x, y = inner.args
    return next((pair for pair in ((x, y), (y, x)) if pair in products), None)


def _shared(b: _Factored, program: Program, op: Op, args: list[int], decays: set[int]) -> tuple[sympy.Expr, ...]:
    """An expression and its operands, exponentials of sums of these decays taken from the factors of the forms."""
    expr = op.attr("expr")
    operands = list(args)
    for node in sorted(expr.atoms(exp), key=str):
        inner = node.args[0]
        sums = program.index[op.args[place(inner)]] if inner.is_Symbol else None
        if sums is None or sums.kind != "cumsum" or sums.args[0] not in decays:
            continue
        g = b.ops[args[place(inner)]].args[0]
        if not sums.attr("reverse"):
            value = b.up(g, sums.attr("exclusive"))
        elif sums.attr("exclusive"):
            value = b.mul(b.exp(b.sum(g, 0)), b.down(g))
        else:
            continue
        expr = expr.xreplace({node: operand(len(operands))})
        operands.append(value)
    return expr, *operands
