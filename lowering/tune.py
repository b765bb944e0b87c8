"""A tuner that checks: few candidate plans for every kernel of a program, none chosen that has not given the right numbers.

    candidates(compiled, shape)  →  sift(…, compile, check, time)  →  best(…)

A miscompiled kernel hits one plan and spares the next, so a candidate is compared before it counts: one that is wrong, breaks its
process or does not end is rejected, with the reason. How candidates are compiled, checked and timed is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lsmc.lowering.apart import Failure
from lsmc.lowering.backends.triton import Compiled, plan_of
from lsmc.lowering.backends.triton_cost import predict
from lsmc.lowering.tuned.store import Plan, rounded, show
from lsmc.schedules import Shape
from lsmc.target import H200, Target

COLUMNS = (32, 64, 128)
STAGES = {True: (2, 3), False: (2, 1)}
"""Loads ahead of scans, and of loops over the blocks of a chunk: with three, those gave other numbers now and then."""
ROOMS = (112, 104, 75, 0)
"""Kilobytes of shared memory for a program whose loads are under way early: two or three share a multiprocessor; or none are."""
MOST = 9
"""Candidates of one kernel, the default among them."""
THREE = 168
"""Registers of a thread with which a multiprocessor has room for three programs of four warps."""
HOPELESS = 2.0
"""Predicted times of the default's after which a candidate is not tried."""
MARGIN = 0.98
"""The part of the default's time at which another plan is worth having: what is closer is noise."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A plan for one kernel, by its name in the schedule: the two of a pair have one."""

    kernel: str
    items: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, kernel: str, plan: Plan) -> Candidate:
        return cls(kernel, tuple(sorted(plan.items())))

    @property
    def plan(self) -> Plan:
        return dict(self.items)

    def __str__(self) -> str:
        return f"{self.kernel} ({show(self.plan)})"


def defaults(compiled: Compiled, shape: Shape) -> dict[str, Plan]:
    """The plan that each kernel has where nothing is tuned; of a pair, the fast one's."""
    return {k.kernel.name: plan_of(k, shape.key, shape.value, shape.sequences, shape.chunk, shape.element_bytes)
            for k in compiled.kernels if k.how != "slow"}


def candidates(compiled: Compiled, shape: Shape, target: Target = H200) -> dict[str, dict[Candidate, float]]:
    """Candidates and the seconds predicted for them, by kernel: the default first, then what differs least from it, of those
    the best predictions: the model knows columns better than loads ahead.

    Varied are the columns of the split dimension; where there is a loop, the loads ahead, elsewhere whether they are asked for
    first and how much of them is under way early; eight warps where one program of a scan takes all columns (they were slower
    everywhere else); and, of kernels over chunks, so few registers that a third program has room: worth some spills where
    programs wait.
    """
    out: dict[str, dict[Candidate, float]] = {}
    usual = defaults(compiled, shape)
    for k in compiled.kernels:
        if k.how == "slow":
            continue
        base = usual[k.kernel.name]
        split = f"B{k.split}" if k.split in ("K", "V") else ""
        full = max(16, rounded({"K": shape.key, "V": shape.value}.get(k.split or "", 1)))
        made: dict[Candidate, float] = {}
        for columns in dict.fromkeys([base[split], *(c for c in COLUMNS if c <= full)]) if split else (None,):
            own = (base["num_warps"],) if columns is None or columns == base[split] else (4,)
            for warps in dict.fromkeys((*own, *((4, 8) if k.scan and columns in (None, full) else ()))):
                seconds = predict(compiled.program, compiled.schedule, k.kernel.name, shape, target, columns, warps)
                sized = {**base, **({split: columns} if columns else {}), "num_warps": warps}
                if k.ahead is not None:
                    plans = [{**sized, "AHEAD": ahead} for ahead in (base["AHEAD"], 1 - base["AHEAD"])]
                else:
                    stages = STAGES[k.scan] if (k.scan or k.inner) and not k.walks else ()
                    plans = [{**sized, "num_stages": n} for n in dict.fromkeys((base["num_stages"], *stages))]
                if k.early:
                    plans += [{**plans[0], "EARLY": room} for room in (ROOMS[-1:] if k.inner else ROOMS)]
                if warps == 4 and not k.scan and not k.walks:
                    plans += [{**plan, "maxnreg": THREE} for plan in plans]
                made |= {Candidate.of(k.kernel.name, plan): seconds for plan in plans}
        first = Candidate.of(k.kernel.name, base)
        others = sorted((len({*c.items} - {*first.items}), seconds, c) for c, seconds in made.items()
                        if c != first and seconds <= HOPELESS * made[first])
        out[k.kernel.name] = {c: made[c] for c in (first, *(c for _, _, c in others[: MOST - 1]))}
    return out


Trial = TypeVar("Trial", bound=Hashable)
Stage = Callable[[Sequence[Trial]], Iterable[tuple[Trial, Any]]]
"""Does something with candidates: yields each with what came of it, or a `Failure`; those it had no time for are left out."""


def sift(trials: Iterable[Trial], stages: Sequence[Stage[Trial]], reject: Callable[[Trial, str], None]) -> dict[Trial, Any]:
    """What the last stage says of those that pass all stages. Those that fail one are rejected at once, with the reason."""
    left: dict[Trial, Any] = dict.fromkeys(trials)
    for stage in stages:
        passed = {}
        for trial, result in stage(list(left)):
            if isinstance(result, Failure):
                reject(trial, result.reason)
            else:
                passed[trial] = result
        left = {trial: passed[trial] for trial in left if trial in passed}
    return left


def best(times: Mapping[Candidate, float], default: Candidate) -> Candidate:
    """The fastest; the default where it is nearly as fast, the first of those that are equal. Raises ValueError for none."""
    fastest = min(times, key=times.__getitem__)
    near = default in times and times[fastest] > MARGIN * times[default]
    return default if near else fastest
