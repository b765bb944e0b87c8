"""The parallel plans on GPUs: `torchrun --nproc-per-node 2 tests/gpu/mesh.py PART … [--out FILE]`; started alone, on one GPU.

    agree   loss and gradients on a mesh beside those of one GPU, float32 and bf16: the tiny hybrid, one attention layer of A0.3B-2B, and
            two layers of its width (wide): kernels of large sizes are others
    layers  one LSM and one attention layer of A0.3B-2B over `sp`: time, memory of a rank, collectives and how much of them is hidden
    steps   a training step of A0.3B-2B (LLLNLLLNLLLN), 8 × 2048 tokens a GPU: tokens per second
    all     all of them, on one GPU and over `--ranks`: started alone, it starts a process a rank for each, which compile at the same time;
            then one after the other is timed, with nothing else running

`--alone N` does what rank N − 1 of N does, on one GPU: nothing is sent, and numbers are wrong, but the work of a rank is there to be timed.
`--small` shrinks all of it, for a run on CPUs (Gloo), which shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
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
from lsmc.runtime.plans import sequence
from lsmc.runtime.plans.parts import keep_parts

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ALONE = "--alone" in sys.argv
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
BF16 = torch.bfloat16
MODE = {"mode": "reduce-overhead"} if "--graphs" in sys.argv else {}
if "--behind" in sys.argv:
    sequence.NEAR = 0
TURN = Path(sys.argv[sys.argv.index("--turn") + 1]) if "--turn" in sys.argv else None


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


COMPILED: list[float] = []
"""When compilations ended."""


def waits(model: nn.Module) -> None:
    """From now on a backward is compiled with its forward, and what has been compiled waits for its turn before it runs; parameters
    make room on the GPU meanwhile."""
    def wait(*_: Any) -> None:
        COMPILED.append(time.perf_counter())
        if TURN and not (TURN / "go").exists():
            kept = [(x.untyped_storage(), x.detach().to("cpu", copy=True), x.detach()) for x in model.parameters()]
            sizes = [storage.nbytes() for storage, *_ in kept]
            for storage, *_ in kept:
                storage.resize_(0)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            (TURN / f"{RANK}.ready").touch()
            while not (TURN / "go").exists():
                time.sleep(0.02)
            for (storage, values, x), size in zip(kept, sizes):
                storage.resize_(size)
                x.copy_(values)

    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._dynamo.callback.on_compile_end(wait)


# --- agree


def ratio(found: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over the RMS of what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def agree(mesh: str, small: bool, kinds: list[str], types: list[str]) -> Iterator[dict[str, Any]]:
    """Against one GPU in float32: the errors of the mesh beside those of one GPU in the same type."""
    for kind in kinds:
        length = 64 if small else 4096 if kind == "wide" else 1024
        tokens, targets = torch.randint(0, 256, (2, 4, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        torch.manual_seed(0)
        if kind == "attention":
            model, given = Layer(kind, small).to(DEVICE), (torch.randn(1, 64 if small else 4096).to(DEVICE),)
        elif kind == "wide":
            size = config("tiny" if small else "a0.3b-2b", lsm="bla", pattern="LN", vocabulary=256, moe={} if small else {"experts": 8})
            model, given = HybridMoE(size).to(DEVICE), (tokens, targets)
        else:
            model, given = HybridMoE(config("tiny", lsm=kind, pattern="LN" if small else "LLLN")).to(DEVICE), (tokens, targets)

        def values(run: Any, own: nn.Module, dtype: torch.dtype, given: tuple[Tensor, ...] = given) -> dict[str, Tensor]:
            with autocast(dtype):
                loss = run(*given)
            loss = getattr(loss, "total", loss)
            loss.backward()
            return {"loss": loss.detach()} | {n: p.grad for n, p in own.named_parameters() if p.grad is not None}

        wanted = values(own := copy.deepcopy(model), own, torch.float32)
        for dtype in (getattr(torch, name) for name in types):
            alone = values(own := copy.deepcopy(model), own, dtype)
            torch._dynamo.reset()
            found = values(lsmc.compile(own := copy.deepcopy(model), mesh=mesh_of(mesh)), own, dtype)
            assert found.keys() == wanted.keys()
            errors = torch.tensor([[ratio(x[n], wanted[n]) for n in wanted] for x in (found, alone)])
            (grads, at), loss = (x.tolist() for x in errors[:, 1:].max(1)), worst(errors[:, 0]).tolist()
            yield {"part": "agree", "kind": kind, "mesh": mesh, "dtype": str(dtype)[6:], "loss": loss[0], "loss_alone": loss[1],
                   **dict(zip(("gradient", "gradient_alone"), worst(torch.tensor(grads)).tolist())),
                   "worst": [list(wanted)[1 + i] for i in at], "parameters": len(wanted) - 1}


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
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    ms, peak, before = worst(torch.tensor([1e3 * statistics.median(times), peak / 2**30, before / 2**30])).tolist()
    return {"ms": round(ms, 3), "peak_gib": round(peak, 2), "before_gib": round(before, 2)}


def exchanged(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of kernels on this rank, of collectives among them, and of those during which no other kernel ran, waits for other
    ranks included; how many kernels there are."""
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
    messages, work, both = union(spans[True]), union(spans[False]), union(spans[True] + spans[False])
    if "--profile" in sys.argv and RANK == 0:
        print(trace.key_averages().table(sort_by="self_device_time_total", row_limit=16, max_name_column_width=70), flush=True)
    bare = sum(b - a for a, b in messages) - sum(
        max(0.0, min(b, d) - max(a, c)) for a, b in messages for c, d in work)
    busy, total, bare = worst(torch.tensor([*(sum(b - a for a, b in x) for x in (both, messages)), bare])).tolist()
    return {"busy_ms": round(busy / 1e3, 3), "collectives_ms": round(total / 1e3, 3), "bare_ms": round(bare / 1e3, 3),
            "kernels": len(spans[True]) + len(spans[False]), "collectives": len(spans[True])}


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
        for t in lengths:
            row: dict[str, Any] = {"part": "layers", "layer": kind, "tokens": t, "mesh": (mesh or "one") + " graphs" * bool(MODE) + " behind" * (sequence.NEAR == 0)}
            try:
                yield row | layer_times(Layer(kind, small).to(DEVICE), t, mesh)
            except torch.OutOfMemoryError as error:
                yield row | {"failed": str(error).split(". ")[0]}
            free()


def layer_times(layer: Layer, t: int, mesh: str) -> dict[str, float]:
    torch._dynamo.reset()
    waits(layer)
    run, tokens = lsmc.compile(layer, mesh=mesh_of(mesh), **MODE), torch.randn(1, t, device=DEVICE)
    turns = 5 if t < 200_000 else 3

    def forward() -> Tensor:
        with autocast(BF16):
            return run(tokens)

    def both() -> None:
        forward().backward()
        layer.zero_grad()

    return measured(both, turns) | exchanged(both) | {"forward_ms": measured(forward, turns)["ms"]}


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
    waits(model)
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
    row = {"part": "steps", "mesh": (mesh or "one") + " fsdp" * fsdp, "sequences": batch, "length": length, "parameters": count}
    row |= measured(step, 5) | exchanged(step) | {"compile_s": round(COMPILED[-1] - began, 1), "losses": [round(x.item(), 4) for x in losses[:8]]}
    yield row | {"tokens_per_s_per_gpu": round(batch * length / row["ms"] * 1e3 / WORLD)}


# --- all


class Job:
    """A part, run by a process a rank."""

    def __init__(self, name: str, arguments: str, ranks: int, seconds: float, turn: bool = True) -> None:
        self.name, self.arguments, self.ranks, self.seconds, self.turn = name, arguments.split(), ranks, seconds, turn

    def start(self, place: int, given: argparse.Namespace, folder: Path) -> None:
        """`place` is a number of its own."""
        self.folder, self.log = folder / str(place), (folder / f"{place}.log").open("w")
        self.folder.mkdir()
        more = ["--small"] * given.small + (["--out", str(given.out)] if given.out else []) + ["--turn", str(self.folder)] * self.turn
        self.processes = [
            subprocess.Popen([sys.executable, "-u", __file__, *self.arguments, *more], stdout=self.log, stderr=self.log, env=os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank if self.ranks > 1 else place % given.ranks), "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + place), "OMP_NUM_THREADS": "2",
                "TORCHINDUCTOR_COMPILE_THREADS": "6" if "steps" in self.arguments else "2"}, start_new_session=True)
            for rank in range(self.ranks)]

    @property
    def ready(self) -> bool:
        return all((self.folder / f"{rank}.ready").exists() for rank in range(self.ranks))

    @property
    def ended(self) -> bool:
        """Whether no process of it runs; where one failed, the others are ended: they would wait for it."""
        codes = [p.poll() for p in self.processes]
        if any(codes):
            self.signal(signal.SIGKILL)
        return all(p.poll() is not None for p in self.processes)

    def signal(self, number: int) -> None:
        for p in self.processes:
            if p.poll() is None:
                os.killpg(p.pid, number)
                if number == signal.SIGKILL:
                    p.wait()

    def await_end(self, until: float) -> None:
        while not self.ended:
            if time.monotonic() > until:
                self.log.write("no end in time\n")
                self.signal(signal.SIGKILL)
            time.sleep(0.02)


def jobs(n: int, lengths: list[int]) -> Iterator[Job]:
    """What is told most by comes first."""
    for mesh in (f"--mesh tp={n}", "", f"--mesh sp={n}", f"--mesh dp={n} --fsdp"):  # whose waiting parameters leave room
        yield Job(f"step {mesh}", f"steps {mesh}", n if mesh else 1, 90)
    for kind in ("attention", "gla", "gated_deltanet"):
        for t in lengths:
            for mesh in (f"--mesh sp={n}", ""):
                yield Job(f"{kind} {t} {mesh}", f"layers --kinds {kind} --tokens {t} {mesh}", n if mesh else 1, 40)
    for axis in ("tp", "sp", "dp"):
        yield Job(f"wide bfloat16 {axis}", f"agree --kinds wide --types bfloat16 --mesh {axis}={n}", n, 300, turn=False)
    for types in ("bfloat16", "float32"):
        for kind in ("attention", "gla", "gated_deltanet"):
            for axis in ("sp", "tp"):
                yield Job(f"{kind} {types} {axis}", f"agree --kinds {kind} --types {types} --mesh {axis}={n}", n, 300, turn=False)
    for t in lengths[:2]:
        yield Job(f"gla {t} behind", f"layers --kinds gla --tokens {t} --mesh sp={n} --behind", n, 30)
    for t in lengths[:1]:
        for mesh in (f"--mesh sp={n}", ""):
            yield Job(f"gla {t} {mesh} graphs", f"layers --kinds gla --tokens {t} {mesh} --graphs", n if mesh else 1, 30)


def run_all(given: argparse.Namespace) -> None:
    """Let all compile until two thirds of the time are over, then those that are ready run alone, one by one; the others stand still
    meanwhile, and have what time is left."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mesh-"))
    todo = [job for job in jobs(given.ranks, given.tokens) if not given.only or any(word in job.name for word in given.only)]
    for place, job in enumerate(todo):
        job.start(place, given, folder)

    def said(what: str, job: Job) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}: {job.name}", flush=True)

    def end(job: Job) -> None:
        job.log.close()
        text, codes = Path(job.log.name).read_text(), [p.returncode for p in job.processes]
        said(f"ended {codes}", job)
        if given.logs:
            with given.logs.open("a") as file:
                file.write(f"===== {job.name}: {codes}\n{text}\n")
        todo.remove(job)

    known = set[Job]()
    while time.monotonic() - began < given.limit * 2 / 3 and not all(job.turn and job.ready for job in todo):
        for job in list(todo):
            if job.ended:
                end(job)
            elif job.ready and job not in known:
                known.add(job)
                said("compiled", job)
        time.sleep(0.1)
    while todo and time.monotonic() - began < given.limit:
        job = next((job for job in todo if job.ready), todo[0])
        for other in todo:
            other.signal(signal.SIGCONT if other is job or not job.ready else signal.SIGSTOP)
        (job.folder / "go").touch()
        said("timed", job)
        job.await_end(min(began + given.limit, time.monotonic() + job.seconds + 120 * (not job.ready)))
        end(job)
    for job in list(todo):
        job.signal(signal.SIGKILL)
        end(job)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("part", choices=("agree", "layers", "steps", "all"))
    parse.add_argument("--mesh", default="")
    parse.add_argument("--fsdp", action="store_true")
    parse.add_argument("--sequences", type=int, default=8, help="of a GPU, in a training step")
    parse.add_argument("--alone", type=int, help="the number of ranks")
    parse.add_argument("--small", action="store_true")
    parse.add_argument("--out", type=Path, help="append JSON lines")
    parse.add_argument("--kinds", nargs="+", default=["gla", "gated_deltanet", "attention"])
    parse.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parse.add_argument("--tokens", nargs="+", type=int)
    parse.add_argument("--graphs", action="store_true", help="with layers: CUDA graphs (mode reduce-overhead)")
    parse.add_argument("--behind", action="store_true", help="with layers: let the operator run behind its message, as over many ranks")
    parse.add_argument("--profile", action="store_true", help="with layers: the kernels that take longest")
    parse.add_argument("--ranks", type=int, default=2, help="with all")
    parse.add_argument("--limit", type=float, default=540.0, help="with all: seconds")
    parse.add_argument("--logs", type=Path, help="with all: append what the processes say")
    parse.add_argument("--only", nargs="+", help="with all: those parts in whose names one of these words is")
    parse.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    given = parse.parse_args()
    given.tokens = given.tokens or ([128, 256] if given.small else [16_384, 65_536, 262_144])
    if given.part == "all":
        run_all(given)
        return
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if given.alone:
        global WORLD
        from torch.testing._internal.distributed.fake_pg import FakeStore

        WORLD = given.alone
        dist.init_process_group("fake", rank=WORLD - 1, world_size=WORLD, store=FakeStore())
    elif WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    rows = {"agree": lambda: agree(given.mesh, given.small, given.kinds, given.types), "layers": lambda: layers(given.mesh, given.small, given.kinds, given.tokens),
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
