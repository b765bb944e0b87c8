"""Token by token, the memories on chip from the first to the last: for calls of few tokens.

A chunk of one token fills one row of every tile, and a memory that several kernels want passes through memory between them. The
recurrence itself (`lsmc.walk`) reads a memory once and writes it once, whatever lies between, and waits for each token.
"""

from __future__ import annotations

from lsmc.ir import Program
from lsmc.schedules.base import Kernel, Schedule
from lsmc.schedules.two_pass import two_pass
from lsmc.walk import walkable


def walk(program: Program) -> Schedule:
    """fwd: {tokens: M on chip; o}.   bwd, and a forward that keeps tiles for it or has rows of pairs: as `two_pass`."""
    if not walkable(program):
        return Schedule("walk", two_pass(program).kernels)
    kernel = Kernel("tokens", tuple(c.name for c in program.carries), (), tuple(n for n, _ in program.outputs), walks=True)
    return Schedule("walk", (kernel,))
