"""The elementwise functions of the language: one table, for the reference, the symbolic derivatives and
the emitters.

Each entry of `FUNCTIONS` is a sympy function class with its derivative (`fdiff`), and its source in torch
and in Triton as a template of ``{0}``: in torch any parenthesised expression, in Triton the *name* of a
value, since templates use it repeatedly.  Where the obvious formula loses digits (``log(1 + exp(x))``,
``exp(x) - 1``) the template is the stable one.

These classes are plain sympy; what users call on terms is in `lsmc.maps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from lsmc.expr import number


class _Elementwise(sympy.Function):  # type: ignore[misc]
    nargs = 1

    def _eval_is_extended_real(self) -> bool:
        return True


class exp(_Elementwise):
    """e^x.  (sympy's own exp merges products of exponentials, which would mix dims and signs of
    exponents.)"""

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

    def _eval_is_positive(self) -> bool | None:
        return bool(self.args[0] > 1) if self.args[0].is_Rational else None


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

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        return max(x, sympy.S.Zero) if x.is_Rational else None

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


class bounded(_Elementwise):
    """max(x, −1024), of a log decay: e^x is the same number, 0 where that is below all of float64's, and no multiple is NaN.
    Its derivative is 1, as what is made of such x does not change."""

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        return x if x.is_number and x > -1024 else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.One


class elu(_Elementwise):
    """x where x > 0, else e^x − 1; elu(x) + 1 is the positive feature map of linear attention."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return exp(-relu(-self.args[0]))


class Abs(_Elementwise):
    """|x|; its derivative at 0 is 0. (The derivatives of sympy's own end in Dirac's delta.)"""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sign(self.args[0])

    def _eval_is_nonnegative(self) -> bool:
        return True


class sign(_Elementwise):
    """−1, 0 or 1."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


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


# ln(1 + y) for y in (−1/2, 1] by 2·artanh(y / (2 + y)): hardware logarithms have absolute, not relative,
# accuracy near 1
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
            "softplus", softplus, "-torch.nn.functional.logsigmoid(-{0})", f"(tl.maximum({{0}}, 0) + {_SOFTPLUS_TAIL})"
        ),
        FunctionSpec("relu", relu, "torch.relu({0})", "tl.maximum({0}, 0)"),
        FunctionSpec("step", step, "torch.relu(torch.sign({0}))", "tl.where({0} > 0, 1.0, 0.0)"),
        FunctionSpec("bounded", bounded, "torch.clamp({0}, min=-1024)", "tl.maximum({0}, -1024)"),
        FunctionSpec("elu", elu, "torch.nn.functional.elu({0})", f"tl.where({{0}} > 0, {{0}}, {_EXPM1})"),
        FunctionSpec("erf", erf, "torch.erf({0})", "tl.erf({0})"),
        FunctionSpec("tanh", sympy.tanh, "torch.tanh({0})", _TANH),
        FunctionSpec("sin", sympy.sin, "torch.sin({0})", "tl.sin({0})"),
        FunctionSpec("cos", sympy.cos, "torch.cos({0})", "tl.cos({0})"),
        FunctionSpec("Abs", Abs, "torch.abs({0})", "tl.abs({0})"),
        FunctionSpec(
            "sign", sign, "torch.sign({0})", "(tl.where({0} > 0, 1.0, 0.0) - tl.where({0} < 0, 1.0, 0.0))"
        ),
    )
}  # fmt: skip
"""Elementwise functions by the name of their sympy class (``type(node).__name__``)."""
