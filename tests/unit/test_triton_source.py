"""What can be read off the generated Triton kernels without running them."""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from functools import cache
from typing import Any

import pytest

from lsmc import zoo
from lsmc.adjoint import differentiate
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.ir import Builder
from lsmc.lowering.kernels import reached
from lsmc.lowering.plan import able
from lsmc.lsm import LSM
from lsmc.pipeline import Options, compile_plan
from lsmc.schedules import CUTS, two_pass
from tests.declarations import Drawn

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

SIZES = {"B", "T", "HV", "COUNT", "CHUNKS", "SEGMENTS"}
"""Sizes that are known at launch only, int32 in a kernel: the product of two of them may exceed 2^31."""

DECLARATIONS = [m for m in zoo.METHODS if able("triton", derive(m.canonical)) == "triton"] + [
    Drawn("two-sided", "none", "softmax", "sigmoid", "two writes", "two queries").declaration(),
    Drawn("scalar", "both", "silu", "plain", "a write per head", "gated").declaration(),
    Drawn("vector per head", "none", "exp", "softmax", "strength", "normaliser").declaration()]


@cache
def sources(method: LSM) -> tuple[str, ...]:
    found = list[str]()
    for schedule in CUTS:
        plan = compile_plan(method.canonical, Options(schedule=schedule, target="triton"))
        for direction in (plan.forward, plan.training, plan.backward):
            executable: Any = direction.executable
            found.append(executable.source)
    return tuple(found)


def narrow_products(source: str) -> list[str]:
    """Products of two sizes that are made in 32 bits."""
    found = []
    for function in (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)):
        long: set[str] = set()

        def wide(e: ast.AST, long: set[str] = long) -> bool:
            if isinstance(e, ast.Call) and isinstance(e.func, ast.Attribute) and e.func.attr == "to":
                return "int64" in ast.unparse(e.args[0])
            if isinstance(e, ast.BinOp):
                return wide(e.left) or wide(e.right)
            return isinstance(e, ast.Name) and e.id in long

        for e in ast.walk(function):
            if isinstance(e, ast.Assign) and isinstance(e.targets[0], ast.Name) and wide(e.value):
                long.add(e.targets[0].id)
        for e in ast.walk(function):
            if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Mult) and not wide(e):
                if sum(isinstance(n, ast.Name) and n.id in SIZES for n in ast.walk(e)) > 1:
                    found.append(f"{function.name}: {ast.unparse(e)}")
    return found


def test_a_product_of_sizes_in_32_bits_is_found() -> None:
    assert narrow_products("def f(B, T, HV, block):\n    x = o + block.to(tl.int64) * (B * T * HV)\n") != []
    assert narrow_products("def f(B, T, HV, block):\n    x = o + block.to(tl.int64) * B * T * HV\n    y = x * T * B\n") == []


@pytest.mark.parametrize("method", DECLARATIONS, ids=lambda m: m.name)
def test_offsets_reach_beyond_2_to_the_31(method: LSM) -> None:
    """Tensors of more than 2^31 elements: whatever multiplies two sizes starts from an int64."""
    for source in sources(method):
        assert narrow_products(source) == []


@pytest.mark.parametrize("method", DECLARATIONS, ids=lambda m: m.name)
def test_sizes_that_change_between_calls_compile_no_kernel_anew(method: LSM) -> None:
    """T, and what follows from it, are arguments that Triton does not specialise for values such as 1 and 16: but for a walk, whose
    call of one token is code of its own."""
    for source in sources(method):
        for function in (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)):
            runtime = {a.arg for a in function.args.args if a.annotation is None} & SIZES
            keyword = function.decorator_list[0].keywords[0]  # type: ignore[attr-defined]
            assert keyword.arg == "do_not_specialize"
            free = {"T"} if function.name.endswith("_tokens") else set()
            assert runtime == free | set(ast.literal_eval(keyword.value)), function.name
            assert "T" in runtime


@pytest.mark.parametrize("method", DECLARATIONS, ids=lambda d: d.name)
def test_the_gradients_of_keys_and_of_values_share_one_product_at_most(method: LSM) -> None:
    """Queries by keys: any other that both kernels over chunks took would be half of its work done again."""
    from lsmc.lowering.backends.triton_cut import pieces
    from lsmc.lowering.backends.triton_sums import gather

    program = gather(hoist(differentiate(derive(method.canonical))))
    made = {p.split: {op.id for op in program.ancestors(p.roots(program), p.known) if op.kind == "matmul"}
            for p in pieces(program, two_pass(program)) if not p.kernel.carries}
    assert len(made.get("K", set()) & made.get("V", set())) <= 1


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_no_kernel_only_copies(name: str) -> None:
    """What a kernel loads anyway and an output has but for a factor, that kernel stores: d_v = beta times what the scan made."""
    executable: Any = compile_plan(getattr(zoo, name).canonical, Options(schedule="two_pass", target="triton")).backward.executable
    assert [k.kernel.name for k in executable.kernels if k.how != "slow"] == ["reverse_scan", "chunks"]


def test_scans_take_weights_of_pairs_with_their_decay() -> None:
    """Their steps work out no decay between tokens: all chunks did at once."""
    plan = compile_plan(zoo.gated_deltanet.canonical, Options(schedule="two_pass", target="triton"))
    for direction in (plan.training, plan.backward):
        executable: Any = direction.executable
        assert all("between(" not in k.source for k in executable.kernels if k.carries)


@pytest.mark.parametrize("method", DECLARATIONS, ids=lambda d: d.name)
def test_what_is_subtracted_from_one_another_is_rounded_alike(method: LSM) -> None:
    """A factor that running sums take as the matrix units got it enters the sums over all rows, less which they are, as they
    did: where decays are strong, a gradient is the small rest of both."""
    from lsmc.lowering.backends.triton_mild import mild
    from lsmc.lowering.backends.triton_sums import gather, product

    program, _ = mild(gather(hoist(differentiate(derive(method.canonical)))))
    b = Builder(program.ops)
    rounded = [Counter(product(b, op.args[0])[1]) for op in program.ops if op.kind == "round"]
    for op in program.ops:
        if op.kind == "sum" and op.attr("axis") == 0:
            assert not any(pair <= Counter(product(b, op.args[0])[1]) for pair in rounded), op


LIBRARY = '''
"""A library."""
SCALE = 2

def inner(x):
    """What it says."""
    return SCALE * x

def outer(x):
    return inner(x) + 1

def other(x):
    return -x
'''


@pytest.mark.parametrize(("old", "new", "seen"), [
    ("SCALE * x", "SCALE + x", True), ("SCALE = 2", "SCALE = 3", True), ("+ 1", "+ 2", True),
    ("return -x", "return x", False), ("What it says", "Something else", False), ("A library", "The library", False)])
def test_what_a_kernel_does_is_keyed_by_the_functions_that_it_gets_to(old: str, new: str, seen: bool) -> None:
    source = "def kernel(x):\n    return outer(x)\n"
    assert LIBRARY.count(old) == 1
    assert (reached(LIBRARY, source) != reached(LIBRARY.replace(old, new), source)) == seen
