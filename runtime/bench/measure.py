"""One method at one shape, in this process: times, memory, errors, and the floor that they stand on.

On a GPU in bfloat16 by ``triton.testing.do_bench`` (medians, a cold L2 cache), eagerly and replayed from a CUDA graph; on a CPU
in float32, the contenders taking turns and the shortest turn counting, because whatever else runs on the machine only ever
adds. Gradients of every input by ``torch.autograd.grad``. Errors are RMS ratios against the float64 recurrence on identically
rounded inputs, over a prefix of the first sequence, taken from the very tensors and kernels that were timed.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lsmc.adjoint import differentiate
from lsmc.cases import Case, sample, tensors
from lsmc.chunk import derive
from lsmc.pipeline import CHUNK
from lsmc.reference import reference
from lsmc.runtime.bench.contenders import CONTENDERS, OURS, Absent, Function, differs
from lsmc.runtime.errors import LsmConfigError
from lsmc.schedules import Kernel, Shape
from lsmc.schedules.cost import cost

Sizes = tuple[int, int, int, int, int]
"""B, T, H, K, V."""

PREFIX = 512
"""Tokens of the first sequence that are compared with the recurrence."""


SECONDS = 2.0
"""For each contender on a CPU, at least."""


@dataclass(frozen=True)
class Ceilings:
    """What the device did when it was asked for nothing else: a copy, bytes read and written; a matrix product."""

    bytes_per_s: float
    flops_per_s: float


@dataclass
class Run:
    """One contender. Times in milliseconds: on a CPU the shortest turn, with the median beside it."""

    first_call_s: float
    """In this process until the first gradient: deriving, generating, compiling, or finding it in caches."""
    cold_s: float | None = None
    """The same in a process of its own with empty caches; at the first shape."""
    forward_ms: float = 0.0
    forward_backward_ms: float = 0.0
    forward_median_ms: float = 0.0
    forward_backward_median_ms: float = 0.0
    graph_ms: float | None = None
    """Forward and backward replayed from a CUDA graph, which leaves out the host."""
    peak_mib: float | None = None
    """Beyond the inputs; GPU only."""
    errors: dict[str, float] = field(default_factory=dict)
    """RMS ratios: "o", and the gradient of every input by its name; empty where another function was computed."""
    notes: list[str] = field(default_factory=list)


@dataclass
class Timing:
    """One method at one shape, by every contender that ran; why the others did not."""

    method: str
    shape: Sizes
    dtype: str
    device: str
    ceilings: Ceilings
    bytes: int
    """Of inputs and outputs, once."""
    flops: tuple[float, float]
    """Forward, and forward with backward: every operation of the derived chunk programs once, in chunks of `CHUNK`."""
    runs: dict[str, Run]
    absent: dict[str, str]

    @property
    def floor_ms(self) -> tuple[float, float]:
        """Forward, and forward with backward: inputs and outputs moved once, and three times, as fast as a copy."""
        once = 1e3 * self.bytes / self.ceilings.bytes_per_s
        return once, 3 * once

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self) | {"floor_ms": list(self.floor_ms)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Timing:
        """What `record` wrote."""
        given = {f.name: record[f.name] for f in dataclasses.fields(cls)}
        given |= {"runs": {name: Run(**found) for name, found in record["runs"].items()}}
        given |= {"ceilings": Ceilings(**record["ceilings"]), "shape": tuple(record["shape"]), "flops": tuple(record["flops"])}
        return cls(**given)


@dataclass
class Decode:
    """One token of B sequences through `step`: the memory is read and written once. Times in milliseconds."""

    method: str
    shape: Sizes
    dtype: str
    device: str
    ceilings: Ceilings
    bytes: int
    """Of the memory, read and written, in float32."""
    step_ms: float
    graph_ms: float | None
    errors: dict[str, float]
    """RMS ratios of "o" and of the new "state"."""
    notes: list[str] = field(default_factory=list)

    @property
    def floor_ms(self) -> float:
        return 1e3 * self.bytes / self.ceilings.bytes_per_s

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self) | {"floor_ms": self.floor_ms}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Decode:
        """What `record` wrote."""
        given = {f.name: record[f.name] for f in dataclasses.fields(cls)}
        return cls(**given | {"ceilings": Ceilings(**record["ceilings"]), "shape": tuple(record["shape"])})


def parse_shape(text: str) -> Sizes:
    """``"B,T,H,K,V"``; also ``"B,T,H,D"`` for K = V = D."""
    parts = text.replace("x", ",").split(",")
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) == 4:
        sizes.append(sizes[3])
    if len(sizes) != 5 or min(sizes) < 1:
        raise LsmConfigError(f"shape {text!r} is not five positive numbers B,T,H,K,V")
    return (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4])


@dataclass
class Subject:
    """A method with typical inputs on a device; per-head constants stay in float32, as they are in models, and those that the
    method has a value for want no gradient: nobody trains them."""

    declaration: Any
    shape: Sizes
    device: str

    def __post_init__(self) -> None:
        batch, tokens, heads, key_dim, value_dim = self.shape
        self.dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        few = min(batch, 2)  # drawn, then repeated: drawing takes longer than the rest
        drawn = sample(self.declaration, Case(few, tokens, heads, key_dim=key_dim, value_dim=value_dim, defaults=True))
        self.per_token = drawn.per_token
        self.inputs = {}
        for name, x in drawn.inputs.items():
            x = x.detach().to(self.device, self.dtype if name in drawn.per_token else torch.float32)
            if name in drawn.per_token:
                x = x.repeat(-(-batch // few), *[1] * (x.ndim - 1))[:batch]
            self.inputs[name] = x.requires_grad_(name not in self.declaration.canonical.defaults)

    def taken(self, name: str) -> dict[str, Tensor]:
        """The inputs of a contender."""
        takes = CONTENDERS[name].takes
        return {n: x for n, x in self.inputs.items() if takes is None or n in takes}

    def first_call(self, name: str) -> tuple[Function, Tensor, float]:
        """A contender ready to run, a cotangent, and the seconds until its first gradient; raises `Absent`."""
        contender, inputs = CONTENDERS[name], self.taken(name)
        if contender.takes is not None and len(inputs) < len(contender.takes):
            raise Absent(f"{self.declaration.name} lacks some of {', '.join(contender.takes)}")
        function = contender.prepare(self.declaration, self.dtype)
        started = time.perf_counter()
        try:
            cotangent = torch.randn_like(o := function(**inputs))
            torch.autograd.grad(o, [*learnt(inputs).values()], cotangent)
            synchronise(self.device)
        except Exception as error:
            if contender.peer:
                raise Absent(f"{type(error).__name__}: {str(error).strip() or 'without a message'}") from error
            raise
        return function, cotangent, round(time.perf_counter() - started, 2)


def measure(declaration: Any, shape: Sizes, device: str, *, against: Sequence[str] = ()) -> Timing:
    """Times one method at one shape, by the eager operator and by the contenders of `against`."""
    gpu = device.startswith("cuda")
    subject = Subject(declaration, shape, device)
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    oracle: _Oracle | None = None
    for name in dict.fromkeys((OURS, *against)):
        try:
            function, cotangent, seconds = subject.first_call(name)
        except Absent as reason:
            absent[name] = str(reason)
            continue
        runs[name] = Run(seconds)
        inputs = subject.taken(name)
        forward[name] = functools.partial(function, **inputs)
        both[name] = functools.partial(_gradients, function, inputs, cotangent)
        if other := differs(name, declaration):
            runs[name].notes.append(f"another function: {other}")
        elif CONTENDERS[name].takes is None:
            oracle = oracle or _Oracle(subject, cotangent)
            runs[name].errors = oracle.errors(function)
    for kind, functions in (("forward", forward), ("forward_backward", both)):
        for name, (least, median) in _times(functions, device).items():
            setattr(runs[name], f"{kind}_ms", least)
            setattr(runs[name], f"{kind}_median_ms", median)
    for name in runs if gpu else ():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both[name]()
        runs[name].peak_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    for name in runs if gpu else ():
        runs[name].graph_ms = _from_graph(both[name], runs[name].notes)
    moved = [*subject.inputs.values(), forward[OURS]()]
    return Timing(declaration.name, shape, str(subject.dtype).removeprefix("torch."), device_name(device), ceilings(device),
                  sum(x.numel() * x.element_size() for x in moved), _flops(declaration, shape), runs, absent)


def decode(declaration: Any, shape: Sizes, device: str) -> Decode:
    """Times one token of every sequence, from a memory to the next; T of the shape is not used."""
    batch, _, heads, key_dim, value_dim = shape
    subject = Subject(declaration, (batch, 1, heads, key_dim, value_dim), device)
    token = {n: (x[:, 0] if n in subject.per_token else x).detach() for n, x in subject.inputs.items()}
    drawn = sample(declaration, Case(batch, 1, heads, key_dim=key_dim, value_dim=value_dim, defaults=True, initial_state=True))
    given = [x.detach().to(device, torch.float32) for x in tensors(drawn.state)]
    state = given[0] if len(given) == 1 else tuple(given)

    def step() -> Any:
        with torch.no_grad():
            return declaration.step(**token, state=state)

    step()
    o, new = step()  # a repetition, as what is timed
    exact = {n: x.detach().double() for n, x in subject.inputs.items()}
    start = tuple(x.double() for x in given)
    with torch.no_grad():
        oracle: Callable[..., Any] = reference(declaration)
        wanted_o, wanted = oracle(
            **exact, initial_state=start[0] if len(start) == 1 else start, return_final_state=True)
    errors = {"o": _ratio(o, wanted_o[:, 0]), "state": max(_ratio(x, y) for x, y in zip(tensors(new), tensors(wanted)))}
    notes: list[str] = []
    [(least, _)] = _times({OURS: step}, device).values()
    graph = _from_graph(step, notes) if device.startswith("cuda") else None
    return Decode(declaration.name, subject.shape, str(subject.dtype).removeprefix("torch."), device_name(device),
                  ceilings(device), 2 * sum(x.numel() * x.element_size() for x in given), least, graph, errors, notes)


def learnt(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that want a gradient."""
    return {n: x for n, x in inputs.items() if x.requires_grad}


def _gradients(function: Function, inputs: dict[str, Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(**inputs), [*learnt(inputs).values()], cotangent)


class _Oracle:
    """The float64 recurrence over the prefix. With a cotangent that is zero behind it, gradients are those of the prefix alone."""

    def __init__(self, subject: Subject, like: Tensor) -> None:
        self.subject, self.tokens = subject, min(PREFIX, like.shape[1])
        self.cotangent = torch.zeros_like(like)
        self.cotangent[:1, : self.tokens] = torch.randn_like(like[:1, : self.tokens])
        exact = {n: self._prefix(n, x).detach().double().requires_grad_(x.requires_grad) for n, x in subject.inputs.items()}
        oracle: Callable[..., Any] = reference(subject.declaration)
        o = oracle(**exact)
        leaves = learnt(exact)
        found = torch.autograd.grad(o, [*leaves.values()], self.cotangent[:1, : self.tokens].double())
        self.wanted = {"o": o, **dict(zip(leaves, found))}

    def _prefix(self, name: str, x: Tensor) -> Tensor:
        return x[:1, : self.tokens] if name == "o" or name in self.subject.per_token else x

    def errors(self, function: Function) -> dict[str, float]:
        """RMS ratios of the output and of every gradient."""
        inputs = self.subject.inputs
        o = function(**inputs)
        leaves = learnt(inputs)
        found = {"o": o, **dict(zip(leaves, torch.autograd.grad(o, [*leaves.values()], self.cotangent)))}
        return {name: _ratio(self._prefix(name, x), self.wanted[name]) for name, x in found.items()}


def _ratio(found: Tensor, wanted: Tensor) -> float:
    difference = (found.detach().double() - wanted.detach()).square().mean().sqrt()
    return float(f"{float(difference / wanted.detach().square().mean().sqrt().clamp(min=1e-30)):.2e}")


def _times(
    functions: dict[str, Callable[[], Any]], device: str, least: int = 7
) -> dict[str, tuple[float, float]]:
    """Per contender the time that counts and the median, in milliseconds."""
    if device.startswith("cuda"):
        medians = {name: _median_ms(function) for name, function in functions.items()}
        return {name: (median, median) for name, median in medians.items()}
    turns: dict[str, list[float]] = {name: [] for name in functions}
    quick = [t for name, t in turns.items() if not CONTENDERS[name].slow]
    while min(map(len, quick)) < least or sum(map(sum, quick)) < SECONDS * len(quick):
        for name, function in functions.items():
            if CONTENDERS[name].slow and len(turns[name]) >= 3:
                continue
            started = time.perf_counter()
            function()
            turns[name].append(time.perf_counter() - started)
    return {n: (round(1000 * min(t), 3), round(1000 * statistics.median(t), 3)) for n, t in turns.items()}


def _median_ms(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return round(float(do_bench(function, warmup=50, rep=200, return_mode="median")), 4)


def _from_graph(call: Callable[[], Any], notes: list[str]) -> float | None:
    """Milliseconds of a replay; a note where the call cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return _median_ms(graph.replay)
    except Exception as error:  # what cannot be captured may fail in any way
        torch.cuda.synchronize()
        notes.append(f"not captured in a CUDA graph: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return None


def _flops(declaration: Any, shape: Sizes) -> tuple[float, float]:
    batch, tokens, heads, key_dim, value_dim = shape
    forward = derive(declaration.canonical)
    sizes = Shape(batch * heads, tokens, key_dim, value_dim, CHUNK)
    found = []
    for program in (forward, differentiate(forward)):
        whole = Kernel("whole", tuple(c.name for c in program.carries), (), tuple(name for name, _ in program.outputs))
        found.append(cost(program, whole, sizes).flops)
    return found[0], sum(found)


@functools.cache
def ceilings(device: str) -> Ceilings:
    """Measures the device: a copy far larger than its caches, and a matrix product in the dtype of the benchmarks."""
    gpu = device.startswith("cuda")
    count, side, dtype = (2**29, 8192, torch.bfloat16) if gpu else (2**25, 1024, torch.float32)
    source = torch.randn(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def seconds(call: Callable[[], Any]) -> float:
        if gpu:
            return 1e-3 * _median_ms(call)
        turns = []
        for _ in range(5):
            started = time.perf_counter()
            call()
            turns.append(time.perf_counter() - started)
        return min(turns)

    copied = 2 * count * source.element_size() / seconds(lambda: target.copy_(source))
    return Ceilings(copied, 2.0 * side**3 / seconds(lambda: torch.mm(a, b)))


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
