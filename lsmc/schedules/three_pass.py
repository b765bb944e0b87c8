"""`two_pass`, its last pass in two: what tokens of a chunk are to each other, then what memories make of it.

Programs over all chunks share the columns of K, and each would work out again what has none of them: products over V of all
pairs of tokens, and what follows from these alone.
"""

from __future__ import annotations

from dataclasses import replace

from lsmc.ir import Program
from lsmc.schedules.base import Schedule
from lsmc.schedules.two_pass import two_pass


def three_pass(program: Program) -> Schedule:
    """fwd: `two_pass`.   bwd: {scan M}, {reverse scan dM}, {chunks: pairs of tokens}, {chunks: all gradients}."""
    back = any(c.reverse for c in program.carries)
    return Schedule("three_pass", tuple(k if k.carries or not back else replace(k, apart=True) for k in two_pass(program).kernels))
