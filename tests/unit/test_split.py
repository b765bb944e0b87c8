"""Laws of split sequences, all ranks in one process: what they send and correct gives what one rank computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lsmc
from lsmc import LSM, M, Vector, errors, k, outer, q, v
from lsmc.api import _spec_of
from lsmc.cases import GATES, Case, Sample, sample, tensors
from lsmc.inputs import every_head
from lsmc.lowering import ops, split
from lsmc.summary import message
from lsmc.zoo import METHODS
from tests.declarations import Drawn, declarations

CASE = Case(batch=2, time=12, heads=1, groups=2, key_dim=3, value_dim=2, scale=0.5, initial_state=True)
normalised = LSM("normalised", decay=Vector("g"), update=outer(lsmc.exp(k / 2), v),
                 readout=(lsmc.exp(q / 2) @ M) / (lsmc.exp(q / 2) @ M.normalizer + 1))


def spec_of(op: LSM, case: Case) -> str:
    return _spec_of(op.key, "cpu", (case.scale, case.chunk, None, False), None)


def on_one(op: LSM, case: Case, drawn: Sample) -> list[Tensor]:
    """o and the final memories."""
    o, state = op(**drawn.inputs, initial_state=drawn.state, return_final_state=True, scale=case.scale, chunk=case.chunk)
    return [o, *tensors(state)]


def on_several(op: LSM, case: Case, drawn: Sample, ranks: int) -> list[Tensor]:
    """The same from ranks that see their own tokens and the summaries of all."""
    spec, sizes, lsm = spec_of(op, case), [case.key_dim, case.value_dim], torch.ops.lsmc
    plan, (kind, twice) = ops.plan_of(spec), split.way(spec)
    start = [s[..., None] if len(f.dims) == 1 else s for f, s in zip(op.canonical.states, tensors(drawn.state))]
    n = case.time // ranks
    layer = {f.name for f in op.canonical.inputs if f.per == "layer"}

    def given(name: str, r: int) -> Tensor:
        x = drawn.between(r * n, (r + 1) * n)[name]
        return every_head(x, case.heads * case.groups) if name in layer else x

    inputs = [[given(name, r) for name in plan.inputs] for r in range(ranks)]
    alone, packs = [], []
    for mine in inputs:
        if kind == "columns":
            *found, pack = lsm.columns(mine, spec)
        else:
            o, *states = lsm.fwd(mine, [], None, spec)
            found, pack = [o], lsm.summary(mine, spec) if kind == "sums" else lsm.remembered(mine, states, spec)
        alone.append(found)
        packs.append(pack)
        assert pack.shape[2] == split.message(spec, *sizes)
    outputs = []
    for r, mine in enumerate(inputs):
        states = lsm.incoming(torch.cat(packs), start, torch.tensor(r), ranks, sizes, spec)
        if twice:
            outputs.append(lsm.fwd(mine, states, None, spec)[0])
        elif kind == "columns":
            outputs.append(lsm.through(*alone[r], states))
        else:
            outputs.append(lsm.corrected(alone[r][0], mine, states, spec))
    ends = lsm.incoming(torch.cat(packs), start, None, ranks, sizes, spec)
    return [torch.cat(outputs, 1), *(e.squeeze(-1) if len(f.dims) == 1 else e for f, e in zip(op.canonical.states, ends))]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).abs().max() <= 1e-9 * y.abs().max() + 1e-10


def check(op: LSM, case: Case, ranks: int) -> None:
    drawn = sample(op, case)
    found, wanted = on_several(op, case, drawn, ranks), on_one(op, case, drawn)
    close(found, wanted)
    weights = [torch.randn_like(x) for x in wanted]
    close(*([torch.zeros_like(x) if d is None else d for x, d in zip(drawn.leaves(), torch.autograd.grad(
        sum((x * w).sum() for x, w in zip(outputs, weights)), drawn.leaves(), allow_unused=True))]
        for outputs in (found, wanted)))  # fmt: skip


@pytest.mark.parametrize("op", [*METHODS, normalised], ids=lambda op: op.name)
def test_ranks_that_exchange_summaries_compute_what_one_computes(op: LSM) -> None:
    """Output, final memories and every gradient, with gates of all sizes side by side; or the method is refused by its name."""
    if message(op.canonical) == "none":
        with pytest.raises(errors.LsmNoChunkFormError, match=f"{op.name} has no summary"):
            split.way(spec_of(op, CASE))
        return
    check(op, dataclasses.replace(CASE, gates="mixture"), ranks=4)


@settings(max_examples=3)
@given(drawn=declarations(), ranks=st.sampled_from([1, 2, 4]), gates=st.sampled_from(list(GATES)), seed=st.integers(0, 99))
def test_summaries_of_any_declaration_make_the_whole(drawn: Drawn, ranks: int, gates: str, seed: int) -> None:
    """Or the method is refused by its name."""
    op, refused = drawn.declaration(), None
    try:
        split.way(spec_of(op, CASE))
    except errors.LsmNoChunkFormError as error:
        refused = str(error)
    if refused is not None:
        assert op.name in refused
        return
    check(op, dataclasses.replace(CASE, gates=gates, seed=seed), ranks)


@pytest.mark.parametrize("op", [op for op in METHODS if message(op.canonical) != "none"], ids=lambda op: op.name)
def test_messages_are_as_long_as_the_list_of_methods_says(op: LSM) -> None:
    """K + K·V numbers for methods without reads, K·K + K·V for delta rules: what `lsmc list` prints."""
    K, V = 5, 3
    text = message(op.canonical).replace("·", "*")
    for many in ("2", "3"):
        text = text.replace(f"{many}K", f"{many}*K")
    assert split.message(spec_of(op, CASE), K, V) == eval(text, {"K": K, "V": V})
