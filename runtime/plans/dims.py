"""Which dimensions of operands and results are one: how a split of one tensor becomes a split of its neighbours.

    y = linear(x, w)          y's last dimension is w's first
    h = y.unflatten(-1, (H, K))   H of h is y's last dimension, in blocks of K
    q, k = y.split([a, b])    q's last dimension is the first span of y's

A `Link` carries a `Split` from an operand to a result and back. Names of functions are torch's, of tensor methods or
operators alike; a function without a rule here has no links: what it takes and gives stays whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lsmc.lowering.torch_maps import CASTS, POINTWISE
from lsmc.runtime.insert import example
from lsmc.runtime.spread import name_of

Span = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Along `dim`, each span is dealt out evenly, a contiguous part for each rank; what lies between spans is whole."""

    dim: int
    spans: frozenset[Span]

    def __str__(self) -> str:
        return f"dimension {self.dim} at {', '.join(f'{a}:{b}' for a, b in sorted(self.spans))}"

    def merged(self, other: Split) -> Split | None:
        """Both splits at once; None where they are of different dimensions or their spans overlap."""
        if self.dim != other.dim:
            return None
        spans = sorted(self.spans | other.spans)
        if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            return None
        return Split(self.dim, frozenset(spans))

    def local(self, size: int, ranks: int) -> int:
        """How much of `size` along the dimension a rank has."""
        dealt = sum(b - a for a, b in self.spans)
        return size - dealt + dealt // ranks

    def covers(self, size: int) -> bool:
        """Whether nothing of `size` along the dimension is whole."""
        return sum(b - a for a, b in self.spans) == size

    def flat(self) -> list[int]:
        """The spans as operators take them."""
        return [edge for span in sorted(self.spans) for edge in span]


Map = Callable[[Split], Split | None]


class Link(NamedTuple):
    """`forth` carries a split of `operand` to `result`, `back` the other way; None where nothing corresponds."""

    operand: Node
    result: Node
    forth: Map
    back: Map


def shape_of(node: Node) -> tuple[Any, ...]:
    value = example(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def arguments(node: Node) -> Any:
    """What stands in the brackets of a call, for which there are as many types as functions."""
    return node.args


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """One argument, given by place or by name."""
    return arguments(node)[place] if len(arguments(node)) > place else node.kwargs.get(name, default)


def sizes_of(node: Node) -> list[int]:
    """How long the pieces of a `split` or `chunk` are."""
    source = arguments(node)[0]
    total = shape_of(source)[dim_of(node)]
    by: Any = argument(node, 1, "chunks", node.kwargs.get("split_size_or_sections", node.kwargs.get("split_size")))
    if isinstance(by, int):
        each = by if name_of(node) == "split" else -(-total // by)
        return [min(each, total - start) for start in range(0, total, each)]
    return [int(n) for n in by]


def dim_of(node: Node) -> int:
    """The dimension that a `split`, `chunk`, `unbind`, `cat` or `stack` works along, from the front."""
    place = {"split": 2, "chunk": 2}.get(name_of(node), 1)
    first = arguments(node)[0]
    rank = len(shape_of(first if isinstance(first, Node) else first[0]))
    return int(argument(node, place, "dim", 0)) % (rank + (name_of(node) == "stack"))


# --- the ways in which dimensions correspond


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _renamed(operand: Node, result: Node, dims: Mapping[int, int]) -> Link:
    """Dimension d of the operand is dims[d] of the result."""
    inverse = {r: o for o, r in dims.items()}

    def by(table: Mapping[int, int]) -> Map:
        return lambda s: Split(table[s.dim], s.spans) if s.dim in table else None

    return Link(operand, result, by(dims), by(inverse))


def _aligned(operand: Node, result: Node) -> Link:
    """Dimensions from the last on, but where the operand is repeated."""
    a, b = shape_of(operand), shape_of(result)
    behind = len(b) - len(a)
    return _renamed(operand, result, {d: d + behind for d in range(len(a)) if _same(a[d], b[d + behind])})


def _cut(operand: Node, result: Node, dim: int, start: int, size: int) -> Link:
    """The result is the part of the operand from `start` on."""

    def forth(s: Split) -> Split | None:
        if s.dim != dim:
            return s
        inside = frozenset((a - start, b - start) for a, b in s.spans if start <= a and b <= start + size)
        return Split(dim, inside) if inside else None

    def back(s: Split) -> Split:
        return s if s.dim != dim else Split(dim, frozenset((a + start, b + start) for a, b in s.spans))

    return Link(operand, result, forth, back)


def _flipped(link: Link) -> Link:
    return Link(link.result, link.operand, link.back, link.forth)


def _groups(old: Sequence[Any], new: Sequence[Any]) -> Iterator[tuple[range, range]]:
    """The runs of dimensions that a view turns into each other."""
    i = j = 0
    while i < len(old) and j < len(new):
        a, b, m, n = i + 1, j + 1, old[i], new[j]
        while not _same(m, n):
            if a < len(old) and (b == len(new) or (isinstance(m, int) and isinstance(n, int) and m < n) or not isinstance(m, int)):
                m, a = m * old[a], a + 1
            elif b < len(new):
                n, b = n * new[b], b + 1
            else:
                return
        yield range(i, a), range(j, b)
        i, j = a, b


def _viewed(operand: Node, result: Node) -> Link:
    """The same numbers in other dimensions: a block of a fused dimension is a split of one of its factors."""
    a, b = shape_of(operand), shape_of(result)
    groups = list(_groups(a, b))

    def across(s: Split, there: int, sizes: tuple[Any, ...], others: tuple[Any, ...]) -> Split | None:
        for group in groups:
            mine, theirs = group[there], group[1 - there]
            if s.dim not in mine:
                continue
            if len(mine) == len(theirs) == 1:
                return Split(theirs[0], s.spans)
            if len(theirs) == 1:
                return Split(theirs[0], _fused(s.spans, s.dim - mine[0], [sizes[d] for d in mine]))
            if len(mine) == 1:
                factors = [others[d] for d in theirs]
                for place in range(len(factors)):
                    spans = _unfused(s.spans, place, factors)
                    if spans and _fused(spans, place, factors) == s.spans:
                        return Split(theirs[place], spans)
        return None

    return Link(operand, result, lambda s: across(s, 0, a, b), lambda s: across(s, 1, b, a))


def _fused(spans: frozenset[Span], place: int, factors: Sequence[int]) -> frozenset[Span]:
    """Spans of one factor as spans of the product."""
    inner, size = math.prod(factors[place + 1 :]), factors[place]
    starts = [outer * size * inner for outer in range(math.prod(factors[:place]))]
    return frozenset((start + a * inner, start + b * inner) for start in starts for a, b in spans)


def _unfused(spans: frozenset[Span], place: int, factors: Sequence[int]) -> frozenset[Span]:
    """What spans of the product are in the first of its blocks along one factor."""
    inner = math.prod(factors[place + 1 :])
    first = [(a, b) for a, b in spans if a < factors[place] * inner]
    if any(a % inner or b % inner for a, b in first):
        return frozenset()
    return frozenset((a // inner, b // inner) for a, b in first)


# --- the rules


def _operands(node: Node) -> list[Node]:
    return [n for n in dict.fromkeys(node.all_input_nodes) if isinstance(example(n), Tensor)]


def _pointwise(node: Node) -> list[Link]:
    return [_aligned(x, node) for x in _operands(node)]


def _view(node: Node) -> list[Link]:
    return [_viewed(_first(node), node)]


def _first(node: Node) -> Node:
    first: Any = arguments(node)[0] if arguments(node) else node.kwargs["input"]
    return first


def _sizes(args: Sequence[Any]) -> list[Any]:
    """Numbers given one by one or as one list."""
    return list(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else list(args)


def _permute(node: Node) -> list[Link]:
    rank = len(shape_of(node))
    if name_of(node) == "permute":
        order = [d % rank for d in _sizes(arguments(node)[1:] or (node.kwargs["dims"],))]
    else:
        order = list(range(rank))
        i, j = (int(d) % rank for d in (arguments(node)[1:3] if name_of(node) == "transpose" else (0, 1)))
        order[i], order[j] = order[j], order[i]
    return [_renamed(_first(node), node, {old: new for new, old in enumerate(order)})]


def _getitem(node: Node) -> list[Link]:
    source, index = arguments(node)
    if not isinstance(example(source), Tensor):
        return _piece(node, source, index)
    given = list(index) if isinstance(index, tuple) else [index]
    if not all(x is None or x is Ellipsis or isinstance(x, int | slice) for x in given):
        return []
    rest = len(shape_of(source)) - sum(x is not None and x is not Ellipsis for x in given)
    at = given.index(Ellipsis) if Ellipsis in given else len(given)
    given[at : at + 1] = [slice(None)] * rest
    dims, old, new = {}, 0, 0
    for x in given:
        if x == slice(None):
            dims[old] = new
        old, new = old + (x is not None), new + (x is None or isinstance(x, slice))
    return [_renamed(source, node, dims)]


def _piece(node: Node, several: Node, index: Any) -> list[Link]:
    """One of several results."""
    name = name_of(several)
    if name in ("split", "chunk"):
        sizes = sizes_of(several)
        return [_cut(_first(several), node, dim_of(several), sum(sizes[:index]), sizes[index])]
    if name == "unbind":
        dim = dim_of(several)
        rank = len(shape_of(node)) + 1
        return [_renamed(_first(several), node, {d: d - (d > dim) for d in range(rank) if d != dim})]
    return []


def _cat(node: Node) -> list[Link]:
    dim, start, found = dim_of(node), 0, []
    for x in arguments(node)[0]:
        size = shape_of(x)[dim]
        if not isinstance(size, int):
            return [_renamed(y, node, {d: d for d in range(len(shape_of(y))) if d != dim}) for y in arguments(node)[0]]
        found.append(_flipped(_cut(node, x, dim, start, size)))
        start += size
    return found


def _stack(node: Node) -> list[Link]:
    dim = dim_of(node)
    return [_renamed(x, node, {d: d + (d >= dim) for d in range(len(shape_of(x)))}) for x in arguments(node)[0]]


def _pad(node: Node) -> list[Link]:
    source, rank = _first(node), len(shape_of(node))
    by = list(argument(node, 1, "pad"))
    padded = {rank - 1 - i // 2 for i, n in enumerate(by) if n != 0}
    return [_renamed(source, node, {d: d for d in range(rank) if d not in padded})]


def _rows(node: Node) -> list[Link]:
    """Functions over some dimensions, of which the others know nothing."""
    source = _first(node)
    rank, left = len(shape_of(source)), len(shape_of(node))
    over = over_dims(node)
    if left == rank:
        return [_renamed(source, node, {d: d for d in range(rank) if d not in over})]
    kept = [d for d in range(rank) if d not in over]
    return [_renamed(source, node, {d: i for i, d in enumerate(kept)})]


def over_dims(node: Node) -> set[int]:
    """The dimensions that a sum, norm or softmax is taken over."""
    rank = len(shape_of(_first(node)))
    name = name_of(node)
    if name in ("rms_norm", "layer_norm"):
        return set(range(rank - len(argument(node, 1, "normalized_shape")), rank))
    place = {"normalize": 2, "norm": 2, "vector_norm": 2}.get(name, 1)
    dims = argument(node, place, "dim", 1 if name == "normalize" else None)
    if dims is None:
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)}


def _linear(node: Node) -> list[Link]:
    x, w, bias = _first(node), argument(node, 1, "weight"), argument(node, 2, "bias")
    last = len(shape_of(node)) - 1
    found = [_renamed(x, node, {d: d for d in range(last)}), _renamed(w, node, {0: last}), _renamed(x, w, {last: 1})]
    return found + ([_renamed(bias, node, {0: last})] if bias is not None else [])


def _matmul(node: Node) -> list[Link]:
    a, b = _first(node), argument(node, 1, "other" if name_of(node) == "matmul" else "mat2")
    ranks, rank = (len(shape_of(a)), len(shape_of(b))), len(shape_of(node))
    if min(ranks) < 2:
        return []
    found = []
    for x, n, own, result in ((a, ranks[0], ranks[0] - 2, rank - 2), (b, ranks[1], ranks[1] - 1, rank - 1)):
        dims = {d: d + rank - n for d in range(n - 2) if _same(shape_of(x)[d], shape_of(node)[d + rank - n])}
        found.append(_renamed(x, node, dims | {own: result}))
    return [*found, _renamed(a, b, {ranks[0] - 1: ranks[1] - 2})]


_ALIKE = (
    *POINTWISE, *CASTS, "where", "maximum", "minimum", "masked_fill", "leaky_relu", "logaddexp", "clone", "detach",
    "double", "type", "eq", "ne", "lt", "le", "gt", "ge", "mish", "hardswish", "softsign", "pos", "zeros_like", "ones_like",
    "rshift", "lsmc.drawn", "lsmc.everywhere",
)  # fmt: skip
_RULES: dict[str, Callable[[Node], list[Link]]] = {
    **dict.fromkeys((*_ALIKE, "expand", "expand_as"), _pointwise),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _view),
    **dict.fromkeys(("permute", "transpose", "t", "swapaxes"), _permute),
    **dict.fromkeys(
        ("sum", "mean", "norm", "vector_norm", "softmax", "log_softmax", "normalize", "rms_norm", "layer_norm", "logsumexp",
         "amax", "amin", "cumsum", "var", "std"), _rows),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "getitem": _getitem, "cat": _cat, "stack": _stack, "pad": _pad, "linear": _linear,
}  # fmt: skip

REPEATS = frozenset((*_ALIKE, "expand", "expand_as", "linear", "matmul", "bmm", "mm", "cat"))
"""Functions that may take an operand that lacks a dimension of the result, or repeats it."""

LINEAR = frozenset(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "contiguous",
                    "neg", "getitem"))  # fmt: skip
"""Functions of one tensor that a sum of tensors may pass through, one by one."""


def links(node: Node) -> list[Link]:
    """How the dimensions of what a node calls correspond; none for what has no rule."""
    rule = _RULES.get(name_of(node)) if node.op in ("call_function", "call_method") else None
    if rule is None or not isinstance(example(node), Tensor):
        return []
    return rule(node)


__all__ = ["LINEAR", "REPEATS", "Link", "Span", "Split", "argument", "arguments", "dim_of", "links", "over_dims", "shape_of",
           "sizes_of"]  # fmt: skip
