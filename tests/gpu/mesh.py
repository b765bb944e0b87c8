"""The parallel plans on GPUs: `torchrun --nproc-per-node 2 tests/gpu/mesh.py PART … [--out FILE]`; started alone, on one GPU.

    agree   loss and gradients of the tiny hybrid on a mesh beside those of one GPU, float32 and bf16
    layers  one LSM and one attention layer of A0.3B-2B over `sp`: time, memory of a rank, collectives and how much of them is hidden
    steps   a training step of A0.3B-2B (LLLNLLLNLLLN), 8 × 2048 tokens a GPU: tokens per second

`--alone N` does what rank N − 1 of N does, on one GPU: nothing is sent, and numbers are wrong, but the work of a rank is there to be timed.
`--small` shrinks all of it, for a run on CPUs (Gloo), which shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lsmc
from lsmc.models import HybridMoE, config
from lsmc.models.blocks import Attention, LinearMixer, RMSNorm
from lsmc.runtime.mesh import sizes
from lsmc.runtime.plans.parts import keep_parts

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ALONE = "--alone" in sys.argv
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
BF16 = torch.bfloat16


def mesh_of(text: str) -> DeviceMesh | None:
    named = sizes(text, "--mesh") if text else {}
    return init_device_mesh(DEVICE.type, tuple(named.values()), mesh_dim_names=tuple(named)) if named else None


def autocast(dtype: torch.dtype) -> Any:
    return torch.autocast(DEVICE.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def worst(x: Tensor) -> Tensor:
    """The largest over the ranks."""
    x = x.detach().double().to(DEVICE)
    if WORLD > 1 and not ALONE:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def meet() -> None:
    """Let all ranks start together; no kernel is run for it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    if WORLD > 1 and not ALONE:
        dist.all_reduce(torch.zeros(()))


# --- agree


def ratio(found: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over the RMS of what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def agree(mesh: str, small: bool) -> Iterator[dict[str, Any]]:
    """Against one GPU in float32: the errors of the mesh beside those of one GPU in the same type."""
    tokens, targets = torch.randint(0, 256, (2, 4, 64 if small else 1024), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for lsm in ("gla",) if small else ("gla", "gated_deltanet"):
        torch.manual_seed(0)
        model = HybridMoE(config("tiny", lsm=lsm, pattern="LN" if small else "LLLN")).to(DEVICE)

        def values(run: Any, own: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
            with autocast(dtype):
                loss = run(tokens, targets).total
            loss.backward()
            return {"loss": loss.detach()} | {n: p.grad for n, p in own.named_parameters() if p.grad is not None}

        wanted = values(own := copy.deepcopy(model), own, torch.float32)
        for dtype in (torch.float32, BF16):
            alone = values(own := copy.deepcopy(model), own, dtype)
            torch._dynamo.reset()
            found = values(lsmc.compile(own := copy.deepcopy(model), mesh=mesh_of(mesh)), own, dtype)
            assert found.keys() == wanted.keys()
            errors = torch.tensor([[ratio(x[n], wanted[n]) for n in wanted] for x in (found, alone)])
            grads = worst(errors[:, 1:].amax(1)).tolist()
            loss = worst(errors[:, 0]).tolist()
            yield {"part": "agree", "lsm": lsm, "mesh": mesh, "dtype": str(dtype)[6:], "loss": loss[0], "loss_alone": loss[1],
                   "gradient": grads[0], "gradient_alone": grads[1], "parameters": len(wanted) - 1}


# --- measuring


def measured(step: Callable[[], Any], turns: int) -> dict[str, float]:
    """Milliseconds (median over turns, the slowest rank) and the peak memory of a rank, GiB, of which `before` was there."""
    step()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    times = []
    for _ in range(turns):
        meet()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    ms, peak, before = worst(torch.tensor([1e3 * statistics.median(times), peak / 2**30, before / 2**30])).tolist()
    return {"ms": round(ms, 3), "peak_gib": round(peak, 2), "before_gib": round(before, 2)}


def exchanged(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of collectives on this rank, and of those during which no other kernel ran, waits for other ranks included."""
    if DEVICE.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile, schedule

    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=2, active=1, repeat=1)) as trace:
        for _ in range(3):
            meet()
            step()
            torch.cuda.synchronize()
            trace.step()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for e in trace.events():
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset", "##", "record_param")):
            spans["nccl" in e.name.lower()].append((e.time_range.start, e.time_range.end))
    messages, work = union(spans[True]), union(spans[False])
    if "--profile" in sys.argv and RANK == 0:
        print(trace.key_averages().table(sort_by="self_device_time_total", row_limit=16, max_name_column_width=70), flush=True)
    bare = sum(b - a for a, b in messages) - sum(
        max(0.0, min(b, d) - max(a, c)) for a, b in messages for c, d in work)
    total, bare = worst(torch.tensor([sum(b - a for a, b in messages), bare])).tolist()
    return {"collectives_ms": round(total / 1e3, 3), "bare_ms": round(bare / 1e3, 3)}


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = found[-1][0], max(b, found[-1][1])
        else:
            found.append((a, b))
    return found


# --- layers


class Layer(nn.Module):
    """x + mixer(norm(x)) of x that are made here, and its mean square: nothing of the size of x goes in or out."""

    def __init__(self, kind: str, small: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        c = config("tiny" if small else "a0.3b-2b", lsm="gla" if kind == "gla" else "gated_deltanet")
        self.weight = nn.Parameter(torch.randn(c.hidden))
        self.norm = RMSNorm(c.hidden)
        self.mixer = Attention(c) if kind == "attention" else LinearMixer(c)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens[..., None] * self.weight
        return (x + self.mixer(self.norm(x))).float().square().mean()


def layers(mesh: str, small: bool, kinds: list[str], lengths: list[int]) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        for t in (128, 256) if small else lengths:
            row: dict[str, Any] = {"part": "layers", "layer": kind, "tokens": t, "mesh": mesh or "one"}
            try:
                yield row | layer_times(Layer(kind, small).to(DEVICE), t, mesh)
            except torch.OutOfMemoryError as error:
                yield row | {"failed": str(error).split(". ")[0]}
            free()


def layer_times(layer: Layer, t: int, mesh: str) -> dict[str, float]:
    torch._dynamo.reset()
    run, tokens = lsmc.compile(layer, mesh=mesh_of(mesh)), torch.randn(1, t, device=DEVICE)

    def forward() -> Tensor:
        with autocast(BF16), torch.no_grad():
            return run(tokens)

    def both() -> None:
        with autocast(BF16):
            loss = run(tokens)
        loss.backward()
        layer.zero_grad()

    return measured(both, 5) | exchanged(both) | {"forward_ms": measured(forward, 5)["ms"]}


def free() -> None:
    import gc

    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# --- steps


def steps(mesh: str, small: bool, fsdp: bool, sequences: int) -> Iterator[dict[str, Any]]:
    named, length = sizes(mesh, "--mesh") if mesh else {}, 64 if small else 2048
    batch, length = sequences * named.get("dp", 1), length * named.get("sp", 1)
    torch.manual_seed(0)
    with DEVICE:
        model = HybridMoE(config("tiny") if small else config("a0.3b-2b", lsm="gla", pattern="LLLNLLLNLLLN", activation_checkpointing=True))
        tokens, targets = torch.randint(0, model.config.vocabulary, (2, batch, length))
    count = sum(p.numel() for p in model.parameters())
    device_mesh = mesh_of(mesh)
    began = time.perf_counter()
    if "tp" in named:
        keep_parts(model, device_mesh, tokens, targets)
    run: Any = lsmc.compile(model, mesh=device_mesh)
    if fsdp:
        fully_shard(run, mesh=device_mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses = []

    def step() -> None:
        with autocast(BF16):
            loss = run(tokens, targets).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    step()
    first = time.perf_counter() - began
    row = {"part": "steps", "mesh": (mesh or "one") + " fsdp" * fsdp, "sequences": batch, "length": length, "parameters": count}
    row |= measured(step, 5) | exchanged(step) | {"first_s": round(first, 1), "losses": [round(x.item(), 4) for x in losses[:3]]}
    yield row | {"tokens_per_s_per_gpu": round(batch * length / row["ms"] * 1e3 / WORLD)}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("part", choices=("agree", "layers", "steps"))
    parse.add_argument("--mesh", default="")
    parse.add_argument("--fsdp", action="store_true")
    parse.add_argument("--sequences", type=int, default=8, help="of a GPU, in a training step")
    parse.add_argument("--alone", type=int, help="the number of ranks")
    parse.add_argument("--small", action="store_true")
    parse.add_argument("--out", type=Path, help="append JSON lines")
    parse.add_argument("--kinds", nargs="+", default=["gla", "gated_deltanet", "attention"])
    parse.add_argument("--tokens", nargs="+", type=int, default=[16_384, 65_536, 262_144])
    parse.add_argument("--profile", action="store_true", help="with layers: the kernels that take longest")
    given = parse.parse_args()
    if given.alone:
        global WORLD
        from torch.testing._internal.distributed.fake_pg import FakeStore

        WORLD = given.alone
        dist.init_process_group("fake", rank=WORLD - 1, world_size=WORLD, store=FakeStore())
    elif WORLD > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    rows = {"agree": lambda: agree(given.mesh, given.small), "layers": lambda: layers(given.mesh, given.small, given.kinds, given.tokens),
            "steps": lambda: steps(given.mesh, given.small, given.fsdp, given.sequences)}[given.part]()
    for row in rows:
        if RANK == 0:
            line = json.dumps({**row, "ranks": WORLD, "device": name, "torch": torch.__version__})
            print(line, flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(line + "\n")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
