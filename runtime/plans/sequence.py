"""Sequence parallelism: axis "sp" deals out the tokens, dimension 1 of the inputs.

| in the graph | becomes |
|---|---|
| an LSM operator | its run from a zero memory, a gather of summaries whose size does not depend on the tokens, and a correction:
                    `lsmc.lowering.split`; of packed sequences, those of its first and its last |
| one without such a summary | its run of all tokens of some heads: `lsmc.runtime.plans.heads` |
| causal attention | a gather of k and v, the mask of this rank's rows |
| a convolution's padding with zeros | the last tokens of the rank before |
| positions | this rank's |
| sums and means over tokens | the same over all ranks |
| what is known to treat tokens one by one | itself |
| anything else | an error that names it |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from lsmc.errors import LsmError
from lsmc.lowering import ops
from lsmc.lowering.split import way
from lsmc.runtime import collectives
from lsmc.runtime.attend import able, attend
from lsmc.runtime.insert import Value
from lsmc.runtime.mesh import Axis
from lsmc.runtime.plans.heads import by_heads
from lsmc.runtime.spread import RULES, Spread, attention, batched, padded

NEAR = 8
"""Up to so many ranks, those of a node, summaries that are known before the operator runs are waited for: it then starts from the
memory that comes in, which costs less than to correct its output by it."""


def spread_sequence(module: GraphModule, axis: Axis) -> list[str]:
    """Each rank computes its share of the tokens, and what it needs of the others' it gathers."""
    return Spread(axis, 1, RULES | {"lsmc.fwd": operator, "scaled_dot_product_attention": causal, "pad": shifted}).run(module)


def operator(s: Spread, node: Node, inputs: Sequence[Value], start: Sequence[Value], cu_seqlens: Any, spec: str) -> Any:
    """[o, final memories…] of an LSM operator: o is split, the memories are those after the last of all tokens."""
    places = [split for v in inputs if (split := s.of(v)) is not None]
    if places and all(split.dim == 0 for split in places):
        return batched(s, node, inputs, start, cu_seqlens, spec)
    plan = ops.plan_of(spec)
    tokens = {f.name for f in plan.canonical.inputs if f.per == "token"}
    given = []
    for name, v in zip(plan.inputs, inputs, strict=True):
        split = s.of(v)
        if name in tokens and split is None:
            v = s.taken(v, 1)
        elif split is not None and (name not in tokens or (split.dim, split.outer, split.ahead) != (1, 1, 0)):
            raise s.refused(node, f"has parts of {name!r} that are not its tokens")
        given.append(v)
    if cu_seqlens is not None and s.of(cu_seqlens) is not None:
        raise s.refused(node, "has packed sequences (cu_seqlens) whose ends are themselves dealt out")
    if any(s.of(v) is not None for v in start):
        raise s.refused(node, "has parts of the initial state")
    wanted = any(user.args[1] != 0 and user.users for user in node.users)
    try:
        kind, twice = way(spec)
    except LsmError as error:
        return by_heads(s, node, dict(zip(plan.inputs, given)), start, cu_seqlens, wanted, error.rule)
    given = [v if name in tokens else s.used(v) for name, v in zip(plan.inputs, given)]
    lsmc, sizes = torch.ops.lsmc, ops.extents(plan, [v.example for v in given])
    options = s.axis.size, [sizes.dims["K"], sizes.dims["V"]], spec
    packed = None if cu_seqlens is None else Packed(s, cu_seqlens, sizes.tokens)
    twice |= packed is not None and bool(start or wanted)  # sequences that begin and end inside need theirs
    o = through = None
    if kind == "sums":
        pack = lsmc.summary.default(given, spec, packed and packed.since)
        pending = collectives.gather(pack, s.axis)
        if not twice and s.axis.size > NEAR:
            o = lsmc.fwd.default(given, [], packed and packed.ends, spec)[0]  # while the summaries are under way
    elif kind == "columns":
        made = lsmc.columns.default(given, spec, packed and packed.ends, packed and packed.last)
        o, through, pack = made[0], made[1], made[2]
        pending = collectives.gather(pack, s.axis)
    else:
        alone = lsmc.fwd.default(given, [], packed and packed.ends, spec)
        after = [alone[i + 1] for i in range(len(plan.carries))]
        after = [x.index_select(0, packed.last) for x in after] if packed else after
        pack = lsmc.remembered.default(given, after, spec, packed and packed.since)
        pending = collectives.gather(pack, s.axis)
    first = [s.used(v) for v in start]
    before = [x.index_select(0, packed.first) for x in first] if packed else first
    states = lsmc.incoming.default(collectives.arrived(pending), before, s.rank(), *options, packed and packed.rank)
    states, ends = [states[i] for i in range(len(plan.carries))], list[Value]()
    if twice or o is None:
        again = lsmc.fwd.default(given, packed.starting(states, first) if packed else states, packed and packed.ends, spec)
        o = again[0]
        if packed and wanted:
            ends = [collectives.summed(packed.ending(again[i + 1]), s.axis) for i in range(len(states))]
    else:
        found = (lsmc.corrected.default(o, given, states, spec) if through is None
                 else lsmc.through.default(o, through, states))
        o = torch.where(packed.reached, found, o) if packed else found
    s.changes.append(f"{node.name}: {plan.name} exchanges {pack.shape[-1]} numbers per head over {s.axis}")
    s.mark(o, replace(places[0], dim=1))
    if wanted and not packed:
        ends = lsmc.incoming.default(collectives.whole(pack, 0, s.axis), list(start), None, *options)
        ends = [ends[i] for i in range(len(plan.carries))]
    return (o, *ends)


class Packed:
    """Packed sequences (cu_seqlens, (N + 1,)) as a rank sees them that has `tokens` of them.

    ends     (N + 1,): where they end among its own tokens, many of them without any
    since    (1,): where the sequence of its last token begins, less than 0 on a rank before; last: the index of that sequence
    rank     (1,): the rank on which the sequence of its first token begins
    reached  (1, T, 1, 1): which tokens are of that sequence
    chosen   (N, 1, 1, 1): which sequence it is; ours: which end here
    """

    def __init__(self, s: Spread, cu_seqlens: Value, tokens: int) -> None:
        at, begins = s.rank() * tokens, cu_seqlens[:-1]
        self.first, self.last = (((begins <= t).sum() - 1).reshape(1) for t in (at, at + (tokens - 1)))
        self.ends = (cu_seqlens - at).clamp(0, tokens).to(cu_seqlens.dtype)
        self.since = begins.index_select(0, self.last) - at
        self.rank = begins.index_select(0, self.first) // tokens
        until = cu_seqlens.index_select(0, self.first + 1) - at
        self.reached = (self._range(s, tokens, at) < until).reshape(1, -1, 1, 1)
        self.chosen = (self._range(s, begins.shape[0], at) == self.first).reshape(-1, 1, 1, 1)
        self.ours = ((cu_seqlens[1:] - 1).clamp(min=0) // tokens == s.rank()).reshape(-1, 1, 1, 1)

    @staticmethod
    def _range(s: Spread, n: int, like: Value) -> Value:
        made: Any = s.writer.create_proxy("call_function", torch.arange, (n,), {"device": like.device})
        return made

    def starting(self, states: Sequence[Value], start: Sequence[Value]) -> list[Any]:
        """(N, …): what comes in for the first sequence; for the others what they start from, or zeros."""
        return [torch.where(self.chosen, x, start[i] if start else torch.zeros_like(x)) for i, x in enumerate(states)]

    def ending(self, state: Value) -> Any:
        """(N, …): what is left of the sequences that end here, zeros for the others."""
        return torch.where(self.ours, state, torch.zeros_like(state))


def causal(s: Spread, node: Node, q: Value, k: Value, v: Value, attn_mask: Any = None, dropout_p: float = 0.0,
           is_causal: bool = False, **kwargs: Any) -> Value:
    """Softmax attention over all tokens: the keys and values of all ranks, the rows of this one."""
    split = s.only(node, q, k, v)
    if split.dim != -2:
        return attention(s, node, q, k, v, attn_mask, dropout_p, is_causal, **kwargs)
    if any(s.of(x) is None for x in (q, k, v)) or split.outer > 1 or split.ahead:
        raise s.refused(node, "meets keys that are not split as its queries are")
    n, many = q.shape[-2], s.axis.size
    pending = collectives.gather(torch.stack([k, v]) if k.shape == v.shape else torch.cat([k, v], -1)[None], s.axis)
    parts = collectives.arrived(pending).unflatten(0, (many, -1)).movedim(0, -3).flatten(-3, -2)
    k, v = (parts[0], parts[1]) if k.shape == v.shape else (parts[0][..., : k.shape[-1]], parts[0][..., k.shape[-1] :])
    if is_causal and k.shape[-2] == n * many and not kwargs.get("enable_gqa") and able(q, k, v):
        return s.mark(attend(q, k, v, kwargs.get("scale"), s.axis.group), replace(split, dim=q.ndim - 2))
    if is_causal:
        rows = s.writer.create_proxy("call_function", torch.arange, (n,), {"device": q.device}) + s.rank() * n
        columns = s.writer.create_proxy("call_function", torch.arange, (n * many,), {"device": q.device})
        late = rows[:, None] < columns
        attn_mask = torch.zeros_like(late, dtype=q.dtype).masked_fill(late, float("-inf"))
    elif attn_mask is not None and s.of(attn_mask) is None and attn_mask.ndim > 1 and attn_mask.shape[-2] != 1:
        attn_mask = s.taken(attn_mask, attn_mask.ndim - 2)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **kwargs)
    return s.mark(o, replace(split, dim=o.ndim - 2))


def shifted(s: Spread, node: Node, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Zeros before the first token are, on a rank, the last tokens of the rank before."""
    split = s.of(x)
    i = 2 * (x.ndim - 1 - split.dim)
    left, right = pad[i : i + 2] if len(pad) > i else (0, 0)
    plain = mode == "constant" and not value and not any(pad[:i]) and not any(pad[i + 2 :])
    if left <= 0 or right not in (0, -left) or not plain or split.outer > 1 or split.ahead:
        return padded(s, node, x, pad, mode, value)
    n = x.shape[split.dim]
    if left > n:
        raise s.refused(node, f"looks back {left} tokens, and a rank has {n}")
    tail = x.narrow(split.dim, n - left, left)
    tails = collectives.arrived(collectives.gather(tail, s.axis)).unflatten(0, (s.axis.size, -1))
    ranks = s.writer.create_proxy("call_function", torch.arange, (s.axis.size,), {"device": x.device})
    before = (ranks == s.rank() - 1).reshape((-1,) + (1,) * x.ndim)
    tail = torch.where(before, tails, torch.zeros_like(tails)).sum(0)
    return s.mark(torch.cat([tail, x.narrow(split.dim, 0, n + right)], split.dim), replace(split, ahead=left + right))


__all__ = ["spread_sequence"]
