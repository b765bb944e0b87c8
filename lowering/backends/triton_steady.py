"""A chunk program in which decays of one number a head scale rows, instead of weighting pairs of tokens.

With n tokens up to and with the row i, D_ij = e^{(n_i − n_j) log a} = e^{n_i log a} e^{−n_j log a}, so that for S = mask(X Yᵀ)

    (S ⊙ D) U + X̃ M = e^{n log a} ⊙ (S U' + X M)        U' = e^{−n log a} ⊙ U
    M_C = e^{N log a} ⊙ (M + Kᵀ U')

is the program without a decay, of scaled rows: no tile of pairs has to be weighted, and products add to what is there. That is
right while e^{−N log a} is a number, `triton_tiles.mild`; kernels decide once for each head, and take the program as it stands
for others.

Every value is kept as (rows ⊙ core ⊙ columns) × a power of the whole chunk's decay. Products of matrices pass on what scales their
own rows and columns, and of what scales the rows that they sum over the operand with fewer columns takes all: what tokens bring,
not weights of pairs, whose range is that of 16 bits. Sums pass on what scales all of their terms. Weights that several products
take are weighted as they are: else each would scale its other operand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import sympy

from lsmc.functions import exp, relu
from lsmc.ir import Builder, Dims, Op, Program, operand, place
from lsmc.lowering.backends.triton_cut import Piece

Key = TypeVar("Key")
Powers = Mapping[tuple[int, bool], int]
"""Powers of e^{n log a}, by log a and whether n leaves out the row itself."""


@dataclass(frozen=True)
class Scaled:
    """A value as its core, 1 everywhere if None, with what scales it; `lower`: only below the diagonal, strictly or not."""

    dims: Dims
    core: int | None
    rows: Powers = field(default_factory=dict)
    columns: Powers = field(default_factory=dict)
    whole: Mapping[int, int] = field(default_factory=dict)
    lower: bool | None = None

    @property
    def plain(self) -> bool:
        return self.core is not None and not (self.rows or self.columns or self.whole) and self.lower is None


def decays(program: Program) -> dict[int, int]:
    """The decays between tokens, (T, T), that are powers of one number a head: each with its log decay."""
    inner = {op.id: program.index[op.args[0]] for op in program.ops if op.kind == "mask"}
    found = {i: multiple(program, op.args[0]) for i, op in inner.items() if op.kind == "map" and op.attr("expr") == exp(operand(0))}
    return {i: x[0] for i, x in found.items() if x is not None and x[1].kind == "map"}


def multiple(program: Program, i: int) -> tuple[int, Op] | None:
    """Of a value x n, with one number x and numbers n of tokens, differences of two for pairs of tokens: x and n."""
    op = program.index[i]
    if op.kind != "map" or op.attr("expr") != operand(0) * operand(1):
        return None
    for x, n in (op.args, op.args[::-1]):
        count = program.index[n]
        counts = [program.index[a] for a in count.args] if count.kind == "map" else [count]
        counts = [program.index[c.args[0]] if c.kind == "transpose" else c for c in counts]
        known = count.kind != "map" or count.attr("expr") == relu(operand(0) - operand(1))
        if program.index[x].dims == ("1", "1") and known and all(_counts(program, c) for c in counts):
            return x, count
    return None


def _counts(program: Program, op: Op) -> bool:
    """Whether a value counts tokens."""
    if op.kind not in ("cumsum", "sum"):
        return False
    one = program.index[op.args[0]]
    one = program.index[one.args[0]] if one.kind == "valid" else one
    one = program.index[one.args[0]] if one.kind == "expand" else one
    return one.kind == "map" and one.attr("expr") == 1


def unweighted(program: Program, piece: Piece) -> tuple[Program, dict[int, int]] | None:
    """The program of a scan in this form, and where each value is in it; None where no such decay is worked out there. What
    earlier launches made stays as it is."""
    found, body = decays(program), program.ancestors(piece.roots(program), piece.known)
    if not piece.kernel.carries or not any(op.id in found for op in body):
        return None
    return _Unweighted(program, piece, body).run()


class _Unweighted:
    def __init__(self, program: Program, piece: Piece, body: Iterable[Op]) -> None:
        self.program, self.split = program, piece.split
        self.given = {*piece.known, *(i for _, i in program.taken)}
        self.products = Counter(a for op in body if op.kind == "matmul" for a in op.args if program.index[a].dims == ("T", "T"))
        self.b, self.values, self.new = Builder(), dict[int, Scaled](), dict[int, int]()
        self.rows = self.b.valid(self.b.expand(self.b.map(1), ("T", "1")))

    def run(self) -> tuple[Program, dict[int, int]]:
        for op in self.program.ops:
            value = self._plain(op) if op.id in self.given else self._value(op)
            self.new[op.id] = self._made(value)
            self.values[op.id] = Scaled(op.dims, self.new[op.id]) if self.products[op.id] > 1 else value
        out = self.program.rebuilt(self.b.ops, self.new)
        cores = ((t, self.values[i].core) for t, i in self.program.terms)  # a term, but for what scales it
        return replace(out, terms=(*out.terms, *((t, i) for t, i in cores if i is not None))), self.new

    def _plain(self, op: Op) -> Scaled:
        args = [self.new[a] for a in op.args]
        made = self.b.map(op.attr("expr"), *args) if op.kind == "map" else self.b.emit(op.kind, op.dims, *args, **dict(op.attrs))
        return Scaled(op.dims, made)

    def _value(self, op: Op) -> Scaled:
        args = [self.values[a] for a in op.args]
        if all(x.plain for x in args) and not (op.kind == "map" and op.attr("expr").has(exp)):
            return self._plain(op)
        match op.kind:
            case "map":
                return self._map(op, args)
            case "mask":
                x, = args
                return replace(x, lower=bool(x.lower) or op.attr("strict"))
            case "valid" if args[0].core is not None:
                x, = args
                return replace(x, core=self.b.valid(x.core or 0))
            case "transpose" if args[0].lower is None:
                x, = args
                core = None if x.core is None else self.b.transpose(x.core)
                return Scaled(op.dims, core, x.columns, x.rows, x.whole)
            case "sum" if op.attr("axis") == 1:
                x, = args
                inner = self._made(replace(x, rows={}, whole={}))
                return Scaled(op.dims, self.b.sum(inner, axis=1), x.rows, {}, x.whole)
            case "matmul":
                return self._product(op, *args)
        return self._plain(op)

    def _power(self, i: int) -> Scaled | None:
        """e^{x n} as what it scales, where the value i is x n."""
        found = multiple(self.program, i)
        if found is None:
            return None
        (x, count), dims = found, self.program.index[i].dims
        if count.kind == "map":
            before = self.program.index[count.args[0]].attr("exclusive")
            return Scaled(dims, None, {(x, before): 1}, {(x, False): -1})
        if count.kind == "sum":
            return Scaled(dims, None, whole={x: 1})
        exclusive = count.attr("exclusive")
        if not count.attr("reverse"):
            return Scaled(dims, None, {(x, exclusive): 1})
        return Scaled(dims, None, {(x, not exclusive): -1}, whole={x: 1})

    def _map(self, op: Op, args: list[Scaled]) -> Scaled:
        terms = [self._term(part, op, args) for part in sympy.Add.make_args(op.attr("expr"))]
        known = [t for t in terms if t is not None]
        if len(known) < len(terms) or any(t.dims != op.dims for t in known):
            return self._plain(op)
        if len(known) == 1:
            return known[0]
        first = known[0]
        if any(t.lower != first.lower for t in known):
            return self._plain(op)
        shared = Scaled(op.dims, None, _common([t.rows for t in known]), _common([t.columns for t in known]),
                        _common([t.whole for t in known]), first.lower)
        rest = [self._made(Scaled(op.dims, t.core, _times(t.rows, shared.rows, -1), _times(t.columns, shared.columns, -1),
                                  _times(t.whole, shared.whole, -1))) for t in known]
        rest.sort(key=lambda i: self.b.ops[i].kind == "matmul")  # products last: matrix units add to what is there
        return replace(shared, core=self.b.add(*rest))

    def _term(self, expr: sympy.Expr, op: Op, args: list[Scaled]) -> Scaled | None:
        """A product of operands, numbers and powers of decays; None for what is none."""
        number, factors = sympy.Integer(1), list[Scaled]()
        for f in sympy.Mul.make_args(expr):
            if f.is_number:
                number *= f
            elif f.is_Symbol:
                factors.append(args[place(f)])
            elif isinstance(f, exp) and f.args[0].is_Symbol and (power := self._power(op.args[place(f.args[0])])) is not None:
                factors.append(power)
            else:
                return None
        cores = [x.core for x in factors if x.core is not None]
        expr = sympy.Mul(number, *(operand(i) for i in range(len(cores))))
        core = self.b.map(expr, *cores) if cores or number != 1 else None
        lows = [x.lower for x in factors if x.lower is not None]
        out = Scaled(self._broadcast(factors), core, lower=any(lows) if lows else None)
        for x in factors:
            out = replace(out, rows=_times(out.rows, x.rows), columns=_times(out.columns, x.columns),
                          whole=_times(out.whole, x.whole))
        return out

    @staticmethod
    def _broadcast(factors: list[Scaled]) -> Dims:
        r, c = ({x.dims[axis] for x in factors} - {"1"} or {"1"} for axis in (0, 1))
        return r.pop(), c.pop()

    def _product(self, op: Op, x: Scaled, y: Scaled) -> Scaled:
        ta, tb = op.attr("ta"), op.attr("tb")
        outer_x, inner_x = (x.columns, x.rows) if ta else (x.rows, x.columns)
        inner_y, outer_y = (y.columns, y.rows) if tb else (y.rows, y.columns)
        inner = _times(inner_x, inner_y)


        def alone(z: Scaled, takes: bool, turned: bool) -> int:
            """The operand without what scales the rows or columns of the product, with what it takes."""
            mine = inner if takes else {}
            rows, columns = (mine, {}) if turned else ({}, mine)
            return self._made(Scaled(z.dims, z.core, rows, columns, {}, z.lower))

        left = self._wide(x.dims, ta) < self._wide(y.dims, not tb)
        product = self.b.matmul(alone(x, left, ta), alone(y, not left, not tb), ta=ta, tb=tb)
        return Scaled(op.dims, product, outer_x, outer_y, _times(x.whole, y.whole))

    def _wide(self, dims: Dims, columns: bool) -> tuple[bool, int]:
        """Whether an operand holds pairs, and how many columns it has in a kernel, roughly."""
        d = dims[int(columns)]
        return dims == ("T", "T"), 1 if d == "1" else 2 if d == self.split else 4

    def _made(self, x: Scaled) -> int:
        """The value itself."""
        if x.plain:
            return x.core or 0
        b = self.b
        factors = [*(f for f in [x.core] if f is not None), *self._exps(x.rows), *map(b.transpose, self._exps(x.columns))]
        factors += [b.exp(b.map(p * operand(0) * operand(1), self.new[k], b.sum(self.rows, 0))) for k, p in x.whole.items()]
        out = b.mul(*factors) if factors else b.map(1)
        out = b.expand(out, x.dims) if b.dims(out) != x.dims else out
        return out if x.lower is None else b.mask(out, x.lower)

    def _exps(self, powers: Powers) -> Iterator[int]:
        b = self.b
        for (x, exclusive), p in powers.items():
            yield b.exp(b.map(p * operand(0) * operand(1), self.new[x], b.cumsum(self.rows, exclusive=exclusive)))


def _times(x: Mapping[Key, int], y: Mapping[Key, int], power: int = 1) -> dict[Key, int]:
    out = {k: x.get(k, 0) + power * y.get(k, 0) for k in {**x, **y}}
    return {k: p for k, p in out.items() if p}


def _common(products: list[Mapping[Key, int]]) -> dict[Key, int]:
    """The powers that all of these products have."""
    out = {}
    for k in products[0]:
        ps = [x.get(k, 0) for x in products]
        if all(p > 0 for p in ps) or all(p < 0 for p in ps):
            out[k] = min(ps, key=abs)
    return out
