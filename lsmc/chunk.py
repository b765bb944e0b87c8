"""Canonical form → chunk program: C tokens at once instead of one (mathematics: five statements).

With g the log decay, e^{prefix g} the decay from the chunk's start and e^{suffix g} to its end::

    R   = X̃ M₀ + ⟨X, K⟩_g U          X̃ = x ⊙ e^{prefix g}; the prefix leaves out the token's own decay for undecayed reads
    U   = c + b R                     so (I − b⟨X, K⟩_g) U = c + b X̃ M₀, a unit lower-triangular solve; of several keys, by blocks
    O   = Q̃ M₀ + ⟨Q, K⟩_g U
    M_C = e^{total g} ⊙ M₀ + (K ⊙ e^{suffix g})ᵀ U

All exponents are sums of g over tokens between the two ends, so none is positive and none is a difference.

A decay over (K, V) does not factor, nor do angles: tokens go one after the other inside the chunk, in one operation.

A rotation by the angles θ beside g multiplies what passes from token j to token i by cos Σθ and sin Σθ over (j, i], and
cos(a − b) = cos a cos b + sin a sin b splits these into factors of x_i and y_j: two decay forms, and two memories, the
real and the imaginary part. Momentum μ, P ← e^μ P + KᵀU and M ← e^g M + P, weights what token j wrote, as token i reads
it, by the product of two triangles, Σ_l e^{g over (l, i]} e^{μ over (j, l]}.

Where reads are of the memory M⁰ at the start of a block, the tokens of a chunk lie in one block, so that R = X M⁰ and
U = f(V, R) for any f. M⁰ stays until the block is over, and is M_C then.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from lsmc.canonical import Canonical, Query, Read, bent
from lsmc.errors import LsmNoChunkFormError, LsmNotAffineError
from lsmc.expr import Field, Max, Over, Pairs, Sum, dims_of, number, show
from lsmc.functions import bounded, step
from lsmc.ir import Builder, Carry, Dims, Program, operand, prune, verify

MEMORY, IMAGINARY, ACCUMULATOR, NORMALIZER, BIAS, COUNT = "M", "I", "P", "Z", "Mb", "Mt"

Inner = Sum | Pairs | Over
"""The parts of an expression that are not elementwise."""


@dataclass
class _Written:
    """What one write puts into the memory: key tile (T, K), value tile (T, V), and the tile for v = 1."""

    key: int
    value: int
    one: int | None

    def into(self, of: str, rows: int) -> _Written:
        """The same write into the bias, whose keys are 1 where there are tokens."""
        return _Written(rows, self.value, None) if of == BIAS else self


def derive(canonical: Canonical, scale: float = 1.0, fresh: bool = False) -> Program:
    """The chunk program of a canonical method; `scale` multiplies q. With `fresh`, every chunk begins where a block does.

    Raises, where reads are not of a block's start, `LsmNotAffineError` when what is written is not affine in what is read, and
    `LsmNoChunkFormError` when a memory that decays along V is read by its own update; and when momentum meets a decay over K
    or V or a rotation.
    """
    return _Derivation(canonical, scale, fresh).run()


class _Derivation:
    def __init__(self, canonical: Canonical, scale: float, fresh: bool) -> None:
        self.c, self.b = canonical, Builder()
        self.matrix = canonical.matrix
        if self.matrix:
            self._check_matrix()
        if canonical.reads and canonical.decay_v is not None and canonical.block is None:
            raise _no_chunk_form(canonical, "a memory that decays along V is read by its own update",
                                 "decay along K, or drop the read")
        along = next((p for p in (canonical.decay_k, canonical.decay_v, canonical.phase) if p is not None and dims_of(p)), None)
        if canonical.momentum is not None and (along is not None or canonical.phase is not None):
            raise _no_chunk_form(canonical, f"momentum beside {show(along or canonical.phase)}, which varies along the memory",
                                 "decay by one number for each head: Scalar or Constant", "decay")
        self.values: dict[sympy.Symbol, int] = {}
        for f in canonical.inputs:
            self.values[f] = self._input(f, scale)
        self.gk = None if self.matrix else self._gate(canonical.decay_k)
        self.gv = None if self.matrix else self._gate(canonical.decay_v)
        self.momentum = self._gate(canonical.momentum)
        if self.momentum is not None and self.gk is None:
            self.gk = self.b.expand(self.b.map(sympy.Integer(0)), ("T", "1"))
        self.angle = None
        if canonical.phase is not None and not self.matrix:
            self.angle = self.b.valid(self.b.expand(self.lower(canonical.phase), ("T", "K")))
        self.carried: dict[str, int] = {f.name: self.b.input(f.name, "carry", f.tile) for f in canonical.states}
        self.memories: dict[str, int] = dict(self.carried)
        if fresh and COUNT in self.memories:  # the memory at the block's start is that before the chunk
            self.memories |= {n: self.carried[n.removesuffix("0")] for n in self.carried} | {COUNT: self.b.map(sympy.Integer(0))}

    def _check_matrix(self) -> None:
        """A decay over (K, V) goes token by token inside a chunk: it needs no factors, but nothing may read in between."""
        c = self.c
        for part, what in ((c.reads and c.block is None, "is read by its own update"), (c.momentum, "has momentum")):
            if part:
                raise _no_chunk_form(c, f"a memory that decays along K and V together {what}", "decay along K", "decay")

    def _input(self, f: Field, scale: float) -> int:
        role = "token" if f.per == "token" else "head"
        if len(f.dims) == 2:
            outside = (*self.c.keys, *(w.value for w in self.c.writes), self.c.output)
            if role == "token" and any(f in expr.free_symbols for expr in outside):
                raise _no_chunk_form(self.c, f"the matrix {f} of every token stands outside of the decay", "use vectors there")
            return self.b.input(f.name, role, ("T", "E") if role == "token" else ("K", "V"))
        last = f.dims[0] if f.dims else "1"
        tile = self.b.input(f.name, role, ("T" if f.per == "token" else "1", last))
        return self.b.map(operand(0) * number(scale), tile) if f.name == "q" and scale != 1.0 else tile

    def _gate(self, expr: sympy.Expr | None) -> int | None:
        if expr is None:
            return None
        g = self.lower(expr)
        if self.b.dims(g) == ("1", "1"):  # its sums are multiples, of which none is that of infinity by 0
            g = self.b.map(bounded(operand(0)), g)
        return self.b.valid(self.b.expand(g, ("T", self.b.dims(g)[1])))

    def lower(self, expr: sympy.Expr, dims: Dims | None = None) -> int:
        """An elementwise expression with contractions (`Sum`) over inputs and earlier values, as tiles."""
        (expr,), tiles = self._of_tiles(expr)
        tile = self.b.map(expr, *tiles)
        return tile if dims is None else self.b.expand(tile, dims)

    def _of_tiles(self, *exprs: sympy.Expr) -> tuple[list[sympy.Expr], list[int]]:
        """Expressions as functions of operands, and the tiles that these are."""
        whole = sympy.Tuple(*exprs)
        inner = {s: self._reduce(s) for s in outermost(whole)}
        stand_in = {s: sympy.Dummy(real=True) for s in inner}
        whole = whole.xreplace(stand_in)
        known = {**self.values, **{stand_in[s]: i for s, i in inner.items()}}
        used = sorted(whole.free_symbols, key=lambda s: known[s])
        return list(whole.xreplace({s: operand(n) for n, s in enumerate(used)})), [known[s] for s in used]

    def _reduce(self, node: Inner) -> int:
        """Pairs, a vector over another dim, or a contraction over one: what does not vary over it counts once per element."""
        if isinstance(node, Over):
            x = self.lower(node.args[1])
            return self.b.emit("rename", (self.b.dims(x)[0], str(node.args[0])), x)
        if isinstance(node, Pairs):
            x = self.lower(node.args[0])
            return self.b.pairs(x, x)
        body = self.lower(node.body)
        rows, along = self.b.dims(body)
        body = self.b.expand(body, (rows, along if along != "1" else node.dim))
        return self.b.emit("max", (rows, "1"), body, axis=1) if isinstance(node, Max) else self.b.sum(body, axis=1)

    # -- decays -----------------------------------------------------------------------------------------------------

    def _from_start(self, tile: int, g: int | None, before: bool) -> int:
        return tile if g is None else self.b.mul(tile, self.b.exp(self.b.cumsum(g, exclusive=before)))

    def _to_end(self, tile: int, g: int | None) -> int:
        return tile if g is None else self.b.mul(tile, self.b.exp(self.b.cumsum(g, reverse=True, exclusive=True)))

    def _turned(self, tile: int, before: bool) -> tuple[int, int]:
        """A tile times cos and sin of the angles from the chunk's start."""
        assert self.angle is not None
        return self._cos_sin(tile, self.b.cumsum(self.angle, exclusive=before))

    def _cos_sin(self, tile: int, angle: int) -> tuple[int, int]:
        cos, sin = (self.b.map(f(operand(0)), angle) for f in (sympy.cos, sympy.sin))
        return self.b.mul(tile, cos), self.b.mul(tile, sin)

    def _added(self, at: str) -> int:
        """How much of P_l the memory that token i reads holds: e^{g over (l, i]}, (T, T)."""
        assert self.gk is not None
        return self.b.between(self.gk, strict=at != "updated", before=at == "previous")

    def _accumulated(self) -> int:
        """How much of the write of token j the accumulator P_l holds: e^{μ over (j, l]}, (T, T)."""
        assert self.momentum is not None
        return self.b.between(self.momentum, strict=False, before=False)

    def _scan(self, at: str, writes: list[_Written], query: int | None = None) -> int:
        """What a query finds at every token, or a part of the memory after the chunk, under a decay over (K, V)."""
        (log, phase), fields = self._of_tiles(sympy.Add(*self.c.decays), sympy.sympify(self.c.phase or 0))
        pairs = [i for w in writes for i in (w.key, w.value)]
        first = [] if query is None else [query]
        memory = [self.memories[of] for of in (MEMORY, IMAGINARY) if of in self.memories]
        return self.b.emit("scan", ("K", "V") if query is None else ("T", "V"), *first, *pairs, *memory, self._rows(),
                           *fields, log=log, phase=phase, writes=len(writes), at=at)

    # -- reads and writes ---------------------------------------------------------------------------------------------

    def _through_memory(self, key: int, at: str, of: str) -> int:
        """x̃ M₀, and for a memory that decays along V the factor of the columns."""
        b, before = self.b, at == "previous"
        start = self._from_start(key, self.gk, before)
        if of == MEMORY and self.angle is not None:
            cos, sin = self._turned(start, before)
            parts = b.matmul(cos, self.memories[MEMORY]), b.matmul(sin, self.memories[IMAGINARY])
            return b.map(operand(0) - operand(1), *parts)
        read = b.matmul(start, self.memories[of])
        if of == MEMORY and self.momentum is not None:
            weight = b.matmul(self._added(at), b.exp(b.cumsum(self.momentum)))
            return b.add(read, b.mul(b.matmul(key, self.memories[ACCUMULATOR]), weight))
        if self.gv is None or b.dims(read)[1] == "1":
            return read
        return self._from_start(read, self.gv, before)

    def _rows(self) -> int:
        """1 where there is a token: (T, 1)."""
        return self.b.valid(self.b.expand(self.b.map(sympy.Integer(1)), ("T", "1")))

    def _weights(self, key: int, at: str, write: _Written) -> int:
        b, strict, before = self.b, at != "updated", at == "previous"
        if self.momentum is not None:
            return b.mul(b.matmul(key, write.key, tb=True), b.matmul(self._added(at), self._accumulated()))
        if self.angle is None:
            return b.form("P", strict, before, self.gk, X=key, Y=write.key)
        turned = zip(self._turned(key, before), self._turned(write.key, False), strict=True)
        return b.add(*(b.form("P", True, before, self.gk, X=x, Y=y) for x, y in turned))

    def _from_write(self, key: int, at: str, write: _Written, value: int) -> int:
        p = self._weights(key, at, write)
        if self.angle is not None and at == "updated":  # a token's own write has not turned: angles have no gradient there
            own = self.b.mul(self.b.sum(self.b.mul(key, write.key), axis=1), value)
            return self.b.add(self.b.matmul(p, value), own)
        if self.gv is None or self.b.dims(value)[1] == "1":
            return self.b.matmul(p, value)
        return self.b.form("X", at != "updated", at == "previous", self.gv, P=p, Y=value)

    def _counted(self) -> tuple[int, int]:
        """The tokens of the block with those of this chunk, and 1 where it is over then."""
        count = self.b.add(self.memories[COUNT], self.b.sum(self._rows(), axis=0))
        return count, self.b.map(step(operand(0) - (self.c.block or 1) + sympy.Rational(1, 2)), count)

    def _key(self, expr: sympy.Expr, of: str = MEMORY) -> int:
        return self.lower(expr, ("T", self.c.rows if of != BIAS else "1"))

    def _at_start(self, read: Read) -> int:
        """What is read of the memory at the start of the block."""
        start = self.memories.get(f"{read.of}0", self.memories[read.of])
        return start if read.of == BIAS else self.b.matmul(self._key(read.key), start)

    def _writes(self) -> list[_Written]:
        if self.c.block is not None:
            self.values |= {r.symbol: self._at_start(r) for r in self.c.reads}
            return [_Written(self.b.valid(self._key(w.key)), self.lower(w.value, ("T", "V")), None) for w in self.c.writes]
        symbols = [r.symbol for r in self.c.reads]
        plain: list[_Written] = []
        correcting: list[tuple[_Written, sympy.Tuple]] = []
        for w in self.c.writes:
            if bent(w.value, symbols):
                used = [r for r in self.c.reads if w.value.has(r.symbol)]
                raise LsmNotAffineError.of(self.c.name, show(w.value), used, self.c.where)
            coefs = {s: sympy.diff(w.value, s) for s in symbols}
            const = sympy.expand(w.value).xreplace({s: sympy.Integer(0) for s in symbols})
            out = _Written(self.b.valid(self._key(w.key)), self.lower(const, ("T", "V")), None)
            if self.c.normalizer:
                one = const.xreplace({f: sympy.Integer(1) for f in const.free_symbols if f.name == "v"})
                out.one = self.lower(one, ("T", "1"))
            if any(c != 0 for c in coefs.values()):
                correcting.append((out, sympy.Tuple(*(coefs[s] for s in symbols))))
            else:
                plain.append(out)
        if correcting:
            self._solve(correcting, plain)
        return plain + [out for out, _ in correcting]

    def _solve(self, correcting: list[tuple[_Written, sympy.Tuple]], known: list[_Written]) -> None:
        """U_n = c_n + Σ_r b_nr R_r, whose R_r read every U at earlier tokens: L_nj = −Σ_r b_nr ⟨X_r, K_j⟩_g, strictly lower
        triangular. What the normaliser reads of itself corrects in the same way what is written to it."""
        b, lower, sides = self.b, list[list[int]](), list[list[int]]()
        for out, coefs in correcting:
            rhs, ones, system = [out.value], [] if out.one is None else [out.one], [list[int]() for _ in correcting]
            for read, coef in zip(self.c.reads, coefs, strict=True):
                if coef == 0:
                    continue
                weight = self.lower(coef)
                if b.dims(weight)[1] != "1":
                    raise _no_chunk_form(self.c, f"the read is weighted by {coef}, which varies along V",
                                         "weight it by a scalar per token")
                key = self._key(read.key, read.of)
                rhs.append(b.mul(weight, self._through_memory(key, read.at, read.of)))
                rhs += [b.mul(weight, self._from_write(key, read.at, w.into(read.of, self._rows()), w.value)) for w in known]
                for terms, (other, _) in zip(system, correcting, strict=True):
                    into = other.into(read.of, self._rows())
                    terms.append(b.map(-operand(0) * operand(1), weight, self._weights(key, read.at, into)))
                if ones:
                    ones.append(b.mul(weight, self._through_memory(key, read.at, NORMALIZER)))
                    ones += [b.mul(weight, self._from_write(key, read.at, w, w.one)) for w in known if w.one is not None]
            lower.append([b.add(*terms) for terms in system])
            sides.append([b.add(*side) for side in (rhs, ones) if side])
        for (out, _), (value, *one) in zip(correcting, self._eliminate(lower, sides), strict=True):
            out.value, out.one = value, one[0] if one else None

    def _eliminate(self, lower: list[list[int]], sides: list[list[int]]) -> list[list[int]]:
        """X of Σ_j (δ_nj + L_nj) X_j = B_n, over blocks that are strictly lower triangular each: so is what elimination leaves
        of them, and every pivot I + L is a unit lower-triangular solve."""
        b, blocks = self.b, range(len(lower))

        def less(xs: list[int], n: int, j: int, ys: list[int]) -> list[int]:
            return [b.map(operand(0) - operand(1), x, b.matmul(lower[n][j], y)) for x, y in zip(xs, ys, strict=True)]

        for n in blocks:
            pivot = lower[n][n]
            sides[n] = [b.solve(pivot, x) for x in sides[n]]
            lower[n][n + 1:] = [b.solve(pivot, x) for x in lower[n][n + 1:]]
            for i in blocks[n + 1:]:
                sides[i] = less(sides[i], i, n, sides[n])
                lower[i][n + 1:] = less(lower[i][n + 1:], i, n, lower[n][n + 1:])
        for n in reversed(blocks):
            for j in blocks[n + 1:]:
                sides[n] = less(sides[n], n, j, sides[j])
        return sides

    def _query(self, query: Query, writes: list[_Written]) -> int:
        key = self._key(query.key, query.of)
        if self.matrix:
            return self._scan(query.at, writes, key)
        parts = [self._through_memory(key, query.at, query.of)]
        for w in (w.into(query.of, self._rows()) for w in writes):
            value = w.one if query.of == NORMALIZER else w.value
            assert value is not None
            parts.append(self._from_write(key, query.at, w, value))
        return self.b.add(*parts)

    # -- the memories after the chunk ---------------------------------------------------------------------------------

    def _next(self, of: str, writes: list[_Written]) -> int:
        b, memory = self.b, self.memories
        if of == COUNT:
            return b.map(operand(0) - (self.c.block or 1) * operand(1), *self._counted())
        if of.endswith("0"):  # of the next block, where this one is over
            new = operand(0) * (1 - operand(1)) + operand(2) * operand(1)
            return b.map(new, memory[of], self._counted()[1], self._next(of[:-1], writes))
        if self.matrix:
            return self._scan("imaginary" if of == IMAGINARY else "real", writes)
        if self.angle is not None:
            return self._next_turned(of, writes)
        if self.momentum is not None:
            return self._next_accumulated(of, writes)
        total = [memory[of]]
        if self.gk is not None:
            total.append(b.transpose(b.exp(b.sum(self.gk, axis=0))))
        if self.gv is not None and of != NORMALIZER:
            total.append(b.exp(b.sum(self.gv, axis=0)))
        parts = [b.mul(*total)]
        for w in (w.into(of, self._rows()) for w in writes):
            value = w.one if of == NORMALIZER else self._to_end(w.value, self.gv)
            assert value is not None
            parts.append(b.matmul(self._to_end(w.key, self.gk), value, ta=True))
        return b.add(*parts)

    def _next_turned(self, of: str, writes: list[_Written]) -> int:
        """e^{total (g + iθ)} ⊙ (M₀ + i I₀) + (K ⊙ e^{suffix (g + iθ)})ᵀ U, one of its parts."""
        b, place = self.b, int(of == IMAGINARY)
        assert self.angle is not None
        whole = b.transpose(b.sum(self.angle, axis=0))
        decay = b.map(sympy.Integer(1)) if self.gk is None else b.transpose(b.exp(b.sum(self.gk, axis=0)))
        cos, sin = self._cos_sin(decay, whole)
        real, imaginary = self.memories[MEMORY], self.memories[IMAGINARY]
        turned = [(cos, real), (sin, imaginary)] if of == MEMORY else [(cos, imaginary), (sin, real)]
        sign = -1 if of == MEMORY else 1
        parts = [b.map(operand(0) * operand(1) + sign * operand(2) * operand(3), *turned[0], *turned[1])]
        rest = b.cumsum(self.angle, reverse=True, exclusive=True)
        parts += [b.matmul(self._cos_sin(self._to_end(w.key, self.gk), rest)[place], w.value, ta=True) for w in writes]
        return b.add(*parts)

    def _next_accumulated(self, of: str, writes: list[_Written]) -> int:
        """P: e^{total μ} P₀ + (K ⊙ e^{suffix μ})ᵀ U.  M: e^{total g} M₀ + Σ_l e^{suffix_l g} P_l, over the tokens there are."""
        b, p = self.b, self.memories[ACCUMULATOR]
        assert self.gk is not None and self.momentum is not None
        if of == ACCUMULATOR:
            parts = [b.mul(p, b.exp(b.sum(self.momentum, axis=0)))]
            return b.add(*parts, *(b.matmul(self._to_end(w.key, self.momentum), w.value, ta=True) for w in writes))
        kept = b.valid(b.exp(b.cumsum(self.gk, reverse=True, exclusive=True)))
        of_start = b.sum(b.mul(kept, b.exp(b.cumsum(self.momentum))), axis=0)
        of_write = b.matmul(self._accumulated(), kept, ta=True)
        parts = [b.map(operand(0) * operand(1) + operand(2) * operand(3), self.memories[MEMORY],
                       b.exp(b.sum(self.gk, axis=0)), p, of_start)]
        return b.add(*parts, *(b.matmul(b.mul(w.key, of_write), w.value, ta=True) for w in writes))

    def run(self) -> Program:
        b = self.b
        writes = self._writes()
        carries = [Carry(name, memory, self._next(name, writes)) for name, memory in self.carried.items()]
        for q in self.c.queries:
            self.values[q.symbol] = self._query(q, writes)
        o = self.lower(self.c.output, ("T", "V"))
        return verify(prune(Program(self.c.name, tuple(b.ops), tuple(carries), (("o", o),), terms=tuple(self._terms(writes)))))

    def _terms(self, writes: list[_Written]) -> list[tuple[str, int]]:
        """The values that the terms of the canonical form became: decay, momentum; R0 … what is read, of the memory before the
        chunk and its weights on what other tokens wrote; U0 … the value of each write; Y0 … each query.

        Asked again, the builder gives the values that are there; what is not there is dropped with its name.
        """
        b, whole = self.b, self.c.block is not None
        symbols = set() if whole else {r.symbol for r in self.c.reads}
        scans = [op.id for op in b.ops if op.kind == "scan"]
        gates = [g for g in (self.gk, self.gv, self.angle) if g is not None]
        out = [("decay", i) for i in (*gates, *scans)] + [("momentum", i) for i in (self.momentum,) if i is not None]
        out += [(r.symbol.name, self.values[r.symbol]) for r in self.c.reads if whole]
        for r in self.c.reads if not whole else ():
            key = self._key(r.key, r.of)
            out.append((r.symbol.name, self._through_memory(key, r.at, r.of)))
            out += [(r.symbol.name, self._weights(key, r.at, w.into(r.of, self._rows()))) for w in writes]
        corrects = [bool(w.value.free_symbols & symbols) for w in self.c.writes]  # they come last
        names = [f"U{n}" for late in (False, True) for n, it in enumerate(corrects) if it == late]
        out += [(name, w.value) for name, w in zip(names, writes, strict=True)]
        return out + [(y.symbol.name, self.values[y.symbol]) for y in self.c.queries]


def _no_chunk_form(canonical: Canonical, what: str, way: str, part: str | None = None) -> LsmNoChunkFormError:
    where = canonical.where.at(part) if canonical.where and part else canonical.where
    return LsmNoChunkFormError(f"{canonical.name} has no chunk form: {what}", where=where,
                               help=f"{way}; lsmc.reference runs it step by step")


def outermost(expr: sympy.Expr) -> list[Inner]:
    """What in `expr` is not elementwise and stands in nothing that is not, in a fixed order."""
    if isinstance(expr, Inner):
        return [expr]
    out: list[Inner] = []
    for arg in expr.args:
        out += [n for n in outermost(arg) if n not in out]
    return out
