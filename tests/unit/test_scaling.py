"""Laws of the simulation of many ranks: its bytes are those of the graphs, and more of anything never takes less time."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from lsmc import cli
from lsmc.models import HybridMoE, config
from lsmc.runtime.errors import LsmConfigError
from lsmc.runtime.mesh import Axis
from lsmc.runtime.scaling import SOFTMAX, WAYS, Layer, Machine, Time, simulate, times
from lsmc.runtime.traffic import capture, traffic

PEERS = Path(__file__).parents[2] / "docs" / "results" / "h100-peers.json"


read = cli._layer


@functools.cache
def layer(name: str, tokens: int = 32, ranks: int = 16) -> Layer:
    made: Layer = read(name, "tiny", 2, tokens, ranks)
    return made


@functools.cache
def measured() -> tuple[Time, ...]:
    return tuple(times(PEERS))


def test_what_an_lsm_layer_gathers_does_not_depend_on_the_tokens() -> None:
    """What a ring passes neither; what an all-to-all turns does, and so do keys and values."""
    few, many = layer("gla"), layer("gla", tokens=64)
    assert few.gathers == many.gathers and few.tails == many.tails and few.passed == many.passed
    assert many.entering == 2 * few.entering and many.leaving == 2 * few.leaving
    few, many = layer(SOFTMAX), layer(SOFTMAX, tokens=64)
    assert [2 * m.forward_bytes for m in few.gathers] == [m.forward_bytes for m in many.gathers]


def test_bytes_are_those_of_the_graph_of_a_model() -> None:
    axis = Axis("sp", 16, "sp")
    with FakeTensorMode():
        text = torch.zeros(2, 512, dtype=torch.int64)
        graph = capture(HybridMoE(config("tiny", lsm="gla", pattern="LN")), {"sp": axis}, text, text)
    seen = {m.of: m for m in traffic(graph, {"sp": axis}) if m.forward == "all-gather"}
    (memories,), (keys,) = layer("gla").gathers, layer(SOFTMAX).gathers
    assert memories.forward_bytes == seen["memories of gla"].forward_bytes
    assert memories.operators == seen["memories of gla"].operators == 1
    assert 2 * keys.forward_bytes == seen[keys.of].forward_bytes, "in 16 bits here, in 32 there"
    heads, K = 2, 64
    assert layer("gla").passed == 2 * heads * K * K * 4
    assert layer(SOFTMAX).passed * 15 == keys.forward_bytes


SIZES = st.floats(1, 1e12)


@given(size=SIZES, more=SIZES, ranks=st.integers(2, 512), per_node=st.sampled_from([1, 4, 8]), slower=st.floats(0.1, 1))
def test_more_bytes_more_ranks_and_slower_links_take_no_less_time(size: float, more: float, ranks: int, per_node: int, slower: float) -> None:
    machine = Machine(per_node=per_node)
    slow = dataclasses.replace(machine, nvlink=slower * machine.nvlink, network=slower * machine.network)
    for of in (lambda m, n, x: m.gather(n, x), lambda m, n, x: m.hops(n, x), lambda m, n, x: m.hop(x, n > 8)):
        assert of(machine, ranks, size) <= of(machine, ranks, size + more)
        assert of(machine, per_node * ranks, size) <= of(machine, 2 * per_node * ranks, size)
        assert of(machine, ranks, size) <= of(slow, ranks, size)
    assert machine.turn(ranks, size) <= machine.turn(ranks, size + more)


def test_a_layer_takes_no_less_on_more_ranks_and_never_less_than_alone() -> None:
    before = [0.0] * 3
    for ranks in (16, 64):
        for name in ("gla", SOFTMAX):
            steps = simulate(layer(name, ranks=ranks), measured(), Machine())
            assert [s.way for s in steps] == list(WAYS)
            assert all(s.seconds is None or sum(s.seconds) >= s.alone for s in steps)
        assert steps[-1].seconds is None and steps[-1].note == "has 2 heads"
        now = [sum(s.seconds or (0.0,)) for s in steps]
        assert all(a <= b for a, b in zip(before, now))
        before = now
    few = simulate(dataclasses.replace(layer(SOFTMAX), ranks=2), measured(), Machine())
    assert few[-1].seconds is not None, "as many heads as ranks"


def test_times_of_whole_layers_stand_beside_those_of_operators(tmp_path: Path) -> None:
    """What a layer takes beyond its operator goes with its tokens."""
    path = tmp_path / "layers.json"
    path.write_text(json.dumps([{"layer": "gla", "shape": [16, 4096, 8, 128, 128], "forward_ms": 5.0, "backward_ms": 9.0}]))
    whole = (*measured(), *times(path))
    one, both = (simulate(layer("gla"), t, Machine())[0] for t in (measured(), whole))
    operator = next(t for t in measured() if t.layer == "gla")
    rest = (14e-3 - sum(operator.seconds)) * 2 * 32 / (16 * 4096)
    assert both.alone == pytest.approx(one.alone + rest)
    assert one.seconds and both.seconds and sum(both.seconds) == pytest.approx(sum(one.seconds) + rest)
    with pytest.raises(LsmConfigError, match="no file has times of the operator of gla"):
        simulate(layer("gla"), times(path), Machine())
    path.write_text("{}")
    with pytest.raises(LsmConfigError, match="layers.json holds no times of one GPU"):
        times(path)


def test_the_command_prints_every_exchange(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_layer", lambda name, size, batch, tokens, ranks: layer(name, tokens, ranks))
    cli.main([*"scaling gla --size tiny --batch 2 --tokens 32 --ranks 16 --markdown --times".split(), str(PEERS)])
    out = capsys.readouterr().out
    assert [row.split(" | ")[2] for row in out.splitlines() if row.startswith(("| gla", "| attention"))] == [*WAYS, *WAYS]
    assert "no time of a whole layer" in out
