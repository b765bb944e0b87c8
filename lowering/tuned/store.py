"""What a tuner found out, on disk: plans that were checked and measured, and candidates that were rejected, with reasons.

    find(like, machine)   cache → shipped tables → nothing, and then the default plans hold

One JSON file per key in `$LSMC_CACHE/tuned`, else `~/.cache/lsmc/tuned`; only its owner can enter that folder. A file is
replaced as a whole, so that ranks that tune at once leave one of their files; what is rejected in either stays rejected.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lsmc.lowering import kernels, ptxas

Plan = dict[str, int]
"""BK, BV: columns of K and V that one program takes; AHEAD: whether it asks for all loads as it begins; EARLY: kilobytes of shared
memory that it may fill with loads under way, 0 for none; num_warps; num_stages of loads ahead; maxnreg: the most registers of a
thread."""


def show(plan: Plan) -> str:
    """A plan in a few words: "BK 64, BV 128, 4 warps, 2 stages"."""
    units = {"maxnreg": "registers", "num_warps": "warps", "num_stages": "stages"}
    return ", ".join(f"{x} {units[n]}" if n in units else f"{n} {x}" for n, x in sorted(plan.items(), key=lambda i: i[0] in units))


SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class Like:
    """Launches that share their machine code and, nearly, their times.

    program     hash of the generated source, which shows program and schedule, and of the functions that it calls
    sequences   B·HV (or N·HV with packed sequences) and
    tokens      T, which kernels take as they run: rounded up to powers of two
    key, value  K, V and
    chunk       tokens in a chunk: constants of a kernel
    dtypes      of the inputs in the program's order, "bfloat16 bfloat16 float32"; shared: whether heads share q and k
    given       the memories that start with a tensor, others start at zero
    """

    program: str
    sequences: int
    tokens: int
    key: int
    value: int
    chunk: int
    dtypes: str
    shared: bool = False
    given: tuple[str, ...] = ()
    packed: bool = False

    def __str__(self) -> str:
        more = ", packed" * self.packed + f", {' '.join(self.given)} given" * bool(self.given)
        return f"{self.sequences} sequences of {self.tokens}, K {self.key}, V {self.value}, {self.dtypes.split()[0]}{more}"


@dataclass(frozen=True)
class Machine:
    """Where a plan was measured: compute capability ("sm_90"), the card's name, and what made the code."""

    capability: str
    name: str
    torch: str
    triton: str
    ptxas: str

    def fits(self, other: Machine) -> bool:
        """The same machine code on a card of the same kind: a plan that is right there is right here."""
        return (self.capability, self.triton, self.ptxas) == (other.capability, other.triton, other.ptxas)


@dataclass(frozen=True)
class Rejected:
    """A candidate that is never tried again by these versions, and why."""

    kernel: str
    plan: Plan
    reason: str


@dataclass(frozen=True)
class Time:
    """Milliseconds of one kernel by its plan and by the default one (None: rejected), and what the model said of its plan."""

    chosen: float
    default: float | None
    predicted: float


@dataclass(frozen=True)
class Entry:
    """What is known of one key: plans by kernel (others have the default), times, and what was rejected."""

    like: Like
    machine: Machine
    plans: dict[str, Plan] = field(default_factory=dict)
    times: dict[str, Time] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()

    @property
    def key(self) -> str:
        return key_of(self.like, self.machine)

    @classmethod
    def of(cls, record: Any) -> Entry:
        """The inverse of `dataclasses.asdict`, through JSON. Raises ValueError where it is anything else."""
        try:
            like = Like(**{**record["like"], "given": tuple(record["like"]["given"])})
            plans = {str(k): {str(n): _number(n, x) for n, x in plan.items()} for k, plan in record["plans"].items()}
            times = {str(k): Time(**t) for k, t in record["times"].items()}
            return cls(like, Machine(**record["machine"]), plans, times, tuple(Rejected(**r) for r in record["rejected"]))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a record of tuned plans ({type(error).__name__}: {error})") from error


def _number(name: str, x: Any) -> int:
    if type(x) is not int or not (name not in ("AHEAD", "EARLY")) <= x <= 1024:
        raise ValueError(f"{name}={x!r} cannot be part of a plan")
    return x


def rounded(n: int) -> int:
    """Sizes that share a class: powers of two, rounded up."""
    return 1 << max(0, n - 1).bit_length()


def key_of(like: Like, machine: Machine) -> str:
    """The name of a key's file."""
    return kernels.digest(json.dumps([asdict(like), asdict(machine)], sort_keys=True))


@functools.cache
def machine(index: int) -> Machine:
    """The machine behind CUDA device `index`, for this process."""
    import triton

    properties = torch.cuda.get_device_properties(index)
    used = ptxas.in_use()
    return Machine(f"sm_{properties.major}{properties.minor}", properties.name, torch.__version__, triton.__version__,
                   used[1] if used else "none")


# -- the cache --------------------------------------------------------------------------------------------------------


def load(like: Like, where: Machine) -> Entry | None:
    """What the cache holds for a key. A file that is damaged, or not of this key or this user, is named and left out."""
    folder = kernels.private_dir("tuned")
    if folder is None:
        return None
    path = folder / f"{key_of(like, where)}.json"
    entry = _read(path)
    if entry is None or (entry.like, entry.machine) == (like, where):
        return entry
    _ignore(path, "it is of another key")
    return None


def _read(path: Path) -> Entry | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        _ignore(path, str(error))
        return None
    with os.fdopen(handle) as file:
        if os.fstat(handle).st_uid != os.getuid():
            _ignore(path, "it belongs to another user")
            return None
        try:
            return Entry.of(json.load(file))
        except ValueError as error:
            _ignore(path, str(error))
    return None


def save(entry: Entry) -> Path | None:
    """Write an entry in place of what is there, keeping what was rejected before; None where no folder is ours."""
    folder = kernels.private_dir("tuned")
    if folder is None:
        return None
    before = load(entry.like, entry.machine)
    if before is not None:
        entry = replace(entry, rejected=merged(before.rejected, entry.rejected))
    bad = {(r.kernel, *sorted(r.plan.items())) for r in entry.rejected}
    entry = replace(entry, plans={k: p for k, p in entry.plans.items() if (k, *sorted(p.items())) not in bad})
    path = folder / f"{entry.key}.json"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{entry.key}.")
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(entry), file, indent=1)
    os.replace(temporary, path)
    find.cache_clear()
    return path


def reject(like: Like, where: Machine, what: Rejected) -> None:
    """Remember a candidate that must not be tried again."""
    entry = load(like, where) or Entry(like, where)
    save(replace(entry, rejected=merged(entry.rejected, (what,))))


def rejections(like: Like, where: Machine) -> tuple[Rejected, ...]:
    """What was rejected for the machine code of `like`, at whatever number and length of sequences."""
    folder = kernels.private_dir("tuned")
    found = []
    for path in sorted(folder.glob("*.json")) if folder else ():
        entry = _read(path)
        if entry and entry.machine == where and replace(entry.like, sequences=like.sequences, tokens=like.tokens) == like:
            found.append(entry.rejected)
    return merged(*found)


def merged(*groups: tuple[Rejected, ...]) -> tuple[Rejected, ...]:
    """Every rejected candidate once, by the first reason."""
    found: dict[tuple[object, ...], Rejected] = {}
    for r in (r for group in groups for r in group):
        found.setdefault((r.kernel, *sorted(r.plan.items())), r)
    return tuple(found.values())


def _ignore(path: Path, reason: str) -> None:
    warnings.warn(f"{path} is ignored: {reason}", stacklevel=2)


# -- shipped tables and look-up ---------------------------------------------------------------------------------------


@functools.cache
def shipped(folder: Path) -> Mapping[Like, tuple[Entry, ...]]:
    """The entries of a folder's tables, each a JSON list, by what they are for."""
    out: dict[Like, tuple[Entry, ...]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            entries = [Entry.of(record) for record in json.loads(path.read_text())]
        except (OSError, ValueError) as error:
            _ignore(path, str(error))
            continue
        for entry in entries:
            out[entry.like] = (*out.get(entry.like, ()), entry)
    return out


@functools.cache
def find(like: Like, where: Machine) -> Entry | None:
    """The entry to launch by: of the cache, else of the shipped tables, there first of a card of this name.

    What is found, or is not, holds for this process; `save` makes it look again.
    """
    cached = load(like, where)
    if cached is not None and cached.plans:
        return cached
    others = [entry for entry in shipped(SHIPPED).get(like, ()) if entry.machine.fits(where)]
    bad = {(r.kernel, *sorted(r.plan.items())) for r in (cached.rejected if cached else ())}
    others = [e for e in others if not any((k, *sorted(plan.items())) in bad for k, plan in e.plans.items())]
    return min(others, key=lambda entry: entry.machine.name != where.name, default=cached)


def describe(program: str) -> str:
    """What was measured of a program, on any machine, beside what was predicted; empty where nothing was."""
    folder = kernels.private_dir("tuned")
    cached = [_read(path) for path in sorted(folder.glob("*.json"))] if folder else []
    known = [e for e in (*cached, *(e for group in shipped(SHIPPED).values() for e in group)) if e and e.like.program == program]
    lines = []
    for e in sorted({e.key: e for e in reversed(known)}.values(), key=lambda e: (e.machine.name, e.like.sequences, e.like.tokens)):
        if e.plans:
            lines += ["", f"tuned on {e.machine.name}: {e.like}, triton {e.machine.triton}, ptxas {e.machine.ptxas}"]
        for k, plan in e.plans.items():
            t = e.times.get(k)
            times = f"{t.chosen * 1e3:7.0f} us, {t.predicted * 1e3:.0f} us predicted" if t else ""
            times += f", {t.default * 1e3:.0f} us by the default" if t and t.default is not None else ""
            lines.append(f"  {k}: {times}; {show(plan)}")
    return "\n".join(lines)
