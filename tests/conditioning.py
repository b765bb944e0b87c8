"""What rounding alone does to a gradient that cancels: `python tests/conditioning.py [DRAWS]`, on a CPU.

The query of test-time training with a layer norm meets the memory in z = q M + m, so that its gradient is that of the residual and M ∂z. Rows of M are
sums of gradients of such norms, which the norm's derivative takes out of ∂z again: what is left of M ∂z is small beside what was summed.
Everything is worked out in float64 here but for that one product, whose operands are rounded. Printed are RMS ratios of the gradient's error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import lsmc
from lsmc.cases import Case, sample
from lsmc.lsm import LSM

EPS = 1e-6


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits behind the first one."""
    bits = x.float().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32).double()


def same(x: Tensor) -> Tensor:
    return x


ROUNDED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "neither": (same, same), "both, bf16": (bf16, bf16), "M, bf16": (bf16, same), "∂z, bf16": (same, bf16), "both, tf32": (tf32, tf32)}


def norm(z: Tensor) -> Tensor:
    z = z - z.mean(-1, keepdim=True)
    return z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()


def errors(op: LSM, tokens: int, seed: int) -> list[float]:
    """One draw of calls without a memory, for each way of rounding."""
    torch.manual_seed(seed)
    drawn = sample(op, Case(batch=6 if tokens < 16 else 1, time=tokens, key_dim=64, value_dim=64))
    x = {n: bf16(y.detach()) if n in drawn.per_token else y.detach().double() for n, y in drawn.inputs.items()}
    run = lsmc.reference(op)
    q = x["q"].clone().requires_grad_()
    o = run(**{**x, "q": q})
    d = bf16(torch.randn_like(o))
    (right,) = torch.autograd.grad(o, q, d)
    found = {n: torch.empty_like(right) for n in ROUNDED}
    for t in range(tokens):
        _, (memory, bias) = run(**{n: y[:, : t + 1] if n in drawn.per_token else y for n, y in x.items()}, return_final_state=True)
        z = (torch.einsum("bhk,bhkv->bhv", x["q"][:, t], memory) + bias.flatten(2)).requires_grad_()
        (dz,) = torch.autograd.grad(x["w"] * norm(z), z, d[:, t])
        for n, (first, second) in ROUNDED.items():
            found[n][:, t] = torch.einsum("bhkv,bhv->bhk", first(memory), second(dz)) + d[:, t]
    return [float((y - right).square().mean().sqrt() / right.square().mean().sqrt()) for y in found.values()]


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    op = lsmc.zoo.ttt_ln_sequential
    print(f"{op.name}, calls without a memory, K = V = 64, {draws} draws: median and largest error of d_q where these are rounded")
    for tokens in (15, 65):
        rows = torch.tensor([errors(op, tokens, seed) for seed in range(draws)], dtype=torch.float64)
        middle, most = rows.median(0).values, rows.max(0).values
        print(f"T = {tokens}: " + "; ".join(f"{n}: {a:.1e}, {b:.1e}" for n, a, b in zip(ROUNDED, middle.tolist(), most.tolist())))


if __name__ == "__main__":
    main()
