"""Serial where it must be, parallel where it can: scans that only move the memories, then all chunks at once."""

from __future__ import annotations

from lsmc.ir import Program
from lsmc.schedules.base import Kernel, Schedule, needed


def two_pass(program: Program) -> Schedule:
    """fwd: {scan M, save it}, {chunks: o}.   bwd: {scan M}, {reverse scan dM}, {chunks: all gradients}."""
    forward = tuple(c.name for c in program.carries if not c.reverse)
    reverse = tuple(c.name for c in program.carries if c.reverse)
    kernels = [Kernel("scan", forward, forward, ())]
    if reverse:
        kernels.append(Kernel("reverse_scan", reverse, reverse, ()))
    kernels.append(Kernel("chunks", (), (), tuple(n for n, _ in program.outputs)))
    return Schedule("two_pass", needed(program, kernels))
