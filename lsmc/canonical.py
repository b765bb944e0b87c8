"""Declaration → read, correct, write, decay: one normal form for all writings of a method, found by algebra.

    R  = key · M'                      reads, of the memory before (M_{s-1}) or after (D(M_{s-1})) this
    step's decay
    M  = D(M_{s-1}) + Σ keyᵀ value     writes; the values may contain reads
    o  = output(inputs, Y)             with queries Y = key · M of M_{s-1}, D(M_{s-1}) or M_s, or of the
    normaliser Z

The delta rule written as ``beta * outer(k, v - k @ M)``, as ``(eye - beta * outer(k, k)) @ M + beta *
outer(k, v)`` or as ``-beta * grad(norm2(k @ M - v) / 2, M)`` gives the same canonical form and the same text.

How: every read ``Sum(K, key * M)`` is replaced by a symbol, bottom-up; what remains is a sum of products
of a part over K, a part over V and scalars; equal keys are collected, then keys of equal values; scalars
move from keys to values; what is left of M itself belongs to the decay.  Without a decay M_{s-1} and
D(M_{s-1}) are one, and "previous" is its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from hashlib import sha256
from math import gcd, lcm

import sympy

from lsmc.errors import LsmDecayError, LsmDimsError, LsmUpdateError, Where
from lsmc.expr import (
    BIAS,
    DIMS,
    KV,
    MEMORIES,
    MEMORY,
    NORMALIZER,
    Field,
    Over,
    Sum,
    contract,
    dims_of,
    inputs_of,
    rows_of,
    show,
    show_dims,
)
from lsmc.functions import Abs, exp, log, log1p, sign
from lsmc.terms import STANDARD

_SHOWN = {"previous": "M", "decayed": "M'", "updated": "M+"}


@dataclass(frozen=True)
class Read:
    """``symbol = key · M_{s-1}`` (at="previous") or ``key · D(M_{s-1})`` (at="decayed"); key has dims
    (K,), symbol (V,).  Of the bias (of="Mb") the key is 1."""

    symbol: Field
    key: sympy.Expr
    at: str
    of: str = "M"

    def __str__(self) -> str:
        return f"{self.symbol} = ({show(self.key)}) . {_SHOWN[self.at].replace('M', self.of)}"


@dataclass(frozen=True)
class Write:
    """``M += keyᵀ value``; key has dims (K,) or (), value dims (V,) or (), and may contain read symbols."""

    key: sympy.Expr
    value: sympy.Expr


@dataclass(frozen=True)
class Query:
    """``symbol = key · M`` (of="M", symbol dims (V,)), ``key · Z`` (of="Z", symbol dims ()) or the bias (of="Mb",
    key 1, symbol dims (V,)), at previous, decayed or updated."""

    symbol: Field
    key: sympy.Expr
    at: str
    of: str


@dataclass(frozen=True)
class Canonical:
    """The canonical form of a declaration; `str` prints it.

    One step: reads from M_{s-1} or D(M_{s-1});  M_s = D(M_{s-1}) + Σ_w key_wᵀ value_w;  queries;  o =
    output (dims (V,)). D(M) = e^{decay_k + i phase} ⊙ M ⊙ e^{decay_v} ⊙ e^{decay_kv}; the parts are log decays with
    dims () or (K,); (V,); (K, V), or None, and angles with dims (), (K,) or (K, V): M is complex then, and real parts
    are read. With `momentum` (a log decay, dims ()) an accumulator P takes the writes: P_s = e^{momentum} P_{s-1} + Σ_w
    key_wᵀ value_w and M_s = D(M_{s-1}) + P_s. `inputs`: q, k, v (those that are used), then the decay's
    inputs, then the others, by name. `normalizer`: there is a second memory Z ∈ R^K, the same recurrence
    with v = 1 (its reads are scalars key · Z). With a `bias` there is a row Mb ∈ R^V beside M, the same recurrence with
    keys 1. With a `block` all reads are of the memory at the start of the present block of so many tokens, and may enter
    the values in any way; of one token, that is M_{s-1}. `defaults`: per-head inputs that may be omitted, as
    functions of the number of heads. `where`: the update in the user's source, for errors of later stages.
    `scale` of a call multiplies every occurrence of q.
    """

    name: str
    inputs: tuple[Field, ...]
    decay_k: sympy.Expr | None
    decay_v: sympy.Expr | None
    decay_kv: sympy.Expr | None
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    queries: tuple[Query, ...]
    output: sympy.Expr
    normalizer: bool
    defaults: dict[str, Callable[[int], list[float]]] = field(compare=False)
    where: Where | None = field(default=None, compare=False, repr=False)
    phase: sympy.Expr | None = None
    momentum: sympy.Expr | None = None
    block: int | None = None

    @cached_property
    def states(self) -> tuple[Field, ...]:
        """The memories that a step hands to the next, in the order of the state: M; I, the imaginary part of a complex
        one; P, what momentum accumulates; Z, the normaliser; Mb, the bias; in blocks of several tokens M0 and Mb0, M and Mb
        at the start of the block, and Mt, how many of its tokens have been, the same for all heads."""
        whole, blocks = (self.rows, "V"), self.block is not None and self.block > 1
        there = {"M": (True, whole), "I": (self.phase is not None, whole), "P": (self.momentum is not None, whole),
                 "Z": (self.normalizer, (self.rows,)), "Mb": (self.bias, ("V",)), "M0": (blocks, whole),
                 "Mb0": (blocks and self.bias, ("V",)), "Mt": (blocks, ())}  # fmt: skip
        return tuple(Field(name, dims) for name, (is_there, dims) in there.items() if is_there)

    @cached_property
    def bias(self) -> bool:
        """Whether there is a row Mb of keys 1."""
        return "Mb" in {*(r.of for r in self.reads), *(y.of for y in self.queries)}

    @cached_property
    def square(self) -> bool:
        """Whether K = V: some vector over one of them is taken for one over the other."""
        return any(expr.has(Over) for expr in (*self.keys, *(w.value for w in self.writes), self.output, *self.decays))

    @cached_property
    def matrix(self) -> bool:
        """Whether entries of the memory decay, or turn, each by a factor of its own."""
        turns_along_v = self.phase is not None and (self.decay_v is not None or "V" in dims_of(self.phase))
        return self.decay_kv is not None or turns_along_v

    @cached_property
    def keys(self) -> tuple[sympy.Expr, ...]:
        """Of reads, writes and queries."""
        return *(r.key for r in self.reads), *(w.key for w in self.writes), *(y.key for y in self.queries)

    @cached_property
    def rows(self) -> str:
        """What the rows of the memory run over: "K", or "F", the K·K pairs."""
        return "F" if any(rows_of(key) == {"F"} for key in self.keys) else "K"

    @cached_property
    def decays(self) -> tuple[sympy.Expr, ...]:
        """The log decays there are: of the memory along K, V and both, and of what momentum accumulates."""
        parts = self.decay_k, self.decay_v, self.decay_kv, self.momentum
        return tuple(part for part in parts if part is not None)

    @cached_property
    def key(self) -> str:
        """Names the declaration in compiled graphs: its name and a hash of its canonical form."""
        return f"{self.name}_{sha256(str(self).encode()).hexdigest()[:16]}"

    def substitute(self, values: Mapping[Field, sympy.Expr]) -> Canonical:
        """The same method of other inputs: each input in `values` replaced by an expression, of its own dims, of new ones.

        ``{k: l2norm(k)}`` makes of a method on k the method on l2norm(k). The expressions stay where the inputs stood: keys
        and queries are not normalised again, since a factor that left a query for the output would have its derivative
        computed from the output. `inputs` are those that occur; a replaced input has no default.
        """
        table = dict(values)

        def new(expr: sympy.Expr | None) -> sympy.Expr | None:
            return None if expr is None else expr.xreplace(table)

        decays = new(self.decay_k), new(self.decay_v), new(self.decay_kv), new(self.phase), new(self.momentum)
        reads = tuple(replace(r, key=new(r.key)) for r in self.reads)
        writes = tuple(Write(new(w.key), new(w.value)) for w in self.writes)
        queries = tuple(replace(y, key=new(y.key)) for y in self.queries)
        output = new(self.output)
        rest = [*(r.key for r in reads), *(e for w in writes for e in (w.key, w.value)), *(y.key for y in queries), output]
        made = {r.symbol for r in reads} | {y.symbol for y in queries}
        in_decay = frozenset().union(*(inputs_of(part) for part in decays if part is not None))
        others = frozenset().union(*map(inputs_of, rest)) - in_decay - made
        inputs = (
            *(symbol for symbol in STANDARD if symbol in in_decay | others),
            *sorted(in_decay - set(STANDARD), key=lambda symbol: symbol.name),
            *sorted(others - set(STANDARD), key=lambda symbol: symbol.name),
        )
        known = {symbol.name for symbol in inputs} - {symbol.name for symbol in table}
        defaults = {name: default for name, default in self.defaults.items() if name in known}
        return Canonical(self.name, inputs, *decays[:3], reads, writes, queries, output, self.normalizer, defaults, self.where,
                         *decays[3:], self.block)

    def __str__(self) -> str:
        lines = [
            f"{self.name}({', '.join(symbol.name + symbol.shape.replace(' ', '') for symbol in self.inputs)})"
        ]
        parts = [
            f"exp({show(part)}){show_dims(dims_of(part)).replace(' ', '')}"
            for part in (self.decay_k, self.decay_v, self.decay_kv)
            if part is not None
        ]
        if self.phase is not None:
            parts.append(f"exp(i ({show(self.phase)})){show_dims(dims_of(self.phase)).replace(' ', '')}")
        lines.append(f"  decay   M' = {' * '.join([*parts, 'M'])}")
        start = f" at the start of its block of {self.block}" if self.block is not None else ""
        lines += [f"  read    {read}{start}" for read in self.reads]
        into = "M+ = M'" if self.momentum is None else f"P+ = exp({show(self.momentum)}) * P"
        lines += [f"  write   {into} + ({show(w.key)})^T ({show(w.value)})" for w in self.writes[:1]]
        lines += [f"               + ({show(w.key)})^T ({show(w.value)})" for w in self.writes[1:]]
        lines += [
            f"  query   {y.symbol} = ({show(y.key)}) . {_SHOWN[y.at].replace('M', y.of)}"
            for y in self.queries
        ]
        if self.momentum is not None:
            lines.insert(-len(self.queries) or len(lines), "  add     M+ = M' + P+")
        return "\n".join([*lines, f"  output  o = {show(self.output)}"])


# --- normal forms


def expand(expr: sympy.Expr) -> sympy.Expr:
    """Products distributed over sums, at the top level only; powers, functions and contractions are left
    whole, denominators too: sympy's own would multiply 1/a · 1/(b + c) out to 1/(a b + a c) and hide the factor."""
    if isinstance(expr, sympy.Add):
        return sympy.Add(*(expand(arg) for arg in expr.args))
    sums = [factor for factor in sympy.Mul.make_args(expr) if isinstance(factor, sympy.Add)]
    if not isinstance(expr, sympy.Mul) or not sums:
        return expr
    terms = [sympy.Mul(*(factor for factor in expr.args if factor not in sums))]
    for one in sums:
        terms = [term * part for term in terms for part in one.args]
    return sympy.Add(*(expand(term) for term in terms))


def tidy(expr: sympy.Expr, spread: bool = True) -> sympy.Expr:
    """The same value with signs, contractions and arguments in a standard form, bottom-up; with `spread` products are
    distributed over sums."""
    if not expr.args:
        return expr
    args = [tidy(arg, spread) for arg in expr.args]
    if isinstance(expr, Sum):
        dim, body = args
        if type(expr) is Sum:
            return contract(str(dim), body if dims_of(body) or not spread else expand(body))
        return expr.func(dim, body)
    if isinstance(expr, sympy.Pow) and isinstance(args[0], sympy.Add) and args[0].could_extract_minus_sign():
        if args[1].is_Integer:  # (R - v)² and (v - R)² are one; odd powers carry the sign outside
            return (-1) ** args[1] * (-args[0]) ** args[1]
    if isinstance(expr, sympy.Abs | sympy.sign):  # sympy makes them of √x²
        return (Abs if isinstance(expr, sympy.Abs) else sign)(args[0])
    made = expr.func(*args)
    return expand(made) if spread and isinstance(made, sympy.Mul) else made


def separate(expr: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Σ aᵢ bᵢ = expr with aᵢ free of V and bᵢ free of K; scalars go with b.  Raises ValueError when there
    is no such form."""
    dims = dims_of(expr)
    if "K" not in dims:
        return [(sympy.S.One, expr)]
    if "V" not in dims:
        return [(expr, sympy.S.One)]
    if isinstance(expr, sympy.Add):
        return [pair for arg in expr.args for pair in separate(arg)]
    if isinstance(expr, sympy.Mul):
        pairs = [(sympy.S.One, sympy.S.One)]
        for factor in expr.args:
            pairs = [(a * c, b * d) for a, b in pairs for c, d in separate(factor)]
        return pairs
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer:
        if isinstance(expr.base, sympy.Mul):
            return separate(sympy.Mul(*(factor**expr.exp for factor in expr.base.args)))
        if expr.exp > 0:
            return separate(sympy.expand(expr, deep=False))
    if isinstance(expr, exp) and isinstance(expr.args[0], sympy.Add):
        return separate(sympy.Mul(*(exp(arg) for arg in expr.args[0].args)))
    raise ValueError(f"{show(expr)} is no sum of products of a part over K and a part over V")


def split_scalars(term: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(scalar factors, the others) of a product; scalars have no dims."""
    free: list[sympy.Expr] = []
    bound: list[sympy.Expr] = []
    for factor in sympy.Mul.make_args(term):
        (bound if dims_of(factor) else free).append(factor)
    return sympy.Mul(*free), sympy.Mul(*bound)


def content(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(c, p) with expr = c·p: c the scalars (numbers and sign included) common to all terms of the
    expanded `expr`."""
    terms = sorted(
        sympy.Add.make_args(expand(expr)), key=lambda term: show(split_scalars(term)[1]) + show(term)
    )
    if len(terms) == 1:
        return split_scalars(terms[0])
    numbers: list[sympy.Rational] = []
    powers: list[dict[sympy.Expr, sympy.Expr]] = []
    for term in terms:
        coefficient, rest = split_scalars(term)[0].as_coeff_Mul()
        numbers.append(coefficient if coefficient.is_Rational else sympy.S.One)
        powers.append(dict(factor.as_base_exp() for factor in sympy.Mul.make_args(rest)))
    common = sympy.S.One
    for base, power in powers[0].items():
        others = [table.get(base) for table in powers]
        if base != 1 and all(other is not None and other.is_Number and other.is_positive for other in others):
            common *= base ** min(other for other in others if other is not None)
        elif base != 1 and all(other == power for other in others):
            common *= base**power
    size = sympy.Rational(reduce(gcd, (abs(n.p) for n in numbers)), reduce(lcm, (n.q for n in numbers)))
    common *= size if numbers[0].is_positive else -size
    return common, sympy.Add(*(term / common for term in terms))


def collect(
    pairs: Iterable[tuple[sympy.Expr, sympy.Expr]], reads: Iterable[Field] = ()
) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Σ aᵢ bᵢ with as few products as equal keys, then proportional values, allow; in a standard order.

    k v + 1 v − k R − 1 R  →  (k + 1)(v − R)

    What depends on `reads` stays in the values.
    """
    by_key: dict[sympy.Expr, sympy.Expr] = {}
    for a, b in pairs:
        for term in sympy.Add.make_args(expand(a)):
            factor, key = split_scalars(term)
            by_key[key] = by_key.get(key, sympy.S.Zero) + factor * b
    by_value: dict[sympy.Expr, list[sympy.Expr]] = {}
    for key, value in by_key.items():
        value = expand(tidy(value))
        if value != 0:
            factor, _ = content(value)
            factor = sympy.Mul(*(part for part in sympy.Mul.make_args(factor) if not _depends(part, reads)))
            by_value.setdefault(expand(value / factor), []).append(factor * key)
    found = []
    for primitive, keys in by_value.items():
        factor, key = content(sympy.Add(*keys))
        found.append((key, expand(factor * primitive)))
    return sorted((pair for pair in found if pair[0] != 0), key=lambda pair: (show(pair[0]), show(pair[1])))


def gather(pairs: Iterable[tuple[sympy.Expr, sympy.Expr]]) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Σ aᵢ bᵢ with one product for each key, in a standard order. Values stay as they were written, common factors taken out:
    multiplied out, the derivative of a norm is a difference of large terms."""
    by_key: dict[sympy.Expr, sympy.Expr] = {}
    for a, b in pairs:
        for term in sympy.Add.make_args(expand(a)):
            factor, key = split_scalars(term)
            by_key[key] = by_key.get(key, sympy.S.Zero) + factor * b
    found = [(key, sympy.factor_terms(value)) for key, value in by_key.items() if value != 0]
    return sorted(found, key=lambda pair: show(pair[0]))


#
# --- reads


class _Reads:
    """Replaces reads of the memory by symbols; equal keys share one."""

    def __init__(self) -> None:
        self.symbols: dict[tuple[Field, sympy.Expr], Field] = {}

    def symbol(self, memory: Field, key: sympy.Expr) -> Field:
        return self.symbols.setdefault(
            (memory, key), Field(f"?{len(self.symbols)}", [d for d in memory.dims if d != "K"])
        )

    def replace(self, expr: sympy.Expr) -> sympy.Expr:
        """`expr` with every ``Sum(K, key * M)`` and every bias replaced; raises ValueError when a read is not linear in
        the memory."""
        if expr in BIAS.values():
            return self.symbol(expr, sympy.S.One)
        if not (expr.free_symbols & MEMORIES) or not expr.args:
            return expr
        args = [self.replace(arg) for arg in expr.args]
        if type(expr) is not Sum or expr.dim != "K" or not (args[1].free_symbols & MEMORIES):
            return expr.func(*args)
        body, found = args[1], sympy.S.Zero
        for memory in sorted(body.free_symbols & MEMORIES, key=str):
            factor, body = linear(body, memory)
            for key, value in collect(separate(factor), self.symbols.values()):
                found += value * self.symbol(memory, key)
        return found + contract("K", body)


def linear(expr: sympy.Expr, memory: Field) -> tuple[sympy.Expr, sympy.Expr]:
    """(c, rest) with expr = c ⊙ memory + rest, both free of `memory`; raises ValueError when there are
    none."""
    factor = sympy.diff(expr, memory) if not _under_sum(expr, memory) else None
    if factor is None or memory in factor.free_symbols:
        raise ValueError(f"{show(expr)} is not linear in {memory}")
    return factor, expr.xreplace({memory: sympy.S.Zero})


def bent(value: sympy.Expr, reads: Iterable[Field]) -> bool:
    """Whether a value is no elementwise affine function of what is read: no c + Σ b ⊙ R."""
    there = [s for s in reads if s in value.free_symbols]
    return any(_under_sum(value, s) for s in there) or any(_depends(sympy.diff(value, s), there) for s in there)


def _under_sum(expr: sympy.Expr, memory: Field) -> bool:
    if isinstance(expr, Sum):
        return memory in expr.free_symbols
    return any(_under_sum(arg, memory) for arg in expr.args)


def _depends(expr: sympy.Expr, symbols: Iterable[sympy.Symbol]) -> bool:
    return bool(expr.free_symbols & set(symbols))


# --- canonicalise


def canonicalise(
    name: str,
    decay: tuple[sympy.Expr | None, ...],
    update: sympy.Expr,
    readout: sympy.Expr,
    defaults: dict[str, Callable[[int], list[float]]],
    *,
    recurrence: bool = False,
    momentum: sympy.Expr | None = None,
    block: int | None = None,
    where: Where | None = None,
) -> Canonical:
    """The canonical form of M_s = D(M_{s-1}) + update (or, with `recurrence`, M_s = update), o = readout.

    `decay` holds the log decays over K, V and both, and the phase; `momentum` the log decay of the accumulated update.

    Raises LsmUpdateError when the update is no sum of outer products, reads and a scaling of the memory,
    LsmDimsError when the readout is no vector over V, LsmDecayError when what the update adds to the
    memory makes it grow for certain.
    """
    side = "recurrence" if recurrence else "update"
    spot, seen = (where.at(side), where.at("readout")) if where else (None, None)
    decay_k, decay_v, decay_kv, phase, momentum = (None if part is None else tidy(part) for part in (*decay, momentum))
    still = decay_k is None and decay_v is None and decay_kv is None and phase is None

    def named(expr: sympy.Expr, bare: str) -> sympy.Expr:
        table = {}
        for fields in (MEMORY, NORMALIZER, BIAS):
            table[fields["current"]] = fields[bare]
            if still:
                table[fields["decayed"]] = fields["previous"]
        return expr.xreplace(table).xreplace(table)

    if dims_of(update) != KV and update != 0:
        raise LsmDimsError(
            f"the {side} {show(update)} has dims {show_dims(dims_of(update))}; the memory has dims (K, V)",
            where=spot, help="outer(k, v) makes a matrix of two vectors",
        )  # fmt: skip
    if update.free_symbols & set(NORMALIZER.values()):
        raise LsmUpdateError("the update reads the normaliser; only a readout may", where=spot)
    if dims_of(readout) != {"V"}:
        raise LsmDimsError(
            f"the readout {show(readout)} has dims {show_dims(dims_of(readout))}; the output has dims (V,)",
            where=seen, help="the default is q @ M",
        )  # fmt: skip

    # the update: reads, then what multiplies the memory itself, then outer products
    reads = _Reads()
    previous, decayed = MEMORY["previous"], MEMORY["decayed"]
    way = "an update is a sum of outer(key over K, value over V), possibly with reads x @ M in the values, and multiples of M"
    try:
        rest = reads.replace(tidy(named(update, "previous"), block is None))
        kept: dict[Field, sympy.Expr] = {}
        for memory in (previous, decayed):
            kept[memory], rest = linear(rest, memory)
        pairs = collect(separate(rest), reads.symbols.values()) if block is None else gather(separate(rest))
    except ValueError as error:
        raise LsmUpdateError(f"{name}: {error}", where=spot, help=way) from None
    if recurrence:
        kept[previous if still else decayed] -= 1
    symbols = list(reads.symbols.values())
    for key, _ in [
        *pairs,
        *((key, 0) for _, key in reads.symbols),
        *((factor, 0) for factor in kept.values()),
    ]:
        if _depends(key, symbols):
            raise LsmUpdateError(
                f"{name}: the key {show(_restore(key, reads))} depends on what was read", where=spot,
                help="values may depend on reads; keys and decays depend on inputs only",
            )  # fmt: skip
    used = {
        symbol: at_key
        for at_key, symbol in reads.symbols.items()
        if any(symbol in value.free_symbols for _, value in pairs)
    }
    reads_decayed = (
        any(memory == decayed for memory, _ in used.values())
        or decayed in named(readout, "updated").free_symbols
    )

    if (phase is not None or momentum is not None) and any(factor != 0 for factor in kept.values()):
        raise LsmUpdateError(
            f"{name}: the update scales a memory that {'rotates' if phase is not None else 'has momentum'}", where=spot,
            help="put the scaling into decay=…",
        )  # fmt: skip
    decay_k, decay_kv = _fold(
        name, decay_k, decay_v, decay_kv, {m: expand(f) for m, f in kept.items()}, reads_decayed, spot
    )

    if block is None and decay_k is not None and decay_v is None and decay_kv is None and phase is None:
        used, pairs = _after_decay(decay_k, used, pairs, reads)

    # names in a standard order: by place, then by the text of the key
    places = {field: (of, at) for of, fields in (("M", MEMORY), ("Mb", BIAS)) for at, field in fields.items()}
    order = sorted(used, key=lambda symbol: (places[used[symbol][0]][1] != "previous", places[used[symbol][0]][0],
                                             show(used[symbol][1])))  # fmt: skip
    rename = {symbol: Field(f"R{i}", ("V",)) for i, symbol in enumerate(order)}
    # values are collected again under the final names, so that their order of terms does not depend on the
    # writing
    pairs = [(key, value.xreplace(rename)) for key, value in pairs]
    writes = tuple(Write(*pair) for pair in (collect(pairs, rename.values()) if block is None else pairs))
    read_list = tuple(Read(rename[s], used[s][1], *places[used[s][0]][::-1]) for s in order)

    queries, output = _queries(name, tidy(named(readout, "updated"), block is None), block is None, seen)
    normalizer = any(query.of == "Z" for query in queries)
    if normalizer:
        if phase is not None or momentum is not None:
            raise LsmUpdateError(f"{name}: M.normalizer beside {'a rotation' if phase is not None else 'momentum'}", where=seen,
                                 help="keep a normaliser of your own as a second declaration")  # fmt: skip
        _check_normalizer(name, decay_v, decay_kv, writes, read_list, seen)

    made = Canonical(name, (), decay_k, decay_v, decay_kv, read_list, writes, queries, output, normalizer, defaults, spot,
                     phase, momentum, block)
    _check_rows(made, where)
    _check_block(made, where)
    if made.bias:
        _check_bias(made, where)
    return made.substitute({})


def _check_rows(made: Canonical, where: Where | None) -> None:
    """All keys and queries run over the rows of one memory; K·K of them decay alike."""
    kinds = {kind for key in made.keys for kind in rows_of(key)}
    if len(kinds) > 1:
        raise LsmDimsError(f"{made.name}: keys and queries over K meet others over pairs in one memory",
                           where=where.at("readout") if where else None, help="read and write with pairs(…)")  # fmt: skip
    for part in (made.decay_k, made.decay_kv, made.phase):
        if part is not None and "K" in dims_of(part) and "F" in kinds | rows_of(part):
            raise LsmDimsError(f"{made.name}: {show(part)} varies along K; the memory has a row for every pair of K",
                               where=where.at("decay") if where else None, help="decay by a scalar, or along V")  # fmt: skip


def _check_block(made: Canonical, where: Where | None) -> None:
    """A block says at which memory reads are taken: that of its start, which has not decayed since."""
    if made.block is None:
        return
    if any(read.at != "previous" for read in made.reads):
        raise LsmUpdateError(f"{made.name}: block={made.block} reads the memory at a block's start, and M.decayed is read",
                             where=made.where, help="read M")  # fmt: skip
    if not made.reads:
        raise LsmUpdateError(f"{made.name}: block={made.block} says at which memory the update reads, and it reads none",
                             where=where.at("block") if where else None, help="leave block= out")  # fmt: skip
    if made.normalizer:
        raise LsmUpdateError(f"{made.name}: M.normalizer beside block={made.block}", where=where.at("readout") if where else None,
                             help="keep a normaliser of your own as a second declaration")  # fmt: skip


def _check_bias(made: Canonical, where: Where | None) -> None:
    """The bias is a row beside those of M: it decays as all of them do."""
    along = made.decay_k is not None and dims_of(made.decay_k)
    for there, what in ((along, "a decay along K"), (made.decay_kv, "a decay of a matrix"), (made.phase, "a rotation"),
                        (made.momentum, "momentum"), (made.normalizer, "M.normalizer")):  # fmt: skip
        if there:
            raise LsmUpdateError(f"{made.name}: M.bias beside {what}", where=where.at("readout") if where else None,
                                 help="decay by one number for each head, or along V")  # fmt: skip


def _after_decay(
    decay_k: sympy.Expr,
    used: dict[Field, tuple[Field, sympy.Expr]],
    pairs: list[tuple[sympy.Expr, sympy.Expr]],
    reads: _Reads,
) -> tuple[dict[Field, tuple[Field, sympy.Expr]], list[tuple[sympy.Expr, sympy.Expr]]]:
    """(e^g ⊙ x) · M_{s-1} is x · D(M_{s-1}): reads that always come with the whole decay are of the decayed memory."""
    factors = [exp(part) for part in sympy.Add.make_args(decay_k)]
    over_k = sympy.Mul(*(factor for factor in factors if dims_of(factor)))
    scalars = sympy.Mul(*(factor for factor in factors if not dims_of(factor)))

    def divided(expr: sympy.Expr) -> bool:
        return any(power.exp.is_negative and power.base.has(*factors) for power in expr.atoms(sympy.Pow))

    for symbol, (memory, key) in sorted(used.items(), key=lambda item: show(item[1][1])):
        bare = expand(key / over_k)
        if memory != MEMORY["previous"] or divided(bare):
            continue
        after = reads.symbol(MEMORY["decayed"], bare)
        values = [expand(tidy(value.xreplace({symbol: after / scalars}))) for _, value in pairs]
        if not any(map(divided, values)):
            pairs = [(at, value) for (at, _), value in zip(pairs, values, strict=True)]
            used = {s: read for s, read in used.items() if s != symbol} | {after: (MEMORY["decayed"], bare)}
    return used, pairs


def _restore(expr: sympy.Expr, reads: _Reads) -> sympy.Expr:
    back = {
        symbol: sympy.Symbol(f"({show(key)} @ {memory})") for (memory, key), symbol in reads.symbols.items()
    }
    return expr.xreplace(back)


def _fold(
    name: str,
    decay_k: sympy.Expr | None,
    decay_v: sympy.Expr | None,
    decay_kv: sympy.Expr | None,
    kept: dict[Field, sympy.Expr],
    reads_decayed: bool,
    where: Where | None,
) -> tuple[sympy.Expr | None, sympy.Expr | None]:
    """What an update adds as c_p ⊙ M_{s-1} + c_d ⊙ D(M_{s-1}) joins the decay: e^g (1 + c_d) + c_p, as a
    log decay."""
    c_p, c_d = kept[MEMORY["previous"]], kept[MEMORY["decayed"]]
    if c_p == 0 and c_d == 0:
        return decay_k, decay_kv
    if reads_decayed and (decay_k is not None or decay_v is not None or decay_kv is not None):
        raise LsmUpdateError(
            f"{name}: the update scales the memory and M.decayed is read: which decay is meant is ambiguous",
            where=where, help="put the whole scaling into decay=…",
        )  # fmt: skip
    if c_p != 0 and (decay_v is not None or decay_kv is not None):
        raise LsmUpdateError(
            f"{name}: the update adds {show(c_p)} * M to a memory that decays over V",
            where=where,
            help="put it into decay=…",
        )
    log_of = sympy.S.Zero
    if c_p != 0:
        log_of = _log(expand((exp(decay_k) if decay_k is not None else 1) * (1 + c_d) + c_p), name, where)
    else:
        log_of = (decay_k if decay_k is not None else 0) + _log(1 + c_d, name, where)
    if log_of.is_positive:
        raise LsmDecayError(
            f"{name}: with what the update adds, the memory is multiplied by more than 1 at every token (log decay {show(log_of)})",
            where=where, help="the update is added to the decayed memory; to give all of M_s, use recurrence=…",
        )  # fmt: skip
    if dims_of(log_of) == KV or "V" in dims_of(log_of):
        parts = log_of - (decay_k or 0)
        return decay_k, (decay_kv or sympy.S.Zero) + parts
    return (None if log_of == 0 else log_of), decay_kv


def _log(factor: sympy.Expr, name: str, where: Where | None) -> sympy.Expr:
    """ln(factor), as a sum of the logarithms of its factors; ln(1 + c) as log1p(c)."""
    if factor == 0:
        raise LsmUpdateError(
            f"{name}: the update removes the whole memory", where=where, help="recurrence=… gives all of M_s"
        )
    if factor.is_number:
        if not factor.is_positive:
            raise LsmUpdateError(
                f"{name}: the memory is multiplied by {show(factor)}; decays are in (0, 1]", where=where
            )
        return log(factor)
    parts = []
    for part in sympy.Mul.make_args(sympy.factor_terms(factor)):
        base, power = part.as_base_exp()
        unit = isinstance(base, sympy.Add) and base.as_coeff_Add()[0] == 1
        parts.append(power * (log1p(base - 1) if unit else log(base)))
    return sympy.Add(*parts)


def _queries(name: str, readout: sympy.Expr, spread: bool, where: Where | None) -> tuple[tuple[Query, ...], sympy.Expr]:
    """Queries and the output over their symbols."""
    found = _Reads()
    way = "read the memory with a row vector: q @ M, q @ M.previous, q @ (M.previous + outer(u * k, v)), q @ M.normalizer"
    try:
        output = tidy(found.replace(readout), spread)
    except ValueError as error:
        raise LsmUpdateError(f"{name}: readout: {error}", where=where, help=way) from None
    if output.free_symbols & MEMORIES:
        raise LsmUpdateError(
            f"{name}: the readout {show(output)} uses the memory without reading it", where=where, help=way
        )
    output = expand(output) if spread else output
    places = [field.name for field in (*MEMORY.values(), *NORMALIZER.values(), *BIAS.values())]
    order = sorted(
        (
            (symbol, memory, key)
            for (memory, key), symbol in found.symbols.items()
            if symbol in output.free_symbols
        ),
        key=lambda item: (places.index(item[1].name), show(item[2])),
    )
    counts = {"M": 0, "Z": 0}
    rename, queries = {}, []
    for symbol, memory, key in order:
        if _depends(key, found.symbols.values()):
            raise LsmUpdateError(
                f"{name}: the query {show(key)} depends on what was read", where=where, help=way
            )
        of, at = memory.name.split(".")
        kind = "Z" if of == "Z" else "M"
        rename[symbol] = Field(f"{'N' if of == 'Z' else 'Y'}{counts[kind]}", symbol.dims)
        counts[kind] += 1
        queries.append(Query(rename[symbol], key, at, of))
    output = tidy(output.xreplace(rename), spread)
    return tuple(queries), expand(output) if spread else output


def _check_normalizer(
    name: str,
    decay_v: object,
    decay_kv: object,
    writes: tuple[Write, ...],
    reads: tuple[Read, ...],
    where: Where | None,
) -> None:
    if decay_v is not None or decay_kv is not None:
        raise LsmUpdateError(
            f"{name}: M.normalizer needs a decay over K only: Z has no dim V",
            where=where,
            help="drop the decay over V",
        )
    gone = {symbol: Field(symbol.name) for symbol in (STANDARD[2], *(read.symbol for read in reads))}
    for write in writes:
        value = write.value.xreplace(gone)
        if dims_of(value) or any(sum_.dim == "V" for sum_ in value.atoms(Sum)):
            raise LsmUpdateError(
                f"{name}: M.normalizer is the memory of v = 1, but the written value {show(write.value)} varies over V otherwise",
                where=where, help="keep a normaliser of your own as a second declaration",
            )  # fmt: skip


__all__ = [
    "DIMS",
    "Canonical",
    "Query",
    "Read",
    "Write",
    "bent",
    "canonicalise",
    "collect",
    "content",
    "expand",
    "separate",
    "tidy",
]
