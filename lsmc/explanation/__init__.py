"""How a method is compiled, stage by stage: as text, and as one page that needs nothing else.

    lsmc.explain(m)              →  `Explanation`: prints every stage
    lsmc.explain(m).html(path)   →  the page: mathematics, programs as pictures, schedules, kernels, costs and laws
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsmc.lowering.plan import Plan
from lsmc.lsm import LSM
from lsmc.pipeline import CHUNK, TYPICAL, Options, compile_plan, texts
from lsmc.schedules import Shape

if TYPE_CHECKING:
    from lsmc.explanation.ranks import Ranks


@dataclass(frozen=True)
class Explanation:
    """Every stage between a declaration and the code that runs; `str` joins their texts."""

    declaration: LSM
    plan: Plan = field(repr=False)
    text: Mapping[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        return self.declaration.name

    def stages(self) -> dict[str, str]:
        """Stage name → text, in the order of the pipeline."""
        return dict(self.text)

    def html(self, path: str | Path, *, examples: int = 2, ranks: Ranks | None = None) -> Path:
        """Write the page to `path` and return it: one file without a reference to any other, that opens in any browser.

        The kernels are compiled for sm_90 on the way, where Triton and its ptxas are there, and the laws of `lsmc.check` are
        tested on `examples` random cases each and on all corners: seconds for most methods, a minute or two for some. What
        could not be compiled, and a law that does not hold, stands in the page. `ranks` is a model on a mesh, of which the page
        then has a picture: `lsmc explain METHOD --mesh sp=2,tp=2 -o FILE`. Raises OSError where `path` cannot be written.
        """
        from lsmc.explanation.page import write

        return write(self, Path(path), examples, ranks)

    def __str__(self) -> str:
        return "\n\n".join(f"── {name} " + "─" * (90 - len(name)) + f"\n{text}" for name, text in self.text.items())


def explain(declaration: LSM, *, scale: float = 1.0, chunk: int = CHUNK, schedule: str | None = None,
            target: str = "triton", shape: Shape | None = None) -> Explanation:
    """How a declaration is compiled, stage by stage; `target` is "triton" or "aten", `shape` what schedules are ranked at."""
    options = Options(scale=scale, chunk=chunk, schedule=schedule, target=target, fresh=True)
    plan = compile_plan(declaration.canonical, options, replace(shape or TYPICAL, chunk=chunk))
    return Explanation(declaration, plan, {"declaration": repr(declaration), **texts(plan)})


__all__ = ["Explanation", "explain"]
