"""Parameters of which a rank holds its part: what the tensor plan deals out, dealt out for good.

    optimizer groups → `keep_parts(model, mesh, tokens, targets)` → the optimizer → lsmc.compile(model, mesh=mesh)

A dealt parameter becomes a parametrization (`torch.nn.utils.parametrize`): the model sees the whole, the optimizer the
part. In a compiled graph nothing is joined, since what the plan deals out of a joined parameter is the part itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from lsmc.runtime import collectives
from lsmc.runtime.mesh import Axis, axes
from lsmc.runtime.plans.deal import dealt_inputs
from lsmc.runtime.plans.dims import Split
from lsmc.runtime.plans.tensor import seeds


class Part(nn.Module):
    """This rank's part → the whole."""

    def __init__(self, split: Split, axis: Axis) -> None:
        super().__init__()
        self.split, self.axis = split, axis

    def forward(self, part: Tensor) -> Tensor:
        return collectives.joined(part, self.split.dim, self.split.flat(), self.axis)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return collectives.dealt(whole, self.split.dim, self.split.flat(), self.axis)


def layouts(model: nn.Module, mesh: Any, *inputs: Any) -> dict[str, Split]:
    """How the tensor plan deals out the parameters of `model`, by name, from a trace of `model(*inputs)`; nothing is computed."""
    names, found = {id(p): name for name, p in model.named_parameters()}, dict[str, Split]()

    def trace(module: GraphModule, examples: list[Any]) -> Any:
        for place, split in dealt_inputs(module, axes(mesh)["tp"], seeds).items():
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


__all__ = ["Part", "keep_parts", "layouts"]
