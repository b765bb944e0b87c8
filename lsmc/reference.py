"""The oracle: any declaration, one step at a time, in float64.

    reference(own)(q=q, k=k, v=v, g=g)

interprets the canonical form, sharing nothing with the chunk program: what depends on inputs alone is
evaluated for all tokens at once, then a loop over the tokens reads, writes and decays the memory.
Autograd goes through it.  It runs on the device of its inputs.  Decays enter as e^g, g = −inf included:
the factor and its gradient are then exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor

from lsmc.canonical import Canonical
from lsmc.expr import Field, Max, Over, Pairs, Sum
from lsmc.inputs import Sizes, bind
from lsmc.lsm import LSM

_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "sigmoid": torch.sigmoid,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "relu": torch.relu,
    "step": lambda x: (x > 0).to(x.dtype),
    "elu": torch.nn.functional.elu,
    "bounded": lambda x: x.clamp(min=-1024),
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "Abs": torch.abs,
    "sign": torch.sign,
}
_AXIS = {"K": -2, "V": -1}


class reference:
    """``reference(decl)`` is a function with the operator's signature that runs `decl` step by step;
    `dtype` is float64.

    ``(**inputs, initial_state=None, return_final_state=False, cu_seqlens=None, scale=1.0)`` gives o (B, T,
    HV, V), or (o, state) with state (N, HV, K, V) or the tuple of `Canonical.states`.  Raises what `lsmc.inputs.bind`
    raises.
    """

    def __init__(self, declaration: LSM | Canonical, dtype: torch.dtype = torch.float64) -> None:
        self.canonical = declaration.canonical if isinstance(declaration, LSM) else declaration
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"reference({self.canonical.name})"

    def __call__(
        self,
        *,
        initial_state: Tensor | tuple[Tensor, ...] | None = None,
        return_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        scale: float = 1.0,
        **inputs: Tensor,
    ) -> Any:
        """Runs the recurrence; see the class."""
        c = self.canonical
        tensors, sizes = bind(c, inputs, initial_state=initial_state, cu_seqlens=cu_seqlens)
        like = next(iter(tensors.values()))
        values = {symbol: _spread(tensors[symbol.name].to(self.dtype), symbol, sizes) for symbol in c.inputs}
        values = {symbol: value * scale if symbol.name == "q" else value for symbol, value in values.items()}
        given = initial_state if isinstance(initial_state, tuple | list) else (initial_state,) * len(c.states)
        states: list[Tensor] = []
        for field, value in zip(c.states, given, strict=True):
            shape = sizes.of(("N", "HV", *field.tile))
            states.append(like.new_zeros(shape, dtype=self.dtype) if value is None else value.to(self.dtype).reshape(shape))
        if cu_seqlens is None:
            o, states = self._run(values, states, sizes)
        else:
            ends, parts = cu_seqlens.tolist(), []
            for n, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
                piece = {s: x[:, start:stop] if s.per == "token" else x for s, x in values.items()}
                alone = Sizes(**{**vars(sizes), "T": stop - start})
                parts.append(self._run(piece, [x[n : n + 1] for x in states], alone))
            o = torch.cat([part[0] for part in parts], 1) if parts else like.new_zeros(1, 0, sizes.HV, sizes.V, dtype=self.dtype)
            states = [torch.cat(one) for one in zip(*(part[1] for part in parts), strict=True)] if parts else states
        if not return_final_state:
            return o
        final = tuple(x.reshape(sizes.of(("N", "HV", *field.dims))) for field, x in zip(c.states, states, strict=True))
        return o, final if len(final) > 1 else final[0]

    def _run(self, values: dict[Field, Tensor], states: list[Tensor], sizes: Sizes) -> tuple[Tensor, list[Tensor]]:
        """All tokens of `values` (layout (B, T, HV, K or 1, V or 1)) from the memories (B, HV, K or 1, V or 1)."""
        c = self.canonical
        memory = {field.name: x for field, x in zip(c.states, states, strict=True)}
        device = memory["M"].device
        if c.phase is not None:
            memory["M"] = torch.complex(memory["M"], memory.pop("I"))
        Z = {"M": memory.pop("Z")} if c.normalizer else {}
        all_tokens = _Evaluator(values, sizes, self.dtype, device)

        def over_tokens(expr: sympy.Expr) -> list[Tensor]:
            value = all_tokens(expr)
            value = value.reshape((1,) * 5) if value.dim() == 0 else value
            # unbind, not indexing: its backward stacks once instead of adding T zero-padded slices
            return list(value.expand(value.shape[0], sizes.T, *value.shape[2:]).unbind(1))

        def factors(*logs: sympy.Expr | None) -> list[list[Tensor]]:
            return [[x.exp() for x in over_tokens(part)] for part in logs if part is not None]

        decays, decay_z, momentum = factors(c.decay_k, c.decay_v, c.decay_kv), factors(c.decay_k), factors(c.momentum)
        if c.phase is not None:
            decays.append([torch.complex(x.cos(), x.sin()) for x in over_tokens(c.phase)])
        keys_r = [over_tokens(read.key) for read in c.reads]
        keys_w = [over_tokens(write.key) for write in c.writes]
        keys_y = [over_tokens(query.key) for query in c.queries]
        in_values = set().union(*(write.value.free_symbols for write in c.writes)) if c.writes else set()
        tokens = {
            s: x.expand(x.shape[0], sizes.T, *x.shape[2:]).unbind(1)
            for s, x in values.items()
            if s in in_values
        }
        # Z is the memory of v = 1: whatever v was, and whatever was read with it
        ones = {s: tuple(torch.ones_like(x[..., :1]) for x in t) if s.name == "v" else t for s, t in tokens.items()}

        found: list[list[Tensor]] = [[] for _ in c.queries]
        for t in range(sizes.T):
            memory, at = self._step(t, memory, decays, momentum, keys_r, keys_w, tokens, sizes)
            if Z:
                Z, of_ones = self._step(t, Z, decay_z, [], keys_r, keys_w, ones, sizes)
                at["Z"] = of_ones["M"]
            for query, keys, into in zip(c.queries, keys_y, found, strict=True):
                into.append((keys[t] * at[query.of][query.at]).sum(-2, keepdim=True))
        after = {**memory, **({"Z": Z["M"]} if Z else {})}
        if c.phase is not None:
            after |= {"M": memory["M"].real, "I": memory["M"].imag}
        states = [after[field.name] for field in c.states]
        if sizes.T == 0:
            return states[0].new_zeros(sizes.B, 0, sizes.HV, sizes.V), states
        queries = {query.symbol: torch.stack(into, 1) for query, into in zip(c.queries, found, strict=True)}
        o = _Evaluator({**values, **queries}, sizes, self.dtype, device)(c.output)
        return o.expand(sizes.B, sizes.T, sizes.HV, 1, sizes.V).squeeze(-2), states

    def _step(
        self,
        t: int,
        memory: dict[str, Tensor],
        decays: list[list[Tensor]],
        momentum: list[list[Tensor]],
        keys_r: list[list[Tensor]],
        keys_w: list[list[Tensor]],
        tokens: dict[Field, tuple[Tensor, ...]],
        sizes: Sizes,
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """One step of the memories, and what M and its bias are before the decay, after it and after the write (of a complex
        memory, the real part)."""
        c, memory = self.canonical, dict(memory)
        rows: list[str] = [name for name in ("M", "Mb") if name in memory]
        at = {name: {"previous": _real(memory[name])} for name in rows}
        start = {name: memory.get(f"{name}0", at[name]["previous"]) for name in rows}
        for name in rows:
            for factor in decays:
                memory[name] = memory[name] * factor[t]
            at[name]["decayed"] = _real(memory[name])
        read = {
            r.symbol: (key[t] * (at[r.of][r.at] if c.block is None else start[r.of])).sum(-2, keepdim=True)
            for r, key in zip(c.reads, keys_r, strict=True)
        }
        device = memory["M"].device
        one_token = _Evaluator({**{s: x[t] for s, x in tokens.items()}, **read}, sizes, self.dtype, device)
        values = [one_token(write.value) for write in c.writes]
        written = [key[t] * value for key, value in zip(keys_w, values, strict=True)]
        if "P" in memory:
            memory["P"] = sum(written, memory["P"] * momentum[0][t])
            written = [memory["P"]]
        memory["M"] = sum(written, memory["M"])
        if "Mb" in memory:
            memory["Mb"] = sum(values, memory["Mb"])
        for name in rows:
            at[name]["updated"] = _real(memory[name])
        if c.block is not None and "Mt" in memory:
            over = memory["Mt"] > c.block - 1.5
            memory |= {f"{name}0": torch.where(over, at[name]["updated"], start[name]) for name in rows}
            memory["Mt"] = memory["Mt"] + torch.where(over, 1.0 - c.block, 1.0)
        return memory, at


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _spread(x: Tensor, symbol: Field, sizes: Sizes) -> Tensor:
    """(…heads, *dims) → (B or 1, T or 1, HV, K or 1, V or 1); value head j takes query/key head j // (HV
    // H)."""
    x = x if symbol.per == "token" else x[None, None]
    if symbol.heads == "H" and sizes.H != sizes.HV:
        x = x.repeat_interleave(sizes.HV // sizes.H, dim=2)
    if "K" not in symbol.dims:
        x = x[..., None, :] if "V" in symbol.dims else x[..., None, None]
    elif "V" not in symbol.dims:
        x = x[..., None]
    return x


class _Evaluator:
    """Evaluates an expression over tensors whose last two dimensions are K and V (or 1)."""

    def __init__(
        self, values: dict[Field, Tensor], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.done: dict[sympy.Basic, Tensor] = dict(values)
        self.sizes, self.dtype, self.device = sizes, dtype, device

    def __call__(self, expr: sympy.Basic) -> Tensor:
        value = self.done.get(expr)
        if value is None:
            value = self.done[expr] = self._evaluate(expr)
        return value

    def _number(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self.dtype, device=self.device)  # a tensor from the host would wait for a GPU

    def _evaluate(self, expr: sympy.Basic) -> Tensor:
        if expr.is_Rational:
            return self._number(int(expr.p) / int(expr.q))
        if expr.is_number and not expr.atoms(Sum):
            return self._number(float(_numeric(expr)))
        if isinstance(expr, Sum):
            axis, body = _AXIS[expr.dim], self(expr.body)
            if isinstance(expr, Max):
                if body.dim() == 0:
                    return body
                return body.detach().amax(axis, keepdim=True)
            size = self.sizes.K if expr.dim == "K" else self.sizes.V
            return body * size if body.dim() == 0 or body.shape[axis] == 1 else body.sum(axis, keepdim=True)
        if isinstance(expr, Over):
            return self(expr.args[1]).mT
        if isinstance(expr, Pairs):
            x = self(expr.args[0])
            return (x * x.mT).flatten(-2)[..., None]
        if isinstance(expr, sympy.Add | sympy.Mul):
            parts = [self(arg) for arg in expr.args]
            value = parts[0]
            for part in parts[1:]:
                value = value + part if isinstance(expr, sympy.Add) else value * part
            return value
        if isinstance(expr, sympy.Pow):
            base, power = self(expr.base), expr.exp
            if power == sympy.Rational(1, 2):
                return base.sqrt()
            return (
                base.rsqrt()
                if power == sympy.Rational(-1, 2)
                else base ** (int(power) if power.is_Integer else float(power))
            )
        return _TORCH[type(expr).__name__](self(expr.args[0]))


def _numeric(expr: sympy.Expr) -> float:
    """The value of an expression without symbols, such as log(1/2) or tanh(1)."""
    if expr.is_Rational or not expr.args:
        return float(expr)
    if type(expr).__name__ in _TORCH:
        return float(_TORCH[type(expr).__name__](torch.tensor(_numeric(expr.args[0]), dtype=torch.float64)))
    args = [_numeric(arg) for arg in expr.args]
    return float(expr.func(*args))
