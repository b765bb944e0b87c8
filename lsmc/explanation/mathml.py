"""Mathematics as MathML, which browsers render by themselves: expressions, one step of a recurrence, and its chunk form.

Every symbol carries the name of what it stands for, in `data-t`, so that a page can find it again elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from lsmc.canonical import Canonical
from lsmc.chunk import ACCUMULATOR, BIAS, MEMORY, NORMALIZER
from lsmc.expr import Field, Max, Over, Pairs, Sum, dims_of, show

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ", "kappa": "κ",
    "lambda": "λ", "lam": "λ", "mu": "μ", "nu": "ν", "xi": "ξ", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "chi": "χ",
    "psi": "ψ", "omega": "ω",
}  # fmt: skip
SUM, PRODUCT, POWER = 0, 1, 2
"""How tightly an expression binds; what binds less than its place asks for stands in parentheses."""


@dataclass(frozen=True)
class Line:
    """One statement, its name among the terms of the program (empty for none), and what it says in words."""

    term: str
    math: str
    words: str


def row(*parts: str) -> str:
    return f"<mrow>{''.join(parts)}</mrow>"


def op(sign: str, space: str = "") -> str:
    around = f" lspace='{space}' rspace='{space}'" if space else ""
    return f"<mo{around}>{html.escape(sign)}</mo>"


THIN, RELATION, NO_SPACE = "<mspace width='0.17em'/>", "0.28em", "0em"
EQUALS, PLUS, TIMES = op("=", RELATION), op("+", "0.22em"), op("⊙", "0.12em")


def math(*parts: str) -> str:
    return f"<math>{row(*parts)}</math>"


def fenced(inner: str) -> str:
    return row(op("(", NO_SPACE), inner, op(")", NO_SPACE))


def sup(base: str, exponent: str) -> str:
    return f"<msup>{row(base)}{row(exponent)}</msup>"


def sub(base: str, index: str) -> str:
    return f"<msub>{row(base)}{row(index)}</msub>"


def symbol(name: str, shown: str | None = None) -> str:
    """A symbol by its name: Greek letters, indices behind digits, words upright; `log_a` and the like as two words."""
    base, _, index = (shown or name).partition("_")
    if not index and (found := re.fullmatch(r"(.*?)(\d+)", base)):
        base, index = found[1], found[2]
    words = GREEK.get(base, base)
    upright = " mathvariant='normal'" if len(words) > 1 else ""
    made = f"<mi{upright}>{html.escape(words)}</mi>"
    if index:
        index = GREEK.get(index, index)
        kind = "mn" if index.isdigit() else "mi"
        made = (f"<mrow>{made}{THIN}<mi>{html.escape(index)}</mi></mrow>" if base == "log"
                else f"<msub>{made}<{kind}>{html.escape(index)}</{kind}></msub>")
    return f"<mrow data-t='n-{html.escape(name, quote=True)}'>{made}</mrow>"


def expression(e: sympy.Expr, bind: int = SUM) -> str:
    """An elementwise expression with contractions."""
    made, own = _expression(e)
    return fenced(made) if own < bind else made


def _expression(e: sympy.Expr) -> tuple[str, int]:
    if isinstance(e, sympy.Symbol):
        return symbol(str(e)), POWER
    if e.is_Rational:
        p, q = int(e.p), int(e.q)
        if q > 1000:
            digits, _, ten = f"{abs(float(e)):g}".partition("e")
            made = f"<mn>{digits}</mn>"
            if ten:
                high = sup("<mn>10</mn>", row(*[op("−", NO_SPACE)] * (int(ten) < 0), f"<mn>{abs(int(ten))}</mn>"))
                made = high if digits == "1" else row(made, op("·"), high)
            return (row(op("−", NO_SPACE), made), SUM) if p < 0 else (made, PRODUCT)
        made = f"<mn>{abs(p)}</mn>" if q == 1 else f"<mfrac><mn>{abs(p)}</mn><mn>{q}</mn></mfrac>"
        return (row(op("−", NO_SPACE), made), SUM) if p < 0 else (made, POWER)
    if e.is_Add:
        return _sum(e), SUM
    if e.is_Mul:
        return _product(e)
    if e.is_Pow:
        return _power(e)
    if isinstance(e, Sum):
        sign = f"<munder>{op('max' if isinstance(e, Max) else '∑')}<mi>{e.dim}</mi></munder>"
        return row(sign, THIN, expression(e.body, PRODUCT)), PRODUCT
    if isinstance(e, Over):  # the same numbers
        return _expression(e.args[1])
    if isinstance(e, Pairs):
        return row(expression(e.args[0], POWER), op("⊗"), expression(e.args[0], POWER)), PRODUCT
    inner, name = e.args[0] if e.args else sympy.S.Zero, type(e).__name__
    if name == "exp":
        return sup("<mi>e</mi>", expression(inner)), POWER
    if name == "expm1":
        return row(sup("<mi>e</mi>", expression(inner)), op("−"), "<mn>1</mn>"), SUM
    if name == "Abs":
        return row(op("|", NO_SPACE), expression(inner), op("|", NO_SPACE)), POWER
    if name == "logsigmoid":
        return row("<mi mathvariant='normal'>log</mi>", THIN, "<mi>σ</mi>", fenced(expression(inner))), PRODUCT
    shown = {"sigmoid": "σ", "log1p": "log"}.get(name, name)
    inside = expression(1 + inner if name == "log1p" else inner)
    upright = " mathvariant='normal'" if len(shown) > 1 else ""
    return row(f"<mi{upright}>{html.escape(shown)}</mi>", fenced(inside)), POWER


def _sum(e: sympy.Expr) -> str:
    """Terms without a minus first, so that no sum starts with one if it need not."""
    parts = sorted(e.args, key=lambda a: (a.could_extract_minus_sign(), show(a)))
    out: list[str] = []
    for n, part in enumerate(parts):
        negative = part.could_extract_minus_sign()
        out += [op("−" if negative else "+")] if n or negative else []
        out.append(expression(-part if negative else part, PRODUCT))
    return row(*out)


def _product(e: sympy.Expr) -> tuple[str, int]:
    if e.could_extract_minus_sign():
        return row(op("−", NO_SPACE), expression(-e, PRODUCT)), SUM
    factors = list(e.args)
    below = [f for f in factors if f.is_Pow and f.exp.is_number and f.exp.is_negative]
    above = [f for f in factors if f not in below]
    number = [f for f in above if f.is_number]
    if number and number[0].is_Rational and number[0].q > 1 and number[0].q <= 1000:
        below.append(1 / sympy.Integer(number[0].q))
        above = [f if f is not number[0] else sympy.Integer(number[0].p) for f in above]
        above = [f for f in above if f != 1]
    if below:
        bottom = sympy.Mul(*(1 / f for f in below))
        return f"<mfrac>{row(_juxtaposed(above) if above else '<mn>1</mn>')}{row(expression(bottom))}</mfrac>", PRODUCT
    return _juxtaposed(above), PRODUCT


def _juxtaposed(factors: Iterable[sympy.Expr]) -> str:
    """Numbers, then scalars, then what varies, sums last; ⊙ between two that both vary over K or V."""
    parts = sorted(factors, key=lambda f: (not f.is_number, bool(dims_of(f)), f.is_Add, show(f)))
    out: list[str] = []
    varies = False
    for n, part in enumerate(parts):
        wide = bool(dims_of(part))
        out += [TIMES if wide and varies else THIN] if n else []
        out.append(expression(part, POWER if len(parts) > 1 else PRODUCT))
        varies |= wide
    return row(*out)


def _power(e: sympy.Expr) -> tuple[str, int]:
    base, exponent = e.base, e.exp
    if exponent.is_number and exponent.is_negative:
        return f"<mfrac><mn>1</mn>{row(expression(1 / e))}</mfrac>", PRODUCT
    if exponent == sympy.Rational(1, 2):
        return f"<msqrt>{row(expression(base))}</msqrt>", POWER
    return sup(expression(base, POWER), expression(exponent)), POWER


def tidy(e: sympy.Expr) -> sympy.Expr:
    """What a sum has in common stands in front of it: β v − β R as β (v − R)."""
    made = sympy.factor_terms(e) if e.is_Add and not e.atoms(Sum) else e
    return made if sympy.expand(made - e) == 0 else e


# -- one step ---------------------------------------------------------------------------------------------------------


def _memory(of: str, at: str) -> str:
    """A memory before the step, after its decay, after its write."""
    here = {"previous": op("−", NO_SPACE) + "<mn>1</mn>"}.get(at, "")
    base = symbol(of)
    if at == "decayed":
        return sup(base, op("′", NO_SPACE))
    return sub(base, row("<mi>t</mi>", here))


def _transposed(e: sympy.Expr) -> str:
    return sup(expression(e, POWER), op("⊤"))


def _written(key: sympy.Expr, value: str) -> str:
    if not dims_of(key) and key != 1:
        return row(expression(key, PRODUCT), THIN, value)
    return row(_transposed(key) if key != 1 else sup("<mn>1</mn>", op("⊤")), THIN, value)


def added(parts: Iterable[str]) -> str:
    """a + b + …"""
    return row(*(x for n, part in enumerate(parts) for x in ([PLUS] * bool(n) + [part])))


def power(exponent: str) -> str:
    return sup("<mi>e</mi>", exponent)


def _factor(log: sympy.Expr, exponent: str) -> str:
    """e^… as it multiplies a memory: a number, or the diagonal of a matrix."""
    return row("<mi mathvariant='normal'>diag</mi>", fenced(power(exponent))) if dims_of(log) else power(exponent)


def _decayed(c: Canonical, memory: str) -> str:
    """e^{…} on the side, and in the way, in which each part of the decay acts."""
    left = [power(expression(c.decay_kv)), TIMES] if c.decay_kv is not None else []
    along = [expression(c.decay_k)] if c.decay_k is not None else []
    along += [row("<mi>i</mi>", THIN, expression(c.phase, PRODUCT))] if c.phase is not None else []
    if along:
        both = sympy.Add(*(part for part in (c.decay_k, c.phase) if part is not None))
        left += [_factor(both, added(along)), THIN]
    right = [THIN, _factor(c.decay_v, expression(c.decay_v))] if c.decay_v is not None else []
    return row(*left, memory, *right)


def _start(c: Canonical, of: str) -> str:
    """A memory at the start of a block of several tokens."""
    return symbol(f"{of}0", f"{of}_0") if c.block is not None and c.block > 1 else ""


def _times(key: sympy.Expr, memory: str) -> str:
    return memory if key == 1 else row(expression(key, PRODUCT), THIN, memory)


def _reads(c: Canonical, value: sympy.Expr) -> bool:
    """Whether a written value depends on the memory."""
    return bool(value.free_symbols & {r.symbol for r in c.reads})


def step(c: Canonical) -> list[Line]:
    """One step of a method in its canonical form, a statement for each term."""
    decays = bool(c.decays or c.phase is not None)
    out: list[Line] = []
    if decays:
        out.append(Line("decay", math(_memory(MEMORY, "decayed"), EQUALS, _decayed(c, _memory(MEMORY, "previous"))),
                        "the memory decays" + " and turns" * (c.phase is not None)))
    for r in c.reads:
        of = _start(c, r.of) or _memory(r.of, r.at if decays else "previous")
        when = (" at the start of its block" if c.block is not None else " after its decay" if r.at == "decayed" else
                " before its decay" * decays)
        out.append(Line(r.symbol.name, math(symbol(r.symbol.name), EQUALS, _times(r.key, of)), "it is read" + when))
    for n, w in enumerate(c.writes):
        out.append(Line(f"U{n}", math(symbol(f"U{n}"), EQUALS, expression(tidy(w.value))),
                        "what is written" + ", from what was read" * _reads(c, w.value)))
    kept = _memory(MEMORY, "decayed" if decays else "previous")
    writes = added(_written(w.key, symbol(f"U{n}")) for n, w in enumerate(c.writes))
    if c.momentum is not None:
        before = row(power(expression(c.momentum)), THIN, _memory(ACCUMULATOR, "previous"))
        out.append(Line("momentum", math(_memory(ACCUMULATOR, "updated"), EQUALS, added([before, writes])), "writes accumulate"))
        writes = _memory(ACCUMULATOR, "updated")
    out.append(Line(MEMORY, math(_memory(MEMORY, "updated"), EQUALS, added([kept, writes] if c.writes else [kept])),
                    "the memory after the step"))
    if c.normalizer:
        before = _memory(NORMALIZER, "previous")
        before = before if c.decay_k is None else row(_factor(c.decay_k, expression(c.decay_k)), THIN, before)
        ones = [_transposed(w.key) for w in c.writes]
        out.append(Line(NORMALIZER, math(_memory(NORMALIZER, "updated"), EQUALS, added([before, *ones])), "the normaliser"))
    if c.bias:
        before = _memory(BIAS, "previous") if not decays else _decayed(c, _memory(BIAS, "previous"))
        values = [symbol(f"U{n}") for n in range(len(c.writes))]
        out.append(Line(BIAS, math(_memory(BIAS, "updated"), EQUALS, added([before, *values])), "the bias"))
    if c.block is not None and c.block > 1:
        out.append(Line("M0", math(_start(c, MEMORY), EQUALS, sub(symbol(MEMORY), row(symbol("Mt", "t"), op("−"), symbol("Mt")))),
                        f"the memory at the start of its block of {c.block}, Mt tokens ago"))
    for y in c.queries:
        found = _times(y.key, _memory(y.of, y.at if decays or y.at == "updated" else "previous"))
        if c.phase is not None and y.of == MEMORY:
            found = row("<mi mathvariant='normal'>Re</mi>", fenced(found))
        out.append(Line(y.symbol.name, math(symbol(y.symbol.name), EQUALS, found), "the query"))
    out.append(Line("o", math(symbol("o"), EQUALS, expression(tidy(c.output))), "the output"))
    return out


# -- a chunk of tokens ------------------------------------------------------------------------------------------------

_I, _J, _L, _N, END = (f"<mi>{letter}</mi>" for letter in "ijlmC")
ZERO = "<mn>0</mn>"


def chunk(c: Canonical) -> list[Line]:
    """The same for C tokens: rows are tokens, M₀ is the memory before the chunk, ⟨x, y⟩ a (T, T) matrix of decayed products."""
    if c.matrix:
        writes = [_written(w.key, symbol(f"U{n}")) for n, w in enumerate(c.writes)]
        before = _decayed(c, _memory(MEMORY, "previous"))
        ends = {f"U{n}" for n in range(len(c.writes))} | {y.symbol.name for y in c.queries} | {"o"}
        return [*(line for line in step(c) if line.term in ends),
                Line(MEMORY, math(_memory(MEMORY, "updated"), EQUALS, added([before, *writes])), "token by token")]
    out = _definitions(c)

    def found(key: sympy.Expr, of: str, at: str) -> str:
        parts = [row(f"<mover>{row(expression(key, POWER))}{op('~')}</mover>", THIN, symbol(of, f"{of}_0"))]
        for n, w in enumerate(c.writes):
            other = expression(w.key) if of != BIAS else "<mn>1</mn>"
            weights = sub(_pair(expression(key), other), op("≤" if at == "updated" else "<"))
            parts.append(row(weights, THIN, symbol(f"U{n}") if of != NORMALIZER else "<mn>1</mn>"))
        return added(parts)

    for r in c.reads:
        known = None if c.block is None else _times(r.key, _start(c, r.of) or _memory(r.of, "previous"))
        words = ("every token reads the memory before the chunk, and what earlier tokens wrote" if known is None else
                 "all tokens read the same memory")
        out.append(Line(r.symbol.name, math(symbol(r.symbol.name), EQUALS, known or found(r.key, r.of, r.at)), words))
    for n, w in enumerate(c.writes):
        solved = _reads(c, w.value) and c.block is None
        words = "each value needs those before it: one unit lower-triangular system" if solved else "all values at once"
        out.append(Line(f"U{n}", math(symbol(f"U{n}"), EQUALS, expression(tidy(w.value))), words))
    for y in c.queries:
        out.append(Line(y.symbol.name, math(symbol(y.symbol.name), EQUALS, found(y.key, y.of, y.at)), "all queries at once"))
    if c.queries and c.output != c.queries[0].symbol:
        out.append(Line("o", math(symbol("o"), EQUALS, expression(tidy(c.output))), "the output"))
    out.append(Line(MEMORY, math(sub(symbol(MEMORY), END), EQUALS, added(_after(c))), "the memory after the chunk"))
    return out


def _pair(x: str, y: str) -> str:
    return row(op("⟨", NO_SPACE), x, op(",", NO_SPACE), THIN, y, op("⟩", NO_SPACE))


def _over(low: str, high: str, what: str, index: str = _L) -> str:
    """The sum of `what` over the tokens behind `low`, up to `high`."""
    return row(sub(op("∑"), row(index, op("∈"), op("(", NO_SPACE), low, op(",", NO_SPACE), high, op("]", NO_SPACE))), THIN, what)


def _at(e: sympy.Expr, index: str) -> str:
    """A log decay, or an angle, at one token."""
    return sub(expression(e) if isinstance(e, Field) else fenced(expression(e)), index)


def _kept(c: Canonical, low: str, high: str) -> list[str]:
    """The decay of a memory with momentum between two tokens, if it decays."""
    return [power(_over(low, high, _at(c.decay_k, _N), _N)), THIN] if c.decay_k is not None else []


def _definitions(c: Canonical) -> list[Line]:
    """What ~ and ⟨ , ⟩ mean under this method's decay."""
    x, y = sub("<mi>x</mi>", _I), sub("<mi>y</mi>", _J)
    pair, tilde = sub(_pair("<mi>x</mi>", "<mi>y</mi>"), row(_I, _J)), sub(f"<mover><mi>x</mi>{op('~')}</mover>", _I)
    gates = [g for g in (c.decay_k, c.decay_v) if g is not None]
    if c.momentum is not None:
        through = row(sub(op("∑"), _L), THIN, *_kept(c, _L, _I), power(_over(_J, _L, _at(c.momentum, _N), _N)))
        return [Line("momentum", math(pair, EQUALS, row(x, op("·"), y), THIN, through),
                     "what token j wrote reaches token i through every accumulation l between them, a product of two triangles; "
                     "x̃ M₀ counts what the accumulator before the chunk adds")]
    if not gates and c.phase is None:
        return [Line("", math(pair, EQUALS, row(x, op("·"), y), op(","), THIN, tilde, EQUALS, x),
                     "without a decay: plain products, of the tokens before")]
    late = "previous" in [*(r.at for r in c.reads), *(y.at for y in c.queries)] and bool(c.decays)
    words = "what token j wrote, as token i finds it" + "; reads before the decay leave out their own token's" * late
    turned = [TIMES, "<mi mathvariant='normal'>cos</mi>", fenced(_over(_J, _I, _at(c.phase, _L)))] if c.phase is not None else []
    words += "; cos(a − b) splits into two products" * (c.phase is not None)
    words += "; the part along V stays inside the product with U" * (c.decay_v is not None)
    between = power(added(_over(_J, _I, _at(g, _L)) for g in gates)) if gates else ""
    along = [_over(ZERO, _I, _at(c.decay_k, _L))] if c.decay_k is not None else []
    along += [row("<mi>i</mi>", THIN, _over(ZERO, _I, _at(c.phase, _L)))] if c.phase is not None else []
    scalar = not any(dims_of(g) for g in (*gates, c.phase) if g is not None)
    from_start = row(power(added(along)), THIN, x) if scalar else row(x, TIMES, power(added(along))) if along else x
    start = Line("decay", math(tilde, EQUALS, from_start), "decay from the chunk's start")
    if scalar:
        return [Line("decay", math(pair, EQUALS, between, THIN, row(x, op("·"), y), *turned), words), start]
    inner = row(x, TIMES, y, *([TIMES, between] if between else []), *turned)
    return [Line("decay", math(pair, EQUALS, f"<munder>{op('∑')}<mi>K</mi></munder>", THIN, fenced(inner)), words), start]


def _after(c: Canonical) -> list[str]:
    """M_C from M₀ and the writes, each under the decay from its token to the chunk's end."""
    start = symbol(MEMORY, f"{MEMORY}_0")
    if c.momentum is not None:
        later = row(sub(op("∑"), _L), THIN, *_kept(c, _L, END), sub(symbol(ACCUMULATOR), _L))
        return [row(*_kept(c, ZERO, END), start), later]
    parts = [_at(g, _L) for g in (c.decay_k, c.decay_v) if g is not None]
    parts += [row("<mi>i</mi>", THIN, _at(c.phase, _L))] if c.phase is not None else []
    log = fenced(added(parts)) if len(parts) > 1 else row(*parts)
    out = [row(power(_over(ZERO, END, log)), TIMES, start) if parts else start]
    for n, w in enumerate(c.writes):
        key = expression(w.key, POWER)
        if parts:
            key = fenced(row(key, TIMES, power(_over(_I, END, log))))
        out.append(row(sup(key, op("⊤")), THIN, symbol(f"U{n}")))
    return out


__all__ = ["Line", "chunk", "expression", "math", "step", "symbol", "tidy"]
