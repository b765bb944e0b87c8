"""What users call: the operator of a declaration, one decoding step, `compile`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lsmc import inputs as checks
from lsmc.errors import (
    LsmError,
    LsmMissingInputError,
    LsmOptionError,
    LsmShapeError,
    LsmUnexpectedInputError,
    here,
)
from lsmc.expr import Field
from lsmc.lowering import ops
from lsmc.lowering.inductor import PASSES, compile_graph
from lsmc.lowering.plan import Repeat, backend
from lsmc.lowering.torch_private import constant, unseen
from lsmc.lsm import LSM, attach, declared
from lsmc.pipeline import CHUNK, TYPICAL, Options, compile_plan
from lsmc.runtime.insert import passes
from lsmc.runtime.mesh import axes
from lsmc.runtime.plans import PLANS
from lsmc.schedules import Shape

State = Tensor | tuple[Tensor, ...]


@constant
def _signature(key: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The names of a declaration's inputs, those that are matrices (cast by autocast), the dimensions of its states."""
    c = declared(key).canonical
    casts = tuple(f.name for f in c.inputs if f.name in ("q", "k", "v"))
    return tuple(f.name for f in c.inputs), casts, tuple(f.dims for f in c.states)


@constant
def _shared(key: str) -> tuple[str, ...]:
    """The inputs that are the same for all heads."""
    return tuple(f.name for f in declared(key).canonical.inputs if f.per == "layer")


@constant
def _per_token(key: str) -> tuple[str, ...]:
    """The inputs that every token has its own of."""
    return tuple(f.name for f in declared(key).canonical.inputs if f.per == "token")


@constant
def _shapes(key: str) -> tuple[tuple[str, ...], ...]:
    """The named dimensions of each input: ("B", "T", "HV", "V")."""
    return tuple(checks.parts(f, step=False) for f in declared(key).canonical.inputs)


@constant
def _defaults(key: str, name: str, heads: int) -> tuple[float, ...]:
    return tuple(float(x) for x in declared(key).canonical.defaults[name](heads))


@constant
def _optional(key: str) -> tuple[str, ...]:
    return tuple(declared(key).canonical.defaults)


@functools.cache
def _spec_of(key: str, device: str, options: tuple[Any, ...], sizes: tuple[int, ...] | None) -> str:
    scale, chunk, schedule, fresh = options
    made = Options(scale=scale, chunk=chunk, schedule=schedule, target=backend(device), fresh=fresh)
    canonical = declared(key).canonical  # of an operator whose every head has inputs of its own: see `every_head`
    canonical = canonical.substitute({f: Field(f.name, f.dims, "head") for f in canonical.inputs if f.per == "layer"})
    if sizes is None:
        return ops.register(compile_plan(canonical, made))
    sequences, tokens, key_size, value_size = sizes
    return ops.register(compile_plan(canonical, made, Shape(sequences, tokens, key_size, value_size, chunk)))


@constant
def _chunks(key: str, device: str) -> tuple[int, int]:
    """The shortest and the usual chunk. On ATen the inverse that a read needs grows faster than what longer chunks save."""
    if backend(device) == "aten":
        return 1, CHUNK // 2 if declared(key).canonical.reads else CHUNK
    return 16, CHUNK


@constant
def _spec(key: str, device: str, scale: float, chunk: int, schedule: str | None, fresh: bool,
          sizes: tuple[int, ...] | None) -> str:
    fresh &= (declared(key).canonical.block or 1) > 1  # all else is the same for calls with and without memories
    return _spec_of(key, device, (scale, chunk, schedule, fresh), sizes)


def _refuse(kind: type[LsmError], rule: str) -> None:
    """Raise a mistake that was met while tracing: outside of the graph, or as the reason why there is none."""
    torch._dynamo.graph_break(msg=rule)
    raise kind(rule)


def _class(n: int) -> int:
    """Sizes that share a schedule: powers of two, rounded up."""
    return 1 << max(0, n - 1).bit_length()


def call(declaration: LSM, *, initial_state: State | None = None, return_final_state: bool = False,
         cu_seqlens: Tensor | None = None, scale: float = 1.0, chunk: int | None = None, schedule: str | None = None,
         recompute: bool = False, **inputs: Any) -> Any:
    """o, or (o, state) with `return_final_state`: the method on whole sequences, differentiable in every
    input; gradients are worked out for those that require one.

    inputs              by name: q, k (B, T, H, K), v (B, T, HV, V), per token (B, T, HV, …), per head (HV, …), per layer (…);
                        any strides, T ≥ 0, HV a multiple of H. Autocast casts q, k and v.
    initial_state       M (B, HV, K, V), float32 (float64 with float64 inputs), or the tuple of `Canonical.states`; zeros if None
    cu_seqlens          (N+1,) int: packed sequences with B = 1, empty ones allowed; states are then (N, HV, K, V)
    scale               multiplies q
    chunk, schedule     fix what the compiler otherwise chooses: tokens per chunk (a power of two; no more than a block
                        has, where reads are of its start), a schedule's name
    recompute           keep nothing but the inputs for the backward, which then works the rest out again: less memory between
                        the two, more time

    Raises LsmMissingInputError, LsmUnexpectedInputError, LsmShapeError, LsmDtypeError, LsmSequenceError, LsmOptionError
    before anything runs, and LsmNotAffineError or LsmNoChunkFormError for declarations without a chunk form.
    """
    likeness = None
    if cu_seqlens is None and not torch.compiler.is_compiling():
        likeness = _likeness(declaration.key, scale, inputs, initial_state, chunk, schedule)
        if likeness in _REPEATED and (found := _REPEATED[likeness](inputs, initial_state)) is not None:
            return found if return_final_state else found[0]
    tensors, start, spec = _prepared(declaration, inputs, initial_state, cu_seqlens, scale, chunk, schedule)
    states = _signature(declaration.key)[2]
    o, *ends = ops.run(tensors, start, cu_seqlens, spec, not recompute)[: 1 + len(states)]
    _remember(likeness, declaration, inputs, tensors, start, spec, o.dtype)
    if not return_final_state:
        return o
    return o, _state(ends, states)


def _finite(scale: Any) -> bool:
    return isinstance(scale, Real) and math.isfinite(scale)


def _prepared(declaration: LSM, inputs: Mapping[str, Any], initial_state: State | None, cu_seqlens: Tensor | None, scale: float,
              chunk: int | None, schedule: str | None) -> tuple[list[Tensor], list[Tensor], str]:
    """The inputs in order and the memories as the operator takes them, and the plan's key, after all checks."""
    names, casts, states = _signature(declaration.key)
    sizes = None
    if torch.compiler.is_compiling():
        tensors = _bind_traced(declaration, names, inputs, initial_state)
        if tensors[_per_token(declaration.key)[0]].shape[1] == 1:  # symbols are sizes of two and more
            sizes = (TYPICAL.sequences, 1, TYPICAL.key, TYPICAL.value)
    else:
        tensors, n = checks.bind(declaration.canonical, inputs, initial_state=initial_state, cu_seqlens=cu_seqlens)
        if not _finite(scale):
            raise LsmOptionError(f"scale={scale!r} is no finite number", where=here(),
                                 help="pass a float; multiply q by a tensor instead")  # fmt: skip
        sizes = (_class(n.B * n.HV), _class(n.T), _class(n.K), _class(n.V))
    device = tensors[names[0]].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        for name in casts:
            if tensors[name].dtype != torch.float64:
                tensors[name] = tensors[name].to(dtype)
    if chunk is None:
        least, usual = _chunks(declaration.key, device)
        chunk = usual if sizes is None else max(least, min(usual, sizes[1]))
    spec = _spec(declaration.key, device, float(scale), chunk, schedule, initial_state is None, sizes)
    start: list[Tensor] = []
    if initial_state is not None:
        given = initial_state if isinstance(initial_state, tuple | list) else (initial_state,)
        dtype = ops.state_dtype(tensors[casts[-1] if casts else names[0]].dtype)
        start = [_as_tile(s.to(dtype), dims) for s, dims in zip(given, states)]
    return [tensors[n] for n in names], start, spec


def _state(ends: Sequence[Tensor], dims: Sequence[tuple[str, ...]]) -> State:
    """Final memories as users get them."""
    made = tuple(_of_tile(e, d) for e, d in zip(ends, dims))
    return made if len(made) > 1 else made[0]


def _as_tile(x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """A state (N, HV, *dims) as matrices: a column where it has no dim V, a row where it has only that."""
    x = x if "V" in dims else x[..., None]
    return x if set(dims) - {"V"} else x.unsqueeze(-2)


def _of_tile(x: Tensor, dims: tuple[str, ...]) -> Tensor:
    x = x if set(dims) - {"V"} else x.squeeze(-2)
    return x if "V" in dims else x.squeeze(-1)


def _bind_traced(declaration: LSM, names: tuple[str, ...], inputs: Mapping[str, Any], state: State | None) -> dict[str, Tensor]:
    """The inputs in order, defaults filled in.

    Comparing the sizes tells the tracer that they are one symbol: inputs that come with a symbolic T each would otherwise
    be guarded, and traced again, for every way in which their lengths could differ.
    """
    optional = _optional(declaration.key)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}

    def same(name: str, x: Tensor, parts: tuple[str, ...]) -> None:
        if x.dim() != len(parts):
            _refuse(LsmShapeError, f"{name!r} must have the dimensions ({', '.join(parts)})")
        for part, size in zip(parts, x.shape):
            if sizes.setdefault(part, size) != size:
                _refuse(LsmShapeError, f"{name!r} has another {part} than the inputs before it")

    for name, parts in zip(names, _shapes(declaration.key)):
        x = inputs.get(name)
        if x is not None:
            same(name, x, parts)
            tensors[name] = x
        elif name not in optional:
            _refuse(LsmMissingInputError, f"{declaration.name} needs the input {name!r}")
    for name in inputs:
        if name not in names:
            _refuse(LsmUnexpectedInputError, f"{declaration.name} has no input {name!r}; it takes {', '.join(names)}")
    heads = sizes["HV" if "HV" in sizes else "H"]
    if state is not None:
        sizes["HV"] = heads
        for x, dims in zip(state if isinstance(state, tuple | list) else (state,), _signature(declaration.key)[2]):
            same("initial_state", x, ("N", "HV", *dims))
    like = tensors["v"] if "v" in tensors else next(iter(tensors.values()))
    for name in names:
        if name not in tensors:
            dtype = ops.state_dtype(like.dtype)
            tensors[name] = torch.tensor(_defaults(declaration.key, name, heads), dtype=dtype, device=like.device)
    shared = _shared(declaration.key)
    return {name: checks.every_head(tensors[name], heads) if name in shared else tensors[name] for name in names}


def step(declaration: LSM, *, state: State | None = None, scale: float = 1.0, **inputs: Any) -> tuple[Tensor, State]:
    """One token of every sequence, (o (B, HV, V), new state): on GPUs one launch, which reads the memory once and writes it once.

    inputs are those of `call` without the T dimension: q, k (B, H, K), v (B, HV, V), gates (B, HV, …); `state` is what
    the last step or `return_final_state` gave, zeros if None. Memory use does not grow with the tokens read.
    """
    likeness = None
    if not torch.compiler.is_compiling():
        likeness = _likeness(declaration.key, scale, inputs, state, "step")
        if likeness in _REPEATED and (found := _REPEATED[likeness](inputs, state)) is not None:
            return found[0][:, 0], found[1]
        checks.bind(declaration.canonical, inputs, initial_state=state, step=True)
    tokens = _per_token(declaration.key)
    wide = {n: x[:, None] if n in tokens and x is not None else x for n, x in inputs.items()}
    tensors, start, spec = _prepared(declaration, wide, state, None, scale, None, None)
    dims = _signature(declaration.key)[2]
    o, *ends = ops.run(tensors, start, None, spec)[: 1 + len(dims)]
    _remember(likeness, declaration, inputs, tensors, start, spec, o.dtype)
    return o[:, 0], _state(ends, dims)


REPEATED = 256
"""Kinds of calls and steps that are remembered."""


@dataclass(frozen=True)
class _Repeated:
    """A call on other tensors like those that it was recorded on: the launches alone, into new tensors. `fixed` are inputs that the
    call leaves to their defaults. None where the launches hold no longer."""

    repeat: Repeat
    fixed: Mapping[str, Tensor]
    memories: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    dtype: torch.dtype

    def __call__(self, inputs: Mapping[str, Tensor], state: State | None) -> tuple[Tensor, State] | None:
        given = () if state is None else (state,) if isinstance(state, Tensor) else state
        made = self.repeat({**inputs, **self.fixed}, dict(zip(self.memories, given)))
        if made is None:
            return None
        outputs, ends = made
        return outputs["o"].to(self.dtype), _state([ends[n] for n in self.memories], self.dims)


_REPEATED: dict[tuple[object, ...] | None, _Repeated] = {}


def _remember(likeness: tuple[object, ...] | None, declaration: LSM, inputs: Mapping[str, Any], tensors: Sequence[Tensor],
              start: Sequence[Tensor], spec: str, dtype: torch.dtype) -> None:
    """Keep what was recorded of a call, if something was, for calls like it."""
    if likeness is None or (repeat := ops.recorded(tensors, start, spec)) is None:
        return
    names, _, dims = _signature(declaration.key)
    fixed = {n: x for n, x in zip(names, tensors) if inputs.get(n) is None}
    if len(_REPEATED) >= REPEATED:
        _REPEATED.clear()
    _REPEATED[likeness] = _Repeated(repeat, fixed, tuple(f.name for f in declaration.canonical.states), dims, dtype)


def _likeness(key: str, scale: float, inputs: Mapping[str, Any], state: State | None, *how: object) -> tuple[object, ...] | None:
    """What two calls have in common that are launched alike; None for those that are not recorded: on other devices than GPUs, with
    derivatives, under autocast, where somebody would see the operator, of views that negate, of memories that are not float32, of
    rows with gaps that all heads share; and for what no call takes as a scale, a chunk or a schedule."""
    memories = () if state is None else tuple(state) if isinstance(state, tuple | list) else (state,)
    named = {n: x for n, x in inputs.items() if x is not None}
    given = (*named.values(), *memories)
    if type(scale) not in (float, int) or not all(h is None or type(h) in (int, str) for h in how):
        return None
    if not all(isinstance(x, Tensor) and x.is_cuda for x in given):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in given) or torch.is_autocast_enabled("cuda") or not unseen(given):
        return None
    if any(x.dtype != torch.float32 for x in memories):
        return None
    if not all(named[n].is_contiguous() for n in _shared(key) if n in named):
        return None
    return key, scale, *how, *named, *((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in given)


def compile(model: Any, *, mesh: Any = None, disable: tuple[str, ...] = (), **options: Any) -> Any:
    """`torch.compile` with lsmc's graph passes in front: a module or function that trains as the original does.

    model    any module or function; LSM operators in its graph are found by the passes, which say on the logger
             "lsmc.passes" what they changed: `absorb` prints the declaration that holds what fed an operator
    mesh     a DeviceMesh with axes named "dp" (the batch), "sp" (the sequence) or "tp" (heads and widths): the result is the
             same function of whole tensors as `model`, and each rank computes its part. Every rank calls it with the same
             arguments, tensors (B, T, …), and gets the same results and the same gradients of every parameter: nothing is
             left to reduce. Sizes are static and the graph is whole: dynamic=False, fullgraph=True. See docs/parallelism.md
    disable  names of passes to leave out; `lsmc.api.PASSES` lists them in order
    options  further options of `torch.compile` (dynamic, fullgraph, mode)

    Raises LsmOptionError for a pass that does not exist or an option that a mesh rules out, LsmMeshError for a mesh with
    other axes and, at the first call, for what an axis cannot split: by name, before any collective runs.
    """
    for name in disable:
        if name not in PASSES:
            raise LsmOptionError(f"disable={name!r}: no graph pass is called so", where=here(),
                                 help=f"the passes are {', '.join(PASSES)}")
    inserted: Mapping[str, Any] = {}
    if mesh is not None:
        for name, value in (("fullgraph", True), ("dynamic", False)):
            if options.setdefault(name, value) is not value:
                raise LsmOptionError(f"{name}={options[name]!r} beside a mesh", where=here(),
                                     help=f"a mesh needs {name}={value}: leave it out")
        inserted = passes(axes(mesh), PLANS)
    backend = functools.partial(compile_graph, disable=tuple(disable), inserted=inserted)
    return torch.compile(model, backend=backend, **options)


attach(call=call, step=step)

__all__: list[str] = ["PASSES", "call", "compile", "step"]
