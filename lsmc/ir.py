"""The typed intermediate representation that every stage below the declaration speaks.

A *tile* is a matrix whose two dimensions carry names: `T` (the tokens of one chunk), `K` (key), `V` (value), `F` (the
K·K pairs of keys), `E` (the K·V entries of a memory) or `1`.
A `Program` is one chunk's work: a list of single-assignment operations on tiles, named outputs, and *carries*, the
tiles handed from one chunk to the next (forward in time, or backward for cotangents).

Grammar (what `str(program)` prints and `parse` reads)::

    program  ::= "program" NAME NEWLINE (op NEWLINE)* (carry NEWLINE)* (output NEWLINE)* (hand NEWLINE)*
    op       ::= "%" ID ":" "(" DIM "," DIM ")" "=" KIND "(" [%ID ("," %ID)*] ")" ["{" KEY "=" ATOM ("," ...)* "}"]
    carry    ::= "carry" NAME ":" %ID "->" %ID ["reverse"]
    output   ::= "output" NAME "=" %ID
    hand     ::= ("keep" | "take") NAME "=" %ID

Operations, with rows i, j and columns d:

| kind | meaning |
|---|---|
| `input{name,role}` | a tile of a user tensor (`token`), of a per-head constant (`head`) or a carried memory (`carry`) |
| `map{expr}` | elementwise sympy expression of the operands x0, x1, …, broadcast along dimensions of size 1 |
| `expand` | broadcast to the result's dimensions |
| `transpose`, `matmul{ta,tb}` | linear algebra |
| `rename` | the same numbers under another name of the columns, K for V or V for K |
| `pairs` | rows over F of two with rows over K: x_a y_b at the pair (a, b); a product of two such is one of two products |
| `pairs_grad{wrt}` | its partial derivative, from the cotangent and the other operand |
| `sum{axis}` | sum over rows (axis 0) or columns (axis 1) |
| `max{axis}` | the largest entry of each row, a shift that no result depends on: its cotangent is zero |
| `cumsum{reverse,exclusive}` | running sum over the rows |
| `mask{strict}` | keep j < i (strict) or j <= i of a (T, T) tile |
| `valid` | zero the rows behind the end of the sequence |
| `form{wrt,strict,before}`, `form_gate` | the partial derivatives of the decay form, below |
| `between{strict,before}` | D_ij = exp(sum of g over (j, i]), masked; `before` leaves out g_i: (j, i) |
| `between_grad{before}` | its transpose: dg_l = sum of W_ij over the pairs whose interval holds l |
| `inverse` | (I + L)⁻¹ for strictly lower L |
| `scan{log,phase,writes,at}` | q · Re M_i at every token of M_i = e^{log + i phase} ⊙ M_{i−1} + Σ kᵀv, or a part of the last M |
| `scan_grad{wrt,…}` | its partial derivatives: the operands of `scan`, then the cotangent |
| `round` | the value as the operand of a product holds it, where that has fewer digits; only backends make it |
| `diagonal` | that of a (T, T) tile, as a (T, 1) column; only backends make it |

**The decay form.** F(P, X, Y, g) = Σ_{j<i} Σ_d P_ij X_id Y_jd exp(Σ_{l in (j, i]} g_ld) is linear in P, X and Y. The
decay-weighted product is ∂F/∂P, its application to values ∂F/∂X, the reverse application ∂F/∂Y and the gate gradient
∂F/∂g, so one operation and one adjoint rule carry all decayed attention, over K and over V.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from tokenize import TokenError
from typing import Any

import sympy
from sympy.core.parameters import distribute

from lsmc.errors import LsmError
from lsmc.functions import FUNCTIONS, exp, relu

Dims = tuple[str, str]


class LsmIRError(LsmError):
    """A program that is not well formed, or text that is no program; names the operation or the line."""


DIMS = ("T", "K", "V", "F", "E", "1")
KINDS: dict[str, tuple[int, ...]] = {  # kind -> permitted operand counts
    "input": (0,), "map": tuple(range(17)), "expand": (1,), "transpose": (1,), "matmul": (2,), "sum": (1,), "max": (1,),
    "pairs": (2,), "pairs_grad": (2,), "rename": (1,),
    "cumsum": (1,), "mask": (1,), "valid": (1,), "form": (3,), "form_gate": (4,), "between": (1,), "between_grad": (1,),
    "inverse": (1,), "scan": tuple(range(33)), "scan_grad": tuple(range(34)), "round": (1,), "diagonal": (1,),
}
_FLAG = (True, False)
READ_AT, PARTS = ("previous", "decayed", "updated"), ("real", "imaginary")
"""Which memory a query of a scan reads; which part of the last one a scan gives that has no query."""
ATTRS: dict[str, dict[str, tuple[Any, ...]]] = {  # kind -> its attributes and their permitted values (any, if none is listed)
    "input": {"name": (), "role": ("token", "head", "carry")}, "map": {"expr": ()}, "matmul": {"ta": _FLAG, "tb": _FLAG},
    "pairs_grad": {"wrt": (0, 1)}, "sum": {"axis": (0, 1)}, "max": {"axis": (0, 1)},
    "cumsum": {"reverse": _FLAG, "exclusive": _FLAG}, "mask": {"strict": _FLAG},
    "form": {"wrt": ("P", "X", "Y"), "strict": _FLAG, "before": _FLAG},
    "form_gate": {"strict": _FLAG, "before": _FLAG}, "between": {"strict": _FLAG, "before": _FLAG},
    "between_grad": {"before": _FLAG}, "scan": {"log": (), "phase": (), "writes": (), "at": (*READ_AT, *PARTS)},
    "scan_grad": {"wrt": (), "log": (), "phase": (), "writes": (), "at": (*READ_AT, *PARTS)},
}


def operand(i: int) -> sympy.Symbol:
    """The symbol that stands for operand `i` in a `map` expression."""
    return sympy.Symbol(f"x{i}", real=True)


def place(symbol: sympy.Expr) -> int:
    """The number of the operand that a symbol stands for."""
    return int(str(symbol)[1:])


@dataclass(frozen=True)
class Op:
    """One single-assignment operation: `%id: (rows, cols) = kind(args){attrs}`."""

    id: int
    dims: Dims
    kind: str
    args: tuple[int, ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()

    def attr(self, key: str) -> Any:
        return dict(self.attrs)[key]

    def __str__(self) -> str:
        attrs = "{" + ", ".join(f"{k}={v}" for k, v in self.attrs) + "}" if self.attrs else ""
        args = ", ".join(f"%{a}" for a in self.args)
        return f"%{self.id}: ({self.dims[0]},{self.dims[1]}) = {self.kind}({args}){attrs}"


@dataclass(frozen=True)
class Carry:
    """A memory handed from chunk to chunk: `inp` before the chunk, `out` after it; reversed in time for cotangents."""

    name: str
    inp: int
    out: int
    reverse: bool = False

    def __str__(self) -> str:
        return f"carry {self.name}: %{self.inp} -> %{self.out}" + (" reverse" if self.reverse else "")


@dataclass(frozen=True)
class Program:
    """One chunk's operations, its carries, its outputs; values that it keeps for another program, and those that it takes from
    one: what they are made of stays to be read, and is not computed. `terms` says which values are what of the declaration, for
    readers: they are no part of what is computed, and not printed."""

    name: str
    ops: tuple[Op, ...]
    carries: tuple[Carry, ...]
    outputs: tuple[tuple[str, int], ...]
    kept: tuple[tuple[str, int], ...] = ()
    taken: tuple[tuple[str, int], ...] = ()
    terms: tuple[tuple[str, int], ...] = field(default=(), compare=False, repr=False)
    index: Mapping[int, Op] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {op.id: op for op in self.ops})

    def __str__(self) -> str:
        lines = [f"program {self.name}", *map(str, self.ops), *map(str, self.carries)]
        lines += [f"output {n} = %{i}" for n, i in self.outputs]
        lines += [f"keep {n} = %{i}" for n, i in self.kept]
        return "\n".join([*lines, *(f"take {n} = %{i}" for n, i in self.taken)])

    def rebuilt(self, ops: Iterable[Op], new: Mapping[int, int]) -> Program:
        """The program of other operations, in which the value i is new[i]; values without a place lose their terms."""
        carries = tuple(Carry(c.name, new[c.inp], new[c.out], c.reverse) for c in self.carries)
        outputs, kept, taken = (tuple((n, new[i]) for n, i in named) for named in (self.outputs, self.kept, self.taken))
        terms = tuple((n, new[i]) for n, i in self.terms if i in new)
        return Program(self.name, tuple(ops), carries, outputs, kept, taken, terms)

    def inputs(self, *roles: str) -> Iterator[Op]:
        """The input operations, of the given roles (all without any)."""
        return (op for op in self.ops if op.kind == "input" and (not roles or op.attr("role") in roles))

    @cached_property
    def counter(self) -> str | None:
        """The memory of one number, if one is read: how many tokens of a block have been when a chunk begins. The valid
        rows of a chunk lie in one block."""
        reverse, read = {c.inp for c in self.carries if c.reverse}, {a for op in self.ops for a in op.args}
        return next((op.attr("name") for op in self.inputs("carry")
                     if op.dims == ("1", "1") and op.id in read and op.id not in reverse), None)

    def ancestors(self, roots: Iterable[int], known: Iterable[int] = ()) -> list[Op]:
        """The operations needed for `roots` when the values `known` are given besides those taken, in program order."""
        have, need, todo = {*known, *(i for _, i in self.taken)}, set[int](), list(roots)
        while todo:
            i = todo.pop()
            if i not in need and i not in have:
                need.add(i)
                todo += self.index[i].args
        return [op for op in self.ops if op.id in need]


class Builder:
    """Appends operations with common subexpressions shared; the only way in which passes make programs."""

    def __init__(self, ops: Iterable[Op] = ()) -> None:
        self.ops: list[Op] = []
        self._seen: dict[tuple[Any, ...], int] = {}
        for op in ops:
            self._append(op)

    def _append(self, op: Op) -> None:
        self.ops.append(op)
        self._seen[(op.dims, op.kind, op.args, op.attrs)] = op.id

    def dims(self, i: int) -> Dims:
        return self.ops[i].dims

    def emit(self, kind: str, dims: Dims, *args: int, **attrs: Any) -> int:
        key = (dims, kind, args, tuple(attrs.items()))
        if key not in self._seen:
            self._append(Op(len(self.ops), dims, kind, args, tuple(attrs.items())))
        return self._seen[key]

    def input(self, name: str, role: str, dims: Dims) -> int:
        return self.emit("input", dims, name=name, role=role)

    def map(self, expr: sympy.Expr | int, *args: int) -> int:
        """Elementwise `expr` of x0, x1, …; operands that do not occur are dropped and equal ones merged."""
        expr = sympy.sympify(expr)
        used: list[int] = []
        subs = {}
        for i, arg in enumerate(args):
            if operand(i) in expr.free_symbols:
                if arg not in used:
                    used.append(arg)
                subs[operand(i)] = sympy.Dummy(f"a{used.index(arg)}", real=True)
        order: dict[int, list[sympy.Symbol]] = {}
        for i, arg in enumerate(args):
            if operand(i) in subs:
                order.setdefault(used.index(arg), []).append(subs[operand(i)])
        expr = expr.xreplace(subs).xreplace({d: operand(n) for n, ds in order.items() for d in ds})
        if len(used) == 1 and expr == operand(0):
            return used[0]
        return self.emit("map", broadcast(*(self.dims(a) for a in used)), *used, expr=expr)

    def add(self, *args: int) -> int:
        """The sum; of more operands than a map takes, in parts."""
        most = KINDS["map"][-1]
        while len(args) > most:
            args = (self.add(*args[:most]), *args[most:])
        return args[0] if len(args) == 1 else self.map(sympy.Add(*(operand(i) for i in range(len(args)))), *args)

    def mul(self, *args: int) -> int:
        return self.map(sympy.Mul(*(operand(i) for i in range(len(args)))), *args)

    def exp(self, a: int) -> int:
        return self.map(exp(operand(0)), a)

    def expand(self, a: int, dims: Dims) -> int:
        return a if self.dims(a) == dims else self.emit("expand", dims, a)

    def transpose(self, a: int) -> int:
        r, c = self.dims(a)
        return self.emit("transpose", (c, r), a)

    def matmul(self, a: int, b: int, ta: bool = False, tb: bool = False) -> int:
        da, db = self.dims(a), self.dims(b)
        if self.ops[a].kind == self.ops[b].kind == "pairs" and tb and not ta:  # (x ⊗ y) · (u ⊗ w) = (x · u) (y · w)
            return self.mul(*(self.matmul(x, u, tb=True) for x, u in zip(self.ops[a].args, self.ops[b].args, strict=True)))
        return self.emit("matmul", (da[1] if ta else da[0], db[0] if tb else db[1]), a, b, ta=ta, tb=tb)

    def pairs(self, a: int, b: int) -> int:
        return self.emit("pairs", (self.dims(a)[0], "F"), a, b)

    def sum(self, a: int, axis: int) -> int:
        r, c = self.dims(a)
        if (r, c)[axis] == "1":
            return a
        if axis == 0 and (x := self.steady(a)) is not None:
            return self.mul(x, self.sum(self._ones(a), axis=0))
        return self.emit("sum", ("1", c) if axis == 0 else (r, "1"), a, axis=axis)

    def reduce_to(self, a: int, dims: Dims) -> int:
        """Sum the dimensions along which a tile of `dims` was broadcast (the adjoint of broadcasting)."""
        for axis in (1, 0):
            if dims[axis] == "1":
                a = self.sum(a, axis)
        return self.expand(a, dims)

    def cumsum(self, a: int, reverse: bool = False, exclusive: bool = False) -> int:
        if (x := self.steady(a)) is not None:
            return self.mul(x, self.cumsum(self._ones(a), reverse, exclusive))
        return self.emit("cumsum", self.dims(a), a, reverse=reverse, exclusive=exclusive)

    def between(self, g: int, strict: bool, before: bool) -> int:
        """D_ij = exp(sum of g over (j, i]), masked: of one number, times how many tokens lie there, the same in every chunk."""
        x = self.steady(g)
        if x is None:
            return self.emit("between", ("T", "T"), g, strict=strict, before=before)
        ones = self.expand(self.map(1), ("T", "1"))
        apart = self.map(relu(operand(0) - operand(1)), self.cumsum(ones, exclusive=before), self.transpose(self.cumsum(ones)))
        return self.mask(self.exp(self.mul(x, apart)), strict)

    def steady(self, a: int) -> int | None:
        """The number of every token there is, where it is one for all of them, and not 1, which counts them."""
        op = self.ops[a]
        op = self.ops[op.args[0]] if op.kind == "valid" else op
        if op.kind != "expand" or op.dims != ("T", "1") or self.dims(op.args[0]) != ("1", "1"):
            return None
        one = self.ops[op.args[0]]
        return None if one.kind == "map" and one.attr("expr") == 1 else one.id

    def _ones(self, a: int) -> int:
        """1 for every token that has the number of a steady value."""
        ones = self.expand(self.map(1), self.dims(a))
        return self.valid(ones) if self.ops[a].kind == "valid" else ones

    def valid(self, a: int) -> int:
        if self.ops[a].kind == "pairs":  # so that it stays one
            return self.pairs(*map(self.valid, self.ops[a].args))
        return self.emit("valid", self.dims(a), a)

    def mask(self, a: int, strict: bool) -> int:
        return self.emit("mask", self.dims(a), a, strict=strict)

    def form(self, wrt: str, strict: bool, before: bool, g: int | None, **args: int) -> int:
        """∂F/∂wrt of the decay form for wrt in P, X, Y, from the other two; simpler operations where g allows them."""
        dims: Dims = ("T", "T") if wrt == "P" else self.dims(args["Y" if wrt == "X" else "X"])
        if g is None:  # no decay: F is a masked bilinear product
            if wrt == "P":
                return self.mask(self.matmul(args["X"], args["Y"], tb=True), strict)
            p = self.mask(args["P"], strict)
            return self.matmul(p, args["Y"]) if wrt == "X" else self.matmul(p, args["X"], ta=True)
        if self.dims(g)[1] == "1":  # a scalar decay factors out of the sum over d
            d = self.between(g, strict, before)
            if wrt == "P":
                return self.mul(self.matmul(args["X"], args["Y"], tb=True), d)
            p = self.mul(args["P"], d)
            return self.matmul(p, args["Y"]) if wrt == "X" else self.matmul(p, args["X"], ta=True)
        rest = tuple(args[n] for n in ("P", "X", "Y") if n != wrt)
        return self.emit("form", dims, *rest, g, wrt=wrt, strict=strict, before=before)

    def solve(self, a: int, b: int, trans: bool = False) -> int:
        """(I + L)⁻¹ B through the shared inverse, so that several right-hand sides and the adjoint pay for it once."""
        inv = self.emit("inverse", ("T", "T"), a)
        return self.matmul(inv, b, ta=trans)



def broadcast(*dims: Dims) -> Dims:
    """The dimensions of an elementwise result; raises `LsmIRError` when two names meet."""
    out = ["1", "1"]
    for d in dims:
        for axis in (0, 1):
            if d[axis] != "1":
                if out[axis] not in ("1", d[axis]):
                    raise LsmIRError(f"cannot broadcast dimension {d[axis]} against {out[axis]}")
                out[axis] = d[axis]
    return (out[0], out[1])


def _fits(result: Dims, *operands: Dims) -> bool:
    """Whether `result` is the broadcast of the operands."""
    try:
        return broadcast(*operands) == result
    except LsmIRError:
        return False


def verify(program: Program) -> Program:
    """Check that a program is well formed: single assignment, known kinds, matching dimensions, carries that close.

    Returns the program; raises `LsmIRError` naming the operation.
    """
    seen: dict[int, Op] = {}
    for op in program.ops:
        def need(ok: bool, why: str, op: Op = op) -> None:
            if not ok:
                raise LsmIRError(f"in program {program.name}, operation\n    {op}\n{why}")

        need(op.id not in seen, f"%{op.id} is assigned twice")
        need(op.kind in KINDS, f"unknown operation {op.kind!r}")
        need(len(op.args) in KINDS[op.kind], f"{op.kind} takes {KINDS[op.kind]} operands")
        need(all(a in seen for a in op.args), "uses a value before it is defined")
        need(all(d in DIMS for d in op.dims), f"dimensions are named {DIMS}")
        attrs, known = dict(op.attrs), ATTRS.get(op.kind, {})
        need(set(attrs) == set(known), f"{op.kind} has the attributes {{{', '.join(known)}}}")
        for key, values in known.items():
            need(not values or attrs[key] in values, f"{key} is one of {', '.join(map(str, values))}")
        a = [seen[x].dims for x in op.args]
        match op.kind:
            case "map":
                expr = op.attr("expr")
                free = {str(s) for s in expr.free_symbols}
                need(free <= {f"x{i}" for i in range(len(a))}, "expression uses an operand that is not there")
                need(_fits(op.dims, *a), "result is not the broadcast of the operands")
            case "matmul":
                inner = a[0][0 if op.attr("ta") else 1], a[1][1 if op.attr("tb") else 0]
                outer = a[0][1 if op.attr("ta") else 0], a[1][0 if op.attr("tb") else 1]
                need(inner[0] == inner[1] and op.dims == outer, "matrix dimensions do not match")
            case "rename":
                need((a[0][0], {a[0][1], op.dims[1]}) == (op.dims[0], {"K", "V"}), "exchanges the columns K and V")
            case "pairs":
                need(a[0] == a[1] and a[0][1] == "K" and op.dims == (a[0][0], "F"), "maps two (·, K) tiles to one over pairs")
            case "pairs_grad":
                need(a == [(op.dims[0], "F"), op.dims] and op.dims[1] == "K", "maps a tile over pairs and one over K to one over K")
            case "sum" | "max":
                want = ("1", a[0][1]) if op.attr("axis") == 0 else (a[0][0], "1")
                need(op.dims == want, "result must lose the summed dimension")
            case "expand":
                need(_fits(op.dims, a[0], op.dims), "cannot expand to these dimensions")
            case "transpose":
                need(op.dims == (a[0][1], a[0][0]), "result must be transposed")
            case "cumsum" | "valid":
                need(op.dims == a[0] and a[0][0] == "T", "works on the rows of a (T, ·) tile")
            case "mask" | "inverse":
                need(op.dims == a[0] == ("T", "T"), "works on (T, T) tiles")
            case "between":
                need(a[0] == ("T", "1") and op.dims == ("T", "T"), "maps (T, 1) to (T, T)")
            case "between_grad":
                need(a[0] == ("T", "T") and op.dims == ("T", "1"), "maps (T, T) to (T, 1)")
            case "scan" | "scan_grad":
                reads, pairs = op.attr("at") in READ_AT, [("T", "K"), ("T", "V")] * op.attr("writes")
                memory = [("K", "V")] * (1 if op.attr("phase") == 0 else 2)
                wanted = [("T", "K")] * reads + [*pairs, *memory, ("T", "1")]
                result = ("T", "V") if reads else ("K", "V")
                need(a[: len(wanted)] == wanted, "operands are a query (if it reads), keys and values, the memory, "
                     "its imaginary part (if it turns), which rows are")
                need(op.kind == "scan" or a[-1] == result, "the last operand is the cotangent")
                need(op.dims == (result if op.kind == "scan" else a[op.attr("wrt")]), "result has the wrong dimensions")
            case "form" | "form_gate":
                given = "PXY".replace(op.attr("wrt"), "") if op.kind == "form" else "PXY"
                wide = a[-1]
                need(wide in (("T", "K"), ("T", "V")), "the decay is a (T, K) or (T, V) tile")
                need(all(x == (("T", "T") if n == "P" else wide) for n, x in zip(given, a)),
                     f"{', '.join(given)} are a (T, T) tile for P and tiles like the decay for X and Y")
                need(op.dims == (("T", "T") if op.kind == "form" and op.attr("wrt") == "P" else wide),
                     "the result has the dimensions of what it is derived by")
        seen[op.id] = op
    for c in program.carries:
        where = f"in program {program.name}, {c}:"
        if c.inp not in seen or c.out not in seen:
            raise LsmIRError(f"{where} uses a value that is not defined")
        if dict(seen[c.inp].attrs).get("role") != "carry":
            raise LsmIRError(f"{where} the memory before the chunk is an input with role=carry")
        if seen[c.inp].dims != seen[c.out].dims:
            raise LsmIRError(f"{where} the memory changes its dimensions")
    for kind, ends in (("output", program.outputs), ("keep", program.kept), ("take", program.taken)):
        for name, i in ends:
            if i not in seen:
                raise LsmIRError(f"in program {program.name}, {kind} {name} is undefined")
    for kind, names in (("carry", [c.name for c in program.carries]), ("output", [n for n, _ in program.outputs]),
                        ("keep", [n for n, _ in program.kept]), ("take", [n for n, _ in program.taken])):
        for name in names:
            if names.count(name) > 1:
                raise LsmIRError(f"in program {program.name}, {kind} {name} is there twice")
    return program


def prune(program: Program) -> Program:
    """Drop operations that nothing which leaves the program needs, and number the rest from 0: equal programs print equally."""
    ends = [i for _, i in (*program.outputs, *program.kept, *program.taken)]
    whole = replace(program, taken=())  # with what is taken, what it is made of
    live = whole.ancestors([*ends, *(i for c in program.carries for i in (c.out, c.inp))])
    new = {op.id: n for n, op in enumerate(live)}
    return program.rebuilt((Op(new[o.id], o.dims, o.kind, tuple(new[a] for a in o.args), o.attrs) for o in live), new)


@dataclass(frozen=True)
class Scanned:
    """The operands of a `scan`: the query, keys and values in turn, the memory and its imaginary part, which rows there are,
    what `log` and `phase` are of."""

    query: int | None
    pairs: tuple[int, ...]
    memory: int
    imaginary: int | None
    rows: int
    fields: tuple[int, ...]

    @classmethod
    def of(cls, op: Op) -> Scanned:
        first, two = int(op.attr("at") in READ_AT), int(op.attr("phase") != 0)
        last = first + 2 * op.attr("writes")
        fields = op.args[last + 2 + two : len(op.args) - (op.kind != "scan")]
        return cls(op.args[0] if first else None, op.args[first:last], op.args[last], op.args[last + 1] if two else None,
                   op.args[last + 1 + two], fields)


_OP = re.compile(r"%(\d+): \((\w),(\w)\) = (\w+)\(((?:%\d+(?:, ?%\d+)*)?)\)(?:\{(.*)\})?$")
_ATOM = re.compile(r"(\w+)=(.*)")
_SAFE = re.compile(r"[\w\s.+\-*/(),]*$")


def parse(text: str) -> Program:
    """Read what `str(program)` prints; `LsmIRError` names the line that cannot be read."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines or not lines[0].startswith("program "):
        raise LsmIRError("a program starts with 'program NAME'")
    ops: list[Op] = []
    carries: list[Carry] = []
    ends: dict[str, list[tuple[str, int]]] = {"output": [], "keep": [], "take": []}
    for line in lines[1:]:
        if m := _OP.match(line):
            args = tuple(map(int, re.findall(r"\d+", m[5])))
            ops.append(Op(int(m[1]), (m[2], m[3]), m[4], args, _parse_attrs(m[6] or "", line)))
        elif m := re.match(r"carry (\w+): %(\d+) -> %(\d+)( reverse)?$", line):
            carries.append(Carry(m[1], int(m[2]), int(m[3]), bool(m[4])))
        elif m := re.match(r"(output|keep|take) (\w+) = %(\d+)$", line):
            ends[m[1]].append((m[2], int(m[3])))
        else:
            raise LsmIRError(f"cannot read this line of the program:\n    {line}")
    return verify(Program(lines[0].split()[1], tuple(ops), tuple(carries), *map(tuple, ends.values())))


def _parse_attrs(text: str, line: str) -> tuple[tuple[str, Any], ...]:
    if text.startswith("expr="):
        return (("expr", parse_expr(text[5:], line)),)
    out: list[tuple[str, Any]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        m = _ATOM.match(part)
        if not m:
            raise LsmIRError(f"cannot read the attribute {part!r} in\n    {line}")
        value: Any = {"True": True, "False": False}.get(m[2], int(m[2]) if m[2].isdigit() else m[2])
        out.append((m[1], parse_expr(m[2], line) if m[1] in ("log", "phase") else value))
    return tuple(out)


def parse_expr(text: str, line: str = "") -> sympy.Expr:
    """An elementwise expression from text made of numbers, x0…, + - * / ** and the functions of `lsmc.functions`."""
    names = set(re.findall(r"[A-Za-z_]\w*", text))
    table = {name: spec.cls for name, spec in FUNCTIONS.items()} | {"sqrt": sympy.sqrt}
    scope: dict[str, Any] = {**table, **{f"x{i}": operand(i) for i in range(16)}}
    unknown = {n for n in names if n not in scope}
    if unknown or not _SAFE.match(text):
        raise LsmIRError(f"unknown name {sorted(unknown)} in expression {text!r} of\n    {line}")
    try:
        with distribute(False):  # c*(a + b) is what was printed, not c*a + c*b
            expr = sympy.parse_expr(text, local_dict=scope)
    except (SyntaxError, TypeError, ValueError, AttributeError, IndexError, TokenError):
        expr = None
    if not isinstance(expr, sympy.Expr):
        raise LsmIRError(f"{text!r} is no expression, in\n    {line}")
    return expr
