"""Laws of ranks that hold parts of parameters: training is that of one process, and so are its checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import lsmc
from lsmc.runtime import checkpoint
from lsmc.runtime.plans.parts import clip_gradients, joined, keep_parts, parts_of, plain


def close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-10) -> None:
    error = (found - wanted).abs().max().item()
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: {error:.1e}"


class Odd(nn.Module):
    """What HybridMoE has not: heads without a projection, and heads that are mixed, summed and contracted in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.outer = nn.Linear(8, 12), nn.Linear(8, 8)
        self.slope, self.mix = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h, low = self.fused(x).split([8, 4], -1)
        q, k, v = h.unflatten(-1, (4, 2)), x.unflatten(-1, (4, 2)).flip(2), F.silu(x).view(2, 16, 4, 2)
        o = lsmc.zoo.retnet(q=q, k=k, v=v, log_a=-F.softplus(self.slope))
        contracted = self.outer(o.flatten(2)) + o.flatten(2) @ self.mix
        mixed = o.sum(2).repeat(1, 1, 4) + o.sort(2)[0].reshape(2, 16, 8)
        return contracted + mixed * low.mean(-1, keepdim=True)


def check_odd(mesh: DeviceMesh) -> None:
    """What has no rule is computed from whole values, and every gradient is that of one process."""
    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    leaves, results = (x, *model.parameters()), list[list[Tensor]]()
    for run in (lsmc.compile(model, mesh=mesh), model):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for i, (found, wanted) in enumerate(zip(*results, strict=True)):
        close(found, wanted, f"value {i}")


def check_parts(model: nn.Module, mesh: DeviceMesh, tokens: tuple[Tensor, Tensor], folder: Path, fsdp: bool = False) -> None:
    """Two steps with clipped gradients from ranks that hold their parts; then a checkpoint, read by one process and by all."""
    torch._dynamo.reset()
    own, held = copy.deepcopy(model), copy.deepcopy(model)
    assert keep_parts(own, mesh, *tokens)
    assert sum(p.numel() for p in own.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    step, parts = lsmc.compile(own, mesh=mesh), parts_of(own)
    if fsdp:
        fully_shard(step, mesh=mesh["dp"])
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (own, model)]
    wanted = dict(model.named_parameters())
    for _ in range(2):
        for run in (step, model):
            run(*tokens).total.backward()
        for name, p in own.named_parameters():
            close(joined(p.grad, parts.get(plain(name))), wanted[plain(name)].grad, f"the gradient of {name}")
        close(clip_gradients(own, mesh, 0.05), nn.utils.clip_grad_norm_(model.parameters(), 0.05), "the norm of all gradients")
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    state = checkpoint.State(step=2, elapsed=0.0, config={}, data="", model={})
    path = checkpoint.save(folder, state, own, optimisers[0], first=dist.get_rank() == 0)
    dist.barrier()
    moments = checkpoint.optimizer_tensors(model, optimisers[1])
    dcp.save({"run": checkpoint.Portable(own, optimisers[0], mesh)}, checkpoint_id=folder / "portable")

    def from_one(target: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        checkpoint.load(path, target, optimiser)

    def from_all(target: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Into what is on this rank alone, or in parts."""
        to = checkpoint.Portable(target, optimiser, mesh if parts_of(target) else None)
        dcp.load({"run": to}, checkpoint_id=folder / "portable", no_dist=to.ranks is None)

    alone = copy.deepcopy(held)
    for read, target, optimiser in ((from_one, held, torch.optim.AdamW(held.parameters())), (from_one, own, optimisers[0]),
                                    (from_all, alone, torch.optim.AdamW(alone.parameters())), (from_all, own, optimisers[0])):
        if read is from_all and target is own:
            for x in (*own.parameters(), *(m for s in optimiser.state.values() for m in s.values())):
                x.detach().zero_()
        read(target, optimiser)
        for name, x in checkpoint.model_tensors(target).items():
            close(x, wanted[name].detach(), f"{name} after two steps")
        for name, x in checkpoint.optimizer_tensors(target, optimiser).items():
            close(x, moments[name], name)
