"""What was measured as tables: a row for every contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lsmc.runtime.bench.contenders import OURS
from lsmc.runtime.bench.measure import Decode, Run, Timing

Table = tuple[list[str], list[list[str]]]


def show(record: dict[str, Any], markdown: bool) -> None:
    """Prints the tables of a record."""
    for title, (header, rows) in tables(record).items():
        if markdown:
            print("\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)))
        else:
            _print(title, header, rows)
    for line in absences(record):
        print(f"\nabsent: {line}")


def absences(record: dict[str, Any]) -> list[str]:
    """Who did not run, for which methods, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in record["results"]:
        for name, why in result["absent"].items():
            found.setdefault((name, " ".join(why.split())), []).append(result["method"])
    return [f"{name} for {', '.join(dict.fromkeys(methods))}: {why}" for (name, why), methods in found.items()]


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """Title → header and rows; columns in which nothing stands are left out."""
    timings = [Timing.of(found) for found in record["results"]]
    decodes = [Decode.of(found) for found in record["decode"]]
    made = {}
    if timings:
        made[f"{timings[0].device}, {timings[0].dtype}"] = _timed(timings)
    if decodes:
        made[f"one token, {decodes[0].device}, {decodes[0].dtype}"] = _decoded(decodes)
    return {title: _filled(*table) for title, table in made.items()}


def _timed(timings: Sequence[Timing]) -> Table:
    header = ["method", "B,T,H,K,V", "by", "forward ms", "fwd+bwd ms", "from a graph ms", "÷ ours", "÷ floor", "peak MiB",
              "error o", "worst gradient", "cold first call s", "first call s", "note"]
    rows = []
    for timing in timings:
        ours = timing.runs[OURS]
        floor = timing.floor_ms
        start = [timing.method, _shape(timing.shape)]
        for name, it in timing.runs.items():
            both = it.forward_backward_ms
            rows.append([
                *start, name, _ms(it.forward_ms), _ms(both), _ms(it.graph_ms), _times(both, ours.forward_backward_ms),
                _times(both, floor[1]), "" if it.peak_mib is None else f"{it.peak_mib:.0f}",
                f"{it.errors['o']:.1e}" if it.errors else "", _worst(it), "" if it.cold_s is None else f"{it.cold_s:.1f}",
                f"{it.first_call_s:.1f}", "; ".join(it.notes),
            ])
        rows.append([*start, "floor", _ms(floor[0]), _ms(floor[1]), "", _times(floor[1], ours.forward_backward_ms),
                     "1.00×", *[""] * 6])
    return header, rows


def _decoded(decodes: Sequence[Decode]) -> Table:
    header = ["method", "B,T,H,K,V", "step ms", "from a graph ms", "floor ms", "÷ floor", "error o", "error state", "note"]
    return header, [
        [it.method, _shape(it.shape), _ms(it.step_ms), _ms(it.graph_ms), _ms(it.floor_ms),
         _times(it.graph_ms or it.step_ms, it.floor_ms), f"{it.errors['o']:.1e}", f"{it.errors['state']:.1e}", "; ".join(it.notes)]
        for it in decodes
    ]


def _filled(header: list[str], rows: list[list[str]]) -> Table:
    keep = [n for n in range(len(header)) if any(row[n] for row in rows)]
    return [header[n] for n in keep], [[row[n] for n in keep] for row in rows]


def _shape(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _times(value: float, unit: float) -> str:
    return f"{value / unit:.2f}×"


def _worst(found: Run) -> str:
    gradients = {name: error for name, error in found.errors.items() if name != "o"}
    if not gradients:
        return ""
    worst = max(gradients, key=lambda name: gradients[name])
    return f"{gradients[worst]:.1e} ({worst})"


def _print(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(*header, title=title, title_justify="left", box=None, pad_edge=False)
    for row, before in zip(rows, [None, *rows]):
        same = before is not None and row[:2] == before[:2]
        table.add_row(*(["", ""] if same else row[:2]), *row[2:])
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
