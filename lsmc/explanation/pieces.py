"""Pieces of the page: sections, lines of code with their marks, meters, times."""

from __future__ import annotations

import html
import keyword
import re
from collections import Counter
from collections.abc import Iterable

from lsmc.explanation.marks import Marks, name
from lsmc.explanation.mathml import Line
from lsmc.ir import Program

TOKENS = re.compile(r"(#.*$)|(\"[^\"]*\"|'[^']*')|\b([A-Za-z_]\w*)\b|(%\d+)")


def section(key: str, title: str, inner: str, said: str = "") -> str:
    """A section with what is to be said of it first."""
    words = f"<p class='said'>{html.escape(said, quote=False)}</p>" if said else ""
    return f"<section id='{key}'><h2>{html.escape(title)}</h2>{words}{inner}</section>"


def details(title: str, inner: str) -> str:
    """What is shown when asked for; `title` is HTML."""
    return f"<details><summary>{title}<i class='count'></i></summary>{inner}</details>"


def statements(lines: Iterable[Line]) -> str:
    """Mathematics with words behind each line."""
    def shown(line: Line) -> str:
        about = f" data-t='{name(line.term)}' tabindex='0'" if line.term else ""
        return f"<div class='stated'{about}>{line.math}<span>{html.escape(line.words)}</span></div>"

    return f"<div class='maths'>{''.join(map(shown, lines))}</div>"


def code(lines: Iterable[tuple[str, Marks] | tuple[str, Marks, str]], first: int | None = None, whole: bool = False) -> str:
    """Lines of text with marks, numbered from `first`; a third entry is a name that stands behind its line."""
    out = []
    for n, (line, marks, *label) in enumerate(lines):
        number = "" if first is None else f"<b>{first + n}</b>"
        behind = f"<em>{html.escape(label[0])}</em>" if label and label[0] else ""
        out.append(f"<span class='l' {marks}>{number}{_coloured(line) or ' '}{behind}\n</span>")
    return f"<pre class='code{' whole' * whole}'>{''.join(out)}</pre>"


def _coloured(line: str) -> str:
    """Python, and programs, with comments, strings, keywords and values told apart."""
    out, at = [], 0
    for m in TOKENS.finditer(line):
        kind = "c" if m[1] else "s" if m[2] else "k" if m[3] and keyword.iskeyword(m[3]) else "v" if m[4] else ""
        if kind:
            out += [html.escape(line[at : m.start()], quote=False), f"<i class='{kind}'>{html.escape(m[0], quote=False)}</i>"]
            at = m.end()
    return "".join([*out, html.escape(line[at:], quote=False)])


def changed(before: Program, after: Program, said: str) -> str:
    """What a pass did, in words and numbers of operations; empty where it did nothing."""
    if list(map(str, before.ops)) == list(map(str, after.ops)):
        return ""
    then, now = (Counter(op.kind for op in p.ops) for p in (before, after))
    counts = ", ".join(f"{then[k]} → {now[k]} {k}" for k in sorted(then | now) if then[k] != now[k])
    return f"<p class='key'>{said} ({counts or 'as many operations as before'}).</p>"


def meter(part: float, shown: str) -> str:
    """A cell with a number, and which part of what there is it takes."""
    part = max(0.0, min(1.0, part))
    full = " class='full'" if part > 0.999 else ""
    return f"<td class='num meter'><span>{html.escape(shown)}</span><i><u style='width:{part:.0%}'{full}></u></i></td>"


def dot(colour: str) -> str:
    return f"<span style='color:{colour}'>●</span>"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
