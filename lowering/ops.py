"""The torch operators `lsmc::fwd` and `lsmc::bwd`: one functional pair that carries every method.

`spec` is the key of a registered `Plan`; it holds a hash of all generated source, so that caches keyed on the graph
never serve code of an older derivation. With `KEEP` behind it the forward keeps what its backward takes. On CPUs the body
is plain ATen, which Inductor sees through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.library import triton_op

from lsmc.errors import LsmDerivativeError
from lsmc.lowering.plan import Plan, Repeat
from lsmc.lowering.torch_private import unseen, unwrapped

_PLANS: dict[str, Plan] = {}

KEEP = "+kept"
"""What a `spec` ends with where the forward gives, behind the final memories, what its backward then takes instead of working
it out again."""


def register(plan: Plan, keep: bool = False) -> str:
    """Make a plan known to the operators; returns its `spec`."""
    return _PLANS.setdefault(plan.key, plan).key + KEEP * keep


def plan_of(spec: str) -> Plan:
    """The plan behind a `spec` found in a graph."""
    return _PLANS[spec.removesuffix(KEEP)]


def in_graph(module: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """Every LSM operator in a graph and in the graphs nested in it (checkpointed regions), with its graph."""
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            for node in inner.graph.nodes:
                if node.target in (torch.ops.lsmc.fwd, torch.ops.lsmc.fwd.default):
                    yield inner, node


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Memories are float32, and float64 where the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Extents:
    """The sizes of a call, and an input whose type and device are those of the output."""

    batch: int
    tokens: int
    heads: int
    dims: Mapping[str, int]
    like: Tensor

    @property
    def output(self) -> tuple[int, int, int, int]:
        return self.batch, self.tokens, self.heads, self.dims["V"]


def extents(plan: Plan, inputs: Sequence[Tensor], start: Sequence[Tensor] = ()) -> Extents:
    """What the inputs (and memories) say about the sizes: q and k have H heads, all others HV, whichever are there."""
    dims: dict[str, int] = {"1": 1}
    heads = token = None
    like = inputs[0]
    for place, name, per_token, last in plan.reads:
        x = inputs[place]
        if last == "E":
            dims |= {"K": x.shape[-2], "V": x.shape[-1]}
        elif last != "1":
            dims[last] = x.shape[-1]
        if name not in ("q", "k") or heads is None:
            heads = x.shape[2 if per_token else 0]
        if per_token and token is None:
            token = x
        if name in ("q", "k", "v"):
            like = x
    assert token is not None and heads is not None
    if start:
        heads = start[0].shape[1]
        dims |= zip(plan.memories[0], start[0].shape[2:], strict=True)
    if "K" in dims:
        dims["F"] = dims["K"] ** 2
    return Extents(token.shape[0], token.shape[1], heads, dims, like)


def _start(plan: Plan, inputs: Sequence[Tensor], start: Sequence[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    """The memories before the first token: those given, or zeros."""
    if start:
        return list(start)
    size = extents(plan, inputs)
    n = size.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = state_dtype(size.like.dtype)
    return [size.like.new_zeros((n, size.heads, size.dims[r], size.dims[c]), dtype=dtype) for r, c in plan.memories]


def forward(inputs: Sequence[Tensor], start: Sequence[Tensor], cu_seqlens: Tensor | None, spec: str) -> list[Tensor]:
    """Output (B, T, HV, V) and the final memories (B, HV, K, V or 1) of the method `spec`, and what is kept."""
    plan = plan_of(spec)
    direction = plan.training if spec.endswith(KEEP) else plan.forward
    size = extents(plan, inputs, start)
    if size.batch * size.tokens == 0 or plan.forward.executable.needs_memories:
        start = _start(plan, inputs, start, cu_seqlens)
    if size.batch * size.tokens == 0:  # no token: nothing to run
        return [size.like.new_empty(size.output), *(_own(s) for s in start)]
    with _as_given(size.like.device):
        outputs, ends = direction.executable.launch(
            dict(zip(plan.inputs, inputs, strict=True)), dict(zip(plan.carries, start)), plan.chunk, cu_seqlens)
    own = _contiguous if plan.forward.executable.fresh else _own
    kept = (outputs[n] for n in direction.executable.keeps)
    return [own(outputs["o"].to(size.like.dtype)), *(own(ends[c]) for c in plan.carries), *kept]


def backward(inputs: Sequence[Tensor], start: Sequence[Tensor], cu_seqlens: Tensor | None, d_o: Tensor,
             d_end: Sequence[Tensor], kept: Sequence[Tensor], wanted: Sequence[bool], spec: str) -> list[Tensor]:
    """Gradients of the `inputs` that are `wanted`, then of the initial memories; where nothing was `kept` it is worked out again. A
    cotangent in `d_end` that has no elements is zero, where the backend needs no memories."""
    plan = plan_of(spec)
    asked = {name: x for name, x, is_wanted in zip(plan.inputs, inputs, wanted, strict=True) if is_wanted}
    if d_o.shape[0] * d_o.shape[1] == 0:
        zeros = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in asked.values())
        return [*zeros, *map(_own, d_end)]
    direction = plan.gradients(tuple(wanted))
    keeps = plan.training.executable.keeps
    if len(kept) < len(keeps):
        kept = forward(inputs, start, cu_seqlens, register(plan, keep=True))[1 + len(plan.carries):]
    first = _start(plan, inputs, start, cu_seqlens) if direction.executable.needs_memories and not keeps else start
    memories = dict(zip(plan.carries, first)) | {f"d_{c}": d for c, d in zip(plan.carries, d_end, strict=True)}
    taken = {"d_o": d_o, **dict(zip(plan.inputs, inputs, strict=True)), **dict(zip(keeps, kept, strict=True))}
    program = direction.program
    used = {*(c.name for c in program.carries), program.counter}
    memories = {n: x for n, x in memories.items() if n in used and x.numel()}
    with _as_given(d_o.device):
        outputs, ends = direction.executable.launch(taken, memories, plan.chunk, cu_seqlens)
    grads, own = [], _contiguous if direction.executable.fresh else _own
    for name, x in asked.items():
        d = outputs[f"d_{name}"]
        if d.ndim > 2 and d.shape[2] != x.shape[2]:  # value heads that share a query/key head
            d = d.unflatten(2, (x.shape[2], -1)).sum(3)
        grads.append(own(d.reshape(x.shape).to(x.dtype)))
    return [*grads, *(own(ends[f"d_{c}"]) for c in plan.carries)]


fwd = triton_op("lsmc::fwd", mutates_args={})(forward)
bwd = triton_op("lsmc::bwd", mutates_args={})(backward)


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
    ends, kept = _apart(output, ctx.spec)
    ctx.counts = len(tensors), len(start), len(kept)
    ctx.ends = [(e.shape, e.dtype) for e in ends]
    ctx.save_for_backward(*tensors, *start, *kept, *([] if cu_seqlens is None else [cu_seqlens]))
    ctx.packed = cu_seqlens is not None


def _apart(output: Sequence[Any], spec: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """Of what `lsmc::fwd` gives, or of its cotangents: final memories, and what is kept."""
    ends = 1 + len(plan_of(spec).carries)
    return output[1:ends], output[ends:]


def _backward(ctx: Any, grads: Sequence[Tensor | None], wanted: Sequence[bool] | None = None) -> tuple[Any, ...]:
    """`wanted` says which inputs want a gradient; those of no use are not worked out."""
    wanted = list(ctx.needs_input_grad[0]) if wanted is None else wanted
    saved = list(ctx.saved_tensors)
    n, m, many = ctx.counts
    tensors, start, kept = saved[:n], saved[n : n + m], saved[n + m : n + m + many]
    cu_seqlens = saved[-1] if ctx.packed else None
    d_o, d_end = grads[0], _apart(grads, ctx.spec)[0]
    if d_o is None:
        size = extents(plan_of(ctx.spec), tensors, start)
        d_o = size.like.new_zeros(size.output)
    zeros = plan_of(ctx.spec).backward.executable.needs_memories or d_o.shape[0] * d_o.shape[1] == 0
    d_end = [tensors[0].new_zeros(s if zeros else (0,), dtype=t) if d is None else d
             for d, (s, t) in zip(d_end, ctx.ends, strict=True)]
    with unwrapped() if (direct := not torch.is_grad_enabled() and unseen([d_o, *d_end, *saved])) else nullcontext():
        out = iter((backward if direct else bwd)(tensors, start, cu_seqlens, d_o, d_end, kept, wanted, ctx.spec))
    gradients = [next(out) if is_wanted else None for is_wanted in wanted]
    return gradients, (list(out) if m else []), None, None


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise LsmDerivativeError("LSM operators have first derivatives only; this asks for the derivative of a gradient",
                             help="leave out create_graph=True, or differentiate lsmc.reference(...)")


class _Eager(torch.autograd.Function):
    """`lsmc::fwd` with its derivative, tensor by tensor: lists of tensors would be flattened and restored in every call.

    Where torch's transforms may look: `_Unseen` is the shorter way.
    """

    @staticmethod
    def forward(spec: str, counted: int, cu_seqlens: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.lsmc.fwd(list(tensors[:counted]), list(tensors[counted:]), cu_seqlens, spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, counted, cu_seqlens, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*_apart(output, spec)[1])
        _save(ctx, (tensors[:counted], tensors[counted:], cu_seqlens, spec), list(output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs, start, _, _ = _backward(ctx, grads, ctx.needs_input_grad[3 : 3 + ctx.counts[0]])
        return None, None, None, *inputs, *start


class _Unseen(torch.autograd.Function):
    """What `lsmc::fwd` does, and its derivative, where nobody sees the operator."""

    @staticmethod
    def forward(ctx: Any, spec: str, counted: int, cu_seqlens: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = tuple(forward(list(tensors[:counted]), list(tensors[counted:]), cu_seqlens, spec))
        _Eager.setup_context(ctx, (spec, counted, cu_seqlens, *tensors), output)
        return output

    backward = _Eager.backward


def run(inputs: Sequence[Tensor], start: Sequence[Tensor], cu_seqlens: Tensor | None, spec: str,
        keep: bool = True) -> Sequence[Tensor]:
    """`lsmc::fwd`, differentiable: the operator itself where somebody may look at it, else by the shorter way. What it keeps for
    the backward, if one can come, follows the final memories."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *start))
    if keep and learns:
        spec += KEEP
    if unseen((*inputs, *start)):
        with unwrapped():
            if not learns:
                return forward(inputs, start, cu_seqlens, spec)
            direct: tuple[Tensor, ...] = _Unseen.apply(spec, len(inputs), cu_seqlens, *inputs, *start)
            return direct
    if torch.compiler.is_compiling() or not learns:
        out: list[Tensor] = torch.ops.lsmc.fwd(inputs, start, cu_seqlens, spec)
        return out
    eager: tuple[Tensor, ...] = _Eager.apply(spec, len(inputs), cu_seqlens, *inputs, *start)
    return eager


def recorded(inputs: Sequence[Tensor], start: Sequence[Tensor], spec: str) -> Repeat | None:
    """What `run`, without derivatives, has recorded of tensors like these: by names of inputs and memories, to outputs and ends."""
    plan = plan_of(spec)
    return plan.forward.executable.recorded(dict(zip(plan.inputs, inputs, strict=True)), dict(zip(plan.carries, start)), plan.chunk)


torch.library.register_autograd("lsmc::fwd", _backward, setup_context=_save)
torch.library.register_autograd("lsmc::bwd", _no_second)
