"""Scheduled program → pieces: one launch each, with the dimension along which its programs share the work.

A piece splits along a dimension if nothing in its body contracts that dimension (*clean*), or if only outputs of one
number per token contract it, linearly, in the end (*partial*): then each block stores its share and the launch sums them.
Stores that are clean along different dimensions part into different pieces, so that wide partial sums never exist.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import sympy

from lsmc.ir import READ_AT, Carry, Op, Program, operand
from lsmc.keep import cotangents
from lsmc.schedules import Kernel, Schedule
from lsmc.schedules.base import needed

SCANS = ("scan", "scan_grad")
"""Operations that go from token to token: kernels that hold them do, `triton_scan`."""

LINEAR = ("expand", "transpose", "sum", "valid", "cumsum", "mask", "between_grad")


@dataclass(frozen=True)
class Piece:
    """One launch. `known` are values made by an earlier piece, `makes` those that this one makes for later ones. With
    `inner`, one program takes all blocks of the split dimension, in a loop: it needs sums over all of them."""

    kernel: Kernel
    known: frozenset[int]
    makes: tuple[int, ...]
    split: str | None
    inner: bool = False

    def roots(self, program: Program) -> list[int]:
        return [*self.makes, *roots(program, self.kernel)]

    def moved(self, new: Mapping[int, int]) -> Piece:
        """This launch of a program in another form, where the value i is new[i]."""
        return replace(self, known=frozenset(new[i] for i in self.known), makes=tuple(new[i] for i in self.makes))


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
        case "pairs":
            return {"K"}  # its rows of pairs are made of one column, and of all
        case "pairs_grad":
            return {"K", "F"}
        case "scan":
            return {"K"} if op.attr("at") in READ_AT else set()
        case "scan_grad":
            return {"K", "V"} - {*("KV" if "E" in op.dims else op.dims)}
    return set()


def roots(program: Program, kernel: Kernel) -> list[int]:
    """What a kernel leaves behind: its stores and, if it scans, its memories."""
    out = [i for n, i in program.outputs if n in kernel.stores]
    return out + [i for c in program.carries if c.name in kernel.carries for i in (c.out, c.inp)]


def brief(program: Program, carry: Carry) -> bool:
    """Whether a memory is zero after any chunk, as the cotangent is of what only the end of a sequence gives: kernels read it
    where it starts, and hold nothing."""
    op = program.index[carry.out]
    while op.kind == "expand":
        op = program.index[op.args[0]]
    return carry.reverse and op.kind == "map" and op.attr("expr") == 0


def costly(program: Program, schedule: Schedule) -> set[int]:
    """What a first kernel, over all chunks in parallel, makes for the others, from the forward inputs alone: products over
    pairs of tokens that take a series of products (inverses, decays along K or V), and what of the decays along K or V
    a scan would otherwise compute serially."""
    free, dear, columns = set[int](), set[int](), set[int]()
    corrects = any(op.kind == "inverse" for op in program.ops)
    late = cotangents(program) if program.name.endswith("_backward") else set()
    late |= {i for _, i in program.taken}
    for op in program.ops:
        outside = op.id in late or op.kind == "input" and op.attr("role") == "carry"
        if not outside and all(a in free for a in op.args):
            free.add(op.id)
            sums = op.kind in ("cumsum", "sum") and program.index[op.args[0]].dims[0] == "T"
            if any(a in dear for a in op.args) or op.kind in ("form", "inverse") or sums and op.dims[1] != "1":
                dear.add(op.id)
            if corrects and op.dims[1] == "1" and (sums or any(a in columns for a in op.args)):
                columns.add(op.id)  # small, and a scan would wait for each
    users = defaultdict[int, list[Op]](list)
    for op in program.ops:
        for a in op.args:
            users[a].append(op)
    out = set[int]()
    for op in (op for op in program.ops if op.id in free and op.dims == ("T", "T")):
        if op.kind in ("inverse", "form"):
            out.add(op.id)
        elif corrects and op.kind == "matmul" and "K" in contracts(program, op):  # with its decay, if that is all it is for
            weights = users[op.id][0] if len(users[op.id]) == 1 else op
            out.add(weights.id if weights.kind == "map" and weights.id in free else op.id)
    for k in schedule.kernels:
        own = k.of(program)
        if k.part == "combine" or not k.carries:
            continue
        for op in own.ancestors(roots(own, replace(k, stores=()))):
            if op.id not in columns:
                out |= {a for a in op.args if a in columns}
            if op.id not in free or op.kind == "matmul":
                out |= {a for a in op.args if a in dear and own.index[a].dims not in (("K", "V"), ("V", "K"))}
    memories = {c.inp for c in program.carries}
    out |= _outside(program, schedule)
    out |= {i for i in _kept(program) if not memories & {op.id for op in program.ancestors([i])}}
    return out - {i for _, i in program.outputs}


def _outside(program: Program, schedule: Schedule) -> set[int]:
    """What a reverse scan that one program walks through for all columns would compute without its own memories: products with
    memories that the forward kept and what follows from them, which all chunks can do at once."""
    given, out = {i for _, i in program.taken}, set[int]()
    memories = {c.inp for c in program.carries}
    for k in schedule.kernels if given else ():
        if not k.reverse(program) or not alone(program, k):
            continue
        moved, products = set(memories), set(given)
        for op in program.ancestors(roots(program, replace(k, stores=())), given):
            if moved & set(op.args):
                moved.add(op.id)
            elif op.dims[0] == "T" and (products & set(op.args) or op.kind == "matmul" and "1" not in op.dims):
                products.add(op.id)
            if op.id not in products:
                out |= {a for a in op.args if a in products}
    return out - given


def alone(program: Program, k: Kernel) -> bool:
    """Whether one program has to walk through a sequence with all columns of the memories."""
    return bool(k.carries) and not splits(program, replace(k, stores=()), [i for _, i in program.taken])


def _kept(program: Program) -> set[int]:
    """What the program keeps besides memories: what follows from one is made by its scan."""
    return {i for _, i in program.kept} - {c.inp for c in program.carries}


def passed(program: Program, schedule: Schedule) -> set[int]:
    """What the launches of a backward program that no cotangent enters leave to the others: memories and values made; of those
    that are no launch by themselves where nothing is made apart."""
    late, out = cotangents(program), set[int]()
    schedule = replace(schedule, kernels=tuple(replace(k, apart=False) for k in schedule.kernels))
    for p in (p for p in pieces(program, schedule) if p.kernel.whole):
        body = {op.id for op in program.ancestors(p.roots(program), p.known)} | _taken(program, p)
        made = {*p.makes, *(c.inp for c in program.carries if c.name in p.kernel.saves)}
        late, out = (late | made, out) if body & late else (late, out | made)
    return out


def shares(program: Program, body: Iterable[Op], dim: str) -> set[int] | None:
    """The values of `body` that are sums of what the blocks of `dim` hold; None where such a sum is used otherwise."""
    out: set[int] = set()
    made = defaultdict[int, bool](bool)
    for op in body:
        made[op.id] = op.kind != "input"
        parts = [a for a in op.args if a in out]
        if op.kind == "rename" and made[op.args[0]] and dim in (*op.dims, *program.index[op.args[0]].dims):
            return None  # one block is no block of the other, but in memory
        if dim in contracts(program, op):
            if parts or op.kind not in ("matmul", "sum", "scan_grad"):
                return None
            out.add(op.id)
        elif parts and op.kind == "map":
            used = [i for i, a in enumerate(op.args) if a in out]
            for i in used:
                if op.attr("expr").diff(operand(i)).free_symbols & {operand(j) for j in used}:
                    return None
            out.add(op.id)
        elif parts:
            if op.kind not in LINEAR:
                return None
            out.add(op.id)
    return out


def phases(program: Program, body: Iterable[Op], known: Iterable[int], dim: str) -> dict[int, int]:
    """When each value of `body` is worked out by a kernel that loops over blocks of `dim`: even phases are straight code,
    odd ones loops. What has `dim` or sums over it belongs to a loop; such a sum is complete in the phase after it. Other tiles
    wait for what takes them first: a loop does not hold them."""
    given = {i: int(dim in program.index[i].dims) for i in known}
    ready, out, body = dict(given), dict[int, int](), list(body)
    for op in body:
        first = max((ready[a] for a in op.args if a in ready), default=0)
        sums = dim in contracts(program, op)
        inside = sums or dim in op.dims
        out[op.id] = first + (first % 2 != inside)
        ready[op.id] = out[op.id] + sums
    taken = dict[int, int]()
    for op in reversed(body):
        if out[op.id] % 2 == 0 and "1" not in op.dims:
            out[op.id] = max(out[op.id], taken.get(op.id, 0))
        for a in op.args:
            taken[a] = min(taken.get(a, out[op.id]), out[op.id] - out[op.id] % 2)
    return out


def _loop(program: Program, body: Iterable[Op]) -> str | None:
    """A dimension in whose blocks a kernel over chunks can work, because what is summed over it may be summed by blocks."""
    body = list(body)
    for dim in ("K", "V"):
        sums = [op for op in body if dim in contracts(program, op)]
        renames = any(op.kind == "rename" for op in body)
        if not renames and any(dim in op.dims for op in body) and all(op.kind in ("matmul", "sum", "form") for op in sums):
            return dim
    return None


def splits(program: Program, kernel: Kernel, known: Iterable[int]) -> dict[str, bool]:
    """The dimensions along which a kernel can split, and whether that shares all of its work."""
    found = {}
    carried = [i for c in program.carries if c.name in kernel.carries for i in (c.inp, c.out)]
    ends = roots(program, kernel)
    for dim in ("V", "K"):
        part = shares(program, program.ancestors(ends, known), dim)
        if part is None or part & set(carried):
            continue
        wide = [i for i in ends if i in part and program.index[i].dims[1] != "1"]
        if not wide:
            found[dim] = not part & set(ends) and any(dim in program.index[i].dims for i in ends)
    return found


@functools.cache
def pieces(program: Program, schedule: Schedule) -> tuple[Piece, ...]:
    """The launches of a schedule, in order."""
    if any(k.walks for k in schedule.kernels):
        return tuple(Piece(k, frozenset(), (), "V" if splits(k.of(program), k, ()).get("V") else None) for k in schedule.kernels)
    if any(op.kind in SCANS for op in program.ops):
        return _walks(program, schedule)
    if any("F" in op.dims for op in program.ops):
        return _by_rows(program, schedule)
    dear = costly(program, schedule)
    given = {i for _, i in program.taken}
    kept = set(given)
    out: list[Piece] = []
    for k in _settled(program, schedule.kernels):
        found = _part(k.of(program), k, set() if k.part == "combine" else dear | kept)
        out += [q for p in found for q in (_apart(program, p) if k.apart and p.split else [p])]
        kept |= through(program, k)
    if len(out) == 1 and not out[0].kernel.carries:
        return (Piece(out[0].kernel, frozenset(given), (), out[0].split),)
    done: list[Piece] = []
    for p in reversed(out):  # who makes a value that later pieces take
        wanted = set().union(_kept(program), *(_taken(program, q) for q in done)) - set().union(given, *(q.makes for q in done))
        mine = through(program, p.kernel) & wanted - p.known
        done.append(replace(p, makes=tuple(sorted(mine.union(p.makes)))))
    used = set().union(_kept(program), *(_taken(program, p) for p in done)) & dear - set().union(*(p.makes for p in done))
    if used:
        made = tuple(sorted(used))
        dim = _loop(program, program.ancestors(made))
        done.append(Piece(Kernel("prepare", (), (), ()), frozenset(given), made, dim, inner=dim is not None))
    assert _kept(program) <= set().union(*(p.makes for p in done)), "what is kept is made by a launch"
    return tuple(reversed(done))


def _apart(program: Program, piece: Piece) -> list[Piece]:
    """A launch over chunks, and before it one of what each block of its split dimension would work out again: products and wide
    sums without that dimension, what follows from them alone, and outputs that have none of it."""
    body, again = program.ancestors(piece.roots(program), piece.known), set[int]()
    alone = {i for i in piece.known if piece.split not in program.index[i].dims}
    for op in body:
        sums = contracts(program, op)
        if alone.issuperset(op.args) and piece.split not in {*op.dims, *sums}:
            alone.add(op.id)
            if sums & {"K", "V"} or again & set(op.args):
                again.add(op.id)
    used = again & {a for op in body if op.id not in alone for a in op.args}
    multiples = {op.id: op.args[0] for op in body
                 if op.kind == "map" and len(op.args) == 1 and (op.attr("expr") / operand(0)).is_number}
    makes = {multiples.get(i, i) for i in used}  # other forms of the program work out what is a multiple otherwise
    if not any(program.index[i].dims == ("T", "T") for i in makes):
        return [piece]
    made, whole = dict(program.outputs), replace(piece.kernel, apart=False)
    early = tuple(n for n in whole.stores if made[n] in alone)
    first = Piece(replace(whole, name=f"{whole.name}_pairs", stores=early), piece.known, tuple(sorted(makes)), None)
    dim = _loop(program, program.ancestors(first.roots(program), first.known))
    rest = replace(whole, stores=tuple(n for n in whole.stores if n not in early))
    return [replace(first, split=dim, inner=dim is not None), replace(piece, kernel=rest, known=piece.known | makes)]


def _walks(program: Program, schedule: Schedule) -> tuple[Piece, ...]:
    """Kernels that go from token to token: the last one stores all outputs, as it has the memories of every token."""
    *first, last = schedule.kernels
    outputs = tuple(n for n, _ in program.outputs)
    kernels = [*(replace(k, saves=k.carries, stores=()) for k in first), replace(last, saves=last.carries, stores=outputs)]
    given = frozenset(i for _, i in program.taken)
    return tuple(Piece(k, given, (), "V") for k in needed(program, kernels))


def whole(name: str) -> str:
    """The output that one of this name is, or is a share of (`triton_sums.dealt`)."""
    return name[3:] if name.startswith(("_K_", "_V_")) else name


def _by_rows(program: Program, schedule: Schedule) -> tuple[Piece, ...]:
    """Memories over pairs (a, b), K rows for each a: scans of one a each, and kernels over all chunks that loop over a, which
    make what sums over pairs: all outputs in the end, and before a scan what it writes of such sums."""
    outputs = tuple(n for n, _ in program.outputs)
    scans = [replace(k, part="", saves=k.carries, stores=()) for k in schedule.kernels if k.carries and k.whole]
    known, out = {i for _, i in program.taken}, list[Piece]()
    for k in needed(program, [*scans, Kernel("chunks", (), (), outputs)]):
        body = program.ancestors(roots(program, k), known) if k.carries else []
        sums = {op.id for op in body if "F" in contracts(program, op)}
        if sums:
            out.append(Piece(Kernel(f"before_{k.name}", (), (), ()), frozenset(known), tuple(sorted(sums)), "F", inner=True))
        known |= sums
        made = () if k.carries else tuple(sorted(_kept(program) - known))
        out.append(Piece(k, frozenset(known), made, "F", inner=not k.carries))
    return tuple(out)


def unshared(program: Program) -> str:
    """The rule by which programs cannot share the memories of a forward program, in words; empty where they can."""
    rows = {program.index[c.inp].dims[0] for c in program.carries}
    body = program.ancestors([c.out for c in program.carries]) if "F" in rows else []
    if any("F" in contracts(program, op) for op in body):
        return "a memory over pairs of keys is read by its own update: that sums over all pairs, and each program holds some"
    return ""


def _settled(program: Program, kernels: tuple[Kernel, ...]) -> list[Kernel]:
    """Stores move to the first scan that works out what they store: no later kernel would have to copy it."""
    made = dict(program.outputs)
    stores: dict[str, list[str]] = {k.name: [] for k in kernels}
    for i, k in enumerate(kernels):
        for n in (n for n in made if whole(n) in k.stores):
            stores[next((e.name for e in kernels[:i] if made[n] in through(program, e)), k.name)].append(n)
    gone = {c.name for c in program.carries if brief(program, c)}
    return [replace(k, stores=tuple(stores[k.name]), saves=tuple(s for s in k.saves if s not in gone))
            for k in kernels if k.carries or stores[k.name]]


def _scaled(program: Program, i: int, made: set[int]) -> bool:
    """Whether a value is one of those made, or one times numbers that are loaded."""
    op = program.index[i]
    if i in made or op.kind != "map" or op.attr("expr") != sympy.Mul(*(operand(n) for n in range(len(op.args)))):
        return i in made
    rest = [program.index[a] for a in op.args if a not in made]
    return len(rest) == len(op.args) - 1 and all(r.kind == "input" and r.dims[1] == "1" for r in rest)


def _taken(program: Program, piece: Piece) -> set[int]:
    """The values of earlier pieces that a piece reads."""
    program = piece.kernel.of(program)
    ends = piece.roots(program)
    return (set(ends) | {a for op in program.ancestors(ends, piece.known) for a in op.args}) & piece.known


def through(program: Program, k: Kernel) -> set[int]:
    """What a scan works out from its memory for each token and value: later kernels that take it contract K no more."""
    body = program.ancestors(roots(program, replace(k, stores=()))) if k.carries and k.whole else []
    inside = {c.inp for c in program.carries if c.name in k.carries}
    out = set[int]()
    whole = bool(body) and alone(program, k)
    for op in body:
        if inside & set(op.args):
            inside.add(op.id)
            if whole:
                out |= {a for a in op.args if a in inside and program.index[a].dims == ("T", "V") and op.dims == ("K", "V")}
            if whole and not (op.kind == "matmul" and contracts(program, op) == {"K"}):  # made again: it is elementwise
                continue
            scaled = op.kind == "map" and all(a in out or program.index[a].dims == ("1", "1") for a in op.args)
            if op.dims == ("T", "V") and not scaled:
                out.add(op.id)
    return out


def _part(program: Program, k: Kernel, known: set[int]) -> list[Piece]:
    """One kernel by the dimensions that its stores split along, clean ones first."""
    memory = splits(program, replace(k, stores=()), known) if k.carries else {"V": True, "K": True}
    groups: dict[str | None, list[str]] = {}
    loose: list[tuple[str, dict[str, bool]]] = []
    for n in k.stores:
        way = {d: clean for d, clean in splits(program, Kernel(k.name, (), (), (n,)), known).items() if d in memory}
        clean = [d for d in ("V", "K") if way.get(d)]
        if clean:
            groups.setdefault(clean[0], []).append(n)
        else:
            loose.append((n, way))
    for n, way in loose:
        fits = [d for d in ("K", "V") if d in way]
        there = [d for d in fits if d in groups]
        groups.setdefault(next(iter(there or fits), None), []).append(n)
    if not groups:
        groups[next((d for d in ("V", "K") if d in memory), None)] = []
    if not k.carries:
        _join(program, k, known, groups)
    if len(groups) == 1:
        (d, stores), = groups.items()
        return [Piece(k, frozenset(known), (), d)]
    out = []
    for i, (d, stores) in enumerate(sorted(groups.items(), key=lambda g: str(g[0]))):
        name = f"{k.name}_{d or 'whole'}"
        out.append(Piece(replace(k, name=name, saves=k.saves if i == 0 else (), stores=tuple(stores)), frozenset(known), (), d))
    return out


def _join(program: Program, k: Kernel, known: set[int], groups: dict[str | None, list[str]]) -> None:
    """Outputs of a group that another's kernel loads anyway, but for factors, are stored by that kernel."""
    made = dict(program.outputs)
    for d in [*groups]:
        for e in (e for e in groups if e != d):
            taken = _taken(program, Piece(replace(k, stores=tuple(groups[e])), frozenset(known), (), e))
            if all(_scaled(program, made[n], taken) for n in groups[d]):
                groups[e] += groups.pop(d)
                break
