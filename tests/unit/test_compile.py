"""Laws under torch.compile: one graph without a break, few graphs for all lengths, eager's numbers, named passes."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lsmc
from lsmc import LSM, Scalar, Vector, errors, k, outer, q, scalar, v, vector
from lsmc.api import PASSES
from lsmc.cases import Case, sample, tensors
from lsmc.models import HybridMoE, config

with_two_states = LSM(
    "with_two_states",
    decay=Vector(vector("f")),
    update=outer(lsmc.exp(k / 2), v),
    readout=(lsmc.exp(q / 2) @ lsmc.M) / (lsmc.exp(q / 2) @ lsmc.M.normalizer + 1),
)
correcting = LSM("correcting", decay=Scalar("g"), update=scalar("beta") * outer(k, v - k @ lsmc.M.decayed))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages up to AOTAutograd, but no C++: the graphs run as they are."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)


def layer(op: LSM) -> Callable[..., tuple[Tensor, ...]]:
    """An operator between other operations, as a model has it."""

    def forward(inputs: dict[str, Tensor], state: Any, cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
        inputs = {**inputs, "q": F.silu(inputs["q"]), "v": inputs["v"] * 2}
        o, end = op(**inputs, initial_state=state, return_final_state=True, scale=0.5, cu_seqlens=cu_seqlens)
        return F.silu(o), *tensors(end)

    return forward


def values(run: Callable[..., tuple[Tensor, ...]], op: LSM, case: Case, cuts: tuple[int, ...] = ()) -> list[Tensor]:
    """Outputs and every gradient of one call."""
    drawn = sample(op, case, batch=len(cuts) or None)
    packed = (torch.tensor([0, *cuts], dtype=torch.int32),) if cuts else ()
    outputs = run(drawn.inputs, drawn.state, *packed)
    return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), drawn.leaves())]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-11) for x, y in zip(found, wanted, strict=True))


# --- one graph


@pytest.mark.parametrize("op", [pytest.param(lsmc.zoo.retnet, marks=pytest.mark.slow), correcting], ids=lambda op: op.name)
def test_two_graphs_without_a_break_serve_every_length(op: LSM) -> None:
    """One for sequences of a single chunk, one for all others; outputs, states and gradients are eager's."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(op), fullgraph=True, dynamic=True, backend=counter)
    for T in (70, 33, 128, 5, 64, 200, 2):
        case = Case(batch=2, time=T, heads=1, groups=2, key_dim=3, value_dim=4, initial_state=True)
        assert same(values(compiled, op, case), values(layer(op), op, case)), T
    assert counter.frame_count <= 2
    assert not counters["graph_break"]


def test_packed_sequences_of_any_lengths_share_the_graphs() -> None:
    """Where sequences end is data: nothing is compiled anew for it."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(correcting), fullgraph=True, backend=counter)
    for cuts in ((3, 40, 70), (0, 70, 70), (1, 2, 33), (60, 61, 80)):
        case = Case(time=cuts[-1], groups=2, key_dim=3, value_dim=4, initial_state=True)
        assert same(values(compiled, correcting, case, cuts), values(layer(correcting), correcting, case, cuts)), cuts
    assert counter.frame_count <= 2
    assert not counters["graph_break"]


def test_decoding_compiles_to_one_graph() -> None:
    """Token after token, the state of the last step goes into the same graph."""
    counter = CompileCounterWithBackend("aot_eager")
    op = correcting
    compiled = torch.compile(lambda token, state: op.step(**token, state=state), fullgraph=True, backend=counter)
    drawn = sample(op, Case(batch=2, time=6, key_dim=3, value_dim=4, initial_state=True))
    inputs, start = {name: x.detach() for name, x in drawn.inputs.items()}, tensors(drawn.state)[0].detach()
    state, parts = start, []
    for t in range(6):
        o, state = compiled({name: x[:, t] for name, x in inputs.items()}, state)
        parts.append(o)
    wanted, end = op(**inputs, initial_state=start, return_final_state=True)
    assert same([torch.stack(parts, 1), state], [wanted, end])
    assert counter.frame_count == 1


def test_autocast_gives_eagers_types_and_numbers() -> None:
    drawn = sample(correcting, Case(batch=2, time=20, key_dim=4, value_dim=4, initial_state=True))
    inputs, state = {n: x.detach().float() for n, x in drawn.inputs.items()}, tensors(drawn.state)[0].detach().float()
    seen = []
    for run in (layer(correcting), torch.compile(layer(correcting), fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(run(inputs, state))
    for x, y in zip(*seen, strict=True):
        assert x.dtype == y.dtype
        assert torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("no_code")
def test_checkpointing_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The operator is found in the graph of the region that is computed again."""
    op = with_two_states

    def forward(*args: Any) -> Any:
        return checkpoint(layer(op), *args, use_reentrant=False)

    case = Case(batch=2, time=40, groups=2, key_dim=3, value_dim=4, initial_state=True)
    with caplog.at_level(logging.INFO, "lsmc.passes"):
        assert same(values(lsmc.compile(forward, fullgraph=True), op, case), values(layer(op), op, case))
    assert any(op.name in r.getMessage() for r in caplog.records)


# --- the passes of lsmc.compile


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("disable", [(), *((name,) for name in PASSES), tuple(PASSES)], ids=lambda d: "+".join(d) or "none")
def test_every_pass_says_what_it_did_and_can_be_switched_off(disable: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    op = lsmc.zoo.retnet
    case = Case(batch=2, time=40, key_dim=3, value_dim=4)

    def forward(inputs: dict[str, Tensor], state: Any) -> tuple[Tensor, ...]:
        return (layer(op)(inputs, state)[0],)  # the final state is not used

    with caplog.at_level(logging.INFO, "lsmc.passes"):
        assert same(values(lsmc.compile(forward, disable=disable), op, case), values(forward, op, case))
    said = {name: [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"{name}:")] for name in PASSES}
    assert all(said.values())
    assert {name for name, lines in said.items() if lines == [f"{name}: switched off"]} == set(disable)
    if "find" not in disable:
        assert "retnet" in said["find"][0] and "schedule" in said["find"][0]


def test_an_unknown_pass_is_refused_where_it_is_named() -> None:
    with pytest.raises(errors.LsmOptionError, match="'fined'.*no graph pass") as caught:
        lsmc.compile(lambda x: x, disable=("fined",))
    assert all(name in str(caught.value) for name in PASSES)
    assert "test_compile.py" in str(caught.value)


def test_unused_states_are_dropped_from_the_graph() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.lsmc.fwd, ([graph.placeholder("v")], [], None, "a plan"))
    o, _ = (graph.call_function(operator.getitem, (node, i)) for i in (0, 1))
    graph.output((o,))
    module = torch.fx.GraphModule({}, graph)
    assert PASSES["drop_unused_states"](module) == ["getitem_1 of fwd"]
    assert [n.name for n in module.graph.nodes] == ["v", "fwd", "getitem", "output"]
    assert PASSES["drop_unused_states"](module) == []


MISTAKES: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[errors.LsmError], str]] = {
    "missing": (lambda a: a.pop("beta"), errors.LsmMissingInputError, "needs the input 'beta'"),
    "unexpected": (lambda a: a.update(gate=a["g"]), errors.LsmUnexpectedInputError, "no input 'gate'"),
    "dimensions": (lambda a: a.update(g=a["g"][..., None]), errors.LsmShapeError, "'g' (has shape|must have the dimensions)"),
    "length": (lambda a: a.update(beta=a["beta"][:, 1:]), errors.LsmShapeError, "'beta' (has shape|has another T)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_while_tracing(mistake: str) -> None:
    """By its class; where no graph break is allowed, by torch's class with the same words."""
    drawn = sample(correcting, Case(time=4, key_dim=2, value_dim=2))
    change, kind, match = MISTAKES[mistake]
    change(drawn.inputs)
    for fullgraph, seen in ((False, kind), (True, torch._dynamo.exc.Unsupported)):
        torch._dynamo.reset()
        with pytest.raises(seen, match=match):
            torch.compile(lambda inputs: correcting(**inputs), fullgraph=fullgraph, backend="eager")(drawn.inputs)


# --- a model, through Inductor


def test_a_compiled_model_trains_as_the_eager_one() -> None:
    """Loss, every gradient, and the parameters after one step, through generated C++."""
    model = HybridMoE(config("tiny", pattern="L", hidden=16, vocabulary=23, gate_rank=2, moe={"width": 8}))
    tokens = torch.randint(23, (2, 41))
    found, wanted = {}, {}
    for into, twin in ((wanted, copy.deepcopy(model)), (found, copy.deepcopy(model))):
        run = twin if into is wanted else lsmc.compile(twin)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
        into["loss"] = run(tokens[:, :-1], tokens[:, 1:]).total
        into["loss"].backward()
        into |= {f"gradient of {name}": p.grad.clone() for name, p in twin.named_parameters()}
        optimizer.step()
        into |= {name: p.detach() for name, p in twin.named_parameters()}
    assert any(not torch.equal(p, found[name]) for name, p in model.named_parameters())
    for name, x in wanted.items():
        assert torch.allclose(found[name], x, rtol=1e-4, atol=1e-6), name
    assert not counters["graph_break"]
