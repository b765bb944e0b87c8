"""The live display of a run: loss, bits a byte, tokens a second, expert load, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bars(load: list[float]) -> str:
    """One bar an expert; the middle height is a balanced share."""
    return "".join(_BARS[min(len(_BARS) - 1, int(share * len(load) * 4))] for share in load)


class Progress:
    """A panel that redraws itself on a terminal; elsewhere a line now and then. ``steps`` 0: the clock decides."""

    def __init__(self, steps: int, quiet: bool = False, interval: float = 10.0) -> None:
        self.steps, self.quiet, self.interval = steps, quiet, interval
        self.console = Console(quiet=quiet)
        self.live = (
            Live(console=self.console, refresh_per_second=4)
            if self.console.is_terminal and not quiet
            else None
        )
        self.held_out: tuple[int, float] | None = None
        self.printed = 0.0

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def evaluated(self, step: int, held_out: float) -> None:
        self.held_out = (step, held_out)
        if self.live is None:
            self.note(f"step {step}: held out {held_out:.3f} bits/byte")

    def update(self, record: dict[str, Any], left: float) -> None:
        """Show a record of ``metrics.jsonl`` and the seconds left."""
        if self.live is not None:
            self.live.update(self._panel(record, left))
        elif time.monotonic() - self.printed >= self.interval:
            self.printed = time.monotonic()
            self.note(
                f"{self._step(record)}  {record['bits_per_byte']:.3f} bits/byte  "
                f"{record['tokens_per_second']:,.0f} tokens/s on {record['threads']} thread(s)  "
                f"{clock(record['elapsed'])}, {clock(left)} left"
            )

    def _step(self, record: dict[str, Any]) -> str:
        return f"step {record['step']}" + (f" of {self.steps}" if self.steps else "")

    def _panel(self, record: dict[str, Any], left: float) -> Panel:
        table = Table.grid(padding=(0, 2))
        table.add_row("loss", f"{record['loss']:.4f}", "bits/byte", f"{record['bits_per_byte']:.3f}")
        held_out = "–" if self.held_out is None else f"{self.held_out[1]:.3f} (step {self.held_out[0]})"
        table.add_row("tokens/s", f"{record['tokens_per_second']:,.0f}", "held out", held_out)
        table.add_row("threads", str(record["threads"]), "tokens", f"{record['tokens']:,}")
        table.add_row("elapsed", clock(record["elapsed"]), "left", clock(left))
        table.add_row(
            "learning rate", f"{record['lr']:.2e}", "gradient norm", f"{record['gradient_norm']:.2f}"
        )
        shown = record["load"][:8]
        load = Table.grid(padding=(0, 2))
        load.add_row("expert load", *(Text(bars(layer[:16]), style="cyan") for layer in shown))
        bar = ProgressBar(total=record["elapsed"] + left, completed=record["elapsed"])
        return Panel(Group(table, load, bar), title=self._step(record), expand=False)
