"""One scan a direction: outputs leave the kernel that has their memory on chip.

Carry dependence decides the place of each output: what needs the forward memory only (o, dq) belongs to the forward
scan, the rest to the reverse scan, which reads stored memories only where an output needs both.
"""

from __future__ import annotations

from lsmc.ir import Program
from lsmc.schedules.base import Kernel, Schedule, needed


def fused(program: Program) -> Schedule:
    """fwd: {M on chip; o}.   bwd: {M on chip; what needs no dM}, {dM on chip; the rest}."""
    back = {c.inp for c in program.carries if c.reverse}
    forward = tuple(c.name for c in program.carries if not c.reverse)
    reverse = tuple(c.name for c in program.carries if c.reverse)
    early = tuple(n for n, i in program.outputs if not back & {op.id for op in program.ancestors([i])})
    if not reverse:
        return Schedule("fused", needed(program, [Kernel("scan", forward, forward, early)]))
    needs_memory = any(op.attr("role") == "carry" for n, i in program.outputs if n in early
                       for op in program.ancestors([i]) if op.kind == "input")
    late = tuple(n for n, _ in program.outputs if n not in early or not needs_memory)
    early = early if needs_memory else ()
    return Schedule("fused", needed(program, [Kernel("forward_scan", forward, forward, early),
                                              Kernel("reverse_scan", reverse, (), late)]))
