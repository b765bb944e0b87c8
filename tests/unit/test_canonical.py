"""Laws of the canonical form: one method, one text, whatever its writing."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import sympy

import lsmc
from lsmc import (
    LSM,
    Constant,
    Identity,
    M,
    Matrix,
    Scalar,
    Vector,
    eye,
    grad,
    k,
    matrix,
    norm2,
    outer,
    q,
    scalar,
    v,
    vector,
)
from lsmc.canonical import collect, content, separate
from lsmc.expr import Field, Sum, dims_of
from lsmc.terms import Term

beta, g = scalar("beta"), Scalar("g")

# writings of one method, each list under one name
SAME: dict[str, list[LSM]] = {
    "the delta rule": [
        LSM("m", update=beta * outer(k, v - k @ M)),
        LSM("m", update=beta * outer(k, v) - beta * outer(k, k) @ M),
        LSM("m", update=outer(beta * k, v - k @ M.decayed)),
        LSM("m", update=-outer(k, (k @ M - v) * beta)),
        LSM("m", update=-beta * grad(norm2(k @ M - v) / 2, M)),
        LSM("m", update=-0.5 * beta * grad(norm2(v - k @ M), M)),
        LSM("m", recurrence=(eye - beta * outer(k, k)) @ M + beta * outer(k, v)),
        LSM("m", decay=Identity(), recurrence=M.previous + beta * outer(k, v - k @ M.previous)),
    ],
    "the delta rule at the decayed memory": [
        LSM("m", decay=g, update=beta * outer(k, v - k @ M.decayed)),
        LSM("m", decay=g, update=beta * outer(k, v) - beta * outer(k, k) @ M.decayed),
        LSM("m", decay=g, update=-beta * grad(norm2(k @ M.decayed - v) / 2, M.decayed)),
        LSM("m", decay=g, recurrence=(eye - beta * outer(k, k)) @ M.decayed + beta * outer(k, v)),
    ],
    "the same with the decay as a factor": [
        LSM("m", decay=g, update=beta * outer(k, v - k @ M.decayed)),
        LSM("m", recurrence=lsmc.exp(scalar("g")) * ((eye - beta * outer(k, k)) @ M) + beta * outer(k, v)),
        LSM("m", recurrence=(eye - beta * outer(k, k)) @ (lsmc.exp(scalar("g")) * M) + beta * outer(k, v)),
        LSM("m", decay=g, update=beta * outer(k, v - lsmc.exp(scalar("g")) * (k @ M))),
    ],
    "the same with a decay over K": [
        LSM("m", decay=Vector("g"), update=beta * outer(k, v - k @ M.decayed)),
        LSM("m", recurrence=(eye - beta * outer(k, k)) @ lsmc.diag(lsmc.exp(vector("g"))) @ M + beta * outer(k, v)),
        LSM("m", recurrence=(eye - beta * outer(k, k)) @ (lsmc.exp(vector("g")) * M) + beta * outer(k, v)),
    ],
    "a decay in the update": [
        LSM("m", decay=Scalar(lsmc.log1p(-beta)), update=outer(k, v)),
        LSM("m", update=outer(k, v) - beta * M),
        LSM("m", recurrence=(1 - beta) * M + outer(k, v)),
    ],
    "a decay as a factor": [
        LSM("m", decay=Vector("g"), update=outer(k, v)),
        LSM("m", recurrence=lsmc.exp(vector("g")) * M + outer(k, v)),
        LSM("m", recurrence=lsmc.diag(lsmc.exp(vector("g"))) @ M + outer(k, v)),
    ],
    "a feature map": [
        LSM("m", update=outer(lsmc.elu(k) + 1, v - (lsmc.elu(k) + 1) @ M)),
        LSM("m", update=outer(lsmc.elu(k) + 1, v) - outer(1 + lsmc.elu(k), 1 + lsmc.elu(k)) @ M),
    ],
    "a bonus": [
        LSM("m", update=outer(k, v), readout=q @ (M.previous + outer(beta * k, v))),
        LSM("m", update=outer(k, v), readout=q @ M.previous + beta * (q @ k) * v),
    ],
    "a product of decays": [
        LSM("m", decay=Scalar("g") * Vector("h"), update=outer(k, v)),
        LSM("m", decay=Vector(scalar("g") + vector("h")), update=outer(k, v)),
    ],
    "an even loss": [
        LSM("m", update=-beta * grad(lsmc.total((k @ M - v) ** 4), M)),
        LSM("m", update=-beta * grad(lsmc.total((v - k @ M) ** 4), M)),
        LSM("m", update=4 * beta * outer(k, (v - k @ M) ** 3)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("method", SAME)
def test_all_writings_of_a_method_have_one_canonical_form_and_text(method: str) -> None:
    first, *others = SAME[method]
    for other in others:
        assert str(other.canonical) == str(first.canonical)
        assert other.canonical == first.canonical


def test_the_canonical_program_reads_corrects_writes_and_decays() -> None:
    assert str(LSM("m", decay=Vector("g"), update=beta * outer(k, v - k @ M.decayed)).canonical) == (
        "m(q(B,T,H,K), k(B,T,H,K), v(B,T,HV,V), g(B,T,HV,K), beta(B,T,HV))\n"
        "  decay   M' = exp(g)(K,) * M\n"
        "  read    R0 = (k) . M'\n"
        "  write   M+ = M' + (k)^T (-R0*beta + beta*v)\n"
        "  query   Y0 = (q) . M+\n"
        "  output  o = Y0"
    )


def test_keys_of_equal_values_and_values_of_equal_keys_are_one_write() -> None:
    a, b = vector("a"), vector("b")
    assert len(LSM("m", update=outer(a, v) + outer(b, v)).canonical.writes) == 1
    assert len(LSM("m", update=outer(a, v) + 2 * outer(b, v)).canonical.writes) == 1
    assert len(LSM("m", update=outer(a, v) + outer(a, v * v)).canonical.writes) == 1
    assert len(LSM("m", update=outer(a, v) + outer(b, v * v)).canonical.writes) == 2


def test_reads_of_proportional_keys_are_one_read() -> None:
    made = LSM("m", update=outer(k, v - (beta * k) @ M - (2 * k) @ M)).canonical
    assert len(made.reads) == 1


def test_reads_that_cancel_are_dropped() -> None:
    assert (
        LSM("m", update=outer(k, v - k @ M) + outer(k, k @ M)).canonical
        == LSM("m", update=outer(k, v)).canonical
    )


def test_scalars_move_from_keys_to_values() -> None:
    (write,) = LSM("m", update=outer(-3 * beta * k, v)).canonical.writes
    assert write.key == k.expr
    assert write.value == -3 * beta.expr * v.expr


def test_a_read_before_the_decay_is_not_a_read_after_it() -> None:
    before = LSM("m", decay=g, update=outer(k, v - k @ M)).canonical
    after = LSM("m", decay=g, update=outer(k, v - k @ M.decayed)).canonical
    assert [r.at for r in before.reads] == ["previous"]
    assert [r.at for r in after.reads] == ["decayed"]


def test_the_memory_of_a_readout_is_the_updated_one() -> None:
    assert [y.at for y in LSM("m", decay=g, update=outer(k, v)).canonical.queries] == ["updated"]
    everything = q @ M + q @ M.previous + q @ M.decayed
    made = LSM("m", decay=g, update=outer(k, v), readout=everything).canonical
    assert [y.at for y in made.queries] == ["previous", "decayed", "updated"]


def test_a_normaliser_is_a_second_memory_with_scalar_queries() -> None:
    phi = lsmc.elu(q) + 1
    made = LSM("m", decay=g, update=outer(k, v), readout=(phi @ M) / (phi @ M.normalizer + 1e-6)).canonical
    assert made.normalizer
    assert [(y.of, y.symbol.dims) for y in made.queries] == [("M", ("V",)), ("Z", ())]


def test_inputs_come_in_one_order_and_unused_ones_are_absent() -> None:
    made = LSM("m", decay=Vector("z"), update=outer(-lsmc.expm1(vector("z")), scalar("b") * scalar("a") * v))
    assert [symbol.name for symbol in made.inputs] == ["q", "v", "z", "a", "b"]
    assert [symbol.heads for symbol in made.inputs] == ["H", "HV", "HV", "HV", "HV"]


def test_the_gradient_goes_through_pointwise_losses_and_norms() -> None:
    error = k @ M - v
    huber = lsmc.total(lsmc.sqrt(1 + error**2))
    (write,) = LSM("m", update=-grad(huber, M)).canonical.writes
    r = Field("R0", ("V",))
    assert sympy.simplify(write.value + (r - v.expr) / sympy.sqrt(1 + (r - v.expr) ** 2)) == 0
    normed = LSM("m", update=-grad(norm2(lsmc.l2norm(k @ M) - v), M)).canonical
    assert len(normed.writes) == 1
    assert normed.writes[0].value.atoms(Sum)


def test_a_nonlinear_update_is_legal() -> None:
    made = LSM("m", update=beta * outer(k, lsmc.tanh(v - k @ M))).canonical
    assert made.reads[0].symbol in made.writes[0].value.free_symbols


def test_decays_multiply_over_their_dims() -> None:
    made = LSM("m", decay=Vector("gk") * Vector("gv", over="V") * Scalar("s"), update=outer(k, v)).canonical
    assert made.decay_k is not None
    assert made.decay_v is not None
    assert dims_of(made.decay_k) == {"K"}
    assert dims_of(made.decay_v) == {"V"}
    full = LSM("m", decay=Matrix("A"), update=outer(k, v)).canonical
    assert full.decay_kv == matrix("A").expr


def test_decays_may_be_expressions_of_the_log_decay() -> None:
    made = LSM("m", decay=Vector(lsmc.logsigmoid(vector("f")) / 16), update=outer(k, v)).canonical
    assert [symbol.name for symbol in made.inputs] == ["q", "k", "v", "f"]


def test_a_default_belongs_to_an_input_in_use() -> None:
    made = LSM(
        "m", decay=Constant("log_a", default=lambda n: [-1.0 - h for h in range(n)]), update=outer(k, v)
    ).canonical
    assert made.defaults["log_a"](3) == [-1.0, -2.0, -3.0]
    assert lsmc.zoo.retnet.canonical.defaults["log_a"](2) == pytest.approx([-0.0317487, -0.0157484], rel=1e-5)


def test_a_declaration_is_a_value() -> None:
    make = lambda: LSM("m", decay=g, update=beta * outer(k, v - k @ M.decayed))  # noqa: E731
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != LSM("n", decay=g, update=beta * outer(k, v - k @ M.decayed))
    with pytest.raises(AttributeError):
        make().name = "n"  # type: ignore[misc]
    assert copy.deepcopy(make()) == make()
    assert pickle.loads(pickle.dumps(make())) == make()


def test_declaring_takes_milliseconds() -> None:
    start = time.perf_counter()
    LSM("fresh", decay=Vector("ga"), update=scalar("bb") * outer(lsmc.silu(k), v - lsmc.silu(k) @ M.decayed))
    assert time.perf_counter() - start < 0.5


def test_the_zoo_lists_its_methods_under_their_names() -> None:
    assert len(set(lsmc.zoo.names())) == len(lsmc.zoo.METHODS)
    for name in lsmc.zoo.names():
        assert getattr(lsmc.zoo, name).name == name


def test_separate_gives_back_what_it_took_apart() -> None:
    a, b = vector("a").expr, vector("b", over="V").expr
    for expr in (a * b, (a + 1) * (b - 2), (a + b) ** 2, a**2 / b, (a * b) ** -1):
        assert sympy.expand(sum(x * y for x, y in separate(expr)) - expr) == 0
    with pytest.raises(ValueError, match="no sum of products"):
        separate(sympy.tanh(a * b))


def test_content_and_collect_keep_the_value() -> None:
    s, a, b = scalar("s").expr, vector("a").expr, vector("b", over="V").expr
    factor, rest = content(-2 * s * a + 4 * s**2)
    assert sympy.expand(factor * rest - (-2 * s * a + 4 * s**2)) == 0
    pairs = [(a + 1, b), (2 * a, s * b), (a**2, b**2)]
    assert sympy.expand(sum(x * y for x, y in collect(pairs)) - sum(x * y for x, y in pairs)) == 0


def test_terms_are_values_and_print_as_written() -> None:
    assert isinstance(beta, Term)
    assert beta == scalar("beta")
    assert hash(beta) == hash(scalar("beta"))
    assert repr(k @ M) == "sum_K(M*k)"
    assert pickle.loads(pickle.dumps(beta)) == beta
    assert k[0] is k
