"""The compiler's law: what it derives for any declaration is what the declaration's recurrence does, step by step."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lsmc import LSM, reference, zoo
from lsmc.cases import CHUNKS, GATES, Case, sample, tensors
from lsmc.laws import LAWS, _cotangents, _gradients, _Skip, _Tally
from lsmc.schedules import CUTS
from tests.declarations import Drawn, Wider, body, declarations, wider

TOLERANCE = 1e-10
EXAMPLES = int(os.environ.get("LSMC_EXAMPLES", "150"))
TIMES = (1, 2, 15, 16, 17, 31, 33, 47, 48, 50, 63, 64, 65, 70)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    return Case(
        batch=draw(st.integers(1, 2)),
        time=draw(st.sampled_from(TIMES)),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 1, 2])),
        key_dim=draw(st.integers(1, 6)),
        value_dim=draw(st.integers(1, 5)),
        chunk=draw(st.sampled_from(CHUNKS)),
        gates=draw(st.sampled_from(list(GATES))),
        scale=draw(st.sampled_from([1.0, 0.5])),
        initial_state=draw(st.booleans()),
        cuts=tuple(draw(st.sampled_from([(), (), (5, 5, 21), (0, 16), (17, 200, 200)]))),
        seed=draw(st.integers(0, 999)),
    )


def errors(names: list[str], found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """RMS of the difference over the RMS of the reference. What cancels to nothing, such as the gradient of a softmax
    over one element or of a gate that nothing outlives, is measured against 1e-3 of the largest of `wanted`, or of 1."""
    rms = [float(x.detach().square().mean().sqrt()) if x.numel() else 0.0 for x in wanted]
    floor = 1e-3 * max(1.0, *rms)
    out = {}
    for name, x, y, size in zip(names, found, wanted, rms, strict=True):
        assert x.shape == y.shape, name
        assert torch.isfinite(x).all(), f"{name} has {int((~torch.isfinite(x)).sum())} elements that are not finite"
        if x.numel():
            out[name] = float((x - y).detach().square().mean().sqrt()) / max(size, floor)
    return out


def outputs(op: Any, inputs: dict[str, Tensor], state: Any, **options: Any) -> list[Tensor]:
    o, final = op(**inputs, initial_state=state, return_final_state=True, **options)
    return [o, *tensors(final)]


@given(drawn=declarations(), case=drawn_cases(), schedule=st.sampled_from(list(CUTS)))
@settings(max_examples=EXAMPLES)
def test_derived_programs_equal_the_recurrence(drawn: Drawn, case: Case, schedule: str) -> None:
    """Output, final state and every gradient, float64, for every schedule, chunk length and range of gates."""
    for name in ("decay", "read", "readout"):
        event(f"{name}: {getattr(drawn, name)}")
    event(f"gates: {case.gates}, chunk {case.chunk}, {schedule}, packed {bool(case.cuts)}")
    equals_the_recurrence(drawn.declaration(), case, schedule, str(drawn))


@given(drawn=wider(), case=drawn_cases(), schedule=st.sampled_from(list(CUTS)))
@settings(max_examples=max(8, EXAMPLES // 8))
def test_programs_without_kernels_equal_the_recurrence(drawn: Wider, case: Case, schedule: str) -> None:
    """Reads at a block's start of whatever length, which a call may begin within; keys of pairs; decays of matrices."""
    equals_the_recurrence(drawn.declaration(), dataclasses.replace(case, time=min(case.time, 50)), schedule, str(drawn))


def equals_the_recurrence(op: LSM, case: Case, schedule: str, drawn: str) -> None:
    options: dict[str, Any] = {"scale": case.scale}
    if case.cuts:
        case = dataclasses.replace(case, batch=1)
        options["cu_seqlens"] = torch.tensor([0, *(stop for _, stop in case.pieces)], dtype=torch.int32)
    given_ = sample(op, case, batch=len(case.pieces) if case.cuts else None)
    wanted = outputs(reference(op), given_.inputs, given_.state, **options)
    found = outputs(op, given_.inputs, given_.state, chunk=case.chunk, schedule=schedule, **options)
    ends = ["the output", *(f"the final {f.name}" for f in op.canonical.states)]
    leaves = given_.leaves()
    names = [f"the gradient of {name}" for name in [*given_.inputs, *(f.name for f in op.canonical.states)][: len(leaves)]]
    wanted_gradients = _gradients(wanted, leaves, case.seed)
    assert all(torch.isfinite(x).all() for x in [*wanted, *wanted_gradients])
    assume(all(float(x.detach().abs().max()) < 1e4 for x in [*wanted, *wanted_gradients] if x.numel()))  # else it diverges
    seen = errors(ends, found, wanted) | errors(names, _gradients(found, leaves, case.seed), wanted_gradients)
    bad = {name: e for name, e in seen.items() if e > TOLERANCE}
    assert not bad, f"{drawn}\n{case}\nrelative RMS errors {bad}"


@given(drawn=declarations(), case=drawn_cases())
@settings(max_examples=max(8, EXAMPLES // 8))
def test_every_law_of_check_holds(drawn: Drawn, case: Case) -> None:
    """Splitting, decoding, causality, packing and the adjoint identity, as `lsmc check` tests them for users."""
    op = drawn.declaration()
    case = dataclasses.replace(case, cuts=case.cuts or (3, 3, 18), time=min(case.time, 40))
    for name, law in LAWS.items():
        if name != "chunk_form_equals_recurrence":
            try:
                law(op, case, _Tally())
            except _Skip:
                event("diverged")


@given(drawn=declarations())
@settings(max_examples=EXAMPLES)
def test_drawn_declarations_are_not_in_the_zoo(drawn: Drawn) -> None:
    """The laws above speak about methods that nothing in the tree was written for."""
    assert body(drawn.declaration()) not in {body(method) for method in zoo.METHODS}


def test_cotangents_reach_every_output() -> None:
    """The projection that the gradients are taken of has no zero entry, so no error can hide behind it."""
    assert all((c != 0).all() for c in _cotangents([torch.zeros(3, 4), torch.zeros(2)], 0))
