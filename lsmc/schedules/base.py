"""A schedule cuts a chunk program into kernels: what is scanned, what crosses memory, what is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lsmc.affine import combination, factors
from lsmc.ir import Op, Program
from lsmc.schedules.cost import Shape, cost
from lsmc.target import H200, Target
from lsmc.walk import recurrence


@dataclass(frozen=True)
class Kernel:
    """One launch: a `scan` over the chunks that carries `carries` on chip, or (no carries) all chunks in parallel.

    `saves` names carries whose value before each chunk is written to memory; other carries that the body needs are
    read from there. `stores` names outputs. What the body holds follows from the graph: everything that these need.

    `part` tells what it has of a scan whose sequences are cut into segments (`lsmc.schedules.segments`): "map", "factor",
    "combine" or "apply". The first three are scans of programs that follow from the chunk program, `of`. So is one that
    `walks`, from token to token. `apart`: what its programs would each work out again comes from a launch before it, on
    backends whose programs share columns.
    """

    name: str
    carries: tuple[str, ...]
    saves: tuple[str, ...]
    stores: tuple[str, ...]
    part: str = ""
    walks: bool = False
    apart: bool = False

    def of(self, program: Program) -> Program:
        """The program that this kernel runs, where `program` is the schedule's; the methods below take that one."""
        if self.part == "combine":
            return combination(program, self.carries)
        if self.walks:
            return recurrence(program)
        return factors(program) if self.part in ("map", "factor") else program

    @property
    def whole(self) -> bool:
        """Whether its memories are those of the sequence: not of a segment by itself, nor only where segments begin."""
        return self.part in ("", "apply")

    def own(self, program: Program) -> set[int]:
        return {c.inp for c in program.carries if c.name in self.carries}

    def body(self, program: Program) -> list[Op]:
        roots = [i for n, i in program.outputs if n in self.stores]
        roots += [c.out for c in program.carries if c.name in self.carries]
        roots += [c.inp for c in program.carries if c.name in self.carries]
        return program.ancestors(roots)

    def loads(self, program: Program) -> tuple[str, ...]:
        """The carries of earlier kernels that this one reads back from memory."""
        body = {op.id for op in self.body(program)}
        return tuple(c.name for c in program.carries if c.inp in body and c.name not in self.carries)

    def reverse(self, program: Program) -> bool:
        return any(c.reverse for c in program.carries if c.name in self.carries)

    def __str__(self) -> str:
        names = ", ".join(self.carries)
        what = {"map": f"scan of each segment by itself, carrying {names} from nothing", "factor": f"scan of each segment by "
                f"itself, carrying {names} from the identity", "combine": f"scan over the segments carrying {names}",
                "apply": f"scan of each segment from where it begins, carrying {names}"}.get(self.part, f"scan carrying {names}")
        over = "all chunks in parallel" + ", pairs of tokens first" * self.apart
        what = f"walk through the tokens carrying {names}" if self.walks else what if self.carries else over
        parts = [f"saves {', '.join(self.saves)}"] * bool(self.saves)
        parts += [f"stores {', '.join(self.stores)}"] * bool(self.stores)
        return f"{self.name}: {what}; {'; '.join(parts) or 'keeps its ends'}"


@dataclass(frozen=True)
class Schedule:
    """Kernels in launch order, for one program."""

    name: str
    kernels: tuple[Kernel, ...]

    @property
    def launches(self) -> int:
        """How many there are at least."""
        return sum(1 + k.apart for k in self.kernels)

    def __str__(self) -> str:
        return "\n".join([f"schedule {self.name}", *(f"  {k}" for k in self.kernels)])


Cut = Callable[[Program], Schedule]

DOUBT = 0.02
"""Estimates that differ by less say nothing: fewer kernels win."""


def needed(program: Program, kernels: list[Kernel]) -> tuple[Kernel, ...]:
    """Save only the carries that a later kernel reads back or the program keeps; drop kernels with nothing left to do."""
    out: list[Kernel] = []
    kept = {i for _, i in program.kept}
    wanted = {c.name for c in program.carries if c.inp in kept}
    for k in reversed(kernels):
        k = replace(k, saves=tuple(s for s in k.saves if s in wanted))
        ends = any(not program.name.endswith("_backward") or c.reverse for c in program.carries if c.name in k.carries)
        if k.saves or k.stores or ends:
            wanted |= set(k.loads(program))
            out.append(k)
    return tuple(reversed(out))


@dataclass(frozen=True)
class Choice:
    """The chosen schedule and why: estimated seconds and their reasons for every candidate, the chosen one first."""

    schedule: Schedule
    estimates: tuple[tuple[Schedule, float, str], ...]

    @property
    def seconds(self) -> float:
        """The estimate of the chosen schedule."""
        return self.estimates[0][1]

    def __str__(self) -> str:
        lines = [str(self.schedule), "", "candidates, the chosen one first:"]
        lines += [f"  {s.name:<10} {t * 1e6:9.1f} us: {why}" for s, t, why in self.estimates]
        return "\n".join(lines)


Rank = Callable[[Program, Schedule, Shape, Target], tuple[float, str]]
"""Estimated seconds of a schedule, and the reasons in words."""


def by_kernel(program: Program, schedule: Schedule, shape: Shape, target: Target) -> tuple[float, str]:
    """The sum over the kernels of the slowest of memory, matrix units and dependent steps."""
    costs = [cost(program, k, shape) for k in schedule.kernels]
    return sum(c.seconds(target) for c in costs), ", ".join(
        f"{k.name} {c.bytes / 1e6:.1f} MB, {c.flops / 1e9:.2f} GFLOP, {c.steps} dependent products"
        for k, c in zip(schedule.kernels, costs, strict=True))


def choose(program: Program, cuts: tuple[Cut, ...], shape: Shape, target: Target = H200, rank: Rank = by_kernel) -> Choice:
    """Rank the candidate cuts by estimated time; of those that are in doubt, the one with the fewest kernels comes first."""
    found = [(s, *rank(program, s, shape, target)) for s in (cut(program) for cut in cuts)]
    found.sort(key=lambda f: f[1])
    first = min((f for f in found if f[1] <= (1 + DOUBT) * found[0][1]), key=lambda f: f[0].launches)
    return Choice(first[0], (first, *(f for f in found if f is not first)))
