"""Chunk program → the recurrence that it came from: the program of a chunk that has one token.

One token is no tile: what a chunk sums over its tokens is the token's own, what it sums over earlier ones is nothing, and the
system that a delta rule solves is the identity. What is left is elementwise on vectors and on memories as they lie, with sums
over K (and over V, where norms take them):

    R = Σ_K x̃ ⊙ M₀    U = c + b R    O = Σ_K q̃ ⊙ M₀ + (q · k) U    M = e^g ⊙ M₀ + k U

so that all that is read of a memory is read of the same one, the memory before the token, and tokens follow each other through it
alone. A value over K is a column (K, 1), one over V a row (1, V), of both or of the entries of a memory (K, V), a number (1, 1).
"""

from __future__ import annotations

import functools

import sympy

from lsmc.functions import exp
from lsmc.ir import Builder, Carry, Dims, LsmIRError, Op, Program, Scanned, broadcast, operand, prune, verify

AXIS = {"K": 0, "V": 1}


def walkable(program: Program) -> bool:
    """Whether a chunk program has a recurrence of one token that stands for it."""
    try:
        recurrence(program)
    except LsmIRError:
        return False
    return True


@functools.cache
def recurrence(program: Program) -> Program:
    """`program`, a forward one, for chunks of one token.

    Raises `LsmIRError` where it keeps or takes tiles of a chunk, runs backward in time, presumes that its chunks begin somewhere (a
    memory that it leaves but does not read), or has rows of pairs.
    """
    read = {a for op in program.ops for a in op.args}
    if program.kept or program.taken or any(c.reverse or c.inp not in read for c in program.carries):
        raise LsmIRError(f"program {program.name} is not one of single tokens")
    made = _Token(program)
    new = {op.id: made.op(op) for op in program.ops}
    carries = tuple(Carry(c.name, new[c.inp], new[c.out]) for c in program.carries)
    outputs = tuple((n, new[i]) for n, i in program.outputs)
    return verify(prune(Program(program.name, tuple(made.b.ops), carries, outputs)))


def upright(dims: Dims) -> Dims:
    """The dimensions of a value of one token, whichever way it lay in the tiles of a chunk."""
    both = "E" in dims
    return "K" if both or "K" in dims else "1", "V" if both or "V" in dims else "1"


class _Token:
    """Values of one token, by the numbers of the chunk's."""

    def __init__(self, program: Program) -> None:
        self.program, self.b = program, Builder()
        self.new: dict[int, int] = {}
        self.number: dict[int, sympy.Expr] = {}
        """Which of the new values are the same number everywhere."""

    def op(self, op: Op) -> int:
        """The value of an operation, for values of its operands that are there; it has the dimensions `upright`."""
        if {"F"} & {*op.dims}:
            raise LsmIRError(f"{op}\nhas rows of pairs")
        self.new[op.id] = self._as(self._of(op, [self.new[a] for a in op.args]), upright(op.dims))
        return self.new[op.id]

    def _as(self, a: int, dims: Dims) -> int:
        made = self.b.expand(a, dims)
        if a in self.number:
            self.number[made] = self.number[a]
        return made

    def _constant(self, value: sympy.Expr | int) -> int:
        made = self.b.map(value)
        self.number[made] = sympy.sympify(value)
        return made

    def _map(self, expr: sympy.Expr, *args: int) -> int:
        """Elementwise, with what is a number put in."""
        expr = expr.xreplace({operand(i): self.number[a] for i, a in enumerate(args) if a in self.number})
        made = self.b.map(expr, *args) if expr.free_symbols else self._constant(expr)
        return self._as(made, broadcast(*(self.b.dims(a) for a in args)))

    def _times(self, *args: int) -> int:
        return self._map(sympy.Mul(*(operand(i) for i in range(len(args)))), *args)

    def _sum(self, d: str, a: int) -> int:
        """Over K or V; what a chunk sums over its tokens, or over nothing, is what it is."""
        return self.b.sum(a, AXIS[d]) if d in AXIS else a

    def _of(self, op: Op, args: list[int]) -> int:
        dims = [self.program.index[a].dims for a in op.args]
        match op.kind:
            case "input":
                return self.b.input(op.attr("name"), op.attr("role"), upright(op.dims))
            case "map":
                return self._map(op.attr("expr"), *args)
            case "expand" | "transpose" | "valid":
                return args[0]
            case "rename":
                return self._renamed(args[0], op.dims[1])
            case "sum":
                return self._sum(dims[0][op.attr("axis")], args[0])
            case "max" if (d := dims[0][op.attr("axis")]) in AXIS:
                r, c = self.b.dims(args[0])
                return self.b.emit("max", ("1", c) if d == "K" else (r, "1"), args[0], axis=AXIS[d])
            case "matmul":
                inner = dims[0][0 if op.attr("ta") else 1]
                named = [d for d in (inner, *op.dims) if d in AXIS]
                if len({*named}) < len(named):
                    raise LsmIRError(f"{op}\nmixes rows")
                return self._sum(inner, self._times(*args))
            case "cumsum":
                return self._constant(0) if op.attr("exclusive") else args[0]
            case "mask":
                return self._constant(0) if op.attr("strict") else args[0]
            case "between":
                return self._constant(int(not op.attr("strict")))
            case "inverse":
                return self._constant(1)
            case "form":
                if op.attr("strict"):
                    return self._constant(0)
                return self._sum(dims[-1][1] if op.attr("wrt") == "P" else "1", self._times(*args[:-1]))
            case "scan":
                return self._scanned(op, Scanned.of(op))
        raise LsmIRError(f"{op}\nhas no form for one token")

    def _renamed(self, a: int, to: str) -> int:
        """A column over K as a row over V, or the other way: K = V."""
        if to == "V":
            row = self.b.transpose(a)
            return self.b.emit("rename", ("1", "V"), row)
        row = self.b.emit("rename", ("1", "K"), a)
        return self.b.transpose(row)

    def _scanned(self, op: Op, of: Scanned) -> int:
        """What a token reads of a memory each of whose entries decays, or turns; or a part of the memory after it."""
        fields, at, phase = [self.new[i] for i in of.fields], op.attr("at"), sympy.sympify(op.attr("phase"))
        real, decay = self.new[of.memory], self._map(exp(op.attr("log")), *fields)
        if at == "previous":
            memory = real
        elif phase == 0:
            memory = self._times(decay, real)
        else:
            assert of.imaginary is not None
            parts = real, self.new[of.imaginary]
            cos, sin = self._map(sympy.cos(phase), *fields), self._map(sympy.sin(phase), *fields)
            first, second, sign = (*parts[::-1], 1) if at == "imaginary" else (*parts, -1)
            turned = operand(0) * (operand(1) * operand(2) + sign * operand(3) * operand(4))
            memory = self._map(turned, decay, cos, first, sin, second)
        if at in ("updated", "real"):
            written = (self._times(self.new[k], self.new[v]) for k, v in zip(of.pairs[::2], of.pairs[1::2], strict=True))
            memory = self.b.add(memory, *written)
        return memory if of.query is None else self._sum("K", self._times(self.new[of.query], memory))


__all__ = ["recurrence", "upright", "walkable"]
