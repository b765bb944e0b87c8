"""Random numbers on a mesh: each is a function of the seed of the step and of its place in the whole tensor.

    dropout(x, p)   →   where(drawn(seed, n, places) ≥ 2³² p, x / (1 − p), 0)

for the n-th call of a graph; `places` are ranges along the dimensions of x. What the other plans do with ranges does the rest: a
part of them gives a part of the numbers. Ranks that hold the same values draw the same numbers, ranks with other tokens or
heads other ones, and a mesh of any shape draws those of any other. The seed comes from torch's generator on the first rank,
once a step, and is sent to the others, 8 bytes over each axis; regions that are computed again have it from outside.

The numbers are a hash of 32 bits, two rounds for each element and two for each row (C. Wellons, "hash-prospector", the constants
21f0aaad and d35a2d97): as much work as a few elementwise functions, with which Inductor fuses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lsmc.runtime import collectives
from lsmc.runtime.errors import LsmMeshError
from lsmc.runtime.insert import Value, Writer, example, mode_of, source
from lsmc.runtime.mesh import Axis
from lsmc.runtime.plans.dims import argument
from lsmc.runtime.spread import name_of

_LOW = (1 << 32) - 1
_library = torch.library.Library("lsmc", "FRAGMENT")


# --- the operators


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits; nothing exceeds 63 on the way."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW
    x = (x ^ (x >> 15)) * (0xD35A2D97 - (1 << 32)) & _LOW
    return x ^ (x >> 15)


def _drawn(seed: Tensor, call: int, places: Sequence[Tensor]) -> Tensor:
    """Uniform on 0 … 2³² − 1, int64, in the shape of the sum of `places`; `seed` () has 62 bits."""
    one = _mixed((seed & _LOW) ^ call)
    two = _mixed((seed >> 32) ^ one)
    for place in places[:-1]:
        one, two = _mixed(one ^ place), _mixed(two ^ place)
    return _mixed(_mixed(one ^ places[-1] if places else one) ^ two)


def _everywhere(x: Tensor, dim: int) -> Tensor:
    """x, whose entries along `dim` are needed on every rank."""
    return x.view_as(x)


_library.define("drawn(Tensor seed, int call, Tensor[] places) -> Tensor")
_library.impl("drawn", _drawn, "CompositeImplicitAutograd")
_library.define("everywhere(Tensor x, int dim) -> Tensor")
_library.impl("everywhere", _everywhere, "CompositeImplicitAutograd")


# --- the plan


def place_numbers(module: GraphModule, *axes: Axis) -> list[str]:
    """Rewrite what draws random numbers; says what it was. Raises LsmMeshError for functions that are not known here."""
    nodes, writer, drawing = list(module.graph.nodes), Writer(module.graph, mode_of(module)), list(_drawing(module))
    seed: Any = None
    if drawing:
        like: Any = example(drawing[0])
        with module.graph.inserting_before(next(n for n in nodes if n.op != "placeholder")):
            seed = writer.create_proxy("call_function", torch.randint, (1 << 62, ()), {"device": like.device})
            for axis in axes:
                seed = collectives.summed(seed * (collectives.rank(seed, axis) == 0), axis)
    _rewrite(module, nodes, seed, writer)
    return [f"{node.name} draws numbers by their place" for node in drawing]


def _drawing(module: GraphModule) -> Iterator[Node]:
    """What draws numbers, in regions too."""
    for node in module.graph.nodes:
        if (body := _body(module, node)) is not None:
            yield from _drawing(body)
        elif _draws(node):
            yield node


def _draws(node: Node) -> bool:
    name = name_of(node)
    if name == "scaled_dot_product_attention":
        return bool(argument(node, 4, "dropout_p", 0.0))
    return node.op.startswith("call") and (name in RULES or name in OTHERS) and not _idle(node)


def _idle(node: Node) -> bool:
    """Whether it is a dropout that drops nothing."""
    if not node.op.startswith("call") or "dropout" not in name_of(node):
        return False
    training = argument(node, 2, "training", node.kwargs.get("train", True))
    return training is False or argument(node, 1, "p", 0.5) == 0


def _body(module: GraphModule, node: Node) -> GraphModule | None:
    """The region that a node computes again in the backward pass."""
    region: Any = node.args[0] if name_of(node) == "tag_activation_checkpoint" else None
    return None if region is None else getattr(module, region.target)


def _rewrite(module: GraphModule, nodes: Sequence[Node], seed: Any, writer: Writer) -> None:
    done: dict[GraphModule, bool] = {}
    for call, node in enumerate(nodes):
        writer.origin, value = node, None
        with module.graph.inserting_before(node), torch.enable_grad():
            if (body := _body(module, node)) is not None:
                if body not in done:
                    done[body] = any(_drawing(body))
                    _inside(body, seed if done[body] else None)
                if done[body]:
                    own: Any = torch.ops.lsmc.drawn.default(seed, call, [])
                    node.args = (*node.args, own.node)
            elif _idle(node):
                value = node.args[0]
            elif _draws(node):
                value = _placed(node, _Numbers(writer, seed, call)).node
        if isinstance(value, Node):
            node.replace_all_uses_with(value)
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()


def _inside(body: GraphModule, seed: Any) -> None:
    """Rewrite a region, which takes its seed, if it needs one, as its last argument."""
    nodes, writer, own = list(body.graph.nodes), Writer(body.graph, mode_of(body)), None
    if seed is not None:
        with body.graph.inserting_after([n for n in nodes if n.op == "placeholder"][-1]):
            own = body.graph.placeholder("seed")
        own.meta["example_value"] = seed.example
    _rewrite(body, nodes, own and writer.proxy(own), writer)


def _placed(node: Node, numbers: _Numbers) -> Any:
    """The same from numbers that are placed."""
    why = "draws numbers that would be each rank's own"
    if (rule := RULES.get(name_of(node))) is not None:
        args, kwargs = map_arg((node.args, node.kwargs), numbers.writer.proxy)
        try:
            return rule(numbers, *args, **kwargs)
        except TypeError as error:
            why = f"is called in a way that is not known to draw the same on every mesh ({error})"
    place = "".join(f"\n    {line}" for line in source(node))
    raise LsmMeshError(f"{name_of(node)} {why}{place}", help="dropout, rand, rand_like and bernoulli draw the same on every mesh")


class _Numbers:
    """The numbers of one call."""

    def __init__(self, writer: Writer, seed: Any, call: int) -> None:
        self.writer, self.seed, self.call = writer, seed, call

    def range(self, n: int) -> Any:
        return self.writer.create_proxy("call_function", torch.arange, (n,), {"device": self.seed.device})

    def of(self, shape: Sequence[int]) -> Any:
        """Uniform on 0 … 2³² − 1."""
        ranges, last = [self.range(n) for n in shape], len(shape) - 1
        places = [r[(slice(None), *(None,) * (last - d))] if d < last else r for d, r in enumerate(ranges)]
        return torch.ops.lsmc.drawn.default(self.seed, self.call, places)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Any:
        """Uniform on [0, 1), in steps that the type holds."""
        bits = min(32, 1 - round(math.log2(torch.finfo(dtype).eps)))
        return (self.of(shape) >> (32 - bits)).to(dtype) * 2.0**-bits

    def dropped(self, x: Value, p: float) -> Any:
        return x * 0 if p == 1 else torch.where(self.of(x.shape) >= round(p * 2**32), x * (1 / (1 - p)), 0.0)


# --- what functions become


def _dropout(n: _Numbers, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True) -> Any:
    if inplace:
        raise TypeError("inplace=True")
    return n.dropped(x, p)


def _attention(n: _Numbers, q: Value, k: Value, v: Value, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
               scale: float | None = None, enable_gqa: bool = False) -> Any:
    """Softmax attention in operations whose weights (…, T, T) are there to be dropped."""
    if enable_gqa:
        raise TypeError("enable_gqa=True")
    everywhere = torch.ops.lsmc.everywhere.default
    weights = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ everywhere(k.transpose(-2, -1), -1)
    if is_causal:
        weights = weights.masked_fill(n.range(q.shape[-2])[:, None] < n.range(k.shape[-2]), -math.inf)
    elif attn_mask is not None:
        bits = attn_mask.dtype == torch.bool
        weights = weights.masked_fill(attn_mask.logical_not(), -math.inf) if bits else weights + attn_mask
    return n.dropped(weights.softmax(-1), dropout_p) @ everywhere(v, -2)


def _rand(n: _Numbers, *size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Any:
    return n.uniform(size if isinstance(size[0], int) else size[0], dtype or torch.get_default_dtype())


def _rand_like(n: _Numbers, x: Value, dtype: torch.dtype | None = None) -> Any:
    return n.uniform(x.shape, dtype or x.dtype)


def _bernoulli(n: _Numbers, x: Value) -> Any:
    return (n.uniform(x.shape, x.dtype) < x).to(x.dtype)


RULES: dict[str, Callable[..., Any]] = {
    "dropout": _dropout, "rand": _rand, "rand_like": _rand_like, "bernoulli": _bernoulli,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip
"""Function → the same from numbers that are placed."""

OTHERS = frozenset((
    *"randn randn_like randint randint_like randperm normal multinomial poisson native_dropout rrelu alpha_dropout".split(),
    *"dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout uniform_ normal_ bernoulli_ random_".split(),
    *"exponential_ cauchy_ geometric_ log_normal_".split(),
))  # fmt: skip
"""Functions that draw numbers in other ways."""

__all__ = ["place_numbers"]
