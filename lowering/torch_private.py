"""What lsmc takes of torch that promises nothing, in one place, and what it does instead where that is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import torch._library.triton
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_wrapping: Callable[[bool], AbstractContextManager[None]] | None = getattr(torch._library.triton, "set_wrap_triton_enabled", None)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def constant(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Tell Dynamo to run `function` on its constant arguments while tracing, and to keep the result as a constant."""
    made: Callable[_P, _R] = torch._dynamo.assume_constant_result(function)
    return made


def watched() -> bool:
    """Whether a mode looks at operators as they are called: then nothing may go past them."""
    return is_in_torch_dispatch_mode()


def unseen(tensors: Iterable[Tensor]) -> bool:
    """Whether nobody would see an operator on these tensors: no mode, tracer, transform, tensor of another kind or view whose
    numbers the dispatcher would work out first (negated, or zeros without a place). Its body can then be called itself, past the
    dispatcher, which takes the host longer than all else of a call."""
    if _wrapping is None or torch.compiler.is_compiling() or watched() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(x) in (Tensor, Parameter) and not (x.is_neg() or x._is_zerotensor()) for x in tensors)


def unwrapped() -> AbstractContextManager[Any]:
    """Triton kernels are launched, and not noted in a graph."""
    return nullcontext() if _wrapping is None else _wrapping(False)
