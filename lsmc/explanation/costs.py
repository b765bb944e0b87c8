"""What a plan costs, as numbers: each candidate schedule by kernel, work per token against the device's floor, kernels on sm_90."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lsmc.ir import Op, Program
from lsmc.lowering.apart import Failure, apart
from lsmc.lowering.backends.triton_cost import estimate
from lsmc.lowering.backends.triton_cut import pieces
from lsmc.lowering.backends.triton_sums import gather
from lsmc.lowering.plan import Direction
from lsmc.schedules import Kernel, Schedule, Shape
from lsmc.schedules.cost import cost
from lsmc.target import H200, Target

COMPILING = 240.0
"""Seconds after which one kernel is given up."""
DTYPES = {2: "bf16", 4: "fp32"}


@dataclass(frozen=True)
class Launch:
    """One kernel of a schedule, as estimated; `body` are the operations that it works out."""

    name: str
    seconds: float
    bytes: float
    limit: str
    """What decides the time, in words."""
    registers: int | None
    body: frozenset[int]


@dataclass(frozen=True)
class Candidate:
    """One schedule with its launches; the times of those add up to its own."""

    schedule: Schedule
    launches: tuple[Launch, ...]

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.launches)


def candidates(direction: Direction, shape: Shape, target: Target = H200) -> list[Candidate]:
    """Every schedule that was weighed, best first, kernel by kernel as the ranking counted it."""
    made = _on_gpu if direction.target == "triton" else _by_kernel
    return [Candidate(schedule, tuple(made(direction.program, schedule, shape, target)))
            for schedule, _, _ in direction.choice.estimates]


def _on_gpu(program: Program, schedule: Schedule, shape: Shape, target: Target) -> Iterable[Launch]:
    found = gather(program)
    for piece, e in zip(pieces(found, schedule), estimate(found, schedule, shape, target)):
        memory = e.bytes / target.bytes_per_s
        work = e.seconds - target.launch_s
        serial = "steps, one after the other" if piece.kernel.carries else "arithmetic"
        limit = "memory traffic" if memory >= 0.95 * work else serial
        own = piece.kernel.of(found)
        body = _shown(found, piece.kernel, (op.id for op in own.ancestors(piece.roots(own), piece.known)))
        yield Launch(e.name, e.seconds, e.bytes, limit, e.registers, body)


def _shown(program: Program, kernel: Kernel, body: Iterable[int]) -> frozenset[int]:
    """What of a kernel's body is the chunk program's: none of what combines segments, whose program is another."""
    return frozenset(body) & program.index.keys() if kernel.part != "combine" else frozenset()


def _by_kernel(program: Program, schedule: Schedule, shape: Shape, target: Target) -> Iterable[Launch]:
    for kernel in schedule.kernels:
        c = cost(program, kernel, shape)
        parts = {"memory traffic": c.bytes / target.bytes_per_s, "arithmetic": c.flops / (0.4 * target.flops_per_s),
                 "steps, one after the other": c.steps * target.step_s}
        body = _shown(program, kernel, (op.id for op in kernel.body(kernel.of(program))))
        yield Launch(kernel.name, c.seconds(target), c.bytes, max(parts, key=lambda p: parts[p]), None, body)


# -- per token --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """One direction, per token and head: what has to move, what the schedule moves, operations; and the times of all tokens."""

    least: float
    moved: float
    products: float
    elementwise: float
    floor: float
    """Seconds in which the device can move the least bytes and do the products, whichever takes longer."""
    bound: str
    predicted: float


def per_token(program: Program, chosen: Candidate, shape: Shape, target: Target = H200) -> Token:
    """The work of a program that nothing is kept for, beside that of a schedule, which may have been handed some of it."""
    whole = Kernel("whole", tuple(c.name for c in program.carries), (), tuple(n for n, _ in program.outputs))
    c = cost(program, whole, shape)
    moving, doing = c.bytes / target.bytes_per_s, c.flops / target.flops_per_s
    tokens = shape.sequences * shape.tokens
    elements = sum(elementwise(program, op, shape) for op in program.ops) / shape.chunk
    return Token(c.bytes / tokens, sum(launch.bytes for launch in chosen.launches) / tokens, c.flops / tokens, elements,
                 max(moving, doing), "memory" if moving >= doing else "matrix products", chosen.seconds)


def elementwise(program: Program, op: Op, shape: Shape) -> float:
    """Operations outside the matrix units, of one chunk: an elementary function counts as one."""
    if op.kind == "map":
        return shape.size(op.dims) * float(op.attr("expr").count_ops())
    if op.kind in ("sum", "max", "cumsum", "mask", "valid"):
        return float(shape.size(program.index[op.args[0]].dims))
    if op.kind in ("between", "between_grad"):
        return 2.0 * shape.chunk * shape.chunk
    if op.kind == "scan" or op.kind == "scan_grad" and op.attr("wrt") == 0:  # one pass gives all partial derivatives
        states = shape.chunk * shape.key * shape.value
        once = float(op.attr("log").count_ops()) + 2 + 2 * op.attr("writes") + 2 * bool(op.attr("at"))
        return float(states * once * (1 if op.kind == "scan" else 3))
    return 0.0


# -- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiling:
    """One kernel to compile: the place of it among those of a program under a schedule."""

    program: Program
    schedule: Schedule
    flagged: bool
    place: int
    shape: Shape


def obstacle() -> str:
    """Why no kernel can be compiled on this machine; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    from lsmc.lowering import ptxas

    if ptxas.in_use() is None:
        return "no ptxas that runs: TRITON_PTXAS_PATH names one, lsmc doctor says more"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter is on (TRITON_INTERPRET=1), which does not compile"
    return ""


def assembler() -> tuple[str, str]:
    """The versions that compile, and what is known against them."""
    import triton

    from lsmc.lowering import ptxas

    ptxas.select()
    used = ptxas.in_use()
    version = used[1] if used else "?"
    return f"Triton {triton.__version__}, ptxas {version}", ptxas.trouble(version) if used else ""


def resources(jobs: list[Compiling]) -> Iterable[tuple[Compiling, Any]]:
    """Every job with its `Resources`, or a `Failure`, as they end: in processes of their own, side by side."""
    count = min(len(jobs), os.cpu_count() or 1)
    return apart(compile_one, jobs, count, COMPILING) if jobs else ()


def compile_one(job: Compiling) -> Any:
    """Registers, shared memory and spills of one kernel for sm_90a; needs no GPU."""
    from lsmc.lowering.backends.triton import Compiled, plan_of
    from lsmc.lowering.offline import resource

    s = job.shape
    made = Compiled(job.program, job.schedule, job.flagged)
    k = made.kernels[job.place]
    plan = plan_of(k, s.key, s.value, s.sequences, s.chunk, s.element_bytes)
    return resource(made, k, s.key, s.value, s.chunk, DTYPES[s.element_bytes], plan)


__all__ = ["Candidate", "Compiling", "Failure", "Launch", "Token", "assembler", "candidates", "obstacle", "per_token", "resources"]
