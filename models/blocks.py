"""The two mixers of a hybrid: a layer around any declared LSM, and causal softmax attention.

Both have three forms that agree: ``forward(x)`` on whole sequences; ``prefill(x)``, which also returns the
state after the last token; ``step(x_t, state)``, one token.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsmc.models.configs import ModelConfig
from lsmc.reference import _numeric
from lsmc.resolve import resolve


class ConvolutionState(NamedTuple):
    """The last ``width - 1`` inputs, ``(B, width - 1, channels)``."""

    tail: Tensor


class MemoryState(NamedTuple):
    """State of an LSM layer: constant in the length. ``memory`` is the declaration's state."""

    convolution: ConvolutionState | None
    memory: Any


class AttentionState(NamedTuple):
    """Keys (rotated) and values so far, ``(B, H, T, K)``."""

    k: Tensor
    v: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Gates and routing are computed in float32, or float64 where the model is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.RMSNorm):
    """``x / √(mean(x²) + eps) ⊙ w`` in the type of ``x``, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, then silu: ``y_t = silu(Σ_i w_i ⊙ x_{t-i})``.

    Written as shifted products, which fuse with what surrounds them; starts as the identity plus noise.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))

    def initialise(self) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, state: ConvolutionState | None = None) -> Tensor:
        """``x (B, T, channels)``."""
        length = x.shape[1]
        if state is None:
            x = F.pad(x, (0, 0, self.width - 1, 0))
        else:
            x = torch.cat([state.tail, x], dim=1)
        y = x[:, :length] * self.weight[0]
        for i in range(1, self.width):
            y = y + x[:, i : i + length] * self.weight[i]
        return F.silu(y)

    def advance(self, x: Tensor, state: ConvolutionState | None) -> ConvolutionState:
        """The state after reading ``x (B, T, channels)``."""
        keep = self.width - 1
        if state is None:
            x = F.pad(x, (0, 0, keep, 0))
        else:
            x = torch.cat([state.tail, x], dim=1)
        return ConvolutionState(x[:, x.shape[1] - keep :])


@dataclass(frozen=True)
class Input:
    """One input of the declaration, as the layer sees it.

    ``role``: "key" (read or written vectors over K: q, k and the like), "value", "decay", "strength" (other
    scalars) or "free" (any other vector). ``sign`` is what a decay's input must satisfy: -1, +1 or 0
    (anything).
    """

    name: str
    dims: tuple[str, ...]
    per: str
    heads: str
    role: str
    sign: int = 0


def canonical_of(declaration: Any) -> Any:
    """The canonical form of a declaration, or the canonical form itself."""
    canonical = getattr(declaration, "canonical", declaration)
    return canonical() if callable(canonical) else canonical


def _signs(decay: sympy.Expr, symbols: list[Any]) -> dict[str, int]:
    """The least that the inputs of a log decay must satisfy so that it never exceeds zero.

    ``g`` gives ``g ≤ 0``; ``A · dt`` gives ``A ≤ 0 ≤ dt``; ``-exp(A) · softplus(dt)`` gives nothing, nor does ``log(a)``,
    whose a is in (0, 1), as any strength is. Signs are tried from no restriction upwards, per-head inputs negative before
    per-token ones.
    """
    symbols = sorted(symbols, key=lambda s: (s.per == "token", s.name))
    assumptions = {0: {"real": True}, -1: {"nonpositive": True}, +1: {"nonnegative": True}}
    choices = itertools.product((0, -1, +1), repeat=len(symbols))
    for signs in sorted(choices, key=lambda c: sum(map(abs, c))):
        replaced = decay.subs(
            {s: sympy.Dummy(s.name, **assumptions[c]) for s, c in zip(symbols, signs)}, simultaneous=True
        )
        if replaced.is_nonpositive:
            return {s.name: c for s, c in zip(symbols, signs)}
    if all(_numeric(decay.subs(dict.fromkeys(symbols, x))) <= 0 for x in (0.1, 0.5, 0.9)):
        return {}  # anything in (0, 1), as the strengths are
    return {s.name: -1 for s in symbols}


def describe(declaration: Any) -> list[Input]:
    """What each input of the declaration is for, read off its canonical form."""
    canonical = canonical_of(declaration)
    signs: dict[str, int] = {}
    factors: set[str] = set()  # in decays, of numbers in (0, 1)
    fields = {field.name: field for field in canonical.inputs}
    for part in ("decay_k", "decay_v", "decay_kv"):
        decay = getattr(canonical, part, None)
        if decay is not None:
            decay = sympy.sympify(decay)
            symbols = [fields[name] for name in sorted({s.name for s in decay.free_symbols} & set(fields))]
            signs |= _signs(decay, symbols)
            factors |= {s.name for s in symbols} - set(signs)
    described = []
    for field in canonical.inputs:
        dims = tuple(field.dims)
        if field.name in signs:
            role = "decay"
        elif field.name == "v":
            role = "value"
        elif field.name in factors:
            role = "strength"
        elif dims == ("K",) and field.per == "token":
            role = "key"
        elif dims == () and field.per == "token":
            role = "strength"
        else:
            role = "free"
        described.append(Input(field.name, dims, field.per, field.heads, role, signs.get(field.name, 0)))
    return described


class LinearMixer(nn.Module):
    """A layer around a declared LSM.

    One fused projection gives the per-token inputs, the gates and the output gate; q, k, v pass a short
    convolution. What each input needs follows from the declaration alone:

    - log decays: ``logsigmoid(x) / normaliser`` (or ``softplus`` where the declaration needs a sign, see
      ``_signs``);
    - other scalars are write strengths: ``sigmoid(x)``;
    - vector gates are projected through rank ``gate_rank``;
    - keys have unit length where the declaration reads its memory, so that a correction contracts;
    - per-head and per-layer inputs are parameters, or left out where the declaration has a default.

    Output: per-head RMSNorm, ``silu`` gate, projection.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.declaration = resolve(config.lsm) if isinstance(config.lsm, str) else config.lsm
        canonical = canonical_of(self.declaration)
        self.inputs = describe(self.declaration)
        self.reads = len(canonical.reads) > 0
        self.sizes = {"K": config.k_dim, "V": config.v_dim}
        self.heads = {"H": config.heads, "HV": config.v_heads}
        self.normaliser = config.gate_normaliser
        self.scale = config.k_dim**-0.5
        self.v_shape = (config.v_heads, config.v_dim)
        defaults = getattr(canonical, "defaults", {})

        # The fused projection: what is convolved, then scalar and low-rank gates, then the output gate.
        wide, scalars, low = {}, {}, {}
        self.constants = nn.ParameterDict()
        for i in self.inputs:
            width = math.prod(self._shape(i))
            if i.per != "token":
                if i.name not in defaults:
                    self.constants[i.name] = nn.Parameter(torch.zeros(self._shape(i)))
            elif i.name in ("q", "k", "v"):
                wide[i.name] = width
            elif i.dims:
                low[i.name] = width
            else:
                scalars[i.name] = width
        self.splits = [
            sum(wide.values()),
            *scalars.values(),
            *(config.gate_rank for _ in low),
            math.prod(self.v_shape),
        ]
        self.gate_names = [*scalars, *low]
        self.wide = wide
        self.project = nn.Linear(config.hidden, sum(self.splits), bias=False)
        self.expand = nn.ModuleDict({name: nn.Linear(config.gate_rank, width) for name, width in low.items()})
        self.scalar_bias = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(w)) for name, w in scalars.items()}
        )
        self.convolution = (
            ShortConvolution(self.splits[0], config.convolution) if config.convolution else None
        )
        self.norm = RMSNorm(config.v_dim, eps=config.norm_eps)
        self.out = nn.Linear(math.prod(self.v_shape), config.hidden, bias=False)

    def _shape(self, i: Input) -> tuple[int, ...]:
        return (*(() if i.per == "layer" else (self.heads[i.heads],)), *(self.sizes[d] for d in i.dims))

    def _range(self, i: Input, x: Tensor) -> Tensor:
        """Bring a raw input into the range that the declaration needs."""
        if i.role == "decay" and i.sign < 0:
            return F.logsigmoid(at_least_float32(x)) / self.normaliser
        if i.role == "decay" and i.sign > 0:
            return F.softplus(at_least_float32(x))
        if i.role == "strength":
            return torch.sigmoid(at_least_float32(x))
        if i.role == "key" and self.reads:
            return F.normalize(at_least_float32(x), dim=-1, eps=1e-6).to(x.dtype)
        return x

    def _inputs(
        self, x: Tensor, convolution: ConvolutionState | None, advance: bool
    ) -> tuple[dict[str, Tensor], Tensor, ConvolutionState | None]:
        mixed, *raw, gate = self.project(x).split(self.splits, dim=-1)
        if self.convolution is not None:
            tail = self.convolution.advance(mixed, convolution) if advance else None
            mixed = self.convolution(mixed, convolution)
        else:
            tail = None
        pieces = dict(zip(self.wide, mixed.split(list(self.wide.values()), dim=-1)))
        for name, piece in zip(self.gate_names, raw):
            pieces[name] = self.expand[name](piece) if name in self.expand else piece + self.scalar_bias[name]
        values = {}
        for i in self.inputs:
            if i.name in pieces:
                values[i.name] = self._range(i, self._view(i, pieces[i.name]))
            elif i.name in self.constants:
                values[i.name] = self._range(i, self.constants[i.name])
        return values, gate, tail

    def _view(self, i: Input, x: Tensor) -> Tensor:
        return x.unflatten(-1, self._shape(i)) if i.dims else x

    def _finish(self, o: Tensor, gate: Tensor) -> Tensor:
        o = self.norm(o.to(gate.dtype)).flatten(-2)
        return self.out(o * F.silu(gate))

    def forward(self, x: Tensor) -> Tensor:
        """``x (B, T, hidden)``."""
        values, gate, _ = self._inputs(x, None, advance=False)
        return self._finish(self.declaration(**values, scale=self.scale), gate)

    def prefill(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        convolution, memory = state if state is not None else (None, None)
        values, gate, tail = self._inputs(x, convolution, advance=True)
        o, memory = self.declaration(
            **values, scale=self.scale, initial_state=memory, return_final_state=True
        )
        return self._finish(o, gate), MemoryState(tail, memory)

    def step(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """``x (B, hidden)``, one token."""
        values, gate, tail = self._inputs(x.unsqueeze(1), state.convolution, advance=True)
        tokens = {i.name for i in self.inputs if i.per == "token"}
        values = {name: value.squeeze(1) if name in tokens else value for name, value in values.items()}
        o, memory = self.declaration.step(**values, state=state.memory, scale=self.scale)
        return self._finish(o, gate.squeeze(1)), MemoryState(tail, memory)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions (θ = ``rope_theta``); decodes with a key/value cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.k_dim = config.heads, config.k_dim
        self.theta = config.rope_theta
        self.project = nn.Linear(config.hidden, 3 * self.heads * self.k_dim, bias=False)
        self.out = nn.Linear(self.heads * self.k_dim, config.hidden, bias=False)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotate the pairs ``(x_d, x_{d+K/2})`` of ``x (B, H, T, K)`` by position · θ^(-2d/K)."""
        half = self.k_dim // 2
        exact = torch.promote_types(x.dtype, torch.float32)
        index = torch.arange(half, device=x.device, dtype=exact)
        frequency = self.theta ** (-index / half)
        position = torch.arange(start, start + x.shape[2], device=x.device, dtype=exact)
        angle = position[:, None] * frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def _qkv(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, self.k_dim)).permute(2, 0, 3, 1, 4)
        return self._rotate(q, start), self._rotate(k, start), v

    def _finish(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        """``x (B, T, hidden)``."""
        q, k, v = self._qkv(x, 0)
        return self._finish(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def prefill(self, x: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        past = 0 if state is None else state.k.shape[2]
        q, k, v = self._qkv(x, past)
        if state is None:
            return self._finish(F.scaled_dot_product_attention(q, k, v, is_causal=True)), AttentionState(k, v)
        k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        row = torch.arange(q.shape[2], device=x.device)[:, None] + past
        mask = torch.arange(k.shape[2], device=x.device) <= row
        return self._finish(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), AttentionState(k, v)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """``x (B, hidden)``, one token."""
        y, state = self.prefill(x.unsqueeze(1), state)
        return y.squeeze(1), state
