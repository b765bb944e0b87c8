"""What ranks exchange: torch's functional collectives as nodes of a graph, each beside its adjoint.

A value is *whole* (the same on all ranks of an axis), *split* (each rank holds its part) or *partial* (the sum over the
ranks is meant). A cotangent of a whole value is whole, of a split value split. Then

| forward | of → to | adjoint |
|---|---|---|
| `shared`: nothing | whole, used with what is split → whole | `summed` |
| `shared_all`: nothing | several that are `shared` | `summed` of all of them at once |
| `summed`: all-reduce | partial → whole | `shared` |
| `part`: own slice | whole → split | `whole` |
| `whole`: all-gather | split → whole | `part` |
| `scattered`: reduce-scatter | partial → split | `whole` without its adjoint: all-gather |
| `gathered`: all-gather | split → whole, used with what is split | `scattered` |
| `gather`: all-gather | split → all parts, which each rank uses in its own way | `scatter` |
| `scatter`: reduce-scatter | all parts, partial → split | `gather` |
| `traded`: all-to-all | split along one dimension → split along another | `traded` back |

so that every gradient is that of one process, whoever computes it. `gather` and `scatter` are issued: what stands between
them and `arrived` overlaps. All take any tensor, real, fake or `Value`; the graph is the same on all ranks, since the
rank is a value, `rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsmc.runtime.mesh import Axis

_collectives = torch.ops._c10d_functional
_library = torch.library.Library("lsmc", "FRAGMENT")


def place(group: str) -> int:
    """The place of this process in a group, known as a graph runs."""
    groups: Any = torch.distributed.distributed_c10d
    return int(groups._resolve_process_group(group).rank())


@torch.library.custom_op("lsmc::rank", mutates_args=())
def _rank(like: Tensor, group: str) -> Tensor:
    """The place of this process in a group, () int64, on the device of `like`."""
    return torch.full((), place(group), dtype=torch.int64, device=like.device)


@_rank.register_fake
def _(like: Tensor, group: str) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=like.device)


def _sum(x: Tensor, group: str) -> Tensor:
    return _collectives.wait_tensor.default(_collectives.all_reduce.default(x.contiguous(), "sum", group))


def _slice(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    n = x.shape[dim] // size
    index = torch.arange(n, device=x.device) + n * torch.ops.lsmc.rank.default(x, group)
    return x.index_select(dim, index)


def _join(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    pending = _collectives.all_gather_into_tensor.default(x.contiguous(), size, group)
    return _beside(_collectives.wait_tensor.default(pending), size, dim)


def _scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    return _collectives.wait_tensor.default(_collectives.reduce_scatter_tensor.default(parts, "sum", size, group)).squeeze(0)


def _trade(x: Tensor, give: int, take: int, size: int, group: str) -> Tensor:
    parts, one = x.unflatten(give, (size, -1)).movedim(give, 0).contiguous(), [1] * size
    got = _collectives.wait_tensor.default(_collectives.all_to_all_single.default(parts, one, one, group))
    return _beside(got.flatten(0, 1), size, take)


def _trade_back(d: Tensor, give: int, take: int, size: int, group: str) -> Tensor:
    return _trade(d, take, give, size, group)


def _beside(x: Tensor, size: int, dim: int) -> Tensor:
    """Parts that lie one behind the other along the first dimension, along `dim` instead."""
    return x if dim == 0 else x.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def _pieces(spans: list[int], total: int) -> list[tuple[int, int, bool]]:
    """Start, stop and whether it is dealt out, for the spans (a, b, a, b, …) of a dimension and what lies between them."""
    found, at = [], 0
    for a, b in zip(spans[::2], spans[1::2]):
        found += [(at, a, False), (a, b, True)]
        at = b
    return [piece for piece in (*found, (at, total, False)) if piece[0] < piece[1]]


def _deal(x: Tensor, dim: int, spans: list[int], size: int, group: str) -> Tensor:
    places = []
    for a, b, dealt in _pieces(spans, x.shape[dim]):
        n = (b - a) // size if dealt else b - a
        start = a + n * torch.ops.lsmc.rank.default(x, group) if dealt else a
        places.append(start + torch.arange(n, device=x.device))
    return x.index_select(dim, torch.cat(places))


def _rejoin(x: Tensor, dim: int, spans: list[int], size: int, group: str, add: bool = False) -> Tensor:
    """Inverse of `_deal`; of what was not dealt out, the sum over the ranks, or what the first has."""
    pending = _collectives.all_gather_into_tensor.default(x.contiguous(), size, group)
    parts = _collectives.wait_tensor.default(pending).unflatten(0, (size, -1))
    dealt_out = sum(b - a for a, b in zip(spans[::2], spans[1::2]))
    pieces, at = [], 0
    for a, b, dealt in _pieces(spans, x.shape[dim] + dealt_out - dealt_out // size):
        n = (b - a) // size if dealt else b - a
        piece = parts.narrow(dim + 1, at, n)
        if dealt:
            pieces.append(piece.movedim(0, dim).flatten(dim, dim + 1))
        else:
            pieces.append(piece.sum(0) if add else piece[0])
        at += n
    return torch.cat(pieces, dim)


def _rejoin_sum(x: Tensor, dim: int, spans: list[int], size: int, group: str) -> Tensor:
    return _rejoin(x, dim, spans, size, group, add=True)


def _define(signature: str, forward: Any, adjoint: Any) -> None:
    """An operator that is traced through, with a derivative of its own: `adjoint` takes what `forward` takes."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
            ctx.args = args
            return forward(x, *args)

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
            return (adjoint(d, *ctx.args), *(None for _ in ctx.args))

    name = _library.define(signature)
    _library.impl(name.split("::")[-1], lambda x, *args: Function.apply(x, *args), "CompositeImplicitAutograd")


def _same(x: Tensor, group: str) -> Tensor:
    return x.view_as(x)


_define("shared(Tensor x, str group) -> Tensor", _same, _sum)
_define("summed(Tensor x, str group) -> Tensor", _sum, _same)


class _SharedAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *ds: Tensor) -> tuple[Any, ...]:
        total = _sum(torch.cat([d.flatten() for d in ds]), ctx.group)
        return None, *(x.view(d.shape) for x, d in zip(total.split([d.numel() for d in ds]), ds))


_library.define("shared_all(Tensor[] xs, str group) -> Tensor[]")
_library.impl("shared_all", lambda xs, group: list(_SharedAll.apply(group, *xs)), "CompositeImplicitAutograd")

_define("part(Tensor x, int dim, int size, str group) -> Tensor", _slice, _join)
_define("whole(Tensor x, int dim, int size, str group) -> Tensor", _join, _slice)

_define("scattered(Tensor x, int dim, int size, str group) -> Tensor", _scatter, _join)
_define("gathered(Tensor x, int dim, int size, str group) -> Tensor", _join, _scatter)
_define("traded(Tensor x, int give, int take, int size, str group) -> Tensor", _trade, _trade_back)
_define("dealt(Tensor x, int dim, int[] spans, int size, str group) -> Tensor", _deal, _rejoin_sum)
_define("joined(Tensor x, int dim, int[] spans, int size, str group) -> Tensor", _rejoin, _deal)


def _sum_rest(d: Tensor, dim: int, spans: list[int], size: int, group: str) -> Tensor:
    total = d.shape[dim] + sum(b - a - (b - a) // size for a, b in zip(spans[::2], spans[1::2]))
    pieces, at = [], 0
    for a, b, dealt in _pieces(spans, total):
        n = (b - a) // size if dealt else b - a
        piece = d.narrow(dim, at, n)
        pieces.append(piece if dealt else _sum(piece, group))
        at += n
    return torch.cat(pieces, dim)


_define("kept(Tensor x, int dim, int[] spans, int size, str group) -> Tensor",
        lambda x, dim, spans, size, group: x.view_as(x), _sum_rest)  # fmt: skip


def rank(like: Any, axis: Axis) -> Any:
    """The rank along an axis, () int64: a value, never a constant of the graph."""
    return torch.ops.lsmc.rank.default(like, axis.group)


def shared(x: Any, axis: Axis) -> Any:
    """A whole value about to meet split ones: itself; its cotangents are summed over the ranks."""
    return torch.ops.lsmc.shared.default(x, axis.group)


def shared_all(xs: Sequence[Any], axis: Axis) -> Any:
    """Whole values of one type, each as if `shared`: their cotangents are summed over the ranks in one message."""
    return torch.ops.lsmc.shared_all.default(list(xs), axis.group)


def summed(x: Any, axis: Axis) -> Any:
    """The sum over the ranks, on every rank."""
    return torch.ops.lsmc.summed.default(x, axis.group)


def part(x: Any, dim: int, axis: Axis) -> Any:
    """This rank's part of a whole value along `dim`."""
    return torch.ops.lsmc.part.default(x, dim, axis.size, axis.group)


def whole(x: Any, dim: int, axis: Axis) -> Any:
    """All parts side by side along `dim`, a whole value."""
    return torch.ops.lsmc.whole.default(x, dim, axis.size, axis.group)


def scattered(x: Any, dim: int, axis: Axis) -> Any:
    """This rank's part along `dim` of the sum over the ranks."""
    return torch.ops.lsmc.scattered.default(x, dim, axis.size, axis.group)


def gathered(x: Any, dim: int, axis: Axis) -> Any:
    """All parts side by side along `dim`, about to meet split values; cotangents are summed over the ranks."""
    return torch.ops.lsmc.gathered.default(x, dim, axis.size, axis.group)


def traded(x: Any, give: int, take: int, axis: Axis) -> Any:
    """From a part along `take` and the whole of `give`: this rank's part along `give`, and the whole of `take`."""
    return torch.ops.lsmc.traded.default(x, give, take, axis.size, axis.group)


def dealt(x: Any, dim: int, spans: list[int], axis: Axis) -> Any:
    """Of each span (a, b, a, b, …) along `dim` this rank's part, and what lies between spans, which is inner."""
    return torch.ops.lsmc.dealt.default(x, dim, spans, axis.size, axis.group)


def joined(x: Any, dim: int, spans: list[int], axis: Axis) -> Any:
    """Inverse of `dealt`."""
    return torch.ops.lsmc.joined.default(x, dim, spans, axis.size, axis.group)


def kept(x: Any, dim: int, spans: list[int], axis: Axis) -> Any:
    """What `dealt` makes of what `joined` makes of `x`: itself; cotangents of what lies between spans are summed."""
    return torch.ops.lsmc.kept.default(x, dim, spans, axis.size, axis.group)


def gather(x: Any, axis: Axis) -> Any:
    """Issue: all parts behind each other along the first dimension, for each rank to use in its own way."""
    return _collectives.all_gather_into_tensor.default(x.contiguous(), axis.size, axis.group)


def scatter(x: Any, axis: Axis) -> Any:
    """Issue: the sum over the ranks, of which each keeps its part of the first dimension."""
    return _collectives.reduce_scatter_tensor.default(x.contiguous(), "sum", axis.size, axis.group)


def arrived(x: Any) -> Any:
    """What was issued, once it is there."""
    return _collectives.wait_tensor.default(x)


__all__ = ["arrived", "dealt", "gather", "gathered", "joined", "kept", "part", "place", "rank", "scatter", "scattered", "shared",
           "shared_all", "summed", "traded", "whole"]  # fmt: skip
