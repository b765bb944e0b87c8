"""What the values of a kernel take on chip: the order that keeps few alive in registers at once, the columns for which they fit,
and how many programs of a scan there is room for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping

from lsmc.ir import Dims, Op, Program
from lsmc.lowering.backends.triton_cut import SCANS, Piece
from lsmc.schedules.order import QUICK, Weight, order, peak
from lsmc.target import H200

EXTENT = {"T": 64, "K": 128, "V": 128, "F": 128, "1": 1}
"""Typical extents, where a source is written for all."""

WIDE = 64
"""Columns of the split dimension that one program takes where nothing is known of its registers."""

NARROW = 32
"""Columns that one program takes at least: narrower blocks repeat the loads of what has no such dimension too often."""

FITS = {True: {64: 256}, False: {128: 500, 64: 400}}
"""Widths of blocks, the best first, with the registers of a thread that the values of a scan, or of a kernel over chunks, may
want there."""
LOOPS = 360
"""The same for a kernel that takes all blocks one after the other, where its loop has one turn."""

OPERANDS = 3.5
"""Bytes of shared memory for each square of a block's columns that a scan's products take besides what is loaded, at K = 128."""


def room(loaded: int, columns: int, stages: int) -> int:
    """How many programs of a scan, of two at most, a multiprocessor holds: those that load so many bytes for each chunk, so many
    chunks ahead, beside what products of these columns take."""
    return min(2, int(H200.shared_bytes // (stages * loaded + OPERANDS * columns**2)))


def area(tiles: Iterable[Dims], extent: Mapping[str, int]) -> int:
    """Numbers in tiles of these dimensions."""
    return sum(extent[r] * extent[c] for r, c in tiles)


def crowded(loaded: Callable[[int], int]) -> bool:
    """Whether a scan whose programs load so many bytes for each chunk, by their columns, has room for a second program, or for one
    of all columns that loads another chunk ahead, only if what it stores of its memory takes no shared memory beside its operand.
    """
    def held(programs: int, stages: int, columns: int, operands: int) -> bool:
        memory = 2 * EXTENT["K"] * columns
        return programs * (stages * loaded(columns) + operands * memory + 1024) <= H200.shared_bytes + 1024

    return any(held(*plan, 1) and not held(*plan, 2) for plan in ((2, 2, WIDE), (1, 3, 2 * WIDE)))


def block(program: Program, piece: Piece, rows: int = EXTENT["T"]) -> int:
    """Columns of the split dimension that one program takes at most, in chunks of `rows`: as many as leave its values near the
    registers of 128 threads; fewer where few programs wait for one segment after the other."""
    def few(columns: int, most: int) -> bool:
        extent = tuple({**EXTENT, "T": rows, str(piece.split): columns}.items())
        return alive(program, piece, extent, QUICK) <= most * 4 * 128

    if piece.kernel.part == "combine":
        return WIDE // 4
    if piece.split in (None, "F"):
        return WIDE
    if piece.inner:
        return 2 * WIDE if few(2 * WIDE, LOOPS) else WIDE
    if any(op.kind in SCANS for op in program.ops):
        return NARROW
    return next((n for n, most in FITS[bool(piece.kernel.carries)].items() if few(n, most)), NARROW)


@functools.lru_cache(maxsize=4096)
def alive(program: Program, piece: Piece, extents: tuple[tuple[str, int], ...], states: int = 0) -> int:
    """Bytes of the values that are alive at the worst moment of a chunk, in an order found with `states` (`order`)."""
    ends, weight = piece.roots(program), _weight(dict(extents))
    body = program.ancestors(ends, piece.known)
    return peak(order([*_loads(program, body, piece.known), *body], ends, weight, states), weight)


def arranged(program: Program, piece: Piece, body: Iterable[Op], ends: Iterable[int], done: Collection[int],
             groups: Mapping[int, tuple[int, int]]) -> list[Op]:
    """`body`, a part of a piece, in a good order for all sizes. `done` is there already; groups: two values that come at once with
    a third, at its place."""
    stand_in = {i: gate for gate, others in groups.items() for i in others}
    units = [Op(op.id, op.dims, op.kind, tuple(stand_in.get(a, a) for a in op.args), op.attrs)
             for op in body if op.id not in stand_in]
    most = WIDE if piece.inner or not piece.split else max(WIDE, block(program, piece))  # good orders of more serve fewer as well
    columns = {piece.split: most} if piece.split else {}
    loads = _loads(program, units, piece.known.difference(done))
    found = order([*loads, *units], [stand_in.get(i, i) for i in ends], _weight({**EXTENT, **columns}, groups))
    return [program.index[op.id] for op in found if op not in loads]


def _loads(program: Program, body: Iterable[Op], known: Collection[int]) -> list[Op]:
    """What `body` takes of values that earlier kernels made, as operations that load them."""
    used = {a for op in body if op.kind != "rename" for a in op.args if a in known}
    return [Op(i, program.index[i].dims, "input", (), ()) for i in sorted(used)]


def _weight(extent: Mapping[str, int], groups: Collection[int] = ()) -> Weight:
    """Bytes of a value in registers: what is loaded has 16 bits as a rule."""
    return lambda op: extent[op.dims[0]] * extent[op.dims[1]] * (2 if op.kind == "input" else 12 if op.id in groups else 4)
