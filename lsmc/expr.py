"""Symbolic tensors with named dims, on sympy.

Every tensor is an elementwise value that broadcasts over the named dims K (key) and V (value); contraction is
explicit: q·k is ``Sum(K, q*k)``, the read k·M is ``Sum(K, k*M)``, kᵀv is ``k*v``. What users write, with the
dims checked, is in `lsmc.terms`. Numbers are exact rationals (0.5 is 1/2), so that two writings of one method
compare equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import sympy
from sympy.printing.str import StrPrinter

Dim = Literal["K", "V"]
DIMS: tuple[Dim, ...] = ("K", "V")
KV = frozenset(DIMS)
K = frozenset({"K"})
V = frozenset({"V"})


class Field(sympy.Symbol):  # type: ignore[misc]
    """A named tensor: an input, or a value read from the memory.

    dims   the named dims it varies over, a subset of ("K", "V") in that order
    per    "token": one value per (batch, token, head), shape (B, T, heads, *dims);  "head": shape (heads,
    *dims);  "layer": the same for all heads, shape (*dims)
    heads  "HV" value heads, or "H" query/key heads (value head j uses head j // (HV // H))
    """

    dims: tuple[str, ...]
    per: str
    heads: str

    def __new__(
        cls,
        name: str,
        dims: Iterable[str] = (),
        per: Literal["token", "head", "layer"] = "token",
        heads: Literal["H", "HV"] = "HV",
    ) -> Field:
        made: Field = sympy.Symbol.__xnew__(cls, name, real=True)
        made.dims = tuple(dims)
        made.per = per
        made.heads = heads
        return made

    def _hashable_content(self) -> tuple[Any, ...]:
        return (*super()._hashable_content(), self.dims, self.per, self.heads)

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.name, self.dims, self.per, self.heads), {}

    @property
    def shape(self) -> str:
        """The shape of the tensor to pass, as text: ``(B, T, HV, K)``."""
        size = "".join(f"{part}, " for part in self.parts)
        return f"({size[:-2]})" if len(self.parts) > 1 else f"({size.strip()})"

    @property
    def parts(self) -> tuple[str, ...]:
        """The named dimensions of the tensor to pass, in order."""
        lead = {"token": ("B", "T", self.heads), "head": (self.heads,), "layer": ()}[self.per]
        return (*lead, *self.dims)

    @property
    def tile(self) -> tuple[str, str]:
        """The dimensions as those of a matrix, 1 where there is none: rows over K, columns over V."""
        return next((d for d in self.dims if d != "V"), "1"), "V" if "V" in self.dims else "1"


class Sum(sympy.Function):  # type: ignore[misc]
    """``Sum(d, e)``: the contraction of `e` over the named dim `d` (a plain sympy symbol K or V).

    Where `e` does not vary over `d` it is multiplied by the size of `d`; ``Sum(d, 1)`` is that size.
    """

    nargs = 2

    @property
    def dim(self) -> str:
        """The contracted dim, "K" or "V"."""
        return str(self.args[0])

    @property
    def body(self) -> sympy.Expr:
        """What is summed."""
        return self.args[1]

    def _sympystr(self, printer: StrPrinter) -> str:  # sympy has a class of the same name, which its printers take this for
        return f"{type(self).__name__.lower()}_{self.dim}({printer._print(self.body)})"

    def _eval_is_extended_real(self) -> bool:
        return True

    def _eval_is_positive(self) -> bool | None:
        return True if self.args[1].is_positive else None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[1].is_nonnegative else None


class Max(Sum):
    """``Max(d, e)``: the maximum of `e` over the dim `d`, as a constant: its derivative is zero by
    definition.

    Only `softmax` makes it, whose value does not depend on it: it keeps the exponentials at or below one.
    """

    def _eval_is_positive(self) -> bool | None:
        return None

    def _eval_is_nonnegative(self) -> bool | None:
        return None


class Pairs(sympy.Function):  # type: ignore[misc]
    """``Pairs(x)``: the products x_a x_b of a vector over K, one for each of K·K rows of a memory: vec(xᵀx).

    It counts as a vector over K, the rows, of which there are K·K; `rows_of` tells the two apart.
    """

    nargs = 1

    def _eval_is_extended_real(self) -> bool:
        return True


class Over(sympy.Function):  # type: ignore[misc]
    """``Over(d, x)``: the numbers of a vector over the other dim as a vector over `d`; K = V then."""

    nargs = 2

    def _eval_is_extended_real(self) -> bool:
        return True


DIM_SYMBOL: dict[str, sympy.Symbol] = {name: sympy.Symbol(name) for name in DIMS}

_dims_cache: dict[sympy.Basic, frozenset[str]] = {}


def dims_of(expr: sympy.Basic) -> frozenset[str]:
    """The named dims that `expr` varies over."""
    if isinstance(expr, Field):
        return frozenset(expr.dims)
    if not expr.args:
        return frozenset()
    found = _dims_cache.get(expr)
    if found is None:
        if isinstance(expr, Sum):
            found = dims_of(expr.args[1]) - {str(expr.args[0])}
        elif isinstance(expr, Over):
            found = frozenset({str(expr.args[0])})
        else:
            found = frozenset().union(*(dims_of(arg) for arg in expr.args))
        _dims_cache[expr] = found
    return found


def rows_of(expr: sympy.Basic) -> frozenset[str]:
    """What an expression over K runs over: "K", or "F", the K·K pairs of `Pairs`; both where it mixes them, which has no
    meaning; neither where only the memory varies over K, whose rows are whatever its keys are."""
    if isinstance(expr, Pairs):
        return frozenset("F")
    if isinstance(expr, Field):
        return frozenset("K") & frozenset(expr.dims) if expr not in MEMORIES else frozenset()
    if isinstance(expr, Over) or (isinstance(expr, Sum) and expr.dim == "K"):
        return frozenset("K") & dims_of(expr)
    return frozenset().union(*(rows_of(arg) for arg in expr.args))


def show_dims(dims: Iterable[str]) -> str:
    """``(K, V)``, ``(K,)``, ``()``."""
    named = [dim for dim in DIMS if dim in set(dims)]
    return f"({named[0]},)" if len(named) == 1 else f"({', '.join(named)})"


def contract(dim: str, body: sympy.Expr) -> sympy.Expr:
    """Σ over `dim` of `body`, with the factors that do not vary over `dim` in front."""
    if body.is_zero:
        return sympy.S.Zero
    bodies: dict[sympy.Expr, sympy.Expr] = {}  # by what varies over the other dim: a k v + 1 v is (a k + 1) v
    for term in sympy.Add.make_args(body) if dims_of(body) - {dim} else (body,):
        factors = sympy.Mul.make_args(term)
        other = sympy.Mul(*(factor for factor in factors if dims_of(factor) and dim not in dims_of(factor)))
        bodies[other] = bodies.get(other, sympy.S.Zero) + term / other
    total = sympy.S.Zero
    for other, rest in bodies.items():
        factors = sympy.Mul.make_args(rest)
        scalars = sympy.Mul(*(factor for factor in factors if dim not in dims_of(factor)))
        total += other * scalars * Sum(DIM_SYMBOL[dim], rest / scalars)
    return total


def number(value: float | int | sympy.Number) -> sympy.Expr:
    """An exact rational: the shortest decimal that is the same float."""
    if isinstance(value, sympy.Basic):
        return sympy.Rational(str(value)) if isinstance(value, sympy.Float) else value
    return sympy.Integer(value) if isinstance(value, int) else sympy.Rational(repr(float(value)))


class _Printer(StrPrinter):  # type: ignore[misc]
    def _print_Pairs(self, expr: Pairs) -> str:
        return f"pairs({self._print(expr.args[0])})"

    def _print_Over(self, expr: Over) -> str:
        return f"over_{expr.args[0]}({self._print(expr.args[1])})"

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return repr(float(expr)) if expr.q > 1000 else str(super()._print_Rational(expr))


def show(expr: sympy.Expr) -> str:
    """One line of text, the same for equal expressions; tiny rationals as decimals, contractions as
    sum_K(…)."""
    return str(_Printer({"order": "lex"}).doprint(expr))


#
# --- the memory

MEMORY: dict[str, Field] = {
    "current": Field("M", DIMS),  # what "M" means depends on where it stands: see lsmc.canonical
    "previous": Field("M.previous", DIMS),
    "decayed": Field("M.decayed", DIMS),
    "updated": Field("M.updated", DIMS),
}
NORMALIZER: dict[str, Field] = {
    at: Field(field.name.replace("M", "Z", 1), ("K",)) for at, field in MEMORY.items()
}
BIAS: dict[str, Field] = {at: Field(field.name.replace("M", "Mb", 1), ("V",)) for at, field in MEMORY.items()}
MEMORIES = frozenset(MEMORY.values()) | frozenset(NORMALIZER.values()) | frozenset(BIAS.values())


def inputs_of(expr: sympy.Basic) -> frozenset[Field]:
    """The input fields that occur in `expr` (not the memory)."""
    return frozenset(symbol for symbol in expr.free_symbols if isinstance(symbol, Field)) - MEMORIES
