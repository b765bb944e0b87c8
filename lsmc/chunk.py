"""Canonical form → chunk program: C tokens at once instead of one (mathematics: five statements).

With g the log decay, e^{prefix g} the decay from the chunk's start and e^{suffix g} to its end::

    R   = X̃ M₀ + ⟨X, K⟩_g U          X̃ = x ⊙ e^{prefix g}; the prefix leaves out the token's own decay for undecayed reads
    U   = c + b R                     so (I − b⟨X, K⟩_g) U = c + b X̃ M₀, a unit lower-triangular solve
    O   = Q̃ M₀ + ⟨Q, K⟩_g U
    M_C = e^{total g} ⊙ M₀ + (K ⊙ e^{suffix g})ᵀ U

All exponents are sums of g over tokens between the two ends, so none is positive and none is a difference.

A decay over (K, V) does not factor: its tokens go one after the other inside the chunk, in one operation.

A rotation by the angles θ beside g multiplies what passes from token j to token i by cos Σθ and sin Σθ over (j, i], and
cos(a − b) = cos a cos b + sin a sin b splits these into factors of x_i and y_j: two decay forms, and two memories, the
real and the imaginary part. Momentum μ, P ← e^μ P + KᵀU and M ← e^g M + P, weights what token j wrote, as token i reads
it, by the product of two triangles, Σ_l e^{g over (l, i]} e^{μ over (j, l]}.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from lsmc.canonical import Canonical, Query
from lsmc.errors import LsmNoChunkFormError, LsmNotAffineError
from lsmc.expr import Field, Max, Sum, dims_of, number, show
from lsmc.ir import Builder, Carry, Dims, Program, operand, prune, verify

MEMORY, IMAGINARY, ACCUMULATOR, NORMALIZER = "M", "I", "P", "Z"


@dataclass
class _Written:
    """What one write puts into the memory: key tile (T, K), value tile (T, V), and the tile for v = 1."""

    key: int
    value: int
    one: int | None


def derive(canonical: Canonical, scale: float = 1.0) -> Program:
    """The chunk program of a canonical method; `scale` multiplies q.

    Raises `LsmNotAffineError` when what is written is not affine in what is read, and `LsmNoChunkFormError` when the
    memory's decay does not factor over K and V, when several writes correct what they read, or when momentum meets a
    decay over K or V or a rotation.
    """
    return _Derivation(canonical, scale).run()


class _Derivation:
    def __init__(self, canonical: Canonical, scale: float) -> None:
        self.c, self.b = canonical, Builder()
        if canonical.decay_kv is not None:
            self._check_matrix()
        if canonical.reads and canonical.decay_v is not None:
            raise _no_chunk_form(canonical, "a memory that decays along V is read by its own update",
                                 "decay along K, or drop the read")
        along = next((p for p in (canonical.decay_k, canonical.decay_v, canonical.phase) if p is not None and dims_of(p)), None)
        if canonical.momentum is not None and (along is not None or canonical.phase is not None):
            raise _no_chunk_form(canonical, f"momentum beside {show(along or canonical.phase)}, which varies along the memory",
                                 "decay by one number for each head: Scalar or Constant", "decay")
        if canonical.phase is not None and canonical.decay_v is not None:
            raise _no_chunk_form(canonical, "a memory that rotates decays along V", "decay along K", "decay")
        self.values: dict[sympy.Symbol, int] = {}
        for f in canonical.inputs:
            self.values[f] = self._input(f, scale)
        self.matrix = canonical.decay_kv is not None
        self.gk = None if self.matrix else self._gate(canonical.decay_k)
        self.gv = None if self.matrix else self._gate(canonical.decay_v)
        self.momentum = self._gate(canonical.momentum)
        if self.momentum is not None and self.gk is None:
            self.gk = self.b.expand(self.b.map(sympy.Integer(0)), ("T", "1"))
        self.angle = None
        if canonical.phase is not None:
            self.angle = self.b.valid(self.b.expand(self.lower(canonical.phase), ("T", "K")))
        self.memories = {f.name: self.b.input(f.name, "carry", ("K", "V" if "V" in f.dims else "1")) for f in canonical.states}

    def _check_matrix(self) -> None:
        """A decay over (K, V) goes token by token inside a chunk: it needs no factors, but nothing may read in between."""
        c = self.c
        wide = [f for f in c.inputs if len(f.dims) == 2 and f.per == "token"]
        if wide:
            raise _no_chunk_form(c, f"the matrix {wide[0]} of every token does not factor over K and V",
                                 "make it of vectors and per-head matrices, such as vector('dt', over='V') * matrix('A', "
                                 "per='head'), or use Vector('a') * Vector('b', over='V')", "decay")
        for part, what in ((c.reads, "is read by its own update"), (c.phase, "rotates"), (c.momentum, "has momentum")):
            if part:
                raise _no_chunk_form(c, f"a memory that decays along K and V together {what}", "decay along K", "decay")

    def _input(self, f: Field, scale: float) -> int:
        if len(f.dims) == 2:
            return self.b.input(f.name, f.per, ("K", "V"))
        last = f.dims[0] if f.dims else "1"
        tile = self.b.input(f.name, f.per, ("T" if f.per == "token" else "1", last))
        return self.b.map(operand(0) * number(scale), tile) if f.name == "q" and scale != 1.0 else tile

    def _gate(self, expr: sympy.Expr | None) -> int | None:
        if expr is None:
            return None
        g = self.lower(expr)
        return self.b.valid(self.b.expand(g, ("T", self.b.dims(g)[1])))

    def lower(self, expr: sympy.Expr, dims: Dims | None = None) -> int:
        """An elementwise expression with contractions (`Sum`) over inputs and earlier values, as tiles."""
        expr = sympy.sympify(expr)
        inner = {s: self._reduce(s) for s in outermost(expr)}
        stand_in = {s: sympy.Dummy(real=True) for s in inner}
        expr = expr.xreplace(stand_in)
        known = {**self.values, **{stand_in[s]: i for s, i in inner.items()}}
        used = sorted(expr.free_symbols, key=lambda s: known[s])
        tile = self.b.map(expr.xreplace({s: operand(n) for n, s in enumerate(used)}), *(known[s] for s in used))
        return tile if dims is None else self.b.expand(tile, dims)

    def _reduce(self, node: Sum) -> int:
        """A contraction over a named dimension; a body that does not vary over it counts once per element."""
        body = self.lower(node.body)
        rows = self.b.dims(body)[0]
        body = self.b.expand(body, (rows, node.dim))
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
        return self.b.emit("between", ("T", "T"), self.gk, strict=at != "updated", before=at == "previous")

    def _accumulated(self) -> int:
        """How much of the write of token j the accumulator P_l holds: e^{μ over (j, l]}, (T, T)."""
        assert self.momentum is not None
        return self.b.emit("between", ("T", "T"), self.momentum, strict=False, before=False)

    def _scan(self, at: str, writes: list[_Written], query: int | None = None) -> int:
        """What a query finds at every token, or the memory after the chunk, under a decay over (K, V)."""
        log = sympy.Add(*self.c.decays)
        inner = {s: self._reduce(s) for s in outermost(log)}
        stand_in = {s: sympy.Dummy(real=True) for s in inner}
        known = {**self.values, **{stand_in[s]: i for s, i in inner.items()}}
        log = log.xreplace(stand_in)
        used = sorted(log.free_symbols, key=lambda s: known[s])
        log = log.xreplace({s: operand(n) for n, s in enumerate(used)})
        rows = self.b.valid(self.b.expand(self.b.map(sympy.Integer(1)), ("T", "1")))
        pairs = [i for w in writes for i in (w.key, w.value)]
        first = [] if query is None else [query]
        return self.b.emit("scan", ("K", "V") if query is None else ("T", "V"), *first, *pairs, self.memories[MEMORY], rows,
                           *(known[s] for s in used), log=log, writes=len(writes), at=at)

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

    def _key(self, expr: sympy.Expr) -> int:
        return self.lower(expr, ("T", "K"))

    def _writes(self) -> list[_Written]:
        symbols = [r.symbol for r in self.c.reads]
        plain: list[_Written] = []
        correcting: list[tuple[_Written, sympy.Expr]] = []
        for w in self.c.writes:
            coefs = {s: sympy.diff(w.value, s) for s in symbols}
            if any(c.has(*symbols) for c in coefs.values()) if symbols else False:
                used = [r for r in self.c.reads if w.value.has(r.symbol)]
                raise LsmNotAffineError.of(self.c.name, w.value, used, self.c.where)
            const = sympy.expand(w.value).xreplace({s: sympy.Integer(0) for s in symbols})
            out = _Written(self.b.valid(self._key(w.key)), self.lower(const, ("T", "V")), None)
            if self.c.normalizer:
                one = const.xreplace({f: sympy.Integer(1) for f in const.free_symbols if f.name == "v"})
                out.one = self.lower(one, ("T", "1"))
            if any(c != 0 for c in coefs.values()):
                correcting.append((out, sympy.Tuple(*(coefs[s] for s in symbols))))
            else:
                plain.append(out)
        if len(correcting) > 1:
            raise _no_chunk_form(self.c, f"{len(correcting)} writes at different keys depend on what is read",
                                 "write the correction at one key")
        for out, coefs in correcting:
            self._solve(out, coefs, plain)
            plain.append(out)
        return plain

    def _solve(self, out: _Written, coefs: sympy.Tuple, known: list[_Written]) -> None:
        """U = c + Σ_r b_r R_r, whose R_r read U itself at earlier tokens: one unit lower-triangular solve."""
        rhs, system = [out.value], []
        for read, coef in zip(self.c.reads, coefs, strict=True):
            if coef == 0:
                continue
            b = self.lower(coef)
            if self.b.dims(b)[1] != "1":
                raise _no_chunk_form(self.c, f"the read is weighted by {coef}, which varies along V",
                                     "weight it by a scalar per token")
            key = self._key(read.key)
            rhs.append(self.b.mul(b, self._through_memory(key, read.at, MEMORY)))
            rhs += [self.b.mul(b, self._from_write(key, read.at, w, w.value)) for w in known]
            system.append(self.b.map(-operand(0) * operand(1), b, self._weights(key, read.at, out)))
        out.value = self.b.solve(self.b.add(*system), self.b.add(*rhs))

    def _query(self, query: Query, writes: list[_Written]) -> int:
        key = self._key(query.key)
        if self.matrix:
            return self._scan(query.at, writes, key)
        parts = [self._through_memory(key, query.at, query.of)]
        for w in writes:
            value = w.value if query.of == MEMORY else w.one
            assert value is not None
            parts.append(self._from_write(key, query.at, w, value))
        return self.b.add(*parts)

    # -- the memories after the chunk ---------------------------------------------------------------------------------

    def _next(self, of: str, writes: list[_Written]) -> int:
        b, memory = self.b, self.memories
        if self.matrix:
            return self._scan("", writes)
        if self.angle is not None:
            return self._next_turned(of, writes)
        if self.momentum is not None:
            return self._next_accumulated(of, writes)
        total = [memory[of]]
        if self.gk is not None:
            total.append(b.transpose(b.exp(b.sum(self.gk, axis=0))))
        if self.gv is not None and of == MEMORY:
            total.append(b.exp(b.sum(self.gv, axis=0)))
        parts = [b.mul(*total)]
        for w in writes:
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
        carries = [Carry(name, memory, self._next(name, writes)) for name, memory in self.memories.items()]
        for q in self.c.queries:
            self.values[q.symbol] = self._query(q, writes)
        o = self.lower(self.c.output, ("T", "V"))
        return verify(prune(Program(self.c.name, tuple(b.ops), tuple(carries), (("o", o),), terms=tuple(self._terms(writes)))))

    def _terms(self, writes: list[_Written]) -> list[tuple[str, int]]:
        """The values that the terms of the canonical form became: decay, momentum; R0 … what is read, of the memory before the
        chunk and its weights on what other tokens wrote; U0 … the value of each write; Y0 … each query.

        Asked again, the builder gives the values that are there; what is not there is dropped with its name.
        """
        b, symbols = self.b, {r.symbol for r in self.c.reads}
        scans = [op.id for op in b.ops if op.kind == "scan"]
        gates = [g for g in (self.gk, self.gv, self.angle) if g is not None]
        out = [("decay", i) for i in (*gates, *scans)] + [("momentum", i) for i in (self.momentum,) if i is not None]
        for r in self.c.reads if not self.matrix else ():
            key = self._key(r.key)
            out.append((r.symbol.name, self._through_memory(key, r.at, MEMORY)))
            out += [(r.symbol.name, self._weights(key, r.at, w)) for w in writes]
        corrects = [bool(w.value.free_symbols & symbols) for w in self.c.writes]  # they come last
        names = [f"U{n}" for late in (False, True) for n, it in enumerate(corrects) if it == late]
        out += [(name, w.value) for name, w in zip(names, writes, strict=True)]
        return out + [(y.symbol.name, self.values[y.symbol]) for y in self.c.queries]


def _no_chunk_form(canonical: Canonical, what: str, way: str, part: str | None = None) -> LsmNoChunkFormError:
    where = canonical.where.at(part) if canonical.where and part else canonical.where
    return LsmNoChunkFormError(f"{canonical.name} has no chunk form: {what}", where=where,
                               help=f"{way}; lsmc.reference runs it step by step")


def outermost(expr: sympy.Expr) -> list[Sum]:
    """The contractions in `expr` that stand in no other contraction, in a fixed order."""
    if isinstance(expr, Sum):
        return [expr]
    out: list[Sum] = []
    for arg in expr.args:
        out += [n for n in outermost(arg) if n not in out]
    return out
