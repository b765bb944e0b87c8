"""Whether kernels give the same bits each time: `python tests/gpu/repeats.py [NAMES] [--times N] [--limit SECONDS]`.

No kernel adds in an order that depends on timing, so outputs and gradients of equal calls are equal bits; what differs was read
before it was there. Calls of several sizes, each many times, in bfloat16; a process for each method. Exits with 1 where any differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")

import torch

import lsmc
from lsmc.zoo import METHODS
from tests.gpu.run_h200 import fixed, inputs_for

SIZES = ((16, 4096, 8, 128), (8, 2048, 8, 128), (1, 4096, 56, 64), (2, 300, 3, 128), (1, 16384, 8, 128))
"""B, T, H and K = V: many programs on a multiprocessor, one, few columns, a part of a chunk, segments."""


def repeat(name: str, times: int, until: float) -> None:
    """Prints a line for each size: which results differed, and how often."""
    op = getattr(lsmc.zoo, name)
    for b, t, h, k in SIZES:
        if time.time() > until:
            print(f"{name} B{b} T{t} H{h} K{k} not reached", flush=True)
            continue
        torch.manual_seed(0)
        x = inputs_for(op.canonical, b, t, h, h, k, k, torch.bfloat16)
        trained = {n: y.requires_grad_() for n, y in x.items() if n not in fixed(op.canonical)}
        first: dict[str, torch.Tensor] = {}
        differ: dict[str, int] = {}
        for _ in range(times):
            o = op(**x)
            d_o = first.setdefault("d_o", torch.randn_like(o))
            found = {"o": o.detach(), **dict(zip(trained, torch.autograd.grad(o, list(trained.values()), d_o), strict=True))}
            for n, y in found.items():
                if not torch.equal(first.setdefault(n, y), y):
                    differ[n] = differ.get(n, 0) + 1
        text = ", ".join(f"{n} in {count}" for n, count in differ.items())
        print(f"{name} B{b} T{t} H{h} K{k} {times} times: {'DIFFER ' + text if differ else 'equal'}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*")
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--limit", type=float, default=300)
    p.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        repeat(a.names[0], a.times, a.worker)
        return
    until = time.time() + a.limit

    def one(name: str) -> str:
        command = [sys.executable, __file__, name, "--times", str(a.times), "--worker", str(until)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout + (f"{name} FAILED {done.stderr[-300:]}\n" if done.returncode else "")

    with ThreadPoolExecutor(12) as pool:
        lines = "".join(pool.map(one, a.names or [op.name for op in METHODS])).splitlines()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *lines, sep="\n")
    sys.exit(any(word in line for line in lines for word in ("DIFFER", "FAILED")))


if __name__ == "__main__":
    main()
