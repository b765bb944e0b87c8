"""What pages are made of: one style, a frame, tables and inline SVG. Nothing comes from a network, nothing is in a file beside."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 860
"""Of a picture, in its own units; the page scales it."""

_COLOURS = """
:root { color-scheme: light dark; --ink: #20242b; --dim: #5d6570; --line: #e3e1dc; --card: #fffffe; --page: #f8f7f4;
  --soft: #f2f0ec; --good: #12805c; --bad: #c0302b; --lit: #ffedb8; --use: #fff8e4;
  --a: #2c5fd0; --b: #b85a08; --c: #0b857a; --d: #b42369; --e: #6d4fd6; --f: #68707d; --g: #3b730b; --h: #1787b0; --i: #8a6d1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6eb; --dim: #a3acb9; --line: #2e333d; --card: #1b1f26; --page: #13161b;
  --soft: #22272f; --good: #4cc79a; --bad: #ff8078; --lit: #41360f; --use: #2e2a1b;
  --a: #7ba6ff; --b: #f0a35e; --c: #3fc7b3; --d: #f27fb2; --e: #ad98ff; --f: #98a1af; --g: #8fce4b; --h: #5cc0e6; --i: #d3b45f; } }
"""
_STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.6 -apple-system, "Segoe UI", Inter, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 920px; margin: 0 auto; padding: 28px 18px 72px; }
h1 { font-size: 27px; line-height: 1.25; font-weight: 650; letter-spacing: -0.012em; margin: 6px 0 2px; }
h2 { font-size: 17px; line-height: 1.35; font-weight: 650; letter-spacing: -0.004em; margin: 0 0 8px; }
h3 { font-size: 14px; font-weight: 650; margin: 18px 0 6px; }
p { margin: 0 0 10px; }
p.sub { color: var(--dim); margin: 0 0 20px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 16px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(108px, 1fr)); gap: 14px 18px; }
.facts b { display: block; font-size: 20px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span, .key { color: var(--dim); font-size: 13px; }
.facts span { display: block; line-height: 1.35; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; font-family: inherit; fill: var(--dim); }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; }
.mark { stroke: var(--ink); stroke-width: 2; }
pre, code { font: 12.5px/1.55 ui-monospace, "SF Mono", "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 460px; overflow: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.wide td, .wide th { white-space: nowrap; }
td, th { text-align: left; padding: 3px 16px 3px 0; vertical-align: top; }
th { font-weight: 600; }
summary { cursor: pointer; }
"""


def document(title: str, subtitle: str, sections: Iterable[str], *, style: str = "", script: str = "", aside: str = "") -> str:
    """A page of sections, each of them HTML.

    style, script  what this page has beyond the common style, and no others
    aside          HTML that stands before the sections, beside them where `style` says so
    """
    return "".join((
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_COLOURS}{_STYLE}{style}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1><p class='sub'>{html.escape(subtitle)}</p>{aside}",
        *(section if section.startswith("<section") else f"<section>{section}</section>" for section in sections),
        "</main>", f"<script>{script}</script>" * bool(script), "</body></html>",
    ))  # fmt: skip


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Values with what they are, side by side."""
    cells = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for value, name in pairs)
    return f"<div class='facts'>{cells}</div>"


def table_rows(pairs: Iterable[tuple[str, Any]]) -> str:
    """Rows of a table of names and values."""
    return "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in pairs)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text that scrolls where it is too wide."""
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


# -- SVG --------------------------------------------------------------------------------------------------------------


def svg(height: float, name: str, inner: Iterable[str], width: float = WIDTH) -> str:
    """A picture that is as wide as its place."""
    return (f"<svg viewBox='0 0 {width:.0f} {height:.0f}' role='img' aria-label='{html.escape(name, quote=True)}'>"
            f"{''.join(inner)}</svg>")


def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {more}>{html.escape(words)}</text>"


def rect(x: float, y: float, width: float, height: float, colour: str, opacity: float, title: str = "") -> str:
    shape = (f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(width, 0.5):.1f}' height='{height:.1f}' rx='2' "
             f"fill='{colour}' fill-opacity='{opacity}'")
    return f"{shape}><title>{html.escape(title)}</title></rect>" if title else f"{shape}/>"


def upright(x: float, top: float, bottom: float, kind: str = "grid") -> str:
    """A vertical line of the classes grid or mark."""
    return f"<line class='{kind}' x1='{x:.1f}' x2='{x:.1f}' y1='{top:.1f}' y2='{bottom:.1f}'/>"


def legend(entries: Iterable[tuple[str, str]], more: str = "", sign: str = "■") -> str:
    """What the colours of a picture mean: (label, colour)."""
    names = " &nbsp; ".join(f"<span style='color:{colour}'>{sign}</span> {html.escape(label)}" for label, colour in entries)
    return f"<div class='key'>{names}{f' ({html.escape(more)})' if more else ''}</div>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover ``[low, high]``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … within the range; powers of ten alone where that would be many."""
    found = [m * 10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    found = [x for x in found if low <= x <= high]
    return found if len(found) <= 9 else [x for x in found if round(math.log10(x), 6) % 1 == 0]


@dataclass(frozen=True)
class Series:
    """A line (or marks) of one plot."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def _label(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e3 else f"{value:.3g}"


def plot(series: Iterable[Series], x_label: str, y_label: str, from_zero: bool = False) -> str:
    """An SVG line plot."""
    series = [s for s in series if s.points]
    if not series:
        return "<p class='key'>nothing was recorded</p>"
    height, left, bottom, top, right = 280, 56, 34, 12, 12
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = (0.0 if from_zero else min(ys)), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    y0, y1 = (y0 if from_zero else y0 - 0.04 * (y1 - y0)), y1 + 0.04 * (y1 - y0)

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (WIDTH - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)

    out = []
    for y in ticks(y0, y1):
        out.append(f"<line class='grid' x1='{left}' x2='{WIDTH - right}' y1='{py(y):.1f}' y2='{py(y):.1f}'/>")
        out.append(text(left - 6, py(y) + 4, _label(y), "end"))
    out += [text(px(x), height - bottom + 16, _label(x), "middle") for x in ticks(x0, x1, 8)]
    out.append(text((left + WIDTH - right) / 2, height - 4, x_label, "middle"))
    for s in series:
        if s.marks:
            out += [f"<circle cx='{px(x):.1f}' cy='{py(y):.1f}' r='3.5' fill='{s.colour}'><title>{y:.3f}</title></circle>"
                    for x, y in s.points]
        else:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
            out.append(f"<polyline class='line' stroke='{s.colour}' points='{path}'/>")
    return svg(height, f"{y_label} by {x_label}", out) + legend(((s.label, s.colour) for s in series), y_label, "●")
