"""Scheduled program → Python source of ATen operations, for any device and float dtype; Inductor compiles it on CPUs.

All chunks are computed at once: each carry is split off as an affine map (`lsmc.affine`), one short scan gives the
memory before every chunk, and what depends on it follows in parallel again. 16-bit inputs are computed in float32.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Mapping
from functools import cached_property

import sympy
import torch
from sympy.printing.str import StrPrinter
from torch import Tensor

from lsmc import affine
from lsmc.functions import FUNCTIONS
from lsmc.ir import Builder, Carry, Op, Program
from lsmc.lowering.backends import aten_tiles
from lsmc.schedules import Schedule


class _TorchPrinter(StrPrinter):
    """Prints an elementwise expression as torch calls."""

    def _print_Function(self, expr: sympy.Function) -> str:
        return FUNCTIONS[type(expr).__name__].torch.format(f"({self._print(expr.args[0])})")

    _print_Abs = _print_tanh = _print_sin = _print_cos = _print_sign = _print_Function

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        base = self._print(expr.base)
        if expr.exp == -1:
            return f"torch.reciprocal({base})"
        if expr.exp == sympy.Rational(1, 2):
            return f"torch.sqrt({base})"
        if expr.exp == -sympy.Rational(1, 2):
            return f"torch.rsqrt({base})"
        return f"({base})**({self._print(expr.exp)})"

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return f"({expr.p}/{expr.q})"

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))


def expression(expr: sympy.Expr, names: list[str]) -> str:
    """Torch source of a map's expression with its operands named."""
    text = str(_TorchPrinter().doprint(expr.xreplace(
        {sympy.Symbol(f"x{i}", real=True): sympy.Symbol(n) for i, n in enumerate(names)})))
    return text if expr.free_symbols else f"unit * {text}"


class Compiled:
    """The ATen form of one program under one schedule: printable source and a callable on tensors."""

    def __init__(self, program: Program, schedule: Schedule) -> None:
        self.program, self.schedule = program, schedule
        self.source = _emit(program, schedule)
        self.hash = hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @cached_property
    def function(self) -> Callable[..., dict[str, Tensor]]:
        name = f"<lsmc aten {self.program.name} {self.hash}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        scope: dict[str, object] = {"torch": torch, **{n: getattr(aten_tiles, n) for n in (
            "Levels", "cumsum", "mask", "between", "between_grad", "inverse", "form", "form_grads")},
            "carry": torch.ops.lsmc.carry}
        exec(compile(self.source, name, "exec"), scope)
        return scope["run"]  # type: ignore[return-value]

    def launch(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor], chunk: int,
               cu_seqlens: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token outputs (B, T, HV, D), per-head outputs (HV, D), and the last value of every carry.

        inputs: (B, T, H or HV, D) or (B, T, HV) tokens and (HV,) or (HV, D) constants; memories: (B, HV, K, V), where
        each carry starts (for reversed ones, at the end of time), in the dtype of the computation.
        """
        start = next(iter(memories.values()))
        dtype, heads, device = start.dtype, start.shape[1], start.device
        tokens = next(inputs[op.attr("name")] for op in self.program.inputs("token"))
        grid = (aten_tiles.Dense(tokens.shape[1], chunk, device) if cu_seqlens is None
                else aten_tiles.Packed(tokens.shape[1], chunk, cu_seqlens))
        batch = tokens.shape[0]
        tiles: dict[str, Tensor] = {}
        for op in self.program.inputs("token", "head"):
            x = inputs[op.attr("name")].to(dtype)
            x = x[..., None] if op.dims[1] == "1" else x
            if op.attr("role") == "head":
                tiles[op.attr("name")] = x[None, :, None, None, :]
                continue
            if x.shape[2] != heads:
                x = x.repeat_interleave(heads // x.shape[2], dim=2)
            tiles[op.attr("name")] = grid.tile(x)
        unit = torch.ones((1,) * 5, dtype=dtype, device=device)
        sizes = {"T": chunk, "1": 1}
        for carry in self.program.carries:
            sizes |= zip(self.program.index[carry.inp].dims, memories[carry.name].shape[-2:], strict=True)

        def full(x: Tensor) -> Tensor:
            return x.expand(batch, heads, grid.n, *x.shape[-2:])

        raw = self.function(tiles, memories, grid, sizes, unit, full)
        outputs: dict[str, Tensor] = {}
        for name, i in self.program.outputs:
            r, c = self.program.index[i].dims
            tile = full(raw[name])
            if r == "T":
                out = grid.untile(tile)
            else:
                out = tile.sum((0, 2)).reshape(heads, -1)
            outputs[name] = out.squeeze(-1) if c == "1" else out
        ends = {c.name: raw[f"end_{c.name}"] for c in self.program.carries if f"end_{c.name}" in raw}
        return outputs, ends


def _emit(program: Program, schedule: Schedule) -> str:
    """The source of `run(tiles, start, grid, size, unit, full)`: statements in the schedule's order, values shared."""
    b = Builder(program.ops)
    order: list[tuple[str, int | Carry, affine.Affine | None]] = []
    carried = {c.name: c for c in program.carries}
    scanned: list[str] = []
    for kernel in schedule.kernels:
        for name in kernel.carries:
            order.append(("carry", carried[name], affine.split(b, program, carried[name])))
            scanned.append(name)
        order += [("store", i, None) for n, i in program.outputs if n in kernel.stores]
    names = {i: n for n, i in program.outputs}
    whole = Program(program.name, tuple(b.ops), program.carries, program.outputs)
    done = {c.inp for c in program.carries}
    made: set[str] = set()
    statements: list[tuple[str, str, tuple[int, ...]]] = []  # (target, source, values used)

    together = _shared_partials(whole)

    def compute(roots: list[int]) -> None:
        for op in whole.ancestors(roots, done):
            if op.id in done:
                continue
            if op.kind in ("form", "form_gate"):
                g, before = op.args[-1], op.attr("before")
                levels = f"l{g}_{int(before)}"
                if levels not in made:
                    statements.append((levels, f"Levels(v{g}, {before})", (g,)))
                    made.add(levels)
                if op.id in together:
                    gate, targets = together[op.id]
                    compute(list(gate.args))
                    args = ", ".join(f"v{i}" for i in gate.args[:3])
                    statements.append((", ".join(f"v{i}" if i >= 0 else "_" for i in targets),
                                       f"form_grads({args}, {levels}, strict={op.attr('strict')})", gate.args[:3]))
                    done.update(targets)
                    continue
                assert op.kind == "form", "a gate gradient comes with its two sisters"
                args = ", ".join(f"v{i}" for i in op.args[:-1])
                source = f"form({op.attr('wrt')!r}, {args}, {levels}, strict={op.attr('strict')})"
                statements.append((f"v{op.id}", source, op.args[:-1]))
            else:
                statements.append((f"v{op.id}", _source(op), op.args))
            done.add(op.id)

    for what, item, parts in order:
        if isinstance(item, Carry) and parts is not None:
            values = (parts.scale, parts.transition, parts.constant)
            compute([v for v in values if v is not None])
            args = ", ".join("None" if v is None else f"full(v{v})" for v in values)
            reset = "grid.reset_reverse" if item.reverse else "grid.reset_forward"
            statements.append((f"v{item.inp}, end_{item.name}",
                               f"carry({args}, start[{item.name!r}], {reset}, {item.reverse})",
                               tuple(v for v in values if v is not None)))
        elif what == "store" and isinstance(item, int):
            compute([item])
    last = {v: n for n, (_, _, used) in enumerate(statements) for v in used}
    keep = {i for _, i in program.outputs}
    lines = [f"# {line}" for line in str(schedule).splitlines()]
    lines += ["def run(tiles, start, grid, size, unit, full):"]
    for n, (target, source, used) in enumerate(statements):
        lines.append(f"    {target} = {source}")
        dead = sorted({f"v{v}" for v in used if last[v] == n and v not in keep})
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    out = [f"{n!r}: v{i}" for i, n in names.items()] if len(names) == len(program.outputs) else [
        f"{n!r}: v{i}" for n, i in program.outputs]
    out += [f"'end_{n}': end_{n}" for n in scanned]
    return "\n".join([*lines, f"    return {{{', '.join(out)}}}", ""])


def _shared_partials(program: Program) -> dict[int, tuple[Op, tuple[int, int, int]]]:
    """Per operation of a triple ∂F/∂X, ∂F/∂Y, ∂F/∂g at one point: the gate's operation and the triple's values."""
    forms = {(o.attr("wrt"), o.args, o.attr("before")): o.id for o in program.ops if o.kind == "form"}
    out: dict[int, tuple[Op, tuple[int, int, int]]] = {}
    for gate in program.ops:
        if gate.kind == "form_gate":
            p, x, y, g = gate.args
            before = gate.attr("before")
            dx, dy = forms.get(("X", (p, y, g), before), -1), forms.get(("Y", (p, x, g), before), -2)
            for i in (dx, dy, gate.id):
                out[i] = (gate, (dx, dy, gate.id))
    return out


def _source(op: Op) -> str:
    a = [f"v{i}" for i in op.args]
    match op.kind:
        case "input":
            return f"tiles[{op.attr('name')!r}]"
        case "map":
            return expression(op.attr("expr"), a)
        case "expand":
            return f"{a[0]}.expand(*{a[0]}.shape[:-2], size[{op.dims[0]!r}], size[{op.dims[1]!r}])"
        case "transpose":
            return f"{a[0]}.mT"
        case "matmul":
            return f"{a[0]}{'.mT' * op.attr('ta')} @ {a[1]}{'.mT' * op.attr('tb')}"
        case "sum":
            return f"{a[0]}.sum({op.attr('axis') - 2}, keepdim=True)"
        case "max":
            return f"{a[0]}.amax({op.attr('axis') - 2}, keepdim=True)"
        case "valid":
            return f"grid.valid({a[0]})"
        case "cumsum" | "mask" | "between" | "between_grad" | "inverse":
            return f"{op.kind}({', '.join([*a, *(f'{k}={v}' for k, v in op.attrs)])})"
    raise AssertionError(f"no ATen source for {op.kind}")
