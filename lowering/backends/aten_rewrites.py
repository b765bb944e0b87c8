"""Chunk program → the same program with fewer and larger ATen operations: `rewrite`, then `through` for each carry.

Decay forms become products with e^G and e^{−G}, which all forms on one decay share with the reads of the memory; matrix
products are associated so that existing ones are used; a carry is moved through the narrowest value it depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from lsmc import affine
from lsmc.affine import Affine
from lsmc.ir import Builder, Carry, Dims, LsmIRError, Op, Program, Scanned, operand, place

Factor = tuple[int, bool]
"""A matrix and whether it is transposed."""


class _Values(Builder):
    """A builder that can be asked what is there already."""

    def known(self, kind: str, dims: Dims, *args: int, **attrs: object) -> int | None:
        return self._seen.get((dims, kind, args, tuple(attrs.items())))

    def shared(self, expr: sympy.Expr, *args: int) -> int:
        """`map` in which functions of one operand that are there already are not evaluated again."""
        operands = list(args)
        for node in sorted(expr.atoms(sympy.Function), key=str):
            if node == expr or node.args[0] not in {operand(i) for i in range(len(args))}:
                continue
            arg = args[place(node.args[0])]
            alone = node.xreplace({node.args[0]: operand(0)})
            there = self.known("map", self.dims(arg), arg, expr=alone)
            if there is not None:
                expr = expr.xreplace({node: operand(len(operands))})
                operands.append(there)
        if isinstance(expr, sympy.Add) and all(a.is_Symbol for a in expr.args):
            return self.summed([operands[place(a)] for a in expr.args])
        return self.map(expr, *operands)

    def summed(self, terms: list[int]) -> int:
        """The sum of values, with running sums of one direction taken once, of the sum of what they sum."""
        alone, running = [], {False: list[int](), True: list[int]()}
        for i in terms:
            sums = self.ops[self.ops[i].args[0] if self.ops[i].kind == "shift" else i]
            if sums.kind != "cumsum" or sums.dims != self.dims(terms[0]):
                alone.append(i)
            else:
                running[sums.attr("reverse")].append(i)
        for reverse, same in running.items():
            if len(same) < 2:
                alone += same
                continue
            parts = [self.shift(self.ops[op.args[0]].args[0], reverse) if op.kind == "shift" else op.args[0]
                     for op in (self.ops[i] for i in same)]
            alone.append(self.cumsum(self.add(*parts), reverse=reverse))
        return self.add(*alone)

    def shift(self, a: int, reverse: bool) -> int:
        """Every row moved to the next one (in reverse: the one before): what makes a running sum exclusive."""
        return self.emit("shift", self.dims(a), a, reverse=reverse)

    def product(self, x: Factor, y: Factor) -> Factor | None:
        """x y, if it is there, as it stands or transposed."""
        for (p, tp), (q, tq), turned in ((x, y, False), ((y[0], not y[1]), (x[0], not x[1]), True)):
            dims = self.dims(p)[1 if tp else 0], self.dims(q)[0 if tq else 1]
            there = self.known("matmul", dims, p, q, ta=tp, tb=tq)
            if there is not None:
                return there, turned
        return None

    def factors(self, x: Factor) -> tuple[Factor, Factor] | None:
        """The two matrices whose product x is."""
        op = self.ops[x[0]]
        if op.kind != "matmul":
            return None
        p, q = (op.args[0], bool(op.attr("ta"))), (op.args[1], bool(op.attr("tb")))
        return ((q[0], not q[1]), (p[0], not p[1])) if x[1] else (p, q)

    def associated(self, x: Factor, y: Factor) -> int:
        """x y; where x = p q and q y is there, p (q y), and likewise for y: (d Bᵀ) Aᵀ = d (A B)ᵀ."""
        if (parts := self.factors(x)) and (there := self.product(parts[1], y)):
            x, y = parts[0], there
        elif (parts := self.factors(y)) and (there := self.product(x, parts[0])):
            x, y = there, parts[1]
        return self.matmul(x[0], y[0], ta=x[1], tb=y[1])

    def product_of(self, x: int) -> list[int]:
        """The values whose elementwise product x is."""
        op = self.ops[x]
        if op.kind != "map" or op.attr("expr") != sympy.Mul(*(operand(i) for i in range(len(op.args)))):
            return [x]
        return [f for a in op.args for f in self.product_of(a)]

    def turned(self, x: int, products: set[tuple[Factor, Factor]]) -> int:
        """A value with the row sums of x; where x = f P Q ⊙ Y and Y Qᵀ is in `products`, f P ⊙ Y Qᵀ: P Q is not needed."""
        factors = self.product_of(x)
        wide = [f for f in factors if self.dims(f) == self.dims(x)]
        narrow = [f for f in factors if f not in wide]
        if len(wide) == 2 and all(self.dims(f)[1] == "1" for f in narrow):
            for product, y in (wide, wide[::-1]):
                p, q = self.factors((product, False)) or ((x, True), (x, True))
                pair = (y, False), (q[0], not q[1])
                if not p[1] and pair in products:
                    return self.mul(*narrow, p[0], self.associated(*pair))
        return x


def rewrite(program: Program) -> Program:
    """The program with shared functions, associated products, and forms on precomputed decays.

    `partials` gives ∂F/∂X, ∂F/∂Y, ∂F/∂G of a form at once, `item` takes one of them.
    """
    b = _Values()
    new: dict[int, int] = {}
    together = _partials(program)
    users = [a for op in program.ops for a in op.args]
    for op in program.ops:
        args = tuple(new[a] for a in op.args)
        if op.kind == "map":
            new[op.id] = b.shared(op.attr("expr"), *args)
        elif op.kind == "matmul" and any(users.count(a) == 1 for a in op.args):
            new[op.id] = b.associated((args[0], op.attr("ta")), (args[1], op.attr("tb")))
        elif op.id in together:
            gate, place = together[op.id]
            operands = [new[a] for a in gate.args]
            decays = _decays(b, operands[-1], gate.attr("before"))
            scaled = b.mul(operands[1], decays[0]), b.mul(operands[2], decays[1])
            all_three = b.emit("partials", b.dims(operands[-1]), *operands[:-1], *scaled, operands[-1], *decays,
                               strict=gate.attr("strict"), before=gate.attr("before"))
            new[op.id] = b.emit("item", op.dims, all_three, place=place)
            if op is gate:
                new[op.id] = b.cumsum(new[op.id], reverse=True)
        elif op.kind == "sum" and op.attr("axis") == 1:
            products = {((new[x], bool(o.attr("ta"))), (new[y], bool(o.attr("tb")))) for o in program.ops if o.kind == "matmul"
                        for x, y in [o.args] if x in new and y in new}
            new[op.id] = b.sum(b.turned(args[0], products), 1)
        elif op.kind == "scan_grad":
            place = op.attr("wrt")
            attrs = {key: value for key, value in op.attrs if key != "wrt"}
            everything = b.emit("scan_grads", ("1", "1"), *args, **attrs)
            rows = Scanned.of(op).rows
            new[op.id] = b.emit("item", op.dims, everything, place=place - (place > op.args.index(rows)))
        elif op.kind == "between" and op.attr("strict"):
            both = b.emit("between", op.dims, *args, strict=False, before=op.attr("before"))
            new[op.id] = b.mask(both, strict=True)
        elif op.kind == "between_grad":
            new[op.id] = b.cumsum(b.emit("crossing", op.dims, *args, before=op.attr("before")), reverse=True)
        elif op.kind == "cumsum":
            new[op.id] = b.cumsum(args[0], reverse=op.attr("reverse"))
            if op.attr("exclusive"):
                new[op.id] = b.shift(new[op.id], op.attr("reverse"))
        elif op.kind == "form":
            (x, y, g), wrt = args, op.attr("wrt")
            decays = _decays(b, g, op.attr("before"))
            scaled = b.mul(x, decays[0]) if wrt == "P" else x, b.mul(y, decays[0 if wrt == "Y" else 1])
            new[op.id] = b.emit("form", op.dims, x, y, *scaled, g, *decays, wrt=wrt, strict=op.attr("strict"),
                                before=op.attr("before"))
        else:
            new[op.id] = b.emit(op.kind, op.dims, *args, **dict(op.attrs))
    return program.rebuilt(b.ops, new)


def _decays(b: _Values, g: int, before: bool) -> tuple[int, int, int]:
    """e^G (of the token before), e^{−G} where it can be a factor, and whether it cannot be somewhere."""
    here = b.exp(b.cumsum(g))
    up = b.exp(b.shift(b.cumsum(g), reverse=False)) if before else here
    return up, b.emit("down", b.dims(g), here), b.emit("far", ("1", "1"), here)


def _partials(program: Program) -> dict[int, tuple[Op, int]]:
    """Per operation of a triple ∂F/∂X, ∂F/∂Y, ∂F/∂g at one point: the gate's operation and the place in the triple."""
    forms = {(o.attr("wrt"), o.args, o.attr("before")): o.id for o in program.ops if o.kind == "form"}
    out: dict[int, tuple[Op, int]] = {}
    for gate in program.ops:
        if gate.kind == "form_gate":
            p, x, y, g = gate.args
            before = gate.attr("before")
            keys = ("X", (p, y, g), before), ("Y", (p, x, g), before)
            out |= {forms[key]: (gate, place) for place, key in enumerate(keys) if forms.get(key, -1) > max(gate.args)}
            out[gate.id] = (gate, 2)
    return out


@dataclass(frozen=True)
class Move:
    """One chunk's step of a memory: M ↦ scale ⊙ M + transition M + left x + constant with x = right M + inner."""

    scale: int | None
    transition: int | None
    constant: int | None
    left: int | None = None
    right: int | None = None
    inner: int | None = None
    x: int | None = None

    @property
    def parts(self) -> tuple[int | None, ...]:
        return self.scale, self.transition, self.constant, self.left, self.right, self.inner


def move(b: Builder, program: Program, carry: Carry) -> Move | None:
    """How `carry` moves, in values of `b`: through the value x of T rows that costs the fewest new products, if any; None
    where it does not move affinely.

    A K×K transition would be a product per chunk to make and a larger one to apply; x is needed afterwards as well.
    """
    best: tuple[int, Move, Builder] | None = None
    for op in program.ancestors([carry.out], [carry.inp]):
        if op.dims[0] != "T" or op.id == carry.inp or _mixed_beside(program, carry, op.id):
            continue
        trial = Builder(b.ops)
        if (found := _through(trial, program, carry, op.id)) is not None:
            products = sum(o.kind == "matmul" for o in trial.ops[len(b.ops):])
            if best is None or products < best[0]:
                best = products, found, trial
    if best is None:
        try:
            whole = affine.split(b, program, carry)
        except LsmIRError:
            return None
        return Move(whole.scale, whole.transition, whole.constant)
    for op in best[2].ops[len(b.ops):]:
        b.emit(op.kind, op.dims, *op.args, **dict(op.attrs))
    return best[1]


def _mixed_beside(program: Program, carry: Carry, x: int) -> bool:
    """Whether a product takes the memory to its next value past `x`: seen on the graph, before anything is worked out."""
    on = {carry.inp}
    for op in program.ancestors([carry.out], [x]):
        if op.id != carry.inp and not on.isdisjoint(op.args):
            if op.kind == "matmul":
                return True
            on.add(op.id)
    return False


def _through(b: Builder, program: Program, carry: Carry, x: int) -> Move | None:
    try:
        into = affine.dependence(b, program, x, carry.inp)
        beside = affine.dependence(b, program, carry.out, carry.inp, fixed=[x])
        if into.transition is None or into.scale is not None or beside.transition is not None:
            return None
        kept = Affine(None, None, None)
        if beside.constant is not None:
            whole = Program(program.name, tuple(b.ops), program.carries, program.outputs)
            kept = affine.dependence(b, whole, beside.constant, x, fixed=[carry.inp])
    except LsmIRError:
        return None
    if kept.transition is None or kept.scale is not None:
        return None
    return Move(beside.scale, None, kept.constant, kept.transition, into.transition, into.constant, x)
