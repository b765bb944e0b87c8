"""The torch operators `lsmc::fwd` and `lsmc::bwd`: one functional pair that carries every method.

`spec` is the key of a registered `Plan`; it holds a hash of all generated source, so that caches keyed on the graph
never serve code of an older derivation. On CPUs the body is plain ATen, which Inductor sees through.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from lsmc.errors import LsmDerivativeError
from lsmc.lowering.plan import Plan

_PLANS: dict[str, Plan] = {}


def register(plan: Plan) -> str:
    """Make a plan known to the operators; returns its `spec`."""
    return _PLANS.setdefault(plan.key, plan).key


def plan_of(spec: str) -> Plan:
    """The plan behind a `spec` found in a graph."""
    return _PLANS[spec]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Memories are float32, and float64 where the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _start(plan: Plan, inputs: Sequence[Tensor], start: Sequence[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    """The memories before the first token: those given, or zeros."""
    if start:
        return list(start)
    size, v = extents(plan, inputs)
    n = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = []
    for c in plan.forward.program.carries:
        dims = plan.forward.program.index[c.inp].dims
        out.append(v.new_zeros((n, v.shape[2], size[dims[0]], size[dims[1]]), dtype=state_dtype(v.dtype)))
    return out


def extents(plan: Plan, inputs: Sequence[Tensor]) -> tuple[dict[str, int], Tensor]:
    """The sizes of K and V, and an input with all value heads and the value dimension."""
    size, v = {"1": 1}, inputs[0]
    for op in plan.forward.program.inputs("token", "head"):
        x = inputs[plan.inputs.index(op.attr("name"))]
        if op.dims[1] != "1":
            size[op.dims[1]] = x.shape[-1]
        if op.dims == ("T", "V"):
            v = x
    return size, v


@triton_op("lsmc::fwd", mutates_args={})
def fwd(inputs: Sequence[Tensor], start: Sequence[Tensor], cu_seqlens: Tensor | None, spec: str) -> list[Tensor]:
    """Output (B, T, HV, V) and the final memories (B, HV, K, V or 1) of the method `spec`."""
    plan = _PLANS[spec]
    start = _start(plan, inputs, start, cu_seqlens)
    _, v = extents(plan, inputs)
    if v.shape[0] * v.shape[1] == 0:  # no token: nothing to run
        return [_own(v), *(_own(s) for s in start)]
    with _as_given(v.device):
        outputs, ends = plan.forward.executable.launch(
            dict(zip(plan.inputs, inputs, strict=True)), dict(zip(plan.carries, start, strict=True)), plan.chunk, cu_seqlens)
    own = _contiguous if plan.forward.executable.fresh else _own
    return [own(outputs["o"].to(v.dtype)), *(own(ends[c]) for c in plan.carries)]


@triton_op("lsmc::bwd", mutates_args={})
def bwd(inputs: Sequence[Tensor], start: Sequence[Tensor], cu_seqlens: Tensor | None, d_o: Tensor,
        d_end: Sequence[Tensor], spec: str) -> list[Tensor]:
    """Gradients of `inputs`, then of the initial memories."""
    plan = _PLANS[spec]
    first = _start(plan, inputs, start, cu_seqlens)
    if d_o.shape[0] * d_o.shape[1] == 0:
        return [*(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs), *map(_own, d_end)]
    memories = dict(zip(plan.carries, first, strict=True))
    memories |= {f"d_{c}": d for c, d in zip(plan.carries, d_end, strict=True)}
    with _as_given(d_o.device):
        outputs, ends = plan.backward.executable.launch(
            {**dict(zip(plan.inputs, inputs, strict=True)), "d_o": d_o}, memories, plan.chunk, cu_seqlens)
    grads, own = [], _contiguous if plan.backward.executable.fresh else _own
    for name, x in zip(plan.inputs, inputs, strict=True):
        d = outputs[f"d_{name}"]
        if d.ndim > 2 and d.shape[2] != x.shape[2]:  # value heads that share a query/key head
            d = d.unflatten(2, (x.shape[2], -1)).sum(3)
        grads.append(own(d.reshape(x.shape).to(x.dtype)))
    return [*grads, *(own(ends[f"d_{c}"]) for c in plan.carries)]


def _as_given(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside a program: what is float32 there (memories, gates, sums) was meant to be."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _own(x: Tensor) -> Tensor:
    """A contiguous result: outputs never alias inputs and fakes report true strides."""
    return x.clone(memory_format=torch.contiguous_format)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, start, cu_seqlens, ctx.spec = inputs
    ctx.counts = len(tensors), len(start)
    ctx.ends = [(e.shape, e.dtype) for e in output[1:]]
    ctx.save_for_backward(*tensors, *start, *([] if cu_seqlens is None else [cu_seqlens]))
    ctx.packed = cu_seqlens is not None


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    n, m = ctx.counts
    tensors, start = saved[:n], saved[n : n + m]
    cu_seqlens = saved[-1] if ctx.packed else None
    d_o, *d_end = grads
    if d_o is None:
        _, v = extents(_PLANS[ctx.spec], tensors)
        d_o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    d_end = [tensors[0].new_zeros(s, dtype=t) if d is None else d for d, (s, t) in zip(d_end, ctx.ends, strict=True)]
    out = bwd(tensors, start, cu_seqlens, d_o, d_end, ctx.spec)
    return out[:n], (out[n:] if m else []), None, None


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise LsmDerivativeError("LSM operators have first derivatives only; this asks for the derivative of a gradient",
                             help="leave out create_graph=True, or differentiate lsmc.reference(...)")


torch.library.register_autograd("lsmc::fwd", _backward, setup_context=_save)
torch.library.register_autograd("lsmc::bwd", _no_second)
