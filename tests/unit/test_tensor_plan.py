"""Laws of the tensor plan: what is dealt out and how, what a layer exchanges, what is refused; and of what ranks agree on.

The processes are imagined (torch's "fake" group): graphs are captured and rewritten as on real ones, and exchange nothing.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import lsmc
from lsmc.cases import Case, sample
from lsmc.lowering import ops
from lsmc.models import HybridMoE, config
from lsmc.runtime.errors import LsmConfigError, LsmMeshError
from lsmc.runtime.mesh import Axis, sizes
from lsmc.runtime.plans.dims import _fused, _unfused
from lsmc.runtime.plans.parts import layouts
from lsmc.runtime.plans.tensor import layouts as layouts_of
from lsmc.runtime.ranks import Ranks
from lsmc.runtime.traffic import traffic
from lsmc.runtime.train import TrainConfig

TOKENS = torch.zeros(2, 16, dtype=torch.int64)


@pytest.fixture
def tp() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def model(pattern: str, heads: int = 2, **moe: int) -> HybridMoE:
    sizes = {"experts": 2, "top_k": 1, "width": 8, "shared_width": 6} | moe
    return HybridMoE(config("tiny", lsm="gla", pattern=pattern, hidden=12, heads=heads, vocabulary=13, gate_rank=3, moe=sizes))


def test_parameters_are_dealt_out_with_the_heads_and_widths_that_they_serve(tp: DeviceMesh) -> None:
    """Each section of a fused projection by itself; the low rank of a gate, norms, routers, embedding and head stay whole."""
    found = {name: (s.dim, sorted(s.spans)) for name, s in layouts(model("LN"), tp, TOKENS, TOKENS).items()}
    q, k, v, low, gate = (0, 12), (12, 24), (24, 36), 3, (39, 51)
    assert gate[0] == v[1] + low
    experts = {
        f"blocks.{i}.experts.{name}": split
        for i in range(2)
        for name, split in {
            "w_in": (1, [(0, 8), (8, 16)]), "w_out": (2, [(0, 8)]),
            "shared.w_in.weight": (0, [(0, 6), (6, 12)]), "shared.w_out.weight": (1, [(0, 6)]),
        }.items()
    }  # fmt: skip
    assert found == experts | {
        "blocks.0.mixer.project.weight": (0, [q, k, v, gate]),
        "blocks.0.mixer.convolution.weight": (1, [q, k, v]),
        "blocks.0.mixer.expand.g.weight": (0, [(0, 12)]),
        "blocks.0.mixer.expand.g.bias": (0, [(0, 12)]),
        "blocks.0.mixer.out.weight": (1, [(0, 12)]),
        "blocks.1.mixer.project.weight": (0, [q, k, v]),
        "blocks.1.mixer.out.weight": (1, [(0, 12)]),
    }


@pytest.mark.parametrize("length", [16, 15])
def test_a_layer_takes_one_sum_in_each_direction(length: int, tp: DeviceMesh, graphs: list[GraphModule]) -> None:
    """A mixer and a layer of experts, shared one included: one reduce-scatter over tokens and, where they are needed again, one
    all-gather; between them a rank has its share of them. What ranks cannot share evenly is one all-reduce."""
    tokens = TOKENS[:, :length]
    losses = lsmc.compile(model("LN"), mesh=tp)(tokens, tokens)
    group = str(next(n.args[-1] for n in graphs[-1].graph.nodes if str(n.target).startswith("lsmc.dealt")))
    half = 2 * length * 12 * 4 // 2
    found = Counter(m.forward for m in traffic(graphs[-1], {"tp": Axis("tp", 2, group)}) if m.forward_bytes in (half, 2 * half))
    norms = [n.meta["example_value"].shape for n in graphs[-1].graph.nodes if "rms_norm" in str(n.target)]
    if length % 2:
        assert found == {"all-reduce": 4}
    else:
        assert found == {"reduce-scatter": 4, "all-gather": 4}
        assert [shape[1] for shape in norms if shape[-1] == 12] == [16, 8, 8, 8, 8]
    assert "joined" not in graphs[-1].code
    losses.total.backward()


def test_kept_values_that_nothing_reads_are_of_any_shape(graphs: list[GraphModule]) -> None:
    """In regions that are checkpointed a graph takes all that an operator gives, what it keeps for its backward too."""
    def layer(inputs: dict[str, Tensor]) -> Tensor:
        return F.silu(lsmc.zoo.gla(**inputs))

    lsmc.compile(layer)(sample(lsmc.zoo.gla, Case(time=8, heads=2, key_dim=2, value_dim=2)).inputs)
    ((inner, node),) = ops.in_graph(graphs[-1])
    wanted = layouts_of(inner, axis := Axis("tp", 2, "tp"))
    with inner.graph.inserting_after(node):
        kept = inner.graph.call_function(operator.getitem, (node, 2))
    kept.meta["example_value"] = torch.zeros(3)
    assert layouts_of(inner, axis) == wanted


def test_tokens_stay_whole_where_something_is_written_in_place(tp: DeviceMesh, graphs: list[GraphModule]) -> None:
    """A gathered copy would not see it."""
    inner = model("N")

    def written(tokens: Tensor, targets: Tensor) -> Tensor:
        x = inner.blocks[0](inner.embedding(tokens))[0] + 1
        y = inner.head(x)
        x.add_(1)
        return y.mean() + inner.head(x).mean()

    lsmc.compile(written, mesh=tp)(TOKENS, TOKENS)
    assert "scattered" not in graphs[-1].code and "lsmc.summed" in graphs[-1].code


class Heads(nn.Module):
    """Attention whose output is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 12)

    def forward(self, tokens: Tensor, _: Tensor) -> Tensor:
        q, k, v = self.inner(tokens[..., None].float()).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).add_(1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "heads of an operator": (lambda: model("L", heads=3), "the number of heads of gla .* is 3, which the 2 ranks of axis 'tp'"),
    "heads of attention": (lambda: model("N", heads=1), "the number of attention heads is 1, which the 2 ranks"),
    "writing in place": (Heads, "splits what .*add_.* writes in place"),
    "widths": (lambda: model("L", width=7), "the width of the experts is 7, which the 2 ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_dealt_out_is_refused_by_name(case: str, tp: DeviceMesh, graphs: list[GraphModule]) -> None:
    make, message = REFUSED[case]
    with pytest.raises(LsmMeshError, match=message):
        lsmc.compile(make(), mesh=tp)(TOKENS, TOKENS)


@given(st.data())
def test_spans_of_a_factor_are_spans_of_the_product(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    place = data.draw(st.integers(0, len(factors) - 1))
    edges = sorted(data.draw(st.sets(st.integers(0, factors[place]))))
    spans = frozenset(zip(edges[::2], edges[1::2]))
    entries = {i for a, b in _fused(spans, place, factors) for i in range(a, b)}
    inner, size = math.prod(factors[place + 1 :]), factors[place]
    assert entries == {i for i in range(math.prod(factors)) if any(a <= i // inner % size < b for a, b in spans)}
    assert _unfused(_fused(spans, place, factors), place, factors) == spans


# --- what ranks agree on


def test_meshes_are_read_from_text() -> None:
    assert sizes("dp=2,tp=4", "mesh") == {"dp": 2, "tp": 4}
    for text in ("dp", "xp=2", "dp=0", "dp=2,dp=2", "dp=two"):
        with pytest.raises(LsmMeshError, match=f"mesh = '{text}': .* is no axis with its size"):
            sizes(text, "mesh")
    with pytest.raises(LsmConfigError, match="TrainConfig.fsdp = True: needs a mesh with an axis dp"):
        TrainConfig(mesh="sp=2", fsdp=True)


def test_a_mesh_of_more_processes_than_there_are_says_how_to_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(LsmConfigError, match="takes 4 processes, and this is one of 1\nhelp: torchrun --nproc-per-node 4"):
        Ranks("dp=2,sp=2", torch.device("cpu"), 10.0)


def test_who_is_missing_is_who_gives_no_sign_and_else_who_is_behind() -> None:
    ranks = Ranks("", torch.device("cpu"), 10.0)
    ranks.count = 3
    before = {0: (5, 7, "step 2"), 1: (5, 7, "step 2"), 2: (5, 6, "the batch of step 2")}
    seen: dict[int, tuple[int, int, str]] = {rank: (sign + 1, place, what) for rank, (sign, place, what) in before.items()}
    ranks._others = lambda: seen  # type: ignore[method-assign]
    assert ranks._behind(before) == "rank 2 is still at the batch of step 2"
    seen[1] = before[1]
    assert ranks._behind(before) == "rank 1 does not answer (last seen at step 2)"
    del seen[1]
    assert ranks._behind(before) == "rank 1 does not answer (it never began)"
