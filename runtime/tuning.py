"""Finding the fastest plans of a method's kernels that are right, on the GPU at hand: ``lsmc tune``.

Candidates are compiled side by side, then compared, then timed one at a time (`trials`), all in processes of their own. At last the
chosen plans are compared and timed together.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from lsmc import zoo
from lsmc.chunk import derive
from lsmc.lowering.apart import Failure, apart
from lsmc.lowering.plan import able
from lsmc.lowering.tune import Candidate, best, candidates, defaults, sift
from lsmc.lowering.tuned import store
from lsmc.lowering.tuned.store import Entry, Machine, Rejected, Time, show
from lsmc.resolve import resolve
from lsmc.runtime.bench.command import usual
from lsmc.runtime.bench.measure import parse_shape
from lsmc.runtime.errors import LsmConfigError
from lsmc.runtime.trials import (
    DIRECTIONS,
    Chosen,
    Sizes,
    Subject,
    Trial,
    check_trial,
    compile_trial,
    compiled,
    draw,
    launches,
    likes,
    pair,
    plan_of,
    settle,
    time_trial,
)
from lsmc.target import H200

DTYPES = ("bfloat16", "float16", "float32")
CHECKERS = 6
COMPILING, CHECKING, TIMING = 400.0, 90.0, 60.0
"""Seconds after which one candidate is given up."""
SLICES = (0.55, 0.75, 0.93, 1.0)
"""Parts of the time limit at which compiling, checking, timing and the comparison of what was chosen end."""



def subjects(asked: Iterable[tuple[str, Sizes]], **options: Any) -> list[Subject]:
    """Methods with the shapes that compile to the same kernels together."""
    found: dict[tuple[object, ...], Subject] = {}
    for method, sizes in asked:
        alone = Subject(method, (sizes,), **options)
        plan = plan_of(alone)
        key = (method, plan.key, sizes[2:])  # strides, on which a kernel's code depends, come from H, K and V
        before = found.get(key)
        found[key] = Subject(method, (*(before.shapes if before else ()), sizes), **options)
    return list(found.values())


def trials(subject: Subject) -> dict[Trial, dict[Sizes, float]]:
    """The candidates of a subject and the seconds predicted for them at each shape; each kernel's default first."""
    out: dict[Trial, dict[Sizes, float]] = {}
    for (direction, made), sizes in itertools.product(compiled(subject).items(), subject.shapes):
        for found in candidates(made, subject.shape(sizes)).values():
            for c, seconds in found.items():
                out.setdefault(Trial(subject, direction, c), {})[sizes] = seconds
    return out


def _has_kernels(method: str) -> bool:
    return able("triton", derive(resolve(method).canonical)) == "triton"


def run(methods: Sequence[str], *, shapes: Sequence[str] = (), dtype: str = "bfloat16", gates: str | None = None,
        scale: float = 1.0, state: bool = False, packed: bool = False, limit: float | None = None, out: Path | None = None,
        dry_run: bool = False) -> list[Entry]:
    """Tune methods (none: the zoo) at shapes "B,T,H,K,V", store and print what was found.

    `dry_run` only lists the candidates, and needs no GPU.

    dtype, gates   of q, k and v, and of the other inputs per token (default: the same)
    state, packed  calls start from a memory and use the final one; the B sequences come as one with `cu_seqlens`
    limit          seconds, after which the best so far is taken
    out            where to write all entries as one JSON list, as the shipped tables are

    Raises LsmConfigError, LsmNameError.
    """
    for text in (dtype, gates or dtype):
        if text not in DTYPES:
            raise LsmConfigError(f"{text!r}: kernels are tuned for {', '.join(DTYPES)}")
    sizes = [parse_shape(text) for text in shapes]
    for method in methods:
        if not _has_kernels(method):  # mistakes first
            raise LsmConfigError(f"{method}: has no kernels to tune: on GPUs it runs as ATen operations")
    methods = methods or tuple(filter(_has_kernels, zoo.names()))
    every = {m: list(dict.fromkeys(sizes or map(parse_shape, usual(resolve(m), "cuda")))) for m in methods}
    asked = subjects([(m, x) for m, found in every.items() for x in found], dtype=dtype, gates=gates or dtype, scale=float(scale),
                     state=state, packed=packed)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if dry_run:
        _list(console, asked)
        return []
    if not torch.cuda.is_available():
        raise LsmConfigError("tuning needs an NVIDIA GPU, and torch sees none here\n"
                             "help: --dry-run lists the candidates, with predicted times and what they take of an sm_90")
    return _Tuning(console, asked, limit or float("inf"), out).run()


class _Tuning:
    """One run of the command on a GPU."""

    def __init__(self, console: Console, asked: list[Subject], limit: float, out: Path | None) -> None:
        self.console, self.asked, self.out = console, asked, out
        self.begin, self.limit = time.monotonic(), limit
        self.machine: Machine = store.machine(0)
        self.likes = {s: likes(s) for s in asked}
        self.predicted = {t: seconds for s in asked for t, seconds in trials(s).items()}
        self.default = {(s, d, k): c for s in asked for d, made in compiled(s).items()
                        for k, plan in defaults(made, s.shape(s.shapes[0])).items() for c in [Candidate.of(k, plan)]}
        self.rejected: dict[tuple[Subject, str], list[Rejected]] = {}

    def run(self) -> list[Entry]:
        fresh = [t for t in self.predicted if not self.known(t)]
        turns: Counter[tuple[Subject, str, str]] = Counter()
        turn = {}
        for t in fresh:  # the first of every kernel first: time may run out
            turns[t.subject, t.direction, t.candidate.kernel] += 1
            turn[t] = turns[t.subject, t.direction, t.candidate.kernel]
        fresh.sort(key=turn.__getitem__)
        cores, place = os.cpu_count() or 1, {s: i for i, s in enumerate(self.asked)}
        stages = [
            lambda tried: self.stage("compiling", compile_trial, tried, max(1, cores - 1), COMPILING, SLICES[0]),
            lambda tried: self.stage("checking", check_trial, sorted(tried, key=lambda t: place[t.subject]),
                                     self.checkers(), CHECKING, SLICES[1]),
            lambda tried: self.stage("timing", time_trial, sorted(tried, key=lambda t: place[t.subject]), 1, TIMING, SLICES[2]),
        ]
        times = sift(fresh, stages, self.reject)
        chosen = [self.choose(s, sizes, times) for s in self.asked for sizes in s.shapes]
        totals = dict(self.stage("comparing what was chosen", settle, chosen, 1, CHECKING, SLICES[3]))
        entries = []
        for job in chosen:
            total = totals.get(job, Failure("there was no time to compare what was chosen"))
            entries += self.store(job, times, total)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps([asdict(e) for e in entries], indent=1) + "\n")
        return entries

    def checkers(self) -> int:
        """Workers whose full-size tensors fit beside each other."""
        largest = max(b * t * h * max(k, v) for s in self.asked for b, t, h, k, v in s.shapes)
        return max(1, min(CHECKERS, (os.cpu_count() or 1) - 1, torch.cuda.mem_get_info()[0] // (100 * largest)))

    def stage(self, what: str, work: Any, jobs: Sequence[Any], count: int, limit: float, part: float) -> Iterator[tuple[Any, Any]]:
        """Jobs in processes of their own, with a bar on a terminal and a line at the end."""
        begun, done = time.monotonic(), 0
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(what, total=len(jobs))
            for job, result in apart(work, jobs, count, limit, self.begin + self.limit * part):
                done += 1
                bar.advance(task)
                yield job, result
        self.console.print(f"{what}: {done} of {len(jobs)} in {time.monotonic() - begun:.0f} s")

    def known(self, t: Trial) -> bool:
        """Whether a candidate was rejected before, by these versions."""
        key = t.subject, t.direction
        if key not in self.rejected:
            like = self.likes[t.subject][t.subject.shapes[0], t.direction]
            self.rejected[key] = list(store.rejections(like, self.machine))
        return any(Candidate.of(r.kernel, r.plan) == t.candidate for r in self.rejected[key])

    def reject(self, t: Trial, reason: str) -> None:
        """Remember at once: what comes next may end this process too."""
        self.console.print(f"rejected {t.subject.method} {t.direction} {escape(str(t.candidate))}: {escape(reason)}")
        what = Rejected(t.candidate.kernel, t.candidate.plan, reason)
        self.rejected[t.subject, t.direction].append(what)
        for sizes in t.subject.shapes:
            store.reject(self.likes[t.subject][sizes, t.direction], self.machine, what)

    def choose(self, s: Subject, sizes: Sizes, times: Mapping[Trial, list[float]]) -> Chosen:
        at, picked = s.shapes.index(sizes), {}
        for d in DIRECTIONS:
            kernels = dict.fromkeys(t.candidate.kernel for t in times if (t.subject, t.direction) == (s, d))
            of = {k: {t.candidate: ms[at] for t, ms in times.items()
                      if (t.subject, t.direction, t.candidate.kernel) == (s, d, k)} for k in kernels}
            picked[d] = tuple(best(found, self.default[s, d, k]) for k, found in of.items())
        return Chosen(s, sizes, picked["forward"], picked["backward"])

    def store(self, job: Chosen, times: Mapping[Trial, list[float]], total: tuple[float, float] | Failure) -> list[Entry]:
        """Store and print what was found for one shape: both directions."""
        s, at, entries = job.subject, job.subject.shapes.index(job.sizes), []
        table = Table("kernel", "plan", "ms", "default ms", "predicted", box=None, pad_edge=False, header_style="bold")
        for d in DIRECTIONS:
            plans, measured = {}, {}
            for c in getattr(job, d):
                default = times.get(Trial(s, d, self.default[s, d, c.kernel]))
                t = Trial(s, d, c)
                plans[c.kernel] = c.plan
                seconds = self.predicted[t].get(job.sizes) or next(iter(self.predicted[t].values()))
                measured[c.kernel] = Time(times[t][at], default[at] if default else None, seconds * 1e3)
                row = measured[c.kernel]
                usual = f"{row.default:.3f}" if row.default is not None else "rejected"
                table.add_row(f"{d} {c.kernel}", show(c.plan), f"{row.chosen:.3f}", usual, f"{row.predicted:.3f}")
            failed = isinstance(total, Failure)
            entry = Entry(self.likes[s][job.sizes, d], self.machine, {} if failed else plans, {} if failed else measured,
                          tuple(self.rejected.get((s, d), ())))
            store.save(entry)
            entries.append(entry)
        said = f"not stored: {total.reason}" if isinstance(total, Failure) else \
            f"forward and backward {total[1]:.3f} ms, {total[0]:.3f} by the default plans"
        self.console.print(f"\n{s.method}, B,T,H,K,V = {','.join(map(str, job.sizes))}, {s.dtype}: {escape(said)}")
        self.console.print(table)
        for direction in DIRECTIONS:
            for r in self.rejected.get((s, direction), ()):
                self.console.print(f"  rejected {direction} {escape(r.kernel)} ({show(r.plan)}): {escape(r.reason)}")
        return entries


# -- without a GPU ----------------------------------------------------------------------------------------------------


def take(trial: Trial) -> list[Any] | Failure:
    """What a candidate's kernels take of an sm_90."""
    from lsmc.lowering.offline import DTYPES as SHORT
    from lsmc.lowering.offline import resource

    made, shape = compiled(trial.subject)[trial.direction], trial.subject.shape(trial.subject.shapes[0])
    run = launches(trial.subject, draw(trial.subject, trial.subject.shapes[0], "typical", "meta"))[trial.direction]
    run.plans = {trial.candidate.kernel: trial.candidate.plan}
    return [resource(made, k, shape.key, shape.value, shape.chunk, SHORT[trial.subject.dtype], run.plan(k))
            for k in pair(made, trial.candidate.kernel)]


def _list(console: Console, asked: list[Subject]) -> None:
    for s in asked:
        found = trials(s)
        table = Table("kernel", "plan", *(f"predicted ms at {','.join(map(str, x))}" for x in s.shapes), "registers", "spilled B",
                      "shared KB", "", box=None, pad_edge=False, header_style="bold")
        taken = {}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"{s.method}: compiling for sm_90", total=len(found))
            for trial, result in apart(take, list(found), max(1, (os.cpu_count() or 1) - 1), COMPILING):
                taken[trial] = result
                bar.advance(task)
        kernels = list(dict.fromkeys((t.direction, t.candidate.kernel) for t in found))

        def last(t: Trial, taken: Mapping[Trial, Any] = taken, kernels: list[tuple[str, str]] = kernels) -> tuple[Any, ...]:
            r = taken[t]
            return kernels.index((t.direction, t.candidate.kernel)), isinstance(r, Failure) or _over(r), _spills(r)

        for t in sorted(found, key=last):
            r = taken[t]
            cells = ["", "", "", r.reason] if isinstance(r, Failure) else [
                str(r[0].registers), str(r[0].spills), f"{r[0].shared / 1024:.0f}", _note(r)]
            predicted = [f"{found[t][x] * 1e3:.3f}" if x in found[t] else "–" for x in s.shapes]
            table.add_row(f"{t.direction} {t.candidate.kernel}", show(t.candidate.plan), *predicted, *map(escape, cells))
        console.print(f"{s.method}, {s.dtype}: {len(found)} candidates")
        console.print(table)


def _over(found: Any) -> bool:
    return any(r.shared > H200.shared_bytes for r in found)


def _note(found: Any) -> str:
    if _over(found):
        return "never: too much shared memory"
    return next((f"one product at a time: {r.serial}" for r in found if r.serial), "")


def _spills(found: Any) -> int:
    return 0 if isinstance(found, Failure) else max(r.spills for r in found)
