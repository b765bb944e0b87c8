"""What a declaration is, in a few words each: a row of the table that `lsmc list` prints, read off its canonical form.

Sizes are numbers per head, in K and V. The message is what ranks that share a sequence exchange, whatever its length: the
memories that a rank's tokens leave, and the linear map that they apply to what comes in, K of the factors e^{total g} or,
where the memory is read, a K×K matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from lsmc.canonical import Canonical, bent
from lsmc.chunk import derive
from lsmc.errors import LsmNoChunkFormError, LsmNotAffineError
from lsmc.expr import Field, dims_of, inputs_of
from lsmc.ir import Program


def summary(canonical: Canonical, backends: Callable[[Program], list[str]]) -> dict[str, str]:
    """Column → text; `backends` says which of them have code for a chunk program."""
    try:
        names = backends(derive(canonical))
    except (LsmNoChunkFormError, LsmNotAffineError):
        names = []
    form = bool(names)
    yes = {True: "yes", False: "no"}
    return {"method": canonical.name, "decay": decay(canonical), "update": update(canonical),
            "state": " + ".join(map(_size, canonical.states)), "chunk form": chunk(canonical) if form else "none",
            "backends": " ".join(names) or "reference", "decode": yes[form], "packed": yes[form],
            "message between ranks": message(canonical) if form else "none"}


def decay(canonical: Canonical) -> str:
    """The decay's type, in the words of Table 1 of Linear-MoE: constant or varying, over what; a rotation beside it."""
    kinds = {frozenset(): "scalar", frozenset("K"): "vector K", frozenset("V"): "vector V", frozenset("KV"): "matrix"}
    found = []
    for part in (canonical.decay_k, canonical.decay_v, canonical.decay_kv):
        if part is not None:
            steady = all(f.per != "token" for f in inputs_of(part))
            found.append("constant " * steady + kinds[dims_of(part)])
    return " × ".join([*found, *["rotation"] * (canonical.phase is not None)]) or "none"


def update(canonical: Canonical) -> str:
    """How what is written depends on the memory: not at all, affinely or otherwise; at which; through momentum or not."""
    reads = [r.symbol for r in canonical.reads]
    what = "nonlinear" if any(bent(w.value, reads) for w in canonical.writes) else "delta" if reads else "outer product"
    blocks = "" if canonical.block is None else ", token by token" if canonical.block == 1 else f", blocks of {canonical.block}"
    return what + blocks + ", momentum" * (canonical.momentum is not None)


def chunk(canonical: Canonical) -> str:
    """How the tokens of a chunk are taken together: by products of their pairs, by a triangular system that makes what they write
    follow from one another, or one by one where the decay does not factor into tokens. What is read of a block's start is known."""
    return "scan" if canonical.matrix else "solve" if canonical.reads and canonical.block is None else "products"


def message(canonical: Canonical) -> str:
    """The numbers of a rank's affine map: those of its linear part, then of its memories; none where it is not affine."""
    if canonical.block is not None:
        return "none"
    states = [f for f in canonical.states if f.name != "Z"]
    many = len(states)
    dims = {d for part in (canonical.decay_k, canonical.decay_v, canonical.decay_kv, canonical.phase) if part is not None
            for d in dims_of(part)}
    if canonical.reads:
        linear = "K·K" if many == 1 else f"{many}K·{many}K"
    elif canonical.matrix or dims == {"K", "V"}:
        linear = f"{many}K·V".removeprefix("1") if canonical.matrix else "K + V"
    elif dims:
        linear = f"{many}{dims.pop()}".removeprefix("1")
    else:
        linear = "1" if canonical.decays else ""
    return " + ".join(filter(None, [linear, *map(_size, canonical.states)]))


def _size(state: Field) -> str:
    return "·".join(state.dims).replace("F", "K·K") or "1"


__all__ = ["chunk", "decay", "message", "summary", "update"]
