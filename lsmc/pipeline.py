"""The compiler from end to end, stage by stage: read this file first.

    declaration → canonical form → chunk program → backward program → schedules → generated source → torch operator

Every stage is a value that prints, and a function to the next. `LSMC_PRINT=after:chunk` (or `after:all`) prints stages
as they are made.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from lsmc.adjoint import differentiate
from lsmc.canonical import Canonical
from lsmc.chunk import derive
from lsmc.errors import LsmOptionError
from lsmc.factors import hoist
from lsmc.ir import Program
from lsmc.lowering.plan import Direction, Plan, fewer, lacks, ranking, sharings
from lsmc.lowering.tuned.store import describe
from lsmc.schedules import CUTS, Shape, choose
from lsmc.schedules.base import DOUBT

_T = TypeVar("_T")

CHUNK = 64
"""Tokens per chunk where nothing else is asked for."""

WALK = 16
"""The most tokens between memories that are kept where kernels go token by token: on the way back they work out those between.
Half as many where memories have no more rows than this: keeping twice as many costs less then than working out again."""

TYPICAL = Shape(sequences=128, tokens=4096, key=128, value=128, chunk=CHUNK)
"""The sizes that schedules are ranked at while the real ones are symbolic."""

STAGES: dict[str, str] = {
    "canonical": "read, correct, write, decay: one form for every way of writing a method",
    "chunk": "the same for C tokens at once",
    "backward": "reverse-mode differentiation of the chunk program",
    "schedule": "where the forward program is cut into kernels, what it keeps for the backward one, and why",
    "backward_schedule": "where the backward program is cut into kernels, and why",
    "source": "the generated forward code",
    "backward_source": "the generated backward code",
}
"""The stages in order, with what each holds."""


@dataclass(frozen=True)
class Options:
    """What a caller may fix: the factor on q, the chunk length, the schedule by name, the backend, and whether calls come with
    no memories (`fresh`), so that blocks begin with the sequence."""

    scale: float = 1.0
    chunk: int = CHUNK
    schedule: str | None = None
    target: str = "aten"
    fresh: bool = False


def compile_plan(canonical: Canonical, options: Options, shape: Shape = TYPICAL) -> Plan:
    """All stages below the canonical form, as one plan.

    Raises `LsmNotAffineError` or `LsmNoChunkFormError` for methods without a chunk form, and `LsmOptionError`
    for a chunk length that is no power of two or an unknown schedule.
    """
    if options.chunk < 1 or options.chunk & (options.chunk - 1):
        raise LsmOptionError(f"chunk={options.chunk}: chunk lengths are powers of two", help="use 16, 32, 64 or 128")
    if options.schedule is not None and options.schedule not in CUTS:
        raise LsmOptionError(f"schedule={options.schedule!r} is not known", help=f"one of {', '.join(CUTS)}")
    if canonical.block is not None:  # blocks are whole chunks, or parts of one
        options = replace(options, chunk=min(options.chunk, canonical.block & -canonical.block))
        shape = replace(shape, chunk=options.chunk)
    chunk, forward, backward = _programs(canonical, options.scale, False)
    lacking = lacks(options.target, chunk)
    target = "aten" if lacking else options.target
    fresh = options.fresh and options.chunk == canonical.block and target == "triton"  # ATen ends with chunks of no token
    fresh &= shape.tokens >= options.chunk  # else nothing is gained, and tokens could not be walked through one by one
    if fresh:
        chunk, forward, backward = _programs(canonical, options.scale, True)
    _log("chunk", forward)
    _log("backward", backward)
    if canonical.matrix and target == "triton":
        options = replace(options, chunk=min(options.chunk, WALK if shape.key > WALK else WALK // 2))
        shape = replace(shape, chunk=options.chunk)
    cuts = tuple(CUTS[n] for n in CUTS if options.schedule in (None, n))

    def direction(program: Program, before: Direction | None = None) -> Direction:
        return Direction(program, choose(program, cuts, shape, rank=ranking(target)), target, before)

    def learning(training: Direction, last: Direction) -> float:
        """Seconds of both, where constants of the method are not trained."""
        names = tuple(name.removeprefix("d_") not in canonical.defaults for name, _ in last.program.outputs)
        return training.choice.seconds + (last if all(names) else direction(fewer(last.program, names), training)).choice.seconds

    alone, last = direction(forward), direction(backward)
    pairs = [(alone, last)]
    for first, second in sharings(target, forward, backward, [cut(backward) for cut in cuts]):
        training = direction(first)
        pairs.append((training, direction(second, training)))
    times = [learning(*pair) for pair in pairs]
    near = [pair for pair, seconds in zip(pairs, times, strict=True) if seconds <= (1 + DOUBT) * min(times)]
    training, last = min(near, key=lambda pair: sum(d.choice.schedule.launches for d in pair))

    def derive_other(other: Canonical, scale: float) -> Plan:
        return compile_plan(other, replace(options, scale=scale), shape)

    _log("schedule", training.choice)
    _log("backward_schedule", last.choice)
    return Plan(canonical, options.scale, options.chunk, fresh, shape, alone, training, last, derive_other, direction, lacking)


@functools.lru_cache(maxsize=64)
def _programs(canonical: Canonical, scale: float, fresh: bool) -> tuple[Program, Program, Program]:
    """The chunk program, and as it is scheduled with its backward program: the same for all sizes and chunk lengths."""
    chunk = derive(canonical, scale, fresh)
    return chunk, hoist(chunk), hoist(differentiate(chunk))


def stages(canonical: Canonical, options: Options, shape: Shape = TYPICAL) -> dict[str, str]:
    """Every stage of a method as text, in order."""
    return texts(compile_plan(canonical, options, shape))


def texts(plan: Plan) -> dict[str, str]:
    """Every stage of a plan as text, in order."""
    text: dict[str, Callable[[], object]] = {
        "canonical": lambda: plan.canonical,
        "chunk": lambda: plan.forward.program,
        "backward": lambda: _programs(plan.canonical, plan.scale, plan.fresh)[2],
        "schedule": lambda: _no_kernels(plan) + _measured(plan.training),
        "backward_schedule": lambda: _measured(plan.backward),
        "source": lambda: plan.training.executable.source,
        "backward_source": lambda: plan.backward.executable.source,
    }
    return {name: str(text[name]()) for name in STAGES}


def _no_kernels(plan: Plan) -> str:
    """Why a plan runs as ATen operations on GPUs as well."""
    return f"runs as ATen operations on a GPU as well: {plan.lacking}\n\n" if plan.lacking else ""


def _measured(direction: Direction) -> str:
    """The schedule and why, what was measured of it, and what one direction hands to the other."""
    program = direction.program
    parts = [str(direction.choice), describe(direction.executable.hash)]
    for verb, named in (("keeps for the backward", program.kept), ("takes from the forward", program.taken)):
        parts += [f"{verb}:", *(f"  {program.index[i]}" for _, i in named)] if named else []
    return "\n".join(part for part in parts if part).rstrip("\n")


def _log(stage: str, value: _T) -> _T:
    wanted = os.environ.get("LSMC_PRINT", "").removeprefix("after:").split(",")
    if stage in wanted or "all" in wanted:
        sys.stderr.write(f"── after {stage}\n{value}\n")
    return value
