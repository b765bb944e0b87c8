"""``lsmc::moe_experts``: the SwiGLU experts of a mixture, one functional operator with an explicit gradient.

For tokens ``x_n``, their chosen experts ``e_{nj}`` and routing weights ``p_{nj}`` (j < k):

    y_n = Σ_j p_{nj} · (silu(x_n A_e^T) ⊙ (x_n B_e^T)) C_e^T,  e = e_{nj}, [A; B] = w_in, C = w_out

Assignments are sorted by expert (a stable sort, so that the result is reproducible) and multiplied group by
group. Nothing is dropped and no expert has a capacity. An index outside ``[0, E)`` means "no expert": it
contributes zero and receives no gradient; such rows sort behind the last group.

Shapes: ``x (N, D)``; ``weights, experts (N, k)``; ``w_in (E, 2F, D)``; ``w_out (E, D, F)``; ``y (N, D)``.

Three traps of ``grouped_mm`` are handled here and nowhere else: rows behind the last offset are uninitialised
memory (they are masked), gradients may arrive expanded with stride 0 (they are made contiguous), and it
serves only some types and devices (see :func:`_path`). There is no host synchronisation on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# grouped_mm wants rows of 16 bytes; smaller or odd widths take the other path.
_ALIGN_BYTES = 16


def _counts(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """``(order, ends)``: the stable order by expert, the end row of each expert's group."""
    flat = experts.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = torch.argsort(flat, stable=True)
    ids = torch.arange(1, num_experts + 1, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(flat[order], ids)
    return order, ends.to(torch.int32)


def _path(rows: Tensor, *widths: int) -> str:
    """How to multiply group by group: ``grouped`` (grouped_mm: bf16 on CUDA), ``sliced`` (one matmul a group;
    the ends are read, which is free on the CPU alone), or ``masked`` (every expert on all rows: costs E times
    as much, for the types on CUDA that have no grouped kernel)."""
    if rows.device.type == "cpu":
        return "sliced"
    aligned = all(width * rows.element_size() % _ALIGN_BYTES == 0 for width in widths)
    if rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm"):
        return "grouped" if torch.cuda.get_device_capability(rows.device) >= (8, 0) else "masked"
    return "masked"


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The non-empty groups of a CPU tensor of ends."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _behind(ends: Tensor, rows: int) -> Tensor:
    """``(rows, 1)`` bool: the row lies behind the last group."""
    return (torch.arange(rows, device=ends.device) >= ends[-1]).unsqueeze(1)


def _member(ends: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert with the ``(rows, 1)`` mask of its group, without reading the ends on the host."""
    index = torch.arange(rows, device=ends.device).unsqueeze(1)
    for expert in range(ends.numel()):
        start = ends[expert - 1] if expert else torch.zeros_like(ends[0])
        yield expert, (index >= start) & (index < ends[expert])


def _times(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``out[i] = rows[i] @ weight[group of i]``; rows behind the last group are 0. ``weight (E, a, b)``."""
    path = _path(rows, weight.shape[1], weight.shape[2])
    if path == "grouped":
        out = F.grouped_mm(rows, weight, offs=ends)
        return out.masked_fill(_behind(ends, rows.shape[0]), 0)
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    if path == "sliced":
        for expert, group in _groups(ends):
            torch.mm(rows[group], weight[expert], out=out[group])
        return out
    for expert, member in _member(ends, rows.shape[0]):
        out = torch.where(member, rows @ weight[expert], out)
    return out


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``out[e] = left[group e]^T @ right[group e]``, ``(E, a, b)``; an empty group gives zero."""
    shape = (ends.numel(), left.shape[1], right.shape[1])
    path = _path(left, *shape[1:])
    if path == "grouped":
        out = F.grouped_mm(left.t(), right, offs=ends)
        starts = F.pad(ends[:-1], (1, 0))
        return out.masked_fill((starts == ends).view(-1, 1, 1), 0)
    out = left.new_zeros(shape)
    if path == "sliced":
        for expert, group in _groups(ends):
            torch.mm(left[group].t(), right[group], out=out[expert])
        return out
    for expert, member in _member(ends, left.shape[0]):
        out[expert] = torch.where(member, left, 0).t() @ right
    return out


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


@torch.library.custom_op("lsmc::moe_experts", mutates_args=())
def moe_experts_op(
    x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, hidden, order, ends)``; the last three are what the gradient needs."""
    tokens, k = experts.shape
    order, ends = _counts(experts, w_in.shape[0])
    hidden = _times(x[order // k], w_in.transpose(1, 2), ends)
    gate, up = hidden.chunk(2, dim=1)
    rows = _times(F.silu(gate) * up, w_out.transpose(1, 2), ends)
    chosen = rows[_inverse(order)].view(tokens, k, x.shape[1])
    y = torch.bmm(weights.to(x.dtype).unsqueeze(1), chosen).squeeze(1)
    return y, hidden, order, ends


@moe_experts_op.register_fake
def _(
    x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = experts.shape[0] * experts.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(rows, w_in.shape[1]),
        experts.new_empty(rows, dtype=torch.int64),
        experts.new_empty(w_in.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("lsmc::moe_experts_backward", mutates_args=())
def moe_experts_backward_op(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    hidden: Tensor,
    order: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dweights, dw_in, dw_out)``. No expert's output is needed: ``dp = ⟨dy C_e, silu(a) ⊙ b⟩``."""
    tokens, k = weights.shape
    token = order // k
    inverse = _inverse(order)
    dy_rows = dy.contiguous()[token]
    p = weights.reshape(-1)[order].to(x.dtype).unsqueeze(1)

    gate, up = hidden.chunk(2, dim=1)
    sigma = torch.sigmoid(gate)
    silu = gate * sigma
    act = silu * up
    dact = _times(dy_rows, w_out, ends)
    dweights = (dact * act).sum(1, dtype=torch.promote_types(weights.dtype, torch.float32))
    dweights = dweights[inverse].view(tokens, k).to(weights.dtype)
    dact = dact * p
    dhidden = torch.cat([dact * up * (sigma + silu * (1 - sigma)), dact * silu], dim=1)

    dw_out = _outer((dy_rows * p).contiguous(), act, ends)
    dw_in = _outer(dhidden, x[token], ends)
    dx = _times(dhidden, w_in, ends)[inverse].view(tokens, k, x.shape[1]).sum(1)
    return dx, dweights, dw_in, dw_out


@moe_experts_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    hidden: Tensor,
    order: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        w_in.new_empty(w_in.shape),
        w_out.new_empty(w_out.shape),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, _, w_in, w_out = inputs
    _, hidden, order, ends = output
    ctx.save_for_backward(x, weights, w_in, w_out, hidden, order, ends)
    ctx.mark_non_differentiable(hidden, order, ends)


def _backward(ctx: Any, dy: Tensor, *_unused: Any) -> Any:
    x, weights, w_in, w_out, hidden, order, ends = ctx.saved_tensors
    dx, dweights, dw_in, dw_out = moe_experts_backward_op(
        dy.contiguous(), x, weights, w_in, w_out, hidden, order, ends
    )
    return dx, dweights, None, dw_in, dw_out


moe_experts_op.register_autograd(_backward, setup_context=_setup_context)


def moe_experts(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Mix the chosen SwiGLU experts of each token.

    Args:
        x: ``(N, D)`` tokens.
        weights: ``(N, k)`` routing weights, any floating type; their gradient is exact.
        experts: ``(N, k)`` int64 expert of each assignment; outside ``[0, E)`` means none.
        w_in: ``(E, 2F, D)`` gate rows then up rows.
        w_out: ``(E, D, F)``.

    Under autocast the tokens and the experts' matrices take the autocast type; the routing weights keep
    theirs.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    return moe_experts_op(x.contiguous(), weights, experts, w_in, w_out)[0]
