"""`LSM`: the declaration of a linear sequence model, a pair (decay type, update rule) and optionally a
readout.

    own = LSM("own", decay=Vector("g"), update=outer(k, v))

says  M_s = D_s(M_{s-1}) + update,  o_s = q_s · M_s.  In an update `M` is the memory before the decay and
`M.decayed` after it; in a readout `M` is the updated memory.  Declaring costs milliseconds and runs
nothing; every mistake that can be seen without tensors is raised here, at the line of the declaration.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sympy

from lsmc.decays import Decay, Identity
from lsmc.errors import (
    LsmDeclarationError,
    LsmDimsError,
    LsmDuplicateNameError,
    LsmUnknownSymbolError,
    Where,
    here,
)
from lsmc.expr import MEMORIES, Field, Sum, dims_of, inputs_of, show
from lsmc.terms import M, Operator, Term, _short, check_name, q

if TYPE_CHECKING:
    from lsmc.canonical import Canonical


_IDENTITY = Identity()
_DECLARED: dict[str, LSM] = {}
_engine: dict[str, Callable[..., Any]] = {}


def attach(**engine: Callable[..., Any]) -> None:
    """Bind what `LSM.__call__` and `LSM.step` run: the compiler stands above the language in the import order."""
    _engine.update(engine)


def declared(key: str) -> LSM:
    """The declaration whose `key` stands in a compiled graph."""
    return _DECLARED[key]


class LSM:
    """A method:  M_s = D_s(M_{s-1}) + update,  o_s = readout.  Immutable, hashable by content.

    name         letters, digits and underscores
    decay        Identity(), Constant, Scalar, Vector, Matrix, or a product of them
    update       a (K, V) term added to the decayed memory: sums of outer(key, value), values possibly with
    reads ``k @ M``
    momentum     Constant or Scalar: the update goes through an accumulator, P_s = e^μ P_{s-1} + update, M_s = D_s(M_{s-1})
                 + P_s; the state is the pair (M, P)
    block        a number of tokens: reads in the update are of the memory at the start of the present block of so many tokens,
                 counted from the first that the state has seen, and may enter the update in any way. The state grows by
                 that memory and by the number of tokens since, unless block=1: then it is the memory before each token, and
                 tokens go one after the other
    recurrence   instead of `update`, the whole right-hand side: ``(eye - beta * outer(k, k)) @ M.decayed +
    beta * outer(k, v)``
    readout      a term over V; default ``q @ M``.  ``q @ M.previous`` reads before the update,
                 ``q @ (M.previous + outer(u * k, v))`` gives the present token a bonus, ``+ D * v`` skips,
                 ``(q @ M) / (q @ M.normalizer + 1e-6)`` normalises

    Calling it runs the compiled operator (see `lsmc.api`); `step` runs one token; `canonical` is its
    canonical form. Raises subclasses of LsmError.
    """

    _content: tuple[object, ...]
    name: str
    decay: Decay
    momentum: Decay | None
    block: int | None
    update: sympy.Expr
    readout: sympy.Expr
    where: Where | None
    key: str
    """Names the declaration in compiled graphs: its name and a hash of its canonical form."""

    def __init__(
        self,
        name: str,
        *,
        decay: Decay = _IDENTITY,
        momentum: Decay | None = None,
        block: int | None = None,
        update: Term | None = None,
        recurrence: Term | None = None,
        readout: Term | None = None,
    ) -> None:
        where = here()
        check_name(name, where.at(0) if where else None, what="method")
        given: object = decay  # users are not type checkers
        if not isinstance(given, Decay):
            shown = f'"{given}"' if isinstance(given, str) else _short(given)
            raise LsmDeclarationError(
                f"decay={shown} is no decay type", where=where.at("decay") if where else None,
                help=f"use Identity(), Constant(…), Scalar({shown}), Vector({shown}) or Matrix(…)",
            )  # fmt: skip
        if (update is None) == (recurrence is None):
            raise LsmDeclarationError(
                "give either update= (what is added to the decayed memory) or recurrence= (all of M_s)", where=where,
                help="LSM(name, decay=…, update=outer(k, v))",
            )  # fmt: skip
        if momentum is not None:
            _check_momentum(momentum, recurrence is not None, where)
        if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
            raise LsmDeclarationError(f"block={_short(block)} is no number of tokens", where=where.at("block") if where else None,
                                      help="block=16, or block=1 for one token after the other")  # fmt: skip
        whole = recurrence is not None
        body = _term(recurrence if whole else update, "recurrence" if whole else "update", where)
        out = _term(q @ M if readout is None else readout, "readout", where)
        content = (name, decay, momentum, block, body.expr, whole, out.expr)
        for key, value in (("name", name), ("decay", decay), ("momentum", momentum), ("block", block), ("update", body.expr),
                           ("readout", out.expr), ("is_recurrence", whole), ("where", where), ("_content", content)):  # fmt: skip
            object.__setattr__(self, key, value)
        _check_names(self._terms(), where)
        _ = self.canonical  # mistakes show at the declaration
        object.__setattr__(self, "key", self.canonical.key)
        _DECLARED[self.key] = self

    def _terms(self) -> list[tuple[str, sympy.Expr]]:
        decays = [("decay", part) for part in self.decay.parts if part is not None]
        if self.momentum is not None:
            decays.append(("momentum", self.momentum.log_k))
        return [
            *decays,
            ("recurrence" if self.is_recurrence else "update", self.update),
            ("readout", self.readout),
        ]

    is_recurrence: bool
    """Whether `update` is the whole right-hand side of M_s."""

    @cached_property
    def canonical(self) -> Canonical:
        """Read, correct, write, decay: the same for all writings of a method (see `lsmc.canonical`)."""
        made: Canonical = importlib.import_module("lsmc.canonical").canonicalise(
            self.name, self.decay.parts, self.update, self.readout,
            {**self.decay.defaults, **(self.momentum.defaults if self.momentum else {})}, recurrence=self.is_recurrence,
            momentum=self.momentum.log_k if self.momentum else None, block=self.block, where=self.where,
        )  # fmt: skip
        return made

    @property
    def inputs(self) -> tuple[Field, ...]:
        """The inputs of a call, in order: q, k, v as used, then the declared ones; each has `.name`,
        `.dims`, `.shape`."""
        return self.canonical.inputs

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("declarations are immutable")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LSM) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __copy__(self) -> LSM:
        return self

    def __deepcopy__(self, memo: object) -> LSM:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.name, self.decay, self.momentum, self.block, self.update, self.is_recurrence, self.readout)

    def __repr__(self) -> str:
        word = "recurrence" if self.is_recurrence else "update"
        tail = "" if self.readout == (q @ M).expr else f", readout={show(self.readout)}"
        through = "" if self.momentum is None else f"momentum={self.momentum!r}, "
        through += "" if self.block is None else f"block={self.block}, "
        return f'LSM("{self.name}", decay={self.decay!r}, {through}{word}={show(self.update)}{tail})'

    def __call__(self, **inputs: Any) -> Any:
        """The operator: ``o`` or, with return_final_state=True, ``(o, state)``; see `lsmc.api.call`."""
        return _engine["call"](self, **inputs)

    def step(self, **inputs: Any) -> Any:
        """One token of every sequence: ``(o, state)``; see `lsmc.api.step`."""
        return _engine["step"](self, **inputs)


def _rebuild(
    name: str, decay: Decay, momentum: Decay | None, block: int | None, update: sympy.Expr, whole: bool, readout: sympy.Expr
) -> LSM:
    body = {"recurrence" if whole else "update": Term(update)}
    return LSM(name, decay=decay, momentum=momentum, block=block, readout=Term(readout), **body)


def _check_momentum(momentum: object, recurrence: bool, where: Where | None) -> None:
    spot = where.at("momentum") if where else None
    way = 'Scalar(log(scalar("eta"))) decays the accumulated update by eta'
    if not isinstance(momentum, Decay):
        raise LsmDeclarationError(f"momentum={_short(momentum)} is no decay type", where=spot, help=way)
    if momentum.log_k is None or dims_of(momentum.log_k) or momentum.parts[1:] != (None, None, None):
        raise LsmDimsError(f"momentum={momentum!r}: the accumulated update decays by one number for each head", where=spot,
                           help=way)
    if recurrence:
        raise LsmDeclarationError("momentum accumulates an update, and recurrence= gives all of M_s", where=spot,
                                  help="write update=…, and what multiplies the memory as decay=…")


def _term(value: object, name: str, where: Where | None) -> Term:
    spot = where.at(name) if where else None
    if isinstance(value, Term):
        return value
    if isinstance(value, Operator):
        raise LsmDimsError(
            f"the {name} {value!r} is a (K, K) operator; the memory has dims (K, V)",
            where=spot,
            help="write (…) @ M.decayed",
        )
    if isinstance(value, str | sympy.Basic):
        raise LsmUnknownSymbolError(
            f"{name}={value!r}: nobody declared it", where=spot, help="write update=outer(k, v)"
        )
    raise LsmDeclarationError(
        f"{name}={_short(value)} is no term", where=spot, help="write update=outer(k, v), readout=q @ M"
    )


def _check_names(terms: list[tuple[str, sympy.Expr]], where: Where | None) -> None:
    """One name, one meaning; and no symbol that is not a declared input."""
    seen: dict[str, Field] = {}
    for part, expr in terms:
        spot = where.at(part) if where else None
        for symbol in sorted(expr.free_symbols - _dim_symbols(expr), key=str):
            if not isinstance(symbol, Field):
                raise LsmUnknownSymbolError(
                    f"unknown symbol {symbol}", where=spot, help=f'declare it: scalar("{symbol}")'
                )
        for symbol in sorted(inputs_of(expr), key=lambda s: (s.name, s.shape)):
            known = seen.setdefault(symbol.name, symbol)
            if known != symbol:
                raise LsmDuplicateNameError(
                    f"{symbol.name!r} is declared as {known.shape} and as {symbol.shape}", where=spot,
                    help="one name is one input: rename one of them",
                )  # fmt: skip


def _dim_symbols(expr: sympy.Expr) -> set[sympy.Basic]:
    return {node.args[0] for node in expr.atoms(Sum)}


__all__ = ["LSM", "MEMORIES"]
