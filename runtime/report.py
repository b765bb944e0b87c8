"""One self-contained HTML page about a run: inline SVG, no script, nothing from a network."""

from __future__ import annotations

import html
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsmc.runtime.checkpoint import latest, read_state
from lsmc.runtime.errors import LsmCheckpointError
from lsmc.runtime.progress import clock

_STYLE = """
:root { --ink: #1d2430; --dim: #667085; --line: #d7dce4; --card: #fff; --page: #f5f6f8;
  --a: #2563eb; --b: #dc6803; --c: #0e9384; --d: #c11574; --e: #7a5af8; --f: #667085; --g: #4ca30d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #344054;
  --card: #1b2230; --page: #111722; --a: #6ea8fe; --b: #f7a35c; --c: #2ed3b7; --d: #f670c7;
  --e: #a48afb; --f: #98a2b3; --g: #85cb33; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 920px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 8px 0 2px; }
h2 { font-size: 17px; margin: 0 0 8px; }
p.sub { color: var(--dim); margin: 0 0 18px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px 18px; margin: 14px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; }
.facts b { display: block; font-size: 20px; }
.facts span, .key { color: var(--dim); font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--dim); }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; }
.mark { stroke: var(--ink); stroke-width: 2; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; margin: 0;
  max-height: 460px; overflow: auto; }
table { border-collapse: collapse; font-size: 13px; }
.wide { overflow-x: auto; }
.wide td, .wide th { white-space: nowrap; }
td, th { text-align: left; padding: 2px 14px 2px 0; vertical-align: top; }
summary { cursor: pointer; }
"""


def document(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A page of sections, each of them HTML."""
    return "".join((
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1><p class='sub'>{html.escape(subtitle)}</p>",
        *(f"<section>{section}</section>" for section in sections),
        "</main></body></html>",
    ))  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A line (or marks) of one plot."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover ``[low, high]``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e3 else f"{value:.3g}"


def plot(series: Iterable[Series], x_label: str, y_label: str, from_zero: bool = False) -> str:
    """An SVG line plot."""
    series = [s for s in series if s.points]
    if not series:
        return "<p class='key'>nothing was recorded</p>"
    width, height, left, bottom, top, right = 860, 280, 56, 34, 12, 12
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = (0.0 if from_zero else min(ys)), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    y0, y1 = (y0 if from_zero else y0 - 0.04 * (y1 - y0)), y1 + 0.04 * (y1 - y0)

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)

    name = html.escape(f"{y_label} by {x_label}")
    out = [f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{name}'>"]
    for y in ticks(y0, y1):
        out.append(f"<line class='grid' x1='{left}' x2='{width - right}' y1='{py(y):.1f}' y2='{py(y):.1f}'/>")
        out.append(f"<text x='{left - 6}' y='{py(y) + 4:.1f}' text-anchor='end'>{_label(y)}</text>")
    for x in ticks(x0, x1, 8):
        out.append(
            f"<text x='{px(x):.1f}' y='{height - bottom + 16}' text-anchor='middle'>{_label(x)}</text>"
        )
    middle = (left + width - right) / 2
    out.append(f"<text x='{middle}' y='{height - 4}' text-anchor='middle'>{html.escape(x_label)}</text>")
    for s in series:
        if s.marks:
            for x, y in s.points:
                out.append(
                    f"<circle cx='{px(x):.1f}' cy='{py(y):.1f}' r='3.5' fill='{s.colour}'>"
                    f"<title>{y:.3f}</title></circle>"
                )
        else:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
            out.append(f"<polyline class='line' stroke='{s.colour}' points='{path}'/>")
    out.append("</svg>")
    names = " &nbsp; ".join(f"<span style='color:{s.colour}'>●</span> {html.escape(s.label)}" for s in series)
    return "".join(out) + f"<div class='key'>{names} ({html.escape(y_label)})</div>"


def heat(load: Sequence[Sequence[float]]) -> str:
    """Expert load: a row a layer, a cell an expert; full colour is twice the balanced share."""
    if not load or not load[0]:
        return ""
    experts = len(load[0])
    cell, height, left = max(6.0, min(64.0, 760 / experts)), 26, 64
    out = [f"<svg viewBox='0 0 860 {height * len(load) + 4}' role='img' aria-label='expert load'>"]
    for row, layer in enumerate(load):
        y = row * height
        out.append(f"<text x='0' y='{y + 17}'>layer {row}</text>")
        for column, share in enumerate(layer):
            x = left + column * cell
            strength = min(1.0, share * experts / 2)
            out.append(
                f"<rect x='{x:.1f}' y='{y + 2}' width='{cell - 2:.1f}' height='{height - 4}' rx='3' "
                f"fill='#2563eb' fill-opacity='{0.06 + 0.9 * strength:.2f}' stroke='#98a2b3' stroke-opacity='0.4'>"
                f"<title>layer {row}, expert {column}: {share:.1%}</title></rect>"
            )
            if cell >= 36:
                out.append(
                    f"<text x='{x + cell / 2 - 1:.1f}' y='{y + 17}' text-anchor='middle'>{share:.0%}</text>"
                )
    return "".join(out) + "</svg>"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.is_file():
        raise LsmCheckpointError(f"there is no {path}: no run has written there")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    out, mean = [], None
    for value in values:
        mean = value if mean is None else weight * mean + (1 - weight) * value
        out.append(mean)
    return out


def table_rows(pairs: Iterable[tuple[str, Any]]) -> str:
    """Rows of a table of names and values."""
    return "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in pairs)


def render(
    records: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    sample: str = "",
    stages: dict[str, str] | None = None,
    title: str = "Training report",
) -> str:
    """The page. ``stages`` are the compiler's stages of the method, by name."""
    train = [r for r in records if "bits_per_byte" in r]
    held = [r for r in records if "held_out" in r]
    facts: list[tuple[str, str]] = []
    if held:
        facts.append((f"{held[-1]['held_out']:.3f}", "held-out bits a byte"))
    if train:
        last = train[-1]
        speed = sorted(r["tokens_per_second"] for r in train)[len(train) // 2]
        facts += [
            (f"{last['bits_per_byte']:.3f}", "training bits a byte"),
            (f"{speed:,.0f}", "tokens a second (median)"),
            (f"{last['tokens'] / 1e6:.2f} M", "tokens read"),
            (clock(last["elapsed"]), "time of training"),
            (f"{last['step']}", "steps"),
        ]
    bits = [r["bits_per_byte"] for r in train]
    curve = [
        Series("training", "var(--a)", [(r["tokens"], y) for r, y in zip(train, _smooth(bits))]),
        Series(
            "held out",
            "var(--b)",
            [(r["step"] * _tokens_a_step(train), r["held_out"]) for r in held] if train else [],
            marks=True,
        ),
    ]
    through = [Series("tokens a second", "var(--a)", [(r["tokens"], r["tokens_per_second"]) for r in train])]
    rate = [Series("learning rate", "var(--a)", [(r["tokens"], r["lr"]) for r in train])]
    e = html.escape
    shown = "".join(f"<div><b>{e(value)}</b><span>{e(name)}</span></div>" for value, name in facts)
    parts = [
        f"<div class='facts'>{shown}</div>",
        f"<h2>Loss</h2>{plot(curve, 'tokens', 'bits a byte')}",
        f"<h2>Throughput</h2>{plot(through, 'tokens', 'tokens a second', from_zero=True)}",
        f"<h2>Learning rate</h2>{plot(rate, 'tokens', 'learning rate', from_zero=True)}",
    ]
    if train:
        recent = [r["load"] for r in train[-10:]]
        mean = [[sum(cells) / len(cells) for cells in zip(*rows)] for rows in zip(*recent)]
        parts.append(
            "<h2>Expert load</h2><p class='key'>Share of assignments in the last steps; "
            f"balanced is {1 / len(mean[0]):.0%} each.</p>{heat(mean)}"
        )
    if sample:
        parts.append(f"<h2>Sample</h2><pre>{e(sample)}</pre>")
    if stages:
        inner = "".join(
            f"<details{' open' if i == 0 else ''}><summary>{e(name)}</summary><pre>{e(text)}</pre></details>"
            for i, (name, text) in enumerate(stages.items())
        )
        parts.append(f"<h2>How the method was compiled</h2>{inner}")
    flat = {f"{k}.{n}": m for k, v in settings.items() if isinstance(v, dict) for n, m in v.items()}
    flat = {k: v for k, v in settings.items() if not isinstance(v, dict)} | flat
    machine = [
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("machine", platform.machine()),
    ]
    rows = table_rows([*flat.items(), *machine])
    parts.append(f"<details><summary>Settings</summary><table>{rows}</table></details>")
    return document(title, _what(settings), parts)


def _tokens_a_step(train: Sequence[dict[str, Any]]) -> float:
    return train[-1]["tokens"] / max(1, train[-1]["step"])


def _what(settings: dict[str, Any]) -> str:
    known = [f"{name} {settings[name]}" for name in ("model", "lsm", "pattern") if settings.get(name)]
    return ", ".join(known)


def write_report(
    out: Path, sample: str = "", stages: dict[str, str] | None = None, title: str = "Training report"
) -> Path:
    """Write ``out/report.html`` from what a run left in ``out``."""
    out = Path(out)
    state = read_state(latest(out))
    settings = dict(state.config)
    if state.model:
        settings |= {
            "model_config": {k: v for k, v in state.model.items() if k != "moe"},
            "moe": state.model["moe"],
        }
        settings["pattern"] = state.model.get("pattern", "")
    path = out / "report.html"
    path.write_text(render(read_metrics(out), settings, sample, stages, title))
    return path
