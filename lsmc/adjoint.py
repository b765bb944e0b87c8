"""Chunk program → backward chunk program, by reverse-mode differentiation on the IR.

The result holds the forward operations (to be recomputed or loaded, as a schedule decides) and their adjoints. A
cotangent `d_<output>` is an input, a gradient `d_<input>` an output, and each carry M gets a carry dM that runs in
reverse time: its incoming value is the cotangent of the memory after the chunk.
"""

from __future__ import annotations

from collections import defaultdict

import sympy

from lsmc.ir import Builder, Carry, Op, Program, Scanned, operand, prune, verify


def differentiate(program: Program) -> Program:
    """The joint program of `program` and its adjoint: outputs are the gradients of every token and head input."""
    b = Builder(program.ops)
    cotangents: dict[int, list[int]] = defaultdict(list)
    reverse: dict[str, int] = {}
    for name, i in program.outputs:
        cotangents[i].append(b.input(f"d_{name}", "token", b.dims(i)))
    for c in program.carries:
        reverse[c.name] = b.input(f"d_{c.name}", "carry", b.dims(c.out))
        cotangents[c.out].append(reverse[c.name])
    for op in reversed(program.ops):
        if op.kind != "input" and cotangents[op.id]:
            for arg, d in _pullback(b, op, b.add(*cotangents[op.id])):
                cotangents[arg].append(d)

    def total(i: int) -> int:
        return b.add(*cotangents[i]) if cotangents[i] else b.expand(b.map(sympy.Integer(0)), b.dims(i))

    outputs = [(f"d_{op.attr('name')}", total(op.id)) for op in program.inputs("token", "head")]
    carries = [*program.carries,
               *(Carry(f"d_{c.name}", reverse[c.name], total(c.inp), reverse=True) for c in program.carries)]
    return verify(prune(Program(f"{program.name}_backward", tuple(b.ops), tuple(carries), tuple(outputs),
                                terms=program.terms)))


def _pullback(b: Builder, op: Op, d: int) -> list[tuple[int, int]]:
    """Pairs (operand, its cotangent) of one operation whose result has the cotangent `d`: all adjoint rules."""
    a = op.args
    match op.kind:
        case "map":
            n = len(a)
            pairs = []
            for i in range(n):
                partial = sympy.diff(op.attr("expr"), operand(i))
                if partial != 0:
                    wide = b.map(partial * operand(n), *a, d)
                    pairs.append((a[i], b.reduce_to(wide, b.dims(a[i]))))
            return pairs
        case "expand":
            return [(a[0], b.reduce_to(d, b.dims(a[0])))]
        case "transpose":
            return [(a[0], b.transpose(d))]
        case "sum":
            return [(a[0], b.expand(d, b.dims(a[0])))]
        case "max":
            return []
        case "cumsum":
            return [(a[0], b.cumsum(d, not op.attr("reverse"), op.attr("exclusive")))]
        case "mask":
            return [(a[0], b.mask(d, op.attr("strict")))]
        case "valid":
            return [(a[0], b.valid(d))]
        case "matmul":
            x, y = a
            ta, tb = op.attr("ta"), op.attr("tb")
            dx = b.matmul(y, d, ta=tb, tb=True) if ta else b.matmul(d, y, tb=not tb)
            dy = b.matmul(d, x, ta=True, tb=ta) if tb else b.matmul(x, d, ta=not ta)
            if b.ops[x].kind == "inverse" and not ta:  # U = (I + L)⁻¹ B: dB = (I + L)⁻ᵀ dU and dL = −dB Uᵀ
                return [(y, dy), (b.ops[x].args[0], b.mask(b.map(-operand(0), b.matmul(dy, op.id, tb=True)), strict=True))]
            return [(x, dx), (y, dy)]
        case "rename":
            return [(a[0], b.emit("rename", b.dims(a[0]), d))]
        case "pairs":
            return [(a[n], b.emit("pairs_grad", b.dims(a[n]), d, a[1 - n], wrt=n)) for n in (0, 1)]
        case "inverse":  # d(I + L)⁻¹ = −A dL A, kept strictly lower
            right = b.matmul(d, op.id, tb=True)
            return [(a[0], b.mask(b.map(-operand(0), b.matmul(op.id, right, ta=True)), strict=True))]
        case "between":
            w = b.mul(d, op.id)
            return [(a[0], b.emit("between_grad", ("T", "1"), w, before=op.attr("before")))]
        case "scan":
            rows = Scanned.of(op).rows
            return [(x, b.emit("scan_grad", b.dims(x), *a, d, wrt=n, **dict(op.attrs))) for n, x in enumerate(a) if x != rows]
        case "form":  # linear in each of P, X, Y: swap the cotangent in, take the partial by the operand
            wrt, strict, before, g = op.attr("wrt"), op.attr("strict"), op.attr("before"), a[-1]
            full = dict(zip([n for n in "PXY" if n != wrt], a[:-1], strict=True)) | {wrt: d}
            pairs = [(full[n], b.form(n, strict, before, g, **{m: i for m, i in full.items() if m != n}))
                     for n in "PXY" if n != wrt]
            gate = b.emit("form_gate", b.dims(g), full["P"], full["X"], full["Y"], g,
                          strict=strict, before=before)
            return [*pairs, (g, gate)]
    raise AssertionError(f"no adjoint rule for {op.kind}")
