"""What torch's functions of one token do, as expressions of the declaration language: the tables of absorption.

`POINTWISE` are functions of numbers: the expression of a result's element in terms of its arguments' elements.
`ROWS` are functions over the last dimension; they get its name first. Both take further arguments as torch does, and a
call that is not covered (another dimension, a rounding mode) raises `Refused`. `CASTS` and `SHAPES` leave the values as
they are. Each name stands for the function in torch and in torch.nn.functional, the operator and the tensor method.

Where torch and the language differ at single points: the derivative at the kink of `relu`, `abs` and clamps; `softplus`
of torch is the identity above its threshold, which changes values by less than e^-threshold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch

from lsmc import functions as f
from lsmc.expr import Max, Sum, number


class Refused(Exception):
    """Why something is left as it is."""


def _number(x: Any) -> sympy.Expr:
    if isinstance(x, bool) or not isinstance(x, int | float | sympy.Expr):
        raise Refused(f"{x!r} is no number")
    return x if isinstance(x, sympy.Expr) else number(x)


def _at_least(x: sympy.Expr, least: Any) -> sympy.Expr:
    """max(x, c); max(√s, c) is √max(s, c²), whose derivative is finite where s is 0."""
    c = _number(least)
    if isinstance(x, sympy.Pow) and x.exp == sympy.S.Half and c.is_positive:
        return sympy.sqrt(_at_least(x.base, c**2))
    return f.relu(x - c) + c


def _clamp(x: sympy.Expr, min: Any = None, max: Any = None) -> sympy.Expr:
    x = x if min is None else _at_least(x, min)
    return x if max is None else -_at_least(-x, -_number(max))


def _only(allowed: Any, given: Any, what: str) -> None:
    if given != allowed:
        raise Refused(f"{what}={given!r}")


def _in_place(inplace: bool) -> None:
    _only(False, inplace, "inplace")


def _relu(x: sympy.Expr, inplace: bool = False) -> sympy.Expr:
    _in_place(inplace)
    return f.relu(x)


def _silu(x: sympy.Expr, inplace: bool = False) -> sympy.Expr:
    _in_place(inplace)
    return x * f.sigmoid(x)


def _elu(x: sympy.Expr, alpha: Any = 1.0, inplace: bool = False) -> sympy.Expr:
    _in_place(inplace)
    _only(1, alpha, "alpha")
    return f.elu(x)


def _softplus(x: sympy.Expr, beta: Any = 1, threshold: Any = 20) -> sympy.Expr:
    if threshold < 20:
        raise Refused(f"threshold={threshold!r}")
    return f.softplus(x * _number(beta)) / _number(beta)


def _gelu(x: sympy.Expr, approximate: str = "none") -> sympy.Expr:
    _only("none", approximate, "approximate")
    return x * (1 + f.erf(x * number(0.7071067811865476))) / 2


def _power(x: sympy.Expr, exponent: Any) -> sympy.Expr:
    if not isinstance(exponent, int | float):
        raise Refused("an exponent that is no number")
    return x ** _number(exponent)


def _add(x: sympy.Expr, y: Any, *, alpha: Any = 1) -> sympy.Expr:
    return _number(x) + _number(alpha) * _number(y)


def _divide(x: Any, y: Any, *, rounding_mode: Any = None) -> sympy.Expr:
    _only(None, rounding_mode, "rounding_mode")
    return _number(x) / _number(y)


POINTWISE: dict[str, Callable[..., sympy.Expr]] = {
    "exp": f.exp, "log": f.log, "expm1": f.expm1, "log1p": f.log1p, "sigmoid": f.sigmoid, "logsigmoid": f.logsigmoid,
    "softplus": _softplus, "relu": _relu, "elu": _elu, "silu": _silu, "gelu": _gelu, "erf": f.erf, "tanh": sympy.tanh,
    "sin": sympy.sin, "cos": sympy.cos, "abs": f.Abs, "sqrt": sympy.sqrt, "rsqrt": lambda x: x ** sympy.Rational(-1, 2),
    "square": lambda x: x**2, "reciprocal": lambda x: 1 / x, "neg": lambda x: -x, "negative": lambda x: -x,
    "add": _add, "sub": lambda x, y, *, alpha=1: _add(x, -_number(y), alpha=alpha),
    "mul": lambda x, y: _number(x) * _number(y), "multiply": lambda x, y: _number(x) * _number(y),
    "div": _divide, "divide": _divide, "truediv": _divide, "true_divide": _divide, "pow": _power,
    "clamp": _clamp, "clamp_min": lambda x, min: _clamp(x, min), "clamp_max": lambda x, max: _clamp(x, None, max),
}  # fmt: skip


# --- over the last dimension


def _last(dim: Any, rank: int) -> None:
    dims = list(dim) if isinstance(dim, list | tuple) else [dim]
    if dims not in ([-1], [rank - 1]):
        raise Refused(f"dim={dim!r} is not the last dimension")


def _mean(d: sympy.Symbol, x: sympy.Expr) -> sympy.Expr:
    return Sum(d, x) / Sum(d, sympy.S.One)


def _softmax(d: sympy.Symbol, x: sympy.Expr) -> sympy.Expr:
    shifted = f.exp(x - Max(d, x))
    return shifted / Sum(d, shifted)


def _normalize(d: sympy.Symbol, x: sympy.Expr, rank: int, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12) -> sympy.Expr:
    _last(dim, rank)
    _only(2, p, "p")
    return x / _at_least(sympy.sqrt(Sum(d, x**2)), eps)


def _rms_norm(d: sympy.Symbol, x: sympy.Expr, rank: int, shape: Any, weight: Any = None, eps: Any = None) -> sympy.Expr:
    if len(shape) != 1 or eps is None:
        raise Refused("only over the last dimension, with a given eps")
    y = x * (_mean(d, x**2) + _number(eps)) ** sympy.Rational(-1, 2)
    return y if weight is None else y * weight


def _reduction(build: Callable[[sympy.Symbol, sympy.Expr], sympy.Expr]) -> Callable[..., sympy.Expr]:
    def rule(d: sympy.Symbol, x: sympy.Expr, rank: int, dim: Any, keepdim: bool = False) -> sympy.Expr:
        _last(dim, rank)
        return build(d, x)

    return rule


def _norm(d: sympy.Symbol, x: sympy.Expr, rank: int, ord: Any = 2, dim: Any = None, keepdim: bool = False,
          p: Any = 2) -> sympy.Expr:
    _last(dim, rank)
    if (ord, p) != (2, 2):
        raise Refused("only the norm √Σx²")
    return sympy.sqrt(Sum(d, x**2))


def _softmax_over(d: sympy.Symbol, x: sympy.Expr, rank: int, dim: Any) -> sympy.Expr:
    _last(dim, rank)
    return _softmax(d, x)


ROWS: dict[str, Callable[..., sympy.Expr]] = {
    "sum": _reduction(Sum), "mean": _reduction(_mean), "norm": _norm, "vector_norm": _norm, "softmax": _softmax_over,
    "normalize": _normalize, "rms_norm": _rms_norm,
}  # fmt: skip

CASTS = ("to", "float", "half", "bfloat16", "type_as", "contiguous")
SHAPES = ("unsqueeze", "squeeze", "expand", "expand_as", "unflatten", "flatten", "view", "reshape", "getitem")


def _functions(name: str) -> Iterable[object]:
    """The functions of a name; `str` targets are tensor methods."""
    yield name
    spaces = (torch, torch.nn.functional, torch.special, torch.linalg, operator)
    yield from (getattr(space, name) for space in spaces if hasattr(space, name))


NAMES: dict[object, str] = {
    found: name for name in (*POINTWISE, *ROWS, *CASTS, *SHAPES) for found in _functions(name)
}
"""What stands in a graph as the target of a call → its name in the tables."""

MUTATING = frozenset({operator.setitem, operator.delitem, *(
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
                                               "lshift", "rshift", "matmul"))})  # fmt: skip
"""Operators that write into their first argument."""

__all__ = ["CASTS", "MUTATING", "NAMES", "POINTWISE", "ROWS", "SHAPES", "Refused"]
