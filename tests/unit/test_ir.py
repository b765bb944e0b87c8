"""Laws of the intermediate representation: what is printed is read back, what is malformed is named, adjoints are adjoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lsmc
from lsmc import LSM, M, Scalar, Vector, eye, grad, k, norm2, outer, scalar, v
from lsmc.adjoint import differentiate
from lsmc.canonical import Canonical
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.inputs import Sizes
from lsmc.ir import ATTRS, KINDS, Builder, Dims, LsmIRError, Op, Program, Scanned, operand, parse, verify
from lsmc.keep import keep
from lsmc.reference import _Evaluator
from tests.declarations import Drawn, declarations

zoo = pytest.mark.parametrize("op", lsmc.zoo.METHODS, ids=lambda op: op.name)


def programs(canonical: Canonical) -> list[Program]:
    forward = derive(canonical, 0.5)
    backward = differentiate(forward)
    return [forward, backward, hoist(forward), hoist(backward)]


def printed(canonical: Canonical) -> list[Program]:
    """Those, and a pair of which one hands its memories to the other."""
    found = programs(canonical)
    return [*found, *keep(*found[:2], [c.inp for c in found[0].carries])]


# --- an interpreter of one chunk, by the table of `lsmc.ir`

C, SIZE = 6, {"T": 6, "K": 3, "V": 3, "F": 9, "E": 9, "1": 1}


def draw(op: Op, forward: Program) -> Tensor:
    """An input tile: small, and negative, so that it may be a log decay, unless a logarithm is taken of it."""
    logs = {a for o in forward.ops if o.kind == "map" and type(o.attr("expr")).__name__ == "log" for a in o.args}
    logs |= {Scanned.of(o).fields[0] for o in forward.ops if o.kind == "scan" and type(o.attr("log")).__name__ == "log"}
    return (1 if op.id in logs else -1) * torch.rand(SIZE[op.dims[0]], SIZE[op.dims[1]], dtype=torch.float64)


def weights(strict: bool, before: bool, g: Tensor) -> Tensor:
    """exp of the sum of g over (j, i], or over (j, i) with `before`, for every i, j, column; 0 where j does not precede i."""
    rows = []
    for i in range(C):
        for j in range(C):
            inside = g[j + 1 : i if before else i + 1].sum(0).exp()
            rows.append(inside if j < i else torch.ones_like(inside) if j == i and not strict else torch.zeros_like(inside))
    return torch.stack(rows).view(C, C, -1)


def evaluate(op: Op, a: list[Tensor], dims: list[Dims]) -> Tensor:
    at = dict(op.attrs)
    match op.kind:
        case "map":
            values = {operand(i): x for i, x in enumerate(a)}
            return _Evaluator(values, Sizes(1, C, 1, 1, 1, 1, 1), torch.float64, torch.device("cpu"))(at["expr"])  # type: ignore[arg-type]
        case "expand":
            return a[0].expand(SIZE[op.dims[0]], SIZE[op.dims[1]])
        case "transpose":
            return a[0].T
        case "matmul":
            return (a[0].T if at["ta"] else a[0]) @ (a[1].T if at["tb"] else a[1])
        case "sum":
            return a[0].sum(at["axis"], keepdim=True)
        case "max":
            return a[0].detach().amax(at["axis"], keepdim=True)
        case "cumsum":
            x = a[0].flip(0) if at["reverse"] else a[0]
            x = torch.stack([(x[:i] if at["exclusive"] else x[: i + 1]).sum(0) for i in range(C)])
            return x.flip(0) if at["reverse"] else x
        case "mask":
            return a[0].tril(-1 if at["strict"] else 0)
        case "valid" | "rename":
            return a[0]
        case "pairs":
            return (a[0][:, :, None] * a[1][:, None, :]).flatten(1)
        case "pairs_grad":
            return torch.einsum("iab,ib->ia" if at["wrt"] == 0 else "iba,ib->ia", a[0].unflatten(1, (SIZE["K"], -1)), a[1])
        case "between":
            return weights(at["strict"], at["before"], a[0])[..., 0]
        case "between_grad":
            pairs = [(i, j) for i in range(C) for j in range(i)]
            inside = [[j < n < i + (not at["before"]) for i, j in pairs] for n in range(C)]
            return torch.stack([sum((a[0][i, j] for (i, j), x in zip(pairs, row) if x), a[0].new_zeros(())) for row in inside])[:, None]
        case "form":
            w = weights(at["strict"], at["before"], a[-1])
            return torch.einsum({"P": "id,jd,ijd->ij", "X": "ij,jd,ijd->id", "Y": "ij,id,ijd->jd"}[at["wrt"]], a[0], a[1], w)
        case "form_gate":
            p, x, y, g = a
            g = g.detach().requires_grad_()
            with torch.enable_grad():
                total = torch.einsum("ij,id,jd,ijd->", p.detach(), x.detach(), y.detach(), weights(at["strict"], at["before"], g))
            return torch.autograd.grad(total, g)[0]
        case "scan":
            return scan(op, a, dims)
        case "scan_grad":
            whole = Op(op.id, op.dims, "scan", op.args[:-1], tuple((n, x) for n, x in op.attrs if n != "wrt"))
            given = [x.detach().requires_grad_() for x in a[:-1]]
            with torch.enable_grad():
                made = scan(whole, given, dims)
            return torch.autograd.grad(made, given[at["wrt"]], a[-1].detach())[0]
        case "inverse":
            return torch.linalg.inv(torch.eye(C, dtype=torch.float64) + a[0].tril(-1))
    raise AssertionError(op.kind)


def scan(op: Op, a: list[Tensor], dims: list[Dims]) -> Tensor:
    """Token by token; operands of `log` and `phase` with rows T give their row, as a column where it runs over K."""
    at, of, values = op.attr("at"), Scanned.of(op), dict(zip(op.args, zip(a, dims)))
    query, pairs = of.query is not None, [values[i][0] for i in of.pairs]
    memory, fields = values[of.memory][0], [values[i] for i in of.fields]
    memory = memory if of.imaginary is None else torch.complex(memory, values[of.imaginary][0])
    read = []
    for i in range(C):
        seen = [x if d[0] != "T" else x[i].view(SIZE["K"], -1) if d[1] == "E" else x[i][:, None] if d[1] == "K" else x[i][None]
                for x, d in fields]  # fmt: skip
        known = _Evaluator({operand(n): x for n, x in enumerate(seen)}, Sizes(1, 1, 1, 1, 3, 3, 1), torch.float64, memory.device)  # type: ignore[misc]
        factor = known(op.attr("log")).exp()
        if of.imaginary is not None:
            factor = factor * torch.complex(known(op.attr("phase")).cos(), known(op.attr("phase")).sin())
        decayed = factor * memory
        updated = decayed + sum(k[i][:, None] * v[i] for k, v in zip(pairs[::2], pairs[1::2], strict=True))
        if query:
            read.append(a[0][i] @ torch.real({"previous": memory, "decayed": decayed}.get(at, updated)))
        memory = updated
    return torch.stack(read) if query else memory.imag if at == "imaginary" else torch.real(memory)


def run(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the value of each carry after the chunk under `<name>+`."""
    values: dict[int, Tensor] = {}
    for op in program.ops:
        values[op.id] = inputs[op.attr("name")] if op.kind == "input" else evaluate(
            op, [values[i] for i in op.args], [program.index[i].dims for i in op.args])
    out = {name: values[i] for name, i in program.outputs}
    return out | {f"{c.name}+": values[c.out] for c in program.carries}


def check_adjoint(forward: Program, backward: Program) -> None:
    """⟨J x, w⟩ = ⟨x, Jᵀ w⟩ for random directions x and w: the derivative of `forward` against the value of `backward`."""
    torch.manual_seed(0)
    inputs = {op.attr("name"): draw(op, forward) for op in forward.inputs()}
    names = list(inputs)
    directions = tuple(torch.randn_like(x) for x in inputs.values())
    values, tangents = torch.func.jvp(lambda *xs: run(forward, dict(zip(names, xs))), tuple(inputs.values()), directions)
    cotangents = {f"d_{n.removesuffix('+')}": torch.randn_like(x) for n, x in values.items()}
    found = run(backward, inputs | cotangents)
    left = sum(float((tangents[n] * cotangents[f"d_{n.removesuffix('+')}"]).sum()) for n in values)
    carries = {c.name for c in forward.carries}
    gradients = {n: found[f"d_{n}+" if n in carries else f"d_{n}"] for n in names}
    right = sum(float((x * gradients[n]).sum()) for n, x in zip(names, directions))
    size = sum(float((x * gradients[n]).abs().sum()) for n, x in zip(names, directions))
    assert abs(left - right) <= 1e-11 * size
    assert size > 0


@zoo
def test_derived_adjoints_satisfy_the_dot_product_identity(op: LSM) -> None:
    forward, backward, hoisted, hoisted_backward = programs(op.canonical)
    check_adjoint(forward, backward)
    check_adjoint(hoisted, hoisted_backward)


@given(drawn=declarations())
@settings(max_examples=30)
def test_drawn_adjoints_satisfy_the_dot_product_identity(drawn: Drawn) -> None:
    forward = derive(drawn.declaration().canonical)
    check_adjoint(forward, differentiate(forward))


# --- text


@zoo
def test_a_program_is_what_it_prints(op: LSM) -> None:
    for program in printed(op.canonical):
        assert parse(str(program)) == program
        assert str(parse(str(program))) == str(program)


@given(drawn=declarations())
@settings(max_examples=15)
def test_a_drawn_program_is_what_it_prints(drawn: Drawn) -> None:
    for program in printed(drawn.declaration().canonical):
        assert parse(str(program)) == program


TEXT = str(differentiate(derive(lsmc.zoo.kda.canonical)))


@given(place=st.integers(0, len(TEXT) - 1), by=st.sampled_from(["", "%", "9", "x", "(", ",", "\n", " ", "{", "=", "*", "__", "'"]))
@settings(max_examples=200)
def test_damaged_text_is_a_program_or_a_named_error(place: int, by: str) -> None:
    """Nothing but `LsmIRError` ever comes out of reading text."""
    with contextlib.suppress(LsmIRError):
        parse(TEXT[:place] + by + TEXT[place + 1 :])


# --- malformed programs

HEAD = """program p
%0: (T,K) = input(){name=q, role=token}
%1: (T,V) = input(){name=v, role=token}
%2: (T,1) = input(){name=g, role=token}
%3: (K,V) = input(){name=M, role=carry}
%4: (T,T) = matmul(%0, %0){ta=False, tb=True}
%5: (T,K) = input(){name=d, role=token}
"""

MALFORMED: dict[str, str] = {
    "%4: (T,K) = valid(%0)": "assigned twice",
    "%6: (T,K) = softmax(%0)": "unknown operation 'softmax'",
    "%6: (T,K) = valid(%0, %1)": "takes",
    "%6: (T,K) = valid(%7)": "before it is defined",
    "%6: (T,Q) = valid(%0)": "dimensions are named",
    "%6: (T,K) = valid(%0){strict=True}": "has the attributes",
    "%6: (T,T) = mask(%4)": "has the attributes {strict}",
    "%6: (T,T) = mask(%4){strict=maybe}": "strict is one of",
    "%6: (T,K) = input(){name=x, role=guess}": "role is one of",
    "%6: (T,K) = map(%0){expr=x0 + x1}": "an operand that is not there",
    "%6: (T,V) = map(%0){expr=2*x0}": "not the broadcast",
    "%6: (T,K) = map(%0, %1){expr=x0*x1}": "not the broadcast",
    "%6: (T,1) = expand(%0)": "cannot expand",
    "%6: (T,K) = transpose(%0)": "transposed",
    "%6: (T,V) = matmul(%0, %1){ta=False, tb=False}": "matrix dimensions",
    "%6: (K,V) = matmul(%0, %3){ta=False, tb=False}": "matrix dimensions",
    "%6: (T,K) = sum(%0){axis=1}": "lose the summed dimension",
    "%6: (T,1) = max(%0){axis=2}": "axis is one of",
    "%6: (K,V) = cumsum(%3){reverse=False, exclusive=False}": "rows of a (T, ·) tile",
    "%6: (K,V) = valid(%3)": "rows of a (T, ·) tile",
    "%6: (T,K) = mask(%0){strict=True}": "(T, T) tiles",
    "%6: (T,K) = inverse(%0)": "(T, T) tiles",
    "%6: (T,T) = between(%0){strict=True, before=False}": "maps (T, 1) to (T, T)",
    "%6: (T,1) = between_grad(%2){before=False}": "maps (T, T) to (T, 1)",
    "%6: (T,T) = form(%0, %0, %5){wrt=Z, strict=True, before=False}": "wrt is one of",
    "%6: (T,T) = form(%0, %0, %2){wrt=P, strict=True, before=False}": "the decay is",
    "%6: (T,T) = form(%0, %1, %5){wrt=P, strict=True, before=False}": "like the decay",
    "%6: (T,K) = form(%0, %0, %5){wrt=P, strict=True, before=False}": "of what it is derived by",
    "%6: (T,K) = form_gate(%0, %0, %0, %5){strict=True, before=False}": "(T, T) tile for P",
    "%6: (T,V) = form_gate(%4, %0, %0, %5){strict=True, before=False}": "of what it is derived by",
    "%6: (T,T) = rename(%0)": "exchanges the columns",
    "%6: (T,F) = pairs(%0, %1)": "two (·, K) tiles",
    "%6: (T,K) = pairs_grad(%0, %0){wrt=0}": "a tile over pairs",
    "%6: (T,K) = round(%0, %0)": "takes (1,) operands",
    "%6: (T,1) = diagonal(%0, %0)": "takes (1,) operands",
    "%6: (T,V) = scan(%0, %1, %3, %2){log=x0, phase=0, writes=1, at=updated}": "operands are a query",
    "%6: (K,V) = scan(%0, %1, %3, %2){log=x0, phase=x0, writes=1, at=imaginary}": "its imaginary part",
    "%6: (T,K) = scan(%0, %1, %3, %2){log=x0, phase=0, writes=1, at=real}": "result has the wrong dimensions",
    "%6: (K,V) = scan_grad(%0, %1, %3, %2, %1){wrt=2, log=x0, phase=0, writes=1, at=real}": "the cotangent",
    "carry M: %3 -> %0": "changes its dimensions",
    "carry M: %3 -> %9": "not defined",
    "carry q: %0 -> %0": "role=carry",
    "carry M: %3 -> %3\ncarry M: %3 -> %3": "carry M is there twice",
    "output o = %9": "output o is undefined",
    "output o = %0\noutput o = %1": "output o is there twice",
    "%6: (T,K) = map(%0){expr=os + x0}": "unknown name ['os']",
    "%6: (T,K) = map(%0){expr=x0 +}": "is no expression",
    "%6: (T,K) = valid(q)": "cannot read this line",
    "%6: (T,K) = valid(%0){strict}": "cannot read the attribute",
    "nonsense": "cannot read this line",
}  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_program_is_refused_by_the_name_of_its_operation(line: str) -> None:
    with pytest.raises(LsmIRError) as caught:
        parse(HEAD + line)
    assert MALFORMED[line] in str(caught.value)
    assert line.splitlines()[-1].split("=")[0].split(":")[0].strip() in str(caught.value)


def test_every_kind_of_operation_has_a_malformed_program() -> None:
    assert all(any(f"= {kind}(" in line for line in MALFORMED) for kind in KINDS)
    assert set(ATTRS) <= set(KINDS)
    parse(HEAD + "carry M: %3 -> %3\noutput o = %1")  # what precedes the malformed line is well formed


def test_text_without_a_program_is_refused() -> None:
    with pytest.raises(LsmIRError, match="program NAME"):
        parse("")


# --- one method, one program

b = scalar("beta")
SAME: dict[str, list[Callable[[], LSM]]] = {
    "none": [
        lambda: LSM("m", recurrence=(eye - b * outer(k, k)) @ M + b * outer(k, v)),
        lambda: LSM("m", update=b * outer(k, v - k @ M)),
        lambda: LSM("m", update=-b * grad(norm2(k @ M - v) / 2, M)),
    ],
    "scalar": [
        lambda: LSM("m", decay=Scalar("g"), recurrence=(eye - b * outer(k, k)) @ M.decayed + b * outer(k, v)),
        lambda: LSM("m", decay=Scalar("g"), update=b * outer(k, v - k @ M.decayed)),
        lambda: LSM("m", decay=Scalar("g"), update=-b * grad(norm2(k @ M.decayed - v) / 2, M.decayed)),
    ],
    "vector": [
        lambda: LSM("m", decay=Vector("g"), recurrence=(eye - b * outer(k, k)) @ M.decayed + b * outer(k, v)),
        lambda: LSM("m", decay=Vector("g"), update=b * outer(k, v) - b * outer(k, k) @ M.decayed),
        lambda: LSM("m", decay=Vector("g"), update=-b * grad(norm2(k @ M.decayed - v) / 2, M.decayed)),
    ],
}


@pytest.mark.parametrize("decay", SAME)
def test_one_method_has_one_canonical_form_chunk_program_and_adjoint(decay: str) -> None:
    """Expanded, as a delta rule, and as the gradient of an inner loss."""
    canonical = [write().canonical for write in SAME[decay]]
    for stage in (str, lambda c: str(derive(c)), lambda c: str(differentiate(derive(c)))):
        assert len({stage(c) for c in canonical}) == 1
    assert "inverse" in str(derive(canonical[0]))


def test_programs_know_no_numbers_but_exact_ones() -> None:
    """So that text carries every digit: constants are rationals, not floats."""
    for program in programs(lsmc.zoo.gla.canonical):
        for op in program.ops:
            assert op.kind != "map" or not op.attr("expr").atoms(sympy.Float)


def test_a_sum_of_more_operands_than_a_map_takes_is_made_in_parts() -> None:
    b = Builder()
    terms = [b.input(f"a{n}", "token", ("T", "K")) for n in range(3 * KINDS["map"][-1])]
    total = b.add(*terms)
    program = verify(Program("long", tuple(b.ops), (), (("o", total),)))
    assert {op.id for op in program.ancestors([total]) if op.kind == "input"} == set(terms)


# --- one number for all tokens


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_sums_of_one_number_are_its_multiples(first: bool, second: bool) -> None:
    """Running sums, sums and decays between tokens of a value that all tokens have, and no running sum of it is left."""
    b = Builder()
    x = b.input("x", "head", ("1", "1"))
    g = b.valid(b.expand(x, ("T", "1")))
    made = b.cumsum(g, first, second), b.sum(g, axis=0), b.between(g, first, second)
    plain = (b.emit("cumsum", ("T", "1"), g, reverse=first, exclusive=second), b.emit("sum", ("1", "1"), g, axis=0),
             b.emit("between", ("T", "T"), g, strict=first, before=second))
    ends = [(f"{n}{i}", value) for n, values in (("made", made), ("plain", plain)) for i, value in enumerate(values)]
    program = Program("p", tuple(b.ops), (), tuple(ends))
    out = run(program, {"x": torch.tensor([[-0.3]], dtype=torch.float64)})
    for i in range(3):
        torch.testing.assert_close(out[f"made{i}"], out[f"plain{i}"], rtol=1e-14, atol=0)
    assert all(g not in op.args for op in program.ancestors(made))


@zoo
def test_weights_of_pairs_are_the_same_with_their_decay(op: LSM) -> None:
    """Products of three (T, T) tiles by way of one that is there: the same gradients, and no more products than before."""
    plain = differentiate(derive(op.canonical))
    made = hoist(plain)
    inputs = {o.attr("name"): draw(o, plain) for o in plain.inputs()}
    before, after = run(plain, inputs), run(made, inputs)
    for n, x in before.items():
        torch.testing.assert_close(after[n], x, rtol=1e-9, atol=1e-12)
    maps = [sum(o.kind == "map" and o.dims == ("T", "T") for o in p.ops) for p in (plain, made)]
    assert maps[1] <= maps[0]
