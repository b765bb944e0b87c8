"""Laws of compiled models on several ranks: the function of one rank, in its numbers and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx import GraphModule

import lsmc
from lsmc import LSM, M, Vector, k, outer, q, v
from lsmc.cases import Case, sample, tensors
from lsmc.models import HybridMoE, config
from lsmc.zoo import METHODS
from tests.dist.ranks import run

CLASSES = ("bla", "retnet", "gla", "gfw", "gateloop", "gated_deltanet", "kda", "titans", "mamba", "rwkv6")
"""A method of each structure: no decay, decays of each kind, rotations, corrections, momentum, reads before the write."""

normalised = LSM("normalised", decay=Vector("g"), update=outer(lsmc.exp(k / 2), v),
                 readout=(lsmc.exp(q / 2) @ M) / (lsmc.exp(q / 2) @ M.normalizer + 1))


def close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-10) -> None:
    error = (found - wanted).abs().max().item() if wanted.numel() else 0.0
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: {error:.1e}"


@contextmanager
def as_they_are() -> Iterator[list[GraphModule]]:
    """Graphs run as they are, without autograd's and Inductor's part of the compilation; yields them."""
    seen: list[GraphModule] = []

    def keep(module: GraphModule, _: Any) -> Callable[..., Any]:
        seen.append(module)
        return module.forward

    torch._dynamo.reset()
    with mock.patch("torch._inductor.compile_fx.compile_fx", keep):
        yield seen


def check_operator(op: LSM, mesh: DeviceMesh) -> None:
    drawn = sample(op, Case(batch=2, time=8, heads=1, groups=2, key_dim=3, value_dim=2, gates="mixture", initial_state=True))

    def layer(inputs: dict[str, Tensor], state: Any) -> list[Tensor]:
        o, end = op(**inputs, initial_state=state, return_final_state=True, scale=0.5)
        return [o.sin(), *tensors(end)]

    def values(function: Any) -> list[Tensor]:
        outputs = function(drawn.inputs, drawn.state)
        loss = sum((x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
        return [*outputs, *torch.autograd.grad(loss, drawn.leaves(), allow_unused=True)]

    wanted = values(layer)
    with as_they_are():
        found = values(lsmc.compile(layer, mesh=mesh))
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        if y is not None:
            close(x, y, f"{op.name}, value {i}")


def small(lsm: str, pattern: str, **options: Any) -> HybridMoE:
    torch.manual_seed(0)
    size = {"hidden": 16, "heads": 2, "vocabulary": 13, "gate_rank": 4, "moe": {"experts": 4, "top_k": 2, "width": 8}}
    return HybridMoE(config("tiny", lsm=lsm, pattern=pattern, **size, **options)).double()


def text(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    inputs, targets = torch.randint(0, 13, (2, batch, tokens))
    targets[0, :3] = -100  # ranks have different numbers of targets that count
    return inputs, targets


def check_model(model: HybridMoE, mesh: DeviceMesh, steps: int = 0, tolerance: float = 1e-10) -> None:
    """Losses, logits and the gradient of every parameter; then those of more steps of training."""
    own, tokens = copy.deepcopy(model), text(2, 16)
    compiled = lsmc.compile(own, mesh=mesh)
    for name, x, y in zip(("total", "nll", "balance", "z", "load"), losses := compiled(*tokens), expected := model(*tokens)):
        close(x, y, name, tolerance)
    losses.total.backward()
    expected.total.backward()
    for (name, p), r in zip(own.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None, name
        assert r.grad is not None
        close(p.grad, r.grad, f"the gradient of {name}", tolerance)


def on_four(methods: tuple[str, ...]) -> None:
    sp4 = init_device_mesh("cpu", (4,), mesh_dim_names=("sp",))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    for op in (*(getattr(lsmc.zoo, name) for name in methods), normalised):
        check_operator(op, sp4)
    with as_they_are():
        check_model(small("gla", "LN"), both)


def test_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """sp=4 for a method of each structure: output, final memories, gradients; dp=2, sp=2 for a model."""
    run(on_four, 4, tmp_path, CLASSES)
