"""One exception class per user mistake, each showing the source line and the offending term.

    lsmc.LsmShapeError: own.py:7: M = decay(a) * M + outer(k, v)
                                      ^^^^^^^^ decay has dims (V,); this memory decays along (K,)
    help: declare a = Vector("a", over="K")

Every class derives from `LsmError`.  An error carries `rule` (what was broken), `where` (a `Where`, or
None) and `help` (a way out, or None).  The text of an error is laid out for the prefix ``lsmc.<Class>: ``
with which Python, pytest and the command line print it, so that the carets stand under the term.
"""

from __future__ import annotations

import ast
import linecache
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from types import CodeType

# Frames of these modules are the compiler's own: the user's line is the first one outside them.
# `lsmc.zoo` and `lsmc.models` are users of the language like any other file.
_OWN = frozenset(
    f"lsmc.{name}"
    for name in (
        "errors",
        "expr",
        "terms",
        "functions",
        "maps",
        "decays",
        "lsm",
        "canonical",
        "inputs",
        "reference",
        "api",
        "pipeline",
    )
) | {"lsmc", "functools", "importlib", "dataclasses"}


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of one source file: 1-based lines, 0-based columns; `col` is None where Python kept no
    columns."""

    filename: str
    line: int
    end_line: int
    col: int | None
    end_col: int | None

    def text(self) -> str | None:
        """The spanned source text, or None when the source or the columns are not at hand."""
        if self.col is None or self.end_col is None:
            return None
        lines = [linecache.getline(self.filename, n) for n in range(self.line, self.end_line + 1)]
        if not lines or not all(lines):
            return None
        raw = [line.encode() for line in lines]
        raw[-1] = raw[-1][: self.end_col]
        raw[0] = raw[0][self.col :]
        return b"".join(raw).decode(errors="replace")

    def narrowed(self, find: Callable[[ast.expr], ast.expr | None]) -> Span:
        """The span of the sub-expression that `find` picks from the parsed text; the whole span when it
        finds none."""
        text = self.text()
        if text is None or self.col is None:
            return self
        try:
            node = find(ast.parse("(" + text + ")", mode="eval").body)
        except (SyntaxError, ValueError):
            return self
        if node is None or node.end_lineno is None or node.end_col_offset is None:
            return self

        def place(line: int, col: int) -> tuple[int, int]:
            return self.line + line - 1, col - 1 + (self.col or 0) if line == 1 else col

        line, col = place(node.lineno, node.col_offset)
        end_line, end_col = place(node.end_lineno, node.end_col_offset)
        return Span(self.filename, line, end_line, col, end_col)


@dataclass(frozen=True, slots=True, eq=False)
class Where:
    """A place in the user's source: an instruction of a code object, turned into line and columns only
    when asked.

    `operand` is "left", "right" (of a binary operator), an argument position or a keyword of a call: the
    part to underline.
    """

    code: CodeType
    instruction: int
    line: int
    operand: str | int | None = None

    def at(self, operand: str | int) -> Where:
        """The same place, underlining one operand or argument of the expression there."""
        return Where(self.code, self.instruction, self.line, operand)

    def span(self) -> Span:
        """Line and columns of the expression (or of the chosen operand)."""
        found = next(islice(self.code.co_positions(), self.instruction // 2, None), (None, None, None, None))
        line = found[0] or self.line
        span = Span(self.code.co_filename, line, found[1] or line, found[2], found[3])
        return span if self.operand is None else span.narrowed(self._pick)

    def _pick(self, node: ast.expr) -> ast.expr | None:
        if isinstance(node, ast.BinOp):
            return {"left": node.left, "right": node.right}.get(str(self.operand))
        if isinstance(node, ast.UnaryOp):
            return node.operand
        if isinstance(node, ast.Call):
            if isinstance(self.operand, int):
                return node.args[self.operand] if self.operand < len(node.args) else None
            return next((word.value for word in node.keywords if word.arg == self.operand), None)
        if isinstance(node, ast.Subscript):
            return node.slice
        return None


def here() -> Where | None:
    """The place in the user's source that is being executed: the innermost frame outside the compiler."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _OWN:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return Where(frame.f_code, frame.f_lasti, frame.f_lineno)


class LsmError(Exception):
    """A mistake in a declaration or in a call.  `str(error)` shows the place, the rule and a way out."""

    __module__ = "lsmc"

    def __init__(self, rule: str, *, where: Where | None = None, help: str | None = None) -> None:
        self.rule = rule
        self.where = where
        self.help = help
        super().__init__(self._layout())

    def _layout(self) -> str:
        tail = "" if self.help is None else f"\nhelp: {self.help}"
        if self.where is None:
            return self.rule + tail
        span = self.where.span()
        place = f"{os.path.basename(span.filename)}:{span.line}: "
        line = linecache.getline(span.filename, span.line).rstrip("\n")
        if not line.strip():
            return f"{place}{self.rule}{tail}"
        source = line.strip()
        if span.col is None or span.end_col is None:
            return f"{place}{source}\n    {self.rule}{tail}"
        # columns are byte offsets; the carets must count characters
        raw = line.encode()
        start = len(raw[: span.col].decode(errors="replace"))
        end = len(raw[: span.end_col].decode(errors="replace")) if span.end_line == span.line else len(line)
        lead = len(line) - len(line.lstrip())
        margin = len(f"lsmc.{type(self).__name__}: ") + len(place) + start - lead
        return f"{place}{source}\n{' ' * margin}{'^' * max(1, end - start)} {self.rule}{tail}"

    def __reduce__(self) -> tuple[Callable[..., LsmError], tuple[object, ...]]:
        return _rebuild, (type(self), self.rule, self.help, str(self))


def _rebuild(cls: type[LsmError], rule: str, help: str | None, text: str) -> LsmError:
    """Unpickles an error: the place is gone (code objects do not travel), the text that showed it stays."""
    error = cls(rule, help=help)
    error.args = (text,)
    return error


class LsmUnknownSymbolError(LsmError, AttributeError):
    """A symbol that nobody declared: a bare string, a foreign sympy symbol, or `M.something` that the
    memory lacks."""

    __module__ = "lsmc"


class LsmShapeError(LsmError):
    """A tensor's shape disagrees with the declaration or with the other tensors."""

    __module__ = "lsmc"


class LsmDimsError(LsmShapeError):
    """Named dims inside a declaration do not fit: `k + v`, `v @ M`, a decay over the wrong dim, a readout
    not over V."""

    __module__ = "lsmc"


class LsmDeclarationError(LsmError):
    """An argument of the declaration language is of the wrong kind: `decay="g"`, an update that is a
    number, …"""

    __module__ = "lsmc"


class LsmUpdateError(LsmError):
    """The update (or readout) cannot be written as reads, outer products and a decay of the memory."""

    __module__ = "lsmc"


class LsmNotAffineError(LsmError):
    """The written values are not affine in what was read, so the tokens of a chunk cannot be solved
    together."""

    __module__ = "lsmc"

    @classmethod
    def of(
        cls, name: str, value: object, reads: Iterable[object], where: Where | None = None
    ) -> LsmNotAffineError:
        """The error for method `name` whose written `value` depends on `reads` other than affinely."""
        which = ", ".join(str(read) for read in reads)
        return cls(
            f"{name}: the written value {value} is not affine in {which}; a chunk of tokens cannot be solved together",
            where=where,
            help="block=16 reads at the start of blocks of 16 tokens, block=1 runs them one after the other; or make the "
            "correction linear in the read",
        )


class LsmNoChunkFormError(LsmError):
    """The declaration is legal (the reference runs it) but no chunk-parallel form of it is known."""

    __module__ = "lsmc"


class LsmCausalityError(LsmError):
    """A declaration looks at a later token."""

    __module__ = "lsmc"


class LsmDelayError(LsmError):
    """A declaration looks at an earlier token other than through the memory."""

    __module__ = "lsmc"


class LsmMissingInputError(LsmError, TypeError):
    """A call lacks an input that the declaration uses."""

    __module__ = "lsmc"


class LsmUnexpectedInputError(LsmError, TypeError):
    """A call passes an input that the declaration does not use."""

    __module__ = "lsmc"


class LsmDtypeError(LsmError, TypeError):
    """A tensor has a dtype that the method cannot run in, or an input is no tensor."""

    __module__ = "lsmc"


class LsmDecayError(LsmError):
    """A log decay that is positive for certain: the memory would grow without bound."""

    __module__ = "lsmc"


class LsmDuplicateNameError(LsmError):
    """One name declared twice with different meanings."""

    __module__ = "lsmc"


class LsmNameError(LsmError):
    """A name that must not reach generated code: not an identifier, a keyword, or reserved by the
    compiler."""

    __module__ = "lsmc"


class LsmSequenceError(LsmError):
    """`cu_seqlens` does not describe packed sequences: B ≠ 1, not starting at 0, decreasing, or not ending
    at T."""

    __module__ = "lsmc"


class LsmOptionError(LsmError, ValueError):
    """An option of a call that is none of those there are: a chunk length, a schedule, a graph pass."""

    __module__ = "lsmc"


class LsmDerivativeError(LsmError):
    """A derivative of a derivative: the backward program is derived, its own backward program is not."""

    __module__ = "lsmc"


class LsmCheckError(LsmError):
    """`lsmc.check` found a case in which the compiled operator breaks a law; the message shows the
    smallest one."""

    __module__ = "lsmc"


ERRORS: tuple[type[LsmError], ...] = (
    LsmUnknownSymbolError,
    LsmShapeError,
    LsmDimsError,
    LsmDeclarationError,
    LsmUpdateError,
    LsmNotAffineError,
    LsmNoChunkFormError,
    LsmCausalityError,
    LsmDelayError,
    LsmMissingInputError,
    LsmUnexpectedInputError,
    LsmDtypeError,
    LsmDecayError,
    LsmDuplicateNameError,
    LsmNameError,
    LsmSequenceError,
    LsmOptionError,
    LsmDerivativeError,
    LsmCheckError,
)
"""Every error class; each has a failing program in tests/errors/."""
