"""Laws of absorption: the operator with maps inside computes what the operator after the maps computes, and says what it did."""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lsmc
from lsmc import k, reference
from lsmc.api import PASSES
from lsmc.cases import Case, sample
from lsmc.chunk import derive
from lsmc.lowering.absorb import absorb, judge
from lsmc.lowering.plan import able
from lsmc.models import HybridMoE, config
from lsmc.pipeline import Options, compile_plan
from lsmc.target import H200
from tests import absorbed
from tests.absorbed import Fed, anything, compiled, errors, results
from tests.declarations import declarations
from tests.interpreted import workers

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages up to AOTAutograd, but no C++: the graphs run as they are. Whatever can be absorbed is, also on CPUs."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)
    monkeypatch.setitem(PASSES, "absorb", functools.partial(absorb, judge=anything))


# --- the same function


@st.composite
def fed(draw: st.DrawFn) -> Fed:
    return Fed(
        method=draw(st.one_of(st.sampled_from(lsmc.zoo.names()), declarations())),
        picks=tuple(draw(st.lists(st.integers(0, 999), min_size=5, max_size=5))),
        time=draw(st.sampled_from([1, 17, 40])),
        groups=draw(st.sampled_from([1, 1, 2])),
        seed=draw(st.integers(0, 99)),
    )


@given(fed=fed())
@settings(max_examples=int(os.environ.get("LSMC_EXAMPLES", "8")))
def test_absorbing_changes_no_output_and_no_gradient(fed: Fed) -> None:
    """For random chains on random declarations: every value, every gradient, those of parameters included."""
    worst, said = absorbed.run(fed)
    assert max(worst.values()) < TOLERANCE, (fed.chains(), said, worst)


CHAINS = sorted({(name, family) for family in ("FREE", "VECTORS", "POSITIVE", "DECAYS") for name in getattr(absorbed, family)})


@pytest.mark.parametrize(("name", "family"), CHAINS, ids=[f"{f.lower()}: {n}" for n, f in CHAINS])
def test_every_map_is_absorbed_whole(name: str, family: str) -> None:
    """Nothing but the operator, and views, is left in the graph."""
    chain = getattr(absorbed, family)[name]
    into = {"FREE": "q", "VECTORS": "q", "POSITIVE": "beta", "DECAYS": "g"}[family]
    if name == "softmax":
        into = "q"
    raw, parameters = Fed("kda", (0,)).tensors()
    left: list[torch.fx.Node] = []

    def run(raw: dict[str, Tensor], parameters: dict[str, dict[str, Tensor]]) -> Tensor:
        x = raw | {into: chain(raw[into], parameters[into])}
        return lsmc.zoo.kda(**(x | ({} if into == "g" else {"g": -x["g"].exp()})))

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        absorb(module, anything)
        left.extend(n for n in module.graph.nodes if n.op.startswith("call"))
        return module

    found = results(torch.compile(run, backend=backend, fullgraph=True), raw, parameters)
    assert max(errors(found, results(run, raw, parameters)).values()) < TOLERANCE
    views = {"unflatten", "flatten", "view", "squeeze", "expand", "contiguous"}
    assert [n.name for n in left if n.target not in views and n.name not in ("fwd", "getitem", "o")] == []


@pytest.fixture(scope="module")
def pool() -> Iterator[object]:
    with workers(min(2, os.cpu_count() or 1)) as pool:
        yield pool.pool


@pytest.mark.parametrize(
    "fed",
    [Fed("kda", (10, 16, 1, 1, 1)), Fed("gla", (16, 2, 1, 3), 33), Fed("gated_deltanet", (11, 12, 2, 3, 2)),
     Fed("rwkv6", (15, 14, 8, 4, 1), groups=2), Fed("retnet", (8, 9, 5, 1))],
    ids=lambda fed: fed.method,
)  # fmt: skip
def test_generated_kernels_compute_the_maps(fed: Fed, pool: object) -> None:
    """Triton, in its interpreter, float32, against the maps and then the operator in float64."""
    worst, said = pool.submit(absorbed.run, Fed(**{**vars(fed), "dtype": torch.float32}), "triton").result()  # type: ignore[attr-defined]
    assert "absorbs" in said[0]
    assert max(worst.values()) < 2e-5, worst


@given(seed=st.integers(0, 99))
@settings(max_examples=4)
def test_the_recurrence_of_a_substituted_declaration_is_that_of_its_mapped_inputs(seed: int) -> None:
    op = lsmc.zoo.kda
    new = op.canonical.substitute({k.expr: lsmc.l2norm(k).expr})
    inputs = sample(op, Case(batch=2, time=9, heads=2, key_dim=4, value_dim=3, seed=seed)).inputs
    mapped = inputs | {"k": inputs["k"] * torch.rsqrt(inputs["k"].square().sum(-1, keepdim=True) + 1e-6)}
    assert torch.allclose(reference(new)(**inputs), reference(op)(**mapped), rtol=1e-12, atol=1e-13)
    assert op.key != new.key and op.canonical.substitute({}) == op.canonical


def test_a_replaced_input_has_no_default() -> None:
    op = lsmc.zoo.retnet
    (log_a,) = (s for s in op.inputs if s.name == "log_a")
    assert "log_a" in op.canonical.substitute({k.expr: 2 * k.expr}).defaults
    assert not op.canonical.substitute({log_a: -lsmc.functions.exp(log_a)}).defaults


# --- what is left alone


def kda(x: dict[str, Tensor], **changed: Tensor) -> Tensor:
    return lsmc.zoo.kda(**{**x, **changed})


def written_in_place(x: dict[str, Tensor]) -> Tensor:
    y = x["beta"] * 2
    beta = torch.sigmoid(y)
    y.add_(1)
    return kda(x, beta=beta)


def without_gradients(x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        beta = torch.sigmoid(x["beta"])
    return kda(x, beta=beta)


def in_two_places(x: dict[str, Tensor]) -> Tensor:
    beta = torch.sigmoid(x["beta"])
    return kda(x, beta=beta) * beta[..., None]


def also_the_state(x: dict[str, Tensor]) -> Tensor:
    beta = torch.sigmoid(x["beta"])
    state = beta.sum(1)[..., None, None].expand(-1, -1, 5, 3)
    return kda(x, beta=beta, initial_state=state)


LEFT: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], str]] = {
    "used elsewhere": (in_two_places, "it is used elsewhere"),
    "in the initial state": (also_the_state, "it is used elsewhere"),
    "a result of the graph": (lambda x: (lambda b: (kda(x, beta=b), b))(torch.sigmoid(x["beta"]))[0], ""),
    "written in place": (written_in_place, "written in place"),
    "no gradient": (without_gradients, "no gradient"),
    "over time": (lambda x: kda(x, g=x["g"].cumsum(1) / 9), "no map of one token"),
    "other dimension": (lambda x: kda(x, k=F.normalize(x["k"], dim=1)), "dim=1 is not the last"),
    "over two dimensions": (lambda x: kda(x, q=x["q"] * x["q"].mean((2, 3))[..., None, None]), "over several dimensions"),
    "over heads": (lambda x: kda(x, beta=torch.softmax(x["beta"], -1)), "neither K nor V|not the last"),
    "varies over time alone": (lambda x: kda(x, q=x["q"] * torch.arange(20.0, dtype=torch.float64)[:, None, None]), "T alone"),
    "one for all heads": (lambda x: kda(x, q=x["q"] * x["k"].cumsum(1).sum(2, keepdim=True)), "the same for all heads"),
    "two full tensors": (lambda x: kda(x, q=x["q"] * x["k"].cumsum(1)), "more bytes"),
    "wider than the result": (lambda x: kda(x, beta=torch.sigmoid(x["k"].cumsum(1).sum(-1))), "smaller than what it is made of"),
    "not finite at zero": (lambda x: kda(x, g=-x["beta"].abs().sqrt()[..., None] * x["g"].exp()), "not finite at 0"),
    "a power that varies": (lambda x: kda(x, beta=2 ** -x["beta"].square()), "an exponent that is no number"),
    "tanh approximation": (lambda x: kda(x, v=F.gelu(x["v"], approximate="tanh")), "approximate='tanh'"),
    "another type": (lambda x: kda(x, beta=torch.sigmoid(x["beta"].float().cumsum(1)).to(torch.float64)), "has the type torch.float32"),
    "a roll": (lambda x: kda(x, q=x["q"].roll(1, -1)), "no map of one token"),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, (_, why) in LEFT.items() if why])
def test_what_is_no_map_of_a_token_is_left_alone_with_the_reason(name: str) -> None:
    forward, why = LEFT[name]
    said: list[str] = []
    raw, _ = Fed("kda", (0,)).tensors()
    raw = {n: (0.3 * x.detach()).requires_grad_() for n, x in raw.items()}

    def run(x: dict[str, Tensor], _: object) -> Tensor:
        return forward({**x, "g": -x["g"].exp()})

    found, wanted = results(compiled(run, said), raw, {}), results(run, raw, {})
    assert max(errors(found, wanted).values()) < TOLERANCE
    left = [line for line in said if "is left to itself" in line]
    assert any(re.search(why, line) for line in left), said


def test_the_value_is_left_alone_where_a_normaliser_reads_it_as_one() -> None:
    op = lsmc.LSM("own", update=lsmc.outer(lsmc.exp(k), lsmc.v), readout=(lsmc.exp(lsmc.q) @ lsmc.M) / (lsmc.exp(lsmc.q) @ lsmc.M.normalizer))
    raw = {n: torch.randn(2, 9, 2, 3, dtype=torch.float64, requires_grad=True) for n in "qkv"}
    said: list[str] = []

    def run(x: dict[str, Tensor], _: object) -> Tensor:
        return op(q=x["q"], k=torch.tanh(x["k"]), v=torch.tanh(x["v"]))

    found, wanted = results(compiled(run, said), raw, {}), results(run, raw, {})
    assert max(errors(found, wanted).values()) < TOLERANCE
    assert "the memory of v = 1" in said[-1] and "tanh(k)" in said[0] and "tanh(v)" not in said[0]


def test_two_inputs_made_of_one_value_read_it_once() -> None:
    """Keys 1 − e^g and decays of one projection: the value is an input of its own, once."""
    raw, parameters = Fed("gla", (0,)).tensors()
    said: list[str] = []

    def run(x: dict[str, Tensor], _: object) -> Tensor:
        g = F.logsigmoid(x["g"])
        return lsmc.zoo.gla(q=x["q"], k=1 - g.exp(), v=x["v"], g=g)

    found, wanted = results(compiled(run, said), {n: raw[n] for n in "qvg"}, {}), results(run, {n: raw[n] for n in "qvg"}, {})
    assert max(errors(found, wanted).values()) < TOLERANCE
    assert "gla(q(B,T,H,K), k(B,T,H,K), v(B,T,HV,V))" in said[0] and "exp(logsigmoid(k))" in said[0]


def test_sixteen_bit_values_are_widened_inside() -> None:
    """The cast of a gate is absorbed; a cast that narrows q, k or v is not: the operator would read more."""
    raw = {n: x.detach().bfloat16() for n, x in Fed("kda", (0,)).tensors()[0].items()}
    said: list[str] = []

    def run(x: dict[str, Tensor], _: object) -> Tensor:
        v = (x["v"].float() * 2).bfloat16()
        q = torch.tanh(x["q"].cumsum(1, dtype=torch.float32)).bfloat16()
        return lsmc.zoo.kda(q=q, k=F.normalize(x["k"].float(), dim=-1).to(x["k"].dtype), v=v,
                            g=F.logsigmoid(x["g"].float()), beta=x["beta"].float().sigmoid())  # fmt: skip

    found = compiled(run, said)(raw, {})
    wanted = run({n: x.float() for n, x in raw.items()}, {})
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted.float()).square().mean().sqrt()) < 1e-2 * float(wanted.float().square().mean().sqrt())
    assert "logsigmoid(g)" in said[0] and "2*v" in said[0] and "sigmoid(beta)" in said[0] and "tanh(q)" not in said[0]


# --- in lsmc.compile


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("method", ["gla", pytest.param("kda", marks=pytest.mark.slow)])
@pytest.mark.parametrize("remat", [False, True])
def test_a_hybrid_model_is_the_same_with_and_without_the_pass(method: str, remat: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Loss and every gradient, in one graph; each L block's gates, norms and strengths are said to be absorbed."""
    model = HybridMoE(config("tiny", lsm=method, pattern="LL", activation_checkpointing=remat)).double()
    tokens, found = torch.randint(model.config.vocabulary, (2, 41)), []
    for disable in ((), ("absorb",)):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        with caplog.at_level(logging.INFO, "lsmc.passes"):
            loss = lsmc.compile(twin, fullgraph=True, disable=disable)(tokens[:, :-1], tokens[:, 1:]).total
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in twin.named_parameters()}})
    assert max(errors(*found).values()) < TOLERANCE
    said = [r.getMessage() for r in caplog.records if " absorbs " in r.getMessage()]
    assert len(said) == 2 and all("logsigmoid(g)" in line for line in said)
    if method == "kda":
        assert all("sigmoid(beta + beta_1)" in line and "sqrt(relu(sum_K(k**2)" in line for line in said)
    assert not counters["graph_break"]


def test_sizes_may_stay_symbolic() -> None:
    """Two graphs for all lengths hold the absorbed operator: one for a single chunk."""
    run = Fed("gla", (10, 16, 1, 3)).forward()
    once = CompileCounterWithBackend("eager")

    def backend(module: torch.fx.GraphModule, example: list[Tensor]) -> object:
        assert " absorbs " in absorb(module, anything)[0]
        return once(module, example)

    symbolic = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for T in (9, 33, 70):
        tensors = Fed("gla", (0,), T).tensors()
        assert max(errors(results(symbolic, *tensors), results(run, *tensors)).values()) < TOLERANCE
    assert once.frame_count <= 2


@pytest.mark.usefixtures("no_code")
def test_a_checkpointed_region_absorbs_too(caplog: pytest.LogCaptureFixture) -> None:
    fed = Fed("gla", (10, 16, 1, 1))
    inner = fed.forward()

    def run(*args: object) -> Tensor:
        return checkpoint(inner, *args, use_reentrant=False)

    with caplog.at_level(logging.INFO, "lsmc.passes"):
        found = results(lsmc.compile(run, fullgraph=True), *fed.tensors())
    assert max(errors(found, results(run, *fed.tensors())).values()) < TOLERANCE
    assert any(" absorbs " in r.getMessage() for r in caplog.records)


# --- where it pays


@pytest.mark.parametrize("method", [m.name for m in lsmc.zoo.METHODS if able("triton", derive(m.canonical)) == "triton"
                                    and lsmc.q.expr in m.canonical.inputs and m.canonical.block != 1])
def test_what_costs_more_inside_than_outside_is_left_outside(method: str) -> None:
    """By the estimates for GPUs: what is inside anyway is free, and an input that is three products of rows is not.

    Not where every token has a memory of its own: reading it is nearly all, and one kernel less that does so is gained by chance.
    """
    plan = compile_plan(getattr(lsmc.zoo, method).canonical, Options(target="triton"))
    assert judge(plan, plan, 0.0) is None
    q = lsmc.q.expr
    heavy = plan.derive(plan.canonical.substitute({q: lsmc.rmsnorm(lsmc.softmax(lsmc.l2norm(lsmc.q))).expr}), 1.0)
    more = heavy.seconds - plan.seconds
    assert more > 0
    free = more - 2 * H200.launch_s
    for moved, refused in ((0.9 * free * H200.bytes_per_s, True), (1.1 * free * H200.bytes_per_s, False)):
        why = judge(plan, heavy, moved)
        assert (why is not None) == refused and (why is None or "us more inside" in why)


def test_on_a_cpu_nothing_is_absorbed_and_why_is_said() -> None:
    said: list[str] = []
    specs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        node = next(n for n in module.graph.nodes if n.name == "fwd")
        specs.append(node.args[3])
        said.extend(absorb(module))
        specs.append(node.args[3])
        return module

    fed = Fed("kda", (10, 16, 1, 1, 1))
    torch.compile(fed.forward(), backend=backend, fullgraph=True)(*fed.tensors())
    assert specs[0] == specs[1]
    assert len(said) == 5 and all("compiled together with what feeds it" in line for line in said)


def test_a_factor_on_q_stays_on_q_where_keys_are_the_same_tensor() -> None:
    raw = {n: x for n, x in Fed("gla", (0,)).tensors()[0].items() if n != "k"}
    said: list[str] = []

    def run(x: dict[str, Tensor], _: object) -> Tensor:
        return lsmc.zoo.gla(q=x["q"], k=x["q"], v=torch.tanh(x["v"]), g=-x["g"].exp(), scale=0.25)

    found, wanted = results(compiled(run, said), raw, {}), results(run, raw, {})
    assert max(errors(found, wanted).values()) < TOLERANCE and " absorbs " in said[0]
