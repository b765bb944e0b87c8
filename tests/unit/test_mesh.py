"""Laws of the graphs that a mesh makes: what is exchanged and how much, the same on every rank; what is refused, by name.

The processes are imagined (torch's "fake" group): graphs are captured and rewritten as on real ones, and exchange nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import lsmc
from lsmc import LSM
from lsmc.cases import Case, sample
from lsmc.errors import LsmError
from lsmc.lowering import split
from lsmc.models import HybridMoE, config
from lsmc.runtime import attend as attention
from lsmc.runtime import spread
from lsmc.runtime.errors import LsmMeshError
from lsmc.runtime.mesh import Axis
from lsmc.runtime.plans import sequence
from lsmc.runtime.traffic import PARAMETERS, traffic

RANKS = 4


pytestmark = pytest.mark.usefixtures("graphs")


@pytest.fixture
def sp() -> Iterator[DeviceMesh]:
    yield from imagined(rank=1)


def imagined(rank: int) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("sp",))
    dist.destroy_process_group()


def layer(op: LSM) -> Callable[..., Tensor]:
    return lambda inputs: F.silu(op(**inputs))


def calls(module: GraphModule, name: str) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "call_function" and name in str(n.target)]


@pytest.mark.parametrize("name", ["gla", "titans", "mamba"])
def test_messages_of_operators_do_not_depend_on_the_tokens(name: str, sp: DeviceMesh, graphs: list[GraphModule]) -> None:
    """One gather of what `lsmc.lowering.split` counts, K + K·V or K·K + K·V numbers per head, whatever T."""
    op, sizes = getattr(lsmc.zoo, name), set()
    for tokens in (8, 32):
        case = Case(batch=2, time=tokens, groups=3, key_dim=5, value_dim=2)
        lsmc.compile(layer(op), mesh=sp)(sample(op, case).inputs)
        (gather,) = calls(graphs[-1], "all_gather_into_tensor")
        sizes.add(tuple(gather.args[0].meta["example_value"].shape))
        spec = calls(graphs[-1], "lsmc.incoming")[0].args[5]
    assert sizes == {(2, 3, split.message(str(spec), 5, 2))}


def test_what_has_no_summary_trades_tokens_for_heads(sp: DeviceMesh, graphs: list[GraphModule]) -> None:
    """One message there and one back, and as many backward: what is per token of all heads, of which each rank keeps its share."""
    case = Case(batch=2, time=8, heads=2, groups=2, key_dim=3, value_dim=3)
    inputs = sample(lsmc.zoo.ttt_ln, case).inputs
    lsmc.compile(layer(lsmc.zoo.ttt_ln), mesh=sp)(inputs)
    axis = Axis("sp", RANKS, calls(graphs[-1], "lsmc.traded")[0].args[-1])
    there, back = [m for m in traffic(graphs[-1], {"sp": axis}) if m.of == "tokens for heads of ttt_ln"]
    q, k, v, eta = (2 * 4 * n for n in (3, 3, 3, 1))  # q and k, of two heads, once for each rank
    assert (there.forward, there.backward, back.forward) == ("all-to-all",) * 3
    assert there.forward_bytes == there.backward_bytes == (q + k + v + eta) * 2 * 8 * (RANKS - 1) // RANKS
    assert back.forward_bytes == v * 2 * 8 * (RANKS - 1) // RANKS
    (run,) = calls(graphs[-1], "lsmc.fwd")
    assert run.meta["example_value"][0].shape == (2, 8, 1, 3)


def test_numbers_are_those_of_their_place() -> None:
    """Another seed, call or place gives another number, uniform on 32 bits; a part of the places the same part of them."""
    def drawn(seed: int, call: int, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.ops.lsmc.drawn.default(torch.tensor(seed), call, [rows[:, None], columns])

    rows, columns = torch.arange(200), torch.arange(300)
    whole = drawn(5, 0, rows, columns)
    assert torch.equal(drawn(5, 0, rows[50:100], columns[7:]), whole[50:100, 7:])
    others = [whole, whole.T.reshape(200, 300), drawn(5, 1, rows, columns), drawn(6, 0, rows, columns), drawn(5 + (1 << 40), 0, rows, columns),
              drawn(5, 0, rows + 200, columns), drawn(5, 0, rows, columns + 300)]
    for x in others:
        u = x.double() / 2**32
        assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 1 / 2) < 0.01 and abs(u.var() - 1 / 12) < 0.01
        assert abs((x & 1).double().mean() - 1 / 2) < 0.01
        for y in (z for z in others if z is not x):
            assert abs(torch.corrcoef(torch.stack([u.flatten(), y.double().flatten()]))[0, 1]) < 0.02
    for lag in (1, 2):
        assert abs(torch.corrcoef(torch.stack([whole[lag:].flatten(), whole[:-lag].flatten()]).double())[0, 1]) < 0.02
        assert abs(torch.corrcoef(torch.stack([whole[:, lag:].flatten(), whole[:, :-lag].flatten()]).double())[0, 1]) < 0.02


def small(pattern: str, **options: Any) -> HybridMoE:
    size = {"hidden": 16, "heads": 2, "vocabulary": 13, "gate_rank": 4, "moe": {"experts": 2, "top_k": 1, "width": 8}}
    return HybridMoE(config("tiny", pattern=pattern, **size, **options))


def test_graphs_are_the_same_on_every_rank(graphs: list[GraphModule]) -> None:
    """A rank is a value of the graph, never a constant: what one rank compiled is every rank's."""
    inputs = sample(lsmc.zoo.gla, Case(time=8, key_dim=2, value_dim=2)).inputs
    for rank in (0, 2):
        for mesh in imagined(rank):
            torch._dynamo.reset()
            lsmc.compile(lambda x: lsmc.zoo.gla(**x) + torch.arange(8)[:, None, None], mesh=mesh)(inputs)
    first, second = graphs
    assert first.code == second.code


def test_graphs_say_what_they_exchange(sp: DeviceMesh, graphs: list[GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a message and its answer an LSM layer runs its operator, an attention layer rotates its queries. A rank receives
    K + K·V numbers per head from each other one, and as many backward; attention's keys and values grow with the tokens."""
    monkeypatch.setattr(sequence, "NEAR", RANKS - 1)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    lsmc.compile(small("LN"), mesh=sp)(tokens, tokens)
    order = {n: i for i, n in enumerate(graphs[-1].graph.nodes)}
    hidden = []
    for gather in calls(graphs[-1], "all_gather_into_tensor"):
        (wait,) = gather.users
        hidden.append(" ".join(str(n.target) for n in order if order[gather] < order[n] < order[wait]))
    tails, summaries, keys = hidden
    assert "lsmc.fwd" in summaries
    assert "cos" in keys and "cat" in keys
    seen = {m.of: m for m in traffic(graphs[-1], {"sp": Axis("sp", RANKS, gather.args[2])}) if m.forward == "all-gather"}
    memories, attention = seen["memories of gla"], next(m for of, m in seen.items() if "attention" in of)
    assert memories.forward_bytes == memories.backward_bytes == (RANKS - 1) * 2 * 2 * (8 + 8 * 8) * 4
    assert attention.forward_bytes == (RANKS - 1) * 2 * 2 * 2 * (16 // RANKS) * 8 * 4
    assert memories.behind > 0 < attention.behind


@pytest.mark.parametrize("rank", range(3))
def test_rows_of_a_rank_attend_as_those_of_the_whole(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined over the keys of the ranks before and its own, o and all gradients are those of softmax attention, to the last digits."""
    monkeypatch.setattr(attention, "place", lambda group: rank)
    q, k, v = (torch.randn(2, 3, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rows, d = slice(4 * rank, 4 * rank + 4), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    found = attention.attend(q[..., rows, :], k, v, 0.3, "")
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)[..., rows, :]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(x, (q, k, v), d) for x in (found, wanted)), rtol=0, atol=1e-13)


def test_attention_over_a_mesh_makes_no_tensor_of_tokens_by_tokens(sp: DeviceMesh, graphs: list[GraphModule]) -> None:
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    lsmc.compile(small("N"), mesh=sp)(tokens, tokens)
    shapes = [tuple(n.meta["example_value"].shape) for n in graphs[-1].graph.nodes
              if isinstance(n.meta.get("example_value"), Tensor)]
    assert calls(graphs[-1], "lsmc.attend")
    assert not any(shape[-2:] == (16, 64) for shape in shapes)


def test_small_gradients_are_summed_in_one_message(sp: DeviceMesh, graphs: list[GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """One message a type for all that is small; large ones by themselves. As many bytes as one by one."""
    tokens, found = torch.zeros(2, 16, dtype=torch.int64), dict[int, list[int]]()
    for most in (1 << 18, 40, 0):
        monkeypatch.setattr(spread, "SMALL", most)
        torch._dynamo.reset()
        lsmc.compile(small("L"), mesh=sp)(tokens, tokens)
        (group,) = {n.args[-1] for n in calls(graphs[-1], "lsmc.shared")}
        found[most] = [m.backward_bytes for m in traffic(graphs[-1], {"sp": Axis("sp", RANKS, group)}) if m.of == PARAMETERS]
    assert len(found[1 << 18]) == 1 < len(found[40]) < len(found[0])
    assert len({sum(sizes) for sizes in found.values()}) == 1


def test_checkpointed_regions_are_rewritten_inside(sp: DeviceMesh, graphs: list[GraphModule]) -> None:
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    lsmc.compile(small("L", activation_checkpointing=True), mesh=sp)(tokens, tokens)
    assert not calls(graphs[-1], "lsmc.fwd")
    assert [len(calls(m, "lsmc.incoming")) for m in graphs[-1].modules() if isinstance(m, GraphModule)].count(1) == 1


# --- what is refused


REFUSED: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "uneven tokens": (lambda x: x * 2, (2, 10, 3), "the sequence, dimension 1 of x, is 10, which the 4 ranks of axis 'sp'"),
    "a part of the tokens": (lambda x: x[:, 1:] * 2, (2, 8, 3), "getitem takes the tokens from 1 to 8"),
    "one token": (lambda x: x[:, 0] * 2, (2, 8, 3), "getitem takes one token"),
    "a sum along the tokens": (lambda x: x.cumsum(1), (2, 8, 3), "cumsum goes along the dimension that holds them"),
    "a maximum over tokens": (lambda x: x.amax(), (2, 8, 3), "amax goes along the dimension"),
    "tokens by tokens": (lambda x: x @ x.transpose(1, 2), (2, 8, 3), "matmul contracts"),
    "padding with more tokens": (lambda x: F.pad(x, (0, 0, 0, 1)), (2, 8, 3), "pad adds entries to the dimension"),
    "looking back too far": (lambda x: F.pad(x, (0, 0, 3, 0))[:, :8], (2, 8, 3), "pad looks back 3 tokens, and a rank has 2"),
    "numbers of each rank": (lambda x: x + torch.randn_like(x), (2, 8, 3), "randn_like draws numbers that would be each rank's own"),
    "dropout in place": (lambda x: F.dropout(x, 0.5, True, True), (2, 8, 3), "dropout is called in a way that is not known to draw"),
    "an unknown function": (lambda x: torch.fft.fft(x, dim=1).real, (2, 8, 3), "fft is not known to keep them apart"),
    "nothing to split": (lambda x: x * 2, (8,), "no argument of the model holds the sequence"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_axis_cannot_split_is_refused_by_name(what: str, sp: DeviceMesh, graphs: list[GraphModule]) -> None:
    """Before a graph is compiled, let alone a collective runs; with the line of the model."""
    function, shape, message = REFUSED[what]
    with pytest.raises(LsmMeshError, match=re.escape(message)) as caught:
        lsmc.compile(function, mesh=sp)(torch.zeros(shape))
    assert not graphs
    assert "splits" not in message or "test_mesh.py" in str(caught.value)


def test_heads_that_ranks_cannot_share_are_refused_by_name(sp: DeviceMesh, graphs: list[GraphModule]) -> None:
    inputs = sample(lsmc.zoo.ttt_ln, Case(time=8, groups=2, key_dim=2, value_dim=2)).inputs
    with pytest.raises(LsmMeshError, match="ttt_ln has no summary .* its 2 heads are no multiple of the 4 ranks"):
        lsmc.compile(layer(lsmc.zoo.ttt_ln), mesh=sp)(inputs)
    assert not graphs


def test_packed_sequences_are_no_batch_to_deal_out(sp: DeviceMesh, graphs: list[GraphModule]) -> None:
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    inputs = sample(lsmc.zoo.gla, Case(batch=1, time=8, key_dim=2, value_dim=2)).inputs
    with pytest.raises(LsmMeshError, match=r"axis 'dp' splits the batch, and lsmc.fwd has packed sequences \(cu_seqlens\)"):
        lsmc.compile(lambda x, ends: lsmc.zoo.gla(**x, cu_seqlens=ends), mesh=mesh)(inputs, torch.tensor([0, 3, 8]))
    assert not graphs


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: "sp=2", {}, "is no DeviceMesh"),
        (lambda: init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",)), {}, "an axis 'cp', over which nothing is split"),
        (lambda: init_device_mesh("cpu", (RANKS,)), {}, "have no names"),
        (lambda: init_device_mesh("cpu", (RANKS,), mesh_dim_names=("sp",)), {"dynamic": True}, "dynamic=True beside a mesh"),
        (lambda: init_device_mesh("cpu", (RANKS,), mesh_dim_names=("sp",)), {"fullgraph": False}, "fullgraph=False beside"),
    ],
)
def test_a_mesh_that_cannot_work_is_refused(make: Callable[[], Any], options: dict[str, Any], message: str, sp: DeviceMesh) -> None:
    with pytest.raises(LsmError, match=re.escape(message)):
        lsmc.compile(nn.Identity(), mesh=make(), **options)


def test_no_model_knows_of_ranks() -> None:
    """Model files name no rank, no mesh and no collective: everything of that kind is inserted."""
    words = {"rank", "mesh", "group", "world_size", "distributed", "dist", "collectives", "all_gather", "all_reduce", "shard", "DTensor"}
    for path in (Path(lsmc.models.__file__).parent).glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        named = {part for n in tree for f in ("id", "attr", "arg", "module", "name") if isinstance(getattr(n, f, None), str)
                 for part in getattr(n, f).split(".")}  # fmt: skip
        assert not named & words, path.name
