"""Times of the operators, forward and forward with backward, with their errors beside them: ``lsmc bench``.

On a GPU in bfloat16 by ``triton.testing.do_bench`` (medians, a cold L2 cache); on a CPU in float32, also against the
step-by-step loop. Gradients of every input by ``torch.autograd.grad``. Errors are RMS ratios against the float64
recurrence on identically rounded inputs, over a prefix of the first sequence, taken from the very tensors and kernels
that were timed. Several methods run in a process each, so that the first call is a first call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from lsmc.reference import reference
from lsmc.runtime.doctor import ptxas_in_use
from lsmc.runtime.errors import LsmConfigError

GPU_SHAPES = ("16,4096,8,128,128", "8,2048,8,128,128")
CPU_SHAPES = ("1,4096,4,64,64",)
PREFIX = 512
"""Tokens of the first sequence that are compared with the recurrence."""


@dataclass
class Timing:
    """One method at one shape. Times in milliseconds, memory in MiB beyond the inputs (GPU only)."""

    method: str
    shape: tuple[int, int, int, int, int]
    """B, T, H, K, V."""
    dtype: str
    device: str
    first_call_s: float
    """Until the first gradient: deriving, generating, compiling."""
    forward_ms: float
    forward_backward_ms: float
    peak_mib: float | None = None
    loop_forward_ms: float | None = None
    """The step-by-step recurrence in the same precision."""
    loop_forward_backward_ms: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    """RMS ratios: "o", and the gradient of every input by its name."""


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
    declaration: Any, shape: tuple[int, int, int, int, int], device: str, *, loop: bool = True
) -> Timing:
    """Times one method at one shape. ``loop``: on a CPU, also the step-by-step recurrence."""
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    inputs, per_token = _inputs(declaration, shape, device, dtype)
    leaves = list(inputs.values())
    started = time.perf_counter()
    o = declaration(**inputs)
    cotangent = torch.randn_like(o)
    torch.autograd.grad(o, leaves, cotangent)
    _synchronise(device)
    first = time.perf_counter() - started

    def forward() -> Tensor:
        return declaration(**inputs)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(declaration(**inputs), leaves, cotangent)

    timing = Timing(
        method=declaration.name,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        first_call_s=round(first, 2),
        forward_ms=_median(forward, device),
        forward_backward_ms=_median(forward_backward, device),
    )
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward()
        timing.peak_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    elif loop:
        recurrence: Callable[..., Any] = reference(declaration, dtype=dtype)
        timing.loop_forward_ms = _median(lambda: recurrence(**inputs), device, least=2, seconds=2)
        timing.loop_forward_backward_ms = _median(
            lambda: torch.autograd.grad(recurrence(**inputs), leaves, cotangent), device, least=2, seconds=2
        )
    timing.errors = _errors(declaration, inputs, per_token)
    return timing


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


def _errors(declaration: Any, inputs: dict[str, Tensor], per_token: frozenset[str]) -> dict[str, float]:
    """With a cotangent that is zero behind the prefix, gradients are those of the prefix alone."""
    o = declaration(**inputs)
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


def _median(function: Callable[[], Any], device: str, least: int = 5, seconds: float = 1.0) -> float:
    """Milliseconds."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return round(float(do_bench(function, warmup=50, rep=200, return_mode="median")), 4)
    function()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times), 3)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import importlib.metadata

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    used = ptxas_in_use()
    return {
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
    loop: bool = True,
    out: Path | None = None,
    markdown: bool = False,
) -> list[Timing]:
    """Measures, prints a table and writes JSON; no methods given means the whole zoo, each in a process of its own."""
    from lsmc import zoo
    from lsmc.resolve import resolve

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise LsmConfigError(f"device = {device!r}: torch sees no CUDA device here")
    texts = list(shapes or (GPU_SHAPES if device.startswith("cuda") else CPU_SHAPES))
    sizes = [parse_shape(text) for text in texts]
    names = list(methods) or list(zoo.names())
    declarations = [resolve(name) for name in names]  # mistakes first
    timings: list[Timing] = []
    for name, declaration in zip(names, declarations):
        if len(names) == 1:
            timings += [measure(declaration, shape, device, loop=loop) for shape in sizes]
            continue
        timings += _in_a_process(name, texts, device, loop)
        print(f"{name}: done", file=sys.stderr)
    if out is not None:
        record = {"environment": environment(), "results": [dataclasses.asdict(timing) for timing in timings]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(table_markdown(timings)) if markdown else print_table(timings)
    return timings


def _in_a_process(name: str, shapes: Sequence[str], device: str, loop: bool) -> list[Timing]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "timings.json"
        command = [sys.executable, "-m", "lsmc.runtime.bench", name, "--device", device, "--out", str(out)]
        command += ["--shapes", *shapes, *([] if loop else ["--no-loop"])]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LsmConfigError(f"{name} could not be measured:\n{result.stderr.strip()[-4000:]}")
        records = json.loads(out.read_text())["results"]
    return [Timing(**{**record, "shape": tuple(record["shape"])}) for record in records]


def _rows(timings: Sequence[Timing]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "B,T,H,K,V", "forward ms", "fwd+bwd ms", "first call s", "error o", "worst gradient"]
    loops = any(timing.loop_forward_ms for timing in timings)
    peaks = any(timing.peak_mib is not None for timing in timings)
    header += (["loop fwd ms", "loop fwd+bwd ms", "speed-up"] if loops else []) + (
        ["peak MiB"] if peaks else []
    )
    rows = []
    for timing in timings:
        gradients = {name: error for name, error in timing.errors.items() if name != "o"}
        worst = max(gradients, key=lambda name: gradients[name])
        row = [
            timing.method,
            ",".join(map(str, timing.shape)),
            f"{timing.forward_ms:.3f}",
            f"{timing.forward_backward_ms:.3f}",
            f"{timing.first_call_s:.1f}",
            f"{timing.errors['o']:.1e}",
            f"{gradients[worst]:.1e} ({worst})",
        ]
        if loops:
            both = timing.loop_forward_backward_ms
            row += [
                f"{timing.loop_forward_ms:.0f}" if timing.loop_forward_ms else "",
                f"{both:.0f}" if both else "",
                f"{both / timing.forward_backward_ms:.0f}×" if both else "",
            ]
        if peaks:
            row.append(f"{timing.peak_mib:.0f}" if timing.peak_mib is not None else "")
        rows.append(row)
    return header, rows


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
    parser.add_argument("--no-loop", action="store_true", help="do not time the step-by-step loop")
    parser.add_argument("--out", type=Path, default=None, help="also write JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(argv)
    run(
        options.methods,
        shapes=options.shapes,
        device=options.device,
        loop=not options.no_loop,
        out=options.out,
        markdown=options.markdown,
    )


if __name__ == "__main__":
    main()
