"""Scheduled program → Python source of ATen operations, for any device and float dtype; Inductor compiles it on CPUs.

All chunks are computed at once: each carry is split off as an affine map (`lsmc.affine`), one short scan gives the
memory before every chunk, and what depends on it follows in parallel again. 16-bit inputs are computed in float32.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import sympy
import torch
from sympy.printing.str import StrPrinter
from torch import Tensor

from lsmc.functions import FUNCTIONS
from lsmc.ir import Builder, Carry, Dims, Op, Program, Scanned, operand
from lsmc.keep import cotangents
from lsmc.lowering.backends import aten_carry, aten_scan, aten_tiles
from lsmc.lowering.backends.aten_rewrites import Move, move, rewrite
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


_SIZE = {"1": 0, "T": 1, "K": 2, "V": 2, "F": 3, "E": 3}


def expression(expr: sympy.Expr, names: list[str], dims: list[Dims]) -> str:
    """Torch source of a map's expression with its operands named.

    Products start with the smallest operands, and with a sign or number, so that few passes go over whole tiles.
    """
    size = {f"x{i}": sum(_SIZE[d] for d in dims[i]) for i in range(len(names))}
    printed = _TorchPrinter()

    # exact numbers whose parts are no machine integers: what decimals become when they are multiplied
    expr = expr.xreplace({n: sympy.Float(n) for n in expr.atoms(sympy.Rational) if max(abs(n.p), n.q) >= 2**53})

    def text(e: sympy.Expr) -> str:
        return str(printed.doprint(e.xreplace({operand(i): sympy.Symbol(n) for i, n in enumerate(names)})))

    def weight(e: sympy.Expr) -> int:
        return max((size[str(s)] for s in e.free_symbols), default=-1)

    if not expr.free_symbols:
        return f"unit * {text(expr)}"
    if isinstance(expr, sympy.Add) and len(expr.args) > 2 and all(a.is_Symbol for a in expr.args):
        return f"add({', '.join(text(a) for a in sorted(expr.args, key=weight, reverse=True))})"
    if isinstance(expr, sympy.Mul):
        factors = [f"({text(a)})" if a.is_Add or a.is_number else text(a) for a in sorted(expr.args, key=weight)]
        return " * ".join(factors)
    if isinstance(expr, sympy.Add) and len(expr.args) == 2:
        plain = [a for a in expr.args if a.is_Symbol]
        products = [a for a in expr.args if isinstance(a, sympy.Mul) and len(a.args) == 2 and all(f.is_Symbol for f in a.args)]
        if plain and products:
            return f"torch.addcmul({text(plain[0])}, {', '.join(text(f) for f in products[0].args)})"
    return text(expr)


class Compiled:
    """The ATen form of one program under one schedule: printable source and a callable on tensors."""

    fresh = False
    needs_memories = True

    def __init__(self, program: Program, schedule: Schedule) -> None:
        self.program, self.schedule = program, schedule
        self.keeps = tuple(n for n, _ in program.kept)
        self.source = _emit(program, schedule)
        self.hash = hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @cached_property
    def function(self) -> Callable[..., dict[str, Tensor]]:
        name = f"<lsmc aten {self.program.name} {self.hash}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        scope: dict[str, object] = {"torch": torch, "carry": aten_carry.carry, "together": aten_carry.together,
                                    **aten_tiles.NAMES, **aten_scan.NAMES}
        exec(compile(self.source, name, "exec"), scope)
        return scope["run"]  # type: ignore[return-value]

    def recorded(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor], chunk: int) -> None:
        """Nothing is recorded."""

    def launch(self, inputs: Mapping[str, Tensor], memories: Mapping[str, Tensor], chunk: int,
               cu_seqlens: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token outputs (B, T, HV, D), per-head outputs (HV, D), what is kept (`keeps`), and the last value of every carry.

        inputs: (B, T, H or HV, D) or (B, T, HV) tokens, (HV,) or (HV, D) constants, what was kept; memories: (B, HV, K, V), where
        each carry starts (for reversed ones, at the end of time), in the dtype of the computation.
        """
        start = next(iter(memories.values()))
        dtype, heads, device = start.dtype, start.shape[1], start.device
        tokens = next(inputs[op.attr("name")] for op in self.program.inputs("token"))
        lead, counter = None, self.program.counter
        if counter is not None and chunk > 1:
            sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            seen = memories[counter][:, 0, 0, 0] if counter in memories else start.new_zeros(sequences)  # the same in all heads
            lead = seen.round().long() % chunk
        grid = (aten_tiles.Packed(tokens.shape[1], chunk, cu_seqlens, lead) if cu_seqlens is not None
                else aten_tiles.Dense(tokens.shape[1], chunk, device) if lead is None
                else aten_tiles.Shifted(tokens.shape[1], chunk, lead))
        batch = tokens.shape[0]
        tiles: dict[str, Tensor] = {}
        sizes = {"T": chunk, "1": 1}
        for op in self.program.inputs("token", "head"):
            x = inputs[op.attr("name")].to(dtype)
            x = x[..., None] if op.dims[1] == "1" else x
            sizes |= {"K": x.shape[-2], "V": x.shape[-1]} if op.dims[1] == "E" else {op.dims[1]: x.shape[-1]}
            x = x.flatten(-2) if op.dims[1] == "E" else x
            if op.attr("role") == "head":
                tiles[op.attr("name")] = x[None, None] if op.dims[0] == "K" else x[None, None, :, None, :]
                continue
            if x.shape[2] != heads:
                x = x.repeat_interleave(heads // x.shape[2], dim=2)
            tiles[op.attr("name")] = grid.tile(x)
        tiles |= {n: inputs[n] for n, _ in self.program.taken}
        unit = torch.ones((1,) * 5, dtype=dtype, device=device)
        for carry in self.program.carries:
            sizes |= zip(self.program.index[carry.inp].dims, memories[carry.name].shape[-2:], strict=True)
        sizes |= {"1": 1, "F": sizes["K"] ** 2} if "K" in sizes else {"1": 1}

        def full(x: Tensor) -> Tensor:
            return x.expand(grid.n, batch, heads, *x.shape[-2:])

        raw = self.function(tiles, memories, grid, sizes, unit, full)
        outputs: dict[str, Tensor] = {}
        for name, i in self.program.outputs:
            r, c = self.program.index[i].dims
            tile = full(raw[name])
            if c == "1":  # before tokens are cut off: a tracer asks of 4 dimensions whether any T makes them contiguous
                tile = tile.squeeze(-1)
            outputs[name] = grid.untile(tile) if r == "T" else tile.sum((0, 1)) if r == "K" else tile.sum((0, 1)).squeeze(1)
        outputs |= {n: raw[n].contiguous() for n in self.keeps}
        ends = {c.name: raw[f"end_{c.name}"] for c in self.program.carries if f"end_{c.name}" in raw}
        return outputs, ends


def _emit(program: Program, schedule: Schedule) -> str:
    """The source of `run(tiles, start, grid, size, unit, full)`: statements in the schedule's order, values shared."""
    program = rewrite(program)
    b = Builder(program.ops)
    order: list[int | tuple[Carry, Move] | tuple[Carry, ...]] = []
    carried = {c.name: c for c in program.carries}
    results = dict(program.outputs)
    for kernel in (k for k in schedule.kernels if k.whole):  # all chunks go at once here: nothing is to be cut into segments
        carries = tuple(carried[name] for name in kernel.carries)
        apart = [c for c in carries if not _scanned(program, c) and not any(c in _needed_by(program, d, carries) for d in carries)
                 and not _needed_by(program, c, carries)]
        moves = {c: how for c in apart if (how := move(b, program, c)) is not None}
        order += moves.items()
        if bound := tuple(c for c in carries if c not in moves):
            order.append(bound)
        order += [results[name] for name in results if name in kernel.stores]
    order += [i for _, i in program.kept]
    results |= program.kept
    whole = Program(program.name, tuple(b.ops), program.carries, program.outputs, program.kept, program.taken)
    done = {c.inp for c in program.carries} | {i for _, i in program.taken}
    statements: list[tuple[str, str, tuple[int, ...]]] = [  # (target, source, values used)
        (f"v{i}", f"tiles[{n!r}]", ()) for n, i in program.taken]

    def compute(roots: Iterable[int]) -> None:
        for op in whole.ancestors(roots, done):
            statements.append((f"v{op.id}", _source(op, whole.index), op.args))
            done.add(op.id)

    for item in order:
        if isinstance(item, int):
            compute([item])
            continue
        if isinstance(item[-1], Carry):
            steps, values = _step(whole, item, done)
            compute(values)
            targets = ", ".join([*(f"v{c.inp}" for c in item), *(f"end_{c.name}" for c in item)])
            starts = ", ".join(f"start[{c.name!r}]" for c in item)
            statements.append((targets, f"together([{', '.join(f'full(v{v})' for v in values)}], [{starts}], "
                               f"grid.{'reset_reverse' if item[0].reverse else 'reset_forward'}, {item[0].reverse}, "
                               f"[size.get(d, 1) for d in 'TKV'], {steps!r})", values))
            continue
        memory, how = item
        values = tuple(v for v in how.parts if v is not None)
        compute(values)
        args = ", ".join("None" if v is None else f"full(v{v})" for v in how.parts)
        through = "_" if how.x is None or how.x in done else f"v{how.x}"
        statements.append((f"v{memory.inp}, end_{memory.name}, {through}",
                           f"carry({args}, start[{memory.name!r}], "
                           f"grid.{'reset_reverse' if memory.reverse else 'reset_forward'}, {memory.reverse})", values))
        done |= set() if how.x is None else {how.x}
    last = {v: n for n, (_, _, used) in enumerate(statements) for v in used}
    keep = set(results.values())
    lines = [f"# {line}" for line in str(schedule).splitlines()]
    lines += ["def run(tiles, start, grid, size, unit, full):"]
    for n, (target, source, used) in enumerate(statements):
        lines.append(f"    {target} = {source}")
        dead = sorted({f"v{v}" for v in used if last[v] == n and v not in keep})
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    out = [f"{n!r}: v{i}" for n, i in results.items()]
    out += [f"'end_{c.name}': end_{c.name}" for item in order if not isinstance(item, int) for c in item if isinstance(c, Carry)]
    return "\n".join([*lines, f"    return {{{', '.join(out)}}}", ""])


def passed(program: Program) -> set[int]:
    """What a backward program had best get from its forward: memories, what takes a series of products, and functions of
    running sums."""
    sums = {op.id for op in program.ops if op.kind == "cumsum"}
    late, out = cotangents(program), {c.inp for c in program.carries if not c.reverse}
    for op in program.ops:
        if late & set(op.args):
            late.add(op.id)
        elif op.kind == "inverse" or op.kind == "form" and op.attr("wrt") == "P" or op.kind == "map" and sums & set(op.args):
            out.add(op.id)
    return out


def _needed_by(program: Program, carry: Carry, carries: Iterable[Carry]) -> set[Carry]:
    """The other memories that one chunk's step of `carry` depends on."""
    needed = {op.id for op in program.ancestors([carry.out])}
    return {c for c in carries if c is not carry and c.inp in needed}


def _scanned(program: Program, carry: Carry) -> bool:
    """Whether the memory moves token by token inside a chunk."""
    inside = program.ancestors([carry.out], [carry.inp])
    moved = {carry.inp}
    for op in inside:
        if moved & set(op.args):
            moved.add(op.id)
    return any(op.id in moved and op.kind in ("scan", "scan_grads") for op in inside)


def _step(program: Program, carries: tuple[Carry, ...], done: set[int]) -> tuple[str, tuple[int, ...]]:
    """The source of one chunk's step of memories that depend on each other, and the values that it takes."""
    memories = {c.inp for c in carries}
    moved = set(memories)
    for op in program.ops:
        if moved & set(op.args):
            moved.add(op.id)
    known = done - memories | {op.id for op in program.ops if op.id not in moved}
    body = [op for op in program.ancestors([c.out for c in carries], known | memories) if op.id in moved]
    values = tuple(sorted({a for op in body for a in op.args if a not in moved or a in known}
                          | {c.out for c in carries if c.out not in moved}))
    assert all(op.kind not in ("input", "valid") for op in body), "a memory's rows are no tokens"
    names = [f"    {', '.join(f'v{i}' for i in ids)}, = {of}" for ids, of in (
        ([c.inp for c in carries], "memories"), (values, "values")) if ids]
    lines = [f"    v{op.id} = {_source(op, program.index)}" for op in body]
    ends = f"    return [{', '.join(f'v{c.out}' for c in carries)}]"
    return "\n".join(["def step(memories, values, size, unit):", *names, *lines, ends, ""]), values


def _scan_source(op: Op, index: Mapping[int, Op]) -> str:
    of = Scanned.of(op)
    dims = [index[i].dims for i in of.fields]
    names = [f"x{n}" for n in range(len(of.fields))]

    def function(expr: sympy.Expr) -> str:
        return f"lambda {', '.join(names)}: {expression(expr, names, dims)}" if expr != 0 else ""

    def value(i: int | None) -> str:
        return "None" if i is None else f"v{i}"

    logs = [op.attr("log"), op.attr("phase")]
    args = [value(of.query), f"[{', '.join(map(value, of.pairs))}]", value(of.memory), value(of.imaginary), value(of.rows),
            f"[{', '.join(map(value, of.fields))}]", *([value(op.args[-1])] if op.kind == "scan_grads" else []),
            repr(op.attr("at")), repr(" ".join("".join(d) for d in dims)), repr("\n".join(map(function, logs)))]
    if op.kind == "scan_grads":
        args.append(repr("\n".join(function(sympy.diff(log, operand(n))) for log in logs for n in range(len(of.fields)))))
    return f"{op.kind}({', '.join(args)})"


def _source(op: Op, index: Mapping[int, Op]) -> str:
    a = [f"v{i}" for i in op.args]
    match op.kind:
        case "input":
            return f"tiles[{op.attr('name')!r}]"
        case "map":
            return expression(op.attr("expr"), a, [index[i].dims for i in op.args])
        case "expand":
            return f"{a[0]}.expand(*{a[0]}.shape[:-2], size[{op.dims[0]!r}], size[{op.dims[1]!r}])"
        case "transpose":
            return f"{a[0]}.mT"
        case "matmul":
            return f"{a[0]}{'.mT' * op.attr('ta')} @ {a[1]}{'.mT' * op.attr('tb')}"
        case "rename":
            return a[0]
        case "pairs":
            return f"({a[0]}[..., :, None] * {a[1]}[..., None, :]).flatten(-2)"
        case "pairs_grad":
            return f"({a[0]}.unflatten(-1, ({a[1]}.shape[-1],) * 2){'.mT' * op.attr('wrt')} @ {a[1]}[..., None]).squeeze(-1)"
        case "sum":
            return f"{a[0]}.sum({op.attr('axis') - 2}, keepdim=True)"
        case "max":
            return f"{a[0]}.amax({op.attr('axis') - 2}, keepdim=True)"
        case "valid":
            return f"grid.valid({a[0]})"
        case "form":
            return f"form({op.attr('wrt')!r}, {', '.join(a)}, {op.attr('strict')}, {op.attr('before')})"
        case "partials":
            return f"form_grads({', '.join(a)}, {op.attr('strict')}, {op.attr('before')})"
        case "item":
            return f"{a[0]}[{op.attr('place')}]"
        case "scan" | "scan_grads":
            return _scan_source(op, index)
        case "cumsum":
            return f"cumsum({a[0]}, reverse={op.attr('reverse')})"
        case "shift" | "mask" | "between" | "crossing" | "inverse" | "down" | "far":
            return f"{op.kind}({', '.join([*a, *(f'{k}={v}' for k, v in op.attrs)])})"
    raise AssertionError(f"no ATen source for {op.kind}")
