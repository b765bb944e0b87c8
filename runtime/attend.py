"""Causal softmax attention of a rank's rows by fused kernels: `lsmc::attend`, beside its adjoint.

    o = softmax(scale · q kᵀ, over the keys up to the row's own token) v

The rows are the rank's part of the sequence, k and v the whole of it. All rows see the keys of the ranks before, and their own
rank's up to their token: two calls of a kernel that needs no mask in memory. Each gives its part of o and s, the logarithms
of the sums of its softmax, which are joined by

    s = log(e^{s₁} + e^{s₂}),    o = e^{s₁ − s} o₁ + e^{s₂ − s} o₂.

The backward of such a kernel knows the softmax by s alone, and o by ⟨d_o, o⟩ (FlashAttention-2, arXiv 2307.08691): given the joined
ones, it finds the gradients that go through its keys. Which keys a rank sees is known as it runs, for the graph is the same on
all ranks. The ATen operators of the kernels are used here alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lsmc.runtime.collectives import place

_aten = torch.ops.aten


class Kernel(NamedTuple):
    """A fused kernel: (q, k, v, causal, scale) → o and s (B, H, n); (d, q, k, v, o, s, causal, scale) → d_q, d_k, d_v."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, scale=scale)


def _on_cpu_backward(d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, s: Tensor, causal: bool, scale: float | None) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(d, q, k, v, o, s, 0.0, causal, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, scale=scale)[:2]


def _flash_backward(d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, s: Tensor, causal: bool, scale: float | None) -> Any:
    seed = torch.empty(2, dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    return _aten._scaled_dot_product_flash_attention_backward.default(
        d, q, k, v, o, s, None, None, q.shape[-2], k.shape[-2], 0.0, causal, seed, seed, scale=scale)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]


def _cudnn_backward(d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, s: Tensor, causal: bool, scale: float | None) -> Any:
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    return _aten._scaled_dot_product_cudnn_attention_backward.default(
        d, q, k, v, o, s.reshape(*s.shape, *_behind(q.device)), seed, seed, None, None, None, q.shape[-2], k.shape[-2], 0.0, causal,
        scale=scale)


@functools.cache
def _behind(device: torch.device) -> tuple[int, ...]:
    """What cuDNN's kernel has behind (B, H, n) in the shape of s: nothing or 1, as the version of torch may be."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return tuple(_cudnn(x, x, x, True, None)[1].shape[3:])


def _kernel(q: Tensor) -> Kernel:
    """cuDNN's since Hopper, for which it is written, FlashAttention-2 before, ATen's on CPUs."""
    if q.device.type == "cpu":
        return Kernel(_on_cpu, _on_cpu_backward)
    given = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, True, False)
    newer = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return Kernel(_cudnn, _cudnn_backward) if newer and torch.backends.cuda.can_use_cudnn_attention(given) else Kernel(
        _flash, _flash_backward)


def able(q: Any, k: Any, v: Any) -> bool:
    """Whether there is a fused kernel for (B, H, n, K) with V = K: on CPUs, and in 16 bits with K ≤ 256, a multiple of 8, on
    GPUs since Ampere."""
    if q.ndim != 4 or q.shape[1] != k.shape[1] or q.shape[-1] != v.shape[-1]:
        return False
    return q.device.type == "cpu" or (
        q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0))


def _parts(q: Tensor, k: Tensor, v: Tensor, group: str) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Keys and values that rows see, and whether causally: those of the rank itself, and of all before it."""
    n, first = q.shape[-2], q.shape[-2] * place(group)
    yield k[..., first : first + n, :], v[..., first : first + n, :], True
    if first:
        yield k[..., :first, :], v[..., :first, :], False


@torch.library.custom_op("lsmc::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str) -> tuple[Tensor, Tensor]:
    """o (B, H, n, K) and, for the adjoint, s (B, H, n)."""
    q = q.contiguous()
    found = [_kernel(q).forward(q, *part, scale) for part in _parts(q, k, v, group)]
    o, s = found[0][0], found[0][1].reshape(q.shape[:-1])
    for more, sums in ((o, s.reshape(q.shape[:-1])) for o, s in found[1:]):
        total = torch.logaddexp(s, sums)
        o = torch.addcmul(o * (s - total).exp()[..., None], more, (sums - total).exp()[..., None]).to(q.dtype)
        s = total
    return o.contiguous(), s.contiguous()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("lsmc::attend_backward", mutates_args=())
def _attend_backward(d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, s: Tensor, scale: float | None,
                     group: str) -> tuple[Tensor, Tensor, Tensor]:
    q, d = q.contiguous(), d.contiguous()
    found = [_kernel(q).backward(d, q, *part[:2], o, s, part[2], scale) for part in _parts(q, k, v, group)]
    many, seen = k.shape[-2], q.shape[-2] * (place(group) + 1)
    dq = functools.reduce(torch.add, (part[0] for part in found)).contiguous()
    dk, dv = (F.pad(torch.cat([part[i] for part in reversed(found)], -2), (0, 0, 0, many - seen)).contiguous() for i in (1, 2))
    return dq, dk, dv


@_attend_backward.register_fake
def _(d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, s: Tensor, scale: float | None,
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
