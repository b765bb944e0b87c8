"""How memories move from chunk to chunk on ATen: one short scan over the chunks, of all sequences and heads at once.

A memory that only decays and grows is scanned in two levels: in all groups of √N chunks at once from zero, then over the
groups, then both are joined. Each operation is then over many numbers, which a CPU needs to be fast. One that is also
multiplied by matrices goes chunk by chunk. Memories that depend on each other go chunk by chunk together, each chunk
running the operations between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from lsmc.lowering.backends import aten_tiles

LONG = 16
"""Chunks from which on two levels are worth it."""


@torch.library.custom_op("lsmc::carry", mutates_args=())
def carry(scale: Tensor | None, transition: Tensor | None, constant: Tensor | None, left: Tensor | None,
          right: Tensor | None, inner: Tensor | None, start: Tensor, reset: Tensor | None,
          reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The memories that reach each chunk, the last one, and x of each chunk, under
    M ↦ scale ⊙ M + transition M + left x + constant, x = right M + inner.

    scale: (B, H, N, K or 1, V or 1), transition: (B, H, N, K, K), left: (…, K, C), right: (…, C, K), inner: (…, C, V),
    constant: (…, K, V), start: (B, H, K, V) → (B, H, N, K, V), (B, H, K, V), (B, H, N, C, V). For packed sequences B is
    1, start is (S, H, K, V), and reset is (N,) int64: the sequence that (in the direction of the scan) begins with chunk
    n as s, else −1 − s; ends are (S, H, K, V).
    """
    given = next(t for t in (constant, left, transition, scale) if t is not None)
    (b, h, n), (k, v) = given.shape[:3], start.shape[-2:]
    parts = [None if x is None else x.reshape(b * h, n, *x.shape[-2:])
             for x in (scale, transition, constant, left, right, inner)]
    states = start.new_empty((b * h, n, k, v))
    xs = start.new_empty((b * h, n, left.shape[-1] if left is not None else 0, v))
    if reset is not None:
        ends = _packed(parts, start, states, xs, reset, reverse)
    elif parts[0] is not None and parts[2] is not None and transition is None and left is None and n >= LONG:
        ends = _two_levels(parts[0], parts[2], start.reshape(-1, k, v), states, reverse)
    else:
        ends = _steps(parts, start.reshape(-1, k, v), states, xs, range(n)[::-1] if reverse else range(n))
    return states.view(b, h, n, k, v), ends.reshape(start.shape), xs.view(b, h, n, -1 if xs.numel() else xs.shape[2], v)


@carry.register_fake
def _(scale: Tensor | None, transition: Tensor | None, constant: Tensor | None, left: Tensor | None,
      right: Tensor | None, inner: Tensor | None, start: Tensor, reset: Tensor | None,
      reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    given = next(t for t in (constant, left, transition, scale) if t is not None)
    b, h, n = given.shape[:3]
    return (start.new_empty((b, h, n, *start.shape[2:])),
            torch.empty_like(start, memory_format=torch.contiguous_format),
            start.new_empty((b, h, n, left.shape[-1] if left is not None else 0, start.shape[-1])))


@torch.library.custom_op("lsmc::together", mutates_args=())
def together(values: Sequence[Tensor], starts: Sequence[Tensor], reset: Tensor | None, reverse: bool, sizes: Sequence[int],
             source: str) -> list[Tensor]:
    """The memories that reach each chunk, then the last ones, of memories that one chunk moves by `source`.

    source: of ``step(memories, values, size, unit)``, which gives the memories after a chunk; values: (B, H, N, …), of
    which a chunk sees its own, (B, H, 1, …); starts: (B, H, K, V); sizes: of T, K and V → each (B, H, N, K, V), then each
    (B, H, K, V). Packed sequences as in `carry`.
    """
    (b, h, n), step = values[0].shape[:3], _step_of(source)
    size, unit = {"1": 1, **dict(zip("TKV", sizes, strict=True))}, starts[0].new_ones((1,) * 5)
    states = [s.new_zeros((b, h, n, *s.shape[2:])) for s in starts]
    memories, ends = [s[:, :, None] for s in starts], [s.clone(memory_format=torch.contiguous_format) for s in starts]
    owners = None if reset is None else reset.tolist()
    owner = None if reset is not None else slice(None)
    for i in range(n)[::-1] if reverse else range(n):
        if owners is not None and owners[i] >= 0:
            owner = slice(owners[i], owners[i] + 1)
            memories = [s[owner, :, None] for s in starts]
        if owner is None:  # of no sequence
            continue
        for state, memory in zip(states, memories, strict=True):
            state[:, :, i : i + 1] = memory
        memories = step(memories, [x[:, :, i : i + 1] for x in values], size, unit)
        if owners is not None:
            for end, memory in zip(ends, memories, strict=True):
                end[owner] = memory[:, :, 0]
    if owners is None:
        for end, memory in zip(ends, memories, strict=True):
            end.copy_(memory[:, :, 0])
    return [*states, *ends]


@together.register_fake
def _(values: Sequence[Tensor], starts: Sequence[Tensor], reset: Tensor | None, reverse: bool, sizes: Sequence[int],
      source: str) -> list[Tensor]:
    b, h, n = values[0].shape[:3]
    states = [s.new_empty((b, h, n, *s.shape[2:])) for s in starts]
    return [*states, *(torch.empty_like(s, memory_format=torch.contiguous_format) for s in starts)]


@cache
def _step_of(source: str) -> Callable[..., list[Tensor]]:
    scope = {"torch": torch, **aten_tiles.NAMES}
    exec(source, scope)
    step: Callable[..., list[Tensor]] = scope["step"]
    return step


def _steps(parts: list[Tensor | None], memory: Tensor, states: Tensor, xs: Tensor, order: range) -> Tensor:
    """One chunk after the other in this order; fills `states` and `xs` and returns the last memory.

    Products are written where they lie close together, which a batch of them needs to be one call, and copied.
    """
    scales, transitions, constants, lefts, rights, inners = (None if x is None else x.unbind(1) for x in parts)
    before, x_of = states.unbind(1), xs.unbind(1)
    memory = memory.clone(memory_format=torch.contiguous_format)
    room, x = torch.empty_like(memory), xs.new_empty((*memory.shape[:-2], *xs.shape[-2:]))
    for i in order:
        before[i].copy_(memory)
        new = None if constants is None else constants[i]
        if scales is not None:
            new = torch.mul(memory, scales[i], out=room) if new is None else torch.addcmul(new, memory, scales[i], out=room)
        if transitions is not None:
            new = _add_product(new, transitions[i], memory, room)
        if lefts is not None and rights is not None:
            x_of[i].copy_(_add_product(None if inners is None else inners[i], rights[i], memory, x))
            new = _add_product(new, lefts[i], x, room)
        if new is not room:
            assert new is not None
            room.copy_(new)
        memory, room = room, memory
    return memory


def _add_product(x: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """x + a b, written to `out`, which may be x."""
    if x is None:
        return torch.bmm(a, b, out=out)
    return out.baddbmm_(a, b) if x is out else torch.baddbmm(x, a, b, out=out)


def _packed(parts: list[Tensor | None], start: Tensor, states: Tensor, xs: Tensor, reset: Tensor, reverse: bool) -> Tensor:
    """Sequence by sequence; chunks that belong to none keep what they reach."""
    n, ends = states.shape[1], start.clone()
    owners = torch.where(reset >= 0, reset, -1 - reset).tolist()
    order = range(n)[::-1] if reverse else range(n)
    starts = [j for j, i in enumerate(order) if reset[i] >= 0]
    spare = order[: starts[0]] if starts else order
    for i in spare:
        states[:, i], xs[:, i] = 0, 0
    for j, stop in zip(starts, [*starts[1:], n], strict=True):
        owner = owners[order[j]]
        ends[owner] = _steps(parts, start[owner], states, xs, order[j:stop])
    return ends


def _two_levels(scale: Tensor, constant: Tensor, start: Tensor, states: Tensor, reverse: bool) -> Tensor:
    """M ↦ scale ⊙ M + constant; fills `states`, returns the last memory."""
    n = states.shape[1]
    size = 1 << ((n.bit_length() - 1) // 2)
    rest = n % size
    main = slice(rest, n) if reverse else slice(0, n - rest)
    step = -1 if reverse else 1
    scales, constants, before = (list(x[:, main].unflatten(1, (-1, size)).unbind(2))[::step] for x in (scale, constant, states))
    ends, factors = torch.empty_like(before[0]), [scales[0]]
    before[1].copy_(constants[0])  # within groups, from zero
    for i, room in zip(range(1, size), [*before[2:], ends], strict=True):
        torch.addcmul(constants[i], before[i], scales[i], out=room)
        factors.append(factors[-1] * scales[i])
    first, ends_of, factor = (list(x.unbind(1))[::step] for x in (before[0], ends, factors[-1]))  # over the groups
    first[0].copy_(start)
    for i, room in zip(range(len(first)), [*first[1:], last := torch.empty_like(start)], strict=True):
        torch.addcmul(ends_of[i], first[i], factor[i], out=room)
    for room, factor_of in zip(before[1:], factors[:-1], strict=True):
        room.addcmul_(before[0], factor_of)
    if not rest:
        return last
    left = slice(0, rest) if reverse else slice(n - rest, n)
    return _steps([scale[:, left], None, constant[:, left], None, None, None], last, states[:, left], states[:, left, :0],
                  range(rest)[::step])
