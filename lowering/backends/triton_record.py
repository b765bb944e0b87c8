"""Launches that are recorded once and then repeated: a call then costs the host little more than its launches.

Sizes, strides, types and alignments of the tensors given decide everything about a launch but addresses. The first call
that looks like this works it all out; later ones make room, fill in addresses and launch the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

ALIGN = 512
"""Bytes to which every buffer is aligned, as the allocator's are."""

Likeness = tuple[object, ...]


def likeness(tensors: Iterable[tuple[str, Tensor | None]]) -> Likeness:
    """What two calls have in common that can be launched alike."""
    return tuple((n, x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for n, x in tensors if x is not None)


@dataclass(frozen=True)
class Launched:
    """One kernel as it was launched: the compiled kernel, its grid, all arguments by name."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Room:
    """A tensor that a launch allocated; zero where the kernels leave some of it out."""

    tensor: Tensor
    zero: bool


@dataclass(frozen=True)
class _Again:
    """One kernel to launch again: arguments, and which of them are addresses in the scratch memory or of other tensors."""

    launch: Callable[..., None]
    arguments: tuple[Any, ...]
    scratch: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[int, str | int], ...]


class Recording:
    """Kernels to launch again. Given tensors are known by the names of their arguments, what is returned by its number.

    What no caller sees lies in one scratch tensor, which the allocator takes back in the order of the stream.
    """

    def __init__(self, launched: Sequence[Launched], rooms: Sequence[Room], returned: Iterable[Tensor],
                 given: Iterable[str]) -> None:
        visible = {id(x) for x in returned}
        self.returned = [(tuple(r.tensor.shape), r.tensor.dtype, r.zero) for r in rooms if id(r.tensor) in visible]
        place = {id(r.tensor): n for n, r in enumerate(r for r in rooms if id(r.tensor) in visible)}
        offset, self.bytes = dict[int, int](), 0
        for r in rooms:
            if id(r.tensor) not in visible:
                offset[id(r.tensor)] = self.bytes
                self.bytes += -(-r.tensor.nbytes // ALIGN) * ALIGN
        names = set(given)
        self.kernels: list[_Again] = []
        for done in launched:
            arguments, scratch, tensors = [], [], list[tuple[int, str | int]]()
            for at, (name, x) in enumerate(done.arguments.items()):
                if isinstance(x, Tensor):
                    if id(x) in offset:
                        scratch.append((at, offset[id(x)]))
                    elif id(x) in place:
                        tensors.append((at, place[id(x)]))
                    elif name in names:
                        tensors.append((at, name))
                    x = 0  # what is none of these is never read
                arguments.append(x)
            self.kernels.append(_Again(done.kernel[(done.programs, 1, 1)], tuple(arguments), tuple(scratch), tuple(tensors)))

    def repeat(self, given: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
        """Launch on these tensors; what was returned then is returned anew, in the order in which it was allocated."""
        results = [(torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)
                   for shape, dtype, zero in self.returned]
        addresses: dict[str | int, int] = {n: x.data_ptr() for n, x in given.items()}
        addresses |= {n: x.data_ptr() for n, x in enumerate(results)}
        room = torch.empty(self.bytes, dtype=torch.uint8, device=device) if self.bytes else None
        base = 0 if room is None else room.data_ptr()
        stream = triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else None
        for k in self.kernels:
            arguments = list(k.arguments)
            for at, offset in k.scratch:
                arguments[at] = base + offset
            for at, key in k.tensors:
                arguments[at] = addresses[key]
            k.launch(*arguments, stream=stream)
        return results


def recordable(kernel: object) -> bool:
    """Whether launching gave a compiled kernel: not where a graph is traced, nor in the interpreter."""
    return isinstance(kernel, triton.compiler.CompiledKernel)
