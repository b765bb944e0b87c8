"""What a declaration is, in a few words each: a row of the table that `lsmc list` prints, read off its canonical form.

Sizes are numbers per head, in K and V. The message is what ranks that share a sequence exchange, whatever its length: the
memories that a rank's tokens leave, and the linear map that they apply to what comes in, K of the factors e^{total g} or,
where the memory is read, a K×K matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from lsmc.canonical import Canonical
from lsmc.chunk import derive
from lsmc.errors import LsmNoChunkFormError, LsmNotAffineError
from lsmc.expr import dims_of, inputs_of
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
            "state": " + ".join("·".join(f.dims) for f in canonical.states), "chunk form": chunk(canonical) if form else "none",
            "backends": " ".join(names) or "reference", "decode": yes[form], "packed": yes[form],
            "message between ranks": message(canonical) if form else "none"}


def decay(canonical: Canonical) -> str:
    """The decay's type, in the words of Table 1 of Linear-MoE: constant or varying, over what; a rotation beside it."""
    kinds = {frozenset(): "scalar", frozenset("K"): "vector K", frozenset("V"): "vector V", frozenset("KV"): "matrix"}
    found = []
    for part in (canonical.decay_k, canonical.decay_v, canonical.decay_kv):
        if part is not None:
            steady = all(f.per == "head" for f in inputs_of(part))
            found.append("constant " * steady + kinds[dims_of(part)])
    return " × ".join([*found, *["rotation"] * (canonical.phase is not None)]) or "none"


def update(canonical: Canonical) -> str:
    """How what is written depends on the memory: not at all, affinely or otherwise; through momentum or not."""
    reads = {r.symbol for r in canonical.reads}
    values = [w.value for w in canonical.writes]
    bent = any(value.diff(s).free_symbols & reads for value in values for s in reads)
    what = "nonlinear" if bent else "delta" if reads else "outer product"
    return what + ", momentum" * (canonical.momentum is not None)


def chunk(canonical: Canonical) -> str:
    """How the tokens of a chunk are taken together: by products of their pairs, by a triangular system that makes what they write
    follow from one another, or one by one where the decay does not factor into tokens."""
    return "scan" if canonical.decay_kv is not None else "solve" if canonical.reads else "products"


def message(canonical: Canonical) -> str:
    """The numbers of a rank's affine map: those of its linear part, then of its memories."""
    states = [f for f in canonical.states if f.name != "Z"]
    many = len(states)
    dims = {d for part in (canonical.decay_k, canonical.decay_v, canonical.decay_kv, canonical.phase) if part is not None
            for d in dims_of(part)}
    if canonical.reads:
        linear = "K·K" if many == 1 else f"{many}K·{many}K"
    elif canonical.decay_kv is not None or dims == {"K", "V"}:
        linear = "K·V" if canonical.decay_kv is not None else "K + V"
    elif dims:
        linear = f"{many}{dims.pop()}".removeprefix("1")
    else:
        linear = "1" if canonical.decays else ""
    return " + ".join(filter(None, [linear, *("·".join(f.dims) for f in canonical.states)]))


__all__ = ["chunk", "decay", "message", "summary", "update"]
