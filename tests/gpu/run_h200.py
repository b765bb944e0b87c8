"""Check and time every method of the zoo on a GPU: `python tests/gpu/run_h200.py [--out FILE] [--limit SECONDS] [names]`.

Each method runs in a process of its own (they compile side by side): bf16 and fp32 kernels against the float64
recurrence on identically rounded inputs, for gates from none to an exact reset. Then each is timed alone. Prints one
line per measurement and writes them as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import lsmc
from lsmc.canonical import Canonical
from lsmc.errors import LsmError
from lsmc.lowering.backends import triton as backend
from lsmc.pipeline import Options, compile_plan

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
        shape = ((b, t) if token else ()) + (h if f.heads == "H" else hv,) + tuple({"K": k, "V": v}[d] for d in f.dims)
        if f.name in gates and c.decay_k in (None, f) and c.decay_v in (None, f):
            x = gate(regime, shape, 1 if token else None)
        elif f.name in gates or not f.dims:
            x = torch.rand(shape, dtype=torch.float64, device="cuda") * 0.9 + 0.05
            x = -x if f.name in gates and "dt" not in f.name else x
        else:
            x = torch.randn(shape, dtype=torch.float64, device="cuda")
            x = torch.nn.functional.normalize(x, dim=-1) if f.dims == ("K",) and f.name != "q" else x
        out[f.name] = x.float() if f.name in gates and not token else x.to(dtype)
    return out


def ratio(a: Tensor, b: Tensor) -> float:
    scale = b.double().pow(2).mean().sqrt()
    error = (a.double() - b.double()).pow(2).mean().sqrt()
    return float(error / scale) if scale > 1e-12 else float(error)


def make(name: str, schedule: str | None, chunk: int = 64) -> tuple[Canonical, Any, Any, list[tuple[str, tuple[str, str]]]]:
    c = getattr(lsmc.zoo, name).canonical
    plan = compile_plan(c, Options(schedule=schedule, chunk=chunk, target="triton"))
    f, r = (backend.Compiled(d.program, d.choice.schedule) for d in (plan.forward, plan.backward))
    return c, f, r, [(ca.name, f.program.index[ca.inp].dims) for ca in f.program.carries]


def check(name: str, schedule: str | None, regime: str, dtype: torch.dtype, k: int, v: int, t: int = 160,
          h: int = 2, hv: int = 2) -> dict[str, float]:
    torch.manual_seed(0)
    c, f, r, carries = make(name, schedule)
    x = inputs_for(c, 2, t, h, hv, k, v, dtype, regime)
    size = {"K": k, "V": v, "1": 1}
    start = {n: torch.randn(2, hv, size[a], size[b], device="cuda") * 0.1 for n, (a, b) in carries}
    o, ends = f.launch(x, start, 64)
    xr = {n: y.double().requires_grad_() for n, y in x.items()}
    sr = [s.double().requires_grad_() for s in start.values()]
    first = sr[0] if len(sr) == 1 else (sr[0], sr[1][..., 0])
    ro, rs = lsmc.reference(getattr(lsmc.zoo, name))(**xr, initial_state=first, return_final_state=True)
    rs = [rs] if isinstance(rs, Tensor) else [rs[0], rs[1][..., None]]
    out = {"o": ratio(o["o"], ro)} | {f"end_{n}": ratio(e, q) for (n, e), q in zip(ends.items(), rs)}
    d_o = torch.randn_like(ro).to(dtype)
    d_e = {f"d_{n}": torch.randn_like(e) * 0.1 for n, e in ends.items()}
    want = torch.autograd.grad([ro, *rs], [*xr.values(), *sr], [d_o.double(), *(d.double() for d in d_e.values())],
                               allow_unused=True)
    grads, dstart = r.launch({**x, "d_o": d_o}, start | d_e, 64)
    got = [grads[f"d_{n}"] for n in x] + [dstart[f"d_{n}"] for n in start]
    for n, g, w in zip([*x, *start], got, want):
        if w is not None:
            out[f"d_{n}"] = ratio(g, w)
    return out


def limits(name: str, dtype: torch.dtype) -> dict[str, float]:
    gates = gate_names(getattr(lsmc.zoo, name).canonical)
    scale = 1.0 if dtype == torch.bfloat16 else 1e-5 / 5e-3

    def bound(n: str) -> float:
        kind = n if n == "o" else "end" if n.startswith("end") else "gate" if n[2:] in gates else "grad"
        return BOUND[kind] * scale

    return {n: bound(n) for n in ("o", "end", *(f"d_{f.name}" for f in getattr(lsmc.zoo, name).canonical.inputs))}


def worker(name: str, until: float, full: bool) -> None:
    """All checks of one method, as JSON lines."""
    first = time.time()
    todo = [(s, g, torch.bfloat16, 128, 128) for s in ("fused", "two_pass") for g in (REGIMES if full else QUICK)]
    if full:
        todo += [(s, "typical", torch.bfloat16, 64, 64) for s in ("fused", "two_pass")]
        todo += [(s, "sigmoid", torch.float32, 64, 64) for s in ("fused", "two_pass")]
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


WHOLE = [{"num_warps": 8}, {"num_warps": 4}, {"num_warps": 8, "maxnreg": 128}, {"num_warps": 4, "maxnreg": 168}]
SPLIT = [{"num_warps": 4, "block": 64}, {"num_warps": 4, "block": 32}, {"num_warps": 4, "block": 32, "maxnreg": 168},
         {"num_warps": 4, "block": 64, "maxnreg": 168}]


def candidates(k: Any) -> list[dict[str, int]]:
    """Plans to try for one kernel, over the default one."""
    if k.scan:
        return [{}]
    if k.split is None:
        return WHOLE
    return [{f"B{k.split}" if n == "block" else n: x for n, x in plan.items()} for plan in SPLIT]


def launches(name: str, schedule: str, b: int, t: int, h: int) -> list[tuple[Any, Any]]:
    """(a prepared launch, its kernel) of both directions, run once in order so that buffers exist."""
    c, f, r, carries = make(name, schedule)
    x = inputs_for(c, b, t, h, h, 128, 128, torch.bfloat16)
    size = {"K": 128, "V": 128, "1": 1}
    start = {n: torch.zeros(b, h, size[a], size[d], device="cuda") for n, (a, d) in carries}
    out = []
    x2 = {**x, "d_o": torch.randn(b, t, h, 128, device="cuda", dtype=torch.bfloat16)}
    for compiled, tensors, memory in ((f, x, start), (r, x2, {**start, **{f"d_{n}": s for n, s in start.items()}})):
        run = backend._Launch(compiled, tensors, memory, 64, None, {})
        for k in compiled.kernels:
            run.kernel(k)
            out.append((run, k))
    return out


def warm(name: str, until: float) -> None:
    """Compile the tuning candidates of one method (Triton keeps them on disk)."""
    for schedule in ("fused", "two_pass"):
        for run, k in launches(name, schedule, 1, 64, 1):
            for plan in candidates(k):
                if time.time() > until:
                    return
                run.compiled.plans[k.name] = plan
                try:
                    run.kernel(k)
                    torch.cuda.synchronize()
                except Exception as e:
                    print(json.dumps({"method": name, "kernel": k.name, "plan": plan, "failed": str(e)[-200:]}), flush=True)


def milliseconds(call: Any, count: int = 5) -> float:
    """The median of a few runs as a CUDA graph: device time without the host's."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    marks = []
    for _ in range(count):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        marks.append((a, b))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in marks)[count // 2]


def timings(name: str, sweep: bool, until: float) -> list[dict[str, Any]]:
    rows = []
    for (label, (b, t, h)), schedule in itertools.product(SHAPES.items(), ("fused", "two_pass")):
        if time.time() > until:
            break
        try:
            items = launches(name, schedule, b, t, h)
        except Exception as e:
            rows.append({"method": name, "schedule": schedule, "failed": str(e)[-200:]})
            continue
        row: dict[str, Any] = {"method": name, "schedule": schedule, "shape": label, "kernels": {}}
        for run, k in items:
            row["kernels"][k.name] = {"default": milliseconds(lambda run=run, k=k: run.kernel(k))}
            if sweep and label.startswith("B16"):
                for plan in candidates(k):
                    run.compiled.plans[k.name] = plan
                    try:
                        took = milliseconds(lambda run=run, k=k: run.kernel(k), 3)
                    except Exception:
                        continue
                    row["kernels"][k.name][" ".join(f"{a}{n}" for a, n in plan.items())] = took
                run.compiled.plans.pop(k.name, None)
        runs = list(dict.fromkeys(r for r, _ in items))
        row["forward"] = sum(row["kernels"][k.name]["default"] for r, k in items if r is runs[0])
        row["both"] = sum(x["default"] for x in row["kernels"].values())
        rows.append(row)
        print(name, schedule, label, f"forward {row['forward']:.3f} ms, forward+backward {row['both']:.3f} ms", flush=True)
        for n, x in row["kernels"].items():
            best = min(x, key=lambda p: x[p])
            print(f"    {n}: {x['default']:.3f}, best {x[best]:.3f} ({best})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", default="h200.json")
    parser.add_argument("--limit", type=float, default=480.0)
    parser.add_argument("--worker", type=float)
    parser.add_argument("--warm", type=float)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer regimes of gates, bf16 only")
    parser.add_argument("--no-checks", action="store_true")
    a = parser.parse_args()
    names = a.names or methods()
    if a.worker:
        worker(names[0], a.worker, not a.quick)
        return
    if a.warm:
        warm(names[0], a.warm)
        return
    begin = time.time()
    os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")
    half = begin + a.limit * 0.65
    jobs: list[tuple[str, subprocess.Popen[str]]] = []
    modes = ([] if a.no_checks else ["--worker"]) + (["--warm"] if a.sweep else [])
    for mode, n in itertools.product(modes, names):
        command = [sys.executable, __file__, n, mode, str(half), *(["--quick"] if a.quick else [])]
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
    worst: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if "error" in row:
            w = worst.setdefault((row["method"], row["schedule"], row["dtype"]), {})
            for q, e in row["error"].items():
                w[q] = max(w.get(q, 0.0), e) if e == e else e
        if row.get("bad") or "error" not in row:
            print({q: (f"{e:.1e}" if isinstance(e, float) else e) for q, e in row.items() if q != "error"},
                  {q: f"{e:.1e}" for q, e in row.get("error", {}).items() if q in row.get("bad", ())}, flush=True)
    for key, w in worst.items():
        print(*key, *(f"{q}={e:.1e}" for q, e in w.items()), flush=True)
    print(f"checks took {time.time() - begin:.0f} s", flush=True)
    for n in names:
        rows += timings(n, a.sweep, begin + a.limit)
    Path(a.out).write_text(json.dumps(rows, indent=1))
    print(f"{time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
