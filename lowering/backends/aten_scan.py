"""Memories that decay, and turn, by a factor of their own for every entry (K, V), token by token inside a chunk, on ATen.

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
def _function(source: str) -> Decay | None:
    """A decay or an angle as a function of the fields; None where it is zero."""
    return eval(source, {"torch": torch, "unit": 1.0}) if source else None


def _at(x: Tensor, dims: str, i: int, keys: int) -> Tensor:
    """What token i sees of a tile, as (…, K or 1, V or 1)."""
    if dims[0] == "K":
        return x
    row = x[..., i if dims[0] == "T" else 0, :]
    if dims[1] == "E":
        return row.unflatten(-1, (keys, -1))
    return row[..., None, :] if dims[1] == "V" else row[..., :, None]


def _complex(memory: Tensor, imaginary: Tensor | None) -> Tensor:
    return memory if imaginary is None else torch.complex(memory, imaginary)


def _real(memory: Tensor) -> Tensor:
    return memory.real if memory.is_complex() else memory


class _Chunk:
    """The tokens of some chunks: pairs of keys and values, and the factors e^{g + iθ} of the memory, 1 where there is no token."""

    def __init__(self, pairs: Sequence[Tensor], present: Tensor, fields: Sequence[Tensor], dims: str, logs: str) -> None:
        self.keys, self.values, self.present = pairs[::2], pairs[1::2], present
        self.fields, self.dims = fields, dims.split()
        self.log, self.phase = map(_function, logs.split("\n"))
        self.tokens = present.shape[-2]

    def seen(self, i: int) -> list[Tensor]:
        keys = self.keys[0].shape[-1]
        return [_at(x, d, i, keys) for x, d in zip(self.fields, self.dims, strict=True)]

    def there(self, i: int) -> Tensor:
        return self.present[..., i, :, None] != 0

    def factor(self, i: int) -> Tensor:
        seen, there = self.seen(i), self.there(i)
        log, phase = (torch.where(there, 0.0 if f is None else f(*seen), 0.0).to(self.present.dtype)
                      for f in (self.log, self.phase))  # fmt: skip
        return log.exp() if self.phase is None else torch.polar(*torch.broadcast_tensors(log.exp(), phase))

    def write(self, decayed: Tensor, i: int) -> Tensor:
        for key, value in zip(self.keys, self.values, strict=True):
            decayed = decayed + key[..., i, :, None] * value[..., i, None, :]
        return decayed


def _read(query: Tensor, memory: Tensor, i: int) -> Tensor:
    return (query[..., i, :, None] * _real(memory)).sum(-2)


@torch.library.custom_op("lsmc::scan", mutates_args=())
def scan(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, imaginary: Tensor | None, present: Tensor,
         fields: Sequence[Tensor], at: str, dims: str, logs: str) -> Tensor:
    """query_i · Re M at each token ("previous", "decayed" or "updated"), (…, T, V); without a query M after the chunk, its
    "real" or "imaginary" part.

    M_i = e^{g_i + iθ_i} ⊙ M_{i−1} + Σ key_iᵀ value_i; `logs` are g and θ as functions of the fields, a line each, whose
    dimensions `dims` names ("TV KV").
    """
    memory = _complex(memory, imaginary)
    if query is not None:
        whole = (query, *pairs, memory, present, *fields)
        memory = memory.expand(*torch.broadcast_shapes(*(x.shape[:-2] for x in whole)), *memory.shape[-2:])
    chunk = _Chunk(pairs, present, fields, dims, logs)
    out = []
    for i in range(chunk.tokens):
        decayed = chunk.factor(i) * memory
        updated = chunk.write(decayed, i)
        if query is not None:
            out.append(_read(query, {"previous": memory, "decayed": decayed, "updated": updated}[at], i))
        memory = updated
    if query is not None:
        return torch.stack(out, -2)
    return (memory.imag if at == "imaginary" else _real(memory)).contiguous()


@scan.register_fake
def _(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, imaginary: Tensor | None, present: Tensor,
      fields: Sequence[Tensor], at: str, dims: str, logs: str) -> Tensor:
    whole = (*([] if query is None else [query]), *pairs, memory, present, *fields)
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in whole))
    rows = memory.shape[-2] if query is None else present.shape[-2]
    return memory.new_empty((*lead, rows, memory.shape[-1]))


@torch.library.custom_op("lsmc::scan_grads", mutates_args=())
def scan_grads(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, imaginary: Tensor | None, present: Tensor,
               fields: Sequence[Tensor], d: Tensor, at: str, dims: str, logs: str, slopes: str) -> list[Tensor]:
    """The cotangents of query, pairs, memory (its imaginary part) and fields where `scan` has the cotangent d.

    slopes: ∂g, then ∂θ, by each field, a line each.
    """
    given = _given(query, pairs, memory, imaginary, fields)
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (*given, present, d)))
    whole = [x.expand(*lead, *x.shape[-2:]) for x in given]
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in whole]
    present, d = (x.expand(*lead, *x.shape[-2:]) for x in (present, d))
    inside = present.shape[-2] * memory.shape[-2] * memory.shape[-1]
    size = max(1, ROOM // max(1, inside * lead[1:].numel()))
    for i in range(0, lead[0], size):
        group = slice(i, i + size)
        part = [x[group] for x in whole]
        made = _grads(None if query is None else part.pop(0), [part.pop(0) for _ in pairs], part.pop(0),
                      None if imaginary is None else part.pop(0), present[group], part, d[group], at, dims, logs, slopes)
        for x, y in zip(out, made, strict=True):
            x[group] = y
    return out


def _given(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, imaginary: Tensor | None,
           fields: Sequence[Tensor]) -> list[Tensor]:
    """What has a cotangent, in order."""
    first, second = ([] if x is None else [x] for x in (query, imaginary))
    return [*first, *pairs, memory, *second, *fields]


@scan_grads.register_fake
def _(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, imaginary: Tensor | None, present: Tensor,
      fields: Sequence[Tensor], d: Tensor, at: str, dims: str, logs: str, slopes: str) -> list[Tensor]:
    given = _given(query, pairs, memory, imaginary, fields)
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (*given, present, d)))
    return [x.new_empty((*lead, *x.shape[-2:])) for x in given]


def _grads(query: Tensor | None, pairs: Sequence[Tensor], memory: Tensor, imaginary: Tensor | None, present: Tensor,
           fields: Sequence[Tensor], d: Tensor, at: str, dims: str, logs: str, slopes: str) -> list[Tensor]:
    """Cotangents w of complex memories are those with dL = Re(w̄ dM)."""
    chunk = _Chunk(pairs, present, fields, dims, logs)
    memory = _complex(memory, imaginary)
    before = [memory]
    for i in range(chunk.tokens - 1):
        before.append(chunk.write(chunk.factor(i) * before[-1], i))
    grads = [torch.zeros_like(x) for x in (*pairs, *fields)]
    d_pairs, d_fields = grads[: len(pairs)], grads[len(pairs) :]
    of_log, of_phase = (list(map(_function, part)) for part in _halves(slopes.split("\n"), len(fields)))
    d_query = None if query is None else torch.zeros_like(query)
    back = torch.zeros_like(memory) if query is not None else d * 1j if at == "imaginary" else d.to(memory.dtype)
    for i in reversed(range(chunk.tokens)):
        factor = chunk.factor(i)
        decayed = factor * before[i]

        def read(memory: Tensor, back: Tensor, place: str, i: int = i) -> Tensor:
            if d_query is None or query is None or place != at:
                return back
            d_query[..., i, :] = (_real(memory) * d[..., i, None, :]).sum(-1)
            return back + query[..., i, :, None] * d[..., i, None, :]

        back = read(chunk.write(decayed, i) if at == "updated" else decayed, back, "updated")
        for n, (key, value) in enumerate(zip(chunk.keys, chunk.values, strict=True)):
            d_pairs[2 * n][..., i, :] = (_real(back) * value[..., i, None, :]).sum(-1)
            d_pairs[2 * n + 1][..., i, :] = (_real(back) * key[..., i, :, None]).sum(-2)
        back = read(decayed, back, "decayed")
        turned, seen, there = back.conj() * decayed, chunk.seen(i), chunk.there(i)
        d_logs = [turned] if imaginary is None else [turned.real, -turned.imag]
        for x, of, *slopes_of in zip(d_fields, chunk.dims, of_log, of_phase, strict=True):
            parts = [d_log * slope(*seen) for d_log, slope in zip(d_logs, slopes_of) if slope is not None]
            if not parts:
                continue
            part = torch.where(there, sum(parts[1:], parts[0]), 0.0)
            if of[0] == "K":
                x += part
            elif of[1] == "E":
                x[..., i, :] += part.flatten(-2)
            else:
                row = i if of[0] == "T" else 0
                part = part.sum(tuple(a for a, k in ((-2, "K"), (-1, "V")) if k != of[1]))
                x[..., row, :] += part[..., None] if of[1] == "1" else part
        back = read(before[i], factor.conj() * back, "previous")
    ends = [back] if imaginary is None else [back.real, back.imag]
    return [*([] if d_query is None else [d_query]), *d_pairs, *ends, *d_fields]


def _halves(x: list[str], n: int) -> tuple[list[str], list[str]]:
    return (x[:n], x[n:]) if n else ([], [])


NAMES: dict[str, Callable[..., object]] = {"scan": scan, "scan_grads": scan_grads}
"""What generated source calls."""
