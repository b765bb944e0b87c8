"""Tensor parallelism between the layers that it splits: what it leaves whole there is dealt out over tokens, on the same axis.

| in the graph, over `tp` | becomes |
|---|---|
| an all-reduce of (B, T, …) | a reduce-scatter over tokens |
| residuals, norms, routers: functions of single tokens that `plans.deal` left whole | themselves, of a rank's tokens |
| their entry into what heads and widths are split in | an all-gather, whose adjoint is a reduce-scatter |
| all else | itself, of gathered values |

As many bytes are exchanged as by the all-reduces, beside a few for routers, and a rank keeps and computes its share of tokens:
sequence parallelism in Megatron-LM (arXiv 2205.05198), Figure 2 of Linear-MoE (arXiv 2503.05447). It comes last: the tokens are
those that `sp` gave to the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from lsmc.lowering.absorb import mutates
from lsmc.runtime import collectives
from lsmc.runtime.errors import LsmMeshError
from lsmc.runtime.insert import Value
from lsmc.runtime.mesh import Axis
from lsmc.runtime.spread import POINTWISE, RULES, Split, Spread, name_of

SINGLE = POINTWISE | set("rms_norm layer_norm view reshape flatten unflatten softmax topk logsumexp sum mean scatter_add".split()
                         + "new_zeros new_ones new_full new_empty".split())
"""Functions of single tokens, and sums over them."""


class Between(Spread):
    """Rewrites a graph that `plans.deal` has dealt out."""

    def _inputs(self, nodes: Sequence[Node]) -> list[Node]:
        return []

    def _call(self, node: Node) -> Any:
        name, (args, kwargs) = name_of(node), self._operands(node, self.env.__getitem__)
        if name == "lsmc.summed" and node.args[1] == self.axis.group and self.of(args[0]) is None:
            x = args[0]
            if x.ndim == 3 and x.shape[1] % self.axis.size == 0:
                self.changes.append(f"{node.name} is dealt out over {x.shape[1]} tokens")
                return self.mark(collectives.scattered(x, 1, self.axis), Split(1, x.shape[1]))
        if name == "tag_activation_checkpoint":
            return self.rules[name](self, node, *args, **kwargs)
        if any(self.of(v) is not None for v in tree_leaves((args, kwargs)) if isinstance(v, Value)):
            if name == "lsmc.shared" and node.args[1] == self.axis.group:
                return self._entering(args[0])
            if self._apart(node, name, args):
                try:
                    return super()._call(node)
                except LsmMeshError:  # it is of more than one token after all
                    pass
            args, kwargs = tree_map(self._gathered, (args, kwargs))
        return self._copied(node, args, kwargs)

    def _apart(self, node: Node, name: str, args: Any) -> bool:
        """Whether a node is whole, and keeps tokens apart; a product, if its matrix is small beside them, as a router's is."""
        if name == "getitem":
            return isinstance(args[0].example, tuple | list)
        narrow = name == "linear" and self.of(args[1]) is None and args[1].shape[0] <= args[1].shape[1]
        return bool(node.meta.get("whole")) and (name in SINGLE or narrow)

    def _entering(self, value: Any) -> Any:
        """All tokens, for what is split; of a value and its views once."""
        if ("entering", value.node) not in self.memo:
            of = value.node.args[0]
            if name_of(value.node) in ("reshape", "contiguous") and of in self.place:
                made = self._entering(self.writer.proxy(of)).reshape(self.global_shape(value))
            else:
                made = self._joined(value, collectives.gathered)
            self.memo["entering", value.node] = made
        return self.memo["entering", value.node]

    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, Value) or self.of(value) is None:
            return value
        if ("whole", value.node) not in self.memo:
            self.memo["whole", value.node] = self._whole(value)
        return self.memo["whole", value.node]


def deal_tokens(module: GraphModule, axis: Axis) -> list[str]:
    """Deal out over tokens what stays whole between layers, unless something is written in place, which copies would miss."""
    graphs = [inner.graph for inner in module.modules() if isinstance(inner, GraphModule)]
    for node in (n for graph in graphs for n in graph.nodes if n.op.startswith("call")):
        if mutates(node):
            return [f"{node.name} writes in place: tokens stay whole between layers"]
    return Between(axis, 1, RULES).run(module)


__all__ = ["deal_tokens"]
