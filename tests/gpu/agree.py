"""All methods beside the float64 recurrence on a GPU: `python tests/gpu/agree.py [NAMES] [--limit SECONDS] [--out FOLDER]`.

Every method in bfloat16 and float32, at lengths around borders of chunks and a long one, for every range of gates: output, final
memories and the gradients of all inputs and memories are held to `tests.interpreted.TOLERANCE`, and no row of one token and head
exceeds ten times that. What does is compared with what the recurrence suffers when its inputs are rounded once more (float32:
when its steps are). Then packed sequences with empty ones; and, in bfloat16, calls without memories by the chunk and the schedule of
their own sizes. All else runs by the schedule of large sizes, in chunks that compile in seconds: float32 has no matrix units.

Heads are the cases: each type and each range of gates has heads of its own, so that one recurrence serves them all; it runs in
pieces, from the memories where they start, and back. A call of few tokens has a batch of sequences (`Run.batch`): the gradient of one token's
query is little more than one number, which may happen to lie near 0. Kernels see slices of long tensors, so that no length asks for kernels of its
own, and run twice, since calls are recorded and then repeated. A process for each method, with another that compiles its
float32 kernels meanwhile. `--out` gets a JSON line for each type and length as it comes (agree.jsonl), and the table that is printed
at the end (agree.txt). Exits with 1 where a case is wrong or fails; what the time did not reach is said.

`TRITON_INTERPRET=1 LSMC_BACKEND=triton python tests/gpu/agree.py --device cpu --tiny NAMES` runs the same on tiny tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import lsmc
import lsmc.api
from lsmc.cases import GATES, Case, Sample, sample, tensors
from lsmc.expr import Field
from lsmc.zoo import METHODS
from tests.interpreted import bound, errors

HEAVY = ("rwkv7", "kda", "gfw", "gateloop", "gated_deltanet", "rwkv6", "hgrn2", "gla", "gateloop_real", "titans", "ttt_ln_sequential", "ttt_ln")
"""What compiles longest starts first."""
SIZES: dict[str, tuple[int, int]] = {"rebased": (16, 64), "mamba": (16, 96), "s4": (16, 96), "s4_complex": (16, 96), "gfw_full": (16, 32)}
"""K and V, where they are not 64 and 64: matrices of decays and pairs of keys."""
GROUPS = 2
"""Value heads for each key head."""
HEADS = 4
"""Key heads of each range of gates where an input comes with heads, one elsewhere: its gradient has as many numbers as heads."""
PIECE = 64
"""Tokens of the recurrence whose steps are held at once."""
TOO_LARGE = 1e8
CUTS = (0, 33, 34, 34, 100)
FEW, MANY = 16, len(CUTS) + 1
"""A call of fewer tokens than the first has as many sequences as the second."""
KINDS = ("output", "state", "gradient", "gate", "row")


@dataclass(frozen=True)
class Setup:
    device: str = "cuda"
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    lengths: tuple[int, ...] = (1, 2, 15, 63, 64, 65, 127, 257, 4096)
    packed: int = 257
    bare: tuple[int, ...] = (15, 65, 4096)
    chunks: tuple[int, ...] = (64, 32)
    size: tuple[int, int] | None = None

    @property
    def longest(self) -> int:
        return max(*self.lengths, self.packed, *self.bare, MANY * FEW)


TINY = Setup("cpu", ("float16", "float32"), (1, 15, 37), 21, (9,), (16, 16), (4, 3))


@dataclass(frozen=True)
class Run:
    """One call: the type's place, so many tokens, packed or not, with memories or without."""

    dtype: int
    time: int
    packed: bool = False
    bare: bool = False

    @property
    def pieces(self) -> list[tuple[int, int]]:
        return Case(time=self.time, cuts=CUTS if self.packed else ()).pieces

    @property
    def batch(self) -> int:
        return MANY if self.time < FEW and not self.packed else 1

    def sequences(self, device: str) -> dict[str, Tensor]:
        ends = [0, *(stop for _, stop in self.pieces)]
        return {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=device)} if self.packed else {}


Results = dict[str, Tensor]
"""Outputs and gradients by the names of `tests.interpreted`."""


class Subject:
    """The inputs of a method in float64, rounded to the types they stand for: heads by type, by range of gates, by group."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.op, self.setup = getattr(lsmc.zoo, name), setup
        c = self.op.canonical
        self.fields = {f.name: f for f in c.inputs}
        self.ranges = tuple(GATES) if c.decays else tuple(f"draw {n}" for n in range(len(GATES)))
        self.oracle = c.substitute({f: Field(f.name, f.dims, "head") for f in c.inputs if f.per == "layer"})
        self.heads = HEADS if any(f.per == "head" and not f.dims for f in c.inputs) else 1
        key, value = setup.size or SIZES.get(name, (64, 64))
        count = len(Run(0, setup.packed, packed=True).pieces)
        base = {"time": setup.longest, "heads": self.heads, "groups": GROUPS, "key_dim": key, "value_dim": value, "scale": 0.5, "initial_state": True}
        draws = [[sample(self.op, Case(**base, gates=g if c.decays else "typical", seed=100 * d + r), batch=count)
                  for r, g in enumerate(self.ranges)] for d in range(len(setup.dtypes))]
        self.known: dict[tuple[int, bool, bool], Results] = {}
        self.scale = draws[0][0].scale
        self.values = {n: self._joined(draws, n).to(setup.device) for n in self.fields}
        self.starts = [self._memories(draws, n).to(setup.device) for n in range(len(c.states))]
        torch.manual_seed(1)
        self.d_o = torch.randn(1, setup.longest, self._heads("HV"), draws[0][0].inputs["v"].shape[-1] if "v" in self.fields else value)
        self.d_o = self.d_o.bfloat16().double().to(setup.device)
        self.d_ends = [torch.randn(x.shape).bfloat16().double().to(setup.device) for x in self.starts]

    def _joined(self, draws: list[list[Sample]], name: str) -> Tensor:
        f = self.fields[name]
        if f.per == "layer":
            return draws[0][0].inputs[name].detach().to(torch.bfloat16).double()
        kinds = [getattr(torch, t) for t in self.setup.dtypes]
        return torch.cat([s.inputs[name].detach().to(t).double() for row, t in zip(draws, kinds, strict=True) for s in row], self._axis(f))

    def _memories(self, draws: list[list[Sample]], n: int) -> Tensor:
        every = [tensors(s.state)[n].detach().float().double() for row in draws for s in row]
        counts = not self.op.canonical.states[n].dims  # of tokens, the same for all heads
        return torch.cat([every[0]] * len(every) if counts else every, 1)

    def _axis(self, f: Field) -> int | None:
        return next((i for i, part in enumerate(f.parts) if part in ("H", "HV")), None)

    def _heads(self, part: str) -> int:
        return len(self.setup.dtypes) * len(self.ranges) * self.heads * (GROUPS if part == "HV" else 1)

    def _place(self, name: str) -> tuple[int, int] | None:
        """Of an input or a result: the axis of its heads, and how many each range has; None where all share it."""
        if name == "o":
            return 2, GROUPS * self.heads
        if name.startswith(("final", "the gradient of state")):
            return 1, GROUPS * self.heads
        f = self._field(name)
        axis = self._axis(f)
        return None if axis is None else (axis, self.heads * (GROUPS if f.parts[axis] == "HV" else 1))

    def _field(self, name: str) -> Field:
        return self.fields[name.removeprefix("the gradient of ")]

    def of(self, results: Results, first: int, count: int) -> Results:
        """The heads of some ranges, counted through all types; of what all heads share, which the recurrence gives apart, the sum."""
        out = {}
        for n, x in results.items():
            place = self._place(n)
            if place is not None:
                out[n] = x.narrow(place[0], first * place[1], count * place[1])
            else:
                out[n] = x.narrow(0, first * GROUPS * self.heads, count * GROUPS * self.heads).sum(0) if x.ndim > len(self._field(n).dims) else x
        return out

    def of_type(self, results: Results, dtype: int) -> Results:
        return self.of(results, dtype * len(self.ranges), len(self.ranges))

    def _given(self, run: Run, every: bool = False) -> tuple[Results, list[Tensor], Tensor, list[Tensor]]:
        """Inputs, memories and cotangents of one type or of every one: all are slices."""
        many, r, each = run.batch * len(run.pieces), len(self.ranges), GROUPS * self.heads
        first, count = (0, r * len(self.setup.dtypes)) if every else (run.dtype * r, r)

        def cut(x: Tensor) -> Tensor:
            return x[:, : run.time] if run.batch == 1 else x[0, : run.batch * FEW].unflatten(0, (run.batch, FEW))[:, : run.time]

        inputs = self.of({n: cut(x) if self.fields[n].per == "token" else x for n, x in self.values.items()}, first, count)
        starts, ends = ([x[:many].narrow(1, first * each, count * each) for x in xs] for xs in (self.starts, self.d_ends))
        d_o = cut(self.d_o).narrow(2, first * each, count * each)
        return inputs, [0 * x for x in starts] if run.bare else starts, d_o, ends

    def wanted(self, run: Run) -> Results:
        """What the recurrence gives in float64: worked out once for all types."""
        key = run.time, run.packed, run.bare
        if key not in self.known:
            self.known[key] = self.recurrence(run, every=True)
        return self.of_type(self.known[key], run.dtype)

    def recurrence(self, run: Run, cast: torch.dtype = torch.float64, noise: float = 0.0, every: bool = False) -> Results:
        """All results of one type, or of every one, in `cast`, from inputs that are off by up to half of `noise` of them."""
        inputs, start, d_o, d_ends = self._given(run, every)
        heads = d_o.shape[2]
        inputs = {n: (x * (1 + noise * (torch.rand_like(x) - 0.5))).to(cast) for n, x in inputs.items()}
        inputs = {n: x.expand(heads, *x.shape) if self.fields[n].per == "layer" else x for n, x in inputs.items()}
        oracle = lsmc.reference(self.oracle, cast)
        options = {"return_final_state": True, "scale": self.scale, **run.sequences(self.setup.device)}
        step = run.time if run.packed else PIECE
        cuts = range(0, run.time, step)

        def piece(at: int) -> Results:
            return {n: x[:, at : at + step] if self.fields[n].per == "token" else x for n, x in inputs.items()}

        states = [[x.to(cast) for x in start]]
        with torch.no_grad():
            for at in cuts[:-1]:
                states.append(tensors(oracle(**piece(at), initial_state=packed(states[-1]), **options)[1]))
        outputs, ends, back = [], list[Tensor](), [x.to(cast) for x in d_ends]
        parts: dict[str, list[Tensor]] = {n: [] for n in inputs}
        for at, state in zip(reversed(cuts), reversed(states)):
            leaves = {n: x.detach().requires_grad_() for n, x in piece(at).items()}
            first = [x.detach().requires_grad_() for x in state]
            o, end = oracle(**leaves, initial_state=packed(first), **options)
            ends = ends or [x.detach() for x in tensors(end)]
            found = gradients([o, *tensors(end)], [d_o[:, at : at + step].to(cast), *back], [*leaves.values(), *first])
            outputs.append(o.detach())
            for n, g in zip(inputs, found):
                parts[n].append(g)
            back = found[len(inputs):]
        of_inputs = {n: torch.cat(xs[::-1], 1) if self.fields[n].per == "token" else torch.stack(xs).sum(0) for n, xs in parts.items()}
        return named(torch.cat(outputs[::-1], 1), ends, of_inputs, back, run)

    def kernels(self, run: Run) -> Results:
        """What the operator makes of it: called twice, at first on other numbers."""
        dtype = getattr(torch, self.setup.dtypes[run.dtype])
        inputs, start, d_o, d_ends = self._given(run)
        options: dict[str, Any] = {"return_final_state": True, "scale": self.scale, **run.sequences(self.setup.device)}
        options |= {} if run.bare else {"chunk": self.setup.chunks[run.dtype]}

        def laid(n: str, x: Tensor) -> Tensor:
            """In a tensor of the longest sequence: strides are those of all lengths."""
            x = x.to(dtype)
            if self.fields[n].per == "token":
                room = x.new_full((run.batch, self.setup.longest, *x.shape[2:]), torch.nan)
                room[:, : run.time] = x
                x = room[:, : run.time]
            return x.detach().requires_grad_()

        found = Results()
        for turn in (1, 0):
            leaves = {n: laid(n, x.roll(turn, 1) if self.fields[n].per == "token" else x) for n, x in inputs.items()}
            first = [] if run.bare else [x.float().requires_grad_() for x in start]
            with contextlib.nullcontext() if run.bare else of_large_sizes():
                o, end = self.op(**leaves, initial_state=packed(first), **options)
            ends = tensors(end)
            back = gradients([o, *ends], [x.to(y.dtype) for x, y in zip([d_o, *d_ends], [o, *ends], strict=True)], [*leaves.values(), *first])
            found = named(o.detach(), [x.detach() for x in ends], dict(zip(leaves, back)), back[len(leaves):], run)
        return found

    def compare(self, run: Run) -> dict[str, Any]:
        """The worst errors of each range, those beyond the tolerance, and those beyond what the recurrence suffers as well."""
        dtype = self.setup.dtypes[run.dtype]
        row: dict[str, Any] = {"time": run.time, "what": "packed" if run.packed else "bare" if run.bare else "grid", "ranges": {}, "beyond": {}, "bad": {}}
        wanted, found, rough, limit = self.wanted(run), self.kernels(run), None, min(TOO_LARGE, torch.finfo(getattr(torch, dtype)).max / 64)
        for r, gates in enumerate(self.ranges):
            one = self.of(wanted, r, 1)
            if not all(bool(torch.isfinite(x).all()) and float(x.abs().max()) < limit for x in one.values() if x.numel()):
                row["ranges"][gates] = {"grows": True}
                continue
            try:
                seen = self.errors(self.of(found, r, 1), one, dtype)
            except AssertionError as error:
                row["bad"][gates] = {str(error)[:200]: -1.0}
                continue
            row["ranges"][gates] = worst(seen)
            beyond = {n: e for n, e in seen.items() if not e <= bound(n, dtype)}
            if beyond:
                rough = rough or self.of(self.recurrence(run, torch.float32) if dtype == "float32" else self.recurrence(
                    run, noise=2 * torch.finfo(getattr(torch, dtype)).eps), 0, len(self.ranges))
                suffered = self.errors({n: x.double() for n, x in self.of(rough, r, 1).items()}, one, dtype)
                row["beyond"][gates] = beyond
                bad = {n: e for n, e in beyond.items() if not e <= 4 * suffered[n]}
                row["bad"] |= {gates: bad} if bad else {}
        return row

    def errors(self, found: Results, wanted: Results, dtype: str) -> dict[str, float]:
        """As in `tests.interpreted`; and a tenth of that of the worst row of each result that has tokens, as "…, row"."""
        seen: dict[str, float] = {}
        for gradient in (False, True):
            part = [n for n in wanted if n.startswith("the gradient") == gradient]
            seen |= errors({n: found[n] for n in part}, {n: wanted[n] for n in part}, dtype)
        for n in [n for n in seen if n == "o" or kind(n) != "state" and "state" not in n and self._field(n).per == "token"]:
            off = (found[n].double() - wanted[n]).square()
            off = off.flatten(3).mean(-1) if off.ndim > 3 else off
            seen[f"{n}, row"] = seen[n] * (float(off.max()) / max(float(off.mean()), 1e-300)) ** 0.5 / 10
        return seen


@contextlib.contextmanager
def of_large_sizes() -> Iterator[None]:
    """Calls take the schedules of many long sequences, whatever their own sizes are: one set of kernels for all lengths."""
    spec = lsmc.api._spec
    with patch.object(lsmc.api, "_spec", lambda *given: spec(*given[:-1], (128, 4096, *given[-1][2:]))):
        yield


def packed(states: list[Tensor]) -> Any:
    return None if not states else states[0] if len(states) == 1 else tuple(states)


def gradients(outputs: list[Tensor], cotangents: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    pairs = [(x, d) for x, d in zip(outputs, cotangents, strict=True) if x.requires_grad]
    found = torch.autograd.grad([x for x, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def named(o: Tensor, ends: list[Tensor], of_inputs: Results, of_starts: list[Tensor], run: Run) -> Results:
    out = {"o": o} | {f"final state {n}": x for n, x in enumerate(ends)} | {f"the gradient of {n}": x for n, x in of_inputs.items()}
    return out if run.bare else out | {f"the gradient of state {n}": x for n, x in enumerate(of_starts)}


def kind(name: str) -> str:
    if name.endswith(", row"):
        return "row"
    if not name.startswith("the gradient"):
        return "output" if name == "o" else "state"
    return "gradient" if name.split()[3] in ("q", "k", "v", "state") else "gate"


def worst(seen: dict[str, float]) -> dict[str, tuple[float, str]]:
    return {k: max((e, n) for n, e in seen.items() if kind(n) == k) for k in KINDS if any(kind(n) == k for n in seen)}


def runs(setup: Setup, dtype: int) -> Iterator[Run]:
    yield from (Run(dtype, t) for t in setup.lengths)
    yield Run(dtype, setup.packed, packed=True)
    yield from (Run(dtype, t, bare=True) for t in setup.bare if dtype == 0)


def worker(name: str, dtypes: list[int], setup: Setup, until: float) -> None:
    """Every run of a method, as JSON lines."""
    torch.set_num_threads(1)
    began = time.time()
    subject = Subject(name, setup)
    rest = [d for d in dtypes if d != dtypes[0]] if setup.device == "cuda" else []
    others = {d: subprocess.Popen([sys.executable, __file__, name, "--warm", str(d)], stdout=subprocess.DEVNULL) for d in rest}
    every = [run for d in dtypes for run in runs(setup, d)]
    for run in sorted(every, key=lambda run: (run.packed or run.bare, run.dtype)):
        row: dict[str, Any] = {"method": name, "dtype": setup.dtypes[run.dtype], "time": run.time}
        try:
            if run.dtype in others:
                others[run.dtype].wait(max(0.1, until - time.time()))
            row |= subject.compare(run)
        except subprocess.TimeoutExpired:
            break
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[-400:]}"
        print(json.dumps(row | {"seconds": round(time.time() - began, 1)}), flush=True)
        if time.time() > until or "CUDA error" in row.get("failed", ""):  # nothing runs in this process any more
            break
    for other in others.values():
        other.kill()
    sys.stdout.flush()
    os._exit("CUDA error" in row.get("failed", ""))


def warm(name: str, dtype: int, setup: Setup) -> None:
    """Compile what `worker` is going to run: the compiler leaves it in its cache."""
    torch.set_num_threads(1)
    Subject(name, setup).kernels(Run(dtype, 64))


class Job:
    """The process of a method, its lines as they come; started again for the types that it had not begun when it died."""

    def __init__(self, name: str, given: argparse.Namespace, setup: Setup, until: float, sink: Any) -> None:
        self.name, self.given, self.setup, self.until, self.sink = name, given, setup, until, sink
        self.rows: list[dict[str, Any]] = []
        self.process: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        left = list(range(len(self.setup.dtypes)))
        while left and time.time() < self.until:
            command = [sys.executable, __file__, self.name, "--worker", str(self.until), "--types", *map(str, left)]
            command += ["--tiny"] * self.given.tiny + ["--device", self.given.device]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
            errors = list[str]()
            reader = threading.Thread(target=errors.extend, args=(self.process.stderr,), daemon=True)
            reader.start()
            for line in self.process.stdout or ():
                if line.startswith("{"):
                    self._add(json.loads(line))
            self.process.wait()
            reader.join(5)
            if not self.process.returncode:
                return
            begun = [d for d in left if any(row["dtype"] == self.setup.dtypes[d] for row in self.rows)] or left[:1]
            if time.time() < self.until:
                self._add({"method": self.name, "dtype": self.setup.dtypes[begun[-1]], "time": 0,
                           "failed": f"the process died ({self.process.returncode}): {''.join(errors)[-400:]}"})
            left = [d for d in left if d not in begun]

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.sink is not None:
            self.sink.write(json.dumps(row) + "\n")
            self.sink.flush()
        if row.get("bad") or "failed" in row:
            print("!", json.dumps({n: x for n, x in row.items() if n not in ("ranges", "beyond")})[:700], flush=True)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.thread.join(5)


def table(names: list[str], rows: list[dict[str, Any]], setup: Setup) -> list[str]:
    """Method × type: how many cases, the worst errors, the verdict."""
    head = f"{'':18} {'':8} {'cases':>5}" + "".join(f"{k:>9}" for k in KINDS) + "  verdict"
    example = {"output": "o", "state": "final state 0", "gradient": "the gradient of q", "gate": "the gradient of g", "row": "the gradient of g"}
    out = [head, *(f"{'bound':18} {t:8} {'':5}" + "".join(f"{bound(example[k], t):9.0e}" for k in KINDS) for t in setup.dtypes)]
    for name in names:
        for dtype in setup.dtypes:
            mine = [row for row in rows if (row["method"], row["dtype"]) == (name, dtype)]
            seen = [one for row in mine for one in row.get("ranges", {}).values()]
            cases = sum("grows" not in one for one in seen)
            most = [max((one[k][0] for one in seen if k in one), default=float("nan")) for k in KINDS]
            wrong = sum(len(row.get("bad", {})) for row in mine)
            notes = [f"{n} {what}" for what, n in (
                ("WRONG", wrong), ("FAILED", sum("failed" in row for row in mine)),
                ("beyond the bound as the recurrence rounded once more", sum(len(row.get("beyond", {})) for row in mine) - wrong),
                ("grow", len(seen) - cases)) if n > 0]
            missing = len(list(runs(setup, setup.dtypes.index(dtype)))) - sum("ranges" in row or "failed" in row for row in mine)
            notes += [f"{missing} lengths not reached"] * (missing > 0)
            out.append(f"{name:18} {dtype:8} {cases:5}" + "".join(f"{e:9.1e}" for e in most) + f"  {', '.join(notes) or 'agrees'}")
    return out


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("names", nargs="*", metavar="NAMES")
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--limit", type=float, default=290.0)
    parse.add_argument("--out", type=Path)
    parse.add_argument("--tiny", action="store_true")
    for hidden, kind_of in (("--worker", float), ("--warm", int)):
        parse.add_argument(hidden, type=kind_of, help=argparse.SUPPRESS)
    parse.add_argument("--types", type=int, nargs="*", help=argparse.SUPPRESS)
    given = parse.parse_args()
    setup = TINY if given.tiny else Setup(given.device)
    if given.worker:
        worker(given.names[0], given.types, setup, given.worker)
        return 0
    if given.warm is not None:
        warm(given.names[0], given.warm, setup)
        return 0
    began = time.time()
    names = given.names or sorted((m.name for m in METHODS), key=lambda n: (HEAVY.index(n) if n in HEAVY else len(HEAVY), n))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    sink = (given.out / "agree.jsonl").open("w") if given.out else None
    jobs = [Job(n, given, setup, began + given.limit, sink) for n in names]
    for job in jobs:
        job.thread.join(max(0.1, began + given.limit - time.time()))
    for job in jobs:
        job.end()
    rows = [row for job in jobs for row in list(job.rows)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    text = "\n".join([f"{device}, torch {torch.__version__}, {time.time() - began:.0f} s", *table(names, rows, setup)])
    print(text)
    if given.out:
        (given.out / "agree.txt").write_text(text + "\n")
    return int(any(row.get("bad") or "failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
