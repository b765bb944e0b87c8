"""Check and time every method of the zoo on a GPU: `python tests/gpu/run_h200.py [--out FILE] [--limit SECONDS] [names]`.

Each method runs in a process of its own (they compile side by side): bf16 and fp32 kernels against the float64
recurrence on identically rounded inputs, for gates from none to an exact reset. Then each is timed alone. Prints one
line per measurement and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import lsmc
from lsmc.canonical import Canonical
from lsmc.errors import LsmError
from lsmc.lowering.backends import triton as backend
from lsmc.lowering.plan import Plan
from lsmc.pipeline import CHUNK, Options, compile_plan
from lsmc.runtime.trials import milliseconds
from lsmc.schedules import Shape

BOUND = {"o": 5e-3, "end": 5e-3, "gate": 2e-2, "grad": 8e-3}
REGIMES = ("typical", "none", "weak", "sigmoid", "strong", "huge", "mixture", "spike")
QUICK = ("typical", "strong", "mixture")
SHAPES = {"B16 T4096 H8": (16, 4096, 8), "B8 T2048 H8": (8, 2048, 8)}


def methods() -> list[str]:
    return [n for n in dir(lsmc.zoo) if isinstance(getattr(lsmc.zoo, n), lsmc.LSM)]


def gate_names(c: Canonical) -> set[str]:
    """Inputs that are log decays themselves."""
    out = set[str]()
    for e in (c.decay_k, c.decay_v):
        if e is not None:
            out |= {f.name for f in c.inputs if f in e.free_symbols}
    return out


def gate(regime: str, shape: tuple[int, ...], time_axis: int | None) -> Tensor:
    n = torch.rand(shape, dtype=torch.float64, device="cuda")
    match regime:
        case "none":
            return torch.zeros_like(n)
        case "weak":
            return -1e-7 * n
        case "sigmoid":
            return -5 * torch.sigmoid(4 * n - 2)
        case "strong":
            return -2 - 18 * n
        case "huge":
            return -100 - 900 * n
        case "mixture":
            return torch.tensor([0.0, -1e-3, -1.0, -30.0], device="cuda", dtype=torch.float64)[(4 * n).long()]
        case "spike":
            out = -0.01 * n
            if time_axis is not None:
                out.select(time_axis, shape[time_axis] // 3).fill_(-1e4)
            return out
    return torch.nn.functional.logsigmoid(6 * n + 1)


def inputs_for(c: Canonical, b: int, t: int, h: int, hv: int, k: int, v: int, dtype: torch.dtype,
               regime: str = "typical") -> dict[str, Tensor]:
    """Random inputs; keys and other vectors over K have norm 1, scalars lie in (0, 1)."""
    out: dict[str, Tensor] = {}
    gates = gate_names(c)
    for f in c.inputs:
        token = f.per == "token"
        shape = tuple({"B": b, "T": t, "H": h, "HV": hv, "K": k, "V": v}[part] for part in f.parts)
        if f.name in gates and c.decay_k in (None, f) and c.decay_v in (None, f):
            x = gate(regime, shape, 1 if token else None)
        elif f.name in gates or not f.dims:
            x = torch.rand(shape, dtype=torch.float64, device="cuda") * 0.9 + 0.05
            x = -x if f.name in gates and "dt" not in f.name else x
        else:
            x = torch.randn(shape, dtype=torch.float64, device="cuda")
            x = torch.nn.functional.normalize(x, dim=-1) if f.dims == ("K",) and f.name != "q" else x
        out[f.name] = x.to(dtype) if token else x.float()
    return out


def ratio(a: Tensor, b: Tensor) -> float:
    scale = b.double().pow(2).mean().sqrt()
    error = (a.double() - b.double()).pow(2).mean().sqrt()
    return float(error / scale) if scale > 1e-12 else float(error)


def fixed(c: Canonical) -> set[str]:
    """Inputs that are constants of the method where they are not given: nobody trains them."""
    return set(c.defaults)


@dataclass(frozen=True)
class Prepared:
    """The kernels of a method, forward and backward, and launches of them over tensors of one size."""

    plan: Plan
    kernels: list[tuple[Any, Any]]
    """(a launch, its kernel), in the order in which they run."""


def prepare(name: str, schedule: str | None, size: tuple[int, int, int], chunk: int = CHUNK, run: bool = True,
            planned: Shape | None = None) -> Prepared:
    """The launches of a call of (B, T, H) without memories, as the operator plans them for that, or for the sizes in `planned`; `run`
    once, so that buffers hold numbers."""
    b, t, h = size
    c = getattr(lsmc.zoo, name).canonical
    options = Options(schedule=schedule, chunk=chunk, target="triton", fresh=True)
    plan = compile_plan(c, options, planned or Shape(b * h, t, 128, 128, chunk))
    x = inputs_for(c, b, t, h, h, 128, 128, torch.bfloat16)
    extent = {"K": 128, "V": 128, "1": 1}
    start = {n: torch.zeros(b, h, *(extent[d] for d in dims), device="cuda") for n, dims in zip(plan.carries, plan.memories, strict=True)}
    backward = plan.gradients(tuple(f.name not in fixed(c) for f in c.inputs))
    kept: dict[str, Tensor] = {}
    kernels = []
    x2 = {**x, "d_o": torch.randn(b, t, h, 128, device="cuda", dtype=torch.bfloat16)}
    ends = {**start, **{f"d_{n}": s for n, s in start.items()}}
    for direction, tensors, memory in ((plan.training, x, start), (backward, x2, ends)):
        compiled = direction.executable
        used = {*(carry.name for carry in direction.program.carries), direction.program.counter}
        launch = backend._Launch(compiled, {**tensors, **kept}, {n: m for n, m in memory.items() if n in used}, plan.chunk, None, {})
        for k in compiled.kernels:
            launch.kernel(k) if run else launch.arguments(k)
            kernels.append((launch, k))
        if not run and launch.flags is not None:
            launch.flags.fill_(1)  # all chunks are mild
        kept = {n: y if run else y.fill_(1) if y is launch.flags else y.zero_() for n, y in launch.keeps.items()}
    return Prepared(plan, kernels)


def check(name: str, schedule: str | None, regime: str, dtype: torch.dtype, k: int, v: int, t: int = 160,
          h: int = 2, hv: int = 2) -> dict[str, float]:
    """Errors of the operator's outputs and gradients, as ratios of root mean squares."""
    torch.manual_seed(0)
    op = getattr(lsmc.zoo, name)
    for _ in range(2):  # the first call is recorded, the second repeats it on other tensors
        x = inputs_for(op.canonical, 2, t, h, hv, k, v, dtype, regime)
        state = torch.randn(2, hv, k, v, device="cuda") * 0.1
        mine = {n: y.clone().requires_grad_() for n, y in [*x.items(), ("state", state)]}
        o, end = op(**{n: mine[n] for n in x}, initial_state=mine["state"], return_final_state=True, chunk=64, schedule=schedule)
        torch.autograd.grad([o, end], list(mine.values()), [torch.randn_like(o), torch.randn_like(end)])
    mine = {n: y.clone().requires_grad_() for n, y in [*x.items(), ("state", state)]}
    true = {n: y.double().requires_grad_() for n, y in [*x.items(), ("state", state)]}
    cotangents = None
    found: list[list[Tensor]] = []
    for run, leaves in ((op, mine), (lsmc.reference(op), true)):
        options = {"chunk": 64, "schedule": schedule} if run is op else {}
        o, end = run(**{n: leaves[n] for n in x}, initial_state=leaves["state"], return_final_state=True, **options)
        cotangents = cotangents or (torch.randn_like(o), torch.randn_like(end) * 0.1)
        d = [c.to(y.dtype) for c, y in zip(cotangents, (o, end), strict=True)]
        found.append([o.detach(), end.detach(), *torch.autograd.grad([o, end], list(leaves.values()), d)])
    names = ["o", "end", *(f"d_{n}" for n in mine)]
    return {n: ratio(a, b) for n, a, b in zip(names, *found, strict=True)}


def limits(name: str, dtype: torch.dtype) -> dict[str, float]:
    gates = gate_names(getattr(lsmc.zoo, name).canonical)
    scale = 1e-5 / 5e-3 if dtype == torch.float32 else 1.0

    def bound(n: str) -> float:
        kind = n if n == "o" else "end" if n.startswith("end") else "gate" if n[2:] in gates else "grad"
        return BOUND[kind] * scale

    return {n: bound(n) for n in ("o", "end", *(f"d_{f.name}" for f in getattr(lsmc.zoo, name).canonical.inputs))}


def worker(name: str, until: float, full: bool) -> None:
    """All checks of one method, as JSON lines."""
    first = time.time()
    todo = [(None, g, torch.bfloat16, 128, 128) for g in (REGIMES if full else QUICK)]
    if full:
        todo += [(None, "typical", torch.bfloat16, 64, 96), (None, "mixture", torch.float16, 128, 128)]
        todo += [(None, "sigmoid", torch.float32, 64, 64)]
    c = getattr(lsmc.zoo, name).canonical
    if not any(f.name in gate_names(c) for f in c.inputs):
        todo = [x for x in todo if x[1] in ("typical", "sigmoid")]
    for schedule, regime, dtype, k, v in todo:
        if time.time() > until:
            print(json.dumps({"method": name, "check": "stopped at the time limit"}), flush=True)
            return
        row: dict[str, Any] = {"method": name, "schedule": schedule, "gate": regime, "dtype": str(dtype)[6:], "K": k, "V": v}
        try:
            row["error"] = check(name, schedule, regime, dtype, k, v)
            bound = limits(name, dtype)
            row["bad"] = [n for n, e in row["error"].items()
                          if not e <= bound.get(n, bound["end" if n.startswith("end") else "end"])]
        except LsmError as e:
            row["skipped"] = str(e)[:200]
            print(json.dumps(row), flush=True)
            return
        except Exception as e:
            row["failed"] = f"{type(e).__name__}: {str(e)[-300:]}"
        row["seconds"] = round(time.time() - first, 1)
        print(json.dumps(row), flush=True)


WHOLE = [{"num_warps": 8}, {"num_warps": 4}, {"num_warps": 2}, {"num_warps": 8, "maxnreg": 128}, {"num_warps": 4, "maxnreg": 168}]
SPLIT = [{"num_warps": 4, "block": n, "AHEAD": ahead} for n in (32, 64, 128) for ahead in (0, 1)]
INNER = [{"num_warps": w, "block": b, "num_stages": n} for w, b, n in ((4, 64, 1), (4, 64, 2), (4, 32, 1), (4, 32, 2), (4, 32, 3),
                                                                        (8, 64, 1), (8, 64, 2), (8, 128, 1), (4, 16, 2))]


def candidates(k: Any) -> list[dict[str, int]]:
    """Plans to try for one kernel, over the default one."""
    if k.how == "slow":
        return []
    if k.scan:
        return [{f"B{k.split}": n, "num_warps": w, "num_stages": stages} for n, w in ((32, 4), (64, 4), (128, 8)) for stages in (2, 3)]
    if k.split is None:
        return WHOLE
    return [{f"B{k.split}" if n == "block" else n: x for n, x in plan.items()} for plan in (INNER if k.inner else SPLIT)]


def timings(name: str, kernels: bool, until: float) -> list[dict[str, Any]]:
    """The operator's forward, and forward+backward with the gradients of all inputs but `fixed` ones, at the default plan; with
    `kernels`, each kernel alone as well."""
    from triton.testing import do_bench

    rows = []
    op = getattr(lsmc.zoo, name)
    for label, (b, t, h) in SHAPES.items():
        if time.time() > until:
            break
        x = inputs_for(op.canonical, b, t, h, h, 128, 128, torch.bfloat16)
        trained = [y.requires_grad_() for n, y in x.items() if n not in fixed(op.canonical)]
        d_o = torch.randn(b, t, h, 128, device="cuda", dtype=torch.bfloat16)

        def forward(x: dict[str, Tensor] = x) -> Tensor:
            with torch.no_grad():
                out: Tensor = op(**x)
            return out

        def both(x: dict[str, Tensor] = x, trained: list[Tensor] = trained, d_o: Tensor = d_o) -> tuple[Tensor, ...]:
            return torch.autograd.grad(op(**x), trained, d_o)

        row: dict[str, Any] = {"method": name, "shape": label}
        try:
            both()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            both()
            row["peak_MB"] = round((torch.cuda.max_memory_allocated() - held) / 1e6)
            row["forward"] = do_bench(forward, warmup=10, rep=60, return_mode="median")
            row["both"] = do_bench(both, warmup=10, rep=60, return_mode="median")
            row["graph"] = milliseconds(both)
        except Exception as e:
            row["failed"] = str(e)[-200:]
        rows.append(row)
        print({n: round(y, 3) if isinstance(y, float) else y for n, y in row.items()}, flush=True)
        if kernels:
            for run, k in prepare(name, None, (b, t, h)).kernels:
                row.setdefault("kernels", {})[k.name] = milliseconds(lambda run=run, k=k: run.kernel(k))
            print("   ", {n: round(y, 3) for n, y in row["kernels"].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", default="h200.json")
    parser.add_argument("--limit", type=float, default=480.0)
    parser.add_argument("--worker", type=float)
    parser.add_argument("--kernels", action="store_true", help="time each kernel alone as well")
    parser.add_argument("--quick", action="store_true", help="fewer regimes of gates, bf16 only")
    parser.add_argument("--no-checks", action="store_true")
    a = parser.parse_args()
    names = a.names or methods()
    if a.worker:
        worker(names[0], a.worker, not a.quick)
        return
    begin = time.time()
    os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")
    half = begin + a.limit * 0.6
    jobs: list[tuple[str, subprocess.Popen[str]]] = []
    for n in [] if a.no_checks else names:
        command = [sys.executable, __file__, n, "--worker", str(half), *(["--quick"] if a.quick else [])]
        jobs.append((n, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)))
    rows: list[dict[str, Any]] = []
    for n, job in jobs:
        try:
            out, err = job.communicate(timeout=max(1.0, half + 15 - time.time()))
        except subprocess.TimeoutExpired:
            job.kill()
            out, err = job.communicate()
        if job.returncode:
            print(n, "exit", job.returncode, err[-400:], flush=True)
        rows += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if "error" in row:
            w = worst.setdefault((row["method"], row["dtype"]), {})
            for q, e in row["error"].items():
                w[q] = max(w.get(q, 0.0), e) if e == e else e
        if row.get("bad") or "error" not in row:
            print({q: (f"{e:.1e}" if isinstance(e, float) else e) for q, e in row.items() if q != "error"},
                  {q: f"{e:.1e}" for q, e in row.get("error", {}).items() if q in row.get("bad", ())}, flush=True)
    for key, w in worst.items():
        print(*key, *(f"{q}={e:.1e}" for q, e in w.items()), flush=True)
    print(f"checks took {time.time() - begin:.0f} s", flush=True)
    for n in names:
        rows += timings(n, a.kernels, begin + a.limit)
    Path(a.out).write_text(json.dumps(rows, indent=1))
    print(f"{time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
