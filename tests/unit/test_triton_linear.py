"""Laws of the sums over V that scans of cotangents take: the same gradients, and none that waits for another's wide result."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

import lsmc
from lsmc import LSM, M, grad, k, layernorm, norm2, over, q, rmsnorm, scalar, v, vector
from lsmc.adjoint import differentiate
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.ir import Program
from tests.unit.test_ir import draw, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

eta, w, u = scalar("eta"), vector("w", over="V", per="head"), vector("u", over="V", per="head")
READ = k @ M + M.bias
LOSSES = {
    "layer norm": norm2(w * layernorm(READ) - v) / 2,
    "of a residual": norm2(w * layernorm(READ) + u - (v - over(k, "V"))) / 2,
    "RMS norm": norm2(rmsnorm(READ) - v) / 2,
    "a norm of a norm": norm2(rmsnorm(w * layernorm(READ)) - v) / 2,
    "a norm that is bent": norm2(lsmc.tanh(w * layernorm(READ)) - v) / 2,
    "a norm twice": norm2(w * layernorm(READ) - u * rmsnorm(READ) - v) / 2,
}


def backward(loss: str, block: int | None) -> Program:
    method = LSM("own", block=block, update=-eta * grad(LOSSES[loss], M), readout=q @ M + w * layernorm(q @ M + M.bias))
    return hoist(differentiate(derive(method.canonical)))


def waits(program: Program) -> list[int]:
    """Between the cotangent of a memory and the next one, the sums over V of wide values that other such sums enter."""
    late, behind, found = {c.inp for c in program.carries if c.reverse}, set[int](), list[int]()
    way = {op.id for op in program.ancestors([c.out for c in program.carries if c.reverse])}
    for op in program.ops:
        if late & set(op.args):
            late.add(op.id)
        across = op.kind == "sum" and op.attr("axis") == 1 and op.id in late & way
        if across and behind & set(op.args):
            found.append(op.id)
        if across or behind & set(op.args):
            behind.add(op.id)
    return found


@pytest.mark.parametrize("block", [16, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_distributed_sums_are_those_of_the_program(loss: str, block: int) -> None:
    """Every output and memory, in float64; a sum waits for no other where there was one that did."""
    from lsmc.lowering.backends.triton_linear import distributed

    program = backward(loss, block)
    changed = distributed(program)
    assert waits(program)
    assert not waits(changed)
    inputs = {op.attr("name"): draw(op, program) for op in program.inputs()}
    ends = tuple((f"new {c.name}", c.out) for c in program.carries)
    wanted = run(dataclasses.replace(program, outputs=program.outputs + ends), inputs)
    ends = tuple((f"new {c.name}", c.out) for c in changed.carries)
    found = run(dataclasses.replace(changed, outputs=changed.outputs + ends), inputs)
    assert found.keys() == wanted.keys()
    for n, x in found.items():
        torch.testing.assert_close(x, wanted[n], rtol=1e-8, atol=1e-10 * max(1.0, float(wanted[n].abs().max())))


def test_programs_without_such_sums_are_left_alone() -> None:
    from lsmc.lowering.backends.triton_linear import distributed

    for method in (lsmc.zoo.gla, lsmc.zoo.gated_deltanet, lsmc.zoo.titans):
        program = hoist(differentiate(derive(method.canonical)))
        assert distributed(program) is program
