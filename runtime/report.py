"""One self-contained HTML page about a run, without a script."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lsmc.runtime.checkpoint import latest, read_state
from lsmc.runtime.errors import LsmCheckpointError
from lsmc.runtime.pages import Series, document, facts, plot, rect, svg, table_rows, text
from lsmc.runtime.progress import clock


def heat(load: Sequence[Sequence[float]]) -> str:
    """Expert load: a row a layer, a cell an expert; full colour is twice the balanced share."""
    if not load or not load[0]:
        return ""
    experts = len(load[0])
    cell, height, left = max(6.0, min(64.0, 760 / experts)), 26, 64
    out = []
    for row, layer in enumerate(load):
        y = row * height
        out.append(text(0, y + 17, f"layer {row}"))
        for column, share in enumerate(layer):
            x = left + column * cell
            strength = round(0.06 + 0.9 * min(1.0, share * experts / 2), 2)
            out.append(rect(x, y + 2, cell - 2, height - 4, "var(--a)", strength, f"layer {row}, expert {column}: {share:.1%}"))
            if cell >= 36:
                out.append(text(x + cell / 2 - 1, y + 17, f"{share:.0%}", "middle"))
    return svg(height * len(load) + 4, "expert load", out)


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
    known: list[tuple[str, str]] = []
    if held:
        known.append((f"{held[-1]['held_out']:.3f}", "held-out bits a byte"))
    if train:
        last = train[-1]
        speed = sorted(r["tokens_per_second"] for r in train)[len(train) // 2]
        known += [
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
    parts = [
        facts(known),
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
