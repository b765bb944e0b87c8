"""How memories move from chunk to chunk on ATen: one short scan over the chunks, of all sequences and heads at once.

Chunks come first in every tensor, so that each step reads and writes numbers that lie together, in their final place.
Memories that depend on each other go together, each chunk running the operations between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lsmc.lowering.backends import aten_scan, aten_tiles


@torch.library.custom_op("lsmc::carry", mutates_args=())
def carry(scale: Tensor | None, transition: Tensor | None, constant: Tensor | None, left: Tensor | None,
          right: Tensor | None, inner: Tensor | None, start: Tensor, reset: Tensor | None,
          reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The memories that reach each chunk, the last one, and x of each chunk, under
    M ↦ scale ⊙ M + transition M + left x + constant, x = right M + inner.

    scale: (N, B, H, K or 1, V or 1), transition: (N, B, H, K, K), left: (…, K, C), right: (…, C, K), inner: (…, C, V),
    constant: (…, K, V), start: (B, H, K, V) → (N, B, H, K, V), (B, H, K, V), (N, B, H, C, V). For packed sequences B is
    1, start is (S, H, K, V), and reset is (N,) int64: the sequence that (in the direction of the scan) begins with chunk
    n as s, else −1 − s; ends are (S, H, K, V).
    """
    given = next(t for t in (constant, left, transition, scale) if t is not None)
    (n, b, h), (k, v) = given.shape[:3], start.shape[-2:]
    parts = [None if x is None else x.reshape(n, b * h, *x.shape[-2:]).unbind(0)
             for x in (scale, transition, constant, left, right, inner)]
    states = start.new_empty((n, b * h, k, v))
    xs = start.new_empty((n, b * h, left.shape[-1] if left is not None else 0, v))
    ends = torch.empty_like(start, memory_format=torch.contiguous_format)
    order = range(n)[::-1] if reverse else range(n)
    if reset is None:
        _scan(parts, start.reshape(-1, k, v), states, xs, order, ends.view(-1, k, v))
    else:
        _packed(parts, start, states, xs, reset, order, ends)
    return states.view(n, b, h, k, v), ends, xs.view(n, b, h, xs.shape[2], v)


@carry.register_fake
def _(scale: Tensor | None, transition: Tensor | None, constant: Tensor | None, left: Tensor | None,
      right: Tensor | None, inner: Tensor | None, start: Tensor, reset: Tensor | None,
      reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    given = next(t for t in (constant, left, transition, scale) if t is not None)
    n, b, h = given.shape[:3]
    return (start.new_empty((n, b, h, *start.shape[2:])),
            torch.empty_like(start, memory_format=torch.contiguous_format),
            start.new_empty((n, b, h, left.shape[-1] if left is not None else 0, start.shape[-1])))


@torch.library.custom_op("lsmc::together", mutates_args=())
def together(values: Sequence[Tensor], starts: Sequence[Tensor], reset: Tensor | None, reverse: bool, sizes: Sequence[int],
             source: str) -> list[Tensor]:
    """The memories that reach each chunk, then the last ones, of memories that one chunk moves by `source`.

    source: of ``step(memories, values, size, unit)``, which gives the memories after a chunk; values: (N, B, H, …), of
    which a chunk sees its own, (1, B, H, …); starts: (B, H, K, V); sizes: of T, K and V → each (N, B, H, K, V), then each
    (B, H, K, V). Packed sequences as in `carry`.
    """
    (n, b, h), step = values[0].shape[:3], _step_of(source)
    size, unit = {"1": 1, "F": sizes[1] ** 2, **dict(zip("TKV", sizes, strict=True))}, starts[0].new_ones((1,) * 5)
    states = [s.new_zeros((n, b, h, *s.shape[2:])) for s in starts]
    memories, ends = [s[None] for s in starts], [s.clone(memory_format=torch.contiguous_format) for s in starts]
    owners = None if reset is None else reset.tolist()
    owner = None if reset is not None else slice(None)
    for i in range(n)[::-1] if reverse else range(n):
        if owners is not None and owners[i] >= 0:
            owner = slice(owners[i], owners[i] + 1)
            memories = [s[None, owner] for s in starts]
        if owner is None:  # of no sequence
            continue
        for state, memory in zip(states, memories, strict=True):
            state[i : i + 1] = memory
        memories = step(memories, [x[i : i + 1] for x in values], size, unit)
        for end, memory in zip(ends, memories, strict=True):
            end[owner] = memory[0]
    return [*states, *ends]


@together.register_fake
def _(values: Sequence[Tensor], starts: Sequence[Tensor], reset: Tensor | None, reverse: bool, sizes: Sequence[int],
      source: str) -> list[Tensor]:
    n, b, h = values[0].shape[:3]
    states = [s.new_empty((n, b, h, *s.shape[2:])) for s in starts]
    return [*states, *(torch.empty_like(s, memory_format=torch.contiguous_format) for s in starts)]


@cache
def _step_of(source: str) -> Callable[..., list[Tensor]]:
    scope: dict[str, Any] = {"torch": torch, **aten_tiles.NAMES, **aten_scan.NAMES}
    exec(source, scope)
    step: Callable[..., list[Tensor]] = scope["step"]
    return step


def _scan(parts: Sequence[Sequence[Tensor] | None], start: Tensor, states: Tensor, xs: Tensor, order: range,
          end: Tensor) -> None:
    """One chunk after the other in this order, from `start`; fills `states`, `xs` and `end`."""
    scales, transitions, constants, lefts, rights, inners = parts
    before, x_of = states.unbind(0), xs.unbind(0)
    before[order[0]].copy_(start)
    for i, new in zip(order, [*(before[j] for j in order[1:]), end], strict=True):
        memory, there = before[i], None if constants is None else constants[i]
        if scales is not None:
            there = (torch.mul(memory, scales[i], out=new) if there is None
                     else torch.addcmul(there, memory, scales[i], out=new))
        if transitions is not None:
            there = _add_product(there, transitions[i], memory, new)
        if lefts is not None and rights is not None:
            x = _add_product(None if inners is None else inners[i], rights[i], memory, x_of[i])
            there = _add_product(there, lefts[i], x, new)
        if there is not new:
            assert there is not None
            new.copy_(there)


def _add_product(x: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """x + a b, written to `out`, which may be x."""
    if x is None:
        return torch.bmm(a, b, out=out)
    return out.baddbmm_(a, b) if x is out else torch.baddbmm(x, a, b, out=out)


def _packed(parts: Sequence[Sequence[Tensor] | None], start: Tensor, states: Tensor, xs: Tensor, reset: Tensor,
            order: range, ends: Tensor) -> None:
    """Sequence by sequence; chunks that belong to none keep zeros, sequences without chunks what they start with."""
    ends.copy_(start)
    owners = torch.where(reset >= 0, reset, -1 - reset).tolist()
    starts = [j for j, i in enumerate(order) if reset[i] >= 0]
    for i in order[: starts[0]] if starts else order:
        states[i], xs[i] = 0, 0
    for j, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        owner = owners[order[j]]
        _scan(parts, start[owner], states, xs, order[j:stop], ends[owner])
