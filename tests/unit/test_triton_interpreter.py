"""The generated Triton kernels do what the recurrence says: run by Triton's interpreter, on the CPU, in float32 and float16.

bfloat16 and what a GPU compiler makes of the kernels are left to tests/gpu: the interpreter is wrong in bfloat16.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmc import zoo
from lsmc.cases import GATES, Case
from lsmc.chunk import derive
from lsmc.lowering.plan import able
from lsmc.schedules import CUTS
from tests.declarations import MATRICES, READOUTS, Drawn, Wider, declarations
from tests.interpreted import OWN, Job, Workers, workers

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

ABLE = tuple(m for m in zoo.METHODS if able("triton", derive(m.canonical)) == "triton")
PAIRS = tuple(m.name for m in ABLE if m.canonical.rows == "F")
METHODS = tuple(m.name for m in ABLE if not m.canonical.matrix and m.canonical.block is None and m.name not in PAIRS)
WALKS = tuple(m.name for m in ABLE if m.canonical.matrix)
EVERY = (*METHODS, *(pytest.param(n, marks=pytest.mark.slow) for n in WALKS))
"""Kernels that go from token to token have tests of their own; --slow gives them the others as well."""
GATED = [n for n in METHODS if getattr(zoo, n).canonical.decay_k is not None]
CHUNKS = [s for s in CUTS if s != "walk"]
EXAMPLES = int(os.environ.get("LSMC_EXAMPLES", "8"))
SMALL = Case(batch=1, time=37, heads=1, groups=2, key_dim=5, value_dim=3, chunk=16, initial_state=True, scale=0.5)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Workers]:
    with workers(min(2, os.cpu_count() or 1)) as pool:
        yield pool


@pytest.mark.parametrize("name", [*EVERY, *(n for n, own in OWN.items() if own().canonical.block is None)])
def test_kernels_equal_the_recurrence_for_every_schedule(interpreter: Workers, name: str) -> None:
    """Output, final state and every gradient; value heads share key heads, T is no multiple of the chunk, inputs are slices."""
    cases = SMALL, dataclasses.replace(SMALL, batch=2, time=20), dataclasses.replace(SMALL, time=18)
    for seen in interpreter.run(*(Job(name, c, s, layout="strided") for c, s in zip(cases, CUTS))):
        assert len(seen) >= 5


def test_kernels_work_out_the_gradients_that_are_wanted(interpreter: Workers) -> None:
    """Fixed decays and mixing factors, gates alone, the initial state alone; kernels of mild decays take the flags of the forward."""
    wide = dataclasses.replace(SMALL, time=40, key_dim=16, value_dim=16)
    jobs = [Job("retnet", SMALL, "fused", frozen=("log_a",)), Job("retnet", SMALL, "two_pass", frozen=("log_a", "q")),
            Job("mamba2", SMALL, "two_pass", frozen=("q", "k", "v", "D")), Job("gla", wide, "two_pass", "float16", frozen=("g",)),
            Job("kda", wide, "two_pass", "float16", frozen=("v", "beta")), Job("deltanet", SMALL, "fused", frozen=("q", "k", "v", "beta"))]
    for job, seen in zip(jobs, interpreter.run(*jobs)):
        names = {n.split()[3] for n in seen if n.startswith("the gradient")}
        assert "state" in names
        assert not names & {*job.frozen}


@pytest.mark.parametrize("name", EVERY)
def test_kernels_keep_packed_sequences_apart(interpreter: Workers, name: str) -> None:
    """Sequences that are empty, shorter than a chunk, longer than one; sizes that need several blocks, the last one partial."""
    case = dataclasses.replace(SMALL, groups=1, time=24, key_dim=70, value_dim=66, cuts=(0, 4, 4, 21))
    small = dataclasses.replace(case, groups=2, key_dim=3, value_dim=17, cuts=(16, 16, 40), time=23, initial_state=False)
    interpreter.run(Job(name, case, "fused"), Job(name, case, "two_pass"), Job(name, small, layout="columns"))


@pytest.mark.parametrize("name", GATED)
def test_kernels_stay_exact_for_every_range_of_gates(interpreter: Workers, name: str) -> None:
    """From no decay at all to -1000 a token and an exact reset, side by side with weak ones, at several chunk lengths."""
    case = dataclasses.replace(SMALL, time=36, groups=1, key_dim=4, value_dim=4)
    gates = [g for g in GATES if g != "typical"]
    interpreter.run(*(Job(name, dataclasses.replace(case, gates=g, chunk=(16, 32, 64)[n % 3]), list(CUTS)[n % 2])
                      for n, g in enumerate(gates)))


def test_memories_that_chunks_do_not_move_affinely_equal_the_recurrence(interpreter: Workers) -> None:
    """Blocks of 16 tokens, of 4 (shorter than a tile) and of one, of which the first was begun before or begins with the sequence;
    biases, packed sequences, one block more or less than full; layer norm in float16 as well."""
    blocks, norm = dataclasses.replace(SMALL, groups=1), dataclasses.replace(SMALL, key_dim=5, value_dim=5, groups=1)
    new, wide = dataclasses.replace(blocks, initial_state=False), dataclasses.replace(blocks, time=24, cuts=(0, 4, 4, 21))
    interpreter.run(
        Job("bent, in blocks", dataclasses.replace(SMALL, time=20), "fused"), Job("bent, in blocks", wide, "two_pass"),
        Job("bent, in blocks", dataclasses.replace(new, time=33, batch=2), "two_pass"),
        Job("bent, in blocks", dataclasses.replace(new, time=36, cuts=(16, 16, 31), key_dim=17), "two_pass", alone=True),
        Job("bent, in short blocks", dataclasses.replace(blocks, time=9), "fused"),
        Job("ttt_ln", dataclasses.replace(norm, time=18), "two_pass", layout="strided"),
        Job("ttt_ln", dataclasses.replace(norm, time=9, key_dim=16, value_dim=16), "fused", "float16", gates="float32"),
        Job("ttt_ln_sequential", dataclasses.replace(norm, time=2), "fused"))


@pytest.mark.parametrize("name", PAIRS)
def test_memories_over_pairs_equal_the_recurrence(interpreter: Workers, name: str) -> None:
    """K rows of pairs for each program; packed sequences; what is kept for the backward, and what it makes again itself."""
    packed = dataclasses.replace(SMALL, groups=1, time=24, key_dim=3, value_dim=17, cuts=(0, 4, 4, 21))
    half = dataclasses.replace(SMALL, groups=1, time=17, key_dim=4, initial_state=False)
    for seen in interpreter.run(Job(name, SMALL, "fused", layout="strided"), Job(name, packed, "two_pass", alone=True),
                                Job(name, half, "segments", "float16", gates="float32")):
        assert len(seen) >= 5


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "s4" else n for n in WALKS])
def test_walks_through_tokens_equal_the_recurrence(interpreter: Workers, name: str) -> None:
    """A whole sequence, and packed ones that end inside a group of tokens, with one token or none, in several blocks of V."""
    packed = dataclasses.replace(SMALL, groups=1, time=23, key_dim=3, value_dim=33, cuts=(0, 4, 5, 5))
    for seen in interpreter.run(Job(name, SMALL, "fused", layout="strided"), Job(name, packed, "two_pass")):
        assert len(seen) >= 5


STEPS = (*(n for n in METHODS if n in ("gfw", "gateloop", "kda", "titans")), "ttt_ln", "s4_complex", "bent, in short blocks")
"""Decays on both sides, turns, reads, momentum; norms over V, entries that turn, blocks that end within a call."""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_memories_held_from_token_to_token_equal_the_recurrence(interpreter: Workers, dtype: str) -> None:
    """Output and final state without gradients: several blocks of V, one token, and packed sequences, one of them empty."""
    case = dataclasses.replace(SMALL, time=9, key_dim=6, value_dim=6)
    cases = [case, dataclasses.replace(case, time=1, batch=2, value_dim=70), dataclasses.replace(case, time=11, groups=1, cuts=(0, 4, 4))]
    jobs = [(n, cases[i % 3]) for i, n in enumerate(STEPS)]
    jobs = [(n, dataclasses.replace(c, value_dim=6) if n == "ttt_ln" else c) for n, c in jobs]
    for seen in interpreter.run(*(Job(n, c, "walk", dtype, "strided", learns=False) for n, c in jobs)):
        assert len(seen) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [m.name for m in ABLE])
def test_memories_of_every_method_held_from_token_to_token_equal_the_recurrence(interpreter: Workers, name: str) -> None:
    case = dataclasses.replace(SMALL, time=18, key_dim=6, value_dim=6, groups=1)
    jobs = [dataclasses.replace(case, **to) for to in ({}, {"initial_state": False}, {"time": 21, "cuts": (0, 4, 4), "groups": 2}, {"time": 1})]
    interpreter.run(*(Job(name, c, "walk", learns=False) for c in jobs))


WALKED = [Wider("that turns", "tanh", "gated"), Wider("of vectors", "tanh", "bonus"), Wider("that turns beside V", readout="before"),
          Wider("whose entries turn", readout="two queries")]


@pytest.mark.parametrize("gates", [g if g == "mixture" else pytest.param(g, marks=pytest.mark.slow) for g in GATES])
def test_walks_of_other_declarations_equal_the_recurrence(interpreter: Workers, gates: str) -> None:
    """Reads before and after a decay, angles along K or of every entry, cotangents that depend on what is read; every kind of gate."""
    case = dataclasses.replace(SMALL, time=18, groups=1, gates=gates)
    interpreter.run(*(Job(d, case, ("fused", "two_pass")[n % 2]) for n, d in enumerate(WALKED)))


@pytest.mark.slow
@pytest.mark.parametrize("decay", list(MATRICES))
def test_walks_of_every_readout_equal_the_recurrence(interpreter: Workers, decay: str) -> None:
    readouts = [r for r in READOUTS if r != "normaliser"]
    interpreter.run(*(Job(Wider(decay, "tanh", r), dataclasses.replace(SMALL, time=19, groups=1, cuts=((), (0, 7))[n % 2]),
                          ("fused", "two_pass")[n // 2 % 2]) for n, r in enumerate(readouts)))


PADDED = [Drawn("scalar", "none", key, query, "strength", "normaliser")
          for key, query in (("exp", "softmax"), ("elu + 1", "sigmoid"), ("softmax", "exp"))]
PADDED += [Drawn(decay, read, key, query, "two writes", readout) for decay, read, key, query, readout in (
    ("vector over K", "decayed", "softmax", "elu + 1", "gated"),
    ("two-sided", "none", "sigmoid", "exp", "two queries"),
    ("vector of an expression", "another key", "exp", "rmsnorm", "bonus"),
    ("scalar times vector over V", "none", "rmsnorm", "softmax", "skip"))]


@pytest.mark.parametrize("drawn", PADDED, ids=str)
def test_padding_of_k_and_v_never_leaks(interpreter: Workers, drawn: Drawn) -> None:
    """Maps that take 0 to something else, and sums and maxima over K, where blocks are wider than K and V."""
    case = dataclasses.replace(SMALL, time=19, groups=1)
    other = dataclasses.replace(case, key_dim=18, value_dim=1)
    interpreter.run(*(Job(drawn, c, s) for c, s in zip((case, other), CUTS)))


@given(drawn=declarations(), size=st.tuples(st.integers(1, 20), st.integers(1, 20)), time=st.sampled_from([1, 15, 16, 33]),
       gates=st.sampled_from(list(GATES)), groups=st.integers(1, 2), state=st.booleans(),
       cuts=st.sampled_from([(), (), (3, 3, 20)]), turn=st.integers(0, 1))
@settings(max_examples=EXAMPLES)
def test_kernels_of_drawn_declarations_equal_the_recurrence(
        interpreter: Workers, drawn: Drawn, size: tuple[int, int], time: int, gates: str, groups: int, state: bool,
        cuts: tuple[int, ...], turn: int) -> None:
    """Two or three schedules over chunks, the others in turn; and the recurrence itself, token by token."""
    case = Case(time=time, groups=groups, key_dim=size[0], value_dim=size[1], chunk=16, gates=gates, initial_state=state,
                cuts=cuts, seed=size[0])
    interpreter.run(*(Job(drawn, case, s) for s in CHUNKS[turn::2]), Job(drawn, case, "walk", learns=False))


@pytest.mark.parametrize("name", EVERY)
def test_kernels_hold_16_bit_tolerances(interpreter: Workers, name: str) -> None:
    """float16 inputs, and float16 matrices beside float32 gates: matrix operands are rounded, sums and memories are not."""
    case = dataclasses.replace(SMALL, time=33, key_dim=16, value_dim=20)
    interpreter.run(Job(name, case, "fused", "float16"), Job(name, case, "two_pass", "float16", gates="float32"),
                    Job(name, case, "half_fused", "float16"))


@pytest.mark.parametrize("name", GATED)
def test_16_bit_kernels_hold_for_every_range_of_gates(interpreter: Workers, name: str) -> None:
    """Where mild decays allow a faster way, chunks of mild and of strong decays lie in one launch; chunks of full length."""
    case = dataclasses.replace(SMALL, time=68, groups=1, key_dim=16, value_dim=16, chunk=64)
    short = dataclasses.replace(case, time=40, chunk=16, cuts=(7, 7, 30))
    jobs = [Job(name, dataclasses.replace((case, short)[n % 2], gates=g), list(CUTS)[n // 2 % 2], "float16",
                gates=("", "float32")[n % 3 % 2]) for n, g in enumerate(GATES)]
    interpreter.run(*jobs)


@pytest.mark.parametrize("schedule", ["fused", "half_fused", "two_pass"])
def test_every_decay_judges_whether_a_chunk_is_mild(interpreter: Workers, schedule: str) -> None:
    """One decay is mild over K, the other not over V, whose form some schedules leave to a scan: flags say so for all kernels."""
    case = dataclasses.replace(SMALL, batch=2, time=2, heads=2, groups=1, key_dim=16, value_dim=16, gates="lone spike")
    interpreter.run(*(Job("gfw", dataclasses.replace(case, seed=n), schedule, "float16", gates="float32") for n in (0, 3, 5)))


@pytest.mark.parametrize("name", EVERY)
def test_kernels_run_on_no_token_one_token_and_one_token_repeated(interpreter: Workers, name: str) -> None:
    none, one = dataclasses.replace(SMALL, time=0), dataclasses.replace(SMALL, time=1, batch=2, defaults=True, initial_state=False)
    nothing = dataclasses.replace(none, cuts=(0, 0))
    repeated = dataclasses.replace(SMALL, time=18)
    interpreter.run(Job(name, none), Job(name, nothing), Job(name, one), Job(name, repeated, layout="expanded"))


NAMES = [Drawn("scalar", "none", "plain", "plain", "two writes", "two queries"),
         Drawn("vector per head", "another key", "silu", "plain", "strength", "gated")]


@pytest.mark.parametrize("drawn", NAMES, ids=str)
def test_names_of_inputs_never_meet_in_a_kernel(interpreter: Workers, drawn: Drawn) -> None:
    """Inputs named a, g, p, u, w, z in one kernel: their pointers, strides and group sizes have names of their own."""
    interpreter.run(Job(drawn, dataclasses.replace(SMALL, time=17)))


SEGMENTED = ("bla", "mamba2", "gla", "gfw", "deltanet", "kda")
"""Chunks that leave their memory whole, scale it by a number, rows, rows and columns, mix its rows, mix and scale them."""
LONG = Case(time=128, heads=1, key_dim=5, value_dim=3, chunk=16, initial_state=True)


def test_segments_equal_the_recurrence(interpreter: Workers) -> None:
    """Outputs, final state and every gradient, that of the initial state too: scalar and vector decay, a delta rule, both. Five
    chunks make segments of three and two, three of two and one; the last chunk has one token or all but one. The backward takes
    the memories that the forward keeps and makes factors of cotangents, or (`alone`) scans them again and transposes theirs."""
    times = {"mamba2": (65, "segments"), "deltanet": (65, "segments"), "kda": (33, "segments")}
    packed = dataclasses.replace(LONG, time=53, cuts=(0, 4, 4))
    for seen in interpreter.run(*(Job(n, dataclasses.replace(LONG, time=t), schedule) for n, (t, schedule) in times.items()),
                                Job("gla", dataclasses.replace(LONG, time=47), "fused_segments", alone=True),
                                Job("deltanet", packed, "segments", alone=True)):
        assert len(seen) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTED)
def test_segments_equal_the_recurrence_at_every_border(interpreter: Workers, name: str) -> None:
    """Eight chunks make four segments, nine leave the last one empty, ten give it a chunk of one token; one chunk is one segment."""
    times = {127: "segments", 129: "fused_segments", 145: "segments", 13: "segments"}
    cases = [(dataclasses.replace(LONG, time=t), schedule) for t, schedule in times.items()]
    interpreter.run(*(Job(name, case, schedule) for case, schedule in cases))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTED)
def test_packed_sequences_have_segments_of_their_own(interpreter: Workers, name: str) -> None:
    """Empty ones, shorter than a chunk, of fewer chunks than segments, of more; K and V of several blocks."""
    case = dataclasses.replace(LONG, time=133, cuts=(0, 4, 4, 30))
    wide = dataclasses.replace(case, key_dim=70, value_dim=66, initial_state=False)
    interpreter.run(Job(name, case, "segments"), Job(name, wide, "fused_segments"))
