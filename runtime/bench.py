"""Times of the operators, forward and forward with backward, with their errors beside them: ``lsmc bench``.

On a GPU in bfloat16 by ``triton.testing.do_bench`` (medians, a cold L2 cache); on a CPU in float32, the contenders taking
turns and the shortest turn counting, because whatever else runs on the machine only ever adds. Gradients of every input by
``torch.autograd.grad``. Errors are RMS ratios against the float64 recurrence on identically rounded inputs, over a prefix
of the first sequence, taken from the very tensors and kernels that were timed. Several methods run in a process each, so
that the first call is a first call.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmc.cases import Case, sample
from lsmc.lowering import ptxas
from lsmc.reference import reference
from lsmc.runtime.errors import LsmConfigError

GPU_SHAPES = ("16,4096,8,128,128", "8,2048,8,128,128")
CPU_SHAPES = ("1,4096,4,64,64",)
PREFIX = 512
"""Tokens of the first sequence that are compared with the recurrence."""


Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    """A way to run a method: `prepare(declaration, dtype)` is a function of the inputs by name that gives o."""

    name: str
    prepare: Callable[[Any, torch.dtype], Function]
    what: str
    slow: bool = False
    """Not worth more than a few turns."""


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("eager", lambda op, dtype: op, "the operator as it is called"),
        Contender("compiled", lambda op, dtype: _compiled(op), "the operator under torch.compile"),
        Contender("loop", lambda op, dtype: reference(op, dtype=dtype), "the recurrence, a token at a time", slow=True),
    )
}
"""Ours first; those named in `--against` run beside it. A peer is a line here."""


def _compiled(declaration: Any) -> Function:
    def call(**inputs: Tensor) -> Tensor:
        return declaration(**inputs)

    compiled: Function = torch.compile(call, fullgraph=True)
    return compiled


@dataclass
class Run:
    """One contender. Times in milliseconds: on a CPU the shortest turn, with the median beside it."""

    first_call_s: float
    """Until the first gradient: deriving, generating, compiling."""
    forward_ms: float = 0.0
    forward_backward_ms: float = 0.0
    forward_median_ms: float = 0.0
    forward_backward_median_ms: float = 0.0
    peak_mib: float | None = None
    """Beyond the inputs; GPU only."""
    errors: dict[str, float] = field(default_factory=dict)
    """RMS ratios: "o", and the gradient of every input by its name."""


@dataclass
class Timing:
    """One method at one shape (B, T, H, K, V), by every contender."""

    method: str
    shape: tuple[int, int, int, int, int]
    dtype: str
    device: str
    runs: dict[str, Run]

    def record(self) -> dict[str, Any]:
        """As JSON: the fields of the first contender, and those of the others after their names."""
        out: dict[str, Any] = {"method": self.method, "shape": list(self.shape), "dtype": self.dtype, "device": self.device}
        for n, (name, found) in enumerate(self.runs.items()):
            out |= {(f"{name}_{key}" if n else key): value for key, value in dataclasses.asdict(found).items()}
        return out | {"contenders": list(self.runs)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Timing:
        """What `record` wrote."""
        runs = {
            name: Run(**{f.name: record[f"{name}_{f.name}" if n else f.name] for f in dataclasses.fields(Run)})
            for n, name in enumerate(record["contenders"])
        }
        b, t, h, k, v = record["shape"]
        return cls(record["method"], (b, t, h, k, v), record["dtype"], record["device"], runs)


def parse_shape(text: str) -> tuple[int, int, int, int, int]:
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


def measure(
    declaration: Any, shape: tuple[int, int, int, int, int], device: str, *, against: Sequence[str] = ()
) -> Timing:
    """Times one method at one shape, by the eager operator and by the contenders of `against`."""
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    inputs, per_token = _inputs(declaration, shape, device, dtype)
    leaves = list(inputs.values())
    runs: dict[str, Run] = {}
    forward: dict[str, Callable[[], Tensor]] = {}
    both: dict[str, Callable[[], Any]] = {}
    for name in dict.fromkeys(("eager", *against)):
        function = CONTENDERS[name].prepare(declaration, dtype)
        started = time.perf_counter()
        cotangent = torch.randn_like(o := function(**inputs))
        torch.autograd.grad(o, leaves, cotangent)
        _synchronise(device)
        runs[name] = Run(round(time.perf_counter() - started, 2))
        forward[name] = functools.partial(function, **inputs)
        both[name] = functools.partial(_gradients, function, inputs, cotangent)
        runs[name].errors = _errors(function, declaration, inputs, per_token)
    for found, functions in (("forward", forward), ("forward_backward", both)):
        for name, (least, median) in _times(functions, device).items():
            setattr(runs[name], f"{found}_ms", least)
            setattr(runs[name], f"{found}_median_ms", median)
    for name in runs if gpu else ():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both[name]()
        runs[name].peak_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return Timing(declaration.name, shape, str(dtype).removeprefix("torch."), _device_name(device), runs)


def _gradients(function: Function, inputs: dict[str, Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(**inputs), list(inputs.values()), cotangent)


def _inputs(
    declaration: Any, shape: tuple[int, int, int, int, int], device: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Typical inputs; per-head constants stay in float32, as they are in models."""
    batch, tokens, heads, key_dim, value_dim = shape
    drawn = sample(
        declaration, Case(batch, tokens, heads, key_dim=key_dim, value_dim=value_dim, defaults=True)
    )
    inputs = {
        name: x.detach().to(device, dtype if name in drawn.per_token else torch.float32).requires_grad_()
        for name, x in drawn.inputs.items()
    }
    return inputs, drawn.per_token


def _errors(
    function: Function, declaration: Any, inputs: dict[str, Tensor], per_token: frozenset[str]
) -> dict[str, float]:
    """With a cotangent that is zero behind the prefix, gradients are those of the prefix alone."""
    o = function(**inputs)
    tokens = min(PREFIX, o.shape[1])
    cotangent = torch.zeros_like(o)
    cotangent[:1, :tokens] = torch.randn_like(o[:1, :tokens])
    found = dict(zip(inputs, torch.autograd.grad(o, list(inputs.values()), cotangent)))
    exact = {
        name: (x[:1, :tokens] if name in per_token else x).detach().double().requires_grad_()
        for name, x in inputs.items()
    }
    oracle: Callable[..., Any] = reference(declaration)
    wanted_o = oracle(**exact)
    wanted = dict(
        zip(exact, torch.autograd.grad(wanted_o, list(exact.values()), cotangent[:1, :tokens].double()))
    )
    errors = {"o": _ratio(o[:1, :tokens], wanted_o)}
    for name, gradient in found.items():
        errors[name] = _ratio(gradient[:1, :tokens] if name in per_token else gradient, wanted[name])
    return errors


def _ratio(found: Tensor, wanted: Tensor) -> float:
    difference = (found.detach().double() - wanted.detach()).square().mean().sqrt()
    return float(f"{float(difference / wanted.detach().square().mean().sqrt().clamp(min=1e-30)):.2e}")


def _times(
    functions: dict[str, Callable[[], Any]], device: str, least: int = 7, seconds: float = 2.0
) -> dict[str, tuple[float, float]]:
    """Per contender the time that counts and the median, in milliseconds."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        medians = {n: round(float(do_bench(f, warmup=50, rep=200, return_mode="median")), 4) for n, f in functions.items()}
        return {name: (median, median) for name, median in medians.items()}
    turns: dict[str, list[float]] = {name: [] for name in functions}
    while min(map(len, turns.values())) < 3 or any(
        len(t) < least or sum(t) < seconds for name, t in turns.items() if not CONTENDERS[name].slow
    ):
        for name, function in functions.items():
            if CONTENDERS[name].slow and len(turns[name]) >= 3:
                continue
            started = time.perf_counter()
            function()
            turns[name].append(time.perf_counter() - started)
    return {n: (round(1000 * min(t), 3), round(1000 * statistics.median(t), 3)) for n, t in turns.items()}


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _cpu() -> str:
    """The processor's name and the number of its cores that are here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import importlib.metadata

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    used = ptxas.in_use()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "ptxas": used[1] if used else None,
        "command": shlex.join(
            ["lsmc", "bench", *sys.argv[1:]] if sys.argv[0].endswith("bench.py") else sys.argv
        ),
    }


def run(
    methods: Sequence[str] = (),
    *,
    shapes: Sequence[str] = (),
    device: str | None = None,
    against: Sequence[str] | None = None,
    out: Path | None = None,
    markdown: bool = False,
) -> list[Timing]:
    """Measures, prints a table and writes JSON; no methods given means the whole zoo, each in a process of its own.

    `against` names contenders to time beside the eager operator; by default the loop on a CPU, nothing on a GPU.
    """
    from lsmc import zoo
    from lsmc.resolve import resolve

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise LsmConfigError(f"device = {device!r}: torch sees no CUDA device here")
    against = list(against) if against is not None else [] if device.startswith("cuda") else ["loop"]
    for name in against:
        if name not in CONTENDERS:
            raise LsmConfigError(f"against = {name!r}: the contenders are {', '.join(CONTENDERS)}")
    texts = list(shapes or (GPU_SHAPES if device.startswith("cuda") else CPU_SHAPES))
    sizes = [parse_shape(text) for text in texts]
    names = list(methods) or list(zoo.names())
    declarations = [resolve(name) for name in names]  # mistakes first
    timings: list[Timing] = []
    for name, declaration in zip(names, declarations):
        if len(names) == 1:
            timings += [measure(declaration, shape, device, against=against) for shape in sizes]
            continue
        timings += _in_a_process(name, texts, device, against)
        print(f"{name}: done", file=sys.stderr)
    if out is not None:
        record = {"environment": environment(), "results": [timing.record() for timing in timings]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(table_markdown(timings)) if markdown else print_table(timings)
    return timings


def _in_a_process(name: str, shapes: Sequence[str], device: str, against: Sequence[str]) -> list[Timing]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "timings.json"
        command = [sys.executable, "-m", "lsmc.runtime.bench", name, "--device", device, "--out", str(out)]
        command += ["--shapes", *shapes, "--against", *against]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LsmConfigError(f"{name} could not be measured:\n{result.stderr.strip()[-4000:]}")
        records = json.loads(out.read_text())["results"]
    return [Timing.of(record) for record in records]


def _rows(timings: Sequence[Timing]) -> tuple[list[str], list[list[str]]]:
    """Ours, then for every other contender its times, how many times ours they are, and for other code its errors."""
    others = list(dict.fromkeys(name for timing in timings for name in list(timing.runs)[1:]))
    peaks = any(found.peak_mib is not None for timing in timings for found in timing.runs.values())
    header = ["method", "B,T,H,K,V", "forward ms", "fwd+bwd ms", "first call s", *["peak MiB"] * peaks, "error o", "worst gradient"]
    for name in others:
        header += [f"{name} fwd ms", f"{name} fwd+bwd ms", f"{name} ÷ ours", f"{name} error"]
    if "loop" in others:
        header += [f"loop ÷ {name}" for name in others if name != "loop"]
    rows = []
    for timing in timings:
        ours = next(iter(timing.runs.values()))
        row = [timing.method, ",".join(map(str, timing.shape)), f"{ours.forward_ms:.3f}", f"{ours.forward_backward_ms:.3f}"]
        row += [f"{ours.first_call_s:.1f}", *[f"{ours.peak_mib or 0:.0f}"] * peaks, f"{ours.errors['o']:.1e}", _worst(ours)]
        for name in others:
            it = timing.runs[name]
            row += [f"{it.forward_ms:.1f}", f"{it.forward_backward_ms:.1f}"]
            row += [f"{it.forward_backward_ms / ours.forward_backward_ms:.1f}×", _worst(it)]
        if "loop" in others:
            loop = timing.runs["loop"].forward_backward_ms
            row += [f"{loop / timing.runs[name].forward_backward_ms:.1f}×" for name in others if name != "loop"]
        rows.append(row)
    return header, rows


def _worst(found: Run) -> str:
    gradients = {name: error for name, error in found.errors.items() if name != "o"}
    worst = max(gradients, key=lambda name: gradients[name])
    return f"{gradients[worst]:.1e} ({worst})"


def table_markdown(timings: Sequence[Timing]) -> str:
    header, rows = _rows(timings)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(timings: Sequence[Timing]) -> None:
    from rich.console import Console
    from rich.table import Table

    header, rows = _rows(timings)
    title = f"{timings[0].device}, {timings[0].dtype}" if timings else ""
    table = Table(*header, title=title, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table, width=None if console.is_terminal else 160)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lsmc bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "methods", nargs="*", help="methods of the zoo or FILE.py:NAME; default: the whole zoo"
    )
    parser.add_argument("--shapes", nargs="+", default=[], metavar="B,T,H,K,V")
    parser.add_argument("--device", default=None)
    parser.add_argument("--against", nargs="*", default=None, choices=list(CONTENDERS), help="time these beside the operator")
    parser.add_argument("--out", type=Path, default=None, help="also write JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(argv)
    run(
        options.methods,
        shapes=options.shapes,
        device=options.device,
        against=options.against,
        out=options.out,
        markdown=options.markdown,
    )


if __name__ == "__main__":
    main()
