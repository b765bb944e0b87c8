"""Laws of the oracle: it equals recurrences written by hand, splits anywhere, and survives every gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lsmc
from lsmc import (
    LSM,
    Constant,
    Identity,
    M,
    Matrix,
    Scalar,
    Vector,
    eye,
    grad,
    k,
    matrix,
    norm2,
    outer,
    q,
    scalar,
    v,
    vector,
)
from lsmc.cases import tensors
from lsmc.expr import MEMORY, Field
from lsmc.functions import FUNCTIONS
from lsmc.inputs import Sizes
from lsmc.reference import _TORCH, _Evaluator
from lsmc.terms import Term

B, T, H, HV, K, V = 2, 6, 2, 4, 3, 5
SIZES = {"B": B, "T": T, "H": H, "HV": HV, "K": K, "V": V}


def sizes_of(method: LSM) -> dict[str, int]:
    """The sizes of a method's tensors: V = K where it takes one for the other."""
    return SIZES | {"F": K * K} | ({"V": K} if method.canonical.square else {})


def draw(method: LSM, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """Inputs in float64; what only the decay uses is ≤ 0, beta in (0, 1), keys of norm ≤ 1."""
    generator = torch.Generator().manual_seed(seed)
    size = sizes_of(method) | sizes
    decays = [
        part
        for part in (method.canonical.decay_k, method.canonical.decay_v, method.canonical.decay_kv)
        if part is not None
    ]
    made = {}
    for symbol in method.inputs:
        shape = [size[part] for part in symbol.parts]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if symbol.name == "k":
            x = torch.nn.functional.normalize(x, dim=-1)
        elif symbol in decays:
            x = -x.abs()
        elif symbol.name not in ("q", "v"):
            x = x.sigmoid()
        made[symbol.name] = x
    return made


def start(method: LSM, *lead: int, draw: bool = True) -> tuple[Tensor, ...]:
    """The memories of a method for these sequences and heads: drawn, or zero."""
    shapes = [(*lead, *(sizes_of(method)[d] for d in f.dims)) for f in method.canonical.states]
    return tuple(torch.randn(shape, dtype=torch.float64) if draw and len(shape) > len(lead)
                 else torch.zeros(shape, dtype=torch.float64) for shape in shapes)  # fmt: skip


def one(states: tuple[Tensor, ...]) -> Any:
    """A state as a call takes it and gives it: one tensor, or a tuple."""
    return states if len(states) > 1 else states[0]


def steps(
    method: LSM, x: dict[str, Tensor], step: Callable[..., tuple[Any, Tensor]]
) -> tuple[Tensor, Any]:
    """A recurrence written by hand for one head, over all batches and heads."""
    size = sizes_of(method)["V"]
    o, finals = torch.zeros(B, T, HV, size, dtype=torch.float64), start(method, B, HV, draw=False)
    heads = {symbol.name: symbol for symbol in method.inputs}
    for b in range(B):
        for h in range(HV):
            memory = one(start(method, draw=False))
            for t in range(T):
                now = {}
                for name, value in x.items():
                    head = h // (HV // H) if heads[name].heads == "H" else h
                    now[name] = {"token": lambda x: x[b, t, head], "head": lambda x: x[head], "layer": lambda x: x}[  # noqa: B023
                        heads[name].per
                    ](value)
                memory, o[b, t, h] = step(memory, **now)
            for final, last in zip(finals, memory if isinstance(memory, tuple) else (memory,), strict=True):
                final[b, h] = last
    return o, one(finals)


def bla(memory, q, k, v):
    memory = memory + torch.outer(k, v)
    return memory, q @ memory


def retnet(memory, q, k, v, log_a):
    memory = log_a.exp() * memory + torch.outer(k, v)
    return memory, q @ memory


def gla(memory, q, k, v, g):
    memory = torch.diag(g.exp()) @ memory + torch.outer(k, v)
    return memory, q @ memory


def gated_deltanet(memory, q, k, v, g, beta):
    memory = g.exp() * memory
    memory = memory + beta * torch.outer(k, v - k @ memory)
    return memory, q @ memory


def kda(memory, q, k, v, g, beta):
    memory = torch.diag(g.exp()) @ memory
    memory = memory + beta * torch.outer(k, v - k @ memory)
    return memory, q @ memory


def rwkv6(memory, q, k, v, g, u):
    o = q @ (memory + torch.diag(u) @ torch.outer(k, v))
    return torch.diag(g.exp()) @ memory + torch.outer(k, v), o


def deltanet(memory, q, k, v, beta):
    memory = (torch.eye(K, dtype=torch.float64) - beta * torch.outer(k, k)) @ memory + beta * torch.outer(
        k, v
    )
    return memory, q @ memory


def rwkv7(memory, q, k, v, g, a, b):
    memory = torch.diag(g.exp()) @ memory + torch.outer(b, a @ memory) + torch.outer(k, v)
    return memory, q @ memory


def lightning(memory, q, k, v, log_a):
    memory = log_a.exp() * memory + torch.outer(k, v)
    return memory, q @ memory


def hgrn2(memory, q, v, g):
    forget = g.exp()
    memory = torch.diag(forget) @ memory + torch.outer(1 - forget, v)
    return memory, q @ memory


def ttt(memory, q, k, v, eta):
    at = memory.clone().requires_grad_()
    (slope,) = torch.autograd.grad((k @ at - v).square().sum() / 2, at)
    memory = memory - eta * slope
    return memory, q @ memory


def two_sided(memory, q, k, v, gk, gv):
    memory = torch.outer(gk.exp(), gv.exp()) * memory + torch.outer(k, v)
    return memory, q @ memory


def full(memory, q, k, v, A):
    memory = A * memory + torch.outer(k, v)
    return memory, q @ memory


def skip(memory, q, k, v, dt, A, D):
    memory = (A * dt).exp() * memory + dt * torch.outer(k, v)
    return memory, q @ memory + D * v


def nonlinear(memory, q, k, v, beta):
    memory = memory + beta * torch.outer(k, torch.tanh(v - k @ memory))
    return memory, q @ memory


def momentless(memory, q, k, v, alpha, theta):
    at = memory.clone().requires_grad_()
    (slope,) = torch.autograd.grad((k @ at - v).square().sum() / 2, at)
    return (1 - alpha) * memory - theta * slope, q @ ((1 - alpha) * memory - theta * slope)


def layer_norm(y, w, b):
    return w * (y - y.mean()) / (y.var(correction=0) + 1e-6).sqrt() + b


def ttt_ln(memory, q, k, v, eta, w, b, block=4):
    memory, bias, *start, seen = memory if len(memory) > 2 else (*memory, *memory, 0)
    at = [x.clone().requires_grad_() for x in start]
    loss = (layer_norm(k @ at[0] + at[1], w, b) - (v - k)).square().sum() / 2
    slopes = torch.autograd.grad(loss, at)
    memory, bias, seen = memory - eta * slopes[0], bias - eta * slopes[1], seen + 1
    if seen == block:
        start, seen = (memory, bias), torch.zeros(())
    return (memory, bias, *start, seen), q + layer_norm(q @ memory + bias, w, b)


def ttt_ln_sequential(memory, **inputs):
    memory, o = ttt_ln(memory, **inputs, block=1)
    return memory[:2], o


def titans(memory, q, k, v, alpha, eta, theta):
    memory, momentum = memory
    at = memory.clone().requires_grad_()
    (slope,) = torch.autograd.grad((k @ at - v).square().sum() / 2, at)
    momentum = eta * momentum - theta * slope
    memory = (1 - alpha) * memory + momentum
    return (memory, momentum), q @ memory


def gateloop(memory, q, k, v, g, theta):
    memory = torch.complex(*memory)
    memory = torch.diag(torch.exp(torch.complex(g, theta))) @ memory + torch.outer(k, v)
    return (memory.real, memory.imag), (q.to(memory.dtype) @ memory).real


def rebased(memory, q, k, v, gamma, beta):
    memory, z = memory

    def feature(x):
        x = gamma * x + beta
        return torch.outer(x, x).flatten()

    memory, z = memory + torch.outer(feature(k), v), z + feature(k)
    return (memory, z), feature(q) @ memory / (feature(q) @ z + 1e-6)


def s4(memory, v, b, c, dt, A, D):
    memory = (dt * A).exp() * memory + dt * torch.outer(b, v)
    return memory, c @ memory + D * v


def s4_complex(memory, v, b, c, dt, A, D, omega):
    memory = torch.exp(dt * torch.complex(A, omega)) * torch.complex(*memory) + dt * torch.outer(b, v)
    return (memory.real, memory.imag), (c.to(memory.dtype) @ memory).real + D * v


def mamba(memory, q, k, v, dt, A, D):
    return s4(memory, v, k, q, dt, A, D)


def softmaxed(memory, q, k, v):
    at = memory.clone().requires_grad_()
    (slope,) = torch.autograd.grad((torch.softmax(k @ at, -1) - v).square().sum(), at)
    memory = memory - slope
    return memory, torch.softmax(q, -1) @ memory


BY_HAND: list[tuple[LSM, Callable[..., tuple[Tensor, Tensor]]]] = [
    (lsmc.zoo.bla, bla),
    (lsmc.zoo.retnet, retnet),
    (lsmc.zoo.gla, gla),
    (lsmc.zoo.gated_deltanet, gated_deltanet),
    (lsmc.zoo.kda, kda),
    (lsmc.zoo.rwkv6, rwkv6),
    (lsmc.zoo.lightning, lightning),
    (lsmc.zoo.hgrn2, hgrn2),
    (lsmc.zoo.gateloop_real, gla),
    (lsmc.zoo.rwkv7, rwkv7),
    (lsmc.zoo.ttt, ttt),
    (lsmc.zoo.ttt_ln_sequential, ttt_ln_sequential),
    (LSM("in_blocks", block=4, update=Term(lsmc.zoo.ttt_ln.update), readout=Term(lsmc.zoo.ttt_ln.readout)), ttt_ln),
    (lsmc.zoo.gfw, two_sided),
    (lsmc.zoo.titans_plain, momentless),
    (lsmc.zoo.titans, titans),
    (lsmc.zoo.gateloop, gateloop),
    (lsmc.zoo.rebased, rebased),
    (lsmc.zoo.s4, s4),
    (lsmc.zoo.s4_complex, s4_complex),
    (lsmc.zoo.mamba, mamba),
    (lsmc.zoo.deltanet, deltanet),
    (lsmc.zoo.mamba2, skip),
    (
        LSM("delta", recurrence=(eye - scalar("beta") * outer(k, k)) @ M + scalar("beta") * outer(k, v)),
        deltanet,
    ),
    (lsmc.zoo.gfw_full, full),
    (
        LSM(
            "skip",
            decay=Matrix(scalar("dt") * matrix("A", per="head")),
            update=scalar("dt") * outer(k, v),
            readout=q @ M + vector("D", over="V", per="head") * v,
        ),
        skip,
    ),
    (LSM("nonlinear", update=scalar("beta") * outer(k, lsmc.tanh(v - k @ M))), nonlinear),
    (
        LSM(
            "momentless",
            recurrence=(1 - scalar("alpha")) * M - scalar("theta") * grad(norm2(k @ M - v) / 2, M),
        ),
        momentless,
    ),
    (
        LSM("softmaxed", update=-grad(norm2(lsmc.softmax(k @ M) - v), M), readout=lsmc.softmax(q) @ M),
        softmaxed,
    ),
]


@pytest.mark.parametrize("method, step", BY_HAND, ids=[method.name for method, _ in BY_HAND])
def test_the_oracle_equals_the_recurrence_written_by_hand(
    method: LSM, step: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x = draw(method)
    o, final = lsmc.reference(method)(**x, return_final_state=True)
    by_hand, memory = steps(method, x, step)
    torch.testing.assert_close(o, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, memory, rtol=1e-12, atol=1e-12)


def test_the_normaliser_is_the_memory_of_ones() -> None:
    phi = lsmc.elu(k) + 1
    beta = scalar("beta")
    update = beta * outer(phi, v - phi @ M.decayed)
    plain = LSM("m", decay=Vector("g"), update=update, readout=q @ M)
    both = LSM("n", decay=Vector("g"), update=update, readout=(q @ M) / (q @ M.normalizer))
    x = draw(plain)
    of_v = lsmc.reference(plain)(**x)
    of_one = lsmc.reference(plain)(**{**x, "v": torch.ones_like(x["v"])})
    o, (memory, z) = lsmc.reference(both)(**x, return_final_state=True)
    torch.testing.assert_close(o, of_v / of_one)
    assert memory.shape == (B, HV, K, V)
    assert z.shape == (B, HV, K)
    again = lsmc.reference(both)(**x, initial_state=(memory, z))
    assert again.isfinite().all()


# --- the canonical form says what was written

SCALARS = [scalar("s1"), lsmc.sigmoid(scalar("s2")), scalar("s3", per="head"), 0.5]
KEYS = [
    k,
    vector("a"),
    lsmc.silu(k),
    lsmc.elu(k) + 1,
    lsmc.l2norm(k),
    k * vector("a"),
    k + vector("a", per="token"),
    1 - 2 * k,
]
VALUES = [v, lsmc.tanh(v), v * vector("w", over="V", per="head"), lsmc.rmsnorm(v)]
DECAYS = [
    Identity(),
    Constant("log_a"),
    Scalar("g"),
    Vector("gk"),
    Vector("gv", over="V"),
    Vector("gk") * Vector("gv", over="V"),
    Matrix("A"),
]


@st.composite
def declarations(choose: st.DrawFn) -> LSM:
    decay = choose(st.sampled_from(DECAYS))
    update = None
    for _ in range(choose(st.integers(1, 3))):
        memory = choose(st.sampled_from([M, M.decayed]))
        value = choose(st.sampled_from(VALUES))
        kind = choose(st.sampled_from(["write", "delta", "bent", "project", "grad"]))
        key, other = choose(st.sampled_from(KEYS)), choose(st.sampled_from(KEYS))
        if kind == "write":
            term = outer(key, value)
        elif kind == "delta":
            term = outer(key, value - other @ memory)
        elif kind == "bent":
            term = outer(key, lsmc.sigmoid(value - other @ memory) * norm2(key @ memory))
        elif kind == "project":
            term = outer(key, other) @ memory + outer(key, value)
        else:
            term = -grad(lsmc.total(lsmc.softplus(key @ memory - value)), memory)
        term = choose(st.sampled_from(SCALARS)) * term
        update = term if update is None else update + term
    key = choose(st.sampled_from([q, lsmc.silu(q) + 1, q * vector("a")]))
    readout = choose(
        st.sampled_from(
            [
                q @ M,
                key @ M.previous,
                key @ (M.previous + outer(vector("u", per="head") * k, v)),
                key @ M.decayed + v * (q @ k),
            ]
        )
    )
    return LSM("drawn", decay=decay, update=update, readout=readout)


def as_written(method: LSM, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The declaration's own expressions, evaluated on whole memories, without the canonical form."""
    sizes = Sizes(**SIZES, N=B)
    memory = torch.zeros(B, HV, K, V, dtype=torch.float64)
    outputs = []
    for t in range(T):
        now: dict[Field, Tensor] = {}
        for symbol in method.inputs:
            value = x[symbol.name][:, t] if symbol.per == "token" else x[symbol.name][None]
            if symbol.heads == "H":
                value = value.repeat_interleave(HV // H, 1)
            value = value if "K" in symbol.dims else value.unsqueeze(2)
            now[symbol] = value if "V" in symbol.dims else value.unsqueeze(-1)
        inputs = _Evaluator(dict(now), sizes, torch.float64, memory.device)
        decayed = memory
        for part in (method.decay.log_k, method.decay.log_v, method.decay.log_kv):
            decayed = decayed if part is None else decayed * inputs(part).exp()
        places = {MEMORY["previous"]: memory, MEMORY["decayed"]: decayed}
        updated = decayed + _Evaluator(
            {**now, **places, MEMORY["current"]: memory}, sizes, torch.float64, memory.device
        )(method.update)
        o = _Evaluator({**now, **places, MEMORY["current"]: updated}, sizes, torch.float64, memory.device)(
            method.readout
        )
        outputs.append(o.expand(B, HV, 1, V)[:, :, 0])
        memory = updated
    return torch.stack(outputs, 1), memory


@given(declarations(), st.integers(0, 3))
def test_the_canonical_form_means_what_was_written(method: LSM, seed: int) -> None:
    x = draw(method, seed)
    o, final = lsmc.reference(method)(**x, return_final_state=True)
    written, memory = as_written(method, x)
    size = 1 + max(written.abs().max(), memory.abs().max())
    torch.testing.assert_close(o / size, written / size, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(final / size, memory / size, rtol=1e-9, atol=1e-11)


# --- splits, packing, heads, scale


@pytest.mark.parametrize("name", lsmc.zoo.names())
@given(split=st.integers(0, T))
def test_running_in_two_parts_equals_running_at_once(name: str, split: int) -> None:
    method = getattr(lsmc.zoo, name)
    x = draw(method)
    run = lsmc.reference(method)
    o, final = run(**x, return_final_state=True)
    tokens = {f.name for f in method.inputs if f.per == "token"}
    part = lambda i, j: {n: y[:, i:j] if n in tokens else y for n, y in x.items()}  # noqa: E731
    left, state = run(**part(0, split), return_final_state=True)
    right, state = run(**part(split, T), initial_state=state, return_final_state=True)
    assert torch.equal(torch.cat([left, right], 1), o)
    assert all(map(torch.equal, tensors(state), tensors(final)))


@pytest.mark.parametrize("name", lsmc.zoo.names())
def test_packed_sequences_equal_separate_ones_and_may_be_empty(name: str) -> None:
    method = getattr(lsmc.zoo, name)
    tokens = {f.name for f in method.inputs if f.per == "token"}
    x = {n: y[:1] if n in tokens else y for n, y in draw(method).items()}
    ends = [0, 2, 2, 5, T]
    states = start(method, 4, HV)
    o, state = lsmc.reference(method)(
        **x, cu_seqlens=torch.tensor(ends), initial_state=one(states), return_final_state=True
    )
    for n, (i, j) in enumerate(zip(ends, ends[1:], strict=False)):
        piece = {m: y[:, i:j] if m in tokens else y for m, y in x.items()}
        begin = one(tuple(s[n : n + 1] for s in states))
        alone, end = lsmc.reference(method)(**piece, initial_state=begin, return_final_state=True)
        assert torch.equal(o[:, i:j], alone)
        assert all(torch.equal(s[n : n + 1], e) for s, e in zip(tensors(state), tensors(end), strict=True))
    assert all(torch.equal(s[1], e[1]) for s, e in zip(tensors(state), states, strict=True))


@pytest.mark.parametrize("name", lsmc.zoo.names())
def test_no_tokens_leave_the_state_as_it_is(name: str) -> None:
    method = getattr(lsmc.zoo, name)
    x = draw(method, T=0)
    states = start(method, B, HV)
    o, state = lsmc.reference(method)(**x, initial_state=one(states), return_final_state=True)
    assert o.shape == (B, 0, HV, sizes_of(method)["V"])
    assert all(map(torch.equal, tensors(state), states))


def test_a_value_head_takes_its_groups_query_and_key_head() -> None:
    x = draw(lsmc.zoo.kda)
    wide = {n: y.repeat_interleave(HV // H, 2) if n in "qk" else y for n, y in x.items()}
    assert torch.equal(lsmc.reference(lsmc.zoo.kda)(**x), lsmc.reference(lsmc.zoo.kda)(**wide))


def test_the_scale_multiplies_every_query() -> None:
    x = draw(lsmc.zoo.rwkv6)
    run = lsmc.reference(lsmc.zoo.rwkv6)
    torch.testing.assert_close(run(**x, scale=0.5), 0.5 * run(**x))


def test_omitted_inputs_take_their_defaults() -> None:
    x = draw(lsmc.zoo.retnet)
    del x["log_a"]
    given_too = x | {
        "log_a": torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(HV)], dtype=torch.float64)
    }
    torch.testing.assert_close(
        lsmc.reference(lsmc.zoo.retnet)(**x), lsmc.reference(lsmc.zoo.retnet)(**given_too)
    )


def test_a_method_without_keys_takes_its_head_count_from_its_gates() -> None:
    method = LSM("m", decay=Vector("g"), update=outer(-lsmc.expm1(vector("g")), v))
    x = draw(method)
    assert lsmc.reference(method)(**x).shape == (B, T, HV, V)


# --- gates and gradients

GATES = [0.0, -1e-7, -1.0, -20.0, -1000.0, -1e4, -math.inf]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "kda", "rwkv6"])
def test_every_gate_gives_finite_outputs_and_gradients(name: str, gate: float) -> None:
    method = getattr(lsmc.zoo, name)
    x = draw(method)
    x["g"][:, 2:4] = gate
    leaves = {n: y.requires_grad_() for n, y in x.items()}
    o, state = lsmc.reference(method)(**leaves, return_final_state=True)
    (o.square().sum() + state.square().sum()).backward()
    assert o.isfinite().all()
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_a_gate_of_minus_infinity_forgets_everything_before_it() -> None:
    x = draw(lsmc.zoo.kda)
    x["g"][:, 3] = -math.inf
    late = {n: y[:, 3:] for n, y in x.items()}
    assert torch.equal(lsmc.reference(lsmc.zoo.kda)(**x)[:, 3:], lsmc.reference(lsmc.zoo.kda)(**late))


@pytest.mark.parametrize("name", ["kda", "rwkv6"])
def test_autograd_goes_through_the_oracle(name: str) -> None:
    method = getattr(lsmc.zoo, name)
    x = {n: y.requires_grad_() for n, y in draw(method, B=1, T=3, H=1, HV=2, K=2, V=2).items()}
    start = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state = values
        made: tuple[Tensor, Tensor] = lsmc.reference(method)(
            **dict(zip(x, inputs, strict=True)), initial_state=state, return_final_state=True
        )
        return made

    assert torch.autograd.gradcheck(run, (*x.values(), start))


def test_inputs_of_any_dtype_are_computed_in_the_asked_one() -> None:
    x = {n: y.bfloat16() for n, y in draw(lsmc.zoo.gla).items()}
    assert lsmc.reference(lsmc.zoo.gla)(**x).dtype == torch.float64
    assert lsmc.reference(lsmc.zoo.gla, dtype=torch.float32)(**x).dtype == torch.float32
    assert torch.equal(
        lsmc.reference(lsmc.zoo.gla)(**x),
        lsmc.reference(lsmc.zoo.gla)(**{n: y.double() for n, y in x.items()}),
    )


# --- the table of functions

POINTS = torch.tensor([-30.0, -3.0, -0.7, -1e-3, 1e-3, 0.4, 2.0, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_torch_source_is_the_oracles_function(name: str) -> None:
    x = POINTS.abs() if name in ("log", "log1p") else POINTS
    made = eval(FUNCTIONS[name].torch.format("(x)"), {"torch": torch, "x": x})
    torch.testing.assert_close(made, _TORCH[name](x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_derivative_is_the_derivative(name: str) -> None:
    x = (POINTS.abs() if name in ("log", "log1p") else POINTS).clone().requires_grad_()
    (slope,) = torch.autograd.grad((_TORCH[name](x) + 0 * x).sum(), x)
    symbol = Field("x")
    derivative = FUNCTIONS[name].cls(symbol).diff(symbol)
    made = _Evaluator({symbol: x.detach()}, Sizes(1, 1, 1, 1, 1, 1, 1), torch.float64, x.device)(derivative)
    torch.testing.assert_close(made.expand_as(x), slope, rtol=1e-12, atol=1e-14)
