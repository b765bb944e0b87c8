"""A page about a benchmark: times as bars, and where each run stands under the two ceilings of its device."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lsmc.runtime.bench.contenders import CONTENDERS, OURS
from lsmc.runtime.bench.measure import Decode, Timing
from lsmc.runtime.bench.show import absences, tables
from lsmc.runtime.pages import (
    WIDTH,
    decades,
    document,
    legend,
    rect,
    svg,
    table,
    table_rows,
    text,
    ticks,
    upright,
)

COLOURS = {name: f"var(--{letter})" for name, letter in zip(CONTENDERS, "aecbdgf")}


@dataclass(frozen=True)
class Bar:
    """A time; `inner` is drawn inside it (the same from a CUDA graph)."""

    label: str
    colour: str
    ms: float
    inner: float | None = None
    more: str = ""
    """Said beside the time."""


def render(record: dict[str, Any]) -> str:
    """The page, from what `lsmc bench --out` wrote."""
    timings = [Timing.of(found) for found in record["results"]]
    decodes = [Decode.of(found) for found in record["decode"]]
    used, lines = record["environment"], absences(record)
    parts = []
    for shape in dict.fromkeys(t.shape for t in timings):
        here = [t for t in timings if t.shape == shape]
        groups = [(t.method, t.floor_ms[1], _bars(t)) for t in here]
        title = "B{} T{} H{} K{} V{}".format(*shape)
        parts.append(f"<h2>{title}: forward and backward</h2>{bars(groups)}")
        parts.append(f"<h2>{title}: under the ceilings</h2>{roofline(here)}")
    if decodes:
        groups = [(d.method, d.floor_ms, [_token(d)]) for d in decodes]
        title = "B{} H{} K{} V{}".format(*(decodes[0].shape[n] for n in (0, 2, 3, 4)))
        parts.append(f"<h2>{title}: one token</h2>{bars(groups)}")
    for title, (header, rows) in tables(record).items():
        parts.append(f"<h2>{html.escape(title)}</h2>{table(header, rows)}")
    parts += ["<h2>Absent</h2>" + "".join(f"<div class='key'>{html.escape(line)}</div>" for line in lines)] * bool(lines)
    shown = [(key, value) for key, value in used.items() if value not in (None, {}, 0)]
    parts.append(f"<details open><summary>Environment</summary><table>{table_rows(shown)}</table></details>")
    device = (timings or decodes)[0].device if timings or decodes else "nothing was measured"
    return document("Benchmark", f"{device}, {used['date']}", parts)


def _bars(timing: Timing) -> list[Bar]:
    ours = timing.runs[OURS].forward_backward_ms
    return [
        Bar(name, COLOURS[name], it.forward_backward_ms, it.graph_ms,
            "" if name == OURS else f"{it.forward_backward_ms / ours:.1f}× ours")
        for name, it in timing.runs.items()
    ]  # fmt: skip


def _token(found: Decode) -> Bar:
    best = found.graph_ms or found.step_ms
    more = f"{'graph ' * bool(found.graph_ms)}{best / found.floor_ms:.2f}× floor"
    return Bar("step", COLOURS[OURS], found.step_ms, found.graph_ms, more)


def bars(groups: Sequence[tuple[str, float, Sequence[Bar]]]) -> str:
    """Horizontal bars in groups, each with its floor as a line; logarithmic where the longest would hide the others."""
    left, right, row, gap, bottom = 120, 140, 17, 11, 34
    times = [b.ms for _, _, found in groups for b in found]
    floors = [floor for _, floor, _ in groups]
    most, least = max(times), min(*times, *floors)
    logarithmic = most > 30 * min(times)
    low = 10 ** math.floor(math.log10(least)) if logarithmic else 0.0

    def px(ms: float) -> float:
        part = math.log(max(ms, low) / low) / math.log(most / low) if logarithmic else ms / most
        return left + part * (WIDTH - left - right)

    height = 8 + sum(row * len(found) + gap for _, _, found in groups) + bottom
    out = []
    for at in decades(low, most) if logarithmic else ticks(0.0, most, 8):
        out.append(upright(px(at), 4, height - bottom))
        out.append(text(px(at), height - bottom + 16, f"{at:g}", "middle"))
    out.append(text(px(low) / 2 + px(most) / 2, height - 3, "milliseconds" + ", logarithmic" * logarithmic, "middle"))
    y = 8.0
    for name, floor, found in groups:
        size = row * len(found)
        out.append(text(left - 10, y + size / 2 + 4, name, "end", "font-weight='600'"))
        for b in found:
            out.append(rect(px(low), y + 1, px(b.ms) - px(low), row - 3, b.colour, 0.45 if b.inner else 0.9))
            if b.inner:
                out.append(rect(px(low), y + 4, px(b.inner) - px(low), row - 9, b.colour, 1.0))
            out.append(text(px(b.ms) + 5, y + 12, f"{b.ms:.3g}" + f" ({b.more})" * bool(b.more)))
            y += row
        out.append(upright(px(floor), y - size - 2, y + 1, "mark"))
        y += gap
    inner = any(b.inner for _, _, found in groups for b in found)
    return svg(height, "time of forward and backward by method", out) + _legend(
        ((b.label, b.colour) for _, _, found in groups for b in found),
        "the line is the floor" + ("; the inner bar is the same from a CUDA graph" if inner else ""))


def roofline(timings: Sequence[Timing]) -> str:
    """Arithmetic intensity against rate of operations, both counted once for a method, whatever a contender does.

    Intensity is operations over the bytes of three passes over inputs and outputs: the floor is the slanted ceiling.
    """
    points = [
        (t.method, t.flops[1] / (3 * t.bytes), name, t.flops[1] / (1e-3 * (it.graph_ms or it.forward_backward_ms)))
        for t in timings for name, it in t.runs.items() if CONTENDERS[name].takes is None
    ]  # fmt: skip
    bandwidth, peak = timings[0].ceilings.bytes_per_s, timings[0].ceilings.flops_per_s
    ridge = peak / bandwidth
    x0, x1 = min(p[1] for p in points) / 3, max(*(p[1] for p in points), ridge) * 3
    y0, y1 = min(p[3] for p in points) / 2, peak * 1.7
    left, right, top, bottom, height = 64, 16, 92, 36, 430

    def px(x: float) -> float:
        return left + math.log(x / x0) / math.log(x1 / x0) * (WIDTH - left - right)

    def py(y: float) -> float:
        return height - bottom - math.log(y / y0) / math.log(y1 / y0) * (height - top - bottom)

    out = []
    for x in decades(x0, x1):
        out.append(upright(px(x), top, height - bottom))
        out.append(text(px(x), height - bottom + 15, f"{x:g}", "middle"))
    for y in decades(y0, y1):
        out.append(f"<line class='grid' x1='{left}' x2='{WIDTH - right}' y1='{py(y):.1f}' y2='{py(y):.1f}'/>")
        out.append(text(left - 6, py(y) + 4, _rate(y), "end"))
    out.append(text((left + WIDTH - right) / 2, height - 4, "operations a byte of three passes over inputs and outputs", "middle"))
    out.append(text(4, top - 8, "operations a second"))
    start = max(x0, y0 / bandwidth)
    roof = [(start, start * bandwidth), (ridge, peak), (x1, peak)]
    path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in roof)
    out.append(f"<polyline class='line' stroke='var(--ink)' points='{path}'/>")
    out.append(text(WIDTH - right - 4, py(peak) - 6, f"matrix products, {_rate(peak)}/s", "end"))
    turn = math.degrees(math.atan2(py(roof[1][1]) - py(roof[0][1]), px(roof[1][0]) - px(roof[0][0])))
    out.append(f"<g transform='translate({px(start) + 24:.1f} {py(start * bandwidth) - 26:.1f}) rotate({turn:.1f})'>"
               f"{text(20, 8, f'copy, {bandwidth / 1e9:.0f} GB/s')}</g>")
    place = -math.inf
    for method, x in sorted({(p[0], p[1]) for p in points}, key=lambda p: (p[1], p[0])):
        rates = [p[3] for p in points if p[0] == method]
        place = max(place + 17, px(x))
        out.append(f"<polyline class='grid' fill='none' points='{place:.1f},{top - 22} {px(x):.1f},{top} "
                   f"{px(x):.1f},{py(min(rates)):.1f}'/>")
        out.append(f"<g transform='translate({place:.1f} {top - 26}) rotate(-50)'>{text(0, 0, method)}</g>")
    for method, x, name, rate in points:
        what = html.escape(f"{method}, {name}: {_rate(rate)}/s, {rate / min(peak, x * bandwidth):.0%} of the ceiling")
        out.append(f"<circle cx='{px(x):.1f}' cy='{py(rate):.1f}' r='4.5' fill='{COLOURS[name]}' stroke='var(--card)'>"
                   f"<title>{what}</title></circle>")
    how = "from a CUDA graph where there is one" if any(it.graph_ms for t in timings for it in t.runs.values()) else ""
    return svg(height, "rate of operations by arithmetic intensity", out) + _legend(((p[2], COLOURS[p[2]]) for p in points), how)


def _rate(value: float) -> str:
    power = max(0, min(5, math.floor(math.log10(max(value, 1.0)) / 3)))
    return f"{value / 1e3**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}FLOP"


def _legend(entries: Iterable[tuple[str, str]], more: str) -> str:
    found = sorted(dict(entries).items(), key=lambda entry: list(CONTENDERS).index(entry[0]) if entry[0] in CONTENDERS else 0)
    return legend(found, more)
