"""The Triton backend: a program under a schedule, compiled when first launched, on CUDA tensors (or interpreted)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from inspect import getsource
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsmc.affine import FACTOR, PART
from lsmc.ir import Dims, Program
from lsmc.lowering import kernels, ptxas
from lsmc.lowering.backends import triton_tiles
from lsmc.lowering.backends.triton_cut import brief, whole
from lsmc.lowering.backends.triton_emit import Emitted, emit
from lsmc.lowering.backends.triton_record import Launched, Likeness, Recording, Room, likeness, recordable
from lsmc.lowering.backends.triton_registers import NARROW, OPERANDS, WIDE, area, room
from lsmc.lowering.backends.triton_scan import GROUP, walked, writer
from lsmc.lowering.backends.triton_sums import gather
from lsmc.lowering.backends.triton_walk import Stepper, held
from lsmc.lowering.tuned import store
from lsmc.lowering.tuned.store import Like, Plan
from lsmc.schedules import Schedule
from lsmc.schedules.segments import count
from lsmc.target import H200

ptxas.select()

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Results = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Outputs, and the last value of every carry, by name."""
Repeat = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Results | None]

EARLY = 112
"""Kilobytes of shared memory for a program over chunks whose loads are under way early (`triton_early`): two share a
multiprocessor."""

RECORDINGS = 256
"""Launches of one program that are remembered."""


class Compiled:
    """The Triton form of one program under one schedule: printable source and a launch on tensors."""

    fresh = True
    needs_memories = False

    def __init__(self, program: Program, schedule: Schedule, flagged: bool = False) -> None:
        self.program, self.schedule = gather(program), schedule
        make = Stepper if any(k.walks for k in schedule.kernels) else writer(self.program)
        self.source, self.kernels = emit(self.program, schedule, flagged, make)
        self.keeps = tuple(n for n, _ in self.program.kept)
        if self.keeps and self.flags:
            self.keeps += ("_flags",)
        self.hash = kernels.digest(self.source + kernels.reached(getsource(triton_tiles), self.source))
        self.plans: Mapping[str, Plan] = {}
        self.recordings: dict[Likeness, _Recorded] = {}

    @property
    def flags(self) -> bool:
        """Whether kernels tell each other which chunks have mild decays."""
        return any(k.how for k in self.kernels)

    @cached_property
    def functions(self) -> dict[str, Any]:
        module = kernels.load(self.source)
        return {k.name: getattr(module, k.name) for k in self.kernels}

    def adopt(self, plans: Mapping[str, Plan]) -> None:
        """Launch by these plans from now on, whatever was tuned: by the kernel's name in the schedule, "chunks_K".

        What was recorded is forgotten.
        """
        self.plans = {name: dict(plan) for name, plan in plans.items()}
        self.recordings = {}

    def launch(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor | None], chunk: int,
               cu_seqlens: Tensor | None = None, dtypes: Mapping[str, torch.dtype] | None = None,
               ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token outputs (B, T, HV, D) or (B, T, HV), per-head outputs (HV, D) or (HV,), what is kept (`keeps`), and the last
        value of every carry.

        inputs: (B, T, H or HV, D) or (B, T, HV) tokens, (HV,) or (HV, D) constants, what was kept; memories: float32 (N, HV,
        K, V) where each carry starts (reversed ones at the end of time), None for zeros; dtypes: of outputs, where not the inputs'.
        """
        device = next(iter(inputs.values())).device
        if device.type != "cuda" or self._traced():
            return self._launch(inputs, memories, chunk, cu_seqlens, dtypes).finish()
        key = _key(inputs, memories, chunk, cu_seqlens, dtypes)
        with torch.cuda.device(device):
            if key in self.recordings:
                return self.recordings[key].repeat(inputs, memories, cu_seqlens)
            run = self._launch(inputs, memories, chunk, cu_seqlens, dtypes)
            if all(recordable(done.kernel) for done in run.launched):
                if len(self.recordings) >= RECORDINGS:
                    self.recordings.clear()
                self.recordings[key] = _Recorded(run)
            return run.finish()

    def recorded(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor], chunk: int) -> Repeat | None:
        """The launch that was recorded on tensors like these, if one was, to be repeated without looking at them again.

        It gives None once other plans are adopted.
        """
        recordings, device = self.recordings, next(iter(inputs.values())).device
        found = recordings.get(_key(inputs, memories, chunk))
        if found is None:
            return None

        def repeat(inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor]) -> Results | None:
            if self.recordings is not recordings:
                return None
            here = torch.cuda.current_device() == device.index
            with nullcontext() if here else torch.cuda.device(device):
                return found.repeat(inputs, memories, None)

        return repeat

    def _launch(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor | None], chunk: int,
                cu_seqlens: Tensor | None, dtypes: Mapping[str, torch.dtype] | None) -> _Launch:
        run = self.prepare(inputs, memories, chunk, cu_seqlens, dtypes)
        for k in self.kernels:
            run.kernel(k)
        return run

    def prepare(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor | None], chunk: int,
                cu_seqlens: Tensor | None = None, dtypes: Mapping[str, torch.dtype] | None = None) -> _Launch:
        """A launch that has not begun, as `launch` begins it: for those who look at its kernels one by one."""
        return _Launch(self, inputs, memories, chunk, cu_seqlens, dtypes or {})

    def _traced(self) -> bool:
        """Whether launches go into a graph: elsewhere a kernel that is wrapped for tracing is the kernel itself."""
        first = next(iter(self.functions.values()))
        return torch.library.wrap_triton(first) is not first


def _key(inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor | None], chunk: int, cu_seqlens: Tensor | None = None,
         dtypes: Mapping[str, torch.dtype] | None = None) -> Likeness:
    """What decides a launch but for addresses."""
    return (chunk, *(dtypes or {}).items(), *likeness([*inputs.items(), *memories.items(), ("cu", cu_seqlens)]))


class _Recorded:
    """A finished launch, without its tensors, and what is done around its kernels."""

    def __init__(self, run: _Launch) -> None:
        given = [*(f"p_{n}" for n in run.inputs), *(f"i_{c}" for c, m in run.memories.items() if m is not None)]
        given += ["cu", "first", "owner"] if run.packed else []
        given += ["seen"] if run.led else []
        given += run.taken_as.values()
        results = run.outputs | run.keeps | run.ends
        self.kernels = Recording(run.launched, run.rooms, results.values(), given)
        self.names = [n for r in run.rooms for n, x in results.items() if x is r.tensor]
        self.keeps, self.ends, self.taken = tuple(run.keeps), tuple(run.ends), run.taken_as
        self.step, self.chunks, self.heads, self.parts, self.dtypes = run.step, run.chunks, run.heads, run.parts, run.dtypes
        self.counter = run.program.counter if run.led else None
        self.rows = {op.attr("name"): _inner(op.dims) for op in run.program.inputs("token", "head")}

    def repeat(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor | None],
               cu_seqlens: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ready = {n: _rows(inputs[n], inner) for n, inner in self.rows.items()}
        given = {f"p_{n}": x for n, x in ready.items()}
        given |= {f"i_{c}": m.contiguous() for c, m in memories.items() if m is not None}
        given |= {argument: inputs[n] for n, argument in self.taken.items()}
        led = memories[self.counter] if self.counter else None
        seen = None if led is None else counted(led, self.step)
        given |= {} if seen is None else {"seen": seen}
        if cu_seqlens is not None:
            given |= zip(("cu", "first", "owner"), tables(cu_seqlens, self.step, self.chunks, seen), strict=True)
        made = dict(zip(self.names, self.kernels.repeat(given, next(iter(ready.values())).device), strict=True))
        outputs = finish({n: made[n] for n in self.parts}, inputs, self.parts, self.heads, self.dtypes)
        return outputs | {n: made[n] for n in self.keeps}, {n: made[n] for n in self.ends}


class _Launch:
    """One launch: sizes, buffers and arguments."""

    def __init__(self, compiled: Compiled, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor | None], chunk: int,
                 cu_seqlens: Tensor | None, dtypes: Mapping[str, torch.dtype]) -> None:
        self.compiled, self.program, self.given, self.memories = compiled, compiled.program, inputs, memories
        walks = any(k.walks for k in compiled.kernels)
        chunk = 1 if any(k.kernel.walks for k in compiled.kernels) else max(chunk, GROUP) if walks else chunk
        self.step, self.chunk, self.dtypes = chunk, chunk if walks else max(chunk, 16), dtypes  # rows that matrix units take
        self.size: dict[str, int] = {"1": 1}
        self.inputs: dict[str, Tensor] = {}
        self.heads, tokens = 1, None
        for op in self.program.inputs("token", "head"):
            x = inputs[op.attr("name")]
            x = _rows(x, _inner(op.dims))
            self.size |= zip(_named(op.dims), x.shape[x.ndim - _inner(op.dims):], strict=True)
            self.inputs[op.attr("name")] = x
            token = op.attr("role") == "token"
            self.heads = max(self.heads, x.shape[2] if token else x.shape[0])
            if token and (tokens is None or op.dims[1] != "1" and tokens.ndim < 4):
                tokens = x
        assert tokens is not None
        for m in (memories.get(c.name) for c in self.program.carries):
            if m is not None:
                self.heads = m.shape[1]
        self.size["F"] = self.size.get("K", 1) ** 2
        self.batch, self.tokens = tokens.shape[:2]
        self.like, self.device = tokens, tokens.device
        self.type = _TYPES[tokens.dtype]
        self.packed = cu_seqlens is not None
        led = memories.get(self.program.counter or "")
        self.led = led is not None and chunk > 1  # one token lies in one block
        self.seen = counted(led, chunk) if led is not None and self.led else tokens
        self.per_sequence = (self.tokens + (1 + self.led) * (chunk - 1)) // chunk
        if cu_seqlens is None:
            self.sequences, self.chunks = self.batch, self.batch * self.per_sequence
            self.cu = self.first = self.owner = tokens
        else:
            self.sequences = cu_seqlens.shape[0] - 1
            self.chunks = self.tokens // chunk + (1 + self.led) * self.sequences
            self.cu, self.first, self.owner = tables(cu_seqlens, chunk, self.chunks, self.seen if self.led else None)
        self.rooms: list[Room] = []
        self.launched: list[Launched] = []
        self.saved = {f"t_{i}": inputs[n] for n, i in self.program.taken}
        self.taken_as = {n: f"t_{i}" for n, i in self.program.taken} | ({"_flags": "_flags"} if "_flags" in inputs else {})
        self.flags: Tensor | None = inputs.get("_flags")
        self.segments = count(self.sequences * self.heads, self.per_sequence)
        self.starts: dict[str, Tensor] = {}  # of every segment
        self.outputs: dict[str, Tensor] = {}
        self.parts: dict[str, int] = {}
        self.ends: dict[str, Tensor] = {}
        like = self.kind() if self.device.type == "cuda" else None
        found = store.find(like, store.machine(self.device.index or 0)) if like else None
        self.plans = {**(found.plans if found else {}), **compiled.plans}

    def kind(self) -> Like | None:
        """The class of this launch, by which plans are kept; None where sizes are symbolic."""
        key, value = self.size.get("K", 1), self.size.get("V", 1)
        if not all(isinstance(n, int) for n in (self.sequences, self.heads, self.tokens, key, value)):
            return None
        dtypes = " ".join(str(x.dtype).removeprefix("torch.") for x in self.inputs.values())
        shared = any(x.ndim > 2 and x.shape[2] != self.heads for x in self.inputs.values())
        names = dict.fromkeys([*(c.name for c in self.program.carries), self.program.counter or ""])
        given = tuple(n for n in names if self.memories.get(n) is not None)
        return Like(self.compiled.hash, store.rounded(self.sequences * self.heads), store.rounded(self.tokens), key, value,
                    self.chunk, dtypes, shared, given, self.packed)

    def plan(self, k: Emitted) -> Plan:
        """Default, tuned, or adopted. The two kernels of a pair fill the same partial sums: they share their blocks."""
        own = self.plans.get(k.kernel.name, {})
        shared = {n: x for n, x in own.items() if n in ("BK", "BV")} if k.how == "slow" else own
        return {**plan_of(k, self.size.get("K", 1), self.size.get("V", 1), self.sequences * self.heads, self.chunk,
                          self.like.element_size()), **shared}

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, zero: bool = False) -> Tensor:
        self.rooms.append(Room((torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=self.device), zero))
        return self.rooms[-1].tensor

    def kernel(self, k: Emitted) -> None:
        programs, args = self.arguments(k)
        if programs:
            function = self.compiled.functions[k.name]
            if self.device.type == "cuda":
                function = torch.library.wrap_triton(function)
            made = function[(programs,)](**args)
            names = getattr(function, "arg_names", ())
            self.launched.append(Launched(made, programs, {n: args[n] for n in names}))

    def arguments(self, k: Emitted) -> tuple[int, dict[str, Any]]:
        """How many programs to launch, and with what; makes room for what the kernel writes."""
        args: dict[str, Any] = {}
        for op in k.inputs:
            name = op.attr("name")
            x = args[f"p_{name}"] = self.inputs[name]
            if op.attr("role") == "token":
                args |= {f"sb_{name}": x.stride(0), f"st_{name}": x.stride(1), f"sh_{name}": x.stride(2),
                         f"sg_{name}": self.heads // x.shape[2]}
            else:
                args[f"sh_{name}"] = x.stride(0)
        part, program = k.kernel.part, k.kernel.of(self.program)
        size = {**self.size, "V": self.size["K"]} if part == "factor" else self.size
        units = self.sequences if k.scan else self.chunks
        segments = self.sequences * self.segments
        if part and part != "combine":
            units = segments
        for c in k.carries:
            shape = (self.heads, *(size[d] for d in program.index[c.inp].dims))
            m = {"": self.memories, "combine": self.memories, "apply": self.starts}.get(part, {}).get(c.name)
            end = self.like if part == "apply" else self.room((units, *shape), torch.float32)
            args |= {f"i_{c.name}": self.like if m is None else m.contiguous(), f"e_{c.name}": end, f"HAS_{c.name}": m is not None}
            if part in ("", "combine"):
                self.ends[c.name] = end
            elif part != "apply":
                self.saved[c.name if c.name.endswith(FACTOR) else c.name + PART] = end
            if c.name in k.kernel.saves and part == "combine":
                args[f"s_{c.name}"] = self.starts[c.name] = self.room((segments, *shape), torch.float32)
            elif c.name in k.kernel.saves:
                dtype = self.like.dtype if program.index[c.inp].dims[0] != "1" else torch.float32
                args[f"s_{c.name}"] = self.saved[c.name] = self.room((self.chunks, *shape), dtype)
        for c in k.loads:
            if brief(self.program, c):
                m = self.memories.get(c.name)
                args |= {f"i_{c.name}": self.like if m is None else m.contiguous(), f"HAS_{c.name}": m is not None}
            else:
                args[f"s_{c.name}"] = self.saved[c.name]
        for op in k.makes if k.how != "slow" else ():
            rows, last = (self.chunk if d == "T" else self.size[d] for d in op.dims)
            dtype = self.like.dtype if op.dims[0] == "T" and op.dims[1] != "1" else torch.float32
            self.saved[f"t_{op.id}"] = self.room((self.chunks, self.heads, rows, last), dtype)
        args |= {f"t_{op.id}": self.saved[f"t_{op.id}"] for op in (*k.makes, *k.takes)}
        if k.how:
            if self.flags is None:
                self.flags = self.room((self.chunks * self.heads,), torch.int32)
            args["_flags"] = self.flags
        exact = self.type == tl.float32
        if exact and k.how == "slow":
            return 0, {}
        plan = self.plan(k)
        blocks = 1
        if k.split and not k.inner:
            blocks = size["K"] if k.split == "F" else triton.cdiv(size[k.split], plan["BK" if k.split == "K" else "BV"])
        for name, _ in k.stores:
            if k.how != "slow":
                parts, count = blocks if name in k.partial else 0, units if k.walks else self.chunks
                dims = self.program.index[dict(self.program.outputs)[name]].dims
                self.outputs[name] = self._output(name, dims, parts, count)
            args[f"o_{name}"] = self.outputs[name]
        args |= {"SEGMENTS": self.segments} if part else {}
        args |= {"seen": self.seen, "LED": self.led} if self.program.counter else {}
        args |= {"cu": self.cu, "first": self.first, "owner": self.owner, "B": self.batch, "T": self.tokens, "HV": self.heads,
                 "COUNT": self.per_sequence, "CHUNKS": self.chunks, "C": self.chunk, "STEP": self.step,
                 "LEVELS": self.chunk.bit_length() - 1,
                 "K": size.get("K", 1), "V": size.get("V", 1), "PACKED": self.packed,
                 "HOW": 1 if exact or k.how == "slow" else 0 if k.how else 2, "DT": self.type, **plan}
        return units * self.heads * blocks, args

    def _output(self, name: str, dims: Dims, blocks: int, units: int) -> Tensor:
        """Room for one output; float32 where `finish` sums over blocks, chunks or sequences (`units`), or value heads."""
        source = self.given.get(whole(name)[2:]) if whole(name).startswith("d_") else None
        last = tuple(self.size[d] for d in _named(dims))
        parts = (blocks,) if blocks else ()
        self.parts[name] = blocks
        if dims[0] != "T":
            return self.room((*parts, units, self.heads, *last), torch.float32, zero=self.packed or self.led)
        dtype = self.dtypes.get(name, self.like.dtype if source is None else source.dtype)
        if blocks or name != whole(name) or source is not None and source.shape[2] != self.heads:
            dtype = torch.float32
        return self.room((*parts, self.batch, self.tokens, self.heads, *last), dtype)

    @property
    def keeps(self) -> dict[str, Tensor]:
        """What the program keeps, as kernels left it: a tile for each chunk and value head."""
        carried = {c.inp: c.name for c in self.program.carries}
        places = {n: carried.get(i, f"t_{i}") for n, i in self.program.kept}
        found = {n: self.saved[place] for n, place in places.items()}
        return found | ({"_flags": self.flags} if "_flags" in self.compiled.keeps and self.flags is not None else {})

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return finish(self.outputs, self.given, self.parts, self.heads, self.dtypes) | self.keeps, self.ends


def _named(dims: Dims) -> str:
    """The named dimensions of one token's part of a value."""
    return "KV" if "E" in dims else "".join(d for d in dims if d in "KV")


def _inner(dims: Dims) -> int:
    return len(_named(dims))


def _rows(x: Tensor, inner: int) -> Tensor:
    """An input as kernels read it: the numbers of a row, or of a matrix, lie side by side."""
    side_by_side = (inner < 1 or x.stride(-1) == 1) and (inner < 2 or x.stride(-2) == x.shape[-1])
    return x if side_by_side else x.contiguous()


def counted(memory: Tensor, chunk: int) -> Tensor:
    """Rows of a chunk that come before each sequence's first token, from the memory that counts the tokens of a block."""
    return memory[:, 0, 0, 0].round().to(torch.int32) % chunk  # the same in all heads


def tables(cu_seqlens: Tensor, chunk: int, chunks: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Where packed sequences begin, their first chunks, and the sequence of each chunk (−1 for none), made on the device:
    nothing waits for it. `seen` rows of a sequence's first chunk come before it."""
    counts = (cu_seqlens.diff() + (0 if seen is None else seen) + chunk - 1) // chunk
    ends = counts.cumsum(0)
    owner = torch.searchsorted(ends, torch.arange(chunks, device=cu_seqlens.device).to(ends.dtype), right=True)
    owner = torch.where(owner < counts.shape[0], owner, -1).to(torch.int32)
    return cu_seqlens.contiguous(), ends - counts, owner


def finish(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], parts: Mapping[str, int], heads: int,
           dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Sums over what kernels left apart: blocks, shares, value heads that share a query/key head, chunks of per-head gradients."""
    out: dict[str, Tensor] = {}
    for name, x in outputs.items():
        x = x.sum(0) if parts[name] else x
        out[whole(name)] = out[whole(name)] + x if whole(name) in out else x
    for name, x in out.items():
        source = inputs.get(name[2:]) if name.startswith("d_") else None
        if source is not None and source.shape[0] == heads and x.shape[1:] == source.shape:
            x = x.sum(0)
        elif source is not None and x.ndim > 2 and source.ndim > 2 and source.shape[2] != x.shape[2]:
            x = x.unflatten(2, (source.shape[2], -1)).sum(3)
        out[name] = x if source is None else x.to(dtypes.get(name, source.dtype))
    return out


def plan_of(k: Emitted, key: int, value: int, sequences: int, chunk: int, element_bytes: int = 2) -> Plan:
    """Block sizes, warps and pipeline stages of one launch: no narrow blocks over chunks by a ptxas that gets them wrong."""
    if k.kernel.walks:
        return held(key, value, k.wide, sequences, k.split is not None, H200.units)
    if k.walks:
        return walked(key, value)
    value = key if k.kernel.part == "factor" else value  # the columns of the factor
    size = {"K": max(16, triton.next_power_of_2(key)), "V": max(16, triton.next_power_of_2(value))}
    whole = k.split is None and bool(k.carries)
    warps = 8 if whole or k.kernel.part == "combine" else 4  # memories of all columns, exact products: the registers of eight
    stages = 2 if k.inner else 1  # with three, loops over blocks of a chunk read what was not there yet
    extent, columns = {"T": chunk, "1": 1, "F": key, **size}, 0
    if whole:
        stages = 2 if _fits(element_bytes * _loaded(k, extent), max(size.values())) else 1
    elif k.scan:
        columns, warps, stages = _scanning(k, extent, sequences, warps, element_bytes)
    elif k.split in size:
        columns = k.block(chunk) if ptxas.sound() else WIDE
    if k.split in size:
        size[k.split] = min(size[k.split], columns)
    early = {"EARLY": EARLY if element_bytes == 2 else 0} if k.early else {}
    ahead = {} if k.ahead is None else {"AHEAD": int(k.ahead and not early.get("EARLY"))}
    return {"BK": size["K"], "BV": size["V"], **ahead, **early, "num_warps": warps, "num_stages": stages}


def _loaded(k: Emitted, extent: dict[str, int]) -> int:
    """Numbers that a scan loads for one chunk."""
    return area((*(op.dims for op in (*k.inputs, *k.takes)), *[("K", "V")] * len(k.loads)), extent)


def _fits(loaded: int, columns: int) -> bool:
    """Whether two chunks' loads of so many bytes surely have room beside what products take."""
    return 2 * loaded + 1.5 * OPERANDS * columns**2 <= H200.shared_bytes


def _scanning(k: Emitted, extent: dict[str, int], sequences: int, warps: int, element_bytes: int) -> tuple[int, int, int]:
    """Columns, warps and stages of a scan: whatever has most loads under way on a multiprocessor.

    Two programs of a multiprocessor cover each other's waits. Where there are too few programs for that, they take half of the
    columns; where two have no room and all would run one after the other, one program of eight warps takes all columns. Loads
    are three chunks ahead where that costs no program its room.
    """
    split = k.split or "1"
    full = extent[split]
    usual = min(full, k.block(extent["T"]) if k.carries or ptxas.sound() else WIDE)  # a slow kernel's are those of its pair

    def loaded(columns: int) -> int:
        return element_bytes * _loaded(k, {**extent, split: columns})

    def resident(columns: int, stages: int) -> int:
        return room(loaded(columns), columns, stages)

    programs = sequences * -(-full // usual)
    alone = programs <= H200.units
    if k.carries and split in "KV" and not k.kernel.part:
        half = usual // 2
        if alone and not k.stores and half >= NARROW:
            for stages in (3, 2):
                if resident(half, stages) == 2:
                    return half, warps, stages
        whole = resident(usual, 2) < 2 and resident(full, 2) and element_bytes == 2  # float32 is slow to compile so wide
        if not alone and not k.stores and whole and usual < full and sequences <= H200.units:
            return full, 8, 2
    deep = resident(usual, 3)
    if deep and (alone and not k.kernel.part or deep == resident(usual, 2)):
        return usual, warps, 3
    return usual, warps, 2 if _fits(loaded(usual), usual) else 1
