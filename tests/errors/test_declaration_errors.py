"""Every mistake has its class, is raised within a second, and underlines the offending term in the user's line."""

from __future__ import annotations

import linecache
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lsmc
from lsmc import errors
from lsmc.chunk import derive

# the mistake, the program (the last line is the wrong one), the class, and the text that is underlined
PROGRAMS: list[tuple[str, str, type[errors.LsmError], str]] = [
    ("a bare string", 'LSM("m", update="beta" * outer(k, v))', errors.LsmUnknownSymbolError, '"beta"'),
    ("a foreign symbol", 'LSM("m", update=outer(k, v) * sympy.Symbol("beta"))', errors.LsmUnknownSymbolError, 'sympy.Symbol("beta")'),
    ("a part that the memory lacks", 'LSM("m", update=outer(k, v - k @ M.future))', errors.LsmUnknownSymbolError, "M.future"),
    ("adding over different dims", 'LSM("m", update=outer(k + v, v))', errors.LsmDimsError, "v"),
    ("multiplying over different dims", 'LSM("m", update=k * v)', errors.LsmDimsError, "v"),
    ("reading with a value", 'LSM("m", update=outer(k, v - v @ M))', errors.LsmDimsError, "v"),
    ("reading from the right", 'LSM("m", update=outer(k, M @ v))', errors.LsmDimsError, "v"),
    ("a dot product over two dims", 'LSM("m", update=(q @ v) * outer(k, v))', errors.LsmDimsError, "v"),
    ("contracting a scalar", 'LSM("m", update=outer(k, 2 @ M))', errors.LsmDimsError, "2"),
    ("an outer product the wrong way round", 'LSM("m", update=outer(v, k))', errors.LsmDimsError, "v"),
    ("an update that is a vector", 'LSM("m", update=k * 2)', errors.LsmDimsError, "k * 2"),
    ("an update that is an operator", 'LSM("m", update=outer(k, k))', errors.LsmDimsError, "outer(k, k)"),
    ("adding to an operator", 'LSM("m", recurrence=(1 - outer(k, k)) @ M)', errors.LsmDimsError, "1"),
    ("a readout over K", 'LSM("m", update=outer(k, v), readout=q)', errors.LsmDimsError, "q"),
    ("a vector as a scalar decay", 'LSM("m", decay=Scalar(vector("g")), update=outer(k, v))', errors.LsmDimsError, 'vector("g")'),
    ("a decay over the wrong dim", 'LSM("m", decay=Vector(v, over="K"), update=outer(k, v))', errors.LsmDimsError, "v"),
    ("a vector over no dim", 'vector("g", over="T")', errors.LsmDimsError, '"T"'),
    ("a norm of a matrix", "norm2(M)", errors.LsmDimsError, "M"),
    ("a loss that is no scalar", "grad(k @ M - v, M)", errors.LsmDimsError, "k @ M - v"),
    ("a loss of another memory", "grad(norm2(k @ M.decayed), M)", errors.LsmUpdateError, "norm2(k @ M.decayed)"),
    ("a gradient by an input", "grad(norm2(k @ M), k)", errors.LsmDeclarationError, "k"),
    ("a name for a decay", 'LSM("m", decay="g", update=outer(k, v))', errors.LsmDeclarationError, '"g"'),
    ("no update", 'LSM("m", decay=Scalar("g"))', errors.LsmDeclarationError, 'LSM("m", decay=Scalar("g"))'),
    ("an update that is a number", 'LSM("m", update=3)', errors.LsmDeclarationError, "3"),
    ("an update that is text", 'LSM("m", update="outer(k, v)")', errors.LsmUnknownSymbolError, '"outer(k, v)"'),
    ("a decay times a number", '2 * Scalar("g")', errors.LsmDeclarationError, "2"),
    ("a decay times the memory", 'Scalar("g") * M', errors.LsmDeclarationError, "M"),
    ("a decay that reads the memory", "Scalar(norm2(k @ M))", errors.LsmDeclarationError, "norm2(k @ M)"),
    ("a constant that varies over tokens", 'Constant(scalar("g"))', errors.LsmDeclarationError, 'scalar("g")'),
    ("an infinite number", 'k * float("inf")', errors.LsmDeclarationError, 'float("inf")'),
    ("a varying exponent", "k ** k", errors.LsmDeclarationError, "k"),
    ("squaring the memory", 'LSM("m", update=M * M)', errors.LsmUpdateError, "M * M"),
    ("a function of the whole memory", 'LSM("m", update=tanh(M))', errors.LsmUpdateError, "tanh(M)"),
    ("a function of an outer product", 'LSM("m", update=tanh(outer(k, v)))', errors.LsmUpdateError, "tanh(outer(k, v))"),
    (
        "a key that depends on the memory",
        'LSM("m", update=outer(tanh(k * norm2(k @ M)), v))',
        errors.LsmUpdateError,
        "outer(tanh(k * norm2(k @ M)), v)",
    ),
    ("the memory as output", 'LSM("m", update=outer(k, v), readout=q @ M + q @ tanh(M))', errors.LsmUpdateError, "q @ M + q @ tanh(M)"),
    ("a normaliser in an update", 'LSM("m", update=(q @ M.normalizer) * outer(k, v))', errors.LsmUpdateError, "(q @ M.normalizer) * outer(k, v)"),
    (
        "a normaliser beside a decay over V",
        'LSM("m", decay=Vector("g", over="V"), update=outer(k, v), readout=(q @ M) / (q @ M.normalizer))',
        errors.LsmUpdateError,
        "(q @ M) / (q @ M.normalizer)",
    ),
    ("the next key", 'LSM("m", update=outer(k[+1], v))', errors.LsmCausalityError, "+1"),
    ("the next value", 'LSM("m", update=outer(k, v.next))', errors.LsmCausalityError, "v.next"),
    ("the next memory", 'LSM("m", update=outer(k, v), readout=q @ M.next)', errors.LsmCausalityError, "M.next"),
    ("the key before", 'LSM("m", update=outer(k[-1], v))', errors.LsmDelayError, "-1"),
    (
        "the softmax over products of PaTH attention",
        'LSM("m", recurrence=(eye - scalar("beta") * outer(k, k)) @ M + outer(k, v), readout=softmax(q @ k) * v)',
        errors.LsmDelayError,
        "q @ k",
    ),
    (
        "the memory mixing of sLSTM in a gate",
        'LSM("m", decay=Scalar(logsigmoid(scalar("f") + v @ (q @ M))), update=outer(k, v))',
        errors.LsmDeclarationError,
        'logsigmoid(scalar("f") + v @ (q @ M))',
    ),
    ("an angle over V", 'Rotation(vector("theta", over="V"))', errors.LsmDimsError, 'vector("theta", over="V")'),
    ("momentum by name", 'LSM("m", momentum="eta", update=outer(k, v))', errors.LsmDeclarationError, '"eta"'),
    ("momentum over K", 'LSM("m", momentum=Vector("h"), update=outer(k, v))', errors.LsmDimsError, 'Vector("h")'),
    ("momentum of a recurrence", 'LSM("m", momentum=Scalar("h"), recurrence=M + outer(k, v))', errors.LsmDeclarationError, 'Scalar("h")'),
    ("scaling beside momentum", 'LSM("m", momentum=Scalar("h"), update=outer(k, v) - 0.5 * M)', errors.LsmUpdateError, "outer(k, v) - 0.5 * M"),
    ("a normaliser beside a rotation", 'LSM("m", decay=Rotation("t"), update=outer(k, v), readout=(q @ M) / (q @ M.normalizer))', errors.LsmUpdateError, "(q @ M) / (q @ M.normalizer)"),
    ("pairs beside the vector", 'LSM("m", update=outer(pairs(k) + k, v))', errors.LsmDimsError, "pairs(k) + k"),
    ("reading pairs with a vector", 'LSM("m", update=outer(pairs(k), v), readout=q @ M)', errors.LsmDimsError, "q @ M"),
    ("pairs that decay along K", 'LSM("m", decay=Vector("g"), update=outer(pairs(k), v), readout=pairs(q) @ M)', errors.LsmDimsError, 'Vector("g")'),
    ("a norm of pairs", "l2norm(pairs(k))", errors.LsmDimsError, "pairs(k)"),
    ("pairs of a value", "pairs(v)", errors.LsmDimsError, "v"),
    ("a value over V again", 'over(v, "V")', errors.LsmDimsError, "v"),
    ("what is read over K", 'over(k @ M, "K")', errors.LsmUpdateError, "k @ M"),
    ("a block of no token", 'LSM("m", block=0, update=outer(k, v - k @ M))', errors.LsmDeclarationError, "0"),
    ("a block without a read", 'LSM("m", block=4, update=outer(k, v))', errors.LsmUpdateError, "4"),
    ("a block and the decayed memory", 'LSM("m", decay=Scalar("g"), block=4, update=outer(k, v - k @ M.decayed))', errors.LsmUpdateError, "outer(k, v - k @ M.decayed)"),
    ("a bias that decays along K", 'LSM("m", decay=Vector("g"), update=outer(k, v), readout=q @ M + M.bias)', errors.LsmUpdateError, "q @ M + M.bias"),
    ("reading the bias", 'LSM("m", update=outer(k, v), readout=q @ M.bias)', errors.LsmDimsError, "M.bias"),
    ("an input of nobody", 'scalar("a", per="batch")', errors.LsmDeclarationError, '"batch"'),
    ("a growing constant", "Constant(0.1)", errors.LsmDecayError, "0.1"),
    ("a growing default", 'Constant("log_a", default=0.1)', errors.LsmDecayError, "0.1"),
    ("a default that grows for some head", 'Constant("a", default=lambda n: [0.5 - h for h in range(n)])', errors.LsmDecayError, "lambda n: [0.5 - h for h in range(n)]"),
    ("a decay that is positive for certain", 'Scalar(softplus(scalar("f")))', errors.LsmDecayError, 'softplus(scalar("f"))'),
    ("an update that doubles the memory", 'LSM("m", update=(eye - outer(k, k)) @ M.decayed)', errors.LsmDecayError, "(eye - outer(k, k)) @ M.decayed"),
    ("one name for two inputs", 'LSM("m", decay=Vector("g"), update=scalar("g") * outer(k, v))', errors.LsmDuplicateNameError, 'scalar("g") * outer(k, v)'),
    ("a standard name", 'vector("k")', errors.LsmNameError, '"k"'),
    ("code as a name", 'scalar("a); import os; (b")', errors.LsmNameError, '"a); import os; (b"'),
    ("a keyword", 'scalar("lambda")', errors.LsmNameError, '"lambda"'),
    ("a builtin", 'scalar("print")', errors.LsmNameError, '"print"'),
    ("a reserved name", 'scalar("scale")', errors.LsmNameError, '"scale"'),
    ("a name of a read", 'scalar("R0")', errors.LsmNameError, '"R0"'),
    ("a dunder", 'scalar("__class__")', errors.LsmNameError, '"__class__"'),
    ("no text as a name", "scalar(3)", errors.LsmNameError, "3"),
    ("an unsafe method name", 'LSM("a b", update=outer(k, v))', errors.LsmNameError, '"a b"'),
    ("an unsafe decay name", 'Scalar("a.b")', errors.LsmNameError, '"a.b"'),
]  # fmt: skip


def run(program: str, filename: str) -> None:
    """Runs a program as if it stood in a file of the user's."""
    text = "import sympy\nfrom lsmc import *\n" + program + "\n"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    exec(compile(text, filename, "exec"), {"__name__": "user"})


@pytest.mark.parametrize(
    "mistake, program, kind, underlined", PROGRAMS, ids=[row[0].replace(" ", "-") for row in PROGRAMS]
)
def test_a_mistake_is_named_and_underlined_within_a_second(
    mistake: str, program: str, kind: type[errors.LsmError], underlined: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(errors.LsmError) as caught:
        run(program, "/users/mine.py")
    assert time.perf_counter() - start < 1
    assert type(caught.value) is kind
    printed = f"lsmc.{kind.__name__}: {caught.value}".splitlines()
    assert printed[0].startswith(f"lsmc.{kind.__name__}: mine.py:3: ")
    assert printed[0].endswith(program)
    carets = printed[1]
    begin, end = carets.index("^"), carets.rindex("^") + 1
    assert printed[0][begin:end] == underlined
    assert carets[end:].strip()


def test_the_text_of_an_error_shows_place_rule_and_way_out() -> None:
    with pytest.raises(errors.LsmDimsError) as caught:
        run('d = LSM("m", decay=Scalar(vector("g")), update=outer(k, v))', "/users/mine.py")
    assert f"lsmc.LsmDimsError: {caught.value}" == (
        'lsmc.LsmDimsError: mine.py:3: d = LSM("m", decay=Scalar(vector("g")), update=outer(k, v))\n'
        "                                                        ^^^^^^^^^^^ Scalar takes a log decay with dims (); g has dims (K,)\n"
        'help: use Vector(…, over="K")'
    )


def test_an_error_without_source_still_says_where() -> None:
    with pytest.raises(errors.LsmDimsError, match=r"^nowhere:1: v has dims"):
        exec(compile("lsmc.k + lsmc.v", "nowhere", "exec"), {"lsmc": lsmc})


def test_errors_survive_pickling() -> None:
    with pytest.raises(errors.LsmError) as caught:
        run("k + v", "/users/mine.py")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value)


def test_every_error_class_is_exported_and_documented() -> None:
    for kind in errors.ERRORS:
        assert getattr(lsmc, kind.__name__) is kind
        assert kind.__doc__


def test_a_method_that_is_not_affine_says_so_without_running() -> None:
    error = errors.LsmNotAffineError.of("m", "tanh(R0)", ["R0"])
    assert "tanh(R0)" in str(error)
    assert "help:" in str(error)


UNCHUNKED: list[tuple[str, type[errors.LsmError], str]] = [
    ('m = LSM("m", update=outer(k, tanh(v - k @ M)))', errors.LsmNotAffineError, "tanh"),
    # the memory mixing of sLSTM in what is written
    ('m = LSM("m", decay=Scalar("g"), update=outer(k, tanh(v + q @ M)))', errors.LsmNotAffineError, "not affine in R0"),
    ('m = LSM("m", update=outer(k, v - layernorm(k @ M)))', errors.LsmNotAffineError, "block=16"),
    ('m = LSM("m", update=outer(k, v), readout=q @ M + q @ matrix("A"))', errors.LsmNoChunkFormError, "outside of the decay"),
    ('m = LSM("m", decay=Matrix(matrix("A", per="head")), update=outer(k, v - k @ M))', errors.LsmNoChunkFormError, "is read by its own update"),
    ('m = LSM("m", decay=Vector("g"), momentum=Scalar("h"), update=outer(k, v))', errors.LsmNoChunkFormError, "momentum beside g"),
    ('m = LSM("m", decay=Rotation("theta"), momentum=Scalar("h"), update=outer(k, v))', errors.LsmNoChunkFormError, "momentum beside theta"),
]


@pytest.mark.parametrize("program, kind, match", UNCHUNKED)
def test_what_has_no_chunk_form_says_so_when_one_is_asked_for(
    program: str, kind: type[errors.LsmError], match: str
) -> None:
    user: dict[str, Any] = {"__name__": "user"}
    exec("from lsmc import *\n" + program, user)
    start = time.perf_counter()
    with pytest.raises(kind, match=match):
        derive(user["m"].canonical)
    assert time.perf_counter() - start < 1


# --- calls

B, T, H, HV, K, V = 2, 3, 2, 4, 5, 6


def arguments() -> dict[str, torch.Tensor]:
    return {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, HV, V),
        "g": -torch.rand(B, T, HV, K),
        "beta": torch.rand(B, T, HV),
    }


CALLS: list[tuple[str, Callable[[dict[str, object]], object], type[errors.LsmError], str]] = [
    ("missing", lambda a: a.pop("g"), errors.LsmMissingInputError, r"'g', \(B, T, HV, K\)"),
    ("unexpected", lambda a: a.update(gate=a["g"]), errors.LsmUnexpectedInputError, "'gate'"),
    ("too few dimensions", lambda a: a.update(g=torch.rand(B, T, HV)), errors.LsmShapeError, r"\(B, T, HV, K\)"),
    ("another length", lambda a: a.update(g=torch.rand(B, T + 1, HV, K)), errors.LsmShapeError, "T = 4"),
    ("another width", lambda a: a.update(k=torch.rand(B, T, H, K + 1)), errors.LsmShapeError, "K = 6"),
    ("heads that do not divide", lambda a: a.update(v=torch.rand(B, T, 3, V), g=torch.rand(B, T, 3, K), beta=torch.rand(B, T, 3)),
     errors.LsmShapeError, "multiple"),
    ("whole numbers", lambda a: a.update(q=torch.ones(B, T, H, K, dtype=torch.int64)), errors.LsmDtypeError, "int64"),
    ("complex numbers", lambda a: a.update(q=torch.ones(B, T, H, K, dtype=torch.complex64)), errors.LsmDtypeError, "complex64"),
    ("a list", lambda a: a.update(q=[1.0]), errors.LsmDtypeError, "list"),
    ("a wrong state", lambda a: a.update(initial_state=torch.zeros(B, HV, V, K)), errors.LsmShapeError, "initial_state"),
    ("two states", lambda a: a.update(initial_state=(torch.zeros(B, HV, K, V),) * 2), errors.LsmShapeError, "1 state"),
    ("a state that is no tensor", lambda a: a.update(initial_state=(0,)), errors.LsmDtypeError, "initial_state"),
    ("packed batches", lambda a: a.update(cu_seqlens=torch.tensor([0, 3])), errors.LsmSequenceError, "B = 1"),
    ("float offsets", lambda a: a.update(cu_seqlens=torch.tensor([0.0, 3.0])), errors.LsmSequenceError, "int32"),
]  # fmt: skip


@pytest.mark.parametrize(
    "mistake, change, kind, match", CALLS, ids=[row[0].replace(" ", "-") for row in CALLS]
)
def test_a_wrong_call_names_the_input(
    mistake: str, change: Callable[[dict[str, object]], object], kind: type[errors.LsmError], match: str
) -> None:
    given: dict[str, object] = dict(arguments())
    change(given)
    with pytest.raises(kind, match=match) as caught:
        lsmc.reference(lsmc.zoo.kda)(**given)
    assert type(caught.value) is kind


@pytest.mark.parametrize("offsets", [[1, 3], [0, 2], [0, 3, 2, 3], []])
def test_offsets_must_rise_from_zero_to_the_length(offsets: list[int]) -> None:
    given = {name: x[:1] for name, x in arguments().items()}
    with pytest.raises(errors.LsmSequenceError):
        lsmc.reference(lsmc.zoo.kda)(**given, cu_seqlens=torch.tensor(offsets, dtype=torch.int64))
