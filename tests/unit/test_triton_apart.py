"""Laws of what kernels over chunks share: values that blocks of columns would each work out again, exponentials and sums."""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import cache

import pytest
import torch

from lsmc import zoo
from lsmc.adjoint import differentiate
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.functions import exp
from lsmc.ir import Builder, Program, operand, place
from lsmc.lowering.plan import able
from lsmc.lsm import LSM
from lsmc.schedules import three_pass, two_pass
from tests.declarations import Drawn
from tests.unit.test_ir import draw, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

METHODS = [m for m in zoo.METHODS if able("triton", derive(m.canonical)) == "triton"] + [
    Drawn("scalar", "both", "silu", "plain", "a write per head", "gated").declaration(),
    Drawn("vector per head", "none", "exp", "softmax", "strength", "normaliser").declaration()]


@cache
def backward(method: LSM) -> Program:
    return hoist(differentiate(derive(method.canonical)))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_no_block_of_columns_repeats_what_can_be_made_before(method: LSM) -> None:
    """Of a kernel over chunks whose programs share columns, every product has them in it, or waits for one that has; all launches
    together leave what `two_pass` leaves, each output once."""
    from lsmc.lowering.backends.triton_cut import contracts, pieces
    from lsmc.lowering.backends.triton_sums import gather

    program = gather(backward(method))
    cut = pieces(program, three_pass(program))
    for p in cut:
        if p.kernel.carries or p.inner or p.split is None:
            continue
        shared = set[int]()  # what differs between the blocks
        pairs = [op for op in program.ancestors(p.roots(program), p.known) if op.dims == ("T", "T")]
        for op in program.ancestors(p.roots(program), p.known):
            if p.split in {*op.dims, *contracts(program, op)} or shared & set(op.args):
                shared.add(op.id)
        alone = {op.id for op in pairs if op.kind == "matmul" and op.id not in shared}
        assert not alone, f"{p.kernel.name} would work out {alone} in each block"
    stores = Counter(n for p in cut for n in p.kernel.stores)
    assert stores == Counter(n for p in pieces(program, two_pass(program)) for n in p.kernel.stores)
    assert set(stores.values()) == {1}
    made = Counter(i for p in cut for i in p.makes)
    assert not made or set(made.values()) == {1}
    for n, p in enumerate(cut):  # what a launch takes is there
        before = {i for q in cut[:n] for i in q.makes} | {c.inp for q in cut[:n] for c in program.carries if c.name in q.kernel.saves}
        used = {a for op in program.ancestors(p.roots(program), p.known) for a in op.args} & p.known
        assert used - {i for _, i in program.taken} <= before


def test_pairs_of_tokens_are_made_apart_where_there_are_some() -> None:
    from lsmc.lowering.backends.triton_cut import pieces
    from lsmc.lowering.backends.triton_sums import gather

    for method, named in ((zoo.gated_deltanet, ["chunks_pairs"]), (zoo.kda, ["chunks_pairs"]), (zoo.rwkv7, ["chunks_K_pairs"])):
        program = gather(backward(method))
        assert [p.kernel.name for p in pieces(program, three_pass(program)) if p.kernel.name.endswith("_pairs")] == named


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_sums_taken_together_are_those_of_the_program(method: LSM) -> None:
    """Every output in float64, no power e^x of one number a token that is there worked out again, and what decays between tokens get
    from the pairs of tokens in one sum."""
    from lsmc.lowering.backends.triton_sums import summed

    program = backward(method)
    changed = summed(program)
    inputs = {op.attr("name"): draw(op, program) for op in program.inputs()}
    wanted, found = run(program, inputs), run(changed, inputs)
    assert found.keys() == wanted.keys()
    for n, x in found.items():
        torch.testing.assert_close(x, wanted[n], rtol=1e-8, atol=1e-10 * max(1.0, float(wanted[n].abs().max())))
    powers = {op.args[0] for op in changed.ops if op.kind == "map" and op.attr("expr") == exp(operand(0))}
    for op in changed.ops:
        if op.kind == "map" and op.dims[1] == "1" and op.attr("expr") != exp(operand(0)):
            again = {op.args[place(e.args[0])] for e in op.attr("expr").atoms(exp) if e.args[0].is_Symbol}
            assert not again & powers, f"{op} takes a power that is there"
        if op.kind == "map" and op.dims == ("T", "1"):
            between = Counter(changed.index[a].attr("before") for a in op.args if changed.index[a].kind == "between_grad")
            assert all(count == 1 for count in between.values()), f"{op} adds sums over pairs"


def test_sums_of_values_that_others_take_too() -> None:
    from lsmc.lowering.backends.triton_sums import summed

    b = Builder()
    g, h = b.input("g", "token", ("T", "1")), b.input("h", "token", ("T", "1"))
    both = b.add(g, h)
    twice = b.add(b.cumsum(g, reverse=True), both, b.exp(h), b.mul(b.exp(h), g))
    program = Program("own", tuple(b.ops), (), (("g", g), ("h", h), ("both", both), ("twice", twice)))
    inputs = {op.attr("name"): draw(op, program) for op in program.inputs()}
    wanted, found = run(program, inputs), run(summed(program), inputs)
    for n, x in wanted.items():
        torch.testing.assert_close(found[n], x)
