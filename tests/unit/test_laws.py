"""`lsmc.check` finds what is wrong, says which law broke, and shows a small case: tested on operators with planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsmc
from lsmc import LSM, Identity, M, Scalar, Vector, cases, k, laws, outer, q, scalar, v, vector
from lsmc.reference import reference


class Recurrence:
    """A declaration whose operator is its recurrence: every law holds. Subclasses plant one fault each."""

    def __init__(self, declaration: LSM) -> None:
        self.declaration, self.canonical = declaration, declaration.canonical
        self.name, self.where = declaration.name, declaration.where

    def __call__(self, chunk: int | None = None, **options: Any) -> Any:
        return reference(self.declaration)(**options)

    def step(self, state: Any = None, scale: float = 1.0, **inputs: torch.Tensor) -> Any:
        token = {field.name for field in self.canonical.inputs if field.per == "token"}
        inputs = {name: x[:, None] if name in token else x for name, x in inputs.items()}
        o, state = reference(self.declaration)(
            **inputs, initial_state=state, return_final_state=True, scale=scale
        )
        return o[:, 0], state


class WrongInLongSequences(Recurrence):
    def __call__(self, **options: Any) -> Any:
        o, state = super().__call__(**{**options, "return_final_state": True})
        o = torch.where(torch.arange(o.shape[1])[:, None, None] > 19, o * (1 + 1e-8), o)
        return (o, state) if options.get("return_final_state") else o


class WrongGradient(Recurrence):
    def __call__(self, **options: Any) -> Any:
        v = options["v"]
        return super().__call__(**{**options, "v": v + 1e-3 * (v - v.detach())})


class SeesTheFuture(Recurrence):
    def __call__(self, **options: Any) -> Any:
        o, state = super().__call__(**{**options, "return_final_state": True})
        o = o + 1e-12 * options["v"].sum(1, keepdim=True)
        return (o, state) if options.get("return_final_state") else o


class ForgetsTheInitialState(Recurrence):
    def step(self, state: Any = None, **inputs: Any) -> Any:
        return super().step(state=None, **inputs)


class LeaksBetweenPackedSequences(Recurrence):
    def __call__(self, *, cu_seqlens: Any = None, **options: Any) -> Any:
        if cu_seqlens is None or options["initial_state"] is not None:
            return super().__call__(cu_seqlens=cu_seqlens, **options)
        o, state = super().__call__(**options)
        return o, state.expand(len(cu_seqlens) - 1, *state.shape[1:])


@pytest.fixture(autouse=True)
def _reference_of_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "reference", lambda op: reference(getattr(op, "declaration", op)))


def simple() -> LSM:
    return LSM("simple", decay=Scalar("g"), update=outer(k, v))


def test_all_laws_hold_for_the_recurrence_itself() -> None:
    report = laws.check(Recurrence(simple()), examples=6)
    assert list(report.laws) == list(laws.LAWS)
    assert all(tally.worst <= laws.TOLERANCE for tally in report.laws.values())
    assert all(tally.cases >= 6 + len(cases.CORNERS) - tally.skipped for tally in report.laws.values())
    assert "simple: 7 laws hold" in str(report)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        (WrongInLongSequences, "chunk_form_equals_recurrence"),
        (WrongInLongSequences, "split_equals_whole"),
        (WrongGradient, "chunk_form_equals_recurrence"),
        (WrongGradient, "adjoint_satisfies_the_dot_product_identity"),
        (WrongGradient, "gradients_equal_finite_differences"),
        (SeesTheFuture, "outputs_do_not_see_later_tokens"),
        (ForgetsTheInitialState, "decoding_equals_parallel"),
        (LeaksBetweenPackedSequences, "packed_equals_separate"),
    ],
)
def test_a_planted_fault_is_found_by_the_law_that_it_breaks(fault: type[Recurrence], law: str) -> None:
    with pytest.raises(lsmc.LsmCheckError, match=law.replace("_", " ")) as caught:
        laws.check(fault(simple()), examples=20, laws=[law])
    assert "the smallest failing case: Case(batch=1" in str(caught.value)


class Crashes(Recurrence):
    def __call__(self, **options: Any) -> Any:
        if options["v"].shape[1] > 2:
            raise IndexError("out of range")
        return super().__call__(**options)


def test_a_crash_is_reported_with_its_case_and_its_cause() -> None:
    with pytest.raises(lsmc.LsmCheckError, match="IndexError: out of range") as caught:
        laws.check(Crashes(simple()), examples=20, laws=["split_equals_whole"])
    assert "time=3" in str(caught.value)
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_failing_case_is_shrunk_to_the_smallest_that_fails() -> None:
    with pytest.raises(lsmc.LsmCheckError) as caught:
        laws.check(WrongInLongSequences(simple()), examples=30, laws=["chunk_form_equals_recurrence"])
    assert "time=21, heads=1, groups=1, key_dim=1, value_dim=1" in str(caught.value)


def test_a_corner_case_is_shrunk_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[cases.Case] = []

    def fails_from_five_tokens(case: cases.Case) -> None:
        seen.append(case)
        if case.time >= 5 and case.gates == "mixture":
            raise lsmc.LsmCheckError("no")

    with pytest.raises(lsmc.LsmCheckError):
        laws._shrunk(fails_from_five_tokens, cases.CORNERS[6])
    assert seen[-1] == cases.Case(time=5, gates="mixture")


def test_progress_is_a_line_for_each_law_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["split_equals_whole", "chunk_form_equals_recurrence"]
    laws.check(Recurrence(simple()), examples=1, laws=names, progress=True)
    assert capsys.readouterr().err.splitlines() == ["split equals whole …", "chunk form equals recurrence …"]
    with pytest.raises(lsmc.LsmCheckError):
        laws.check(WrongInLongSequences(simple()), examples=30, laws=names[:1], progress=True)
    assert capsys.readouterr().err.splitlines() == ["split equals whole …", "split equals whole: a smaller failing case …"]
    laws.check(Recurrence(simple()), examples=1, laws=names)
    assert capsys.readouterr().err == ""


def test_the_same_seed_draws_the_same_cases_and_another_seed_others() -> None:
    def drawn(seed: int) -> list[cases.Case]:
        seen: list[cases.Case] = []
        laws.LAWS["spy"] = lambda op, case, tally: seen.append(case)
        try:
            laws.check(Recurrence(simple()), examples=10, seed=seed, laws=["spy"])
        finally:
            del laws.LAWS["spy"]
        return seen

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize("gates", list(cases.GATES))
def test_gates_are_log_decays(gates: str) -> None:
    drawn = cases.GATES[gates]((3, 7), torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 7)
    assert drawn.dtype == torch.float64
    assert bool((drawn <= 0).all())


@pytest.mark.parametrize(
    "decay",
    [
        Scalar(-lsmc.exp(scalar("a", per="head")) * lsmc.softplus(scalar("dt"))),
        Vector(lsmc.logsigmoid(vector("f")) / 16),
        Vector(-lsmc.exp(vector("f"))),
        Scalar(lsmc.log(scalar("a"))),
        Scalar(-scalar("dt")),
    ],
)
def test_what_a_derived_decay_depends_on_is_drawn_where_the_decay_is_legal(decay: Any) -> None:
    declaration = LSM("derived", decay=decay, update=outer(k, v))
    for corner in cases.CORNERS:
        drawn = cases.sample(declaration, corner)
        o = reference(declaration)(**drawn.inputs)
        assert bool(torch.isfinite(o).all())
        assert float(o.detach().abs().max()) < 1e4


def test_keys_are_normalised_where_the_memory_is_read() -> None:
    delta = LSM("delta", decay=Identity(), update=scalar("beta") * outer(k, v - k @ M))
    keys = cases.sample(delta, cases.CORNERS[0]).inputs["k"]
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(keys.shape[:-1], dtype=torch.float64))


def test_normalised_memories_have_two_states() -> None:
    readout = (q @ M) / (q @ M.normalizer + 1)
    declaration = LSM("normalised", decay=Identity(), update=outer(lsmc.exp(k), v), readout=readout)
    drawn = cases.sample(declaration, cases.CORNERS[0])
    assert isinstance(drawn.state, tuple)
    assert [len(x.shape) for x in drawn.state] == [4, 3]


def test_without_hypothesis_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hypothesis", None)
    with pytest.raises(lsmc.LsmCheckError, match=r"pip install"):
        laws.check(Recurrence(simple()))
