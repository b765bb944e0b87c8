"""Laws of a declaration's operator: whatever the sizes, strides, types and gates, it is the recurrence and its gradients."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lsmc
from lsmc import LSM, M, Scalar, Vector, errors, k, outer, q, reference, vector
from lsmc.cases import GATES, Case, Sample, sample, tensors
from lsmc.lowering import ops
from lsmc.lowering.torch_private import unseen
from lsmc.pipeline import Options, compile_plan
from tests.declarations import Drawn, declarations

normalised = LSM(
    "normalised",
    decay=Vector("g"),
    update=outer(lsmc.exp(k / 2), lsmc.v),
    readout=(lsmc.exp(q / 2) @ M) / (lsmc.exp(q / 2) @ M.normalizer + 1),
)
two_sided = LSM(
    "two_sided",
    decay=Vector("g") * Vector("h", over="V"),
    update=outer(lsmc.softmax(k), lsmc.v),
    readout=lsmc.sigmoid(vector("z", over="V")) * (q @ M),
)
without_q_k_v = LSM(
    "without_q_k_v",
    decay=Scalar("g"),
    update=outer(vector("a"), vector("u", over="V", per="head")),
    readout=vector("p") @ M,
)
METHODS = (*lsmc.zoo.METHODS, normalised, two_sided, without_q_k_v)
BOTH = (lsmc.zoo.kda, normalised)
"""A method that reads what it wrote, with value heads that share a key; one with two states."""


def each(*methods: LSM) -> Any:
    return pytest.mark.parametrize("op", methods, ids=[op.name for op in methods])


def run(op: Any, inputs: dict[str, Tensor], state: Any = None, **options: Any) -> list[Tensor]:
    """The output, then the final state's tensors."""
    o, final = op(**inputs, initial_state=state, return_final_state=True, **options)
    return [o, *tensors(final)]


def gradients(outputs: list[Tensor], leaves: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of a random projection of all outputs with weights representable in `dtype`; zeros where nothing flows."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype).to(x.dtype) for x in outputs]
    pairs = [(x, w) for x, w in zip(outputs, weights) if x.requires_grad]
    found = torch.autograd.grad([x for x, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def both(op: Any, drawn: Sample, **options: Any) -> list[Tensor]:
    """Outputs, then all gradients."""
    outputs = run(op, drawn.inputs, drawn.state, **options)
    return [*outputs, *gradients(outputs, drawn.leaves())]


def ratio(x: Tensor, y: Tensor) -> float:
    """RMS of the difference over RMS of what is wanted."""
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).square().mean().sqrt() / y.detach().square().mean().sqrt().clamp(min=1e-3)) if y.numel() else 0.0


@contextlib.contextmanager
def asked() -> Iterator[list[list[bool]]]:
    """Which gradients each call of `lsmc::bwd`, or of what it does, is asked for meanwhile."""
    seen: list[list[bool]] = []

    def noted(function: Any) -> Any:
        def call(*args: Any) -> list[Tensor]:
            seen.append(list(args[6]))
            return function(*args)
        return call

    with patch.multiple(ops, bwd=noted(ops.bwd), backward=noted(ops.backward)):
        yield seen


def packed(*ends: int) -> dict[str, Any]:
    """The option that packs sequences which end there; none without any."""
    return {"cu_seqlens": torch.tensor([0, *ends], dtype=torch.int32)} if ends else {}


# --- what torch asks of an operator


ENDS = (4, 4, 9)


def operator_arguments(op: LSM, ends: tuple[int, ...], state: bool) -> tuple[Any, ...]:
    """What `lsmc::fwd` takes: several chunks of 4, value heads that share a key."""
    case = Case(batch=1 if ends else 2, time=9, groups=2, key_dim=3, value_dim=2, initial_state=state)
    drawn = sample(op, case, batch=len(ends) or None)
    spec = ops.register(compile_plan(op.canonical, Options(chunk=4)))
    start = [s if s.ndim == 4 else s.detach()[..., None].requires_grad_() for s in tensors(drawn.state)]
    return [drawn.inputs[f.name] for f in op.canonical.inputs], start, packed(*ends).get("cu_seqlens"), spec


def opcheck(op: LSM, ends: tuple[int, ...], state: bool, *tests: str) -> None:
    inputs, start, cu, spec = operator_arguments(op, ends, state)
    torch.library.opcheck(torch.ops.lsmc.fwd.default, (inputs, start, cu, spec), test_utils=tests)
    torch.library.opcheck(torch.ops.lsmc.fwd.default, (inputs, start, cu, spec + ops.KEEP), test_utils=tests)
    o, *rest = (x.detach() for x in torch.ops.lsmc.fwd(inputs, start, cu, spec + ops.KEEP))
    ends = len(ops.plan_of(spec).carries)
    values = [x.detach() for x in inputs], [x.detach() for x in start]
    for wanted in ([True] * len(inputs), [n % 2 == 0 for n in range(len(inputs))]):
        given = (*values, cu, o, rest[:ends], rest[ends:], wanted, spec)
        torch.library.opcheck(torch.ops.lsmc.bwd.default, given, test_utils=tests)


@given(drawn=declarations(), ends=st.sampled_from([(), ENDS]), state=st.booleans())
@settings(max_examples=8)
def test_torch_finds_no_fault_with_the_operators(drawn: Drawn, ends: tuple[int, ...], state: bool) -> None:
    """`opcheck` of lsmc::fwd and lsmc::bwd: schema, registration of autograd, fakes."""
    opcheck(drawn.declaration(), ends, state, "test_schema", "test_autograd_registration", "test_faketensor")


def test_torch_traces_the_operators_with_symbolic_sizes() -> None:
    opcheck(normalised, ENDS, True, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("ends", [(), (3, 3, 5)], ids=["batch", "packed"])
@each(*METHODS)
def test_gradients_equal_finite_differences(op: LSM, ends: tuple[int, ...]) -> None:
    """Every input, gates and initial states too, over several chunks and for value heads that share a key."""
    case = Case(batch=1 if ends else 2, time=5, groups=2, key_dim=2, value_dim=3, initial_state=True)
    drawn = sample(op, case, batch=len(ends) or None)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        state = leaves[len(drawn.inputs) :]
        return tuple(run(op, dict(zip(drawn.inputs, leaves)), state[0] if len(state) == 1 else state, chunk=2, **packed(*ends)))

    assert torch.autograd.gradcheck(function, drawn.leaves(), check_undefined_grad=not ends, fast_mode=True)


@given(drawn=declarations(), flags=st.lists(st.booleans(), min_size=12, max_size=12))
def test_gradients_of_some_inputs_are_those_of_all(drawn: Drawn, flags: list[bool]) -> None:
    """And no others are worked out."""
    op = drawn.declaration()
    given = sample(op, Case(batch=2, time=9, groups=2, key_dim=3, value_dim=2, initial_state=True))
    wanted = dict(zip(given.inputs, flags))
    some = {n: x.detach().requires_grad_(wanted[n]) for n, x in given.inputs.items()}
    leaves = [x for x in some.values() if x.requires_grad] + tensors(given.state)
    with asked() as seen:
        found = gradients(run(op, some, given.state, chunk=4), leaves)
    every = gradients(run(op, given.inputs, given.state, chunk=4), given.leaves())
    named = dict(zip([*given.inputs, *range(len(tensors(given.state)))], every))
    for x, y in zip(found, [g for n, g in named.items() if wanted.get(n, True)], strict=True):
        torch.testing.assert_close(x, y)
    assert seen == [[*wanted.values()]]


class Names(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@each(lsmc.zoo.kda, lsmc.zoo.deltanet, lsmc.zoo.mamba)
def test_a_mode_sees_the_operators_and_without_one_their_bodies_give_the_same(op: LSM) -> None:
    given = sample(op, Case(batch=2, time=9, groups=2, key_dim=3, value_dim=2, initial_state=True))

    def everything() -> list[Tensor]:
        outputs = run(op, given.inputs, given.state, chunk=4)
        return [*outputs, *gradients(outputs, given.leaves())]

    with Names() as names:
        seen = everything()
    assert {"lsmc.fwd.default", "lsmc.bwd.default"} <= {*names.seen}
    with patch.object(ops, "bwd", None):
        direct = everything()
    assert "Unseen" in direct[0].grad_fn.name()
    for x, y in zip(seen, direct, strict=True):
        assert torch.equal(x, y)


@each(lsmc.zoo.gla)
def test_views_that_negate_go_by_the_operator(op: LSM) -> None:
    """Their numbers in memory have the other sign, which the dispatcher sees to and a kernel would not."""
    given = sample(op, Case(batch=1, time=9, key_dim=3, value_dim=2))
    negated = {n: torch.complex(torch.zeros_like(x), -x.detach()).conj().imag for n, x in given.inputs.items()}
    assert all(x.is_neg() for x in negated.values())
    assert not unseen(negated.values())
    assert unseen(given.inputs.values())
    torch.testing.assert_close(op(**negated), op(**given.inputs))


def test_graphs_ask_for_the_gradients_that_are_wanted() -> None:
    op = lsmc.zoo.mamba2
    given = sample(op, Case(batch=2, time=9, key_dim=3, value_dim=2))
    inputs = {n: x.detach().requires_grad_(n in ("q", "v")) for n, x in given.inputs.items()}
    leaves = [inputs["q"], inputs["v"]]
    with asked() as seen:
        found = gradients(torch.compile(run, backend="aot_eager", fullgraph=True)(op, inputs), leaves)
    assert seen == [[n in ("q", "v") for n in inputs]]
    for x, y in zip(found, gradients(run(op, inputs), leaves), strict=True):
        torch.testing.assert_close(x, y)


@each(*BOTH)
def test_a_second_derivative_is_refused_in_words(op: LSM) -> None:
    drawn = sample(op, Case(time=5, key_dim=2, value_dim=2))
    (dv,) = torch.autograd.grad(op(**drawn.inputs).sum(), drawn.inputs["v"], create_graph=True)
    with pytest.raises(errors.LsmDerivativeError, match="first derivatives"):
        torch.autograd.grad(dv.sum(), drawn.inputs["q"])


@each(*BOTH)
def test_outputs_are_new_tensors(op: LSM) -> None:
    """Nothing that comes out shares memory with what went in, even when no token is there to change it."""
    for T in (0, 3):
        drawn = sample(op, Case(time=T, key_dim=2, value_dim=2, initial_state=True))
        ins = {x.untyped_storage().data_ptr() for x in drawn.leaves() if x.numel()}
        outs = [x for x in run(op, drawn.inputs, drawn.state) if x.numel()]
        assert not ins & {x.untyped_storage().data_ptr() for x in outs}
        assert all(x.is_contiguous() for x in outs)


# --- sizes and strides


SIZES = {
    "no token": Case(batch=2, time=0, heads=2, key_dim=3, value_dim=2),
    "no sequence": Case(batch=0, time=5, heads=2, key_dim=3, value_dim=2),
    "one token": Case(time=1, key_dim=3, value_dim=2),
    "one key": Case(time=20, key_dim=1, value_dim=4),
    "one value": Case(time=20, key_dim=4, value_dim=1),
    "odd sizes": Case(batch=3, time=37, heads=3, key_dim=5, value_dim=7),
    "grouped heads": Case(batch=2, time=37, heads=2, groups=3, key_dim=5, value_dim=3),
}


FROM = {"no token": "state", "no sequence": "state", "one token": "state", "odd sizes": "state none"}
"""Whether a size is tested from a state that is given, from none (else), or both ways."""


@pytest.mark.parametrize(
    "size, state", [pytest.param(size, state == "state", id=f"{size}-{state}") for size in SIZES for state in FROM.get(size, "none").split()])
@each(*METHODS)
def test_the_operator_is_the_recurrence_at_every_size(op: LSM, size: str, state: bool) -> None:
    drawn = sample(op, vary(SIZES[size], initial_state=state))
    wanted, found = both(reference(op), drawn), both(op, drawn)
    assert [x.shape for x in found] == [x.shape for x in wanted]
    assert max(map(ratio, found, wanted)) < 1e-10


def vary(case: Case, **changes: Any) -> Case:
    return Case(**{**vars(case), **changes})


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x,
    "a slice of a wider tensor": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "every second token": lambda x: x.repeat_interleave(2, 1)[:, ::2] if x.dim() > 2 else x,
    "one token for all": lambda x: x[:, :1].expand_as(x) if x.dim() > 2 else x,
    "one head for all": lambda x: x[:, :, :1].expand_as(x) if x.dim() > 2 else x,
}


@pytest.mark.parametrize("stride", STRIDES)
@each(*BOTH)
def test_strides_change_nothing(op: LSM, stride: str) -> None:
    """Transposed, sliced and expanded inputs give what their contiguous copies give, to the last bit."""
    drawn = sample(op, Case(batch=2, time=21, heads=2, key_dim=3, value_dim=5, initial_state=True))
    views = {name: STRIDES[stride](x.detach()) for name, x in drawn.inputs.items()}
    assert any(not x.is_contiguous() for x in views.values())
    seen = []
    for copy in (torch.Tensor.detach, torch.Tensor.contiguous):
        inputs = {name: copy(x).requires_grad_() for name, x in views.items()}
        outputs = run(op, inputs, drawn.state)
        seen.append([*outputs, *gradients(outputs, [*inputs.values(), *tensors(drawn.state)])])
    assert all(torch.equal(x, y) for x, y in zip(*seen))


# --- dtypes and gates


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "op, gates", [pytest.param(op, gates, id=f"{op.name}-{gates}") for op in lsmc.zoo.METHODS
                  for gates in (GATES if op.canonical.decays else ["typical"])])  # fmt: skip
def test_the_zoo_agrees_with_the_recurrence_for_every_gate(op: LSM, gates: str, dtype: torch.dtype) -> None:
    """Output, state and gradients, for log decays from 0 to −1000, spikes and resets; packed, over three chunks."""
    case = Case(time=150, heads=2, groups=2, key_dim=8, value_dim=8, gates=gates, initial_state=True)
    found, wanted = rounded(op, case, dtype, 70, 70, 150)
    for name, (x, y) in pairs(op, found, wanted).items():
        assert torch.isfinite(x).all(), name
        assert ratio(x, y) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each(*METHODS)
def test_16_bit_inputs_agree_with_the_recurrence_on_the_same_values(op: LSM, dtype: torch.dtype) -> None:
    """RMS ratio 5e-3 for output and state, 8e-3 for gradients, 2e-2 for gates; no row above ten times that."""
    case = Case(batch=2, time=100, heads=2, key_dim=16, value_dim=16, initial_state=True)
    found, wanted = rounded(op, case, dtype)
    gates = {f.name for d in (op.canonical.decay_k, op.canonical.decay_v) if d is not None for f in d.free_symbols}
    for name, (x, y) in pairs(op, found, wanted).items():
        limit = 2e-2 if name in gates else 8e-3 if name in drawn_names(op) else 5e-3
        assert ratio(x, y) < limit, name
        if y.dim() == 4:
            rows = (x.detach().double() - y.detach()).square().mean(-1).sqrt() / y.detach().square().mean().sqrt()
            assert float(rows.max()) < 10 * limit, name


def drawn_names(op: LSM) -> list[str]:
    return [f.name for f in op.canonical.inputs]


def rounded(op: LSM, case: Case, dtype: torch.dtype, *ends: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the operator in `dtype`, and of the recurrence in float64 on the same rounded values."""
    drawn = sample(op, case, batch=len(ends) or None)
    state_dtype = ops.state_dtype(dtype)

    def at(name: str, x: Tensor, wide: bool) -> Tensor:
        x = x.detach().to(dtype if name else state_dtype)
        return (x.double() if wide else x).requires_grad_()

    seen = []
    for wide in (False, True):
        inputs = {name: at(name, x, wide) for name, x in drawn.inputs.items()}
        states = [at("", x, wide) for x in tensors(drawn.state)]
        outputs = run(reference(op) if wide else op, inputs, states[0] if len(states) == 1 else tuple(states), **packed(*ends))
        assert wide or [x.dtype for x in outputs] == [dtype, *[state_dtype] * len(states)]
        found = gradients(outputs, [*inputs.values(), *states], dtype)
        assert [x.dtype for x in found] == [x.dtype for x in (*inputs.values(), *states)]
        seen.append([*outputs, *found])
    return seen[0], seen[1]


def pairs(op: LSM, found: list[Tensor], wanted: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    states = [f.name for f in op.canonical.states]
    names = ["the output", *states, *drawn_names(op), *(f"d{name}0" for name in states)]
    return dict(zip(names, zip(found, wanted, strict=True), strict=True))


@each(*BOTH)
def test_autocast_casts_queries_keys_and_values_only(op: LSM) -> None:
    """As if q, k, v had been cast by hand: gates and memories keep their precision, gradients their type."""
    drawn = sample(op, Case(batch=2, time=20, heads=2, key_dim=4, value_dim=4, initial_state=True))
    leaves = [x.detach().float().requires_grad_() for x in drawn.leaves()]
    inputs, state = dict(zip(drawn.inputs, leaves)), leaves[len(drawn.inputs) :]
    start = state[0] if len(state) == 1 else tuple(state)
    with torch.autocast("cpu", torch.bfloat16):
        auto = run(op, inputs, start)
        assert op(**sample(op, Case(time=3)).inputs).dtype == torch.float64
    hand = run(op, {n: x.bfloat16() if n in "qkv" else x for n, x in inputs.items()}, start)
    assert [x.dtype for x in auto] == [torch.bfloat16, *[torch.float32] * len(state)]
    assert all(torch.equal(x, y) for x, y in zip(auto, hand))
    dx, dy = gradients(auto, leaves), gradients(hand, leaves)
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(dx, dy))


@given(drawn=declarations(), ends=st.sampled_from([(), ENDS]))
@settings(max_examples=8)
def test_recomputing_gives_the_same_numbers_and_holds_inputs_only(drawn: Drawn, ends: tuple[int, ...]) -> None:
    """What the forward keeps for the backward is what the backward else works out again."""
    op, case = drawn.declaration(), Case(batch=1 if ends else 2, time=9, groups=2, key_dim=3, value_dim=2, initial_state=True)
    given = sample(op, case, batch=len(ends) or None)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        again = both(op, given, chunk=4, recompute=True, **packed(*ends))
    for x, y in zip(both(op, given, chunk=4, **packed(*ends)), again, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-10)
    known = [*given.inputs.values(), *tensors(given.state)]
    assert all(any(x.numel() == y.numel() for y in known) for x in held if x.is_floating_point())


@each(*METHODS)
def test_schedule_and_chunk_length_are_free_choices(op: LSM) -> None:
    drawn = sample(op, Case(time=45, heads=2, key_dim=3, value_dim=4, initial_state=True))
    wanted = both(op, drawn)
    for chunk, schedule in ((1, "fused"), (8, "two_pass"), (64, "two_pass")):
        assert max(map(ratio, both(op, drawn, chunk=chunk, schedule=schedule), wanted)) < 1e-10


def test_a_bias_is_the_row_of_a_key_that_is_1() -> None:
    """Appending 1 to keys and queries gives the same outputs, and the same rows of the state."""
    beta, g = lsmc.scalar("beta"), Scalar("g")
    plain = LSM("m", decay=g, update=beta * outer(k, lsmc.v - k @ M.decayed))
    biased = LSM("m", decay=g, update=beta * outer(k, lsmc.v - k @ M.decayed - M.bias.decayed), readout=q @ M + M.bias)
    x = {n: x.detach() for n, x in sample(plain, Case(time=21, groups=2, key_dim=3, value_dim=2)).inputs.items()}
    x["k"] = 0.5 * x["k"]
    wide = {n: torch.cat([y, torch.ones_like(y[..., :1])], -1) if n in ("q", "k") else y for n, y in x.items()}
    o, state, bias = run(biased, x, chunk=8)
    wanted, rows = run(plain, wide)
    assert ratio(o, wanted) < 1e-10
    assert ratio(torch.cat([state, bias[:, :, None]], -2), rows) < 1e-10


def test_pairs_are_the_products_of_their_entries() -> None:
    """A memory of pairs is that of keys and queries whose entries were multiplied before."""
    plain = LSM("m", decay=Scalar("g"), update=outer(k, lsmc.v))
    paired = LSM("m", decay=Scalar("g"), update=outer(lsmc.pairs(k), lsmc.v), readout=lsmc.pairs(q) @ M)
    x = sample(plain, Case(time=21, groups=2, key_dim=3, value_dim=2)).inputs
    wide = {n: (y[..., :, None] * y[..., None, :]).flatten(-2) if n in ("q", "k") else y for n, y in x.items()}
    both_ways = [run(paired, x, chunk=8), run(plain, wide)]
    found, wanted = ([*outputs, *gradients(outputs, list(x.values()))] for outputs in both_ways)
    assert max(map(ratio, found, wanted)) < 1e-10


def test_a_normaliser_is_corrected_by_what_it_reads_of_itself() -> None:
    """As the memory of v = 1, under a delta rule beside another write."""
    phi = lsmc.elu(k) + 1
    delta = lsmc.scalar("beta") * outer(phi, lsmc.v - phi @ M.decayed)
    op = LSM("m", decay=Vector("g"), update=delta + outer(lsmc.exp(k), lsmc.v), readout=(q @ M) / (q @ M.normalizer + 100))
    drawn = sample(op, Case(time=21, groups=2, key_dim=3, value_dim=2, initial_state=True))
    assert max(map(ratio, both(op, drawn, chunk=8), both(reference(op), drawn))) < 1e-10


def test_omitted_inputs_take_their_defaults() -> None:
    op = lsmc.zoo.retnet
    drawn = sample(op, Case(time=9, heads=2, groups=2, key_dim=3, value_dim=2, defaults=True))
    assert ratio(op(**drawn.inputs), reference(op)(**drawn.inputs)) < 1e-10


# --- mistakes


def kda_inputs() -> dict[str, Any]:
    drawn = sample(lsmc.zoo.kda, Case(batch=2, time=3, heads=2, groups=2, key_dim=5, value_dim=6))
    return {name: x.detach() for name, x in drawn.inputs.items()}


def one_sequence(given: dict[str, Any], *ends: int) -> None:
    given.update({name: x[:1] for name, x in given.items()}, cu_seqlens=torch.tensor(ends))


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], type[errors.LsmError], str]] = {
    "missing": (lambda a: a.pop("g"), errors.LsmMissingInputError, "'g'"),
    "unexpected": (lambda a: a.update(gate=a["g"]), errors.LsmUnexpectedInputError, "'gate'"),
    "shape": (lambda a: a.update(k=a["k"][..., :-1]), errors.LsmShapeError, "'k'"),
    "heads": (lambda a: a.update(q=a["q"][:, :, :1]), errors.LsmShapeError, "'k'"),
    "integers": (lambda a: a.update(v=a["v"].long()), errors.LsmDtypeError, "'v'"),
    "no tensor": (lambda a: a.update(beta=0.5), errors.LsmDtypeError, "'beta'"),
    "sparse": (lambda a: a.update(v=a["v"].to_sparse()), errors.LsmDtypeError, "'v' has the layout"),
    "device": (lambda a: a.update(g=a["g"].to("meta")), errors.LsmDtypeError, "several devices"),
    "state's shape": (lambda a: a.update(initial_state=torch.zeros(2, 4, 6, 5)), errors.LsmShapeError, "initial_state"),
    "state's device": (lambda a: a.update(initial_state=torch.zeros(2, 4, 5, 6, device="meta")), errors.LsmDtypeError, "several devices"),
    "states": (lambda a: a.update(initial_state=(torch.zeros(2, 4, 5, 6),) * 2), errors.LsmShapeError, "1 state"),
    "packed batch": (lambda a: a.update(cu_seqlens=torch.tensor([0, 3])), errors.LsmSequenceError, "B = 1"),
    "offsets too short": (lambda a: one_sequence(a, 0, 2), errors.LsmSequenceError, "T = 3"),
    "falling offsets": (lambda a: one_sequence(a, 0, 3, 2, 3), errors.LsmSequenceError, "rise"),
    "no offsets": (lambda a: one_sequence(a), errors.LsmSequenceError, "cu_seqlens"),
    "offsets elsewhere": (lambda a: (one_sequence(a, 0, 3), a.update(cu_seqlens=a["cu_seqlens"].to("meta"))), errors.LsmDtypeError, "several devices"),
    "chunk": (lambda a: a.update(chunk=48), errors.LsmOptionError, "powers of two"),
    "schedule": (lambda a: a.update(schedule="fastest"), errors.LsmOptionError, "two_pass"),
    "scale": (lambda a: a.update(scale="a"), errors.LsmOptionError, "scale='a'"),
    "no finite scale": (lambda a: a.update(scale=math.nan), errors.LsmOptionError, "scale=nan"),
    "scale in a tensor": (lambda a: a.update(scale=torch.tensor(2.0)), errors.LsmOptionError, "scale="),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_call_is_named_within_a_second(mistake: str) -> None:
    change, kind, match = MISTAKES[mistake]
    given = kda_inputs()
    change(given)
    started = time.perf_counter()
    with pytest.raises(kind, match=match) as caught:
        lsmc.zoo.kda(**given)
    assert type(caught.value) is kind
    assert time.perf_counter() - started < 1


def record(monkeypatch: pytest.MonkeyPatch, repeated: list[int], tokens: Callable[[str, Tensor], Tensor]) -> None:
    """Every call is recorded, and like every other of its method: what is repeated is the operator's program, on inputs as `tokens`
    makes them of the call's (only GPUs record launches)."""
    def recorded(tensors: list[Tensor], start: list[Tensor], spec: str) -> Any:
        plan = ops.plan_of(spec)

        def repeat(given: dict[str, Tensor], memories: dict[str, Tensor]) -> Any:
            repeated.append(1)
            first = start or ops._start(plan, tensors, start, None)
            tiles = {n: m.reshape(s.shape) for (n, m), s in zip(memories.items(), first)} or dict(zip(plan.carries, first))
            return plan.forward.executable.launch({n: tokens(n, given[n]) for n in plan.inputs}, tiles, plan.chunk)

        return repeat

    monkeypatch.setattr(lsmc.api, "_REPEATED", {})
    monkeypatch.setattr(lsmc.api, "_likeness", lambda *given: given[0])
    monkeypatch.setattr(ops, "recorded", recorded)


@each(lsmc.zoo.retnet, lsmc.zoo.gateloop, normalised)
def test_a_step_like_an_earlier_one_repeats_its_launch_on_what_it_is_given(op: LSM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other inputs, another state, defaults that are left out: the same numbers as through the operator, of the same shapes."""
    drawn = sample(op, Case(2, 3, 2, key_dim=4, value_dim=3, initial_state=True))
    inputs = {n: x.detach() for n, x in drawn.inputs.items() if n not in op.canonical.defaults}
    tokens = [{n: x[:, t] if n in drawn.per_token else x for n, x in inputs.items()} for t in range(3)]

    def steps() -> list[Tensor]:
        state, out = drawn.state, list[Tensor]()
        for token in tokens:
            o, state = op.step(**token, state=state)
            out += [o, *tensors(state)]
        return out

    wanted, repeated = steps(), list[int]()

    record(monkeypatch, repeated, lambda n, x: x[:, None] if n in drawn.per_token else x)
    for x, y in zip(steps(), wanted, strict=True):
        assert x.shape == y.shape and torch.equal(x, y)
    assert len(repeated) == 2


@each(lsmc.zoo.retnet, lsmc.zoo.gateloop, normalised)
@pytest.mark.parametrize("state", [False, True])
def test_a_call_like_an_earlier_one_repeats_its_launches_on_what_it_is_given(
        op: LSM, state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other inputs and memories of the same sizes: the same numbers as through the operator, with the final state where it is asked
    for."""
    calls = [sample(op, Case(2, 5, 2, key_dim=4, value_dim=3, initial_state=state, seed=n)) for n in range(3)]

    def run() -> list[Tensor]:
        out = list[Tensor]()
        for n, drawn in enumerate(calls):
            inputs = {m: x.detach() for m, x in drawn.inputs.items() if m not in op.canonical.defaults}
            with torch.no_grad():
                found = op(**inputs, initial_state=drawn.state, return_final_state=n != 1)
            out += tensors(found) if n != 1 and not isinstance(found[1], tuple) else [found] if n == 1 else [found[0], *found[1]]
        return out

    wanted, repeated = run(), list[int]()

    record(monkeypatch, repeated, lambda n, x: x)
    for x, y in zip(run(), wanted, strict=True):
        assert x.shape == y.shape and torch.equal(x, y)
    assert len(repeated) == 2


def test_what_decides_a_launch_tells_calls_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, scale, chunk and schedule, memories, steps; scales that no call takes are not looked up, nor is what learns."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    key, x, m = lsmc.zoo.bla.key, torch.randn(2, 4, 2, 8), torch.zeros(2, 2, 8, 8)

    def likeness(*how: object, scale: Any = 1.0, x: Tensor = x, state: Tensor | None = None) -> Any:
        return lsmc.api._likeness(key, scale, {"q": x, "k": x, "v": x}, state, *how)

    found = [likeness(None, None), likeness(16, None), likeness(None, "fused"), likeness("step"), likeness(None, None, scale=2.0),
             likeness(None, None, x=torch.randn(2, 5, 2, 8)), likeness(None, None, state=m), likeness(None, None, x=x.half())]
    assert None not in found and len({*found}) == len(found)
    assert likeness(None, None) == likeness(None, None, x=torch.randn(2, 4, 2, 8))
    assert likeness(scale=[1.0]) is None and likeness(scale=torch.ones(())) is None and likeness([64], None) is None
    assert likeness(x=torch.randn(2, 4, 2, 8, requires_grad=True)) is None
    with torch.no_grad():
        assert likeness(x=torch.randn(2, 4, 2, 8, requires_grad=True)) is not None


def test_views_that_negate_are_no_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers in memory have the other sign, which a launch alone does not know."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    q = torch.randn(2, 4, 5, dtype=torch.complex64).conj().imag
    alike = [lsmc.api._likeness(lsmc.zoo.retnet.key, 1.0, {"q": x, "k": x, "v": x}, None) for x in (q, q.neg())]
    assert q.is_neg() and alike[0] is None and alike[1] is not None
