"""Tiles that a kernel over chunks loads are under way as soon as there is room for them in shared memory.

Outside loops Triton loads a tile into registers, where it is wanted. A few tiles fill the registers, so that each is waited for,
and what products take goes on from there to shared memory. The machine also copies from memory into shared memory by itself, with
no register in between (`cp.async`); Triton's intermediate representation has that, its language has not. A kernel asks for it by
`triton_tiles.early(room)`, and what Triton made of the kernel is rewritten before it becomes machine code:

    x = load(p, mask)                      b = alloc(); copy(p, b, mask)      after the call, where there is room
    …                                →     …
    y = dot(alloc(x), z)                   wait for the copy; y = dot(b, z)

A copy begins at the call, or behind the last use of a buffer whose place it needs: all buffers that are alive at once, those of
other operands and of changes of layout among them, take `room` bytes at most. Copies are waited for in the order in which their
tiles are wanted. What elementwise code takes it reads from the buffer, in the layout in which it wants it, where it would have to
change the layout of what a load left in registers. Loops are left alone: Triton loads ahead there.

All that knows Triton's insides is here. Where they are not what is written below, kernels stay as they are, and are right.
"""

from __future__ import annotations

import re
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lsmc.lowering.kernels import digest

MARK = f"// early, {digest(Path(__file__).read_text())}: $1"
"""What the call leaves in the kernel: an assembler's comment, with the bytes of shared memory that there are. Triton knows a kernel
that it has compiled by its text: another form of this file is another text."""

LEAST = 2048
"""Bytes of a tile for which a copy pays: one of sixteen bytes for each of 128 threads."""

BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4}
PURE = ("arith.", "tt.addptr", "tt.broadcast", "tt.splat", "tt.expand_dims", "tt.make_range", "ttg.convert_layout", "tt.trans")
"""Operations that may be worked out earlier: addresses and masks are made of them."""

LOCATION = re.compile(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)$")
NAME = re.compile(r"%\w+")
DEFINED = re.compile(r"    (%\w+) = ")
LOAD = re.compile(r"    (%\w+) = tt\.load (%\w+)(?:, (%\w+))?(?:, (%\w+))? : tensor<(\d+)x(\d+)x!tt\.ptr<(\w+)>, (#\w+)>$")
ALLOC = re.compile(r"    (%\w+) = ttg\.local_alloc %\w+ : \(.*\) -> (!ttg\.memdesc<.*>)$")
CONVERT = re.compile(r"    (%\w+) = ttg\.convert_layout %\w+ : .* -> (tensor<.*>)$")
SHAPE = re.compile(r"-> (?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x(\w+), .*>$")
TURN = re.compile(r"    (%\w+) = ttg\.memdesc_trans ")

_asked = threading.local()


@cache
def available() -> bool:
    """Whether this process's Triton is one whose modules can be rewritten; from now on, kernels that ask are."""
    try:
        from triton._C.libtriton import ir
        from triton.backends.nvidia.compiler import CUDABackend
        parse, make = ir.parse_mlir_module, CUDABackend.make_ttgir
    except (ImportError, AttributeError):
        return False

    def made(module: Any, *args: Any) -> Any:
        out = make(module, *args)
        asked, _asked.once = getattr(_asked, "once", False), False
        text = str(out) if asked else ""
        new = rewritten(text)
        if new == text:
            return out
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ttgir"
            path.write_text(new)
            try:
                other = parse(str(path), out.context)
            except RuntimeError as error:
                warnings.warn(f"loads of a kernel stay where they are: Triton does not take its other form ({error})", stacklevel=1)
                return out
        other.context = out.context
        return other

    CUDABackend.make_ttgir = staticmethod(made)
    return True


def ask() -> bool:
    """The kernel that this thread compiles is to be rewritten, if that is possible."""
    _asked.once = available()
    return available()


@dataclass
class _Tile:
    """A load, in statements of its block: where its value is first and last taken, and from where on its copy is under way."""

    load: int
    name: str
    pointer: str
    mask: str | None
    other: str | None
    pointers: str
    numbers: str
    bytes: int
    memory: str
    buffer: str = ""
    allocs: set[int] = field(default_factory=set)  # statements that put it into shared memory
    described: set[str] = field(default_factory=set)  # names of the buffer, turned or not
    turns: list[int] = field(default_factory=list)  # statements that turn it: they come with the copy
    converts: set[int] = field(default_factory=set)  # statements that change the layout of the whole of it
    taken: list[int] = field(default_factory=list)  # other statements that take its numbers
    first: int = 0
    last: int = 0
    begin: int = 0

    @property
    def needs(self) -> list[str]:
        return [n for n in (self.pointer, self.mask, self.other) if n]


def rewritten(module: str) -> str:
    """The text of a module with its loads under way early, or the same text if nothing asks for it or there is nothing to do."""
    lines = module.split("\n")
    at = next((i for i, line in enumerate(lines) if f'"{MARK}' in line), None)
    if at is None:
        return module
    end = next(i for i in range(at, len(lines)) if re.match(r"  (\^bb|\})", lines[i]))
    block = _Block(lines, at, end)
    tiles = block.placed()
    return "\n".join([*lines[:at], *block.rewritten(tiles), *lines[end:]]) if tiles else module


class _Block:
    """The statements of straight code from the mark on."""

    def __init__(self, lines: list[str], at: int, end: int) -> None:
        self.lines = lines[at + 1:end]
        self.text = [LOCATION.sub("", line) for line in self.lines]
        self.place = " loc(unknown)" if self.text[:1] != self.lines[:1] else ""
        self.aliases = dict(re.findall(r"^(#\w+) = (.*)$", "\n".join(lines[:at]), re.MULTILINE))
        called = NAME.findall(lines[at].split(" = ", 1)[-1])
        numbers = dict(re.findall(r"(%\w+) = arith\.constant (\d+) : i32", "\n".join(lines[:at])))
        self.room = int(numbers.get(called[0], 0)) if called else 0
        self.defined = {m[1]: i for i, line in enumerate(self.text) if (m := DEFINED.match(line))}
        self.users = defaultdict[str, list[int]](list)
        for i, line in enumerate(self.text):
            for name in dict.fromkeys(NAME.findall(DEFINED.sub("", line))):
                self.users[name].append(i)
        self.hoisted: set[int] = set()

    def placed(self) -> list[_Tile]:
        """The tiles for which there is room before they are wanted, each with the statement before which its copy begins; none
        where products run on behind the statement that begins them."""
        out, now, taken = list[_Tile](), 0, self._taken()
        if any("isAsync = true" in line for line in self.text):
            return out
        for tile in sorted(self._tiles(), key=lambda t: (t.first, t.load)):
            others = [(i, *span) for i, span in taken.items() if i not in tile.allocs | tile.converts]
            for place in sorted({now, *(end + 1 for _, _, end, _ in others if now <= end < tile.first)}):
                if place < tile.first and _most(others, place, tile.last) + tile.bytes <= self.room:
                    tile.begin = now = place
                    tile.buffer = f"%early_{len(out)}"
                    out.append(tile)
                    for i in tile.allocs | tile.converts:
                        taken.pop(i, None)
                    taken[-len(out)] = place, tile.last, tile.bytes
                    for name in tile.needs:
                        self._hoist(name)
                    break
        return out

    def rewritten(self, tiles: list[_Tile]) -> list[str]:
        """The statements with these tiles under way early."""
        waits = self._waits(tiles)
        begins = defaultdict[int, list[_Tile]](list)
        for t in tiles:
            begins[t.begin].append(t)
        gone = self.hoisted.union(*({t.load, *t.allocs, *t.turns} for t in tiles))
        out = [self.lines[i] for i in sorted(self.hoisted)]
        for i, line in enumerate(self.lines):
            out += [s + self.place for t in begins[i] for s in (*self._copy(t), *(self._statement(j, [t]) for j in t.turns))]
            out += [s + self.place for s in waits.get(i, ())]
            if i in gone:
                continue
            out += [s + self.place for t in tiles if t.taken and i == t.taken[0] for s in [self._read(t, t.name, t.numbers)]]
            out.append(self._statement(i, tiles) + line[len(self.text[i]):])
        return out

    def _tiles(self) -> Iterator[_Tile]:
        """Loads whose numbers can be copied: threads read at least four bytes side by side, and straight code takes them."""
        for i, line in enumerate(self.text):
            m = LOAD.match(line)
            if not m:
                continue
            name, pointer, mask, other, rows, columns, kind, layout = m.groups()
            wide = re.search(r"blocked<\{sizePerThread = \[\d+, (\d+)\].*order = \[1, 0\]", self.aliases.get(layout, ""))
            size = BYTES.get(kind, 0)
            if not wide or int(wide[1]) * size < 4 or int(rows) * int(columns) * size < LEAST:
                continue
            numbers = f"tensor<{rows}x{columns}x{kind}, {layout}>"
            tile = _Tile(i, name, pointer, mask, other, line.rsplit(" : ", 1)[1], numbers, int(rows) * int(columns) * size,
                         _swizzled(int(rows), int(columns), kind, size))
            if self._follow(tile):
                yield tile

    def _follow(self, tile: _Tile) -> bool:
        """Find who takes a tile; whether all of them can take it from its buffer."""
        uses = list[int]()
        for i in self.users[tile.name]:
            made, turned = ALLOC.match(self.text[i]), CONVERT.match(self.text[i])
            if made and "mutable" not in made[2] and (not tile.allocs or made[2] == tile.memory):
                tile.allocs.add(i)
                tile.memory = made[2]
                tile.described.add(made[1])
            elif turned:
                tile.converts.add(i)
            else:
                tile.taken.append(i)
        uses += [*tile.converts, *tile.taken]
        names = list(tile.described)
        for name in names:
            for i in self.users[name]:
                m = TURN.match(self.text[i])
                if m:
                    names.append(m[1])
                    tile.described.add(m[1])
                    tile.turns.append(i)
                elif re.search(r"= (ttng\.warp_group_dot|ttg\.local_load) ", self.text[i]):
                    uses.append(i)
                else:
                    return False
        tile.memory = _mutable(tile.memory)
        straight = all(re.match(r"    [%\w]", self.text[i]) and not self.text[i].endswith("({") for i in uses)
        tile.first, tile.last = min(uses, default=0), max(uses, default=0)
        return bool(uses) and straight and all(self._free(n) for n in tile.needs)

    def _free(self, name: str) -> bool:
        """Whether a value is there at the mark, or can be."""
        i = self.defined.get(name)
        if i is None:
            return True
        made = DEFINED.sub("", self.text[i])
        return made.startswith(PURE) and all(self._free(n) for n in NAME.findall(made))

    def _taken(self) -> dict[int, tuple[int, int, int]]:
        """What takes shared memory besides copies, by its statement: its first and last one, and bytes."""
        out = dict[int, tuple[int, int, int]]()
        for i, line in enumerate(self.text):
            m = SHAPE.search(line)
            if m and ALLOC.match(line):
                out[i] = i, self._end(line), int(m[1]) * int(m[2]) * BYTES.get(m[3], 4)
            elif m and CONVERT.match(line) and "dot_op" not in line:
                out[i] = i, i, int(m[1]) * int(m[2]) * BYTES.get(m[3], 4)
        return out

    def _end(self, line: str) -> int:
        """The last statement that takes a buffer, turned or not."""
        m = DEFINED.match(line)
        assert m
        return max((self._end(self.text[i]) if TURN.match(self.text[i]) else i for i in self.users[m[1]]), default=0)

    def _hoist(self, name: str) -> None:
        i = self.defined.get(name)
        if i is not None and i not in self.hoisted:
            self.hoisted.add(i)
            for n in NAME.findall(DEFINED.sub("", self.text[i])):
                self._hoist(n)

    def _waits(self, tiles: list[_Tile]) -> dict[int, list[str]]:
        """Where copies are waited for: before a statement, or the fence of its product; later copies stay under way."""
        out = dict[int, list[str]]()
        for k, t in enumerate(tiles):
            at = t.first - ("ttng.fence_async_shared" in self.text[t.first - 1])
            behind = sum(later.begin <= at for later in tiles[k + 1:])
            out[at] = [f"    {t.buffer}_there = ttg.async_wait {t.buffer}_copied {{num = {behind} : i32}}"]
        return out

    def _copy(self, t: _Tile) -> list[str]:
        given = f" mask {t.mask}" * bool(t.mask) + f" other {t.other}" * bool(t.other)
        return [f"    {t.buffer} = ttg.local_alloc : () -> {t.memory}",
                f"    {t.buffer}_copy = ttg.async_copy_global_to_local {t.pointer}, {t.buffer}{given} : "
                f"{t.pointers} -> {t.memory.removeprefix('!ttg.memdesc')}",
                f"    {t.buffer}_copied = ttg.async_commit_group tokens {t.buffer}_copy"]

    def _read(self, t: _Tile, name: str, numbers: str) -> str:
        return f"    {name} = ttg.local_load {t.buffer} : {t.memory} -> {numbers}"

    def _statement(self, i: int, tiles: list[_Tile]) -> str:
        """A statement that takes its tiles from their buffers."""
        line = self.text[i]
        for t in tiles:
            if i in t.converts:
                m = CONVERT.match(line)
                assert m
                return self._read(t, m[1], m[2])
        names = NAME.findall(line)
        mine = [t for t in tiles if t.described.intersection(names)]
        if not mine:
            return line
        head, types = line.rsplit(" : ", 1)
        described = set[str]().union(*(t.described for t in mine))
        if TURN.match(line):
            types = " -> ".join(map(_mutable, types.split(" -> ")))
        elif " * " in types:
            operands, result = types.rsplit(" -> ", 1)
            x, y = zip(NAME.findall(DEFINED.sub("", head)), operands.split(" * ", 1), strict=False)
            types = " * ".join(_mutable(kind) if name in described else kind for name, kind in (x, y)) + f" -> {result}"
        else:
            memory, result = types.split(" -> ", 1)
            types = f"{_mutable(memory)} -> {result}"
        for t in mine:
            for j in t.allocs:
                head = re.sub(rf"{NAME.findall(self.text[j])[0]}\b", t.buffer, head)
        return f"{head} : {types}"


def _most(spans: Iterable[tuple[int, int, int, int]], first: int, last: int) -> int:
    """The most bytes that are alive at once from a statement to another."""
    inside = [(begin, end, size) for _, begin, end, size in spans if begin <= last and first <= end]
    begins = {first, *(begin for begin, _, _ in inside if begin >= first)}
    return max(sum(size for begin, end, size in inside if begin <= at <= end) for at in begins)


def _mutable(kind: str) -> str:
    return f"{kind[:-1]}, mutable>" if kind.startswith("!ttg.memdesc") and "mutable" not in kind else kind


def _swizzled(rows: int, columns: int, kind: str, size: int) -> str:
    """Shared memory for elementwise code: pieces of sixteen bytes lie so that the rows of a column do in different banks."""
    wide = columns * size
    together = max(1, 128 // wide)
    phases = max(1, min(8 // together, wide // 16))
    return (f"!ttg.memdesc<{rows}x{columns}x{kind}, #ttg.swizzled_shared<{{vec = {16 // size}, perPhase = {together}, "
            f"maxPhase = {phases}, order = [1, 0]}}>, #ttg.shared_memory>")
