"""Laws of schedules: nothing is forgotten or done twice, nothing saved in vain, and the choice is explained."""

from __future__ import annotations

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lsmc
from lsmc import errors
from lsmc.adjoint import differentiate
from lsmc.affine import FACTOR, PART
from lsmc.canonical import Canonical
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.ir import Op, Program
from lsmc.lowering.plan import able, ranking
from lsmc.pipeline import TYPICAL, Options, compile_plan
from lsmc.schedules import CUTS, Cut, Shape, choose
from lsmc.schedules.cost import cost
from lsmc.schedules.order import order, peak
from lsmc.target import H200
from tests.declarations import Drawn, declarations


def programs(canonical: Canonical) -> list[Program]:
    chunk = derive(canonical)
    return [hoist(chunk), hoist(differentiate(chunk))]


ZOO = [program for op in lsmc.zoo.METHODS for program in programs(op.canonical)]


def check(program: Program, cut: Cut) -> None:
    schedule = cut(program)
    begun: set[str] = set()
    ended: set[str] = set()
    for kernel in schedule.kernels:  # a scan in segments: what each makes, then where each begins, then the scan itself
        if kernel.part in ("map", "factor"):
            ended |= {c if c.endswith(FACTOR) else c + PART for c in kernel.carries}
        elif kernel.part == "combine":
            assert set(kernel.loads(kernel.of(program))) <= ended, "what segments made is there"
            begun |= set(kernel.carries)
        elif kernel.part == "apply":
            assert set(kernel.carries) <= begun, "no segment begins before it is known where"
    schedule = dataclasses.replace(schedule, kernels=tuple(k for k in schedule.kernels if k.whole))
    stored = [name for kernel in schedule.kernels for name in kernel.stores]
    assert sorted(stored) == sorted(name for name, _ in program.outputs), "every output is stored once"
    scanned = [name for kernel in schedule.kernels for name in kernel.carries]
    assert len(set(scanned)) == len(scanned), "no memory is scanned twice"
    read = {name for kernel in schedule.kernels for name in kernel.loads(program)}
    needed = {op.id for name, i in program.outputs for op in program.ancestors([i])}
    ends = {c.name for c in program.carries if c.reverse or not program.name.endswith("_backward")}
    assert ends <= set(scanned), "what is left at the end of time is computed"
    assert {c.name for c in program.carries if c.inp in needed} <= set(scanned), "no output lacks its memory"
    assert set(scanned) <= ends | read | {n for k in schedule.kernels if k.stores for n in k.carries}, "no scan is idle"
    saved: set[str] = set()
    for kernel in schedule.kernels:
        directions = {c.reverse for c in program.carries if c.name in kernel.carries}
        assert len(directions) <= 1, "a scan runs in one direction of time"
        assert set(kernel.loads(program)) <= saved, "what is read back was saved by an earlier kernel"
        assert set(kernel.saves) <= set(kernel.carries), "what is saved is on chip"
        saved |= set(kernel.saves)
    assert saved == read, "what is saved is read back"


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_of_the_zoo_is_complete_and_wastes_nothing(name: str) -> None:
    for program in ZOO:
        check(program, CUTS[name])


@given(drawn=declarations(), name=st.sampled_from(list(CUTS)))
@settings(max_examples=30)
def test_every_cut_of_a_drawn_method_is_complete_and_wastes_nothing(drawn: Drawn, name: str) -> None:
    for program in programs(drawn.declaration().canonical):
        check(program, CUTS[name])


# --- costs

shapes = st.builds(
    Shape,
    sequences=st.integers(1, 256),
    tokens=st.integers(1, 1 << 16),
    key=st.sampled_from([16, 64, 96, 128, 256]),
    value=st.sampled_from([16, 64, 96, 128, 256]),
    chunk=st.sampled_from([16, 32, 64, 128]),
    element_bytes=st.sampled_from([2, 4]),
)


@given(
    program=st.sampled_from(ZOO), name=st.sampled_from(list(CUTS)), shape=shapes,
    grows=st.sampled_from(["sequences", "tokens", "key", "value", "element_bytes"]), by=st.integers(2, 4),
)  # fmt: skip
@settings(max_examples=200)
def test_more_work_never_costs_less(program: Program, name: str, shape: Shape, grows: str, by: int) -> None:
    """Bytes, FLOP, dependent steps and seconds are monotone in every size."""
    more = dataclasses.replace(shape, **{grows: by * getattr(shape, grows)})
    for kernel in CUTS[name](program).kernels:
        less_cost, more_cost = cost(program, kernel, shape), cost(program, kernel, more)
        for part in ("bytes", "flops", "steps", "parallel"):
            assert getattr(less_cost, part) <= getattr(more_cost, part), part
        assert 0 < less_cost.seconds(H200) <= more_cost.seconds(H200) * (1 + 1e-12)


def test_a_scan_costs_what_it_waits_for() -> None:
    """One long sequence is bound by dependent steps, many short ones by memory or matrix units."""
    program = ZOO[0]
    kernel = CUTS["fused"](program).kernels[0]
    long, wide = Shape(1, 1 << 16, 128, 128), Shape(1 << 10, 64, 128, 128)
    assert cost(program, kernel, long).steps > 100 * cost(program, kernel, wide).steps
    assert cost(program, kernel, long).flops == cost(program, kernel, wide).flops


# --- the choice


@given(program=st.sampled_from(ZOO), shape=shapes)
@settings(max_examples=40)
def test_the_choice_is_the_cheapest_and_prints_its_reasons(program: Program, shape: Shape) -> None:
    choice = choose(program, tuple(CUTS.values()), shape)
    seconds = [found[1] for found in choice.estimates]
    assert seconds == sorted(seconds)
    assert choice.schedule == choice.estimates[0][0]
    assert sorted(found[0].name for found in choice.estimates) == sorted(CUTS)
    text = str(choice).splitlines()
    for schedule, *_ in choice.estimates:
        (line,) = (x for x in text if x.split()[:1] == [schedule.name])
        assert " us: " in line
        assert all(kernel.name in line for kernel in schedule.kernels)


def test_few_tokens_without_gradients_are_walked_through_in_one_launch() -> None:
    """One token of every method that has kernels and no rows of pairs, but for a backward program; and no thousands, where chunks
    are products of tiles."""
    pytest.importorskip("triton")

    def walks(program: Program, tokens: int) -> list[bool]:
        shape = Shape(1024, tokens, 128, 128, 16)
        return [k.walks for k in choose(program, tuple(CUTS.values()), shape, rank=ranking("triton")).schedule.kernels]

    for op, forward, backward in zip(lsmc.zoo.METHODS, ZOO[::2], ZOO[1::2], strict=True):
        if able("triton", forward) == "triton" and op.canonical.rows != "F":
            assert walks(forward, 1) == [True] and not any(walks(backward, 1)), op.name
            assert op.canonical.matrix or op.canonical.block or not any(walks(forward, 4096)), op.name


def test_an_asked_for_schedule_is_taken() -> None:
    for name in CUTS:
        plan = compile_plan(lsmc.zoo.gla.canonical, Options(schedule=name))
        assert {d.choice.schedule.name for d in (plan.forward, plan.backward)} == {name}


def test_an_unknown_schedule_is_named_within_a_second() -> None:
    started = time.perf_counter()
    with pytest.raises(errors.LsmOptionError, match="'fastest'") as caught:
        compile_plan(lsmc.zoo.gla.canonical, Options(schedule="fastest"))
    assert all(name in str(caught.value) for name in CUTS)
    assert time.perf_counter() - started < 1


# --- the order of a kernel's operations


def weight(op: Op) -> int:
    return TYPICAL.size(op.dims)


@pytest.mark.parametrize("name", CUTS)
def test_a_kernel_may_run_in_the_order_that_keeps_least_alive(name: str) -> None:
    """Every operation once, after its operands, and never worse than the order in which they were written."""
    for program in ZOO:
        for kernel in CUTS[name](program).kernels:
            body = kernel.body(kernel.of(program))
            ids = {op.id for op in body}
            roots = [i for n, i in program.outputs if n in kernel.stores]
            found = order(body, roots, weight)
            assert sorted(op.id for op in found) == sorted(ids)
            seen: set[int] = set()
            for op in found:
                assert set(op.args) & ids <= seen
                seen.add(op.id)
            assert peak(found, weight) <= peak(body, weight)
