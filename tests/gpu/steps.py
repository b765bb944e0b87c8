"""One token at a time on a GPU: `python tests/gpu/steps.py [NAMES] [--limit SECONDS] [--lengths NAMES] [--out FILE]`.

Processes of their own, side by side, compile each method's steps and compare them with the float64 recurrence: token after token through
`step`, so that all but the first are repetitions, on tensors of their own; and calls that walk, of whole and packed sequences, value
heads in groups. Then each is timed alone at 64 sequences of 16 heads, K = V = 128 (as many states where entries decay by themselves):
the call as it is, from a CUDA graph, and the kernel without the host, beside the time to read and write the memory once. `--plans`
times the kernel with other blocks and warps, `--lengths` a few tokens by several schedules, for the cost model. Exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")

import torch

import lsmc
from lsmc.cases import Case, sample, tensors
from lsmc.chunk import derive
from lsmc.lowering import ops
from lsmc.lowering.plan import able
from lsmc.runtime.bench.measure import _from_graph, _median_ms, ceilings
from tests.interpreted import bound, errors

METHODS = [m.name for m in lsmc.zoo.METHODS if able("triton", derive(m.canonical)) == "triton"]
BATCH, HEADS, TOKENS = 64, 16, 6
SHORT = (1, 2, 4, 8, 16)
PLANS = ((64, 8), (32, 4), (32, 8), (16, 2), (16, 4), (8, 1), (64, 16), (128, 16))
"""Columns of a program, and its warps."""


def sizes(name: str) -> tuple[int, int, int]:
    """Heads, K and V: few states of many channels where entries decay by themselves."""
    return (HEADS // 2, 16, 2048) if getattr(lsmc.zoo, name).canonical.matrix and name != "gfw_full" else (HEADS, 128, 128)


def given(name: str, case: Case, dtype: torch.dtype, batch: int | None = None) -> tuple[dict[str, Any], Any, frozenset[str]]:
    """Inputs of a case on the GPU, its state as `step` takes it, and which inputs are per token."""
    drawn = sample(getattr(lsmc.zoo, name), case, batch=batch)
    x = {n: y.detach().to("cuda", dtype if n in drawn.per_token else torch.float32) for n, y in drawn.inputs.items()}
    state = [s.detach().to("cuda", torch.float32) for s in tensors(drawn.state)]
    return x, None if not state else state[0] if len(state) == 1 else tuple(state), frozenset(drawn.per_token)


def double(x: Any) -> Any:
    return None if x is None else x.double() if isinstance(x, torch.Tensor) else tuple(map(double, x))


@torch.no_grad()
def check(name: str) -> dict[str, Any]:
    """What is beyond the tolerance, by kind of call, and the worst error of each kind."""
    op, (_, k, v) = getattr(lsmc.zoo, name), sizes(name)
    v, worst, bad = min(v, 128), {}, {}
    base = Case(batch=2, time=TOKENS, heads=2, groups=2, key_dim=k, value_dim=v, initial_state=True)
    odd = Case(batch=1, time=11, heads=1, groups=1, key_dim=k - 3, value_dim=v - 3, cuts=(0, 4, 4), initial_state=True)
    for dtype in ("bfloat16", "float32"):
        for kind, case in (("steps", base), ("walk", base), ("packed", odd)):
            options: dict[str, Any] = {}
            if case.cuts:
                options["cu_seqlens"] = torch.tensor([0, *(stop for _, stop in case.pieces)], dtype=torch.int32, device="cuda")
            x, state, per_token = given(name, case, getattr(torch, dtype), len(case.pieces) if case.cuts else None)
            o, end = lsmc.reference(op)(**{n: y.double() for n, y in x.items()}, initial_state=double(state), return_final_state=True, **options)
            if kind == "steps":
                parts = []
                for t in range(case.time):
                    now, state = op.step(**{n: y[:, t].clone() if n in per_token else y for n, y in x.items()}, state=state)
                    parts.append(now)
                found, last = torch.stack(parts, 1), state
            else:
                found, last = op(**x, initial_state=state, return_final_state=True, schedule="walk", **options)
            wanted = {"o": o, **{f"state {n}": s for n, s in enumerate(tensors(end))}}
            seen = errors({"o": found.double(), **{f"state {n}": s.double() for n, s in enumerate(tensors(last))}}, wanted, dtype)
            worst[f"{kind} {dtype}"] = max(seen.values())
            bad |= {f"{kind} {dtype} {n}": e for n, e in seen.items() if not e <= bound(n, dtype)}
    return {"worst": worst, "bad": bad}


def call(name: str, tokens: int = 0) -> tuple[Any, int]:
    """A step, or a call of a few tokens, at full size; and the bytes of its memory, read and written."""
    op, (heads, k, v) = getattr(lsmc.zoo, name), sizes(name)
    few = Case(2, max(1, tokens), heads, key_dim=k, value_dim=v, initial_state=True)
    x, state, per_token = given(name, few, torch.bfloat16)
    x = {n: y.repeat(BATCH // 2, *[1] * (y.ndim - 1)) if n in per_token else y for n, y in x.items()}
    memories = [s.repeat(BATCH // 2, *[1] * (s.ndim - 1)) for s in tensors(state)]
    state = memories[0] if len(memories) == 1 else tuple(memories)
    moved = 2 * sum(s.numel() * s.element_size() for s in memories)
    if tokens:
        return lambda **options: op(**x, initial_state=state, return_final_state=True, **options), moved
    x = {n: y[:, 0] if n in per_token else y for n, y in x.items()}
    return lambda: op.step(**x, state=state), moved


def many(run: Any, times: int = 20) -> float:
    """Milliseconds of one of several runs in a graph: the kernel, with what the device does between kernels."""
    notes: list[str] = []
    found = _from_graph(lambda: [run() for _ in range(times)], notes)
    return found / times if found is not None else float("nan")


@torch.no_grad()
def worker(name: str) -> None:
    row: dict[str, Any] = {"method": name}
    try:
        row |= check(name)
        run, _ = call(name)
        run()
        torch.cuda.synchronize()
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[-400:]}"
    print(json.dumps(row), flush=True)


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    run, moved = call(name)
    run()
    floor = 1e3 * moved / ceilings("cuda").bytes_per_s
    row = {"method": name, "floor": floor, "eager": _median_ms(run), "graph": _from_graph(run, []), "kernel": many(run)}
    started = time.perf_counter()
    for _ in range(200):
        run()
    row["host"] = (time.perf_counter() - started) * 5  # ms of one, when the device lags behind it waits: an upper bound
    torch.cuda.synchronize()
    return row


@torch.no_grad()
def lengths(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for t in SHORT:
        run, _ = call(name, t)
        found[str(t)] = {s: _median_ms(lambda run=run, s=s: run(schedule=s)) for s in ("walk", "fused", "two_pass")}
    return {"method": name, "lengths": found}


@torch.no_grad()
def plans(name: str) -> dict[str, Any]:
    """The kernel of a step under other plans."""
    run, _ = call(name)
    run()
    found: dict[str, float] = {}
    for columns, warps in PLANS:
        made = executable(name)
        made.adopt({k.kernel.name: {"BV": columns, "num_warps": warps} for k in made.kernels})
        try:
            found[f"{columns}x{warps}"] = many(run)
        except Exception as error:
            print(f"{name} {columns}x{warps}: {type(error).__name__}", flush=True)
    made.adopt({})
    return {"method": name, "plans": found}


def executable(name: str) -> Any:
    """What runs a step at full size."""
    heads = sizes(name)[0]
    made = [p for p in ops._PLANS.values() if p.name == name and (p.shape.tokens, p.shape.sequences) == (1, BATCH * heads)]
    assert [p.forward.choice.schedule.name for p in made] == ["walk"], f"a step of {name} is one walk"
    return made[0].forward.executable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds, of which checks get two thirds")
    parser.add_argument("--lengths", nargs="*", default=[], metavar="NAMES")
    parser.add_argument("--plans", nargs="*", default=[], metavar="NAMES")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.names[0])
        return 0
    started, rows = time.time(), list[dict[str, Any]]()

    def apart(name: str) -> dict[str, Any]:
        left = 2 / 3 * a.limit - (time.time() - started)
        try:
            done = subprocess.run([sys.executable, __file__, name, "--worker"], capture_output=True, text=True, timeout=max(left, 1.0))
            return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"method": name, "failed": done.stderr[-400:]}
        except subprocess.TimeoutExpired:
            return {"method": name, "failed": "no time left"}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if a.out:
            a.out.write_text("".join(json.dumps(r) + "\n" for r in rows))

    with ThreadPoolExecutor(a.jobs) as pool:
        for row in pool.map(apart, a.names or METHODS):
            keep(row)
            told = row.get("failed") or (f"WRONG {row['bad']}" if row["bad"] else " ".join(f"{n} {e:.0e}" for n, e in row["worst"].items()))
            print(f"{row['method']:<18} {told}", flush=True)
    print(f"checked in {time.time() - started:.0f} s on {torch.cuda.get_device_name()}, torch {torch.__version__}; ms: eager, graph, kernel, "
          "host, floor, graph / floor", flush=True)
    for row in [r for r in rows if "worst" in r]:
        if time.time() - started > a.limit:
            print("no time left")
            break
        found = measure(row["method"])
        keep(found)
        print(f"{found['method']:<18} {found['eager']:.4f} {found['graph'] or 0:.4f} {found['kernel']:.4f} {found['host']:.4f} "
              f"{found['floor']:.4f} {(found['graph'] or 0) / found['floor']:.2f}", flush=True)
    for what, name in [*((plans, n) for n in a.plans), *((lengths, n) for n in a.lengths)]:
        if time.time() - started > a.limit:
            print("no time left")
            break
        keep(row := what(name))
        if what is plans:
            print(f"{name:<18}", " ".join(f"{plan} {ms:.4f}" for plan, ms in row["plans"].items()), flush=True)
        else:
            print(f"{name:<18}", " ".join(f"T{t} " + "/".join(f"{ms:.3f}" for ms in by.values()) for t, by in row["lengths"].items()),
                  "(walk/fused/two_pass)", flush=True)
    return int(any(r.get("bad") or r.get("failed") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
