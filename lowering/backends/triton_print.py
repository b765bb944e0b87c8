"""Elementwise expressions → Triton source."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from lsmc.functions import FUNCTIONS


class Expression:
    """Prints elementwise expressions as statements on named values; equal subexpressions are computed once."""

    def __init__(self, prefix: str, names: list[str], columns: Iterable[sympy.Symbol] = ()) -> None:
        self.prefix, self.lines, self.columns = prefix, list[str](), set(columns)
        self.known: dict[sympy.Basic, str] = {sympy.Symbol(f"x{i}", real=True): n for i, n in enumerate(names)}

    def __call__(self, e: sympy.Basic) -> str:
        if e.is_number and not e.free_symbols:
            return f"({float(e)!r})"
        if e not in self.known:
            text = self._text(e)
            self.known[e] = name = f"{self.prefix}_{len(self.lines)}"
            self.lines.append(f"{name} = {text}")
        return self.known[e]

    def _text(self, e: sympy.Basic) -> str:
        if e.is_Add:
            return " + ".join(self(a) for a in e.args)
        if e.is_Mul:
            narrow = [a for a in e.args if a.free_symbols <= self.columns]
            if len(narrow) < len(e.args) and any(a.is_Pow and a.exp.is_negative for a in narrow):  # a division for each row
                return " * ".join(self(a) for a in (sympy.Mul(*narrow), *(a for a in e.args if a not in narrow)))
            top = [a for a in e.args if not (a.is_Pow and a.exp == -1)]
            bottom = [a.base for a in e.args if a.is_Pow and a.exp == -1]
            text = " * ".join(self(a) for a in top) or "1.0"
            return f"({text}) / ({' * '.join(self(a) for a in bottom)})" if bottom else text
        if e.is_Pow:
            odd = 2 * abs(e.exp)
            if odd.is_Integer and odd % 2 and 1 < odd <= 8:
                return " * ".join([self(sympy.Pow(e.base, sympy.sign(e.exp) / 2))] * int(odd))
            return self._power(self(e.base), e.exp)
        name = type(e).__name__
        if name == "exp":
            return f"exp({self(e.args[0])})"
        if name in FUNCTIONS:
            return FUNCTIONS[name].triton.format(self(e.args[0]))
        if name in ("Max", "Min"):
            text = self(e.args[0])
            for a in e.args[1:]:
                text = f"tl.{name.lower()}imum({text}, {self(a)})"
            return text
        raise AssertionError(f"no Triton source for {e}")

    @staticmethod
    def _power(base: str, n: sympy.Expr) -> str:
        if n == sympy.Rational(1, 2):
            return f"tl.sqrt({base})"
        if n == -sympy.Rational(1, 2):
            return f"tl.rsqrt({base})"
        if n.is_Integer and 0 < abs(int(n)) <= 8:
            product = " * ".join([base] * abs(int(n)))
            return product if n > 0 else f"1.0 / ({product})"
        return f"tl.exp2(tl.log2({base}) * {float(n)!r})"
