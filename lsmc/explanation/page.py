"""The page of an explanation: its sections in order, in one file with its style and script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lsmc.explanation import numbers, stages
from lsmc.explanation.subject import Findings, Subject, find_out
from lsmc.runtime.pages import document

if TYPE_CHECKING:
    from lsmc.explanation import Explanation
    from lsmc.explanation.ranks import Ranks

SECTIONS = (
    stages.declared, stages.canonical, stages.chunk, stages.graph, stages.backward,
    numbers.schedules, numbers.kernels, numbers.floor, numbers.tested, numbers.made,
)  # fmt: skip


def write(explanation: Explanation, path: Path, examples: int, ranks: Ranks | None = None) -> Path:
    """Find out what takes time, and write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a path that cannot be written says so at once
    path.write_text(render(explanation, find_out(explanation, examples), ranks), encoding="utf-8")
    return path


def render(explanation: Explanation, found: Findings, ranks: Ranks | None = None) -> str:
    """The page, from an explanation and what was found out about it, and a model on a mesh."""
    subject = Subject(explanation, found)
    sections = [make(subject) for make in SECTIONS]
    if ranks is not None:
        from lsmc.explanation.ranks import plan

        sections.append(plan(ranks))
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return document(explanation.name, stages.title(explanation.declaration), sections, style=style, script=script,
                    aside=stages.lead(subject, sections))
