"""Canonical form → chunk program: C tokens at once instead of one (mathematics: five statements).

With g the log decay, e^{prefix g} the decay from the chunk's start and e^{suffix g} to its end::

    R   = X̃ M₀ + ⟨X, K⟩_g U          X̃ = x ⊙ e^{prefix g}; the prefix leaves out the token's own decay for undecayed reads
    U   = c + b R                     so (I − b⟨X, K⟩_g) U = c + b X̃ M₀, a unit lower-triangular solve
    O   = Q̃ M₀ + ⟨Q, K⟩_g U
    M_C = e^{total g} ⊙ M₀ + (K ⊙ e^{suffix g})ᵀ U

All exponents are sums of g over tokens between the two ends, so none is positive and none is a difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from lsmc.canonical import Canonical, Query, Read
from lsmc.errors import LsmNoChunkFormError, LsmNotAffineError
from lsmc.expr import Field, Max, Sum, number
from lsmc.ir import Builder, Carry, Dims, Program, operand, prune, verify

MEMORY, NORMALIZER = "M", "Z"


@dataclass
class _Written:
    """What one write puts into the memory: key tile (T, K), value tile (T, V), and the tile for v = 1."""

    key: int
    value: int
    one: int | None


def derive(canonical: Canonical, scale: float = 1.0) -> Program:
    """The chunk program of a canonical method; `scale` multiplies q.

    Raises `LsmNotAffineError` when what is written is not affine in what is read, and `LsmNoChunkFormError` when the
    memory's decay does not factor over K and V or when several writes correct what they read.
    """
    return _Derivation(canonical, scale).run()


class _Derivation:
    def __init__(self, canonical: Canonical, scale: float) -> None:
        self.c, self.b = canonical, Builder()
        if canonical.decay_kv is not None:
            raise _no_chunk_form(canonical, "a matrix decay over (K, V) does not factor over K and V",
                                 "use Vector('a') * Vector('b', over='V')", "decay")
        if canonical.reads and canonical.decay_v is not None:
            raise _no_chunk_form(canonical, "a memory that decays along V is read by its own update",
                                 "decay along K, or drop the read")
        self.values: dict[sympy.Symbol, int] = {}
        for f in canonical.inputs:
            self.values[f] = self._input(f, scale)
        self.gk = self._gate(canonical.decay_k)
        self.gv = self._gate(canonical.decay_v)

    def _input(self, f: Field, scale: float) -> int:
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

    # -- reads and writes ---------------------------------------------------------------------------------------------

    def _through_memory(self, key: int, at: str, memory: int) -> int:
        """x̃ M₀, and for a memory that decays along V the factor of the columns."""
        read = self.b.matmul(self._from_start(key, self.gk, at == "previous"), memory)
        if self.gv is None or self.b.dims(memory)[1] == "1":
            return read
        return self._from_start(read, self.gv, at == "previous")

    def _weights(self, key: int, at: str, write: _Written) -> int:
        return self.b.form("P", at != "updated", at == "previous", self.gk, X=key, Y=write.key)

    def _from_write(self, key: int, at: str, write: _Written, value: int) -> int:
        p = self._weights(key, at, write)
        if self.b.dims(value)[1] == "1":
            return self.b.matmul(p, value)
        if self.gv is None:
            return self.b.matmul(p, value)
        return self.b.form("X", at != "updated", at == "previous", self.gv, P=p, Y=value)

    def _key(self, expr: sympy.Expr) -> int:
        return self.lower(expr, ("T", "K"))

    def _writes(self, memory: int) -> list[_Written]:
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
            self._solve(out, coefs, plain, memory)
            plain.append(out)
        return plain

    def _solve(self, out: _Written, coefs: sympy.Tuple, known: list[_Written], memory: int) -> None:
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
            rhs.append(self.b.mul(b, self._through_memory(key, read.at, memory)))
            rhs += [self.b.mul(b, self._from_write(key, read.at, w, w.value)) for w in known]
            system.append(self.b.map(-operand(0) * operand(1), b, self._weights(key, read.at, out)))
        out.value = self.b.solve(self.b.add(*system), self.b.add(*rhs))

    def _query(self, query: Query | Read, of: str, writes: list[_Written], memory: int) -> int:
        key = self._key(query.key)
        parts = [self._through_memory(key, query.at, memory)]
        for w in writes:
            value = w.value if of == MEMORY else w.one
            assert value is not None
            parts.append(self._from_write(key, query.at, w, value))
        return self.b.add(*parts)

    def _next(self, memory: int, writes: list[_Written], normalizer: bool) -> int:
        total: list[int] = [memory]
        if self.gk is not None:
            total.append(self.b.transpose(self.b.exp(self.b.sum(self.gk, axis=0))))
        if self.gv is not None and not normalizer:
            total.append(self.b.exp(self.b.sum(self.gv, axis=0)))
        parts = [self.b.mul(*total) if len(total) > 1 else memory]
        for w in writes:
            value = w.one if normalizer else self._to_end(w.value, self.gv)
            assert value is not None
            parts.append(self.b.matmul(self._to_end(w.key, self.gk), value, ta=True))
        return self.b.add(*parts)

    def run(self) -> Program:
        b = self.b
        memory = b.input(MEMORY, "carry", ("K", "V"))
        writes = self._writes(memory)
        memories, carries = {MEMORY: memory}, [Carry(MEMORY, memory, self._next(memory, writes, False))]
        if self.c.normalizer:
            z = memories[NORMALIZER] = b.input(NORMALIZER, "carry", ("K", "1"))
            carries.append(Carry(NORMALIZER, z, self._next(z, writes, True)))
        for q in self.c.queries:
            self.values[q.symbol] = self._query(q, q.of, writes, memories[q.of])
        o = self.lower(self.c.output, ("T", "V"))
        return verify(prune(Program(self.c.name, tuple(b.ops), tuple(carries), (("o", o),))))


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
