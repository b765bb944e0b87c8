"""Causal softmax attention of a rank's rows by a fused kernel: `lsmc::attend`, beside its adjoint.

    o = softmax(scale · q kᵀ, over the keys up to the row's own token) v

The rows are the rank's part of the sequence, k and v the whole of it. Which keys a rank sees is known as it runs, for the
graph is the same on all ranks: later ones are cut off, and what is left is causal from its lower right corner, which
torch's FlashAttention-2 (arXiv 2307.08691) computes without a mask in memory. Its two ATen operators are used here alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lsmc.runtime.collectives import place

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


def able(q: Any, k: Any, v: Any) -> bool:
    """Whether there is a fused kernel: 16-bit, on a GPU since Ampere, (B, H, n, K) with V = K ≤ 256, a multiple of 8."""
    return (q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.ndim == 4
            and q.shape[1] == k.shape[1] and q.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
            and torch.cuda.get_device_capability(q.device) >= (8, 0))


def _seen(q: Tensor, group: str) -> int:
    """How many keys the last row sees."""
    return q.shape[-2] * (place(group) + 1)


@torch.library.custom_op("lsmc::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str) -> tuple[Tensor, Tensor]:
    """(B, H, n, K) and, for the adjoint, the logarithms of the sums of the softmax (B, H, n)."""
    seen, q = _seen(q, group), q.contiguous()
    o, sums, *_ = _flash(q, k[..., :seen, :], v[..., :seen, :], 0.0, True, scale=scale)
    return o.contiguous(), sums


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("lsmc::attend_backward", mutates_args=())
def _attend_backward(d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, scale: float | None,
                     group: str) -> tuple[Tensor, Tensor, Tensor]:
    seen, many = _seen(q, group), k.shape[-2]
    seed = torch.empty(2, dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    q, d = q.contiguous(), d.contiguous()
    dq, dk, dv = _flash_backward(d, q, k[..., :seen, :], v[..., :seen, :], o, sums, None, None, q.shape[-2], seen, 0.0, True,
                                 seed, seed, scale=scale)
    return dq.contiguous(), *(F.pad(x, (0, 0, 0, many - seen)).contiguous() for x in (dk, dv))


@_attend_backward.register_fake
def _(d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, scale: float | None,
      group: str) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.group = inputs
    ctx.save_for_backward(*tensors, *output)


def _adjoint(ctx: Any, d: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.lsmc.attend_backward.default(d, *ctx.saved_tensors, ctx.scale, ctx.group), None, None)


_attend.register_autograd(_adjoint, setup_context=_keep)


def attend(q: Any, k: Any, v: Any, scale: float | None, group: str) -> Any:
    """o (B, H, n, K) of this rank's rows q (B, H, n, K); k and v (B, H, N, K) are those of all N tokens."""
    return torch.ops.lsmc.attend.default(q, k, v, scale, group)[0]


__all__ = ["able", "attend"]
