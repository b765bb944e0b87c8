"""Many methods: a process each, first calls in processes with empty caches, and what they found as JSON, tables and a page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lsmc.lowering import ptxas
from lsmc.runtime.bench.contenders import CONTENDERS, OURS
from lsmc.runtime.bench.measure import Timing, decode, measure, parse_shape
from lsmc.runtime.bench.page import render
from lsmc.runtime.bench.show import show
from lsmc.runtime.errors import LsmConfigError

Shapes = dict[str, tuple[str, ...]]

SHAPES: Shapes = {"cuda": ("16,4096,8,128,128", "8,2048,8,128,128"), "cpu": ("1,4096,4,64,64",)}
DECODE_SHAPES: Shapes = {"cuda": ("64,1,16,128,128",), "cpu": ("4,1,4,64,64",)}
CHANNELS: Shapes = {"cuda": ("8,2048,1,16,2048",), "cpu": ("1,1024,1,16,256",)}
"""Where every entry of the memory decays: few of them for each of many channels."""
PAIRS: Shapes = {"cuda": ("16,4096,8,16,128",), "cpu": ("1,1024,4,16,64",)}
"""Where keys are of pairs: K·K rows."""


def usual(declaration: Any, kind: str, decoding: bool = False) -> tuple[str, ...]:
    """The shapes that a method is measured at where none are given."""
    form = declaration.canonical
    small = CHANNELS if form.matrix else PAIRS if form.rows == "F" else None
    if small is None:
        return (DECODE_SHAPES if decoding else SHAPES)[kind]
    batch = DECODE_SHAPES[kind][0].split(",")[0]
    return tuple(",".join([batch, "1", *text.split(",")[2:]]) for text in small[kind]) if decoding else small[kind]

CACHES = {
    "LSMC_CACHE": "lsmc",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TILELANG_CACHE_DIR": "tilelang",
    "HELION_CACHE_DIR": "helion",
    "CUDA_CACHE_PATH": "cuda",
}
"""Where compilers and tuners keep their results: variable → folder."""


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import importlib.metadata

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    used = ptxas.in_use()
    program = Path(sys.argv[0])
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "ptxas": used[1] if used else None,
        "peers": {name: found for name in ("fla-core", "flash-qla", "tilelang", "helion") if (found := version(name))},
        "command": shlex.join(["lsmc", "bench", *sys.argv[1:]] if program.parent.name == "bench" else sys.argv),
    }


def _cpu() -> str:
    """The processor's name and the number of its cores that are here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def run(
    methods: Sequence[str] = (),
    *,
    shapes: Sequence[str] = (),
    device: str | None = None,
    against: Sequence[str] | None = None,
    decoding: bool = False,
    first_calls: int = 0,
    patience: float = 600.0,
    caches: Path | None = None,
    read: Path | None = None,
    out: Path | None = None,
    markdown: bool = False,
    page: Path | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, and writes JSON and a page; no methods given means the whole zoo, each in a process of its own.

    against      contenders to time beside the eager operator; by default the loop on a CPU, nothing on a GPU
    decoding     times single tokens through `step` instead
    first_calls  times first calls with empty caches before, as many at a time; later first calls find these caches
    patience     seconds after which a first call is given up, and a peer is absent
    caches       where first calls leave their caches; those that an earlier run left there are not made again
    read         shows what an earlier run wrote to `out`, and measures nothing

    Raises LsmConfigError for settings that cannot work, and at the end for methods whose process failed.
    """
    if read is not None:
        record = _read(read)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = "cuda" if device.startswith("cuda") else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise LsmConfigError(f"device = {device!r}: torch sees no CUDA device here")
        against = list(against) if against is not None else ["loop"] * (kind == "cpu" and not decoding)
        for name in against:
            if name not in CONTENDERS:
                raise LsmConfigError(f"against = {name!r}: the contenders are {', '.join(CONTENDERS)}")
        if decoding and (against or first_calls):
            raise LsmConfigError("decode = True: it times `step` alone, without against and first_calls")
        if first_calls < 0:
            raise LsmConfigError(f"first_calls = {first_calls}: processes at a time, or 0 for none")
        record = {"environment": environment() | {"first_calls_at_a_time": first_calls}, "results": [], "decode": [], "failed": []}
        for part in _parts(list(methods), list(shapes), device, against, decoding, first_calls, patience, caches):
            for key, found in part.items():
                record[key] += found
            if out is not None:  # as it goes: what is done stays
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(record, indent=1) + "\n")
    show(record, markdown)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render(record))
    if record["failed"]:
        raise LsmConfigError("\n".join(f"{f['method']} could not be measured:\n{f['why']}" for f in record["failed"]))
    return record


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        for found in record["results"]:
            Timing.of(found)
        _ = record["environment"], record["decode"], record["failed"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LsmConfigError(f"read = {str(path)!r} is not what --out wrote: {type(error).__name__}: {error}") from error
    return record


def _parts(names: list[str], texts: list[str], device: str, against: list[str], decoding: bool, first_calls: int,
           patience: float, kept: Path | None) -> Iterator[dict[str, Any]]:
    """What is found, method by method."""
    from lsmc import zoo
    from lsmc.resolve import resolve

    names = names or list(zoo.names())
    declarations = [resolve(name) for name in names]  # mistakes first
    shapes = {n: texts or list(usual(d, device.split(":")[0], decoding)) for n, d in zip(names, declarations, strict=True)}
    if len(names) == 1 and not first_calls:
        sizes = [parse_shape(text) for text in shapes[names[0]]]
        if decoding:
            yield {"decode": [decode(declarations[0], shape, device).record() for shape in sizes]}
        else:
            yield {"results": [measure(declarations[0], shape, device, against=against).record() for shape in sizes]}
        return
    with tempfile.TemporaryDirectory() as folder:
        caches = Path(kept or folder).absolute()
        cold = _cold(shapes, against, device, caches, first_calls, patience) if first_calls else {}
        for name in names:
            mine = cold.get(name, {})
            absent = {c: why for c, why in mine.items() if isinstance(why, str) and CONTENDERS[c].peer}
            options = ["--decode"] * decoding + ["--against", *(c for c in against if c not in absent)]
            part = _in_a_process(name, shapes[name], device, options, caches / name if first_calls else None)
            for n, found in enumerate(part["results"]):
                found["absent"] |= absent
                for contender, seen in found["runs"].items():
                    seconds = mine.get(contender)
                    seen["cold_s"] = seconds if n == 0 and not isinstance(seconds, str) else None
            print(f"{name}: {'failed' if part['failed'] else 'done'}", file=sys.stderr, flush=True)
            yield part


def _in_a_process(name: str, shapes: Sequence[str], device: str, options: Sequence[str], caches: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "timings.json"
        command = [sys.executable, "-m", "lsmc.runtime.bench", name, "--device", device, "--out", str(out)]
        result = subprocess.run([*command, "--shapes", *shapes, *options], env=_with(caches), capture_output=True, text=True,
                                check=False)
        if result.returncode:
            return {"results": [], "decode": [], "failed": [{"method": name, "why": result.stderr.strip()[-4000:]}]}
        found = json.loads(out.read_text())
    return {key: found[key] for key in ("results", "decode", "failed")}


def _with(caches: Path | None) -> dict[str, str]:
    return dict(os.environ) if caches is None else {**os.environ, **{v: str(caches / name) for v, name in CACHES.items()}}


def _cold(shapes: Mapping[str, Sequence[str]], against: Sequence[str], device: str, caches: Path, count: int,
          patience: float) -> dict[str, dict[str, float | str | None]]:
    """Method → contender → seconds of its first call with empty caches, or why there was none.

    None where an earlier run gave up: its caches are not empty any more. The caches of all contenders of a method are left
    together in the folder of its name. Triton keeps absolute names in its cache, so that what they were copied from stays.
    """
    wanted = [c for c in (*against, OURS) if not CONTENDERS[c].slow and CONTENDERS[c].takes is None]

    def first(name: str, contender: str) -> float | str | None:
        folder = caches / "first" / name / contender
        kept = folder / "first_call.json"
        if kept.exists():
            return _seconds(json.loads(kept.read_text()))
        begun = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lsmc.runtime.bench.first", name, contender, device, *shapes[name]]
        try:
            result = subprocess.run(command, env=_with(folder), capture_output=True, text=True, check=False, timeout=patience)
        except subprocess.TimeoutExpired:
            return f"its first call took more than {patience:g} s"
        if result.returncode:
            return result.stderr.strip()[-1000:]
        found = json.loads(result.stdout.splitlines()[-1])
        if begun and "seconds" in found:
            found["seconds"][0] = None
        if "seconds" in found:
            kept.write_text(json.dumps(found))
        return _seconds(found)

    with ThreadPoolExecutor(count) as pool:
        futures = {(name, c): pool.submit(first, name, c) for c in dict.fromkeys(wanted) for name in shapes}
    found: dict[str, dict[str, float | str | None]] = {name: {} for name in shapes}
    for (name, contender), future in futures.items():
        found[name][contender] = future.result()
        print(f"{name}, {contender}: first call {future.result()}", file=sys.stderr, flush=True)
        made = caches / "first" / name / contender
        if made.exists():
            shutil.copytree(made, caches / name, dirs_exist_ok=True, symlinks=True)
    return found


def _seconds(found: dict[str, Any]) -> float | str | None:
    """What `first` printed, at its first shape."""
    seconds: float | str | None = found["absent"] if "absent" in found else found["seconds"][0]
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lsmc bench", description="Times of the operators, with their errors beside them.")
    parser.add_argument("methods", nargs="*", help="methods of the zoo or FILE.py:NAME; default: the whole zoo")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="B,T,H,K,V")
    parser.add_argument("--device", default=None)
    parser.add_argument("--against", nargs="*", default=None, choices=list(CONTENDERS), help="time these beside the operator")
    parser.add_argument("--decode", action="store_true", dest="decoding", help="time single tokens through step() instead")
    parser.add_argument("--first-calls", type=int, default=0, metavar="N", help="time first calls with empty caches, N at a time")
    parser.add_argument("--patience", type=float, default=600.0, metavar="SECONDS", help="for a first call")
    parser.add_argument("--caches", type=Path, default=None, metavar="DIR", help="keep the caches of first calls, to go on from")
    parser.add_argument("--read", type=Path, default=None, help="show what an earlier run wrote to --out")
    parser.add_argument("--out", type=Path, default=None, help="also write JSON")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--page", type=Path, default=None, help="also write a page with pictures")
    run(**vars(parser.parse_args(argv)))
