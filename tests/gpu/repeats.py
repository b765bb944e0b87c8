"""Whether kernels give the same bits each time: `python tests/gpu/repeats.py [NAMES] [--times N] [--limit SECONDS] [--late]`.

No kernel adds in an order that depends on timing, so outputs and gradients of equal calls are equal bits; what differs was read
before it was there. With --late they are also those of kernels that load each tile where it is wanted (`triton_early`).
Calls of several sizes, each many times, in bfloat16, with inputs as the tests draw them, over and over; a process for each
method. Exits with 1 where any differ; says which are not finite, and what has no room on the device.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")

import torch

import lsmc
from lsmc.cases import Case, sample
from lsmc.lowering.backends import triton
from lsmc.zoo import METHODS

SIZES = ((16, 4096, 8, 128), (8, 2048, 8, 128), (1, 4096, 56, 64), (2, 300, 3, 128), (1, 16384, 8, 128))
"""B, T, H and K = V: many programs on a multiprocessor, one, few columns, a part of a chunk, segments."""


DRAWN = 256
"""Tokens of one sequence that are drawn; all else repeats them."""


def inputs(op: lsmc.LSM, b: int, t: int, h: int, k: int) -> dict[str, torch.Tensor]:
    drawn = sample(op, Case(time=min(t, DRAWN), heads=h, key_dim=k, value_dim=k, defaults=True))
    out = {}
    for n, x in drawn.inputs.items():
        x = x.detach().cuda().float()
        if n in drawn.per_token:
            x = x.repeat(b, -(-t // DRAWN), *[1] * (x.ndim - 2))[:, :t].to(torch.bfloat16)
        out[n] = x.requires_grad_()
    return out


def once(op: lsmc.LSM, x: dict[str, torch.Tensor], d_o: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Output and gradients of a call, and the cotangent of its output."""
    o = op(**x)
    d_o = torch.randn_like(o) if d_o is None else d_o
    return {"o": o.detach(), **dict(zip(x, torch.autograd.grad(o, list(x.values()), d_o), strict=True))}, d_o


def bits(x: torch.Tensor) -> torch.Tensor:
    """What is equal even where it is not a number."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


@contextmanager
def late() -> Iterator[None]:
    """Kernels whose loads are under way no earlier than they are wanted."""
    usual = triton._Launch.plan
    triton._Launch.plan = lambda launch, k: usual(launch, k) | ({"EARLY": 0} if k.early else {})
    try:
        yield
    finally:
        triton._Launch.plan = usual
    for made in (x for x in gc.get_objects() if isinstance(x, triton.Compiled)):
        made.adopt(made.plans)  # forgets what was recorded


def repeat(name: str, times: int, until: float, compare: bool) -> None:
    """Prints a line for each size: which results differed, and how often."""
    op = getattr(lsmc.zoo, name)
    for b, t, h, k in SIZES:
        size = f"{name} B{b} T{t} H{h} K{k}"
        if time.time() > until:
            print(f"{size} not reached", flush=True)
            continue
        torch.manual_seed(0)
        try:
            x = inputs(op, b, t, h, k)
            with late() if compare else nullcontext():
                first, d_o = once(op, x, None)
            differ: dict[str, int] = {}
            for _ in range(times - 1):
                for n, y in once(op, x, d_o)[0].items():
                    if not torch.equal(bits(first[n]), bits(y)):
                        differ[n] = differ.get(n, 0) + 1
        except torch.OutOfMemoryError:
            print(f"{size} has no room on this device", flush=True)
            continue
        text = ", ".join(f"{n} in {count}" for n, count in differ.items())
        grown = ", ".join(n for n, y in first.items() if not y.isfinite().all())
        print(f"{size} {times} times: {'DIFFER ' + text if differ else 'equal'}{f' (not finite: {grown})' if grown else ''}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*")
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--limit", type=float, default=300)
    p.add_argument("--late", action="store_true")
    p.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        repeat(a.names[0], a.times, a.worker, a.late)
        return
    until = time.time() + a.limit

    def one(name: str) -> str:
        command = [sys.executable, __file__, name, "--times", str(a.times), "--worker", str(until), *["--late"] * a.late]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout + (f"{name} FAILED {done.stderr[-300:]}\n" if done.returncode else "")

    with ThreadPoolExecutor(12) as pool:
        lines = "".join(pool.map(one, a.names or [op.name for op in METHODS])).splitlines()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *lines, sep="\n")
    sys.exit(any(word in line for line in lines for word in ("DIFFER", "FAILED")))


if __name__ == "__main__":
    main()
