"""Laws of chunk programs whose steady decays scale rows: the values of weighted pairs, from scans that have no weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from itertools import product

import pytest
import torch

import lsmc
from lsmc.adjoint import differentiate
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.functions import exp
from lsmc.ir import Program
from lsmc.schedules import CUTS
from tests.declarations import Drawn
from tests.unit.test_ir import draw, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

DRAWN = [Drawn("constant", read, "silu", "plain", value, readout, momentum) for read, value, readout, momentum in (
    ("none", "plain", "after", "none"), ("none", "strength", "decayed", "none"), ("none", "two writes", "before", "none"),
    ("none", "plain", "bonus", "none"), ("none", "plain", "normaliser", "none"), ("decayed", "strength", "after", "none"),
    ("both", "strength", "two queries", "none"), ("none", "plain", "after", "momentum"), ("decayed", "strength", "gated", "momentum"))]


def programs(drawn: Drawn) -> list[Program]:
    from lsmc.lowering.backends.triton_sums import gather

    chunk = derive(drawn.declaration().canonical)
    return [gather(hoist(chunk)), gather(hoist(differentiate(chunk)))]


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_scaled_rows_give_the_values_of_weighted_pairs(drawn: Drawn) -> None:
    """What every launch of every schedule leaves, in float64; at least one scan has such a form, and kernels over chunks have none."""
    from lsmc.lowering.backends.triton_emit import launches
    from lsmc.lowering.backends.triton_steady import unweighted

    torch.manual_seed(0)
    found = 0
    for program, schedule in product(programs(drawn), CUTS.values()):
        for own, piece in launches(program, schedule(program)):
            form = unweighted(own, piece)
            if form is None:
                continue
            assert piece.kernel.carries
            found += 1
            other, new = form
            inputs = {op.attr("name"): draw(op, own) for op in own.inputs()}
            ends = dict.fromkeys(piece.roots(own))
            wanted = run(dataclasses.replace(own, outputs=tuple((str(i), i) for i in ends), carries=()), inputs)
            values = run(dataclasses.replace(other, outputs=tuple((str(i), new[i]) for i in ends), carries=()), inputs)
            for n, x in wanted.items():
                torch.testing.assert_close(values[n], x, rtol=1e-10, atol=1e-12 * max(1.0, float(x.abs().max())))
    assert found


def test_a_scan_of_such_a_decay_is_that_of_none_with_scaled_rows() -> None:
    """No exponential of a pair of tokens is left, nor more products than without a decay."""
    from lsmc.lowering.backends.triton_emit import launches
    from lsmc.lowering.backends.triton_steady import unweighted
    from lsmc.lowering.backends.triton_sums import gather

    def products(program: Program, roots: list[int]) -> int:
        return sum(op.kind == "matmul" for op in program.ancestors(roots))

    plain, steady = (gather(hoist(derive(m.canonical))) for m in (lsmc.zoo.bla, lsmc.zoo.retnet))
    (own, piece), = launches(steady, CUTS["fused"](steady))
    form = unweighted(own, piece)
    assert form is not None
    body = form[0].ancestors(piece.moved(form[1]).roots(form[0]))
    assert not any(op.dims == ("T", "T") and op.kind == "map" and op.attr("expr").has(exp) for op in body)
    (without, other), = launches(plain, CUTS["fused"](plain))
    assert products(form[0], piece.moved(form[1]).roots(form[0])) == products(without, other.roots(without))


@pytest.mark.parametrize("name", ["bla", "gla", "mamba2", "gated_deltanet"])
def test_other_decays_have_no_such_form(name: str) -> None:
    from lsmc.lowering.backends.triton_emit import launches
    from lsmc.lowering.backends.triton_steady import unweighted
    from lsmc.lowering.backends.triton_sums import gather

    chunk = derive(getattr(lsmc.zoo, name).canonical)
    for program, schedule in product((gather(hoist(chunk)), gather(hoist(differentiate(chunk)))), CUTS.values()):
        assert all(unweighted(own, piece) is None for own, piece in launches(program, schedule(program)))


def test_scans_are_crowded_where_one_tile_more_costs_a_program_or_a_stage() -> None:
    """Two programs of 64 columns with two chunks each, or one of 128 with three, in 228 KB; each program keeps 1 KB for itself."""
    from lsmc.lowering.backends.triton_registers import crowded

    def loads(fixed: int, columns: int) -> bool:
        return crowded(lambda n: fixed + columns * n)

    assert loads(48 << 10, 0)  # 2 · (2 · 48 + 16 + 1) = 226 KB, and 258 with another tile of 16 KB
    assert not loads(40 << 10, 0)  # there is room for both tiles, with either plan
    assert not loads(80 << 10, 0)  # nor is there for one
    assert loads(32 << 10, 256)  # 3 · 64 + 32 + 1 = 225 KB of all columns, and 257


FLAGS = """
import torch, triton, triton.language as tl
from lsmc.lowering.backends.triton_tiles import all_set

@triton.jit
def look(flags, out, stride, count):
    tl.store(out, all_set(flags, stride, count).to(tl.int32))

torch.manual_seed(0)
for count in (0, 1, 255, 256, 257, 700):
    for unset in {*range(-1, min(count, 2)), count - 1, count // 2}:
        flags = torch.zeros(3 * count + 3, dtype=torch.int32)
        flags[: 3 * count : 3] = 1
        if 0 <= unset < count:
            flags[3 * unset] = 0
        out = torch.full((1,), 7, dtype=torch.int32)
        look[(1,)](flags, out, 3, count)
        assert int(out) == int(not 0 <= unset < count), (count, unset)
print("done")
"""


def test_one_flag_that_is_not_set_is_found_among_any_number() -> None:
    """Those of other heads, which lie between, do not count."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", FLAGS], capture_output=True, text=True, env=environment)
    assert done.stdout == "done\n", done.stderr[-2000:]
