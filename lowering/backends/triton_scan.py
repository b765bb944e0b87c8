"""Programs that scan inside a chunk → Triton source: kernels that walk through tokens with the memories in registers.

One program owns a sequence (or a chunk), a value head, all of K and BV columns of V: nothing sums over V on the way from an
input to an output, and gradients that do are left as a share of each block. Per token every value is a (K, 1), (1, V),
(K, V) or (1, 1) tile, computed where it is used.

    forward     M ← e^{log + i phase} ⊙ M + Σ kᵀv, token by token; queries read on the way
    backward    the memories of `GROUP` tokens, worked out from the one before the chunk, stay in registers while their
                cotangent walks back through them: W ← W + qᵀd, dk = W vᵀ, dv = k W, W ← e^{log − i phase} ⊙ W, d log = Re W̄ M

Gradients by the memory of several scans are one, since what they start from adds up: the first operation has it, others 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import sympy

from lsmc.expr import number
from lsmc.functions import exp
from lsmc.ir import READ_AT, Carry, Dims, Op, Program, Scanned, operand, place
from lsmc.lowering.backends.triton_cut import SCANS, Piece, contracts
from lsmc.lowering.backends.triton_emit import Writer
from lsmc.lowering.backends.triton_print import Expression

GROUP = 4
"""Tokens whose loads start together, and whose memories are in registers at once on the way back."""
LANE = 8
"""Entries of the memory that a thread holds."""
BESIDE = 2
"""Columns that a thread takes side by side."""
LOG2E = number(1.4426950408889634)
COLUMN = {"K": " + cK", "V": " + cV", "E": " + spot", "1": " + one"}
ENTRIES = {"K": " * K", "V": " * V", "E": " * K * V", "1": ""}
Values = tuple[dict[int, str], dict[tuple[int, str], str], set[int]]


def letters(dims: Dims) -> str:
    """The named dimensions of one token's part of a value: "K", "V", "E" for both, "1" for none."""
    return "E" if dims == ("K", "V") else next((d for d in dims if d in "KVE"), "1")


def shape(dims: Dims) -> str:
    return {"K": "[BK, 1]", "V": "[1, BV]", "E": "[BK, BV]", "1": "[1, 1]"}[letters(dims)]


def unwalkable(program: Program) -> str:
    """The rule by which kernels cannot walk through a forward program that scans, in words; empty where they can: each token is
    by itself but for one recurrence, from which all memories are, and nothing sums over V."""
    memories = {c.inp for c in program.carries}
    walks = "where entries of the memory decay each by a factor of its own, kernels go from token to token"
    scans = [op for op in program.ops if op.kind == "scan"]
    one = len({(s.pairs, s.memory, s.imaginary, s.fields, op.attr("log"), op.attr("phase"))
               for op in scans for s in (Scanned.of(op),)}) == 1
    if any("V" in contracts(program, op) for op in program.ops):
        return f"{walks} and share the columns of V, and an output here sums over V"
    for op in program.ops:
        over_rows = op.kind in ("sum", "max") and op.attr("axis") == 0
        if over_rows or op.kind not in ("input", "map", "expand", "valid", "sum", "max", "scan"):
            return f"{walks}, and {op.kind} is of a whole chunk"
    if not one or not {c.out for c in program.carries} <= {op.id for op in scans} or any(
            memories & set(op.args) for op in program.ops if op.kind != "scan"):
        return f"{walks} of one memory, and there is another beside it"
    return ""


def singular(expr: sympy.Expr) -> bool:
    """Whether an expression may not be finite where all its operands are 0."""
    zero = dict.fromkeys(expr.free_symbols, sympy.Integer(0))
    return any(q.exp.is_negative and q.base.xreplace(zero) == 0 for q in expr.atoms(sympy.Pow)) or any(
        type(f).__name__ == "log" for f in expr.atoms(sympy.Function))


class Walker(Writer):
    """Writes the source of one kernel that walks through tokens."""

    walks = True

    def __init__(self, program: Program, piece: Piece) -> None:
        super().__init__(program, piece)
        scans = [op for op in self.body if op.kind in SCANS]
        first = next(op for op in program.ops if op.kind in SCANS)
        self.of, self.log, self.phase = Scanned.of(first), first.attr("log"), first.attr("phase")
        self.turns = self.phase != 0
        self.reads = [op for op in scans if op.kind == "scan" and op.attr("at") in READ_AT]
        self.ends = [op.id for op in scans if op.kind == "scan" and op.attr("at") not in READ_AT]
        self.grads: dict[tuple[str, int], list[Op]] = {}
        for op in scans:
            if op.kind == "scan_grad":
                self.grads.setdefault(self._role(op), []).append(op)
        every = [op for ops in self.grads.values() for op in ops]
        self.asked = dict.fromkeys((op.args[0], op.args[-1], op.attr("at")) for op in every if op.attr("at") in READ_AT)
        self.starts = {op.attr("at"): op.args[-1] for op in every if op.attr("at") not in READ_AT}
        self.added = [op for op in self.body if op.kind == "sum" and op.attr("axis") == 0 and self._row(op.args[0])]
        self.remembers = bool(self.reads) or any(r in ("query", "field") for r, _ in self.grads)
        self.tokens = {i: self.program.index[i].dims[0] == "T" for i in self.of.fields}
        self.fixed = self._constants()

    # -- what there is ------------------------------------------------------------------------------------------------

    def _row(self, i: int) -> bool:
        return self.program.index[i].dims[0] == "T"

    def _role(self, op: Op) -> tuple[str, int]:
        """What of a scan a gradient is by: its query, a key or value, the memory or its imaginary part, a field."""
        of, at = Scanned.of(op), op.attr("wrt")
        at -= of.query is not None
        if at < 0:
            return "query", op.id  # each has its own
        after = at - len(of.pairs)
        return ("pair", at) if after < 0 else ("memory", after) if after < 1 + self.turns else ("field", after - 2 - self.turns)

    def _constants(self) -> list[Op]:
        """What is the same for all tokens."""
        out: dict[int, Op] = {}
        for op in self.body:
            outside = op.kind == "input" and op.attr("role") != "head" or op.kind in SCANS or op in self.added
            if "T" not in op.dims and not outside and all(a in out for a in op.args):
                out[op.id] = op
        return list(out.values())

    def _slopes(self, n: int) -> list[tuple[int, sympy.Expr]]:
        """By the field n: 0 and the slope of the log decay, 1 and that of the angle."""
        found = [(part, sympy.diff(expr, operand(n))) for part, expr in enumerate((self.log, self.phase))]
        return [(part, slope) for part, slope in found if slope != 0]

    def _later(self, n: int) -> bool:
        """The gradient by a field that is the same for all tokens, with slopes that are: they multiply the sum over tokens."""
        used = {place(s) for _, slope in self._slopes(n) for s in slope.free_symbols}
        return not any(self.tokens[self.of.fields[m]] for m in used)

    # -- the frame ----------------------------------------------------------------------------------------------------

    def _indices(self, d: str) -> None:
        if d == "V":
            super()._indices(d)
            self._spot()
        else:
            self.line("rK = tl.arange(0, BK)[:, None]")
            self.line("inrK = (rK < K) if PADK else tl.full([BK, 1], True, tl.int1)")
            self.line("cK, incK = rK, inrK")

    def _spot(self) -> None:
        """Where the entries of a memory lie."""
        self.line(f"spot = beside(rK * V + cV, {BESIDE} if V % {BESIDE} == 0 else 1)")

    def _memory(self, c: Carry) -> tuple[str, str, str]:
        return "spot", "inrK & incV", "K * V"

    def _prologue(self, scan: bool) -> None:
        self.line("one = tl.zeros([1, 1], tl.int32)")
        super()._prologue(scan)
        for name, op in self.waiting:
            if name is not None and self._row(op.id):
                at = "(batch * T + begin) * HV + head" + " + block.to(tl.int64) * B * T * HV" * (op.id in self.part)
                self.line(f"to_{name} = o_{name} + ({at}){ENTRIES[letters(op.dims)]}{COLUMN[letters(op.dims)]}")
        for op in self.fixed:
            self._need(op.id)
        if not any(self.tokens.values()):
            self._factor("always")
        for name, dims in self._totals():
            self.line(f"{name} = tl.zeros({shape(dims)}, tl.float32)")

    def _totals(self) -> Iterable[tuple[str, Dims]]:
        """What is summed over the tokens: sums of the program, and gradients by fields that all tokens share."""
        yield from ((f"a{op.id}", op.dims) for op in self.added)
        fields = [n for role, n in self.grads if role == "field" and not self.tokens[self.of.fields[n]]]
        yield from ((f"t{part}", ("K", "V")) for part in sorted({p for n in fields if self._later(n) for p, _ in self._slopes(n)}))
        yield from ((f"d{n}", ("K", "V")) for n in fields if not self._later(n))

    def _arrive(self) -> None:
        self._spot()
        self.line("time = chunk * C")
        self.line("left = length - time")
        self.line("saved = (place + chunk) * HV + head")
        for c in self.carries:
            if c.name in self.kernel.saves:
                offset, mask, elements = self._memory(c)
                self.line(f"tl.store(s_{c.name} + saved * ({elements}) + {offset}, "
                          f"m_{c.name}.to(s_{c.name}.dtype.element_ty), mask={mask})")
            self._is(c.inp, f"m_{c.name}")

    def _follow(self) -> None:
        self.fixed_values = self._values_now()
        (self._back if self.grads else self._forth)()
        for c in self.carries:
            self._need(c.out)
            self.line(f"m_{c.name} = {self.f(c.out)}")

    def _end(self, c: Carry) -> None:
        self._spot()
        super()._end(c)

    def _close(self) -> None:
        """Per-head gradients, once all tokens have been."""
        heads = [(name, op) for name, op in self.waiting if name is not None and not self._row(op.id)]
        if heads:
            self._spot()
            for op in self.added:
                self._is(op.id, f"a{op.id}")
            for (role, n), ops in self.grads.items():
                if role == "field" and not self.tokens[self.of.fields[n]]:
                    self._field_total(n, ops[0])
        for name, op in heads:
            self._need(op.id)
            self._put(name, op)

    # -- values -------------------------------------------------------------------------------------------------------

    def _is(self, i: int, name: str) -> None:
        self.plain[i] = self.cast[i, "f"] = name
        self.done.add(i)

    def _values_now(self) -> Values:
        return dict(self.plain), dict(self.cast), set(self.done)

    def _use(self, values: Values, suffix: str) -> None:
        (self.plain, self.cast, self.done), self.suffix = values, suffix

    def _need(self, i: int) -> str:
        """A value, in float32, and before it what it is made of."""
        if i not in self.done:
            op = self.program.index[i]
            for a in op.args:
                self._need(a)
            self._op(op)
            self.done.add(i)
        return self.f(i)

    def _op(self, op: Op) -> None:
        name = self.plain[op.id] = self.v(op.id)
        match op.kind:
            case "input":
                self._load(op)
            case "map":
                self._map(op)
            case "expand":
                self.line(f"{name} = tl.broadcast_to({self.f(op.args[0])}, {shape(op.dims)})")
                given = self.program.index[op.args[0]].dims
                self._keep(op, (d for d in op.dims if d in "KV" and d not in given))
            case "valid" if self._zero_behind(self.program.index[op.args[0]]):
                self._same(op.id, op.args[0])
            case "valid":
                self.line(f"{name} = tl.where(rows, {self.f(op.args[0])}, 0.0)")
            case "sum" | "max":
                (over,) = contracts(self.program, op) - {"1"}
                text, mask = self.f(op.args[0]), f"in{'r' if over == 'K' else 'c'}{over}"
                text = text if op.kind == "sum" else f"tl.where({mask}, {text}, -float('inf'))"
                self.line(f"{name} = tl.{op.kind}({text}, axis={int(over == 'V')}, keep_dims=True)")
            case _:
                raise AssertionError(f"no value for {op} here")

    def _load(self, op: Op) -> None:
        if op.attr("role") == "carry":
            super()._load(op)
            return
        n, of = op.attr("name"), letters(op.dims)
        token = op.attr("role") == "token"
        at = f"g_{n} + {self.suffix[1:]} * st_{n}" if token else f"p_{n} + head * sh_{n}{COLUMN[of]}"
        masks = ["rows"] * token + ["inrK"] * (of in "KE") + ["incV"] * (of in "VE")
        mask = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        self.line(f"{self.v(op.id)} = tl.load({at}{mask})")

    def _put(self, name: str, op: Op) -> None:
        """Store an output: of a token, or what a program made of all of its tokens."""
        of, row = letters(op.dims), self._row(op.id)
        masks = ["rows" if row else "(one == 0)"] + ["inrK"] * (of in "KE") + ["incV"] * (of in "VE")
        if op.id not in self.part and of in "K1":  # every block computes it: the first stores it
            masks.append("(block == 0)")
        at = f"g_{name} + {self.suffix[1:]} * (HV{ENTRIES[of]})"
        if not row:
            unit = "unit.to(tl.int64) * HV + head" + " + block.to(tl.int64) * (tl.num_programs(0) // BLOCKS)" * (op.id in self.part)
            at = f"o_{name} + ({unit}){ENTRIES[of]}{COLUMN[of]}"
        value = f"tl.broadcast_to({self.f(op.id)}, {shape(op.dims)}).to(o_{name}.dtype.element_ty)"
        self.line(f"tl.store({at}, {value}, mask={' & '.join(masks)})")

    # -- the recurrence -----------------------------------------------------------------------------------------------

    def _factor(self, name: str) -> None:
        """e^{log + i phase} of the row, 1 where there is no token."""
        fields = [self._need(i) for i in self.of.fields]
        p = Expression(f"w{name}", fields)
        decay = exp(self.log)
        real = f"power({p(LOG2E * self.log)})" if isinstance(decay, exp) else p(decay)
        parts = {name: real}
        if self.turns:
            cos, sin = p(sympy.cos(self.phase)), p(sympy.sin(self.phase))
            parts = {name: f"{real} * {cos}", f"{name}i": f"{real} * {sin}"}
        for line in p.lines:
            self.line(line)
        risky = singular(decay) or singular(self.phase)
        for n, text in parts.items():
            text = f"tl.where(inrK & incV, {text}, 0.0)" if risky else text
            self.line(f"{n} = {text}")

    def _absent(self) -> dict[sympy.Symbol, sympy.Expr]:
        """The fields where there is no token."""
        return {operand(n): sympy.Integer(0) for n, i in enumerate(self.of.fields) if self.tokens[i]}

    def _factors(self) -> tuple[str, str]:
        """The factor of the current row by name, real and imaginary part."""
        name = f"e{self.suffix}"
        always = not any(self.tokens.values())
        zero = self._absent()
        ones = not always and not singular(self.log) and self.log.xreplace(zero) == 0 == sympy.sympify(self.phase).xreplace(zero)
        if not always:
            self._factor(name)
        if not ones:
            given = "always" if always else name
            self.line(f"{name} = tl.where(rows, {given}, 1.0)")
            if self.turns:
                self.line(f"{name}i = tl.where(rows, {given}i, 0.0)")
        return name, f"{name}i"

    def _decayed(self, real: str, imaginary: str) -> tuple[str, str]:
        e, turn = f"e{self.suffix}", f"e{self.suffix}i"
        if not self.turns:
            return f"{e} * {real}", ""
        return f"{e} * {real} - {turn} * {imaginary}", f"{e} * {imaginary} + {turn} * {real}"

    def _step(self, into: str = "m") -> None:
        """The memory m after this row."""
        pairs = [self._need(i) for i in self.of.pairs]
        real, imaginary = self._decayed("m", "mi")
        if self.turns:
            self.line(f"mn = {real}")
            self.line(f"mi = {imaginary}")
            real = "mn"
        self.line(f"m = {' + '.join([real, *(f'{k} * {v}' for k, v in zip(pairs[::2], pairs[1::2], strict=True))])}")

    def _read(self, op: Op, memory: str) -> None:
        name = self.v(op.id)
        self.line(f"{name} = tl.sum({self._need(op.args[0])} * ({memory}), axis=0, keep_dims=True)")
        self._is(op.id, name)

    def _begin(self, wanted: Iterable[int], narrow: Iterable[int] = ()) -> list[Values]:
        """A group of rows: loads of what is `wanted`, and of what else is needed for `narrow` but has no K, start together;
        `_enter` gives a row's values."""
        loads = self._loads(wanted)
        loads += [op for op in self._loads(narrow) if letters(op.dims) in "V1" and op not in loads]
        self.line("first_row = (time + at).to(tl.int64)")
        for op in self.inputs:
            if op.attr("role") == "token":
                n = op.attr("name")
                self.line(f"g_{n} = p_{n} + first_row * st_{n}{COLUMN[letters(op.dims)]}")
        frames = []
        for j in range(GROUP):
            plain, cast, done = self.fixed_values
            self._use((dict(plain), dict(cast), set(done)), f"_{j}")
            self._there(j)
            for op in loads:
                self._load(op)
                self._loaded(op.id)
            frames.append(self._values_now())
        return frames

    def _places(self) -> None:
        """Where the outputs of a group of rows go."""
        for name, op in self.waiting:
            if name is not None and self._row(op.id):
                self.line(f"g_{name} = to_{name} + first_row * (HV{ENTRIES[letters(op.dims)]})")

    def _loads(self, wanted: Iterable[int]) -> list[Op]:
        return [op for op in self.program.ancestors(wanted, self.piece.known) if op.kind == "input" and op.attr("role") == "token"]

    def _forget(self) -> Values:
        """The values of a row but those with K: they take the most registers, and are loaded again."""
        wide = {i for i in self.done - self.fixed_values[2] if letters(self.program.index[i].dims) in "KE"}
        return ({i: n for i, n in self.plain.items() if i not in wide},
                {key: n for key, n in self.cast.items() if key[0] not in wide}, self.done - wide)

    def _there(self, j: int) -> None:
        self.line(f"rows = one + (at + {j}) < left")

    def _enter(self, j: int, frames: list[Values]) -> None:
        self._use(frames[j], f"_{j}")
        self._there(j)

    def _memory_before(self) -> None:
        """m before the chunk: in registers, or from where another kernel left it."""
        for name, i in zip(("m", "mi"), (self.of.memory, self.of.imaginary)):
            if i in self.piece.known:
                self.line(f"{name} = tl.load(t_{i} + saved * (K * V) + spot, mask=inrK & incV, other=0.0).to(tl.float32)")
            elif i is not None:
                self.line(f"{name} = {self._need(i)}")

    def _loop(self, text: str, body: Callable[[], None]) -> None:
        self.line(text)
        self.indent += 1
        body()
        self.indent -= 1

    def _forth(self) -> None:
        """Through the chunk: reads, outputs, and at the end the memories."""
        self._memory_before()

        def group() -> None:
            ends = [op.id for name, op in self.waiting if self._row(op.id)]
            frames = self._begin([*self.of.pairs, *self.of.fields, *ends, *(op.args[0] for op in self.added)])
            self._places()
            for j in range(GROUP):
                self._enter(j, frames)
                self._factors()
                for op in self.reads:
                    if op.attr("at") != "updated":
                        self._read(op, "m" if op.attr("at") == "previous" else self._decayed("m", "mi")[0])
                self._step()
                for op in self.reads:
                    if op.attr("at") == "updated":
                        self._read(op, "m")
                self._leave_row()

        self._loop(f"for at in range(0, C, {GROUP}):", group)
        self._use(self.fixed_values, "")
        for i in self.ends:
            self._is(i, "mi" if self.program.index[i].attr("at") == "imaginary" else "m")

    def _back(self) -> None:
        """From the end of the chunk to its start."""
        if self.remembers:
            self._memory_before()
            self.line("m0 = m")
            if self.turns:
                self.line("mi0 = mi")
        for name, of in (("w", "real"), ("wi", "imaginary"))[: 1 + self.turns]:
            start = self._need(self.starts[of]) if of in self.starts else "tl.zeros([BK, BV], tl.float32)"
            self.line(f"{name} = {start}")
        after = self._values_now()

        def group() -> None:
            self.line(f"low = C - {GROUP} - part")
            if self.remembers:
                self.line("m = m0")
                if self.turns:
                    self.line("mi = mi0")
                self._loop(f"for at in range(0, low, {GROUP}):", walk)
            self.line("at = low")
            ends = [op.id for name, op in self.waiting if self._row(op.id)]
            wanted = [*ends, *(op.args[0] for op in self.added), *(a for ops in self.grads.values() for op in ops for a in op.args)]
            frames = self._begin([*self.of.pairs, *self.of.fields] if self.remembers else self.of.fields, wanted)
            self._places()
            for j in range(GROUP):
                self._enter(j, frames)
                self._factors()
                if self.remembers:
                    self.line(f"b_{j} = m")
                    if self.turns:
                        self.line(f"b_{j}i = mi")
                    self._step()
                frames[j] = self._forget()
            for j in reversed(range(GROUP)):
                self._enter(j, frames)
                self._row_back(j)
                self._leave_row()

        def walk() -> None:
            frames = self._begin([*self.of.pairs, *self.of.fields])
            for j in range(GROUP):
                self._enter(j, frames)
                self._factors()
                self._step()

        self._loop(f"for part in range(0, C, {GROUP}):", group)
        self._use(after, "")
        for (role, n), ops in self.grads.items():
            if role == "memory":
                self._share(ops, "wi" if n else "w")

    def _share(self, ops: list[Op], name: str) -> None:
        """The first operation has the gradient, of whatever scan; others have none."""
        for op in ops:
            self._is(op.id, name)
            name = f"tl.zeros({shape(op.dims)}, tl.float32)"

    def _row_back(self, j: int) -> None:
        b, bi = f"b_{j}", f"b_{j}i"
        updated = f"b_{j + 1}" if j + 1 < GROUP else "m"
        memory = {"previous": b, "decayed": self._decayed(b, bi)[0], "updated": updated}
        for op in self.reads:
            self._read(op, memory[op.attr("at")])
        self._ask("updated", memory)
        values = [self._need(i) for i in self.of.pairs]
        for n in range(len(values)):
            if ops := self.grads.get(("pair", n)):
                name = f"p{n}_{j}"
                product = f"w * {values[n ^ 1]}"
                self.line(f"{name} = " + (f"tl.sum({product}, axis=0, keep_dims=True)" if n % 2 else f"across({product}, DT)"))
                self._share(ops, name)
        self._ask("decayed", memory)
        e, turn = f"e_{j}", f"e_{j}i"
        if self.turns:
            self.line(f"wn = {e} * w + {turn} * wi")
            self.line(f"wi = {e} * wi - {turn} * w")
            self.line("w = wn")
        else:
            self.line(f"w = {e} * w")
        fields = [n for role, n in self.grads if role == "field"]
        if fields:  # w̄ M before this token's decay: what the decay's logarithm gets
            self.line(f"l0_{j} = " + (f"w * {b} + wi * {bi}" if self.turns else f"w * {b}"))
            if self.turns:
                self.line(f"l1_{j} = wi * {b} - w * {bi}")
        for name, _ in self._totals():
            if name[0] == "t":
                self.line(f"{name} += tl.where(rows, l{name[1:]}_{j}, 0.0)")
        for n in fields:
            self._field(n, j)
        self._ask("previous", memory)

    def _ask(self, at: str, memory: dict[str, str]) -> None:
        """What queries that read the memory here add to its cotangent, and what they get."""
        for query, d, where in self.asked:
            if where == at:
                q, cotangent = self._need(query), self._need(d)
                self.line(f"w = w + {q} * {cotangent}")
        for (role, _), ops in self.grads.items():
            if role == "query" and ops[0].attr("at") == at:
                name = self.v(ops[0].id)
                self.line(f"{name} = across(({memory[at]}) * {self._need(ops[0].args[-1])}, DT)")
                self._is(ops[0].id, name)

    def _weighted(self, n: int, prefix: str, parts: str) -> str:
        """Σ slope · part, where not one of the two is 1, masked where slopes may be infinite."""
        slopes = self._slopes(n)
        p = Expression(prefix, [self._need(i) for i in self.of.fields])
        terms = [parts.format(part) if slope == 1 else f"{p(slope)} * {parts.format(part)}" for part, slope in slopes]
        for line in p.lines:
            self.line(line)
        text = " + ".join(terms)
        return f"tl.where(rows & inrK & incV, {text}, 0.0)" if any(singular(s) for _, s in slopes) else text

    def _field(self, n: int, j: int) -> None:
        ops, i = self.grads["field", n], self.of.fields[n]
        if not self.tokens[i]:
            if not self._later(n):
                text = self._weighted(n, f"u{n}_{j}", f"l{{}}_{j}")
                gone = all(slope.xreplace(self._absent()) == 0 for _, slope in self._slopes(n))
                self.line(f"d{n} += {text if gone else f'tl.where(rows, {text}, 0.0)'}")
            return
        name = f"d{n}_{j}"
        self.line(f"{name} = {self._weighted(n, f'u{n}_{j}', f'l{{}}_{j}')}")
        self._reduce(name, self.program.index[i].dims)
        self._share(ops, name)

    def _field_total(self, n: int, op: Op) -> None:
        name = f"d{n}"
        if self._later(n):
            self.line("rows = one == 0")
            self.line(f"{name} = {self._weighted(n, f'u{n}', 't{}')}")
        self._reduce(name, op.dims)
        self._share(self.grads["field", n], name)

    def _reduce(self, name: str, dims: Dims) -> None:
        """Sum a (K, V) tile to what a field has of it."""
        for axis, d in enumerate("KV"):
            if letters(dims) not in (d, "E"):
                self.line(f"{name} = tl.sum({name}, axis={axis}, keep_dims=True)")

    def _leave_row(self) -> None:
        for op in self.added:
            self.line(f"a{op.id} += tl.where(rows, {self._need(op.args[0])}, 0.0)")
        for name, op in self.waiting:
            if name is not None and self._row(op.id):
                self._need(op.id)
                self._put(name, op)


def writer(program: Program) -> type[Walker] | None:
    """Who writes the kernels of a program that goes from token to token."""
    return Walker if any(op.kind in SCANS for op in program.ops) else None


def walked(key: int, value: int) -> dict[str, int]:
    """How a program takes its part of the memory: `LANE` entries a thread, one warp where K allows it."""
    rows, columns = (1 << max(0, n - 1).bit_length() for n in (key, value))
    wide = min(columns, max(32 if rows > 16 else 16, 32 * LANE // rows))
    return {"BK": rows, "BV": wide, "num_warps": min(8, max(1, rows * wide // (32 * LANE))), "num_stages": 1}
