"""The sections of the stages, from the declaration to the backward program, and what stands beside them all."""

from __future__ import annotations

import ast
import html
import linecache
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lsmc.canonical import Canonical
from lsmc.explanation import mathml
from lsmc.explanation.graph import KINDS, picture
from lsmc.explanation.marks import Marks, canonical_lines, declared_lines, name
from lsmc.explanation.pieces import changed, code, details, section, statements
from lsmc.explanation.subject import WAYS, Subject
from lsmc.expr import Field
from lsmc.ir import Program
from lsmc.lsm import LSM
from lsmc.runtime.pages import facts, legend
from lsmc.summary import summary
from lsmc.target import H200

STATES = {"M": "memory", "I": "its imaginary part", "P": "what momentum accumulates", "Z": "normaliser", "Mb": "bias",
          "M0": "memory at the start of the block", "Mb0": "bias at the start of the block", "Mt": "tokens of the block so far"}


def lead(s: Subject, sections: Iterable[str]) -> str:
    """One step as mathematics, the names in it, and links to the sections."""
    c = s.canonical

    def named(f: Field, shape: str, role: str) -> str:
        return (f"<tr data-t='{name(f.name)}' tabindex='0'><td>{mathml.math(mathml.symbol(f.name))}</td>"
                f"<td><code>{shape}</code></td><td>{html.escape(role)}</td></tr>")

    rows = [named(f, f.shape, _role(c, f.name)) for f in c.inputs]
    rows += [named(f, f"({', '.join(('B', 'HV', *f.dims))})", STATES[f.name]) for f in c.states]
    titles = (re.match(r"<section id='(\w+)'><h2>(.*?)</h2>", text) for text in sections)
    links = "".join(f"<a href='#{m[1]}'>{m[2]}<i data-count='{m[1]}'></i></a>" for m in titles if m)
    return (f"<aside><h2>One step</h2>{statements(mathml.step(c))}<table class='names'>{''.join(rows)}</table>"
            "<p class='key'>Point at a name, or at any line, to see where it went; click to keep it marked.</p>"
            f"<nav>{links}</nav></aside>")


def _role(c: Canonical, n: str) -> str:
    """What an input is for, as far as the canonical form says."""
    def within(*parts: Any) -> bool:
        return any(part is not None and any(str(x) == n for x in part.free_symbols) for part in parts)

    key = within(*(w.key for w in c.writes))
    roles = {"log decay": within(c.decay_k, c.decay_v, c.decay_kv), "angle": within(c.phase), "momentum": within(c.momentum),
             "key": key, "key of a read": not key and within(*(r.key for r in c.reads)),
             "query": within(*(y.key for y in c.queries)), "written": within(*(w.value for w in c.writes)),
             "output": within(c.output)}
    return ", ".join(role for role, true in roles.items() if true)


def title(declaration: LSM) -> str:
    """The sentence of the docstring that names a paper, from the line on which it starts."""
    lines = _source(declaration)[3].splitlines()
    at = next((n for n, line in enumerate(lines) if "arXiv" in line), None)
    while at and lines[at - 1].strip() and not lines[at - 1].endswith((".", ":")):
        at -= 1
    return "How it is compiled" if at is None else " ".join(lines[at:]).strip()


def declared(s: Subject) -> str:
    c, forward, backward = s.canonical, s.tokens["f"], s.tokens["b"]
    known = summary(c, lambda _: [d.target for d in s.directions.values()])
    shown = [(known[name], name) for name in ("decay", "update", "state", "chunk form", "message between ranks")]
    said = ""
    if s.on_gpu:
        shown += [(f"{forward.predicted * 1e3:.2f} + {backward.predicted * 1e3:.2f}", "ms, estimated"),
                  (f"{(forward.predicted + backward.predicted) / (forward.floor + backward.floor):.1f} ×", "of the floor")]
        said = f"Times are estimates for {s.sizes()}, on an {H200.name} in bfloat16."
    file, first, lines, _ = _source(s.declaration)
    where = f"<p class='key file'>{html.escape(file)}</p>" if file else ""
    return section("declaration", "Declaration", f"{facts(shown)}{where}{code(declared_lines(lines, c), first, whole=True)}", said)


def canonical(s: Subject) -> str:
    c = s.canonical
    counts = ((len(c.reads), "read", "reads"), (len(c.writes), "write", "writes"), (len(c.queries), "query", "queries"))
    parts = ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n)
    said = (f"Algebra took the declaration apart: {parts}. Every way of reading the memory got a name, what is left of the memory "
            "itself is its decay, and scalars moved from keys to values. Other writings of the same method give the same lines.")
    return section("canonical", "Canonical form", code(canonical_lines(c), whole=True), said)


def chunk(s: Subject) -> str:
    c, program = s.canonical, s.trail.forward
    said = "The same statements for all tokens of a chunk: rows of a tile are tokens. "
    said += ("A decay of every entry by itself does not factor into tokens: they go one after the other, in one operation, and the "
             "states between stay where they are computed." if c.matrix else
             "⟨x, y⟩ holds, for each pair of tokens, what a key finds of what another wrote. Exponents are sums of log decays "
             "between two tokens: none is positive, none is a difference.")
    return section("chunk", "Chunk program", f"{statements(mathml.chunk(c))}{_kinds(program)}"
                   f"{_hoisted(s.trail.derived, program)}{code(s.trail.lines('f'), whole=True)}", said)


def graph(s: Subject) -> str:
    said = ("Each box is one line of the chunk program. The strong way leads from the memory before the chunk to the memory after "
            "it: what every chunk waits for. Dots are the kernels that work a value out; more than one says that it is computed "
            "again rather than stored.")
    return section("graph", "Program graph", _picture(s, "f"), said)


def _picture(s: Subject, way: str) -> str:
    marks, colours, bodies = s.trail.values(way), s.colours(way), s.bodies(way)
    drawn = picture(s.trail.program(way), s.trail.terms(way), lambda i: f"{marks[i]} tabindex='0'",
                    lambda a, b: str(Marks(uses=frozenset({f"{way}{a}", f"{way}{b}"}))),
                    [(colours[n], ops) for n, ops in bodies.items()])
    handed = "; values without a dot come from the forward, which kept them" * (way == "b" and bool(s.trail.kept()))
    return drawn + legend(KINDS.values(), "boxes") + legend(((n, colours[n]) for n in bodies), f"{WAYS[way]} kernels{handed}", "●")


def backward(s: Subject) -> str:
    program = s.trail.backward
    back = ", ".join(c.name for c in program.carries if c.reverse)
    said = (f"Every operation gave its adjoint, from the output back: {len(program.ops)} operations, {len(s.trail.first)} of them "
            "the forward program's own, to be computed again or read back as the schedule decides. "
            f"{', '.join(n for n, _ in program.outputs)} leave; {back} runs against time, from the cotangent of the last memory.")
    return section("backward", "Backward program", f"{_kinds(program)}{_hoisted(s.trail.adjoint, program)}"
                   f"{details('The program', code(s.trail.lines('b')))}{details('Its graph', _picture(s, 'b'))}", said)


def _kinds(program: Program) -> str:
    """How many operations of each kind a program has."""
    count = Counter(op.kind for op in program.ops)
    return f"<p class='chips'>{''.join(f'<span>{n} {kind}</span>' for kind, n in count.most_common())}</p>"


def _hoisted(before: Program, after: Program) -> str:
    return changed(before, after, "Factors of whole rows left the left operands of products and are applied behind them, so that "
                                  "what is multiplied is what was loaded")


def _source(declaration: LSM) -> tuple[str, int, list[str], str]:
    """File name, number of the first line, lines and docstring of the text that declares a method."""
    span = declaration.where.span() if declaration.where else None
    whole = linecache.getlines(span.filename) if span else []
    if span is None or not whole:
        return "", 1, [repr(declaration)], ""
    tree = ast.parse("".join(whole))
    at = next((node for node in tree.body if node.lineno <= span.line <= (node.end_lineno or 0)), None)
    low, high = (at.lineno, at.end_lineno or span.end_line) if at else (span.line, span.end_line)
    body = [node.lineno for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    if high <= 60 and body:  # a file of one method: its symbols are declared above it
        low = min(low, body[0])
    return Path(span.filename).name, low, [line.rstrip("\n") for line in whole[low - 1 : high]], ast.get_docstring(tree) or ""
