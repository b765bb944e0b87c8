"""Random inputs for any declaration: sizes, gates and splits, for `lsmc.check`.

Inputs follow from the canonical form alone: what the decay depends on is drawn from the gate ranges below, everything
else is bounded, and keys are l2-normalised where the memory is read, since a delta rule is stable only then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import cycle, product
from typing import Any

import sympy
import torch
from torch import Tensor

from lsmc.expr import Field
from lsmc.inputs import Sizes
from lsmc.reference import _Evaluator

CHUNKS = (16, 32, 64)

State = Tensor | tuple[Tensor, ...] | None


def tensors(state: State) -> list[Tensor]:
    """The tensors of a state, which may be one, several or none."""
    if state is None:
        return []
    return [state] if isinstance(state, Tensor) else list(state)


# --- gates: log decays, per token, from mathematics that failed somewhere


def _uniform(low: float, high: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    return lambda shape, generator: low + (high - low) * _rand(shape, generator)


def _mixture(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    levels = torch.tensor([0.0, -1e-3, -1.0, -30.0], dtype=torch.float64)
    return levels[torch.randint(0, 4, shape, generator=generator)]


def _lone(value: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """Typical gates with one element in a hundred (at least one) at ``value``."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        gate = GATES["typical"](shape, generator)
        flat = gate.view(-1)
        if flat.numel():
            chosen = torch.randint(0, flat.numel(), (1 + flat.numel() // 100,), generator=generator)
            flat[chosen] = value
        return gate

    return draw


GATES: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "typical": lambda shape, generator: torch.nn.functional.logsigmoid(2 + _randn(shape, generator)),
    "none": lambda shape, generator: torch.zeros(shape, dtype=torch.float64),
    "weak": _uniform(-1e-7, 0.0),
    "strong": lambda shape, generator: -5 * torch.sigmoid(_randn(shape, generator)),
    "very strong": _uniform(-20.0, -2.0),
    "extreme": _uniform(-1000.0, -100.0),
    "mixture": _mixture,
    "lone spike": _lone(-1e4),
    "reset": _lone(-math.inf),
}


def _rand(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- cases


@dataclass(frozen=True)
class Case:
    """Everything that determines one test; the same case gives the same numbers on every machine."""

    batch: int = 1
    time: int = 1
    heads: int = 1
    groups: int = 1
    """Value heads per query/key head."""
    key_dim: int = 1
    value_dim: int = 1
    chunk: int = 16
    gates: str = "typical"
    scale: float = 1.0
    initial_state: bool = False
    defaults: bool = False
    """Leave out the inputs that have a per-head default."""
    cuts: tuple[int, ...] = ()
    """Where the sequence is split or packed; positions may repeat (empty pieces)."""
    seed: int = 0

    def __str__(self) -> str:
        return f"Case({', '.join(f'{item.name}={getattr(self, item.name)!r}' for item in fields(self))})"

    @property
    def pieces(self) -> list[tuple[int, int]]:
        ends = [min(cut, self.time) for cut in sorted(self.cuts)]
        return list(zip([0, *ends], [*ends, self.time]))


@dataclass
class Sample:
    """The tensors of one case, float64."""

    inputs: dict[str, Tensor]
    state: Tensor | tuple[Tensor, ...] | None
    scale: float
    per_token: frozenset[str]

    def leaves(self) -> list[Tensor]:
        return [*self.inputs.values(), *tensors(self.state)]

    def between(self, start: int, stop: int) -> dict[str, Tensor]:
        """The inputs of tokens start … stop − 1."""
        return {name: x[:, start:stop] if name in self.per_token else x for name, x in self.inputs.items()}


def sample(declaration: Any, case: Case, *, batch: int | None = None) -> Sample:
    """Draws the inputs of a case. ``batch`` draws that many initial states (one for each packed sequence)."""
    canonical = declaration.canonical
    if canonical.square:  # and of three numbers at least: a norm of one is constant, and its derivative all rounding
        size = max(3, case.key_dim)
        case = replace(case, key_dim=size, value_dim=size)
    generator = torch.Generator().manual_seed(case.seed)
    reads = bool(canonical.reads)
    gate_of = _gate_domains(canonical)
    elsewhere = _read_elsewhere(canonical)
    inputs: dict[str, Tensor] = {}
    per_token = set()
    for item in canonical.inputs:
        if item.name in canonical.defaults and case.defaults:
            continue
        shape = _shape(item, case)
        if item.per == "token":
            per_token.add(item.name)
        if item.name in gate_of:
            part, warp = gate_of[item.name]
            gates = "typical" if part == "factor" else "lone spike" if (part, case.gates) == ("within", "reset") else case.gates
            value = warp(GATES[gates](shape, generator))
        elif item.name == "k" or (reads and "K" in item.dims and item.name != "q"):
            value = _randn(shape, generator)
            if reads:
                value = torch.nn.functional.normalize(value, dim=-1) * (ELSEWHERE if item in elsewhere else 1)
        elif item.dims:
            value = _randn(shape, generator)
        else:
            value = 0.05 + 0.9 * _rand(shape, generator)
        inputs[item.name] = value.requires_grad_()
    state: Tensor | tuple[Tensor, ...] | None = None
    if case.initial_state:
        lead = (batch or case.batch, case.heads * case.groups)
        parts = tuple(_memory(canonical, f, lead, case, generator).requires_grad_() for f in canonical.states)
        state = parts if len(parts) > 1 else parts[0]
    return Sample(inputs, state, case.scale, frozenset(per_token))


def _memory(canonical: Any, field: Field, lead: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    """A memory that tokens may have left: a normaliser is a sum of keys, which are positive, or pairs; tokens are counted."""
    if not field.dims:
        return torch.randint(0, canonical.block, lead[:1], generator=generator).double()[:, None].expand(lead).clone()
    sizes = {"K": case.key_dim, "V": case.value_dim, "F": case.key_dim**2}
    if field.name == "Z" and field.dims == ("F",):
        keys = _randn((*lead, case.key_dim, case.key_dim), generator)
        return (keys.mT @ keys).flatten(-2)
    drawn = _randn((*lead, *(sizes[d] for d in field.dims)), generator)
    return drawn.abs() if field.name == "Z" else drawn


ELSEWHERE = 1 / 16
"""Norm of keys of reads that are written at another key: I + bᵀa does not contract, and T tokens may amplify by
(1 + |a||b|)^T, which is to stay far below what float64 resolves."""


def _read_elsewhere(canonical: Any) -> set[Field]:
    """The inputs in keys of reads that correct what is written at other keys only."""
    found = set()
    for r in canonical.reads:
        written = {w.key for w in canonical.writes if r.symbol in w.value.free_symbols}
        if r.key not in written:
            found |= r.key.free_symbols - set().union(*(key.free_symbols for key in written))
    return found


def _shape(item: Any, case: Case) -> tuple[int, ...]:
    heads = case.heads * case.groups
    sizes = {"B": case.batch, "T": case.time, "H": case.heads, "HV": heads, "K": case.key_dim, "V": case.value_dim}
    return tuple(sizes[part] for part in item.parts)


Warp = Callable[[Tensor], Tensor]

# How a gate g <= 0 may enter the decay: as it is, as its absolute value, as exp(g) in (0, 1], shifted about
# zero, or as 1 - exp(g) in [0, 1).
_WARPS: tuple[Warp, ...] = (
    lambda g: g,
    lambda g: -g,
    lambda g: torch.exp(g.clamp(min=-4.0)),  # its gradient is that of the log decay over e^g, with 1/e^g of its error
    lambda g: 1 + g.clamp(min=-30.0),
    lambda g: -torch.expm1(g.clamp(min=-4.0)),
)


def _gate_domains(canonical: Any) -> dict[str, tuple[str, Warp]]:
    """For each input that the decay depends on: its part in it, and how to draw it from the gates.

    It *is* the log decay ("all"), or enters through an expression (``-exp(a) * softplus(dt)``) and takes the first of the
    domains above for which the log decay is finite and not positive at a number of points. The first input of an
    expression ranges as the gates do ("within"), the others stay typical ("factor"): the log decay has that range then,
    not its square.
    """
    found: dict[str, tuple[str, Warp]] = {}
    for decay in canonical.decays:
        gates = [
            symbol for symbol in canonical.inputs if symbol in decay.free_symbols and symbol.name not in "qkv"
        ]
        if [decay] == gates:
            found[decay.name] = ("all", _WARPS[0])
            continue
        generator = torch.Generator().manual_seed(0)
        for warps in product(_WARPS, repeat=len(gates)):
            points = {symbol: _randn((64,), generator) for symbol in canonical.inputs}
            points |= {symbol: warp(_probe(generator)) for symbol, warp in zip(gates, warps)}
            value = _evaluate(decay, points)
            if bool(torch.isfinite(value).all() & (value <= 0).all()):
                for n, (symbol, warp) in enumerate(zip(gates, warps)):
                    found.setdefault(symbol.name, ("factor" if n else "within", warp))
                break
    return found


def _probe(generator: torch.Generator) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.float64), -1000 * _rand((15,), generator), -_rand((48,), generator)])[
        torch.randperm(64, generator=generator)
    ]


def _evaluate(expr: sympy.Expr, points: Mapping[Field, Tensor]) -> Tensor:
    """The value of an expression at points (64,), as if every dimension had size 1."""
    sizes = Sizes(B=1, T=64, H=1, HV=1, K=1, V=1, N=1)
    values = {symbol: x[:, None, None] for symbol, x in points.items()}
    return _Evaluator(values, sizes, torch.float64, torch.device("cpu"))(expr).flatten()


CORNERS = tuple(
    Case(batch=2, time=chunk + 21, groups=2, key_dim=3, value_dim=2, chunk=chunk, gates=gates, initial_state=True, cuts=(5, 5, 21))
    for gates, chunk in zip(GATES, cycle(CHUNKS))
)
"""Tested after the random cases: every range of gates and every chunk length, over two chunks, from an initial state."""


def cases(seed: int = 0) -> Any:
    """A hypothesis strategy for cases; it shrinks towards one token, one head, one dimension and typical gates."""
    import hypothesis.strategies as st

    return st.builds(
        Case,
        batch=st.integers(1, 2),
        time=st.one_of(st.integers(0, 16), st.integers(17, 80), st.integers(33, 80)),
        heads=st.integers(1, 2),
        groups=st.integers(1, 2),
        key_dim=st.integers(1, 9),
        value_dim=st.integers(1, 7),
        chunk=st.sampled_from(CHUNKS),
        gates=st.sampled_from(list(GATES)),
        scale=st.sampled_from([1.0, 0.5]),
        initial_state=st.booleans(),
        defaults=st.booleans(),
        cuts=st.lists(st.integers(0, 80), min_size=1, max_size=3).map(tuple),
        seed=st.integers(seed << 16, (seed << 16) + 999),
    )
