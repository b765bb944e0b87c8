"""Finding the fastest plans of a method's kernels that are right, on the GPU at hand: ``lsmc tune``.

Candidates are compiled side by side, then compared, then timed one at a time, all in processes of their own. What is compared is
the whole operator with one kernel's plan changed, output, final memories and all gradients: with the float64 recurrence, on a few
chunks of typical gates and of gates that reach the slow kernels; and with the default plans at full size, tile by tile.
At last the chosen plans are compared and timed together.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from lsmc import zoo
from lsmc.cases import Case, sample, tensors
from lsmc.chunk import derive
from lsmc.lowering import ops
from lsmc.lowering.apart import Failure, apart
from lsmc.lowering.backends.triton import Compiled
from lsmc.lowering.plan import Plan as Methods
from lsmc.lowering.plan import able
from lsmc.lowering.tune import MARGIN, Candidate, best, candidates, defaults, sift
from lsmc.lowering.tuned import store
from lsmc.lowering.tuned.store import Entry, Like, Machine, Plan, Rejected, Time, rounded, show
from lsmc.pipeline import CHUNK, Options, compile_plan
from lsmc.reference import reference
from lsmc.resolve import resolve
from lsmc.runtime.bench.command import usual
from lsmc.runtime.bench.measure import parse_shape
from lsmc.runtime.errors import LsmConfigError
from lsmc.schedules import Shape
from lsmc.target import H200

DEVICE = "cuda"
DIRECTIONS = ("forward", "backward")
DTYPES = ("bfloat16", "float16", "float32")
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
CHECKERS = 6
COMPILING, CHECKING, TIMING = 400.0, 90.0, 60.0
"""Seconds after which one candidate is given up."""
SLICES = (0.55, 0.75, 0.93, 1.0)
"""Parts of the time limit at which compiling, checking, timing and the comparison of what was chosen end."""

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


def compiled(subject: Subject) -> dict[str, Compiled]:
    """The programs of both directions, as training runs them."""
    plan = plan_of(subject)
    made: list[Any] = [plan.training.executable, plan.backward.executable]
    return dict(zip(DIRECTIONS, made, strict=True))


def draw(subject: Subject, sizes: Sizes, gates: str, device: str) -> Call:
    """Inputs of a call: `POOL` tokens of a random case in random order."""
    b, t, h, k, v = sizes
    plan = plan_of(subject)
    drawn = sample(resolve(subject.method), Case(1, POOL, h, key_dim=k, value_dim=v, gates=gates))
    batch, tokens = (1, b * t) if subject.packed else (b, t)
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    inputs = {}
    for name in plan.inputs:
        x = drawn.inputs[name].detach()
        if name in drawn.per_token:
            rows = torch.randint(POOL, (batch, tokens), device=device, generator=generator)
            x = x.to(device, getattr(torch, subject.dtype if name in ("q", "k", "v") else subject.gates))[0][rows]
        inputs[name] = x.to(device, x.dtype if name in drawn.per_token else torch.float32).requires_grad_()
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
    for c in made["forward"].program.carries:
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
    """Random ones, of the output's type and of float32 for memories."""
    generator = torch.Generator(found[0].device).manual_seed(1)
    random = [torch.randn(x.shape, device=x.device, generator=generator) for x in found]
    return [random[0].to(getattr(torch, subject.dtype)), *random[1:]]


def _named(subject: Subject, call: Call, found: list[Tensor], d: list[Tensor]) -> dict[str, Tensor]:
    carries = plan_of(subject).carries
    leaves = {**call.inputs, **dict(zip(carries, call.start))}
    gradients = torch.autograd.grad(found, list(leaves.values()), [c.to(x.dtype) for c, x in zip(d, found)])
    named = dict(zip(["o", *(f"the end of {c}" for c in carries)], (x.detach() for x in found)))
    return named | {f"d_{n}": g for n, g in zip(leaves, gradients)}


@functools.lru_cache(maxsize=8)
def oracle(subject: Subject, sizes: Sizes, gates: str) -> dict[str, Tensor]:
    """What `operate` should give: the recurrence in float64, on the same inputs."""
    call = draw(subject, sizes, gates, DEVICE)
    exact = {n: x.detach().double().requires_grad_() for n, x in call.inputs.items()}
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
    leaves = [*call.inputs.values(), *call.start]

    def run() -> Sequence[Tensor]:
        return outputs(job.subject, call)

    d = cotangents(job.subject, run())
    for chosen in ({}, plans):
        adopt(job.subject, job.sizes, chosen)
        times.append(milliseconds(lambda: torch.autograd.grad(list(run()), leaves, d)))
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


# -- the command ------------------------------------------------------------------------------------------------------


def subjects(asked: Iterable[tuple[str, Sizes]], **options: Any) -> list[Subject]:
    """Methods with the shapes that compile to the same kernels together."""
    found: dict[tuple[object, ...], Subject] = {}
    for method, sizes in asked:
        alone = Subject(method, (sizes,), **options)
        plan = plan_of(alone)
        key = (method, plan.key, sizes[2:])  # strides, on which a kernel's code depends, come from H, K and V
        before = found.get(key)
        found[key] = Subject(method, (*(before.shapes if before else ()), sizes), **options)
    return list(found.values())


def trials(subject: Subject) -> dict[Trial, dict[Sizes, float]]:
    """The candidates of a subject and the seconds predicted for them at each shape; each kernel's default first."""
    out: dict[Trial, dict[Sizes, float]] = {}
    for (direction, made), sizes in itertools.product(compiled(subject).items(), subject.shapes):
        for found in candidates(made, subject.shape(sizes)).values():
            for c, seconds in found.items():
                out.setdefault(Trial(subject, direction, c), {})[sizes] = seconds
    return out


def _has_kernels(method: str) -> bool:
    return able("triton", derive(resolve(method).canonical)) == "triton"


def run(methods: Sequence[str], *, shapes: Sequence[str] = (), dtype: str = "bfloat16", gates: str | None = None,
        scale: float = 1.0, state: bool = False, packed: bool = False, limit: float | None = None, out: Path | None = None,
        dry_run: bool = False) -> list[Entry]:
    """Tune methods (none: the zoo) at shapes "B,T,H,K,V", store and print what was found.

    `dry_run` only lists the candidates, and needs no GPU.

    dtype, gates   of q, k and v, and of the other inputs per token (default: the same)
    state, packed  calls start from a memory; the B sequences come as one with `cu_seqlens`
    limit          seconds, after which the best so far is taken
    out            where to write all entries as one JSON list, as the shipped tables are

    Raises LsmConfigError, LsmNameError.
    """
    for text in (dtype, gates or dtype):
        if text not in DTYPES:
            raise LsmConfigError(f"{text!r}: kernels are tuned for {', '.join(DTYPES)}")
    sizes = [parse_shape(text) for text in shapes]
    for method in methods:
        if not _has_kernels(method):  # mistakes first
            raise LsmConfigError(f"{method}: has no kernels to tune: on GPUs it runs as ATen operations")
    methods = methods or tuple(filter(_has_kernels, zoo.names()))
    every = {m: list(dict.fromkeys(sizes or map(parse_shape, usual(resolve(m), "cuda")))) for m in methods}
    asked = subjects([(m, x) for m, found in every.items() for x in found], dtype=dtype, gates=gates or dtype, scale=float(scale),
                     state=state, packed=packed)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if dry_run:
        _list(console, asked)
        return []
    if not torch.cuda.is_available():
        raise LsmConfigError("tuning needs an NVIDIA GPU, and torch sees none here\n"
                             "help: --dry-run lists the candidates, with predicted times and what they take of an sm_90")
    return _Tuning(console, asked, limit or float("inf"), out).run()


class _Tuning:
    """One run of the command on a GPU."""

    def __init__(self, console: Console, asked: list[Subject], limit: float, out: Path | None) -> None:
        self.console, self.asked, self.out = console, asked, out
        self.begin, self.limit = time.monotonic(), limit
        self.machine: Machine = store.machine(0)
        self.likes = {s: likes(s) for s in asked}
        self.predicted = {t: seconds for s in asked for t, seconds in trials(s).items()}
        self.default = {(s, d, k): c for s in asked for d, made in compiled(s).items()
                        for k, plan in defaults(made, s.shape(s.shapes[0])).items() for c in [Candidate.of(k, plan)]}
        self.rejected: dict[tuple[Subject, str], list[Rejected]] = {}

    def run(self) -> list[Entry]:
        fresh = [t for t in self.predicted if not self.known(t)]
        turns: Counter[tuple[Subject, str, str]] = Counter()
        turn = {}
        for t in fresh:  # the first of every kernel first: time may run out
            turns[t.subject, t.direction, t.candidate.kernel] += 1
            turn[t] = turns[t.subject, t.direction, t.candidate.kernel]
        fresh.sort(key=turn.__getitem__)
        cores, place = os.cpu_count() or 1, {s: i for i, s in enumerate(self.asked)}
        stages = [
            lambda tried: self.stage("compiling", compile_trial, tried, max(1, cores - 1), COMPILING, SLICES[0]),
            lambda tried: self.stage("checking", check_trial, sorted(tried, key=lambda t: place[t.subject]),
                                     self.checkers(), CHECKING, SLICES[1]),
            lambda tried: self.stage("timing", time_trial, sorted(tried, key=lambda t: place[t.subject]), 1, TIMING, SLICES[2]),
        ]
        times = sift(fresh, stages, self.reject)
        chosen = [self.choose(s, sizes, times) for s in self.asked for sizes in s.shapes]
        totals = dict(self.stage("comparing what was chosen", settle, chosen, 1, CHECKING, SLICES[3]))
        entries = []
        for job in chosen:
            total = totals.get(job, Failure("there was no time to compare what was chosen"))
            entries += self.store(job, times, total)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps([asdict(e) for e in entries], indent=1) + "\n")
        return entries

    def checkers(self) -> int:
        """Workers whose full-size tensors fit beside each other."""
        largest = max(b * t * h * max(k, v) for s in self.asked for b, t, h, k, v in s.shapes)
        return max(1, min(CHECKERS, (os.cpu_count() or 1) - 1, torch.cuda.mem_get_info()[0] // (100 * largest)))

    def stage(self, what: str, work: Any, jobs: Sequence[Any], count: int, limit: float, part: float) -> Iterator[tuple[Any, Any]]:
        """Jobs in processes of their own, with a bar on a terminal and a line at the end."""
        begun, done = time.monotonic(), 0
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(what, total=len(jobs))
            for job, result in apart(work, jobs, count, limit, self.begin + self.limit * part):
                done += 1
                bar.advance(task)
                yield job, result
        self.console.print(f"{what}: {done} of {len(jobs)} in {time.monotonic() - begun:.0f} s")

    def known(self, t: Trial) -> bool:
        """Whether a candidate was rejected before, by these versions."""
        key = t.subject, t.direction
        if key not in self.rejected:
            like = self.likes[t.subject][t.subject.shapes[0], t.direction]
            self.rejected[key] = list(store.rejections(like, self.machine))
        return any(Candidate.of(r.kernel, r.plan) == t.candidate for r in self.rejected[key])

    def reject(self, t: Trial, reason: str) -> None:
        """Remember at once: what comes next may end this process too."""
        self.console.print(f"rejected {t.subject.method} {t.direction} {escape(str(t.candidate))}: {escape(reason)}")
        what = Rejected(t.candidate.kernel, t.candidate.plan, reason)
        self.rejected[t.subject, t.direction].append(what)
        for sizes in t.subject.shapes:
            store.reject(self.likes[t.subject][sizes, t.direction], self.machine, what)

    def choose(self, s: Subject, sizes: Sizes, times: Mapping[Trial, list[float]]) -> Chosen:
        at, picked = s.shapes.index(sizes), {}
        for d in DIRECTIONS:
            kernels = dict.fromkeys(t.candidate.kernel for t in times if (t.subject, t.direction) == (s, d))
            of = {k: {t.candidate: ms[at] for t, ms in times.items()
                      if (t.subject, t.direction, t.candidate.kernel) == (s, d, k)} for k in kernels}
            picked[d] = tuple(best(found, self.default[s, d, k]) for k, found in of.items())
        return Chosen(s, sizes, picked["forward"], picked["backward"])

    def store(self, job: Chosen, times: Mapping[Trial, list[float]], total: tuple[float, float] | Failure) -> list[Entry]:
        """Store and print what was found for one shape: both directions."""
        s, at, entries = job.subject, job.subject.shapes.index(job.sizes), []
        table = Table("kernel", "plan", "ms", "default ms", "predicted", box=None, pad_edge=False, header_style="bold")
        for d in DIRECTIONS:
            plans, measured = {}, {}
            for c in getattr(job, d):
                default = times.get(Trial(s, d, self.default[s, d, c.kernel]))
                t = Trial(s, d, c)
                plans[c.kernel] = c.plan
                seconds = self.predicted[t].get(job.sizes) or next(iter(self.predicted[t].values()))
                measured[c.kernel] = Time(times[t][at], default[at] if default else None, seconds * 1e3)
                row = measured[c.kernel]
                usual = f"{row.default:.3f}" if row.default is not None else "rejected"
                table.add_row(f"{d} {c.kernel}", show(c.plan), f"{row.chosen:.3f}", usual, f"{row.predicted:.3f}")
            failed = isinstance(total, Failure)
            entry = Entry(self.likes[s][job.sizes, d], self.machine, {} if failed else plans, {} if failed else measured,
                          tuple(self.rejected.get((s, d), ())))
            store.save(entry)
            entries.append(entry)
        said = f"not stored: {total.reason}" if isinstance(total, Failure) else \
            f"forward and backward {total[1]:.3f} ms, {total[0]:.3f} by the default plans"
        self.console.print(f"\n{s.method}, B,T,H,K,V = {','.join(map(str, job.sizes))}, {s.dtype}: {escape(said)}")
        self.console.print(table)
        for direction in DIRECTIONS:
            for r in self.rejected.get((s, direction), ()):
                self.console.print(f"  rejected {direction} {escape(r.kernel)} ({show(r.plan)}): {escape(r.reason)}")
        return entries


# -- without a GPU ----------------------------------------------------------------------------------------------------


def take(trial: Trial) -> list[Any] | Failure:
    """What a candidate's kernels take of an sm_90."""
    from lsmc.lowering.offline import DTYPES as SHORT
    from lsmc.lowering.offline import resource

    made, shape = compiled(trial.subject)[trial.direction], trial.subject.shape(trial.subject.shapes[0])
    run = launches(trial.subject, draw(trial.subject, trial.subject.shapes[0], "typical", "meta"))[trial.direction]
    run.plans = {trial.candidate.kernel: trial.candidate.plan}
    return [resource(made, k, shape.key, shape.value, shape.chunk, SHORT[trial.subject.dtype], run.plan(k))
            for k in pair(made, trial.candidate.kernel)]


def _list(console: Console, asked: list[Subject]) -> None:
    for s in asked:
        found = trials(s)
        table = Table("kernel", "plan", *(f"predicted ms at {','.join(map(str, x))}" for x in s.shapes), "registers", "spilled B",
                      "shared KB", "", box=None, pad_edge=False, header_style="bold")
        taken = {}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"{s.method}: compiling for sm_90", total=len(found))
            for trial, result in apart(take, list(found), max(1, (os.cpu_count() or 1) - 1), COMPILING):
                taken[trial] = result
                bar.advance(task)
        kernels = list(dict.fromkeys((t.direction, t.candidate.kernel) for t in found))

        def last(t: Trial, taken: Mapping[Trial, Any] = taken, kernels: list[tuple[str, str]] = kernels) -> tuple[Any, ...]:
            r = taken[t]
            return kernels.index((t.direction, t.candidate.kernel)), isinstance(r, Failure) or _over(r), _spills(r)

        for t in sorted(found, key=last):
            r = taken[t]
            cells = ["", "", "", r.reason] if isinstance(r, Failure) else [
                str(r[0].registers), str(r[0].spills), f"{r[0].shared / 1024:.0f}", "never: too much shared memory" * _over(r)]
            predicted = [f"{found[t][x] * 1e3:.3f}" if x in found[t] else "–" for x in s.shapes]
            table.add_row(f"{t.direction} {t.candidate.kernel}", show(t.candidate.plan), *predicted, *map(escape, cells))
        console.print(f"{s.method}, {s.dtype}: {len(found)} candidates")
        console.print(table)


def _over(found: Any) -> bool:
    return any(r.shared > H200.shared_bytes for r in found)


def _spills(found: Any) -> int:
    return 0 if isinstance(found, Failure) else max(r.spills for r in found)
