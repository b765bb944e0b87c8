"""One scan a direction that stores what of V's width needs its memory alone; all chunks in parallel the rest.

Between `fused`, whose programs walk through the chunks with every product, and `two_pass`, which reads each memory
once more for what the scan had on chip. Programs of a scan share the columns of a memory, V: what has K's would take another scan.
What a scan works out on its way to the next memory is no reason to store from it: the kernel over all chunks takes that anyway.
"""

from __future__ import annotations

import networkx as nx

from lsmc.ir import Program
from lsmc.schedules.base import Kernel, Schedule, needed
from lsmc.schedules.cost import graph


def half_fused(program: Program) -> Schedule:
    """fwd: {M on chip; o}.   bwd: {M on chip, save it}, {dM on chip, save it; dv where it needs no M}, {chunks: the rest}."""
    reverse = [c for c in program.carries if c.reverse]
    if not reverse:
        memories = tuple(c.name for c in program.carries)
        return Schedule("half_fused", needed(program, [Kernel("scan", memories, memories, tuple(n for n, _ in program.outputs))]))
    links = graph(program)
    back = {c.inp for c in reverse}
    forward = {op.id for op in program.inputs("carry")} - back
    way = {i for c in reverse for i in nx.descendants(links, c.inp) & nx.ancestors(links, c.out)}

    def leaves(i: int) -> bool:
        behind = nx.ancestors(links, i)
        alone = behind & back and not behind & forward and program.index[i].dims == ("T", "V")
        return bool(alone) and not {i, *program.index[i].args} & way

    early = tuple(n for n, i in program.outputs if leaves(i))
    rest = tuple(n for n, _ in program.outputs if n not in early)
    memories, cotangents = tuple(c.name for c in program.carries if not c.reverse), tuple(c.name for c in reverse)
    return Schedule("half_fused", needed(program, [Kernel("forward_scan", memories, memories, ()),
                                                   Kernel("reverse_scan", cotangents, cotangents, early),
                                                   Kernel("chunks", (), (), rest)]))
