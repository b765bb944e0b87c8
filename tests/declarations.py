"""Random declarations for the laws: a hypothesis strategy over what a method may say, none of it in the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from hypothesis import strategies as st

import lsmc
from lsmc import (
    LSM,
    Constant,
    Identity,
    M,
    Matrix,
    Rotation,
    Scalar,
    Vector,
    k,
    matrix,
    outer,
    q,
    scalar,
    v,
    vector,
)
from lsmc.decays import Decay
from lsmc.terms import Term

DECAYS: dict[str, Callable[[], Decay]] = {
    "none": Identity,
    "constant": lambda: Constant("log_a", default=-0.05),
    "scalar": lambda: Scalar("g"),
    "scalar of an expression": lambda: Scalar(-lsmc.softplus(scalar("f"))),
    "vector over K": lambda: Vector("g"),
    "vector of an expression": lambda: Vector(lsmc.logsigmoid(vector("f"))),
    "vector per head": lambda: Vector(vector("g", per="head")),
    "scalar times vector": lambda: Scalar("f") * Vector("g"),
    "rotation": lambda: Rotation("theta"),
    "rotation beside a vector": lambda: Vector("g") * Rotation("theta"),
    "vector over V": lambda: Vector("g", over="V"),
    "two-sided": lambda: Vector("g") * Vector("h", over="V"),
    "scalar times vector over V": lambda: Scalar("f") * Vector("h", over="V"),
}
"""What the memory forgets. The last three decay along V and cannot be read by an update."""

OVER_V = ("vector over V", "two-sided", "scalar times vector over V")

ROTATING = ("rotation", "rotation beside a vector")

MOMENTA: dict[str, Callable[[], Decay | None]] = {"none": lambda: None, "momentum": lambda: Scalar("m") * Constant("log_m", default=-0.7)}
"""What is accumulated before it is written; beside decays by one number for each head."""

PLAIN = ("none", "constant", "scalar", "scalar of an expression")

OTHER = 1 / 16
"""Weight of a correction that is written at another key than it was read at: I − w kᵀa does not contract, and T tokens
may amplify by (1 + w)^T, which is to stay far below what float64 resolves: 70 for T = 70 (2^70 for w = 1)."""

READS: dict[str, Callable[[Term], Term]] = {
    "none": lambda key: v,
    "decayed": lambda key: v - key @ M.decayed,
    "previous": lambda key: v - key @ M.previous,
    "another key": lambda key: v - OTHER * (lsmc.l2norm(vector("a")) @ M.decayed),
    "a key per head": lambda key: v - OTHER * (lsmc.l2norm(vector("a", per="head")) @ M.decayed),
    "both": lambda key: v - 0.5 * (key @ M.decayed) - 0.25 * (key @ M.previous),
}

MAPS: dict[str, Callable[[Term], Term]] = {
    "plain": lambda x: x,
    "silu": lsmc.silu,
    "elu + 1": lambda x: lsmc.elu(x) + 1,
    "exp": lambda x: lsmc.exp(0.5 * x),
    "sigmoid": lsmc.sigmoid,
    "relu": lambda x: lsmc.relu(x) + 0.125 * x,
    "tanh": lsmc.tanh,
    "softmax": lsmc.softmax,
    "l2norm": lsmc.l2norm,
    "rmsnorm": lsmc.rmsnorm,
}

POSITIVE = ("elu + 1", "exp", "sigmoid", "softmax")

VALUES: dict[str, Callable[[Term, Term], Term]] = {
    "plain": lambda write, key: write,
    "strength": lambda write, key: scalar("beta") * write,
    "a write per head": lambda write, key: write + outer(vector("w", per="head"), v),
    "two writes": lambda write, key: scalar("beta") * write + outer(lsmc.tanh(vector("w")), lsmc.tanh(v)),
    "a write that corrects the first": lambda write, key: write + scalar("beta") * outer(
        other := lsmc.l2norm(vector("w")), v - other @ (M.decayed + write)),
}

READOUTS: dict[str, Callable[[Term, Term], Term]] = {
    "after": lambda query, key: query @ M,
    "decayed": lambda query, key: query @ M.decayed,
    "before": lambda query, key: query @ M.previous,
    "bonus": lambda query, key: query @ (M.previous + outer(vector("u", per="head") * key, v)),
    "skip": lambda query, key: query @ M + scalar("D", per="head") * v,
    "gated": lambda query, key: lsmc.sigmoid(vector("z", over="V")) * (query @ M),
    "two queries": lambda query, key: query @ M + lsmc.tanh(vector("p")) @ M.previous,
    "normaliser": lambda query, key: (query @ M) / (query @ M.normalizer + 1),
}


@dataclass(frozen=True)
class Drawn:
    """The choices that make one declaration; printed by hypothesis when a law fails."""

    decay: str
    read: str
    key: str
    query: str
    value: str
    readout: str
    momentum: str = "none"

    def declaration(self) -> LSM:
        key = MAPS[self.key](k)
        if self.read != "none" and self.key != "l2norm":
            key = lsmc.l2norm(key)  # an update that corrects what it reads is stable for keys of norm ≤ 1
        write = outer(key, READS[self.read](key))
        return LSM(
            "drawn",
            decay=DECAYS[self.decay](),
            momentum=MOMENTA[self.momentum](),
            update=VALUES[self.value](write, key),
            readout=READOUTS[self.readout](MAPS[self.query](q), key),
        )

    def __str__(self) -> str:
        return f"Drawn({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"


def body(declaration: LSM) -> str:
    """The canonical form without the method's name."""
    return str(declaration.canonical).replace(declaration.name, "method", 1)


_ZOO = frozenset(body(method) for method in lsmc.zoo.METHODS)


@st.composite
def declarations(draw: st.DrawFn) -> Drawn:
    """Choices that make a declaration with a chunk form that is not in the zoo."""
    decay = draw(st.sampled_from(list(DECAYS)))
    read = "none" if decay in OVER_V else draw(st.sampled_from(list(READS)))
    momentum = draw(st.sampled_from(list(MOMENTA))) if decay in PLAIN else "none"
    alone = momentum == "none" and decay not in (*OVER_V, *ROTATING)
    readout = draw(st.sampled_from([r for r in READOUTS if r != "normaliser" or alone]))
    maps = POSITIVE if readout == "normaliser" else tuple(MAPS)
    values = [name for name in VALUES if (readout != "normaliser" or name not in ("a write per head", "two writes"))
              and (decay not in OVER_V or "corrects" not in name)]
    made = Drawn(
        decay=decay,
        read=read,
        key=draw(st.sampled_from(maps)),
        query=draw(st.sampled_from(maps)),
        value=draw(st.sampled_from(values)),
        readout=readout,
        momentum=momentum,
    )
    if made.key == made.query == "plain" and body(made.declaration()) in _ZOO:
        made = Drawn(**{**vars(made), "key": "silu"})
    return made


BENT: dict[str, Callable[[Term], Term]] = {
    "tanh": lambda read: lsmc.tanh(v - read),
    "softmax": lambda read: v - lsmc.softmax(read),
    "norm": lambda read: v - read / (1 + lsmc.norm2(read)),
    "affine": lambda read: v - 0.5 * read,
}
"""What is written as a function of what is read."""

MATRICES: dict[str, Callable[[], Decay]] = {
    "of every token": lambda: Matrix("A"),
    "of vectors": lambda: Matrix(-lsmc.softplus(vector("f", over="V")) * lsmc.exp(matrix("a", per="head"))),
    "that turns": lambda: Matrix("A") * Rotation("theta"),
    "whose entries turn": lambda: Vector("g") * Rotation(vector("dt", over="V") * matrix("omega", per="head")),
    "that turns beside V": lambda: Vector("g", over="V") * Rotation("theta"),
}
"""Decays that are no products over K and V."""


@dataclass(frozen=True)
class Wider:
    """The choices of a declaration beyond products of tiles: reads at a block's start, keys of pairs, or a decay of matrices."""

    decay: str
    key: str = "plain"
    readout: str = "after"
    block: int | None = None
    bent: str = "affine"
    bias: bool = False
    pairs: bool = False

    def declaration(self) -> LSM:
        key, query = (lsmc.pairs(MAPS[self.key](x)) if self.pairs else MAPS[self.key](x) for x in (k, q))
        key = lsmc.l2norm(k) if self.block else key
        write = v if self.block is None else scalar("beta") * BENT[self.bent](key @ M + M.bias if self.bias else key @ M)
        readout = READOUTS[self.readout](query, key)
        decay = {**DECAYS, **MATRICES}[self.decay]()
        return LSM("wider", decay=decay, block=self.block, update=outer(key, write), readout=readout + M.bias if self.bias else readout)


@st.composite
def wider(draw: st.DrawFn) -> Wider:
    """Choices that make a declaration whose chunk form is more than products of tiles."""
    kind = draw(st.sampled_from(["block", "block", "pairs", "matrix"]))
    plain = [name for name in READOUTS if name not in ("normaliser", "bonus", "two queries")]
    if kind == "block":
        block, decay = draw(st.sampled_from([1, 2, 4, 16, 24])), draw(st.sampled_from(list(DECAYS)))
        bias = decay in (*PLAIN, "vector over V") and draw(st.booleans())
        return Wider(decay, readout=draw(st.sampled_from(plain)), block=block, bent=draw(st.sampled_from(list(BENT))), bias=bias)
    if kind == "pairs":
        decay = draw(st.sampled_from([*PLAIN, "vector over V"]))
        key, readout = draw(st.sampled_from(["plain", "silu", "sigmoid"])), draw(st.sampled_from(plain))
        return Wider(decay, key, "normaliser" if key == "sigmoid" and decay in PLAIN else readout, pairs=True)
    return Wider(draw(st.sampled_from(list(MATRICES))), draw(st.sampled_from(["plain", "tanh"])), draw(st.sampled_from([*plain, "bonus"])))
