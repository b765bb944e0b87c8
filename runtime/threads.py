"""How many threads training takes: fixed, or the faster of one and all by measurement.

A small model's operations take microseconds. On cores that other programs use too, a second thread that waits its
turn holds up all the others, and one thread can be ten times as fast; on idle cores several are faster.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from types import TracebackType

import torch

TRIAL = 4
"""Steps that a number of threads is timed for."""
PERIOD = 20.0
"""Seconds between two comparisons: who else uses the cores may change."""


class Threads:
    """A context that sets torch's threads and restores them; ``timed()`` goes around every step.

    fixed: this many, 0 for torch's own choice. measure: compare one thread with all, first and then every ``PERIOD``.
    """

    def __init__(self, fixed: int, measure: bool) -> None:
        self.before = torch.get_num_threads()
        self.candidates = [1, self.before] if measure and not fixed and self.before > 1 else []
        self.best = fixed or self.before
        self.now = self.best
        self.times: dict[int, list[float]] = {}
        self.compared = float("-inf")

    def __enter__(self) -> Threads:
        self._set(self.best)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self.before)

    def _set(self, number: int) -> None:
        self.now = number
        torch.set_num_threads(number)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around one step."""
        started = time.perf_counter()
        comparing = bool(self.candidates) and started - self.compared >= PERIOD
        if comparing:
            self._set(next(n for n in self.candidates if len(self.times.get(n, ())) < TRIAL))
        yield
        if not comparing:
            return
        times = self.times.setdefault(self.now, [])
        times.append(time.perf_counter() - started)
        quick = min((statistics.median(t) for n, t in self.times.items() if n != self.now), default=float("inf"))
        if len(times) < TRIAL and times[-1] > 3 * quick:
            times += [times[-1]] * (TRIAL - len(times))  # hopeless: no second try
        if all(len(self.times.get(n, ())) >= TRIAL for n in self.candidates):
            self.best = min(self.candidates, key=lambda n: statistics.median(self.times[n]))
            self.times.clear()
            self.compared = time.perf_counter()
            self._set(self.best)
