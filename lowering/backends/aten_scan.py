"""Memories that decay by a factor of their own for every entry (K, V), token by token inside a chunk, on ATen.

All chunks of a group take a step at once. Only memories at the ends of chunks are kept; the gradients work those inside a
chunk out again, for as many chunks at once as `ROOM` allows, so that what is stored grows with B T V and not with B T K V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

ROOM = 1 << 24
"""Numbers of memories inside chunks that exist at once."""

Decay = Callable[..., Tensor]


@cache
def _function(source: str) -> Decay:
    made: Decay = eval(source, {"torch": torch})
    return made


def _at(x: Tensor, dims: str, i: int) -> Tensor:
    """What token i sees of a tile, as (…, K or 1, V or 1)."""
    if dims[0] == "K":
        return x
    row = x[..., i if dims[0] == "T" else 0, :]
    return row[..., None, :] if dims[1] == "V" else row[..., :, None]


class _Chunk:
    """The tokens of some chunks: pairs of keys and values, and the factors e^g of the memory, 1 where there is no token."""

    def __init__(self, pairs: Sequence[Tensor], present: Tensor, fields: Sequence[Tensor], dims: str, log: str) -> None:
        self.keys, self.values, self.present = pairs[::2], pairs[1::2], present
        self.fields, self.dims, self.log = fields, dims.split(), _function(log)
        self.tokens = present.shape[-2]

    def seen(self, i: int) -> list[Tensor]:
        return [_at(x, d, i) for x, d in zip(self.fields, self.dims, strict=True)]

    def there(self, i: int) -> Tensor:
        return self.present[..., i, :, None] != 0

    def factor(self, i: int) -> Tensor:
        return torch.where(self.there(i), self.log(*self.seen(i)), 0.0).exp()

    def write(self, decayed: Tensor, i: int) -> Tensor:
        for key, value in zip(self.keys, self.values, strict=True):
            decayed = decayed + key[..., i, :, None] * value[..., i, None, :]
        return decayed


def _read(query: Tensor, memory: Tensor, i: int) -> Tensor:
    return (query[..., i, :, None] * memory).sum(-2)


@torch.library.custom_op("lsmc::scan", mutates_args=())
def scan(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, present: Tensor, fields: Sequence[Tensor], at: str,
         dims: str, log: str) -> Tensor:
    """query_i · M at each token ("previous", "decayed" or "updated"), (…, T, V); without a query M after the chunk.

    M_i = e^{g_i} ⊙ M_{i−1} + Σ key_iᵀ value_i; g = `log` of the fields, whose dimensions `dims` names ("TV KV").
    """
    if at:
        assert query is not None
        whole = (query, *pairs, memory, present, *fields)
        memory = memory.expand(*torch.broadcast_shapes(*(x.shape[:-2] for x in whole)), *memory.shape[-2:])
    chunk = _Chunk(pairs, present, fields, dims, log)
    out = []
    for i in range(chunk.tokens):
        decayed = chunk.factor(i) * memory
        updated = chunk.write(decayed, i)
        if query is not None:
            out.append(_read(query, {"previous": memory, "decayed": decayed, "updated": updated}[at], i))
        memory = updated
    return torch.stack(out, -2) if query is not None else memory


@scan.register_fake
def _(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, present: Tensor, fields: Sequence[Tensor], at: str,
      dims: str, log: str) -> Tensor:
    whole = (*([] if query is None else [query]), *pairs, memory, present, *fields)
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in whole))
    rows = memory.shape[-2] if query is None else present.shape[-2]
    return memory.new_empty((*lead, rows, memory.shape[-1]))


@torch.library.custom_op("lsmc::scan_grads", mutates_args=())
def scan_grads(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, present: Tensor, fields: Sequence[Tensor],
               d: Tensor, at: str, dims: str, log: str, slopes: str) -> list[Tensor]:
    """The cotangents of query, pairs, memory and fields where `scan` has the cotangent d; slopes: ∂g by each field, a line each."""
    given = [*([] if query is None else [query]), *pairs, memory, *fields]
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (*given, present, d)))
    whole = [x.expand(*lead, *x.shape[-2:]) for x in given]
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in whole]
    present, d = (x.expand(*lead, *x.shape[-2:]) for x in (present, d))
    inside = present.shape[-2] * memory.shape[-2] * memory.shape[-1]
    size = max(1, ROOM // max(1, inside * lead[1:].numel()))
    for i in range(0, lead[0], size):
        group = slice(i, i + size)
        part = [x[group] for x in whole]
        made = _grads(None if query is None else part.pop(0), part[: len(pairs)], part[len(pairs)], present[group],
                      part[len(pairs) + 1 :], d[group], at, dims, log, slopes)
        for x, y in zip(out, made, strict=True):
            x[group] = y
    return out


@scan_grads.register_fake
def _(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, present: Tensor, fields: Sequence[Tensor], d: Tensor,
      at: str, dims: str, log: str, slopes: str) -> list[Tensor]:
    given = [*([] if query is None else [query]), *pairs, memory, *fields]
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (*given, present, d)))
    return [x.new_empty((*lead, *x.shape[-2:])) for x in given]


def _grads(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, present: Tensor, fields: Sequence[Tensor], d: Tensor,
           at: str, dims: str, log: str, slopes: str) -> list[Tensor]:
    chunk = _Chunk(pairs, present, fields, dims, log)
    before = [memory]
    for i in range(chunk.tokens - 1):
        before.append(chunk.write(chunk.factor(i) * before[-1], i))
    grads = [torch.zeros_like(x) for x in (*pairs, *fields)]
    d_pairs, d_fields = grads[: len(pairs)], grads[len(pairs) :]
    d_query = None if query is None else torch.zeros_like(query)
    back = d if query is None else torch.zeros_like(memory)
    for i in reversed(range(chunk.tokens)):
        factor = chunk.factor(i)
        decayed = factor * before[i]

        def read(memory: Tensor, back: Tensor, place: str, i: int = i) -> Tensor:
            if d_query is None or query is None or place != at:
                return back
            d_query[..., i, :] = (memory * d[..., i, None, :]).sum(-1)
            return back + query[..., i, :, None] * d[..., i, None, :]

        back = read(chunk.write(decayed, i) if at == "updated" else decayed, back, "updated")
        for n, (key, value) in enumerate(zip(chunk.keys, chunk.values, strict=True)):
            d_pairs[2 * n][..., i, :] = (back * value[..., i, None, :]).sum(-1)
            d_pairs[2 * n + 1][..., i, :] = (back * key[..., i, :, None]).sum(-2)
        back = read(decayed, back, "decayed")
        d_log, seen, there = back * decayed, chunk.seen(i), chunk.there(i)
        for x, of, slope in zip(d_fields, chunk.dims, slopes.splitlines(), strict=True):
            part = torch.where(there, d_log * _function(slope)(*seen), 0.0)
            if of[0] == "K":
                x += part
            else:
                row = i if of[0] == "T" else 0
                part = part.sum(tuple(a for a, k in ((-2, "K"), (-1, "V")) if k != of[1]))
                x[..., row, :] += part[..., None] if of[1] == "1" else part
        back = read(before[i], factor * back, "previous")
    return [*([] if d_query is None else [d_query]), *d_pairs, back, *d_fields]


NAMES: dict[str, Callable[..., object]] = {"scan": scan, "scan_grads": scan_grads}
"""What generated source calls."""
