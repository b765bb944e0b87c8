"""An LSM operator over "sp" by its heads: ranks trade their tokens of all heads for all tokens of some heads, and back.

| of the operator | a rank holds | while it runs |
|---|---|---|
| inputs per token | (B, T/W, HV, …) | (B, T, HV/W, …): one message |
| inputs per head, memories before and after | the whole | its heads |
| output | (B, T/W, HV, V) | (B, T, HV/W, V): one message |

Nothing is asked of the method, so that what has no summary (`lsmc.lowering.split`) goes this way; packed sequences and memories
are those of one rank. The messages grow with the tokens, and there must be a head for each rank: DeepSpeed-Ulysses (arXiv
2309.14509). Heads of q and k that are fewer than ranks are repeated, as often as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from lsmc.inputs import parts
from lsmc.lowering import ops
from lsmc.runtime import collectives
from lsmc.runtime.insert import Value
from lsmc.runtime.spread import Spread


def by_heads(s: Spread, node: Node, inputs: Mapping[str, Value], start: Sequence[Value], cu_seqlens: Any, wanted: bool,
             why: str) -> Any:
    """[o, final memories…] of an operator whose inputs per token are split along them, the memories if `wanted`; `why` it goes
    this way."""
    spec, many = str(node.args[3]), s.axis.size
    plan = ops.plan_of(spec)
    dims = {f.name: parts(f, step=False) for f in plan.canonical.inputs}
    heads = ops.extents(plan, [v.example for v in inputs.values()]).heads
    if heads % many:
        raise s.refused(node, f"cannot pass its memory on: {why}; and its {heads} heads are no multiple of the {many} ranks, which "
                              "would trade their tokens for heads")
    given = {name: _repeated(x, 2 if "T" in dims[name] else 0, many) for name, x in inputs.items()}
    given |= _traded(s, {name: x for name, x in given.items() if "T" in dims[name]})
    mine = [x if "T" in dims[name] else s.taken(x, 0) for name, x in given.items()]
    made = s.writer.call(node, (mine, [s.taken(x, 1) for x in start], cu_seqlens, spec), {})
    s.changes.append(f"{node.name}: {plan.name} trades tokens for heads over {s.axis}")
    (place, *_) = [split for v in inputs.values() if (split := s.of(v)) is not None]
    o = s.mark(collectives.traded(made[0], 1, 2, s.axis), replace(place, dim=1))
    ends = range(1, 1 + len(plan.carries)) if wanted else ()
    return (o, *(collectives.whole(made[i], 1, s.axis) for i in ends))


def _repeated(x: Value, dim: int, many: int) -> Any:
    """Each head as often as it takes for a whole number of them on every rank."""
    heads = x.shape[dim]
    return x if heads % many == 0 else x.repeat_interleave(math.lcm(heads, many) // heads, dim)


def _traded(s: Spread, values: Mapping[str, Value]) -> dict[str, Value]:
    """(B, T/W, H, …) → (B, T, H/W, …), all of one type in one message."""
    found = {}
    for dtype in dict.fromkeys(x.dtype for x in values.values()):
        sent = {name: x for name, x in values.items() if x.dtype == dtype}
        flat = [x.unflatten(2, (s.axis.size, -1)).flatten(3) for x in sent.values()]
        got = collectives.traded(torch.cat(flat, -1), 2, 1, s.axis).squeeze(2).split([x.shape[-1] for x in flat], -1)
        for i, (name, x) in enumerate(sent.items()):
            found[name] = got[i].unflatten(-1, (x.shape[2] // s.axis.size, *x.shape[3:]))
    return found


__all__ = ["by_heads"]
