"""The graph passes of `lsmc.compile`, applied to what Dynamo captured, before AOTAutograd and Inductor see it.

A pass is `graph module → what it changed, in words`; `PASSES` lists them in order. Those that insert collectives
(`lsmc.runtime.insert`) come before the last: they rewrite the same graph, and autograd derives their backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from lsmc.errors import LsmError
from lsmc.lowering import ops
from lsmc.lowering.absorb import absorb

log = logging.getLogger("lsmc.passes")
Pass = Callable[[GraphModule], list[str]]


def find(module: GraphModule) -> list[str]:
    """Record on each LSM node which plan it runs; later passes and reports read it from `meta["lsm"]`."""
    found = []
    for _, node in ops.in_graph(module):
        plan = ops.plan_of(str(node.args[3]))
        node.meta["lsm"] = plan
        found.append(f"{node.name} runs {plan.name} in chunks of {plan.chunk}, schedule {plan.forward.choice.schedule.name}")
    return found


def drop_unused_states(module: GraphModule) -> list[str]:
    """Remove the `getitem` of final states that nothing uses, so that no code is generated around them."""
    dropped = []
    for inner, node in ops.in_graph(module):
        for user in list(node.users):
            if not user.users and user.op == "call_function":
                dropped.append(f"{user.name} of {node.name}")
                inner.graph.erase_node(user)
        inner.graph.lint()
        inner.recompile()
    return dropped


OVERLAP: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits_iterative"],
}
"""How Inductor orders a graph with collectives: they start as soon as they can, and are waited for as late as possible."""

SOUND: dict[str, Any] = {"triton.mix_order_reduction": False}
"""What Inductor gets wrong in a graph with collectives (torch 2.11 and 2.13, on GPUs): a sum over rows that it fuses with
sums of rows becomes a new tensor, even where it was to be a piece of a `cat`, which is then sent with whatever was in its memory.
Gradients that go in one message are such pieces: those of norms over thousands of tokens were lost, without a word."""

PASSES: dict[str, Pass] = {"find": find, "absorb": absorb, "drop_unused_states": drop_unused_states}


def compile_graph(module: GraphModule, example_inputs: Sequence[Any], disable: Sequence[str] = (),
                  inserted: Mapping[str, Pass] | None = None, mode: str = "default",
                  options: Mapping[str, Any] | None = None) -> Any:
    """The backend that `lsmc.compile` gives to torch.compile: the passes, those of a mesh before the last, then Inductor, with its
    `options` over those of a `mode`."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    *first, last = PASSES.items()
    for name, run in (*first, *(inserted or {}).items(), last):
        if name in disable:
            log.info("%s: switched off", name)
            continue
        try:
            changes = run(module)
        except LsmError as error:
            return _raising(error)
        for change in changes or ["nothing to change"]:
            log.info("%s: %s", name, change)
    patches = {**({**OVERLAP, **SOUND} if inserted else {}), **list_mode_options(mode), **(options or {})}
    return compile_fx(module, list(example_inputs), config_patches=patches or None)


def _raising(error: LsmError) -> Callable[..., Any]:
    """What a graph becomes that cannot be compiled: the mistake itself reaches the caller, not the tracer's report of it."""
    def run(*_: Any) -> Any:
        raise error

    return run
