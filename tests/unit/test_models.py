"""Laws of the hybrid model, for every method of the zoo and for one that the tree does not know."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sympy
import torch

import lsmc
from lsmc import zoo
from lsmc.models import HybridMoE, Losses, ModelConfig, MoeConfig, config
from lsmc.models.blocks import Attention, LinearMixer, ShortConvolution, _signs, describe
from lsmc.runtime.errors import LsmConfigError

SMALL = ModelConfig(
    pattern="LN",
    hidden=24,
    heads=2,
    value_heads=4,
    head_dim=6,
    value_dim=5,
    vocabulary=31,
    gate_rank=4,
    moe=MoeConfig(experts=4, top_k=2, width=8),
)
OWN = lsmc.LSM(
    "own",
    decay=lsmc.Scalar("forget"),
    update=lsmc.scalar("strength") * lsmc.outer(lsmc.k, lsmc.v - lsmc.k @ lsmc.M.decayed),
)
METHODS = [*zoo.names(), OWN]


def small(lsm: Any, **changes: Any) -> HybridMoE:
    square = (getattr(zoo, lsm) if isinstance(lsm, str) else lsm).canonical.square
    changes |= {"value_dim": SMALL.head_dim} if square else {}
    model = HybridMoE(dataclasses.replace(SMALL, lsm=lsm, **changes)).double()
    for parameter in model.parameters():  # far from the initial values, where much is nearly zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def identify(method: Any) -> str:
    return method if isinstance(method, str) else method.name


@pytest.mark.parametrize(
    "name, layers, total, active",
    [("a0.3b-2b", 12, 2.49e9, 0.33e9), ("a1b-7b", 16, 7.40e9, 1.14e9)],
)
def test_the_large_sizes_have_the_published_parameter_counts(
    name: str, layers: int, total: float, active: float
) -> None:
    with torch.device("meta"):
        model = HybridMoE(config(name))
    counts = model.parameter_counts()
    assert len(model.blocks) == layers
    assert counts[0] == pytest.approx(total, abs=0.005e9)
    assert counts[1] == pytest.approx(active, abs=0.005e9)
    assert counts[0] == sum(p.numel() for p in model.parameters())


def test_a_hybrid_pattern_keeps_the_size() -> None:
    with torch.device("meta"):
        model = HybridMoE(config("a0.3b-2b", pattern="LLLNLLLNLLLN"))
    assert [type(b.mixer) for b in model.blocks] == [*[LinearMixer] * 3, Attention] * 3
    assert model.parameter_counts()[0] == pytest.approx(2.49e9, abs=0.005e9)


@pytest.mark.parametrize("method", METHODS, ids=identify)
def test_decoding_equals_the_parallel_forward(method: Any) -> None:
    model = small(method).eval()
    tokens = torch.randint(0, 31, (2, 21))
    with torch.no_grad():
        whole = model(tokens)
        first, state = model.prefill(tokens[:, :7])
        second, state = model.prefill(tokens[:, 7:12], state)
        rest = []
        for t in range(12, 21):
            logits, state = model.step(tokens[:, t], state)
            rest.append(logits)
    torch.testing.assert_close(
        torch.cat([first, second, torch.stack(rest, 1)], 1), whole, rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("method", METHODS, ids=identify)
def test_no_output_looks_ahead(method: Any) -> None:
    model = small(method).eval()
    tokens = torch.randint(0, 31, (1, 20))
    other = tokens.clone()
    other[0, 13] = (other[0, 13] + 1) % 31
    with torch.no_grad():
        a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :13], b[:, :13], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(a[:, 13:], b[:, 13:])


@pytest.mark.parametrize("method", METHODS, ids=identify)
def test_every_parameter_learns(method: Any) -> None:
    model = small(method)
    losses = model(torch.randint(0, 31, (2, 33)), torch.randint(0, 31, (2, 33)))
    assert isinstance(losses, Losses)
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("method", [m.name for m in zoo.METHODS if any(f.per != "token" for f in m.inputs)])
def test_constants_learn_from_where_they_start(method: str) -> None:
    model = HybridMoE(dataclasses.replace(SMALL, lsm=method, value_dim=SMALL.head_dim)).double()
    model(torch.randint(0, 31, (2, 33)), torch.randint(0, 31, (2, 33))).total.backward()
    for name, parameter in model.blocks[0].mixer.constants.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("method", METHODS, ids=identify)
def test_inputs_have_the_shapes_and_ranges_that_the_declaration_needs(method: Any) -> None:
    mixer = small(method).blocks[0].mixer
    values, _, _ = mixer._inputs(5 * torch.randn(2, 9, 24, dtype=torch.float64), None, advance=False)
    for i in mixer.inputs:
        if i.name not in values:
            assert i.per != "token"  # left to the declaration's default
            continue
        value = values[i.name]
        sizes = {"B": 2, "T": 9, "H": 2, "HV": 4, "K": 6, "V": mixer.sizes["V"]}
        field = next(f for f in mixer.declaration.canonical.inputs if f.name == i.name)
        assert value.shape == tuple(sizes[part] for part in field.parts)
        if i.role == "decay" and i.sign < 0:
            assert (value <= 0).all()
        if i.role == "strength":
            assert ((value >= 0) & (value <= 1)).all()
        if i.role == "key" and mixer.reads:
            torch.testing.assert_close(value.norm(dim=-1), torch.ones(value.shape[:-1], dtype=value.dtype))


class _Symbol(sympy.Symbol):
    """A symbol with the one attribute that the rule reads."""

    def __new__(cls, name: str, per: str = "token") -> _Symbol:
        made = super().__new__(cls, name)
        made.per = per
        return made


def test_signs_of_decay_inputs_are_the_least_that_keep_the_log_decay_from_growing() -> None:
    g, dt, a = _Symbol("g"), _Symbol("dt"), _Symbol("a", "head")
    assert _signs(g, [g]) == {"g": -1}
    assert _signs(-g, [g]) == {"g": +1}
    assert _signs(a * dt, [a, dt]) == {"a": -1, "dt": +1}
    assert _signs(-sympy.exp(g), [g]) == {"g": 0}
    assert _signs(-sympy.exp(a) * dt, [a, dt]) == {"a": 0, "dt": +1}


def test_roles_follow_the_declaration_alone() -> None:
    roles = {i.name: i.role for i in describe(OWN)}
    assert roles == {"q": "key", "k": "key", "v": "value", "forget": "decay", "strength": "strength"}


def test_recomputing_activations_changes_no_gradient() -> None:
    tokens, targets = torch.randint(0, 31, (2, 2, 16)).unbind()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = small(OWN, activation_checkpointing=recompute)
        model(tokens, targets).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_without_a_convolution_decoding_still_agrees() -> None:
    model = small(OWN, convolution=0).eval()
    tokens = torch.randint(0, 31, (1, 9))
    with torch.no_grad():
        logits, state = model.prefill(tokens[:, :8])
        last, _ = model.step(tokens[:, 8], state)
        torch.testing.assert_close(last, model(tokens)[:, -1], rtol=1e-9, atol=1e-10)


def test_the_short_convolution_is_a_causal_depthwise_convolution() -> None:
    convolution = ShortConvolution(5, 4)
    convolution.initialise()
    x = torch.randn(2, 11, 5)
    kernel = convolution.weight.T.unsqueeze(1)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, kernel, groups=5)).transpose(1, 2)
    torch.testing.assert_close(convolution(x), expected)


def test_rotary_scores_depend_on_distance_alone() -> None:
    attention = Attention(SMALL)
    q, k = torch.randn(2, 1, 2, 1, 6).unbind()
    near = (attention._rotate(q, 9) * attention._rotate(k, 4)).sum()
    far = (attention._rotate(q, 105) * attention._rotate(k, 100)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


def test_losses_are_put_together_as_configured() -> None:
    moe = dataclasses.replace(SMALL.moe, balance_loss=0.5, z_loss=0.25)
    model = small(OWN, moe=moe)
    losses = model(torch.randint(0, 31, (1, 8)), torch.randint(0, 31, (1, 8)))
    torch.testing.assert_close(losses.total, losses.nll + 0.5 * losses.balance + 0.25 * losses.z)
    torch.testing.assert_close(losses.load.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"pattern": "LX"}, "pattern"),
        ({"pattern": ""}, "pattern"),
        ({"heads": 7}, "heads"),
        ({"value_heads": 3}, "value_heads"),
        ({"moe": {"top_k": 9}}, "moe"),
        ({"hiden": 8}, "hiden"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(LsmConfigError, match=field):
        config("tiny", **changes)


def test_an_unknown_size_is_answered_with_the_known_ones() -> None:
    with pytest.raises(LsmConfigError, match="a0.3b-2b"):
        config("huge")
