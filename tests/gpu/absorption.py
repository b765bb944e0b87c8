"""What absorption saves on a GPU: an operator fed by gates, norms or both, forward and backward, with the maps inside and outside.

    python tests/gpu/absorption.py [--size 16,4096,8,128] [--methods gla,kda] [--out FILE.json]

Prints for each: milliseconds with the maps outside (the pass switched off), inside (whatever it costs) and as judged, the
difference that was estimated, and the RMS error of the output and of the raw gradients inside over those outside, against
the same in float32.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import lsmc
from lsmc.api import PASSES
from lsmc.lowering.absorb import absorb, judge
from lsmc.lowering.plan import Plan

GATES = {"g": lambda x: F.logsigmoid(x.float()) / 16, "beta": lambda x: x.float().sigmoid()}
NORMS = {n: lambda x: F.normalize(x.float(), dim=-1, eps=1e-6).to(x.dtype) for n in "qk"}
FEATURES = dict.fromkeys("qkv", F.silu)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None


def times(run: Any, raw: dict[str, Tensor], repeats: int = 20) -> float:
    """Milliseconds of forward and backward, the median."""
    taken = []
    for i in range(repeats + 5):
        wait()
        start = time.perf_counter()
        o = run(raw)
        torch.autograd.grad(o, list(raw.values()), torch.ones_like(o))
        wait()
        if i >= 5:
            taken.append(time.perf_counter() - start)
    return 1e3 * sorted(taken)[len(taken) // 2]


def errors(run: Any, raw: dict[str, Tensor], wanted: list[Tensor]) -> dict[str, float]:
    o = run(raw)
    found = [o, *torch.autograd.grad(o, list(raw.values()), torch.ones_like(o))]
    return {n: float((x.float() - y).square().mean().sqrt() / y.square().mean().sqrt().clamp(min=1e-12))
            for n, x, y in zip(["o", *raw], found, wanted)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="16,4096,8,128")
    parser.add_argument("--methods", default="bla,gla,gated_deltanet,kda")
    parser.add_argument("--out")
    options = parser.parse_args()
    B, T, H, D = map(int, options.size.split(","))
    rows = []
    for method in options.methods.split(","):
        op = getattr(lsmc.zoo, method)
        shapes = {s.name: (B, T, H, *([D] * len(s.dims))) for s in op.inputs}
        raw = {n: torch.randn(s, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for n, s in shapes.items()}
        for kind, maps in {"gates": GATES, "norms": NORMS, "silu": FEATURES, "gates + norms": GATES | NORMS}.items():
            if not set(maps) & set(shapes) or (maps is FEATURES and "beta" in shapes):  # long keys do not contract
                continue
            plain = {n: f for n, f in (GATES | (NORMS if "beta" in shapes else {})).items() if n not in maps}

            def run(x: dict[str, Tensor], maps: Any = maps, op: Any = op) -> Tensor:
                return op(**{n: maps[n](y) if n in maps else y for n, y in x.items()}, scale=D**-0.5)

            # what is not mapped here is given in its range
            given = {n: plain[n](x.detach()).requires_grad_() if n in plain else x for n, x in raw.items()}
            exact = {n: x.detach().float().requires_grad_() for n, x in given.items()}
            o = run(exact)
            wanted = [o.detach(), *torch.autograd.grad(o, list(exact.values()), torch.ones_like(o))]
            row: dict[str, Any] = {"method": method, "maps": kind, "size": options.size, "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"}
            estimates: list[float] = []

            def noted(plan: Plan, absorbed: Plan, moved: float, into: list[float] = estimates) -> None:
                into.append((absorbed.seconds - plan.seconds) * 1e3)

            for how, opinion in {"outside": None, "inside": noted, "judged": judge}.items():
                torch._dynamo.reset()
                PASSES["absorb"] = functools.partial(absorb, judge=opinion or judge)
                compiled = lsmc.compile(run, disable=() if opinion else ("absorb",))
                row[how] = round(times(compiled, given), 3)
                row[f"errors {how}"] = {n: float(f"{e:.2e}") for n, e in errors(compiled, given, wanted).items()}
            row["estimated more inside, a chain"] = [round(x, 3) for x in estimates]
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
