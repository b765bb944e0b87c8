"""Every program of the zoo, stage by stage, as accepted text: a change of the compiler shows as a diff of what it derives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lsmc
from lsmc import LSM
from lsmc.pipeline import Options, stages

STAGES = ("canonical", "chunk", "backward")
HERE = Path(__file__).parent


def text(op: LSM, stage: str) -> str:
    return stages(op.canonical, Options())[stage]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("op", lsmc.zoo.METHODS, ids=lambda op: op.name)
def test_programs_are_the_accepted_ones(op: LSM, stage: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{op.name}.{stage}", text(op, stage))


def test_every_golden_belongs_to_a_method(request: pytest.FixtureRequest) -> None:
    """What a removed method or stage leaves behind is an error; `make golden` removes it."""
    known = {f"{name}.{stage}.txt" for name in lsmc.zoo.names() for stage in STAGES}
    stale = [path for path in HERE.glob("*.txt") if path.name not in known]
    if request.config.getoption("--accept-goldens"):
        for path in stale:
            path.unlink()
    else:
        assert not stale


def test_a_change_is_shown_line_by_line(request: pytest.FixtureRequest, golden: Callable[[str, str], None]) -> None:
    if request.config.getoption("--accept-goldens"):
        pytest.skip("would accept the change")
    changed = text(lsmc.zoo.gla, "chunk").replace("output o", "output out")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)gla.chunk.txt changed; `make golden`.*\n-output o =.*\n\+output out ="):
        golden("gla.chunk", changed)


def test_text_is_the_same_in_every_process() -> None:
    """Neither hash seeds nor what was compiled before reach the text."""
    code = (
        "import lsmc\nfrom lsmc.pipeline import Options, stages\n"
        "for op in reversed(lsmc.zoo.METHODS[::3]):\n    for text in stages(op.canonical, Options()).values(): print(text)"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(HERE.parents[1])},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(seen) == 1
