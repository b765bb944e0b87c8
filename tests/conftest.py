"""Shared by all tests: few threads, deterministic property tests, visible skips, golden files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.fx import GraphModule

torch.set_num_threads(1)  # the tensors are small: more threads would mostly wait for each other

# Derandomised: the same examples on every run, so a red test is a change of the code.
# LSMC_EXAMPLES=1000 digs deeper.
settings.register_profile(
    "lsmc",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=int(os.environ.get("LSMC_EXAMPLES", "25")),
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
    print_blob=True,
)
settings.load_profile("lsmc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--accept-goldens", action="store_true", help="write the present text as the golden text"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_slow = pytest.mark.skip(reason="slow: add --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(not_slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: the text equals ``tests/golden/<name>.txt``; ``--accept-goldens`` writes it."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--accept-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists():
            pytest.fail(f"no golden {path.name}: read the text, then `make golden` accepts it\n\n{text}", pytrace=False)
        else:
            lines = [x.splitlines() for x in (path.read_text(), text)]
            changes = list(difflib.unified_diff(*lines, "accepted", "now", lineterm=""))
            if changes:
                pytest.fail("\n".join([f"{path.name} changed; `make golden` accepts it", *changes]), pytrace=False)

    return check


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphModule]]:
    """What `lsmc.compile` hands to Inductor, which is left out: graphs run as they are."""
    seen: list[GraphModule] = []

    def keep(module: GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
        seen.append(module)
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", keep)
    yield seen
    torch._dynamo.reset()
