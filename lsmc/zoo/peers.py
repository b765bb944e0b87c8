"""The same methods in other people's packages, for comparison: which function computes a method, and how it is called.

Everything that differs from here stands in this file: names of inputs, layouts, and a scale that is 1/√K where none is given.
The packages: fla (fla-core), FlashQLA (flash-qla), and the engine among the examples of Helion, whose tensors are (B, H, T, …);
it is found where a checkout of Helion is on the path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ENVIRONMENT = {"FLA_FLASH_QLA": "0"}
"""So that fla runs its own kernels where FlashQLA is installed, too."""


@dataclass(frozen=True)
class Peer:
    """``function`` is ``module:name``; ``call(function, **inputs)`` gives o from the inputs of our method by name. What it computes
    otherwise than we do, if anything, is `differs`: its time is that of the same work, its numbers are not compared."""

    function: str
    call: Callable[..., Tensor]
    differs: str = ""


def _first(q: Tensor, k: Tensor, v: Tensor, f: Callable[..., Any], *more: Tensor, **options: Any) -> Tensor:
    """o of a function of q, k, v that also returns a final state."""
    o: Tensor = f(q, k, v, *more, scale=1.0, **options)[0]
    return o


def _plain(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _first(q, k, v, f)


def _named(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor, **gates: Any) -> Tensor:
    """A function whose gates are called like ours: g the log decay, beta the write strength."""
    return _first(q, k, v, f, **gates)


def _skipping(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor, A: Tensor, dt: Tensor, D: Tensor) -> Tensor:
    """A scalar gate A·dt, values dt·v, and D·v beside them, on a function that knows the gate alone."""
    return _first(q, k, (dt[..., None] * v).to(v.dtype), f, g=A * dt) + (D[:, None] * v).to(v.dtype)


def _constant(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """A constant decay as a gate of every token."""
    return _first(q, k, v, f, g=log_a.expand(v.shape[:3]))


def _tied(f: Callable[..., Any], *, q: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Keys that are what the gate lets go, 1 − e^g."""
    return _first(q, -g.expm1(), v, f, g)


def _squared(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Squared products of what is scaled and shifted, normalised: no scale but ours."""
    query, key = ((gamma * x + beta).to(v.dtype) for x in (q, k))
    o: Tensor = f(query, key, v, eps=1e-6, use_scale=False)
    return o


def _low_rank(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """By the names of its paper; gates of at least −5 a token, as typical ones are, may use its faster kernels."""
    o: Tensor = f(r=q, w=g, k=k, v=v, a=a, b=b, scale=1.0, safe_gate=True)[0]
    return o


def _accelerated(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor) -> Tensor:
    """Log decays of memory and accumulator; the error is read at k from the memory before it decays."""
    return _first(q, k, v, f, (-alpha).log1p(), eta.log(), p=k, eta=theta, use_qk_l2norm_in_kernel=False, use_p_times_alpha=False)


def _normed(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A layer norm's weight and bias, and rates, by position."""
    return _first(q, k, v, f, w, b, eta[..., None], eps=1e-6, chunk_size=16)


def _heads_first(f: Callable[..., Any], **inputs: Tensor) -> Tensor:
    """q, k, v, g, beta as (B, H, T, …), in and out."""
    o: Tensor = f(**{name: x.transpose(1, 2) for name, x in inputs.items()}, scale=1.0)
    return o.transpose(1, 2)


def _skipping_heads_first(f: Callable[..., Any], *, A: Tensor, dt: Tensor, D: Tensor, v: Tensor, **qk: Tensor) -> Tensor:
    return _heads_first(f, v=(dt[..., None] * v).to(v.dtype), g=A * dt, **qk) + (D[:, None] * v).to(v.dtype)


def _constant_heads_first(f: Callable[..., Any], *, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A constant decay, log(1 − 2^{−5−h}), as a gate of every token."""
    import torch

    log_a = torch.log1p(-(2.0 ** (-5 - torch.arange(v.shape[2], device=v.device, dtype=torch.float32))))
    return _heads_first(f, q=q, k=k, v=v, g=log_a.expand(v.shape[:3]))


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "fla": {
        "bla": Peer("fla.ops.linear_attn:chunk_linear_attn", lambda f, q, k, v: _first(q, k, v, f, normalize=False)),
        "retnet": Peer("fla.ops.retention:chunk_retention", _plain),
        "mamba2": Peer("fla.ops.simple_gla:chunk_simple_gla", _skipping),
        "gla": Peer("fla.ops.gla:chunk_gla", _named),
        "deltanet": Peer("fla.ops.delta_rule:chunk_delta_rule", _named),
        "gated_deltanet": Peer("fla.ops.gated_delta_rule:chunk_gated_delta_rule", _named),
        # gates of at least −5 a token, as typical ones are, may use its faster kernels
        "kda": Peer("fla.ops.kda:chunk_kda", lambda f, **inputs: _named(f, safe_gate=True, **inputs)),
        "rwkv6": Peer("fla.ops.rwkv6:chunk_rwkv6", lambda f, q, k, v, g, u: _first(q, k, v, f, g, u)),
        "rwkv7": Peer("fla.ops.rwkv7:chunk_rwkv7", _low_rank),
        "lightning": Peer("fla.ops.simple_gla:chunk_simple_gla", _constant),
        "gateloop_real": Peer("fla.ops.gla:chunk_gla", _named),
        "hgrn2": Peer("fla.ops.gla:chunk_gla", _tied),
        "rebased": Peer("fla.ops.rebased:parallel_rebased", _squared),
        "ttt": Peer("fla.ops.delta_rule:chunk_delta_rule", lambda f, eta, **inputs: _named(f, beta=eta, **inputs)),
        "ttt_ln": Peer("fla.ops.ttt:chunk_ttt_linear", _normed,
                       "one learning rate for each block, and q M + m in the output where q is"),
        "titans": Peer("fla.ops.momentum_delta_rule:chunk_momentum_delta_rule", _accelerated),
    },
    "flashqla": {  # it differentiates gates in float32 only
        "gated_deltanet": Peer("flash_qla:chunk_gated_delta_rule", lambda f, g, **inputs: _named(f, g=g.float(), **inputs)),
    },
    "helion": {
        ours: Peer(f"examples.linear.linear_attention_engine:helion_chunk_{theirs}", call)
        for ours, theirs, call in (
            ("bla", "linear_attn", _heads_first),
            ("retnet", "retention", _constant_heads_first),
            ("mamba2", "mamba2_ssd", _skipping_heads_first),
            ("gla", "gla", _heads_first),
            ("deltanet", "delta_rule", _heads_first),
            ("gated_deltanet", "gated_delta_rule", _heads_first),
            ("kda", "kda", _heads_first),
        )
    },
}
"""Package → our method → its function."""
