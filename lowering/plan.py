"""A plan: one method at one set of options, from its chunk program down to compiled kernels on each kind of device."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor

import lsmc.lowering.backends.aten as aten
from lsmc.canonical import Canonical
from lsmc.ir import Dims, Program, prune
from lsmc.keep import keep
from lsmc.schedules import Choice, Schedule, Shape
from lsmc.schedules.base import Rank, by_kernel

Results = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Outputs, and the last value of every carry, by name."""

Repeat = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Results | None]
"""A recorded launch on other tensors of the same sizes, strides, types and alignments; None where it holds no longer."""


class Executable(Protocol):
    """What a backend makes of a program and its schedule."""

    source: str
    hash: str
    fresh: bool  # results are new tensors, never views of inputs or of each other
    needs_memories: bool  # else a memory that is not given is zero
    keeps: tuple[str, ...]  # names of the outputs that are inputs of the backward program

    def launch(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor], chunk: int,
               cu_seqlens: Tensor | None = None) -> Results: ...

    def recorded(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor], chunk: int) -> Repeat | None: ...


def backend(device: str) -> str:
    """The backend for a device type: Triton on CUDA, ATen elsewhere; the variable `LSMC_BACKEND` overrides it."""
    return os.environ.get("LSMC_BACKEND") or ("triton" if device == "cuda" else "aten")


def lacks(target: str, program: Program) -> str:
    """The rule by which a backend has no code for a forward program, in words; empty where it has."""
    if target == "aten":
        return ""
    from lsmc.lowering.backends.triton_cut import unshared
    from lsmc.lowering.backends.triton_scan import unwalkable

    return unwalkable(program) if any(op.kind == "scan" for op in program.ops) else unshared(program)


def able(target: str, program: Program) -> str:
    """The backend `target` where it has code for all of a forward program, else ATen, which runs on every device."""
    return "aten" if lacks(target, program) else target


def ranking(target: str) -> Rank:
    """How schedules are compared for a backend."""
    if target == "triton":
        from lsmc.lowering.backends.triton_cost import rank

        return rank
    return by_kernel


def sharings(target: str, forward: Program, backward: Program, cuts: Iterable[Schedule]) -> Iterator[tuple[Program, Program]]:
    """Both programs with values kept by the forward for the backward: those that a backend finds worth it where the backward
    is cut in these ways."""
    if target == "triton":
        from lsmc.lowering.backends.triton_cut import passed
        from lsmc.lowering.backends.triton_sums import summed

        forward, backward = summed(forward), summed(backward)
        found = [passed(backward, cut) for cut in cuts]
    else:
        found = [aten.passed(backward)]
    for values in dict.fromkeys(map(frozenset, found)):
        if values:
            yield keep(forward, backward, values)


def fewer(backward: Program, wanted: Iterable[bool]) -> Program:
    """A backward program without the gradients that nobody wants: one flag for each of its outputs."""
    outputs = tuple(o for o, is_wanted in zip(backward.outputs, wanted, strict=True) if is_wanted)
    return prune(replace(backward, outputs=outputs))


@functools.cache
def _library() -> str:
    """A hash of the code that carries out generated source: graphs cached by other versions of it are not this one's."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class Direction:
    """A program with the schedule chosen for it, and what a backend compiled from them."""

    program: Program
    choice: Choice
    target: str
    before: Direction | None = field(default=None, compare=False, repr=False)
    """Whose kept values this one takes."""

    @cached_property
    def executable(self) -> Executable:
        if self.target == "triton":
            import lsmc.lowering.backends.triton as triton

            flagged = self.before is not None and "_flags" in self.before.executable.keeps
            return triton.Compiled(self.program, self.choice.schedule, flagged)
        return _aten(self.program, self.choice.schedule)


@functools.lru_cache(maxsize=128)
def _aten(program: Program, schedule: Schedule) -> aten.Compiled:
    """The same for all sizes at which the schedule is chosen."""
    return aten.Compiled(program, schedule)


@dataclass(frozen=True)
class Plan:
    """Forward and backward of one method; `key` names it in a graph and covers all source, generated or not.

    training           the forward that keeps what the backward takes; `forward` itself where that is nothing
    canonical, scale   the method, and the factor on its q
    fresh              blocks begin with chunks: memories that are given may be in the middle of one
    shape              the sizes at which its schedules were ranked
    derive             the plan of another method, with its factor on q, at the options of this one
    cut                a program under the schedule that suits it, at the options of this plan, behind the direction it takes from
    lacking            the rule by which the backend that was asked for has no code for it, if it runs on ATen instead
    """

    canonical: Canonical
    scale: float
    chunk: int
    fresh: bool
    shape: Shape
    forward: Direction
    training: Direction
    backward: Direction
    derive: Callable[[Canonical, float], Plan] = field(compare=False, repr=False)
    cut: Callable[[Program, Direction | None], Direction] = field(compare=False, repr=False)
    lacking: str = ""
    _fewer: dict[tuple[bool, ...], Direction] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.canonical.name

    @property
    def seconds(self) -> float:
        """The estimate for forward and backward."""
        return self.training.choice.seconds + self.backward.choice.seconds

    def gradients(self, wanted: tuple[bool, ...]) -> Direction:
        """`backward` without the gradients that nobody wants: one flag for each of `inputs`. Those of the memories stay, which
        are what its scans carry."""
        if all(wanted):
            return self.backward
        if wanted not in self._fewer:
            self._fewer[wanted] = self.cut(fewer(self.backward.program, wanted), self.backward.before)
        return self._fewer[wanted]

    @cached_property
    def key(self) -> str:
        parts = dict.fromkeys(d.executable.hash for d in (self.forward, self.training, self.backward))
        text = f"{''.join(parts)}{self.chunk}{_library()}"
        return f"{self.name}:{self.forward.target}:{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name.removeprefix("d_") for name, _ in self.backward.program.outputs)

    @cached_property
    def reads(self) -> tuple[tuple[int, str, bool, str], ...]:
        """What the forward program reads: its place among the inputs, name, whether per token, last dimension."""
        return tuple((self.inputs.index(op.attr("name")), op.attr("name"), op.attr("role") == "token", op.dims[1])
                     for op in self.forward.program.inputs("token", "head"))

    @cached_property
    def memories(self) -> tuple[Dims, ...]:
        """The dimensions of each memory, in the order of `carries`."""
        return tuple(self.forward.program.index[c.inp].dims for c in self.forward.program.carries)

    @cached_property
    def carries(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.forward.program.carries)
