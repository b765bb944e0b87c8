"""What becomes of one candidate plan: it is compiled, compared and timed, in a process of its own.

What is compared is the whole operator with one kernel's plan changed, output, final memories and all gradients: with the float64
recurrence, on a few chunks of typical gates and of gates that reach the slow kernels; and with the default plans at full size,
tile by tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsmc.cases import Case, sample, tensors
from lsmc.lowering import ops
from lsmc.lowering.apart import Failure
from lsmc.lowering.backends.triton import Compiled
from lsmc.lowering.plan import Plan as Methods
from lsmc.lowering.tune import MARGIN, Candidate, defaults
from lsmc.lowering.tuned.store import Like, Plan, rounded
from lsmc.pipeline import CHUNK, Options, compile_plan
from lsmc.reference import reference
from lsmc.resolve import resolve
from lsmc.schedules import Shape
from lsmc.target import H200

DEVICE = "cuda"
DIRECTIONS = ("forward", "backward")
REGIMES = ("typical", "mixture")
"""Gates of `lsmc.cases.GATES`: the second reach the kernels for chunks that decay too strongly for one product."""

BOUND = {"output": 5e-3, "gradient": 8e-3, "gate": 2e-2}
"""Largest RMS error over the RMS of what is right, with 16-bit inputs."""
EXACT = 1 / 500
"""The part of it that float32 inputs allow."""
FLOOR = 2e-2
"""What cancels is measured against this part of the largest output, or gradient."""
TILE = 4
"""How much more than all of a tensor one head's chunk may be off."""

POOL = 256
"""Tokens that are drawn; longer inputs repeat them in random order."""
Sizes = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Subject:
    """A method as it is called: shapes (B, T, H, K, V) that compile to the same kernels, and what else decides those."""

    method: str
    shapes: tuple[Sizes, ...]
    dtype: str
    gates: str
    scale: float
    state: bool
    packed: bool

    def shape(self, sizes: Sizes) -> Shape:
        """The class of sizes that a call of these falls into, with the chunk that it takes."""
        b, t, h, k, v = sizes
        b, t = (1, b * t) if self.packed else (b, t)
        return Shape(rounded(b * h), rounded(t), k, v, max(16, min(CHUNK, rounded(t))), 4 if self.dtype == "float32" else 2)


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel of a subject's forward or backward program."""

    subject: Subject
    direction: str
    candidate: Candidate

    def __str__(self) -> str:
        return str(self.candidate)


@dataclass(frozen=True)
class Chosen:
    """The plans of both directions for one shape, to be compared and timed together."""

    subject: Subject
    sizes: Sizes
    forward: tuple[Candidate, ...]
    backward: tuple[Candidate, ...]


@dataclass(frozen=True)
class Call:
    """The tensors of one call: inputs in the order of the operator, memories, where packed sequences begin, cotangents."""

    inputs: dict[str, Tensor]
    per_token: frozenset[str]
    start: list[Tensor]
    cu_seqlens: Tensor | None


# -- one subject, here or in a worker ---------------------------------------------------------------------------------


@functools.cache
def plan_of(subject: Subject) -> Methods:
    """Both directions of a subject, known to the operators."""
    shape = subject.shape(subject.shapes[0])
    canonical = resolve(subject.method).canonical
    classes = Shape(shape.sequences, shape.tokens, rounded(shape.key), rounded(shape.value), shape.chunk)  # as calls do
    options = Options(subject.scale, shape.chunk, None, "triton", not subject.state)
    return ops.plan_of(ops.register(compile_plan(canonical, options, classes)))


def trained(subject: Subject) -> set[str]:
    """The inputs that want a gradient: all but constants of the method."""
    return {*plan_of(subject).inputs} - {*resolve(subject.method).canonical.defaults}


def compiled(subject: Subject) -> dict[str, Compiled]:
    """The programs of both directions, as training runs them."""
    plan, learnt = plan_of(subject), trained(subject)
    made: list[Any] = [plan.training.executable, plan.gradients(tuple(n in learnt for n in plan.inputs)).executable]
    return dict(zip(DIRECTIONS, made, strict=True))


def draw(subject: Subject, sizes: Sizes, gates: str, device: str) -> Call:
    """Inputs of a call: `POOL` tokens of a random case in random order; with typical gates, constants of the method are its own."""
    b, t, h, k, v = sizes
    plan, method = plan_of(subject), resolve(subject.method)
    drawn = sample(method, Case(1, POOL, h, key_dim=k, value_dim=v, gates=gates))
    constants = {n: torch.tensor(values(h)) for n, values in method.canonical.defaults.items() if gates == "typical"}
    batch, tokens = (1, b * t) if subject.packed else (b, t)
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    inputs = {}
    for name in plan.inputs:
        x = constants.get(name, drawn.inputs[name].detach())
        if name in drawn.per_token:
            rows = torch.randint(POOL, (batch, tokens), device=device, generator=generator)
            x = x.to(device, getattr(torch, subject.dtype if name in ("q", "k", "v") else subject.gates))[0][rows]
        inputs[name] = x.to(device, x.dtype if name in drawn.per_token else torch.float32).requires_grad_(name in trained(subject))
    extent = {"K": k, "V": v, "1": 1}
    dims = [plan.forward.program.index[c.inp].dims for c in plan.forward.program.carries] if subject.state else []
    start = [torch.rand(b, h, extent[r], extent[c], device=device, generator=generator).requires_grad_() for r, c in dims]
    cu = torch.arange(0, b * t + 1, t, device=device) if subject.packed else None
    return Call(inputs, drawn.per_token, start, cu)


_drawn = functools.lru_cache(maxsize=2)(draw)


def launches(subject: Subject, call: Call) -> dict[str, Any]:
    """The launches that the operator makes of a call, not begun: what the forward keeps is zero, and all chunks are mild."""
    plan, made = plan_of(subject), compiled(subject)
    chunk = plan.chunk
    inputs = {n: x.detach() for n, x in call.inputs.items()}
    start = dict(zip(plan.carries, (x.detach() for x in call.start)))
    forward = made["forward"].prepare(inputs, start, chunk, call.cu_seqlens)
    v = inputs["v"] if "v" in inputs else next(iter(inputs.values()))
    d_o = v.new_empty((forward.batch, forward.tokens, forward.heads, forward.size["V"])).normal_()
    ends = {}
    for c in made["forward"].program.carries if subject.state else ():
        r, k = (forward.size[d] for d in made["forward"].program.index[c.inp].dims)
        ends[f"d_{c.name}"] = v.new_zeros((forward.sequences, forward.heads, r, k), dtype=torch.float32)
    for kernel in made["forward"].kernels:
        forward.arguments(kernel)
    kept = {n: x.fill_(int(x.dtype == torch.int32)) for n, x in forward.keeps.items()}
    backward = made["backward"].prepare({**inputs, **kept, "d_o": d_o}, {**start, **ends}, chunk, call.cu_seqlens)
    return {"forward": forward, "backward": backward}


def likes(subject: Subject) -> dict[tuple[Sizes, str], Like]:
    """The keys under which the subject's launches look for their plans, by shape and direction; needs no device."""
    out: dict[tuple[Sizes, str], Like] = {}
    for sizes in subject.shapes:
        runs = launches(subject, draw(subject, sizes, "typical", "meta"))
        out |= {(sizes, d): run.kind() for d, run in runs.items()}
    return out


# -- on the device ----------------------------------------------------------------------------------------------------


def small(subject: Subject, sizes: Sizes) -> Sizes:
    """One sequence of two chunks and a bit that compiles to the same kernels (two sequences if they are packed)."""
    _, _, h, k, v = sizes
    return (2 if subject.packed else 1, 2 * plan_of(subject).chunk + 16, h, k, v)


def adopt(subject: Subject, sizes: Sizes, plans: Mapping[str, Mapping[str, Plan]]) -> None:
    """Launch by the default plans but for these, by direction and kernel."""
    for direction, made in compiled(subject).items():
        made.adopt({**defaults(made, subject.shape(sizes)), **plans.get(direction, {})})


def pair(made: Compiled, kernel: str) -> list[Any]:
    """The kernel of this name, and its slow one if it has one."""
    return [k for k in made.kernels if k.kernel.name == kernel]


def compile_trial(trial: Trial) -> Failure | None:
    """Compile a candidate into Triton's cache."""
    c, subject = trial.candidate, trial.subject
    for sizes in subject.shapes:
        adopt(subject, sizes, {trial.direction: {c.kernel: c.plan}})
        run = launches(subject, _drawn(subject, small(subject, sizes), "typical", DEVICE))[trial.direction]
        wanted = pair(run.compiled, c.kernel)
        for k in run.compiled.kernels:
            programs, args = run.arguments(k)
            if programs and k in wanted:
                made = run.compiled.functions[k.name].warmup(grid=(programs,), **args)
                if made.metadata.shared > H200.shared_bytes:
                    return Failure(f"needs {made.metadata.shared / 1024:.0f} KB of shared memory")
    return None


def operate(subject: Subject, call: Call) -> dict[str, Tensor]:
    """Output, final memories and all gradients by name, for cotangents that are the same at every call."""
    found = outputs(subject, call)
    return _named(subject, call, list(found), cotangents(subject, found))


def outputs(subject: Subject, call: Call) -> Sequence[Tensor]:
    """Output and final memories."""
    plan = plan_of(subject)
    return ops.run(list(call.inputs.values()), call.start, call.cu_seqlens, plan.key)[: 1 + len(plan.carries)]


def cotangents(subject: Subject, found: Sequence[Tensor]) -> list[Tensor]:
    """Random ones, of the output's type and, where calls have memories, of float32 for the final ones."""
    generator = torch.Generator(found[0].device).manual_seed(1)
    random = [torch.randn(x.shape, device=x.device, generator=generator) for x in found]
    return [random[0].to(getattr(torch, subject.dtype)), *(random[1:] if subject.state else ())]


def _named(subject: Subject, call: Call, found: list[Tensor], d: list[Tensor]) -> dict[str, Tensor]:
    carries = plan_of(subject).carries
    leaves = {n: x for n, x in (*call.inputs.items(), *zip(carries, call.start)) if x.requires_grad}
    gradients = torch.autograd.grad(found[: len(d)], list(leaves.values()), [c.to(x.dtype) for c, x in zip(d, found)])
    named = dict(zip(["o", *(f"the end of {c}" for c in carries)], (x.detach() for x in found)))
    return named | {f"d_{n}": g for n, g in zip(leaves, gradients)}


@functools.lru_cache(maxsize=8)
def oracle(subject: Subject, sizes: Sizes, gates: str) -> dict[str, Tensor]:
    """What `operate` should give: the recurrence in float64, on the same inputs."""
    call = draw(subject, sizes, gates, DEVICE)
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in call.inputs.items()}
    start = [x.detach().double().requires_grad_() for x in call.start]
    method = resolve(subject.method)
    state: Any = [start[0], start[1][..., 0]] if len(start) > 1 else start[0] if start else None
    o, end = reference(method)(**exact, initial_state=state, return_final_state=True, cu_seqlens=call.cu_seqlens,
                               scale=subject.scale)
    ends = [x if x.ndim == 4 else x[..., None] for x in tensors(end)]
    call, found = Call(exact, call.per_token, start, call.cu_seqlens), [o, *ends]
    return _named(subject, call, found, cotangents(subject, found))


def wrong(found: Mapping[str, Tensor], right: Mapping[str, Tensor], gates: Iterable[str], dtype: str,
          tiles: Iterable[str] = (), chunk: int = 1) -> str:
    """What is off by more than it may, or empty; of `tiles`, (B, T, H, …), every head's chunk is held to `TILE` times the bound.

    Errors are RMS ratios; a tensor that nearly cancels counts as if it had `FLOOR` of the largest of its kind.
    """
    gates, tiles, bad = set(gates), set(tiles), []
    sizes = {n: float(x.float().square().mean().sqrt()) for n, x in right.items()}
    for name, x in found.items():
        gradient = name.startswith("d_")
        least = FLOOR * max(s for n, s in sizes.items() if n.startswith("d_") == gradient)
        bound = BOUND["output" if not gradient else "gate" if name[2:] in gates else "gradient"]
        bound *= EXACT if dtype == "float32" else 1.0
        wide = torch.promote_types(right[name].dtype, torch.float32)
        error = (x.to(wide) - right[name].to(wide)).square()
        scale = max(sizes[name], least, 1e-30)
        seen = [float(error.mean().sqrt()) / scale]
        if name in tiles and x.shape[1] >= chunk:
            parts = error[:, : x.shape[1] // chunk * chunk].unflatten(1, (-1, chunk))
            seen.append(float(parts.mean(dim=(2, 4) if parts.ndim > 4 else 2).amax().sqrt()) / scale / TILE)
        if not all(e <= bound for e in seen):  # also where it is not a number
            bad.append(f"{name} is off by {max(seen, key=lambda e: (e != e, e)):.1e}, {bound:.1e} allowed")
    return "; ".join(bad)


def _gates(subject: Subject) -> set[str]:
    canonical = resolve(subject.method).canonical
    decays = [d for d in (canonical.decay_k, canonical.decay_v) if d is not None]
    return {f.name for f in canonical.inputs if any(f in d.free_symbols for d in decays)}


def check(subject: Subject, sizes: Sizes, plans: Mapping[str, Mapping[str, Plan]]) -> str:
    """What is wrong with some plans, or empty: against the recurrence on a few chunks, against the default ones in full."""
    gates, dtype = _gates(subject), subject.dtype
    few = small(subject, sizes)
    for regime in REGIMES if gates else REGIMES[:1]:
        adopt(subject, sizes, plans)
        found = operate(subject, draw(subject, few, regime, DEVICE))
        if bad := wrong(found, oracle(subject, few, regime), gates, dtype):
            return f"wrong, {regime} gates: {bad}"
    call = _drawn(subject, sizes, "typical", DEVICE)
    adopt(subject, sizes, {})
    right = operate(subject, call)
    adopt(subject, sizes, plans)
    tiles = {"o", *(f"d_{n}" for n in call.per_token)}
    bad = wrong(operate(subject, call), right, gates, dtype, tiles, plan_of(subject).chunk)
    return f"differs from the default plan, {','.join(map(str, sizes))}: {bad}" if bad else ""


def check_trial(trial: Trial) -> Failure | None:
    """Compare the operator with one kernel's plan changed, at every shape."""
    for sizes in trial.subject.shapes:
        bad = check(trial.subject, sizes, {trial.direction: {trial.candidate.kernel: trial.candidate.plan}})
        if bad:
            return Failure(bad)
    return None


def time_trial(trial: Trial) -> list[float]:
    """Milliseconds of the kernel (with its slow one) at every shape."""
    c, subject, out = trial.candidate, trial.subject, []
    for sizes in subject.shapes:
        adopt(subject, sizes, {})
        run = launches(subject, _drawn(subject, sizes, "typical", DEVICE))[trial.direction]
        wanted = pair(run.compiled, c.kernel)
        for k in run.compiled.kernels:  # what this one reads
            if k in wanted:
                break
            run.kernel(k)
        run.plans = {**run.plans, c.kernel: c.plan}
        made = [(run.compiled.functions[k.name], *run.arguments(k)) for k in wanted]
        out.append(milliseconds(functools.partial(_relaunch, made)))
    return out


def _relaunch(made: Sequence[tuple[Any, int, dict[str, Any]]]) -> None:
    for function, programs, args in made:
        if programs:
            function[(programs,)](**args)


def settle(job: Chosen) -> tuple[float, float] | Failure:
    """Milliseconds of forward and backward by the default plans and by the chosen ones, which are compared together first."""
    plans = {d: {c.kernel: c.plan for c in getattr(job, d)} for d in DIRECTIONS}
    bad = check(job.subject, job.sizes, plans)
    if bad:
        return Failure(bad)
    call, times = _drawn(job.subject, job.sizes, "typical", DEVICE), []
    leaves = [x for x in (*call.inputs.values(), *call.start) if x.requires_grad]

    def run() -> Sequence[Tensor]:
        return outputs(job.subject, call)

    d = cotangents(job.subject, run())
    for chosen in ({}, plans):
        adopt(job.subject, job.sizes, chosen)
        times.append(milliseconds(lambda: torch.autograd.grad(list(run()[: len(d)]), leaves, d)))
    usual, tuned = times
    if tuned > usual / MARGIN:
        return Failure(f"together they take {tuned:.3f} ms, the default plans {usual:.3f}")
    return usual, tuned


def milliseconds(call: Any, count: int = 10) -> float:
    """The median of a few replays of a CUDA graph: device time without the host's."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    marks = []
    for _ in range(count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return float(sorted(begin.elapsed_time(end) for begin, end in marks)[count // 2])
