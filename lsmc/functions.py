"""The elementwise functions of the language: one table, for the reference, the symbolic derivatives and the emitters.

Each entry of `FUNCTIONS` is a sympy function class with its derivative (`fdiff`), and its source in torch and in Triton as a
template of ``{0}``, the *name* of its argument (templates may use it more than once).  Where the obvious formula loses digits
(``log(1 + exp(x))``, ``exp(x) - 1``) the template is the stable one.

`sqrt`, `rsqrt`, `square` are powers; `silu`, `gelu`, `swish` are products; `softmax`, `l2norm`, `rmsnorm`, `mean` contain a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from lsmc.expr import DIM_SYMBOL, Max, Sum, Term, _vector, as_term, contract, number
from lsmc.errors import here


class _Elementwise(sympy.Function):  # type: ignore[misc]
    nargs = 1

    def _eval_is_extended_real(self) -> bool:
        return True


class exp(_Elementwise):
    """e^x.  (sympy's own exp merges products of exponentials, which would mix dims and signs of exponents.)"""

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        if x.is_zero:
            return sympy.S.One
        return x.args[0] if isinstance(x, log) else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self

    def _eval_is_positive(self) -> bool:
        return True


class log(_Elementwise):
    """ln x, x > 0."""

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        if x == 1:
            return sympy.S.Zero
        return x.args[0] if isinstance(x, exp) else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return 1 / self.args[0]


class expm1(_Elementwise):
    """e^x − 1 without cancellation; 1 − e^g is −expm1(g)."""

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        if x.is_zero:
            return sympy.S.Zero
        return x.args[0] if isinstance(x, log1p) else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return exp(self.args[0])


class log1p(_Elementwise):
    """ln(1 + x) without cancellation, x > −1."""

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        if x.is_zero:
            return sympy.S.Zero
        return x.args[0] if isinstance(x, expm1) else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return 1 / (1 + self.args[0])


class sigmoid(_Elementwise):
    """σ(x) = 1 / (1 + e^−x), in (0, 1)."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * sigmoid(-self.args[0])

    def _eval_is_positive(self) -> bool:
        return True


class logsigmoid(_Elementwise):
    """ln σ(x) = −ln(1 + e^−x), < 0: the usual log decay."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sigmoid(-self.args[0])

    def _eval_is_negative(self) -> bool:
        return True


class softplus(_Elementwise):
    """ln(1 + e^x), > 0."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sigmoid(self.args[0])

    def _eval_is_positive(self) -> bool:
        return True


class relu(_Elementwise):
    """max(x, 0); its derivative at 0 is 0."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return step(self.args[0])

    def _eval_is_nonnegative(self) -> bool:
        return True


class step(_Elementwise):
    """1 where x > 0, else 0."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero

    def _eval_is_nonnegative(self) -> bool:
        return True


class elu(_Elementwise):
    """x where x > 0, else e^x − 1; elu(x) + 1 is the positive feature map of linear attention."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return exp(-relu(-self.args[0]))


class erf(_Elementwise):
    """2/√π ∫₀ˣ e^{−t²} dt."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return number(1.1283791670955126) * exp(-(self.args[0] ** 2))


@dataclass(frozen=True)
class FunctionSpec:
    """One elementwise function: its class, and its source with ``{0}`` for the name of the argument."""

    name: str
    cls: type[Any]
    torch: str
    triton: str


# ln(1 + y) for y in (−1/2, 1] by 2·artanh(y / (2 + y)): hardware logarithms have absolute, not relative, accuracy near 1
_LOG1P_SMALL = (
    "(2 * ({0} / (2 + {0})) * (1 + ({0} / (2 + {0})) * ({0} / (2 + {0})) * (0.3333333333333333 + ({0} / (2 + {0})) * "
    "({0} / (2 + {0})) * (0.2 + ({0} / (2 + {0})) * ({0} / (2 + {0})) * (0.14285714285714285 + ({0} / (2 + {0})) * "
    "({0} / (2 + {0})) * (0.1111111111111111 + ({0} / (2 + {0})) * ({0} / (2 + {0})) * 0.09090909090909091))))))"
)
_SOFTPLUS_TAIL = _LOG1P_SMALL.replace("{0}", "tl.exp(-tl.abs({0}))")
_EXPM1 = (
    "tl.where(tl.abs({0}) < 0.35, {0} * (1 + {0} * (0.5 + {0} * (0.16666666666666666 + {0} * (0.041666666666666664 + {0} * "
    "(0.008333333333333333 + {0} * (0.001388888888888889 + {0} * 0.0001984126984126984)))))), tl.exp({0}) - 1)"
)
_TANH = (
    "tl.where(tl.abs({0}) < 0.1, {0} * (1 + {0} * {0} * (-0.3333333333333333 + {0} * {0} * 0.13333333333333333)), "
    "2 * tl.sigmoid(2 * {0}) - 1)"
)

FUNCTIONS: dict[str, FunctionSpec] = {
    spec.name: spec
    for spec in (
        FunctionSpec("exp", exp, "torch.exp({0})", "tl.exp({0})"),
        FunctionSpec("log", log, "torch.log({0})", "tl.log({0})"),
        FunctionSpec("expm1", expm1, "torch.expm1({0})", _EXPM1),
        FunctionSpec(
            "log1p", log1p, "torch.log1p({0})",
            f"tl.where(({{0}} > -0.5) & ({{0}} <= 1), {_LOG1P_SMALL}, tl.log(1 + {{0}}))",
        ),
        FunctionSpec("sigmoid", sigmoid, "torch.sigmoid({0})", "tl.sigmoid({0})"),
        FunctionSpec(
            "logsigmoid", logsigmoid, "torch.nn.functional.logsigmoid({0})", f"(tl.minimum({{0}}, 0) - {_SOFTPLUS_TAIL})"
        ),
        FunctionSpec(
            "softplus", softplus, "torch.logaddexp({0}, torch.zeros_like({0}))", f"(tl.maximum({{0}}, 0) + {_SOFTPLUS_TAIL})"
        ),
        FunctionSpec("relu", relu, "torch.relu({0})", "tl.maximum({0}, 0)"),
        FunctionSpec("step", step, "({0} > 0).to({0}.dtype)", "tl.where({0} > 0, 1.0, 0.0)"),
        FunctionSpec("elu", elu, "torch.nn.functional.elu({0})", f"tl.where({{0}} > 0, {{0}}, {_EXPM1})"),
        FunctionSpec("erf", erf, "torch.erf({0})", "tl.erf({0})"),
        FunctionSpec("tanh", sympy.tanh, "torch.tanh({0})", _TANH),
        FunctionSpec("sin", sympy.sin, "torch.sin({0})", "tl.sin({0})"),
        FunctionSpec("cos", sympy.cos, "torch.cos({0})", "tl.cos({0})"),
        FunctionSpec("Abs", sympy.Abs, "torch.abs({0})", "tl.abs({0})"),
        FunctionSpec(
            "sign", sympy.sign, "torch.sign({0})", "(tl.where({0} > 0, 1.0, 0.0) - tl.where({0} < 0, 1.0, 0.0))"
        ),
    )
}  # fmt: skip
"""Elementwise functions by the name of their sympy class (``type(node).__name__``)."""


# ------------------------------------------------------------------------------------------------------ what users call


def _lift(build: Callable[[sympy.Expr], sympy.Expr], doc: str) -> Callable[[object], Term]:
    def apply(x: object) -> Term:
        where = here()
        return Term(build(as_term(x, where, 0).expr), where)

    apply.__doc__ = doc + "  Elementwise, on a scalar or a vector over K or V."
    return apply


def _silu(x: sympy.Expr) -> sympy.Expr:
    return x * sigmoid(x)


def _gelu(x: sympy.Expr) -> sympy.Expr:
    return x * (1 + erf(x * number(0.7071067811865476))) / 2


ELEMENTWISE: dict[str, Callable[[object], Term]] = {
    "exp": _lift(exp, "e^x."),
    "log": _lift(log, "ln x, x > 0."),
    "expm1": _lift(expm1, "e^x − 1 without cancellation."),
    "log1p": _lift(log1p, "ln(1 + x) without cancellation."),
    "sigmoid": _lift(sigmoid, "1 / (1 + e^−x)."),
    "logsigmoid": _lift(logsigmoid, "ln sigmoid(x), < 0."),
    "softplus": _lift(softplus, "ln(1 + e^x), > 0."),
    "relu": _lift(relu, "max(x, 0)."),
    "elu": _lift(elu, "x where x > 0, else e^x − 1."),
    "erf": _lift(erf, "The error function."),
    "tanh": _lift(sympy.tanh, "tanh x."),
    "sin": _lift(sympy.sin, "sin x."),
    "cos": _lift(sympy.cos, "cos x."),
    "abs": _lift(sympy.Abs, "|x|; its derivative at 0 is 0."),
    "sign": _lift(sympy.sign, "−1, 0 or 1."),
    "sqrt": _lift(sympy.sqrt, "√x, x ≥ 0."),
    "rsqrt": _lift(lambda x: x ** sympy.Rational(-1, 2), "1 / √x, x > 0."),
    "square": _lift(lambda x: x**2, "x²."),
    "silu": _lift(_silu, "x · sigmoid(x), also called swish."),
    "gelu": _lift(_gelu, "x · Φ(x) with the normal distribution function Φ."),
}
"""The user-facing elementwise functions, exported as ``lsmc.<name>``."""


def softmax(x: object) -> Term:
    """e^{xᵢ} / Σⱼ e^{xⱼ} over the only dim of a vector."""
    where = here()
    term, dim = _vector(x, where, "softmax")
    shifted = exp(term.expr - Max(DIM_SYMBOL[dim], term.expr))
    return Term(shifted / Sum(DIM_SYMBOL[dim], shifted), where)


def mean(x: object) -> Term:
    """(1/n) Σᵢ xᵢ over the only dim of a vector."""
    where = here()
    term, dim = _vector(x, where, "mean")
    return Term(contract(dim, term.expr) / Sum(DIM_SYMBOL[dim], sympy.S.One), where)


def l2norm(x: object, eps: float = 1e-6) -> Term:
    """x / √(Σᵢ xᵢ² + eps) over the only dim of a vector."""
    where = here()
    term, dim = _vector(x, where, "l2norm")
    return Term(term.expr / sympy.sqrt(Sum(DIM_SYMBOL[dim], term.expr**2) + number(eps)), where)


def rmsnorm(x: object, eps: float = 1e-6) -> Term:
    """x / √((1/n) Σᵢ xᵢ² + eps) over the only dim of a vector of n numbers."""
    where = here()
    term, dim = _vector(x, where, "rmsnorm")
    symbol = DIM_SYMBOL[dim]
    return Term(term.expr / sympy.sqrt(Sum(symbol, term.expr**2) / Sum(symbol, sympy.S.One) + number(eps)), where)
