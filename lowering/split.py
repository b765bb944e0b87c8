"""What an LSM operator needs so that its sequence can lie on several ranks: a summary, the memory that comes in, a correction.

The tokens of a rank apply an affine map M ↦ T M + B to the memory that comes in. Each rank finds T and B from its own tokens
and sends them, numbers that do not depend on how many tokens there are; each then applies the maps of the ranks before it,

    S = T_{r−1}( … T_1(T_0 S₀ + B_0) + B_1 … ) + B_{r−1}

and its output is o(S) = o(0) + what its queries read of S. All of this is read off the canonical form, in one of three ways:

"sums": no reads, no momentum. T is total log decays (and angles), K numbers; B = (K ⊙ e^{suffix g})ᵀ V is one product, known
before the operator runs; o = o(0) + (Q ⊙ e^{prefix g}) S.

"columns": the memory is read by its own update. One run, with columns beside V that start as I and in which nothing is written,
leaves B and T, K·K numbers, and outputs o(0) and P, what the queries read in them; o = o(0) + P S.

"again": decays of every entry, and memories over pairs of key dimensions. T is total log decays, K·V numbers; B is the memory
after a run from zero, o another run, from S.

Of packed sequences the map that a rank sends is that of the last of them that it has tokens of: `since` is where it begins, and
what stands before counts as no token. What comes in is of the sequence of the rank's first token: it starts from zero on the rank
`first`, and maps of ranks before are left out.

"again" is also how an output that is no linear function of what is read is found. The operators here are traced through:
in a compiled graph they are sums and matrix products beside `lsmc::fwd`, and autograd derives their adjoints.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from lsmc.canonical import Canonical, expand
from lsmc.errors import LsmNoChunkFormError
from lsmc.expr import Field, Sum, dims_of, inputs_of
from lsmc.inputs import Sizes
from lsmc.lowering import ops
from lsmc.lowering.plan import Plan
from lsmc.reference import _Evaluator, _spread

_library = torch.library.Library("lsmc", "FRAGMENT")


# --- which way


@functools.cache
def way(spec: str) -> tuple[str, bool]:
    """("sums", "columns" or "again", whether the output is found by a second run) for the method of a plan.

    Raises LsmNoChunkFormError for a method whose tokens apply no affine map that can be written down in columns.
    """
    c = ops.plan_of(spec).canonical
    if c.block is not None or c.bias:
        raise _no_summary(c, "what its tokens make of the memory is not known to be an affine map")
    symbols = {q.symbol for q in c.queries}
    linear = not any(symbols & node.free_symbols for node in c.output.atoms(Sum)) and not any(
        symbols & sympy.diff(c.output, s).free_symbols for s in symbols)
    pairs = c.rows != "K"
    if pairs and (c.reads or c.momentum is not None or any(_dims(part) for part in _linear(c))):
        raise _no_summary(c, "its memory has a row for each pair of key dimensions, and is read or decays along them")
    if c.decay_kv is not None or pairs:
        return "again", True
    if not c.reads and c.momentum is None:
        return "sums", not linear
    wide = {f: sympy.S.Zero for f in c.inputs if "V" in f.dims}
    gone = {r.symbol: sympy.S.Zero for r in c.reads}
    written = [w.value.xreplace(gone).xreplace(wide) for w in c.writes]
    if c.normalizer or any(expand(x) != 0 for x in written) or any(n.dim == "V" for w in c.writes for n in w.value.atoms(Sum)):
        raise _no_summary(c, "what it writes is not zero where its inputs over V are")
    rest = c.output.xreplace(dict.fromkeys(symbols, sympy.S.Zero)).xreplace(wide)
    plain = not any("V" in f.dims for s in symbols for f in inputs_of(sympy.diff(c.output, s)))
    return "columns", not (linear and plain and expand(rest) == 0)


def _no_summary(c: Canonical, why: str) -> LsmNoChunkFormError:
    return LsmNoChunkFormError(f"{c.name} has no summary that ranks could exchange: {why}", where=c.where,
                               help="leave the sequence whole for this method, and split the batch")


def _shape(state: Field, K: int, V: int) -> tuple[int, int]:
    """The rows and columns of a memory; "F" are the pairs of key dimensions."""
    return K if "K" in state.dims else K * K, V if "V" in state.dims else 1


def message(spec: str, K: int, V: int) -> int:
    """How many numbers per head a rank sends."""
    c, kind = ops.plan_of(spec).canonical, way(spec)[0]
    states = sum(rows * columns for rows, columns in (_shape(f, K, V) for f in c.states))
    if kind == "columns":
        return (K * len(c.states)) ** 2 + states
    size = {(): 1, ("K",): K, ("V",): V, ("K", "V"): K * V}
    return states + sum(size[_dims(part)] for part in _linear(c))


def _linear(c: Canonical) -> list[sympy.Expr]:
    """What is summed over the tokens of a rank: the log decays and the angles."""
    return [part for part in (c.decay_k, c.decay_v, c.decay_kv, c.phase) if part is not None]


def _dims(part: sympy.Expr) -> tuple[str, ...]:
    return tuple(d for d in ("K", "V") if d in dims_of(part))


# --- the values of a call


class _Values(_Evaluator):
    """Expressions of the inputs of a call, (B, T, HV, K or 1, V or 1); numbers stay numbers. Tiles are zero before `since`."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], since: Tensor | None = None) -> None:
        size = ops.extents(plan, inputs)
        given = dict(zip(plan.inputs, inputs, strict=True))
        like, c = size.like, plan.canonical
        q = [given[n].shape[2] for n in ("q", "k") if n in given and given[n].dim() == 4]
        self.extents = Sizes(size.batch, size.tokens, q[0] if q else size.heads, size.heads, size.dims.get("K", 1),
                             size.dims.get("V", 1), size.batch)
        dtype = ops.state_dtype(like.dtype)
        values = {f: _spread(given[f.name].to(dtype), f, self.extents) for f in c.inputs}
        values = {f: x * plan.scale if f.name == "q" else x for f, x in values.items()}
        super().__init__(values, self.extents, dtype, like.device)
        self.like = like
        self.counts = None
        if since is not None:
            self.counts = (torch.arange(size.tokens, device=like.device) >= since).reshape(1, -1, 1, 1, 1)

    def _number(self, value: float) -> Any:
        return value

    def _evaluate(self, expr: sympy.Basic) -> Any:
        if isinstance(expr, Sum) and not isinstance(self(expr.body), Tensor):
            return self(expr.body) * (self.extents.K if expr.dim == "K" else self.extents.V)
        return super()._evaluate(expr)

    def tile(self, expr: sympy.Expr, *dims: str) -> Tensor:
        """The value with all of its tokens, and with all of the named dimensions."""
        n = self.extents
        value = self(expr)
        value = value if isinstance(value, Tensor) else self.like.new_full((1,) * 5, value, dtype=self.dtype)
        value = value.reshape((1,) * 5) if value.dim() == 0 else value
        k, v = (getattr(n, d) if d in dims else value.shape[i] for i, d in ((-2, "K"), (-1, "V")))
        value = value.expand(n.B, n.T, n.HV, k, v)
        return value if self.counts is None else torch.where(self.counts, value, value.new_zeros(()))

    def total(self, expr: sympy.Expr) -> Tensor:
        """The sum over the tokens, (B, HV, …); factors that do not vary over them stand outside of it."""
        parts = []
        for term in sympy.Add.make_args(expand(expr)):
            factors = sympy.Mul.make_args(term)
            inner = sympy.Mul(*(f for f in factors if any(x.per == "token" for x in f.atoms(Field))))
            outer = self(sympy.Mul(*(f for f in factors if not any(x.per == "token" for x in f.atoms(Field)))))
            parts.append(self.tile(inner).sum(1) * (outer[:, 0] if isinstance(outer, Tensor) and outer.dim() else outer))
        return functools.reduce(torch.add, parts)


def _suffix(g: Tensor) -> Tensor:
    """Sums over the later tokens."""
    later = torch.cat([g[:, 1:], torch.zeros_like(g[:, :1])], 1)
    return _sums(later.flip(1)).flip(1)


def _prefix(g: Tensor, before: bool) -> Tensor:
    """Sums over the tokens so far; `before`: without the present one."""
    return _sums(torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], 1) if before else g)


def _sums(g: Tensor, block: int = 64) -> Tensor:
    """Running sums over dimension 1, within blocks and over blocks: short sums keep digits, and Inductor (torch 2.11) fails on
    long ones, which it splits over programs."""
    if g.shape[1] <= block or g.shape[1] % block:
        return g.cumsum(1)
    inside = g.unflatten(1, (-1, block)).cumsum(2)
    return (inside + _prefix(inside[:, :, -1], before=True)[:, :, None]).flatten(1, 2)


def _product(keys: Tensor, values: Tensor, block: int = 256) -> Tensor:
    """Σ_s keyᵀ value, (B, HV, K, V); block by block, since one product per head would keep few processors of a GPU busy."""
    block = keys.shape[1] if keys.shape[1] % block else block
    left = keys.squeeze(-1).unflatten(1, (-1, block)).permute(0, 3, 1, 4, 2)
    right = values.squeeze(-2).unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)
    return (left @ right).sum(2)


# --- what is sent


def _summary(inputs: Sequence[Tensor], spec: str, since: Tensor | None = None) -> Tensor:
    """(B, HV, n): T and B of a method without reads, from the canonical form alone."""
    plan = ops.plan_of(spec)
    c, at = plan.canonical, _Values(plan, inputs, since)
    gk, gv, turn = (None if part is None else at.tile(part) for part in (c.decay_k, c.decay_v, c.phase))
    decay_k, decay_v = (None if g is None else _suffix(g).exp() for g in (gk, gv))
    states: list[Any] = [0.0] * len(c.states)
    for write in c.writes:
        key, value = at.tile(write.key, "K"), at.tile(write.value, "V")
        key = key if decay_k is None else key * decay_k
        value = value if decay_v is None else value * decay_v
        angle = None if turn is None else _suffix(turn)
        for i, field in enumerate(c.states):
            if field.name == "Z":
                one = write.value.xreplace({f: sympy.S.One for f in inputs_of(write.value) if f.name == "v"})
                states[i] = states[i] + _product(key, at.tile(one))
                continue
            turned = key if angle is None else key * (angle.cos() if field.name == "M" else angle.sin())
            states[i] = states[i] + _product(turned, value)
    return _packed(at, [at.total(part) for part in _linear(c)], states, plan)


def _packed(at: _Values, linear: Sequence[Tensor], states: Sequence[Any], plan: Plan) -> Tensor:
    n = at.extents
    full = [x.expand(n.B, n.HV, *(getattr(n, d) if d in _dims(p) else 1 for d in ("K", "V")))
            for x, p in zip(linear, _linear(plan.canonical), strict=True)]
    return torch.cat([x.flatten(2) for x in (*full, *states)], 2)


def _remembered(inputs: Sequence[Tensor], states: Sequence[Tensor], spec: str, since: Tensor | None = None) -> Tensor:
    """(B, HV, n) for "again": total log decays, and the memories after a run from zero."""
    plan = ops.plan_of(spec)
    at = _Values(plan, inputs, since)
    return _packed(at, [at.total(part) for part in _linear(plan.canonical)], states, plan)


def _columns(inputs: Sequence[Tensor], spec: str, cu_seqlens: Tensor | None = None, last: Tensor | None = None) -> list[Tensor]:
    """[o(0), P, the summary] of a method with reads: one run, with the memory I in columns of their own. Of packed sequences the
    summary is that of the one with the index `last`, (1,)."""
    plan = ops.plan_of(spec)
    size = ops.extents(plan, inputs)
    fields = {f.name: f for f in plan.canonical.inputs}
    K, V, many = size.dims["K"], size.dims["V"], len(plan.carries)
    wider = [torch.nn.functional.pad(x, (0, many * K)) if "V" in fields[name].dims else x
             for name, x in zip(plan.inputs, inputs, strict=True)]
    one = torch.eye(many * K, dtype=ops.state_dtype(size.like.dtype), device=size.like.device)
    sequences = size.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    start = [torch.nn.functional.pad(rows, (V, 0)).expand(sequences, size.heads, K, V + many * K)
             for rows in one.split(K)]
    o, *ends = torch.ops.lsmc.fwd.default(wider, [s.contiguous() for s in start], cu_seqlens, spec)[: 1 + many]
    ends = ends if last is None else [e.index_select(0, last) for e in ends]
    made = torch.cat([e[..., V:] for e in ends], 2).flatten(2), torch.cat([e[..., :V] for e in ends], 2).flatten(2)
    return [o[..., :V].contiguous(), o[..., V:].contiguous(), torch.cat(made, 2)]


# --- what comes in


def _incoming(parts: Tensor, start: Sequence[Tensor], rank: Tensor | None, size: int, sizes: Sequence[int],
              spec: str, first: Tensor | None = None) -> list[Tensor]:
    """The memories before the first token of this rank, from what all ranks sent, (size · B, HV, n); after the last of all
    tokens where there is no `rank`. `sizes` are K and V; ranks before `first` have no part in it.

    Maps of neighbours are composed in pairs, then those of pairs, and so on: log₂(size) steps."""
    c, columns = ops.plan_of(spec).canonical, way(spec)[0] == "columns"
    extent = dict(zip("KV", sizes))
    shapes = [_shape(f, *sizes) for f in c.states]
    many = len(shapes)
    linear = ([(many * extent["K"],) * 2] if columns
              else [tuple(extent[d] if d in _dims(p) else 1 for d in "KV") for p in _linear(c)])
    pieces = parts.unflatten(0, (size, -1)).split([a * b for a, b in (*linear, *shapes)], -1)
    maps = [x.unflatten(-1, shape) for x, shape in zip(pieces, (*linear, *shapes), strict=True)]
    if rank is not None:
        ranks = torch.arange(size, device=parts.device)
        before = (ranks < rank if first is None else (ranks >= first) & (ranks < rank)).reshape(-1, 1, 1, 1, 1)
        one = torch.eye(many * extent["K"], dtype=parts.dtype, device=parts.device) if columns else parts.new_zeros(())
        maps = [torch.where(before, x, one if i < len(linear) else parts.new_zeros(())) for i, x in enumerate(maps)]

    def after(then: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
        moves, added = then[: len(linear)], then[len(linear) :]
        new = (moves[0] @ torch.cat(list(states), -2)).split(extent["K"], -2) if columns else _decayed(c, moves, states)
        return [x + y for x, y in zip(new, added, strict=True)]

    while (n := maps[0].shape[0]) > 1:
        left, then, odd = ([x[i:j:2] for x in maps] for i, j in ((0, n - n % 2), (1, n), (n - n % 2, n)))
        moves = [b @ a if columns else a + b for a, b in zip(left[: len(linear)], then)]
        pairs = [*moves, *after(then, left[len(linear) :])]
        maps = [torch.cat([x, y]) for x, y in zip(pairs, odd, strict=True)] if n % 2 else pairs
    maps = [x[0] for x in maps]
    return after(maps, start) if start else maps[len(linear) :]


def _decayed(c: Canonical, linear: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
    """The memories after the total decays and angles of a rank."""
    total = dict(zip(_linear(c), linear))
    memory = {f.name: x for f, x in zip(c.states, states, strict=True)}
    if c.phase is not None:
        cos, sin = total[c.phase].cos(), total[c.phase].sin()
        memory["M"], memory["I"] = memory["M"] * cos - memory["I"] * sin, memory["M"] * sin + memory["I"] * cos
    for part in (c.decay_k, c.decay_v, c.decay_kv):
        if part is not None:
            factor = total[part].exp()
            memory = {n: x if n == "Z" and part != c.decay_k else x * factor for n, x in memory.items()}
    return [memory[f.name] for f in c.states]


# --- the correction


def _corrected(o: Tensor, inputs: Sequence[Tensor], states: Sequence[Tensor], spec: str) -> Tensor:
    """o(S) from o(0) for a method without reads: what the queries find of S, decayed up to their tokens, in 16 bits where o
    is."""
    plan = ops.plan_of(spec)
    c, at = plan.canonical, _Values(plan, inputs)
    memory = {f.name: x for f, x in zip(c.states, states, strict=True)}
    gk, gv, turn = (None if part is None else at.tile(part) for part in (c.decay_k, c.decay_v, c.phase))

    def read(key: Tensor, name: str) -> Tensor:
        found = key.squeeze(-1).transpose(1, 2).to(o.dtype) @ memory[name].to(o.dtype)
        return found.transpose(1, 2).to(at.dtype).unsqueeze(-2)

    for query in c.queries:
        before = query.at == "previous"
        key = at.tile(query.key, "K")
        key = key if gk is None else key * _prefix(gk, before).exp()
        if query.of == "Z":
            found = read(key, "Z")
        elif turn is None:
            found = read(key, "M")
        else:
            angle = _prefix(turn, before)
            found = read(key * angle.cos(), "M") - read(key * angle.sin(), "I")
        at.done[query.symbol] = found if gv is None or query.of == "Z" else found * _prefix(gv, before).exp()
    rest = c.output.xreplace({q.symbol: sympy.S.Zero for q in c.queries})
    found = at.tile(expand(c.output - rest), "V").squeeze(-2)
    return o + found.to(o.dtype)


def _through(o: Tensor, through: Tensor, states: Sequence[Tensor]) -> Tensor:
    """o(0) + P S for a method with reads."""
    memory = torch.cat([s.to(o.dtype) for s in states], 2)
    return o + (through.transpose(1, 2).to(o.dtype) @ memory).transpose(1, 2)


def _exact(function: Any) -> Any:
    """No autocast inside: memories are float32."""
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with ops._as_given(first.device):
            return function(*args, **options)

    return run


OPERATORS = ("summary", "remembered", "columns", "incoming", "corrected", "through")
"""Names of the operators, in the namespace `lsmc`."""

for _signature, _function in {
    "summary(Tensor[] inputs, str spec, Tensor? since=None) -> Tensor": _summary,
    "remembered(Tensor[] inputs, Tensor[] states, str spec, Tensor? since=None) -> Tensor": _remembered,
    "columns(Tensor[] inputs, str spec, Tensor? cu_seqlens=None, Tensor? last=None) -> Tensor[]": _columns,
    "incoming(Tensor parts, Tensor[] start, Tensor? rank, int size, int[] sizes, str spec, Tensor? first=None)"
    " -> Tensor[]": _incoming,
    "corrected(Tensor o, Tensor[] inputs, Tensor[] states, str spec) -> Tensor": _corrected,
    "through(Tensor o, Tensor through, Tensor[] states) -> Tensor": _through,
}.items():
    _library.define(_signature)
    _library.impl(_signature.partition("(")[0], _exact(_function), "CompositeImplicitAutograd")

__all__ = ["OPERATORS", "message", "way"]
