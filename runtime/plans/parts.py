"""Parameters of which a rank holds its part: what the tensor plan deals out, dealt out for good.

    optimizer groups → `keep_parts(model, mesh, tokens, targets)` → the optimizer → lsmc.compile(model, mesh=mesh)

A dealt parameter becomes a parametrization (`torch.nn.utils.parametrize`): the model sees the whole, the optimizer the
part. In a compiled graph nothing is joined, since what the plan deals out of a joined parameter is the part itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from lsmc.runtime import collectives
from lsmc.runtime.mesh import Axis, axes
from lsmc.runtime.plans.deal import dealt_inputs
from lsmc.runtime.plans.dims import Split
from lsmc.runtime.plans.noise import place_numbers
from lsmc.runtime.plans.tensor import layouts as plan


class Part(nn.Module):
    """This rank's part → the whole."""

    def __init__(self, split: Split, axis: Axis) -> None:
        super().__init__()
        self.split, self.axis = split, axis

    def forward(self, part: Tensor) -> Tensor:
        return collectives.joined(part, self.split.dim, self.split.flat(), self.axis)

    def whole_shape(self, part: Tensor) -> tuple[int, ...]:
        spread = sum(b - a - (b - a) // self.axis.size for a, b in self.split.spans)
        return tuple(n + spread * (d == self.split.dim) for d, n in enumerate(part.shape))

    def right_inverse(self, whole: Tensor) -> Tensor:
        return collectives.dealt(whole, self.split.dim, self.split.flat(), self.axis)


def layouts(model: nn.Module, mesh: Any, *inputs: Any) -> dict[str, Split]:
    """How the tensor plan deals out the parameters of `model`, by name, from a trace of `model(*inputs)`; nothing is computed."""
    names, found = {id(p): name for name, p in model.named_parameters()}, dict[str, Split]()

    def trace(module: GraphModule, examples: list[Any]) -> Any:
        place_numbers(module)  # as they will be when the plan runs
        for place, split in dealt_inputs(module, axes(mesh)["tp"], plan).items():
            if id(examples[place]) in names:
                found[names[id(examples[place])]] = split
        outputs = [n.meta["example_value"] for n in next(n for n in module.graph.nodes if n.op == "output").args[0]]
        return lambda *_: [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in outputs]

    torch.compile(model, backend=trace, fullgraph=True, dynamic=False)(*inputs)
    return found


def keep_parts(model: nn.Module, mesh: Any, *inputs: Any) -> list[str]:
    """Let each rank hold its part only of what `model(*inputs)` deals out over axis "tp"; the names of these parameters.

    Called on every rank, with equal parameters, before the optimizer is made. The `nn.Parameter` objects stay.
    """
    axis = axes(mesh).get("tp")
    if axis is None:
        return []
    found = layouts(model, mesh, *inputs)
    for name, split in found.items():
        owner, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), leaf, Part(split, axis), unsafe=True)
    return list(found)


# --- tensors that ranks hold in parts: by `Part`, by FSDP2, or by both


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The parameters of which this rank holds its part, by their plain names."""
    return {
        plain(f"{name}.{leaf}".lstrip(".")): part
        for name, module in model.named_modules() if parametrize.is_parametrized(module)
        for leaf, held in cast(nn.ModuleDict, module.parametrizations).items()
        for part in held.children() if isinstance(part, Part)
    }  # fmt: skip


def plain(name: str) -> str:
    """The name of a parameter as it was before ranks kept parts of it, and before `torch.compile`."""
    return name.removesuffix(".original").replace("parametrizations.", "").replace("_orig_mod.", "")


def joined(x: Tensor, part: Part | None) -> Tensor:
    """The whole of a parameter, gradient or moment, on every rank; called on all of them."""
    if isinstance(x, DTensor):
        x = x.full_tensor()
    return x if part is None else part(x)


def dealt(whole: Tensor, like: Tensor, part: Part | None) -> Tensor:
    """This rank's share of a whole, laid out as `like`; inverse of `joined`."""
    x = whole if part is None else part.right_inverse(whole)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else x


@torch.no_grad()
def clip_gradients(model: nn.Module, mesh: Any, limit: float) -> Tensor:
    """Scale all gradients so that their norm over all parameters, as one process has them, is at most `limit`; that norm."""
    parts, sums, locals_ = parts_of(model), dict[tuple[str, ...], Tensor](), list[Tensor]()
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        part = parts.get(plain(name))
        g, split_over = p.grad, list[str]()
        local = g.to_local() if isinstance(g, DTensor) else g
        squares = local.to(torch.promote_types(local.dtype, torch.float32)).square()
        if part is not None:
            squares = _once(squares, g, part)
            split_over.append(part.axis.name)
        if isinstance(g, DTensor):
            split_over += [name for name, at in zip(g.device_mesh.mesh_dim_names or (), g.placements) if at.is_shard()]
        key = tuple(split_over)
        sums[key] = sums.get(key, 0.0) + squares.sum()
        locals_.append(local)
    total: Any = 0.0
    for over, x in sorted(sums.items()):  # in one order on all ranks
        for axis in over:
            dist.all_reduce(x, group=mesh.get_group(axis))
        total = total + x
    norm = torch.as_tensor(total).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for local in locals_:
        local.mul_(scale.to(local.dtype))
    return norm


def _once(squares: Tensor, g: Tensor, part: Part) -> Tensor:
    """What all ranks of an axis hold counts once: a share of it on each."""
    dim, ranks = part.split.dim, part.axis.size
    weight, at = torch.full((g.shape[dim],), 1 / ranks, dtype=squares.dtype, device=squares.device), 0
    before = 0
    for a, b in sorted(part.split.spans):
        at += a - before
        weight[at : at + (b - a) // ranks] = 1.0
        at, before = at + (b - a) // ranks, b
    if isinstance(g, DTensor):
        for i, placement in enumerate(g.placements):
            if placement.is_shard(dim):
                n, mine = g.device_mesh.size(i), g.device_mesh.get_local_rank(i)
                weight = dict(enumerate(weight.chunk(n))).get(mine, weight[:0])
    return squares * weight.view(-1, *(1 for _ in range(squares.ndim - dim - 1)))


__all__ = ["Part", "clip_gradients", "dealt", "joined", "keep_parts", "layouts", "parts_of", "plain"]
