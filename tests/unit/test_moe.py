"""The experts' operator against a dense loop, and the laws of routing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lsmc.lowering import moe as moe_operator
from lsmc.lowering.moe import moe_experts, moe_experts_op
from lsmc.models import ModelConfig, MoeConfig
from lsmc.models.moe import MixtureOfExperts


def dense(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Every expert on every token, weighted by what the router gave it."""
    y = torch.zeros_like(x)
    for expert in range(w_in.shape[0]):
        gate, up = (x @ w_in[expert].T).chunk(2, dim=-1)
        share = (weights * (experts == expert)).sum(1, keepdim=True)
        y = y + share * ((F.silu(gate) * up) @ w_out[expert].T)
    return y


def case(
    tokens: int = 11,
    k: int = 2,
    experts: int = 5,
    dim: int = 6,
    width: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    chosen = (
        torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k)
    )
    return (
        torch.randn(tokens, dim, dtype=dtype, requires_grad=True),
        torch.rand(tokens, k, dtype=dtype).requires_grad_(),
        chosen.to(torch.int64),
        torch.randn(experts, 2 * width, dim, dtype=dtype, requires_grad=True),
        torch.randn(experts, dim, width, dtype=dtype, requires_grad=True),
    )


def differentiable(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [t for t in inputs if t.is_floating_point()]


@pytest.mark.parametrize("tokens, k, experts", [(11, 2, 5), (1, 1, 1), (3, 2, 16), (40, 3, 3), (0, 2, 4)])
def test_experts_equal_the_dense_loop_with_every_gradient(tokens: int, k: int, experts: int) -> None:
    inputs = case(tokens, k, experts)
    dy = torch.randn_like(inputs[0])
    ours, theirs = moe_experts(*inputs), dense(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, differentiable(inputs), dy),
        torch.autograd.grad(theirs, differentiable(inputs), dy),
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_experts_without_tokens_get_zero_gradient() -> None:
    x, weights, experts, w_in, w_out = case(experts=6)
    experts = torch.where(experts >= 3, experts - 3, experts)
    moe_experts(x, weights, experts, w_in, w_out).sum().backward()
    assert w_in.grad is not None
    assert w_out.grad is not None
    assert not w_in.grad[3:].any()
    assert not w_out.grad[3:].any()


@pytest.mark.parametrize("path", ["grouped", "sliced", "masked"])
def test_every_way_of_multiplying_groups_agrees(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_operator, "_path", lambda *_: path)
    inputs = case(20, k=3, experts=6, dim=8, width=4, dtype=torch.float32)
    inputs[2][::3] = -1  # rows behind the last group
    inputs[2][inputs[2] == 4] = 2  # an empty group
    exact_inputs = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs)
    ours, exact = moe_experts(*inputs), dense(*exact_inputs)
    gradients = torch.autograd.grad(ours.sum(), differentiable(inputs))
    expected = torch.autograd.grad(exact.sum(), differentiable(exact_inputs))
    for a, b in zip((ours, *gradients), (exact, *expected)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nobody", [-1, 5, 99])
def test_an_index_outside_the_experts_contributes_nothing(nobody: int) -> None:
    x, weights, experts, w_in, w_out = case()
    experts[::2, 0] = nobody
    experts[3] = nobody
    ours = moe_experts(x, weights, experts, w_in, w_out)
    torch.testing.assert_close(ours, dense(x, weights, experts, w_in, w_out))
    ours.sum().backward()
    assert weights.grad is not None
    assert x.grad is not None
    assert not weights.grad[(experts < 0) | (experts >= 5)].any()
    assert not x.grad[3].any()


def test_an_expanded_gradient_is_the_same_as_a_dense_one() -> None:
    inputs = case()
    y = moe_experts(*inputs)
    one = torch.ones((), dtype=y.dtype)
    expanded = torch.autograd.grad(y, differentiable(inputs), one.expand_as(y), retain_graph=True)
    contiguous = torch.autograd.grad(y, differentiable(inputs), torch.ones_like(y))
    for a, b in zip(expanded, contiguous):
        assert torch.equal(a, b)


def test_gradcheck() -> None:
    x, weights, experts, w_in, w_out = case(tokens=4, experts=3, dim=3, width=2)
    assert torch.autograd.gradcheck(
        lambda x, p, a, b: moe_experts(x, p, experts, a, b), (x, weights, w_in, w_out)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(moe_experts_op, case(dtype=dtype))


def test_compiles_without_a_break_for_changing_token_counts() -> None:
    compiled = torch.compile(moe_experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 12, 30):
        inputs = case(tokens, dtype=torch.float32)
        ours, theirs = compiled(*inputs), moe_experts(*inputs)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours.square().sum(), differentiable(inputs)),
            torch.autograd.grad(theirs.square().sum(), differentiable(inputs)),
        ):
            torch.testing.assert_close(a, b)


def test_autocast_multiplies_in_bfloat16() -> None:
    inputs = case(64, dim=16, width=8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_experts(*inputs)
    assert y.dtype == torch.bfloat16
    exact = dense(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert (y - exact).norm() / exact.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_equals_the_dense_loop(dtype: torch.dtype, tolerance: float, compiled: bool) -> None:
    inputs = tuple(
        t.detach().cuda().requires_grad_(t.is_floating_point())
        for t in case(256, k=3, experts=8, dim=64, width=32, dtype=dtype)
    )
    inputs[2][::3] = -1
    run = torch.compile(moe_experts, fullgraph=True) if compiled else moe_experts
    torch.cuda.set_sync_debug_mode("error" if not compiled else "default")
    try:
        ours = run(*inputs)
        gradients = torch.autograd.grad(ours.sum(), differentiable(inputs))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact_inputs = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    exact = dense(*exact_inputs)
    expected = torch.autograd.grad(exact.sum(), differentiable(tuple(exact_inputs)))
    for a, b in zip((ours, *gradients), (exact, *expected)):
        assert (a - b).norm() / b.norm() < tolerance


def router(**options: object) -> MixtureOfExperts:
    moe = MixtureOfExperts(ModelConfig(hidden=8, moe=MoeConfig(experts=6, top_k=2, width=4, **options)))
    moe.initialise(0.5, 1)
    return moe


def test_routing_conserves_tokens() -> None:
    moe = router()
    weights, experts, statistics = moe.route(torch.randn(33, 8))
    assert experts.shape == (33, 2)
    assert (experts[:, 0] != experts[:, 1]).all()
    torch.testing.assert_close(statistics.load.sum(), torch.tensor(1.0))
    counted = torch.bincount(experts.flatten(), minlength=6) / 66
    torch.testing.assert_close(statistics.load, counted)
    assert (weights.sum(1) < 1).all()


def test_renormalised_weights_sum_to_one() -> None:
    weights, *_ = router(renormalise=True).route(torch.randn(33, 8))
    torch.testing.assert_close(weights.sum(1), torch.ones(33))


def test_losses_have_their_least_value_when_routing_is_even() -> None:
    moe = router()
    with torch.no_grad():
        moe.router.weight.zero_()
    even = moe.route(torch.randn(50, 8))[2]
    torch.testing.assert_close(even.balance, torch.tensor(1.0))
    torch.testing.assert_close(even.z, torch.tensor(6.0).log().square())
    with torch.no_grad():
        moe.router.weight[:2] = 10.0
    assert moe.route(torch.rand(50, 8))[2].balance > 2


def test_the_router_learns_from_the_output_and_from_both_losses() -> None:
    moe = router()
    x = torch.randn(20, 8)
    for pick in ("output", "balance", "z"):
        y, statistics = moe(x)
        target = {"output": y.square().sum(), "balance": statistics.balance, "z": statistics.z}[pick]
        (gradient,) = torch.autograd.grad(target, moe.router.weight)
        assert gradient.norm() > 0, pick


def test_a_shared_expert_sees_every_token() -> None:
    moe = router(shared_width=3)
    x = torch.randn(5, 7, 8)
    with_it = moe(x)[0]
    shared, moe.shared = moe.shared, None
    assert shared is not None
    torch.testing.assert_close(with_it, moe(x)[0] + shared(x))
