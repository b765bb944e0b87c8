"""The recurrence of one token → Triton source: a kernel that takes the tokens of a call one after the other.

One program owns a sequence, a value head, all of K and BV columns of V (all of V where something sums over it), and holds that
part of the memories in registers from the first token to the last: they are read once and written once. All that is loaded of a
token is asked for before anything is worked out of it. A call of one token is straight code: Triton puts in arguments that are 1.
"""

from __future__ import annotations

from lsmc.ir import Op
from lsmc.lowering.backends.triton_emit import Writer
from lsmc.lowering.backends.triton_values import SIZE

TILE = 8192
"""Entries of all memories in the registers of one program, where it can choose."""
WIDE, NARROW, FEWEST = 128, 32, 8
"""The most columns; those that lie in a whole line of memory together; the least where there are few sequences."""
WARP = 1024
"""Entries of all memories that a warp holds."""
MOST = 16
"""Warps of a program."""


class Stepper(Writer):
    """Writes the source of one kernel that goes from token to token."""

    walks = True
    varies = "B", "HV", "COUNT", "CHUNKS"

    def _values(self) -> None:
        for op in self.inputs:
            if op.attr("role") == "token":
                self._op(op)
                self._loaded(op.id)
        super()._values()

    def _load(self, op: Op) -> None:
        n, (offset, mask, _) = op.attr("name"), self._lies(op.dims)
        at = f"time.to(tl.int64) * st_{n}" if op.attr("role") == "token" else f"head * sh_{n}"
        there = "" if mask == "None" else f", mask={mask}, other=0.0"
        self.line(f"{self.v(op.id)} = tl.load(p_{n} + {at} + {offset}{there})")

    def _store(self, name: str, op: Op) -> None:
        offset, mask, elements = self._lies(op.dims)
        value = f"tl.broadcast_to({self.plain[op.id]}, [{', '.join(SIZE[d] for d in op.dims)}])"
        at = f"o_{name} + ((batch * T + begin + time) * HV + head) * ({elements}) + {offset}"
        self.line(f"tl.store({at}, {value}.to(o_{name}.dtype.element_ty), mask={mask})")


def held(key: int, value: int, memories: int, sequences: int, split: bool, units: int) -> dict[str, int]:
    """How a program holds its part of the `memories` over (K, V): tiles of whole lines, narrower ones where `sequences` (with
    heads) are too few for the processors; all columns where they are not shared (`split`)."""
    rows, columns = (1 << max(0, n - 1).bit_length() for n in (key, value))
    if split:
        columns = min(columns, WIDE, max(NARROW, TILE // (rows * max(1, memories))))
        while columns > FEWEST and sequences * -(-value // columns) < 2 * units:
            columns //= 2
    warps = 1 << max(1, rows * columns * memories // WARP).bit_length() - 1
    return {"BK": rows, "BV": columns, "num_warps": min(MOST, warps), "num_stages": 1}
