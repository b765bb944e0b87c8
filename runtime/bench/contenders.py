"""Ways to run a method, ours first; those named in `--against` run beside it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsmc.reference import reference
from lsmc.zoo import METHODS
from lsmc.zoo.peers import ENVIRONMENT, PEERS

Function = Callable[..., Tensor]


class Absent(Exception):
    """Why a contender does not run here."""


@dataclass(frozen=True)
class Contender:
    """A way to run a method: `prepare(declaration, dtype)` is a function of the inputs by name that gives o.

    What a peer raises, there or when it runs, is the reason why it is absent.
    """

    name: str
    what: str
    prepare: Callable[[Any, torch.dtype], Function]
    peer: bool = False
    slow: bool = False
    """Not worth more than a few turns."""
    takes: tuple[str, ...] | None = None
    """The inputs of another function than the method's: its errors say nothing."""


def _compiled(declaration: Any, dtype: torch.dtype) -> Function:
    def call(**inputs: Tensor) -> Tensor:
        return declaration(**inputs)

    compiled: Function = torch.compile(call, fullgraph=True)
    return compiled


def _peer(package: str) -> Callable[[Any, torch.dtype], Function]:
    def prepare(declaration: Any, dtype: torch.dtype) -> Function:
        peer = PEERS[package].get(declaration.name) if declaration in METHODS else None
        if peer is None:
            raise Absent("no function of it is known for this method")
        module, _, name = peer.function.partition(":")
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # imports of other people's code may fail in any way
            raise Absent(f"{type(error).__name__}: {error}") from error
        return functools.partial(peer.call, function)

    return prepare


def differs(contender: str, declaration: Any) -> str:
    """What a contender computes otherwise than the method, where that is known."""
    peer = PEERS.get(contender, {}).get(declaration.name) if declaration in METHODS else None
    return "" if peer is None else peer.differs


def _softmax(declaration: Any, dtype: torch.dtype) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            o = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != v.shape[2]
            )
        return o.transpose(1, 2)

    return call


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("eager", "the operator as it is called", lambda op, dtype: op),
        Contender("compiled", "the operator under torch.compile", _compiled),
        Contender("loop", "the recurrence, a token at a time", lambda op, dtype: reference(op, dtype=dtype), slow=True),
        *(Contender(package, "other people's kernels", _peer(package), peer=True) for package in PEERS),
        Contender("sdpa", "causal softmax attention on the same q, k, v", _softmax, peer=True, takes=("q", "k", "v")),
    )
}
OURS = "eager"
