"""The tensors of a call, checked against the declaration: names, dtypes and shapes, once for the operator
and the reference.

    q, k (B, T, H, K)   v (B, T, HV, V)   per token (B, T, HV, *dims)   per head (HV, *dims)   per layer (*dims),
    which becomes (HV, *dims)   HV a multiple of H; state M (B, HV, K, V), or the tuple of `Canonical.states`, each
    (B, HV, *dims); with cu_seqlens B = 1 and N states for N sequences
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsmc.canonical import Canonical
from lsmc.errors import (
    LsmDtypeError,
    LsmMissingInputError,
    LsmSequenceError,
    LsmShapeError,
    LsmUnexpectedInputError,
    here,
)
from lsmc.expr import Field


@dataclass(frozen=True)
class Sizes:
    """B batch, T tokens, H query/key heads, HV value heads, K and V head dims, N sequences (B, or those of
    cu_seqlens)."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int

    @property
    def F(self) -> int:
        """The rows of a memory whose keys are pairs."""
        return self.K * self.K

    def of(self, dims: Iterable[str]) -> tuple[int, ...]:
        """The sizes of these dimensions, those called 1 included."""
        return tuple(1 if dim == "1" else getattr(self, dim) for dim in dims)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def bind(
    canonical: Canonical,
    inputs: Mapping[str, Any],
    *,
    initial_state: Tensor | tuple[Tensor, ...] | None = None,
    cu_seqlens: Tensor | None = None,
    step: bool = False,
) -> tuple[dict[str, Tensor], Sizes]:
    """The inputs in declared order, defaults filled in, and the sizes; with `step`, tokens have no T
    dimension.

    Raises LsmMissingInputError, LsmUnexpectedInputError, LsmDtypeError, LsmShapeError and LsmSequenceError. Sizes stay
    symbolic and no frame is looked at unless something is wrong, so that it can be traced by torch.compile.
    """
    known = {symbol.name: symbol for symbol in canonical.inputs}
    given = {name: value for name, value in inputs.items() if value is not None or name not in known}
    for name in given:
        if name not in known:
            close = "it takes " + ", ".join(known)
            raise LsmUnexpectedInputError(f"{canonical.name} has no input {name!r}", where=here(), help=close)
    for name, symbol in known.items():
        if name not in given and name not in canonical.defaults:
            raise LsmMissingInputError(
                f"{canonical.name} needs the input {name!r}, {_shape(symbol, step)}", where=here(),
                help=f"it takes {', '.join(known)}",
            )  # fmt: skip
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise LsmDtypeError(f"{name!r} is {type(value).__name__}, not a tensor", where=here(),
                                help=f"pass a tensor of shape {_shape(known[name], step)}")  # fmt: skip
        if value.dtype not in DTYPES:
            raise LsmDtypeError(
                f"{name!r} has dtype {value.dtype}; methods compute in float64, float32, bfloat16 or float16", where=here(),
                help=f"pass {name}.float()",
            )  # fmt: skip
        if value.layout is not torch.strided:
            raise LsmDtypeError(f"{name!r} has the layout {value.layout}, not torch.strided", where=here(),
                                help=f"pass {name}.to_dense()")  # fmt: skip

    found: dict[str, tuple[int, str]] = {}  # size → (value, the input that fixed it)
    for name, symbol in known.items():
        if name in given:
            names = parts(symbol, step)
            if given[name].dim() != len(names):
                raise LsmShapeError(
                    f"{name!r} has shape {tuple(given[name].shape)}; it must be {_shape(symbol, step)}", where=here(),
                    help=f"{len(names)} dimensions, not {given[name].dim()}",
                )  # fmt: skip
            for part, size in zip(names, given[name].shape, strict=True):
                value, by = found.setdefault(part, (size, name))
                if value != size:
                    raise LsmShapeError(
                        f"{name!r} has shape {tuple(given[name].shape)}, that is {part} = {size} of {_shape(symbol, step)}; "
                        f"{by!r} has {part} = {value}", where=here(),
                    )  # fmt: skip
    state = initial_state if isinstance(initial_state, tuple | list) else (initial_state,)
    if state[0] is not None and isinstance(state[0], Tensor) and state[0].dim() == 4:
        for part, size in zip(("HV", *canonical.states[0].dims), state[0].shape[1:], strict=True):
            found.setdefault(*(("K", (math.isqrt(size), "initial_state")) if part == "F" else (part, (size, "initial_state"))))
    found.setdefault("HV", found.get("H", (1, "")))
    found.setdefault("H", found["HV"])
    found.setdefault("T", (1, ""))
    for part in ("B", "K", "V"):
        if part not in found:
            raise LsmShapeError(f"{canonical.name}: no input says how large {part} is", where=here(),
                                help="pass an initial_state (B, HV, K, V)")  # fmt: skip
    if canonical.square and found["K"][0] != found["V"][0]:
        raise LsmShapeError(f"{canonical.name} takes vectors over K for vectors over V: K = {found['K'][0]} by {found['K'][1]!r}, "
                            f"V = {found['V'][0]} by {found['V'][1]!r}", where=here(), help="make them the same")  # fmt: skip
    H, HV = found["H"][0], found["HV"][0]
    if H == 0 or HV % H:
        raise LsmShapeError(
            f"{found['HV'][1]!r} has HV = {HV} heads and {found['H'][1]!r} has H = {H}: HV must be a multiple of H",
            where=here(),
        )
    B, T = found["B"][0], found["T"][0]
    N = B if cu_seqlens is None else check_sequences(cu_seqlens, B, T)
    sizes = Sizes(B, T, H, HV, found["K"][0], found["V"][0], N)
    if initial_state is not None:
        _check_state(canonical, tuple(state), sizes)

    placed = [*given.values(), *(state if initial_state is not None else ()), *([] if cu_seqlens is None else [cu_seqlens])]
    devices = {value.device for value in placed}
    if len(devices) > 1:
        raise LsmDtypeError(f"inputs are on several devices: {', '.join(sorted(map(str, devices)))}", where=here(),
                            help="move them to one")  # fmt: skip
    like = next(iter(given.values()))
    tensors = {}
    for name, symbol in known.items():
        if name in given:
            tensors[name] = every_head(given[name], HV) if symbol.per == "layer" else given[name]
        else:
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            tensors[name] = torch.tensor(canonical.defaults[name](HV), dtype=dtype, device=like.device)
    return tensors, sizes


def every_head(x: Tensor, heads: int) -> Tensor:
    """What is the same for all heads as an input of every head: (*dims) → (HV, *dims)."""
    return x.expand(heads, *x.shape)


def parts(symbol: Field, step: bool) -> tuple[str, ...]:
    """The named dimensions of an input, in order; tokens lack T in one `step`."""
    return tuple(part for part in symbol.parts if not (step and part == "T"))


def _shape(symbol: Field, step: bool) -> str:
    return symbol.shape.replace("B, T, ", "B, ") if step else symbol.shape


def _check_state(canonical: Canonical, state: tuple[Any, ...], sizes: Sizes) -> None:
    names = [f.name for f in canonical.states]
    if len(state) != len(names):
        raise LsmShapeError(
            f"{canonical.name} has {len(names)} state(s); initial_state has {len(state)}", where=here(),
            help=f"the state is the tuple ({', '.join(names)})" if len(names) > 1 else "the state is one tensor",
        )  # fmt: skip
    for value, field in zip(state, canonical.states, strict=True):
        shape = sizes.of(("N", "HV", *field.dims))
        text = f"({', '.join(('N', 'HV', *field.dims))})"
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise LsmDtypeError(
                f"initial_state is {kind}; it is a float32 or float64 tensor {text}", where=here()
            )
        if tuple(value.shape) != shape:
            raise LsmShapeError(f"initial_state has shape {tuple(value.shape)}; it must be {text} = {shape}", where=here(),
                                help="N is the number of sequences: B, or len(cu_seqlens) - 1")  # fmt: skip


def check_sequences(cu_seqlens: Tensor, B: int, T: int) -> int:
    """The number N of packed sequences; raises LsmSequenceError unless cu_seqlens (N+1,) rises from 0 to T
    and B is 1.

    Empty sequences are allowed.  The values are read, which waits for the device, except while a graph is
    being traced.
    """
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dim() != 1
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise LsmSequenceError("cu_seqlens must be an int32 or int64 tensor of shape (N+1,)", where=here())
    if B != 1:
        raise LsmSequenceError(
            f"packed sequences need B = 1; B is {B}", where=here(), help="concatenate along T"
        )
    if cu_seqlens.shape[0] == 0:
        raise LsmSequenceError("cu_seqlens is empty; it has N+1 entries, the first is 0", where=here())
    if not (torch.compiler.is_compiling() or cu_seqlens.is_meta or type(cu_seqlens) is not Tensor):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != T or any(a > b for a, b in zip(values, values[1:], strict=False)):
            raise LsmSequenceError(f"cu_seqlens = {values} must rise from 0 to T = {T}", where=here())
    return int(cu_seqlens.shape[0]) - 1
