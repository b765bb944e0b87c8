"""Laws of ranks that hold parts of parameters: training is that of one process, and so are its checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import lsmc
from lsmc.runtime import checkpoint
from lsmc.runtime.plans.parts import clip_gradients, joined, keep_parts, parts_of, plain


def close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-10) -> None:
    error = (found - wanted).abs().max().item()
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: {error:.1e}"


def check_parts(model: nn.Module, mesh: DeviceMesh, tokens: tuple[Tensor, Tensor], folder: Path, fsdp: bool = False) -> None:
    """Two steps with clipped gradients from ranks that hold their parts; then a checkpoint, read by one process and by all."""
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
    for target, optimiser in ((held, torch.optim.AdamW(held.parameters())), (own, optimisers[0])):
        checkpoint.load(path, target, optimiser)
        for name, x in checkpoint.model_tensors(target).items():
            close(x, wanted[name].detach(), f"{name} after two steps")
        for name, x in checkpoint.optimizer_tensors(target, optimiser).items():
            close(x, moments[name], name)
