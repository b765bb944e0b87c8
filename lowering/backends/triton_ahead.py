"""Loads that are asked for before anything waits: what a kernel over chunks will read is brought to the cache as it begins.

Such a kernel reads its tiles one after the other, where they are wanted, because registers have no room for all of them; few
programs share a processor, so that each wait is seen. A prefetch takes neither registers nor shared memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lsmc.ir import Op, Program
from lsmc.lowering.backends.triton_cut import Piece
from lsmc.lowering.backends.triton_values import SIZE

EXTENT = {"T": "C", "K": "K", "V": "V", "F": "F", "1": "1"}


def lines(split: str | None, inputs: Iterable[Op], tiles: Iterable[tuple[str, Op]]) -> Iterator[str]:
    """Statements that ask for the rows of these token inputs, and of tiles that lie in memory under a pointer's name."""
    def first(d: str) -> str:
        return f"block * {SIZE[d]}" if d == split else "0"

    for op in inputs:
        n, k = op.attr("name"), op.dims[1]
        yield f"ahead(p_{n} + time.to(tl.int64) * st_{n} + row * st_{n}, rows, {first(k)}, {SIZE[k]}, {EXTENT[k]})"
    for name, op in tiles:
        r, k = op.dims
        rows, inside = ("row", "row < C") if r == "T" else ("row * 0", "row < 1") if r == "1" else (f"r{r}", f"inr{r}")
        at = f"{name} + saved * ({EXTENT[r]} * {EXTENT[k]}) + {rows} * {EXTENT[k]}"
        yield f"ahead({at}, {inside}, {first(k)}, {SIZE[k]}, {EXTENT[k]})"


def pays(program: Program, piece: Piece) -> bool:
    """Whether some products wait for others: what only they want is loaded late."""
    depth: dict[int, int] = {}
    for op in program.ancestors(piece.roots(program), piece.known):
        product = op.kind in ("form", "form_gate") or op.kind == "matmul" and "1" not in op.dims
        depth[op.id] = max((depth.get(a, 0) for a in op.args), default=0) + product
    return max(depth.values(), default=0) > 1
