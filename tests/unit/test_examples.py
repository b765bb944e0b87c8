"""The examples: methods that the compiler was not written for, each in a few lines, each obeying every law of `lsmc check`."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from lsmc import LSM, cases, cli, laws, reference, zoo
from lsmc.resolve import resolve

FILES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
CASE = cases.Case(batch=2, time=9, groups=2, key_dim=3, value_dim=2)


def example(name: str) -> LSM:
    made: LSM = resolve(f"{next(path for path in FILES if path.stem == name)}:{name}")
    return made


def inputs(method: LSM, **more: Any) -> dict[str, torch.Tensor]:
    """Inputs of a method by name, those of the others among them the same."""
    return {name: more.get(name, x.detach()) for name, x in cases.sample(method, CASE).inputs.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_has_at_most_twelve_lines_of_code_and_says_what_it_declares(path: Path) -> None:
    tree = ast.parse(path.read_text())
    text = ast.get_docstring(tree)
    assert text is not None and "arXiv" in text
    assert sum(node.end_lineno - node.lineno + 1 for node in tree.body[1:] if node.end_lineno) <= 12
    assert all(field.name in text for field in example(path.stem).inputs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_law_holds_for_an_example(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "CORNERS", [cases.CORNERS[GATES_HERE]])
    report = laws.check(example(path.stem), examples=1)
    assert list(report.laws) == list(laws.LAWS)


GATES_HERE = list(cases.GATES).index("mixture")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_checks_an_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", f"{path}:{path.stem}"])
    assert f"{path.stem}: 7 laws hold" in capsys.readouterr().out


# --- what they have in common with methods of the zoo


def test_two_steps_for_a_token_are_two_tokens() -> None:
    x = inputs(example("gated_deltaproduct"))
    k, v, beta = (torch.stack([x[n].repeat_interleave(2, 2) if n == "k" else x[n], x[f"{n}2"]], 2).flatten(1, 2) for n in ("k", "v", "beta"))
    q, g = (torch.stack(pair, 2).flatten(1, 2) for pair in ([x["q"].repeat_interleave(2, 2)] * 2, [x["g"], 0 * x["g"]]))
    o = reference(zoo.gated_deltanet)(q=q, k=k, v=v, g=g, beta=beta)
    torch.testing.assert_close(example("gated_deltaproduct")(**x), o[:, 1::2])


def test_a_stabilised_memory_gives_what_one_without_stabiliser_gives() -> None:
    method, x = example("mlstm"), inputs(example("mlstm"))
    f, i, m = x["g"], 3 * torch.randn_like(x["i"]), [torch.zeros_like(x["i"][:, 0])]
    for now, add in zip(f.unbind(1), i.unbind(1)):
        m.append(torch.maximum(now + m[-1], add))
    before, top = (torch.stack(m[start : start + f.shape[1]], 1) for start in (0, 1))
    o, (M, n) = method(**x | {"g": f + before - top, "i": i - top, "m": top}, return_final_state=True)
    raw, (raw_M, raw_n) = method(**x | {"g": f, "i": i, "m": torch.zeros_like(i)}, return_final_state=True)
    torch.testing.assert_close([o, M * m[-1].exp()[..., None, None], n * m[-1].exp()[..., None]], [raw, raw_M, raw_n])


def test_gates_that_are_equal_leave_one_write_strength() -> None:
    x = inputs(example("gated_deltanet2"))
    beta = torch.rand_like(x["v"][..., 0])
    o = example("gated_deltanet2")(**x | {"b": beta[..., None].expand_as(x["b"]), "w": beta[..., None].expand_as(x["w"])})
    torch.testing.assert_close(o, zoo.kda(**{n: x[n] for n in "qkvg"}, beta=beta))


def test_without_corrections_of_its_own_it_is_the_delta_rule() -> None:
    x = inputs(example("comba"))
    o = example("comba")(**x | {"b": torch.ones_like(x["b"]), "d": torch.zeros_like(x["d"]), "g": torch.zeros_like(x["g"])})
    torch.testing.assert_close(o, zoo.deltanet(**{n: x[n] for n in ("q", "k", "v", "beta")}))
