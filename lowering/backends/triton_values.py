"""The values of one kernel as statements: operations on tiles, and what is loaded and stored.

Tiles have the shapes (C, BK), (C, BV), (BK, BV), … where extents of 1 broadcast. What is loaded keeps its type and goes to the
matrix units as it is; what is computed is float32. Extents that do not fill their block are padded with zeros, and every operation
keeps the padding zero, so that contractions need no masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import sympy

from lsmc.factors import factor
from lsmc.ir import Carry, Dims, Op, Program, operand
from lsmc.lowering.backends.triton_cut import Piece, brief, shares
from lsmc.lowering.backends.triton_print import Expression
from lsmc.lowering.backends.triton_registers import EXTENT, area, crowded

NAMED = "KVF"
SIZE = {"T": "C", "K": "BK", "V": "BV", "F": "BK", "1": "1"}


def gates(program: Program) -> set[int]:
    """Values that are log decays: what decay forms and exponentials of running sums are made of."""
    out = {op.args[-1] for op in program.ops if op.kind in ("between", "form", "form_gate")}
    for op in program.ops:
        if op.kind == "map" and type(op.attr("expr")).__name__ == "exp":
            inner = program.index[op.args[0]]
            if inner.kind == "cumsum" and len(op.args) == 1:
                out.add(inner.args[0])
    return out


class Values:
    """Writes statements for the values of one piece; `done` are there already."""

    def __init__(self, program: Program, piece: Piece, how: str = "", origin: dict[int, int] | None = None,
                 later: Iterable[int] = ()) -> None:
        self.program, self.piece, self.kernel, self.split, self.how = program, piece, piece.kernel, piece.split, how
        self.origin: dict[int, int] = origin or {}  # of a value: its number in the program that the kernels were cut from
        ends = piece.roots(program)
        body = program.ancestors([*ends, *later], piece.known)
        self.part = (shares(program, body, self.split) or set()) if self.split and not piece.inner else set[int]()
        self.makes = tuple(program.index[i] for i in piece.makes)
        used = {a for op in body for a in op.args} | set(ends)
        self.takes = tuple(program.index[i] for i in sorted(piece.known & used))
        self.gates = gates(program)
        carried = {c.name: c for c in program.carries}
        inside = {op.id for op in body}
        self.carries = tuple(carried[n] for n in self.kernel.carries)
        self.stored = {c.inp for c in self.carries if c.name in self.kernel.saves}
        self.loads = tuple(c for c in program.carries if c.inp in inside and c.name not in self.kernel.carries)
        self.inputs = tuple(op for op in body if op.kind == "input" and op.attr("role") != "carry")
        ids = dict(program.outputs)
        self.stores = tuple((n, program.index[ids[n]]) for n in self.kernel.stores)
        self.ends = ends
        self.groups = _group_forms(body)
        self.body = body
        self.scaled, self.traced = self._absorbed()
        self.lines: list[str] = []
        self.indent = 1
        self.base = ""  # of names in a branch
        self.suffix = ""  # of names, in a branch and in a loop over blocks
        self.done: set[int] = set()
        self.plain: dict[int, str] = {}  # the name of a value as it was loaded or computed
        self.cast: dict[tuple[int, str], str] = {}  # and of its other forms: float32, matrix operand, running sums

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    # -- names and forms of values --------------------------------------------------------------------------------------

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
        apart = i in self.stored and crowded(self._loaded_bytes)
        return self._form_of(i, "h", f"again({self.plain[i]}.to(DT))" if apart else f"{self.plain[i]}.to(DT)")

    def _loaded_bytes(self, columns: int) -> int:
        """What one program loads for a chunk."""
        tokens = (op for op in self.inputs if op.attr("role") == "token")
        loads = (*tokens, *self.takes, *(self.program.index[c.inp] for c in self.loads))
        return 2 * area((op.dims for op in loads), EXTENT | {str(self.split): columns})

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

    # -- what lies in memory --------------------------------------------------------------------------------------------

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

    def _where_it_starts(self, c: Carry, here: str) -> str:
        """A brief memory, which is zero unless `here` holds."""
        offset, mask, _ = self._memory(c)
        there = f"({here})" + (f" & {mask}" if mask != "None" else " & tl.full([1, 1], True, tl.int1)")
        r, k = self.program.index[c.inp].dims
        self.line(f"m_{c.name} = tl.zeros([{SIZE[r]}, {SIZE[k]}], tl.float32)")
        self.line(f"if HAS_{c.name}:")
        self.line(f"    m_{c.name} = tl.load(i_{c.name} + at_{c.name} + {offset}, mask={there}, other=0.0).to(tl.float32)")
        return f"m_{c.name}"

    def _take(self, op: Op) -> None:
        """Load a value that an earlier kernel made."""
        at, mask = self._tile(op)
        self.line(f"{self.v(op.id)} = tl.load({at}{masked(mask)})")
        self._loaded(op.id)

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

    def _load(self, op: Op) -> None:
        if op.attr("role") == "carry":
            c = next(c for c in self.loads if c.inp == op.id)
            offset, mask, elements = self._memory(c)
            if brief(self.program, c):
                self.line(f"at_{c.name} = (seq.to(tl.int64) * HV + head) * ({elements})")
                self.line(f"{self.v(op.id)} = {self._where_it_starts(c, 'chunk == (length + STEP - 1) // STEP - 1')}")
                return
            self.line(f"{self.v(op.id)} = tl.load(s_{c.name} + saved * ({elements}) + {offset}{masked(mask)})")
        elif op.attr("role") == "head":
            n, k = op.attr("name"), op.dims[1]
            at, mask = (f" + c{k}", f", mask=inc{k}, other=0.0") if k != "1" else (" + tl.zeros([1, 1], tl.int32)", "")
            self.line(f"{self.v(op.id)} = tl.load(p_{n} + head * sh_{n}{at}{mask})")
        else:
            n, k = op.attr("name"), op.dims[1]
            col, mask = (f" + c{k}", f"rows & inc{k}") if k != "1" else ("", "rows")
            self.line(f"{self.v(op.id)} = tl.load(p_{n} + time.to(tl.int64) * st_{n} + row * st_{n}{col}, mask={mask}, other=0.0)")

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

    # -- operations -----------------------------------------------------------------------------------------------------

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
                self.line(f"{name} = tl.load({at}{masked(mask)}).to(tl.float32)")
            case "rename" if self.program.index[op.args[0]].kind == "input":
                self._load(replace(self.program.index[op.args[0]], id=op.id, dims=op.dims))
                self.line(f"{name} = {name}.to(tl.float32)")
            case "rename":
                self._same(op.id, op.args[0])
            case "matmul":
                self._matmul(op)
            case "sum" if op.attr("axis") == 0 and (there := self._counts(op.args[0])):
                self.line(f"{name} = tokens(tl.zeros([1, 1], tl.int32), {there}, True, False)")
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

    def _cumsum(self, op: Op) -> str:
        """Wide sums come from one running sum of each value where the inputs have 16 bits; else without a difference."""
        i = op.args[0]
        reverse, exclusive = op.attr("reverse"), op.attr("exclusive")
        if there := self._counts(i):
            return f"tokens(row, {there}, {reverse}, {exclusive})"
        x = self.gate(i)
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

    def _counts(self, i: int) -> str:
        """Where a value is 1 for each token there is, and no more: the first row of these and the one behind the last."""
        op, there = self.program.index[i], ("0", "C")
        if op.kind == "valid":
            op = self.program.index[op.args[0]]
            there = ("tl.maximum(-time, 0)" if self.program.counter else "0", "tl.minimum(length - time, STEP)")
        one = op.kind == "expand" and op.dims[0] == "T" and self.program.index[op.args[0]]
        return ", ".join(there) if one and not one.args and one.kind == "map" and one.attr("expr") == 1 else ""

    def _zero_behind(self, op: Op) -> bool:
        """Rows behind the sequence's end are zero already."""
        return op.kind == "valid" or op.kind == "input" and op.attr("role") == "token"

    def _only_stored(self, op: Op) -> bool:
        """Nothing reads these rows but a store, which leaves them out."""
        return not any(op.id in o.args for o in self.body) and all(op.id not in (c.inp, c.out) for c in self.carries)

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


def masked(mask: str) -> str:
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
