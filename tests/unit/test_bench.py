"""`lsmc bench`: peers are called so that they compute our methods, what is missing is reported, and pages stand alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import lsmc
from lsmc import zoo
from lsmc.cases import Case, sample
from lsmc.runtime.bench import command, first, measure, run
from lsmc.runtime.bench.contenders import CONTENDERS, Absent
from lsmc.runtime.bench.measure import Ceilings, Decode, Run, Subject, Timing
from lsmc.runtime.bench.page import render
from lsmc.runtime.errors import LsmConfigError
from lsmc.zoo.peers import PEERS
from tests.pages import Page

SHAPE = (2, 9, 2, 4, 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def recurrence(method: Any, scale: float | None, **inputs: Tensor) -> Tensor:
    o: Tensor = lsmc.reference(method)(**inputs, scale=inputs["q"].shape[-1] ** -0.5 if scale is None else scale)
    return o


gated = lsmc.LSM("gated", decay=lsmc.Scalar("g"), update=lsmc.outer(lsmc.k, lsmc.v))


def stand_ins() -> dict[str, Callable[..., Any]]:
    """What the functions of the packages compute, with their names of inputs, their layouts and their scale."""

    def chunk_linear_attn(q, k, v, scale=None, normalize=True):
        assert not normalize
        return recurrence(zoo.bla, scale, q=q, k=k, v=v), None

    def chunk_retention(q, k, v, scale=None):
        return recurrence(zoo.retnet, scale, q=q, k=k, v=v), None

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
        return recurrence(gated, scale, q=q, k=k, v=v, g=g), None

    def chunk_gla(q, k, v, g, scale=None):
        return recurrence(zoo.gla, scale, q=q, k=k, v=v, g=g), None

    def chunk_delta_rule(q, k, v, beta, scale=None):
        return recurrence(zoo.deltanet, scale, q=q, k=k, v=v, beta=beta), None

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None):
        return recurrence(zoo.gated_deltanet, scale, q=q, k=k, v=v, g=g, beta=beta), None

    def chunk_kda(q, k, v, g, beta, scale=None, safe_gate=False):
        assert not safe_gate or g.min() >= -5
        return recurrence(zoo.kda, scale, q=q, k=k, v=v, g=g, beta=beta), None

    def chunk_rwkv6(r, k, v, w, u, scale=None):
        return recurrence(zoo.rwkv6, scale, q=r, k=k, v=v, g=w, u=u), None

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, safe_gate=False):
        return recurrence(zoo.rwkv7, scale, q=r, k=k, v=v, g=w, a=a, b=b), None

    def parallel_rebased(q, k, v, eps=1e-5, use_scale=True, use_normalize=True):
        assert eps == 1e-6 and not use_scale and use_normalize
        one, none = torch.ones_like(q[0, 0, 0]), torch.zeros_like(q[0, 0, 0])
        return recurrence(zoo.rebased, 1.0, q=q, k=k, v=v, gamma=one, beta=none)

    def chunk_momentum_delta_rule(q, k, v, log_alpha, log_mu, p=None, beta=None, eta=None, scale=None, use_qk_l2norm_in_kernel=True,
                                  use_p_times_alpha=True):
        assert p is k and beta is None and not use_qk_l2norm_in_kernel and not use_p_times_alpha
        return recurrence(zoo.titans, scale, q=q, k=k, v=v, alpha=-log_alpha.expm1(), eta=log_mu.exp(), theta=eta), None

    def heads_first(method):
        def call(q, k, v, g=None, beta=None, *, C=64, scale=1.0):
            given = {n: x.transpose(1, 2) for n, x in {"q": q, "k": k, "v": v, "g": g, "beta": beta}.items() if x is not None}
            return recurrence(method, scale, **given).transpose(1, 2)

        return call

    made = {
        "fla.ops.linear_attn:chunk_linear_attn": chunk_linear_attn, "fla.ops.retention:chunk_retention": chunk_retention,
        "fla.ops.simple_gla:chunk_simple_gla": chunk_simple_gla, "fla.ops.gla:chunk_gla": chunk_gla,
        "fla.ops.delta_rule:chunk_delta_rule": chunk_delta_rule, "fla.ops.kda:chunk_kda": chunk_kda,
        "fla.ops.gated_delta_rule:chunk_gated_delta_rule": chunk_gated_delta_rule, "fla.ops.rwkv6:chunk_rwkv6": chunk_rwkv6,
        "fla.ops.rwkv7:chunk_rwkv7": chunk_rwkv7, "fla.ops.rebased:parallel_rebased": parallel_rebased,
        "fla.ops.momentum_delta_rule:chunk_momentum_delta_rule": chunk_momentum_delta_rule,
        "flash_qla:chunk_gated_delta_rule": chunk_gated_delta_rule,
    }  # fmt: skip
    for name, method in (("linear_attn", zoo.bla), ("retention", gated), ("mamba2_ssd", gated), ("gla", zoo.gla),
                         ("delta_rule", zoo.deltanet), ("gated_delta_rule", zoo.gated_deltanet), ("kda", zoo.kda)):
        made[f"examples.linear.linear_attention_engine:helion_chunk_{name}"] = heads_first(method)
    return made


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of the peers, as modules that hold the stand-ins."""
    for place, function in stand_ins().items():
        name, _, attribute = place.partition(":")
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            if ".".join(parts[:n]) not in sys.modules or n == len(parts) and not hasattr(sys.modules[name], "stand_in"):
                module = ModuleType(".".join(parts[:n]))
                module.stand_in = True  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(sys.modules[name], attribute, function)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("package", "method"), [(p, m) for p, known in PEERS.items() for m in known if not known[m].differs])
def test_a_peer_is_called_so_that_it_computes_our_method(package: str, method: str) -> None:
    """Output and the gradient of every input, against the recurrence, value heads as many as key heads."""
    op = getattr(zoo, method)
    b, t, h, k, v = SHAPE
    x = sample(op, Case(b, t, h, key_dim=k, value_dim=v, defaults=True)).inputs
    function = CONTENDERS[package].prepare(op, torch.float64)
    found, wanted = function(**x), lsmc.reference(op)(**x)
    torch.testing.assert_close(found, wanted)
    d_o = torch.randn_like(wanted)
    for mine, theirs in zip(*(torch.autograd.grad(o, list(x.values()), d_o) for o in (wanted, found)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_every_peer_computes_a_method_of_the_zoo() -> None:
    assert {m for known in PEERS.values() for m in known} <= set(zoo.names())
    assert set(PEERS) <= set(CONTENDERS)


def missing(package: str) -> Iterator[str]:
    yield from {peer.function.partition(":")[0] for peer in PEERS[package].values()}


@pytest.mark.parametrize("package", PEERS)
def test_a_peer_that_cannot_be_imported_is_absent_with_the_reason(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in missing(package):
        monkeypatch.setitem(sys.modules, module, None)
    op = getattr(zoo, next(iter(PEERS[package])))
    timing = measure.measure(op, (1, 4, 1, 2, 2), "cpu", against=[package])
    assert list(timing.runs) == ["eager"]
    assert "Error" in timing.absent[package]


@pytest.mark.usefixtures("packages")
def test_a_peer_is_absent_where_it_raises_or_does_not_know_the_method() -> None:
    stand_in = sys.modules["fla.ops.gla"]

    def refuses(*given: Any, **options: Any) -> Any:
        raise RuntimeError("not on this device")

    stand_in.chunk_gla = refuses  # type: ignore[attr-defined]
    timing = measure.measure(zoo.gla, (1, 4, 1, 2, 2), "cpu", against=["fla", "flashqla"])
    assert timing.absent == {"fla": "RuntimeError: not on this device", "flashqla": "no function of it is known for this method"}
    other = lsmc.LSM("gla", update=lsmc.outer(lsmc.k, lsmc.v))  # of the same name, but another method
    with pytest.raises(Absent, match="no function"):
        CONTENDERS["fla"].prepare(other, torch.float32)


def test_softmax_attention_stands_beside_without_errors() -> None:
    timing = measure.measure(zoo.bla, (1, 8, 2, 4, 4), "cpu", against=["sdpa"])
    assert timing.runs["sdpa"].forward_backward_ms > 0
    assert timing.runs["sdpa"].errors == {}
    assert set(timing.runs["eager"].errors) == {"o", "q", "k", "v"}


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**inputs: Tensor) -> Tensor:
        raise RuntimeError("wrong")

    monkeypatch.setitem(CONTENDERS, "eager", measure.dataclasses.replace(CONTENDERS["eager"], prepare=lambda op, dtype: fails))
    with pytest.raises(RuntimeError, match="wrong"):
        Subject(zoo.bla, (1, 4, 1, 2, 2), "cpu").first_call("eager")


def test_the_floor_moves_inputs_and_outputs_once_or_three_times() -> None:
    timing = measure.measure(zoo.gla, (2, 8, 3, 4, 5), "cpu")
    assert timing.bytes == 4 * 2 * 8 * 3 * (3 * 4 + 2 * 5)  # q, k, g and v, o in float32
    once, thrice = timing.floor_ms
    assert once == pytest.approx(1e3 * timing.bytes / timing.ceilings.bytes_per_s)
    assert thrice == pytest.approx(3 * once)
    assert 0 < 2 * timing.flops[0] < timing.flops[1]


@pytest.mark.parametrize("name", zoo.names())
def test_decoding_is_measured_against_the_memory_read_and_written_once(name: str) -> None:
    canonical = getattr(zoo, name).canonical
    size = {"K": 4, "V": 4 if canonical.square else 3, "F": 16}
    found = measure.decode(getattr(zoo, name), (2, 7, 2, 4, size["V"]), "cpu")
    assert found.shape == (2, 1, 2, 4, size["V"])
    assert found.bytes == 2 * 4 * 2 * 2 * sum(math.prod(size[d] for d in f.dims) for f in canonical.states)
    assert found.step_ms > 0 and found.floor_ms > 0
    assert max(found.errors.values()) < 1e-5
    assert Decode.of(json.loads(json.dumps(found.record()))) == found


# --- processes


def test_a_first_call_reports_seconds_or_why_there_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first.main("bla", "eager", "cpu", "1,8,1,2,2", "1,16,1,2,2")
    assert len(json.loads(capsys.readouterr().out)["seconds"]) == 2
    monkeypatch.setitem(sys.modules, "flash_qla", None)
    first.main("gated_deltanet", "flashqla", "cpu", "1,8,1,2,2")
    assert "Error" in json.loads(capsys.readouterr().out)["absent"]


@pytest.mark.slow
def test_first_calls_are_made_with_empty_caches_that_are_used_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(["bla"], shapes=["1,32,1,8,8"], device="cpu", against=["flashqla"], first_calls=2, out=tmp_path / "out.json",
                 caches=tmp_path / "caches")
    [found] = record["results"]
    seconds = found["runs"]["eager"]["cold_s"]
    assert seconds > 0
    assert command._cold({"bla": ["1,32,1,8,8"]}, [], "cpu", tmp_path / "caches", 1, 0.0) == {"bla": {"eager": seconds}}
    assert found["absent"] == {"flashqla": "no function of it is known for this method"}
    assert json.loads((tmp_path / "out.json").read_text()) == record
    assert "absent: flashqla for bla" in capsys.readouterr().out


def test_a_first_call_that_takes_too_long_makes_a_peer_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], *, env: dict[str, str], timeout: float, **options: Any) -> Any:
        assert {env[variable] for variable in command_caches} == {f"{tmp_path}/first/gla/{command[4]}/{n}" for n in command_caches.values()}
        raise subprocess.TimeoutExpired(command, timeout)

    command_caches = command.CACHES
    monkeypatch.setattr(command.subprocess, "run", hangs)
    asked = ({"gla": ["1,8,1,2,2"]}, ["fla", "loop", "sdpa"], "cpu", tmp_path, 2, 3.0)
    assert command._cold(*asked) == {"gla": dict.fromkeys(("fla", "eager"), "its first call took more than 3 s")}
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, 'said\n{"seconds": [1.5]}\n'))
    for _ in range(2):  # a second try finds what the first one left: these caches were not empty
        assert command._cold(*asked) == {"gla": {"fla": None, "eager": None}}


def test_a_method_that_fails_leaves_the_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(name: str, *rest: Any) -> dict[str, Any]:
        if name == "gla":
            return {"results": [], "decode": [], "failed": [{"method": name, "why": "it broke"}]}
        return {"results": [timing(name).record()], "decode": [], "failed": []}

    monkeypatch.setattr(command, "_in_a_process", one)
    with pytest.raises(LsmConfigError, match="gla could not be measured:\nit broke"):
        run(["gla", "bla"], device="cpu", out=tmp_path / "out.json")
    assert [found["method"] for found in json.loads((tmp_path / "out.json").read_text())["results"]] == ["bla"]


@pytest.mark.parametrize("settings", [{"against": ["none"]}, {"decoding": True, "against": ["fla"]}, {"first_calls": -1}])
def test_settings_that_cannot_work_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(LsmConfigError, match=next(iter(settings)).removesuffix("ding")):
        run(["bla"], device="cpu", **settings)


# --- tables and pages


def timing(method: str, shape: tuple[int, int, int, int, int] = (16, 4096, 8, 128, 128)) -> Timing:
    errors = {"o": 2e-3, "q": 3e-3}
    runs = {
        "eager": Run(1.0, 9.0, 0.3, 1.0, 0.3, 1.0, 0.8, 500.0, errors),
        "fla": Run(9.0, 99.0, 0.6, 2.0, 0.6, 2.0, None, 1500.0, errors, ["not captured in a CUDA graph: why <not>"]),
        "sdpa": Run(0.1, None, 1.0, 4.0, 1.0, 4.0, 3.9, 700.0),
    }
    return Timing(method, shape, "bfloat16", "GPU & more", Ceilings(4e12, 8e14), 512 << 20, (2e10, 6e10), runs, {"helion": "no <module>"})


def recorded() -> dict[str, Any]:
    results = [timing(m, s).record() for s in ((16, 4096, 8, 128, 128), (1, 64, 1, 8, 8)) for m in zoo.names()]
    token = Decode("gla", (64, 1, 16, 128, 128), "bfloat16", "GPU", Ceilings(4e12, 8e14), 1 << 27, 0.1, 0.04, {"o": 1e-3, "state": 1e-4})
    return {"environment": {"date": "2026-11-25", "torch": "2"}, "results": results, "decode": [token.record()], "failed": []}


def test_a_page_stands_alone_and_shows_every_method_and_contender() -> None:
    text = render(recorded())
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img"} & set(page.tags)
    assert "http" not in text and "url(" not in text
    for word in (*zoo.names(), "eager", "fla", "sdpa", "helion for", "no <module>", "why <not>", "4000 GB/s", "800 TFLOP/s", "one token"):
        assert word in page.text
    assert "nan" not in text and "inf" not in text.replace("info", "")


def test_a_page_of_nothing_is_a_page() -> None:
    assert Page(render({"environment": {"date": "today"}, "results": [], "decode": [], "failed": []})).open == []


def test_what_an_earlier_run_wrote_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.json").write_text(json.dumps(recorded()))
    run(read=tmp_path / "out.json", page=tmp_path / "pages" / "out.html", markdown=True)
    printed = capsys.readouterr().out
    assert "| gla | 16,4096,8,128,128 | fla | 0.600 | 2.000 |  | 2.00× |" in printed
    assert "| gla | 64,1,16,128,128 | 0.100 | 0.040 |" in printed
    assert "absent: helion for" in printed
    assert (tmp_path / "pages" / "out.html").read_text().startswith("<!doctype html>")
    assert Timing.of(timing("gla").record()) == timing("gla")
    (tmp_path / "out.json").write_text('{"results": [{}]}')
    with pytest.raises(LsmConfigError, match="out.json"):
        run(read=tmp_path / "out.json")
