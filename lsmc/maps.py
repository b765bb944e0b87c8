"""Elementwise functions and feature maps, as users call them on terms: ``lsmc.silu(k)``, ``lsmc.softmax(q)``.

Elementwise ones take a scalar, a vector over K or V, or a number, and keep its dims.  Those with a sum
(`softmax`, `mean`, `l2norm`, `rmsnorm`) take a vector over K or over V.  All are differentiated
symbolically by `lsmc.grad`. Raise LsmUnknownSymbolError for strings and foreign symbols, LsmDimsError
where a vector is needed and none is given.
"""

from __future__ import annotations

import sympy

from lsmc import functions as f
from lsmc.errors import LsmDelayError, LsmDimsError, here
from lsmc.expr import DIM_SYMBOL, K, Max, Pairs, Sum, contract, number, rows_of, show_dims
from lsmc.terms import Term, as_term, vector_of


def _elementwise(build: object, x: object) -> Term:
    where = here()
    term = as_term(x, where, 0)
    return Term(build(term.expr), where)  # type: ignore[operator]


def exp(x: object) -> Term:
    """e^x."""
    return _elementwise(f.exp, x)


def log(x: object) -> Term:
    """ln x, x > 0."""
    return _elementwise(f.log, x)


def expm1(x: object) -> Term:
    """e^x − 1 without cancellation; 1 − e^g is −expm1(g)."""
    return _elementwise(f.expm1, x)


def log1p(x: object) -> Term:
    """ln(1 + x) without cancellation, x > −1."""
    return _elementwise(f.log1p, x)


def sigmoid(x: object) -> Term:
    """1 / (1 + e^−x), in (0, 1)."""
    return _elementwise(f.sigmoid, x)


def logsigmoid(x: object) -> Term:
    """ln sigmoid(x), < 0: the usual log decay."""
    return _elementwise(f.logsigmoid, x)


def softplus(x: object) -> Term:
    """ln(1 + e^x), > 0."""
    return _elementwise(f.softplus, x)


def relu(x: object) -> Term:
    """max(x, 0)."""
    return _elementwise(f.relu, x)


def elu(x: object) -> Term:
    """x where x > 0, else e^x − 1; elu(x) + 1 is a positive feature map."""
    return _elementwise(f.elu, x)


def erf(x: object) -> Term:
    """2/√π ∫₀ˣ e^{−t²} dt."""
    return _elementwise(f.erf, x)


def tanh(x: object) -> Term:
    """tanh x, in (−1, 1)."""
    return _elementwise(sympy.tanh, x)


def sin(x: object) -> Term:
    """sin x."""
    return _elementwise(sympy.sin, x)


def cos(x: object) -> Term:
    """cos x."""
    return _elementwise(sympy.cos, x)


def abs(x: object) -> Term:
    """|x|; its derivative at 0 is 0."""
    return _elementwise(f.Abs, x)


def sign(x: object) -> Term:
    """−1, 0 or 1; its derivative is 0."""
    return _elementwise(f.sign, x)


def maximum(x: object, y: object) -> Term:
    """max(x, y), elementwise; where they are equal, its derivative is that of y."""
    where = here()
    a, b = as_term(x, where, 0), as_term(y, where, 1)
    return b + _elementwise(f.relu, a - b)


def minimum(x: object, y: object) -> Term:
    """min(x, y), elementwise; where they are equal, its derivative is that of y."""
    where = here()
    a, b = as_term(x, where, 0), as_term(y, where, 1)
    return b - _elementwise(f.relu, b - a)


def sqrt(x: object) -> Term:
    """√x, x ≥ 0."""
    return _elementwise(sympy.sqrt, x)


def rsqrt(x: object) -> Term:
    """1 / √x, x > 0."""
    return _elementwise(lambda e: e ** sympy.Rational(-1, 2), x)


def square(x: object) -> Term:
    """x²."""
    return _elementwise(lambda e: e**2, x)


def silu(x: object) -> Term:
    """x · sigmoid(x), also called swish."""
    return _elementwise(lambda e: e * f.sigmoid(e), x)


def gelu(x: object) -> Term:
    """x · Φ(x) with the normal distribution function Φ (the exact form)."""
    return _elementwise(lambda e: e * (1 + f.erf(e * number(0.7071067811865476))) / 2, x)


def pairs(x: object) -> Term:
    """vec(xᵀx): the products x_a x_b of a vector over K, so that pairs(q) @ pairs(k) = (q · k)².

    As keys and queries they make a memory of K·K rows; nothing of that length is written out for a token.
    """
    where = here()
    term = as_term(x, where, 0)
    if term.dims != K or rows_of(term.expr) == {"F"}:
        raise LsmDimsError(f"{term!r} has dims {show_dims(term.dims)}; pairs takes a vector over (K,)",
                           where=where.at(0) if where else None, help="pairs(k), pairs(gamma * q)")  # fmt: skip
    return Term(Pairs(term.expr), where)


def softmax(x: object) -> Term:
    """e^{xᵢ} / Σⱼ e^{xⱼ} over the dim of a vector.  Raises LsmDelayError for a scalar: there is no softmax over tokens."""
    where = here()
    given = as_term(x, where, 0)
    if not given.dims:
        raise LsmDelayError(
            f"{given!r} is one number for each token: a softmax over tokens looks at all earlier ones, and a step sees them only "
            "through the memory, K × V numbers however many they are", where=where.at(0) if where else None,
            help="(q @ M) / (q @ M.normalizer) weights tokens by products of feature maps, such as exp(q) and exp(k)",
        )  # fmt: skip
    term, dim = vector_of(x, where, "softmax")
    shifted = f.exp(term.expr - Max(DIM_SYMBOL[dim], term.expr))
    return Term(shifted / Sum(DIM_SYMBOL[dim], shifted), where)


def mean(x: object) -> Term:
    """(1/n) Σᵢ xᵢ over the dim of a vector of n numbers."""
    where = here()
    term, dim = vector_of(x, where, "mean")
    return Term(contract(dim, term.expr) / Sum(DIM_SYMBOL[dim], sympy.S.One), where)


def layernorm(x: object, eps: float = 1e-6) -> Term:
    """(x − mean x) / √(mean (x − mean x)² + eps) over the dim of a vector."""
    where = here()
    term, dim = vector_of(x, where, "layernorm")
    n = Sum(DIM_SYMBOL[dim], sympy.S.One)
    centred = term.expr - Sum(DIM_SYMBOL[dim], term.expr) / n
    return Term(centred / sympy.sqrt(Sum(DIM_SYMBOL[dim], centred**2) / n + number(eps)), where)


def l2norm(x: object, eps: float = 1e-6) -> Term:
    """x / √(Σᵢ xᵢ² + eps) over the dim of a vector."""
    where = here()
    term, dim = vector_of(x, where, "l2norm")
    return Term(term.expr / sympy.sqrt(Sum(DIM_SYMBOL[dim], term.expr**2) + number(eps)), where)


def rmsnorm(x: object, eps: float = 1e-6) -> Term:
    """x / √((1/n) Σᵢ xᵢ² + eps) over the dim of a vector of n numbers."""
    where = here()
    term, dim = vector_of(x, where, "rmsnorm")
    symbol = DIM_SYMBOL[dim]
    return Term(
        term.expr / sympy.sqrt(Sum(symbol, term.expr**2) / Sum(symbol, sympy.S.One) + number(eps)), where
    )
