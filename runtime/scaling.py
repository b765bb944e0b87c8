"""How a layer scales over `sp` with as many tokens on every rank: a simulation. No rank of it runs.

Bytes are read off graphs that `lsmc.runtime.traffic` captures, at the number of ranks that is asked for; times of
one GPU are read from files, as measured. What messages take follows from `Machine`. Three ways of exchanging are compared:

all-gather   what `lsmc.compile(mesh=…)` inserts: all summaries, or all keys and values, go to all ranks
ring         from rank to rank: memories wait for the rank before (LASP-1, arXiv 2404.02882), keys and values go round
             (ring attention, arXiv 2310.01889)
all-to-all   tokens are exchanged for heads around the operator and back (DeepSpeed-Ulysses, arXiv 2309.14509)

Of the ranks the slowest counts, which is the last: all of its keys are there to be seen. What all three have in common is
the same in all: tails of convolutions. The gradients of parameters are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from lsmc.lowering import ops, split
from lsmc.runtime.errors import LsmConfigError
from lsmc.runtime.insert import example, mode_of, tensors
from lsmc.runtime.mesh import Axis
from lsmc.runtime.spread import name_of
from lsmc.runtime.traffic import Message, traffic

SOFTMAX = "attention"
"""The name of attention layers, in files of times too."""

WAYS = ("all-gather", "ring", "all-to-all")


# --- the machine

PROTOCOLS: tuple[tuple[float, float, float, float, float, float], ...] = (
    (6.6e-6, 0.6e-6, 2.7e-6, 1e-6, 0.25, 20.4e9), (14e-6, 1.9e-6, 4e-6, 1e-6, 0.92, math.inf),
    (8.4e-6, 3.4e-6, 14e-6, 3e-6, 1, math.inf),
)  # fmt: skip
"""LL, LL128, Simple: seconds of a call, of a step by NVLink, of one by the network, the least of any beside a network; which
part of the bandwidth is of use, and how much at most. From NCCL's own model of rings: `src/graph/tuning.cc`, commit b647562."""


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes, each with a network card: bytes/s of NVLink and of the card, in one direction, and of a GPU's memory; float32
    FLOP/s; bytes that a GPU holds.

    NVLink, FLOP/s and memory: NVIDIA's data sheet of the H100 SXM (900 GB/s both ways). Cards: 400 Gb/s for each GPU, as
    in a DGX H100. The rate of memory was measured: `ceilings` in docs/results/h100-peers.json.
    """

    per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    rate: float = 3.0e12
    flops: float = 67e12
    memory: float = 80e9

    def gather(self, ranks: int, received: float) -> float:
        """Seconds of an all-gather or a reduce-scatter as a ring of all ranks, by the fastest protocol."""
        nodes = -(-ranks // self.per_node)
        bus = self.nvlink if nodes == 1 else min(self.nvlink, min(ranks, self.per_node) * self.network)
        return min(base + (ranks - nodes) * max(near, (nodes > 1) * least) + (nodes - 1) * far + received / min(share * bus, most)
                   for base, near, far, least, share, most in PROTOCOLS)

    def hop(self, size: float, across: bool) -> float:
        """Seconds of a message to the next rank, on the same node or `across` nodes."""
        speed = self.network if across else self.nvlink
        return min(base + (far if across else near) + size / min(share * speed, most)
                   for base, near, far, _, share, most in PROTOCOLS)

    def hops(self, ranks: int, size: float) -> float:
        """Seconds of a message that each rank waits for before it sends its own."""
        nodes = -(-ranks // self.per_node)
        return (ranks - nodes) * self.hop(size, False) + (nodes - 1) * self.hop(size, True)

    def turn(self, ranks: int, size: float) -> float:
        """Seconds of an all-to-all of `size` bytes on each rank: what stays on the node and what leaves it, side by side."""
        base, near, far = PROTOCOLS[-1][:3]
        inside = min(ranks, self.per_node)
        there = max(size * (inside - 1) / ranks / self.nvlink, size * (ranks - inside) / ranks / self.network)
        return base + (far if ranks > inside else near) + there

    def exchange(self, kind: str, ranks: int, received: float) -> float:
        """Seconds of a message of a graph, by the bytes that a rank receives."""
        if kind == "all-to-all":
            return self.turn(ranks, received * ranks / (ranks - 1))
        parts = 2 if kind == "all-reduce" else 1
        return parts * self.gather(ranks, received / parts) if kind else 0.0

    def messages(self, found: Iterable[Message], axes: Mapping[str, Axis]) -> float:
        """Seconds of all messages of a step, one after the other."""
        return sum(self.exchange(kind, axes[m.axis].size, size) for m in found
                   for kind, size in ((m.forward, m.forward_bytes), (m.backward, m.backward_bytes)))


# --- what graphs say


@dataclass(frozen=True)
class Layer:
    """What a layer asks of the ranks, read off its graphs.

    gathers            messages of the operator; `tails`: of convolutions
    passed             bytes of a rank's memories, or keys and values: what a ring passes on
    entering, leaving  bytes of the operands of the operator on a rank, and of its output
    again              how often the operator runs beyond once: for its summary, or from the memory that comes in
    moved              bytes that summaries and corrections read and write
    combined, flops    what composing the maps of all ranks takes
    """

    name: str
    ranks: int
    gathers: tuple[Message, ...]
    tails: tuple[Message, ...]
    passed: int
    entering: int
    leaving: int
    heads: int
    batch: int
    tokens: int
    again: float
    moved: int
    combined: int
    flops: int

    @classmethod
    def read(cls, name: str, spread: GraphModule, alone: GraphModule, axis: Axis) -> Layer:
        """From the graph on an axis, and that of one rank with as many tokens as a rank has."""
        (operator,) = [n for n in alone.graph.nodes if name_of(n) in ("lsmc.fwd", "scaled_dot_product_attention")]
        found = [m for m in traffic(spread, {axis.name: axis}) if m.forward == "all-gather"]
        made = [n for n in spread.graph.nodes if name_of(n).removeprefix("lsmc.") in split.OPERATORS]
        if name_of(operator) == "lsmc.fwd":
            plan = ops.plan_of(str(operator.args[3]))
            fields = {f.name: f for f in plan.canonical.inputs}
            inputs: Any = operator.args[0]
            given = [x for n, x in zip(plan.inputs, map(example, inputs)) if fields[n].per == "token"]
            o, *rest = example(operator)
            memories, heads = rest[: len(plan.carries)], min(x.shape[2] for x in (o, *given) if x.ndim > 3)
            batch, tokens, own = o.shape[0], o.shape[1], [m for m in found if m.of.startswith("memories")]
        else:
            given, o = [example(n) for n in operator.args[:3]], example(operator)
            memories, heads, own = given[1:], o.shape[-3], found
            batch, tokens = o.shape[0], o.shape[-2]
        runs = sum(_runs(n) for n in spread.graph.nodes)
        last = [n for n in made if name_of(n) == "lsmc.incoming"]
        moved = [n for n in made if n not in last and name_of(n) != "lsmc.columns"]
        return cls(name, axis.size, tuple(own), tuple(m for m in found if m not in own), _bytes(memories), _bytes(given),
                   _bytes([o]), heads, batch, tokens, max(0.0, runs - 1), sum(map(_touched, moved)), sum(map(_touched, last)),
                   sum(map(_flops, last)))


def _runs(node: Node) -> float:
    """How many operators a node is, in time: one on columns beside V takes as much more as it has columns."""
    if name_of(node) == "lsmc.columns":
        o, through = example(node)[:2]
        return 1 + float(through.shape[-1] / o.shape[-1])
    return float(name_of(node) == "lsmc.fwd")


def _bytes(values: Any) -> int:
    return sum(x.numel() * x.itemsize for x in tensors(values))


def _touched(node: Node) -> int:
    return _bytes([example(n) for n in node.all_input_nodes]) + _bytes(example(node))


def _flops(node: Node) -> int:
    module: Any = node.graph.owning_module
    given: Any = tuple(_example(a) for a in node.args)
    call: Any = node.target
    with mode_of(module), FlopCounterMode(display=False) as counter:
        call(*given)
    return counter.get_total_flops()


def _example(value: Any) -> Any:
    return [_example(x) for x in value] if isinstance(value, list | tuple) else example(value) if isinstance(value, Node) else value


# --- what was measured


@dataclass(frozen=True)
class Time:
    """Seconds of one GPU, forward and backward, at B sequences of T tokens and H heads: of an operator, or of a `whole` layer."""

    layer: str
    whole: bool
    batch: int
    tokens: int
    heads: int
    seconds: tuple[float, float]

    @property
    def work(self) -> float:
        """What an operator's time goes with: tokens and heads, pairs of tokens in attention."""
        return self.batch * self.tokens * self.heads * (self.tokens if self.layer == SOFTMAX else 1)


def times(path: Path) -> list[Time]:
    """What a file holds: `lsmc bench … --out FILE`, whose contender sdpa is attention; or a list of whole layers, each

        {"layer": METHOD or "attention", "shape": [B, T, H, K, V], "forward_ms": …, "backward_ms": …}

    Raises LsmConfigError for a file that is not there or holds neither.
    """
    try:
        record = json.loads(path.read_text())
        entries = record["results"] if isinstance(record, dict) else record
        found = [t for entry in entries for t in _timed(entry)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LsmConfigError(f"{path} holds no times of one GPU: {type(error).__name__}: {error}",
                             help="lsmc bench METHOD --against sdpa --out FILE writes them") from error
    return found


def _timed(entry: dict[str, Any]) -> Iterator[Time]:
    batch, tokens, heads = entry["shape"][:3]
    if "layer" in entry:
        yield Time(entry["layer"], True, batch, tokens, heads, (entry["forward_ms"] / 1e3, entry["backward_ms"] / 1e3))
        return
    for name, layer in (("eager", entry["method"]), ("sdpa", SOFTMAX)):
        if run := entry["runs"].get(name):
            there, both = run["forward_ms"], run["graph_ms"] or run["forward_backward_ms"]
            yield Time(layer, False, batch, tokens, heads, (there / 1e3, (both - there) / 1e3))


def nearest(measured: Iterable[Time], layer: str, whole: bool, tokens: int) -> Time | None:
    """The time at the number of tokens that is nearest by its ratio."""
    known = [t for t in measured if t.layer == layer and t.whole == whole]
    return min(known, key=lambda t: abs(math.log(t.batch * t.tokens / tokens)), default=None)


def alone(layer: Layer, measured: Sequence[Time]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of the operator, and of all else in the layer, forward and backward, for a rank's tokens on one GPU.

    Raises LsmConfigError where no operator of this name was measured. Without a time of the whole layer the rest is nothing.
    """
    n = layer.batch * layer.tokens
    operator, whole = (nearest(measured, layer.name, of, n) for of in (False, True))
    if operator is None:
        raise LsmConfigError(f"no file has times of the operator of {layer.name}",
                             help="lsmc bench METHOD --against sdpa --out FILE writes them")
    here = Time(layer.name, False, layer.batch, layer.tokens, layer.heads, (0, 0)).work
    own = [s * here / operator.work for s in operator.seconds]
    rest = [0.0, 0.0]
    if whole is not None:
        rest = [max(0.0, w - s * whole.work / operator.work) * n / (whole.batch * whole.tokens)
                for w, s in zip(whole.seconds, operator.seconds)]
    return (own[0], own[1]), (rest[0], rest[1])


# --- the simulation


@dataclass(frozen=True)
class Step:
    """A layer on some ranks: bytes that a rank receives forward, seconds forward and backward, seconds of both on one GPU with one
    rank's tokens, what stands against it (then there are no seconds)."""

    layer: str
    ranks: int
    way: str
    received: float
    seconds: tuple[float, float] | None
    alone: float
    note: str = ""


def simulate(layer: Layer, measured: Sequence[Time], machine: Machine) -> list[Step]:
    """The layer with each of `WAYS`."""
    operator, rest = alone(layer, measured)
    one = sum(operator) + sum(rest)
    run = {"all-gather": _gathered, "ring": _passed, "all-to-all": _turned}
    steps = []
    for way in WAYS:
        received, seconds, note = run[way](layer, operator, machine)
        tails = sum(machine.gather(layer.ranks, m.forward_bytes) for m in layer.tails)
        received += sum(m.forward_bytes for m in layer.tails)
        whole = None if seconds is None else (seconds[0] + rest[0] + tails, seconds[1] + rest[1] + tails)
        steps.append(Step(layer.name, layer.ranks, way, received, whole, one, note))
    return steps


_Found = tuple[float, tuple[float, float] | None, str]


def _gathered(layer: Layer, operator: tuple[float, float], machine: Machine) -> _Found:
    if not layer.gathers:
        return 0.0, None, "has no summary"
    received = sum(m.forward_bytes for m in layer.gathers)
    bare, over = (sum(machine.gather(layer.ranks, m.forward_bytes) for m in layer.gathers if bool(m.operators) == hidden)
                  for hidden in (False, True))
    maps = layer.moved / machine.rate + layer.combined / machine.rate + layer.flops / machine.flops
    note = "does not fit" if received * layer.ranks > (layer.ranks - 1) * machine.memory else ""
    if layer.name == SOFTMAX:  # the last rank: its rows see all keys before them
        return received, (bare + operator[0] * (2 * layer.ranks - 1), bare + operator[1] * (2 * layer.ranks - 1)), note
    found = [max(t, over) + bare + t * layer.again + (1 + back) * maps for back, t in enumerate(operator)]
    return received, (found[0], found[1]), note


def _passed(layer: Layer, operator: tuple[float, float], machine: Machine) -> _Found:
    if not layer.gathers:
        return 0.0, None, "has no summary"
    if layer.name == SOFTMAX:  # a block of keys at a time; backward, their gradients go round with them
        hops = [machine.hop((1 + back) * layer.passed, layer.ranks > machine.per_node) for back in (0, 1)]
        found = [t + (layer.ranks - 1) * max(2 * t, hop) for t, hop in zip(operator, hops)]
        return layer.passed * (layer.ranks - 1), (found[0], found[1]), ""
    serial, hidden = machine.hops(layer.ranks, layer.passed), any(m.operators for m in layer.gathers)
    found = [(max(t, serial) if hidden else t + serial) + t * layer.again + (1 + back) * layer.moved / machine.rate
             for back, t in enumerate(operator)]
    return layer.passed, (found[0], found[1]), ""


def _turned(layer: Layer, operator: tuple[float, float], machine: Machine) -> _Found:
    received = (layer.entering + layer.leaving) * (layer.ranks - 1) / layer.ranks
    if layer.heads % layer.ranks:
        return received, None, f"has {layer.heads} heads"
    sent = machine.turn(layer.ranks, layer.entering) + machine.turn(layer.ranks, layer.leaving)
    work = layer.ranks if layer.name == SOFTMAX else 1  # pairs of tokens: shared evenly
    return received, (sent + operator[0] * work, sent + operator[1] * work), ""


__all__ = ["SOFTMAX", "WAYS", "Layer", "Machine", "Step", "Time", "alone", "simulate", "times"]
