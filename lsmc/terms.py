"""What users write: symbolic scalars, vectors and memories with `+ - * / ** @`, and the declared inputs.

Dims are checked where an operator is applied, so that a mistake is reported at the user's own line. A `Term` holds
one sympy expression of `lsmc.expr`.
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
from typing import Any, ClassVar, Literal, get_args

import sympy

from lsmc.errors import (
    LsmCausalityError,
    LsmDeclarationError,
    LsmDelayError,
    LsmDimsError,
    LsmNameError,
    LsmUnknownSymbolError,
    LsmUpdateError,
    Where,
    here,
)
from lsmc.expr import (
    BIAS,
    DIM_SYMBOL,
    DIMS,
    KV,
    MEMORIES,
    MEMORY,
    NORMALIZER,
    Dim,
    Field,
    K,
    Max,
    Over,
    Sum,
    V,
    contract,
    dims_of,
    number,
    rows_of,
    show,
    show_dims,
)
from lsmc.functions import Abs

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,63}")
# names that generated code, the operator's signature or the printed program use for themselves
_RESERVED = frozenset(
    "M Z B T H HV K V C N S o out output scale state initial_state final_state return_final_state cu_seqlens chunk schedule "
    "Mb M0 Mb0 Mt "
    "dtype device self step reference torch tl triton math sympy lsmc libdevice constexpr inf nan grid num_warps num_stages "
    "num_ctas num_consumer_groups maxnreg warmup stride autotune eye outer grad diag".split()
)
_INTERNAL = re.compile(r"[RYN][0-9]+")  # reads, queries and normaliser queries of the canonical form


def check_name(name: object, where: Where | None, *, what: str = "input") -> str:
    """`name` if it may be used for a declared input (or, with what="method", for a method); else raises
    LsmNameError.

    Legal: a letter, then letters, digits and underscores, 64 characters at most; no Python keyword or
    builtin; no name that the compiler uses itself (M, T, scale, state, R0, …).
    """
    rule = "names are a letter followed by letters, digits or underscores, 64 at most"
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise LsmNameError(
            f"{what} name {name!r} is not safe: {rule}", where=where, help="rename it, for example 'g1'"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise LsmNameError(
            f"{what} name {name!r} is a Python keyword", where=where, help=f"use {name + '1'!r}"
        )
    if what == "input" and (name in _RESERVED or hasattr(builtins, name) or _INTERNAL.fullmatch(name)):
        raise LsmNameError(
            f"input name {name!r} is reserved by the compiler", where=where, help=f"use {name + '_in'!r}"
        )
    return name


#


# --- what users write


class Term:
    """A symbolic scalar (dims ()), vector (dims (K,) or (V,)) or memory-sized matrix (dims (K, V)) of one
    token and head.

    ``a + b``, ``a * b``, … are elementwise; one operand's dims must contain the other's (a scalar or
    vector broadcasts). ``x @ M`` reads the memory with the row vector x over K and gives a vector over V;
    ``x @ y`` of two vectors over the same dim is their dot product.  ``x[0]`` is x; other indices are
    errors, because a step sees one token and the memory.

    Raises LsmDimsError where dims do not fit, LsmUnknownSymbolError for strings and foreign symbols,
    LsmCausalityError for ``x[1]`` and ``x.next``.
    """

    __slots__ = ("_expr", "_where")
    _expr: sympy.Expr
    _where: Where | None
    __array_ufunc__ = None
    __iter__: ClassVar[None] = None

    def __init__(self, expr: sympy.Expr, where: Where | None = None) -> None:
        object.__setattr__(self, "_expr", expr)
        object.__setattr__(self, "_where", where)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    @property
    def expr(self) -> sympy.Expr:
        """The sympy expression."""
        return self._expr

    @property
    def where(self) -> Where | None:
        """Where in the user's source it was made."""
        return self._where

    @property
    def dims(self) -> frozenset[str]:
        """The named dims it varies over."""
        return dims_of(self.expr)

    def __repr__(self) -> str:
        return show(self.expr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Term) and self.expr == other.expr

    def __hash__(self) -> int:
        return hash((Term, self.expr))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.expr,)

    def __getattr__(self, name: str) -> Any:
        if name == "next":
            raise LsmCausalityError(
                f"{self!r} of the next token: a step sees its own token and the memory of earlier ones", where=here(),
                help="shift the tensor itself before the call if the task is not causal",
            )  # fmt: skip
        if name.startswith("_"):
            raise AttributeError(name)
        raise LsmUnknownSymbolError(f"{self!r} has no {name!r}", where=here(), help=self._members())

    def _members(self) -> str:
        return "terms have +, -, *, /, ** and @; functions are lsmc.exp, lsmc.sigmoid, …"

    def __getitem__(self, index: object) -> Term:
        where = here()
        where = where.at("index") if where else None
        if isinstance(index, int) and not isinstance(index, bool):
            if index == 0:
                return self
            if index > 0:
                raise LsmCausalityError(
                    f"{self!r}[{index:+d}] is {index} token(s) in the future: a step sees its own token and the memory",
                    where=where, help=f"use {self!r}, or shift the tensor before the call if the task is not causal",
                )  # fmt: skip
            raise LsmDelayError(
                f"{self!r}[{index}] is {-index} token(s) in the past: a step sees earlier tokens only through the memory",
                where=where, help=f"shift the tensor before the call and declare it as an input of its own, for example "
                f'vector("{self!r}_previous")',
            )  # fmt: skip
        raise LsmDeclarationError(f"{self!r}[{index!r}]: only token offsets are indices", where=where)

    # -- elementwise

    def _elementwise(self, other: object, apply: Any, *, swap: bool = False) -> Term:
        where = here()
        peer = as_term(other, where, "left" if swap else "right")
        a, b = (peer, self) if swap else (self, peer)
        if not (a.dims <= b.dims or b.dims <= a.dims):
            raise LsmDimsError(
                f"{b!r} has dims {show_dims(b.dims)}; {a!r} has dims {show_dims(a.dims)}",
                where=where.at("right") if where else None,
                help="outer(k, v) makes a (K, V) matrix of a vector over K and one over V; x @ y contracts",
            )
        _same_rows(a, b, where)
        return Term(apply(a.expr, b.expr), where)

    def __add__(self, other: object) -> Term:
        return NotImplemented if isinstance(other, Operator) else self._elementwise(other, lambda a, b: a + b)

    def __radd__(self, other: object) -> Term:
        return self._elementwise(other, lambda a, b: a + b, swap=True)

    def __sub__(self, other: object) -> Term:
        return NotImplemented if isinstance(other, Operator) else self._elementwise(other, lambda a, b: a - b)

    def __rsub__(self, other: object) -> Term:
        return self._elementwise(other, lambda a, b: a - b, swap=True)

    def __mul__(self, other: object) -> Term:
        return NotImplemented if isinstance(other, Operator) else self._elementwise(other, lambda a, b: a * b)

    def __rmul__(self, other: object) -> Term:
        return self._elementwise(other, lambda a, b: a * b, swap=True)

    def __truediv__(self, other: object) -> Term:
        return self._elementwise(other, lambda a, b: a / b)

    def __rtruediv__(self, other: object) -> Term:
        return self._elementwise(other, lambda a, b: a / b, swap=True)

    def __pow__(self, other: object) -> Term:
        where = here()
        if isinstance(other, bool) or not isinstance(other, int | float):
            raise LsmDeclarationError(
                f"the exponent of {self!r} is {other!r}; exponents are numbers", where=where.at("right") if where else None,
                help="write exp(b * log(a)) for a power that varies",
            )  # fmt: skip
        return Term(self.expr ** number(other), where)

    def __neg__(self) -> Term:
        return Term(-self.expr, here())

    def __pos__(self) -> Term:
        return self

    def __abs__(self) -> Term:
        return Term(Abs(self.expr), here())

    # -- contraction

    def __matmul__(self, other: object) -> Term:
        if isinstance(other, Operator):
            return NotImplemented
        where = here()
        return _matmul(self, as_term(other, where, "right"), where)

    def __rmatmul__(self, other: object) -> Term:
        where = here()
        return _matmul(as_term(other, where, "left"), self, where)


def _matmul(a: Term, b: Term, where: Where | None) -> Term:
    pair = (a.dims, b.dims)
    _same_rows(a, b, where)
    if pair in ((K, K), (K, KV)):
        return Term(contract("K", a.expr * b.expr), where)
    if pair == (V, V):
        return Term(contract("V", a.expr * b.expr), where)
    shown = f"{a!r} @ {b!r}: dims {show_dims(a.dims)} @ {show_dims(b.dims)}"
    if b.dims == KV:
        rule, side = (
            f"{shown}; the memory is read by a row vector over (K,), and {a!r} has dims {show_dims(a.dims)}",
            "left",
        )
        way = (
            f'declare it with vector("{a!r}", over="K")'
            if a.dims == V and isinstance(a.expr, Field)
            else "read with q or k"
        )
    elif a.dims == KV:
        rule, side, way = (
            f"{shown}; the memory is read by a row vector from the left",
            "right",
            "write x @ M with x over K",
        )
    elif a.dims and b.dims:
        rule, side, way = (
            f"{shown}; a dot product needs two vectors over one dim",
            "right",
            "outer(k, v) is the product kᵀv",
        )
    else:
        rule, side, way = (
            f"{shown}; @ contracts vectors",
            "left" if not a.dims else "right",
            "write * to scale",
        )
    raise LsmDimsError(rule, where=where.at(side) if where else None, help=way)


def _same_rows(a: Term, b: Term, where: Where | None) -> None:
    if len(rows_of(a.expr) | rows_of(b.expr)) > 1:
        raise LsmDimsError(f"{a!r} and {b!r}: one of them runs over K, the other over the K·K pairs of pairs(…)", where=where,
                           help="take pairs of both")  # fmt: skip


def as_term(value: object, where: Where | None, operand: str | int | None = None) -> Term:
    """`value` as a Term: a Term itself or a finite number.  Strings and foreign symbols are unknown
    symbols."""
    if isinstance(value, Term):
        return value
    spot = where.at(operand) if where is not None and operand is not None else where
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise LsmDeclarationError(f"{value} is no finite number", where=spot)
        return Term(number(value), where)
    if isinstance(value, sympy.Number):
        return Term(number(value), where)
    if isinstance(value, str | sympy.Basic):
        shown = str(value)
        way = (
            f'scalar("{shown}") or vector("{shown}")'
            if _NAME.fullmatch(shown)
            else 'scalar("name") or vector("name")'
        )
        raise LsmUnknownSymbolError(
            f"unknown symbol {shown!r}: nobody declared it", where=spot, help=f"declare it: {way}"
        )
    if isinstance(value, Operator):
        raise LsmDimsError(
            f"{value!r} is a (K, K) operator; it acts on the memory from the left",
            where=spot,
            help="write (…) @ M.decayed",
        )
    raise LsmDeclarationError(
        f"{type(value).__name__} {_short(value)} is no term",
        where=spot,
        help="use M, q, k, v, scalar(…), vector(…) and numbers",
    )


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


class Memory(Term):
    """The memory M ∈ R^{K×V}, its normaliser Z ∈ R^K, or its bias Mb ∈ R^V.

    `M`             in an update the memory M_{s-1} before this step's decay; in a readout the updated
    memory M_s
    `M.previous`    M_{s-1}
    `M.decayed`     D_s(M_{s-1}), after this step's decay and before the write
    `M.normalizer`  Z: the memory that the same recurrence makes of v = 1 (readouts only); q @ M.normalizer
    is a scalar
    `M.bias`        Mb: the memory that the same recurrence makes of keys 1, a row beside those of M; q @ M + M.bias is over V
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, (self.expr,)

    def _at(self, at: str) -> Memory:
        table = next(table for table in (MEMORY, NORMALIZER, BIAS) if self.expr in table.values())
        return Memory(table[at], here())

    @property
    def previous(self) -> Memory:
        """M_{s-1}, before this step."""
        return self._at("previous")

    @property
    def decayed(self) -> Memory:
        """D_s(M_{s-1}), after this step's decay and before the write."""
        return self._at("decayed")

    @property
    def normalizer(self) -> Memory:
        """Z ∈ R^K: the same recurrence with v = 1."""
        return self._beside(NORMALIZER)

    @property
    def bias(self) -> Memory:
        """Mb ∈ R^V: the same recurrence with keys 1."""
        return self._beside(BIAS)

    def _beside(self, table: dict[str, Field]) -> Memory:
        at = next((at for at, field in MEMORY.items() if field == self.expr), "current")
        return Memory(table[at], here())

    def _members(self) -> str:
        return "the memory has M.previous, M.decayed, M.normalizer and M.bias"


class Operator:
    """A (K, K) operator diag(d) + Σᵢ aᵢᵀ bᵢ on the memory, such as ``eye - beta * outer(k, k)``.

    ``op @ M`` is d ⊙ M + Σᵢ aᵢᵀ (bᵢ M);  ``x @ op`` is x ⊙ d + Σᵢ (x·aᵢ) bᵢ.  Operators add, scale and
    compose.
    """

    __slots__ = ("diagonal", "pairs", "where")
    __array_ufunc__ = None

    def __init__(
        self,
        diagonal: sympy.Expr,
        pairs: tuple[tuple[sympy.Expr, sympy.Expr], ...] = (),
        where: Where | None = None,
    ) -> None:
        self.diagonal = diagonal
        self.pairs = pairs
        self.where = where

    def __repr__(self) -> str:
        parts = (
            [] if self.diagonal.is_zero else [f"diag({show(self.diagonal)})" if self.diagonal != 1 else "eye"]
        )
        return " + ".join([*parts, *(f"outer({show(a)}, {show(b)})" for a, b in self.pairs)]) or "0"

    def _peer(self, other: object, where: Where | None, side: str) -> Operator:
        if isinstance(other, Operator):
            return other
        term = as_term(other, where, side)
        raise LsmDimsError(
            f"{term!r} with dims {show_dims(term.dims)} does not add to the (K, K) operator {self!r}",
            where=where.at(side) if where else None, help="eye is the identity: eye - beta * outer(k, k)",
        )  # fmt: skip

    def __add__(self, other: object) -> Operator:
        where = here()
        peer = self._peer(other, where, "right")
        return Operator(self.diagonal + peer.diagonal, self.pairs + peer.pairs, where)

    def __radd__(self, other: object) -> Operator:
        return self._peer(other, here(), "left") + self

    def __neg__(self) -> Operator:
        return Operator(-self.diagonal, tuple((-a, b) for a, b in self.pairs), here())

    def __sub__(self, other: object) -> Operator:
        return self + -self._peer(other, here(), "right")

    def __rsub__(self, other: object) -> Operator:
        return self._peer(other, here(), "left") - self

    def __mul__(self, other: object) -> Operator:
        where = here()
        term = as_term(other, where, "right")
        if term.dims:
            raise LsmDimsError(
                f"{term!r} with dims {show_dims(term.dims)} does not scale a (K, K) operator",
                where=where.at("right") if where else None, help="use diag(x) @ … for a row scaling",
            )  # fmt: skip
        return Operator(self.diagonal * term.expr, tuple((a * term.expr, b) for a, b in self.pairs), where)

    __rmul__ = __mul__

    def __truediv__(self, other: object) -> Operator:
        return self * (1 / as_term(other, here(), "right"))

    def __matmul__(self, other: object) -> Any:
        where = here()
        if isinstance(other, Operator):  # (d + Σ aᵀb)(e + Σ cᵀf) = de + Σ (dc)ᵀf + Σ aᵀ(be) + Σ (b·c) aᵀf
            pairs = [(self.diagonal * a, b) for a, b in other.pairs] + [
                (a, b * other.diagonal) for a, b in self.pairs
            ]
            pairs += [(a * contract("K", b * c), f) for a, b in self.pairs for c, f in other.pairs]
            return Operator(self.diagonal * other.diagonal, tuple(pairs), where)
        term = as_term(other, where, "right")
        if "K" not in term.dims:
            raise LsmDimsError(
                f"the (K, K) operator {self!r} acts on the memory; {term!r} has dims {show_dims(term.dims)}",
                where=where.at("right") if where else None, help="write (…) @ M.decayed",
            )  # fmt: skip
        return Term(
            sympy.Add(self.diagonal * term.expr, *(a * contract("K", b * term.expr) for a, b in self.pairs)),
            where,
        )

    def __rmatmul__(self, other: object) -> Term:
        where = here()
        term = as_term(other, where, "left")
        if term.dims != K:
            raise LsmDimsError(
                f"{term!r} has dims {show_dims(term.dims)}; a (K, K) operator is applied to a row vector over (K,)",
                where=where.at("left") if where else None,
            )  # fmt: skip
        return Term(
            sympy.Add(term.expr * self.diagonal, *(contract("K", term.expr * a) * b for a, b in self.pairs)),
            where,
        )


# --- declared inputs


Per = Literal["token", "head", "layer"]


def scalar(name: str, *, per: Per = "token") -> Term:
    """A declared scalar input: shape (B, T, HV), (HV,) with per="head", or () with per="layer".  Raises
    LsmNameError for an unsafe name."""
    where = here()
    return Term(Field(_declared(name, where), (), _per(per, where)), where)


def vector(name: str, *, over: Dim = "K", per: Per = "token") -> Term:
    """A declared vector input over K or V: shape (B, T, HV, K), (HV, K) with per="head", or (K,) with
    per="layer".  Raises LsmNameError."""
    where = here()
    if over not in DIMS:
        raise LsmDimsError(
            f"over={over!r}: a vector runs over 'K' or 'V'", where=where.at("over") if where else None,
            help='vector("g", over="K")',
        )  # fmt: skip
    return Term(Field(_declared(name, where), (over,), _per(per, where)), where)


def matrix(name: str, *, per: Per = "token") -> Term:
    """A declared matrix input over (K, V): shape (B, T, HV, K, V), (HV, K, V) with per="head", or (K, V) with
    per="layer".  Raises LsmNameError."""
    where = here()
    return Term(Field(_declared(name, where), DIMS, _per(per, where)), where)


def _declared(name: str, where: Where | None) -> str:
    spot = where.at(0) if where else None
    if name in ("q", "k", "v"):
        raise LsmNameError(f"{name!r} is a standard input", where=spot, help=f"from lsmc import {name}")
    return check_name(name, spot)


def _per(per: Per, where: Where | None) -> Per:
    if per in get_args(Per):
        return per
    raise LsmDeclarationError(
        f"per={per!r}: inputs are per 'token', per 'head' or per 'layer'", where=where.at("per") if where else None
    )


M = Memory(MEMORY["current"])
q = Term(Field("q", ("K",), heads="H"))
k = Term(Field("k", ("K",), heads="H"))
v = Term(Field("v", ("V",)))
eye = Operator(sympy.S.One)
STANDARD: tuple[Field, ...] = tuple(term.expr for term in (q, k, v))
"""The standard inputs: q, k (B, T, H, K) and v (B, T, HV, V)."""


# --- constructors


def outer(a: object, b: object) -> Any:
    """kᵀv: a (K, V) matrix of a vector over K and a vector over V;  outer(k, k) is a (K, K) operator for
    ``(…) @ M``."""
    where = here()
    left, right = as_term(a, where, 0), as_term(b, where, 1)
    if left.dims == K and right.dims == V:
        return Term(left.expr * right.expr, where)
    if left.dims == K and right.dims == K:
        return Operator(sympy.S.Zero, ((left.expr, right.expr),), where)
    bad, term = (0, left) if left.dims != K else (1, right)
    want = "(K,)" if bad == 0 else "(V,)"
    raise LsmDimsError(
        f"{term!r} has dims {show_dims(term.dims)}; the {'first' if bad == 0 else 'second'} argument of outer has dims {want}",
        where=where.at(bad) if where else None, help="outer(key over K, value over V), as in outer(k, v)",
    )  # fmt: skip


def over(x: object, dim: Dim) -> Term:
    """The numbers of a vector over K as a vector over V (dim="V"), or the other way round, in methods whose K = V.

    Takes inputs and functions of them: ``over(k, "V") - v``. Calls whose sizes differ raise LsmShapeError.
    """
    where = here()
    term = as_term(x, where, 0)
    if term.dims | {dim} != KV or len(term.dims) != 1 or rows_of(term.expr) == {"F"}:
        raise LsmDimsError(f"{term!r} has dims {show_dims(term.dims)}; over(…, {dim!r}) takes a vector over the other dim",
                           where=where.at(0) if where else None, help='over(k, "V"), over(v, "K")')  # fmt: skip
    if term.expr.free_symbols & MEMORIES:
        raise LsmUpdateError(f"over(…) of {term!r}, which is read from the memory", where=where.at(0) if where else None,
                             help="take over(…) of inputs")  # fmt: skip
    return Term(Over(DIM_SYMBOL[dim], term.expr), where)


def diag(x: object) -> Operator:
    """The (K, K) operator diag(x) of a vector over K: ``diag(x) @ M`` scales the rows of M."""
    where = here()
    term = as_term(x, where, 0)
    if term.dims != K:
        raise LsmDimsError(f"{term!r} has dims {show_dims(term.dims)}; diag takes a vector over (K,)",
                           where=where.at(0) if where else None)  # fmt: skip
    return Operator(term.expr, (), where)


def total(x: object) -> Term:
    """Σᵢ xᵢ over the only dim of a vector."""
    where = here()
    term, dim = vector_of(x, where, "total")
    return Term(contract(dim, term.expr), where)


def norm2(x: object) -> Term:
    """‖x‖² = Σᵢ xᵢ² of a vector over K or over V."""
    where = here()
    term, dim = vector_of(x, where, "norm2")
    return Term(Sum(DIM_SYMBOL[dim], term.expr**2), where)


def vector_of(x: object, where: Where | None, name: str) -> tuple[Term, str]:
    """`x` as a term over exactly one dim, and that dim; LsmDimsError in the name of the function `name`
    otherwise."""
    term = as_term(x, where, 0)
    if len(term.dims) != 1:
        raise LsmDimsError(
            f"{term!r} has dims {show_dims(term.dims)}; {name} takes a vector over one dim",
            where=where.at(0) if where else None,
        )
    if rows_of(term.expr) == {"F"}:
        raise LsmDimsError(f"{term!r} runs over the pairs of K; {name} takes a vector over K or V",
                           where=where.at(0) if where else None, help=f"take pairs of {name}(…)")  # fmt: skip
    return term, next(iter(term.dims))


def grad(loss: object, memory: Term) -> Term:
    """∇_M ℓ: the gradient of a scalar loss ℓ(x·M, …) with respect to the memory, a (K, V) term, by
    symbolic differentiation.

    `memory` is M, M.previous or M.decayed: the point at which the gradient is taken is where the loss
    reads it. ∇_M ½‖kM − v‖² = kᵀ(kM − v): gradient descent on the reconstruction loss is the delta rule.
    Raises LsmDimsError when the loss is not scalar, LsmUpdateError when it does not depend on `memory`.
    """
    where = here()
    term = as_term(loss, where, 0)
    if term.dims:
        raise LsmDimsError(
            f"the loss {term!r} has dims {show_dims(term.dims)}; a gradient needs a scalar", where=where.at(0) if where else None,
            help="norm2(x) is ‖x‖², total(x) is Σᵢ xᵢ",
        )  # fmt: skip
    if not isinstance(memory, Memory) or memory.expr not in MEMORY.values():
        raise LsmDeclarationError(
            f"grad is taken with respect to the memory, not {_short(memory)}", where=where.at(1) if where else None,
            help="grad(loss, M), grad(loss, M.decayed)",
        )  # fmt: skip
    if memory.expr not in term.expr.free_symbols:
        others = sorted(str(s) for s in term.expr.free_symbols & MEMORIES)
        raise LsmUpdateError(
            f"the loss does not depend on {memory!r}" + (f"; it reads {', '.join(others)}" if others else ""),
            where=where.at(0) if where else None, help=f"take the gradient with respect to {others[0]}" if others else None,
        )  # fmt: skip
    return Term(vjp(term.expr, sympy.S.One, memory.expr), where)


def vjp(expr: sympy.Expr, cotangent: sympy.Expr, x: Field) -> sympy.Expr:
    """The cotangent of `x` when `expr` has cotangent `cotangent`: reverse mode through elementwise
    functions and sums."""
    outermost: dict[Sum, Field] = {}

    def hide(node: sympy.Expr) -> sympy.Expr:
        if isinstance(node, Sum):
            if node not in outermost:
                outermost[node] = Field(f"_{len(outermost)}", [d for d in DIMS if d in dims_of(node)])
            return outermost[node]
        return node.func(*map(hide, node.args)) if node.args else node

    local = hide(expr)
    shown = {symbol: node for node, symbol in outermost.items()}

    def pull(symbol: Field) -> sympy.Expr:
        # where the symbol was broadcast, its cotangent is summed over the dims it lacks
        part = cotangent * sympy.diff(local, symbol).xreplace(shown)
        for dim in DIMS:
            if dim in dims_of(expr) - frozenset(symbol.dims):
                part = contract(dim, part)
        return part

    result = pull(x) if x in local.free_symbols else sympy.S.Zero
    for node, symbol in outermost.items():
        if isinstance(node, Max) or x not in node.free_symbols:
            continue
        part = pull(symbol)
        if node.dim not in dims_of(node.body):
            part = part * Sum(DIM_SYMBOL[node.dim], sympy.S.One)
        result = result + vjp(node.body, part, x)
    return result
