"""What a call takes the host, on tensors so small that a GPU is never behind: `python tests/gpu/host.py [NAMES]`.

Microseconds of the forward without derivatives, of the forward that keeps what its backward needs, of both directions, and of both
of softmax attention on the same tensors; then where the time of both directions goes.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import lsmc
from tests.gpu.run_h200 import inputs_for

CALLS = 300


def microseconds(call: Callable[[], Any]) -> float:
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def main() -> None:
    for name in sys.argv[1:] or ("bla", "gla"):
        op = getattr(lsmc.zoo, name)
        x = inputs_for(op.canonical, 1, 128, 2, 2, 128, 128, torch.bfloat16)
        leaves = [y.requires_grad_() for y in x.values()]
        d = torch.randn(1, 128, 2, 128, device="cuda", dtype=torch.bfloat16)

        def without(op: Any = op, x: Any = x) -> Any:
            with torch.no_grad():
                return op(**x)

        def forward(op: Any = op, x: Any = x) -> Any:
            return op(**x)

        def both(op: Any = op, x: Any = x, leaves: Any = leaves, d: Any = d) -> Any:
            return torch.autograd.grad(op(**x), leaves, d)

        def softmax(x: Any = x, d: Any = d) -> Any:
            qkv = [x["q"], x["k"], x["v"]]
            return torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*qkv), qkv, d)

        for call in (without, forward, both, softmax):
            print(f"{name} {call.__name__}: {microseconds(call):.0f} us", flush=True)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(CALLS):
            both()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)


if __name__ == "__main__":
    main()
