"""Laws of compiled models on several ranks: the function of one rank, in its numbers and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import lsmc
from lsmc import LSM, M, Vector, k, outer, q, v
from lsmc.cases import Case, sample, tensors
from lsmc.models import HybridMoE, config
from lsmc.runtime.plans import sequence
from lsmc.summary import message
from lsmc.zoo import METHODS
from tests.dist.parts import check_odd, check_parts
from tests.dist.ranks import run

normalised = LSM("normalised", decay=Vector("g"), update=outer(lsmc.exp(k / 2), v),
                 readout=(lsmc.exp(q / 2) @ M) / (lsmc.exp(q / 2) @ M.normalizer + 1))


def close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-10) -> None:
    error = (found - wanted).abs().max().item() if wanted.numel() else 0.0
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: {error:.1e}"


@contextmanager
def as_they_are() -> Iterator[None]:
    """Graphs run as they were rewritten, without autograd's and Inductor's part of the compilation."""
    with mock.patch("torch._inductor.compile_fx.compile_fx", lambda module, *_, **options: module.forward):
        yield


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
    torch._dynamo.reset()
    found = values(lsmc.compile(layer, mesh=mesh))
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        if y is not None:
            close(x, y, f"{op.name}, value {i}")


def check_packed(op: LSM, mesh: DeviceMesh, ends: list[int]) -> None:
    """Packed sequences whose ends lie anywhere, with several of them on a rank and none; attention under the mask of the same."""
    drawn = sample(op, Case(batch=1, time=16, heads=1, groups=2, key_dim=3, value_dim=2, gates="mixture"))
    packed, results = torch.tensor(ends), list[list[Tensor]]()
    torch._dynamo.reset()

    def layer(inputs: dict[str, Tensor], ends: Tensor) -> Tensor:
        o = op(**inputs, cu_seqlens=ends, scale=0.5)
        if op.name != "kda":
            return o.sin()
        place = torch.arange(16)
        of = (place[:, None] >= ends).sum(1)
        mask = (of[:, None] == of) & (place[:, None] >= place)
        y = F.scaled_dot_product_attention(*(inputs[n].transpose(1, 2) for n in "vvv"), attn_mask=mask)
        return o.sin() + y.transpose(1, 2)

    for run in (lsmc.compile(layer, mesh=mesh), layer):
        o = run(drawn.inputs, packed)
        loss = (o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum()
        results.append([o, *torch.autograd.grad(loss, [x for x in drawn.inputs.values() if x.requires_grad])])
    for i, (found, wanted) in enumerate(zip(*results, strict=True)):
        close(found, wanted, f"packed {op.name}, ends {ends}, value {i}")


def small(lsm: str, pattern: str, **options: Any) -> HybridMoE:
    torch.manual_seed(0)
    size = {"hidden": 16, "heads": 2, "vocabulary": 13, "gate_rank": 4, "moe": {"experts": 4, "top_k": 2, "width": 8}}
    return HybridMoE(config("tiny", lsm=lsm, pattern=pattern, **size | options)).double()


def text(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    inputs, targets = torch.randint(0, 13, (2, batch, tokens), generator=torch.Generator().manual_seed(seed))
    targets[0, :3] = -100  # ranks have different numbers of targets that count
    return inputs, targets


def check_model(model: HybridMoE, mesh: DeviceMesh, steps: int = 1, tolerance: float = 1e-10) -> None:
    """Losses and the gradient of every parameter, in every step of training."""
    own = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = lsmc.compile(own, mesh=mesh)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (own, model)]
    for step in range(steps):
        tokens = text(2, 16, seed=step)
        found, wanted = compiled(*tokens), model(*tokens)
        for name, x, y in zip(wanted._fields, found, wanted, strict=True):
            close(x, y, f"{name} of step {step}", tolerance)
        found.total.backward()
        wanted.total.backward()
        for (name, p), r in zip(own.named_parameters(), model.parameters(), strict=True):
            close(torch.zeros_like(p) if p.grad is None else p.grad, r.grad, f"the gradient of {name} in step {step}", tolerance)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()


def named(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def on_two(folder: Path) -> None:
    with as_they_are():
        check_operator(lsmc.zoo.mamba2, named(sp=2))
        with mock.patch.object(sequence, "NEAR", 1):
            check_operator(lsmc.zoo.gla, named(sp=2))
        check_operator(lsmc.zoo.mamba2, named(dp=2))
        for op in (lsmc.zoo.mamba2, lsmc.zoo.kda, lsmc.zoo.mamba):
            check_packed(op, named(sp=2), [0, 3, 3, 11, 16])
        check_model(small("kda", "LN"), named(dp=1, sp=2))
        check_odd(named(tp=2))
        check_parts(small("gla", "LN", value_heads=4), named(tp=2), text(2, 16, seed=0), folder)


def on_four(folder: Path) -> None:
    with as_they_are():
        for op in (*(m for m in METHODS if message(m.canonical) != "none"), normalised):
            check_operator(op, named(sp=4))
            with mock.patch.object(sequence, "NEAR", 1):
                check_operator(op, named(sp=4))
            check_operator(op, named(dp=2, sp=2))
            for ends in ([0, 16], [0, 1, 15, 16], [0, 0, 4, 6, 6, 8, 16, 16]):
                check_packed(op, named(sp=4), ends)
        for lsm in ("bla", "mamba2", "gla", "kda", "titans"):
            check_model(small(lsm, "LLLN"), named(sp=4))
            check_model(small(lsm, "LLLN", activation_checkpointing=True), named(dp=2, sp=2))
            check_model(small(lsm, "LLLN", heads=4), named(tp=4))
            check_model(small(lsm, "LLLN", activation_checkpointing=True), named(tp=2, sp=2))
        check_model(small("gla", "LLLN"), named(sp=2, dp=2), steps=20, tolerance=1e-8)
        check_model(small("gated_deltanet", "LLLN"), named(sp=2, tp=2), steps=20, tolerance=1e-8)
        shared = {"experts": 4, "top_k": 2, "width": 8, "shared_width": 6}
        for mesh, fsdp in ((named(dp=2, tp=2), True), (named(tp=2, sp=2), False)):
            check_parts(small("kda", "LN", moe=shared), mesh, text(2, 16, seed=0), folder / str(fsdp), fsdp)


def through_inductor() -> None:
    check_model(small("gla", "LN"), named(sp=2), steps=2)


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Operators: output, final memories, every gradient. A model: losses, the gradient of every parameter."""
    run(on_two, 2, tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Every method, models of each structure, dp and sp in both orders, 20 steps of training."""
    run(on_four, 4, tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_ranks_compute_what_one_does(tmp_path: Path) -> None:
    run(through_inductor, 2, tmp_path)
