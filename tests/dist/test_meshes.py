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
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lsmc
from lsmc import LSM, M, Vector, k, outer, q, v
from lsmc.cases import Case, sample, tensors
from lsmc.models import HybridMoE, config
from lsmc.runtime.plans import sequence
from lsmc.runtime.plans.noise import place_numbers
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


def check_operator(op: LSM, mesh: DeviceMesh, heads: int = 1) -> None:
    drawn = sample(op, Case(batch=2, time=8, heads=heads, groups=2, key_dim=3, value_dim=2, gates="mixture", initial_state=True))

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


def check_packed(op: LSM, mesh: DeviceMesh, ends: list[int], states: bool = False, heads: int = 1) -> None:
    """Packed sequences whose ends lie anywhere, with several of them on a rank and none; attention under the mask of the same.
    With `states` each of them, the empty ones too, starts from a memory and leaves one."""
    case = Case(batch=1, time=16, heads=heads, groups=2, key_dim=3, value_dim=2, gates="mixture", initial_state=states)
    drawn = sample(op, case, batch=len(ends) - 1)
    packed, results = torch.tensor(ends), list[list[Tensor]]()
    torch._dynamo.reset()

    def layer(inputs: dict[str, Tensor], state: Any, ends: Tensor) -> list[Tensor]:
        if states:
            o, left = op(**inputs, cu_seqlens=ends, scale=0.5, initial_state=state, return_final_state=True)
            return [o.sin(), *tensors(left)]
        o = op(**inputs, cu_seqlens=ends, scale=0.5)
        if op.name != "kda":
            return [o.sin()]
        place = torch.arange(16)
        of = (place[:, None] >= ends).sum(1)
        mask = (of[:, None] == of) & (place[:, None] >= place)
        y = F.scaled_dot_product_attention(*(inputs[n].transpose(1, 2) for n in "vvv"), attn_mask=mask)
        return [o.sin() + y.transpose(1, 2)]

    for run in (lsmc.compile(layer, mesh=mesh), layer):
        outputs = run(drawn.inputs, drawn.state, packed)
        loss = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
        grads = torch.autograd.grad(loss, drawn.leaves(), allow_unused=True)
        results.append([*outputs, *(torch.zeros_like(x) if d is None else d for x, d in zip(drawn.leaves(), grads))])
    for i, (found, wanted) in enumerate(zip(*results, strict=True)):
        close(found, wanted, f"packed {op.name}, ends {ends}, value {i}")


class Noisy(nn.Module):
    """Dropout of tokens, of heads, of tokens of a merged batch, of attention's weights and in a region that is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.3)
        self.slope = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.drop(x)).unflatten(-1, (3, 4, 2)).unbind(2)
        o = F.dropout(lsmc.zoo.retnet(q=q, k=k, v=v, log_a=-F.softplus(self.slope)), 0.2)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), dropout_p=0.4, is_causal=True)
        x = x + self.drop(self.out((o + y.transpose(1, 2)).flatten(2))) * (1 + torch.rand_like(x))
        x = x + checkpoint(lambda z: self.drop(z.sin()), x, use_reentrant=False)
        return F.dropout(x.reshape(-1, 8), 0.5).view(2, 8, 8) + F.dropout(x, 0.9, training=False)


def check_noise(mesh: DeviceMesh) -> None:
    """Whatever each rank's own generator: the numbers are those of the first rank's seed and of places in the whole."""
    torch.manual_seed(0)
    model, x = Noisy().double(), torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
    results = list[list[Tensor]]()

    def on_one(module: GraphModule, _: Any) -> Any:
        place_numbers(module)
        return module.forward

    for run, seed in ((lsmc.compile(model, mesh=mesh), 7 + dist.get_rank()), (torch.compile(model, backend=on_one, fullgraph=True), 7)):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        y = [run(x), run(x)]
        assert not torch.equal(*y), "another step, other numbers"
        results.append([*y, *torch.autograd.grad(sum(y).sin().sum(), (x, *model.parameters()))])
    for i, (found, wanted) in enumerate(zip(*results, strict=True)):
        close(found, wanted, f"noise over {mesh.mesh_dim_names}, value {i}")


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


def check_replicas(mesh: DeviceMesh, wrap: Callable[[nn.Module, DeviceMesh], nn.Module]) -> None:
    """Ranks of "dp" with data of their own, around a model compiled for the others: torch averages their gradients."""
    model = small("gla", "LN")
    own, tokens = copy.deepcopy(model), [text(1, 16, seed=i) for i in range(mesh["dp"].size())]
    torch._dynamo.reset()
    replica = wrap(lsmc.compile(own, mesh=mesh["sp"]), mesh["dp"])  # lives through the backward pass: DDP averages as long as it does
    replica(*tokens[mesh.get_local_rank("dp")]).total.backward()
    sum(model(*each).total / len(tokens) for each in tokens).backward()
    for (name, p), r in zip(own.named_parameters(), model.parameters(), strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        close(torch.zeros_like(r) if grad is None else grad, r.grad, f"the gradient of {name} of replicas")


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh)
    return model


def replicated(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group())


def named(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def on_two(folder: Path) -> None:
    with as_they_are():
        check_operator(lsmc.zoo.mamba2, named(sp=2))
        with mock.patch.object(sequence, "NEAR", 1):
            check_operator(lsmc.zoo.gla, named(sp=2))
        check_operator(lsmc.zoo.mamba2, named(dp=2))
        check_operator(lsmc.zoo.ttt_ln, named(sp=2))
        for op, states in ((lsmc.zoo.mamba2, False), (lsmc.zoo.kda, False), (lsmc.zoo.mamba, True)):
            check_packed(op, named(sp=2), [0, 3, 3, 11, 16, 16], states)
        for axis in ("sp", "dp", "tp"):
            check_noise(named(**{axis: 2}))
        check_model(small("kda", "LN"), named(dp=1, sp=2))
        check_odd(named(tp=2))
        check_parts(small("gla", "LN", value_heads=4), named(tp=2), text(2, 16, seed=0), folder)


def on_four(folder: Path) -> None:
    with as_they_are():
        for op in (*METHODS, normalised):
            heads = 2 if message(op.canonical) == "none" else 1  # with groups of two, one for each of the four
            check_operator(op, named(sp=4), heads)
            with mock.patch.object(sequence, "NEAR", 1):
                check_operator(op, named(sp=4), heads)
            check_operator(op, named(dp=2, sp=2))
            for ends in ([0, 16], [0, 1, 15, 16], [0, 0, 4, 6, 6, 8, 16, 16]):
                check_packed(op, named(sp=4), ends, heads=heads)
                check_packed(op, named(sp=4), ends, states=True, heads=heads)
        for mesh in (named(sp=4), named(tp=4), named(sp=2, tp=2), named(tp=2, dp=2), named(dp=2, sp=2)):
            check_noise(mesh)
        for wrap in (replicated, sharded):
            check_replicas(named(dp=2, sp=2), wrap)
        for lsm in ("bla", "mamba2", "gla", "kda", "titans", "ttt_ln"):
            check_model(small(lsm, "LLLN", heads=4 if lsm == "ttt_ln" else 2), named(sp=4))
            check_model(small(lsm, "LLLN", activation_checkpointing=True), named(dp=2, sp=2))
            check_model(small(lsm, "LLLN", heads=4), named(tp=4))
            check_model(small(lsm, "LLLN", heads=4 if lsm == "ttt_ln" else 2, activation_checkpointing=True), named(tp=2, sp=2))
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
