"""Laws of sequences cut into segments: they run side by side and give what one scan gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lsmc
from lsmc.adjoint import differentiate
from lsmc.affine import FACTOR, factors, moves
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.ir import Program
from lsmc.keep import keep
from lsmc.lowering.plan import able, ranking
from lsmc.schedules import CUTS, Shape, choose, two_pass
from lsmc.schedules.segments import count, fused_segments, segments

METHODS = tuple(m.name for m in lsmc.zoo.METHODS if able("triton", derive(m.canonical)) == "triton")
KINDS = {"bla": "whole", "mamba2": "scaled", "gla": "scaled", "gfw": "scaled", "deltanet": "mixed", "kda": "mixed",
         "gateloop": None, "titans": None, "s4": None}
"""What a chunk does to its memory, by the kinds of decay and update that there are; None where scans stay whole."""


@pytest.mark.parametrize("name", KINDS)
def test_what_a_chunk_does_to_its_memory_is_found(name: str) -> None:
    chunk = derive(getattr(lsmc.zoo, name).canonical)
    for program in (hoist(chunk), hoist(differentiate(chunk))):
        wanted = {c.name: KINDS[name] for c in program.carries} if KINDS[name] else {}
        assert moves(program) == wanted
        carried = {c.name for c in factors(program).carries}
        assert (f"M{FACTOR}" in carried) == (KINDS[name] in ("scaled", "mixed"))
        assert f"d_M{FACTOR}" not in carried, "a cotangent takes the transpose of its memory's factor"
        if not wanted:
            assert segments(program).kernels == two_pass(program).kernels


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind])
def test_kept_memories_are_saved_and_their_cotangents_have_factors_of_their_own(name: str) -> None:
    chunk = derive(getattr(lsmc.zoo, name).canonical)
    backward = hoist(differentiate(chunk))
    first, second = keep(hoist(chunk), backward, [c.inp for c in backward.carries if not c.reverse])
    for cut in (segments, fused_segments):
        saved = [s for k in cut(first).kernels if k.whole for s in k.saves]
        assert saved == [c.name for c in first.carries], "by the scan that knows where its segments begin"
    assert moves(second) == {f"d_{c.name}": KINDS[name] for c in first.carries}
    made = {c.name: c for c in factors(second).carries if c.name.endswith(FACTOR)}
    assert set(made) == ({f"d_M{FACTOR}"} if KINDS[name] != "whole" else set())
    assert all(c.reverse for c in made.values())
    assert not {c.inp for c in backward.carries if not c.reverse} & {op.id for op in factors(second).ancestors(
        [c.out for c in made.values()])}


@given(sequences=st.integers(1, 512), chunks=st.integers(1, 4096), units=st.integers(1, 256))
@settings(max_examples=100)
def test_segments_fill_the_device_and_no_more(sequences: int, chunks: int, units: int) -> None:
    n = count(sequences, chunks, units)
    assert 1 <= n <= max(1, chunks)
    assert n == 1 or n * sequences <= units
    assert n <= count(1, chunks, units), "fewer sequences are never cut into fewer segments"


@pytest.mark.parametrize("name", METHODS)
def test_only_what_leaves_the_device_empty_is_cut(name: str) -> None:
    """By the cost model: few long sequences, and not where there are as many as processors, nor where they are a few chunks, nor
    where rows of pairs give a sequence K programs."""
    canonical = getattr(lsmc.zoo, name).canonical
    chunk = derive(canonical)
    for program in (hoist(chunk), hoist(differentiate(chunk))):
        def choice(sequences: int, tokens: int, program: Program = program) -> str:
            return choose(program, tuple(CUTS.values()), Shape(sequences, tokens, 128, 128), rank=ranking("triton")).schedule.name

        cut = len(moves(program)) == len(program.carries) and canonical.rows != "F"
        assert ("segments" in choice(8, 16384)) == cut
        assert "segments" not in choice(128, 4096)
        assert "segments" not in choice(8, 64)
