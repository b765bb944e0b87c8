"""Time and compare the schedules for few long sequences: `python tests/gpu/segments.py [names] [--shape B,T,H] [--out FILE]`.

Processes of their own, side by side, compile each schedule and compare it with the float64 recurrence where there are several
chunks in a segment. Then each is timed alone, forward and forward + backward from a CUDA graph and every kernel by itself, and its
output, final state and gradients at the full size are compared with those of `two_pass`.
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
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")

import torch
from torch import Tensor

import lsmc
from tests.gpu.run_h200 import check, inputs_for, limits, milliseconds, prepare, ratio

METHODS = ("bla", "retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "kda")
SCHEDULES = ("two_pass", "segments", "fused_segments")
TOKENS = 1100
"""18 chunks: four sequences take eight segments, of three chunks each, the last two of them empty."""


def worker(name: str, schedule: str) -> None:
    """Errors against the recurrence, as JSON lines."""
    for regime in ("typical", "mixture"):
        found = check(name, schedule, regime, torch.bfloat16, 128, 128, t=TOKENS)
        bound = limits(name, torch.bfloat16)
        bad = {n: e for n, e in found.items() if not e <= bound.get(n, bound["end"])}
        print(json.dumps({"method": name, "schedule": schedule, "gates": regime, "error": found, "bad": bad}), flush=True)


def compare(name: str, schedule: str, b: int, t: int, h: int, kernels: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """Milliseconds, and the output, final state and gradients, from the same inputs for every schedule."""
    op = getattr(lsmc.zoo, name)
    torch.manual_seed(0)
    x = {n: y.requires_grad_() for n, y in inputs_for(op.canonical, b, t, h, h, 128, 128, torch.bfloat16).items()}
    x["initial_state"] = (torch.randn(b, h, 128, 128, device="cuda") * 0.1).requires_grad_()
    d = torch.randn(b, t, h, 128, device="cuda", dtype=torch.bfloat16), torch.randn(b, h, 128, 128, device="cuda") * 0.1

    def forward() -> list[Tensor]:
        return list(op(**x, return_final_state=True, schedule=schedule))

    def both() -> list[Tensor]:
        found = forward()
        return [*found, *torch.autograd.grad(found, list(x.values()), d)]

    row: dict[str, Any] = {"method": name, "schedule": schedule}
    with torch.no_grad():
        row["forward"] = milliseconds(forward)
    row["both"] = milliseconds(both)
    if kernels:
        row["kernels"] = {k.name.removeprefix(f"{name}_"): milliseconds(lambda run=run, k=k: run.kernel(k))
                          for run, k in prepare(name, schedule, (b, t, h)).kernels}
    return row, [y.detach() for y in both()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--shape", default="1,16384,8")
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--out", default="segments.json")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds, of which checks get six tenths")
    parser.add_argument("--worker", action="store_true")
    a = parser.parse_args()
    if a.worker:
        worker(a.names[0], a.schedules)
        return
    begin = time.time()
    size, schedules = [int(n) for n in a.shape.split(",")], a.schedules.split(",")
    jobs = [(n, s, subprocess.Popen([sys.executable, __file__, n, "--worker", "--schedules", s], stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, text=True))
            for n, s in itertools.product(a.names or METHODS, schedules)]
    rows: list[dict[str, Any]] = []
    for name, schedule, job in jobs:
        try:
            out, err = job.communicate(timeout=max(1.0, begin + 0.6 * a.limit - time.time()))
        except subprocess.TimeoutExpired:
            job.kill()
            out, err = job.communicate()
        if job.returncode:
            print(name, schedule, "exit", job.returncode, err[-400:], flush=True)
        rows += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    for row in rows:
        print(row["method"], row["schedule"], row["gates"], *(f"{n}={e:.1e}" for n, e in row["error"].items()),
              "WRONG" if row["bad"] else "", flush=True)
    print(f"checks took {time.time() - begin:.0f} s", flush=True)
    for name in a.names or METHODS:
        first: list[Tensor] | None = None
        for schedule in schedules:
            if time.time() > begin + a.limit:
                break
            try:
                row, found = compare(name, schedule, *size, kernels=True)
            except Exception as e:
                print(name, schedule, "failed:", str(e)[-300:], flush=True)
                continue
            first = first or found
            row["against"] = max(ratio(x, y) for x, y in zip(found, first, strict=True))
            rows.append(row)
            print(f"{name} {schedule}: forward {row['forward']:.3f}, both {row['both']:.3f} ms, differs by {row['against']:.1e};",
                  ", ".join(f"{n} {ms:.3f}" for n, ms in row["kernels"].items()), flush=True)
    Path(a.out).write_text(json.dumps(rows, indent=1))
    print(f"{time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
