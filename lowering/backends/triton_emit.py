"""Scheduled program → Triton source: one kernel for each kernel of the schedule.

A scan kernel owns one (sequence, value head, block of the split dimension) and loops over the sequence's chunks with the
memories in registers; a chunks kernel owns one chunk. The loop body is the kernel's operations in program order on float32
tiles of shape (C, BK), (C, BV), (BK, BV), … where extents of 1 broadcast. Extents that do not fill their block are padded
with zeros, and every operation keeps the padding zero, so that contractions need no masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from lsmc.functions import FUNCTIONS
from lsmc.ir import Carry, Dims, Op, Program
from lsmc.lowering.kernels import digest
from lsmc.schedules import Kernel, Schedule

TILES = ("keep", "dot", "exact_dot", "cumsum", "lower", "between", "between_grad", "inverse", "form_p", "form_x", "form_y",
         "form_gate", "form_all")
SIZE = {"T": "C", "K": "BK", "V": "BV", "1": "1"}


@dataclass(frozen=True)
class Emitted:
    """One kernel's source and what its launch passes, in this order: inputs, stores, carries, then sizes."""

    name: str
    kernel: Kernel
    inputs: tuple[Op, ...]
    stores: tuple[tuple[str, Op], ...]
    carries: tuple[Carry, ...]
    loads: tuple[Carry, ...]
    makes: tuple[Op, ...]
    takes: tuple[Op, ...]
    split: str | None
    products: bool
    source: str

    @property
    def scan(self) -> bool:
        return bool(self.carries)


def contracts(program: Program, op: Op) -> set[str]:
    """The named dimensions that an operation sums (or maximises) over."""
    dims = [program.index[a].dims for a in op.args]
    match op.kind:
        case "matmul":
            return {dims[0][0 if op.attr("ta") else 1]}
        case "sum" | "max":
            return {dims[0][op.attr("axis")]}
        case "form":
            return {dims[-1][1]} if op.attr("wrt") == "P" else set()
    return set()


def splittable(program: Program, kernel: Kernel, made: Iterable[int] = ()) -> str | None:
    """A dimension, V before K, along which programs can share the kernel's work: nothing in its body contracts it."""
    body = program.ancestors(_roots(program, kernel), made)
    summed = set[str]().union(*(contracts(program, op) for op in body))
    outputs = [program.index[i].dims for n, i in program.outputs if n in kernel.stores]
    outputs += [program.index[c.inp].dims for c in program.carries if c.name in kernel.carries]
    for dim in ("V", "K"):
        if any(dim in d for d in outputs) and dim not in summed:
            return dim
    return None


def _roots(program: Program, kernel: Kernel) -> list[int]:
    roots = [i for n, i in program.outputs if n in kernel.stores]
    return roots + [i for c in program.carries if c.name in kernel.carries for i in (c.out, c.inp)]


def costly(program: Program) -> set[int]:
    """Products over pairs of tokens that no memory enters and that are dear: inverses, decayed products along K or V."""
    memory = {op.id for op in program.inputs("carry")}
    for op in program.ops:
        if memory & set(op.args):
            memory.add(op.id)
    return {op.id for op in program.ops if op.id not in memory
            and (op.kind == "inverse" or op.kind == "form" and op.attr("wrt") == "P")}


def refine(program: Program, schedule: Schedule) -> tuple[tuple[Kernel, ...], frozenset[int]]:
    """The kernels to launch, and the values that a first kernel, over all chunks in parallel, makes for the others.

    Outputs of a chunks kernel part where one set contracts only V and another only K: each then splits over the other.
    """
    dear = costly(program)
    kernels: list[Kernel] = []
    for k in schedule.kernels:
        groups: dict[str | None, list[str]] = {}
        for n in k.stores:
            groups.setdefault(splittable(program, Kernel(k.name, (), (), (n,)), dear), []).append(n)
        if k.carries or len(groups) < 2:
            kernels.append(k)
        else:
            kernels += [Kernel(f"{k.name}_{d or 'whole'}", (), (), tuple(g)) for d, g in groups.items()]
    used = [{a for op in program.ancestors(_roots(program, k), dear) for a in op.args} & dear for k in kernels]
    if len(kernels) == 1 and not kernels[0].carries:
        return tuple(kernels), frozenset()
    return tuple(kernels), frozenset().union(*used)


def gates(program: Program) -> set[int]:
    """Values that are log decays: what decay forms and exponentials of running sums are made of."""
    out = {op.args[-1] for op in program.ops if op.kind in ("between", "form", "form_gate")}
    for op in program.ops:
        if op.kind == "map" and type(op.attr("expr")).__name__ == "exp":
            inner = program.index[op.args[0]]
            if inner.kind == "cumsum" and len(op.args) == 1:
                out.add(inner.args[0])
    return out


def emit(program: Program, schedule: Schedule) -> tuple[str, tuple[Emitted, ...]]:
    """The module's source and its kernels."""
    kernels, made = refine(program, schedule)
    first = [_Writer(program, Kernel("prepare", (), (), ()), made, make=True)] if made else []
    parts = [w.run() for w in (*first, *(_Writer(program, k, made) for k in kernels))]
    head = ['"""Generated from:', "", *str(program).replace("\\", "").splitlines(), "", *str(schedule).splitlines(), '"""', "",
            "import triton", "import triton.language as tl", "",
            "from lsmc.lowering.backends.triton_tiles import (", f"    {', '.join(TILES)},", ")", ""]
    text = "\n".join([*head, *(p.source for p in parts)])
    return f"# {digest(text)}\n{text}", tuple(parts)


class _Expression:
    """Prints elementwise expressions as statements on named values; equal subexpressions are computed once."""

    def __init__(self, prefix: str, names: list[str]) -> None:
        self.prefix, self.lines = prefix, list[str]()
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
            top = [a for a in e.args if not (a.is_Pow and a.exp == -1)]
            bottom = [a.base for a in e.args if a.is_Pow and a.exp == -1]
            text = " * ".join(self(a) for a in top) or "1.0"
            return f"({text}) / ({' * '.join(self(a) for a in bottom)})" if bottom else text
        if e.is_Pow:
            return self._power(self(e.base), e.exp)
        name = type(e).__name__
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


class _Writer:
    """Writes the source of one kernel."""

    def __init__(self, program: Program, kernel: Kernel, made: frozenset[int], make: bool = False) -> None:
        self.program, self.kernel = program, kernel
        self.name = f"{program.name}_{kernel.name}"
        self.body = program.ancestors(made) if make else program.ancestors(_roots(program, kernel), made)
        self.makes = tuple(program.index[i] for i in sorted(made)) if make else ()
        used = {a for op in self.body for a in op.args} | set(_roots(program, kernel))
        self.takes = () if make else tuple(program.index[i] for i in sorted(made & used))
        self.gates = gates(program)
        self.split = None if make else splittable(program, kernel, made)
        self.lines: list[str] = []
        self.indent = 1
        carried = {c.name: c for c in program.carries}
        inside = {op.id for op in self.body}
        self.loads = tuple(c for c in program.carries if c.inp in inside and c.name not in kernel.carries)
        self.carries = tuple(carried[n] for n in kernel.carries)
        self.inputs = tuple(op for op in self.body if op.kind == "input" and op.attr("role") != "carry")
        ids = dict(program.outputs)
        self.stores = tuple((n, program.index[ids[n]]) for n in kernel.stores)
        self.groups = self._group_forms()
        self.done: set[int] = set()

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    # -- the frame ----------------------------------------------------------------------------------------------------

    def run(self) -> Emitted:
        scan = bool(self.carries)
        self._prologue(scan)
        if scan:
            for c in self.carries:
                self._start(c)
            order = "count - 1 - step" if self.kernel.reverse(self.program) else "step"
            self.line("for step in range(count):")
            self.indent += 1
            self.line(f"chunk = {order}")
        self._chunk()
        if scan:
            self.indent -= 1
            for c in self.carries:
                self._end(c)
        source = self._signature() + "\n".join(self.lines) + "\n"
        return Emitted(self.name, self.kernel, self.inputs, self.stores, self.carries, self.loads,
                       self.makes, self.takes, self.split,
                       any(op.kind in ("form", "form_gate", "form_all", "inverse") for op in self.body), source)

    def _signature(self) -> str:
        args: list[str] = []
        for op in self.inputs:
            n = op.attr("name")
            args += [f"p_{n}", f"sb_{n}", f"st_{n}", f"sh_{n}", f"sg_{n}"] if op.attr("role") == "token" else [f"p_{n}", f"sh_{n}"]
        args += [f"o_{n}" for n, _ in self.stores]
        for c in self.carries:
            args += [f"i_{c.name}", f"e_{c.name}", *([f"s_{c.name}"] * (c.name in self.kernel.saves))]
        args += [f"s_{c.name}" for c in self.loads]
        args += [f"t_{op.id}" for op in (*self.makes, *self.takes)]
        args += ["cu", "first", "owner", "T", "HV", "COUNT", "C: tl.constexpr", "LEVELS: tl.constexpr", "K: tl.constexpr",
                 "V: tl.constexpr", "BK: tl.constexpr", "BV: tl.constexpr", "PACKED: tl.constexpr", "DT: tl.constexpr"]
        args += [f"HAS_{c.name}: tl.constexpr" for c in self.carries]
        rows, row = [], "    "
        for a in args:
            if len(row) + len(a) > 108:
                rows.append(row.rstrip())
                row = "    "
            row += a + ", "
        rows.append(row.rstrip())
        free = '["T", "HV", "COUNT"]'
        return f"\n\n@triton.jit(do_not_specialize={free})\ndef {self.name}(\n" + "\n".join(rows) + "\n):\n"

    def _prologue(self, scan: bool) -> None:
        blocks = {"K": "(K + BK - 1) // BK", "V": "(V + BV - 1) // BV", None: "1"}[self.split]
        w = self.line
        w("pid = tl.program_id(0)")
        w(f"BLOCKS: tl.constexpr = {blocks}")
        w("PADK: tl.constexpr = K % BK != 0")
        w("PADV: tl.constexpr = V % BV != 0")
        w("block = pid % BLOCKS")
        w("head = (pid // BLOCKS) % HV")
        w("unit = pid // (BLOCKS * HV)")
        for d in "KV":
            start = "block * B" + d + " + " if self.split == d else ""
            w(f"c{d} = {start}tl.arange(0, B{d})[None, :]")
            w(f"r{d} = {start}tl.arange(0, B{d})[:, None]")
        w("row = tl.arange(0, C)[:, None]")
        if scan:
            w("seq = unit")
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
            w("count = (length + C - 1) // C")
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
        for op in self.inputs:
            n = op.attr("name")
            if op.attr("role") == "token":
                w(f"p_{n} += batch * sb_{n} + begin * st_{n} + (head // sg_{n}).to(tl.int64) * sh_{n}")
            else:
                col = "" if op.dims[1] == "1" else f" + c{op.dims[1]}"
                tile = f"p_{n} + head * sh_{n}{col}" if col else f"p_{n} + head * sh_{n} + tl.zeros([1, 1], tl.int32)"
                w(f"v{op.id} = tl.load({tile}, mask={self._pad(op.dims) or 'None'}, other=0.0).to(tl.float32)"
                  if col else f"v{op.id} = tl.load({tile}).to(tl.float32)")
                self.done.add(op.id)

    def _memory(self, c: Carry) -> tuple[str, str, str]:
        """Offsets, mask and elements of a memory's tile."""
        r, k = self.program.index[c.inp].dims
        offset = f"r{r} * {k} + c{k}" if k != "1" else f"r{r}"
        elements = f"{r} * {k}" if k != "1" else r
        return offset, self._pad((r, k)), elements

    def _start(self, c: Carry) -> None:
        offset, mask, elements = self._memory(c)
        r, k = self.program.index[c.inp].dims
        self.line(f"at_{c.name} = (seq.to(tl.int64) * HV + head) * ({elements})")
        self.line(f"if HAS_{c.name}:")
        self.line(f"    m_{c.name} = tl.load(i_{c.name} + at_{c.name} + {offset}, mask={mask}, other=0.0).to(tl.float32)")
        self.line("else:")
        self.line(f"    m_{c.name} = tl.zeros([{SIZE[r]}, {SIZE[k]}], tl.float32)")

    def _end(self, c: Carry) -> None:
        offset, mask, _ = self._memory(c)
        self.line(f"tl.store(e_{c.name} + at_{c.name} + {offset}, m_{c.name}, mask={mask})")

    def _chunk(self) -> None:
        w = self.line
        w("time = chunk * C")
        w("rows = row < (length - time)")
        w("saved = (place + chunk) * HV + head")
        for c in self.carries:
            offset, mask, elements = self._memory(c)
            if c.name in self.kernel.saves:
                w(f"tl.store(s_{c.name} + saved * ({elements}) + {offset}, m_{c.name}, mask={mask})")
            w(f"v{c.inp} = m_{c.name}")
            self.done.add(c.inp)
        for c in self.loads:
            offset, mask, elements = self._memory(c)
            w(f"v{c.inp} = tl.load(s_{c.name} + saved * ({elements}) + {offset}, mask={mask}, other=0.0).to(tl.float32)")
            self.done.add(c.inp)
        tile = "saved * (C * C) + row * C + tl.arange(0, C)[None, :]"
        for op in self.takes:
            w(f"v{op.id} = tl.load(t_{op.id} + {tile}).to(tl.float32)")
            self.done.add(op.id)
        waiting = list(self.stores)
        for op in self.body:
            if op.id not in self.done:
                self._op(op)
                self.done.add(op.id)
            for name, value in [s for s in waiting if s[1].id in self.done]:
                self._store(name, value)  # as early as it can be: the registers are needed
                waiting.remove((name, value))
        for op in self.makes:
            w(f"tl.store(t_{op.id} + {tile}, v{op.id}.to(t_{op.id}.dtype.element_ty))")
        for c in self.carries:
            w(f"m_{c.name} = v{c.out}")

    def _store(self, name: str, op: Op) -> None:
        r, k = op.dims
        col = f" + c{k}" if k != "1" else ""
        size = f" * {k}" if k != "1" else ""
        shape = f"[{SIZE[r]}, {SIZE[k]}]"
        value = f"tl.broadcast_to(v{op.id}, {shape})"
        masks = [f"(c{k} < {k})"] if k != "1" else []
        if self.split and self.split != k:  # every block computes it: the first stores it
            masks.append("(block == 0)")
        if r == "T":
            masks.insert(0, "rows")
            self.line(f"to_{name} = o_{name} + (((batch * T + begin + time) * HV + head){size})")
            self.line(f"tl.store(to_{name} + row * (HV{size}){col}, {value}.to(o_{name}.dtype.element_ty), "
                      f"mask={' & '.join(masks)})")
        else:
            at = f"o_{name} + saved{size}{col}" if col else f"o_{name} + saved + tl.zeros([1, 1], tl.int32)"
            tail = f", mask={' & '.join(masks)}" if masks else ""
            if masks and not col:
                tail = f", mask={' & '.join(masks)} & (tl.zeros([1, 1], tl.int32) == 0)"
            self.line(f"tl.store({at}, {value}.to(o_{name}.dtype.element_ty){tail})")

    # -- operations ---------------------------------------------------------------------------------------------------

    def _pad(self, dims: Dims) -> str:
        """The mask of what is not padding in a tile of these dimensions."""
        parts = [f"(r{dims[0]} < {dims[0]})"] if dims[0] in "KV" else []
        parts += [f"(c{dims[1]} < {dims[1]})"] if dims[1] in "KV" else []
        return " & ".join(parts)

    def _keep(self, op: Op, dims: Iterable[str]) -> None:
        """Make the padding of a value zero along the dimensions along which it might not be."""
        for d in dict.fromkeys(dims):
            at = f"(r{d} < {d})" if op.dims[0] == d else f"(c{d} < {d})"
            self.line(f"v{op.id} = keep(v{op.id}, {at}, PAD{d})")

    def _group_forms(self) -> dict[int, tuple[int, int, int]]:
        """Decay forms with respect to X, Y and g of the same operands: they are computed together, by the first one."""
        forms = {(op.attr("wrt"), op.args, op.attr("before")): op for op in self.body if op.kind == "form"}
        order = {op.id: n for n, op in enumerate(self.body)}
        out: dict[int, tuple[int, int, int]] = {}
        for op in self.body:
            if op.kind == "form_gate":
                p, x, y, g = op.args
                fx, fy = forms.get(("X", (p, y, g), op.attr("before"))), forms.get(("Y", (p, x, g), op.attr("before")))
                if fx and fy and fx.attr("strict") == fy.attr("strict"):
                    ids = (fx.id, fy.id, op.id)
                    head = min(ids, key=lambda i: order[i])
                    if all(order.get(a, -1) < order[head] for a in op.args):  # those not in the body were made before
                        out[head] = ids
        return out

    def _op(self, op: Op) -> None:
        a = [f"v{i}" for i in op.args]
        name = f"v{op.id}"
        match op.kind:
            case "input":
                self._load(op)
            case "map":
                self._map(op, a)
            case "expand":
                self.line(f"{name} = tl.broadcast_to({a[0]}, [{SIZE[op.dims[0]]}, {SIZE[op.dims[1]]}])")
                source = self.program.index[op.args[0]].dims
                self._keep(op, (d for d in op.dims if d in "KV" and d not in source))
            case "transpose":
                self.line(f"{name} = tl.trans({a[0]})")
            case "matmul":
                self._matmul(op, a)
            case "sum":
                self.line(f"{name} = tl.sum({a[0]}, axis={op.attr('axis')}, keep_dims=True)")
            case "max":
                mask = self._pad(self.program.index[op.args[0]].dims)
                x = f"tl.where({mask}, {a[0]}, -float('inf'))" if mask else a[0]
                self.line(f"{name} = tl.max({x}, axis={op.attr('axis')}, keep_dims=True)")
            case "valid":
                self.line(f"{name} = tl.where(rows, {a[0]}, 0.0)")
            case "cumsum":
                x = self._gate(op.args[0])
                self.line(f"{name} = cumsum({x}, {op.attr('reverse')}, {op.attr('exclusive')})")
            case "mask":
                self.line(f"{name} = lower({a[0]}, {op.attr('strict')})")
            case "between":
                self.line(f"{name} = between({self._gate(op.args[0])}, {op.attr('strict')}, {op.attr('before')}, DT)")
            case "between_grad":
                self.line(f"{name} = between_grad({a[0]}, {op.attr('before')}, DT)")
            case "inverse":
                self.line(f"{name} = inverse({a[0]}, LEVELS, DT)")
            case "form" | "form_gate":
                self._form(op, a)
            case _:
                raise AssertionError(f"no Triton source for {op.kind}")

    def _gate(self, i: int) -> str:
        """A log decay, bounded below where it would only make a sum infinite: e^-128 is 0 in float32."""
        return f"tl.maximum(v{i}, -128.0)" if i in self.gates else f"v{i}"

    def _load(self, op: Op) -> None:
        n, k = op.attr("name"), op.dims[1]
        col, mask = (f" + c{k}", f"rows & (c{k} < {k})") if k != "1" else ("", "rows")
        self.line(f"v{op.id} = tl.load(p_{n} + time.to(tl.int64) * st_{n} + row * st_{n}{col}, mask={mask}, "
                  "other=0.0).to(tl.float32)")

    def _map(self, op: Op, names: list[str]) -> None:
        expr, p = op.attr("expr"), _Expression(f"w{op.id}", names)
        text = p(expr)
        for line in p.lines:
            self.line(line)
        self.line(f"v{op.id} = {text}" if op.args else f"v{op.id} = tl.full([1, 1], {text}, tl.float32)")
        symbols = {sympy.Symbol(f"x{i}", real=True): self.program.index[j].dims for i, j in enumerate(op.args)}
        self._keep(op, [d for d in op.dims if d in "KV"
                        and expr.xreplace({s: sympy.Integer(0) for s, dims in symbols.items() if d in dims}) != 0])
        zero = {s: sympy.Integer(0) for s in symbols}
        risky = any(q.exp.is_negative and q.base.xreplace(zero) == 0 for q in expr.atoms(sympy.Pow))
        if op.dims[0] == "T" and (risky or any(type(f).__name__ == "log" for f in expr.atoms(sympy.Function))):
            self.line(f"v{op.id} = tl.where(rows, v{op.id}, 0.0)")

    def _matmul(self, op: Op, a: list[str]) -> None:
        dims = [self.program.index[i].dims for i in op.args]
        ta, tb = op.attr("ta"), op.attr("tb")
        left = f"tl.trans({a[0]})" if ta else a[0]
        right = f"tl.trans({a[1]})" if tb else a[1]
        inner = dims[0][0 if ta else 1]
        if inner == "1":
            text = f"{left} * {right}"
        elif op.dims[1] == "1":
            column = f"tl.trans({a[1]})" if not tb else a[1]
            text = f"tl.sum({left} * {column}, axis=1, keep_dims=True)"
        elif op.dims[0] == "1":
            column = f"tl.trans({a[0]})" if not ta else a[0]
            text = f"tl.sum({column} * {right}, axis=0, keep_dims=True)"
        else:
            text = f"dot({left}, {right}, DT)"
        self.line(f"v{op.id} = {text}")

    def _form(self, op: Op, a: list[str]) -> None:
        g = self._gate(op.args[-1])
        before = op.attr("before")
        if op.id in self.groups:
            x, y, gate = self.groups[op.id]
            p, *rest = (f"v{i}" for i in self.program.index[gate].args[:-1])
            strict = self.program.index[x].attr("strict")
            self.line(f"v{x}, v{y}, v{gate} = form_all({p}, {', '.join(rest)}, {g}, {strict}, {before}, LEVELS, DT)")
            self.done |= {x, y, gate}
        elif op.kind == "form_gate":
            self.line(f"v{op.id} = form_gate({', '.join(a[:-1])}, {g}, {before}, LEVELS, DT)")
        else:
            wrt = op.attr("wrt").lower()
            self.line(f"v{op.id} = form_{wrt}({', '.join(a[:-1])}, {g}, {op.attr('strict')}, {before}, LEVELS, DT)")
