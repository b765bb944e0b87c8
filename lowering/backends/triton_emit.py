"""Pieces of a scheduled program → Triton source: one kernel for each.

A scan kernel owns one (sequence, value head, block of the split dimension) and loops over the sequence's chunks with the
memories in registers; a chunks kernel owns one chunk. The loop body is the piece's operations, ordered so that few values
are alive, on tiles of shape (C, BK), (C, BV), (BK, BV), … where extents of 1 broadcast. What is loaded keeps its type and
goes to the matrix units as it is; what is computed is float32. Extents that do not fill their block are padded with zeros,
and every operation keeps the padding zero, so that contractions need no masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import sympy

from lsmc.affine import FACTOR
from lsmc.factors import factor
from lsmc.functions import FUNCTIONS
from lsmc.ir import Carry, Dims, Op, Program, operand
from lsmc.lowering.backends.triton_cut import Piece, brief, contracts, phases, pieces, shares
from lsmc.lowering.backends.triton_mild import mild
from lsmc.lowering.backends.triton_registers import arranged, block
from lsmc.lowering.kernels import digest
from lsmc.schedules import Kernel, Schedule

TILES = ("exp", "power", "beside", "across", "total", "diagonal", "keep", "dot", "exact_dot", "running", "later", "cumsum", "lower",
         "column", "between", "between_grad", "inverse", "mild", "form_p", "form_x", "form_y", "form_gate", "form_all")
NAMED = "KVF"
SIZE = {"T": "C", "K": "BK", "V": "BV", "F": "BK", "1": "1"}


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
    how: str
    walks: bool  # from token to token
    wide: int  # of its carries, those over (K, V)
    source: str

    @property
    def scan(self) -> bool:
        """One program runs through all chunks of its sequence."""
        return bool(self.carries) or self.how == "slow"


def gates(program: Program) -> set[int]:
    """Values that are log decays: what decay forms and exponentials of running sums are made of."""
    out = {op.args[-1] for op in program.ops if op.kind in ("between", "form", "form_gate")}
    for op in program.ops:
        if op.kind == "map" and type(op.attr("expr")).__name__ == "exp":
            inner = program.index[op.args[0]]
            if inner.kind == "cumsum" and len(op.args) == 1:
                out.add(inner.args[0])
    return out


def emit(program: Program, schedule: Schedule, flagged: bool = False,
         writer: Callable[[Program, Piece], Writer] | None = None) -> tuple[str, tuple[Emitted, ...]]:
    """The module's source and its kernels; `flagged`: flags of mild chunks come with what the forward program kept; `writer`
    writes kernels that are not made of tiles."""
    parts: list[Emitted] = []
    cut = pieces(program, schedule)
    made = {i for p in cut for i in p.makes} | {i for _, i in program.taken}
    every = [replace(p, known=p.known & made) for p in cut]
    for n, p in enumerate(every):
        writers = [(writer or Writer)(p.kernel.of(program), p)]
        if writers[0].decays and not p.kernel.carries and (p.makes or flagged):
            later = {i for q in every[n + 1:] if not q.kernel.carries for i in Writer(program, q).decays}
            first = Writer(program, p, "fast") if flagged else Writer(program, p, "first", later=later)
            writers = [first, Writer(program, p, "slow")]
            flagged = True
        parts += [w.run() for w in writers]
    programs = "\n\n".join(dict.fromkeys(str(p) for p in (program, *(p.kernel.of(program) for p in cut))))
    head = ['"""Generated from:', "", *programs.replace("\\", "").splitlines(), "", *str(schedule).splitlines(), '"""', "",
            "import triton", "import triton.language as tl", "",
            "from lsmc.lowering.backends.triton_tiles import (", f"    {', '.join(TILES)},", ")", ""]
    text = "\n".join([*head, *(p.source for p in parts)])
    return f"# {digest(text)}\n{text}", tuple(parts)


class Expression:
    """Prints elementwise expressions as statements on named values; equal subexpressions are computed once."""

    def __init__(self, prefix: str, names: list[str], columns: Iterable[sympy.Symbol] = ()) -> None:
        self.prefix, self.lines, self.columns = prefix, list[str](), set(columns)
        self.known: dict[sympy.Basic, str] = {sympy.Symbol(f"x{i}", real=True): n for i, n in enumerate(names)}

    def __call__(self, e: sympy.Basic) -> str:
        if e.is_number and not e.free_symbols:
            return f"({float(e)!r})"
        if e not in self.known:
            text = self._text(e)
            self.known[e] = name = f"{self.prefix}_{len(self.lines)}"
            self.lines.append(f"{name} = {text}")
        return self.known[e]

    def _text(self, e: sympy.Basic) -> str:
        if e.is_Add:
            return " + ".join(self(a) for a in e.args)
        if e.is_Mul:
            narrow = [a for a in e.args if a.free_symbols <= self.columns]
            if len(narrow) < len(e.args) and any(a.is_Pow and a.exp.is_negative for a in narrow):  # a division for each row
                return " * ".join(self(a) for a in (sympy.Mul(*narrow), *(a for a in e.args if a not in narrow)))
            top = [a for a in e.args if not (a.is_Pow and a.exp == -1)]
            bottom = [a.base for a in e.args if a.is_Pow and a.exp == -1]
            text = " * ".join(self(a) for a in top) or "1.0"
            return f"({text}) / ({' * '.join(self(a) for a in bottom)})" if bottom else text
        if e.is_Pow:
            odd = 2 * abs(e.exp)
            if odd.is_Integer and odd % 2 and 1 < odd <= 8:
                return " * ".join([self(sympy.Pow(e.base, sympy.sign(e.exp) / 2))] * int(odd))
            return self._power(self(e.base), e.exp)
        name = type(e).__name__
        if name == "exp":
            return f"exp({self(e.args[0])})"
        if name in FUNCTIONS:
            return FUNCTIONS[name].triton.format(self(e.args[0]))
        if name in ("Max", "Min"):
            text = self(e.args[0])
            for a in e.args[1:]:
                text = f"tl.{name.lower()}imum({text}, {self(a)})"
            return text
        raise AssertionError(f"no Triton source for {e}")

    @staticmethod
    def _power(base: str, n: sympy.Expr) -> str:
        if n == sympy.Rational(1, 2):
            return f"tl.sqrt({base})"
        if n == -sympy.Rational(1, 2):
            return f"tl.rsqrt({base})"
        if n.is_Integer and 0 < abs(int(n)) <= 8:
            product = " * ".join([base] * abs(int(n)))
            return product if n > 0 else f"1.0 / ({product})"
        return f"tl.exp2(tl.log2({base}) * {float(n)!r})"


class Writer:
    """Writes the source of one kernel.

    Decay forms are one product where the decays of a chunk are mild, as they mostly are, and a series of halvings else.
    A chunks kernel with forms is therefore written twice: `fast` does the mild chunks, `slow` the others, one program
    for each sequence, which mostly ends at once. The `first` of them finds out, for its own decays and those that `later`
    ones have, and leaves flags. Other kernels (how = "") decide inside.
    """

    walks = False
    varies: tuple[str, ...] = "B", "T", "HV", "COUNT", "CHUNKS"
    """Sizes whose values change nothing in the code."""

    def __init__(self, program: Program, piece: Piece, how: str = "", origin: dict[int, int] | None = None,
                 later: Iterable[int] = ()) -> None:
        self.program, self.piece, self.kernel, self.split, self.how = program, piece, piece.kernel, piece.split, how
        self.origin: dict[int, int] = origin or {}  # of a value: its number in the program that the kernels were cut from
        self.judged: tuple[int, ...] = ()  # decays of which this kernel finds out whether they are mild
        self.name = f"{program.name}_{self.kernel.name}" + "_slow" * (how == "slow")
        ends = piece.roots(program)
        body = program.ancestors([*ends, *later], piece.known)
        self.part = (shares(program, body, self.split) or set()) if self.split and not piece.inner else set[int]()
        self.makes = tuple(program.index[i] for i in piece.makes)
        used = {a for op in body for a in op.args} | set(ends)
        self.takes = tuple(program.index[i] for i in sorted(piece.known & used))
        self.gates = gates(program)
        self.decays = tuple(sorted({op.args[-1] for op in body if op.kind in ("form", "form_gate")} | set(later)))
        carried = {c.name: c for c in program.carries}
        inside = {op.id for op in body}
        self.carries = tuple(carried[n] for n in self.kernel.carries)
        self.loads = tuple(c for c in program.carries if c.inp in inside and c.name not in self.kernel.carries)
        self.inputs = tuple(op for op in body if op.kind == "input" and op.attr("role") != "carry")
        ids = dict(program.outputs)
        self.stores = tuple((n, program.index[ids[n]]) for n in self.kernel.stores)
        self.ends = ends
        self.waiting: list[tuple[str | None, Op]] = [*self.stores, *((None, op) for op in self.makes)]
        self.groups = _group_forms(body)
        self.body = body
        self.phases = phases(program, body, piece.known, piece.split or "") if piece.inner else {op.id: 0 for op in body}
        self.scaled, self.traced = self._absorbed()
        self.lines: list[str] = []
        self.indent = 1
        self.suffix = ""  # of names in a loop over blocks
        self.done: set[int] = set()
        self.plain: dict[int, str] = {}  # the name of a value as it was loaded or computed
        self.cast: dict[tuple[int, str], str] = {}  # and of its other forms: float32, matrix operand, running sums

        self.mild: Writer | None = None
        if how in ("first", "fast"):
            other, new = mild(program)
            part = replace(piece, known=frozenset(new[i] for i in piece.known), makes=tuple(new[i] for i in piece.makes))
            self.mild = Writer(other, part, "mild", {j: i for i, j in reversed(new.items())})
            self.mild.lines = self.lines
            more = {self.mild.origin[op.id] for op in self.mild.takes} - {op.id for op in self.takes}
            self.takes += tuple(program.index[i] for i in sorted(more))
            if how == "first":
                self.mild.judged = tuple(sorted(new[i] for i in self.decays))

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    # -- values -------------------------------------------------------------------------------------------------------

    def v(self, i: int) -> str:
        return f"v{i}{self.suffix}"

    def _loaded(self, i: int) -> None:
        """v<i> exists as it lies in memory."""
        self.plain[i] = self.v(i)
        self.done.add(i)

    def _same(self, i: int, j: int) -> None:
        """The value i is the value j."""
        self.plain[i] = self.plain[j]
        for (k, form), name in list(self.cast.items()):
            if k == j:
                self.cast[i, form] = name

    def _form_of(self, i: int, form: str, text: str) -> str:
        name = self.plain[i]
        if (i, form) not in self.cast:
            others = [n for (k, f), n in self.cast.items() if f == form and self.plain[k] == name]
            if others:
                self.cast[i, form] = others[0]
            else:
                self.cast[i, form] = f"{form}{i}{self.suffix}"
                self.line(f"{form}{i}{self.suffix} = {text}")
        return self.cast[i, form]

    def f(self, i: int) -> str:
        """A value in float32."""
        if self.program.index[i].kind != "input" and self.plain[i][1:].startswith(str(i)) and i not in self.piece.known:
            return self.plain[i]
        return self._form_of(i, "f", f"{self.plain[i]}.to(tl.float32)")

    def h(self, i: int) -> str:
        """A value in the type of the matrix units' operands."""
        return self._form_of(i, "h", f"{self.plain[i]}.to(DT)")

    def gate(self, i: int) -> str:
        """A log decay, bounded below where it would only make a sum infinite: e^-128 is 0 in float32."""
        x = self.f(i)
        return self._form_of(i, "g", f"tl.maximum({x}, -128.0)") if i in self.gates else x

    def sums(self, i: int) -> str:
        """The running sum of a value over the rows, each row included."""
        x, source = self.gate(i), self.program.index[i]
        loaded = source if source.kind == "input" else self.program.index[source.args[0]] if source.kind == "valid" else None
        exact = loaded is not None and loaded.kind == "input" and self.plain[i] == self.plain.get(loaded.id)
        return self._form_of(i, "s", f"running({x}, DT, {self.plain[i]}.dtype == DT)" if exact else f"running({x}, DT)")

    # -- the frame ----------------------------------------------------------------------------------------------------

    def run(self) -> Emitted:
        loops = bool(self.carries) or self.how == "slow"
        self._prologue(loops)
        if loops:
            for c in self.carries:
                self._start(c)
            segment = self.kernel.part not in ("", "combine")
            first, last = ("low", "high") if segment else ("0", "count")
            order = f"{'low + high' if segment else 'count'} - 1 - step" if self.kernel.reverse(self.program) else "step"
            self.line(f"for step in range({f'{first}, ' * segment}{last}):")
            self.indent += 1
            self.line(f"chunk = {order}")
        self._chunk()
        if loops:
            self.indent = 1
            for c in self.carries if self.kernel.part != "apply" else ():
                self._end(c)
        self._close()
        source = self._signature() + "\n".join(self.lines) + "\n"
        partial = frozenset(n for n, op in self.stores if op.id in self.part)
        return Emitted(self.name, self.kernel, self.inputs, self.stores, partial, self.carries, self.loads, self.makes,
                       self.takes, self.split, self._block(), self.piece.inner, self.how, self.walks,
                       sum("1" not in self.program.index[c.inp].dims for c in self.carries), source)

    def _block(self) -> Callable[[int], int]:
        program, piece = self.program, self.piece
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

    def _memory(self, c: Carry) -> tuple[str, str, str]:
        """Offsets, mask and elements of a memory's tile."""
        return self._lies(self.program.index[c.inp].dims)

    def _lies(self, dims: Dims) -> tuple[str, str, str]:
        """Offsets, mask and elements of what lies in memory row by row, as all of one head has these dimensions."""
        r, k = dims
        parts = [f"r{r} * {k}" if k != "1" else f"r{r}"] * (r != "1") + [f"c{k}"] * (k != "1")
        offset = " + ".join(parts) or "tl.zeros([1, 1], tl.int32)"
        elements = f"{r} * {k}" if k != "1" else r
        return offset, self._pad((r, k)), elements

    def _start(self, c: Carry) -> None:
        offset, mask, elements = self._memory(c)
        r, k = self.program.index[c.inp].dims
        self.line(f"at_{c.name} = (unit.to(tl.int64) * HV + head) * ({elements})")
        if brief(self.program, c):
            return
        self.line(f"if HAS_{c.name}:")
        self.line(f"    m_{c.name} = tl.load(i_{c.name} + at_{c.name} + {offset}{_masked(mask)}).to(tl.float32)")
        self.line("else:")
        if c.name.endswith(FACTOR):
            one = f"{mask}{' & (rK == cV)' if self.kernel.part == 'factor' else ''}"
            self.line(f"    m_{c.name} = tl.where({one}, tl.full([{SIZE[r]}, {SIZE[k]}], 1.0, tl.float32), 0.0)")
        else:
            self.line(f"    m_{c.name} = tl.zeros([{SIZE[r]}, {SIZE[k]}], tl.float32)")

    def _end(self, c: Carry) -> None:
        offset, mask, _ = self._memory(c)
        value = self._where_it_starts(c, "count == 0") if brief(self.program, c) else f"m_{c.name}"
        self.line(f"tl.store(e_{c.name} + at_{c.name} + {offset}, {value}, mask={mask})")

    def _where_it_starts(self, c: Carry, here: str) -> str:
        """A brief memory, which is zero unless `here` holds."""
        offset, mask, _ = self._memory(c)
        there = f"({here})" + (f" & {mask}" if mask != "None" else " & tl.full([1, 1], True, tl.int1)")
        r, k = self.program.index[c.inp].dims
        self.line(f"m_{c.name} = tl.zeros([{SIZE[r]}, {SIZE[k]}], tl.float32)")
        self.line(f"if HAS_{c.name}:")
        self.line(f"    m_{c.name} = tl.load(i_{c.name} + at_{c.name} + {offset}, mask={there}, other=0.0).to(tl.float32)")
        return f"m_{c.name}"

    def _chunk(self) -> None:
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
        if self.how == "fast":
            w("if HOW == 0:")
            w("    if tl.load(_flags + saved) == 0:")
            w("        return")
        elif self.how == "slow":
            w("if tl.load(_flags + saved) == 0:")
            self.indent += 1
        if self.mild:
            w("if HOW == 0:")
            self.mild._continue(self)
            w("else:")
            self.indent += 1
        if self.carries:
            self._columns()
        self._values()
        for c in self.carries:
            if not brief(self.program, c):
                w(f"m_{c.name} = {self.f(c.out)}")

    def _continue(self, other: Writer) -> None:
        """Write the values in a branch of another kernel, from what is there."""
        self.indent = other.indent + 1
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
        self._values()
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

    def _take(self, op: Op) -> None:
        """Load a value that an earlier kernel made."""
        at, mask = self._tile(op)
        self.line(f"{self.v(op.id)} = tl.load({at}{_masked(mask)})")
        self._loaded(op.id)

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
            self.line(f"a{op.id} = tl.zeros([{SIZE[op.dims[0]]}, {SIZE[op.dims[1]]}], tl.float32)")
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
        self.suffix = f"_{phase}"
        self._indices(self.split or "")
        for op in self._ordered(body, ends):
            if op.id not in self.done:
                self._op(op)
            if op in sums:
                self.line(f"a{op.id} += {self.f(op.id)}")
                continue
            self.done.add(op.id)
            self._leave()
        for i in self.judged:
            if self.phases[i] == phase:
                self.line(f"fine = fine & mild({self.sums(i)}, DT).to(tl.int32)")
        self.indent -= 1
        self.suffix = ""
        left = self.done
        self.plain, self.cast, self.done = before
        self.done |= {i for i in left if self.phases.get(i) == phase}
        for op in sums:
            self.plain[op.id] = self.cast[op.id, "f"] = f"a{op.id}"
            self.done.add(op.id)
        self._leave()

    def _light(self, op: Op) -> bool:
        """Whether a value is only loaded."""
        return (op.kind == "input" and op.attr("role") == "token"
                or op.kind == "valid" and self._zero_behind(self.program.index[op.args[0]]))

    def _tile(self, op: Op) -> tuple[str, str]:
        """Addresses and mask of a value that one kernel makes for another: the chunk's tile, rows within it."""
        r, k = op.dims
        tile = f"t_{self.origin.get(op.id, op.id)}"
        if op.dims == ("T", "T"):
            return f"{tile} + saved * (C * C) + row * C + tl.arange(0, C)[None, :]", "None"
        rows = {"T": "C", "1": "1"}.get(r, r)
        inner = {"1": "1"}.get(k, k)
        at = f"{tile} + saved * ({rows} * {inner})"
        at += {"T": f" + row * {inner}", "1": ""}.get(r, f" + r{r} * {inner}")
        at += f" + c{k}" if k != "1" else " + tl.zeros([1, 1], tl.int32)" if r == "1" else ""
        return at, self._pad(op.dims)

    def _store(self, name: str, op: Op) -> None:
        r, k = op.dims
        col = f" + c{k}" if k != "1" else ""
        size = f" * {k}" if k != "1" else ""
        value = f"tl.broadcast_to({self.plain[op.id]}, [{SIZE[r]}, {SIZE[k]}])"
        masks = [f"inc{k}"] if k != "1" else []
        at = f"o_{name}"
        if op.id in self.part:  # every block stores its share
            at += f" + block.to(tl.int64) * {'B * T' if r == 'T' else 'CHUNKS'} * HV{size}"
        elif self.split and self.split != k and not self.piece.inner:  # every block computes it: the first stores it
            masks.append("(block == 0)")
        if r == "T":
            masks.insert(0, "rows")
            self.line(f"to_{name} = {at} + (((batch * T + begin + time) * HV + head){size})")
            self.line(f"tl.store(to_{name} + row * (HV{size}){col}, {value}.to(o_{name}.dtype.element_ty), "
                      f"mask={' & '.join(masks)})")
        else:
            place = f"{at} + saved{size}{col}" if col else f"{at} + saved + tl.zeros([1, 1], tl.int32)"
            mask = " & ".join(masks if col else ["tl.full([1, 1], True, tl.int1)", *masks])
            self.line(f"tl.store({place}, {value}.to(o_{name}.dtype.element_ty), mask={mask})")

    # -- operations ---------------------------------------------------------------------------------------------------

    def _pad(self, dims: Dims) -> str:
        """The mask of what is not padding in a tile of these dimensions."""
        parts = [f"inr{dims[0]}"] if dims[0] in NAMED else []
        parts += [f"inc{dims[1]}"] if dims[1] in NAMED else []
        return " & ".join(parts) or "None"

    def _keep(self, op: Op, dims: Iterable[str]) -> None:
        """Make the padding of a value zero along the dimensions along which it might not be."""
        for d in dict.fromkeys(dims):
            at = f"inr{d}" if op.dims[0] == d else f"inc{d}"
            name = self.v(op.id)
            self.line(f"{name} = keep({name}, {at}, PAD{d})")

    def _ordered(self, body: list[Op], ends: list[int]) -> list[Op]:
        """The body in a good order; the decay forms of a group come at once, at the place of the gate's."""
        return arranged(self.program, self.piece, body, ends, self.done, self.groups)

    def _absorbed(self) -> tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]:
        """Elementwise products that need not exist: s ⊙ X whose rows are contracted, where s can go to the other operand
        as well, and X ⊙ Y over (K, V) whose row sums are the diagonal of X Yᵀ."""
        users: dict[int, list[Op]] = {}
        for o in self.body:
            for a in o.args:
                users.setdefault(a, []).append(o)
        ends = set(self.piece.roots(self.program))
        scaled, traced = {}, {}
        for op in self.body:
            mine = users.get(op.id, [])
            if op.id in ends or not mine:
                continue
            found = factor(self.program.index, op.id)
            if found and found[0] not in self.part and all(o.kind == "matmul" and o.attr("ta") and "1" not in o.dims
                                                           and len(set(o.args)) == 2 and not o.attr("tb") for o in mine):
                scaled[op.id] = found
            if (op.kind == "map" and op.attr("expr") == operand(0) * operand(1) and op.dims[0] == self.split
                    and all(self.program.index[a].dims == op.dims for a in op.args) and "T" not in op.dims
                    and all(o.kind == "sum" and o.attr("axis") == 1 for o in mine)):
                traced[op.id] = op.args[0], op.args[1]
        return scaled, traced

    def _op(self, op: Op) -> None:
        if op.id in self.scaled or op.id in self.traced:
            return
        for i in [j for a in op.args if op.kind != "rename" for j in self.scaled.get(a) or self.traced.get(a) or (a,)]:
            if i in self.piece.known and i not in self.done:
                self._take(self.program.index[i])
        name = self.v(op.id)
        self.plain[op.id] = name
        match op.kind:
            case "input":
                self._load(op)
            case "map":
                self._map(op)
            case "expand":
                self.line(f"{name} = tl.broadcast_to({self.f(op.args[0])}, [{SIZE[op.dims[0]]}, {SIZE[op.dims[1]]}])")
                source = self.program.index[op.args[0]].dims
                self._keep(op, (d for d in op.dims if d in NAMED and d not in source))
            case "pairs":
                self.line(f"{name} = column({self.f(op.args[0])}, block) * {self.f(op.args[1])}")
            case "pairs_grad":
                d, other = map(self.f, op.args)
                text = f"tl.where(cK == block, tl.sum({d} * {other}, axis=1, keep_dims=True), 0.0)"
                self.line(f"{name} = {f'{d} * column({other}, block)' if op.attr('wrt') else text}")
            case "transpose":
                self.line(f"{name} = tl.trans({self.f(op.args[0])})")
            case "rename" if op.args[0] in self.piece.known:
                at, mask = self._tile(replace(self.program.index[op.args[0]], dims=op.dims))
                self.line(f"{name} = tl.load({at}{_masked(mask)}).to(tl.float32)")
            case "rename" if self.program.index[op.args[0]].kind == "input":
                self._load(replace(self.program.index[op.args[0]], id=op.id, dims=op.dims))
                self.line(f"{name} = {name}.to(tl.float32)")
            case "rename":
                self._same(op.id, op.args[0])
            case "matmul":
                self._matmul(op)
            case "sum" if op.args[0] in self.traced:
                x, y = self.traced[op.args[0]]
                text = f"tl.sum({self.f(x)} * {self.f(y)}, axis=1, keep_dims=True)"
                self.line(f"{name} = {text} if DT == tl.float32 else diagonal(dot({self.h(x)}, tl.trans({self.h(y)}), DT))")
            case "sum" if self.program.index[op.args[0]].dims == ("T", "1"):
                self.line(f"{name} = total({self.f(op.args[0])})")
            case "sum":
                self.line(f"{name} = tl.sum({self.f(op.args[0])}, axis={op.attr('axis')}, keep_dims=True)")
            case "max":
                mask, text = self._pad(self.program.index[op.args[0]].dims), self.f(op.args[0])
                text = f"tl.where({mask}, {text}, -float('inf'))" if mask != "None" else text
                self.line(f"{name} = tl.max({text}, axis={op.attr('axis')}, keep_dims=True)")
            case "valid":
                origin = self.program.index[op.args[0]]
                if self._zero_behind(origin) or self._only_stored(op):
                    self._same(op.id, op.args[0])
                else:
                    self.line(f"{name} = tl.where(rows, {self.f(op.args[0])}, 0.0)")
            case "cumsum":
                self.line(f"{name} = {self._cumsum(op)}")
            case "diagonal":
                self.line(f"{name} = diagonal({self.f(op.args[0])})")
            case "round":
                self.line(f"{name} = {self.h(op.args[0])}.to(tl.float32)")
            case "mask":
                self.line(f"{name} = lower({self.f(op.args[0])}, {op.attr('strict')})")
            case "between":
                self.line(f"{name} = between({self.gate(op.args[0])}, {op.attr('strict')}, {op.attr('before')}, DT)")
            case "between_grad":
                self.line(f"{name} = between_grad({self.f(op.args[0])}, {op.attr('before')}, DT)")
            case "inverse":
                self.line(f"{name} = inverse({self.f(op.args[0])}, LEVELS, DT)")
            case "form" | "form_gate":
                self._form(op)
            case _:
                raise AssertionError(f"no Triton source for {op.kind}")

    def _zero_behind(self, op: Op) -> bool:
        """Rows behind the sequence's end are zero already."""
        return op.kind == "valid" or op.kind == "input" and op.attr("role") == "token"

    def _only_stored(self, op: Op) -> bool:
        """Nothing reads these rows but a store, which leaves them out."""
        return not any(op.id in o.args for o in self.body) and all(op.id not in (c.inp, c.out) for c in self.carries)

    def _cumsum(self, op: Op) -> str:
        """Wide sums come from one running sum of each value where the inputs have 16 bits; else without a difference."""
        i = op.args[0]
        x, reverse, exclusive = self.gate(i), op.attr("reverse"), op.attr("exclusive")
        apart = f"cumsum({x}, {reverse}, {exclusive}, DT)"
        if op.dims[1] == "1":
            return apart
        if reverse and i not in self.gates:
            close = f"later({x}, DT)" + f" - {x}" * exclusive
        else:
            total = f"tl.sum({x}, axis=0, keep_dims=True)"
            near = {(False, False): "{s}", (False, True): "{s} - {x}", (True, False): "{t} - {s} + {x}", (True, True): "{t} - {s}"}
            close = near[reverse, exclusive].format(s=self.sums(i), x=x, t=total)
        if i in self.gates and self.how != "mild":
            close = f"tl.minimum({close}, 0.0)"
        return f"{apart} if DT == tl.float32 else {close}"

    def _load(self, op: Op) -> None:
        if op.attr("role") == "carry":
            c = next(c for c in self.loads if c.inp == op.id)
            offset, mask, elements = self._memory(c)
            if brief(self.program, c):
                self.line(f"at_{c.name} = (seq.to(tl.int64) * HV + head) * ({elements})")
                self.line(f"{self.v(op.id)} = {self._where_it_starts(c, 'chunk == (length + STEP - 1) // STEP - 1')}")
                return
            self.line(f"{self.v(op.id)} = tl.load(s_{c.name} + saved * ({elements}) + {offset}{_masked(mask)})")
        elif op.attr("role") == "head":
            n, k = op.attr("name"), op.dims[1]
            at, mask = (f" + c{k}", f", mask=inc{k}, other=0.0") if k != "1" else (" + tl.zeros([1, 1], tl.int32)", "")
            self.line(f"{self.v(op.id)} = tl.load(p_{n} + head * sh_{n}{at}{mask})")
        else:
            n, k = op.attr("name"), op.dims[1]
            col, mask = (f" + c{k}", f"rows & inc{k}") if k != "1" else ("", "rows")
            self.line(f"{self.v(op.id)} = tl.load(p_{n} + time.to(tl.int64) * st_{n} + row * st_{n}{col}, mask={mask}, other=0.0)")

    def _map(self, op: Op) -> None:
        expr = op.attr("expr")
        if any(a in self.part for a in op.args):  # what is no sum over the blocks counts once
            alone = expr.xreplace({operand(i): sympy.Integer(0) for i, a in enumerate(op.args) if a in self.part})
            if alone != 0:
                expr = sympy.expand(expr - alone) + sympy.Symbol("lead") * alone
        name = self.v(op.id)
        columns = [operand(n) for n, i in enumerate(op.args) if self.program.index[i].dims[1] == "1" != op.dims[1]]
        p = Expression(f"w{op.id}{self.suffix}", [self.f(i) for i in op.args], columns)
        p.known[sympy.Symbol("lead")] = "lead"
        text = p(expr)
        for line in p.lines:
            self.line(line)
        self.line(f"{name} = {text}" if op.args else f"{name} = tl.full([1, 1], {text}, tl.float32)")
        symbols = {operand(i): self.program.index[j].dims for i, j in enumerate(op.args)}
        self._keep(op, [d for d in op.dims if d in NAMED
                        and expr.xreplace({s: sympy.Integer(0) for s, dims in symbols.items() if d in dims}) != 0])
        zero = {s: sympy.Integer(0) for s, dims in symbols.items() if dims[0] == "T"}
        risky = any(q.exp.is_negative and q.base.xreplace(zero) == 0 for q in expr.atoms(sympy.Pow))
        if op.dims[0] == "T" and (risky or any(type(f).__name__ == "log" for f in expr.atoms(sympy.Function))):
            self.line(f"{name} = tl.where(rows, {name}, 0.0)")

    def _matmul(self, op: Op) -> None:
        dims = [self.program.index[i].dims for i in op.args]
        ta, tb = op.attr("ta"), op.attr("tb")
        inner = dims[0][0 if ta else 1]
        wide = inner != "1" and "1" not in op.dims
        factors = [self.scaled[i][0] for i in op.args if i in self.scaled]
        ids = [self.scaled[i][1] if i in self.scaled else i for i in op.args]
        exact = self.kernel.part == "combine"  # errors of a segment's start are errors of all that follows
        a = [(self.h if wide and not exact else self.f)(i) for i in ids]
        if factors:  # on the narrower operand
            narrow = 0 if self.program.index[ids[0]].dims[1] == self.split else 1
            scale = " * ".join([self.f(ids[narrow]), *map(self.f, factors)])
            key = "h" + "_".join(map(str, factors)) + "_"
            a[narrow] = self._form_of(ids[narrow], key, f"({scale}).to(DT)")
        left = f"tl.trans({a[0]})" if ta else a[0]
        right = f"tl.trans({a[1]})" if tb else a[1]
        if inner == "1":
            text = f"{left} * {right}"
        elif op.dims[1] == "1":
            column = f"tl.trans({a[1]})" if not tb else a[1]
            text = f"tl.sum({left} * {column}, axis=1, keep_dims=True)"
        elif op.dims[0] == "1":
            column = f"tl.trans({a[0]})" if not ta else a[0]
            text = f"tl.sum({column} * {right}, axis=0, keep_dims=True)"
        else:
            text = f"{'exact_dot' if exact else 'dot'}({left}, {right}, DT)"
        self.line(f"{self.v(op.id)} = {text}")

    def _form(self, op: Op) -> None:
        if op.id in self.groups:
            x, y = self.groups[op.id]
            ids, like = op.args, self.program.index[x]
        else:
            ids, like = op.args, op
        a = ", ".join(map(self.f, ids[:-1]))
        tail = f"{self.gate(ids[-1])}, {self.sums(ids[-1])}, {like.attr('strict')}, {like.attr('before')}, LEVELS, HOW, DT"
        if op.id in self.groups:
            names = ", ".join(map(self.v, (x, y, op.id)))
            self.line(f"{names} = form_all({a}, {tail})")
            for made in (x, y, op.id):
                self._loaded(made)
        elif op.kind == "form_gate":
            self.line(f"{self.v(op.id)} = form_gate({a}, {tail})")
        else:
            self.line(f"{self.v(op.id)} = form_{op.attr('wrt').lower()}({a}, {tail})")


def _masked(mask: str) -> str:
    """What a load says of elements that are left out."""
    return "" if mask == "None" else f", mask={mask}, other=0.0"


def _group_forms(body: list[Op]) -> dict[int, tuple[int, int]]:
    """By the decay form with respect to g: those with respect to X and Y of the same operands, to be computed with it."""
    forms = {(op.attr("wrt"), op.args, op.attr("before")): op for op in body if op.kind == "form"}
    out: dict[int, tuple[int, int]] = {}
    for op in body:
        if op.kind == "form_gate":
            p, x, y, g = op.args
            fx, fy = forms.get(("X", (p, y, g), op.attr("before"))), forms.get(("Y", (p, x, g), op.attr("before")))
            if fx and fy and fx.attr("strict") == fy.attr("strict"):
                out[op.id] = fx.id, fy.id
    return out
