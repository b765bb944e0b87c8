"""Pieces of a scheduled program → Triton source: one kernel for each.

A scan kernel owns one (sequence, value head, block of the split dimension) and loops over the sequence's chunks with the
memories in registers; a chunks kernel owns one chunk. The loop body is the piece's operations (`triton_values`), ordered so that
few values are alive.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from lsmc.affine import FACTOR
from lsmc.ir import Carry, Op, Program
from lsmc.lowering.backends import triton_ahead
from lsmc.lowering.backends.triton_cut import Piece, brief, contracts, phases, pieces
from lsmc.lowering.backends.triton_mild import mild
from lsmc.lowering.backends.triton_registers import arranged, block
from lsmc.lowering.backends.triton_steady import decays, unweighted
from lsmc.lowering.backends.triton_values import SIZE, Values, masked
from lsmc.lowering.kernels import digest
from lsmc.schedules import Kernel, Schedule

TILES = ("ahead", "early", "again", "nothing", "exp", "power", "beside", "across", "total", "diagonal", "keep", "dot", "exact_dot",
         "running", "later", "cumsum", "tokens", "lower", "column", "between", "between_grad", "inverse", "mild", "all_set",
         "form_p", "form_x", "form_y", "form_gate", "form_all")


@dataclass(frozen=True)
class Emitted:
    """One kernel's source and what its launch passes, in this order: inputs, stores, carries, then sizes."""

    name: str
    kernel: Kernel
    inputs: tuple[Op, ...]
    stores: tuple[tuple[str, Op], ...]
    partial: frozenset[str]
    carries: tuple[Carry, ...]
    loads: tuple[Carry, ...]
    makes: tuple[Op, ...]
    takes: tuple[Op, ...]
    split: str | None
    block: Callable[[int], int] = field(compare=False)  # columns of that dimension for each program, by the rows of a chunk
    inner: bool  # one program takes all blocks of the split dimension, one after the other
    ahead: bool | None  # whether it is to ask for its loads as it begins; None where it cannot
    early: bool  # whether its tiles can be under way before they are wanted
    how: str
    walks: bool  # from token to token
    wide: int  # of its carries, those over (K, V)
    source: str

    @property
    def scan(self) -> bool:
        """One program runs through all chunks of its sequence."""
        return bool(self.carries) or self.how == "slow"


def launches(program: Program, schedule: Schedule) -> list[tuple[Program, Piece]]:
    """The launches of a schedule in order, each with its program; `known` are values that earlier ones make, or that are taken."""
    cut = pieces(program, schedule)
    made = {i for p in cut for i in p.makes} | {i for _, i in program.taken}
    return [(p.kernel.of(program), replace(p, known=p.known & made)) for p in cut]


def emit(program: Program, schedule: Schedule, flagged: bool = False,
         writer: Callable[[Program, Piece], Writer] | None = None) -> tuple[str, tuple[Emitted, ...]]:
    """The module's source and its kernels; `flagged`: flags of mild chunks come with what the forward program kept; `writer`
    writes kernels that are not made of tiles."""
    parts: list[Emitted] = []
    every = launches(program, schedule)
    later = {op.args[-1] for op in program.ops if op.kind in ("form", "form_gate")}
    for own, p in every:
        writers = [(writer or Writer)(own, p)]
        if writers[0].decays and not p.kernel.carries and (p.makes or flagged):
            first = Writer(program, p, "fast") if flagged else Writer(program, p, "first", later=later)
            writers = [first, Writer(program, p, "slow")]
            flagged = True
        parts += [w.run() for w in writers]
    programs = "\n\n".join(dict.fromkeys(str(p) for p in (program, *(own for own, _ in every))))
    body = "\n".join(p.source for p in parts)
    written = {*re.findall(r"\w+", body)}
    called = ", ".join(name for name in TILES if name in written)
    head = ['"""Generated from:', "", *programs.replace("\\", "").splitlines(), "", *str(schedule).splitlines(), '"""', "",
            "import triton", "import triton.language as tl", "",
            *(["from lsmc.lowering.backends.triton_tiles import (", f"    {called},", ")", ""] if called else [])]
    text = "\n".join([*head, body])
    return f"# {digest(text)}\n{text}", tuple(parts)


class Writer(Values):
    """Writes the source of one kernel.

    Decay forms are one product where the decays of a chunk are mild, as they mostly are, and a series of halvings else.
    A chunks kernel with forms is therefore written twice: `fast` does the mild chunks, `slow` the others, one program
    for each sequence, which mostly ends at once. The `first` of them finds out, for its own decays and those of forms that come
    `later`, in whatever kernel, and leaves flags: mild programs take e^{-s} of all. Other kernels (how = "") decide inside.
    """

    walks = False
    varies: tuple[str, ...] = "B", "T", "HV", "COUNT", "CHUNKS"
    """Sizes whose values change nothing in the code."""

    def __init__(self, program: Program, piece: Piece, how: str = "", origin: dict[int, int] | None = None,
                 later: Iterable[int] = ()) -> None:
        super().__init__(program, piece, how, origin, later)
        self.name = f"{program.name}_{self.kernel.name}" + "_slow" * (how == "slow")
        self.judged: tuple[int, ...] = ()  # decays of which this kernel finds out whether they are mild
        self.decays = tuple(sorted({op.args[-1] for op in self.body if op.kind in ("form", "form_gate")} | set(later)))
        self.waiting: list[tuple[str | None, Op]] = [*self.stores, *((None, op) for op in self.makes)]
        inner = phases(program, self.body, piece.known, piece.split or "") if piece.inner else None
        self.phases = inner or {op.id: 0 for op in self.body}
        found = None if how else unweighted(program, piece)
        self.unweighted = found and self._branch(*found, "unweighted", "u")
        self.mild: Writer | None = None
        if how in ("first", "fast"):
            other, new = mild(program)
            self.mild = self._branch(other, new, "mild")
            more = {self.mild.origin[op.id] for op in self.mild.takes} - {op.id for op in self.takes}
            self.takes += tuple(program.index[i] for i in sorted(more))
            if how == "first":
                self.mild.judged = tuple(sorted(new[i] for i in self.decays))

    def _branch(self, program: Program, new: dict[int, int], how: str, base: str = "") -> Writer:
        """The writer of a branch that takes another form of the program, where the value i is new[i]; its names end with `base`."""
        piece = self.piece
        origin = {j: i for i, j in reversed(new.items())} | {new[i]: i for i in (*piece.known, *piece.makes)}
        out = Writer(program, piece.moved(new), how, origin)
        out.lines, out.base, out.suffix = self.lines, base, base
        return out

    def run(self) -> Emitted:
        loops = bool(self.carries) or self.how == "slow"
        self._prologue(loops)
        if self.how == "slow":
            self.line("count = tl.where(all_set(_flags + place * HV + head, HV, count), 0, count)")
        for c in self.carries:
            self._start(c)
        if self.unweighted:
            self._judge()
            self.line("if fine:")
            there = dict(self.plain), dict(self.cast), set(self.done)
            self._chunks(loops, self.unweighted)
            self.plain, self.cast, self.done = there
            self.line("else:")
        self._chunks(loops)
        if loops:
            for c in self.carries if self.kernel.part != "apply" else ():
                self._end(c)
        self._close()
        source = self._signature() + "\n".join(self.lines) + "\n"
        partial = frozenset(n for n, op in self.stores if op.id in self.part)
        return Emitted(self.name, self.kernel, self.inputs, self.stores, partial, self.carries, self.loads, self.makes,
                       self.takes, self.split, self._block(), self.piece.inner,
                       triton_ahead.pays(self.program, self.piece) if self._asks() else None, self._early(), self.how,
                       self.walks,
                       sum("1" not in self.program.index[c.inp].dims for c in self.carries), source)

    def _judge(self) -> None:
        """Whether products of two powers of these numbers, of the tokens of a chunk, are far from overflow."""
        inside = {op.id for op in self.body}
        steady = sorted({x for i, x in decays(self.program).items() if i in inside})
        for op in self.program.ancestors(steady, self.done):
            self._op(op)
            self.done.add(op.id)
        self.line(f"fine = mild(({' + '.join(map(self.f, steady))}) * (2 * C), DT)")

    def _chunks(self, loops: bool, branch: Writer | None = None) -> None:
        """One chunk, or a loop over those of a sequence; by the program of a branch."""
        self.indent = 1 + bool(self.unweighted)
        if loops:
            segment = self.kernel.part not in ("", "combine")
            first, last = ("low", "high") if segment else ("0", "count")
            order = f"{'low + high' if segment else 'count'} - 1 - step" if self.kernel.reverse(self.program) else "step"
            self.line(f"for step in range({f'{first}, ' * segment}{last}):")
            self.indent += 1
            self.line(f"chunk = {order}")
        self._arrive()
        if branch:
            branch._continue(self)
        else:
            self._follow()
        self.indent = 1

    def _asks(self) -> bool:
        """Whether the kernel can ask for its loads as it begins: loops do so by themselves."""
        return not (self.carries or self.how == "slow" or self.piece.inner or self.walks)

    def _early(self) -> bool:
        """Whether tiles are loaded outside loops."""
        return not (self.carries or self.how == "slow" or self.walks or self.split == "F")

    def _block(self) -> Callable[[int], int]:
        likely = self.unweighted or self.mild or self
        program, piece = likely.program, likely.piece
        return functools.cache(lambda rows: block(program, piece, rows))

    def _close(self) -> None:
        """The end of the kernel: of tiles, everything was stored chunk by chunk."""
        assert not self.waiting, "what a kernel leaves must come from its own operations"

    def _signature(self) -> str:
        args: list[str] = []
        for op in self.inputs:
            n = op.attr("name")
            args += [f"p_{n}", f"sb_{n}", f"st_{n}", f"sh_{n}", f"sg_{n}"] if op.attr("role") == "token" else [f"p_{n}", f"sh_{n}"]
        args += [f"o_{n}" for n, _ in self.stores]
        for c in self.carries:
            args += [f"i_{c.name}", f"e_{c.name}", *([f"s_{c.name}"] * (c.name in self.kernel.saves))]
        gone = [c for c in self.loads if brief(self.program, c)]
        args += [f"{'i' if c in gone else 's'}_{c.name}" for c in self.loads]
        args += [f"t_{op.id}" for op in (*self.makes, *self.takes)]
        args += ["_flags"] if self.how else []
        args += ["seen"] * bool(self.program.counter)
        args += ["cu", "first", "owner", "B", "T", "HV", "COUNT", "CHUNKS", *["SEGMENTS"] * bool(self.kernel.part)]
        args += [f"{n}: tl.constexpr" for n in ("C", "STEP", "LEVELS", "K", "V", "BK", "BV", "PACKED", "HOW", "DT")]
        args += ["AHEAD: tl.constexpr"] * self._asks()
        args += ["EARLY: tl.constexpr"] * self._early()
        args += ["LED: tl.constexpr"] * bool(self.program.counter)
        args += [f"HAS_{c.name}: tl.constexpr" for c in (*self.carries, *gone)]
        rows, row = [], "    "
        for a in args:
            if len(row) + len(a) > 108:
                rows.append(row.rstrip())
                row = "    "
            row += a + ", "
        rows.append(row.rstrip())
        free = ", ".join(f'"{n}"' for n in (*self.varies, *["SEGMENTS"] * bool(self.kernel.part)))
        return f"\n\n@triton.jit(do_not_specialize=[{free}])\ndef {self.name}(\n" + "\n".join(rows) + "\n):\n"

    def _prologue(self, scan: bool) -> None:
        blocks = {"K": "(K + BK - 1) // BK", "V": "(V + BV - 1) // BV", "F": "K", None: "1"}[self.split]
        w = self.line
        w("pid = tl.program_id(0)")
        w(f"BLOCKS: tl.constexpr = {blocks}")
        w("PADK: tl.constexpr = K % BK != 0")
        w("PADV: tl.constexpr = V % BV != 0")
        if self.split == "F":
            w("F: tl.constexpr = K * K")
            w("PADF: tl.constexpr = PADK")
        if self.piece.inner:
            w("head = pid % HV")
            w("unit = pid // HV")
        else:
            w("block = pid % BLOCKS")
            w("head = (pid // BLOCKS) % HV")
            w("unit = pid // (BLOCKS * HV)")
        for d in "KV":
            if not self.piece.inner or d != self.split:
                self._indices(d)
        if self.split == "F" and not self.piece.inner:
            self._indices("F")
        w("row = tl.arange(0, C)[:, None]")
        if self.part:
            w("lead = (block == 0).to(tl.float32)")
        if self.kernel.part == "combine":  # the segments are what the chunks of other scans are
            w("place = unit.to(tl.int64) * SEGMENTS")
            w("count = SEGMENTS")
            w("length = SEGMENTS * STEP")
        elif scan:
            w("seq = unit // SEGMENTS" if self.kernel.part else "seq = unit")
            w("if PACKED:")
            w("    begin = tl.load(cu + seq).to(tl.int64)")
            w("    length = (tl.load(cu + seq + 1).to(tl.int64) - begin).to(tl.int32)")
            w("    batch = begin * 0")
            w("    place = tl.load(first + seq).to(tl.int64)")
            w("else:")
            w("    begin = seq.to(tl.int64) * 0")
            w("    length = T")
            w("    batch = seq.to(tl.int64)")
            w("    place = seq.to(tl.int64) * COUNT")
            self._skip()
            w(f"count = (length{' + skip' * bool(self.program.counter)} + STEP - 1) // STEP")
            if self.kernel.part:
                w("span = (count + SEGMENTS - 1) // SEGMENTS")
                w("low = tl.minimum(unit % SEGMENTS * span, count)")
                w("high = tl.minimum(low + span, count)")
        else:
            w("if PACKED:")
            w("    seq = tl.load(owner + unit).to(tl.int32)")
            w("    if seq < 0:")
            w("        return")
            w("    begin = tl.load(cu + seq).to(tl.int64)")
            w("    length = (tl.load(cu + seq + 1).to(tl.int64) - begin).to(tl.int32)")
            w("    batch = begin * 0")
            w("    place = tl.load(first + seq).to(tl.int64)")
            w("    chunk = (unit - place).to(tl.int32)")
            w("else:")
            w("    seq = unit // COUNT")
            w("    chunk = unit % COUNT")
            w("    begin = seq.to(tl.int64) * 0")
            w("    length = T")
            w("    batch = seq.to(tl.int64)")
            w("    place = seq.to(tl.int64) * COUNT")
            self._skip()
            if self.program.counter:
                w("if LED:")
                w("    if chunk >= (length + skip + STEP - 1) // STEP:")
                w("        return")
        for op in self.inputs:
            n = op.attr("name")
            if op.attr("role") == "token":
                w(f"p_{n} += batch * sb_{n} + begin * st_{n} + (head // sg_{n}).to(tl.int64) * sh_{n}")
            elif not self.phases[op.id] % 2:
                self._op(op)
                self._loaded(op.id)
                self.f(op.id)

    def _skip(self) -> None:
        """How many tokens of its block came before the sequence: rows of its first chunk that are left out."""
        if self.program.counter:
            self.line("skip = tl.load(seen + seq) if LED else 0")

    def _indices(self, d: str) -> None:
        if d == "F":  # the pairs of one a: a block of K rows
            self.line("cF, rF, incF, inrF = block * K + cK, block * K + rK, incK, inrK")
            return
        start = "block * B" + d + " + " if self.split == d else ""
        self.line(f"c{d} = {start}tl.arange(0, B{d})[None, :]")
        self.line(f"r{d} = {start}tl.arange(0, B{d})[:, None]")
        self.line(f"inc{d} = (c{d} < {d}) if PAD{d} else tl.full([1, B{d}], True, tl.int1)")
        self.line(f"inr{d} = (r{d} < {d}) if PAD{d} else tl.full([B{d}, 1], True, tl.int1)")

    def _start(self, c: Carry) -> None:
        offset, mask, elements = self._memory(c)
        r, k = self.program.index[c.inp].dims
        self.line(f"at_{c.name} = (unit.to(tl.int64) * HV + head) * ({elements})")
        if brief(self.program, c):
            return
        self.line(f"if HAS_{c.name}:")
        self.line(f"    m_{c.name} = tl.load(i_{c.name} + at_{c.name} + {offset}{masked(mask)}).to(tl.float32)")
        self.line("else:")
        if c.name.endswith(FACTOR):
            one = f"{mask}{' & (rK == cV)' if self.kernel.part == 'factor' else ''}"
            self.line(f"    m_{c.name} = tl.where({one}, tl.full([{SIZE[r]}, {SIZE[k]}], 1.0, tl.float32), 0.0)")
        else:
            zeros = f"tl.zeros([{SIZE[r]}, {SIZE[k]}], tl.float32)" if self.walks else f"nothing({SIZE[r]}, {SIZE[k]}, length)"
            self.line(f"    m_{c.name} = {zeros}")

    def _end(self, c: Carry) -> None:
        offset, mask, _ = self._memory(c)
        value = self._where_it_starts(c, "count == 0") if brief(self.program, c) else f"m_{c.name}"
        self.line(f"tl.store(e_{c.name} + at_{c.name} + {offset}, {value}, mask={mask})")

    def _arrive(self) -> None:
        """Where a chunk lies, its memories, and which of them this kernel has to do."""
        w = self.line
        led = bool(self.program.counter)
        w("time = chunk * STEP" + " - skip" * led)
        w("rows = row < (length - time)")
        w("if STEP < C:")
        w("    rows = rows & (row < STEP)")
        if led:
            w("if LED:")
            w("    rows = rows & (row >= -time)")
        w("saved = (place + chunk) * HV + head")
        for c in self.carries:
            offset, mask, elements = self._memory(c)
            if c.name in self.kernel.saves:
                w(f"tl.store(s_{c.name} + saved * ({elements}) + {offset}, "
                  f"m_{c.name}.to(s_{c.name}.dtype.element_ty), mask={mask})")
            if brief(self.program, c):
                self._where_it_starts(c, "step == 0")
            w(f"v{c.inp} = m_{c.name}")
            self.plain[c.inp] = self.cast[c.inp, "f"] = f"v{c.inp}"
            self.done.add(c.inp)
        if self._asks():
            tiles = [(f"t_{op.id}", op) for op in self.takes]
            tiles += [(f"s_{c.name}", self.program.index[c.inp]) for c in self.loads if not brief(self.program, c)]
            w("if AHEAD:")
            for text in triton_ahead.lines(self.split, [op for op in self.inputs if op.attr("role") == "token"], tiles):
                w(f"    {text}")
        if self.how == "fast":
            w("if HOW == 0:")
            w("    if tl.load(_flags + saved) == 0:")
            w("        return")
        elif self.how == "slow":
            w("if tl.load(_flags + saved) == 0:")
            self.indent += 1
        if self.mild:
            w("if HOW == 0:")
            self.indent += 1
            self.mild._continue(self)
            self.indent -= 1
            w("else:")
            self.indent += 1

    def _follow(self) -> None:
        """The values of a chunk, and the memories after it."""
        if self._early():
            self.line("if EARLY and not (PADK or PADV):")
            self.line("    early(EARLY)")
        if self.carries:
            self._columns()
        self._values()
        for c in self.carries:
            if not brief(self.program, c):
                self.line(f"m_{c.name} = {self.f(c.out)}")

    def _continue(self, other: Writer) -> None:
        """Write the values in a branch of another kernel, from what is there."""
        self.indent = other.indent
        for j, i in self.origin.items():
            if i in other.done:
                self.plain[j] = other.plain[i]
                self.cast |= {(j, form): name for (k, form), name in other.cast.items() if k == i}
                self.done.add(j)
        if self.judged:
            straight = [i for i in self.judged if self.phases[i] % 2 == 0]
            for op in self.program.ancestors(straight, self.done):
                self._op(op)
                self.done.add(op.id)
            sums = [f"mild({self.sums(i)}, DT).to(tl.int32)" for i in straight]
            self.line(f"fine = {' & '.join(['tl.full([], 1, tl.int32)', *sums])}")
        self._follow()
        if self.judged:
            self.line("tl.store(_flags + saved, fine)")

    def _values(self) -> None:
        for phase in sorted({*self.phases.values()}):
            if phase % 2:
                self._blocks(phase)
            else:
                self._straight([op for op in self.body if self.phases[op.id] == phase])

    def _columns(self) -> None:
        """What is loaded of one number a row comes first: it takes no room, and a scan would wait for each where it is used."""
        for op in self.takes:
            if op.dims == ("T", "1"):
                self._take(op)
        for op in self.body:
            if op.kind == "input" and op.attr("role") == "token" and op.dims[1] == "1":
                self._op(op)
                self.done.add(op.id)

    def _straight(self, body: list[Op]) -> None:
        """These operations, and stores as early as they can be: the registers are needed."""
        for op in self._ordered(body, self.ends):
            if op.id not in self.done:
                self._op(op)
                self.done.add(op.id)
            self._leave()

    def _leave(self) -> None:
        """Store what is there and waits for it; what is summed over blocks is not there before their loop has ended."""
        for way in [w for w in self.waiting if w[1].id in self.done]:
            self.waiting.remove(way)
            name, value = way
            if name is not None:
                self._store(name, value)
            else:
                at, mask = self._tile(value)
                to = f"t_{self.origin.get(value.id, value.id)}"
                self.line(f"tl.store({at}, {self.plain[value.id]}.to({to}.dtype.element_ty), mask={mask})")

    def _blocks(self, phase: int) -> None:
        """A loop over the blocks of the split dimension: sums over it are accumulated, all else stays inside.

        What is only loaded is loaded again for each block, and values of earlier loops are computed again: neither is kept.
        """
        mine = [op for op in self.body if self.phases[op.id] == phase]
        sums = [op for op in mine if self.split in contracts(self.program, op)]
        ends = [op.id for op in mine if op in sums or any(value.id == op.id for _, value in self.waiting)]
        ends += [i for i in self.judged if self.phases[i] == phase]
        kept = {op.id for op in self.body if self.phases[op.id] < phase and self.phases[op.id] % 2 == 0 and not self._light(op)}
        kept |= {op.id for op in self.body if self.phases[op.id] < phase and self.split in contracts(self.program, op)}
        body = [op for op in self.program.ancestors(ends, kept | self.piece.known) if op.id in self.phases]
        for op in sums:
            self.line(f"a{op.id}{self.base} = tl.zeros([{SIZE[op.dims[0]]}, {SIZE[op.dims[1]]}], tl.float32)")
        for i in {a for op in body if op.kind == "matmul" for a in op.args} & kept & self.plain.keys():
            if "1" not in self.program.index[i].dims:
                self.h(i)
        before = dict(self.plain), dict(self.cast), set(self.done)
        for i in [i for i in self.plain if i not in kept]:
            del self.plain[i]
        self.cast = {(i, form): name for (i, form), name in self.cast.items() if i in kept}
        self.done &= kept
        self.line("for block in tl.range(BLOCKS, disable_licm=True):")
        self.indent += 1
        self.suffix = f"{self.base}_{phase}"
        self._indices(self.split or "")
        for op in self._ordered(body, ends):
            if op.id not in self.done:
                self._op(op)
            if op in sums:
                self.line(f"a{op.id}{self.base} += {self.f(op.id)}")
                continue
            self.done.add(op.id)
            self._leave()
        for i in self.judged:
            if self.phases[i] == phase:
                self.line(f"fine = fine & mild({self.sums(i)}, DT).to(tl.int32)")
        self.indent -= 1
        self.suffix = self.base
        left = self.done
        self.plain, self.cast, self.done = before
        self.done |= {i for i in left if self.phases.get(i) == phase}
        for op in sums:
            self.plain[op.id] = self.cast[op.id, "f"] = f"a{op.id}{self.base}"
            self.done.add(op.id)
        self._leave()

    def _light(self, op: Op) -> bool:
        """Whether a value is only loaded."""
        return (op.kind == "input" and op.attr("role") == "token"
                or op.kind == "valid" and self._zero_behind(self.program.index[op.args[0]]))

    def _ordered(self, body: list[Op], ends: list[int]) -> list[Op]:
        """The body in a good order; the decay forms of a group come at once, at the place of the gate's."""
        return arranged(self.program, self.piece, body, ends, self.done, self.groups)
