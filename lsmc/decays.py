"""The decay types of a declaration: what happens to the memory before a step writes to it.

    Identity()          D(M) = M
    Constant("log_a")   D(M) = e^{log_a} M            log_a (HV,), ≤ 0, the same for every token
    Scalar("g")         D(M) = e^g M                  g (B, T, HV), ≤ 0
    Vector("g")         D(M) = diag(e^g) M            g (B, T, HV, K), ≤ 0;  over="V": M diag(e^g), g (B,
    T, HV, V)
    Matrix("A")         D(M) = e^A ⊙ M                A (B, T, HV, K, V), ≤ 0
    Rotation("theta")   D(M) = diag(e^{iθ}) M         theta (B, T, HV, K), any angles; the memory is complex; of an
    expression over (K, V): D(M) = e^{iθ} ⊙ M

The argument is the name of an input or an expression of the *log* decay:
``Scalar(-softplus(scalar("f")))``; a decay given as a factor a in (0, 1] is ``log(a)``:
``Matrix(log(matrix("A")))``.  Decays multiply: ``Vector("gk") * Vector("gv", over="V")``. (Legend of Table
1 of Linear-MoE, arXiv 2503.05447.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from lsmc.errors import LsmDecayError, LsmDeclarationError, LsmDimsError, Where, here
from lsmc.expr import KV, MEMORIES, Dim, Field, show, show_dims
from lsmc.expr import K as OVER_K
from lsmc.expr import V as OVER_V
from lsmc.terms import Memory, Per, Term, as_term, matrix, scalar, vector

Default = Callable[[int], list[float]]
"""The values of a per-head input for HV heads, when the caller does not pass it."""


class Decay:
    """A log decay in up to four parts: D(M) = e^{k + i phase} ⊙ M ⊙ e^{v} ⊙ e^{kv}, each part None when absent.

    log_k    dims () or (K,)    log_v   dims (V,)    log_kv   dims (K, V)    phase   dims (), (K,) or (K, V)
    defaults   per-head inputs that a call may omit, as functions of the number of heads
    """

    __slots__ = ("_content", "log_k", "log_v", "log_kv", "phase", "defaults", "where")

    _content: tuple[object, ...]
    log_k: sympy.Expr | None
    log_v: sympy.Expr | None
    log_kv: sympy.Expr | None
    phase: sympy.Expr | None
    defaults: Mapping[str, Default]
    where: Where | None

    def __init__(
        self,
        log_k: sympy.Expr | None = None,
        log_v: sympy.Expr | None = None,
        log_kv: sympy.Expr | None = None,
        defaults: Mapping[str, Default] | None = None,
        where: Where | None = None,
        phase: sympy.Expr | None = None,
    ) -> None:
        for name, value in (("log_k", log_k), ("log_v", log_v), ("log_kv", log_kv), ("phase", phase), ("where", where)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "defaults", dict(defaults or {}))
        object.__setattr__(self, "_content", (*self.parts, tuple(sorted(self.defaults))))

    @property
    def parts(self) -> tuple[sympy.Expr | None, ...]:
        """log_k, log_v, log_kv, phase."""
        return self.log_k, self.log_v, self.log_kv, self.phase

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("decays are immutable")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decay) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __reduce__(self) -> tuple[Any, ...]:
        return Decay, (self.log_k, self.log_v, self.log_kv, dict(self.defaults), None, self.phase)

    def __mul__(self, other: object) -> Decay:
        where = here()
        if not isinstance(other, Decay):
            raise LsmDeclarationError(
                f"a decay times {other!r}: decays multiply with decays", where=where.at("right") if where else None,
                help="scale the log decay inside: Scalar(c * scalar('g'))",
            )  # fmt: skip

        def add(a: sympy.Expr | None, b: sympy.Expr | None) -> sympy.Expr | None:
            return b if a is None else a if b is None else a + b

        return Decay(
            add(self.log_k, other.log_k), add(self.log_v, other.log_v), add(self.log_kv, other.log_kv),
            {**self.defaults, **other.defaults}, where, add(self.phase, other.phase),
        )  # fmt: skip

    def __rmul__(self, other: object) -> Decay:
        where = here()
        raise LsmDeclarationError(
            f"{other!r} times a decay: decays multiply with decays", where=where.at("left") if where else None,
            help='the memory of the update is already decayed: write update=outer(k, v), or use M.decayed',
        )  # fmt: skip

    def __repr__(self) -> str:
        shown = [show(part) for part in (self.log_k, self.log_v, self.log_kv) if part is not None]
        shown += [] if self.phase is None else [f"i ({show(self.phase)})"]
        return "Identity()" if not shown else "decay exp(" + ") * exp(".join(shown) + ")"


class Identity(Decay):
    """No decay: D(M) = M."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(where=here())


class Constant(Decay):
    """D(M) = e^{log_a} M with log_a (HV,) ≤ 0, one number per head and the same for every token.

    `log_a` is the name of an input, an expression of per-head inputs, or a number.  `default` is the value
    when a call omits a named input: a number, or a function of the number of heads giving one number per
    head. Raises LsmDecayError when the number or the default is positive.
    """

    __slots__ = ()

    def __init__(
        self, log_a: str | float | Term, *, default: float | Callable[..., list[float]] | None = None
    ) -> None:
        where = here()
        defaults: dict[str, Default] = {}
        if isinstance(log_a, str):
            term = scalar(log_a, per="head")
            if default is not None:
                defaults[log_a] = _default(log_a, default, where)
        else:
            term = _log_decay(log_a, where, "log_a")
            if default is not None:
                raise LsmDeclarationError(
                    "default= belongs to a named input", where=where, help='Constant("log_a", default=...)'
                )
        _need(term, (frozenset(),), "Constant", where)
        tokens = sorted(s.name for s in term.expr.free_symbols if isinstance(s, Field) and s.per == "token")
        if tokens:
            raise LsmDeclarationError(
                f"a Constant decay does not vary over tokens; {', '.join(tokens)} does",
                where=where.at(0) if where else None,
                help="use Scalar",
            )
        super().__init__(log_k=_checked(term, where), defaults=defaults, where=where)


class Scalar(Decay):
    """D(M) = e^g M with one log decay g (B, T, HV) ≤ 0 per token and head."""

    __slots__ = ()

    def __init__(self, g: str | Term) -> None:
        where = here()
        term = scalar(g) if isinstance(g, str) else _log_decay(g, where, "g")
        _need(term, (frozenset(),), "Scalar", where)
        super().__init__(log_k=_checked(term, where), where=where)


class Vector(Decay):
    """D(M) = diag(e^g) M with g (B, T, HV, K) ≤ 0, or with over="V" D(M) = M diag(e^g) with g (B, T, HV,
    V) ≤ 0."""

    __slots__ = ()

    def __init__(self, g: str | Term, *, over: Dim | None = None) -> None:
        where = here()
        term = vector(g, over=over or "K") if isinstance(g, str) else _log_decay(g, where, "g")
        _need(term, (OVER_K, OVER_V) if over is None else (frozenset({over}),), "Vector", where)
        log = _checked(term, where)
        over_k = term.dims == OVER_K
        super().__init__(log_k=log if over_k else None, log_v=None if over_k else log, where=where)


class Matrix(Decay):
    """D(M) = e^A ⊙ M with a log decay A ≤ 0 of its own for every entry: (B, T, HV, K, V), or (HV, K, V)
    with per="head"."""

    __slots__ = ()

    def __init__(self, A: str | Term, *, per: Per = "token") -> None:
        where = here()
        term = matrix(A, per=per) if isinstance(A, str) else _log_decay(A, where, "A")
        _need(term, (KV,), "Matrix", where)
        super().__init__(log_kv=_checked(term, where), where=where)


class Rotation(Decay):
    """D(M) = diag(e^{iθ}) M with angles θ (B, T, HV, K): rows of a complex memory turn, each by a phase of its own; or, with
    angles over (K, V), entries.

    Beside a log decay g, ``Vector("g") * Rotation("theta")``, a step multiplies by e^{g + iθ}. What is written is real,
    and what is read is the real part: q @ M is Re(q M). The state is the pair (real part, imaginary part).
    `theta` is the name of an input or an expression with dims (K,), () or (K, V).
    """

    __slots__ = ()

    def __init__(self, theta: str | Term) -> None:
        where = here()
        term = vector(theta) if isinstance(theta, str) else _log_decay(theta, where, "theta")
        _need(term, (frozenset(), OVER_K, KV), "Rotation", where)
        super().__init__(phase=term.expr, where=where)


def _log_decay(value: object, where: Where | None, name: str) -> Term:
    if isinstance(value, Decay):
        raise LsmDeclarationError(
            "a decay of a decay", where=where.at(0) if where else None, help="decays multiply: a * b"
        )
    return as_term(value, where, 0)


def _need(term: Term, allowed: tuple[frozenset[str], ...], kind: str, where: Where | None) -> None:
    spot = where.at(0) if where else None
    if isinstance(term, Memory) or term.expr.free_symbols & MEMORIES:
        raise LsmDeclarationError(
            f"the decay {term!r} depends on the memory", where=spot,
            help="decays depend on inputs only: gates that mix in what was read make each step a nonlinear function of the last, "
            "so that no chunk of tokens could be computed together",
        )  # fmt: skip
    if term.dims not in allowed:
        want = " or ".join(show_dims(dims) for dims in allowed)
        kinds = {
            frozenset(): "Scalar",
            OVER_K: 'Vector(…, over="K")',
            OVER_V: 'Vector(…, over="V")',
            KV: "Matrix",
        }
        what = "an angle" if kind == "Rotation" else "a log decay"
        raise LsmDimsError(
            f"{kind} takes {what} with dims {want}; {term!r} has dims {show_dims(term.dims)}", where=spot,
            help=f"use {kinds[term.dims]}" if kind != "Rotation" else 'declare it with vector("theta", over="K")',
        )  # fmt: skip


def _checked(term: Term, where: Where | None) -> sympy.Expr:
    if term.expr.is_positive:
        raise LsmDecayError(
            f"the log decay {term!r} is positive: the memory is multiplied by more than 1 at every token",
            where=where.at(0) if where else None,
            help=f"a log decay is ≤ 0: use {(-term)!r}, or the logarithm of a factor in (0, 1]",
        )  # fmt: skip
    return term.expr


def _default(name: str, default: float | Callable[..., list[float]], where: Where | None) -> Default:
    """A checked default: HV ↦ HV numbers ≤ 0."""
    spot = where.at("default") if where else None

    def values(heads: int) -> list[float]:
        made = [float(x) for x in default(heads)] if callable(default) else [float(default)] * heads
        if len(made) != heads:
            raise LsmDeclarationError(
                f"the default of {name!r} gives {len(made)} numbers for {heads} heads", where=spot
            )
        worst = max(made, default=0.0)
        if worst > 0:
            raise LsmDecayError(
                f"the default of {name!r} is positive ({worst:g}): the memory is multiplied by {'more than 1'} at every token",
                where=spot, help="log decays are ≤ 0",
            )  # fmt: skip
        return made

    if callable(default) and len(inspect.signature(default).parameters) != 1:
        raise LsmDeclarationError(
            f"the default of {name!r} takes one argument, the number of heads", where=spot
        )
    for heads in (1, 2, 8, 16):
        values(heads)
    return values
