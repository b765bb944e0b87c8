"""The page of `lsmc explain -o`: it stands alone, shows every stage, and finds a name again wherever it went."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lsmc
from lsmc import cli, laws, zoo
from lsmc.adjoint import differentiate
from lsmc.chunk import derive
from lsmc.errors import LsmCheckError
from lsmc.explanation import costs, numbers
from lsmc.explanation.costs import Compiling, Failure
from lsmc.explanation.mathml import chunk, step
from lsmc.explanation.page import SECTIONS, render
from lsmc.explanation.ranks import SMALL, Ranks, plan
from lsmc.explanation.subject import Findings, Subject, kernels_of
from lsmc.factors import hoist
from lsmc.ir import Program
from lsmc.lowering import ptxas
from lsmc.lowering.backends.triton_sums import gather
from lsmc.lowering.offline import Resources
from lsmc.runtime.traffic import PARAMETERS, messages
from lsmc.schedules import Shape
from tests.declarations import Drawn, Wider, declarations, wider
from tests.pages import Page
from tests.unit.test_ir import draw, run

DIFFERENT = ("gated_deltanet", "gateloop", "titans", "mamba")
"""Methods with decays by one number, along K and of every entry; a solve, a rotation, momentum, a scan."""


@functools.cache
def explained(name: str) -> Any:
    return lsmc.explain(getattr(zoo, name))


def found(explanation: Any) -> Findings:
    """What would be found out, made up."""
    report = laws.Report("made up", {name: laws._Tally(3e-13, 11, 1) for name in laws.LAWS}, 1.0)
    made = Findings(laws=report)
    for way, direction in (("f", explanation.plan.training), ("b", explanation.plan.backward)):
        for n, k in enumerate(kernels_of(direction)):
            made.kernels[way, n] = Resources(k.name, 100 + n, 256 * n, 40960, 8, 4, 2)
    return made


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba"])
def test_a_page_stands_alone_and_shows_every_stage(name: str) -> None:
    explanation = explained(name)
    text = render(explanation, found(explanation))
    page = Page(text)
    assert page.open == []
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert len(re.findall("<section id=", text)) == len(SECTIONS)
    plan = explanation.plan
    for stage in ("canonical", "chunk", "backward"):
        for line in explanation.stages()[stage].splitlines()[1:]:
            assert line in page.text
    for direction in (plan.training, plan.backward):
        for kernel in kernels_of(direction):
            assert all(line.rstrip() in page.text for line in kernel.source.strip().splitlines())
        for schedule, _, _ in direction.choice.estimates:
            assert schedule.name in page.text
    assert "nan" not in page.text and not re.search(r"\binf\b", page.text)


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_term_of_the_step_is_found_in_the_programs_and_in_the_code(name: str) -> None:
    """Whoever points at a term sees a line of every later stage, except where a pass has made it disappear."""
    canonical = getattr(zoo, name).canonical
    explanation = explained(name)
    about = Subject(explanation, found(explanation))
    terms = {line.term for line in step(canonical)} - {"M"}
    assert terms <= {line.term for line in chunk(canonical)} | {"decay", "o", "momentum"}
    for way in "fb":
        lines = {m for _, marks, _ in about.trail.lines(way) for m in marks.states | marks.uses}
        code: set[str] = set()
        direction = about.directions[way]
        for source in [k.source for k in kernels_of(direction)] or [direction.executable.source]:
            code |= {m for _, marks in about.trail.source(way, source, direction.target) for m in marks.states | marks.uses}
        for n in (*(f.name for f in canonical.inputs), *(terms if way == "f" else ()), "M"):
            assert f"n-{n}" in lines, f"{n} is in no line of program {way}"
            assert f"n-{n}" in code or n in ("decay", "o"), f"{n} is in no line of code {way}"
        values = {m for m in code if m.startswith(way)}
        assert len(values) > len(direction.program.ops) / 2, "the code works out the values of the program"


@pytest.mark.parametrize("name", ["gated_deltanet", "gateloop", "titans", "rwkv7", "mamba"])
def test_terms_keep_their_values_through_every_pass(name: str) -> None:
    """Every value of a chunk program, followed by name through the passes below it, is that value wherever it is found."""
    canonical = getattr(zoo, name).canonical
    derived = derive(canonical)
    terms = {n for n, _ in derived.terms}
    assert {f"U{n}" for n in range(len(canonical.writes))} | {x.symbol.name for x in (*canonical.reads, *canonical.queries)} <= terms
    tracked = dataclasses.replace(derived, terms=tuple((str(op.id), op.id) for op in derived.ops))
    backward = differentiate(tracked)
    inputs = {op.attr("name"): draw(op, derived) for op in backward.inputs()}
    wanted = named_values(tracked, inputs)
    for program in (hoist(tracked), backward, hoist(backward), gather(hoist(backward))):
        found = named_values(program, inputs)
        assert len(found) > len(wanted) / 3
        for n, x in found.items():
            torch.testing.assert_close(x, wanted[n].expand(x.shape), rtol=1e-9, atol=1e-12)


def named_values(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The value of every term."""
    return {n: x for n, x in run(dataclasses.replace(program, outputs=program.terms), inputs).items() if not n.endswith("+")}


@given(drawn=st.one_of(declarations(), wider()))
@settings(max_examples=16)
def test_the_mathematics_of_a_drawn_method_is_well_formed_and_names_its_inputs(drawn: Drawn | Wider) -> None:
    canonical = drawn.declaration().canonical
    lines = step(canonical)
    named = {x.get("data-t") for line in (*lines, *chunk(canonical)) for x in ElementTree.fromstring(line.math).iter()}
    assert {f"n-{f.name}" for f in (*canonical.inputs, *canonical.states) if f.name != "I"} <= named
    assert [line.term for line in lines][-1] == "o"


def test_the_work_of_a_schedule_is_above_its_floor() -> None:
    """What is moved is at least what must be; the launches of a candidate add up to the time by which it was ranked."""
    for method in (zoo.gla, zoo.mamba, zoo.deltanet):
        explanation = lsmc.explain(method, shape=Shape(64, 2048, 64, 32))
        about = Subject(explanation, found(explanation))
        for way, direction in about.directions.items():
            for candidate, (schedule, seconds, _) in zip(about.candidates[way], direction.choice.estimates, strict=True):
                assert candidate.schedule == schedule
                assert candidate.seconds == pytest.approx(seconds)
            token = about.tokens[way]
            assert token.moved >= token.least > 0
            assert token.predicted >= token.floor > 0
            bodies = about.bodies(way).values()
            assert set().union(*bodies) <= {op.id for op in about.trail.program(way).ops}
        assert "was chosen" in numbers.why(about.candidates["b"])


@functools.cache
def ranks() -> Ranks:
    made: Ranks = cli._ranks("gated_deltanet", "sp=2,tp=2", "tiny", "LLLN", 2, 64)
    return made


def test_the_plan_of_ranks_shows_every_message_at_its_place() -> None:
    """Equal blocks once; bytes of gradients summed up, small messages counted, all others drawn, those that overlap beside what
    hides them."""
    text = plan(ranks())
    page = Page(text)
    assert page.open == []
    assert re.findall("<h3>(.*?)</h3>", text) == ["Around the blocks", "blocks.0", "blocks.1, blocks.2", "blocks.3", "In all",
                                                 "On more ranks"]
    found = dict(messages(ranks().module, ranks().axes))
    large = {n: m for n, m in found.items() if m.of != PARAMETERS and m.forward_bytes + m.backward_bytes > SMALL}
    again = [n for n in large if "blocks.1" in str(n.meta["nn_module_stack"])]
    assert len(re.findall("<circle", text)) == len(large) - len(again) > len(again) > 4
    assert all(m.of[:60] in page.text for m in found.values())
    gather = next(m for m in large.values() if m.of.startswith("memories"))
    assert f"sp: all-gather {gather.forward_bytes / 1e3:.1f} kB, back reduce-scatter {gather.backward_bytes / 1e3:.1f} kB" in page.text
    assert "beside elementwise" in page.text, "queries are turned while keys and values are under way"
    assert "mixer: gated_deltanet" in page.text and "mixer: softmax attention" in page.text


# --- what may be missing


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = lsmc.explain(zoo.bla, shape=Shape(8, 512, 32, 32))
    made = found(explanation)
    made.kernels["f", 0] = Failure("no end after 240 s")
    made.laws = LsmCheckError("leaks breaks a law", help="look")
    text = Page(render(explanation, made)).text
    assert "no end after 240 s" in text
    assert "leaks breaks a law" in text
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in costs.obstacle()
    monkeypatch.setattr(ptxas, "in_use", lambda: None)
    assert "ptxas" in costs.obstacle()
    monkeypatch.setattr(costs.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in costs.obstacle()
    text = Page(render(explanation, Findings(obstacle=costs.obstacle()))).text
    assert "Nothing was compiled for sm_90: Triton is not installed" in text
    assert "Not tested." in text


WITHOUT = {
    "sums over V": lsmc.LSM("own", decay=lsmc.Matrix(-lsmc.outer(lsmc.exp(lsmc.vector("a")), lsmc.exp(lsmc.vector("b", over="V")))),
                            update=lsmc.outer(lsmc.k, lsmc.v), readout=lsmc.rmsnorm(lsmc.q @ lsmc.M)),
    "sums over all pairs": lsmc.LSM("own", update=lsmc.outer(lsmc.pairs(lsmc.k), lsmc.v - lsmc.pairs(lsmc.k) @ lsmc.M),
                                    readout=lsmc.pairs(lsmc.q) @ lsmc.M),
}


@pytest.mark.parametrize("rule", WITHOUT)
def test_the_rule_by_which_a_method_has_no_kernels_is_said(rule: str) -> None:
    explanation = lsmc.explain(WITHOUT[rule])
    assert rule in explanation.stages()["schedule"].splitlines()[0]
    assert rule in numbers.kernels(Subject(explanation, Findings()))
    assert lsmc.explain(WITHOUT[rule], target="aten").plan.lacking == ""


@pytest.mark.skipif(bool(costs.obstacle()), reason=f"cannot compile: {costs.obstacle()}")
def test_a_kernel_is_compiled_for_the_page() -> None:
    direction = lsmc.explain(zoo.bla, shape=Shape(8, 512, 16, 16, 16)).plan.forward
    jobs = [Compiling(direction.program, direction.choice.schedule, False, 0, Shape(8, 512, 16, 16, 16))]
    [(job, made)] = costs.resources(jobs)
    assert job == jobs[0]
    assert isinstance(made, Resources), made
    assert 0 < made.registers <= 255


SCRIPT = """
import lsmc
from lsmc.schedules import Shape
print("from the top")
lsmc.explain(lsmc.zoo.bla, shape=Shape(8, 512, 16, 16)).html("report.html", examples=1)
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(costs.obstacle()), reason=f"cannot compile: {costs.obstacle()}")
def test_a_script_writes_the_page_and_is_run_once(tmp_path: Path) -> None:
    """Processes that compile do not run the script again that started them."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=280)
    assert done.stdout.split("\n") == ["from the top", ""]
    page = Page((tmp_path / "report.html").read_text())
    assert "Compiled for sm_90a by" in page.text and "not compiled" not in page.text
    assert all(law.replace("_", " ") in page.text for law in laws.LAWS)


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def quick(explanation: Any, examples: int) -> Findings:
        asked.append(examples)
        return found(explanation)

    monkeypatch.setattr(lsmc.explanation.page, "find_out", quick)
    path = tmp_path / "new" / "report.html"
    made = ranks()
    monkeypatch.setattr(cli, "_ranks", lambda *_: made)
    cli.main(["explain", "bla", "--shape", "2,512,4,32,16", "--mesh", "sp=2,tp=2", "-o", str(path)])
    assert f"{path} explains bla" in capsys.readouterr().out
    assert "8 sequences (heads counted) of 512 tokens, K = 32, V = 16" in path.read_text()
    assert "The plan of the ranks" in path.read_text()
    assert asked == [2]
    with pytest.raises(OSError, match="report"):
        lsmc.explain(zoo.bla).html(path / "report.html")


# --- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")

PROBE = """
const channel = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
const behind = x => { for (; x; x = x.parentElement) { const c = getComputedStyle(x).backgroundColor; if (!/, 0\\)/.test(c)) return c; } };
const contrast = x => { const [a, b] = [light(getComputedStyle(x).color), light(behind(x))].sort((m, n) => n - m); return (a + 0.05) / (b + 0.05); };
const box = x => x.getBoundingClientRect();
const power = document.querySelector('aside msup');
const over = (selector, type) => document.querySelector(selector).dispatchEvent(new MouseEvent(type, {bubbles: true}));
const lit = () => [...new Set([...document.querySelectorAll('section .is, section .use')].map(x => x.closest('section').id))];
const all = ['p', 'td', '.key', 'pre .l', 'pre .l em', 'pre .l b', 'pre i', 'h2', 'aside nav a', '.bad', '.ok', '.chips span'];
over('aside .stated[data-t~=n-U0]', 'pointerover');
const found = {
  errors: window.errors, width: document.documentElement.scrollWidth, window: innerWidth,
  raised: box(power.lastElementChild).top < box(power.firstElementChild).top && box(power).height > 12,
  background: light(behind(document.body)), lit: lit(), lines: document.querySelectorAll('pre .is').length,
  badges: [...document.querySelectorAll('nav i')].filter(x => x.textContent).map(x => x.dataset.count),
  contrast: all.map(s => [s, Math.min(...[...document.querySelectorAll(s)].slice(0, 400).map(contrast))]),
  beside: box(document.querySelector('aside')).right <= box(document.querySelector('section')).left,
};
document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}));
found.cleared = lit().length === 0;
over('aside [data-t~=n-k]', 'click');
over('aside [data-t~=n-q]', 'pointerover');
found.kept = document.querySelector('aside tr[data-t~=n-k]').classList.contains('is') && !document.querySelector('aside tr[data-t~=n-q]').classList.contains('is');
"""


def browse(text: str, folder: Path, width: int, dark: bool) -> Any:
    """What the probe sees of a page in a browser window."""
    probe = f"addEventListener('load', () => {{ {PROBE} document.body.dataset.found = JSON.stringify(found); }});"
    watch = "window.errors = []; addEventListener('error', e => errors.push(e.message));"
    text = text.replace("<head>", f"<head><script>{watch}</script>").replace("</body>", f"<script>{probe}</script></body>")
    path = folder / f"page{width}.html"
    path.write_text(text)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    assert CHROMIUM is not None
    out = subprocess.run([CHROMIUM, *FLAGS, scheme, f"--window-size={width},900", f"--user-data-dir={folder / f'user{width}'}",
                          "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    seen = re.search(r'data-found="(.*?)"', out)
    assert seen, "the page's own scripts do not run"
    return json.loads(seen[1].replace("&quot;", '"'))


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (700, True)])
def test_a_browser_shows_the_page_readably_and_marks_what_is_pointed_at(tmp_path: Path, width: int, dark: bool) -> None:
    explanation = explained("gated_deltanet")
    seen = browse(render(explanation, found(explanation), ranks()), tmp_path, width, dark)
    assert seen["errors"] == []
    assert seen["width"] <= seen["window"], "nothing sticks out"
    assert seen["beside"] == (width > 1180)
    assert seen["raised"], "mathematics is laid out"
    assert seen["background"] < 0.05 if dark else seen["background"] > 0.85
    assert {"declaration", "canonical", "chunk", "graph", "backward", "kernels"} <= set(seen["lit"])
    assert set(seen["badges"]) <= set(seen["lit"]) and "kernels" in seen["badges"]
    assert seen["lines"] >= 4
    assert seen["cleared"] and seen["kept"]
    assert {s: c for s, c in seen["contrast"] if c is not None and c < 4.5} == {}
